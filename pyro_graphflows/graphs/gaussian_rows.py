r"""Exact Gaussian conditioning on rows: variables as vectors in the space of independent unit noises.

A jointly normal vector is :math:`\mu + A \varepsilon`. Row ``v`` of :math:`A` stands for variable ``v``:
inner products are covariances, squared lengths are variances, conditioning is orthogonal projection. Rows are
scaled to unit length before each factorisation, so that the units of the variables do not matter.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr, solve_triangular

__all__ = ["Array", "half_log_det", "regress", "triangle"]

Array = NDArray[np.float64]


def triangle(rows: Array) -> tuple[Array, Array]:
    r"""Return :math:`R` (D, D) and lengths :math:`d` (D,) with :math:`A A^\top = DR^\top RD`, D = diag(d).

    The absolute value of entry i of the diagonal of :math:`R` is the standard deviation of variable i given
    the variables before it, in units of its own marginal standard deviation.

    Args:
        rows: Linearly independent rows (D, N).

    Example:
        >>> upper, lengths = triangle(np.array([[3.0, 0.0], [0.0, 1.0]]))
        >>> np.abs(np.diag(upper)).tolist(), lengths.tolist()
        ([1.0, 1.0], [3.0, 1.0])
    """
    lengths = np.linalg.norm(rows, axis=1)
    (upper,) = qr((rows / lengths[:, None]).T, mode="r")
    return upper[: len(rows)], lengths


def half_log_det(upper: Array, lengths: Array) -> float:
    """Return half the log-determinant of the covariance whose :func:`triangle` is given."""
    return float(np.log(np.abs(np.diag(upper))).sum() + np.log(lengths).sum())


def regress(targets: Array, regressors: Array) -> tuple[Array, Array]:
    """Return the regression of some variables on others.

    Args:
        targets: Rows (K, N).
        regressors: Linearly independent rows (D, N).

    Returns:
        The coefficients (K, D) and the residual rows (K, N), orthogonal to the regressors.

    Example:
        >>> coefficients, residual = regress(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]]))
        >>> coefficients.round(6).tolist(), residual.round(6).tolist()
        ([[0.5]], [[0.5, -0.5]])
    """
    if not len(regressors):
        return np.zeros((len(targets), 0)), targets
    lengths = np.linalg.norm(regressors, axis=1)
    basis, upper = qr((regressors / lengths[:, None]).T, mode="economic")  # (N, D), (D, D)
    projected = targets @ basis  # (K, D)
    residual = targets - projected @ basis.T
    correction = residual @ basis  # a second projection keeps small residuals accurate
    residual = residual - correction @ basis.T
    return solve_triangular(upper, (projected + correction).T).T / lengths, residual
