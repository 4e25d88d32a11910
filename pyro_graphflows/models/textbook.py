"""Pyro models of the textbook graphs in :mod:`pyro_graphflows.graphs.library`, under the same names with ``_model``.

Each takes its data first, as a tensor with one column per observed site (in the order of the graph's
``observed``), and ``num_samples``: the size of the plate ``"data"`` when there are no data. The regression models
take their covariate first and then the response. For a graph without a model here,
``LinearGaussianNetwork.random(graph, seed).pyro_model()`` makes one.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError

__all__ = [
    "EIGHT_SCHOOLS",
    "arithmetic_circuit_model",
    "asia_model",
    "burglar_alarm_model",
    "eight_schools_model",
    "eight_schools_non_centred_model",
    "factorial_hidden_markov_chain_model",
    "four_cycle_model",
    "hidden_markov_chain_model",
    "linear_regression_model",
]

#: Estimated effects and standard errors of the eight coaching experiments (Rubin 1981, Table 1).
EIGHT_SCHOOLS = {
    "y": (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0),
    "sigma": (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0),
}


def arithmetic_circuit_model(x: Tensor | None = None, num_samples: int = 1) -> None:
    """The arithmetic circuit: nonlinear, with a Laplace prior and products of latent variables.

    References:
        [1] Weilbach, Beronov, Wood and Harvey (2020), Structured Conditional Continuous Normalizing Flows for
        Efficient Amortized Inference in Graphical Models.

    Args:
        x: Data (n, 2), columns ``x0`` and ``x1``.
        num_samples: The size of the data plate without data.

    Raises:
        GraphflowsError: If ``x`` does not have two columns.
    """
    size, one, columns = _data(x, 2, num_samples)
    with pyro.plate("data", size, dim=-1):
        z0 = pyro.sample("z0", dist.Laplace(5 * one, one))
        z1 = pyro.sample("z1", dist.Laplace(-2 * one, one))
        pyro.sample("z2", dist.Normal(torch.tanh(z0 + z1 - 2.8), 0.1))
        z3 = pyro.sample("z3", dist.Normal(z0 * z1, 0.1))
        z4 = pyro.sample("z4", dist.Normal(7 * one, 2 * one))
        z5 = pyro.sample("z5", dist.Normal(torch.tanh(z3 + z4), 0.1))
        pyro.sample("x0", dist.Normal(z3, 0.1), obs=columns[0])
        pyro.sample("x1", dist.Normal(z5, 0.1), obs=columns[1])


def four_cycle_model(x: Tensor | None = None, num_samples: int = 1, *, scale: float = 0.5) -> None:
    """Four standard normal causes in a ring; each effect is the sum of two neighbours plus noise.

    Args:
        x: Data (n, 4), columns ``x12``, ``x23``, ``x34`` and ``x41``.
        num_samples: The size of the data plate without data.
        scale: The standard deviation of the noise.

    Raises:
        GraphflowsError: If ``x`` does not have four columns.
    """
    size, one, columns = _data(x, 4, num_samples)
    with pyro.plate("data", size, dim=-1):
        z = [pyro.sample(f"z{i}", dist.Normal(0 * one, one)) for i in (1, 2, 3, 4)]
        for column, (a, b) in zip(columns, [(1, 2), (2, 3), (3, 4), (4, 1)], strict=True):
            pyro.sample(f"x{a}{b}", dist.Normal(z[a - 1] + z[b - 1], scale), obs=column)


def hidden_markov_chain_model(
    x: Tensor | None = None,
    num_samples: int = 1,
    *,
    length: int | None = None,
    decay: float = 0.9,
    scale: float = 1.0,
) -> None:
    """A stationary normal autoregression ``z0, z1, ...`` seen through noise as ``x0, x1, ...``.

    Args:
        x: Data (n, T).
        num_samples: The size of the data plate without data.
        length: The number of times T; needed only without data.
        decay: The correlation of neighbouring states, which have variance 1.
        scale: The standard deviation of the noise of each observation.

    Raises:
        GraphflowsError: If neither ``x`` nor ``length`` is given, or they differ.
    """
    size, one, columns = _data(x, _length(x, length), num_samples)
    innovation = (1 - decay**2) ** 0.5
    with pyro.plate("data", size, dim=-1):
        z = pyro.sample("z0", dist.Normal(0 * one, one))
        for t, column in enumerate(columns):
            if t:
                z = pyro.sample(f"z{t}", dist.Normal(decay * z, innovation))
            pyro.sample(f"x{t}", dist.Normal(z, scale), obs=column)


def factorial_hidden_markov_chain_model(
    x: Tensor | None = None,
    num_samples: int = 1,
    *,
    length: int | None = None,
    num_chains: int = 2,
    decay: float = 0.9,
    scale: float = 0.5,
) -> None:
    """Several independent autoregressions ``z{c}_{t}`` of which only the noisy sum ``x{t}`` is seen.

    Args:
        x: Data (n, T).
        num_samples: The size of the data plate without data.
        length: The number of times T; needed only without data.
        num_chains: The number of chains.
        decay: The correlation of neighbouring states in chain 0; chain c has ``decay ** (c + 1)``.
        scale: The standard deviation of the noise of each observation.

    References:
        [1] Ghahramani and Jordan (1997), Factorial Hidden Markov Models, Machine Learning 29.

    Raises:
        GraphflowsError: If neither ``x`` nor ``length`` is given, or they differ.
    """
    size, one, columns = _data(x, _length(x, length), num_samples)
    decays = [decay ** (c + 1) for c in range(num_chains)]
    with pyro.plate("data", size, dim=-1):
        z: list[Tensor] = []
        for t, column in enumerate(columns):
            laws = (
                [dist.Normal(r * value, (1 - r**2) ** 0.5) for r, value in zip(decays, z, strict=True)]
                if t
                else [dist.Normal(0 * one, one) for _ in decays]
            )
            z = [pyro.sample(f"z{c}_{t}", law) for c, law in enumerate(laws)]
            pyro.sample(f"x{t}", dist.Normal(sum(z), scale), obs=column)


def burglar_alarm_model(x: Tensor | None = None, num_samples: int = 1) -> None:
    """The burglar alarm, all sites Bernoulli.

    References:
        [1] Russell and Norvig (2010), Artificial Intelligence: A Modern Approach, Figure 14.2. The probability
        of a burglary given both calls is 0.284.

    Args:
        x: Data (n, 2) of zeros and ones, columns ``john_calls`` and ``mary_calls``.
        num_samples: The size of the data plate without data.

    Raises:
        GraphflowsError: If ``x`` does not have two columns.
    """
    size, one, columns = _data(x, 2, num_samples)
    rates = one.new_tensor([[0.001, 0.29], [0.94, 0.95]])  # alarm given burglary (row), earthquake (column)
    with pyro.plate("data", size, dim=-1):
        burglary = pyro.sample("burglary", dist.Bernoulli(0.001 * one))
        earthquake = pyro.sample("earthquake", dist.Bernoulli(0.002 * one))
        alarm = pyro.sample("alarm", dist.Bernoulli(rates[burglary.long(), earthquake.long()]))
        pyro.sample("john_calls", dist.Bernoulli(_rate(alarm, 0.05, 0.9)), obs=columns[0])
        pyro.sample("mary_calls", dist.Bernoulli(_rate(alarm, 0.01, 0.7)), obs=columns[1])


def asia_model(x: Tensor | None = None, num_samples: int = 1) -> None:
    """The chest clinic, all sites Bernoulli; ``either`` is a deterministic site (tuberculosis or cancer).

    References:
        [1] Lauritzen and Spiegelhalter (1988), Local Computations with Probabilities on Graphical Structures
        and Their Application to Expert Systems, Journal of the Royal Statistical Society B 50, Table 1.

    Args:
        x: Data (n, 2) of zeros and ones, columns ``xray`` and ``dysp``.
        num_samples: The size of the data plate without data.

    Raises:
        GraphflowsError: If ``x`` does not have two columns.
    """
    size, one, columns = _data(x, 2, num_samples)
    rates = one.new_tensor([[0.1, 0.7], [0.8, 0.9]])  # dyspnoea given bronchitis (row), either (column)
    with pyro.plate("data", size, dim=-1):
        travel = pyro.sample("asia", dist.Bernoulli(0.01 * one))
        tub = pyro.sample("tub", dist.Bernoulli(_rate(travel, 0.01, 0.05)))
        smoke = pyro.sample("smoke", dist.Bernoulli(0.5 * one))
        lung = pyro.sample("lung", dist.Bernoulli(_rate(smoke, 0.01, 0.1)))
        bronc = pyro.sample("bronc", dist.Bernoulli(_rate(smoke, 0.3, 0.6)))
        either = pyro.deterministic("either", torch.maximum(tub, lung))
        pyro.sample("xray", dist.Bernoulli(_rate(either, 0.05, 0.98)), obs=columns[0])
        pyro.sample("dysp", dist.Bernoulli(rates[bronc.long(), either.long()]), obs=columns[1])


def linear_regression_model(x: Tensor, y: Tensor | None = None) -> None:
    """Bayesian linear regression with unknown noise scale, data in the plate ``"data"``.

    Args:
        x: The covariate (n,).
        y: The response (n,).
    """
    one = x.new_ones(())
    slope = pyro.sample("slope", dist.Normal(0 * one, one))
    intercept = pyro.sample("intercept", dist.Normal(0 * one, one))
    sigma = pyro.sample("sigma", dist.LogNormal(-one, 0.5 * one))
    with pyro.plate("data", x.shape[0], dim=-1):
        pyro.sample("y", dist.Normal(intercept + slope * x, sigma), obs=y)


def eight_schools_model(sigma: Tensor, y: Tensor | None = None) -> None:
    """The eight schools with effects ``theta`` as sites.

    References:
        [1] Rubin (1981), Estimation in Parallel Randomized Experiments, Journal of Educational Statistics 6;
        Gelman et al. (2013), Bayesian Data Analysis, Section 5.5. The priors are N(0, 5²) and half-Cauchy(5).

    Args:
        sigma: The known standard errors (J,).
        y: The estimated effects (J,).
    """
    one = sigma.new_ones(())
    mu = pyro.sample("mu", dist.Normal(0 * one, 5 * one))
    tau = pyro.sample("tau", dist.HalfCauchy(5 * one))
    with pyro.plate("schools", sigma.shape[0], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_non_centred_model(sigma: Tensor, y: Tensor | None = None) -> None:
    """The eight schools with standard normal ``eta`` as sites, and ``theta = mu + tau * eta``.

    The posterior of ``theta`` is that of :func:`eight_schools_model`.

    Args:
        sigma: The known standard errors (J,).
        y: The estimated effects (J,).
    """
    one = sigma.new_ones(())
    mu = pyro.sample("mu", dist.Normal(0 * one, 5 * one))
    tau = pyro.sample("tau", dist.HalfCauchy(5 * one))
    with pyro.plate("schools", sigma.shape[0], dim=-1):
        eta = pyro.sample("eta", dist.Normal(0 * one, one))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def _data(x: Tensor | None, num_columns: int, num_samples: int) -> tuple[int, Tensor, list[Tensor | None]]:
    """Return the size of the data plate, a one in the type of the data, and the columns."""
    if x is None:
        return num_samples, torch.ones(()), [None] * num_columns
    if x.dim() != 2 or x.shape[1] != num_columns:
        raise GraphflowsError(f"Expected x of shape (n, {num_columns}); got {tuple(x.shape)}.")
    return x.shape[0], x.new_ones(()), list(x.unbind(-1))


def _length(x: Tensor | None, length: int | None) -> int:
    if length is None:
        if x is None:
            raise GraphflowsError("Expected data x or a length; got neither.")
        return x.shape[-1]
    return length


def _rate(switch: Tensor, off: float, on: float) -> Tensor:
    return off + (on - off) * switch
