"""Which sites of a guide are fused with their priors, and why others are not.

A site can be fused where all its latent parents in the model are sampled before it (:func:`fusible_sites`), its prior
is normal in a coordinate that can be computed, the prior is the same in each run of the model, and its family has a
factor for it. With ``fusion="auto"`` a site is left alone where that would change nothing but the form of its
parameters (a prior that is the same normal in each call; one that is linear in latent parents, with one scale, of a
site whose parameters come from networks), and where it would take many runs.

**Which sites may be.** The conditional of a site is fused with the model's own distribution of that site where all
its latent parents *in the model* are sampled before it. They are then among its parents in a faithful inverse, so
that nothing new is looked at. One run of the model at the values sampled so far gives the distributions of all sites
whose latent parents have values by then. As an example, ``tau, mu -> theta -> x`` sampled in the order ``tau, mu,
theta`` needs one run: ``tau`` and ``mu`` have no latent parents.

**Hierarchies.** Given latent sites that set the scale of other latent sites, the posterior of a scale is far from
normal (:func:`sites_of_scales`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph, Node, listed
from pyro_graphflows.guides.conditionals.contract import Family
from pyro_graphflows.guides.conditionals.model_conditionals import ModelConditionals
from pyro_graphflows.guides.plan import BlockPlan, PriorPlan
from pyro_graphflows.guides.priors import read_priors
from pyro_graphflows.guides.sites import (
    LatentSite,
    SitePrior,
    has_prior,
    is_moderate,
    is_normal_unconstrained,
    site_prior,
)
from pyro_graphflows.inspect import TracedModel

__all__ = [
    "Fusion",
    "FusionPlan",
    "FusionQuestion",
    "SiteFusion",
    "fusible_sites",
    "plan_fusion",
    "sites_of_scales",
]


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
    # Data and inputs too: the inverse says what the site may look at.
    unread = [p for p in parents if p not in inverse.parents[site]]
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


MOST_RUNS = 4  # of the model in a call, beside that of the call, with fusion="auto"
MOVES = (0.0, 0.4, -0.7)  # of unconstrained vectors, for a run with several values at once


@dataclass(frozen=True)
class FusionQuestion:
    """What is known when a guide asks which sites to fuse.

    Attributes:
        model: The model.
        arguments: Its positional and keyword arguments.
        traced: The traced model.
        sites: The latent sites.
        families: For each site the family that serves it.
        inverse: The factorisation.
        blocks: The blocks of the plan.
        enumerated: The sites that the guide enumerates.
        excluded: Sites that cannot be fused for other reasons, with these.
        indices: The indices of subsampled plates.
        summed: Sites for which fusion makes a difference whatever their priors: they may have one factor for each
            element of a plate.
        of_any_size: The same of those drawn jointly: only beside their priors do they follow numbers of elements.
    """

    model: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    traced: TracedModel
    sites: Mapping[str, LatentSite]
    families: Mapping[str, Family]
    inverse: InverseGraph
    blocks: Sequence[BlockPlan]
    enumerated: frozenset[str]
    excluded: Mapping[str, str]
    indices: Mapping[str, Tensor]
    summed: Collection[str] = ()
    of_any_size: Collection[str] = ()


@dataclass(frozen=True)
class Fusion:
    """Which sites are fused.

    Attributes:
        priors: The runs that give their priors.
        reasons: Why sites that depend on others in the model are not fused.
        only_summed: The fused sites that would not be if they could not have a factor for each element of a plate.
        by_shape: The fused sites of one number whose prior is the same in each call. Without it, too, their factor
            could say all that there is to say, in another shape: the start sees which one fits.
    """

    priors: PriorPlan = field(default_factory=PriorPlan)
    reasons: Mapping[str, str] = field(default_factory=dict)
    only_summed: frozenset[str] = frozenset()
    by_shape: frozenset[str] = frozenset()


def plan_fusion(question: FusionQuestion) -> Fusion:
    """Say which sites are fused.

    Args:
        question: What is known.

    Raises:
        GraphflowsError: If a site whose family has ``fusion=True`` cannot be fused. The message names it and why.
    """
    nodes: Any = question.traced.trace.nodes
    families = question.families
    wanted = {name: families[name].can_fuse and families[name].fusion for name in question.sites}
    if not any(wanted.values()):
        return Fusion()
    excluded = dict(question.excluded)
    only_summed: set[str] = set()
    for name, site in question.sites.items():
        if not wanted[name]:
            excluded[name] = "its family has fusion=False"
        elif name not in excluded and wanted[name] == "auto" and _is_any_normal(question, name):
            if name in question.summed:
                only_summed.add(name)
            elif name not in question.of_any_size:
                excluded[name] = ""
        elif name not in excluded and not has_prior(site, nodes[name]["fn"]):
            excluded[name] = "no coordinate in which its prior is normal can be computed"
    values = {name: nodes[name]["value"].detach() for name in question.sites}
    ranks = {
        name: (len(nodes[name]["fn"].batch_shape), len(nodes[name]["fn"].event_shape))
        for name in question.sites
    }
    priors: dict[str, SitePrior] = {}
    found = _fusible(question, excluded)
    candidates = [name for run in found.runs for name in run]
    if candidates:
        excluded.update(_random_priors(question, candidates, values))
        candidates = [name for name in candidates if name not in excluded]
        priors = _read(question, candidates, values, PriorPlan(ranks=ranks))
    asked = [name for name in candidates if wanted[name] == "auto"]
    linear = _linear_sites(question, asked, values, priors)
    for name in asked:
        if name in linear or _changes_nothing(question, name, priors[name]):
            if name in question.summed:
                only_summed.add(name)
            elif name not in question.of_any_size:
                excluded[name] = ""
        elif question.sites[name].encoding is None and not is_moderate(nodes[name]["fn"]):
            excluded[name] = "its prior spans too many orders of magnitude"
    found = _fusible(question, excluded)
    if found.depth > MOST_RUNS:
        for depth, run in enumerate(found.runs):
            for name in run if depth > MOST_RUNS else ():
                if wanted[name] == "auto":
                    excluded[name] = (
                        f"its prior would take {depth} runs of the model in each call (fusion=True takes them)"
                    )
        found = _fusible(question, excluded)
    for name, each in found.sites.items():
        if wanted[str(name)] is True and each.reason is not None:
            raise GraphflowsError(
                f"Expected {str(name)!r} to be fused with its prior, as fusion=True says; {each.reason}. Use "
                "inverse='reverse', which follows the model's order, or fusion='auto'."
            )
    runs = tuple(tuple(str(name) for name in run) for run in found.runs)
    graph = question.inverse.graph
    constant = frozenset(name for name in runs[0] if not graph.parents(name))
    plan = PriorPlan(runs, found.stages, constant, ranks)
    if plan.sites:
        plan = replace(plan, batches=_takes_batches(question, plan, values))
    reasons = {
        str(name): each.reason
        for name, each in found.sites.items()
        if each.reason and wanted[str(name)] and any(p in question.sites for p in graph.parents(name))
    }
    numbers = {name for name in asked if question.sites[name].size == 1}
    by_shape = {name for name in constant & numbers if priors[name].transform is not None}
    return Fusion(plan, reasons, plan.sites & only_summed, plan.sites & by_shape)


def _fusible(question: FusionQuestion, excluded: Mapping[str, str]) -> FusionPlan:
    return fusible_sites(
        question.inverse.graph,
        question.inverse,
        stages=[level for block in question.blocks for level in block.levels],
        enumerated=question.enumerated,
        excluded=excluded,
    )


def _is_any_normal(question: FusionQuestion, name: str) -> bool:
    """Whether a site without parents has the same normal as its prior in each call; seen without a run of the model."""
    nodes: Any = question.traced.trace.nodes
    return not question.inverse.graph.parents(name) and is_normal_unconstrained(
        question.sites[name], nodes[name]["fn"]
    )


def _changes_nothing(question: FusionQuestion, name: str, prior: SitePrior) -> bool:
    """Whether a site's prior is the same normal in each call: times a factor it is any normal, as without fusion.

    So it is with the logits of a discrete site that depend on one discrete parent alone: a table has them.
    """
    graph, sites = question.inverse.graph, question.sites
    parents = graph.parents(name)
    if sites[name].encoding is not None and len(parents) == 1:
        return parents[0] in sites and sites[parents[0]].encoding is not None
    return prior.transform is None and not parents


def _linear_sites(
    question: FusionQuestion,
    candidates: Sequence[str],
    values: Mapping[str, Tensor],
    priors: Mapping[str, SitePrior],
) -> frozenset[str]:
    """Return the sites whose priors are normal with one scale, and linear in their parents, all of them latent numbers.

    Times a normal factor that is linear in what the site reads, these are the linear conditionals that there are
    without a prior, which a regression on joint samples finds exactly and which take no run of the model.
    """
    graph = question.inverse.graph
    own = {name for block in question.blocks for name in (*block.per_element, *block.non_exchangeable)}
    asked = [
        name
        for name in candidates
        if priors[name].transform is None
        and question.sites[name].encoding is None
        and name not in own
        and graph.parents(name)
        and all(p in question.sites and question.sites[p].encoding is None for p in graph.parents(name))
    ]
    if not asked:
        return frozenset()
    zero, one, other = (_read_moved(question, asked, values, move) for move in MOVES)
    return frozenset(name for name in asked if _on_a_line(zero[name], one[name], other[name]))


def _on_a_line(zero: SitePrior, one: SitePrior, other: SitePrior) -> bool:
    """Whether locations at the three moves are on a line, and scales the same."""
    expected = zero.loc + (one.loc - zero.loc) * ((MOVES[2] - MOVES[0]) / (MOVES[1] - MOVES[0]))
    same = all(torch.allclose(zero.log_scale, each.log_scale, atol=1e-4) for each in (one, other))
    if zero.scale_tril is not None:
        unit = zero.log_scale.exp().unsqueeze(-1)
        rows = [each.tril() / unit for each in (zero, one, other)]
        same = same and all(torch.allclose(rows[0], each, atol=1e-4) for each in rows[1:])
    return same and torch.allclose(
        expected, other.loc, rtol=1e-4, atol=1e-4 * float(zero.log_scale.exp().max())
    )


def _read_moved(
    question: FusionQuestion, wanted: Sequence[str], values: Mapping[str, Tensor], move: float
) -> dict[str, SitePrior]:
    moved = {name: _moved_by(question.sites[name], value, move) for name, value in values.items()}
    return _read(question, wanted, moved, PriorPlan())


def _moved_by(site: LatentSite, value: Tensor, move: float) -> Tensor:
    """Return a value at some distance in unconstrained space; of a discrete site the value itself."""
    return value if site.encoding is not None else site.transform(site.transform.inv(value) + move)


def _random_priors(
    question: FusionQuestion, candidates: Sequence[str], values: Mapping[str, Tensor]
) -> dict[str, str]:
    """Return the sites whose priors differ from run to run, and all of them where such runs are not possible."""
    args, kwargs = question.arguments
    conditionals = ModelConditionals(question.model)
    given = {"latents": values, "indices": question.indices}
    try:
        same = conditionals.is_repeatable(candidates, args, kwargs, **given)
    except UnsupportedModelError as error:
        return dict.fromkeys(candidates, f"the model cannot be run for it: {error}")
    reason = "its prior differs from run to run at the same values of its parents"
    return {name: reason for name in candidates if not same[name]}


def _read(
    question: FusionQuestion, wanted: Sequence[str], values: Mapping[str, Tensor], plan: PriorPlan
) -> dict[str, SitePrior]:
    given = {"latents": values, "observed": {}, "indices": question.indices}
    plan = replace(plan, checked=False)  # a draw may be one at which a prior is not defined; others are
    with torch.no_grad():
        return read_priors(
            ModelConditionals(question.model), wanted, question.arguments, question.sites, plan, given
        )


def _takes_batches(question: FusionQuestion, plan: PriorPlan, values: Mapping[str, Tensor]) -> bool:
    """Whether one run at several values of the latent sites gives what as many runs give."""
    wanted = sorted(plan.sites)
    moved = {name: _moved(question.sites[name], value, plan.ranks) for name, value in values.items()}
    each = _read(question, wanted, moved, replace(plan, batches=False))
    try:
        at_once = _read(question, wanted, moved, plan)
    except Exception:  # whatever a model says to values of a shape that it was not written for
        return False
    return all(_same(question.sites[name], at_once[name], each[name]) for name in wanted)


def _moved(site: LatentSite, value: Tensor, ranks: Mapping[str, tuple[int, int]]) -> Tensor:
    """Return several values near one, along a dimension on the left of all plates."""
    depth = max(batch for batch, _ in ranks.values())
    joined = torch.stack([_moved_by(site, value, move) for move in MOVES])
    missing = depth - ranks[site.name][0]
    return joined.reshape(len(MOVES), *(1,) * missing, *value.shape)


def _same(site: LatentSite, one: SitePrior, other: SitePrior) -> bool:
    pairs = [(one.loc, other.loc), (one.log_scale, other.log_scale)]
    if one.scale_tril is not None and other.scale_tril is not None:
        pairs.append((one.scale_tril, other.scale_tril))
    if one.transform is not None and other.transform is not None:
        try:
            scores = torch.broadcast_tensors(one.loc, other.loc)[0] * 0.0 + 0.3
            scores = scores.reshape(*scores.shape[:-1], *site.unconstrained_shape)
            pairs.append((one.transform(scores), other.transform(scores)))
        except RuntimeError:
            return False
    try:
        return all(bool(torch.isclose(a, b, rtol=1e-4, atol=1e-5).all()) for a, b in pairs)
    except RuntimeError:
        return False


MOST_CANDIDATES = 20  # each takes a run of the model at set-up
MOVE = 0.7  # of an unconstrained value


def sites_of_scales(
    model: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    traced: TracedModel,
    sites: Mapping[str, LatentSite],
    graph: ModelGraph,
    candidates: Sequence[str],
) -> dict[str, tuple[str, ...]]:
    """Return the sites with latent children whose priors have another scale where they have another value, and these.

    Of vectors the correlations count too: the length scale of a Gaussian process sets its scale.

    Args:
        model: The model.
        arguments: Its positional and keyword arguments.
        traced: The model as traced with them.
        sites: The latent sites.
        graph: The graph of the model's sites.
        candidates: The continuous sites that are asked about; none is found among more than ``MOST_CANDIDATES``.
    """
    nodes: Any = traced.trace.nodes
    children = {
        name: [c for c in sites if c in below and has_prior(sites[c], nodes[c]["fn"])]
        for name in candidates
        if (below := graph.children(name))
    }
    children = {name: own for name, own in children.items() if own}
    if not children or len(children) > MOST_CANDIDATES:
        return {}
    values = {name: nodes[name]["value"].detach() for name in sites}
    indices = {n: node["value"] for n, node in nodes.items() if type(node.get("fn")).__name__ == "_Subsample"}
    conditionals = ModelConditionals(model)

    def scales(at: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
        args, kwargs = arguments
        priors = conditionals(wanted, args, kwargs, latents=at, indices=indices)
        return {name: _scale_and_shape(site_prior(sites[name], priors[name])) for name in wanted}

    found = {}
    with torch.no_grad():
        for name, own in children.items():
            transform = sites[name].transform
            moved = transform(transform.inv(values[name]) + MOVE)
            try:
                before, after = scales(values, own), scales({**values, name: moved}, own)
            except GraphflowsError:  # a prior that is not defined there, or a model that cannot be run for it
                continue
            changed = tuple(c for c in own if not torch.allclose(before[c], after[c], atol=1e-3))
            if changed:
                found[name] = changed
    return found


def _scale_and_shape(prior: SitePrior) -> Tensor:
    """Return the logarithm of a prior's scale, and beside it its Cholesky factor in units of that, if there is one."""
    log_scale = prior.log_scale.unsqueeze(-1)
    return (
        log_scale
        if prior.scale_tril is None
        else torch.cat([log_scale, prior.scale_tril / log_scale.exp()], -1)
    )
