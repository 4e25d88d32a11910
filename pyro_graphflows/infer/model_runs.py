"""Runs of a model at given draws of its latent sites, many at once where the model is written for that.

Prediction, pointwise likelihoods and cross-validation all run a model at draws that are there already.
:class:`ModelRuns` makes these runs in chunks whose memory is bounded, puts the draws into the places where the model
expects them, and takes results out as ``(draws, *shape alone)``.

What a model *returns* or computes as ``pyro.deterministic`` has no declared shape: a sum over a plate, written for one
run, adds up all draws in a batch, without an error. The first chunk is therefore compared with one of its draws run
alone; where they differ, all draws are run one by one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.infer.particles import (
    Program,
    all_sites,
    density_sites,
    errors_of_batches,
    is_enumerated,
    particle_plate,
    plates_of,
)

__all__ = [
    "Fitted",
    "Hold",
    "ModelRuns",
    "Run",
    "SiteShape",
    "chunk_size",
    "chunks",
    "in_batch",
    "joined",
    "out_of_batch",
    "single",
    "site_shapes",
    "stacked",
]

NUMBERS_AT_ONCE = 2**21  # values of sites held by the draws of one chunk


class SiteShape(NamedTuple):
    """What is known of a site of a model.

    Attributes:
        kind: ``"latent"``, ``"observed"`` or ``"deterministic"``.
        shape: The shape of its value in one run.
        event_dim: How many of these dimensions belong to one draw.
        plates: The vectorised plates around it, outer to inner: name, dimension and size.
        enumerated: Whether the model marks it for parallel enumeration.
    """

    kind: str
    shape: tuple[int, ...]
    event_dim: int
    plates: tuple[tuple[str, int, int], ...]
    enumerated: bool = False

    @property
    def num_batch(self) -> int:
        """The number of dimensions that are not of one draw."""
        return len(self.shape) - self.event_dim


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model and a guide with the arguments of the data, and what is known of the model's sites there.

    Attributes:
        model: The model.
        guide: The guide.
        args: Their positional arguments.
        kwargs: Their keyword arguments.
        sites: The model's sites; latent ones that the guide leaves out are summed out or drawn from the model.
        latents: The latent sites that the guide draws.
        nesting: The number of dimensions that the plates of both take.
        vectorize: Whether many draws can be run at once.
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sites: Mapping[str, SiteShape]
    latents: tuple[str, ...]
    nesting: int
    vectorize: bool

    @property
    def summed_out(self) -> list[str]:
        """The sites that the model enumerates and the guide leaves out."""
        return [
            name
            for name, site in self.sites.items()
            if site.kind == "latent" and site.enumerated and name not in self.latents
        ]

    def runs(self, model: Program | None = None) -> "ModelRuns":
        """Return runs of the model, or of a variant of it, at draws of the latent sites."""

        def hold(draws: Mapping[str, Tensor], batch: bool) -> Messenger:
            if batch:
                draws = {
                    name: in_batch(value, self.sites[name], self.nesting) for name, value in draws.items()
                }
            return Hold(draws)

        return ModelRuns(model or self.model, self.args, self.kwargs, self.nesting, hold)


class Run(NamedTuple):
    """What came of some draws: the trace of the run, what the model returned, and the number of draws."""

    trace: poutine.Trace
    returned: Any
    size: int


class Hold(Messenger):
    """Give latent sites values instead of drawing them.

    Args:
        values: The values by site name.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


def site_shapes(trace: poutine.Trace) -> dict[str, SiteShape]:
    """Return what is known of the sites of one run of a model, those of subsampling left out."""
    found = {}
    for name, site in all_sites(trace):
        kind = "observed" if site["is_observed"] else "latent"
        if site["infer"].get("_deterministic"):
            kind = "deterministic"
        value = torch.as_tensor(site["value"])
        event_dim = value.dim() if kind == "deterministic" else site["fn"].event_dim
        plates = tuple((frame.name, frame.dim or 0, frame.size) for frame in plates_of(site))
        found[name] = SiteShape(kind, tuple(value.shape), event_dim, plates, is_enumerated(site))
    return found


def chunks(num: int, size: int) -> Iterator[slice]:
    """Yield slices of at most ``size`` that cover ``num``."""
    yield from (slice(start, min(start + size, num)) for start in range(0, num, size))


def chunk_size(*traces: poutine.Trace, factor: int = 1) -> int:
    """Return how many draws to run at once so that the values of their sites stay few.

    Args:
        traces: Traces of one draw.
        factor: How many runs each draw stands for.
    """
    numbers = sum(
        max(
            site["value"].numel() if isinstance(site["value"], Tensor) else 1,
            math.prod(site["fn"].batch_shape),
        )
        for trace in traces
        for _, site in density_sites(trace)
    )
    return max(1, NUMBERS_AT_ONCE // (max(1, numbers) * factor))


def in_batch(value: Tensor, site: SiteShape, nesting: int) -> Tensor:
    """Return draws (S, *shape) of a site as a run inside a plate of draws needs them: (S, 1, ..., 1, *shape)."""
    return value.reshape((len(value), *[1] * (nesting - site.num_batch), *site.shape))


def out_of_batch(value: Tensor, size: int, site: SiteShape, nesting: int) -> Tensor:
    """Return a site's value in a run inside a plate of draws as (S, *shape).

    Raises:
        UnsupportedModelError: If it has another shape.
    """
    between = nesting - site.num_batch
    if site.kind == "deterministic":  # all its dimensions count as of one draw
        between = max(0, value.dim() - 1 - len(site.shape))
    padded = value.reshape((1,) * (1 + between + len(site.shape) - value.dim()) + tuple(value.shape))
    try:
        return padded.expand(size, *[1] * between, *site.shape).reshape(size, *site.shape)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"Expected the shape {(size, *[1] * between, *site.shape)} in a batch of {size} draws; got "
            f"{tuple(value.shape)}."
        ) from error


@dataclass(frozen=True, eq=False)
class ModelRuns:
    """A model with its arguments, to be run at draws.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        nesting: The number of dimensions of its plates.
        hold: Makes the effect handler that gives latent sites the values of some draws, and whether in a batch.
    """

    model: Program
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    nesting: int
    hold: Callable[[Mapping[str, Tensor], bool], Messenger]

    @property
    def dim(self) -> int:
        """The dimension of the draws in a batch."""
        return -1 - self.nesting

    def alone(self, draw: Mapping[str, Tensor]) -> Run:
        """Run the model at one draw, without a batch."""
        with self.hold(draw, False):
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        return Run(trace, trace.nodes["_RETURN"]["value"], 1)

    def batch(self, draws: Mapping[str, Tensor], size: int, program: Program | None = None) -> Run:
        """Run the model at some draws at once.

        Args:
            draws: Their values, draws along the first dimension.
            size: Their number.
            program: What to run instead of the model.
        """
        with self.hold(draws, True), errors_of_batches(size):
            inside = particle_plate(self.model if program is None else program, size, self.dim)
            trace = poutine.trace(inside).get_trace(*self.args, **self.kwargs)
        return Run(trace, trace.nodes["_RETURN"]["value"], size)

    def values(self, run: Run, sites: Mapping[str, SiteShape]) -> dict[str, Tensor]:
        """Return the values of some sites of a batch, (S, *shape)."""
        return {
            name: out_of_batch(torch.as_tensor(run.trace.nodes[name]["value"]), run.size, site, self.nesting)
            for name, site in sites.items()
        }

    def differs_alone(self, run: Run, alone: Run, sites: Mapping[str, SiteShape]) -> bool:
        """Return whether what a batch computes for its last draw is not what that draw gives alone.

        Compared are deterministic sites and what the model returns, with the values of all sample sites held.

        Args:
            run: The batch.
            alone: A run of one draw; what models return is not compared where it has none.
            sites: The shapes of the model's sites.
        """
        random = {name: site for name, site in sites.items() if site.kind != "deterministic"}
        fixed = {name: site for name, site in sites.items() if site.kind == "deterministic"}
        try:
            last = {name: value[-1] for name, value in self.values(run, random).items()}
            again = poutine.trace(Hold(last)(self.model)).get_trace(*self.args, **self.kwargs)
            pairs = [
                (value[-1], again.nodes[name]["value"]) for name, value in self.values(run, fixed).items()
            ]
            if alone.returned is not None:
                batch = tensors_of(stacked(run.returned, alone.returned, run.size))
                single_run = tensors_of(again.nodes["_RETURN"]["value"])
                pairs += zip((value[-1] for value in batch), single_run, strict=True)
        except UnsupportedModelError:
            return True
        return not all(_close(first, torch.as_tensor(second)) for first, second in pairs)


def tensors_of(returned: Any) -> list[Tensor]:
    """Return the tensors in what a model returned, in order."""
    if isinstance(returned, Tensor):
        return [returned]
    if isinstance(returned, Mapping):
        return [tensor for value in returned.values() for tensor in tensors_of(value)]
    if isinstance(returned, list | tuple):
        return [tensor for value in returned for tensor in tensors_of(value)]
    return []


def stacked(returned: Any, alone: Any, size: int) -> Any:
    """Return what a batch returned with draws along the first dimension of each tensor.

    Args:
        returned: What the batch returned.
        alone: What one draw returns.
        size: The number of draws.

    Raises:
        UnsupportedModelError: If a tensor has another shape than draws of that of ``alone``.
    """
    if isinstance(alone, Tensor) and isinstance(returned, Tensor):
        return out_of_batch(
            returned, size, SiteShape("deterministic", tuple(alone.shape), alone.dim(), ()), 0
        )
    if isinstance(alone, Mapping) and isinstance(returned, Mapping) and set(alone) == set(returned):
        return {name: stacked(returned[name], alone[name], size) for name in alone}
    if isinstance(alone, list | tuple) and isinstance(returned, list | tuple) and len(alone) == len(returned):
        return tuple(stacked(value, single, size) for value, single in zip(returned, alone, strict=True))
    if isinstance(returned, Tensor) or isinstance(alone, Tensor):
        raise UnsupportedModelError("Expected a batch of draws to return what one draw returns.")
    return alone


def joined(parts: list[Any]) -> Any:
    """Join what chunks returned, draws along the first dimension."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple):
        return tuple(joined(list(column)) for column in zip(*parts, strict=True))
    return first


def single(returned: Any) -> Any:
    """Return what one draw returned as that of a batch of one."""
    if isinstance(returned, Tensor):
        return returned[None]
    if isinstance(returned, Mapping):
        return {name: single(value) for name, value in returned.items()}
    if isinstance(returned, list | tuple):
        return tuple(single(value) for value in returned)
    return returned


def _close(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    if not second.is_floating_point():
        return bool((first == second).all())
    tolerance = 10 * torch.finfo(second.dtype).eps ** 0.5
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)
