"""Guides trained to the end, beside exact answers and beside Pyro's own guides.

    python -m benchmarks.trained_guides --out docs/results            # every run that is not there yet; then the page
    python -m benchmarks.trained_guides --only ecoli70 circuit --seeds 1 --out /tmp/results
    python -m benchmarks.trained_guides --page --out docs/results     # the page from the saved runs

The parts; each run is a line of OUT/guides/results.jsonl, so that an interrupted study goes on where it stopped:

- *networks*: ecoli70 and magic-niab, raw scale, leaves observed, fresh batches of 100, SVI with one particle: the exact
  mean of KL(q || p(. | x)) over data, for every family and start, and the time at which it first was below its bound.
- *circuit*: the arithmetic circuit (products, tanh, Laplace priors): ELBO beside E[-log p(x)] by numerical integration.
- *groups*: eight schools (centred), varying intercepts and slopes: ELBO and Pareto k-hat on one data set, beside Pyro's
  automatic guides, all with the same optimiser, steps and particles; *groups-long*: the best with three times as many.
- *mixture*: two components with unknown centres, assignments enumerated by the model; the evidence by integration.
- *chains*: state-space models of length 20 (normal, and stochastic volatility): ELBO, exact or by importance sampling.

The page is made by ``trained_report.py``. Times are processor seconds of one thread, evaluation left out.
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal, AutoStructured

from benchmarks.guide_problems import PROBLEMS, Problem
from benchmarks.trained_report import page
from pyro_graphflows import Auto, Flow, Normal, auto_faithful_guide, log_evidence
from pyro_graphflows.guides import Family
from studies.results import Results

FAMILIES: dict[str, Family] = {
    "default": Auto(),
    "normal": Normal(),
    "flow": Flow(),
    "graphical": Flow(form="graphical"),
}
PYRO_GUIDES: dict[str, Callable[..., Any]] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoStructured": lambda model: AutoStructured(model, conditionals="mvn", dependencies="linear"),
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, num_transforms=2),
}

# part -> problems, guides, starts, number of seeds, and settings of the training
PARTS: dict[str, dict[str, Any]] = {
    "networks": {
        "problems": ["ecoli70", "magic-niab"],
        "guides": ["normal", "flow"],
        "starts": ["regression", "random"],
        "seeds": 3,
        "steps": {"regression": 2000, "random": 5000},
        "lr": {"regression": 2e-3, "random": 1e-2},
        "bounds": {"regression": 0.02, "random": 0.3},
        "seconds": 300.0,
    },
    "circuit": {
        "problems": ["circuit"],
        "guides": ["default", "normal", "flow"],
        "starts": ["regression"],
        "seeds": 2,
        "steps": 12_000,
        "lr": 5e-3,
        "last": 0.03,  # of the rate; much is learned late
        "bounds": 0.15,
        "seconds": 600.0,
    },
    "groups": {
        "problems": ["schools", "slopes"],
        "guides": ["default", "normal", "flow", *PYRO_GUIDES],
        "starts": ["regression"],
        "seeds": 3,
        "steps": 6000,
        "lr": 0.01,
        "particles": 16,
        "seconds": 600.0,
    },
    "mixture": {
        "problems": ["mixture"],
        "guides": ["normal", "flow"],
        "starts": ["regression"],
        "seeds": 3,
        "steps": 1000,
        "lr": 0.02,
        "particles": 4,
        "loss": TraceEnum_ELBO,
        "seconds": 300.0,
    },
    "chains": {
        "problems": ["chain", "volatility"],
        "guides": ["normal", "flow"],
        "starts": ["regression"],
        "seeds": 2,
        "steps": 3000,
        "lr": 5e-3,
        "seconds": 300.0,
    },
}
PARTS["groups-long"] = {
    **PARTS["groups"],
    "guides": ["flow", "AutoMultivariateNormal", "AutoIAFNormal"],
    "seeds": 1,
    "steps": 18_000,
}


def setting(part: dict[str, Any], key: str, start: str, default: Any = None) -> Any:
    """Return a setting, which may depend on the start."""
    value = part.get(key, default)
    return value[start] if isinstance(value, dict) else value


def make_guide(problem: Problem, name: str, start: str, batch: int) -> Any:
    """Return a guide, compiled if it is ours."""
    if name in PYRO_GUIDES:
        return PYRO_GUIDES[name](problem.model)
    args = problem.test if problem.draw is None else problem.draw(batch)
    return auto_faithful_guide(problem.model, *args, family=FAMILIES[name], init=start, **problem.options)


@torch.no_grad()
def evaluate(
    problem: Problem, guide: Any, draws: int, estimator: Callable[..., Any] = Trace_ELBO
) -> tuple[float, float]:
    """Return the loss on the test data in nats per datum, and its standard error over draws of the guide."""
    options = {"num_particles": 100, "vectorize_particles": True, "max_plate_nesting": 1}
    elbo = estimator(**options) if problem.draw is None else estimator()
    losses = torch.tensor([elbo.loss(problem.model, guide, *problem.test) for _ in range(draws)])
    losses = losses / problem.num_data
    return float(losses.mean()), float(losses.std() / len(losses) ** 0.5)


def run(problem: Problem, name: str, start: str, seed: int, part: dict[str, Any]) -> dict[str, Any]:
    """Train one guide and return what happened."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    batch, particles = 100, part.get("particles", 1)
    steps, lr = setting(part, "steps", start), setting(part, "lr", start)
    begin = time.process_time()
    guide = make_guide(problem, name, start, batch)
    spent = time.process_time() - begin
    size = 1 if problem.draw is None else batch
    options = {
        "lr": lr,
        "lrd": part.get("last", 0.01) ** (1 / steps),
        "betas": (0.9, 0.99),
        "clip_norm": 10.0 * size,
    }
    vectorize = {"num_particles": particles, "vectorize_particles": True, "max_plate_nesting": 1}
    estimator = part.get("loss", Trace_ELBO)
    loss = estimator(**vectorize) if particles > 1 else estimator()
    svi = SVI(problem.model, guide, pyro.optim.ClippedAdam(options), loss)
    history = []
    for step in range(steps + 1):
        done = step == steps or spent > part["seconds"]
        if done or step % (steps // 20) == 0:
            value, error = evaluate(problem, guide, 10 if problem.draw is None else 3, estimator)
            history.append({"step": step, "seconds": round(spent, 2), "loss": value, "error": error})
        if done:
            break
        args = problem.test if problem.draw is None else problem.draw(batch)
        begin = time.process_time()
        svi.step(*args)
        spent += time.process_time() - begin
    value, error = evaluate(problem, guide, 200 if problem.draw is None else 10, estimator)
    result = {
        "problem": problem.name, "guide": name, "start": start, "seed": seed, "steps": step, "lr": lr,
        "seconds": round(spent, 1), "loss": value, "error": error, "exact": problem.exact, "history": history,
        "date": str(date.today()), "machine": platform.machine(),
    }  # fmt: skip
    if problem.draw is None and estimator is Trace_ELBO:
        evidence = log_evidence(
            problem.model, guide, *problem.test, num_particles=20_000, data_plate=False, max_plate_nesting=1
        )
        result["khat"], result["log_evidence"] = float(evidence.khat), float(evidence.log_evidence)
    elif problem.exact is None:
        evidence = log_evidence(problem.model, guide, *(a[:200] for a in problem.test), num_particles=2000)
        own = Trace_ELBO().loss(problem.model, guide, *(a[:200] for a in problem.test)) / 200
        result["gap"] = float(evidence.log_evidence.mean()) + own
        result["khat"] = float(evidence.khat.quantile(0.9))
    bound = setting(part, "bounds", start)
    if bound is not None and problem.exact is not None:
        reached = [row["seconds"] for row in history if row["loss"] + problem.exact < bound]
        result["bound"], result["reached"] = bound, reached[0] if reached else None
    if name in FAMILIES:
        latents = set(guide.inverse.parents)
        parents = guide.inverse.parents.values()
        result["latent_parents"] = max(len(latents.intersection(p)) for p in parents)
        result["levels"] = len(guide.inverse.levels)
    return result


def main() -> None:
    """Make the runs that are missing, then the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="out", help="guides.md and the folder guides go there")
    parser.add_argument("--only", nargs="*", help="parts, problems, guides or starts")
    parser.add_argument("--guides", nargs="*", help="of these, only some guides")
    parser.add_argument("--seeds", type=int, help="the number of seeds")
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    saved = Results(Path(args.out) / "guides" / "results.jsonl")
    problems: dict[str, Problem] = {}
    jobs = [
        (seed, part, problem, guide, start)
        for part, plan in PARTS.items()
        for seed in range(args.seeds or plan["seeds"])
        for problem in plan["problems"]
        for guide in plan["guides"]
        for start in plan["starts"]
        if not args.only or {part, problem, guide, start} & set(args.only)
        if not args.guides or guide in args.guides
    ]
    for seed, part, key, guide, start in [] if args.page else sorted(jobs, key=lambda job: job[0]):
        name = f"{part}-{key}-{guide}-{start}-{seed}"
        if name in saved:
            continue
        torch.set_default_dtype(
            torch.float64 if part in ("networks", "groups", "groups-long", "mixture") else torch.float32
        )
        if key not in problems:
            problems[key] = PROBLEMS[key]()
        result = {"part": part, **run(problems[key], guide, start, seed, PARTS[part])}
        saved.append(name, result)
        print(json.dumps({k: v for k, v in result.items() if k != "history"}), flush=True)
    results = list(saved.read().values())
    if results:
        text = page(results)
        (Path(args.out) / "guides.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
