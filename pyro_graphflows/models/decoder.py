"""A decoder in which each observed node sees its parents only."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.model_graph import ModelGraph, Node
from pyro_graphflows.models.observation import Observation
from pyro_graphflows.nn.linear import MaskedLinear
from pyro_graphflows.nn.mlp import MaskedMLP

__all__ = ["MaskedDecoder"]


class MaskedDecoder(nn.Module):
    r"""The parameters of each observed node as a function of its parents.

    Nodes without a module of their own share one masked network with a linear part beside its hidden layers. Its
    hidden units start with small outputs, and the log-scales at zero.

    Shape:
        - z: (\*batch, latent size), features: (\*batch, features); output: (\*batch, number of parameters).

    Args:
        graph: The model graph.
        latents: Where the scalars of each latent node are in z.
        observation: The likelihoods, and where features of known nodes are.
        modules: Modules for some of the nodes. Each maps the values of the node's parents beside each other (in graph
            order: scalars of latent nodes, features of known ones) to the node's parameters (for a normal node of
            size n, n locations in standard units and then n log-scales; for others the logits).
        units_per_set: The number of hidden units for each distinct set of parents.
        hidden_layers: The number of hidden layers.
        activation: The activation.

    Raises:
        GraphflowsError: If ``modules`` names a node that is not observed.
    """

    def __init__(
        self,
        graph: ModelGraph,
        latents: Mapping[Node, slice],
        observation: Observation,
        *,
        modules: Mapping[Node, nn.Module] | None = None,
        units_per_set: int = 8,
        hidden_layers: int = 1,
        activation: str = "elu",
    ) -> None:
        super().__init__()
        modules = dict(modules or {})
        unknown = [str(node) for node in modules if node not in observation.kinds]
        if unknown:
            raise GraphflowsError(
                f"Expected decoders for observed nodes; got them for {', '.join(sorted(unknown))}."
            )
        num_latent = sum(part.stop - part.start for part in latents.values())
        self.num_parameters = observation.num_parameters
        sources: dict[Node, list[int]] = {}
        for node in observation.kinds:
            sources[node] = []
            for parent in graph.parents(node):
                if parent in latents:
                    part, shift = latents[parent], 0
                else:
                    part, shift = observation.features[parent], num_latent
                sources[node] += range(part.start + shift, part.stop + shift)
        self._sources = sources
        self._nodes = list(modules)
        self.modules_by_node = nn.ModuleList(modules.values())
        shared = [i for i, node in enumerate(observation.parameter_nodes) if node not in modules]
        self._needs_features = any(max(s, default=0) >= num_latent for s in sources.values())
        self._order: list[int] | None = None
        self.network: MaskedMLP | None = None
        if shared:
            owners = [observation.parameter_nodes[i] for i in shared]
            self.network = MaskedMLP(
                [sources[node] for node in owners],
                num_latent + (observation.num_features if self._needs_features else 0),
                num_params=1,
                units_per_set=units_per_set,
                hidden_layers=hidden_layers,
                activation=activation,
                output_names=[str(node) for node in owners],
            )
            self._start_small(observation, owners)
        if modules:
            position = [*shared, *(i for node in modules for i in observation.own(node))]
            self._order = sorted(range(len(position)), key=position.__getitem__)

    @torch.no_grad()
    def _start_small(self, observation: Observation, owners: list[Node]) -> None:
        """Let log-scales not depend on the parents: densities far off would rule the start."""
        assert self.network is not None
        scales = {i for node in observation.kinds for i in observation.log_scales(node)}
        shared = [i for i, node in enumerate(observation.parameter_nodes) if node in set(owners)]
        factors = torch.tensor([0.0 if i in scales else 1.0 for i in shared])
        for layer, factor in ((self.network.layers[-1], 0.1 * factors), (self.network.skip, factors)):
            assert isinstance(layer, MaskedLinear)
            rows = layer.sparse_mask().indices[0]
            by_weight = factor.unsqueeze(-1) if layer.engine == "dense" else factor[rows]
            layer.weight.mul_(by_weight.to(layer.weight))

    def forward(self, z: Tensor, features: Tensor) -> Tensor:
        """Return the parameters of all observed nodes."""
        inputs = z
        if self._needs_features:
            batch = torch.broadcast_shapes(z.shape[:-1], features.shape[:-1])
            inputs = torch.cat([z.expand(*batch, -1), features.expand(*batch, -1)], -1)
        parts = [] if self.network is None else [self.network(inputs).squeeze(-1)]
        for node, module in zip(self._nodes, self.modules_by_node, strict=True):
            parts.append(module(inputs[..., self._sources[node]]))
        if self._order is None:
            return parts[0]
        found = torch.cat(parts, -1)
        if found.shape[-1] != self.num_parameters:
            raise GraphflowsError(
                f"Expected {self.num_parameters} parameters from the decoders; got {found.shape[-1]}. A normal node of "
                "size n needs 2 n (locations, log-scales), a Bernoulli node n, a categorical one n times its classes."
            )
        return found[..., self._order]
