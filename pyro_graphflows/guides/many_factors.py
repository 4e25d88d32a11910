"""Factors beside the priors of a number, one for each of many indices at once.

:func:`~pyro_graphflows.guides.fused_rows.fit_factor` fits one, with a choice of ridges and a search over scales in some
dozens of small operations: two milliseconds, which is long for thousands of indices. Here all indices take each step of
the search together. Rows that are not finite, or far off, have no weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_graphflows.guides.fused_rows import FLAT, LEAST_GAIN, NARROWEST, WIDEST, solved
from pyro_graphflows.regression import HELD_OUT, RIDGE, WINSOR, Regression, in_float64

__all__ = ["fit_factors"]

MOST_ROWS = 240  # of an index, by which scales are found; all rows give slopes and intercepts
COARSE, FINE = 15, 7  # scales that are tried, at first and between neighbours of the best
STEPS = 2  # from these neighbours to closer ones


@dataclass(frozen=True)
class _Rows:
    """Rows of all indices: inputs with a column of ones, values, their priors, and whether rows count."""

    inputs: Tensor
    value: Tensor
    loc: Tensor
    log_scale: Tensor
    counts: Tensor

    def at(self, chosen: Tensor) -> "_Rows":
        """Return some of the rows."""
        fields = (self.inputs, self.value, self.loc, self.log_scale, self.counts)
        return _Rows(*(each[:, chosen] for each in fields))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the rows of each index that count."""
        return (values * self.counts).sum(-1) / self.counts.sum(-1).clamp(min=1.0)

    def regress(self, log_width: Tensor) -> Tensor:
        """Return slopes and intercept of each index for a factor of its scale, ``(indices, inputs)``."""
        gain = torch.sigmoid(2.0 * (self.log_scale - log_width.unsqueeze(-1)))
        target = self.value - (1.0 - gain) * self.loc
        number = self.counts.sum(-1).clamp(min=1.0)
        weighted = (gain * self.counts).unsqueeze(-1) * self.inputs
        matrix = weighted.mT @ self.inputs / number[:, None, None]
        right = (self.inputs.mT @ (target * self.counts).unsqueeze(-1)).squeeze(-1) / number.unsqueeze(-1)
        penalty = (RIDGE * self.mean(gain).clamp(min=1e-12)).unsqueeze(-1).repeat(1, right.shape[-1])
        penalty[:, -1] *= 1e-3
        return solved(matrix, right, penalty)

    def loss(self, log_width: Tensor, weights: Tensor) -> Tensor:
        """Return the mean of -log q of each index."""
        ratio = 2.0 * (self.log_scale - log_width.unsqueeze(-1))
        log_scale = self.log_scale - 0.5 * torch.nn.functional.softplus(ratio)
        fitted = (self.inputs @ weights.unsqueeze(-1)).squeeze(-1)
        off = self.value - self.loc - torch.sigmoid(ratio) * (fitted - self.loc)
        return self.mean(log_scale + 0.5 * (off * torch.exp(-log_scale)).square()).nan_to_num(torch.inf)

    def loss_of_prior(self) -> Tensor:
        """Return the same of the prior alone."""
        off = (self.value - self.loc) * torch.exp(-self.log_scale)
        return self.mean(self.log_scale + 0.5 * off.square())


def fit_factors(inputs: Tensor, values: Tensor, loc: Tensor, log_scale: Tensor) -> list[Regression]:
    """Fit a factor to the joint samples of each index.

    Args:
        inputs: What the factors may look at, ``(indices, n, num_inputs)``.
        values: The number in the coordinate of its prior, standardised, ``(indices, n)``.
        loc: The location of its prior in the same units.
        log_scale: The logarithm of the prior's scale.

    Returns:
        For each index the factor ``N(loc + weights @ inputs, scale_tril @ scale_tril.T)``; a wide one where samples say
        no more of the number than its prior does.
    """
    rows = _rows(inputs, values, loc, log_scale)
    number = torch.arange(values.shape[1], device=values.device)
    held_out = number % HELD_OUT == 0
    fitted, test = rows.at(number[~held_out][:MOST_ROWS]), rows.at(held_out)
    log_width = _search(fitted)
    weights = fitted.regress(log_width)
    says = test.loss(log_width, weights) < test.loss_of_prior() - LEAST_GAIN
    weights = rows.regress(log_width)
    wide = (rows.log_scale.masked_fill(rows.counts == 0, -torch.inf).max(-1).values + FLAT).clamp(
        FLAT, WIDEST
    )
    weights = torch.where(says.unsqueeze(-1), weights, 0.0)
    scale = torch.where(says, log_width, wide).exp()
    return [
        Regression(each[None, :-1], each[-1:], own.reshape(1, 1))
        for each, own in zip(weights, scale, strict=True)
    ]


def _rows(inputs: Tensor, values: Tensor, loc: Tensor, log_scale: Tensor) -> _Rows:
    inputs, values, loc, log_scale = (in_float64(each) for each in (inputs, values, loc, log_scale))
    parts = torch.cat([inputs, values.unsqueeze(-1), loc.unsqueeze(-1), log_scale.unsqueeze(-1)], -1)
    counts = torch.isfinite(parts).all(-1)
    # rows are chosen by their priors alone: without those of large values the prior would not be that of the others
    known = torch.where(counts, loc, torch.nan), torch.where(counts, log_scale, torch.nan)
    middle, width = (each.nanmedian(-1, keepdim=True).values.nan_to_num(0.0) for each in known)
    width = width.clamp(min=0.0)
    counts &= (loc - middle).abs() * torch.exp(-width) < WINSOR
    counts &= torch.exp(log_scale - width) < WINSOR
    parts = torch.where(counts.unsqueeze(-1), parts, 0.0)
    inputs, (values, loc, log_scale) = parts[..., :-3], parts[..., -3:].unbind(-1)
    number = counts.sum(-1)[:, None, None].clamp(min=1)
    mean = inputs.sum(1, keepdim=True) / number
    spread = (
        torch.where(counts.unsqueeze(-1), inputs - mean, 0.0).square().sum(1, keepdim=True) / number
    ).sqrt()
    inputs = torch.where(
        spread > 1e-6 * (1.0 + mean.abs()), inputs, 0.0
    )  # near a posterior the data do not vary
    one = torch.ones_like(values).unsqueeze(-1)  # also where there are no inputs
    return _Rows(torch.cat([inputs, one], -1), values, loc, log_scale, counts.double())


def _search(rows: _Rows) -> Tensor:
    """Return the log-scale of each index's factor that fits best: coarsely, more closely, and by a parabola."""
    middle = rows.log_scale.median(-1).values
    low, high = middle.clamp(max=0.0) - NARROWEST, middle.clamp(min=0.0) + FLAT
    centre, reach = (low + high) / 2, (high - low) / 2
    for step in range(1 + STEPS):
        tried = torch.linspace(-1.0, 1.0, COARSE if step == 0 else FINE, dtype=torch.float64).to(centre)
        widths = centre + tried.unsqueeze(-1) * reach
        losses = torch.stack([rows.loss(width, rows.regress(width)) for width in widths])
        best = losses.argmin(0).clamp(1, len(tried) - 2)
        near = losses.gather(0, torch.stack([best - 1, best, best + 1]))
        centre = widths.gather(0, best.unsqueeze(0)).squeeze(0)
        reach = 2 * reach / (len(tried) - 1)
    bend = near[0] - 2 * near[1] + near[2]
    move = torch.where(bend > 0, (near[0] - near[2]) / (2 * bend), 0.0).nan_to_num(0.0)
    return centre + reach * move.clamp(-1.0, 1.0)
