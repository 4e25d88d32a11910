"""Elements of a plate beyond those whose parameters were fitted: they follow the model's own conditional.

A site with per-element parameters has none for a group that it has not seen. Given the outer sites, and without data
of its own, such a group's posterior is the model's conditional. So the distribution of the site is, element by element,
the guide's where there are parameters, and the model's beyond.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.shapes import broadcast_shapes

__all__ = ["WithNewElements", "beyond_fitted"]


def beyond_fitted(fitted: Iterable[PlateState], plates: Mapping[str, PlateState]) -> Tensor | None:
    """Return which elements of plates in a call are beyond those at set-up; None if none is.

    Args:
        fitted: The plates at set-up.
        plates: The plates of the call.

    Shape:
        - Output: broadcasts with the batch shape of a site in these plates.

    Example:
        >>> at_set_up, now = PlateState("g", -1, 2, 2, None), PlateState("g", -1, 3, 3, None)
        >>> beyond_fitted([at_set_up], {"g": now})
        tensor([False, False,  True])
    """
    found: Tensor | None = None
    for plate in fitted:
        now = plates[plate.name]
        if now.full_size <= plate.full_size:
            continue
        indices = torch.arange(now.size) if now.indices is None else now.indices
        new = (indices >= plate.full_size).reshape(-1, *(1,) * (-now.dim - 1))
        found = new if found is None else found | new.to(found.device)
    return found


class WithNewElements(dist.TorchDistribution):
    """A distribution that is one for some elements of the batch and another for the rest.

    Args:
        fitted: The guide's distribution of a site, for the elements with parameters.
        model: The model's own, for those beyond.
        new: Which elements are beyond; broadcasts with the batch shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, fitted: Any, model: Any, new: Tensor) -> None:
        shape = broadcast_shapes(fitted.batch_shape, model.batch_shape, new.shape)
        self.fitted, self.model, self.new = fitted.expand(shape), model.expand(shape), new
        self.has_rsample = fitted.has_rsample and model.has_rsample
        self.has_enumerate_support = fitted.has_enumerate_support
        super().__init__(shape, fitted.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the site."""
        support: constraints.Constraint = self.fitted.support
        return support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "WithNewElements":
        """Return the same at a larger batch shape."""
        shape = torch.Size(batch_shape)
        return WithNewElements(self.fitted.expand(shape), self.model.expand(shape), self.new)

    def _chosen(self, of_model: Tensor, of_fitted: Tensor, event_dim: int) -> Tensor:
        new = self.new.to(of_fitted.device).reshape(self.new.shape + (1,) * event_dim)
        return torch.where(new, of_model.to(of_fitted.dtype), of_fitted)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + event_shape``."""
        drawn = self.model.rsample(sample_shape), self.fitted.rsample(sample_shape)
        return self._chosen(*drawn, len(self.event_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw values of shape ``sample_shape + batch_shape + event_shape`` without gradients."""
        with torch.no_grad():
            drawn = self.model.sample(sample_shape), self.fitted.sample(sample_shape)
            return self._chosen(*drawn, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values, shape ``batch_shape``."""
        return self._chosen(self.model.log_prob(value), self.fitted.log_prob(value), 0)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all values of a discrete site."""
        values: Tensor = self.fitted.enumerate_support(expand=expand)
        return values

    def centre(self) -> Tensor:
        """Return the centre of the guide's distribution, and the median of the model's (the mean where not known)."""
        of_fitted = self.fitted.centre() if hasattr(self.fitted, "centre") else self.fitted.mean
        shape = self.batch_shape + self.event_shape
        return self._chosen(_median(self.model).expand(shape), of_fitted.expand(shape), len(self.event_shape))


def _median(fn: Any) -> Tensor:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    if fn.support.is_discrete:
        mode: Tensor = fn.mode
        return mode.nan_to_num()
    try:
        median: Tensor = fn.icdf(torch.full((), 0.5, dtype=torch.get_default_dtype()))
    except NotImplementedError:
        median = fn.mean
    return median
