r"""Autoregressive networks over a graph, in the form that Pyro's transforms take.

Pyro's ``AutoRegressiveNN`` gives the parameters of variable i as functions of all variables before i. Here they are
functions of the parents of i in a graph. Everything in Pyro that is built on such a network
(``AffineAutoregressive``, ``SplineAutoregressive``, ``NeuralAutoregressive``) then has the structure of the graph:
with x the result of ``AffineAutoregressive`` with these networks, the Jacobian is zero off the graph's edges.
"""

from collections.abc import Sequence

import networkx as nx
import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph, Node, topological_order
from pyro_graphflows.nn.mlp import MaskedMLP

__all__ = ["ConditionalGraphicalAutoRegressiveNN", "GraphicalAutoRegressiveNN"]


class ConditionalGraphicalAutoRegressiveNN(nn.Module):
    r"""The parameters of each variable as functions of its parents in a graph and of a context.

    The variables are the nodes of a digraph; the latent and observed nodes of a
    :class:`~pyro_graphflows.graphs.structures.ModelGraph`; the latent nodes of an
    :class:`~pyro_graphflows.graphs.structures.InverseGraph`. Other parents (inputs; for an inverse also the
    observed nodes) are context, seen by their children alone. Columns of the context beyond these are
    seen by every variable. A node of event size n counts as n variables, each a child of those before it.

    Shape:
        - x: (\*, D), context: (\*, C), which broadcasts against x.
        - Output: for each entry p of ``param_dims`` a tensor (\*, D), or (\*, p, D) if any of them is above 1.
          A single tensor if there is one entry.

    Args:
        graph: The graph. Variables are in graph order, for a digraph in the order of its nodes.
        context_dim: The number of columns of the context beyond the graph's own.
        hidden_dims: The numbers of units of the hidden layers; by default one layer of ``units_per_set`` units for
            each distinct set of parents.
        param_dims: The sizes of the parameters.
        units_per_set: The number of units for each distinct set of parents, without ``hidden_dims``.
        skip_connections: Whether there is a linear map beside the hidden layers.
        activation: A name or a module.
        engine: The engine of the layers; see :class:`~pyro_graphflows.nn.masked.MaskedLinear`.

    Attributes:
        input_dim: D.
        context_dim: C.
        permutation: The variables in topological order.
        context_nodes: The graph's nodes that are context, in order of columns.

    Raises:
        NotADAGError: If the graph has a cycle. The message lists one.
        GraphflowsError: If the graph is of another kind, an inverse has pooled parents, ``param_dims`` are not
            positive, or ``hidden_dims`` are too narrow.

    Example:
        >>> graph = ModelGraph([("a", "b"), ("x", "b")], observed=(), inputs=["x"])
        >>> arn = ConditionalGraphicalAutoRegressiveNN(graph)
        >>> loc, log_scale = arn(torch.zeros(5, 2), context=torch.zeros(5, 1))
        >>> loc.shape, arn.context_nodes
        (torch.Size([5, 2]), ('x',))
    """

    permutation: Tensor

    def __init__(
        self,
        graph: nx.DiGraph | ModelGraph | InverseGraph,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
        param_dims: Sequence[int] = (1, 1),
        *,
        units_per_set: int = 8,
        skip_connections: bool = True,
        activation: str | nn.Module = "elu",
        engine: str = "auto",
    ) -> None:
        super().__init__()
        if not param_dims or min(param_dims) < 1:
            raise GraphflowsError(f"Expected positive param_dims; got {list(param_dims)}.")
        variables, parents, sizes = _variables_and_parents(graph)
        chosen = set(variables)
        outside = {p for node in variables for p in parents[node]} - chosen
        order = list(graph.graph.nodes if isinstance(graph, InverseGraph) else graph.nodes)
        self.context_nodes = tuple(node for node in order if node in outside)
        places: dict[Node, range] = {}
        names: list[str] = []
        for node in (*variables, *self.context_nodes):
            places[node] = range(len(names), len(names) + sizes[node])
            names.extend(str(node) if sizes[node] == 1 else f"{node}[{k}]" for k in range(sizes[node]))
        self.input_dim = sum(sizes[node] for node in variables)
        total = len(names) + context_dim
        self.context_dim = total - self.input_dim
        names.extend(f"context[{k}]" for k in range(context_dim))
        allowed: list[set[int]] = []
        for node in variables:
            given = {i for p in parents[node] for i in places[p]} | set(range(total - context_dim, total))
            allowed.extend({*given, *places[node][:k]} for k in range(sizes[node]))
        self.param_dims = tuple(param_dims)
        self.mlp = MaskedMLP(
            allowed,
            total,
            num_params=sum(param_dims),
            hidden_dims=hidden_dims,
            units_per_set=units_per_set,
            activation=activation,
            skip=skip_connections,
            engine=engine,
            input_names=names,
            output_names=names[: self.input_dim],
        )
        dag = nx.DiGraph()
        dag.add_nodes_from(range(self.input_dim))
        dag.add_edges_from((j, k) for k, members in enumerate(allowed) for j in members if j < self.input_dim)
        self.register_buffer("permutation", torch.tensor(topological_order(dag), dtype=torch.long))

    def get_permutation(self) -> Tensor:
        """Return the variables in an order in which they can be computed."""
        return self.permutation

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Return the parameters of all variables."""
        got = 0 if context is None else context.shape[-1]
        if x.shape[-1] != self.input_dim or got != self.context_dim:
            raise GraphflowsError(
                f"Expected x.shape[-1] == {self.input_dim} and context.shape[-1] == {self.context_dim}; "
                f"got {x.shape[-1]} and {got}."
            )
        if context is not None:
            batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
            x = torch.cat([x.expand(*batch, -1), context.expand(*batch, -1)], -1)
        params = self.mlp(x).transpose(-1, -2)  # (*batch, sum(param_dims), D)
        if len(self.param_dims) == 1:
            return params[..., 0, :] if self.param_dims[0] == 1 else params
        if max(self.param_dims) == 1:
            return params.unbind(-2)
        return params.split(self.param_dims, -2)


class GraphicalAutoRegressiveNN(ConditionalGraphicalAutoRegressiveNN):
    r"""The parameters of each variable as functions of its parents in a graph.

    As :class:`ConditionalGraphicalAutoRegressiveNN`, for graphs whose nodes are all variables.

    Args:
        graph: The graph.
        hidden_dims: The numbers of units of the hidden layers.
        param_dims: The sizes of the parameters.
        units_per_set: The number of units for each distinct set of parents, without ``hidden_dims``.
        skip_connections: Whether there is a linear map beside the hidden layers.
        activation: A name or a module.
        engine: The engine of the layers.

    Raises:
        GraphflowsError: If a variable has a parent that is not a variable. The message lists these.

    Example:
        >>> arn = GraphicalAutoRegressiveNN(nx.DiGraph([("a", "b"), ("b", "c")]))
        >>> loc, log_scale = arn(torch.zeros(5, 3))
        >>> loc.shape, arn.permutation.tolist()
        (torch.Size([5, 3]), [0, 1, 2])
    """

    def __init__(
        self,
        graph: nx.DiGraph | ModelGraph | InverseGraph,
        hidden_dims: Sequence[int] | None = None,
        param_dims: Sequence[int] = (1, 1),
        *,
        units_per_set: int = 8,
        skip_connections: bool = True,
        activation: str | nn.Module = "elu",
        engine: str = "auto",
    ) -> None:
        super().__init__(
            graph,
            0,
            hidden_dims,
            param_dims,
            units_per_set=units_per_set,
            skip_connections=skip_connections,
            activation=activation,
            engine=engine,
        )
        if self.context_nodes:
            raise GraphflowsError(
                "Expected a graph whose nodes are all variables; "
                f"{', '.join(map(str, self.context_nodes))} are context. "
                "Use ConditionalGraphicalAutoRegressiveNN."
            )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Return the parameters of all variables."""
        return super().forward(x, context)


def _variables_and_parents(
    graph: nx.DiGraph | ModelGraph | InverseGraph,
) -> tuple[list[Node], dict[Node, tuple[Node, ...]], dict[Node, int]]:
    """Return the variables, their parents and the event sizes of all nodes."""
    if isinstance(graph, InverseGraph):
        pooled = sorted({f"{p} into {v}" for (p, v), how in graph.how.items() if how == "pooled"})
        if pooled:
            raise GraphflowsError(f"Expected an inverse without pooled parents; got {', '.join(pooled)}.")
        model = graph.graph
        return list(model.latent), dict(graph.parents), dict(model.event_sizes)
    if isinstance(graph, ModelGraph):
        variables = [node for node in graph.nodes if graph.role(node) in ("latent", "observed")]
        return variables, {node: graph.parents(node) for node in variables}, dict(graph.event_sizes)
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise GraphflowsError(
            f"Expected a networkx.DiGraph, ModelGraph or InverseGraph; got a {type(graph).__name__}."
        )
    topological_order(graph)  # raises for a cycle
    nodes = list(graph)
    return nodes, {node: tuple(graph.predecessors(node)) for node in nodes}, dict.fromkeys(nodes, 1)
