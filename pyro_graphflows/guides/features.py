"""How values become network inputs: flat, on the real line, of unit scale.

Networks and regressions want inputs without heavy tails and of order one. Each conditioning node gets an
elementwise map chosen when the guide is set up (identity where it does no harm, so that linear-Gaussian models
stay linear), and all get a shift and a scale.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_graphflows.regression import HEAVY_TAIL, MOST_QUANTILE_ROWS, TINY, location_and_scale
from pyro_graphflows.shapes import broadcast_shapes

__all__ = ["FeatureMap", "concatenate"]

_POSITIVE = (type(constraints.greater_than(0.0)), type(constraints.greater_than_eq(0.0)))
KINDS = ("identity", "log", "logit", "log1p", "asinh")  # their places in states: new ones come last
_COUNT = (type(constraints.nonnegative_integer), type(constraints.positive_integer))


def concatenate(parts: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
    """Concatenate along the last dimension; batch shapes broadcast.

    Args:
        parts: The tensors, each of shape ``(*batch, size)``.
        like: A tensor whose batch shape takes part too, and whose type that of no parts is.
    """
    if not parts:
        return torch.zeros(0) if like is None else like.new_zeros(*like.shape[:-1], 0)
    if len(parts) == 1 and like is None:
        return parts[0]
    shapes = [part.shape[:-1] for part in parts] + ([] if like is None else [like.shape[:-1]])
    shape = broadcast_shapes(*shapes)
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


def _kind(support: constraints.Constraint | None, sample: Tensor) -> str:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if (
        isinstance(support, _POSITIVE)
        and not torch.is_tensor(support.lower_bound)
        and support.lower_bound == 0
    ):
        return "log"
    if support is constraints.unit_interval:
        return "logit"
    if isinstance(support, _COUNT) and bool((sample >= 0).all()):
        return "log1p"
    if sample.shape[0] < 2 or support is constraints.boolean or support is constraints.one_hot:
        return "identity"
    shift, scale = location_and_scale(sample)
    heavy = bool((((sample - shift) / scale).abs() > HEAVY_TAIL).any())
    return "asinh" if heavy else "identity"


class FeatureMap(nn.Module):
    """The elementwise map from the values of conditioning nodes to features of order one.

    Which kinds of maps these are is part of the state, as it may have been chosen from samples: a state means nothing
    with others.

    Args:
        support: The support of an observed site; ``None`` for an input.
        sample: Values in rows from which kind, shift and scale are found, shape ``(n, size)``.
        standardize: Whether to choose a kind, a shift and a scale; if not, this is the identity.
    """

    centre: Tensor
    width: Tensor
    shift: Tensor
    scale: Tensor
    kind_of_columns: Tensor

    def __init__(
        self, support: constraints.Constraint | None, sample: Tensor, standardize: bool = True
    ) -> None:
        super().__init__()
        sample = sample[torch.isfinite(sample).all(-1)]
        size = sample.shape[-1]
        kind = _kind(support, sample) if standardize else "identity"
        self._set_kinds([(kind, slice(0, size))])
        centre, width = sample.new_zeros(size), sample.new_ones(size)
        if kind == "asinh":
            quartiles = sample.new_tensor([0.25, 0.5, 0.75])
            lower, centre, upper = torch.quantile(sample[:MOST_QUANTILE_ROWS], quartiles, dim=0)
            width = torch.where(upper > lower, upper - lower, width)
        self.register_buffer("centre", centre)
        self.register_buffer("width", width)
        self.register_buffer("shift", sample.new_zeros(size))
        self.register_buffer("scale", sample.new_ones(size))
        if standardize and sample.shape[0] > 1:
            self.shift, self.scale = location_and_scale(self(sample))

    @classmethod
    def join(cls, maps: "list[FeatureMap]") -> "FeatureMap":
        """Return the map of the concatenation of several nodes' values."""
        joined = cls(None, torch.zeros(0, 0), standardize=False)
        kinds = []
        start = 0
        for each in maps:
            for kind, columns in each.kinds:
                kinds.append((kind, slice(start + columns.start, start + columns.stop)))
            start += len(each.shift)
        joined._set_kinds(kinds)
        for name in ("centre", "width", "shift", "scale"):
            setattr(
                joined, name, torch.cat([getattr(each, name) for each in maps]) if maps else torch.zeros(0)
            )
        return joined

    @classmethod
    def of_kinds(cls, kinds: Sequence[tuple[str, slice]]) -> "FeatureMap":
        """Return a map of given kinds, without shift and scale, for a state that is loaded."""
        size = max((columns.stop for _, columns in kinds), default=0)
        new = cls(None, torch.zeros(0, size), standardize=False)
        new._set_kinds(kinds)
        return new

    def _set_kinds(self, kinds: Sequence[tuple[str, slice]]) -> None:
        self.kinds = list(kinds)
        codes = [KINDS.index(kind) for kind, columns in kinds for _ in range(columns.start, columns.stop)]
        self.register_buffer("kind_of_columns", torch.tensor(codes, dtype=torch.int8))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.kind_of_columns.is_meta:
            codes = self.kind_of_columns.tolist()
            self.kinds = [(KINDS[codes[c.start]] if c.stop > c.start else kind, c) for kind, c in self.kinds]

    def forward(self, flat: Tensor) -> Tensor:
        """Map values, shape ``(*batch, size)``, to features of the same shape; NaN for those outside of a support."""
        if any(kind != "identity" for kind, _ in self.kinds):
            parts = [self._apply_kind(kind, flat[..., columns], columns) for kind, columns in self.kinds]
            flat = torch.cat(parts, -1)
        return (flat - self.shift) / self.scale

    def _apply_kind(self, kind: str, x: Tensor, columns: slice) -> Tensor:
        if kind == "log":
            return torch.where(x < 0, torch.nan, x.clamp(min=TINY).log())
        if kind == "logit":
            return torch.where((x < 0) | (x > 1), torch.nan, torch.logit(x, eps=1e-6))
        if kind == "log1p":
            return torch.where(x < 0, torch.nan, x.clamp(min=0).log1p())
        if kind == "asinh":
            return ((x - self.centre[columns]) / self.width[columns]).asinh()
        return x

    def extra_repr(self) -> str:
        """Name the kinds of the maps."""
        return ", ".join(kind for kind, _ in self.kinds)
