"""The prior's Gaussian coordinate against SciPy's distribution functions, in both tails and both precisions."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats as st
import torch
from pyro.distributions.transforms import OrderedTransform
from torch.distributions import biject_to
from torch.distributions.transforms import AffineTransform, ExpTransform, SigmoidTransform
from versions import SCIPY

from pyro_graphflows.distributions import skewed_scores
from pyro_graphflows.distributions.coordinates import (
    QUANTILES,
    gaussian_coordinate,
    is_well_defined,
)
from pyro_graphflows.distributions.normal_tails import half_normal_quantile, log1mexp, ndtri_exp
from pyro_graphflows.distributions.skewed_scores import LogGamma, LogitBeta, score, unscore


class _SoftLaplace:
    """SciPy has none: the hyperbolic secant of another scale."""

    def __init__(self, loc, scale):
        self.inner = st.hypsecant(loc, scale)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class _HalfT:
    def __init__(self, df, scale):
        self.t = st.t(df, 0, scale)

    def logsf(self, z):
        return math.log(2) + self.t.logsf(z)

    def logcdf(self, z):
        # near zero the difference of two distribution functions has no digits: the density is flat there
        return np.where(z < 1e-6, np.log(2 * z) + self.t.logpdf(0.0), np.log(-np.expm1(self.logsf(z))))


class _SkewLogistic:
    def __init__(self, loc, scale, asymmetry):
        self.inner = st.genlogistic(asymmetry, loc, scale)
        self.loc, self.scale, self.asymmetry = loc, scale, asymmetry

    def logcdf(self, z):
        return self.asymmetry * scipy.special.log_expit((z - self.loc) / self.scale)

    def logsf(self, z):
        return np.log(-np.expm1(self.logcdf(z)))


class _AsymmetricLaplace:
    def __init__(self, loc, scale, asymmetry):
        self.inner = st.laplace_asymmetric(asymmetry, loc, scale)

    def logcdf(self, z):
        return np.log(self.inner.cdf(z))

    def logsf(self, z):
        return np.log(self.inner.sf(z))


# name -> (maker from parameters, parameters, SciPy's distribution of the same parameters)
STANDARD = {
    "uniform": (dist.Uniform, [-2.0, 5.0], lambda low, high: st.uniform(low, high - low)),
    "half_normal": (dist.HalfNormal, [3.0], lambda s: st.halfnorm(0, s)),
    "half_cauchy": (dist.HalfCauchy, [5.0], lambda s: st.halfcauchy(0, s)),
    "cauchy": (dist.Cauchy, [1.0, 2.0], st.cauchy),
    "exponential": (dist.Exponential, [0.3], lambda r: st.expon(0, 1 / r)),
    "laplace": (dist.Laplace, [-1.0, 0.4], st.laplace),
    "asymmetric_laplace": (dist.AsymmetricLaplace, [0.5, 2.0, 1.7], _AsymmetricLaplace),
    "soft_laplace": (dist.SoftLaplace, [0.5, 2.0], _SoftLaplace),
    "gumbel": (dist.Gumbel, [1.0, 2.0], st.gumbel_r),
    "weibull": (dist.Weibull, [2.0, 1.5], lambda s, c: st.weibull_min(c, 0, s)),
    "pareto": (dist.Pareto, [1.5, 3.0], lambda s, a: st.pareto(a, 0, s)),
    "kumaraswamy": (dist.Kumaraswamy, [0.7, 1.8], None),
    "logistic": (dist.Logistic, [1.0, 0.7], st.logistic),
    "skew_logistic": (dist.SkewLogistic, [1.0, 0.7, 2.5], _SkewLogistic),
    "student_t": (dist.StudentT, [4.0, -1.0, 2.0], st.t),
    "student_t_1": (dist.StudentT, [1.0, 0.0, 1.0], st.t),
    "student_t_60": (dist.StudentT, [60.0, 3.0, 0.1], st.t),
    "gamma": (dist.Gamma, [2.5, 0.1], lambda a, r: st.gamma(a, 0, 1 / r)),
    "gamma_small": (dist.Gamma, [0.1, 0.1], lambda a, r: st.gamma(a, 0, 1 / r)),
    "gamma_large": (dist.Gamma, [400.0, 3.0], lambda a, r: st.gamma(a, 0, 1 / r)),
    "chi2": (dist.Chi2, [3.0], st.chi2),
    "inverse_gamma": (dist.InverseGamma, [1.5, 2.0], lambda a, r: st.invgamma(a, 0, r)),
    "beta": (dist.Beta, [2.0, 5.0], st.beta),
    "beta_arcsine": (dist.Beta, [0.5, 0.5], st.beta),
    "beta_large": (dist.Beta, [300.0, 700.0], st.beta),
    "fisher": (dist.FisherSnedecor, [3.0, 7.0], st.f),
    "half_student": (
        lambda df, s: dist.FoldedDistribution(dist.StudentT(df, torch.zeros_like(s), s)),
        [3.0, 2.5],
        _HalfT,
    ),
}
CLOSED = {
    "normal": (dist.Normal, [1.0, 2.0], torch.distributions.constraints.real),
    "log_normal": (dist.LogNormal, [1.0, 0.5], torch.distributions.constraints.positive),
    "logit_normal": (
        lambda m, s: dist.TransformedDistribution(dist.Normal(m, s), SigmoidTransform()),
        [0.5, 1.5],
        torch.distributions.constraints.unit_interval,
    ),
    "shifted_normal": (
        lambda m, s: dist.TransformedDistribution(dist.Normal(m, s), AffineTransform(3.0, -2.0)),
        [0.5, 1.5],
        torch.distributions.constraints.real,
    ),
}
ALL = {**{k: v[:2] for k, v in STANDARD.items()}, **{k: v[:2] for k, v in CLOSED.items()}}


def make(name, dtype=torch.float64, shape=()):
    maker, parameters = ALL[name]
    return maker(*(torch.full(shape, p, dtype=dtype) for p in parameters))


def scipy_score(reference, z):
    with np.errstate(divide="ignore"):
        log_cdf, log_sf = reference.logcdf(z), reference.logsf(z)
        return np.where(log_cdf < log_sf, scipy.special.ndtri_exp(log_cdf), -scipy.special.ndtri_exp(log_sf))


def rounding_in_score(coordinate, u, z, multiple):
    """How much a relative rounding error of the value (at least of one, next to a bound) moves the score."""
    eps = torch.finfo(z.dtype).eps
    slope = coordinate.transform.log_abs_det_jacobian(u, z).exp()
    return multiple * eps * (1 + u.square() + z.abs() / slope)


def at_an_edge(fn, z):
    """Where a value was kept from leaving the support or the range of its type (1e-60 has no single precision)."""
    limits = torch.finfo(z.dtype)
    edge = (z <= 2 * limits.tiny) & (getattr(fn.support, "lower_bound", None) == 0)
    if isinstance(fn, dist.Beta | dist.Kumaraswamy):
        edge = edge | (z >= 1 - 2 * limits.eps)
    return edge


@pytest.mark.parametrize("name", sorted(name for name, entry in STANDARD.items() if entry[2]))
def test_agrees_with_scipy(name):
    u = torch.linspace(-6.0, 6.0, 97)
    coordinate = gaussian_coordinate(make(name))
    z = coordinate.transform(u)
    reference = STANDARD[name][2](*STANDARD[name][1])
    error = (torch.as_tensor(scipy_score(reference, z.numpy())) - u).abs()
    if name == "cauchy" and SCIPY < (1, 15):  # it takes 1/2 from numbers near 1/2 far out
        error = error[u.abs() < 4]
        u, z = u[u.abs() < 4], z[u.abs() < 4]
    assert (error <= 1e-11 + rounding_in_score(coordinate, u, z, 50)).all(), error.max()
    told_apart = (
        rounding_in_score(coordinate, u, z, 2) < 1e-7
    )  # else the value itself is too coarse, beside a bound
    assert told_apart[u.abs() <= 4].all()
    assert error[told_apart].max() < 1e-6


def test_kumaraswamy_is_a_power_of_a_beta():
    """SciPy has no such distribution. For a = 1, F(z) = 1 - (1 - z)^b is a beta distribution."""
    u = torch.linspace(-6, 6, 41)
    one = gaussian_coordinate(dist.Kumaraswamy(torch.tensor(1.0), torch.tensor(2.5))).transform(u)
    other = gaussian_coordinate(dist.Beta(torch.tensor(1.0), torch.tensor(2.5))).transform(u)
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("dtype", "reach"), [(torch.float64, 8.0), (torch.float32, 5.0)])
@pytest.mark.parametrize("name", sorted(ALL))
def test_round_trip_in_the_tails(name, dtype, reach):
    u = torch.linspace(-reach, reach, 81, dtype=dtype).requires_grad_()
    fn = make(name, dtype)
    coordinate = gaussian_coordinate(fn)
    z = coordinate.transform(u)
    assert z.dtype == dtype
    assert coordinate.loc.dtype == dtype
    assert torch.isfinite(z).all()
    assert fn.support.check(z).all()
    assert (z[1:] >= z[:-1]).all() or (z[1:] <= z[:-1]).all()
    back = coordinate.transform.inv(z)
    assert torch.isfinite(back).all()
    bound = 1e-10 + rounding_in_score(coordinate, u, z, 100)  # 1e-10: the table of a constant density
    inside = ~at_an_edge(fn, z)
    assert inside[u.abs() <= 0.6 * reach].all()
    assert ((back - u).abs() <= bound)[inside].all(), (back - u).abs().max()
    for output in (z, back, coordinate.transform.log_abs_det_jacobian(u, z)):
        (gradient,) = torch.autograd.grad(output.sum() + 0.0 * u.sum(), u, retain_graph=True)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", sorted(ALL))
def test_values_beside_the_bounds_are_finite(name):
    fn = make(name)
    coordinate = gaussian_coordinate(fn)
    low = getattr(fn.support, "lower_bound", -math.inf)
    high = getattr(fn.support, "upper_bound", math.inf)
    edges = [float(edge) for edge in (low, high) if math.isfinite(edge)] if coordinate.standard else []
    z = torch.tensor([*edges, *coordinate.transform(torch.tensor([-40.0, 0.0, 40.0])).tolist()])
    z.requires_grad_()
    u = coordinate.transform.inv(z)
    assert torch.isfinite(u).all()
    assert torch.isfinite(torch.autograd.grad(u.sum(), z)[0]).all()


@pytest.mark.parametrize("name", sorted(ALL))
def test_density_is_the_jacobian(name):
    """log p(z) + log |dz/du| = log N(u; loc, scale), with the derivative of the map itself, not through log_prob."""
    maker, parameters = ALL[name]
    fn = maker(
        *(torch.tensor(p).requires_grad_() for p in parameters)
    )  # so that the map is differentiated itself
    coordinate = gaussian_coordinate(fn)
    u = torch.linspace(-6, 6, 49).requires_grad_()
    z = coordinate.transform(u)
    (slope,) = torch.autograd.grad(z.sum(), u)
    error = fn.log_prob(z) + slope.abs().log() - coordinate.log_prior(u)
    bound = 1e-9 + 1e-8 * rounding_in_score(coordinate, u, z, 1.0 / torch.finfo(torch.float64).eps * 1e-7)
    inside = ~at_an_edge(fn, z)
    assert inside[u.abs() <= 4.5].all()
    assert (error.abs() <= bound)[inside].all(), error.abs().max()
    ladj = coordinate.log_abs_det_jacobian(u, z)
    assert ((slope.abs().log() - ladj).abs() <= bound)[inside].all()


@pytest.mark.parametrize("name", sorted(ALL))
def test_gradients_in_everything(name):
    maker, parameters = ALL[name]
    params = tuple(torch.tensor(p).requires_grad_() for p in parameters)
    u = torch.tensor([-2.5, -0.7, 0.0, 0.3, 2.1]).requires_grad_()

    def value(u, *params):
        return gaussian_coordinate(maker(*params)).transform(u)

    positive = bool((value(u, *params) > 0).all())  # then differences are those of logarithms
    z = value(u, *params).detach()
    z = (z.log() if positive else z).requires_grad_()

    def back(z, *params):
        return gaussian_coordinate(maker(*params)).transform.inv(z.exp() if positive else z)

    def prior(u, *params):
        coordinate = gaussian_coordinate(maker(*params))
        return coordinate.loc + 0.0 * u, coordinate.scale + 0.0 * u

    def ladj(z, *params):
        coordinate = gaussian_coordinate(maker(*params))
        z = z.exp() if positive else z
        return coordinate.transform.log_abs_det_jacobian(coordinate.transform.inv(z), z)

    for function, argument in ((value, u), (back, z), (prior, u), (ladj, z)):
        assert torch.autograd.gradcheck(function, (argument, *params), eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(ALL))
def test_derivatives_where_parameters_are_constants(name):
    """The quotient of two densities is then the derivative: it is that of the map, and has derivatives itself."""
    maker, parameters = ALL[name]
    constants = gaussian_coordinate(make(name)).transform
    followed = gaussian_coordinate(maker(*(torch.tensor(p).requires_grad_() for p in parameters))).transform
    u = torch.linspace(-4, 4, 18).requires_grad_()
    assert torch.equal(constants(u), followed(u))
    one, other = (
        torch.autograd.grad(transform(u).sum(), u, create_graph=True)[0]
        for transform in (constants, followed)
    )
    assert torch.allclose(one, other, rtol=1e-8)
    if one.requires_grad:
        bends = [torch.autograd.grad(slope.sum(), u)[0] for slope in (one, other)]
        assert torch.allclose(*bends, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gamma", "beta", "student_t", "inverse_gamma"])
def test_second_derivatives(name):
    maker, parameters = ALL[name]
    params = tuple(torch.tensor(p).requires_grad_() for p in parameters)
    u = torch.tensor([-1.5, 0.4]).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda u, *p: gaussian_coordinate(maker(*p)).transform(u),
        (u, *params),
        eps=1e-6,
        atol=1e-5,
        rtol=1e-3,
    )


@pytest.mark.parametrize("name", sorted(STANDARD))
def test_gradient_at_the_median_has_no_kink(name):
    """The formulas of the two sides meet at u = 0, where training starts: their slopes agree."""
    u = torch.tensor([-1e-7, 0.0, 1e-7]).requires_grad_()
    z = gaussian_coordinate(make(name)).transform(u)
    (slope,) = torch.autograd.grad(z.sum(), u)
    assert (slope > 0).all()
    assert torch.allclose(slope, slope[1].expand(3), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(ALL))
def test_wrappers_and_shapes(name):
    maker, parameters = ALL[name]
    base = maker(*(torch.tensor(p) for p in parameters))
    u = 0.5 * torch.randn(7, 4, 3)
    wanted = gaussian_coordinate(base).transform(u)
    wrapped = {
        "expand": (base.expand([4, 3]), 2),
        "expanded_by": (base.expand([3]).expand_by([4]), 2),
        "independent": (base.expand([4, 3]).to_event(1), 1),
        "mask": (base.expand([4, 3]).mask(torch.tensor([True, False, True])), 2),
        "mask_event": (base.expand([4, 3]).to_event(2).mask(False), 0),
        "expanded": (dist.ExpandedDistribution(base.expand([1, 3]).to_event(1), (4,)), 1),
    }
    for how, (fn, batch_dims) in wrapped.items():
        coordinate = gaussian_coordinate(fn)
        assert coordinate.loc.shape == coordinate.scale.shape == (4, 3), how
        assert coordinate.batch_dims == batch_dims
        assert torch.allclose(coordinate.transform(u), wanted, rtol=1e-12), how
        assert coordinate.log_prior(u).shape == (7, 4, 3)[: 1 + batch_dims]
        assert coordinate.log_abs_det_jacobian(u, wanted).shape == (7, 4, 3)[: 1 + batch_dims]
        larger = coordinate.expand((5, *fn.batch_shape))
        assert larger.loc.shape == (5, 4, 3)
        assert larger.batch_dims == batch_dims + 1


def test_unconstrained_value_where_the_prior_is_normal_there():
    for name, (maker, parameters, support) in CLOSED.items():
        fn = maker(*(torch.tensor(p) for p in parameters))
        coordinate = gaussian_coordinate(fn)
        assert not coordinate.standard
        z = fn.sample((100,))
        assert torch.allclose(coordinate.transform.inv(z), biject_to(support).inv(z)), name
    shifted = gaussian_coordinate(make("shifted_normal"))
    assert shifted.loc.item() == 2.0
    assert shifted.scale.item() == 3.0


def test_vectors():
    ordered = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 2.0).to_event(1), OrderedTransform())
    simplex = dist.LogisticNormal(torch.tensor([0.5, -0.2]), torch.tensor([1.0, 0.3]))
    for fn, size in ((ordered, 3), (simplex, 2)):
        coordinate = gaussian_coordinate(fn)
        assert coordinate.loc.shape == (size,)
        assert coordinate.batch_dims == 0
        z = fn.sample((5,))
        u = coordinate.transform.inv(z)
        assert u.shape == (5, size)
        assert torch.allclose(
            coordinate.log_prior(u) - coordinate.log_abs_det_jacobian(u, z), fn.log_prob(z), atol=1e-10
        )


@pytest.mark.parametrize("low_rank", [False, True])
def test_multivariate_normal(low_rank):
    root = torch.randn(3, 3, 3).tril(-1) + torch.diag_embed(torch.rand(3, 3) + 0.5)
    loc = torch.randn(3)
    if low_rank:
        fn = dist.LowRankMultivariateNormal(loc, torch.randn(3, 3, 2), torch.rand(3) + 0.1)
    else:
        fn = dist.MultivariateNormal(loc, scale_tril=root)
    coordinate = gaussian_coordinate(fn)
    assert coordinate.scale_tril.shape == (3, 3, 3)
    assert coordinate.loc.shape == (3, 3)
    covariance = coordinate.scale_tril @ coordinate.scale_tril.mT
    assert torch.allclose(covariance, fn.covariance_matrix)
    assert torch.allclose(coordinate.scale, covariance.diagonal(dim1=-2, dim2=-1).sqrt())
    z = fn.sample((4,))
    assert torch.allclose(coordinate.log_prior(coordinate.transform.inv(z)), fn.log_prob(z))
    nested = gaussian_coordinate(fn.to_event(1))
    assert nested.batch_dims == 0
    assert nested.scale_tril.shape == (3, 3, 3)
    assert torch.allclose(nested.log_prior(z), fn.log_prob(z).sum(-1))
    exponential = gaussian_coordinate(dist.TransformedDistribution(fn, ExpTransform()))
    assert torch.equal(exponential.transform.inv(z.exp()), z.exp().log())
    assert exponential.scale_tril is not None


def test_no_coordinate():
    class Narrow(dist.Normal):
        def log_prob(self, value):
            return 2.0 * super().log_prob(value)

    one = torch.tensor(1.0)
    none = [
        Narrow(0.0, 1.0),
        dist.Bernoulli(0.5),
        dist.Dirichlet(torch.ones(3)),
        dist.LKJCholesky(3),
        dist.Delta(one),
        dist.VonMises(one, one),
        dist.FoldedDistribution(dist.Normal(one, one)),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)),
        dist.ImproperUniform(torch.distributions.constraints.real, (), ()),
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), torch.distributions.AbsTransform()),
    ]
    for fn in none:
        assert gaussian_coordinate(fn) is None, fn


def test_affine_beta_and_other_compositions():
    u = torch.linspace(-4, 4, 9)
    affine = gaussian_coordinate(dist.AffineBeta(torch.tensor(2.0), torch.tensor(3.0), 1.0, 4.0))
    plain = gaussian_coordinate(dist.Beta(torch.tensor(2.0), torch.tensor(3.0)))
    assert affine.standard
    assert torch.allclose(affine.transform(u), 1.0 + 4.0 * plain.transform(u))
    fn = dist.TransformedDistribution(dist.Gamma(torch.tensor(2.0), 1.0), ExpTransform().inv)
    coordinate = gaussian_coordinate(fn)
    z = coordinate.transform(u)
    assert torch.allclose(coordinate.log_prior(u), fn.log_prob(z) + coordinate.log_abs_det_jacobian(u, z))


def test_well_defined():
    with pyro.validation_enabled(False):
        _check_well_defined()


def _check_well_defined():
    bad = torch.tensor([1.0, 0.0, -1.0, math.inf, math.nan])
    for maker in (
        lambda s: dist.Normal(0.0, s),
        lambda s: dist.LogNormal(0.0, s),
        lambda s: dist.Gamma(s, 1.0),
        lambda s: dist.HalfCauchy(s),
        lambda s: dist.Weibull(s, 1.0),
        lambda s: dist.StudentT(3.0, 0.0, s),
        lambda s: dist.Uniform(0.0, s),
    ):
        assert is_well_defined(maker(bad)).tolist() == [True, False, False, False, False]
    assert is_well_defined(dist.Normal(0.0, bad).to_event(1)).shape == (5,)
    for name in ALL:
        assert bool(is_well_defined(make(name)).all()), name
    for fn in (
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        dist.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2)),
    ):
        assert is_well_defined(fn).all()
    flat = dist.TransformedDistribution(dist.Normal(0.0, 1.0), AffineTransform(0.0, torch.tensor([1.0, 0.0])))
    assert is_well_defined(flat).tolist() == [True, False]


def test_every_quantile_is_tested():
    tested = {type(gaussian_coordinate(make(name)).transform) for name in STANDARD}
    assert set(QUANTILES.values()) <= tested


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ndtri_exp(dtype):
    """Inverse of log_ndtr from one side to the other, by SciPy; far beyond where exp() underflows."""
    y = -torch.logspace(-12 if dtype == torch.float64 else -6, 8, 400, dtype=dtype)
    error = ndtri_exp(y).double() - torch.as_tensor(scipy.special.ndtri_exp(y.double().numpy()))
    bound = (
        1e-12 + 30 * torch.finfo(dtype).eps
    )  # SciPy's own error, 7e-13 at -700, is the larger one in double
    assert (error.abs() <= bound * (1 + ndtri_exp(y).abs())).all()
    lower = y[y < -0.7]
    assert torch.equal(ndtri_exp(lower, is_lower=True), ndtri_exp(lower))
    assert torch.isneginf(ndtri_exp(torch.tensor([-torch.inf], dtype=dtype))).all()
    x = torch.tensor([-50.0, -3.0, -0.7, -0.6, -1e-3]).requires_grad_()
    assert torch.autograd.gradcheck(ndtri_exp, x)
    assert torch.autograd.gradgradcheck(ndtri_exp, x)
    assert torch.autograd.gradcheck(log1mexp, x)


EXTREME = [0.003, 0.05, 0.5, 1.0, 1.5, 2.0, 7.0, 80.0, 3e3, 1e5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_normal_quantile(dtype):
    """Right in both tails, where the probability beyond the score is no number any more, too, with its derivatives."""
    u = torch.linspace(-8.0, 60.0, 6801, dtype=dtype, requires_grad=True)
    z = half_normal_quantile(u)
    u64 = u.detach().double().numpy()
    exact = np.where(
        u64 < 0.0,
        np.sqrt(2.0) * scipy.special.erfinv(scipy.special.ndtr(u64)),
        -scipy.special.ndtri_exp(scipy.special.log_ndtr(-u64) - np.log(2.0)),
    )
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(z.detach().numpy(), exact, rtol=rtol)
    (slope,) = torch.autograd.grad(z.sum(), u)
    of_densities = np.exp(0.5 * exact**2 - 0.5 * u64**2) / 2.0
    np.testing.assert_allclose(slope.numpy(), of_densities, rtol=1e-5 if dtype == torch.float64 else 2e-3)
    assert (z.diff() > 0).all()


def test_skewed_scores_over_a_grid_of_parameters():
    """Shapes from .003 to 1e5 and all pairs: scores are inverted, and agree with SciPy where that is accurate."""
    u = torch.linspace(-8, 8, 65)
    for a in EXTREME:
        kernel = LogGamma(torch.tensor(a).expand(65))
        x = unscore(kernel, u)
        assert (score(kernel, x) - u).abs().max() < 1e-9
        inner = (u.abs() <= 6) & (x > -600)
        error = scipy_score(st.gamma(a), x[inner].exp().numpy()) - u[inner].numpy()
        assert np.abs(error).max() < 1e-8, a
    for a in EXTREME:
        for b in EXTREME:
            kernel = LogitBeta(torch.tensor(a).expand(65), torch.tensor(b).expand(65))
            x = unscore(kernel, u)
            assert (score(kernel, x) - u).abs().max() < 1e-9, (a, b)


def test_table_of_a_constant_density():
    """A prior with constants is looked up after a few calls; it must not be seen in the values nor in gradients."""
    skewed_scores._TABLES.tables.clear()
    skewed_scores._TABLES.asked.clear()
    u = torch.linspace(-8.9, 8.9, 3001).requires_grad_()
    for kernel in (LogGamma(torch.tensor(0.3)), LogitBeta(torch.tensor(2.0), torch.tensor(0.7))):
        solved = unscore(kernel, u)
        for _ in range(skewed_scores.ASKED_OFTEN):
            looked_up = unscore(kernel, u)
        assert (score(kernel, looked_up) - u).abs().max() < 1e-9
        one, other = (torch.autograd.grad(x.sum(), u)[0] for x in (solved, looked_up))
        assert torch.allclose(one, other, rtol=1e-8)
    assert len(skewed_scores._TABLES.tables) == 2
    for i in range(200):
        for _ in range(2):
            unscore(LogGamma(torch.tensor(1.0 + i)), u[:2])
    assert len(skewed_scores._TABLES.asked) <= skewed_scores.MOST_TABLES
    assert len(skewed_scores._TABLES.tables) == 2


def test_draws_beyond_the_table_do_not_make_the_others_wait(monkeypatch):
    """Heavy-tailed noise has such draws among any thousands; only these are solved for."""
    kernel = LogitBeta(torch.tensor(1.0), torch.tensor(10.0))
    for _ in range(skewed_scores.ASKED_OFTEN):
        unscore(kernel, torch.zeros(2))
    solved = []
    solve = skewed_scores._solve
    monkeypatch.setattr(
        skewed_scores, "_solve", lambda kernel, u: solved.append(u.numel()) or solve(kernel, u)
    )
    u = torch.linspace(-12.0, 12.0, 241).reshape(1, 241)
    x = unscore(kernel, u)
    assert solved == [int((u.abs() > skewed_scores.TABLE_REACH).sum())]
    assert (score(kernel, x) - u).abs().max() < 1e-9
    assert torch.isnan(unscore(kernel, torch.tensor([0.0, math.nan]))).tolist() == [False, True]


def test_many_values_are_solved_in_pieces_and_those_found_wait_for_no_others(monkeypatch):
    """All 77 nodes of all values at once leave the cache, and most values need two steps, few three."""
    counts, own = [], skewed_scores._score
    monkeypatch.setattr(
        skewed_scores, "_score", lambda kernel, x: (counts.append(x.numel()), own(kernel, x))[1]
    )
    u = torch.randn(30, 200)
    alpha, beta = 2.0 + 20.0 * torch.rand(30, 1), torch.tensor(7.0)
    x = unscore(LogitBeta(alpha, beta), u)
    assert max(counts) <= skewed_scores.PIECE
    assert sum(counts) < 2.5 * u.numel()
    assert torch.allclose(score(LogitBeta(alpha, beta), x), u, atol=1e-10)
    assert max(counts) <= skewed_scores.PIECE
    one_by_one = [unscore(LogitBeta(alpha[i, 0], beta), u[i]) for i in range(30)]
    torch.testing.assert_close(x, torch.stack(one_by_one))


def test_nan_parameters_stay_nan():
    nan = torch.tensor(math.nan)
    assert torch.isnan(unscore(LogGamma(nan), torch.zeros(2))).all()


def test_draws_of_the_prior_are_normal():
    """Independent of any distribution function: the first two moments of the scores of the prior's own draws."""
    for name in sorted(STANDARD):
        fn = make(name)
        u = gaussian_coordinate(fn).transform.inv(fn.sample((20000,)))
        se = 1 / math.sqrt(20000)
        assert abs(u.mean()) < 5 * se, name
        assert abs(u.var() - 1) < 5 * math.sqrt(2) * se, name
