"""Run a traced model again at other values, and see which log-densities change.

The tracer follows values; probes change them, and look at what happens to the log-densities.

**Validation** compares a traced graph with gradients, changed values and equal values. It finds dependences
that pass by the tracer (values computed in another thread), and two properties that a graph with plates takes
for granted: that sites in a plate depend on their own index only (``z.cumsum(-1)`` violates it), and that all
indices are alike (constants in the model that vary along the plate violate it).

**Rows.** Row n of an input is taken to belong to element n of a plate of its size. Changing half of the rows shows
whether that is so, also for inputs whose shape does not show it (``x[:, None]`` in a plate at dimension -2), and
for those that a model turns (``x.flip(0)``, lags).

**Look-ups.** A graph over sites says that every datum depends on every group, and then the groups look
dependent in the posterior whatever is known. If each datum looks up *one* group, the data are in fact nested
in the groups. That is found by changing the values of some groups and seeing which log-densities change:
group g is changed in run b if bit b of its number is set, and in a second run if it is not. A datum that
depends on one group changes in just one of the two runs, for every bit; one that depends on two groups
changes in both, for a bit in which their numbers differ. So some ``2 log2(groups)`` runs are enough. They are
made at two sets of values, since an index that is itself a latent value looks up other groups at the second.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.inspect.arguments import (
    ArgumentPath,
    alignment_of,
    argument_leaves,
    not_followed,
    outside_tensors,
    raw_argument,
    replaced_arguments,
    with_tensors,
)
from pyro_graphflows.inspect.trace import (
    TracedModel,
    is_transparent,
    log_density_at,
    quiet_run,
    run_model,
    some_value,
    trace_once,
    undressed,
    vectorized_plates,
)

__all__ = [
    "GivenValues",
    "Rerun",
    "RerunError",
    "Validation",
    "density",
    "differentiable",
    "nested_by_index",
    "non_exchangeable_plates",
    "require_followed",
    "with_known_rows",
    "with_loop_plates",
    "with_nested_plates",
]

_MANY_SITES = 200  # more are not changed one by one


class RerunError(UnsupportedModelError):
    """A model cannot be evaluated at other values than those it drew."""


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


class _Replaced(TorchFunctionMode):
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
        self.sites = {name: nodes[name] for name in nodes if name in self.graph}
        self.values = {
            name: torch.as_tensor(site["value"]).detach().clone()
            for name, site in self.sites.items()
            if name not in traced.without_data
        }
        self.subsamples = {
            name: node["value"]
            for name, node in nodes.items()
            if name not in self.graph and node["type"] == "sample" and site_is_subsample(node)
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
                handlers.append(_Replaced(replaced))
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
    sizes = {frame.size for site in rerun.sites.values() for frame in vectorized_plates(site)}
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
    frames = {f.name: f for site in traced.trace.nodes.values() if "cond_indep_stack" in site
              for f in vectorized_plates(site)}  # fmt: skip
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
        self.frames = {
            f.name: f for site in rerun.sites.values() for f in vectorized_plates(site) if f.full_size > 1
        }
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
                _differs(before[site], each[site]).movedim(frame.dim, 0).reshape(frame.size, -1).any(-1).cpu()
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
        return [site for site in self.rerun.sites if name in self.rerun.graph.parents(site)]


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
    return Validation(Rerun(model, args, kwargs, traced), strict=False).equalise_plates()


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

    def equalise_plates(self) -> dict[str, tuple[str, ...]]:
        """Return for which sites the indices of which plates are non-exchangeable."""
        try:
            self._equalise_plates()
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

    def _equalise_plates(self) -> None:
        """Make all that enters a plate equal along it: log-densities that vary show constants that do."""
        rerun = self.rerun
        frames = {frame.name: frame for site in rerun.sites.values() for frame in vectorized_plates(site)}
        leaves = rerun.leaves()
        paths = rerun.traced.argument_paths
        known = {paths[name]: rows for name, rows in rerun.traced.rows.items()}
        noisy: set[str] | None = None
        for plate, frame in frames.items():
            inside = {
                name: site
                for name, site in rerun.sites.items()
                if plate in {other.name for other in vectorized_plates(site)}
            }
            values = {
                name: _equal_along(value, frame.dim - rerun.event_dim(name)) if name in inside else value
                for name, value in rerun.values.items()
            }
            sizes = {
                f.dim: (f.name, {f.size, f.full_size}) for s in inside.values() for f in vectorized_plates(s)
            }
            replaced: dict[int, torch.Tensor] = {}
            for path, leaf in leaves.items():
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

    def _noisy_sites(self) -> set[str]:
        """Return the sites whose log-densities differ from run to run at the same values."""
        one, two = (self.rerun.densities(self.rerun.values, self.rerun.sites, seed=seed) for seed in (0, 1))
        return {name for name in one if not _alike(one[name], two[name])}


def _differs(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Return where two tensors differ by more than rounding."""
    tolerance = 1e-9 if one.dtype == torch.float64 else 1e-5
    return ~torch.isclose(one, two, rtol=tolerance, atol=tolerance, equal_nan=True)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and not bool(_differs(one, other).any())


def _equal_along(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    if -dim > tensor.dim():
        return tensor
    if tensor.layout is not torch.strided:
        return _equal_along(tensor.to_dense(), dim).to_sparse(layout=tensor.layout)
    return tensor.narrow(dim, 0, 1).expand(tensor.shape).clone()


def nested_by_index(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    *,
    traced: TracedModel,
) -> dict[str, dict[str, torch.Tensor]]:
    """Find the plates each of whose elements looks up one element of another plate.

    Args:
        model: A Pyro model.
        model_args: Its positional arguments.
        model_kwargs: Its keyword arguments.
        traced: The model as traced with these arguments.

    Returns:
        By nested plate and outer plate, the number of the element that each element looks up, -1 where it was not
        seen to look up any. There are several outer plates where each element looks up one element of each
        (crossed effects). What cannot be evaluated at other values is left out.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_graphflows.inspect import trace_model
        >>> def model(group, x):
        ...     with pyro.plate("groups", 2):
        ...         theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("x", dist.Normal(theta[group], 1.0), obs=x)
        >>> args = (torch.tensor([0, 1, 1]), torch.zeros(3))
        >>> nested_by_index(model, args, traced=trace_model(model, args))
        {'data': {'groups': tensor([0, 1, 1])}}
    """
    pairs = list(_candidates(traced.graph))
    if not pairs:
        return {}
    search = _LookUps(Rerun(model, tuple(model_args), dict(model_kwargs or {}), traced))
    found: dict[str, dict[str, torch.Tensor]] = {}
    for inner, outer in pairs:
        try:
            groups = search.looked_up(inner, outer)
        except RerunError:
            continue
        if groups is not None:
            found.setdefault(inner, {})[outer] = groups
    return found


def _candidates(graph: ModelGraph) -> Iterator[tuple[str, str]]:
    """Yield the pairs (inner, outer) of plates that only edges from the outer to the inner one join."""
    plates = {plate for around in graph.plates.values() for plate in around}
    together = {(one, other) for around in graph.plates.values() for one in around for other in around}
    crossing = {
        (inner, outer): None
        for parent, child in graph.edges
        for outer in graph.plates[parent]
        for inner in graph.plates[child]
        if outer not in graph.plates[child] and inner not in graph.plates[parent]
    }
    for inner, outer in crossing:
        if (outer, inner) not in crossing and (inner, outer) not in together and {inner, outer} <= plates:
            yield inner, outer


class _LookUps:
    """The search for the elements of one plate that the elements of another look up."""

    def __init__(self, rerun: Rerun) -> None:
        self.rerun, self.graph = rerun, rerun.graph

    def looked_up(self, inner: str, outer: str) -> torch.Tensor | None:
        """Return the one element of the outer plate that each of the inner depends on; None if there are others."""
        sites = self.rerun.sites
        parents = [n for n in sites if outer in self.graph.plates[n] and inner not in self.graph.plates[n]]
        moving = [n for n in parents if self.graph.role(n) in ("latent", "marginalised")]
        children = [
            n
            for n in sites
            if inner in self.graph.plates[n]
            and outer not in self.graph.plates[n]
            and any(parent in moving for parent in self.graph.parents(n))
        ]
        values = self.rerun.values
        if not all(n in values and differentiable(values[n]) for n in moving):
            return None
        if self._is_chosen_by_latents(moving):
            return None
        first = self._groups(values, moving, children, inner, outer)
        if first is None:
            return None
        second = self._groups(self._other_values(), moving, children, inner, outer)
        if second is None:
            return None
        known = [one[(one >= 0) & (two >= 0)] for one, two in zip(first, second, strict=True)]
        again = [two[(one >= 0) & (two >= 0)] for one, two in zip(first, second, strict=True)]
        if not all(torch.equal(one, two) for one, two in zip(known, again, strict=True)):
            return None
        # all that is in the inner plate must look up the same element
        flat = [torch.maximum(one, two) for one, two in zip(first, second, strict=True)]
        if not flat or not all(_agree(flat[0], other) for other in flat[1:]):
            return None
        return torch.stack(flat).amax(0)

    def _other_values(self) -> dict[str, torch.Tensor]:
        """Return other values of the latent sites; of those with few classes, the next class everywhere."""
        values = dict(self.rerun.values)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            for name, site in self.rerun.sites.items():
                if name in values and self.graph.role(name) in ("latent", "marginalised"):
                    fn = site["fn"]
                    if fn.support.is_discrete and fn.has_enumerate_support:
                        values[name] = _next_class(fn, values[name])
                    else:
                        values[name] = some_value(fn).detach()
        return values

    def _is_chosen_by_latents(self, moving: Iterable[str]) -> bool:
        """Whether what is looked up depends on latent values: what an index is decides, and draws may only confirm."""
        hidden = {n for n in self.graph.nodes if self.graph.role(n) in ("latent", "marginalised")}
        return any(self.rerun.traced.selectors.get(name, frozenset()) & hidden for name in moving)

    def _groups(
        self,
        values: Mapping[str, torch.Tensor],
        moving: list[str],
        children: list[str],
        inner: str,
        outer: str,
    ) -> list[torch.Tensor] | None:
        """Return for each child the number of the element that each index looks up, -1 for none; None if two."""
        frames = {
            frame.name: frame for site in self.rerun.sites.values() for frame in vectorized_plates(site)
        }
        size = frames[outer].size
        before = self.rerun.densities(values, children)
        groups = [torch.zeros(frames[inner].size, dtype=torch.long) for _ in children]
        any_change = [torch.zeros(frames[inner].size, dtype=torch.bool) for _ in children]
        for bit in range(max(1, math.ceil(math.log2(size)))):
            changed = []
            for wanted in (0, 1):
                chosen = (torch.arange(size) >> bit) % 2 == wanted
                after = self.rerun.densities(
                    {**values, **{n: self._moved(n, values[n], chosen, frames[outer].dim) for n in moving}},
                    children,
                )
                changed.append(
                    [
                        _along(_differs(before[n], after[n]), frames[inner].dim, frames[inner].size)
                        for n in children
                    ]
                )
            for i in range(len(children)):
                if bool((changed[0][i] & changed[1][i]).any()):
                    return None
                groups[i] += changed[1][i].long() << bit
                any_change[i] |= changed[0][i] | changed[1][i]
        return [torch.where(any_change[i], groups[i], -1) for i in range(len(children))]

    def _moved(self, name: str, value: torch.Tensor, chosen: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the value of a site with the chosen elements of a plate changed."""
        site = self.rerun.sites[name]
        at = dim - len(site["fn"].event_shape)
        transform = biject_to(site["fn"].support)
        free = transform.inv(value)
        step = 0.3 + 0.4 * torch.rand(
            free.shape, generator=torch.Generator().manual_seed(2), dtype=free.dtype
        )
        other = transform(free + step.to(free.device))
        mask = chosen.to(value.device).reshape(-1, *[1] * (-at - 1))
        return torch.where(mask, other, value)


def _next_class(fn: Any, value: torch.Tensor) -> torch.Tensor:
    """Return the class after each value, in the order of the support; after the last one the first."""
    classes = fn.enumerate_support(expand=False)
    event_dim = len(fn.event_shape)
    classes = classes.reshape(len(classes), *classes.shape[classes.dim() - event_dim :])
    if event_dim:  # one-hot
        return value.roll(1, -1)
    place = (value.unsqueeze(-1) == classes).long().argmax(-1)
    return classes[(place + 1) % len(classes)]


def _along(changed: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Return whether anything changed at each index of a plate."""
    changed = changed.cpu()
    changed = changed.reshape((1,) * (-dim - changed.dim()) + changed.shape)
    moved = changed.movedim(dim, 0).reshape(changed.shape[dim], -1).any(1)
    return moved.expand(size)


def _agree(one: torch.Tensor, two: torch.Tensor) -> bool:
    both = (one >= 0) & (two >= 0)
    return torch.equal(one[both], two[both])


def with_loop_plates(graph: ModelGraph, loops: Mapping[str, tuple[tuple[str, int], ...]]) -> ModelGraph:
    """Return the graph with a plate around what is in each iteration of a subsampled loop.

    Like the elements of a subsampled plate, these are not there for sites outside.

    Args:
        graph: A model graph.
        loops: For nodes in such loops, names of plates and iterations, outer to inner.
    """
    if not loops:
        return graph
    plates = {
        node: (*(f"{name}@{position}" for name, position in loops.get(str(node), ())), *around)
        for node, around in graph.plates.items()
    }
    return ModelGraph(
        graph.to_networkx(),
        graph.observed,
        inputs=graph.inputs,
        marginalised=graph.marginalised,
        event_sizes=graph.event_sizes,
        plates=plates,
    )


def with_nested_plates(graph: ModelGraph, nested: Mapping[str, Iterable[str]]) -> ModelGraph:
    """Return the graph with nested plates inside those that their elements look up.

    Example:
        >>> graph = ModelGraph([("theta", "x")], observed=["x"], plates={"theta": ["groups"], "x": ["data"]})
        >>> with_nested_plates(graph, {"data": ("groups",)}).plates["x"]
        ('groups', 'data')
    """
    plates = {}
    for node, around in graph.plates.items():
        whole = around
        for _ in nested:  # groups may be nested in others themselves
            outer = [other for plate in whole for other in nested.get(plate, ()) if other not in whole]
            whole = (*dict.fromkeys(outer), *whole)
        plates[node] = whole
    return ModelGraph(
        graph.to_networkx(),
        graph.observed,
        inputs=graph.inputs,
        marginalised=graph.marginalised,
        event_sizes=graph.event_sizes,
        plates=plates,
    )
