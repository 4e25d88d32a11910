"""The sites of a model as a guide sees them: values as flat vectors and back, as network inputs, and their priors.

A latent site has a flat vector on the unconstrained real line; networks and regressions want numbers whose distances
mean something. A binary value is 0 or 1 as it is; a value among ``K`` classes becomes ``K`` indicators. Counts
without a bound stay numbers. Of data with missing entries, it counts what is there and where.

Networks and regressions want inputs without heavy tails and of order one, too. Each conditioning node gets an
elementwise map (:class:`FeatureMap`) chosen when the guide is set up (identity where it does no harm, so that
linear-Gaussian models stay linear), and all get a shift and a scale.

To conditionals, the model's own distribution of a site is a :class:`SitePrior`: normal in a coordinate of the site's
flat vector, or logits of classes.
"""

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import pyro.infer.reparam
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
    StickBreakingTransform,
    Transform,
    identity_transform,
)

from pyro_graphflows.capture import CAPTURING
from pyro_graphflows.distributions.coordinates import GaussianCoordinate, gaussian_coordinate, is_well_defined
from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.inspect import TracedModel, get_argument
from pyro_graphflows.inspect.runs import ends_of, support_of, undressed
from pyro_graphflows.regression import (
    HEAVY_TAIL,
    MOST_QUANTILE_ROWS,
    TINY,
    in_float64,
    location_and_scale,
    only_finite_rows,
)

__all__ = [
    "REMEDIES_OF_NAN",
    "DiscreteEncoding",
    "Evidence",
    "FeatureMap",
    "InputEncodings",
    "JointFactor",
    "LatentSite",
    "SitePrior",
    "at_an_end",
    "concatenate",
    "flatten_event",
    "has_prior",
    "input_encodings",
    "is_constant",
    "is_identity",
    "is_moderate",
    "is_normal_unconstrained",
    "latent_sites",
    "moved_support",
    "outside_of_support",
    "partly_observed",
    "require_inside",
    "site_prior",
]

# the supports of mixtures; older versions of torch have those of their components
OF_MIXTURES: Any = getattr(constraints, "MixtureSameFamilyConstraint", ())
ROUNDING = 1e-4  # relative; beside a support by this much is inside
REMEDIES_OF_NAN = (
    "Remove them, or model them as missing, with values of any kind in their places: with seen = torch.isfinite(y) and "
    "obs=torch.nan_to_num(y), either pyro.sample(..., obs_mask=seen) or poutine.mask(mask=seen) around the site. Set "
    "the guide up with data that have missing entries."
)


def flatten_event(value: Tensor, event_dim: int) -> Tensor:
    """Return a value with its event dimensions flattened to one, as floating point.

    Shape:
        - Input: ``(*batch, *event)`` with ``event_dim`` event dimensions.
        - Output: ``(*batch, n)``.
    """
    flat = value.reshape(*value.shape[: value.dim() - event_dim], -1)
    return flat if flat.is_floating_point() else flat.to(torch.get_default_dtype())


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
        if _is_like(support, constraints.boolean):
            return cls("binary", shape, 1, 0, dtype)
        if _is_like(support, constraints.one_hot):
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
        return self.kind == "counts" or _is_like(base, kinds[self.kind])

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

    def moved(self, convert: Callable[[Tensor], Tensor]) -> "DiscreteEncoding":
        """Return the same for values of the type to which a tensor is converted."""
        return replace(self, dtype=convert(torch.zeros((), dtype=self.dtype)).dtype)

    def __str__(self) -> str:
        many = "" if self.num_elements == 1 else f"{self.num_elements} x "
        if self.kind in ("binary", "counts"):
            return many + self.kind
        return f"{many}{self.num_classes} classes"


def _is_like(support: Any, constraint: constraints.Constraint) -> bool:
    """Whether a support is this constraint without parameters, or a copy of it, as guides that were copied have."""
    return type(support) is type(constraint)


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


@dataclass(frozen=True)
class LatentSite:
    """A latent site as it was at set-up.

    Attributes:
        name: The site.
        event_shape: The shape of one value.
        unconstrained_shape: The shape of one value before the bijection to the support.
        support: The support.
        encoding: For discrete sites, how values are written as vectors.
        transform: The bijection from the unconstrained space to the support (of no use for discrete sites).
        bijection: The same without parts that do nothing.
        size: The length of the flat unconstrained vector.
        is_real: Whether values are unconstrained as they are.
    """

    name: str
    event_shape: torch.Size
    unconstrained_shape: torch.Size
    support: constraints.Constraint
    encoding: DiscreteEncoding | None = None
    transform: Transform = field(init=False)
    bijection: Transform = field(init=False)
    size: int = field(init=False)
    is_real: bool = field(init=False)

    def __post_init__(self) -> None:
        transform = biject_to(self.support) if self.encoding is None else identity_transform
        object.__setattr__(self, "transform", transform)
        object.__setattr__(self, "bijection", without_idle_parts(transform))
        object.__setattr__(self, "size", self.unconstrained_shape.numel())
        object.__setattr__(self, "is_real", self.encoding is None and is_identity(self.transform))

    def moved(self, convert: Callable[[Tensor], Tensor]) -> "LatentSite":
        """Return the same site for a guide on another device, or of another type."""
        if self.encoding is not None:
            return replace(
                self, encoding=self.encoding.moved(convert), support=moved_support(self.support, convert)
            )
        if is_constant(self.support):
            return self
        return replace(self, support=moved_support(self.support, convert))


def without_idle_parts(transform: Transform) -> Transform:
    """Return a transform without the shift by zero and scaling by one that torch has for the positive numbers.

    Example:
        >>> without_idle_parts(biject_to(constraints.positive))
        ExpTransform()
    """
    if not isinstance(transform, ComposeTransform):
        return transform
    parts = [part for part in transform.parts if not _is_idle(part)]
    return parts[0] if len(parts) == 1 else transform


def _is_idle(part: Transform) -> bool:
    if not isinstance(part, AffineTransform):
        return False
    numbers = part.loc, part.scale
    return not any(isinstance(number, Tensor) for number in numbers) and numbers == (0, 1)


def outside_of_support(support: constraints.Constraint, value: Tensor, log_density: Tensor) -> Tensor:
    """Return which data are outside of the support of their distribution.

    A finite density says little: many densities are formulas that hold anywhere. Beside the support by rounding is
    inside; so are values between those of a discrete distribution, as soft labels are, if they have a density.

    Args:
        support: The support.
        value: The data.
        log_density: Their log-density, of their batch shape.

    Example:
        >>> from torch.distributions import constraints
        >>> y = torch.tensor([0.5, 1.5])
        >>> outside_of_support(constraints.unit_interval, y, torch.zeros(2)).tolist()
        [False, True]
        >>> outside_of_support(constraints.boolean, y, torch.zeros(2)).tolist()
        [False, True]
    """
    outside = ~support.check(value)
    if not bool(outside.any()):
        return outside
    near = _between(support, value) if support.is_discrete else _beside(support, value)
    return outside & ~(near & torch.isfinite(log_density))


def at_an_end(support: constraints.Constraint, value: Tensor, log_density: Tensor) -> Tensor:
    """Return which data of a continuous distribution are at an end of its support with an infinite log-density.

    Args:
        support: The support.
        value: The data.
        log_density: Their log-density, of their batch shape.

    Example:
        >>> from torch.distributions import constraints
        >>> y = torch.tensor([0.0, 0.5])
        >>> at_an_end(constraints.unit_interval, y, dist.Beta(2.0, 2.0).log_prob(y)).tolist()
        [True, False]
    """
    found = torch.isinf(log_density)
    bounds = (0.0, 1.0) if support is constraints.simplex else ends_of(support)
    if bounds is None or not bool(found.any()):
        return torch.zeros_like(found)
    ends = (value == bounds[0]) | (value == bounds[1])
    return found & ends.reshape(*found.shape, -1).any(-1)


def require_inside(name: str, value: Tensor, support: constraints.Constraint) -> None:
    """Refuse values of a site outside of its support.

    Raises:
        GraphflowsError: If there are any. The message names the site.
    """
    inside = torch.as_tensor(support.check(value))
    # Beside it by rounding, as sums of probabilities are, does no harm.
    harmless = not support.is_discrete and bool(biject_to(support).inv(value).isfinite().all())
    if not (harmless or bool(inside.all())):
        raise GraphflowsError(
            f"Expected values of {name!r} in its support, {support}; {int((~inside).sum())} of {inside.numel()} are "
            "outside of it or NaN."
        )


def _beside(support: constraints.Constraint, value: Tensor) -> Tensor:
    """Return which values are in a continuous support but for rounding: where a map into it and back leaves them."""
    event_dim = support.event_dim
    while isinstance(support, OF_MIXTURES):
        support = support.base_constraint
    none = torch.zeros(value.shape[: value.dim() - event_dim], dtype=torch.bool, device=value.device)
    try:
        into = biject_to(support)
        back = into(into.inv(value))
    except (NotImplementedError, RuntimeError):  # no such map; no inverse of what is far outside
        return none
    close = (back - value).abs() <= ROUNDING * (1 + value.abs())
    return close.flatten(close.dim() - event_dim).all(-1) if event_dim else close


def _between(support: constraints.Constraint, value: Tensor) -> Tensor:
    """Return which values are between those of a discrete support."""
    base = _base(support)
    if base.event_dim == 0:
        return support.check(value.floor()) & support.check(value.ceil())
    positive = (value >= 0).all(-1)
    if _is_like(base, constraints.one_hot):
        positive &= (value.sum(-1) - 1).abs() <= ROUNDING
    return positive.flatten(value.dim() - support.event_dim).all(-1) if support.event_dim > 1 else positive


def is_constant(support: constraints.Constraint) -> bool:
    """Whether a support holds no tensor (a bound may depend on data or on other sites)."""
    return not any(
        torch.is_tensor(value) or (isinstance(value, constraints.Constraint) and not is_constant(value))
        for value in vars(support).values()
    )


def moved_support(
    support: constraints.Constraint, convert: Callable[[Tensor], Tensor]
) -> constraints.Constraint:
    """Return a support with its bounds moved; itself where it holds no tensor."""
    if is_constant(support):
        return support
    new = copy.copy(support)
    for key, value in vars(support).items():
        if torch.is_tensor(value):
            setattr(new, key, convert(value))
        elif isinstance(value, constraints.Constraint):
            setattr(new, key, moved_support(value, convert))
    return new


def is_identity(transform: Transform) -> bool:
    """Return whether a transform leaves values as they are."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform is identity_transform


def latent_sites(traced: TracedModel, custom: Collection[str] = ()) -> dict[str, LatentSite]:
    """Return the latent sites of a traced model that get a factor.

    Args:
        traced: The traced model.
        custom: The sites for which the user gave a factor.

    Raises:
        UnsupportedModelError: If one of the others is discrete and its values are not among finitely many classes, or
            no bijection maps the support of one to the real line.
    """
    sites = {}
    for name in traced.graph.latent:
        site: Any = traced.trace.nodes[name]
        fn = site["fn"]
        event_shape = torch.Size(fn.event_shape)
        if fn.support.is_discrete:
            encoding = DiscreteEncoding.of(fn, site["value"].dtype)
            if encoding.kind == "counts" and name not in custom:
                raise UnsupportedModelError(
                    f"Expected discrete latent sites with values among finitely many classes; site {name!r} is "
                    f"{type(fn).__name__} with support {fn.support}. Give a factor for it, factors={{{name!r}: ...}} "
                    "(a subclass of Factor whose distribution is one over counts), or replace it by a site with "
                    "finitely many values."
                )
            sites[name] = LatentSite(name, event_shape, torch.Size([encoding.size]), fn.support, encoding)
            continue
        try:
            support = support_of(fn)
            transform = biject_to(support)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"Expected latent sites whose support a bijection maps to the real line; site {name!r} is "
                f"{type(fn).__name__} with support {fn.support}. {_reparametriser(fn, name)}."
            ) from error
        unconstrained = transform.inverse_shape(torch.Size(fn.batch_shape) + event_shape)
        sites[name] = LatentSite(name, event_shape, torch.Size(unconstrained[len(fn.batch_shape) :]), support)
    return sites


def _reparametriser(fn: Any, name: str) -> str:
    """Say how to write a site without a bijection otherwise: by a reparametriser of Pyro, where it has one."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    kind = f"{type(fn).__name__}Reparam"
    if hasattr(pyro.infer.reparam, kind):
        return (
            f"Reparametrise it: poutine.reparam(model, config={{{name!r}: {kind}()}}), with {kind} of "
            "pyro.infer.reparam, as the model of the guide and of the loss"
        )
    if isinstance(fn, dist.MixtureSameFamily):
        return (
            "A mixture leaves its support open; say it, by a distribution of your own with the support of the "
            "components: class Mixture(dist.MixtureSameFamily): support = torch.distributions.constraints.real"
        )
    if fn.support is constraints.positive_definite:
        return (
            "Sample what the matrix is made of: a Cholesky factor L from dist.LKJCholesky, and positive scales; the "
            "covariance is (scales[..., None] * L) @ (scales[..., None] * L).mT"
        )
    return (
        "Reparametrise it: sample normal values, and compute from them what the model needs (normalise a vector for a "
        "direction)"
    )


def partly_observed(traced: TracedModel) -> tuple[str, ...]:
    """Return the observed halves of the sites with ``obs_mask=``."""
    halves = [name for name in traced.graph.observed if name.endswith("_observed")]
    return tuple(n for n in halves if n.removesuffix("_observed") + "_unobserved" in traced.graph.latent)


@dataclass(frozen=True)
class InputEncodings:
    """How values of the nodes that a guide conditions on are written as flat vectors; made by :func:`input_encodings`.

    Attributes:
        event_dims: The nodes that can be network inputs, with their numbers of event dimensions.
        classes: The encodings of observed sites whose values are classes: numbers that only tell them apart.
        partly: The partly observed sites, with their numbers of event dimensions.
        patterns: The inputs of which only the pattern of missing entries counts.
        gappy: The other inputs with missing entries at set-up, with the numbers of their event dimensions: their
            elements, zero where missing, and where they are.
    """

    event_dims: Mapping[str, int]
    classes: Mapping[str, DiscreteEncoding] = field(default_factory=dict)
    partly: Mapping[str, int] = field(default_factory=dict)
    patterns: frozenset[str] = frozenset()
    gappy: Mapping[str, int] = field(default_factory=dict)

    def flat(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the value of an observed site or an input as a flat vector; classes as indicators.

        Shape:
            - Output: ``(*batch, n)``, of the given type (the default type) unless the value has a floating-point type.
        """
        dtype = dtype or torch.get_default_dtype()
        if name in self.classes and name not in self.partly:
            encoding = self.classes[name]
            flat = encoding.encode(value, dtype)
            outside = (value < encoding.lowest) | (value >= encoding.lowest + encoding.num_classes)
            outside = outside.reshape(*flat.shape[:-1], -1).repeat_interleave(encoding.num_classes, -1)
            return flat.masked_fill(outside, torch.nan)  # which is refused by name
        flat = value.reshape(*value.shape[: value.dim() - self.event_dims[name]], -1)
        return flat if flat.is_floating_point() else flat.to(dtype)

    def moved(self, convert: Callable[[Tensor], Tensor]) -> "InputEncodings":
        """Return the same for a guide of another type."""
        return replace(self, classes={name: one.moved(convert) for name, one in self.classes.items()})

    def input_value(self, name: str, value: Tensor) -> Tensor:
        """Return the conditioning value of an input: of data with gaps, where these are (and what is there)."""
        if name in self.gappy:
            flat = flatten_event(value, self.gappy[name])
            seen = torch.isfinite(flat)
            return torch.cat([torch.where(seen, flat, torch.zeros_like(flat)), seen.to(flat.dtype)], -1)
        return torch.isfinite(value).to(value.dtype) if name in self.patterns else value

    def masked_value(self, name: str, value: Tensor, mask: Tensor | bool | None) -> Tensor:
        """Return the conditioning value of a partly observed site: its elements, zero where missing, and the mask.

        Shape:
            - Output: ``(*batch, n + 1)`` for values of ``n`` elements.
        """
        if name in self.classes:
            flat = self.classes[name].encode(value, torch.get_default_dtype())
        else:
            flat = flatten_event(value, self.partly[name])
        seen = torch.as_tensor(True if mask is None else mask, device=flat.device)
        seen = seen.expand(flat.shape[:-1]).unsqueeze(-1)
        return torch.cat([torch.where(seen, flat, torch.zeros_like(flat)), seen.to(flat.dtype)], -1)


def input_encodings(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], traced: TracedModel
) -> InputEncodings:
    """Return how the conditioning values of a traced model are written.

    Factors and observed values that are computed from latent sites have no data and are left out, and so are
    integer inputs: they are indices. Inputs with NaN, beside partly observed sites, are data of which only the
    pattern of missing entries counts; of other inputs with NaN, what is there counts too.

    Args:
        model: The model.
        args: The positional arguments that it was traced with.
        kwargs: Its keyword arguments.
        traced: The traced model.
    """
    nodes: Any = traced.trace.nodes
    with_data = [name for name in traced.graph.observed if name not in traced.without_data]
    classes = {}
    for name in with_data:
        if nodes[name]["fn"].support.is_discrete:
            encoding = DiscreteEncoding.of(nodes[name]["fn"], nodes[name]["value"].dtype)
            if encoding.kind == "classes" and not encoding.dtype.is_floating_point:
                classes[name] = encoding
    partly = {name: len(nodes[name]["fn"].event_shape) for name in partly_observed(traced)}
    dims = {name: len(nodes[name]["fn"].event_shape) for name in with_data}
    dims.update(dict.fromkeys(partly, 1))
    dims.update((name, dim) for name, dim in traced.event_dims.items() if name not in traced.index_inputs)
    paths = traced.argument_paths
    of_partly = [paths[name] for name in partly if name in paths]
    patterns, gappy = set(), {}
    for name in traced.graph.inputs:
        value = get_argument(model, paths[name], args, kwargs)
        if value is None:  # the row of a loop
            continue
        has_gaps = value.is_floating_point() and not value.is_meta and bool(torch.isnan(value).any())
        if partly and (paths[name] in of_partly or has_gaps):
            patterns.add(name)
        elif has_gaps:
            gappy[name] = dims[name]
            dims[name] = 1
    return InputEncodings(dims, classes, partly, frozenset(patterns), gappy)


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
    shape = shapes[0]
    if any(other != shape for other in shapes):
        shape = torch.Size(np.broadcast_shapes(*shapes))
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


def _kind(support: constraints.Constraint | None, sample: Tensor) -> tuple[str, tuple[Tensor, Tensor] | None]:
    """Return the kind of map, and location and scale of the values where they were found on the way."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if (
        isinstance(support, _POSITIVE)
        and not torch.is_tensor(support.lower_bound)
        and support.lower_bound == 0
    ):
        return "log", None
    if support is constraints.unit_interval:
        return "logit", None
    if isinstance(support, _COUNT) and bool((sample >= 0).all()):
        return "log1p", None
    if sample.shape[0] < 2 or any(
        _is_like(support, each) for each in (constraints.boolean, constraints.one_hot)
    ):
        return "identity", None
    shift, scale = location_and_scale(sample)
    heavy = bool(((sample - shift).abs() > HEAVY_TAIL * scale).any())
    return "asinh" if heavy else "identity", (shift, scale)


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
        sample = only_finite_rows(sample) if len(sample) else sample
        size = sample.shape[-1]
        kind, known = _kind(support, sample) if standardize else ("identity", None)
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
            found = known if kind == "identity" else None
            self.shift, self.scale = location_and_scale(self(sample)) if found is None else found

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
        self._runs = _merged(self.kinds)
        codes = [KINDS.index(kind) for kind, columns in kinds for _ in range(columns.start, columns.stop)]
        self.register_buffer("kind_of_columns", torch.tensor(codes, dtype=torch.int8))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.kind_of_columns.is_meta:
            codes = self.kind_of_columns.tolist()
            self.kinds = [(KINDS[codes[c.start]] if c.stop > c.start else kind, c) for kind, c in self.kinds]
            self._runs = _merged(self.kinds)

    def forward(self, flat: Tensor) -> Tensor:
        """Map values, shape ``(*batch, size)``, to features of the same shape; NaN for those outside of a support."""
        if len(self._runs) == 1:
            flat = self._apply_kind(*self._runs[0], flat)
        elif len(self._runs) > 1:
            parts = [self._apply_kind(kind, columns, flat[..., columns]) for kind, columns in self._runs]
            flat = torch.cat(parts, -1)
        return (flat - self.shift) / self.scale

    def _apply_kind(self, kind: str, columns: slice, x: Tensor) -> Tensor:
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


def _merged(kinds: Sequence[tuple[str, slice]]) -> list[tuple[str, slice]]:
    """Return neighbours of one kind as one."""
    merged: list[tuple[str, slice]] = []
    for kind, columns in kinds:
        if columns.stop > columns.start and merged and merged[-1][0] == kind:
            merged[-1] = kind, slice(merged[-1][1].start, columns.stop)
        elif columns.stop > columns.start:
            merged.append((kind, columns))
    return merged


# ---------------------------------------------------------------- priors of sites

WIDEST = 60.0  # units of logarithms between scores of -2 and 2 of a prior that is not extreme
WITHOUT_PARAMETERS = (ExpTransform, SigmoidTransform, StickBreakingTransform, OrderedTransform)


@dataclass(frozen=True)
class Evidence:
    r"""Factors beside a prior, multiplied: :math:`\exp(-\lambda y^2 / 2 + \eta y)`, in a standardised coordinate.

    Attributes:
        parameters: The precision and the precision times the location, ``(*batch, 2)``.
        shift: The shift of the coordinate, ``(1,)``.
        scale: Its scale.
    """

    parameters: Tensor
    shift: Tensor
    scale: Tensor


@dataclass(frozen=True)
class SitePrior:
    r"""The model's own distribution of a site, in the coordinate in which it is fused.

    Attributes:
        loc: The location, ``(*batch, size)``; of a discrete site its logits, of the length of its flat vector.
        log_scale: The logarithm of the scale, ``(*batch, size)``; of a multivariate normal, of its marginal scales.
        scale_tril: Of a multivariate normal the Cholesky factor of its covariance, ``(*batch, size, size)``.
        transform: The map from the coordinate to the value where the coordinate is not the unconstrained vector.
        standard: Whether the coordinate is the normal score of the prior.
        fixed: Where the prior depends on parameters of the model, and on nothing else of which gradients are wanted,
            the same prior without gradients: for values that are given, of which the model's parameters have no say.
        evidence: Factors of the elements of a plate (:mod:`~pyro_graphflows.guides.conditionals.summed`).
    """

    loc: Tensor
    log_scale: Tensor
    scale_tril: Tensor | None = None
    transform: Transform | None = None
    standard: bool = False
    fixed: "SitePrior | None" = None
    evidence: Evidence | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether the prior depends on something of which gradients are wanted."""
        return any(each.requires_grad for each in self._tensors())

    def _tensors(self) -> list[Tensor]:
        tril = [] if self.scale_tril is None else [self.scale_tril]
        return [self.loc, self.log_scale, *tril, *getattr(self.transform, "parameters", ())]

    def map(self, convert: Callable[[Tensor], Tensor]) -> "SitePrior":
        """Return the same with location and scales converted; the coordinate stays."""
        tril = None if self.scale_tril is None else convert(self.scale_tril)
        evidence = self.evidence
        if evidence is not None:
            evidence = replace(evidence, parameters=convert(evidence.parameters))
        return replace(
            self, loc=convert(self.loc), log_scale=convert(self.log_scale), scale_tril=tril, evidence=evidence
        )

    def with_evidence(self, evidence: Evidence | None) -> "SitePrior":
        """Return the same beside factors of elements."""
        fixed = None if self.fixed is None else self.fixed.with_evidence(evidence)
        return replace(self, evidence=evidence, fixed=fixed)

    def tril(self) -> Tensor:
        """Return the Cholesky factor of the covariance, also where that is diagonal."""
        return self.log_scale.exp().diag_embed() if self.scale_tril is None else self.scale_tril


@dataclass(frozen=True)
class JointFactor:
    """A normal factor of all numbers of a site, in the coordinate in which its prior is normal.

    Attributes:
        loc: Its location, ``(numbers,)``, in the order of the site's batch.
        covariance: Its covariance, ``(numbers, numbers)``.
        prior_precision: That of the prior near the mode, ``(numbers,)``.
        shape: The batch shape of the site.
        slopes: By how much the location changes with the vectors of other sites, ``(numbers, their size)``; it is
            ``loc`` where these are zero.
    """

    loc: Tensor
    covariance: Tensor
    prior_precision: Tensor
    shape: torch.Size
    slopes: Mapping[str, Tensor] = field(default_factory=dict)

    def in_groups(self, dims: Sequence[int]) -> tuple["JointFactor", ...]:
        """Return one factor for each element of the other plates; numbers of different ones are taken as independent.

        Args:
            dims: The dimensions of the plates along which numbers are drawn jointly, negative, increasing.
        """
        places = torch.arange(len(self.loc)).reshape(*self.shape, 1)
        if dims:
            moved = places.squeeze(-1).movedim(list(dims), list(range(-len(dims), 0)))
            places = moved.flatten(-len(dims))
        size = places.shape[-1:]
        return tuple(
            JointFactor(
                self.loc[own],
                self.covariance[own.unsqueeze(-1), own],
                self.prior_precision[own],
                size,
                {name: slopes[own] for name, slopes in self.slopes.items()},
            )
            for own in places.reshape(-1, *size)
        )


def site_prior(site: LatentSite, fn: Any, *, checked: bool = True) -> SitePrior:
    """Return a distribution of the model as the prior of a site.

    Args:
        site: The site.
        fn: Its distribution, for which :func:`has_prior` holds.
        checked: Whether to refuse parameters out of their range.

    Raises:
        GraphflowsError: If a parameter is not in its range, a scale zero or infinite for example.
    """
    if site.encoding is not None:
        logits = _logits(site, fn)
        assert logits is not None
        return SitePrior(logits, torch.zeros_like(logits))
    coordinate = gaussian_coordinate(fn)
    assert coordinate is not None
    dims = coordinate.batch_dims
    loc, scale = (
        part.unsqueeze(-1) if part.dim() == dims else part.flatten(dims)
        for part in (coordinate.loc, coordinate.scale)
    )
    log_scale = scale.log()
    if checked and not (loc.is_meta or CAPTURING.get()):
        total = float(loc.detach().sum() + log_scale.detach().sum())  # finite if all of them are
        if coordinate.standard or not math.isfinite(total):
            _require_well_defined(site, fn, coordinate, loc, scale)
    transform = None if _is_unconstrained(site, coordinate) else coordinate.transform
    return SitePrior(loc, log_scale, coordinate.scale_tril, transform, coordinate.standard)


def _require_well_defined(
    site: LatentSite, fn: Any, coordinate: GaussianCoordinate, loc: Tensor, scale: Tensor
) -> None:
    """Refuse a prior with a parameter out of its range."""
    good = torch.isfinite(loc) & torch.isfinite(scale) & (scale > 0)
    if coordinate.standard:
        each = is_well_defined(fn).expand(fn.batch_shape + fn.event_shape)
        good = good & each.reshape(*fn.batch_shape, -1)
    if not bool(good.all()):
        raise GraphflowsError(
            f"Expected a prior of {site.name!r} with finite parameters and a positive scale at the values that its "
            f"parents have; got {type(undressed(fn)).__name__} with others in {int((~good).sum())} of {good.numel()} "
            "elements. Bound the scale away from zero in the model (scale + 1e-6, or a clamp), take a prior of its "
            "parents that does not reach there, or leave the prior out: "
            f"factors={{{site.name!r}: Normal(fusion=False)}}."
        )


def has_prior(site: LatentSite, fn: Any) -> bool:
    """Whether a distribution of the model can be fused: it is normal in some coordinate, or has logits.

    Args:
        site: The site.
        fn: The model's distribution of it.
    """
    if site.encoding is not None:
        return _logits(site, fn) is not None
    coordinate = gaussian_coordinate(fn)
    if coordinate is None or (coordinate.scale_tril is not None and len(fn.event_shape) != 1):
        return False
    return coordinate.loc.shape[coordinate.batch_dims :].numel() == site.size


def is_normal_unconstrained(site: LatentSite, fn: Any) -> bool:
    """Whether a distribution of the model is normal in unconstrained space; discrete ones count as such.

    Args:
        site: The site.
        fn: The model's distribution of it.
    """
    if site.encoding is not None:
        return True
    coordinate = gaussian_coordinate(fn)
    return coordinate is not None and _is_unconstrained(site, coordinate)


def is_moderate(fn: Any) -> bool:
    """Whether the coordinate in which a prior is normal is fit for a search, and for a start.

    That of a gamma prior with the shape 0.001 is not: its median is 1e-300.

    Args:
        fn: The model's distribution of a site.
    """
    improper = isinstance(undressed(fn), dist.ImproperUniform)
    coordinate = None if improper else gaussian_coordinate(fn)
    if coordinate is None or not coordinate.standard:
        return coordinate is not None
    loc = in_float64(coordinate.loc)  # values of single precision would end where that does
    support = support_of(fn)
    to_support = biject_to(support)
    try:
        ends = [to_support.inv(coordinate.transform(w + loc)) for w in (-2.0, 2.0)]
    except ValueError:  # scores so far out that they cannot be inverted
        return False
    width = (ends[1] - ends[0]).abs()
    unbounded = to_support.domain is support
    return bool(torch.isfinite(width).all()) and (unbounded or bool((width < WIDEST).all()))


def _is_unconstrained(site: LatentSite, coordinate: GaussianCoordinate) -> bool:
    """Whether a coordinate is the unconstrained vector of the site."""
    if coordinate.standard:
        return False
    if is_identity(coordinate.transform):
        return site.is_real
    own, kind = site.transform, type(coordinate.transform)
    while isinstance(own, IndependentTransform):
        own = own.base_transform
    return kind is type(own) and kind in WITHOUT_PARAMETERS


def _logits(site: LatentSite, fn: Any) -> Tensor | None:
    """Return the logits of a distribution over classes as the site's flat vector is laid out; None without."""
    assert site.encoding is not None
    events = len(fn.event_shape)
    inner = undressed(fn)
    classes = site.encoding.num_classes
    if isinstance(inner, dist.Bernoulli) and classes == 1 and site.encoding.kind == "binary":
        return _flat(inner.logits, fn.batch_shape + fn.event_shape, events)
    if isinstance(inner, dist.Categorical) and site.encoding.kind == "classes":
        if inner.logits.shape[-1] != classes or site.encoding.lowest != 0:
            return None
        whole = (*fn.batch_shape, *fn.event_shape, classes)
        return _flat(inner.logits, torch.Size(whole), events + 1)
    if isinstance(inner, dist.OneHotCategorical) and site.encoding.kind == "one_hot" and events == 1:
        return _flat(inner.logits, fn.batch_shape + fn.event_shape, 1)
    return None


def _flat(logits: Tensor, shape: torch.Size, event_dims: int) -> Tensor:
    finite = logits.clamp(min=math.log(torch.finfo(logits.dtype).tiny))
    whole = finite.expand(shape)
    return whole.unsqueeze(-1) if event_dims == 0 else whole.flatten(whole.dim() - event_dims)
