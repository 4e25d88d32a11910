"""The solvers on toy maps whose answers are known, and where plain Newton fails."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_graphflows.errors import ConvergenceError, GraphflowsError, GraphflowsWarning
from pyro_graphflows.transforms.solver import (
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
    y = solve_elementwise(function, z, 1 - c, 1 + c)
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
    y = solve_elementwise(function, z, 0.001, 1.999)
    assert ((function(y)[0] - z).abs() < 1e-13).all()


@given(st.floats(-1e4, 1e4), st.sampled_from([0.9, 0.99, 0.999]), st.floats(0.1, 50))
@settings(max_examples=100, deadline=None)
def test_elementwise_backward_error(z, c, rate):
    function = wavy(c, rate)
    target = torch.tensor([z], dtype=torch.float64)
    y = solve_elementwise(function, target, 1 - c, 1 + c)
    assert (function(y)[0] - target).abs() <= 1e-14 * max(1, abs(z), abs(float(y)))


def test_few_iterations_are_needed():
    calls = []

    def function(y):
        calls.append(1)
        return y + 0.9 * torch.tanh(y), 1 + 0.9 * (1 - torch.tanh(y) ** 2)

    solve_elementwise(function, torch.randn(1000) * 3, 0.999, 1.9)
    assert len(calls) <= 8


def test_steep_maps_end_at_the_nearest_number():
    """A slope of 1e6 cannot reach a residual of rounding size; the nearest floating-point number is the answer."""
    function = lambda y: (y + 1e6 * torch.tanh(y), 1 + 1e6 * (1 - torch.tanh(y) ** 2))  # noqa: E731
    z = torch.randn(100) * 1e5
    y = solve_elementwise(function, z, 1.0, 1 + 1e6)
    assert ((function(y)[0] - z).abs() <= 1e6 * 1e-15 * (1 + y.abs())).all()


def test_failure_raises_or_warns_and_names_the_knob():
    function, z = wavy(0.999, 1.0), torch.linspace(-6, 6, 50)
    with pytest.raises(ConvergenceError, match=r"max_iterations \(2\)"):
        solve_elementwise(function, z, 0.001, 1.999, solver=Solver(max_iterations=2), what="a map")
    with pytest.warns(GraphflowsWarning, match="inverse of a map to converge"):
        y = solve_elementwise(
            function, z, 0.001, 1.999, solver=Solver(max_iterations=2, on_failure="warn"), what="a map"
        )
    assert y.shape == z.shape
    with pytest.raises(ConvergenceError, match="not finite"):
        solve_elementwise(function, torch.tensor([0.0, math.nan]), 0.001, 1.999)


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
        y = solve_elementwise(lambda y: function(y, a.detach()), z.detach(), 0.3, 1.7)
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
