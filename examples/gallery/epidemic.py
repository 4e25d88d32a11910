"""An epidemic simulator, inverted by inference compilation.

A stochastic SIR model with binomial draws, after Kermack and McKendrick (1927): infections and recoveries of each
week are counts that no gradient passes through. The guide learns from simulations alone (Le et al. 2017, Inference
Compilation and Universal Probabilistic Programming), so that the simulator need only be run, and serves every new
epidemic. Pyro's guides would need gradients through counts. The week's counts are the latents that the simulator
keeps to itself: the guide is for its two rates, judged by ranks (Talts et al. 2018).

    python examples/gallery/epidemic.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from compare_guides import figure, save
from torch.distributions import Binomial

from pyro_graphflows import InferenceCompilation, Normal, Schedule, auto_faithful_guide, fit, sbc_ranks
from pyro_graphflows.distributions import Simulated

WEEKS, PEOPLE = 12, 500.0


def outbreak(contact, recovery):
    """Run the simulator; return reported cases by week, on the scale of a square root."""
    infected, susceptible, cases = torch.full_like(contact, 5.0), torch.full_like(contact, PEOPLE - 5.0), []
    for _ in range(WEEKS):
        new = Binomial(susceptible, 1 - (-contact * infected / PEOPLE).exp()).sample()
        gone = Binomial(infected, 1 - (-recovery).exp()).sample()
        susceptible, infected = susceptible - new, infected + new - gone
        cases.append(new)
    return torch.stack(cases, -1).sqrt()


def model(cases):
    """Rates of contact and recovery in each outbreak."""
    with pyro.plate("outbreaks", len(cases)):
        contact = pyro.sample("contact", dist.LogNormal(0.3, 0.5))
        recovery = pyro.sample("recovery", dist.LogNormal(-0.5, 0.4))
        pyro.sample("cases", Simulated(outbreak, contact, recovery, event_shape=(WEEKS,)), obs=cases)


def main(args):
    """Compile the guide; print whether its ranks are uniform; draw the posterior of one outbreak."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(args.seed)
    one = torch.zeros(1, WEEKS)
    guide = auto_faithful_guide(model, one, family=Normal(hidden_dims=[64, 64]))
    compilation = InferenceCompilation(model, guide, batch_size=args.batch_size)
    history = fit(
        model, guide, [(one,)], loss=compilation, optimizer=2e-3, progress=False, seed=args.seed,
        schedule=Schedule(num_steps=args.steps, steps_per_epoch=max(1, args.steps // 20), patience=3),
    )  # fmt: skip
    print(f"loss {history.loss[0]:.3f} -> {history.loss[-1]:.3f} nats per simulation")
    ranks = sbc_ranks(model, guide, one, num_simulations=args.num_ranks, num_draws=99)
    for name, rank in ranks.items():
        inside = ((rank >= 5) & (rank < 95)).double().mean()
        print(
            f"{name}: the true value is in the 90 % interval in {float(inside):.1%} of {args.num_ranks} outbreaks"
        )
    truth = (torch.tensor([1.5]), torch.tensor([0.6]))
    cases = outbreak(*truth)
    with torch.no_grad(), pyro.plate("draws", args.num_draws, dim=-2):
        draws = guide(cases)
    made, axes = figure(2)
    axes[0].plot(range(1, WEEKS + 1), cases[0].square(), "o-")
    axes[0].set(xlabel="week", ylabel="new cases")
    axes[1].plot(draws["contact"][:, 0], draws["recovery"][:, 0], ".", markersize=2, alpha=0.4)
    axes[1].plot(*truth, "k+", markersize=12)
    axes[1].set(xlabel="contact rate (cross: true)", ylabel="recovery rate")
    save(made, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--num-ranks", type=int, default=1000)
    parser.add_argument("--num-draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/gallery/epidemic.png", help="the figure")
    main(parser.parse_args())
