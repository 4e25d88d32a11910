r"""The log-evidence of each datum by importance sampling from a guide.

For a datum :math:`x_n` with local latents :math:`z_n` inside the data plate,

.. math:: \log p(x_n) \approx \log \tfrac1K \sum_{k=1}^K w_{nk}, \qquad
          w_{nk} = \frac{p(x_n, z_{nk})}{q(z_{nk} \mid x_n)}, \quad z_{nk} \sim q(\cdot \mid x_n).

The mean of the weights is unbiased, its logarithm a lower bound in expectation, exact for every :math:`K`
when the guide is the posterior. The data do not share particles, so the estimate of each datum stands on its
own, with its own effective sample size, Pareto shape and standard error.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.infer.checkpoints import random_state, set_random_state
from pyro_graphflows.infer.importance import ImportanceSampler
from pyro_graphflows.infer.particles import (
    FEW,
    FEW_ENOUGH,
    Program,
    evaluation_mode,
    find_data_plate,
    prototype,
    require_inside,
)
from pyro_graphflows.infer.psis import effective_sample_size, psis_khat

__all__ = ["Evidence", "evidence_from_log_weights", "importance_log_weights", "log_evidence"]

_PARTICLES_TIMES_DATA = 2**14  # the default of chunk_size holds this many weights at once


class Evidence(NamedTuple):
    r"""Estimates of the log-evidence, one per datum (or a single one without a data plate).

    Attributes:
        log_evidence: Estimates of :math:`\log p(x_n)` in nats.
        ess: Effective number of importance samples.
        khat: Pareto shape of the largest weights: distrust the estimate above 0.7.
        standard_error: Standard error of ``log_evidence`` by the delta method; ``nan`` for a single particle.
    """

    log_evidence: Tensor
    ess: Tensor
    khat: Tensor
    standard_error: Tensor

    def __repr__(self) -> str:
        """Return a line: the sum over the data with its standard error, and the worst diagnostics."""
        if self.log_evidence.numel() == 0:
            return "Evidence(no data)"
        data = "all data together" if self.log_evidence.dim() == 0 else f"{self.log_evidence.numel()} data"
        error = self.standard_error.square().sum().sqrt()
        khat = self.khat.max()  # minus infinity where the weights have few values, so that there is no tail
        tail = "weights without a tail" if khat == -torch.inf else f"khat <= {khat:.2f}"
        return (
            f"Evidence({self.log_evidence.sum():.6g} ± {error:.2g} nats for {data}; ESS >= {self.ess.min():.3g}, "
            f"{tail})"
        )


def log_evidence(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 500,
    data_plate: str | Literal[False] | None = None,
    chunk_size: int | None = None,
    max_plate_nesting: int | None = None,
    vectorize: bool = True,
    **kwargs: Any,
) -> Evidence:
    r"""Estimate the log-evidence of each datum by importance sampling from a guide.

    The model and the guide are called with the same arguments, as in :class:`pyro.infer.SVI`, without
    gradients and in evaluation mode: modules that they are, or whose bound methods they are, are switched and
    switched back; modules captured in the body of a plain function cannot be reached. Memory is bounded by
    running ``chunk_size`` particles at a time; only the weights of all particles are kept.

    The standard error is that of the logarithm of a mean by the delta method,
    :math:`\operatorname{sd}(w) / (\bar w \sqrt K)`. Where ``khat`` is above 0.7 it is too small.

    References:
        [1] Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR, Theorem 1.

    Shape:
        - Each field of the result: ``(num_data,)``, or ``()`` without a data plate.

    Discrete sites that the model marks ``infer={"enumerate": "parallel"}`` and that the guide leaves out (as for
    :class:`pyro.infer.TraceEnum_ELBO`) are summed out exactly.

    Args:
        model: A Pyro model whose observed values are given by the arguments.
        guide: A guide for it; every other latent site of the model is sampled here.
        *args: Positional arguments of both.
        num_particles: The number of importance samples :math:`K` per datum.
        data_plate: The plate whose elements are the data. By default the outermost vectorised plate that
            holds every observed site. ``False`` weighs the data set as a whole and gives one number.
        chunk_size: How many particles to run at once; by default about 16,000 divided by the number of data.
        max_plate_nesting: How many dimensions the plates take, where it is known better than by running both
            once.
        vectorize: If false, run the particles one by one: for models whose control flow depends on sampled
            values.
        **kwargs: Keyword arguments of both.

    Warns:
        GraphflowsWarning: If the guide says that some of its sites were fitted to other data (a guide's method
            ``sites_of_other_data``).

    Returns:
        The estimates, in the dtype of the log-densities.

    Raises:
        GraphflowsError: If the data plate is ambiguous or unknown, or a number is not positive.
        UnsupportedModelError: If a site is outside the data plate, a plate is subsampled, a site is scaled, a
            latent site is missing in the guide, all particles share one draw, or a particle has another density in
            the batch than alone (the model is not written for batches: use ``vectorize=False``).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior: every weight is p(x)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> evidence = log_evidence(model, guide, x, num_particles=10)
        >>> torch.allclose(evidence.log_evidence, dist.Normal(0.0, 2**0.5).log_prob(x))
        True
    """
    ask = getattr(guide, "sites_of_other_data", None)  # of guides that were fitted to one data set
    others = () if ask is None else ask(*args, **kwargs)
    if others:
        warnings.warn(
            f"The guide was fitted to other data: the parameters of {', '.join(others)} read none in a call. The "
            "weights correct for that, at the price of their variance; mind ess and khat, or train the guide with "
            "these data.",
            GraphflowsWarning,
            stacklevel=2,
        )
    sampling = _Sampling(num_particles, data_plate, chunk_size, max_plate_nesting, vectorize)
    log_weights, dtype = _log_weights(model, guide, args, kwargs, sampling)
    return Evidence(*(value.to(dtype) for value in evidence_from_log_weights(log_weights)))


def evidence_from_log_weights(log_weights: Tensor) -> Evidence:
    """Return the estimates and their diagnostics from the logarithms of importance weights.

    Args:
        log_weights: As :func:`importance_log_weights` returns them, particles along the first dimension.

    Returns:
        The estimates, as :func:`log_evidence` describes them.
    """
    num_particles = len(log_weights)
    log_mean = torch.logsumexp(log_weights, 0) - math.log(num_particles)
    ratios = torch.exp(log_weights - log_mean)  # w_k / mean(w)
    if num_particles > 1:
        standard_error = ratios.std(0) / math.sqrt(num_particles)
    else:
        standard_error = torch.full_like(log_mean, math.nan)
    return Evidence(log_mean, effective_sample_size(log_weights), psis_khat(log_weights), standard_error)


def importance_log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 500,
    data_plate: str | Literal[False] | None = None,
    chunk_size: int | None = None,
    max_plate_nesting: int | None = None,
    vectorize: bool = True,
    **kwargs: Any,
) -> Tensor:
    r"""Return :math:`\log p(x_n, z_{nk}) - \log q(z_{nk} \mid x_n)` for particles drawn from the guide.

    What :func:`log_evidence` averages; arguments, limits and errors are the same.

    Shape:
        - Output: ``(num_particles, num_data)``, or ``(num_particles,)`` without a data plate.

    Args:
        model: A Pyro model whose observed values are given by the arguments.
        guide: A guide for it.
        *args: Positional arguments of both.
        num_particles: The number of importance samples per datum.
        data_plate: As in :func:`log_evidence`.
        chunk_size: As in :func:`log_evidence`.
        max_plate_nesting: As in :func:`log_evidence`.
        vectorize: As in :func:`log_evidence`.
        **kwargs: Keyword arguments of both.

    Returns:
        The logarithms of the weights.

    Raises:
        GraphflowsError: As in :func:`log_evidence`.
        UnsupportedModelError: As in :func:`log_evidence`.
    """
    sampling = _Sampling(num_particles, data_plate, chunk_size, max_plate_nesting, vectorize)
    log_weights, dtype = _log_weights(model, guide, args, kwargs, sampling)
    return log_weights.to(dtype)


@dataclass(frozen=True)
class _Sampling:
    """How particles are drawn; see :func:`log_evidence`."""

    num_particles: int
    data_plate: str | Literal[False] | None
    chunk_size: int | None
    max_plate_nesting: int | None
    vectorize: bool

    def __post_init__(self) -> None:
        if self.num_particles < 1 or (self.chunk_size is not None and self.chunk_size < 1):
            raise GraphflowsError(
                f"Expected positive num_particles and chunk_size; got {self.num_particles} and {self.chunk_size}."
            )


def _log_weights(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], sampling: _Sampling
) -> tuple[Tensor, torch.dtype]:
    """Return the logarithms of the weights in float64, and the dtype of the log-densities."""
    num_particles, vectorize = sampling.num_particles, sampling.vectorize
    with evaluation_mode(model, guide), torch.no_grad(), poutine.block():
        first = prototype(model, guide, args, kwargs, sampling.max_plate_nesting, allow_enumeration=True)
        plate = find_data_plate(first.model_trace, sampling.data_plate)
        if plate is not None:
            require_inside(plate.name, (first.model_trace, first.guide_trace))
        sampler = ImportanceSampler(model, guide, args, kwargs, first, plate, vectorize)
        if not vectorize:
            weights = [sampler.log_weights(sampler.run(1)) for _ in range(num_particles)]
            return torch.cat(weights), sampler.dtype
        default_size = max(1, _PARTICLES_TIMES_DATA // (plate.size if plate is not None else 1))
        chunk_size = sampling.chunk_size or default_size
        if min(num_particles, chunk_size) > FEW_ENOUGH:
            state = random_state()
            sampler.require_same_alone(sampler.run(FEW))
            set_random_state(state)
        chunks = []
        for start in range(0, num_particles, chunk_size):
            pair = sampler.run(min(chunk_size, num_particles - start))
            if start == 0:
                sampler.require_same_alone(pair)
            chunks.append(sampler.log_weights(pair))
        return torch.cat(chunks), sampler.dtype
