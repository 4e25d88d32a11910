"""The masked decoder: what it sees, and modules of the user in it."""

import math

import pytest
import torch
from torch import nn

from pyro_graphflows import (
    GraphflowsError,
    ModelGraph,
    log_evidence,
)
from pyro_graphflows.models import SIReNVAE
from tests.linear_gaussian_vaes import GRAPHS


def test_decoder_sees_parents_only():
    vae = SIReNVAE(GRAPHS["observed parents of observed"])
    for parameter in vae.decoder.parameters():  # log-scales start without parents
        nn.init.normal_(parameter)
    z, features = torch.randn(2), torch.randn(2)
    by_z, by_features = torch.autograd.functional.jacobian(vae.decode, (z, features))
    for node, allowed in {"x": (["a"], []), "y": (["a", "b"], ["x"])}.items():
        rows = vae.observation.own(node)
        for latent, part in vae.latents.items():
            assert bool((by_z[rows][:, part] != 0).all()) == (latent in allowed[0])
            assert latent in allowed[0] or not by_z[rows][:, part].any()
        for known, part in vae.observation.features.items():
            assert bool((by_features[rows][:, part] != 0).all()) == (known in allowed[1])


def test_vector_leaf_with_modules():
    graph = ModelGraph(
        [("a", "b"), ("b", "image"), ("a", "label")], ["image", "label"], event_sizes={"image": 12}
    )
    shapes = []

    class Decoder(nn.Linear):
        def forward(self, x):
            shapes.append(x.shape)
            return super().forward(x)

    vae = SIReNVAE(
        graph,
        likelihood={"image": "bernoulli", "label": ("categorical", 3)},
        decoder={"image": Decoder(1, 12)},
        encoder={"image": nn.Sequential(nn.Linear(12, 5), nn.Tanh())},
    )
    x = torch.cat([torch.randint(2, (20, 12)), torch.randint(3, (20, 1))], 1).double()
    assert vae.elbo(x).shape == (20,)
    assert shapes == [(20, 1)]  # b alone
    assert vae.encoder_network.context_dim == 5 + 3
    vae.elbo(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in vae.decoder.modules_by_node.parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in vae.feature_modules.parameters())
    assert vae.model(num_samples=4).shape == (4, 2)
    with pytest.raises(
        GraphflowsError, match=r"decoder of image to return 12 parameters in each of 20 rows; .* 11"
    ):
        SIReNVAE(graph, likelihood={"image": "bernoulli", "label": ("categorical", 3)},
                 decoder={"image": nn.Linear(1, 11)}).elbo(x)  # fmt: skip
    # as many parameters in all, but not those of each node
    swapped = {"image": nn.Linear(1, 11), "label": nn.Linear(1, 4)}
    with pytest.raises(GraphflowsError, match="decoder of image to return 12 parameters"):
        SIReNVAE(graph, likelihood={"image": "bernoulli", "label": ("categorical", 3)}, decoder=swapped).elbo(
            x
        )


def test_convolutions_and_batch_norm_in_modules():
    """Modules see rows with any number of particles: else convolutions fail, and batch norm takes data for channels."""
    graph = ModelGraph([("a", "b"), ("a", "image"), ("b", "image")], ["image"], event_sizes={"image": 16})
    decoder = nn.Sequential(
        nn.Linear(2, 8),
        nn.BatchNorm1d(8),
        nn.ELU(),
        nn.Unflatten(1, (2, 2, 2)),
        nn.ConvTranspose2d(2, 1, 2, 2),
        nn.Flatten(),
    )
    encoder = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 2, 2), nn.BatchNorm2d(2), nn.ELU(), nn.Flatten()
    )
    vae = SIReNVAE(graph, likelihood="bernoulli", decoder=decoder, encoder=encoder)
    assert int(encoder[2].num_batches_tracked) == 0
    x = torch.randint(2, (8, 16)).double()  # as many data as units
    assert all(math.isfinite(loss) for loss in vae.fit(x, schedule=3, progress=False).loss)
    vae.eval()
    features, eps = vae.observation.to_features(x), torch.randn(3, 8, 2)
    z, _ = vae.encode(features, eps)
    one_by_one = torch.stack([vae.decode(part, features) for part in z])
    torch.testing.assert_close(vae.decode(z, features), one_by_one)
    ours = vae.log_evidence(x, num_particles=2000).log_evidence
    by_traces = log_evidence(vae.model, vae.guide, x, num_particles=2000)
    assert ((ours - by_traces.log_evidence).abs() < 6 * by_traces.standard_error).all()
    assert vae.sample(5).shape == (5, 16)
