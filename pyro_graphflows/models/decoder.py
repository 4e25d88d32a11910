"""A decoder in which each observed node sees its parents only."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.model_graph import ModelGraph, Node, listed
from pyro_graphflows.models.likelihood import Observation
from pyro_graphflows.nn.masked import MaskedLinear
from pyro_graphflows.nn.mlp import MaskedMLP

__all__ = ["MaskedDecoder", "modules_by_node"]


def modules_by_node(
    given: nn.Module | Mapping[Node, nn.Module] | None, nodes: Sequence[Node], what: str
) -> dict[Node, nn.Module]:
    """Return the modules that a user gave for some nodes, by node.

    Args:
        given: The modules by node, or a single one where there is one node.
        nodes: The nodes that may have one.
        what: What the modules are, for messages.

    Raises:
        GraphflowsError: If it is something else, or a module is for another node.
    """
    if isinstance(given, nn.Module) and len(nodes) == 1:
        return {nodes[0]: given}
    modules = dict(given) if isinstance(given, Mapping) else {}
    if (given is not None and not isinstance(given, Mapping)) or not all(
        isinstance(module, nn.Module) for module in modules.values()
    ):
        names = ", ".join(map(str, nodes[:20]))
        raise GraphflowsError(
            f"Expected modules for the {what} by node, {{node: torch.nn.Module}}, of {names}; got {given!r}."
        )
    unknown = listed(node for node in modules if node not in nodes)
    if unknown:
        raise GraphflowsError(f"Expected {what} modules for {listed(nodes)}; got them for {unknown}.")
    return modules


class MaskedDecoder(nn.Module):
    r"""The parameters of each observed node as a function of its parents.

    Nodes without a module share one masked network with a linear part beside its hidden layers. Its
    hidden units start with small outputs, and the log-scales at zero.

    Shape:
        - z: (\*batch, latent size), features: (\*batch, features); output: (\*batch, number of parameters).

    Args:
        graph: The model graph.
        latents: Where the scalars of each latent node are in z.
        observation: The likelihoods, and where features of known nodes are.
        modules: Modules for some of the nodes, or one for the only one. Each maps the values of the node's parents
            beside each other (in graph order: scalars of latent nodes, features of known ones), as rows (rows, size of
            the parents), to the node's parameters (rows, number of parameters): for a normal node of size n, n
            locations in standard units and then n log-scales; for others the logits.
        units_per_set: The number of hidden units for each distinct set of parents.

    Raises:
        GraphflowsError: If ``modules`` names a node that is not observed, or is something else.
    """

    def __init__(
        self,
        graph: ModelGraph,
        latents: Mapping[Node, slice],
        observation: Observation,
        *,
        modules: nn.Module | Mapping[Node, nn.Module] | None = None,
        units_per_set: int = 8,
    ) -> None:
        super().__init__()
        modules = modules_by_node(modules, tuple(observation.kinds), "decoder")
        num_latent = sum(part.stop - part.start for part in latents.values())
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
        self._sizes = [len(observation.own(node)) for node in modules]
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
        for node, size, module in zip(self._nodes, self._sizes, self.modules_by_node, strict=True):
            rows = inputs[..., self._sources[node]].reshape(-1, len(self._sources[node]))
            found = module(rows)
            if found.shape != (len(rows), size):
                raise GraphflowsError(
                    f"Expected the decoder of {node} to return {size} parameters in each of {len(rows)} rows; got the "
                    f"shape {tuple(found.shape)}. A normal node of size n needs 2 n parameters (locations, then "
                    "log-scales), a Bernoulli node n, a categorical one n times its classes."
                )
            parts.append(found.reshape(*inputs.shape[:-1], size))
        return parts[0] if self._order is None else torch.cat(parts, -1)[..., self._order]
