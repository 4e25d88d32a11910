"""The start of fused sites: their factors fitted to rows of joint samples, with the priors in these rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.guides.conditionals.contract import Conditionals
from pyro_graphflows.guides.conditionals.fused_fit import FactorFit, fit_factor, fit_logits
from pyro_graphflows.guides.conditionals.site_priors import SitePrior
from pyro_graphflows.guides.plan import BlockPlan
from pyro_graphflows.guides.prior_samples import prior_of_rows
from pyro_graphflows.guides.samples import Samples, columns_of
from pyro_graphflows.regression import location_and_scale

__all__ = ["FusedRows"]

WIDTH = 2.0  # of the factors that sites with per-element parameters start with, in units of the prior


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
            linear = replace(linear, scale_tril=WIDTH * eye)
        conditionals.set_fused_(site, conditionals.linear_of(site, linear))
