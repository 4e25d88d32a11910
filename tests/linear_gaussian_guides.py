"""Exact linear-Gaussian conditionals for guides, computed from the joint covariance."""

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
