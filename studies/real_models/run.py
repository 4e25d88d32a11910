"""Train guides on real models for equal processor time and write down what they reach.

    python -m studies.real_models.run --data DATA                                    # all that is missing
    python -m studies.real_models.run --data DATA --models hierarchical --methods AutoNormal ours --seconds 5
    python -m studies.real_models.run --data DATA --methods pyro --seeds 0 --workers 2
    python -m studies.real_models.report                                            # the page from the results

Each (model, method) is trained for 5 seconds with seed 0 at each of three learning rates; the rate with the best ELBO,
less two standard errors, is taken for all other runs of the pair. A run is one line of ``results.jsonl``, so that an
interrupted study goes on where it stopped; runs that are there are not made again.

Training: ``Trace_ELBO`` with one particle and Adam, in float64 and one thread; the rate is constant for half of the
time and then falls exponentially to a hundredth. Time is processor time of the process, set-up not counted (it is
reported).
A run whose loss or parameters stop being finite, or that raises an error, is a failure and is written down as one.
"""

import argparse
import math
import multiprocessing
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO

from studies.real_models.measure import measure
from studies.real_models.methods import METHODS, OURS, PYRO, make_guide, parameters
from studies.real_models.models import POSTERIORS, find
from studies.real_models.posterior import Posterior, Reference, data_folder, read_reference
from studies.results import Results

RESULTS = Path(__file__).parent / "results.jsonl"
RATES = (1e-3, 1e-2, 1e-1)
CHOICE_SECONDS, CHOICE_SEED = 5.0, 0
LAST = 0.01  # of the rate, at the end
LONG_KINDS = {"hierarchical", "mixture", "time series", "gaussian process", "differential equation"}
WEIGHTS_AT_ONCE = 400_000  # draws at once times the number of observed values


@dataclass(frozen=True)
class Run:
    """What identifies a run."""

    model: str
    method: str
    rate: float
    seconds: float
    seed: int

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Run":
        """Return the run of a record."""
        return cls(**{key: record[key] for key in ("model", "method", "rate", "seconds", "seed")})

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return f"{self.model} {self.method} rate {self.rate:g} {self.seconds:g} s seed {self.seed}"

    def record(self) -> dict[str, Any]:
        """Return its fields."""
        return dict(self.__dict__)


def seeds_of(posterior: Posterior) -> list[int]:
    """Return the seeds of a full study."""
    return [1, 2, 3] if posterior.kind in LONG_KINDS else [1]


def brief(error: BaseException) -> str:
    """Return an error's kind and the first line of its message."""
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


def train(
    model: Any, guide: Any, args: tuple[Any, ...], rate: float, seconds: float, progress: dict[str, Any]
) -> None:
    """Train a guide for some processor time; ``progress`` has the number of steps, also after an error.

    Raises:
        FloatingPointError: If parameters stop being finite.
    """
    values = parameters(guide)
    optimizer = torch.optim.Adam(values, lr=rate)
    loss_of = Trace_ELBO().differentiable_loss
    progress.update(steps=0, nonfinite_losses=0)
    start = time.process_time()
    while (spent := time.process_time() - start) < seconds:
        fall = max(0.0, 2 * spent / seconds - 1)
        for group in optimizer.param_groups:
            group["lr"] = rate * LAST**fall
        optimizer.zero_grad()
        loss = loss_of(model, guide, *args)
        loss.backward()
        optimizer.step()
        progress["steps"] += 1
        progress["train_seconds"] = time.process_time() - start
        if not math.isfinite(loss.item()):
            progress["nonfinite_losses"] += 1
            if not all(bool(torch.isfinite(value).all()) for value in values):
                raise FloatingPointError(
                    f"parameters are not finite after step {progress['steps']}; the loss was {loss.item()}"
                )


def observed_values(args: tuple[Any, ...]) -> int:
    """Return the size of the largest argument: what a batch of draws multiplies."""
    return max([value.numel() for value in args if isinstance(value, torch.Tensor)] + [1])


def make(run: Run, posterior: Posterior, reference: Reference) -> dict[str, Any]:
    """Do a run and return its record."""
    record: dict[str, Any] = run.record() | {"kind": posterior.kind, "load": os.getloadavg()[0]}
    args = posterior.arguments(reference.data)
    pyro.clear_param_store()
    pyro.set_rng_seed(run.seed)
    progress: dict[str, Any] = {}
    stage = "set-up"
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            guide = make_guide(run.method, posterior.model, args)
            record["setup_seconds"] = time.process_time() - start
            stage = "training"
            train(posterior.model, guide, args, run.rate, run.seconds, progress)
            stage = "evaluation"
            pyro.set_rng_seed(10_000 + run.seed)
            chunk = max(10, min(1_000, WEIGHTS_AT_ONCE // observed_values(args)))
            start = time.process_time()
            record |= measure(posterior, reference, guide, args, chunk)
            record["evaluation_seconds"] = time.process_time() - start
            if not math.isfinite(record["elbo"]) or not math.isfinite(record["elbo_error"]):
                raise FloatingPointError(f"the ELBO is {record['elbo']:.3g} +- {record['elbo_error']:.3g}")
        except Exception as error:  # a guide's failure is a result
            record |= {"failure": brief(error), "stage": stage}
    record |= progress
    if progress.get("steps"):
        record["step_seconds"] = progress["train_seconds"] / progress["steps"]
    return finite(record)


def finite(value: Any) -> Any:
    """Write numbers that JSON does not have as text."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def best_rate(records: list[dict[str, Any]], model: str, method: str) -> float | None:
    """Return the rate with the best ELBO among the runs that choose it, or None if all of them failed.

    Two standard errors are taken off: the draws of a guide that diverged may be so large that their densities, and so
    the ELBO, are rounding errors of any size.
    """
    chosen = [
        record
        for record in records
        if (record["model"], record["method"]) == (model, method)
        and (record["seconds"], record["seed"]) == (CHOICE_SECONDS, CHOICE_SEED)
        and "failure" not in record
    ]
    return (
        max(chosen, key=lambda record: record["elbo"] - 2 * record["elbo_error"])["rate"] if chosen else None
    )


@dataclass(frozen=True)
class Pair:
    """The runs of one model and one method that are asked for."""

    model: str
    method: str
    seconds: tuple[float, ...]
    seeds: tuple[int, ...]
    folder: Path
    out: Path


def do_pair(pair: Pair) -> None:
    """Do the missing runs of a pair, the rate first, and append them."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    posterior = POSTERIORS[pair.model]
    reference = None
    results = Results(pair.out)
    records = list(results.read().values())
    done = {Run.of(record) for record in records}

    def ensure(run: Run) -> None:
        nonlocal reference
        if run in done:
            return
        reference = reference or read_reference(pair.folder, pair.model)
        record = make(run, posterior, reference)
        results.append(run.key, record)
        records.append(record)
        done.add(run)
        outcome = record.get("failure") or f"ELBO {record['elbo']:.2f}, {record['steps']} steps"
        print(
            f"{run.model} · {run.method} · rate {run.rate:g} · {run.seconds:g} s · seed {run.seed}: {outcome}",
            flush=True,
        )

    for rate in RATES:
        ensure(Run(pair.model, pair.method, rate, CHOICE_SECONDS, CHOICE_SEED))
        if setup_failures(records, pair.model, pair.method):
            return  # another rate or seed cannot help
    rate_chosen = best_rate(records, pair.model, pair.method)
    if rate_chosen is None:
        return
    for seconds in pair.seconds:
        for seed in pair.seeds:
            ensure(Run(pair.model, pair.method, rate_chosen, seconds, seed))


def setup_failures(records: list[dict[str, Any]], model: str, method: str) -> list[dict[str, Any]]:
    """Return the runs of a pair that failed before training."""
    return [
        record
        for record in records
        if (record["model"], record["method"]) == (model, method) and record.get("stage") == "set-up"
    ]


def methods_of(words: list[str]) -> list[str]:
    """Return methods by name; ``pyro`` and ``ours`` alone mean groups where no method has that name.

    Raises:
        SystemExit: If a word is no method.
    """
    groups = {"pyro": list(PYRO), "all-ours": list(OURS), "all": list(METHODS)}
    result: list[str] = []
    for word in words:
        if word not in groups and word not in METHODS:
            raise SystemExit(f"Expected methods among {', '.join([*METHODS, *groups])}; got {word!r}.")
        result += groups.get(word, [word])
    return list(dict.fromkeys(result))


def main(argv: list[str] | None = None) -> None:
    """Do the runs that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of the posteriors' files")
    parser.add_argument("--models", nargs="*", default=[], help="parts of names, or kinds; all by default")
    parser.add_argument("--methods", nargs="*", default=["all"], help="names, or: pyro, all-ours, all")
    parser.add_argument("--seconds", nargs="*", type=float, default=[5.0, 20.0], help="of processor time")
    parser.add_argument("--seeds", nargs="*", type=int, help="1 2 3 by default, 1 on plain regressions")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    flags = parser.parse_args(argv)
    folder = data_folder(flags.data)
    pairs = [
        Pair(
            posterior.name,
            method,
            tuple(flags.seconds),
            tuple(flags.seeds if flags.seeds is not None else seeds_of(posterior)),
            folder,
            flags.out,
        )
        for posterior in find(flags.models)
        for method in methods_of(flags.methods)
    ]
    if flags.workers == 1:
        for pair in pairs:
            do_pair(pair)
    else:
        with multiprocessing.get_context("spawn").Pool(flags.workers, maxtasksperchild=1) as pool:
            for _ in pool.imap_unordered(do_pair, pairs, chunksize=1):
                pass


if __name__ == "__main__":
    main()
