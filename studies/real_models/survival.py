"""Whether starts on real models survive training: the loss before it and after a few steps, at two rates.

    python -m studies.real_models.survival --data DATA [--models hierarchical seeds] [--seed 0]

The default guide, in float32 and on raw units, is trained by ``Trace_ELBO`` with one particle and Adam at a constant
rate. The loss is the mean over 1,000 draws, in nats; what is printed is by how much it is above that of the start after
1, 10, 50 and 200 steps, with its standard error after the last one. Each run is a line of ``survival.jsonl``; runs that
are there are not made again. ``python -m studies.real_models.report`` makes the page.
"""

import argparse
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.infer import importance_log_weights
from studies.real_models.models import find
from studies.real_models.posterior import Posterior, data_folder, read_reference
from studies.real_models.run import brief
from studies.results import Results

RESULTS = Path(__file__).parent / "survival.jsonl"
RATES = (1e-3, 1e-2)
MARKS = (0, 1, 10, 50, 200)
DRAWS, AT_ONCE = 1000, 100


def loss_of(model: Any, guide: Any, args: tuple[Any, ...]) -> tuple[float, float]:
    """Return the mean of the loss over draws, and its standard error."""
    weights = importance_log_weights(
        model, guide, *args, num_particles=DRAWS, data_plate=False, chunk_size=AT_ONCE
    ).double()
    return -float(weights.mean()), float(weights.std()) / DRAWS**0.5


def walk(posterior: Posterior, args: tuple[Any, ...], rate: float, seed: int) -> dict[str, Any]:
    """Set a guide up and train it; return the losses."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = time.process_time()
    guide = auto_faithful_guide(posterior.model, *args)
    record: dict[str, Any] = {"setup_seconds": time.process_time() - start, "losses": [], "errors": []}
    svi = SVI(posterior.model, guide, Adam({"lr": rate}), Trace_ELBO())
    done = 0
    for mark in MARKS:
        while done < mark:
            svi.step(*args)
            done += 1
        loss, error = loss_of(posterior.model, guide, args)
        record["losses"].append(loss)
        record["errors"].append(error)
    return record


def in_float32(value: Any) -> Any:
    """Return an argument of a model in float32."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def main(argv: list[str] | None = None) -> None:
    """Print a line for each model and rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of the posteriors' files")
    parser.add_argument("--models", nargs="*", default=[], help="parts of names, or kinds; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results(args.out)
    for posterior in find(args.models):
        for rate in RATES:
            record: dict[str, Any] = {"model": posterior.name, "rate": rate, "seed": args.seed}
            key = f"{posterior.name} rate {rate:g} seed {args.seed}"
            if key in results:
                continue
            reference = read_reference(data_folder(args.data), posterior.name)
            data = tuple(map(in_float32, posterior.arguments(reference.data)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    record |= walk(posterior, data, rate, args.seed)
                except Exception as error:  # a guide's failure is a result
                    record["failure"] = brief(error)
            results.append(key, record)
            print(said(record), flush=True)


def said(record: dict[str, Any]) -> str:
    """Return a line for a record."""
    return f"{record['model']}, {record['rate']:g}: " + ", ".join(cells(record))


def cells(record: dict[str, Any]) -> list[str]:
    """Return the loss of the start, what is added to it at each mark, and the error of the last difference."""
    if "failure" in record:
        return [record["failure"]]
    first, *later = record["losses"]
    error = math.hypot(record["errors"][0], record["errors"][-1])
    return [f"{first:.2f}", *(f"{loss - first:+.2f}" for loss in later), f"{error:.2f}"]


def page(records: list[dict[str, Any]]) -> str:
    """Return the page."""
    steps = " | ".join(f"after {mark}" for mark in MARKS[1:])
    lines = [
        "# What training does to starts on real models",
        "",
        "The default guide in float32 and on raw units, by `Trace_ELBO` with one particle and Adam at a constant rate, "
        "on 2 CPU cores, shared, 28 November to 1 December 2026. Where a start is bad, its loss is that of the "
        f"furthest draws. The loss of the start is a mean over {DRAWS:,} draws, in nats; beside it by how much the "
        "loss is above it "
        f"after {', '.join(map(str, MARKS[1:-1]))} and {MARKS[-1]} steps, and the standard error of the last of these.",
        "",
        "Made by `python -m studies.real_models.report` from `studies/real_models/survival.jsonl`; "
        "`python -m studies.real_models.survival --data DATA` does the runs that are missing.",
        "",
        f"| model | rate | start | {steps} | error |",
        f"|---|---|---|{'---|' * len(MARKS[1:])}---|",
    ]
    for record in records:
        found = cells(record)
        found += [""] * (len(MARKS) + 1 - len(found))
        lines.append(f"| {record['model']} | {record['rate']:g} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
