"""Factors: the linear start against sampled moments, standardisation, discrete tables and their start from samples."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_graphflows.guides.conditionals.coupled import CoupledFactor
from pyro_graphflows.guides.conditionals.distributions import DiscreteVector, ScalarNormal
from pyro_graphflows.guides.conditionals.factors import (
    DiscreteFactor,
    ElementNormalFactor,
    NormalFactor,
    SharedCovarianceFactor,
    positive_scale,
    scalar_normals,
)
from pyro_graphflows.guides.sites import DiscreteEncoding, LatentSite, SitePrior

# ---------------------------------------------------------------- normal factors


def chain(n):
    return ElementNormalFactor([list(range(i)) for i in range(n)])


# name: factor, which entries of the Cholesky factor it can have beside the diagonal
FACTORS = {
    "one": (NormalFactor(1), []),
    "three": (NormalFactor(3), [(1, 0), (2, 0), (2, 1)]),
    "one covariance": (SharedCovarianceFactor(3), [(1, 0), (2, 0), (2, 1)]),
    "elements": (chain(3), [(1, 0), (2, 0), (2, 1)]),
    "independent elements": (ElementNormalFactor([[], []]), []),
    "one element": (ElementNormalFactor([[]]), []),
}


def linear_case(factor, entries, num_inputs=2):
    size = factor.size
    tril = torch.linspace(0.4, 1.6, size).diag()
    for i, j in entries:
        tril[i, j] = torch.randn(())
    return torch.randn(size, num_inputs), torch.randn(size), tril


def units(size):
    return torch.linspace(-2.0, 3.0, size), torch.linspace(0.2, 4.0, size)


def test_least_scales_follow_units_that_change_in_place():
    outputs = torch.full((1,), -100.0, dtype=torch.float32)
    shift, scale = torch.zeros_like(outputs), torch.ones_like(outputs)
    least = [positive_scale(outputs, shift, scale).item() for _ in range(2)]
    assert least == pytest.approx([400 * 2**-23] * 2)
    shift.fill_(10.0)
    assert positive_scale(outputs, shift, scale).item() == pytest.approx(11 * least[0])
    scale.fill_(10.0)
    assert positive_scale(outputs, shift, scale).item() == pytest.approx(2 * least[0])
    assert positive_scale(outputs.double(), shift, scale).item() == pytest.approx(math.exp(-20))


@pytest.mark.parametrize("name", FACTORS)
def test_linear_start_has_the_moments(name):
    """In closed form for each input, and in draws within five standard errors."""
    factor, entries = FACTORS[name]
    weights, loc, tril = linear_case(factor, entries)
    rows, biases = factor.linear_start(weights, loc, tril)
    assert rows.shape == (factor.num_outputs, 2)
    assert biases.shape == (factor.num_outputs,)
    shift, scale = units(factor.size)
    x = torch.randn(6, 2)
    q = factor.distribution(x @ rows.T + biases, shift, scale)
    assert (q.batch_shape, q.event_shape) == ((6,), (factor.size,))
    mean, root = shift + scale * (loc + x @ weights.T), scale.unsqueeze(-1) * tril
    torch.testing.assert_close(q.mean, mean)
    exact = dist.MultivariateNormal(mean, scale_tril=root)
    u = exact.sample((5,))
    torch.testing.assert_close(q.log_prob(u), exact.log_prob(u))
    n = 20_000
    z = torch.linalg.solve_triangular(root, (q.rsample((n,)) - mean).unsqueeze(-1), upper=False).squeeze(-1)[
        :, 0
    ]
    assert (z.mean(0).abs() < 5 / n**0.5).all()  # standard normal, if the moments are right
    off = (z.T @ z / n - torch.eye(factor.size)).abs()
    assert (off < 5 * math.sqrt(2 / n)).all()


def test_elements_with_a_part_of_the_earlier_ones():
    """y1 = a y0 + ..., y2 looks at y1 alone: the precision has a zero for the pair (0, 2)."""
    factor = ElementNormalFactor([[], [0], [1]])
    assert factor.num_outputs == 3 + 3 + 2
    assert factor.output_elements == (0, 1, 2, 0, 1, 2, 1, 2)
    assert factor.log_scale_outputs == (3, 4, 5)
    unit = torch.tensor([[1.0, 0.0, 0.0], [-0.7, 1.0, 0.0], [0.0, 1.2, 1.0]])
    scales = torch.tensor([0.5, 1.0, 2.0])
    tril = torch.linalg.inv(unit) @ scales.diag()
    weights, loc = torch.randn(3, 2), torch.randn(3)
    rows, biases = factor.linear_start(weights, loc, tril)
    x = torch.randn(2)
    q = factor.distribution(rows @ x + biases, torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(q.covariance_matrix, tril @ tril.T)
    torch.testing.assert_close(q.mean, loc + weights @ x)
    assert q.precision_matrix[0, 2].abs() < 1e-12
    torch.testing.assert_close(biases[6:], torch.tensor([0.7, -1.2]))  # the coefficients themselves


def test_numbers_and_roles_of_outputs():
    assert NormalFactor(3).num_outputs == 9
    assert NormalFactor(3).log_scale_outputs == (3, 4, 5)
    assert NormalFactor(3).output_elements is None
    assert NormalFactor(3).start_from_samples(torch.zeros(5, 1), torch.zeros(5, 3)) is None
    assert DiscreteFactor(2, 3).num_outputs == 6 + 9
    assert DiscreteFactor(2, 3).log_scale_outputs == ()
    assert CoupledFactor(2, 0).log_scale_outputs == (2, 3)


def test_several_numbers_by_one_computation():
    outputs, (shift, scale) = torch.randn(7, 6), units(3)
    together = scalar_normals(outputs, shift, scale)
    assert all(isinstance(each, ScalarNormal) for each in together)
    for i, found in enumerate(together):
        alone = NormalFactor(1).distribution(
            outputs[:, 2 * i : 2 * i + 2], shift[i : i + 1], scale[i : i + 1]
        )
        assert torch.equal(found.normal.loc, alone.normal.loc)
        assert torch.equal(found.normal.scale, alone.normal.scale)


@pytest.mark.parametrize(
    "factor", [NormalFactor(1), NormalFactor(3), chain(3)], ids=lambda f: type(f).__name__
)
def test_gradcheck(factor):
    outputs, u = (
        torch.randn(2, factor.num_outputs).requires_grad_(),
        torch.randn(2, factor.size).requires_grad_(),
    )
    shift, scale = units(factor.size)
    assert torch.autograd.gradcheck(
        lambda o, u: factor.distribution(o, shift, scale).log_prob(u), (outputs, u)
    )


def test_the_factor_of_a_site_has_its_size():
    site = LatentSite("z", torch.Size([2, 2]), torch.Size([2, 2]), constraints.real)
    assert NormalFactor.for_site(site).size == 4
    fn = dist.Categorical(torch.ones(2, 3)).to_event(1)
    encoding = DiscreteEncoding.of(fn, torch.long)
    discrete = LatentSite("k", torch.Size([2]), torch.Size([6]), fn.support, encoding)
    factor = DiscreteFactor.for_site(discrete)
    assert (factor.size, factor.num_variables, factor.num_classes) == (6, 2, 3)


# ---------------------------------------------------------------- discrete factors


def values_of(n, c):
    index = torch.tensor(list(itertools.product(range(max(c, 2)), repeat=n)))
    return index.double() if c == 1 else torch.nn.functional.one_hot(index, c).double().flatten(-2)


@pytest.mark.parametrize(("n", "c"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_linear_logits_without_couplings(n, c):
    """Independent variables: probabilities are products of those of each."""
    factor = DiscreteFactor(n, c)
    weights, loc = torch.randn(n * c, 2), torch.randn(n * c)
    rows, biases = factor.linear_start(weights, loc, torch.eye(n * c))
    assert rows.shape == (factor.num_outputs, 2)
    x = torch.randn(2)
    q = factor.distribution(rows @ x + biases, torch.tensor(7.0), torch.tensor(3.0))  # units do not matter
    logits = (weights @ x + loc).unflatten(-1, (n, c))
    values = values_of(n, c)
    y = values.unflatten(-1, (n, c))
    if c == 1:
        expected = dist.Bernoulli(logits=logits).log_prob(y).sum((-2, -1))
    else:
        expected = dist.OneHotCategorical(logits=logits).log_prob(y).sum(-1)
    torch.testing.assert_close(q.log_prob(values), expected)


def test_couplings_are_outputs_behind_the_logits():
    factor = DiscreteFactor(2, 3)
    outputs = torch.randn(4, factor.num_outputs)
    q = factor.distribution(outputs, torch.zeros(6), torch.ones(6))
    expected = DiscreteVector(outputs[:, :6].reshape(4, 2, 3), outputs[:, 6:].reshape(4, 1, 3, 3))
    values = values_of(2, 3).unsqueeze(1)
    torch.testing.assert_close(q.log_prob(values), expected.log_prob(values))
    torch.testing.assert_close(q.log_prob(values).exp().sum(0), torch.ones(4))


@pytest.mark.parametrize(("n", "c"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_start_from_samples_finds_the_factor_that_drew_them(n, c):
    """Samples of a factor that is linear in its inputs: the fit has nearly the same probabilities.

    The mean divergence of a maximum-likelihood fit of p parameters to N samples is p / 2N, with a spread below its own
    size; ten times that would mean another distribution. The prior on slopes adds less.
    """
    factor, num = DiscreteFactor(n, c), 10_000
    rows, biases = 0.7 * torch.randn(factor.num_outputs, 2), 0.7 * torch.randn(factor.num_outputs)
    rows[n * c :] = 0.0  # couplings that are the same for all inputs, as the start has them
    x = torch.randn(num, 2)
    truth = factor.distribution(x @ rows.T + biases, torch.zeros(()), torch.ones(()))
    y = truth.sample()
    found = factor.start_from_samples(x, y)
    assert found[0].shape == rows.shape
    assert found[1].shape == biases.shape
    assert not found[0][n * c :].any()
    fit = factor.distribution(x @ found[0].T + found[1], torch.zeros(()), torch.ones(()))
    values = values_of(n, c).unsqueeze(1)
    log_p, log_q = truth.log_prob(values), fit.log_prob(values)
    divergence = (log_p.exp() * (log_p - log_q)).sum(0).mean().item()
    parameters = 2 * n * c + factor.num_outputs
    assert 0 <= divergence < 10 * parameters / (2 * num)
    flat = factor.distribution(biases.new_zeros(num, factor.num_outputs), torch.zeros(()), torch.ones(()))
    assert (log_p.exp() * (log_p - flat.log_prob(values))).sum(0).mean().item() > 10 * parameters / (2 * num)


def test_start_from_samples_without_inputs_is_the_share_of_each_class():
    factor = DiscreteFactor(1, 3)
    y = torch.eye(3)[torch.tensor([0] * 20 + [1] * 30 + [2] * 50)]
    weights, biases = factor.start_from_samples(torch.zeros(100, 0), y)
    assert weights.shape == (3, 0)
    torch.testing.assert_close(biases.softmax(-1), (y.sum(0) + 0.5) / 101.5)


def test_one_covariance_is_not_expanded_to_a_batch():
    factor, (shift, scale) = SharedCovarianceFactor(3), units(3)
    matrix = scale.diag() + torch.ones(3, 3).tril(-1)
    outputs = torch.randn(4, factor.num_outputs)
    outputs[:, 3:] = outputs[0, 3:]
    whole = factor.distribution(outputs, shift, matrix)
    shared = factor.distribution_with(outputs[:, :3], outputs[0, 3:], shift, matrix)
    value = torch.randn(4, 3)
    torch.testing.assert_close(shared.log_prob(value), whole.log_prob(value))
    assert shared._unbroadcasted_scale_tril.shape == (3, 3)


def test_a_matrix_in_the_place_of_the_scale():
    """The distribution of ``shift + matrix @ y``, for the factor alone and beside a prior."""
    factor, (shift, scale) = NormalFactor(3), units(3)
    matrix = scale.diag() + torch.ones(3, 3).tril(-1)
    outputs = torch.randn(4, factor.num_outputs)
    plain = factor.distribution(outputs, torch.zeros(3), torch.ones(3))
    fn = factor.distribution(outputs, shift, matrix)
    torch.testing.assert_close(fn.mean, shift + plain.mean @ matrix.T)
    covariance = matrix @ plain.covariance_matrix @ matrix.T
    torch.testing.assert_close(fn.covariance_matrix, covariance)
    prior = SitePrior(torch.randn(3), torch.randn(3))
    fused = factor.fused(outputs, shift, matrix, prior)
    root = torch.zeros(4, 3, 3)
    rows, columns = torch.tril_indices(3, 3, -1)
    root[:, rows, columns] = outputs[:, 6:]
    root = torch.linalg.solve_triangular(
        matrix, (root + torch.eye(3)) / outputs[:, 3:6].exp().unsqueeze(-1), upper=False, left=False
    )
    own, of_prior = root.mT @ root, torch.diag((-2 * prior.log_scale).exp())
    torch.testing.assert_close(fused.precision_matrix, own + of_prior)
    located = own @ (shift + outputs[:, :3] @ matrix.T).unsqueeze(-1) + (of_prior @ prior.loc).unsqueeze(-1)
    torch.testing.assert_close(fused.mean, torch.linalg.solve(own + of_prior, located).squeeze(-1))
