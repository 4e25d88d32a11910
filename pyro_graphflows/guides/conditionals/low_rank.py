r"""Normal conditionals of long vectors: a diagonal covariance and a few directions beside it.

A full covariance of N elements takes N (N - 1) / 2 numbers from the network, each of which looks at all parents: 8.5
million weights for 200 elements. Here

.. math:: u = \text{shift} + \text{scale} \odot \bigl(\text{loc}(x) + d \odot (\varepsilon + F \eta)\bigr), \qquad
          \varepsilon \sim N(0, 1)^N, \; \eta \sim N(0, 1)^r,

where only the location depends on the parents; the scales d and the directions F are parameters, N (1 + r) of them.
Log-densities cost N r² by the matrix determinant lemma.

References:
    [1] Ong, Nott and Smith (2018), Gaussian variational approximation with a factor covariance structure.
"""

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_graphflows.guides.conditionals.factors import NormalOutputs, positive_scale
from pyro_graphflows.regression import RESIDUAL_FLOOR, Moments, in_float64

__all__ = ["LowRankNormalFactor"]

WAKE = 1e-3  # spread of directions that are not seen; none at all would have no gradient


class LowRankNormalFactor(NormalOutputs):
    r"""A normal whose covariance is diagonal plus low rank; see the module's essay.

    Args:
        size: The length of the site's flat unconstrained vector.
        rank: The number of directions beside the diagonal.

    Example:
        >>> LowRankNormalFactor(200, 10).num_outputs
        2400
    """

    def __init__(self, size: int, rank: int) -> None:
        super().__init__(size)
        self.rank = rank

    @property
    def num_outputs(self) -> int:
        """Location and log-scale of each element, and its entry in each direction."""
        return (2 + self.rank) * self.size

    @property
    def num_reading(self) -> int:
        """Only locations depend on the parents."""
        return self.size

    def distribution(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """See :meth:`Factor.distribution`."""
        n = self.size
        loc = torch.addcmul(shift, scale, outputs[..., :n])
        diagonal = scale * positive_scale(outputs[..., n : 2 * n], shift, scale)
        directions = diagonal.unsqueeze(-1) * outputs[..., 2 * n :].unflatten(-1, (n, self.rank))
        return dist.LowRankMultivariateNormal(loc, directions, diagonal.square(), validate_args=False)

    def linear_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Factor.linear_start`: the diagonal and the directions closest to the covariance."""
        covariance = scale_tril @ scale_tril.mT
        log_scale, directions = diagonal_and_directions(covariance, self.rank)
        return self._rows(weights, loc, log_scale, directions)

    def natural_units(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units`."""
        return torch.cat([scale_tril.diagonal(), scale_tril.new_ones(self.num_outputs - self.size)])

    def _rows(
        self, weights: Tensor, loc: Tensor, log_scale: Tensor, directions: Tensor
    ) -> tuple[Tensor, Tensor]:
        all_weights = weights.new_zeros(self.num_outputs, weights.shape[-1])
        all_weights[: self.size] = weights
        shown = directions.square().sum(0) > 0
        noise = torch.randn(directions.shape, generator=torch.Generator().manual_seed(self.size))
        woken = torch.where(shown, directions, WAKE * noise.to(directions))
        return all_weights, torch.cat([loc, log_scale, woken.flatten()])

    def start_from_samples(self, inputs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the regression on the inputs; directions are those in which its residuals vary more than by chance."""
        x, y = in_float64(inputs), in_float64(values)
        columns = range(x.shape[-1])
        if len(columns):
            moments = Moments(torch.cat([x, y], -1))
            own = range(len(columns), len(columns) + self.size)
            weights = moments.weights(columns, own, moments.ridge(columns, own))
        else:
            weights = y.new_zeros(self.size, 0)
        loc = y.mean(0) - weights @ x.mean(0)
        residual = y - loc - x @ weights.mT
        spread = residual.square().mean(0).sqrt().clamp(min=RESIDUAL_FLOOR)
        correlated = residual / spread / len(residual) ** 0.5
        most = min(self.rank, *correlated.shape)
        _, values_, vectors = torch.svd_lowrank(correlated, q=min(most + 4, *correlated.shape), niter=3)
        by_chance = (1 + (self.size / len(residual)) ** 0.5) ** 2  # Marchenko and Pastur's edge
        directions = y.new_zeros(self.size, self.rank)
        found = (values_[:most].square() - 1).clamp(min=0.0).sqrt()
        found = torch.where(values_[:most].square() > by_chance * 1.05, found, torch.zeros_like(found))
        directions[:, :most] = vectors[:, :most] * found
        share = directions.square().sum(-1).clamp(max=0.99)
        directions = directions * (share / directions.square().sum(-1).clamp(min=1e-12)).sqrt().unsqueeze(-1)
        left = (1 - share).sqrt()
        rows = self._rows(weights, loc, (spread * left).log(), directions / left.unsqueeze(-1))
        return rows[0].to(inputs), rows[1].to(inputs)


def diagonal_and_directions(covariance: Tensor, rank: int, *, num_rounds: int = 20) -> tuple[Tensor, Tensor]:
    r"""Return the log-scales and directions of a diagonal plus low-rank covariance close to a given one.

    Principal factors, by alternating between the leading eigenvectors of what the diagonal leaves and the diagonal that
    these leave.

    Args:
        covariance: Positive definite, ``(n, n)``.
        rank: The number of directions.
        num_rounds: How often to alternate.

    Returns:
        Log-scales ``log d`` of shape ``(n,)`` and directions F of shape ``(n, rank)``, for
        :math:`\mathrm{diag}(d) (I + F F^\top) \mathrm{diag}(d)`.
    """
    scale = covariance.diagonal().sqrt()
    correlation = covariance / scale / scale.unsqueeze(-1)
    n = len(scale)
    directions = correlation.new_zeros(n, rank)
    most = min(rank, n)
    left = torch.ones_like(scale)
    for _ in range(num_rounds):
        values, vectors = torch.linalg.eigh(correlation - left.diag_embed())
        leading = values.flip(-1)[:most].clamp(min=0.0)
        directions[:, :most] = vectors.flip(-1)[:, :most] * leading.sqrt()
        left = (1 - directions.square().sum(-1)).clamp(min=0.01)
    return (scale * left.sqrt()).log(), directions / left.sqrt().unsqueeze(-1)
