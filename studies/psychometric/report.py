"""Make the page of the workflow from the results of two studies.

python -m studies.psychometric.report                        # docs/results/workflow.md
python -m studies.psychometric.report --results some.jsonl --workflow other.jsonl --out some/folder
"""

import argparse
import math
from pathlib import Path
from typing import Any

from studies.flags import add_places
from studies.psychometric.run import NUTS_DRAWS, NUTS_WARMUP, TRUSTED
from studies.results import Results
from studies.tables import table

WORKFLOW = Path("studies/workflow/results.jsonl")
HEAD = """# From guide to posterior

What draws of a guide are worth, what weights and Markov chains make of them, and what they are used for, on models
whose answers are known. Made by `python -m studies.psychometric.report` from `studies/workflow/results.jsonl` and
`studies/psychometric/results.jsonl`; 28 November 2026, 2 CPU cores that were shared with other work, one thread.

    make workflow DATA=folder/of/posteriors       # the first section; restartable
    make psychometric DATA=folder/of/the/curves   # the second
"""
MISSING = "Not run: the command above does it."
Record = dict[str, Any]


def known(results: Results) -> dict[str, Record]:
    return results.read()


def reached(chains: Record) -> str:
    """Say how far chains came."""
    if not chains["samples"]:
        return f"still warming up after {chains['gradients']:,}"
    figures = f"{chains['error']:.3f} / {chains['rhat']:.3f} / {chains['gradients']:,}"
    return figures if chains["enough"] else f"{figures} (not enough)"


def refinement(records: dict[str, Record]) -> str:
    rows = []
    for key, title in (("schools", "eight schools"), ("banana", "banana")):
        if key not in records:
            rows.append([title, *["not run"] * 6])
            continue
        record = records[key]
        short = "" if record["prior"]["enough"] else "≥ "
        rows.append(
            [
                title,
                f"{record['khat']:.2f}",
                f"{record['guide_error']:.2f}",
                *(reached(each) for each in (record["refined"], record["prior"])),
                f"{short}{record['ratio']:.1f}",
                f"{short}{record['ratio_with_training']:.1f}",
            ]
        )
    head = [
        "model",
        "k-hat",
        "error before",
        "from the guide",
        "from the prior",
        "ratio",
        "training counted",
    ]
    return "\n\n".join(
        [
            "### Refinement of a bad guide",
            "The guide of eight schools is not trained, that of the banana is (1,500 steps of four draws); then the "
            "first site that it samples is made far too narrow. Eight chains by one kernel (`NUTS()`), from the "
            "guide's draws in its base space and from draws of the prior in unconstrained space. Columns: largest "
            "error of a mean in standard deviations / largest R-hat / gradients, those of warm-up included, at the "
            "first of the lengths 250 to 1,500 at which all means are within 0.05 posterior standard deviations and "
            "R-hat is below 1.01, or when chains from the prior have taken ten times the gradients of those from the "
            "guide; the ratio of the numbers of gradients, without and with those of training.",
            table(head, rows),
        ]
    )


def cross_validation(record: Record, digits: int) -> str:
    """Return what was found beside the exact value."""
    values = f"{record['elpd']:.{digits}f} (exact {record['exact']:.{digits}f})"
    return f"{values}, worst datum {record['worst']:.3f} off, k-hat ≤ {record['loo_khat']:.2f}"


def uses(records: dict[str, Record]) -> str:
    rows = []
    if "schools_loo" in records:
        r = records["schools_loo"]
        rows.append(
            [
                "LOO of eight schools, exact by quadrature",
                cross_validation(r, 3),
            ]
        )
    for key, by in (("radon", "weighted draws of the guide"), ("radon_refined", "chains from its draws")):
        if key in records:
            r = records[key]
            title = f"LOO of radon ({r['houses']} houses) by {by}; exact: normal given two scales, which are on a grid"
            beyond = f"; {r['beyond']} data are more than 0.02 off" if "beyond" in r else ""
            rows.append([title, cross_validation(r, 2) + beyond])
    if "radon" in records:
        r = records["radon"]
        rows.append(["10,000 draws of the radon posterior with weights", f"{r['draws_seconds']:.1f} CPU s"])
    if "groups" in records:
        r = records["groups"]
        rows.append(
            [
                "values of groups never seen in 90 % intervals, 200 data sets",
                f"{100 * r['coverage']:.1f} ± {100 * r['se']:.1f} %",
            ]
        )
    if "stream" in records:
        r = records["stream"]
        rows.append(
            [
                "log-likelihoods of 10⁶ data × 1,000 draws, streamed",
                f"{r['peak_gib']:.2f} GiB at most (wanted: below 2), {r['seconds']:.0f} CPU s",
            ]
        )
    return "\n\n".join(
        ["### Prediction, cross-validation, speed", table(["what", "figure"], rows) if rows else MISSING]
    )


def curves(records: dict[str, Record]) -> str:
    text = [
        "## One guide for 8,526 data sets",
        "Psychometric curves: four parameters, nine binomial counts, 23 to 805 trials a data set. One guide, splines "
        "of Student-t noise, trained on simulations only; k-hat of 4,000 draws for each data set.",
    ]
    blocks = sorted((key for key in records if key.startswith("draws ")), key=lambda key: int(key.split()[1]))
    if not blocks or "train" not in records:
        return "\n\n".join([*text, MISSING])
    train = records["train"]
    khat = [float(k) for key in blocks for k in records[key]["khat"]]
    good = sum(k <= TRUSTED for k in khat)
    drawn = sum(records[key]["seconds"] for key in blocks)
    refined = [records[key] for key in records if key.startswith("refine ")]
    chains = [r for record in refined for r in record["rhat"]]
    share_refined = (len(khat) - good) / max(1, len(chains))
    refining = share_refined * sum(record["seconds"] for record in refined)
    spent = train["seconds"] + train["setup_seconds"] + drawn + refining
    rows = [
        [
            "training",
            f"{train['steps']:,} steps of {train['batch']} simulations, {train['seconds']:.0f} CPU s",
        ],
        ["draws", f"{len(khat):,} data sets, {drawn:.0f} CPU s"],
        [
            f"k-hat ≤ {TRUSTED} straight from the guide",
            f"{good:,} of {len(khat):,}: {100 * good / len(khat):.1f} % (wanted: 90)",
        ],
    ]
    if chains:
        seconds = sum(record["seconds"] for record in refined)
        agree = sum(r < 1.05 for r in chains)
        rows.append(
            [
                f"refined, of the {len(khat) - good:,} others",
                f"{len(chains):,} data sets, {seconds:.0f} CPU s; R-hat < 1.05 for {agree:,}",
            ]
        )
    drawn_records = [records[key] for key in blocks]
    for name, field, group in (
        ("guide's draws", "errors", drawn_records),
        ("weighted draws", "weighted_errors", drawn_records),
        ("refined draws", "errors", refined),
    ):
        found = [e for record in group for e in record.get(field, {}).values()]
        if found:
            largest = sorted(max(map(abs, each["mean"])) for each in found)
            rows.append(
                [
                    f"error of means, {name}, the worst of four, {len(found)} data sets with a reference",
                    f"median {largest[len(largest) // 2]:.3f}, largest {largest[-1]:.3f} standard deviations",
                ]
            )
    nuts = [records[key] for key in records if key.startswith("nuts ")]
    if nuts:
        mean = sum(record["seconds"] for record in nuts) / len(nuts)
        straight, all_in = (mean * len(khat) / cost for cost in (spent - refining, spent))
        rows.append(
            [
                f"Pyro's NUTS, one chain of {NUTS_WARMUP} + {NUTS_DRAWS} steps, {len(nuts)} data sets",
                f"{mean:.1f} CPU s each; all data sets would take {straight:.0f} times what training and draws "
                f"took, and {all_in:.0f} times that and the refinement of all others at the same cost each",
            ]
        )
    if "surprise" in records:
        tail = records["surprise"]["tail"]
        rows.append(["data sets that 999 of 1,000 simulations are nearer than", sum(t < 1e-3 for t in tail)])
    for name, missing in (("refinement", not chains), ("NUTS for comparison", not nuts)):
        if missing:
            rows.append([name, "not run"])
    losses = [loss for loss in train["losses"] if math.isfinite(loss)]
    if losses:
        rows.append(["loss, first and last 200 steps", f"{losses[0]:.3f}, {losses[-1]:.3f} nats"])
    return "\n\n".join([*text, f"Family: `{train['family']}`.", table(["", ""], rows)])


def render(psychometric: Path, workflow: Path, out: Path) -> None:
    first = known(Results(workflow))
    parts = [
        HEAD,
        "## Against exact answers",
        refinement(first),
        uses(first),
        curves(known(Results(psychometric))),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "workflow.md").write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_places(parse, "psychometric", report=True)
    parse.add_argument(
        "--workflow", type=Path, default=WORKFLOW, help=f"the other results (default: {WORKFLOW})"
    )
    args = parse.parse_args()
    render(args.results, args.workflow, args.out)


if __name__ == "__main__":
    main()
