"""The page of the multilevel study: tables from whatever runs are there (see run.py).

python -m studies.multilevel.report
"""

import argparse
from pathlib import Path
from typing import Any

from studies.flags import add_places
from studies.multilevel.run import GLOBALS, NUM_NUTS, NUTS_KEY, NUTS_RANGE, RANGES, ROWS
from studies.results import Results
from studies.tables import table

INTRODUCTION = """\
One guide with pooled inputs serves data sets of any size: of 5 to 50 groups (effects in groups; districts; persons). It
is set up with data of one size, and learns on joint samples whose numbers of groups and data are drawn anew for each
step (`studies/multilevel/run.py`), for the same processor time in each row of a table. Gaps are means over 50 held-out
data sets for each range of the number of groups, ± standard errors, in nats a data set.
Ranks are those of sites outside of the groups among 200 draws of the guide, over all 150
data sets: the greatest distance of their distribution from the uniform one, and the band that each stays inside with
probability 0.95.

- `start`: before any training. Effects, and locations given scales, have their prior times one factor for each element
  (group or datum), whose natural parameters are added; the factors start at regressions of the data on the site.
- `deepset`, `attention`: trained by forward KL on batches of 64 joint samples, rate 3e-3 (random effects: 1e-3)
  falling to 1e-5; what is not a sum reads pooled features.
- `summary`: the same without sums, `DeepSet(sums=False)`: everything is read from pooled features.
- `elbo`: the deep set, trained by the ELBO (16 particles) on one simulated data set a step.
- `both`: by forward KL for half of the time, then by the ELBO.
- `one size`: the deep set, trained on simulations of the size of set-up alone.
- `flat`: a network with as many weights that reads all data side by side, padded, with a mask.
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
""",
    "three levels": """\
A location, districts, schools in districts, pupils in schools; all scales known. 5 to 50 districts of 2 to 6 schools of
1 to 10 pupils, set up with 20 of 4 of 4. The posterior is known: gap KL(p || q), by draws of the posterior.
""",
    "item response": f"""\
Persons crossed with items (Rasch): answers of 5 to 50 persons to 4 to 12 items, spread of the abilities unknown; set up
with 20 persons and 8 items. Gap KL(q || p): log evidence by 2,000 weighted draws of the guide, which is too low where
weights are uneven, less the ELBO. Abilities are drawn jointly, by a normal of low rank, since they stay dependent given
the answers. The column of NUTS has errors of the means of all latents, in standard deviations of the posterior, root of
the mean square over {NUM_NUTS} data sets of {NUTS_RANGE} persons (not 50: NUTS takes seconds for each).
""",
}
ENDING = """\
Machine: 2 CPU cores, shared; CPU seconds are of one thread. `make multilevel` goes on from
`studies/multilevel/results.jsonl` and makes this page again: rows that are missing were not run. The rows of two levels
were measured before summaries had variance components, on other held-out data sets. Not run: most trained rows of the
other models, and other libraries' two-level approximators.
"""


def rows_of(name: str, runs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the rows of a model's table."""
    order = {row: i for i, row in enumerate(ROWS[name])}
    found = []
    for key, run in runs.items():
        if key == NUTS_KEY or key.split("/")[0] != name:
            continue
        _, row, _, seed = key.split("/")
        gaps = [f"{run[each]['gap']:.3f} ± {run[each]['error']:.3f}" for each in RANGES]
        ranks = ", ".join(f"{run['ranks'][site]:.3f}" for site in GLOBALS[name])
        figures = [f"{run['seconds']:.0f}", f"{run['steps']:,}", f"{run['weights']:,}"]
        nuts = [f"{run['from_nuts']:.3f}" if "from_nuts" in run else "-"] if name == "item response" else []
        line = [f"`{row}`", seed, *figures, *gaps, ranks, f"{run['band']:.3f}", *nuts]
        found.append((order[row], int(seed), line))
    return [line for _, _, line in sorted(found, key=lambda each: each[:2])]


def picture(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the gaps of all rows, by the number of groups."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.8), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flatten(), ROWS, strict=True):
        for i, row in enumerate(ROWS[name]):
            own = [run for key, run in runs.items() if key.split("/")[:2] == [name, row]]
            for run in own[:1]:
                at = [sum(map(int, each.split("-"))) / 2 + 0.4 * i for each in RANGES]
                gaps = [max(run[each]["gap"], 1e-4) for each in RANGES]
                errors = [run[each]["error"] for each in RANGES]
                axes.errorbar(at, gaps, errors, marker="o", markersize=4, linewidth=1, label=row)
        axes.axhline(0.05, color="grey", linewidth=0.8, linestyle="--")
        axes.set(yscale="log", xlabel="groups", title=name, ylim=(1e-4, None))
        axes.set_ylabel("gap to the posterior, nats a data set")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def render(results: Path, out: Path) -> None:
    """Write the page and its picture."""
    runs = Results(results).read()
    out.mkdir(parents=True, exist_ok=True)
    page = ["# Multilevel models, amortised", "", INTRODUCTION]
    if runs:
        picture(runs, out / "multilevel" / "gaps.png")
        page += ["![Gaps by the number of groups; the dashed line is 0.05](multilevel/gaps.png)", ""]
    for name, text in ABOUT.items():
        head = ["row", "seed", "CPU seconds", "steps", "weights"]
        head += [f"gap, {each} groups" for each in RANGES]
        head += [f"ranks of {', '.join(GLOBALS[name])}", "band"]
        head += ["means, from NUTS"] if name == "item response" else []
        page += [f"## {name.capitalize()}", "", text, table(head, rows_of(name, runs)), ""]
    (out / "multilevel.md").write_text("\n".join([*page, ENDING]))


def main() -> None:
    """Write the page."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_places(parse, "multilevel", report=True)
    args = parse.parse_args()
    render(args.results, args.out)


if __name__ == "__main__":
    main()
