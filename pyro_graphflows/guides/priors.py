"""The priors of fused sites in a call of a guide: read by runs of the model at the values sampled so far.

Sites without latent parents have priors that follow from the call; these are kept from call to call where they depend
on no data and on no parameters. For the others there is one run of the model for each depth among fused sites, ended
early
(:mod:`~pyro_graphflows.guides.conditionals.model_conditionals`).
"""

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.call import Call, call_key
from pyro_graphflows.guides.conditionals.model_conditionals import ModelConditionals
from pyro_graphflows.guides.plan import PriorPlan
from pyro_graphflows.guides.sites import LatentSite, SitePrior, site_prior

__all__ = ["PriorReader", "PriorsOfCall", "read_priors"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

MOST_KEPT = 16  # kinds of calls whose constant priors are kept


class PriorReader:
    """Reads the priors of fused sites, call by call.

    Args:
        plan: Which sites, and by which runs.
        sites: The latent sites.
        at_set_up: The model's arguments at set-up, for calls without any; None in a guide that was loaded.

    Attributes:
        runs: How often the model was run.
    """

    def __init__(
        self, plan: PriorPlan, sites: Mapping[str, LatentSite], at_set_up: Arguments | None = None
    ) -> None:
        self.plan, self.sites, self.at_set_up = plan, sites, at_set_up
        self.runs = 0
        self._kept: dict[Hashable, dict[str, SitePrior]] = {}

    def begin(
        self,
        model: Callable[..., Any],
        arguments: Arguments,
        call: Call,
        observations: Mapping[str, Tensor] | None,
    ) -> "PriorsOfCall":
        """Begin a call.

        Args:
            model: The model.
            arguments: Its positional and its keyword arguments.
            call: The call as it was read.
            observations: Values of observed sites that replace those of the model.

        Raises:
            UnsupportedModelError: If the model needs arguments, and neither the call nor set-up has any.
        """
        return PriorsOfCall(self, model, self._arguments(model, arguments), call, observations or {})

    def _arguments(self, model: Callable[..., Any], of_call: Arguments) -> Arguments:
        """Return the arguments for runs of the model: those of set-up in a call without any."""
        if any(of_call):
            return of_call
        if self.at_set_up is not None:
            return self.at_set_up
        try:
            inspect.signature(model).bind()
        except (TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"Expected the model's arguments: {', '.join(sorted(self.plan.sites))} are fused with their priors, "
                "which a run of the model gives, and a loaded guide holds no data. Call it with them, as in "
                "guide.median(*args)."
            ) from error
        return of_call

    def kept(self, key: Hashable | None) -> dict[str, SitePrior] | None:
        """Return the constant priors of a kind of call, if they are known."""
        return None if key is None else self._kept.get(key)

    def keep(self, key: Hashable, priors: Mapping[str, SitePrior]) -> None:
        """Keep the constant priors of a kind of call."""
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        self._kept[key] = dict(priors)


class PriorsOfCall:
    """The priors of one call, level by level; made by :meth:`PriorReader.begin`."""

    def __init__(
        self,
        reader: PriorReader,
        model: Callable[..., Any],
        arguments: Arguments,
        call: Call,
        observations: Mapping[str, Tensor],
    ) -> None:
        self._reader, self._model, self._arguments = reader, model, arguments
        self._call, self._observations = call, observations
        self._found: dict[str, SitePrior] = {}
        self._stage = 0

    def before(self, values: Mapping[str, Tensor], needed: Callable[[str], bool]) -> Mapping[str, SitePrior]:
        """Return the priors known before the next level is drawn.

        Args:
            values: The values of the sites drawn so far.
            needed: Whether a site is fused now.
        """
        plan = self._reader.plan
        for run, stage in zip(plan.runs, plan.stages, strict=True):
            if stage == self._stage and run:
                wanted = [name for name in run if needed(name) and name not in self._call.given]
                self._found.update(self._read(wanted, values))
        self._stage += 1
        return self._found

    def _read(self, wanted: Sequence[str], values: Mapping[str, Tensor]) -> dict[str, SitePrior]:
        if not wanted:
            return {}
        plan = self._reader.plan
        key = None
        if plan.constant.issuperset(wanted) and all(p.indices is None for p in self._call.plates.values()):
            key = call_key(self._arguments)
            kept = self._reader.kept(key)
            if kept is not None and kept.keys() >= set(wanted):
                return {name: kept[name] for name in wanted}
        follow = torch.is_grad_enabled() or key is not None
        with torch.set_grad_enabled(follow):
            priors = self._run(wanted, values)
        learned = any(prior.requires_grad for prior in priors.values())
        if key is not None and not learned:
            self._reader.keep(key, priors)
        if learned and not any(value.requires_grad for value in values.values()):
            with torch.no_grad():
                fixed = self._run(wanted, values)
            if not torch.is_grad_enabled():
                return fixed
            priors = {name: replace(prior, fixed=fixed[name]) for name, prior in priors.items()}
        return priors

    def _run(self, wanted: Sequence[str], values: Mapping[str, Tensor]) -> dict[str, SitePrior]:
        conditionals = ModelConditionals(self._model)
        found = read_priors(
            *(conditionals, wanted, self._arguments, self._reader.sites, self._reader.plan),
            {"latents": values, "observed": self._observations, "indices": self._call.indices},
        )
        self._reader.runs += conditionals.runs
        return found


def read_priors(
    conditionals: ModelConditionals,
    wanted: Sequence[str],
    arguments: Arguments,
    sites: Mapping[str, LatentSite],
    plan: PriorPlan,
    given: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, SitePrior]:
    """Return priors at values of other sites, by one run, or by one for each of several draws of these values.

    Args:
        conditionals: What runs the model.
        wanted: The sites.
        arguments: Positional and keyword arguments of the model.
        sites: The latent sites.
        plan: Says whether the model takes values with dimensions on the left.
        given: Values of ``latents`` and ``observed``, and ``indices`` of plates. Observed sites that are in
            ``plan.ranks`` have values for each of the draws too.
    """
    args, kwargs = arguments
    latents, observed = given["latents"], given["observed"]
    lead = _leading_shape(latents, plan.ranks)
    depth = max((batch for batch, _ in plan.ranks.values()), default=0)
    if plan.batches or not lead:
        # Sites that are not drawn yet have these dimensions too, as when the plan was tried with values of all sites.
        ones = {name: (1,) * (depth + event) for name, (_, event) in plan.ranks.items()}
        widths = {name: (*lead, *one) for name, one in ones.items()} if lead else {}
        found = conditionals(wanted, args, kwargs, widths=widths, **given)
        return {name: site_prior(sites[name], found[name], checked=plan.checked) for name in wanted}
    each = []
    for number in range(lead.numel()):
        own = {name: _one_of(value, number, lead, plan.ranks[name]) for name, value in latents.items()}
        data = {
            name: _one_of(value, number, lead, plan.ranks[name]) if name in plan.ranks else value
            for name, value in observed.items()
        }
        found = conditionals(wanted, args, kwargs, latents=own, observed=data, indices=given["indices"])
        each.append({name: site_prior(sites[name], found[name], checked=plan.checked) for name in wanted})
    shapes = {name: (*lead, *(1,) * (depth - plan.ranks[name][0])) for name in wanted}
    return {name: stacked([one[name] for one in each], lead, shapes[name]) for name in wanted}


def _leading_shape(values: Mapping[str, Tensor], ranks: Mapping[str, tuple[int, int]]) -> torch.Size:
    """Return the shape of the draws that values have on the left of plates; empty for a single one."""
    depth = max((batch for batch, _ in ranks.values()), default=0)
    shapes = [
        value.shape[: value.dim() - depth - ranks[name][1]]
        for name, value in values.items()
        if name in ranks and value.dim() > depth + ranks[name][1]
    ]
    return torch.Size(np.broadcast_shapes(*shapes))


def _one_of(value: Tensor, number: int, lead: torch.Size, rank: tuple[int, int]) -> Tensor:
    """Return the value of one draw, with the dimensions that it has in the model."""
    own = sum(rank)
    if value.dim() <= own:
        return value
    last = value.shape[value.dim() - own :]
    outer = value.shape[: value.dim() - own]
    inner = len(outer) - len(lead) if len(outer) > len(lead) else 0
    if len(outer) < len(lead) or outer[: len(lead)] != lead:
        value = value.expand(*lead, *outer[len(outer) - inner :], *last)
    return value.reshape(lead.numel(), -1, *last)[number, 0]


def stacked(priors: Sequence[SitePrior], lead: torch.Size, shape: Sequence[int]) -> SitePrior:
    """Return the priors of several draws as one, with the dimensions of the draws on the left.

    Args:
        priors: The priors, one for each draw.
        lead: The shape of the draws.
        shape: The same with a dimension of size one for each plate that the site is not in.
    """
    first = priors[0]

    def join(parts: Sequence[Tensor]) -> Tensor:
        joined = torch.stack(list(parts))
        return joined.reshape(*shape, *joined.shape[1:])

    tril = (
        None if first.scale_tril is None else join([p.scale_tril for p in priors if p.scale_tril is not None])
    )
    transform = None
    if first.transform is not None:
        transform = _Several([p.transform for p in priors if p.transform is not None], len(lead))
    return SitePrior(
        join([p.loc for p in priors]), join([p.log_scale for p in priors]), tril, transform, first.standard
    )


class _Several(Transform):
    """One map for each draw, along dimensions on the left."""

    bijective = True
    sign = 1

    def __init__(self, parts: Sequence[Transform], dims: int) -> None:
        super().__init__()
        self.parts, self.dims = list(parts), dims
        self.domain, self.codomain = parts[0].domain, parts[0].codomain

    def with_cache(self, cache_size: int = 1) -> "_Several":
        """Return itself: values are not kept."""
        return self

    def _each(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        lead = values[0].shape[: self.dims]
        flat = [value.expand(*lead, *value.shape[self.dims :]).flatten(0, self.dims - 1) for value in values]
        parts = [function(part, *(value[i] for value in flat)) for i, part in enumerate(self.parts)]
        joined = torch.stack(parts)
        return joined.reshape(*lead, *joined.shape[1:])

    def _call(self, x: Tensor) -> Tensor:
        return self._each(lambda part, u: part(u), x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._each(lambda part, value: part.inv(value), y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logarithm of the volume of values over that of the coordinate."""
        return self._each(lambda part, u, value: part.log_abs_det_jacobian(u, value), x, y)
