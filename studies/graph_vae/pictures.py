"""The pictures of the Graph VAE study (see run.py)."""

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

COLOURS = {
    "learned": "#1f6fb2",
    "decided": "#8e44ad",
    "full": "#16a085",
    "chain": "#e08e0b",
    "independent": "#7f8c8d",
}
LABELS = {
    "learned": "learned (Graph VAE)",
    "decided": "learned, fast gates, then frozen",
    "full": "full (FC-VAE)",
    "chain": "chain (Ladder VAE)",
    "independent": "independent (VAE)",
}


def finish(ax, xlabel, ylabel):
    """Label axes and take away what is not needed."""
    if xlabel == "epochs":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def plot_curves(records, path):
    """Test bound and importance-weighted likelihood against epochs, one line a structure."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    shown = [[], []]
    for structure, record in records.items():
        rows = [row for row in record["curve"] if "elbo" in row]
        points = [row for row in record["curve"] if "likelihood" in row]
        values = [
            ([row["epoch"] for row in rows], [row["elbo"] for row in rows]),
            ([row["epoch"] for row in points], [row["likelihood"]["ll"] for row in points]),
        ]
        for ax, (x, y), seen, marker in zip(axes, values, shown, ("", "o"), strict=True):
            ax.plot(
                x,
                y,
                color=COLOURS[structure],
                label=LABELS[structure],
                linewidth=1.6,
                marker=marker,
                markersize=3,
            )
            seen += y[len(y) // 10 :]
    for ax, seen in zip(axes, shown, strict=True):
        if seen:
            low, high = np.quantile(seen, 0.02), max(seen)
            ax.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))
    finish(axes[0], "epochs", "test bound, nats")
    finish(axes[1], "epochs", "test log-likelihood, 500 samples, nats")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def plot_gates(record, path, title):
    """Probability of each gate against epochs (Figure 3 of the paper)."""
    rows = [row for row in record["curve"] if "gates" in row]
    number = record["run"]["num_nodes"]
    figure = Figure(figsize=(6.6, 3.6), layout="constrained")
    ax = figure.subplots()
    epochs = [0] + [row["epoch"] for row in rows]
    pairs = [(i, j) for i in range(number) for j in range(i + 1, number)]
    for k, (i, j) in enumerate(pairs):
        values = [0.5] + [row["gates"][i][j] for row in rows]
        colour = f"C{i}"
        ax.plot(epochs, values, color=colour, linewidth=1.4, linestyle=["-", "--", ":", "-."][k % 4])
    # labels at the right, moved apart where they would overlap
    ends = sorted((rows[-1]["gates"][i][j], f"z{j + 1} → z{i + 1}", i) for i, j in pairs)
    place = -1.0
    for value, label, i in ends:
        place = max(value, place + 0.045)
        ax.annotate(
            label, (epochs[-1], place), xytext=(5, -2), textcoords="offset points", fontsize=7, color=f"C{i}"
        )
    ax.set_ylim(-0.03, max(1.03, place + 0.05))
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.margins(x=0.02)
    finish(ax, "epochs", "probability that the gate is open")
    ax.set_title(title, fontsize=10)
    figure.savefig(path, dpi=130)


def tile(images, columns, size=56, gap=3, shade=0.35):
    """Lay images out in a grid with thin grey lines between them, each blown up to about ``size`` pixels."""
    images = np.asarray(images, dtype=float).clip(0, 1)
    factor = max(1, round(size / images.shape[1]))
    images = images.repeat(factor, 1).repeat(factor, 2)
    rows = -(-len(images) // columns)
    height, width, *colour = images.shape[1:]
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, *colour), shade)
    for k, image in enumerate(images):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        canvas[y : y + height, x : x + width] = image
    return canvas


def plot_images(vae, data, path, seed=0):
    """Means of samples, and test images above the means of their reconstructions."""
    torch.manual_seed(seed)
    chosen = data.some_of_test(16)
    pairs = torch.stack([chosen, vae.reconstruct(chosen)], 1).reshape(-1, *data.shape)
    pairs = torch.cat([pairs[0:16:2], pairs[1:16:2], pairs[16::2], pairs[17::2]])
    panels = {
        "samples (means)": tile(vae.sample(32, mean=True).cpu(), 8),
        "test images; below each row, reconstructions": tile(pairs.cpu(), 8),
    }
    dpi, title, space = 100, 24, 24
    height, width = next(iter(panels.values())).shape[:2]
    full = (2 * width + space, height + title)  # in pixels, so that no row of the pictures is drawn twice
    figure = Figure(figsize=(full[0] / dpi, full[1] / dpi))
    for k, (text, canvas) in enumerate(panels.items()):
        place = (k * (width + space) / full[0], 0, width / full[0], height / full[1])
        ax = figure.add_axes(place)
        gray = {} if canvas.ndim == 3 else {"cmap": "gray_r", "vmin": 0, "vmax": 1}
        ax.imshow(canvas, interpolation="nearest", **gray)
        ax.set_title(text, fontsize=10, pad=5)
        ax.set_axis_off()
    figure.savefig(path, dpi=dpi)


def plot_embedding(vae, x, labels, path, seed=0):
    """t-SNE of the posterior means, of all nodes together and of each (Figure 6 of the paper)."""
    from sklearn.manifold import TSNE

    means = {name: value.cpu().numpy() for name, value in vae.encode(x).items()}
    panels = {"all nodes": np.concatenate(list(means.values()), 1), **dict(sorted(means.items()))}
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, (title, values) in zip(axes, panels.items(), strict=False):
        points = TSNE(random_state=seed, perplexity=30, init="pca").fit_transform(values)
        dots = ax.scatter(*points.T, c=labels, cmap="tab10", s=4 if len(points) > 600 else 9, linewidths=0)
        ax.set_title(title, fontsize=9)
    classes = np.unique(np.asarray(labels))
    if len(classes) <= 10:
        marks = [Line2D([], [], linestyle="", marker="o", color=dots.cmap(dots.norm(c))) for c in classes]
        figure.legend(
            marks, [str(c) for c in classes], loc="outside lower center", ncols=10, frameon=False, fontsize=8
        )
    figure.savefig(path, dpi=130)


def plot_ablation(points, path):
    """Test bound against the number of nodes, the product of nodes and dimensions fixed (Figure 4 of the paper)."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    ax = figure.subplots()
    xs = sorted(points)
    for values, label, colour in (
        ([points[x][0] for x in xs], "bound", "#1f6fb2"),
        ([points[x][1] for x in xs], "log-likelihood", "#c0392b"),
    ):
        ax.errorbar(
            range(len(xs)), [np.mean(v) for v in values], [np.std(v) for v in values],
            color=colour, marker="o", markersize=4, linewidth=1.4, capsize=3, label=label,
        )  # fmt: skip
    ax.set_xticks(range(len(xs)), [f"{n} × {d}" for n, d in xs])
    finish(ax, "nodes × dimensions of a node", "test, nats")
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def plot_synthetic(records, path):
    names = [name for name in records[0]["rows"] if "trajectory" in records[0]["rows"][name]]
    figure = Figure(figsize=(4.2 * len(names), 3.2), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for record in records:
            if name not in record["rows"]:
                continue
            trajectory = record["rows"][name]["trajectory"]
            for kind, colour in (("false", "#bbbbbb"), ("true", "#1f6fb2")):
                for edge in trajectory[0][kind]:
                    values = [0.5, *(row[kind][edge] for row in trajectory)]
                    ax.plot(values, color=colour, linewidth=0.9, alpha=0.8)
        ax.set_title(f"{name} (blue: true edges)", fontsize=9)
        ax.set_ylim(-0.03, 1.03)
        finish(ax, "epochs", "gate probability")
    figure.savefig(path, dpi=130)
