"""Hamiltonian Monte Carlo with many chains at once, to check models whose reference has moments only."""

import pyro
import torch
from torch import Tensor

from studies.real_models.log_joint import LogJoint

TARGET = 0.8  # acceptance


def whitening(log_joint: LogJoint, centre: Tensor) -> Tensor:
    """Return a square root of the inverse curvature at a point, with eigenvalues made positive."""
    hessian = torch.autograd.functional.hessian(lambda u: log_joint(u.unsqueeze(0)).sum(), centre)
    eigenvalues, vectors = torch.linalg.eigh(-hessian)
    eigenvalues = eigenvalues.abs().clamp(min=1e-3 * eigenvalues.abs().median())
    return vectors / eigenvalues.sqrt()


def chains(
    log_joint: LogJoint, centre: Tensor, num_chains: int, iterations: int, warm_up: int, leaps: int = 8
) -> Tensor:
    """Return draws of independent chains, (iterations, num_chains, size); those of the warm-up are left out.

    The chains move in the coordinates in which the curvature at the centre is the identity, and start around it. The
    step size follows the acceptance during the warm-up and is jittered.

    Args:
        log_joint: The log density.
        centre: A point in the middle of it.
        num_chains: The number of chains.
        iterations: The number of iterations kept.
        warm_up: The number before.
        leaps: Leapfrog steps an iteration.
    """
    factor = whitening(log_joint, centre)

    def potential(w: Tensor) -> tuple[Tensor, Tensor]:
        w = w.detach().requires_grad_()
        with pyro.validation_enabled(False):  # trajectories that diverge are rejected
            value = log_joint(centre + w @ factor.T)
        (gradient,) = torch.autograd.grad(value.sum(), w)
        return value.detach(), gradient

    w = torch.randn(num_chains, log_joint.size)
    value, gradient = potential(w)
    step = 0.1
    kept = []
    for iteration in range(warm_up + iterations):
        momentum = torch.randn_like(w)
        energy = value - momentum.square().sum(-1) / 2
        size = step * (0.8 + 0.4 * torch.rand(()).item())
        new, slope = w, gradient
        momentum = momentum + size / 2 * slope
        for leap in range(leaps):
            new = new + size * momentum
            new_value, slope = potential(new)
            momentum = momentum + (size if leap < leaps - 1 else size / 2) * slope
        change = new_value - momentum.square().sum(-1) / 2 - energy
        accept = torch.rand(num_chains).log() < change.nan_to_num(nan=-torch.inf)
        w = torch.where(accept.unsqueeze(-1), new, w)
        gradient = torch.where(accept.unsqueeze(-1), slope, gradient)
        value = torch.where(accept, new_value, value)
        if iteration < warm_up:
            rate = change.nan_to_num(nan=-torch.inf).clamp(max=0).exp().mean().item()
            step *= 1.1 if rate > TARGET else 0.9
        else:
            kept.append(centre + w @ factor.T)
    return torch.stack(kept)
