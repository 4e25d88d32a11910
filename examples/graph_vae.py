r"""Graph VAE: latent dependency structures, learned and given, on images.

Four models with the same nodes and networks and different edges between the latent nodes are trained by the same
schedule and compared by their test bound, divergence and importance-weighted log-likelihood:

- ``learned``: the Graph VAE, every edge behind a gate;
- ``full``: all edges (FC-VAE);
- ``chain``: each node given the one before (Ladder VAE);
- ``independent``: no edges (VAE), with a wider encoder so that the number of parameters is that of ``full``.

Data sets: ``digits`` comes with scikit-learn; ``mnist``, ``binarized_mnist``, ``omniglot`` and ``cifar10`` are read
from the folder ``--data`` (see ``pyro_graphflows.datasets`` for the file formats).

    python examples/graph_vae.py                                        # digits, learned against independent, minutes
    python examples/graph_vae.py --data-set binarized_mnist --data DIR --structures learned --epochs 50
    python examples/graph_vae.py --study --data DIR                     # all runs of the page; `make graphvae-table`

Every run is one JSON file in ``<out>/graph_vae``, written after each epoch; checkpoints and trained weights are in
``<work>``. A run that was interrupted goes on after its last epoch, and one that is asked for more epochs continues.
``graph_vae_report.py`` draws the page from the files that are there.

References:
    [1] He, Gong, Marino, Mori and Lehrmann (2019), Variational Autoencoders with Jointly Optimized Latent Dependency
    Structure, ICLR.
"""

import argparse
import datetime
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_graphflows import GraphVAE, fit
from pyro_graphflows.datasets import BinarizedBatches, binarize, dequantize, load_images

STRUCTURES = ("learned", "full", "chain", "independent")
SMALL_NETWORKS = {
    "encoder_dims": [128, 128, 64],
    "decoder_dims": [64, 128, 128],
    "embedding_dim": 64,
    "hidden_dim": 64,
}
DEFAULTS = {  # epochs, nodes, dimensions of a node, networks
    "digits": (150, 5, 4, SMALL_NETWORKS),
    "mnist": (50, 5, 16, {}),
    "binarized_mnist": (50, 5, 16, {}),
    "omniglot": (50, 5, 16, {}),
    "cifar10": (20, 8, 16, {}),
}


@dataclass(frozen=True)
class Run:
    """One model to train."""

    data_set: str
    structure: str
    seed: int
    num_nodes: int
    node_dim: int
    decoder_input: str = "all"
    networks: dict = field(default_factory=dict, hash=False)

    @property
    def name(self):
        """The name of the run's file."""
        _, nodes, dim, _ = DEFAULTS[self.data_set]
        size = "" if (self.num_nodes, self.node_dim) == (nodes, dim) else f"-{self.num_nodes}x{self.node_dim}"
        first = "-first" if self.decoder_input == "first" else ""
        return f"{self.data_set}-{self.structure}{size}{first}-s{self.seed}"


def run_of(data_set, structure, seed, num_nodes=None, node_dim=None, decoder_input="all"):
    """Return a run with the sizes of its data set where none are given."""
    _, nodes, dim, networks = DEFAULTS[data_set]
    return Run(data_set, structure, seed, num_nodes or nodes, node_dim or dim, decoder_input, networks)


# --------------------------------------------------------------------------------------------------------- data


class Data:
    """The parts of a data set on a device: what to train on, and fixed draws to validate and test on."""

    def __init__(self, name, folder, device, limit=None):
        images = load_images(name, folder)
        self.shape, self.num_levels = images.shape, images.num_levels
        self.likelihood = "normal" if name == "cifar10" else "bernoulli"
        self.draw = dequantize if name == "cifar10" else binarize
        self.train_images = images.train[:limit].to(device)
        generator = torch.Generator().manual_seed(2019)
        self.validation, self.test = (
            self.draw(part[:limit], self.num_levels, generator).to(device)
            for part in (images.validation, images.test)
        )
        self.test_labels = images.test_labels[:limit]

    def some_of_test(self, number):
        """Return test images spread over all of them: some data sets are sorted by class."""
        number = min(number, len(self.test))
        return self.test[torch.arange(number, device=self.test.device) * len(self.test) // number]

    def batches(self, batch_size):
        """Return the training data for ``fit``: bits as they are, everything else drawn anew in each epoch."""
        if self.num_levels == 2:
            return self.train_images
        return BinarizedBatches(self.train_images, self.num_levels, batch_size, self.draw)


# -------------------------------------------------------------------------------------------------- measurements


@torch.no_grad()
def bound(vae, x, num_samples=1, batch_size=500):
    """Return the mean ELBO and the mean divergence of each node, with hard gates and stored batch statistics."""
    was_training = vae.training
    vae.eval()
    x = x.repeat(num_samples, *(1 for _ in vae.input_shape))
    elbo, divergences = 0.0, dict.fromkeys(vae.names, 0.0)
    for part in x.split(batch_size):
        guide_trace = poutine.trace(vae.guide).get_trace(part)
        model_trace = poutine.trace(poutine.replay(vae.model, guide_trace)).get_trace(part)
        site = model_trace.nodes["x"]
        elbo += site["fn"].log_prob(site["value"]).sum().item()
        for name in vae.names:
            term = kl_divergence(guide_trace.nodes[name]["fn"], model_trace.nodes[name]["fn"]).sum().item()
            elbo -= term
            divergences[name] += term
    vae.train(was_training)
    return elbo / len(x), {name: value / len(x) for name, value in divergences.items()}


def likelihood(vae, x, num_particles):
    """Return the mean log-evidence by importance samples with the standard error over images."""
    begin = time.process_time()
    evidence = vae.log_evidence(x, num_particles, batch_size=50, chunk_size=40)
    values = evidence.log_evidence
    return {
        "ll": values.mean().item(),
        "standard_error": (values.std() / len(values) ** 0.5).item(),
        "images": len(x),
        "particles": num_particles,
        "median_ess": evidence.ess.median().item(),
        "share_khat_above_0.7": (evidence.khat > 0.7).double().mean().item(),
        "cpu_seconds": time.process_time() - begin,
    }


# ------------------------------------------------------------------------------------------------------ training


def make_vae(run, shape, likelihood="bernoulli"):
    """Return the untrained model of a run."""
    pyro.clear_param_store()
    pyro.set_rng_seed(run.seed)
    return GraphVAE(
        shape,
        run.num_nodes,
        run.node_dim,
        run.structure,
        likelihood=likelihood,
        decoder_input=run.decoder_input,
        **run.networks,
    )


class Recorder:
    """Anneals, measures and writes down after each epoch."""

    def __init__(self, run, vae, data, args, optimizer, path):
        self.run, self.vae, self.data, self.args, self.optimizer, self.path = (
            run,
            vae,
            data,
            args,
            optimizer,
            path,
        )
        self.record = json.loads(path.read_text()) if path.exists() else {"curve": [], "finals": {}}
        self.cpu = time.process_time()

    def __call__(self, history):
        """Take note of an epoch that is done."""
        args, epoch = self.args, len(history)
        self.record["curve"] = [row for row in self.record["curve"] if row["epoch"] < epoch]
        cpu_seconds = time.process_time() - self.cpu
        self.vae.anneal(epoch)
        if epoch % args.decay_every == 0:
            for group in self.optimizer["made"].param_groups:
                group["lr"] *= args.decay
        row = {
            "epoch": epoch,
            "train_loss": history.loss[-1],
            "validation_loss": history.validation_loss[-1],
            "seconds": history.seconds[-1] - (history.seconds[-2] if epoch > 1 else 0.0),
            "cpu_seconds": cpu_seconds,
        }
        if self.run.structure == "learned":
            row["gates"] = [[round(p, 5) for p in line] for line in self.vae.gate_probabilities.tolist()]
        if epoch % args.test_every == 0 or epoch == args.epochs:
            row["elbo"], row["kl"] = bound(self.vae, self.data.test, args.bound_samples)
        if epoch % args.ll_every == 0 or epoch == args.epochs:
            row["likelihood"] = likelihood(
                self.vae, self.data.some_of_test(args.ll_images), args.ll_particles
            )
        self.record["curve"].append(row)
        self.write()
        if args.verbose:
            test = "" if "elbo" not in row else f", test ELBO {row['elbo']:.2f}"
            ll = "" if "likelihood" not in row else f", LL {row['likelihood']['ll']:.2f}"
            print(
                f"{self.run.name} epoch {epoch}: validation {row['validation_loss']:.2f}{test}{ll}, "
                f"{row['seconds']:.0f} s ({cpu_seconds:.0f} s CPU)",
                flush=True,
            )
        self.cpu = time.process_time()

    def write(self):
        """Write the record so that the file is there complete or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.record, indent=1))
        os.replace(temporary, self.path)


def train(run, args, data=None):
    """Train one model, or go on with it; return it with its record."""
    path = Path(args.out) / "graph_vae" / f"{run.name}.json"
    work = Path(args.work)
    device = torch.device(args.device)
    data = data or Data(run.data_set, args.data, device, args.limit)
    vae = make_vae(run, data.shape, data.likelihood).to(device)
    optimizer = {}

    def make_optimizer(parameters):
        optimizer["made"] = torch.optim.Adam(parameters, lr=args.lr, fused=True)
        return optimizer["made"]

    recorder = Recorder(run, vae, data, args, optimizer, path)
    record = recorder.record
    weights = work / f"{run.name}-{args.epochs}.pt"
    final = record["finals"].get(str(args.epochs), {})
    if weights.exists() and final:
        vae.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
        if not final.get("recalibrated"):
            record["finals"][str(args.epochs)] |= evaluate(run, vae, data, args)
            torch.save(vae.state_dict(), weights)
            recorder.write()
        return vae, record
    record |= {
        "run": asdict(run),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "batch_size": args.batch_size,
        "lr": args.lr,
        "machine": machine(device),
        "date": datetime.date.today().isoformat(),
    }
    history = fit(
        vae.model,
        vae.guide,
        data.batches(args.batch_size),
        loss=TraceMeanField_ELBO(),
        optimizer=make_optimizer,
        batch_size=args.batch_size,
        num_epochs=args.epochs,
        validation=data.validation,
        patience=None,
        checkpoint=work / f"{run.name}.ckpt",
        progress=args.progress,
        seed=run.seed,
        on_epoch=recorder,
    )
    if len(history) < args.epochs:
        raise SystemExit(
            f"{run.name}: {history.stop_reason} after {len(history)} epochs; run again to go on."
        )
    record["finals"][str(args.epochs)] = {
        "best_epoch": history.best_epoch + 1,
        "validation_loss": min(history.validation_loss),
        "gates": vae.gate_probabilities.tolist(),
        **evaluate(run, vae, data, args),
    }
    work.mkdir(parents=True, exist_ok=True)
    torch.save(vae.state_dict(), weights)
    recorder.write()
    return vae, record


def evaluate(run, vae, data, args):
    """Return the final figures, before and after the batch statistics are collected with hard gates."""
    pyro.set_rng_seed(run.seed)
    before, _ = bound(vae, data.test, args.bound_samples)
    some = data.train_images[torch.randperm(len(data.train_images))[:50_000].to(data.train_images.device)]
    vae.recalibrate(data.draw(some, data.num_levels))
    elbo, kl = bound(vae, data.test, args.bound_samples)
    figures = {
        "elbo": elbo,
        "kl": kl,
        "elbo_before_recalibration": before,
        "recalibrated": True,
        "likelihood": likelihood(vae, data.some_of_test(args.final_images), args.final_particles),
        "date": datetime.date.today().isoformat(),
    }
    if run.data_set == "cifar10":
        figures["bits_per_dimension"] = vae.bits_per_dimension(
            torch.tensor(figures["likelihood"]["ll"])
        ).item()
    return figures


def draw_pictures(run, vae, data, args):
    """Draw samples, reconstructions and, where there are labels, the embedding of test images."""
    from graph_vae_plots import plot_embedding, plot_images

    folder = Path(args.out) / "graph_vae"
    plot_images(vae, data, folder / f"{run.name}-images.png")
    if len(data.test_labels):
        number = min(2000, len(data.test))
        index = torch.arange(number) * len(data.test) // number
        plot_embedding(vae, data.test[index], data.test_labels[index], folder / f"{run.name}-embedding.png")


def machine(device):
    """Say what it was computed on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    version = torch.__version__.split("+")[0]
    return f"{os.cpu_count()} CPU cores, shared; {torch.get_num_threads()} thread(s) a run; torch {version}"


# -------------------------------------------------------------------------------------------------- command line


def summary(run, record, epochs):
    final = record["finals"][str(epochs)]
    ll = final["likelihood"]
    return (
        f"{run.structure:>12} {record['parameters']:>10,} {final['elbo']:>9.2f} {sum(final['kl'].values()):>8.2f} "
        f"{ll['ll']:>9.2f} ± {ll['standard_error']:.2f} {final['best_epoch']:>6}"
    )


def compare(args):
    """Train the models asked for and print a table."""
    args.epochs = args.epochs or DEFAULTS[args.data_set][0]
    data = Data(args.data_set, args.data, torch.device(args.device), args.limit)
    print(
        f"{args.data_set}: {len(data.train_images)} training images {tuple(data.shape)}, {args.epochs} epochs."
    )
    lines = []
    for seed in args.seeds:
        for structure in args.structures:
            run = run_of(args.data_set, structure, seed, args.num_nodes, args.node_dim, args.decoder_input)
            vae, record = train(run, args, data)
            lines.append(summary(run, record, args.epochs))
            if args.pictures:
                draw_pictures(run, vae, data, args)
            if structure == "learned":
                edges = [f"{a} -> {b}" for a, b in vae.learned_graph().edges if b != "x"]
                print(f"learned edges: {', '.join(edges) or 'none'}")
    print(f"{'structure':>12} {'parameters':>10} {'ELBO':>9} {'KL':>8} {'LL':>9} {'best epoch':>13}")
    print("\n".join(lines))


def study(args):
    """Do every run of the page that is not there yet, and draw the page after each."""
    import graph_vae_faithful
    import graph_vae_synthetic
    from graph_vae_report import render

    out = ["--out", args.out]
    seeds = ["0", "1", "2", "3", "4"]
    digits = ["--data-set", "digits", "--decay-every", "100", "--test-every", "10", "--bound-samples", "10"]
    digits += ["--ll-every", "1000", "--ll-images", "50", "--ll-particles", "100", "--final-images", "300"]
    common = [
        *out,
        "--work",
        args.work,
        "--device",
        args.device,
        "--threads",
        str(args.threads),
        "--pictures",
    ]
    jobs = [[*digits, "--structures", "learned", "independent", "full", "chain", "--seeds", *seeds]]
    for nodes, dim in ((2, 10), (4, 5), (10, 2)):
        sizes = ["--num-nodes", str(nodes), "--node-dim", str(dim)]
        jobs.append([*digits, *sizes, "--structures", "learned", "--seeds", "0", "1", "2", "--no-pictures"])
    graph_vae_synthetic.main(graph_vae_synthetic.parser().parse_args([*out, "--seeds", *seeds]))
    graph_vae_faithful.main(graph_vae_faithful.parser().parse_args(out))
    if args.data or os.environ.get("PYRO_GRAPHFLOWS_DATA"):
        common += ["--data", args.data] if args.data else []
        epochs = str(args.epochs or 50)
        for structure in ("learned", "independent", "full", "chain"):
            number = epochs if structure in ("learned", "independent") or args.epochs else "25"
            jobs.append(["--data-set", "binarized_mnist", "--structures", structure, "--epochs", number])
        jobs.append(["--data-set", "omniglot", "--structures", "learned", "--epochs", "5"])
        jobs.append(["--data-set", "cifar10", "--structures", "learned", "--epochs", "20"])
    else:
        print("No folder with image files (--data): digits and synthetic data only.")
    for job in jobs:
        compare(parser().parse_args([*common, *job]))
        print(f"Page: {render(args.out)}", flush=True)


def main(args):
    torch.set_num_threads(args.threads)
    torch.set_default_dtype(torch.float32)
    torch.set_flush_denormal(True)
    pyro.enable_validation(False)  # costs time in every step
    (study if args.study else compare)(args)


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--data-set", choices=list(DEFAULTS), default="digits")
    parse.add_argument("--data", help="folder of the image files (or PYRO_GRAPHFLOWS_DATA)")
    parse.add_argument("--structures", nargs="+", choices=STRUCTURES, default=["learned", "independent"])
    parse.add_argument("--seeds", nargs="+", type=int, default=[0])
    parse.add_argument("--epochs", type=int, help="by default as many as suit the data set")
    parse.add_argument("--num-nodes", type=int)
    parse.add_argument("--node-dim", type=int)
    parse.add_argument("--decoder-input", choices=["all", "first"], default="all")
    parse.add_argument("--batch-size", type=int, default=64)
    parse.add_argument("--lr", type=float, default=1e-3)
    parse.add_argument("--decay", type=float, default=0.25, help="what the rate is multiplied by")
    parse.add_argument("--decay-every", type=int, default=200, help="epochs")
    parse.add_argument("--test-every", type=int, default=1, help="epochs between test bounds")
    parse.add_argument(
        "--bound-samples", type=int, default=1, help="samples of the nodes for each test bound"
    )
    parse.add_argument("--ll-every", type=int, default=5, help="epochs between log-likelihoods of the curve")
    parse.add_argument("--ll-images", type=int, default=200, help="test images of the curve's log-likelihood")
    parse.add_argument("--ll-particles", type=int, default=500)
    parse.add_argument("--final-images", type=int, default=1000)
    parse.add_argument("--final-particles", type=int, default=5000)
    parse.add_argument("--limit", type=int, help="use only the first images of each part")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--threads", type=int, default=1)
    parse.add_argument("--out", default="out", help="folder of graph_vae/ and graph_vae.md")
    parse.add_argument("--work", default="out/graph_vae/work", help="folder of checkpoints and weights")
    parse.add_argument("--study", action="store_true", help="all runs of the page, restartable")
    parse.add_argument("--pictures", action=argparse.BooleanOptionalAction, default=False)
    parse.add_argument("--progress", action=argparse.BooleanOptionalAction, default=sys.stderr.isatty())
    parse.add_argument("--verbose", action=argparse.BooleanOptionalAction, default=True)
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
