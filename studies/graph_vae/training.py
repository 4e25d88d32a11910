"""Runs of the Graph VAE study: data, models, training that can go on, measurements (see run.py)."""

import datetime
import json
import os
import time
from dataclasses import asdict, dataclass, field

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_graphflows import GraphflowsError, GraphVAE, Progress, Schedule, TrainingData, fit
from pyro_graphflows.datasets import BinarizedBatches, binarize, dequantize, load_images
from pyro_graphflows.whole_files import write_whole
from studies.results import Results

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

#: Flags that a run has from its first epoch to its last figures.
SAME = ("limit", "batch_size", "lr", "decay", "decay_every")


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
    gate_rate: float = 1.0  # the learning rate of the gates as a multiple of the others'
    freeze_after: int | None = None  # epochs after which gates are hard in training too

    @property
    def name(self):
        """The key of the run's line, and the name of its checkpoint and weights."""
        _, nodes, dim, _ = DEFAULTS[self.data_set]
        size = "" if (self.num_nodes, self.node_dim) == (nodes, dim) else f"-{self.num_nodes}x{self.node_dim}"
        first = "-first" if self.decoder_input == "first" else ""
        gates = f"-gates{self.gate_rate:g}" if self.gate_rate != 1 else ""
        frozen = f"-frozen{self.freeze_after}" if self.freeze_after is not None else ""
        return f"{self.data_set}-{self.structure}{size}{first}{gates}{frozen}-s{self.seed}"


def run_of(structure, seed, args):
    """Return a run with the sizes of its data set where none are given."""
    _, nodes, dim, networks = DEFAULTS[args.data_set]
    sizes = (args.num_nodes or nodes, args.node_dim or dim)
    gates = (args.gate_rate, args.freeze_after) if structure == "learned" else (1.0, None)
    return Run(args.data_set, structure, seed, *sizes, args.decoder_input, networks, *gates)


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
    """Anneals, measures and takes notes after each epoch.

    Notes of a training under way are in ``progress``, beside its checkpoint; a line of the results is appended once the
    final figures are there.
    """

    def __init__(self, run, vae, data, args, optimizer):
        self.run, self.vae, self.data, self.args, self.optimizer = run, vae, data, args, optimizer
        self.results, self.progress = Results(args.results), args.work / f"{run.name}.progress.json"
        self.record = self.results.get(run.name) or {"curve": [], "finals": {}}
        if self.progress.exists():  # goes on where the line ends, or has the epochs before the first line
            self.record |= json.loads(self.progress.read_text())
        self.cpu = time.process_time()

    def __call__(self, history):
        """Take note of an epoch that is done."""
        args, epoch = self.args, len(history)
        self.record["curve"] = [row for row in self.record["curve"] if row["epoch"] < epoch]
        cpu_seconds = time.process_time() - self.cpu
        self.vae.anneal(epoch)
        if epoch == self.run.freeze_after:
            self.vae.freeze_structure()
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
        notes = json.dumps({key: value for key, value in self.record.items() if key != "finals"}).encode()
        write_whole(self.progress, lambda file: file.write(notes))
        if args.verbose:
            test = "" if "elbo" not in row else f", test ELBO {row['elbo']:.2f}"
            ll = "" if "likelihood" not in row else f", LL {row['likelihood']['ll']:.2f}"
            print(
                f"{self.run.name} epoch {epoch}: validation {row['validation_loss']:.2f}{test}{ll}, "
                f"{row['seconds']:.0f} s ({cpu_seconds:.0f} s CPU)",
                flush=True,
            )
        self.cpu = time.process_time()

    def append(self):
        """Append the record with its final figures; the curve is in the line then."""
        self.results.append(self.run.name, self.record)
        self.progress.unlink(missing_ok=True)


def train(run, args, data=None):
    """Train one model, go on with it, or read it; return it with its record.

    A run whose final figures are there is not trained again; without its weights the model is ``None``.
    """
    work = args.work
    device = torch.device(args.device)
    data = data or Data(run.data_set, args.data, device, args.limit)
    vae = make_vae(run, data.shape, data.likelihood).to(device)
    optimizer = {}

    def make_optimizer(parameters):
        groups = [{"params": parameters}]
        if run.gate_rate != 1:
            others = [p for p in parameters if p is not vae.gates.logits]
            groups = [{"params": others}, {"params": [vae.gates.logits], "lr": args.lr * run.gate_rate}]
        optimizer["made"] = torch.optim.Adam(groups, lr=args.lr, fused=True)
        return optimizer["made"]

    recorder = Recorder(run, vae, data, args, optimizer)
    record = recorder.record
    require_same(run, record, args)
    weights = work / f"{run.name}-{args.epochs}.pt"
    final = record["finals"].get(str(args.epochs))
    if final and not weights.exists():
        print(f"{run.name}: the figures of {args.epochs} epochs are there, the weights are not.", flush=True)
        return None, record
    if final:
        load_weights(vae, weights, device)
        changed = evaluate(run, vae, data, args, final)
        if changed:
            torch.save(vae.state_dict(), weights)
            recorder.append()
        return vae, record
    record |= {
        "run": asdict(run),
        "parameters": sum(p.numel() for p in vae.parameters()),
        **{key: getattr(args, key) for key in SAME},
        "machine": machine(device),
        "date": datetime.date.today().isoformat(),
    }
    history = fit(
        vae.model,
        vae.guide,
        TrainingData(data.batches(args.batch_size), batch_size=args.batch_size, validation=data.validation),
        loss=TraceMeanField_ELBO(),
        optimizer=make_optimizer,
        schedule=Schedule(args.epochs, patience=None),
        checkpoint=work / f"{run.name}.ckpt",
        progress=Progress(bar=args.progress, on_epoch=recorder),
        seed=run.seed,
    )
    if len(history) < args.epochs:
        raise SystemExit(
            f"{run.name}: {history.stop_reason} after {len(history)} epochs; run again to go on."
        )
    if len(history) > args.epochs:
        raise SystemExit(
            f"{run.name}: the checkpoint in {work} is of {len(history)} epochs, more than the {args.epochs} asked for. "
            "Ask for as many, or name another folder with --work."
        )
    final = {
        "best_epoch": history.best_epoch + 1,
        "validation_loss": min(history.validation_loss),
        "gates": vae.gate_probabilities.tolist(),
    }
    evaluate(run, vae, data, args, final)
    record["finals"][str(args.epochs)] = final
    work.mkdir(parents=True, exist_ok=True)
    torch.save(vae.state_dict(), weights)
    recorder.append()
    return vae, record


def require_same(run, record, args):
    """Refuse to take the figures of a run with other settings for those that are asked for."""
    other = [
        f"{key}={record[key]}, not {getattr(args, key)}"
        for key in SAME
        if record.get(key, getattr(args, key)) != getattr(args, key)
    ]
    if other:
        raise SystemExit(
            f"{args.results}: {run.name} is of a run with {'; '.join(other)}. Remove its line and its checkpoint, or "
            "name others with --results and --work."
        )


def load_weights(vae, path, device):
    """Put trained weights into a model."""
    try:
        vae.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except RuntimeError as error:
        raise GraphflowsError(
            f"Expected weights of this architecture in {path}; they are of another one. Move the file away to train "
            f"anew, or name another folder with --work. {str(error).splitlines()[1].strip()}"
        ) from error


def evaluate(run, vae, data, args, final):
    """Put what is missing into the final figures, or was measured with fewer samples; say whether there was any.

    Batch statistics are collected anew with hard gates before (of small data sets over many draws of the pixels, since
    their noise moves the bound by some hundredths of a nat); the bound is taken before that, too.
    """
    pyro.set_rng_seed(run.seed)
    samples = args.final_bound_samples or args.bound_samples
    known = dict(final)
    if "elbo_before_recalibration" not in final:
        final["elbo_before_recalibration"], _ = bound(vae, data.test, samples)
    passes = -(-min(20_000, args.recalibrate) // len(data.train_images))
    number = passes * min(len(data.train_images), args.recalibrate)
    if int(final.get("recalibrated", 0)) < number:
        images = data.train_images
        some = torch.cat([torch.randperm(len(images)) for _ in range(passes)])[:number]
        vae.recalibrate(data.draw(images[some.to(images.device)], data.num_levels))
        final["recalibrated"] = number
        for key in ("bound_samples", "likelihood"):
            final.pop(key, None)
    if final.get("bound_samples", 0) < samples:
        final["elbo"], final["kl"] = bound(vae, data.test, samples)
        final["bound_samples"] = samples
    images, before = min(args.final_images, len(data.test)), final.get("likelihood", {})
    if before.get("images", 0) < images or before.get("particles", 0) < args.final_particles:
        final["likelihood"] = likelihood(vae, data.some_of_test(images), args.final_particles)
    if run.data_set == "cifar10":
        ll = torch.tensor(final["likelihood"]["ll"])
        final["bits_per_dimension"] = vae.bits_per_dimension(ll).item()
    if final == known:  # nothing was measured
        return False
    final["date"] = datetime.date.today().isoformat()
    return True


def machine(device):
    """Say what it was computed on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    version = torch.__version__.split("+")[0]
    return f"{os.cpu_count()} CPU cores, shared; {torch.get_num_threads()} thread(s) a run; torch {version}"
