"""A site's prior as conditionals see it: normal in a coordinate of the site's flat vector, or logits of classes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import (
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
    StickBreakingTransform,
    Transform,
)

from pyro_graphflows.capture import CAPTURING
from pyro_graphflows.distributions.coordinates import GaussianCoordinate, gaussian_coordinate, is_well_defined
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.sites import LatentSite, is_identity
from pyro_graphflows.inspect.runs import undressed

__all__ = ["Evidence", "SitePrior", "has_prior", "is_moderate", "is_normal_unconstrained", "site_prior"]

WIDEST = 60.0  # units of logarithms between scores of -2 and 2 of a prior that is not extreme
WITHOUT_PARAMETERS = (ExpTransform, SigmoidTransform, StickBreakingTransform, OrderedTransform)


@dataclass(frozen=True)
class Evidence:
    r"""Factors beside a prior, multiplied: :math:`\exp(-\lambda y^2 / 2 + \eta y)`, in a standardised coordinate.

    Attributes:
        parameters: The precision and the precision times the location, ``(*batch, 2)``.
        shift: The shift of the coordinate, ``(1,)``.
        scale: Its scale.
    """

    parameters: Tensor
    shift: Tensor
    scale: Tensor


@dataclass(frozen=True)
class SitePrior:
    r"""The model's own distribution of a site, in the coordinate in which it is fused.

    Attributes:
        loc: The location, ``(*batch, size)``; of a discrete site its logits, of the length of its flat vector.
        log_scale: The logarithm of the scale, ``(*batch, size)``; of a multivariate normal, of its marginal scales.
        scale_tril: Of a multivariate normal the Cholesky factor of its covariance, ``(*batch, size, size)``.
        transform: The map from the coordinate to the value where the coordinate is not the unconstrained vector.
        standard: Whether the coordinate is the normal score of the prior.
        fixed: Where the prior depends on parameters of the model, and on nothing else of which gradients are wanted,
            the same prior without gradients: for values that are given, of which the model's parameters have no say.
        evidence: Factors of the elements of a plate (:mod:`~pyro_graphflows.guides.conditionals.summed`).
    """

    loc: Tensor
    log_scale: Tensor
    scale_tril: Tensor | None = None
    transform: Transform | None = None
    standard: bool = False
    fixed: "SitePrior | None" = None
    evidence: Evidence | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether the prior depends on something of which gradients are wanted."""
        return any(each.requires_grad for each in self._tensors())

    def _tensors(self) -> list[Tensor]:
        tril = [] if self.scale_tril is None else [self.scale_tril]
        return [self.loc, self.log_scale, *tril, *getattr(self.transform, "parameters", ())]

    def map(self, convert: Callable[[Tensor], Tensor]) -> "SitePrior":
        """Return the same with location and scales converted; the coordinate stays."""
        tril = None if self.scale_tril is None else convert(self.scale_tril)
        evidence = self.evidence
        if evidence is not None:
            evidence = replace(evidence, parameters=convert(evidence.parameters))
        return replace(
            self, loc=convert(self.loc), log_scale=convert(self.log_scale), scale_tril=tril, evidence=evidence
        )

    def with_evidence(self, evidence: Evidence | None) -> "SitePrior":
        """Return the same beside factors of elements."""
        fixed = None if self.fixed is None else self.fixed.with_evidence(evidence)
        return replace(self, evidence=evidence, fixed=fixed)

    def tril(self) -> Tensor:
        """Return the Cholesky factor of the covariance, also where that is diagonal."""
        return self.log_scale.exp().diag_embed() if self.scale_tril is None else self.scale_tril


def site_prior(site: LatentSite, fn: Any, *, checked: bool = True) -> SitePrior:
    """Return a distribution of the model as the prior of a site.

    Args:
        site: The site.
        fn: Its distribution, for which :func:`has_prior` holds.
        checked: Whether to refuse parameters out of their range.

    Raises:
        GraphflowsError: If a parameter is not in its range, a scale zero or infinite for example.
    """
    if site.encoding is not None:
        logits = _logits(site, fn)
        assert logits is not None
        return SitePrior(logits, torch.zeros_like(logits))
    coordinate = gaussian_coordinate(fn)
    assert coordinate is not None
    dims = coordinate.batch_dims
    loc, scale = (
        part.unsqueeze(-1) if part.dim() == dims else part.flatten(dims)
        for part in (coordinate.loc, coordinate.scale)
    )
    log_scale = scale.log()
    if checked and not (loc.is_meta or CAPTURING.get()):
        total = float(loc.detach().sum() + log_scale.detach().sum())  # finite if all of them are
        if coordinate.standard or not math.isfinite(total):
            _require_well_defined(site, fn, coordinate, loc, scale)
    transform = None if _is_unconstrained(site, coordinate) else coordinate.transform
    return SitePrior(loc, log_scale, coordinate.scale_tril, transform, coordinate.standard)


def _require_well_defined(
    site: LatentSite, fn: Any, coordinate: GaussianCoordinate, loc: Tensor, scale: Tensor
) -> None:
    """Refuse a prior with a parameter out of its range."""
    good = torch.isfinite(loc) & torch.isfinite(scale) & (scale > 0)
    if coordinate.standard:
        defined = is_well_defined(fn)
        good = good & defined.reshape(*defined.shape, 1)
    if not bool(good.all()):
        raise GraphflowsError(
            f"Expected a prior of {site.name!r} with finite parameters and a positive scale at the values that its "
            f"parents have; got {type(undressed(fn)).__name__} with others in {int((~good).sum())} of {good.numel()} "
            "elements. Bound the scale away from zero in the model (scale + 1e-6, or a clamp), take a prior of its "
            "parents that does not reach there, or leave the prior out: "
            f"factors={{{site.name!r}: Normal(fusion=False)}}."
        )


def has_prior(site: LatentSite, fn: Any) -> bool:
    """Whether a distribution of the model can be fused: it is normal in some coordinate, or has logits.

    Args:
        site: The site.
        fn: The model's distribution of it.
    """
    if site.encoding is not None:
        return _logits(site, fn) is not None
    coordinate = gaussian_coordinate(fn)
    if coordinate is None or (coordinate.scale_tril is not None and len(fn.event_shape) != 1):
        return False
    return coordinate.loc.shape[coordinate.batch_dims :].numel() == site.size


def is_normal_unconstrained(site: LatentSite, fn: Any) -> bool:
    """Whether a distribution of the model is normal in unconstrained space; discrete ones count as such.

    Args:
        site: The site.
        fn: The model's distribution of it.
    """
    if site.encoding is not None:
        return True
    coordinate = gaussian_coordinate(fn)
    return coordinate is not None and _is_unconstrained(site, coordinate)


def is_moderate(fn: Any) -> bool:
    """Whether the coordinate in which a prior is normal is fit for a search, and for a start.

    That of a gamma prior with the shape 0.001 is not: its median is 1e-300.

    Args:
        fn: The model's distribution of a site.
    """
    improper = isinstance(undressed(fn), dist.ImproperUniform)
    coordinate = None if improper else gaussian_coordinate(fn)
    if coordinate is None or not coordinate.standard:
        return coordinate is not None
    try:
        ends = [biject_to(fn.support).inv(coordinate.transform(w + coordinate.loc)) for w in (-2.0, 2.0)]
    except ValueError:  # scores so far out that they cannot be inverted
        return False
    width = (ends[1] - ends[0]).abs()
    unbounded = biject_to(fn.support).domain is fn.support
    return bool(torch.isfinite(width).all()) and (unbounded or bool((width < WIDEST).all()))


def _is_unconstrained(site: LatentSite, coordinate: GaussianCoordinate) -> bool:
    """Whether a coordinate is the unconstrained vector of the site."""
    if coordinate.standard:
        return False
    if is_identity(coordinate.transform):
        return site.is_real
    own, kind = site.transform, type(coordinate.transform)
    while isinstance(own, IndependentTransform):
        own = own.base_transform
    return kind is type(own) and kind in WITHOUT_PARAMETERS


def _logits(site: LatentSite, fn: Any) -> Tensor | None:
    """Return the logits of a distribution over classes as the site's flat vector is laid out; None without."""
    assert site.encoding is not None
    events = len(fn.event_shape)
    inner = undressed(fn)
    classes = site.encoding.num_classes
    if isinstance(inner, dist.Bernoulli) and classes == 1 and site.encoding.kind == "binary":
        return _flat(inner.logits, fn.batch_shape + fn.event_shape, events)
    if isinstance(inner, dist.Categorical) and site.encoding.kind == "classes":
        if inner.logits.shape[-1] != classes or site.encoding.lowest != 0:
            return None
        whole = (*fn.batch_shape, *fn.event_shape, classes)
        return _flat(inner.logits, torch.Size(whole), events + 1)
    if isinstance(inner, dist.OneHotCategorical) and site.encoding.kind == "one_hot" and events == 1:
        return _flat(inner.logits, fn.batch_shape + fn.event_shape, 1)
    return None


def _flat(logits: Tensor, shape: torch.Size, event_dims: int) -> Tensor:
    finite = logits.clamp(min=math.log(torch.finfo(logits.dtype).tiny))
    whole = finite.expand(shape)
    return whole.unsqueeze(-1) if event_dims == 0 else whole.flatten(whole.dim() - event_dims)
