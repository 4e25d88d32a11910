"""The priors of fused sites at joint samples of the model, beside these samples: what their factors are fitted by.

They are kept as columns with the samples, under names of their own, so that whatever is done to rows of samples is done
to them too.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.conditionals.model_conditionals import ModelConditionals
from pyro_graphflows.guides.conditionals.site_priors import SitePrior
from pyro_graphflows.guides.prior_plan import PriorPlan
from pyro_graphflows.guides.priors import read_priors
from pyro_graphflows.guides.samples import Samples, columns_of

__all__ = ["prior_of_rows", "with_priors"]

MOST_RUNS = 300  # of the model, where each joint sample takes one


def with_priors(samples: Samples, plan: PriorPlan) -> Samples:
    """Return joint samples with the priors of fused sites at them.

    Args:
        samples: The samples.
        plan: Which sites are fused.
    """
    if samples.values is None or not plan.sites:
        return samples
    draws, sites = samples.draws, sorted(plan.sites)
    number = len(next(iter(samples.values.values())))
    if not plan.batches:
        number = min(number, MOST_RUNS)
        samples = replace(samples, values={name: value[:number] for name, value in samples.values.items()})
    drawn = draws.observed_values(
        number, [name for site in sites for name in draws.traced.graph.parents(site)]
    )
    nodes = draws.traced.trace.nodes
    ranks = {name: (len(nodes[name]["fn"].batch_shape), len(nodes[name]["fn"].event_shape)) for name in drawn}
    plan = replace(plan, ranks={**plan.ranks, **ranks}, checked=False)  # rows with such priors are left out
    depth = max(batch for batch, _ in plan.ranks.values())

    def beside_plates(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = {name: (1,) * (depth - plan.ranks[name][0]) for name in values}
        return {name: v.reshape(number, *missing[name], *v.shape[1:]) for name, v in values.items()}

    latents = beside_plates(draws.latent_values(number))
    indices = {name: plate.indices for name, plate in samples.plates.items() if plate.indices is not None}
    given = {"latents": latents, "observed": beside_plates(drawn), "indices": indices}
    try:
        with torch.no_grad():
            priors = read_priors(
                *(ModelConditionals(draws.model), sites, (draws.args, draws.kwargs), draws.sites, plan), given
            )
    except UnsupportedModelError:
        return samples
    more: dict[str, Tensor] = {}
    for name in sites:
        prior, value = priors[name], latents[name]
        of_prior, of_value = columns_of(name)
        shape = (number, *value.shape[1 : value.dim() - plan.ranks[name][1]])
        parts = [prior.loc, prior.log_scale]
        if prior.scale_tril is not None:
            parts.append(prior.scale_tril.flatten(-2))
        joined = torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)
        more[of_prior] = joined
        if prior.transform is not None:
            raw = prior.transform.inv(value)
            more[of_value] = raw.reshape(*shape, -1)
    return samples.with_values(more)


def prior_of_rows(site: str, size: int, rows: Mapping[str, Tensor]) -> SitePrior | None:
    """Return the prior of a site at rows of joint samples; None where it is not known.

    Args:
        site: The site.
        size: The length of its flat vector.
        rows: The rows, by name.
    """
    column, of_value = columns_of(site)
    if column not in rows:
        return None
    loc, log_scale, tril = rows[column].split([size, size, rows[column].shape[-1] - 2 * size], -1)
    root = tril.unflatten(-1, (size, size)) if tril.shape[-1] else None
    return SitePrior(loc, log_scale, root, standard=of_value in rows)
