"""Conditionals that are the model's own distribution of a site times a factor: exact where they should be."""

import copy
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from pyro_graphflows import InverseGraph, auto_faithful_guide, load_guide
from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides import Auto, Flow, Normal, Spline
from pyro_graphflows.infer import IWAE_ELBO, InferenceCompilation

FUSED = Normal(fusion="auto")
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def schools(y, sigma):
    log_tau = pyro.sample("log_tau", dist.Normal(0.0, 0.5))
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, log_tau.exp()))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def half_cauchy_schools(y, sigma):
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("d", 9):
        pyro.sample("z", dist.Normal(0.0, (v / 2).exp()))


def guide_of(model, *args, family=FUSED, **options):
    options = {"init": "regression", "num_start_samples": 2000, **options}
    return auto_faithful_guide(model, *args, family=family, **options)


def log_q(guide, latents, *args):
    return guide.log_prob(latents, *args)


def draws(guide, *args, number=500, depth=1):
    with torch.no_grad(), pyro.plate("draws", number, dim=-1 - depth):
        return poutine.trace(guide).get_trace(*args)


# ---------------------------------------------------------------- exact


def test_conditionals_of_a_conjugate_hierarchy_are_exact_at_every_hyperparameter_value():
    """theta given mu, tau and y is normal with the precision of the prior plus that of the datum."""
    guide = guide_of(schools, Y, SIGMA)
    assert "fused" in guide.describe().split("theta | ")[1].splitlines()[0]
    guide.set_fused_("theta", {"y": 1.0}, 0.0, 10.0)
    other = {"mu": torch.tensor(3.0), "theta": torch.linspace(-4.0, 9.0, 8)}
    for log_tau in (-30.0, -3.0, 0.0, 2.0, 12.0):
        latents = {"log_tau": torch.tensor(log_tau), **other}
        trace = poutine.trace(poutine.condition(guide, data=latents)).get_trace(Y, SIGMA)
        got = trace.nodes["theta"]["fn"]
        precision = math.exp(-2 * log_tau) + 0.01
        mean = (3.0 * math.exp(-2 * log_tau) + 0.01 * Y) / precision
        assert torch.allclose(got.mean, mean, atol=1e-9)
        exact = dist.Normal(mean, precision**-0.5).log_prob(latents["theta"])
        assert torch.allclose(got.log_prob(latents["theta"]), exact, rtol=1e-9)


def test_the_start_finds_the_exact_factor_of_a_conjugate_hierarchy():
    """One scale of the data: the fit of 2,000 samples is exact up to its sampling error, at scales far apart too."""
    y, sigma = Y / 10, torch.full((8,), 1.0)
    guide = guide_of(schools, y, sigma)
    for log_tau in (-2.0, 0.0, 2.0):
        latents = {"log_tau": torch.tensor(log_tau), "mu": torch.tensor(1.0), "theta": torch.zeros(8)}
        got = poutine.trace(poutine.condition(guide, data=latents)).get_trace(y, sigma).nodes["theta"]["fn"]
        precision = math.exp(-2 * log_tau) + 1.0
        mean = (math.exp(-2 * log_tau) + y) / precision
        assert torch.allclose(got.mean, mean, atol=0.25 * precision**-0.5)


@pytest.mark.parametrize("family", [FUSED, Spline(fusion="auto")])
def test_a_funnel_without_data_is_exact_at_the_start(family):
    guide = guide_of(funnel, family=family).setup()
    guide_trace = draws(guide)
    with torch.no_grad(), pyro.plate("draws", 500, dim=-2):
        model_trace = poutine.trace(poutine.replay(funnel, trace=guide_trace)).get_trace()
    assert float((model_trace.log_prob_sum() - guide_trace.log_prob_sum()).abs()) / 500 < 1e-3


def test_linear_gaussian_models_start_at_their_exact_posterior():
    """KL(q || p) of a start by regression is about weights / (2 samples) nats, fused or not."""

    def model(x):
        a = pyro.sample("a", dist.Normal(1.0, 2.0))
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Normal(0.5 * b, 0.7))
            pyro.sample("x", dist.Normal(b + c, 0.5), obs=x)
        return a

    x = torch.linspace(-2.0, 2.0, 5)
    exact = dist.Normal(0.0, math.sqrt(2.25 + 0.49 + 0.25)).log_prob(x).sum()
    guide = auto_faithful_guide(model, x, family=Normal(fusion=True), inverse="reverse")
    assert set(guide.plan.priors.sites) == {"a", "b", "c"}
    with torch.no_grad():
        loss = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1).loss(
            model, guide, x
        )
    assert abs(loss + float(exact)) < 0.02


def state_space(y):
    z = pyro.sample("z0", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    for t, own in enumerate(y):
        z = pyro.sample(f"z{t + 1}", dist.MultivariateNormal(z @ TURN.T, scale_tril=STEP))
        pyro.sample(f"y{t + 1}", dist.Normal(z.sum(-1), 0.5), obs=own)


TURN = torch.tensor([[0.8, 0.3], [-0.3, 0.8]], dtype=torch.float64)
STEP = torch.tensor([[0.5, 0.0], [0.2, 0.4]], dtype=torch.float64)


def _state_space_evidence(y):
    """By the joint normal of the data."""
    n = len(y)
    mean, covariance = torch.zeros(2), torch.eye(2)
    total = torch.zeros(())
    for own in y:
        mean, covariance = TURN @ mean, TURN @ covariance @ TURN.T + STEP @ STEP.T
        one = torch.ones(2)
        scale = (one @ covariance @ one + 0.25).sqrt()
        total = total + dist.Normal(mean.sum(), scale).log_prob(own)
        gain = covariance @ one / scale**2
        mean, covariance = mean + gain * (own - mean.sum()), covariance - torch.outer(gain, one @ covariance)
    assert n
    return float(total)


@pytest.mark.parametrize("length", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_state_spaces_with_two_numbers_a_step(length):
    torch.manual_seed(3)
    y = torch.randn(length)
    guide = auto_faithful_guide(state_space, y, family=Normal(fusion=True), inverse="reverse")
    assert len(guide.plan.priors.sites) == length + 1
    with torch.no_grad():
        loss = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=0).loss(
            state_space, guide, y
        )
    assert -0.05 < loss + _state_space_evidence(y) < 0.02 * length


def gaussian_process(x, y):
    log_length = pyro.sample("log_length", dist.Normal(0.0, 0.5))
    gaps = (x.unsqueeze(-1) - x).square()
    kernel = torch.exp(-0.5 * gaps * torch.exp(-2 * log_length)[..., None, None]) + 1e-6 * torch.eye(len(x))
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x)), kernel))
    pyro.sample("y", dist.Normal(f, 0.3).to_event(1), obs=y)


def test_a_gaussian_process_is_exact_given_its_length_scale():
    x = torch.linspace(0.0, 3.0, 6)
    y = torch.sin(2 * x)
    guide = guide_of(gaussian_process, x, y, inverse="reverse")
    guide.set_fused_("f", {"y": torch.eye(6)}, 0.0, 0.3)
    for log_length in (-1.0, 0.3, 1.2):
        latents = {"log_length": torch.tensor(log_length), "f": torch.zeros(6)}
        got = poutine.trace(poutine.condition(guide, data=latents)).get_trace(x, y).nodes["f"]["fn"]
        kernel = torch.exp(-0.5 * (x[:, None] - x).square() * math.exp(-2 * log_length)) + 1e-6 * torch.eye(6)
        gain = kernel @ torch.linalg.inv(kernel + 0.09 * torch.eye(6))
        exact = dist.MultivariateNormal(gain @ y, kernel - gain @ kernel + 1e-10 * torch.eye(6))
        f = exact.sample()
        assert got.log_prob(f).item() == pytest.approx(exact.log_prob(f).item(), abs=1e-3)


# ---------------------------------------------------------------- densities


MODELS = {"schools": schools, "half-Cauchy": half_cauchy_schools}


@pytest.mark.parametrize("family", [FUSED, Spline(fusion="auto")], ids=["normal", "spline"])
@pytest.mark.parametrize("name", MODELS)
def test_the_density_of_the_same_values_is_the_same_twice(name, family):
    guide = guide_of(MODELS[name], Y, SIGMA, family=family)
    latents = {name: value.detach() for name, value in guide(Y, SIGMA).items()}
    assert torch.equal(log_q(guide, latents, Y, SIGMA), log_q(guide, latents, Y, SIGMA))
    drawn = poutine.trace(guide).get_trace(Y, SIGMA)
    again = poutine.trace(poutine.replay(guide, trace=drawn)).get_trace(Y, SIGMA)
    assert drawn.log_prob_sum().item() == pytest.approx(again.log_prob_sum().item(), abs=1e-8)


@pytest.mark.parametrize(
    "prior",
    [
        dist.HalfCauchy(5.0),
        dist.Uniform(1.0, 3.0),
        dist.Gamma(0.7, 2.0),
        dist.Beta(2.0, 3.0),
        dist.StudentT(3.0, 1.0, 2.0),
        dist.Exponential(0.1),
        dist.LogNormal(1.0, 2.0),
    ],
    ids=lambda prior: type(prior).__name__,
)
def test_densities_in_the_coordinates_of_priors_are_normalised(prior):
    def model(y):
        a = pyro.sample("a", prior)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    y = torch.ones(3)
    guide = guide_of(model, y, family=Spline(fusion="auto"))
    for parameter in guide.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    fn = poutine.trace(guide).get_trace(y).nodes["a"]["fn"]
    with torch.no_grad():
        value = fn.rsample((4000,)).sort().values
        log_prob = fn.log_prob(value)
        inner, share = value[40:-40], torch.linspace(0.0, 1.0, 21)[:-1]
        grid = (inner[:-1, None] + share * inner.diff()[:, None]).flatten()
        density = fn.log_prob(grid).exp()
    mass = float(torch.trapezoid(density, grid))
    assert log_prob.isfinite().all()
    assert abs(mass - 0.98) < 5 * math.sqrt(0.02 / 4000) + 2e-3


def test_every_estimator_agrees_on_a_fused_guide():
    guide = guide_of(schools, Y, SIGMA)
    options = {"num_particles": 2000, "vectorize_particles": True, "max_plate_nesting": 1}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = {
            kind.__name__: kind(**options).loss(schools, guide, Y, SIGMA)
            for kind in (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, JitTrace_ELBO)
        }
        renyi = RenyiELBO(alpha=0.0, **options).loss(schools, guide, Y, SIGMA)
    reference = losses["Trace_ELBO"]
    assert all(abs(loss - reference) < 0.6 for loss in losses.values()), losses
    assert renyi < reference


# ---------------------------------------------------------------- gradients


class Learnable(torch.nn.Module):
    """A hierarchy whose prior has a parameter."""

    def __init__(self):
        super().__init__()
        self.log_width = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        m = pyro.sample("m", dist.Normal(0.0, self.log_width.exp()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, self.log_width.exp()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _learnable(x):
    model = Learnable()
    return model, guide_of(model, x, family=Normal(fusion=True), inverse="reverse")


def _gradients_of(loss, model, guide, x, runs):
    found = []
    for _ in range(runs):
        model.zero_grad()
        loss.differentiable_loss(model, guide, x).backward()
        found.append(float(model.log_width.grad))
    values = torch.tensor(found)
    return float(values.mean()), float(values.std() / runs**0.5)


def test_the_gradient_of_a_learnable_prior_is_the_total_derivative_of_the_bound():
    """Against central differences of the loss, with the same noise, of which the guide is a function too."""
    x = torch.tensor([0.5, -1.0, 2.0])
    model, guide = _learnable(x)
    loss = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)

    def at(value):
        model.log_width.data.fill_(value)
        pyro.set_rng_seed(5)
        with torch.no_grad():
            return loss.loss(model, guide, x)

    pyro.set_rng_seed(5)
    model.log_width.data.fill_(0.3)
    loss.differentiable_loss(model, guide, x).backward()
    numeric = (at(0.3 + 1e-5) - at(0.3 - 1e-5)) / 2e-5
    assert float(model.log_width.grad) == pytest.approx(numeric, rel=1e-5, abs=1e-6)


def test_dreg_has_the_gradient_of_the_plain_bound_for_a_learnable_prior():
    x = torch.tensor([0.5, -1.0, 2.0])
    model, guide = _learnable(x)
    pyro.set_rng_seed(1)
    options = {"num_particles": 4, "max_plate_nesting": 1}
    plain = _gradients_of(IWAE_ELBO(gradient="plain", **options), model, guide, x, 100)
    dreg = _gradients_of(IWAE_ELBO(gradient="dreg", **options), model, guide, x, 100)
    assert abs(plain[0] - dreg[0]) < 4.5 * math.hypot(plain[1], dreg[1])


def test_inference_compilation_leaves_the_model_alone():
    """A better density of given values is no reason to change the model."""
    x = torch.tensor([0.5, -1.0, 2.0])
    model, guide = _learnable(x)
    loss = InferenceCompilation(model, guide, batch_size=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the data of joint samples are not those that m was fitted to
        loss.loss_and_grads(x)
    assert model.log_width.grad is None or float(model.log_width.grad) == 0.0
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in guide.parameters())


def test_training_learns_the_scale_of_the_prior():
    """Empirical Bayes of a normal: the variance of the data is twice that of the prior, plus one."""
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log_width = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, self.log_width.exp()))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = 2.0 * torch.randn(200)
    model = Model()
    guide = guide_of(model, x, family=Normal(fusion=True))
    svi = SVI(
        lambda x: (pyro.module("model", model), model(x))[1],
        guide,
        pyro.optim.Adam({"lr": 0.05}),
        Trace_ELBO(),
    )
    for _ in range(120):
        svi.step(x)
    exact = 0.5 * math.log(float(x.square().mean()) - 1.0)
    assert model.log_width.item() == pytest.approx(exact, abs=0.1)


# ---------------------------------------------------------------- which sites


def test_sites_before_their_model_parents_are_left_alone_and_refused_on_demand():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    x = torch.tensor(1.0)
    guide = guide_of(model, x, inverse="forward")
    assert guide.inverse.sampling_order[0] == "b"
    assert "b" not in guide.plan.priors.sites
    assert "not fused with its prior: its model parent 'a' is sampled after it" in guide.describe()
    with pytest.raises(GraphflowsError, match=r"'b' to be fused.*'a' is sampled after it"):
        guide_of(model, x, inverse="forward", family=Normal(fusion=True))
    assert "b" in guide_of(model, x, inverse="reverse", family=Normal(fusion=True)).plan.priors.sites


def test_priors_that_are_linear_are_left_to_regression():
    """Their conditionals are linear with or without the prior; those whose scale or slope varies are not."""

    def model(w, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.5 * a - 1.0, 2.0))
            c = pyro.sample("c", dist.Normal(a + b, (0.3 * a).exp()))
            d = pyro.sample("d", dist.Normal(w * a, 1.0))
            e = pyro.sample("e", dist.Normal(a * b, 1.0))
            pyro.sample("x", dist.Normal(b + c + d + e, 1.0), obs=x)

    w, x = torch.randn(4), torch.ones(4)
    assert guide_of(model, w, x, inverse="reverse").plan.priors.sites == {"c", "d", "e"}
    every = guide_of(model, w, x, inverse="reverse", family=Normal(fusion=True))
    assert every.plan.priors.sites == set("abcde")


def test_globals_of_crossed_effects_keep_the_regression_start():
    """Judged at the width of the prior, on enough joint samples, and a tenth as wide then."""

    def model(row, column, y):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("rows", 4):
            a = pyro.sample("a", dist.Normal(0.0, tau))
        with pyro.plate("columns", 5):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[..., row] + b[..., column], sigma), obs=y)

    row, column = torch.arange(4).repeat_interleave(5), torch.arange(5).repeat(4)
    y = torch.randn(20)
    guide = guide_of(model, row, column, y, family="auto")
    assert "random start was kept" not in guide.describe(verbose=True)
    sigma = draws(guide, row, column, y).nodes["sigma"]["value"]
    assert 0.3 < float(sigma.min()) < float(sigma.max()) < 1.2  # the prior's median is .67


def test_effects_are_sampled_after_their_scales():
    """And before all else; an inverse that the user names is kept."""

    def model(x, y):
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
        level, slope = (pyro.sample(name, dist.Normal(0.0, 5.0)) for name in ("level", "slope"))
        with pyro.plate("plates", len(x)):
            effect = pyro.sample("effect", dist.Normal(0.0, log_scale.exp()))
            pyro.sample("y", dist.Poisson((level + slope * x + effect).exp()), obs=y)

    x, y = torch.linspace(-1.0, 1.0, 6), torch.tensor([0.0, 1.0, 3.0, 2.0, 5.0, 4.0])
    guide = guide_of(model, x, y)
    order = guide.inverse.sampling_order
    assert order[0] == "log_scale"
    assert order[-1] == "effect"
    assert "effect" in guide.plan.priors.sites
    named = guide_of(model, x, y, inverse=["effect", "log_scale", "level", "slope"])
    assert named.inverse.sampling_order == ("slope", "level", "log_scale", "effect")


@pytest.mark.parametrize("fusion", ["auto", False])
def test_flows_are_not_fused_but_the_sites_that_they_do_not_serve(fusion):
    def model(w, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0, 2.0))
            k = pyro.sample("k", dist.Bernoulli(logits=w * a))
            pyro.sample("x", dist.Normal(a + k, 1.0), obs=x)

    data = torch.randn(4), torch.ones(4)
    guide = guide_of(model, *data, family=Flow(fusion=fusion), inverse="reverse", num_start_samples=500)
    assert guide.plan.priors.sites == ({"k"} if fusion else set())
    with pytest.raises(GraphflowsError, match=r"fusion='auto' or False with Flow.*Spline\(fusion=True\)"):
        Flow(fusion=True)


def test_parents_that_the_guide_enumerates_leave_a_site_alone():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(0.0, (3.0 * k).exp()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.ones(3)
    assert "z" in guide_of(model, x, inverse="reverse").plan.priors.sites
    guide = guide_of(model, x, inverse="reverse", enumerate_sites=True)
    assert not guide.plan.priors.sites
    latents = {"k": torch.ones(3), "z": torch.zeros(3)}
    assert torch.equal(log_q(guide, latents, x), log_q(guide, latents, x))


def test_outer_sites_with_a_parent_in_an_inner_plate_are_left_alone():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        top = pyro.sample("top", dist.Normal(0.0, (0.1 * z).exp().sum(-1, keepdim=True)).to_event(1))
        pyro.sample("x", dist.Normal(z + top, 1.0).to_event(1), obs=x)

    x = torch.ones(3)
    guide = guide_of(model, x, inverse="reverse")
    assert "top" not in guide.plan.priors.sites
    assert "not fused with its prior: its model parent 'z' is sampled after it" in guide.describe()


def rows_of_groups(group, y):
    """Three groups whose effects have parameters of their own."""
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(1.0, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(theta[..., group], 1.0), obs=y)


GROUP = torch.tensor([0, 1, 2, 0, 1])


def test_fused_sites_without_arguments_have_the_priors_of_set_up():
    guide = guide_of(rows_of_groups, GROUP, Y[:5])
    assert guide.plan.priors.sites == {"tau", "theta"}
    given, remembered = guide.median(GROUP, Y[:5]), guide.median()
    assert all(torch.allclose(given[name], value) for name, value in remembered.items())
    copied = copy.deepcopy(guide).float()
    assert copied.median()["tau"].dtype == torch.float32
    assert guide.median()["tau"].dtype == torch.float64


def test_a_loaded_guide_asks_for_the_arguments_by_which_priors_are_found(tmp_path):
    guide = guide_of(rows_of_groups, GROUP, Y[:5])
    guide.save(tmp_path / "guide.safetensors")
    loaded = load_guide(tmp_path / "guide.safetensors", rows_of_groups)
    assert loaded.median(GROUP, Y[:5])["tau"] == guide.median(GROUP, Y[:5])["tau"]
    with pytest.raises(UnsupportedModelError, match=r"model's arguments: tau, theta are fused"):
        loaded.median()


def test_joint_samples_with_undefined_priors_are_left_out():
    """exp(log_tau) overflows or is zero in some of them; the start is fitted to the others, and stays fused."""

    def model(y, sigma):
        log_tau = pyro.sample("log_tau", dist.Normal(0.0, 30.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, log_tau.exp(), validate_args=False))
            pyro.sample("y", dist.Normal(theta, sigma, validate_args=False), obs=y)

    guide = guide_of(model, Y.float(), SIGMA.float(), inverse="reverse")
    assert guide.block_of("theta").conditionals.fuses("theta")
    guide.set_linear_("log_tau", {}, 0.0, 1.0)
    theta = guide(Y.float(), SIGMA.float())["theta"]
    assert theta.isfinite().all()


def test_fused_roots_start_narrow():
    """A tenth as wide as the prior: at its width the first losses are those of wild guesses."""
    guide = guide_of(half_cauchy_schools, Y, SIGMA, family=Normal(fusion=True))
    trace = draws(guide, Y, SIGMA, number=2000)
    score = torch.atan(trace.nodes["tau"]["value"] / 5.0) * (2.0 / math.pi)  # the prior's cdf
    assert 0.05 < float(dist.Normal(0.0, 1.0).icdf(score).std()) < 0.2
    assert 0.25 < float(trace.nodes["mu"]["value"].std()) < 1.0


def test_priors_that_change_by_chance_are_left_alone():
    class Random(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x):
            a = pyro.sample("a", dist.Normal(torch.zeros(8), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(self.drop(a), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.ones(8)
    guide = guide_of(Random(), x, strict=False, inverse="reverse")
    assert "z" not in guide.plan.priors.sites
    assert "differs from run to run" in guide.describe()
    latents = {"a": torch.zeros(8), "z": torch.ones(8)}
    assert torch.equal(guide.log_prob(latents, x), guide.log_prob(latents, x))


def test_covariates_that_the_inverse_leaves_out_leave_a_site_alone():
    """The prior would bring in what the site is not to look at."""

    def model(w, y):
        with pyro.plate("data", len(w)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    w, y = torch.randn(5), torch.randn(5)
    blind = guide_of(model, w, y, inverse=lambda graph: InverseGraph(graph, {"z": ["y"]}))
    assert not blind.plan.priors.sites
    latents = {"z": torch.zeros(5)}
    assert torch.equal(log_q(blind, latents, w, y), log_q(blind, latents, w + 1.0, y))
    assert "z" in guide_of(model, w, y).plan.priors.sites


def test_parents_summed_over_by_the_model_leave_a_site_alone():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(3.0 * k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor(1.0)
    guide = guide_of(model, x)
    assert "z" not in guide.plan.priors.sites
    assert torch.equal(
        guide.log_prob({"z": torch.tensor(0.3)}, x), guide.log_prob({"z": torch.tensor(0.3)}, x)
    )


def test_a_part_of_a_guide_list_is_right():
    """Sites hidden from the part's model are drawn anew in each of its runs: their children cannot be fused."""
    guide = AutoGuideList(schools)
    part = poutine.block(schools, hide=["mu"])
    guide.append(guide_of(part, Y, SIGMA))
    guide.append(AutoNormal(poutine.block(schools, expose=["mu"])))
    guide(Y, SIGMA)
    assert "theta" not in guide[0].plan.priors.sites
    latents = {"log_tau": torch.tensor(0.3), "theta": torch.ones(8)}
    assert torch.equal(guide[0].log_prob(latents, Y, SIGMA), guide[0].log_prob(latents, Y, SIGMA))


def test_priors_without_a_coordinate_are_left_alone():
    def model(x):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(p, 1.0).to_event(1), obs=x)

    guide = guide_of(model, torch.ones(3), family=FUSED)
    assert not guide.plan.priors.sites
    with pytest.raises(GraphflowsError, match=r"'p' to be fused.*no coordinate"):
        guide_of(model, torch.ones(3), family=Normal(fusion=True))


def test_a_scale_of_zero_at_a_draw_is_an_error_that_names_the_site():
    def model(x, floor):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(a, (a - floor).relu(), validate_args=False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.ones(3)
    guide = guide_of(model, x, torch.tensor(-9.0), inverse="reverse")
    assert "z" in guide.plan.priors.sites
    with pytest.raises(GraphflowsError, match=r"prior of 'z'.*positive scale.*fusion=False"):
        guide(x, torch.tensor(9.0))


@pytest.mark.parametrize("kind", [Normal, Spline])
def test_unknown_values_of_the_option_are_refused(kind):
    with pytest.raises(GraphflowsError, match="fusion='auto', True or False; got 'yes'"):
        kind(fusion="yes")


# ---------------------------------------------------------------- discrete sites


def test_discrete_sites_have_the_logits_of_the_prior_and_more():
    table = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            k = pyro.sample("k", dist.Categorical(table[z.long()]))
            pyro.sample("x", dist.Normal(k.to(x.dtype), 0.5), obs=x)

    x = torch.linspace(-1.0, 3.0, 9)
    guide = auto_faithful_guide(model, x, inverse="reverse", family=Normal(fusion=True))
    assert "k" in guide.plan.priors.sites
    # a table of the one discrete parent is learned as well without the prior
    assert not guide_of(model, x, inverse="reverse", num_start_samples=500).plan.priors.sites
    for z in (0.0, 1.0):
        latents = {"z": torch.full((9,), z), "k": torch.ones(9).long()}
        got = guide.log_prob(latents, x) - poutine.trace(poutine.condition(guide, data=latents)).get_trace(
            x
        ).nodes["z"]["fn"].log_prob(latents["z"])
        classes = torch.arange(3.0)
        joint = table[int(z)].log() + dist.Normal(classes, 0.5).log_prob(x.unsqueeze(-1))
        exact = joint.log_softmax(-1)[:, 1]
        assert torch.allclose(got.exp(), exact.exp(), atol=0.06)


# ---------------------------------------------------------------- calls


def test_one_run_of_the_model_beyond_those_of_the_estimator():
    runs = []

    def model(y, sigma):
        runs.append(None)
        schools(y, sigma)

    guide = guide_of(model, Y, SIGMA)
    loss = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    loss.loss(model, guide, Y, SIGMA)
    counts = []
    for _ in range(3):
        runs.clear()
        before = guide._priors.runs
        loss.loss(model, guide, Y, SIGMA)
        counts.append((len(runs), guide._priors.runs - before))
    assert counts == [(2, 1)] * 3


def test_subsampled_plates_have_the_priors_of_their_rows():
    def model(x, y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(a * x[rows], 0.1))
            pyro.sample("y", dist.Normal(z, 1.0), obs=None if y is None else y[rows])

    x = torch.arange(10.0)
    guide = guide_of(model, x, x)
    assert "z" in guide.plan.priors.sites
    guide.set_fused_("z", {}, 0.0, 1e4)
    trace = poutine.trace(guide).get_trace(x, x)
    rows = trace.nodes["data"]["value"]
    assert torch.allclose(trace.nodes["z"]["fn"].mean, trace.nodes["a"]["value"] * x[rows], atol=1e-4)


def test_models_that_take_one_value_at_a_time_are_run_draw_by_draw():
    design = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])

    def model(y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(design @ beta, 0.5))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.ones(3)
    guide = guide_of(model, y, inverse="reverse")
    assert "z" in guide.plan.priors.sites
    assert not guide.plan.priors.batches
    beta, z = torch.randn(4, 1, 2), torch.randn(4, 3)
    each = torch.stack([guide.log_prob({"beta": beta[i, 0], "z": z[i]}, y) for i in range(4)])
    assert torch.allclose(guide.log_prob({"beta": beta, "z": z}, y).reshape(4), each.reshape(4))


def test_models_may_join_sites_that_are_drawn_to_sites_that_are_not():
    """The prior of d is read at draws of a alone, by a run of the model that joins these to b on the way."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            c = pyro.sample("c", dist.Normal(torch.cat([a, b], -1).tanh().sum(-1), 0.5))
            d = pyro.sample("d", dist.Normal(a.sum(-1).tanh(), 0.5))
            pyro.sample("x", dist.Normal(torch.stack([c, d], -1) + b, 1.0).to_event(1), obs=x)

    x = torch.randn(3, 2)
    guide = guide_of(model, x, inverse=["c", "b", "d", "a"])
    assert guide.plan.priors.batches
    assert guide.plan.priors.runs == ((), ("d",), ("c",))
    guide.set_fused_("d", {}, 0.0, 1e4)
    with pyro.plate("draws", 5, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    a, law = trace.nodes["a"]["value"], trace.nodes["d"]["fn"]
    assert a.shape == (5, 3, 2)
    assert torch.allclose(law.mean, a.sum(-1).tanh(), atol=1e-4)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    assert math.isfinite(elbo.loss(model, guide, x))


@pytest.mark.parametrize("family", [FUSED, Spline(fusion="auto")], ids=["normal", "spline"])
def test_saved_copied_and_loaded_guides_are_the_same(family, tmp_path):
    guide = guide_of(half_cauchy_schools, Y, SIGMA, family=family)
    latents = {"tau": torch.tensor(2.0), "mu": torch.tensor(1.0), "theta": torch.zeros(8)}
    expected = guide.log_prob(latents, Y, SIGMA)
    guide.save(tmp_path / "guide.safetensors")
    loaded = load_guide(tmp_path / "guide.safetensors", half_cauchy_schools)
    assert torch.equal(loaded.log_prob(latents, Y, SIGMA), expected)
    other = guide_of(half_cauchy_schools, Y, SIGMA, family=family, setup_seed=3)
    other.set_linear_("tau", {}, 0.0, 1.0)
    other.load_state_dict(guide.state_dict())
    assert torch.equal(other.log_prob(latents, Y, SIGMA), expected)
    single = guide_of(half_cauchy_schools, Y, SIGMA, family=family).float()
    got = single.log_prob({n: v.float() for n, v in latents.items()}, Y.float(), SIGMA.float())
    assert got.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_conditional_that_is_set_is_as_it_was_set():
    """Whatever the prior is: the site is not fused then."""
    guide = guide_of(half_cauchy_schools, Y, SIGMA, inverse=["theta", "tau", "mu"])
    guide.set_linear_("tau", {"mu": 0.5}, 0.2, 0.3)
    latents = {"tau": torch.tensor(2.0), "mu": torch.tensor(1.0), "theta": torch.zeros(8)}
    fn = poutine.trace(poutine.condition(guide, data=latents)).get_trace(Y, SIGMA).nodes["tau"]["fn"]
    exact = dist.LogNormal(0.7, 0.3).log_prob(latents["tau"])
    assert fn.log_prob(latents["tau"]).item() == pytest.approx(exact.item())


@pytest.mark.parametrize("family", [FUSED, Spline(fusion="auto")], ids=["normal", "spline"])
def test_a_fused_guide_is_a_map_of_noise(family):
    guide = guide_of(half_cauchy_schools, Y, SIGMA, family=family)
    transport = guide.transport(Y, SIGMA)
    noise = torch.randn(5, transport.size)
    moved = transport(noise)
    assert torch.allclose(
        torch.cat([part.flatten(1) for part in transport.inverse(moved.values).values()], 1), noise, atol=1e-6
    )
    base = dist.Normal(0.0, 1.0).log_prob(noise).sum(1)
    log_q = guide.log_prob(
        {name: value if name == "theta" else value[:, None] for name, value in moved.values.items()}, Y, SIGMA
    )
    assert torch.allclose(base - moved.total, log_q.reshape(5), atol=1e-6)


# ---------------------------------------------------------------- family="auto"


def _kinds(guide):
    return {name: type(guide.block_of(name).family).__name__ for name in guide.plan.graph.latent}


def test_hierarchies_have_splines_for_globals_and_are_fused_by_auto():
    guide = auto_faithful_guide(half_cauchy_schools, Y, SIGMA, family="auto", num_start_samples=2000)
    assert _kinds(guide) == {"tau": "Spline", "mu": "Spline", "theta": "Normal"}
    assert guide.plan.priors.sites == {"tau", "theta"}  # that of mu is one and the same normal
    assert "fused with its prior, spline" in guide.describe()


def test_scales_in_plates_have_splines():
    def model(x):
        with pyro.plate("groups", len(x)):
            log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(a, log_scale.exp()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = auto_faithful_guide(
        model, torch.ones(4), inverse="reverse", family="auto", num_start_samples=2000
    )
    assert _kinds(guide) == {"log_scale": "Spline", "a": "Normal", "z": "Normal"}


def test_the_default_is_auto():
    def model(w, x):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(p + v.sum(-1), 1.0))
            g = pyro.sample("g", dist.Gamma(2.0, 2.0))
            pyro.sample("x", dist.Normal(w * z, g), obs=x)

    data = torch.randn(4), torch.ones(4)
    guide = auto_faithful_guide(model, *data, num_start_samples=500)
    assert guide.family == Auto()
    assert _kinds(guide) == {"p": "Spline", "v": "Normal", "z": "Normal", "g": "Spline"}
    assert {"p", "g"} <= guide.plan.priors.sites
    assert guide.describe().count("fused with its prior, spline]") == 2


@pytest.mark.parametrize(
    ("number", "data", "kind"),
    [
        (8, lambda z: dist.Poisson(z.exp()), "Spline"),
        (8, lambda z: dist.StudentT(3.0, z, 1.0), "Spline"),
        (8, lambda z: dist.Normal(z, 1.0), "Normal"),
        (8, lambda z: dist.LogNormal(z, 1.0), "Normal"),
        (501, lambda z: dist.Poisson(z.exp()), "Normal"),  # a step would take long
    ],
)
def test_effects_with_data_that_are_not_normal_have_splines(number, data, kind):
    def model(x):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("groups", number):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", data(z[..., group]), obs=x)

    group = torch.arange(number).repeat_interleave(2)
    guide = auto_faithful_guide(model, torch.ones(2 * number), init="random", num_start_samples=200)
    assert _kinds(guide) == {"mu": "Spline", "z": kind}


def test_elements_that_read_their_data_have_splines_where_one_data_set_is_fitted():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    options = {"init": "random", "num_start_samples": 200}
    guide = auto_faithful_guide(model, torch.ones(8), **options)
    assert _kinds(guide) == {"mu": "Spline", "z": "Spline"}
    amortised = auto_faithful_guide(model, torch.ones(8), pool="deepset", **options)
    assert _kinds(amortised) == {"mu": "Spline", "z": "Normal"}


def test_amortised_sites_with_normal_priors_are_as_in_the_normal_family():
    """Weight for weight."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            u = pyro.sample("u", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    x = torch.ones(4)
    one, other = (auto_faithful_guide(model, x, family=f, num_start_samples=500) for f in ("auto", "normal"))
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_the_parts_of_the_auto_family_are_families():
    with pytest.raises(GraphflowsError, match=r"normal= a Normal\(...\) and spline= a Spline"):
        Auto(normal=Spline())


# ---------------------------------------------------------------- priors that are the same in each call


def shaped(x, noise):
    """A heavy-tailed number for each datum, and what is seen of it."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Laplace(1.0, 2.0))
        pyro.sample("x", dist.Normal(z, noise), obs=x)


def gap_of_shaped(guide, x, noise):
    """Return the mean distance of the ELBO from the log-evidence, by sums over a grid."""
    grid = torch.linspace(-40.0, 40.0, 40_001, dtype=torch.float64)
    log_prior = dist.Laplace(1.0, 2.0).log_prob(grid)
    evidence = sum(
        float((log_prior + dist.Normal(grid, noise).log_prob(one)).logsumexp(0)) for one in x.double()
    ) + len(x) * math.log(float(grid[1] - grid[0]))
    with torch.no_grad():
        loss = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1).loss(
            shaped, guide, x, noise
        )
    return (loss + evidence) / len(x)


@pytest.mark.parametrize("family", ["normal", "spline"])
@pytest.mark.parametrize("noise", [0.05, 6.0])
def test_a_number_has_the_shape_that_fits_joint_samples(family, noise):
    """Precise data make a posterior normal in the number itself; poor data leave it the shape of its prior."""
    torch.manual_seed(3)
    z = dist.Laplace(1.0, 2.0).sample((200,))
    x = (z + noise * torch.randn(200)).double()
    guide = guide_of(shaped, x, noise, family=family)
    other = {"normal": Normal, "spline": Spline}[family](fusion=noise < 1.0)
    assert "z" in guide.plan.priors.sites
    assert ("joint samples are likelier without it" in guide.describe()) == (noise < 1.0)
    gap = gap_of_shaped(guide, x, noise)
    assert gap < gap_of_shaped(guide_of(shaped, x, noise, family=other), x, noise)
    assert gap < 0.1


def test_fusion_that_is_asked_for_stays():
    x = torch.linspace(-3.0, 5.0, 50)
    guide = guide_of(shaped, x, 0.05, family=Normal(fusion=True))
    assert "fused with its prior]" in guide.describe()


def test_a_site_that_was_left_without_its_prior_is_so_when_loaded(tmp_path):
    x = torch.linspace(-3.0, 5.0, 50)
    guide = guide_of(shaped, x, 0.05, family="normal")
    guide.save(tmp_path / "guide.safetensors")
    loaded = load_guide(tmp_path / "guide.safetensors", shaped)
    assert loaded.describe() == guide.describe()
    latents = {"z": x + 0.01}
    assert torch.equal(loaded.log_prob(latents, x, 0.05), guide.log_prob(latents, x, 0.05))
