"""Models that are not written for batches of particles are told apart from those that are."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_graphflows import IWAE_ELBO, auto_faithful_guide, log_evidence
from pyro_graphflows.errors import UnsupportedModelError


def mixing_model(x):
    # the sum runs over the particles too: alone it is a sum over three coordinates
    with pyro.plate("parts", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)


def right_model(x):
    with pyro.plate("parts", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("x", dist.Normal(z.sum(-1, keepdim=z.dim() > 1), 1.0), obs=x)


def failing_model(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(torch.ones(3) @ z, 1.0), obs=x)


def half_the_posterior(x):
    with pyro.plate("parts", 3):
        pyro.sample("z", dist.Normal(x / 4, 0.9))


def prior_guide(x):
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


X = torch.tensor(0.7)
EXACT = dist.Normal(0.0, 2.0).log_prob(X)


def test_a_model_that_mixes_the_particles_is_refused_with_the_site():
    with pytest.raises(UnsupportedModelError, match=r"'x' .* among the particles, .* alone.*vectorize=False"):
        log_evidence(mixing_model, half_the_posterior, X, num_particles=100)


def test_one_by_one_it_is_right():
    pyro.set_rng_seed(0)
    found = log_evidence(mixing_model, half_the_posterior, X, num_particles=2000, vectorize=False)
    assert abs(found.log_evidence - EXACT) < 4 * found.standard_error


def test_a_model_for_batches_passes():
    pyro.set_rng_seed(0)
    found = log_evidence(right_model, half_the_posterior, X, num_particles=2000)
    assert abs(found.log_evidence - EXACT) < 4 * found.standard_error


def test_an_error_in_the_batch_says_that_it_is_the_batch():
    with pytest.raises(
        UnsupportedModelError, match=r"ran alone, and failed with 10 particles.*vectorize=False"
    ):
        log_evidence(failing_model, prior_guide, X, num_particles=10)


def test_a_guide_that_mixes_the_particles_is_refused():
    def guide(x):
        with pyro.plate("parts", 3):
            pyro.sample("z", dist.Normal(x / 4, 0.9 + 0.01 * torch.randn(())))

    def mixing(x):
        z0 = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("parts", 3):
            pyro.sample("z", dist.Normal(z0.mean(), 1.0))

    def model(x):
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("parts", 3):
            z = pyro.sample("z", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(UnsupportedModelError, match="'z'"):
        log_evidence(right_model, guide, X, num_particles=10)
    with pytest.raises(UnsupportedModelError, match="'z'"):
        log_evidence(model, mixing, torch.zeros(3), num_particles=10, data_plate=False)


def test_iwae_warns_of_a_model_that_mixes_the_particles():
    with pytest.warns(UserWarning, match="'x' .* among the particles"):
        IWAE_ELBO(num_particles=10).loss(mixing_model, half_the_posterior, X)


def test_iwae_with_nested_particles_and_subsampling_is_silent():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x), subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    x = torch.linspace(-1.0, 1.0, 8)
    guide = auto_faithful_guide(model, x)
    loss = IWAE_ELBO(num_particles=5, num_outer_particles=2)
    assert torch.isfinite(torch.tensor(SVI(model, guide, pyro.optim.Adam({}), loss).step(x)))


def test_iwae_with_nested_particles_of_a_full_plate_is_silent():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.linspace(-1.0, 1.0, 8)
    guide = auto_faithful_guide(model, x)
    assert IWAE_ELBO(num_particles=5, num_outer_particles=2).loss(model, guide, x) > 0.0


def test_a_module_in_training_mode_does_not_make_iwae_warn():
    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(2)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                mean = self.norm(z.reshape(-1, 2)).reshape(z.shape)
                pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    model = Model()
    assert model.training
    IWAE_ELBO(num_particles=5).loss(model, guide, torch.randn(6, 2))
    assert model.training
