"""The order of sampling where sites are discrete.

**Outer sites before inner ones**, which gradients of the score-function kind need. Such a gradient of Pyro's ELBOs
weighs the score of each element of a plate with the terms of that element and those outside of the plate. If a
site outside were sampled later and looked at the elements, it would carry the influence of one element to the terms of
the others, which are left out: the gradient would be biased, without an error. Enumeration has the same need: an
enumerated value may not leave its plate.

**Discrete sites before continuous ones** in the same plates, which the families need. Every order is faithful, but in
``k -> z -> x`` the factorisation ``q(z | x) q(k | z)`` asks for a mixture at ``z``, and ``q(k | x) q(z | k, x)`` only
for what families can do (as conditional Gaussian networks eliminate continuous variables first).

**Model parents before enumerated sites**, which Pyro needs: a site drawn once for each value of an enumerated one may
not be a parent of that one in the model.

References:
    [1] Lauritzen (1992), Propagation of probabilities, means and variances in mixed graphical association models,
    Journal of the American Statistical Association 87, Section 4 (strong elimination orders).
"""

from collections.abc import Collection, Mapping

import networkx as nx

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.inversion import faithful_inverse
from pyro_graphflows.guides.plan import Plan
from pyro_graphflows.guides.site import LatentSite

__all__ = [
    "discrete_sites_first",
    "drawn_after_enumerated",
    "order_for_discrete_sites",
    "outer_sites_first",
    "require_outer_sites_first",
    "sites_to_enumerate",
]

MOST_EDGES = 2.0  # times those of the sparsest inverse found


def discrete_sites_first(inverse: InverseGraph, discrete: Collection[str]) -> InverseGraph:
    """Return a faithful inverse that samples discrete sites before the continuous ones in the same plates.

    Args:
        inverse: A faithful inverse, whose order is kept otherwise.
        discrete: The discrete latent sites.

    Returns:
        The new inverse, of order ``"discrete_first"``; the given one where it has the property already, or where the
        new one has more than twice its edges (long chains with a discrete and a continuous part).
    """
    graph = inverse.graph
    if set(graph.latent) <= set(discrete) or set(graph.latent).isdisjoint(discrete):
        return inverse
    given = inverse.sampling_order
    rank = {site: i for i, site in enumerate(given)}
    wanted = sorted(given, key=lambda site: (len(graph.plates[site]), site not in discrete, rank[site]))
    if wanted == list(given):
        return inverse
    found = faithful_inverse(graph, wanted[::-1])
    if found.num_edges > MOST_EDGES * inverse.num_edges:
        return inverse
    return InverseGraph(
        graph,
        found.parents,
        order="discrete_first",
        sampling_order=found.sampling_order,
        coupled=found.coupled,
        how=found.how,
    )


def outer_sites_first(inverse: InverseGraph) -> InverseGraph:
    """Return the same factorisation, sampled outer sites first as far as parents allow it.

    Args:
        inverse: The factorisation.

    Returns:
        An inverse in which each next site is the one in the fewest plates among those whose parents are sampled.
        Ties keep their order.
    """
    plates, rank = inverse.graph.plates, {site: i for i, site in enumerate(inverse.sampling_order)}
    order = nx.lexicographical_topological_sort(
        inverse.to_networkx().subgraph(rank), key=lambda site: (len(plates[site]), rank[site])
    )
    return InverseGraph(
        inverse.graph,
        inverse.parents,
        order=inverse.order,
        sampling_order=order,
        coupled=inverse.coupled,
        how=inverse.how,
    )


def drawn_after_enumerated(inverse: InverseGraph, enumerated: Collection[str]) -> dict[str, list[str]]:
    """Return the enumerated sites with model parents that the guide draws given their values, and these parents.

    Pyro's enumeration has no place for them: the parent's value would vary along the dimension of its child's values.

    Args:
        inverse: The guide's factorisation.
        enumerated: The sites that the guide enumerates.
    """
    dag = inverse.to_networkx()
    found = {}
    for site in sorted(enumerated):
        below = nx.descendants(dag, site) - set(enumerated)
        wrong = [parent for parent in inverse.graph.parents(site) if parent in below]
        if wrong:
            found[site] = wrong
    return found


def require_outer_sites_first(plan: Plan, rough: Collection[str]) -> None:
    """Refuse plans that sample a site with score-function gradients before one in fewer plates.

    A site that depends on the earlier one in the model itself, without data below it, cannot come first, and does no
    harm: nothing else depends on it.

    Args:
        plan: The plan.
        rough: The sites whose draws are not reparametrised.

    Raises:
        UnsupportedModelError: If there is one. The message names the sites.
    """
    graph = plan.graph
    order = [site for block in plan.blocks for site in block.sites]
    dag = graph.to_networkx()
    for i, site in enumerate(order):
        if site not in rough:
            continue
        below = nx.descendants(dag, site)
        late = [
            other
            for other in order[i + 1 :]
            if set(graph.plates[other]) < set(graph.plates[site]) and other not in below
        ]
        if late:
            raise UnsupportedModelError(
                f"Expected {', '.join(map(repr, late))}, in fewer plates, to be sampled before the discrete site "
                f"{site!r}; the inverse {plan.inverse.order!r} samples it after. Score-function gradients would "
                "be biased without an error, and enumeration would fail. Use a faithful inverse (inverse='auto')."
            )


def sites_to_enumerate(option: bool | Collection[str], sites: Mapping[str, LatentSite]) -> frozenset[str]:
    """Return the sites that the guide is to enumerate.

    Args:
        option: Names, or True for all discrete sites.
        sites: The latent sites.

    Raises:
        UnsupportedModelError: If one of them cannot be enumerated.
    """
    if isinstance(option, bool):
        names = [name for name, site in sites.items() if site.encoding is not None] if option else []
    else:
        names = list(option)
    for name in names:
        encoding = sites[name].encoding if name in sites else None
        if encoding is None or encoding.kind == "counts" or encoding.num_elements != 1:
            raise UnsupportedModelError(
                f"Expected enumerate_sites to be latent sites with one binary or class variable; {name!r} is "
                f"{'no discrete latent site' if encoding is None else encoding}. Pyro enumerates no vectors: give "
                "each element a site of its own, or leave this site to score-function gradients."
            )
    return frozenset(names)


def order_for_discrete_sites(
    inverse: InverseGraph, discrete: Collection[str], enumerated: Collection[str], *, free: bool
) -> InverseGraph:
    """Return an inverse that suits discrete sites.

    Args:
        inverse: The inverse.
        discrete: The discrete latent sites.
        enumerated: Those that the guide enumerates.
        free: Whether another faithful inverse may be taken (the user left the choice).

    Raises:
        UnsupportedModelError: If enumerated sites come before model parents of theirs in each of them.
    """
    candidates = [discrete_sites_first(inverse, discrete), inverse] if free else [inverse]
    if free and enumerated:
        candidates.append(faithful_inverse(inverse.graph, "reverse"))
    candidates = [outer_sites_first(candidate) for candidate in candidates]
    conflicts = [drawn_after_enumerated(candidate, enumerated) for candidate in candidates]
    for candidate, conflict in zip(candidates, conflicts, strict=True):
        if not conflict:
            return candidate
    named = "; ".join(f"{site}: {', '.join(parents)}" for site, parents in conflicts[0].items())
    raise UnsupportedModelError(
        "Expected the model's parents of enumerated sites to be sampled before these, or enumerated as well; the "
        f"inverse {inverse.order!r} samples some given the enumerated values ({named}), which Pyro cannot do. Use "
        "inverse='reverse', which follows the model's order, or enumerate_sites=True."
    )
