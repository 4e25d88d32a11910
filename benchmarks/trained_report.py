"""The page of ``trained_guides.py``: one table for each part, with a row for each problem, guide and start."""

import math
from collections.abc import Callable
from typing import Any

__all__ = ["page"]

Run = dict[str, Any]
Column = tuple[str, Callable[[list[Run]], str]]


def mean_and_error(values: list[float]) -> str:
    """Return the mean over seeds with its standard error; without one for a single seed."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.4f} ± {deviation / math.sqrt(len(values)):.4f}"


def _gap(run: Run) -> float:
    return run["loss"] + run["exact"] if run["exact"] is not None else run["gap"]


def _reached(runs: list[Run]) -> str:
    if not runs[0].get("bound"):
        return "–"
    when = [run["reached"] for run in runs]
    return "not" if None in when else f"{max(when):.0f}"


def _khat(runs: list[Run]) -> str:
    return f"{max(run['khat'] for run in runs):.2f}" if "khat" in runs[0] else "–"


WHO: list[Column] = [("problem", lambda runs: runs[0]["problem"]), ("guide", lambda runs: runs[0]["guide"])]
START: Column = ("start", lambda runs: runs[0]["start"])
GAP: Column = ("gap", lambda runs: mean_and_error([_gap(run) for run in runs]))
NOISE: Column = ("± by draws", lambda runs: f"{max(run['error'] for run in runs):.4f}")
BOUND: list[Column] = [
    ("bound", lambda runs: str(runs[0].get("bound") or "–")),
    ("reached after (s)", _reached),
]
ELBO: Column = ("ELBO", lambda runs: mean_and_error([-run["loss"] for run in runs]))
KHAT: Column = ("k-hat", _khat)
EVIDENCE: Column = (
    "log-evidence by importance sampling",
    lambda runs: mean_and_error([run["log_evidence"] for run in runs]),
)
SHAPE: list[Column] = [
    ("most latent parents", lambda runs: str(runs[0]["latent_parents"])),
    ("sampling levels", lambda runs: str(runs[0]["levels"])),
]
COST: list[Column] = [
    ("steps", lambda runs: str(max(run["steps"] for run in runs))),
    ("trained (s)", lambda runs: f"{max(run['seconds'] for run in runs):.0f}"),
    ("seeds", lambda runs: str(len(runs))),
]

# part -> title, text, columns
SECTIONS: dict[str, tuple[str, str, list[Column]]] = {
    "networks": (
        "Gene and wheat networks",
        "Raw scale, leaves observed, fresh batches of 100, SVI with one particle. The gap is the exact "
        "E_x KL(q || p(. | x)), on 2,000 test data; *reached* is the longest time over seeds until it first was "
        "below the bound.",
        [*WHO, START, GAP, NOISE, *BOUND, *COST],
    ),
    "circuit": (
        "Arithmetic circuit",
        "The gap is the loss minus E[-log p(x)] by numerical integration, on the same 2,000 data. The inverse is the "
        "one that `auto` finds. Data have heavy tails: the gaps of *default* and *normal* are nearly all those of two "
        "data with x0 below -55, whose gradients the optimiser cuts off; they were 4 after 1,200 and 6 after 600 "
        "steps.",
        [*WHO, GAP, NOISE, *BOUND, *COST],
    ),
    "groups": (
        "Group effects",
        "One data set; ELBO after training (20,000 draws), its gap to the exact log-evidence by integration, Pareto "
        "k-hat of 20,000 joint importance weights (the largest of the seeds), and the estimate of the log-evidence by "
        "these. All guides with the same optimiser, steps and particles (16).",
        [*WHO, ELBO, GAP, NOISE, KHAT, EVIDENCE, *COST],
    ),
    "groups-long": (
        "Group effects, three times as long",
        "The same with 18,000 steps: have the guides above converged?",
        [*WHO, ELBO, GAP, NOISE, KHAT, EVIDENCE, *COST],
    ),
    "mixture": (
        "Mixture with enumerated assignments",
        "Two components with unknown centres, 30 data, `TraceEnum_ELBO`; the gap is to the exact log-evidence by "
        "integration over the centres.",
        [*WHO, ELBO, GAP, NOISE, *COST],
    ),
    "chains": (
        "State-space models of length 20",
        "The gap is the loss minus the exact mean of -log p(x), or minus its estimate by 2,000 importance samples "
        "(then with the 90 % quantile of k-hat over data).",
        [*WHO, GAP, NOISE, KHAT, *SHAPE, *COST],
    ),
}


def page(results: list[Run]) -> str:
    """Return the page of all runs."""
    exact = {run["problem"]: run["exact"] for run in results if run["exact"] is not None}
    by: dict[tuple[str, str, str, str], list[Run]] = {}
    for run in results:
        key = (run["part"], run["problem"], run["guide"], run["start"])
        by.setdefault(key, []).append({**run, "exact": exact.get(run["problem"])})
    lines = [
        "# Trained guides",
        "",
        "Made by `python -m benchmarks.trained_guides --out docs/results` (one thread, 2 CPU cores, shared; processor "
        f"seconds; last run {max(run['date'] for run in results)}). Means over seeds ± standard error of the mean; "
        "*± by draws* is the largest standard error of one seed's value over draws of the guide. Nats.",
    ]
    for part, (title, text, columns) in SECTIONS.items():
        rows = [runs for key, runs in by.items() if key[0] == part]
        if not rows:
            continue
        lines += ["", f"## {title}", "", text, ""]
        lines.append("| " + " | ".join(header for header, _ in columns) + " |")
        lines.append("|" + "---|" * len(columns))
        lines += ["| " + " | ".join(cell(runs) for _, cell in columns) + " |" for runs in rows]
    return "\n".join(lines) + "\n"
