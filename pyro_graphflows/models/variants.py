"""Networks that know less of the structure than the true one, to compare with.

References:
    [1] Mouton and Kroon (2022), SIReN-VAE: Leveraging Flows and Amortized Inference for Bayesian Networks.
"""

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.model_graph import ModelGraph, Node, listed

__all__ = ["variant_graph"]


def variant_graph(graph: ModelGraph, variant: str) -> ModelGraph:
    """Return a network over the same nodes that knows less of the structure, as compared in [1].

    - ``"true"``: the network itself;
    - ``"ind"``: independent latent nodes, all of them parents of every observed node;
    - ``"FC"``: latent nodes fully connected in the network's topological order, all parents of every observed node.

    In the last two, edges from observed nodes and inputs are those of the network; observed parents of latent nodes
    would make cycles.

    Args:
        graph: The true network.
        variant: One of the three words.

    Returns:
        The network of the variant.

    Raises:
        GraphflowsError: If ``variant`` is another word.
        UnsupportedModelError: If latent nodes have observed parents, and the variant is not ``"true"``.

    Example:
        >>> graph = ModelGraph([("a", "b"), ("b", "x"), ("a", "y")], observed=["x", "y"])
        >>> variant_graph(graph, "ind").edges
        (('a', 'x'), ('b', 'x'), ('a', 'y'), ('b', 'y'))
    """
    if variant == "true":
        return graph
    if variant not in ("ind", "FC"):
        raise GraphflowsError(f"Expected variant to be 'true', 'ind' or 'FC'; got {variant!r}.")
    latent = graph.latent
    below = [node for node in latent if set(graph.observed) & set(graph.parents(node))]
    if below:
        raise UnsupportedModelError(
            f"Expected latent nodes without observed parents for variant {variant!r}, in which all latent nodes are "
            f"parents of every observed node; {listed(below)} have some."
        )
    edges: list[tuple[Node, Node]] = [(p, c) for p, c in graph.edges if p not in set(latent)]
    if variant == "FC":
        edges += [(p, c) for i, c in enumerate(latent) for p in latent[:i]]
    edges += [(p, c) for c in graph.observed for p in latent]
    return graph.with_edges(edges)
