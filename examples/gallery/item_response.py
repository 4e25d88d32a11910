"""Item response: how able persons are, and how hard and telling questions are.

The two-parameter logistic model of Birnbaum (1968), in Lord and Novick, Statistical Theories of Mental Test Scores.
The data are simulated: answers of persons to items. Persons are amortised over their answers, items have parameters
of their own.

    python examples/gallery/item_response.py
"""

import argparse

import pyro
import pyro.distributions as dist
from compare_guides import add_flags, compare, figure, save


def model(persons, items, y=None):
    """A logistic regression whose covariates and coefficients are both latent."""
    with pyro.plate("items", items, dim=-2):
        telling = pyro.sample("telling", dist.LogNormal(0.0, 0.5))
        hard = pyro.sample("hard", dist.Normal(0.0, 1.0))
    with pyro.plate("persons", persons, dim=-1):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("answers", items, dim=-2):
            return pyro.sample("y", dist.Bernoulli(logits=telling * (ability - hard)), obs=y)


def main(args):
    """Compare the guides; draw what is found against what is true."""
    pyro.set_rng_seed(args.seed + 1)
    trace = pyro.poutine.trace(model).get_trace(args.persons, args.items)
    truth = {name: trace.nodes[name]["value"].flatten() for name in ("ability", "hard", "telling")}
    posteriors = compare(args, model, (args.persons, args.items, trace.nodes["y"]["value"]))
    made, axes = figure(3)
    for ax, (name, true) in zip(axes, truth.items(), strict=True):
        found = posteriors["faithful"].draws[name].flatten(1)
        ax.errorbar(true, found.mean(0), 2 * found.std(0), fmt="o", markersize=2, linewidth=0.6, alpha=0.6)
        ax.axline((float(true.mean()), float(true.mean())), slope=1.0, color="0.5", linewidth=0.8)
        ax.set(xlabel=f"true {name}", ylabel="posterior mean ± 2 sd")
    save(made, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--persons", type=int, default=60)
    parser.add_argument("--items", type=int, default=20)
    main(add_flags(parser, 1000, "item_response").parse_args())
