"""A Graph VAE that is trained finds a latent structure that is known, and is better for it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from pyro_graphflows import GraphVAE, Progress, Schedule, TrainingData, fit

NOISE = 0.3


def chain_of_two(num_data, generator):
    """z3 -> z1, and z2 on its own; each seen through noise as one coordinate of x."""
    z2, z3, e = torch.randn(3, num_data, generator=generator)
    z = torch.stack([1.5 * torch.tanh(1.5 * z3) + 0.4 * e, z2, z3], -1)
    return z + NOISE * torch.randn(z.shape, generator=generator)


def fork_and_collider(num_data, generator):
    """z5 -> z3 <- z4 -> z2 and z3 -> z1."""
    e1, e2, e3, z4, z5 = torch.randn(5, num_data, generator=generator)
    z3 = 0.9 * (z4 + z5) + 0.4 * e3
    z2 = 1.5 * torch.tanh(1.5 * z4) + 0.4 * e2
    z1 = 1.5 * torch.tanh(1.5 * z3) + 0.4 * e1
    z = torch.stack([z1, z2, z3, z4, z5], -1)
    return z + NOISE * torch.randn(z.shape, generator=generator)


def trained(structure, x, num_epochs, **options):
    """Train with a decoder that is given, so that each node means a coordinate; freeze for the last fifth."""
    number = x.shape[1]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = GraphVAE(
        (number,),
        number,
        1,
        structure,
        likelihood=lambda outputs: dist.Normal(outputs, NOISE).to_event(1),
        encoder=nn.Sequential(nn.Linear(number, 32), nn.ELU(), nn.Linear(32, 32)),
        embedding_dim=32,
        hidden_dim=32,
        decoder=nn.Identity(),
        **options,
    )
    gates = []

    def after_epoch(history):
        vae.anneal(len(history), rate=0.05 ** (1 / num_epochs))
        if vae.is_learned and len(history) == num_epochs * 4 // 5:
            gates.append(vae.gate_probabilities)
            vae.freeze_structure()

    fit(
        vae.model,
        vae.guide,
        TrainingData(x, batch_size=100),
        loss=TraceMeanField_ELBO(),
        optimizer=1e-2,
        schedule=Schedule(num_epochs, patience=None),
        progress=Progress(bar=False, on_epoch=after_epoch),
    )
    return vae, gates


CASES = [
    pytest.param(chain_of_two, {("z3", "z1")}, 1000, 40, id="one edge of three"),
    pytest.param(
        fork_and_collider,
        {("z5", "z3"), ("z4", "z3"), ("z4", "z2"), ("z3", "z1")},
        2000,
        60,
        marks=pytest.mark.slow,
        id="four edges of ten",
    ),
]


@pytest.mark.parametrize(("draw", "edges", "num_data", "num_epochs"), CASES)
def test_known_structure_is_found_and_pays(draw, edges, num_data, num_epochs):
    generator = torch.Generator().manual_seed(1)
    x, test = draw(num_data, generator), draw(400, generator)
    learned, (gates,) = trained("learned", x, num_epochs, edge_cost=0.03)
    found = {edge for edge in learned.learned_graph().edges if edge[1] != "x"}
    assert found == edges, gates
    # the decision is not a close one, nor was it there at the start
    is_edge = torch.tensor([[(a, b) in edges for a in learned.names] for b in learned.names])
    assert gates[is_edge].min() > 0.7
    assert gates[~is_edge].max() < 0.45
    independent, _ = trained("independent", x, num_epochs)
    gain = learned.log_evidence(test, 300).log_evidence - independent.log_evidence(test, 300).log_evidence
    assert gain.mean() > 4.5 * gain.std() / len(gain) ** 0.5
