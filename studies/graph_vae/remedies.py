r"""Why the learned structure is behind the full one after a short training, and what helps: digits, five seeds.

One way to train, five members in one ensemble, is one line of ``results.jsonl`` (its key begins with "remedy: "): the
final figures of ``train.py``, and on the way

- the *gradient of the gates* at fixed parameters, over fresh batches and noise: its mean over its standard deviation,
  and how far a logit can go in an epoch;
- the *training bound* on the batch's own statistics with relaxed gates as in training, and with the hard gates that
  evaluation has;
- the *validation bound* with stored statistics, as they are and collected anew with hard gates.

    nice -n 19 python -m studies.graph_vae.remedies --results studies/graph_vae/results.jsonl
"""

import argparse
import math
import time

import pyro
import torch

from pyro_graphflows.datasets import load_images
from studies.flags import add_places
from studies.graph_vae import evaluation, train
from studies.graph_vae.trainer import Trainer
from studies.results import Results
from studies.tables import mean_sd

COMMON = "--data-set digits --device cpu --seeds 0 1 2 3 4 --decay-every 100 --validate-every 5 --bound-samples 200"
COMMON += " --ll-particles 1000"
EPOCHS = 150
CHECKED_AT = (10, 60, 150)
KEY = "remedy: "
WAYS = {
    "full": "--structures full",
    "published": "",
    "gates 10": "--gate-rate 10",
    "gates 10, frozen 60": "--gate-rate 10 --freeze-after 60",
    "straight-through, gates 10": "--estimator straight-through --gate-rate 10",
    "start 0.9, gates 10": "--gate-start 0.9 --gate-rate 10",
    "gates of each datum, 10": "--gates-of datum --gate-rate 10",
    "gates of each datum, 30": "--gates-of datum --gate-rate 30",
    "gates of each datum, straight-through, 30": "--gates-of datum --estimator straight-through --gate-rate 30",
    "gates 100": "--gate-rate 100",
    "annealed 0.95, gates 10": "--anneal 0.95 --gate-rate 10",
    "chain": "--structures chain",
    "gates 30": "--gate-rate 30",
    "gates 30, frozen 30": "--gate-rate 30 --freeze-after 30",
    "straight-through": "--estimator straight-through",
    "start 0.9": "--gate-start 0.9",
    "frozen 60": "--freeze-after 60",
    "annealed 0.95": "--anneal 0.95",
    "gates 10, edge cost 0.1, frozen 60": "--gate-rate 10 --edge-cost 0.1 --freeze-after 60",
    "gates 10, edge cost 0.01": "--gate-rate 10 --edge-cost 0.01",
}


def snapshot(trainer):
    """Return all that training changes, and the random sources."""
    sources = [generator.get_state() for generator in trainer.data.generators]
    return {key: value.detach().clone() for key, value in trainer.tensors().items()}, sources


@torch.no_grad()
def restore(trainer, before):
    """Put everything back."""
    for key, value in trainer.tensors().items():
        value.copy_(before[0][key])
    for generator, state in zip(trainer.data.generators, before[1], strict=True):
        generator.set_state(state)


def gate_gradients(trainer, epochs=5):
    """Return mean over standard deviation of each gate's gradient from batch to batch, in size.

    Gates without any gradient, which are open or closed to the last digit, are left out.
    """
    logits = trainer.ensemble.parameters["gates.logits"]
    found = []
    for _ in range(epochs):
        trainer.data.draw()
        for _ in range(trainer.data.num_steps):
            found.append(torch.autograd.grad(trainer.ensemble.losses(*trainer.data.next()).sum(), logits)[0])
            trainer.data.advance()
    gradients = torch.stack(found)
    ratio = gradients.mean(0).abs() / gradients.std(0)
    return ratio[gradients.std(0) > 0], len(found)


@torch.no_grad()
def training_bounds(trainer, epochs=3):
    """Return the bounds of training batches ``(E,)`` with batch statistics: gates as in training, and hard ones."""
    ensemble, totals = trainer.ensemble, torch.zeros(2, trainer.ensemble.size)
    for _ in range(epochs):
        trainer.data.draw()
        for _ in range(trainer.data.num_steps):
            x, noise, gate_noise = trainer.data.next()
            for which, gates in enumerate((ensemble.relaxed_gates(gate_noise), ensemble.hard_gates())):
                logits, divergences, _ = ensemble.terms(ensemble.bottom_up(x, True), noise, gates, True)
                totals[which] += (evaluation.log_likelihood(logits, x) - divergences.sum(1)).mean(1)
            trainer.data.advance()
    return totals / (epochs * trainer.data.num_steps)


def evidence(trainer):
    """Return what is measured on the way; afterwards everything is as it was."""
    before = snapshot(trainer)
    trainer.ensemble.momentum, momentum = 0.0, trainer.ensemble.momentum
    found = {"epoch": trainer.epoch}
    if trainer.ensemble.num_gates:
        found["gates"] = trainer.ensemble.gate_probabilities().tolist()
        if not trainer.ensemble.is_frozen.all():
            ratio, batches = gate_gradients(trainer)
            found["gradient_mean_over_sd"] = {
                "median": ratio.median().item() if len(ratio) else None,
                "largest": ratio.max().item() if len(ratio) else None,
                "of_pure_noise": math.sqrt(
                    2 / math.pi / batches
                ),  # the mean of a ratio whose true value is 0
            }
    relaxed, hard = training_bounds(trainer).tolist()
    found |= {"training_bound": relaxed, "training_bound_hard_gates": hard}
    trainer.ensemble.momentum = momentum
    found["validation"] = evaluation.bound(trainer.ensemble, trainer.validation, 20)[0].tolist()
    evaluation.recalibrate(trainer.ensemble, drawn(trainer))
    found["validation_recalibrated"] = evaluation.bound(trainer.ensemble, trainer.validation, 20)[0].tolist()
    restore(trainer, before)
    return found


def drawn(trainer, passes=15):
    """Return training images, binarised anew."""
    grey = trainer.data.images.repeat(passes, 1).to(torch.float32) / (trainer.data.num_levels - 1)
    return torch.bernoulli(grey, generator=evaluation.fixed_source(trainer.device, 3)).to(torch.uint8)


def run(name, flags, images, epochs, particles):
    """Train one way; return its line."""
    begin = time.process_time()
    args = train.read([*COMMON.split(), *flags.split(), "--epochs", str(epochs)])
    args.ll_particles = particles or args.ll_particles
    settings = train.settings_of(args.structures[0], args)
    trainer = Trainer(settings, images, torch.device("cpu"))
    checked, rows = [], []
    while trainer.epoch < epochs:
        rows.append(trainer.run_epoch())
        if trainer.epoch in CHECKED_AT or trainer.epoch == epochs:
            checked.append(evidence(trainer))
    last = [row["loss"] for row in rows[-10:]]
    before = snapshot(trainer)
    final = train.evaluate(trainer, args, math.inf)
    restore(trainer, before)
    trainer.best_at.zero_()  # the last parameters, whatever was best on the way
    last_figures = train.evaluate(trainer, args, math.inf)
    return {
        "way": name,
        "flags": flags,
        "settings": settings.words(),
        "epochs": epochs,
        "checked": checked,
        "training_loss_of_last_epochs": torch.tensor(last).mean(0).tolist(),
        "best": final,
        "last": last_figures,
        "cpu_seconds": time.process_time() - begin,
    }


def lines_of(records):
    """Return the lines of all ways that are there, in their order above."""
    return [records[KEY + name] for name in WAYS if KEY + name in records]


def paired(line, full, figures="best", key="elbo"):
    """Return the mean difference from the full structure by seed, and its standard error."""
    d = torch.tensor(line[figures][key]) - torch.tensor(full[figures][key])
    return d.mean().item(), (d.std() / len(d) ** 0.5).item()


def table(lines):
    """Return the figures of all ways, by the difference from the full structure."""
    full = next((line for line in lines if line["way"] == "full"), None)
    header = f"{'way':38} {'bound':>16} {'LL':>16} {'- full':>17} {'LL - full':>17} {'last - full':>17} open decided"
    text = [header]
    for line in lines:
        best = line["best"]
        row = f"{line['way']:38} {mean_sd(best['elbo'], 3):>16} {mean_sd(best['ll'], 3):>16}"
        if full is not None:
            for figures, key in (("best", "elbo"), ("best", "ll"), ("last", "elbo")):
                mean, error = paired(line, full, figures, key)
                row += f" {mean:+8.3f} ± {error:.3f} "
        if "gates" in best:
            gates = torch.tensor(line["last"]["gates"])
            decided = ((gates < 0.1) | (gates > 0.9)).sum(1).double().mean()
            row += f" {(gates > 0.5).sum(1).double().mean():4.1f} {decided:6.1f}"
        text.append(row)
    return "\n".join(text)


def main(args):
    """Train in the ways that are not in the file yet, and print the table."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pyro.enable_validation(False)
    results = Results(args.results)
    images = load_images("digits")
    for name in args.ways or WAYS:
        if KEY + name in results:
            continue
        line = run(name, WAYS[name], images, args.epochs, args.ll_particles)
        results.append(KEY + name, line)
        print(f"{name}: {line['cpu_seconds']:.0f} s of processor", flush=True)
    print(table(lines_of(results.read())))


def parser():
    """Return the flags."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_places(parse, "graph_vae")
    parse.add_argument("--ways", nargs="+", choices=list(WAYS))
    parse.add_argument("--epochs", type=int, default=EPOCHS)
    parse.add_argument("--ll-particles", type=int)
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
