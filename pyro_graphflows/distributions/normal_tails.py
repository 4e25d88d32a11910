r"""The standard normal's distribution function and its inverse, accurate in both tails.

A value far in a tail is given by the logarithm of that tail's probability: of :math:`\Phi(u)` on the left, of
:math:`\Phi(-u)` on the right. Probabilities near one are never formed. All functions are elementwise and
differentiable twice.
"""

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "half_normal_quantile",
    "log1mexp",
    "ndtri_exp",
    "normal_log_density",
    "normal_score",
    "tail_probability",
    "tail_score",
    "two_sided",
]

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def normal_log_density(u: Tensor) -> Tensor:
    """Return the log-density of the standard normal distribution."""
    return -0.5 * u.square() - HALF_LOG_TWO_PI


def log1mexp(x: Tensor) -> Tensor:
    r"""Return :math:`\log(1 - e^x)` for ``x < 0``.

    Args:
        x: Negative numbers; zero counts as the closest of them.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2.0)
    close, far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, (-torch.expm1(close)).log(), torch.log1p(-far.exp()))


class _NdtriExp(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, is_lower: bool) -> Tensor:
        tail = y
        if not is_lower:
            log_lower = y.clamp(max=-math.log(2.0))
            log_upper = torch.log(-torch.expm1(y.clamp(min=-math.log(2.0))))
            upper = y > -math.log(2.0)
            tail = torch.where(upper, log_upper, log_lower)  # of the smaller side
        deep = tail < 0.95 * math.log(torch.finfo(y.dtype).tiny)
        u = torch.special.ndtri(tail.exp())
        if bool(deep.any()):
            far = tail.clamp(max=-50.0)
            v = -torch.sqrt(-2.0 * far - torch.log(-2.0 * far) - 2.0 * HALF_LOG_TWO_PI)
            for _ in range(2):  # the second for double precision
                v = v - (torch.special.log_ndtr(v) - far) * _inverse_hazard(v)
            u = torch.where(deep & (v > -math.inf), v, u)  # not where it is NaN
        return u if is_lower else torch.where(upper, -u, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], y: Tensor, is_lower: bool) -> tuple[Tensor, int]:
        return _NdtriExp.apply(y, is_lower), in_dims[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (u,) = ctx.saved_tensors
        return gradients[0] * _inverse_hazard(u), None


def _inverse_hazard(u: Tensor) -> Tensor:
    """Return the derivative of ``ndtri_exp``, Phi / phi."""
    return math.sqrt(0.5 * math.pi) * torch.special.erfcx(-u * math.sqrt(0.5))


def ndtri_exp(y: Tensor, *, is_lower: bool = False) -> Tensor:
    r"""Return :math:`\Phi^{-1}(e^y)`, the inverse of :func:`torch.special.log_ndtr`.

    Args:
        y: Logarithms of probabilities, however small.
        is_lower: Whether none of them is known to be more than one half, which takes fewer operations.

    Example:
        >>> ndtri_exp(torch.special.log_ndtr(torch.tensor([-100.0, -1.0, 1.0]))).round().tolist()
        [-100.0, -1.0, 1.0]
    """
    return _NdtriExp.apply(y, is_lower)


def normal_score(log_cdf: Tensor, log_sf: Tensor) -> Tensor:
    r"""Return :math:`\Phi^{-1}(F)` from :math:`\log F` and :math:`\log(1 - F)`; each counts where it is the smaller.

    Scores end where probabilities do: at 37 in double and 13 in single precision.

    Args:
        log_cdf: Logarithm of the probability to the left.
        log_sf: Logarithm of the probability to the right.
    """
    lower = log_cdf < log_sf
    tail = torch.where(lower, log_cdf, log_sf)
    u = ndtri_exp(tail.clamp(min=math.log(torch.finfo(tail.dtype).tiny)), is_lower=True)
    return torch.where(lower, u, -u)


def tail_score(probability: Tensor) -> Tensor:
    r"""Return :math:`\Phi^{-1}(p)` of a probability up to one half, finite for zero."""
    return torch.special.ndtri(probability.clamp(min=torch.finfo(probability.dtype).tiny))


def two_sided(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return where ``u`` is negative, and its magnitude (with the right derivative at zero)."""
    lower = u < 0
    return lower, torch.where(lower, -u, u)


def tail_probability(magnitude: Tensor) -> Tensor:
    r"""Return :math:`\Phi(-m)` for ``m >= 0``."""
    return 0.5 * torch.erfc(magnitude * math.sqrt(0.5))


def half_normal_quantile(u: Tensor) -> Tensor:
    r"""Return the quantile of the half-normal distribution at a normal score.

    With :math:`p` the probability beyond ``u`` on its own side, it is :math:`\sqrt2 \operatorname{erf}^{-1}(p)` on the
    left and :math:`-\Phi^{-1}(p / 2)` on the right. Where :math:`p` is too small for a number, the tails of both
    distributions give :math:`z^2 = u^2 + a - \log(1 + a / u^2) + 3 a / u^4` with :math:`a = 2 \log 2`, up to
    :math:`u^{-6}`.

    Args:
        u: The score.

    Example:
        >>> [round(z, 4) for z in half_normal_quantile(torch.tensor([-30.0, 0.0, 30.0])).tolist()]
        [0.0, 0.6745, 30.0231]
    """
    lower, magnitude = two_sided(u)
    p = tail_probability(magnitude)
    near = math.sqrt(2.0) * torch.erfinv(p)
    a = 2.0 * math.log(2.0)
    inverse = magnitude.clamp(min=4.0).square().reciprocal()
    far = torch.sqrt(1.0 / inverse + a - torch.log1p(a * inverse) + 3.0 * a * inverse.square())
    far = torch.where(p < 8.0 * torch.finfo(p.dtype).tiny, far, -tail_score(0.5 * p))
    return torch.where(lower, near, far)
