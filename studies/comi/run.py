r"""Faithful inverses of Gaussian binary trees: the first study of the CoMI (NaMI) paper, against exact answers.

A binary tree of normal variables, each with a random weight on its parent, leaves observed. The posterior of the
inner nodes is approximated by one amortised guide, trained by inference compilation (the forward divergence on
fresh joint samples), with three factorisations:

- ``heuristic``: the stochastic inverse of Stuhlmueller et al. (2013), which turns the edges around;
- ``minimal``: the faithful inverse of Webb et al. (2018), no edge too many;
- ``full``: every latent given all data and all latents before it, faithful and far larger.

All have the same hidden layers. The tree is linear-Gaussian, so the posterior is known, and with it the least
divergence that each factorisation allows (its *gap*) and how far a trained guide is from it.

    python -m studies.comi.run            # a small comparison, under a minute
    python -m studies.comi.run --study    # all depths and seeds, restartable; `make comi` keeps them in studies/comi

Each run of the study is one line of the file ``--results``, written when it is done; a run that was interrupted goes
on from its last checkpoint in the folder ``--work``. ``report.py`` draws the page from the runs that are there,
and ``measures.py`` has what is measured and the exact answers.

References:
    [1] Webb, Golinski, Zinkov, Siddharth, Rainforth, Teh and Wood (2018), Faithful Inversion of Generative Models
    for Effective Amortized Inference, NeurIPS; Figures 1 and 2.
    [2] Stuhlmueller, Taylor and Goodman (2013), Learning Stochastic Inverses, NIPS.
    [3] Germain, Gregor, Murray and Larochelle (2015), MADE, ICML.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import pyro
import torch

from pyro_graphflows import Normal, auto_faithful_guide, binary_tree
from pyro_graphflows.whole_files import write_whole
from studies.comi.measures import DTYPE, Exact, JointDensity, Judge, compare_densities
from studies.comi.report import render
from studies.flags import add_places
from studies.results import Results

INVERSES = {"heuristic": "stochastic", "minimal": "auto", "full": "full"}
TREE_SEED = 0  # one tree for each depth; seeds of runs change networks and samples


@dataclass(frozen=True)
class Run:
    """One line of the study: a guide to train, or (``init="samples"``) regression starts to compare."""

    depth: int
    structure: str
    init: str
    seed: int
    hidden_dims: tuple[int, ...] = (200, 200)

    @property
    def name(self):
        """The key of the run's line, and the name of its checkpoint."""
        width = "x".join(map(str, self.hidden_dims))
        return f"d{self.depth}-{self.structure}-{self.init}-{width}-s{self.seed}"


# ----------------------------------------------------------------------------------------------------- one run


def make_guide(network, structure, seed, init, hidden_dims, num_samples=10_000):
    """Compile the guide; the paper's networks have no linear map beside the hidden layers, our start needs one."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    example = torch.zeros(100, len(network.observed), dtype=DTYPE)
    return auto_faithful_guide(
        network.pyro_model(),
        example,
        family=Normal(hidden_dims=hidden_dims, activation="relu", skip=init == "regression"),
        inverse=INVERSES[structure],
        init=init,
        num_start_samples=num_samples,
    )


def first_rate(run, args):
    """Return the rate of Adam at the start: large networks get a smaller one, the regression start a still smaller.

    The wide fully connected network, in which every unit serves many conditionals, diverges at the others' rate.
    """
    if run.init == "regression":
        return args.lr_regression
    if run.structure == "full" and run.hidden_dims == tuple(args.wide_dims):
        return args.lr_wide
    return args.lr if run.depth < args.deep else args.lr_deep


def train(run, args, checkpoint=None):
    """Train one guide and return its record; with a path, go on from its checkpoint and keep one there."""
    network = binary_tree(run.depth, seed=TREE_SEED)
    exact = Exact(network)
    guide = make_guide(network, run.structure, run.seed, run.init, run.hidden_dims)
    density = JointDensity(guide, network)
    held_out = Judge(exact, args.num_held_out, seed=11)
    gap = network.factorization_gap(guide.inverse)
    difference = compare_densities(guide, density, held_out)
    constant = [density.num_constant(held_out.joint)]

    rate = first_rate(run, args)
    optimizer = torch.optim.Adam(guide.parameters(), lr=rate, fused=True)
    rng = np.random.default_rng([run.depth, run.seed])
    kl, error = held_out.divergence(density)
    curve = [{"epoch": 0, "kl": kl, "standard_error": error, "lr": rate}]
    samples = [{"epoch": 0, "log_posterior": held_out.log_posterior(guide)}]
    state = {"best": kl, "bad": 0, "seconds": 0.0, "epoch": 0}
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        guide.load_state_dict(saved["guide"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["torch"])
        loaded = json.loads(saved["json"])
        rng.bit_generator.state = loaded["numpy"]
        curve, samples, state = loaded["curve"], loaded["samples"], loaded["state"]

    started, kept = time.perf_counter() - state["seconds"], time.perf_counter()
    while state["epoch"] < args.max_epochs and optimizer.param_groups[0]["lr"] >= 0.99 * args.min_lr:
        joint = torch.tensor(network.sample(args.batch_size * args.batches, rng), dtype=DTYPE)
        for batch in joint.split(args.batch_size):
            optimizer.zero_grad()
            loss = -density(batch).mean()
            loss.backward()
            optimizer.step()
        state["epoch"] += 1
        if state["epoch"] % args.every == 0:
            kl, error = held_out.divergence(density)
            group = optimizer.param_groups[0]
            curve.append({"epoch": state["epoch"], "kl": kl, "standard_error": error, "lr": group["lr"]})
            if kl < state["best"] - args.min_improvement:
                state["best"], state["bad"] = kl, 0
            else:
                state["bad"] += 1
            if state["bad"] >= args.patience:
                group["lr"], state["bad"], state["best"] = group["lr"] / 10, 0, min(kl, state["best"])
        if state["epoch"] % args.sample_every == 0:
            samples.append({"epoch": state["epoch"], "log_posterior": held_out.log_posterior(guide)})
        state["seconds"] = time.perf_counter() - started
        if checkpoint is not None and time.perf_counter() - kept >= args.checkpoint_seconds:
            kept = time.perf_counter()
            text = {"numpy": rng.bit_generator.state, "curve": curve, "samples": samples, "state": state}
            keep = {"guide": guide.state_dict(), "optimizer": optimizer.state_dict()}
            keep |= {"torch": torch.get_rng_state(), "json": json.dumps(text)}
            write_whole(checkpoint, partial(torch.save, keep))

    kl, error = Judge(exact, args.num_test, seed=12).divergence(density)
    reached = optimizer.param_groups[0]["lr"] < 0.99 * args.min_lr
    return {
        "run": asdict(run),
        "edges": guide.inverse.num_edges,
        "levels": len(guide.inverse.levels),
        "order": guide.inverse.order,
        "latents": len(network.latent),
        "gap": gap,
        "entropy": exact.entropy,
        "constant_conditionals": [*constant, density.num_constant(held_out.joint)],
        "kl": kl,
        "standard_error": error,
        "test_samples": args.num_test,
        "epochs": state["epoch"],
        "converged": reached,
        "seconds": state["seconds"],
        "max_difference_to_log_prob": max(difference, compare_densities(guide, density, held_out)),
        "best_log_posterior": exact.best_log_posterior(guide.inverse, held_out.data).tolist(),
        "curve": curve,
        "samples": samples,
        **provenance(args),
    }


def start_from_samples(run, args):
    """Measure the regression start for several numbers of joint samples; nothing is trained."""
    network = binary_tree(run.depth, seed=TREE_SEED)
    judge = Judge(Exact(network), args.num_test, seed=12)
    rows = []
    for structure in INVERSES:
        for number in args.sample_sizes:
            start = time.perf_counter()
            seed = 1000 * run.seed + 17
            guide = make_guide(network, structure, seed, "regression", run.hidden_dims, number)
            seconds = time.perf_counter() - start
            kl, error = judge.divergence(JointDensity(guide, network))
            rows.append(
                {
                    "structure": structure,
                    "samples": number,
                    "kl": kl,
                    "standard_error": error,
                    "parameters": guide.inverse.num_edges + 2 * len(network.latent),
                    "gap": network.factorization_gap(guide.inverse),
                    "seconds": seconds,
                }
            )
    return {"run": asdict(run), "test_samples": args.num_test, "rows": rows, **provenance(args)}


def provenance(args):
    settings = {
        k: v
        for k, v in vars(args).items()
        if k not in ("results", "out", "work", "study", "workers", "depths", "seeds", "wide_seeds")
    }
    return {
        "settings": settings,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, float32, torch {torch.__version__.split('+')[0]}, one thread a run",
    }


# ---------------------------------------------------------------------------------------------------- the study


def all_runs(args):
    """List the runs in their order: one depth with all seeds, the others seed by seed, wide networks last."""
    first, *others = args.depths
    pairs = [(first, seed) for seed in range(args.seeds)]
    pairs += [(depth, seed) for seed in range(args.seeds) for depth in others]
    runs = []
    for depth, seed in pairs:
        runs.append(Run(depth, "all", "samples", seed))
        runs.append(Run(depth, "minimal", "regression", seed))
        runs += [Run(depth, structure, "random", seed) for structure in INVERSES]
    for structure in INVERSES:
        wide = [
            (depth, seed) for depth, seed in pairs if depth in args.wide_depths and seed < args.wide_seeds
        ]
        runs += [Run(depth, structure, "random", seed, tuple(args.wide_dims)) for depth, seed in wide]
    return runs


def do_run(job):
    run, args = job
    torch.set_num_threads(1)
    results = Results(args.results)
    started = time.perf_counter()
    if run.init == "samples":
        results.append(run.name, start_from_samples(run, args))
        return f"{run.name}: {time.perf_counter() - started:.0f} s"
    checkpoint = args.work / f"{run.name}.pt"
    result = train(run, args, checkpoint)
    results.append(run.name, result)
    checkpoint.unlink(missing_ok=True)
    return (
        f"{run.name}: KL {result['kl']:.4f} ± {result['standard_error']:.4f}, gap {result['gap']:.4f}, "
        f"{result['epochs']} epochs, {result['seconds']:.0f} s"
    )


def study(args):
    """Do all runs that are not there yet, on all cores, and draw the page after each."""
    there = Results(args.results).read()
    missing = [run for run in all_runs(args) if run.name not in there]
    print(f"{len(missing)} of {len(all_runs(args))} runs to do, {args.workers} at a time.", flush=True)
    jobs = [(run, args) for run in missing]
    if args.workers == 1:
        for job in jobs:
            print(do_run(job), flush=True)
    elif jobs:
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            for line in pool.imap_unordered(do_run, jobs):
                print(line, flush=True)
                render(args.results, args.out)
    print(f"Page: {render(args.results, args.out)}")


def small(args):
    """Compare the three factorisations on one tree and print a table."""
    network = binary_tree(args.depths[0], seed=TREE_SEED)
    print(f"{network}; all in nats, mean over x of KL(p(z|x) || q(z|x)).")
    print(
        f"{'guide':>10} {'edges':>6} {'gap (exact)':>12} {'regression start':>17} {'trained from random':>20}"
    )
    judge = Judge(Exact(network), args.num_test, seed=12)
    for structure in INVERSES:
        start = make_guide(network, structure, 0, "regression", (200, 200))
        kl, _ = judge.divergence(JointDensity(start, network))
        result = train(Run(args.depths[0], structure, "random", 0), args)
        print(
            f"{structure:>10} {result['edges']:>6} {result['gap']:>12.4f} {kl:>17.4f} {result['kl']:>13.4f} ± "
            f"{result['standard_error']:.4f}",
            flush=True,
        )


def main(args):
    defaults = (
        {"max_epochs": 800, "depths": [5, 4, 6, 7, 8]} if args.study else {"max_epochs": 120, "depths": [4]}
    )
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    (study if args.study else small)(args)


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--study", action="store_true", help="do the whole study, restartable")
    add_places(parse, "comi")
    parse.add_argument(
        "--depths", type=int, nargs="+", help="depths of the trees; the first one is done first"
    )
    parse.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parse.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parse.add_argument(
        "--wide-dims", type=int, nargs="+", default=[1000, 1000], help="a second, wider network"
    )
    parse.add_argument("--wide-depths", type=int, nargs="*", default=[7, 8], help="where it is tried as well")
    parse.add_argument("--wide-seeds", type=int, default=1, help="number of seeds of the wider network")
    parse.add_argument("--batch-size", type=int, default=100)
    parse.add_argument(
        "--batches", type=int, default=25, help="minibatches an epoch, each of new joint samples"
    )
    parse.add_argument("--max-epochs", type=int)
    parse.add_argument(
        "--lr", type=float, default=1e-2, help="first rate of Adam; divided by ten when converged"
    )
    parse.add_argument("--lr-deep", type=float, default=2e-3, help="first rate for deep trees")
    parse.add_argument(
        "--lr-wide", type=float, default=1e-3, help="first rate of the wide fully connected network"
    )
    parse.add_argument("--deep", type=int, default=8, help="the depth from which a tree is deep")
    parse.add_argument(
        "--lr-regression", type=float, default=1e-4, help="first rate after the regression start"
    )
    parse.add_argument("--min-lr", type=float, default=1e-5, help="the last rate")
    parse.add_argument("--patience", type=int, default=10, help="measurements without improvement")
    parse.add_argument("--min-improvement", type=float, default=2e-3, help="in nats")
    parse.add_argument("--every", type=int, default=4, help="epochs between measurements")
    parse.add_argument(
        "--sample-every", type=int, default=20, help="epochs between samples on the five data sets"
    )
    parse.add_argument(
        "--num-held-out", type=int, default=2000, help="joint samples of the curves and the schedule"
    )
    parse.add_argument(
        "--num-test", type=int, default=20_000, help="fresh joint samples of the final figures"
    )
    parse.add_argument(
        "--sample-sizes", type=int, nargs="+", default=[300, 1000, 3000, 10_000, 30_000, 100_000]
    )
    parse.add_argument("--checkpoint-seconds", type=float, default=60)
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
