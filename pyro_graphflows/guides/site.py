"""What the guide keeps of each site of the prototype trace."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import IndependentTransform, Transform, identity_transform

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.call import partly_observed
from pyro_graphflows.inspect import TracedModel

__all__ = ["LatentSite", "conditioning_event_dims", "is_identity", "latent_sites"]


@dataclass(frozen=True)
class LatentSite:
    """A latent site as it was at set-up.

    Attributes:
        name: The site.
        event_shape: The shape of one value.
        unconstrained_shape: The shape of one value before the bijection to the support.
        support: The support.
        transform: The bijection from the unconstrained space to the support.
    """

    name: str
    event_shape: torch.Size
    unconstrained_shape: torch.Size
    support: constraints.Constraint
    transform: Transform

    @property
    def size(self) -> int:
        """The length of the flat unconstrained vector."""
        return self.unconstrained_shape.numel()

    @property
    def is_real(self) -> bool:
        """Whether values are unconstrained as they are."""
        return is_identity(self.transform)


def is_identity(transform: Transform) -> bool:
    """Return whether a transform leaves values as they are."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform is identity_transform


def latent_sites(traced: TracedModel) -> dict[str, LatentSite]:
    """Return the latent sites of a traced model that get a factor.

    Raises:
        UnsupportedModelError: If one of them is discrete.
    """
    sites = {}
    for name in traced.graph.latent:
        fn: Any = traced.trace.nodes[name]["fn"]
        if fn.support.is_discrete:
            raise UnsupportedModelError(
                f"Expected continuous latent sites; site {name!r} is discrete ({type(fn).__name__}). Mark it "
                "infer={'enumerate': 'parallel'} and train with TraceEnum_ELBO, which sums over its values."
            )
        transform = biject_to(fn.support)
        unconstrained = transform.inverse_shape(fn.batch_shape + fn.event_shape)
        sites[name] = LatentSite(
            name, fn.event_shape, torch.Size(unconstrained[len(fn.batch_shape) :]), fn.support, transform
        )
    return sites


def conditioning_event_dims(traced: TracedModel) -> dict[str, int]:
    """Return the number of event dimensions of each node that can be a network input.

    Factors and observed values that are computed from latent sites have no data and are left out, and so are
    integer inputs: they are indices.
    """
    nodes: Any = traced.trace.nodes
    dims = {
        name: len(nodes[name]["fn"].event_shape)
        for name in traced.graph.observed
        if name not in traced.without_data
    }
    dims.update((name, 1) for name in partly_observed(traced))
    dims.update((name, dim) for name, dim in traced.event_dims.items() if name not in traced.index_inputs)
    return dims
