"""Training and evaluation of this package's own guides, against the exact answers of linear-Gaussian networks."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows.graphs import binary_tree, load_network
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.infer import (
    IWAE_ELBO,
    InferenceCompilation,
    Schedule,
    TrainingData,
    fit,
    log_evidence,
    sample_posterior,
    sbc_ranks,
    sbc_uniformity,
)
from pyro_graphflows.infer.parameters import ParameterSet


def observed_data(network, num, seed):
    columns = [network.names.index(name) for name in network.observed]
    return torch.as_tensor(network.sample(num, seed=seed)[:, columns])


def conditional_entropy(network):
    return network.entropy(network.names) - network.entropy(network.observed)


@pytest.fixture
def tree():
    network = binary_tree(3, seed=0)
    x = observed_data(network, 200, seed=1)
    return network, network.pyro_model(), x


def test_evidence_of_a_real_network():
    """ecoli70, leaves observed, no training: the regression start is within a few hundredths of a nat."""
    network = load_network("ecoli70")
    model, x = network.pyro_model(), observed_data(network, 100, seed=2)
    guide = auto_faithful_guide(model, x)
    evidence = log_evidence(model, guide, x, num_particles=100)
    exact = torch.as_tensor(network.log_evidence(x.numpy()))
    error = (evidence.log_evidence - exact) / evidence.standard_error
    assert error.abs().max() < 6
    assert abs(error.mean().item()) < 0.6
    assert bool((evidence.ess > 60).all())


def test_inference_compilation_of_a_faithful_and_of_a_mean_field_guide(tree):
    """The loss tends to H[z | x] plus the gap of the guide's factorisation, zero for a faithful inverse."""
    network, model, x = tree
    losses = {}
    for inverse in ("auto", "mean_field"):
        guide = auto_faithful_guide(model, x, inverse=inverse)
        losses[inverse] = InferenceCompilation(model, guide, batch_size=20_000).loss(num_samples=1)
        gap = network.factorization_gap(guide.inverse)
        # 20,000 samples of a density with a standard deviation of about sqrt(K / 2) nats
        error = 5 * math.sqrt(len(network.latent) / 2 / 20_000)
        assert losses[inverse] == pytest.approx(conditional_entropy(network) + gap, abs=error + 0.02)
    assert losses["mean_field"] > losses["auto"] + 0.15


def test_steps_of_inference_compilation(tree):
    network, model, x = tree
    guide = auto_faithful_guide(model, x, init="random")
    optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.99})
    compilation = InferenceCompilation(model, guide, optim, batch_size=200)
    before = compilation.loss()
    for _ in range(150):
        compilation.step()
    after = compilation.loss()
    assert after < before - 1
    assert after == pytest.approx(conditional_entropy(network), abs=0.8)


@pytest.mark.parametrize("inverse", ["auto", "reverse", "forward", "full"])
def test_doubly_reparametrised_gradients(tree, inverse):
    """The guide's sites score the leaves as they would any given value: plain and DReG gradients agree in the mean."""
    _, model, x = tree
    guide = auto_faithful_guide(model, x, inverse=inverse)
    with torch.no_grad():  # away from the optimum, where both would vanish
        for parameter in guide.parameters():
            parameter += 0.2
    many = x[:1].expand(20_000, -1)
    found = []
    for gradient in ("plain", "dreg"):
        pyro.set_rng_seed(0)
        guide.zero_grad()
        IWAE_ELBO(3, gradient=gradient).loss_and_grads(model, guide, many)
        found.append(
            torch.cat([p.grad.flatten() for p in guide.parameters() if p.grad is not None]) / len(many)
        )
    assert found[0].norm() > 0.3
    assert (found[0] - found[1]).norm() < 0.1 * found[0].norm()


def test_fit_by_an_elbo(tree, tmp_path):
    """From a random start, with validation, in one go and in two: bit for bit the same."""
    _, model, x = tree

    def train(name, num_epochs):
        pyro.clear_param_store()
        pyro.set_rng_seed(7)
        guide = auto_faithful_guide(model, x, init="random")
        history = fit(
            model,
            guide,
            TrainingData(x[:150], batch_size=50, validation=x[150:]),
            optimizer=0.02,
            schedule=Schedule(num_epochs, max_grad_norm=50.0),
            checkpoint=tmp_path / name,
            progress=False,
        )
        return history, ParameterSet(guide=guide).state()

    history, state = train("whole.pt", 30)
    assert history.validation_loss[-1] < history.validation_loss[0] - 1
    train("parts.pt", 11)
    resumed, same = train("parts.pt", 30)
    assert resumed.validation_loss == history.validation_loss
    assert all(torch.equal(value, same[name]) for name, value in state.items())


def test_fit_by_inference_compilation(tree):
    network, model, x = tree
    guide = auto_faithful_guide(model, x, init="random")
    history = fit(
        model,
        guide,
        TrainingData(validation=5),
        loss=InferenceCompilation(model, guide, batch_size=200),
        optimizer=0.02,
        schedule=Schedule(4, steps_per_epoch=30),
        progress=False,
    )
    assert history.validation_loss[-1] < history.validation_loss[0] - 0.2
    assert history.validation_loss[-1] > conditional_entropy(network) - 0.3


def test_calibration_of_the_regression_start(tree):
    """Faithful: calibrated in every latent. Mean-field given all observations: every marginal is right as well."""
    _, model, x = tree
    for inverse in ("auto", "mean_field"):
        guide = auto_faithful_guide(model, x, inverse=inverse)
        ranks = sbc_ranks(model, guide, num_simulations=2000, num_draws=19)
        assert min(sbc_uniformity(value, 19).item() for value in ranks.values()) > 1e-4
    # a heuristic inverse without the needed edges is not: its factors take what they miss for noise
    wrong = auto_faithful_guide(model, x, init="random")
    ranks = sbc_ranks(model, wrong, num_simulations=500, num_draws=19)
    assert min(sbc_uniformity(value, 19).item() for value in ranks.values()) < 1e-6


def test_covariates(tree):
    """Regression with a covariate: evidence per datum is exact up to the start's error, and compilation sees w."""

    def model(w, x=None):
        with pyro.plate("data", len(w)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            return pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    w = torch.randn(300)
    x = model(w)
    guide = auto_faithful_guide(model, w, x)
    evidence = log_evidence(model, guide, w, x, num_particles=200)
    exact = dist.Normal(2 * w, 5**0.5).log_prob(x)
    assert ((evidence.log_evidence - exact) / evidence.standard_error).abs().max() < 6
    loss = InferenceCompilation(model, guide, batch_size=200).loss(w) / 300
    assert loss == pytest.approx(0.5 * math.log(2 * math.pi * math.e / 5), abs=0.05)


def test_the_short_form_of_a_posterior(tree):
    network, model, x = tree
    guide = auto_faithful_guide(model, x)
    posterior = guide.posterior(x, num_draws=50, seed=3, progress=False)
    same = sample_posterior(model, guide, x, num_draws=50, seed=3, progress=False)
    assert all(torch.equal(posterior.draws[name], same.draws[name]) for name in same.draws)
    error = posterior.evidence.log_evidence - torch.as_tensor(network.log_evidence(x.numpy()))
    assert (error.abs() < 6 * posterior.evidence.standard_error + 1e-9).all()
