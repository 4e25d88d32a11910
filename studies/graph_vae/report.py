"""The pages of the Graph VAE study: tables and pictures from whatever runs are there (see run.py).

python -m studies.graph_vae.report
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from studies.flags import add_places
from studies.graph_vae.pictures import LABELS, plot_ablation, plot_synthetic
from studies.graph_vae.records import difference, image_runs, last_final, run_name, seeds_of
from studies.graph_vae.report_ensemble import remedies_section, trained_section
from studies.graph_vae.report_faithful import render_faithful
from studies.graph_vae.report_images import digits_section, mnist_section
from studies.graph_vae.synthetic import ROWS
from studies.results import Results
from studies.tables import mean_sd, table


def synthetic_records(all_records):
    """Return a record for each seed of the synthetic data, with its rows by name."""
    found = {}
    for key, result in all_records.items():
        if key.startswith("synthetic-"):
            record = found.setdefault(
                result["seed"], {"rows": {}, **{k: result[k] for k in ("seed", "settings")}}
            )
            record["rows"][result["row"]] = result
    for record in found.values():
        record["rows"] = {row: record["rows"][row] for row in ROWS if row in record["rows"]}
    return [found[seed] for seed in sorted(found)]


def synthetic_section(all_records, folder):
    records = synthetic_records(all_records)
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
    bounds = {
        name: {r["seed"]: r["rows"][name]["elbo"] for r in records if name in r["rows"]} for name in names
    }
    gains = [
        f"{name} {difference(bounds[name], bounds['independent'])}"
        for name in names
        if name != "independent" and "independent" in bounds
    ]
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
            "encoder and gates are learned (`studies/graph_vae/synthetic.py`). Mean ± standard deviation over seeds "
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
            f"Bound minus that of the independent model, paired by seed, ± standard error: {', '.join(gains)}.",
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


def speed_section(records):
    record = records.get("speed")
    if record is None:
        return ""
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


def render(results, out):
    """Write the pages from what is there; return the path of the first."""
    out = Path(out)
    folder = out / "graph_vae"
    folder.mkdir(parents=True, exist_ok=True)
    records = Results(results).read()
    runs = image_runs(records)
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
        "node by node. Made by `studies/graph_vae/run.py` and `synthetic.py` (`make graphvae-table`); each run is a "
        "line of [`studies/graph_vae/results.jsonl`](../../studies/graph_vae/results.jsonl).",
        "",
        f"Machine: {'; '.join(machines) or 'none yet'}. Dates: {', '.join(dates[:1] + dates[1:][-1:])}.",
        "",
        mnist_section(runs, folder),
        trained_section(records),
        digits_section(runs, folder),
        remedies_section(records),
        synthetic_section(records, folder),
        ablation_section(runs, folder),
        smoke_section(runs, folder),
        speed_section(records),
        "A faithful encoder for learned structures is on [a page of its own](graph_vae_faithful.md)."
        if render_faithful(records, out)
        else "",
    ]
    path = out / "graph_vae.md"
    path.write_text("\n".join(part for part in sections if part is not None).rstrip("\n") + "\n")
    return path


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_places(parse, "graph_vae", report=True)
    args = parse.parse_args()
    print(render(args.results, args.out))
