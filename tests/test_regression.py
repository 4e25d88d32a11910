"""Regressions on samples against least squares by NumPy, exact tables and stationary points."""

import math

import numpy as np
import pytest
import torch
from versions import TORCH

from pyro_graphflows.regression import (
    HELD_OUT,
    RESIDUAL_FLOOR,
    RIDGE,
    RIDGE_TIE,
    RIDGES,
    Moments,
    location_and_scale,
    logistic_regression,
    regression_with_scales,
    ridge_slopes,
    square_root,
)

# ---------------------------------------------------------------- location and scale


def test_location_and_scale_of_few_rows():
    nothing = location_and_scale(torch.zeros(0, 2))
    assert [part.tolist() for part in nothing] == [[0.0, 0.0], [1.0, 1.0]]
    one = location_and_scale(torch.tensor([[3.0, -2.0]]))
    assert [part.tolist() for part in one] == [[3.0, -2.0], [1.0, 1.0]]
    empty = location_and_scale(torch.zeros(5, 0))
    assert [part.shape for part in empty] == [(0,), (0,)]


def test_rows_with_a_missing_entry_are_left_out():
    whole = torch.tensor([[1.0, 2.0], [3.0, 5.0], [5.0, 11.0]])
    holes = torch.tensor([[math.nan, 2.0], [math.inf, 0.0], [0.0, -math.inf]])
    shift, scale = location_and_scale(torch.cat([holes, whole]))
    assert shift.tolist() == [3.0, 6.0]
    torch.testing.assert_close(scale, torch.tensor([2.0, math.sqrt(21.0)]))


@pytest.mark.parametrize("value", [0.0, 1e6, -3.7])
def test_a_constant_column_has_scale_one(value):
    shift, scale = location_and_scale(torch.stack([torch.full((50,), value), torch.arange(50.0)], -1))
    assert shift[0].item() == pytest.approx(value)
    assert scale[0] == 1.0
    assert scale[1].item() == pytest.approx(np.arange(50.0).std(ddof=1))


def test_values_whose_squares_overflow_have_a_scale():
    sample = 1e30 * torch.arange(-50.0, 51.0).unsqueeze(-1)
    shift, scale = location_and_scale(sample)
    assert abs(shift.item()) < 1e24
    assert scale.item() == pytest.approx(1e30 * np.arange(101.0).std(ddof=1), rel=1e-5)
    assert location_and_scale(sample[:1])[1].item() == 1.0


# ---------------------------------------------------------------- least squares


def by_numpy(rows, inputs, own):
    """Return slopes, offset and the unbiased residual covariance of least squares with an intercept."""
    design = np.column_stack([rows[:, inputs], np.ones(len(rows))])
    found = np.linalg.lstsq(design, rows[:, own], rcond=None)[0]
    residual = rows[:, own] - design @ found
    return found[:-1].T, found[-1], residual.T @ residual / (len(rows) - 1 - len(inputs))


def sample(n=60, columns=5):
    return torch.randn(n, columns) @ torch.randn(columns, columns) + torch.randn(columns)


@pytest.mark.parametrize(("inputs", "own"), [([0, 1], [2, 3]), ([4], [0]), ([], [1, 2]), ([3, 1, 0], [4])])
def test_regressions_are_least_squares(inputs, own):
    rows = sample()
    fit = Moments(rows).regress(inputs, own)
    slopes, offset, covariance = by_numpy(rows.numpy(), inputs, own)
    np.testing.assert_allclose(fit.weights, slopes, atol=1e-8)
    np.testing.assert_allclose(fit.loc, offset, atol=1e-8)
    np.testing.assert_allclose(fit.scale_tril @ fit.scale_tril.T, covariance, atol=1e-8)
    assert torch.equal(fit.scale_tril, fit.scale_tril.tril())


def test_an_exact_relation_has_its_slopes_and_the_least_scale():
    x = torch.randn(40, 2)
    rows = torch.cat([x, x @ torch.tensor([[2.0], [-1.0]]) + 3.0], -1)
    fit = Moments(rows).regress([0, 1], [2])
    torch.testing.assert_close(fit.weights, torch.tensor([[2.0, -1.0]]), atol=1e-7, rtol=0)
    torch.testing.assert_close(fit.loc, torch.tensor([3.0]), atol=1e-7, rtol=0)
    assert RESIDUAL_FLOOR <= fit.scale_tril.item() < 2 * RESIDUAL_FLOOR


@pytest.mark.parametrize("noise", [1e-2, 1e-5, 0.0])
def test_columns_that_are_almost_copies_keep_their_variance(noise):
    """Given the first, the second one has no more than the least scale; its own variance stays what it is."""
    x = torch.randn(1000, 1)
    rows = torch.cat([x, x + noise * torch.randn(1000, 1)], -1)
    tril = Moments(rows).regress([], [0, 1]).scale_tril
    torch.testing.assert_close(tril @ tril.T, torch.cov(rows.T), atol=5 * RESIDUAL_FLOOR**2, rtol=0)
    assert tril[1, 1] >= RESIDUAL_FLOOR


def test_inputs_that_repeat_each_other_share_the_slope():
    x = torch.randn(40, 1)
    y = 2.0 * x + 0.1 * torch.randn(40, 1)
    twice = Moments(torch.cat([x, x, y], -1)).regress([0, 1], [2])
    once = Moments(torch.cat([x, y], -1)).regress([0], [1])
    assert torch.isfinite(twice.weights).all()
    torch.testing.assert_close(twice.weights.sum(-1), once.weights[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(twice.loc, once.loc, atol=1e-4, rtol=0)


def test_regression_in_turn_with_all_earlier_columns_is_the_joint_one():
    """The chain rule: columns one after the other; only the degrees of freedom differ."""
    rows, inputs, own = sample(), [1, 3], [0, 4, 2]
    moments, n = Moments(rows), 60
    joint = moments.regress(inputs, own)
    in_turn = moments.regress_in_turn(inputs, own, [inputs] * 3, [[], [0], [0, 1]])
    torch.testing.assert_close(in_turn.weights, joint.weights, atol=1e-7, rtol=0)
    torch.testing.assert_close(in_turn.loc, joint.loc, atol=1e-7, rtol=0)
    freedom = torch.tensor([(n - 3) / (n - 3 - earlier) for earlier in range(3)])
    torch.testing.assert_close(in_turn.scale_tril, joint.scale_tril * freedom.sqrt(), atol=1e-7, rtol=0)


def test_regression_in_turn_gives_each_column_its_own_inputs():
    rows = sample()
    fit = Moments(rows).regress_in_turn([0, 1], [2, 3], [[0], [1]], [[], [0]])
    first, one, variance = by_numpy(rows.numpy(), [0], [2])
    second, other, rest = by_numpy(rows.numpy(), [1, 2], [3])
    through = second[0, 1]  # of the first column on the second one
    expected = [[first[0, 0], 0.0], [through * first[0, 0], second[0, 0]]]
    np.testing.assert_allclose(fit.weights, expected, atol=1e-8)
    np.testing.assert_allclose(fit.loc, [one[0], other[0] + through * one[0]], atol=1e-8)
    covariance = np.array([[1.0, through], [through, through**2]]) * variance[0, 0]
    covariance[1, 1] += rest[0, 0]
    np.testing.assert_allclose(fit.scale_tril @ fit.scale_tril.T, covariance, atol=1e-8)
    alone = Moments(rows).regress_in_turn([0, 1], [2, 3], [[0], []], [[], []])
    assert alone.weights[1].tolist() == [0.0, 0.0]
    assert alone.scale_tril[1, 0] == 0.0


@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_regressions_with_a_ridge(ridge):
    """Ridge regression on centred rows, with what is left over divided by the degrees of freedom that remain."""
    rows, inputs, own = sample(), [0, 1, 4], [2, 3]
    fit = Moments(rows).regress(inputs, own, ridge)
    x, y = (part - part.mean(0) for part in (rows[:, inputs].numpy(), rows[:, own].numpy()))
    gram, n = x.T @ x / 59, 60
    slopes = np.linalg.solve(gram + ridge * np.eye(3), x.T @ y / 59)
    freedom = np.trace(np.linalg.solve(gram + ridge * np.eye(3), gram))
    residual = y - x @ slopes
    np.testing.assert_allclose(fit.weights, slopes.T, atol=1e-10)
    np.testing.assert_allclose(
        fit.loc, rows[:, own].mean(0) - fit.weights @ rows[:, inputs].mean(0), atol=1e-10
    )
    covariance = residual.T @ residual / (n - 1 - freedom)
    np.testing.assert_allclose(fit.scale_tril @ fit.scale_tril.T, covariance, atol=1e-10)


def test_the_ridge_that_predicts():
    """A strong relation takes a ridge that leaves its slope alone; of noise every ridge predicts as badly."""
    x = torch.randn(2000, 3)
    noise = torch.randn(2000, 1)
    exact = torch.cat([x, x.sum(-1, keepdim=True) + 1e-3 * noise], -1)
    nothing = torch.cat([x, noise], -1)
    assert (
        Moments(exact).ridge([0, 1, 2], [3]) <= 1e-4
    )  # the loss of a slope is the ridge, of a residual 1e-3
    assert Moments(nothing).ridge([0, 1, 2], [3]) == 1e-2
    assert Moments(exact).ridge([], [3]) == RIDGE
    assert Moments(exact[:9]).ridge([0, 1, 2], [3]) == RIDGE  # too few rows to hold some out


def test_regressions_through_the_origin_are_least_squares_with_imagined_rows():
    """A ridge is as many rows in which one input is one and all targets are nought."""
    torch.manual_seed(5)
    x, y = torch.randn(40, 3), torch.randn(40, 2)
    ridges = (0.0, 0.1, 2.0)
    for ridge, slopes in zip(ridges, ridge_slopes(x, y, *ridges), strict=True):
        rows = np.concatenate([x.numpy(), (ridge * 40) ** 0.5 * np.eye(3)])
        targets = np.concatenate([y.numpy(), np.zeros((3, 2))])
        np.testing.assert_allclose(slopes.numpy(), np.linalg.lstsq(rows, targets, rcond=None)[0], atol=1e-10)


def test_too_few_samples_for_a_covariance_are_said():
    moments = Moments(torch.randn(1, 3))
    with (
        pytest.warns(UserWarning, match="degrees of freedom"),
        pytest.raises(RuntimeError, match="too few finite joint samples"),
    ):
        moments.regress([0], [1])


def test_square_roots_of_covariances():
    tril = torch.tensor([[2.0, 0.0], [-1.0, 0.5]])
    torch.testing.assert_close(square_root(tril @ tril.T), tril)
    floor = square_root(torch.diag(torch.tensor([4.0, 1e-14])))
    torch.testing.assert_close(floor, torch.diag(torch.tensor([2.0, RESIDUAL_FLOOR])))
    for broken in ([[1.0, 1.0], [1.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]):
        found = square_root(torch.tensor(broken))
        off = found @ found.T - torch.tensor(broken)
        assert (found.diagonal() >= RESIDUAL_FLOOR).all()
        assert torch.equal(found, found.tril())
        torch.testing.assert_close(off, off.diagonal().mean() * torch.eye(2))  # a ridge and nothing else
    with pytest.raises(RuntimeError, match="Expected finite covariances"):
        square_root(torch.tensor([[math.nan]]))


# ---------------------------------------------------------------- logistic regression


def table(counts):
    """Return rows of a binary input and a class, each pair as often as a table says."""
    counts = torch.tensor(counts)
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(counts.shape[1]))
    return pairs.repeat_interleave(counts.flatten(), 0).unbind(-1)


def test_log_odds_of_a_table():
    """A saturated model has the log-odds of the table, up to the pull of the prior on the slope.

    The prior adds 1.1 (the slope in units of deviations) to a gradient whose slope is 10,000 times 0.18.
    """
    x, y = table([[4000, 1000], [1500, 3500]])
    slopes, intercepts = logistic_regression(x.double().unsqueeze(-1), y.double().unsqueeze(-1))
    assert slopes.shape == (1, 1)
    assert intercepts.item() == pytest.approx(math.log(1 / 4), abs=2e-3)
    assert (slopes + intercepts).item() == pytest.approx(math.log(7 / 3), abs=2e-3)


def test_log_odds_of_classes():
    x, y = table([[2000, 2000, 1000], [500, 1500, 3000]])
    indicators = torch.nn.functional.one_hot(y, 3).double()
    slopes, intercepts = logistic_regression(x.double().unsqueeze(-1), indicators)
    assert slopes.sum().abs() < 1e-9
    assert intercepts.sum().abs() < 1e-9
    for input_value, counts in enumerate(([2, 2, 1], [0.5, 1.5, 3])):
        found = (intercepts + input_value * slopes[:, 0]).softmax(-1)
        torch.testing.assert_close(found, torch.tensor(counts) / 5, atol=1e-3, rtol=0)


@pytest.mark.parametrize("classes", [1, 3])
def test_the_gradient_of_the_penalised_likelihood_is_zero(classes):
    """The objective by hand: likelihood, normal prior on slopes of inputs in units of deviations, pseudo-counts."""
    x = torch.randn(300, 2) * torch.tensor([0.2, 30.0]) + torch.tensor([5.0, -1.0])
    logits = (x - x.mean(0)) / x.std(0) @ torch.randn(2, classes)
    if classes == 1:
        y = torch.bernoulli(logits.sigmoid())
    else:
        y = torch.nn.functional.one_hot(torch.distributions.Categorical(logits=logits).sample(), 3).double()
    slopes, intercepts = (part.requires_grad_() for part in logistic_regression(x, y))
    scale = x.std(0, correction=0)
    found, at_mean = x @ slopes.T + intercepts, slopes @ x.mean(0) + intercepts
    if classes == 1:
        log_p = torch.distributions.Bernoulli(logits=found, validate_args=False).log_prob(y).sum()
        imagined = torch.nn.functional.logsigmoid(torch.stack([at_mean, -at_mean])).sum()
    else:
        log_p = (found.log_softmax(-1) * y).sum()
        imagined = at_mean.log_softmax(-1).sum()
    objective = log_p + 0.5 * imagined - 0.5 * (slopes * scale).square().sum()
    gradients = torch.autograd.grad(objective, (slopes, intercepts))
    most = 1e-2 if TORCH >= (2, 6) else 3e-2  # of some 300 where the slopes are zero
    assert (gradients[0] / scale).abs().max() < most
    assert gradients[1].abs().max() < 1e-2 + 1e-2 * (x.mean(0) / scale).abs().max()


def test_units_of_inputs_do_not_matter():
    x, scale, shift = torch.randn(400, 2), torch.tensor([1e-3, 1e4]), torch.tensor([7.0, -3e4])
    y = torch.bernoulli((x[:, :1] - x[:, 1:]).sigmoid())
    slopes, intercepts = logistic_regression(x, y)
    others, offsets = logistic_regression(x * scale + shift, y)
    torch.testing.assert_close(others * scale, slopes, atol=1e-4, rtol=0)
    torch.testing.assert_close(offsets + others @ shift, intercepts, atol=1e-3, rtol=0)


def test_nothing_to_fit():
    slopes, intercepts = logistic_regression(torch.zeros(0, 2), torch.zeros(0, 1))
    assert slopes.tolist() == [[0.0, 0.0]]
    assert intercepts.tolist() == [0.0]
    constant = logistic_regression(torch.ones(50, 1), torch.ones(50, 1))
    assert all(torch.isfinite(part).all() for part in constant)
    assert constant[0].item() == pytest.approx(0.0, abs=1e-6)
    assert logistic_regression(torch.ones(9, 1).float(), torch.ones(9, 1).float())[0].dtype == torch.float32


@pytest.mark.parametrize("columns", [5, 600])  # of many columns, covariances are found in blocks
@pytest.mark.parametrize("inputs", [[0, 1, 2], [3, 0]])
def test_the_ridge_is_that_which_predicts_held_out_rows(columns, inputs):
    rows, own = torch.randn(47, columns), [4]
    rows[:, 4] = 0.3 * rows[:, 0] - 0.1 * rows[:, 3] + torch.randn(47)
    rows[:, 1] = rows[:, 0] + 1e-3 * torch.randn(47)
    moments = Moments(rows + 3.0)
    losses = []
    held_out = torch.arange(47) % HELD_OUT == 0
    fitted, test = Moments(rows[~held_out]), rows[held_out]
    for ridge in RIDGES:
        weights = fitted.weights(inputs, own, ridge)
        off = test[:, own] - fitted.mean[own] - (test[:, inputs] - fitted.mean[inputs]) @ weights.T
        losses.append(float(off.square().mean().log()) / 2)
    ties = [r for r, loss in zip(RIDGES, losses, strict=True) if loss <= min(losses) + RIDGE_TIE]
    assert moments.ridge(inputs, own) == ties[0]
    among, of_test = moments._split(inputs, own)
    torch.testing.assert_close(among, torch.cov(rows[~held_out].T)[inputs][:, own], atol=1e-12, rtol=0)
    expected = (test - fitted.mean)[:, inputs].T @ (test - fitted.mean)[:, own] / len(test)
    torch.testing.assert_close(of_test, expected, atol=1e-12, rtol=0)


def test_scales_that_follow_inputs_are_found_beside_locations():
    torch.manual_seed(0)
    inputs = torch.randn(5000, 3)
    scale = (-1.0 + 0.7 * inputs[:, 1]).exp()
    own = 0.5 + inputs @ torch.tensor([1.0, -2.0, 0.0]) + scale * torch.randn(5000)
    found = regression_with_scales(inputs, own, [1, 2])
    assert found is not None
    fit, slopes = found
    error = 5.0 / (2 * 5000) ** 0.5
    torch.testing.assert_close(slopes, torch.tensor([0.7, 0.0]), atol=error, rtol=0.0)
    assert float(fit.scale_tril.log()) == pytest.approx(-1.0, abs=error)
    torch.testing.assert_close(fit.weights[0], torch.tensor([1.0, -2.0, 0.0]), atol=0.03, rtol=0.0)
    assert float(fit.loc) == pytest.approx(0.5, abs=0.03)


def test_scales_that_are_the_same_follow_nothing():
    torch.manual_seed(0)
    inputs = torch.randn(2000, 2)
    own = inputs.sum(-1) + torch.randn(2000)
    assert regression_with_scales(inputs, own, [0, 1]) is None
    assert regression_with_scales(inputs[:20], own[:20], [0]) is None  # too few to tell
