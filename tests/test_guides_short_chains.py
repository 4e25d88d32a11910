"""Short chains from a normal: exact moments of skewed targets, two sets of coordinates, and starts made from them."""

import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO

from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.guides import short_chains
from pyro_graphflows.guides.mode import LogPosterior, Mode, find_mode
from pyro_graphflows.guides.short_chains import Coordinates, OtherCoordinates, run_short_chains
from pyro_graphflows.inspect import trace_model

CHAINS = 32


def within_errors(values, expected, errors=5.0):
    """Whether a mean is what it should be, by the means of the chains; values (steps * chains,)."""
    of_chains = values.reshape(-1, CHAINS).mean(0)
    return abs(float(of_chains.mean()) - expected) < errors * float(of_chains.std()) / CHAINS**0.5


def test_the_log_of_a_gamma_variable_has_its_mean_and_variance():
    about = Coordinates(
        lambda x: (2 * x - x.exp()).sum(-1), torch.tensor([math.log(2.0)]), torch.tensor([[0.5**0.5]])
    )
    visited = about.point(run_short_chains(about, torch.randn(CHAINS, 1)))[:, 0]
    mean, variance = float(torch.digamma(torch.tensor(2.0))), float(torch.polygamma(1, torch.tensor(2.0)))
    assert within_errors(visited, mean)
    assert within_errors((visited - mean).square(), variance)
    assert not within_errors(math.log(2.0) + 0.0 * visited + 1e-9 * torch.randn(len(visited)), mean)


def funnel(both):
    v, x = both[:, :1], both[:, 1:]
    return (-v.square() / 18 - 0.5 * (x * (-v).exp()).square() - v).sum(-1) + 4 * v.square().sum(-1) / 18


def test_a_funnel_needs_other_coordinates():
    """v ~ N(0, 3^2) and five x ~ N(0, exp(v)^2): x / exp(v) is standard normal."""
    about = Coordinates(funnel, torch.zeros(6), torch.eye(6))

    def scaled(sign):
        return lambda both: torch.cat([both[:, :1], both[:, 1:] * (sign * both[:, :1]).exp()], -1)

    def flat(both):
        return -both[:, 0].square() / 18 - 0.5 * both[:, 1:].square().sum(-1)

    start = torch.randn(CHAINS, 6)
    alone = run_short_chains(about, start)[:, 0]
    both = run_short_chains(about, start, OtherCoordinates(flat, scaled(-1.0), scaled(1.0)))[:, 0]
    assert within_errors(both, 0.0)
    assert within_errors(both.square(), 9.0)
    assert float(alone.square().mean()) < 0.7 * 9.0


def slow(seconds):
    def log_density(x):
        began = time.process_time()
        while time.process_time() - began < seconds:
            pass
        return -0.5 * x.square().sum(-1)

    return Coordinates(log_density, torch.zeros(1), torch.eye(1))


def test_chains_that_would_take_long_are_shorter_or_left(monkeypatch):
    assert run_short_chains(slow(0.05), torch.randn(4, 1)) is None
    monkeypatch.setattr(short_chains, "LENGTHS", ((4000, 16000), (15, 45)))
    assert len(run_short_chains(slow(0.002), torch.randn(4, 1))) == 45 * 4


def test_chains_of_many_numbers_are_left():
    many = Coordinates(lambda x: -0.5 * x.square().sum(-1), torch.zeros(200), torch.eye(200))
    assert run_short_chains(many, torch.randn(CHAINS, 200)) is None


def test_chains_begin_where_there_is_a_density():
    nowhere = Coordinates(lambda x: x.sum(-1) - math.inf, torch.zeros(1), torch.eye(1))
    assert run_short_chains(nowhere, torch.randn(4, 1)) is None

    def half(x):  # a half-normal, which is not defined below zero
        return torch.where(x > 0, -0.5 * x.square(), -math.inf).sum(-1)

    found = run_short_chains(Coordinates(half, torch.zeros(1), torch.eye(1)), torch.randn(CHAINS, 1))
    assert bool((found > 0).all())
    assert within_errors(found[:, 0], (2 / math.pi) ** 0.5)


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(3.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    slopes = pyro.sample(
        "slopes",
        dist.MultivariateNormal(
            mu.unsqueeze(-1).expand(*mu.shape, 2), scale_tril=torch.tensor([[2.0, 0.0], [1.0, 0.5]])
        ),
    )
    with pyro.plate("groups", len(y)):
        share = pyro.sample("share", dist.Beta(2.0, 3.0))
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta + share * slopes[..., 0], 0.5), obs=y)


@pytest.mark.parametrize("centred", [False, True])
def test_points_belong_to_values_and_back(centred):
    args = (torch.tensor([1.0, 2.0, 4.0]),)
    traced = trace_model(hierarchy, args, strict=False)
    posterior = LogPosterior(hierarchy, args, {}, traced)
    posterior = posterior.centre(traced) if centred else posterior
    assert bool(posterior.centred) == centred
    points = torch.randn(7, posterior.size)
    torch.testing.assert_close(posterior.points_of(posterior.values(points)), points, rtol=1e-7, atol=1e-7)


def count(y):
    rate = pyro.sample("rate", dist.ImproperUniform(constraints.positive, (), ()))
    pyro.sample("y", dist.Poisson(rate), obs=y)


def test_a_skewed_posterior_is_there_at_the_start():
    """No event seen, and a flat prior: the posterior is exponential, and the evidence one."""
    y = torch.tensor(0.0)
    guide = auto_faithful_guide(count, y)
    said = guide.describe(verbose=True)
    assert "the start is 'mode'" in said
    assert "without chains" in said
    with torch.no_grad(), pyro.plate("draws", 20_000):
        rate = poutine.trace(guide).get_trace(y).nodes["rate"]["value"]
    loss = Trace_ELBO(num_particles=20_000, vectorize_particles=True).loss(count, guide, y)
    assert loss < 0.03  # .11 of the best normal of the logarithm
    assert abs(float(rate.mean()) - 1.0) < 0.1
    assert 0.9 < float(rate.std()) < 1.1


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_that_start_survives_training(rate):
    y = torch.tensor(0.0)
    guide = auto_faithful_guide(count, y)
    loss = Trace_ELBO(num_particles=20_000, vectorize_particles=True)
    before = loss.loss(count, guide, y)
    svi = SVI(count, guide, pyro.optim.Adam({"lr": rate}), Trace_ELBO())
    for _ in range(200):
        svi.step(y)
    assert loss.loss(count, guide, y) < before + 0.1


def test_a_normal_that_is_exact_is_left_as_it_is():
    def gaussian(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    args = (torch.tensor(3.0),)
    assert find_mode(gaussian, args, {}, trace_model(gaussian, args, strict=False)).visited is None
    args = (torch.tensor(0.0),)
    assert find_mode(count, args, {}, trace_model(count, args, strict=False)).visited is not None


def smooth(x, y):
    """Normal noise about a Gaussian process, whose matrix is singular in rounding where there is next to no noise."""
    length = pyro.sample("length", dist.LogNormal(0.0, 2.0))[..., None, None]
    size = pyro.sample("size", dist.LogNormal(0.0, 2.0))[..., None, None]
    noise = pyro.sample("noise", dist.HalfCauchy(0.1))[..., None, None]
    covariance = size * (-0.5 * ((x - x.unsqueeze(-1)) / length).square()).exp()
    tril = torch.linalg.cholesky(covariance + noise.square() * torch.eye(len(x)))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=tril), obs=y)


def test_a_matrix_that_is_singular_far_out_leaves_the_mode():
    x = torch.linspace(0.0, 1.0, 8)
    guide = auto_faithful_guide(smooth, x, (6 * x).sin() + 0.1 * torch.randn(8))
    assert "the start is 'mode'" in guide.describe(verbose=True)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_chains_that_suit_no_start_leave_the_normal(monkeypatch, error):
    draw = Mode.draw

    def fail(self, number, by_chains=False):
        if by_chains:
            raise error("no regression")
        return draw(self, number)

    monkeypatch.setattr(Mode, "draw", fail)
    guide = auto_faithful_guide(count, torch.tensor(0.0))
    assert "no start with short chains: no regression" in guide.describe(verbose=True)
