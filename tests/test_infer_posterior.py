import math
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain
from infer_posteriors import Groups, Regression
from pyro.infer import config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)

from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.infer import load_posterior, log_evidence, sample_posterior

SIX = 6.0  # standard errors: a failure by chance in 5e8 comparisons


@pytest.fixture
def groups():
    return Groups()


@pytest.fixture
def regression():
    return Regression()


def check_mean(draws, mean, sd):
    """Means of independent draws within six standard errors."""
    assert ((draws.mean(0) - mean).abs() < SIX * sd / math.sqrt(len(draws))).all()


# -------------------------------------------------------------------------------------------------- draws and weights
def test_an_exact_guide_has_equal_weights_that_are_the_evidence(groups):
    posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=500)
    assert posterior.draws["mu"].shape == (500,)
    assert posterior.draws["theta"].shape == (500, 6)
    assert torch.equal(posterior.draws["twice"], 2 * posterior.draws["theta"])
    exact = groups.log_evidence(*groups.args)
    assert torch.allclose(posterior.log_weights, exact.expand(500))
    assert posterior.khat.item() == -math.inf
    assert posterior.ess.item() == pytest.approx(500)
    assert posterior.evidence.log_evidence.item() == pytest.approx(exact.item())
    assert posterior.data_plate is None
    assert torch.equal(posterior.observed["y"], groups.y)
    loc, scale = groups.mu_given(*groups.args)
    check_mean(posterior.draws["mu"], loc, scale)


def test_per_datum_where_everything_is_in_the_data_plate():
    chain = Chain(num_data=7)
    posterior = sample_posterior(chain.model, chain.guide, *chain.args, num_draws=200)
    assert posterior.data_plate == "data"
    assert posterior.log_weights.shape == (200, 7)
    assert torch.allclose(posterior.log_weights, chain.log_evidence().expand(200, 7))
    assert posterior.khat.shape == posterior.ess.shape == (7,)
    assert "one for each of 7 elements of 'data'" in repr(posterior)


def test_draws_do_not_depend_on_chunks_and_the_seed_decides(groups, monkeypatch):
    def draw(seed):
        return sample_posterior(groups.model, groups.guide(1.3), *groups.args, num_draws=50, seed=seed)

    before = torch.get_rng_state()
    first, same, other = draw(1), draw(1), draw(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.draws["mu"], same.draws["mu"])
    assert not torch.equal(first.draws["mu"], other.draws["mu"])
    monkeypatch.setattr("pyro_graphflows.infer.model_runs.NUMBERS_AT_ONCE", 100)
    chunked = draw(1)
    assert chunked.draws["theta"].shape == (50, 6)
    with torch.no_grad():
        again = sample_posterior(groups.model, groups.guide(1.3), *groups.args, num_draws=50, seed=1)
    assert torch.equal(again.log_weights, chunked.log_weights)


@pytest.mark.parametrize(
    "make", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormalMessenger, auto_faithful_guide]
)
def test_every_kind_of_guide(groups, make):
    """The weights of an untrained guide are those of the definition, and estimate the evidence."""
    guide = make(groups.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphflowsWarning)
        posterior = sample_posterior(groups.model, guide, *groups.args, num_draws=20_000, seed=3)
        assert posterior.draws["theta"].shape == (20_000, 6)
        corrected = posterior.reweighted(500, seed=4)
    if posterior.khat < 0.7:
        found = posterior.evidence
        assert abs(found.log_evidence - groups.log_evidence(*groups.args)) < SIX * found.standard_error
    assert corrected.draws["theta"].shape == (500, 6)
    assert torch.equal(corrected.draws["twice"], 2 * corrected.draws["theta"])
    mu, y, s = posterior.draws["mu"][:3, None], groups.y, groups.s
    theta = posterior.draws["theta"][:3]
    joint = dist.Normal(0.0, 2.0).log_prob(mu[:, 0]) + dist.Normal(mu, 1.5).log_prob(theta).sum(1)
    joint = joint + dist.Normal(theta, s).log_prob(y).sum(1)
    if make is AutoNormal:
        locs, scales = guide.median(), {"mu": 0.1, "theta": 0.1}
        density = dist.Normal(locs["mu"], scales["mu"]).log_prob(mu[:, 0])
        density = density + dist.Normal(locs["theta"], scales["theta"]).log_prob(theta).sum(1)
        assert torch.allclose(posterior.log_weights[:3], joint - density)


def test_models_that_are_not_written_for_batches(groups):
    """A sum over all dimensions would mix the draws: they are run one by one, and are right."""

    def model(y, s):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("groups", 6):
            theta = pyro.sample("theta", dist.Normal(mu, 1.5))
        pyro.deterministic("total", theta.sum())
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(theta if theta.dim() == 1 else theta.sum(), s), obs=y)

    posterior = sample_posterior(model, groups.guide(), *groups.args, num_draws=40)
    assert not posterior.fitted.vectorize
    assert torch.allclose(posterior.log_weights, groups.log_evidence(*groups.args).expand(40))
    assert torch.allclose(posterior.draws["total"], posterior.draws["theta"].sum(1))

    def mixing(y, s):  # right densities in a batch, but what it computes besides mixes the draws
        groups.model(y, s)
        mu = pyro.sample("extra", dist.Normal(0.0, 1.0))
        pyro.deterministic("sum", mu.sum())

    def guide(y, s):
        groups.guide()(y, s)
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    posterior = sample_posterior(mixing, guide, *groups.args, num_draws=30)
    assert torch.equal(posterior.draws["sum"], posterior.draws["extra"])


def test_enumerated_sites_are_summed_out():
    """A mixture: the weights sum over the assignments, and the evidence is that of the mixture."""
    y = torch.tensor([-1.0, 0.5, 2.0])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu + 2 * c, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    posterior = sample_posterior(config_enumerate(model), guide, y, num_draws=500)
    assert list(posterior.draws) == ["mu"]
    mu = posterior.draws["mu"][:, None]
    mixture = torch.logaddexp(
        math.log(0.3) + dist.Normal(mu + 2, 1.0).log_prob(y), math.log(0.7) + dist.Normal(mu, 1.0).log_prob(y)
    )
    assert torch.allclose(posterior.log_weights, mixture.sum(1))


# --------------------------------------------------------------------------------------------------------- correction
def test_reweighting_repairs_a_wrong_guide(regression):
    """Too wide and without the correlation: after resampling means, variances and correlation are right."""
    mean, cov = regression.posterior()
    posterior = sample_posterior(
        regression.model, regression.wide_guide, regression.x, regression.y, num_draws=4000
    )
    assert posterior.draws["a"].var() > 1.5 * cov[0, 0]
    assert posterior.khat < 0.7
    fixed = posterior.reweighted(seed=1)
    assert fixed.is_resampled
    assert fixed.khat < 0.7
    assert torch.equal(fixed.log_weights, torch.zeros(4000))
    assert fixed.evidence is None
    both = torch.stack([fixed.draws["a"], fixed.draws["b"]], 1)
    assert len(both.unique(dim=0)) == 4000  # without replacement
    # a tenth of the pool: the sample is as good as independent draws of the posterior up to a tenth
    check_mean(both, mean, cov.diagonal().sqrt())
    found = torch.cov(both.T)
    error = torch.sqrt((cov**2 + torch.outer(cov.diagonal(), cov.diagonal())) / 4000)
    bias = 0.1 * cov.diagonal().max()
    assert ((found - cov).abs() < SIX * error + bias).all()
    line = fixed.draws["a"][:, None] + fixed.draws["b"][:, None] * regression.x
    assert torch.allclose(fixed.draws["mean"], line)
    with pytest.raises(GraphflowsError, match="resampled by their weights already"):
        fixed.reweighted()


def test_reweighting_is_per_datum_where_the_posterior_factorises():
    """A guide without the correlation of z and w: each datum's draws get theirs."""
    chain = Chain(num_data=4)
    precision, w_precision = 1 / (0.64 + 0.49) + 1.5**2 / 0.25, 1 + 0.64 / 0.49
    slope = 0.8 / 0.49 / w_precision
    mean = (chain.c / (0.64 + 0.49) + 1.5 * (chain.x + 1) / 0.25) / precision
    sd, w_sd = precision**-0.5, (1 / w_precision + slope**2 / precision) ** 0.5

    def guide(x, c):
        with pyro.plate("data", len(c)):
            pyro.sample("w", dist.Normal(slope * (mean - c), 1.2 * w_sd))
            pyro.sample("z", dist.Normal(mean, 1.2 * sd))

    posterior = sample_posterior(chain.model, guide, *chain.args, num_draws=4000, seed=0)
    fixed = posterior.reweighted(seed=1)
    assert fixed.khat.shape == (4,)
    assert fixed.khat.max() < 0.7
    check_mean(fixed.draws["z"], mean, torch.full((4,), sd))
    check_mean(fixed.draws["w"], slope * (mean - chain.c), torch.full((4,), w_sd))
    for n in range(4):
        assert len(fixed.draws["z"][:, n].unique()) == 4000
        cov = torch.cov(torch.stack([fixed.draws["z"][:, n], fixed.draws["w"][:, n]]))
        assert cov[0, 1] / cov[0, 0] == pytest.approx(slope, abs=SIX * w_sd / sd / 4000**0.5 + 0.05)
        assert cov[0, 0] == pytest.approx(sd**2, rel=SIX * (2 / 4000) ** 0.5)


def test_a_pool_that_is_worth_too_little_is_said(groups):
    posterior = sample_posterior(
        groups.model, groups.guide(1.0, shift=2.0), *groups.args, num_draws=300, seed=0
    )
    assert posterior.khat > 0.7
    assert "too uneven" in repr(posterior)
    with pytest.warns(GraphflowsWarning, match="The pool of 3000 draws is worth"):
        resampled = posterior.reweighted(seed=1)
    assert resampled.khat > 0.7
    assert (resampled.loo(seed=1).khat >= resampled.khat).all()  # it does not look better for being resampled


# ---------------------------------------------------------------------------------------------------------- bad input
def test_weights_of_zero():
    def model(x):
        z = pyro.sample("z", dist.HalfNormal(1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):  # never positive
        pyro.sample("z", dist.Normal(-50.0, 1.0))

    pyro.enable_validation(False)
    posterior = sample_posterior(model, guide, torch.tensor(1.0), num_draws=100)
    assert (posterior.log_weights == -math.inf).all()
    assert posterior.khat.item() == math.inf
    assert posterior.ess.item() == 0
    assert "No draw has a positive density under the model" in repr(posterior)
    with pytest.raises(
        GraphflowsError, match="at least 100 draws of the pool of 1000 with a positive weight; got 0"
    ):
        posterior.reweighted()


@pytest.mark.parametrize("number", [0, -3, 2.5])
def test_numbers_of_draws(groups, number):
    with pytest.raises(GraphflowsError, match="Expected a positive num_draws"):
        sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=number)
    posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=3)
    with pytest.raises(GraphflowsError, match="Expected a positive num_draws"):
        posterior.reweighted(number)
    with pytest.raises(GraphflowsError, match="Expected a positive num_draws"):
        posterior.predict(num_draws=number)


def test_one_draw_is_enough(groups):
    posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=1)
    assert posterior.draws["theta"].shape == (1, 6)
    assert posterior.khat.item() == math.inf  # one weight tells nothing
    assert math.isnan(posterior.summary()["mu"]["sd"])


def test_models_without_observations(groups):
    def model(y, s):
        groups.model(None, s)

    with pytest.raises(UnsupportedModelError, match="Expected the model to have observed sites"):
        sample_posterior(model, groups.guide(), *groups.args)


def test_point_estimates(groups):
    with pytest.raises(UnsupportedModelError, match=r"\['mu', 'theta'\] are points"):
        sample_posterior(groups.model, AutoDelta(groups.model), *groups.args, num_draws=10)


def test_guides_that_lack_a_site(groups):
    def guide(y, s):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedModelError, match=r"does not sample \['theta'\]"):
        sample_posterior(groups.model, guide, *groups.args)


def test_guides_with_a_site_more(groups):
    """The density of noise that the model has not would make weights of another size, without an error."""

    def guide(y, s):
        groups.guide()(y, s)
        pyro.sample("noise", dist.Normal(0.0, 3.0))

    with pytest.raises(UnsupportedModelError, match=r"latent site of the model; got \['noise'\]"):
        sample_posterior(groups.model, guide, *groups.args)


def test_data_of_another_shape(groups):
    guide = auto_faithful_guide(groups.model, *groups.args)
    with pytest.raises(GraphflowsError, match=r"Expected data of 'y' of shape \(6,\)"):
        guide.posterior(torch.zeros(4, 6), groups.s)


def test_a_guide_that_was_not_trained_says_so():
    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(5), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((slope.unsqueeze(-2) * x).sum(-1), 0.1), obs=y)

    x = torch.randn(100, 5)
    guide = AutoNormal(model)
    guide(x, x.sum(-1))
    posterior = sample_posterior(model, guide, x, x.sum(-1), num_draws=200, seed=0)
    assert posterior.khat > 0.7
    assert "train the guide" in repr(posterior)


def test_densities_that_are_no_numbers(groups):
    def model(y, s):
        groups.model(y, s)
        pyro.factor("broken", torch.tensor(math.nan))

    pyro.enable_validation(False)
    with pytest.raises(GraphflowsError, match="that of site 'broken' in the model is nan or inf for"):
        sample_posterior(model, groups.guide(), *groups.args, num_draws=10)


def test_subsampled_plates_are_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedModelError, match="'data' is subsampled"):
        sample_posterior(model, guide, torch.zeros(5))


def test_it_cannot_be_changed(groups):
    posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=10)
    with pytest.raises(AttributeError):
        posterior.khat = torch.zeros(())
    with pytest.raises(TypeError):
        posterior.draws["mu"] = torch.zeros(10)


# ------------------------------------------------------------------------------------------------------------- output
def test_summaries(groups):
    posterior = sample_posterior(groups.model, groups.guide(1.2), *groups.args, num_draws=2000, seed=0)
    table = posterior.summary()
    assert list(table.rows)[:3] == ["mu", "theta[0]", "theta[1]"]
    assert len(table) == 13
    row, draws = table["theta[2]"], posterior.draws["theta"][:, 2]
    assert row["mean"] == pytest.approx(draws.mean().item())
    assert row["sd"] == pytest.approx(draws.std().item())
    assert row["95%"] == pytest.approx(draws.quantile(0.95).item())
    assert row["50%"] == pytest.approx(draws.quantile(0.5).item())
    assert row["mcse"] == pytest.approx(draws.std().item() / 2000**0.5)
    assert row["k-hat"] == pytest.approx(posterior.khat.item())
    assert row["ess"] == pytest.approx(posterior.ess.item())
    assert list(posterior.summary(("mu",)).rows) == ["mu"]
    with pytest.raises(
        GraphflowsError, match=r"Expected sites among \['mu', 'theta', 'twice'\]; got \['nu'\]"
    ):
        posterior.summary(("nu",))


def test_summaries_per_datum():
    chain = Chain(num_data=3)
    posterior = sample_posterior(chain.model, chain.guide, *chain.args, num_draws=50)
    table = posterior.summary()
    assert [table[f"z[{n}]"]["ess"] for n in range(3)] == pytest.approx([50.0] * 3)


def test_it_says_what_to_do(groups):
    good = sample_posterior(groups.model, groups.guide(1.5), *groups.args, num_draws=3000, seed=0)
    assert ".reweighted() corrects the draws" in repr(good)
    assert "theta  (6,)" in repr(good)
    assert "Posterior(3000 draws of the guide; joint)" in repr(good)
    exact = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=100)
    assert "reweighted" not in repr(exact)
    few = good.log_weights.clone()
    few[50:] -= 20.0
    assert "Few of the draws count" in repr(replace(good, log_weights=few, ess=torch.tensor(50.0)))


def test_saved_and_read_again(groups, tmp_path):
    path = tmp_path / "folder" / "posterior.pt"
    posterior = sample_posterior(groups.model, groups.guide(1.2), *groups.args, num_draws=100, seed=0)
    posterior.save(path)
    alone = load_posterior(path)
    assert repr(alone) == repr(posterior)
    assert torch.equal(alone.draws["theta"], posterior.draws["theta"])
    assert str(alone.summary()) == str(posterior.summary())
    for use in (alone.predict, alone.loo, alone.log_likelihood, alone.reweighted):
        with pytest.raises(
            GraphflowsError, match=r"which is not in the file: load_posterior\(path, model, guide\)"
        ):
            use()
    whole = load_posterior(path, groups.model, groups.guide(1.2))
    assert torch.equal(whole.predict(seed=1)["y"], posterior.predict(seed=1)["y"])
    assert whole.loo(seed=1).elpd == posterior.loo(seed=1).elpd
    assert torch.equal(whole.reweighted(10, seed=1).draws["mu"], posterior.reweighted(10, seed=1).draws["mu"])


def test_arguments_that_a_file_cannot_hold(groups, tmp_path):
    class Data:
        y = groups.y

    def model(data, s):
        groups.model(data.y, s)

    def guide(data, s):
        groups.guide()(data.y, s)

    path = tmp_path / "posterior.pt"
    posterior = sample_posterior(model, guide, Data(), groups.s, num_draws=20)
    posterior.save(path)
    assert len(load_posterior(path)) == 20
    with pytest.raises(GraphflowsError, match="the arguments of the model, which the file could not hold"):
        load_posterior(path, model, guide)
    again = load_posterior(path, model, guide, Data(), groups.s)
    assert torch.equal(again.predict(seed=1)["y"], posterior.predict(seed=1)["y"])
    torch.save({"a": 1}, path)
    with pytest.raises(GraphflowsError, match=r"Expected a file of Posterior\.save .* it is another"):
        load_posterior(path)
    path.write_text("no posterior")
    with pytest.raises(GraphflowsError, match=r"Expected a file of Posterior\.save .* damaged or another"):
        load_posterior(path)


def test_arviz(groups):
    pytest.importorskip("arviz_base")
    posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=50, seed=0)
    tree = posterior.to_arviz(seed=1)
    assert set(tree.children) == {
        "posterior",
        "observed_data",
        "sample_stats",
        "log_likelihood",
        "posterior_predictive",
    }
    assert tree["posterior"]["theta"].dims == ("chain", "draw", "groups")
    assert tree["posterior"]["theta"].shape == (1, 50, 6)
    assert tree["posterior"]["theta"].values[0].tolist() == posterior.draws["theta"].tolist()
    assert tree["log_likelihood"]["y"].shape == tree["posterior_predictive"]["y"].shape == (1, 50, 6)
    assert tree["observed_data"]["y"].values.tolist() == groups.y.tolist()
    assert tree["sample_stats"]["log_weight"].shape == (1, 50)
    few = posterior.to_arviz(log_likelihood=False, posterior_predictive=False)
    assert set(few.children) == {"posterior", "observed_data", "sample_stats"}


def test_weights_of_many_data_in_single_precision():
    """Log-densities of half a million: in float32 their sums would be off by more than the weights differ."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(y.mean() + 1e-4, 1.1 * len(y) ** -0.5))

    y = torch.randn(200_000)
    double = sample_posterior(model, guide, y, num_draws=400, seed=0)
    torch.set_default_dtype(torch.float32)
    single = sample_posterior(model, guide, y.float(), num_draws=400, seed=0)
    assert single.draws["mu"].dtype == torch.float32
    assert (single.log_weights.mean() - double.log_weights.mean()).abs() < 0.05
    assert single.ess.item() == pytest.approx(double.ess.item(), rel=0.1)
    assert single.khat.isfinite()


def test_models_that_assert_shapes_are_run_draw_by_draw():
    """As Pyro's GaussianHMM does: a batch fails with an AssertionError that says nothing."""

    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        assert scale.dim() == 0
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    y = torch.tensor(1.0)
    guide = auto_faithful_guide(model, y)
    found = guide.posterior(y, num_draws=300, seed=0, progress=False).evidence.log_evidence
    grid = torch.linspace(-8.0, 8.0, 4001)
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(0.0, grid.exp()).log_prob(y)
    assert found == pytest.approx(float(joint.logsumexp(0) + (grid[1] - grid[0]).log()), abs=0.1)


def test_models_that_sum_over_sites_and_mix_draws_are_run_draw_by_draw():
    """The coin of each throw is unknown. In a batch `p[..., z]` has the classes on the right of the draws."""
    y = torch.tensor([1.0, 0.0, 1.0, 1.0])

    def model(y):
        with pyro.plate("coins", 2):
            p = pyro.sample("p", dist.Beta(torch.tensor([1.0, 3.0]), 2.0))
        with pyro.plate("throws", 4):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Bernoulli(p[..., z]), obs=y)

    def beta(a, b):
        return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

    exact = []
    for z in torch.cartesian_prod(*[torch.arange(2)] * 4):
        heads, tails = (torch.stack([each[z == k].sum() for k in range(2)]) for each in (y, 1 - y))
        a, b = torch.tensor([1.0, 3.0]), torch.tensor(2.0)
        exact.append((beta(a + heads, b + tails) - beta(a, b)).sum() - 4 * math.log(2.0))
    guide = auto_faithful_guide(model, y)
    found = guide.posterior(y, num_draws=500, seed=0, progress=False).evidence.log_evidence
    assert found == pytest.approx(float(torch.stack(exact).logsumexp(0)), abs=0.1)
    with pytest.raises(UnsupportedModelError, match="vectorize=False"):
        log_evidence(model, guide, y, num_particles=200, data_plate=False)
