"""Which sites have their prior times one factor for each element of a plate.

The posterior of a site given what is in a plate that it is not in is its prior times one factor for each element of the
plate, if these are independent given the site and all that is sampled before it: effects of a group given their
location, their scale and the scale of the noise, and that location given these scales. It is not so for a scale while
the location is not known: the elements tell it by how they differ from each other.

What is known of the elements and says nothing of the site by itself, as the effects of the rows in a crossed design say
nothing of a column, may be dependent: the data are independent given it.
"""

from collections.abc import Collection, Sequence

import networkx as nx

from pyro_graphflows.graphs.structures import InverseGraph
from pyro_graphflows.guides.conditionals.pooling import pooling_orders
from pyro_graphflows.guides.plan import InputPlan, Summary, SummedSite

__all__ = ["sites_to_sum"]


def sites_to_sum(
    inverse: InverseGraph, inputs: InputPlan, scalars: Collection[str], readable: Collection[str]
) -> dict[str, SummedSite]:
    """Return the sites that may have a factor for each element.

    Args:
        inverse: The guide's factorisation.
        inputs: How what is in other plates comes in.
        scalars: The sites that are asked about, of one continuous number.
        readable: The nodes whose values can be network inputs.
    """
    found = {}
    for site in scalars:
        summaries = inputs.summaries.get(site, ())
        barred = site in inputs.per_element or site in inputs.non_exchangeable or site in inputs.coupled
        if barred or len(summaries) != 1 or summaries[0].one_by_one or summaries[0].index is not None:
            continue
        each = _factorised(inverse, site, summaries[0], readable)
        if each is not None:
            found[site] = each
    return found


def _factorised(
    inverse: InverseGraph, site: str, summary: Summary, readable: Collection[str]
) -> SummedSite | None:
    graph = inverse.graph
    around = {node: summary.inside(plates) for node, plates in graph.plates.items()}
    orders = pooling_orders(summary.over, list(around.values()))
    if len(orders) != 1:
        return None
    plate = orders[0][0]
    dag = graph.to_networkx()
    below = nx.descendants(dag, site)
    responses = tuple(name for name in summary.members if name in below)
    how = inverse.how
    above = [p for p in inverse.parents[site] if how[p, site] != "pooled" and p not in summary.members]
    indices = {index for _, _, index in summary.segments}
    above = [name for name in above if name not in indices]
    latent = set(graph.latent)
    if not responses or below.intersection(
        above
    ):  # what depends on the site beside the plate is not in the sum
        return None
    if any(name not in latent and name not in readable for name in above):
        return None
    if not all(plate in around[name] for name in summary.members):
        return None
    inside = {n for n in dag if plate in around[n]}
    covariates = [name for name in summary.members if name not in responses]
    if not (
        _independent(dag, inside, summary.members, {site, *above})
        or _given_covariates(dag, inside, (responses, covariates), site, above)
    ):
        return None
    return SummedSite(summary.name, responses, tuple(map(str, above)))


def _independent(
    dag: nx.DiGraph, inside: Collection[str], members: Sequence[str], given: Collection[str]
) -> bool:
    """Whether members of two elements of a plate are separated by what is given outside of the plate."""
    first, second = ({(name, k) for name in members} for k in (0, 1))
    outside = {(node, -1) for node in given if node not in inside}
    return bool(nx.is_d_separator(_two_elements(dag, inside), first, second, outside))


def _given_covariates(
    dag: nx.DiGraph,
    inside: Collection[str],
    members: tuple[Sequence[str], Sequence[str]],
    site: str,
    above: Sequence[str],
) -> bool:
    """Whether data of two elements are separated by the site, what is above and their covariates, which know nothing.

    Args:
        dag: The model.
        inside: The nodes in the plate.
        members: Data that depend on the site, and the others.
        site: The site.
        above: What is sampled before it outside of the plate.
    """
    responses, covariates = members
    if not covariates:
        return False
    two = _two_elements(dag, inside)
    first, second = ({(name, k) for name in responses} for k in (0, 1))
    own, other = ({(name, k) for name in covariates} for k in (0, 1))
    outside = {(node, -1) for node in above if node not in inside}
    alone = nx.is_d_separator(two, {(site, -1)}, own | other, outside)
    return bool(alone and nx.is_d_separator(two, first, second | other, outside | own | {(site, -1)}))


def _two_elements(dag: nx.DiGraph, inside: Collection[str]) -> nx.DiGraph:
    """Return the graph with two elements of a plate: nodes are pairs of a name and 0, 1, or -1 outside."""
    two = nx.DiGraph()

    def copies(node: str) -> list[tuple[str, int]]:
        return [(node, 0), (node, 1)] if node in inside else [(node, -1)]

    for node in dag:
        two.add_nodes_from(copies(node))
    for parent, child in dag.edges:
        for one in copies(parent):
            two.add_edges_from(
                (one, other) for other in copies(child) if -1 in (one[1], other[1]) or one[1] == other[1]
            )
    return two
