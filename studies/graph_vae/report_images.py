"""The sections of the Graph VAE page on fixed binarised MNIST and on digits (see report.py)."""

import numpy as np

from studies.graph_vae.pictures import LABELS, plot_curves, plot_gates
from studies.graph_vae.records import difference, last_final, picture, ranking, run_name, seeds_of
from studies.tables import mean_sd, table

#: Table 1 of the paper for fixed binarised MNIST, after 2,000 epochs: log-likelihood and bound in nats.
PAPER = {
    "learned": (-82.58, -88.35),
    "full": (-82.80, -88.49),
    "chain": (-84.98, -92.80),
    "independent": (-87.30, -95.61),
}


def mnist_section(runs, folder):
    data_set = "binarized_mnist"
    found = seeds_of(runs, data_set)
    if not found:
        return ""
    records = {structure: by_seed[min(by_seed)] for structure, by_seed in found.items()}
    rows = []
    for structure, record in records.items():
        paper = PAPER.get(structure, PAPER["learned"])
        for epochs, final in sorted(((int(k), v) for k, v in record["finals"].items())):
            ll = final["likelihood"]
            rows.append(
                [
                    LABELS[structure], epochs, final["best_epoch"], f"{record['parameters']:,}",
                    f"{final['elbo']:.2f}", f"{sum(final['kl'].values()):.2f}",
                    f"{ll['ll']:.2f} ± {ll['standard_error']:.2f} ({ll['particles']:,} samples, "
                    f"{ll['images']:,} images)",
                    f"{paper[1]:.2f}", f"{paper[0]:.2f}",
                ]
            )  # fmt: skip
    plot_curves(records, folder / "mnist-curves.png")
    seconds = {s: np.median([row["cpu_seconds"] for row in r["curve"]]) for s, r in records.items()}
    lines = [
        "## Fixed binarised MNIST",
        "",
        "N = 5 nodes of 16 dimensions, batch 64, Adam 1e-3; trained on 50,000 images, the epoch chosen by the "
        "bound of the "
        "10,000 validation images, figures of the 10,000 test images (log-likelihood: of images spread evenly "
        "over them). "
        "Test bound with one sample of the nodes for each image. One seed. *The paper trained for 2,000 epochs; "
        "the number of "
        "epochs here is in the table, so the figures are points on the way, not comparable results.*",
        "",
        table(
            ["model", "epochs", "best epoch", "parameters", "test bound", "KL", "test log-likelihood", "paper's bound",
             "paper's LL"],
            rows,
        ),
        "",
        f"Processor time of an epoch: {', '.join(f'{LABELS[s]} {v:.0f} s' for s, v in seconds.items())} (one "
        f"thread).",
        "",
        "![curves](graph_vae/mnist-curves.png)",
        "",
        order_sentence(records),
        same_epochs_sentence(records),
        weights_sentence(records),
        recalibration_sentence(records),
    ]  # fmt: skip
    if "learned" in records:
        plot_gates(records["learned"], folder / "mnist-gates.png", "fixed binarised MNIST")
        lines += [
            "The gates of the learned model (Figure 3 of the paper); they start at one half. "
            + gates_sentence(records["learned"]),
            "",
            "![gates](graph_vae/mnist-gates.png)",
            "",
        ]
    for kind, text in (
        ("images", "Samples and reconstructions of"),
        (
            "embedding",
            "t-SNE of the posterior means of 2,000 test images (Figure 6 of the paper; colours are the classes) of",
        ),
    ):
        for structure, record in records.items():
            lines += picture(folder, f"{run_name(record)}-{kind}.png", f"{text} {LABELS[structure]}:", kind)
    return "\n".join(lines)


def gates_sentence(record):
    """Say which gates are open and which are closed at the end of what was trained."""
    row = [row for row in record["curve"] if "gates" in row][-1]
    number = len(row["gates"])
    edges = {f"z{j + 1} → z{i + 1}": row["gates"][i][j] for i in range(number) for j in range(i + 1, number)}
    closed = ", ".join(f"{edge} ({p:.2f})" for edge, p in edges.items() if p <= 0.5)
    is_open = [p for p in edges.values() if p > 0.5]
    least = f", with probabilities from {min(is_open):.2f}" if is_open else ""
    return f"After {row['epoch']} epochs {len(is_open)} of {len(edges)} are open{least}; closed: {closed or 'none'}."


def order_sentence(records):
    """Say how the structures compare at the last epoch that all have."""
    common = min(
        max((row["epoch"] for row in r["curve"] if "elbo" in row), default=0) for r in records.values()
    )
    at = {
        s: next((row["elbo"] for row in r["curve"] if row["epoch"] == common), None)
        for s, r in records.items()
    }
    if len(records) < 2 or None in at.values():
        return ""
    ranked = sorted(at, key=at.get, reverse=True)
    return (
        f"At epoch {common}, which all have reached, the test bounds are, from the best: "
        + ", ".join(f"{LABELS[s]} {at[s]:.2f}" for s in ranked)
        + ".\n"
    )


def same_epochs_sentence(records):
    """Say how the learned model's final figures compare with those of others after as many epochs, image for image."""
    if "learned" not in records:
        return ""
    parts = []
    for structure, record in records.items():
        for epochs in sorted(set(record["finals"]) & set(records["learned"]["finals"]), key=int):
            ours, theirs = records["learned"]["finals"][epochs], record["finals"][epochs]
            if structure == "learned":
                continue
            ll = ""
            if ours["likelihood"]["images"] == theirs["likelihood"]["images"]:
                ll = f", {ours['likelihood']['ll'] - theirs['likelihood']['ll']:+.2f} in log-likelihood"
            parts.append(
                f"after {epochs} epochs {ours['elbo'] - theirs['elbo']:+.2f} nats in the bound{ll} against "
                f"{LABELS[structure]}"
            )
    return f"Final figures of the learned model, one seed: {'; '.join(parts)}.\n" if parts else ""


def weights_sentence(records):
    """Say how far the importance samples can be trusted."""
    shares = [f["likelihood"]["share_khat_above_0.7"] for r in records.values() for f in r["finals"].values()]
    sizes = [f["likelihood"]["median_ess"] for r in records.values() for f in r["finals"].values()]
    if not shares:
        return ""
    return (
        f"The log-likelihoods are lower bounds that are not tight: of 5,000 samples {min(sizes):.0f} to "
        f"{max(sizes):.0f} are effective in the median, and the weights of {100 * min(shares):.0f} to "
        f"{100 * max(shares):.0f} per cent of the images have a Pareto shape above 0.7. The paper's are importance "
        "samples of the model's own encoder, too.\n"
    )


def recalibration_sentence(records):
    """Say what hard gates cost a model that was trained with relaxed ones."""
    record = records.get("learned")
    if record is None or "elbo_before_recalibration" not in last_final(record)[1]:
        return ""
    epochs, final = last_final(record)
    train = {s: {row["epoch"]: row["train_loss"] for row in r["curve"]} for s, r in records.items()}
    common = max(set.intersection(*(set(values) for values in train.values())))
    losses = ", ".join(f"{LABELS[s]} {values[common]:.2f}" for s, values in train.items())
    return (
        "The curves are measured with hard gates, while training has relaxed ones: as long as gates are "
        "uncertain, the "
        "learned model is evaluated as a model it was not trained to be, with batch statistics that are not its own. "
        f"Collecting these anew moves its test bound after {epochs} epochs from "
        f"{final['elbo_before_recalibration']:.2f} to {final['elbo']:.2f}. Training losses at epoch {common} "
        f"(relaxed "
        f"gates, mean over the epoch): {losses}.\n"
    )


def digits_section(runs, folder):
    found = seeds_of(runs, "digits", (5, 4))
    finals = {
        structure: {seed: last_final(r) for seed, r in by_seed.items()}
        for structure, by_seed in found.items()
    }
    if not finals:
        return ""
    epochs = sorted({e for by in finals.values() for e, _ in by.values()})
    finals = {s: {seed: final for seed, (_, final) in by.items()} for s, by in finals.items()}
    elbo = {s: {seed: f["elbo"] for seed, f in by.items()} for s, by in finals.items()}
    ll = {s: {seed: f["likelihood"]["ll"] for seed, f in by.items()} for s, by in finals.items()}
    train = {
        s: [np.mean([row["train_loss"] for row in found[s][seed]["curve"][-10:]]) for seed in by]
        for s, by in finals.items()
    }
    base = "independent" if "independent" in elbo else None
    rows = [
        [
            LABELS[s], f"{next(iter(found[s].values()))['parameters']:,}", len(elbo[s]),
            mean_sd(list(elbo[s].values()), 3), mean_sd([sum(f["kl"].values()) for f in finals[s].values()]),
            mean_sd(list(ll[s].values()), 3), f"{-np.mean(train[s]):.2f}",
            difference(elbo[s], elbo[base], 3) if base and s != base else "",
            difference(ll[s], ll[base], 3) if base and s != base else "",
        ]
        for s in finals
    ]  # fmt: skip
    particles = sorted({f["likelihood"]["particles"] for by in finals.values() for f in by.values()})
    samples = sorted({f["bound_samples"] for by in finals.values() for f in by.values()})
    lines = [
        "## Digits",
        "",
        "scikit-learn's 8 by 8 digits: 1,297 training images, each pixel drawn as a Bernoulli variable anew in every "
        "epoch; validation (200) and test images (300) drawn once. N = 5 nodes of 4 dimensions, networks of a quarter "
        f"of the width, {', '.join(map(str, epochs))} epochs, rate × 0.25 after 100. Mean ± standard deviation over "
        "seeds, which change the networks, the gates and the draws; differences are paired by seed, mean ± standard "
        f"error. Test bound with {', '.join(map(str, samples))} samples of the nodes, log-likelihood by "
        f"{', '.join(f'{n:,}' for n in particles)} importance samples. The training bound is that of training itself "
        "(relaxed gates, statistics of the batch), mean of the last ten epochs.",
        "",
        table(
            ["model", "parameters", "seeds", "test bound", "KL", "log-likelihood", "training bound",
             "bound − independent's", "LL − independent's"],
            rows,
        ),
        "",
        ranking(elbo),
        "",
        *gates_of_digits(found, finals, elbo, folder),
    ]  # fmt: skip
    for kind in ("images", "embedding"):
        for s in finals:
            lines += picture(folder, f"digits-{s}-s0-{kind}.png", f"{LABELS[s]}, seed 0:", kind)
    return "\n".join(lines)


def gates_of_digits(found, finals, elbo, folder):
    """Say what became of the gates, and what that does to the bound."""
    if "learned" not in finals:
        return []
    number = len(next(iter(finals["learned"].values()))["gates"])
    pairs = [(i, j) for i in range(number) for j in range(i + 1, number)]
    values = {
        s: np.array([[f["gates"][i][j] for i, j in pairs] for f in finals[s].values()])
        for s in ("learned", "decided")
        if s in finals
    }
    learned = values["learned"]
    sure = (np.minimum(learned, 1 - learned) < 0.1).sum(1)
    lines = [
        f"Of the {len(pairs)} gates of the learned models, {mean_sd((learned > 0.5).sum(1), 1)} are open at the end, "
        f"but {mean_sd(sure, 1)} have a probability below 0.1 or above 0.9; the mean is {learned.mean():.2f}, the "
        f"greatest {learned.max():.2f}. The published schedule is made for thousands of epochs of 50,000 images. "
        "Here a logit makes some 3,000 steps of at most 0.001, and the temperature is still 0.22: the model is "
        "trained with gates that are half open and evaluated with nearly all of them wide open.",
        "",
    ]
    if "full" in elbo:
        lines += [f"Paired by seed, learned − full: {difference(elbo['learned'], elbo['full'], 3)} nats.", ""]
    if "decided" in elbo:
        frozen = next(iter(found["decided"].values()))["run"]
        lines += [
            f"That this is the reason is tested by a second learned model: the learning rate of its gates is "
            f"{frozen['gate_rate']:g} times that of the rest, and after {frozen['freeze_after']} epochs it is frozen, "
            f"so that the rest of the training is done with the structure that is evaluated. "
            f"{mean_sd((values['decided'] > 0.5).sum(1), 1)} of its gates are open. Its bound minus that of the "
            f"published schedule: {difference(elbo['decided'], elbo['learned'], 3)}"
            + (f"; minus full's: {difference(elbo['decided'], elbo['full'], 3)}" if "full" in elbo else "")
            + " nats.",
            "",
        ]
    first = min(finals["learned"])
    plot_gates(found["learned"][first], folder / "digits-gates.png", f"digits, seed {first}")
    return [*lines, "![gates](graph_vae/digits-gates.png)", ""]
