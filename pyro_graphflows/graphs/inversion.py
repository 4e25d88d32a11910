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

References:
    [1] S. Webb, A. Golinski, R. Zinkov, N. Siddharth, T. Rainforth, Y. W. Teh and F. Wood (2018), Faithful
        inversion of generative models for effective amortized inference.
    [2] A. Stuhlmüller, J. Taylor and N. Goodman (2013), Learning stochastic inverses.
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

__all__ = ["faithful_inverse", "fully_connected_inverse", "mean_field_inverse", "stochastic_inverse"]

RULES = ("reverse", "min_fill", "min_fill_all", "forward")
# The usual winner first, the usual loser last, so that most of the work is abandoned early.
_TRIED_BY_AUTO = ("min_fill", "min_fill_all", "reverse", "forward")


def faithful_inverse(graph: ModelGraph, order: str | Iterable[Node] = "auto") -> InverseGraph:
    """Return a faithful inverse of a model graph; minimal for its sampling order.

    Args:
        graph: The model graph.
        order: ``"auto"``, ``"forward"``, ``"reverse"``, ``"min_fill"``, ``"min_fill_all"``, or an elimination
            sequence of all latent nodes (the last to be sampled first). See the module's description.

    Returns:
        The inverse; its ``order`` is the name of the rule (of the winner for ``"auto"``, ``"custom"`` for
        a sequence).

    Raises:
        GraphflowsError: If ``graph`` is no ModelGraph, ``order`` is no known name, or a sequence is not one
            of all latent nodes or has an outer site before one in plates inside its own.

    Example:
        >>> graph = ModelGraph([("a", "x"), ("b", "x")], observed=["x"])
        >>> dict(faithful_inverse(graph, "forward").parents)
        {'a': ('b', 'x'), 'b': ('x',)}
    """
    _check(graph)
    inversion = _Inversion(graph)
    if not isinstance(order, str):
        return inversion.finish(inversion.follow(inversion.as_sequence(order)), "custom")
    if order in RULES:
        draft = inversion.run(order)
        assert draft is not None
        return inversion.finish(draft, order)
    if order != "auto":
        raise GraphflowsError(
            f"Expected order to be 'auto', {', '.join(map(repr, RULES))} or a sequence of all latent nodes; "
            f"got {order!r}."
        )
    best: tuple[tuple[int, int, int], _Draft, str] | None = None
    for rule in _TRIED_BY_AUTO:
        draft = inversion.run(rule, limit=None if best is None else best[0][0])
        if draft is not None:
            rank = draft.num_edges, inversion.num_levels(draft), RULES.index(rule)
            if best is None or rank < best[0]:
                best = rank, draft, rule
    assert best is not None
    return inversion.finish(best[1], best[2])


@dataclass
class _Draft:
    """The outcome of an elimination, in positions of ``graph.nodes``."""

    sequence: list[int] = field(default_factory=list)
    parents: dict[int, list[int]] = field(default_factory=dict)
    coupled: dict[int, tuple[str, ...]] = field(default_factory=dict)
    num_edges: int = 0

    def add(self, site: int, parents: list[int], coupled: tuple[str, ...]) -> None:
        self.sequence.append(site)
        self.parents[site] = parents
        self.num_edges += len(parents)
        if coupled:
            self.coupled[site] = coupled


class _Inversion:
    """What all orders of one graph share: the expansion, its moral graph, the barren nodes."""

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

    def run(self, rule: str, limit: int | None = None) -> _Draft | None:
        """Eliminate by a greedy rule, or give up when there are more than ``limit`` edges."""
        draft = _Draft()
        for site, parents, coupled in self._by_boundary(self.barren[::-1], base=self.fruitful):
            draft.add(site, parents, coupled)
        eliminator = Eliminator(self.adjacent, self.observed, count_observed=rule != "min_fill")
        frontier = Frontier(self.graph, self.fruitful, rule)
        copies = self.expansion.copies
        for site in frontier.start():
            eliminator.track(copies[site][0])
        for _ in self.fruitful:
            site = self.expansion.site[eliminator.best()]
            draft.add(site, *self._take(eliminator, site))
            if limit is not None and draft.num_edges > limit:
                return None
            entered, left = frontier.advance(site)
            for other in left:
                eliminator.untrack(copies[other][0])
            for other in entered:
                eliminator.track(copies[other][0])
        return draft

    def follow(self, sequence: list[int]) -> _Draft:
        """Eliminate in a given order."""
        draft = _Draft()
        if self.barren:
            for site, parents, coupled in self._by_boundary(sequence, base=[]):
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

    def _by_boundary(
        self, sequence: list[int], base: list[int]
    ) -> Iterator[tuple[int, list[int], tuple[str, ...]]]:
        """Yield (site, parents, coupled) for an elimination sequence, by a search for each site.

        Exact for any sequence, barren nodes included, but costs a pass over the graph for each site. The
        sites of ``base`` are eliminated after those of the sequence.
        """
        copies = self.expansion.copies
        hidden_parents = {
            site
            for site in sequence
            if any(node in self.hidden for node in self.expansion.parents[copies[site][0]])
        }
        unmarked = {copy for site in (*base, *sequence) for copy in copies[site]} | set(self.known)
        for site in sequence:
            if base and site not in hidden_parents:
                # Barren, after all its descendants, all parents known: exactly its parents in the model.
                parents = self._fold(node for copy in copies[site] for node in self.expansion.parents[copy])
                unmarked -= set(copies[site])
                yield site, parents, ()
                continue
            linked = reachable(self.expansion, copies[site][:1], unmarked) & set(copies[site])
            unmarked -= set(copies[site])
            around = reachable(self.expansion, copies[site], unmarked)
            yield site, self._fold(around), self.expansion.differing_plates(copies[site][0], linked)

    def num_levels(self, draft: _Draft) -> int:
        depth: dict[int, int] = {}
        for site in reversed(draft.sequence):
            depth[site] = 1 + max((depth[p] for p in draft.parents[site] if p in depth), default=0)
        return max(depth.values(), default=0)

    def _sampling_order(self, draft: _Draft) -> list[int]:
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

    def finish(self, draft: _Draft, order: str) -> InverseGraph:
        names = self.graph.nodes
        sampling_order = draft.sequence[::-1] if order == "custom" else self._sampling_order(draft)
        return InverseGraph(
            self.graph,
            {names[site]: [names[p] for p in parents] for site, parents in draft.parents.items()},
            order=order,
            sampling_order=[names[site] for site in sampling_order],
            coupled={names[site]: plates for site, plates in draft.coupled.items()},
        )


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
