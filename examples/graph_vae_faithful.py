r"""A faithful encoder for a learned latent structure, against the encoder that shares the model's gates.

The Graph VAE's encoder has the model's own edges: each node is inferred from the data and from its parents in the
model, sampled in the model's order. That is the wrong way round where two parents of one node are not joined: given the
data they depend on each other, and this encoder cannot say so. The faithful inverse of the learned graph can.

1. *Exactly.* With linear-Gaussian nodes the least divergence that a factorisation allows (its gap) is known:
   ``LinearGaussianNetwork.factorization_gap`` of the shared and the faithful factorisation, for a collider, a chain,
   the graphs learned here and random graphs.
2. *Digits.* A Graph VAE with ``decoder_input="first"`` (with a decoder that sees all nodes they all depend on each
   other given the data, whatever was learned) is trained, its structure frozen and its parameters
   fixed. Then guides with the same kind of network and three factorisations are trained for this one model: shared
   gates, faithful, full. LL minus ELBO is what is left of the divergence from the posterior.

    python examples/graph_vae_faithful.py --out docs/results

References:
    [1] He et al. (2019), Variational Autoencoders with Jointly Optimized Latent Dependency Structure, ICLR.
    [2] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference, NeurIPS.
"""

import argparse
import datetime
import json
import logging
import time
from pathlib import Path

import networkx as nx
import numpy as np
import pyro
import torch
from graph_vae_runs import SMALL_NETWORKS, Data, bound
from pyro.infer import TraceMeanField_ELBO

from pyro_graphflows import (
    GraphVAE,
    InverseGraph,
    LinearGaussianNetwork,
    ModelGraph,
    auto_faithful_guide,
    faithful_inverse,
    fit,
    fully_connected_inverse,
    is_imap,
    log_evidence,
)


def shared_inverse(graph):
    """Return the factorisation of the encoder that shares the model's gates: model parents and the data."""
    parents = {node: [*graph.parents(node), *graph.observed] for node in graph.latent}
    return InverseGraph(graph, parents, order="shared gates", sampling_order=graph.latent)


def inverses(graph):
    return {
        "shared gates": shared_inverse(graph),
        "faithful": faithful_inverse(graph),
        "full": fully_connected_inverse(graph),
    }


# ------------------------------------------------------------------------------------------------------- exactly


def observed_graph(edges, nodes):
    """Return latent nodes with edges and one observed leaf below ``z1``."""
    dag = nx.DiGraph()
    dag.add_nodes_from(nodes)
    dag.add_edges_from([*edges, ("z1", "x")])
    return ModelGraph(dag, ["x"])


def random_edges(rng, num_nodes, probability):
    """Return a random structure in which every node leads to ``z1``."""
    edges = []
    for child in range(1, num_nodes):
        edges += [
            (f"z{p}", f"z{child}") for p in range(child + 1, num_nodes + 1) if rng.random() < probability
        ]
    for node in range(2, num_nodes + 1):
        if not any(parent == f"z{node}" for parent, _ in edges):
            edges.append((f"z{node}", f"z{rng.integers(1, node)}"))
    return edges


def exact_gaps(graph, num_draws=20):
    """Return the mean gap of each factorisation over random linear-Gaussian parameters, in nats."""
    gaps = {
        name: [
            LinearGaussianNetwork.random(graph, seed).factorization_gap(inverse) for seed in range(num_draws)
        ]
        for name, inverse in inverses(graph).items()
    }
    return {
        name: {
            "gap": float(np.mean(values)),
            "edges": inverses(graph)[name].num_edges,
            "faithful": is_imap(inverses(graph)[name]),
        }
        for name, values in gaps.items()
    }


def exact_part(learned):
    nodes = [f"z{i}" for i in range(5, 0, -1)]
    graphs = {
        "collider z3 -> z1 <- z2": observed_graph([("z3", "z1"), ("z2", "z1")], nodes[2:]),
        "chain of five": observed_graph([(f"z{i + 1}", f"z{i}") for i in range(1, 5)], nodes),
        **{f"learned on digits, seed {seed}": graph for seed, graph in learned.items()},
    }
    rows = {
        name: {"edges": list(map(list, graph.edges)), **exact_gaps(graph)} for name, graph in graphs.items()
    }
    rng = np.random.default_rng(0)
    for probability in (0.3, 0.6, 0.9):
        draws = [exact_gaps(observed_graph(random_edges(rng, 5, probability), nodes), 4) for _ in range(30)]
        rows[f"30 random graphs of five, edges with probability {probability}"] = {
            name: {
                "gap": float(np.mean([draw[name]["gap"] for draw in draws])),
                "edges": float(np.mean([draw[name]["edges"] for draw in draws])),
                "faithful": float(np.mean([draw[name]["faithful"] for draw in draws])),
            }
            for name in draws[0]
        }
    return rows


# -------------------------------------------------------------------------------------------------------- digits


def train_model(data, seed, args):
    """Train a Graph VAE whose decoder sees ``z1`` only; return it frozen."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = GraphVAE(
        data.shape, 5, args.node_dim, decoder_input="first", edge_cost=args.edge_cost, **SMALL_NETWORKS
    )
    trajectory = []

    def after_epoch(history):
        vae.anneal(len(history), rate=args.anneal)
        trajectory.append(vae.gate_probabilities.tolist())

    fit(
        vae.model,
        vae.guide,
        data.batches(64),
        loss=TraceMeanField_ELBO(),
        optimizer=args.lr,
        batch_size=64,
        num_epochs=args.epochs,
        patience=None,
        progress=False,
        seed=seed,
        on_epoch=after_epoch,
    )
    vae.freeze_structure()
    return vae, trajectory[-1]


def evaluate(model, guide, x, args):
    """Return the test bound, by analytic divergences where the guide allows, and the importance-weighted likelihood."""
    loss = TraceMeanField_ELBO(
        num_particles=args.bound_samples, vectorize_particles=True, max_plate_nesting=1
    )
    with torch.no_grad():
        elbo = -loss.loss(model, guide, x) / len(x)
    evidence = log_evidence(model, guide, x, num_particles=args.particles, max_plate_nesting=1)
    return {
        "elbo": elbo,
        "ll": evidence.log_evidence.mean().item(),
        "median_ess": evidence.ess.median().item(),
    }


def digits_part(seed, args):
    data = Data("digits", None, torch.device("cpu"), args.limit)
    vae, gates = train_model(data, seed, args)
    joint_elbo, kl = bound(vae, data.test, args.bound_samples)
    graph = vae.learned_graph()
    vae.eval()
    for parameter in vae.parameters():
        parameter.requires_grad_(False)
    vae_ll = vae.log_evidence(data.test, args.particles).log_evidence.mean().item()
    rows = {"the Graph VAE's own encoder": {"elbo": joint_elbo, "ll": vae_ll}}
    print(f"seed {seed}: edges {[e for e in graph.edges if e[1] != 'x']}, {rows}", flush=True)
    for name, inverse in inverses(graph).items():
        pyro.clear_param_store()
        pyro.set_rng_seed(100 + seed)
        start = time.process_time()
        guide = auto_faithful_guide(vae.model, data.test, inverse=inverse, hidden_dims=args.hidden_dims)
        history = fit(
            vae.model,
            guide,
            data.batches(64),
            loss=TraceMeanField_ELBO(),
            optimizer=args.lr,
            batch_size=64,
            num_epochs=args.guide_epochs,
            validation=data.validation,
            patience=args.patience,
            lr_factor=0.3,
            min_lr=args.lr / 50,
            progress=False,
            seed=seed,
        )
        guide.eval()
        rows[name] = {
            **evaluate(vae.model, guide, data.test, args),
            "edges": inverse.num_edges,
            "faithful": is_imap(inverse),
            "parents": {node: list(above) for node, above in inverse.parents.items()},
            "epochs": len(history),
            "cpu_seconds": time.process_time() - start,
        }
        print(f"seed {seed} {name}: {rows[name]}", flush=True)
    return {
        "seed": seed,
        "graph": list(map(list, graph.edges)),
        "gates": gates,
        "rows": rows,
        "kl": kl,
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "seeds")},
        "date": datetime.date.today().isoformat(),
    }


def main(args):
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pyro.enable_validation(False)
    logging.getLogger("pyro").setLevel(logging.WARNING)
    folder = Path(args.out) / "graph_vae"
    folder.mkdir(parents=True, exist_ok=True)
    learned = {}
    for seed in args.seeds:
        path = folder / f"faithful-s{seed}.json"
        record = json.loads(path.read_text()) if path.exists() else digits_part(seed, args)
        path.write_text(json.dumps(record, indent=1))
        dag = nx.DiGraph()
        dag.add_nodes_from([f"z{i}" for i in range(5, 0, -1)])
        dag.add_edges_from(map(tuple, record["graph"]))
        learned[seed] = ModelGraph(dag, ["x"])
    rows = exact_part(learned)
    (folder / "faithful-exact.json").write_text(json.dumps(rows, indent=1))
    for name, row in rows.items():
        cells = [
            f"{key} {row[key]['gap']:.4f} ({row[key]['edges']:g} edges)" for key in row if key != "edges"
        ]
        print(f"{name}: {', '.join(cells)}")


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parse.add_argument("--epochs", type=int, default=120)
    parse.add_argument("--guide-epochs", type=int, default=80)
    parse.add_argument("--patience", type=int, default=10)
    parse.add_argument("--node-dim", type=int, default=2)
    parse.add_argument("--edge-cost", type=float, default=0.0, help="nats per datum for an open gate")
    parse.add_argument("--anneal", type=float, default=0.98)
    parse.add_argument("--lr", type=float, default=1e-3)
    parse.add_argument("--hidden-dims", type=int, nargs="+", default=[256, 256])
    parse.add_argument("--bound-samples", type=int, default=20)
    parse.add_argument("--particles", type=int, default=1000)
    parse.add_argument("--limit", type=int)
    parse.add_argument("--out", default="out")
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
