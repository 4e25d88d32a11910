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

    Attributes:
        graph: The model graph that is inverted.
        parents: The parents of each latent node, in graph order.
        sampling_order: All latent nodes, parents first.
        levels: The latent nodes by the length of the longest chain of latent parents above them.
        num_edges: The number of parents, summed over the latent nodes.
        order: The name of the rule that made this inverse; the winner's name for ``"auto"``.
        coupled: The plates across which copies of a latent node stay dependent given its parents.
        how: How each parent enters: (parent, latent) to ``"same"``, ``"broadcast"`` or ``"pooled"``.

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

    graph: ModelGraph
    parents: Mapping[Node, tuple[Node, ...]]
    sampling_order: tuple[Node, ...]
    levels: tuple[tuple[Node, ...], ...]
    num_edges: int
    order: str
    coupled: Mapping[Node, tuple[str, ...]]
    how: Mapping[tuple[Node, Node], str]

    _MAPS = ("parents", "coupled", "how")

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
        hidden = set(graph.marginalised)
        wrong = [node for node in mentioned if node not in rank or node in hidden]
        if wrong:
            raise GraphflowsError(
                f"Expected parents that are latent, observed or input nodes; got {listed(wrong)}."
            )
        ordered = {node: tuple(sorted(sets[node], key=rank.__getitem__)) for node in latent}
        edges = [(parent, node) for node in latent for parent in ordered[node] if parent in sets]
        dag = nx.DiGraph()
        dag.add_nodes_from(latent)
        dag.add_edges_from(edges)
        topological = topological_order(dag)
        sampling = topological if sampling_order is None else tuple(sampling_order)
        place = {node: i for i, node in enumerate(sampling)}
        if len(sampling) != len(latent) or set(place) != set(latent):
            raise GraphflowsError(f"Expected a sampling order of the latent nodes {listed(latent)}.")
        late = [f"{parent} -> {node}" for parent, node in edges if place[parent] > place[node]]
        if late:
            raise GraphflowsError(f"Expected a sampling order with parents first; not so for {listed(late)}.")
        depth: dict[Node, int] = {}
        for node in topological:
            depth[node] = 1 + max((depth[p] for p in ordered[node] if p in sets), default=-1)
        levels: list[list[Node]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
        for node in sampling:
            levels[depth[node]].append(node)
        plates = {node: frozenset(names) for node, names in graph.plates.items()}
        derived = {(p, v): _derived_way(plates[p], plates[v]) for v in latent for p in ordered[v]}
        if how is not None:
            wrong_how = [pair for pair, word in how.items() if pair not in derived or word not in HOW]
            if wrong_how:
                raise GraphflowsError(
                    f"Expected one of {HOW} for an edge of the inverse; not so for {listed(wrong_how)}."
                )
            derived.update(how)
        self.__setstate__(
            {
                "graph": graph,
                "parents": ordered,
                "sampling_order": sampling,
                "levels": tuple(map(tuple, levels)),
                "num_edges": sum(map(len, ordered.values())),
                "order": order,
                "coupled": {n: tuple(names) for n, names in (coupled or {}).items() if tuple(names)},
                "how": derived,
            }
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"Expected no changes of an InverseGraph, which is immutable; got {name}={value!r}."
        )

    def __getstate__(self) -> dict[str, object]:
        maps = {name: dict(getattr(self, name)) for name in self._MAPS}
        return {**self.__dict__, **maps}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.__dict__.update({name: MappingProxyType(state[name]) for name in self._MAPS})  # type: ignore[arg-type]

    def to_networkx(self) -> nx.DiGraph:
        """Return a new digraph over all but the marginalised nodes, with the roles of the model graph."""
        dag = nx.DiGraph()
        for node, data in self.graph.to_networkx().nodes(data=True):
            if data["role"] != "marginalised":
                dag.add_node(node, **data)
        for node, parents in self.parents.items():
            dag.add_edges_from((parent, node) for parent in parents)
        return dag

    def _key(self) -> tuple[object, ...]:
        return (self.graph, tuple(self.parents.items()), self.sampling_order, self.order)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InverseGraph) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return (
            f"InverseGraph({len(self.parents)} latent nodes, {self.num_edges} edges, "
            f"{len(self.levels)} levels, order={self.order!r})"
        )


def _derived_way(parent: frozenset[str], child: frozenset[str]) -> str:
    """Return how a parent enters, by the plates around it and around the child."""
    if not parent <= child:
        return "pooled"
    return "same" if parent == child else "broadcast"
