"""Turn the records of one run into a graph: sources become parents, argument regions become inputs."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import networkx as nx
import pyro
import torch
from pyro.poutine import Trace

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.graphs.model_graph import ModelGraph, Node
from pyro_graphflows.inspect.arguments import (
    ArgumentPath,
    Layout,
    argument_leaves,
    argument_name,
    covering,
    layout_of,
    not_followed,
    part_of,
)
from pyro_graphflows.inspect.modes import watching
from pyro_graphflows.inspect.record import Recorder, SiteRecord, quiet_run, run_model
from pyro_graphflows.inspect.taint import Escape, Noise, Region, TaintTracker
from pyro_graphflows.inspect.traced import Leak, TracedModel

__all__ = ["trace_once"]

_REMEDIES = {
    "bool": "Choose between tensors with torch.where(condition, a, b) instead of a Python condition.",
    "item": "Keep the value as a tensor: leave out .item().",
    "float": "Keep the value as a tensor: leave out float(), and use torch functions.",
    "int": "Keep the value as a tensor: leave out int(); index with the tensor itself.",
    "index": "Index a tensor (torch.stack(items)[k]) instead of a Python list, and mask instead of range(k).",
    "numpy": "Use torch functions instead of those of NumPy.",
    "array": "Use torch functions instead of those of NumPy.",
    "tolist": "Keep the values as a tensor: leave out .tolist().",
}


def trace_once(model: Callable, args: tuple, kwargs: dict[str, Any], *, strict: bool) -> TracedModel:
    """Run a model inside the tracer and assemble what it shows."""
    leaves = argument_leaves(model, args, kwargs)
    tracker = TaintTracker()
    for leaf in leaves.values():
        tracker.watch_argument(leaf)
    recorder = Recorder(tracker)
    with quiet_run(model):
        trace = run_model(model, args, kwargs, recorder, watching(tracker))
    return _Assembly(model, args, kwargs, leaves, tracker, recorder.records, trace, strict).finish()


class _Assembly:
    """Turns the records of one run into a graph."""

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        leaves: Mapping[ArgumentPath, torch.Tensor],
        tracker: TaintTracker,
        records: list[SiteRecord],
        trace: Trace,
        strict: bool,
    ) -> None:
        self.leaves, self.tracker, self.records, self.trace, self.strict = (
            leaves,
            tracker,
            records,
            trace,
            strict,
        )
        self.notes = not_followed(model, args, kwargs)
        self.site_names = {record.name for record in records}
        self.observed = {record.name for record in records if record.observed}
        self.by_id = {id(leaf): path for path, leaf in leaves.items()}
        self.parents: dict[str, dict[Hashable, None]] = {record.name: {} for record in records}
        self.input_paths: dict[str, ArgumentPath] = {}
        self.layouts: dict[str, Layout] = {}
        self.without_data = {r.name for r in records if r.observed and not r.holds_data}
        self.not_generative: dict[str, str] = {}

    def finish(self) -> TracedModel:
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
            self._note_unmatched(name, self.leaves[path])
        self._look_for_improper()
        return TracedModel(
            graph=self._graph(),
            trace=self.trace,
            argument_paths=argument_paths,
            event_dims={name: layout.event_dim for name, layout in self.layouts.items()},
            index_inputs=frozenset(
                name for name, path in self.input_paths.items() if _is_integer(self.leaves[path])
            ),
            without_data=frozenset(self.without_data),
            not_generative=self.not_generative,
            leaks=leaks,
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _path_of_value(self, record: SiteRecord) -> ArgumentPath | None:
        """Return where an observed value is among the arguments: a whole one, a row or a column."""
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
            if isinstance(source, Noise):
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
        for source in self.tracker.sources(record.reaches_value):
            if isinstance(source, str):
                parents[source] = None
                if source not in self.observed:
                    self.without_data.add(record.name)
        for source in self.tracker.sources(record.reaches_distribution):
            if isinstance(source, str):
                parents[source] = None
                continue
            if isinstance(source, Noise):
                self.notes.append(
                    f"{source.filename}:{source.line}: `{source.code}` draws random numbers outside of "
                    f"pyro.sample; they reach site '{record.name}', and the graph does not know them"
                )
                continue
            if isinstance(source, Region) and 0 in source.size:
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
                parents[self._input(path, record)] = None

    def _observed_before(self, source: Region | tuple[str, int], moment: int) -> list[str]:
        """Return the observed sites, among the first ones, whose values together hold a region."""
        if not isinstance(source, Region) or 0 in source.size:
            return []
        earlier = self.records[:moment]
        return covering(source, [(r.name, r.region) for r in earlier if r.region is not None])

    def _input(self, path: ArgumentPath, record: SiteRecord) -> str:
        name = argument_name(path)
        while name in self.site_names:
            name += "_"
        self.input_paths[name] = path
        plates = {frame.dim: (frame.name, {frame.size, frame.full_size}) for frame in record.plates}
        layout = layout_of(self.leaves[path].shape, plates)
        if name not in self.layouts or len(layout.plates) > len(self.layouts[name].plates):
            self.layouts[name] = layout
        return name

    def _note_unmatched(self, name: str, leaf: torch.Tensor) -> None:
        """Say so if an input seems to vary along a plate but its shape does not show it."""
        layout = self.layouts[name]
        for record in self.records:
            if name not in self.parents[record.name]:
                continue
            for frame in record.plates:
                if frame.name not in layout.plates and frame.size > 1 and frame.size in leaf.shape:
                    self.notes.append(
                        f"input '{name}' of shape {tuple(leaf.shape)} is taken as one value for all of plate "
                        f"'{frame.name}' (dim {frame.dim}, size {frame.size}); if it has one entry for each "
                        "index, give it a shape whose dimensions align with the plates from the right"
                    )
                    return

    def _look_for_improper(self) -> None:
        """Note why samples of the unconditioned model are not the model."""
        for record in self.records:
            site = self.trace.nodes[record.name]
            if record.name in self.without_data:
                self.not_generative.setdefault(record.name, "it is a factor, not data")
                continue
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
            if isinstance(fn, pyro.distributions.ImproperUniform):
                self.not_generative.setdefault(record.name, "its prior is improper")
            expected = 1.0
            for frame in record.plates:
                if frame.size > 0 and frame.full_size is not None:
                    expected *= frame.full_size / frame.size
            if not _equals(site["scale"], expected):
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
        for name, layout in self.layouts.items():
            sizes[name], plates[name] = layout.event_size, layout.plates
        return ModelGraph(
            dag,
            [record.name for record in self.records if record.observed],
            inputs=list(self.input_paths),
            marginalised=[record.name for record in self.records if record.enumerated],
            event_sizes=sizes,
            plates=plates,
        )


def _equals(scale: float | torch.Tensor, expected: float) -> bool:
    if isinstance(scale, torch.Tensor):
        return bool(((scale - expected).abs() <= 1e-6 * expected).all())
    return abs(scale - expected) <= 1e-6 * expected


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)
