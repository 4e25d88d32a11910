"""Maps of elements for the data that a guide is fitted to, beside the network that they share."""

import copy
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from training_paths import check_losses, training

from pyro_graphflows import auto_faithful_guide, load_guide

SIZES = (5.0, 40.0, 12.0, 3.0, 80.0, 25.0, 9.0, 16.0)


def germination(total, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.5))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(total)):
        b = pyro.sample("b", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Binomial(total, logits=mu + b), obs=y)


def counts(exposure, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.5))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(exposure)):
        b = pyro.sample("b", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Poisson(exposure * (mu + b).exp()), obs=y)


LIKELIHOODS = {
    "binomial": (germination, lambda size, eta: dist.Binomial(size, logits=eta, validate_args=False)),
    "poisson": (counts, lambda size, eta: dist.Poisson(size * eta.exp(), validate_args=False)),
}


def data_of(name):
    model, likelihood = LIKELIHOODS[name]
    size = torch.tensor(SIZES)
    pyro.set_rng_seed(3)
    return model, (size, likelihood(size, 0.5 + 0.8 * torch.randn(len(SIZES))).sample())


def evidence_of(name, size, y):
    """By the trapezium rule over mu and log tau, and Gauss-Hermite quadrature over each effect."""
    likelihood = LIKELIHOODS[name][1]
    mu = torch.linspace(-4.0, 5.0, 241).double().view(-1, 1, 1, 1)
    log_tau = torch.linspace(-6.0, 1.5, 121).double().view(-1, 1, 1)
    nodes, weights = gauss_hermite(60)
    eta = mu + log_tau.exp() * nodes.unsqueeze(-1)
    inner = likelihood(size.double(), eta).log_prob(y.double()) + weights.log().unsqueeze(-1)
    joint = torch.logsumexp(inner, -2).sum(-1) + dist.Normal(0.0, 1.5).log_prob(mu[..., 0, 0])
    joint = joint + (dist.HalfNormal(1.0).log_prob(log_tau.exp()) + log_tau)[..., 0, 0]
    return torch.logsumexp(joint.flatten(), 0).item() + math.log(9.0 / 240 * 7.5 / 120)


def gauss_hermite(number):
    """Return nodes and weights for the mean over a standard normal (Golub and Welsch 1969)."""
    off = torch.arange(1, number).double().sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return values, vectors[0].square().clamp(min=1e-300)


def loss_of(model, guide, args):
    options = {"num_particles": 2000, "vectorize_particles": True, "max_plate_nesting": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trace_ELBO(**options).loss(model, guide, *args)


def log_prob(guide, args):
    latents = {"mu": torch.tensor(0.4), "tau": torch.tensor(0.7), "b": torch.linspace(-1.0, 1.0, len(SIZES))}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return guide.log_prob(latents, *args)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_effects_start_as_the_posterior_is_for_the_data_fitted(name, dtype):
    model, args = data_of(name)
    guide = auto_faithful_guide(model, *args)
    assert "b has a map of its own for each index of groups" in guide.describe(verbose=True)
    gap = loss_of(model, guide, args) + evidence_of(name, *args)
    assert -0.05 < gap < 0.35, gap


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-3, 1e-2])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_training_keeps_starts_with_maps(name, rate, dtype):
    model, args = data_of(name)
    guide = auto_faithful_guide(model, *args)
    evidence = evidence_of(name, *args)
    steps = training(model, guide, args, rate, Trace_ELBO())
    check_losses(steps, lambda: loss_of(model, guide, args) + evidence, 0.5)


def test_other_rows_have_what_all_share():
    model, (size, y) = data_of("binomial")
    guide = auto_faithful_guide(model, size, y)
    shared = copy.deepcopy(guide)
    shared.block_of("b").conditionals.leave_out_maps_("b")
    other = torch.tensor([4.0, 1.0, 6.0, 2.0, 50.0, 20.0, 1.0, 8.0])
    assert torch.equal(log_prob(guide, (size, other)), log_prob(shared, (size, other)))
    assert (log_prob(guide, (size, y)) - log_prob(shared, (size, y))).abs() > 0.5
    part = y.clone()
    part[2] = 0.0  # of one row alone
    assert not torch.equal(log_prob(guide, (size, part)), log_prob(shared, (size, part)))


def test_files_have_maps_or_none(tmp_path):
    model, args = data_of("binomial")
    for init in ("auto", "regression"):
        guide = auto_faithful_guide(model, *args, init=init)
        assert len(guide.block_of("b").conditionals.maps) == (init == "auto")
        guide.save(tmp_path / "guide.safetensors")
        again = load_guide(tmp_path / "guide.safetensors", model)
        assert len(again.block_of("b").conditionals.maps) == (init == "auto")
        assert torch.equal(log_prob(guide, args), log_prob(again, args))


def test_what_is_exact_or_amortised_has_no_maps():
    def schools(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        with pyro.plate("groups", len(y)):
            b = pyro.sample("b", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(b, sigma), obs=y)

    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    guide = auto_faithful_guide(schools, sigma, y, init="mode")
    assert not guide.block_of("b").conditionals.maps
    assert "b has no maps for the indices of groups" in guide.describe(verbose=True)
    model, args = data_of("binomial")
    guide = auto_faithful_guide(model, *args, pool="deepset")
    assert not guide.block_of("b").plan.fitted
