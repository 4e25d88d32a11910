"""The default optimiser: its rates, its state, and Pyro's SVI with it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer import default_optimizer
from pyro_graphflows.infer.optimizers import FallingAdam, make_optimizer
from pyro_graphflows.infer.parameters import ParameterSet


def test_the_rate_stays_and_then_falls_to_a_hundredth():
    value = torch.nn.Parameter(torch.tensor(5.0))
    optimizer = FallingAdam([value], lr=0.1, num_steps=10)
    rates = []
    for _ in range(13):
        optimizer.zero_grad()
        (value**2).backward()
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:6] == [0.1] * 6
    expected = [0.1 * 0.01 ** (k / 5) for k in (1, 2, 3, 4)]
    assert rates[6:10] == pytest.approx(expected)
    assert rates[10:] == pytest.approx([0.001] * 3)


def test_a_state_goes_on_where_it_stopped():
    def run(steps, state=None):
        value = torch.nn.Parameter(torch.ones(2))
        optimizer = FallingAdam([value], lr=0.1, num_steps=8)
        if state is not None:
            value.data.copy_(state[0])
            optimizer.load_state_dict(state[1])
        for _ in range(steps):
            optimizer.zero_grad()
            (value**2).sum().backward()
            optimizer.step()
        return value.detach().clone(), optimizer.state_dict()

    torch.testing.assert_close(run(7)[0], run(3, run(4))[0], rtol=0, atol=0)


@pytest.mark.parametrize(("steps", "rate"), [(0, 0.1), (10, 0.0), (10, float("nan"))])
def test_wrong_numbers_are_refused(steps, rate):
    with pytest.raises(GraphflowsError, match="Expected num_steps >= 1"):
        default_optimizer(steps, lr=rate)


def test_regression_in_raw_units_by_svi():
    """Incomes by body heights: intercept and slope are far from one, and nearly determine each other."""
    height = 66 + 4 * torch.randn(200)
    income = -6e4 + 1.2e3 * height + 2e4 * torch.randn(200)

    def model():
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), torch.tensor([1e6, 1e4])).to_event(1))
        mean = beta[..., :1] + beta[..., 1:] * height
        pyro.sample("income", dist.Normal(mean, 2e4).to_event(1), obs=income)

    design = torch.stack([torch.ones(200), height], -1)
    prior = torch.tensor([1e12, 1e8]).diag()
    covariance = design @ prior @ design.T + 4e8 * torch.eye(200)
    exact = dist.MultivariateNormal(torch.zeros(200), covariance).log_prob(income)
    guide = auto_faithful_guide(model)
    guide.setup()
    svi = SVI(model, guide, default_optimizer(300), Trace_ELBO())
    for _ in range(300):
        svi.step()
    with torch.no_grad():
        loss = sum(svi.evaluate_loss() for _ in range(100)) / 100
    assert -0.05 < loss + float(exact) < 0.1


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_rates_that_are_none_are_refused_in_words(rate):
    with pytest.raises(GraphflowsError, match=f"finite and not negative; got {rate}"):
        make_optimizer(rate, ParameterSet(guide=torch.nn.Linear(1, 1)))
