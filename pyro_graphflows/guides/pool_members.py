"""What summaries of other plates are made of: the nodes."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.features import FeatureMap

__all__ = ["PoolMember", "affine_part", "subsampled_message", "without_leading_ones"]


@dataclass(frozen=True)
class PoolMember:
    """One node that is pooled.

    Attributes:
        name: The node.
        size: The number of its features.
        plates: The plates around it.
        partly: Whether its last column says what is there (a site with ``obs_mask=``) and is no feature.
        weighs: Whether an element counts only where this node is not masked (data and latent sites, not inputs).
    """

    name: str
    size: int
    plates: frozenset[str]
    partly: bool = False
    weighs: bool = True


def subsampled_message(plate: str, names: Sequence[str]) -> str:
    """Say why a subsampled plate is not pooled, and what to do."""
    return (
        f"Expected plate {plate!r} in full, since the guide pools {', '.join(names)} over it (pool='deepset'); it is "
        "subsampled. With a summary of the same batch that the likelihood is scaled up from, the objective is not a "
        "bound on the evidence. Use the full data in each call, or pool=None (free parameters for the outer sites, "
        "which a subsampled plate allows), or train with InferenceCompilation on whole data sets."
    )


def without_leading_ones(value: Tensor) -> Tensor:
    """Drop leading dimensions of size one."""
    first = next((i for i, size in enumerate(value.shape[:-1]) if size != 1), value.dim() - 1)
    return value.reshape(value.shape[first:])


def affine_part(feature_map: FeatureMap, columns: Sequence[int] | range, name: str) -> tuple[Tensor, Tensor]:
    """Return the shift and scale of some columns of a feature map.

    Raises:
        GraphflowsError: If the map is not affine there.
    """
    for kind, part in feature_map.kinds:
        if kind != "identity" and any(part.start <= column < part.stop for column in columns):
            raise GraphflowsError(f"Expected an affine map of {name} to its pooled mean; got a {kind} map.")
    chosen = list(columns)
    return feature_map.shift[chosen], feature_map.scale[chosen]
