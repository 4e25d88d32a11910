"""Residual flows over a graph: the transforms and the helpers that make them.

Two families with the same interface. In a *faithful* flow the parents of a variable enter at their final values, and
the density is exactly one conditional for each variable given its parents; in a *graphical* flow, as published, they
enter at their running values.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from pyro_graphflows.graphs.structures import Node
from pyro_graphflows.transforms.faithful import FaithfulResidualNN
from pyro_graphflows.transforms.graphical import GraphicalResidualNN
from pyro_graphflows.transforms.network import (
    ConditionalGraphTransform,
    GraphTransform,
    LinearStart,
)
from pyro_graphflows.transforms.structure import FlowStructure, GraphLike, flow_structure, without_context

__all__ = [
    "ConditionalFaithfulResidual",
    "ConditionalGraphicalResidual",
    "FaithfulResidual",
    "GraphicalResidual",
    "conditional_faithful_residual",
    "conditional_graphical_residual",
    "faithful_residual",
    "graphical_residual",
]


class FaithfulResidual(LinearStart, GraphTransform):
    r"""A flow with exactly the density :math:`\prod_v q(z_v \mid z_{Pa(v)}, x_{Pa(v)})` of a graph.

    Each variable has a monotone one-dimensional residual flow whose coefficients depend on its parents' final
    values, so that any number of blocks keeps the graph's independencies exactly (and none
    is needed for information to arrive). Calling the transform maps noise to variables. One direction is in closed
    form, the other inverts in one dimension.

    References:
        [1] Mouton and Kroon (2022), Graphical Residual Flows. There parents enter at their running value; here at
        their final value, and the bound is on the one-dimensional slope instead of spectral norms.

    Shape:
        - Input and output: :math:`(*batch, D)`.

    Args:
        network: The network.
        context: The context, of shape (\*batch, C), for the conditional form.
        cache_size: 0 or 1.

    Example:
        >>> import torch, networkx as nx, pyro.distributions as dist
        >>> flow = faithful_residual(nx.DiGraph([("a", "b"), ("b", "c")]))
        >>> q = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1).to_event(1), [flow])
        >>> q.log_prob(q.rsample((5,))).shape
        torch.Size([5])
    """

    network: FaithfulResidualNN


class ConditionalFaithfulResidual(LinearStart, ConditionalGraphTransform):
    r"""A :class:`FaithfulResidual` with context: ``.condition(context)`` is the transform.

    Args:
        network: The network.

    Example:
        >>> import torch, networkx as nx
        >>> graph = nx.DiGraph([("x", "a"), ("a", "b")])
        >>> flow = conditional_faithful_residual(graph, ["x"], closed_form="sampling")
        >>> flow.condition(torch.randn(7, 1))(torch.randn(7, 2)).shape
        torch.Size([7, 2])
    """

    network: FaithfulResidualNN
    transform_type = FaithfulResidual


class GraphicalResidual(GraphTransform):
    r"""The residual flow of Mouton and Kroon: :math:`y \mapsto y + g_t(y; x)` with masks and bounded spectral norms.

    In each block the parents of a variable enter at their running value. Two limits follow, both measured:

    - With closed form "density", after T blocks :math:`q(z_v \mid \text{ancestors})` depends on ancestors up to
      T hops away and not only on the parents: independences given the parents are not enforced.
    - With closed form "sampling", information moves one hop with each block, so T must be at least the largest
      number of edges on a shortest path from an ancestor to a variable, or the flow cannot
      represent the graph's densities. The constructor checks this. Even then independences are not enforced.

    :class:`FaithfulResidual` has neither limit.

    References:
        [1] Mouton and Kroon (2022), Graphical Residual Flows, Eq. (6). Log-determinants are exact at any depth here
        for the price of one pass, where the paper's form the Jacobian, and the inverse is safeguarded.

    Shape:
        - Input and output: :math:`(*batch, D)`.

    Args:
        network: The network.
        context: The context, of shape (\*batch, C), for the conditional form.
        cache_size: 0 or 1.

    Example:
        >>> import torch, networkx as nx, pyro.distributions as dist
        >>> flow = graphical_residual(nx.DiGraph([("a", "b"), ("b", "c")]))
        >>> q = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1).to_event(1), [flow])
        >>> q.log_prob(q.rsample((5,))).shape
        torch.Size([5])
    """

    network: GraphicalResidualNN


class ConditionalGraphicalResidual(ConditionalGraphTransform):
    r"""A :class:`GraphicalResidual` with context: ``.condition(context)`` is the transform.

    The weights that multiply the context are not bounded.

    Args:
        network: The network.

    Example:
        >>> import torch, networkx as nx
        >>> graph = nx.DiGraph([("x", "a"), ("a", "b")])
        >>> flow = conditional_graphical_residual(graph, ["x"], closed_form="sampling")
        >>> flow.condition(torch.randn(7, 1))(torch.randn(7, 2)).shape
        torch.Size([7, 2])
    """

    network: GraphicalResidualNN
    transform_type = GraphicalResidual


def faithful_residual(
    graph: GraphLike | FlowStructure,
    hidden_dims: Sequence[int] | None = None,
    num_blocks: int = 4,
    closed_form: str = "density",
    **options: Any,
) -> FaithfulResidual:
    """Return a :class:`FaithfulResidual` over the nodes of a graph.

    Args:
        graph: A digraph, ModelGraph, InverseGraph or FlowStructure without context; the event dimension is in its
            node order (see :func:`flow_structure`).
        hidden_dims: The width of each hidden layer over all variables; one layer with 8 units for each by default.
        num_blocks: The number of residual blocks.
        closed_form: ``"density"`` (priors, maximum likelihood, inference compilation) or ``"sampling"`` (guides
            in SVI): the direction without numerical inversion.
        options: Further arguments of :class:`FaithfulResidualNN`.

    Returns:
        The transform.

    Raises:
        GraphflowsError: If the graph has context nodes, or an argument is out of range.
    """
    structure = without_context(graph, "conditional_faithful_residual")
    network = FaithfulResidualNN(
        structure, hidden_dims=hidden_dims, num_blocks=num_blocks, closed_form=closed_form, **options
    )
    return FaithfulResidual(network)


def conditional_faithful_residual(
    graph: GraphLike | FlowStructure,
    context: int | Iterable[Node] | None = None,
    hidden_dims: Sequence[int] | None = None,
    num_blocks: int = 4,
    closed_form: str = "density",
    **options: Any,
) -> ConditionalFaithfulResidual:
    """Return a :class:`ConditionalFaithfulResidual` over the nodes of a graph.

    Args:
        graph: A digraph, ModelGraph, InverseGraph or FlowStructure; in an InverseGraph the latent nodes are the
            variables, and the observed nodes and inputs among their parents the context, in graph order.
        context: The nodes that are context, or the number of context columns that every variable depends on.
        hidden_dims: The width of each hidden layer over all variables; one layer with 8 units for each by default.
        num_blocks: The number of residual blocks.
        closed_form: ``"density"`` or ``"sampling"``: the direction without numerical inversion.
        options: Further arguments of :class:`FaithfulResidualNN`.

    Returns:
        The conditional transform.

    Raises:
        GraphflowsError: If an argument is out of range.
    """
    structure = flow_structure(graph, context)
    network = FaithfulResidualNN(
        structure, hidden_dims=hidden_dims, num_blocks=num_blocks, closed_form=closed_form, **options
    )
    return ConditionalFaithfulResidual(network)


def graphical_residual(
    graph: GraphLike | FlowStructure,
    hidden_dims: Sequence[int] | None = None,
    num_blocks: int = 4,
    closed_form: str = "density",
    **options: Any,
) -> GraphicalResidual:
    """Return a :class:`GraphicalResidual` over the nodes of a graph.

    Args:
        graph: A digraph, ModelGraph, InverseGraph or FlowStructure without context; the event dimension is in its
            node order (see :func:`flow_structure`).
        hidden_dims: The width of each hidden layer; one layer with 8 units for each variable by default.
        num_blocks: The number of residual blocks.
        closed_form: ``"density"`` or ``"sampling"``: the direction without numerical inversion.
        options: Further arguments of :class:`GraphicalResidualNN`.

    Returns:
        The transform.

    Raises:
        GraphflowsError: If the graph has context nodes, an argument is out of range, or there are fewer blocks than
            hops in the sampling direction.
    """
    structure = without_context(graph, "conditional_graphical_residual")
    network = GraphicalResidualNN(
        structure, hidden_dims=hidden_dims, num_blocks=num_blocks, closed_form=closed_form, **options
    )
    return GraphicalResidual(network)


def conditional_graphical_residual(
    graph: GraphLike | FlowStructure,
    context: int | Iterable[Node] | None = None,
    hidden_dims: Sequence[int] | None = None,
    num_blocks: int = 4,
    closed_form: str = "density",
    **options: Any,
) -> ConditionalGraphicalResidual:
    """Return a :class:`ConditionalGraphicalResidual` over the nodes of a graph.

    Args:
        graph: A digraph, ModelGraph, InverseGraph or FlowStructure; in an InverseGraph the latent nodes are the
            variables, and the observed nodes and inputs among their parents the context, in graph order.
        context: The nodes that are context, or the number of context columns that every variable depends on.
        hidden_dims: The width of each hidden layer; one layer with 8 units for each variable by default.
        num_blocks: The number of residual blocks.
        closed_form: ``"density"`` or ``"sampling"``: the direction without numerical inversion.
        options: Further arguments of :class:`GraphicalResidualNN`.

    Returns:
        The conditional transform.

    Raises:
        GraphflowsError: If an argument is out of range, or there are fewer blocks than hops in the sampling
            direction.
    """
    structure = flow_structure(graph, context)
    network = GraphicalResidualNN(
        structure, hidden_dims=hidden_dims, num_blocks=num_blocks, closed_form=closed_form, **options
    )
    return ConditionalGraphicalResidual(network)
