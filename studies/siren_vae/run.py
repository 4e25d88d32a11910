r"""SIReN-VAE on Bayesian networks: Table 1 and Figure 2 of the paper, with exact answers beside them.

Data are drawn from published linear-Gaussian networks, leaves observed. A variational autoencoder is trained on
them: without structure (``vae``), with independent (``ind``) or fully connected latents (``FC``) or the true network
(``true``), all three with the paper's graphical residual flow, and the true network with this package's faithful flow
(``faithful``). The measure is the negative log-likelihood of new data minus that of the true network, in nats.

    python -m studies.siren_vae.run                                              # one small comparison
    python -m studies.siren_vae.run --network ecoli70 --variant true --flow faithful --train-multiple 2 --seeds 3
    python -m studies.siren_vae.run --study all                  # everything, restartable; `make table1`

Each run is one line of the file ``--results``, written when it is trained, and once more with its test figures. The
rate of Adam, and on few data the patience of its schedule, are chosen once for each cell, on seed 0, by 200 further
points drawn from the network; the results with what the training loss would have chosen are shown beside.
``report.py`` draws the pages from the runs that are there.

References:
    [1] Mouton and Kroon (2022), SIReN-VAE: Leveraging Flows and Amortized Inference for Bayesian Networks.
"""

import argparse
import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from functools import partial

import torch

from pyro_graphflows import GraphflowsError
from studies.flags import add_places, positive
from studies.results import Results
from studies.siren_vae.training import (
    DEEPER,
    DEEPER_SETTINGS,
    FEW,
    REMEDIES,
    ROWS,
    WARM_UP_SETTING,
    Run,
    pick_setting,
    robustness_setting,
    settings_of,
    test,
    train,
)

NETWORKS = ("ecoli70", "magic-irri", "arth150", "magic-niab")
FIGURE_MULTIPLES = (5, 10, 25, 50)


@dataclass(frozen=True)
class Job:
    """A cell of the study and how its rate and patience come about: given, or chosen on seed 0 of a cell."""

    cell: dict
    seeds: int
    setting: tuple | None = None
    like: dict | None = None  # the cell that says the setting, if it is another one
    patience: int | None = None  # choose the rate for this patience only
    by_loss: bool = False  # also test seed 0 with the setting that the training loss would choose


def cell_of(network, row, multiple, **more):
    return {"network": network, "row": row, "multiple": multiple, **more}


def run_of(cell, setting, seed):
    return Run(**cell, seed=seed, lr=setting[0], patience=setting[1])


def chosen_settings(cell, patience, results, args):
    """Return the best settings of a cell by validation points and by training loss, from runs with seed 0."""
    settings = settings_of(cell["multiple"], patience)
    found = {setting: train(run_of(cell, setting, 0), results, args) for setting in settings}
    return [pick_setting({s: r[key] for s, r in found.items()}) for key in ("validation_nll", "train_loss")]


def do_job(job, args):
    """Do all runs of a cell that are not there yet; return a line about them."""
    torch.set_num_threads(1)
    results = Results(args.results)
    started = time.perf_counter()
    setting, by_loss = job.setting, job.setting
    if setting is None:
        setting, by_loss = chosen_settings(job.like or job.cell, job.patience, results, args)
    found = [test(run_of(job.cell, setting, seed), results, args) for seed in range(job.seeds)]
    if job.by_loss and by_loss != setting:
        test(run_of(job.cell, by_loss, 0), results, args)
    excess = torch.tensor([result["test"]["excess"] for result in found])
    spread = f" ± {excess.std():.3f}" if job.seeds > 1 else ""
    return (
        f"{run_of(job.cell, setting, 0).cell}: excess {excess.mean():.3f}{spread} nats over {job.seeds} seeds at rate "
        f"{setting[0]:g}, {time.perf_counter() - started:.0f} s"
    )


def jobs_of(study):
    """List the jobs of a part of the study, the most wanted first."""
    jobs = []
    wanted = [(n, "faithful", 2) for n in ("ecoli70", "magic-irri", "arth150")]
    wanted += [(n, "faithful", 100) for n in ("ecoli70", "magic-irri")]
    wanted += [(n, row, 2) for n in NETWORKS for row in reversed(ROWS)]
    wanted += [(n, row, 100) for n in ("ecoli70", "magic-irri", "magic-niab") for row in reversed(ROWS)]
    wanted += [("arth150", row, 100) for row in reversed(ROWS)]
    seeds = {2: 5, 100: 3}
    if study in ("table", "all"):
        for network, row, multiple in dict.fromkeys(wanted):
            count = 1 if (network, multiple) == ("arth150", 100) else seeds[multiple]
            jobs.append(Job(cell_of(network, row, multiple), count, by_loss=multiple == 2))
    if study in ("robustness", "all"):
        for multiple, count in ((2, 5), (20, 3)):
            setting = robustness_setting(multiple)
            jobs.append(Job(cell_of("ecoli70", "faithful", multiple), count, setting))
            for how in ("remove", "reverse", "add"):
                for percent in (10, 25, 50):
                    cell = cell_of("ecoli70", "faithful", multiple, perturbation=f"{how}-{percent}")
                    jobs.append(Job(cell, count, setting))
    if study in ("remedies", "all"):
        for network in NETWORKS:
            like = cell_of(network, "faithful", 2)
            jobs += [Job(cell_of(network, "faithful", 2, remedy=r), 5, like=like) for r in REMEDIES]
        for row in ROWS:
            if row != "faithful":  # is above
                cell = cell_of("ecoli70", row, 2)
                jobs.append(Job({**cell, "remedy": "warm-up"}, 5, like=cell))
    if study in ("blocks", "all"):
        for multiple, setting in DEEPER_SETTINGS:
            remedies = ("", "warm-up", *DEEPER)
            jobs += [Job(cell_of("ecoli70", "true", multiple, remedy=r), 3, setting) for r in remedies]
    if study in ("figure", "all"):
        for multiple in FIGURE_MULTIPLES:
            for row in reversed(ROWS):
                like = cell_of("ecoli70", row, 2 if multiple < FEW else 100)
                jobs.append(Job(cell_of("ecoli70", row, multiple), 3, like=like))
            warm = cell_of("ecoli70", "true", multiple, remedy="warm-up")
            like = cell_of("ecoli70", "true", 2)
            jobs.append(Job(warm, 3, like=like) if multiple < FEW else Job(warm, 3, WARM_UP_SETTING))
    if study in ("patience", "all"):
        for network in NETWORKS:
            for row in reversed(ROWS):
                jobs += [Job(cell_of(network, row, 2), 5, patience=patience) for patience in (10, 0)]
    return jobs


def study(args):
    from studies.siren_vae.report import render  # draws; the workers do not

    jobs = [replace(job, seeds=min(job.seeds, args.max_seeds)) for job in jobs_of(args.study)]
    print(f"{len(jobs)} cells, {args.workers} at a time.", flush=True)
    if args.workers == 1:
        for job in jobs:
            print(do_job(job, args), flush=True)
            render(args.results, args.out)
    else:
        with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=10) as pool:
            for line in pool.imap_unordered(partial(do_job, args=args), jobs):
                print(line, flush=True)
                render(args.results, args.out)
    print(f"Page: {render(args.results, args.out)}")


def main(args):
    torch.set_num_threads(1)
    if args.study:
        study(args)
        return
    rows = [row for row, kind in ROWS.items() if kind == (args.variant, args.flow)]
    if args.variant == "vae":
        rows = ["vae"]
    if not rows:
        known = ", ".join(f"--variant {kind[0]} --flow {kind[1]}" for kind in ROWS.values() if kind)
        raise SystemExit(
            f"No row for --variant {args.variant} --flow {args.flow}; there are --variant vae, {known}."
        )
    if args.lr is None and not settings_of(args.train_multiple, args.patience):
        patience = sorted({patience for _, patience in settings_of(args.train_multiple)})
        raise SystemExit(
            f"Rates are tried with --patience {' or '.join(map(str, patience))} (0 for the default); got "
            f"{args.patience}. Give --lr as well."
        )
    for row in rows:
        cell = cell_of(args.network, row, args.train_multiple)
        setting = None if args.lr is None else (args.lr, args.patience or 0)
        print(do_job(Job(cell, args.seeds, setting, patience=args.patience), args))


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument(
        "--study", choices=["table", "robustness", "remedies", "blocks", "figure", "patience", "all"]
    )
    parse.add_argument("--network", default="magic-niab")
    parse.add_argument("--variant", choices=["true", "FC", "ind", "vae"], default="true")
    parse.add_argument("--flow", choices=["faithful", "graphical"], default="faithful")
    parse.add_argument(
        "--train-multiple", type=positive, default=2, help="training points for each node of the network"
    )
    parse.add_argument("--seeds", type=positive, default=1, help="number of seeds")
    parse.add_argument("--lr", type=float, help="rate of Adam; chosen among three if not given")
    parse.add_argument("--patience", type=int, help="epochs without improvement before the rate falls")
    parse.add_argument("--data", help="a folder with NAME.json of other networks")
    add_places(parse, "siren_vae")
    parse.add_argument(
        "--max-seeds", type=positive, default=5, help="at most so many seeds of each cell of the study"
    )
    parse.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="cells at a time")
    parse.add_argument(
        "--max-epochs", type=positive, help="1,500 with few data and 300 with many if not given"
    )
    parse.add_argument(
        "--num-particles", type=positive, default=500, help="importance samples of each test point"
    )
    parse.add_argument("--progress", action="store_true", help="show a bar for each run")
    return parse


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except GraphflowsError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
