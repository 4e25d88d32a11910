"""Likelihoods of nodes against the distributions of Pyro."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_graphflows import ModelGraph
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.models import SIReNVAE
from pyro_graphflows.models.likelihood import DatumLikelihood


def test_likelihoods_are_those_of_the_distributions():
    graph = ModelGraph([("a", n) for n in "uvwx"], list("uvwx"), event_sizes={"a": 2, "u": 2, "v": 3, "w": 2})
    likelihood = {"u": "bernoulli", "v": "normal", "w": ("categorical", 4), "x": "normal"}
    vae = SIReNVAE(graph, likelihood=likelihood)
    x = torch.cat(
        [torch.randint(2, (9, 2)), 5 * torch.randn(9, 3), torch.randint(4, (9, 2)), torch.randn(9, 1)], 1
    )
    vae.standardize_(x)
    parameters = torch.randn(9, vae.observation.num_parameters)
    total = 0
    for node, part in vae.observation.columns.items():
        law = vae.observation.distribution(parameters, node)
        value = x[:, part] if part.stop - part.start > 1 else x[:, part.start]
        assert law.batch_shape == (9,)
        total = total + law.log_prob(value)
        if likelihood[node] != ("categorical", 4):
            torch.testing.assert_close(vae.observation.mean(parameters)[:, part], law.mean.view(9, -1))
    torch.testing.assert_close(vae.observation.log_prob(parameters, x), total)
    features = vae.observation.to_features(x)
    assert features.shape == (9, 2 + 3 + 8 + 1)
    torch.testing.assert_close(features[:, 5:9].argmax(1).double(), x[:, 5])
    assert vae.elbo(x, num_particles=3).shape == (9,)
    drawn = vae.sample(50)
    assert set(drawn[:, 5:7].unique().tolist()) <= {0, 1, 2, 3}
    assert set(drawn[:, :2].unique().tolist()) <= {0, 1}
    assert math.isfinite(Trace_ELBO().loss(vae.model, vae.guide, x))


def test_likelihoods_of_a_whole_datum():
    outputs = torch.randn(5, 6)
    binary = DatumLikelihood("bernoulli", torch.Size([2, 3]))
    assert binary.num_outputs == 6
    x = torch.randint(2, (5, 2, 3)).double()
    expected = dist.Bernoulli(logits=outputs).log_prob(x.flatten(1)).sum(-1)
    torch.testing.assert_close(binary.distribution(outputs).log_prob(x), expected)
    normal = DatumLikelihood("normal", torch.Size([3]))
    assert normal.num_outputs == 6
    found = normal.distribution(outputs)
    torch.testing.assert_close(found.mean, outputs[:, :3].sigmoid())
    torch.testing.assert_close(found.variance, outputs[:, 3:].exp())
    own = DatumLikelihood(lambda logits: dist.Poisson(logits.exp()).to_event(1), torch.Size([6]))
    assert own.distribution(outputs).event_shape == (6,)
    own.check(-x)
    for likelihood, values, match in (
        (binary, x + 0.5, "zeros and ones"),
        (normal, x - 0.5, r"data in \[0, 1\]"),
    ):
        likelihood.check(x)
        with pytest.raises(GraphflowsError, match=match):
            likelihood.check(values)
    with pytest.raises(GraphflowsError, match="return 6 numbers"):
        normal.distribution(outputs[:, :5])
    with pytest.raises(GraphflowsError, match="to return a distribution"):
        DatumLikelihood(torch.exp, torch.Size([6])).distribution(outputs)
    with pytest.raises(GraphflowsError, match="'bernoulli', 'normal' or a function"):
        DatumLikelihood("poisson", torch.Size([6]))
