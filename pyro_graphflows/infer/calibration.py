r"""Simulation-based calibration: is a guide's spread that of the posterior, on average over the model's own data?

Draw :math:`(z^*, x^*)` from the joint density, then :math:`L` draws from :math:`q(z \mid x^*)`. If :math:`q` is the
posterior, :math:`z^*` is one more draw like them, so its rank among them is uniform on :math:`0, \dots, L`. Ranks
heaped in the middle tell of a guide that is too wide, at the ends of one too narrow, at one end of a shift.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.particles import (
    OUTER_PARTICLES,
    Program,
    density_sites,
    evaluation_mode,
    particle_plate,
    require_independent_particles,
)
from pyro_graphflows.infer.simulations import joint_layout, run_guide, sample_joint

__all__ = ["sbc_ranks", "sbc_uniformity"]


def sbc_ranks(
    model: Program,
    guide: Program,
    *args: Any,
    num_simulations: int = 1000,
    num_draws: int = 99,
    chunk_size: int = 1000,
    observed: Iterable[str] | None = None,
    max_plate_nesting: int | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Rank simulated latent values among the guide's draws given the simulated data.

    The guide is called as in inference compilation: with the arguments of the model and ``observations={site:
    value}``. Ties, as discrete latents have, are broken at random. Model and guide run in evaluation mode, without
    gradients, inside plates of simulations and of draws.

    References:
        [1] Talts, Betancourt, Simpson, Vehtari and Gelman (2018), Validating Bayesian inference algorithms with
        simulation-based calibration, Algorithm 1.

    Args:
        model: A Pyro model.
        guide: A guide that takes ``observations=``.
        *args: Positional arguments of both.
        num_simulations: The number of simulated data sets.
        num_draws: The number of draws from the guide for each of them.
        chunk_size: How many simulations to run at once.
        observed: The observed sites, if the call does not tell (see :class:`InferenceCompilation`).
        max_plate_nesting: How many dimensions the plates take, where it is known better than by running both once.
        **kwargs: Keyword arguments of both.

    Returns:
        For each site of the guide the ranks of each of its elements, from 0 to ``num_draws``, in a tensor of integers
        of shape ``(num_simulations, *plates, *event)``.

    Raises:
        GraphflowsError: If a number is not positive, or ``observed`` names a site that the model lacks.
        UnsupportedModelError: If samples of the model are not samples of its joint density, the guide has other sites
            than the model's latent ones, or all its draws are the same.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x=None, observations=None):  # the exact posterior
        ...     pyro.sample("z", dist.Normal(observations["x"] / 2, 0.5**0.5))
        >>> ranks = sbc_ranks(model, guide, num_simulations=1000)["z"]
        >>> bool(sbc_uniformity(ranks, num_draws=99) > 1e-4)
        True
    """
    if num_simulations < 1 or num_draws < 1 or chunk_size < 1:
        raise GraphflowsError("Expected positive num_simulations, num_draws and chunk_size.")
    chunks: dict[str, list[Tensor]] = {}
    with evaluation_mode(model, guide), torch.no_grad(), poutine.block():
        layout = joint_layout(model, guide, args, kwargs, observed, max_plate_nesting)
        inner, outer = -1 - layout.max_plate_nesting, -2 - layout.max_plate_nesting
        for start in range(0, num_simulations, chunk_size):
            size = min(chunk_size, num_simulations - start)
            joint = sample_joint(particle_plate(model, size, inner), args, kwargs)
            many = particle_plate(particle_plate(guide, size, inner), num_draws, outer, OUTER_PARTICLES)
            drawn = run_guide(many, joint, layout.observed, args, kwargs, replay=False)
            require_independent_particles(drawn, outer, num_draws)
            for name, site in density_sites(drawn):
                if not site["is_observed"]:
                    truth: Any = joint.nodes[name]["value"]
                    ranks = _ranks(truth, site["value"])
                    chunks.setdefault(name, []).append(ranks.reshape(size, *layout.shapes[name]))
    return {name: torch.cat(parts) for name, parts in chunks.items()}


def sbc_uniformity(ranks: Tensor, num_draws: int, *, num_bins: int | None = None) -> Tensor:
    """Return p-values of the hypothesis that ranks are uniform, by a chi-squared test.

    Args:
        ranks: Ranks from 0 to ``num_draws``, simulations along the first dimension.
        num_draws: The number of draws each was ranked among.
        num_bins: The number of bins of ranks; by default at most 20, with at least 5 expected ranks in each.

    Returns:
        A p-value for each element, of the shape of ``ranks`` without the first dimension. Of many, take the
        smallest times their number (Bonferroni).

    Raises:
        GraphflowsError: If there are fewer than two bins, or more than ranks.
    """
    num_simulations = ranks.shape[0]
    if num_bins is None:
        num_bins = min(20, num_draws + 1, num_simulations // 5)
    if not 2 <= num_bins <= num_draws + 1:
        raise GraphflowsError(
            f"Expected between 2 and num_draws + 1 = {num_draws + 1} bins; got {num_bins}. More simulations are needed "
            "if num_bins was not given."
        )
    flat = ranks.reshape(num_simulations, -1).long()
    # equal bins as far as num_draws + 1 can be divided: bin of rank r, and how many ranks each bin holds
    bins = torch.arange(num_draws + 1) * num_bins // (num_draws + 1)
    expected = torch.bincount(bins, minlength=num_bins).double() * num_simulations / (num_draws + 1)
    counts = torch.zeros(num_bins, flat.shape[1], dtype=torch.double)
    counts.scatter_add_(0, bins[flat.cpu()], torch.ones(flat.shape, dtype=torch.double))
    statistic = ((counts - expected[:, None]) ** 2 / expected[:, None]).sum(0)
    # the survival function of chi-squared is a regularised incomplete gamma function
    degrees = torch.tensor((num_bins - 1) / 2, dtype=torch.double)
    return torch.special.gammaincc(degrees, statistic / 2).reshape(ranks.shape[1:])


def _ranks(truth: Tensor, draws: Tensor) -> Tensor:
    """Count the draws below the truth along the first dimension, ties decided by lot."""
    below = (draws < truth).sum(0)
    equal = (draws == truth).sum(0)
    return below + (torch.rand(equal.shape, device=equal.device) * (equal + 1)).long().clamp(max=equal)
