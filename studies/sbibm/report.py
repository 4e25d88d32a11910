"""The page of the sbibm study: a table and a picture from whatever runs are there (see run.py).

python -m studies.sbibm.report
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from studies.flags import add_places
from studies.results import Results
from studies.sbibm.tasks import NUM_OBSERVATIONS
from studies.tables import table

TASKS = (
    *("gaussian_linear", "gaussian_linear_uniform", "gaussian_mixture", "two_moons"),
    *("slcp", "slcp_distractors", "bernoulli_glm", "bernoulli_glm_raw"),
)
ROWS = (
    *("normal", "spline", "flow", "spline reweighted"),
    *("spline score", "spline score reweighted", "auto", "npe", "npe nsf"),
)
COLOURS = {
    "normal": "C2",
    "spline": "C0",
    "flow": "C3",
    "spline reweighted": "C1",
    "spline score": "C4",
    "spline score reweighted": "C5",
    "auto": "C6",
    "npe": "0.5",
    "npe nsf": "0.3",
}
# means over ten observations of [1]: NPE with 10,000 simulations; the best of eight methods with 100,000
PUBLISHED = {
    "gaussian_linear": (0.552, 0.506),
    "gaussian_linear_uniform": (0.553, 0.506),
    "gaussian_mixture": (0.615, 0.531),
    "two_moons": (0.606, 0.530),
    "slcp": (0.901, 0.578),
    "slcp_distractors": (0.970, 0.766),
    "bernoulli_glm": (0.678, 0.522),
    "bernoulli_glm_raw": (0.765, 0.552),
}
INTRODUCTION = """\
Classifier two-sample tests (C2ST) against the reference posteriors of sbibm (Lueckmann et al. 2021): 0.5 where draws
cannot be told from those of the reference, 1 where they always can. 10,000 draws for each observation; the published
classifier (`studies/sbibm/c2st.py`). `normal`, `spline` and `flow` are guides that learn from simulations alone, as
neural posterior estimation does. `spline reweighted` is the same guide with the model's density: 10,000 of 300,000 of
its draws, by importance weights; nothing is trained further. `spline score` also reads scores, gradients of the
model's log-density at fixed values. `auto` is a guide for each observation alone, trained with scores and the density
(`loss="auto"`, 10 seconds by the clock), and reweighted in the same way; it draws simulations of its own, which are not
counted. `npe` and `npe nsf` are neural posterior estimation by the package sbi ({version}) on this machine, with its
defaults (a masked autoregressive flow) and with neural spline flows; their draws outside of the prior are dropped too.
Where a row has few observations they are those that were run. Guides of rows that went on another day were trained
again by the same command; the trainings below are the last ones.

Uniform priors have no bounds for the guides, and draws outside are dropped, as neural posterior estimation does. In
the unconstrained coordinate that Pyro gives an interval, the logit of the place in it, a location that is linear in the
data is not linear any more: the first observations of *gaussian_mixture* and *two_moons* had 0.717 and 0.644 there.

The models are written with the structure that they have (`studies/sbibm/tasks.py`): independent dimensions and
exchangeable data are plates, so that the two linear tasks are amortised over their ten dimensions and *slcp* has pooled
inputs; the distractors of *slcp_distractors* are a site of their own, which the guide finds that it need not read. That
is knowledge which neither `npe` nor the methods of the publication get. The hundred bits of
*bernoulli_glm_raw* come in by ten linear estimates of the parameters, found from 1,000 of the simulations
(`embedding={"x": "linear"}`); the first observation had 0.819 where the guide read the bits themselves, and 0.679 with
the estimates at the rate of the other tasks, 2e-3. It has 2e-2; `spline score` has 2e-3.

*bernoulli_glm* has splines of 4 bins in place of 12, batches of 200 in place of 500 and the rate 1e-2: the best of some
thirty settings by the loss on 20,000 fresh simulations, which are not counted; observations had no part in the choice.
The loss is 2.58 with 12 bins, batches of 500 and 2e-2; 2.49 with running averages of the weights, which
`fit(simulations=)` has by default; 2.33 with the rest. `npe` has 2.30 there with its defaults, for which nothing was
chosen, and the exact posterior about half a nat less (by importance weights, for 1,000 of them).

Without averages of the weights, as they were trained before, are `spline score`, most rows of the two linear tasks, and
`spline reweighted` of *bernoulli_glm*, whose guides had 12 bins, batches of 500 and the rate 2e-2 (2e-3 in observations
2 and 3). With 1,000 simulations guides have the settings of 10,000 but for batches of 50: of 500, an epoch had two
steps, and training ended before it had begun (the loss on 20,000 fresh simulations of *two_moons* was -2.1 to -3.2 in
four seeds, with batches of 50 it is -3.3). Of *slcp* observation 3 is left out there, which flatters the mean: 3 of
300,000 draws of the guide are inside of the prior's bounds; of *slcp_distractors* observation 7,
where 3,095 of 80,000 are. On *bernoulli_glm* `npe` is closer with so few.
"""
BY_SEED = """\
Means over ten observations with simulations and networks of other seeds, and their mean ± its standard error over
seeds.
"""
ENDING = """\
Published: NPE with 10,000 simulations, and the best of eight methods with 100,000, means over ten observations. A mean
± its standard error over observations; in brackets their number where it is not ten. One seed but in the last table;
k-hat is the largest of an observation's importance weights. Machine: 2 CPU cores, shared. `make sbibm` goes on from
`studies/sbibm/results.jsonl` and makes this page again: a dash, a task or a row that is missing was not run.

References: Lueckmann, Boelts, Greenberg, Goncalves and Macke (2021), Benchmarking Simulation-Based Inference, AISTATS.
"""


Tests = dict[tuple[str, str, int], list[dict]]


def load(results: Path, seed: int) -> tuple[Tests, dict[tuple[str, str, int], dict]]:
    """Return the tests and the trainings of one seed by task, row and number of simulations."""
    tests: Tests = defaultdict(list)
    trainings: dict[tuple[str, str, int], dict] = {}
    for key, record in Results(results).read().items():
        task, row, simulations, of, *number = key.split("/")
        at = (task, row, int(simulations))
        if int(of) != seed:
            continue
        if number:
            tests[at].append(record)
        else:
            trainings[at] = record
    return tests, trainings


def by_seed(results: Path) -> list[list[str]]:
    """Return a row for each task and row of the study with more than one seed: the mean, and that of each seed."""
    seeds = sorted({int(key.split("/")[3]) for key in Results(results).read()})
    tests = {seed: load(results, seed)[0] for seed in seeds}
    found = []
    for at in sorted(tests[seeds[0]], key=lambda at: (-at[2], TASKS.index(at[0]), ROWS.index(at[1]))):
        whole = [tests[seed][at] for seed in seeds if len(tests[seed].get(at, ())) >= NUM_OBSERVATIONS]
        means = np.array([np.mean([record["c2st"] for record in records]) for records in whole])
        if len(means) > 1:
            error = means.std(ddof=1) / len(means) ** 0.5
            cells = [f"`{at[0]}`", at[1], f"{at[2]:,}", f"{means.mean():.3f} ± {error:.3f}"]
            found.append([*cells, ", ".join(f"{mean:.3f}" for mean in means)])
    return found


def cell(records: list[dict]) -> str:
    """Return a mean with its standard error over observations."""
    values = np.array([record["c2st"] for record in records])
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}" + ("" if len(values) == 10 else f" ({len(values)})")


def known(task: str) -> list[str]:
    """Return the cells of what is published of a task."""
    return [f"{value:.3f}" for value in PUBLISHED[task]] if task in PUBLISHED else ["–", "–"]


def render(results: Path, out: Path) -> None:
    """Write the page; the picture is made by :func:`draw`."""
    tests, trainings = load(results, 0)
    versions = sorted({run["sbi"] for run in trainings.values() if "sbi" in run})
    lines = ["# sbibm", "", INTRODUCTION.replace("{version}", " and ".join(versions) or "not run")]
    for simulations in sorted({at[2] for at in tests}, reverse=True):
        rows = [row for row in ROWS if any((task, row, simulations) in tests for task in TASKS)]
        published = simulations == 10_000
        head = ["task", *rows, *(["published NPE", "published best at 10⁵"] if published else [])]
        body = []
        for task in TASKS:
            if not any((task, row, simulations) in tests for row in rows):
                continue
            cells = [
                cell(tests[task, row, simulations]) if (task, row, simulations) in tests else "–"
                for row in rows
            ]
            body.append([f"`{task}`", *cells, *(known(task) if published else [])])
        lines += [f"## {simulations:,} simulations", "", table(head, body), ""]
        head = ["task", "row", "held-out loss (nats)", "epochs", "CPU seconds", "largest k-hat"]
        body = []
        for (task, row, number), run in sorted(trainings.items(), key=lambda each: each[0]):
            if number == simulations:
                khats = [r["khat"] for r in tests.get((task, f"{row} reweighted", number), []) if "khat" in r]
                worst = f"{max(khats):.2f}" if khats else "–"
                cells = [f"{run['held_out_nll']:.3f}", str(run["epochs"]), f"{run['seconds']:.0f}", worst]
                body.append([f"`{task}`", row, *cells])
        of_auto = {
            task: (np.mean([r["seconds"] for r in records]), max(r["khat"] for r in records))
            for (task, row, number), records in sorted(tests.items())
            if row == "auto" and number == simulations
        }
        lines += ["Trainings:", "", table(head, body), ""]
        if of_auto:
            each = ", ".join(f"`{task}` {mean:.0f} ({khat:.2f})" for task, (mean, khat) in of_auto.items())
            lines += [f"CPU seconds of `auto` for an observation (and its largest k-hat): {each}.", ""]
    seeds = by_seed(results)
    if seeds:
        head = ["task", "row", "simulations", "mean of all", "each seed"]
        lines += ["## Seeds", "", BY_SEED, table(head, seeds), ""]
    if (out / "sbibm" / "c2st.png").exists():
        lines += ["![C2ST by task](sbibm/c2st.png)", ""]
    lines.append(ENDING)
    out.mkdir(parents=True, exist_ok=True)
    (out / "sbibm.md").write_text("\n".join(lines))


def draw(results: Path, out: Path) -> None:
    """C2ST of each observation by task, with 10,000 simulations."""
    tests, _ = load(results, 0)
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in ROWS if any((task, row, 10_000) in tests for task in TASKS)]
    tasks = [task for task in TASKS if any((task, row, 10_000) in tests for row in rows)]
    for place, task in enumerate(tasks):
        for offset, row in enumerate(rows):
            values = [record["c2st"] for record in tests.get((task, row, 10_000), [])]
            x = place + 0.7 * ((offset + 0.5) / len(rows) - 0.5)
            axes.plot([x] * len(values), values, "o", color=COLOURS[row], ms=4, label=None if place else row)
        for value, style, name in zip(
            PUBLISHED.get(task, ()), ("-", ":"), ("published NPE", "published best at 10⁵"), strict=False
        ):
            axes.hlines(
                value, place - 0.4, place + 0.4, color="0.4", ls=style, lw=1, label=None if place else name
            )
    axes.axhline(0.5, color="0.8", lw=0.8, zorder=0)
    axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axes.set_ylim(0.45, 1.0)
    axes.set_ylabel("C2ST, one point an observation")
    for row in rows:
        axes.plot([], [], "o", color=COLOURS[row], ms=4, label=row)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(list(unique.values()), list(unique), fontsize=8, loc="outside right upper")
    (out / "sbibm").mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "sbibm" / "c2st.png", dpi=110)


def main() -> None:
    """Write page and picture."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_places(parse, "sbibm", report=True)
    args = parse.parse_args()
    draw(args.results, args.out)
    render(args.results, args.out)


if __name__ == "__main__":
    main()
