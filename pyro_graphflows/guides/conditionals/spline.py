r"""The family of splines, and its factor: a site whose conditional is a monotone spline of noise.

.. math:: u = \text{shift} + \text{scale} \odot (\text{loc} + D\,U\,y), \qquad y_i = \mathrm{RQS}_i(\varepsilon_i)

with location, log-scales, the unit lower triangular ``U`` and the knots of the rational-quadratic splines from the
masked network. Density and draws are in closed form. ``U`` makes the elements of a vector autoregressive, linear in
those before. With knots at zero the splines are the identity, so that the conditional is normal (or Student's t or
logistic, as its base), and a linear start is exact.

References:
    [1] Durkan et al. (2019), Neural Spline Flows, Section 3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_graphflows.distributions.last_draw import LastDraw
from pyro_graphflows.distributions.rational_spline import num_spline_parameters
from pyro_graphflows.distributions.spline import BASES, SplineDistribution
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.conditionals.contract import (
    BlockSpec,
    Conditionals,
    Family,
    SiteRole,
    freeze_widths,
    require_fusion,
    require_positive,
)
from pyro_graphflows.guides.conditionals.factors import (
    Factor,
    NormalFactor,
    fused_elements,
    fused_vector,
    normal_vector,
    positive_scale,
    share_of_evidence,
)
from pyro_graphflows.guides.conditionals.masked import NETWORK_OPTIONS, MaskedConditionals, Normal
from pyro_graphflows.guides.sites import LatentSite, SitePrior
from pyro_graphflows.nn.activations import make_activation

__all__ = ["Spline", "SplineFactor", "SplineVector"]

# Of the parameters of knots where a guide is for one data set, and trained on few draws a step. There are more of them
# than of all else, and each step of Adam moves all of them: by whole units a rate of .01 makes bins of next to no width
# in a few hundred steps, from which a falling rate does not return.
KNOT_UNIT = 0.3


@dataclass(frozen=True)
class Spline(Family):
    r"""Flexible conditionals in closed form: a monotone rational-quadratic spline of noise for each element.

    In unconstrained space, :math:`z_v = \text{loc}_v + \text{scale}_v\, \mathrm{RQS}_v(\varepsilon_v)`, with
    location, scale and knots from a masked network of the parents. Drawing and scoring any value need no iteration.
    Elements of a vector are autoregressive, linear in those before
    (:mod:`~pyro_graphflows.guides.conditionals.spline`). After the regression start the splines are the identity, so
    that every conditional is linear-Gaussian. The tails are those of the base. Discrete sites and those whose copies
    are drawn jointly have the factors that they have in :class:`Normal`.

    References:
        [1] Durkan et al. (2019), Neural Spline Flows.
        [2] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.

    Args:
        num_bins: The number of bins of each spline.
        bound: The noise is left alone outside of ``[-bound, bound]``.
        base: ``"normal"``, ``"student"`` or ``"logistic"``.
        df: The degrees of freedom of a base that is Student's t.
        hidden_dims: Widths of the hidden layers; None for ``units_per_set`` units for each distinct set of parents.
        units_per_set: See ``hidden_dims``.
        hidden_layers: The number of hidden layers where ``hidden_dims`` is None.
        activation: ``"elu"``, ``"relu"``, ``"tanh"`` ...
        skip: Whether a linear map from the parents runs beside the hidden layers. The regression start needs it.
        fusion: See :class:`Normal`. Location and scale of the spline are then those of the prior times a normal.

    Raises:
        GraphflowsError: If there are fewer than two bins, a number is not positive, or the base or the activation is
            unknown.

    Example:
        >>> Spline(num_bins=4).base
        'normal'
    """

    num_bins: int = 8
    bound: float = 4.0
    base: str = "normal"
    df: float = 7.0
    hidden_dims: Sequence[int] | None = None
    units_per_set: int = 16
    hidden_layers: int = 1
    activation: str = "elu"
    skip: bool = True
    fusion: bool | str = "auto"

    def __post_init__(self) -> None:
        require_fusion(self)
        require_positive(self, "num_bins")
        if self.num_bins < 2:
            raise GraphflowsError(f"Expected num_bins >= 2; got {self.num_bins}.")
        num_spline_parameters(self.num_bins)  # refuses more than there is room for
        if not isinstance(self.bound, int | float) or not 0 < self.bound < math.inf:
            raise GraphflowsError(f"Expected a positive, finite bound; got {self.bound!r}.")
        if self.base not in BASES:
            raise GraphflowsError(f"Expected a base among {', '.join(BASES)}; got {self.base!r}.")
        if not isinstance(self.df, int | float) or not 0 < self.df < math.inf:
            raise GraphflowsError(f"Expected positive, finite degrees of freedom; got {self.df!r}.")
        freeze_widths(self)
        require_positive(self, "units_per_set", "hidden_layers")
        make_activation(self.activation)

    @property
    def can_regress(self) -> bool:
        """Whether there are linear maps to set."""
        return self.skip

    @property
    def can_split(self) -> bool:
        """Elements of a vector are mixed by one matrix."""
        return False

    @property
    def has_vectors(self) -> bool:
        """Long vectors are normal."""
        return True

    def serving(self, role: SiteRole) -> Family:
        """Return this family, or normal conditionals with the same networks for long vectors."""
        if role.long is None:
            return self
        return Normal(**{name: getattr(self, name) for name in NETWORK_OPTIONS}).serving(role)

    def conditionals(self, spec: BlockSpec) -> Conditionals:
        """See :meth:`Family.conditionals`."""

        def make_factor(site: LatentSite) -> Factor:
            return SplineFactor(site.size, self.num_bins, self.bound, self.base, self.df)

        options: dict[str, Any] = {name: getattr(self, name) for name in NETWORK_OPTIONS}
        return MaskedConditionals(spec, make_factor, options)


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

    @property
    def num_before_knots(self) -> int:
        """The number of outputs before those of the knots: of location and scale."""
        return self._inner.num_outputs

    def natural_units(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units`: those of a normal factor, and one for the knots."""
        return self._with_knots(self._inner.natural_units(scale_tril))

    def natural_units_beside_prior(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units_beside_prior`."""
        return self._with_knots(self._inner.natural_units_beside_prior(scale_tril))

    def _with_knots(self, own: Tensor) -> Tensor:
        unit = KNOT_UNIT if self.serves_one else 1.0
        return torch.cat([own, own.new_full((self.num_outputs - len(own),), unit)])


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
