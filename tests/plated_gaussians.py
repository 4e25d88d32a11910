"""A generator of plated linear-Gaussian models of many kinds, with their evidence."""

import functools
import random

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

KINDS = ("groups", "nested", "crossed", "looked up", "coupled", "chain")


class _Noise(Messenger):
    """Give every site location + scale * noise, with the noise of one vector, site after site."""

    def __init__(self, noise):
        super().__init__()
        self.noise, self.used = noise, 0

    def _pyro_sample(self, msg):
        if type(msg["fn"]).__name__ == "_Subsample":
            return
        size = msg["fn"].shape().numel()
        part = self.noise[self.used : self.used + size].reshape(msg["fn"].shape())
        self.used += size
        base = msg["fn"]
        while not isinstance(base, dist.Normal):
            base = base.base_dist
        msg["value"], msg["done"] = base.loc + base.scale * part, True


def draw_and_evidence(model, covariates, shape):
    """Return data drawn from a model called as ``model(*covariates, y)``, and their log evidence."""

    def run(noise):
        messenger = _Noise(noise)
        with poutine.block(), messenger:
            nodes = poutine.trace(model).get_trace(*covariates, torch.zeros(shape)).nodes
        names = [name for name in nodes if name.startswith("y")]
        return torch.cat([nodes[name]["value"].reshape(-1) for name in names]).double(), messenger.used

    _, size = run(torch.zeros(10_000))
    mean, _ = run(torch.zeros(size))
    columns = torch.stack([run(row)[0] - mean for row in torch.eye(size)], -1)
    joint = dist.MultivariateNormal(mean, columns @ columns.T)
    y = joint.sample()
    return y.to(torch.get_default_dtype()).reshape(shape), float(joint.log_prob(y))


def random_model(seed):
    """Return kind, model, its arguments, options of a guide, and the log evidence."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind = KINDS[seed % len(KINDS)]
    wide, sd = rng.choice([1.0, 3.0, 30.0]), functools.partial(rng.uniform, 0.3, 2.0)
    a, b, c, d = sd(), sd(), sd(), sd()
    n, m = rng.randint(3, 7), rng.randint(2, 5)
    with_slope, two_locals = rng.random() < 0.5, rng.random() < 0.5
    options = {"pool": "deepset"}
    covariates = ()
    shape = (m, n)

    if kind == "groups":
        covariates = (torch.randn(m, n),)

        def model(x, y):
            mu = pyro.sample("mu", dist.Normal(0.0, wide))
            slope = pyro.sample("slope", dist.Normal(mu, b)) if with_slope else 0.0
            with pyro.plate("groups", y.shape[-1], dim=-1):
                theta = pyro.sample("theta", dist.Normal(mu, a))
                if two_locals:
                    theta = pyro.sample("phi", dist.Normal(c * theta, b))
                with pyro.plate("data", y.shape[-2], dim=-2):
                    pyro.sample("y", dist.Normal(theta + slope * x, d), obs=y)

    elif kind == "nested":

        def model(y):
            mu = pyro.sample("mu", dist.Normal(1.0, wide))
            with pyro.plate("groups", y.shape[-1], dim=-1):
                theta = pyro.sample("theta", dist.Normal(mu, a))
                with pyro.plate("data", y.shape[-2], dim=-2):
                    z = pyro.sample("z", dist.Normal(theta, b))
                    pyro.sample("y", dist.Normal(c * z, d), obs=y)

    elif kind == "crossed":
        n, m = min(n, 5), min(m, 4)
        shape = (m, n)

        def model(y):
            rows, columns = pyro.plate("rows", y.shape[0], dim=-2), pyro.plate("columns", y.shape[1], dim=-1)
            mu = pyro.sample("mu", dist.Normal(0.0, wide)) if with_slope else 0.0
            with rows:
                u = pyro.sample("u", dist.Normal(mu, a))
            with columns:
                v = pyro.sample("v", dist.Normal(0.0, b))
            with rows, columns:
                pyro.sample("y", dist.Normal(u + v, d), obs=y)

    elif kind == "looked up":
        index = torch.cat([torch.arange(m), torch.randint(0, m, (2 * n,))])
        covariates, shape = (index,), (len(index),)

        def model(index, y):
            mu = pyro.sample("mu", dist.Normal(0.0, wide))
            with pyro.plate("groups", m):
                theta = pyro.sample("theta", dist.Normal(mu, a))
            with pyro.plate("data", len(index)):
                loc = theta[..., index]
                if two_locals:
                    loc = pyro.sample("z", dist.Normal(loc, b))
                pyro.sample("y", dist.Normal(loc, d), obs=y)

    elif kind == "coupled":
        shape = (n + 1,)
        options = {} if two_locals else {"pool": "deepset"}

        def model(y):
            with pyro.plate("data", n):
                z = pyro.sample("z", dist.Normal(0.0, wide))
                pyro.sample("y", dist.Normal(z, a), obs=y[:n])
            pyro.sample("y_total", dist.Normal(z.sum(-1, keepdim=z.dim() > 1), b), obs=y[n])

    else:
        options = {}

        def model(y):
            with pyro.plate("data", n):
                z = pyro.sample("z0", dist.Normal(0.0, wide))
                for k in range(1, m + 1):
                    z = pyro.sample(f"z{k}", dist.Normal(c * z, a))
                    pyro.sample(f"y{k}", dist.Normal(z, d), obs=y[k - 1])

    y, evidence = draw_and_evidence(model, covariates, shape)
    return kind, model, (*covariates, y), options, evidence
