r"""Whether Markov chains agree, and how many independent draws theirs are worth.

References:
    [1] Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-normalization, folding, and localization: an
    improved R-hat for assessing convergence of MCMC, Bayesian Analysis 16, Sections 3 and 4.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro.ops.stats import autocovariance, split_gelman_rubin
from torch import Tensor

__all__ = ["Chains", "bulk_ess", "split_rhat"]


@dataclass(frozen=True, eq=False)
class Chains:
    """What is known of the Markov chains behind draws.

    Draws are those of the first chain, then those of the second, and so on.

    Attributes:
        num_chains: The number of chains.
        refined: Which data were refined; a truth value where the posterior is joint.
        rhat: R-hat by site, of its shape: 1 where chains agree; ``nan`` at data that were not refined.
        ess: The effective number of draws in the bulk by site; ``nan`` at data that were not refined.
        acceptance: The mean acceptance of each datum that was refined.
        step_size: The step size of each.
        divergent: The number of trajectories of each that left the posterior.
        gradients: The number of gradients of the posterior, those of warm-up included; each chain of each datum counts.
        interrupted: Whether the chains were ended early.
    """

    num_chains: int
    refined: Tensor
    rhat: Mapping[str, Tensor]
    ess: Mapping[str, Tensor]
    acceptance: Tensor
    step_size: Tensor
    divergent: Tensor
    gradients: int
    interrupted: bool

    @property
    def worst_rhat(self) -> float:
        """The largest R-hat of all; ``nan`` where none is known."""
        return max((_largest(value) for value in self.rhat.values()), default=float("nan"))

    def num_rhat_above(self, bound: float) -> int:
        """Return of how many numbers R-hat is above some bound."""
        return sum(int((value > bound).sum()) for value in self.rhat.values())

    @property
    def least_ess(self) -> float:
        """The smallest effective number of draws."""
        return -max((_largest(-value) for value in self.ess.values()), default=float("nan"))


def _largest(value: Tensor) -> float:
    known = value[~value.isnan()]
    return known.max().item() if len(known) else float("nan")


def split_rhat(draws: Tensor) -> Tensor:
    """Return R-hat of rank-normalised split chains, the larger of that of the values and that of their spread.

    Args:
        draws: Shape ``(chains, samples, *shape)``, at least four samples.

    Returns:
        A tensor of ``shape``; ``nan`` where all values are the same.

    Example:
        >>> draws = torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0))
        >>> apart = draws + torch.arange(4.0).reshape(4, 1, 1)
        >>> bool((split_rhat(draws) < 1.02).all()), bool((split_rhat(apart) > 1.5).all())
        (True, True)
    """
    values = draws.double()
    centre = values.flatten(0, 1).median(0).values
    both = [split_gelman_rubin(_normal_ranks(each)) for each in (values, (values - centre).abs())]
    return torch.maximum(*both).to(draws.dtype)


def bulk_ess(draws: Tensor) -> Tensor:
    """Return the effective number of draws of rank-normalised split chains.

    Args:
        draws: Shape ``(chains, samples, *shape)``, at least four samples.

    Returns:
        A tensor of ``shape``; ``nan`` where all values are the same.

    Example:
        >>> draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> bool(bulk_ess(draws) > 1500)
        True
    """
    half = draws.shape[1] // 2
    ranks = _normal_ranks(draws.double())
    split = torch.cat([ranks[:, :half], ranks[:, half : 2 * half]])
    constant = (draws == draws[:1, :1]).flatten(0, 1).all(0)
    return torch.where(constant, torch.nan, _ess(split)).to(draws.dtype)


def _ess(values: Tensor) -> Tensor:
    """Return the number of draws over the sum of their autocorrelations, by Geyer's initial monotone sequence."""
    chains, num = values.shape[:2]
    lags = torch.arange(num, dtype=values.dtype, device=values.device).reshape(-1, *[1] * (values.dim() - 2))
    covariance = autocovariance(values, dim=1).mean(0) * (1 - lags / num)  # (lags, *shape), divided by num
    within = covariance[0] * num / (num - 1)
    total = covariance[0] + values.mean(1).var(0)
    correlation = 1 - (within - covariance) / total
    correlation[0] = 1.0
    even, odd = correlation[0 : num - 1 : 2], correlation[1:num:2]
    pairs = even + odd
    positive = (pairs > 0).long().cumprod(0).bool()
    summed = torch.where(positive, pairs.cummin(0).values, 0.0).sum(0)
    end = positive.sum(0, keepdim=True).clamp(max=len(even) - 1)  # the first pair that is left out
    last = even.gather(0, end).squeeze(0).clamp(min=0.0)
    return chains * num / (2 * summed - 1 + last).clamp(min=1 / math.log10(chains * num))


def _normal_ranks(values: Tensor) -> Tensor:
    """Return normal scores of the ranks among all chains; ties share their mean rank."""
    shape, num = values.shape, values.shape[0] * values.shape[1]
    flat = values.reshape(num, -1)
    ordered, order = flat.sort(0)
    place = torch.arange(1, num + 1, dtype=flat.dtype, device=flat.device).unsqueeze(-1)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    group = new.cumsum(0) - 1
    total = torch.zeros_like(flat).scatter_add_(0, group, place.expand_as(flat))
    count = torch.zeros_like(flat).scatter_add_(0, group, torch.ones_like(flat))
    ranks = torch.empty_like(flat).scatter_(0, order, (total / count.clamp(min=1)).gather(0, group))
    return torch.special.ndtri((ranks - 0.375) / (num + 0.25)).reshape(shape)
