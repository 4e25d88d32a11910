"""The compiler's plan: which sites are sampled together, in what order, and what each is conditioned on.

An inverse graph says which nodes a latent site looks at. The plan turns it into *blocks*: sites in the same
plates that one network serves, level by level. What a block's sites look at outside of it enters the block's network
as *context*: elementwise where the plates agree, broadcast from outer plates. What is in a plate that a site is
not in (the data of a group, for the group's own variable) comes in as a summary over the plate, or cannot be an
input; the site then has free parameters for each element of its plates, beside the network of what it can see
(:mod:`~pyro_graphflows.guides.pool_plan`). Blocks are made as large as the inverse allows, so that the number of
network calls is the number of levels and not the number of sites.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx

from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.guides.pool_plan import PoolPlan
from pyro_graphflows.guides.summaries import Chaining, Summary

__all__ = ["Block", "Conditioning", "Plan", "make_plan", "mean_field_condition"]


@dataclass(frozen=True)
class Conditioning:
    """One node outside a block that the block's network sees, and how it comes in; or a summary of several.

    Attributes:
        name: The node, or the name of a summary.
        how: ``"same"``, ``"broadcast"`` or ``"pooled"``.
        observed: Whether it is data (an observed site or an input) rather than a latent site.
        summary: What a summary is made of.
    """

    name: str
    how: str
    observed: bool
    summary: Summary | None = None


@dataclass(frozen=True)
class Block:
    """Latent sites in the same plates that are sampled together, level by level.

    Attributes:
        plates: The plates around every site of the block, outer to inner.
        levels: The sites; those of one level depend on context and on earlier levels only.
        context: The nodes outside the block that its network sees, in graph order.
        parents: For each site, the parents in the inverse that its network sees (context and sites of earlier
            levels); instead of pooled parents, their summary if there is one.
        free: The sites with free parameters for each element of their plates, since some of their parents
            are in plates that they are not in.
        chained: The sites whose copies are drawn jointly across plates.
        unlike: For sites that need an affine map of their own for each index of some plates, these plates.
    """

    plates: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]
    context: tuple[Conditioning, ...]
    parents: dict[str, tuple[str, ...]]
    free: tuple[str, ...] = ()
    unlike: dict[str, tuple[str, ...]] = field(default_factory=dict)
    chained: dict[str, Chaining] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites in sampling order."""
        return tuple(site for level in self.levels for site in level)


@dataclass(frozen=True)
class Plan:
    """The blocks in sampling order; for each site whether its KL term may be analytic, a label, remarks.

    Of pairs (parent, site): the index by which the parent's element is looked up; how a parent comes in where that is
    not elementwise.
    """

    graph: ModelGraph
    inverse: InverseGraph
    blocks: tuple[Block, ...]
    analytic_kl: dict[str, bool]
    labels: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    looked_up: dict[tuple[object, object], str] = field(default_factory=dict)
    ways: dict[tuple[object, object], str] = field(default_factory=dict)

    def describe(self, notes: tuple[str, ...] = ()) -> str:
        """Return the plan in words: a line for each latent site, in sampling order."""
        inverse, graph = self.inverse, self.graph
        lines = [
            f"Inverse: order {inverse.order!r}, {_number(inverse.num_edges, 'edge')}, "
            f"{_number(len(inverse.levels), 'sampling level')}, {_number(len(self.blocks), 'block')}."
        ]
        for index, block in enumerate(self.blocks):
            where = (
                f"plate{'s' * (len(block.plates) > 1)} {', '.join(block.plates)}"
                if block.plates
                else "no plate"
            )
            lines.append(f"Block {index} ({where}, {_number(len(block.levels), 'level')}):")
            for depth, level in enumerate(block.levels):
                for site in level:
                    looks = ", ".join(self._input(parent, site) for parent in inverse.parents[site])
                    term = "analytic KL" if self.analytic_kl[site] else "sampled KL"
                    kind = "free parameters" if site in block.free else "amortised"
                    label = f", {self.labels[site]}" if site in self.labels else ""
                    lines.append(f"  level {depth}: {site} | {looks or 'nothing'}  [{kind}, {term}{label}]")
                    lines += [f"    {remark}" for remark in self.remarks.get(site, ())]
        if graph.marginalised:
            lines.append(f"Marginalised (no factor): {', '.join(map(str, graph.marginalised))}.")
        lines += [f"Note: {note}" for note in notes]
        return "\n".join(lines)

    def _input(self, parent: object, site: object) -> str:
        if (parent, site) in self.looked_up:
            return f"{parent} (looked up by {self.looked_up[parent, site]})"
        if (parent, site) in self.ways:
            return f"{parent} ({self.ways[parent, site]})"
        how = self.inverse.how[parent, site]
        if how == "pooled":  # and no summary has it
            how = "not read"
        return str(parent) if how == "same" else f"{parent} ({how})"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def mean_field_condition(graph: ModelGraph, inverse: InverseGraph) -> dict[str, bool]:
    r"""Return for each latent site whether its KL term may be computed analytically.

    :class:`~pyro.infer.TraceMeanField_ELBO` replaces the term of a site ``z`` by the KL divergence between the
    guide's and the model's conditional at the sampled values of their parents. That is right if, and for generic
    parameters only if, no model parent of ``z`` descends from ``z`` in the guide.

    Args:
        graph: The model graph.
        inverse: The guide's factorisation.

    Returns:
        A dict from site to truth value.

    Example:
        >>> graph = ModelGraph([("a", "b"), ("b", "x")], observed=["x"])
        >>> mean_field_condition(graph, InverseGraph(graph, {"a": ["b"], "b": ["x"]}))
        {'a': True, 'b': False}
    """
    dag = inverse.to_networkx()
    marginalised = set(graph.marginalised)
    return {
        site: marginalised.isdisjoint(graph.parents(site))
        and nx.descendants(dag, site).isdisjoint(graph.parents(site))
        for site in graph.latent
    }


def make_plan(
    inverse: InverseGraph,
    kind: Callable[[str], Hashable] = lambda _: None,
    pooling: PoolPlan | None = None,
) -> Plan:
    """Group the sites of an inverse into blocks.

    Args:
        inverse: The guide's factorisation.
        kind: Only sites of the same kind share a block.
        pooling: How what is in other plates comes in; by default not at all, and the sites have free parameters.

    Returns:
        The plan. Blocks are made greedily in sampling order: a block takes in every site of its plates whose
        parents are in earlier blocks or in the block itself.
    """
    graph = inverse.graph
    latent = set(graph.latent)
    if pooling is None:
        wanting = {site for (_, site), how in inverse.how.items() if how == "pooled"}
        pooling = PoolPlan(free=frozenset(wanting))
    done: set = set()
    blocks = []
    remaining = list(inverse.sampling_order)
    rank = {node: i for i, node in enumerate(graph.nodes)}
    while remaining:
        plates, first = graph.plates[remaining[0]], kind(remaining[0])
        depth: dict = {}
        for site in remaining:  # parents come first in the sampling order
            latents = [parent for parent in inverse.parents[site] if parent in latent]
            alike = graph.plates[site] == plates and kind(site) == first
            pooled = {member for summary in pooling.summaries.get(site, ()) for member in summary.members}
            if alike and pooled & latent <= done and all(p in done or p in depth for p in latents):
                depth[site] = 1 + max((depth[p] for p in latents if p in depth), default=-1)
        levels: list[list] = [[] for _ in range(1 + max(depth.values()))]
        for site in remaining:
            if site in depth:
                levels[depth[site]].append(site)
        seen = {
            site: tuple(parent for parent in inverse.parents[site] if inverse.how[parent, site] != "pooled")
            for site in depth
        }
        context = {
            parent: inverse.how[parent, site]
            for site, parents in seen.items()
            for parent in parents
            if parent not in depth
        }
        summaries = {s.name: s for site in depth for s in pooling.summaries.get(site, ())}
        for site in depth:
            seen[site] += tuple(summary.name for summary in pooling.summaries.get(site, ()))
        blocks.append(
            Block(
                plates=plates,
                levels=tuple(map(tuple, levels)),
                context=(
                    *(
                        Conditioning(name, context[name], name not in latent)
                        for name in sorted(context, key=rank.__getitem__)
                    ),
                    *(
                        Conditioning(name, "pooled", latent.isdisjoint(summary.members), summary)
                        for name, summary in summaries.items()
                    ),
                ),
                parents=seen,
                free=tuple(site for site in depth if site in pooling.free),
                unlike={site: pooling.unlike[site] for site in depth if site in pooling.unlike},
                chained={site: pooling.chained[site] for site in depth if site in pooling.chained},
            )
        )
        done |= set(depth)
        remaining = [site for site in remaining if site not in depth]
    remarks = {site: list(lines) for site, lines in pooling.remarks.items()}
    analytic = mean_field_condition(graph, inverse)
    analytic.update(dict.fromkeys(pooling.chained, False))
    looked_up: dict[tuple[object, object], str] = {
        (summary.members[0], site): summary.index
        for site, summaries in pooling.summaries.items()
        for summary in summaries
        if summary.index is not None
    }
    ways = _ways_in(inverse, pooling.summaries)
    return Plan(graph, inverse, tuple(blocks), analytic, remarks=remarks, looked_up=looked_up, ways=ways)


def _ways_in(
    inverse: InverseGraph, summaries: Mapping[str, Sequence[Summary]]
) -> dict[tuple[object, object], str]:
    """Return for pairs (parent, site) how the parent comes in, where a summary or an index has to do with it."""
    ways: dict[tuple[object, object], str] = {}
    for site, found in summaries.items():
        for summary in found:
            how = "one by one" if summary.one_by_one else "pooled"
            ways.update({(m, site): how for m in summary.members if inverse.how[m, site] == "pooled"})
            if summary.index is not None:
                ways[summary.index, site] = "index"
            for inner, _, index in summary.segments:
                ways[index, site] = "index"
                inside = [m for m in summary.members if inner in inverse.graph.plates[m]]
                ways.update({(m, site): f"pooled by {index}" for m in inside})
    return ways
