"""Hierarchical models, centred: an effect is drawn from the distribution of its group."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from studies.real_models.posterior import Posterior, Values
from studies.real_models.regressions import outcomes


def eight_schools(sigma: Tensor, y: Tensor) -> None:
    """Effects of coaching in eight schools."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def seeds(x1: Tensor, x2: Tensor, total: Tensor, germinated: Tensor) -> None:
    """Germination on 21 plates: logistic regression with a random effect a plate."""
    alpha0 = pyro.sample("alpha0", dist.Normal(0.0, 1000.0))
    alpha1 = pyro.sample("alpha1", dist.Normal(0.0, 1000.0))
    alpha2 = pyro.sample("alpha2", dist.Normal(0.0, 1000.0))
    alpha12 = pyro.sample("alpha12", dist.Normal(0.0, 1000.0))
    tau = pyro.sample("tau", dist.Gamma(0.001, 0.001))
    with pyro.plate("plates", len(x1)):
        b = pyro.sample("b", dist.Normal(0.0, tau.rsqrt()))
        logits = alpha0 + alpha1 * x1 + alpha2 * x2 + alpha12 * x1 * x2 + b
        pyro.sample("n", dist.Binomial(total, logits=logits), obs=germinated)


def rats(rat: Tensor, x: Tensor, y: Tensor, num_rats: int) -> None:
    """Growth of 30 rats: a line a rat; ``x`` is the age from its mean."""
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 100.0))
    mu_beta = pyro.sample("mu_beta", dist.Normal(0.0, 100.0))
    sigma_y = pyro.sample("sigma_y", dist.ImproperUniform(constraints.positive, (), ()))
    sigma_alpha = pyro.sample("sigma_alpha", dist.ImproperUniform(constraints.positive, (), ()))
    sigma_beta = pyro.sample("sigma_beta", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("rats", num_rats):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = pyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
    with pyro.plate("weighings", len(y)):
        pyro.sample("y", dist.Normal(alpha[..., rat] + beta[..., rat] * x, sigma_y), obs=y)


def radon(county: Tensor, floor: Tensor, log_radon: Tensor, num_counties: int) -> None:
    """Radon in houses of Minnesota: an intercept a county."""
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("counties", num_counties):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
    with pyro.plate("houses", len(log_radon)):
        pyro.sample("log_radon", dist.Normal(alpha[..., county] + beta * floor, sigma_y), obs=log_radon)


def irt_2pl(y: Tensor) -> None:
    """Two-parameter logistic item response; ``y`` is (items, persons)."""
    sigma_theta = pyro.sample("sigma_theta", dist.HalfCauchy(2.0))
    sigma_a = pyro.sample("sigma_a", dist.HalfCauchy(2.0))
    mu_b = pyro.sample("mu_b", dist.Normal(0.0, 5.0))
    sigma_b = pyro.sample("sigma_b", dist.HalfCauchy(2.0))
    items = pyro.plate("items", y.shape[-2], dim=-2)
    persons = pyro.plate("persons", y.shape[-1], dim=-1)
    with persons:
        theta = pyro.sample("theta", dist.Normal(0.0, sigma_theta))
    with items:
        a = pyro.sample("a", dist.LogNormal(0.0, sigma_a))
        b = pyro.sample("b", dist.Normal(mu_b, sigma_b))
    with items, persons:
        pyro.sample("y", dist.Bernoulli(logits=a * (theta - b)), obs=y)


def surgical(operations: Tensor, deaths: Tensor) -> None:
    """Deaths in 12 hospitals."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1000.0))
    sigmasq = pyro.sample("sigmasq", dist.InverseGamma(0.001, 0.001))
    with pyro.plate("hospitals", len(deaths)):
        b = pyro.sample("b", dist.Normal(mu, sigmasq.sqrt()))
        pyro.sample("r", dist.Binomial(operations, logits=b), obs=deaths)


def bird_counts(site: Tensor, counts: Tensor, num_sites: int) -> None:
    """Counts of birds: a rate a site."""
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    sd_alpha = pyro.sample("sd_alpha", dist.Uniform(0.0, 5.0))
    with pyro.plate("sites", num_sites):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sd_alpha))
    with pyro.plate("counts", len(counts)):
        pyro.sample("obs", dist.Poisson(alpha[..., site].exp()), obs=counts)


def bones(delta: Tensor, gamma: Tensor, graded: Tensor, grade: Tensor) -> None:
    """Skeletal age from graded indicators with known thresholds.

    Args:
        delta: The discriminations, (indicators,).
        gamma: The thresholds, (indicators, 4); only as many are used as ``graded`` says.
        graded: Which thresholds are there, (indicators, 4).
        grade: Grades from 0, (children, indicators); -1 where missing.
    """
    with pyro.plate("children", grade.shape[-2], dim=-2):
        theta = pyro.sample("theta", dist.Normal(0.0, 36.0))
        above = torch.sigmoid(delta.unsqueeze(-1) * (theta.unsqueeze(-1) - gamma)) * graded
        one, zero = torch.ones_like(above[..., :1]), torch.zeros_like(above[..., :1])
        probs = torch.cat([one, above], -1) - torch.cat([above, zero], -1)
        with pyro.plate("indicators", grade.shape[-1], dim=-1), poutine.mask(mask=grade >= 0):
            pyro.sample("grade", dist.Categorical(probs=probs), obs=grade.clamp(min=0))


def schools_data(data: Values) -> tuple[Any, ...]:
    """Standard errors and effects."""
    return data["sigma"], data["y"]


def seeds_data(data: Values) -> tuple[Any, ...]:
    """Two predictors, seeds sown and germinated."""
    return data["x1"], data["x2"], data["N"], data["n"]


def rats_data(data: Values) -> tuple[Any, ...]:
    """The rat (from 0), the centred age and the weight of each weighing."""
    return data["rat"].long() - 1, data["x"] - data["xbar"], data["y"], int(data["N"])


def radon_data(data: Values) -> tuple[Any, ...]:
    """County (from 0), floor and log radon of each house."""
    return data["county_idx"].long() - 1, data["floor_measure"], data["log_radon"], int(data["J"])


def surgical_data(data: Values) -> tuple[Any, ...]:
    """Operations and deaths."""
    return data["n"], data["r"]


def bird_data(data: Values) -> tuple[Any, ...]:
    """Site (from 0) and count of each observation."""
    return data["obssite"].long() - 1, data["obs"], int(data["nsite"])


def bones_data(data: Values) -> tuple[Any, ...]:
    """Discriminations, thresholds, which thresholds are there, grades from 0 (or -1)."""
    graded = torch.arange(data["gamma"].shape[-1]) < data["ncat"].unsqueeze(-1) - 1
    grade = data["grade"].long()
    return (
        data["delta"],
        data["gamma"],
        graded.to(data["delta"].dtype),
        torch.where(grade > 0, grade - 1, grade),
    )


HIERARCHICAL = [
    Posterior(
        "eight_schools-eight_schools_noncentered",
        "hierarchical",
        eight_schools,
        schools_data,
        1,
        True,
        local=("theta",),
    ),
    Posterior("seeds_data-seeds_model", "hierarchical", seeds, seeds_data, 1, True, local=("b",)),
    Posterior("rats_data-rats_model", "hierarchical", rats, rats_data, 1, False),
    Posterior(
        "radon_mn-radon_variable_intercept_centered",
        "hierarchical",
        radon,
        radon_data,
        1,
        True,
        local=("alpha",),
    ),
    Posterior("irt_2pl-irt_2pl", "hierarchical", irt_2pl, outcomes, 2, True),
    Posterior("surgical_data-surgical_model", "hierarchical", surgical, surgical_data, 1, True, local=("b",)),
    Posterior("GLMM_data-GLMM1_model", "hierarchical", bird_counts, bird_data, 1, True, local=("alpha",)),
    Posterior("bones_data-bones_model", "hierarchical", bones, bones_data, 2, True),
]
