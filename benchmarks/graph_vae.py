"""Time of a Graph VAE training step at the size of MNIST, and how it grows with the number of nodes.

Processor time of one thread, batch 64, 28 by 28 pixels, 80 latent dimensions in all. Three ways to take a step: Pyro's
``SVI`` with its Adam (one torch optimiser for each parameter), one torch Adam for all parameters (what ``fit`` does),
and the loss with its gradient alone. Growth is also measured with a fixed 16 dimensions for each node.

    python -m benchmarks.graph_vae [--results studies/graph_vae/results.jsonl]

With ``--results`` the times become the line ``speed`` of that file, which ``studies/graph_vae/report.py`` shows.
"""

import argparse
import datetime
import os
import time

import numpy as np
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

from pyro_graphflows import GraphVAE
from studies.results import Results

BATCH = 64
STEPS_PER_EPOCH = -(-50_000 // BATCH)


def timed(step, num_steps, num_repeats):
    """Return the least mean time of some blocks of steps, in milliseconds of processor time."""
    for _ in range(5):
        step()
    means = []
    for _ in range(num_repeats):
        begin = time.process_time()
        for _ in range(num_steps):
            step()
        means.append((time.process_time() - begin) / num_steps * 1000)
    return min(means)


def measure(structure, num_nodes, node_dim, args):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = GraphVAE((28, 28), num_nodes, node_dim, structure)
    x = (torch.rand(BATCH, 28, 28) < 0.13).float()
    loss = TraceMeanField_ELBO()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3, "fused": True}), loss)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)

    def gradient():
        for parameter in vae.parameters():
            parameter.grad = None
        loss.differentiable_loss(vae.model, vae.guide, x).backward()

    def torch_step():
        gradient()
        optimizer.step()

    counts = (args.steps, args.repeats)
    return {
        "structure": structure,
        "num_nodes": num_nodes,
        "node_dim": node_dim,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "tensors": len(list(vae.parameters())),
        "svi_ms": timed(lambda: svi.step(x), *counts),
        "torch_ms": timed(torch_step, *counts),
        "gradient_ms": timed(gradient, *counts),
    }


def main(args):
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pyro.enable_validation(False)
    rows = [measure(s, 5, 16, args) for s in ("learned", "full", "chain", "independent")]
    rows += [measure("learned", n, 80 // n, args) for n in args.nodes if n != 5]
    rows += [measure("learned", n, 16, args) for n in args.nodes if n != 5]
    print(
        f"{'structure':>12} {'N':>3} {'dim':>4} {'parameters':>11} {'SVI':>7} {'torch':>7} {'gradient':>9}  s an epoch"
    )
    for row in rows:
        row["epoch_seconds"] = row["svi_ms"] * STEPS_PER_EPOCH / 1000
        print(
            f"{row['structure']:>12} {row['num_nodes']:>3} {row['node_dim']:>4} {row['parameters']:>11,} "
            f"{row['svi_ms']:>7.1f} {row['torch_ms']:>7.1f} {row['gradient_ms']:>9.1f} {row['epoch_seconds']:>8.1f}"
        )
    fixed = [row for row in rows if row["structure"] == "learned" and row["node_dim"] == 16]
    slope = np.polyfit([row["num_nodes"] for row in fixed], [row["svi_ms"] for row in fixed], 1)
    print(f"SVI step with 16 dimensions a node: {slope[1]:.1f} ms + {slope[0]:.1f} ms for each node")
    if args.results:
        record = {
            "rows": rows,
            "ms_per_node": slope[0],
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} CPU cores, shared; processor time of one thread",
        }
        Results(args.results).append("speed", record)


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 5, 8, 10])
    parse.add_argument("--steps", type=int, default=10)
    parse.add_argument("--repeats", type=int, default=8)
    parse.add_argument("--results", help="the file of results that gets a line")
    main(parse.parse_args())
