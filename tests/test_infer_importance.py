import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain
from infer_posteriors import Groups

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.infer.importance import ImportanceSampler
from pyro_graphflows.infer.particles import find_data_plate, prototype


def sampler_of(model, guide, args, *, vectorize=True, per_datum=True):
    first = prototype(model, guide, args, {}, allow_enumeration=True)
    plate = find_data_plate(first.model_trace, None) if per_datum else None
    return ImportanceSampler(model, guide, args, {}, first, plate, vectorize)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("per_datum", [True, False])
def test_weights_of_an_exact_guide(vectorize, per_datum):
    chain = Chain(num_data=4)
    sampler = sampler_of(chain.model, chain.guide, chain.args, vectorize=vectorize, per_datum=per_datum)
    size = 5 if vectorize else 1
    weights = sampler.log_weights(sampler.run(size))
    exact = chain.log_evidence() if per_datum else chain.log_evidence().sum()
    assert torch.allclose(weights, exact.expand(size, *exact.shape))


def test_batches_that_mix_particles_are_told():
    groups = Groups()

    def model(y, s):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("groups", 6):
            theta = pyro.sample("theta", dist.Normal(mu, 1.5))
        pyro.sample("y", dist.Normal(theta.sum(), 1.0), obs=y.sum())

    sampler = sampler_of(model, groups.guide(), groups.args, per_datum=False)
    batch = sampler.run(3)
    with pytest.raises(UnsupportedModelError, match="differ at 'y'"):
        sampler.require_same_alone(batch)
    right = sampler_of(groups.model, groups.guide(), groups.args, per_datum=False)
    right.require_same_alone(right.run(3))


def test_sites_to_sum_out_are_found():
    def model(y):
        c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    sampler = sampler_of(model, guide, (torch.tensor(0.5),))
    assert sampler.enumerates
    traces = sampler.run(4)
    z = traces[1].nodes["z"]["value"].flatten()
    prior = torch.logaddexp(
        math.log(0.3) + dist.Normal(1.0, 1.0).log_prob(z), math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(z)
    )
    expected = prior + dist.Normal(z, 1.0).log_prob(torch.tensor(0.5)) - dist.Normal(0.0, 1.0).log_prob(z)
    assert torch.allclose(sampler.log_weights(traces), expected)
