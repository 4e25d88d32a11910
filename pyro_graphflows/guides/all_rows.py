"""The place of the posterior where a model draws rows of its data and each row has latents of its own.

In such a call each row counts for many, its latents with it. The density of a point is then no guide to where the
posterior is: as many copies of a latent that all have one value leave the data no room, and an unknown width of theirs
goes to zero. So the search takes all rows of the plates, one latent for each, and what it finds of the rows of the call
is used. Of very many it takes some, as if these were all: what they say of global latents is right, and wider. Where
the model has no others but those of the call, these are taken so, unless the local latents are known as well wherever
the global ones are.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.discrete_mode import (
    ClassMode,
    Configurations,
    DiscreteMode,
    Listed,
    find_discrete_mode,
)
from pyro_graphflows.guides.mode import Mode
from pyro_graphflows.inspect import TracedModel, trace_model
from pyro_graphflows.inspect.prior import UNCONSTRAINED
from pyro_graphflows.inspect.runs import drawn_rows

__all__ = ["Place", "find_place"]

MOST_NUMBERS = 2000  # of latent sites: searches for more take long
MOST_DRAWN = 5_000_000  # numbers in all draws
FEWEST_DRAWS = 200  # even so
MOST_IN_FULL = 1000  # numbers with a full Hessian
STEADY = 1e-4  # of a precision


@dataclass(frozen=True)
class Place:
    """The place of the posterior of a call.

    Attributes:
        mode: What was found.
        traced: The model as traced in the call.
        rows: The number of rows of the call in plates of which the search took more; those of the call are first.
        numbers: How many latent numbers the search had.
        note: Why the search took the rows of the call alone, where more would have been better.
    """

    mode: Mode | DiscreteMode | ClassMode | Configurations | Listed
    traced: TracedModel
    rows: Mapping[str, int]
    numbers: int
    note: str | None = None

    def draw(self, number: int, by_chains: bool = False) -> dict[str, Tensor]:
        """Return draws of all latent sites for the rows of the call, along the first dimension.

        Args:
            number: How many; fewer are drawn where so many would fill the memory.
            by_chains: Whether to return what short chains have visited.
        """
        if self.rows:
            number = min(number, max(FEWEST_DRAWS, MOST_DRAWN // self.numbers))
        if isinstance(self.mode, ClassMode | Configurations | Listed):
            draws = self.mode.draw(number)
        else:
            draws = self.mode.draw(number, by_chains)
        nodes: Any = self.traced.trace.nodes
        for name, value in draws.items() if self.rows else ():
            node = nodes[name.removesuffix(UNCONSTRAINED)]
            for frame in node["cond_indep_stack"]:
                if frame.name in self.rows:
                    value = value.narrow(frame.dim - node["fn"].event_dim, 0, self.rows[frame.name])
            draws[name] = value
        return draws


def find_place(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], traced: TracedModel
) -> Place:
    """Search for the place of the posterior of a call, by more rows where latents belong to those that it draws.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.

    Raises:
        UnsupportedModelError: As :func:`~pyro_graphflows.guides.discrete_mode.find_discrete_mode`.
    """

    def find(rows: Mapping[str, Tensor | None]) -> tuple[Any, int]:
        """Return the place by some rows as if these were all, and the number of numbers."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with drawn_rows(rows, alone=True):
                return model(*args, **kwargs)

        whole = update_wrapper(run, model, updated=())
        own = trace_model(whole, args, kwargs, strict=False)
        return find_discrete_mode(whole, args, kwargs, own), _numbers(own)

    nodes: Any = traced.trace.nodes
    more = _more_rows(traced)
    note: str | None = None
    if more:
        first = {name: len(nodes[name]["value"]) for name in more}
        try:
            mode, numbers = find(more)
            return Place(mode, traced, first, numbers)
        except Exception as error:  # of the model: its data are those of the call
            reason = str(error).partition("\n")[0].rstrip(".")
            note = (
                f"draws near the mode are by the rows of {', '.join(sorted(more))} that set-up had alone: "
                f"with others the model says {type(error).__name__}: {reason}."
            )
    own = _own_rows(traced)
    usual: Place | None = None
    try:
        usual = Place(find_discrete_mode(model, args, kwargs, traced), traced, {}, _numbers(traced), note)
    except UnsupportedModelError:
        if not own:
            raise
    if usual is not None and (not own or _is_steady(usual.mode, traced, own)):
        return usual
    try:
        mode, numbers = find(own)
    except UnsupportedModelError:
        if usual is None:
            raise
        return usual
    return Place(mode, traced, {}, numbers, note)


def _is_steady(mode: Any, traced: TracedModel, plates: Collection[str]) -> bool:
    """Whether latents in some plates are known as well wherever the others are, so that counting them often is right.

    A density of which local latents are summed out, many times, is then that of their best values, but for a constant.
    """
    if not isinstance(mode, Mode) or len(mode.point) > MOST_IN_FULL:
        return False
    nodes: Any = traced.trace.nodes
    parts = [
        torch.arange(each.part.start, each.part.stop)
        for name, each in mode.posterior.coordinates.items()
        if any(frame.name in plates for frame in nodes[name]["cond_indep_stack"])
    ]
    local, hessians = torch.cat(parts), mode.posterior.hessians()
    moved = mode.point + mode.factor @ torch.linspace(-1.0, 1.0, len(mode.point)).to(mode.point)
    found = [hessians.at(point)[2] for point in (mode.point, moved)]
    if any(hessian is None for hessian in found):
        return False
    here, there = (hessian[local.unsqueeze(-1), local] for hessian in found if hessian is not None)
    return torch.allclose(here, there, STEADY, STEADY)


def _numbers(traced: TracedModel) -> int:
    nodes: Any = traced.trace.nodes
    return sum(nodes[name]["value"].numel() for name in traced.graph.latent)


def _own_rows(traced: TracedModel) -> dict[str, Tensor | None]:
    """Return the rows of the call in plates with latents of which it has part; None where the caller gives them."""
    nodes: Any = traced.trace.nodes
    frames = {frame for name in traced.graph.latent for frame in nodes[name]["cond_indep_stack"]}
    found = {}
    for frame in frames:
        if frame.vectorized and (frame.full_size or frame.size) > frame.size:
            node = nodes.get(frame.name)
            is_drawn = node is not None and node["fn"].subsample_size is not None
            found[frame.name] = node["value"] if is_drawn else None
    return found


def _more_rows(traced: TracedModel) -> dict[str, Tensor]:
    """Return rows of the plates of which the model draws some that have latents: all, or as many as can be searched.

    Returns:
        Indices by plate, those of the call first; none where no plate is so.
    """
    nodes: Any = traced.trace.nodes
    stacks = {name: nodes[name]["cond_indep_stack"] for name in traced.graph.latent}
    local = {frame.name for stack in stacks.values() for frame in stack if frame.vectorized}
    drawn: dict[str, Any] = {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample"
        and site_is_subsample(node)
        and name in local
        and 1 < (node["fn"].subsample_size or math.inf) < node["fn"].size  # one row of data fits any number
    }

    def numbers(share: float) -> float:
        growth = {
            name: max(1.0, share * node["fn"].size / len(node["value"])) for name, node in drawn.items()
        }
        each = (
            nodes[name]["value"].numel() * math.prod(growth.get(frame.name, 1.0) for frame in stack)
            for name, stack in stacks.items()
        )
        return sum(each)

    share = 1.0
    while numbers(share) > MOST_NUMBERS and numbers(share) > numbers(0.0):
        share *= 0.9
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for name, node in drawn.items():
        own, size = node["value"], node["fn"].size
        others = torch.randperm(size, generator=generator).to(own)
        others = others[~torch.isin(others, own)]
        rows[name] = torch.cat([own, others])[: max(len(own), int(share * size))]
    return rows
