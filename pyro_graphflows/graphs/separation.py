"""Is an inverse faithful? Judged by d-separation in the model graph, independently of how it was made.

An inverse asserts, for each latent node ``v``, that ``v`` is independent of all nodes sampled before it and
all observed nodes and inputs, given its parents. It is an *I-map* of the posterior (faithful) if each of
these holds in the model graph ``G``, that is, if the parents d-separate ``v`` from the others in ``G``;
marginalised nodes are simply not observed. It is *minimal* if it loses that when any parent goes. The
observed nodes look independent in the inverse; that is no statement about them, since the guide is always
given all of them.

As an example, in ``a -> x <- b`` with ``x`` observed, ``a`` is d-separated from ``b`` by nothing, but not by
``x``. So the inverse ``{a: [x], b: [x]}`` is no I-map, ``{a: [b, x], b: [x]}`` is a minimal one.

In plates the statement is about copies, and is judged on two copies of each plate. One copy of ``v`` is
given the copies of its parents with the same index in the plates they share (all of them in the other plates
of the parent), and must be separated from the rest, other copies of ``v`` included. If the inverse declares
``v`` coupled across a plate, then its copies along that plate are one block, and so are those of its
parents.
"""

from collections.abc import Iterable
from typing import NamedTuple

import networkx as nx

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import (
    Expansion,
    InverseGraph,
    ModelGraph,
    Node,
    ancestors,
    expand,
    listed,
)

__all__ = ["Independence", "is_imap", "is_minimal_imap", "violated_independencies"]


class Independence(NamedTuple):
    """The statement that ``node`` is independent of ``other`` given ``given``.

    In a plate ``other`` may be one of ``given``, or ``node`` itself: then its other copies are meant.
    """

    node: Node
    other: Node
    given: tuple[Node, ...]


class _Judge:
    """The expanded model graph, and what an inverse says about it."""

    def __init__(self, inverse: InverseGraph, graph: ModelGraph | None) -> None:
        self.inverse = inverse
        self.graph = inverse.graph if graph is None else graph
        if set(self.graph.latent) != set(inverse.parents):
            raise GraphflowsError(
                f"Expected an inverse of the latent nodes {listed(self.graph.latent)}; "
                f"got one of {listed(inverse.parents)}."
            )
        allowed = {*self.graph.latent, *self.graph.observed, *self.graph.inputs}
        unknown = {parent for parents in inverse.parents.values() for parent in parents} - allowed
        if unknown:
            raise GraphflowsError(
                f"Expected parents that are latent, observed or input nodes; got {listed(unknown)}."
            )
        self.expansion: Expansion = expand(self.graph)
        self.dag = nx.DiGraph()
        self.dag.add_nodes_from(range(len(self.expansion)))
        self.dag.add_edges_from(
            (parent, node) for node, parents in enumerate(self.expansion.parents) for parent in parents
        )
        self.position = {name: i for i, name in enumerate(self.graph.nodes)}
        self.before: dict[Node, set[int]] = {}
        known = set(self.expansion.with_role("observed", "input"))
        for node in inverse.sampling_order:
            self.before[node] = set(known)
            known |= self.copies(node)

    def copies(self, name: Node) -> set[int]:
        return set(self.expansion.copies[self.position[name]])

    def along(self, name: Node, node: Node, plates: Iterable[str]) -> set[int]:
        """Return the copies of ``name`` that agree with the first copy of ``node`` in some plates."""
        own = self.graph.plates[name]
        shared = set(own) & set(self.graph.plates[node]) & set(plates)
        index = self.expansion.index
        return {
            copy
            for copy in self.copies(name)
            if all(i == 0 for plate, i in zip(own, index[copy], strict=True) if plate in shared)
        }

    def statement(self, node: Node, coupled: Iterable[str]) -> tuple[set[int], set[int], set[int]]:
        """Return the block of copies of a node, its parents' copies, and what it must be separated from."""
        kept = [plate for plate in self.graph.plates[node] if plate not in set(coupled)]
        block = self.along(node, node, kept)
        given: set[int] = set()
        for parent in self.inverse.parents[node]:
            given |= self.along(parent, node, kept)
        rest = (self.before[node] | self.copies(node)) - given - block
        return block, given, rest

    def separated(self, block: set[int], others: set[int], given: set[int]) -> bool:
        return not others or nx.is_d_separator(self.dag, block, others, given)

    def connected(self, block: set[int], given: set[int]) -> set[int]:
        """Return all nodes outside ``given`` that are not d-separated from the block, in one pass."""
        open_colliders = ancestors(self.expansion, given)
        found: set[int] = set()
        seen: set[tuple[int, bool]] = set()
        stack = [(node, True) for node in block]
        while stack:
            state = stack.pop()
            if state in seen:
                continue
            seen.add(state)
            node, from_child = state
            if node not in given:
                found.add(node)
                stack += [(child, False) for child in self.expansion.children[node]]
            if (node not in given) if from_child else (node in open_colliders):
                stack += [(parent, True) for parent in self.expansion.parents[node]]
        return found

    def holds(self, node: Node, coupled: Iterable[str]) -> bool:
        block, given, rest = self.statement(node, coupled)
        return self.separated(block, rest, given)


def violated_independencies(
    inverse: InverseGraph, graph: ModelGraph | None = None
) -> tuple[Independence, ...]:
    """Return the independencies that an inverse asserts and the posterior of the model lacks.

    Args:
        inverse: An inverse graph.
        graph: A model graph with the same latent nodes; by default the one that was inverted.

    Returns:
        The violated statements, in sampling order and then graph order. None if and only if the inverse
        is faithful.

    Raises:
        GraphflowsError: If the inverse is not one of the graph's latent nodes, or has an unknown parent.

    Example:
        >>> graph = ModelGraph([("a", "x"), ("b", "x")], observed=["x"])
        >>> violated_independencies(InverseGraph(graph, {"a": ["x"], "b": ["x"]}))
        (Independence(node='b', other='a', given=('x',)),)
    """
    judge = _Judge(inverse, graph)
    found = []
    for node in inverse.sampling_order:
        block, given, rest = judge.statement(node, inverse.coupled.get(node, ()))
        if judge.separated(block, rest, given):
            continue
        offenders = judge.connected(block, given) & rest
        for other in judge.graph.nodes:
            if offenders & judge.copies(other):
                found.append(Independence(node, other, inverse.parents[node]))
    return tuple(found)


def is_imap(inverse: InverseGraph, graph: ModelGraph | None = None) -> bool:
    """Return whether an inverse is faithful: every independence it asserts holds in the model's posterior.

    Args:
        inverse: An inverse graph.
        graph: A model graph with the same latent nodes; by default the one that was inverted.

    Returns:
        A truth value.

    Raises:
        GraphflowsError: If the inverse is not one of the graph's latent nodes, or has an unknown parent.

    Example:
        >>> graph = ModelGraph([("a", "x"), ("b", "x")], observed=["x"])
        >>> is_imap(InverseGraph(graph, {"a": ["x"], "b": ["x"]}))
        False
        >>> is_imap(InverseGraph(graph, {"a": ["b", "x"], "b": ["x"]}))
        True
    """
    judge = _Judge(inverse, graph)
    return all(judge.holds(node, inverse.coupled.get(node, ())) for node in inverse.sampling_order)


def is_minimal_imap(inverse: InverseGraph, graph: ModelGraph | None = None) -> bool:
    """Return whether an inverse is faithful and ceases to be when any parent (or declared coupling) goes.

    Args:
        inverse: An inverse graph.
        graph: A model graph with the same latent nodes; by default the one that was inverted.

    Returns:
        A truth value.

    Raises:
        GraphflowsError: If the inverse is not one of the graph's latent nodes, or has an unknown parent.

    Example:
        >>> graph = ModelGraph([("a", "x"), ("b", "y")], observed=["x", "y"])
        >>> is_minimal_imap(InverseGraph(graph, {"a": ["x", "y"], "b": ["y"]}))
        False
    """
    judge = _Judge(inverse, graph)
    for node in inverse.sampling_order:
        coupled = inverse.coupled.get(node, ())
        if not judge.holds(node, coupled):
            return False
        if any(judge.holds(node, [p for p in coupled if p != plate]) for plate in coupled):
            return False
        block, given, _ = judge.statement(node, coupled)
        for parent in inverse.parents[node]:
            # With everything else separated by the parents, this is the same as dropping this one.
            dropped = given & judge.copies(parent)
            if judge.separated(block, dropped, given - dropped):
                return False
    return True
