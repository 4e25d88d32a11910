r"""Normal conditionals of vectors whose elements are a chain: random walks, autoregressions, smooth curves.

Given its neighbours in a row an element of such a vector is independent of all others, also given data: the precision
of the posterior is banded although its covariance is not. Then

.. math:: q(u \mid x) \propto \exp\bigl(-\tfrac12 u^\top \Lambda u + u^\top h(x)\bigr), \qquad
          \Lambda = (I - A)^\top D^{-2} (I - A),

with A strictly lower triangular and banded, D diagonal, and element i of h a function of the data that meet element i:
however far a datum reaches, it does so through :math:`\Lambda^{-1}`. The numbers to learn are linear in the number of
elements. The location is :math:`\Lambda_0^{-1} h(x)`, where :math:`\Lambda_0` is that of the start and is kept, so that
a step on the covariance leaves the location as it is.

In the *differences* form it is the running sums of the vector that are a chain, as where a model draws independent
steps and adds them up.
"""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_graphflows.distributions.long_normals import BandedNormal, solve_band, solve_band_transposed
from pyro_graphflows.guides.conditionals.factors import NormalOutputs, positive_scale
from pyro_graphflows.regression import RESIDUAL_FLOOR, Moments, Regression

__all__ = ["BandedNormalFactor", "regress_chain"]


class BandedNormalFactor(NormalOutputs):
    r"""A normal whose precision is banded; see the module's essay.

    Args:
        size: The length of the site's flat unconstrained vector.
        width: How far neighbours are.
        differences: Whether the running sums of the vector are the chain.
        reads: Whether any element looks at anything.

    Example:
        >>> BandedNormalFactor(500, 1, False, reads=False).num_outputs
        1500
    """

    def __init__(self, size: int, width: int, differences: bool, *, reads: bool) -> None:
        super().__init__(size)
        self.width, self.differences, self.reads = width, differences, reads

    @property
    def _num_own(self) -> int:
        return (2 + self.width) * self.size

    @property
    def num_outputs(self) -> int:
        """For each element h, the logarithm of D and the entries of A; those of the start, if anything is read."""
        return self._num_own + (1 + self.width) * self.size * self.reads

    @property
    def num_reading(self) -> int:
        """What is of the start depends on nothing."""
        return self._num_own if self.reads else 0

    @property
    def output_elements(self) -> tuple[int, ...]:
        """See :attr:`Factor.output_elements`."""
        elements = range(self.size)
        if not self.reads:
            return ()
        return (*elements, *elements, *(i for i in elements for _ in range(self.width)))

    @property
    def shares_units(self) -> bool:
        """Whether all elements must have one shift and one scale: sums of elements are taken."""
        return self.differences

    def distribution(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """See :meth:`Factor.distribution`."""
        n, k = self.size, self.width
        if self.differences:
            shift = shift.cumsum(-1)
        loc, coefficients = outputs[..., :n], outputs[..., 2 * n : self._num_own].unflatten(-1, (n, k))
        if self.reads:
            start = outputs[..., self._num_own :]
            loc = smooth(start[..., n:].unflatten(-1, (n, k)), start[..., :n].exp(), loc)
        width = positive_scale(outputs[..., n : 2 * n], shift, scale)
        batch = loc.shape[:-1]
        ratio = torch.stack([scale / scale.roll(j + 1) for j in range(k)], -1) if k else scale.new_zeros(n, 0)
        return BandedNormal(
            shift + scale * loc,
            (scale * width).expand(*batch, n),
            (coefficients * ratio).expand(*batch, n, k),
            differences=self.differences,
        )

    def linear_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Factor.linear_start`: the chain closest to the covariance, if it is not one itself."""
        log_width, coefficients = self._chain(scale_tril)
        own, rest = (log_width, coefficients.flatten()), self.num_outputs - self.size
        weights, loc = self._in_sums(weights), self._in_sums(loc)
        if not self.reads:
            return torch.cat([weights, weights.new_zeros(rest, weights.shape[-1])]), torch.cat([loc, *own])
        joint = unsmooth(coefficients, log_width.exp(), torch.cat([weights, loc.unsqueeze(-1)], -1).mT).mT
        zeros = weights.new_zeros(rest, weights.shape[-1])
        return torch.cat([joint[:, :-1], zeros]), torch.cat([joint[:, -1], *own, *own])

    def natural_units(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units`: of h what moves all elements together by their scale.

        Coefficients move so little that the spread of a long chain, which is large where they are nearly one, hardly
        does. What is of the start does not move.
        """
        log_width, coefficients = self._chain(scale_tril)
        spread = self._in_sums(scale_tril).square().sum(-1).sqrt()
        share = log_width.exp() / spread
        if self.reads:
            covariance = smooth(coefficients, log_width.exp(), torch.eye(self.size).to(spread))
            of_loc = spread / covariance.abs().sum(-1)
        else:
            of_loc = spread * share.sqrt()
        of_coefficients = (share.square().unsqueeze(-1)).expand(-1, self.width).flatten()
        fixed = spread.new_zeros((1 + self.width) * self.size * self.reads)
        return torch.cat([of_loc, share, of_coefficients, fixed])

    def _in_sums(self, columns: Tensor) -> Tensor:
        return columns.cumsum(0) if self.differences else columns

    def _chain(self, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of D, ``(n,)``, and A, ``(n, k)``, from a Cholesky factor of the covariance."""
        root = self._in_sums(scale_tril.double())
        unit = root.diagonal().unsqueeze(-1) * torch.linalg.solve_triangular(
            root, torch.eye(self.size).to(root), upper=False
        )  # I - A
        found = root.new_zeros(self.size, self.width)
        for j in range(min(self.width, self.size - 1)):
            found[j + 1 :, j] = -unit.diagonal(-j - 1)
        return root.diagonal().log().to(scale_tril), found.to(scale_tril)


def smooth(coefficients: Tensor, width: Tensor, given: Tensor) -> Tensor:
    r"""Return :math:`\Lambda^{-1} h`.

    Args:
        coefficients: A, ``(*batch, n, k)``.
        width: D, ``(*batch, n)``.
        given: h, ``(*batch, n)``.
    """
    return solve_band(coefficients, width.square() * solve_band_transposed(coefficients, given))


def unsmooth(coefficients: Tensor, width: Tensor, values: Tensor) -> Tensor:
    r"""Return :math:`\Lambda u`, the inverse of :func:`smooth`."""
    own = values.clone()
    n, k = coefficients.shape
    for j in range(min(k, n - 1)):
        own[..., j + 1 :] -= coefficients[j + 1 :, j] * values[..., : n - j - 1]
    own = own / width.square()
    found = own.clone()
    for j in range(min(k, n - 1)):
        found[..., : n - j - 1] -= coefficients[j + 1 :, j] * own[..., j + 1 :]
    return found


def regress_chain(
    rows: Tensor,
    inputs: Sequence[int],
    own: Sequence[int],
    reads: Sequence[Sequence[int]],
    factor: BandedNormalFactor,
) -> Regression:
    r"""Return the regression of a chain on data that each meet one element: by its neighbours and the data it meets.

    Each element is regressed on its neighbours and on its own inputs; row i of :math:`\Lambda` and of the weights of h
    are its coefficients, divided by its residual variance (Besag 1975).

    Args:
        rows: Joint samples, ``(n, columns)``.
        inputs: The columns of all inputs.
        own: The columns of the vector.
        reads: For each element the columns of its own inputs.
        factor: The chain.
    """
    inputs, own, size, k = list(inputs), list(own), factor.size, factor.width
    vector = rows[:, own]
    moments = Moments(torch.cat([rows[:, inputs], vector.cumsum(-1) if factor.differences else vector], -1))
    place = {column: position for position, column in enumerate(inputs)}
    offset = len(inputs)
    precision = rows.new_zeros(size, size)
    weights = rows.new_zeros(size, len(inputs))
    near = [[j for j in range(max(i - k, 0), min(i + k + 1, size)) if j != i] for i in range(size)]
    seen = [[place[column] for column in own_inputs] for own_inputs in reads]
    looks = [[*seen[i], *(offset + j for j in near[i])] for i in range(size)]
    for i, (slopes, residual) in enumerate(moments.regress_each(looks, range(offset, offset + size))):
        variance = residual.clamp(min=RESIDUAL_FLOOR**2)
        precision[i, i] = 1 / variance
        precision[i, near[i]] = -slopes[len(seen[i]) :] / variance
        weights[i, seen[i]] = slopes[: len(seen[i])] / variance
    precision = (precision + precision.mT) / 2
    diagonal, rest = precision.diagonal().diag_embed(), precision - precision.diagonal().diag_embed()
    share = 1.0
    while True:  # estimates of a precision need not be one
        root, failed = torch.linalg.cholesky_ex(diagonal + share * rest)
        if not failed:
            break
        share *= 0.95
    eye = torch.eye(size).to(rows)
    covariance = torch.cholesky_solve(eye, root)
    weights = covariance @ weights
    loc = moments.mean[offset:] - weights @ moments.mean[:offset]
    tril = torch.linalg.cholesky(covariance)
    if factor.differences:
        weights, loc, tril = _steps(weights), _steps(loc), _steps(tril)
    return Regression(weights, loc, tril)


def _steps(columns: Tensor) -> Tensor:
    return torch.diff(columns, dim=0, prepend=torch.zeros_like(columns[:1]))
