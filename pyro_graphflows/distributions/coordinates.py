r"""The prior's Gaussian coordinate: a bijection of a site's value in which its prior is normal.

A normal factor times a prior is easy where the prior is normal in the same coordinate. Two kinds:

- Priors that are normal in unconstrained space (normal, log-normal, logit-normal, multivariate normal, and whatever
  torch's monotone maps make of a normal) keep that coordinate, and their own location and scale.
- Other priors of one dimension get :math:`u = \Phi^{-1}(F(z))`, in which they are standard normal whatever their
  units.

The second kind is there where :math:`F` and its inverse can be computed with derivatives in the value and in the
prior's parameters: see :data:`QUANTILES`. Both tails keep their accuracy: on each side of the median only the
probability beyond the value counts, by its logarithm where it may be small. The Jacobian comes from the identity
:math:`\log p(z) + \log |dz / du| = \log N(u; 0, 1)`, so that the prior's own density cancels exactly against the
model's.

A value is a number of its own type: beside a finite bound (one, for a beta) values are as coarse as floating point is
there, and are kept inside of the support.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    PowerTransform,
    SigmoidTransform,
    SoftplusTransform,
    StickBreakingTransform,
    TanhTransform,
    Transform,
    identity_transform,
)

from pyro_graphflows.distributions.normal_tails import (
    half_normal_quantile,
    log1mexp,
    ndtri_exp,
    normal_log_density,
    normal_score,
    tail_probability,
    tail_score,
    two_sided,
)
from pyro_graphflows.distributions.skewed_scores import (
    LogGamma,
    LogitBeta,
    SkewedKernel,
    score,
    unscore,
)
from pyro_graphflows.nn.operation import Operation, is_traced
from pyro_graphflows.regression import in_float64

__all__ = ["QUANTILES", "GaussianCoordinate", "PriorQuantile", "gaussian_coordinate", "is_well_defined"]

WRAPPERS = (td.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)
MONOTONE = (AffineTransform, ExpTransform, PowerTransform, SigmoidTransform, SoftplusTransform, TanhTransform)
OF_VECTORS = (
    StickBreakingTransform,
    OrderedTransform,
)  # bijections of all vectors, as in unconstrained space
SMALL_SCORE = 1e-5  # below it, a symmetric density is flat


@dataclass(frozen=True)
class GaussianCoordinate:
    r"""A coordinate ``u`` of a site's value in which the site's prior is normal.

    Attributes:
        loc: The location of the prior in ``u``, of the coordinate's full shape (batch and event).
        scale: Its scale, of the same shape; of a multivariate normal, its marginal scales.
        scale_tril: Of a multivariate normal the Cholesky factor of its covariance, shape ``(*loc.shape, d)``; None for
            other priors.
        transform: The map from ``u`` to the value; its ``inv`` and ``log_abs_det_jacobian`` as in torch. Shapes
            broadcast, so that further dimensions on the left are allowed.
        standard: Whether ``u`` is the normal score, with prior ``N(0, 1)``.
        batch_dims: How many dimensions of ``loc`` are the prior's batch.
    """

    loc: Tensor
    scale: Tensor
    scale_tril: Tensor | None
    transform: Transform
    standard: bool
    batch_dims: int

    def expand(self, batch_shape: Any) -> "GaussianCoordinate":
        """Return the same coordinate at a larger batch shape."""
        shape = torch.Size(batch_shape) + self.loc.shape[self.batch_dims :]
        tril = self.scale_tril
        return GaussianCoordinate(
            self.loc.expand(shape),
            self.scale.expand(shape),
            None if tril is None else tril.expand(*shape, tril.shape[-1]),
            self.transform,
            self.standard,
            len(torch.Size(batch_shape)),
        )

    def log_prior(self, u: Tensor) -> Tensor:
        """Return the prior's log-density of ``u``, summed over the event; shape of the batch."""
        if self.scale_tril is not None:
            log_prob = td.MultivariateNormal(
                self.loc, scale_tril=self.scale_tril, validate_args=False
            ).log_prob(u)
        else:
            log_prob = normal_log_density((u - self.loc) / self.scale) - self.scale.log()
        return _summed(log_prob, self._batch_dims_of(u))

    def log_abs_det_jacobian(self, u: Tensor, value: Tensor) -> Tensor:
        """Return the logarithm of the volume of values over that of ``u``, summed over the event."""
        return _summed(self.transform.log_abs_det_jacobian(u, value), self._batch_dims_of(u))

    def _batch_dims_of(self, u: Tensor) -> int:
        return u.dim() - (self.loc.dim() - self.batch_dims)


def _summed(tensor: Tensor, batch_dims: int) -> Tensor:
    return tensor.flatten(batch_dims).sum(-1) if tensor.dim() > batch_dims else tensor


def _undressed(fn: Any) -> Any:
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def gaussian_coordinate(fn: Any) -> GaussianCoordinate | None:
    """Return the coordinate in which a distribution is normal; None where there is none that can be computed.

    Args:
        fn: A distribution of torch or Pyro. Masks do not count: what they switch off has the same coordinate.

    Example:
        >>> gaussian_coordinate(dist.LogNormal(torch.tensor(2.0), 0.5)).loc.item()
        2.0
        >>> tau = gaussian_coordinate(dist.HalfCauchy(torch.tensor(5.0)))
        >>> tau.standard, round(tau.transform(torch.tensor(0.0)).item(), 4)  # the median
        (True, 5.0)
        >>> gaussian_coordinate(dist.Dirichlet(torch.ones(3))) is None
        True
    """
    found = _coordinate_of_leaf(_undressed(fn))
    if found is None:
        return None
    loc, scale, tril, transform, standard = found
    batch_dims = len(fn.batch_shape)
    shape = fn.batch_shape + transform.inverse_shape(fn.batch_shape + fn.event_shape)[batch_dims:]
    return GaussianCoordinate(
        loc.expand(shape),
        scale.expand(shape),
        None if tril is None else tril.expand(*shape, shape[-1]),
        transform,
        standard,
        batch_dims,
    )


_Found = tuple[Tensor, Tensor, Tensor | None, Transform, bool]


def _coordinate_of_leaf(fn: Any) -> _Found | None:
    kind = _known_kind(fn)
    if kind is td.Normal:
        return fn.loc, fn.scale, None, identity_transform, False
    if kind in (td.MultivariateNormal, td.LowRankMultivariateNormal):
        tril = fn.scale_tril
        return fn.loc, torch.linalg.vector_norm(tril, dim=-1), tril, identity_transform, False
    if kind is not None:
        quantile = QUANTILES[kind](fn)
        zero = quantile.parameters[0].new_zeros(())
        return zero, zero + 1.0, None, quantile, True
    if isinstance(fn, dist.FoldedDistribution):
        return _folded(fn)
    if isinstance(fn, td.TransformedDistribution) and _plain(fn, td.TransformedDistribution):
        return _transformed(fn)
    return None


def _known_kind(fn: Any) -> type | None:
    """Return the class of torch or Pyro whose density a distribution has."""
    known = (td.Normal, td.MultivariateNormal, td.LowRankMultivariateNormal, *QUANTILES)
    for kind in type(fn).__mro__:
        if kind in known:
            return kind if _plain(fn, kind) else None
    return None


def _plain(fn: Any, kind: Any) -> bool:
    """Whether a distribution has the density of its class and not one of its own."""
    return type(fn).log_prob is kind.log_prob or type(fn).__module__.startswith("torch.distributions")


def _flat(transforms: Any) -> list[Transform]:
    parts: list[Transform] = []
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            parts += _flat(transform.parts)
        elif isinstance(transform, IndependentTransform):
            parts += _flat([transform.base_transform])
        else:
            parts.append(transform)
    return parts


def _transformed(fn: Any) -> _Found | None:
    found = _coordinate_of_leaf(_undressed(fn.base_dist))
    if found is None:
        return None
    loc, scale, tril, inner, standard = found
    parts = _flat(fn.transforms)
    if not all(isinstance(part, MONOTONE + OF_VECTORS) or isinstance(part.inv, MONOTONE) for part in parts):
        return None
    if tril is None and inner is identity_transform:
        while parts and isinstance(parts[0], AffineTransform):
            affine: Any = parts.pop(0)
            loc = affine.loc + affine.scale * loc
            scale = torch.as_tensor(affine.scale).abs() * scale
    transform = ComposeTransform([part for part in (inner, *parts) if part is not identity_transform])
    if not transform.parts:
        return loc, scale, tril, identity_transform, standard
    return loc, scale, tril, transform if len(transform.parts) > 1 else transform.parts[0], standard


def _folded(fn: Any) -> _Found | None:
    base = _undressed(fn.base_dist)
    kind = _known_kind(base)
    if kind not in (td.Normal, td.Cauchy, td.StudentT, td.Laplace, dist.Logistic) or bool(
        (base.loc != 0).any()
    ):
        return None  # folded about another point there is no inverse in closed form
    inner = _HalfNormal(td.HalfNormal(torch.ones_like(base.scale), validate_args=False))
    if kind is td.Normal:
        inner = _HalfNormal(td.HalfNormal(base.scale, validate_args=False))
        return torch.zeros_like(base.loc), torch.ones_like(base.loc), None, inner, True
    outer = QUANTILES[kind](base)
    return torch.zeros_like(base.loc), torch.ones_like(base.loc), None, ComposeTransform([inner, outer]), True


def is_well_defined(fn: Any) -> Tensor:
    """Return where the parameters of a distribution are finite and inside of their range (a scale of zero is not).

    Args:
        fn: A distribution.

    Returns:
        Truth values that broadcast to the batch shape of the distribution without its wrappers.

    Example:
        >>> scale = torch.tensor([1.0, 0.0, float("inf")])
        >>> is_well_defined(dist.Normal(torch.zeros(3), scale, validate_args=False)).tolist()
        [True, False, False]
    """
    fn = _undressed(fn)
    good = torch.ones((), dtype=torch.bool)
    for name, constraint in fn.arg_constraints.items():
        if name not in vars(fn) and not isinstance(getattr(type(fn), name, None), property):
            continue  # computed from others when asked for (a precision, beside a scale)
        value = getattr(fn, name)
        checked = torch.isfinite(value)
        if not constraints.is_dependent(constraint):
            for _ in range(constraint.event_dim):
                checked = checked.all(-1)
            checked = checked & constraint.check(value)
        good = good.to(value.device) & checked
    if isinstance(fn, td.Uniform):  # before PyTorch 2.6 its constraints do not compare the bounds
        good = good & (fn.low < fn.high)
    if isinstance(fn, td.TransformedDistribution):
        inner = is_well_defined(fn.base_dist)
        good = good.to(inner.device) & inner
        for part in _flat(fn.transforms):
            if isinstance(part, AffineTransform):
                shift, width = torch.as_tensor(part.loc), torch.as_tensor(part.scale)
                good = good & (torch.isfinite(shift) & torch.isfinite(width) & (width != 0)).to(good.device)
    return good


class PriorQuantile(Transform):
    """The quantile of a distribution at a normal score: from ``u`` to the value.

    Subclasses write :meth:`_quantile` and :meth:`_score`, and where values are bounded the bounds.

    Args:
        fn: The distribution, of numbers.
    """

    domain = constraints.real
    bijective = True
    sign = 1
    names: ClassVar[tuple[str, ...]] = ("loc", "scale")
    is_iterated: ClassVar[bool] = (
        False  # whether quantiles are solved for, by functions with derivatives of their own
    )

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn
        self.codomain = fn.support
        self.parameters: list[Tensor] = [getattr(fn, name) for name in self.names]
        self._last: Tensor | None = None  # the value made last, which is inside of the support

    def with_cache(self, cache_size: int = 1) -> "PriorQuantile":
        """Return itself: values are not kept."""
        return self

    @property
    def _lower(self) -> Tensor | float | None:
        return None

    @property
    def _upper(self) -> Tensor | float | None:
        return None

    @abstractmethod
    def _quantile(self, u: Tensor) -> Tensor:
        """Return the value at a score."""

    @abstractmethod
    def _score(self, value: Tensor) -> Tensor:
        """Return the score of a value inside of the support."""

    def _log_density(self, value: Tensor) -> Tensor:
        return self.fn.log_prob(value)

    def _inside(self, value: Tensor) -> Tensor:
        limits = torch.finfo(value.dtype)
        largest = math.sqrt(limits.max)  # whose square is still finite
        lower = -largest if self._lower is None else self._lower
        upper = largest if self._upper is None else self._upper
        if self._upper is None and not isinstance(lower, Tensor) and lower in (0.0, -largest):
            return value.clamp(limits.tiny if lower == 0.0 else lower, largest)
        least, most = torch.as_tensor(lower).to(value), torch.as_tensor(upper).to(value)
        if self._lower is not None:
            least = torch.nextafter(least, torch.full_like(least, math.inf)) + (least == 0) * limits.tiny
        if self._upper is not None:
            most = torch.nextafter(most, torch.full_like(most, -math.inf))
        return value.maximum(least.detach()).minimum(most.detach())

    def _shape_of(self, like: Tensor) -> Tensor:
        """Return the answer on the meta device, which has shapes alone."""
        return torch.empty_like(
            torch.broadcast_tensors(like, *(part.to(like) for part in self.parameters))[0]
        )

    def _call(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return self._shape_of(x)
        follows = torch.is_grad_enabled() and x.requires_grad and not is_traced()
        if not follows or self.is_iterated or any(part.requires_grad for part in self.parameters):
            self._last = self._value(x)
        else:
            self._last = _OfScore.apply(x, self)
        return self._last

    def _value(self, u: Tensor) -> Tensor:
        return self._inside(self._quantile(u)).to(u.dtype)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._shape_of(y) if y.is_meta else self._score(self._inside(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log N(u; 0, 1) - log p(z), elementwise."""
        if x.is_meta:
            return self._shape_of(x)
        return self._log_slope(x, y if y is self._last else self._inside(y))

    def _log_slope(self, u: Tensor, value: Tensor) -> Tensor:
        return normal_log_density(u) - self._log_density(value)


class _OfScore(Operation):
    """The value at a score; its derivative is the quotient of the densities of both, whatever the way to the value."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, quantile: PriorQuantile) -> Tensor:
        value = quantile._value(u)
        ctx.quantile = quantile
        ctx.save_for_backward(u, value)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        u, value = ctx.saved_tensors
        slope = ctx.quantile._log_slope(u, value).exp()
        return (grads[0] * slope).sum_to_size(u.shape), None


class _Uniform(PriorQuantile):
    names = ("low", "high")

    @property
    def _lower(self) -> Tensor:
        return self.fn.low

    @property
    def _upper(self) -> Tensor:
        return self.fn.high

    def _quantile(self, u: Tensor) -> Tensor:
        low, high = self.parameters
        lower, magnitude = two_sided(u)
        distance = (high - low) * tail_probability(magnitude)
        return torch.where(lower, low + distance, high - distance)

    def _score(self, value: Tensor) -> Tensor:
        low, high = self.parameters
        lower = value - low < high - value
        tail = tail_score(torch.where(lower, value - low, high - value) / (high - low))
        return torch.where(lower, tail, -tail)


class _Positive(PriorQuantile):
    @property
    def _lower(self) -> float:
        return 0.0


class _Exponential(_Positive):
    names = ("rate",)

    def _quantile(self, u: Tensor) -> Tensor:
        return -torch.special.log_ndtr(-u) / self.parameters[0]

    def _score(self, value: Tensor) -> Tensor:
        log_sf = -self.parameters[0] * value
        return normal_score(log1mexp(log_sf), log_sf)


class _Weibull(_Positive):
    names = ("scale", "concentration")

    def _quantile(self, u: Tensor) -> Tensor:
        scale, concentration = self.parameters
        return scale * torch.exp((-torch.special.log_ndtr(-u)).log() / concentration)

    def _score(self, value: Tensor) -> Tensor:
        scale, concentration = self.parameters
        log_sf = -torch.exp(concentration * (value.log() - scale.log()))
        return normal_score(log1mexp(log_sf), log_sf)


class _Pareto(PriorQuantile):
    names = ("scale", "alpha")

    @property
    def _lower(self) -> Tensor:
        return self.fn.scale

    def _quantile(self, u: Tensor) -> Tensor:
        scale, alpha = self.parameters
        return scale * torch.exp(-torch.special.log_ndtr(-u) / alpha)

    def _score(self, value: Tensor) -> Tensor:
        scale, alpha = self.parameters
        log_sf = -alpha * torch.log1p((value - scale) / scale)
        return normal_score(log1mexp(log_sf), log_sf)


class _HalfNormal(_Positive):
    names = ("scale",)

    def _quantile(self, u: Tensor) -> Tensor:
        return self.parameters[0] * half_normal_quantile(u)

    def _log_density(self, value: Tensor) -> Tensor:
        scale = self.parameters[0]
        return normal_log_density(value / scale) - (scale.log() - math.log(2.0))

    def _score(self, value: Tensor) -> Tensor:
        t = value / self.parameters[0]
        log_sf = math.log(2.0) + torch.special.log_ndtr(-t)
        return normal_score(torch.erf(t * math.sqrt(0.5)).log(), log_sf)


class _Cauchy(PriorQuantile):
    def _quantile(self, u: Tensor) -> Tensor:
        loc, scale = self.parameters
        lower, magnitude = two_sided(u)
        middle = magnitude < 1.0
        near = torch.tan(0.5 * math.pi * torch.erf(torch.where(middle, magnitude, 0.5) * math.sqrt(0.5)))
        far = 1.0 / torch.tan(math.pi * tail_probability(torch.where(middle, 2.0, magnitude)))
        t = torch.where(middle, near, far)
        return loc + scale * torch.where(lower, -t, t)

    def _score(self, value: Tensor) -> Tensor:
        loc, scale = self.parameters
        t = (value - loc) / scale
        lower, magnitude = two_sided(t)
        tail = -tail_score(torch.atan2(torch.ones_like(t), magnitude) / math.pi)
        near = magnitude < 1e-3
        small = torch.where(near, magnitude, 0.0)
        tail = torch.where(near, math.sqrt(2.0) * torch.erfinv(torch.atan(small) * (2.0 / math.pi)), tail)
        return torch.where(lower, -tail, tail)


class _HalfCauchy(_Positive):
    names = ("scale",)

    def _quantile(self, u: Tensor) -> Tensor:
        lower, magnitude = two_sided(u)
        t = torch.tan(0.5 * math.pi * tail_probability(magnitude))
        return self.parameters[0] * torch.where(lower, t, 1.0 / t)

    def _score(self, value: Tensor) -> Tensor:
        t = value / self.parameters[0]
        lower = t < 1.0
        ratio = torch.where(lower, t, 1.0 / torch.where(lower, 1.0, t))
        tail = tail_score(torch.atan(ratio) * (2.0 / math.pi))
        return torch.where(lower, tail, -tail)


class _AsymmetricLaplace(PriorQuantile):
    def _scales(self) -> tuple[Tensor, Tensor]:
        return self.fn.left_scale, self.fn.right_scale

    def _quantile(self, u: Tensor) -> Tensor:
        left, right = self._scales()
        log_left, log_right = (left / (left + right)).log(), (right / (left + right)).log()
        below = left * (torch.special.log_ndtr(u) - log_left)
        above = right * (log_right - torch.special.log_ndtr(-u))
        return self.parameters[0] + torch.where(below < 0, below, above)

    def _score(self, value: Tensor) -> Tensor:
        left, right = self._scales()
        t = value - self.parameters[0]
        lower, magnitude = two_sided(t)
        side = torch.where(lower, left, right)
        tail = (side / (left + right)).log() - magnitude / side
        other = log1mexp(tail)
        return normal_score(torch.where(lower, tail, other), torch.where(lower, other, tail))


class _Laplace(_AsymmetricLaplace):
    def _scales(self) -> tuple[Tensor, Tensor]:
        return self.fn.scale, self.fn.scale


class _Gumbel(PriorQuantile):
    def _quantile(self, u: Tensor) -> Tensor:
        loc, scale = self.parameters
        return loc - scale * (-torch.special.log_ndtr(u)).log()

    def _score(self, value: Tensor) -> Tensor:
        loc, scale = self.parameters
        log_cdf = -torch.exp(((loc - value) / scale).clamp(max=0.9 * math.log(torch.finfo(value.dtype).max)))
        return normal_score(log_cdf, log1mexp(log_cdf))


class _SkewLogistic(PriorQuantile):
    names = ("loc", "scale", "asymmetry")

    def _quantile(self, u: Tensor) -> Tensor:
        loc, scale, asymmetry = self.parameters
        log_power = torch.special.log_ndtr(u) / asymmetry
        return loc + scale * (log_power - log1mexp(log_power))

    def _score(self, value: Tensor) -> Tensor:
        loc, scale, asymmetry = self.parameters
        log_cdf = asymmetry * torch.nn.functional.logsigmoid((value - loc) / scale)
        return normal_score(log_cdf, log1mexp(log_cdf))


class _Logistic(PriorQuantile):
    def _quantile(self, u: Tensor) -> Tensor:
        loc, scale = self.parameters
        return loc + scale * (torch.special.log_ndtr(u) - torch.special.log_ndtr(-u))

    def _score(self, value: Tensor) -> Tensor:
        loc, scale = self.parameters
        t = (value - loc) / scale
        return normal_score(torch.nn.functional.logsigmoid(t), torch.nn.functional.logsigmoid(-t))


class _SoftLaplace(PriorQuantile):
    def _quantile(self, u: Tensor) -> Tensor:
        loc, scale = self.parameters
        lower, magnitude = two_sided(u)
        t = torch.tan(0.5 * math.pi * tail_probability(magnitude)).log()
        return loc + scale * torch.where(lower, t, -t)

    def _score(self, value: Tensor) -> Tensor:
        loc, scale = self.parameters
        lower, magnitude = two_sided((value - loc) / scale)
        tail = ndtri_exp(math.log(2.0 / math.pi) + torch.atan(torch.exp(-magnitude.clamp(max=80.0))).log())
        return torch.where(lower, tail, -tail)


class _Kumaraswamy(_Positive):
    names = ("concentration1", "concentration0")

    @property
    def _upper(self) -> float:
        return 1.0

    def _quantile(self, u: Tensor) -> Tensor:
        a, b = self.parameters
        return torch.exp(log1mexp(torch.special.log_ndtr(-u) / b) / a)

    def _score(self, value: Tensor) -> Tensor:
        a, b = self.parameters
        log_sf = b * log1mexp(a * value.log())
        return normal_score(log1mexp(log_sf), log_sf)

    def _log_density(self, value: Tensor) -> Tensor:
        a, b = self.parameters  # torch's own is minus infinity where 1 - z^a rounds to one
        return a.log() + b.log() + (a - 1.0) * value.log() + (b - 1.0) * log1mexp(a * value.log())


def _shrunk(tensor: Tensor) -> Tensor:
    """Return a single number in double precision where all entries are one and the same, else the tensor."""
    if tensor.dim() and tensor.numel() and not any(tensor.stride()):
        tensor = tensor[(0,) * tensor.dim()]
    return in_float64(tensor)


class _Skewed(PriorQuantile):
    """A distribution that is a function of a log-gamma or logit-beta variable, computed in double precision."""

    is_iterated = True

    @abstractmethod
    def _kernel(self) -> SkewedKernel:
        """Return the variable's density."""

    @abstractmethod
    def _from(self, x: Tensor) -> Tensor:
        """Return the value from the variable, in double precision."""

    @abstractmethod
    def _to(self, value: Tensor) -> Tensor:
        """Return the variable from the value, in double precision."""

    def _quantile(self, u: Tensor) -> Tensor:
        return self._from(unscore(self._kernel(), in_float64(u))).to(u)

    def _score(self, value: Tensor) -> Tensor:
        return score(self._kernel(), self._to(in_float64(value))).to(value)


class _Gamma(_Skewed, _Positive):
    names = ("concentration", "rate")

    def _kernel(self) -> SkewedKernel:
        return LogGamma(_shrunk(self.parameters[0]))

    def _from(self, x: Tensor) -> Tensor:
        return x.exp() / in_float64(self.parameters[1])

    def _to(self, value: Tensor) -> Tensor:
        return value.log() + in_float64(self.parameters[1]).log()


class _InverseGamma(_Gamma):
    def _quantile(self, u: Tensor) -> Tensor:
        return (in_float64(self.parameters[1]) * torch.exp(-unscore(self._kernel(), -in_float64(u)))).to(u)

    def _score(self, value: Tensor) -> Tensor:
        log_rate = in_float64(self.parameters[1]).log()
        return -score(self._kernel(), log_rate - in_float64(value).log()).to(value)


class _Beta(_Skewed, _Positive):
    names = ("concentration1", "concentration0")

    @property
    def _upper(self) -> float:
        return 1.0

    def _kernel(self) -> SkewedKernel:
        return LogitBeta(_shrunk(self.parameters[0]), _shrunk(self.parameters[1]))

    def _from(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def _to(self, value: Tensor) -> Tensor:
        return torch.logit(value)


class _FisherSnedecor(_Skewed, _Positive):
    names = ("df1", "df2")

    def _kernel(self) -> SkewedKernel:
        return LogitBeta(0.5 * _shrunk(self.parameters[0]), 0.5 * _shrunk(self.parameters[1]))

    def _from(self, x: Tensor) -> Tensor:
        return in_float64(self.parameters[1] / self.parameters[0]) * x.exp()

    def _to(self, value: Tensor) -> Tensor:
        return value.log() + in_float64(self.parameters[0] / self.parameters[1]).log()


class _StudentT(PriorQuantile):
    names = ("df", "loc", "scale")
    is_iterated = True

    def _kernel(self) -> LogitBeta:
        half = 0.5 * _shrunk(self.parameters[0])
        return LogitBeta(half, half)

    def _quantile(self, u: Tensor) -> Tensor:
        df, loc, scale = map(in_float64, self.parameters)
        kernel, u64 = self._kernel(), in_float64(u)
        at_centre = torch.exp(normal_log_density(0.0 * u64) - kernel.log_density(0.0 * u64))
        small = u64.abs() < SMALL_SCORE
        x = torch.where(small, u64 * at_centre, unscore(kernel, torch.where(small, 1.0, u64)))
        return (loc + scale * df.sqrt() * torch.sinh(0.5 * x)).to(u)

    def _score(self, value: Tensor) -> Tensor:
        df, loc, scale = map(in_float64, self.parameters)
        kernel = self._kernel()
        x = 2.0 * torch.asinh((in_float64(value) - loc) / (scale * df.sqrt()))
        slope = torch.exp(kernel.log_density(0.0 * x) - normal_log_density(0.0 * x))
        small = (x * slope).abs() < SMALL_SCORE
        return torch.where(small, x * slope, score(kernel, torch.where(small, 1.0, x))).to(value)


QUANTILES: dict[type, type[PriorQuantile]] = {
    td.Uniform: _Uniform,
    td.HalfNormal: _HalfNormal,
    td.HalfCauchy: _HalfCauchy,
    td.Cauchy: _Cauchy,
    td.Exponential: _Exponential,
    td.Laplace: _Laplace,
    dist.AsymmetricLaplace: _AsymmetricLaplace,
    dist.SoftLaplace: _SoftLaplace,
    td.Gumbel: _Gumbel,
    td.Weibull: _Weibull,
    td.Pareto: _Pareto,
    td.Kumaraswamy: _Kumaraswamy,
    dist.Logistic: _Logistic,
    dist.SkewLogistic: _SkewLogistic,
    td.StudentT: _StudentT,
    td.Gamma: _Gamma,
    dist.InverseGamma: _InverseGamma,
    td.Beta: _Beta,
    td.FisherSnedecor: _FisherSnedecor,
}
"""The distributions with a normal score, and the map from the score to the value."""
