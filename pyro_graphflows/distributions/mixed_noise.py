r"""A normal over long vectors whose noise is mixed by the identity plus a matrix of low rank.

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

__all__ = ["MixedNoiseNormal"]


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

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + (n,)``."""
        shape = torch.Size(sample_shape) + self.loc.shape
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        inner = (self.right.mT @ noise.unsqueeze(-1)).squeeze(-1)
        return self.loc + self.scale * (noise + (self.left @ inner.unsqueeze(-1)).squeeze(-1))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of vectors, shape ``batch_shape``, in nats."""
        rank = self.left.shape[-1]
        eye = torch.eye(rank, dtype=self.loc.dtype, device=self.loc.device)
        inner = eye + self.right.mT @ self.left
        mixed = (value - self.loc) / self.scale
        solved = torch.linalg.solve(inner, self.right.mT @ mixed.unsqueeze(-1))
        noise = mixed - (self.left @ solved).squeeze(-1)
        log_det = torch.linalg.slogdet(inner)[1] + self.scale.log().sum(-1)
        return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - log_det
