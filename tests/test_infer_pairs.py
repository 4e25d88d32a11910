"""A guide where the model belongs, and what is no program, are refused in words by all that take a pair."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_graphflows import (
    IWAE_ELBO,
    InferenceCompilation,
    auto_faithful_guide,
    check_guide,
    fit,
    log_evidence,
    sample_posterior,
    sbc_ranks,
)
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer import calibration_report, importance_log_weights


def model(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


X = torch.tensor([0.5, 1.5, 2.0])
CALLS = {
    "fit": lambda model, guide: fit(model, guide, X, progress=False, schedule=1),
    "check_guide": lambda model, guide: check_guide(model, guide, Trace_ELBO(), X),
    "log_evidence": lambda model, guide: log_evidence(model, guide, X),
    "importance_log_weights": lambda model, guide: importance_log_weights(model, guide, X),
    "sample_posterior": lambda model, guide: sample_posterior(model, guide, X),
    "sbc_ranks": lambda model, guide: sbc_ranks(model, guide, num_simulations=10),
    "calibration_report": lambda model, guide: calibration_report(model, guide, num_simulations=10),
    "InferenceCompilation": InferenceCompilation,
    "IWAE_ELBO": lambda model, guide: IWAE_ELBO(2).loss(model, guide, X),
}


@pytest.fixture(scope="module")
def guides():
    ours = auto_faithful_guide(model, X.double())
    pyros = AutoNormal(model)
    pyros(X.double())
    return ours, pyros


@pytest.mark.parametrize("name", CALLS)
def test_a_guide_is_no_model(name, guides):
    for guide in guides:
        with pytest.raises(GraphflowsError, match=f"got a guide, {type(guide).__name__}.*Exchange"):
            CALLS[name](guide, model)


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_called_is_neither(name, guides):
    with pytest.raises(GraphflowsError, match=r"Expected the guide to be a function.*got None"):
        CALLS[name](model, None)
    with pytest.raises(GraphflowsError, match=r"Expected the model to be a function.*got a tensor"):
        CALLS[name](X, guides[0])


def test_a_seed_is_an_integer(guides):
    with pytest.raises(GraphflowsError, match="Expected seed to be an integer or None; got 'a'"):
        fit(model, guides[0], X, seed="a", schedule=1, progress=False)
    with pytest.raises(GraphflowsError, match=r"Expected seed to be an integer or None; got 0\.5"):
        sample_posterior(model, guides[0], X, seed=0.5)
