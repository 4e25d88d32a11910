"""Priors over a latent vector with the structure of a Bayesian network."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import ModelGraph, Node
from pyro_graphflows.transforms.faithful import FaithfulResidualNN
from pyro_graphflows.transforms.graphical import GraphicalResidualNN
from pyro_graphflows.transforms.network import ConditionalGraphTransform, FlowNN, GraphTransform
from pyro_graphflows.transforms.residual import (
    ConditionalFaithfulResidual,
    ConditionalGraphicalResidual,
    FaithfulResidual,
    GraphicalResidual,
)
from pyro_graphflows.transforms.structure import FlowStructure, GraphLike, flow_structure

__all__ = ["GraphicalFlowPrior", "flow_classes"]


@dataclass(frozen=True)
class FlowClasses:
    """The classes of one family of flows.

    Args:
        network: From a structure and options to a network.
        plain: From a network to a transform.
        conditional: From a network to a conditional transform.
    """

    network: Callable[..., FlowNN]
    plain: Callable[..., GraphTransform]
    conditional: Callable[[Any], ConditionalGraphTransform]


_FLOWS = {
    "faithful": FlowClasses(FaithfulResidualNN, FaithfulResidual, ConditionalFaithfulResidual),
    "graphical": FlowClasses(GraphicalResidualNN, GraphicalResidual, ConditionalGraphicalResidual),
}


def flow_classes(flow: str) -> FlowClasses:
    """Return the classes of a family of flows.

    Args:
        flow: ``"faithful"`` or ``"graphical"``.

    Raises:
        GraphflowsError: If it is another word.
    """
    if flow not in _FLOWS:
        raise GraphflowsError(f"Expected flow to be one of {', '.join(map(repr, _FLOWS))}; got {flow!r}.")
    return _FLOWS[flow]


class GraphicalFlowPrior(PyroModule):
    r"""A learnable distribution of a latent vector that factorises as a graph says.

    Calling it returns a distribution with event shape (D,) and, without a context, batch shape (); it is expanded
    by the plates around the sample site. ``log_prob`` is in closed form; sampling goes by levels and inverts
    numerically. Both are differentiable in the parameters.

    In a model that owns the prior as a submodule its parameters are registered with Pyro; elsewhere call
    ``pyro.module("prior", prior)``.

    References:
        [1] Mouton and Kroon (2022), Siren-VAE, Section 3. There with the graphical residual flow.

    Args:
        graph: The structure. Of a :class:`ModelGraph` the latent nodes are taken, and their parents that are
            observed or inputs are context; of an :class:`InverseGraph` likewise.
        flow: ``"faithful"`` or ``"graphical"``.
        context: Nodes that are context, or a number of context columns, as in :func:`flow_structure`.
        closed_form: ``"density"`` by default.
        options: Further arguments of the flow's network, as ``num_blocks`` or ``hidden_dims``.

    Attributes:
        flow: The transform, or the conditional transform if there is a context.

    Raises:
        GraphflowsError: If ``flow`` is another word, or an argument is out of range.

    Example:
        >>> import networkx as nx, pyro, torch
        >>> prior = GraphicalFlowPrior(nx.DiGraph([("a", "b"), ("a", "c")]))
        >>> def model():
        ...     pyro.module("prior", prior)
        ...     with pyro.plate("data", 7):
        ...         return pyro.sample("z", prior())
        >>> model().shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        graph: GraphLike | FlowStructure,
        *,
        flow: str = "faithful",
        context: int | Iterable[Node] | None = None,
        closed_form: str = "density",
        **options: Any,
    ) -> None:
        super().__init__()
        classes = flow_classes(flow)
        variables = graph.latent if isinstance(graph, ModelGraph) else None
        structure = flow_structure(graph, context, variables=variables)
        network = classes.network(structure, closed_form=closed_form, **options)
        self.flow = classes.conditional(network) if structure.context_dim else classes.plain(network)

    @property
    def structure(self) -> FlowStructure:
        """Who depends on whom."""
        return self.flow.structure

    def forward(self, context: Tensor | None = None) -> dist.TransformedDistribution:
        r"""Return the distribution of the latent vector.

        Args:
            context: Shape (\*batch, C), if the structure has one.

        Returns:
            A distribution of batch shape (\*batch) and event shape (D,).

        Raises:
            GraphflowsError: If there is a context and none is expected, or the other way round.
        """
        if isinstance(self.flow, GraphTransform):
            if context is not None:
                raise GraphflowsError("Expected no context: the structure of this prior has none.")
            transform = self.flow
        else:
            if context is None:
                raise GraphflowsError(
                    f"Expected a context with {self.structure.context_dim} columns; got none. "
                    "Call prior(context)."
                )
            transform = self.flow.condition(context)
        network = self.flow.network
        zeros = network.loc.new_zeros(network.loc.shape)
        base = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
        return dist.TransformedDistribution(base, [transform])

    def split(self, z: Tensor) -> Mapping[Node, Tensor]:
        r"""Return the part of each node.

        Args:
            z: Shape (\*batch, D).

        Returns:
            For each node a tensor of shape (\*batch, event size).
        """
        return {node: z[..., part] for node, part in self.structure.slices.items()}
