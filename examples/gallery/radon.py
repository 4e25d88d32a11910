"""Radon in Minnesota: an intercept for each of 85 counties.

Gelman and Hill (2007), Data Analysis Using Regression and Multilevel Models, Chapter 12; the data and reference
means are radon_mn of posteriordb (BSD-3-Clause, see tutorials/data/README.md). Counties with few houses are drawn
to the mean.

    python examples/gallery/radon.py
"""

import argparse
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, compare, figure, save

DATA = Path(__file__).parents[2] / "tutorials" / "data" / "radon.npz"


def model(county, floor, log_radon=None):
    """Houses in counties; weakly informative priors."""
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("counties", 85):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
    with pyro.plate("houses", len(county)):
        mean = alpha[..., county] + beta * floor
        return pyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=log_radon)


def main(args):
    """Compare the guides, also with the reference means; draw the counties."""
    data = np.load(DATA)
    county = torch.tensor(data["county"]).long()
    floor, radon = (
        torch.tensor(data[name], dtype=torch.get_default_dtype()) for name in ("floor", "log_radon")
    )
    posteriors = compare(args, model, (county, floor, radon))
    names = ("mu_alpha", "beta", "sigma_alpha", "sigma_y")
    print(f"{'means, and reference (NUTS)':<30}" + "".join(f"{name:>13}" for name in names))
    for name, posterior in posteriors.items():
        print(f"{name:<30}" + "".join(f"{float(posterior.draws[site].mean()):>13.3f}" for site in names))
    print(f"{'reference':<30}" + "".join(f"{value:>13.3f}" for value in data["reference_mean"]))
    counts = torch.bincount(county, minlength=85)
    alpha = posteriors["faithful"].draws["alpha"]
    made, (ax,) = figure(size=(6.4, 3.4))
    ax.errorbar(counts, alpha.mean(0), 2 * alpha.std(0), fmt="o", markersize=3, linewidth=0.8)
    ax.axhline(data["reference_mean"][0], color="0.5", linestyle="--", linewidth=1)
    ax.set(xscale="log", xlabel="houses in the county", ylabel="intercept of the county, ± 2 sd")
    save(made, args)


if __name__ == "__main__":
    main(add_flags(argparse.ArgumentParser(description=__doc__.split("\n")[0]), 1000, "radon").parse_args())
