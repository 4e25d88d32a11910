"""The page of the multilevel study: tables from whatever runs are there (see run.py).

python -m studies.multilevel.report
"""

import argparse
from pathlib import Path
from typing import Any

from studies.flags import add_places
from studies.multilevel.run import (
    EXACT,
    GLOBALS,
    NUM_OF_MEANS,
    NUTS_KEY,
    OF_MEANS,
    RANGES,
    REFERENCE_KEY,
    ROWS,
)
from studies.results import Results
from studies.tables import table

INTRODUCTION = """\
One guide with pooled inputs serves data sets of any size: of 5 to 50 groups (effects in groups; districts; persons). It
is set up with data of one size, and learns on joint samples whose numbers of groups and data are drawn anew for each
step (`studies/multilevel/run.py`), for the processor time in the third column. Gaps are means over 50 held-out
data sets for each range of the number of groups, ± standard errors, in nats a data set.
Ranks are those of sites outside of the groups among 200 draws of the guide, over all 150
data sets: the greatest distance of their distribution from the uniform one, and the band that each stays inside with
probability 0.95. Where the evidence is known, also by (Pareto-smoothed) importance weights of the 200 draws.

- `start`: before any training. Effects, and locations given scales, have their prior times one factor for each element
  (group or datum), whose natural parameters are added; the factors start at regressions of the data on the site.
- `deepset`, `attention`: trained by forward KL on batches of 64 joint samples, rate 3e-3 (random effects: 1e-3, item
  response: 2e-3) falling to 1e-5; what is not a sum reads pooled features.
- `summary`: the same without sums, `DeepSet(sums=False)`: everything is read from pooled features.
- `elbo`: the deep set, trained by the ELBO (16 particles) on one simulated data set a step.
- `both`: by forward KL for half of the time, then by the ELBO.
- `back`: by the ELBO for half of the time, then by forward KL at three tenths of the rate.
- `one size`: the deep set, trained on simulations of the size of set-up alone.
- `flat`: a network with as many weights that reads all data side by side, padded, with a mask.
- `bayesflow`: the estimator of BayesFlow {version} for multilevel models with its defaults (an encoder of the data and
  a coupling flow for the location, others for the effects given it), by its own training on batches of 64 simulations,
  each of a size of its own, at the same rates; also for ten times as long. (`studies/multilevel/peer.py`; versions
  2.0.9 to 2.0.12, the last for Python 3.11, stop with an error where the estimator is made.)
"""
ABOUT = {
    "two levels": """\
A location, effects of groups, data in groups, all of scale one; 5 to 50 groups of 1 to 20 data, set up with 20 of 8.
The posterior is known: gap KL(p || q), by draws of the posterior.
""",
    "random effects": """\
Location, spread of the effects and noise unknown; sizes as above. Gap KL(q || p): log evidence, by quadrature over the
two scales, less the ELBO. Location and effects have one factor for each element, and are exact given the scales (less
than 0.01 nats); the two scales, which come before the location, tie the groups together while it is unknown, and are
read from pooled features: among them the logarithms of the spread of the groups' means and of the spread inside of
groups, with their degrees of freedom. Factors beside the priors of the scales follow sizes by samples of fewer
elements.

The ELBO, KL(q || p), at first leaves out small values of tau, near which effects have narrow priors, so that the ranks
of tau are too low after 30 seconds. That is a matter of steps: after 90 seconds all ranks are inside the band and gaps
a third smaller. Importance weights of the same draws mend it as well; so does forward KL afterwards, which takes some
of the gap back.
""",
    "three levels": """\
A location, districts, schools in districts, pupils in schools; all scales known. 5 to 50 districts of 2 to 6 schools of
1 to 10 pupils, set up with 20 of 4 of 4. The posterior is known: gap KL(p || q), by draws of the posterior.
""",
    "item response": """\
Persons crossed with items (Rasch): answers of 5 to 50 persons to 4 to 12 items, spread of the abilities unknown; set up
with 20 persons and 8 items. Gap KL(q || p): log evidence less the ELBO. Difficulties are drawn jointly, by a normal of
low rank beside their priors, since they stay dependent given the answers; abilities one by one given these, by their
prior times one factor for each item. The last column has errors of the means of all sites, in standard deviations of
the posterior, root of the mean square over the 50 data sets of {of_means} persons, from 2,000 draws (which make an
error of {floor:.3f} by themselves), and from the same draws with importance weights.
""",
}
REFERENCE = """\
Evidence and means are those of `studies/multilevel/answers.py`: abilities by quadrature, spread and difficulties by
8,000 weighted draws (largest standard error of a log evidence {error:.3f}, largest k-hat {khat:.2f}).
"""
OF_NUTS = """\
NUTS on {data_sets} of the data sets (400 draws after 200 of warm-up, {seconds:.0f} CPU seconds each) has means that are
{error:.3f} standard deviations from these, root of the mean square; the largest difference is {largest:.2f}.
"""
ENDING = """\
Machine: 2 CPU cores, shared; CPU seconds are of one thread. `make multilevel` goes on from
`studies/multilevel/results.jsonl` and makes this page again: rows that are missing were not run. The row `bayesflow` is
left out where that package is not installed.
"""


def rows_of(name: str, runs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the rows of a model's table."""
    order = {row: i for i, row in enumerate(ROWS[name])}
    found = []
    for key, run in runs.items():
        if key in (NUTS_KEY, REFERENCE_KEY) or key.split("/")[0] != name:
            continue
        _, row, _, seed = key.split("/")
        gaps = [f"{run[each]['gap']:.3f} ± {run[each]['error']:.3f}" for each in RANGES]
        figures = [f"{run['seconds']:.0f}", f"{run['steps']:,}", f"{run['weights']:,}"]
        ranks = [
            ", ".join(f"{run[which][site]:.3f}" for site in GLOBALS[name])
            for which in ("ranks", *(() if name in EXACT else ("weighted_ranks",)))
        ]
        line = [f"`{row}`", seed, *figures, *gaps, *ranks, f"{run['band']:.3f}"]
        if name == "item response":
            line.append(", ".join(f"{each:.3f}" for each in run["errors_of_means"]))
        found.append((order[row], int(seed), line))
    return [line for _, _, line in sorted(found, key=lambda each: each[:2])]


def head_of(name: str) -> list[str]:
    """Return the head of a model's table."""
    of_sites = f"ranks of {', '.join(GLOBALS[name])}"
    head = ["row", "seed", "CPU seconds", "steps", "weights", *(f"gap, {each} groups" for each in RANGES)]
    head += [of_sites] if name in EXACT else [of_sites, "weighted"]
    return [*head, "band", *(["errors of means, weighted"] if name == "item response" else [])]


def about(name: str, runs: dict[str, dict[str, Any]]) -> str:
    """Return what is said of a model before its table."""
    text = ABOUT[name]
    if name == "item response":
        text = text.format(of_means=OF_MEANS, floor=NUM_OF_MEANS**-0.5)
        known = [runs[REFERENCE_KEY][each] for each in RANGES] if REFERENCE_KEY in runs else []
        if known:
            worst = {of: max(each[of] for each in known) for of in ("error", "khat")}
            text += REFERENCE.format(**worst)
        if NUTS_KEY in runs:
            text += OF_NUTS.format(**runs[NUTS_KEY])
    return text


def picture(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the gaps of all rows, by the number of groups; no panel for a model without rows.

    Of a row that was trained for several lengths of time the longest is drawn.
    """
    from matplotlib.figure import Figure

    names = [name for name in ROWS if rows_of(name, runs)]
    if not names:
        return
    every = list(dict.fromkeys(row for own in ROWS.values() for row in own))
    lines = -(-len(names) // 2)
    figure = Figure(figsize=(9, 3.8 * lines) if len(names) > 1 else (4.8, 3.6), layout="constrained")
    panels = figure.subplots(lines, min(len(names), 2), squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        for i, row in enumerate(ROWS[name]):
            own = [run for key, run in runs.items() if key.split("/")[:2] == [name, row]]
            for run in sorted(own, key=lambda run: -run["seconds"])[:1]:  # the longest training
                label = f"{row} {run['seconds']:.0f} s" if run["steps"] else row
                at = [sum(map(int, each.split("-"))) / 2 + 0.4 * i for each in RANGES]
                gaps = [max(run[each]["gap"], 1e-4) for each in RANGES]
                errors = [run[each]["error"] for each in RANGES]
                style = {"color": f"C{every.index(row)}", "marker": "o", "markersize": 4, "linewidth": 1}
                axes.errorbar(at, gaps, errors, label=label, **style)
        axes.axhline(0.05, color="grey", linewidth=0.8, linestyle="--")
        axes.set(yscale="log", xlabel="persons" if name == "item response" else "groups", title=name)
        low = min(1e-4 if name in EXACT else 0.04, axes.get_ylim()[0])
        axes.set_ylim(low, None)
        axes.set_ylabel("gap to the posterior, nats a data set")
        axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    for axes in panels[len(names) :]:
        axes.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def render(results: Path, out: Path) -> None:
    """Write the page and its picture."""
    runs = Results(results).read()
    out.mkdir(parents=True, exist_ok=True)
    versions = sorted({run["bayesflow"] for run in runs.values() if "bayesflow" in run})
    introduction = INTRODUCTION.replace("{version}", " and ".join(versions) or "(not run)")
    page = ["# Multilevel models, amortised", "", introduction]
    names = [name for name in ABOUT if rows_of(name, runs)]
    if names:
        picture(runs, out / "multilevel" / "gaps.png")
        page += ["![Gaps by the number of groups; the dashed line is 0.05](multilevel/gaps.png)", ""]
    for name in names:
        table_of = table(head_of(name), rows_of(name, runs))
        page += [f"## {name.capitalize()}", "", about(name, runs), table_of, ""]
    (out / "multilevel.md").write_text("\n".join([*page, ENDING]))


def main() -> None:
    """Write the page."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_places(parse, "multilevel", report=True)
    args = parse.parse_args()
    render(args.results, args.out)


if __name__ == "__main__":
    main()
