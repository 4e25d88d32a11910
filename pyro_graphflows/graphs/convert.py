"""Model graphs and linear-Gaussian networks from and to pgmpy, and from BIF files.

pgmpy takes seconds to import, so it is imported inside the functions. Digraphs of networkx need none of this:
see ``ModelGraph(digraph, observed)`` and ``graph.to_networkx()``.
"""

import gzip
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import networkx as nx

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork
from pyro_graphflows.graphs.structures import ModelGraph, Node, listed

__all__ = ["from_bif", "from_pgmpy", "to_pgmpy"]


def from_pgmpy(
    model: Any, observed: Iterable[Node] | str | None = None
) -> ModelGraph | LinearGaussianNetwork:
    """Return a pgmpy model as one of this package.

    A ``LinearGaussianBayesianNetwork`` with its conditional distributions becomes a
    :class:`LinearGaussianNetwork`. Every other ``DAG``, discrete networks included, becomes a
    :class:`ModelGraph`: the structure alone.

    Args:
        model: A ``pgmpy.base.DAG`` or one of its subclasses.
        observed: The observed nodes, or ``"leaves"``. By default the nodes with the role ``"observed"``, else
            all that are not in ``model.latents``, else (when there is no latent node) the leaves. Nodes with
            the roles ``"inputs"`` and ``"marginalised"`` keep them, where a :class:`ModelGraph` is returned.

    Returns:
        The network or graph.

    Raises:
        GraphflowsError: If ``model`` is not a pgmpy DAG, a name is unknown, or some nodes of a
            linear-Gaussian network have a distribution and others not.
    """
    from pgmpy.base import DAG
    from pgmpy.models import LinearGaussianBayesianNetwork

    if not isinstance(model, DAG):
        raise GraphflowsError(f"Expected a pgmpy DAG or Bayesian network; got a {type(model).__name__}.")
    factors = model.cpds if isinstance(model, LinearGaussianBayesianNetwork) else []
    missing = set(model.nodes) - {factor.variable for factor in factors}
    if factors and missing:
        raise GraphflowsError(f"Expected a distribution for every node; got none for {listed(missing)}.")
    inputs = [] if factors else model.get_role("inputs")
    marginalised = [] if factors else model.get_role("marginalised")
    if observed is None:
        hidden = {*model.latents, *inputs, *marginalised}
        visible = model.get_role("observed") or [node for node in model.nodes if node not in hidden]
        observed = visible if hidden or model.get_role("observed") else "leaves"
    names: Any = _observed(model, observed)
    if not factors:
        return ModelGraph(nx.DiGraph(model), names, inputs=inputs, marginalised=marginalised)
    by_name = {factor.variable: factor for factor in factors}
    nodes: Any = list(model.nodes)
    return LinearGaussianNetwork(
        {node: by_name[node].evidence for node in nodes},
        {node: by_name[node].beta[1:] for node in nodes},
        {node: by_name[node].beta[0] for node in nodes},
        {node: by_name[node].std for node in nodes},
        observed=names,
    )


def to_pgmpy(model: ModelGraph | LinearGaussianNetwork) -> Any:
    """Return a graph as a pgmpy ``DAG``, or a network as a ``LinearGaussianBayesianNetwork``.

    Latent and marginalised nodes are in its ``latents``; the roles ``"observed"``, ``"inputs"`` and
    ``"marginalised"`` say the rest, so that :func:`from_pgmpy` gives back the same graph or network. Event
    sizes and plates have no counterpart and are dropped.

    Args:
        model: A model graph or a linear-Gaussian network.

    Returns:
        The pgmpy object.
    """
    from pgmpy.base import DAG
    from pgmpy.factors.continuous import LinearGaussianCPD
    from pgmpy.models import LinearGaussianBayesianNetwork

    network = model if isinstance(model, LinearGaussianNetwork) else None
    graph = model.graph() if isinstance(model, LinearGaussianNetwork) else model
    dag = LinearGaussianBayesianNetwork() if network else DAG()
    dag.add_nodes_from(graph.nodes)
    dag.add_edges_from(graph.edges)
    roles = {
        "latents": (*graph.latent, *graph.marginalised),
        "observed": graph.observed,
        "inputs": graph.inputs,
        "marginalised": graph.marginalised,
    }
    for role, nodes in roles.items():
        dag.with_role(role, nodes, inplace=True)
    if network:
        for name in network.names:
            beta = [network.intercepts[name], *network.coefficients[name]]
            evidence = list(network.parents[name])
            dag.add_cpds(LinearGaussianCPD(name, beta, network.scales[name], evidence))
    return dag


def from_bif(path: str | Path, observed: Iterable[Node] | str = "leaves") -> ModelGraph:
    """Return the structure of a discrete network in a BIF file.

    Args:
        path: The file; a name that ends in ``.gz`` is decompressed.
        observed: The observed nodes, or ``"leaves"``.

    Returns:
        The graph, its nodes in the order of the file.

    Raises:
        GraphflowsError: If a name is unknown, the file declares no variables, or a variable has no probabilities.
    """
    from pgmpy.readwrite import BIFReader

    path = Path(path)
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as file:
        text = _plain_bif(file.read())
    reader = BIFReader(string=text) if text.strip() else None
    if reader is None or not reader.variable_names:
        raise GraphflowsError(f"Expected a network in BIF format; {path} declares no variables.")
    without = [name for name in reader.variable_names if name not in reader.variable_parents]
    if without:
        raise GraphflowsError(
            f"Expected a probability block for each variable; {path} has none that can be read for {without}. Its form "
            "is: probability ( child | parent, other ) { ... }, with the last brace at the end of a line."
        )
    dag = nx.DiGraph()
    dag.add_nodes_from(reader.variable_names)
    dag.add_edges_from(reader.variable_edges)
    return ModelGraph(dag, _observed(dag, observed))


def _plain_bif(text: str) -> str:
    """Return a BIF text without comments and spaces at ends of lines: pgmpy passes over the blocks before those."""
    text = re.sub(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', _unless_a_comment, text, flags=re.DOTALL)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _unless_a_comment(match: re.Match[str]) -> str:
    return match.group() if match.group().startswith('"') else " "


def _observed(dag: nx.DiGraph, observed: Iterable[Node] | str) -> list[Node]:
    """Resolve and check the names of the observed nodes."""
    if isinstance(observed, str):
        if observed != "leaves":
            raise GraphflowsError(f'Expected "leaves" or a collection of names; got {observed!r}.')
        return [node for node in dag if not dag.out_degree(node)]
    return list(observed)
