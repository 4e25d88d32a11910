"""What a guide must know of one call: observed values, covariates, plates, masks and supports.

A guide is called with the model's arguments and sees no data otherwise. :class:`CallReader` finds, in this
order: values in the ``observations`` keyword (the convention of inference compilation); values that *are*
arguments, at the place where they were when the guide was set up; and otherwise a *shadow run* of the model
(hidden from Pyro's handlers, without gradients, latents at a feasible point and without random numbers). The
shadow run also reports plates, sizes, indices, masks and supports, which may change from call to call. It is
skipped for calls that look like an earlier one in which it reported nothing beyond the arguments: full plates, no
masks, every observed value an argument.

Covariates of plates with indices are read row for row. Which of them the model takes rows of, and which are a batch
already, is seen by the tracer once for each kind of call (:mod:`~pyro_graphflows.inspect.trace`).
"""

import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from numbers import Number
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_graphflows.capture import CAPTURING
from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.guides.sites import REMEDIES_OF_NAN, InputEncodings, is_constant, moved_support
from pyro_graphflows.inspect import (
    ArgumentPath,
    TracedModel,
    arranged,
    get_argument,
    get_arguments,
    is_transparent,
    rows_of_run,
    same_tensor,
    take_rows,
    undressed,
)
from pyro_graphflows.inspect.arguments import (
    MOST_DEPTH,
    LoopRow,
    argument_leaves,
    argument_name,
    code_of,
    fields_of,
    held_by_function,
    signature_of,
)
from pyro_graphflows.inspect.runs import rows_of_plates, support_of, with_flat_priors
from pyro_graphflows.inspect.trace import trace_once

__all__ = [
    "Call",
    "CallReader",
    "PlateState",
    "SiteForm",
    "blame_missing_entries",
    "call_key",
    "chosen_indices",
    "input_rows",
    "plates_of",
    "refuse_empty_plates",
    "require_shape",
    "require_tensor",
    "site_mask",
]


@dataclass(frozen=True)
class PlateState:
    """A plate as it is in one call; ``indices`` is None where all its elements are there in order."""

    name: str
    dim: int
    size: int
    full_size: int
    indices: Tensor | None

    @property
    def subsampled(self) -> bool:
        """Whether only part of the plate is in this call."""
        return self.size != self.full_size

    def moved(self, convert: Callable[[Tensor], Tensor]) -> "PlateState":
        """Return the same plate with its indices on another device."""
        return self if self.indices is None else replace(self, indices=convert(self.indices))


@dataclass(frozen=True)
class Call:
    """One call of the guide.

    Attributes:
        values: The values of observed sites and inputs.
        plates: The plates of the model by name.
        masks: The masks in force at latent sites (those without are left out), and at observed sites where the
            reader was asked to keep them.
        scales: The scales other than the plates' in force at latent sites (those without are left out).
        supports: The supports of the latent sites.
        given: The values of optional sites that have data in this call.
        in_part: Whether a plate that is a Python loop is subsampled: its sites are about other data in each call.
        scores: Score features by name (:mod:`~pyro_graphflows.guides.scores`).
    """

    values: dict[str, Tensor]
    plates: dict[str, PlateState]
    masks: dict[str, Tensor | bool] = field(default_factory=dict)
    scales: dict[str, float | Tensor] = field(default_factory=dict)
    supports: dict[str, constraints.Constraint] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    in_part: bool = False
    scores: dict[str, Tensor] = field(default_factory=dict)

    @property
    def indices(self) -> dict[str, Tensor]:
        """The indices of the plates of which some elements are there, or all in another order."""
        return {name: plate.indices for name, plate in self.plates.items() if plate.indices is not None}

    def make_plates(self, existing: Mapping[str, pyro.plate]) -> dict[str, pyro.plate]:
        """Return the plates of the call as plates of Pyro: those that exist already, and the others made."""
        plates = dict(existing)
        for name, state in sorted(self.plates.items()):
            if name not in plates:
                plates[name] = pyro.plate(name, state.full_size, subsample=state.indices, dim=state.dim)
        return plates

    def require_given_in_support(self) -> None:
        """Refuse data of optional sites that are not in their supports.

        Raises:
            GraphflowsError: If there are any. The message names the site.
        """
        for name, value in self.given.items():
            if not bool(self.supports[name].check(value).all()):
                raise GraphflowsError(
                    f"Expected data of {name!r} in its support, {self.supports[name]}; some are not, or are NaN. "
                    "Entries that are missing within a site are for pyro.sample(..., obs_mask=...)."
                )


@dataclass(frozen=True)
class SiteForm:
    """What a model says of a site beside numbers: by this a model is told from another one.

    Attributes:
        distribution: The name of the class of its distribution.
        event_shape: The shape of one value; None for sites with data, of which some have other shapes in other calls.
        plates: The plates around it.
    """

    distribution: str
    event_shape: tuple[int, ...] | None
    plates: tuple[str, ...]

    @classmethod
    def of(cls, site: Any, latent: bool) -> "SiteForm":
        """Return the form of a site of a trace."""
        shape = tuple(site["fn"].event_shape) if latent else None
        plates = tuple(sorted(frame.name for frame in site["cond_indep_stack"] if frame.vectorized))
        return cls(type(undressed(site["fn"])).__name__, shape, plates)

    def __str__(self) -> str:
        shape = "" if not self.event_shape else f" of event shape {self.event_shape}"
        where = f" in plate {', '.join(self.plates)}" if self.plates else " in no plate"
        return f"a {self.distribution}{shape}{where}"


class _Last(Exception):
    """Ends a run of a model whose rest is not wanted."""


class _EndAfter(Messenger):
    """End a run when the last of some sites has its value."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.waiting = set(names)

    def _pyro_post_sample(self, msg: Any) -> None:
        self.waiting.discard(msg["name"])
        if not self.waiting:
            raise _Last


class _FeasiblePoint(Messenger):
    """Give every latent site a feasible value without random numbers, and plates the indices asked for.

    Attributes:
        given: The plates whose indices the model itself gives (``subsample=``), perhaps others in the next call.
    """

    def __init__(self, indices: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices
        self.like = like
        self.given: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            if msg["value"] is not None:
                self.given.add(msg["name"])
            if msg["name"] in self.indices:
                msg["value"] = self.indices[msg["name"]]
        elif not msg["is_observed"] and not msg["done"] and not isinstance(undressed(msg["fn"]), dist.Delta):
            msg["value"] = _feasible(msg["fn"], self.like.get(msg["name"]))
            msg["done"] = True


def _feasible(fn: Any, like: Tensor | None) -> Tensor:
    shape = fn.shape()
    options: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
    if fn.support.is_discrete:
        value = (
            fn.enumerate_support(expand=False)[0] if fn.has_enumerate_support else torch.zeros((), **options)
        )
        return value.expand(shape)
    transform = biject_to(support_of(fn))
    return transform(torch.zeros(transform.inverse_shape(shape), **options))


def site_mask(site: Mapping[str, Any]) -> Tensor | bool | None:
    """Return the mask in force at a traced site, from handlers and from the distribution; None without."""
    mask = site["mask"]
    fn = site["fn"]
    own = getattr(fn, "_mask", None)
    if own is None or own is True:
        return None if mask is True else mask
    return own if mask is None else own & mask


def _own_scale(site: Mapping[str, Any]) -> float | Tensor:
    scale = site["scale"]
    for frame in filter(
        lambda frame: frame.vectorized, site["cond_indep_stack"]
    ):  # loops have no plate in a guide
        scale = scale * frame.size / (frame.full_size or frame.size)
    return scale


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _is_one(scale: float | Tensor) -> bool:
    return not torch.is_tensor(scale) and abs(scale - 1.0) <= 1e-12


def plates_of(trace: poutine.Trace) -> dict[str, PlateState]:
    """Return the vectorised plates of a trace by name."""
    plates = {}
    for _, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.name not in plates:
                node = trace.nodes.get(frame.name)
                full_size = frame.full_size or frame.size
                indices = None if node is None else chosen_indices(node["value"], full_size)
                plates[frame.name] = PlateState(frame.name, frame.dim or 0, frame.size, full_size, indices)
    return plates


def chosen_indices(indices: Any, full_size: int) -> Tensor | None:
    """Return the indices of a plate; None for all in order."""
    if indices is None:
        return None
    indices = torch.as_tensor(indices)
    if len(indices) != full_size:
        return indices
    # while a call is captured no numbers are read: whoever captures compares with an ordinary call
    if CAPTURING.get() or torch.equal(indices, torch.arange(full_size).to(indices)):
        return None
    return indices


def _has_part_of_a_loop(trace: poutine.Trace) -> bool:
    """Whether a plate that is a Python loop is subsampled: its sites are about other data in each call."""
    return any(
        not frame.vectorized and frame.full_size is not None and frame.size != frame.full_size
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    )


class CallReader:
    """Reads calls of a guide; see the module's docstring.

    Args:
        traced: The model's trace at set-up.
        encodings: How conditioning values are written.
        keep_masks: Whether masks of observed sites are reported too.
        readers: The observed sites and inputs that latent sites read, with these; others may be missing in a call. By
            default all sites read all of them.
        unread: Observed sites whose values no site of the guide reads.
        optional: The latent sites that have data in some calls.
        flat: The latent sites of which the model masks the prior alone: it is improper.

    Attributes:
        given: Where the tensors among the arguments of set-up were; None if that is not known.
    """

    given: frozenset[ArgumentPath] | None = None

    def __init__(
        self,
        traced: TracedModel,
        encodings: InputEncodings,
        *,
        keep_masks: bool = False,
        readers: Mapping[str, Sequence[str]] | None = None,
        unread: Collection[str] = (),
        optional: Collection[str] = (),
        flat: Collection[str] = (),
    ) -> None:
        graph = traced.graph
        self.encodings, self.keep_masks = encodings, keep_masks
        self.latent: tuple[str, ...] = graph.latent
        without = {*traced.without_data, *unread}
        self.observed = tuple(name for name in graph.observed if name not in without)
        self.optional, self.flat = frozenset(optional), frozenset(flat)
        self.inputs: tuple[str, ...] = graph.inputs
        self.in_loops = frozenset(traced.loops)
        by_all = dict.fromkeys((*self.observed, *self.inputs), self.latent)
        self.readers: dict[str, Sequence[str]] = dict(by_all if readers is None else readers)
        self.known = frozenset(traced.trace.nodes)
        self.paths = dict(traced.argument_paths)
        self.rows = {name: dict(rows) for name, rows in traced.rows.items()}
        self.places = dict(traced.places)
        self._taken: dict[Hashable, dict[str, dict[int, str]]] = {}
        self._told: set[Hashable] = set()
        values = {name: traced.trace.nodes[name]["value"] for name in self.latent}
        self.like = {name: value for name, value in values.items() if torch.is_tensor(value)}
        sites = (*self.latent, *self.observed)
        self.forms = {name: SiteForm.of(traced.trace.nodes[name], name in self.latent) for name in sites}
        data = {name: traced.trace.nodes[name]["value"] for name in self.observed}
        self.shapes = {name: tuple(value.shape) for name, value in data.items() if torch.is_tensor(value)}
        self._unverified = False  # whether the model may be another than the one that was traced
        self._known: dict[Hashable, Call] = {}
        self._shapes: dict[Hashable, dict[str, torch.Size]] = {}
        self._positions: dict[Hashable, dict[str, int] | None] = {}
        nodes: Any = traced.trace.nodes
        self.loose = frozenset(
            name for name in self.observed if name in nodes and _outside_plates(nodes[name])
        )
        self._at_set_up: Call | None = self._without_arguments(traced.trace)
        self.unmasked = not (self._at_set_up.masks or self._at_set_up.scales)

    def moved(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Move what is remembered, as :meth:`torch.nn.Module.to` moves parameters.

        Args:
            convert: From a tensor to that on another device, or of another type.
        """
        self.encodings = self.encodings.moved(convert)
        self.like = {name: convert(value) for name, value in self.like.items()}
        self._known, self._shapes, self._positions = {}, {}, {}
        call = self._at_set_up
        if call is None:
            return
        masks = {n: convert(mask) if torch.is_tensor(mask) else mask for n, mask in call.masks.items()}
        scales = {n: convert(scale) if torch.is_tensor(scale) else scale for n, scale in call.scales.items()}
        supports = {name: moved_support(support, convert) for name, support in call.supports.items()}
        self._at_set_up = replace(call, masks=masks, scales=scales, supports=supports)

    def remember(
        self, plates: Mapping[str, PlateState], supports: Mapping[str, constraints.Constraint]
    ) -> None:
        """Let calls without arguments be as at set-up, in a reader made from plain data, if no mask was in force."""
        if self.unmasked:
            whole = {
                name: replace(plate, size=plate.full_size, indices=None) for name, plate in plates.items()
            }
            self._at_set_up = Call({}, whole, supports=dict(supports))

    def _without_arguments(self, trace: poutine.Trace) -> Call:
        """Return the call at set-up without its data, all plates in full."""
        nodes: Any = trace.nodes
        plates = {
            name: replace(plate, size=plate.full_size, indices=None)
            for name, plate in plates_of(trace).items()
        }
        sites = {name: nodes[name] for name in self.latent}
        masks = {name: mask for name, site in sites.items() if (mask := site_mask(site)) is not None}
        scales = {name: scale for name, site in sites.items() if not _is_one(scale := _own_scale(site))}
        return Call({}, plates, masks, scales, {name: support_of(site["fn"]) for name, site in sites.items()})

    def to_plain(self) -> dict[str, Any]:
        """Return what a reader knows, without data: of the latents' values at set-up, types alone."""
        known = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**known, "like": {name: value.dtype for name, value in self.like.items()}}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], device: torch.device | str) -> "CallReader":
        """Return a reader from what :meth:`to_plain` returned; its first call makes sure of the model."""
        new = cls.__new__(cls)
        vars(new).update({"flat": frozenset(), **plain})  # of files that say nothing of masked priors
        new.like = {
            name: torch.zeros((), dtype=dtype, device=device) for name, dtype in plain["like"].items()
        }
        new._unverified, new._known, new._taken = True, {}, {}
        new._shapes, new._positions, new._at_set_up, new._told = {}, {}, None, set()
        return new

    def _verify(self, trace: poutine.Trace) -> None:
        """Refuse a model that is not the one that the guide was made for."""
        for name, form in self.forms.items():
            found = SiteForm.of(trace.nodes[name], name in self.latent) if name in trace else form
            if found != form:
                raise UnsupportedModelError(
                    f"Expected the model that the guide was made for, in which {name!r} is {form}; in this model it "
                    f"is {found}. Load the guide with its own model."
                )

    def read(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observations: Mapping[str, Tensor] | None = None,
        indices: Mapping[str, Tensor] | None = None,
    ) -> Call:
        """Return one call as values, plates, masks and supports.

        Args:
            model: The model.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
            observations: Values of observed sites that replace those of the model.
            indices: Indices of subsampled plates that exist already.

        Raises:
            UnsupportedModelError: If an observed site or input that latent sites read has no value in this call, or
                the model has other latent sites than at set-up. The message names the site.
            GraphflowsError: If ``observations`` has a site that the model has not, or data have another shape than
                their distribution.
        """
        observations = observations or {}
        self._require_known(observations)
        shape = None if indices else _shape_of((args, kwargs))
        if shape is not None and shape in self._known:
            return self._read_arguments(shape, model, args, kwargs, observations)
        point = _FeasiblePoint(indices or {}, self.like)
        try:
            trace = self._shadow(model, args, kwargs, point)
        except Exception as error:
            return self._without_run(error, model, args, kwargs, bool(args or kwargs or indices))
        plates = plates_of(trace)
        taken = self._rows_taken(model, args, kwargs, plates)
        if self._unverified:
            self._verify(trace)
        nodes: Any = trace.nodes
        shapes = {name: nodes[name]["fn"].shape() for name in self.observed if name in nodes}
        values = self._observed_values(nodes, observations, shapes)
        self._require_same_sites(nodes)
        for name in self.inputs:
            value = argument_in_trace(model, self.paths[name], args, kwargs, trace)
            if value is None and name in self.readers:
                raise self._without_data([name])
            if value is not None:
                value = take_rows(name, value, self.rows.get(name, {}), taken.get(name, {}), plates)
                values[name] = self.encodings.input_value(name, arranged(value, self.places.get(name, ())))
        for name in self.encodings.partly:
            if name in nodes and name in values:
                values[name] = self.encodings.masked_value(name, values[name], site_mask(nodes[name]))
        masks, scales, supports, given = self._in_force(nodes, observations)
        call = Call(values, plates, masks, scales, supports, given, _has_part_of_a_loop(trace))
        self._find_paths(call.given, model, args, kwargs)
        self._say_what_is_new(model, args, kwargs, trace)
        self._unverified = False
        varies = call.in_part or bool(point.given)
        if shape is not None and not varies and self._arguments_say_all(call, model, args, kwargs):
            self._known[shape], self._shapes[shape] = call, shapes
        return call

    def known_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Return a call of the kind of some arguments, if these say all of it: no masks, no scales, full plates."""
        shape = _shape_of((args, kwargs))
        return None if shape is None else self._known.get(shape)

    def _require_known(self, observations: Mapping[str, Tensor]) -> None:
        """Refuse observations of sites that the model has not; values of latent sites do no harm."""
        unknown = [name for name in observations if name not in self.known]
        if unknown:
            raise GraphflowsError(
                f"Expected observations of {', '.join(self.observed) or 'nothing'}, the sites with data when the guide "
                f"was set up; got {', '.join(unknown)}."
            )

    def _read_arguments(
        self,
        shape: Hashable,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observations: Mapping[str, Tensor],
    ) -> Call:
        """Return a call of a kind of which the arguments are known to say all, without a run of the model."""
        known = self._known[shape]
        if shape not in self._positions:
            self._positions[shape] = self._positions_of(known, model, args, kwargs)
        positions = self._positions[shape]
        if positions is not None and not observations and not self.optional:
            all_values = (*args, *kwargs.values())
            return replace(known, values={name: all_values[at] for name, at in positions.items()}, given={})
        paths = {name: self.paths[name] for name in known.values}
        paths.update((name, self.paths[name]) for name in known.given)
        for name, value in observations.items():
            _require_observation(name, value, self._shapes[shape].get(name))
        values: dict[str, Any] = {**get_arguments(model, paths, args, kwargs), **observations}
        given = {name: values[name] for name in self.optional if name in values}
        return replace(known, values=values, given=given)

    def _positions_of(
        self, known: Call, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, int] | None:
        """Return which arguments the values of a kind of call are; None unless each is an argument of its own."""
        names = [*list(signature_of(model).parameters)[: len(args)], *kwargs]
        plain = all(type(value) is Tensor for value in (*args, *kwargs.values()))
        paths = {name: self.paths[name] for name in known.values}
        if not plain or len(names) != len(args) + len(kwargs):
            return None
        if not all(len(path) == 1 and path[0] in names for path in paths.values()):
            return None
        return {name: names.index(path[0]) for name, path in paths.items()}  # type: ignore[arg-type]

    def _without_run(
        self, error: Exception, model: Callable[..., Any], args: Any, kwargs: Any, says_plates: bool
    ) -> Call:
        """Return the call at set-up where a model fails without arguments, if the guide needs no more; else say why."""
        refuse_empty_plates(error)
        self._require_one_device(model, args, kwargs, error)
        if isinstance(error, ValueError) and not isinstance(error, GraphflowsError):
            what = f"the model fails, {str(error).splitlines()[0].rstrip(':.')}."
            blame_missing_entries(model, args, kwargs, what, error)
        if says_plates:
            raise error
        if not self.readers and self._at_set_up is not None:
            return self._at_set_up
        raise self._without_data(list(self.readers)) from error

    def _observed_values(
        self, nodes: Any, observations: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
    ) -> dict[str, Any]:
        """Return the values of observed sites: those given, or else the model's."""
        for name in shapes:
            if name not in self.loose:
                _require_plates(name, nodes[name])
        values: dict[str, Any] = {}
        missing = []
        for name in self.observed:
            if name in observations:
                _require_observation(name, observations[name], shapes.get(name))
                values[name] = observations[name]
            elif (
                name in nodes and nodes[name]["is_observed"] and not self._is_of_other_rows(name, nodes[name])
            ):
                values[name] = nodes[name]["value"]
                require_shape(name, nodes[name])
            elif name in self.readers:
                missing.append(name)
        if missing:
            raise self._without_data(missing)
        return values

    def _is_of_other_rows(self, name: str, site: Any) -> bool:
        """Whether data that nothing reads are those of set-up in a call about other rows: of a conditioned model."""
        shape = tuple(getattr(site["value"], "shape", ()))
        if name in self.readers or name in self.paths or shape != self.shapes.get(name):
            return False
        expected = tuple(site["fn"].shape())  # with the dimensions of plates of the caller's on the left
        return shape != expected[len(expected) - len(shape) :]

    def _require_same_sites(self, nodes: Any) -> None:
        """Refuse a call in which the model has latent sites that it had not at set-up."""
        more = [
            name
            for name, site in nodes.items()
            if site["type"] == "sample"
            and not (site["is_observed"] or site_is_subsample(site) or name in self.known)
        ]
        if more:
            raise UnsupportedModelError(
                "Expected the latent sites that the model had when the guide was set up; this call has "
                f"{', '.join(more)} as well. Give the guide its own model; models whose sites come and go need one "
                "guide for each set of sites."
            )

    def _in_force(
        self, nodes: Any, observations: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return the masks, scales and supports in force at sites of a run, and the data of optional sites."""
        masks, scales, supports, given = {}, {}, {}, {}
        for name in self.observed if self.keep_masks else ():
            known = name in nodes and name not in self.encodings.partly
            mask = site_mask(nodes[name]) if known else None
            if mask is not None:
                masks[name] = mask
        for name in self.latent:
            site: Any = nodes.get(name)
            if site is None:
                raise UnsupportedModelError(
                    f"Expected the latent site {name!r} that the model had when the guide was set up; it is not in "
                    "this call. Models whose sites come and go need one guide for each set of sites."
                )
            if name in self.optional and (name in observations or site["is_observed"]):
                given[name] = observations.get(name, site["value"])
            elif site["is_observed"]:
                raise UnsupportedModelError(
                    f"Expected no data for {name!r}, a latent site when the guide was set up; this call has some. Set "
                    "the guide up with arguments like those of later calls: guide.setup(*args); or for calls with and "
                    f"without them, optional=[{name!r}]."
                )
            mask, scale = site_mask(site), _own_scale(site)
            if mask is not None:
                masks[name] = mask
            if not _is_one(scale):
                scales[name] = scale
            supports[name] = support_of(site["fn"])
        return masks, scales, supports, given

    def _say_what_is_new(
        self, model: Callable[..., Any], args: Any, kwargs: Any, trace: poutine.Trace
    ) -> None:
        """Warn of sites of data and covariates that were not there at set-up, once for each kind: they are not read."""
        self._say_what_sites_are_new(trace.nodes)
        leaves = argument_leaves(model, args, kwargs) if self.given is not None else {}
        known = {*self.paths.values(), *(self.given or ())}
        new = [path for path in leaves if path not in known]
        kind = _shape_of((args, kwargs), of_objects=True) if new else None
        if not new or kind in self._told:
            return
        self._told.add(kind)
        with suppress(UnsupportedModelError):
            again = trace_once(model, args, kwargs, strict=False, indices=rows_of_plates(trace))
            more = [name for name in again.graph.inputs if again.argument_paths[name] in new]
            if more:
                sites = [
                    str(site) for site in again.graph.nodes if set(more) & set(again.graph.parents(site))
                ]
                warnings.warn(
                    f"This call has {_few(more)}, on which {_few(sites)} depend and which the guide does not read, as "
                    "there was none when it was set up. Set it up with a call that has all: guide.setup(*args).",
                    GraphflowsWarning,
                    stacklevel=4,
                )

    def _say_what_sites_are_new(self, nodes: Any) -> None:
        new = tuple(
            name
            for name, site in nodes.items()
            if site["type"] == "sample"
            and name not in self.known
            and not (site_is_subsample(site) or is_transparent(site))
            # a loop over part of a plate has other sites in each call
            and not any(f.dim is None and f.size < (f.full_size or f.size) for f in site["cond_indep_stack"])
        )
        if new and new not in self._told:
            self._told.add(new)
            warnings.warn(
                f"This call has data of {_few(new)}, which the guide does not read, as the model had none such "
                "at set-up. Put sites of any number into a plate, or set the guide up with a call that has all: "
                "guide.setup(*args).",
                GraphflowsWarning,
                stacklevel=5,
            )

    def at_values(
        self,
        call: Call,
        model: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        latents: Mapping[str, Tensor],
        names: Sequence[str],
    ) -> Call:
        """Return a call with the supports of some sites as they are given the values of others, sampled so far."""
        supports = self.supports_given(model, *arguments, latents, call.indices)
        return replace(call, supports={**call.supports, **{name: supports[name] for name in names}})

    def supports_given(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        latents: Mapping[str, Tensor],
        indices: Mapping[str, Tensor],
    ) -> dict[str, constraints.Constraint]:
        """Return the supports in force where some latent sites have given values; differentiable in these."""
        with poutine.block(), poutine.condition(data=dict(latents)), _FeasiblePoint(indices, self.like):
            nodes: Any = poutine.trace(model).get_trace(*args, **kwargs).nodes
        return {name: support_of(nodes[name]["fn"]) for name in self.latent}

    def copies_given(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        latents: Mapping[str, Tensor],
        indices: Mapping[str, Tensor],
        names: Sequence[str],
    ) -> dict[str, dict[str, Any]]:
        """Return the sites of a run that pass on values, where all latent sites have given ones; with gradients."""
        run = poutine.trace(_EndAfter(names)(model))
        handlers = poutine.condition(data=dict(latents)), _FeasiblePoint(indices, self.like)
        with suppress(_Last), poutine.block(), handlers[0], handlers[1]:
            run(*args, **kwargs)
        nodes: Any = run.trace.nodes
        return {name: nodes[name] for name in names if name in nodes}

    def _require_one_device(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
    ) -> None:
        """Blame arguments that are not where the latent sites are for an error of the model, if there are any."""
        devices = {value.device for value in self.like.values()}
        for name, value in get_arguments(model, self.paths, args, kwargs).items():
            if torch.is_tensor(value) and devices and value.device not in devices:
                (here, *_) = devices
                raise GraphflowsError(
                    f"Expected {name!r} on the device of the guide, {here}; got {value.device}. Move one of them: "
                    f"guide.to({str(value.device)!r}), or the data."
                ) from error

    def _without_data(self, names: Sequence[str]) -> UnsupportedModelError:
        """Say that data are missing which the guide reads, and how to predict."""
        read = "; ".join(
            f"the {'observed site' if name in self.observed else 'argument'} {name!r} "
            f"(read by {_few(self.readers[name])})"
            for name in names
        )
        data = [name for name in names if name in self.observed] or list(self.observed)
        given = ", ".join(f"{name}={name}" for name in data if name.isidentifier()) or "**{site: data}"
        return UnsupportedModelError(
            f"Expected data for {read}; got none in this call. Pass the data, or observations={{...}}. To predict, "
            "draw the latents given the data. For new inputs: posterior = Predictive(guide, num_samples=S)(data), then "
            "Predictive(model, posterior_samples=posterior)(new inputs). For the same rows once more: "
            f"Predictive(model, guide=guide.given({given}), num_samples=S)(inputs)."
        )

    def _shadow(
        self, model: Callable[..., Any], args: Any, kwargs: Any, point: _FeasiblePoint
    ) -> poutine.Trace:
        # The point is no draw: a scale may be zero there that never is in a run.
        with torch.no_grad(), poutine.block(), pyro.validation_enabled(False), point:
            return poutine.trace(with_flat_priors(model, self.flat)).get_trace(*args, **kwargs)

    def _rows_taken(
        self,
        model: Callable[..., Any],
        args: Any,
        kwargs: Any,
        plates: Mapping[str, PlateState],
    ) -> dict[str, dict[int, str]]:
        """Return for inputs which rows the model takes of them in a call: seen once for each kind of call."""
        indices = {name: plate.indices for name, plate in plates.items() if plate.indices is not None}
        if not indices or not self.inputs:
            return {}
        looks = _shape_of((args, kwargs), of_objects=True)
        sizes = ((name, p.size, p.full_size, p.indices is None) for name, p in sorted(plates.items()))
        kind = (looks, tuple(sizes))
        if looks is not None and kind in self._taken:
            return self._taken[kind]
        found = rows_of_run(model, args, kwargs, (_FeasiblePoint(indices, self.like),))
        taken = {name: found[self.paths[name]] for name in self.inputs if self.paths[name] in found}
        if looks is not None:
            self._taken[kind] = taken
        return taken

    def _arguments_say_all(self, call: Call, model: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        if call.masks or call.scales or any(plate.indices is not None for plate in call.plates.values()):
            return False
        if not all(is_constant(support) for support in call.supports.values()):
            return False
        return all(
            name in self.paths and same_tensor(get_argument(model, self.paths[name], args, kwargs), value)
            for name, value in (*call.values.items(), *call.given.items())
        )

    def _find_paths(
        self, given: Mapping[str, Tensor], model: Callable[..., Any], args: Any, kwargs: Any
    ) -> None:
        """Find where the values of optional sites are among the arguments: at set-up there may have been none."""
        new = [name for name in given if name not in self.paths]
        leaves = argument_leaves(model, args, kwargs) if new else {}
        for name in new:
            paths = [path for path, leaf in leaves.items() if leaf is given[name]]
            self.paths.update((name, path) for path in paths[:1])


def argument_in_trace(
    model: Callable[..., Any], path: ArgumentPath, args: Any, kwargs: Any, trace: poutine.Trace
) -> Any:
    """Return an argument of a call, or the row of it that an iteration of a loop is about; None if there is none."""
    row = path[-1]
    if not isinstance(row, LoopRow):
        return get_argument(model, path, args, kwargs)
    value = get_argument(model, path[:-1], args, kwargs)
    if not torch.is_tensor(value) or row.plate not in trace:
        return None
    return row.of(value, torch.as_tensor(trace.nodes[row.plate]["value"]))


def input_rows(traced: TracedModel, name: str, value: Tensor, plates: Mapping[str, PlateState]) -> Tensor:
    """Return the value of an input at set-up, row for row of its plates.

    Args:
        traced: The model as traced.
        name: The input.
        value: Its value, as the model got it.
        plates: The plates of the trace.
    """
    rows, taken = traced.rows.get(name, {}), traced.taken.get(name, {})
    return arranged(take_rows(name, value, rows, taken, plates), traced.places.get(name, ()))


def refuse_empty_plates(error: Exception) -> None:
    """Say what it means that Pyro has no empty plates, if that is why a model failed."""
    if isinstance(error, ZeroDivisionError) and "size cannot be zero" in str(error):
        raise GraphflowsError(
            "Expected at least one element in each plate, since plates of Pyro cannot be empty; in this call one has "
            "none. Leave out empty batches."
        ) from error


def require_shape(name: str, site: Mapping[str, Any]) -> None:
    """Refuse data that would be broadcast against their distribution: ``(n, 1)`` in a plate of n.

    Inside plates of the caller's, data may have their dimensions.
    """
    value, expected = site["value"], site["fn"].shape()
    if not torch.is_tensor(value):
        require_tensor(name, value)
        return
    try:
        whole = np.broadcast_shapes(value.shape, expected)
    except ValueError:
        whole = value.shape
    outer = _dims_outside()
    event_dim = len(site["fn"].event_shape)
    beyond = [
        dim
        for dim in range(-len(whole), 0)
        if (len(expected) < -dim or whole[dim] != expected[dim]) and dim + event_dim not in outer
    ]
    if beyond:
        raise GraphflowsError(
            f"Expected data of {name!r} of shape {tuple(expected)}, that of its distribution; got "
            f"{tuple(value.shape)}. Give both one shape, for example by y.squeeze(-1)."
        )


def blame_missing_entries(
    model: Callable[..., Any], args: Any, kwargs: Any, what: str, error: Exception | None = None
) -> None:
    """Blame NaN among the arguments, if there are any, for what went wrong.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        what: What went wrong, in words.
        error: The error of the model.

    Raises:
        GraphflowsError: If an argument has entries that are not finite. The message names it.
    """
    leaves = argument_leaves(model, args, kwargs).items()
    wrong = [
        argument_name(path)
        for path, leaf in leaves
        if leaf.is_floating_point() and not leaf.is_meta and not bool(torch.isfinite(leaf).all())
    ]
    if wrong:
        raise GraphflowsError(
            f"Expected finite arguments, or a model that can do without; {_few(wrong)} have NaN or infinite entries: "
            f"{what} {REMEDIES_OF_NAN}"
        ) from error


def require_tensor(name: str, value: Any) -> None:
    """Refuse data that are no tensor, and no number."""
    if not torch.is_tensor(value) and not isinstance(value, Number):
        raise GraphflowsError(
            f"Expected data of {name!r} in a tensor; got a {type(value).__name__}. Pass torch.as_tensor(...) of them."
        )


def _dims_outside() -> set[int]:
    """Return the dimensions of the plates that the guide is called in."""
    return {handler.dim for handler in _PYRO_STACK if isinstance(handler, IndepMessenger) and handler.dim}


def _require_observation(name: str, value: Any, expected: torch.Size | None) -> None:
    """Refuse a value of ``observations`` that would be broadcast; it may have batches on the left."""
    if not torch.is_tensor(value) or expected is None:
        return
    last = value.shape[max(0, value.dim() - len(expected)) :]
    try:
        whole = np.broadcast_shapes(last, expected) == expected
    except ValueError:
        whole = False
    if not whole or (value.dim() > len(expected) and last != expected):
        raise GraphflowsError(
            f"Expected observations of {name!r} of shape {tuple(expected)}, that of its distribution, or batches of "
            f"these; got {tuple(value.shape)}."
        )


def _outside_plates(site: Mapping[str, Any]) -> list[int]:
    """Return the dimensions of a site's batch that are in no plate."""
    shape = site["fn"].batch_shape
    declared = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    return [dim for dim in range(-len(shape), 0) if shape[dim] != 1 and dim not in declared]


def _require_plates(name: str, site: Mapping[str, Any]) -> None:
    dims = sorted(set(_outside_plates(site)) - _dims_outside())
    if dims:
        raise GraphflowsError(
            f"Expected inputs that give {name!r} a batch in its plates; got the batch shape "
            f"{tuple(site['fn'].batch_shape)}, whose dimension {dims[-1]} is in no plate. Give inputs and data one "
            "shape, for example by x.squeeze(-1)."
        )


def call_key(arguments: Any) -> Hashable | None:
    """Return a key that is equal for calls that differ in the contents of tensors only; None if unsure.

    Args:
        arguments: Positional and keyword arguments.
    """
    return _shape_of(arguments)


def _shape_of(arguments: Any, *, of_objects: bool = False, depth: int = 0) -> Hashable | None:
    """Return a key that is equal for calls that differ in the contents of tensors only; None if unsure.

    Args:
        arguments: The arguments.
        of_objects: Whether objects count as what is seen of their fields: enough to know how they are used.
        depth: How deep inside of others.
    """
    if torch.is_tensor(arguments):
        return ("tensor", tuple(arguments.shape), arguments.dtype, arguments.device)
    if arguments is None or isinstance(arguments, bool | int | float | str):
        return (type(arguments), arguments)
    code = None
    if isinstance(arguments, dict):
        items: Any = arguments.items()
    elif isinstance(arguments, tuple | list):
        items = enumerate(arguments)
    elif of_objects and depth > MOST_DEPTH:
        items = ()
    elif of_objects and (held := held_by_function(arguments)) is not None:
        items, code = held, code_of(arguments)
    elif of_objects:
        items = fields_of(arguments)
    else:
        return None
    if items is None:  # a function, a module: the same one
        return (type(arguments), id(arguments))
    parts = [(key, _shape_of(value, of_objects=of_objects, depth=depth + 1)) for key, value in items]
    return None if any(part is None for _, part in parts) else (type(arguments), code, tuple(parts))
