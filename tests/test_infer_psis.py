import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.ops.stats import fit_generalized_pareto as pyro_fit
from scipy.stats import genpareto

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.psis import (
    effective_sample_size,
    fit_generalized_pareto,
    psis_khat,
    smoothed_log_weights,
    smoothed_tail,
    tail_size,
)


def test_effective_sample_size_of_equal_and_of_one_weight():
    log_weights = torch.stack([torch.zeros(10), torch.full((10,), -math.inf)], 1)
    log_weights[3, 1] = 7.0
    assert effective_sample_size(log_weights).tolist() == pytest.approx([10.0, 1.0])


def test_effective_sample_size_against_its_definition():
    log_weights = torch.randn(50, 3)
    weights = log_weights.exp()
    expected = weights.sum(0) ** 2 / (weights**2).sum(0)
    assert torch.allclose(effective_sample_size(log_weights), expected)
    assert torch.allclose(effective_sample_size(log_weights.T + 400, dim=1), expected)


def test_effective_sample_size_of_no_weight_at_all():
    assert effective_sample_size(torch.full((4, 2), -math.inf)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.5, 0.9])
def test_pareto_fit_recovers_shape_and_scale(shape):
    draws = torch.as_tensor(genpareto.rvs(shape, scale=2.0, size=(4000, 25), random_state=1))
    k, sigma = fit_generalized_pareto(draws)
    # asymptotic standard error of k is (1 + k) / sqrt(n) for maximum likelihood; five of them for the mean of 25
    assert abs(k.mean().item() - shape) < 5 * (1 + shape) / math.sqrt(4000 * 25) + 0.01
    assert abs(sigma.mean().item() - 2.0) < 0.05


def test_pareto_fit_of_columns_equals_one_by_one_and_pyros():
    draws = torch.as_tensor(genpareto.rvs(0.4, size=(150, 4), random_state=2))
    k, sigma = fit_generalized_pareto(draws.T, dim=1)
    for column in range(4):
        k_pyro, sigma_pyro = pyro_fit(draws[:, column])
        assert (150 * k[column].item() + 5) / 160 == pytest.approx(k_pyro, rel=1e-6)
        assert sigma[column].item() == pytest.approx(sigma_pyro, rel=1e-6)


def test_pareto_fit_refuses_what_is_not_an_excess():
    with pytest.raises(GraphflowsError, match="at least two excesses"):
        fit_generalized_pareto(torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(GraphflowsError, match="at least two excesses"):
        fit_generalized_pareto(torch.ones(1, 3))


@pytest.mark.parametrize(("proposal", "expected"), [(1.2, -2.0), (0.6, 0.4), (0.4, 0.6)])
def test_khat_of_gaussian_proposals(proposal, expected):
    """Target N(0, 1), proposal N(0, v). For v < 1 the tail index is 1 - v; for v > 1 the weights are bounded by
    that at z = 0, which 1-d draws approach as z^2: an excess law with k = -2.
    """
    z = torch.randn(200_000, 4) * proposal**0.5
    khat = psis_khat(-(z**2) / 2 + z**2 / 2 / proposal)
    # convergence in the number of draws is logarithmic: only the rough size can be asked for
    assert (khat - expected).abs().max() < 0.25


def test_khat_of_equal_weights_and_of_too_few():
    assert psis_khat(torch.full((100,), -7.0)).item() == -math.inf
    assert psis_khat(-7.0 + 1e-16 * torch.randn(100)).item() == -math.inf
    assert psis_khat(torch.randn(10)).item() == math.inf  # a tail of two
    assert psis_khat(torch.randn(1)).item() == math.inf  # a single weight tells nothing
    assert psis_khat(torch.full((100,), -math.inf)).item() == math.inf


def test_khat_with_ties_at_the_threshold():
    """Ties with the threshold are left out."""
    log_weights = torch.zeros(1000)
    log_weights[:20] = torch.linspace(1, 2, 20)
    log_weights[20:200] = 0.01 * torch.randn(180)  # not few distinct values
    assert psis_khat(log_weights).isfinite().item()


def test_khat_of_few_distinct_weights():
    """Discrete latents: what matters is whether the values that make up the sum have been seen often."""
    often = torch.zeros(1000)
    often[:300] = 1.0
    rare_and_small = often.clone()
    rare_and_small[0] = 2.0  # seen once, less than a hundredth of the sum
    rare_and_large = often.clone()
    rare_and_large[:3] = 6.0  # seen three times, more than half of it
    log_weights = torch.stack([often, rare_and_small, rare_and_large, torch.full((1000,), -math.inf)], 1)
    log_weights += 1e-15 * torch.randn(1000, 4)  # equal up to rounding
    assert psis_khat(log_weights).tolist() == [-math.inf, -math.inf, math.inf, math.inf]
    zero_or_one = torch.zeros(1000)
    zero_or_one[:400] = -math.inf  # draws outside the support
    assert psis_khat(zero_or_one).item() == -math.inf


def test_smoothed_weights_against_arviz():
    psislw = getattr(pytest.importorskip("arviz_stats.base").array_stats, "psislw", None)
    if psislw is None:
        pytest.skip("this version of arviz_stats has no psislw")
    # 900: there the paper's ceil(3 sqrt(S)) and their floor agree
    log_weights = torch.randn(900, 4) * torch.tensor([0.5, 1.0, 2.0, 4.0])
    smoothed, khat = smoothed_log_weights(log_weights)
    theirs, their_khat = psislw(-log_weights.T.numpy())  # their argument is a log-likelihood
    assert khat.tolist() == pytest.approx(their_khat.tolist(), abs=1e-6)
    ours = torch.log_softmax(smoothed, 0)
    theirs = torch.as_tensor(theirs).T
    assert torch.allclose(ours, theirs - theirs.logsumexp(0), atol=1e-6)


def test_smoothing_keeps_what_is_no_tail():
    log_weights = torch.randn(1000, 2)
    log_weights[:, 1] = 0.0
    smoothed, khat = smoothed_log_weights(log_weights.T, dim=1)
    assert khat.tolist()[1] == -math.inf
    assert torch.equal(smoothed[1], log_weights[:, 1])
    order = log_weights[:, 0].argsort()
    size = tail_size(1000)
    assert torch.equal(smoothed[0, order[:-size]], log_weights[order[:-size], 0])
    tail = smoothed[0, order[-size:]]
    assert (tail.diff() > 0).all()
    assert (tail > log_weights[order[-size - 1], 0]).all()
    assert tail.max() <= log_weights[:, 0].max()
    few = torch.randn(8)
    assert torch.equal(smoothed_log_weights(few)[0], few)  # too few to judge


@settings(max_examples=25, deadline=None)
@given(st.integers(30, 400), st.floats(-300, 300), st.integers(0, 10**6))
def test_khat_does_not_see_constants_order_or_neighbours(num, constant, seed):
    generator = torch.Generator().manual_seed(seed)
    log_weights = torch.randn(num, 3, generator=generator, dtype=torch.float64)
    khat = psis_khat(log_weights)
    shuffled = log_weights[torch.randperm(num, generator=generator)] + constant
    assert torch.allclose(psis_khat(shuffled), khat, atol=1e-7)
    assert torch.allclose(psis_khat(log_weights[:, :1]), khat[:1])
    assert torch.allclose(psis_khat(log_weights.T.reshape(3, 1, num), dim=-1)[:, 0], khat)


def test_ripples_of_nearly_equal_weights_are_no_tail():
    """Many weights near a smooth maximum, few beyond it: the fit alone finds any shape, here infinite moments."""
    torch.manual_seed(0)
    ripples = -0.02 * torch.rand(20_000) ** 4
    ripples[:20] = torch.linspace(0.001, 0.06, 20)
    tail = ripples.sort().values[-tail_size(20_000) :].unsqueeze(-1)
    assert smoothed_tail(tail, ripples.sort().values[-tail_size(20_000) - 1].unsqueeze(-1))[1].item() > 0.7
    smoothed, khat = smoothed_log_weights(ripples)
    assert khat.item() == -math.inf
    assert torch.equal(smoothed, ripples)
    assert effective_sample_size(ripples).item() > 0.999 * 20_000
    heavy = -(1 - torch.rand(20_000)).log() * 0.9  # Pareto weights of shape 0.9
    assert psis_khat(heavy).item() > 0.7
