r"""The factor of a site whose conditional is a monotone spline of noise.

.. math:: u = \text{shift} + \text{scale} \odot (\text{loc} + D\,U\,y), \qquad y_i = \mathrm{RQS}_i(\varepsilon_i)

with location, log-scales, the unit lower triangular ``U`` and the knots of the rational-quadratic splines from the
masked network. Density and draws are in closed form. ``U`` makes the elements of a vector autoregressive, linear in
those before. With knots at zero the splines are the identity, so that the conditional is normal (or Student's t or
logistic, as its base), and a linear start is exact.

References:
    [1] Durkan et al. (2019), Neural Spline Flows, Section 3.
"""

import math
from typing import Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_graphflows.distributions.last_draw import LastDraw
from pyro_graphflows.distributions.rational_spline import num_spline_parameters
from pyro_graphflows.distributions.spline import SplineDistribution
from pyro_graphflows.guides.conditionals.factors import (
    Factor,
    NormalFactor,
    fused_elements,
    fused_vector,
    normal_vector,
    positive_scale,
    share_of_evidence,
)
from pyro_graphflows.guides.sites import SitePrior

__all__ = ["SplineFactor", "SplineVector"]


class SplineFactor(Factor):
    """A spline of noise for each element, mixed by a triangular matrix within the site.

    Args:
        size: The length of the site's flat unconstrained vector.
        num_bins: The number of bins of each spline.
        bound: The noise is left alone outside of ``[-bound, bound]``.
        base: ``"normal"``, ``"student"`` or ``"logistic"``.
        df: The degrees of freedom of a base that is Student's t.
    """

    def __init__(self, size: int, num_bins: int, bound: float, base: str, df: float) -> None:
        super().__init__(size)
        self.num_bins, self.bound, self.base, self.df = num_bins, bound, base, df
        self._inner = NormalFactor(size)

    @property
    def num_outputs(self) -> int:
        """Those of a normal factor, and the knots."""
        return self._inner.num_outputs + self.size * num_spline_parameters(self.num_bins)

    @property
    def log_scale_outputs(self) -> tuple[int, ...]:
        """See :attr:`Factor.log_scale_outputs`."""
        return self._inner.log_scale_outputs

    @property
    def _spread(self) -> float:
        """The standard deviation of the base."""
        if self.base == "logistic":
            return math.pi / math.sqrt(3)
        if self.base == "student" and self.df > 2:
            return math.sqrt(self.df / (self.df - 2))
        return 1.0

    def distribution(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """See :meth:`Factor.distribution`."""
        if self.size == 1:
            loc = torch.addcmul(shift, scale, outputs[..., :1])
            return self._splines(outputs, loc, scale * positive_scale(outputs[..., 1:2], shift, scale))
        loc, scale_tril = normal_vector(outputs[..., : self._inner.num_outputs], shift, scale)
        elements = self._splines(outputs, torch.zeros_like(loc), torch.ones_like(loc))
        return SplineVector(elements, loc, scale_tril)

    @property
    def takes_matrix(self) -> bool:
        """See :attr:`Factor.takes_matrix`."""
        return True

    def _splines(self, outputs: Tensor, loc: Tensor, scale: Tensor) -> SplineDistribution:
        knots = outputs[..., self._inner.num_outputs :].unflatten(-1, (self.size, -1))
        df = self.df if self.base == "student" else None
        return SplineDistribution(loc, scale, knots, bound=self.bound, base=self.base, df=df)

    @property
    def can_fuse(self) -> bool:
        """See :attr:`Factor.can_fuse`."""
        return True

    def fused(
        self, outputs: Tensor, shift: Tensor, scale: Tensor, prior: SitePrior
    ) -> dist.TorchDistribution:
        """See :meth:`Factor.fused`: location and scale are those of the prior times a normal."""
        n, inner = self.size, self._inner.num_outputs
        if n == 1:
            parts = outputs[..., :1], outputs[..., 1:2]
            loc, log_scale = fused_elements(*parts, (shift, scale), [prior])
            share = share_of_evidence(prior)
            if share is not None:  # where elements say nothing the conditional is the prior
                shape = np.broadcast_shapes(share.shape[:-1], outputs.shape[:-1])
                knots = share.expand(*shape, 1) * outputs[..., inner:]
                outputs = torch.cat([outputs[..., :inner].expand(*shape, inner), knots], -1)
            return self._splines(outputs, loc, log_scale.exp())
        loc, scale_tril = fused_vector(outputs[..., :inner], shift, scale, prior)
        elements = self._splines(outputs, torch.zeros_like(loc), torch.ones_like(loc))
        return SplineVector(elements, loc, scale_tril)

    def fused_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Factor.fused_start`; the splines become the identity."""
        rows, biases = self._inner.fused_start(weights, loc, scale_tril)
        more = self.num_outputs - len(biases)
        return torch.cat([rows, rows.new_zeros(more, rows.shape[-1])]), torch.cat(
            [biases, biases.new_zeros(more)]
        )

    def linear_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Factor.linear_start`; the splines become the identity."""
        rows, biases = self._inner.linear_start(weights, loc, scale_tril / self._spread)
        more = self.num_outputs - len(biases)
        return torch.cat([rows, rows.new_zeros(more, rows.shape[-1])]), torch.cat(
            [biases, biases.new_zeros(more)]
        )

    def natural_units(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units`: those of a normal factor, and ones for the knots."""
        return self._with_knots(self._inner.natural_units(scale_tril))

    def natural_units_beside_prior(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units_beside_prior`."""
        return self._with_knots(self._inner.natural_units_beside_prior(scale_tril))

    def _with_knots(self, own: Tensor) -> Tensor:
        return torch.cat([own, own.new_ones(self.num_outputs - len(own))])


class SplineVector(dist.TorchDistribution):
    """Splines of noise, mixed by a triangular matrix: ``loc + scale_tril @ y``.

    Args:
        elements: The splines.
        loc: Locations, ``(*batch, n)``.
        scale_tril: Lower triangular with a positive diagonal, ``(*batch, n, n)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, elements: SplineDistribution, loc: Tensor, scale_tril: Tensor) -> None:
        self.elements, self.loc, self.scale_tril = elements, loc, scale_tril
        self._last = LastDraw()  # with the images of the splines
        super().__init__(elements.batch_shape, elements.event_shape, validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """All real vectors."""
        return constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SplineVector":
        """Return the same distribution at a larger batch shape."""
        shape, n = torch.Size(batch_shape), self.event_shape[0]
        new = SplineVector(
            self.elements.expand(shape), self.loc.expand(*shape, n), self.scale_tril.expand(*shape, n, n)
        )
        new._last = self._last
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + event_shape``."""
        y = self.elements.rsample(sample_shape)
        value = self.loc + (self.scale_tril @ y.unsqueeze(-1)).squeeze(-1)
        self._last.keep(value, y)
        return value

    @property
    def mean(self) -> Tensor:
        """The image of noise zero, which is the mean where the splines are the identity."""
        return self.loc + (self.scale_tril @ self.elements.mean.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of vectors, shape ``batch_shape``."""
        known = self._last.behind(value, (self.loc, self.scale_tril))
        if known is not None:
            (y,) = known
        else:
            residual = (value - self.loc).unsqueeze(-1)
            tril = self.scale_tril.expand(*residual.shape[:-2], -1, -1)
            y = torch.linalg.solve_triangular(tril, residual, upper=False).squeeze(-1)
        log_det: Tensor = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.elements.log_prob(y) - log_det
