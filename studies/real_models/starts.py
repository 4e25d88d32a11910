"""What guides are worth before any training, on real models, and how long they take to set up.

    python -m studies.real_models.starts --data DATA [--models hierarchical seeds] [--methods ours "ours normal"]

In float64, as the study that trains them (:mod:`studies.real_models.run`): set-up and a measurement by 10,000 draws.
Each run is a line of ``starts.jsonl``; runs that are there are not made again. ``python -m studies.real_models.report``
makes the page.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

from studies.real_models.methods import OURS
from studies.real_models.models import POSTERIORS, find
from studies.real_models.posterior import data_folder, read_reference
from studies.real_models.run import Run, make
from studies.results import Results

RESULTS = Path(__file__).parent / "starts.jsonl"


def main(argv: list[str] | None = None) -> None:
    """Print a line for each model and method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of the posteriors' files")
    parser.add_argument("--models", nargs="*", default=[], help="parts of names, or kinds; all by default")
    parser.add_argument("--methods", nargs="*", default=["ours"], choices=list(OURS), help="kinds of guides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    args = parser.parse_args(argv)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    results = Results(args.out)
    for posterior in find(args.models):
        reference = None
        for method in args.methods:
            run = Run(posterior.name, method, 0.0, 0.0, args.seed)
            if run.key in results:
                continue
            reference = reference or read_reference(data_folder(args.data), posterior.name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                record = make(run, posterior, reference)
            results.append(run.key, record)
            print(run.model, *cells(record), sep=" | ", flush=True)


def cells(record: dict[str, Any]) -> list[str]:
    """Return method, set-up, ELBO, gap, k-hat, the largest error of a mean, and ratios of standard deviations."""
    if "failure" in record:
        return [record["method"], record["failure"]]
    gap = f"{record['gap']:.2f}" if "gap" in record else ""
    errors = record["errors"]
    return [
        record["method"],
        f"{record['setup_seconds']:.1f}",
        f"{record['elbo']:.2f}",
        f"{record['elbo_error']:.2f}",
        gap,
        f"{float(record['k_hat']):.2f}",
        f"{errors['mean_max']:.2f}",
        f"{errors['sd_min']:.2f}–{errors['sd_max']:.2f}",
    ]


def page(records: list[dict[str, Any]]) -> str:
    """Return the page."""
    order = {name: i for i, name in enumerate(POSTERIORS)}
    heads = "model | method | set-up s | ELBO | its error | gap | k-hat | mean off | sd"
    lines = [
        "# Guides on real models before training",
        "",
        "The default guide as it is set up, in float64, with seed 0, on 2 CPU cores, shared, 1 December 2026: seconds "
        "of processor time, ELBO and its standard error by 10,000 draws (nats), the gap to the evidence where it is "
        "known, the Pareto shape of the weights, the largest error of a posterior mean in reference standard "
        "deviations, and the smallest and the largest ratio of standard deviations, none of them weighted.",
        "",
        "Made by `python -m studies.real_models.report` from `studies/real_models/starts.jsonl`; "
        "`python -m studies.real_models.starts --data DATA` does the runs that are missing.",
        "",
        f"| {heads} |",
        f"|{'---|' * (heads.count('|') + 1)}",
    ]
    for record in sorted(records, key=lambda each: order[each["model"]]):
        found = cells(record)
        found += [""] * (heads.count("|") - len(found))
        lines.append(f"| {record['model']} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
