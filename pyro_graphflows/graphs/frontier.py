"""Which sites may be eliminated next: the frontier of a rule, and inner plates before outer ones.

The two published modes of inversion go through the model in topological order: a site becomes a *candidate*
when all its latent parents (``"forward"``) or all its latent children (``"reverse"``) are eliminated. Other
rules take any site. On top of this a site is *open* only when every site in strictly more plates (a strict
superset of its own) is eliminated. Where the two disagree the plates win: the frontier is taken among open
sites. As that part of the model is acyclic too, there is always a candidate.

As an example, for ``mu -> z -> x`` with ``z`` and ``x`` in a plate, forward mode would take ``mu`` first; it
is not open before ``z`` is eliminated, and ``z`` does not wait for it.
"""

from collections.abc import Iterable

from pyro_graphflows.graphs.model_graph import ModelGraph

__all__ = ["Frontier"]


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
