"""A small deep Markov model: transitions and emissions are networks, learned with the guide.

Krishnan, Shalit and Sontag (2017), Structured inference networks for nonlinear state space models, AAAI. The state
of two dimensions moves by a gated network; data are noisy circles of unknown phase and speed. Their guide is a
recurrent network over all data; ours looks at what the faithful inverse of a chain says.

    python examples/gallery/deep_markov.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, compare, figure, save
from torch import nn

STATE, SEEN = 2, 2


class DeepMarkov(nn.Module):
    """Networks for the next state and for what is seen of it."""

    def __init__(self, hidden=32):
        super().__init__()
        self.move = nn.Sequential(nn.Linear(STATE, hidden), nn.Tanh(), nn.Linear(hidden, STATE))
        self.spread = nn.Linear(STATE, STATE)
        self.emit = nn.Sequential(nn.Linear(STATE, hidden), nn.Tanh(), nn.Linear(hidden, SEEN))
        self.noise = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x):
        """The model: series of shape (series, steps, 2)."""
        with pyro.plate("series", len(x)):
            state = torch.zeros(STATE)
            for t in range(x.shape[1]):
                centre = state + self.move(state)
                spread = nn.functional.softplus(self.spread(state)) + 0.05
                state = pyro.sample(f"z{t}", dist.Normal(centre, spread).to_event(1))
                pyro.sample(f"x{t}", dist.Normal(self.emit(state), self.noise.exp()).to_event(1), obs=x[:, t])


def circles(series, steps):
    """Return noisy circles of unknown phase and speed."""
    phase, speed = 6.28 * torch.rand(series, 1), 0.5 + 0.5 * torch.rand(series, 1)
    angle = phase + speed * torch.arange(steps)
    return torch.stack([angle.cos(), angle.sin()], -1) + 0.1 * torch.randn(series, steps, 2)


def main(args):
    """Train model and guide; draw a series and its reconstruction."""
    pyro.set_rng_seed(args.seed + 1)
    x = circles(args.series, args.length)
    pyro.set_rng_seed(args.seed)
    model = DeepMarkov()
    posteriors = compare(args, model, (x,), lr=3e-3, particles=1, others=False)
    print("Pyro's AutoNormal has parameters for each state of each series: it is no guide for new series")
    posterior = posteriors["faithful"]
    made, (ax,) = figure(size=(3.8, 3.6))
    with torch.no_grad():
        shown = torch.stack([model.emit(posterior.draws[f"z{t}"][:50, 0]) for t in range(args.length)], 1)
    ax.plot(*shown.permute(2, 1, 0), color="C0", linewidth=0.4, alpha=0.4)
    ax.plot(*x[0].T, "k.-", markersize=4, linewidth=0.6)
    ax.set(xlabel="black: data of a series; blue: draws", aspect="equal")
    save(made, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--length", type=int, default=10)
    main(add_flags(parser, 1000, "deep_markov").parse_args())
