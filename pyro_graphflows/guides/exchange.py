"""Plates whose elements are not alike: which sites need something of their own for each index.

A network that is shared along a plate takes the elements of the plate to be exchangeable given what it sees.
Constants of the model that vary along the plate and are no arguments (known standard errors in a closure) break that,
and so do parameters of the model for each index, or a mask. Where they are is found by a probe
(:func:`~pyro_graphflows.inspect.non_exchangeable_plates`); which latent sites they concern is read off the graph: the
constants are added as an input that nobody sees, and a site is concerned if it is not d-separated from them given
its parents in the inverse.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.graphs.separation import violated_independencies

__all__ = ["Unlike", "sites_concerned"]


@dataclass(frozen=True)
class Unlike:
    """The latent sites that constants in a model concern.

    Attributes:
        own: For each such site, the plates around it for whose indices it needs something of its own.
        outside: For each such site that constants concern in plates it is not in, these plates.
    """

    own: dict[str, tuple[str, ...]] = field(default_factory=dict)
    outside: dict[str, tuple[str, ...]] = field(default_factory=dict)


def sites_concerned(inverse: InverseGraph, non_exchangeable: Mapping[str, tuple[str, ...]]) -> Unlike:
    """Return which latent sites must tell the indices of a plate apart.

    Args:
        inverse: The guide's factorisation.
        non_exchangeable: For sites of the model, latent or observed, the plates whose indices are not alike there.

    Example:
        >>> graph = ModelGraph(["mz", "zx"], observed=["x"], plates={"z": ["data"], "x": ["data"]})
        >>> inverse = InverseGraph(graph, {"m": ["x"], "z": ["m", "x"]})
        >>> sites_concerned(inverse, {"x": ("data",)})
        Unlike(own={'z': ('data',)}, outside={'m': ('data',)})
    """
    if not non_exchangeable:
        return Unlike()
    graph = inverse.graph
    constants = {("constants", site): (site, plates) for site, plates in non_exchangeable.items()}
    extended = ModelGraph(
        [*graph.edges, *((constant, site) for constant, (site, _) in constants.items())],
        graph.observed,
        inputs=[*graph.inputs, *constants],
        marginalised=graph.marginalised,
        plates={**graph.plates, **{constant: plates for constant, (_, plates) in constants.items()}},
    )
    blind = InverseGraph(
        extended, inverse.parents, sampling_order=inverse.sampling_order, coupled=inverse.coupled
    )
    own: dict[str, tuple[str, ...]] = {}
    outside: dict[str, tuple[str, ...]] = {}
    for violated in violated_independencies(blind):
        if violated.other in constants:
            site, plates = violated.node, constants[violated.other][1]
            around = graph.plates[site]
            mine = set(own.get(site, ())) | (set(plates) & set(around))
            if mine:
                own[site] = tuple(plate for plate in around if plate in mine)
            beyond = dict.fromkeys((*outside.get(site, ()), *(p for p in plates if p not in around)))
            if beyond:
                outside[site] = tuple(beyond)
    return Unlike(own, outside)
