"""Faithful residual flows: exactly one conditional density for each variable given its parents."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.model_graph import Node
from pyro_graphflows.transforms.base import ConditionalGraphTransform, GraphTransform
from pyro_graphflows.transforms.faithful_evaluation import FaithfulEvaluation
from pyro_graphflows.transforms.faithful_nn import FaithfulResidualNN
from pyro_graphflows.transforms.structure import FlowStructure, GraphLike, flow_structure

__all__ = [
    "ConditionalFaithfulResidual",
    "FaithfulResidual",
    "conditional_faithful_residual",
    "faithful_residual",
]


class _Delegate:
    """What both forms hand on to their network."""

    network: FaithfulResidualNN

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The variables by level, in the order of sampling."""
        return self.network.levels

    def init_linear_(self, weights: Tensor, shift: Tensor, scale: Tensor) -> None:
        """Make the flow linear-Gaussian; see :meth:`FaithfulResidualNN.init_linear_`."""
        self.network.init_linear_(weights, shift, scale)

    def initialize_(self, z: Tensor, context: Tensor | None = None) -> None:
        """Standardise and regress on samples; see :meth:`FaithfulResidualNN.initialize_`."""
        self.network.initialize_(z, context)


class FaithfulResidual(_Delegate, GraphTransform):
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

    def start(self) -> FaithfulEvaluation:
        """Begin a pass through the levels; see :class:`FaithfulEvaluation`."""
        return self.network.start(*self._parts)


class ConditionalFaithfulResidual(_Delegate, ConditionalGraphTransform):
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

    def start(self, *context: Tensor) -> FaithfulEvaluation:
        """Begin a pass through the levels with a context in parts; see :class:`FaithfulEvaluation`."""
        return self.network.start(*context)


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
    structure = flow_structure(graph)
    if structure.context_dim:
        raise GraphflowsError(
            f"Expected a graph without context; got {', '.join(structure.context_names)}. "
            "Use conditional_faithful_residual."
        )
    return FaithfulResidual(
        FaithfulResidualNN(
            structure, hidden_dims=hidden_dims, num_blocks=num_blocks, closed_form=closed_form, **options
        )
    )


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
    return ConditionalFaithfulResidual(
        FaithfulResidualNN(
            flow_structure(graph, context),
            hidden_dims=hidden_dims,
            num_blocks=num_blocks,
            closed_form=closed_form,
            **options,
        )
    )
