"""Regressions with a horseshoe prior: set-up, the start, and where ten seconds of training lead.

    python -m benchmarks.sparse_regressions [--models normal yes-or-no counts] [--columns 30] [--rows 120] [--seed 0]

Three of thirty coefficients are not zero; their scales have half-Cauchy priors, each its own and one that all share.
Data are normal with an unknown scale, yes or no, or counts. What is printed, and how guides are trained, is as in
:mod:`benchmarks.many_numbers`. Beside the default guide Pyro's ``AutoNormal`` and ``AutoMultivariateNormal``.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from benchmarks.many_numbers import Problem, compare
from pyro_graphflows import auto_faithful_guide

DATA = ("normal", "yes-or-no", "counts")
GUIDES = {
    "default": auto_faithful_guide,
    "AutoNormal": lambda model, *args: AutoNormal(model),
    "AutoMultivariateNormal": lambda model, *args: AutoMultivariateNormal(model),
}


def sparse(kind: str, rows: int, columns: int) -> Problem:
    """Return a model and its data, of which three columns matter."""
    x = torch.randn(rows, columns)
    coefficients = torch.zeros(columns)
    coefficients[:3] = torch.tensor([2.0, -1.5, 1.0]) * (0.5 if kind == "counts" else 1.0)
    of_rows = x @ coefficients
    draws = {
        "normal": lambda: of_rows + torch.randn(rows),
        "yes-or-no": lambda: torch.bernoulli(of_rows.sigmoid()),
        "counts": lambda: torch.poisson((0.3 + of_rows).exp()),
    }

    def model(x: Tensor, y: Tensor) -> None:
        shared = pyro.sample("shared", dist.HalfCauchy(1.0))
        level = pyro.sample("level", dist.Normal(0.0, 3.0))
        noise = pyro.sample("noise", dist.HalfNormal(2.0)) if kind == "normal" else None
        with pyro.plate("columns", columns):
            width = pyro.sample("width", dist.HalfCauchy(1.0))
            coefficient = pyro.sample("coefficient", dist.Normal(0.0, width * shared))
        loc = level + x @ coefficient
        with pyro.plate("rows", len(x)):
            if kind == "normal":
                pyro.sample("y", dist.Normal(loc, noise), obs=y)
            elif kind == "counts":
                pyro.sample("y", dist.Poisson(loc.exp()), obs=y)
            else:
                pyro.sample("y", dist.Bernoulli(logits=loc), obs=y)

    return model, (x, draws[kind]())


def main() -> None:
    """Print a line for each model and guide."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", default=list(DATA), choices=DATA)
    parser.add_argument("--columns", type=int, default=30)
    parser.add_argument("--rows", type=int, default=120)
    compare(parser, lambda kind, args: sparse(kind, args.rows, args.columns), GUIDES)


if __name__ == "__main__":
    main()
