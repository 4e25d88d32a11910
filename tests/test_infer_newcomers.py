"""Training calls that a newcomer gets wrong: the message says what came, which site it is, and what to do."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows import GraphflowsError, Schedule, auto_faithful_guide, fit


def line(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.Normal(a * x, 1.0), obs=y)


def another(x, y=None):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def known(x, y=None):
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@pytest.fixture
def data():
    return torch.randn(12), torch.randn(12)


@pytest.fixture
def guide(data):
    return auto_faithful_guide(line, *data, num_start_samples=200)


@pytest.mark.parametrize("schedule", [Schedule(num_steps=1), None], ids=["steps", "by itself"])
@pytest.mark.parametrize("model", [line, another, known])
@pytest.mark.filterwarnings("ignore:Found")
def test_latent_sites_that_the_guide_lacks(data, guide, model, schedule):
    """Pyro warns, and trains on something else."""
    expected = {
        line: r"it does not sample \['y'\]\. Give data of all sites",
        another: r"it does not sample \['b'\], and it samples \['a'\], which the model lacks",
        known: r"it samples \['a'\], which the model lacks",
    }[model]
    start = {name: value.clone() for name, value in guide.state_dict().items()}
    given = data[0] if model is line else data
    with pytest.raises(GraphflowsError, match=expected):
        fit(model, guide, given, schedule=schedule, progress=False)
    assert all(value.equal(start[name]) for name, value in guide.state_dict().items())


def test_sites_that_the_model_sums_over_are_not_missing(data):
    def mixture(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("N", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mean + k, 1.0), obs=y)

    guide = auto_faithful_guide(mixture, data[1], num_start_samples=200)
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    assert len(fit(mixture, guide, data[1], loss=loss, schedule=1, progress=False)) == 1
