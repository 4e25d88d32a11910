"""What the pages of the Graph VAE study are made from: records of runs, differences paired by seed, sentences."""

from collections import defaultdict
from itertools import pairwise

import numpy as np

from studies.graph_vae.pictures import LABELS


def image_runs(records):
    """Return the records of image runs by (data set, structure, nodes, dimensions, decoder input) and seed.

    A learned structure that was frozen while it was trained counts as a structure of its own, ``"decided"``.
    """
    runs = defaultdict(dict)
    for record in records.values():
        run = record.get("run")
        if run is not None:
            structure = "decided" if run.get("freeze_after") is not None else run["structure"]
            key = (run["data_set"], structure, run["num_nodes"], run["node_dim"], run["decoder_input"])
            runs[key][run["seed"]] = record
    return dict(runs)


def last_final(record):
    """Return the number of epochs and the figures of the longest training."""
    epochs = max(record["finals"], key=int)
    return int(epochs), record["finals"][epochs]


def picture(folder, name, text, alt="images"):
    """Return the lines that show a picture below a text; none where there is no such picture."""
    if not (folder / name).exists():
        return []
    return [text, "", f"![{alt}]({folder.name}/{name})", ""]


def difference(a, b, digits=2):
    """Return the mean difference over common seeds with its standard error, as text."""
    common = sorted(set(a) & set(b))
    values = np.array([a[seed] - b[seed] for seed in common])
    if len(values) < 2:
        return f"{values.mean():+.{digits}f}" if len(values) else "–"
    return f"{values.mean():+.{digits}f} ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"


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


def run_name(record):
    run = record["run"]
    return f"{run['data_set']}-{run['structure']}-s{run['seed']}"


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
