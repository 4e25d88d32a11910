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
- An :class:`~pyro_graphflows.graphs.order_search.AutoOrder` searches on from there, for a given time.

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

from collections.abc import Iterable

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.elimination import Draft, SiteElimination
from pyro_graphflows.graphs.order_search import AutoOrder, search
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph, Node

__all__ = ["faithful_inverse", "fully_connected_inverse", "mean_field_inverse", "stochastic_inverse"]

RULES = ("reverse", "min_fill", "min_fill_all", "forward")
# The usual winner first, the usual loser last, so that most of the work is abandoned early.
_TRIED_BY_AUTO = ("min_fill", "min_fill_all", "reverse", "forward")


def faithful_inverse(graph: ModelGraph, order: str | AutoOrder | Iterable[Node] = "auto") -> InverseGraph:
    """Return a faithful inverse of a model graph; minimal for its sampling order.

    Args:
        graph: The model graph.
        order: ``"auto"``, ``"forward"``, ``"reverse"``, ``"min_fill"``, ``"min_fill_all"``, an
            :class:`AutoOrder` to search for fewer edges, or an elimination sequence of all latent nodes (the last
            to be sampled first). See the module's description.

    Returns:
        The inverse; its ``order`` is the name of the rule (of the winner for ``"auto"``, ``"custom"`` for
        a sequence, ``"search"`` where an :class:`AutoOrder` found a better one than the rules).

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
    if isinstance(order, AutoOrder):
        draft, rule = _best_of_rules(elimination)
        found = search(elimination, draft, order)
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
