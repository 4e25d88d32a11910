"""The pages of the Graph VAE study: tables and pictures from whatever runs are there (see graph_vae.py).

python examples/graph_vae_report.py --out docs/results
"""

import argparse
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
from graph_vae_plots import LABELS, plot_ablation, plot_curves, plot_gates, plot_synthetic

#: Table 1 of the paper for fixed binarised MNIST, after 2,000 epochs: log-likelihood and bound in nats.
PAPER = {
    "learned": (-82.58, -88.35),
    "full": (-82.80, -88.49),
    "chain": (-84.98, -92.80),
    "independent": (-87.30, -95.61),
}


# ---------------------------------------------------------------------------------------------------- reading


def load(folder):
    """Return the records of image runs by (data set, structure, nodes, dimensions, decoder input) and seed."""
    runs = defaultdict(dict)
    for path in sorted(Path(folder).glob("*.json")):
        record = json.loads(path.read_text())
        run = record.get("run") if isinstance(record, dict) else None
        if run is not None:
            key = (run["data_set"], run["structure"], run["num_nodes"], run["node_dim"], run["decoder_input"])
            runs[key][run["seed"]] = record
    return dict(runs)


def last_final(record):
    """Return the number of epochs and the figures of the longest finished training, or nothing."""
    if not record["finals"]:
        return None
    epochs = max(record["finals"], key=int)
    return int(epochs), record["finals"][epochs]


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def mean_sd(values, digits=2):
    values = np.asarray(values, dtype=float)
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def difference(a, b):
    """Return the mean difference over common seeds with its standard error, as text."""
    common = sorted(set(a) & set(b))
    values = np.array([a[seed] - b[seed] for seed in common])
    if len(values) < 2:
        return f"{values.mean():+.2f}" if len(values) else "–"
    return f"{values.mean():+.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


# ------------------------------------------------------------------------------------------------------ sections


def seeds_of(runs, data_set, sizes=None):
    """Return runs of a data set by structure; of one size, the one with most runs where none is asked for."""
    chosen = {key: value for key, value in runs.items() if key[0] == data_set and key[4] == "all"}
    if sizes is None and chosen:
        counts = defaultdict(int)
        for key, value in chosen.items():
            counts[key[2:4]] += len(value)
        sizes = max(counts, key=counts.get)
    found = {key[1]: value for key, value in chosen.items() if key[2:4] == sizes}
    return {structure: found[structure] for structure in LABELS if structure in found}


def mnist_section(runs, folder):
    data_set = "binarized_mnist"
    found = seeds_of(runs, data_set)
    if not found:
        return ""
    records = {structure: by_seed[min(by_seed)] for structure, by_seed in found.items()}
    rows = []
    for structure, record in records.items():
        paper = PAPER[structure]
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
    unfinished = [
        f"{LABELS[s]}: epoch {r['curve'][-1]['epoch']}, test bound {r['curve'][-1]['elbo']:.2f}"
        for s, r in records.items()
        if not r["finals"] or int(max(r["finals"], key=int)) < r["curve"][-1]["epoch"]
    ]
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
        *([f"Not finished: {'; '.join(unfinished)}.", ""] if unfinished else []),
        f"Processor time of an epoch: {', '.join(f'{LABELS[s]} {v:.0f} s' for s, v in seconds.items())} (one "
        f"thread).",
        "",
        "![curves](graph_vae/mnist-curves.png)",
        "",
        order_sentence(records),
        recalibration_sentence(records),
    ]  # fmt: skip
    if "learned" in records:
        plot_gates(records["learned"], folder / "mnist-gates.png", "fixed binarised MNIST")
        lines += [
            "The gates of the learned model (Figure 3 of the paper); they start at one half.",
            "",
            "![gates](graph_vae/mnist-gates.png)",
            "",
        ]
    for kind, text in (
        ("images", "Samples and reconstructions of"),
        (
            "embedding",
            "t-SNE of the posterior means of 2,000 test images (colours: digits, where labels are known) of",
        ),
    ):
        for structure, record in records.items():
            path = folder / f"{run_name(record)}-{kind}.png"
            if path.exists():
                lines += [f"{text} {LABELS[structure]}:", "", f"![{kind}](graph_vae/{path.name})", ""]
    return "\n".join(lines)


def run_name(record):
    run = record["run"]
    return f"{run['data_set']}-{run['structure']}-s{run['seed']}"


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


def recalibration_sentence(records):
    """Say what hard gates cost a model that was trained with relaxed ones."""
    record = records.get("learned")
    if record is None or not last_final(record) or "elbo_before_recalibration" not in last_final(record)[1]:
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
        structure: {seed: last_final(r) for seed, r in by_seed.items() if last_final(r)}
        for structure, by_seed in found.items()
    }
    finals = {structure: by_seed for structure, by_seed in finals.items() if by_seed}
    if not finals:
        return ""
    elbo = {s: {seed: f["elbo"] for seed, (_, f) in by.items()} for s, by in finals.items()}
    ll = {s: {seed: f["likelihood"]["ll"] for seed, (_, f) in by.items()} for s, by in finals.items()}
    epochs = {e for by in finals.values() for e, _ in by.values()}
    rows = [
        [
            LABELS[s], f"{next(iter(found[s].values()))['parameters']:,}", len(elbo[s]),
            mean_sd(list(elbo[s].values())), mean_sd([sum(f["kl"].values()) for _, f in finals[s].values()]),
            mean_sd(list(ll[s].values())),
            difference(elbo[s], elbo["independent"]) if s != "independent" and "independent" in elbo else "",
            difference(ll[s], ll["independent"]) if s != "independent" and "independent" in ll else "",
        ]
        for s in finals
    ]  # fmt: skip
    lines = [
        "## Digits",
        "",
        "scikit-learn's 8 by 8 digits: 1,297 training images, each pixel drawn as a Bernoulli variable anew in "
        "every epoch; "
        "validation (200) and test images (300) drawn once. N = 5 nodes of 4 dimensions, networks of a quarter "
        "of the width, "
        f"{', '.join(map(str, sorted(epochs)))} epochs, rate × 0.25 after 100. Mean ± standard deviation over "
        f"seeds, which "
        "change the networks, the gates and the draws; differences are paired by seed, mean ± standard error. "
        "Test bound "
        "with 10 samples of the nodes, log-likelihood by importance samples: PARTICLES.",
        "",
        table(
            ["model", "parameters", "seeds", "test bound", "KL", "log-likelihood", "bound − independent's",
             "LL − independent's"],
            rows,
        ),
        "",
        ranking(elbo),
        "",
    ]  # fmt: skip
    particles = sorted({f["likelihood"]["particles"] for by in finals.values() for _, f in by.values()})
    lines = [line.replace("PARTICLES", ", ".join(f"{p:,}" for p in particles)) for line in lines]
    gates = [f["gates"] for _, f in finals.get("learned", {}).values()]
    if gates:
        number = len(gates[0])
        open_gates = [sum(g[i][j] > 0.5 for i in range(number) for j in range(i + 1, number)) for g in gates]
        sure = [
            sum(min(g[i][j], 1 - g[i][j]) < 0.1 for i in range(number) for j in range(i + 1, number))
            for g in gates
        ]
        lines += [
            f"Of the {number * (number - 1) // 2} gates of the learned models, {mean_sd(open_gates, 1)} are "
            f"open at the end, and "
            f"{mean_sd(sure, 1)} have a probability below 0.1 or above 0.9.",
            "",
        ]
        first = min(finals["learned"])
        plot_gates(found["learned"][first], folder / "digits-gates.png", f"digits, seed {first}")
        lines += ["![gates](graph_vae/digits-gates.png)", ""]
    for kind in ("images", "embedding"):
        for s in finals:
            path = folder / f"digits-{s}-s0-{kind}.png"
            if path.exists():
                lines += [f"{LABELS[s]}, seed 0:", "", f"![{kind}](graph_vae/{path.name})", ""]
    return "\n".join(lines)


def ranking(values):
    """Say which neighbours in the order of the mean differ by more than two standard errors."""
    order = sorted(values, key=lambda s: -np.mean(list(values[s].values())))
    parts = [LABELS[order[0]]]
    for a, b in pairwise(order):
        common = sorted(set(values[a]) & set(values[b]))
        d = np.array([values[a][k] - values[b][k] for k in common])
        sure = len(d) > 2 and d.mean() > 2 * d.std(ddof=1) / len(d) ** 0.5
        parts.append(f"{'>' if sure else '≥ (not beyond two standard errors)'} {LABELS[b]}")
    return f"Order of the mean test bounds: {' '.join(parts)}."


def synthetic_section(folder):
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("synthetic-s*.json"))]
    records = [record for record in records if record["rows"]]
    if not records:
        return ""
    names = list(records[0]["rows"])
    rows = []
    for name in names:
        results = [record["rows"][name] for record in records if name in record["rows"]]
        gates = [r["gates"] for r in results if "gates" in r]
        cells = ["", "", ""]
        if gates:
            cells = [
                f"{np.mean([p for g in gates for p in g['true'].values()]):.2f} "
                f"(least {min(p for g in gates for p in g['true'].values()):.2f})",
                f"{np.mean([p for g in gates for p in g['false'].values()]):.2f} "
                f"(most {max(p for g in gates for p in g['false'].values()):.2f})",
                f"{sum(r['missed'] for r in results)} of {4 * len(results)}, "
                f"{sum(r['superfluous'] for r in results)} of {6 * len(results)}",
            ]
        rows.append(
            [
                name,
                len(results),
                mean_sd([r["elbo"] for r in results], 3),
                mean_sd([r["ll"] for r in results], 3),
                *cells,
            ]
        )
    plot_synthetic(records, folder / "synthetic-gates.png")
    settings = records[0]["settings"]
    return "\n".join(
        [
            "## A known latent graph",
            "",
            "Five latent variables, edges z5 → z3 ← z4 → z2 and z3 → z1 out of ten possible ones, each seen "
            "through noise "
            f"as one coordinate of x; {settings['num_data']:,} data, {settings['epochs']} epochs; the decoder "
            f"is given, prior, "
            "encoder and gates are learned (`examples/graph_vae_synthetic.py`). Mean ± standard deviation over seeds "
            f"(other data and networks); bound and log-likelihood of fresh data, in nats. Edge cost: "
            f"{settings['edge_cost']} "
            "nats per datum for an open gate.",
            "",
            table(
                ["model", "seeds", "test bound", "log-likelihood", "gates of true edges", "other gates",
                 "edges missed, superfluous (at one half)"],
                rows,
            ),
            "",
            "The bound drives the gates of true edges to one. It has nothing against an edge that does no good: "
            "once the "
            "networks ignore a useless parent, its gate gets no gradient and stays where it is, some above and "
            "some below one "
            "half. A small price for open gates closes them; that model's gates are frozen for the last fifth "
            "of the epochs.",
            "",
            "![gates](graph_vae/synthetic-gates.png)",
            "",
        ]
    )  # fmt: skip


def ablation_section(runs, folder):
    points = defaultdict(lambda: ([], []))
    for (data_set, structure, nodes, dim, decoder_input), by_seed in runs.items():
        if data_set == "digits" and structure == "learned" and decoder_input == "all" and nodes * dim == 20:
            for record in by_seed.values():
                if last_final(record):
                    points[nodes, dim][0].append(last_final(record)[1]["elbo"])
                    points[nodes, dim][1].append(last_final(record)[1]["likelihood"]["ll"])
    if len(points) < 3:
        return ""
    plot_ablation(points, folder / "digits-ablation.png")
    rows = [[n, d, len(e), mean_sd(e), mean_sd(ll)] for (n, d), (e, ll) in sorted(points.items())]
    return "\n".join(
        [
            "## Number of nodes against dimensions of a node",
            "",
            "Digits, learned structure, 20 latent dimensions in all (Figure 4 of the paper, small).",
            "",
            table(["nodes", "dimensions", "seeds", "test bound", "log-likelihood"], rows),
            "",
            "![ablation](graph_vae/digits-ablation.png)",
            "",
        ]
    )


def smoke_section(runs, folder):
    lines = []
    for data_set, text in (
        ("omniglot", "Omniglot (28 by 28, drawn anew in every epoch; a split of our own)"),
        ("cifar10", "CIFAR-10, the first 4,000 training and 1,000 test images: bits per dimension are of no use for "
         "comparison with the paper, which had 50,000"),
        ("mnist", "MNIST, drawn anew in every epoch"),
    ):  # fmt: skip
        for structure, by_seed in seeds_of(runs, data_set).items():
            record = by_seed[min(by_seed)]
            if last_final(record) is None:
                continue
            epochs, final = last_final(record)
            bits = (
                f", {final['bits_per_dimension']:.2f} bits per dimension"
                if "bits_per_dimension" in final
                else ""
            )
            ll = final["likelihood"]
            lines += [
                f"- {text}: {LABELS[structure]}, {epochs} epochs, {record['parameters']:,} parameters: test bound "
                f"{final['elbo']:.1f}, log-likelihood {ll['ll']:.1f} ± {ll['standard_error']:.1f} "
                f"({ll['particles']:,} "
                f"samples, {ll['images']:,} images){bits}.",
            ]
            path = folder / f"{run_name(record)}-images.png"
            if path.exists():
                lines += ["", f"  ![images](graph_vae/{path.name})", ""]
    return "\n".join(["## Other data sets: that it runs", "", *lines, ""]) if lines else ""


def speed_section(folder):
    path = folder / "speed.json"
    if not path.exists():
        return ""
    record = json.loads(path.read_text())
    rows = [
        [r["structure"], r["num_nodes"], r["node_dim"], f"{r['parameters']:,}", f"{r['svi_ms']:.1f}",
         f"{r['torch_ms']:.1f}", f"{r['epoch_seconds']:.0f}"]
        for r in record["rows"]
    ]  # fmt: skip
    return "\n".join(
        [
            "## Speed",
            "",
            f"Milliseconds of a step, batch 64, 784 pixels ({record['machine']}, {record['date']}; "
            "`benchmarks/graph_vae.py`): Pyro's `SVI` with its Adam, and one torch Adam for all parameters as "
            "`fit` has it.",
            "",
            table(
                ["structure", "N", "N'", "parameters", "SVI", "one Adam", "s an epoch of 50,000 (SVI)"], rows
            ),
            "",
            f"With 16 dimensions a node, each further node adds {record['ms_per_node']:.1f} ms.",
            "",
        ]
    )


def render(out):
    """Write the page from what is there; return its path."""
    out = Path(out)
    folder = out / "graph_vae"
    runs = load(folder)
    machines = sorted({r["machine"] for by in runs.values() for r in by.values()})
    dates = sorted({r["date"] for by in runs.values() for r in by.values()})
    sections = [
        "# Graph VAE: learned latent structure",
        "",
        "He, Gong, Marino, Mori and Lehrmann (2019), *Variational Autoencoders with Jointly Optimized Latent "
        "Dependency "
        "Structure*. Four models of one class, which differ in the edges between latent nodes. Bounds and "
        "log-likelihoods are "
        "in nats for each image, with hard gates and stored batch statistics (in tables: collected anew with "
        "hard gates after training, `vae.recalibrate`); the divergence is that from the "
        "learned prior, "
        "node by node. Made by `examples/graph_vae.py`, `graph_vae_synthetic.py` and `graph_vae_report.py` "
        "(`make graphvae-table`).",
        "",
        f"Machine: {'; '.join(machines) or 'none yet'}. Dates: {', '.join(dates[:1] + dates[1:][-1:])}.",
        "",
        mnist_section(runs, folder),
        digits_section(runs, folder),
        synthetic_section(folder),
        ablation_section(runs, folder),
        smoke_section(runs, folder),
        speed_section(folder),
        "A faithful encoder for learned structures is on [a page of its own](graph_vae_faithful.md)."
        if render_faithful(out)
        else "",
    ]
    path = out / "graph_vae.md"
    path.write_text("\n".join(part for part in sections if part is not None).rstrip("\n") + "\n")
    return path


def render_faithful(out):
    """Write the page on faithful encoders; return its path, or nothing where there are no results."""
    folder = out / "graph_vae"
    exact = folder / "faithful-exact.json"
    if not exact.exists():
        return None
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("faithful-s*.json"))]
    rows = [
        [
            name,
            *(
                f"{row[key]['gap']:.4f} ({row[key]['edges']:.3g})"
                for key in ("shared gates", "faithful", "full")
            ),
        ]
        for name, row in json.loads(exact.read_text()).items()
    ]
    lines = [
        "# A faithful encoder for a learned latent structure",
        "",
        "The encoder of the Graph VAE shares the model's gates: each node is inferred from the data and from "
        "its parents in the "
        "model, in the model's order. Where two parents of a node are not joined, they depend on each other "
        "given the data, and "
        "this encoder cannot say so. The paper left the question open; here the learned graph is inverted "
        "(`faithful_inverse(vae.learned_graph())`) and an encoder with that factorisation is trained. Only a "
        "decoder that sees "
        'the first node alone (`decoder_input="first"`) makes this interesting: with one that sees all nodes they all '
        "depend on each other given the data. Made by `examples/graph_vae_faithful.py`.",
        "",
        "## What the factorisation costs, exactly",
        "",
        "Nodes of one dimension, linear-Gaussian with random parameters: the mean over parameters of the least "
        "divergence that a "
        "guide with this factorisation can reach, in nats, and the number of its edges in brackets.",
        "",
        table(["structure", "shared gates", "faithful", "full"], rows),
        "",
        "The faithful inverse has no gap and no more edges, mostly fewer: below a node that sees the data, most "
        "nodes need not "
        "look at them.",
        "",
    ]
    if records:
        names = list(records[0]["rows"])
        table_rows = []
        for name in names:
            results = [record["rows"][name] for record in records]
            gaps = [r["ll"] - r["elbo"] for r in results]
            edges = [r["edges"] for r in results if "edges" in r]
            faithful = [r["faithful"] for r in results if "faithful" in r]
            table_rows.append(
                [
                    name, mean_sd([r["elbo"] for r in results], 3), mean_sd([r["ll"] for r in results], 3),
                    mean_sd(gaps, 3), ", ".join(map(str, edges)), ", ".join("yes" if f else "no" for f in faithful),
                ]
            )  # fmt: skip
        settings = records[0]["settings"]
        lines += [
            "## Digits",
            "",
            f"Graph VAE with 5 nodes of {settings['node_dim']} dimensions, decoder on the first node, edge cost "
            f"{settings['edge_cost']} nats, {settings['epochs']} epochs; structure frozen, parameters fixed. "
            f"Guides for this model "
            f"with the same kind of network (hidden layers {settings['hidden_dims']}, full covariance within a "
            f"node), trained by "
            "the bound. Mean ± standard deviation over seeds of the model; LL by "
            f"{settings['particles']:,} samples; LL − bound estimates the divergence from the posterior (a "
            f"lower bound of it).",
            "",
            table(["guide", "test bound", "log-likelihood", "LL − bound", "edges", "faithful"], table_rows),
            "",
            *(
                f"Seed {record['seed']}: learned edges "
                f"{', '.join(f'{a} → {b}' for a, b in record['graph'] if b != 'x') or 'none'}. Faithful parents: "
                + "; ".join(f"{v} | {', '.join(p)}" for v, p in record["rows"]["faithful"]["parents"].items())
                + ".\n"
                for record in records
            ),
        ]
        faithful, shared = (
            {k: r["rows"][name]["elbo"] for k, r in enumerate(records)}
            for name in ("faithful", "shared gates")
        )
        lines += [
            f"Bound of the faithful guide minus that of shared gates: {difference(faithful, shared)} nats.",
            "",
        ]
        if np.mean(list(faithful.values())) < np.mean(list(shared.values())):
            lines += [
                "So on these data the faithful factorisation does not pay: the guide with all edges, which contains "
                "the other two, is no better either. This suggests that what is left of the divergence is not a "
                "matter of missing "
                "edges but of normal conditionals and of what can be learned from 1,297 images.",
                "",
            ]
    path = out / "graph_vae_faithful.md"
    path.write_text("\n".join(lines).rstrip("\n") + "\n")
    return path


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--out", default="docs/results")
    print(render(parse.parse_args().out))
