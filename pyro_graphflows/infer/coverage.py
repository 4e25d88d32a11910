"""How often intervals of a given probability hold the truth, with the chance that simulations leave."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError

__all__ = ["Coverage", "coverage", "require_ranks"]


class Coverage(NamedTuple):
    """Shares of simulations whose central intervals hold the truth, and what a calibrated guide has.

    Attributes:
        nominal: The probabilities of the intervals, ``(levels,)``.
        observed: The shares, ``(levels, *shape)``.
        lower: The lower ends of the bands in which a calibrated guide's share is 95 times in 100, ``(levels,)``.
        upper: The upper ends.
        num_simulations: The number of simulations.
    """

    nominal: Tensor
    observed: Tensor
    lower: Tensor
    upper: Tensor
    num_simulations: int

    def __repr__(self) -> str:
        shares = self.observed.reshape(len(self.nominal), -1)
        outside = (shares < self.lower[:, None]) | (shares > self.upper[:, None])
        worst = (shares - self.nominal[:, None]).flatten()
        worst = worst[worst.abs().argmax()] if len(worst) else worst.new_zeros(())
        return (
            f"Coverage({self.num_simulations} simulations; {int(outside.sum())} of {outside.numel()} shares outside "
            f"their 95% bands; greatest difference to the nominal share {worst.item():+.3f})"
        )


def coverage(ranks: Tensor, num_draws: int, *, num_levels: int = 20) -> Coverage:
    """Return how often central intervals of the draws held the true value.

    The interval of ``k`` neighbouring ranks in the middle of ``0, ..., num_draws`` has the probability
    ``k / (num_draws + 1)`` exactly if the guide is calibrated. The number of simulations whose truth is inside is then
    binomial, and the bands are its quantiles; they are for each level by itself.

    References:
        [1] Cook, Gelman and Rubin (2006), Validation of software for Bayesian models using posterior quantiles.

    Args:
        ranks: Ranks from :func:`~pyro_graphflows.infer.sbc_ranks`, simulations along the first dimension.
        num_draws: The number of draws each was ranked among.
        num_levels: How many levels, evenly spaced as far as ranks allow.

    Raises:
        GraphflowsError: If the ranks are not from 0 to ``num_draws``, or a number is not positive.

    Example:
        >>> ranks = torch.arange(100).repeat(10)  # as uniform as can be
        >>> result = coverage(ranks, num_draws=99, num_levels=4)
        >>> result.nominal.tolist() == result.observed.tolist()
        True
    """
    from scipy.stats import binom

    flat = require_ranks(ranks, num_draws)
    if num_levels < 1:
        raise GraphflowsError(f"Expected a positive num_levels; got {num_levels}.")
    # sets of neighbouring ranks about the middle have as odd a size as the number of ranks
    odd = (num_draws + 1) % 2
    wanted = torch.arange(1, num_levels + 1, dtype=torch.double) / (num_levels + 1) * (num_draws + 1)
    sizes = torch.unique((((wanted - odd) / 2).round() * 2 + odd).long().clamp(1, num_draws + 1))
    low = (num_draws + 1 - sizes) // 2
    inside = (flat >= low[:, None, None]) & (
        flat < (low + sizes)[:, None, None]
    )  # (levels, simulations, elements)
    nominal = sizes.double() / (num_draws + 1)
    num = len(flat)
    lower, upper = (torch.as_tensor(binom.ppf(level, num, nominal.numpy())) / num for level in (0.025, 0.975))
    observed = inside.double().mean(1).reshape(len(sizes), *ranks.shape[1:])
    return Coverage(nominal, observed, lower, upper, num)


def require_ranks(ranks: Tensor, num_draws: int) -> Tensor:
    """Return ranks as ``(simulations, elements)``.

    Raises:
        GraphflowsError: If they are not from 0 to ``num_draws``, or there are none.
    """
    if ranks.dim() < 1 or ranks.numel() == 0 or num_draws < 1:
        raise GraphflowsError(
            f"Expected ranks of at least one simulation among at least one draw; got the shape {tuple(ranks.shape)} "
            f"and num_draws={num_draws}."
        )
    if int(ranks.min()) < 0 or int(ranks.max()) > num_draws:
        raise GraphflowsError(
            f"Expected ranks from 0 to num_draws = {num_draws}; got some from {int(ranks.min())} to {int(ranks.max())}."
        )
    return ranks.reshape(len(ranks), -1).long().cpu()
