"""Chains: factors with a banded precision, exact where the conditional is one, and their regression."""

import pytest
import torch

from pyro_graphflows.guides.conditionals.banded import BandedNormalFactor, regress_chain
from pyro_graphflows.guides.conditionals.factors import share_of_long

SIZE = 7
DOUBLE = torch.float64


def chain(width, differences, seed=0):
    """A precision with a band (of the running sums with ``differences``), and a Cholesky factor of the covariance."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.eye(SIZE, dtype=DOUBLE)
    for j in range(1, width + 1):
        unit -= torch.diag(0.6 * torch.rand(SIZE - j, generator=generator, dtype=DOUBLE), -j)
    scale = 0.5 + torch.rand(SIZE, generator=generator, dtype=DOUBLE)
    root = torch.linalg.inv(unit) * scale
    if differences:
        root = torch.diff(root, dim=0, prepend=torch.zeros_like(root[:1]))
    return root.tril()


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("width", [0, 1, 2])
def test_a_linear_start_is_the_conditional_that_was_given(width, differences, reads):
    root = chain(width, differences)
    precision = torch.linalg.inv(root @ root.T)
    meets = torch.randn(SIZE, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    # h of each element, or of each running sum, depends on one datum; the weights of the mean are dense
    sums = torch.ones(SIZE, SIZE, dtype=DOUBLE).tril() if differences else torch.eye(SIZE, dtype=DOUBLE)
    weights = torch.linalg.solve(precision, sums.T @ torch.diag(meets)) if reads else torch.zeros(SIZE, 0)
    weights = weights.to(DOUBLE)
    loc = torch.linspace(-1, 1, SIZE, dtype=DOUBLE)
    factor = BandedNormalFactor(SIZE, width, differences, reads=reads)
    joint, bias = factor.linear_start(weights, loc, root)
    assert joint.shape == (factor.num_outputs, weights.shape[1])
    if reads:
        own = joint[:SIZE]
        torch.testing.assert_close(own, torch.diag(own.diagonal()), atol=1e-9, rtol=0)
    assert not joint[SIZE:].any()
    shift = torch.linspace(2, 3, SIZE, dtype=DOUBLE)
    scale = torch.full((SIZE,), 1.7, dtype=DOUBLE) if differences else torch.linspace(0.5, 2, SIZE).to(DOUBLE)
    x = torch.randn(3, weights.shape[1], generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    conditional = factor.distribution(x @ joint.T + bias, shift, scale)
    wanted = torch.distributions.MultivariateNormal(
        shift + scale * (x @ weights.T + loc), scale_tril=scale.unsqueeze(-1) * root
    )
    torch.testing.assert_close(conditional.mean, wanted.mean)
    value = wanted.sample()
    torch.testing.assert_close(conditional.log_prob(value), wanted.log_prob(value))
    assert factor.natural_units(root).shape == (factor.num_outputs,)
    assert (factor.natural_units(root) >= 0).all()


@pytest.mark.parametrize("differences", [False, True])
def test_regression_finds_a_chain(differences):
    root = chain(1, differences)
    generator = torch.Generator().manual_seed(3)
    number = 200_000
    u = torch.randn(number, SIZE, generator=generator, dtype=DOUBLE) @ root.T
    seen = u.cumsum(-1) if differences else u
    x = 0.7 * seen + 0.5 * torch.randn(number, SIZE, generator=generator, dtype=DOUBLE)
    factor = BandedNormalFactor(SIZE, 1, differences, reads=True)
    reads = [[i] for i in range(SIZE)]
    fit = regress_chain(torch.cat([x, u], -1), range(SIZE), range(SIZE, 2 * SIZE), reads, factor)
    sums = torch.ones(SIZE, SIZE, dtype=DOUBLE).tril() if differences else torch.eye(SIZE, dtype=DOUBLE)
    precision = torch.linalg.inv(root @ root.T) + 0.7**2 / 0.5**2 * sums.T @ sums
    covariance = torch.linalg.inv(precision)
    torch.testing.assert_close(fit.scale_tril @ fit.scale_tril.T, covariance, atol=0.02, rtol=0.03)
    torch.testing.assert_close(fit.weights, covariance @ sums.T * 0.7 / 0.25, atol=0.02, rtol=0.03)


def test_a_regression_that_is_no_precision_is_drawn_to_its_diagonal():
    """Few rows of nearly equal columns give slopes beyond what any precision has."""
    rows = torch.randn(8, 1, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)
    rows = rows + 1e-3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    fit = regress_chain(rows, [], range(5), [[]] * 5, BandedNormalFactor(5, 2, False, reads=False))
    assert torch.isfinite(fit.scale_tril).all()
    assert (fit.scale_tril.diagonal() > 0).all()


def covariance_root(factor, outputs, like):
    """The mean and a root of the covariance of a chain with given outputs."""
    ones = torch.ones(len(like), dtype=DOUBLE)
    conditional = factor.distribution(outputs, 0 * ones, ones)
    return conditional.mean, conditional.push(torch.eye(len(like), dtype=DOUBLE))[
        0
    ].T - conditional.mean.unsqueeze(-1)


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_a_step_of_one_number_costs_what_a_step_of_all_does(order, differences, reads):
    """The divergence is half the squared length of a small step in natural units, also in a very smooth chain."""
    size = 60
    steps_back = torch.linalg.matrix_power(
        torch.eye(size, dtype=DOUBLE) - torch.diag(torch.ones(size - 1, dtype=DOUBLE), -1), order
    )
    seen = torch.zeros(size, dtype=DOUBLE)
    seen[[20, 50]] = 1.0
    covariance = torch.linalg.inv(1e4 * steps_back.T @ steps_back + torch.diag(seen))
    root = torch.linalg.cholesky(covariance)
    if differences:
        root = torch.diff(root, dim=0, prepend=torch.zeros_like(root[:1]))
    factor = BandedNormalFactor(size, order, differences, reads=reads)
    loc = torch.linspace(-1, 1, size, dtype=DOUBLE)
    start = factor.linear_start(torch.zeros(size, 0, dtype=DOUBLE), loc, root)[1]
    units = factor.natural_units(root)
    free = (2 + order + reads) * size
    assert not units[free:].any()
    units = units / share_of_long(free)
    own = torch.arange(free) >= size * reads  # h apart
    generator = torch.Generator().manual_seed(0)
    mean, at_start = covariance_root(factor, start, root)
    torch.testing.assert_close(mean, loc)

    def divergence(step):
        moved, other = covariance_root(factor, start + units * step, root)
        ratio = torch.linalg.solve(at_start, torch.cat([other, (moved - loc).unsqueeze(-1)], -1))
        return 0.5 * (ratio.square().sum() - size) - torch.linalg.slogdet(ratio[:, :-1])[1]

    for chosen in (own, own & (torch.arange(free) % 17 == 3)):
        for signs in (torch.ones(free), torch.randn(free, generator=generator).sign()):
            step = torch.zeros_like(units)
            step[:free] = 1e-4 * signs * chosen
            assert float(divergence(step)) == pytest.approx(0.5 * float(step.square().sum()), rel=0.1)
    if reads:  # all of them at once do not do more than they would alone
        step = torch.zeros_like(units)
        step[:size] = 1e-3
        assert 0 < float(divergence(step)) < 0.5 * size * 1e-6
