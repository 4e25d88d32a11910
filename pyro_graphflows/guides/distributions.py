"""The distribution that a guide emits at a latent site.

A factor is a distribution over a flat, unconstrained vector; a site wants a value of its own shape in its own
support. :class:`FactorDistribution` joins the two. It derives directly from
:class:`~pyro.distributions.TorchDistribution`, so that no analytic KL is registered for it: where a guide may
not use one (:func:`~pyro_graphflows.guides.plan.mean_field_condition`), every estimator falls back to sampling.
"""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

__all__ = ["FactorDistribution", "SampledNormal", "ScalarNormal"]


class ScalarNormal(dist.TorchDistribution):
    """A normal over vectors of one element, held as a normal over numbers.

    Args:
        normal: The normal over numbers.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, normal: dist.Normal) -> None:
        self.normal = normal
        super().__init__(normal.batch_shape, torch.Size([1]), validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """All real vectors."""
        return constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ScalarNormal":
        """Return the same normal at a larger batch shape."""
        return ScalarNormal(self.normal.expand(batch_shape))

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.normal.loc.unsqueeze(-1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + (1,)``."""
        return self.normal.rsample(sample_shape).unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of vectors, shape ``batch_shape``."""
        return self.normal.log_prob(value.squeeze(-1))


class SampledNormal(dist.TorchDistribution):
    """A normal over numbers for which no analytic KL is registered.

    Args:
        normal: The normal.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, normal: dist.Normal) -> None:
        self.normal = normal
        super().__init__(normal.batch_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SampledNormal":
        """Return the same normal at a larger batch shape."""
        return SampledNormal(self.normal.expand(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape``."""
        return self.normal.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values, shape ``batch_shape``."""
        return self.normal.log_prob(value)

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.normal.loc


class FactorDistribution(dist.TorchDistribution):
    """A factor over a flat unconstrained vector, pushed to the shape and support of a site.

    The unconstrained vector of the value drawn or read last is kept, so that scoring that value needs no inversion,
    and so that the guide can read it (:meth:`unconstrained`). Any other value is inverted.

    Shape:
        - ``base``: batch shape of the site, event shape ``(n,)``.
        - values: ``batch_shape + event_shape`` of the site.

    Args:
        base: The distribution over the flat unconstrained vector.
        transform: The bijection from the unconstrained shape to the support of the site.
        unconstrained_shape: The event shape before the vector is flattened.
        event_shape: The event shape of the site.
        support: The support of the site.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        base: dist.TorchDistribution,
        transform: Transform,
        unconstrained_shape: torch.Size,
        event_shape: torch.Size,
        support: constraints.Constraint,
    ) -> None:
        self.base = base
        self.has_rsample = base.has_rsample
        self.transform = transform
        self.unconstrained_shape = unconstrained_shape
        self._support = support
        # Shared with expanded copies: Pyro expands a factor before it draws, and the guide asks the original.
        self._drawn: list[tuple[Tensor, Tensor]] = []
        super().__init__(base.batch_shape, event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the site, over its event dimensions."""
        missing = len(self.event_shape) - self._support.event_dim
        return constraints.independent(self._support, missing) if missing > 0 else self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FactorDistribution":
        """Return the same factor at a larger batch shape."""
        batch_shape = torch.Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        new = FactorDistribution(
            self.base.expand(batch_shape),
            self.transform,
            self.unconstrained_shape,
            self.event_shape,
            self._support,
        )
        new._drawn = self._drawn
        return new

    def _constrain(self, flat: Tensor) -> Tensor:
        return self.transform(flat.reshape(flat.shape[:-1] + self.unconstrained_shape))

    def _draw(self, flat: Tensor) -> Tensor:
        value = self._constrain(flat)
        self._drawn[:] = [(value, flat)]
        return value

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + event_shape``."""
        return self._draw(self.base.rsample(sample_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw values of shape ``sample_shape + batch_shape + event_shape`` without gradients."""
        with torch.no_grad():
            return self._draw(self.base.sample(sample_shape))

    def centre(self) -> Tensor:
        """Return the image of the base's median (its mean where that is the same)."""
        return self._draw(self.base.mean)

    def unconstrained(self, value: Tensor) -> Tensor:
        """Return the flat unconstrained vector of a value, shape ``(*batch, n)``."""
        if self._drawn and self._drawn[0][0] is value:
            flat = self._drawn[0][1]
            if flat.requires_grad or not (value.requires_grad and torch.is_grad_enabled()):
                return flat
        raw = self.transform.inv(value)
        dims = len(self.unconstrained_shape)
        flat = raw.reshape(*raw.shape[: raw.dim() - dims], -1)
        self._drawn[:] = [(value, flat)]
        return flat

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values, shape ``batch_shape``."""
        flat = self.unconstrained(value)
        raw = flat.reshape(flat.shape[:-1] + self.unconstrained_shape)
        ladj = self.transform.log_abs_det_jacobian(raw, value)
        batch_dims = raw.dim() - len(self.unconstrained_shape)
        if ladj.dim() > batch_dims:
            ladj = ladj.flatten(batch_dims).sum(-1)
        return self.base.log_prob(flat) - ladj
