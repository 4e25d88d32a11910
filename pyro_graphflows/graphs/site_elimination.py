"""Elimination of the sites of a model graph: copies together, folded back, barren sites apart.

This is what all elimination orders of one graph share. The graph is expanded
(:mod:`~pyro_graphflows.graphs.plates`) and reduced to its *relevant* part, the ancestors of observed nodes
and inputs. Of that the moral graph is taken, marginalised nodes are eliminated, and then the latent sites
one by one, all copies of a site in a row (:mod:`~pyro_graphflows.graphs.elimination`). The fill that a rule
looks at is that of one copy; the others have the same, since the graph looks the same from each.

The latent sites outside the relevant part are *barren*. Once all its descendants are eliminated, nothing is
known below a barren site, so its neighbours are its model parents, or, behind a marginalised parent, the
known nodes reachable through it; and its elimination must not join them.

As an example, for ``a -> c <- b`` with ``a`` observed, ``b`` and ``c`` are barren. Eliminating ``c`` finds
the parents ``a, b`` and joins nothing: ``b``, next, has no parent.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.elimination import (
    Eliminator,
    ancestors,
    bit_set,
    indices,
    moral_graph,
    reachable,
)
from pyro_graphflows.graphs.frontier import Frontier
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.model_graph import ModelGraph, Node, listed
from pyro_graphflows.graphs.plates import expand

__all__ = ["Draft", "SiteElimination"]


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
        self.latent = [i for i, name in enumerate(names) if graph.role(name) == "latent"]
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
        eliminator = Eliminator(self.adjacent, self.observed, count_observed=False)
        for site in sequence:
            draft.add(site, *self._take(eliminator, site))
        return draft

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
