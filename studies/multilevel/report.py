"""The page of the multilevel study: a table from whatever runs are there (see run.py).

python -m studies.multilevel.report
"""

import argparse
from pathlib import Path

from studies.flags import add_places
from studies.multilevel.run import RANGES
from studies.results import Results
from studies.tables import table

INTRODUCTION = """\
A two-level normal model with known answers: a location, effects of groups, data in groups, all of scale one. One guide
with pooled inputs serves data sets of 5 to 50 groups with 1 to 20 data each; it learns by forward KL on joint samples
whose numbers of groups and data are drawn anew for each step (`studies/multilevel/run.py`).

The gap is the mean over 50 held-out data sets, for each range of the number of groups, of the divergence of the guide
from the exact posterior of the location and all effects, in nats a data set, ± its standard error. Ranks are those of
the location among 200 draws of the guide, over all held-out data sets: the greatest distance of their distribution from
the uniform one, and the band that it stays inside with probability 0.95.
"""
ENDING = """\
`one size` is trained at 20 groups of 8 data alone. Machine: 2 CPU cores, shared; CPU seconds are of one thread.
`make multilevel` goes on from `studies/multilevel/results.jsonl` and makes this page again: rows that are missing were
not run.
"""


def render(results: Path, out: Path) -> None:
    """Write the page."""
    head = [
        "row",
        "seed",
        "CPU seconds",
        "steps",
        *(f"gap, {name} groups" for name in RANGES),
        "ranks",
        "band",
    ]
    body = []
    for key, run in Results(results).read().items():
        row, _, seed = key.split("/")
        gaps = [f"{run[name]['gap']:.3f} ± {run[name]['error']:.3f}" for name in RANGES]
        ranks = run["ranks"]
        body.append(
            [
                f"`{row}`",
                seed,
                f"{run['seconds']:.0f}",
                f"{run['steps']:,}",
                *gaps,
                f"{ranks['distance']:.3f}",
                f"{ranks['band']:.3f}",
            ]
        )
    out.mkdir(parents=True, exist_ok=True)
    page = ["# Two levels, amortised", "", INTRODUCTION, table(head, body), "", ENDING]
    (out / "multilevel.md").write_text("\n".join(page))


def main() -> None:
    """Write the page."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_places(parse, "multilevel", report=True)
    args = parse.parse_args()
    render(args.results, args.out)


if __name__ == "__main__":
    main()
