r"""Amortised guides on the tasks of sbibm: C2ST against the reference posteriors of ten observations.

Rows, each for a number of simulations:

- ``normal``, ``spline``, ``flow``: the guide of that family learns from the simulations alone (``fit(...,
  simulations=)``), as neural posterior estimation does; those that set up the guide are counted among them. Draws
  outside the bounds of a uniform prior are dropped, as they are there;
- ``... reweighted``: the same guide with the model's density. Of a large pool of its draws, those that remain are
  drawn without replacement by their importance weights (``sample_posterior``), as ``Posterior.reweighted`` does with a
  smaller pool. Nothing is trained further;
- ``spline score``: the guide reads scores, gradients of the model's log-density at fixed values of the parameters;
- ``auto``: a guide for each observation alone, as a user with a likelihood would make it: scores, ``fit`` left to
  itself (``loss="auto"``) for ``AUTO_SECONDS``, then draws by importance weights from a pool as above;
- ``npe``, ``npe nsf``: neural posterior estimation of the package ``sbi`` with its defaults, where it is installed.

    python -m studies.sbibm.run --task two_moons --rows spline "spline reweighted" --simulations 10000
    python -m studies.sbibm.run --study          # everything that is not there yet; `make sbibm`

A line of ``--results`` is one trained guide or one C2ST; what is there is not done again. It needs the package sbibm
(``pip install --no-deps sbibm``) for its files.

References:
    [1] Lueckmann, Boelts, Greenberg, Goncalves and Macke (2021), Benchmarking Simulation-Based Inference, AISTATS.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_graphflows.guides import Family, Flow, Normal, Spline, auto_faithful_guide, load_guide
from pyro_graphflows.guides.guide import AutoFaithfulGuide
from pyro_graphflows.infer import Schedule, Simulations, fit, sample_posterior
from studies.flags import add_places
from studies.results import Results
from studies.sbibm.c2st import c2st
from studies.sbibm.tasks import NUM_OBSERVATIONS, TASKS, Box, Crescent, GLMStatistics, Task

NUM_DRAWS = 10_000
POOL = 300_000  # draws of which those that are reweighted are taken
OUTSIDE = 8  # times as many are drawn, since a guide without bounds has draws outside the prior's, which are dropped
MOST_ROUNDS = 10  # of so many, until there are enough
AUTO_SECONDS = 10.0
SET_UP = 10  # one in so many simulations sets up the guide, the others train it
BATCHES = 20  # no step takes more than one simulation in so many
# fusion would use the density of the prior
OPTIONS: Mapping[str, Any] = {"units_per_set": 64, "hidden_layers": 2, "fusion": False}
FAMILIES: Mapping[str, Callable[[Task], Family]] = {
    "normal": lambda task: Normal(**OPTIONS),
    "spline": lambda task: Spline(num_bins=task.num_bins, **OPTIONS),
    "flow": lambda task: Flow(closed_form="density", conditioner_units=64),
}
Plan = Sequence[tuple[Sequence[str], Sequence[str], int]]  # tasks, rows, simulations
# what a study does, in this order
ROWS = ("spline", "spline reweighted")
STUDY = (
    (("two_moons", "gaussian_mixture", "slcp", "slcp_distractors"), ROWS, 10_000),
    (("bernoulli_glm", "gaussian_linear_uniform", "gaussian_linear", "bernoulli_glm_raw"), ROWS, 10_000),
    (("two_moons", "gaussian_mixture"), ("normal", "flow"), 10_000),
    (("slcp", "bernoulli_glm", "bernoulli_glm_raw"), ("normal",), 10_000),
    (("bernoulli_glm", "bernoulli_glm_raw"), ("auto",), 10_000),
    (("bernoulli_glm_raw",), ("spline score", "spline score reweighted"), 10_000),
    (tuple(TASKS), ROWS, 1000),
    (tuple(TASKS), ("npe", "npe nsf"), 10_000),
    (tuple(TASKS), ("npe",), 1000),
)
SEEDED = ((("two_moons", "gaussian_mixture", "slcp"), (*ROWS, "npe"), 10_000),)  # with other seeds too
SEEDS = (1, 2)


def train(task: Task, family: str, simulations: int, seed: int, path: Path) -> dict[str, Any]:
    """Train a guide by simulation alone and save it; return what is to be kept of the run."""
    pyro.clear_param_store()
    begin = time.process_time()
    scores = family.endswith(" score")
    guide = auto_faithful_guide(
        *(task.model, task.observation(1)),
        family=FAMILIES[family.removesuffix(" score")](task),
        features="score" if scores else "raw",
        init="regression",  # the guide is for all data that the model simulates
        num_start_samples=simulations // SET_UP,
        setup_seed=seed,
        **{**task.guide_options, **({} if scores else task.data_options)},
    )
    batch_size = min(task.batch_size, simulations // BATCHES)
    history = fit(
        *(task.model, guide, task.observation(1)),
        simulations=Simulations(simulations - simulations // SET_UP, batch_size=batch_size),
        optimizer=task.rate,
        progress=False,
        seed=seed,
    )
    guide.save(path)
    return {
        "held_out_nll": min(history.validation_loss),
        "epochs": len(history),
        "rate": task.rate,
        "stop": history.stop_reason,
        "seconds": time.process_time() - begin,
    }


def load(task: Task, path: Path) -> AutoFaithfulGuide:
    """Return a guide that was trained."""
    return load_guide(path, task.model, classes=(Box, Crescent, GLMStatistics))


def train_auto(task: Task, number: int, seed: int) -> AutoFaithfulGuide:
    """Train a guide for one observation by the density."""
    pyro.clear_param_store()
    x = task.observation(number)
    options = {"num_start_samples": 1000, "setup_seed": seed, "features": "score", **task.guide_options}
    guide = auto_faithful_guide(task.model, x, **options)
    limit = Schedule(num_seconds=AUTO_SECONDS)
    fit(task.model, guide, x, loss="auto", schedule=limit, progress=False, seed=seed)
    return guide


def draw(
    task: Task, row: str, guide: AutoFaithfulGuide, number: int, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """Return draws for an observation, in the columns of the reference, and figures about them."""
    x = task.observation(number)
    reweighted = row.endswith("reweighted") or row == "auto"
    size = POOL if reweighted else OUTSIDE * NUM_DRAWS
    model = poutine.block(task.model, hide=list(task.constant))
    posterior = sample_posterior(model, guide, x, num_draws=size, seed=seed, progress=False)
    figures = {"khat": float(posterior.khat.max()), "ess": float(posterior.ess.min())}
    columns = task.columns(posterior.draws)
    torch.manual_seed(seed)
    # a column for each datum where the posterior factorises
    weights = posterior.log_weights.reshape(size, -1)
    inside = weights > -torch.inf
    if int(inside.sum(0).min()) < NUM_DRAWS:
        found = int(inside.sum(0).min())
        raise SystemExit(f"{task.name}: of {size} draws only {found} are inside the prior's bounds")
    figures["inside"] = float(inside.double().mean())
    if not reweighted:
        weights = torch.zeros_like(weights).masked_fill(~inside, -torch.inf)
    noise = -torch.empty_like(weights).exponential_().log()  # the largest with it: no draw comes twice
    chosen = (weights + noise).topk(NUM_DRAWS, 0).indices
    chosen = chosen.gather(0, torch.rand(chosen.shape).argsort(0))
    columns = columns.gather(0, chosen.expand(-1, columns.shape[-1]))
    return columns, figures


def train_npe(
    task: Task, density: str, simulations: int, seed: int, path: Path
) -> tuple[Any, dict[str, Any]]:
    """Train the package sbi's NPE with its defaults and save it; return it and what is to be kept of the run."""
    import sbi  # not in the environment of the tests
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    torch.manual_seed(seed)
    loss_of = Simulations(simulations).prepare(task.model, _Nobody(task), (task.observation(1),), {})[0]
    values = loss_of.draw(simulations, vectorize=True)
    theta = task.columns(values)
    low, high = theta.min(0).values - 1.0, theta.max(0).values + 1.0  # no more than a check of what it gets
    begin = time.process_time()
    inference = NPE(prior=BoxUniform(low, high), density_estimator=density, show_progress_bars=False)
    inference.append_simulations(theta, task.data(values))
    estimator = inference.train()
    seconds = time.process_time() - begin
    torch.save(estimator, path)
    losses = inference.summary["validation_loss"]
    figures = {"held_out_nll": min(losses), "epochs": len(losses), "seconds": seconds}
    return estimator, {**figures, "sbi": sbi.__version__}


@torch.no_grad()
def draw_npe(task: Task, estimator: Any, number: int) -> tuple[Tensor, dict[str, float]]:
    """Return draws for an observation, none outside the bounds of the prior, and the share that was inside."""
    low, high = task.bounds()
    x = task.observation(number).reshape(1, -1)
    found, drawn = [], 0
    while sum(map(len, found)) < NUM_DRAWS and drawn < MOST_ROUNDS * OUTSIDE * NUM_DRAWS:
        draws = estimator.sample((OUTSIDE * NUM_DRAWS,), condition=x)[:, 0]
        drawn += len(draws)
        found.append(draws[((draws >= low) & (draws <= high)).all(-1)])
    inside = torch.cat(found)
    if len(inside) < NUM_DRAWS:
        raise SystemExit(f"{task.name}: of {drawn} draws only {len(inside)} are inside the prior's bounds")
    return inside[:NUM_DRAWS], {"inside": len(inside) / drawn}


class _Nobody:
    """A guide that samples all parameters from the model's prior: who draws simulations only."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, x: Tensor, observations: Mapping[str, Tensor] | None = None) -> None:
        with pyro.poutine.block(hide_fn=lambda site: bool(site.get("is_observed"))):
            self.task.model(x)


def prepare(task: Task, trained: str, simulations: int, seed: int, results: Results, work: Path) -> Path:
    """Train a guide if that has not been done; return where it is saved."""
    base = f"{task.name}/{trained}/{simulations}/{seed}"
    path = work / f"{base.replace('/', '-').replace(' ', '_')}.safetensors"
    if base not in results or not path.exists():
        figures = train(task, trained, simulations, seed, path)
        results.append(base, {**figures, "date": str(date.today())})
        print(base, figures, flush=True)
    return path


def measure(
    task: Task, name: str, number: int, draws: Tensor, figures: dict[str, float], results: Results
) -> None:
    """Append the C2ST of draws for an observation."""
    begin = time.process_time()
    value = c2st(task.reference(number), draws, seed=1)
    record = {"c2st": value, **figures, "c2st_seconds": time.process_time() - begin}
    results.append(f"{name}/{number}", record)
    print(f"{name}/{number}", record, flush=True)


def run(task: Task, row: str, simulations: int, seed: int, number: int, results: Results, work: Path) -> None:
    """Do one observation of a row, if it is missing: its C2ST, and before it what must be trained."""
    name = f"{task.name}/{row}/{simulations}/{seed}"
    if f"{name}/{number}" in results:
        return
    if row == "auto":
        begin = time.process_time()
        guide = train_auto(task, number, seed)
    else:
        path = prepare(task, row.removesuffix(" reweighted"), simulations, seed, results, work)
        begin = time.process_time()
        guide = load(task, path)
    draws, figures = draw(task, row, guide, number, seed)
    figures["seconds"] = time.process_time() - begin
    measure(task, name, number, draws, figures, results)


def run_npe(
    task: Task, row: str, simulations: int, seed: int, numbers: list[int], results: Results, work: Path
) -> None:
    """Do the observations of a row of the package sbi that are missing."""
    name = f"{task.name}/{row}/{simulations}/{seed}"
    missing = [number for number in numbers if f"{name}/{number}" not in results]
    if not missing:
        return
    if importlib.util.find_spec("sbi") is None:
        print(f"{name}: left out, sbi is not installed")
        return
    path = work / f"{name.replace('/', '-').replace(' ', '_')}.pt"
    if name in results and path.exists():
        estimator = torch.load(path, weights_only=False)
    else:
        estimator, figures = train_npe(task, "nsf" if row == "npe nsf" else "maf", simulations, seed, path)
        results.append(name, {**figures, "date": str(date.today())})
        print(name, figures, flush=True)
    for number in missing:
        torch.manual_seed(seed)
        begin = time.process_time()
        draws, found = draw_npe(task, estimator, number)
        measure(task, name, number, draws, {**found, "seconds": time.process_time() - begin}, results)


def each(plan: Plan) -> Iterator[tuple[str, str, int]]:
    """Yield the task, the row and the number of simulations of each part of a plan."""
    for tasks, rows, simulations in plan:
        yield from ((task, row, simulations) for task in tasks for row in rows)


def main() -> None:
    """Run rows from the command line."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--study", action="store_true", help="all rows of the page, in order")
    parse.add_argument("--task", nargs="*", default=["two_moons"], choices=list(TASKS))
    parse.add_argument("--rows", nargs="*", default=["spline", "spline reweighted"])
    parse.add_argument("--simulations", type=int, default=1000)
    parse.add_argument("--seed", type=int, default=0)
    every = list(range(1, NUM_OBSERVATIONS + 1))
    parse.add_argument(
        "--only", nargs="*", type=int, default=every, choices=every, help="numbers of observations"
    )
    add_places(parse, "sbibm")
    args = parse.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    results = Results(args.results)
    wanted = ((args.task, args.rows, args.simulations),)
    plans = [(STUDY, 0), *((SEEDED, seed) for seed in SEEDS)] if args.study else [(wanted, args.seed)]
    for plan, seed in plans:
        for number in args.only:  # the first observation of all rows first
            for task, row, simulations in each(plan):
                if not row.startswith("npe"):
                    run(TASKS[task], row, simulations, seed, number, results, args.work)
        for task, row, simulations in each(plan):
            if row.startswith("npe"):
                run_npe(TASKS[task], row, simulations, seed, args.only, results, args.work)


if __name__ == "__main__":
    main()
