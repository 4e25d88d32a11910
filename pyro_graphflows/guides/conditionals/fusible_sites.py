"""Which latent sites can be fused with their prior, and after which run of the model their prior is known.

The conditional of a site is fused with the model's own distribution of that site where all its latent parents *in the
model* are sampled before it. They are then among its parents in a faithful inverse, so that nothing new is looked at.
One run of the model at the values sampled so far gives the distributions of all sites whose latent parents have values
by then. As an example, ``tau, mu -> theta -> x`` sampled in the order ``tau, mu, theta`` needs one run: ``tau`` and
``mu`` have no latent parents.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.model_graph import ModelGraph, Node, listed

__all__ = ["FusionPlan", "SiteFusion", "fusible_sites"]


@dataclass(frozen=True)
class SiteFusion:
    """Whether a site can be fused.

    Attributes:
        site: The site.
        depth: The number of the run that gives its prior: 0 where no latent site is above it, so that reading the call
            is enough; None where the site cannot be fused.
        reason: Why it cannot be fused; None where it can.
    """

    site: Node
    depth: int | None
    reason: str | None

    @property
    def fusible(self) -> bool:
        """Whether the site can be fused."""
        return self.reason is None


@dataclass(frozen=True)
class FusionPlan:
    """Which sites can be fused, and the runs that their priors need.

    Attributes:
        sites: The outcome for each latent site.
        runs: For each depth, the sites whose priors are then known. Those of depth 0 have no latent parents.
        stages: For each depth, the position of the stage of sampling before which the run takes place.
    """

    sites: Mapping[Node, SiteFusion]
    runs: tuple[tuple[Node, ...], ...]
    stages: tuple[int, ...]

    @property
    def depth(self) -> int:
        """The number of runs of the model beside the reading of the call."""
        return len(self.runs) - 1


def fusible_sites(
    graph: ModelGraph,
    inverse: InverseGraph,
    *,
    stages: Sequence[Sequence[Node]] | None = None,
    enumerated: Collection[Node] = (),
    excluded: Mapping[Node, str] | None = None,
) -> FusionPlan:
    """Say which latent sites can be fused with their prior, why others cannot, and which runs of the model that takes.

    Args:
        graph: The model graph.
        inverse: The guide's factorisation.
        stages: The latent sites in the order in which the guide draws them, those drawn together in one stage; by
            default one stage for each site in ``inverse.sampling_order``.
        enumerated: Sites that the guide enumerates.
        excluded: Sites that must not be fused for reasons that the graph does not show (random networks in the prior,
            parents outside of the graph, no coordinate), with these reasons.

    Returns:
        The plan. A run happens as late as it can, so that it serves as many sites as it can.

    Raises:
        GraphflowsError: If the stages are not the latent sites of the graph, each once.

    Example:
        >>> graph = ModelGraph([("tau", "theta"), ("mu", "theta"), ("theta", "x")], observed=["x"],
        ...                    plates={"theta": ["schools"], "x": ["schools"]})
        >>> top_down = InverseGraph(graph, {"tau": ["x"], "mu": ["tau", "x"], "theta": ["tau", "mu", "x"]})
        >>> fusible_sites(graph, top_down).runs
        (('tau', 'mu'), ('theta',))
        >>> bottom_up = InverseGraph(graph, {"theta": ["x"], "tau": ["theta"], "mu": ["tau", "theta"]})
        >>> fusible_sites(graph, bottom_up).sites["theta"].reason
        "its model parents 'tau', 'mu' are sampled after it"
    """
    if stages is None:
        stages = [(site,) for site in inverse.sampling_order]
    drawn = [site for stage in stages for site in stage]
    if len(drawn) != len(graph.latent) or set(drawn) != set(graph.latent):
        raise GraphflowsError(
            f"Expected stages of the latent sites {listed(graph.latent)}, each once; got {listed(drawn)}."
        )
    stage_of = {site: i for i, stage in enumerate(stages) for site in stage}
    excluded = excluded or {}
    reasons = {
        site: excluded[site] if site in excluded else _obstacle(graph, inverse, site, stage_of, enumerated)
        for site in drawn
    }
    above = {site: [p for p in graph.parents(site) if p in stage_of] for site in drawn}
    fused = [site for site in drawn if reasons[site] is None]
    runs: list[tuple[Node, ...]] = [tuple(site for site in fused if not above[site])]
    starts = [0]
    depth = dict.fromkeys(runs[0], 0)
    for i, stage in enumerate(stages):
        if any(reasons[site] is None and site not in depth for site in stage):
            known = tuple(
                site
                for site in fused
                if site not in depth and all(stage_of[parent] < i for parent in above[site])
            )
            depth.update(dict.fromkeys(known, len(runs)))
            runs.append(known)
            starts.append(i)
    return FusionPlan(
        MappingProxyType({site: SiteFusion(site, depth.get(site), reasons[site]) for site in drawn}),
        tuple(runs),
        tuple(starts),
    )


def _obstacle(
    graph: ModelGraph,
    inverse: InverseGraph,
    site: Node,
    stage_of: Mapping[Node, int],
    enumerated: Collection[Node],
) -> str | None:
    """Return why a site cannot be fused; None if it can."""
    parents = graph.parents(site)
    summed = [p for p in parents if graph.role(p) == "marginalised" or p in enumerated]
    if summed:
        return f"its model {_named(summed)} summed over or enumerated"
    if site in enumerated:
        return "it is enumerated"
    late = [p for p in parents if p in stage_of and stage_of[p] >= stage_of[site]]
    if late:
        return f"its model {_named(late)} sampled after it"
    unread = [p for p in parents if p in stage_of and p not in inverse.parents[site]]
    if unread:
        return f"its model {_named(unread)} not among its parents in the inverse {inverse.order!r}"
    inner = [
        p for p in parents if graph.role(p) != "input" and set(graph.plates[site]) < set(graph.plates[p])
    ]
    if inner:
        return f"its model {_named(inner)} in a plate that it is not in"
    return None


def _named(parents: Sequence[Node]) -> str:
    names = ", ".join(repr(str(parent)) for parent in parents)
    return f"parents {names} are" if len(parents) > 1 else f"parent {names} is"
