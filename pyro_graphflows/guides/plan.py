"""The compiler's plan: which sites are sampled together, in what order, and what each is conditioned on.

An inverse graph says which nodes a latent site looks at. The plan turns it into *blocks*: sites in the same
plates that one network serves, level by level. What a block's sites look at outside of it enters the block's network
as *context*: elementwise where the plates agree, broadcast from outer plates. What is in a plate that a site is
not in (the data of a group, for the group's own variable) comes in as a summary over the plate, or cannot be an
input; the site then has parameters for each element of its plates, beside the network of what it can see
(:mod:`~pyro_graphflows.guides.inputs`). Blocks are made as large as the inverse allows, so that the number of
network calls is the number of levels and not the number of sites.

A plan is complete when it is made, and nothing changes it.
"""

import hashlib
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.graphs.separation import violated_independencies
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.inputs import MOST_FITTED, Coupling, InputPlan, Summary
from pyro_graphflows.guides.summed_sites import SummedSite

__all__ = [
    "BlockPlan",
    "Conditioning",
    "Description",
    "Plan",
    "PriorPlan",
    "make_blocks",
    "mean_field_condition",
    "readers_of",
    "ways_in",
    "with_embeddings",
    "with_scores",
]


@dataclass(frozen=True)
class PriorPlan:
    """Which sites are fused, and the runs of the model that give their priors.

    Attributes:
        runs: For each depth the sites whose priors are known after its run; those of depth 0 have no latent parents.
        stages: For each depth the number of the level before which the run takes place.
        constant: The sites of depth 0 whose priors depend on nothing in a call, the model's parameters apart.
        ranks: For each latent site the numbers of batch and of event dimensions of its values.
        batches: Whether a run of the model takes values with further dimensions on the left.
        checked: Whether priors with a parameter out of its range are refused, or kept for others to see.
    """

    runs: tuple[tuple[str, ...], ...] = ((),)
    stages: tuple[int, ...] = (0,)
    constant: frozenset[str] = frozenset()
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    batches: bool = True
    checked: bool = True

    @cached_property
    def sites(self) -> frozenset[str]:
        """The fused sites."""
        return frozenset(site for run in self.runs for site in run)


class Description(str):
    """Text that prints itself at the interactive prompt."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Conditioning:
    """One node outside a block that the block's network sees, and how it comes in; or a summary of several.

    Attributes:
        name: The node, or the name of a summary.
        how: ``"same"``, ``"broadcast"`` or ``"pooled"``.
        summary: What a summary is made of.
        score_of: The site whose score this is.
    """

    name: str
    how: str
    summary: Summary | None = None
    score_of: str | None = None


@dataclass(frozen=True)
class BlockPlan:
    """Latent sites in the same plates that are sampled together, level by level.

    Attributes:
        plates: The plates around every site of the block, outer to inner.
        levels: The sites; those of one level depend on context and on earlier levels only.
        context: The nodes outside the block that its network reads, in graph order, and summaries.
        parents: For each site, the parents in the inverse that its network sees (context and sites of earlier
            levels); instead of pooled parents, their summary if there is one.
        per_element: The sites with parameters for each element of their plates, since some of their parents
            are in plates that they are not in.
        non_exchangeable: For sites that need an affine map for each index of some plates, these plates.
        at_rows: For those of them whose maps hold for the rows that some nodes had at set-up: these nodes.
        fitted: Those of them whose maps are for the data that the guide is fitted to, and are there only if it starts
            from draws for these.
        coupled: The sites whose copies are drawn jointly across plates.
        fused: The sites whose conditionals are their priors times a factor.
        summed: Those that may have one factor for each element of a plate instead.
        by_shape: Those that the start may leave without their prior, where they fit joint samples better.
    """

    plates: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]
    context: tuple[Conditioning, ...]
    parents: Mapping[str, tuple[str, ...]]
    per_element: tuple[str, ...] = ()
    non_exchangeable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    at_rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fitted: tuple[str, ...] = ()
    coupled: Mapping[str, Coupling] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    summed: Mapping[str, SummedSite] = field(default_factory=dict)
    by_shape: tuple[str, ...] = ()

    @property
    def only_summed(self) -> frozenset[str]:
        """The sites that are fused only if they have a factor for each element of a plate."""
        return frozenset(site for site, each in self.summed.items() if each.only_summed)

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The sites in sampling order."""
        return tuple(site for level in self.levels for site in level)


@dataclass(frozen=True)
class Plan:
    """What a guide does at each call, and why.

    Attributes:
        graph: The graph of the model's sites.
        inverse: The factorisation, over sites.
        inputs: How what is in other plates comes in.
        blocks: The blocks in sampling order.
        analytic_kl: For each site whether its KL term may be analytic.
        labels: What is said of a site beside its inputs.
        ways: For pairs (parent, site), how the parent comes in where that is not elementwise.
        changing: The sites whose support depends on other latent sites, and these.
        enumerated: The sites that the guide marks for enumeration.
        copies: The Delta sites of the model that the guide repeats.
        notes: Notes on the model as it was traced.
        hints: What else could be asked for.
        priors: Which sites are fused with their priors, and the runs of the model that give these.
        not_fused: Why sites that depend on others in the model are not fused.
        judged: The inverse whose faithfulness counts, where it is another than ``inverse``: of elements, or with plates
            nested by an index.
    """

    graph: ModelGraph
    inverse: InverseGraph
    inputs: InputPlan
    blocks: tuple[BlockPlan, ...]
    analytic_kl: Mapping[str, bool]
    labels: Mapping[str, str] = field(default_factory=dict)
    ways: Mapping[tuple[object, object], str] = field(default_factory=dict)
    changing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    enumerated: frozenset[str] = frozenset()
    copies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    judged: InverseGraph | None = None
    priors: PriorPlan = field(default_factory=PriorPlan)
    not_fused: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> bytes:
        """Return what tells plans apart whose networks read other things, or in another order."""
        read = [
            (b.plates, b.levels, [node.name for node in b.context], sorted(b.parents.items()), b.per_element)
            for b in self.blocks
        ]
        return hashlib.sha256(repr(read).encode()).digest()

    def describe(
        self, notes: Sequence[str] = (), summed: Collection[str] = (), alone: Collection[str] = ()
    ) -> Description:
        """Return the plan in words: a line for each latent site, in sampling order, and what is not faithful.

        Args:
            notes: Further notes, of the start.
            summed: The sites with one factor for each element of a plate.
            alone: The sites that the start left without their prior.
        """
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
                    fused = site in block.fused and (site not in block.only_summed or site in summed)
                    fused = fused and site not in alone
                    term = "analytic KL" if self.analytic_kl[site] and not fused else "sampled KL"
                    kind = "per-element parameters" if site in block.per_element else "amortised"
                    label = ", fused with its prior" if fused else ""
                    label += " and one factor for each element" if site in summed else ""
                    label += f", {self.labels[site]}" if site in self.labels else ""
                    lines.append(f"  level {depth}: {site} | {looks or 'nothing'}  [{kind}, {term}{label}]")
                    lines += [f"    {remark}" for remark in self.inputs.remarks.get(site, ())]
                    if site in self.not_fused:
                        lines.append(f"    not fused with its prior: {self.not_fused[site]}")
                    if site in alone:
                        lines.append("    not fused with its prior: joint samples are likelier without it")
        if graph.marginalised:
            lines.append(f"Marginalised (no factor): {', '.join(map(str, graph.marginalised))}.")
        lines += [
            f"Note: {note}" for note in (*self.notes, *notes, *self._missing_dependences(), *self.hints)
        ]
        return Description("\n".join(lines))

    def missing_with(self, observed: Collection[str]) -> tuple[tuple[str, str], ...]:
        """Return the dependences that are missing where some latent sites are observed, beside those always missing.

        Sites with per-element parameters read no data, these sites' values neither: they fit them.

        Args:
            observed: Sites that are latent in the plan and have data in a call.

        Returns:
            Pairs (site, other site) of which the first should depend on the second.
        """
        inverse = self.judged or self.inverse
        rest = [site for site in inverse.sampling_order if site not in observed]
        then = InverseGraph(
            inverse.graph.with_observed(observed),
            {site: inverse.parents[site] for site in rest},
            sampling_order=rest,
            coupled={site: plates for site, plates in inverse.coupled.items() if site in rest},
        )
        always = {frozenset((each.node, each.other)) for each in violated_independencies(inverse)}
        found = {(each.node, each.other): None for each in violated_independencies(then)}
        return tuple(
            pair for pair in found if frozenset(pair) not in always and pair[0] not in self.inputs.per_element
        )

    def require_served(self, observed: Collection[str]) -> None:
        """Refuse a call in which some latent sites are observed if the guide is not faithful then.

        Args:
            observed: Sites that are latent in the plan and have data in a call.

        Raises:
            UnsupportedModelError: If a dependence is missing, beside those always missing.
        """
        missing = self.missing_with(observed)
        if missing:
            site, other = missing[0]
            raise UnsupportedModelError(
                f"Expected data for {site!r} too where there are some for {other!r}: {site!r} depends on it, and is "
                f"sampled before {other!r} without looking at it. Name the optional sites in another order "
                f"(optional={[other, site]}), or set up a guide of its own for such calls."
            )

    def _missing_dependences(self) -> list[str]:
        missing = list(violated_independencies(self.judged or self.inverse))
        if not missing:
            return []
        named = "; ".join(
            f"{statement.node} of {statement.other} given {', '.join(map(str, statement.given)) or 'nothing'}"
            for statement in missing[:3]
        )
        return [
            f"not faithful: the inverse asserts {len(missing)} independencies that the posterior does not have: "
            f"{named}{'; ...' if len(missing) > 3 else ''}. Use inverse='auto'."
        ]

    def _input(self, parent: object, site: object) -> str:
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
        site: marginalised.isdisjoint(parents := graph.parents(site))
        and nx.descendants(dag, site).isdisjoint(parents)
        for site in graph.latent
    }


def make_blocks(
    inverse: InverseGraph, inputs: InputPlan, readable: Collection[str], kinds: Mapping[str, Hashable]
) -> tuple[BlockPlan, ...]:
    """Group the sites of an inverse into blocks.

    Args:
        inverse: The guide's factorisation.
        inputs: How what is in other plates comes in.
        readable: The nodes whose values can be network inputs; others are left out of the context.
        kinds: For each site its kind. Only sites of the same kind share a block.

    Returns:
        The blocks, made greedily in sampling order: a block takes in every site of its plates whose
        parents are in earlier blocks or in the block itself.
    """
    graph = inverse.graph
    latent = set(graph.latent)
    done: set[str] = set()
    blocks = []
    remaining = list(inverse.sampling_order)
    rank = {node: i for i, node in enumerate(graph.nodes)}
    while remaining:
        plates, first = graph.plates[remaining[0]], kinds[remaining[0]]
        depth: dict[str, int] = {}
        for site in remaining:  # parents come first in the sampling order
            latents = [parent for parent in inverse.parents[site] if parent in latent]
            alike = graph.plates[site] == plates and kinds[site] == first
            pooled = {member for summary in inputs.summaries.get(site, ()) for member in summary.members}
            if alike and pooled & latent <= done and all(p in done or p in depth for p in latents):
                depth[site] = 1 + max((depth[p] for p in latents if p in depth), default=-1)
        levels: list[list[str]] = [[] for _ in range(1 + max(depth.values()))]
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
            if parent not in depth and (parent in latent or parent in readable)
        }
        summaries = {s.name: s for site in depth for s in inputs.summaries.get(site, ())}
        for site in depth:
            seen[site] += tuple(summary.name for summary in inputs.summaries.get(site, ()))
        blocks.append(
            BlockPlan(
                plates=plates,
                levels=tuple(map(tuple, levels)),
                context=(
                    *(Conditioning(name, context[name]) for name in sorted(context, key=rank.__getitem__)),
                    *(Conditioning(name, "pooled", summary) for name, summary in summaries.items()),
                ),
                parents=seen,
                per_element=tuple(site for site in depth if site in inputs.per_element),
                non_exchangeable={
                    site: inputs.non_exchangeable[site] for site in depth if site in inputs.non_exchangeable
                },
                at_rows={site: inputs.at_rows[site] for site in depth if site in inputs.at_rows},
                coupled={site: inputs.coupled[site] for site in depth if site in inputs.coupled},
            )
        )
        done |= set(depth)
        remaining = [site for site in remaining if site not in depth]
    return tuple(blocks)


def with_embeddings(blocks: Sequence[BlockPlan], embedded: Collection[str]) -> tuple[BlockPlan, ...]:
    """Return blocks whose sites read embeddings of some nodes in their place, where these come in elementwise.

    Args:
        blocks: The blocks.
        embedded: The nodes.
    """
    found = []
    for block in blocks:
        new = {
            node.name: Conditioning(name, "pooled", summary)
            for node in block.context
            if node.name in embedded
            for summary in [Summary((node.name,), (), embedded=True)]
            for name in [summary.name]
        }
        names = {name: node.name for name, node in new.items()}
        context = (
            *(node for node in block.context if node.name not in new),
            *new.values(),
        )
        parents = {
            site: tuple(names.get(name, name) for name in seen) for site, seen in block.parents.items()
        }
        found.append(replace(block, context=context, parents=parents))
    return tuple(found)


def with_scores(
    blocks: Sequence[BlockPlan], names: Mapping[str, str], left_out: Mapping[str, Collection[str]]
) -> tuple[BlockPlan, ...]:
    """Return blocks whose sites read scores too.

    Args:
        blocks: The blocks.
        names: For each site that reads one, the name of its score.
        left_out: The nodes that a site does not read any more.
    """
    found = []
    for block in blocks:
        mine = {site: names[site] for site in block.sites if site in names}
        scores = tuple(Conditioning(name, "same", score_of=site) for site, name in mine.items())
        parents = {
            site: tuple(name for name in seen if name not in left_out.get(site, ()))
            for site, seen in block.parents.items()
        }
        parents.update({site: (*parents[site], name) for site, name in mine.items()})
        read = {name for seen in parents.values() for name in seen}
        context = tuple(node for node in (*block.context, *scores) if node.name in read)
        found.append(replace(block, context=context, parents=parents))
    return tuple(found)


def with_fitted_maps(
    blocks: Sequence[BlockPlan],
    sites: Collection[str],
    data: Collection[str],
    plates: Mapping[str, PlateState],
) -> tuple[BlockPlan, ...]:
    """Return blocks in which sites that read the data of their own plates may have a map for each element.

    A network that effects share follows the data of all elements alike, and where they are few, or say little, it is
    nats off. A guide that fits one data set may do without: its maps hold for the rows of these data.

    Args:
        blocks: The blocks.
        sites: The sites whose families have such maps.
        data: The nodes that are data, and no indices.
        plates: The plates at set-up.
    """
    found = []
    for block in blocks:
        around = [plates[name] for name in block.plates]
        size = math.prod(plate.full_size for plate in around)
        plain = {node.name: node.how for node in block.context if node.summary is None and not node.score_of}
        other = {*block.per_element, *block.non_exchangeable, *block.coupled, *block.summed}
        rows = {}
        for site in block.sites if 1 < size <= MOST_FITTED and not any(p.subsampled for p in around) else ():
            read = tuple(name for name in block.parents[site] if name in data and name in plain)
            if site in sites and site not in other and any(plain[name] == "same" for name in read):
                rows[site] = read
        own = {**block.non_exchangeable, **dict.fromkeys(rows, block.plates)}
        at_rows = {**block.at_rows, **rows}
        found.append(replace(block, non_exchangeable=own, at_rows=at_rows, fitted=tuple(rows)))
    return tuple(found)


def readers_of(blocks: Sequence[BlockPlan], latent: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the observed nodes and inputs whose values latent sites read, and these sites.

    Args:
        blocks: The blocks of a plan.
        latent: The latent sites.
    """
    found: dict[str, list[str]] = {}
    for block in blocks:
        summaries = {node.name: node.summary for node in block.context if node.summary is not None}
        names = {node.name for node in block.context}
        for site in block.sites:
            for parent in block.parents[site]:
                summary = summaries.get(parent)
                if summary is not None:
                    indices = [index for _, _, index in summary.segments]
                    seen = [*summary.members, *indices, *([] if summary.index is None else [summary.index])]
                else:
                    seen = [parent] if parent in names else []
                for name in seen:
                    if name not in latent and site not in found.setdefault(name, []):
                        found[name].append(site)
    return {name: tuple(sites) for name, sites in found.items()}


def ways_in(
    inverse: InverseGraph, inputs: InputPlan, without_data: Collection[str]
) -> dict[tuple[object, object], str]:
    """Return for pairs (parent, site) how the parent comes in, where a summary or an index has to do with it."""
    ways: dict[tuple[object, object], str] = {}
    for site, found in inputs.summaries.items():
        for summary in found:
            how = "one by one" if summary.one_by_one else "pooled"
            ways.update({(m, site): how for m in summary.members if inverse.how[m, site] == "pooled"})
            if summary.index is not None:
                ways[summary.index, site] = "index"
            for inner, _, index in summary.segments:
                ways[index, site] = "index"
                inside = [m for m in summary.members if inner in inverse.graph.plates[m]]
                ways.update({(m, site): f"pooled by {index}" for m in inside})
    for site, parents in inverse.parents.items():
        ways.update({(parent, site): "no data to read" for parent in parents if parent in without_data})
        for summary in inputs.summaries.get(site, ()):
            if summary.index is not None:
                ways[summary.members[0], site] = f"looked up by {summary.index}"
    return ways
