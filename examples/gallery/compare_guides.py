"""What the scripts of the gallery share: train guides of one model alike, and print how close each comes.

All figures are in nats for the whole data set, from draws of the trained guide: ELBO, IWAE (the log-evidence by
their weights, a lower bound on average) and k-hat, the largest one where the posterior factorises over data.
"""

import math
import time
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_graphflows import Schedule, auto_faithful_guide, fit, sample_posterior


def add_flags(parser, steps, out):
    """Add the flags that all scripts have."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--num-draws", type=int, default=1000, help="from which the figures are computed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=f"out/gallery/{out}.png", help="the figure")
    return parser


def compare(args, model, arguments, *, lr=1e-2, particles=5, loss=None, others=True, hidden=(), **options):
    """Train the faithful guide and Pyro's, print a table; return the posteriors by name.

    Args:
        args: The flags.
        model: The model.
        arguments: Its arguments.
        lr: The first learning rate; it falls to a hundredth.
        particles: Draws of the guide in a step.
        loss: An ELBO instead of Trace_ELBO.
        others: Whether Pyro's guides can serve the model.
        hidden: Sites that the model sums over, which Pyro's guides must not see.
        **options: Of the faithful guide, beside ``family="auto"`` and ``init="auto"``.
    """
    torch.set_num_threads(1)
    names = ["faithful"] + (["AutoNormal", "AutoMultivariateNormal"] if others else [])
    makers = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}
    print(f"{'guide':<24}{'ELBO':>12}{'IWAE':>12}{'k-hat':>8}{'CPU seconds':>13}")
    posteriors = {}
    for name in names:
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        begin = time.process_time()
        if name in makers:
            guide = makers[name](poutine.block(model, hide=list(hidden)), init_scale=0.1)
        else:
            guide = auto_faithful_guide(model, *arguments, **{"family": "auto", "init": "auto", **options})
        objective = loss or Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
        epoch = max(1, args.steps // 20)
        fit(
            model, guide, [arguments], loss=objective, optimizer=lr, progress=False, seed=args.seed,
            schedule=Schedule(num_steps=args.steps, steps_per_epoch=epoch, patience=3, lr_factor=0.3, min_lr=0.0),
        )  # fmt: skip
        seconds = time.process_time() - begin
        posterior = sample_posterior(
            model, guide, *arguments, num_draws=args.num_draws, seed=args.seed, progress=False
        )
        weights = posterior.log_weights.double()
        elbo, iwae = weights.mean(0).sum(), (weights.logsumexp(0) - math.log(len(weights))).sum()
        print(f"{name:<24}{elbo:>12.2f}{iwae:>12.2f}{posterior.khat.max():>8.2f}{seconds:>13.1f}", flush=True)
        posteriors[name] = posterior
    return posteriors


def figure(columns=1, rows=1, size=(4.2, 3.2)):
    """Return a figure and its axes, in a list."""
    made = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(made.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return made, axes


def save(made, args):
    """Write the figure where the flags say."""
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=110)
    print(f"Figure: {path}")
