"""Gradients of the bound on the evidence go along the path of the draws alone: no noise where the guide is exact."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian_guides import chain, collider, four_cycle, set_exact_
from plated_guides import hierarchical, set_hierarchical_
from pyro import poutine
from pyro.infer import JitTrace_ELBO, RenyiELBO, Trace_ELBO

from pyro_graphflows.capture import CAPTURING
from pyro_graphflows.distributions.spline import SplineDistribution
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.guides.conditionals import distributions

NETWORKS = {"chain": chain, "collider": collider, "cycle": four_cycle}
X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def parameters(guide):
    return [parameter for parameter in guide.parameters() if parameter.requires_grad]


def gradient(loss, guide):
    """All gradients of a loss, beside each other."""
    found = torch.autograd.grad(loss, parameters(guide), allow_unused=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in found])


def plain_loss(model, guide, *args):
    """The difference of the log-densities, with all gradients."""
    guide_trace = poutine.trace(guide).get_trace(*args)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    return guide_trace.log_prob_sum() - model_trace.log_prob_sum()


def network_model(network):
    sites = network.pyro_model()._sites

    def model(data):
        values = dict(data)
        for name, terms, intercept, scale, _ in sites:
            loc = torch.as_tensor(
                intercept + sum(c * values[parent] for parent, c in terms), dtype=torch.double
            )
            values[name] = pyro.sample(name, dist.Normal(loc, float(scale)), obs=data.get(name))

    return model


@pytest.mark.parametrize("family", ["normal", "spline"])
@pytest.mark.parametrize("name", NETWORKS)
def test_at_the_posterior_no_draw_moves_a_parameter(name, family):
    network = NETWORKS[name]()
    model, data = network_model(network), {site: torch.tensor(0.3) for site in network.observed}
    guide = set_exact_(auto_faithful_guide(model, data, family=family, init="random"), network)
    assert gradient(Trace_ELBO().differentiable_loss(model, guide, data), guide).abs().max() < 1e-9
    assert (
        gradient(plain_loss(model, guide, data), guide).abs().max() > 0.01
    )  # negative control: it has noise


@pytest.mark.parametrize("family", ["normal", "auto"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_in_plates_and_for_many_particles(vectorize, family):
    guide = auto_faithful_guide(hierarchical, X, family=family, init="random")
    set_hierarchical_(guide, X)
    loss = Trace_ELBO(3, max_plate_nesting=1, vectorize_particles=vectorize)
    assert gradient(loss.differentiable_loss(hierarchical, guide, X), guide).abs().max() < 1e-9
    plain = RenyiELBO(0.5, num_particles=3, max_plate_nesting=1, vectorize_particles=vectorize)
    guide.zero_grad()
    plain.loss_and_grads(hierarchical, guide, X)  # of weights the gradient is the plain one
    assert max(float(p.grad.abs().max()) for p in parameters(guide) if p.grad is not None) > 0.01


def test_amortised_guides_have_the_plain_gradient():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = auto_faithful_guide(model, X)
    pyro.set_rng_seed(0)
    found = gradient(Trace_ELBO().differentiable_loss(model, guide, X), guide)
    pyro.set_rng_seed(0)
    assert torch.allclose(found, gradient(plain_loss(model, guide, X), guide))
    assert found.abs().max() > 0.01


def wide(x):
    """A scale and a location, with a posterior that no member of the family is."""
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    mu = pyro.sample("mu", dist.Cauchy(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, scale))
        pyro.sample("x", dist.StudentT(3.0, z, 0.5), obs=x)


def test_the_mean_is_that_of_the_plain_gradient():
    guide = auto_faithful_guide(wide, X)
    with torch.no_grad():
        for parameter in parameters(guide):
            parameter.add_(0.1 * torch.randn_like(parameter))
    # one direction for all: the gradients' products with it
    direction = torch.cat([torch.randn_like(parameter).flatten() for parameter in parameters(guide)])
    loss = Trace_ELBO()
    found = torch.tensor(
        [
            [
                float(gradient(each, guide) @ direction)
                for each in (loss.differentiable_loss(wide, guide, X), plain_loss(wide, guide, X))
            ]
            for _ in range(600)
        ]
    )
    off = found.mean(0).diff().abs()
    error = found.var(0).sum().sqrt() / math.sqrt(len(found))
    assert off < 5 * error  # beyond that once in a million
    assert found[:, 1].std() > 0


def test_only_what_a_guide_draws_itself_goes_along_its_path():
    guide = auto_faithful_guide(hierarchical, X, init="random")
    with torch.no_grad():
        values = {name: value + 0.1 for name, value in guide(X).items()}
    given = poutine.condition(guide, data=values)
    trace = poutine.trace(given).get_trace(X)
    trace.compute_score_parts()
    of_parts = sum(trace.nodes[name]["score_parts"].entropy_term.sum() for name in values)
    expected = gradient(guide.log_prob(values, X).sum(), guide)
    assert expected.abs().max() > 0.01
    assert torch.allclose(gradient(of_parts, guide), expected)


@pytest.mark.parametrize("family", ["normal", "spline"])
def test_while_a_call_is_captured_gradients_along_the_path_are_by_draws(family, monkeypatch):
    guide = auto_faithful_guide(hierarchical, X, init="random", family=family)
    found = []
    for capturing in (False, True):
        pyro.set_rng_seed(0)
        trace = poutine.trace(guide).get_trace(X)
        token = CAPTURING.set(capturing)
        if capturing:  # no log-density with all gradients
            monkeypatch.setattr(distributions, "along_path", None)
        try:
            trace.compute_score_parts()
        finally:
            CAPTURING.reset(token)
        terms = [site["score_parts"].entropy_term for site in trace.nodes.values() if "score_parts" in site]
        entropy = sum(term.sum() for term in terms if torch.is_tensor(term))  # not of the plate
        found.append((entropy, gradient(entropy, guide)))
    (plain, expected), (by_draws, gradients) = found
    assert torch.allclose(by_draws, plain)
    assert torch.allclose(gradients, expected, atol=1e-6)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize(("base", "df"), [("normal", None), ("student", 5.0), ("logistic", None)])
def test_gradients_of_the_density_of_a_spline_need_no_inversion(base, df):
    loc = torch.randn(4, 2, requires_grad=True)
    scale = (torch.rand(4, 2) + 0.5).requires_grad_()
    knots = torch.randn(4, 2, 23, requires_grad=True)
    q = SplineDistribution(loc, scale, knots, bound=2.0, base=base, df=df)
    value = q.rsample((200,))  # some of it outside of the bound
    noise = q.noise_behind(value).detach()
    assert (noise.abs() > 2.0).any()
    fixed = value.detach().requires_grad_()
    near = q.log_prob_near(noise, fixed)
    again = SplineDistribution(loc, scale, knots, bound=2.0, base=base, df=df).log_prob(fixed)
    assert torch.allclose(near, again)
    found, expected = (torch.autograd.grad(each.sum(), [loc, scale, knots, fixed]) for each in (near, again))
    for mine, right in zip(found, expected, strict=True):
        assert torch.allclose(mine, right, rtol=1e-6, atol=1e-6)
    assert q.noise_behind(value.clone()) is None


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("prior", [partial(dist.Gamma, 2.0), dist.HalfCauchy, dist.Exponential])
def test_traced_losses_have_the_same_gradients(prior):
    def model(y):
        scale = pyro.sample("scale", prior(1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    y = torch.tensor([0.5, -1.2, 0.7])
    guide = auto_faithful_guide(model, y)
    found = []
    for kind in (Trace_ELBO, JitTrace_ELBO):
        loss = kind(ignore_jit_warnings=True) if kind is JitTrace_ELBO else kind()
        for _ in range(2):  # a trace is made in the first
            pyro.set_rng_seed(0)
            guide.zero_grad()
            loss.loss_and_grads(model, guide, y)
        found.append(torch.cat([each.grad.flatten() for each in parameters(guide) if each.grad is not None]))
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0])
