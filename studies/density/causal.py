r"""Structural causal models with additive noise: known graphs, known densities.

    x_v = s_v e_v                                  for a node without parents
    x_v = sum_p w_pv x_p + s_v e_v                 linear
    x_v = sum_p w_pv f_pv(x_p) + s_v e_v           non-linear

Weights w go through 1.2, -0.8, 0.6, -1.5 along the edges in the order below, functions f through tanh(2x), x^2 / 2,
sin(2x), softplus(2x), and scales s through 0.5, 0.3, 0.8 along the nodes with parents; s is 1 for the others.
Noise is standard normal; in the non-linear models that of nodes without parents is Laplace.

Graphs: triangle, chain, collider, fork and diamond; simpson, a triangle of a confounder, a treatment and an outcome
with a mediator behind it; large backdoor, nine nodes, two chains from a common cause to a treatment and an outcome.
"""

from collections.abc import Callable

import networkx as nx
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FORMS", "GRAPHS", "names", "simulate"]

GRAPHS: dict[str, list[tuple[str, str]]] = {
    "triangle": [("a", "b"), ("a", "c"), ("b", "c")],
    "chain": [("a", "b"), ("b", "c"), ("c", "d")],
    "collider": [("a", "c"), ("b", "c")],
    "fork": [("a", "b"), ("a", "c")],
    "diamond": [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")],
    "simpson": [("z", "t"), ("z", "y"), ("t", "y"), ("y", "w")],
    "large backdoor": [
        *(("u", "a1"), ("u", "b1"), ("a1", "a2"), ("a2", "a3"), ("a3", "t")),
        *(("b1", "b2"), ("b2", "b3"), ("b3", "y"), ("t", "y")),
    ],
}
FORMS = ("linear", "non-linear")
WEIGHTS = (1.2, -0.8, 0.6, -1.5)
SCALES = (0.5, 0.3, 0.8)
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: torch.tanh(2 * x),
    lambda x: 0.5 * x.square(),
    lambda x: torch.sin(2 * x),
    lambda x: F.softplus(2 * x),
)


def names() -> list[str]:
    """Return the names of all models, ``"graph, form"``."""
    return [f"{graph}, {form}" for graph in GRAPHS for form in FORMS]


def simulate(name: str, n: int, seed: int) -> tuple[nx.DiGraph, Tensor, Tensor]:
    """Return the graph of a model, samples in the order of its nodes, and their log-densities.

    Args:
        name: One of :func:`names`.
        n: How many.
        seed: The seed.
    """
    which, form = name.split(", ")
    graph = nx.DiGraph(GRAPHS[which])
    order = {edge: i for i, edge in enumerate(GRAPHS[which])}
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    log_density = torch.zeros(n)
    inner = [node for node in nx.topological_sort(graph) if graph.in_degree(node)]
    for node in nx.topological_sort(graph):
        if not graph.in_degree(node):
            if form == "linear":
                values[node] = torch.randn(n, generator=generator)
                log_density += dist.Normal(0.0, 1.0).log_prob(values[node])
            else:
                u = torch.rand(n, generator=generator) - 0.5
                values[node] = -u.sign() * torch.log1p(-2 * u.abs())
                log_density += dist.Laplace(0.0, 1.0).log_prob(values[node])
            continue
        loc = torch.zeros(n)
        for parent in graph.predecessors(node):
            i = order[parent, node]
            x = values[parent]
            loc = loc + WEIGHTS[i % len(WEIGHTS)] * (
                x if form == "linear" else FUNCTIONS[i % len(FUNCTIONS)](x)
            )
        scale = SCALES[inner.index(node) % len(SCALES)]
        values[node] = loc + scale * torch.randn(n, generator=generator)
        log_density += dist.Normal(loc, scale).log_prob(values[node])
    return graph, torch.stack([values[node] for node in graph], -1), log_density
