r"""A distribution over vectors whose elements are a spline of noise: closed form to draw and to score.

.. math:: z = \text{loc} + \text{scale} \cdot \mathrm{RQS}(\varepsilon), \qquad \varepsilon \sim p_0

with the rational-quadratic spline of :mod:`~pyro_graphflows.distributions.rational_spline` and a base that is
normal, Student's t or logistic, all symmetric about zero. Outside of the spline's interval the tails are those of the
base. With zero parameters of the spline the elements have exactly the base's distribution, moved and scaled.
"""

import math
from typing import Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_graphflows.distributions.last_draw import LastDraw
from pyro_graphflows.distributions.normal_tails import normal_log_density
from pyro_graphflows.distributions.rational_spline import RationalSpline
from pyro_graphflows.errors import GraphflowsError

__all__ = ["BASES", "SplineDistribution"]

BASES = ("normal", "student", "logistic")


class SplineDistribution(dist.TorchDistribution):
    """Independent splines of noise, one for each element of a vector.

    The noise of the value drawn last is kept, and the slope there, so that scoring that value needs no inversion and
    has no rounding of its own. Any other value is inverted, in closed form.

    Shape:
        - values: ``(*batch, n)``, with the batch shape to which the arguments broadcast.

    Args:
        loc: Locations, shape ``(*batch, n)``.
        scale: Positive scales, shape ``(*batch, n)``.
        spline: The splines' parameters, shape ``(*batch, n, 3 * num_bins - 1)``; see
            :class:`~pyro_graphflows.distributions.rational_spline.RationalSpline`.
        bound: The noise is left alone outside of ``[-bound, bound]``.
        base: ``"normal"``, ``"student"`` or ``"logistic"``.
        df: The degrees of freedom of a base that is Student's t: a positive number, or a tensor that broadcasts to
            ``loc``.

    Raises:
        GraphflowsError: If the base is unknown, degrees of freedom are missing, not positive or not wanted, or the
            spline's parameters or bound are not as they must be.

    Example:
        >>> q = SplineDistribution(torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3, 2, 23))
        >>> q.batch_shape, q.event_shape
        (torch.Size([3]), torch.Size([2]))
        >>> z = q.rsample()
        >>> bool(torch.allclose(q.log_prob(z), dist.Normal(0.0, 1.0).log_prob(z).sum(-1)))
        True
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        spline: Tensor,
        *,
        bound: float = 4.0,
        base: str = "normal",
        df: float | Tensor | None = None,
    ) -> None:
        if base not in BASES:
            raise GraphflowsError(f"Expected base one of {', '.join(BASES)}; got {base!r}.")
        if (df is None) == (base == "student"):
            raise GraphflowsError(
                f"Expected df= with base='student' and only there; got base={base!r} and df={df}."
            )
        if isinstance(df, int | float) and not df > 0:
            raise GraphflowsError(f"Expected positive degrees of freedom; got df={df}.")
        self.spline = RationalSpline(spline, bound)
        shape = torch.Size(np.broadcast_shapes(loc.shape, scale.shape, spline.shape[:-1]))
        self.loc, self.scale, self.base = loc.expand(shape), scale.expand(shape), base
        self.df = (
            None if df is None else torch.as_tensor(df, dtype=loc.dtype, device=loc.device).expand(shape)
        )
        self._last = LastDraw()
        super().__init__(shape[:-1], shape[-1:], validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """All real vectors."""
        return constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SplineDistribution":
        """Return the same distribution at a larger batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        if shape[:-1] == self.batch_shape:
            return self
        new = SplineDistribution(
            self.loc.expand(shape),
            self.scale.expand(shape),
            self.spline.parameters,
            bound=self.spline.bound,
            base=self.base,
            df=None if self.df is None else self.df.expand(shape),
        )
        new._last = self._last
        return new

    @property
    def mean(self) -> Tensor:
        """The image of the centre of the noise: the median of each element, and the mean where that is the same."""
        return self.from_noise(torch.zeros_like(self.loc))

    def from_noise(self, noise: Tensor) -> Tensor:
        """Return the values that some noise gives.

        Args:
            noise: Shape ``(..., *batch, n)``.
        """
        return self.loc + self.scale * self.spline(noise)[0]

    def to_noise(self, value: Tensor) -> Tensor:
        """Return the noise that gives some values.

        Args:
            value: Shape ``(..., *batch, n)``.
        """
        return self.spline.inverse((value - self.loc) / self.scale)[0]

    def noise_behind(self, value: Tensor) -> Tensor | None:
        """Return the noise of the value that was drawn last; None for other values."""
        known = self._last.behind(value, ())
        learned = self.df is not None and self.df.requires_grad  # a score has no part for it
        return None if known is None or learned else known[0]

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + (n,)``."""
        noise = self._noise(self._extended_shape(sample_shape))
        splined, log_slope = self.spline(noise)
        value = self.loc + self.scale * splined
        self._last.keep(value, noise, log_slope)
        return value

    def _noise(self, shape: torch.Size) -> Tensor:
        loc = self.loc
        if self.df is not None:
            noise = dist.StudentT(self.df, validate_args=False).rsample(shape[: len(shape) - loc.dim()])
            # With few degrees of freedom a draw may overflow; so far out, one value is as good as another.
            largest = 0.01 * math.sqrt(torch.finfo(loc.dtype).max)
            return noise.clamp(-largest, largest)
        if self.base == "normal":
            return torch.randn(shape, dtype=loc.dtype, device=loc.device)
        limits = torch.finfo(loc.dtype)
        uniform = torch.rand(shape, dtype=loc.dtype, device=loc.device).clamp(limits.tiny, 1.0 - limits.eps)
        return torch.logit(uniform)

    def _log_base(self, noise: Tensor) -> Tensor:
        if self.df is not None:
            return dist.StudentT(self.df, validate_args=False).log_prob(noise)
        if self.base == "normal":
            return normal_log_density(noise)
        return -noise - 2.0 * softplus(-noise)

    def _slope_of_log_base(self, noise: Tensor) -> Tensor:
        if self.df is not None:
            return -(self.df + 1.0) * noise / (self.df + noise.square())
        return -noise if self.base == "normal" else -torch.tanh(0.5 * noise)

    def log_prob_near(self, noise: Tensor, value: Tensor) -> Tensor:
        r"""Return the log-density of the values that some noise gives, with gradients for parameters and values.

        As parameters and value move, the noise of :math:`z = T(\varepsilon)` moves by :math:`(dz - dT) / T'`. So no
        value is inverted. There are first derivatives only.

        Args:
            noise: Shape ``(..., *batch, n)``, without gradients.
            value: Its values, of the same shape.
        """
        splined, log_slope, bend = self.spline.with_bend(noise)
        image = torch.addcmul(self.loc, self.scale, splined)
        with torch.no_grad():
            log_base = self._log_base(noise)
            pull = (self._slope_of_log_base(noise) - bend) / (self.scale * log_slope.exp())
        return (torch.addcmul(log_base, pull, value - image) - self.scale.log() - log_slope).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of vectors, shape ``batch_shape``."""
        known = self._last.behind(value, (self.loc, self.scale, self.spline.parameters, self.df))
        noise, log_slope = known or self.spline.inverse((value - self.loc) / self.scale)
        return (self._log_base(noise) - self.scale.log() - log_slope).sum(-1)
