"""The two structures: who depends on whom in a model, and what a guide conditions each latent node on.

A *model graph* is a directed acyclic graph over the random variables of a model. Each node has a role:

- *latent*: a variable whose posterior is wanted;
- *observed*: a variable with data;
- *input*: a covariate, known but without a density (a root that counts as observed);
- *marginalised*: a variable that is summed or integrated out before inference.

Nodes may live in *plates* (repetition), named from outer to inner, and have an event size (the number of
scalars of one copy). As an example, the regression ``w ~ N(0, 1)``, ``y_n ~ N(w * x_n, 1)`` has the edges
``w -> y`` and ``x -> y``, observed ``y``, input ``x``, and the plate ``data`` around ``x`` and ``y``.

An *inverse* ``H`` of a model graph ``G`` has the observed nodes and inputs as roots, and gives every latent
node parents among them and the latent nodes sampled before it, so that the guide is
``q(z | x) = prod_v q(z_v | z_Pa(v), x_Pa(v))``.

**Plates as a finite graph** (:func:`expand`): every plate is expanded to a few copies, and what
was found is folded back.

A plate says that a node is repeated, with an unspecified number of copies. What an inversion finds cannot
depend on that number, and two copies are enough to see everything: a dependence between a copy and *another*
copy looks the same whichever other copy it is. One copy is not enough, since it loses the coupling of two
copies through a common parent or child.

Words: a *site* is a node of the :class:`ModelGraph`, a *copy* is a node of the expansion. A copy has one
index for each plate around its site. An edge ``u -> v`` joins the copies of ``u`` and ``v`` whose indices
agree in the plates they share. So a parent in fewer plates is *broadcast* (one copy to many children) and a
parent in more plates is *pooled* (many copies to one child).

As an example, ``mu -> z``, ``z -> x`` with ``z`` and ``x`` in a plate become the five nodes ``mu``,
``z[0]``, ``z[1]``, ``x[0]``, ``x[1]`` with edges ``mu -> z[i]`` and ``z[i] -> x[i]``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import networkx as nx

from pyro_graphflows.errors import GraphflowsError, NotADAGError

__all__ = [
    "Expansion",
    "InverseGraph",
    "ModelGraph",
    "Node",
    "ancestors",
    "expand",
]

Node: TypeAlias = Any  # any hashable; sites of Pyro models are strings
_Item = TypeVar("_Item")

ROLES = ("latent", "observed", "input", "marginalised")


def listed(names: Iterable[Node]) -> str:
    return ", ".join(sorted(map(str, names)))


def _as_names(names: Iterable[Node] | str, what: str) -> tuple[Node, ...]:
    if isinstance(names, str):
        raise GraphflowsError(
            f"Expected a collection of node names for {what}; got the string {names!r}. Use [{names!r}]."
        )
    return tuple(dict.fromkeys(_in_fixed_order(names)))


def _in_fixed_order(items: Iterable[_Item]) -> Iterable[_Item]:
    """Return what is in a set sorted by its text: Python's own order changes from one run to the next."""
    return sorted(items, key=str) if isinstance(items, set | frozenset) else items


def topological_order(graph: nx.DiGraph) -> tuple[Node, ...]:
    """Return the topological order of a DAG in which ties follow the order of insertion.

    Args:
        graph: A directed graph.

    Returns:
        Every node once, parents before children.

    Raises:
        NotADAGError: If ``graph`` has a directed cycle. The message lists one.

    Example:
        >>> topological_order(nx.DiGraph([("b", "c"), ("a", "c")]))
        ('b', 'a', 'c')
    """
    rank = {node: i for i, node in enumerate(graph)}
    try:
        return tuple(nx.lexicographical_topological_sort(graph, key=rank.__getitem__))
    except nx.NetworkXUnfeasible:
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        path = " -> ".join(map(str, [*cycle, cycle[0]]))
        raise NotADAGError(f"Expected a directed acyclic graph; got the cycle {path}.") from None


class ModelGraph:
    r"""An immutable, validated Bayesian-network structure.

    Args:
        graph: A directed graph, or an iterable of edges (parent, child). Edges and names in sets are sorted.
        observed: The names of the observed nodes.
        inputs: The names of the covariates: roots without a density that are always known.
        marginalised: The names of the unobserved nodes that are summed or integrated out.
        event_sizes: The number of scalars of one copy of a node; 1 where nothing is said.
        plates: The names of the plates around a node, outer to inner; none where nothing is said.
        nodes: Nodes, needed for those without an edge where ``graph`` is no digraph. All other names must be known, so
            that a misspelt one is no new node.

    Attributes:
        nodes: All nodes, parents before children; ties in order of insertion. Called *graph order* elsewhere.
        latent: The latent nodes in graph order.
        observed: The observed nodes in graph order.
        inputs: The inputs (covariates) in graph order.
        marginalised: The marginalised nodes in graph order.
        event_sizes: The number of scalars of one copy of each node.
        plates: The plates around each node, outer to inner.

    Raises:
        NotADAGError: If there is a directed cycle. The message lists one.
        GraphflowsError: If a name is unknown, a node has two roles, an input has parents, or an event size is
            not a positive integer. The message lists the nodes.

    Example:
        >>> graph = ModelGraph([("w", "y"), ("x", "y")], observed=["y"], inputs=["x"], plates={"y": ["data"]})
        >>> graph.latent, graph.parents("y"), graph.plates["y"]
        (('w',), ('w', 'x'), ('data',))
    """

    __slots__ = (
        "_children", "_hash", "_parents", "_roles",
        "event_sizes", "inputs", "latent", "marginalised", "nodes", "observed", "plates",
    )  # fmt: skip

    nodes: tuple[Node, ...]
    latent: tuple[Node, ...]
    observed: tuple[Node, ...]
    inputs: tuple[Node, ...]
    marginalised: tuple[Node, ...]
    event_sizes: Mapping[Node, int]
    plates: Mapping[Node, tuple[str, ...]]
    _parents: dict[Node, tuple[Node, ...]]
    _children: dict[Node, tuple[Node, ...]]
    _roles: dict[Node, str]
    _hash: int | None

    def __init__(
        self,
        graph: nx.DiGraph | Iterable[tuple[Node, Node]],
        observed: Iterable[Node],
        *,
        inputs: Iterable[Node] = (),
        marginalised: Iterable[Node] = (),
        event_sizes: Mapping[Node, int] | None = None,
        plates: Mapping[Node, Iterable[str]] | None = None,
        nodes: Iterable[Node] = (),
    ) -> None:
        named = {
            "observed": _as_names(observed, "observed"),
            "input": _as_names(inputs, "inputs"),
            "marginalised": _as_names(marginalised, "marginalised"),
        }
        event_sizes = dict(event_sizes or {})
        plate_names = {
            node: tuple(map(str, _as_names(names, f"the plates of {node}")))
            for node, names in (plates or {}).items()
        }
        dag = nx.DiGraph()
        if isinstance(graph, nx.Graph):
            if not graph.is_directed() or graph.is_multigraph():
                raise GraphflowsError(f"Expected a networkx.DiGraph; got a {type(graph).__name__}.")
            dag.add_nodes_from(graph)
            dag.add_edges_from(graph.edges())
        else:
            dag.add_edges_from((parent, child) for parent, child in _in_fixed_order(graph))
        dag.add_nodes_from(_as_names(nodes, "nodes"))
        mentioned = {node for names in named.values() for node in names} | set(event_sizes) | set(plate_names)
        unknown = mentioned - set(dag)
        if unknown:
            raise GraphflowsError(
                f"Expected names of nodes of the graph; got unknown {listed(unknown)}. The nodes are "
                f"{listed(dag) or 'none'}. Nodes without an edge are given by nodes=[...]."
            )

        roles = dict.fromkeys(dag, "latent")
        twice = set()
        for role, names in named.items():
            for node in names:
                if roles[node] != "latent":
                    twice.add(node)
                roles[node] = role
        if twice:
            raise GraphflowsError(f"Expected one role for each node; got two for {listed(twice)}.")
        with_parents = [node for node in named["input"] if dag.in_degree(node)]
        if with_parents:
            raise GraphflowsError(
                f"Expected inputs without parents; {listed(with_parents)} have some. "
                "A node that depends on others is observed or latent."
            )
        wrong = [node for node, size in event_sizes.items() if not (isinstance(size, int) and size >= 1)]
        if wrong:
            raise GraphflowsError(
                f"Expected event sizes that are positive integers; not so for {listed(wrong)}."
            )

        order = topological_order(dag)
        rank = {node: i for i, node in enumerate(order)}
        self.__setstate__(
            {
                "nodes": order,
                "_parents": {n: tuple(sorted(dag.predecessors(n), key=rank.__getitem__)) for n in order},
                "_children": {n: tuple(sorted(dag.successors(n), key=rank.__getitem__)) for n in order},
                "_roles": {node: roles[node] for node in order},
                "event_sizes": {node: event_sizes.get(node, 1) for node in order},
                "plates": {node: plate_names.get(node, ()) for node in order},
            }
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"Expected no changes of a ModelGraph, which is immutable; got {name}={value!r}."
        )

    @property
    def edges(self) -> tuple[tuple[Node, Node], ...]:
        """The edges (parent, child), by child in graph order."""
        return tuple((parent, node) for node in self.nodes for parent in self._parents[node])

    def _known(self, name: Node) -> Node:
        if name not in self._roles:
            raise GraphflowsError(
                f"Expected a node of the graph; got {name!r}. The nodes are {listed(self.nodes)}."
            )
        return name

    def role(self, name: Node) -> str:
        """Return ``"latent"``, ``"observed"``, ``"input"`` or ``"marginalised"``."""
        return self._roles[self._known(name)]

    def parents(self, name: Node) -> tuple[Node, ...]:
        """Return the parents of a node in graph order."""
        return self._parents[self._known(name)]

    def children(self, name: Node) -> tuple[Node, ...]:
        """Return the children of a node in graph order."""
        return self._children[self._known(name)]

    def outside_of_plates(self, name: Node) -> list[Node]:
        """Return the children of a node that are not in all of its plates: they depend on several elements of it."""
        own = set(self.plates[name])
        return [child for child in self.children(name) if not own <= set(self.plates[child])]

    def to_networkx(self) -> nx.DiGraph:
        """Return a new digraph whose nodes carry ``role``, ``event_size`` and ``plates``."""
        dag = nx.DiGraph()
        for node in self.nodes:
            dag.add_node(
                node, role=self._roles[node], event_size=self.event_sizes[node], plates=self.plates[node]
            )
        dag.add_edges_from(self.edges)
        return dag

    def with_edges(self, edges: Iterable[tuple[Node, Node]]) -> "ModelGraph":
        """Return a graph over the same nodes, with their roles, sizes and plates, and these edges instead.

        Args:
            edges: All edges of the new graph.

        Raises:
            NotADAGError: If the edges form a cycle.
            GraphflowsError: If roles and edges do not go together; see the class.

        Example:
            >>> ModelGraph([("a", "x"), ("b", "x")], observed=["x"]).with_edges([("a", "b"), ("b", "x")]).edges
            (('a', 'b'), ('b', 'x'))
        """
        dag = nx.DiGraph()
        dag.add_nodes_from(self.nodes)
        dag.add_edges_from(edges)
        return self._with(dag)

    def with_observed(self, names: Iterable[Node]) -> "ModelGraph":
        """Return the graph in which some latent nodes are observed as well.

        Args:
            names: Latent nodes.

        Raises:
            GraphflowsError: If one of them is not latent.

        Example:
            >>> ModelGraph([("y", "x"), ("z", "x")], observed=["x"]).with_observed(["y"]).latent
            ('z',)
        """
        names = _as_names(names, "names")
        wrong = [name for name in names if self.role(name) != "latent"]
        if wrong:
            raise GraphflowsError(f"Expected latent nodes, among {listed(self.latent)}; got {listed(wrong)}.")
        return self._with(observed=names)

    def with_plates(self, plates: Mapping[Node, tuple[str, ...]]) -> "ModelGraph":
        """Return this graph with other plates around its nodes, outer to inner; none where nothing is said.

        Raises:
            GraphflowsError: If a node is unknown.

        Example:
            >>> ModelGraph(["zx"], observed=["x"]).with_plates({"x": ("data",)}).plates["x"]
            ('data',)
        """
        return self._with(plates=plates)

    def _with(
        self,
        dag: nx.DiGraph | None = None,
        *,
        observed: Iterable[Node] = (),
        plates: Mapping[Node, tuple[str, ...]] | None = None,
    ) -> "ModelGraph":
        """Return this graph with another digraph, further observed nodes, or other plates."""
        return ModelGraph(
            self.to_networkx() if dag is None else dag,
            [*self.observed, *observed],
            inputs=self.inputs,
            marginalised=self.marginalised,
            event_sizes=self.event_sizes,
            plates=self.plates if plates is None else plates,
        )

    def __contains__(self, name: object) -> bool:
        return name in self._roles

    def __len__(self) -> int:
        return len(self.nodes)

    def _key(self) -> tuple[Any, ...]:
        return (
            frozenset(self.edges),
            frozenset(self._roles.items()),
            frozenset(self.event_sizes.items()),
            frozenset(self.plates.items()),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelGraph) and self._key() == other._key()

    def __hash__(self) -> int:
        found = self._hash
        if found is None:
            found = hash(self._key())
            object.__setattr__(self, "_hash", found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Hashes of strings differ between processes.
        plain = {name: getattr(self, name) for name in ("nodes", "_parents", "_children", "_roles")}
        return {**plain, "event_sizes": dict(self.event_sizes), "plates": dict(self.plates)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = {
            "latent": "latent",
            "observed": "observed",
            "input": "inputs",
            "marginalised": "marginalised",
        }
        for role, name in names.items():
            nodes = tuple(node for node in state["nodes"] if state["_roles"][node] == role)
            object.__setattr__(self, name, nodes)
        for name, value in state.items():
            read_only = name in ("event_sizes", "plates")
            object.__setattr__(self, name, MappingProxyType(value) if read_only else value)
        object.__setattr__(self, "_hash", None)

    def __repr__(self) -> str:
        parts = [f"{len(self.latent)} latent", f"{len(self.observed)} observed"]
        parts += [f"{len(self.inputs)} inputs"] if self.inputs else []
        parts += [f"{len(self.marginalised)} marginalised"] if self.marginalised else []
        return f"ModelGraph({', '.join(parts)}, {len(self.edges)} edges)"


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

    def replaced(
        self,
        *,
        graph: ModelGraph | None = None,
        order: str | None = None,
        sampling_order: Iterable[Node] | None = None,
        coupled: Mapping[Node, Iterable[str]] | None = None,
    ) -> "InverseGraph":
        """Return the same parents, which enter in the same way, with something else beside them.

        Args:
            graph: Another model graph over the same nodes; by default that of this inverse, and so on.
            order: Another name of the rule that made it.
            sampling_order: Another order of the latent nodes, parents first.
            coupled: Other plates across which copies stay dependent.

        Raises:
            GraphflowsError: As the class.

        Example:
            >>> graph = ModelGraph([("a", "x"), ("b", "y")], observed=["x", "y"])
            >>> InverseGraph(graph, {"a": ["x"], "b": ["y"]}).replaced(sampling_order=["b", "a"]).sampling_order
            ('b', 'a')
        """
        return InverseGraph(
            self.graph if graph is None else graph,
            self.parents,
            order=self.order if order is None else order,
            sampling_order=self.sampling_order if sampling_order is None else sampling_order,
            coupled=self.coupled if coupled is None else coupled,
            how=self.how,
        )

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


@dataclass(frozen=True)
class Expansion:
    """A model graph with every plate replaced by a number of copies; nodes are integers.

    Nodes are numbered site by site in graph order, so parents have smaller numbers than their children.

    Attributes:
        graph: The model graph.
        site: For each node, the position of its site in ``graph.nodes``.
        index: For each node, its index in each of the plates of its site.
        copies: For each position in ``graph.nodes``, the nodes that are its copies.
        parents: For each node, its parents in increasing order.
        children: For each node, its children in increasing order.
    """

    graph: ModelGraph
    site: tuple[int, ...]
    index: tuple[tuple[int, ...], ...]
    copies: tuple[tuple[int, ...], ...]
    parents: tuple[tuple[int, ...], ...]
    children: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.site)

    def with_role(self, *roles: str) -> list[int]:
        """Return the nodes whose site has one of the roles, in increasing order."""
        of_role = {
            "latent": self.graph.latent,
            "observed": self.graph.observed,
            "input": self.graph.inputs,
            "marginalised": self.graph.marginalised,
        }
        chosen = {name for role in roles for name in of_role[role]}
        wanted = [name in chosen for name in self.graph.nodes]
        return [node for node, position in enumerate(self.site) if wanted[position]]

    def differing_plates(self, node: int, others: Iterable[int]) -> tuple[str, ...]:
        """Return the plates, outer to inner, in which another copy of the same site has another index."""
        plates = self.graph.plates[self.graph.nodes[self.site[node]]]
        found = {
            plate
            for other in others
            for plate, i, j in zip(plates, self.index[node], self.index[other], strict=True)
            if i != j
        }
        return tuple(plate for plate in plates if plate in found)


def expand(graph: ModelGraph, copies: int = 2) -> Expansion:
    """Return the graph with each plate replaced by ``copies`` copies.

    Args:
        graph: A model graph. Without plates the expansion has one node for each of its nodes.
        copies: The number of copies along each plate.

    Returns:
        The expansion, with ``copies ** k`` nodes for a site in ``k`` plates.

    Example:
        >>> graph = ModelGraph([("mu", "z")], observed=[], plates={"z": ["data"]})
        >>> expand(graph).copies, expand(graph).parents
        (((0,), (1, 2)), ((), (0,), (0,)))
    """
    names = graph.nodes
    plates = graph.plates
    position = {name: i for i, name in enumerate(names)}
    site: list[int] = []
    index: list[tuple[int, ...]] = []
    of_site: list[tuple[int, ...]] = []
    node_at: list[dict[tuple[int, ...], int]] = []
    for i, name in enumerate(names):
        indices = list(product(range(copies), repeat=len(plates[name])))
        of_site.append(tuple(range(len(site), len(site) + len(indices))))
        node_at.append(dict(zip(indices, of_site[-1], strict=True)))
        site += [i] * len(indices)
        index += indices

    parents: list[tuple[int, ...]] = []
    children: list[list[int]] = [[] for _ in site]
    above_site: list[list[int]] = [[] for _ in names]
    for parent, child in graph.edges:
        above_site[position[child]].append(position[parent])
    for i, (name, above) in enumerate(zip(names, above_site, strict=True)):
        for node in of_site[i]:
            at = dict(zip(plates[name], index[node], strict=True))
            found: list[int] = []
            for j in above:
                if not plates[names[j]]:
                    found.append(of_site[j][0])
                    continue
                choices = [(at[plate],) if plate in at else range(copies) for plate in plates[names[j]]]
                found += [node_at[j][choice] for choice in product(*choices)]
            parents.append(tuple(found))
            for parent in found:
                children[parent].append(node)
    return Expansion(
        graph, tuple(site), tuple(index), tuple(of_site), tuple(parents), tuple(map(tuple, children))
    )


def ancestors(expansion: Expansion, nodes: Iterable[int]) -> set[int]:
    """Return the given nodes and all their ancestors.

    Args:
        expansion: The expanded model graph.
        nodes: Some of its nodes.

    Returns:
        A set of nodes; its complement is *barren* if the nodes given are all those that are known or wanted.
    """
    found = set(nodes)
    stack = list(found)
    while stack:
        for parent in expansion.parents[stack.pop()]:
            if parent not in found:
                found.add(parent)
                stack.append(parent)
    return found
