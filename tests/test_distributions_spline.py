"""Splines of noise: the map, its inverse, densities, gradients, both precisions."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms.spline import _monotonic_rational_spline
from scipy.integrate import quad

from pyro_graphflows.distributions.rational_spline import (
    LOG_SLOPE_BOUND,
    SMALLEST_BIN,
    RationalSpline,
    _place,
    num_spline_parameters,
)
from pyro_graphflows.distributions.spline import BASES, SplineDistribution
from pyro_graphflows.errors import GraphflowsError

BINS = [2, 5, 8]
DF = {"normal": None, "logistic": None, "student": 3.0}


def random_spline(num_bins, batch=(), spread=1.0, bound=4.0, dtype=torch.float64):
    parameters = (spread * torch.randn(*batch, num_spline_parameters(num_bins))).to(dtype)
    return RationalSpline(parameters, bound)


def random_distribution(base, num_bins=5, batch=(), n=2, spread=1.0, dtype=torch.float64):
    loc, log_scale = torch.randn(2, *batch, n).to(dtype)
    spline = (spread * torch.randn(*batch, n, num_spline_parameters(num_bins))).to(dtype)
    return SplineDistribution(loc, log_scale.exp(), spline, base=base, df=DF[base])


@pytest.mark.parametrize("num_bins", BINS)
def test_agrees_with_pyro(num_bins):
    """Pyro's function given the same knots and slopes (its least sizes and slope set to none of its own)."""
    spline = random_spline(num_bins, (400, 1))
    x = torch.linspace(-5, 5, 400).unsqueeze(-1)
    y, log_slope = spline(x)
    theirs = _monotonic_rational_spline(
        x,
        *(spline.tables.lengths / 8).unbind(-2),
        spline.tables.slopes[..., 1:-1],
        bound=4.0,
        min_bin_width=0.0,
        min_bin_height=0.0,
        min_derivative=0.0,
        eps=0.0,
    )
    assert torch.allclose(y, theirs[0], atol=1e-12)
    assert torch.allclose(log_slope, theirs[1], atol=1e-11)


@pytest.mark.parametrize("num_bins", BINS)
@pytest.mark.parametrize(
    ("dtype", "spread"), [(torch.float64, 6.0), (torch.float32, 1.0), (torch.float32, 6.0)]
)
def test_round_trip(num_bins, dtype, spread):
    """As exact as the slope allows: an error of a rounding in y is one of a rounding over the slope in x."""
    spline = random_spline(num_bins, (3000,), spread, dtype=dtype)
    x = torch.linspace(-6, 6, 3000, dtype=dtype)
    y, log_slope = spline(x)
    back, again = spline.inverse(y)
    bound = (
        200 * torch.finfo(dtype).eps * (1 + (-log_slope).exp()) * (1 + log_slope.abs().exp().clamp(max=10))
    )
    assert ((back - x).abs() <= bound).all(), ((back - x).abs() / bound).max()
    assert torch.isfinite(again).all()
    outside = x.abs() >= 4
    assert torch.equal(y[outside], x[outside])
    assert (log_slope[outside] == 0).all()
    if spread == 1.0:
        assert (again - log_slope).abs().max() < 5e-3


def test_monotone_with_continuous_slopes():
    spline = random_spline(8, (), 2.0)
    x = torch.linspace(-5, 5, 20001)
    y, log_slope = spline(x)
    assert (y[1:] > y[:-1]).all()
    knots = torch.cat([spline.tables.starts[0], torch.tensor([4.0])])
    left, right = spline(knots - 1e-9), spline(knots + 1e-9)
    assert torch.allclose(left[0], right[0], atol=1e-6)
    assert torch.allclose(left[1], right[1], atol=1e-4)
    assert torch.allclose(spline(torch.tensor([-4.0, 4.0]) * (1 - 1e-12))[1], torch.zeros(2), atol=1e-6)
    (slope,) = torch.autograd.grad(spline(x.requires_grad_())[0].sum(), x)
    assert torch.allclose(log_slope, slope.log(), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zeros_are_the_identity(dtype):
    for num_bins in BINS:
        spline = RationalSpline(torch.zeros(num_spline_parameters(num_bins), dtype=dtype), 4.0)
        x = torch.linspace(-6, 6, 1001, dtype=dtype)
        for y, log_slope in (spline(x), spline.inverse(x)):
            assert (y - x).abs().max() <= 4 * torch.finfo(dtype).eps * 4
            assert log_slope.abs().max() <= 8 * torch.finfo(dtype).eps


def test_knots_stay_apart_at_any_parameters():
    parameters = 1e4 * torch.randn(200, num_spline_parameters(8))
    spline = RationalSpline(parameters, 4.0)
    for lengths in spline.tables.lengths.unbind(-2):
        assert lengths.min() >= 8 * SMALLEST_BIN * 0.999
        assert torch.allclose(lengths.sum(-1), torch.full((200,), 8.0))
    assert (spline.tables.slopes.log().abs() <= LOG_SLOPE_BOUND + 1e-9).all()
    x = torch.linspace(-4, 4, 200)
    assert torch.isfinite(torch.stack(spline(x))).all()
    assert torch.isfinite(torch.stack(spline.inverse(x))).all()


def test_gradcheck_of_the_map():
    parameters = torch.randn(2, num_spline_parameters(3)).requires_grad_()
    x = torch.tensor([[-0.9, 1.3], [2.1, -5.0]]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, p: RationalSpline(p, 4.0)(x), (x, parameters))
    assert torch.autograd.gradcheck(lambda x, p: RationalSpline(p, 4.0).inverse(x), (x, parameters))
    assert torch.autograd.gradgradcheck(lambda x, p: RationalSpline(p, 4.0)(x), (x, parameters))


def test_one_node_of_the_graph_has_the_gradients_of_its_operations():
    parameters = torch.randn(3, 2, num_spline_parameters(8)).requires_grad_()
    x = (3 * torch.randn(5, 1, 2)).requires_grad_()
    together = RationalSpline(parameters, 4.0)(x)
    assert together[0].shape == together[1].shape == (5, 3, 2)
    assert {type(output.grad_fn).__name__ for output in together} == {"_SplineBackward"}
    weights = torch.randn(2, 5, 3, 2)
    written_out = _place(parameters, x, 8, 4.0)[:2]
    for output, other in zip(together, written_out, strict=True):
        assert torch.equal(output, other)
    one, other = (
        torch.autograd.grad((torch.stack(outputs) * weights).sum(), (parameters, x))
        for outputs in (together, written_out)
    )
    for ours, theirs in zip(one, other, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=1e-10)


def test_gradients_far_outside_are_finite():
    parameters = torch.randn(num_spline_parameters(8), dtype=torch.float32).requires_grad_()
    x = torch.tensor([1e30, -1e19, 4.0, -4.0, 0.0], dtype=torch.float32).requires_grad_()
    for function in (RationalSpline(parameters, 4.0), RationalSpline(parameters, 4.0).inverse):
        y, log_slope = function(x)
        for gradient in torch.autograd.grad(y.sum() + log_slope.sum(), (x, parameters)):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("base", BASES)
def test_density_integrates_to_one(base):
    q = random_distribution(base, n=1)
    edges = (q.loc + q.scale * torch.cat([q.spline.tables.starts[0, 1], torch.tensor([4.0])])).tolist()

    def density(z):
        return q.log_prob(torch.tensor([z])).exp().item()

    inner = quad(density, edges[0], edges[-1], points=edges[1:-1], limit=200)[0]
    outer = quad(density, -math.inf, edges[0])[0] + quad(density, edges[-1], math.inf)[0]
    assert abs(inner + outer - 1) < 1e-6


@pytest.mark.parametrize("base", BASES)
def test_draws_have_the_density(base):
    """Noise recovered from draws is that of the base, and both ways of scoring agree."""
    q = random_distribution(base, batch=(3,))
    z = q.rsample((5000,))
    assert z.shape == (5000, 3, 2)
    own, other = q.log_prob(z), q.log_prob(z.clone())
    assert own.shape == (5000, 3)
    assert torch.allclose(own, other, atol=1e-7)
    uniform = {
        "normal": lambda e: torch.special.ndtr(e),
        "logistic": torch.sigmoid,
        "student": lambda e: torch.as_tensor(__import__("scipy.stats", fromlist=["t"]).t(3.0).cdf(e.numpy())),
    }[base](q.to_noise(z))
    standard_error = 1 / math.sqrt(12 * 30000)
    assert abs(uniform.mean() - 0.5) < 5 * standard_error
    assert abs(uniform.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / 30000)


@pytest.mark.parametrize("base", BASES)
def test_zero_spline_is_the_base(base):
    loc, scale = torch.randn(4, 2), torch.rand(4, 2) + 0.1
    q = SplineDistribution(loc, scale, torch.zeros(23), base=base, df=DF[base])
    same = {
        "normal": dist.Normal,
        "logistic": dist.Logistic,
        "student": lambda m, s: dist.StudentT(3.0, m, s),
    }[base]
    z = torch.randn(6, 4, 2) * 5
    assert torch.allclose(q.log_prob(z), same(loc, scale).log_prob(z).sum(-1))
    assert torch.allclose(q.mean, loc)


def test_tails_are_those_of_the_base():
    for base, same in (("student", dist.StudentT(3.0, 1.0, 2.0)), ("logistic", dist.Logistic(1.0, 2.0))):
        q = SplineDistribution(
            torch.tensor([1.0]), torch.tensor([2.0]), torch.randn(23), base=base, df=DF[base]
        )
        z = torch.tensor([[-1e4], [60.0], [9.5]])
        assert torch.allclose(q.log_prob(z), same.log_prob(z.squeeze(-1)))


@pytest.mark.parametrize("base", BASES)
def test_gradcheck_of_log_prob(base):
    loc, log_scale = (torch.randn(2, 3).requires_grad_() for _ in range(2))
    spline = torch.randn(2, 3, num_spline_parameters(3)).requires_grad_()
    df = torch.tensor(3.5).requires_grad_() if base == "student" else None
    value = torch.randn(2, 3).requires_grad_()

    def log_prob(value, loc, log_scale, spline, *df):
        return SplineDistribution(loc, log_scale.exp(), spline, base=base, df=df[0] if df else None).log_prob(
            value
        )

    extra = () if df is None else (df,)
    assert torch.autograd.gradcheck(log_prob, (value, loc, log_scale, spline, *extra))


def test_gradient_of_its_own_draw():
    """The kept noise gives the derivative that inversion gives; after a plain draw, that at a fixed value."""
    loc, log_scale = (torch.randn(3).requires_grad_() for _ in range(2))
    spline = torch.randn(3, 23).requires_grad_()
    parameters = (loc, log_scale, spline)
    q = SplineDistribution(loc, log_scale.exp(), spline)
    z = q.rsample((7,))
    weights = torch.randn(7)
    kept = torch.autograd.grad((weights * q.log_prob(z)).sum() + z.sin().sum(), parameters, retain_graph=True)
    inverted = torch.autograd.grad((weights * q.log_prob(z + 0.0)).sum() + z.sin().sum(), parameters)
    for one, other in zip(kept, inverted, strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    q = SplineDistribution(loc, log_scale.exp(), spline)
    z = q.sample((7,))
    score = torch.autograd.grad((weights * q.log_prob(z)).sum(), parameters)
    fresh = SplineDistribution(loc, log_scale.exp(), spline)
    wanted = torch.autograd.grad((weights * fresh.log_prob(z.clone())).sum(), parameters)
    for one, other in zip(score, wanted, strict=True):
        assert torch.equal(one, other)
    z.requires_grad_()  # the slope of the density at a draw, as a sampler that starts there needs it
    (slope,) = torch.autograd.grad(q.log_prob(z).sum(), z)
    (wanted,) = torch.autograd.grad(fresh.log_prob(1.0 * z).sum(), z)
    assert torch.equal(slope, wanted)
    assert (slope != 0).all()
    with torch.no_grad():
        z = q.sample()
        noise = q._last.behind(z, ())[0]
        assert q.log_prob(z) == (q._log_base(noise) - q.scale.log() - q.spline(noise)[1]).sum(-1)


def test_gradients_of_learned_degrees_of_freedom():
    df = torch.tensor(4.0).requires_grad_()
    q = SplineDistribution(torch.zeros(2), torch.ones(2), torch.zeros(23), base="student", df=df)
    z = q.rsample((5,))
    (gradient,) = torch.autograd.grad(q.log_prob(z).sum(), df)
    assert torch.isfinite(gradient)
    assert gradient != 0


def test_few_degrees_of_freedom_in_single_precision():
    one = torch.ones(1, dtype=torch.float32)
    df = (0.05 * one).requires_grad_()
    q = SplineDistribution(0 * one, one, torch.zeros(23, dtype=torch.float32), base="student", df=df)
    z = q.rsample((2000,))
    log_prob = q.log_prob(z)
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_prob).all()


@pytest.mark.parametrize("base", BASES)
def test_expand_shares_the_draw(base):
    q = random_distribution(base, batch=(3,))
    larger = q.expand((5, 3))
    assert larger.batch_shape == (5, 3)
    assert larger.event_shape == (2,)
    z = larger.rsample()
    assert torch.allclose(q.log_prob(z), larger.log_prob(z.clone()))
    assert q._last.behind(z, ()) is not None
    assert larger.mean.shape == (5, 3, 2)
    assert q.expand((3,)) is q


def test_single_precision_density():
    """Against double precision: the rounding of a value over the narrowest slope of the bins."""
    torch.manual_seed(3)
    q = random_distribution("normal", 8, (200,), 3)
    single = SplineDistribution(q.loc.float(), q.scale.float(), q.spline.parameters.float())
    z = single.rsample((20,))
    own = single.log_prob(z)
    exact = SplineDistribution(single.loc.double(), single.scale.double(), single.spline.parameters.double())
    noise = single._last.behind(z, ())[0].double()
    wanted = (exact._log_base(noise) - exact.scale.log() - exact.spline(noise)[1]).sum(-1)
    assert (own.double() - wanted).abs().max() < 2e-3
    assert (own.double() - wanted).abs().median() < 2e-6


def test_refusals():
    zeros, ones = torch.zeros(2), torch.ones(2)
    for num_bins in (1, 0, 1000):
        with pytest.raises(GraphflowsError, match="num_bins from 2"):
            num_spline_parameters(num_bins)
    with pytest.raises(GraphflowsError, match="3 \\* num_bins - 1"):
        SplineDistribution(zeros, ones, torch.zeros(2, 7))
    for bound in (0.0, -1.0, math.inf):
        with pytest.raises(GraphflowsError, match="positive, finite bound"):
            SplineDistribution(zeros, ones, torch.zeros(8), bound=bound)
    with pytest.raises(GraphflowsError, match="Expected base one of"):
        SplineDistribution(zeros, ones, torch.zeros(8), base="cauchy")
    with pytest.raises(GraphflowsError, match="df= with base='student'"):
        SplineDistribution(zeros, ones, torch.zeros(8), base="student")
    with pytest.raises(GraphflowsError, match="df= with base='student'"):
        SplineDistribution(zeros, ones, torch.zeros(8), df=3.0)
    with pytest.raises(GraphflowsError, match="positive degrees"):
        SplineDistribution(zeros, ones, torch.zeros(8), base="student", df=-1.0)
