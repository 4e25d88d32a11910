"""Which sites of a guide are fused with their priors, and why others are not.

A site can be fused where all its latent parents in the model are sampled before it
(:mod:`~pyro_graphflows.guides.conditionals.fusible_sites`), its prior is normal in a coordinate that can be computed,
the prior is the same in each run of the model, and its family has a factor for it. With ``fusion="auto"`` a site is
left alone where that would change nothing but the form of its parameters, and where it would take many runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.guides.conditionals.contract import Family
from pyro_graphflows.guides.conditionals.fusible_sites import FusionPlan, fusible_sites
from pyro_graphflows.guides.conditionals.model_conditionals import ModelConditionals
from pyro_graphflows.guides.conditionals.site_priors import SitePrior, has_prior
from pyro_graphflows.guides.plan import BlockPlan, PriorPlan
from pyro_graphflows.guides.priors import read_priors
from pyro_graphflows.guides.sites import LatentSite
from pyro_graphflows.inspect import TracedModel

__all__ = ["Fusion", "FusionQuestion", "plan_fusion"]

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


@dataclass(frozen=True)
class Fusion:
    """Which sites are fused.

    Attributes:
        priors: The runs that give their priors.
        reasons: Why sites that depend on others in the model are not fused.
    """

    priors: PriorPlan = field(default_factory=PriorPlan)
    reasons: Mapping[str, str] = field(default_factory=dict)


def plan_fusion(question: FusionQuestion) -> Fusion:
    """Say which sites are fused.

    Args:
        question: What is known.

    Raises:
        GraphflowsError: If a site whose family has ``fusion=True`` cannot be fused. The message names it and why.
    """
    nodes: Any = question.traced.trace.nodes
    wanted = {name: question.families[name].fusion for name in question.sites}
    if not any(wanted.values()):
        return Fusion()
    excluded = dict(question.excluded)
    for name, site in question.sites.items():
        if not wanted[name]:
            excluded[name] = "its family has fusion=False"
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
    for name in candidates:
        if wanted[name] == "auto" and _changes_nothing(question, name, priors[name]):
            excluded[name] = ""
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
    return Fusion(plan, reasons)


def _fusible(question: FusionQuestion, excluded: Mapping[str, str]) -> FusionPlan:
    return fusible_sites(
        question.inverse.graph,
        question.inverse,
        stages=[level for block in question.blocks for level in block.levels],
        enumerated=question.enumerated,
        excluded=excluded,
    )


def _changes_nothing(question: FusionQuestion, name: str, prior: SitePrior) -> bool:
    """Whether a site's prior is the same normal in each call: times a factor it is any normal, as without fusion."""
    per_element = any(name in block.per_element for block in question.blocks)
    return prior.transform is None and not question.inverse.graph.parents(name) and not per_element


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
    if site.encoding is not None:
        copies = [value] * len(MOVES)
    else:
        raw = site.transform.inv(value)
        copies = [site.transform(raw + move) for move in MOVES]
    joined = torch.stack(copies)
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
