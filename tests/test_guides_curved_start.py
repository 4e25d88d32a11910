"""Starts beyond a regression, on models of local numbers whose evidence is known by quadrature."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import biject_to
from training_paths import check_losses, expected_loss, training

from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.guides import Normal, curved_start
from pyro_graphflows.guides.minimize import loss_and_gradient


def gamma():
    return dist.Gamma(2.0, 1.0)


def precise(t):
    return dist.Normal(t, 0.1)


MODELS = {  # prior, data of a number, and how many of them
    "positive, precise data": (gamma, precise, ()),
    "positive, two data": (gamma, precise, (2,)),
    "heavy tails": (lambda: dist.StudentT(3.0, 0.0, 1.0), precise, ()),
    "between 0 and 1": (lambda: dist.Beta(2.0, 2.0), lambda t: dist.Normal(t, 0.02), ()),
    "exponential link": (lambda: dist.Normal(0.0, 1.0), lambda t: dist.Normal(t.exp(), 0.1), ()),
    "counts": (lambda: dist.Normal(1.0, 2.0), lambda t: dist.Poisson(t.exp()), ()),
}


def model_of(prior, likelihood, shape):
    def model(y):
        with pyro.plate("n", len(y)):
            t = pyro.sample("t", prior())
            data = likelihood(t.reshape(*t.shape, *(1 for _ in shape))).expand([*t.shape, *shape])
            pyro.sample("y", data.to_event(len(shape)), obs=y)

    return model


def simulated(prior, likelihood, shape, number):
    t = prior().sample((number,))
    return likelihood(t.reshape(-1, *(1 for _ in shape))).expand([number, *shape]).sample()


def log_evidence(prior, likelihood, shape, y):
    """Return the sum of the evidences of the elements, by the trapezoidal rule in the unconstrained number."""
    to_support = biject_to(prior().support)
    u = torch.linspace(-12.0, 12.0, 24_001)
    t = to_support(u)
    log_prior = prior().log_prob(t) + to_support.log_abs_det_jacobian(u, t)
    data = y.reshape(len(y), -1, 1)
    return float((log_prior + likelihood(t).log_prob(data).sum(1)).logsumexp(-1).sum()) + len(y) * math.log(
        float(u[1] - u[0])
    )


@pytest.mark.parametrize("name", MODELS)
def test_locations_and_scales_start_as_curved_as_they_are(name):
    """A normal is near these posteriors, a regression is not: it is 4 to 70 nats an element off."""
    parts = MODELS[name]
    model, number = model_of(*parts), 20
    guide = auto_faithful_guide(model, simulated(*parts, number))
    assert "'regression'" in str(guide.describe(verbose=True))
    others = simulated(*parts, 5 * number)
    assert expected_loss(model, guide, (others,))[0] + log_evidence(*parts, others) < 0.15 * len(others)


def test_a_conjugate_start_is_better_than_the_regression():
    def model(y):
        with pyro.plate("n", len(y)):
            t = pyro.sample("t", dist.Gamma(2.0, 1.0))
            pyro.sample("y", dist.Poisson(t), obs=y)

    y = dist.GammaPoisson(2.0, 1.0).sample((50,))
    exact = float(dist.GammaPoisson(2.0, 1.0).log_prob(y).sum())
    straight, curved = (
        expected_loss(model, auto_faithful_guide(model, y, family=Normal(hidden_dims=dims)), (y,))[0] + exact
        for dims in ([], None)
    )
    assert 0 < curved < 0.6 * straight


def test_several_sites_with_data_that_none_of_them_sees_alone_start_curved():
    """Means and standard deviations of four data each; the posterior is known by quadrature in two numbers."""

    def model(y):
        with pyro.plate("n", len(y)):
            m = pyro.sample("m", dist.Gamma(2.0, 1.0))
            s = pyro.sample("s", dist.LogNormal(-1.0, 0.5))
            mean = m.unsqueeze(-1) * torch.ones(4)
            pyro.sample("y", dist.Normal(mean, s.unsqueeze(-1)).to_event(1), obs=y)

    def data(number):
        m, s = dist.Gamma(2.0, 1.0).sample((number, 1)), dist.LogNormal(-1.0, 0.5).sample((number, 1))
        return m + s * torch.randn(number, 4)

    guide, y = auto_faithful_guide(model, data(10)), data(20)
    u, v = torch.linspace(-9.0, 3.0, 1201), torch.linspace(-4.0, 2.0, 301)
    m, s = u.exp().unsqueeze(-1), v.exp()
    prior = (dist.Gamma(2.0, 1.0).log_prob(m) + u.unsqueeze(-1)) + dist.Normal(-1.0, 0.5).log_prob(v)
    log_joint = prior + sum(dist.Normal(m, s).log_prob(each.reshape(-1, 1, 1)) for each in y.unbind(-1))
    step = float(u[1] - u[0]) * float(v[1] - v[0])
    exact = float(log_joint.flatten(1).logsumexp(-1).sum()) + len(y) * math.log(step)
    assert expected_loss(model, guide, (y,))[0] + exact < 0.3 * len(y)  # of regressions 15 nats an element


def test_where_a_regression_is_exact_the_hidden_layers_stay_out():
    def model(y):
        with pyro.plate("n", len(y)):
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(t, 0.1), obs=y)

    guide = auto_faithful_guide(model, torch.randn(10))
    (block,) = guide.blocks
    assert not block.conditionals.network.layers[-1].weight.any()
    y = 3.0 * torch.randn(10)
    exact = float(dist.Normal(0.0, 1.01**0.5).log_prob(y).sum())
    assert expected_loss(model, guide, (y,))[0] + exact < 0.01 * len(y)


def test_the_seed_of_set_up_decides():
    model, y = model_of(*MODELS["counts"]), torch.ones(3)
    first, second, other = (auto_faithful_guide(model, y, setup_seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("family", ["normal", "spline"])
def test_a_recorded_loss_gives_the_same_start(family, monkeypatch):
    def start():
        return auto_faithful_guide(model, torch.ones(3), family=family).state_dict()

    model, calls = model_of(*MODELS["positive, precise data"]), []

    def counted(objective, point):
        calls.append(None)
        return partial(loss_and_gradient, objective)

    recorded = start()
    monkeypatch.setattr(curved_start, "recorded_gradients", counted)
    evaluated = start()
    assert calls
    for name, value in recorded.items():
        torch.testing.assert_close(value, evaluated[name], rtol=1e-6, atol=1e-6)


def test_what_a_linear_map_replaces_has_no_hidden_part():
    parts = MODELS["counts"]
    guide = auto_faithful_guide(model_of(*parts), simulated(*parts, 10))
    y = torch.tensor([0.0, 3.0, 40.0])
    guide.set_linear_("t", {}, torch.zeros(1), torch.ones(1, 1))
    assert torch.allclose(guide.median(y)["t"], torch.zeros(3))


@pytest.mark.parametrize("lr", [pytest.param(1e-3, marks=pytest.mark.slow), 1e-2])
def test_training_keeps_a_curved_start(lr):
    torch.set_default_dtype(torch.float32)
    parts = MODELS["positive, precise data"]
    model, y = model_of(*parts), simulated(*parts, 20)
    exact = log_evidence(*parts, y.double())
    guide = auto_faithful_guide(model, y)
    loss = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    steps = training(model, guide, (y,), lr, loss)
    check_losses(steps, lambda: expected_loss(model, guide, (y,), repeats=2)[0] + exact, 2.0)
