import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain
from infer_posteriors import Groups
from pyro.infer.autoguide import AutoNormal

from pyro_graphflows import Spline, auto_faithful_guide
from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.infer import HMC, NUTS, load_posterior, sample_posterior
from pyro_graphflows.infer.refinement import Target, coordinates_of

SIX = 6.0
QUICK = NUTS(warmup=60)


@pytest.fixture
def groups():
    return Groups(3)


def check_mean(posterior, name, mean, sd):
    """Means within six standard errors by the effective number of draws."""
    draws, ess = posterior.draws[name], posterior.chains.ess[name]
    assert ((draws.mean(0) - mean).abs() < SIX * sd / ess.sqrt()).all()
    of_squares = ess.clamp(
        max=len(draws)
    )  # opposite draws count more than one for a mean, but not for a spread
    assert ((draws.std(0) / sd).log().abs() < SIX / of_squares.sqrt()).all()


def wrong_guide(groups):
    """Our guide with mu far too narrow and off."""
    guide = auto_faithful_guide(groups.model, *groups.args)
    loc, scale = groups.mu_given(*groups.args)
    guide.set_linear_("mu", {}, loc - 3 * scale, 0.3 * scale)
    return guide


# --------------------------------------------------------------------------------------------------- joint posteriors
@pytest.mark.parametrize("kind", ["ours", "a function"])
def test_a_wrong_guide_is_repaired(groups, kind):
    guide = wrong_guide(groups) if kind == "ours" else groups.guide(wide=0.3, shift=0.7)
    posterior = sample_posterior(groups.model, guide, *groups.args, num_draws=400, seed=0)
    assert posterior.khat > 0.7
    refined = posterior.refined(QUICK, num_chains=8, seed=1)
    assert refined.num_draws == 400
    assert refined.chains.num_chains == 8
    assert refined.draws.keys() == posterior.draws.keys()
    assert torch.equal(refined.draws["twice"], 2 * refined.draws["theta"])
    loc, scale = groups.mu_given(*groups.args)
    check_mean(refined, "mu", loc, scale)
    mean = groups.theta_given(loc, *groups.args)[0]
    check_mean(refined, "theta", mean, groups.joint_cov(groups.s).diagonal().sqrt())
    assert refined.chains.worst_rhat < 1.1
    assert refined.evidence is None
    assert refined.khat.item() == -math.inf
    assert refined.ess.item() == pytest.approx(refined.chains.least_ess)
    assert torch.equal(refined.log_weights, torch.zeros(400))
    assert posterior.chains is None  # the first is as it was


def test_the_target_is_the_base_times_the_weight(groups):
    """In the guide's base space the posterior is the law of the noise, times the weight of a draw."""
    guide = auto_faithful_guide(groups.model, *groups.args)
    posterior = guide.posterior(*groups.args, num_draws=5, seed=0)
    draws = {name: posterior.draws[name] for name in posterior.fitted.latents}
    coordinates = coordinates_of(posterior.fitted, draws)
    target = Target(posterior.fitted, coordinates, draws, None, torch.tensor(True))
    with torch.no_grad():
        energy = target(target.start)
    expected = -posterior.log_weights - dist.Normal(0.0, 1.0).log_prob(target.start).sum(-1).squeeze(-1)
    assert torch.allclose(energy.squeeze(-1), expected)


def test_points_where_no_noise_ever_is_have_infinite_energies():
    """A step of a chain may go there; the prior's quantile function has no number for it."""

    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(2.0, 2.0))
            pyro.sample("x", dist.Binomial(10, p), obs=x)

    x = torch.tensor([1.0, 5.0, 9.0])
    guide = auto_faithful_guide(model, x, family=Spline(base="student", fusion=True))
    posterior = guide.posterior(x, num_draws=4, seed=0)
    draws = {"p": posterior.draws["p"]}
    coordinates = coordinates_of(posterior.fitted, draws)
    target = Target(posterior.fitted, coordinates, draws, "data", torch.tensor([True, False, True]))
    points = target.start.clone()
    near = target(points)
    points[0, 0], points[1, 1], points[2, 1] = 6e9, -math.inf, math.nan
    energy = target(points)
    assert energy.isinf().nonzero().tolist() == [[0, 0], [1, 1], [2, 1]]
    assert torch.equal(energy[energy.isfinite()], near[energy.isfinite()])
    space = target.start.clone().requires_grad_()
    assert torch.autograd.grad(target(space).sum(), space)[0].isfinite().all()


def test_posteriors_that_can_be_trusted_are_left_alone(groups):
    posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=100)
    assert posterior.refined() is posterior
    refined = posterior.refined(QUICK, khat_above=None, num_chains=2, num_samples=20)
    assert refined.chains is not None
    assert refined.num_draws == 40
    assert refined.refined() is refined


def test_the_seed_decides(groups):
    posterior = sample_posterior(groups.model, groups.guide(wide=0.3), *groups.args, num_draws=40, seed=0)
    one, same, other = (
        posterior.refined(NUTS(warmup=5), khat_above=None, num_chains=2, num_samples=5, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(one.draws["theta"], same.draws["theta"])
    assert not torch.equal(one.draws["theta"], other.draws["theta"])


def test_positive_sites_and_simplices_with_a_guide_of_pyro():
    """A gamma and a Dirichlet posterior, by a mean-field guide that was not trained."""

    def model(counts, waits):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("counts", len(counts)):
            pyro.sample("k", dist.Categorical(probs), obs=counts)
        with pyro.plate("waits", len(waits)):
            pyro.sample("t", dist.Exponential(rate), obs=waits)

    counts, waits = torch.tensor([0, 0, 1, 2, 2, 2]), torch.rand(5)
    guide = AutoNormal(model)
    guide(counts, waits)
    posterior = sample_posterior(model, guide, counts, waits, num_draws=400, seed=0)
    refined = posterior.refined(QUICK, khat_above=None, num_chains=8, seed=1)
    rate = dist.Gamma(torch.tensor(2.0 + 5), 1.0 + waits.sum())
    check_mean(refined, "rate", rate.mean, rate.stddev)
    probs = dist.Dirichlet(torch.tensor([3.0, 2.0, 4.0]))
    check_mean(refined, "probs", probs.mean, probs.variance.sqrt())


def test_chains_stay_in_the_support_of_a_transformed_prior():
    """Of an exponential that is moved, torch takes the real line for the support."""
    moved = [torch.distributions.AffineTransform(2.0, 1.0)]

    def model(y):
        low = pyro.sample("low", dist.TransformedDistribution(dist.Exponential(1.0), moved))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(low, 1.0), obs=y)

    def guide(y):
        pyro.sample("low", dist.TransformedDistribution(dist.Exponential(3.0), moved))

    y = torch.tensor([2.2, 1.9, 2.3, 1.8])
    posterior = sample_posterior(model, guide, y, num_draws=400, seed=0)
    refined = posterior.refined(QUICK, khat_above=None, num_chains=8, seed=1)
    assert refined.draws["low"].min() > 2.0
    grid = torch.linspace(2.0, 10.0, 20_001)
    weights = (2.0 - grid + dist.Normal(grid.unsqueeze(-1), 1.0).log_prob(y).sum(-1)).softmax(0)
    mean = (weights * grid).sum()
    check_mean(refined, "low", mean, (weights * (grid - mean).square()).sum().sqrt())


def test_models_that_are_not_written_for_batches(groups):
    def model(y, s):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        if mu.dim():
            raise ValueError("one at a time")
        with pyro.plate("groups", len(s)):
            pyro.sample("y", dist.Normal(mu, s), obs=y)

    def guide(y, s):
        pyro.sample("mu", dist.Normal(3.0, 0.2))

    posterior = sample_posterior(model, guide, *groups.args, num_draws=60, seed=0)
    refined = posterior.refined(HMC(warmup=40), khat_above=None, num_chains=2, seed=1)
    precision = 0.25 + (1 / groups.s**2).sum()
    check_mean(refined, "mu", (groups.y / groups.s**2).sum() / precision, precision**-0.5)


def test_sites_that_the_model_enumerates_are_summed_out():
    """mu in a mixture of two, against a grid."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mu + 3 * z, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(1.0, 0.3))

    x = torch.tensor([0.3, 2.8, 3.5, -0.4, 0.9])
    posterior = sample_posterior(model, guide, x, num_draws=400, seed=0)
    refined = posterior.refined(NUTS(warmup=60), khat_above=None, num_chains=8, seed=1)
    grid = torch.linspace(-6, 6, 4001)
    parts = [p * dist.Normal(grid + 3 * z, 1.0).log_prob(x[:, None]).exp() for z, p in ((0, 0.7), (1, 0.3))]
    weight = torch.softmax(dist.Normal(0.0, 2.0).log_prob(grid) + sum(parts).log().sum(0), 0)
    mean = (weight * grid).sum()
    check_mean(refined, "mu", mean, (weight * (grid - mean).square()).sum().sqrt())


# ------------------------------------------------------------------------------------------------ one for each datum
def partly_wrong(chain, wrong):
    """The exact guide for some data and one far too narrow for others."""

    def guide(x, c):
        narrow = torch.where(wrong, 0.2, 1.0)
        z_precision = 1 / 1.13 + 9.0
        z_mean = (c / 1.13 + 6.0 * (x + 1)) / z_precision
        with pyro.plate("data", len(c)):
            z = pyro.sample(
                "z", dist.Normal(z_mean + torch.where(wrong, 0.3, 0.0), narrow * z_precision**-0.5)
            )
            w_precision = 1 + 0.64 / 0.49
            pyro.sample("w", dist.Normal(0.8 * (z - c) / 0.49 / w_precision, w_precision**-0.5))

    return guide


@pytest.mark.parametrize("method", ["nuts", QUICK], ids=["hmc", "nuts"])
def test_only_data_that_need_it_are_refined(method):
    chain = Chain(num_data=5)
    wrong = torch.tensor([True, False, False, True, False])
    posterior = sample_posterior(chain.model, partly_wrong(chain, wrong), *chain.args, num_draws=400, seed=0)
    assert torch.equal(posterior.khat > 0.7, wrong)
    refined = posterior.refined(method, num_chains=8, num_samples=100, seed=1)
    assert refined.num_draws == 400  # no more than there are of the others
    assert torch.equal(refined.chains.refined, wrong)
    for name in ("w", "z"):
        assert torch.equal(refined.draws[name][:, ~wrong], posterior.draws[name][:, ~wrong])
        assert refined.chains.rhat[name][~wrong].isnan().all()
        assert (refined.chains.rhat[name][wrong] < 1.1).all()
    precision = 1 / 1.13 + 9.0
    mean = (chain.c / 1.13 + 6.0 * (chain.x + 1)) / precision
    draws, ess = refined.draws["z"][:, wrong], refined.chains.ess["z"][wrong]
    assert ((draws.mean(0) - mean[wrong]).abs() < SIX * precision**-0.5 / ess.sqrt()).all()
    assert ((draws.std(0) * precision**0.5).log().abs() < SIX / ess.sqrt()).all()
    assert torch.equal(refined.log_weights[:, ~wrong], posterior.log_weights[:, ~wrong])
    assert (refined.log_weights[:, wrong] == 0).all()
    assert (refined.khat[wrong] == -math.inf).all()
    assert torch.equal(refined.khat[~wrong], posterior.khat[~wrong])
    assert "refined for 2 of 5 elements" in repr(refined)
    assert refined.chains.step_size.shape == (2,)
    with pytest.raises(GraphflowsError, match="these are refined"):
        refined.reweighted()


def test_our_guide_per_datum():
    chain = Chain(num_data=20)
    guide = auto_faithful_guide(chain.model, *chain.args)
    for parameter in guide.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    posterior = guide.posterior(*chain.args, num_draws=800, seed=0)
    refined = posterior.refined(HMC(warmup=60), khat_above=None, num_chains=8, num_samples=60, seed=1)
    precision = 1 / 1.13 + 9.0
    mean = (chain.c / 1.13 + 6.0 * (chain.x + 1)) / precision
    check_mean(refined, "z", mean, torch.full((20,), precision**-0.5))
    assert refined.chains.worst_rhat < 1.3  # the largest of 40 numbers by short chains


# ------------------------------------------------------------------------------------------------------ what is refused
def test_discrete_sites_are_refused(groups):
    def model(y):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    posterior = auto_faithful_guide(model, groups.y).posterior(groups.y, num_draws=50)
    with pytest.raises(UnsupportedModelError, match=r"discrete ones \['z'\].*enumerate"):
        posterior.refined(khat_above=None)


def test_weights_of_zero_are_refused(groups):
    def guide(y, s):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(s)):
            pyro.sample("theta", dist.Normal(0.0, 1.0))

    def model(y, s):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(s)):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, s).mask(True), obs=y)
        pyro.factor("never", torch.where(mu > 100.0, 0.0, -math.inf))

    posterior = sample_posterior(model, guide, *groups.args, num_draws=50)
    with pytest.raises(GraphflowsError, match=r"all weights are zero\. Train the guide"):
        posterior.refined()


def test_supports_that_depend_on_other_latents_need_a_guide_with_a_map():
    def model(x):
        top = pyro.sample("top", dist.Gamma(2.0, 1.0))
        low = pyro.sample("low", dist.Uniform(0.0, top))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    x = torch.tensor([0.5, 0.8])

    def by_hand(x):
        top = pyro.sample("top", dist.Gamma(3.0, 1.0))
        pyro.sample("low", dist.Uniform(0.0, top))

    posterior = sample_posterior(model, by_hand, x, num_draws=50, seed=0)
    with pytest.raises(UnsupportedModelError, match="support of site 'low'"):
        posterior.refined(khat_above=None)


@pytest.mark.slow
def test_our_guides_follow_supports_that_depend_on_other_latents():
    def model(x):
        top = pyro.sample("top", dist.Gamma(2.0, 1.0))
        low = pyro.sample("low", dist.Uniform(0.0, top))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    x = torch.tensor([0.5, 0.8])
    ours = auto_faithful_guide(model, x).posterior(x, num_draws=400, seed=0)
    refined = ours.refined(QUICK, khat_above=None, num_chains=8, seed=1)
    u = (torch.arange(2000) + 0.5) / 2000
    grid = torch.linspace(0.005, 20.0, 4000)
    low = grid[:, None] * u
    log_weight = dist.Gamma(2.0, 1.0).log_prob(grid)[:, None] + dist.Normal(low[..., None], 1.0).log_prob(
        x
    ).sum(-1)
    weight = torch.softmax(log_weight.flatten(), 0)
    mean = (weight * low.flatten()).sum()
    check_mean(refined, "low", mean, (weight * (low.flatten() - mean).square()).sum().sqrt())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "positive num_chains"),
        ({"num_samples": -1}, "positive num_samples"),
        ({"method": "gibbs"}, "'nuts', 'hmc'.*'gibbs'"),
    ],
)
def test_wrong_options(groups, options, message):
    posterior = sample_posterior(groups.model, groups.guide(wide=0.2), *groups.args, num_draws=20)
    with pytest.raises(GraphflowsError, match=message):
        posterior.refined(khat_above=None, **options)


def test_more_chains_than_draws_where_some_data_stay():
    chain = Chain(num_data=3)
    posterior = sample_posterior(chain.model, chain.guide, *chain.args, num_draws=20, seed=0)
    posterior = replace(posterior, khat=torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(GraphflowsError, match="at least as many draws as chains, 21"):
        posterior.refined(num_chains=21)


# ---------------------------------------------------------------------------------------------------- what comes of it
def test_an_interruption_keeps_what_is_done(groups, monkeypatch):
    posterior = sample_posterior(groups.model, groups.guide(wide=0.3), *groups.args, num_draws=100, seed=0)
    kernel = NUTS(warmup=10)
    calls = []
    inside = NUTS.__call__

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) > 10 + 6:
            raise KeyboardInterrupt
        return inside(self, *args)

    monkeypatch.setattr(NUTS, "__call__", interrupted)
    with pytest.warns(
        GraphflowsWarning, match="interrupted after 12 draws, which are kept: 100 were asked for"
    ):
        refined = posterior.refined(kernel, khat_above=None, num_chains=2, seed=0)
    assert refined.num_draws == 12
    assert refined.chains.interrupted
    assert refined.draws["twice"].shape == (12, 3)


@pytest.fixture
def refined(groups):
    posterior = sample_posterior(groups.model, groups.guide(wide=0.3), *groups.args, num_draws=80, seed=0)
    return posterior.refined(NUTS(warmup=20), khat_above=None, num_chains=4, seed=1)


def test_summary_and_words(refined):
    text = repr(refined)
    assert "80 draws of 4 chains" in text
    assert "R-hat" in text
    assert "left the posterior" in text
    table = refined.summary()
    row = table.rows["mu"]
    assert row["r-hat"] == pytest.approx(refined.chains.rhat["mu"].item())
    assert row["ess"] == pytest.approx(refined.chains.ess["mu"].item())
    assert row["mcse"] == pytest.approx(row["sd"] / row["ess"] ** 0.5)
    assert table.rows["twice[0]"]["r-hat"] == pytest.approx(table.rows["theta[0]"]["r-hat"])


def test_saved_and_read_again(refined, groups, tmp_path):
    refined.save(tmp_path / "posterior.pt")
    again = load_posterior(tmp_path / "posterior.pt", groups.model, groups.guide())
    assert repr(again) == repr(refined)
    assert torch.equal(again.chains.rhat["theta"], refined.chains.rhat["theta"])
    assert torch.equal(again.draws["theta"], refined.draws["theta"])


def test_arviz_gets_the_chains(refined):
    pytest.importorskip("arviz_base")
    data = refined.to_arviz(seed=0)
    assert data["posterior"]["theta"].shape == (4, 20, 3)
    assert (data["posterior"]["mu"].values[1] == refined.draws["mu"][20:40].numpy()).all()
    assert data["log_likelihood"]["y"].shape == (4, 20, 3)


def test_what_draws_are_used_for(refined, groups):
    assert refined.predict(seed=0)["y"].shape == (80, 3)
    loo = refined.loo(seed=0)
    assert abs(loo.elpd - groups.loo().sum()) < 0.5
