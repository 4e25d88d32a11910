import math
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal

from pyro_graphflows import auto_faithful_guide, sample_posterior
from pyro_graphflows.errors import GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.infer.surprise import NUM_DRAWS, warn_of_surprise

LEAST = 1 / (NUM_DRAWS + 1)


def three(x, y=None):
    """Three numbers about each latent, and their sum: a direction in which nothing varies."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0))
        pyro.sample("y", dist.Normal(z.unsqueeze(-1).expand((*z.shape, 3)), 1.0).to_event(1), obs=y)


def generated(x):
    return x[:, None] + torch.randn(len(x), 1) + torch.randn(len(x), 3)


def test_ranks_of_what_the_model_generates_are_uniform():
    x = torch.randn(1000)
    y = generated(x)
    surprise = auto_faithful_guide(three, x, y).posterior(x, y, num_draws=10).surprise
    assert surprise.shape == (1000,)
    for level in (0.01, 0.1, 0.5, 0.9):
        assert abs((surprise < level).double().mean() - level) < 6 * math.sqrt(level * (1 - level) / 1000)


def test_data_that_the_model_does_not_generate():
    """Each number is usual by itself; their differences are not."""
    x = torch.randn(100)
    y = generated(x)
    y[3] = x[3] + torch.tensor([4.0, -4.0, 0.0])
    y[5, 1] = 1e6
    posterior = auto_faithful_guide(three, x, generated(x)).posterior(x, y, num_draws=10)
    with pytest.warns(GraphflowsWarning, match=r"2 of 100 elements of 'data' are unlike"):
        surprise = posterior.surprise
    assert surprise[3].item() == pytest.approx(LEAST)
    assert surprise[5].item() == pytest.approx(LEAST)
    assert posterior.surprise is surprise  # found once


def test_directions_without_variance_count():
    """The second number is twice the first: each is usual, and a small error in one is impossible."""

    def doubled(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(torch.stack([z, 2 * z], -1), 1e-12).to_event(1), obs=y)

    z = torch.randn(50)
    y = torch.stack([z, 2 * z], -1)
    guide = auto_faithful_guide(doubled, y)
    y[:2, 1] += 0.01
    with pytest.warns(GraphflowsWarning, match="2 of 50"):
        surprise = guide.posterior(y, num_draws=10).surprise
    assert surprise[:2].tolist() == pytest.approx([LEAST] * 2)
    assert (surprise[2:] > LEAST).all()


def schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("schools", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@pytest.mark.parametrize("num", [8, 120])
def test_a_data_set_as_a_whole(num):
    """Of few elements all features are taken, of many the mean and the largest of their distances."""
    sigma = 5.0 + 10 * torch.rand(num)
    mu, tau = 3.0, 4.0
    y = mu + tau * torch.randn(num) + sigma * torch.randn(num)
    guide = auto_faithful_guide(schools, sigma, y)
    usual = guide.posterior(sigma, y, num_draws=10).surprise
    assert usual.shape == ()
    assert usual > 0.001
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphflowsWarning)  # of other data
        posterior = guide.posterior(sigma, torch.where(torch.arange(num) == 2, 200.0, y), num_draws=10)
    with pytest.warns(GraphflowsWarning, match=r"The data are unlike .*\(tail probability 0.0001\)"):
        assert posterior.surprise.item() == pytest.approx(LEAST)


def test_values_outside_of_a_support_are_as_far_out_as_can_be():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.LogNormal(z, 1.0, validate_args=False), obs=y)

    y = torch.randn(20).exp()
    guide = auto_faithful_guide(model, y)
    posterior = guide.posterior(y, num_draws=10)
    bad = torch.where(torch.arange(20) > 17, -1.0, y)
    posterior = replace(posterior, fitted=replace(posterior.fitted, args=(bad,)))
    with pytest.warns(GraphflowsWarning, match="2 of 20"):
        assert posterior.surprise[18:].tolist() == pytest.approx([LEAST] * 2)


def test_guides_that_read_no_data_have_none():
    sigma, y = torch.ones(4), torch.randn(4)
    guide = AutoNormal(schools)
    guide(sigma, y)
    assert sample_posterior(schools, guide, sigma, y, num_draws=10).surprise is None

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    assert auto_faithful_guide(model, y).posterior(y, num_draws=10).surprise is None
    amortised = auto_faithful_guide(model, y, pool="deepset").posterior(y, num_draws=10).surprise
    assert 0 < amortised <= 1


def test_improper_priors_are_refused_by_name_and_the_rest_works():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(5)
    posterior = auto_faithful_guide(model, y).posterior(y, num_draws=50)
    assert posterior.draws["z"].shape == (50, 5)
    assert posterior.khat.shape == (5,)
    with pytest.raises(UnsupportedModelError, match="site 'z': its prior is improper"):
        posterior.surprise  # noqa: B018


def test_it_does_not_touch_the_callers_random_numbers():
    x = torch.randn(10)
    y = generated(x)
    posterior = auto_faithful_guide(three, x, y).posterior(x, y, num_draws=10)
    state = torch.get_rng_state()
    first = posterior.surprise
    assert torch.equal(torch.get_rng_state(), state)
    again = auto_faithful_guide(three, x, y).posterior(x, y, num_draws=10).surprise
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("count", "num", "warns"), [(1, 1, True), (1, 1000, False), (6, 1000, True), (15, 10_000, False)]
)
def test_only_counts_beyond_chance_are_warned_of(count, num, warns):
    tail = torch.ones(num)
    tail[:count] = 1e-4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_surprise(tail, "data")
    assert bool(caught) == warns
