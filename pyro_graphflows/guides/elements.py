"""Inverses at the resolution of elements, for guides that emit whole sites.

A graph of elements says which entries of vector sites depend on which; its inverse is sparser than that of the
sites. A site is emitted as one value, so the elements of a site must be sampled one after the other, with no
element of another site between them. Hence the order of *sites* is found first, by inverting the graph that
the elements make of the sites, and the elements are then eliminated in that order: any elimination order is
faithful.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.inversion import faithful_inverse
from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.inspect import TracedModel

__all__ = ["ElementInverse", "invert_elements"]


@dataclass(frozen=True)
class ElementInverse:
    """The inverse of a graph of elements, and what it means for sites.

    Attributes:
        inverse: The inverse over elements.
        sites: The inverse over sites that it makes: a site's parents are those of its elements.
        parents: For each split site, for each of its elements, the parents as (node, index in the node);
            earlier elements of the site itself among them. The index of nodes that are not split is -1.
    """

    inverse: InverseGraph
    sites: InverseGraph
    parents: dict[str, tuple[tuple[tuple[str, int], ...], ...]]


def _graph_of_sites(graph: ModelGraph, elements: Mapping[str, tuple[str, int]]) -> ModelGraph:
    def site(node: str) -> str:
        return elements[node][0] if node in elements else node

    edges = {
        (site(parent), site(child)): None for parent, child in graph.edges if site(parent) != site(child)
    }
    sizes: dict[str, int] = {}
    plates = {}
    for node in graph.nodes:
        sizes[site(node)] = sizes.get(site(node), 0) + graph.event_sizes[node]
        plates[site(node)] = graph.plates[node]
    return ModelGraph(
        list(edges),
        [site(node) for node in graph.observed],
        inputs=[site(node) for node in graph.inputs],
        marginalised=[site(node) for node in graph.marginalised],
        event_sizes=sizes,
        plates=plates,
    )


def invert_elements(
    traced: TracedModel, invert: Callable[[ModelGraph], InverseGraph]
) -> tuple[TracedModel, ElementInverse]:
    """Invert a graph of elements for a guide that emits whole sites.

    Args:
        traced: A model traced with ``resolution="element"``.
        invert: How to invert a graph of sites; only its sampling order is used.

    Returns:
        The traced model with the graph of its sites, and the inverse.

    Raises:
        GraphflowsError: If the inverse of the sites is not faithful: it has no elimination order.
    """
    elements = traced.elements
    graph = _graph_of_sites(traced.graph, elements)
    of_sites = invert(graph)
    if of_sites.order in ("stochastic", "mean_field"):
        raise GraphflowsError(
            f"Expected an inverse that is an elimination order with resolution='element'; got {of_sites.order!r}."
        )
    members: dict[str, list[str]] = {}
    for node, (site, index) in elements.items():
        members.setdefault(site, []).insert(index, node)
    sampling = [node for site in of_sites.sampling_order for node in members.get(site, [site])]
    inverse = faithful_inverse(traced.graph, sampling[::-1])

    def place(node: str) -> tuple[str, int]:
        return elements[node] if node in elements and len(members[elements[node][0]]) > 1 else (node, -1)

    split: dict[str, tuple[tuple[tuple[str, int], ...], ...]] = {}
    collapsed = {}
    coupled = {}
    for site in graph.latent:
        nodes = members.get(site, [site])
        own = tuple(tuple(place(parent) for parent in inverse.parents[node]) for node in nodes)
        if len(nodes) > 1:
            split[site] = own
        collapsed[site] = {elements.get(p, (p, 0))[0] for node in nodes for p in inverse.parents[node]} - {
            site
        }
        coupled[site] = tuple(dict.fromkeys(p for node in nodes for p in inverse.coupled.get(node, ())))
    sites = InverseGraph(
        graph, collapsed, order=of_sites.order, sampling_order=of_sites.sampling_order, coupled=coupled
    )
    return replace(traced, graph=graph), ElementInverse(inverse, sites, split)
