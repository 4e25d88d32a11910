import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_posteriors import Regression
from scipy.optimize import minimize

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer import compare, sample_posterior
from pyro_graphflows.infer.comparison import stacking_weights


@pytest.fixture
def regression():
    return Regression()


def without_slope(regression):
    def model(x, y):
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a, regression.noise), obs=y)

    def guide(x, y):
        variance = 1 / (1 / 4 + len(x) / regression.noise**2)
        pyro.sample("a", dist.Normal(variance * y.sum() / regression.noise**2, variance**0.5))

    return sample_posterior(model, guide, regression.x, regression.y, num_draws=2000, seed=0)


def test_the_better_model_is_first(regression):
    right = sample_posterior(
        regression.model, regression.guide, regression.x, regression.y, num_draws=2000, seed=0
    )
    table = compare({"constant": without_slope(regression), "line": right}, seed=1)
    assert list(table.rows) == ["line", "constant"]
    assert table["line"]["diff"] == 0.0
    assert table["line"]["log evidence"] == pytest.approx(
        regression.log_evidence(regression.x, regression.y).item()
    )
    exact = regression.loo()
    assert table["line"]["elpd"] == pytest.approx(exact.sum().item(), abs=0.1)
    first, second = right.loo(seed=1), without_slope(regression).loo(seed=1)
    gap = second.pointwise - first.pointwise
    assert table["constant"]["diff"] == pytest.approx(gap.sum().item())
    assert table["constant"]["diff se"] == pytest.approx(math.sqrt(20) * gap.std().item())
    assert table["line"]["weight"] + table["constant"]["weight"] == pytest.approx(1.0)
    assert table["line"]["weight"] > 0.9
    from_results = compare({"line": first, "constant": second})
    assert from_results["constant"]["diff"] == table["constant"]["diff"]
    assert math.isnan(from_results["line"]["log evidence"])


def test_stacking_weights_against_a_general_optimiser():
    terms = torch.randn(200, 3) + torch.tensor([0.0, 0.3, -2.0])
    weights = stacking_weights(terms)
    assert weights.sum().item() == pytest.approx(1.0)

    def loss(logits):
        w = torch.log_softmax(torch.as_tensor([0.0, *logits]), 0)
        return -torch.logsumexp(terms + w, 1).mean().item()

    best = minimize(
        loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-13, "maxiter": 5000}
    )
    found = -torch.logsumexp(terms + weights.log(), 1).mean().item()
    assert found == pytest.approx(best.fun, abs=1e-8)
    assert found <= best.fun + 1e-9
    alone = stacking_weights(torch.stack([torch.zeros(50), torch.full((50,), -1.0)], 1))
    assert alone.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_what_cannot_be_compared(regression):
    posterior = without_slope(regression)
    other = Regression(num_data=5)
    with pytest.raises(GraphflowsError, match="at least two models"):
        compare({"one": posterior})
    with pytest.raises(GraphflowsError, match=r"the same observed values; those of 'b' differ"):
        compare({"a": posterior, "b": without_slope(other)})
    with pytest.raises(GraphflowsError, match="Expected 'b' to be a Posterior or a LOO; got int"):
        compare({"a": posterior, "b": 3})
    with pytest.raises(GraphflowsError, match="the same data left out of all models"):
        compare({"a": posterior.loo(), "b": without_slope(other).loo()})
