"""Where a guide starts: at the values that a user gives, by regression, or at the prior of its latents."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_graphflows import GraphflowsError
from pyro_graphflows.guides import Flow, Normal, Spline, auto_faithful_guide

FAMILIES = pytest.mark.parametrize(
    "family",
    ["normal", Flow(units_per_variable=3, conditioner_units=3), Flow(form="graphical", units_per_variable=3)],
    ids=["normal", "flow", "graphical"],
)


def gap(model, guide, exact, *args, particles=4000):
    """Return by how many nats the guide's ELBO is below the evidence."""
    loss = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    return loss.loss(model, guide, *args) + float(exact)


# ---------------------------------------------------------------- mid-chain observed sites


def chain(x, y):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen = pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        w = pyro.sample("w", dist.Normal(seen, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def chain_by_data(x, y):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        w = pyro.sample("w", dist.Normal(x, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def chain_of_columns(data, _):
    with pyro.plate("d", len(data)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen = pyro.sample("x", dist.Normal(z, 1.0), obs=data[:, 0])
        w = pyro.sample("w", dist.Normal(seen, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=data[:, 1])


def autoregression(x, y):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen = pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z + seen, 1.0), obs=y)


@FAMILIES
def test_observed_value_used_through_the_return_value(family):
    x, y = torch.randn(20), torch.randn(20)
    guide = auto_faithful_guide(chain, x, y, family=family)
    assert "no regression start" not in guide.describe()
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum() + dist.Normal(x, 2**0.5).log_prob(y).sum()
    assert -1e-3 < gap(chain, guide, exact, x, y) < 0.2  # 20 data; about .01 nats for a regression each


def test_columns_of_one_argument():
    data = torch.randn(20, 2)
    guide = auto_faithful_guide(chain_of_columns, data, None)
    assert "no regression start" not in guide.describe()
    x, y = data.T
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum() + dist.Normal(x, 2**0.5).log_prob(y).sum()
    assert gap(chain_of_columns, guide, exact, data, None) < 0.2


def test_observed_parents_of_observed_sites():
    x, y = torch.randn(20), torch.randn(20)
    guide = auto_faithful_guide(autoregression, x, y)
    joint = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 3.0], [3.0, 6.0]]))
    exact = joint.log_prob(torch.stack([x, y], -1)).sum()
    assert gap(autoregression, guide, exact, x, y) < 0.2


def test_data_used_directly_start_near_the_mode_and_say_so():
    x, y = 100 + torch.randn(20), 100 + torch.randn(20)
    guide = auto_faithful_guide(chain_by_data, x, y)
    assert "use the value that pyro.sample returns" in guide.describe()
    assert "the start is 'mode'" in str(guide.describe(verbose=True))
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum() + dist.Normal(x, 2**0.5).log_prob(y).sum()
    assert gap(chain_by_data, guide, exact, x, y) < 0.2
    guide = auto_faithful_guide(chain_by_data, x, y, init="regression")
    assert "start at their prior" in guide.describe()
    assert "use the value that pyro.sample returns" in guide.describe()
    assert ((guide.median(x, y)["w"] - x).abs() < 0.2).all()  # the prior of w given x


# ---------------------------------------------------------------- factors, constraints, masks and scales


def test_observed_at_a_latent_value():
    """The soft constraint of Pyro's forum: x ~ N(1, .1) and c ~ N(1, .1) observed at x."""

    def model():
        x = pyro.sample("x", dist.Normal(1.0, 0.1))
        pyro.sample("c", dist.Normal(1.0, 0.1), obs=x)

    guide = auto_faithful_guide(model)
    guide.setup()
    assert guide.median()["x"] == pytest.approx(1.0, abs=0.01)
    exact = dist.Normal(0.0, 0.1 * 2**0.5).log_prob(torch.tensor(0.0))
    # at the prior: E[-log p(c | x)] = .5 - log(.1 sqrt(2 pi) ... ) without a KL term
    at_prior = 0.5 + 0.5 * math.log(2 * math.pi) + math.log(0.1) + exact
    assert gap(model, guide, exact) == pytest.approx(float(at_prior), abs=0.05)
    svi = SVI(
        model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=10, vectorize_particles=True)
    )
    for _ in range(300):
        svi.step()
    assert -1e-3 < gap(model, guide, exact) < 0.02


def masked_inside(y):
    with pyro.plate("d", len(y)):
        z = pyro.sample("z", dist.Normal(50.0, 3.0))
        with poutine.mask(mask=~torch.isnan(y)):
            pyro.sample("y", dist.Normal(z, 2.0), obs=torch.nan_to_num(y))


def masked_distribution(y):
    with pyro.plate("d", len(y)):
        z = pyro.sample("z", dist.Normal(50.0, 3.0))
        pyro.sample("y", dist.Normal(z, 2.0).mask(~torch.isnan(y)), obs=torch.nan_to_num(y))


def masked_by_where(y):
    with pyro.plate("d", len(y)):
        z = pyro.sample("z", dist.Normal(50.0, 3.0))
        seen = torch.isfinite(y)
        pyro.factor("likelihood", torch.where(seen, dist.Normal(z, 2.0).log_prob(y.nan_to_num()), 0.0))


def optional_by_mask(y):
    with pyro.plate("d", len(y)):
        z = pyro.sample("z", dist.Normal(50.0, 3.0))
        pyro.sample("y", dist.Normal(z, 2.0), obs=torch.nan_to_num(y), obs_mask=torch.isfinite(y))


@pytest.mark.parametrize("model", [masked_inside, masked_distribution, masked_by_where])
@FAMILIES
def test_missing_data_masked_inside_the_model(model, family):
    y = 50 + 4 * torch.randn(30)
    y[::3] = float("nan")
    seen = ~torch.isnan(y)
    exact = dist.Normal(50.0, 13**0.5).log_prob(y[seen]).sum()
    near = auto_faithful_guide(model, y, family=family)  # starts near the mode
    expected = torch.where(seen, 50 + (y.nan_to_num() - 50) * 9 / 13, 50.0)
    assert ((near.median(y)["z"] - expected).abs() < 0.5).all()
    guide = auto_faithful_guide(model, y, family=family, init="regression")
    assert ((guide.median(y)["z"] - 50).abs() < 1.0).all()  # the prior
    svi = SVI(
        model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=5, vectorize_particles=True)
    )
    before = gap(model, guide, exact, y, particles=500)
    for _ in range(150):
        assert math.isfinite(svi.step(y))
    after = gap(model, guide, exact, y, particles=500)
    assert after < before / 2
    other = 50 + 4 * torch.randn(30)
    other[1::5] = float("nan")  # other entries are missing
    assert guide(other)["z"].isfinite().all()


def test_obs_mask_keeps_the_regression_start():
    y = 50 + 4 * torch.randn(30)
    y[::3] = float("nan")
    guide = auto_faithful_guide(optional_by_mask, y)
    assert "no regression start" not in guide.describe()
    seen = ~torch.isnan(y)
    expected = torch.where(seen, 50 + (y.nan_to_num() - 50) * 9 / 13, 50.0)
    # the regression on z given (value, mask) is linear in both over random masks; it need not be the posterior
    assert (guide.median(y)["z"] - expected).abs().mean() < 1.0


@pytest.mark.parametrize("init", ["auto", "regression"])
def test_scaled_latents(init):
    """The best guide is the prior times the likelihood to the inverse power of the scale."""

    def model(x):
        with pyro.plate("d", len(x)):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Normal(300.0, 20.0))
            pyro.sample("x", dist.Normal(z, 10.0), obs=x)

    x = 300 + 20 * torch.randn(10)
    guide = auto_faithful_guide(model, x, init=init)
    assert "poutine.scale" in guide.describe()
    if init == "regression":  # at the prior
        assert ((guide.median(x)["z"] - 300).abs() < 30).all()
        return
    sd = (20.0**-2 + 2 * 10.0**-2) ** -0.5
    assert ((guide.median(x)["z"] - sd**2 * (300 / 20.0**2 + 2 * x / 10.0**2)).abs() < 0.5).all()
    with torch.no_grad():
        z = torch.stack([guide(x)["z"] for _ in range(1000)])
    assert (z.std(0) / sd - 1).abs().max() < 0.12  # five standard errors


def test_scaling_all_sites_alike_changes_no_start():
    """An ELBO in nats per datum, as many users write it."""
    x, y = torch.randn(20), torch.randn(20)
    guide = auto_faithful_guide(poutine.scale(chain, scale=1 / 20), x, y)
    assert "no regression start" not in guide.describe()
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum() + dist.Normal(x, 2**0.5).log_prob(y).sum()
    assert gap(poutine.scale(chain, scale=1 / 20), guide, exact / 20, x, y) < 0.01


@pytest.mark.parametrize("sd", [0.3, 10.0])
def test_half_observed_regressions_start_at_the_posterior(sd):
    """The elements that are observed count in no density of the unobserved ones: a normal has any width there."""

    def model(x, seen, y):
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        mean = (x * weights.unsqueeze(-2)).sum(-1)
        with pyro.plate("d", len(y)):
            pyro.sample("y", dist.Normal(mean, sd), obs=y, obs_mask=seen)

    x, seen = torch.randn(40, 2), torch.rand(40) > 0.3
    y = x @ torch.tensor([1.0, -2.0]) + sd * torch.randn(40)
    guide = auto_faithful_guide(model, x, seen, y)
    covariance = sd**2 * torch.eye(40) + 9.0 * x @ x.mT
    exact = dist.MultivariateNormal(torch.zeros(int(seen.sum())), covariance[seen][:, seen]).log_prob(y[seen])
    with torch.no_grad():
        loss = sum(Trace_ELBO().loss(model, guide, x, seen, y) for _ in range(500)) / 500
    assert abs(loss + float(exact)) < 0.1


def test_masked_data_of_local_latents_start_near_the_mode():
    def model(seen, y):
        with pyro.plate("d", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            with poutine.mask(mask=seen):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    seen, y = torch.rand(20) > 0.2, 4 * torch.randn(20)
    guide = auto_faithful_guide(model, seen, y)
    exact = dist.Normal(0.0, 5**0.5).log_prob(y)[seen].sum()
    assert gap(model, guide, exact, seen, y) < 0.5 * gap(
        model, auto_faithful_guide(model, seen, y, init="prior"), exact, seen, y
    )


# ---------------------------------------------------------------- values that the user gives


def groups(y):
    s = pyro.sample("s", dist.HalfNormal(5.0))
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("groups", 3, dim=-2):
        t = pyro.sample("t", dist.Normal(m[0], s))
        with pyro.plate("rows", y.shape[-1], dim=-1):
            pyro.sample("y", dist.Normal(t + m[1], 1.0), obs=y)


SMALL = {"units_per_variable": 3, "conditioner_units": 3}


@pytest.mark.parametrize(
    "family",
    [
        "normal",
        "spline",
        Spline(fusion=True),
        Flow(**SMALL),
        Flow(closed_form="density", **SMALL),
        Flow(form="graphical", **SMALL),
        Flow(form="graphical", closed_form="density", **SMALL),
    ],
    ids=["normal", "spline", "fused spline", "flow", "density", "graphical", "graphical density"],
)
def test_init_values(family):
    y = torch.randn(3, 4)
    values = {
        "s": torch.tensor(0.3),
        "m": torch.tensor([1.5, -2.0]),
        "t": torch.tensor([[1.0], [2.0], [4.0]]),
    }
    guide = auto_faithful_guide(groups, y, family=family, init_values=values, num_start_samples=300)
    median = guide.median(y)
    for name, value in values.items():
        torch.testing.assert_close(median[name], value)
        assert f"{name} starts at the value given" in guide.describe(verbose=True)
    draws = guide.quantiles([0.1, 0.9], y)
    width = draws["t"][1] - draws["t"][0]
    assert ((width > 0.1) & (width < 10.0)).all()
    assert math.isfinite(SVI(groups, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(y))


@FAMILIES
def test_init_values_of_amortised_sites(family):
    def model(x):
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    guide = auto_faithful_guide(model, x, family=family, init_values={"z": torch.tensor(2.5)})
    torch.testing.assert_close(guide.median(x)["z"], torch.full((5,), 2.5))
    with pytest.raises(GraphflowsError, match=r"one value of 'z'.*elements of d: it is amortised"):
        auto_faithful_guide(model, x, family=family, init_values={"z": torch.arange(1.0, 6.0)})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"q": torch.zeros(())}, "continuous latent sites, s, m, t; got q"),
        ({"y": torch.zeros(())}, "got y"),
        ({"s": -torch.ones(())}, "'s' in init_values inside its support"),
        ({"m": torch.zeros(3)}, r"'m'.*broadcasts to \(2,\); got \(3,\)"),
        ({"s": 1.0}, "site: tensor.*float for 's'"),
    ],
)
def test_wrong_init_values(values, match):
    with pytest.raises(GraphflowsError, match=match):
        auto_faithful_guide(groups, torch.randn(3, 4), init_values=values, num_start_samples=300)


def test_init_values_need_linear_maps():
    with pytest.raises(GraphflowsError, match="skip=True with init_values"):
        auto_faithful_guide(
            groups,
            torch.randn(3, 4),
            family=Normal(skip=False),
            init="random",
            init_values={"s": torch.ones(())},
        )


def bounded_by_others(x):
    low = pyro.sample("low", dist.Normal(-1.0, 0.5))
    width = pyro.sample("width", dist.HalfNormal(1.0))
    u = pyro.sample("u", dist.Uniform(low, low + width + 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(u, 1.0), obs=x)


def test_sites_whose_bounds_are_latent_start_near_the_posterior():
    """The evidence is -5.815 +- .003, from 200,000 draws of the prior; from a random start the ELBO was -14."""
    x = torch.tensor([0.3, -0.5, 1.2, 0.8])
    guide = auto_faithful_guide(bounded_by_others, x)
    with torch.no_grad():
        losses = torch.tensor([Trace_ELBO().loss(bounded_by_others, guide, x) for _ in range(300)])
    error = 3 * float(losses.std()) / 300**0.5
    assert 5.815 - error < float(losses.mean()) < 6.115 + error
