"""Going downhill: exact on quadratics, out of saddles, back from where a function is not defined; normals too."""

import math

import pytest
import torch

from pyro_graphflows.guides import minimize
from pyro_graphflows.guides.minimize import Hessians, fit_normal, lbfgs, loss_and_gradient


def random_quadratic(size):
    root = torch.randn(size, size)
    matrix = root @ root.T + 0.1 * torch.eye(size)
    lowest = torch.randn(size)
    return matrix, lowest, lambda x: (x - lowest) @ matrix @ (x - lowest) / 2


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def newton(function, point):
    return minimize.newton(Hessians(function), point)


@pytest.mark.parametrize("search", [newton, lbfgs])
def test_lowest_points_of_quadratics(search):
    _, lowest, function = random_quadratic(6)
    found = search(function, torch.zeros(6))
    torch.testing.assert_close(found, lowest, rtol=0, atol=1e-2)
    assert float(function(found)) < 1e-5


def test_newton_follows_a_curved_valley_and_leaves_a_saddle():
    found = newton(rosenbrock, torch.tensor([-1.2, 1.0, -0.5]))
    torch.testing.assert_close(found, torch.ones(3), rtol=0, atol=1e-2)
    found = newton(lambda x: (x**4 / 4 - x**2 / 2).sum(), torch.tensor([1e-3, -1e-3]))
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0]), rtol=0, atol=1e-2)


def test_a_search_ends_when_its_time_is_over():
    first = torch.tensor([-1.2, 1.0, -0.5])
    assert torch.equal(minimize.newton(Hessians(rosenbrock), first, seconds=-1.0), first)


def test_units_of_very_different_size_are_no_trouble():
    units = torch.tensor([1e6, 1e-3, 1.0])
    found = newton(lambda x: ((x / units - 1) ** 2).sum(), torch.zeros(3))
    torch.testing.assert_close(found / units, torch.ones(3))


def test_second_derivatives_that_autograd_calls_undefined_are_differences():
    # the gradient of this operation is known where one of its numbers is -inf, and the derivative of that is NaN
    def function(x):
        other = torch.where(torch.tensor([True, False]), x.exp(), -math.inf)
        return torch.logaddexp(x.square(), other).sum()

    def without(x):
        return torch.logaddexp(x[0].square(), x[0].exp()) + x[1].square()

    point = torch.tensor([0.3, -0.2])
    (_, _, found), (_, _, right) = (Hessians(each).at(point) for each in (function, without))
    torch.testing.assert_close(found, right, rtol=0, atol=1e-4)


def test_hessians_by_products_and_by_differences():
    matrix, _, function = random_quadratic(4)

    class Plain(torch.autograd.Function):
        """The same by an operation that products of many vectors at once cannot go through."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return function(x)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return grad * torch.autograd.grad(function(x), x)[0]

    point = torch.randn(4)
    torch.testing.assert_close(Hessians(function).at(point)[2], matrix)
    torch.testing.assert_close(Hessians(Plain.apply).at(point)[2], matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("search", [newton, lbfgs])
def test_steps_into_undefined_regions_are_shortened(search):
    def function(x):
        if bool((x <= 0).any()):
            raise ValueError("not defined there")
        return (x - x.log()).sum()

    found = search(function, torch.tensor([8.0, 0.1]))
    torch.testing.assert_close(found, torch.ones(2), rtol=0, atol=1e-2)
    loss, gradient = loss_and_gradient(function, torch.tensor([-1.0, 1.0]))
    assert loss == float("inf")
    assert not gradient.any()
    assert Hessians(function).at(torch.tensor([-1.0, 1.0]))[2] is None


def test_normals_are_found_exactly_from_far_off_and_at_last_from_many_draws():
    matrix, lowest, _ = random_quadratic(5)

    def function(x):
        return ((x - lowest) @ matrix * (x - lowest)).sum(-1) / 2

    loc, factor = torch.zeros(5), torch.eye(5)
    for _ in range(3):
        loc, factor = fit_normal(function, loc, factor)
    # rates of .1 at the end leave little of what was before, and the Hessian is the same everywhere
    torch.testing.assert_close(factor.T @ matrix @ factor, torch.eye(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(loc, lowest, rtol=0, atol=1e-3)


def test_the_best_normal_of_a_skewed_density():
    """Of exp(-f) with f = exp(x) - a x, the best normal has mean log(a) - s / 2 and variance s with s = 1 / a."""
    a = 3.0
    loc, factor = torch.zeros(40), 0.1 * torch.eye(40)
    for _ in range(3):
        loc, factor = fit_normal(lambda x: (x.exp() - a * x).sum(-1), loc, factor)
    variances = (factor @ factor.T).diagonal()
    assert abs(float(variances.mean()) - 1 / a) < 0.01
    assert abs(float(loc.mean()) - (math.log(a) - 0.5 / a)) < 0.02


def test_where_a_function_is_not_defined_a_normal_gets_narrower():
    def function(x):
        if bool((x.abs() > 3.0).any()):
            raise ValueError("not defined there")
        return 50 * x.square().sum(-1)

    loc, factor = fit_normal(function, torch.zeros(2), 8.0 * torch.eye(2))
    torch.testing.assert_close(factor @ factor.T, torch.eye(2) / 100, rtol=0.3, atol=1e-3)
    assert loc.abs().max() < 0.1


def curved(rows):
    """Of many points, with third and fourth derivatives and widths of 1 and .01."""
    units = torch.tensor([1.0, 0.3, 0.1, 0.01])
    x = rows / units
    return x.cosh().log().sum(-1) + (x[..., 0] * x[..., 1]).sin() + x.square().sum(-1)


def slow(function, rows, point):
    """Return what finds Hessians, after products that took long."""
    hessians = Hessians(function, rows)
    hessians.at(point)
    hessians._seconds = [1e3, 1e3]
    return hessians


def test_where_products_take_long_differences_at_many_points_are_one_evaluation():
    numbers = []

    def rows(points):
        numbers.append(len(points))
        return curved(points)

    point = torch.tensor([0.3, -0.2, 0.05, 0.01])
    hessians = slow(curved, rows, point)
    assert hessians.cheaply_at(point)[2] is None
    for _ in range(3):
        point = 0.9 * point
        loss, gradient, hessian = hessians.at(point)
        torch.testing.assert_close(loss, curved(point))
        torch.testing.assert_close(gradient, loss_and_gradient(curved, point)[1])
        expected = torch.autograd.functional.hessian(curved, point)
        torch.testing.assert_close(hessian, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(hessians.cheaply_at(point)[2], hessian)
    assert numbers == [9] * 6


def test_differences_are_left_where_they_are_wrong_or_take_longer():
    def rounded(points):
        return curved(points.float()).double()

    point = torch.tensor([0.3, -0.2, 0.05, 0.01])
    expected = torch.autograd.functional.hessian(curved, point)
    for function, rows in (
        (curved, rounded),
        (curved, None),
        (curved, lambda points: math.nan * points.sum(-1)),
    ):
        hessians = slow(function, rows, point)
        torch.testing.assert_close(hessians.at(point)[2], expected)
        assert hessians.cheaply_at(point)[2] is None
    hessians = slow(curved, curved, point)
    hessians._seconds = [minimize.LONG / 2] * 2  # not long
    hessians.at(point)
    assert hessians.cheaply_at(point)[2] is None


def test_newton_and_normals_by_differences(monkeypatch):
    hessians = slow(curved, curved, torch.full((4,), 0.1))
    found = minimize.newton(hessians, torch.tensor([0.5, 0.2, 0.1, 0.02]))
    torch.testing.assert_close(found, torch.zeros(4), rtol=0, atol=1e-3)
    monkeypatch.setattr(minimize, "LONG", -1.0)
    found = []
    for has_units in (False, True):
        options = {"generator": torch.Generator().manual_seed(0), "has_units": has_units}
        found.append(
            fit_normal(lambda x: (x.exp() - 3.0 * x).sum(-1), torch.zeros(5), torch.eye(5), **options)
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
