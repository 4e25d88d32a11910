"""Whether a loss is safe with a guide: the silent errors of estimators, said beforehand.

Some estimators of Pyro are wrong for some guides without an error: the loss is not a bound, or its gradient is
biased. :func:`check_guide` compares what a loss assumes with what a model and a guide do in one call.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.poutine import Trace
from pyro.poutine.util import site_is_factor, site_is_subsample

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides.call import site_mask
from pyro_graphflows.guides.guide import AutoFaithfulGuide
from pyro_graphflows.inspect import (
    is_transparent,
    kept_random_state,
    require_pair,
    seed_random_state,
    trace_model,
)
from pyro_graphflows.inspect.arguments import argument_leaves, outside_tensors, with_tensors
from pyro_graphflows.inspect.model_graph import (
    REMEDY_ROWS,
    REMEDY_STRUCTURE,
    changes_of_data,
    changes_of_sites,
)
from pyro_graphflows.inspect.runs import is_masked_out, rows_of_plates

__all__ = ["GuideCheck", "check_guide"]


@dataclass(frozen=True)
class GuideCheck:
    """The answer of :func:`check_guide`.

    Attributes:
        safe: Whether no reason against the loss was found.
        reasons: Why the loss is not safe, each with what to do.
        notes: Things worth knowing that are no reason against it.
    """

    safe: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = ["Safe." if self.safe else "Not safe:"]
        lines += [f"- {reason}" for reason in self.reasons]
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(lines)


def check_guide(
    model: Callable[..., Any], guide: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any
) -> GuideCheck:
    """Tell whether a loss is right for a model and a guide, and why not.

    The model runs twice and the guide once, without gradients; the random state is as before.

    Args:
        model: The model.
        guide: A guide of this package, or any other.
        loss: A loss of Pyro, as an object or as its class.
        *args: Arguments of a typical call of both.
        **kwargs: Keyword arguments of such a call.

    Returns:
        The answer, with reasons.

    A loss that has a method ``reasons_against(model_trace, guide_trace)`` is asked itself, as
    :class:`~pyro_graphflows.infer.IWAE_ELBO` is.

    Raises:
        GraphflowsError: If the loss is none of these and not one of ``Trace_ELBO``, ``TraceGraph_ELBO``,
            ``TraceEnum_ELBO``, ``TraceMeanField_ELBO``, ``TraceTailAdaptive_ELBO``, ``RenyiELBO`` and
            ``ReweightedWakeSleep``, or of classes derived from them.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import RenyiELBO
        >>> from pyro_graphflows.guides import auto_faithful_guide
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 30, subsample_size=len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> x = torch.zeros(3)
        >>> print(check_guide(model, auto_faithful_guide(model, x), RenyiELBO, x))
        Not safe:
        - RenyiELBO puts the scale of the subsampled plate 'data' inside the log-mean, which biases it. ...
    """
    require_pair(model, guide)
    kind = loss if isinstance(loss, type) else type(loss)
    known = (
        Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, TraceTailAdaptive_ELBO, RenyiELBO,
        ReweightedWakeSleep,
    )  # fmt: skip
    ask_itself = getattr(loss, "reasons_against", None) if loss is not kind else None
    if loss is kind and not issubclass(kind, known) and hasattr(kind, "reasons_against"):
        raise GraphflowsError(
            f"Expected an object of the loss, {kind.__name__}(...), since it depends on its options."
        )
    if not issubclass(kind, known) and ask_itself is None:
        raise GraphflowsError(
            f"Expected a loss among {', '.join(k.__name__ for k in known)}; got {kind.__name__}."
        )
    with kept_random_state(), torch.no_grad(), poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        rows = rows_of_plates(model_trace)
        seed_random_state(0)
        same_rows = poutine.condition(poutine.replay(model, trace=guide_trace), data=rows)
        again = poutine.trace(same_rows).get_trace(*args, **kwargs)
    sites, drawn = _sites(model_trace), _sites(guide_trace)
    latent = {name: site for name, site in drawn.items() if not site["is_observed"]}
    reasons: list[str] = []
    notes: list[str] = []
    reasons += _other_in_every_run(model, model_trace, again, args, kwargs)
    flat = _with_flat_priors(model, guide, (model_trace, guide_trace), rows, args, kwargs)
    reasons += _different_sites(sites, latent, kind) + _other_masks(sites, latent, flat)
    enumerates = issubclass(kind, TraceEnum_ELBO)
    marked = [name for name, site in latent.items() if site["infer"].get("enumerate") is not None]
    rough = [
        name
        for name, site in latent.items()
        if not getattr(site["fn"], "has_rsample", False) and not (enumerates and name in marked)
    ]
    if issubclass(kind, ReweightedWakeSleep):
        reasons += _wake_sleep(latent)
    elif issubclass(kind, RenyiELBO):
        reasons += _renyi({**sites, **latent}) + _renyi_without_paths(rough)
    elif issubclass(kind, TraceMeanField_ELBO):
        some_reasons, some_notes = _mean_field(guide, model_trace, guide_trace)
        reasons += some_reasons + _mean_field_without_paths(rough)
        notes += some_notes
    elif issubclass(kind, TraceTailAdaptive_ELBO):
        some_reasons, some_notes = _tail_adaptive(loss, {**sites, **latent}, rough)
        reasons += some_reasons
        notes += some_notes
    elif enumerates:
        reasons += _enumerated_outside(
            model, args, kwargs, [n for n in marked if n in sites and _plates(latent[n])]
        )
        notes += _nothing_to_enumerate({**sites, **latent})
    if ask_itself is not None:
        reasons += ask_itself(model_trace, guide_trace)
    if not issubclass(kind, ReweightedWakeSleep):
        reasons += _outer_sites_late(latent, rough, marked if enumerates else [])
        reasons += _impossible_values(sites, latent)
    if marked and not enumerates:
        notes.append(
            f"{_listed(marked)} are marked for enumeration, which {kind.__name__} does not do: they are drawn, and "
            "Pyro may warn. TraceEnum_ELBO sums over their values."
        )
    return GuideCheck(not reasons, tuple(reasons), tuple(notes))


def _enumerated_outside(model: Callable[..., Any], args: Any, kwargs: Any, marked: list[str]) -> list[str]:
    """Return the sites that the guide enumerates in plates outside of which the model uses them."""
    if not marked:
        return []
    try:
        graph = trace_model(model, args, kwargs, strict=False).graph
    except UnsupportedModelError:  # nothing is known of what depends on what
        return []
    found = {name: graph.outside_of_plates(name) for name in marked if name in graph}
    return [
        f"{_listed([name])} is enumerated in plates that {_listed(children)} {'is' if len(children) == 1 else 'are'} "
        "not in: TraceEnum_ELBO sums over values that all elements share. Sample it, with score-function gradients."
        for name, children in found.items()
        if children
    ]


def _sites(trace: poutine.Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def _plates(site: Any) -> frozenset[str]:
    return frozenset(frame.name for frame in site["cond_indep_stack"] if frame.vectorized)


def _other_in_every_run(
    model: Callable[..., Any], trace: poutine.Trace, again: poutine.Trace, args: Any, kwargs: Any
) -> list[str]:
    """Return what changes from run to run at the same latent values: the guide has read, or sampled, another model."""
    changes = changes_of_sites(trace, again)
    if changes:
        return [f"the model is another one in every run: {changes[0]}. {REMEDY_STRUCTURE}."]
    args, kwargs = with_tensors(args, dict(kwargs))
    given = {**outside_tensors(model, args, kwargs), **argument_leaves(model, args, kwargs)}
    rows = changes_of_data(trace, again, given)
    if not rows:
        return []
    return [
        f"the data of {_listed(rows)} are other rows in every run of the model, chosen by random numbers outside of "
        f"pyro.sample, so that a guide reads other data than the likelihood scores. {REMEDY_ROWS}."
    ]


def _different_sites(sites: dict[str, Any], latent: dict[str, Any], kind: type) -> list[str]:
    reasons = []
    extra = [n for n, site in latent.items() if n not in sites and not site["infer"].get("is_auxiliary")]
    missing = [
        name
        for name, site in sites.items()
        if not (site["is_observed"] or name in latent or site_is_factor(site))
        and not (issubclass(kind, TraceEnum_ELBO) and site["infer"].get("enumerate") == "parallel")
        and not is_transparent(site)
    ]
    values = [
        name
        for name, site in sites.items()
        if issubclass(kind, TraceMeanField_ELBO)
        and not (site["is_observed"] or name in latent)
        and is_transparent(site)
    ]
    if extra:
        reasons.append(f"the guide samples {_listed(extra)}, which the model does not have.")
    if missing:
        reasons.append(
            f"the guide does not sample {_listed(missing)}. Sites that the model enumerates need TraceEnum_ELBO."
        )
    if values:
        reasons.append(
            f"the guide does not repeat the Delta site{'s' * (len(values) > 1)} {_listed(values)}, without which "
            "TraceMeanField_ELBO stops with a KeyError. It repeats those that follow from latent sites in the same "
            "plates. Write the value as pyro.deterministic, or use Trace_ELBO."
        )
    moved = [n for n in latent if n in sites and _plates(latent[n]) != _plates(sites[n])]
    if moved:
        reasons.append(f"{_listed(moved)} are in other plates in the guide than in the model.")
    return reasons


def _with_flat_priors(
    model: Callable[..., Any],
    guide: Any,
    traces: tuple[Trace, Trace],
    rows: dict[str, Any],
    args: Any,
    kwargs: Any,
) -> set[str]:
    """Return the sites of which the model masks the prior alone: elsewhere its density follows masked values."""
    model_trace, drawn = traces

    def elsewhere(name: str, values: Trace) -> torch.Tensor:
        seed_random_state(0)
        run = poutine.condition(poutine.replay(model, trace=values), data=rows)
        trace = poutine.trace(run).get_trace(*args, **kwargs)
        return torch.as_tensor(trace.log_prob_sum(lambda each, _: each != name))

    with kept_random_state(), torch.no_grad(), poutine.block():
        nodes: Any = model_trace.nodes
        both = [name for name in _sites(drawn) if name in nodes]
        masks = {n: _as_mask(False if is_masked_out(nodes[n]) else site_mask(nodes[n])) for n in both}
        masked = [name for name, mask in masks.items() if not mask.all()]
        if not masked:
            return set()
        seed_random_state(1)  # other draws than those that the check began with
        others = poutine.trace(guide).get_trace(*args, **kwargs)
        found = set()
        for name in masked:
            site: Any = drawn.nodes[name]
            kept = masks[name].reshape(masks[name].shape + (1,) * len(site["fn"].event_shape))
            changed: Any = dict(site, value=site["value"].where(kept, others.nodes[name]["value"]))
            moved = drawn.copy()
            moved.nodes[name] = changed
            before, after = elsewhere(name, drawn), elsewhere(name, moved)
            if not torch.allclose(before, after, rtol=0.0, atol=0.0, equal_nan=True):
                found.add(name)
    return found


def _other_masks(sites: dict[str, Any], latent: dict[str, Any], flat: Collection[str]) -> list[str]:
    """Return the sites that the model masks and the guide does not, so that what is masked adds its entropy.

    That of a site with a flat prior, which the model writes by a mask, is meant to count.
    """
    auxiliary = any(name not in sites for name in latent)
    found, points = [], []
    for name, site in latent.items():
        if name not in sites:
            continue
        mine, theirs = (_as_mask(site_mask(one)) for one in (site, sites[name]))
        if name in flat and not bool(mine.all()):
            points.append(name)
        if bool((mine == theirs).all()) or name in flat:
            continue
        elsewhere = auxiliary and isinstance(
            site["fn"], dist.Delta
        )  # where the density is, at an auxiliary site
        if elsewhere or bool((site["fn"].log_prob(site["value"]) != 0).any()):
            found.append(name)
    reasons = []
    if points:
        reasons.append(
            f"{_listed(points)} count in the model where their prior is masked, and the guide is masked there: "
            "training makes them points. Mask what is computed from these entries as well, if they are padding; "
            "otherwise give them a wide prior in place of the mask."
        )
    if found:
        reasons.append(
            f"{_listed(found)} have another mask in the guide than in the model: what only one of them masks adds its "
            "log-density to the loss. Guides of this package repeat the model's mask."
        )
    return reasons


def _as_mask(mask: torch.Tensor | bool | None) -> torch.Tensor:
    return torch.as_tensor(True if mask is None else mask)


def _wake_sleep(latent: dict[str, Any]) -> list[str]:
    names = [name for name, site in latent.items() if not site["infer"].get("is_copied")]
    copied = [name for name in latent if name not in names]
    if copied:
        return [
            f"ReweightedWakeSleep detaches the values of the Delta sites {_listed(copied)}, so that parameters of the "
            "model in them are not trained. Write them as pyro.deterministic, or use Trace_ELBO or IWAE_ELBO."
        ]
    smooth = [name for name in names[:-1] if getattr(latent[name]["fn"], "has_rsample", False)]
    if not smooth:  # with one at the end nothing depends on its value
        return []
    return [
        "ReweightedWakeSleep detaches the sampled values only after the guide has run, so that in a guide whose sites "
        f"depend on one another, here on {_listed(smooth)}, gradients still flow through reparametrised values and are "
        "biased. Use InferenceCompilation, IWAE_ELBO or Trace_ELBO."
    ]


def _renyi(sites: dict[str, Any]) -> list[str]:
    # Elements of plates that all sites are in have a log-mean each; over other plates Pyro sums the log-weights first.
    partial = _subsampled(sites)
    if not partial:
        return []
    return [
        f"RenyiELBO puts the scale of the subsampled plate {_listed(partial)} inside the log-mean, which biases "
        "it. Use IWAE_ELBO, which scales outside, or the full data."
    ]


def _tail_adaptive(loss: Any, sites: dict[str, Any], rough: list[str]) -> tuple[list[str], list[str]]:
    reasons = []
    if not (isinstance(loss, type) or loss.vectorize_particles):
        reasons.append("TraceTailAdaptive_ELBO needs vectorize_particles=True, and several particles.")
    if rough:
        reasons.append(
            f"TraceTailAdaptive_ELBO has no score-function gradient for {_listed(rough)}. Use Trace_ELBO or IWAE_ELBO."
        )
    partial = _subsampled(sites)
    if partial:
        reasons.append(
            f"TraceTailAdaptive_ELBO ranks particles by weights of all data; plate {_listed(partial)} is subsampled. "
            "Use the full data, or Trace_ELBO."
        )
    note = "TraceTailAdaptive_ELBO has gradients alone: step() returns infinity. Watch Trace_ELBO or IWAE_ELBO instead."
    return reasons, [note]


def _subsampled(sites: dict[str, Any]) -> list[str]:
    """Return the subsampled plates around some sites."""
    return sorted(
        {
            frame.name
            for site in sites.values()
            for frame in site["cond_indep_stack"]
            if frame.full_size is not None and frame.full_size != frame.size
        }
    )


def _mean_field(
    guide: Any, model_trace: poutine.Trace, guide_trace: poutine.Trace
) -> tuple[list[str], list[str]]:
    if not isinstance(guide, AutoFaithfulGuide):
        return [
            "TraceMeanField_ELBO is right only if no model parent of a site depends on that site in the guide, which "
            "is not known of this guide. Use Trace_ELBO."
        ], []
    orders = [
        [name for name, site in one.nodes.items() if site["type"] == "sample" and name in other]
        for one, other in ((model_trace, guide_trace), (guide_trace, model_trace))
    ]
    if orders[0] == orders[1]:
        return [], []
    sampled = [str(name) for name, analytic in guide.plan.analytic_kl.items() if not analytic]
    terms = f"{_listed(sampled)} are sampled terms" if sampled else "here it fails nowhere"
    return [], [
        "Pyro warns 'Failed to verify mean field restriction', since guide and model sample sites in other orders. The "
        f"value is right: the guide has no analytic KL where the condition fails ({terms})."
    ]


def _renyi_without_paths(rough: list[str]) -> list[str]:
    if not rough:
        return []
    return [
        f"RenyiELBO has no score-function gradient for {_listed(rough)}: it takes that of infinitely many particles, "
        "zero at alpha=0, so that they are not trained (the value of the loss is right). Use IWAE_ELBO or Trace_ELBO."
    ]


def _mean_field_without_paths(rough: list[str]) -> list[str]:
    if not rough:
        return []
    return [
        f"TraceMeanField_ELBO has no score-function gradient for {_listed(rough)}: it raises an error, or without "
        "validation leaves that gradient out where it knows a KL divergence. Use TraceGraph_ELBO, or TraceEnum_ELBO "
        "with enumerated sites."
    ]


def _nothing_to_enumerate(sites: dict[str, Any]) -> list[str]:
    if any(site["infer"].get("enumerate") is not None for site in sites.values()):
        return []
    return [
        "No site is marked for enumeration, so that TraceEnum_ELBO does what Trace_ELBO does; Pyro warns of it."
    ]


def _outer_sites_late(latent: dict[str, Any], rough: list[str], enumerated: list[str]) -> list[str]:
    """Return the local sites, drawn without a path or enumerated, that come before sites in fewer plates."""
    reasons = []
    names = list(latent)
    for i, name in enumerate(names):
        if name not in rough and name not in enumerated:
            continue
        late = [other for other in names[i + 1 :] if _plates(latent[other]) < _plates(latent[name])]
        if not late:
            continue
        if name in enumerated:
            reasons.append(
                f"{name!r} is enumerated and comes before {_listed(late)}, which are in fewer plates: if these depend "
                "on it, Pyro cannot sum over its values. Sample sites of outer plates first."
            )
        else:
            reasons.append(
                f"{name!r} has a score-function gradient and is sampled before {_listed(late)}, which are in fewer "
                "plates: the gradient is biased. Sample sites of outer plates first."
            )
    return reasons


def _impossible_values(sites: dict[str, Any], latent: dict[str, Any]) -> list[str]:
    """Return the discrete sites with values that the model excludes, here and now, and the guide does not."""
    found = []
    for name, site in latent.items():
        if name not in sites or not (_can_be_listed(site["fn"]) and _can_be_listed(sites[name]["fn"])):
            continue
        values = site["fn"].enumerate_support(expand=False)
        excluded = sites[name]["fn"].log_prob(values) == -torch.inf
        if bool((excluded & (site["fn"].log_prob(values) > -torch.inf)).any()):
            found.append(name)
    if not found:
        return []
    return [
        f"some values of {_listed(sorted(found))} have probability zero in the model, given the sites before, and not "
        "in the guide: the ELBO is minus infinity. Give them a small probability in the model, let the model enumerate "
        "these sites, or train with InferenceCompilation."
    ]


def _can_be_listed(fn: Any) -> bool:
    inner = fn
    while hasattr(inner, "base_dist"):
        if getattr(inner, "reinterpreted_batch_ndims", 0):
            return False
        inner = inner.base_dist
    return bool(getattr(fn, "has_enumerate_support", False))


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)
