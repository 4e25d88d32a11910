"""Draws of a posterior by short chains, from a normal approximation of it.

A normal of the least divergence from a posterior lacks its skewness, and is too narrow where the posterior has tails.
Chains of Hamiltonian Monte Carlo that begin at draws of the normal, in units of its covariance, mend both in some
hundred gradients. They need not forget where they began: what a guide starts from is judged by its loss afterwards.

In one set of coordinates chains may hardly get about, as where effects and their scale are a funnel. Where others are
given, chains take some of their steps there, in units of what they have visited [1].

References:
    [1] Yu and Meng (2011), To Center or Not to Center: That Is Not the Question, Journal of Computational and Graphical
    Statistics 20.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_graphflows.guides.minimize import OUTSIDE
from pyro_graphflows.infer.batched_hmc import HMC, Space, State

__all__ = ["Coordinates", "OtherCoordinates", "run_short_chains"]

LENGTHS = (
    (40, 160),
    (15, 45),
)  # steps that are left out, in which step sizes are found, and steps that are kept
KERNEL = HMC(max_steps=16)
LEAST_DRAWS = 40  # for each number: of fewer, regressions on them lose more than chains gain
FIRST_STEP = 0.5  # in units of the covariance
EAGERNESS = 0.8  # by which the logarithm of the step size follows the acceptance
EVERY = 4  # steps of which one is in other coordinates
VISITS = 6  # of other coordinates, by which their units are found
SHRINKAGE = 0.1  # of correlations among what was visited there
MOST_SECONDS = 2.0  # of processor time for all steps, else there are fewer, or none
TRIED = 5  # steps that say how long all will take


@dataclass(frozen=True)
class Coordinates:
    """A target in some coordinates.

    Attributes:
        log_density: From points ``(chains, dimensions)`` to log-densities ``(chains,)``.
        centre: About where the target is, ``(dimensions,)``.
        factor: A square root of its covariance there, about.
    """

    log_density: Callable[[Tensor], Tensor]
    centre: Tensor
    factor: Tensor

    def point(self, units: Tensor) -> Tensor:
        """Return the points with some offsets from the centre, in units of the covariance."""
        return self.centre + units @ self.factor.T

    def units(self, point: Tensor) -> Tensor:
        """Return the offsets of some points."""
        return torch.linalg.solve(self.factor, (point - self.centre).T).T

    def space(self, like: Tensor) -> Space:
        """Return the target for chains, ``(chains, 1, dimensions)``, in units of the covariance."""

        def potential(units: Tensor) -> Tensor:
            try:
                return -self.log_density(self.point(units.squeeze(1))).unsqueeze(1)
            except OUTSIDE:
                return units.sum(-1) * 0.0 + math.inf

        return Space(potential, like)


@dataclass(frozen=True)
class OtherCoordinates:
    """Other coordinates of the same target.

    Attributes:
        log_density: From points ``(chains, dimensions)`` to log-densities ``(chains,)``.
        there: Maps points to these coordinates.
        back: Maps points back.
    """

    log_density: Callable[[Tensor], Tensor]
    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


class _Chains:
    """Chains in some coordinates: where they are, and the step size."""

    def __init__(self, coordinates: Coordinates, start: Tensor) -> None:
        self.coordinates = coordinates
        self.space = coordinates.space(start.unsqueeze(1))
        self.size = start.new_full((1, 1), FIRST_STEP)
        self.state: State = self.space.state(start.unsqueeze(1))

    @property
    def units(self) -> Tensor:
        """Where the chains are, in units of the covariance."""
        return self.state.position.squeeze(1)

    def put(self, units: Tensor) -> None:
        """Let chains go on elsewhere, those that have a density there."""
        state = self.space.state(units.unsqueeze(1))
        fine = state.energy.isfinite() & state.position.isfinite().all(-1)
        if not bool(fine.all()):
            state = self.space.state(torch.where(fine.unsqueeze(-1), state.position, self.state.position))
        self.state = state

    def step(self, adapts: bool) -> None:
        """Move once; perhaps let the step size follow the acceptance."""
        moved = KERNEL(self.space, self.state, self.size)
        self.state = moved.state
        if adapts:
            self.size = self.size * math.exp(EAGERNESS * (float(moved.acceptance.mean()) - KERNEL.acceptance))


def run_short_chains(
    coordinates: Coordinates, start: Tensor, other: OtherCoordinates | None = None
) -> Tensor | None:
    """Return what chains have visited, or None where they would take long, would be too few, or cannot begin.

    The random state is used and advanced.

    Args:
        coordinates: The target.
        start: Where the chains begin, in units of its covariance, ``(chains, dimensions)``.
        other: Other coordinates in which chains move as well.

    Returns:
        Offsets from the centre in units of the covariance, ``(kept steps * chains, dimensions)``.
    """
    lengths = [length for length in LENGTHS if length[1] * len(start) >= LEAST_DRAWS * start.shape[1]]
    if not lengths:
        return None
    chains = _Chains(coordinates, start)
    finite = chains.state.energy.isfinite().flatten()
    if not bool(finite.any()):
        return None
    if not bool(finite.all()):  # those begin where others do
        begun = start[finite]
        chains.put(torch.where(finite[:, None], start, begun[torch.arange(len(start)) % len(begun)]))
    elsewhere: _Chains | None = None
    seen: list[Tensor] = []
    visited: list[Tensor] = []
    left_out, kept = lengths[0]
    number, began = 0, time.process_time()
    while number < left_out + kept:
        number += 1
        chains.step(number <= left_out)
        if other is not None and number % EVERY == 0:
            point = other.there(coordinates.point(chains.units))
            if elsewhere is None:
                seen.append(point[point.isfinite().all(-1)])
                if len(seen) == VISITS:
                    found = _about(other.log_density, torch.cat(seen))
                    elsewhere = _Chains(found, found.units(point))
            else:
                elsewhere.put(elsewhere.coordinates.units(point))
                elsewhere.step(number <= 2 * left_out)
                back = other.back(elsewhere.coordinates.point(elsewhere.units))
                chains.put(coordinates.units(back))
        if number > left_out:
            visited.append(chains.units)
        if number <= TRIED:
            each = (time.process_time() - began) / TRIED  # at least
            affordable = [length for length in lengths if each * sum(length) <= MOST_SECONDS]
            if not affordable:
                return None
            left_out, kept = affordable[0]
    return torch.cat(visited)


def _about(log_density: Callable[[Tensor], Tensor], points: Tensor) -> Coordinates:
    """Return coordinates in units of points that were visited, with correlations drawn towards zero."""
    covariance = torch.cov(points.T).reshape(points.shape[1], -1)
    variances = covariance.diagonal().clamp(min=1e-12)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * variances.diag()
    return Coordinates(log_density, points.mean(0), torch.linalg.cholesky(covariance))
