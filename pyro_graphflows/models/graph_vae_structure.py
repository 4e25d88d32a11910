"""Latent structures of the Graph VAE: from a name or a graph to possible parents, and back to a model graph.

Nodes are numbered from the data upwards: 0 is next to the data; the possible parents of a node have greater numbers.
"""

from collections.abc import Sequence

import networkx as nx

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs import ModelGraph
from pyro_graphflows.graphs.model_graph import topological_order

__all__ = ["DATA", "PLATE", "STRUCTURES", "nodes_and_parents", "structure_graph"]

STRUCTURES = ("learned", "full", "chain", "independent")

#: The name of the site of the data.
DATA = "x"

#: The name of the plate of the data.
PLATE = "data"


def nodes_and_parents(
    structure: str | nx.DiGraph | ModelGraph, num_nodes: int | None, reserved: Sequence[str]
) -> tuple[tuple[str, ...], dict[int, tuple[int, ...]]]:
    """Return the names of the nodes, the last sampled first, and the possible parents of each by number.

    Args:
        structure: One of ``STRUCTURES`` or a DAG over the nodes (of a model graph its latent nodes).
        num_nodes: The number of nodes; ``None`` for 5, or for as many as a graph has.
        reserved: Names that nodes must not have.

    Raises:
        GraphflowsError: If the structure is unknown, has another number of nodes, or a node has a wrong name.
        NotADAGError: If a graph has a directed cycle.
    """
    if isinstance(structure, str):
        if structure not in STRUCTURES:
            raise GraphflowsError(
                f"Expected structure among {', '.join(STRUCTURES)}, or a networkx.DiGraph; got {structure!r}."
            )
        number = 5 if num_nodes is None else num_nodes
        names = tuple(f"z{i + 1}" for i in range(number))
        reach = {"learned": number, "full": number, "chain": 1, "independent": 0}[structure]
        return names, {i: tuple(range(i + 1, min(i + 1 + reach, number))) for i in range(number)}
    if isinstance(structure, ModelGraph):
        structure = structure.to_networkx().subgraph(structure.latent)
    if not isinstance(structure, nx.DiGraph):
        raise GraphflowsError(
            f"Expected structure among {', '.join(STRUCTURES)}, or a networkx.DiGraph; got a "
            f"{type(structure).__name__}."
        )
    order = tuple(reversed(topological_order(structure)))
    if num_nodes not in (None, len(order)) or not order:
        raise GraphflowsError(f"Expected a graph with num_nodes={num_nodes} nodes; it has {len(order)}.")
    names = tuple(node if isinstance(node, str) else f"z{node}" for node in order)
    if set(reserved) & set(names) or len(set(names)) < len(names):
        raise GraphflowsError(
            f"Expected distinct node names other than {', '.join(map(repr, reserved))}; got {sorted(names)}."
        )
    index = {node: i for i, node in enumerate(order)}
    return names, {i: tuple(sorted(index[p] for p in structure.predecessors(n))) for n, i in index.items()}


def structure_graph(
    names: Sequence[str],
    is_edge: Sequence[Sequence[bool]],
    seen: Sequence[str],
    node_dim: int,
    data_size: int,
) -> ModelGraph:
    """Return a structure as a model graph with one observed node, ``x``, everything in a plate ``data``.

    Args:
        names: The nodes.
        is_edge: Whether there is an edge, child as row and parent as column.
        seen: The nodes that the decoder sees.
        node_dim: The size of a node.
        data_size: The size of a datum.
    """
    dag = nx.DiGraph()
    dag.add_nodes_from(reversed(names))
    dag.add_node(DATA)
    for child, row in zip(names, is_edge, strict=True):
        dag.add_edges_from((parent, child) for parent, present in zip(names, row, strict=True) if present)
    dag.add_edges_from((name, DATA) for name in seen)
    sizes = dict.fromkeys(names, node_dim) | {DATA: data_size}
    return ModelGraph(dag, [DATA], event_sizes=sizes, plates={name: [PLATE] for name in dag})
