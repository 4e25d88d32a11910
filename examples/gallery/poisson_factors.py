"""A Poisson factor model: counts whose rates are products of positive factors.

Gopalan, Hofman and Blei (2015), Scalable recommendation with hierarchical Poisson factorization, in one level.
Users have positive tastes for a few topics, items positive shares of them; what is seen are counts, simulated.
Users are amortised over their counts.

    python examples/gallery/poisson_factors.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, compare, figure, save


def model(users, items, topics, counts=None):
    """Counts of users and items."""
    with pyro.plate("items", items):
        share = pyro.sample("share", dist.Gamma(0.5 * torch.ones(topics), 1.0).to_event(1))
    with pyro.plate("users", users):
        taste = pyro.sample("taste", dist.Gamma(1.0 * torch.ones(topics), 1.0).to_event(1))
        rate = 0.05 + taste @ share.transpose(-1, -2)
        return pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=counts)


def main(args):
    """Compare the guides; draw rates against counts."""
    pyro.set_rng_seed(args.seed + 1)
    counts = model(args.users, args.items, 2)
    posteriors = compare(args, model, (args.users, args.items, 2, counts), particles=1)
    made, axes = figure(len(posteriors))
    for ax, (name, posterior) in zip(axes, posteriors.items(), strict=True):
        rates = 0.05 + torch.einsum("sut,sit->ui", posterior.draws["taste"], posterior.draws["share"]) / len(
            posterior
        )
        ax.plot(
            counts.flatten() + 0.3 * torch.rand(counts.numel()), rates.flatten(), ".", markersize=2, alpha=0.5
        )
        ax.set(title=name, xlabel="count (jittered)", ylabel="posterior mean of its rate")
    save(made, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=60)
    parser.add_argument("--items", type=int, default=15)
    main(add_flags(parser, 1000, "poisson_factors").parse_args())
