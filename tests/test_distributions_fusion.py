"""Fusion of normal priors and factors against exact answers, in both precisions and at the extremes."""

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from pyro_graphflows.distributions.fusion import (
    fuse,
    fuse_logits,
    fuse_matrix,
    fuse_natural,
    fuse_natural_matrix,
    natural_parameters,
    summed_over_groups,
)

inf = math.inf


def exact(a, log_b, m, log_s):
    with mpmath.workdps(60):
        one, two = mpmath.e ** (-2 * mpmath.mpf(log_b)), mpmath.e ** (-2 * mpmath.mpf(log_s))
        return float((one * a + two * m) / (one + two)), float(-mpmath.log(one + two) / 2)


CASES = [
    (a, b, m, s)
    for a in (0.0, -3.0)
    for m in (1.0, 1e4)
    for b in (-45.0, -2.0, 0.3, 40.0)
    for s in (-30, 0.0, 5)
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_forms_are_exact(dtype):
    """Within a few roundings of 60-digit arithmetic, from log tau = -45 to 40."""
    eps = torch.finfo(dtype).eps
    for a, log_b, m, log_s in CASES:
        mean, log_sd = exact(*(float(torch.tensor(x, dtype=dtype)) for x in (a, log_b, m, log_s)))
        arguments = [torch.tensor(x, dtype=dtype) for x in (a, log_b, m, log_s)]
        found = fuse(*arguments)
        # the weight has the relative error of the difference of the log-scales
        bound = eps * (4 + 8 * abs(log_b - log_s)) * (abs(a) + abs(m))
        assert abs(float(found[0]) - mean) <= bound, (a, log_b, m, log_s)
        assert abs(float(found[1]) - log_sd) <= 4 * eps * (1 + abs(log_b) + abs(log_s))
        if abs(log_s) < 10:
            natural = fuse_natural(*arguments[:2], *natural_parameters(*arguments[2:]))
            assert abs(float(natural[0]) - mean) <= bound + 8 * eps * (1 + abs(log_b)) * (abs(a) + abs(m))
            assert abs(float(natural[1]) - log_sd) <= 8 * eps * (1 + abs(log_b) + abs(log_s))


def test_narrow_and_wide_priors_have_finite_gradients():
    for log_b in (-400.0, -45.0, 0.0, 45.0, 340.0):
        args = [torch.tensor(x).requires_grad_() for x in (0.5, log_b, 2.0, 0.1)]
        outputs = (*fuse(*args), *fuse_natural(args[0], args[1], *natural_parameters(*args[2:])))
        for output in outputs:
            assert torch.isfinite(output)
            for gradient in torch.autograd.grad(output, args, retain_graph=True, allow_unused=True):
                assert gradient is None or torch.isfinite(gradient)
    for log_b in (-45.0, 40.0):
        args = [torch.tensor(x, dtype=torch.float32) for x in (0.5, log_b, 2.0, 0.1)]
        assert abs(fuse_natural(*args[:2], *natural_parameters(*args[2:]))[1].item() - min(log_b, 0.1)) < 1e-5


def test_gradcheck():
    args = [torch.tensor(x).requires_grad_() for x in ([0.5, 0.1], [-1.0, 1.5], [2.0, -1.0], [0.3, -0.4])]
    assert torch.autograd.gradcheck(fuse, args)
    precision = torch.tensor([0.5, 0.0]).requires_grad_()
    assert torch.autograd.gradcheck(fuse_natural, (*args[:2], precision, args[2]))
    root = (torch.randn(3, 3).tril() + 3 * torch.eye(3)).requires_grad_()
    half = torch.randn(3, 3).requires_grad_()
    vectors = [torch.randn(3).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda loc, root, half, w: fuse_natural_matrix(loc, root.tril(), half @ half.mT, w),
        (vectors[0], root, half, vectors[1]),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_evidence_is_exactly_the_prior(dtype):
    a = torch.randn(50, dtype=dtype)
    log_b = 5 * torch.randn(50, dtype=dtype)
    zero = torch.zeros(50, dtype=dtype)
    mean, log_sd = fuse_natural(a, log_b, zero, zero)
    assert torch.equal(mean, a)
    assert torch.equal(log_sd, log_b)
    mean, log_sd = fuse(a, log_b, zero, zero + inf)
    assert torch.equal(mean, a)
    assert torch.equal(log_sd, log_b)
    root = torch.randn(5, 4, 4, dtype=dtype).tril(-1) + torch.diag_embed(torch.rand(5, 4, dtype=dtype) + 0.1)
    loc = torch.randn(5, 4, dtype=dtype)
    for precision in (torch.zeros(5, 4, dtype=dtype), torch.zeros(5, 4, 4, dtype=dtype)):
        mean, tril = fuse_natural_matrix(loc, root, precision, torch.zeros(5, 4, dtype=dtype))
        assert torch.equal(mean, loc)
        assert torch.equal(tril, root)


def test_conjugate_normal():
    """Normal data with known noise: the posterior in rational arithmetic, for every group size and hyperparameter."""
    groups = torch.tensor([0, 0, 0, 2, 2, 3, -1])
    data = torch.tensor([1.0, 2.5, -0.5, 4.0, 3.0, 10.0, 99.0])
    noise = torch.tensor([0.5, 2.0, 1.0, 0.25, 4.0, 1.0, 1.0])
    for mu in (-1.0, 3.0):
        for tau in (2.0**-20, 0.5, 4.0):
            precision = summed_over_groups(noise**-2, groups, 5)
            weighted = summed_over_groups(noise**-2 * data, groups, 5)
            loc, log_sd = fuse_natural(
                torch.tensor(mu).expand(5), torch.tensor(tau).log().expand(5), precision, weighted
            )
            for group in range(5):
                mine = [i for i, g in enumerate(groups.tolist()) if g == group]
                lam = sum((1 / Fraction(noise[i].item()) ** 2 for i in mine), Fraction(0))
                eta = sum(
                    (Fraction(data[i].item()) / Fraction(noise[i].item()) ** 2 for i in mine), Fraction(0)
                )
                prior = 1 / Fraction(tau) ** 2
                assert abs(loc[group].item() - float((prior * Fraction(mu) + eta) / (prior + lam))) < 1e-13
                assert abs(log_sd[group].item() - math.log(float(1 / (prior + lam))) / 2) < 1e-13
            assert loc[1] == mu
            assert log_sd[1] == torch.tensor(tau).log()


def test_groups_with_batches_and_gradients():
    values = torch.randn(3, 2, 6).requires_grad_()
    groups = torch.tensor([1, 0, 1, 3, -1, 3])
    sums = summed_over_groups(values, groups, 4)
    assert sums.shape == (3, 2, 4)
    assert torch.allclose(sums[..., 3], values[..., 3] + values[..., 5])
    assert (sums[..., 2] == 0).all()
    (gradient,) = torch.autograd.grad(sums.sum(), values)
    assert torch.equal(gradient, (groups >= 0).to(values).expand_as(values))


@pytest.mark.parametrize("diagonal", [True, False])
def test_matrix_prior_is_exact(diagonal):
    """Against the inverse of the sum of the precisions, with a singular factor, and as densities."""
    d, batch = 4, (3, 2)
    root = torch.randn(*batch, d, d).tril(-1) + torch.diag_embed(torch.rand(*batch, d) + 0.3)
    loc, m = torch.randn(*batch, d), torch.randn(*batch, d)
    if diagonal:
        precision = torch.rand(*batch, d) * torch.tensor([1.0, 0.0, 5.0, 1.0])
        full = torch.diag_embed(precision)
    else:
        half = torch.randn(*batch, d, 2)
        full = precision = half @ half.mT  # of rank two
    mean, tril = fuse_natural_matrix(loc, root, precision, (full @ m.unsqueeze(-1)).squeeze(-1))
    prior = torch.linalg.inv(root @ root.mT)
    covariance = torch.linalg.inv(prior + full)
    wanted = (covariance @ (prior @ loc.unsqueeze(-1) + full @ m.unsqueeze(-1))).squeeze(-1)
    assert torch.allclose(tril @ tril.mT, covariance, atol=1e-10)
    assert torch.allclose(mean, wanted, atol=1e-10)
    assert torch.equal(tril, tril.tril())
    assert (tril.diagonal(dim1=-2, dim2=-1) > 0).all()
    again = fuse_matrix(loc, root, m, torch.diag_embed(precision.sqrt()) if diagonal else half.mT)
    assert torch.allclose(again[0], mean)
    assert torch.allclose(again[1], tril)
    points = torch.randn(2, *batch, d)
    q = MultivariateNormal(mean, scale_tril=tril).log_prob(points)
    shift = points - m
    unnormalised = MultivariateNormal(loc, scale_tril=root).log_prob(points)
    unnormalised = unnormalised - 0.5 * (shift.unsqueeze(-2) @ full @ shift.unsqueeze(-1)).squeeze(
        -1
    ).squeeze(-1)
    difference = q - unnormalised
    assert torch.allclose(difference[0], difference[1])


def test_matrix_agrees_with_elementwise():
    a, log_b, m, log_s = torch.randn(4, 5)
    mean, log_sd = fuse(a, log_b, m, log_s)
    matrix = fuse_matrix(a, torch.diag(log_b.exp()), m, torch.diag(torch.exp(-log_s)))
    assert torch.allclose(matrix[0], mean)
    assert torch.allclose(matrix[1].diagonal().log(), log_sd)


def test_matrix_in_single_precision():
    """A smooth Gaussian-process prior (condition number 1e6): a rounding, where inverses of precisions lose all."""
    t = torch.linspace(0, 1, 20)
    covariance = torch.exp(-((t[:, None] - t) ** 2) / 0.1) + 1e-5 * torch.eye(20)
    root, precision, m = torch.linalg.cholesky(covariance), 4 * torch.ones(20), torch.sin(6 * t)
    given = torch.zeros(20), root, m, torch.diag(precision.sqrt())
    mean, tril = fuse_matrix(*given)
    single = fuse_matrix(*(x.float() for x in given))
    assert (single[0] - mean).abs().max() < 2e-6
    assert ((single[1] @ single[1].mT) - tril @ tril.mT).abs().max() < 2e-6
    root32 = root.float()
    prior32 = torch.cholesky_inverse(root32)
    by_inverses = torch.linalg.inv(prior32 + torch.diag(precision.float()))
    assert (by_inverses - tril @ tril.mT).abs().max() > 2e-6  # the textbook form is worse


@pytest.mark.parametrize("narrow", [1e3, 1e6, 1e10])
def test_matrix_of_a_factor_that_is_narrow_in_one_direction(narrow):
    """A sum known to many digits more than its parts: in single precision one plus its square is that square."""
    root, m = torch.tensor([[2.0, 0.0], [1.0, 1.5]]), torch.tensor([0.5, -1.0])
    factor = torch.tensor([[narrow, narrow], [0.0, 1e-6]])
    ones = torch.ones(2)
    covariance = root @ root.mT  # given that the sum is zero, the rest is the difference
    total, cross = covariance.sum(), covariance.sum(-1)
    given_sum = covariance - cross.unsqueeze(-1) * cross / total
    exact = ones + cross * (m.sum() - ones.sum()) / total
    given = [ones, root, m, factor]
    inputs = [x.float().requires_grad_() for x in given]
    mean, tril = fuse_matrix(*inputs)
    found = tril.detach()
    assert torch.allclose((found @ found.mT).double(), given_sum, rtol=1e-3, atol=0)
    assert torch.allclose(mean.double(), exact, rtol=0, atol=1e-2)
    assert abs(float(found[1, 1]) * narrow - 1) < 1e-3
    for gradient in torch.autograd.grad(mean.sum() + tril.diagonal().log().sum(), inputs):
        assert bool(gradient.isfinite().all())


def test_logits():
    prior, factor = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.allclose(fuse_logits(prior, torch.zeros(3, 4)), prior.log_softmax(-1))
    wanted = (prior.softmax(-1) * factor.softmax(-1)).log()
    assert torch.allclose(fuse_logits(prior, factor), wanted - wanted.logsumexp(-1, keepdim=True))
    for nothing in (-inf, torch.finfo(torch.float64).min):
        excluded = prior.clone()
        excluded[:, 1] = nothing
        excluded.requires_grad_()
        factor.requires_grad_()
        found = fuse_logits(excluded, factor)
        assert (found[:, 1] == -inf).all()
        for gradient in torch.autograd.grad(found[:, [0, 2, 3]].sum(), (excluded, factor)):
            assert torch.isfinite(gradient).all()
            assert (gradient[:, 1] == 0).all()


def test_density_of_the_product():
    """q / (prior * factor) is constant."""
    a, m, u = torch.randn(3, 7, 1), torch.randn(3, 7, 1), torch.randn(5)
    log_b, log_s = torch.randn(3, 7, 1), torch.randn(3, 7, 1)
    mean, log_sd = fuse(a, log_b, m, log_s)
    ratio = Normal(mean, log_sd.exp()).log_prob(u) - Normal(a, log_b.exp()).log_prob(u)
    ratio = ratio - Normal(m, log_s.exp()).log_prob(u)
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), atol=1e-9)
