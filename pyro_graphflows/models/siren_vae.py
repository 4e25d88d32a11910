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

A decoder in which each observed node sees its parents only.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.inversion import faithful_inverse
from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph, Node, listed
from pyro_graphflows.infer.particles import evaluation_mode
from pyro_graphflows.models.latent_model import LatentModel
from pyro_graphflows.models.likelihood import HALF_LOG_TWO_PI, Likelihood, Observation
from pyro_graphflows.nn.masked import MaskedLinear
from pyro_graphflows.nn.mlp import MaskedMLP
from pyro_graphflows.transforms.faithful import FaithfulResidualNN
from pyro_graphflows.transforms.level_sampler import LevelSampler
from pyro_graphflows.transforms.network import FlowNN
from pyro_graphflows.transforms.priors import flow_classes
from pyro_graphflows.transforms.structure import FlowStructure

__all__ = [
    "MaskedDecoder",
    "SIReNVAE",
    "modules_by_node",
    "variant_graph",
]


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


class SIReNVAE(LatentModel):
    r"""A VAE with the structure of a Bayesian network.

    Args:
        graph: The model graph: any with latent and observed nodes (and inputs). Observed parents of observed nodes
            enter the decoder, those of latent nodes the prior.
        flow: ``"faithful"`` or ``"graphical"``, for prior and encoder.
        num_blocks: The number of blocks of each flow.
        inverse: The encoder's structure: an order of :func:`~pyro_graphflows.faithful_inverse`, an
            :class:`~pyro_graphflows.InverseGraph` of ``graph``, or a sequence of latent nodes to eliminate.
        decoder: None for masked networks, or modules for some observed nodes, as :class:`MaskedDecoder` takes them (a
            single module if there is one observed node). For images and the like.
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
        classes = flow_classes(flow)
        if not isinstance(inverse, InverseGraph):
            inverse = faithful_inverse(graph, inverse)
        elif inverse.graph != graph:
            raise GraphflowsError("Expected an inverse of the given graph; got one of another graph.")
        self.inverse = inverse
        network, self._transform = classes.network, classes.plain
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
        encoder_net = self.encoder_network
        self._sampler = LevelSampler(encoder_net) if isinstance(encoder_net, FaithfulResidualNN) else None

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
        """Set all parameters so that the model is a linear-Gaussian network and the encoder its posterior.

        Every importance weight of a datum then equals its exact evidence. Hidden units get zero output and stay
        trainable: this is also a start from a network that is known approximately. The standardisation is kept.

        Args:
            network: A network whose nodes are those of the model's graph, and whose parents are among the graph's.

        Raises:
            GraphflowsError: If the nodes differ, or a parent in the network is none in the graph.
            UnsupportedModelError: If the flow is the graphical one, a node is a vector or not normal, or a decoder or
                encoder module was given.
        """
        _put_linear_gaussian_(self, network)

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


@torch.no_grad()
def _put_linear_gaussian_(vae: SIReNVAE, network: LinearGaussianNetwork) -> None:
    """Do as :meth:`SIReNVAE.put_linear_gaussian_` says."""
    graph, observation = vae.graph, vae.observation
    prior, encoder, decoder = vae.prior_network, vae.encoder_network, vae.decoder
    plain = all(kind == "normal" for kind, _ in observation.kinds.values()) and decoder.network is not None
    scalar = all(size == 1 for size in graph.event_sizes.values())
    faithful = isinstance(prior, FaithfulResidualNN) and isinstance(encoder, FaithfulResidualNN)
    if not (plain and scalar and faithful) or len(decoder.modules_by_node) or len(vae.feature_modules):
        raise UnsupportedModelError(
            "Expected a faithful flow over scalar normal nodes, without modules for decoder or encoder."
        )
    if set(network.names) != set(graph.nodes):
        raise GraphflowsError("Expected a network over the nodes of the graph; got other nodes.")
    for node in (*graph.latent, *graph.observed):
        more = sorted(set(network.parents[node]) - set(graph.parents(node)))
        if more:
            raise GraphflowsError(
                f"Expected parents of {node} that are its parents in the graph; got {', '.join(more)}."
            )

    def law(node: Any) -> tuple[Sequence[Any], Any, float, float]:
        return (
            network.parents[node],
            network.coefficients[node],
            network.intercepts[node],
            network.scales[node],
        )

    def posterior(node: Any) -> tuple[Sequence[Any], Any, float, float]:
        given: Any = vae.inverse.parents[node]
        return given, *network.conditional(node, given)

    columns = {node: part.start for node, part in observation.columns.items()}
    centre = {node: float(observation.loc[i]) for node, i in columns.items()}
    width = {node: float(observation.scale[i]) for node, i in columns.items()}

    def in_units(given: Sequence[Any], coefficients: Any, intercept: float) -> tuple[list[float], float]:
        """Return coefficients and intercept for known parents in standard units."""
        slopes = [float(b) * width.get(p, 1.0) for p, b in zip(given, coefficients, strict=True)]
        return slopes, intercept + sum(
            b * centre.get(p, 0.0) for p, b in zip(given, coefficients, strict=True)
        )

    def put(
        flow: Any, kept: list[int] | None, of: Callable[[Any], tuple[Sequence[Any], Any, float, float]]
    ) -> None:
        place = {column: i for i, column in enumerate(range(flow.context_dim) if kept is None else kept)}
        weights = torch.zeros(flow.event_dim, flow.context_dim + flow.event_dim, dtype=torch.float64)
        shift, scale = torch.zeros(2, flow.event_dim, dtype=torch.float64)
        for node, part in vae.latents.items():
            given, coefficients, intercept, sd = of(node)
            slopes, shift[part.start] = in_units(given, coefficients, intercept)
            scale[part.start] = sd
            for parent, slope in zip(given, slopes, strict=True):
                latent = parent in vae.latents
                j = flow.context_dim + vae.latents[parent].start if latent else place[columns[parent]]
                weights[part.start, j] = slope
        device = flow.loc.device
        flow.init_linear_(weights.to(device), shift.to(device), scale.to(device))

    put(prior, vae._prior_columns, law)
    put(encoder, vae._columns, posterior)

    assert decoder.network is not None
    decoder.network.zero_output_()
    skip: Any = decoder.network.skip
    matrix, bias = (
        torch.zeros_like(skip.masked_weight(), dtype=torch.float64),
        torch.zeros(len(skip.bias)).double(),
    )
    bound = observation.log_scale_bound
    for node in graph.observed:
        slopes, intercept = in_units(*law(node)[:3])
        row, row_scale = observation.own(node)
        for parent, slope in zip(network.parents[node], slopes, strict=True):
            latent = parent in vae.latents
            j = vae.latents[parent].start if latent else vae.latent_dim + columns[parent]
            matrix[row, j] = slope / width[node]
        bias[row] = (intercept - centre[node]) / width[node]
        log_scale = math.log(network.scales[node] / width[node])
        if abs(log_scale) >= bound:
            raise GraphflowsError(
                f"Expected log-scales within {bound:g} in standard units; {node} has {log_scale:g}."
            )
        bias[row_scale] = bound * math.atanh(log_scale / bound)
    _set(skip, matrix)
    skip.bias.copy_(bias)
    observation.units_are_kept = True


def _set(layer: Any, matrix: Tensor) -> None:
    """Write a dense matrix into a masked layer of either engine."""
    rows, columns = layer.sparse_mask().indices
    layer.weight.copy_(matrix if layer.engine == "dense" else matrix[rows, columns])


def _log_density(eps: Tensor, log_diag: Tensor) -> Tensor:
    return torch.addcmul(log_diag, eps, eps, value=0.5).sum(-1).neg() - eps.shape[-1] * HALF_LOG_TWO_PI


def _ends(part: slice) -> tuple[int, int]:
    return part.start, part.stop
