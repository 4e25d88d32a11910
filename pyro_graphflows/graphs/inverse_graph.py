"""The structure of a guide: for each latent node, what it is conditioned on, and in what order to sample.

An inverse ``H`` of a model graph ``G`` has the observed nodes and inputs as roots, and gives every latent
node parents among them and the latent nodes sampled before it, so that the guide is
``q(z | x) = prod_v q(z_v | z_Pa(v), x_Pa(v))``.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import networkx as nx

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.model_graph import ModelGraph, Node, listed, topological_order

__all__ = ["InverseGraph"]

HOW = ("same", "broadcast", "pooled")


class InverseGraph:
    """An immutable, validated factorisation of a posterior.

    Args:
        graph: The model graph.
        parents: The parents of each latent node in the guide: observed nodes, inputs and other latent nodes.
            Every latent node of ``graph`` must be a key.
        order: The name of the rule that made it.
        sampling_order: The latent nodes, parents first; derived where nothing is said.
        coupled: For latent nodes whose copies stay dependent across a plate given their parents: those plates.
        how: How a parent enters a latent node, ``"same"`` (same plates: elementwise), ``"broadcast"`` (the
            parent is in fewer plates) or ``"pooled"`` (the parent is in a plate the latent node is not in);
            derived from the plates where nothing is said.

    Raises:
        NotADAGError: If the parents form a cycle. The message lists one.
        GraphflowsError: If a latent node has no entry, a name is unknown, a parent is a marginalised node, or
            the sampling order is not an order of the latent nodes with parents first.

    Example:
        >>> graph = ModelGraph([("a", "x"), ("b", "x")], observed=["x"])
        >>> inverse = InverseGraph(graph, {"a": ["x", "b"], "b": ["x"]})
        >>> inverse.parents["a"], inverse.sampling_order, inverse.levels, inverse.num_edges
        (('b', 'x'), ('b', 'a'), (('b',), ('a',)), 3)
    """

    def __init__(
        self,
        graph: ModelGraph,
        parents: Mapping[Node, Iterable[Node]],
        *,
        order: str = "custom",
        sampling_order: Iterable[Node] | None = None,
        coupled: Mapping[Node, Iterable[str]] | None = None,
        how: Mapping[tuple[Node, Node], str] | None = None,
    ) -> None:
        latent = graph.latent
        rank = {node: i for i, node in enumerate(graph.nodes)}
        if set(parents) != set(latent):
            raise GraphflowsError(
                f"Expected parents for every latent node and no other; "
                f"missing: {listed(set(latent) - set(parents)) or 'none'}; "
                f"not latent: {listed(set(parents) - set(latent)) or 'none'}."
            )
        sets = {node: set(parents[node]) for node in latent}
        mentioned = set().union(*sets.values()) if sets else set()
        wrong = [node for node in mentioned if node not in graph or graph.role(node) == "marginalised"]
        if wrong:
            raise GraphflowsError(
                f"Expected parents that are latent, observed or input nodes; got {listed(wrong)}."
            )
        self._graph = graph
        self._order = order
        self._parents = {node: tuple(sorted(sets[node], key=rank.__getitem__)) for node in latent}
        edges = [(parent, node) for node in latent for parent in self._parents[node] if parent in sets]
        dag = nx.DiGraph()
        dag.add_nodes_from(latent)
        dag.add_edges_from(edges)
        topological = topological_order(dag)
        if sampling_order is None:
            self._sampling_order = topological
        else:
            self._sampling_order = tuple(sampling_order)
            place = {node: i for i, node in enumerate(self._sampling_order)}
            if len(self._sampling_order) != len(latent) or set(place) != set(latent):
                raise GraphflowsError(f"Expected a sampling order of the latent nodes {listed(latent)}.")
            late = [f"{parent} -> {node}" for parent, node in edges if place[parent] > place[node]]
            if late:
                raise GraphflowsError(
                    f"Expected a sampling order with parents first; not so for {listed(late)}."
                )
        depth: dict[Node, int] = {}
        for node in topological:
            depth[node] = 1 + max((depth[p] for p in self._parents[node] if p in sets), default=-1)
        levels: list[list[Node]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
        for node in self._sampling_order:
            levels[depth[node]].append(node)
        self._levels = tuple(map(tuple, levels))
        self._num_edges = sum(map(len, self._parents.values()))
        self._coupled = {node: tuple(plates) for node, plates in (coupled or {}).items() if tuple(plates)}
        derived = {(p, node): self._derive_how(p, node) for node in latent for p in self._parents[node]}
        if how is not None:
            wrong_how = [pair for pair, word in how.items() if pair not in derived or word not in HOW]
            if wrong_how:
                raise GraphflowsError(
                    f"Expected one of {HOW} for an edge of the inverse; not so for {listed(wrong_how)}."
                )
            derived.update(how)
        self._how = derived

    def _derive_how(self, parent: Node, child: Node) -> str:
        outside = set(self._graph.plates[parent]), set(self._graph.plates[child])
        if not outside[0] <= outside[1]:
            return "pooled"
        return "same" if outside[0] == outside[1] else "broadcast"

    @property
    def graph(self) -> ModelGraph:
        """The model graph that is inverted."""
        return self._graph

    @property
    def parents(self) -> Mapping[Node, tuple[Node, ...]]:
        """The parents of each latent node, in graph order."""
        return MappingProxyType(self._parents)

    @property
    def sampling_order(self) -> tuple[Node, ...]:
        """All latent nodes, parents first."""
        return self._sampling_order

    @property
    def levels(self) -> tuple[tuple[Node, ...], ...]:
        """The latent nodes by the length of the longest chain of latent parents above them."""
        return self._levels

    @property
    def num_edges(self) -> int:
        """The number of parents, summed over the latent nodes."""
        return self._num_edges

    @property
    def order(self) -> str:
        """The name of the rule that made this inverse; the winner's name for ``"auto"``."""
        return self._order

    @property
    def coupled(self) -> Mapping[Node, tuple[str, ...]]:
        """The plates across which copies of a latent node stay dependent given its parents."""
        return MappingProxyType(self._coupled)

    @property
    def how(self) -> Mapping[tuple[Node, Node], str]:
        """How each parent enters: (parent, latent) to ``"same"``, ``"broadcast"`` or ``"pooled"``."""
        return MappingProxyType(self._how)

    def to_networkx(self) -> nx.DiGraph:
        """Return a new digraph over all but the marginalised nodes, with the roles of the model graph."""
        dag = nx.DiGraph()
        for node, data in self._graph.to_networkx().nodes(data=True):
            if data["role"] != "marginalised":
                dag.add_node(node, **data)
        for node, parents in self._parents.items():
            dag.add_edges_from((parent, node) for parent in parents)
        return dag

    def _key(self) -> tuple[object, ...]:
        return (self._graph, tuple(self._parents.items()), self._sampling_order, self._order)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InverseGraph) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return (
            f"InverseGraph({len(self._parents)} latent nodes, {self._num_edges} edges, "
            f"{len(self._levels)} levels, order={self._order!r})"
        )
