r"""A search for elimination orders with fewer edges than the greedy rules find.

The greedy rules of :func:`~pyro_graphflows.graphs.inversion.faithful_inverse` look one step ahead. Finding the best
order is NP-hard, but a short search finds better ones, by a few edges in a hundred.

Orders that differ only in the turn of nodes far apart have the same edges. What counts is the *elimination tree*: the
parent of a node is the one eliminated first among its neighbours at the moment it is eliminated itself. Every order
with children before parents gives the same inverse. The smallest change that matters is a *rotation*: a node ``v`` is
eliminated after its parent ``p`` instead of before it. With :math:`N_v` the neighbours of ``v`` when it is eliminated,

- ``v`` gets the neighbours that ``p`` had, :math:`N'_v = N_p`, since the same nodes are gone once both are;
- ``p`` gets ``v``, its neighbours in the moral graph that come later, and the neighbours of its new children: the old
  ones but ``v``, and the children of ``v`` that have ``p`` as a neighbour;
- nothing else changes, so the number of edges changes by :math:`|N'_p| - |N_v|`.

So a rotation costs as many set operations as ``v`` and ``p`` have children, whatever the size of the graph. The search
anneals over rotations: each round starts hot (almost any rotation is accepted), cools, and ends with rotations that
remove edges. Rounds differ in how hot they start, and start from the best order
so far.

As an example, for ``a - b - c - d - a`` (a cycle) with the order ``a, b, c, d``, the tree is ``a -> b -> c -> d``, with
:math:`N_a = \{b, d\}`, :math:`N_b = \{c, d\}`. Rotating ``a`` past ``b`` gives :math:`N'_a = \{c, d\}` and
:math:`N'_b = \{a, c\}`, no edge more or less.

References:
    [1] J. W. H. Liu (1988), Equivalent sparse matrix reorderings by elimination tree rotations, SIAM Journal on
        Scientific and Statistical Computing 9. There rotations that keep the fill; here those that change it.
    [2] U. Kjærulff (1992), Optimal decomposition of probabilistic networks by simulated annealing, Statistics and
        Computing 2. There nodes move in the order, and every move is an elimination.
"""

import logging
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import cycle

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.inversion import Draft, OrderSearch, SiteElimination, bit_set, indices

__all__ = ["AutoOrder", "EliminationTree", "search"]

logger = logging.getLogger(__name__)

WORK_PER_SECOND = 3.3e6  # looks at nodes of the tree of a small graph, on the core that this was measured on
SLOWER_BY = 1500  # nodes for which set operations take twice as long
HEAT = (
    8.0,
    2.0,
    32.0,
    0.5,
    16.0,
    4.0,
)  # the first temperatures of the rounds, in units of the mean number of parents
COLD = 0.25  # the last temperature: a rotation that adds an edge is accepted once in fifty times
ROTATIONS = 1000  # tried in a round, for each site
REPEATS = 20  # rounds that find the same number of edges
LOOKS = 4  # at nodes, about, for one rotation


@dataclass(frozen=True)
class AutoOrder(OrderSearch):
    """Ask :func:`faithful_inverse` to search for an order with few edges, for about so many seconds.

    The search counts its work and stops after as much as a common processor does in that time. So the same graph,
    ``seconds`` and ``seed`` give the same order on a fast machine, a slow one and a busy one. It ends earlier
    when many rounds have found the same number of edges.

    Args:
        seconds: How long to search, about.
        seed: The seed of the search's own random numbers; the global ones are not touched.

    Raises:
        GraphflowsError: If ``seconds`` is not a positive finite number or ``seed`` not an integer.

    Example:
        >>> from pyro_graphflows.graphs import faithful_inverse, load_network
        >>> graph = load_network("ecoli70").graph()
        >>> faithful_inverse(graph).num_edges, faithful_inverse(graph, AutoOrder(seconds=0.2)).num_edges
        (182, 179)
    """

    seconds: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.seconds, int | float) and not isinstance(self.seconds, bool)
        if not number or not 0 < self.seconds < math.inf:
            raise GraphflowsError(
                f"Expected a search of more than 0 seconds, and not without end; got seconds={self.seconds!r}. "
                "Use order='auto' for the best of the greedy rules, without a search."
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise GraphflowsError(f"Expected an integer as the seed of the search; got seed={self.seed!r}.")

    def improve(self, elimination: SiteElimination, start: Draft) -> Draft:
        """See :meth:`OrderSearch.improve`: by rotations of the elimination tree (:func:`search`)."""
        return search(elimination, start, self)


class EliminationTree:
    """An elimination order up to what does not matter, with the neighbours of each node at its elimination.

    Args:
        adjacent: For each node to eliminate, the bit set of its neighbours in the moral graph.
        sequence: An elimination sequence of these nodes.
        after: For each node, the bit set of nodes that have to be eliminated after it.

    Attributes:
        num_edges: The number of edges of the inverse, those to observed nodes included.

    Example:
        >>> tree = EliminationTree({0: 0b1010, 1: 0b0101, 2: 0b1010, 3: 0b0101}, [0, 1, 2, 3], {})
        >>> tree.num_edges, tree.parent
        (5, {0: 1, 1: 2, 2: 3, 3: -1})
    """

    def __init__(self, adjacent: Mapping[int, int], sequence: list[int], after: Mapping[int, int]) -> None:
        self._adjacent, self._after = adjacent, after
        current = dict(adjacent)
        position = {node: i for i, node in enumerate(sequence)}
        latent = bit_set(sequence)
        gone = 0
        self.parent: dict[int, int] = {}  # -1 for a root
        self._around: dict[int, int] = {}
        self._children: dict[int, set[int]] = {node: set() for node in sequence}
        for node in sequence:
            gone |= 1 << node
            self._around[node] = around = current[node] & ~gone
            later = indices(around & latent)
            for other in later:
                current[other] |= around
            self.parent[node] = min(later, key=position.__getitem__, default=-1)
            if later:
                self._children[self.parent[node]].add(node)
        self.num_edges = sum(around.bit_count() for around in self._around.values())

    def anneal(self, draw: random.Random, num_rotations: int, hot: float) -> tuple[dict[int, int], int]:
        """Rotate at random, from hot to cold.

        A rotation that adds ``d`` edges is accepted with probability ``exp(-d / temperature)``.

        Args:
            draw: The random numbers.
            num_rotations: How many rotations to try.
            hot: The first temperature.

        Returns:
            The parents in the tree with the fewest edges of the colder half, and the work: how many nodes were
            looked at.
        """
        around, parents, children = self._around, self.parent, self._children
        adjacent, after = self._adjacent, self._after
        uniform, exp = draw.random, math.exp
        nodes = sorted(around)
        size, num_edges = len(nodes), self.num_edges
        fewest, best = num_edges, parents
        temperature, work = hot, 0
        half = num_rotations // 2
        cooling = (COLD / hot) ** (100 / num_rotations)
        for step in range(num_rotations):
            if step % 100 == 0:
                temperature *= cooling
            if step == half:  # what was there before the heat does not count
                fewest, best = num_edges, dict(parents)
            node = nodes[int(size * uniform())]
            parent = parents[node]
            if parent < 0 or after.get(node, 0) >> parent & 1:
                continue
            bit = 1 << parent
            new = adjacent[parent] & around[parent]
            below_node, below_parent = children[node], children[parent]
            for child in below_parent:
                if child != node:
                    new |= around[child]
            moved = [child for child in below_node if around[child] & bit]
            for child in moved:
                new |= around[child]
            new = new & ~bit | 1 << node
            work += 1 + len(below_node) + len(below_parent)
            change = new.bit_count() - around[node].bit_count()
            if change > 0 and uniform() >= exp(-change / temperature):
                continue
            if change > 0 and step > half and num_edges < fewest:
                fewest, best = num_edges, dict(parents)
            num_edges += change
            above = parents[parent]
            around[node], around[parent] = around[parent], new
            below_parent.remove(node)
            below_parent.update(moved)
            below_node.difference_update(moved)
            below_node.add(parent)
            for child in moved:
                parents[child] = parent
            parents[parent], parents[node] = node, above
            if above >= 0:
                children[above].remove(parent)
                children[above].add(node)
        self.num_edges = num_edges
        return dict(parents) if num_edges < fewest else best, work


def _sequence(parents: Mapping[int, int], after: Mapping[int, int]) -> list[int] | None:
    """Return an elimination sequence with children before parents; None if ``after`` and the tree contradict."""
    waiting = dict.fromkeys(parents, 0)
    followers: dict[int, list[int]] = {}
    for node, parent in parents.items():
        followers[node] = indices(after.get(node, 0) & ~(1 << parent if parent >= 0 else 0))
        if parent >= 0:
            followers[node].append(parent)
        for other in followers[node]:
            waiting[other] += 1
    ready = [node for node, number in waiting.items() if not number]
    heapify(ready)
    sequence = []
    while ready:
        node = heappop(ready)
        sequence.append(node)
        for other in followers[node]:
            waiting[other] -= 1
            if not waiting[other]:
                heappush(ready, other)
    return sequence if len(sequence) == len(parents) else None


def _afterwards(elimination: SiteElimination, sites: Iterable[int]) -> dict[int, int]:
    """Return for each site the bit set of those in a strict part of its plates, which come after it."""
    names = elimination.graph.nodes
    plates = {site: frozenset(elimination.graph.plates[names[site]]) for site in sites}
    by_plates: dict[frozenset[str], int] = {}
    for site, around in plates.items():
        by_plates[around] = by_plates.get(around, 0) | 1 << site
    after = {}
    for site, around in plates.items():
        outer = 0
        for other, members in by_plates.items():
            if other < around:
                outer |= members
        after[site] = outer
    return after


def search(elimination: SiteElimination, start: Draft, order: AutoOrder) -> Draft:
    """Search for an elimination of a model graph with fewer edges than one that is at hand.

    Plates need no more than a graph over the sites, since the copies of a site are all alike: eliminating them
    together joins the sites around them, whichever copies these are joined through.

    Args:
        elimination: The graph.
        start: An elimination of it.
        order: How long to search.

    Returns:
        The elimination with the fewest edges, then levels; ``start`` where none is better.
    """
    barren = set(elimination.barren)
    sequence = [site for site in start.sequence if site not in barren]
    adjacent = elimination.site_graph()
    after = _afterwards(elimination, sequence)
    if len(sequence) < 2:
        return start
    draw = random.Random(order.seed)
    left = order.seconds * WORK_PER_SECOND / (1 + len(elimination.graph) / SLOWER_BY)
    best, rank = start, (start.num_edges, elimination.num_levels(start))
    repeats = 0
    for heat in cycle(HEAT):
        tree = EliminationTree(adjacent, sequence, after)
        hot = max(2 * COLD, heat * tree.num_edges / len(sequence))
        rotations = min(ROTATIONS * len(sequence), int(left / LOOKS))
        if rotations < len(sequence) or repeats == REPEATS:
            break
        parents, work = tree.anneal(draw, rotations, hot)
        left -= rotations + work
        found = _sequence(parents, after)
        if found is None:
            continue
        draft = elimination.eliminate(found)
        new = draft.num_edges, elimination.num_levels(draft)
        repeats = 0 if new[0] < rank[0] else repeats + (new[0] == rank[0])
        if new < rank:
            best, rank, sequence = draft, new, found
            logger.debug("Elimination order with %d edges in %d levels.", *rank)
    logger.info("Searched for an order: %d edges, %d by the greedy rules.", rank[0], start.num_edges)
    return best
