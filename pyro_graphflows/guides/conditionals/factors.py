r"""Factor families: the conditional distribution of one latent site given what the guide conditions it on.

A factor takes the outputs that a network computed for its site and returns a distribution over the site's flat
unconstrained vector. This is the hook for further families: subclass :class:`Factor`, and pass the class as
``family=`` to :func:`~pyro_graphflows.guides.auto_faithful_guide` (for all continuous sites), or in
``factors={site: class}`` for single sites, continuous or discrete, with any family. A class for a single site may
read the site in :meth:`Factor.for_site`. The distribution that a factor returns is the one that is emitted, pushed to
the support of the site.

Coordinates. The vector ``u`` of a continuous site is standardised, ``u = shift + scale * y``, with constants fixed when
the guide is set up; factors are parametrised in the natural units of ``y`` and return a distribution of ``u``. The
vector of a discrete site is :class:`~pyro_graphflows.guides.sites.DiscreteEncoding`'s, and its shift is 0, its
scale 1.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_graphflows.capture import CAPTURING
from pyro_graphflows.distributions.fusion import fuse, fuse_matrix, fuse_natural
from pyro_graphflows.distributions.long_normals import AutoregressiveNormal, sum_over_pairs
from pyro_graphflows.guides.conditionals.distributions import DiscreteVector, ScalarNormal
from pyro_graphflows.guides.sites import LatentSite, SitePrior
from pyro_graphflows.regression import logistic_regression

__all__ = [
    "DiscreteFactor",
    "ElementNormalFactor",
    "Factor",
    "NormalFactor",
    "NormalOutputs",
    "SharedCovarianceFactor",
    "bounded_log_scale",
    "factor_locations",
    "fused_elements",
    "fused_scalar_normals",
    "fused_vector",
    "inverse_of_lower",
    "normal_vector",
    "positive_scale",
    "scalar_normals",
    "share_of_long",
    "unit_lower",
]

TINY = 1e-30
LEAST_SHARE = 0.02  # of its marginal scale that an element may move alone in a step of training
LOG_SCALE_BOUND = 20.0  # exp() of it is far outside of any standardised scale
MOST_DENSE = 32  # elements up to which an autoregression is solved as a matrix
MOST_DEPTH = 8  # of an autoregression that is solved round by round
FREE = 100  # numbers of a long vector that move in full units in a step of training, or more of them less
FREE_MIXING = 16  # the same of what mixes its elements: a number for each pair of them
ROUNDINGS = 400.0  # a scale is at least so many times the rounding error of a value of the standardised size


def positive_scale(outputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return scales from their logarithms, not so small that a value cannot be told from its location.

    The density of a draw is computed from the draw. Where the scale is below the rounding error of a draw, that density
    is far too small and the bound on the evidence far too high, and training is drawn there.

    Args:
        outputs: Logarithms in standardised units.
        shift: The shift of the standardisation.
        scale: Its scale, or a lower triangular matrix.
    """
    return bounded_log_scale(outputs, shift, scale).exp()


def bounded_log_scale(outputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return the logarithms of what :func:`positive_scale` returns.

    Args:
        outputs: Logarithms in standardised units.
        shift: The shift of the standardisation.
        scale: Its scale.
    """
    limits = _limits(outputs.dtype, shift, scale)
    return outputs.clamp(limits.least, limits.most)


class _Limits(NamedTuple):
    """The least and the largest logarithms of scales in standardised units, and the logarithm of the unit."""

    least: Tensor
    most: Tensor
    log_unit: Tensor


class _Known(NamedTuple):
    """What was found for a standardisation: its scale and shift, their versions with the type of outputs, limits."""

    scale: Callable[[], Tensor | None]
    shift: Tensor
    key: tuple[int, int, torch.dtype]
    limits: _Limits


_KNOWN: dict[int, _Known] = {}  # by the identity of the scale; entries go with it


def _limits(dtype: torch.dtype, shift: Tensor, scale: Tensor) -> _Limits:
    """Return limits, kept as long as shift and scale are the same tensors and unchanged."""
    if CAPTURING.get() or shift.is_inference() or scale.is_inference():
        return _find_limits(dtype, shift, scale)
    number, key = id(scale), (shift._version, scale._version, dtype)
    known = _KNOWN.get(number)
    if known is not None and known.shift is shift and known.key == key and known.scale() is scale:
        return known.limits
    with torch.no_grad():
        limits = _find_limits(dtype, shift, scale)
    _KNOWN[number] = _Known(weakref.ref(scale, lambda _: _KNOWN.pop(number, None)), shift, key, limits)
    return limits


def _find_limits(dtype: torch.dtype, shift: Tensor, scale: Tensor) -> _Limits:
    scale = scale.diagonal() if scale.dim() == 2 else scale
    rounding = torch.finfo(dtype).eps * (1.0 + (shift / scale).abs())
    least = (ROUNDINGS * rounding).log().clamp(-LOG_SCALE_BOUND, 0.0)
    return _Limits(least, torch.full_like(least, LOG_SCALE_BOUND), scale.log())


def share_of_long(number: int, free: int = FREE) -> float:
    """Return by how much smaller steps are in a vector of many numbers: noise adds up, to the root of their number.

    Args:
        number: How many numbers are trained.
        free: Up to how many are moved in full units.
    """
    return min(1.0, free / max(number, 1)) ** 0.5


class Factor(ABC):
    """The conditional family of one latent site.

    Args:
        size: The length of the site's flat unconstrained vector.

    Attributes:
        shares_constants: Whether the outputs that depend on nothing are the same in a whole batch, and never expanded
            to it. Elements of a plate with parameters of their own then differ in the other outputs alone.
        serves_one: Whether the start is for one data set, on which training sees few draws a step.
    """

    shares_constants: ClassVar[bool] = False
    serves_one: bool = False

    def __init__(self, size: int) -> None:
        self.size = size

    @classmethod
    def for_site(cls, site: LatentSite) -> "Factor":
        """Return the factor of a site; override where more than its size is needed.

        Args:
            site: The site: name, shapes, support, and for discrete ones the encoding.
        """
        return cls(site.size)

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """The number of network outputs that the factor needs."""

    @property
    def output_elements(self) -> tuple[int, ...] | None:
        """For each output the element whose parents it may see; None where every output may see all parents."""
        return None

    @property
    def num_reading(self) -> int:
        """The number of outputs that depend on the parents, the first ones; all unless the family says so."""
        return self.num_outputs

    @property
    def num_fixed(self) -> int:
        """The number of outputs that stay at their start, the last ones; none unless the family says so."""
        return 0

    @property
    def log_scale_outputs(self) -> tuple[int, ...]:
        """The outputs that are logarithms of scales; none unless the family says so."""
        return ()

    @property
    def takes_matrix(self) -> bool:
        """Whether scales of vectors may be lower triangular matrices, ``u = shift + scale @ y``; no by default.

        Then the vector is learned in the basis of its start, in which that has the covariance one: all numbers then
        cost what they would cost in a vector of independent ones, however correlated the elements are.
        """
        return False

    @abstractmethod
    def distribution(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """Return the distribution of the unconstrained vector.

        Args:
            outputs: The network's outputs, shape ``(*batch, num_outputs)``.
            shift: The shift of the standardisation, shape ``(size,)``.
            scale: Its scale, shape ``(size,)``; a matrix ``(size, size)`` only if :attr:`takes_matrix`.

        Returns:
            A distribution with batch shape ``batch`` and event shape ``(size,)``.
        """

    def distribution_with(
        self, outputs: Tensor, constants: Tensor, shift: Tensor, scale: Tensor
    ) -> dist.TorchDistribution:
        """Return :meth:`distribution` where the last outputs depend on nothing.

        Args:
            outputs: The first :attr:`num_reading` outputs, ``(*batch, num_reading)``.
            constants: The others, the same for the whole batch, of one dimension.
            shift: The shift of the standardisation, shape ``(size,)``.
            scale: Its scale, shape ``(size,)``.
        """
        every = constants.expand(*outputs.shape[:-1], -1)
        return self.distribution(torch.cat([outputs, every], -1), shift, scale)

    @abstractmethod
    def linear_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the skip weights and biases for which the factor is a linear-Gaussian conditional.

        In standardised units, ``y | inputs ~ Normal(loc + weights @ inputs, scale_tril @ scale_tril.T)``; a family
        that is not Gaussian returns its closest member.

        Args:
            weights: Shape ``(size, num_inputs)``.
            loc: Shape ``(size,)``.
            scale_tril: Lower triangular, shape ``(size, size)``.

        Returns:
            Weights of shape ``(num_outputs, num_inputs)`` and biases of shape ``(num_outputs,)``.
        """

    @property
    def can_fuse(self) -> bool:
        """Whether the factor can be multiplied by the model's own distribution of the site (:meth:`fused`)."""
        return False

    def fused(
        self, outputs: Tensor, shift: Tensor, scale: Tensor, prior: SitePrior
    ) -> dist.TorchDistribution:
        """Return the distribution proportional to the prior times the factor, in the coordinate of the prior.

        Args:
            outputs: The network's outputs, shape ``(*batch, num_outputs)``.
            shift: The shift of the standardisation of the coordinate, shape ``(size,)``.
            scale: Its scale, shape ``(size,)``.
            prior: The model's distribution of the site.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be fused with a prior.")

    def fused_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """Return skip weights and biases for which the factor beside the prior is linear-Gaussian.

        As :meth:`linear_start`, of the factor and not of the conditional.
        """
        return self.linear_start(weights, loc, scale_tril)

    def natural_units(self, scale_tril: Tensor) -> Tensor:
        """Return how much of each output is one step of training: of locations the scale, of all others 1.

        Outputs that follow the location in :meth:`linear_start` are taken for locations; override where that is wrong.

        Args:
            scale_tril: The scale at the start, in standardised units, ``(size, size)``.

        Returns:
            Positive numbers, ``(num_outputs,)``.
        """
        eye = torch.eye(self.size, dtype=scale_tril.dtype, device=scale_tril.device)
        share = self.linear_start(eye, eye.new_zeros(self.size), eye)[0].abs()
        units = scale_tril.diagonal()[share.argmax(-1)]
        return torch.where(share.amax(-1) > 0, units, torch.ones_like(units))

    def natural_units_beside_prior(self, scale_tril: Tensor) -> Tensor:
        """Return the same of a factor that is multiplied by a prior of about the scale one.

        Args:
            scale_tril: The scale of the factor at the start; what results is no wider than the prior.
        """
        spread = torch.linalg.vector_norm(scale_tril, dim=-1)
        return self.natural_units((spread / (1.0 + spread.square()).sqrt()).diag_embed())

    def start_from_samples(self, inputs: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return skip weights and biases fitted to joint samples, or None to use :meth:`linear_start`.

        Where this returns None, as it does unless overridden, ``linear_start`` gets the least-squares regression.

        Args:
            inputs: Features of the parents in rows, shape ``(n, num_inputs)``.
            values: Standardised vectors of the site, shape ``(n, size)``.

        Returns:
            Weights of shape ``(num_outputs, num_inputs)`` and biases of shape ``(num_outputs,)``, or None.
        """
        return None


def unit_lower(entries: Tensor, size: int) -> Tensor:
    """Return unit lower triangular matrices, ``(*batch, size, size)``.

    Args:
        entries: What is below the diagonals, in the order of :func:`torch.tril_indices`, ``(*batch, entries)``.
        size: The size of the matrices.
    """
    rows, columns = torch.tril_indices(size, size, -1, device=entries.device)
    unit = torch.eye(size, dtype=entries.dtype, device=entries.device).flatten()
    # contiguous: inductor would write to the memory that rows share
    unit = unit.expand(*entries.shape[:-1], -1).contiguous()
    unit = unit.index_copy(-1, size * rows + columns, entries)
    return unit.unflatten(-1, (size, size))


def inverse_of_lower(matrix: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix, ``(size, size)``."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(matrix, eye, upper=False)


class NormalOutputs(Factor):
    """What normal factors share: locations first, then log-scales."""

    @property
    def log_scale_outputs(self) -> tuple[int, ...]:
        """See :attr:`Factor.log_scale_outputs`."""
        return tuple(range(self.size, 2 * self.size))


class NormalFactor(NormalOutputs):
    r"""A normal conditional, ``u = shift + scale * (loc + D U eps)``, with a full covariance within the site.

    ``D`` is diagonal and positive (outputs are its logarithms) and ``U`` is unit lower triangular. This is a full
    autoregressive block over the elements of the site, linear in the elements, with coefficients that depend on
    the parents.
    """

    @property
    def num_outputs(self) -> int:
        """Location and log-scale of each element, and the entries of ``U`` below the diagonal."""
        return 2 * self.size + self.size * (self.size - 1) // 2

    def distribution(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """See :meth:`Factor.distribution`."""
        if self.size == 1:
            loc = torch.addcmul(shift, scale, outputs[..., :1])
            diagonal = scale * positive_scale(outputs[..., 1:2], shift, scale)
            normal = dist.Normal(loc.squeeze(-1), diagonal.squeeze(-1), validate_args=False)
            return ScalarNormal(normal)
        loc, scale_tril = normal_vector(outputs, shift, scale)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)

    @property
    def takes_matrix(self) -> bool:
        """See :attr:`Factor.takes_matrix`; a subclass with another distribution does not."""
        return type(self).distribution is NormalFactor.distribution

    @property
    def can_fuse(self) -> bool:
        """See :attr:`Factor.can_fuse`; a subclass with another distribution cannot."""
        return type(self).distribution is NormalFactor.distribution

    def fused(
        self, outputs: Tensor, shift: Tensor, scale: Tensor, prior: SitePrior
    ) -> dist.TorchDistribution:
        """See :meth:`Factor.fused`; ``U`` is then that of the square root of the factor's precision, ``D^-1 U``."""
        if self.size == 1:
            return fused_scalar_normals(outputs, shift, scale, [prior])[0]
        loc, scale_tril = fused_vector(outputs, shift, scale, prior)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)

    def fused_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Factor.fused_start`."""
        root = inverse_of_lower(scale_tril)  # of the precision
        diagonal = scale_tril.diagonal()
        unit = root * diagonal.unsqueeze(-1)
        return self.linear_start(weights, loc, diagonal.unsqueeze(-1) * unit)

    def linear_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Factor.linear_start`."""
        n = self.size
        all_weights = weights.new_zeros(self.num_outputs, weights.shape[-1])
        all_weights[:n] = weights
        diagonal = scale_tril.diagonal()
        unit = scale_tril / diagonal.unsqueeze(-1)
        rows, columns = torch.tril_indices(n, n, -1, device=weights.device)
        return all_weights, torch.cat([loc, diagonal.log(), unit[rows, columns]])

    def natural_units(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units`: what moves an element by its scale given all other elements.

        Where elements are correlated, one of them alone may move by no more than that. In long vectors less.
        """
        marginal, diagonal = scale_tril.square().sum(-1).sqrt(), scale_tril.diagonal()
        given_others = torch.linalg.inv(scale_tril).square().sum(-2).rsqrt()
        step = torch.maximum(given_others, LEAST_SHARE * marginal)
        rows = torch.tril_indices(self.size, self.size, -1, device=scale_tril.device)[0]
        return self._less_in_long(torch.cat([step, step / marginal, (step / diagonal)[rows]]))

    def _less_in_long(self, units: Tensor) -> Tensor:
        """Return units of which all locations and widths, and all other numbers, move in share of their number."""
        own = 2 * self.size
        share = torch.full_like(units, share_of_long(self.num_outputs, FREE_MIXING))
        share[:own] = share_of_long(own)
        return units * share

    def natural_units_beside_prior(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units_beside_prior`; vectors are in the basis of what results.

        A row of the root of the factor's precision moves by its own length, which is at most one.
        """
        if self.size == 1 or not self.takes_matrix:
            return super().natural_units_beside_prior(scale_tril)
        diagonal, ones = scale_tril.diagonal(), torch.ones_like(scale_tril[0])
        length = torch.linalg.vector_norm(inverse_of_lower(scale_tril), dim=-1).clamp(LEAST_SHARE, 1.0)
        rows = torch.tril_indices(self.size, self.size, -1, device=scale_tril.device)[0]
        return self._less_in_long(torch.cat([ones, ones, (length * diagonal)[rows]]))


def normal_vector(outputs: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return location and Cholesky factor of a vector.

    Args:
        outputs: Locations, log-scales, and the entries of ``U`` below the diagonal, ``(*batch, outputs)``.
        shift: The shift of the standardisation, ``(n,)``.
        scale: Its scale, ``(n,)``, or a lower triangular matrix.
    """
    n = len(shift)
    return _location(outputs[..., :n], shift, scale), _cholesky_factor(outputs[..., n:], shift, scale)


def _location(outputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    if scale.dim() == 2:
        return shift + outputs @ scale.mT
    return torch.addcmul(shift, scale, outputs)


def _cholesky_factor(outputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    width, unit = _width_and_unit(outputs, shift, scale)
    tril = width.unsqueeze(-1) * unit
    return scale @ tril if scale.dim() == 2 else scale.unsqueeze(-1) * tril


def _width_and_unit(outputs: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return widths in standardised units and the matrix U from the outputs that are no locations."""
    n = len(shift)
    return positive_scale(outputs[..., :n], shift, scale), unit_lower(outputs[..., n:], n)


class SharedCovarianceFactor(NormalFactor):
    """A normal with a full covariance that is the same whatever its parents are; only its location depends on them.

    It is the conditional of a model that is linear and normal, with N (N + 1) / 2 numbers for the covariance, where one
    that depends on the parents takes as many weights from each of them.
    """

    shares_constants = True

    @property
    def num_reading(self) -> int:
        """Only locations depend on the parents."""
        return self.size

    @property
    def can_fuse(self) -> bool:
        """See :attr:`Factor.can_fuse`: a product with a prior is a matrix for each row of a batch."""
        return False

    def distribution_with(
        self, outputs: Tensor, constants: Tensor, shift: Tensor, scale: Tensor
    ) -> dist.TorchDistribution:
        """See :meth:`Factor.distribution_with`: the covariance is that of the whole batch."""
        loc, scale_tril = _location(outputs, shift, scale), _cholesky_factor(constants, shift, scale)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)


def scalar_normals(outputs: Tensor, shift: Tensor, scale: Tensor) -> list[ScalarNormal]:
    """Return what :class:`NormalFactor` returns for several sites of size one, by one computation for all.

    Args:
        outputs: The outputs for all sites, one site after the other, shape ``(*batch, 2 n)``.
        shift: The shifts of the standardisation, shape ``(n,)``.
        scale: Its scales, shape ``(n,)``.
    """
    locs, log_scales = _by_kind(outputs)
    locs, scales = torch.addcmul(shift, scale, locs), scale * positive_scale(log_scales, shift, scale)
    return _normals(locs, scales)


def _by_kind(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the locations and the log-scales among the outputs for sites of size one."""
    locs, log_scales = (
        outputs.unflatten(-1, (-1, 2)).unbind(-1) if outputs.shape[-1] > 2 else outputs.split(1, -1)
    )
    return locs, log_scales


def _normals(locs: Tensor, scales: Tensor) -> list[ScalarNormal]:
    """Return a normal for each number of the last dimension."""
    pairs = zip(locs.unbind(-1), scales.unbind(-1), strict=True)
    return [ScalarNormal(dist.Normal(loc, width, validate_args=False)) for loc, width in pairs]


def fused_scalar_normals(
    outputs: Tensor,
    shift: Tensor,
    scale: Tensor,
    priors: Sequence[SitePrior],
    reference: Tensor | None = None,
) -> list[ScalarNormal]:
    """Return what :meth:`NormalFactor.fused` returns for several sites of size one, by one computation for all.

    Args:
        outputs: The outputs for all sites, one site after the other, shape ``(*batch, 2 n)``.
        shift: The shifts of the standardisation, shape ``(n,)``.
        scale: Its scales, shape ``(n,)``.
        priors: The priors of the sites.
        reference: See :func:`factor_locations`; None where all outputs are locations of factors.
    """
    locs, log_scales = _by_kind(outputs)
    if reference is not None:
        locs = factor_locations(locs, log_scales, reference)
    locs, log_scales = fused_elements(locs, log_scales, (shift, scale), priors)
    return _normals(locs, log_scales.exp())


def factor_locations(locs: Tensor, log_scales: Tensor, reference: Tensor) -> Tensor:
    r"""Return the locations of factors whose products with a reference prior have given locations.

    Beside a prior of about the scale one, a wide factor of location m and scale s has the conditional's location
    m / (1 + s^2), far from m: each change of its width would move the conditional by many of its scales, so that
    training hardly finds a narrower one. Where the output is the location of the product, the width leaves it where
    it is.

    Args:
        locs: Locations in standardised units, ``(*batch, n)``.
        log_scales: The logarithms of the factors' scales.
        reference: The precisions of the reference prior, whose location is zero, ``(n,)``: one, or zero where ``locs``
            are those of factors.
    """
    widths = torch.exp(2.0 * log_scales.clamp(max=LOG_SCALE_BOUND))
    return torch.addcmul(locs, locs, reference * widths)


def fused_elements(
    locs: Tensor, log_scales: Tensor, units: tuple[Tensor, Tensor], priors: Sequence[SitePrior]
) -> tuple[Tensor, Tensor]:
    """Return locations and log-scales of priors times normal factors, number by number.

    Args:
        locs: The locations of the factors, in standardised units, ``(*batch, n)``.
        log_scales: The logarithms of their scales.
        units: Shift and scale of the standardisation.
        priors: The priors, side by side of length ``n``. Beside the factors of elements a network's outputs correct
            these: they move their location and divide their scale.
    """
    shift, scale = units
    if any(prior.evidence is not None for prior in priors):
        each = [
            _fused_element(locs[..., [i]], log_scales[..., [i]], (shift[[i]], scale[[i]]), prior)
            for i, prior in enumerate(priors)
        ]
        return _side_by_side([loc for loc, _ in each]), _side_by_side([log_scale for _, log_scale in each])
    loc, log_scale = (
        _side_by_side([each.loc for each in priors]),
        _side_by_side([each.log_scale for each in priors]),
    )
    log_width = bounded_log_scale(log_scales, shift, scale) + _limits(log_scales.dtype, shift, scale).log_unit
    return fuse(loc, log_scale, torch.addcmul(shift, scale, locs), log_width)


def _fused_element(
    locs: Tensor, log_scales: Tensor, units: tuple[Tensor, Tensor], prior: SitePrior
) -> tuple[Tensor, Tensor]:
    """Return location and log-scale of one number's prior times factors of elements, corrected; or times a factor."""
    if prior.evidence is None:
        return fused_elements(locs, log_scales, units, [prior])
    evidence, log_scale = prior.evidence, prior.log_scale
    shift, scale = evidence.shift, evidence.scale
    precision, weighted = evidence.parameters[..., :1], evidence.parameters[..., 1:]
    narrower = torch.exp(-2.0 * log_scales.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND))
    most = positive_scale(torch.full_like(shift, -torch.inf), shift, scale).pow(-2.0)
    narrower = narrower * (most / (narrower * precision).clamp(min=TINY)).clamp(max=1.0)
    pull = weighted + precision * (locs - (prior.loc - shift) / scale)
    standard = log_scale - scale.log()
    pull, standard = torch.broadcast_tensors(pull, standard)
    move, width = fuse_natural(torch.zeros_like(pull), standard, narrower * precision, narrower * pull)
    return prior.loc + scale * move, log_scale + (width - standard)  # exactly the prior where nothing is said


def share_of_evidence(prior: SitePrior) -> Tensor | None:
    """Return how much of the precision of a conditional is not the prior's; None without factors of elements.

    Args:
        prior: The prior of a site of one number.
    """
    if prior.evidence is None:
        return None
    gain = prior.evidence.parameters[..., :1] * torch.exp(
        2.0 * (prior.log_scale - prior.evidence.scale.log())
    )
    return gain / (1.0 + gain)


def fused_vector(outputs: Tensor, shift: Tensor, scale: Tensor, prior: SitePrior) -> tuple[Tensor, Tensor]:
    """Return mean and Cholesky factor of a prior times the factor of a vector.

    Args:
        outputs: Locations, log-scales, and the entries of ``U`` below the diagonal, ``(*batch, outputs)``.
        shift: The shift of the standardisation, ``(n,)``.
        scale: Its scale, ``(n,)``, or a lower triangular matrix.
        prior: The prior.
    """
    n = len(shift)
    loc = _location(outputs[..., :n], shift, scale)
    width, unit = _width_and_unit(outputs[..., n:], shift, scale)
    root = unit / width.unsqueeze(-1)
    if scale.dim() == 2:
        root = root @ inverse_of_lower(scale)  # one small matrix for all rows
    else:
        root = root / scale
    batch = np.broadcast_shapes(loc.shape[:-1], prior.loc.shape[:-1])
    tril = prior.tril().expand(*batch, n, n)
    return fuse_matrix(prior.loc.expand(*batch, n), tril, loc.expand(*batch, n), root.expand(*batch, n, n))


def _side_by_side(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    shape = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


class ElementNormalFactor(NormalOutputs):
    r"""A normal conditional in which each element has parents of its own.

    ``y_i = loc_i + sum_j A_ij y_j + d_i eps_i`` over the earlier elements ``j`` of the site that element ``i``
    looks at; ``loc_i``, ``log d_i`` and ``A_ij`` depend on the parents of element ``i`` alone.

    Args:
        inner: For each element, the earlier elements of the site that are among its parents.
    """

    def __init__(self, inner: Sequence[Sequence[int]]) -> None:
        super().__init__(len(inner))
        self.rows = [i for i, earlier in enumerate(inner) for _ in earlier]
        self.columns = [j for earlier in inner for j in earlier]
        depths: list[int] = []
        for earlier in inner:
            depths.append(1 + max((depths[j] for j in earlier), default=-1))
        self.depth = max(depths, default=0)

    @property
    def num_outputs(self) -> int:
        """Location and log-scale of each element, and a coefficient for each pair of elements."""
        return 2 * self.size + len(self.rows)

    @property
    def output_elements(self) -> tuple[int, ...]:
        """See :attr:`Factor.output_elements`."""
        return (*range(self.size), *range(self.size), *self.rows)

    def distribution(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """See :meth:`Factor.distribution`."""
        n = self.size
        loc = outputs[..., :n]
        diagonal = positive_scale(outputs[..., n : 2 * n], shift, scale)
        if not self.rows:
            return dist.Normal(shift + scale * loc, scale * diagonal, validate_args=False).to_event(1)
        if n > MOST_DENSE and self.depth <= MOST_DEPTH:
            pairs = torch.tensor([self.rows, self.columns], device=outputs.device)
            weights = scale[pairs[0]] / scale[pairs[1]] * outputs[..., 2 * n :]
            own = shift + scale * loc - sum_over_pairs(weights, pairs, shift)
            return AutoregressiveNormal(own, scale * diagonal, weights, pairs, self.depth)
        eye = torch.eye(n, dtype=outputs.dtype, device=outputs.device)
        unit = eye.expand((*outputs.shape[:-1], n, n)).clone()
        unit[..., self.rows, self.columns] = -outputs[..., 2 * n :]
        solved = torch.linalg.solve_triangular(
            unit, torch.cat([loc.unsqueeze(-1), diagonal.diag_embed()], -1), upper=False, unitriangular=True
        )
        mean, scale_tril = shift + scale * solved[..., 0], scale.unsqueeze(-1) * solved[..., 1:]
        return dist.MultivariateNormal(mean, scale_tril=scale_tril, validate_args=False)

    def linear_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Factor.linear_start`."""
        n = self.size
        diagonal = scale_tril.diagonal()
        unit = diagonal.unsqueeze(-1) * torch.linalg.inv(scale_tril)  # I - A
        all_weights = weights.new_zeros(self.num_outputs, weights.shape[-1])
        all_weights[:n] = unit @ weights
        return all_weights, torch.cat([unit @ loc, diagonal.log(), -unit[self.rows, self.columns]])

    def natural_units(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units`; less for many elements.

        All coefficients of an element together, each of an earlier element of about the size one, move it by its scale.
        """
        diagonal = scale_tril.diagonal()
        number = torch.bincount(torch.tensor(self.rows, dtype=torch.long), minlength=self.size).to(diagonal)
        of_pairs = (diagonal / number.clamp(min=1.0).sqrt())[self.rows]
        units = torch.cat([diagonal, torch.ones_like(diagonal), of_pairs])
        return units * share_of_long(self.num_outputs)


class DiscreteFactor(Factor):
    """Bernoulli and categorical conditionals, of one variable or of several in a row.

    A site with a single binary or class variable can represent any table of probabilities that its network can; in a
    site with several, the logits of each are linear in the earlier ones, with coefficients that depend on the parents.
    Continuous outputs have coordinates with a shift and a scale; these have none.

    Args:
        num_variables: The number of binary or class variables of the site.
        num_classes: The number of classes of each; 1 for binary variables.
    """

    def __init__(self, num_variables: int, num_classes: int) -> None:
        super().__init__(num_variables * num_classes)
        self.num_variables, self.num_classes = num_variables, num_classes

    @classmethod
    def for_site(cls, site: LatentSite) -> "DiscreteFactor":
        """See :meth:`Factor.for_site`."""
        assert site.encoding is not None
        return cls(site.encoding.num_elements, site.encoding.num_classes)

    @property
    def _num_pairs(self) -> int:
        return self.num_variables * (self.num_variables - 1) // 2

    @property
    def num_outputs(self) -> int:
        """Logits, and for each pair of variables a matrix by which the earlier one moves the later one's."""
        return self.size + self._num_pairs * self.num_classes**2

    def distribution(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """See :meth:`Factor.distribution`; shift and scale are not used."""
        n, c = self.num_variables, self.num_classes
        logits = outputs[..., : self.size].unflatten(-1, (n, c))
        if n == 1:
            return DiscreteVector(logits)
        return DiscreteVector(logits, outputs[..., self.size :].unflatten(-1, (self._num_pairs, c, c)))

    @property
    def can_fuse(self) -> bool:
        """See :attr:`Factor.can_fuse`."""
        return type(self).distribution is DiscreteFactor.distribution

    def fused(
        self, outputs: Tensor, shift: Tensor, scale: Tensor, prior: SitePrior
    ) -> dist.TorchDistribution:
        """See :meth:`Factor.fused`: the outputs are added to the logits of the prior."""
        logits = outputs[..., : self.size] + prior.loc
        batch = np.broadcast_shapes(outputs.shape[:-1], logits.shape[:-1])
        couplings = outputs[..., self.size :].expand(*batch, -1)
        return self.distribution(torch.cat([logits, couplings], -1), shift, scale)

    def linear_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and biases for which the logits are ``loc + weights @ inputs``, without couplings."""
        extra = self.num_outputs - self.size
        return (
            torch.cat([weights, weights.new_zeros(extra, weights.shape[-1])]),
            torch.cat([loc, loc.new_zeros(extra)]),
        )

    def natural_units(self, scale_tril: Tensor) -> Tensor:
        """Return ones: logits have no unit."""
        return scale_tril.new_ones(self.num_outputs)

    def start_from_samples(self, inputs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logistic regression of each variable on the inputs and the earlier variables."""
        n, c = self.num_variables, self.num_classes
        y = values.unflatten(-1, (n, c))
        num_inputs = inputs.shape[-1]
        weights = inputs.new_zeros(self.num_outputs, num_inputs)
        biases = inputs.new_zeros(self.num_outputs)
        start = self.size
        for i in range(n):
            slopes, intercepts = logistic_regression(torch.cat([inputs, y[:, :i].flatten(-2)], -1), y[:, i])
            weights[i * c : (i + 1) * c] = slopes[:, :num_inputs]
            biases[i * c : (i + 1) * c] = intercepts
            couplings = slopes[:, num_inputs:].unflatten(-1, (i, c)).movedim(1, 0)  # (i, C, C)
            biases[start : start + couplings.numel()] = couplings.reshape(-1)
            start += couplings.numel()
        return weights, biases
