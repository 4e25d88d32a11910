"""What the guide keeps of each site of the prototype trace."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import IndependentTransform, Transform, identity_transform

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.call import partly_observed
from pyro_graphflows.guides.encodings import DiscreteEncoding
from pyro_graphflows.inspect import TracedModel

__all__ = ["LatentSite", "conditioning_event_dims", "is_identity", "latent_sites", "observed_encodings"]


@dataclass(frozen=True)
class LatentSite:
    """A latent site as it was at set-up.

    Attributes:
        name: The site.
        event_shape: The shape of one value.
        unconstrained_shape: The shape of one value before the bijection to the support.
        support: The support.
        transform: The bijection from the unconstrained space to the support (of no use for discrete sites).
        encoding: For discrete sites, how values are written as vectors.
    """

    name: str
    event_shape: torch.Size
    unconstrained_shape: torch.Size
    support: constraints.Constraint
    transform: Transform
    encoding: DiscreteEncoding | None = None

    @property
    def size(self) -> int:
        """The length of the flat unconstrained vector."""
        return self.unconstrained_shape.numel()

    @property
    def is_real(self) -> bool:
        """Whether values are unconstrained as they are."""
        return self.encoding is None and is_identity(self.transform)


def is_identity(transform: Transform) -> bool:
    """Return whether a transform leaves values as they are."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform is identity_transform


def latent_sites(traced: TracedModel, custom: Collection[str] = ()) -> dict[str, LatentSite]:
    """Return the latent sites of a traced model that get a factor.

    Args:
        traced: The traced model.
        custom: The sites for which the user gave a factor.

    Raises:
        UnsupportedModelError: If one of the others is discrete and its values are not among finitely many classes.
    """
    sites = {}
    for name in traced.graph.latent:
        site: Any = traced.trace.nodes[name]
        fn = site["fn"]
        event_shape = torch.Size(fn.event_shape)
        if fn.support.is_discrete:
            encoding = DiscreteEncoding.of(fn, site["value"].dtype)
            if encoding.kind == "counts" and name not in custom:
                raise UnsupportedModelError(
                    f"Expected discrete latent sites with values among finitely many classes; site {name!r} is "
                    f"{type(fn).__name__} with support {fn.support}. Give a factor for it, factors={{{name!r}: ...}} "
                    "(a subclass of Factor whose distribution is one over counts), or replace it by a site with "
                    "finitely many values."
                )
            sites[name] = LatentSite(
                name, event_shape, torch.Size([encoding.size]), fn.support, identity_transform, encoding
            )
            continue
        transform = biject_to(fn.support)
        unconstrained = transform.inverse_shape(torch.Size(fn.batch_shape) + event_shape)
        sites[name] = LatentSite(
            name, event_shape, torch.Size(unconstrained[len(fn.batch_shape) :]), fn.support, transform
        )
    return sites


def observed_encodings(traced: TracedModel) -> dict[str, DiscreteEncoding]:
    """Return the encodings of the observed sites whose values are classes: numbers that only tell them apart."""
    encodings = {}
    for name in traced.graph.observed:
        site: Any = traced.trace.nodes[name]
        if name in traced.without_data or not site["fn"].support.is_discrete:
            continue
        encoding = DiscreteEncoding.of(site["fn"], site["value"].dtype)
        if encoding.kind == "classes" and not encoding.dtype.is_floating_point:
            encodings[name] = encoding
    return encodings


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
