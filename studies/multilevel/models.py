r"""Two-level models with known answers, for data ``(n, groups)``: data n of each group.

``two levels``: mu ~ N(0, 1), theta_j ~ N(mu, 1), x_nj ~ N(theta_j, 1). The posterior is known.

``random effects``: mu ~ N(0, 2), tau ~ HalfNormal(1), sigma ~ LogNormal(0, 0.5), theta_j ~ N(mu, tau),
x_nj ~ N(theta_j, sigma). The evidence is an integral over two numbers.
"""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

GRID = 200  # points of each of the two axes
REACH = 6.0  # log units of the grid to both sides


def two_levels(x: Tensor) -> None:
    """Location and effects; all scales one."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("data", x.shape[-2], dim=-2):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def random_effects(x: Tensor) -> None:
    """Location, spread of the effects, and noise; all unknown."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("data", x.shape[-2], dim=-2):
            pyro.sample("x", dist.Normal(theta, sigma), obs=x)


def exact_posterior(x: Tensor) -> tuple[dist.Normal, Any]:
    """Return the posterior of mu in the two-level model, and a function from mu to that of the effects."""
    n, groups = x.shape
    mean = x.mean(0)
    variance = 1.0 + 1.0 / n  # of the mean of a group given mu
    precision = 1.0 + groups / variance
    of_mu = dist.Normal(mean.sum() / variance / precision, precision**-0.5)

    def of_theta(mu: Tensor) -> dist.Normal:
        return dist.Normal((mu.unsqueeze(-1) + n * mean) / (1.0 + n), (1.0 + n) ** -0.5)

    return of_mu, of_theta


def log_evidence(x: Tensor) -> float:
    """Return the logarithm of the evidence of the model of random effects, by quadrature over log tau and log sigma.

    Given both, means of groups are normal with variance ``tau^2 + sigma^2 / n`` and a common location of variance 4;
    deviations from them are independent of these.
    """
    x = x.double()
    n, groups = x.shape
    mean = x.mean(0)
    within = float((x - mean).square().sum())
    centre = float(within / max(1, groups * (n - 1))) ** 0.5 if n > 1 else 1.0
    log_sigma = torch.linspace(-4.0, 4.0, GRID).double() if n == 1 else _around(math.log(max(centre, 1e-3)))
    log_tau = torch.linspace(-9.0, 2.5, 2 * GRID).double()
    sigma, tau = log_sigma.exp().unsqueeze(-1), log_tau.exp()
    variance = tau.square() + sigma.square() / n
    spread = (mean - mean.mean()).square().sum()
    of_means = -0.5 * (
        groups * math.log(2 * math.pi)
        + (groups - 1) * variance.log()
        + (variance + 4.0 * groups).log()
        + spread / variance
        + groups * mean.mean().square() / (variance + 4.0 * groups)
    )
    rest = groups * (n - 1)
    of_rest = -0.5 * (
        rest * (2 * math.pi * sigma.square()).log() + within / sigma.square()
    ) - 0.5 * groups * math.log(n)
    prior = dist.LogNormal(0.0, 0.5).log_prob(sigma) + log_sigma.unsqueeze(-1)
    prior = prior + dist.HalfNormal(1.0).log_prob(tau) + log_tau
    total = of_means + of_rest + prior
    cell = (log_sigma[1] - log_sigma[0]) * (log_tau[1] - log_tau[0])
    return float(total.flatten().logsumexp(0) + cell.log())


def _around(centre: float) -> Tensor:
    return torch.linspace(centre - REACH / 2, centre + REACH / 2, 2 * GRID).double()
