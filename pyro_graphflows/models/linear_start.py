"""Put a linear-Gaussian network into a SIReN-VAE: the model is then that network, the encoder its exact posterior."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork
from pyro_graphflows.transforms.faithful_nn import FaithfulResidualNN

if TYPE_CHECKING:
    from pyro_graphflows.models.siren_vae import SIReNVAE

__all__ = ["put_linear_gaussian_"]


@torch.no_grad()
def put_linear_gaussian_(vae: "SIReNVAE", network: LinearGaussianNetwork) -> None:
    """Set all parameters so that the model is a linear-Gaussian network and the encoder its posterior.

    Every importance weight of a datum then equals its exact evidence. Hidden units get zero output and stay trainable:
    this is also a start from a network that is known approximately.

    Args:
        vae: A model with the faithful flow over scalar normal nodes; its standardisation is kept.
        network: A network whose nodes are those of the model's graph, and whose parents are among the graph's.

    Raises:
        GraphflowsError: If the nodes differ, or a parent in the network is none in the graph.
        UnsupportedModelError: If the flow is the graphical one, a node is a vector or not normal, or a decoder or
            encoder module was given.
    """
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
