r"""How far importance weights can be trusted: effective sample size and the Pareto shape of their tail.

For weights :math:`w_k = p(x, z_k) / q(z_k \mid x)` with :math:`z_k \sim q` the average :math:`\bar w` is
unbiased for the evidence whatever :math:`q` is, but it may have infinite variance, and then no finite number
of draws shows it. The largest weights tell: by extreme value theory their excess over a threshold is close to
a generalised Pareto law, whose shape :math:`k` says that the moments of order :math:`1/k` and above do not
exist. Below 0.5 the variance is finite, up to 0.7 averages of the usual sizes are dependable, above 0.7 they
are not.

All functions take log-weights and work on many data at once, in the dtype and on the device of their input.
"""

import math

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError

__all__ = ["effective_sample_size", "fit_generalized_pareto", "psis_khat"]

_MIN_TAIL = 5  # fewer points than this cannot show the shape of a tail


def effective_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Return the effective number of importance samples, :math:`(\sum_k w_k)^2 / \sum_k w_k^2`.

    It lies between 1 (one weight outweighs the rest) and their number (all are equal). Zero where every
    weight is zero.

    References:
        [1] Kong (1992), A note on importance sampling using standardized weights.

    Args:
        log_weights: Logarithms of the weights, up to a constant.
        dim: The dimension of the samples.

    Returns:
        A tensor without that dimension.

    Example:
        >>> effective_sample_size(torch.zeros(8, 3)).tolist()
        [8.0, 8.0, 8.0]
    """
    ess = torch.exp(2 * torch.logsumexp(log_weights, dim) - torch.logsumexp(2 * log_weights, dim))
    return torch.where((log_weights == -math.inf).all(dim), torch.zeros_like(ess), ess)


def fit_generalized_pareto(excess: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    r"""Fit the generalised Pareto density to excesses over a threshold.

    The density is :math:`\sigma^{-1} (1 + k x / \sigma)^{-1/k - 1}`, :math:`x > 0`. The estimator is the
    posterior mean of :math:`\theta = -k / \sigma` on a data-dependent grid under the profile likelihood [1];
    it has no tuning and no failure to converge. All columns are fitted at once.

    References:
        [1] Zhang and Stephens (2009), A new and efficient estimation method for the generalized Pareto
        distribution, Technometrics 51, Section 4.

    Args:
        excess: Positive excesses.
        dim: The dimension of the observations.

    Returns:
        The shape :math:`k` and the scale :math:`\sigma`, without that dimension.

    Raises:
        GraphflowsError: If an excess is not positive, or there are fewer than two.
    """
    x = excess.movedim(dim, 0).sort(dim=0).values  # (n, *batch)
    n = x.shape[0]
    if n < 2 or not bool((x > 0).all()):
        raise GraphflowsError("Expected at least two excesses over the threshold, all of them positive.")
    size = 30 + int(math.sqrt(n))
    quartile = x[max(int(n / 4 + 0.5) - 1, 0)]
    grid = torch.arange(1, size + 1, dtype=x.dtype, device=x.device)
    grid = 1 - torch.sqrt(size / (grid - 0.5))
    theta = 1 / x[-1] + grid.reshape(-1, *[1] * quartile.dim()) / (3 * quartile)  # (size, *batch)
    shape = torch.stack([torch.log1p(-row * x).mean(0) for row in theta])  # keeps memory at that of x
    profile = n * (torch.log(-theta / shape) - shape - 1)
    weights = torch.softmax(profile, dim=0)
    best = (weights * theta).sum(0)
    k = torch.log1p(-best * x).mean(0)
    return k, -k / best


def psis_khat(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Return the Pareto shape :math:`\hat k` of the largest importance weights.

    The generalised Pareto density is fitted to the excesses of the :math:`\min(K / 5, 3 \sqrt K)` largest of
    :math:`K` weights over the next smaller one; the estimate is drawn towards 0.5 with the weight of 10
    observations, as in [1].

    References:
        [1] Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25,
        Section 2.4 and appendix.

    Args:
        log_weights: Logarithms of the weights, up to a constant; :math:`K` of them in dimension ``dim``.
        dim: The dimension of the samples.

    Returns:
        A tensor without that dimension. ``inf`` where too few distinct weights are in the tail to judge it
        (also where all weights are zero); ``-inf`` where all weights are equal up to rounding: a perfect
        proposal.

    Example:
        >>> psis_khat(torch.zeros(100, 2)).tolist()
        [-inf, -inf]
    """
    weights = log_weights.detach().movedim(dim, 0)
    batch = weights.shape[1:]
    weights = weights.reshape(weights.shape[0], -1).sort(dim=0).values  # (K, B), ascending
    num = weights.shape[0]
    tail_size = math.ceil(min(num / 5, 3 * math.sqrt(num)))
    result = torch.full((weights.shape[1],), math.inf, dtype=weights.dtype, device=weights.device)

    span = weights[-1] - weights[0]
    rounding = 64 * torch.finfo(weights.dtype).eps * weights[-1].abs().clamp(min=1.0)
    equal = (span <= rounding) & (weights[-1] > -math.inf) & (num > 1)  # a single weight tells nothing
    result[equal] = -math.inf
    if tail_size < _MIN_TAIL or tail_size >= num:
        return result.reshape(batch)

    relative = weights - weights[-1]
    threshold = relative[-tail_size - 1].exp()
    excess = relative[-tail_size:].exp() - threshold  # (M, B)
    positive = excess > 0
    whole = positive.all(0) & ~equal
    if whole.any():
        result[whole] = _shrunk_shape(excess[:, whole])
    # weights tied with the threshold (discrete latents) carry no information on the tail
    for column in torch.nonzero(~whole & ~equal & (positive.sum(0) >= _MIN_TAIL)).flatten().tolist():
        result[column] = _shrunk_shape(excess[positive[:, column], column])
    return result.reshape(batch)


def _shrunk_shape(excess: Tensor) -> Tensor:
    num = excess.shape[0]
    shape, _ = fit_generalized_pareto(excess)
    return (num * shape + 10 * 0.5) / (num + 10)
