r"""Draws of the posterior itself, by Markov chains that start from draws of a guide.

Chains move in coordinates in which the posterior is as near to a normal as the guide knows. A guide with a method
``transport(*args)`` has a map from noise to latents, and in the coordinates of that noise the posterior is standard as
far as the guide is right. For any other guide they are unconstrained values, in units of the mean and standard
deviation of the guide's draws.

*Per datum or joint.* Where the posterior factorises over the data, each datum is a target of its own, with a step size
of its own, and all move together (:mod:`~pyro_graphflows.infer.batched_hmc`); only those that need it are kept. A
joint posterior is one target, for :class:`~pyro_graphflows.infer.batched_hmc.NUTS`.

Discrete sites that the model enumerates are summed out of the density.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer.batched_hmc import HMC, NUTS, ChainDraws, Kernel, run_chains
from pyro_graphflows.infer.chains import Chains, bulk_ess, split_rhat
from pyro_graphflows.infer.enumeration import enumerated, summed_log_density
from pyro_graphflows.infer.model_runs import NUMBERS_AT_ONCE, Fitted
from pyro_graphflows.infer.particles import PARTICLES, density_sites, keep_dims, log_density
from pyro_graphflows.inspect.runs import support_of

__all__ = [
    "Coordinates",
    "Refined",
    "Target",
    "chosen_rows",
    "coordinates_of",
    "kernel_of",
    "refine",
    "starting_rows",
]

# of noise in the coordinates of a guide; steps of chains go beyond, where quantile functions have no number
FARTHEST = 1e4

METHODS = ("nuts", "hmc")


class Coordinates(Protocol):
    """Where chains move: what a guide's ``transport`` is.

    Attributes:
        shapes: For each site the shape of its coordinates: the batch shape, and the length of a vector.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See above."""
        ...

    def __call__(self, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return values and the log-determinants of the map, (draws, *batch), by site."""
        ...

    def inverse(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the coordinates of values."""
        ...


class Unconstrained:
    """Unconstrained values in units of some draws.

    Args:
        fitted: The model and what is known of its sites.
        draws: The draws.

    Raises:
        UnsupportedModelError: If a site is discrete, or its support depends on other latents.
    """

    def __init__(self, fitted: Fitted, draws: Mapping[str, Tensor]) -> None:
        runs = fitted.runs()
        last = len(next(iter(draws.values()))) - 1
        traces = [
            runs.alone({name: value[place] for name, value in draws.items()}).trace for place in (0, last)
        ]
        self._values = {name: fitted.sites[name].shape for name in draws}
        self._maps: dict[str, Any] = {}
        self._events: dict[str, torch.Size] = {}
        self._units: dict[str, tuple[Tensor, Tensor]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, value in draws.items():
            nodes: list[Any] = [trace.nodes[name] for trace in traces]
            first, second = (biject_to(support_of(node["fn"])) for node in nodes)
            unconstrained = first.inv(value)
            if not bool(unconstrained.isfinite().all()) or not _same_map(first, second, unconstrained[:1]):
                raise UnsupportedModelError(
                    f"Expected the support of site {name!r} not to depend on other latents; it does. Use a guide with "
                    "guide.transport, as those of auto_faithful_guide, whose map follows the support."
                )
            num_batch = fitted.sites[name].num_batch
            flat = unconstrained.reshape((len(value), *fitted.sites[name].shape[:num_batch], -1))
            scale = flat.std(0) if len(flat) > 1 else torch.ones_like(flat[0])
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            self._maps[name], self._units[name] = first, (flat.mean(0), scale)
            shapes[name] = tuple(flat.shape[1:])
            self._events[name] = unconstrained.shape[1 + num_batch :]
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def __call__(self, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See :class:`Coordinates`."""
        values, log_det = {}, {}
        for name, shape in self.shapes.items():
            loc, scale = self._units[name]
            flat = loc + scale * noise[name]
            raw = flat.reshape((*flat.shape[:-1], *self._events[name]))
            values[name] = self._maps[name](raw).reshape((len(flat), *self._values[name]))
            stretch = self._maps[name].log_abs_det_jacobian(raw, values[name])
            log_det[name] = stretch.reshape((len(flat), *shape[:-1], -1)).sum(-1) + scale.log().sum(-1)
        return values, log_det

    def inverse(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Coordinates`."""
        found = {}
        for name, shape in self.shapes.items():
            loc, scale = self._units[name]
            flat = self._maps[name].inv(values[name]).reshape((len(values[name]), *shape))
            found[name] = (flat - loc) / scale
        return found


def _same_map(first: Any, second: Any, at: Tensor) -> bool:
    one, other = first(at), second(at)
    return bool(one.shape == other.shape and torch.allclose(one, other))


def coordinates_of(fitted: Fitted, draws: Mapping[str, Tensor]) -> Coordinates:
    """Return the coordinates for chains of a posterior.

    Args:
        fitted: The model, the guide and their arguments.
        draws: Draws of the latent sites.

    Raises:
        UnsupportedModelError: If the guide samples a discrete site, or a support depends on other latents and the guide
            has no map.
    """
    trace = fitted.runs().alone({name: value[0] for name, value in draws.items()}).trace
    nodes: Any = trace.nodes
    discrete = sorted(name for name in draws if nodes[name]["fn"].support.is_discrete)
    if discrete:
        raise UnsupportedModelError(
            f"Expected continuous latent sites; the guide samples the discrete ones {discrete}, which have no "
            "gradients. Mark them infer={'enumerate': 'parallel'} in the model, not in the guide: they are "
            "summed over then."
        )
    transport = getattr(fitted.guide, "transport", None)
    if callable(transport):
        try:
            coordinates: Coordinates = transport(*fitted.args, **fitted.kwargs)
            return coordinates
        except UnsupportedModelError:  # a distribution of the user's that is no known map of noise
            pass
    return Unconstrained(fitted, draws)


def starting_rows(log_weights: Tensor, num_chains: int) -> Tensor:
    """Return which draws chains start from, at random among those with a density.

    Args:
        log_weights: Logarithms of the weights, (draws,) or (draws, data).
        num_chains: The number of chains.

    Returns:
        Numbers of draws, (chains,) or (chains, data).

    Raises:
        GraphflowsError: If no draw has a density.
    """
    possible = log_weights > -torch.inf
    count = possible.sum(0)
    hopeless = int((count == 0).sum())
    if hopeless:
        which = "all weights are zero" if count.dim() == 0 else f"all weights of {hopeless} data are zero"
        raise GraphflowsError(
            f"Expected draws with a positive density under the model, for chains to start from; {which}. Train the "
            "guide, or give it the support of the model's latent sites."
        )
    order = torch.where(possible, torch.rand_like(log_weights), 2.0).argsort(0)
    places = torch.arange(num_chains, device=order.device).reshape(-1, *[1] * count.dim()) % count
    return order.gather(0, places)


def chosen_rows(draws: Tensor, rows: Tensor, axis: int | None) -> Tensor:
    """Return some draws of a site: the same for all data, or others for each element of an axis."""
    if axis is None:
        return draws[rows]
    moved = draws.movedim(axis, 1)
    return moved[rows, torch.arange(rows.shape[1], device=rows.device)].movedim(1, axis)


class Target:
    """The density of a posterior in some coordinates, as chains see it.

    Points are tensors (chains, targets, dimensions): one target if the posterior is joint, else one for each datum that
    is chosen; the others stay at their first values.

    Args:
        fitted: The model, the guide and their arguments.
        coordinates: The coordinates.
        start: Values where chains start, chains along the first dimension.
        data_plate: The plate over which the posterior factorises.
        chosen: Which of its elements move.
    """

    def __init__(
        self,
        fitted: Fitted,
        coordinates: Coordinates,
        start: Mapping[str, Tensor],
        data_plate: str | None,
        chosen: Tensor,
    ) -> None:
        self.fitted, self.coordinates, self.chosen = fitted, coordinates, chosen
        self.axes = {name: self._axis(name, data_plate) for name in coordinates.shapes}
        self.plate_dim = next(
            (dim for site in fitted.sites.values() for plate, dim, _ in site.plates if plate == data_plate),
            None,
        )
        with torch.no_grad():
            self.others = self.pack(coordinates.inverse(start))
        self.start = self.others[:, chosen] if data_plate is not None else self.others
        self.data_plate = data_plate
        self._model = fitted.model
        if fitted.summed_out:
            self._model = enumerated(fitted.model, fitted.nesting + fitted.vectorize)

    def _axis(self, name: str, data_plate: str | None) -> int | None:
        """Return the axis of the data among the coordinates of a draw, counted from the right."""
        return next(
            (dim - 1 for plate, dim, _ in self.fitted.sites[name].plates if plate == data_plate), None
        )

    def pack(self, noise: Mapping[str, Tensor]) -> Tensor:
        """Return coordinates by site as points (C, G, D), all data included."""
        parts = []
        for name, value in noise.items():
            axis = self.axes[name]
            moved = value.unsqueeze(1) if axis is None else value.movedim(axis, 1)
            parts.append(moved.flatten(2))
        return torch.cat(parts, 2)

    def unpack(self, points: Tensor) -> dict[str, Tensor]:
        """Return points, all data included, by site: the inverse of :meth:`pack`."""
        found, start = {}, 0
        for name, shape in self.coordinates.shapes.items():
            axis = self.axes[name]
            rest = list(shape)
            if axis is not None:
                del rest[axis]
            size = math.prod(rest)
            part = points[..., start : start + size].reshape((*points.shape[:2], *rest))
            found[name] = part.squeeze(1) if axis is None else part.movedim(1, axis)
            start += size
        return found

    def whole(self, points: Tensor) -> Tensor:
        """Return points with those of the data that stay."""
        if self.data_plate is None or bool(self.chosen.all()):
            return points
        others = (
            self.others[:1].expand(len(points), -1, -1) if len(points) != len(self.others) else self.others
        )
        place = self.chosen.nonzero().squeeze(-1)
        return others.index_copy(1, place, points)

    def __call__(self, points: Tensor) -> Tensor:
        """Return energies (C, G) of points (C, G, D), infinite where no noise ever is."""
        far = None
        if not isinstance(self.coordinates, Unconstrained):
            far = ~(points.abs() <= FARTHEST).all(-1)
            points = points.masked_fill(far.unsqueeze(-1), 0.0)
        with pyro.validation_enabled(False):
            values, log_det = self.coordinates(self.unpack(self.whole(points)))
            energy = -self._log_joint(values)
        for name, term in log_det.items():
            axis = self.axes[name]
            moved = term.unsqueeze(1) if axis is None else term.movedim(axis + 1, 1)
            energy = energy - moved.reshape((*moved.shape[:2], -1)).sum(-1)
        energy = energy if self.data_plate is None else energy[:, self.chosen]
        return energy if far is None else energy.masked_fill(far, math.inf)

    def values(self, points: Tensor) -> dict[str, Tensor]:
        """Return the values of latent sites at points (C, G, D)."""
        with pyro.validation_enabled(False):  # points far off, as in the energy
            return self.coordinates(self.unpack(self.whole(points)))[0]

    def _log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the log-density of the model, (C, 1) or (C, data)."""
        fitted, num = self.fitted, len(next(iter(values.values())))
        runs = fitted.runs(self._model)
        if not fitted.vectorize:
            alone = [
                self._of(runs.alone({name: value[place] for name, value in values.items()}).trace, False)
                for place in range(num)
            ]
            return torch.stack(alone)
        return self._of(runs.batch(values, num).trace, True)

    def _of(self, trace: Any, batch: bool) -> Tensor:
        plates = {PARTICLES: -1 - self.fitted.nesting} if batch else {}
        if self.data_plate is not None:
            assert self.plate_dim is not None
            plates[self.data_plate] = self.plate_dim
        if self.fitted.summed_out:
            total = summed_log_density(trace, list(plates))
        else:
            dims = tuple(plates.values())
            terms = [keep_dims(log_density(site), dims, wide=True) for _, site in density_sites(trace)]
            total = sum(terms[1:], terms[0])
        return total if self.data_plate is not None else total.unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class Refined:
    """What chains gave.

    Attributes:
        draws: Values of the latent sites, the draws of the first chain first; data that were not refined are at the
            first of the values where the chains start.
        chains: What is known of the chains.
    """

    draws: dict[str, Tensor]
    chains: Chains


def kernel_of(method: str | Kernel, joint: bool) -> Kernel:
    """Return the kernel of a method: ``"nuts"`` means batched HMC for posteriors per datum.

    Raises:
        GraphflowsError: If the method is unknown.
    """
    if isinstance(method, HMC | NUTS):
        return method
    if method not in METHODS:
        raise GraphflowsError(
            f"Expected method one of {', '.join(map(repr, METHODS))}, NUTS(...) or HMC(...); got {method!r}."
        )
    return NUTS() if method == "nuts" and joint else HMC()


def refine(
    target: Target, kernel: Kernel, num_samples: int, kept: int, tick: Callable[[], object]
) -> Refined:
    """Run chains and read the draws.

    Args:
        target: The posterior.
        kernel: One step of all chains, and how they are warmed up.
        num_samples: The number of draws of a chain.
        kept: The most draws of a chain to keep, evenly spaced.
        tick: Called after each step.
    """
    visited = run_chains(kernel, target, target.start, num_samples, tick)
    points = visited.points
    if len(points) > kept:
        points = points[torch.linspace(0, len(points) - 1, kept).round().long()]
    num_kept, num_chains = points.shape[:2]
    parts: dict[str, list[Tensor]] = {}
    at_once = max(1, NUMBERS_AT_ONCE // math.prod(target.others.shape[1:]))
    with torch.no_grad():
        for chain in points.transpose(0, 1):  # (samples, G, D)
            for part in chain.split(at_once if target.fitted.vectorize else 1):
                for name, value in target.values(part).items():
                    parts.setdefault(name, []).append(value)
    draws = {name: torch.cat(value) for name, value in parts.items()}
    return Refined(draws, _chains(draws, num_chains, num_kept, target, visited))


def _chains(
    draws: Mapping[str, Tensor], num_chains: int, num_samples: int, target: Target, visited: ChainDraws
) -> Chains:
    rhat, ess = {}, {}
    for name, value in draws.items():
        by_chain = value.reshape((num_chains, num_samples, *value.shape[1:]))
        known = num_samples >= 4
        rhat[name] = split_rhat(by_chain) if known else torch.full_like(value[0], torch.nan)
        ess[name] = bulk_ess(by_chain) if known else torch.full_like(value[0], torch.nan)
        axis = target.axes[name]
        if axis is not None and not bool(target.chosen.all()):
            axis = axis + 1 - target.fitted.sites[name].event_dim
            for number in (rhat[name], ess[name]):
                number.movedim(axis, 0)[~target.chosen] = torch.nan
    return Chains(
        num_chains=num_chains,
        refined=target.chosen,
        rhat=rhat,
        ess=ess,
        acceptance=visited.acceptance,
        step_size=visited.step_size,
        divergent=visited.divergent,
        gradients=visited.gradients,
        interrupted=visited.interrupted,
    )
