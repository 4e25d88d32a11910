"""Graphical residual flows, as published."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.model_graph import Node
from pyro_graphflows.transforms.base import ConditionalGraphTransform, GraphTransform
from pyro_graphflows.transforms.flow_nn import some_names
from pyro_graphflows.transforms.graphical_nn import GraphicalEvaluation, GraphicalResidualNN
from pyro_graphflows.transforms.structure import FlowStructure, GraphLike, flow_structure

__all__ = [
    "ConditionalGraphicalResidual",
    "GraphicalResidual",
    "conditional_graphical_residual",
    "graphical_residual",
]


class _Delegate:
    """What both forms hand on to their network."""

    network: GraphicalResidualNN

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The variables by level, in topological order."""
        return self.network.levels


class GraphicalResidual(_Delegate, GraphTransform):
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

    def start(self) -> GraphicalEvaluation:
        """Begin a pass through the levels; see :class:`GraphicalEvaluation`."""
        return self.network.start(*self._parts)


class ConditionalGraphicalResidual(_Delegate, ConditionalGraphTransform):
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

    def start(self, *context: Tensor) -> GraphicalEvaluation:
        """Begin a pass through the levels with a context in parts; see :class:`GraphicalEvaluation`."""
        return self.network.start(*context)


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
    structure = flow_structure(graph)
    if structure.context_dim:
        raise GraphflowsError(
            f"Expected a graph without context; got {some_names(structure.context_names)}. "
            "Use conditional_graphical_residual."
        )
    return GraphicalResidual(
        GraphicalResidualNN(
            structure, hidden_dims=hidden_dims, num_blocks=num_blocks, closed_form=closed_form, **options
        )
    )


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
    return ConditionalGraphicalResidual(
        GraphicalResidualNN(
            flow_structure(graph, context),
            hidden_dims=hidden_dims,
            num_blocks=num_blocks,
            closed_form=closed_form,
            **options,
        )
    )
