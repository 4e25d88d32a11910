"""One run of a model inside the tracer: what reaches each site, and the graph that this shows.

The run is quiet (random state, gradients, buffers and handlers outside are as before). A recorder notes for
each site which sources reach its distribution and its value; then sources become parents, and regions of
arguments become inputs. What was traced can be run again at other values (:class:`Rerun`).

**Rows.** Of its data a model takes those rows that the indices of a subsampled plate say: ``x[ind]``,
``x.index_select(0, ind)`` and ``pyro.subsample(x, event_dim=0)`` take them whatever the shape of ``x``. A run inside
the tracer shows it (:class:`~pyro_graphflows.inspect.tracer.RowUse`): the index *is* the plate's, so that nothing has
to be guessed from sizes. The uses are put down to the tensors that were given to the model, and applied to other
tensors on later calls (:func:`take_rows`).
"""

import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.graphs.structures import ModelGraph, Node
from pyro_graphflows.inspect.arguments import (
    Alignment,
    ArgumentPath,
    LoopRow,
    alignment_of,
    argument_leaves,
    argument_name,
    covering,
    is_outside,
    not_followed,
    outside_tensors,
    part_of,
    replaced_arguments,
    with_tensors,
)
from pyro_graphflows.inspect.runs import (
    GivenRows,
    GivenValues,
    Replaced,
    is_improper,
    log_density_at,
    quiet_run,
    run_model,
    undressed,
)
from pyro_graphflows.inspect.tracer import (
    COMPILER,
    Escape,
    Noise,
    PlateRows,
    PlateWatch,
    Recorder,
    Region,
    RowUse,
    SiteRecord,
    TaintTracker,
    storage_of,
    watched,
    watching,
)

__all__ = [
    "IMPROPER",
    "Leak",
    "Rerun",
    "RerunError",
    "Rows",
    "TracedModel",
    "arranged",
    "common_scale",
    "density",
    "differentiable",
    "differs",
    "own_scale",
    "require_rows_of_indices",
    "rows_of_run",
    "rows_taken",
    "take_rows",
    "trace_once",
    "watch_leaves",
]

IMPROPER = "its prior is improper"  # a reason of TracedModel.not_generative: such a site cannot be drawn

_REMEDIES = {
    "bool": "Choose between tensors with torch.where(condition, a, b) instead of a Python condition.",
    "item": "Keep the value as a tensor: leave out .item().",
    "float": "Keep the value as a tensor: leave out float(), and use torch functions.",
    "int": "Keep the value as a tensor: leave out int(); index with the tensor itself.",
    "index": "Index a tensor (torch.stack(items)[k]) instead of a Python list, and mask instead of range(k).",
    "numpy": "Use torch functions instead of those of NumPy, or pyro.sample(name, Simulated(function, ...), obs=...).",
    "array": "Use torch functions instead of those of NumPy, or pyro.sample(name, Simulated(function, ...), obs=...).",
    "tolist": "Keep the values as a tensor: leave out .tolist().",
}


@dataclass(frozen=True)
class Leak:
    """A value that left the tensors (``float(z)``, ``if z > 0``), so that it cannot be followed further.

    ``sites`` and ``arguments`` say what it depends on, ``operation`` how it left, ``filename``, ``line`` and
    ``code`` where, and ``affects`` which sites come after it.
    """

    sites: tuple[str, ...]
    arguments: tuple[str, ...]
    operation: str
    filename: str
    line: int
    code: str
    affects: tuple[str, ...]

    def __str__(self) -> str:
        what = " and ".join(
            [f"site '{name}'" for name in self.sites] + [f"argument '{name}'" for name in self.arguments]
        )
        return (
            f"{self.filename}:{self.line}: `{self.code}` turns {what} into a Python value ({self.operation})"
        )


@dataclass(frozen=True)
class TracedModel:
    """A model's graph, with what the tracing found beside it.

    Attributes:
        graph: The model graph.
        trace: The prototype trace.
        argument_paths: Where to find the value of each input, and of each observed site whose value is an
            argument itself or a row or column of one, on a later call; see :func:`get_argument`.
        event_dims: For each input, how many of its rightmost dimensions belong to one datum.
        index_inputs: The inputs of an integer type: indices, never network inputs.
        without_data: The observed nodes whose value is no data: factors, and observed values that are
            computed from latent sites. They take part in the inversion but are no network inputs.
        not_generative: Why samples of the unconditioned model are not the model, by site (factors, masks,
            scales); empty where they are.
        leaks: Values that left the tensors.
        notes: What the user should know, in words.
        non_exchangeable: For sites whose plates' indices are non-exchangeable (constants that vary along the
            plate, not given as arguments): those plates. Known only after ``validate=True``.
        elements: For graphs of elements: the site and the flat event index of each node.
        copies: The :class:`~pyro.distributions.Delta` sites whose values follow from latent sites in the same plates.
            (Of those in no plate, from latent sites alone: drawn for some data, they also hold for others.)
        rows: For inputs, along which of their dimensions (counted from the right) they vary with which plates.
        taken: The part of these of which the model takes the rows by the plates' indices.
        places: For inputs whose dimensions are not where their plates are, pairs of both; see
            :func:`~pyro_graphflows.inspect.trace.arranged`.
        selectors: For sites, the sites by whose values entries of theirs are chosen.
        loops: For sites and inputs inside subsampled plates that are Python loops: which plates, and which iteration.
        converted: Whether tensors were given in the place of NumPy arrays.
        other_rows: The inputs of whose rows the elements of a plate use others than their own, or some in a way that
            is not followed; and that plate.
    """

    graph: ModelGraph
    trace: Trace = field(repr=False)
    argument_paths: Mapping[str, ArgumentPath]
    event_dims: Mapping[str, int]
    index_inputs: frozenset[str] = frozenset()
    without_data: frozenset[str] = frozenset()
    not_generative: Mapping[str, str] = field(default_factory=dict)
    leaks: tuple[Leak, ...] = ()
    notes: tuple[str, ...] = ()
    non_exchangeable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    elements: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    rows: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    taken: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    places: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    selectors: Mapping[str, frozenset[str]] = field(default_factory=dict)
    loops: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    converted: bool = False
    other_rows: Mapping[str, str] = field(default_factory=dict)


def trace_once(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    strict: bool,
    indices: Mapping[str, torch.Tensor] | None = None,
) -> TracedModel:
    """Run a model inside the tracer and assemble what it shows.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        strict: Whether to raise where a random value cannot be followed.
        indices: The indices of subsampled plates, where they are not to be drawn.
    """
    given, converted = (args, kwargs), False
    argument_leaves(model, args, kwargs)  # refuses arguments that do not fit
    if any("NumPy" in what for what in not_followed(model, args, kwargs).values()):
        given = with_tensors(args, kwargs)
        with quiet_run(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                run_model(model, *given)
                converted = True
            except Exception:  # the model wants arrays: torch.from_numpy, NumPy functions
                given = args, kwargs

    rows = (GivenRows(indices),) if indices else ()

    def run() -> tuple[Recorder, Any, Any, Any]:
        tracker = TaintTracker()
        leaves, outside = watch_leaves(tracker, model, *given)
        recorder = Recorder(tracker)
        with quiet_run(model), warnings.catch_warnings():
            if converted:
                warnings.filterwarnings("ignore", "To copy construct from a tensor")
            trace = run_model(watched(tracker, model), *given, recorder, *rows)
        return recorder, trace, leaves, outside

    was_there = COMPILER in sys.modules
    try:
        recorder, trace, leaves, outside = run()
    except Exception:
        if was_there or COMPILER not in sys.modules:
            raise
        recorder, trace, leaves, outside = run()  # now with handlers that the compiler does not look into
    for name, value in recorder.data.items():
        trace.nodes[name]["value"] = value
    return _Assembly(recorder, trace, leaves, outside, strict).finish(converted)


class _Assembly:
    """Turns the records of one run into a graph."""

    def __init__(
        self,
        recorder: Recorder,
        trace: Trace,
        leaves: Mapping[ArgumentPath, torch.Tensor],
        outside: Mapping[ArgumentPath, torch.Tensor],
        strict: bool,
    ) -> None:
        self.trace, self.strict = trace, strict
        self.notes: list[str] = []
        self.tracker, self.records, self.deltas = recorder.tracker, recorder.records, recorder.deltas
        require_rows_of_indices(self.tracker, outside)
        self.taken, self.clashes = rows_taken(self.tracker, {**outside, **leaves})
        # What is used as it is stays a constant; its indices are told apart as any other constants' are.
        sizes = {f.size for record in recorder.records for f in record.plates if f.size > 1}
        data = {
            path: leaf
            for path, leaf in outside.items()
            if (self.taken.get(path) and not self._is_constant(path, leaf))
            or (_is_inside_an_argument(path) and not sizes.isdisjoint(leaf.shape))
        }
        self.leaves = {**data, **leaves}
        self.rows: dict[str, dict[int, str]] = {}
        self.places: dict[str, tuple[tuple[int, int], ...]] = {}
        self.loops = {record.name: record.loops for record in self.records if record.loops}
        records = self.records
        self.site_names = {record.name for record in records}
        self.observed = {record.name for record in records if record.observed}
        self.by_id = {id(leaf): path for path, leaf in self.leaves.items()}
        self.parents: dict[str, dict[Hashable, None]] = {record.name: {} for record in records}
        self.input_paths: dict[str, ArgumentPath] = {}
        self.alignments: dict[str, Alignment] = {}
        self.without_data = {r.name for r in records if r.observed and not r.holds_data}
        self.not_generative: dict[str, str] = {}

    def _is_constant(self, path: ArgumentPath, leaf: torch.Tensor) -> bool:
        """Whether a tensor from outside of the call is no input although rows of plates are taken from it.

        So are integers that choose among no site's values, numbers of trials for example: no network reads integers,
        and where the plates are there in full each index can have a map of its own.
        """
        nodes: Any = self.trace.nodes
        if not is_outside(path) or not _is_integer(leaf):
            return False
        if any(len(self.tracker.plates[p]) < nodes[p]["fn"].size for p in self.taken[path].values()):
            return False
        storage = leaf.untyped_storage()._cdata
        return not any(
            isinstance(source, Region) and source.storage == storage
            for values, chosen_by in self.tracker.selections
            if any(isinstance(value, str) for value in self.tracker.sources(values))
            for source in self.tracker.sources(chosen_by)
        )

    def finish(self, converted: bool) -> TracedModel:
        """Return everything that the run shows."""
        for record in self.records:
            self._check_dims(record)
        leaks = self._leaks()
        for i, record in enumerate(self.records):
            self._connect(i, record)
        for leak in leaks:
            self._spread(leak)
        argument_paths = dict(self.input_paths)
        for record in self.records:
            path = self._path_of_value(record)
            if path is not None:
                argument_paths[record.name] = path
        for name, path in self.input_paths.items():
            if path in self.leaves:
                self._note_unmatched(name, self.leaves[path])
        self._look_for_improper()
        return TracedModel(
            graph=self._graph(),
            trace=self.trace,
            argument_paths=argument_paths,
            event_dims={name: alignment.event_dim for name, alignment in self.alignments.items()},
            index_inputs=frozenset(
                name for name, path in self.input_paths.items() if _is_integer(self._leaf_of(path))
            ),
            without_data=frozenset(self.without_data),
            not_generative=self.not_generative,
            leaks=leaks,
            notes=tuple(dict.fromkeys(self.notes)),
            copies=tuple(name for name in self.deltas if self._is_copy(name)),
            rows=self.rows,
            taken={name: self.taken[path] for name, path in self.input_paths.items() if path in self.taken},
            places=self.places,
            selectors=self._selectors(),
            loops=self.loops,
            converted=converted,
        )

    def _is_copy(self, name: str) -> bool:
        """Whether the value of a Delta site belongs to latent sites, and is no news for other data."""
        taint, plates = self.deltas[name]
        records = {record.name: record for record in self.records}
        sources = self.tracker.sources(taint)
        sites = [records[source] for source in sources if isinstance(source, str)]
        if any(isinstance(source, Noise) for source in sources) or any(site.enumerated for site in sites):
            return False
        latents = [site for site in sites if not site.observed]
        if not plates:
            return len(latents) == len(sources)
        return {frame.name for frame in plates} <= {frame.name for site in latents for frame in site.plates}

    def _leaf_of(self, path: ArgumentPath) -> torch.Tensor:
        return self.leaves[path[:-1] if isinstance(path[-1], LoopRow) else path]

    def _selectors(self) -> dict[str, frozenset[str]]:
        """Return for each site the sites by whose values entries of its value are chosen."""
        found: dict[str, set[str]] = {}
        for values, chosen_by in self.tracker.selections:
            by = {source for source in self.tracker.sources(chosen_by) if isinstance(source, str)}
            for source in self.tracker.sources(values) if by else ():
                if isinstance(source, str):
                    found.setdefault(source, set()).update(by - {source})
        return {site: frozenset(by) for site, by in found.items() if by}

    def _path_of_value(self, record: SiteRecord) -> ArgumentPath | None:
        """Return where an observed value is among the arguments: a whole one, a row or a column."""
        if record.loops:
            return None  # other rows in every call
        if record.value_id in self.by_id:
            return self.by_id[record.value_id]
        if record.region is None or record.name in self.without_data:
            return None
        for path, leaf in self._leaves_at(record.region):
            key = part_of(leaf, record.region)
            if key is not None:
                return (*path, key)
        return None

    def _check_dims(self, record: SiteRecord) -> None:
        declared = {frame.dim for frame in record.plates}
        extra = [
            dim
            for dim in range(-len(record.batch_shape), 0)
            if record.batch_shape[dim] != 1 and dim not in declared
        ]
        if not extra:
            return
        message = (
            f"At site '{record.name}', dimension {extra[-1]} of the batch shape {tuple(record.batch_shape)} is "
            f"in no plate: use .to_event({-extra[0]}) if its elements are one value, or "
            f"pyro.plate(..., dim={extra[-1]}) if they are repetitions."
        )
        shape = getattr(self.trace.nodes[record.name]["value"], "shape", ())
        if record.observed and len(shape) < len(record.batch_shape):
            message += (
                f" Its data have the shape {tuple(shape)}: if an argument of shape (N, 1) meets one of shape (N,), "
                "which makes (N, N), give both one shape, for example by x.squeeze(-1)."
            )
        if self.strict:
            raise UnsupportedModelError(message)
        self.notes.append(message)

    def _leaks(self) -> tuple[Leak, ...]:
        leaks = [self._leak(escape) for escape in self.tracker.escapes]
        leaks = [leak for leak in dict.fromkeys(leaks) if leak.affects and (leak.sites or leak.arguments)]
        wrong = [leak for leak in leaks if leak.sites]
        if wrong and self.strict:
            leak = wrong[0]
            names = ", ".join(f"'{name}'" for name in leak.affects[:5])
            names += ", ..." if len(leak.affects) > 5 else ""
            more = f" ({len(wrong) - 1} more such places.)" if len(wrong) > 1 else ""
            remedy = _REMEDIES.get(leak.operation, "Keep the value as a tensor.")
            raise UnsupportedModelError(
                f"{leak}, so that it is unknown whether {names} after it depend on it. {remedy} Or pass "
                f"strict=False: then every site after this line has all sites before it as parents.{more}"
            )
        return tuple(leaks)

    def _leak(self, escape: Escape) -> Leak:
        sites, arguments = [], []
        for source in self.tracker.sources(escape.taint):
            if isinstance(source, Noise | PlateRows) or self._is_no_data(source):
                continue
            before = [source] if isinstance(source, str) else self._observed_before(source, escape.moment)
            sites += before
            if not before:
                arguments += [argument_name(path) for path in self._leaves_of(source)]
        affects = tuple(record.name for record in self.records[escape.moment :])
        place = (escape.filename, escape.line, escape.code)
        return Leak(tuple(sites), tuple(dict.fromkeys(arguments)), escape.operation, *place, affects)

    def _spread(self, leak: Leak) -> None:
        """Let a Python value reach every site after it.

        Numbers read from integer arguments, and conditions on whole arguments, are sizes and checks: no
        inputs.
        """
        records = {record.name: record for record in self.records}
        for name in leak.affects if leak.sites else ():
            for earlier in self.records:
                if earlier.name == name:
                    break
                if earlier.holds_data or not earlier.observed:  # a factor has no value
                    self.parents[name][earlier.name] = None
        for path, leaf in self.leaves.items():
            if argument_name(path) not in leak.arguments:
                continue
            if not _is_integer(leaf) and (leaf.numel() == 1 or leak.operation != "bool"):
                for name in leak.affects:
                    self.parents[name][self._input(path, records[name])] = None
            else:
                self.notes.append(f"{leak}; its value is taken as fixed")

    def _leaves_of(self, source: Region | tuple[str, int]) -> list[ArgumentPath]:
        """Return the arguments that a region belongs to: one, unless arguments overlap in memory."""
        if not isinstance(source, Region):
            return [self.by_id[source[1]]]
        here = sorted(self._leaves_at(source), key=lambda item: item[1].numel())
        for path, leaf in here if len(here) > 1 else ():
            if covering(source, [(path, Region.of(leaf))]):
                return [path]
        return [path for path, _ in here]

    def _leaves_at(self, region: Region) -> list[tuple[ArgumentPath, torch.Tensor]]:
        return [
            (path, leaf)
            for path, leaf in self.leaves.items()
            if leaf.layout is torch.strided and leaf.untyped_storage()._cdata == region.storage
        ]

    def _connect(self, i: int, record: SiteRecord) -> None:
        parents = self.parents[record.name]
        for source in self.tracker.sources(record.reaches_value) if record.reaches_value else ():
            if isinstance(source, str):
                parents[source] = None
                if source not in self.observed:
                    self.without_data.add(record.name)
        reaches = record.reaches_distribution
        for source in self.tracker.sources(reaches) if reaches else ():
            if isinstance(source, str):
                parents[source] = None
                continue
            if isinstance(source, Noise):
                self.notes.append(
                    f"{source.filename}:{source.line}: `{source.code}` draws random numbers outside of "
                    f"pyro.sample; they reach site '{record.name}', and the graph does not know them"
                )
                continue
            if isinstance(source, PlateRows) or self._is_no_data(source):
                continue
            sites = self._observed_before(source, i)
            if sites:
                parents.update(dict.fromkeys(sites))
                self.not_generative.setdefault(
                    record.name,
                    "its distribution uses observed data directly; use the value that pyro.sample returns",
                )
                continue
            for path in self._leaves_of(source):
                row = self._loop_row(path, source, record)
                parents[
                    self._input(path, record) if row is None else self._row_input(path, row, source, record)
                ] = None

    def _loop_row(self, path: ArgumentPath, source: Any, record: SiteRecord) -> LoopRow | None:
        """Return which row of a leaf a region is, if it is the one that the iteration of a site is about."""
        leaf = self.leaves[path]
        key = part_of(leaf, source) if record.loops and isinstance(source, Region) else None
        if key is None:
            return None
        column = isinstance(key, tuple)
        index = key[1] if isinstance(key, tuple) else key
        for plate, position in record.loops:
            indices = self.tracker.plates.get(plate)
            if indices is not None and int(indices[position]) == index:
                return LoopRow(plate, position, column)
        return None

    def _row_input(self, path: ArgumentPath, row: LoopRow, source: Region, record: SiteRecord) -> str:
        name = argument_name((*path, row))
        self.input_paths[name] = (*path, row)
        self.loops[name] = ((row.plate, row.position),)
        shape = torch.Size(source.size)
        self.alignments[name] = alignment_of(shape, {f.dim: (f.name, {f.size}) for f in record.plates})
        return name

    def _is_no_data(self, source: Any) -> bool:
        """Whether a region is no input: it is empty, a constant of the model, or the indices of a plate themselves."""
        if not isinstance(source, Region):
            return False
        plates = [(name, Region.of(indices)) for name, indices in self.tracker.plates.items()]
        if 0 in source.size or covering(source, plates):
            return True
        return self.tracker.is_outside(source) and not self._leaves_at(source)

    def _observed_before(self, source: Region | tuple[str, int], moment: int) -> list[str]:
        """Return the observed sites, among the first ones, whose values together hold a region."""
        if not isinstance(source, Region) or 0 in source.size:
            return []
        earlier = self.records[:moment]
        return covering(source, [(r.name, r.region) for r in earlier if r.region is not None])

    def _is_taken(self, name: str) -> bool:
        """Whether a site, a plate or a parameter has a name; deterministic ones do not count."""
        nodes: Any = self.trace.nodes
        is_free = name not in nodes or nodes[name].get("infer", {}).get("_deterministic")
        return name in self.site_names or not is_free

    def _input(self, path: ArgumentPath, record: SiteRecord) -> str:
        if path in self.clashes:
            raise UnsupportedModelError(self.clashes[path])
        name = argument_name(path)
        while self._is_taken(name) or self.input_paths.get(name, path) != path:
            name += "_"
        self.input_paths[name] = path
        alignment, rows, places = self._align(path, record)
        if name not in self.alignments or len(alignment.plates) > len(self.alignments[name].plates):
            self.alignments[name], self.rows[name] = alignment, rows
            if places:
                self.places[name] = places
        return name

    def _align(
        self, path: ArgumentPath, record: SiteRecord
    ) -> tuple[Alignment, dict[int, str], tuple[tuple[int, int], ...]]:
        """Return how a leaf relates to the plates of a site: by the rows taken from it, else by its shape."""
        leaf = self.leaves[path]
        frames = {frame.name: frame for frame in record.plates}
        taken = {dim: plate for dim, plate in self.taken.get(path, {}).items() if plate in frames}
        shape = list(leaf.shape)
        for dim, plate in taken.items():
            shape[dim] = frames[plate].size
        sizes = {frame.dim: (frame.name, {frame.size}) for frame in record.plates}
        alignment = alignment_of(torch.Size(shape), sizes)
        rows = {frames[plate].dim - alignment.event_dim: plate for plate in alignment.plates}
        if all(rows.get(dim) == plate for dim, plate in taken.items()):
            return alignment, rows, ()
        plates = sorted(taken.values(), key=lambda plate: frames[plate].dim)
        rest = [size for dim, size in zip(range(-len(shape), 0), shape, strict=True) if dim not in taken]
        alignment = Alignment(tuple(plates), len(rest), torch.Size(rest).numel())
        return alignment, taken, tuple((dim, frames[plate].dim) for dim, plate in taken.items())

    def _note_unmatched(self, name: str, leaf: torch.Tensor) -> None:
        """Say so if an input seems to vary along a plate but its shape does not show it."""
        alignment = self.alignments[name]
        for record in self.records:
            if name not in self.parents[record.name]:
                continue
            for frame in record.plates:
                sizes = {frame.size, frame.full_size} - {1}
                if frame.name not in alignment.plates and not sizes.isdisjoint(leaf.shape):
                    self.notes.append(
                        f"input '{name}' of shape {tuple(leaf.shape)} is taken as one value for all of plate "
                        f"'{frame.name}' (dim {frame.dim}, size {frame.size}); if it has one entry for each "
                        "index, give it a shape whose dimensions align with the plates from the right"
                    )
                    return

    def _look_for_improper(self) -> None:
        """Note why samples of the unconditioned model are not the model."""
        sampled = [record.name for record in self.records if record.name not in self.without_data]
        common = (
            common_scale(self.trace.nodes[name] for name in sampled) or 1.0
        )  # with one for all, it still is
        for record in self.records:
            site = self.trace.nodes[record.name]
            if record.name in self.without_data:
                self.not_generative.setdefault(record.name, "it is a factor, not data")
                continue
            if is_improper(site["fn"]):
                self.not_generative[record.name] = IMPROPER
            plain = record.name.removesuffix("_observed").removesuffix("_unobserved")
            half_observed = (
                plain != record.name and {f"{plain}_observed", f"{plain}_unobserved"} <= self.site_names
            )
            if site["mask"] is not None and site["mask"] is not True and not half_observed:
                self.not_generative.setdefault(record.name, "it is under poutine.mask")
            fn = site["fn"]
            while hasattr(fn, "base_dist"):
                if isinstance(fn, pyro.distributions.MaskedDistribution):
                    self.not_generative.setdefault(record.name, "its distribution is masked")
                fn = fn.base_dist
            scale = own_scale(site)
            if scale is None or abs(scale - common) > 1e-6 * abs(common):
                self.not_generative.setdefault(record.name, "it is under poutine.scale")

    def _graph(self) -> ModelGraph:
        dag = nx.DiGraph()
        dag.add_nodes_from(self.input_paths)
        dag.add_nodes_from(record.name for record in self.records)
        dag.add_edges_from((parent, name) for name, parents in self.parents.items() for parent in parents)
        sizes: dict[Node, int] = {record.name: record.event_size for record in self.records}
        plates: dict[Node, Iterable[str]] = {
            record.name: tuple(frame.name for frame in record.plates) for record in self.records
        }
        for name, alignment in self.alignments.items():
            sizes[name], plates[name] = alignment.event_size, alignment.plates
        return ModelGraph(
            dag,
            [record.name for record in self.records if record.observed],
            inputs=list(self.input_paths),
            marginalised=[record.name for record in self.records if record.enumerated],
            event_sizes=sizes,
            plates=plates,
        )


def _is_inside_an_argument(path: ArgumentPath) -> bool:
    return isinstance(path[0], str) and len(path) > 1


def own_scale(site: Mapping[str, Any]) -> float | None:
    """Return by how much a site's log-density is scaled beyond its subsampled plates; None if that differs in it.

    Args:
        site: A node of a trace.
    """
    of_plates = 1.0
    for frame in site["cond_indep_stack"]:
        if frame.size > 0 and frame.full_size is not None:
            of_plates *= frame.full_size / frame.size
    scale = torch.as_tensor(site["scale"]) / of_plates
    if not scale.numel():
        return 1.0
    first = float(scale.flatten()[0])
    if bool(((scale - first).abs() > 1e-6 * abs(first)).any()):
        return None
    return 1.0 if abs(first - 1.0) <= 1e-6 else first


def common_scale(sites: Iterable[Mapping[str, Any]]) -> float | None:
    """Return by how much all of some sites are scaled (:func:`own_scale`); None if not all by the same.

    Args:
        sites: Nodes of a trace.
    """
    scales = [own_scale(site) for site in sites]
    first = scales[0] if scales else 1.0
    if first is None or any(scale is None or abs(scale - first) > 1e-6 * abs(first) for scale in scales):
        return None
    return first


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)


# ---------------------------------------------------------------- the same model at other values


class RerunError(UnsupportedModelError):
    """A model cannot be evaluated at other values than those it drew."""


def density(site: Mapping[str, Any], *, elementwise: bool = False) -> torch.Tensor:
    """Return the log-density at a site of a trace, masked and scaled as in the model.

    Args:
        site: A node of a trace.
        elementwise: Whether to leave independent elements of an event apart.

    Returns:
        A tensor of the site's batch shape, or of batch shape and independent event shape.

    Raises:
        RerunError: If the log-density cannot be evaluated at this value.
    """
    fn, value = site["fn"], site["value"]
    base = undressed(fn) if elementwise else fn
    try:
        log_density = log_density_at(base, value)
    except Exception as error:  # a flow may know its inverse only for values that it drew
        raise _failure(error) from error
    if not elementwise:
        return scale_and_mask(log_density, site["scale"], site["mask"])
    apart = len(fn.event_shape) - len(base.event_shape)
    log_density = log_density.expand(fn.batch_shape + fn.event_shape[:apart])
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask
            log_density = log_density * (_widened(mask, apart) if isinstance(mask, torch.Tensor) else mask)
        fn = fn.base_dist
    mask, scale = site["mask"], site["scale"]
    scale = _widened(scale, apart) if isinstance(scale, torch.Tensor) else scale
    return scale_and_mask(
        log_density, scale, _widened(mask, apart) if isinstance(mask, torch.Tensor) else mask
    )


def _failure(error: Exception) -> RerunError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RerunError(f"The model cannot be evaluated at other values: {reason.rstrip('.')}.")


def _widened(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    return tensor.reshape(tensor.shape + (1,) * dims)


def differentiable(value: torch.Tensor) -> bool:
    """Whether gradients exist with respect to values of this type."""
    return value.is_floating_point() or value.is_complex()


class Rerun:
    """A model at the values of one trace, to be run again at others.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with these arguments.

    Attributes:
        graph: The traced graph.
        sites: The sites of the trace, in the order in which the model has them: a dependence goes forward.
        values: Their values, of those that have one.
        subsamples: The indices that plates drew; every run has the same.
    """

    def __init__(self, model: Callable, args: tuple, kwargs: dict[str, Any], traced: TracedModel) -> None:
        if traced.converted:
            args, kwargs = with_tensors(args, kwargs)
        self.model, self.args, self.kwargs, self.traced = model, args, kwargs, traced
        self.graph = traced.graph
        nodes: Mapping[str, Any] = traced.trace.nodes
        known = set(self.graph.nodes)
        self.sites = {name: nodes[name] for name in nodes if name in known}
        self.values = {
            name: torch.as_tensor(site["value"]).detach().clone()
            for name, site in self.sites.items()
            if name not in traced.without_data
        }
        self.subsamples = {
            name: node["value"]
            for name, node in nodes.items()
            if name not in known and node["type"] == "sample" and site_is_subsample(node)
        }

    def leaves(self) -> dict[ArgumentPath, torch.Tensor]:
        """Return the tensors among the arguments, and inputs that the model has from elsewhere, by path."""
        leaves = argument_leaves(self.model, self.args, self.kwargs)
        paths = {path for path in self.traced.argument_paths.values() if path not in leaves}
        if paths:
            outside = outside_tensors(self.model, self.args, self.kwargs)
            leaves.update({path: outside[path] for path in paths if path in outside})
        return leaves

    def event_dim(self, name: str) -> int:
        """Return how many of the rightmost dimensions of a site or an input are one value."""
        if name in self.traced.event_dims:
            return self.traced.event_dims[name]
        return len(self.sites[name]["fn"].event_shape)

    def at(
        self,
        values: Mapping[str, torch.Tensor],
        *,
        replaced: Mapping[int, torch.Tensor] | None = None,
        stir: bool = False,
        gradients: bool = False,
        seed: int = 0,
    ) -> Any:
        """Trace the model at given values.

        Args:
            values: Values by site.
            replaced: Tensors to put in the place of arguments, by the ``id`` of these.
            stir: Whether to add noise to parameters.
            gradients: Whether to keep the autograd graph.
            seed: The random state: two runs differ by what was changed only.

        Returns:
            The trace.

        Raises:
            RerunError: If the model does not run at these values. The message has the model's own.
        """
        try:
            args, kwargs = self.args, self.kwargs
            handlers: list[Any] = [GivenValues({**self.subsamples, **values}, stir=stir)]
            if replaced:
                args, kwargs = replaced_arguments(args, kwargs, replaced)
                handlers.append(Replaced(replaced))
            with quiet_run(self.model), torch.set_grad_enabled(gradients):
                torch.manual_seed(seed)
                return run_model(self.model, args, kwargs, *handlers)
        except Exception as error:  # anything may go wrong in a user's model
            raise _failure(error) from error

    def densities(
        self, values: Mapping[str, torch.Tensor], names: Iterable[str] | None = None, *, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """Return the log-densities of some sites (by default all that the run has) at given values."""
        trace = self.at(values, seed=seed)
        wanted = [name for name in self.sites if name in trace] if names is None else names
        with torch.no_grad():
            return {name: density(trace.nodes[name]) for name in wanted}


def differs(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Return where two tensors differ by more than rounding."""
    tolerance = 1e-9 if one.dtype == torch.float64 else 1e-5
    return ~torch.isclose(one, two, rtol=tolerance, atol=tolerance, equal_nan=True)


Rows = Mapping[int, str]
"""For dimensions of a tensor, counted from the right, the plate whose rows are taken."""


# ---------------------------------------------------------------- rows of data that plates take


def watch_leaves(
    tracker: TaintTracker, model: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[dict[ArgumentPath, torch.Tensor], dict[ArgumentPath, torch.Tensor]]:
    """Let a tracker watch the tensors that a model is given, and those that it uses without; return both."""
    leaves, outside = argument_leaves(model, args, kwargs), outside_tensors(model, args, kwargs)
    for leaf in leaves.values():
        tracker.watch_argument(leaf)
    for leaf in outside.values():
        tracker.watch_outside(leaf)
    return leaves, outside


def rows_taken(
    tracker: TaintTracker, leaves: Mapping[ArgumentPath, torch.Tensor]
) -> tuple[dict[ArgumentPath, dict[int, str]], dict[ArgumentPath, str]]:
    """Return for tensors of which dimensions the rows of which plates were taken in a run.

    Args:
        tracker: What watched the run.
        leaves: The tensors, by path.

    Returns:
        The first plate by path and dimension; and for tensors with rows of two plates along one dimension, why they
        cannot be inputs, in words.

    Raises:
        UnsupportedModelError: If it is ambiguous: rows of a tensor computed from one with several dimensions of that
            size. The message names the tensor.
    """
    found: dict[ArgumentPath, dict[int, str]] = {}
    clashes: dict[ArgumentPath, str] = {}
    for use in [*tracker.row_uses, *_read_one_by_one(tracker)]:
        for path, dim in _origins(tracker, leaves, use.tensor, use.dim, use.taint, use.plate):
            before = found.setdefault(path, {}).setdefault(dim, use.plate)
            if before != use.plate:
                clashes[path] = (
                    f"Expected rows of one plate along each dimension of {argument_name(path)!r}; the model takes "
                    f"those of {before!r} and of {use.plate!r} along dimension {dim}. Pass the tensor twice."
                )
    return found, clashes


def require_rows_of_indices(tracker: TaintTracker, outside: Mapping[ArgumentPath, torch.Tensor]) -> None:
    """Refuse tensors from outside of a call that ``pyro.subsample`` left in their own order beside permuted indices.

    Raises:
        UnsupportedModelError: If there is one. The message names it, and what to write.
    """
    for use in tracker.by_position:
        for path, _ in _origins(tracker, outside, use.tensor, use.dim, use.taint, use.plate):
            name = argument_name(path)
            raise UnsupportedModelError(
                f"Expected rows of {name!r} that belong to the indices of plate {use.plate!r}; these are all there "
                "are, in another order, for which pyro.subsample returns the tensor as it is. Set up with the "
                f"indices in order or with fewer, or index with those of the plate ({name}[indices])."
            )


def _read_one_by_one(tracker: TaintTracker) -> list[RowUse]:
    """Return the uses of tensors of which a loop read just the rows of a batch, in their order."""
    reads: dict[Any, tuple[torch.Tensor, int, list[int]]] = {}
    for tensor, dim, index in tracker.row_reads:
        if storage_of(tensor) is not None:
            reads.setdefault((Region.of(tensor), dim), (tensor, dim, []))[2].append(index)
    return [
        RowUse(tensor, dim, plate, tracker.of_tensor(tensor)[0])
        for tensor, dim, indices in reads.values()
        for plate, chosen in tracker.plates.items()
        if indices == chosen.tolist() and indices != list(range(tensor.shape[dim]))
    ]


def _origins(
    tracker: TaintTracker,
    leaves: Mapping[ArgumentPath, torch.Tensor],
    tensor: torch.Tensor,
    dim: int,
    taint: int,
    plate: str,
) -> list[tuple[ArgumentPath, int]]:
    """Return which dimensions of which leaves a dimension of a tensor comes from."""
    storage = storage_of(tensor)
    key = None if storage is None else storage._cdata
    here = [(path, leaf) for path, leaf in leaves.items() if _lies_in(leaf, key)]
    if here:
        region = Region.of(tensor)
        exact = [(path, leaf) for path, leaf in here if Region.of(leaf) == region]
        return [(path, _same_dim(tensor, dim, leaf)) for path, leaf in (exact or _around(tensor, here))]
    if key in tracker.row_results:
        result, use = tracker.row_results[key]
        at = _same_dim(tensor, dim, result)
        return _origins(tracker, leaves, use.tensor, at, use.taint, plate)
    found = []
    size = tensor.shape[dim]
    for path, leaf in leaves.items():
        sources = [source for source in tracker.sources(taint) if _is_of(source, leaf)]
        if not sources or size < 2:
            continue
        dims = [d for d in range(-leaf.dim(), 0) if leaf.shape[d] == size]
        if leaf.shape == tensor.shape:
            dims = [dim]
        if len(dims) > 1:
            raise UnsupportedModelError(
                f"Expected to know along which dimension of {argument_name(path)!r}, of shape {tuple(leaf.shape)}, the "
                f"model takes the rows of plate {plate!r}; it takes them from a tensor of shape "
                f"{tuple(tensor.shape)} that was computed from it. Index {argument_name(path)!r} itself, x[ind], and "
                "compute afterwards."
            )
        found += [(path, d) for d in dims]
    return found


def _lies_in(leaf: torch.Tensor, key: int | None) -> bool:
    storage = storage_of(leaf)
    return storage is not None and storage._cdata == key


def _is_of(source: Any, leaf: torch.Tensor) -> bool:
    if isinstance(source, Region):
        return _lies_in(leaf, source.storage)
    return source == ("argument", id(leaf))


def _around(
    tensor: torch.Tensor, candidates: list[tuple[ArgumentPath, torch.Tensor]]
) -> list[tuple[ArgumentPath, torch.Tensor]]:
    """Return the leaf with the least extent around the start of a view (leaves may overlap)."""
    start = int(tensor.storage_offset())
    around = [
        (path, leaf)
        for path, leaf in candidates
        if int(leaf.storage_offset()) <= start <= int(leaf.storage_offset()) + _extent(leaf)
    ]
    return sorted(around or candidates, key=lambda item: _extent(item[1]))[:1]


def _extent(tensor: torch.Tensor) -> int:
    return sum(stride * (size - 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _same_dim(view: torch.Tensor, dim: int, base: torch.Tensor) -> int:
    """Return the dimension of a tensor that a dimension of a view of it runs along."""
    size, stride = view.shape[dim], view.stride(dim)
    dims = range(-base.dim(), 0)
    by_stride = [d for d in dims if base.stride(d) == stride and base.shape[d] > 1]
    exact = [d for d in by_stride if base.shape[d] == size] or by_stride
    if len(exact) == 1:
        return exact[0]
    return dim if dim in dims else dims[0]


def rows_of_run(
    model: Callable, args: tuple, kwargs: dict[str, Any], handlers: tuple[Any, ...] = ()
) -> dict[ArgumentPath, dict[int, str]]:
    """Run a model, and return of which tensors it takes the rows of which plates.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        handlers: Handlers around the run, outermost first.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x, ind):
        ...     with pyro.plate("data", len(x), subsample=ind):
        ...         pyro.sample("z", dist.Normal(x[ind, 0], 1.0))
        >>> rows_of_run(model, (torch.zeros(5, 2), torch.tensor([3, 1])), {})
        {('x',): {-2: 'data'}}
    """
    args, kwargs = with_tensors(args, kwargs)
    tracker = TaintTracker()
    leaves, outside = watch_leaves(tracker, model, args, kwargs)
    with torch.no_grad(), pyro.poutine.block(), pyro.validation_enabled(False), PlateWatch(tracker):
        traced = model
        for handler in reversed(handlers):
            traced = handler(traced)
        with watching(tracker):
            traced(*args, **kwargs)
    return rows_taken(tracker, {**outside, **leaves})[0]


def take_rows(
    name: str, value: torch.Tensor, plates: Rows, taken: Rows, states: Mapping[str, Any]
) -> torch.Tensor:
    """Return the rows of an input that one call is about.

    Args:
        name: The name of the input.
        value: Its value, as the model got it.
        plates: For its dimensions, the plates along which it varies.
        taken: For its dimensions, the plates whose rows the model takes in this call.
        states: The plates of the call, with ``size``, ``full_size`` and ``indices`` (None for all in order).

    Raises:
        UnsupportedModelError: If it cannot be known which rows are meant. The message names the input.
    """
    strange = [f"{plate!r} along dimension {dim}" for dim, plate in taken.items() if plates.get(dim) != plate]
    partial = [p for p in taken.values() if p in states and states[p].indices is not None]
    if strange and partial:
        raise UnsupportedModelError(
            f"Expected {name!r} to be used as when the guide was set up; in this call the model takes the rows of "
            f"plate {', '.join(strange)} from it. Set up the guide with a call that takes rows: guide.setup(*args)."
        )
    for dim, plate in plates.items():
        state = states.get(plate)
        if state is None or -dim > value.dim():
            continue
        size = value.shape[dim]
        if taken.get(dim) == plate:
            if state.indices is not None:
                value = value.index_select(dim, state.indices.to(value.device))
            elif size != state.size:
                value = value.narrow(dim, 0, state.size)
        elif state.indices is not None and size not in (1, state.size):
            raise UnsupportedModelError(
                f"Expected {name!r} with {state.size} entries along dimension {dim}, those of plate {plate!r} in this "
                f"call, or rows of it that the model takes by the plate's indices, x[ind] or pyro.subsample(x, "
                f"event_dim=...); it has {size}, and the model was not seen to take any."
            )
    return value


def arranged(value: torch.Tensor, places: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Return a tensor with the dimensions of plates where the plates are, and all others right of them.

    Args:
        value: The tensor.
        places: Pairs: a dimension of the tensor and that of its plate, both counted from the right. Empty where they
            are in their places already.

    Example:
        >>> arranged(torch.zeros(3, 50), ((-1, -2),)).shape
        torch.Size([50, 1, 3])
    """
    if not places:
        return value
    order = sorted(places, key=lambda pair: pair[1])
    dims = [dim + value.dim() for dim, _ in order]
    rest = [d for d in range(value.dim()) if d not in dims]
    value = value.permute(*dims, *rest)
    batch = [1] * -order[0][1]
    for (_, plate_dim), size in zip(order, value.shape, strict=False):
        batch[plate_dim] = size
    return value.reshape(*batch, *value.shape[len(dims) :])
