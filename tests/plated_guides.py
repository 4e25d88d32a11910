"""Models with plates whose guides can be set to the exact posterior, and how."""

import math

import pyro
import pyro.distributions as dist
import torch


def network_of(guide, site):
    """Return the network that serves a site."""
    return guide.blocks[
        next(i for i, block in enumerate(guide.plan.blocks) if site in block.sites)
    ].conditionals


def add_rows_(guide, site, locs, scales=None):
    """Add to the location, and multiply the scale, of each element of a site's plates by its per-element parameters."""
    network = network_of(guide, site)
    width = network.output_units(site)[1]
    first = network._table_columns[site].start
    with torch.no_grad():
        table = network.table.table
        table.zero_()
        table[..., first] = (locs / width).reshape(table.shape[:-1])
        if scales is not None:
            table[..., first + 1] = scales.log().reshape(table.shape[:-1])


def hierarchical(x):
    """One global mean, one latent variable for each datum."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def exact_hierarchical(x):
    """Return posterior mean and scale of mu, and the evidence."""
    n = len(x)
    covariance = 4.0 * torch.ones(n, n) + 1.25 * torch.eye(n)
    evidence = dist.MultivariateNormal(torch.zeros(n), covariance).log_prob(x).item()
    precision = 1 / 4.0 + n / 1.25
    return (x.sum() / 1.25) / precision, precision**-0.5, evidence


def set_hierarchical_(guide, x):
    mean, scale, evidence = exact_hierarchical(x)
    guide.set_linear_("mu", {}, float(mean), float(scale))
    guide.set_linear_("z", {"mu": 0.2, "x": 0.8}, 0.0, math.sqrt(0.2))
    return evidence


def varying(index, y):
    """Group effects looked up by an index: theta in its own plate, no local latents."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta[..., index], 1.0), obs=y)


def set_joint_(guide, site, mean, covariance):
    """Make a site with per-element parameters and a free chain the given normal, whatever its inputs are."""
    guide.set_linear_(site, {}, 0.0, 1.0)
    index = next(i for i, block in enumerate(guide.plan.blocks) if site in block.sites)
    network = guide.blocks[index].conditionals
    width = network.output_units(site)[1]
    scale = torch.linalg.cholesky(covariance)
    with torch.no_grad():
        first = network._table_columns[site].start
        table = network.table.table
        table[..., first] = (mean / width).reshape(table.shape[:-1])
        table[..., first + 1] = scale.diagonal().log().reshape(table.shape[:-1])
    network.couplings[network._coupling_of[site]].set_mixing_(scale / scale.diagonal().unsqueeze(-1))
