"""Pyro's handlers around a model, and its losses: right, or refused by check_guide."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from pyro.infer.reparam import ProjectedNormalReparam

from pyro_graphflows import UnsupportedModelError
from pyro_graphflows.guides import auto_faithful_guide, check_guide
from pyro_graphflows.infer import IWAE_ELBO

MANY = {"num_particles": 2000, "vectorize_particles": True, "max_plate_nesting": 1}


def loss_of(loss, model, guide, *args):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to verify mean field")
        return loss.loss(model, guide, *args)


# ---------------------------------------------------------------- Delta latents


def global_delta(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    d = pyro.sample("d", dist.Delta(2 * m))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(d, 1.0), obs=x)


def local_delta(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        d = pyro.sample("d", dist.Delta(2 * z, event_dim=1))
        pyro.sample("x", dist.Normal(d.sum(-1), 1.0), obs=x)


def delta_of_covariates(x, w=torch.arange(4.0)):  # noqa: B008
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        d = pyro.sample("d", dist.Delta(z + w.to(z)))
        pyro.sample("x", dist.Normal(d, 1.0), obs=x)


def delta_before_a_site(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        d = pyro.sample("d", dist.Delta(z))
        u = pyro.sample("u", dist.Normal(d, 1.0))
        pyro.sample("x", dist.Normal(u, 1.0), obs=x)


X = torch.tensor([0.3, -1.0, 0.7, 1.9], dtype=torch.float64)
EXACT = {
    global_delta: lambda: dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 4.0).log_prob(X),
    local_delta: lambda: dist.Normal(0.0, 9.0**0.5).log_prob(X).sum(),
    delta_of_covariates: lambda: dist.Normal(torch.arange(4.0), 2.0**0.5).log_prob(X).sum(),
    delta_before_a_site: lambda: dist.Normal(0.0, 3.0**0.5).log_prob(X).sum(),
}
LOSSES = {
    "Trace_ELBO": lambda: Trace_ELBO(**MANY),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(**MANY),
    "TraceGraph_ELBO": lambda: TraceGraph_ELBO(num_particles=200),
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(num_particles=200),
    "RenyiELBO": lambda: RenyiELBO(**MANY),
    "IWAE_ELBO": lambda: IWAE_ELBO(50),
    "IWAE_ELBO, dreg": lambda: IWAE_ELBO(50, gradient="dreg"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("model", [local_delta, delta_of_covariates, delta_before_a_site])
@pytest.mark.filterwarnings("ignore:Failed to verify mean field")
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_delta_latents_in_plates(model, name):
    guide = auto_faithful_guide(model, X)
    loss = LOSSES[name]()
    check = check_guide(model, guide, loss, X)
    assert check.safe, check
    assert abs(loss.loss(model, guide, X) + EXACT[model]()) < 0.15  # the start is the posterior but for .05
    assert SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), LOSSES[name]()).step(X) < 20


@pytest.mark.parametrize("name", ["Trace_ELBO", "TraceMeanField_ELBO"])
def test_a_delta_of_a_global_latent(name):
    guide = auto_faithful_guide(global_delta, X)
    variance = 1 / (1 + 16.0)
    guide.set_linear_("m", {}, variance * 2 * X.sum(), variance**0.5)
    assert abs(loss_of(LOSSES[name](), global_delta, guide, X) + EXACT[global_delta]()) < 0.15
    assert check_guide(global_delta, guide, LOSSES[name](), X).safe


def test_parameters_inside_a_delta_are_trained_alike():
    """Gradients of a parameter of the model that only a Delta holds, against the model without one."""

    def model(x, delta=True):
        theta = pyro.param("theta", torch.tensor(1.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            d = pyro.sample("d", dist.Delta(theta * z)) if delta else theta * z
            pyro.sample("x", dist.Normal(d, 1.0), obs=x)

    guide = auto_faithful_guide(model, X)
    for make in (lambda: Trace_ELBO(**MANY), lambda: IWAE_ELBO(50), lambda: IWAE_ELBO(50, gradient="dreg")):
        found = []
        for delta in (True, False):
            pyro.set_rng_seed(1)
            loss = make()
            loss.loss(model, guide, X, delta)
            pyro.set_rng_seed(2)
            (gradient,) = torch.autograd.grad(
                loss.differentiable_loss(model, guide, X, delta), pyro.get_param_store()._params["theta"]
            )
            found.append(gradient)
        torch.testing.assert_close(found[0], found[1])


def test_a_delta_that_the_guide_cannot_repeat():
    """Drawn for some rows and used for others it would be wrong: the model computes it, and one loss cannot do that."""

    def model(x, w):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(w)):
            d = pyro.sample("d", dist.Delta(a * w))
            pyro.sample("x", dist.Normal(d, 1.0), obs=x)

    w = torch.ones(4)
    guide = auto_faithful_guide(model, X, w)
    assert check_guide(model, guide, Trace_ELBO, X, w).safe
    check = check_guide(model, guide, TraceMeanField_ELBO, X, w)
    assert not check.safe
    assert "'d'" in str(check)
    assert "KeyError" in str(check)
    posterior = Predictive(guide, num_samples=5)(X, w)
    again = Predictive(model, posterior_samples=posterior)(None, 3 * torch.ones(4))
    torch.testing.assert_close(again["d"], 3 * posterior["a"].reshape(5, 1).expand(5, 4))


# ---------------------------------------------------------------- other losses


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_tail_adaptive():
    guide = auto_faithful_guide(local, X)
    check = check_guide(local, guide, TraceTailAdaptive_ELBO(num_particles=10, vectorize_particles=True), X)
    assert check.safe
    assert "infinity" in str(check)
    check = check_guide(local, guide, TraceTailAdaptive_ELBO(num_particles=10), X)
    assert "vectorize_particles=True" in str(check)
    guide.set_linear_("z", {}, 0.0, 1.0)
    loss = TraceTailAdaptive_ELBO(num_particles=20, vectorize_particles=True)
    svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.02}), loss)
    before = Trace_ELBO(**MANY).loss(local, guide, X)
    for _ in range(200):
        svi.step(X)
    assert Trace_ELBO(**MANY).loss(local, guide, X) < before - 0.3


def test_tail_adaptive_refused():
    def discrete(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x[index])

    guide = auto_faithful_guide(discrete, X)
    text = str(check_guide(discrete, guide, TraceTailAdaptive_ELBO, X))
    assert "Not safe" in text
    assert "no score-function gradient for 'k'" in text
    assert "'data' is subsampled" in text


def test_wake_sleep_with_one_site_is_right_and_with_a_chain_refused():
    guide = auto_faithful_guide(local, X)
    assert check_guide(local, guide, ReweightedWakeSleep, X).safe
    guide = auto_faithful_guide(delta_before_a_site, X)
    assert not check_guide(delta_before_a_site, guide, ReweightedWakeSleep, X).safe


def test_the_warning_about_orders_is_explained():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    guide = auto_faithful_guide(model, X, inverse=["a", "b"])  # b is sampled first
    with pytest.warns(UserWarning, match="Failed to verify mean field restriction"):
        TraceMeanField_ELBO().loss(model, guide, X)
    check = check_guide(model, guide, TraceMeanField_ELBO, X)
    assert check.safe
    assert "Failed to verify mean field restriction" in str(check)
    assert "The value is right" in str(check)
    same = auto_faithful_guide(model, X, inverse="reverse")
    assert "Failed to verify" not in str(check_guide(model, same, TraceMeanField_ELBO, X))


def test_a_list_of_guides():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    guide = AutoGuideList(model)
    guide.append(auto_faithful_guide(poutine.block(model, expose=["a"])))
    guide.append(AutoDelta(poutine.block(model, expose=["b"])))
    guide(X)
    assert check_guide(model, guide, Trace_ELBO, X).safe
    assert not check_guide(model, guide, TraceMeanField_ELBO, X).safe


# ---------------------------------------------------------------- condition, do, lift, reparam


def line(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(a + x, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


Y = torch.tensor([0.1, 0.2, -0.4, 1.0], dtype=torch.float64)


def test_a_conditioned_model():
    model = poutine.condition(line, data={"a": torch.tensor(0.5)})
    guide = auto_faithful_guide(model, X, Y)
    assert guide.plan.graph.latent == ("z",)
    exact = dist.Normal(0.5 + X, 2**0.5).log_prob(Y).sum() + dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5))
    assert abs(Trace_ELBO(**MANY).loss(model, guide, X, Y) + exact) < 0.15


def test_data_by_condition():
    model = poutine.condition(line, data={"y": Y, "a": torch.tensor(0.5)})
    guide = auto_faithful_guide(model, X)
    exact = dist.Normal(0.5 + X, 2**0.5).log_prob(Y).sum() + dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5))
    assert abs(Trace_ELBO(**MANY).loss(model, guide, X) + exact) < 0.15


def test_an_intervention():
    model = poutine.do(line, data={"a": torch.tensor(0.5)})
    guide = auto_faithful_guide(model, X, Y)
    exact = dist.Normal(0.5 + X, 2**0.5).log_prob(Y).sum()
    assert "z" in guide.plan.graph.latent
    assert abs(Trace_ELBO(**MANY).loss(model, guide, X, Y) + exact) < 0.15


def test_lifted_parameters_are_latents():
    def with_parameter(x):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    model = poutine.lift(with_parameter, prior={"m": dist.Normal(0.0, 1.0)})
    guide = auto_faithful_guide(model, X)
    assert guide.plan.graph.latent == ("m",)
    guide.set_linear_("m", {}, X.sum() / 5, (1 / 5) ** 0.5)
    exact = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1.0).log_prob(X)
    assert Trace_ELBO().loss(model, guide, X) == pytest.approx(-float(exact))


def test_directions_name_the_reparametriser_and_work_with_it():
    def model(y):
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.ProjectedNormal(torch.tensor([1.0, 0.0])))
            pyro.sample("y", dist.Normal(u[..., 0], 0.5), obs=y)

    with pytest.raises(UnsupportedModelError, match=r"'u'.*ProjectedNormalReparam"):
        auto_faithful_guide(model, Y)
    other = poutine.reparam(model, config={"u": ProjectedNormalReparam()})
    guide = auto_faithful_guide(other, Y)
    svi = SVI(other, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.isfinite(torch.tensor(svi.step(Y))) for _ in range(5))


# ---------------------------------------------------------------- supports that depend on latents


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_auto_follows_bounds(family):
    def model(x):
        with pyro.plate("d", len(x)):
            a = pyro.sample("a", dist.HalfNormal(1.5))
            b = pyro.sample("b", dist.Uniform(0.0, a + 0.1))
            pyro.sample("x", dist.Normal(b, 0.3), obs=x)

    x = torch.rand(3)
    guide = auto_faithful_guide(model, x, family=family)
    assert guide.inverse.sampling_order == ("a", "b")
    drawn = guide(x)
    assert (drawn["b"] < drawn["a"] + 0.1).all()


def test_auto_follows_bounds_across_levels_and_elements():
    def model(x):
        top = pyro.sample("top", dist.HalfNormal(2.0))
        with pyro.plate("d", len(x)):
            low = pyro.sample("low", dist.Uniform(-1.0, top))
            width = pyro.sample("width", dist.Exponential(1.0))
            both = pyro.sample("both", dist.Uniform(low, low + width + 0.1))
            pyro.sample("x", dist.Normal(both, 0.3), obs=x)

    x = torch.rand(3)
    for resolution in ("site", "element"):
        guide = auto_faithful_guide(model, x, resolution=resolution)
        order = guide.plan.inverse.sampling_order
        assert order.index("top") < order.index("low") < order.index("both")
        assert order.index("width") < order.index("both")
        drawn = guide(x)
        assert ((drawn["both"] > drawn["low"]) & (drawn["both"] < drawn["low"] + drawn["width"] + 0.1)).all()


def test_a_bound_through_a_delta():
    def model(x):
        with pyro.plate("d", len(x)):
            a = pyro.sample("a", dist.HalfNormal(1.5))
            top = pyro.sample("top", dist.Delta(a + 0.1))
            b = pyro.sample("b", dist.Uniform(0.0, top))
            pyro.sample("x", dist.Normal(b, 0.3), obs=x)

    x = torch.rand(3)
    guide = auto_faithful_guide(model, x)
    assert guide.plan.changing == {"b": ("a",)}
    drawn = guide(x)
    assert (drawn["b"] < drawn["a"] + 0.1).all()


@pytest.mark.filterwarnings("ignore:The `random_module` primitive is deprecated")
def test_random_modules():
    """Pyro compares parameters with those of its store by identity, which reads no value."""
    network = torch.nn.Linear(1, 1)
    priors = {
        "weight": dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2),
        "bias": dist.Normal(0.0, 1.0).expand([1]).to_event(1),
    }

    def model(x, y):
        lifted = pyro.random_module("network", network, priors)()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(lifted(x[:, None]).squeeze(-1), 0.5), obs=y)

    x = torch.linspace(-1, 1, 5)
    guide = auto_faithful_guide(model, x, x, num_start_samples=100)
    assert set(guide(x, x)) == {"network$$$weight", "network$$$bias"}
