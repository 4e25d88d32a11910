"""State-space models, linear and not: smoothing a track by a guide amortised over series.

Durbin and Koopman (2012), Time Series Analysis by State Space Methods. A state moves by 0.9 of itself and noise;
what is seen is the state (``--observe linear``) or its square over five (``--observe squared``, as in Gordon,
Salmond and Smith 1993), with noise. Several series are simulated. For the linear model the guide is exact at its
start. Of a square the sign stays open: a guide of normal conditionals finds one of the two, which no weight shows.

    python examples/gallery/state_space.py --observe squared
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, compare, figure, save

SEEN = {"linear": lambda state: state, "squared": lambda state: state**2 / 5}


def make_model(observe):
    """Return the model of that kind of observation."""

    def model(y):
        with pyro.plate("series", len(y)):
            state = torch.zeros(len(y))
            for t in range(y.shape[1]):
                state = pyro.sample(f"z{t}", dist.Normal(0.9 * state, 1.0))
                pyro.sample(f"y{t}", dist.Normal(SEEN[observe](state), 0.5), obs=y[:, t])

    return model


def main(args):
    """Compare the guides; draw the smoothed state of one series."""
    pyro.set_rng_seed(args.seed + 1)
    states, state = [], torch.zeros(args.series)
    for _ in range(args.length):
        state = 0.9 * state + torch.randn(args.series)
        states.append(state)
    truth = torch.stack(states, 1)
    y = SEEN[args.observe](truth) + 0.5 * torch.randn(truth.shape)
    posteriors = compare(args, make_model(args.observe), (y,), lr=3e-3)
    made, axes = figure(len(posteriors))
    for ax, (name, posterior) in zip(axes, posteriors.items(), strict=True):
        draws = torch.stack([posterior.draws[f"z{t}"][:, 0] for t in range(args.length)], 1)
        ax.plot(draws[:60].T, color="C0", linewidth=0.4, alpha=0.4)
        ax.plot(truth[0], color="k", linewidth=1)
        ax.set(title=f"{name} ({args.observe})", xlabel="time", ylabel="state (black: true)")
    save(made, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--observe", choices=list(SEEN), default="squared")
    parser.add_argument("--series", type=int, default=50)
    parser.add_argument("--length", type=int, default=8)
    main(add_flags(parser, 1000, "state_space").parse_args())
