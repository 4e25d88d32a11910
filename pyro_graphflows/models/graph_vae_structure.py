r"""Latent structures of the Graph VAE: which possible parents a node has, and gates on the edges from them.

Nodes are numbered from the data upwards: 0 is next to the data (``z1``); the possible parents of a node have greater
numbers. :func:`nodes_and_parents` goes from a name or a graph to possible parents, :func:`structure_graph` back to a
model graph.

A *gate* :math:`c_{ij} \in \{0, 1\}` multiplies the value of the possible parent :math:`j` on its way to node
:math:`i`. In training it is *relaxed*: a sample of a relaxed Bernoulli (Gumbel-softmax) variable in (0, 1), whose
temperature falls from 1 to a floor, so that the logits have gradients through the sample. In evaluation mode, and for
good once it is frozen, it is *hard*: open where its probability is above one half; a closed one leaves no trace of its
parent.

References:
    [1] Maddison, Mnih and Teh (2017), The Concrete Distribution, ICLR; Jang, Gu and Poole (2017), Categorical
    Reparameterization with Gumbel-Softmax, ICLR.
"""

from collections.abc import Mapping, Sequence

import networkx as nx
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs import ModelGraph
from pyro_graphflows.graphs.structures import topological_order

__all__ = [
    "DATA",
    "GATES",
    "PLATE",
    "GateValues",
    "Gates",
    "behind_gates",
    "nodes_and_parents",
    "structure_graph",
]

STRUCTURES = ("learned", "full", "chain", "independent")

#: The name of the site of the data.
DATA = "x"

#: The name of the plate of the data.
PLATE = "data"

#: The name of the site of relaxed gates.
GATES = "gates"

#: Relaxed gates ``(number of gates,)`` or ``(*particles, 1, number of gates)``, hard ones as truth values, or none.
GateValues = Tensor | list[bool] | None


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


class Gates(nn.Module):
    """One gate for each possible edge, open with probability one half at the start.

    Args:
        parents: The possible parents of each node by number.

    Attributes:
        index: The place of the gate of each ``(child, parent)``.
        logits: Log-odds of being open.
        temperature: The temperature of the relaxed gates.
        is_frozen: Whether gates are hard in training mode too.
        is_open: The hard gates, once frozen.
    """

    temperature: Tensor
    is_frozen: Tensor
    is_open: Tensor

    def __init__(self, parents: Mapping[int, Sequence[int]]) -> None:
        super().__init__()
        self.index = {edge: k for k, edge in enumerate((i, j) for i in parents for j in parents[i])}
        self.logits = nn.Parameter(torch.zeros(len(self.index)))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("is_frozen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("is_open", torch.zeros(len(self.index), dtype=torch.bool))

    @property
    def is_relaxed(self) -> bool:
        """Whether the gates are sampled: in training mode, until they are frozen."""
        return self.training and not self.is_frozen

    def draw(self) -> Tensor:
        """Sample relaxed gates at the site ``gates``: one global site that adds nothing to any bound."""
        with poutine.mask(mask=False):
            law = dist.RelaxedBernoulli(self.temperature, logits=self.logits)
            return pyro.sample(GATES, law.to_event(1))  # (number of gates,)

    def hard(self) -> list[bool]:
        """Return for each gate whether it is open."""
        return (self.is_open if self.is_frozen else self.logits.detach() > 0).tolist()

    def probabilities(self) -> Tensor:
        """Return for each gate the probability of being open; 0 or 1 once frozen."""
        logits = self.logits.detach()
        return self.is_open.to(logits) if self.is_frozen else logits.sigmoid()

    def freeze(self, threshold: float) -> None:
        """Make the gates hard for good: those whose probability is above a threshold stay open."""
        if not self.is_frozen:
            self.is_open.copy_(self.probabilities() > threshold)
            self.is_frozen.fill_(True)

    def of(self, child: int, parents: Sequence[int], gates: Tensor | list[bool]) -> list[Tensor] | list[bool]:
        """Return the gates between a node and its possible parents, relaxed ones as ``(..., 1)``."""
        places = [self.index[child, j] for j in parents]
        if isinstance(gates, list):
            return [gates[k] for k in places]
        return [gates[..., k : k + 1] for k in places]


def behind_gates(values: Sequence[Tensor], gates: Sequence[Tensor] | Sequence[bool] | None) -> Tensor:
    """Return the values of possible parents side by side in one tensor, each behind its gate.

    Args:
        values: One tensor ``(*batch, node_dim)`` for each parent.
        gates: One gate for each; a hard one that is closed gives zeros. ``None`` where all are parents for good.

    Returns:
        A tensor ``(*batch, number of parents * node_dim)``.
    """
    if gates is None:
        return torch.cat(list(values), -1)
    parts = [
        gate * value if isinstance(gate, Tensor) else value if gate else torch.zeros_like(value)
        for gate, value in zip(gates, values, strict=True)
    ]
    return torch.cat(parts, -1)
