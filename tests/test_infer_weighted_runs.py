"""Weighted runs of a model and a guide: which draws are kept, and that they are the same when run again."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from tqdm.auto import tqdm

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer.weighted_runs import WeightedRuns, evaluated, without_replacement


def model(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * m)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def guide(x):
    pyro.sample("m", dist.Normal(x.mean(), 0.5))


def test_draws_are_run_again_as_they_were_and_weighed_exactly():
    x = torch.tensor([0.3, 1.2, -0.4])
    with evaluated(model, guide):
        source = WeightedRuns.of(model, guide, (x,), {})
        states, draws, weights = [], [], []
        for _ in range(2):
            for part, state, traces in source.runs(4):
                begin = sum(map(len, weights))
                states.append((slice(begin, begin + part.stop - part.start), state))
                draws.append(source.values(traces, part.stop - part.start))
                weights.append(source.log_weights(traces))
        every = torch.cat([each["m"] for each in draws])
        chosen = torch.tensor([6, 1, 3])
        kept = source.gather(states, chosen, tqdm(disable=True))
    assert torch.equal(kept["m"], every[chosen])
    assert torch.equal(torch.cat([each["twice"] for each in draws]), 2 * every)
    exact = dist.Normal(0.0, 1.0).log_prob(every) - dist.Normal(x.mean(), 0.5).log_prob(every)
    exact = exact + dist.Normal(every[:, None], 1.0).log_prob(x).sum(-1)
    assert torch.allclose(torch.cat(weights), exact)


def test_kept_draws_are_distinct_and_follow_the_weights():
    weights, number = torch.tensor([0.6, 0.3, 0.1, 0.0]), 20_000
    chosen = without_replacement(weights.log()[:, None].expand(4, number), 2)
    assert bool((chosen[0] != chosen[1]).all())
    assert not bool((chosen == 3).any())
    # P(0 is kept) = 0.6 + 0.3 * 0.6 / 0.7 + 0.1 * 0.6 / 0.9; five standard errors: one failure in a million
    expected = 0.6 + 0.3 * 0.6 / 0.7 + 0.1 * 0.6 / 0.9
    share = float((chosen == 0).any(0).double().mean())
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / number)


def test_too_few_draws_with_a_weight_are_refused():
    with pytest.raises(
        GraphflowsError, match="at least 3 draws of the pool of 4 with a positive weight; got 2"
    ):
        without_replacement(torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])[:, None], 3)


def test_a_model_without_data_is_refused():
    def prior():
        pyro.sample("m", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedModelError, match="Expected the model to have observed sites"):
        WeightedRuns.of(prior, prior, (), {})
