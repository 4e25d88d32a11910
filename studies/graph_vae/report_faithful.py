"""The page on faithful encoders for learned latent structures (see faithful.py)."""

from studies.graph_vae.records import difference
from studies.tables import mean_sd, table

FEWEST = "faithful, fewest edges"


def render_faithful(all_records, out):
    """Write the page on faithful encoders; return its path, or nothing where there are no results."""
    if "faithful-exact" not in all_records:
        return None
    records = [record for key, record in all_records.items() if key.startswith("faithful-s")]
    content = all_records["faithful-exact"]["structures"]
    names = [key for key in next(iter(content.values())) if key != "edges"]
    rows = [
        [structure, *(f"{row[name]['gap']:.4f} ({row[name]['edges']:.3g})" for name in names)]
        for structure, row in content.items()
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
        "depend on each other given the data. Made by `studies/graph_vae/faithful.py`.",
        "",
        "## What the factorisation costs, exactly",
        "",
        "Nodes of one dimension, linear-Gaussian with random parameters: the mean over parameters of the least "
        "divergence that a "
        "guide with this factorisation can reach, in nats, and the number of its edges in brackets.",
        "",
        table(["structure", *names], rows),
        "",
        "The faithful inverse with the fewest edges has no gap and no more edges than shared gates, mostly fewer: "
        "below a node that sees the data, most nodes need not look at them.",
        "",
    ]
    if records:
        lines += digits_part(records)
    path = out / "graph_vae_faithful.md"
    path.write_text("\n".join(lines).rstrip("\n") + "\n")
    return path


def digits_part(records):
    """The guides that were trained: on images, and on samples of the model."""
    settings = records[0]["settings"]
    by_seed = {record["seed"]: record["rows"] for record in records}

    def values(name, key):
        found = {seed: rows[name] for seed, rows in by_seed.items() if key in rows.get(name, {})}
        return {seed: row[key] for seed, row in found.items() if not broke_off(row, key)}

    def lines_of(elbo, ll, extra):
        names = [name for name in records[0]["rows"] if values(name, elbo)]
        rows = []
        for name in names:
            bounds, lls = values(name, elbo), values(name, ll)
            rows.append(
                [
                    name, len(bounds), mean_sd(list(bounds.values()), 3),
                    difference(bounds, values("shared gates", elbo), 3) if name != "shared gates" else "",
                    mean_sd([lls[seed] - bounds[seed] for seed in bounds], 3),
                    *extra(name),
                ]
            )  # fmt: skip
        return rows

    def train_and_edges(name):
        train = values(name, "train_elbo")
        edges = values(name, "edges")
        return [
            mean_sd(list(train.values()), 3),
            difference(train, values("shared gates", "train_elbo"), 3) if name != "shared gates" else "",
            ", ".join(map(str, edges.values())),
            ", ".join("yes" if f else "no" for f in values(name, "faithful").values()),
        ]

    few = "One seed, and short: guides of a model are trained for less than the model's own encoder was."
    on_samples = lines_of("sample_elbo", "sample_ll", lambda name: [])
    endless = [
        f"*Trained on endless samples of the model* ({settings['sample_epochs']} × {settings['sample_steps']} steps of "
        f"64) and measured on {settings['model_samples']:,} others: nothing has to be carried over from few images. LL "
        "is that of the model's own encoder here.",
        "",
    ]
    head = ["guide", "seeds", "bound", "minus shared gates'", "LL − bound"]
    endless = [*endless, table(head, on_samples), "", on_endless(values), ""] if len(on_samples) > 1 else []
    return [
        "## Digits",
        "",
        f"Graph VAE with 5 nodes of {settings['node_dim']} dimensions, decoder on the first node, edge cost "
        f"{settings['edge_cost']} nats, {settings['epochs']} epochs; structure frozen, parameters fixed. Guides for "
        f"this model with the same kind of network (hidden layers {settings['hidden_dims']}, full covariance within a "
        f"node), trained by the bound for at most {settings['guide_epochs']} epochs, in double precision. Mean ± "
        "standard deviation over seeds of the model; differences are paired by seed, mean ± standard error. LL by "
        f"{settings['particles']:,} samples; LL − bound estimates the divergence from the posterior (a lower bound of "
        "it). For one model the difference of two bounds on the same data is that of the divergences. "
        + breaks(by_seed),
        "",
        "*Trained on the 1,297 images*, their pixels drawn anew in every epoch, stopped by 200 others. The first bound "
        "is that of test images:",
        "",
        table(
            [*head, "bound on training images", "minus shared gates'", "edges", "faithful"],
            lines_of("elbo", "ll", train_and_edges),
        ),
        "",
        conclusion(values),
        "",
        *([few, ""] if len(records) == 1 and settings["guide_epochs"] < settings["epochs"] else []),
        *endless,
        *(
            f"Seed {record['seed']}: learned edges "
            f"{', '.join(f'{a} → {b}' for a, b in record['graph'] if b != 'x') or 'none'}. Parents in the faithful "
            "inverse with the fewest edges: "
            + "; ".join(f"{v} | {', '.join(p)}" for v, p in record["rows"][FEWEST]["parents"].items())
            + ".\n"
            for record in records
        ),
    ]


def broke_off(row, key):
    """Whether the training that a figure is from ended where loss or gradient were not finite."""
    about = row.get("on_samples", {}) if key in ("sample_elbo", "sample_ll") else row
    return "not finite" in about.get("stop_reason", "")


def breaks(by_seed):
    """Name the runs that are left out because their training broke off."""
    named = [
        f"{name}, seed {seed}, {where}"
        for seed, rows in by_seed.items()
        for name, row in rows.items()
        for key, where in (("elbo", "on images"), ("sample_elbo", "on samples"))
        if broke_off(row, key)
    ]
    if not named:
        return ""
    return (
        "Left out, because the training broke off where the gradient was not finite (steps are clipped, but a chain of "
        f"conditionals whose scales are exponentials can still run away): {'; '.join(named)}."
    )


def on_endless(values):
    """Say what the guides that were trained on endless samples differ by."""
    shared = values("shared gates", "sample_elbo")
    own, order, fewest = (
        difference(values(name, "sample_elbo"), shared, 3)
        for name in ("the Graph VAE's own encoder", "faithful, model's order", FEWEST)
    )
    return (
        f"Against shared gates trained in the same way, the bound changes by {order} nats with the missing edges, by "
        f"{fewest} with the fewest edges and by {own} with the encoder that the model was trained with. The first is "
        "to be compared with the exact gaps above, of random linear-Gaussian models: in a trained model dependences "
        "can be far weaker. The last says how much a better trained encoder is worth."
    )


def conclusion(values):
    """Say what the missing edges and the other order are worth on training and on test images."""

    def gains(name):
        return [
            difference(values(name, key), values("shared gates", key), 3) for key in ("train_elbo", "elbo")
        ]

    same_order, fewest = gains("faithful, model's order"), gains(FEWEST)
    train = [values(name, "train_elbo") for name in ("faithful, model's order", "shared gates")]
    both = [train[0][seed] - train[1][seed] for seed in train[0].keys() & train[1].keys()]
    mean = sum(both) / max(1, len(both))
    error = (sum((d - mean) ** 2 for d in both) / max(1, len(both) - 1) / max(1, len(both))) ** 0.5
    verdict = (
        "So the missing edges are worth something where they must be, on the images that the guides were trained on."
        if mean > 2 * error
        else "So the missing edges do not pay even on the images that the guides were trained on, where the more "
        "general guide cannot be worse at its optimum: their worth is below what training leaves undone."
    )
    return (
        f"Adding the missing edges in the same order changes the bound by {same_order[0]} nats on training images "
        f"and by {same_order[1]} on test images; the faithful inverse with the fewest edges by {fewest[0]} and "
        f"{fewest[1]}. " + verdict
    )
