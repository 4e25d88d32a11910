"""The learning rate of ``fit(..., simulations=)``: losses on fresh simulations of the tasks, by rate.

A guide learns from as many simulations as the study's, at each of some rates, with the batches and the end of training
that ``fit`` has by default. Then it is judged by simulations of which it has seen none, the same ones for all rates, so
that differences between rates have much smaller errors than the losses.

    python -m studies.sbibm.rates --tasks two_moons --rates 1e-3 2e-3 5e-3 --seeds 0 1

Prints a table, a line for each task and seed: losses in nats, and their differences to that at the first rate ±
standard errors. It needs the package sbibm as ``run.py`` does.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.infer import InferenceCompilation, Simulations, fit
from studies.flags import positive
from studies.sbibm.run import FAMILIES, SET_UP
from studies.sbibm.tasks import TASKS, Task
from studies.tables import table

FRESH = 5000
FRESH_SEED = 12345


def losses(task: Task, rate: float, simulations: int, seed: int, family: str) -> Tensor:
    """Train a guide at a rate; return its loss for each of some fresh simulations.

    Args:
        task: The task.
        rate: The learning rate.
        simulations: How many the guide learns from, those that set it up included.
        seed: The seed of everything but the fresh simulations.
        family: The family of the study, or ``"default"`` for that of a guide of which nothing is said.
    """
    x = task.observation(1)
    options: dict[str, Any] = {**task.guide_options, **task.data_options}
    if family != "default":
        options["family"] = FAMILIES[family](task)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    number = simulations // SET_UP
    guide = auto_faithful_guide(
        task.model, x, init="regression", num_start_samples=number, setup_seed=seed, **options
    )
    rest = Simulations(simulations - number)
    fit(task.model, guide, x, simulations=rest, optimizer=rate, progress=False, seed=seed)
    pyro.set_rng_seed(FRESH_SEED)
    with torch.no_grad():
        return -InferenceCompilation(task.model, guide, batch_size=FRESH).log_probs(x)


def line(task: str, seed: int, found: Mapping[float, Tensor]) -> list[str]:
    """Return a line of the table.

    Args:
        task: The name of the task.
        seed: The seed.
        found: Losses by rate.
    """
    first = next(iter(found.values()))
    cells = [task, str(seed)]
    for each in found.values():
        change = each - first
        error = f" ({change.mean():+.3f} ± {change.std() / len(change) ** 0.5:.3f})"
        cells.append(f"{each.mean():.3f}{'' if each is first else error}")
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    """Train and print."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    tasks = ["two_moons", "gaussian_mixture", "bernoulli_glm"]
    parse.add_argument("--tasks", nargs="+", choices=TASKS, default=tasks)
    parse.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 5e-3])
    parse.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parse.add_argument("--simulations", type=positive, default=10_000)
    parse.add_argument("--family", choices=[*FAMILIES, "default"], default="spline")
    args = parse.parse_args(argv)
    rows = []
    for seed in args.seeds:
        for name in args.tasks:
            sizes = (args.simulations, seed, args.family)
            rows.append(line(name, seed, {rate: losses(TASKS[name], rate, *sizes) for rate in args.rates}))
    print(table(["task", "seed", *(f"{rate:g}" for rate in args.rates)], rows))


if __name__ == "__main__":
    main()
