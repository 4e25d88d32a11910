"""Splines over a graph: who sees whom, both directions, levels, linear starts, tails, and a fit that no normal has."""

import math

import networkx as nx
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.transforms import (
    FlowStructure,
    GraphicalSpline,
    GraphicalSplineNN,
    conditional_graphical_spline,
    graphical_spline,
)
from tests.networks import randomise

# Positions deliberately not in topological order; two context columns.
STRUCTURE = FlowStructure(
    parents=((2,), (0, 2), (), (), (0, 1, 3)),
    context_parents=((0,), (), (0, 1), (), (1,)),
    context_dim=2,
    names=("a", "b", "c", "d", "e"),
)
STAGED = FlowStructure(((), (), (1, 0)), stages=((1,), (0,), (2,)))
OPTIONS = [{}, {"num_bins": 2, "bound": 1.5}, {"hidden_dims": [40, 30], "activation": "tanh"}]


def excited(structure, **options):
    """A spline flow with large random weights, so that every spline is far from the identity."""
    network = randomise(GraphicalSplineNN(structure, **options))
    with torch.no_grad():  # scales beyond which rounding would rule
        for parameter in network.parameters():
            parameter.mul_(0.5)
        network.mlp.layers[-1].weight.mul_(0.3)
    return network


@pytest.mark.parametrize("options", OPTIONS)
def test_each_factor_depends_on_its_parents_alone(options):
    network = excited(STRUCTURE, **options)
    z, x = torch.randn(5), torch.randn(2)
    for which in (0, 1):  # the noise, and the log-derivative
        by_z, by_x = torch.autograd.functional.jacobian(
            lambda *given, which=which: network.inverse_terms(*given)[which], (z, x)
        )
        for v in range(5):
            seen = {p for p in range(5) if by_z[v, p] != 0}
            # In the tails the log-derivative is the log-scale, which does not depend on the variable itself.
            assert seen | {v} == {v, *STRUCTURE.parents[v]}
            assert which == 1 or v in seen
            assert {c for c in range(2) if by_x[v, c] != 0} == set(STRUCTURE.context_parents[v])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_both_directions_agree_with_each_other_and_with_autograd(options, batch):
    network = excited(STRUCTURE, **options)
    network.standardize_(torch.randn(5), torch.rand(5) + 0.5, torch.randn(2), torch.rand(2) + 0.5)
    eps, x = 2 * torch.randn(*batch, 5), torch.randn(*batch, 2)
    z, log_diag = network.sample(eps, x)
    again, log_again = network.inverse_terms(z, x)
    torch.testing.assert_close(again, eps, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(log_again, log_diag, atol=1e-8, rtol=1e-8)
    rows = zip(eps.reshape(-1, 5), x.reshape(-1, 2), log_diag.reshape(-1, 5), strict=True)
    for e, given, expected in rows:
        jacobian = torch.autograd.functional.jacobian(lambda e, given=given: network.sample(e, given)[0], e)
        torch.testing.assert_close(jacobian.diagonal().log(), expected, atol=1e-9, rtol=1e-9)


def test_gradcheck_in_all_inputs():
    network = excited(STRUCTURE)
    z, x = torch.randn(3, 5, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    assert torch.autograd.gradcheck(network.inverse_terms, (z, x))
    assert torch.autograd.gradcheck(network.sample, (z, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tails_are_linear_and_their_gradients_finite(dtype):
    """Far outside, where powers overflow in single precision, the spline is the identity."""
    network = excited(FlowStructure(((), (0,)))).to(dtype)
    eps = torch.tensor([[1e15, -1e15], [-4.1, 4.1], [-4.0, 4.0], [0.0, 1.0]], dtype=dtype)
    raw = network.mlp(torch.zeros(4, 2, dtype=dtype)).detach()
    u, log_slope = network._spline(eps, raw, inverse=False)
    assert torch.equal(u[:2], eps[:2])
    assert (log_slope[:2] == 0).all()
    torch.testing.assert_close(u[2], eps[2])
    eps.requires_grad_()
    sum(part.sum() for part in network.inverse_terms(eps)).backward()
    assert eps.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("structure", [STRUCTURE, STAGED])
def test_values_may_be_replaced_between_levels(structure):
    """A pass with replaced values has the density of those values, level by level; forks go their own way."""
    network = excited(structure)
    context = [torch.randn(6, structure.context_dim)] if structure.context_dim else []
    z = torch.randn(6, structure.event_dim)
    eps, log_diag = network.inverse_terms(z, *context)
    evaluation = network.start(*context)
    for level in network.levels:
        columns = list(level)
        fork = evaluation.fork()
        fork.accept(fork.step(fork.noise((6,)))[0])
        own, log_own = evaluation.terms(z[:, columns])
        torch.testing.assert_close(own, eps[:, columns])
        torch.testing.assert_close(log_own, log_diag[:, columns])
        drawn, log_drawn = evaluation.step(own)
        torch.testing.assert_close(drawn, z[:, columns])
        torch.testing.assert_close(log_drawn, log_own)
        evaluation.accept(z[:, columns])
    with pytest.raises(GraphflowsError, match="all have been accepted"):
        evaluation.step(torch.zeros(6, 1))


def test_levels_may_have_growing_batch_shapes():
    network = excited(STRUCTURE)
    x, parts = torch.randn(3, 2), {}
    evaluation = network.start(x)
    for i, level in enumerate(network.levels):
        parts[level], _ = evaluation.step(torch.randn(*(2,) * (i > 1), 3, len(level)))
        evaluation.accept(parts[level])
    z = torch.zeros(2, 3, 5)
    for level, values in parts.items():
        z[..., list(level)] = values.expand(2, 3, -1)
    last = list(network.levels[-1])
    again = network.sample(network.inverse_terms(z, x)[0], x)[0]
    torch.testing.assert_close(again[..., last], parts[network.levels[-1]])


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_init_linear_makes_the_flow_linear_gaussian(engine, monkeypatch):
    if engine == "sparse":
        monkeypatch.setattr("pyro_graphflows.nn.mlp.fastest_engine", lambda *_: "sparse")
    network = excited(STRUCTURE)
    assert network.mlp.skip.engine == engine
    network.standardize_(torch.randn(5), torch.rand(5) + 0.5, torch.randn(2), torch.rand(2) + 0.5)
    weights, shift, scale = torch.randn(5, 7), torch.randn(5), torch.rand(5) + 0.1
    z, x = 3 * torch.randn(50, 5), torch.randn(50, 2)
    before, _ = network.inverse_terms(z, x)
    network.init_linear_(weights, shift, scale, variables=[1, 4])
    assert torch.equal(network.inverse_terms(z, x)[0][:, [0, 2, 3]], before[:, [0, 2, 3]])
    network.init_linear_(weights, shift, scale)
    mask = torch.zeros(5, 7)
    for v in range(5):
        mask[v, [*STRUCTURE.context_parents[v], *(2 + p for p in STRUCTURE.parents[v])]] = 1
    expected = (z - torch.cat([x, z], -1) @ (weights * mask).T - shift) / scale
    eps, log_diag = network.inverse_terms(z, x)
    torch.testing.assert_close(eps, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(log_diag, scale.log().expand(50, 5), atol=1e-9, rtol=1e-9)


def test_initialize_finds_a_linear_model_exactly():
    structure = FlowStructure(((), (0,), (0, 1)), ((0,), (), ()), 1)
    flow = conditional_graphical_spline(structure)
    x = torch.randn(1000, 1)
    a = 3 * x + 5 + torch.randn(1000, 1)
    b = 100 - 20 * a
    flow.initialize_(torch.cat([a, b + 7 * torch.randn(1000, 1), a + b], -1), x)
    mean = flow.condition(torch.tensor([2.0]))(torch.zeros(3))
    slope = flow.condition(torch.tensor([3.0]))(torch.zeros(3)) - mean
    assert abs(slope[0] - 3) < 0.2  # 1000 samples: a standard error of .03
    assert abs(slope[1] / slope[0] + 20) < 1.5  # .22 beside a of standard deviation 3.2


def test_learns_a_density_of_two_modes():
    """b given a has two modes, at ±a: its entropy is nearly that of one of them plus log 2; a normal is far from it."""
    torch.manual_seed(0)
    flow = graphical_spline(nx.DiGraph([("a", "b")]), num_bins=12, bound=3.0)

    def draw(n):
        a = 2 + torch.rand(n, 1)
        return torch.cat([a, a * (2 * torch.randint(2, (n, 1)) - 1) + 0.2 * torch.randn(n, 1)], -1)

    def log_prob(z):
        by_a = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow])
        return by_a.log_prob(z)

    z = draw(4000)
    flow.initialize_(z)
    normal = log_prob(z).mean().item()
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = -log_prob(draw(500)).mean()
        loss.backward()
        optimizer.step()
    best = -(0.5 * math.log(2 * math.pi * math.e) + math.log(0.2)) - math.log(
        2
    )  # a is uniform on an interval of one
    reached = log_prob(draw(4000)).mean().item()
    assert normal < best - 1.0
    assert best - 0.35 < reached < best + 0.06  # a standard error of .012


def test_helpers_take_every_kind_of_graph():
    dag = nx.DiGraph([("a", "b"), ("b", "x")])
    model = ModelGraph(dag, observed=["x"])
    inverse = InverseGraph(model, {"a": ["b"], "b": ["x"]})
    assert graphical_spline(dag).structure.names == ("a", "b", "x")
    assert graphical_spline(model).levels == ((0,), (1,), (2,))
    flow = conditional_graphical_spline(inverse, None, [24], 4, 2.0)
    assert (flow.structure.names, flow.structure.context_names) == (("a", "b"), ("x",))
    assert (flow.network.num_bins, flow.network.bound) == (4, 2.0)
    assert isinstance(flow.condition(torch.randn(1)), GraphicalSpline)
    with pytest.raises(GraphflowsError, match="Use conditional_graphical_spline"):
        graphical_spline(inverse)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_bins": 1}, "2 <= num_bins <= 1000; got 1"),
        ({"bound": 0.0}, r"finite bound; got 0\.0"),
        ({"bound": math.inf}, "finite bound; got inf"),
        ({"hidden_dims": [2]}, "units|narrow|wide|lost"),
        ({"activation": "relux"}, "activation"),
    ],
)
def test_construction_checks_its_arguments(options, match):
    with pytest.raises(GraphflowsError, match=match):
        GraphicalSplineNN(STRUCTURE, **options)
