"""A Gaussian process, a mixture and a differential equation."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from studies.real_models.posterior import Posterior, Values
from studies.real_models.regressions import outcomes


def gp_regression(x: Tensor, y: Tensor) -> None:
    """Gaussian process regression; ``sigma`` is the variance of the noise."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    rho, alpha, sigma = (value[..., None, None] for value in (rho, alpha, sigma))
    distance = x.unsqueeze(-1) - x
    covariance = alpha**2 * torch.exp(-(distance**2) / (2 * rho**2)) + sigma * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance_matrix=covariance), obs=y)


def capture_recapture(y: Tensor) -> None:
    """Capture and recapture: a row of the augmented data is an animal with probability omega, else all zero."""
    omega = pyro.sample("omega", dist.Uniform(0.0, 1.0))
    p = pyro.sample("p", dist.Uniform(0.0, 1.0).expand([y.shape[-1]]).to_event(1))
    present = dist.Categorical(torch.stack([1 - omega, omega], -1))
    captures = dist.Bernoulli(torch.stack([torch.zeros_like(p), p], -2)).to_event(1)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(present, captures), obs=y)


RK4_STEP = 0.1  # check.py has the error


def concentrations(
    k_a: Tensor, k_m: Tensor, v_m: Tensor, dose: float, volume: float, times: list[float], step: float
) -> Tensor:
    """Solve the compartment's equation by RK4 and return the concentrations at the times, (..., times).

    Where the elimination is so fast that a step overshoots, the concentration is held at a small positive number.
    """

    def slope(t: float, c: Tensor) -> Tensor:
        c = c.clamp(min=0.0)
        return k_a * dose / volume * torch.exp(-k_a * t) - v_m / volume * c / (k_m + c)

    t, c = 0.0, torch.zeros_like(k_a)
    result = []
    for end in times:
        count = max(1, round((end - t) / step))
        h = (end - t) / count
        for _ in range(count):
            k1 = slope(t, c)
            k2 = slope(t + h / 2, c + h / 2 * k1)
            k3 = slope(t + h / 2, c + h / 2 * k2)
            k4 = slope(t + h, c + h * k3)
            c = c + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            t += h
        t = end
        result.append(c.clamp(min=1e-6))
    return torch.stack(result, -1)


def elimination(
    dose: float, volume: float, times: list[float], measured: Tensor, step: float = RK4_STEP
) -> None:
    """One compartment, first-order absorption, Michaelis-Menten elimination."""
    k_a = pyro.sample("k_a", dist.HalfCauchy(1.0))
    k_m = pyro.sample("K_m", dist.HalfCauchy(1.0))
    v_m = pyro.sample("V_m", dist.HalfCauchy(1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    c = concentrations(k_a, k_m, v_m, dose, volume, times, step)
    pyro.sample("C_hat", dist.LogNormal(c.log(), sigma.unsqueeze(-1)).to_event(1), obs=measured)


def gp_data(data: Values) -> tuple[Any, ...]:
    """Inputs and outputs."""
    return data["x"], data["y"]


def elimination_data(data: Values) -> tuple[Any, ...]:
    """Dose, volume, times and measured concentrations."""
    return float(data["D"]), float(data["V"]), data["times"].tolist(), data["C_hat"]


OTHERS = [
    Posterior("gp_pois_regr-gp_regr", "gaussian process", gp_regression, gp_data, 0, True),
    Posterior("Mt_data-Mt_model", "mixture", capture_recapture, outcomes, 1, True),
    Posterior(
        "one_comp_mm_elim_abs-one_comp_mm_elim_abs",
        "differential equation",
        elimination,
        elimination_data,
        0,
        True,
    ),
]
