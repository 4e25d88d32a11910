"""The page of the binary-tree study: tables and pictures from whatever runs are there (see run.py).

python -m studies.comi.report
"""

import argparse
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from pyro_graphflows import binary_tree, stochastic_inverse
from studies.flags import add_places
from studies.results import Results
from studies.tables import mean_sd, table

STYLE = {
    ("heuristic", "random"): ("#c0392b", "heuristic"),
    ("minimal", "random"): ("#1f6fb2", "minimal"),
    ("full", "random"): ("#7f8c8d", "fully connected"),
    ("minimal", "regression"): ("#16a085", "minimal, regression start"),
}
NARROW = (200, 200)
NUM_TREES = 20


def load(results):
    """Return trained runs by (depth, structure, init, hidden dims), and sample-size runs by depth."""
    trained, sized = defaultdict(list), defaultdict(list)
    for result in Results(results).read().values():
        run = result["run"]
        if run["init"] == "samples":
            sized[run["depth"]].append(result)
        else:
            key = (run["depth"], run["structure"], run["init"], tuple(run["hidden_dims"]))
            trained[key].append(result)
    return dict(trained), dict(sized)


def span(numbers):
    return "–".join(str(number) for number in sorted({min(numbers), max(numbers)}))


def seeds(runs):
    return f"{len(runs)} seed" + "s" * (len(runs) > 1)


def padded(curves):
    """Stack curves of unequal length; one that has ended keeps its last value."""
    longest = max(map(len, curves))
    return np.array([list(curve) + [curve[-1]] * (longest - len(curve)) for curve in curves])


def epochs_of(runs, field):
    return max(([row["epoch"] for row in run[field]] for run in runs), key=len)


def legend(figure, entries, limit, **style):
    """One key for all panels, above them; in two rows where the figure is narrow."""
    style = style or {"linewidth": 1.6}
    handles = [Line2D([], [], color=colour, label=label, **style) for colour, label in entries]
    handles.append(Line2D([], [], color="#333333", linestyle="--", linewidth=1, label=limit))
    columns = min(len(handles), max(1, int(figure.get_figwidth() / 2)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


# ---------------------------------------------------------------------------------------------------- pictures


def plot_curves(trained, hidden_dims, path):
    """Forward divergence against epochs, one panel a depth."""
    depths = sorted({depth for depth, _, init, dims in trained if init == "random" and dims == hidden_dims})
    if not depths:
        return None
    figure = Figure(figsize=(2.9 * len(depths) + 0.6, 3.3), layout="constrained")
    entries = []
    for ax, depth in zip(figure.subplots(1, len(depths), squeeze=False)[0], depths, strict=True):
        for (structure, init), (colour, label) in STYLE.items():
            runs = trained.get((depth, structure, init, hidden_dims))
            if not runs:
                continue
            if (colour, label) not in entries:
                entries.append((colour, label))
            epochs = epochs_of(runs, "curve")
            kl = np.maximum(padded([[row["kl"] for row in run["curve"]] for run in runs]), 1e-6)
            ax.plot(epochs, np.exp(np.log(kl).mean(0)), color=colour, linewidth=1.4)
            ax.fill_between(epochs, kl.min(0), kl.max(0), color=colour, alpha=0.18, linewidth=0)
            if runs[0]["gap"] > 1e-6:
                ax.axhline(runs[0]["gap"], color=colour, linestyle="--", linewidth=1)
        ax.set_yscale("log")
        ax.set_title(f"depth {depth} ({2 ** (depth - 1) - 1} latent)", fontsize=10)
        ax.set_xlabel("epochs of 2,500 joint samples", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("E KL(p(z|x) || q(z|x)), nats", fontsize=9)
    legend(figure, entries, "gap of the heuristic inverse (exact)")
    figure.savefig(path, dpi=130)
    return path.name


def plot_log_posterior(trained, path, hidden_dims=NARROW):
    """Log-posterior of guide samples on the five data sets, one row a depth; 0 is its mean under the posterior."""
    depths = sorted({depth for depth, _, init, dims in trained if init == "random" and dims == hidden_dims})
    if not depths:
        return None
    columns = max(len(runs[0]["best_log_posterior"]) for runs in trained.values())
    figure = Figure(figsize=(2.3 * columns + 0.6, 1.9 * len(depths) + 0.6), layout="constrained")
    panels = figure.subplots(len(depths), columns, squeeze=False, sharex="row", sharey="row")
    entries = []
    for row, depth in zip(panels, depths, strict=True):
        low, high = -1.0, 1.0
        for (structure, init), (colour, label) in STYLE.items():
            runs = trained.get((depth, structure, init, hidden_dims))
            if not runs or init != "random":
                continue
            if (colour, label) not in entries:
                entries.append((colour, label))
            epochs = epochs_of(runs, "samples")
            values = np.stack(
                [padded([s["log_posterior"] for s in run["samples"]]) for run in _same_length(runs)]
            )
            values = values + runs[0]["entropy"]
            best = np.array(runs[0]["best_log_posterior"]) + runs[0]["entropy"]
            settled = values[:, len(epochs) // 3 :]
            low, high = min(low, settled.min(), best.min()), max(high, settled.max(), best.max())
            for i, ax in enumerate(row):
                ax.plot(epochs, values[:, :, i].mean(0), color=colour, linewidth=1.2)
                ax.fill_between(
                    epochs,
                    values[:, :, i].min(0),
                    values[:, :, i].max(0),
                    color=colour,
                    alpha=0.18,
                    linewidth=0,
                )
                ax.axhline(best[i], color=colour, linestyle="--", linewidth=1)
        row[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        row[0].set_ylabel(f"depth {depth}", fontsize=9)
        if low < -100:  # samples of blind latents: no scale shows them and the others at once
            row[0].set_yscale("symlog", linthresh=10)
            row[0].set_ylim(3 * low, 30)
            units = min(hidden_dims) / (2 ** (depth - 1) - 1)
            note = (
                f"depth {depth}: logarithmic below −10. A layer has {units:.1f} units for each latent: some of the "
                "sparse guides are blind (dead units), whatever their factorisation"
            )
            row[columns // 2].set_title(note, fontsize=8)
        for ax in row:
            ax.tick_params(labelsize=7)
            ax.spines[["top", "right"]].set_visible(False)
    for i, ax in enumerate(panels[0]):
        ax.set_title(f"data set {i + 1}", fontsize=9)
    figure.supxlabel("epochs", fontsize=9)
    figure.supylabel("log-posterior of samples, 0 = exact" if len(depths) > 1 else "", fontsize=9)
    legend(figure, entries, "best guide of a factorisation (exact)")
    figure.savefig(path, dpi=130)
    return path.name


def _same_length(runs):
    """Extend the shorter runs' samples by their last entry."""
    longest = max(len(run["samples"]) for run in runs)
    return [
        {**run, "samples": run["samples"] + run["samples"][-1:] * (longest - len(run["samples"]))}
        for run in runs
    ]


def plot_sample_sizes(sized, path):
    """Divergence of the regression start against the number of joint samples."""
    depths = sorted(sized)
    if not depths:
        return None
    figure = Figure(figsize=(2.9 * len(depths) + 0.8, 3.3), layout="constrained")
    entries = []
    for ax, depth in zip(figure.subplots(1, len(depths), squeeze=False)[0], depths, strict=True):
        for structure in ("heuristic", "minimal", "full"):
            colour, label = STYLE[structure, "random"]
            points = _by_size(sized[depth], structure)
            if not points:
                continue
            if (colour, label) not in entries:
                entries.append((colour, label))
            sizes = np.array(sorted(points))
            kl = np.array([[row["kl"] for row in points[n]] for n in sizes])
            row = points[sizes[0]][0]
            ax.plot(
                sizes, row["gap"] + row["parameters"] / (2 * sizes), color=colour, linestyle="--", linewidth=1
            )
            ax.plot(sizes, kl.mean(1), "o", color=colour, markersize=4)
            ax.vlines(sizes, kl.min(1), kl.max(1), color=colour, linewidth=1.2)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(f"depth {depth} ({2 ** (depth - 1) - 1} latent)", fontsize=10)
        ax.set_xlabel("joint samples n", fontsize=9)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(labelsize=8)
        ax.grid(color="#e5e5e5", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("E KL(p(z|x) || q(z|x)), nats", fontsize=9)
    legend(figure, entries, "gap + parameters / 2n", marker="o", linestyle="none")
    figure.savefig(path, dpi=130)
    return path.name


def _by_size(results, structure):
    points = defaultdict(list)
    for result in results:
        for row in result["rows"]:
            if row["structure"] == structure:
                points[row["samples"]].append(row)
    return dict(points)


# ------------------------------------------------------------------------------------------------------ tables


def trained_table(trained, hidden_dims, init="random"):
    rows = []
    for (depth, structure, start, dims), runs in sorted(trained.items(), key=lambda item: item[0][0]):
        if start != init or dims != hidden_dims:
            continue
        kl = np.array([run["kl"] for run in runs])
        gap = runs[0]["gap"]
        dead = " → ".join(span([run["constant_conditionals"][i] for run in runs]) for i in (0, 1))
        epochs = span([run["epochs"] for run in runs])
        capped = sum(not run["converged"] for run in runs)
        rows.append(
            (
                depth,
                STYLE[structure, init][1].split(",")[0],
                runs[0]["edges"],
                runs[0]["levels"],
                f"{gap:.3f}" if gap > 1e-6 else "0",
                *([f"{mean_sd([run['curve'][0]['kl'] for run in runs], 4)}"] if init == "regression" else []),
                mean_sd(kl, 4),
                f"{max(run['standard_error'] for run in runs):.1g}",
                mean_sd(kl - gap, 4),
                dead,
                len(runs),
                span([f"{run['curve'][0]['lr']:g}" for run in runs]),
                epochs + (f" ({capped} at the limit)" if capped else ""),
                f"{np.mean([run['seconds'] for run in runs]) / 60:.1f}",
            )
        )
    header = ["depth", "guide", "edges", "levels", "gap (exact)"]
    header += ["KL before the first step"] if init == "regression" else []
    header += [
        "KL at the end",
        "its s.e.",
        "KL − gap",
        "blind latents",
        "seeds",
        "first rate",
        "epochs",
        "minutes a run",
    ]
    return table(header, rows) if rows else "*No runs yet.*"


def size_table(sized, number=10_000):
    rows = []
    for depth in sorted(sized):
        for structure in ("heuristic", "minimal", "full"):
            points = _by_size(sized[depth], structure).get(number)
            if points:
                expected = points[0]["gap"] + points[0]["parameters"] / (2 * number)
                rows.append(
                    (
                        depth,
                        STYLE[structure, "random"][1],
                        points[0]["parameters"],
                        f"{expected:.4f}",
                        mean_sd([row["kl"] for row in points], 4),
                        f"{max(row['standard_error'] for row in points):.1g}",
                        len(points),
                    )
                )
    header = ("depth", "guide", "parameters", "gap + parameters / 2n", "KL measured", "its s.e.", "seeds")
    return table(header, rows) if rows else "*No runs yet.*"


@cache
def heuristic_gaps(depth):
    trees = [binary_tree(depth, seed) for seed in range(NUM_TREES)]
    return [tree.factorization_gap(stochastic_inverse(tree.graph())) for tree in trees]


def gap_table(depths):
    rows = []
    for depth in depths:
        gaps = heuristic_gaps(depth)
        rows.append((depth, f"{gaps[0]:.3f}", mean_sd(gaps, 3), f"{min(gaps):.3f} to {max(gaps):.3f}"))
    return table(("depth", "the tree used here", f"mean ± sd of {NUM_TREES} trees", "range"), rows)


def verdicts(trained, sized):
    """Check what the study should show, against what is there."""
    lines = []

    def check(text, good):
        lines.append(f"- {text}: **{'yes' if good else 'no'}**.")

    minimal = trained.get((5, "minimal", "random", NARROW))
    if minimal:
        worst = max(run["kl"] for run in minimal)
        check(
            "Depth 5, minimal, random start: below 0.05 nats at the end "
            f"(largest of {seeds(minimal)}: {worst:.4f})",
            worst < 0.05,
        )
    heuristic = trained.get((5, "heuristic", "random", NARROW))
    if heuristic:
        gap = heuristic[0]["gap"]
        worst = max((run["kl"] for run in heuristic), key=lambda kl: abs(kl - gap))
        check(
            f"Depth 5, heuristic: within 10 % or 0.05 nats of its exact gap {gap:.4f} "
            f"(farthest of {seeds(heuristic)}: {worst:.4f})",
            abs(worst - gap) < max(0.05, 0.1 * gap),
        )
    for depth, limit in ((5, 0.02), (8, 0.1)):
        points = _by_size(sized.get(depth, []), "minimal").get(10_000)
        if points:
            worst = max(row["kl"] for row in points)
            check(
                f"Depth {depth}, minimal, regression start on 10,000 joint samples: below {limit} nats before "
                f"the first step (largest of {seeds(points)}: {worst:.4f})",
                worst < limit,
            )
    points = _by_size(sized.get(8, []), "full").get(10_000)
    if points:
        lines.append(
            f"- Depth 8, fully connected, the same 10,000 samples: {mean_sd([row['kl'] for row in points], 2)} nats."
        )
    return "\n".join(lines) or "*No runs yet.*"


TEXT = """# Binary trees: heuristic, minimal and fully connected inverses

*Generated by `studies/comi/run.py --study` (`make comi`); do not edit. Runs from {dates}; {machine}.*

The first study of the CoMI (NaMI) paper (Webb et al. 2018, Figures 1 and 2), repeated where everything is known
exactly. The model is a Gaussian binary tree: each node is normal around a random multiple (uniform on [1/2, 2])
of its parent, with unit variance, and the leaves are observed. The guide is amortised and trained on joint
samples of the model (inference compilation). Three factorisations are compared: the **heuristic** stochastic
inverse, which only turns edges around (Stuhlmüller et al. 2013), the **minimal** faithful inverse
(`auto_faithful_guide`'s own choice), and the **fully connected** one.

**Setting**, after the paper: MADE networks with two hidden layers of 200 ReLU units, shared by all conditionals
of a guide, and no linear map beside them (`skip=False`); new joint samples in every minibatch of 100, 25
minibatches an epoch; Adam, the rate divided by ten when the loss has converged. Ours: the first rate (in
the tables; from a few trials with seed 0 among 0.01, 0.002 and 0.001), the last one {min_lr:g}, "converged" =
{patience} times {every} epochs without an improvement of {min_improvement:g} nats on {num_held_out:,}
held-out joint samples, at most {max_epochs} epochs; inputs and outputs are standardised.
One tree for each depth (tree seed 0); seeds change initial weights and samples.

**What is measured.** The training objective minus its exact constant, the conditional entropy of z given x.
This difference is the mean over x of KL(p(z|x) || q(z|x)), zero only for the exact posterior. With the latents
in the guide's order it is a sum of divergences between normal conditionals, known in closed form; only their
mean over joint samples is estimated, on {num_test:,} fresh ones, with the standard error given. The *gap* is
the exact lower limit of that divergence for a factorisation, whatever network stands behind it. ± is the
standard deviation over seeds.

## What it should show

{verdicts}

## Figure 1: the forward divergence in training

{curves}

Lines: geometric mean over seeds; bands: smallest to largest. Dashed: the gap of the heuristic inverse (the
other two have none).

{trained}

*Blind latents*: latents whose conditional does not look at its parents, since each of its ReLU units is dead; at
the start and at the end. The 200 units of a layer are shared by 2^(d−1) − 1 conditionals, and with sparse sets of
parents hardly any unit can serve two of them. That leaves 13 units for each at depth 5, 6 at depth 6, 3 at depth 7
and one or two at depth 8, and a conditional whose few units start dead, or die, never learns. What is lost there is a
matter of networks and not of factorisation: the minimal inverse has no gap, and from the regression start, below, the
same factorisation comes close to zero at every depth. The nested parent sets of the fully connected inverse let all
conditionals share units. (How the paper spread its units over the conditionals we do not know.){wide}

### From the regression start

The same minimal guide with a linear map beside the hidden layers, set to the least-squares regression on 10,000
joint samples before the first step (`init="regression"`), then trained.

{regression}

## Figure 2: log-posterior of guide samples

{log_posterior}

For five fixed data sets x the mean of the exact log p(z|x) over 100 samples z of the guide, minus its mean
under the posterior itself ({entropies}): zero for a right guide, with a standard error of sqrt(K / 200) for one
run, K the number of latents. Below: samples are too improbable; above: they are
too concentrated. Dashed: the best guide of each factorisation (exact). Lines: mean over seeds; bands: smallest
to largest.

{log_posterior_table}

## How many samples a factorisation needs

{samples}

The regression start against the number n of joint samples: divergence before the first step, on {num_test:,}
fresh joint samples. A linear-Gaussian guide with the right factorisation is off by about (number of its
parameters) / 2n nats (dashed; the gap is added for the heuristic inverse). A sparse inverse is thus also a
statistically efficient one. Dots: mean over seeds; bars: smallest to largest.

With n = 10,000:

{sizes}

## The gap of the heuristic inverse

Exact, no sampling: for the tree above, and for other random trees.

{gaps}

The gap grows with the number of latents: no network and no training can make up for a missing edge.

## The runs

A line each in [`studies/comi/results.jsonl`](../../studies/comi/results.jsonl): settings, seeds, curves, date.
`guide.log_prob` and the one-pass density used for training differ by at most {difference:.1e} nats in log q (float32).
"""

NOT_YET = "\nRuns with wider layers, the test of this from the random start, are not here yet."

WIDE = """

With layers of {width} units instead of 200 (everything else equal but first rates, in the table):

{curves}

{table}
"""


def log_posterior_table(trained):
    rows = []
    for (depth, structure, init, dims), runs in sorted(trained.items(), key=lambda item: item[0][0]):
        if init == "random" and dims == NARROW:
            ends = np.array([run["samples"][-1]["log_posterior"] for run in runs]) + runs[0]["entropy"]
            best = np.array(runs[0]["best_log_posterior"]) + runs[0]["entropy"]
            cells = [f"{mean_sd(ends[:, i], 2)} ({round(best[i], 2) + 0.0:.2f})" for i in range(len(best))]
            rows.append((depth, STYLE[structure, init][1], *cells))
    if not rows:
        return "*No runs yet.*"
    return "At the end of training, in brackets the exact value of the best guide:\n\n" + table(
        ("depth", "guide", *(f"data set {i + 1}" for i in range(len(rows[0]) - 2))), rows
    )


def render(results, out):
    """Draw the pictures and write the page from a file of results; return the path of the page."""
    out = Path(out)
    folder = out / "comi"
    folder.mkdir(parents=True, exist_ok=True)
    trained, sized = load(results)
    every = [run for runs in [*trained.values(), *sized.values()] for run in runs]
    settings = every[0]["settings"] if every else defaultdict(int)
    dates = sorted({run["date"] for run in every})
    image = "![{}](comi/{})".format
    curves = plot_curves(trained, NARROW, folder / "curves.png")
    log_posterior = plot_log_posterior(trained, folder / "log_posterior.png")
    samples = plot_sample_sizes(sized, folder / "samples.png")
    wide = NOT_YET
    for dims in sorted({dims for *_, dims in trained} - {NARROW}):
        name = "x".join(map(str, dims))
        picture = plot_curves(trained, dims, folder / f"curves-{name}.png")
        wide = wide.replace(NOT_YET, "") + WIDE.format(
            width=dims[0],
            curves=image(f"Divergence in training, {name} units", picture),
            table=trained_table(trained, dims),
        )
    entropy = {run["run"]["depth"]: run["entropy"] for runs in trained.values() for run in runs}
    text = TEXT.format(
        dates=" to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "–",
        machine="; ".join(sorted({run["machine"] for run in every})) or "–",
        verdicts=verdicts(trained, sized),
        curves=image("Divergence in training", curves) if curves else "",
        trained=trained_table(trained, NARROW),
        wide=wide,
        regression=trained_table(trained, NARROW, "regression"),
        log_posterior=image("Log-posterior of guide samples", log_posterior) if log_posterior else "",
        log_posterior_table=log_posterior_table(trained),
        entropies=", ".join(f"depth {d}: {-h:.2f}" for d, h in sorted(entropy.items())),
        samples=image("Divergence against number of samples", samples) if samples else "",
        sizes=size_table(sized),
        gaps=gap_table(sorted({depth for depth, *_ in trained} | set(sized))),
        difference=max(
            (r["max_difference_to_log_prob"] for runs in trained.values() for r in runs), default=0.0
        ),
        **{
            k: settings[k]
            for k in (
                "min_lr",
                "patience",
                "every",
                "min_improvement",
                "max_epochs",
                "num_held_out",
                "num_test",
            )
        },
    )
    page = out / "comi.md"
    page.write_text(text, encoding="utf-8")
    return page


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_places(parse, "comi", report=True)
    return parse


if __name__ == "__main__":
    args = parser().parse_args()
    print(render(args.results, args.out))
