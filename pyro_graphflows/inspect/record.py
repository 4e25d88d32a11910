"""Run a model once and record, for each site, which sources reach its distribution and its value."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect.taint import Region, TaintTracker, storage_of

__all__ = ["Recorder", "SiteRecord", "is_transparent", "quiet_run"]


@dataclass(frozen=True)
class SiteRecord:
    """What one run shows about a sample site.

    ``reaches_distribution`` and ``reaches_value`` are taints; ``region`` is the piece of an argument that an
    observed value is, ``holds_data`` says whether an observed value is data rather than computed from latent
    variables (or absent, as at a factor).
    """

    name: str
    observed: bool
    enumerated: bool
    holds_data: bool
    reaches_distribution: int
    reaches_value: int
    region: Region | None
    value_id: int
    plates: tuple[Any, ...]
    event_size: int
    event_shape: torch.Size
    batch_shape: torch.Size


def undressed(fn: Any) -> Any:
    """Strip what only changes the shape or the mask of a distribution."""
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


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
    mine, theirs = storage_of(one), storage_of(other)
    return mine is not None and theirs is not None and mine._cdata == theirs._cdata


def vectorized_plates(msg: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the vectorised plates around a site, outer to inner."""
    frames = [frame for frame in msg["cond_indep_stack"] if frame.vectorized]
    return tuple(sorted(frames, key=lambda frame: frame.dim))


def _parameters(fn: Any) -> list[torch.Tensor]:
    found = []
    while fn is not None:
        found += [value for value in vars(fn).values() if isinstance(value, torch.Tensor)]
        fn = vars(fn).get("base_dist")
    return found


class Recorder(Messenger):
    """Notes the taints at each sample site and starts the site's own taint.

    It must be outside all other handlers: then it sees each site as the model leaves it, and nothing else
    happens between its two methods but the drawing of a value.
    """

    def __init__(self, tracker: TaintTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.records: list[SiteRecord] = []

    def _pyro_sample(self, msg: Any) -> None:
        self.tracker.absorb()

    def _pyro_post_sample(self, msg: Any) -> None:
        drawing = self.tracker.absorbed()
        if site_is_subsample(msg):
            return
        fn, value = msg["fn"], msg["value"]
        with self.tracker.pause():
            transparent = is_transparent(msg)
        factor = isinstance(fn, dist.Unit)
        if transparent:
            log_density = self._log_density(fn)
            if log_density is None:
                return
            factor, density = True, self.tracker.quietly_of(log_density)
        elif isinstance(value, torch.Tensor):
            density = self._density_taint(msg["name"], fn, value, msg["is_observed"])
        elif msg["is_observed"]:  # a Python number
            density = self._density_taint(msg["name"], fn, torch.as_tensor(value), False)
        else:
            raise UnsupportedModelError(
                f"At site '{msg['name']}', expected a tensor; {type(fn).__name__} gave a {type(value).__name__}. "
                "Sample tensors only."
            )
        with self.tracker.pause():
            self._note(msg, density | drawing, transparent, factor)

    def _note(self, msg: Any, reaches: int, transparent: bool, factor: bool) -> None:
        tracker, fn, value, name = self.tracker, msg["fn"], msg["value"], msg["name"]
        is_data = msg["is_observed"] and isinstance(value, torch.Tensor)
        region = Region.of(value) if is_data and tracker.is_argument(value) else None
        from_value = 0 if transparent else tracker.of(value)
        # A log-density may leave out a parameter at some values (missing data); the distribution holds it.
        reaches |= tracker.of((msg["mask"], msg["scale"], _parameters(fn)))
        self.records.append(
            SiteRecord(
                name=name,
                observed=msg["is_observed"] or factor,
                enumerated=msg["infer"].get("enumerate") == "parallel" and not msg["is_observed"],
                holds_data=msg["is_observed"] and not factor,
                reaches_distribution=reaches if msg["is_observed"] else reaches | from_value,
                reaches_value=from_value if msg["is_observed"] else 0,
                region=region,
                value_id=id(value),
                plates=vectorized_plates(msg),
                event_size=1 if factor else max(1, torch.Size(fn.event_shape).numel()),
                event_shape=fn.event_shape,
                batch_shape=fn.batch_shape,
            )
        )
        tracker.moment += 1
        if not transparent and region is None and isinstance(value, torch.Tensor):
            msg["value"] = value.detach().clone()
            tracker.set(msg["value"], tracker.bit(name))

    def _log_density(self, fn: Any) -> torch.Tensor | None:
        """Return the log-density that a Delta carries: a factor of the model; None if there is none."""
        if not isinstance(undressed(fn), dist.Delta) or getattr(fn, "_mask", None) is False:
            return None
        log_density = undressed(fn).log_density
        with self.tracker.pause():
            used = isinstance(log_density, torch.Tensor) and bool((log_density != 0).any())
        return log_density if used else None

    def _density_taint(self, name: str, fn: Any, value: torch.Tensor, clean: bool) -> int:
        """Return what reaches the log-density of a site; with ``clean``, other than through its value."""
        tracker = self.tracker
        if clean:
            with tracker.pause():
                value = value.detach().clone()
        tracker.absorb()
        try:
            log_prob = fn.log_prob(value)
        except Exception as error:
            raise UnsupportedModelError(
                f"At site '{name}', the log-density of {type(fn).__name__} cannot be evaluated "
                f"({type(error).__name__}: {error}). Give the distribution a log_prob() for such values."
            ) from error
        finally:
            absorbed = tracker.absorbed()
        return tracker.quietly_of(log_prob) | absorbed

    def _pyro_post_param(self, msg: Any) -> None:
        # A parameter may be initialised from data, or from samples; from then on it is on its own.
        if isinstance(msg["value"], torch.Tensor):
            with self.tracker.pause():
                self.tracker.set(msg["value"], 0)


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
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with (
        kept_buffers(model),
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        pyro.poutine.block(),
        pyro.validation_enabled(False),
    ):
        yield


class _ImproperPoint(Messenger):
    """Give sites with an improper prior, which cannot be drawn, some value in their support."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
            fn = fn.base_dist
        if isinstance(fn, dist.ImproperUniform) and msg["value"] is None and not msg["is_observed"]:
            transform = torch.distributions.biject_to(msg["fn"].support)
            msg["value"] = transform(torch.randn(transform.inverse_shape(msg["fn"].shape())))
            msg["done"] = True


def run_model(model: Callable, args: tuple, kwargs: dict[str, Any], *handlers: Any) -> Trace:
    """Trace a model inside handlers, outermost first."""
    traced = pyro.poutine.trace(model)
    with ExitStack() as stack:
        stack.enter_context(_ImproperPoint())
        for handler in handlers:
            stack.enter_context(handler)
        return traced.get_trace(*args, **kwargs)
