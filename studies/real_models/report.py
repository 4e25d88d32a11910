"""Make the page and the picture of the study from its results.

python -m studies.real_models.report                        # docs/results/real_models.md
python -m studies.real_models.report --results some.jsonl --out some/folder
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from studies.real_models import ends, starts, survival
from studies.real_models.methods import METHODS, OURS, PYRO
from studies.real_models.models import POSTERIORS
from studies.real_models.run import CHOICE_SECONDS, CHOICE_SEED, LAST, RATES, RESULTS, best_rate
from studies.results import Results

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHORT = {
    "AutoMultivariateNormal": "AutoMVN",
    "AutoLowRankMultivariateNormal": "AutoLowRank",
}
Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What a method reached on a model in some processor time: averages over seeds, or the first failure."""

    model: str
    method: str
    seconds: float
    seeds: tuple[int, ...]
    rate: float | None
    failure: str | None
    values: dict[str, float]


def flat(record: Record) -> dict[str, float]:
    """Return the numbers of a record, those of its errors with the name of their part before."""
    numbers = {}
    for key, value in record.items():
        if isinstance(value, dict):
            numbers |= {f"{key}.{name}": float(number) for name, number in value.items()}
        elif isinstance(value, int | float) or value in ("inf", "-inf", "nan"):
            numbers[key] = float(value)
    return numbers


def cells(records: list[Record]) -> dict[tuple[str, str, float], Cell]:
    """Average runs over seeds, at the chosen rate; those that chose the rate count only where there are no others."""
    runs: dict[tuple[str, str, float], list[Record]] = defaultdict(list)
    for record in records:
        runs[record["model"], record["method"], record["seconds"]].append(record)
    result = {}
    for (model, method, seconds), group in runs.items():
        rate = best_rate(records, model, method)
        if rate is None:
            failure = next(record["failure"] for record in group if "failure" in record)
            result[model, method, seconds] = Cell(model, method, seconds, (), None, failure, {})
            continue
        chosen = [record for record in group if record["rate"] == rate]
        later = [record for record in chosen if (seconds, record["seed"]) != (CHOICE_SECONDS, CHOICE_SEED)]
        chosen = later or chosen
        if not chosen:
            continue
        failures = [f"seed {record['seed']}: {record['failure']}" for record in chosen if "failure" in record]
        good = [flat(record) for record in chosen if "failure" not in record]
        keys = set.intersection(*map(set, good)) if good else set()
        values = {key: sum(numbers[key] for numbers in good) / len(good) for key in keys}
        seeds = tuple(sorted(record["seed"] for record in chosen))
        result[model, method, seconds] = Cell(
            model, method, seconds, seeds, rate, failures[0] if failures else None, values
        )
    return result


def best_pyro(table: dict[tuple[str, str, float], Cell], model: str, seconds: float) -> float | None:
    """Return the best ELBO of Pyro's guides on a model."""
    elbos = [
        cell.values["elbo"]
        for (name, method, spent), cell in table.items()
        if name == model and spent == seconds and method in PYRO and "elbo" in cell.values
    ]
    return max(elbos) if elbos else None


def distance(table: dict[tuple[str, str, float], Cell], cell: Cell) -> float | None:
    """Return the gap to the log evidence where it is known, else to the best ELBO of Pyro's guides."""
    if "elbo" not in cell.values:
        return None
    if "gap" in cell.values:
        return cell.values["gap"]
    best = best_pyro(table, cell.model, cell.seconds)
    return None if best is None else best - cell.values["elbo"]


def number(value: float) -> str:
    """Write a number with as many digits as it deserves."""
    if abs(value) >= 1e5:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def coverage(records: list[Record], table: dict[tuple[str, str, float], Cell]) -> list[str]:
    """Say what has been run and what has not."""
    models = [name for name in POSTERIORS if any(key[0] == name for key in table)]
    methods = [method for method in METHODS if any(key[1] == method for key in table)]
    loads = [record["load"] for record in records if "load" in record]
    text = [
        "## What has been run",
        "",
        f"{len(records)} runs, on {len(models)} of {len(POSTERIORS)} models with {len(methods)} of {len(METHODS)} "
        f"methods. Not run: methods {', '.join(m for m in METHODS if m not in methods) or 'none'}; "
        f"models {', '.join(name for name in POSTERIORS if name not in models) or 'none'}.",
        "",
        f"Load of the machine at the start of {len(loads)} of these runs: {min(loads):.1f} to {max(loads):.1f}."
        if loads
        else "The machine was shared with other work: a step cost more processor time than it would alone.",
        "",
        "| method | " + " | ".join(f"models at {seconds:g} s, by seeds" for seconds in times(table)) + " |",
        "|---|" + "---|" * len(times(table)),
    ]
    for method in methods:
        counts = []
        for seconds in times(table):
            by_seeds: dict[str, int] = defaultdict(int)
            for cell in table.values():
                if cell.method == method and cell.seconds == seconds:
                    label = ", ".join(map(str, cell.seeds)) if cell.seeds else "failed at every rate"
                    by_seeds[f"seed {label}" if cell.seeds else label] += 1
            counts.append("; ".join(f"{count} ({label})" for label, count in sorted(by_seeds.items())) or "-")
        text.append(f"| {method} | " + " | ".join(counts) + " |")
    return [*text, ""]


def times(table: dict[tuple[str, str, float], Cell]) -> list[float]:
    """Return the processor times that were run."""
    return sorted({key[2] for key in table})


def overview(table: dict[tuple[str, str, float], Cell], seconds: float) -> list[str]:
    """Return the table of distances: models down, methods across."""
    methods = [method for method in METHODS if any(key[1] == method for key in table)]
    text = [
        f"## After {seconds:g} seconds",
        "",
        "Nats below the log evidence where it is known (marked ●), else below the best of Pyro's guides. Bold: the "
        "best of the row. *failed*: see below. Empty: not run.",
        "",
        "| model | " + " | ".join(SHORT.get(method, method) for method in methods) + " |",
        "|---|" + "---|" * len(methods),
    ]
    for name, posterior in POSTERIORS.items():
        row = {method: table.get((name, method, seconds)) for method in methods}
        if not any(row.values()):
            continue
        far = {method: distance(table, cell) for method, cell in row.items() if cell}
        known = [value for value in far.values() if value is not None]
        entries = []
        for method in methods:
            value, cell = far.get(method), row[method]
            if value is None:
                entries.append("*failed*" if cell else "")
            else:
                entry = f"**{number(value)}**" if value == min(known) else number(value)
                entries.append(entry + (" (*a seed failed*)" if cell and cell.failure else ""))
        evidence = any(cell and "gap" in cell.values for cell in row.values())
        text.append(f"| {name} ({posterior.kind}){' ●' if evidence else ''} | " + " | ".join(entries) + " |")
    return [*text, ""]


def details(table: dict[tuple[str, str, float], Cell]) -> list[str]:
    """Return all figures of every cell."""
    text = [
        "## All figures",
        "",
        "*Mean off*: largest error of a posterior mean, in reference standard deviations; *sd*: smallest and largest "
        "ratio of standard deviations; *shares* (later runs): by how much the share of draws below the reference's 5, "
        "50 and 95 % quantiles is off at most, which is known to .016 where there are 1,000 reference draws; all also "
        "after importance weighting, by Pareto-smoothed weights (runs before 30 November 2026, 15:45 UTC: as they "
        "are). Averages over seeds. Some standard deviations are not known: [which](real_models_checks.md).",
        "",
        "| model | method | s | rate | steps | ms a step | set-up s | ELBO | IWAE-1000 | k-hat | gap | mean off | sd "
        "| shares | weighted: mean off | sd | shares |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in POSTERIORS:
        for method in METHODS:
            for seconds in times(table):
                cell = table.get((name, method, seconds))
                if cell is None or not cell.values:
                    continue
                v = cell.values
                gap = number(v["gap"]) if "gap" in v else "-"
                shape = [
                    f"{number(v[f'{part}.mean_max'])} | {number(v[f'{part}.sd_min'])}–{number(v[f'{part}.sd_max'])} "
                    f"| {number(v[f'{part}.share_max']) if f'{part}.share_max' in v else ''}"
                    for part in ("errors", "errors_weighted")
                ]
                text.append(
                    f"| {name} | {SHORT.get(method, method)} | {seconds:g} | {cell.rate:g} | {v['steps']:.0f} "
                    f"| {1000 * v['step_seconds']:.2f} | {v['setup_seconds']:.2f} | {v['elbo']:.2f} | {v['iwae']:.2f} "
                    f"| {v['k_hat']:.2f} | {gap} | {shape[0]} | {shape[1]} |"
                )
    return [*text, ""]


def failures(records: list[Record]) -> list[str]:
    """List the runs that failed."""
    failed = [record for record in records if "failure" in record]
    text = ["## Failures", ""]
    if not failed:
        return [*text, "None.", ""]
    text += ["| model | method | rate | s | seed | when | message |", "|---|---|---|---|---|---|---|"]
    order = {name: i for i, name in enumerate(POSTERIORS)}
    for r in sorted(
        failed, key=lambda r: (order[r["model"]], METHODS.index(r["method"]), r["seconds"], r["rate"])
    ):
        when = r["stage"] + (f", {r['steps']} steps" if "steps" in r else "")
        message = r["failure"].replace("|", "\\|")
        text.append(
            f"| {r['model']} | {r['method']} | {r['rate']:g} | {r['seconds']:g} | {r['seed']} | {when} | {message} |"
        )
    return [*text, ""]


def picture(table: dict[tuple[str, str, float], Cell], seconds: float, path: Path) -> None:
    """Draw the distances: a row a model, a mark a method."""
    models = [name for name in POSTERIORS if any(key[0] == name and key[2] == seconds for key in table)][::-1]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.32 * len(models)), layout="constrained")
    markers = dict(zip(METHODS, "osD^v<P*Xh", strict=True))
    for method in METHODS:
        points = [
            (far, row)
            for row, name in enumerate(models)
            if (cell := table.get((name, method, seconds))) and (far := distance(table, cell)) is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            own = method in OURS
            style = {
                "color": "black" if own else None,
                "alpha": 1.0 if own else 0.7,
                "zorder": 3 if own else 2,
            }
            axes.scatter(x, y, marker=markers[method], s=36, label=SHORT.get(method, method), **style)
    known = {key[0] for key, cell in table.items() if "gap" in cell.values}
    short = [name.split("-")[-1] for name in models]
    labels = [
        one if short.count(one) == 1 else name.split("-")[0] for one, name in zip(short, models, strict=True)
    ]
    marked = [label + (" ●" if name in known else "") for label, name in zip(labels, models, strict=True)]
    axes.set_yticks(range(len(models)), marked)
    axes.set_xscale("symlog", linthresh=0.1)
    low, high = axes.get_xlim()
    decades = [10.0**power for power in range(0, 10, 2)]
    axes.set_xticks([x for x in (*(-x for x in reversed(decades)), 0.0, *decades) if low <= x <= high])
    axes.minorticks_off()
    axes.margins(x=0.04)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel(
        f"nats below the log evidence (●)\nor below the best of Pyro's guides, after {seconds:g} s"
    )
    figure.legend(loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def page(records: list[Record], folder: Path) -> str:
    """Return the page; the picture goes to the folder."""
    table = cells(records)
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    text = [
        "# Guides on real models",
        "",
        "The posteriors of posteriordb (Magnusson et al. 2025), written in Pyro as a user would write them: raw units, "
        "centred hierarchies, flat priors as `ImproperUniform`. Each model is checked against the source's reference "
        "draws and evidence: [the checks](real_models_checks.md). What the first steps of training do to the default "
        "guide's start: [a table](real_models_training.md); what that start is worth by itself: [another]"
        "(real_models_starts.md).",
        "",
        "Every guide has the same processor time (one thread, float64), `Trace_ELBO` with one particle and Adam. The "
        f"rate is the best of {rates} by the ELBO, less two standard errors, after {CHOICE_SECONDS:g} s with seed "
        f"{CHOICE_SEED}; it is constant for half of the time and then falls to {LAST:g} of it. The ELBO is a mean over "
        "10,000 draws. Pyro's guides start where they start by default; where a prior is improper, at 0 in "
        "unconstrained space. Set-up is not counted and is given below. Figures are means over seeds, without the run "
        "that chose the rate where there are others. "
        "Calls of our guides are captured after 200 steps, in later runs after 50; the second or more that this takes "
        "is counted, in float64 and with others at work on the machine up to half of the 5 s (later a quarter of it). "
        "On models with three seeds the default guide was measured on 1 December (two of them a day earlier), and "
        "once more that day on five whose effects have data that are not normal (GLMM1, seeds, surgical, irt_2pl, "
        "bones) and have splines now: a rule that was found on these models. Seed 0 of our other rows, and seeds 1 "
        "and 2 of some, are of earlier starts and of knots in whole "
        "units.",
        "",
        "Made by `python -m studies.real_models.report` from `studies/real_models/results.jsonl`; `make real-models "
        "DATA=...` does the runs that are missing.",
        "",
        *coverage(records, table),
    ]
    if any("elbo" in cell.values for cell in table.values()):
        shown = max(times(table), key=lambda seconds: (sum(key[2] == seconds for key in table), seconds))
        picture(table, shown, folder / "real_models.png")
        text += ["![Distances of all guides](real_models.png)", ""]
    for seconds in reversed(times(table)):
        text += overview(table, seconds)
    text += [*failures(records), *details(table)]
    return "\n".join(text).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Write the page and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="the folder of the page")
    flags = parser.parse_args(argv)
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "real_models.md").write_text(page(list(Results(flags.results).read().values()), flags.out))
    trained = list(Results(survival.RESULTS).read().values())
    ended = list(Results(ends.RESULTS).read().values())
    (flags.out / "real_models_training.md").write_text(survival.page(trained) + ends.section(ended))
    begun = list(Results(starts.RESULTS).read().values())
    (flags.out / "real_models_starts.md").write_text(starts.page(begun))


if __name__ == "__main__":
    main()
