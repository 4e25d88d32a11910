"""From a Pyro model to a model graph: run it once, watch where its random values go.

The graph has one node for each sample site and for each tensor argument that reaches a site's distribution.
``z -> x`` is an edge if the value of ``z`` enters the density of ``x``: through its parameters, through a
mask or a scale in force at ``x``, or because the observed value of ``x`` is computed from ``z``. As an
example::

    def model(w, x=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(a * w, 1.0), obs=x)

has the edges ``a -> x`` and ``w -> x``: ``w`` is an input. That ``x`` is also an argument is data, not an
edge.

Elements of sites are in :mod:`~pyro_graphflows.inspect.elements`.

The tracer follows values; probes run the traced model again, at other values or with other random numbers, and look at
what happens to the log-densities.

**Validation** compares a traced graph with gradients, changed values and equal values. It finds dependences
that pass by the tracer (values computed in another thread), and two properties that a graph with plates takes
for granted: that sites in a plate depend on their own index only (``z.cumsum(-1)`` violates it), and that all
indices are alike (constants in the model that vary along the plate violate it).

**Rows.** Row n of an input is taken to belong to element n of a plate of its size. Changing half of the rows shows
whether that is so, also for inputs whose shape does not show it (``x[:, None]`` in a plate at dimension -2), and
for those that a model turns (``x.flip(0)``, lags).

**Stability.** A guide reads the data in a run of the model of its own. What the model draws outside of ``pyro.sample``
differs there from what the likelihood sees: a mini-batch by ``torch.randperm`` pairs the latents with the rows of
another batch, and nothing shows it but the loss. Sites and edges that come and go would make the structure of a guide
a matter of luck. Two runs with different random numbers are compared.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.inspect.arguments import (
    alignment_of,
    argument_leaves,
    is_outside,
    not_followed,
    outside_tensors,
    raw_argument,
    with_tensors,
)
from pyro_graphflows.inspect.elements import split_elements
from pyro_graphflows.inspect.runs import (
    kept_random_state,
    plates_of_sites,
    random_sites,
    rows_of_plates,
    seed_random_state,
    vectorized_plates,
)
from pyro_graphflows.inspect.trace import (
    Rerun,
    RerunError,
    TracedModel,
    density,
    differentiable,
    differs,
    trace_once,
)

__all__ = [
    "REMEDY_ROWS",
    "REMEDY_STRUCTURE",
    "Validation",
    "changes",
    "changes_of_data",
    "changes_of_sites",
    "get_model_graph",
    "non_exchangeable_plates",
    "require_followed",
    "trace_model",
    "with_known_rows",
]

_MOST_OF_MAPS = 20_000  # elements times numbers of data, for maps of their own
_MANY_SITES = 200  # more are not changed one by one
_ROUNDING = 4.0  # units of rounding by which values are moved to see what it does to log-densities
_ROUNDINGS = 10.0  # times that are no difference
OTHER_SEED = 10_007
REMEDY_ROWS = (
    "Let a plate draw the rows, pyro.plate(name, size, subsample_size=...), so that guide and model have the same, or "
    "take them before the call and pass them as arguments"
)
REMEDY_STRUCTURE = "Sample all sites in every run, and choose between values with torch.where"


def get_model_graph(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    *,
    strict: bool = True,
    resolution: str = "site",
    validate: bool = False,
) -> ModelGraph:
    """Find the Bayesian network that a Pyro model defines.

    The model runs once, without gradients and without touching the random state. Parameters that it creates
    stay.

    Args:
        model: A Pyro model.
        model_args: Its positional arguments: example data.
        model_kwargs: Its keyword arguments.
        strict: What to do where a random value turns into a Python value, so that it cannot be followed:
            raise (True), or make all earlier sites parents of the sites after it (False).
        resolution: ``"site"``, or ``"element"`` to split vector sites into their elements.
        validate: Whether to compare with gradients, and with the log-densities at other values, which takes
            about two more runs for each site and plate.

    Returns:
        Sites as latent, observed or marginalised nodes (those enumerated in parallel), and tensor arguments
        that reach a distribution as inputs; event sizes and plates.

    Raises:
        UnsupportedModelError: If a random value turns into a Python value (with ``strict``), a site has
            dimensions outside of plates, or a log-density cannot be evaluated. The message names the site,
            and what to do.
        GraphflowsError: If ``resolution`` is unknown.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(w, x=None):
        ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("x", dist.Normal(a * w, 1.0), obs=x)
        >>> graph = get_model_graph(model, (torch.ones(3),), {"x": torch.zeros(3)})
        >>> graph.edges, graph.inputs, graph.plates["w"]
        ((('w', 'x'), ('a', 'x')), ('w',), ('data',))
    """
    return trace_model(
        model, model_args, model_kwargs, strict=strict, resolution=resolution, validate=validate
    ).graph


def trace_model(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    *,
    strict: bool = True,
    resolution: str = "site",
    validate: bool = False,
) -> TracedModel:
    """Like :func:`get_model_graph`, with everything else that the run shows.

    Args:
        model: A Pyro model.
        model_args: Its positional arguments: example data.
        model_kwargs: Its keyword arguments.
        strict: Whether to raise where a random value cannot be followed.
        resolution: ``"site"`` or ``"element"``.
        validate: Whether to compare with the model's behaviour.

    Returns:
        The graph, the trace, paths of arguments, leaks and notes.

    Raises:
        UnsupportedModelError: As :func:`get_model_graph`.
        GraphflowsError: If ``resolution`` is unknown.
    """
    if resolution not in ("site", "element"):
        raise GraphflowsError(f"Expected resolution 'site' or 'element'; got {resolution!r}.")
    args, kwargs = tuple(model_args), dict(model_kwargs or {})
    traced = trace_once(model, args, kwargs, strict=strict)
    rerun = Rerun(model, args, kwargs, traced)
    notes = require_followed(rerun, strict=strict)
    if traced.graph.inputs:
        traced = with_known_rows(rerun)
    traced = replace(traced, notes=tuple(dict.fromkeys((*traced.notes, *notes))))
    if validate:
        traced = _validated(traced, Validation(Rerun(model, args, kwargs, traced), strict).run())
    if resolution == "element":
        traced = split_elements(Rerun(model, args, kwargs, traced))
    return traced


def _validated(traced: TracedModel, validation: "Validation") -> TracedModel:
    graph = traced.graph
    if validation.missed:
        graph = graph.with_edges([*graph.edges, *validation.missed])
    return replace(
        traced,
        graph=graph,
        notes=tuple(dict.fromkeys((*traced.notes, *validation.notes))),
        non_exchangeable=validation.non_exchangeable,
    )


# ---------------------------------------------------------------- runs at other values


def require_followed(rerun: Rerun, *, strict: bool) -> list[str]:
    """Refuse models whose distributions use data that cannot be followed: arrays and tables among the arguments.

    Values of observed sites may come from them, as those are read on every call. Whether anything else does is seen by
    changing them: two runs for each.

    Args:
        rerun: The traced model.
        strict: Whether to raise; if not, notes say the same.

    Returns:
        Notes for the user.

    Raises:
        UnsupportedModelError: If a distribution changes with such an argument. The message has a line to write.
    """
    notes = []
    sizes = {frame.size for frame in plates_of_sites(rerun.sites).values()}
    for path, what in not_followed(rerun.model, rerun.args, rerun.kwargs).items():
        value = raw_argument(rerun.model, path, rerun.args, rerun.kwargs)
        is_list = isinstance(value, tuple | list)
        if is_list and len(value) not in sizes:
            continue  # options of the model
        try:
            before = rerun.densities(rerun.values)
            trace = rerun.at(rerun.values, replaced={id(value): _perturbed(value)})
            after = {name: density(trace.nodes[name]) for name in before}
        except (RerunError, KeyError, TypeError, ValueError):
            notes += (
                [] if isinstance(value, tuple | list) else [what]
            )  # unknown; numbers are options of a model
            continue
        changed = [name for name in before if not _alike(before[name], after[name])]
        if changed:
            message = f"site '{changed[0]}' depends on an argument that cannot be followed: {what}"
            if strict:
                raise UnsupportedModelError(f"Expected covariates in tensors; {message}.")
            notes.append(message)
    return notes


def _perturbed(value: Any) -> Any:
    """Return an array, a list of numbers, a set of tensors or a pandas table with other numbers."""
    if isinstance(value, tuple | list):
        return type(value)(_perturbed(np.array(value, dtype=float)).tolist())
    if isinstance(value, Set):
        return type(value)(map(_perturbed, value))  # type: ignore[call-arg]
    if isinstance(value, torch.Tensor):
        return torch.as_tensor(_perturbed(value.numpy(force=True))).to(value)
    if isinstance(value, np.ndarray) and value.dtype.names:
        other = value.copy()
        for name in value.dtype.names:
            other[name] = _perturbed(value[name])
        return other
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "iub":
            return np.roll(value, 1, axis=0)
        noise = np.random.default_rng(0).normal(size=value.shape) * (0.1 + value.std())
        return (value + noise).astype(value.dtype)
    if type(value).__name__ == "Series":
        return type(value)(_perturbed(value.to_numpy()), index=value.index, name=value.name)
    columns = {name: _perturbed(value[name].to_numpy()) for name in value.columns}
    return type(value)(columns, index=value.index)


def with_known_rows(rerun: Rerun) -> TracedModel:
    """Return a traced model whose inputs are put down to the plates along which they vary.

    Two runs for each input with a dimension of the size of a plate that its shape does not match, and two for all
    others.

    Args:
        rerun: The traced model.

    Returns:
        The traced model, with inputs in the plates whose elements each depend on a row of theirs, and
        ``other_rows`` for those of whose rows elements use others than their own, or some that were not seen
        to be taken.
    """
    search = _Rows(rerun)
    traced = rerun.traced
    try:
        for name, (dim, plate) in search.unmatched().items():
            if search.is_own(name, dim, plate):
                traced = _in_plate(traced, name, dim, search.frames[plate], search.shapes[name])
        other = search.with_other_rows()
    except RerunError:
        return traced
    return replace(traced, other_rows=other)


def _in_plate(traced: TracedModel, name: str, dim: int, frame: Any, shape: torch.Size) -> TracedModel:
    """Return a traced model in which a dimension of an input runs along a plate."""
    nodes: Mapping[str, Any] = traced.trace.nodes
    frames = plates_of_sites({name: site for name, site in nodes.items() if "cond_indep_stack" in site})
    rows = dict(sorted({**traced.rows[name], dim: frame.name}.items(), key=lambda row: frames[row[1]].dim))
    rest = [size for d, size in zip(range(-len(shape), 0), shape, strict=True) if d not in rows]
    places = tuple((d, frames[plate].dim) for d, plate in rows.items())
    graph = traced.graph
    graph = ModelGraph(
        graph.to_networkx(),
        graph.observed,
        inputs=graph.inputs,
        marginalised=graph.marginalised,
        event_sizes={**graph.event_sizes, name: torch.Size(rest).numel()},
        plates={**graph.plates, name: tuple(rows.values())},
    )
    return replace(
        traced,
        graph=graph,
        event_dims={**traced.event_dims, name: len(rest)},
        rows={**traced.rows, name: rows},
        places={**traced.places, name: places},
        notes=tuple(note for note in traced.notes if not note.startswith(f"input '{name}' of shape")),
    )


class _Rows:
    """The search for the rows of inputs that elements of plates use: some rows are changed, and then the others."""

    def __init__(self, rerun: Rerun) -> None:
        self.rerun = rerun
        self.frames = {name: f for name, f in plates_of_sites(rerun.sites).items() if f.full_size > 1}
        paths = rerun.traced.argument_paths
        leaves = rerun.leaves()
        self.leaves = {
            name: leaves[paths[name]]
            for name in rerun.graph.inputs
            if paths[name] in leaves
            and leaves[paths[name]].is_floating_point()
            and name not in rerun.traced.loops
        }
        self.shapes = {name: leaf.shape for name, leaf in self.leaves.items()}

    def unmatched(self) -> dict[str, tuple[int, str]]:
        """Return the inputs with one dimension of the size of a plate around their sites, which is in no plate yet."""
        traced, found = self.rerun.traced, {}
        for name, shape in self.shapes.items():
            rows = traced.rows.get(name, {})
            around = {plate for site in self._sites_of(name) for plate in traced.graph.plates[site]}
            pairs = [
                (dim, plate)
                for plate in self.frames
                if plate in around and plate not in rows.values()
                for dim in range(-len(shape), 0)
                if dim not in rows and shape[dim] == self.frames[plate].size
            ]
            if len(pairs) == 1 and name not in traced.taken:
                found[name] = pairs[0]
        return found

    def is_own(self, name: str, dim: int, plate: str) -> bool:
        """Whether each element of a plate depends on the row of its own, along a dimension of an input."""
        some = self._half(self.frames[plate].size)
        changed = self._changed({name: dim}, plate, self._elements)
        return bool(changed) and all(
            torch.equal(one, some) and torch.equal(other, ~some) for one, other in changed
        )

    def with_other_rows(self) -> dict[str, str]:
        """Return the inputs of whose rows elements of a plate use others than their own, or some that were not seen."""
        found: dict[str, str] = {}
        for plate, frame in self.frames.items():
            for name, shape in self.shapes.items() if frame.full_size != frame.size else ():
                rows = self.rerun.traced.rows.get(name, {})
                free = [d for d in range(-len(shape), 0) if shape[d] == frame.full_size and d not in rows]
                if len(free) == 1 and plate not in rows.values() and self._are_rows({name: free[0]}, plate):
                    found[name] = plate
        for plate in self.frames:
            dims = {
                name: dim
                for name in self.leaves
                for dim, other in self.rerun.traced.rows.get(name, {}).items()
                if other == plate
            }
            if dims and self._are_other(dims, plate):
                found.update(
                    {name: plate for name, dim in dims.items() if self._are_other({name: dim}, plate)}
                )
        return found

    def _are_other(self, dims: Mapping[str, int], plate: str) -> bool:
        """Whether an element changes with the rows of the others and not with its own: then it reads one of these."""
        some = self._half(self.frames[plate].size)
        return any(
            bool((~one & other & some).any() | (one & ~other & ~some).any())
            for one, other in self._changed(dims, plate, self._elements)
        )

    def _are_rows(self, dims: Mapping[str, int], plate: str) -> bool:
        """Whether elements of a plate depend on some of the rows, and not all on all of them, as on a mean."""
        return any(bool((one ^ other).any()) for one, other in self._changed(dims, plate, self._any))

    def _changed(
        self, dims: Mapping[str, int], plate: str, halves: Callable[[str, str], list[torch.Tensor]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Change half of the rows of some inputs, and the others.

        Args:
            dims: The inputs, and the dimension of their rows.
            plate: The plate.
            halves: A function from input and plate to the numbers of the rows of both halves.

        Returns:
            For each site that changes, which elements of the plate do in either run.
        """
        frame = self.frames[plate]
        sites = [
            site
            for site in dict.fromkeys(site for name in dims for site in self._sites_of(name))
            if plate in self.rerun.graph.plates[site]
        ]
        before = self.rerun.densities(self.rerun.values, sites)
        after = []
        for half in (0, 1):
            replaced = {
                id(self.leaves[name]): _changed_in(self.leaves[name], dim, halves(name, plate)[half])
                for name, dim in dims.items()
            }
            trace = self.rerun.at(self.rerun.values, replaced=replaced)
            with torch.no_grad():
                after.append({site: density(trace.nodes[site]) for site in sites})
        changed = []
        for site in sites:
            if before[site].dim() < -frame.dim or before[site].shape[frame.dim] != frame.size:
                continue
            one, other = (
                differs(before[site], each[site]).movedim(frame.dim, 0).reshape(frame.size, -1).any(-1).cpu()
                for each in after
            )
            if bool((one | other).any()):
                changed.append((one, other))
        return changed

    def _half(self, size: int) -> torch.Tensor:
        """Return half of some numbers, at random and always the same, as a mask."""
        numbers = torch.as_tensor(np.random.default_rng(0).permutation(size))
        mask = torch.zeros(size, dtype=torch.bool)
        mask[numbers[: (size + 1) // 2]] = True
        return mask

    def _elements(self, name: str, plate: str) -> list[torch.Tensor]:
        """Return the rows of half of the elements, by the plate's indices where rows are taken, and all other rows."""
        mask = self._half(self.frames[plate].size)
        if plate not in self.rerun.traced.taken.get(name, {}).values():
            return [half.nonzero()[:, 0] for half in (mask, ~mask)]
        indices = torch.as_tensor(self.rerun.subsamples[plate]).cpu()
        rows = torch.zeros(self.frames[plate].full_size, dtype=torch.bool)
        rows[indices[mask]] = True
        return [half.nonzero()[:, 0] for half in (rows, ~rows)]

    def _any(self, name: str, plate: str) -> list[torch.Tensor]:
        """Return half of all rows, and the others."""
        mask = self._half(self.frames[plate].full_size)
        return [half.nonzero()[:, 0] for half in (mask, ~mask)]

    def _sites_of(self, name: str) -> list[str]:
        children = self.rerun.graph.children(name)
        return [site for site in self.rerun.sites if site in children]


def _changed_in(tensor: torch.Tensor, dim: int, rows: torch.Tensor) -> torch.Tensor:
    """Return a tensor with slightly other values, of the same signs, in some rows."""
    if tensor.layout is not torch.strided:
        return _changed_in(tensor.to_dense(), dim, rows).to_sparse(layout=tensor.layout)
    kept = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
    kept[rows.to(tensor.device)] = False
    shape = [1] * tensor.dim()
    shape[dim] = len(kept)
    other = torch.where(tensor == 0, 0.01, 1.01 * tensor)
    return torch.where(kept.reshape(shape), tensor, other)


def non_exchangeable_plates(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    *,
    traced: TracedModel | None = None,
    known_rows: bool = False,
) -> dict[str, tuple[str, ...]]:
    """Find the sites for which the indices of a plate differ even if all that enters is equal along it.

    That is so where constants or parameters in the model vary along the plate, or a mask does. A network that
    is shared by the indices cannot know: such constants should be arguments. This is a part of
    ``trace_model(..., validate=True)``; it takes one run for each plate.

    Args:
        model: A Pyro model.
        model_args: Its positional arguments.
        model_kwargs: Its keyword arguments.
        traced: The model as traced with these arguments, if that is at hand.
        known_rows: Whether inputs from outside of the call count as constants along plates that are there in full:
            their rows are the same in every call, as long as nobody changes them.

    Returns:
        Names of plates by site. Nothing if the model cannot be evaluated at other values than those it drew; sites that
        random numbers outside of ``pyro.sample`` reach are left out.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x, scale=torch.tensor([1.0, 2.0, 3.0])):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("x", dist.Normal(z, scale), obs=x)
        >>> non_exchangeable_plates(model, (torch.zeros(3),))
        {'x': ('data',)}
        >>> non_exchangeable_plates(model, (torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])))
        {}
    """
    args, kwargs = tuple(model_args), dict(model_kwargs or {})
    traced = trace_once(model, args, kwargs, strict=False) if traced is None else traced
    return Validation(Rerun(model, args, kwargs, traced), strict=False).equalise_plates(known_rows=known_rows)


class Validation:
    """The comparison of a traced graph with the model's behaviour.

    Args:
        rerun: The traced model.
        strict: Whether to raise for dependence across a plate.

    Attributes:
        notes: What was found, in words.
        missed: Pairs (parent, child) that the graph does not have as edges.
        non_exchangeable: For sites whose plates' indices are non-exchangeable: those plates.
    """

    def __init__(self, rerun: Rerun, strict: bool) -> None:
        self.rerun, self.strict = rerun, strict
        self.notes: list[str] = []
        self.missed: dict[tuple[str, str], None] = {}
        self.non_exchangeable: dict[str, tuple[str, ...]] = {}

    def run(self) -> "Validation":
        """Make all comparisons.

        Raises:
            UnsupportedModelError: If a site depends on another index of its plate (with ``strict``).
        """
        for check in (self._follow_gradients, self._change_values, self._equalise_plates):
            try:
                check()
            except RerunError as error:
                self.notes.append(f"not validated ({check.__name__.strip('_').replace('_', ' ')}): {error}")
        for parent, child in self.missed:
            self.notes.append(
                f"'{child}' depends on '{parent}', which the tracer did not see; the edge was added"
            )
        return self

    def equalise_plates(self, *, known_rows: bool = False) -> dict[str, tuple[str, ...]]:
        """Return for which sites the indices of which plates are non-exchangeable.

        Args:
            known_rows: Whether inputs from outside of the call count as constants along plates in full.
        """
        try:
            self._equalise_plates(known_rows=known_rows)
        except RerunError as error:
            self.notes.append(f"not validated (equalise plates): {error}")
        return self.non_exchangeable

    def _expect(self, parent: str, child: str) -> None:
        if parent not in self.rerun.graph.parents(child):
            self.missed[parent, child] = None

    def _follow_gradients(self) -> None:
        leaves = {
            name: value.clone().requires_grad_()
            for name, value in self.rerun.values.items()
            if differentiable(value)
        }
        tensors = self.rerun.leaves()
        paths = {name: self.rerun.traced.argument_paths[name] for name in self.rerun.graph.inputs}
        paths = {name: path for name, path in paths.items() if path in tensors}  # not rows of loops
        inputs = {
            str(name): tensors[path].detach().clone().requires_grad_()
            for name, path in paths.items()
            if differentiable(tensors[path])
        }
        with torch.enable_grad():
            # Clones, so that the model may write into them.
            values = {**self.rerun.values, **{name: leaf.clone() for name, leaf in leaves.items()}}
            replaced = {id(tensors[paths[name]]): leaf.clone() for name, leaf in inputs.items()}
            trace = self.rerun.at(values, replaced=replaced, gradients=True)
            sources = dict(inputs)
            for child in self.rerun.sites:
                self._differentiate(child, density(trace.nodes[child]), sources)
                if child in leaves:
                    sources[child] = leaves[child]

    def _differentiate(self, child: str, log_density: torch.Tensor, sources: dict[str, torch.Tensor]) -> None:
        if not sources or not log_density.requires_grad:
            return
        found = torch.autograd.grad(
            log_density.sum(), list(sources.values()), retain_graph=True, allow_unused=True
        )
        graph = self.rerun.graph
        for (parent, source), gradient in zip(sources.items(), found, strict=True):
            if gradient is None or not (gradient != 0).any():
                continue
            self._expect(parent, child)
            dims = {frame.name: frame.dim for frame in vectorized_plates(self.rerun.sites[child])}
            for plate in graph.plates[parent]:
                if plate in dims and self._crosses(parent, source, log_density, dims[plate]):
                    self._across(parent, child, plate)

    def _crosses(self, parent: str, source: torch.Tensor, log_density: torch.Tensor, dim: int) -> bool:
        """Whether an entry of a log-density has a gradient in another index of the parent."""
        at = dim - self.rerun.event_dim(parent)
        if -at > source.dim() or -dim > log_density.dim():
            return False
        size = log_density.shape[dim]
        if size < 2 or source.shape[at] != size:
            return False
        for index in sorted({0, size // 2, size - 1}):
            (gradient,) = torch.autograd.grad(
                log_density.select(dim, index).sum(), source, retain_graph=True, allow_unused=True
            )
            if gradient is None:
                continue
            others = torch.arange(size) != index
            if (gradient.index_select(at, others.nonzero()[:, 0].to(gradient.device)) != 0).any():
                return True
        return False

    def _across(self, parent: str, child: str, plate: str) -> None:
        message = (
            f"At site '{child}', each index of plate '{plate}' depends on other indices of '{parent}' (by cumsum, "
            "mean, sort or the like), but a plate means that indices are independent given what is outside. Use "
            "an event dimension (.to_event(1)) instead of the plate, or, for an argument, compute it outside of "
            "the model."
        )
        if self.strict:
            raise UnsupportedModelError(message)
        self.notes.append(message)

    def _change_values(self) -> None:
        """Give one site another value at a time, and compare the log-densities of the sites after it."""
        rerun = self.rerun
        if len(rerun.sites) > _MANY_SITES:
            self.notes.append(f"not validated (change values): more than {_MANY_SITES} sites")
            return
        before = rerun.densities(rerun.values)
        names = list(rerun.sites)
        for i, parent in enumerate(names):
            other = self._another_value(parent, seed=i)
            if other is None:
                continue
            after = rerun.densities({**rerun.values, parent: other})
            for child in names[i + 1 :]:
                if child not in after or not _alike(before[child], after[child]):
                    self._expect(parent, child)
            if not differentiable(rerun.values[parent]):
                self._change_one_index(parent, other, before)

    def _another_value(self, name: str, seed: int) -> torch.Tensor | None:
        """Draw a value that differs from the present one, if there is any."""
        if name not in self.rerun.values:
            return None
        with torch.no_grad(), torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's own, seen before
            torch.manual_seed(seed)
            for _ in range(10):
                try:
                    other = self.rerun.sites[name]["fn"]().detach()
                except NotImplementedError:  # improper, or scored only
                    return None
                if not torch.equal(other, self.rerun.values[name]):
                    return other
        return None

    def _change_one_index(self, parent: str, other: torch.Tensor, before: dict[str, torch.Tensor]) -> None:
        """Look for dependence across plates of discrete sites."""
        for frame in vectorized_plates(self.rerun.sites[parent]):
            at = frame.dim - self.rerun.event_dim(parent)
            value = self.rerun.values[parent].clone()
            if other.shape != value.shape or -at > value.dim() or value.shape[at] < 2:
                continue
            differs = (value != other).movedim(at, 0).reshape(value.shape[at], -1).any(1)
            changed = int(differs.nonzero()[0, 0])
            value.select(at, changed).copy_(other.select(at, changed))
            after = self.rerun.densities({**self.rerun.values, parent: value})
            for child in self.rerun.graph.children(parent):
                plates = {f.name for f in vectorized_plates(self.rerun.sites[str(child)])}
                if frame.name not in plates or before[str(child)].dim() < -frame.dim:
                    continue
                rest = torch.arange(before[str(child)].shape[frame.dim])
                rest = rest[rest != changed].to(value.device)
                one, two = (x[str(child)].index_select(frame.dim, rest) for x in (before, after))
                if not _alike(one, two):
                    self._across(parent, str(child), frame.name)

    def _equalise_plates(self, *, known_rows: bool = False) -> None:
        """Make all that enters a plate equal along it: log-densities that vary show constants that do."""
        rerun = self.rerun
        frames = plates_of_sites(rerun.sites)
        leaves = rerun.leaves()
        paths = rerun.traced.argument_paths
        known = {paths[name]: rows for name, rows in rerun.traced.rows.items()}
        indices = {
            paths[name] for name in rerun.traced.index_inputs
        }  # what they look up is not equal along a plate
        noisy: set[str] | None = None
        for plate, frame in frames.items():
            inside = {
                name: site
                for name, site in rerun.sites.items()
                if any(other.name == plate and other.vectorized for other in site["cond_indep_stack"])
            }
            values = {
                name: _equal_along(value, frame.dim - rerun.event_dim(name)) if name in inside else value
                for name, value in rerun.values.items()
            }
            around = plates_of_sites(inside).values()
            sizes = {frame.dim: (frame.name, {frame.size, frame.full_size}) for frame in around}
            replaced: dict[int, torch.Tensor] = {}
            for path, leaf in leaves.items():
                in_full = frame.size == (frame.full_size or frame.size)
                if known_rows and is_outside(path) and in_full and path not in indices:
                    continue
                if _are_indices(leaf, rerun.subsamples.get(plate)):
                    continue  # of equal ones all that the model takes by them would be equal
                dims = [dim for dim, other in known.get(path, {}).items() if other == plate]
                if path not in known:
                    alignment = alignment_of(leaf.shape, sizes)
                    dims = [frame.dim - alignment.event_dim] if plate in alignment.plates else []
                for dim in dims:
                    replaced[id(leaf)] = _equal_along(replaced.get(id(leaf), leaf), dim)
            trace = rerun.at(values, replaced=replaced, stir=True)
            for name in inside:
                with torch.no_grad():
                    log_density = density(trace.nodes[name])
                if -frame.dim > log_density.dim() or log_density.shape[frame.dim] < 2:
                    continue
                if not _alike(log_density, _equal_along(log_density, frame.dim)):
                    noisy = self._noisy_sites() if noisy is None else noisy
                    if name in noisy:
                        continue
                    self.non_exchangeable[name] = (*self.non_exchangeable.get(name, ()), plate)
                    self.notes.append(
                        f"at site '{name}', the indices of plate '{plate}' are not alike although everything "
                        "that enters is: the model holds constants or parameters that vary along the plate; pass "
                        "constants as arguments to let a guide condition on them"
                    )
        if not known_rows:
            self._permute_plates(frames)

    def _permute_plates(self, frames: Mapping[str, Any]) -> None:
        """Permute latents along a plate: log-densities outside of it that change tell its indices apart.

        A total of all elements does not, a row of a matrix times them does. Only sites in no other plates than these
        latents are asked; of those in others each element has relations of its own. Where data are many, a map of them
        for each element would be too large, and nothing is asked.
        """
        rerun, graph = self.rerun, self.rerun.graph
        data = [value for name, value in rerun.values.items() if name not in graph.latent]
        numbers = sum(value.numel() for value in data)
        told_apart: set[tuple[str, str]] = set()
        before: dict[str, torch.Tensor] | None = None
        for plate, frame in frames.items():
            inside = [name for name in rerun.values if name in graph.latent and plate in graph.plates[name]]
            children = {str(child) for name in inside for child in graph.children(name)}
            children = {
                child
                for child in children
                if plate not in graph.plates[child]
                and any(set(graph.plates[child]) < set(graph.plates[name]) for name in inside)
            }
            if not children or frame.size != (frame.full_size or frame.size) or frame.size < 2:
                continue
            if frame.size * numbers > _MOST_OF_MAPS:
                continue
            before = rerun.densities(rerun.values) if before is None else before
            for order in (torch.arange(frame.size).flip(0), torch.arange(frame.size).roll(1)):
                after = rerun.densities(self._permuted(plate, frame, order))
                children -= {c for c in children if c not in before or c not in after}
                changed = {c for c in children if not _alike(before[c], after[c])}
                if changed:
                    moved = rerun.densities(self._moved(plate))
                    changed -= {
                        c for c in changed if c in moved and _is_rounding(before[c], after[c], moved[c])
                    }
                told_apart |= {(c, plate) for c in changed}
        noisy = self._noisy_sites() if told_apart else set()
        for child, plate in sorted(told_apart):
            if child not in noisy:
                self.non_exchangeable[child] = (*self.non_exchangeable.get(child, ()), plate)
                self.notes.append(f"at site '{child}', the elements of plate '{plate}' are not alike")

    def _permuted(self, plate: str, frame: Any, order: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the values of all sites, with those in a plate in another order along it."""
        values = dict(self.rerun.values)
        for name, value in values.items():
            at = frame.dim - self.rerun.event_dim(name)
            inside = plate in self.rerun.graph.plates[name]
            if inside and -at <= value.dim() and value.shape[at] == frame.size:
                values[name] = value.index_select(at, order.to(value.device))
        return values

    def _moved(self, plate: str) -> dict[str, torch.Tensor]:
        """Return the values of all sites, with those of latents in a plate moved by a few units of rounding."""
        values, graph = dict(self.rerun.values), self.rerun.graph
        for name, value in values.items():
            if name in graph.latent and plate in graph.plates[name] and value.is_floating_point():
                values[name] = value - _ROUNDING * torch.finfo(value.dtype).eps * value.abs()
        return values

    def _noisy_sites(self) -> set[str]:
        """Return the sites whose log-densities differ from run to run at the same values."""
        one, two = (self.rerun.densities(self.rerun.values, self.rerun.sites, seed=seed) for seed in (0, 1))
        return {name for name in one if not _alike(one[name], two[name])}


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and not bool(differs(one, other).any())


def _is_rounding(one: torch.Tensor, other: torch.Tensor, moved: torch.Tensor) -> bool:
    """Whether two log-densities differ by no more than rounding, given a third one at values moved by as much."""
    if not one.shape == other.shape == moved.shape:
        return False
    return bool((one - other).abs().max() <= _ROUNDINGS * (one - moved).abs().max())


def _are_indices(leaf: torch.Tensor, indices: Any) -> bool:
    """Whether a tensor among the arguments holds the indices of a plate."""
    if not isinstance(indices, torch.Tensor) or leaf.is_floating_point() or leaf.shape != indices.shape:
        return False
    return torch.equal(leaf.to(indices), indices)


def _equal_along(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    if -dim > tensor.dim():
        return tensor
    if tensor.layout is not torch.strided:
        return _equal_along(tensor.to_dense(), dim).to_sparse(layout=tensor.layout)
    return tensor.narrow(dim, 0, 1).expand(tensor.shape).clone()


# ---------------------------------------------------------------- two runs with different random numbers


def changes(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], traced: TracedModel
) -> tuple[str, str] | None:
    """Run a model again with other random numbers; return what is not the same, and the remedy, in words.

    Subsampled plates have the rows that they had. The random state is as before.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with these arguments, with one node for each site.
    """
    with kept_random_state():
        seed_random_state(OTHER_SEED)
        again = trace_once(model, args, kwargs, strict=False, indices=rows_of_plates(traced.trace))
    different = changes_of_sites(traced.trace, again.trace) or _changes_of_graph(traced, again)
    if different:
        return different[0], REMEDY_STRUCTURE
    args, kwargs = with_tensors(args, kwargs)
    given = {**outside_tensors(model, args, kwargs), **argument_leaves(model, args, kwargs)}
    rows = changes_of_data(traced.trace, again.trace, given, traced.without_data)
    if rows:
        return f"the data of site {', '.join(map(repr, rows))} are other rows in every run", REMEDY_ROWS
    return None


def _changes_of_graph(one: TracedModel, other: TracedModel) -> list[str]:
    edges = sorted(map(str, _pairs(set(one.graph.edges) ^ set(other.graph.edges))))
    if edges:
        return [f"the dependence {edges[0]} is there in one run and not in another"]
    found_by_probes = set(one.places) - set(other.places)
    for node in one.graph.nodes:
        if node not in found_by_probes and one.graph.plates[node] != other.graph.plates.get(node):
            return [f"'{node}' is in other plates from run to run"]
    return []


def _pairs(edges: Iterable[tuple[Any, Any]]) -> list[str]:
    return [f"of '{child}' on '{parent}'" for parent, child in edges]


def changes_of_sites(one: Any, other: Any) -> list[str]:
    """Return in words which sites of two traces differ, in existence, role, plates or shape."""
    mine, theirs = random_sites(one), random_sites(other)
    for name in sorted(set(mine) ^ set(theirs)):
        return [f"site '{name}' is there in one run and not in another"]
    for name, site in mine.items():
        again = theirs[name]
        if site["is_observed"] != again["is_observed"]:
            return [f"site '{name}' is observed in one run and not in another"]
        if _shape(site) != _shape(again):
            return [f"site '{name}' has shape {_shape(site)} in one run and {_shape(again)} in another"]
    return []


def _shape(site: Any) -> tuple[int, ...]:
    return tuple(site["fn"].batch_shape + site["fn"].event_shape)


def changes_of_data(
    one: Any, other: Any, given: Mapping[Any, torch.Tensor], computed: Iterable[str] = ()
) -> list[str]:
    """Return the observed sites whose values are other rows of the same data in two runs.

    Data with noise on top (dequantisation) are no such change.

    Args:
        one: A trace.
        other: A trace at the same arguments, with the same indices of plates.
        given: The tensors that the model uses.
        computed: Observed sites whose values are computed from latent sites.
    """
    mine, theirs = random_sites(one), random_sites(other)
    changed = []
    for name, site in mine.items():
        if not site["is_observed"] or name in computed or name not in theirs:
            continue
        first, second = site["value"], theirs[name]["value"]
        if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
            continue
        if first.shape == second.shape and torch.equal(torch.nan_to_num(first), torch.nan_to_num(second)):
            continue
        if any(_are_entries(first, leaf) and _are_entries(second, leaf) for leaf in given.values()):
            changed.append(name)
    return changed


def _are_entries(value: torch.Tensor, leaf: torch.Tensor) -> bool:
    if value.dtype != leaf.dtype or leaf.layout is not torch.strided:
        return False
    return bool(torch.isin(value, leaf.to(value.device)).all())
