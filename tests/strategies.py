"""Graphs for tests: all small labelled DAGs, and hypothesis strategies for model graphs and plates."""

from itertools import combinations, product

import networkx as nx
from hypothesis import settings
from hypothesis import strategies as st

from pyro_graphflows.graphs.structures import ModelGraph

__all__ = [
    "dag_edges",
    "examples",
    "labelled_dags",
    "model_graphs",
    "parent_sets",
    "plated_model_graphs",
    "role_assignments",
]


def examples(number):
    """Settings of a property test that always draws the same examples."""
    return settings(max_examples=number, deadline=None, derandomize=True)


def labelled_dags(num_nodes):
    """Yield the edges of every DAG on the nodes 0, ..., n-1: 1, 3, 25, 543 of them for n = 1, 2, 3, 4."""
    pairs = list(combinations(range(num_nodes), 2))
    for signs in product((0, 1, -1), repeat=len(pairs)):
        edges = [(a, b) if sign > 0 else (b, a) for (a, b), sign in zip(pairs, signs, strict=True) if sign]
        if nx.is_directed_acyclic_graph(nx.DiGraph(edges)):
            yield edges


def role_assignments(num_nodes, roles=("latent", "observed")):
    """Yield every assignment of roles to the nodes 0, ..., n-1, as a mapping role -> nodes."""
    for chosen in product(roles, repeat=num_nodes):
        yield {role: [node for node in range(num_nodes) if chosen[node] == role] for role in roles}


@st.composite
def dag_edges(draw, max_nodes=7, min_nodes=1):
    """Draw (number of nodes, edges of a DAG on them); the labels say nothing about the order."""
    num_nodes = draw(st.integers(min_nodes, max_nodes))
    order = draw(st.permutations(range(num_nodes)))
    pairs = list(combinations(order, 2))
    chosen = draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    return num_nodes, [pair for pair, taken in zip(pairs, chosen, strict=True) if taken]


def _with_roles(draw, num_nodes, edges, roles, plates=None):
    graph = nx.DiGraph()
    graph.add_nodes_from(range(num_nodes))
    graph.add_edges_from(edges)
    chosen = {}
    for node in range(num_nodes):
        allowed = [role for role in roles if role != "input" or not graph.in_degree(node)]
        chosen[node] = draw(st.sampled_from(allowed))
    return ModelGraph(
        graph,
        observed=[node for node in chosen if chosen[node] == "observed"],
        inputs=[node for node in chosen if chosen[node] == "input"],
        marginalised=[node for node in chosen if chosen[node] == "marginalised"],
        plates=plates,
    )


@st.composite
def model_graphs(draw, max_nodes=8, roles=("latent", "latent", "observed", "marginalised", "input")):
    """Draw a model graph without plates; latent nodes are twice as likely as others."""
    num_nodes, edges = draw(dag_edges(max_nodes=max_nodes))
    return _with_roles(draw, num_nodes, edges, roles)


# Nested, crossed and overlapping: every set of at most two of three plates.
PLATE_SETS = ((), ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"))


@st.composite
def plated_model_graphs(draw, max_nodes=5, plate_sets=PLATE_SETS, roles=("latent", "latent", "observed")):
    """Draw a model graph whose nodes live in any of the plate sets, with edges in and out of plates."""
    num_nodes, edges = draw(dag_edges(max_nodes=max_nodes, min_nodes=2))
    plates = {node: draw(st.sampled_from(plate_sets)) for node in range(num_nodes)}
    return _with_roles(draw, num_nodes, edges, roles, plates)


@st.composite
def parent_sets(draw, max_nodes=7):
    """Random parents in a random topological order, with some context inputs after the variables."""
    size = draw(st.integers(1, max_nodes))
    context = draw(st.integers(0, 2))
    order = draw(st.permutations(range(size)))
    parents = {}
    for i, v in enumerate(order):
        pool = [*order[:i], *range(size, size + context)]
        parents[v] = draw(st.sets(st.sampled_from(pool))) if pool else set()
    return [parents[v] for v in range(size)], size + context
