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

**Elements** (``resolution="element"``). At the level of sites the tracer is sound but coarse: after
``torch.stack([a, b])[0]`` everything depends on everything. Here the log-density of each element is
differentiated with respect to each element of the site's parents, at several random points; an edge stays if
it is seen anywhere. This is not sound for gates that were closed at every point, hence it is done on request
only. Where no gradient is seen at all (discrete parents, ``z > 0``), every element keeps every element of the
parent.

Elements of one site are joined by edges only where its distribution joins them: a multivariate normal becomes
a chain in which each element has all earlier ones as parents; ``Normal(...).to_event(1)`` has no such edges.

A row of a Jacobian takes a backward pass. Of long vectors, a Jacobian with few diagonals is found by a handful of
passes that add up rows far apart, and confirmed by one with random weights (Curtis, Powell and Reid 1974).
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.model_graph import ModelGraph, Node
from pyro_graphflows.inspect.probes import (
    Rerun,
    RerunError,
    Validation,
    density,
    differentiable,
    require_followed,
    with_known_rows,
)
from pyro_graphflows.inspect.runs import undressed
from pyro_graphflows.inspect.trace import TracedModel, trace_once

__all__ = ["elementwise_jacobian", "get_model_graph", "split_elements", "trace_model"]

_POINTS = 8
_MOST_TOGETHER = 8  # elements of a long vector that may share something, for each to be told apart
_MANY_ROWS = 32  # from which a Jacobian is looked at for diagonals first


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


def _validated(traced: TracedModel, validation: Validation) -> TracedModel:
    graph = traced.graph
    if validation.missed:
        graph = graph.with_edges([*graph.edges, *validation.missed])
    return replace(
        traced,
        graph=graph,
        notes=tuple(dict.fromkeys((*traced.notes, *validation.notes))),
        non_exchangeable=validation.non_exchangeable,
    )


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
