from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain, Hierarchy, LinearGuide, normal_model, normal_posterior
from pyro import poutine
from pyro.infer import SVI
from torch import nn

from pyro_graphflows import IWAE_ELBO, auto_faithful_guide, log_evidence
from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.infer.particles import (
    PARTICLES,
    count_plate_dims,
    density_sites,
    evaluation_mode,
    find_data_plate,
    keep_dims,
    log_density,
    modules_of,
    particle_plate,
    plates_of,
    prototype,
    require_independent_particles,
    run_pair,
)


def test_keep_dims_sums_the_rest():
    values = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(keep_dims(values, (-3, -1)), values.sum(1))
    assert torch.equal(keep_dims(values, (-2,)), values.sum((0, 2)))
    assert torch.equal(keep_dims(values, ()), values.sum())
    assert torch.equal(keep_dims(values, (-3, -2, -1)), values)
    assert keep_dims(values, (-4, -1)).shape == (1, 4)
    assert keep_dims(values, (-4, -2), keepdim=True).shape == (1, 1, 3, 1)
    assert keep_dims(torch.tensor(2.0), (-2, -1)).tolist() == [[2.0]]
    assert keep_dims(torch.tensor(2.0), ()).item() == 2.0


def test_modules_behind_programs():
    guide = LinearGuide()
    for program in (
        guide,
        guide.forward,
        partial(guide.forward, num_data=3),
        poutine.scale(guide, scale=1.0),
        particle_plate(partial(poutine.mask(guide.forward, mask=True), num_data=3), 2, -2),
    ):
        assert modules_of(program, guide) == [guide]
    assert modules_of(normal_model, lambda x: guide(x)) == []


def test_evaluation_mode_keeps_each_submodules_own():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout().eval(), nn.Dropout()))
    before = [part.training for part in module.modules()]
    with evaluation_mode(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == before


def test_prototype_and_plates():
    hierarchy = Hierarchy()
    first = prototype(hierarchy.model, hierarchy.guide, (hierarchy.x,), {})
    assert first.max_plate_nesting == 1
    assert [name for name, _ in density_sites(first.model_trace)] == ["mu", "z", "x"]
    assert count_plate_dims(first.guide_trace) == 1
    assert find_data_plate(first.model_trace, None).name == "data"
    assert find_data_plate(first.model_trace, False) is None
    assert prototype(hierarchy.model, hierarchy.guide, (hierarchy.x,), {}, 3).max_plate_nesting == 3


def test_a_model_without_observations_has_the_plate_of_all_sites():
    trace = poutine.trace(poutine.block(normal_model, hide=["x"])).get_trace(torch.zeros(3))
    assert find_data_plate(trace, None).size == 3
    assert find_data_plate(poutine.trace(lambda: None).get_trace(), None) is None


def test_particles_are_no_plate_of_the_model():
    chain = Chain()
    model, guide = (particle_plate(program, 7, -2) for program in (chain.model, chain.guide))
    model_trace, guide_trace = run_pair(model, guide, chain.args, {})
    for name, site in density_sites(model_trace):
        assert [frame.name for frame in plates_of(site)] == ["data"]
        assert log_density(site).shape == (7, 5)
        assert PARTICLES not in name
    require_independent_particles(guide_trace, -2, 7)


def test_log_density_is_masked_and_not_scaled():
    mask = torch.tensor([True, False, True])
    model = poutine.scale(poutine.mask(normal_posterior, mask=mask), scale=3.0)
    _, site = next(density_sites(poutine.trace(model).get_trace(torch.zeros(3))))
    expected = dist.Normal(0.0, 0.5**0.5).log_prob(site["value"])
    assert torch.equal(log_density(site), torch.where(mask, expected, 0.0))


def test_shape_errors_of_the_model_are_pyros():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))  # no plate
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="invalid log_prob shape"):
        prototype(model, poutine.block(model, hide=["x"]), (torch.zeros(3),), {})


def test_enumerated_sites_need_permission():
    def model():
        pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    assert prototype(model, lambda: None, (), {}, allow_enumeration=True).max_plate_nesting == 0
    with pytest.raises(UnsupportedModelError, match=r"does not sample \['k'\]"):
        prototype(model, lambda: None, (), {})


# ----------------------------------------------------- models that are not written for batches of particles
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
