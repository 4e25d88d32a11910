import copy
import pickle

import networkx as nx
import pytest

from pyro_graphflows.errors import GraphflowsError, NotADAGError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph, expand


@pytest.fixture
def student():
    edges = ["DG", "IG", "IS", "GH", "GL", "SJ", "LJ", "JH"]
    return ModelGraph([tuple(edge) for edge in edges], observed=["J", "H"])


def test_roles_and_order(student):
    assert student.latent == ("D", "I", "G", "S", "L")
    assert student.observed == ("J", "H")
    assert student.parents("J") == ("S", "L")
    assert student.children("G") == ("L", "H")
    assert student.role("J") == "observed"
    for parent, child in student.edges:
        assert student.nodes.index(parent) < student.nodes.index(child)


def test_the_callers_graph_is_copied():
    dag = nx.DiGraph([("a", "b")])
    graph = ModelGraph(dag, observed=["b"])
    dag.add_edge("b", "c")
    assert graph.nodes == ("a", "b")
    graph.to_networkx().remove_node("a")
    assert graph.nodes == ("a", "b")


def test_immutable(student):
    with pytest.raises(TypeError):
        student.event_sizes["D"] = 3
    with pytest.raises(AttributeError):
        student.latent = ()


def test_round_trip_and_equality(student):
    for other in (pickle.loads(pickle.dumps(student)), copy.deepcopy(student)):
        assert other == student
        assert hash(other) == hash(student)
    again = ModelGraph(student.to_networkx(), observed=["H", "J"])
    assert again == student
    assert again != ModelGraph(student.to_networkx(), observed=["H"])


def test_isolated_nodes_and_attributes():
    graph = ModelGraph(
        [], observed=["x"], event_sizes={"z": 3}, plates={"x": ["outer", "inner"]}, nodes=["x", "z"]
    )
    assert set(graph.nodes) == {"x", "z"}
    data = graph.to_networkx().nodes
    assert data["z"] == {"role": "latent", "event_size": 3, "plates": ()}
    assert data["x"]["plates"] == ("outer", "inner")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"graph": [("a", "b"), ("b", "c"), ("c", "a")], "observed": []},
            NotADAGError,
            r"cycle \w -> \w -> \w -> \w",
        ),
        ({"graph": [("a", "a")], "observed": []}, NotADAGError, "cycle a -> a"),
        ({"graph": nx.DiGraph([("a", "b")]), "observed": ["q"]}, GraphflowsError, "unknown q"),
        ({"graph": nx.Graph([("a", "b")]), "observed": []}, GraphflowsError, r"Expected a networkx.DiGraph"),
        ({"graph": [("a", "b")], "observed": ["b"], "inputs": ["b"]}, GraphflowsError, "two for b"),
        ({"graph": [("a", "b")], "observed": [], "inputs": ["b"]}, GraphflowsError, "b have some"),
        ({"graph": [("a", "b")], "observed": "ab"}, GraphflowsError, "got the string"),
        ({"graph": [("a", "b")], "observed": [], "event_sizes": {"a": 0}}, GraphflowsError, "not so for a"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        ModelGraph(**kwargs)


def test_unknown_name_is_named(student):
    with pytest.raises(GraphflowsError, match="got 'Q'"):
        student.parents("Q")


class Backwards(set):
    """A set that happens to be walked in the other order, as sets of strings are in another run of Python."""

    def __iter__(self):
        return iter(sorted(super().__iter__(), reverse=True))


def test_sets_are_sorted():
    """Columns of data follow the graph's order, so it must not be another one in each run."""
    edges = [("a", "x"), ("a", "y"), ("b", "y"), ("b", "z"), ("c", "x"), ("a", "c")]
    isolated = ["u", "v", "w"]
    expected = ModelGraph(sorted(edges), list("uxyz"), inputs=["v", "w"], nodes=isolated)
    for kind in (set, frozenset, Backwards):
        graph = ModelGraph(kind(edges), kind("xyzu"), inputs=kind("vw"), nodes=kind(isolated))
        assert (graph.nodes, graph.edges) == (expected.nodes, expected.edges)
    assert ModelGraph([], list("yx"), nodes=dict.fromkeys("yx").keys()).nodes == (
        "y",
        "x",
    )  # these have an order


def test_inverse_levels_and_how():
    graph = ModelGraph(
        [("m", "z"), ("z", "x"), ("m", "k")],
        observed=["x"],
        plates={"z": ["data"], "x": ["data"]},
    )
    inverse = InverseGraph(graph, {"m": ["x"], "z": ["m", "x"], "k": ["m"]})
    assert inverse.levels == (("m",), ("z", "k"))
    assert inverse.how == {
        ("x", "m"): "pooled",
        ("m", "z"): "broadcast",
        ("x", "z"): "same",
        ("m", "k"): "same",
    }
    assert set(inverse.to_networkx().edges) == {("x", "m"), ("m", "z"), ("x", "z"), ("m", "k")}


def test_what_is_replaced_and_what_stays():
    graph = ModelGraph([("a", "x"), ("b", "x")], observed=["x"], plates={"b": ["p"], "x": ["p"]})
    parents, words = {"a": ["x"], "b": ["x"]}, {("x", "b"): "pooled"}
    given = InverseGraph(graph, parents, sampling_order=["b", "a"], coupled={"b": ["p"]}, how=words)
    named = given.replaced(order="mine")
    assert (named.order, given.order) == ("mine", "custom")
    assert named.graph == graph
    for name in ("parents", "sampling_order", "coupled", "how"):
        assert getattr(named, name) == getattr(given, name)
    assert named.how["x", "b"] == "pooled"  # as it was given, not as plates have it
    other = given.replaced(graph=graph.with_plates({}), sampling_order=["a", "b"], coupled={"b": []})
    assert other.graph.plates["b"] == ()
    assert other.sampling_order == ("a", "b")
    assert dict(other.coupled) == {}
    with pytest.raises(GraphflowsError, match="sampling order of the latent nodes"):
        given.replaced(sampling_order=["a"])


@pytest.mark.parametrize(
    ("parents", "kwargs", "message"),
    [
        ({"a": ["x"]}, {}, "missing: b"),
        ({"a": ["x"], "b": [], "x": []}, {}, "not latent: x"),
        ({"a": ["q"], "b": []}, {}, "got q"),
        ({"a": ["b"], "b": ["a"]}, {}, "cycle"),
        ({"a": ["b"], "b": []}, {"sampling_order": ["a", "b"]}, "b -> a"),
        ({"a": ["b"], "b": []}, {"sampling_order": ["a"]}, "sampling order of the latent nodes a, b"),
        ({"a": ["x"], "b": []}, {"how": {("x", "a"): "somehow"}}, "Expected one of"),
    ],
)
def test_bad_inverse_is_named(parents, kwargs, message):
    graph = ModelGraph([("a", "x"), ("b", "x")], observed=["x"])
    with pytest.raises(GraphflowsError, match=message):
        InverseGraph(graph, parents, **kwargs)


# ---------------------------------------------------------------- plates as a finite graph


def test_expansion():
    graph = ModelGraph(["gz", "wz", "zx"], observed=["x"], plates={"z": ["a", "b"], "w": ["a"], "x": ["b"]})
    expansion = expand(graph)
    site = {name: graph.nodes.index(name) for name in graph.nodes}
    assert [len(expansion.copies[site[name]]) for name in "gwzx"] == [1, 2, 4, 2]
    (g,) = expansion.copies[site["g"]]
    w, x = expansion.copies[site["w"]], expansion.copies[site["x"]]
    z = {expansion.index[node]: node for node in expansion.copies[site["z"]]}
    assert set(expansion.parents[z[0, 1]]) == {g, w[0]}
    assert set(expansion.parents[x[1]]) == {z[0, 1], z[1, 1]}
    assert set(expansion.children[g]) == set(z.values())
    assert len(expand(graph, copies=3)) == 1 + 3 + 9 + 3
    assert expansion.differing_plates(z[0, 0], [z[0, 1]]) == ("b",)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_graph_without_plates_is_its_own_expansion(copies):
    graph = ModelGraph(["ab", "bx", "ax"], observed=["x"])
    assert len(expand(graph, copies)) == 3
    assert expand(graph, copies).parents == ((), (0,), (0, 1))
