"""Densities of draws are right in single precision, however small a network would have a scale."""

import math

import pyro
import pytest
import torch

from pyro_graphflows.guides.conditionals.factors import ElementNormalFactor, NormalFactor, scalar_normals

N = 20_000


def check(distribution):
    """Compare the mean log-density of draws with minus the entropy, by its standard error and the rounding."""
    pyro.set_rng_seed(0)
    log_prob = distribution.log_prob(distribution.rsample()).double()
    entropy = distribution.entropy() if hasattr(distribution, "covariance_matrix") else None
    if entropy is None:
        normal = getattr(distribution, "normal", getattr(distribution, "base_dist", distribution))
        entropy = normal.entropy().reshape(N, -1).sum(-1)
    error = float(log_prob.std()) / math.sqrt(N)
    size = distribution.event_shape.numel()
    assert abs(float(log_prob.mean() + entropy.double().mean())) < 4 * error + 0.01 * size
    assert error < 2.0 * math.sqrt(size / 2 / N)  # half a chi-squared for each element


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_scale", [-30.0, -18.0, -12.0, -3.0])
@pytest.mark.parametrize("shift", [0.0, 1.0, 3000.0])
@pytest.mark.parametrize("family", ["one", "three", "elements", "scalars"])
def test_log_density_of_draws_is_minus_the_entropy(dtype, log_scale, shift, family):
    size = 1 if family in ("one", "scalars") else 3
    shifts, scales = torch.full((size,), shift, dtype=dtype), torch.full((size,), 2.0, dtype=dtype)
    factor = ElementNormalFactor([[], [0], [0, 1]]) if family == "elements" else NormalFactor(size)
    outputs = torch.zeros(N, factor.num_outputs, dtype=dtype)
    outputs[:, :size] = torch.linspace(-1.0, 1.0, size, dtype=dtype)
    outputs[:, size : 2 * size] = log_scale
    if family == "scalars":
        check(scalar_normals(outputs, shifts, scales)[0])
    else:
        check(factor.distribution(outputs, shifts, scales))


def test_moderate_scales_are_as_they_are():
    outputs = torch.zeros(5, 2)
    outputs[:, 1] = torch.tensor([-9.0, -5.0, 0.0, 3.0, 19.0])
    normal = NormalFactor(1).distribution(outputs, torch.zeros(1), torch.ones(1)).normal
    torch.testing.assert_close(normal.scale, outputs[:, 1].exp())
