"""Regression and determinants on rows, against their definitions."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from pyro_graphflows.graphs.gaussian_rows import half_log_det, regress, triangle


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_regression_and_determinant(num_targets, num_regressors, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_targets + num_regressors, 10)) * 10.0 ** rng.integers(-4, 4, (1, 1))
    targets, regressors = rows[:num_targets], rows[num_targets:]
    coefficients, residual = regress(targets, regressors)
    np.testing.assert_allclose(coefficients @ regressors + residual, targets, atol=1e-9 * abs(rows).max())
    np.testing.assert_allclose(residual @ regressors.T, 0, atol=1e-9 * np.square(rows).max())
    upper, lengths = triangle(targets)
    product = lengths[:, None] * (upper.T @ upper) * lengths
    np.testing.assert_allclose(product, targets @ targets.T, atol=1e-9 * np.square(rows).max())
    assert half_log_det(upper, lengths) == pytest.approx(
        0.5 * np.linalg.slogdet(targets @ targets.T)[1], abs=1e-8
    )
