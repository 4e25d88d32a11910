"""Whether a loss is safe with a guide: the silent errors of estimators, said beforehand.

Some estimators of Pyro are wrong for some guides without an error: the loss is not a bound, or its gradient is
biased. :func:`check_guide` compares what a loss assumes with what a model and a guide do in one call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.poutine.util import site_is_factor, site_is_subsample

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.base import AutoFaithfulGuide

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

    The model and the guide run once each, without gradients; the random state is as before.

    Args:
        model: The model.
        guide: A guide of this package, or any other.
        loss: A loss of Pyro, as an object or as its class.
        *args: Arguments of a typical call of both.
        **kwargs: Keyword arguments of such a call.

    Returns:
        The answer, with reasons.

    Raises:
        GraphflowsError: If the loss is not one of ``Trace_ELBO``, ``TraceGraph_ELBO``, ``TraceEnum_ELBO``,
            ``TraceMeanField_ELBO``, ``RenyiELBO`` and ``ReweightedWakeSleep``, or of classes derived from them.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import RenyiELBO
        >>> from pyro_graphflows.guides import auto_faithful_guide
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> x = torch.zeros(3)
        >>> check_guide(model, auto_faithful_guide(model, x), RenyiELBO, x).safe
        False
    """
    kind = loss if isinstance(loss, type) else type(loss)
    known = (
        Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, RenyiELBO, ReweightedWakeSleep,
    )  # fmt: skip
    if not issubclass(kind, known):
        raise GraphflowsError(
            f"Expected a loss among {', '.join(k.__name__ for k in known)}; got {kind.__name__}."
        )
    with torch.random.fork_rng(), torch.no_grad(), poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    sites, drawn = _sites(model_trace), _sites(guide_trace)
    latent = {name: site for name, site in drawn.items() if not site["is_observed"]}
    reasons: list[str] = []
    notes: list[str] = []
    reasons += _different_sites(sites, latent, kind)
    if issubclass(kind, ReweightedWakeSleep):
        reasons += _wake_sleep(latent)
    elif issubclass(kind, RenyiELBO):
        reasons += _renyi({**sites, **latent})
    elif issubclass(kind, TraceMeanField_ELBO):
        some_reasons, some_notes = _mean_field(guide)
        reasons += some_reasons
        notes += some_notes
    if not issubclass(kind, ReweightedWakeSleep):
        reasons += _score_function(latent)
    return GuideCheck(not reasons, tuple(reasons), tuple(notes))


def _sites(trace: poutine.Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def _plates(site: Any) -> frozenset[str]:
    return frozenset(frame.name for frame in site["cond_indep_stack"] if frame.vectorized)


def _different_sites(sites: dict[str, Any], latent: dict[str, Any], kind: type) -> list[str]:
    reasons = []
    extra = [n for n, site in latent.items() if n not in sites and not site["infer"].get("is_auxiliary")]
    missing = [
        name
        for name, site in sites.items()
        if not (site["is_observed"] or name in latent or site_is_factor(site))
        and not (issubclass(kind, TraceEnum_ELBO) and site["infer"].get("enumerate") == "parallel")
    ]
    if extra:
        reasons.append(f"the guide samples {_listed(extra)}, which the model does not have.")
    if missing:
        reasons.append(
            f"the guide does not sample {_listed(missing)}. Sites that the model enumerates need TraceEnum_ELBO."
        )
    moved = [n for n in latent if n in sites and _plates(latent[n]) != _plates(sites[n])]
    if moved:
        reasons.append(f"{_listed(moved)} are in other plates in the guide than in the model.")
    return reasons


def _wake_sleep(latent: dict[str, Any]) -> list[str]:
    smooth = [name for name, site in latent.items() if getattr(site["fn"], "has_rsample", False)]
    if len(smooth) < 2:
        return []
    return [
        "ReweightedWakeSleep detaches the sampled values only after the guide has run, so that in a guide whose sites "
        f"depend on one another ({_listed(smooth)}) gradients still flow through reparametrised values and are "
        "biased. Use InferenceCompilation, IWAE_ELBO or Trace_ELBO."
    ]


def _renyi(sites: dict[str, Any]) -> list[str]:
    reasons = []
    stacks = {name: _plates(site) for name, site in sites.items()}
    common = frozenset.intersection(*stacks.values()) if stacks else frozenset()
    outside = sorted(name for name, plates in stacks.items() if plates != common)
    if outside and len(set(stacks.values())) > 1:
        reasons.append(
            "RenyiELBO takes the log-mean of weights element by element of the plates, which is not a bound when "
            f"sites are in different plates ({_listed(sorted(sites))}). Use IWAE_ELBO, which nests the particles."
        )
    partial = sorted(
        {
            frame.name
            for site in sites.values()
            for frame in site["cond_indep_stack"]
            if frame.full_size is not None and frame.full_size != frame.size
        }
    )
    if partial:
        reasons.append(
            f"RenyiELBO puts the scale of the subsampled plate {_listed(partial)} inside the log-mean, which biases "
            "it. Use IWAE_ELBO, which scales outside, or the full data."
        )
    return reasons


def _mean_field(guide: Any) -> tuple[list[str], list[str]]:
    if not isinstance(guide, AutoFaithfulGuide):
        return [
            "TraceMeanField_ELBO is right only if no model parent of a site depends on that site in the guide, which "
            "is not known of this guide. Use Trace_ELBO."
        ], []
    sampled = [str(name) for name, analytic in guide.plan.analytic_kl.items() if not analytic]
    if not sampled:
        return [], []
    return [], [
        "Pyro may warn 'Failed to verify mean field restriction', since it compares orders. The value is right: "
        f"the guide has no analytic KL where the condition fails ({_listed(sampled)} are sampled terms)."
    ]


def _score_function(latent: dict[str, Any]) -> list[str]:
    """Return the local sites with score-function gradients that come before sites in fewer plates."""
    reasons = []
    names = list(latent)
    for i, name in enumerate(names):
        site = latent[name]
        if getattr(site["fn"], "has_rsample", False) or site["infer"].get("enumerate") == "parallel":
            continue
        late = [other for other in names[i + 1 :] if _plates(latent[other]) < _plates(site)]
        if late:
            reasons.append(
                f"{name!r} has a score-function gradient and is sampled before {_listed(late)}, which are in fewer "
                "plates: the gradient is biased. Sample sites of outer plates first."
            )
    return reasons


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)
