"""Models that a guide is set up with in a few runs, however they are written; the others say where, and what to write.

What is counted are runs of the model: a set-up that draws its joint samples one at a time takes a thousand.
"""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import Trace_ELBO
from versions import TORCH

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.inspect import find_batching, sample_prior, trace_model

X = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.3, -0.2], [0.1, 0.9, 1.1], [-1.0, 0.2, 0.4]])
FEW_RUNS = 120  # the search for a start near the posterior's mode among them


def coefficients():
    return pyro.sample("c", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def regression(product):
    def model(x, y=None):
        c = coefficients()
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Normal(product(x, c), 1.0), obs=y)

    return model


PRODUCTS = {
    "X @ c": lambda x, c: x @ c,
    "torch.mv": torch.mv,
    "torch.matmul": torch.matmul,
    "einsum": lambda x, c: torch.einsum("nd,d->n", x, c),
    "c @ X.T": lambda x, c: c @ x.T,
    "column by column": lambda x, c: x[:, 0] * c[0] + x[:, 1] * c[1] + x[:, 2] * c[2],
    "the last entry": lambda x, c: x[:, 0] * c[0] + c.sum(),
    "functional.linear": lambda x, c: torch.nn.functional.linear(x, c[None])[:, 0],
}


def chain(y):
    """States of a hidden Markov model that the model sums out; their means are latent."""
    mu = pyro.sample("mu", dist.Normal(torch.tensor([0.0, 2.0]), 1.0).to_event(1))
    transition = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    x = None
    for t in pyro.markov(range(len(y))):
        probs = torch.ones(2) / 2 if x is None else transition[x]
        x = pyro.sample(f"x{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample(f"y{t}", dist.Normal(mu[x], 0.7), obs=y[t])


def mixture(y):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0).to_event(1))
    with pyro.plate("d", len(y)):
        c = pyro.sample("c", dist.Categorical(w), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[c], 0.5), obs=y)


def counted(model):
    runs = [0]

    def again(*args, **kwargs):
        runs[0] += 1
        return model(*args, **kwargs)

    return again, runs


Y = torch.tensor([0.1, -0.2, 2.1, 1.8])
MODELS = {name: (regression(product), (X, Y)) for name, product in PRODUCTS.items()}
MODELS |= {"hidden Markov": (chain, (Y,)), "mixture": (mixture, (Y,))}


@pytest.mark.parametrize("name", MODELS)
def test_set_up_takes_few_runs(name):
    if name == "hidden Markov" and TORCH < (2, 6):
        pytest.skip("the oldest torch cannot draw many states of an indexed chain at once: a run for each")
    model, args = MODELS[name]
    model, runs = counted(model)
    guide = auto_faithful_guide(model, *(arg.double() for arg in args))
    searched = (
        200 if name == "mixture" else 0
    )  # evaluations of many draws at once, to find the posterior's place
    assert runs[0] < FEW_RUNS + searched
    assert "set-up is slow" not in guide.describe()


@pytest.mark.parametrize("name", PRODUCTS)
def test_joint_samples_are_those_of_the_model(name):
    """The mean of y given c is the product itself: residuals are standard normal."""
    model, (x, y) = MODELS[name][0], (X.double(), Y.double())
    samples = sample_prior(model, (x, y), num_samples=1000)
    assert samples["c"].shape == (1000, 3)
    loc = torch.stack([PRODUCTS[name](x, c) for c in samples["c"]])
    residuals = (samples["y"] - loc).reshape(-1)
    assert scipy.stats.kstest(residuals.numpy(), "norm").pvalue > 1e-6


DRAWN = {
    "normal": (dist.Normal(1.0, 2.0), scipy.stats.norm(1, 2)),
    "log-normal": (dist.LogNormal(0.0, 0.5), scipy.stats.lognorm(0.5)),
    "half-Cauchy": (dist.HalfCauchy(2.0), scipy.stats.halfcauchy(scale=2)),
    "half-normal": (dist.HalfNormal(2.0), scipy.stats.halfnorm(scale=2)),
    "exponential": (dist.Exponential(2.0), scipy.stats.expon(scale=0.5)),
    "Laplace": (dist.Laplace(0.0, 1.0), scipy.stats.laplace()),
    "Gumbel": (dist.Gumbel(0.0, 1.0), scipy.stats.gumbel_r()),
    "Student": (dist.StudentT(3.0), scipy.stats.t(3)),
    "uniform": (dist.Uniform(-1.0, 3.0), scipy.stats.uniform(-1, 4)),
    "gamma": (dist.Gamma(2.0, 3.0), scipy.stats.gamma(2, scale=1 / 3)),
    "inverse gamma": (dist.InverseGamma(3.0, 1.0), scipy.stats.invgamma(3)),
    "beta": (dist.Beta(2.0, 3.0), scipy.stats.beta(2, 3)),
    "Cauchy": (dist.Cauchy(0.0, 1.0), scipy.stats.cauchy()),
    "Pareto": (dist.Pareto(1.0, 2.0), scipy.stats.pareto(2)),
    "Weibull": (dist.Weibull(1.0, 2.0), scipy.stats.weibull_min(2)),
    "of an event": (dist.Normal(torch.zeros(2), 1.0).to_event(1), scipy.stats.norm()),
    "correlated": (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), scipy.stats.norm()),
}


@pytest.mark.parametrize("name", DRAWN)
def test_distributions_are_drawn_independently_in_a_batch_of_runs(name):
    fn, exact = DRAWN[name]

    def model(x):
        z = pyro.sample("z", fn)
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)  # the sum forbids a plate for events

    traced = trace_model(model, (torch.zeros(()),))
    batching = find_batching(model, (torch.zeros(()),), traced=traced)
    samples = sample_prior(model, (torch.zeros(()),), num_samples=2000, batching=batching)
    assert batching.way == "vmap"
    z = samples["z"].reshape(2000, -1)[:, 0]
    assert scipy.stats.kstest(z.double().numpy(), exact.cdf).pvalue > 1e-6
    assert z.unique().numel() == 2000


def writes(x):
    c = coefficients()
    loc = torch.zeros(4)
    loc[1:] = c
    with pyro.plate("n", 4):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=x)


def measured(x):
    c = coefficients()
    scale = 1.0 + abs(float(c.mean()))
    pyro.sample("y", dist.Normal(c.sum(), scale), obs=x[0])


@pytest.mark.parametrize(
    ("model", "place", "remedy", "options"),
    [
        (writes, "loc[1:] = c", "torch.stack", {}),
        (measured, "scale = 1.0 + abs(float(c.mean()))", "no float()", {"strict": False}),
    ],
)
def test_what_cannot_be_batched_is_named_with_the_remedy(model, place, remedy, options):
    model_runs, runs = counted(model)
    said = pytest.warns(GraphflowsWarning, match="no gradient passes") if options else nullcontext()
    with said:
        guide = auto_faithful_guide(model_runs, Y.double(), **options)
    assert 1000 < runs[0] < 1200
    (note,) = (line for line in guide.describe().splitlines() if "set-up is slow" in line)
    assert "site 'y'" in note
    assert place in note
    assert remedy in note


def test_samples_of_subsampled_plates_are_those_of_the_rows_at_set_up():
    def model(x, y=None):
        with pyro.plate("data", 40, subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(x[rows], 0.01), obs=None if y is None else y[rows])

    x = torch.arange(40.0).double()
    traced = trace_model(model, (x, x))
    samples = sample_prior(
        model, (x, x), num_samples=50, batching=find_batching(model, (x, x), traced=traced)
    )
    rows = traced.trace.nodes["data"]["value"]
    assert (samples["y"] - x[rows]).abs().max() < 0.1


@pytest.mark.parametrize(
    ("kind", "y"),
    [
        ("beta", torch.tensor([0.3, 0.0, 0.5])),
        ("beta", torch.tensor([0.3, 1.0])),
        ("gamma", torch.tensor([0.0, 2.0])),
        ("dirichlet", torch.tensor([[0.2, 0.8], [0.0, 1.0]])),
    ],
)
def test_data_at_an_end_of_a_support_without_a_density_there_are_refused(kind, y):
    """Every loss was infinite, without a word."""
    kinds = {
        "beta": lambda a: dist.Beta(a, 2.5),
        "gamma": lambda a: dist.Gamma(a, 1.0),
        "dirichlet": lambda a: dist.Dirichlet(torch.stack([a, a + 1.0], -1)),
    }

    def model(y):
        a = pyro.sample("a", dist.Gamma(20.0, 8.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", kinds[kind](a), obs=y)

    with pytest.raises(
        GraphflowsError, match=r"data of 'y' with a finite density; 1 of \d values are at an end"
    ):
        auto_faithful_guide(model, y)


def test_data_at_an_end_of_a_support_that_have_a_density_are_welcome():
    def model(x, y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(rate), obs=x)
            pyro.sample("y", dist.Beta(rate, 2.5).mask(y > 0), obs=y)

    data = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5])
    guide = auto_faithful_guide(model, *data, num_start_samples=200)
    with torch.no_grad():
        assert math.isfinite(Trace_ELBO().loss(model, guide, *data))


@pytest.mark.parametrize("number", [2, 3])
def test_masked_data_of_any_number_below_a_global_site(number):
    """Of two, a plate of as many draws fitted by chance beside the data's, and set-up broke."""

    def model(x, seen):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen), obs=x)

    x, seen = torch.linspace(0.5, 1.5, number), torch.arange(number) > 0
    guide = auto_faithful_guide(model, x, seen)
    losses = [Trace_ELBO().loss(model, guide, x, seen) for _ in range(20)]
    known = x[seen]
    covariance = torch.eye(len(known)) + 1.0
    evidence = dist.MultivariateNormal(torch.zeros(len(known)), covariance).log_prob(known).item()
    assert sum(losses) / 20 == pytest.approx(-evidence, abs=0.05)
