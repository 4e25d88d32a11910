"""The start of fused sites: their priors at joint samples of the model, and their factors fitted beside these.

The priors are kept as columns with the samples, under names of their own, so that whatever is done to rows of samples
is done to them too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides.conditionals.contract import Conditionals
from pyro_graphflows.guides.conditionals.fused_fit import FactorFit, fit_factor, fit_logits
from pyro_graphflows.guides.conditionals.model_conditionals import ModelConditionals
from pyro_graphflows.guides.conditionals.site_priors import SitePrior
from pyro_graphflows.guides.plan import BlockPlan, PriorPlan
from pyro_graphflows.guides.priors import read_priors
from pyro_graphflows.guides.samples import Samples, columns_of
from pyro_graphflows.regression import location_and_scale

__all__ = [
    "FusedRows",
    "prior_of_rows",
    "with_priors",
]

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
    depth = max(batch for batch, _ in plan.ranks.values())
    latents = {}
    for name, value in draws.latent_values(number).items():
        missing = depth - plan.ranks[name][0]
        latents[name] = value.reshape(number, *(1,) * missing, *value.shape[1:])
    indices = {name: plate.indices for name, plate in samples.plates.items() if plate.indices is not None}
    given = {"latents": latents, "observed": {}, "indices": indices}
    try:
        with torch.no_grad():
            priors = read_priors(
                *(ModelConditionals(draws.model), sites, (draws.args, draws.kwargs), draws.sites, plan), given
            )
    except (UnsupportedModelError, GraphflowsError):  # a draw at which a prior is not defined
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


WIDTH = 2.0  # of the factors that sites with per-element parameters start with, in units of the prior
ROOT_WIDTH = (
    0.1  # the same of sites in no plate: at the width of their prior the first losses are of wild guesses
)


@dataclass(frozen=True)
class FusedRows:
    """What rows of joint samples say of the fused sites of a block.

    Attributes:
        priors: The priors in the rows.
        values: The values of sites whose coordinate is not their unconstrained vector.
        flat: The unconstrained vectors.
        classes: For discrete sites the number of classes of each variable.
    """

    priors: Mapping[str, SitePrior]
    values: Mapping[str, Tensor]
    flat: Mapping[str, Tensor]
    classes: Mapping[str, int]

    @classmethod
    def of_block(cls, plan: BlockPlan, samples: Samples) -> "FusedRows":
        """Return the rows of a block.

        Args:
            plan: The block.
            samples: Its samples.
        """
        encodings = {site: samples.draws.sites[site].encoding for site in plan.fused}
        classes = {site: each.num_classes for site, each in encodings.items() if each is not None}
        return cls.of_sites(plan.fused, samples.rows or {}, classes)

    @classmethod
    def of_sites(
        cls,
        sites: Sequence[str],
        rows: Mapping[str, Tensor],
        classes: Mapping[str, int] = MappingProxyType({}),
    ) -> "FusedRows":
        """Return the rows of some sites.

        Args:
            sites: The sites.
            rows: Unconstrained vectors, and the columns of priors where they are known.
            classes: For discrete sites the number of classes of each variable.
        """
        found = {site: prior_of_rows(site, rows[site].shape[-1], rows) for site in sites if site in rows}
        priors = {site: prior for site, prior in found.items() if prior is not None}
        values = {site: rows[columns_of(site)[1]] for site in priors if columns_of(site)[1] in rows}
        return cls(priors, values, {site: rows[site] for site in priors}, classes)

    def at(self, chosen: Any) -> "FusedRows":
        """Return some of the rows."""
        return FusedRows(
            {site: prior.map(lambda each: each[chosen]) for site, prior in self.priors.items()},
            {site: value[chosen] for site, value in self.values.items()},
            {site: value[chosen] for site, value in self.flat.items()},
            self.classes,
        )

    def set_units_(self, conditionals: Conditionals) -> None:
        """Standardise the coordinates of the sites: as the unconstrained vector, or by the values in the coordinate."""
        for site in self.priors.keys() - self.classes.keys():
            own = self.values.get(site)
            units = conditionals.output_units(site) if own is None else location_and_scale(own)
            conditionals.set_fused_units_(site, units)

    def fit(self, conditionals: Conditionals, site: str, inputs: Tensor) -> FactorFit:
        """Return the factor of a site that fits the rows best.

        Args:
            conditionals: The conditionals; their units are used.
            site: The site.
            inputs: The site's inputs in the rows.
        """
        shift, scale = (part.to(inputs) for part in conditionals.fused_units(site))
        values = self.values.get(site, self.flat[site])
        prior = self.priors[site]
        if site in self.classes:
            return fit_logits(inputs, values.to(inputs), prior, self.classes[site])
        tril = prior.scale_tril
        standardised = SitePrior(
            (prior.loc.to(inputs) - shift) / scale,
            prior.log_scale.to(inputs) - scale.log(),
            None if tril is None else tril.to(inputs) / scale.unsqueeze(-1),
        )
        return fit_factor(inputs, (values.to(inputs) - shift) / scale, standardised)

    def fit_(self, conditionals: Conditionals, site: str, rows: Tensor) -> None:
        """Start a site at the factor that fits the rows best.

        Args:
            conditionals: The conditionals.
            site: The site.
            rows: Features of the context and the sites' vectors in units of outputs.
        """
        fit = self.fit(conditionals, site, rows[:, conditionals.inputs_of(site)])
        linear = fit.linear
        if site in conditionals.block.per_element and not fit.says_something:
            eye = torch.eye(len(linear.loc)).to(linear.loc)
            width = WIDTH if conditionals.block.plates else ROOT_WIDTH
            linear = replace(linear, scale_tril=width * eye)
        conditionals.set_fused_(site, conditionals.linear_of(site, linear))
