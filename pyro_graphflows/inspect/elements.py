"""What elements of sites and of plates depend on, where a graph over sites says less than there is to know.

**Elements of sites** (``resolution="element"``). At the level of sites the tracer is sound but coarse: after
``torch.stack([a, b])[0]`` everything depends on everything. Here the log-density of each element is
differentiated with respect to each element of the site's parents, at several random points; an edge stays if
it is seen anywhere. This is not sound for gates that were closed at every point, hence it is done on request
only. Where no gradient is seen at all (discrete parents, ``z > 0``), every element keeps every element of the
parent.

Elements of one site are joined by edges only where its distribution joins them: a multivariate normal becomes
a chain in which each element has all earlier ones as parents; ``Normal(...).to_event(1)`` has no such edges.

A row of a Jacobian takes a backward pass. Of long vectors, a Jacobian with few diagonals is found by a handful of
passes that add up rows far apart, and confirmed by one with random weights (Curtis, Powell and Reid 1974).

**Nested plates.** A graph over sites
says that every datum depends on every group, and then the groups look dependent in the posterior
whatever is known. If each datum looks up *one* group, the data are in fact nested in the groups. That is found by
changing the values of some groups and seeing which log-densities change: group g is changed in run b if bit b of its
number is set, and in a second run if it is not. A datum that depends on one group changes in just one of the two runs,
for every bit; one that depends on two groups changes in both, for a bit in which their numbers differ. So some
``2 log2(groups)`` runs are enough. They are made at two sets of values, since an index that is itself a latent value
looks up other groups at the second.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch.distributions import biject_to

from pyro_graphflows.graphs.structures import ModelGraph, Node
from pyro_graphflows.inspect.runs import plates_of_sites, some_value, support_of, undressed
from pyro_graphflows.inspect.trace import Rerun, RerunError, TracedModel, density, differentiable, differs

__all__ = [
    "nested_by_index",
    "with_nested_plates",
]

_POINTS = 8
_MOST_TOGETHER = 8  # elements of a long vector that may share something, for each to be told apart
_MANY_ROWS = 32  # from which a Jacobian is looked at for diagonals first


def split_elements(
    rerun: Rerun, *, num_points: int = _POINTS, only: Collection[str] | None = None
) -> TracedModel:
    """Refine a graph of sites to one of elements.

    Split are latent sites whose elements are constrained one by one (not simplices or matrices), and
    observed sites with independent elements. Element (0, 1) of site ``z`` is the node ``"z[0,1]"``. Other
    sites, and inputs, stay whole under their own names.

    Args:
        rerun: The traced model.
        num_points: At how many random points to differentiate.
        only: Latent sites to be split, with the sites that depend on them, if their elements fall into many small
            groups that share nothing; the others stay whole. By default all sites are split.

    Returns:
        What was traced, with the refined graph and ``elements``; everything else is by site as before.
    """
    traced, graph, nodes = rerun.traced, rerun.graph, rerun.sites
    sites = list(nodes)
    split = {name for name in sites if _can_split(nodes[name], name in graph.observed)}
    if only is not None:
        split &= {*only, *(child for name in only for child in _children(graph, name))}
    notes = traced.notes
    try:
        patterns = _patterns(rerun, num_points, only)
    except RerunError as error:
        patterns = {}
        notes = (*notes, f"elements were not told apart: {error}")
    if only is not None:
        grouped = {name for name in only if name in split and _in_small_groups(rerun, name, split, patterns)}
        split &= grouped | {child for name in grouped for child in _children(graph, name)}

    names: dict[str, list[str]] = {}
    taken = set(graph.nodes)
    for name in sites:
        names[name] = _element_names(name, nodes[name]["fn"].event_shape, taken) if name in split else [name]
    dag = nx.DiGraph()
    dag.add_nodes_from(graph.inputs)
    for name in sites:
        dag.add_nodes_from(names[name])
        for parent in graph.parents(name):
            dag.add_edges_from(_edges(str(parent), name, names, patterns.get((str(parent), name))))
        dag.add_edges_from(_inner_edges(nodes[name], names[name]))

    sizes: dict[Node, int] = {name: graph.event_sizes[name] for name in graph.inputs}
    plates: dict[Node, Iterable[str]] = {name: graph.plates[name] for name in graph.inputs}
    elements = {}
    for name in sites:
        for i, element in enumerate(names[name]):
            sizes[element] = 1 if name in split else graph.event_sizes[name]
            plates[element] = graph.plates[name]
            elements[element] = (name, i)
    refined = ModelGraph(
        dag,
        [element for name in sites if name in graph.observed for element in names[name]],
        inputs=graph.inputs,
        marginalised=[element for name in sites if name in graph.marginalised for element in names[name]],
        event_sizes=sizes,
        plates=plates,
    )
    return replace(traced, graph=refined, elements=elements, notes=notes)


def _children(graph: ModelGraph, name: str) -> list[str]:
    return [str(child) for child in graph.nodes if name in graph.parents(child)]


def _in_small_groups(
    rerun: Rerun, name: str, split: Collection[str], patterns: Mapping[tuple[str, str], np.ndarray]
) -> bool:
    """Whether the elements of a site fall into small groups by the elements of other sites that depend on them."""
    if undressed(rerun.sites[name]["fn"]).event_shape.numel() > 1:  # the distribution joins them
        return False
    together = nx.Graph()
    together.add_nodes_from((name, j) for j in range(rerun.graph.event_sizes[name]))
    for child in _children(rerun.graph, name):
        pattern = patterns.get((name, child))
        if pattern is None or child not in split or pattern.sum() > _MOST_TOGETHER * max(pattern.shape):
            return False
        together.add_edges_from(((child, i), (name, j)) for i, j in zip(*np.nonzero(pattern), strict=True))
    groups = nx.connected_components(together)
    return all(sum(site == name for site, _ in group) <= _MOST_TOGETHER for group in groups)


def _can_split(site: Any, observed: bool) -> bool:
    fn = site["fn"]
    if torch.Size(fn.event_shape).numel() < 2:
        return False
    if observed:
        return len(undressed(fn).event_shape) == 0
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return not support.is_discrete and support.event_dim == 0


def _element_names(name: str, shape: torch.Size, taken: set[Node]) -> list[str]:
    suffix = ""
    while True:
        names = [f"{name}{suffix}[{','.join(map(str, index))}]" for index in np.ndindex(*shape)]
        if not taken & set(names):
            return names
        suffix += "_"


def _edges(parent: str, child: str, names: dict[str, list[str]], pattern: Any) -> list[tuple[str, str]]:
    sources, targets = names.get(parent, [parent]), names[child]
    if pattern is None:
        return [(source, target) for source in sources for target in targets]
    if len(targets) == 1:
        pattern = np.any(pattern, axis=0, keepdims=True)
    if len(sources) == 1:
        pattern = np.any(pattern, axis=1, keepdims=True)
    return [(sources[j], targets[i]) for i, j in zip(*np.nonzero(pattern), strict=True)]


def _inner_edges(site: Any, names: list[str]) -> list[tuple[str, str]]:
    block = torch.Size(undressed(site["fn"]).event_shape).numel() if len(names) > 1 else 1
    return [
        (names[start + i], names[start + j])
        for start in range(0, len(names), block)
        for j in range(block)
        for i in range(j)
    ]


def _patterns(
    rerun: Rerun, num_points: int, only: Collection[str] | None = None
) -> dict[tuple[str, str], np.ndarray]:
    """Return which elements (rows) depend on which elements of a parent, where gradients show it."""
    traced, sites = rerun.traced, rerun.sites
    found: dict[tuple[str, str], np.ndarray] = {}
    given = {name: value for name, value in rerun.values.items() if name in traced.graph.observed}
    for point in range(num_points):
        drawn = rerun.at(given, seed=point + 1)
        leaves = {}
        for name in sites:
            value = drawn.nodes[name]["value"]
            if only is not None and name not in only:
                continue
            if name not in traced.without_data and isinstance(value, torch.Tensor) and differentiable(value):
                leaves[name] = value.detach().clone().requires_grad_()
        with torch.enable_grad():
            values = {name: drawn.nodes[name]["value"] for name in sites if name not in traced.without_data}
            values.update({name: leaf.clone() for name, leaf in leaves.items()})
            trace = rerun.at(values, gradients=True, seed=point + 1)
            for child in sites:
                parents = {
                    str(name): leaves[str(name)] for name in traced.graph.parents(child) if name in leaves
                }
                for parent, pattern in elementwise_jacobian(trace.nodes[child], parents, sites).items():
                    found[parent, child] = found.get((parent, child), False) | pattern
    return {pair: pattern for pair, pattern in found.items() if pattern.any()}


def elementwise_jacobian(child: Any, parents: dict[str, torch.Tensor], nodes: Any) -> dict[str, np.ndarray]:
    """Return where the Jacobian of elementwise log-densities is not zero at a point."""
    log_density = density(child, elementwise=True)
    if not parents or not log_density.requires_grad:
        return {}
    batch_dim = len(child["fn"].batch_shape)
    entries = (log_density.sum(tuple(range(batch_dim))) if batch_dim else log_density).reshape(-1)
    block = max(1, undressed(child["fn"]).event_shape.numel())  # 0 at a factor
    sizes = {name: torch.Size(nodes[name]["fn"].event_shape).numel() for name in parents}

    def back(weights: torch.Tensor) -> dict[str, torch.Tensor]:
        gradients = torch.autograd.grad(
            entries, list(parents.values()), weights, retain_graph=True, allow_unused=True
        )
        return {
            name: (torch.zeros_like(value) if gradient is None else gradient).reshape(-1, sizes[name])
            for (name, value), gradient in zip(parents.items(), gradients, strict=True)
        }

    if len(entries) >= _MANY_ROWS and set(sizes.values()) == {len(entries)} and block == 1:
        banded = _banded_jacobian(len(entries), entries, back)
        if banded is not None:
            return banded
    rows: dict[str, list[np.ndarray]] = {name: [] for name in parents}
    for one in torch.eye(len(entries), dtype=entries.dtype, device=entries.device):
        for name, gradient in back(one).items():
            rows[name] += [(gradient != 0).any(0).numpy(force=True)] * block
    return {name: np.stack(pattern) for name, pattern in rows.items()}


def _banded_jacobian(
    size: int, like: torch.Tensor, back: Callable[[torch.Tensor], dict[str, torch.Tensor]]
) -> dict[str, np.ndarray] | None:
    """Return where square Jacobians are not zero if all of that is near their diagonals; None if it is not."""
    index = torch.arange(size, device=like.device)
    weights = 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(0)).to(like)
    probe = back(weights)
    for width in (0, 2):
        period = 2 * width + 1
        patterns = {name: np.zeros((size, size), dtype=bool) for name in probe}
        explained = {name: torch.zeros_like(gradient) for name, gradient in probe.items()}
        for phase in range(period):
            chosen = index % period == phase
            for name, gradient in back(chosen.to(like)).items():
                row = index + (phase - index + width) % period - width  # the chosen row near each column
                inside = (row >= 0) & (row < size)
                row = row.clamp(0, size - 1)
                explained[name] += torch.where(inside, weights[row] * gradient, torch.zeros_like(gradient))
                seen = (gradient != 0).any(0) & inside
                patterns[name][row[seen].numpy(force=True), index[seen].numpy(force=True)] = True
        if all(
            torch.allclose(
                explained[name], probe[name], rtol=1e-3, atol=1e-5 * float(probe[name].abs().max())
            )
            for name in probe
        ):
            return patterns
    return None


# ---------------------------------------------------------------- plates


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
        if not all(n in values and _can_move(sites[n]["fn"], values[n]) for n in moving):
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
        fn = self.rerun.sites[name]["fn"]
        at = dim - len(fn.event_shape)
        if fn.support.is_discrete:
            other = _next_class(fn, value)
        else:
            transform = biject_to(support_of(fn))
            free = transform.inv(value)
            step = 0.3 + 0.4 * torch.rand(
                free.shape, generator=torch.Generator().manual_seed(2), dtype=free.dtype
            )
            other = transform(free + step.to(free.device))
        mask = chosen.to(value.device).reshape(-1, *[1] * (-at - 1))
        return torch.where(mask, other, value)


def _can_move(fn: Any, value: torch.Tensor) -> bool:
    """Whether other values of a distribution can be named: of a discrete one, those of its classes."""
    return bool(fn.has_enumerate_support) if fn.support.is_discrete else differentiable(value)


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
