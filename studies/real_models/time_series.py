"""Time series: autoregression, GARCH and hidden Markov models."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from studies.real_models.ordered import PositiveOrderedNormal
from studies.real_models.posterior import Posterior, Values


def autoregression(lags: Tensor, y: Tensor) -> None:
    """Autoregression given the values before; ``lags`` is (times, order), the latest first."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([lags.shape[-1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(alpha + (lags * beta).sum(-1), sigma), obs=y)


def garch(y: Tensor, sigma1: float) -> None:
    """GARCH(1, 1), uniform over the shares of shock and persistence in the variance.

    ``shares`` holds alpha1, beta1 and one minus both: uniform on the simplex is uniform on alpha1 + beta1 < 1.
    """
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = pyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    shocks = alpha0.unsqueeze(-1) + shares[..., :1] * (y - mu.unsqueeze(-1)) ** 2  # (..., times)
    persistence = shares[..., 1]
    variance = torch.full_like(mu, sigma1**2)
    variances = [variance]
    for shock in shocks[..., :-1].unbind(-1):
        variance = shock + persistence * variance
        variances.append(variance)
    scale = torch.stack(variances, -1).sqrt()
    pyro.sample("y", dist.Normal(mu.unsqueeze(-1), scale).to_event(1), obs=y)


def transition_logits(theta1: Tensor, theta2: Tensor, length: int) -> Tensor:
    """Return log transition matrices, (..., length, 2, 2); the first gives both states the probability 1/2.

    The hidden Markov distribution of Pyro moves before its first observation; here the state at the first observation
    is uniform.
    """
    move = torch.stack([theta1, theta2], -2).log().unsqueeze(-3)  # (..., 1, 2, 2)
    first = torch.full((2, 2), 0.5).log().expand_as(move)
    return torch.cat([first, move.expand(*move.shape[:-3], length - 1, 2, 2)], -3)


def basketball(uv: Tensor, alpha: Tensor) -> None:
    """Two hidden states of play, two exponential measurements; ``uv`` is (times, 2)."""
    theta1 = pyro.sample("theta1", dist.Dirichlet(alpha[0]))
    theta2 = pyro.sample("theta2", dist.Dirichlet(alpha[1]))
    prior = PositiveOrderedNormal(torch.tensor([0.0, 3.0]), torch.ones(2))
    phi = pyro.sample("phi", prior)
    lam = pyro.sample("lambda", prior)
    rates = torch.stack([phi, lam], -1).unsqueeze(-3)  # (..., 1, state, 2)
    steps = transition_logits(theta1, theta2, len(uv))
    play = dist.DiscreteHMM(torch.zeros(2), steps, dist.Exponential(rates).to_event(1), duration=len(uv))
    pyro.sample("uv", play, obs=uv)


def normal_hmm(y: Tensor) -> None:
    """Two hidden states with normal measurements of unit scale."""
    theta1 = pyro.sample("theta1", dist.Dirichlet(torch.ones(2)))
    theta2 = pyro.sample("theta2", dist.Dirichlet(torch.ones(2)))
    mu = pyro.sample("mu", PositiveOrderedNormal(torch.tensor([3.0, 10.0]), torch.ones(2)))
    steps = transition_logits(theta1, theta2, len(y))
    chain = dist.DiscreteHMM(torch.zeros(2), steps, dist.Normal(mu.unsqueeze(-2), 1.0), duration=len(y))
    pyro.sample("y", chain, obs=y)


def lagged(data: Values) -> tuple[Any, ...]:
    """The values before each, the latest first, and the values."""
    y, order = data["y"], int(data["K"])
    return torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1), y[order:]


def garch_data(data: Values) -> tuple[Any, ...]:
    """The series and the first standard deviation."""
    return data["y"], float(data["sigma1"])


def garch_sites(values: Values) -> Values:
    """From alpha1 and beta1 to their shares."""
    alpha1, beta1 = values["alpha1"], values["beta1"]
    shares = torch.stack([alpha1, beta1, 1 - alpha1 - beta1], -1)
    return {"mu": values["mu"], "alpha0": values["alpha0"], "shares": shares}


def garch_parameters(values: Values) -> Values:
    """From the shares to alpha1 and beta1."""
    shares = values["shares"]
    return {
        "mu": values["mu"],
        "alpha0": values["alpha0"],
        "alpha1": shares[..., 0],
        "beta1": shares[..., 1],
    }


def basketball_data(data: Values) -> tuple[Any, ...]:
    """Both measurements side by side, and the prior of the transitions."""
    return torch.stack([data["u"], data["v"]], -1), data["alpha"]


def series(data: Values) -> tuple[Any, ...]:
    """The series alone."""
    return (data["y"],)


TIME_SERIES = [
    Posterior("arK-arK", "time series", autoregression, lagged, 1, True),
    Posterior(
        "garch-garch11",
        "time series",
        garch,
        garch_data,
        0,
        False,
        sites=garch_sites,
        parameters=garch_parameters,
    ),
    Posterior("bball_drive_event_0-hmm_drive_0", "time series", basketball, basketball_data, 0, True),
    Posterior("hmm_example-hmm_example", "time series", normal_hmm, series, 0, True),
]
