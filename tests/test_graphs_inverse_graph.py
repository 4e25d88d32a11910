import pytest

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.model_graph import ModelGraph


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
