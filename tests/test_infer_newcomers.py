"""Calls of training and of posteriors that a newcomer gets wrong: what came, which site it is, and what to do."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows import (
    GraphflowsError,
    Schedule,
    TrainingData,
    auto_faithful_guide,
    compare,
    fit,
    sample_posterior,
)


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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_steps": 10}, r"argument 'num_steps'\. Rates .* schedule=Schedule\(num_steps=\)"),
        ({"optimiser": 1e-2}, "argument 'optimiser'; did you mean 'optimizer'"),
        ({"loss": "elbo"}, "loss to be 'auto', an ELBO object or"),
        ({"optimizer": pyro.optim.Adam}, r'pyro\.optim\.Adam\({"lr": 1e-3}\); got one without'),
    ],
)
def test_options_of_fit_that_are_none(data, guide, options, expected):
    with pytest.raises((GraphflowsError, TypeError), match=expected):
        fit(line, guide, data, progress=False, **{"schedule": 1, **options})


def test_data_that_are_no_tensors(data, guide):
    class Column:
        """As those of data frames: numbers, one after the other."""

        def __iter__(self):
            return iter([1.0, 2.0])

    with pytest.raises(GraphflowsError, match=r"counts the data; got float\. Give tensors or arrays"):
        fit(line, guide, Column(), schedule=1, progress=False)


def test_posteriors_of_other_arguments(data, guide):
    expected = "unexpected keyword argument 'num_samples'. Beside .* num_draws, seed and progress"
    with pytest.raises(GraphflowsError, match=expected):
        guide.posterior(*data, num_samples=10)
    with pytest.raises(GraphflowsError, match="missing a required argument: 'x'"):
        guide.posterior()
    with pytest.raises(GraphflowsError, match=r"the guide to be a function .* got a tensor of shape \(12,\)"):
        sample_posterior(line, *data)


def test_validation_data_of_fewer_sites(data):
    """What is left out would be latent: the loss was that of another model."""
    x, y = data
    with pytest.raises(GraphflowsError, match="the arguments that the data have, 2; got 1"):
        TrainingData((x, y), validation=x)
    with pytest.raises(GraphflowsError, match=r"the data have, \['x', 'y'\]; got \['x'\]"):
        TrainingData({"x": x, "y": y}, validation={"x": x})
    TrainingData((x, y), validation={"x": x, "y": y})


def test_models_without_names(data, guide):
    posterior = guide.posterior(*data, num_draws=10, progress=False)
    with pytest.raises(GraphflowsError, match=r"models=\{name: posterior\}.*got list"):
        compare([posterior, posterior])
