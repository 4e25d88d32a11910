"""Which latent sites set the scale of other latent sites: given these, the posterior of a scale is far from normal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.guides.conditionals.model_conditionals import ModelConditionals
from pyro_graphflows.guides.conditionals.site_priors import has_prior, site_prior
from pyro_graphflows.guides.sites import LatentSite
from pyro_graphflows.inspect import TracedModel

__all__ = ["sites_of_scales"]

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
        name: [c for c in sites if name in graph.parents(c) and has_prior(sites[c], nodes[c]["fn"])]
        for name in candidates
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
        return {name: site_prior(sites[name], priors[name]).log_scale for name in wanted}

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
