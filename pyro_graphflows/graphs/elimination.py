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
``N`` and for nodes adjacent to both ends of a fill edge.

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
    if mask.bit_count() > 8:
        data = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8, "little"), dtype=np.uint8)
        used = data.nonzero()[0]  # most bytes of a large graph's sets are zero
        byte, bit = np.unpackbits(data[used, None], axis=1, bitorder="little").nonzero()
        return (8 * used[byte] + bit).tolist()
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
        adjacent: For each node the bit set of its neighbours.
        observed: The bit set of the observed nodes, which are never eliminated.
        count_observed: Whether fill edges between two observed nodes count. If not, they are not stored.
    """

    def __init__(self, adjacent: list[int], observed: int, *, count_observed: bool) -> None:
        self._alive = (1 << len(adjacent)) - 1
        # Nodes for which pairs with an observed node are free of charge.
        self._free = frozenset() if count_observed else frozenset(indices(observed))
        self._latent = ~observed & self._alive
        # With the node itself, so that joining a clique is one "or". Eliminated nodes are left in.
        self._closed = [mask | 1 << node for node, mask in enumerate(adjacent)]
        for node in self._free:
            self._closed[node] &= self._latent
        self._tracked = 0
        self._count: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def neighbours(self, node: int) -> int:
        """Return the bit set of the neighbours of a node that may be eliminated."""
        return self._closed[node] & self._alive & ~(1 << node)

    def fill(self, node: int) -> int:
        """Return the number of fill edges that eliminating ``node`` would add."""
        around = self.neighbours(node)
        latent = around & self._latent
        twice, size, num_latent = 0, around.bit_count(), latent.bit_count()
        for other in indices(around):
            if other in self._free:
                twice += num_latent - (latent & self._closed[other]).bit_count()
            else:
                twice += size - (around & self._closed[other]).bit_count()
        return twice // 2

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
        """Eliminate a node: join its neighbours, remove it, and bring the fill counts up to date."""
        around = self.neighbours(node)
        latent = around & self._latent
        closed, free = self._closed, self._free
        self.untrack(node)
        self._alive ^= 1 << node
        members = indices(around)
        distant = self._tracked & ~around
        once = outside = 0  # tracked nodes with one, with two neighbours among the members
        if distant:
            for member in members:
                if near := closed[member] & distant:
                    outside |= once & near
                    once |= near
        inside = around & self._tracked
        if inside or outside:
            fill = {m: (latent if m in free else around) & ~closed[m] for m in members}
            if inside:
                self._update_inside(inside, around, fill)
            if outside:
                self._update_outside(outside, fill)
        for member in members:
            closed[member] |= latent if member in free else around

    def _update_inside(self, inside: int, around: int, fill: dict[int, int]) -> None:
        """Update the tracked ones among the neighbours ``around`` of the node that is being eliminated.

        A tracked node ``t`` loses the missing pairs of the node with the neighbours of ``t`` outside
        ``around``; gains those of its new neighbours ``A`` with the same; and loses the fill among its old
        neighbours, which is all fill that does not touch ``A``.
        """
        degree = {member: mask.bit_count() for member, mask in fill.items()}
        total = sum(degree.values()) // 2
        outside = self._alive & ~around
        for tracked in indices(inside):
            old = self._closed[tracked] & outside
            size, latent = old.bit_count(), old & self._latent
            change, new = -size - total, fill[tracked]
            if new:
                twice, num_latent = 0, latent.bit_count()
                for other in indices(new):
                    if other in self._free:
                        change += num_latent - (latent & self._closed[other]).bit_count()
                    else:
                        change += size - (old & self._closed[other]).bit_count()
                    change += degree[other]
                    twice += (fill[other] & new).bit_count()
                change -= twice // 2
            if change:
                self._change(tracked, self._count[tracked] + change)

    def _update_outside(self, outside: int, fill: dict[int, int]) -> None:
        """Update other tracked nodes: each loses one for every fill edge between two of its neighbours."""
        lost: Counter[int] = Counter()
        for member, mask in fill.items():
            near = outside & self._closed[member]
            ends = mask >> member << member  # each fill edge from its smaller end
            if not (near and ends):
                continue
            if ends.bit_count() <= near.bit_count():
                for end in indices(ends):
                    lost.update(indices(near & self._closed[end]))
            else:
                lost.update({other: (ends & self._closed[other]).bit_count() for other in indices(near)})
        for tracked, change in lost.items():
            if change:
                self._change(tracked, self._count[tracked] - change)
