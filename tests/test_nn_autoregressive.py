import networkx as nx
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineAutoregressive, ConditionalAffineAutoregressive
from pyro.nn import AutoRegressiveNN

from pyro_graphflows.errors import GraphflowsError, NotADAGError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.nn.autoregressive import ConditionalGraphicalAutoRegressiveNN, GraphicalAutoRegressiveNN
from tests.networks import randomise

EDGES = [("c", "b"), ("c", "d"), ("b", "a"), ("d", "a")]


@pytest.fixture
def graph():
    dag = nx.DiGraph()
    dag.add_nodes_from("abcd")  # not a topological order
    dag.add_edges_from(EDGES)
    return dag


def dependencies(function, x):
    jacobian = torch.autograd.functional.jacobian(function, x)
    return {(j, k) for k, j in (jacobian != 0).nonzero().tolist()}


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_parameters_depend_on_the_parents(graph, engine):
    arn = randomise(GraphicalAutoRegressiveNN(graph, engine=engine))
    edges = {("abcd".index(a), "abcd".index(b)) for a, b in EDGES}
    for p in range(2):
        assert dependencies(lambda x, p=p: arn(x)[p], torch.randn(4)) == edges
    order = arn.get_permutation().tolist()
    assert all(order.index(a) < order.index(b) for a, b in edges)


def test_shapes_are_those_of_pyro(graph):
    for param_dims, shapes in (
        ([1], (3, 4)),
        ([5], (3, 5, 4)),
        ([1, 1], [(3, 4)] * 2),
        ([1, 5, 3], [(3, 1, 4), (3, 5, 4), (3, 3, 4)]),
    ):
        out = GraphicalAutoRegressiveNN(graph, param_dims=param_dims)(torch.zeros(3, 4))
        reference = pyro_like(param_dims)(torch.zeros(3, 4))
        if isinstance(shapes, tuple):
            assert out.shape == reference.shape == shapes
        else:
            assert [o.shape for o in out] == [o.shape for o in reference] == shapes


def pyro_like(param_dims):
    return AutoRegressiveNN(4, [8], param_dims=param_dims)


def test_in_a_flow_of_pyro(graph):
    transform = AffineAutoregressive(randomise(GraphicalAutoRegressiveNN(graph)))
    x = torch.randn(4)
    y = transform(x)
    jacobian = torch.autograd.functional.jacobian(transform, x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), jacobian.slogdet()[1])
    assert dependencies(transform, x) == {(j, j) for j in range(4)} | {
        ("abcd".index(a), "abcd".index(b)) for a, b in EDGES
    }
    torch.testing.assert_close(transform.inv(y.clone()), x)
    base = dist.Normal(torch.zeros(4), 1).to_event(1)
    assert dist.TransformedDistribution(base, [transform]).rsample((3,)).shape == (3, 4)


def test_context_of_an_inverse():
    model = ModelGraph(
        [("u", "x"), ("u", "v"), ("v", "y"), ("w", "y")],
        observed=["x", "y"],
        inputs=["w"],
        event_sizes={"v": 2},
    )
    inverse = InverseGraph(model, {"v": ("x", "y", "w"), "u": ("v", "x")})
    arn = randomise(ConditionalGraphicalAutoRegressiveNN(inverse, context_dim=1))
    assert (arn.input_dim, arn.context_dim) == (3, 4)
    assert set(arn.context_nodes) == {"x", "y", "w"}
    columns = {name: 3 + i for i, name in enumerate(arn.context_nodes)}

    def function(joint):
        return arn(joint[:3], joint[3:])[0]

    expected = {(1, 0), (2, 0), (columns["x"], 0), (6, 0)}  # u: v[0], v[1], x and the shared column
    expected |= {(columns[n], k) for n in "xyw" for k in (1, 2)} | {(6, 1), (6, 2), (1, 2)}
    assert dependencies(function, torch.randn(7)) == expected
    assert arn.permutation.tolist() == [1, 2, 0]


def test_context_broadcasts_and_conditions():
    graph = ModelGraph([("a", "b"), ("x", "b")], observed=(), inputs=["x"])
    arn = randomise(ConditionalGraphicalAutoRegressiveNN(graph))
    x, context = torch.randn(4, 3, 2), torch.randn(3, 1)
    torch.testing.assert_close(arn(x, context)[0][1], arn(x[1], context)[0])
    transform = ConditionalAffineAutoregressive(arn).condition(torch.randn(1))
    z = torch.randn(5, 2)
    y = transform(z)
    torch.testing.assert_close(transform.inv(y.clone()), z)


def test_model_graph_without_context():
    graph = ModelGraph([("a", "b"), ("b", "c")], observed=["c"])
    arn = GraphicalAutoRegressiveNN(graph, hidden_dims=[6, 6], activation="relu", skip_connections=False)
    assert arn.input_dim == 3
    assert arn(torch.zeros(3))[0].shape == (3,)


def test_wrong_use(graph):
    cycle = nx.DiGraph([("a", "b"), ("b", "a")])
    with pytest.raises(NotADAGError, match="cycle"):
        GraphicalAutoRegressiveNN(cycle)
    with pytest.raises(GraphflowsError, match="DiGraph, ModelGraph or InverseGraph; got a list"):
        GraphicalAutoRegressiveNN([("a", "b")])
    with pytest.raises(GraphflowsError, match="positive param_dims"):
        GraphicalAutoRegressiveNN(graph, param_dims=[0])
    with pytest.raises(GraphflowsError, match="lost: b on c; d on c"):
        GraphicalAutoRegressiveNN(graph, [1])
    with_input = ModelGraph([("a", "b"), ("x", "b")], observed=(), inputs=["x"])
    with pytest.raises(GraphflowsError, match="x are context"):
        GraphicalAutoRegressiveNN(with_input)
    with pytest.raises(GraphflowsError, match=r"context.shape\[-1\] == 1; got 2 and 0"):
        ConditionalGraphicalAutoRegressiveNN(with_input)(torch.zeros(2))
    model = ModelGraph([("u", "x")], observed=["x"], plates={"x": ["n"]})
    pooled = InverseGraph(model, {"u": ("x",)}, how={("x", "u"): "pooled"})
    with pytest.raises(GraphflowsError, match="pooled parents; got x into u"):
        ConditionalGraphicalAutoRegressiveNN(pooled)
