"""The page of the density study: tables and curves from whatever runs are there (see run.py).

python -m studies.density.report
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from studies.density import causal
from studies.flags import add_places
from studies.results import Results
from studies.tables import mean_sd
from studies.tables import table as markdown_table

ROWS = ("linear", "faithful", "spline", "graphical", "zuko graph", "zuko maf")
COLOURS = {
    "linear": "0.5",
    "faithful": "C0",
    "spline": "C4",
    "graphical": "C1",
    "zuko graph": "C2",
    "zuko maf": "C3",
}
CAUSAL = ("linear", "faithful", "spline", "zuko graph", "zuko nsf")
LIMIT = 0.1  # nats: what the gap of the faithful flow on the circuit must stay below
TEXTS = {
    "circuit": (
        "Arithmetic circuit",
        "8 variables with products, tanh, Laplace and normal noise (Weilbach et al. 2020), all observed, 9 arcs. The "
        "joint entropy is 1.080 nats. The *gap* is the test negative log-likelihood minus that of the true density on "
        "the same points; its standard error is over test points, of the difference.",
    ),
    "tree": (
        "Gaussian binary tree",
        "31 variables; the linear Gaussian network has the right form, and its gap is the cost of estimating its "
        "parameters, about 92 / (2 n) nats for n samples.",
    ),
    "protein": (
        "Protein data",
        "Flow cytometry of 11 proteins (Sachs et al. 2005), standardised, with the consensus graph of 20 arcs. The "
        "true density is not known.",
    ),
}


def load(results: Path) -> dict[str, dict[str, list[dict]]]:
    """Return the runs of the study by problem and row."""
    runs: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for key, run in Results(results).read().items():
        if not key.startswith("comparison-"):
            runs[run["problem"]][run["row"]].append(run)
    return runs


def table(problem: str, rows: dict[str, list[dict]]) -> str:
    """One line a row."""
    known = rows[next(iter(rows))][0]["gap"] is not None
    head = ["row", "test NLL", "s.e.", *(["gap", "s.e.", "largest gap"] if known else [])]
    head += ["seeds", "parameters", "epochs", "processor seconds"]
    lines = []
    for row in ROWS:
        runs = rows.get(row)
        if not runs:
            continue
        cells = [row, mean_sd([r["test_nll"] for r in runs], 3)]
        cells.append(f"{math.sqrt(np.mean([r['standard_error'] ** 2 for r in runs])):.3f}")
        if known:
            cells.append(mean_sd([r["gap"] for r in runs], 3))
            cells.append(f"{math.sqrt(np.mean([r['gap_error'] ** 2 for r in runs])):.3f}")
            cells.append(f"{max(r['gap'] for r in runs):.3f}")
        epochs = sorted({r["epochs"] for r in runs})
        span = "–".join(str(n) for n in sorted({epochs[0], epochs[-1]}))
        cells += [str(len(runs)), f"{runs[0]['parameters']:,}", span]
        cells.append(f"{np.mean([r['seconds'] for r in runs]):.0f}")
        lines.append(cells)
    return markdown_table(head, lines)


def causal_tables(runs: dict[str, dict[str, list[dict]]]) -> list[str]:
    """The gaps of the structural causal models, and how soon a row came near its best."""
    there = [name for name in causal.names() if name in runs]
    if not there:
        return []
    gaps, times = [], []
    for name in there:
        own = [runs[name].get(row, []) for row in CAUSAL]
        number = max(len(each) for each in own)
        gaps.append(
            [name, str(number), *(mean_sd([r["gap"] for r in each], 3) if each else "" for each in own)]
        )
        soon = [
            f"{np.mean([near_its_best(r['curve']) for r in each]):.1f}" if each else "" for each in own[1:]
        ]
        times.append([name, *soon])
    first = next(run for group in runs[there[0]].values() for run in group if run["curve"])
    return [
        "## Structural causal models",
        "Seven graphs with additive noise, linear and non-linear; the equations are in `studies/density/causal.py`. "
        f"Gap: the divergence from the truth in nats, estimated on {first['num_test']:,} test points, mean ± standard "
        f"deviation over seeds; {first['num_train']:,} training points, {first['budget']:g} seconds of processor time "
        "for each trained row. **zuko nsf**: three spline transforms without a graph.",
        markdown_table(["model", "seeds", *CAUSAL], gaps),
        "Processor seconds until the held-out loss was within 0.02 nats of the best of the run:",
        markdown_table(["model", *CAUSAL[1:]], times),
    ]


def near_its_best(curve: list[list[float]]) -> float:
    """Return the seconds until a curve is within 0.02 nats of its least value."""
    least = min(value for _, value in curve)
    return next(seconds for seconds, value in curve if value <= least + 0.02)


def draw(runs: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """Held-out negative log-likelihood against processor time, one panel a problem."""
    problems = [
        problem
        for problem in TEXTS
        if any(run["curve"] for group in runs.get(problem, {}).values() for run in group)
    ]
    if not problems:
        return
    figure = Figure(figsize=(5 * len(problems), 4), layout="constrained")
    for axes, problem in zip(figure.subplots(1, len(problems), squeeze=False)[0], problems, strict=True):
        best = []  # of each run; what lies far above is cut off
        for row in ROWS:
            for i, run in enumerate(runs[problem].get(row, [])):
                if run["curve"]:
                    seconds, values = np.array(run["curve"]).T
                    label = row if i == 0 else None
                    axes.plot(seconds, values, color=COLOURS[row], alpha=0.8, linewidth=1.2, label=label)
                    best.append(np.nanmin(values))
                elif i == 0:
                    label = f"{row} (test: {run['test_nll']:.2f})"
                    axes.axhline(run["test_nll"], color=COLOURS[row], label=label)
        truths = [r["true_test_nll"] for group in runs[problem].values() for r in group]
        if truths[0] is not None:
            axes.axhline(np.mean(truths), color="k", linestyle=":", label="truth (test)")
            best += truths
        span = max(max(best) - min(best), 0.1)
        axes.set_ylim(min(best) - 0.1 * span, max(best) + 1.5 * span)
        axes.set_title(TEXTS[problem][0], fontsize=11)
        axes.set_xlabel("processor seconds")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.axes[0].set_ylabel("held-out negative log-likelihood (nats)")
    figure.savefig(path, dpi=120)


def render(results: Path, out: Path) -> Path:
    """Write the page and its picture; return the path of the page."""
    runs = load(results)
    if not runs:
        raise SystemExit(f"Expected runs of the study in {results}; found none. No page was written.")
    folder = out / "density"
    folder.mkdir(parents=True, exist_ok=True)
    draw(runs, folder / "curves.png")
    every = [run for rows in runs.values() for group in rows.values() for run in group]
    dates = sorted({run["date"] for run in every})
    when = " to ".join(sorted({dates[0], dates[-1]}))
    first = next(
        (run for problem in TEXTS if problem in runs for run in next(iter(runs[problem].values()))), every[0]
    )
    parts = [
        "# Density estimation with flows over graphs",
        f"*Generated by `studies/density/run.py --study` (`make density`); do not edit. Runs of {when}; 2 CPU cores, "
        f"shared, {first['threads']} thread a run, float32, torch {first['torch']}.*",
        "The data sets of the graphical-residual-flow paper (Mouton and Kroon 2022), where the graph is given and "
        "every variable is observed. Rows: **linear**, the linear Gaussian network (regression of each variable on "
        "its parents); **faithful**, `faithful_residual`, and **spline**, `graphical_spline` (noise through splines "
        "along the graph), which start from it; **graphical**, `graphical_residual`, the paper's flow; "
        "**zuko graph**, zuko's masked autoregressive spline flow with the same adjacency (one "
        "transform: more would break the graph); **zuko maf**, five affine transforms without a graph.",
        f"Each trained row has {first['budget']:g} seconds of processor time on one thread, Adam from "
        f"{first['lr']:g} with a cosine schedule, minibatches of {first['batch_size']}, and keeps the epoch that "
        "a tenth of the training data, held out, likes best. Seeds change initial weights and (but for the protein "
        "data) the data. ± is the standard deviation over seeds, s.e. the standard error over test points.",
    ]
    faithful = runs.get("circuit", {}).get("faithful")
    if faithful:
        worst = max(run["gap"] for run in faithful)
        verdict = "yes" if worst <= LIMIT else "**no**"
        parts.append(
            f"- Circuit: the faithful flow within {LIMIT} nats of the truth (largest of {len(faithful)} seeds: "
            f"{worst:.3f}): {verdict}."
        )
    parts.append("![Learning curves](density/curves.png)")
    parts.append(
        "Curves are of the held-out points, which are others than the test points of the dotted line."
    )
    for problem, (title, text) in TEXTS.items():
        if problem in runs:
            run = next(iter(runs[problem].values()))[0]
            sizes = f"{run['num_train']:,} training points, {run['num_test']:,} test points."
            parts += [f"## {title}", f"{text} {sizes}", table(problem, runs[problem])]
    parts += causal_tables(runs)
    page = out / "density.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_places(parser, "density", report=True)
    args = parser.parse_args()
    print(render(args.results, args.out))
