"""Exact log-evidences of the problems that are not linear-Gaussian, by numerical integration.

What can be integrated analytically is; what remains has one to three dimensions, and goes over a grid.
"""

import math

import numpy as np
import pyro.distributions as dist
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor


def circuit_log_evidence(x: np.ndarray) -> np.ndarray:
    """Return log p(x0, x1) of the arithmetic circuit for each row, by numerical integration.

    The density of w = z0 z1 is an integral over z1, smoothed by the noise of z3; given z3, the density of x1 is an
    integral over u = z3 + z4; the last integral is over z3 near x0. Grids twice as fine change the mean by less
    than 1e-4.
    """
    half = np.geomspace(1e-4, 500, 2500)
    w = np.concatenate([-half[::-1], half])
    z1 = np.geomspace(1e-7, 60, 2500)
    density = np.zeros_like(w)
    for sign in (-1, 1):
        prior = 0.5 * np.exp(-np.abs(sign * z1 + 2))
        for rows in np.array_split(np.arange(len(w)), 50):
            ratio = w[rows, None] / (sign * z1)
            density[rows] += np.trapezoid(prior * 0.5 * np.exp(-np.abs(ratio - 5)) / z1, z1)
    grid = np.linspace(-200, 200, 400_001)
    z3_density = gaussian_filter1d(np.interp(grid, w, density), 0.1 / (grid[1] - grid[0]), truncate=8)
    offsets = np.linspace(-0.6, 0.6, 61)
    z4 = np.linspace(7 - 12, 7 + 12, 961)
    prior4 = np.exp(-0.5 * ((z4 - 7) / 2) ** 2) / (2 * np.sqrt(2 * np.pi)) * (z4[1] - z4[0])
    noise = np.exp(-0.5 * (offsets / 0.1) ** 2) / (0.1 * np.sqrt(2 * np.pi)) * (offsets[1] - offsets[0])
    width = 0.1 * np.sqrt(2)
    result = np.zeros(len(x))
    for i, (x0, x1) in enumerate(x):
        z3 = x0 + offsets
        near = np.exp(-0.5 * ((x1 - np.tanh(z3[:, None] + z4)) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        result[i] = np.log(np.sum(np.interp(z3, grid, z3_density) * noise * (near @ prior4)))
    return result


def schools_log_evidence(sigma: Tensor, y: Tensor) -> float:
    """Return log p(y) of the eight schools: the effects and their mean are normal given their scale.

    The integral over the log of the scale has exponential tails; a grid twice as fine or half as wide changes nothing
    in the first eight digits.
    """
    log_tau = torch.linspace(-30.0, 15.0, 9001, dtype=torch.double)
    tau = log_tau.exp()
    covariance = torch.diag_embed(tau.square().unsqueeze(-1) + sigma.square()) + 25.0
    zero = torch.zeros(len(y), dtype=torch.double)
    log_joint = dist.MultivariateNormal(zero, covariance).log_prob(y)
    log_joint = log_joint + dist.HalfCauchy(torch.tensor(5.0, dtype=torch.double)).log_prob(tau) + log_tau
    return float(torch.logsumexp(log_joint, 0) + math.log(log_tau[1] - log_tau[0]))


def slopes_log_evidence(group: Tensor, w: Tensor, y: Tensor, num_groups: int) -> float:
    """Return log p(y) of the varying intercepts and slopes: all but the three scales is normal given these.

    The covariance of the data is that of the groups, block by block, plus one of rank two for the means, so that each
    point of the grid costs matrices of two rows. A grid of 120 x 120 x 90 points changes the result by 1e-5.
    """
    design = torch.stack([torch.ones_like(w), w], -1)  # (N, 2)
    gram = torch.zeros(num_groups, 2, 2, dtype=torch.double).index_add(
        0, group, design.unsqueeze(-1) * design.unsqueeze(-2)
    )
    moment = torch.zeros(num_groups, 2, dtype=torch.double).index_add(0, group, design * y.unsqueeze(-1))
    half_normal = dist.HalfNormal(torch.ones((), dtype=torch.double))
    effects = torch.linspace(-9.0, 2.0, 90, dtype=torch.double)
    noises = torch.linspace(-1.5, 1.0, 60, dtype=torch.double)
    log_a, log_b = torch.meshgrid(effects, effects, indexing="ij")
    prior = torch.diag_embed(
        torch.stack([-2 * log_a, -2 * log_b], -1).exp()
    )  # precision of a group's effects
    totals = []
    for log_s in noises:
        precision = (-2 * log_s).exp()
        inner = precision * gram + prior.unsqueeze(-3)  # (.., groups, 2, 2)
        linear = precision * moment
        # given the means m, a group's term is quadratic: -m'J m / 2 + k'm + constant
        solved = torch.linalg.solve(inner, linear.unsqueeze(-1)).squeeze(-1)
        constant = 0.5 * (
            torch.logdet(prior).unsqueeze(-1) - torch.logdet(inner) + (linear * solved).sum(-1)
        ).sum(-1)
        constant = (
            constant - 0.5 * precision * y.square().sum() - len(y) * (0.5 * math.log(2 * math.pi) + log_s)
        )
        carried = prior.unsqueeze(-3) @ torch.linalg.inv(inner)  # (.., groups, 2, 2)
        quadratic = (prior.unsqueeze(-3) - carried @ prior.unsqueeze(-3)).sum(-3) + 0.25 * torch.eye(
            2
        ).double()
        k = (carried @ linear.unsqueeze(-1)).sum(-3).squeeze(-1)
        means = 0.5 * ((k * torch.linalg.solve(quadratic, k.unsqueeze(-1)).squeeze(-1)).sum(-1))
        means = means - 0.5 * torch.logdet(4.0 * quadratic)
        scales = sum(half_normal.log_prob(v.exp()) + v for v in (log_a, log_b, log_s))
        totals.append(torch.logsumexp((constant + means + scales).flatten(), 0))
    cell = (effects[1] - effects[0]) ** 2 * (noises[1] - noises[0])
    return float(torch.logsumexp(torch.stack(totals), 0) + math.log(cell))


def mixture_log_evidence(x: Tensor, weight: float, scale: float) -> float:
    """Return log p(x) of the mixture of two normal components, on a grid of the two centres."""
    grid = torch.linspace(-4.0, 4.0, 401, dtype=torch.double)
    first, second = torch.meshgrid(grid, grid, indexing="ij")
    log_p = dist.Normal(-1.0, 1.0).log_prob(first) + dist.Normal(1.0, 1.0).log_prob(second)
    for datum in x:
        log_p = log_p + torch.logaddexp(
            math.log(1 - weight) + dist.Normal(first, scale).log_prob(datum),
            math.log(weight) + dist.Normal(second, scale).log_prob(datum),
        )
    return float(log_p.flatten().logsumexp(0) + 2 * math.log(grid[1] - grid[0]))
