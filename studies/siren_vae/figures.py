"""The figures of the SIReN-VAE pages, each drawn from the runs that are there."""

import matplotlib
import numpy as np

from studies.siren_vae.cells import LABELS
from studies.siren_vae.training import FEW, WARM_UP_SETTING, robustness_setting

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MARKERS = dict(zip(LABELS, "osD^v", strict=True))
COLOURS = dict(zip(LABELS, ("0.45", "C1", "C3", "C0", "C2"), strict=True))
PERTURBATIONS = {"add": "added", "remove": "removed", "reverse": "reversed"}
PERCENTS = (0, 10, 25, 50)


def figure_2(results, path):
    """Draw the negative ELBO against the number of training points; return whether there is something."""
    multiples = sorted({key[2] for key in results.cells if key[0] == "ecoli70" and not any(key[3:])})
    lines, true = {}, None
    for line in (*((row, "") for row in LABELS), ("true", "warm-up")):
        points = []
        for multiple in multiples:
            found = imitated(results, *line, multiple)
            values = [r["test"]["negative_elbo"] for r in found]
            if values:
                spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
                points.append((multiple * 46, np.mean(values), spread))
                true = found[0]["test"]["true_nll"]
        lines[line] = np.array(points)
    if sum(len(points) for points in lines.values()) < 2 or len(multiples) < 2 or true is None:
        return False
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (row, remedy), points in lines.items():
        if len(points):
            label, style = (f"{LABELS[row]}, {remedy}", ":") if remedy else (LABELS[row], "-")
            look = {"color": COLOURS[row], "marker": MARKERS[row], "ls": style}
            axes.errorbar(*points.T, label=label, ms=5, capsize=3, lw=1.2, **look)
    axes.axhline(true, color="k", ls="--", lw=1, label="NLL of the true network")
    axes.set(xscale="log", xlabel="training points", ylabel="negative ELBO of test data (nats)")
    ticks = [multiple * 46 for multiple in multiples]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title("ecoli70: how much data the structure saves")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return _save(figure, path)


def imitated(results, row, remedy, multiple):
    """Return the runs of a cell of Figure 2 at the setting of the cell that it takes it from."""
    setting = results.setting("ecoli70", row, 2 if multiple < FEW else 100)
    if remedy and multiple >= FEW:
        setting = WARM_UP_SETTING
    return list(results.runs("ecoli70", row, multiple, setting, remedy).values())


def training_length(results, path):
    """Draw validation loss and training loss of 2x runs against epochs; return whether there is something."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained", sharey=True)
    there, true = False, None
    for row in LABELS:
        setting = {"vae": (1e-2, 0), "ind": (1e-3, 0), "FC": (1e-3, 0)}.get(row, (1e-2, 0))
        run = results.cells.get(("ecoli70", row, 2, "", ""), {}).get(setting, {}).get(0, {})
        if not run.get("validation_curve"):
            continue
        there = True
        style = {"color": COLOURS[row], "lw": 1.3}
        panels[0].plot(*np.array(run["curve"])[:, :2].T, **style)
        label = f"{LABELS[row]} ({setting[0]:g})"
        panels[1].plot(
            *np.array(run["validation_curve"]).T, marker=MARKERS[row], ms=3.5, label=label, **style
        )
        true = run["test"]["entropy"] if run["test"] else true
    for axes, title in zip(panels, ("training loss (negative ELBO)", "NLL of 200 new points"), strict=True):
        if true is not None:
            axes.axhline(true, color="k", ls="--", lw=1, label="entropy of the true network")
        axes.set(xscale="log", xlabel="epochs", title=title, ylim=(17, 50))
        axes.grid(alpha=0.3)
    if not there:
        plt.close(figure)
        return False
    panels[0].set_ylabel("nats")
    panels[1].legend(frameon=False, fontsize=8, title="row (rate), patience 60", title_fontsize=8)
    return _save(figure, path)


def robustness(results, path):
    """Draw the excess against the share of changed arcs; return what was drawn, {multiple: {kind: {percent: runs}}}."""
    found = {}
    for multiple in sorted({key[2] for key in results.cells if key[4]}):
        found[multiple] = {kind: {} for kind in PERTURBATIONS}
        for kind in PERTURBATIONS:
            for percent in PERCENTS:
                how = f"{kind}-{percent}" if percent else ""
                setting = robustness_setting(multiple)
                runs = results.runs("ecoli70", "faithful", multiple, setting, perturbation=how)
                found[multiple][kind][percent] = list(runs.values())
    if not found:
        return found
    size = (5.6 * len(found), 4.2)
    figure, panels = plt.subplots(1, len(found), figsize=size, layout="constrained", squeeze=False)
    for axes, (multiple, kinds) in zip(panels[0], found.items(), strict=True):
        for shift, ((kind, by_percent), marker) in enumerate(zip(kinds.items(), "os^", strict=True)):
            points = []
            for percent, runs in by_percent.items():
                values = [r["test"]["excess"] for r in runs]
                if values:
                    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
                    points.append((percent + 0.5 * (shift - 1), np.mean(values), error))
            if points:
                label = f"arcs {PERTURBATIONS[kind]}"
                axes.errorbar(*np.array(points).T, marker=marker, ms=5, capsize=3, lw=1.2, label=label)
        for row, style in (("vae", ":"), ("FC", "-.")):
            other = results.cell("ecoli70", row, multiple)
            if other:
                level = np.mean([r["test"]["excess"] for r in other])
                axes.axhline(level, color="0.4", ls=style, lw=1, label=LABELS[row])
        title = f"{multiple * 46} training points"
        axes.set(xlabel="arcs changed (%)", ylabel="excess NLL (nats)", title=title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    _save(figure, path)
    return found


def _save(figure, path):
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
