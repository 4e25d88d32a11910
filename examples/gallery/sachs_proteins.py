"""Proteins in single cells: a variational autoencoder that follows a signalling network.

The consensus network of Sachs et al. (2005), Science 308, on 1,200 of their cells (tutorials/data/README.md). The
four hubs of the network are left out of the data and become latent nodes; SIReNVAE (Mouton and Kroon 2022) follows
the network, VAE has as many latent variables and no structure. Judged by the likelihood of held-out cells.

    python examples/gallery/sachs_proteins.py
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from compare_guides import figure, save

from pyro_graphflows import VAE, ModelGraph, Schedule, SIReNVAE, TrainingData
from pyro_graphflows.graphs import protein_network

DATA = Path(__file__).parents[2] / "tutorials" / "data" / "proteins.npz"
HIDDEN = ("plcg", "pip3", "pkc", "pka")


def main(args):
    """Train both; print figures of held-out cells; draw data beside simulated cells."""
    torch.set_num_threads(1)
    data = np.load(DATA)
    columns = [str(name) for name in data["columns"]]
    seen = [name for name in columns if name not in HIDDEN]
    graph = ModelGraph(protein_network().edges, observed=seen)
    order = [name for name in graph.nodes if name in seen]
    cells = torch.tensor(data["cells"][:, [columns.index(name) for name in order]]).log()
    cells = (cells - cells.mean(0)) / cells.std(0)
    train, validation, test = cells[:800], cells[800:1000], cells[1000:]
    test = test[: args.num_test]
    print(f"{'model':<10}{'ELBO':>10}{'IWAE':>10}{'k-hat > 0.7':>13}   nats per held-out cell")
    for name, kind in (("VAE", VAE), ("SIReNVAE", SIReNVAE)):
        torch.manual_seed(args.seed)
        vae = kind(graph)
        vae.fit(
            TrainingData(train, validation=validation), optimizer=5e-3, seed=args.seed, progress=False,
            schedule=Schedule(args.epochs, max_grad_norm=50.0),
        )  # fmt: skip
        with torch.no_grad():
            one = vae.log_evidence(test, num_particles=1).log_evidence.mean()
            many = vae.log_evidence(test, num_particles=args.num_draws)
        bad = (many.khat > 0.7).double().mean()
        print(
            f"{name:<10}{float(one):>10.3f}{float(many.log_evidence.mean()):>10.3f}{float(bad):>13.1%}",
            flush=True,
        )
    made, axes = figure(2)
    for ax, (a, b) in zip(axes, (("raf", "mek"), ("p38", "jnk")), strict=True):
        ax.plot(cells[:, order.index(a)], cells[:, order.index(b)], ".", markersize=2, alpha=0.4)
        ax.set(xlabel=f"{a} (log, standardised)", ylabel=b)
    save(made, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--num-test", type=int, default=200)
    parser.add_argument("--num-draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/gallery/sachs_proteins.png", help="the figure")
    main(parser.parse_args())
