"""Small linear-Gaussian networks, and guides set to their exact conditionals, from the joint covariance."""

import numpy as np

from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork


def conditional(network: LinearGaussianNetwork, name, given):
    """Return (weights, intercept, scale) of the regression of a node on given nodes in the joint."""
    mean, covariance = network.mean_and_covariance()
    index = {n: i for i, n in enumerate(network.names)}
    g, v = [index[n] for n in given], index[name]
    weights = np.linalg.solve(covariance[np.ix_(g, g)], covariance[g, v]) if g else np.zeros(0)
    intercept = mean[v] - weights @ mean[g]
    scale = np.sqrt(covariance[v, v] - weights @ covariance[g, v])
    return weights, intercept, scale


def set_exact_(guide, network):
    """Set every factor of a normal guide to the exact conditional given its parents in the inverse."""
    for site, parents in guide.inverse.parents.items():
        weights, intercept, scale = conditional(network, site, parents)
        guide.set_linear_(
            site, dict(zip(parents, map(float, weights), strict=True)), float(intercept), float(scale)
        )
    return guide


def chain():
    return LinearGaussianNetwork(
        {"a": [], "b": ["a"], "c": ["b"], "x": ["c"]},
        {"a": [], "b": [0.8], "c": [-1.3], "x": [0.7]},
        {"a": 0.3, "b": -0.5, "c": 0.0, "x": 1.0},
        {"a": 1.0, "b": 0.6, "c": 0.9, "x": 0.5},
    )


def collider():
    return LinearGaussianNetwork(
        {"a": [], "b": [], "x": ["a", "b"]},
        {"a": [], "b": [], "x": [1.0, -0.6]},
        {"a": 0.0, "b": 2.0, "x": 0.1},
        {"a": 1.0, "b": 0.7, "x": 0.4},
    )


def four_cycle():
    """A ring of latents whose edges are observed pairwise; moralisation needs a fill-in edge."""
    ring = ["a", "b", "c", "d"]
    pairs = [(ring[i], ring[(i + 1) % 4]) for i in range(4)]
    parents = {name: [] for name in ring} | {f"x_{u}{v}": [u, v] for u, v in pairs}
    return LinearGaussianNetwork(
        parents,
        {name: [] if not p else [1.0, 0.8] for name, p in parents.items()},
        dict.fromkeys(parents, 0.2),
        {name: 1.0 if not p else 0.5 for name, p in parents.items()},
    )
