"""The solvers on toy maps whose answers are known, and where plain Newton fails; then on flows as a property.

The property: every bound, any weights, graph, precision, batch shape and size of input.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_graphflows.errors import ConvergenceError, GraphflowsError, GraphflowsWarning
from pyro_graphflows.transforms import FaithfulResidualNN, FlowStructure, GraphicalResidualNN
from pyro_graphflows.transforms.solver import (
    Bounds,
    Solver,
    implicit_step,
    implicit_triangular,
    solve_elementwise,
    solve_triangular,
)


def kinked(c):
    """Slope 1 − c around zero, 1 + c far away, with a sharp bend: plain Newton cycles."""

    def function(y):
        return y - c * y.sign() * y.abs().clamp(max=1) + c * (y - y.clamp(-1, 1)), torch.where(
            y.abs() < 1, 1 - c, 1 + c
        ) * torch.ones_like(y)

    return function


def wavy(c, rate):
    def function(y):
        return y + c / rate * torch.sin(rate * y), 1 + c * torch.cos(rate * y)

    return function


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("c", [0.9, 0.97, 0.99, 0.999])
@pytest.mark.parametrize("make", [kinked, lambda c: wavy(c, 1.0), lambda c: wavy(c, 30.0)])
def test_elementwise_always_converges(make, c, dtype):
    function = make(c)
    z = torch.cat([torch.randn(200), torch.randn(200) * 1e2, torch.randn(200) * 1e4, torch.zeros(1)]).to(
        dtype
    )
    y = solve_elementwise(function, z, Bounds(1 - c, 1 + c))
    error = (function(y)[0] - z).abs() / torch.maximum(y.abs(), z.abs()).clamp(min=1)
    # wavy(30) adds up terms of relative size 1 / 30 only, so that a few units of rounding are what to expect
    assert error.max() <= 20 * torch.finfo(dtype).eps


def test_plain_newton_does_not_converge_where_the_solver_does():
    """The safeguard is needed: Newton alone cycles on this map."""
    function = wavy(0.999, 1.0)
    z = torch.linspace(-6, 6, 1001)
    y = z.clone()
    for _ in range(100):
        value, slope = function(y)
        y = y - (value - z) / slope
    assert not ((function(y)[0] - z).abs() < 1e-8).all()
    y = solve_elementwise(function, z, Bounds(0.001, 1.999))
    assert ((function(y)[0] - z).abs() < 1e-13).all()


@given(st.floats(-1e4, 1e4), st.sampled_from([0.9, 0.99, 0.999]), st.floats(0.1, 50))
@settings(max_examples=100, deadline=None)
def test_elementwise_backward_error(z, c, rate):
    function = wavy(c, rate)
    target = torch.tensor([z], dtype=torch.float64)
    y = solve_elementwise(function, target, Bounds(1 - c, 1 + c))
    assert (function(y)[0] - target).abs() <= 1e-14 * max(1, abs(z), abs(float(y)))


def test_few_iterations_are_needed():
    calls = []

    def function(y):
        calls.append(1)
        return y + 0.9 * torch.tanh(y), 1 + 0.9 * (1 - torch.tanh(y) ** 2)

    solve_elementwise(function, torch.randn(1000) * 3, Bounds(0.999, 1.9))
    assert len(calls) <= 8


def test_steep_maps_end_at_the_nearest_number():
    """A slope of 1e6 cannot reach a residual of rounding size; the nearest floating-point number is the answer."""
    function = lambda y: (y + 1e6 * torch.tanh(y), 1 + 1e6 * (1 - torch.tanh(y) ** 2))  # noqa: E731
    z = torch.randn(100) * 1e5
    y = solve_elementwise(function, z, Bounds(1.0, 1 + 1e6))
    assert ((function(y)[0] - z).abs() <= 1e6 * 1e-15 * (1 + y.abs())).all()


def test_failure_raises_or_warns_and_names_the_knob():
    function, z = wavy(0.999, 1.0), torch.linspace(-6, 6, 50)
    with pytest.raises(ConvergenceError, match=r"max_iterations \(2\)"):
        solve_elementwise(function, z, Bounds(0.001, 1.999), solver=Solver(max_iterations=2), what="a map")
    with pytest.warns(GraphflowsWarning, match="inverse of a map to converge"):
        y = solve_elementwise(
            function,
            z,
            Bounds(0.001, 1.999),
            solver=Solver(max_iterations=2, on_failure="warn"),
            what="a map",
        )
    assert y.shape == z.shape
    with pytest.raises(ConvergenceError, match="not finite"):
        solve_elementwise(function, torch.tensor([0.0, math.nan]), Bounds(0.001, 1.999))


@pytest.mark.parametrize("bad", [{"on_failure": "ignore"}, {"max_iterations": 0}, {"tolerance": 0.0}])
def test_solver_checks_its_arguments(bad):
    with pytest.raises(GraphflowsError, match="Expected"):
        Solver(**bad)


def test_implicit_step_has_the_gradient_of_the_solution():
    a = torch.tensor(0.7, requires_grad=True)
    z = torch.randn(5, requires_grad=True)

    def function(y, a):
        return y + a * torch.sin(y), 1 + a * torch.cos(y)

    def solution(a, z):
        y = solve_elementwise(lambda y: function(y, a.detach()), z.detach(), Bounds(0.3, 1.7))
        value, slope = function(y, a)
        return implicit_step(y, value - z, slope)

    assert torch.autograd.gradcheck(solution, (a, z))
    (first,) = torch.autograd.grad(solution(a, z).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first, a)


# Triangular maps


class Triangular:
    """y + c sin(3 y) / 3 + strictly lower part: a nonlinear function of the variables before; features first."""

    def __init__(self, size, c, coupling):
        self.size, self.c = size, c
        self.lower = torch.randn(size, size).tril(-1) * coupling
        self.levels = [torch.tensor([v]) for v in range(size)]

    def __call__(self, y, columns=None):
        own = self.c * torch.sin(3 * y) / 3
        return y + own + torch.sin(self.lower @ y), 1 + self.c * torch.cos(3 * y)


@pytest.mark.parametrize("c", [0.5, 0.99, 0.999])
@pytest.mark.parametrize("coupling", [0.0, 1.0, 20.0])
def test_triangular_always_converges(c, coupling):
    function = Triangular(6, c, coupling)
    z = torch.cat([torch.randn(6, 40), 1e3 * torch.randn(6, 40)], 1)
    y, diagonal = solve_triangular(function, z, function.levels, (1 - c, 1 + c))
    value, expected = function(y)
    error = (value - z).abs() / torch.maximum(y.abs(), z.abs()).clamp(min=1)
    # an error of rounding size in an ancestor of size 1e3 moves sin(20 * ancestor) by that much
    assert error.max() <= 1e-13 * (1 + coupling * 1e3)
    assert torch.equal(diagonal, expected)


def test_triangular_samples_see_their_own_shift():
    shift = torch.randn(3, 30)
    z = torch.randn(3, 30) * 5

    def function(y, columns):
        own = y + (shift if columns is None else shift[:, columns])
        return y + 0.9 * torch.sin(own), 1 + 0.9 * torch.cos(own)

    y, diagonal = solve_triangular(function, z, [torch.arange(3)], (0.1, 1.9))
    assert ((y + 0.9 * torch.sin(y + shift) - z).abs() < 1e-13).all()
    assert torch.equal(diagonal, function(y, None)[1])


def test_triangular_costs_what_newton_costs():
    """Where Newton's method converges, each sample is evaluated as often as by it, and brackets are never asked for."""
    function = Triangular(6, 0.2, 1.0)
    z = torch.randn(6, 400)
    evaluated = []

    def counted(y, columns):
        evaluated.append(y.shape[1])
        return function(y)

    def refuse():
        raise AssertionError("the bounds are not needed")

    y, _ = solve_triangular(counted, z, function.levels, refuse)
    newton, steps = z, 1
    value, diagonal = function(newton)
    while (value - z).abs().max() > 1e-14:
        newton = newton - (value - z) / diagonal
        value, diagonal = function(newton)
        steps += 1
    assert (y - newton).abs().max() < 1e-12
    assert len(evaluated) <= steps + 1
    assert sum(evaluated) <= 400 * (steps + 1)


def test_triangular_failure_raises():
    function = Triangular(3, 0.999, 1.0)
    z = 5 * torch.randn(3, 50)
    with pytest.raises(ConvergenceError, match="max_iterations"):
        solve_triangular(function, z, function.levels, (0.001, 1.999), solver=Solver(max_iterations=1))


def test_implicit_triangular_gradient_is_exact():
    toy = Triangular(5, 0.9, 1.0)
    a = torch.tensor(0.8, requires_grad=True)
    z = torch.randn(5, 4, requires_grad=True)

    def solution(a, z):
        def scaled(y, columns):
            value, diagonal = toy(y)
            return a.detach() * value, a.detach() * diagonal

        y, _ = solve_triangular(scaled, z.detach(), toy.levels, (0.05, 2))
        with torch.enable_grad():
            leaf = y.requires_grad_()
            value, diagonal = toy(leaf)
            value, diagonal = a * value, a * diagonal

        def pull(u):
            return torch.autograd.grad(value, leaf, u, retain_graph=True)[0]

        return implicit_triangular(y, value - z, diagonal, pull, 4)

    assert torch.autograd.gradcheck(solution, (a, z))
    (first,) = torch.autograd.grad(solution(a, z).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first, a)


# Flows

FAMILIES = (FaithfulResidualNN, GraphicalResidualNN)


def random_dag(size, seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator).tolist()
    coin = torch.rand(size, size, generator=generator) < 0.35
    parents = [()] * size
    for i, v in enumerate(order):
        parents[v] = tuple(p for p in order[:i] if coin[v, p])
    return tuple(parents)


structures = st.one_of(
    st.just(FlowStructure(((),))),  # one node
    st.integers(2, 6).map(lambda n: FlowStructure(tuple(() for _ in range(n)))),  # no edges
    st.integers(2, 6).map(lambda n: FlowStructure(tuple(tuple(range(v)) for v in range(n)))),  # full
    st.integers(3, 9).map(lambda n: FlowStructure(((), *((v,) for v in range(n - 1))))),  # chain
    st.tuples(st.integers(2, 8), st.integers(0, 10**6)).map(lambda drawn: FlowStructure(random_dag(*drawn))),
)


@st.composite
def networks(draw, closed_form=None):
    """A flow of either family with cold, trained, random or adversarially contractive weights."""
    family = draw(st.sampled_from(FAMILIES))
    weights = draw(st.sampled_from(["cold", "trained", "random", "contractive"]))
    options = {
        "closed_form": closed_form or draw(st.sampled_from(["density", "sampling"])),
        "lipschitz": draw(st.sampled_from([0.9, 0.97, 0.99, 0.999])),
        "activation": "tanh"
        if weights == "contractive"
        else draw(st.sampled_from(["elu", "tanh", "lipmish"])),
        "engine": draw(st.sampled_from(["dense", "sparse"])),
        "num_blocks": draw(st.sampled_from([1, 4])),
        "units_per_variable": 4,
    }
    if family is GraphicalResidualNN:
        options["allow_short"] = True
    torch.manual_seed(draw(st.integers(0, 10**6)))
    network = family(draw(structures), **options)
    if weights == "trained":
        train(network)
    elif weights != "cold":
        with torch.no_grad():
            if family is FaithfulResidualNN:
                weaken(network) if weights == "contractive" else roughen(network)
            else:
                for block in network.blocks:
                    first, last = block.layers
                    if weights == "contractive":  # the last layer undoes the first, at the bound
                        mask = last.sparse_mask().indices
                        first.weight.mul_(20)
                        undo = -20 * first.masked_weight().T
                        last.weight.copy_(undo if last.engine == "dense" else undo[mask[0], mask[1]])
                    else:
                        first.weight.normal_().mul_(3)
                        last.weight.normal_().mul_(3)
    return network


def roughen(network):
    for parameter in network.parameters():
        parameter.normal_()
    network.stack.log_scale.zero_()


def weaken(network):
    """Slope 1 − c on an interval around zero in all blocks, 1 outside."""
    network.stack.inner.abs_().add_(0.1)
    network.stack.outer.abs_().mul_(-30)


def train(network):
    """A few large steps of maximum likelihood on bimodal data."""
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    z = torch.randn(30, network.event_dim)
    z = torch.where(z > 0, z + 2, z - 2)
    for _ in range(5):
        optimizer.zero_grad()
        eps, log_diag = network.inverse_terms(z)
        (0.5 * eps**2 + log_diag).sum(-1).mean().backward()
        optimizer.step()


def by_levels(network, solution, target):
    """The map of one variable given its parents' values: each level of a faithful flow on its own."""
    evaluation, image = network.start(), torch.empty_like(target)
    for level in network.levels:
        columns = list(level)
        image[..., columns] = evaluation.step(solution[..., columns])[0]
        evaluation.accept(target[..., columns])
    return image


@given(
    networks(),
    st.sampled_from([(), (3,), (2, 3)]),
    st.floats(-2, 4),
    st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]),
)
@settings(max_examples=120, deadline=None, derandomize=True)
@torch.no_grad()
def test_inversion_always_converges(network, batch, size, precision):
    """Never an error, and a backward error of rounding size: |f(y) - z| relative to max(1, |y|, |z|) of the datum.

    Parents of a faithful flow enter without a bound, so what rounding does to their contribution counts as size.
    """
    dtype, limit = precision
    network = network.to(dtype)
    target = (10.0**size * torch.randn(*batch, network.event_dim)).to(dtype)
    density = network.closed_form == "density"
    solution, _ = (network.sample if density else network.inverse_terms)(target)
    if density:
        image, _ = network.inverse_terms(solution)
    elif isinstance(network, FaithfulResidualNN):
        image = by_levels(network, solution, target)
    else:
        image, _ = network.sample(solution)
    assert solution.shape == target.shape
    scale = torch.maximum(solution.abs(), target.abs()).amax(-1, keepdim=True).clamp(min=1)
    if isinstance(network, FaithfulResidualNN):
        edges = network.edges.weight
        if edges.numel():
            known = solution if density else target
            scale = scale * (1 + edges.abs().amax() * known.abs().amax(-1, keepdim=True) / scale)
    assert ((image - target).abs() / scale).max() <= limit


def condition(jacobian):
    """How much a backward error can grow; not below one, so that one variable is not always well-conditioned."""
    values = torch.linalg.svdvals(jacobian)
    return values.max().clamp(min=1) / values.min()


@given(networks())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_forward_error_where_the_problem_is_well_conditioned(network):
    """Condition number max(1, |J|) |J^-1| below 100, |y| <= 10, float64: the solution is right to 1e-10."""
    solve, apply = network.sample, network.inverse_terms
    if network.closed_form == "sampling":
        solve, apply = apply, solve
    truth = 3 * torch.randn(12, network.event_dim)
    with torch.no_grad():
        error = (solve(apply(truth)[0])[0] - truth).abs().amax(-1)
    for i, point in enumerate(truth):
        jacobian = torch.autograd.functional.jacobian(lambda y: apply(y)[0], point)
        if condition(jacobian) < 100 and point.abs().max() <= 10:
            assert error[i] <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_most_fresh_flows_are_well_conditioned(family):
    """The property above is not empty: a fresh flow's Jacobian has a condition number far below 100."""
    torch.manual_seed(0)
    network = family(FlowStructure(((), (0,), (0, 1))), lipschitz=0.97)
    jacobian = torch.autograd.functional.jacobian(lambda y: network.inverse_terms(y)[0], torch.randn(3))
    assert condition(jacobian) < 100
