r"""Normal conditionals of long vectors: independent elements but for a few directions.

A full covariance of N elements takes N (N - 1) / 2 numbers from the network, each of which looks at all parents: 8.5
million weights for 200 elements. Here

.. math:: u = \text{shift} + \text{scale} \odot \bigl(\text{loc}(x) + d \odot (I + U V^\top) \varepsilon\bigr), \qquad
          \varepsilon \sim N(0, I),

with r columns in U and V (:mod:`~pyro_graphflows.distributions.long_normals`). Only the location depends on the
parents; scales and directions are parameters, N (1 + 2 r) of them.

References:
    [1] Ong, Nott and Smith (2018), Gaussian variational approximation with a factor covariance structure: the case of
    directions wider than the diagonal.
"""

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_graphflows.distributions.long_normals import MixedNoiseNormal
from pyro_graphflows.guides.conditionals.factors import NormalOutputs, positive_scale
from pyro_graphflows.regression import RESIDUAL_FLOOR, Moments, in_float64

__all__ = ["LowRankNormalFactor", "leading_directions"]

NUM_ROUNDS, FEW_ROUNDS = 30, 10  # of short vectors, and of others
SHORT = 200
MOST_ROWS = 4000  # of samples, for directions
OVERSAMPLED = 6  # columns of the subspace beside those wanted


class LowRankNormalFactor(NormalOutputs):
    r"""A normal whose covariance is diagonal but for a few directions; see the module's essay.

    Args:
        size: The length of the site's flat unconstrained vector.
        rank: The number of directions.

    Example:
        >>> LowRankNormalFactor(200, 10).num_outputs
        4400
    """

    def __init__(self, size: int, rank: int) -> None:
        super().__init__(size)
        self.rank = rank

    @property
    def num_outputs(self) -> int:
        """Location and log-scale of each element, and its entries in U and V."""
        return (2 + 2 * self.rank) * self.size

    @property
    def num_reading(self) -> int:
        """Only locations depend on the parents."""
        return self.size

    def distribution(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """See :meth:`Factor.distribution`."""
        return self.distribution_with(outputs[..., : self.size], outputs[..., self.size :], shift, scale)

    def distribution_with(
        self, outputs: Tensor, constants: Tensor, shift: Tensor, scale: Tensor
    ) -> dist.TorchDistribution:
        """See :meth:`Factor.distribution_with`: all that is not the location may be the same for the whole batch."""
        n = self.size
        loc = torch.addcmul(shift, scale, outputs)
        diagonal = scale * positive_scale(constants[..., :n], shift, scale)
        left, right = constants[..., n:].unflatten(-1, (2, n, self.rank)).unbind(-3)
        return MixedNoiseNormal(loc, diagonal, left, right / n**0.5)

    def linear_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Factor.linear_start`: the diagonal and the directions closest to the covariance."""
        scale = scale_tril.square().sum(-1).sqrt()
        root = scale_tril / scale.unsqueeze(-1)
        return self._rows(
            weights, loc, scale, leading_directions(lambda v: root @ (root.mT @ v), scale, self.rank)
        )

    def natural_units(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units`."""
        return torch.cat([scale_tril.diagonal(), scale_tril.new_ones(self.num_outputs - self.size)])

    def start_from_samples(self, inputs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the regression on the inputs, and the directions in which its residuals vary beyond chance."""
        x, y = in_float64(inputs), in_float64(values)
        columns = range(x.shape[-1])
        weights = y.new_zeros(self.size, 0)
        if len(columns):
            moments = Moments(torch.cat([x, y], -1))
            own = range(len(columns), len(columns) + self.size)
            weights = moments.weights(columns, own, moments.ridge(columns, own))
        loc = y.mean(0) - weights @ x.mean(0)
        residual = y - loc - x @ weights.mT
        spread = residual.square().mean(0).sqrt().clamp(min=RESIDUAL_FLOOR)
        residual = residual[:MOST_ROWS]
        scaled = residual / spread / len(residual) ** 0.5
        found = leading_directions(
            lambda v: scaled.mT @ (scaled @ v), spread, self.rank, (self.size / len(residual)) ** 0.5
        )
        rows = self._rows(weights, loc, spread, found)
        return rows[0].to(inputs), rows[1].to(inputs)

    def _rows(
        self, weights: Tensor, loc: Tensor, scale: Tensor, found: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        left, directions, variances = found
        all_weights = weights.new_zeros(self.num_outputs, weights.shape[-1])
        all_weights[: self.size] = weights
        stretched = directions * (variances.sqrt() - 1)
        parts = loc, (scale * left.sqrt()).log(), stretched.flatten(), directions.flatten() * self.size**0.5
        return all_weights, torch.cat(parts)


def leading_directions(
    correlate: Callable[[Tensor], Tensor], like: Tensor, rank: int, noise: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return what makes :math:`L^{1/2} (I + Q (\lambda - 1) Q^\top) L^{1/2}` close to a correlation matrix.

    The directions Q are the eigenvectors of what remains after division by the diagonal L whose eigenvalues are
    furthest from one, by subspace iteration; L is what makes the diagonal right; these are found in turn.

    Args:
        correlate: Multiplies columns by the correlation matrix.
        like: A tensor of shape ``(n,)``.
        rank: The number of directions.
        noise: The root of (elements / samples), of a matrix of samples: eigenvalues that chance explains (Marchenko and
            Pastur 1967) are left out.

    Returns:
        L, ``(n,)``; orthonormal Q, ``(n, rank)``; and the variances :math:`\lambda`, ones for directions left out.
    """
    lowest, highest = max(1 - noise, 0.0) ** 2 / 1.05, (1 + noise) ** 2 * 1.05
    n = len(like)
    number, most = min(rank + OVERSAMPLED, n), min(rank, n)
    start = torch.randn(n, max(number, rank), generator=torch.Generator().manual_seed(n)).to(like)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = math.inf
    for both in (False, True):  # wider directions alone converge best
        left, variances = torch.ones_like(like), like.new_ones(rank)
        basis = torch.linalg.qr(start[:, :number])[0]
        directions = torch.zeros_like(start[:, :rank])
        directions[:, :most] = basis[:, :most]
        for _ in range(NUM_ROUNDS if n <= SHORT else FEW_ROUNDS):
            root = left.sqrt().unsqueeze(-1)
            for _ in range(2):
                basis = torch.linalg.qr(correlate(basis / root) / root - basis)[0]
            image = correlate(basis / root) / root
            values, vectors = torch.linalg.eigh((basis.mT @ image + image.mT @ basis) / 2)
            values = values.clamp(min=RESIDUAL_FLOOR**2)
            worth = values - 1 - values.log()  # twice the nats that a direction is worth
            kept = (values <= lowest) | (values >= highest) if noise else values > 0
            worth = torch.where(kept & ((values > 1) | both), worth, torch.zeros_like(worth))
            chosen = worth.argsort(descending=True)[:most]
            variances[:most] = torch.where(worth[chosen] > 0, values[chosen], torch.ones_like(values[chosen]))
            directions[:, :most] = basis @ vectors[:, chosen]
            found = values[chosen] * (1 / variances[:most] - 1)
            loss = float((left.log() + 1 / left).sum() + variances.log().sum() + found.sum())
            if loss < least:
                least, best = loss, (left, directions.clone(), variances.clone())
            left = 1 / (1 + directions.square() @ (variances - 1)).clamp(min=0.01)
    assert best is not None
    return best
