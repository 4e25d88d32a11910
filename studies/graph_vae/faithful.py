r"""A faithful encoder for a learned latent structure, against the encoder that shares the model's gates.

The Graph VAE's encoder has the model's own edges: each node is inferred from the data and from its parents in the
model, sampled in the model's order. That is the wrong way round where two parents of one node are not joined: given the
data they depend on each other, and this encoder cannot say so. The faithful inverse of the learned graph can.

1. *Exactly.* With linear-Gaussian nodes the least divergence that a factorisation allows (its gap) is known:
   ``LinearGaussianNetwork.factorization_gap`` of the shared and the faithful factorisation, for a collider, a chain,
   the graphs learned here and random graphs.
2. *Digits.* A Graph VAE with ``decoder_input="first"`` (with a decoder that sees all nodes they all depend on each
   other given the data, whatever was learned) is trained, its structure frozen and its parameters
   fixed. Then guides with the same kind of network and four factorisations are trained for this one model: shared
   gates; faithful in the model's order, which adds the missing edges; faithful with the fewest edges, mostly in another
   order, which matters to conditionals that are normal; full. LL minus ELBO is what is left of the divergence from the
   posterior, and for one model and the same data the difference of two guides' bounds is that of their divergences.
   Guides are trained twice: on the training images, where what they learn must also carry over to other images, and on
   endless samples of the model itself, where nothing but the factorisation and the networks limits them
   (``--flow-seeds``: there with flow conditionals, too).

    python -m studies.graph_vae.faithful

Each seed is one line of the file ``--results``, the exact part another.

References:
    [1] He et al. (2019), Variational Autoencoders with Jointly Optimized Latent Dependency Structure, ICLR.
    [2] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference, NeurIPS.
"""

import argparse
import datetime
import logging
import time

import networkx as nx
import numpy as np
import pyro
import torch
from pyro.infer import TraceMeanField_ELBO

from pyro_graphflows import (
    Flow,
    GraphVAE,
    InverseGraph,
    LinearGaussianNetwork,
    ModelGraph,
    Normal,
    Progress,
    Schedule,
    TrainingData,
    auto_faithful_guide,
    faithful_inverse,
    fit,
    fully_connected_inverse,
    is_imap,
    log_evidence,
)
from studies.flags import add_places
from studies.graph_vae.training import SMALL_NETWORKS, Data, bound
from studies.results import Results


def shared_inverse(graph):
    """Return the factorisation of the encoder that shares the model's gates: model parents and the data."""
    parents = {node: [*graph.parents(node), *graph.observed] for node in graph.latent}
    return InverseGraph(graph, parents, order="shared gates", sampling_order=graph.latent)


def inverses(graph):
    """Return factorisations by name: the first, second and fourth have more and more edges, in the model's order."""
    return {
        "shared gates": shared_inverse(graph),
        "faithful, model's order": faithful_inverse(graph, graph.latent[::-1]),
        "faithful, fewest edges": faithful_inverse(graph),
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


def edges_of(graph):
    return list(map(list, graph.edges))


def named_graphs(learned):
    """Return the structures of the exact part by name; the random ones come in addition."""
    nodes = [f"z{i}" for i in range(5, 0, -1)]
    return {
        "collider z3 -> z1 <- z2": observed_graph([("z3", "z1"), ("z2", "z1")], nodes[2:]),
        "chain of five": observed_graph([(f"z{i + 1}", f"z{i}") for i in range(1, 5)], nodes),
        **{f"learned on digits, seed {seed}": graph for seed, graph in learned.items()},
    }


def exact_part(graphs):
    """Return the gaps of the factorisations for each of some structures, and their means over random ones."""
    nodes = [f"z{i}" for i in range(5, 0, -1)]
    rows = {name: {"edges": edges_of(graph), **exact_gaps(graph)} for name, graph in graphs.items()}
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
        schedule=Schedule(args.epochs, patience=None),
        progress=Progress(bar=False, on_epoch=after_epoch),
        seed=seed,
    )
    vae.freeze_structure()
    passes = -(-20_000 // len(data.train_images))
    vae.recalibrate(torch.cat([data.draw(data.train_images, data.num_levels) for _ in range(passes)]))
    return vae, trajectory[-1]


class ModelSamples:
    """Batches of a trained model's own data for ``fit``, new ones every time."""

    def __init__(self, vae, batch_size, steps):
        self.vae, self.batch_size, self.steps = vae, batch_size, steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        return (self.vae.sample(self.batch_size) for _ in range(self.steps))


def mean_elbo(model, guide, x, num_samples):
    """Return the bound of a datum, by analytic divergences where the guide allows."""
    loss = TraceMeanField_ELBO(num_particles=num_samples, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        return -loss.loss(model, guide, x) / len(x)


def mean_ll(model, guide, x, num_particles):
    """Return the importance-weighted log-likelihood of a datum, and the median effective sample size."""
    evidence = log_evidence(model, guide, x, num_particles=num_particles, max_plate_nesting=1)
    return {"ll": evidence.log_evidence.mean().item(), "median_ess": evidence.ess.median().item()}


def train_guide(vae, inverse, example, batches, validation, num_epochs, seed, args, family=Normal):
    """Train a guide with a factorisation for a model that stays as it is."""
    pyro.clear_param_store()
    pyro.set_rng_seed(100 + seed)
    start = time.process_time()
    conditionals = family(hidden_dims=args.hidden_dims)
    guide = auto_faithful_guide(vae.model, example, family=conditionals, inverse=inverse)
    history = fit(
        vae.model,
        guide,
        TrainingData(batches, batch_size=64, validation=validation),
        loss=TraceMeanField_ELBO(),
        optimizer=args.lr,
        schedule=Schedule(
            num_epochs,
            patience=args.patience,
            lr_factor=0.3,
            min_lr=args.lr / 50,
            max_grad_norm=args.max_grad_norm,
        ),
        progress=False,
        seed=seed,
    )
    guide.eval()
    return guide, {
        "edges": inverse.num_edges,
        "faithful": is_imap(inverse),
        "parents": {node: list(above) for node, above in inverse.parents.items()},
        "epochs": len(history),
        "steps": history.num_steps,
        "stop_reason": history.stop_reason,
        "cpu_seconds": time.process_time() - start,
    }


def on_samples(vae, inverse, samples, family, seed, args):
    """Train a guide on endless samples of the model and return its bound of others."""
    batches = ModelSamples(vae, 64, args.sample_steps)
    validation = vae.sample(args.model_samples)
    guide, about = train_guide(
        vae, inverse, samples, batches, validation, args.sample_epochs, seed, args, family
    )
    return {
        "sample_elbo": mean_elbo(vae.model, guide, samples, args.bound_samples),
        "on_samples": {key: about[key] for key in ("epochs", "steps", "stop_reason", "cpu_seconds")},
    }


def digits_part(seed, args):
    data = Data("digits", None, torch.device("cpu"), args.limit)
    vae, gates = train_model(data, seed, args)
    graph = vae.learned_graph()
    vae.eval()
    for parameter in vae.parameters():
        parameter.requires_grad_(False)
    pyro.set_rng_seed(seed)
    images = {
        "elbo": data.test,
        "train_elbo": data.draw(data.train_images, data.num_levels),
        "sample_elbo": vae.sample(args.model_samples),
    }
    own = {key: bound(vae, x, args.bound_samples)[0] for key, x in images.items()}
    own |= {"ll": vae.log_evidence(data.test, args.particles).log_evidence.mean().item()}
    samples = images.pop("sample_elbo")
    own["sample_ll"] = vae.log_evidence(samples, args.particles).log_evidence.mean().item()
    rows = {"the Graph VAE's own encoder": own}
    print(f"seed {seed}: edges {[e for e in graph.edges if e[1] != 'x']}, {rows}", flush=True)
    done = {}  # by factorisation: where the model's order needs all edges, two of the four are the same
    for name, inverse in inverses(graph).items():
        factors = tuple((node, tuple(above)) for node, above in inverse.parents.items())
        if factors in done:
            rows[name] = rows[done[factors]]
            continue
        done[factors] = name
        batches = data.batches(64)
        guide, row = train_guide(
            vae, inverse, data.test, batches, data.validation, args.guide_epochs, seed, args
        )
        row |= {key: mean_elbo(vae.model, guide, x, args.bound_samples) for key, x in images.items()}
        row |= mean_ll(vae.model, guide, data.test, args.particles)
        if seed in args.sample_seeds:
            row |= on_samples(vae, inverse, samples, Normal, seed, args) | {"sample_ll": own["sample_ll"]}
        rows[name] = row
        print(f"seed {seed} {name}: {rows[name]}", flush=True)
    for name in ("shared gates", "faithful, fewest edges") if seed in args.flow_seeds else ():
        flow = on_samples(vae, inverses(graph)[name], samples, Flow, seed, args)
        rows[f"{name}, flows"] = flow | {"sample_ll": own["sample_ll"]}
        print(f"seed {seed} {name}, flows: {rows[f'{name}, flows']}", flush=True)
    return {
        "seed": seed,
        "graph": list(map(list, graph.edges)),
        "gates": gates,
        "rows": rows,
        "settings": {k: v for k, v in vars(args).items() if k not in ("results", "out", "work", "seeds")},
        "date": datetime.date.today().isoformat(),
    }


def require_same(settings, key, args):
    """Refuse to take the figures of a run with other settings for those that are asked for."""
    other = [
        f"--{key.replace('_', '-')} {value}, not {getattr(args, key)}"
        for key, value in settings.items()
        if not key.endswith("seeds") and value != getattr(args, key)
    ]
    if other:
        raise SystemExit(
            f"{args.results}: {key} is of a run with {'; '.join(other)}. Remove its line, or name another file with "
            "--results."
        )


def main(args):
    """Do the seeds that are not there yet; in double precision, as conditionals can be nearly singular."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.set_flush_denormal(True)
    pyro.enable_validation(False)
    logging.getLogger("pyro").setLevel(logging.WARNING)
    results = Results(args.results)
    learned = {}
    for seed in args.seeds:
        key = f"faithful-s{seed}"
        if key not in results:
            results.append(key, digits_part(seed, args))
        record = results.get(key)
        require_same(record["settings"], key, args)
        dag = nx.DiGraph()
        dag.add_nodes_from([f"z{i}" for i in range(5, 0, -1)])
        dag.add_edges_from(map(tuple, record["graph"]))
        learned[seed] = ModelGraph(dag, ["x"])
    graphs = named_graphs(learned)
    rows = (results.get("faithful-exact") or {"structures": {}})["structures"]
    if any(rows.get(name, {}).get("edges") != edges_of(graph) for name, graph in graphs.items()):
        rows = exact_part(graphs)
        results.append("faithful-exact", {"structures": rows})
    for name, row in rows.items():
        cells = [
            f"{key} {row[key]['gap']:.4f} ({row[key]['edges']:g} edges)" for key in row if key != "edges"
        ]
        print(f"{name}: {', '.join(cells)}")


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parse.add_argument("--epochs", type=int, default=120)
    parse.add_argument("--guide-epochs", type=int, default=200)
    parse.add_argument("--patience", type=int, default=10)
    parse.add_argument("--sample-epochs", type=int, default=100, help="epochs on samples of the model")
    parse.add_argument("--sample-steps", type=int, default=60, help="batches of 64 in each of them")
    parse.add_argument("--model-samples", type=int, default=2000, help="for validation, and as many to test")
    parse.add_argument(
        "--sample-seeds", nargs="*", type=int, default=[0, 1, 2], help="seeds with guides trained on samples"
    )
    parse.add_argument("--flow-seeds", nargs="*", type=int, default=[], help="seeds with flow guides, too")
    parse.add_argument("--node-dim", type=int, default=2)
    parse.add_argument("--edge-cost", type=float, default=0.0, help="nats per datum for an open gate")
    parse.add_argument("--anneal", type=float, default=0.98)
    parse.add_argument("--lr", type=float, default=1e-3)
    parse.add_argument("--hidden-dims", type=int, nargs="+", default=[256, 256])
    parse.add_argument("--bound-samples", type=int, default=20)
    parse.add_argument("--particles", type=int, default=1000)
    parse.add_argument("--max-grad-norm", type=float, default=10.0, help="of a step of a guide, per datum")
    parse.add_argument("--limit", type=int)
    add_places(parse, "graph_vae")
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
