import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_posteriors import Groups, Regression
from pyro.infer.autoguide import AutoNormal

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer import sample_posterior

SIX = 6.0


@pytest.fixture
def regression():
    return Regression()


@pytest.fixture
def groups():
    return Groups()


def check_moments(draws, mean, sd):
    """Means and standard deviations of independent draws within six standard errors."""
    count = len(draws)
    assert ((draws.mean(0) - mean).abs() < SIX * sd / count**0.5).all()
    assert ((draws.std(0) / sd - 1).abs() < SIX / (2 * count) ** 0.5).all()


def test_replicates_and_new_data_of_another_size(regression):
    posterior = sample_posterior(
        regression.model, regression.guide, regression.x, regression.y, num_draws=8000
    )
    mean, cov = regression.posterior()
    again = posterior.predict(seed=1)
    assert set(again) == {"mean", "y"}
    assert again["y"].shape == (8000, 20)
    assert torch.equal(again.returned, again["y"])
    assert repr(again) == "Prediction(mean (8000, 20), y (8000, 20))"
    for x, prediction in ((regression.x, again), (torch.linspace(-2, 5, 3), None)):
        if prediction is None:
            prediction = posterior.predict(x, seed=2)
            assert prediction["y"].shape == (8000, 3)
        design = torch.stack([torch.ones_like(x), x], 1)
        variance = (design @ cov * design).sum(1)
        check_moments(prediction["mean"], design @ mean, variance.sqrt())
        check_moments(prediction["y"], design @ mean, (variance + regression.noise**2).sqrt())
    given = posterior.predict(torch.zeros(2), y=torch.full((2,), 99.0), num_draws=5)
    assert given["y"].max() < 50  # values that are given are not what is predicted
    assert given["y"].shape == (5, 2)


def test_the_seed_decides(regression):
    posterior = sample_posterior(regression.model, regression.guide, regression.x, regression.y, num_draws=20)
    before = torch.get_rng_state()
    assert torch.equal(posterior.predict(seed=1)["y"], posterior.predict(seed=1)["y"])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(posterior.predict(seed=1)["y"], posterior.predict(seed=2)["y"])


def test_new_groups_follow_the_models_conditional(groups):
    """The first six are those fitted; the next two have the predictive distribution of a new group."""
    posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=20_000)
    s = torch.cat([groups.s, torch.tensor([0.5, 2.0])])
    new = posterior.predict(None, s, seed=1)
    loc, scale = groups.mu_given(*groups.args)
    assert torch.equal(new["twice"][:, :6], 2 * posterior.draws["theta"])
    check_moments(new["twice"][:, 6:] / 2, loc, (scale**2 + groups.tau**2).sqrt().expand(2))
    check_moments(new["y"][:, 6:], loc, (scale**2 + groups.tau**2 + s[6:] ** 2).sqrt())
    cov = groups.joint_cov(groups.s).diagonal()
    mean = groups.theta_given(loc, *groups.args)[0]
    check_moments(new["y"][:, :6], mean, (cov + groups.s**2).sqrt())
    # the shared latent makes new groups alike
    pair = torch.cov(new["twice"][:, 6:].T / 2)
    assert pair[0, 1] == pytest.approx(scale.item() ** 2, abs=SIX * (scale.item() ** 2 + 2.25) / 20_000**0.5)


def test_plates_whose_elements_are_all_new(groups):
    posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=20_000)
    loc, scale = groups.mu_given(*groups.args)
    for count in (2, 6, 9):
        new = posterior.predict(None, torch.ones(count), new_plates=("groups",), seed=1)
        check_moments(new["y"], loc, (scale**2 + groups.tau**2 + 1).sqrt().expand(count))


def test_fewer_elements_are_asked_about(groups):
    posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=20)
    with pytest.raises(
        GraphflowsError, match=r"at least the 6 elements of the plate 'groups'.*got 2\. Name the plate"
    ):
        posterior.predict(None, torch.ones(2))
    with pytest.raises(
        GraphflowsError, match=r"Expected new_plates among the plates \['groups'\]; got \['group'\]"
    ):
        posterior.predict(new_plates=("group",))


def test_groups_by_index_and_elements_in_two_plates():
    """y[i] of group g[i], and an effect of each pair in a second plate: plates grow along both dimensions."""

    def model(rows, columns, g):
        with pyro.plate("columns", columns, dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with pyro.plate("rows", rows, dim=-2):
                b = pyro.sample("b", dist.Normal(a[..., 0], 0.1))
        with pyro.plate("data", len(g), dim=-1):
            pyro.sample("y", dist.Normal(b[..., 0, :][..., g], 0.1), obs=torch.zeros(len(g)))
        return {"b": b, "size": columns, "pair": (a, 3)}

    g = torch.tensor([0, 1, 1])
    guide = AutoNormal(model)
    posterior = sample_posterior(model, guide, 2, 2, g, num_draws=50, seed=0)
    assert posterior.draws["a"].shape == (50, 2, 2)
    new = posterior.predict(3, 4, torch.tensor([0, 3, 2, 3]), seed=1)
    assert new["y"].shape == (50, 4)
    b, (a, three), size = new.returned["b"], new.returned["pair"], new.returned["size"]
    assert (b.shape, a.shape, size, three) == ((50, 3, 4), (50, 4, 2), 4, 3)
    assert torch.equal(b[:, :2, :2], posterior.draws["b"])
    assert torch.equal(a[:, :2], posterior.draws["a"])
    assert not torch.equal(a[:, 2:], posterior.draws["a"])
    assert (b[:, 2] - a[..., 0]).abs().max() < 0.6  # a new row of the model's conditional, given the columns


def test_models_that_mix_draws_are_run_one_by_one(groups):
    """What it returns is a sum over all dimensions: in a batch that of all draws."""

    def model(y, s):
        groups.model(y, s)
        return pyro.sample("extra", dist.Normal(0.0, 1.0)).sum()

    def guide(y, s):
        groups.guide()(y, s)
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    posterior = sample_posterior(model, guide, *groups.args, num_draws=30)
    prediction = posterior.predict(seed=1)
    assert torch.equal(prediction.returned, posterior.draws["extra"])
    assert prediction["y"].shape == (30, 6)


def test_other_shapes_than_those_fitted():
    def model(size, y, deep=False):
        z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        if deep:
            with pyro.plate("extra", 2):
                pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    posterior = sample_posterior(model, AutoNormal(model), 3, torch.tensor(1.0), num_draws=20)
    assert posterior.predict(3, None)["y"].shape == (20,)
    with pytest.raises(GraphflowsError, match=r"'z' to have draws of shape \(3,\).*have \(4,\). Only plates"):
        posterior.predict(4, None)

    pyro.clear_param_store()

    def plated(y, inside=True):
        with pyro.plate("a" if inside else "b", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    posterior = sample_posterior(plated, AutoNormal(plated), torch.zeros(2), num_draws=20)
    with pytest.raises(GraphflowsError, match=r"'z' in the plates \['a'\].*has it in \['b'\]"):
        posterior.predict(None, inside=False)
    assert posterior.predict()["y"].shape == (20, 2)


def test_factors_are_not_predicted(groups):
    def model(y, s):
        groups.model(y, s)
        pyro.factor("penalty", torch.tensor(-1.0))

    posterior = sample_posterior(model, groups.guide(), *groups.args, num_draws=20)
    assert set(posterior.predict()) == {"twice", "y"}
    assert set(posterior.observed) == {"y"}


def test_more_draws_than_there_are(groups):
    posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=20)
    with pytest.raises(GraphflowsError, match="at most the 20 draws that there are; got 21"):
        posterior.predict(num_draws=21)


def test_training_mode_is_put_back_and_not_used():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.9)

        def forward(self, y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("kept", self.dropout(torch.ones(100)).mean() + 0 * z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    model = Model()
    posterior = sample_posterior(model, AutoNormal(model), torch.tensor(0.0), num_draws=20)
    assert (posterior.draws["kept"] == 1).all()
    assert (posterior.predict()["kept"] == 1).all()
    assert model.training
