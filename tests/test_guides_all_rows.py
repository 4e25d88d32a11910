"""Places of the posterior where a model draws rows that have latents of their own."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.guides.all_rows import find_place
from pyro_graphflows.inspect import trace_model

NOISE = 0.5


def effects(y, size=None, rows=None, chosen=None):
    """Return numbers of unknown mean and width, each seen once, with some rows, drawn or given."""
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    width = pyro.sample("width", dist.HalfNormal(5.0))
    with pyro.plate("data", size or len(y), subsample_size=rows, subsample=chosen) as indices:
        effect = pyro.sample("effect", dist.Normal(mean, width))
        pyro.sample("y", dist.Normal(effect, NOISE), obs=y if size else y[indices])


def data(number):
    torch.manual_seed(0)
    return 3.0 + 2.0 * torch.randn(number) + NOISE * torch.randn(number)


def loss_with_exact_effects(y, times=1.0):
    """Return minus the log-evidence, each datum counting several times, by a grid."""
    mean = torch.linspace(1.0, 5.0, 201)[:, None]
    width = torch.linspace(0.5, 4.0, 301)
    prior = dist.Normal(0.0, 10.0).log_prob(mean) + dist.HalfNormal(5.0).log_prob(width)
    likelihood = dist.Normal(mean[..., None], (width**2 + NOISE**2).sqrt()[:, None]).log_prob(y).sum(-1)
    cell = math.log(4.0 / 200 * 3.5 / 300)
    return -float((prior + times * likelihood).flatten().logsumexp(0) + cell)


def mean_loss(guide, *args, **kwargs):
    pyro.set_rng_seed(0)
    with torch.no_grad():
        losses = [Trace_ELBO().loss(effects, guide, *args, **kwargs) for _ in range(50)]
    return sum(losses) / len(losses)


def test_rows_that_the_model_draws_start_as_all_do():
    """The search by the rows of one call, counted ten times with their effects, was 170 nats off."""
    y = data(300)
    guide = auto_faithful_guide(effects, y, example_kwargs={"rows": 30}, num_start_samples=2000)
    assert mean_loss(guide, y) < loss_with_exact_effects(y) + 10.0
    assert mean_loss(guide, y, rows=30) < loss_with_exact_effects(y) + 30.0  # by batches, which differ


@pytest.mark.parametrize("given", ["batch", "indices"])
def test_rows_of_the_caller_are_taken_as_if_they_were_all(given):
    """A width that is unknown is right in a batch, where 50 copies of its rows have it at zero."""
    y = data(60)
    if given == "batch":
        args, kwargs, times, seen = (y,), {"size": 3000, "rows": 60}, 50.0, y
    else:
        chosen = torch.arange(0, 60, 3)
        args, kwargs, times, seen = (y,), {"chosen": chosen}, 3.0, y[chosen]
    guide = auto_faithful_guide(effects, *args, example_kwargs=kwargs, num_start_samples=2000)
    each = (mean_loss(guide, *args, **kwargs) - loss_with_exact_effects(seen, times)) / (times * len(seen))
    assert each < 0.05  # of a datum: amortised effects are not exact, and the start is wider


def test_known_widths_need_no_fewer_data():
    """The posterior of the mean is that of 3,000 data, as counted, not that of the 60 seen."""

    def known(y, size):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", size, subsample_size=len(y)):
            effect = pyro.sample("effect", dist.Normal(mean, 2.0))
            pyro.sample("y", dist.Normal(effect, NOISE), obs=y)

    y = data(60)
    guide = auto_faithful_guide(known, y, 3000)
    assert "by the rows of data that set-up had alone" in guide.describe(verbose=True)
    means = torch.stack([guide(y, 3000)["mean"] for _ in range(200)])
    assert abs(means.std() / math.sqrt((2.0**2 + NOISE**2) / 3000) - 1.0) < 0.2


@pytest.mark.parametrize("number", [100, 5000])
def test_draws_are_of_the_rows_of_the_call(number):
    y = 100.0 * torch.arange(float(number))

    def model(y):
        with pyro.plate("data", len(y), subsample_size=7) as indices:
            effect = pyro.sample("effect", dist.Normal(torch.zeros(2), 1e6).to_event(1))
            pyro.sample("y", dist.Normal(effect.sum(-1), 1.0), obs=y[indices])

    traced = trace_model(model, (y,), {})
    rows = traced.trace.nodes["data"]["value"]
    place = find_place(model, (y,), {}, traced)
    assert place.numbers == min(2 * number, 2000) or 1500 < place.numbers <= 2000
    draws = place.draw(20)["effect"]
    assert draws.shape == (20, 7, 2)
    assert bool((draws.sum(-1) - y[rows]).abs().max() < 10.0)


def test_rows_that_a_loop_draws_are_those_of_the_call():
    """A loop over other rows would have other sites: set-up ended in a TypeError."""
    y = data(60)

    def model(y):
        width = pyro.sample("width", dist.HalfNormal(300.0))
        for i, row in enumerate(pyro.plate("data", len(y), subsample_size=3)):
            effect = pyro.sample(f"effect{i}", dist.Normal(0.0, width))
            pyro.sample(f"y{i}", dist.Normal(effect, NOISE), obs=y[row])

    guide = auto_faithful_guide(model, y, num_start_samples=500)
    assert math.isfinite(Trace_ELBO().loss(model, guide, y))
