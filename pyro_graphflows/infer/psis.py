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

__all__ = [
    "effective_sample_size",
    "fit_generalized_pareto",
    "judged_without_tail",
    "psis_khat",
    "smoothed_log_weights",
    "smoothed_tail",
    "tail_size",
]

_MIN_TAIL = 5  # fewer points than this cannot show the shape of a tail
_SAME = 1e-5  # log-weights that differ by less, in nats, are the same value
_TIMES = 10  # a value seen less often than this is rare
_TRUSTED = 0.7  # a greater shape is no longer trusted
_LEVEL = math.log(2.0)  # of the largest weight over the mean: with less, such a shape is not believed ...
_ENOUGH = 100  # ... if there are this many weights


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

    *Few distinct weights*, as discrete latents have: no tail is there to extrapolate, and all moments are finite. The
    question is whether the values that matter have been seen often enough to know their frequency. If values seen
    fewer than ten times carry less than a twentieth of the sum, the answer is ``-inf``, else ``inf``.

    *Nearly equal weights*, those of a nearly perfect proposal: where many are close to a maximum and few beyond it, a
    fit judges ripples and finds any shape. If it is above 0.7 although the largest of a hundred weights or more is less
    than twice their mean, the answer is ``-inf``.

    References:
        [1] Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25,
        Section 2.4 and appendix. Weights of finite support are not treated there.

    Args:
        log_weights: Logarithms of the weights, up to a constant; :math:`K` of them in dimension ``dim``.
        dim: The dimension of the samples.

    Returns:
        A tensor without that dimension. ``inf`` where too few weights are in the tail to judge it (also where all
        weights are zero); ``-inf`` where all weights are nearly equal (a perfect proposal), or few and well known.

    Example:
        >>> psis_khat(torch.zeros(100, 2)).tolist()
        [-inf, -inf]
    """
    return smoothed_log_weights(log_weights, dim)[1]


def smoothed_log_weights(log_weights: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    r"""Replace the largest importance weights by what the generalised Pareto law expects of them.

    The :math:`M` largest become its quantiles at :math:`(i - \tfrac12) / M`, in the order of the weights, none of them
    above the largest. Where :math:`\hat k` is not finite nothing is changed.

    References:
        [1] Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25, Algorithm 1.

    Args:
        log_weights: Logarithms of the weights, up to a constant.
        dim: The dimension of the samples.

    Returns:
        The smoothed logarithms, of the shape of ``log_weights``, and :math:`\hat k` as :func:`psis_khat` returns it.

    Example:
        >>> smoothed, khat = smoothed_log_weights(torch.randn(1000, 3).mul(2))
        >>> smoothed.shape, khat.shape
        (torch.Size([1000, 3]), torch.Size([3]))
    """
    weights = log_weights.detach().movedim(dim, 0)
    batch, num = weights.shape[1:], weights.shape[0]
    values, order = weights.reshape(num, -1).sort(dim=0)  # (K, B), ascending
    khat = judged_without_tail(values)
    level = values[-1] - (torch.logsumexp(values, 0) - math.log(num))
    near = (level < _LEVEL) & (num >= _ENOUGH)
    khat = torch.where(near & (khat > _TRUSTED), -math.inf, khat)
    size = tail_size(num)
    if size >= _MIN_TAIL:
        tail, shape = smoothed_tail(values[-size:], values[-size - 1])
        shape = torch.where(near & (shape > _TRUSTED), -math.inf, shape)
        open_ = khat.isnan()
        khat = torch.where(open_, shape, khat)
        values[-size:] = torch.where(open_ & shape.isfinite(), tail, values[-size:])
    khat = khat.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    result = torch.empty_like(values).scatter_(0, order, values)
    return result.reshape(num, *batch).movedim(0, dim), khat.reshape(batch)


def tail_size(num: int) -> int:
    """Return how many of ``num`` weights are taken for the tail; fewer than five show nothing."""
    size = math.ceil(min(num / 5, 3 * math.sqrt(num)))
    return size if size < num else 0


def judged_without_tail(values: Tensor) -> Tensor:
    """Return the shape where it follows without a fit: equal weights, few distinct ones, none; else ``nan``.

    Args:
        values: Logarithms of all weights (K, B), ascending.
    """
    num, largest = values.shape[0], values[-1]
    result = torch.full_like(largest, math.nan)
    rounding = (8 * torch.finfo(values.dtype).eps * largest.abs()).clamp(min=_SAME)
    # steps of this size: neighbours within one are the same value, and a long row of them is not
    step = torch.floor((values - largest) / rounding)
    new = step[1:] - step[:-1] > 0  # (-inf) - (-inf) is nan: not a new value
    few = (new.sum(0) + 1) * _TIMES <= num
    if bool(few.any()):
        chosen = torch.zeros(num, int(few.sum()), dtype=torch.long, device=values.device)
        chosen[1:] = new[:, few].cumsum(0)  # which of the distinct values each weight has
        counts = torch.zeros_like(chosen).scatter_add_(0, chosen, torch.ones_like(chosen))
        rare = counts.gather(0, chosen) < _TIMES
        share = (torch.softmax(values[:, few], 0) * rare).sum(0)
        result[few] = torch.where(share < 0.05, -math.inf, math.inf).to(values.dtype)
    equal = (values[-1] - values[0] <= rounding) & (num > 1)  # a single weight tells nothing
    result[equal] = -math.inf
    result[largest == -math.inf] = math.inf
    return result


def smoothed_tail(tail: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth the largest weights; return their new logarithms and the Pareto shapes.

    Args:
        tail: Logarithms of the largest weights (M, B), ascending.
        threshold: The logarithms of the next smaller ones (B).

    Returns:
        The tail, changed where there is a shape, and the shapes: ``inf`` where too few weights exceed the threshold.
    """
    size, largest = tail.shape[0], tail[-1]
    base = (threshold - largest).exp()
    excess = (tail - largest).exp() - base  # (M, B)
    shape = torch.full_like(largest, math.inf)
    scale = torch.ones_like(largest)
    whole = (excess > 0).all(0)
    if bool(whole.any()):
        shape[whole], scale[whole] = _fitted(excess[:, whole])
    # weights tied with the threshold carry no information on the tail
    for column in torch.nonzero(~whole & ((excess > 0).sum(0) >= _MIN_TAIL)).flatten().tolist():
        shape[column], scale[column] = _fitted(excess[excess[:, column] > 0, column])
    place = (torch.arange(size, dtype=tail.dtype, device=tail.device) + 0.5) / size
    power = -torch.log1p(-place).reshape(
        -1, 1
    )  # F^-1(p) = scale (exp(k power) - 1) / k, whose limit is scale power
    small = shape.abs() < 1e-6
    safe = torch.where(small | ~shape.isfinite(), torch.ones_like(shape), shape)
    quantile = scale * torch.where(small, power, torch.expm1(safe * power) / safe)
    smoothed = torch.log(quantile + base).clamp(max=0.0) + largest
    return torch.where(shape.isfinite(), smoothed, tail), shape


def _fitted(excess: Tensor) -> tuple[Tensor, Tensor]:
    num = excess.shape[0]
    shape, scale = fit_generalized_pareto(excess)
    return (num * shape + 10 * 0.5) / (num + 10), scale
