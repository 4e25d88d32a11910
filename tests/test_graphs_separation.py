"""Is an inverse an I-map: textbook answers, both ways, and agreement with path enumeration."""

import pytest
from dseparation import Paths
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, labelled_dags, model_graphs, role_assignments

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.inversion import (
    faithful_inverse,
    fully_connected_inverse,
    mean_field_inverse,
    stochastic_inverse,
)
from pyro_graphflows.graphs.separation import (
    Independence,
    is_imap,
    is_minimal_imap,
    violated_independencies,
)
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph


@st.composite
def inverses(draw, max_nodes=7):
    """Draw a model graph and any inverse of it, faithful or not."""
    graph = draw(model_graphs(max_nodes=max_nodes))
    order = draw(st.permutations(graph.latent))
    earlier = [*graph.observed, *graph.inputs]
    parents = {}
    for node in order:
        parents[node] = [parent for parent in earlier if draw(st.integers(0, 3))]
        earlier.append(node)
    return InverseGraph(graph, parents, sampling_order=order)


@given(inverses())
@examples(200)
def test_agrees_with_path_enumeration(inverse):
    oracle = Paths(inverse.graph.nodes, inverse.graph.edges)
    violated = violated_independencies(inverse)
    assert {(node, other) for node, other, _ in violated} == oracle.violations(inverse)
    assert all(given == inverse.parents[node] for node, _, given in violated)
    assert is_imap(inverse) == (not violated)
    assert is_minimal_imap(inverse) == oracle.is_minimal_imap(inverse)


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_small_dags(num_nodes):
    for edges in labelled_dags(num_nodes):
        oracle = Paths(range(num_nodes), edges)
        for roles in role_assignments(num_nodes):
            graph = ModelGraph(edges, roles["observed"], nodes=range(num_nodes))
            for inverse in (stochastic_inverse(graph), mean_field_inverse(graph)):
                assert is_imap(inverse) == (not oracle.violations(inverse))
            assert is_imap(fully_connected_inverse(graph))
            assert is_minimal_imap(faithful_inverse(graph))


def test_causes_of_a_common_effect():
    graph = ModelGraph(["ax", "bx"], observed=["x"])
    heuristic = stochastic_inverse(graph)
    assert not is_imap(heuristic)
    assert violated_independencies(heuristic) == (Independence("a", "b", ("x",)),)
    assert not is_minimal_imap(heuristic)
    assert is_minimal_imap(faithful_inverse(graph))


def test_chain_and_fork():
    chain = ModelGraph(["ab", "bx"], observed=["x"])
    assert is_minimal_imap(InverseGraph(chain, {"b": ["x"], "a": ["b"]}))
    assert not is_imap(InverseGraph(chain, {"b": ["x"], "a": ["x"]}))
    too_much = InverseGraph(chain, {"b": ["x"], "a": ["b", "x"]})
    assert is_imap(too_much)
    assert not is_minimal_imap(too_much)
    fork = ModelGraph(["xa", "xb"], observed=["x"])
    assert is_minimal_imap(mean_field_inverse(fork))


def test_a_marginalised_node_is_not_observed():
    edges = ["ma", "mb", "ax", "by"]
    parents = {"a": ["x"], "b": ["y"]}
    known = ModelGraph(edges, observed=["m", "x", "y"])
    hidden = ModelGraph(edges, observed=["x", "y"], marginalised=["m"])
    assert is_imap(InverseGraph(known, {node: [*found, "m"] for node, found in parents.items()}))
    violated = violated_independencies(InverseGraph(hidden, parents, sampling_order="ab"))
    assert [(node, other) for node, other, _ in violated] == [("a", "y"), ("b", "a"), ("b", "x")]


def test_heuristic_inverse_of_a_tree_is_unfaithful():
    tree = ModelGraph([((i - 1) // 2, i) for i in range(1, 15)], observed=range(7, 15))
    assert not is_imap(stochastic_inverse(tree))
    assert is_imap(fully_connected_inverse(tree))
    assert not is_minimal_imap(fully_connected_inverse(tree))
    assert not is_imap(mean_field_inverse(tree))
    for order in ("forward", "reverse", "min_fill", "min_fill_all", "auto"):
        assert is_minimal_imap(faithful_inverse(tree, order))


def test_against_another_model_graph():
    """The same factorisation may be faithful to one model and not to another."""
    inverse = InverseGraph(ModelGraph(["ax", "by"], observed=["x", "y"]), {"a": ["x"], "b": ["y"]})
    assert is_imap(inverse)
    coupled = ModelGraph(["ax", "by", "ab"], observed=["x", "y"])
    assert not is_imap(inverse, coupled)
    assert violated_independencies(inverse, coupled)
    assert not is_minimal_imap(inverse, coupled)


@pytest.mark.parametrize("function", [is_imap, is_minimal_imap, violated_independencies])
def test_errors(function):
    inverse = InverseGraph(ModelGraph(["ax", "by"], observed=["x", "y"]), {"a": ["x"], "b": ["y"]})
    with pytest.raises(GraphflowsError, match="Expected an inverse of the latent nodes a; got one of a, b"):
        function(inverse, ModelGraph(["ax", "by"], observed=["x", "b", "y"]))
    with pytest.raises(GraphflowsError, match="that are latent, observed or input nodes; got y"):
        function(inverse, ModelGraph(["ax", "by"], observed=["x"], marginalised=["y"]))
