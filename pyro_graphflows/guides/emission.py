"""What is emitted at a latent site: a factor in the shape, the type and the support of the site's values."""

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.discrete import DiscreteDistribution
from pyro_graphflows.guides.distributions import FactorDistribution, SampledNormal, ScalarNormal
from pyro_graphflows.guides.site import LatentSite, is_identity

__all__ = ["site_distribution"]


def site_distribution(
    site: LatentSite,
    factor: dist.TorchDistribution,
    support: constraints.Constraint,
    *,
    analytic_kl: bool,
    dtype: torch.dtype,
) -> tuple[dist.TorchDistribution, Callable[[Tensor], Tensor]]:
    """Return the distribution to emit at a site and the map from its value to the unconstrained vector.

    Args:
        site: The site as it was at set-up.
        factor: The distribution over its flat unconstrained vector.
        support: The support in this call.
        analytic_kl: Whether the distribution may be one for which a KL divergence is registered.
        dtype: The type of the vectors of discrete sites.

    Raises:
        GraphflowsError: If a discrete site has other values than at set-up.
    """
    if site.encoding is not None:
        if not site.encoding.fits(support):
            raise GraphflowsError(
                f"Expected the values of {site.name!r} to be as when the guide was set up ({site.encoding}); this "
                f"call has {support}. Set up a guide for the new values."
            )
        discrete = DiscreteDistribution(factor, site.encoding, support, dtype)
        return discrete, discrete.unconstrained
    transform = site.transform if support is site.support else biject_to(support)
    if isinstance(factor, ScalarNormal) and not site.event_shape and is_identity(transform):
        return factor.normal if analytic_kl else SampledNormal(factor.normal), _add_event_dim
    if analytic_kl and is_identity(transform):
        if site.event_shape == factor.event_shape:
            return factor, _itself
        if not site.event_shape and isinstance(factor, dist.Independent):
            normal = factor.base_dist
            scalar = type(normal)(normal.loc.squeeze(-1), normal.scale.squeeze(-1), validate_args=False)
            return scalar, _add_event_dim
    emitted = FactorDistribution(factor, transform, site.unconstrained_shape, site.event_shape, support)
    return emitted, emitted.unconstrained


def _itself(value: Tensor) -> Tensor:
    return value


def _add_event_dim(value: Tensor) -> Tensor:
    return value.unsqueeze(-1)
