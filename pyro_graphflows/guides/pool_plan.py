"""What is pooled into which site, and which sites have free parameters instead.

A parent of a site in the inverse may be in a plate that the site is not in. Data there reach the site through a summary
(``pool="deepset"``, :mod:`~pyro_graphflows.guides.pooling`), or not at all: then the site has free parameters for each
element of its own plates, which fits one data set and is not amortised. *Latent* parents there (crossed plates: the
effects of the columns, for those of a row) are always pooled, since free parameters cannot follow what is sampled.

Where the elements of a plate are not alike (:mod:`~pyro_graphflows.guides.exchange`), a site in the plate has an affine
map of its own for each index beside the shared network.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.exchange import Unlike
from pyro_graphflows.guides.pooling import subsampled_message

__all__ = ["PoolPlan", "plan_pools"]


@dataclass(frozen=True)
class PoolPlan:
    """The outcome of :func:`plan_pools`.

    Attributes:
        pools: For each site with a summary, the nodes that are pooled jointly, in graph order.
        free: The sites with free parameters for each element of their plates.
        unlike: The sites with a map of their own for each index of some plates, and these plates.
        remarks: What is worth saying of a site.
    """

    pools: dict[str, tuple[str, ...]] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    unlike: dict[str, tuple[str, ...]] = field(default_factory=dict)
    remarks: dict[str, tuple[str, ...]] = field(default_factory=dict)


def plan_pools(
    inverse: InverseGraph,
    plates: Mapping[str, PlateState],
    with_data: Collection[str],
    indices: Collection[str],
    *,
    deepset: bool,
    unlike: Unlike | None = None,
) -> PoolPlan:
    """Decide how parents in inner and crossed plates come in.

    Args:
        inverse: The guide's factorisation.
        plates: The plates at set-up.
        with_data: The nodes whose data can be network inputs.
        indices: The inputs of an integer type.
        deepset: Whether data are pooled.
        unlike: The sites that constants in the model concern.

    Raises:
        UnsupportedModelError: If data would be pooled over a subsampled plate.
    """
    graph = inverse.graph
    latent = set(graph.latent)
    unlike = unlike or Unlike()
    pools: dict[str, tuple[str, ...]] = {}
    free = set()
    remarks: dict[str, tuple[str, ...]] = {
        site: (
            f"a map of its own for each index of {', '.join(around)}, along which constants or parameters in the "
            "model vary (pass constants as arguments to share one)",
        )
        for site, around in unlike.own.items()
    }
    for site in inverse.sampling_order:
        pooled = [parent for parent in inverse.parents[site] if inverse.how[parent, site] == "pooled"]
        if not pooled:
            continue
        latents = [parent for parent in pooled if parent in latent]
        data = [parent for parent in pooled if parent in with_data]
        looked_up = [parent for parent in pooled if parent in indices]
        beyond = unlike.outside.get(site, ())
        amortise = deepset and not looked_up and not beyond
        members = [parent for parent in pooled if parent in latents or (amortise and parent in data)]
        over = [plate for plate in outside(graph.plates, members, site) if plate in plates]
        partial = [plate for plate in over if plates[plate].subsampled]
        if partial and amortise and data:
            raise UnsupportedModelError(subsampled_message(partial[0], data))
        if partial and latents:
            remarks[site] = (
                *remarks.get(site, ()),
                f"not faithful: {', '.join(latents)} in the subsampled plate {partial[0]} cannot be inputs of "
                f"{site}, which is outside of it",
            )
        elif members:
            pools[site] = tuple(members)
        if deepset and beyond:
            remarks[site] = (
                *remarks.get(site, ()),
                f"not pooled: constants or parameters in the model vary along {', '.join(beyond)} (pass constants as "
                "arguments to pool them with the data)",
            )
        if deepset and looked_up:
            remarks[site] = (
                *remarks.get(site, ()),
                f"not pooled: which element belongs to which is looked up by {', '.join(looked_up)}",
            )
        if not amortise and len(latents) < len(pooled):
            free.add(site)
    return PoolPlan(pools, frozenset(free), unlike.own, remarks)


def outside(plates: Mapping[str, tuple[str, ...]], members: Collection[str], site: str) -> tuple[str, ...]:
    """Return the plates around some members that are not around the site, outer to inner as far as they are nested."""
    found = {plate: None for member in members for plate in plates[member] if plate not in plates[site]}
    return tuple(found)
