"""Ready-made Pyro models."""

from pyro_graphflows.models import textbook
from pyro_graphflows.models.graph_vae import GraphVAE
from pyro_graphflows.models.latent_model import LatentModel
from pyro_graphflows.models.siren_vae import SIReNVAE
from pyro_graphflows.models.vae import VAE
from pyro_graphflows.models.vae_objective import VAEObjective
from pyro_graphflows.models.variants import variant_graph

__all__ = ["VAE", "GraphVAE", "LatentModel", "SIReNVAE", "VAEObjective", "textbook", "variant_graph"]
