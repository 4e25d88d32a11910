"""Seeds: a logistic regression whose plates differ by more than their covariates.

Crowder (1978), Beta-binomial anova for proportions, Applied Statistics 27: germinated seeds on 21 plates, of two
species, on two extracts. A random effect for each plate takes up what the covariates leave.

    python examples/gallery/hierarchical_logistic.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, compare, figure, save

GERMINATED = [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3]
SEEDS = [39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7]
SPECIES, EXTRACT = [0] * 11 + [1] * 10, [0] * 5 + [1] * 6 + [0] * 5 + [1] * 5


def model(seeds, species, extract, germinated=None):
    """Effects of species, extract and both, and one of each plate."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    of_species = pyro.sample("of_species", dist.Normal(0.0, 2.0))
    of_extract = pyro.sample("of_extract", dist.Normal(0.0, 2.0))
    of_both = pyro.sample("of_both", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("plates", len(seeds)):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
        logits = (
            intercept + of_species * species + of_extract * extract + of_both * species * extract + effect
        )
        return pyro.sample("germinated", dist.Binomial(seeds, logits=logits), obs=germinated)


def main(args):
    """Compare the guides; draw the share that germinates by group."""
    arguments = tuple(map(torch.tensor, (SEEDS, SPECIES, EXTRACT, GERMINATED)))
    arguments = tuple(value.to(torch.get_default_dtype()) for value in arguments)
    posteriors = compare(args, model, arguments)
    draws = posteriors["faithful"].draws
    made, (ax,) = figure()
    for s in (0, 1):
        for e in (0, 1):
            logits = (
                draws["intercept"]
                + s * draws["of_species"]
                + e * draws["of_extract"]
                + s * e * draws["of_both"]
            )
            ax.hist(logits.sigmoid(), 40, density=True, histtype="step", label=f"species {s}, extract {e}")
    ax.set(xlabel="share that germinates, on a typical plate", ylabel="density")
    ax.legend(frameon=False, fontsize=7)
    save(made, args)


if __name__ == "__main__":
    main(
        add_flags(
            argparse.ArgumentParser(description=__doc__.split("\n")[0]), 1000, "hierarchical_logistic"
        ).parse_args()
    )
