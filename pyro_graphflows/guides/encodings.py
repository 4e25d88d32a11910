"""Values of discrete sites as vectors of features, and back.

Networks and regressions want numbers whose distances mean something. A binary value is 0 or 1 as it is; a value among
``K`` classes becomes ``K`` indicators. Counts without a bound stay numbers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["DiscreteEncoding"]


@dataclass(frozen=True)
class DiscreteEncoding:
    """How the value of one discrete site is written as a flat vector.

    Attributes:
        kind: ``"binary"``; ``"classes"`` (an index among classes); ``"one_hot"`` (indicators already); or
            ``"counts"`` (integers without a finite range, for which only a factor of the user's own will do).
        event_shape: The shape of one value.
        num_classes: The number of classes of an element; 1 where the flat vector has one entry for each element.
        lowest: The value of the first class.
        dtype: The type of the site's values.
    """

    kind: str
    event_shape: torch.Size
    num_classes: int
    lowest: int
    dtype: torch.dtype

    @classmethod
    def of(cls, fn: Any, dtype: torch.dtype) -> "DiscreteEncoding":
        """Return the encoding of the values of a distribution.

        Args:
            fn: A distribution with discrete support.
            dtype: The type of its values.
        """
        support, shape = _base(fn.support), fn.event_shape
        if support is constraints.boolean:
            return cls("binary", shape, 1, 0, dtype)
        if support is constraints.one_hot:
            return cls("one_hot", shape, shape[-1], 0, dtype)
        bounds = _bounds(support)
        if bounds is not None:
            return cls("classes", shape, bounds[1] - bounds[0] + 1, bounds[0], dtype)
        return cls("counts", shape, 1, 0, dtype)

    @property
    def size(self) -> int:
        """The length of the flat vector."""
        return self.event_shape.numel() * (self.num_classes if self.kind == "classes" else 1)

    @property
    def num_elements(self) -> int:
        """The number of binary or class variables that one value holds."""
        return self.size // self.num_classes

    def fits(self, support: constraints.Constraint) -> bool:
        """Return whether a support, as it is in some call, is the one at set-up."""
        base = _base(support)
        if self.kind == "classes":
            return _bounds(base) == (self.lowest, self.lowest + self.num_classes - 1)
        kinds = {"binary": constraints.boolean, "one_hot": constraints.one_hot}
        return self.kind == "counts" or base is kinds[self.kind]

    def encode(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the flat vectors of values, of shape ``(*batch, size)`` for values ``(*batch, *event)``."""
        flat = value.reshape(*value.shape[: value.dim() - len(self.event_shape)], -1)
        if self.kind != "classes":
            return flat.to(dtype)
        classes = torch.arange(self.lowest, self.lowest + self.num_classes, device=flat.device)
        return (flat.unsqueeze(-1) == classes).flatten(-2).to(dtype)

    def decode(self, flat: Tensor) -> Tensor:
        """Return the values, of shape ``(*batch, *event)``, of flat vectors ``(*batch, size)``."""
        if self.kind == "classes":
            flat = flat.unflatten(-1, (-1, self.num_classes)).argmax(-1) + self.lowest
        return flat.reshape(flat.shape[:-1] + self.event_shape).to(self.dtype)

    def __str__(self) -> str:
        many = "" if self.num_elements == 1 else f"{self.num_elements} x "
        if self.kind in ("binary", "counts"):
            return many + self.kind
        return f"{many}{self.num_classes} classes"


def _base(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _bounds(support: Any) -> tuple[int, int] | None:
    """Return the bounds of a finite range that is the same for every element; None if there is none."""
    if not isinstance(support, type(constraints.integer_interval(0, 1))):
        return None
    lower = torch.as_tensor(support.lower_bound).unique()
    upper = torch.as_tensor(support.upper_bound).unique()
    if lower.numel() != 1 or upper.numel() != 1:
        return None
    return int(lower), int(upper)
