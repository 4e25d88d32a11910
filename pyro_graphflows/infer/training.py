r"""Training to the end: epochs, a schedule, checkpoints, and an orderly stop whatever happens.

:func:`fit` minimises an ELBO or an :class:`InferenceCompilation` with one torch optimiser over *all*
parameters of the model and the guide, wherever they are kept (see
:class:`~pyro_graphflows.infer.parameters.ParameterSet`): Pyro's ``SVI`` would silently not train the weights
of a plain module, and an ELBO used as a module not those of ``pyro.param``. Everything is counted in nats per
datum, so that learning rates, clipping and figures mean the same for every batch size.

Beside it: :mod:`~pyro_graphflows.infer.schedule` (how long), :mod:`~pyro_graphflows.infer.history` (what is reported),
:mod:`~pyro_graphflows.infer.trainer` (one gradient step, one validation).
"""

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.infer.batches import Batch, TrainingData
from pyro_graphflows.infer.checkpoints import (
    Checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
    seeded,
    set_random_state,
)
from pyro_graphflows.infer.fixed_simulations import Simulations
from pyro_graphflows.infer.history import History, Progress
from pyro_graphflows.infer.objectives import Objective
from pyro_graphflows.infer.particles import Program
from pyro_graphflows.infer.schedule import Plateau, Schedule
from pyro_graphflows.infer.trainer import NotFiniteError, Trainer

__all__ = ["fit"]

logger = logging.getLogger(__name__)
_STEPS_WITHOUT_DATA = 100


def fit(
    model: Program,
    guide: Program,
    data: Any = None,
    *,
    simulations: Any = None,
    loss: Any = None,
    optimizer: Any = 1e-3,
    schedule: Schedule | int | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    progress: Progress | bool = True,
    seed: int | None = 0,
) -> History:
    r"""Train a guide, and the model's own parameters, until the loss stops falling.

    Each epoch walks through the data once in random batches. The monitored loss is that of the validation
    data, evaluated after each epoch in evaluation mode with the same random numbers every time, or else the
    epoch's mean training loss. What it decides is said in :class:`Schedule`.

    *Which parameters remain.* With validation data, those of the best epoch. Without, the last ones: epochs
    differ by less than the noise of their training loss. After Ctrl-C, those of the best epoch so far (the
    current ones if no epoch was completed). After a loss or gradient that is not finite, those of the best
    epoch so far (those at the start if none); the reason, a warning and the message name the first site at
    fault. Neither raises.

    *Checkpoints.* After each epoch the parameters, buffers, optimiser, schedule, random generators, data
    order, best parameters and history are written atomically. A run that finds its checkpoint continues after
    the last completed epoch; on a CPU the result is bit for bit that of a run that was never interrupted. The
    settings that decide the random numbers must be the same; ``num_epochs`` and ``patience`` may change, and
    so may ``num_steps`` (an epoch that it cut short is not completed later).

    *Parameters* are found wherever they live: modules that the model and the guide are, or whose bound
    methods they are, and all ``pyro.param`` and ``pyro.module`` statements. Those that first appear in
    mid-training join the optimiser (but such a run cannot be resumed). Modules train in the mode they are in.

    *Losses per datum.* The loss of a batch is divided by its number of data, also of the smaller last one of
    an epoch, and the epoch's loss is the mean over data. Under inference compilation without data a joint
    sample is a datum.

    Args:
        model: A Pyro model, or a bound method of a module.
        guide: A guide for it.
        data: A tensor or array, a tuple or dict of them (positional or keyword arguments of the model and the
            guide) with the data along the first dimension, a ``Dataset``, a ``DataLoader``, or a
            :class:`TrainingData`, which also has the batch size and validation data. ``None`` under inference
            compilation, which draws its own, or for a model that holds its data.
        simulations: Joint samples of the model to learn from, without any density of it: their number, a dict from site
            to values, a ``DataLoader`` of such dicts, or
            :class:`~pyro_graphflows.infer.Simulations`, which also says what is held out. ``data`` then are the
            arguments of one call, if the model needs some; they tell shapes. The loss is that of the class.
        loss: An ELBO object, an :class:`InferenceCompilation` object of this pair, or that class itself for one
            with its defaults; ``Trace_ELBO()`` by default.
        optimizer: A learning rate for Adam (in torch's fused form, where there is one), a function from a list of
            parameters to a torch optimiser
            (``torch.optim.AdamW``, ``functools.partial(torch.optim.Adam, lr=1e-2)``), a
            :class:`torch.optim.Optimizer`, or a :class:`pyro.optim.PyroOptim`, whose options per parameter
            are kept. One torch optimiser holds all parameters in every case.
        schedule: A number of epochs, or a :class:`Schedule`. With ``simulations`` it may be left out: training then
            ends when the loss of those that are held out has stopped falling.
        checkpoint: A file, or a :class:`Checkpoint`.
        progress: Whether to show a bar, or a :class:`Progress`.
        seed: Seed of all random numbers meanwhile; the global generators are put back afterwards. ``None``
            uses them as they are.

    Returns:
        The history, with the reason of the end.

    Raises:
        GraphflowsError: If gradients are disabled, if the loss of the first batch is not finite before the first
            step, if there is nothing to train, if the data, the loss, the optimiser or another argument is not of
            these kinds, or the checkpoint belongs to another run.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(slope * x, 0.5**0.5))
        >>> x = 2**0.5 * torch.randn(500)
        >>> history = fit(model, guide, x, optimizer=0.05, schedule=20, progress=False)
        >>> history.stop_reason, abs(pyro.param("slope").item() - 0.5) < 0.1
        ('all 20 epochs done', True)
    """
    data, progress = TrainingData.of(data), Progress.of(progress)
    simulations = None if simulations is None else Simulations.of(simulations)
    schedule = Schedule.of(simulations.SCHEDULE if schedule is None and simulations is not None else schedule)
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    if not torch.is_grad_enabled():
        raise GraphflowsError(
            "Expected gradients to be enabled; got a call under torch.no_grad() or inference mode, where nothing would "
            "be trained. Call fit outside of it."
        )
    args, kwargs = data.arguments()
    fitting_to = getattr(guide, "fitting_to", None)  # for guides that remember what they were trained on
    with (
        seeded(seed),
        warnings.catch_warnings(),
        nullcontext() if fitting_to is None else fitting_to(*args, **kwargs),
    ):
        # Pyro warns of what is handled here: a loss that is not finite
        warnings.filterwarnings("ignore", message=r"Encountered (NaN|\+?-?inf)")
        if simulations is not None:
            loss, data = simulations.prepare(model, guide, args, kwargs, loss)
        trainer = Trainer(Objective(model, guide, loss), data, optimizer, schedule.max_grad_norm, seed)
        run = _Run(trainer, schedule, checkpoint, {**trainer.settings(), "seed": seed}, progress)
        run.resume()
        return run.train()


class _Run:
    """The loop over epochs, with what it must remember."""

    def __init__(
        self,
        trainer: Trainer,
        schedule: Schedule,
        checkpoint: Checkpoint | None,
        settings: dict[str, Any],
        progress: Progress,
    ) -> None:
        self.trainer = trainer
        self.schedule = schedule
        self.plateau = Plateau(trainer.optimizer, schedule)
        self.checkpoint = checkpoint
        self.progress = progress
        without_data = trainer.data.data is None
        self.steps_per_epoch = schedule.steps_per_epoch or (_STEPS_WITHOUT_DATA if without_data else 1)
        self.settings = {**settings, "steps_per_epoch": self.steps_per_epoch}
        self.history = History()
        self.start = trainer.parameters.state()
        self.best: dict[str, Tensor] | None = None
        self.finished = False  # no more epochs wanted, however many are allowed

    # ------------------------------------------------------------------------------------------------- epochs
    def train(self) -> History:
        """Run the epochs that are left; always leave usable parameters."""
        history, parameters = self.history, self.trainer.parameters
        total, shown = self._steps_left(), self.progress.bar
        try:
            with tqdm(total=total or None, disable=not shown, unit="step", mininterval=0.5) as bar:
                while self._reason_of_end() is None and not self.finished:
                    self._epoch(bar)
            if not self.finished:
                history.stop_reason = self._reason_of_end()
            if history.validation_loss and self.best is not None:
                parameters.load(self.best)
        except KeyboardInterrupt:
            history.stop_reason = "interrupted"
            if self.best is not None:
                parameters.load(self.best)
        except NotFiniteError as error:
            history.stop_reason = f"not finite in epoch {len(history)}: {error}"
            parameters.load(self.start if self.best is None else self.best)
            where = "the start" if self.best is None else f"epoch {history.best_epoch}"
            warnings.warn(
                f"Training stopped: {error}. The parameters are those of {where}.",
                GraphflowsWarning,
                stacklevel=3,
            )
        parameters.forget_gradients()
        logger.info("Training ended: %r", history)
        return history

    def _reason_of_end(self) -> str | None:
        schedule, history = self.schedule, self.history
        if schedule.num_epochs is not None and len(history) >= schedule.num_epochs:
            return f"all {schedule.num_epochs} epochs done"
        if schedule.num_steps is not None and history.num_steps >= schedule.num_steps:
            return f"all {schedule.num_steps} steps done"
        return None

    def _steps_left(self) -> int:
        """Return how many steps there are at most, as far as that is known; else 0."""
        per_pass = len(self.trainer.batches)
        left = math.inf
        if self.schedule.num_epochs is not None and per_pass:
            passes = max(1, -(-self.steps_per_epoch // per_pass))
            left = max(0, self.schedule.num_epochs - len(self.history)) * passes * per_pass
        if self.schedule.num_steps is not None:
            left = min(left, max(0, self.schedule.num_steps - self.history.num_steps))
        return 0 if left == math.inf else int(left)

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches of an epoch: whole passes through the data, unless the number of steps ends."""
        count, limit = 0, self.schedule.num_steps
        while count < self.steps_per_epoch:
            before = count
            for batch in self.trainer.batches:
                yield batch
                count += 1
                if limit is not None and self.history.num_steps + count >= limit:
                    return
            if count == before:
                raise GraphflowsError(
                    "Expected at least one batch of data in each pass; the iterable has none."
                )

    def _epoch(self, bar: Any) -> None:
        history, limit = self.history, self.schedule.num_epochs
        of = "" if limit is None else f"/{limit}"
        bar.set_description(f"epoch {len(history) + 1}{of}", refresh=False)
        begin, rate = time.perf_counter(), self.plateau.learning_rate
        total, count, steps = 0.0, 0, 0
        for batch in self._batches():
            total += self.trainer.step(batch) * batch.size
            count += batch.size
            steps += 1
            bar.update()
        loss = total / count
        validation_loss = self.trainer.validate()

        before = history.seconds[-1] if history.seconds else 0.0
        history.loss.append(loss)
        if validation_loss is not None:
            history.validation_loss.append(validation_loss)
        history.learning_rate.append(rate)
        history.seconds.append(before + time.perf_counter() - begin)
        history.num_steps += steps
        monitored = loss if validation_loss is None else validation_loss
        logger.debug("Epoch %d: loss %.6g at rate %.1e, monitored %.6g.", len(history), loss, rate, monitored)
        if history.best_epoch is None or monitored < history.monitored[history.best_epoch]:
            history.best_epoch = len(history) - 1
            self.best = self.trainer.parameters.state()
        bar.set_postfix_str(
            f"loss {loss:.4g}"
            + (f", validation {validation_loss:.4g}" if validation_loss is not None else "")
            + f", rate {rate:.1e}",
            refresh=False,
        )
        reason = self.plateau.update(monitored)
        if self.progress.on_epoch is not None:
            state = random_state()  # what is computed there must not change the training
            if self.progress.on_epoch(history):
                reason = reason or "on_epoch asked to stop"
            set_random_state(state)
        if reason is not None:
            history.stop_reason, self.finished = reason, True
        if self.checkpoint is not None:
            due = len(history) % self.checkpoint.every == 0
            if due or self.finished or self._reason_of_end() is not None:
                self._save(self.checkpoint)

    # -------------------------------------------------------------------------------------------- checkpoints
    def _save(self, checkpoint: Checkpoint) -> None:
        state = {
            "settings": self.settings,
            "trainer": self.trainer.state(),
            "schedule": {"reference": self.plateau.reference, "num_bad": self.plateau.num_bad},
            "best": self.best,
            "finished": self.finished,
            "history": asdict(self.history),
        }
        save_checkpoint(state, checkpoint.path)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one and that is wanted."""
        if self.checkpoint is None or not self.checkpoint.resume or not Path(self.checkpoint.path).exists():
            return
        state = load_checkpoint(self.checkpoint.path)
        differing = [key for key, value in self.settings.items() if state["settings"].get(key) != value]
        if differing:
            raise GraphflowsError(
                f"The checkpoint {str(self.checkpoint.path)!r} belongs to another run: {differing} differ. Give "
                "another file, or Checkpoint(path, resume=False) to start again and overwrite it."
            )
        self.trainer.load(state["trainer"])
        self.plateau.reference = state["schedule"]["reference"]
        self.plateau.num_bad = state["schedule"]["num_bad"]
        self.best = state["best"]
        self.finished = state["finished"]
        self.history = History(**state["history"])
        logger.info("Continuing after epoch %d of %s.", len(self.history), self.checkpoint.path)
