r"""Normals over long vectors, with fewer numbers than a full covariance.

**Autoregressive.** Each element looks at a few earlier ones:

.. math:: u_i = \text{loc}_i + \sum_j W_{ij} u_j + \text{scale}_i \, \varepsilon_i

with W strictly lower triangular and sparse. Memory is linear in the number of pairs; a draw takes as many rounds as the
longest chain of pairs, since W to that power is zero; a density takes one.

**Banded.** Elements in a row, each of which looks at the k before it: the precision is banded, as that of random walks,
autoregressions and their posteriors is. Memory is linear in the number of elements, and a draw takes
:math:`\log_2 n` rounds: the maps :math:`u_{i-1} \mapsto u_i` are joined two by two.

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
from torch.nn.functional import pad

from pyro_graphflows.distributions.last_draw import LastDraw

__all__ = [
    "AutoregressiveNormal",
    "BandedNormal",
    "MixedNoiseNormal",
    "solve_band",
    "solve_band_transposed",
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


class BandedNormal(dist.TorchDistribution):
    r"""A normal over elements in a row, each of which looks at the k before it; see the module's essay.

    .. math:: u_i = \text{loc}_i + \sum_{j=1}^{k} a_{ij} (u_{i-j} - \text{loc}_{i-j}) + \text{scale}_i\, \varepsilon_i

    Values are u, or with ``differences`` the steps that u takes, :math:`u_i - u_{i-1}` with :math:`u_{-1} = 0`.

    Shape:
        - ``loc``, ``scale``: ``(*batch, n)``; ``coefficients``: ``(*batch, n, k)``.
        - values: ``(*batch, n)``.

    Args:
        loc: The mean of u.
        scale: The scales.
        coefficients: a; those of elements before the first do not count.
        differences: Whether values are the steps of u.

    Example:
        >>> a = torch.full((3, 1), 0.5)
        >>> BandedNormal(torch.zeros(3), torch.ones(3), a).pull(torch.tensor([1.0, 1.0, 1.0]))
        tensor([1.0000, 0.5000, 0.5000])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, coefficients: Tensor, *, differences: bool = False
    ) -> None:
        self.loc, self.scale, self.coefficients, self.differences = loc, scale, coefficients, differences
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "BandedNormal":
        """Return the same distribution at a larger batch shape."""
        batch = torch.Size(batch_shape)
        loc, scale = (part.expand(batch + part.shape[-1:]) for part in (self.loc, self.scale))
        coefficients = self.coefficients.expand(batch + self.coefficients.shape[-2:])
        return BandedNormal(loc, scale, coefficients, differences=self.differences)

    def _values(self, walk: Tensor) -> Tensor:
        return walk - _earlier(walk, 1) if self.differences else walk

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self._values(self.loc)

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value that standard normal noise gives, and the log-determinant of the map, ``(*batch,)``."""
        value = self._values(self.loc + solve_band(self.coefficients, self.scale * noise))
        return value, self.scale.log().sum(-1).expand(value.shape[:-1])

    def pull(self, value: Tensor) -> Tensor:
        """Return the noise that gives a value."""
        off = (value.cumsum(-1) if self.differences else value) - self.loc
        noise = off
        for j in range(self.coefficients.shape[-1]):
            noise = noise - self.coefficients[..., j] * _earlier(off, j + 1)
        return noise / self.scale

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + (n,)``."""
        shape = torch.Size(sample_shape) + self.loc.shape
        return self.push(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of vectors, shape ``batch_shape``, in nats."""
        return standard_normal(self.pull(value)) - self.scale.log().sum(-1)


def _earlier(values: Tensor, steps: int, dim: int = -1) -> Tensor:
    """Return what is some steps before along a dimension from the right, and zeros before the first."""
    kept = values.narrow(dim, 0, max(values.shape[dim] - steps, 0))
    return pad(kept, (0, 0) * (-1 - dim) + (min(steps, values.shape[dim]), 0))


def solve_band(coefficients: Tensor, given: Tensor) -> Tensor:
    r"""Return u with :math:`u_i = \text{given}_i + \sum_j a_{ij} u_{i-j}`, where there is nothing before the first.

    Args:
        coefficients: a, ``(*batch, n, k)``.
        given: ``(*batch, n)``.

    Example:
        >>> solve_band(torch.ones(4, 1), torch.ones(4))
        tensor([1., 2., 3., 4.])
    """
    n, k = coefficients.shape[-2:]
    if k == 0:
        return given
    steps = 1
    if k == 1:
        slope, value = coefficients[..., 0], given
        while steps < n:
            value = value + slope * _earlier(value, steps)
            steps *= 2
            if steps < n:
                slope = slope * _earlier(slope, steps // 2)
        return value
    # k elements together look at the k before them alone: the same with matrices
    blocks = -(-n // k)
    a = pad(coefficients, (0, 0, 0, blocks * k - n)).unflatten(-2, (blocks, k))
    rows = torch.arange(k, device=given.device).unsqueeze(-1)
    back = rows - torch.arange(k, device=given.device)  # steps from a row to a column of the same block
    inside = a.gather(-1, (back - 1).clamp(min=0).expand(a.shape)) * (back > 0)
    before = a.gather(-1, (back + k - 1).clamp(max=k - 1).expand(a.shape)) * (back <= 0)
    eye = torch.eye(k, dtype=a.dtype, device=a.device)
    inverse = torch.linalg.solve_triangular(
        eye - inside, eye.expand(a.shape), upper=False, unitriangular=True
    )
    slope = inverse @ before
    value = inverse @ pad(given, (0, blocks * k - n)).unflatten(-1, (blocks, k)).unsqueeze(-1)
    while steps < blocks:
        value = value + slope @ _earlier(value, steps, -3)
        steps *= 2
        if steps < blocks:
            slope = slope @ _earlier(slope, steps // 2, -3)
    return value.flatten(-3)[..., :n]


def solve_band_transposed(coefficients: Tensor, given: Tensor) -> Tensor:
    r"""Return u with :math:`u_i = \text{given}_i + \sum_j a_{i+j,j} u_{i+j}`, the transpose of :func:`solve_band`.

    Args:
        coefficients: a, ``(*batch, n, k)``.
        given: ``(*batch, n)``.
    """
    k = coefficients.shape[-1]
    # from the last element on, element i looks at i + j with the coefficient by which i + j looks at i
    if k == 0:
        return given
    turned = [_earlier(coefficients[..., j].flip(-1), j + 1) for j in range(k)]
    return solve_band(torch.stack(turned, -1), given.flip(-1)).flip(-1)


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
        - ``loc``: ``(*batch, n)``; ``scale``: ``(*batch, n)`` or ``(n,)``; ``left``, ``right``: ``(*batch, n, r)``, or
          ``(n, r)`` for one mixing of all.
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
        self._last = LastDraw()  # with its noise
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MixedNoiseNormal":
        """Return the same distribution at a larger batch shape."""
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        new = MixedNoiseNormal(loc, self.scale, self.left, self.right)
        new._last = self._last
        return new

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
        return (root @ root.mT).expand(*self.batch_shape, n, n)

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value that standard normal noise gives, and the log-determinant of the map, ``(*batch,)``."""
        value = self._of_noise(noise)
        return value, self._log_det().expand(value.shape[:-1])

    def _of_noise(self, noise: Tensor) -> Tensor:
        mixed = noise + _times(self.left, _times(self.right.mT, noise))
        return torch.addcmul(self.loc, self.scale, mixed)

    def pull(self, value: Tensor) -> Tensor:
        """Return the noise that gives a value."""
        mixed = (value - self.loc) / self.scale
        solved = torch.linalg.solve(self._inner(), _times(self.right.mT, mixed).unsqueeze(-1)).squeeze(-1)
        noise: Tensor = mixed - _times(self.left, solved)
        return noise

    def _inner(self) -> Tensor:
        rank = self.left.shape[-1]
        return torch.eye(rank, dtype=self.loc.dtype, device=self.loc.device) + self.right.mT @ self.left

    def _log_det(self) -> Tensor:
        return torch.linalg.slogdet(self._inner())[1] + self.scale.log().sum(-1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + (n,)``."""
        shape = torch.Size(sample_shape) + self.loc.shape
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        value = self._of_noise(noise)
        self._last.keep(value, noise)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of vectors, shape ``batch_shape``, in nats."""
        known = self._last.behind(value, (self.loc, self.scale, self.left, self.right))
        noise = self.pull(value) if known is None else known[0]
        return standard_normal(noise) - self._log_det()


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return products of a matrix, or of one for each vector, with vectors ``(*batch, n)``."""
    if matrix.dim() == 2:
        return vectors @ matrix.mT
    return (matrix @ vectors.unsqueeze(-1)).squeeze(-1)
