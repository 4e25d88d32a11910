r"""SIReN-VAE on Bayesian networks: Table 1 and Figure 2 of the paper, with exact answers beside them.

Data are drawn from published linear-Gaussian networks, leaves observed. A variational autoencoder is trained on
them: without structure (``vae``), with independent (``ind``) or fully connected latents (``FC``) or the true network
(``true``), all three with the paper's graphical residual flow, and the true network with this package's faithful flow
(``faithful``). The measure is the negative log-likelihood of new data minus that of the true network, in nats.

    python examples/siren_vae.py                                              # one small comparison
    python examples/siren_vae.py --network ecoli70 --variant true --flow faithful --train-multiple 2 --seeds 3
    python examples/siren_vae.py --study all --out docs/results   # everything, restartable; `make table1`

Each run is one JSON file in ``<out>/siren_vae``, written when it is done. The rate of Adam is chosen once for each
cell, on seed 0, by 200 further points drawn from the network; the results with the rate that the training loss would
have chosen are shown beside. ``siren_vae_report.py`` draws the page from the files that are there.

References:
    [1] Mouton and Kroon (2022), SIReN-VAE: Leveraging Flows and Amortized Inference for Bayesian Networks.
"""

import argparse
import multiprocessing
import os
import time
from pathlib import Path

import torch
from siren_vae_report import render
from siren_vae_runs import FEW, RATES, REMEDIES, ROWS, Run, pick_rate, test, train

NETWORKS = ("ecoli70", "magic-irri", "arth150", "magic-niab")
FIGURE_MULTIPLES = (5, 10, 25, 50)


def chosen_rate(cell, folder, args):
    """Return the best rates of a cell by validation points and by training loss, from runs with seed 0."""
    results = {lr: train(Run(**cell, seed=0, lr=lr), folder, args) for lr in RATES[cell["multiple"] < FEW]}
    by = [pick_rate({lr: r[key] for lr, r in results.items()}) for key in ("validation_nll", "train_loss")]
    return by[0], by[1]


def do_cell(job):
    """Do all runs of a cell that are not there yet."""
    cell, seeds, rate, both, args = job  # rate: a number, the cell that says it, or None for this cell
    torch.set_num_threads(1)
    folder = Path(args.out) / "siren_vae"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if rate is None:
        rate, by_loss = (args.lr, args.lr) if args.lr else chosen_rate(cell, folder, args)
    elif isinstance(rate, dict):  # the rate of another cell
        rate, by_loss = chosen_rate(rate, folder, args)
    results = [test(Run(**cell, seed=seed, lr=rate), folder, args) for seed in range(seeds)]
    if both and by_loss != rate:
        test(Run(**cell, seed=0, lr=by_loss), folder, args)
    excess = torch.tensor([result["test"]["excess"] for result in results])
    spread = f" ± {excess.std():.3f}" if seeds > 1 else ""
    name = Run(**cell, seed=0, lr=rate).cell
    return (
        f"{name}: excess {excess.mean():.3f}{spread} nats over {seeds} seeds at rate {rate:g}, "
        f"{time.perf_counter() - started:.0f} s"
    )


def cell_of(network, row, multiple, **more):
    return {"network": network, "row": row, "multiple": multiple, **more}


def jobs_of(args):
    """List the cells of a part of the study, the most wanted first."""
    jobs = []
    wanted = [(n, "faithful", 2) for n in ("ecoli70", "magic-irri", "arth150")]
    wanted += [(n, "faithful", 100) for n in ("ecoli70", "magic-irri")]
    wanted += [(n, row, 2) for n in NETWORKS for row in reversed(ROWS)]
    wanted += [(n, row, 100) for n in ("ecoli70", "magic-irri", "magic-niab") for row in reversed(ROWS)]
    wanted += [("arth150", row, 100) for row in reversed(ROWS)]
    seeds = {2: 5, 100: 3}
    if args.study in ("table", "all"):
        for network, row, multiple in dict.fromkeys(wanted):
            count = 1 if (network, multiple) == ("arth150", 100) else seeds[multiple]
            jobs.append((cell_of(network, row, multiple), count, None, multiple == 2, args))
    if args.study in ("robustness", "all"):
        for multiple, count in ((2, 5), (20, 3)):
            for how in ("remove", "reverse", "add"):
                for percent in (10, 25, 50):
                    cell = cell_of("ecoli70", "faithful", multiple, perturbation=f"{how}-{percent}")
                    jobs.append((cell, count, 1e-2, False, args))
            jobs.append((cell_of("ecoli70", "faithful", multiple), count, 1e-2, False, args))
    if args.study in ("remedies", "all"):
        for network in NETWORKS:
            for remedy in REMEDIES:
                cell = cell_of(network, "faithful", 2, remedy=remedy)
                jobs.append((cell, 5, cell_of(network, "faithful", 2), False, args))
    if args.study in ("figure", "all"):
        for multiple in FIGURE_MULTIPLES:
            for row in reversed(ROWS):
                other = cell_of("ecoli70", row, 2 if multiple < 25 else 100)
                jobs.append((cell_of("ecoli70", row, multiple), 3, other, False, args))
    if args.study in ("patience", "all"):
        for network in NETWORKS:
            for row in reversed(ROWS):
                cell = cell_of(network, row, 2, patience=10)
                jobs.append((cell, 5, cell_of(network, row, 2), False, args))
    return jobs


def study(args):
    jobs = [(cell, min(seeds, args.max_seeds), *rest) for cell, seeds, *rest in jobs_of(args)]
    print(f"{len(jobs)} cells, {args.workers} at a time.", flush=True)
    if args.workers == 1:
        for job in jobs:
            print(do_cell(job), flush=True)
            render(args.out)
    else:
        with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
            for line in pool.imap_unordered(do_cell, jobs):
                print(line, flush=True)
                render(args.out)
    print(f"Page: {render(args.out)}")


def main(args):
    torch.set_num_threads(1)
    if args.study:
        study(args)
        return
    rows = [row for row, kind in ROWS.items() if kind == (args.variant, args.flow)]
    if args.variant == "vae":
        rows = ["vae"]
    if not rows:
        raise SystemExit(f"No row for variant {args.variant} with flow {args.flow}; there are {ROWS}.")
    for row in rows:
        cell = cell_of(args.network, row, args.train_multiple)
        print(do_cell((cell, args.seeds, None, False, args)))


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--study", choices=["table", "robustness", "remedies", "figure", "patience", "all"])
    parse.add_argument("--network", default="magic-niab")
    parse.add_argument("--variant", choices=["true", "FC", "ind", "vae"], default="true")
    parse.add_argument("--flow", choices=["faithful", "graphical"], default="faithful")
    parse.add_argument(
        "--train-multiple", type=int, default=2, help="training points for each node of the network"
    )
    parse.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parse.add_argument("--lr", type=float, help="rate of Adam; chosen among three if not given")
    parse.add_argument("--data", help="a folder with NAME.json of other networks")
    parse.add_argument("--out", default="out", help="folder of siren_vae.md and siren_vae/")
    parse.add_argument(
        "--max-seeds", type=int, default=5, help="at most so many seeds of each cell of the study"
    )
    parse.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="cells at a time")
    parse.add_argument("--max-epochs", type=int, help="1,500 with few data and 300 with many if not given")
    parse.add_argument("--num-particles", type=int, default=500, help="importance samples of each test point")
    parse.add_argument("--progress", action="store_true", help="show a bar for each run")
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
