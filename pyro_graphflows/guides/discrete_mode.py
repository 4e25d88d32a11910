"""Draws near the posterior of one call where some latent sites are discrete.

The search for the place of the posterior sums over these sites, as a model does that marks them for enumeration, and
gives draws of all others. Given each of them, the discrete sites are drawn from their own posterior. Sites that data of
another plate look up are summed over in a way of their own (:mod:`~pyro_graphflows.guides.class_sums`).
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from torch import Tensor

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.class_sums import ClassSums, find_class_sums
from pyro_graphflows.guides.mode import (
    SINGLE_RUNS,
    Mode,
    find_mode,
    in_plate_of_draws,
    nesting_of,
    with_rows,
)
from pyro_graphflows.inspect import TracedModel, trace_model
from pyro_graphflows.inspect.runs import kept_buffers, run_model

__all__ = ["ClassMode", "DiscreteMode", "find_discrete_mode"]

ENUMERATED = {"enumerate": "parallel"}


@dataclass(frozen=True)
class DiscreteMode:
    """A normal approximation of the continuous sites, and the posterior of discrete ones given these.

    Attributes:
        mode: That of the continuous sites.
        model: The model in which discrete sites are marked for enumeration.
        traced: The model as traced.
        discrete: The names of the discrete sites.
    """

    mode: Mode
    model: Callable[..., Any]
    traced: TracedModel
    discrete: tuple[str, ...]

    @property
    def visited(self) -> Tensor | None:
        """What short chains have visited, as :attr:`Mode.visited`."""
        return self.mode.visited

    @torch.no_grad()
    def draw(self, number: int, by_chains: bool = False) -> dict[str, Tensor]:
        """Return draws of all sites, along the first dimension; the random state is used and advanced.

        Args:
            number: How many; fewer are drawn where the model takes a run for each.
            by_chains: Whether those of continuous sites are what chains have visited.

        Raises:
            UnsupportedModelError: If discrete sites cannot be drawn given the others.
        """
        values = self.mode.draw(number, by_chains)
        found: list[dict[str, Tensor]] = []
        if self.mode.posterior.takes_plate:
            with suppress(Exception):  # of the model, with discrete sites that take all their values
                found = [self._discrete(values, True)]
        if not found:
            values = {name: value[:SINGLE_RUNS] for name, value in values.items()}
            try:
                for i in range(len(next(iter(values.values())))):
                    found.append(self._discrete({name: value[i] for name, value in values.items()}, False))
            except Exception as error:  # of the model, or of its sum
                raise UnsupportedModelError(
                    f"discrete sites cannot be drawn given the others: {_said(error)}"
                ) from error
        return values | {name: torch.cat([each[name] for each in found]) for name in self.discrete}

    def _discrete(self, values: Mapping[str, Tensor], many: bool) -> dict[str, Tensor]:
        """Return draws of the discrete sites given many draws of the others, or one."""
        posterior, nesting = self.mode.posterior, nesting_of(self.traced)
        nodes: Any = self.traced.trace.nodes
        lead = next(iter(values.values())).shape[:1] if many else torch.Size()

        def missing(name: str) -> tuple[int, ...]:
            return (1,) * (nesting - len(nodes[name]["fn"].batch_shape)) if many else ()

        given = {
            name: values[name].reshape((*lead, *missing(name), *values[name].shape[len(lead) :]))
            for name in posterior.names
        }
        model = poutine.condition(with_rows(self.model, self.traced, {}), data=given)
        if many:
            model = in_plate_of_draws(model, lead.numel(), nesting)
        drawn = infer_discrete(model, first_available_dim=-1 - nesting - many, temperature=1)
        with kept_buffers(posterior.original), poutine.block(), pyro.validation_enabled(False):
            trace = poutine.trace(drawn).get_trace(*posterior.args, **posterior.kwargs)
        found = {}
        for name in self.discrete:
            own: Any = nodes[name]["fn"]
            whole = trace.nodes[name]["value"].expand(*lead, *missing(name), *own.shape())
            found[name] = whole.reshape(-1, *own.shape())
        return found


@dataclass(frozen=True)
class ClassMode:
    """The posterior of discrete sites that data look up, if these are all latent sites.

    Attributes:
        sums: How to sum over them.
        terms: The terms of the elements in each class, ``(classes, elements)``.
    """

    sums: ClassSums
    terms: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, sums: ClassSums, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "ClassMode":
        """Return the posterior for a call."""
        runs = [run_model(sums.at(model, i), args, kwargs) for i in range(sums.number)]
        return cls(sums, torch.stack([sums.terms(run)[0] for run in runs]))

    def draw(self, number: int) -> dict[str, Tensor]:
        """Return draws of all sites, along the first dimension; the random state is used and advanced."""
        return self.sums.draw(self.terms.expand(number, *self.terms.shape))


def find_discrete_mode(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], traced: TracedModel
) -> Mode | DiscreteMode | ClassMode:
    """Search for the place of the posterior, where latent sites are discrete as well.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.

    Raises:
        UnsupportedModelError: As :func:`~pyro_graphflows.guides.mode.find_mode`, and if the model cannot sum over its
            discrete sites.
    """
    nodes: Any = traced.trace.nodes
    discrete = tuple(name for name in traced.graph.latent if nodes[name]["fn"].support.is_discrete)
    if not discrete:
        return find_mode(model, args, kwargs, traced)
    alone = len(discrete) == len(traced.graph.latent)
    if any(traced.graph.outside_of_plates(name) for name in discrete):
        sums = find_class_sums(model, args, kwargs, traced, discrete)
        return (
            ClassMode.of(sums, model, args, kwargs) if alone else find_mode(model, args, kwargs, traced, sums)
        )
    if alone:
        raise UnsupportedModelError(
            f"there is no mode in continuous space: {', '.join(discrete)} is discrete."
        )

    def mark(site: Any) -> Any:
        return ENUMERATED if site["name"] in discrete else {}

    marked = poutine.infer_config(model, mark)
    try:
        mode = find_mode(marked, args, kwargs, trace_model(marked, args, kwargs, strict=False))
    except Exception as error:  # of the model, whose sites take all their values at once
        raise UnsupportedModelError(
            f"the model cannot sum over {', '.join(discrete)}: {_said(error)}"
        ) from error
    return DiscreteMode(mode, marked, traced, discrete)


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
