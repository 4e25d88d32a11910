r"""A variational autoencoder that learns which of its latent variables depend on which.

scikit-learn's 8 by 8 digits, pixels drawn as zeros and ones. ``GraphVAE`` has every possible edge between its
latent nodes behind a gate and learns the gates with the networks (``learned``); beside it the same model without edges
(``independent``). An open gate costs a little (``edge_cost``), since the bound has nothing against an edge of no use;
for the last fifth of the epochs the structure is frozen.

    python examples/graph_vae.py              # a minute or two
    python examples/graph_vae.py --epochs 100 --pictures out/graph_vae

References:
    [1] He, Gong, Marino, Mori and Lehrmann (2019), Variational Autoencoders with Jointly Optimized Latent Dependency
    Structure, ICLR. A study of it, with image files of the usual data sets, is in ``studies/graph_vae``.
"""

import argparse
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

from pyro_graphflows import GraphVAE
from pyro_graphflows.datasets import load_images

SMALL = {"encoder_dims": [128, 64], "decoder_dims": [64, 128], "embedding_dim": 64, "hidden_dim": 64}


def bits(images, num_levels):
    """Return images of zeros and ones, drawn with the pixels' brightness as their probabilities."""
    return torch.bernoulli(images.float() / (num_levels - 1))


def train(structure, images, args):
    """Return a trained model."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    vae = GraphVAE(images.shape, args.num_nodes, args.node_dim, structure, edge_cost=args.edge_cost, **SMALL)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": args.lr}), TraceMeanField_ELBO())
    for epoch in range(1, args.epochs + 1):
        for index in torch.randperm(len(images.train)).split(args.batch_size):
            svi.step(bits(images.train[index], images.num_levels))
        vae.anneal(epoch, rate=args.anneal)  # gates become harder
        if structure == "learned" and epoch == max(1, args.epochs * 4 // 5):
            vae.freeze_structure()
    vae.recalibrate(bits(images.train, images.num_levels))  # batch statistics with hard gates
    return vae.eval()


def draw(vae, path):
    """Draw samples of a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2))
    for panel, image in zip(figure.subplots(2, 8).flat, vae.sample(16, mean=True), strict=True):
        panel.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        panel.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(args):
    torch.set_num_threads(1)
    images = load_images("digits")
    pyro.set_rng_seed(args.seed)
    test = bits(images.test, images.num_levels)
    print(f"{len(images.train)} training and {len(test)} test images; nats for each image\n")
    print(f"{'structure':>12} {'parameters':>11} {'test bound':>11} {'log-likelihood':>15}")
    for structure in ("independent", "learned"):
        vae = train(structure, images, args)
        pyro.set_rng_seed(args.seed)
        bound = TraceMeanField_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
        with torch.no_grad():
            elbo = -bound.loss(vae.model, vae.guide, test) / len(test)
        evidence = vae.log_evidence(test, args.num_particles).log_evidence.mean().item()
        size = sum(p.numel() for p in vae.parameters())
        print(f"{structure:>12} {size:>11,} {elbo:>11.2f} {evidence:>15.2f}", flush=True)
        if args.pictures:
            draw(vae, Path(args.pictures) / f"{structure}.png")
    edges = [f"{a} -> {b}" for a, b in vae.learned_graph().edges if b != "x"]
    print(f"\nLearned edges: {', '.join(edges) or 'none'}")


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--num-nodes", type=int, default=4)
    parse.add_argument("--node-dim", type=int, default=4)
    parse.add_argument("--epochs", type=int, default=40)
    parse.add_argument("--batch-size", type=int, default=64)
    parse.add_argument("--lr", type=float, default=2e-3)
    parse.add_argument("--edge-cost", type=float, default=0.02, help="nats per image for an open gate")
    parse.add_argument(
        "--anneal", type=float, default=0.95, help="factor of the gates' temperature, each epoch"
    )
    parse.add_argument("--num-particles", type=int, default=200, help="importance samples of each test image")
    parse.add_argument("--pictures", help="a folder for pictures of samples")
    parse.add_argument("--seed", type=int, default=0)
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
