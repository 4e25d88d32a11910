"""Guides for data that are one vector, behind a design matrix that is an argument."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_graphflows.guides import auto_faithful_guide

N, K = 80, 5


def vector(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([K]).to_event(1))
    pyro.sample("y", dist.Normal(b @ x.mT, 0.5).to_event(1), obs=y)


def plate(x, y):
    with pyro.plate("coefficients", K):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(b @ x.mT, 0.5).to_event(1), obs=y)


@pytest.mark.parametrize("model", [vector, plate])
def test_many_numbers_that_simulations_leave_as_they_are_are_not_read(model):
    torch.manual_seed(0)
    x = torch.randn(N, K)
    joint = dist.MultivariateNormal(torch.zeros(N), x @ x.T + 0.25 * torch.eye(N))
    y = joint.sample()
    guide = auto_faithful_guide(model, x, y)
    assert "x (not read: many numbers that simulations leave as they are), y" in guide.describe()
    assert sum(p.numel() for p in guide.parameters()) < 20_000  # those of x would be a hundred thousand
    with torch.no_grad():
        losses = torch.tensor([Trace_ELBO().differentiable_loss(model, guide, x, y) for _ in range(20)])
    assert losses.mean() + joint.log_prob(y) < 0.1


def test_few_numbers_are_read():
    x = torch.randn(10, K)
    guide = auto_faithful_guide(vector, x, torch.randn(10))
    assert "b | x, y" in guide.describe()
