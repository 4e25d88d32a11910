"""Covariances that are diagonal but for a few directions."""

import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows.guides.conditionals.low_rank import LowRankNormalFactor

SIZE, RANK = 12, 2


def covariance(seed=0, *, narrower=False):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(SIZE, RANK, generator=generator, dtype=torch.float64)
    scale = (0.3 * torch.randn(SIZE, generator=generator, dtype=torch.float64)).exp()
    correlated = torch.eye(SIZE, dtype=torch.float64) + directions @ directions.mT
    correlated = torch.linalg.inv(correlated) if narrower else correlated
    return scale.unsqueeze(-1) * (correlated + correlated.mT) / 2 * scale


def divergence(exact, found):
    return torch.distributions.kl_divergence(
        exact, dist.MultivariateNormal(found.mean, found.covariance_matrix)
    )


@pytest.mark.parametrize("narrower", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_closest_member_is_found(seed, narrower):
    """Of a covariance of that form, itself."""
    exact = covariance(seed, narrower=narrower)
    factor = LowRankNormalFactor(SIZE, RANK)
    weights = torch.randn(SIZE, 3, dtype=torch.float64)
    loc = torch.randn(SIZE, dtype=torch.float64)
    rows, biases = factor.linear_start(weights, loc, torch.linalg.cholesky(exact))
    inputs = torch.randn(5, 3, dtype=torch.float64)
    shift, scale = torch.randn(SIZE, dtype=torch.float64), torch.rand(SIZE, dtype=torch.float64) + 0.5
    found = factor.distribution(inputs @ rows.mT + biases, shift, scale)
    wanted = dist.MultivariateNormal(
        shift + scale * (loc + inputs @ weights.mT), scale.unsqueeze(-1) * exact * scale
    )
    assert found.batch_shape == (5,)
    assert float(divergence(wanted, found).max()) < 0.01


def test_a_diagonal_is_kept():
    scale = torch.rand(SIZE, dtype=torch.float64) + 0.5
    factor = LowRankNormalFactor(SIZE, RANK)
    none = torch.zeros(SIZE, dtype=torch.float64)
    biases = factor.linear_start(torch.zeros(SIZE, 0), none, scale.diag())[1]
    found = factor.distribution(biases, none, torch.ones_like(none))
    torch.testing.assert_close(found.covariance_matrix, scale.square().diag())


def test_the_regression_on_samples():
    """Directions in which residuals vary more than by chance are found, and none where there are none."""
    torch.manual_seed(0)
    factor = LowRankNormalFactor(SIZE, 3)
    inputs = torch.randn(5000, 2, dtype=torch.float64)
    weights = torch.randn(SIZE, 2, dtype=torch.float64)
    exact = dist.MultivariateNormal(torch.zeros(SIZE, dtype=torch.float64), covariance())
    rows, biases = factor.start_from_samples(inputs, inputs @ weights.mT + exact.sample((5000,)))
    one, zero = torch.ones(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    found = factor.distribution(biases, zero, one)
    torch.testing.assert_close(rows[:SIZE], weights, atol=0.2, rtol=0.0)
    assert not rows[SIZE:].any()
    assert float(divergence(exact, found)) < 0.05
    alone = factor.start_from_samples(inputs[:, :0], torch.randn(5000, SIZE, dtype=torch.float64))[1]
    assert float(alone[2 * SIZE : -3 * SIZE].abs().max()) < 0.01
    assert float((alone[SIZE : 2 * SIZE]).abs().max()) < 0.1
