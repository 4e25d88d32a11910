"""Normals restricted to positive increasing vectors."""

import math
from functools import lru_cache

import numpy as np
import torch
from pyro.distributions import Normal, TorchDistribution, constraints
from torch import Tensor


@lru_cache(maxsize=32)
def log_normalizer(m1: float, m2: float, s1: float, s2: float) -> float:
    """Return the logarithm of the probability that two normal values are positive and in order, by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    low, high = max(0.0, m1 - 12 * s1), max(0.0, m1) + 12 * s1
    x = torch.as_tensor(low + (high - low) * (nodes + 1) / 2, dtype=torch.float64)
    log_density = Normal(m1, s1).log_prob(x)
    log_above = torch.special.log_ndtr((m2 - x) / s2)
    log_weights = torch.as_tensor(np.log(weights * (high - low) / 2), dtype=torch.float64)
    return float(torch.logsumexp(log_density + log_above + log_weights, 0))


class PositiveOrderedNormal(TorchDistribution):
    r"""Two independent normals restricted to :math:`0 < x_1 < x_2`, normalised.

    The normalising constant is :math:`\int_0^\infty N(x; m_1, s_1) \, \Phi((m_2 - x) / s_2) \, dx`, by quadrature.
    Draws are made by rejection; there are no reparametrised ones.

    Args:
        loc: The two means before the restriction, constants.
        scale: The two standard deviations, constants.
    """

    arg_constraints = {"loc": constraints.real_vector, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.positive_ordered_vector

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None):
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        if self.loc.shape != (2,):
            raise ValueError(
                f"Expected two means and two standard deviations; got shape {tuple(self.loc.shape)}."
            )
        (m1, m2), (s1, s2) = self.loc.tolist(), self.scale.tolist()
        self._log_normalizer = log_normalizer(m1, m2, s1, s2)
        super().__init__((), (2,), validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):  # type: ignore[no-untyped-def]
        """Return the distribution with another batch shape."""
        new = self._get_checked_instance(PositiveOrderedNormal, _instance)
        new.loc, new.scale, new._log_normalizer = self.loc, self.scale, self._log_normalizer
        super(PositiveOrderedNormal, new).__init__(torch.Size(batch_shape), (2,), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw by rejection."""
        shape = torch.Size(sample_shape) + self.batch_shape
        missing = math.prod(shape)
        kept: list[Tensor] = []
        while missing > 0:
            x = self.loc + self.scale * torch.randn(2 * missing + 8, 2, dtype=self.loc.dtype)
            x = x[(x[:, 0] > 0) & (x[:, 1] > x[:, 0])][:missing]
            kept.append(x)
            missing -= len(x)
        return torch.cat(kept).reshape(*shape, 2) if kept else self.loc.new_empty(*shape, 2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, with the normalising constant of the restriction."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = Normal(self.loc, self.scale).log_prob(value).sum(-1) - self._log_normalizer
        batch = torch.broadcast_shapes(log_prob.shape, self.batch_shape)
        return log_prob.expand(batch)
