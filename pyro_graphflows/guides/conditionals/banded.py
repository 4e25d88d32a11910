r"""Normal conditionals of vectors whose elements are a chain: random walks, autoregressions, smooth curves.

Given its neighbours in a row an element of such a vector is independent of all others, also given data: the precision
of the posterior is banded although its covariance is not. Then

.. math:: q(u \mid x) \propto \exp\bigl(-\tfrac12 u^\top \Lambda u + u^\top h(x)\bigr), \qquad
          \Lambda = (I - A)^\top D^{-2} (I - A),

with A strictly lower triangular and banded, D diagonal, and element i of h a function of the data that meet element i:
however far a datum reaches, it does so through :math:`\Lambda^{-1}`. The numbers to learn are linear in the number of
elements.

**Coordinates.** A step of an optimiser on one number, or on all of them, costs what it would cost in a vector of
independent numbers. With :math:`A_0, D_0` those of the start, which are kept, and :math:`L_0 = (I - A_0)^{-1} D_0`, so
that :math:`L_0 L_0^\top` is the covariance of the start,

.. math:: \text{loc} = L_0 (L_0^\top h(x) + \eta), \qquad A_{i} = A_{0,i} + W_i^\top \delta_i,

where :math:`W_i` whitens the k elements before i and multiplies by the noise of element i. Near the start the
divergence is :math:`\tfrac12 |\eta|^2 + \tfrac12 |\delta|^2 + |\log D - \log D_0|^2`, for rough and for smooth moves
alike and however smooth the chain is; locations do not move with the covariance. The gradient of one draw has a noise
whose covariance is the curvature, so that at rate r Adam stays about r / 4 nats above the optimum for each number that
moves in full units. In long chains that adds up, and units are smaller
(:func:`~pyro_graphflows.guides.conditionals.factors.share_of_long`).

In the *differences* form it is the running sums of the vector that are a chain, as where a model draws independent
steps and adds them up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_graphflows.distributions.long_normals import BandedNormal, solve_band, solve_band_transposed
from pyro_graphflows.guides.conditionals.factors import NormalOutputs, positive_scale, share_of_long
from pyro_graphflows.regression import RESIDUAL_FLOOR, Moments, Regression

__all__ = ["BandedNormalFactor", "regress_chain"]

HALF = 0.5  # the square of what the logarithm of D must move by to cost what a number of eta does
TINY_SHARE = 1e-10  # of variances, added to covariances of neighbours, which may be all but the same


class BandedNormalFactor(NormalOutputs):
    r"""A normal whose precision is banded; see the module's essay.

    Args:
        size: The length of the site's flat unconstrained vector.
        width: How far neighbours are.
        differences: Whether the running sums of the vector are the chain.
        reads: Whether any element looks at anything.

    Example:
        >>> BandedNormalFactor(500, 1, False, reads=False).num_outputs
        3000
    """

    def __init__(self, size: int, width: int, differences: bool, *, reads: bool) -> None:
        super().__init__(size)
        self.width, self.differences, self.reads = width, differences, reads

    @property
    def _num_own(self) -> int:
        return (2 + self.width) * self.size

    @property
    def num_outputs(self) -> int:
        """For each element h, if anything is read, log D, delta and eta; and the start: log D, A and W."""
        return self._num_own + self.reads * self.size + self.num_fixed

    @property
    def num_fixed(self) -> int:
        """Those of the start."""
        return (1 + self.width + self.width**2) * self.size

    @property
    def num_reading(self) -> int:
        """Those of the start and eta depend on nothing; without data h is not needed, and eta is in its place."""
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
        own, rest = outputs[..., : self._num_own], outputs[..., self._num_own :]
        log_width, delta = own[..., n : 2 * n], own[..., 2 * n :].unflatten(-1, (n, k))
        moves, at_start = (rest[..., :n], rest[..., n:]) if self.reads else (own[..., :n], rest)
        before = at_start[..., n : (1 + k) * n].unflatten(-1, (n, k))
        whiten = at_start[..., (1 + k) * n :].unflatten(-1, (n, k, k))
        width = at_start[..., :n].exp()
        if self.reads:
            moves = moves + width * solve_band_transposed(before, own[..., :n])
        loc = solve_band(before, width * moves)
        coefficients = before + (delta.unsqueeze(-1) * whiten).sum(-2)
        batch = loc.shape[:-1]
        ratio = torch.stack([scale / scale.roll(j + 1) for j in range(k)], -1) if k else scale.new_zeros(n, 0)
        return BandedNormal(
            shift + scale * loc,
            (scale * positive_scale(log_width, shift, scale)).expand(*batch, n),
            (coefficients * ratio).expand(*batch, n, k),
            differences=self.differences,
        )

    def linear_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Factor.linear_start`: the chain closest to the covariance, if it is not one itself."""
        chain = self._chain(scale_tril)
        width, coefficients = chain.width, chain.coefficients
        at_start = width.log(), coefficients.flatten(), chain.whiten.flatten()
        weights, loc = self._in_sums(weights.double()), self._in_sums(loc.double())
        delta = torch.zeros_like(at_start[1])
        rows = weights.new_zeros(self.num_outputs, weights.shape[-1])
        first, moves = _residuals(coefficients, loc) / width, loc.new_zeros(0)
        if self.reads:
            joint = unsmooth(coefficients, width, torch.cat([weights, loc.unsqueeze(-1)], -1).mT).mT
            rows[: self.size], first, moves = joint[:, :-1], joint[:, -1], torch.zeros_like(loc)
        parts = first, at_start[0], delta, moves, *at_start
        return rows.to(scale_tril), torch.cat(parts).to(scale_tril)

    def natural_units(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units`: ones but for h, less in long chains; what is of the start does not move.

        Elements of h have correlated gradients, and move so little that all of them together do what one alone may.
        """
        n = self.size
        chain = self._chain(scale_tril)
        like = scale_tril.new_ones(n)
        of_own = (HALF**0.5 * like, like.new_ones(n * self.width))
        fixed = like.new_zeros(self.num_fixed)
        if self.reads:
            covariance = smooth(chain.coefficients, chain.width, torch.eye(n).to(chain.width))
            of_data = covariance.diagonal().sqrt() / covariance.abs().sum(-1)
            units = torch.cat([of_data.to(like), *of_own, like, fixed])
        else:
            units = torch.cat([like, *of_own, fixed])
        return units * share_of_long(int((units > 0).sum()))

    def _in_sums(self, columns: Tensor) -> Tensor:
        return columns.cumsum(0) if self.differences else columns

    def _chain(self, scale_tril: Tensor) -> "_Chain":
        """Return the chain that is closest to a covariance, from its Cholesky factor."""
        n, k = self.size, self.width
        root = self._in_sums(scale_tril.double())
        diagonal = root.diagonal()
        unit = diagonal.unsqueeze(-1) * torch.linalg.solve_triangular(
            root, torch.eye(n).to(root), upper=False
        )  # I - A
        found = root.new_zeros(n, k)
        for j in range(min(k, n - 1)):
            found[j + 1 :, j] = -unit.diagonal(-j - 1)
        whiten = root.new_zeros(n, k, k)
        if k:
            index = torch.arange(n).unsqueeze(-1) - 1 - torch.arange(k)  # of those before, the nearest first
            known = (index >= 0).to(root.device)
            before = root[index.clamp(min=0)] * known.unsqueeze(-1)
            covariance = before @ before.mT + torch.diag_embed((~known).to(root))
            covariance = covariance + TINY_SHARE * torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
            inverse = torch.linalg.inv(torch.linalg.cholesky(covariance))
            whiten = diagonal[:, None, None] * inverse * (known.unsqueeze(-1) & known.unsqueeze(-2))
        return _Chain(diagonal, found, whiten)


@dataclass(frozen=True)
class _Chain:
    """D, ``(n,)``; A, ``(n, k)``; and W, ``(n, k, k)``, in float64."""

    width: Tensor
    coefficients: Tensor
    whiten: Tensor


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
    n, k = coefficients.shape
    own = _residuals(coefficients, values) / width.square()
    found = own.clone()
    for j in range(min(k, n - 1)):
        found[..., : n - j - 1] -= coefficients[j + 1 :, j] * own[..., j + 1 :]
    return found


def _residuals(coefficients: Tensor, values: Tensor) -> Tensor:
    r"""Return :math:`(I - A) u`."""
    n, k = coefficients.shape
    own = values.clone()
    for j in range(min(k, n - 1)):
        own[..., j + 1 :] -= coefficients[j + 1 :, j] * values[..., : n - j - 1]
    return own


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
