"""SIReN-VAEs with a linear-Gaussian network in them, whose evidence is known."""

import torch

from pyro_graphflows import (
    LinearGaussianNetwork,
    ModelGraph,
)
from pyro_graphflows.models import SIReNVAE

GRAPHS = {
    "chain": ModelGraph([("a", "b"), ("b", "x")], ["x"]),
    "collider": ModelGraph([("a", "x"), ("b", "x"), ("a", "y")], ["x", "y"]),
    "observed parents of observed": ModelGraph([("a", "x"), ("x", "y"), ("a", "y"), ("b", "y")], ["x", "y"]),
    "observed parent of latent": ModelGraph([("x", "b"), ("a", "x"), ("a", "b"), ("b", "y")], ["x", "y"]),
    "inputs": ModelGraph([("w", "a"), ("a", "x"), ("w", "x"), ("a", "y")], ["x", "y"], inputs=["w"]),
    "barren latent": ModelGraph([("a", "x"), ("a", "b")], ["x"]),
}
CHAIN = GRAPHS["chain"]


def exact_vae(graph, seed=1):
    """A model with a random linear-Gaussian network in it, data, inputs, and the exact evidence."""
    network = LinearGaussianNetwork.random(graph, seed)
    known = [*graph.observed, *graph.inputs]
    data = torch.tensor(network.sample(40, 2, known))
    vae = SIReNVAE(graph)
    x, inputs = data[:, : len(graph.observed)], data[:, len(graph.observed) :] if graph.inputs else None
    vae.standardize_(x, inputs)
    vae.put_linear_gaussian_(network)
    order = [known.index(name) for name in network.observed]
    exact = torch.tensor(network.log_evidence(data[:, order].numpy()))
    if graph.inputs:
        alone = network.with_observed(graph.inputs)
        exact -= torch.tensor(alone.log_evidence(data[:, len(graph.observed) :].numpy()))
    return network, vae, x, inputs, exact
