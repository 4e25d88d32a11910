"""A factor over all elements beside their priors, from joint samples of known factors."""

import math

import pytest
import torch

from pyro_graphflows.guides.joint_factors import JointRows
from pyro_graphflows.guides.sites import SitePrior

DRAWS, NUMBER, WIDTH = 4000, 5, 0.4
GRID = 0.02  # half a step of the search


def rows_of(k, *, like=(DRAWS, NUMBER), fewer=None):
    """Values from priors of different places and widths, and data with the noise of the factor."""
    prior = SitePrior(torch.randn(*like, 1), 0.5 * torch.randn(like[0], *(1,) * len(like)).expand(*like, 1))
    values = prior.loc + prior.log_scale.exp() * torch.randn(*like, 1)
    covariance = torch.eye(like[-1]) + k
    noise = torch.randn(like) @ torch.linalg.cholesky(covariance).mT
    data = 0.5 * (values[..., 0] + WIDTH * noise) + 0.25  # of about unit scale, as features are
    inputs = torch.stack([torch.randn(like), data], -1)
    return JointRows.of((inputs, values, prior, fewer), [-2])


@pytest.mark.parametrize("k", [0.7, 0.0, -0.15])
def test_a_known_factor_is_found(k):
    torch.manual_seed(0)
    rows = rows_of(k)
    fit, widths = rows.fit()
    error = 5.0 / (2.0 * DRAWS) ** 0.5  # of the logarithm of a width
    assert float(widths[1]) == pytest.approx(math.log(WIDTH), abs=GRID + error / (NUMBER - 1) ** 0.5)
    of_mean = 0.5 * math.log(1.0 + NUMBER * k)
    assert float(widths[0] - widths[1]) == pytest.approx(of_mean, abs=2 * GRID + 1.5 * error)
    assert float(fit.scale_tril) == pytest.approx(float(widths[1].exp()))
    torch.testing.assert_close(
        fit.weights, torch.tensor([[0.0, 2.0]], dtype=torch.float64), atol=0.05, rtol=0.0
    )
    assert float(fit.loc) == pytest.approx(-0.5, abs=0.05)
    ratio = float((2.0 * (widths[0] - widths[1])).exp())
    # k again, of I + k 1 1^T, or the column of I - U (I + U^T U)^-1 U^T that makes the same of the mean
    share = rows.share(widths)
    assert (1.0 + NUMBER * share if ratio > 1 else 1.0 / (1.0 - NUMBER * share)) == pytest.approx(ratio)


def test_data_that_say_nothing_make_no_factor():
    torch.manual_seed(0)
    rows = rows_of(0.5)
    parts = torch.randn_like(rows.inputs), rows.values.unsqueeze(-1), rows.prior, None
    assert JointRows.of(parts, [-2]).fit() is None


def test_other_plates_are_further_draws_and_few_draws_are_none():
    torch.manual_seed(0)
    rows = rows_of(0.5, like=(60, 3, NUMBER))
    assert rows.inputs.shape == (180, NUMBER, 2)
    assert rows.values.shape == (180, NUMBER)
    assert rows_of(0.5, like=(40, NUMBER)) is None
