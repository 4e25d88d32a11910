"""The plain variational autoencoder, to compare with."""

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import ModelGraph, Node
from pyro_graphflows.models.latent_model import LatentModel
from pyro_graphflows.models.likelihood import HALF_LOG_TWO_PI, Likelihood

__all__ = ["VAE"]


class VAE(LatentModel):
    r"""The plain variational autoencoder: independent standard normal prior, factorised normal posterior, no masks.

    Of the graph only the numbers of latent and observed scalars count.

    References:
        [1] Kingma and Welling (2014), Auto-Encoding Variational Bayes.

    Args:
        graph: The model graph.
        hidden_dim: The width of the one hidden layer of encoder and decoder; by default as many units as a
            :class:`SIReNVAE` of this graph has in its decoder.
        likelihood: As in :class:`LatentModel`.
        latent_name: As in :class:`LatentModel`.

    Raises:
        GraphflowsError: If ``hidden_dim`` is not positive.

    Example:
        >>> vae = VAE(ModelGraph([("a", "x"), ("b", "x")], observed=["x"]))
        >>> vae.elbo(torch.zeros(5, 1)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        graph: ModelGraph,
        *,
        hidden_dim: int | None = None,
        likelihood: Likelihood | Mapping[Node, Likelihood] = "normal",
        latent_name: str = "z",
    ) -> None:
        super().__init__(graph, likelihood=likelihood, latent_name=latent_name)
        if hidden_dim is None:
            hidden_dim = 8 * len({graph.parents(node) for node in graph.observed})
        if hidden_dim < 1:
            raise GraphflowsError(f"Expected hidden_dim >= 1; got {hidden_dim}.")
        num_features = self.observation.num_features
        num_inputs = sum(
            self.observation.features[n].stop - self.observation.features[n].start for n in graph.inputs
        )
        self._first_input = num_features - num_inputs
        self.encoder = nn.Sequential(
            nn.Linear(num_features, hidden_dim), nn.ELU(), nn.Linear(hidden_dim, 2 * self.latent_dim)
        )
        self.decoder = nn.Sequential(
            nn.Linear(self.latent_dim + num_inputs, hidden_dim),
            nn.ELU(),
            nn.Linear(hidden_dim, self.observation.num_parameters),
        )

    def _posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.encoder(features).chunk(2, -1)
        return loc, self.observation.log_scale(raw)

    def encode(self, features: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Map noise to latent values; see :meth:`LatentModel.encode`."""
        loc, log_scale = self._posterior(features)
        log_q = -(0.5 * eps.square() + log_scale).sum(-1) - self.latent_dim * HALF_LOG_TWO_PI
        return loc + log_scale.exp() * eps, log_q

    def log_prior(self, z: Tensor, features: Tensor) -> Tensor:
        """Return the standard normal log-density."""
        return -0.5 * z.square().sum(-1) - self.latent_dim * HALF_LOG_TWO_PI

    def decode(self, z: Tensor, features: Tensor) -> Tensor:
        """Return the parameters of all observed nodes."""
        if self._first_input < features.shape[-1]:
            inputs = features[..., self._first_input :]
            z = torch.cat([z, inputs.expand(*z.shape[:-1], -1)], -1)
        return self.decoder(z)

    def draw_prior(self, eps: Tensor, features: Tensor) -> Tensor:
        """Return the noise itself."""
        return eps

    def prior(self, features: Tensor) -> dist.TorchDistribution:
        """Return the standard normal distribution."""
        zeros = features.new_zeros(self.latent_dim)
        return dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)

    def posterior(self, features: Tensor) -> dist.TorchDistribution:
        """Return the encoder's normal distribution."""
        loc, log_scale = self._posterior(features)
        return dist.Normal(loc, log_scale.exp()).to_event(1)
