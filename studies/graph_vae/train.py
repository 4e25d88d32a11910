# ruff: noqa: E402 (the clock starts before the imports)
r"""Train Graph VAEs of one structure side by side, for as long as there is time, and evaluate them.

All members of an ensemble go through the device together, each with its own start, order of images, noise, gates and
batch statistics. The data are on the device as bytes, a step is recorded once and replayed (on a GPU), and the host
waits once an epoch.

    python -m studies.graph_vae.train --data DIR --seeds 0 1 2 3 4 --budget-seconds 560 --out out/graph_vae
    python -m studies.graph_vae.train --data DIR --structures full --epochs 50          # on a CPU, eager
    python -m studies.graph_vae.train --data-set digits --epochs 150 --seeds 0 1 2      # minutes

It needs torch, Pyro, NumPy and what this package imports, and the file of the data set (``pyro_graphflows.datasets``);
only the digits come with scikit-learn. Into ``--out`` go, by structure, ``NAME.jsonl`` (what was run, every epoch,
final figures), ``NAME-images.png``, ``NAME-gates.png``, and ``NAME-weights0.pt``, ... with the members' weights (states
of ``GraphVAE``; see ``--weights``). A run goes on from its checkpoint in ``--work``. With ``--budget-seconds`` it
measures its own rate, chooses the number of epochs, and stops in time to evaluate; run it again to go on.

References:
    [1] He, Gong, Marino, Mori and Lehrmann (2019), Variational Autoencoders with Jointly Optimized Latent Dependency
    Structure, ICLR.
"""

import time

STARTED = time.monotonic()  # the imports take their part of a budget

import argparse
import datetime
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyro
import torch

from pyro_graphflows import GraphflowsError
from pyro_graphflows.datasets import load_images
from pyro_graphflows.whole_files import write_whole
from studies.flags import positive
from studies.graph_vae import capture, checkpoint, evaluation
from studies.graph_vae.ensemble import ESTIMATORS
from studies.graph_vae.json_lines import Record
from studies.graph_vae.png import grid, png
from studies.graph_vae.trainer import SMALL_NETWORKS, STRUCTURES, Settings, Trainer
from studies.results import Results
from studies.tables import mean_sd

DATA_SETS = ("binarized_mnist", "omniglot", "mnist", "digits")
PAPER_EPOCHS = 2000
TRAINED = "trained "  # what the keys of these runs begin with in a file of results
MARGIN = 1.15  # measured times are exceeded by less than this
WRITING = 3.0  # seconds for files and the end of the program


# ------------------------------------------------------------------------------------------------------------ time


@dataclass(frozen=True)
class Share:
    """A structure's share of a budget: from the start of the program, its own begin and end, how many such shares."""

    started: float
    begin: float
    deadline: float
    number: int


@dataclass(frozen=True)
class Plan:
    """How the time goes: seconds of an epoch and of the evaluation, and how many epochs fit."""

    epoch_seconds: float
    evaluation_seconds: float
    epochs: int


def evaluation_pieces(trainer, args):
    """Return how many pieces of importance samples the evaluation has, and images and samples of a piece."""
    images = min(args.ll_images, len(trainer.test))
    at_once = min(images, args.images_at_once)
    samples = min(args.ll_particles, max(1, args.rows // at_once))
    return math.ceil(images / at_once) * math.ceil(args.ll_particles / samples), at_once, samples


def evaluation_seconds(trainer, args, validation_seconds):
    """Measure a piece of the evaluation, and return how long all of it takes."""
    pieces, at_once, samples = evaluation_pieces(trainer, args)
    source = evaluation.fixed_source(trainer.device)
    for _ in range(2):  # the second is measured
        trainer.synchronize()
        begin = time.monotonic()
        with trainer.exact_products():
            evaluation.log_weights(trainer.ensemble, trainer.test[:at_once], samples, args.rows, source)
        trainer.synchronize()
        piece = time.monotonic() - begin
    passes = 2 * len(trainer.test) * args.bound_samples + 2 * recalibrated(trainer, args)
    return pieces * piece + validation_seconds * passes / len(trainer.validation)


def recalibrated(trainer, args):
    """Return with how many training images batch statistics are collected anew.

    Of small data sets that are binarised anew these are many draws: their noise moves the bound by some hundredths.
    """
    images = min(args.recalibrate, len(trainer.data.images))
    draws = math.ceil(min(20_000, args.recalibrate) / images) if trainer.data.num_levels > 2 else 1
    return images * draws


def plan(trainer, args, share, times):
    """Choose the number of epochs that leaves time for the evaluation.

    Raises:
        GraphflowsError: If not even one epoch does.
    """
    evaluating = MARGIN * evaluation_seconds(trainer, args, times["validation"]) + WRITING
    left = share.deadline - time.monotonic()
    # the last epoch is begun only if it may take longer than measured
    fits = (
        math.floor((left - evaluating) / times["epoch"] + 1 - MARGIN) if math.isfinite(left) else args.epochs
    )
    epochs = min(args.epochs, trainer.epoch + max(0, fits))
    if epochs == 0 or left < evaluating:  # no more epochs are enough where there were some before
        before, spent = share.begin - share.started, time.monotonic() - share.begin
        one = spent + evaluating + (MARGIN * times["epoch"] if trainer.epoch == 0 else 0.0)
        raise GraphflowsError(
            f"Expected a budget of at least {math.ceil(1 + before + share.number * one)} seconds: {before:.0f} went by "
            f"before, and for {trainer.settings.structure} {spent:.0f} to start, {times['epoch']:.1f} an epoch, "
            f"{evaluating:.0f} to evaluate {min(args.ll_images, len(trainer.test)):,} images with "
            f"{args.ll_particles:,} samples; {left:.0f} are left of its share. Give more, or lower --ll-images or "
            "--ll-particles."
        )
    return Plan(times["epoch"], evaluating, epochs)


# -------------------------------------------------------------------------------------------------------- one run


def train(settings, images, args, share):
    """Train, go on with or only evaluate an ensemble; return its last figures."""
    device = torch.device(args.device)
    out, work = Path(args.out), Path(args.work or Path(args.out) / "work")
    trainer = Trainer(settings, images, device, args.capture)
    name, path = settings.name, work / f"{settings.name}.ckpt"
    if path.exists():
        state = checkpoint.load(path, device)
        checkpoint.require_same(path, "data set", state["data"], trainer.data_facts)
        checkpoint.require_same(path, "settings", state["settings"], settings.words())
        trainer.load(state)
    record = Record(out / f"{name}.jsonl", trainer.epoch)
    done = [line for line in record.of_kind("final") if line["epoch"] == trainer.epoch == args.epochs]
    if done:
        print(f"{name}: the figures of {args.epochs} epochs are there.", flush=True)
        return done[-1]
    times = trainer.measure(args.measure_seconds)
    planned = plan(trainer, args, share, times)
    projected = PAPER_EPOCHS * times["epoch"]
    record.add(
        {
            "kind": "start",
            "settings": settings.words(),
            "machine": machine(device),
            "date": datetime.date.today().isoformat(),
            "from_epoch": trainer.epoch,
            "planned_epochs": planned.epochs,
            "way": trainer.captured.way,
            "reasons": trainer.captured.reasons,
            "parameters": sum(p.numel() for p in trainer.ensemble.template.parameters()),
            "steps_per_second": 1 / times["step"],
            "seconds_of_an_epoch": times["epoch"],
            "evaluation_seconds": planned.evaluation_seconds,
            "seconds_of_2000_epochs": projected,
        }
    )
    for reason in trainer.captured.reasons:
        print(f"{name}: not {reason}", flush=True)
    print(
        f"{name}: {len(settings.seeds)} members, {trainer.captured.way}, {1 / times['step']:.1f} steps per second, "
        f"{times['epoch']:.2f} s an epoch; {PAPER_EPOCHS:,} epochs would take {duration(projected)}. From epoch "
        f"{trainer.epoch} to {planned.epochs}, then evaluation, about {duration(planned.evaluation_seconds)}.",
        flush=True,
    )
    stopped = run_epochs(trainer, record, args, planned, share.deadline, path)
    with trainer.exact_products():
        figures = evaluate(trainer, args, share.deadline - WRITING)
    figures["stopped_by_the_budget"] = stopped
    record.add({"kind": "final", "epoch": trainer.epoch, **figures})
    write_pictures(trainer, record, out / name)
    for number in range(min(args.weights, trainer.ensemble.size)):
        write_weights(trainer, number, out / f"{name}-weights{number}.pt", figures)
    print(table(name, record.lines[-1]), flush=True)
    return record.lines[-1]


def run_epochs(trainer, record, args, planned, deadline, path):
    """Train until all epochs are done or time is up; return whether it was."""
    saved, stopped, rows, took = time.monotonic(), False, [], [planned.epoch_seconds]
    while trainer.epoch < planned.epochs:
        next_end = time.monotonic() + MARGIN * max(took[-3:])
        if next_end + planned.evaluation_seconds > deadline:
            stopped = True
            break
        begin = time.monotonic()
        rows.append(trainer.run_epoch())
        if not all(map(math.isfinite, rows[-1]["loss"])):
            raise GraphflowsError(
                f"Expected finite losses; in epoch {trainer.epoch} they are {rows[-1]['loss']}. The checkpoint is from "
                "before; lower --lr."
            )
        last = trainer.epoch == planned.epochs
        if last or time.monotonic() - saved > args.checkpoint_seconds:
            checkpoint.save(path, trainer.state())
            saved = time.monotonic()
        record.add(rows[-1])
        took.append(time.monotonic() - begin)
        if args.verbose and (last or trainer.epoch % args.print_every == 0):
            print(progress(trainer.settings.name, rows[-1]), flush=True)
    if stopped and rows:
        checkpoint.save(path, trainer.state())
    return stopped or planned.epochs < args.epochs


def evaluate(trainer, args, deadline):
    """Return the figures of the best parameters of each member."""
    begin = time.monotonic()
    ensemble, test = trainer.ensemble, evaluation.spread(trainer.test)
    figures = {"best_epoch": trainer.take_best(), "validation": trainer.best_bound.tolist()}
    before, _ = evaluation.bound(ensemble, test, args.bound_samples, trainer.rows)
    figures["elbo_before_recalibration"] = before.tolist()
    number, training = recalibrated(trainer, args), evaluation.spread(trainer.data.images)
    training = training.repeat(math.ceil(number / len(training)), 1)[:number]
    if trainer.data.num_levels > 2:
        grey = training.to(torch.float32) / (trainer.data.num_levels - 1)
        source = evaluation.fixed_source(trainer.device, 2)
        training = torch.bernoulli(grey, generator=source).to(torch.uint8)
    evaluation.recalibrate(ensemble, training)
    elbo, divergences = evaluation.bound(ensemble, test, args.bound_samples, trainer.rows)
    figures |= {
        "recalibrated": len(training),
        "bound_samples": args.bound_samples,
        "elbo": elbo.tolist(),
        "kl": divergences.tolist(),
    }
    if ensemble.num_gates:
        figures["gates"] = ensemble.gate_probabilities().tolist()
    evidence = evaluation.log_evidence(
        ensemble, test[: args.ll_images], args.ll_particles, args.rows, args.images_at_once, deadline
    )
    ll = evidence["log_evidence"].double()
    count = ll.shape[1]
    if count < min(args.ll_images, len(test)):
        print(
            f"The budget ended after the log-likelihood of {count:,} images, a random part of them.",
            flush=True,
        )
    figures |= {
        "ll": ll.mean(1).tolist(),
        "ll_standard_error": (ll.std(1) / count**0.5).tolist(),
        "ll_images": count,
        "ll_particles": args.ll_particles,
        "median_ess": evidence["ess"].median(1).values.tolist(),
        "share_khat_above_0.7": (evidence["khat"] > 0.7).double().mean(1).tolist(),
        "evaluation_seconds": time.monotonic() - begin,
        "training_seconds": trainer.seconds,
    }
    return figures


# ----------------------------------------------------------------------------------------------------------- files


def write_pictures(trainer, record, stem):
    """Draw test images, reconstructions and samples of each member, and gates over epochs."""
    pyro.set_rng_seed(0)
    shape = trainer.ensemble.template.input_shape
    some = evaluation.spread(trainer.test)[:12].reshape(-1, *shape)
    rows = [some]
    for number in range(trainer.ensemble.size):
        vae = trainer.vae_of(number)
        rows += [vae.reconstruct(some.to(vae.bottom_up.bias.dtype)), vae.sample(len(some), mean=True)]
    images = png(grid(rows))
    write_whole(Path(f"{stem}-images.png"), lambda file: file.write(images))
    epochs = record.of_kind("epoch")
    if trainer.ensemble.num_gates and epochs:
        gates = torch.tensor([line["gates"] for line in epochs])  # (epochs, E, G)
        gates = gates[torch.linspace(0, len(gates) - 1, min(len(gates), 500)).round().long()]
        pictures = [gates[:, number].T for number in range(trainer.ensemble.size)]  # a line for each gate
        scaled = [p.repeat_interleave(8, 0).repeat_interleave(max(1, 500 // len(gates)), 1) for p in pictures]
        padded = [torch.nn.functional.pad(p, (0, 0, 0, 4), value=1.0) for p in scaled]
        picture = png(torch.cat(padded))
        write_whole(Path(f"{stem}-gates.png"), lambda file: file.write(picture))


def write_weights(trainer, number, path, figures):
    """Write the state of a member, as one of GraphVAE, with what such a model is made of."""
    settings = trainer.settings
    content = {
        "structure": settings.structure,
        "input_shape": list(trainer.ensemble.template.input_shape),
        "settings": settings.words(),
        "seed": settings.seeds[number],
        "best_epoch": figures["best_epoch"][number],
        "state": {key: value.cpu() for key, value in trainer.ensemble.state_of(number).items()},
    }
    write_whole(path, partial(torch.save, content))


# ----------------------------------------------------------------------------------------------------------- words


def duration(seconds):
    """Say a time."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def progress(name, row):
    """Say how an epoch went."""
    validation = f", validation {mean_sd(row['validation'])}" if "validation" in row else ""
    return f"{name} epoch {row['epoch']}: loss {mean_sd(row['loss'])}{validation}, {row['seconds']:.2f} s"


def table(name, final):
    """Say the final figures: means and standard deviations over members."""
    divergence = [sum(line) for line in final["kl"]]
    return (
        f"{name} after {final['epoch']} epochs: bound {mean_sd(final['elbo'])}, KL {mean_sd(divergence)}, LL "
        f"{mean_sd(final['ll'])} ({final['ll_images']:,} images, {final['ll_particles']:,} samples); training "
        f"{duration(final['training_seconds'])}, evaluation {duration(final['evaluation_seconds'])}."
    )


def machine(device):
    """Say what it was computed on."""
    version = torch.__version__.split("+")[0]
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; torch {version}"
    return f"CPU, {torch.get_num_threads()} thread(s); torch {version}"


def keep(record, path):
    """Add a run to the results of the study: settings, machine, the curve and the final figures, in one line."""
    start, final = record.of_kind("start")[-1], record.of_kind("final")[-1]
    kept = ("settings", "machine", "date", "way", "parameters", "seconds_of_an_epoch")
    Results(path).append(
        f"{TRAINED}{record.path.stem} {final['epoch']}",
        {
            **{name: start[name] for name in kept},
            "curve": [
                {key: line[key] for key in ("epoch", "validation")} for line in record.of_kind("epoch")
            ],
            **{name: value for name, value in final.items() if name != "kind"},
        },
    )


# --------------------------------------------------------------------------------------------------------- command


def settings_of(structure, args):
    """Return the settings of a structure by the flags."""
    small = args.data_set == "digits"
    learned = structure == "learned"
    return Settings(
        data_set=args.data_set,
        structure=structure,
        seeds=tuple(args.seeds),
        num_nodes=args.num_nodes,
        node_dim=args.node_dim or (4 if small else 16),
        decoder_input=args.decoder_input,
        networks=SMALL_NETWORKS if small else {},
        edge_cost=args.edge_cost if learned else 0.0,
        batch_size=args.batch_size,
        rate=args.lr,
        decay=args.decay,
        decay_every=args.decay_every,
        anneal=args.anneal,
        floor=args.floor,
        gate_rate=args.gate_rate if learned else 1.0,
        freeze_after=args.freeze_after if learned else None,
        gate_start=args.gate_start if learned else 0.5,
        estimator=args.estimator if learned else "relaxed",
        gates_of=args.gates_of if learned else "batch",
        validate_every=args.validate_every,
        precision=args.precision,
    )


def main(args):
    """Train each structure asked for; a budget is divided evenly."""
    started = STARTED if args.own_process else time.monotonic()
    end = math.inf if args.budget_seconds is None else started + args.budget_seconds
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    pyro.enable_validation(False)  # costs time and waits for the device
    try:
        images = load_images(args.data_set, args.data)
        if args.limit is not None:
            parts = {part: getattr(images, part)[: args.limit] for part in ("train", "validation", "test")}
            images = type(images)(**{**vars(images), **parts})
        finals = {}
        for number, structure in enumerate(args.structures):
            begin, shares = time.monotonic(), len(args.structures) - number
            share = Share(started, begin, begin + (end - begin) / shares, shares)
            settings = settings_of(structure, args)
            finals[structure] = train(settings, images, args, share)
            if args.results is not None:
                keep(
                    Record(Path(args.out) / f"{settings.name}.jsonl", finals[structure]["epoch"]),
                    args.results,
                )
        return finals
    except GraphflowsError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def parser():
    """Return the flags."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parse.add_argument
    add("--data-set", choices=DATA_SETS, default="binarized_mnist")
    add("--data", help="folder of the image files (or PYRO_GRAPHFLOWS_DATA)")
    add("--structures", nargs="+", choices=STRUCTURES, default=["learned"])
    add("--seeds", nargs="+", type=int, default=[0], help="one member for each")
    add("--epochs", type=positive, default=PAPER_EPOCHS, help="at most, with a budget")
    add("--budget-seconds", type=float, help="of the whole program, evaluation and start included")
    add("--num-nodes", type=positive, default=5)
    add("--node-dim", type=positive, help="16, of digits 4")
    add("--decoder-input", choices=["all", "first"], default="all")
    add("--batch-size", type=positive, default=64)
    add("--lr", type=float, default=1e-3)
    add("--decay", type=float, default=0.25, help="what the rate is multiplied by")
    add("--decay-every", type=positive, default=200, help="epochs")
    add("--anneal", type=float, default=0.99, help="what the temperature is multiplied by after each epoch")
    add("--floor", type=float, default=0.1, help="the lowest temperature")
    add("--gate-rate", type=float, default=1.0, help="learning rate of gates, times the others'")
    add("--gate-start", type=float, default=0.5, help="probability that a gate is open at the start")
    add("--estimator", choices=ESTIMATORS, default="relaxed", help="of the gates' gradient")
    add(
        "--gates-of",
        choices=["batch", "datum"],
        default="batch",
        help="what has gates of its own in training",
    )
    add("--freeze-after", type=int, help="epochs after which gates are hard in training too")
    add("--edge-cost", type=float, default=0.0, help="nats per datum of an open gate in training")
    add("--precision", choices=["float32", "tf32", "bfloat16"], default="float32", help="of matrix products")
    add("--capture", choices=["auto", *capture.WAYS], default="auto", help="how a step is run")
    add("--validate-every", type=positive, default=1, help="epochs; the best of those are kept")
    add("--bound-samples", type=positive, default=1, help="samples of the nodes for the final bound")
    add("--ll-images", type=positive, default=10_000)
    add("--ll-particles", type=positive, default=5000)
    add(
        "--rows",
        type=positive,
        help="importance samples at once; 2,000 on a CPU, 65,536 on a GPU for all members",
    )
    add("--images-at-once", type=positive, default=50)
    add("--recalibrate", type=positive, default=50_000, help="training images for the batch statistics")
    add("--weights", type=int, default=10**6, help="of how many members weights are written")
    add("--limit", type=positive, help="use only the first images of each part")
    add("--measure-seconds", type=float, default=2.0, help="how long the rate is measured")
    add("--checkpoint-seconds", type=float, default=60.0, help="least time between checkpoints")
    add("--print-every", type=positive, default=1, help="epochs")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=positive, default=1)
    add("--out", default="out/graph_vae")
    add("--work", help="folder of checkpoints; OUT/work")
    add("--results", type=Path, help="a study's file of results that the figures are added to")
    add("--verbose", action=argparse.BooleanOptionalAction, default=True)
    parse.set_defaults(own_process=False)
    return parse


def read(arguments=None, own_process=False):
    """Read the flags."""
    args = parser().parse_args(arguments)
    args.own_process = own_process
    if args.rows is None:
        args.rows = 2000 if args.device == "cpu" else max(1000, 65_536 // len(args.seeds))
    return args


if __name__ == "__main__":
    main(read(own_process=True))
