r"""Faithful inversion of a Bayesian network: what each factor of an amortised guide must be conditioned on.

A model samples latent ``z`` and then observed ``x`` along its graph ``G``. A guide ``q(z | x)`` samples
``z`` given ``x``, so it needs an *inverse* ``H``: a graph in which the observed nodes are roots and each
latent ``v`` has parents ``Pa_H(v)``, for ``q(z | x) = prod_v q(z_v | Pa_H(v))``. The inverse is *faithful*
if it asserts no independence that ``p(z | x)`` lacks, and *minimal* if no parent can be dropped.

Turning the arrows round is not faithful: in ``a -> x <- b`` the causes ``a, b`` are independent, but given
``x`` they are not, so one must be a parent of the other. Simulating variable elimination gets it right.
Start from the moral graph, eliminate the latents in some order, and let the neighbours of each at that
moment be its parents; sample in the reverse of that order. Every order gives a faithful inverse, the order
decides how many edges it has:

- ``"forward"`` and ``"reverse"`` are the two modes of Algorithm 1 of [1]: among the latents whose latent
  parents (forward) or latent children (reverse) are all eliminated, the one with the fewest fill edges.
- ``"min_fill"`` takes the one with the fewest fill edges among *all* latents, and fill between two observed
  nodes is free, as it never becomes an edge of the inverse. ``"min_fill_all"`` counts it.
- A sequence of all latents is followed as it is.
- ``"auto"`` runs the four rules and takes the inverse with the fewest edges, then levels; a rule that has
  exceeded the best so far is abandoned. On a tie the first of reverse, min_fill, min_fill_all, forward.
- An :class:`OrderSearch`, as :class:`~pyro_graphflows.AutoOrder`, searches on from there.

Ties between nodes go to the first in graph order. What the paper leaves out:

- *Barren* nodes, latent or marginalised without an observed descendant, say nothing about the others. They
  are removed before moralising. Marginalised ones vanish; latent ones are sampled last, in graph order,
  given their parents in the model. Without this the inverse is faithful but not minimal.
- *Marginalised* nodes are eliminated first: they leave fill edges and get no factor. In the frontier of
  ``"forward"`` and ``"reverse"`` the chain ``a -> m -> b`` counts as the edge ``a -> b``.
- *Inputs* are observed roots.
- *Plates* are expanded to two copies, the copies of a site are eliminated together, and the result is folded
  back. Sites in more plates are eliminated before sites in a part of those plates, so outer sites are
  sampled before inner ones; the frontier is taken among the sites that this allows. If copies of a site are
  dependent given its parents (their common child sits outside the plate), ``InverseGraph.coupled`` names the
  plates.

**Elimination on a moral graph** (:class:`Eliminator`), with incremental fill counts. *Moralising* a DAG joins
the parents of each node and drops the directions. *Eliminating* a node joins its neighbours and removes it;
the edges this adds are its *fill*. The neighbours of a node at the moment it is eliminated are what its
conditional distribution, given everything not yet eliminated, depends on: they *separate* it from the rest.
Observed nodes are never eliminated.

As an example, ``a -> x <- b`` with ``x`` observed has the moral graph ``a - x - b - a``. Eliminating ``a``
finds the neighbours ``b, x`` and no fill; eliminating ``b`` then finds ``x``. So ``p(a, b | x) = p(b | x)
p(a | b, x)``.

Adjacency is held in bit sets (Python integers, bit ``i`` for node ``i``). A large clique of observed nodes,
which every elimination near the root of a tree makes, then costs one bit a pair, and a fill count costs one
``and`` with a population count for each neighbour. The greedy rules need the fill count of many nodes at
each step. Counts are kept up to date: eliminating ``v`` with neighbours ``N`` changes them only for nodes in
``N`` and for nodes adjacent to both ends of a fill edge.

**Which sites may be next** (:class:`Frontier`): the frontier of a rule, and inner plates before outer ones.
The two published modes of inversion go through the model in topological order: a site becomes a *candidate*
when all its latent parents (``"forward"``) or all its latent children (``"reverse"``) are eliminated. Other
rules take any site. On top of this a site is *open* only when every site in strictly more plates (a strict
superset of its own) is eliminated. Where the two disagree the plates win: the frontier is taken among open
sites. As that part of the model is acyclic too, there is always a candidate.

As an example, for ``mu -> z -> x`` with ``z`` and ``x`` in a plate, forward mode would take ``mu`` first; it
is not open before ``z`` is eliminated, and ``z`` does not wait for it.

**Elimination on a model graph** (:class:`SiteElimination`): copies together, folded back, barren sites apart.
This is what all elimination orders of one graph share. The graph is expanded
(:func:`~pyro_graphflows.graphs.structures.expand`) and reduced to its *relevant* part, the ancestors of
observed nodes and inputs. Of that the moral graph is taken, marginalised nodes are eliminated, and then the
latent sites one by one, all copies of a site in a row. The fill that a rule looks at is that of one copy; the
others have the same, since the graph looks the same from each.

The latent sites outside the relevant part are *barren*. Once all its descendants are eliminated, nothing is
known below a barren site, so its neighbours are its model parents, or, behind a marginalised parent, the
known nodes reachable through it; and its elimination must not join them.

As an example, for ``a -> c <- b`` with ``a`` observed, ``b`` and ``c`` are barren. Eliminating ``c`` finds
the parents ``a, b`` and joins nothing: ``b``, next, has no parent.

References:
    [1] S. Webb, A. Golinski, R. Zinkov, N. Siddharth, T. Rainforth, Y. W. Teh and F. Wood (2018), Faithful
        inversion of generative models for effective amortized inference. There the fill counts of Algorithm 1 are
        recomputed at each step.
    [2] A. Stuhlmüller, J. Taylor and N. Goodman (2013), Learning stochastic inverses.
    [3] D. Koller and N. Friedman (2009), Probabilistic graphical models, chapter 9 (elimination orders).
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

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

__all__ = [
    "Draft",
    "Eliminator",
    "Frontier",
    "OrderSearch",
    "SiteElimination",
    "bit_set",
    "faithful_inverse",
    "fully_connected_inverse",
    "indices",
    "mean_field_inverse",
    "moral_graph",
    "reachable",
    "stochastic_inverse",
]

RULES = ("reverse", "min_fill", "min_fill_all", "forward")
# The usual winner first, the usual loser last, so that most of the work is abandoned early.
_TRIED_BY_AUTO = ("min_fill", "min_fill_all", "reverse", "forward")


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


class Frontier:
    """The candidates for elimination, as positions in ``graph.nodes``.

    Args:
        graph: The model graph.
        sites: The positions of the sites to eliminate, in increasing order.
        rule: ``"forward"``, ``"reverse"``, or any other name for a rule without a frontier.
    """

    def __init__(self, graph: ModelGraph, sites: Iterable[int], rule: str) -> None:
        self._waiting = dict.fromkeys(sites, 0)  # site -> open, unmarked sites it has to wait for
        self._after: dict[int, list[int]] = {site: [] for site in self._waiting}
        if rule in ("forward", "reverse"):
            for site, below in _next_latent(graph, self._waiting).items():
                for other in below:
                    first, second = (site, other) if rule == "forward" else (other, site)
                    self._after[first].append(second)
        self._plates = {site: frozenset(graph.plates[graph.nodes[site]]) for site in self._waiting}
        self._left: dict[frozenset[str], set[int]] = {}  # plates -> unmarked sites in exactly these
        for site, plates in self._plates.items():
            self._left.setdefault(plates, set()).add(site)
        self._closed = set(self._left)
        self._candidates: set[int] = set()

    def start(self) -> list[int]:
        """Return the first candidates."""
        return self._open()[0]

    def advance(self, site: int) -> tuple[list[int], list[int]]:
        """Mark a candidate as eliminated; return the sites that became candidates and that ceased to be."""
        self._candidates.discard(site)
        plates = self._plates[site]
        self._left[plates].discard(site)
        touched = self._after[site]
        for other in touched:
            self._waiting[other] -= 1
        entered = [other for other in touched if self._is_candidate(other)]
        self._candidates.update(entered)
        if self._left[plates] or not self._closed:
            return entered, []
        opened, left = self._open()
        return [other for other in entered if other not in left] + opened, [
            x for x in left if x not in entered
        ]

    def _is_candidate(self, site: int) -> bool:
        plates = self._plates[site]
        return self._waiting[site] == 0 and plates not in self._closed and site in self._left[plates]

    def _open(self) -> tuple[list[int], list[int]]:
        """Open the sites whose inner sites are all eliminated."""
        new = [
            plates
            for plates in self._closed
            if not any(self._left[other] for other in self._left if plates < other)
        ]
        self._closed.difference_update(new)
        opened = sorted(site for plates in new for site in self._left[plates])
        for site in opened:
            for other in self._after[site]:
                self._waiting[other] += 1
        left = [site for site in self._candidates if self._waiting[site]]
        entered = [site for site in opened if self._is_candidate(site)]
        self._candidates.difference_update(left)
        self._candidates.update(entered)
        return entered, left


def _next_latent(graph: ModelGraph, sites: Iterable[int]) -> dict[int, list[int]]:
    """Return for each site the sites below it, with nothing but marginalised nodes between."""
    names = graph.nodes
    position = {name: i for i, name in enumerate(names)}
    wanted = set(sites)
    found: dict[int, list[int]] = {}
    for site in wanted:
        below: set[int] = set()
        stack, seen = [names[site]], {names[site]}
        while stack:
            for child in graph.children(stack.pop()):
                if child in seen:
                    continue
                seen.add(child)
                if position[child] in wanted:
                    below.add(position[child])
                elif graph.role(child) == "marginalised":
                    stack.append(child)
        found[site] = sorted(below)
    return found


@dataclass
class Draft:
    """The outcome of an elimination, in positions of ``graph.nodes``."""

    sequence: list[int] = field(default_factory=list)
    parents: dict[int, list[int]] = field(default_factory=dict)
    coupled: dict[int, tuple[str, ...]] = field(default_factory=dict)
    num_edges: int = 0

    def add(self, site: int, parents: list[int], coupled: tuple[str, ...]) -> None:
        """Append a site to the elimination sequence."""
        self.sequence.append(site)
        self.parents[site] = parents
        self.num_edges += len(parents)
        if coupled:
            self.coupled[site] = coupled


class SiteElimination:
    """What all elimination orders of one graph share: the expansion, its moral graph, the barren sites.

    Args:
        graph: The model graph.
    """

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.expansion = expand(graph)
        self.has_plates = any(len(copies) > 1 for copies in self.expansion.copies)
        names = graph.nodes
        latent = set(graph.latent)
        self.latent = [i for i, name in enumerate(names) if name in latent]
        self.known = self.expansion.with_role("observed", "input")
        self.hidden = set(self.expansion.with_role("marginalised"))
        self.relevant = ancestors(self.expansion, self.known)
        copies = self.expansion.copies
        self.barren = [site for site in self.latent if copies[site][0] not in self.relevant]
        self.fruitful = [site for site in self.latent if copies[site][0] in self.relevant]
        self.adjacent = moral_graph(self.expansion, self.relevant, self.hidden)
        self.observed = bit_set(self.known)

    def run(self, rule: str, limit: int | None = None) -> Draft | None:
        """Eliminate by a greedy rule, or give up when there will be more than ``limit`` edges."""
        draft = Draft()
        latent = set(self.fruitful)
        for site, parents, coupled in self._barren_sites():
            draft.add(site, parents, coupled)
        eliminator = Eliminator(self.adjacent, self.observed, count_observed=rule != "min_fill")
        frontier = Frontier(self.graph, self.fruitful, rule)
        copies = self.expansion.copies
        for site in frontier.start():
            eliminator.track(copies[site][0])
        for _ in self.fruitful:
            site = self.expansion.site[eliminator.best()]
            parents, coupled = self._take(eliminator, site)
            draft.add(site, parents, coupled)
            # The parents are joined now, so every pair of them with a latent site will be an edge.
            num_latent = sum(parent in latent for parent in parents)
            still = num_latent * (num_latent - 1) // 2 + num_latent * (len(parents) - num_latent)
            if limit is not None and draft.num_edges + still > limit:
                return None
            entered, left = frontier.advance(site)
            for other in left:
                eliminator.untrack(copies[other][0])
            for other in entered:
                eliminator.track(copies[other][0])
        return draft

    def follow(self, sequence: list[int]) -> Draft:
        """Eliminate in a given order."""
        draft = Draft()
        if self.barren:
            for site, parents, coupled in self._by_boundary(sequence):
                draft.add(site, parents, coupled)
            return draft
        return self.eliminate(sequence)

    def eliminate(self, fruitful: list[int]) -> Draft:
        """Eliminate the barren sites, and then the others in a given order."""
        draft = Draft()
        for site, parents, coupled in self._barren_sites():
            draft.add(site, parents, coupled)
        eliminator = Eliminator(self.adjacent, self.observed, count_observed=False)
        for site in fruitful:
            draft.add(site, *self._take(eliminator, site))
        return draft

    def site_graph(self) -> dict[int, int]:
        """Return for each site that is not barren the bit set of the sites next to it in the moral graph."""
        copies = self.expansion.copies
        around = {site: self._fold(indices(self.adjacent[copies[site][0]])) for site in self.fruitful}
        return {site: bit_set(sites) & ~(1 << site) for site, sites in around.items()}

    def as_sequence(self, order: Iterable[Node]) -> list[int]:
        """Check an elimination sequence and return it as positions."""
        position = {name: i for i, name in enumerate(self.graph.nodes)}
        names = list(order)
        missing, unknown = set(self.graph.latent) - set(names), set(names) - set(self.graph.latent)
        if missing or unknown or len(names) != len(self.graph.latent):
            twice = {name for name, times in Counter(names).items() if times > 1}
            raise GraphflowsError(
                f"Expected an elimination sequence of all latent nodes, each once; missing: "
                f"{listed(missing) or 'none'}; not latent: {listed(unknown) or 'none'}; "
                f"more than once: {listed(twice) or 'none'}."
            )
        sequence = [position[name] for name in names]
        early: dict[frozenset[str], Node] = {}  # plates -> the first site in exactly these
        barren = set(self.barren)
        for site, name in zip(sequence, names, strict=True):
            if site not in barren:
                plates = frozenset(self.graph.plates[name])
                outer = [other for other in early if other < plates]
                if outer:
                    raise GraphflowsError(
                        f"Expected an elimination sequence with inner sites before outer ones; got {name} "
                        f"(in {', '.join(self.graph.plates[name])}) after {early[outer[0]]}."
                    )
                early.setdefault(plates, name)
        return sequence

    def _take(self, eliminator: Eliminator, site: int) -> tuple[list[int], tuple[str, ...]]:
        """Eliminate all copies of a site; return the sites around them and the plates that couple them."""
        copies = self.expansion.copies[site]
        if not self.has_plates:
            parents = indices(eliminator.neighbours(copies[0]))
            eliminator.remove(copies[0])
            return parents, ()
        own = bit_set(copies)
        around = 0
        for copy in copies:
            around |= eliminator.neighbours(copy)
        linked = indices(eliminator.neighbours(copies[0]) & own)
        for copy in copies:
            eliminator.remove(copy)
        return self._fold(indices(around & ~own)), self.expansion.differing_plates(copies[0], linked)

    def _fold(self, nodes: Iterable[int]) -> list[int]:
        return sorted({self.expansion.site[node] for node in nodes})

    def _barren_sites(self) -> Iterator[tuple[int, list[int], tuple[str, ...]]]:
        """Yield (site, parents, coupled) for the barren sites, descendants first."""
        parents = self.expansion.parents
        for i in reversed(range(len(self.barren))):
            site = self.barren[i]
            copies = self.expansion.copies[site]
            above = {parent for copy in copies for parent in parents[copy]}
            if above & self.hidden:
                yield from self._by_boundary([site], others=[*self.fruitful, *self.barren[:i]])
            else:
                yield site, self._fold(above), ()

    def _by_boundary(
        self, sequence: list[int], others: Iterable[int] = ()
    ) -> Iterator[tuple[int, list[int], tuple[str, ...]]]:
        """Yield (site, parents, coupled) for an elimination sequence, by a search for each site.

        Exact for any sequence, barren nodes included, but costs a pass over the graph for each site. The
        other sites are those that are eliminated after the sequence.
        """
        copies = self.expansion.copies
        unmarked = {copy for site in (*others, *sequence) for copy in copies[site]} | set(self.known)
        for site in sequence:
            own = set(copies[site])
            linked = reachable(self.expansion, copies[site][:1], unmarked) & own
            unmarked -= own
            around = reachable(self.expansion, copies[site], unmarked)
            yield site, self._fold(around), self.expansion.differing_plates(copies[site][0], linked)

    def num_levels(self, draft: Draft) -> int:
        """Return the length of the longest chain of latent sites."""
        depth: dict[int, int] = {}
        for site in reversed(draft.sequence):
            depth[site] = 1 + max((depth[p] for p in draft.parents[site] if p in depth), default=0)
        return max(depth.values(), default=0)

    def sampling_order(self, draft: Draft) -> list[int]:
        """Return the reverse of the elimination, with outer sites moved before the inner ones.

        Elimination sees to it for all but barren sites, which are exempt if they depend on inner ones.
        """
        order = draft.sequence[::-1]
        plates = {site: frozenset(self.graph.plates[self.graph.nodes[site]]) for site in order}
        if not self.barren or len(set(plates.values())) == 1:
            return order
        below: dict[int, set[int]] = {site: {site} for site in order}
        for site in reversed(order):
            for parent in draft.parents[site]:
                if parent in below:
                    below[parent] |= below[site]
        must = {site: {parent for parent in draft.parents[site] if parent in below} for site in order}
        should = {
            site: {other for other in order if plates[other] < plates[site] and other not in below[site]}
            for site in order
        }
        placed: dict[int, None] = {}
        while len(placed) < len(order):
            ready = [site for site in order if site not in placed and must[site] <= placed.keys()]
            # Two sites that each have to wait for the other: go on in the order given.
            placed[next((site for site in ready if should[site] <= placed.keys()), ready[0])] = None
        return list(placed)

    def finish(self, draft: Draft, order: str) -> InverseGraph:
        """Return the outcome as an inverse graph, sites by name."""
        names = self.graph.nodes
        sampling_order = draft.sequence[::-1] if order == "custom" else self.sampling_order(draft)
        return InverseGraph(
            self.graph,
            {names[site]: [names[p] for p in parents] for site, parents in draft.parents.items()},
            order=order,
            sampling_order=[names[site] for site in sampling_order],
            coupled={names[site]: plates for site, plates in draft.coupled.items()},
        )


class OrderSearch(ABC):
    """A search for an elimination with fewer edges than the greedy rules find."""

    @abstractmethod
    def improve(self, elimination: SiteElimination, start: Draft) -> Draft:
        """Return an elimination of a model graph; ``start`` itself where none is better.

        Args:
            elimination: The graph.
            start: An elimination of it.
        """


def faithful_inverse(graph: ModelGraph, order: str | OrderSearch | Iterable[Node] = "auto") -> InverseGraph:
    """Return a faithful inverse of a model graph; minimal for its sampling order.

    Args:
        graph: The model graph.
        order: ``"auto"``, ``"forward"``, ``"reverse"``, ``"min_fill"``, ``"min_fill_all"``, an
            :class:`~pyro_graphflows.AutoOrder` to search for fewer edges, or an elimination sequence of all latent
            nodes (the last to be sampled first). See the module's description.

    Returns:
        The inverse; its ``order`` is the name of the rule (of the winner for ``"auto"``, ``"custom"`` for
        a sequence, ``"search"`` where a search found a better one than the rules).

    Raises:
        GraphflowsError: If ``graph`` is no ModelGraph, ``order`` is no known name, or a sequence is not one
            of all latent nodes or has an outer site before one in plates inside its own.

    Example:
        >>> graph = ModelGraph([("a", "x"), ("b", "x")], observed=["x"])
        >>> dict(faithful_inverse(graph, "forward").parents)
        {'a': ('b', 'x'), 'b': ('x',)}
    """
    _check(graph)
    elimination = SiteElimination(graph)
    if isinstance(order, OrderSearch):
        draft, rule = _best_of_rules(elimination)
        found = order.improve(elimination, draft)
        return elimination.finish(found, rule if found is draft else "search")
    if not isinstance(order, str):
        return elimination.finish(elimination.follow(elimination.as_sequence(order)), "custom")
    if order in RULES:
        by_rule = elimination.run(order)
        assert by_rule is not None
        return elimination.finish(by_rule, order)
    if order != "auto":
        raise GraphflowsError(
            f"Expected order to be 'auto', {', '.join(map(repr, RULES))}, an AutoOrder or a sequence of "
            f"all latent nodes; got {order!r}."
        )
    return elimination.finish(*_best_of_rules(elimination))


def _best_of_rules(elimination: SiteElimination) -> tuple[Draft, str]:
    """Return the outcome with the fewest edges, then levels, and the rule that found it."""
    best: tuple[tuple[int, int, int], Draft, str] | None = None
    for rule in _TRIED_BY_AUTO:
        draft = elimination.run(rule, limit=None if best is None else best[0][0])
        if draft is not None:
            rank = draft.num_edges, elimination.num_levels(draft), RULES.index(rule)
            if best is None or rank < best[0]:
                best = rank, draft, rule
    assert best is not None  # the first rule runs without a limit
    return best[1], best[2]


def _check(graph: ModelGraph) -> None:
    if not isinstance(graph, ModelGraph):
        raise GraphflowsError(
            f"Expected a ModelGraph; got a {type(graph).__name__}. "
            "Use ModelGraph(graph, observed=...), which says what is observed."
        )


def _through_marginalised(graph: ModelGraph) -> dict[Node, set[Node]]:
    """Return for each node that is not marginalised its nearest descendants that are not."""
    below: dict[Node, set[Node]] = {}
    for node in reversed(graph.nodes):
        below[node] = set()
        for child in graph.children(node):
            below[node] |= below[child] if graph.role(child) == "marginalised" else {child}
    return below


def stochastic_inverse(graph: ModelGraph) -> InverseGraph:
    """Return the heuristic inverse of Stuhlmüller et al. (2013): arrows reversed, co-parents not joined.

    Each latent node is conditioned on its children, latent or observed, and on its observed parents. In
    general this is *not* faithful: causes of a common effect are left independent. A chain through
    marginalised nodes counts as one edge.

    References:
        A. Stuhlmüller, J. Taylor and N. Goodman (2013), Learning stochastic inverses.

    Args:
        graph: The model graph.

    Returns:
        The inverse, with ``order="stochastic"``.

    Raises:
        GraphflowsError: If ``graph`` is no ModelGraph.

    Example:
        >>> graph = ModelGraph([("a", "x"), ("b", "x")], observed=["x"])
        >>> dict(stochastic_inverse(graph).parents)
        {'a': ('x',), 'b': ('x',)}
    """
    _check(graph)
    below = _through_marginalised(graph)
    parents = {name: set(below[name]) for name in graph.latent}
    for name in (*graph.observed, *graph.inputs):
        for child in below[name]:
            if child in parents:
                parents[child].add(name)
    return InverseGraph(graph, parents, order="stochastic", sampling_order=graph.latent[::-1])


def fully_connected_inverse(graph: ModelGraph) -> InverseGraph:
    """Return the inverse in which each latent is conditioned on all data and all latents sampled before it.

    It is faithful and knows nothing of the model but an order: the model's own, outer plates first.

    Args:
        graph: The model graph.

    Returns:
        The inverse, with ``order="full"``.

    Raises:
        GraphflowsError: If ``graph`` is no ModelGraph.

    Example:
        >>> graph = ModelGraph([("a", "x"), ("b", "x")], observed=["x"])
        >>> dict(fully_connected_inverse(graph).parents)
        {'a': ('x',), 'b': ('a', 'x')}
    """
    _check(graph)
    order = sorted(graph.latent, key=lambda name: len(graph.plates[name]))
    known = (*graph.observed, *graph.inputs)
    coupled = faithful_inverse(graph, order[::-1]).coupled if any(map(len, graph.plates.values())) else {}
    return InverseGraph(
        graph,
        {name: (*order[:i], *known) for i, name in enumerate(order)},
        order="full",
        sampling_order=order,
        coupled=coupled,
    )


def mean_field_inverse(graph: ModelGraph) -> InverseGraph:
    """Return the inverse in which each latent is conditioned on all data and on no latent.

    Args:
        graph: The model graph.

    Returns:
        The inverse, with ``order="mean_field"``.

    Raises:
        GraphflowsError: If ``graph`` is no ModelGraph.

    Example:
        >>> graph = ModelGraph([("a", "x"), ("b", "x")], observed=["x"])
        >>> dict(mean_field_inverse(graph).parents)
        {'a': ('x',), 'b': ('x',)}
    """
    _check(graph)
    known = (*graph.observed, *graph.inputs)
    order = sorted(graph.latent, key=lambda name: len(graph.plates[name]))
    return InverseGraph(graph, dict.fromkeys(order, known), order="mean_field", sampling_order=order)
