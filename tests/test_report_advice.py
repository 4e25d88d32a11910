"""What a report advises: the two judgements never contradict the steps, nor each other."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows import AutoFaithfulGuide, sample_posterior
from pyro_graphflows.infer import History
from pyro_graphflows.report.advice import Findings, judge_draws, judge_model, next_steps, unlikely


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.fixture
def found():
    x = torch.randn(20)
    guide = AutoFaithfulGuide(model).setup(x)
    posterior = sample_posterior(model, guide, x, num_draws=50, progress=False)
    posterior = replace(posterior, khat=torch.zeros(20), ess=torch.full((20,), 50.0))
    history = History(stop_reason="the estimated gap to the log-evidence is next to nothing")
    return Findings(guide.model_graph, guide, 60.0, history=history, posterior=posterior)


def with_khat(found, bad):
    khat = torch.zeros(20)
    khat[:bad] = 1.2
    return replace(found, posterior=replace(found.posterior, khat=khat))


def joined(found):
    return " ".join(next_steps(found))


def test_all_is_well(found):
    assert judge_draws(found) == (
        "good",
        "The draws are those of the posterior: their weights are nearly even.",
    )
    assert judge_model(found)[0] == "good"
    assert "Use the draws as they are" in joined(found)
    assert "compare()" in joined(found)


def test_uneven_weights(found):
    uneven = replace(found, posterior=replace(found.posterior, ess=torch.full((20,), 20.0)))
    assert judge_draws(uneven)[0] == "good"
    assert "posterior.reweighted()" in joined(uneven)
    assert "refined" not in joined(uneven)


@pytest.mark.parametrize(("bad", "kind"), [(0, "good"), (2, "care"), (3, "bad"), (20, "bad")])
def test_some_data_are_not_repaired_by_weights(found, bad, kind):
    """One way to go for each case: chains for a few data, training for many, weights for none."""
    some = with_khat(found, bad)
    assert judge_draws(some)[0] == kind
    text = joined(some)
    assert ("Use posterior.refined()" in text) == (kind == "care")
    assert ("--family spline" in text) == (kind == "bad")
    assert ("reweighted" in text or "as they are" in text) == (kind == "good")
    assert "longer" not in text


def test_nan_is_no_good_khat(found):
    posterior = replace(found.posterior, khat=torch.full((20,), torch.nan))
    assert judge_draws(replace(found, posterior=posterior))[0] == "bad"


def test_longer_training_is_advised_only_where_it_was_cut_short(found):
    history = History(stop_reason="the time or the number of steps is used up")
    cut = replace(with_khat(found, 9), history=history, family="spline")
    assert "Train longer than 60 s" in joined(cut)
    assert "--family" not in joined(cut)
    assert "Train longer" not in joined(replace(found, history=history))
    alone = replace(with_khat(found, 9), family="spline")
    assert next_steps(alone)[0].startswith("Correct the draws by Markov chains")


def test_an_untrained_guide(found):
    none = replace(found, history=None)
    assert judge_draws(none)[0] == "care"
    assert next_steps(none)[0] == "Train the guide: --train 60."


def test_a_model_that_does_not_fit_comes_first(found):
    """The draws may be right all the same, and that is said beside it."""
    misfit = replace(found, extreme=("the mean of x", "the least of x"))
    assert judge_model(misfit) == (
        "bad",
        "The model does not fit the data: its predictions do not reach the mean of x and the least of x.",
    )
    assert next_steps(misfit)[0].startswith("Change the model")
    assert judge_draws(misfit)[0] == "good"
    assert "compare()" not in joined(misfit)


def test_surprising_data(found):
    tail = torch.full((20,), 0.5)
    tail[:4] = 1e-4
    strange = replace(found, surprise=tail)
    assert unlikely(strange) == (4, 0)
    assert "4 data are unlike" in judge_model(strange)[1]
    assert unlikely(replace(found, surprise="an improper prior")) == (0, 0)
    many = replace(found, surprise=torch.full((10_000,), 0.5).index_fill(0, torch.arange(15), 1e-4))
    assert unlikely(many) == (15, 19)
    assert judge_model(many)[0] == "good"


def test_other_data(found):
    local = replace(found, calibration="left out, since the guide has parameters for these data alone (z)")
    assert "pool='deepset'" in joined(local)
    assert "simulat" not in joined(replace(found, calibration="an improper prior"))
