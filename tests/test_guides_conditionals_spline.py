"""Spline factors: densities against quadrature and a change of variables, the linear start, own draws and gradients."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.distributions.spline import BASES
from pyro_graphflows.guides import spline_start
from pyro_graphflows.guides.conditionals.factors import NormalFactor
from pyro_graphflows.guides.conditionals.spline import KNOT_UNIT, SplineFactor, SplineVector
from pyro_graphflows.guides.spline_start import UNIT_OF_NORMAL

DF = 5.0
SPREAD = {"normal": 1.0, "student": math.sqrt(DF / (DF - 2)), "logistic": math.pi / math.sqrt(3)}


def factor_of(size, base="normal", num_bins=4, df=DF):
    return SplineFactor(size, num_bins, 4.0, base, df)


def random_outputs(factor, *batch):
    return torch.randn(*batch, factor.num_outputs) * 0.7


def units(size):
    return torch.linspace(-1.0, 2.0, size), torch.linspace(0.5, 3.0, size)


# ---------------------------------------------------------------- densities


@pytest.mark.parametrize("base", BASES)
def test_density_of_one_element_integrates_to_one(base):
    factor = factor_of(1, base)
    q = factor.distribution(random_outputs(factor), *units(1))

    t = torch.linspace(-math.pi / 2, math.pi / 2, 100_003)[
        1:-1
    ]  # the line as the image of an interval: u = tan(t)
    density = q.log_prob(t.tan().unsqueeze(-1)).exp() * (1 + t.tan().square())
    assert torch.trapezoid(density, t).item() == pytest.approx(1.0, abs=1e-7)


def noise_of(q, u):
    """Return the noise of a value by hand: solve for the splines' images, then invert the splines."""
    y = torch.linalg.inv(q.scale_tril) @ (u - q.loc)
    return q.elements.spline.inverse(y)[0]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("size", [2, 3])
def test_density_of_a_vector_is_a_change_of_variables(base, size):
    """The base's density of the noise, times the determinant of its Jacobian, which automatic derivatives give."""
    factor = factor_of(size, base)
    q = factor.distribution(random_outputs(factor), *units(size))
    assert isinstance(q, SplineVector)
    log_base = {
        "normal": lambda e: dist.Normal(0.0, 1.0).log_prob(e),
        "student": lambda e: dist.StudentT(DF).log_prob(e),
        "logistic": lambda e: -e - 2 * torch.nn.functional.softplus(-e),
    }[base]
    for _ in range(5):
        u = q.loc + q.scale_tril @ (2 * torch.randn(size))
        jacobian = torch.autograd.functional.jacobian(lambda u: noise_of(q, u), u)
        expected = log_base(noise_of(q, u)).sum() + torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(q.log_prob(u), expected)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("size", [1, 3])
def test_draws_are_scored_as_any_value(base, size):
    """The noise of a draw is kept; a copy of the draw is inverted. Both have the same density."""
    factor = factor_of(size, base)
    outputs = random_outputs(factor, 4)
    q = factor.distribution(outputs, *units(size))
    for shape in ((), (500,)):
        u = q.rsample(shape)
        assert u.shape == (*shape, 4, size)
        own = q.log_prob(u)
        assert own.shape == (*shape, 4)
        torch.testing.assert_close(
            own, factor.distribution(outputs, *units(size)).log_prob(u), atol=1e-7, rtol=1e-7
        )
    wide = q.expand((7, 4))
    u = wide.rsample()
    assert u.shape == (7, 4, size)
    torch.testing.assert_close(wide.log_prob(u), q.log_prob(u.clone()), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_at_a_value_drawn_without_gradients_are_those_at_any_value(size):
    """As in wake phases: the value is fixed, and its density moves with the parameters."""
    factor = factor_of(size)
    outputs = random_outputs(factor, 4).requires_grad_()

    def gradient(score):
        q = factor.distribution(outputs, *units(size))
        with torch.no_grad():
            u = q.rsample()
        return torch.autograd.grad(score(q, u).sum(), outputs)[0]

    torch.manual_seed(3)
    own = gradient(lambda q, u: q.log_prob(u))
    torch.manual_seed(3)
    other = gradient(lambda q, u: q.log_prob(u.clone()))
    assert (other[:, :size] != 0).all()
    torch.testing.assert_close(own, other)
    q = factor.distribution(outputs.detach(), *units(size))
    u = q.sample()
    (slope,) = torch.autograd.grad(q.log_prob(u.requires_grad_()).sum(), u)
    (expected,) = torch.autograd.grad(q.log_prob(1.0 * u).sum(), u)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_of_own_draws(size):
    """The density of a reparametrised draw moves with the draw too: as by a copy that is inverted."""
    factor = factor_of(size)
    outputs = random_outputs(factor, 4).requires_grad_()

    def gradient(score):
        torch.manual_seed(3)
        q = factor.distribution(outputs, *units(size))
        return torch.autograd.grad(score(q, q.rsample()).sum(), outputs)[0]

    own = gradient(lambda q, u: q.log_prob(u))
    other = gradient(lambda q, u: q.log_prob(u.clone()))
    torch.testing.assert_close(own, other, atol=1e-7, rtol=1e-6)


# ---------------------------------------------------------------- the linear start


def linear_case(size):
    tril = torch.randn(size, size).tril(-1) + torch.linspace(0.3, 1.5, size).diag()
    return torch.randn(size, 2), torch.randn(size), tril


@pytest.mark.parametrize("size", [1, 2, 3])
def test_linear_start_with_a_normal_base_is_the_normal_factor(size):
    weights, loc, tril = linear_case(size)
    factor, normal = factor_of(size), NormalFactor(size)
    shift, scale = units(size)
    x, u = torch.randn(50, 2), 3 * torch.randn(50, size)
    found = []
    for each in (factor, normal):
        rows, biases = each.linear_start(weights, loc, tril)
        assert rows.shape == (each.num_outputs, 2)
        assert biases.shape == (each.num_outputs,)
        q = each.distribution(x @ rows.T + biases, shift, scale)
        found.append((q.log_prob(u), q.mean))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("base", ["student", "logistic"])
@pytest.mark.parametrize("size", [1, 2])
def test_linear_start_with_another_base_has_the_same_moments(base, size):
    """Five standard errors, from fourth moments: the excess kurtosis is 6 (Student's t of 5) and 1.2 (logistic)."""
    weights, loc, tril = linear_case(size)
    factor, x = factor_of(size, base), torch.randn(2)
    rows, biases = factor.linear_start(weights, loc, tril)
    shift, scale = units(size)
    q = factor.distribution(rows @ x + biases, shift, scale)
    n, excess = 100_000, {"student": 6.0, "logistic": 1.2}[base]
    u = q.rsample((n,)).reshape(n, size)
    root = scale.unsqueeze(-1) * tril
    covariance = root @ root.T
    spread = covariance.diagonal().sqrt()
    assert ((u.mean(0) - shift - scale * (loc + weights @ x)).abs() < 5 * spread / n**0.5).all()
    error = (torch.cov(u.T).reshape(size, size) - covariance).abs() / torch.outer(spread, spread)
    assert (error < 5 * math.sqrt((2 + excess) / n)).all()
    torch.testing.assert_close(q.mean, shift + scale * (loc + weights @ x))


def test_a_base_without_a_variance_keeps_its_scale():
    factor = factor_of(1, "student", df=2.0)
    rows, biases = factor.linear_start(torch.zeros(1, 0), torch.zeros(1), torch.full((1, 1), 0.5))
    q = factor.distribution(rows.sum(-1) + biases, torch.zeros(1), torch.ones(1))
    u = torch.linspace(-3, 3, 7).unsqueeze(-1)
    torch.testing.assert_close(q.log_prob(u), dist.StudentT(2.0, 0.0, 0.5).log_prob(u[:, 0]))


def test_outputs():
    factor = factor_of(3, num_bins=5)
    assert factor.num_outputs == 3 + 3 + 3 + 3 * (3 * 5 - 1)
    assert factor.log_scale_outputs == (3, 4, 5)
    assert factor.output_elements is None
    outputs = random_outputs(factor)
    shift, scale = units(3)
    outputs[3:6] -= 1e3  # as small as a scale can be told from rounding, and no smaller
    q = factor.distribution(outputs, shift, scale)
    assert (q.scale_tril.diagonal() > 0).all()
    assert torch.isfinite(q.log_prob(q.rsample()))


@pytest.mark.parametrize("base", BASES)
def test_gradcheck_of_the_density_of_a_vector(base):
    factor = factor_of(2, base, num_bins=2)
    outputs, u = random_outputs(factor).requires_grad_(), torch.randn(2).requires_grad_()

    def log_prob(outputs, u):
        return factor.distribution(outputs, *units(2)).log_prob(u)

    assert torch.autograd.gradcheck(log_prob, (outputs, u))


def counts(y):
    rate = pyro.sample("rate", dist.Exponential(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


@pytest.mark.parametrize(
    ("init", "gain", "unit"),
    [
        ("auto", -1.0, KNOT_UNIT),  # no rows are normal
        ("auto", 1.0, UNIT_OF_NORMAL),  # all are
        ("regression", -1.0, 1.0),
        ("regression", 1.0, UNIT_OF_NORMAL),
    ],
)
def test_knots_move_less_where_one_data_set_is_fitted_and_where_rows_are_normal(
    init, gain, unit, monkeypatch
):
    """A change of the network's outputs, as by a step of Adam, is one of knots in their unit."""
    monkeypatch.setattr(spline_start, "LEAST_GAIN", gain)
    y = torch.tensor([2.0, 0.0, 3.0])
    guide = auto_faithful_guide(counts, y, family="spline", init=init)
    assert ("the start is 'mode'" in guide.describe(verbose=True)) == (init == "auto")

    def knots():
        with torch.no_grad():
            return poutine.trace(guide).get_trace(y).nodes["rate"]["fn"].base.spline.parameters.clone()

    before = knots()
    with torch.no_grad():
        guide.blocks[0].conditionals.network.skip.bias += 0.01
    moved = knots() - before
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01 * unit))
