"""Plates as a finite graph: every plate is expanded to a few copies, and what was found is folded back.

A plate says that a node is repeated, with an unspecified number of copies. What an inversion finds cannot
depend on that number, and two copies are enough to see everything: a dependence between a copy and *another*
copy looks the same whichever other copy it is. One copy is not enough, since it loses the coupling of two
copies through a common parent or child.

Words: a *site* is a node of the :class:`~pyro_graphflows.graphs.model_graph.ModelGraph`, a *copy* is a node
of the expansion. A copy has one index for each plate around its site. An edge ``u -> v`` joins the copies of
``u`` and ``v`` whose indices agree in the plates they share. So a parent in fewer plates is *broadcast* (one
copy to many children) and a parent in more plates is *pooled* (many copies to one child).

As an example, ``mu -> z``, ``z -> x`` with ``z`` and ``x`` in a plate become the five nodes ``mu``,
``z[0]``, ``z[1]``, ``x[0]``, ``x[1]`` with edges ``mu -> z[i]`` and ``z[i] -> x[i]``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from pyro_graphflows.graphs.model_graph import ModelGraph

__all__ = ["Expansion", "expand"]


@dataclass(frozen=True)
class Expansion:
    """A model graph with every plate replaced by a number of copies; nodes are integers.

    Nodes are numbered site by site in graph order, so parents have smaller numbers than their children.

    Attributes:
        graph: The model graph.
        site: For each node, the position of its site in ``graph.nodes``.
        index: For each node, its index in each of the plates of its site.
        copies: For each position in ``graph.nodes``, the nodes that are its copies.
        parents: For each node, its parents in increasing order.
        children: For each node, its children in increasing order.
    """

    graph: ModelGraph
    site: tuple[int, ...]
    index: tuple[tuple[int, ...], ...]
    copies: tuple[tuple[int, ...], ...]
    parents: tuple[tuple[int, ...], ...]
    children: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.site)

    def with_role(self, *roles: str) -> list[int]:
        """Return the nodes whose site has one of the roles, in increasing order."""
        of_role = {
            "latent": self.graph.latent,
            "observed": self.graph.observed,
            "input": self.graph.inputs,
            "marginalised": self.graph.marginalised,
        }
        chosen = {name for role in roles for name in of_role[role]}
        wanted = [name in chosen for name in self.graph.nodes]
        return [node for node, position in enumerate(self.site) if wanted[position]]

    def differing_plates(self, node: int, others: Iterable[int]) -> tuple[str, ...]:
        """Return the plates, outer to inner, in which another copy of the same site has another index."""
        plates = self.graph.plates[self.graph.nodes[self.site[node]]]
        found = {
            plate
            for other in others
            for plate, i, j in zip(plates, self.index[node], self.index[other], strict=True)
            if i != j
        }
        return tuple(plate for plate in plates if plate in found)


def expand(graph: ModelGraph, copies: int = 2) -> Expansion:
    """Return the graph with each plate replaced by ``copies`` copies.

    Args:
        graph: A model graph. Without plates the expansion has one node for each of its nodes.
        copies: The number of copies along each plate.

    Returns:
        The expansion, with ``copies ** k`` nodes for a site in ``k`` plates.

    Example:
        >>> graph = ModelGraph([("mu", "z")], observed=[], plates={"z": ["data"]})
        >>> expand(graph).copies, expand(graph).parents
        (((0,), (1, 2)), ((), (0,), (0,)))
    """
    names = graph.nodes
    plates = graph.plates
    position = {name: i for i, name in enumerate(names)}
    site: list[int] = []
    index: list[tuple[int, ...]] = []
    of_site: list[tuple[int, ...]] = []
    node_at: list[dict[tuple[int, ...], int]] = []
    for i, name in enumerate(names):
        indices = list(product(range(copies), repeat=len(plates[name])))
        of_site.append(tuple(range(len(site), len(site) + len(indices))))
        node_at.append(dict(zip(indices, of_site[-1], strict=True)))
        site += [i] * len(indices)
        index += indices

    parents: list[tuple[int, ...]] = []
    children: list[list[int]] = [[] for _ in site]
    for i, name in enumerate(names):
        above = [position[parent] for parent in graph.parents(name)]
        for node in of_site[i]:
            at = dict(zip(plates[name], index[node], strict=True))
            found: list[int] = []
            for j in above:
                if not plates[names[j]]:
                    found.append(of_site[j][0])
                    continue
                choices = [(at[plate],) if plate in at else range(copies) for plate in plates[names[j]]]
                found += [node_at[j][choice] for choice in product(*choices)]
            parents.append(tuple(found))
            for parent in found:
                children[parent].append(node)
    return Expansion(
        graph, tuple(site), tuple(index), tuple(of_site), tuple(parents), tuple(map(tuple, children))
    )
