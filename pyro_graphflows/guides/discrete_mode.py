"""Draws near the posterior of one call where some latent sites are discrete.

The search for the place of the posterior sums over these sites, as a model does that marks them for enumeration, and
gives draws of all others. Given each of them, the discrete sites are drawn from their own posterior. Sites that data of
another plate look up are summed over in a way of their own (:mod:`~pyro_graphflows.guides.class_sums`). Where there is
no sum, as where data depend on all coefficients that are in or out of a regression, configurations of few sites are
tried one after the other, each with the mode of the others.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
    LogPosterior,
    Mode,
    find_mode,
    in_plate_of_draws,
    nesting_of,
    newton_mode,
    with_rows,
)
from pyro_graphflows.inspect import TracedModel, trace_model
from pyro_graphflows.inspect.runs import kept_buffers, kept_random_state, run_model

__all__ = ["ClassMode", "Configurations", "DiscreteMode", "Listed", "find_discrete_mode"]

ENUMERATED = {"enumerate": "parallel"}
MOST_ELEMENTS = 30  # of discrete sites of which configurations are tried
MOST_NUMBERS = 100  # of continuous sites beside them
MOST_LISTED = 1000  # configurations of discrete sites that are all there is
SECONDS = 5.0  # of processor time, after which no further configuration is tried


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


@dataclass(frozen=True)
class Configurations:
    """Normal approximations of the continuous sites, one for each of some configurations of the discrete ones.

    Attributes:
        modes: The normals.
        values: The values of discrete sites in each configuration.
        log_weights: The logarithms of what the configurations weigh.
    """

    modes: Sequence[Mode]
    values: Sequence[Mapping[str, Tensor]]
    log_weights: Tensor

    def draw(self, number: int) -> dict[str, Tensor]:
        """Return draws of all sites, along the first dimension; the random state is used and advanced.

        Args:
            number: How many; fewer are drawn where the model takes a run for each.
        """
        chosen = torch.multinomial(self.log_weights.softmax(0), number, replacement=True)
        found: list[dict[str, Tensor]] = []
        numbers: list[int] = []
        for i in chosen.unique().tolist():
            numbers.append(int((chosen == i).sum()))
            drawn = self.modes[i].draw(numbers[-1])
            size = len(next(iter(drawn.values())))
            own = {name: value.expand(size, *value.shape) for name, value in self.values[i].items()}
            found.append(drawn | own)
        # of a configuration there may be fewer draws than were asked for: then of all in proportion
        sizes = [len(next(iter(each.values()))) for each in found]
        share = min(size / wanted for size, wanted in zip(sizes, numbers, strict=True))
        kept = [math.ceil(share * wanted) for wanted in numbers]
        joined = {
            name: torch.cat([each[name][:size] for each, size in zip(found, kept, strict=True)])
            for name in found[0]
        }
        order = torch.randperm(len(next(iter(joined.values()))))
        return {name: value[order] for name, value in joined.items()}


@dataclass(frozen=True)
class Listed:
    """The posterior of few discrete sites that are all latent sites: the density of each of their configurations.

    Attributes:
        values: The values of the sites, one configuration in each row.
        log_joint: The log-densities of the model there.
    """

    values: Mapping[str, Tensor]
    log_joint: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, search: "_Search") -> "Listed":
        """Return the posterior over all configurations of a search.

        Raises:
            UnsupportedModelError: If there are too many, they take too long, or the model has a density at none.
        """
        number = math.prod(len(search.classes[name]) for name, _ in search.elements)
        if number > MOST_LISTED:
            raise UnsupportedModelError(
                f"discrete sites have {number} configurations; {MOST_LISTED} are the most."
            )
        places = itertools.product(*(range(len(search.classes[name])) for name, _ in search.elements))
        rows = [search.values(each) for each in places]
        log_joint = torch.tensor([search.log_joint(row) for row in rows], dtype=torch.double)
        if not bool(log_joint.logsumexp(0).isfinite()):
            raise UnsupportedModelError(
                "the model has no finite density at any configuration of its discrete sites."
            )
        return cls({name: torch.stack([row[name] for row in rows]) for name in search.shapes}, log_joint)

    def draw(self, number: int) -> dict[str, Tensor]:
        """Return draws of all sites, along the first dimension; the random state is used and advanced."""
        chosen = torch.multinomial(self.log_joint.softmax(0), number, replacement=True)
        return {name: value[chosen] for name, value in self.values.items()}


class _Search:
    """Goes uphill over the configurations of discrete sites, by the evidence of each as its mode has it.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.
        discrete: The names of the discrete sites.

    Raises:
        UnsupportedModelError: If there are too many elements, or values without an end.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        traced: TracedModel,
        discrete: Sequence[str],
    ) -> None:
        nodes: Any = traced.trace.nodes
        self.program = model, args, kwargs
        self.classes: dict[str, Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}
        for name in discrete:
            fn = nodes[name]["fn"]
            if not fn.has_enumerate_support:
                raise UnsupportedModelError(f"the values of {name} cannot be listed.")
            values = fn.enumerate_support(expand=False)
            self.classes[name] = values.reshape(len(values), *fn.event_shape)
            self.shapes[name] = fn.batch_shape
        self.elements = [
            (name, i) for name, shape in self.shapes.items() for i in range(torch.Size(shape).numel())
        ]
        if len(self.elements) > MOST_ELEMENTS:
            raise UnsupportedModelError(
                f"there are {len(self.elements)} discrete numbers; {MOST_ELEMENTS} are the most whose values are tried."
            )
        self.found: dict[tuple[int, ...], tuple[Mode, float] | None] = {}
        self.began = time.process_time()
        self.traced: TracedModel | None = None
        self.point: Tensor | None = None

    def values(self, configuration: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the values of the discrete sites in a configuration."""
        places = dict(zip(self.elements, configuration, strict=True))
        found = {}
        for name, shape in self.shapes.items():
            chosen = torch.tensor([places[name, i] for i in range(torch.Size(shape).numel())])
            found[name] = self.classes[name][chosen.reshape(shape)]
        return found

    def log_joint(self, values: dict[str, Tensor]) -> float:
        """Return the log-density of the model at values of all latent sites.

        Raises:
            UnsupportedModelError: If there is no time.
        """
        if time.process_time() - self.began > SECONDS:
            raise UnsupportedModelError(
                f"densities of all configurations take more than {SECONDS:g} seconds."
            )
        model, args, kwargs = self.program
        return float(run_model(poutine.condition(model, data=values), args, kwargs).log_prob_sum())

    def evidence(self, configuration: tuple[int, ...]) -> float:
        """Return the evidence of a configuration; minus infinity where there is no mode, or no time to find it."""
        if configuration not in self.found:
            if time.process_time() - self.began > SECONDS:
                return -math.inf
            self.found[configuration] = self._mode(configuration)
        own = self.found[configuration]
        return -math.inf if own is None else own[1]

    def _mode(self, configuration: tuple[int, ...]) -> tuple[Mode, float] | None:
        model, args, kwargs = self.program
        given = poutine.condition(model, data=self.values(configuration))
        try:
            if self.traced is None:
                self.traced = trace_model(given, args, kwargs, strict=False)
            posterior = LogPosterior(given, args, kwargs, self.traced)
            if posterior.size > MOST_NUMBERS:
                return None
            if self.point is None or len(self.point) != posterior.size:
                self.point = torch.zeros(posterior.size, dtype=torch.float64)
            mode = newton_mode(posterior, self.point)
            posterior.captured.forget()
            evidence = -math.inf if mode is None else mode.log_evidence
        except Exception:  # of the model, which may not have these values
            return None
        return None if mode is None or not math.isfinite(evidence) else (mode, evidence)

    def run(self) -> Configurations | None:
        """Return the configurations that were tried, by their weights; None if none has a mode."""
        most = max(len(classes) for classes in self.classes.values())
        same = [tuple(min(k, len(self.classes[name]) - 1) for name, _ in self.elements) for k in range(most)]
        best = max(same, key=self.evidence)
        improved = True
        while improved and math.isfinite(self.evidence(best)):
            improved = False
            for i, (name, _) in enumerate(self.elements):
                for k in range(len(self.classes[name])):
                    moved = (*best[:i], k, *best[i + 1 :])
                    if self.evidence(moved) > self.evidence(best):
                        best, improved = moved, True
                        own = self.found[best]
                        self.point = self.point if own is None else own[0].point
        kept = [(key, own) for key, own in self.found.items() if own is not None]
        if not kept:
            return None
        modes, evidences = zip(*(own for _, own in kept), strict=True)
        return Configurations(modes, [self.values(key) for key, _ in kept], torch.tensor(evidences))


def find_discrete_mode(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], traced: TracedModel
) -> Mode | DiscreteMode | ClassMode | Configurations | Listed:
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
    try:
        by_sums = _by_sums(model, args, kwargs, traced, discrete)
        if isinstance(by_sums, DiscreteMode):
            with kept_random_state():
                by_sums.draw(1)  # sums over vectors are found, but Pyro has no draws of them
        return by_sums
    except UnsupportedModelError:
        found: Configurations | Listed | None = None
        with suppress(UnsupportedModelError):
            search = _Search(model, args, kwargs, traced, discrete)
            found = search.run() if len(discrete) < len(traced.graph.latent) else Listed.of(search)
        if found is None:
            raise
        return found


def _by_sums(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    traced: TracedModel,
    discrete: tuple[str, ...],
) -> Mode | DiscreteMode | ClassMode:
    """Search for the place of the posterior by sums over discrete sites."""
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
