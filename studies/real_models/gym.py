"""Six targets of the Inference Gym: latent paths, written as loops over time, and two hierarchies."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from studies.real_models.posterior import Posterior, Values


def brownian(y: Tensor, innovation: float, noise: float) -> None:
    """A random walk with noise; ``y`` is NaN where nothing was seen."""
    x: Any = 0.0
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, innovation))
        if not y[t].isnan():
            pyro.sample(f"y_{t}", dist.Normal(x, noise), obs=y[t])


def brownian_unknown_scales(y: Tensor) -> None:
    """The same with unknown scales."""
    innovation = pyro.sample("innovation_noise_scale", dist.LogNormal(0.0, 2.0))
    noise = pyro.sample("observation_noise_scale", dist.LogNormal(0.0, 2.0))
    x: Any = 0.0
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, innovation))
        if not y[t].isnan():
            pyro.sample(f"y_{t}", dist.Normal(x, noise), obs=y[t])


def lorenz(y: Tensor, step: float, innovation: float, noise: float) -> None:
    """The stochastic Lorenz system, of which the first coordinate is seen at times."""
    point = torch.zeros(3)
    for t in pyro.markov(range(len(y))):
        scale = 1.0 if t == 0 else math.sqrt(step) * innovation
        point = pyro.sample(f"point_{t}", dist.Normal(point, scale).to_event(1))
        if not y[t].isnan():
            pyro.sample(f"y_{t}", dist.Normal(point[..., 0], noise), obs=y[t])
        a, b, c = point.unbind(-1)
        drift = torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)
        point = point + step * drift


def stochastic_volatility(returns: Tensor) -> None:
    """Returns whose log volatility is an autoregression."""
    phi = 2 * pyro.sample("half_persistence", dist.Beta(20.0, 1.5)) - 1
    mu = pyro.sample("mean_log_volatility", dist.Cauchy(0.0, 5.0))
    shock = pyro.sample("white_noise_shock_scale", dist.HalfCauchy(2.0))
    h = torch.zeros_like(mu)
    for t in pyro.markov(range(len(returns))):
        scale = shock if t else shock / (1 - phi**2).sqrt()
        h = pyro.sample(f"h_{t}", dist.Normal(phi * h, scale))
        pyro.sample(f"return_{t}", dist.Normal(0.0, ((mu + h) / 2).exp()), obs=returns[t])


def item_response(student: Tensor, question: Tensor, correct: Tensor, students: int, questions: int) -> None:
    """Abilities of students and difficulties of questions."""
    mean = pyro.sample("mean_student_ability", dist.Normal(0.75, 1.0))
    with pyro.plate("students", students):
        ability = pyro.sample("centered_student_ability", dist.Normal(0.0, 1.0))
    with pyro.plate("questions", questions):
        difficulty = pyro.sample("question_difficulty", dist.Normal(0.0, 1.0))
    with pyro.plate("answers", len(correct)):
        logits = mean + ability[..., student] - difficulty[..., question]
        pyro.sample("correct", dist.Bernoulli(logits=logits), obs=correct)


def radon_contextual(x: Tensor, county: Tensor, log_radon: Tensor, counties: int) -> None:
    """Radon in houses: an intercept a county, predictors of the house and of the county; ``x`` is (houses, 3)."""
    mean = pyro.sample("county_effect_mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("county_effect_scale", dist.Uniform(0.0, 100.0))
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    noise = pyro.sample("log_radon_scale", dist.Uniform(0.0, 100.0))
    with pyro.plate("counties", counties):
        effect = pyro.sample("county_effect", dist.Normal(mean, scale))
    with pyro.plate("houses", len(log_radon)):
        loc = (x * weight).sum(-1) + effect[..., county]
        pyro.sample("log_radon", dist.Normal(loc, noise), obs=log_radon)


def path(site: str, parameter: str, event_dim: int = 0) -> tuple[Any, Any]:
    """Return the functions from a path's parameter to sites of its times, and back."""

    def sites(values: Values) -> Values:
        steps = values[parameter].unbind(-1 - event_dim)
        others = {name: value for name, value in values.items() if name != parameter}
        return others | {f"{site}_{t}": value for t, value in enumerate(steps)}

    def parameters(values: Values) -> Values:
        steps = [name for name in values if name.startswith(f"{site}_")]
        others = {name: value for name, value in values.items() if name not in steps}
        return others | {
            parameter: torch.stack([values[f"{site}_{t}"] for t in range(len(steps))], -1 - event_dim)
        }

    return sites, parameters


WALK, WALK_BACK = path("x", "locs")
LORENZ, LORENZ_BACK = path("point", "latents", 1)
VOLATILITY, VOLATILITY_BACK = path("h", "log_volatility")


def volatility_sites(values: Values) -> Values:
    """From the source's log volatility and persistence to the model's sites."""
    h = values["log_volatility"] - values["mean_log_volatility"].unsqueeze(-1)
    sites: Values = VOLATILITY(values | {"log_volatility": h})
    sites["half_persistence"] = (sites.pop("persistence_of_volatility") + 1) / 2
    return sites


def volatility_parameters(values: Values) -> Values:
    """The inverse of :func:`volatility_sites`."""
    result: Values = VOLATILITY_BACK(values)
    result["log_volatility"] = result["log_volatility"] + result["mean_log_volatility"].unsqueeze(-1)
    result["persistence_of_volatility"] = 2 * result.pop("half_persistence") - 1
    return result


def brownian_data(data: Values) -> tuple[Any, ...]:
    """The walk as seen, and both scales."""
    return (
        data["observed_locs"],
        float(data["innovation_noise_scale"]),
        float(data["observation_noise_scale"]),
    )


def walk_data(data: Values) -> tuple[Any, ...]:
    """The walk as seen."""
    return (data["observed_locs"],)


def lorenz_data(data: Values) -> tuple[Any, ...]:
    """The first coordinate as seen, the step and both scales."""
    scales = (float(data[name]) for name in ("step_size", "innovation_scale", "observation_scale"))
    return (data["observed_values"], *scales)


def returns_data(data: Values) -> tuple[Any, ...]:
    """The returns."""
    return (data["centered_returns"],)


def answers_data(data: Values) -> tuple[Any, ...]:
    """Student, question and whether the answer was right."""
    student, question = data["student_ids"].long(), data["question_ids"].long()
    return student, question, data["correct"], int(student.max()) + 1, int(question.max()) + 1


def houses_data(data: Values) -> tuple[Any, ...]:
    """Predictors, county and log radon of each house."""
    x = torch.stack([data["log_uranium"], data["floor"], data["floor_by_county"]], -1)
    county = data["county"].long()
    return x, county, data["log_radon"], int(county.max()) + 1


GYM = [
    Posterior(
        "brownian_motion_missing_middle_observations",
        "time series",
        brownian,
        brownian_data,
        0,
        True,
        sites=WALK,
        parameters=WALK_BACK,
        gym=True,
    ),
    Posterior(
        "brownian_motion_unknown_scales_missing_middle_observations",
        "time series",
        brownian_unknown_scales,
        walk_data,
        0,
        True,
        coupled="x",
        sites=WALK,
        parameters=WALK_BACK,
        gym=True,
    ),
    Posterior(
        "convection_lorenz_bridge",
        "time series",
        lorenz,
        lorenz_data,
        0,
        True,
        sites=LORENZ,
        parameters=LORENZ_BACK,
        gym=True,
    ),
    Posterior(
        "stochastic_volatility_sp500_small",
        "time series",
        stochastic_volatility,
        returns_data,
        0,
        True,
        sites=volatility_sites,
        parameters=volatility_parameters,
        gym=True,
    ),
    Posterior(
        "synthetic_item_response_theory", "hierarchical", item_response, answers_data, 1, True, gym=True
    ),
    Posterior(
        "radon_contextual_effects_minnesota", "hierarchical", radon_contextual, houses_data, 1, True, gym=True
    ),
]
