r"""Weighted runs of a guide and a model, side by side and in chunks, and how draws are read from them.

A draw of the guide has the weight :math:`w = p(x, z) / q(z | x)` towards the posterior. Chunks are run again from their
random states where only some of their draws are kept, so that a large pool takes no more memory than a small one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer.checkpoints import random_state, set_random_state
from pyro_graphflows.infer.importance import ImportanceSampler
from pyro_graphflows.infer.model_runs import (
    Fitted,
    Run,
    chunk_size,
    chunks,
    out_of_batch,
    site_shapes,
)
from pyro_graphflows.infer.particles import (
    Program,
    density_sites,
    evaluation_mode,
    find_data_plate,
    inside,
    log_density,
    prototype,
    run_pair,
)
from pyro_graphflows.inspect import require_pair

__all__ = ["WeightedRuns", "evaluated", "require_spread", "without_replacement"]


@contextmanager
def evaluated(*programs: Any) -> Iterator[None]:
    """Evaluate a model and a guide: no gradients, evaluation mode, no outer effect handlers."""
    pair = (programs[0].model, programs[0].guide) if isinstance(programs[0], Fitted) else programs
    with evaluation_mode(*pair), torch.no_grad(), poutine.block():
        yield


@dataclass(frozen=True, eq=False)
class WeightedRuns:
    """Weighted runs of a guide and a model, and how draws are read from them."""

    fitted: Fitted
    sampler: ImportanceSampler
    first: Any  # the prototype

    @classmethod
    def of(
        cls, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "WeightedRuns":
        """Run both once, find out whether the posterior factorises and whether they can run in batches."""
        require_pair(model, guide)
        model_trace, _ = run_pair(model, guide, args, kwargs)
        if not any(site["is_observed"] for _, site in density_sites(model_trace)):
            raise UnsupportedModelError(
                "Expected the model to have observed sites; without any there is no posterior. Give the data as its "
                "arguments, or condition it (poutine.condition)."
            )
        first = prototype(model, guide, args, kwargs, allow_enumeration=True)
        traces = (first.model_trace, first.guide_trace)
        sites = site_shapes(first.model_trace)
        latents = tuple(
            name for name, site in sites.items() if site.kind == "latent" and name in first.guide_trace
        )
        if not latents:
            raise UnsupportedModelError(
                "Expected the guide to sample latent sites of the model; it samples none."
            )
        try:
            plate = find_data_plate(first.model_trace, None)
        except GraphflowsError:  # several plates could hold the data: then they are weighed together
            plate = None
        if plate is not None:
            together = (site for trace in traces for _, site in density_sites(trace))
            plate = plate if all(inside(site, plate.name) for site in together) else None
        fitted = Fitted(model, guide, args, kwargs, sites, latents, first.max_plate_nesting, True)
        source = cls(fitted, ImportanceSampler(model, guide, args, kwargs, first, plate, True), first)
        state = random_state()
        try:
            pair = source.sampler.run(2)
            source.sampler.require_same_alone(pair)
            source.values(pair, 2)
            mixed = source._mixes(pair)
        except UnsupportedModelError:
            mixed = True
        set_random_state(state)
        if not mixed:
            return source
        return cls(replace(fitted, vectorize=False), replace(source.sampler, vectorize=False), first)

    def _mixes(self, traces: Any) -> bool:
        """Return whether deterministic sites of a batch are not those of single draws."""
        sites = self.fitted.sites
        if self.sampler.enumerates or all(site.kind != "deterministic" for site in sites.values()):
            return False
        runs = self.fitted.runs()
        return runs.differs_alone(Run(traces[0], None, 2), Run(self.first.model_trace, None, 1), sites)

    def runs(self, num: int) -> Iterator[tuple[slice, dict[str, Any], Any]]:
        """Yield which draws, the random state before them, and their traces."""
        traces = (self.first.model_trace, self.first.guide_trace)
        size = chunk_size(*traces) if self.fitted.vectorize else 1
        for part in chunks(num, size):
            state = random_state()
            yield part, state, self.sampler.run(part.stop - part.start)

    def log_weights(self, traces: Any) -> Tensor:
        """Return the logarithms of the weights of a run.

        Raises:
            GraphflowsError: If one is not a number or is infinite; the message names the site.
        """
        weights = self.sampler.log_weights(traces)
        if bool((weights.isnan() | (weights == torch.inf)).any()):
            for program, trace in zip(("guide", "model"), reversed(traces), strict=True):
                for name, site in density_sites(trace):
                    density = log_density(site)
                    bad = int((density.isnan() | (density == torch.inf)).sum())
                    if bad:
                        raise GraphflowsError(
                            f"Expected finite log-densities; that of site {name!r} in the {program} is nan or inf for "
                            f"{bad} of {density.numel()} elements. Look at its parameters there."
                        )
            raise GraphflowsError(
                "Expected finite weights; draws of the guide have density zero under the guide itself."
            )
        return weights

    def values(self, traces: Any, size: int) -> dict[str, Tensor]:
        """Return the draws of latent and deterministic sites, (S, *shape)."""
        wanted = {name: self.fitted.sites[name] for name in self.fitted.latents}
        if not self.sampler.enumerates:
            wanted = {
                name: site
                for name, site in self.fitted.sites.items()
                if name in wanted or site.kind == "deterministic"
            }
        result = {}
        for name, site in wanted.items():
            value = torch.as_tensor(traces[0].nodes[name]["value"])
            if self.fitted.vectorize:
                result[name] = out_of_batch(value, size, site, self.fitted.nesting)
            elif tuple(value.shape) == site.shape:
                result[name] = value[None]
            else:
                raise UnsupportedModelError(
                    f"Expected site {name!r} to have the same shape in all draws; got {site.shape} and "
                    f"{tuple(value.shape)}."
                )
        return result

    def gather(
        self, states: list[tuple[slice, dict[str, Any]]], chosen: Tensor, bar: Any
    ) -> dict[str, Tensor]:
        """Run chunks again from their random states and keep the chosen draws of the latent sites.

        Args:
            states: The chunks.
            chosen: Which draws to keep, (num,) or for each datum (num, data).
            bar: A progress bar.
        """
        kept: dict[str, Tensor] = {}
        for part, state in states:
            here = (chosen >= part.start) & (chosen < part.stop)
            bar.update(part.stop - part.start)
            if not bool(here.any()):
                continue
            set_random_state(state)
            values = self.values(self.sampler.run(part.stop - part.start), part.stop - part.start)
            for name in self.fitted.latents:
                value = values[name]
                if name not in kept:
                    kept[name] = value.new_empty((len(chosen), *value.shape[1:]))
                if chosen.dim() == 1:
                    kept[name][here] = value[chosen[here] - part.start]
                else:
                    axis = self._data_axis(name)
                    rows, data = here.nonzero(as_tuple=True)
                    target, source = kept[name].movedim(axis, 1), value.movedim(axis, 1)
                    target[rows, data] = source[chosen[rows, data] - part.start, data]
        return kept

    def _data_axis(self, name: str) -> int:
        plate, site = self.sampler.plate, self.fitted.sites[name]
        assert plate is not None
        return next(dim for other, dim, _ in site.plates if other == plate.name) - site.event_dim

    def deterministic(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the deterministic sites at some draws."""
        sites = {name: site for name, site in self.fitted.sites.items() if site.kind == "deterministic"}
        if not sites or self.sampler.enumerates:
            return {}
        runs, num = self.fitted.runs(), len(next(iter(draws.values())))
        parts: list[dict[str, Tensor]] = []
        size = chunk_size(self.first.model_trace) if self.fitted.vectorize else 1
        for part in chunks(num, size):
            if self.fitted.vectorize:
                run = runs.batch({name: value[part] for name, value in draws.items()}, part.stop - part.start)
                parts.append(runs.values(run, sites))
            else:
                run = runs.alone({name: value[part.start] for name, value in draws.items()})
                parts.append({name: torch.as_tensor(run.trace.nodes[name]["value"])[None] for name in sites})
        return {name: torch.cat([part[name] for part in parts]) for name in sites}


def without_replacement(log_weights: Tensor, num: int) -> Tensor:
    """Return which ``num`` draws to keep, of each column, in random order.

    The largest of the log-weights plus independent Gumbel variables are a sample without replacement.
    """
    positive = int((log_weights > -torch.inf).sum(0).min())
    if positive < num:
        raise GraphflowsError(
            f"Expected at least {num} draws of the pool of {len(log_weights)} with a positive weight; got {positive}. "
            "Train the guide, or give it the support of the model's latent sites."
        )
    gumbel = -torch.log(torch.empty_like(log_weights).exponential_())
    chosen = (log_weights + gumbel).topk(num, 0).indices
    order = torch.rand(chosen.shape, device=chosen.device).argsort(0)
    return chosen.gather(0, order)


def require_spread(draws: Mapping[str, Tensor], latents: tuple[str, ...], guide_trace: Any) -> None:
    """Raise for a guide that gives the same values again and again."""
    if len(next(iter(draws.values()))) < 2:
        return
    same = all(bool((draws[name] == draws[name][:1]).all()) for name in latents)
    points = [name for name in latents if isinstance(_base(guide_trace.nodes[name]["fn"]), Delta)]
    if same and points:
        raise UnsupportedModelError(
            f"Expected a guide with a density; it gives the same values in all draws ({sorted(points)} are points, as "
            "those of AutoDelta are). Use a guide that draws from a distribution."
        )


def _base(distribution: Any) -> Any:
    while hasattr(distribution, "base_dist") and not isinstance(distribution, Delta):
        distribution = distribution.base_dist
    return distribution
