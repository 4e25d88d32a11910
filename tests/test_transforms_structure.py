import pickle

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_graphflows.errors import GraphflowsError, NotADAGError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.transforms.structure import FlowStructure, flow_structure


@st.composite
def structures(draw, max_vars=7, max_context=3):
    """Random structures in a random order of positions."""
    size = draw(st.integers(1, max_vars))
    context_dim = draw(st.integers(0, max_context))
    order = draw(st.permutations(range(size)))
    parents = [()] * size
    for i, v in enumerate(order):
        parents[v] = tuple(draw(st.sets(st.sampled_from(order[:i]))) if i else ())
    context = [
        tuple(draw(st.sets(st.integers(0, context_dim - 1))) if context_dim else ()) for _ in range(size)
    ]
    return FlowStructure(tuple(parents), tuple(context), context_dim)


def as_networkx(structure):
    dag = nx.DiGraph()
    dag.add_nodes_from(range(structure.event_dim))
    for v in range(structure.event_dim):
        dag.add_edges_from((p, v) for p in structure.parents[v])
        dag.add_edges_from((f"c{c}", v) for c in structure.context_parents[v])
    return dag


@given(structures())
@settings(max_examples=80, deadline=None)
def test_levels_ancestors_and_hops_agree_with_networkx(structure):
    dag = as_networkx(structure)
    chain = dict.fromkeys(range(structure.event_dim), 0)
    for v in structure.topological_order:
        chain[v] = max((chain[p] + 1 for p in structure.parents[v]), default=0)
    assert {v: i for i, level in enumerate(structure.levels) for v in level} == chain
    for v in range(structure.event_dim):
        assert set(structure.ancestors(v)) == {a for a in nx.ancestors(dag, v) if not isinstance(a, str)}
    lengths = dict(nx.all_pairs_shortest_path_length(dag))
    hops = [length for source in lengths for length in lengths[source].values()]
    assert structure.max_hops == max(hops)


def test_a_digraph_keeps_its_own_order():
    structure = flow_structure(nx.DiGraph([("c", "b"), ("b", "a")]))
    assert structure.names == ("c", "b", "a")
    graph = nx.DiGraph()
    graph.add_nodes_from("abc")
    graph.add_edges_from([("c", "b"), ("b", "a")])
    structure = flow_structure(graph)
    assert structure.names == ("a", "b", "c")
    assert structure.parents == ((1,), (2,), ())
    assert structure.levels == ((2,), (1,), (0,))


def test_context_by_number_goes_into_every_variable():
    structure = flow_structure(nx.DiGraph([("a", "b")]), 2)
    assert structure.context_parents == ((0, 1), (0, 1))
    assert structure.context_names == ("context[0]", "context[1]")


def test_a_model_graph_has_its_inputs_as_context():
    graph = ModelGraph([("w", "y"), ("x", "y")], observed=["y"], inputs=["x"])
    structure = flow_structure(graph)
    assert structure.names == ("w", "y")
    assert structure.context_names == ("x",)
    assert structure.parents == ((), (0,))
    assert structure.context_parents == ((), (0,))
    latent = flow_structure(graph, variables=["w"])
    assert (latent.names, latent.context_dim) == (("w",), 0)


def test_an_inverse_has_its_latent_nodes_as_variables():
    graph = ModelGraph(
        [("a", "b"), ("b", "x"), ("a", "y")], observed=["x", "y"], event_sizes={"b": 2, "y": 2, "x": 1}
    )
    inverse = InverseGraph(graph, {"a": ["b", "y"], "b": ["x"]})
    structure = flow_structure(inverse)
    assert structure.names == ("a", "b[0]", "b[1]")
    assert structure.parents == ((1, 2), (), (1,))  # b is sampled first; its elements are a full block
    by_name = {structure.context_names[i] for i in structure.context_parents[0]}
    assert by_name == {"y[0]", "y[1]"}
    assert [structure.context_names[i] for i in structure.context_parents[2]] == ["x"]
    assert structure.slices["b"] == slice(1, 3)
    assert structure.context_slices["y"].stop - structure.context_slices["y"].start == 2


def test_a_structure_is_its_own_structure_and_pickles():
    structure = flow_structure(nx.DiGraph([("a", "b")]))
    assert flow_structure(structure) is structure
    _ = structure.max_hops
    again = pickle.loads(pickle.dumps(structure))
    assert again == structure
    assert hash(again) == hash(structure)


def test_hops_of_a_long_chain_are_counted_quickly():
    size = 400
    structure = FlowStructure(tuple((v - 1,) if v else () for v in range(size)))
    assert structure.max_hops == size - 1


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: FlowStructure(()), GraphflowsError, "at least one variable"),
        (lambda: FlowStructure(((0,),)), NotADAGError, "cycle 0 -> 0"),
        (lambda: FlowStructure(((1,), (0,))), NotADAGError, "cycle"),
        (lambda: FlowStructure(((2,), ())), GraphflowsError, "got position 2"),
        (lambda: FlowStructure(((), ()), ((),)), GraphflowsError, "got 2, 1 and 2"),
        (lambda: FlowStructure(((),), context_names=("a",)), GraphflowsError, "each of 0 context"),
        (lambda: flow_structure(nx.DiGraph([(0, 1), (1, 0)])), NotADAGError, "cycle"),
        (lambda: flow_structure(nx.Graph([(0, 1)])), GraphflowsError, "DiGraph"),
        (lambda: flow_structure(nx.DiGraph([("a", "b")]), ["q"]), GraphflowsError, "unknown q"),
        (lambda: flow_structure(nx.DiGraph([("a", "b")]), "a"), GraphflowsError, r"\['a'\]"),
        (lambda: flow_structure(nx.DiGraph([("a", "b")]), ["b"]), GraphflowsError, "a -> b"),
        (lambda: flow_structure(FlowStructure(((),)), 2), GraphflowsError, "beside a FlowStructure"),
        (
            lambda: flow_structure(ModelGraph([("a", "b")], observed=["b"], marginalised=["a"])),
            GraphflowsError,
            "marginalised nodes .*; got a",
        ),
        (
            lambda: flow_structure(
                InverseGraph(ModelGraph([("a", "x")], observed=["x"], plates={"x": ["data"]}), {"a": ["x"]})
            ),
            GraphflowsError,
            "x into a",
        ),
    ],
)
def test_what_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_stages_replace_the_levels():
    structure = FlowStructure([(), (), (0,)], stages=[(1,), (0,), (2,)])
    assert structure.levels == ((1,), (0,), (2,))
    assert structure.topological_order == (0, 1, 2)
    for stages in ([(0, 1)], [(2,), (0,), (1,)], [(0, 1, 2)], [(0,), (0, 1), (2,)]):
        with pytest.raises(GraphflowsError, match="each variable once, after all of its parents"):
            FlowStructure([(), (), (0,)], stages=stages)
