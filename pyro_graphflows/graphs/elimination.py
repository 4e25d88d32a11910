r"""Variable elimination: on a moral graph, node by node, and on a model graph, site by site.

**On a moral graph** (:class:`Eliminator`), with incremental fill counts. *Moralising* a DAG joins the parents
of each node and drops the directions. *Eliminating* a node joins its neighbours and removes it; the edges
this adds are its *fill*. The neighbours of a node at the moment it is eliminated are what its conditional
distribution, given everything not yet eliminated, depends on: they *separate* it from the rest. Observed
nodes are never eliminated.

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

**On a model graph** (:class:`SiteElimination`): copies together, folded back, barren sites apart. This is
what all elimination orders of one graph share. The graph is expanded (:func:`expand`)
and reduced to its *relevant* part, the ancestors of observed nodes and inputs. Of that the moral graph is
taken, marginalised nodes are eliminated, and then the latent sites one by one, all copies of a site in a row.
The fill that a rule looks at is that of one copy; the others have the same, since the graph looks the same
from each.

The latent sites outside the relevant part are *barren*. Once all its descendants are eliminated, nothing is
known below a barren site, so its neighbours are its model parents, or, behind a marginalised parent, the
known nodes reachable through it; and its elimination must not join them.

As an example, for ``a -> c <- b`` with ``a`` observed, ``b`` and ``c`` are barren. Eliminating ``c`` finds
the parents ``a, b`` and joins nothing: ``b``, next, has no parent.

References:
    [1] S. Webb et al. (2018), Faithful inversion of generative models for effective amortized inference,
        Algorithm 1 (NaMI). There the fill counts are recomputed at each step.
    [2] D. Koller and N. Friedman (2009), Probabilistic graphical models, chapter 9 (elimination orders).

Plates as a finite graph: every plate is expanded to a few copies, and what was found is folded back.

A plate says that a node is repeated, with an unspecified number of copies. What an inversion finds cannot
depend on that number, and two copies are enough to see everything: a dependence between a copy and *another*
copy looks the same whichever other copy it is. One copy is not enough, since it loses the coupling of two
copies through a common parent or child.

Words: a *site* is a node of the :class:`~pyro_graphflows.graphs.structures.ModelGraph`, a *copy* is a node
of the expansion. A copy has one index for each plate around its site. An edge ``u -> v`` joins the copies of
``u`` and ``v`` whose indices agree in the plates they share. So a parent in fewer plates is *broadcast* (one
copy to many children) and a parent in more plates is *pooled* (many copies to one child).

As an example, ``mu -> z``, ``z -> x`` with ``z`` and ``x`` in a plate become the five nodes ``mu``,
``z[0]``, ``z[1]``, ``x[0]``, ``x[1]`` with edges ``mu -> z[i]`` and ``z[i] -> x[i]``.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import product

import numpy as np

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph, Node, listed

__all__ = [
    "Draft",
    "Eliminator",
    "Expansion",
    "Frontier",
    "SiteElimination",
    "ancestors",
    "bit_set",
    "expand",
    "indices",
    "moral_graph",
    "reachable",
]


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
        if len(copies) == 1 and len(self.expansion) == len(self.graph):
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
