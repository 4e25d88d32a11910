"""Where training ends, from the same start with other draws: the gap on the way and at the end, for units of knots.

    python -m studies.real_models.ends --data DATA [--models eight seeds_data gp_pois] [--units 0.3 1] [--seeds 1 2 3]

The default guide in float64 is trained by ``Trace_ELBO`` with one particle and Adam for 3,000 steps; the rate is .01
for half of them and then falls to a hundredth of it. Only the draws of training differ between seeds. Every 250 steps
the ELBO is a mean over 2,000 draws, at the end over 10,000. Each run is a line of ``ends.jsonl``; runs that are there
are not made again. ``python -m studies.real_models.report`` makes the table.
"""

import argparse
import statistics
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO

from pyro_graphflows.guides.conditionals import spline
from studies.real_models.measure import weigh
from studies.real_models.methods import make_guide, parameters
from studies.real_models.models import find
from studies.real_models.posterior import Posterior, Reference, data_folder, read_reference
from studies.results import Results

RESULTS = Path(__file__).parent / "ends.jsonl"
MODELS = ("eight_schools", "seeds_data", "gp_pois")
RATE, LAST, STEPS, EVERY = 0.01, 0.01, 3000, 250
FEW, MANY, AT_ONCE = 2000, 10_000, 1000


def train(posterior: Posterior, reference: Reference, seed: int) -> dict[str, Any]:
    """Train a guide; return gaps, before, on the way and at the end, and the standard error of the last."""
    args = posterior.arguments(reference.data)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = make_guide("ours", posterior.model, args)

    def gap(number: int) -> tuple[float, float]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            runs = [
                weigh(posterior.model, guide, args, posterior.plates, AT_ONCE)
                for _ in range(number // AT_ONCE)
            ]
        weights = torch.cat([weights for weights, _ in runs])
        assert reference.log_evidence is not None
        return reference.log_evidence - float(weights.mean()), float(weights.std()) / number**0.5

    start = gap(MANY)[0]
    pyro.set_rng_seed(seed)
    optimizer = torch.optim.Adam(parameters(guide), lr=RATE)
    loss_of, path = Trace_ELBO().differentiable_loss, []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * LAST ** max(0.0, 2 * step / STEPS - 1)
        optimizer.zero_grad()
        loss_of(posterior.model, guide, *args).backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            path.append(gap(FEW)[0])
    end, error = gap(MANY)
    return {"start": start, "path": path, "end": end, "error": error}


def section(records: list[dict[str, Any]]) -> str:
    """Return the part of the page."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["model"], record["unit"]].append(record)
    lines = [
        "",
        "## Where training ends",
        "",
        f"The default guide in float64, {STEPS:,} steps at {RATE:g}, falling to {LAST:g} of it in the second half, "
        "from one start with several seeds of the draws, for two units in which knots of splines are trained (.3 is "
        "that of guides that start for one data set). Nats from the evidence: of the start; the median over seeds of "
        f"the median of every {EVERY} steps and the worst of all; the ends, in order, and the standard error of one. "
        "Made by `python -m studies.real_models.report` from `studies/real_models/ends.jsonl`; `python -m "
        "studies.real_models.ends --data DATA` does the runs that are missing.",
        "",
        "| model | unit of knots | start | on the way: median | worst | ends | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, unit), group in sorted(groups.items()):
        median = statistics.median(statistics.median(record["path"]) for record in group)
        worst = max(max(record["path"]) for record in group)
        ends = ", ".join(f"{end:.3f}" for end in sorted(record["end"] for record in group))
        error = statistics.median(record["error"] for record in group)
        lines.append(
            f"| {model} | {unit:g} | {group[0]['start']:.3f} | {median:.3f} | {worst:.3f} | {ends} | {error:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Do the runs that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of the posteriors' files")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="parts of names; with an evidence")
    parser.add_argument("--units", nargs="*", type=float, default=[spline.KNOT_UNIT, 1.0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    args = parser.parse_args(argv)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    results = Results(args.out)
    for posterior in find(args.models):
        reference = read_reference(data_folder(args.data), posterior.name)
        for seed in args.seeds:
            for unit in args.units:
                key = f"{posterior.name} unit {unit:g} seed {seed}"
                if key in results:
                    continue
                usual, spline.KNOT_UNIT = spline.KNOT_UNIT, unit
                record = {"model": posterior.name, "unit": unit, "seed": seed}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        record |= train(posterior, reference, seed)
                    finally:
                        spline.KNOT_UNIT = usual
                results.append(key, record)
                print(f"{key}: worst {max(record['path']):.3f}, end {record['end']:.4f}", flush=True)


if __name__ == "__main__":
    main()
