"""The start of guides: what samples of the prior set."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.regression import location_and_scale


def test_normal_samples_are_standardised_by_their_moments():
    samples = 3.0 + 2.0 * torch.randn(10_000, 4, dtype=torch.float64)
    shift, scale = location_and_scale(samples)
    torch.testing.assert_close(shift, samples.mean(0), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(scale, samples.std(0), rtol=1e-12, atol=0.0)


def test_columns_that_hardly_vary_keep_their_moments():
    spike = torch.zeros(1000, 1, dtype=torch.float64)
    spike[:50] = 100.0
    torch.testing.assert_close(location_and_scale(spike)[1], spike.std(0))


@pytest.mark.parametrize("family", ["normal", "flow"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_heavy_tail_does_not_make_the_start_wide(family, seed):
    # the scale of theta is half-Cauchy: the standard deviation of 10,000 draws is that of the largest
    def model(y):
        tau = pyro.sample("tau", dist.HalfCauchy(torch.ones(())))
        with pyro.plate("data", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    pyro.set_rng_seed(seed)
    y = torch.randn(8)
    guide = auto_faithful_guide(model, y, family=family)
    network = guide.block_of("theta").conditionals
    _, scale = network.output_units("theta")
    assert (scale > 1.0).all()
    assert (scale < 10.0).all()


def test_data_in_large_numbers_are_not_drawn_thousands_of_times(monkeypatch):
    # with the default of 10,000 joint samples, 20,000 data would be 200 million numbers
    drawn = []

    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)
            drawn.append(y.numel())

    monkeypatch.setattr("pyro_graphflows.guides.samples.MOST_NUMBERS", 300_000)
    x = torch.randn(1000)
    y = torch.randn(1000)
    guide = auto_faithful_guide(model, x, y)
    assert max(drawn) <= 300_000
    assert max(drawn) > 100_000  # and there still are samples to start from
    assert guide(x, y)["slope"].isfinite()
