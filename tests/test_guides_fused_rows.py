"""The fit of factors beside priors: the scale that an exact search finds."""

import math

import pytest
import torch
from torch import Tensor

from pyro_graphflows.guides.fused_rows import ProductsByScale, WeightedRows, fit_factor
from pyro_graphflows.guides.sites import SitePrior

RIDGES = (1e-10, 1e-3, 1e-1)


def rows_of(width: int, spread: float, noise: float, number: int = 600) -> WeightedRows:
    """Draw values whose conditional is a prior of a random scale times a factor that is linear in inputs."""
    inputs = torch.cat([torch.randn(number, width - 1), torch.ones(number, 1)], -1)
    weights = torch.randn(width) / width**0.5
    loc, log_scale = 0.5 * torch.randn(number), spread * torch.randn(number)
    gain = torch.sigmoid(2 * (log_scale - math.log(noise)))
    scale = gain.sqrt() * noise
    value = loc + gain * (inputs @ weights - loc) + scale * torch.randn(number)
    return WeightedRows(inputs, value, loc, log_scale)


def exact_losses(rows: WeightedRows, log_widths: Tensor, ridge: float) -> Tensor:
    """Return the losses after regressions whose weights are not interpolated."""
    return torch.tensor([rows.loss(float(each), rows.regress(float(each), ridge)) for each in log_widths])


@pytest.mark.parametrize("width", [2, 20])
@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_the_scale_is_that_of_a_fine_grid_of_exact_regressions(
    width: int, spread: float, noise: float
) -> None:
    rows = rows_of(width, spread, noise)
    middle = float(rows.log_scale.median())
    grid = torch.linspace(min(middle, 0.0) - 6.0, max(middle, 0.0) + 2.5, 109)
    for ridge, (log_width, weights) in zip(RIDGES[:2], ProductsByScale(rows).search(RIDGES[:2]), strict=True):
        best = float(grid[exact_losses(rows, grid, ridge).argmin()])
        assert abs(log_width - best) < 0.09  # steps of 0.08 in either
        exact = rows.loss(log_width, rows.regress(log_width, ridge))
        assert abs(rows.loss(log_width, weights) - exact) < 1e-3


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_losses_are_those_of_exact_regressions(spread: float) -> None:
    rows = rows_of(10, spread, 0.3)
    log_widths = torch.linspace(-4.0, 2.0, 9)
    losses, weights = ProductsByScale(rows).losses(log_widths, RIDGES)
    assert weights.shape == (3, 9, 10)
    for ridge, found in zip(RIDGES, losses, strict=True):
        off = found - exact_losses(rows, log_widths, ridge)
        assert float(off.abs().max()) < 5e-3


def test_regressions_are_exact_where_all_scales_are_knots() -> None:
    rows = rows_of(6, 1.0, 0.3)
    scales = (4 * rows.log_scale.clamp(-2, 2)).round() / 4
    rows = WeightedRows(rows.inputs, rows.value, rows.loc, scales)
    log_widths, products = torch.linspace(-4.0, 2.0, 9), ProductsByScale(rows)
    assert len(products.knots) == 17
    for log_width, weights in zip(log_widths, products.regress(log_widths, 1e-3), strict=True):
        assert torch.allclose(weights, rows.regress(float(log_width), 1e-3), 1e-8, 1e-8)


def test_the_factor_is_found_from_rows_of_different_priors() -> None:
    number, width, noise = 20_000, 5, 0.4
    rows = rows_of(width, 0.5, noise, number)
    prior = SitePrior(rows.loc.unsqueeze(-1), rows.log_scale.unsqueeze(-1))
    fit = fit_factor(rows.inputs[:, :-1], rows.value.unsqueeze(-1), prior)
    assert fit.says_something
    assert abs(float(fit.linear.scale_tril.log()) - math.log(noise)) < 0.06


def test_the_factor_of_vectors_whose_priors_are_narrow_in_other_directions_in_each_row() -> None:
    """Processes of unknown length scale beside data with noise .3: the factor is that of the data."""
    x, y, number = torch.linspace(0.0, 1.0, 12), torch.sin(6 * torch.linspace(0.0, 1.0, 12)), 1500
    eye = torch.eye(12)
    lengths = torch.exp(-1.0 + 0.2 * torch.randn(number))[:, None, None]
    covariance = (-0.5 * ((x[:, None] - x) / lengths) ** 2).exp() + 1e-6 * eye
    precision = torch.linalg.inv(covariance) + eye / 0.09
    exact = torch.distributions.MultivariateNormal(
        (torch.linalg.inv(precision) @ (y / 0.09)[:, None])[..., 0], precision_matrix=precision
    )
    values = exact.sample()
    tril = torch.linalg.cholesky(covariance)
    prior = SitePrior(torch.zeros(number, 12), torch.zeros(number, 12), tril)
    factor = fit_factor(torch.zeros(number, 0), values, prior).linear
    own = torch.linalg.inv(factor.scale_tril @ factor.scale_tril.mT)
    found = torch.linalg.inv(covariance) + own
    fitted = torch.distributions.MultivariateNormal(
        (torch.linalg.inv(found) @ (own @ factor.loc)[:, None])[..., 0], precision_matrix=found
    )
    fresh = exact.sample()  # 90 weights cost half a nat of a row each
    missed = (exact.log_prob(fresh) - fitted.log_prob(fresh)).mean()
    assert -0.02 < missed < 0.2
