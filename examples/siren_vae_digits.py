r"""A hypothesised Bayesian network behind images: handwritten digits with named latent variables.

An image is one leaf of 64 pixels with a decoder of its own. Behind it sits a network of latent variables that somebody
could write down: what digit it is (a vector), how thick the stroke is, how much it leans, and the rest of the
style, which may depend on the digit. Leaves that can be measured on the image or are known tie the names down:

    digit -> style, thickness          digit -> label
    thickness -> ink (mean brightness of the image)     slant -> lean (second moment of the image)
    digit, style, thickness, slant -> image

The model is compared with a plain VAE of the same latent size on few and on many images: log-density of
the image and the measured leaves. Then one latent variable at a time is moved, which shows whether it does what its
name says.

    python examples/siren_vae_digits.py                    # a few minutes; tables, and pictures in out/digits

Data: the 8×8 digits of scikit-learn, pixels above half brightness set to one.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from pyro_graphflows import VAE, ModelGraph, SIReNVAE

PIXELS = 64
LIKELIHOOD = {"image": "bernoulli", "label": ("categorical", 10), "ink": "normal", "lean": "normal"}


def hypothesis():
    """Return the network."""
    edges = [
        ("digit", "style"),
        ("digit", "thickness"),
        ("digit", "label"),
        ("thickness", "ink"),
        ("slant", "lean"),
    ]
    edges += [(name, "image") for name in ("digit", "style", "thickness", "slant")]
    sizes = {"digit": 3, "style": 2, "image": PIXELS}
    return ModelGraph(edges, ["image", "label", "ink", "lean"], event_sizes=sizes)


def data(graph):
    """Return the rows of data in the order of the graph's observed nodes."""
    images, labels = load_digits(return_X_y=True)
    pixels = images / 16.0
    ink = pixels.mean(1)
    rows, columns = np.mgrid[0:8, 0:8]
    weight = pixels.reshape(-1, 8, 8) / pixels.sum(1)[:, None, None]
    centre_row, centre_column = ((weight * grid).sum((1, 2), keepdims=True) for grid in (rows, columns))
    spread = weight * (rows - centre_row)
    lean = (spread * (columns - centre_column)).sum((1, 2)) / (spread * (rows - centre_row)).sum((1, 2))
    parts = {"image": pixels > 0.5, "label": labels[:, None], "ink": ink[:, None], "lean": lean[:, None]}
    joined = np.concatenate([parts[node] for node in graph.observed], 1).astype(np.float32)
    return torch.tensor(joined[np.random.default_rng(0).permutation(len(joined))])


def perceptron(num_inputs, num_outputs, width=64):
    return nn.Sequential(nn.Linear(num_inputs, width), nn.ELU(), nn.Linear(width, num_outputs))


def make(name, graph, seed):
    torch.manual_seed(seed)
    if name == "VAE":
        return VAE(graph, hidden_dim=64, likelihood=LIKELIHOOD)
    return SIReNVAE(
        graph,
        decoder={"image": perceptron(7, PIXELS)},
        encoder={"image": perceptron(PIXELS, 16)},
        likelihood=LIKELIHOOD,
    )


def move(vae, x, node, shifts):
    """Return images of the decoder's mean for data's latent vectors with one node shifted by standard deviations."""
    with torch.no_grad():
        features = vae.observation.to_features(x)
        z, _ = vae.encode(features, torch.randn(len(x), vae.latent_dim))
        part, images = vae.latents[node], []
        for shift in shifts:
            moved = z.clone()
            moved[:, part] += shift * z[:, part].std(0)
            mean = vae.observation.mean(vae.decode(moved, features))
            images.append(mean[:, vae.observation.columns["image"]])
    return torch.stack(images, 1)


def draw(vae, x, out):
    """Draw digits with each of the named latent variables moved from low to high."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shifts = (-2, -1, 0, 1, 2)
    labels = x[:, vae.observation.columns["label"]].squeeze(1)
    chosen = torch.stack([x[labels == digit][0] for digit in (0, 1, 3, 5, 8)])
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained")
    strengths = {}
    for axes, node in zip(panels, ("thickness", "slant", "style"), strict=True):
        torch.manual_seed(1)
        images = move(vae, x[:500], node, shifts).view(500, len(shifts), 8, 8)
        strengths[node] = images.mean((2, 3)).mean(0)
        torch.manual_seed(1)
        grid = move(vae, chosen, node, shifts) if len(chosen) > 1 else images
        grid = grid.view(len(chosen), len(shifts), 8, 8).permute(0, 2, 1, 3).reshape(8 * len(chosen), -1)
        axes.imshow(grid, cmap="gray_r", vmin=0, vmax=1)
        axes.set(
            title=node,
            xticks=[3.5 + 8 * i for i in range(5)],
            xticklabels=[f"{s:+d}" for s in shifts],
            yticks=[],
        )
    figure.supxlabel("shift in standard deviations")
    figure.savefig(out / "moved.png", dpi=130)
    plt.close(figure)
    return strengths


def main(args):
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    graph = hypothesis()
    x = data(graph)
    test, pool = x[:500], x[500:]
    print(
        f"{graph}; mean log p of 500 test rows (image, label, ink, lean) in nats, {args.num_particles} particles"
    )
    print(f"{'images':>7} {'model':>9} {'log p':>9} {'± error':>8} {'ELBO':>9} {'epochs':>7}")
    for size in args.sizes:
        for name in ("VAE", "SIReNVAE"):
            vae = make(name, graph, args.seed)
            held = max(20, size // 5)
            train, validation = pool[: size - held], pool[size - held : size]
            history = vae.fit(
                train, num_epochs=args.epochs, validation=validation, optimizer=5e-3, patience=15, lr_factor=0.3,
                min_lr=1e-4, max_grad_norm=50.0, seed=args.seed, progress=args.progress,
            )  # fmt: skip
            evidence = vae.log_evidence(test, num_particles=args.num_particles).log_evidence
            elbo = torch.stack([vae.elbo(test).detach() for _ in range(5)]).mean()
            error = float(evidence.std()) / len(test) ** 0.5
            print(
                f"{size:>7} {name:>9} {evidence.mean():>9.2f} {error:>8.2f} {elbo:>9.2f} {len(history):>7}",
                flush=True,
            )
    strengths = draw(vae, test, out)
    ink = ", ".join(f"{value:.3f}" for value in strengths["thickness"].tolist())
    print(f"Mean brightness of the decoded images as thickness moves from -2 to 2 standard deviations: {ink}")
    print(f"Pictures in {out}")


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument(
        "--sizes", type=int, nargs="+", default=[100, 300, 1000], help="numbers of images to learn from"
    )
    parse.add_argument("--epochs", type=int, default=300, help="at most so many epochs")
    parse.add_argument("--num-particles", type=int, default=100)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--out", default="out/digits")
    parse.add_argument("--progress", action="store_true")
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
