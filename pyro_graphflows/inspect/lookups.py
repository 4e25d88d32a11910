"""Which plates are nested in others through what their elements look up.

A graph over sites says that every datum depends on every group, and then the groups look dependent in the posterior
whatever is known. If each datum looks up *one* group, the data are in fact nested in the groups. That is found by
changing the values of some groups and seeing which log-densities change: group g is changed in run b if bit b of its
number is set, and in a second run if it is not. A datum that depends on one group changes in just one of the two runs,
for every bit; one that depends on two groups changes in both, for a bit in which their numbers differ. So some
``2 log2(groups)`` runs are enough. They are made at two sets of values, since an index that is itself a latent value
looks up other groups at the second.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.distributions import biject_to

from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.inspect.probes import Rerun, RerunError, differentiable, differs
from pyro_graphflows.inspect.runs import plates_of_sites, some_value
from pyro_graphflows.inspect.trace import TracedModel

__all__ = ["nested_by_index", "with_nested_plates"]


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
        frames = plates_of_sites(self.rerun.sites)
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
                        _along(differs(before[n], after[n]), frames[inner].dim, frames[inner].size)
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
    return graph.with_plates(plates)
