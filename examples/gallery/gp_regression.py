"""A Gaussian process with unknown kernel parameters.

Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, Chapter 5. The latent function is whitened,
f = L eps; length, size and noise are latent. With the function integrated out the evidence is a three-dimensional
integral, by which the guides are judged.

    python examples/gallery/gp_regression.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, compare, figure, save


def kernel(x, length, size):
    """Squared exponential, with jitter."""
    gap = (x[:, None] - x) / length[..., None, None]
    return (size[..., None, None] * (-0.5 * gap.square()).exp()) + 1e-4 * torch.eye(len(x))


def model(x, y=None):
    """A whitened process, seen with noise."""
    length = pyro.sample("length", dist.LogNormal(-1.0, 0.7))
    size = pyro.sample("size", dist.LogNormal(0.0, 0.7))
    noise = pyro.sample("noise", dist.LogNormal(-1.5, 0.7))
    eps = pyro.sample("eps", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    f = (torch.linalg.cholesky(kernel(x, length, size)) @ eps[..., None])[..., 0]
    f = pyro.deterministic("f", f, event_dim=1)
    return pyro.sample("y", dist.Normal(f, noise[..., None]).to_event(1), obs=y)


def log_evidence(x, y, num=20_000):
    """Return the log-evidence by draws of the three parameters from their prior, with the function integrated out."""
    length, size, noise = (
        torch.distributions.LogNormal(loc, 0.7).sample((num,)) for loc in (-1.0, 0.0, -1.5)
    )
    covariance = kernel(x, length, size) + noise[:, None, None].square() * torch.eye(len(x))
    terms = torch.distributions.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(y)
    return terms.logsumexp(0) - torch.tensor(float(num)).log()


def main(args):
    """Compare the guides; draw the function."""
    pyro.set_rng_seed(args.seed + 1)
    x = torch.linspace(0.0, 1.0, 20)
    y = (8 * x).sin() + 0.2 * torch.randn(20)
    posteriors = compare(args, model, (x, y), num_start_samples=2000)
    print(f"log-evidence by simulation of the kernel's parameters: {float(log_evidence(x, y)):.2f}")
    made, axes = figure(len(posteriors))
    for ax, (name, posterior) in zip(axes, posteriors.items(), strict=True):
        ax.plot(x, posterior.draws["f"][:80].T, color="C0", linewidth=0.4, alpha=0.4)
        ax.plot(x, y, "k.", markersize=4)
        ax.set(title=name, xlabel="x", ylabel="f and data")
    save(made, args)


if __name__ == "__main__":
    main(
        add_flags(
            argparse.ArgumentParser(description=__doc__.split("\n")[0]), 1000, "gp_regression"
        ).parse_args()
    )
