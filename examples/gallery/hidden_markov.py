"""A hidden Markov model: discrete states are summed over by the model, what they emit is learned.

Rabiner (1989), A tutorial on hidden Markov models, Proceedings of the IEEE 77. Two hidden states switch rarely;
each emits around a level of its own. The levels, the stay probability and the noise are latent; the states are
enumerated by the model (TraceEnum_ELBO). The data are simulated.

    python examples/gallery/hidden_markov.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, compare, figure, save
from pyro.infer import TraceEnum_ELBO


def model(y):
    """One series; states are variables of Pyro's enumeration."""
    low = pyro.sample("low", dist.Normal(-1.0, 1.0))
    rise = pyro.sample("rise", dist.LogNormal(0.5, 0.5))
    stay = pyro.sample("stay", dist.Beta(8.0, 2.0))
    noise = pyro.sample("noise", dist.LogNormal(-0.5, 0.5))
    state = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        switch = torch.where(state == 0, 1.0 - stay, stay)
        state = pyro.sample(f"s{t}", dist.Bernoulli(switch), infer={"enumerate": "parallel"})
        pyro.sample(f"y{t}", dist.Normal(low + rise * state, noise), obs=y[t])


def main(args):
    """Compare the guides; draw the posteriors of the levels beside the data."""
    pyro.set_rng_seed(args.seed + 1)
    states = (torch.rand(args.length) < 0.1).cumsum(0) % 2
    y = -1.0 + 2.0 * states + 0.5 * torch.randn(args.length)
    posteriors = compare(
        args,
        model,
        (y,),
        loss=TraceEnum_ELBO(max_plate_nesting=0),
        hidden=[f"s{t}" for t in range(args.length)],
    )
    draws = posteriors["faithful"].draws
    made, axes = figure(2)
    axes[0].plot(y, ".-", markersize=3, linewidth=0.5, label="data")
    axes[0].step(
        range(args.length), -1.0 + 2.0 * states, where="mid", color="k", linewidth=0.8, label="true level"
    )
    axes[0].set(xlabel="time", ylabel="y")
    axes[0].legend(frameon=False, fontsize=7)
    for name, values in (("low", draws["low"]), ("high", draws["low"] + draws["rise"])):
        axes[1].hist(values, 40, density=True, alpha=0.5, label=name)
    axes[1].axvline(-1.0, color="k", linewidth=0.8)
    axes[1].axvline(1.0, color="k", linewidth=0.8)
    axes[1].set(xlabel="level of a state (lines: true)", ylabel="density")
    axes[1].legend(frameon=False, fontsize=7)
    save(made, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=40)
    main(add_flags(parser, 500, "hidden_markov").parse_args())
