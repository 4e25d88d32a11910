"""Draws of a posterior by short chains, from a normal approximation of it.

A normal of the least divergence from a posterior lacks its skewness, and is too narrow where the posterior has tails.
Chains of Hamiltonian Monte Carlo that begin at draws of the normal, in units of its covariance, mend both in some
hundred gradients. They need not forget where they began: what a guide starts from is judged by its loss afterwards.
"""

import math
import time

import torch
from torch import Tensor

from pyro_graphflows.infer.batched_hmc import HMC, Potential, Space

__all__ = ["MOST_SECONDS", "run_short_chains"]

BURN_IN = 40  # steps of each chain in which its length is found; they are left out
KEPT = 160  # steps that are kept
KERNEL = HMC(max_steps=16)
FIRST_STEP = 0.5  # in units of the normal's covariance
EAGERNESS = 0.8  # by which the logarithm of the step size follows the acceptance
MOST_SECONDS = 3.0  # of processor time for all steps
TRIED = 5  # steps that say how long all will take


def run_short_chains(potential: Potential, start: Tensor) -> Tensor | None:
    """Return what chains have visited, ``(KEPT * chains, dimensions)``, or None where they would take long.

    The random state is used and advanced.

    Args:
        potential: From points ``(chains, 1, dimensions)`` to energies ``(chains, 1)``.
        start: Where the chains begin, draws of a normal in units of its covariance, ``(chains, dimensions)``.
    """
    space = Space(potential, start[:, None])
    state = space.state(start[:, None])
    finite = state.energy.isfinite().flatten()
    if not bool(finite.any()):
        return None
    if not bool(finite.all()):  # those begin where others do
        others = start[finite][torch.arange(len(start)) % int(finite.sum())]
        state = space.state(torch.where(finite[:, None], start, others)[:, None])
    size = start.new_full((1, 1), FIRST_STEP)
    visited = []
    began = time.process_time()
    for number in range(BURN_IN + KEPT):
        moved = KERNEL(space, state, size)
        state = moved.state
        if number < BURN_IN:
            size = size * math.exp(EAGERNESS * (float(moved.acceptance.mean()) - KERNEL.acceptance))
        else:
            visited.append(state.position[:, 0])
        seconds = time.process_time() - began
        if number + 1 == TRIED and seconds * (BURN_IN + KEPT) > MOST_SECONDS * TRIED:
            return None
    return torch.cat(visited)
