"""Draw the pages of the SIReN-VAE study from the JSON files that are there: tables, Figure 2, robustness."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from siren_vae_runs import pick_rate

NETWORKS = ("ecoli70", "arth150", "magic-irri", "magic-niab")
SHAPES = {"ecoli70": "24/22/70", "arth150": "67/40/150", "magic-irri": "5/59/102", "magic-niab": "5/39/66"}
LABELS = {
    "vae": "VAE",
    "ind": "SIReN-VAE ind, GRF",
    "FC": "SIReN-VAE FC, GRF",
    "true": "SIReN-VAE true, GRF",
    "faithful": "SIReN-VAE true, faithful flow",
}
MUST_REACH = {
    ("ecoli70", 2): 1.5,
    ("ecoli70", 100): 0.06,
    ("arth150", 2): 3.2,
    ("arth150", 100): 0.4,
    ("magic-irri", 2): 0.15,
    ("magic-irri", 100): 0.05,
}
#: Excess of the paper's best model (its negative log-likelihood minus the entropy of the true network), in nats.
PAPER_EXCESS = {("arth150", 2): 5.0, ("arth150", 100): 1.8, ("magic-irri", 2): 1.0, ("magic-irri", 100): 0.16}
PAPER = (
    "Of the paper's Table 1 these figures are used (raw scale, as here): arth150 42.06 nats for 2× "
    "and 38.86 for 100×, where "
    "the entropy of the true network is 37.02; magic-irri 10.83 and about 10.02, where it is 9.86; "
    "reconstruction errors "
    "of 4.8 on arth150 and 8.9 to 11 on magic-irri. Its EColi70 has another graph (29 observed and "
    "15 latent nodes, 59 "
    "arcs), which does not follow from the published network: that has 46 nodes and 70 arcs, and "
    "with its leaves observed "
    "24 and 22. No simple rule (dropping nodes, thresholds, cutting arcs between observed nodes) "
    "gives the paper's "
    "shape, so the published network is used and the paper's figures for EColi70 (35.8 to 43 nats) "
    "are not comparable."
)


class Results:
    """All runs by cell, rate and seed."""

    def __init__(self, folder):
        self.cells = defaultdict(lambda: defaultdict(dict))
        for path in sorted(Path(folder).glob("*-s*.json")):
            result = json.loads(path.read_text())
            run = result["run"]
            key = tuple(run[k] for k in ("network", "row", "multiple", "remedy", "patience", "perturbation"))
            self.cells[key][run["lr"]][run["seed"]] = result

    def tried(self, network, row, multiple):
        """Return the rates that were tried on seed 0, as text."""
        rates = self.cells.get((network, row, multiple, "", 0, ""), {})
        return ", ".join(f"{lr:g}" for lr in sorted(rates, reverse=True) if 0 in rates[lr])

    def cell(self, network, row, multiple, remedy="", patience=0, perturbation="", by="validation_nll"):
        """Return the runs of a cell at the rate chosen on seed 0 that have test figures, and the rate."""
        rates = self.cells.get((network, row, multiple, remedy, patience, perturbation), {})
        lr = pick_rate({lr: runs[0][by] for lr, runs in rates.items() if 0 in runs})
        if lr is None:
            return [], None
        return [result for result in rates[lr].values() if result["test"]], lr


def mean_sd(results, key, digits=2, count=False):
    values = np.array([result["test"][key] for result in results], dtype=float)
    if not len(values):
        return "–"
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.{digits}f}"
    return f"{text} ({len(values)})" if count else text


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def render(out):
    """Write ``siren_vae.md`` and its figures; return its path."""
    out = Path(out)
    folder = out / "siren_vae"
    results = Results(folder)
    parts = [
        "# SIReN-VAE on Bayesian networks: Table 1 and Figure 2",
        "`make table1` makes this page (`examples/siren_vae.py --study all`); each run is a JSON "
        "file in `siren_vae/` with its "
        "settings, learning curve, date and machine. Everything is in nats on the raw scale of the data.",
        "**Excess** is the negative log-likelihood (NLL) of new data minus that of the *true network "
        "on the same points*, by "
        "exact linear-Gaussian inference; zero is the best that any model can reach. NLL by 500 "
        "importance samples a "
        "point. RE is the mean Euclidean norm of x − μ(z), with z from the encoder. Mean ± standard "
        "deviation over "
        "seeds, number of seeds in brackets; – is not there yet.",
        "## Main figures: excess on 1,000 test points",
        main_table(results),
        "What had to be reached with the true network and the faithful flow, beside the paper (true "
        "network, GRF):",
        reach_table(results),
        PAPER,
        claim(results),
        "## Table 1",
        "NLL and RE on 100 test points, as in the paper, and the NLL on 1,000 points beside.",
        table_1(results),
        protocol(),
        "## The rate chosen by training loss instead",
        "The rate of Adam is chosen once for each cell, on seed 0. Above: by the NLL of 200 further points drawn "
        "from the network. Here: by the final training loss, as in the paper. Excess on 1,000 points, 2× data; where "
        "the two differ, the last column has seed 0 only.",
        "Where fewer than three rates were tried, the choice is not made yet and the cell may change.",
        rate_table(results),
    ]
    if any(key[4] for key in results.cells):
        parts += [
            "## Patience 10 instead of 60 on 2× data",
            "An epoch is one to three steps there; patience 10, the paper's setting, lowers the rate "
            "very early. Excess.",
            patience_table(results),
        ]
    if any(key[3] for key in results.cells):
        parts += ["## Remedies against few data", remedies_text(), remedies_table(results)]
    if figure_2(results, folder / "figure2.png"):
        parts += [
            "## Figure 2",
            "Negative ELBO of 1,000 test points against the number of training points, ecoli70; bars "
            "are standard deviations "
            "over seeds, the dashed line is the true network's NLL.",
            "![Figure 2](siren_vae/figure2.png)",
        ]
    speed = folder / "speed.json"
    if speed.exists():
        parts += ["## Speed", *speed_text(json.loads(speed.read_text()))]
    page = out / "siren_vae.md"
    page.write_text("\n\n".join(parts) + "\n")
    robustness(results, out)
    return page


def main_table(results):
    head = [
        "network (D/K/E)",
        *(f"{label}, {m}×" for m in (2, 100) for label in ("VAE", "ind", "FC", "true", "faithful")),
    ]
    rows = []
    for network in NETWORKS:
        cells = [results.cell(network, row, multiple)[0] for multiple in (2, 100) for row in LABELS]
        rows.append([f"{network} ({SHAPES[network]})", *(mean_sd(cell, "excess", 3, True) for cell in cells)])
    return table(head, rows)


def reach_table(results):
    rows = []
    for (network, multiple), bound in MUST_REACH.items():
        found, _ = results.cell(network, "faithful", multiple)
        verdict = "–"
        if found:
            wanted = 5 if multiple == 2 else 1 if network == "arth150" else 3
            verdict = "so far: " if len(found) < wanted else ""
            verdict += "yes" if np.mean([r["test"]["excess"] for r in found]) <= bound else "no"
        paper = PAPER_EXCESS.get((network, multiple), "–")
        rows.append([network, f"{multiple}×", mean_sd(found, "excess", 3, True), bound, verdict, paper])
    return table(["network", "training points", "excess", "bound", "reached", "paper's excess"], rows)


def claim(results):
    """Say for each network whether true < ind and FC < VAE holds on 2x data, with the paper's flow."""
    lines = []
    for network in NETWORKS:
        found = {row: results.cell(network, row, 2)[0] for row in LABELS}
        if not all(found.values()):
            continue
        mean = {row: np.mean([r["test"]["excess"] for r in cell]) for row, cell in found.items()}
        holds = {
            flow: mean[flow] < min(mean["ind"], mean["FC"]) and max(mean["ind"], mean["FC"]) < mean["vae"]
            for flow in ("true", "faithful")
        }
        words = [
            f"{'holds' if ok else 'does not hold'} with {LABELS[flow].split(', ')[1]}"
            for flow, ok in holds.items()
        ]
        lines.append(f"- {network}: " + ", ".join(words))
    if not lines:
        return ""
    return "The paper's claim for 2× data, true < ind and FC < VAE:\n\n" + "\n".join(lines)


def table_1(results):
    head = ["network", "model", "NLL 2×", "RE 2×", "NLL 2×, 1,000", "NLL 100×", "RE 100×", "NLL 100×, 1,000"]
    rows = []
    for network in NETWORKS:
        true = None
        for row, label in LABELS.items():
            line = [network, label]
            for multiple in (2, 100):
                found, _ = results.cell(network, row, multiple)
                line += [mean_sd(found, key) for key in ("nll_100", "re_100", "nll")]
                true = found[0]["test"] if found else true
            rows.append(line)
        if true:
            text = f"{true['true_nll']:.2f} (entropy {true['entropy']:.2f})"
            hundred = f"{true['nll_100'] - true['excess_100']:.2f}"
            rows.append([network, "*true network*", hundred, "", text, hundred, "", text])
    return table(head, rows)


def protocol():
    return (
        "Protocol: Adam, batch min(100, N), all N points train (2× or 100× the number of nodes), rate from 0.1, "
        "0.01 and "
        "0.001 (at 10× and more from 0.01 and 0.001), divided by ten after 10 epochs (60 on few data, where an "
        "epoch is one to "
        "three steps) without an improvement of the training loss, stop below 1e-6 or after 1,500 epochs (300 "
        "at 10× and "
        "more); gradient norm clipped at 50. Four blocks of one hidden layer, 8 units for each variable. Every "
        "decoder of a "
        "SIReN-VAE has as many hidden units as the leaves have distinct sets of parents (one for each set where "
        "it is "
        "masked), beside a linear map; the VAE's one hidden layer is as wide, and at least as wide as the "
        "latent vector. Data "
        "columns are standardised inside the model by the training points; densities are those of the raw data. "
        "Encoders invert the "
        "row's own graph (`faithful_inverse`, order `auto`). Validation NLL for the choice of rate by 100 importance "
        "samples; test NLL by 500, but 100 for points 101 to 1,000 on few data."
    )


def rate_table(results):
    rows = []
    for network in NETWORKS:
        for row, label in LABELS.items():
            found, lr = results.cell(network, row, 2)
            other, by_loss = results.cell(network, row, 2, by="train_loss")
            if lr is not None:
                rows.append(
                    [
                        network,
                        label,
                        results.tried(network, row, 2),
                        f"{lr:g}",
                        mean_sd(found, "excess", 3, True),
                        f"{by_loss:g}",
                        mean_sd(other, "excess", 3, True),
                    ]
                )
    return table(
        [
            "network",
            "model",
            "rates tried",
            "rate by validation",
            "excess",
            "rate by training loss",
            "excess",
        ],
        rows,
    )


def patience_table(results):
    rows = []
    for network in NETWORKS:
        for row, label in LABELS.items():
            other, _ = results.cell(network, row, 2, patience=10)
            if other:
                found, _ = results.cell(network, row, 2)
                rows.append(
                    [network, label, mean_sd(found, "excess", 3, True), mean_sd(other, "excess", 3, True)]
                )
    return table(["network", "model", "patience 60", "patience 10"], rows)


REMEDY_LABELS = {
    "": "none",
    "warm-up": "warm-up of the KL over 100 epochs",
    "iwae": "IWAE objective, 5 particles",
    "decay": "weight decay 0.3 (decoupled)",
    "early": "early stopping on a fifth of the data",
    "average": "mean of the weights of epochs 400–800, rate constant",
    "small": "small networks (1 block, 2 units, decoder 1 unit)",
}


def remedies_text():
    return (
        "True network, faithful flow, 2× data, rate as chosen without remedy. Excess on 1,000 "
        "points; same seeds, so "
        "the second line of each cell, the mean difference to no remedy ± its standard error over "
        "seeds, is paired."
    )


def remedies_table(results):
    rows = []
    for remedy, label in REMEDY_LABELS.items():
        line = [label]
        for network in NETWORKS:
            found, _ = results.cell(network, "faithful", 2, remedy=remedy)
            text = mean_sd(found, "excess", 3, True)
            base, _ = results.cell(network, "faithful", 2)
            pairs = {r["run"]["seed"]: r["test"]["excess"] for r in base}
            gains = [
                r["test"]["excess"] - pairs[r["run"]["seed"]] for r in found if r["run"]["seed"] in pairs
            ]
            if remedy and len(gains) > 1:
                text += f"; {np.mean(gains):+.3f} ± {np.std(gains, ddof=1) / len(gains) ** 0.5:.3f}"
            line.append(text)
        rows.append(line)
    return table(["remedy", *NETWORKS], rows)


def figure_2(results, path):
    """Draw the negative ELBO against the number of training points; return whether there is something."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    multiples = sorted({key[2] for key in results.cells if key[0] == "ecoli70" and not any(key[3:])})
    lines, true = {}, None
    for row in LABELS:
        points = []
        for multiple in multiples:
            found, _ = results.cell("ecoli70", row, multiple)
            values = [r["test"]["negative_elbo"] for r in found]
            if values:
                points.append(
                    (multiple * 46, np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0)
                )
                true = found[0]["test"]["true_nll"]
        lines[row] = np.array(points)
    if len(multiples) < 2 or true is None:
        return False
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (row, points), marker in zip(lines.items(), "osD^v", strict=True):
        if len(points):
            axes.errorbar(
                *points.T[:2], yerr=points[:, 2], label=LABELS[row], marker=marker, ms=5, capsize=3, lw=1.2
            )
    axes.axhline(true, color="0.3", ls="--", lw=1, label="true network")
    axes.set(xscale="log", xlabel="training points", ylabel="negative ELBO of test data (nats)")
    axes.set_title("ecoli70: how much data the structure saves")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def robustness(results, out):
    """Write the page on wrong structures, if there are results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    multiples = sorted({key[2] for key in results.cells if key[5]})
    if not multiples:
        return
    kinds, percents = ("add", "remove", "reverse"), (0, 10, 25, 50)
    figure, panels = plt.subplots(
        1, len(multiples), figsize=(5.2 * len(multiples), 4.2), layout="constrained", squeeze=False
    )
    sections = []
    for axes, multiple in zip(panels[0], multiples, strict=True):
        rows = []
        for kind, marker in zip(kinds, "os^", strict=True):
            line, points = [{"add": "added", "remove": "removed", "reverse": "reversed"}[kind]], []
            for percent in percents:
                found = results.cells.get(
                    ("ecoli70", "faithful", multiple, "", 0, f"{kind}-{percent}" if percent else ""), {}
                ).get(1e-2, {})
                found = [r for r in found.values() if r["test"]]
                line.append(mean_sd(found, "excess", 3, True))
                values = [r["test"]["excess"] for r in found]
                if values:
                    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
                    points.append((percent, np.mean(values), error))
            rows.append(line)
            if points:
                points = np.array(points)
                axes.errorbar(
                    *points.T[:2], yerr=points[:, 2], marker=marker, ms=5, capsize=3, lw=1.2, label=line[0]
                )
        for row, style in (("vae", ":"), ("FC", "-.")):
            other, _ = results.cell("ecoli70", row, multiple)
            if other:
                level = np.mean([r["test"]["excess"] for r in other])
                axes.axhline(level, color="0.4", ls=style, lw=1, label=LABELS[row])
        axes.set(
            xlabel="arcs changed (%)", ylabel="excess NLL (nats)", title=f"{multiple * 46} training points"
        )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        sections += [
            f"## {multiple * 46} training points ({multiple}×)",
            table(["arcs", *(f"{percent} %" for percent in percents)], rows),
        ]
    figure.savefig(Path(out) / "siren_vae" / "robustness.png", dpi=130)
    plt.close(figure)
    page = [
        "# SIReN-VAE with a wrong structure",
        "How much does it cost if the network that the user believes in is wrong? The paper leaves "
        "this open. Of ecoli70's 70 "
        "arcs 10, 25 or 50 % (7, 18, 35) are added, removed or reversed at random, another set for "
        "each seed: added arcs follow the "
        "network's order, and an arc is reversed only if that makes no cycle. The model with the "
        "faithful flow is built from "
        "the wrong graph (prior, decoder and encoder all follow it) and trained on data of the right "
        "one, rate 0.01; "
        "everything else is as in [siren_vae.md](siren_vae.md). Reversed arcs may leave an observed "
        "node with latent "
        "children: it is then an input of their prior.",
        "Excess NLL in nats over the true network on 1,000 test points, mean ± standard deviation "
        "over seeds (number "
        "of seeds); bars in the figure are standard errors.",
        "![robustness](siren_vae/robustness.png)",
        *sections,
    ]
    (Path(out) / "siren_vae_robustness.md").write_text("\n\n".join(page) + "\n")


def speed_text(speed):
    head = ["network", "model", "parameters", "ms per step", "seconds per epoch of 10,000", "times the VAE"]
    rows = []
    for network, models in speed["models"].items():
        base = models["VAE"]["ms"]
        for label, figures in models.items():
            ms = figures["ms"]
            rows.append(
                [
                    network,
                    label,
                    f"{figures['parameters']:,}",
                    f"{ms:.1f}",
                    f"{ms / 10:.2f}",
                    f"{ms / base:.1f}",
                ]
            )
    text = [speed["note"], table(head, rows)]
    if "profile" in speed:
        text += ["Where a step of the faithful model on arth150 goes:", "```\n" + speed["profile"] + "\n```"]
    return text
