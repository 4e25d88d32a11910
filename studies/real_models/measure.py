"""What a trained guide is worth: bounds, weights, and how far its means and standard deviations are off."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_graphflows.infer.psis import smoothed_log_weights
from studies.real_models.posterior import Posterior, Reference, Values

DRAWS = 10_000
ALONE = 1_000  # draws of a guide that cannot run many at once
IWAE = 1_000
LEVELS = (0.05, 0.5, 0.95)  # of the reference's quantiles


def weigh(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], plates: int, num: int | None
) -> tuple[Tensor, Values]:
    """Draw from the guide; return the log weights and the latent values, draws along the first dimension.

    Args:
        model: The model.
        guide: The guide.
        args: The arguments of both.
        plates: How many dimensions the plates of the model take.
        num: How many to draw at once, in a plate; one alone, if None.
    """
    with torch.no_grad():
        if num is None:
            guided = poutine.trace(guide).get_trace(*args)
            run = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args)
        else:
            with pyro.plate("_draws", num, dim=-1 - plates):
                guided = poutine.trace(guide).get_trace(*args)
                run = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args)
    count = 1 if num is None else num
    log_weights = torch.zeros(count)
    for trace, sign in ((run, 1), (guided, -1)):
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
                continue
            log_prob = site["log_prob"]
            if num is not None and (log_prob.dim() <= plates or len(log_prob) != num):
                raise ValueError(f"Expected a log density for each of {num} draws at site {name}.")
            log_weights = log_weights + sign * log_prob.reshape(count, -1).sum(-1)
    latents = {
        name: site["value"].unsqueeze(0) if num is None else site["value"]
        for name, site in run.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and name in guided.nodes
    }
    return log_weights, {name: value for name, value in latents.items() if value.is_floating_point()}


def draw(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], plates: int, chunk: int
) -> tuple[Tensor, Values, bool]:
    """Draw as many as the study asks for; return log weights, values, and whether many ran at once."""
    parts, at_once = [], True
    try:
        parts = [weigh(model, guide, args, plates, min(chunk, DRAWS - i)) for i in range(0, DRAWS, chunk)]
    except (RuntimeError, ValueError, IndexError, NotImplementedError, AssertionError):
        at_once = False  # measured below, one by one: an error of the guide itself is raised there
        parts = [weigh(model, guide, args, plates, None) for _ in range(ALONE)]
    log_weights = torch.cat([weights for weights, _ in parts])
    values = {name: torch.cat([values[name] for _, values in parts]) for name in parts[0][1]}
    return log_weights, values, at_once


def errors(draws: Values, reference: Reference, weights: Tensor | None) -> dict[str, float]:
    """Return how far means and standard deviations are off, over all scalars.

    Args:
        draws: Parameters, draws along the first dimension.
        reference: The reference.
        weights: Normalised importance weights; equal ones, if None.

    Returns:
        The largest and the root-mean-square error of a mean in reference standard deviations, the smallest and the
        largest ratio of standard deviations, and, where the reference has draws, by how much the share of draws below
        its quantiles differs from that of its own at most.
    """
    off, ratio, shares = [], [], []
    for name, mean in reference.mean.items():
        x = draws[name].reshape(len(draws[name]), -1)
        w = torch.full((len(x), 1), 1 / len(x)) if weights is None else weights.unsqueeze(-1)
        centre = (w * x).sum(0)
        sd = (w * (x - centre) ** 2).sum(0).sqrt()
        off.append((centre - mean.reshape(-1)) / reference.sd[name].reshape(-1))
        ratio.append(sd / reference.sd[name].reshape(-1))
        if name in reference.draws:
            own = reference.draws[name]
            levels = torch.tensor(LEVELS)
            quantiles = own.reshape(len(own), -1).quantile(levels, dim=0).unsqueeze(1)
            below = (w * (x <= quantiles)).sum(1)
            shares.append((below - levels.unsqueeze(-1)).abs().max())
    off_all, ratio_all = torch.cat(off), torch.cat(ratio)
    return {
        "mean_max": off_all.abs().max().item(),
        "mean_rms": off_all.square().mean().sqrt().item(),
        "sd_min": ratio_all.min().item(),
        "sd_max": ratio_all.max().item(),
        **({"share_max": max(shares).item()} if shares else {}),
    }


def measure(
    posterior: Posterior, reference: Reference, guide: Callable[..., Any], args: tuple[Any, ...], chunk: int
) -> dict[str, Any]:
    """Return all that is reported of a trained guide."""
    log_weights, values, at_once = draw(posterior.model, guide, args, posterior.plates, chunk)
    finite = torch.isfinite(log_weights)
    smoothed, k_hat = smoothed_log_weights(log_weights)
    result: dict[str, Any] = {
        "draws": len(log_weights),
        "at_once": at_once,
        "elbo": log_weights.mean().item(),
        "elbo_error": log_weights.std().item() / math.sqrt(len(log_weights)),
        "iwae": (torch.logsumexp(log_weights.reshape(-1, IWAE), -1) - math.log(IWAE)).mean().item(),
        "k_hat": k_hat.item(),
        "nonfinite_draws": int((~finite).sum()),
    }
    if reference.log_evidence is not None:
        result["gap"] = reference.log_evidence - result["elbo"]
    parameters = posterior.parameters(values)
    result["errors"] = errors(parameters, reference, None)
    result["errors_weighted"] = errors(parameters, reference, torch.softmax(smoothed, 0))
    result["weights"] = "Pareto-smoothed"
    return result
