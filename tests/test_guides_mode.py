"""Draws near the posterior's mode: exact where posteriors are normal, in units of the sites, for any prior."""

import math
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.distributions import Normal

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides import mode as mode_module
from pyro_graphflows.guides.mode import SINGLE_RUNS, LogPosterior, find_mode
from pyro_graphflows.inspect import trace_model

POSITIVE = dist.ImproperUniform(constraints.positive, (), ())


def mode_of(model, *args):
    return find_mode(model, args, {}, trace_model(model, args, strict=False))


def flat_regression(x, y):
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (x.shape[-1],)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * beta.unsqueeze(-2)).sum(-1), 2.0), obs=y)


def test_flat_regression_in_raw_units_is_exact():
    x = torch.stack([torch.ones(50), 1e4 + 10 * torch.randn(50), 1e-3 * torch.randn(50)], -1)
    y = 5 + 0.01 * x[:, 1] + torch.randn(50)
    mode = mode_of(flat_regression, x, y)
    precision = x.T @ x / 4.0
    torch.testing.assert_close(mode.point, torch.linalg.solve(precision, x.T @ y / 4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mode.factor.T @ precision @ mode.factor, torch.eye(3), rtol=0, atol=1e-3)
    draws = mode.draw(4000)["beta"]
    assert draws.shape == (4000, 3)
    error = (draws.mean(0) - mode.point) / (draws.std(0) / 4000**0.5)
    assert bool((error.abs() < 5).all())


def groups(sigma, y):
    mu = pyro.sample("mu", dist.Normal(3.0, 10.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 2.0))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def test_normal_hierarchies_have_their_evidence():
    sigma, y = torch.rand(6) + 0.5, 5 + 3 * torch.randn(6)
    mode = mode_of(groups, sigma, y)
    covariance = torch.diag(4 + sigma**2) + 100.0
    exact = dist.MultivariateNormal(torch.full((6,), 3.0), covariance).log_prob(y)
    found = float(mode.posterior(mode.point)) + mode.log_volume  # priors are standard normal: (2 pi)s cancel
    assert abs(found - float(exact)) < 1e-5
    values = mode.posterior.values(mode.point.expand(2, -1))
    mean_mu = torch.linalg.solve(covariance, y - 3.0).sum() * 100 + 3.0
    torch.testing.assert_close(values["mu"], mean_mu.expand(2), rtol=1e-4, atol=1e-4)
    assert values["theta"].shape == (2, 6)


def scale_alone(y):
    sigma = pyro.sample("sigma", POSITIVE)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, sigma.unsqueeze(-1)), obs=y)


def test_an_improper_scale_has_its_mode_in_logarithms():
    y = 1e5 * torch.randn(400)
    mode = mode_of(scale_alone, y)
    best = (y.square().sum() / 399).log() / 2  # of 400 factors and the flat density of sigma in log sigma
    torch.testing.assert_close(mode.point, best.reshape(1), rtol=0, atol=1e-3)
    torch.testing.assert_close(mode.factor.abs(), torch.full((1, 1), (2 * 399) ** -0.5), rtol=1e-2, atol=0)


PRIORS = {
    "half-Cauchy": lambda: dist.HalfCauchy(5.0),
    "exponential": lambda: dist.Exponential(0.1),
    "gamma": lambda: dist.Gamma(3.0, 2.0),
    "log-normal": lambda: dist.LogNormal(1.0, 2.0),
    "uniform": lambda: dist.Uniform(-3.0, 9.0),
    "normal vector": lambda: dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    "independent": lambda: dist.HalfNormal(torch.ones(3)).to_event(1),
}


@pytest.mark.parametrize("name", PRIORS)
def test_standard_normal_points_are_draws_of_the_prior(name):
    prior = PRIORS[name]()

    def model():
        z = pyro.sample("z", prior)
        pyro.factor("nothing", 0.0 * z.sum())

    posterior = LogPosterior(model, (), {}, trace_model(model, (), strict=False))
    assert posterior.proper
    point = torch.randn(posterior.size)
    values = posterior.values(point.expand(1, -1))["z"][0]
    assert abs(float(posterior(point)) + float(point.square().sum()) / 2) < 1e-9
    if hasattr(prior, "cdf") and not prior.event_shape:
        torch.testing.assert_close(prior.cdf(values), Normal(0.0, 1.0).cdf(point[0]))


def test_priors_that_are_too_extreme_are_searched_in_logarithms():
    def model(y):
        tau = pyro.sample("tau", dist.Gamma(0.001, 0.001))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, tau.rsqrt()), obs=y)

    y = 0.1 * torch.randn(200)
    mode = mode_of(model, y)
    assert not mode.posterior.proper
    exact = (100.001 / (0.001 + y.square().sum() / 2)).log()  # mode of log tau under its gamma posterior
    torch.testing.assert_close(mode.point, exact.reshape(1), rtol=0, atol=1e-3)


def test_scales_and_masks_of_sites_count():
    x = torch.randn(6)

    def model(x):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", 12, subsample_size=6), pyro.poutine.mask(mask=torch.arange(6) < 4):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    mode = mode_of(model, x)
    torch.testing.assert_close(mode.point, x[:4].mean().reshape(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(mode.factor.abs(), torch.full((1, 1), 8**-0.5), rtol=1e-4, atol=0)


def many_effects(group, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("groups", 20):
        theta = pyro.sample("theta", dist.Normal(mu, sigma))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta[..., group], noise), obs=y)


def test_where_the_mode_is_far_off_normals_are_fitted_by_their_elbo():
    group = torch.arange(20).repeat_interleave(3)
    y = 1.5 + (0.5 * torch.randn(20))[group] + 0.7 * torch.randn(60)
    mode = mode_of(many_effects, group, y)
    # the exact evidence by the integral over both scales, the effects and their mean in closed form
    grid = torch.linspace(-6.0, 2.0, 161)
    log_sigma, log_noise = torch.meshgrid(grid, grid, indexing="ij")
    sigma2, noise2 = (2 * log_sigma).exp()[..., None, None], (2 * log_noise).exp()[..., None, None]
    same = (group[:, None] == group).to(y)
    covariance = 100.0 + sigma2 * same + noise2 * torch.eye(60)
    log_lik = dist.MultivariateNormal(torch.zeros(60), covariance).log_prob(y)
    log_prior = sum(
        dist.HalfNormal(torch.ones(())).log_prob(each.exp()) + each for each in (log_sigma, log_noise)
    )
    step = float(grid[1] - grid[0])
    exact = float(torch.logsumexp((log_lik + log_prior).flatten(), 0)) + 2 * math.log(step)
    noise = torch.randn(2000, len(mode.point))
    gap = exact - mode.elbo(noise)
    assert -0.1 < gap < 0.8, (
        gap
    )  # the normal about the mode itself is several nats off, independent ones about two


def test_what_has_no_mode_says_so():
    def coin(y):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(UnsupportedModelError, match="z is discrete"):
        mode_of(coin, torch.zeros(()))

    def nowhere(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        pyro.factor("never", z * math.inf)

    with pytest.raises(UnsupportedModelError, match="not finite at any point"):
        mode_of(nowhere, torch.zeros(()))


def test_models_that_take_no_batches_are_mapped_draw_by_draw():
    def model(y):
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("groups", 3):
            t = pyro.sample("t", dist.Normal(m[0], 0.5))
            pyro.sample("y", dist.Normal(t + m[1], 1.0), obs=y)

    draws = mode_of(model, torch.randn(3)).draw(2000)
    assert draws["m"].shape[1:] == (2,)
    assert len(draws["m"]) == len(draws["t"])
    off = (draws["t"] - draws["m"][:, :1]).std(0)  # less than the prior's, which they follow
    assert bool((off < 0.6).all())


def test_effects_with_much_data_have_their_mode_in_unconstrained_space():
    """Forty groups with far more in their data than in their prior: in units of the prior the posterior is curved."""

    def groups(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        spread = pyro.sample("spread", dist.HalfNormal(5.0))
        with pyro.plate("groups", len(y)):
            effect = pyro.sample("effect", dist.Normal(mu, spread))
            pyro.sample("y", dist.Normal(effect, 0.05), obs=y)

    y = 3.0 + 1.5 * torch.randn(40).double()
    traced = trace_model(groups, (y,))
    mode = find_mode(groups, (y,), {}, traced)
    assert mode.posterior.centred == {"effect"}
    log_spread = torch.linspace(-2.0, 3.0, 2001).double()
    variance = (log_spread.exp().square() + 0.05**2).unsqueeze(-1).unsqueeze(-1)
    covariance = variance * torch.eye(40).double() + 100.0
    joint = dist.MultivariateNormal(torch.zeros(40).double(), covariance).log_prob(y)
    joint += dist.HalfNormal(5.0).log_prob(log_spread.exp()) + log_spread
    evidence = torch.logsumexp(joint, 0).item() + math.log(5.0 / 2000)
    # the posterior of the logarithm of a scale is skewed: not quite normal
    assert mode.elbo(torch.randn(2000, 42).double()) == pytest.approx(evidence, abs=0.15)


def test_of_several_modes_the_one_with_the_most_mass_is_found():
    """The first search ends in the near mode, which has a fiftieth of the mass."""

    def two_modes():
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        near = math.log(0.02) + dist.Normal(0.5, 0.03).log_prob(z)
        far = math.log(0.98) + dist.Normal(-4.0, 0.2).log_prob(z)
        both = torch.logsumexp(torch.stack([near, far]), 0)
        pyro.factor("f", both - dist.Normal(0.0, 3.0).log_prob(z))

    mode = mode_of(two_modes)
    assert mode.log_evidence == pytest.approx(math.log(0.98), abs=0.01)
    assert 3.0 * mode.point.item() == pytest.approx(-4.0, abs=0.01)


def test_many_draws_at_once_of_models_without_plates():
    def walk(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        x = 0.0
        for t in range(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(x, scale))
            pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])

    y = torch.tensor([0.3, 1.1, 0.7, 2.0, 3.1, 2.4])
    posterior = LogPosterior(walk, (y,), {}, trace_model(walk, (y,), strict=False))
    points = torch.randn(5, posterior.size)
    together = posterior(points)
    torch.testing.assert_close(together, torch.stack([posterior(point) for point in points]))
    # the evidence, by the integral over the scale with the walk in closed form
    log_scale = torch.linspace(-8.0, 8.0, 801)
    steps = torch.minimum(torch.arange(1.0, 7.0)[:, None], torch.arange(1.0, 7.0))
    covariance = (2 * log_scale).exp()[:, None, None] * steps + torch.eye(6)
    given = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(y)
    prior = dist.Normal(0.0, 2.0).log_prob(log_scale)
    exact = float(torch.logsumexp(given + prior, 0)) + math.log(0.02)
    mode = mode_of(walk, y)
    gap = exact - mode.elbo(torch.randn(4000, len(mode.point)))
    assert -0.05 < gap < 0.5, gap


@pytest.fixture
def single_precision():
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def shifted(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1000.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_searches_are_in_double_precision_where_the_model_can_be(single_precision):
    """The sum over 100,000 data is rounded by more than the whole of what the mode's place is worth."""
    y = 1000.0 + torch.randn(100_000)
    mode = mode_of(shifted, y)
    number, wide = len(y), y.double()
    precision = number + 1e-6
    exact = wide.sum() / precision
    assert abs(float(mode.point) * 1000.0 - float(exact)) < 1e-6
    off = (wide - exact).square().sum() + exact.square() * 1e-6
    evidence = -0.5 * (number * math.log(2 * math.pi) + math.log(precision * 1e6) + float(off))
    assert abs(mode.log_evidence - evidence) < 1e-4
    draws = mode.draw(100)
    assert draws["loc"].dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_parameters_in_single_precision_are_searched_in_it(single_precision):
    network = torch.nn.Linear(2, 3)

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(network(z), 0.5).to_event(1), obs=y)

    y = torch.tensor([0.3, -0.2, 0.9])
    mode = mode_of(model, y)
    weight, bias = network.weight.detach(), network.bias.detach()
    precision = torch.eye(2) + 4.0 * weight.T @ weight
    exact = torch.linalg.solve(precision, 4.0 * weight.T @ (y - bias))
    torch.testing.assert_close(mode.point.float(), exact, rtol=0, atol=1e-3)
    assert mode.draw(10)["z"].dtype == torch.float32


def test_models_that_are_others_in_double_precision_are_searched_in_their_own(single_precision):
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0 if y.dtype == torch.float32 else 0.01), obs=y)

    mode = mode_of(model, torch.tensor(3.0))
    assert float(mode.point) == pytest.approx(1.5, abs=1e-4)


def test_a_model_that_mixes_the_draws_of_a_batch_is_asked_for_few_at_once():
    """Of 10,000 draws, the square would be in memory."""
    sizes = []

    def model(x):
        vector = pyro.sample("vector", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 3):
            row = pyro.sample("row", dist.Normal(0.0, 1.0))
            loc = row + vector.sum(-1)[..., None]  # one dimension too many with a batch of vectors
            str(vector.detach().sum().item())  # what reads a number cannot be mapped
            sizes.append(loc.numel())
            cell = pyro.sample("cell", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(cell, 1.0), obs=x)

    mode = mode_of(model, torch.tensor([0.5, 1.0, 2.0]))
    values = mode.draw(1000)
    assert values["cell"].shape == (SINGLE_RUNS, 3)  # one by one
    assert max(sizes) < 3 * 100**2


def test_values_of_draws_take_no_densities(monkeypatch):
    """Of 10,000 draws of a vector whose scale has one dimension too few, they would be for each pair of draws."""

    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        vector = pyro.sample("vector", dist.Normal(torch.zeros(2), scale).to_event(1))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(vector, 1.0), obs=y)

    def refuse(*args):
        raise AssertionError("a density was asked for")

    y = torch.tensor([0.5, 1.0])
    posterior = LogPosterior(model, (y,), {}, trace_model(model, (y,)), centred=("vector",))
    monkeypatch.setattr(Normal, "log_prob", refuse)
    assert posterior.values(torch.randn(5, posterior.size))["vector"].shape == (5, 2)


def test_models_that_take_no_batches_are_mapped_over_points():
    """As most regressions are written: without it there were no normals but that of the mode, and few draws."""

    def model(x, y):
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        rates = pyro.sample("rates", dist.Gamma(torch.tensor([2.0, 3.0, 4.0]), scale).to_event(1))
        share = pyro.sample("share", dist.Beta(2.0, 3.0))
        weights = pyro.sample("weights", dist.Laplace(torch.zeros(3), scale).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ (share * rates * weights), scale), obs=y)

    x, y = torch.randn(8, 3), torch.randn(8)
    posterior = LogPosterior(model, (x, y), {}, trace_model(model, (x, y)))
    points = torch.randn(SINGLE_RUNS + 1, posterior.size, requires_grad=True)
    assert posterior.takes_many(points)
    together, apart = posterior(points), torch.stack([posterior(point) for point in points])
    torch.testing.assert_close(together, apart)
    gradients = [torch.autograd.grad(each.sum(), points)[0] for each in (together, apart)]
    torch.testing.assert_close(*gradients)
    values = posterior.values(points)
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "scale": (len(points),),
        "rates": (len(points), 3),
        "share": (len(points),),
        "weights": (len(points), 3),
    }


def test_how_long_a_search_may_take_changes_no_draws(monkeypatch):
    def model(y):
        torch.randn(3)  # as a network does that is made in the model
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        scale = pyro.sample("scale", dist.HalfNormal(10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    def draws(seconds):
        pyro.set_rng_seed(0)
        monkeypatch.setattr(mode_module, "SECONDS_OF_RESTARTS", seconds)
        found = mode_of(model, y)
        return found.point, found.draw(3)["loc"]

    y = 3.0 + torch.randn(20)
    for one, other in zip(draws(0.0), draws(10.0), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_elbo_of_an_exactly_normal_posterior_is_the_evidence_by_any_noise():
    x = torch.tensor([1.3, -0.4, 2.2])

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(mean, 0.5), obs=x)

    found = find_mode(model, (), {}, trace_model(model))
    prior = torch.full((3, 3), 9.0) + 0.25 * torch.eye(3)
    evidence = dist.MultivariateNormal(torch.zeros(3), prior).log_prob(x).item()
    noise = torch.tensor([[4.0], [1.0]], dtype=torch.float64)  # far from its mean and its variance
    assert found.elbo(noise) == pytest.approx(evidence, abs=1e-4)
    assert found.gap(noise) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("seconds", "least"), [(10.0, -66.0), (0.0, -95.0)])
def test_a_slow_model_whose_normal_at_the_mode_is_absurd_has_a_better_one(monkeypatch, seconds, least):
    """Volatilities: draws from the normal at the mode have densities of exp(-1e40), and there is time for little."""

    def volatility(y):
        mean = pyro.sample("mean", dist.Cauchy(0.0, 5.0))
        scale = pyro.sample("scale", dist.HalfCauchy(2.0))
        h = 0.0
        for t in range(12):
            h = pyro.sample(f"h_{t}", dist.Normal(0.9 * h, scale))
            pyro.sample(f"y_{t}", dist.Normal(0.0, ((mean + h) / 2).exp()), obs=y[t])

    y = 30 * torch.randn(12, generator=torch.Generator().manual_seed(0)) * torch.linspace(-1, 1, 12).exp()
    monkeypatch.setattr(mode_module, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(mode_module, "SECONDS_WHERE_BAD", seconds)
    noises = torch.randn(9, 200, 14, generator=torch.Generator().manual_seed(0))

    def usual_elbo(seed):  # the mean over all draws has the worst of them
        pyro.set_rng_seed(seed)
        found = mode_of(volatility, y)
        return statistics.median(found.elbo(noise) for noise in noises)

    assert usual_elbo(0) > least
    monkeypatch.setattr(mode_module, "FAR", math.inf)  # the normal at the mode, whatever it is
    assert usual_elbo(0) < -1e6


def test_many_draws_have_the_moments_of_the_normal():
    def model():
        x = pyro.sample("x", dist.Normal(1.0, 2.0))
        y = pyro.sample("y", dist.Normal(x, 0.5))
        pyro.sample("z", dist.Normal(y, 0.3), obs=torch.tensor(3.0))

    found = mode_of(model).draw(100)
    prior = torch.tensor([[4.0, 4.0], [4.0, 4.25]])  # of x and y
    gain = prior[:, 1] / (4.25 + 0.09)
    drawn = torch.stack([found["x"], found["y"]], -1).reshape(100, 2)
    torch.testing.assert_close(drawn.mean(0), 1.0 + gain * 2.0, rtol=0, atol=1e-6)
    covariance = prior - torch.outer(gain, prior[1])
    torch.testing.assert_close(drawn.mT.cov(correction=0), covariance, rtol=0, atol=1e-6)
