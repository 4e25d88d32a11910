"""Probabilistic principal components of digits: a linear-Gaussian model whose posterior is known.

Tipping and Bishop (1999), Probabilistic principal component analysis, JRSS B 61. scikit-learn's digits (extra
[datasets]); loadings are set to the exact maximum-likelihood ones, so that the log-evidence is known, and the guide
is exact before training.

    python examples/gallery/probabilistic_pca.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, compare, figure, save

from pyro_graphflows.datasets import digits


def main(args):
    """Compare the guides with the exact evidence; draw the first two components."""
    images = digits()
    labels = torch.as_tensor(images.train_labels)[: args.num_data]
    x = torch.as_tensor(images.train).flatten(1)[: args.num_data].to(torch.get_default_dtype())
    x = x / x.abs().max()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((x - mean).T))
    noise = values[: -args.components].mean()
    loadings = vectors[:, -args.components :] * (values[-args.components :] - noise).sqrt()

    def model(x):
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(args.components), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(mean + z @ loadings.T, noise.sqrt()).to_event(1), obs=x)

    covariance = loadings @ loadings.T + noise * torch.eye(x.shape[1])
    exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x).sum()
    posteriors = compare(args, model, (x,), lr=1e-3, others=args.num_data <= 50)
    print(f"exact log-evidence: {float(exact):.2f}")
    z = posteriors["faithful"].draws["z"].mean(0)
    made, (ax,) = figure(size=(4.6, 4.0))
    points = ax.scatter(z[:, -1], z[:, -2], c=labels, cmap="tab10", s=6)
    made.colorbar(points, label="digit")
    ax.set(xlabel="first component", ylabel="second component")
    save(made, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-data", type=int, default=300)
    parser.add_argument("--components", type=int, default=8)
    main(add_flags(parser, 300, "probabilistic_pca").parse_args())
