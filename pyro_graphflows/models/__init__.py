"""Ready-made Pyro models."""

from pyro_graphflows.models import textbook
from pyro_graphflows.models.graph_vae import GraphVAE
from pyro_graphflows.models.latent_model import LatentModel, VAEObjective
from pyro_graphflows.models.siren_vae import SIReNVAE, variant_graph
from pyro_graphflows.models.vae import VAE

__all__ = ["VAE", "GraphVAE", "LatentModel", "SIReNVAE", "VAEObjective", "textbook", "variant_graph"]
