"""Pyro models in which data look up the effects of their groups by an index."""

import pyro
import pyro.distributions as dist
import torch

N = dist.Normal
GROUP = torch.tensor([0, 4, 1, 2, 2, 3, 0])
DISTRICT = torch.tensor([0, 1, 1, 0, 0])


def slopes(group, w, y):
    mu = pyro.sample("mu", N(0.0, 1.0))
    with pyro.plate("groups", 5):
        a = pyro.sample("a", N(mu, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", N(a[..., group] + b[..., group] * w, 1.0), obs=y)


def two_groups(one, two, y):
    with pyro.plate("groups", 5):
        a = pyro.sample("a", N(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", N(a[one] + a[two], 1.0), obs=y)


def latent_groups(y):
    with pyro.plate("components", 4):
        a = pyro.sample("a", N(0.0, 1.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4), infer={"enumerate": "parallel"})
        pyro.sample("y", N(a[k], 1.0), obs=y)


def districts(school, district, y):
    with pyro.plate("districts", 2):
        d = pyro.sample("d", N(0.0, 1.0))
    with pyro.plate("schools", 5):
        s = pyro.sample("s", N(d[district], 1.0))
    with pyro.plate("pupils", len(y)):
        pyro.sample("y", N(s[school], 1.0), obs=y)


def crossed(i, j, y):
    with pyro.plate("rows", 4):
        a = pyro.sample("a", N(0.0, 1.0))
    with pyro.plate("columns", 3):
        b = pyro.sample("b", N(0.0, 0.7))
    with pyro.plate("data", len(y)):
        pyro.sample("y", N(a[..., i] + b[..., j], 0.6), obs=y)


def members(group, x):
    """A latent variable for each datum below the effect of its group."""
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", N(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(theta[..., group], 0.5))
        pyro.sample("x", N(z, 0.6), obs=x)
