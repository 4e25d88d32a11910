r"""Training to the end: epochs, a schedule, checkpoints, and an orderly stop whatever happens.

:func:`fit` minimises an ELBO or an :class:`InferenceCompilation` with one torch optimiser over *all*
parameters of the model and the guide, wherever they are kept (see
:class:`~pyro_graphflows.infer.parameters.ParameterSet`): Pyro's ``SVI`` would silently not train the weights
of a plain module, and an ELBO used as a module not those of ``pyro.param``. Everything is counted in nats per
datum, so that learning rates, clipping and figures mean the same for every batch size.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.infer.batches import Batches
from pyro_graphflows.infer.checkpoints import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    seeded,
    set_random_state,
)
from pyro_graphflows.infer.objectives import Objective
from pyro_graphflows.infer.particles import Program
from pyro_graphflows.infer.trainer import NotFiniteError, Trainer

__all__ = ["History", "fit"]


@dataclass
class History:
    """What happened in a training run; lists have one entry per completed epoch.

    Attributes:
        loss: Training loss in nats per datum, averaged over the epoch while the parameters moved.
        validation_loss: Validation loss in nats per datum after the epoch; empty without validation data.
        learning_rate: The rate used in the epoch.
        seconds: Wall-clock time since the start of training, resumed runs included.
        num_steps: The number of gradient steps taken in completed epochs.
        best_epoch: The epoch (from 0) with the lowest validation loss (training loss without validation
            data).
        stop_reason: Why training ended.
    """

    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_steps: int = 0
    best_epoch: int | None = None
    stop_reason: str | None = None

    def __len__(self) -> int:
        """Return the number of completed epochs."""
        return len(self.loss)

    @property
    def monitored(self) -> list[float]:
        """The losses that decide which epoch is best."""
        return self.validation_loss or self.loss


def fit(
    model: Program,
    guide: Program,
    data: Any = None,
    *,
    loss: Any = None,
    optimizer: Any = None,
    batch_size: int = 100,
    num_epochs: int,
    validation: Any = None,
    patience: int | None = 10,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
    seed: int | None = 0,
    model_kwargs: Mapping[str, Any] | None = None,
    steps_per_epoch: int = 100,
    data_size: int | None = None,
    max_grad_norm: float | None = None,
    lr_factor: float = 0.1,
    min_lr: float = 1e-6,
    min_improvement: float = 1e-4,
    checkpoint_every: int = 1,
    on_epoch: Callable[[History], Any] | None = None,
) -> History:
    r"""Train a guide, and the model's own parameters, until the loss stops falling.

    Each epoch walks through the data once in random batches. The monitored loss is that of the validation
    data, evaluated after each epoch in evaluation mode with the same random numbers every time, or else the
    epoch's mean training loss. After ``patience`` epochs without an improvement by ``min_improvement`` the
    learning rate is multiplied by ``lr_factor``; training stops when it falls below ``min_lr``, or after
    ``num_epochs``.

    *Which parameters remain.* With validation data, those of the best epoch. Without, the last ones: epochs
    differ by less than the noise of their training loss. After Ctrl-C, those of the best epoch so far (the
    current ones if no epoch was completed). After a loss or gradient that is not finite, those of the best
    epoch so far (those at the start if none); the reason, a warning and the message name the first site at
    fault. Neither raises.

    *Checkpoints.* After each epoch the parameters, buffers, optimiser, schedule, random generators, data
    order, best parameters and history are written atomically. A run that finds its checkpoint continues after
    the last completed epoch; on a CPU the result is bit for bit that of a run that was never interrupted. The
    settings that decide the random numbers must be the same; ``num_epochs`` and ``patience`` may change.

    *Parameters* are found wherever they live: modules that the model and the guide are, or whose bound
    methods they are, and all ``pyro.param`` and ``pyro.module`` statements. Those that first appear in
    mid-training join the optimiser (but such a run cannot be resumed). Modules train in the mode they are in.

    *Losses per datum.* The loss of a batch is divided by its number of data, also of the smaller last one of
    an epoch, and the epoch's loss is the mean over data. Under inference compilation without data a joint
    sample is a datum. For a model that scales a subsampled plate to a full size by itself, give that size as
    ``data_size``.

    Args:
        model: A Pyro model, or a bound method of a module.
        guide: A guide for it.
        data: A tensor, a sequence or mapping of tensors (positional or keyword arguments of the model and the
            guide) with the data along the first dimension, or a ``DataLoader`` of such batches. ``None``
            under inference compilation, which draws its own, or for a model that holds its data: an epoch is
            then ``steps_per_epoch`` calls.
        loss: An ELBO object, an :class:`InferenceCompilation` object of this pair or that class itself (which
            then draws ``batch_size`` joint samples per step); ``Trace_ELBO()`` by default.
        optimizer: A function from a list of parameters to a torch optimiser
            (``functools.partial(torch.optim.Adam, lr=1e-2)``), a learning rate for Adam (1e-3 by default), a
            :class:`torch.optim.Optimizer`, or a :class:`pyro.optim.PyroOptim`, whose options per parameter
            are kept.
        batch_size: The number of data per step, if ``data`` holds tensors.
        num_epochs: The greatest number of epochs, those of resumed runs included.
        validation: Data like ``data``, never trained on; under inference compilation without data a number of
            batches.
        patience: The number of epochs without improvement before the rate falls; ``None`` keeps the rate.
        checkpoint: A file to write after every ``checkpoint_every`` epochs and at the end.
        resume: Whether to continue from that file if it exists; else it is overwritten.
        progress: Whether to show a bar.
        seed: Seed of all random numbers meanwhile; the global generators are put back afterwards. ``None``
            uses them as they are.
        model_kwargs: Keyword arguments of the model and the guide in every call.
        steps_per_epoch: The number of steps in an epoch without data.
        data_size: What a batch's loss is divided by, if not its number of data.
        max_grad_norm: Clip the norm of the gradient (per datum) to this.
        lr_factor: What the learning rate is multiplied by.
        min_lr: Stop when the learning rate falls below this.
        min_improvement: The least decrease of the monitored loss, in nats per datum, that counts.
        checkpoint_every: Write the checkpoint after this many epochs.
        on_epoch: Called with the history after each epoch; training stops if it returns something true.

    Returns:
        The history, with the reason of the end.

    Raises:
        GraphflowsError: If gradients are disabled, if the loss of the first batch is not finite before the first
            step, if there is nothing to train, if the data, the loss or the optimiser is not of these kinds, or the
            checkpoint belongs to another run.

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
        >>> history = fit(model, guide, x, num_epochs=20, optimizer=0.05, progress=False)
        >>> history.stop_reason, abs(pyro.param("slope").item() - 0.5) < 0.1
        ('all 20 epochs done', True)
    """
    if num_epochs < 0 or batch_size < 1 or steps_per_epoch < 1 or checkpoint_every < 1:
        raise GraphflowsError(
            "Expected num_epochs >= 0 and positive batch_size, steps_per_epoch and checkpoint_every; got "
            f"{num_epochs}, {batch_size}, {steps_per_epoch} and {checkpoint_every}."
        )
    if not torch.is_grad_enabled():
        raise GraphflowsError(
            "Expected gradients to be enabled; got a call under torch.no_grad() or inference mode, where nothing would "
            "be trained. Call fit outside of it."
        )
    with seeded(seed), warnings.catch_warnings():
        # Pyro warns of what is handled here: a loss that is not finite
        warnings.filterwarnings("ignore", message=r"Encountered (NaN|\+?-?inf)")
        trainer = Trainer(
            Objective(model, guide, loss, batch_size),
            Batches(data, batch_size, shuffle=True, seed=seed, steps=steps_per_epoch),
            None if validation is None else Batches(validation, batch_size),
            optimizer,
            model_kwargs=dict(model_kwargs or {}),
            data_size=data_size,
            max_grad_norm=max_grad_norm,
        )
        schedule = Plateau(trainer.optimizer, patience, lr_factor, min_lr, min_improvement)
        settings = {**trainer.settings(), "seed": seed}
        run = _Run(trainer, schedule, settings, checkpoint, checkpoint_every, on_epoch)
        if resume:
            run.resume()
        return run.train(num_epochs, progress)


class Plateau:
    """Multiply the learning rate by a factor when the loss has stopped falling; say when it is too small.

    Args:
        optimizer: The optimiser whose rates are set.
        patience: The number of epochs without improvement; ``None`` for never.
        factor: What the rates are multiplied by.
        min_lr: The rate below which training should stop.
        min_improvement: The least decrease that counts.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        patience: int | None,
        factor: float,
        min_lr: float,
        min_improvement: float,
    ) -> None:
        self.optimizer = optimizer
        self.patience = patience
        self.factor = factor
        self.min_lr = min_lr
        self.min_improvement = min_improvement
        self.reference = math.inf
        self.num_bad = 0

    @property
    def learning_rate(self) -> float:
        """The greatest rate of the optimiser's groups."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def update(self, loss: float) -> str | None:
        """Take note of an epoch's loss; return a reason to stop, if there is one."""
        if loss < self.reference - self.min_improvement:
            self.reference, self.num_bad = loss, 0
        else:
            self.num_bad += 1
        if self.patience is not None and self.num_bad >= self.patience:
            self.num_bad = 0
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * self.factor
        if self.patience is not None and self.learning_rate < self.min_lr * (1 - 1e-9):
            return f"the learning rate fell below {self.min_lr:g}"
        return None


class _Run:
    """The loop over epochs, with what it must remember."""

    def __init__(
        self,
        trainer: Trainer,
        schedule: Plateau,
        settings: dict[str, Any],
        checkpoint: str | os.PathLike[str] | None,
        checkpoint_every: int,
        on_epoch: Callable[[History], Any] | None,
    ) -> None:
        self.trainer = trainer
        self.schedule = schedule
        self.settings = settings
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every = checkpoint_every
        self.on_epoch = on_epoch
        self.history = History()
        self.start = trainer.parameters.state()
        self.best: dict[str, Tensor] | None = None
        self.finished = False  # no more epochs wanted, however many are allowed

    # ------------------------------------------------------------------------------------------------- epochs
    def train(self, num_epochs: int, progress: bool) -> History:
        """Run the epochs that are left; always leave usable parameters."""
        history, parameters = self.history, self.trainer.parameters
        total = max(0, num_epochs - len(history)) * len(self.trainer.batches)
        try:
            with tqdm(total=total or None, disable=not progress, unit="step", mininterval=0.5) as bar:
                while len(history) < num_epochs and not self.finished:
                    self._epoch(bar, num_epochs)
            if not self.finished:
                history.stop_reason = f"all {num_epochs} epochs done"
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
        return history

    def _epoch(self, bar: Any, num_epochs: int) -> None:
        history = self.history
        bar.set_description(f"epoch {len(history) + 1}/{num_epochs}", refresh=False)
        begin, rate = time.perf_counter(), self.schedule.learning_rate
        total, count, steps = 0.0, 0, 0
        for batch in self.trainer.batches:
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
        if history.best_epoch is None or monitored < history.monitored[history.best_epoch]:
            history.best_epoch = len(history) - 1
            self.best = self.trainer.parameters.state()
        bar.set_postfix_str(
            f"loss {loss:.4g}"
            + (f", validation {validation_loss:.4g}" if validation_loss is not None else "")
            + f", rate {rate:.1e}",
            refresh=False,
        )
        reason = self.schedule.update(monitored)
        if self.on_epoch is not None:
            state = random_state()  # what is computed there must not change the training
            if self.on_epoch(history):
                reason = reason or "on_epoch asked to stop"
            set_random_state(state)
        if reason is not None:
            history.stop_reason, self.finished = reason, True
        if self.checkpoint and (
            self.finished or len(history) % self.checkpoint_every == 0 or len(history) == num_epochs
        ):
            self._save()

    # -------------------------------------------------------------------------------------------- checkpoints
    def _save(self) -> None:
        assert self.checkpoint is not None
        state = {
            "settings": self.settings,
            "trainer": self.trainer.state(),
            "schedule": {"reference": self.schedule.reference, "num_bad": self.schedule.num_bad},
            "best": self.best,
            "finished": self.finished,
            "history": asdict(self.history),
        }
        save_checkpoint(state, self.checkpoint)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        state = load_checkpoint(self.checkpoint)
        differing = [key for key, value in self.settings.items() if state["settings"].get(key) != value]
        if differing:
            raise GraphflowsError(
                f"The checkpoint {str(self.checkpoint)!r} belongs to another run: {differing} differ. Give another "
                "file, or resume=False to start anew and overwrite it."
            )
        self.trainer.load(state["trainer"])
        self.schedule.reference = state["schedule"]["reference"]
        self.schedule.num_bad = state["schedule"]["num_bad"]
        self.best = state["best"]
        self.finished = state["finished"]
        self.history = History(**state["history"])
