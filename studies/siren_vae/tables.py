"""The tables of the SIReN-VAE page."""

import numpy as np

from studies.siren_vae.cells import LABELS, NETWORKS, SHAPES, mean_sd, words_of
from studies.siren_vae.training import DEEPER, DEEPER_SETTINGS, settings_of
from studies.tables import table

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


def main_table(results):
    head = [
        "network (D/K/E)",
        *(f"{label}, {m}×" for m in (2, 100) for label in ("VAE", "ind", "FC", "true", "faithful")),
    ]
    rows = []
    for network in NETWORKS:
        cells = [results.cell(network, row, multiple) for multiple in (2, 100) for row in LABELS]
        rows.append([f"{network} ({SHAPES[network]})", *(mean_sd(cell, "excess", 3, True) for cell in cells)])
    return table(head, rows)


def reach_table(results):
    rows = []
    for (network, multiple), bound in MUST_REACH.items():
        found = results.cell(network, "faithful", multiple)
        verdict = "–"
        if found:
            wanted = 5 if multiple == 2 else 1 if network == "arth150" else 3
            verdict = "so far: " if len(found) < wanted else ""
            verdict += "yes" if np.mean([r["test"]["excess"] for r in found]) <= bound else "no"
        paper = PAPER_EXCESS.get((network, multiple), "–")
        rows.append([network, f"{multiple}×", mean_sd(found, "excess", 3, True), bound, verdict, paper])
    return table(["network", "training points", "excess", "bound", "reached", "paper's excess"], rows)


def claim(results):
    """Say for each network whether true < ind and FC < VAE holds on 2x data, with either flow for the true network."""
    lines = []
    for network in NETWORKS:
        found = {row: results.cell(network, row, 2) for row in LABELS}
        if not all(found.values()):
            continue
        mean = {row: np.mean([r["test"]["excess"] for r in cell]) for row, cell in found.items()}
        words = [
            f"{label} {mean[row]:.2f} {'<' if mean[row] < mean[other] else '≥'} {name} {mean[other]:.2f} "
            f"({paired(found[row], found[other])})"
            for row, other, label, name in (
                ("true", "ind", "true (GRF)", "ind"),
                ("true", "FC", "true (GRF)", "FC"),
                ("faithful", "ind", "true (faithful flow)", "ind"),
                ("faithful", "FC", "true (faithful flow)", "FC"),
                ("ind", "vae", "ind", "VAE"),
                ("FC", "vae", "FC", "VAE"),
            )
        ]
        lines.append(f"- {network}: " + "; ".join(words) + ".")
    if not lines:
        return ""
    return (
        "The paper's claim for 2× data is true < ind and FC < VAE. Mean excess here, and in brackets the mean "
        "difference over common seeds ± its standard error:\n\n" + "\n".join(lines)
    )


def small_differences(results):
    """Name the differences of the true network to ind and FC that are not beyond one, or two, standard errors."""
    within = {1: [], 2: []}
    for network in NETWORKS:
        for row, label in (("true", "GRF"), ("faithful", "faithful flow")):
            for other in ("ind", "FC"):
                gains = differences(*(results.cell(network, name, 2) for name in (row, other)))
                if len(gains) > 1:
                    size = abs(np.mean(gains)) / (np.std(gains, ddof=1) / len(gains) ** 0.5)
                    if size < 2:
                        within[1 if size < 1 else 2].append(f"{network}, {label} against {other}")
    return (
        f"Differences of the true network that are within one standard error: {'; '.join(within[1]) or 'none'}. "
        f"Between one and two: {'; '.join(within[2]) or 'none'}."
    )


def differences(first, second):
    """Return the differences in excess of two cells over their common seeds."""
    one, other = ({r["run"]["seed"]: r["test"]["excess"] for r in cell} for cell in (first, second))
    return [one[seed] - other[seed] for seed in sorted(set(one) & set(other))]


def paired(first, second):
    """Return the mean difference in excess of two cells over their common seeds, with its standard error."""
    gains = differences(first, second)
    error = f" ± {np.std(gains, ddof=1) / len(gains) ** 0.5:.3f}" if len(gains) > 1 else ""
    return f"{np.mean(gains):+.3f}{error}" if gains else "no common seed"


def table_1(results):
    head = ["network", "model", "NLL 2×", "RE 2×", "NLL 2×, 1,000", "NLL 100×", "RE 100×", "NLL 100×, 1,000"]
    rows = []
    for network in NETWORKS:
        true = None
        for row, label in LABELS.items():
            line = [network, label]
            for multiple in (2, 100):
                found = results.cell(network, row, multiple)
                line += [mean_sd(found, key) for key in ("nll_100", "re_100", "nll")]
                true = found[0]["test"] if found else true
            rows.append(line)
        if true:
            text = f"{true['true_nll']:.2f} (entropy {true['entropy']:.2f})"
            hundred = f"{true['nll_100'] - true['excess_100']:.2f}"
            rows.append([network, "*true network*", hundred, "", text, hundred, "", text])
    return table(head, rows)


def setting_table(results):
    """Return the excess by both ways of choosing rate and patience."""
    rows = []
    for network in NETWORKS:
        for row, label in LABELS.items():
            line = [network, label, len(results.tried(network, row, 2))]
            for by in ("validation_nll", "train_loss"):
                found = results.cell(network, row, 2, by=by)
                setting = results.setting(network, row, 2, by=by)
                line += [words_of(setting, 2), mean_sd(found, "excess", 3, True)]
            if line[2]:
                rows.append(line)
    head = ["network", "model", "settings tried", "by validation", "excess", "by training loss", "excess"]
    return table(head, rows)


def rate_table(results):
    """Return the NLL of the validation points at each rate on many data, which the choice goes by."""
    rates = sorted({rate for rate, _ in settings_of(100)}, reverse=True)
    rows = []
    for network in NETWORKS:
        for row, label in LABELS.items():
            tried = results.tried(network, row, 100)
            if tried:
                nll = {s[0]: results.first(network, row, 100, s)["validation_nll"] for s in tried}
                texts = [nll_text(nll.get(rate)) for rate in rates]
                rows.append([network, label, *texts, f"{results.setting(network, row, 100)[0]:g}"])
    return table(["network", "model", *(f"rate {rate:g}" for rate in rates), "chosen"], rows)


def left_out(results):
    """Return what was tried on few data and is not among the settings to choose from: (network, row, setting)."""
    return [
        (network, row, setting)
        for network in NETWORKS
        for row in LABELS
        for setting, runs in sorted(results.cells.get((network, row, 2, "", ""), {}).items())
        if 0 in runs and setting not in settings_of(2)
    ]


def left_out_table(results):
    """Return how settings that are left out of the choice compare with the chosen one."""
    rows = []
    for network, row, setting in left_out(results):
        first, chosen = results.first(network, row, 2, setting), results.setting(network, row, 2)
        best = results.first(network, row, 2, chosen)["validation_nll"] if chosen else None
        cells = [
            mean_sd(list(results.runs(network, row, 2, s).values()), "excess", 3, True)
            for s in (setting, chosen)
        ]
        nll = [nll_text(first["validation_nll"]), f"{nll_text(best)} ({words_of(chosen, 2)})"]
        rows.append([network, LABELS[row], words_of(setting, 2), first["epochs"], *nll, *cells])
    head = ["network", "model", "rate, patience", "epochs", "validation NLL", "of the chosen setting"]
    return table([*head, "excess", "excess, chosen setting"], rows)


def left_out_words(results):
    """Say what the settings that are left out would have changed."""
    better, much_worse = [], 0
    tried = left_out(results)
    for network, row, setting in tried:
        nll = results.first(network, row, 2, setting)["validation_nll"]
        chosen = results.setting(network, row, 2)
        best = results.first(network, row, 2, chosen)["validation_nll"] if chosen else None
        if nll is not None and best is not None and nll < best:
            better.append(f"{LABELS[row]} on {network}")
        much_worse += nll is None or (best is not None and nll > best + 10)
    return (
        f"On seed 0, {much_worse} of these {len(tried)} trainings ended more than ten nats above the chosen setting. "
        f"The validation points would have chosen it for {' and '.join(better) or 'none'}."
    )


def nll_text(nll):
    """Return an NLL with three digits, fewer where the training went astray."""
    return "–" if nll is None else f"{nll:.3f}" if nll < 1e4 else f"{nll:,.0f}"


def patience_table(results):
    """Return the excess at each patience, with the rate that suits it."""
    rows = []
    for network in NETWORKS:
        for row, label in LABELS.items():
            line, free = [network, label, "–"], set()
            for patience in (0, 10):
                setting = results.setting(network, row, 2, patience=patience)
                found = list(results.runs(network, row, 2, setting).values())
                free |= {r["free_parameters"] for r in found if "free_parameters" in r}
                epochs = f"{np.mean([r['epochs'] for r in found]):.0f}" if found else "–"
                rate = "–" if setting is None else f"{setting[0]:g}"
                line += [rate, epochs, mean_sd(found, "excess", 3, True)]
            if set(line[3:]) != {"–"}:
                line[2] = f"{max(free):,}" if free else "–"
                rows.append(line)
    by_patience = [
        f"{word}patience {patience}" for patience in (60, 10) for word in ("rate, ", "epochs, ", "")
    ]
    return table(["network", "model", "free weights", *by_patience], rows)


REMEDY_LABELS = {
    "": "none",
    "warm-up": "warm-up of the KL over 100 epochs",
    "iwae": "IWAE objective, 5 particles",
    "decay": "weight decay 0.3 (decoupled)",
    "early": "early stopping on a fifth of the data",
    "average": "mean of the weights of epochs 200–400, rate constant",
    "small": "small networks (1 block, 2 units, decoder 1 unit)",
}


def remedies_table(results):
    """Return the excess with each remedy, and its paired difference to none."""
    rows = []
    for remedy, label in REMEDY_LABELS.items():
        line = [label]
        for network in NETWORKS:
            setting = results.setting(network, "faithful", 2)
            found = results.runs(network, "faithful", 2, setting, remedy=remedy)
            base = results.runs(network, "faithful", 2, setting)
            text = mean_sd(list(found.values()), "excess", 3, True)
            if remedy and len(set(found) & set(base)) > 1:
                text += f"; {paired(found.values(), base.values())}"
            line.append(text)
        rows.append(line)
    return table(["remedy", *NETWORKS], rows)


def blocks_table(results):
    """Return the excess of the true network with more blocks of the GRF, and with a warm-up of the KL."""
    rows = []
    labels = {"": "4", "warm-up": "4, warm-up of the KL"} | {
        key: str(blocks) for key, blocks in DEEPER.items()
    }
    for remedy, label in labels.items():
        row = [label]
        for multiple, setting in DEEPER_SETTINGS:
            found = results.runs("ecoli70", "true", multiple, setting, remedy=remedy).values()
            row.append(mean_sd(list(found), "excess", 3, True))
        rows.append(row)
    head = [f"{multiple}×, rate {rate:g}" for multiple, (rate, _) in DEEPER_SETTINGS]
    return table(["blocks of the GRF", *head], rows)


def warm_up_table(results):
    """Return the excess of every row on ecoli70, few data, without and with a warm-up of the KL."""
    rows = []
    for row, label in LABELS.items():
        setting = results.setting("ecoli70", row, 2)
        without, warm = (
            list(results.runs("ecoli70", row, 2, setting, remedy=remedy).values())
            for remedy in ("", "warm-up")
        )
        difference = paired(warm, without) if warm and without else "–"
        rows.append([label, *(mean_sd(found, "excess", 3, True) for found in (without, warm)), difference])
    return table(["model", "without", "with warm-up", "difference"], rows)


#: Model of the speed benchmark -> row of the study; the benchmark builds them in sizes of its own.
SPEED_ROWS = {"VAE": "vae", "true, faithful": "faithful", "true, graphical": "true", "FC, graphical": "FC"}


def speed_text(results):
    """Return the paragraphs on times of a training step, with the parameters of the study's models beside."""
    speed = results.speed
    head = ["network", "model", "parameters", "parameters in the study", "ms per step"]
    head += ["seconds per epoch of 10,000", "times the VAE", "times a VAE of its size"]
    rows = []
    for network, models in speed["models"].items():
        base = models["VAE"]["ms"]
        for label, figures in models.items():
            ms, row = figures["ms"], SPEED_ROWS.get(label)
            found = results.cells.get((network, row, 2, "", ""), {}).values()
            sizes = {run["parameters"] for runs in found for run in runs.values()}
            counts = [f"{figures['parameters']:,}", "–".join(f"{n:,}" for n in sorted(sizes)) or "–"]
            alike = figures.get("vae_of_its_size_ms")
            ratios = [f"{ms / base:.1f}", f"{ms / alike:.1f}" if alike else "–"]
            rows.append([network, label, *counts, f"{ms:.1f}", f"{ms / 10:.2f}", *ratios])
    sizes = (
        "The models timed have the default sizes of their classes, not those of the study, where the hidden units of "
        "VAE and decoders follow the network. The parameters of both are in the table (– is not a row of the study; "
        "the model with full Jacobians has dense masked weights); a step of the study's models takes another time. A "
        "VAE of a model's size has hidden layers so wide that it has as many parameters."
    )
    text = [speed["note"], sizes, table(head, rows)]
    if "profile" in speed:
        text += ["Where a step of the faithful model on arth150 goes:", "```\n" + speed["profile"] + "\n```"]
    return text
