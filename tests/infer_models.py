"""Small conjugate models with exact posteriors, for the tests of `pyro_graphflows.infer`."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Chain:
    """w -> z -> x with a covariate c on z, in a data plate: everything exact, by hand.

    w ~ N(0, 1), z ~ N(0.8 w + c, 0.7), x ~ N(1.5 z - 1, 0.5).
    """

    def __init__(self, plate="data", num_data=5):
        self.plate = plate
        self.x = torch.randn(num_data) * 2
        self.c = torch.randn(num_data)

    @property
    def args(self):
        return self.x, self.c

    def model(self, x=None, c=None):
        with pyro.plate(self.plate, len(c)):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(0.8 * w + c, 0.7))
            return pyro.sample("x", dist.Normal(1.5 * z - 1, 0.5), obs=x)

    def guide(self, x=None, c=None, observations=None):
        """The exact posterior, sampled z first: p(z | x, c), p(w | z, c)."""
        x = x if observations is None else observations["x"]
        z_precision = 1 / (0.64 + 0.49) + 1.5**2 / 0.25
        z_mean = (c / (0.64 + 0.49) + 1.5 * (x + 1) / 0.25) / z_precision
        with pyro.plate(self.plate, len(c)):
            z = pyro.sample("z", dist.Normal(z_mean, z_precision**-0.5))
            w_precision = 1 + 0.64 / 0.49
            pyro.sample("w", dist.Normal(0.8 * (z - c) / 0.49 / w_precision, w_precision**-0.5))

    def log_evidence(self):
        return self.evidence_of(self.x, self.c)

    @staticmethod
    def evidence_of(x, c):
        return dist.Normal(1.5 * c - 1, (2.25 * (0.64 + 0.49) + 0.25) ** 0.5).log_prob(x)


class Hierarchy:
    """mu ~ N(0, 1); for each n: z_n ~ N(mu, 1), x_n ~ N(z_n, 0.5). A global and a local latent."""

    def __init__(self, num_data=4):
        self.x = torch.randn(num_data) + 1

    def model(self, x, full_size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", full_size or len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, x, full_size=None):
        precision = 1 + len(x) / 1.25
        mu = pyro.sample("mu", dist.Normal(x.sum(-1) / 1.25 / precision, precision**-0.5))
        with pyro.plate("data", full_size or len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal((mu + 4 * x) / 5, 5**-0.5))

    def log_evidence(self, x=None):
        x = self.x if x is None else x
        covariance = torch.ones(len(x), len(x)) + 1.25 * torch.eye(len(x))
        return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x)


class LinearGuide(nn.Module):
    """z ~ N(slope x + shift, exp(log_scale)) for the model `normal_model`; a plain nn.Module."""

    def __init__(self, slope=0.3, shift=0.1, log_scale=-0.2):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.shift = nn.Parameter(torch.tensor(shift))
        self.log_scale = nn.Parameter(torch.tensor(log_scale))

    def forward(self, x=None, num_data=None, observations=None):
        pyro.module("guide", self)
        x = x if observations is None else observations["x"]
        with pyro.plate("data", x.shape[-1]):
            pyro.sample("z", dist.Normal(self.slope * x + self.shift, self.log_scale.exp()))


def normal_model(x):
    """z ~ N(0, 1), x ~ N(z, 1); p(x) = N(0, 2), p(z | x) = N(x / 2, 1 / 2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_posterior(x, observations=None):
    x = x if observations is None else observations["x"]
    with pyro.plate("data", x.shape[-1]):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def normal_evidence(x):
    return dist.Normal(0.0, 2**0.5).log_prob(x)
