"""Posterior draws and simulated data by several processes, joined afterwards.

Draws of a guide are independent, so processes share nothing but the guide's file: each loads it, draws with a seed
of its own, and returns draws and weights; k-hat and the log-evidence are those of all weights together. Simulated data
sets (for inference compilation, or calibration) are made in the same way.

    python examples/distributed/draws.py --workers 4 --num-draws 100000
"""

import argparse
import math
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyro_graphflows import Schedule, auto_faithful_guide, fit, load_guide, sample_posterior
from pyro_graphflows.infer import psis_khat


def model(x, y=None):
    """A line with unknown noise."""
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(slope[..., None] * x, noise[..., None]), obs=y)


def draw(task):
    """One worker's part: a file, data, a seed, a number of draws."""
    path, x, y, seed, num_draws = task
    torch.set_num_threads(1)
    guide = load_guide(path, model)
    posterior = sample_posterior(model, guide, x, y, num_draws=num_draws, seed=seed, progress=False)
    return {name: value.numpy() for name, value in posterior.draws.items()}, posterior.log_weights.numpy()


def simulate(task):
    """One worker's part of simulated data sets: the joint samples of the model."""
    x, seed, num = task
    pyro.set_rng_seed(seed)
    with torch.no_grad(), pyro.plate("simulations", num, dim=-2):
        trace = pyro.poutine.trace(model).get_trace(x)
    return {name: trace.nodes[name]["value"].numpy() for name in ("slope", "noise", "y")}


def main(args):
    """Fit once, draw by all workers, join."""
    pyro.set_rng_seed(args.seed)
    x = torch.randn(50)
    y = 1.5 * x + 0.5 * torch.randn(50)
    guide = auto_faithful_guide(model, x, y)
    fit(
        model,
        guide,
        (x, y),
        optimizer=1e-2,
        schedule=Schedule(num_steps=args.steps, patience=None),
        progress=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guide.safetensors"
        guide.save(path)
        shares = [args.num_draws // args.workers] * args.workers
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads of torch
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            parts = list(pool.map(draw, [(path, x, y, seed, num) for seed, num in enumerate(shares)]))
            simulated = list(
                pool.map(simulate, [(x, 100 + seed, args.num_simulations) for seed in range(args.workers)])
            )
    log_weights = torch.cat([torch.as_tensor(weights) for _, weights in parts])
    slope = torch.cat([torch.as_tensor(draws["slope"]) for draws, _ in parts])
    weights = log_weights.softmax(0)
    print(f"{len(slope)} draws by {args.workers} workers: k-hat {float(psis_khat(log_weights)):.2f}")
    print(f"log-evidence {float(log_weights.logsumexp(0)) - math.log(len(slope)):.3f} nats")
    print(f"slope {float((weights * slope).sum()):.3f}, unweighted {float(slope.mean()):.3f}")
    print(
        f"{sum(len(part['y']) for part in simulated)} simulated data sets of {simulated[0]['y'].shape[-1]} rows"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--num-draws", type=int, default=20_000)
    parser.add_argument("--num-simulations", type=int, default=1000, help="of each worker")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
