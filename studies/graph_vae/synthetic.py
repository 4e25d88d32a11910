r"""Do the gates of a Graph VAE find a latent graph that is known? Synthetic data for the Graph VAE study.

Five latent variables with four edges out of ten possible ones,

    z5 -> z3 <- z4 -> z2,  z3 -> z1:  z3 = 0.9 (z4 + z5) + e,  z2 = 1.5 tanh(1.5 z4) + e,  z1 = 1.5 tanh(1.5 z3) + e,

roots and noise normal with deviations 1 and 0.4; each is seen through noise of deviation 0.3 as one coordinate of x.
The decoder is given (it adds that noise), so that every latent variable has a meaning, and the order of the nodes is
one of the truth's. Prior, encoder and gates are learned.

The bound alone cannot close a gate whose edge does no harm: with enough data the networks learn to ignore a useless
parent, and the gate then stays where it is. So there are two learned rows: as published, and with ``edge_cost``, a
price in nats per datum for an open gate. The second one's structure is frozen for the last fifth of the epochs, in
which the networks learn what hard gates mean.

    python -m studies.graph_vae.synthetic --seeds 0 1 2 3 4

Each row with each seed is one line of the file ``--results``.
"""

import argparse
import datetime
import logging
import time

import networkx as nx
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from pyro_graphflows import GraphVAE, Progress, Schedule, fit
from studies.flags import add_places
from studies.results import Results

EDGES = (("z5", "z3"), ("z4", "z3"), ("z4", "z2"), ("z3", "z1"))
NUM_NODES, NOISE = 5, 0.3
ROWS = ("learned", "learned, edge cost", "true", "full", "independent")


def sample(num_data, seed):
    """Draw data from the true model; columns belong to z1 to z5."""
    generator = torch.Generator().manual_seed(seed)
    noise = dict(
        zip(["z1", "z2", "z3", "z4", "z5"], torch.randn(5, num_data, generator=generator), strict=True)
    )
    z5, z4 = noise["z5"], noise["z4"]
    z3 = 0.9 * (z4 + z5) + 0.4 * noise["z3"]
    z2 = 1.5 * torch.tanh(1.5 * z4) + 0.4 * noise["z2"]
    z1 = 1.5 * torch.tanh(1.5 * z3) + 0.4 * noise["z1"]
    z = torch.stack([z1, z2, z3, z4, z5], -1)
    return z + NOISE * torch.randn(num_data, NUM_NODES, generator=generator)


def likelihood(outputs):
    """The data given the nodes."""
    return dist.Normal(outputs, NOISE).to_event(1)


def make_vae(row, edge_cost):
    structure = {"true": nx.DiGraph(EDGES), "full": "full", "independent": "independent"}.get(row, "learned")
    return GraphVAE(
        (NUM_NODES,),
        NUM_NODES,
        1,
        structure,
        likelihood=likelihood,
        encoder=nn.Sequential(nn.Linear(NUM_NODES, 32), nn.ELU(), nn.Linear(32, 32)),
        embedding_dim=32,
        decoder=nn.Identity(),
        hidden_dim=32,
        edge_cost=edge_cost if row == "learned, edge cost" else 0.0,
    )


def decoder_columns(vae):
    """Return the column of x that each input of the decoder stands for: nodes are numbered by their names."""
    return [int(name[1:]) - 1 for name in vae.names]


def gates_by_edge(vae):
    """Return the probability of each possible edge, those of the truth first."""
    probabilities = vae.gate_probabilities.tolist()
    all_edges = {
        (vae.names[j], vae.names[i]): probabilities[i][j]
        for i in range(NUM_NODES)
        for j in range(i + 1, NUM_NODES)
    }
    true = {f"{a}>{b}": round(all_edges[a, b], 4) for a, b in EDGES}
    false = {f"{a}>{b}": round(p, 4) for (a, b), p in all_edges.items() if (a, b) not in EDGES}
    return {"true": true, "false": false}


def train(row, seed, args):
    """Train one row and measure it on fresh data."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = make_vae(row, args.edge_cost)
    columns = decoder_columns(vae)  # a given graph may order the nodes in another way
    x, test = sample(args.num_data, 2 * seed), sample(args.num_test, 2 * seed + 1)
    x, test = x[: args.limit, columns], test[: args.limit, columns]
    trajectory = []
    last_free_epoch = max(1, args.epochs * 4 // 5)

    def after_epoch(history):
        vae.anneal(len(history), rate=args.anneal)
        if vae.is_learned:
            trajectory.append(gates_by_edge(vae))
        if row == "learned, edge cost" and len(history) == last_free_epoch:
            vae.freeze_structure()

    start = time.process_time()
    fit(
        vae.model,
        vae.guide,
        x,
        loss=TraceMeanField_ELBO(),
        optimizer=args.lr,
        schedule=Schedule(args.epochs, patience=None),
        progress=Progress(bar=False, on_epoch=after_epoch),
        seed=seed,
    )
    seconds = time.process_time() - start
    pyro.set_rng_seed(seed)
    vae.eval()
    loss = TraceMeanField_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        elbo = -loss.loss(vae.model, vae.guide, test) / len(test)
    evidence = vae.log_evidence(test[:500], args.particles)
    result = {"elbo": elbo, "ll": evidence.log_evidence.mean().item(), "cpu_seconds": seconds}
    if vae.is_learned:
        before_freezing = trajectory[:last_free_epoch] if row == "learned, edge cost" else trajectory
        result |= {"gates": before_freezing[-1], "trajectory": before_freezing}
        found = {edge for edge in vae.learned_graph().edges if edge[1] != "x"}
        result |= {"missed": len(set(EDGES) - found), "superfluous": len(found - set(EDGES))}
    return result


def main(args):
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    logging.getLogger("pyro").setLevel(logging.WARNING)
    results = Results(args.results)
    settings = {k: v for k, v in vars(args).items() if k not in ("results", "out", "work", "seeds")}
    for seed in args.seeds:
        for row in ROWS:
            key = f"synthetic-{row.replace(', ', '-').replace(' ', '-')}-s{seed}"
            if key not in results:
                about = {"seed": seed, "row": row, "settings": settings}
                about["date"] = datetime.date.today().isoformat()
                results.append(key, {**about, **train(row, seed, args)})
            result = results.get(key)
            gates = ""
            if "gates" in result:
                low, high = min(result["gates"]["true"].values()), max(result["gates"]["false"].values())
                gates = f", true edges >= {low:.2f}, others <= {high:.2f}"
            print(
                f"seed {seed} {row:>18}: ELBO {result['elbo']:.3f}, LL {result['ll']:.3f}{gates}", flush=True
            )


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--seeds", nargs="+", type=int, default=[0])
    parse.add_argument("--epochs", type=int, default=60)
    parse.add_argument("--num-data", type=int, default=2000)
    parse.add_argument("--num-test", type=int, default=5000)
    parse.add_argument("--limit", type=int, help="use only the first data")
    parse.add_argument("--particles", type=int, default=500)
    parse.add_argument("--lr", type=float, default=1e-2)
    parse.add_argument("--anneal", type=float, default=0.95, help="factor of the temperature in each epoch")
    parse.add_argument("--edge-cost", type=float, default=0.03, help="nats per datum")
    add_places(parse, "graph_vae")
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
