r"""SIReN-VAE: a variational autoencoder whose prior, decoder and encoder all follow one Bayesian network.

The network says which latent variables depend on which, and which of them each observed variable depends on. Then

- the prior is a flow over the latent nodes with the edges among them, :math:`p(z) = \prod_v p(z_v | z_{Pa(v)})`;
- the decoder has masks, :math:`p(x|z) = \prod_i p(x_i | z_{Pa(i)}, x_{Pa(i)})`;
- the encoder is a flow over a *faithful inverse* of the network: it asserts no independence that the posterior lacks,
  and needs few edges.

For the chain ``a -> b -> x`` the prior is p(a) p(b|a), the decoder p(x|b), and the encoder q(b|x) q(a|b): the
inverse knows that, given b, the data say nothing more about a.

With ``flow="faithful"`` the parents of a variable enter the flows at their final value, so that prior and encoder have
exactly these factors; with ``flow="graphical"`` they are the published graphical residual flows, in which parents enter
at running values and the factorisation holds up to hops between blocks
(:class:`~pyro_graphflows.transforms.GraphicalResidual`).

References:
    [1] Mouton and Kroon (2022), SIReN-VAE: Leveraging Flows and Amortized Inference for Bayesian Networks.
    [2] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.inversion import faithful_inverse
from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork
from pyro_graphflows.graphs.model_graph import ModelGraph, Node, listed
from pyro_graphflows.infer.particles import evaluation_mode
from pyro_graphflows.models.decoder import MaskedDecoder, modules_by_node
from pyro_graphflows.models.latent_model import LatentModel
from pyro_graphflows.models.linear_start import put_linear_gaussian_
from pyro_graphflows.models.observation import HALF_LOG_TWO_PI, Likelihood
from pyro_graphflows.models.variants import variant_graph
from pyro_graphflows.transforms.base import GraphTransform
from pyro_graphflows.transforms.faithful_nn import FaithfulResidualNN
from pyro_graphflows.transforms.faithful_residual import FaithfulResidual
from pyro_graphflows.transforms.flow_nn import FlowNN
from pyro_graphflows.transforms.fused_levels import LevelSampler
from pyro_graphflows.transforms.graphical_nn import GraphicalResidualNN
from pyro_graphflows.transforms.graphical_residual import GraphicalResidual
from pyro_graphflows.transforms.structure import FlowStructure

__all__ = ["SIReNVAE"]

_FLOWS: dict[str, tuple[type[Any], type[GraphTransform]]] = {
    "faithful": (FaithfulResidualNN, FaithfulResidual),
    "graphical": (GraphicalResidualNN, GraphicalResidual),
}


class SIReNVAE(LatentModel):
    r"""A VAE with the structure of a Bayesian network.

    Args:
        graph: The model graph: any with latent and observed nodes (and inputs). Observed parents of observed nodes
            enter the decoder, those of latent nodes the prior.
        flow: ``"faithful"`` or ``"graphical"``, for prior and encoder.
        num_blocks: The number of blocks of each flow.
        inverse: The encoder's structure: an order of :func:`~pyro_graphflows.faithful_inverse`, an
            :class:`~pyro_graphflows.InverseGraph` of ``graph``, or a sequence of latent nodes to eliminate.
        decoder: None for masked networks, or modules for some observed nodes, as
            :class:`~pyro_graphflows.models.decoder.MaskedDecoder` takes them (a single module if there is one observed
            node). For images and the like.
        encoder: Modules for some known nodes, which turn the node's features (rows, size) into those that the encoder
            sees instead (a single module if there is one known node).
        likelihood: The likelihood of all observed nodes or of each: ``"normal"``, ``"bernoulli"`` or
            ``("categorical", classes)``.
        units_per_variable: The hidden units of each variable in a block of a flow.
        decoder_units: The hidden units of the decoder for each distinct set of parents.
        latent_name: The name of the latent site in ``model`` and ``guide``.
        options: Further arguments of the flows' networks, as ``lipschitz`` or ``activation``.

    Attributes:
        inverse: The inverse that the encoder follows.
        prior_network: The flow of the prior.
        encoder_network: The flow of the encoder.

    Raises:
        GraphflowsError: If ``flow`` is another word, the inverse is one of another graph, or an argument is unknown or
            out of range.
        UnsupportedModelError: If nodes are marginalised or in different plates.

    Example:
        >>> graph = ModelGraph([("a", "b"), ("b", "x"), ("b", "y")], observed=["x", "y"])
        >>> vae = SIReNVAE(graph)
        >>> x = torch.randn(50, 2)
        >>> history = vae.fit(x, schedule=2, progress=False)
        >>> vae.log_evidence(x, num_particles=10).log_evidence.shape, vae.sample(7).shape
        (torch.Size([50]), torch.Size([7, 2]))
    """

    def __init__(
        self,
        graph: ModelGraph,
        *,
        flow: str = "faithful",
        num_blocks: int = 4,
        inverse: str | InverseGraph | Sequence[Node] = "auto",
        decoder: nn.Module | Mapping[Node, nn.Module] | None = None,
        encoder: nn.Module | Mapping[Node, nn.Module] | None = None,
        likelihood: Likelihood | Mapping[Node, Likelihood] = "normal",
        units_per_variable: int = 8,
        decoder_units: int = 8,
        latent_name: str = "z",
        **options: Any,
    ) -> None:
        super().__init__(graph, likelihood=likelihood, latent_name=latent_name)
        if flow not in _FLOWS:
            raise GraphflowsError(f"Expected flow to be one of {', '.join(map(repr, _FLOWS))}; got {flow!r}.")
        if not isinstance(inverse, InverseGraph):
            inverse = faithful_inverse(graph, inverse)
        elif inverse.graph != graph:
            raise GraphflowsError("Expected an inverse of the given graph; got one of another graph.")
        self.inverse = inverse
        network, self._transform = _FLOWS[flow]
        known_options = set(inspect.signature(network).parameters) - {"structure", "closed_form"}
        unknown = listed(set(options) - known_options)
        if unknown:
            raise GraphflowsError(
                f"Expected arguments of SIReNVAE or options of the {flow} flow ({listed(known_options)}); got "
                f"{unknown}."
            )
        features = self.observation.features
        self.feature_modules = nn.ModuleList()
        self._feature_nodes: list[Node] = []
        seen = self._seen_by_encoder(encoder)
        common = {"num_blocks": num_blocks, "units_per_variable": units_per_variable, **options}
        prior, self._prior_columns = self._structure(graph.parents, features)
        posterior, self._columns = self._structure(inverse.parents.__getitem__, seen)
        self.prior_network: FlowNN = network(prior, closed_form="density", **common)
        self.encoder_network: FlowNN = network(posterior, closed_form="sampling", **common)
        self.decoder = MaskedDecoder(
            graph, self.latents, self.observation, modules=decoder, units_per_set=decoder_units
        )
        self._sampler = LevelSampler(self.encoder_network) if flow == "faithful" else None

    @classmethod
    def from_variant(cls, graph: ModelGraph, variant: str, **options: Any) -> "SIReNVAE":
        """Return the model for a variant of a network, as compared in [1].

        Args:
            graph: The true network.
            variant: ``"true"``, ``"ind"`` or ``"FC"``; see :func:`variant_graph`.
            options: Further arguments of the constructor.

        Returns:
            The model. Its encoder inverts the variant's graph.
        """
        return cls(variant_graph(graph, variant), **options)

    def _layout(self) -> dict[str, list[str]]:
        inverse = [f"{p} -> {node}" for node in self.graph.latent for p in self.inverse.parents[node]]
        return {
            **super()._layout(),
            "arcs": sorted(f"{p} -> {c}" for p, c in self.graph.edges),
            "arcs of the inverse": sorted(inverse),
        }

    def put_linear_gaussian_(self, network: LinearGaussianNetwork) -> None:
        """Become a linear-Gaussian network with its exact posterior; see :func:`put_linear_gaussian_`.

        Args:
            network: A network over the nodes of the graph.
        """
        put_linear_gaussian_(self, network)

    # ------------------------------------------------------------------------------------------------- structure

    def _seen_by_encoder(self, given: nn.Module | Mapping[Node, nn.Module] | None) -> dict[Node, slice]:
        """Register the modules that summarise known nodes; return where each node's summary is."""
        modules = modules_by_node(given, tuple(self.observation.sizes), "encoder")
        seen, start = {}, 0
        for node, part in self.observation.features.items():
            size = part.stop - part.start
            if node in modules:
                self._feature_nodes.append(node)
                self.feature_modules.append(modules[node])
                with torch.no_grad(), evaluation_mode(modules[node]):  # batch statistics stay as they are
                    summary = modules[node](self.observation.loc.new_zeros(2, size))
                if summary.dim() != 2 or len(summary) != 2:
                    raise GraphflowsError(
                        f"Expected the encoder of {node} to return the shape (rows, features) for (rows, {size}); got "
                        f"{tuple(summary.shape)} for 2 rows."
                    )
                size = summary.shape[-1]
            seen[node] = slice(start, start + size)
            start += size
        return seen

    def _structure(self, parents: Any, known: Mapping[Node, slice]) -> tuple[FlowStructure, list[int] | None]:
        """Return the structure of a flow over the latent vector, and the known columns that are its context."""
        used = {p for node in self.graph.latent for p in parents(node) if p not in self.latents}
        columns = [i for node, part in known.items() if node in used for i in range(part.start, part.stop)]
        place = {column: i for i, column in enumerate(columns)}
        rows, context_rows, names = [], [], []
        for node in self.graph.latent:
            part = self.latents[node]
            own = [i for p in parents(node) if p in self.latents for i in range(*_ends(self.latents[p]))]
            given = [
                place[i] for p in parents(node) if p not in self.latents for i in range(*_ends(known[p]))
            ]
            for i in range(part.start, part.stop):
                rows.append((*own, *range(part.start, i)))
                context_rows.append(tuple(given))
                names.append(str(node) if part.stop - part.start == 1 else f"{node}[{i - part.start}]")
        structure = FlowStructure(
            parents=tuple(rows),
            context_parents=tuple(context_rows),
            context_dim=len(columns),
            names=tuple(names),
            nodes={node: part.stop - part.start for node, part in self.latents.items()},
        )
        total = max((part.stop for part in known.values()), default=0)
        return structure, None if columns == list(range(total)) else columns

    def _prior_context(self, features: Tensor) -> tuple[Tensor, ...]:
        if not self.prior_network.context_dim:
            return ()
        return (features if self._prior_columns is None else features[..., self._prior_columns],)

    def _context(self, features: Tensor) -> tuple[Tensor, ...]:
        if not self.encoder_network.context_dim:
            return ()
        if self._feature_nodes:
            parts = {node: features[..., part] for node, part in self.observation.features.items()}
            for node, module in zip(self._feature_nodes, self.feature_modules, strict=True):
                rows = parts[node]
                parts[node] = module(rows.reshape(-1, rows.shape[-1])).reshape(*rows.shape[:-1], -1)
            features = torch.cat(list(parts.values()), -1)
        return (features if self._columns is None else features[..., self._columns],)

    # ------------------------------------------------------------------------------------------------ densities

    def encode(self, features: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Map noise to latent values; see :meth:`LatentModel.encode`."""
        sample = self.encoder_network.sample if self._sampler is None else self._sampler
        z, log_diag = sample(eps, *self._context(features))
        return z, _log_density(eps, log_diag)

    def log_prior(self, z: Tensor, features: Tensor) -> Tensor:
        """Return the log-density of the prior; see :meth:`LatentModel.log_prior`."""
        return _log_density(*self.prior_network.inverse_terms(z, *self._prior_context(features)))

    def decode(self, z: Tensor, features: Tensor) -> Tensor:
        """Return the parameters of all observed nodes."""
        return self.decoder(z, features)

    def draw_prior(self, eps: Tensor, features: Tensor) -> Tensor:
        """Map noise to values of the prior."""
        return self.prior_network.sample(eps, *self._prior_context(features))[0]

    def prior(self, features: Tensor) -> dist.TorchDistribution:
        """Return the prior as a distribution."""
        return self._flow(self.prior_network, *self._prior_context(features))

    def posterior(self, features: Tensor) -> dist.TorchDistribution:
        """Return the encoder's distribution."""
        return self._flow(self.encoder_network, *self._context(features))

    def _flow(self, network: FlowNN, *context: Tensor) -> dist.TorchDistribution:
        zeros = network.loc.new_zeros(network.loc.shape)
        if context:
            zeros = zeros.expand(*context[0].shape[:-1], -1)
        base = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
        return dist.TransformedDistribution(base, [self._transform(network, *context)])


def _log_density(eps: Tensor, log_diag: Tensor) -> Tensor:
    return torch.addcmul(log_diag, eps, eps, value=0.5).sum(-1).neg() - eps.shape[-1] * HALF_LOG_TWO_PI


def _ends(part: slice) -> tuple[int, int]:
    return part.start, part.stop
