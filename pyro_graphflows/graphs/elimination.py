r"""Variable elimination on a moral graph, with incremental fill counts.

*Moralising* a DAG joins the parents of each node and drops the directions. *Eliminating* a node joins its
neighbours and removes it; the edges this adds are its *fill*. The neighbours of a node at the moment it is
eliminated are what its conditional distribution, given everything not yet eliminated, depends on: they
*separate* it from the rest. Observed nodes are never eliminated.

As an example, ``a -> x <- b`` with ``x`` observed has the moral graph ``a - x - b - a``. Eliminating ``a``
finds the neighbours ``b, x`` and no fill; eliminating ``b`` then finds ``x``. So ``p(a, b | x) = p(b | x)
p(a | b, x)``.

Adjacency is held in bit sets (Python integers, bit ``i`` for node ``i``). A large clique of observed nodes,
which every elimination near the root of a tree makes, then costs one bit a pair, and a fill count costs one
``and`` with a population count for each neighbour. The greedy rules need the fill count of many nodes at
each step. Counts are kept up to date: eliminating ``v`` with neighbours ``N`` changes them only for nodes in
``N`` and for nodes adjacent to both ends of a fill edge, by amounts worked out in :meth:`Eliminator.remove`.

References:
    [1] S. Webb et al. (2018), Faithful inversion of generative models for effective amortized inference,
        Algorithm 1 (NaMI). There the fill counts are recomputed at each step.
    [2] D. Koller and N. Friedman (2009), Probabilistic graphical models, chapter 9 (elimination orders).
"""

from collections import Counter
from collections.abc import Iterable
from heapq import heappop, heappush

import numpy as np

from pyro_graphflows.graphs.plates import Expansion

__all__ = ["Eliminator", "ancestors", "bit_set", "indices", "moral_graph", "reachable"]


def bit_set(nodes: Iterable[int]) -> int:
    """Return the bit set of some non-negative integers.

    Example:
        >>> bit_set([0, 3])
        9
    """
    mask = 0
    for node in nodes:
        mask |= 1 << node
    return mask


def indices(mask: int) -> list[int]:
    """Return the members of a bit set in increasing order.

    Example:
        >>> indices(9)
        [0, 3]
    """
    if mask.bit_count() > 6:
        data = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8, "little"), dtype=np.uint8)
        return np.flatnonzero(np.unpackbits(data, bitorder="little")).tolist()
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


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


def moral_graph(expansion: Expansion, within: set[int], hidden: set[int]) -> list[int]:
    """Return the moral graph of an ancestral set, with the hidden nodes eliminated.

    Eliminating a set of nodes gives the same graph in every order: the neighbours of each of its connected
    parts become a clique.

    Args:
        expansion: The expanded model graph.
        within: A set of nodes that contains the parents of its members.
        hidden: Nodes to eliminate.

    Returns:
        For each node of the expansion, the bit set of its neighbours (none for nodes outside ``within`` and
        hidden ones).
    """
    adjacent = [0] * len(expansion)
    for node in within:
        family = bit_set(expansion.parents[node]) | 1 << node
        for member in (*expansion.parents[node], node):
            adjacent[member] |= family
    for node in within:
        adjacent[node] &= ~(1 << node)

    todo = bit_set(hidden & within)
    visible = ~todo
    while todo:
        part = front = todo & -todo
        around = 0
        while front:
            for node in indices(front):
                around |= adjacent[node]
            front = around & ~visible & ~part
            part |= front
        todo &= ~part
        boundary = around & visible
        for node in indices(boundary):
            adjacent[node] = (adjacent[node] | boundary) & visible & ~(1 << node)
        for node in indices(part):
            adjacent[node] = 0
    return adjacent


def reachable(expansion: Expansion, start: Iterable[int], known: set[int]) -> set[int]:
    """Return the Markov boundary of some nodes among the known ones, by d-separation.

    These are the known nodes reachable from ``start`` through unknown ones in the moral graph of
    the ancestors of ``start`` and ``known``: the smallest set given which ``start`` is d-separated from all
    other known nodes. Costs one pass over the graph.

    Args:
        expansion: The expanded model graph.
        start: Some nodes.
        known: The nodes that may be conditioned on.

    Returns:
        The members of the boundary.
    """
    stack = list(start)
    seen = set(stack)
    found: set[int] = set()
    alive = ancestors(expansion, known | seen)
    moralised: set[int] = set()
    while stack:
        node = stack.pop()
        for child in (node, *expansion.children[node]):
            if child not in alive or child in moralised:
                continue
            moralised.add(child)
            for other in (child, *expansion.parents[child]):
                if other in seen:
                    continue
                seen.add(other)
                if other in known:
                    found.add(other)
                else:
                    stack.append(other)
    return found


class Eliminator:
    """A graph from which nodes are eliminated one by one, and the fill counts of the tracked nodes.

    Args:
        adjacent: For each node the bit set of its neighbours. Copied.
        observed: The bit set of the observed nodes, which are never eliminated.
        count_observed: Whether fill edges between two observed nodes count. If not, they are not stored.
    """

    def __init__(self, adjacent: list[int], observed: int, *, count_observed: bool) -> None:
        self.adjacent = list(adjacent)
        self._observed = observed
        self._free = not count_observed  # pairs of observed nodes are free of charge
        if self._free:
            for node in indices(observed):
                self.adjacent[node] &= ~observed
        self._tracked = 0
        self._count: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def missing(self, node: int, among: int) -> int:
        """Return the bit set of the nodes other than ``node`` that it is not joined to but could be."""
        if self._free and self._observed >> node & 1:
            among &= ~self._observed
        return among & ~self.adjacent[node] & ~(1 << node)

    def fill(self, node: int) -> int:
        """Return the number of fill edges that eliminating ``node`` would add."""
        around = self.adjacent[node]
        return sum(self.missing(other, around).bit_count() for other in indices(around)) // 2

    def track(self, node: int) -> None:
        """Make a node a candidate of :meth:`best`."""
        self._tracked |= 1 << node
        self._change(node, self.fill(node))

    def untrack(self, node: int) -> None:
        """Make a node no candidate any more."""
        self._tracked &= ~(1 << node)
        self._count.pop(node, None)

    def _change(self, node: int, count: int) -> None:
        self._count[node] = count
        heappush(self._heap, (count, node))

    def best(self) -> int:
        """Return the tracked node with the smallest fill count; ties go to the smallest node."""
        while True:
            count, node = self._heap[0]
            if self._count.get(node) == count:
                return node
            heappop(self._heap)

    def remove(self, node: int) -> None:
        r"""Eliminate a node: join its neighbours, remove it, and bring the fill counts up to date.

        Let ``N`` be its neighbours and ``F`` the fill edges. A tracked ``t`` in ``N`` loses the missing pairs
        of ``node`` with its neighbours outside ``N``; gains those of its new neighbours ``A`` with the
        same; and loses the edges of ``F`` among its old neighbours, which are all but those that touch
        ``A``. A tracked ``w`` outside ``N`` loses one for each edge of ``F`` between two neighbours of it.
        """
        adjacent = self.adjacent
        around = adjacent[node]
        members = indices(around)
        self.untrack(node)
        once = outside = 0
        for member in members:
            adjacent[member] ^= 1 << node
            if near := adjacent[member] & self._tracked & ~around:
                outside |= once & near
                once |= near
        adjacent[node] = 0
        fill = {member: self.missing(member, around) for member in members}
        if inside := around & self._tracked:
            degree = {member: mask.bit_count() for member, mask in fill.items()}
            total = sum(degree.values()) // 2
            for tracked in indices(inside):
                old = adjacent[tracked] & ~around
                change, touching, twice = -old.bit_count(), 0, 0
                for new in indices(fill[tracked]):
                    change += self.missing(new, old).bit_count()
                    touching += degree[new]
                    twice += (fill[new] & fill[tracked]).bit_count()
                self._change(tracked, self._count[tracked] + change - total + touching - twice // 2)
        if outside:
            lost: Counter[int] = Counter()
            for member in members:
                near = outside & adjacent[member]
                ends = fill[member] >> member << member  # each fill edge from its smaller end
                if not (near and ends):
                    continue
                if ends.bit_count() <= near.bit_count():
                    for end in indices(ends):
                        lost.update(indices(near & adjacent[end]))
                else:
                    lost.update(
                        {tracked: (ends & adjacent[tracked]).bit_count() for tracked in indices(near)}
                    )
            for tracked, change in lost.items():
                if change:
                    self._change(tracked, self._count[tracked] - change)
        for member, ends in fill.items():
            adjacent[member] |= ends
