"""Eight schools: the smallest hierarchy that is hard.

Rubin (1981), Estimation in parallel randomized experiments; the model of Gelman et al. (2013), Bayesian Data
Analysis, Section 5.5: effects of coaching in eight schools, with their standard errors. The spread tau of the
schools may be near zero, where the effects lie close together: a funnel, which a normal distribution over all
parameters cannot follow.

    python examples/gallery/eight_schools.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, compare, figure, save

EFFECT = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
ERROR = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


def model(sigma, y=None):
    """Schools around a mean, with a spread that has a half-Cauchy prior."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def main(args):
    """Compare the guides; draw effects against the spread."""
    arguments = (torch.tensor(ERROR), torch.tensor(EFFECT))
    posteriors = compare(args, model, arguments)
    made, axes = figure(len(posteriors))
    for ax, (name, posterior) in zip(axes, posteriors.items(), strict=True):
        ax.plot(posterior.draws["tau"], posterior.draws["theta"][:, 0], ".", markersize=2, alpha=0.4)
        ax.set(title=name, xlabel="spread tau", ylabel="effect of school A")
        ax.set(xscale="log", xlim=(0.05, 60), ylim=(-30, 60))
    save(made, args)


if __name__ == "__main__":
    main(
        add_flags(
            argparse.ArgumentParser(description=__doc__.split("\n")[0]), 1000, "eight_schools"
        ).parse_args()
    )
