r"""From graphs to the variables, parents and levels of a flow.

A flow over :math:`z \in \mathbb{R}^D` with context :math:`x \in \mathbb{R}^C` needs to know for each scalar variable
which others it depends on. A node of event size n gives n variables, of which each depends on those before it in
the same node and on all variables of the node's parents. *Levels* put the variables in the order of sampling: a
variable's level is the length of the longest chain of parents above it, so that all of one level can be
computed together once the levels before are known.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TypeAlias

import networkx as nx

from pyro_graphflows.errors import GraphflowsError, NotADAGError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph, Node, topological_order

__all__ = ["FlowStructure", "GraphLike", "flow_structure", "slices_of", "some_names", "without_context"]

GraphLike: TypeAlias = nx.DiGraph | ModelGraph | InverseGraph


@dataclass(frozen=True)
class FlowStructure:
    """Who depends on whom among the scalar variables of a flow, by position.

    Args:
        parents: For each variable the positions of the variables it depends on, in any order.
        context_parents: For each variable the positions of the context columns it depends on; none by default.
        context_dim: The number of context columns.
        names: A name for each variable, for messages; the positions by default.
        context_names: A name for each context column.
        nodes: The number of scalars of each graph node among the variables, in order of position.
        context_nodes: The same for the context columns.
        stages: Levels to use instead of the fewest possible: each variable once, after its parents.

    Raises:
        NotADAGError: If the parents form a cycle. The message lists one.
        GraphflowsError: If a position is out of range, the lengths do not agree, or ``stages`` does not have each
            variable once and after its parents.

    Example:
        >>> structure = FlowStructure(parents=[(), (0,), (0, 1)], context_parents=[(0,), (), ()], context_dim=1)
        >>> structure.event_dim, structure.levels, structure.ancestors(2), structure.max_hops
        (3, ((0,), (1,), (2,)), (0, 1), 2)
    """

    parents: tuple[tuple[int, ...], ...]
    context_parents: tuple[tuple[int, ...], ...] = ()
    context_dim: int = 0
    names: tuple[str, ...] = ()
    context_names: tuple[str, ...] = ()
    nodes: Mapping[Node, int] = field(default_factory=dict, compare=False, repr=False)
    context_nodes: Mapping[Node, int] = field(default_factory=dict, compare=False, repr=False)
    stages: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        parents = tuple(tuple(sorted(set(p))) for p in self.parents)
        context_parents = tuple(tuple(sorted(set(p))) for p in self.context_parents) or ((),) * len(parents)
        names = tuple(map(str, self.names)) or tuple(map(str, range(len(parents))))
        context_names = tuple(map(str, self.context_names)) or tuple(
            f"context[{i}]" for i in range(self.context_dim)
        )
        if not parents:
            raise GraphflowsError("Expected at least one variable; got none.")
        if not len(parents) == len(context_parents) == len(names):
            raise GraphflowsError(
                f"Expected parents, context parents and names for the same variables; "
                f"got {len(parents)}, {len(context_parents)} and {len(names)}."
            )
        if len(context_names) != self.context_dim:
            raise GraphflowsError(
                f"Expected a name for each of {self.context_dim} context columns; got {len(context_names)}."
            )
        for v, (own, given) in enumerate(zip(parents, context_parents, strict=True)):
            bad = [p for p in own if not 0 <= p < len(parents)]
            bad += [p for p in given if not 0 <= p < self.context_dim]
            if bad:
                raise GraphflowsError(
                    f"Expected parents of {names[v]} among {len(parents)} variables and "
                    f"{self.context_dim} context columns; got position {bad[0]}."
                )
        for key, value in (
            ("parents", parents),
            ("context_parents", context_parents),
            ("names", names),
            ("context_names", context_names),
            ("nodes", dict(self.nodes) or dict.fromkeys(names, 1)),
            ("context_nodes", dict(self.context_nodes) or dict.fromkeys(context_names, 1)),
        ):
            object.__setattr__(self, key, value)
        _ = self.topological_order  # raises for a cycle
        if self.stages:
            object.__setattr__(self, "stages", tuple(map(tuple, self.stages)))
            place = {v: i for i, stage in enumerate(self.stages) for v in stage}
            once = sorted(v for stage in self.stages for v in stage) == list(range(len(parents)))
            if not once or any(place[p] >= place[v] for v, own in enumerate(parents) for p in own):
                raise GraphflowsError("Expected stages with each variable once, after all of its parents.")

    @property
    def event_dim(self) -> int:
        """The number of variables."""
        return len(self.parents)

    @property
    def num_edges(self) -> int:
        """The number of parents, context columns included, summed over the variables."""
        return sum(map(len, self.parents)) + sum(map(len, self.context_parents))

    @cached_property
    def topological_order(self) -> tuple[int, ...]:
        """The positions, parents before children."""
        dag = nx.DiGraph()
        dag.add_nodes_from(range(self.event_dim))
        dag.add_edges_from((p, v) for v, parents in enumerate(self.parents) for p in parents)
        try:
            return tuple(v for layer in nx.topological_generations(dag) for v in sorted(layer))
        except nx.NetworkXUnfeasible:
            cycle = [edge[0] for edge in nx.find_cycle(dag)]
            path = " -> ".join(self.names[v] for v in [*cycle, cycle[0]])
            raise NotADAGError(f"Expected a directed acyclic graph; got the cycle {path}.") from None

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The positions by the length of the longest chain of parents above them, or as ``stages`` says."""
        if self.stages:
            return self.stages
        depth = [0] * self.event_dim
        for v in self.topological_order:
            depth[v] = 1 + max((depth[p] for p in self.parents[v]), default=-1)
        levels: list[list[int]] = [[] for _ in range(1 + max(depth))]
        for v, d in enumerate(depth):
            levels[d].append(v)
        return tuple(map(tuple, levels))

    @cached_property
    def _reach(self) -> tuple[int, ...]:
        """All ancestors of each variable as bit sets: bit p for variable p, bit D + c for context column c."""
        reach = [0] * self.event_dim
        for v in self.topological_order:
            bits = self._direct[v]
            for p in self.parents[v]:
                bits |= reach[p]
            reach[v] = bits
        return tuple(reach)

    @cached_property
    def _direct(self) -> tuple[int, ...]:
        size = self.event_dim
        return tuple(
            sum(1 << p for p in own) | sum(1 << (size + c) for c in given)
            for own, given in zip(self.parents, self.context_parents, strict=True)
        )

    def ancestors(self, v: int) -> tuple[int, ...]:
        """Return the positions of all ancestors of variable ``v`` among the variables."""
        return tuple(p for p in range(self.event_dim) if self._reach[v] >> p & 1)

    @cached_property
    def max_hops(self) -> int:
        """The largest shortest-path distance from an ancestor, context columns included, to a variable.

        In a flow that passes information along one edge in each block, this is the number of blocks that every
        variable needs to hear from every ancestor.
        """
        children: list[list[int]] = [[] for _ in range(self.event_dim)]
        for v, own in enumerate(self.parents):
            for p in own:
                children[p].append(v)
        seen = list(self._direct)  # within one hop
        hops = 1 if any(seen) else 0
        unsettled = [v for v in range(self.event_dim) if seen[v] != self._reach[v]]
        while unsettled:
            hops += 1
            grown = {}
            for v in unsettled:
                bits = seen[v]
                for p in self.parents[v]:
                    bits |= seen[p]
                grown[v] = bits
            for v, bits in grown.items():
                seen[v] = bits
            unsettled = [v for v in unsettled if seen[v] != self._reach[v]]
        return hops

    @property
    def slices(self) -> Mapping[Node, slice]:
        """Where each node's scalars are among the variables."""
        return slices_of(self.nodes)

    @property
    def context_slices(self) -> Mapping[Node, slice]:
        """Where each context node's scalars are among the context columns."""
        return slices_of(self.context_nodes)


def slices_of(sizes: Mapping[Node, int]) -> Mapping[Node, slice]:
    """Return where each node is in a row of numbers, from the number that each has."""
    slices, start = {}, 0
    for node, size in sizes.items():
        slices[node] = slice(start, start + size)
        start += size
    return MappingProxyType(slices)


def flow_structure(
    graph: GraphLike | FlowStructure,
    context: int | Iterable[Node] | None = None,
    *,
    variables: Iterable[Node] | None = None,
) -> FlowStructure:
    """Return the structure of a flow over the nodes of a graph, in the graph's node order.

    - In a digraph all nodes are variables, except those named in ``context``.
    - In a :class:`ModelGraph` the latent and observed nodes are variables and the inputs are context.
    - In an :class:`InverseGraph` the latent nodes are variables, and the observed nodes and inputs that are a
      parent of one are context, in graph order.

    Args:
        graph: The graph; a :class:`FlowStructure` is returned as it is.
        context: The nodes whose values are given, or the number of context columns that every variable
            depends on.
        variables: The nodes that are variables, for a flow over a part of the graph. Their parents outside
            are context.

    Returns:
        The structure.

    Raises:
        NotADAGError: If the graph has a cycle. The message lists one.
        GraphflowsError: If a name is unknown, a context node depends on a variable, a marginalised node is among
            the variables or their parents, or an input of the inverse is pooled over a plate.

    Example:
        >>> structure = flow_structure(nx.DiGraph([("a", "b"), ("x", "b")]), context=["x"])
        >>> structure.names, structure.parents, structure.context_names, structure.context_parents
        (('a', 'b'), ((), (0,)), ('x',), ((), (0,)))
    """
    if isinstance(graph, FlowStructure):
        if context is not None or variables is not None:
            raise GraphflowsError(
                "Expected no context and no variables beside a FlowStructure, which has them."
            )
        return graph
    nodes, parents, sizes, default, given = _read(graph)
    known = set(nodes)
    shared = 0
    if isinstance(context, int):
        shared = context
    elif context is not None:
        if isinstance(context, str):
            raise GraphflowsError(
                f"Expected a collection of context nodes; got {context!r}. Use [{context!r}]."
            )
        given = [*given, *context]
    chosen = set(default if variables is None else variables) - set(given)
    unknown = sorted(map(str, (chosen | set(given)) - known))
    if unknown:
        raise GraphflowsError(f"Expected names of nodes of the graph; got unknown {', '.join(unknown)}.")
    event = [node for node in nodes if node in chosen]
    outside = {p for node in event for p in parents[node]} - chosen
    if variables is None and not isinstance(graph, InverseGraph):
        outside |= set(given)
    columns = [node for node in nodes if node in outside]
    _check_context(graph, columns, parents, chosen)
    position = _node_ranges(event, sizes)
    column = _node_ranges(columns, sizes)
    rows, context_rows, names = [], [], []
    for node in event:
        own = [i for p in parents[node] if p in chosen for i in position[p]]
        from_context = [i for p in parents[node] if p not in chosen for i in column[p]]
        from_context += range(sum(sizes[n] for n in columns), sum(sizes[n] for n in columns) + shared)
        for k, i in enumerate(position[node]):
            rows.append((*own, *position[node][:k]))
            context_rows.append(tuple(from_context))
            names.append(str(node) if sizes[node] == 1 else f"{node}[{i - position[node][0]}]")
    context_names = [
        str(node) if sizes[node] == 1 else f"{node}[{k}]" for node in columns for k in range(sizes[node])
    ]
    extra = [f"context[{i}]" for i in range(shared)]
    return FlowStructure(
        parents=tuple(rows),
        context_parents=tuple(context_rows),
        context_dim=len(context_names) + shared,
        names=tuple(names),
        context_names=(*context_names, *extra),
        nodes={node: sizes[node] for node in event},
        context_nodes={**{node: sizes[node] for node in columns}, **dict.fromkeys(extra, 1)},
    )


def without_context(graph: GraphLike | FlowStructure, conditional: str) -> FlowStructure:
    """Return the structure of a flow over a graph without context nodes.

    Args:
        graph: The graph.
        conditional: The name of the helper for graphs with context, for the message.

    Raises:
        GraphflowsError: If there are context nodes.
    """
    structure = flow_structure(graph)
    if structure.context_dim:
        raise GraphflowsError(
            f"Expected a graph without context; got {some_names(structure.context_names)}. Use {conditional}."
        )
    return structure


def some_names(names: tuple[str, ...]) -> str:
    """Return up to twenty names in one line."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _node_ranges(nodes: Sequence[Node], sizes: Mapping[Node, int]) -> dict[Node, range]:
    return {node: range(s.start, s.stop) for node, s in slices_of({n: sizes[n] for n in nodes}).items()}


def _read(
    graph: GraphLike,
) -> tuple[Sequence[Node], Mapping[Node, Sequence[Node]], Mapping[Node, int], Sequence[Node], list[Node]]:
    """Return nodes in order, parents, sizes, the default variables and the default context."""
    if isinstance(graph, InverseGraph):
        pooled = sorted({f"{p} into {v}" for (p, v), how in graph.how.items() if how == "pooled"})
        if pooled:
            raise GraphflowsError(
                f"Expected an inverse without pooled inputs; got {', '.join(pooled)}. "
                "Pool them first, and give a FlowStructure whose context has the pooled columns."
            )
        model = graph.graph
        nodes = [node for node in model.nodes if model.role(node) != "marginalised"]
        parents = {node: graph.parents.get(node, ()) for node in nodes}
        return nodes, parents, model.event_sizes, model.latent, []
    if isinstance(graph, ModelGraph):
        default = [node for node in graph.nodes if graph.role(node) in ("latent", "observed")]
        parents = {node: graph.parents(node) for node in graph.nodes}
        return graph.nodes, parents, graph.event_sizes, default, list(graph.inputs)
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise GraphflowsError(
            f"Expected a networkx.DiGraph, ModelGraph, InverseGraph or FlowStructure; got a {type(graph).__name__}."
        )
    topological_order(graph)  # raises for a cycle
    nodes = list(graph)
    return nodes, {n: list(graph.predecessors(n)) for n in nodes}, dict.fromkeys(nodes, 1), nodes, []


def _check_context(
    graph: GraphLike, columns: Sequence[Node], parents: Mapping[Node, Sequence[Node]], chosen: set[Node]
) -> None:
    if isinstance(graph, InverseGraph):
        graph = graph.graph
    if isinstance(graph, ModelGraph):
        bad = sorted(str(n) for n in {*columns, *chosen} if graph.role(n) == "marginalised")
        if bad:
            raise GraphflowsError(
                f"Expected a graph without marginalised nodes among the variables and their parents; "
                f"got {', '.join(bad)}. Invert the model graph first: the inverse has none."
            )
    late = sorted(f"{p} -> {node}" for node in columns for p in parents[node] if p in chosen)
    if late:
        raise GraphflowsError(
            f"Expected context nodes that do not depend on variables of the flow; got {', '.join(late)}."
        )
