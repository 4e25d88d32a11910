"""Split vector sites into their elements, and find which depend on which.

At the level of sites the tracer is sound but coarse: after ``torch.stack([a, b])[0]`` everything depends on
everything. Here the log-density of each element is differentiated with respect to each element of the site's
parents, at several random points; an edge stays if it is seen anywhere. This is not sound for gates that were
closed at every point, hence it is done on request only. Where no gradient is seen at all (discrete parents,
``z > 0``), every element keeps every element of the parent.

Elements of one site are joined by edges only where its distribution joins them: a multivariate normal becomes
a chain in which each element has all earlier ones as parents; ``Normal(...).to_event(1)`` has no such edges.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import torch

from pyro_graphflows.graphs.model_graph import ModelGraph, Node
from pyro_graphflows.inspect.record import undressed
from pyro_graphflows.inspect.rerun import RerunError, density, differentiable, rerun
from pyro_graphflows.inspect.traced import TracedModel

__all__ = ["split_elements"]

_POINTS = 8


def split_elements(
    model: Callable, args: tuple, kwargs: dict[str, Any], traced: TracedModel, *, num_points: int = _POINTS
) -> TracedModel:
    """Refine a graph of sites to one of elements.

    Split are latent sites whose elements are constrained one by one (not simplices or matrices), and
    observed sites with independent elements. Element (0, 1) of site ``z`` is the node ``"z[0,1]"``. Other
    sites, and inputs, stay whole under their own names.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with these arguments.
        num_points: At how many random points to differentiate.

    Returns:
        ``traced`` with the refined graph and ``elements``; everything else is by site as before.
    """
    nodes: Any = traced.trace.nodes
    graph = traced.graph
    sites = [str(name) for name in nodes if name in graph]
    split = {name for name in sites if _can_split(nodes[name], name in graph.observed)}
    notes = traced.notes
    try:
        patterns = _patterns(model, args, kwargs, traced, sites, num_points)
    except RerunError as error:
        patterns = {}
        notes = (*notes, f"elements were not told apart: {error}")

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
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    traced: TracedModel,
    sites: list[str],
    num_points: int,
) -> dict[tuple[str, str], np.ndarray]:
    """Return which elements (rows) depend on which elements of a parent, where gradients show it."""
    nodes: Any = traced.trace.nodes
    subsamples = {
        name: node["value"] for name, node in nodes.items() if type(node.get("fn")).__name__ == "_Subsample"
    }
    found: dict[tuple[str, str], np.ndarray] = {}
    given = {name: torch.as_tensor(nodes[name]["value"]) for name in traced.graph.observed if name in nodes}
    given = {name: value for name, value in given.items() if name not in traced.without_data}
    for point in range(num_points):
        drawn = rerun(model, args, kwargs, {**subsamples, **given}, seed=point + 1)
        leaves = {}
        for name in sites:
            value = drawn.nodes[name]["value"]
            if name not in traced.without_data and isinstance(value, torch.Tensor) and differentiable(value):
                leaves[name] = value.detach().clone().requires_grad_()
        with torch.enable_grad():
            values = {name: drawn.nodes[name]["value"] for name in sites if name not in traced.without_data}
            values.update({name: leaf.clone() for name, leaf in leaves.items()})
            trace = rerun(model, args, kwargs, {**subsamples, **values}, gradients=True, seed=point + 1)
            for child in sites:
                parents = {
                    str(name): leaves[str(name)] for name in traced.graph.parents(child) if name in leaves
                }
                for parent, pattern in _jacobian(trace.nodes[child], parents, nodes).items():
                    found[parent, child] = found.get((parent, child), False) | pattern
    return {pair: pattern for pair, pattern in found.items() if pattern.any()}


def _jacobian(child: Any, parents: dict[str, torch.Tensor], nodes: Any) -> dict[str, np.ndarray]:
    """Return where the Jacobian of elementwise log-densities is not zero at a point."""
    log_density = density(child, elementwise=True)
    if not parents or not log_density.requires_grad:
        return {}
    batch_dim = len(child["fn"].batch_shape)
    entries = log_density.sum(tuple(range(batch_dim))) if batch_dim else log_density
    block = max(1, undressed(child["fn"]).event_shape.numel())  # 0 at a factor
    rows: dict[str, list[np.ndarray]] = {name: [] for name in parents}
    for entry in entries.reshape(-1):
        gradients = torch.autograd.grad(entry, list(parents.values()), retain_graph=True, allow_unused=True)
        for (name, value), gradient in zip(parents.items(), gradients, strict=True):
            size = torch.Size(nodes[name]["fn"].event_shape).numel()
            if gradient is None:
                gradient = torch.zeros_like(value)
            seen = (gradient.reshape(-1, size) != 0).any(0).numpy(force=True)
            rows[name] += [seen] * block
    return {name: np.stack(pattern) for name, pattern in rows.items()}
