"""The plain VAE against an exact answer."""

import math

import pyro.distributions as dist
import torch

from pyro_graphflows import (
    ModelGraph,
    log_evidence,
)
from pyro_graphflows.models import VAE


def test_plain_vae_is_exact_for_a_factor_model():
    """One latent, one observed node, no hidden output: x = z + noise has a normal posterior."""
    graph = ModelGraph([("z1", "x")], ["x"])
    vae = VAE(graph, hidden_dim=2)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        # ELU units far above zero are the identity.
        vae.decoder[0].weight[0], vae.decoder[0].bias[0] = 1.0, 50.0
        vae.decoder[2].weight[0, 0], vae.decoder[2].bias[0] = 1.0, -50.0
        vae.encoder[0].weight[0], vae.encoder[0].bias[0] = 1.0, 50.0
        vae.encoder[2].weight[0, 0], vae.encoder[2].bias[0] = 0.5, -25.0
        bound = vae.observation.log_scale_bound
        vae.encoder[2].bias[1] = bound * math.atanh(-0.5 * math.log(2) / bound)
    x = torch.tensor([[-2.0], [0.0], [1.0]])
    exact = dist.Normal(0, 2**0.5).log_prob(x[:, 0])
    torch.testing.assert_close(vae.elbo(x), exact)
    torch.testing.assert_close(log_evidence(vae.model, vae.guide, x, num_particles=3).log_evidence, exact)
