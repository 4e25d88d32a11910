"""Running a model: quietly, with values, rows and tensors given; and what a site of a run is.

A quiet run leaves no traces: random states, gradients, buffers and Pyro's handlers outside are as before. Handlers give
sites their values and subsampled plates their indices. What is asked of a site of a trace is here too:
whether it only passes values on, in which plates it is, what its density is.
"""

import inspect
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import biject_to, constraints
from torch.overrides import TorchFunctionMode

from pyro_graphflows.errors import GraphflowsError

__all__ = [
    "GivenRows",
    "GivenValues",
    "Replaced",
    "drawn_rows",
    "ends_of",
    "handled",
    "is_improper",
    "is_masked_out",
    "is_outside",
    "is_transparent",
    "kept_buffers",
    "kept_random_state",
    "log_density_at",
    "plates_of_sites",
    "quiet_run",
    "random_sites",
    "require_pair",
    "rows_of_plates",
    "run_model",
    "seed_random_state",
    "some_value",
    "stand_in",
    "subsampled_loops",
    "support_of",
    "undressed",
    "vectorized_plates",
    "with_flat_priors",
]

# Seeds that users choose are small: with this added, a run of ours repeats none of theirs.
_FAR = 1_594_323_007
_DRESSES = (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)


def require_pair(model: object, guide: object) -> None:
    """Refuse what is no model with a guide for it, or the two in the other order, which Pyro would run.

    Args:
        model: What was given as the model.
        guide: What was given as its guide.

    Raises:
        GraphflowsError: If one of them cannot be called, or the model is a guide of Pyro's or of this package.

    Example:
        >>> require_pair(print, 3)
        Traceback (most recent call last):
        ...
        pyro_graphflows.errors.GraphflowsError: Expected the guide to be a function or module of Pyro statements; got 3.
    """
    for what, program in (("model", model), ("guide", guide)):
        if not callable(program) or isinstance(program, torch.Tensor):
            got = repr(program)
            if isinstance(program, torch.Tensor):
                got = f"a tensor of shape {tuple(program.shape)}"
            raise GraphflowsError(
                f"Expected the {what} to be a function or module of Pyro statements; got {got}."
            )
    if isinstance(model, AutoGuide):
        raise GraphflowsError(
            f"Expected a model and then its guide; got a guide, {type(model).__name__}, where the model belongs. "
            "Exchange the first two arguments."
        )


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave the caller's random states as they were, whatever is drawn inside.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with kept_random_state():
        ...     inside = torch.rand(1), random.random(), np.random.rand()
        >>> bool(torch.rand(1) == inside[0])
        True
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - models draw from the global one
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def seed_random_state(seed: int) -> None:
    """Seed all random states, far from the seeds that users choose; inside of :func:`kept_random_state` only.

    Args:
        seed: The seed, 0 or more.
    """
    torch.manual_seed(_FAR + seed)
    random.seed(_FAR + seed)
    np.random.seed((_FAR + seed) % 2**32)  # noqa: NPY002


def _module_of(model: Callable) -> torch.nn.Module | None:
    inner = inspect.unwrap(model)  # poutine.condition(module, ...) and the like
    owner = getattr(inner, "__self__", inner)
    return owner if isinstance(owner, torch.nn.Module) else None


@contextmanager
def kept_buffers(model: Callable) -> Iterator[None]:
    """Put the buffers of a model that is a module, or a method of one, back as they were (running statistics)."""
    module = _module_of(model)
    before = {} if module is None else {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        current = {} if module is None else dict(module.named_buffers())
        with torch.no_grad():
            for name, value in before.items():
                if name in current and current[name].shape == value.shape:
                    current[name].copy_(value)


@contextmanager
def quiet_run(model: Callable) -> Iterator[None]:
    """Run a model without traces elsewhere.

    The random state, gradients, Pyro's handlers outside and the buffers of the model are as before; parameters
    that the model creates stay.
    """
    with (
        kept_buffers(model),
        kept_random_state(),
        torch.no_grad(),
        pyro.poutine.block(),
        pyro.validation_enabled(False),
    ):
        yield


def run_model(model: Callable, args: tuple, kwargs: dict[str, Any], *handlers: Any) -> Trace:
    """Trace a model inside handlers, outermost first."""
    traced = pyro.poutine.trace(model)
    with ExitStack() as stack:
        stack.enter_context(_ImproperPoint())
        for handler in handlers:
            stack.enter_context(handler)
        return traced.get_trace(*args, **kwargs)


class _ImproperPoint(Messenger):
    """Give sites with an improper prior, which cannot be drawn, some value in their support."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_improper(msg["fn"]) and msg["value"] is None and not msg["is_observed"]:
            msg["value"] = some_value(msg["fn"])
            msg["done"] = True


class _FlatPriors(Messenger):
    """Gives latent sites that are masked altogether the flat density that they have then, without a mask."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["name"] not in self.names or msg["is_observed"] or not is_masked_out(msg):
            return
        msg["mask"] = None
        msg["fn"] = dist.ImproperUniform(fn.support, fn.batch_shape, fn.event_shape)


def with_flat_priors(model: Callable[..., Any], names: Collection[str]) -> Callable[..., Any]:
    """Return the model with improper priors at sites that it masks altogether; the model itself for none.

    Args:
        model: The model.
        names: The sites.
    """
    return handled(model, partial(_FlatPriors, names)) if names else model


def handled(model: Callable[..., Any], handler: Callable[[], Messenger]) -> Callable[..., Any]:
    """Return the model, with its signature, under a handler.

    Args:
        model: The model.
        handler: Makes the handler of a call.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with handler():
            return model(*args, **kwargs)

    return update_wrapper(run, model, updated=())


def is_masked_out(site: Mapping[str, Any]) -> bool:
    """Whether the density at a site counts nowhere, whatever the data are: ``mask(False)``."""
    fn = site["fn"]
    masked = site["mask"] is False
    while not masked and isinstance(fn, _DRESSES):
        masked = getattr(fn, "_mask", None) is False
        fn = fn.base_dist
    return masked


class GivenRows(Messenger):
    """Gives plates their indices."""

    def __init__(self, indices: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.indices and msg["value"] is None:
            msg["value"] = self.indices[msg["name"]].clone()


@contextmanager
def drawn_rows(rows: Mapping[str, torch.Tensor | None], *, alone: bool = False) -> Iterator[None]:
    """Give plates that draw some of their rows these in their place, of whatever number.

    No handler can: a plate that says how many it draws refuses others.

    Args:
        rows: Indices by the name of the plate; None for those that it is given.
        alone: Whether these are all rows that there are: none counts for others.
    """
    plates: Any = SubsampleMessenger
    own = plates._subsample

    def subsample(
        name: str,
        size: Any = None,
        subsample_size: Any = None,
        subsample: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if name in rows:
            given = rows[name]
            subsample_size, subsample = None, subsample if given is None else given
            size = len(subsample) if alone else size
        return own(name, size, subsample_size, subsample, *args, **kwargs)

    plates._subsample = staticmethod(subsample)
    try:
        yield
    finally:
        plates._subsample = staticmethod(own)


class GivenValues(Messenger):
    """Gives sites their values, whether the model samples or observes them, and subsamples their indices.

    Args:
        values: Values by site name; other sites are as in the model.
        stir: Whether to add noise to parameters, which are often equal in the beginning.
    """

    def __init__(self, values: Mapping[str, torch.Tensor], *, stir: bool = False) -> None:
        super().__init__()
        self.values, self.stir = values, stir

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and (site_is_subsample(msg) or not is_transparent(msg)):
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_param(self, msg: Any) -> None:
        if (
            not self.stir
            or not isinstance(msg["value"], torch.Tensor)
            or not msg["value"].is_floating_point()
        ):
            return
        transform = biject_to(msg["kwargs"].get("constraint", dist.constraints.real))
        free = transform.inv(msg["value"].detach())
        msg["value"] = transform(free + 0.1 * torch.randn_like(free))


class Replaced(TorchFunctionMode):
    """Puts tensors in the place of others wherever a function gets these, by their ``id``."""

    def __init__(self, replaced: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self.replaced = replaced

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*self._other(args), **{key: self._other(value) for key, value in (kwargs or {}).items()})

    def _other(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.replaced.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(map(self._other, value))
        return value


def rows_of_plates(trace: Trace) -> dict[str, torch.Tensor]:
    """Return the indices of the plates of a trace."""
    nodes = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    return {
        name: node["value"]
        for name, node in nodes.items()
        if site_is_subsample(node) and isinstance(node["value"], torch.Tensor)
    }


def undressed(fn: Any) -> Any:
    """Strip what only changes the shape or the mask of a distribution."""
    while isinstance(fn, _DRESSES):
        fn = fn.base_dist
    return fn


def log_density_at(fn: Any, value: torch.Tensor) -> torch.Tensor:
    """Return the log-density of a distribution; of one without (a simulator's output) what stands in its place.

    That is a number with the same batch shape which depends on the same values; it says what reaches a site.
    """
    instead = stand_in(fn)
    if instead is None:
        log_density: torch.Tensor = fn.log_prob(value)
        return log_density
    return instead


def stand_in(fn: Any) -> torch.Tensor | None:
    """Return what stands in the place of a log-density that a distribution does not have; else None."""
    make = getattr(undressed(fn), "stand_in", None)
    if make is None:
        return None
    number: torch.Tensor = make()
    inside = len(fn.event_shape) - len(undressed(fn).event_shape)  # made elements of the event by Independent
    return number.flatten(number.dim() - inside).sum(-1) if inside else number.expand(fn.batch_shape)


def support_of(fn: Any) -> constraints.Constraint:
    """Return the support of a distribution.

    Of a transformed one torch knows no more than where its transforms lead: for an exponential that is moved by a
    constant, to the real line. It is the image of the support of what is transformed, where that has bounds.

    Args:
        fn: The distribution.

    Example:
        >>> shifted = [td.AffineTransform(2.0, -1.0)]
        >>> support_of(dist.TransformedDistribution(dist.Exponential(1.0), shifted))
        LessThan(upper_bound=2.0)
        >>> support_of(dist.LogNormal(0.0, 1.0)), support_of(dist.Dirichlet(torch.ones(3)))
        (GreaterThan(lower_bound=0.0), Simplex())
    """
    declared: constraints.Constraint = fn.support
    inner = undressed(fn)
    if getattr(type(inner), "support", None) is not td.TransformedDistribution.support:
        return declared
    base, known = ends_of(support_of(inner.base_dist)), ends_of(declared)
    if (
        base is _EVERYWHERE
    ):  # before numbers are compared, which programs that are mapped over draws do not allow
        return declared
    ends = _ends_of_image(base, inner.transforms)
    if ends is None or known is None:
        return declared
    if all(bool((torch.as_tensor(end) == other).all()) for end, other in zip(ends, known, strict=True)):
        return declared
    bounded = [bool(torch.isfinite(torch.as_tensor(end)).all()) for end in ends]
    found: constraints.Constraint
    if all(bounded):
        found = constraints.interval(*ends)
    elif any(bounded):
        found = constraints.greater_than(ends[0]) if bounded[0] else constraints.less_than(ends[1])
    else:
        return declared
    depth = len(fn.event_shape)
    return constraints.independent(found, depth) if depth else found


_Ends = tuple[Any, Any]  # numbers, or tensors of them
_EVERYWHERE = (-math.inf, math.inf)


def ends_of(support: Any) -> _Ends | None:
    """Return the ends of an interval of real numbers, or of independent ones; None for other supports."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real:
        return _EVERYWHERE
    known = hasattr(support, "lower_bound") or hasattr(support, "upper_bound")
    if not known or support.is_discrete:
        return None
    return getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)


def _ends_of_image(ends: _Ends | None, transforms: Any) -> _Ends | None:
    """Return the ends of what transforms make of an interval; None where that cannot be told."""
    for transform in _parts(transforms):
        domain, codomain = ends_of(transform.domain), ends_of(transform.codomain)
        try:
            sign = torch.as_tensor(transform.sign)
        except NotImplementedError:
            return None
        rises = bool((sign > 0).all())
        if ends is None or domain is None or codomain is None or not (rises or bool((sign < 0).all())):
            return None
        reached = codomain if rises else codomain[::-1]
        is_end = torch.as_tensor(ends[0]) <= domain[0], torch.as_tensor(ends[1]) >= domain[1]
        images = [
            reached[i] if bool(is_end[i].all()) else transform(torch.as_tensor(ends[i])) for i in (0, 1)
        ]
        ends = (images[0], images[1]) if rises else (images[1], images[0])
    return ends


def _parts(transforms: Any) -> Iterator[Any]:
    """Yield the single transforms of elements, in the order in which they are applied."""
    for transform in transforms:
        while isinstance(transform, td.IndependentTransform):
            transform = transform.base_transform
        if isinstance(transform, td.ComposeTransform):
            yield from _parts(transform.parts)
        else:
            yield transform


def is_outside(fn: Any, value: torch.Tensor) -> bool:
    """Whether some values are outside of the support of a distribution, as far as can be told."""
    try:
        return not bool(support_of(fn).check(value).all())
    except Exception:  # a distribution of the user's may have no support
        return False


def is_transparent(msg: Mapping[str, Any]) -> bool:
    """Whether a site passes values on without randomness or data of its own.

    True for :class:`~pyro.distributions.Delta` (also as ``pyro.deterministic`` and ``poutine.reparam`` write
    it, as an observation of itself) and for observations masked out entirely.
    """
    fn = undressed(msg["fn"])
    if isinstance(fn, dist.Delta):
        value = msg["value"]
        return (
            not msg["is_observed"]
            or msg["infer"].get("_deterministic", False)
            or fn.v is value
            or (isinstance(value, torch.Tensor) and _same_memory(fn.v, value))
        )
    return bool(msg["is_observed"] and msg["mask"] is False)


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    try:
        return one.untyped_storage()._cdata == other.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors, wrappers of torch.func
        return False


def vectorized_plates(msg: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the vectorised plates around a site, outer to inner."""
    frames = [frame for frame in msg["cond_indep_stack"] if frame.vectorized]
    return tuple(sorted(frames, key=lambda frame: frame.dim))


def plates_of_sites(sites: Mapping[str, Any]) -> dict[str, Any]:
    """Return the vectorised plates around any of some sites, by name."""
    return {frame.name: frame for site in sites.values() for frame in vectorized_plates(site)}


def random_sites(trace: Any) -> dict[str, Any]:
    """Return the sample sites of a trace that are random or data: not the indices of plates, nor transparent."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not is_transparent(site)
    }


def subsampled_loops(msg: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """Return the subsampled plates that are Python loops around a site, and the iterations that it is in."""
    return tuple(
        (frame.name, (frame.counter - 1) % frame.size)
        for frame in reversed(msg["cond_indep_stack"])
        if not frame.vectorized and frame.full_size is not None and frame.size < frame.full_size
    )


def is_improper(fn: Any) -> bool:
    """Whether a distribution has no density that integrates to one, and cannot be drawn."""
    return isinstance(undressed(fn), dist.ImproperUniform)


def some_value(fn: Any) -> torch.Tensor:
    """Return a draw of a distribution, or, where it is improper, some random value in its support."""
    if not is_improper(fn):
        return torch.as_tensor(fn())
    transform = torch.distributions.biject_to(fn.support)
    return transform(torch.randn(transform.inverse_shape(fn.shape())))
