"""The problems of the guide benchmarks: a model, data, and what the exact answer is.

``E[-log p(x)]`` is exact for linear-Gaussian networks, and by numerical integration for the arithmetic circuit and the
group effects (``exact_evidence.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from benchmarks.exact_evidence import (
    circuit_log_evidence,
    mixture_log_evidence,
    schools_log_evidence,
    slopes_log_evidence,
)
from pyro_graphflows import binary_tree, load_network
from pyro_graphflows.models.textbook import (
    EIGHT_SCHOOLS,
    arithmetic_circuit_model,
    eight_schools_model,
    hidden_markov_chain_model,
)


@dataclass(frozen=True)
class Problem:
    """A model and its data.

    Attributes:
        name: What it is called.
        model: The model.
        draw: A function from a number to the arguments of a call with fresh data from the model; None for problems
            with one data set.
        test: The arguments with which guides are evaluated.
        num_data: The number of data in the test arguments, by which losses are divided.
        exact: The mean exact log-evidence of the test data, if it is known.
        options: What our guides are made with.
    """

    name: str
    model: Callable[..., Any]
    draw: Callable[[int], tuple] | None
    test: tuple
    num_data: int = 1
    exact: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


def gaussian_network(network: Any, name: str, num_test: int = 2000, dtype: Any = torch.float64) -> Problem:
    """A linear-Gaussian network with its observed nodes as data."""
    columns = [network.names.index(node) for node in network.observed]

    def draw(n: int) -> tuple:
        seed = int(torch.randint(2**31, ()))
        return (torch.as_tensor(network.sample(n, seed)[:, columns], dtype=dtype),)

    test = torch.as_tensor(network.sample(num_test, 12345)[:, columns], dtype=dtype)
    exact = float(network.log_evidence(test.double().numpy()).mean())
    return Problem(name, network.pyro_model(), draw, (test,), num_test, exact)


def circuit(num_test: int = 2000) -> Problem:
    """The arithmetic circuit: Laplace priors, a product, and hyperbolic tangents."""

    def draw(n: int) -> tuple:
        nodes = poutine.trace(arithmetic_circuit_model).get_trace(None, n).nodes
        return (torch.stack([nodes["x0"]["value"], nodes["x1"]["value"]], -1),)

    with torch.random.fork_rng():
        torch.manual_seed(54321)
        (test,) = draw(num_test)
    exact = float(circuit_log_evidence(test.double().numpy()).mean())
    return Problem("circuit", arithmetic_circuit_model, draw, (test,), num_test, exact)


def schools() -> Problem:
    """The eight schools, centred."""
    sigma, y = torch.tensor(EIGHT_SCHOOLS["sigma"]), torch.tensor(EIGHT_SCHOOLS["y"])
    exact = schools_log_evidence(sigma.double(), y.double())
    return Problem("eight schools", eight_schools_model, None, (sigma, y), exact=exact)


def varying_slopes(group: Tensor, w: Tensor, y: Tensor | None = None, num_groups: int = 12) -> None:
    """Intercepts and slopes that vary between groups, with unknown means and scales."""
    mean_a = pyro.sample("mean_a", dist.Normal(0.0, 2.0))
    mean_b = pyro.sample("mean_b", dist.Normal(0.0, 2.0))
    scale_a = pyro.sample("scale_a", dist.HalfNormal(1.0))
    scale_b = pyro.sample("scale_b", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("groups", num_groups):
        a = pyro.sample("a", dist.Normal(mean_a, scale_a))
        b = pyro.sample("b", dist.Normal(mean_b, scale_b))
    with pyro.plate("data", len(w)):
        pyro.sample("y", dist.Normal(a[..., group] + b[..., group] * w, sigma), obs=y)


def slopes(num_groups: int = 12, per_group: int = 4) -> Problem:
    """Varying intercepts and slopes: few data in each group, so that the scales of the effects are uncertain."""
    generator = torch.Generator().manual_seed(3)
    group = torch.arange(num_groups).repeat_interleave(per_group)
    w = torch.randn(len(group), generator=generator)
    a = 1.0 + 0.4 * torch.randn(num_groups, generator=generator)
    b = -0.5 + 0.3 * torch.randn(num_groups, generator=generator)
    y = a[group] + b[group] * w + 0.7 * torch.randn(len(group), generator=generator)
    exact = slopes_log_evidence(group, w.double(), y.double(), num_groups)
    return Problem("varying slopes", varying_slopes, None, (group, w, y), exact=exact)


def county_effects(county: Tensor, floor: Tensor, uranium: Tensor, y: Tensor | None = None) -> None:
    """Radon-like: houses in counties; the county's intercept depends on a county-level covariate."""
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(0.5))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("counties", len(uranium)):
        alpha = pyro.sample("alpha", dist.Normal(level + slope * uranium, tau))
    with pyro.plate("houses", len(floor)):
        pyro.sample("y", dist.Normal(alpha[..., county] + effect * floor, sigma), obs=y)


def radon(num_counties: int = 30, num_houses: int = 300) -> Problem:
    """The radon-like model with data of its own kind: counties of very different sizes."""
    generator = torch.Generator().manual_seed(7)
    shares = torch.rand(num_counties, generator=generator) ** 3 + 0.01
    county = torch.multinomial(shares, num_houses, replacement=True, generator=generator)
    floor = (torch.rand(num_houses, generator=generator) < 0.3).to(torch.get_default_dtype())
    uranium = torch.randn(num_counties, generator=generator)
    alpha = 1.4 + 0.7 * uranium * 0.4 + 0.2 * torch.randn(num_counties, generator=generator)
    y = alpha[county] - 0.65 * floor + 0.75 * torch.randn(num_houses, generator=generator)
    return Problem("radon-like", county_effects, None, (county, floor, uranium, y))


def chain(length: int = 20, num_test: int = 1000) -> Problem:
    """A state-space model written as a python loop: a normal autoregression seen through noise."""

    def draw(n: int) -> tuple:
        nodes = poutine.trace(hidden_markov_chain_model).get_trace(None, n, length=length).nodes
        return (torch.stack([nodes[f"x{t}"]["value"] for t in range(length)], -1),)

    with torch.random.fork_rng():
        torch.manual_seed(11)
        (test,) = draw(num_test)
    time = torch.arange(length)
    covariance = 0.9 ** (time[:, None] - time).abs().to(test) + torch.eye(length).to(test)
    exact = dist.MultivariateNormal(torch.zeros(length).to(test), covariance).log_prob(test).mean()
    return Problem("state space", hidden_markov_chain_model, draw, (test,), num_test, float(exact))


def volatility(x: Tensor | None = None, num_samples: int = 1, length: int = 20) -> None:
    """Stochastic volatility: the log-variance of each observation is a normal autoregression."""
    size = num_samples if x is None else len(x)
    with pyro.plate("data", size, dim=-1):
        h = pyro.sample("h0", dist.Normal(torch.zeros(()), 1.0))
        for t in range(length):
            if t:
                h = pyro.sample(f"h{t}", dist.Normal(0.9 * h, (1 - 0.9**2) ** 0.5))
            pyro.sample(f"x{t}", dist.Normal(0.0, (h / 2).exp()), obs=None if x is None else x[:, t])


def stochastic_volatility(length: int = 20, num_test: int = 1000) -> Problem:
    """The stochastic-volatility model: a nonlinear state space, without an exact answer."""

    def draw(n: int) -> tuple:
        nodes = poutine.trace(volatility).get_trace(None, n, length).nodes
        return (torch.stack([nodes[f"x{t}"]["value"] for t in range(length)], -1),)

    with torch.random.fork_rng():
        torch.manual_seed(13)
        (test,) = draw(num_test)
    return Problem("stochastic volatility", volatility, draw, (test,), num_test)


def two_components(x: Tensor) -> None:
    """A mixture of two normal components with unknown centres; the model sums over the assignments."""
    first = pyro.sample("first", dist.Normal(-1.0, 1.0))
    second = pyro.sample("second", dist.Normal(1.0, 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.6), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(torch.where(k > 0, second, first), 0.7), obs=x)


def mixture(num_data: int = 30) -> Problem:
    """The mixture, with data of its own kind."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.where(torch.rand(num_data, generator=generator) < 0.6, 1.3, -0.8)
    x = centres + 0.7 * torch.randn(num_data, generator=generator)
    return Problem("mixture", two_components, None, (x,), exact=mixture_log_evidence(x.double(), 0.6, 0.7))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "tree": lambda: gaussian_network(binary_tree(5, seed=0), "tree", dtype=torch.get_default_dtype()),
    "ecoli70": lambda: gaussian_network(load_network("ecoli70"), "ecoli70"),
    "magic-niab": lambda: gaussian_network(load_network("magic-niab"), "magic-niab"),
    "circuit": circuit,
    "schools": schools,
    "slopes": slopes,
    "radon": radon,
    "mixture": mixture,
    "chain": chain,
    "volatility": stochastic_volatility,
}


# ------------------------------------------------------------------------------------------- times of a step
def line(w: Tensor, y: Tensor | None = None) -> None:
    """The README's model: slopes and offsets of single data."""
    with pyro.plate("data", len(w)):
        slope = pyro.sample("slope", dist.Normal(1.0, 0.5))
        offset = pyro.sample("offset", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(slope * w + offset, 0.3), obs=y)


def crossed_effects(row: Tensor, column: Tensor, y: Tensor | None = None, sizes: tuple = (20, 30)) -> None:
    """Two crossed effects and noise."""
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    tau_row = pyro.sample("tau_row", dist.HalfNormal(1.0))
    tau_column = pyro.sample("tau_column", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("rows", sizes[0]):
        a = pyro.sample("a", dist.Normal(0.0, tau_row))
    with pyro.plate("columns", sizes[1]):
        b = pyro.sample("b", dist.Normal(0.0, tau_column))
    with pyro.plate("data", len(row)):
        pyro.sample("y", dist.Normal(level + a[..., row] + b[..., column], sigma), obs=y)


def crossed(rows: int = 20, columns: int = 30) -> Problem:
    """Crossed effects with one datum in each cell."""
    generator = torch.Generator().manual_seed(9)
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    a, b = 0.7 * torch.randn(rows, generator=generator), 0.5 * torch.randn(columns, generator=generator)
    y = 1.0 + a[row] + b[column] + 0.4 * torch.randn(rows * columns, generator=generator)
    return Problem("crossed", crossed_effects, None, (row, column, y))


class VAELike:
    """A decoder as a model: latents of each datum, and many pixels.

    Args:
        num_latents: The size of the latent vector.
        num_pixels: The number of pixels.
    """

    def __init__(self, num_latents: int = 32, num_pixels: int = 784) -> None:
        generator = torch.Generator().manual_seed(15)
        self.first = torch.randn(num_latents, 200, generator=generator) / num_latents**0.5
        self.second = torch.randn(200, num_pixels, generator=generator) / 200**0.5

    def __call__(self, x: Tensor | None = None, num_data: int = 64) -> None:
        """Run the model."""
        with pyro.plate("data", num_data if x is None else len(x)):
            scale = torch.ones(len(self.first))
            z = pyro.sample("z", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
            logits = (z @ self.first).tanh() @ self.second
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def vae_like(num_data: int = 64) -> Problem:
    """A decoder with 32 latents and 784 pixels, and its own data."""
    model = VAELike()
    with torch.random.fork_rng():
        torch.manual_seed(16)
        x = poutine.trace(model).get_trace(None, num_data).nodes["x"]["value"]
    return Problem("VAE-like", model, None, (x,), num_data)


def of_64(make: Callable[[], Problem]) -> Problem:
    """Return a problem with the first 64 of its data."""
    problem = make()
    test = tuple(values[:64].to(torch.get_default_dtype()) for values in problem.test)
    return Problem(problem.name, problem.model, problem.draw, test, len(test[0]), None, problem.options)


def readme() -> Problem:
    """The README's model with 200 data."""
    generator = torch.Generator().manual_seed(17)
    w, y = torch.randn(200, generator=generator), torch.randn(200, generator=generator)
    return Problem("README", line, None, (w, y), 200)


# The models of which the times of a step are reported, from few sites to many.
STEPS: dict[str, Callable[[], Problem]] = {
    "readme": readme,
    "schools": schools,
    "radon": lambda: radon(85, 919),
    "crossed": crossed,
    "vae": vae_like,
    "circuit": lambda: of_64(circuit),
    "tree": lambda: of_64(PROBLEMS["tree"]),
    "chain": lambda: of_64(chain),
    "volatility": lambda: of_64(stochastic_volatility),
    "ecoli70": lambda: of_64(PROBLEMS["ecoli70"]),
    "arth150": lambda: of_64(lambda: gaussian_network(load_network("arth150"), "arth150")),
}
