from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain, Hierarchy, LinearGuide, normal_model, normal_posterior
from pyro import poutine
from torch import nn

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
