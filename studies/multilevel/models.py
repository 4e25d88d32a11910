r"""Multilevel models with known answers, for data ``(n, groups)``: data n of each group.

``two levels``: mu ~ N(0, 1), theta_j ~ N(mu, 1), x_nj ~ N(theta_j, 1). The posterior is known.

``random effects``: mu ~ N(0, 2), tau ~ HalfNormal(1), sigma ~ LogNormal(0, 0.5), theta_j ~ N(mu, tau),
x_nj ~ N(theta_j, sigma). The evidence is an integral over two numbers.

``three levels``, for data ``(pupils, schools, districts)``: mu ~ N(0, 1), delta_d ~ N(mu, 1), theta_sd ~
N(delta_d, 0.7), x ~ N(theta_sd, 1). The posterior is known.

``item response``, for answers ``(persons, items)``: spread ~ HalfNormal(1.5), ability_p ~ N(0, spread), difficulty_i ~
N(0, 1.5), y_pi ~ Bernoulli(logits ability_p - difficulty_i). Nothing is known.
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


SCHOOLS = 0.7  # the spread of schools in a district


def three_levels(x: Tensor) -> None:
    """Location, districts, and schools in districts; all scales known."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("districts", x.shape[-1], dim=-1):
        delta = pyro.sample("delta", dist.Normal(mu, 1.0))
        with pyro.plate("schools", x.shape[-2], dim=-2):
            theta = pyro.sample("theta", dist.Normal(delta, SCHOOLS))
            with pyro.plate("pupils", x.shape[-3], dim=-3):
                pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def item_response(y: Tensor) -> None:
    """Persons crossed with items, one parameter an item (Rasch)."""
    persons = pyro.plate("persons", y.shape[-2], dim=-2)
    items = pyro.plate("items", y.shape[-1], dim=-1)
    spread = pyro.sample("spread", dist.HalfNormal(1.5))
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.5))
    with persons:
        ability = pyro.sample("ability", dist.Normal(0.0, spread))
    with persons, items:
        pyro.sample("y", dist.Bernoulli(logits=ability - difficulty), obs=y)


def draws_of_two_levels(x: Tensor, number: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return draws of the posterior, ``(number, *plates of the model)``, and their log-densities."""
    of_mu, of_theta = exact_posterior(x)
    mu = of_mu.sample((number,))
    theta = of_theta(mu).sample()
    log_p = of_mu.log_prob(mu) + of_theta(mu).log_prob(theta).sum(-1)
    return {"mu": mu.reshape(-1, 1, 1), "theta": theta.unsqueeze(-2)}, log_p


def draws_of_three_levels(x: Tensor, number: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return draws of the posterior, ``(number, *plates of the model)``, and their log-densities."""
    pupils, schools, districts = x.shape
    of_schools = x.mean(0)
    means = of_schools.mean(0)
    school = SCHOOLS**2 + 1.0 / pupils  # variance of the mean of a school given its district
    district = 1.0 + school / schools  # of the mean of a district given mu
    precision = 1.0 + districts / district
    of_mu = dist.Normal(means.sum() / district / precision, precision**-0.5)
    mu = of_mu.sample((number,)).reshape(-1, 1, 1, 1)
    precision = 1.0 + schools / school
    of_delta = dist.Normal((mu + schools / school * means) / precision, precision**-0.5)
    delta = of_delta.sample()
    precision = SCHOOLS**-2 + pupils
    of_theta = dist.Normal((delta / SCHOOLS**2 + pupils * of_schools) / precision, precision**-0.5)
    theta = of_theta.sample()
    log_p = of_mu.log_prob(mu).reshape(-1)
    for one, value in ((of_delta, delta), (of_theta, theta)):
        log_p = log_p + one.log_prob(value).reshape(number, -1).sum(-1)
    return {"mu": mu, "delta": delta, "theta": theta}, log_p


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
