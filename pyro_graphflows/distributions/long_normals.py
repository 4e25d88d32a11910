r"""Normals over long vectors, with fewer numbers than a full covariance.

**Autoregressive.** Each element looks at a few earlier ones:

.. math:: u_i = \text{loc}_i + \sum_j W_{ij} u_j + \text{scale}_i \, \varepsilon_i

with W strictly lower triangular and sparse. Memory is linear in the number of pairs; a draw takes as many rounds as the
longest chain of pairs, since W to that power is zero; a density takes one.

**Mixed noise.** The noise is mixed by the identity plus a matrix of low rank:

.. math:: u = \text{loc} + \text{scale} \odot (I + U V^\top) \varepsilon

Directions may be wider than the diagonal (as :math:`F F^\top` beside it is) or narrower: the posterior of many
weights given a few observations is the prior but for some directions that are known. Draws and densities of N elements
cost N r, with r by r determinants:

.. math:: \log |\det (I + U V^\top)| = \log |\det (I + V^\top U)|, \qquad
          (I + U V^\top)^{-1} = I - U (I + V^\top U)^{-1} V^\top.
"""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = [
    "AutoregressiveNormal",
    "MixedNoiseNormal",
    "standard_normal",
    "sum_over_pairs",
]


class AutoregressiveNormal(dist.TorchDistribution):
    """A normal given by its sparse autoregression; see the module's essay.

    Shape:
        - ``loc``, ``scale``: ``(*batch, n)``; ``weights``: ``(*batch, pairs)``; ``pairs``: ``(2, pairs)``.
        - values: ``(*batch, n)``.

    Args:
        loc: The locations without what earlier elements add.
        scale: The scales.
        weights: What an earlier element is multiplied by.
        pairs: The elements i and the earlier elements j.
        depth: The length of the longest chain of pairs.

    Example:
        >>> pairs = torch.tensor([[1], [0]])  # the second element looks at the first
        >>> AutoregressiveNormal(torch.ones(2), torch.ones(2), torch.tensor([0.5]), pairs, 1).mean
        tensor([1.0000, 1.5000])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, weights: Tensor, pairs: Tensor, depth: int) -> None:
        self.loc, self.scale, self.weights, self.pairs, self.depth = loc, scale, weights, pairs, depth
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "AutoregressiveNormal":
        """Return the same distribution at a larger batch shape."""
        batch = torch.Size(batch_shape)
        loc, scale, weights = (
            part.expand(batch + part.shape[-1:]) for part in (self.loc, self.scale, self.weights)
        )
        return AutoregressiveNormal(loc, scale, weights, self.pairs, self.depth)

    def _solve(self, given: Tensor) -> Tensor:
        """Return u with ``u = given + W u``."""
        u = given
        for _ in range(self.depth):
            u = given + sum_over_pairs(self.weights, self.pairs, u)
        return u

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self._solve(self.loc)

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value that standard normal noise gives, and the log-determinant of the map, ``(*batch,)``."""
        value = self._solve(self.loc + self.scale * noise)
        return value, self.scale.log().sum(-1).expand(value.shape[:-1])

    def pull(self, value: Tensor) -> Tensor:
        """Return the noise that gives a value."""
        noise: Tensor = (value - sum_over_pairs(self.weights, self.pairs, value) - self.loc) / self.scale
        return noise

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + (n,)``."""
        shape = torch.Size(sample_shape) + self.loc.shape
        return self.push(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of vectors, shape ``batch_shape``, in nats."""
        return standard_normal(self.pull(value)) - self.scale.log().sum(-1)


def standard_normal(noise: Tensor) -> Tensor:
    """Return the log-density of vectors of independent standard normals, in nats."""
    return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)


def sum_over_pairs(weights: Tensor, pairs: Tensor, values: Tensor) -> Tensor:
    r"""Return :math:`\sum_j W_{ij} v_j` for each i.

    Args:
        weights: The entries of W, ``(*batch, pairs)``.
        pairs: Their rows and columns, ``(2, pairs)``.
        values: v, ``(*batch, n)``.
    """
    terms = weights * values.index_select(-1, pairs[1])
    total = terms.new_zeros(*terms.shape[:-1], values.shape[-1])
    return total.index_add(-1, pairs[0], terms)


class MixedNoiseNormal(dist.TorchDistribution):
    """A normal given by a low-rank mixing of its noise; see the module's essay.

    Shape:
        - ``loc``, ``scale``: ``(*batch, n)``; ``left``, ``right``: ``(*batch, n, r)``.
        - values: ``(*batch, n)``.

    Args:
        loc: The mean.
        scale: The scales.
        left: U.
        right: V.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, left: Tensor, right: Tensor) -> None:
        self.loc, self.scale, self.left, self.right = loc, scale, left, right
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MixedNoiseNormal":
        """Return the same distribution at a larger batch shape."""
        batch = torch.Size(batch_shape)
        loc, scale = (part.expand(batch + part.shape[-1:]) for part in (self.loc, self.scale))
        left, right = (part.expand(batch + part.shape[-2:]) for part in (self.left, self.right))
        return MixedNoiseNormal(loc, scale, left, right)

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.loc

    @property
    def covariance_matrix(self) -> Tensor:
        """The covariance, ``(*batch, n, n)``."""
        n = self.loc.shape[-1]
        eye = torch.eye(n, dtype=self.loc.dtype, device=self.loc.device)
        root = self.scale.unsqueeze(-1) * (eye + self.left @ self.right.mT)
        return root @ root.mT

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value that standard normal noise gives, and the log-determinant of the map, ``(*batch,)``."""
        inner = self.right.mT @ noise.unsqueeze(-1)
        value = self.loc + self.scale * (noise + (self.left @ inner).squeeze(-1))
        return value, self._log_det().expand(value.shape[:-1])

    def pull(self, value: Tensor) -> Tensor:
        """Return the noise that gives a value."""
        mixed = (value - self.loc) / self.scale
        solved = torch.linalg.solve(self._inner(), self.right.mT @ mixed.unsqueeze(-1))
        noise: Tensor = mixed - (self.left @ solved).squeeze(-1)
        return noise

    def _inner(self) -> Tensor:
        rank = self.left.shape[-1]
        return torch.eye(rank, dtype=self.loc.dtype, device=self.loc.device) + self.right.mT @ self.left

    def _log_det(self) -> Tensor:
        return torch.linalg.slogdet(self._inner())[1] + self.scale.log().sum(-1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + (n,)``."""
        shape = torch.Size(sample_shape) + self.loc.shape
        return self.push(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of vectors, shape ``batch_shape``, in nats."""
        return standard_normal(self.pull(value)) - self._log_det()
