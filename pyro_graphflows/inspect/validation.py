"""Check a traced graph against the model's behaviour: gradients, changed values, equal values.

The tracer follows values; these probes change them, and look at what happens to the log-densities. They find
dependences that pass by the tracer (values computed in another thread), and two properties that a graph with
plates takes for granted: that sites in a plate depend on their own index only (``z.cumsum(-1)`` violates it),
and that all indices are alike (constants in the model that vary along the plate violate it).
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect.arguments import argument_leaves, layout_of
from pyro_graphflows.inspect.assembly import trace_once
from pyro_graphflows.inspect.record import vectorized_plates
from pyro_graphflows.inspect.rerun import RerunError, density, differentiable, rerun, with_leaves
from pyro_graphflows.inspect.traced import TracedModel

__all__ = ["Validation", "non_exchangeable_plates"]

_MANY_SITES = 200


def non_exchangeable_plates(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    *,
    traced: TracedModel | None = None,
) -> dict[str, tuple[str, ...]]:
    """Find the sites that tell the indices of a plate apart even if all that enters is equal along it.

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
    return Validation(model, args, kwargs, traced, strict=False).equalise_plates()


class Validation:
    """Probes of one model at one trace.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with these arguments.
        strict: Whether to raise for dependence across a plate.
    """

    def __init__(
        self, model: Callable, args: tuple, kwargs: dict[str, Any], traced: TracedModel, strict: bool
    ) -> None:
        self.model, self.args, self.kwargs, self.traced, self.strict = model, args, kwargs, traced, strict
        nodes: Mapping[str, Any] = traced.trace.nodes
        # Sites in the order in which the model has them: a dependence goes forward.
        self.sites = {name: nodes[name] for name in nodes if name in traced.graph}
        self.values = {
            name: torch.as_tensor(site["value"]).detach().clone()
            for name, site in self.sites.items()
            if name not in traced.without_data
        }
        self.subsamples = {
            name: node["value"]
            for name, node in nodes.items()
            if node["type"] == "sample" and name not in traced.graph and _is_subsample(node)
        }
        self.notes: list[str] = []
        self.missed: dict[tuple[str, str], None] = {}
        self.non_exchangeable: dict[str, tuple[str, ...]] = {}

    def run(self) -> "Validation":
        """Make all probes.

        Raises:
            UnsupportedModelError: If a site depends on another index of its plate (with ``strict``).
        """
        probes = [self._follow_gradients, self._change_values, self._equalise_plates]
        for probe in probes:
            try:
                probe()
            except RerunError as error:
                self.notes.append(f"not validated ({probe.__name__.strip('_').replace('_', ' ')}): {error}")
        for parent, child in self.missed:
            self.notes.append(
                f"'{child}' depends on '{parent}', which the tracer did not see; the edge was added"
            )
        return self

    def equalise_plates(self) -> dict[str, tuple[str, ...]]:
        """Return for which sites the indices of which plates are not alike."""
        try:
            self._equalise_plates()
        except RerunError as error:
            self.notes.append(f"not validated (equalise plates): {error}")
        return self.non_exchangeable

    def _expect(self, parent: str, child: str) -> None:
        if parent not in self.traced.graph.parents(child):
            self.missed[parent, child] = None

    def _follow_gradients(self) -> None:
        leaves = {
            name: value.clone().requires_grad_()
            for name, value in self.values.items()
            if differentiable(value)
        }
        tensors = argument_leaves(self.model, self.args, self.kwargs)
        paths = {name: self.traced.argument_paths[name] for name in self.traced.graph.inputs}
        inputs = {
            str(name): tensors[path].detach().clone().requires_grad_()
            for name, path in paths.items()
            if differentiable(tensors[path])
        }
        with torch.enable_grad():
            # Clones, so that the model may write into them.
            values = {**self.values, **{name: leaf.clone() for name, leaf in leaves.items()}}
            replaced = {id(tensors[paths[name]]): leaf.clone() for name, leaf in inputs.items()}
            args, kwargs = with_leaves(self.args, self.kwargs, replaced)
            trace = rerun(self.model, args, kwargs, {**self.subsamples, **values}, gradients=True)
            sources = dict(inputs)
            for child in self.sites:
                self._differentiate(child, density(trace.nodes[child]), sources)
                if child in leaves:
                    sources[child] = leaves[child]

    def _differentiate(self, child: str, log_density: torch.Tensor, sources: dict[str, torch.Tensor]) -> None:
        if not sources or not log_density.requires_grad:
            return
        found = torch.autograd.grad(
            log_density.sum(), list(sources.values()), retain_graph=True, allow_unused=True
        )
        graph = self.traced.graph
        for (parent, source), gradient in zip(sources.items(), found, strict=True):
            if gradient is None or not (gradient != 0).any():
                continue
            self._expect(parent, child)
            dims = {frame.name: frame.dim for frame in vectorized_plates(self.sites[child])}
            for plate in graph.plates[parent]:
                if plate in dims and self._crosses(parent, source, log_density, dims[plate]):
                    self._across(parent, child, plate)

    def _crosses(self, parent: str, source: torch.Tensor, log_density: torch.Tensor, dim: int) -> bool:
        """Whether an entry of a log-density has a gradient in another index of the parent."""
        at = dim - self._event_dim(parent)
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

    def _event_dim(self, name: str) -> int:
        if name in self.traced.event_dims:
            return self.traced.event_dims[name]
        return len(self.sites[name]["fn"].event_shape)

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
        if len(self.sites) > _MANY_SITES:
            self.notes.append(f"not validated (change values): more than {_MANY_SITES} sites")
            return
        before = self._densities(self.values)
        names = list(self.sites)
        for i, parent in enumerate(names):
            other = self._another_value(parent, seed=i)
            if other is None:
                continue
            after = self._densities({**self.values, parent: other})
            for child in names[i + 1 :]:
                if child not in after or not _alike(before[child], after[child]):
                    self._expect(parent, child)
            if not differentiable(self.values[parent]):
                self._change_one_index(parent, other, before)

    def _another_value(self, name: str, seed: int) -> torch.Tensor | None:
        """Draw a value that differs from the present one, if there is any."""
        if name not in self.values:
            return None
        with torch.no_grad(), torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's own, seen before
            torch.manual_seed(seed)
            for _ in range(10):
                try:
                    other = self.sites[name]["fn"]().detach()
                except NotImplementedError:  # improper, or scored only
                    return None
                if not torch.equal(other, self.values[name]):
                    return other
        return None

    def _change_one_index(self, parent: str, other: torch.Tensor, before: dict[str, torch.Tensor]) -> None:
        """Look for dependence across plates of discrete sites."""
        for frame in vectorized_plates(self.sites[parent]):
            at = frame.dim - self._event_dim(parent)
            value = self.values[parent].clone()
            if other.shape != value.shape or -at > value.dim() or value.shape[at] < 2:
                continue
            differs = (value != other).movedim(at, 0).reshape(value.shape[at], -1).any(1)
            changed = int(differs.nonzero()[0, 0])
            value.select(at, changed).copy_(other.select(at, changed))
            after = self._densities({**self.values, parent: value})
            for child in self.traced.graph.children(parent):
                plates = {f.name for f in vectorized_plates(self.sites[str(child)])}
                if frame.name not in plates or before[str(child)].dim() < -frame.dim:
                    continue
                rest = torch.arange(before[str(child)].shape[frame.dim])
                rest = rest[rest != changed].to(value.device)
                one, two = (x[str(child)].index_select(frame.dim, rest) for x in (before, after))
                if not _alike(one, two):
                    self._across(parent, str(child), frame.name)

    def _densities(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        trace = rerun(self.model, self.args, self.kwargs, {**self.subsamples, **values})
        with torch.no_grad():
            return {name: density(trace.nodes[name]) for name in self.sites if name in trace}

    def _equalise_plates(self) -> None:
        """Make all that enters a plate equal along it: log-densities that vary show constants that do."""
        frames = {frame.name: frame for site in self.sites.values() for frame in vectorized_plates(site)}
        leaves = argument_leaves(self.model, self.args, self.kwargs)
        noisy: set[str] | None = None
        for plate, frame in frames.items():
            inside = {
                name: site
                for name, site in self.sites.items()
                if plate in {other.name for other in vectorized_plates(site)}
            }
            values = {
                name: _equal_along(value, frame.dim - self._event_dim(name)) if name in inside else value
                for name, value in self.values.items()
            }
            replaced = {}
            sizes = {
                f.dim: (f.name, {f.size, f.full_size}) for s in inside.values() for f in vectorized_plates(s)
            }
            for leaf in leaves.values():
                layout = layout_of(leaf.shape, sizes)
                if plate in layout.plates:
                    replaced[id(leaf)] = _equal_along(leaf, frame.dim - layout.event_dim)
            args, kwargs = with_leaves(self.args, self.kwargs, replaced)
            trace = rerun(self.model, args, kwargs, {**self.subsamples, **values}, stir=True)
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
        values = {**self.subsamples, **self.values}
        traces = [rerun(self.model, self.args, self.kwargs, values, seed=seed) for seed in (0, 1)]
        with torch.no_grad():
            return {
                name
                for name in self.sites
                if not _alike(density(traces[0].nodes[name]), density(traces[1].nodes[name]))
            }


def _is_subsample(node: Mapping[str, Any]) -> bool:
    return type(node["fn"]).__name__ == "_Subsample"


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = 1e-9 if one.dtype == torch.float64 else 1e-5
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _equal_along(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    if -dim > tensor.dim():
        return tensor
    return tensor.narrow(dim, 0, 1).expand(tensor.shape).clone()
