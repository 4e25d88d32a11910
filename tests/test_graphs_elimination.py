"""Elimination on a moral graph against networkx, with fill counts worked out afresh at each step."""

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import dag_edges, examples, model_graphs

from pyro_graphflows.graphs.elimination import (
    Eliminator,
    SiteElimination,
    ancestors,
    bit_set,
    indices,
    moral_graph,
    reachable,
)
from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.graphs.plates import expand


def expansion(num_nodes, edges):
    dag = nx.DiGraph()
    dag.add_nodes_from(range(num_nodes))
    dag.add_edges_from(edges)
    return expand(ModelGraph(dag, observed=[]))


def as_digraph(expanded):
    dag = nx.DiGraph()
    dag.add_nodes_from(range(len(expanded)))
    dag.add_edges_from((parent, node) for node in dag for parent in expanded.parents[node])
    return dag


def fill(graph, node):
    around = list(graph[node])
    return [(a, b) for i, a in enumerate(around) for b in around[i + 1 :] if not graph.has_edge(a, b)]


@given(st.sets(st.integers(0, 300)))
def test_bit_sets(members):
    assert indices(bit_set(members)) == sorted(members)


@examples(60)
@given(dag_edges(max_nodes=8))
def test_moral_graph_and_ancestors(graph):
    expanded = expansion(*graph)
    dag = as_digraph(expanded)
    moral = nx.moral_graph(dag)
    assert [set(indices(mask)) for mask in moral_graph(expanded, set(dag), set())] == [
        set(moral[v]) for v in dag
    ]
    for node in dag:
        assert ancestors(expanded, [node]) == nx.ancestors(dag, node) | {node}


@examples(60)
@given(dag_edges(max_nodes=8), st.data())
def test_hidden_nodes_are_eliminated_from_the_moral_graph(graph, data):
    expanded = expansion(*graph)
    dag = as_digraph(expanded)
    hidden = data.draw(st.sets(st.sampled_from(sorted(dag))))
    moral = nx.moral_graph(dag)
    for node in hidden:
        moral.add_edges_from(fill(moral, node))
        moral.remove_node(node)
    found = moral_graph(expanded, set(dag), hidden)
    assert [set(indices(mask)) for mask in found] == [set(moral[v]) if v in moral else set() for v in dag]


@pytest.mark.parametrize("count_observed", [True, False])
@examples(60)
@given(dag_edges(max_nodes=9), st.data())
def test_fill_counts_are_kept_up_to_date(count_observed, graph, data):
    expanded = expansion(*graph)
    dag = as_digraph(expanded)
    observed = data.draw(st.sets(st.sampled_from(sorted(dag))))
    moral = nx.moral_graph(dag)
    eliminator = Eliminator(
        moral_graph(expanded, set(dag), set()), bit_set(observed), count_observed=count_observed
    )
    waiting = set(dag) - observed
    for node in sorted(waiting):
        eliminator.track(node)

    def count(node):
        pairs = fill(moral, node)
        return len(pairs if count_observed else [pair for pair in pairs if not observed.issuperset(pair)])

    while waiting:
        counts = {node: count(node) for node in waiting}
        assert {node: eliminator.fill(node) for node in waiting} == counts
        node = eliminator.best()
        assert node == min(waiting, key=lambda other: (counts[other], other))
        assert set(indices(eliminator.neighbours(node))) == set(moral[node])
        moral.add_edges_from(fill(moral, node))
        moral.remove_node(node)
        eliminator.remove(node)
        waiting.remove(node)


@examples(60)
@given(dag_edges(max_nodes=7), st.data())
def test_markov_boundary_separates_and_is_the_smallest(graph, data):
    expanded = expansion(*graph)
    dag = as_digraph(expanded)
    start = data.draw(st.sampled_from(sorted(dag)))
    known = data.draw(st.sets(st.sampled_from(sorted(dag)))) - {start}
    boundary = reachable(expanded, [start], known)
    assert boundary <= known
    rest = known - boundary
    assert not rest or nx.is_d_separator(dag, {start}, rest, boundary)
    for node in boundary:
        assert not nx.is_d_separator(dag, {start}, {node} | rest, boundary - {node})


@examples(60)
@given(model_graphs())
def test_every_rule_finds_what_its_own_sequence_gives(graph):
    """A greedy run and the same sequence followed by hand are one elimination."""
    elimination = SiteElimination(graph)
    for rule in ("forward", "reverse", "min_fill", "min_fill_all"):
        draft = elimination.run(rule)
        again = elimination.follow(draft.sequence)
        assert again.parents == draft.parents
        assert again.num_edges == draft.num_edges
        assert elimination.run(rule, limit=draft.num_edges).parents == draft.parents
        if elimination.fruitful and draft.num_edges:
            assert elimination.run(rule, limit=draft.num_edges - 1) is None


def test_inner_plates_come_first():
    graph = ModelGraph([("mu", "z"), ("z", "x")], observed=["x"], plates={"z": ["data"], "x": ["data"]})
    for rule in ("forward", "min_fill"):
        draft = SiteElimination(graph).run(rule)
        assert [graph.nodes[site] for site in draft.sequence] == ["z", "mu"]
