"""Priors that a model masks, ``dist.Normal(0.0, 1.0).mask(False)``: they are flat, and the guide counts there."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_graphflows import auto_faithful_guide, check_guide, load_guide


def by_distribution(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0).mask(False))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def by_handler(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=False):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def inside_of_a_vector(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).mask(False).to_event(1)).squeeze(-1)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def log_evidence(y):
    """Of a normal mean with a flat prior."""
    n = len(y)
    return -0.5 * ((n - 1) * math.log(2 * math.pi) + math.log(n) + (y - y.mean()).square().sum().item())


@pytest.mark.parametrize("model", [by_distribution, by_handler, inside_of_a_vector])
def test_masked_priors_are_flat(model, tmp_path):
    """Without the guide's own term the mean ran to one point; its sd is 1/sqrt(n), and far from what is masked."""
    y = 50.0 + torch.randn(5)
    exact = log_evidence(y)
    guide = auto_faithful_guide(model, y)
    assert Trace_ELBO(num_particles=20).loss(model, guide, y) == pytest.approx(-exact, abs=0.02)
    assert TraceMeanField_ELBO(num_particles=20).loss(model, guide, y) == pytest.approx(-exact, abs=0.02)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(60):
        svi.step(y)
    posterior = guide.posterior(y, num_draws=2000, seed=0, progress=False)
    assert posterior.evidence.log_evidence == pytest.approx(exact, abs=0.05)
    total = posterior.draws["a"] + posterior.draws["b"].reshape(-1)
    assert total.mean().item() == pytest.approx(y.mean().item(), abs=0.1)
    assert total.std().item() == pytest.approx(5**-0.5, rel=0.15)
    guide.save(tmp_path / "guide.safetensors")
    loaded = load_guide(tmp_path / "guide.safetensors", model)
    assert Trace_ELBO(num_particles=20).loss(model, loaded, y) == pytest.approx(-exact, abs=0.1)


def test_padding_counts_nowhere():
    """What is masked together with all that is computed from it has no term in the guide either."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
            with poutine.mask(mask=False):
                z = pyro.sample("z", dist.Normal(mean, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(5)
    guide = auto_faithful_guide(model, y)
    exact = dist.MultivariateNormal(torch.zeros(5), 1.0 + torch.eye(5)).log_prob(y).item()
    assert Trace_ELBO(num_particles=20).loss(model, guide, y) == pytest.approx(-exact, abs=0.02)
    assert check_guide(model, guide, Trace_ELBO, y).safe


def test_checks_tell_flat_priors_from_padding():
    y = torch.randn(5)
    for guide in (auto_faithful_guide(by_distribution, y), AutoNormal(by_distribution)):
        guide(y)
        assert check_guide(by_distribution, guide, Trace_ELBO, y).safe


def test_checks_name_priors_that_are_masked_in_part():
    """Masked entries that data depend on have no term in the guide: they would run to one point."""
    mask = torch.tensor([True, False, True, False, True])

    def model(y, both):
        with pyro.plate("data", len(y)):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with poutine.mask(mask=mask | (not both)):
                pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    y = torch.randn(5)
    for both in (True, False):
        check = check_guide(model, auto_faithful_guide(model, y, both), Trace_ELBO, y, both)
        assert check.safe == both
        assert ("'z' count in the model where their prior is masked" in str(check)) != both
