r"""Training to the end: epochs, a schedule, checkpoints, and an orderly stop whatever happens.

:func:`fit` minimises an ELBO or an :class:`InferenceCompilation` with one torch optimiser over *all*
parameters of the model and the guide, wherever they are kept (see
:class:`~pyro_graphflows.infer.parameters.ParameterSet`): Pyro's ``SVI`` would silently not train the weights
of a plain module, and an ELBO used as a module not those of ``pyro.param``. Everything is counted in nats per
datum, so that learning rates, clipping and figures mean the same for every batch size.

From top to bottom: the options of :func:`fit`, what it returns, :func:`fit` itself, the loop over epochs
(``_Run``), one gradient step and one validation (``_Trainer``), the optimiser.
"""

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
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
from pyro_graphflows.infer.objectives import Objective, SiteWatch
from pyro_graphflows.infer.parameters import ParameterSet
from pyro_graphflows.infer.particles import Program, evaluation_mode

__all__ = ["History", "NotFiniteError", "Progress", "Schedule", "fit"]

logger = logging.getLogger(__name__)

_VALIDATION_SEED = 20201  # the same random numbers for every epoch
_STEPS_WITHOUT_DATA = 100
_DECAY = {"lr_factor": 0.1, "min_lr": 1e-6, "min_improvement": 1e-4}


# ------------------------------------------------------------------------------------------------------- options
@dataclass(frozen=True)
class Schedule:
    """How long to train, when the learning rate falls, and how large a step may be.

    After ``patience`` epochs in which the monitored loss has not fallen by ``min_improvement`` the learning rate is
    multiplied by ``lr_factor``. Training ends when the rate falls below ``min_lr``, after ``num_epochs`` or after
    ``num_steps``, whichever comes first. ``fit(..., schedule=20)`` is short for ``Schedule(20)``.

    Args:
        num_epochs: The greatest number of epochs, those of resumed runs included.
        num_steps: The greatest number of gradient steps, those of resumed runs included; the last epoch may be cut
            short by it.
        steps_per_epoch: The least number of steps in an epoch, which then walks through the data more than once if
            need be. By default once; 100 steps without data. Few data at once make short epochs, whose losses are
            noisy: give a greater number there for ``patience`` to be of use.
        patience: The number of epochs without improvement before the rate falls; ``None`` keeps the rate.
        lr_factor: What the learning rate is multiplied by.
        min_lr: Stop when the learning rate falls below this.
        min_improvement: The least decrease of the monitored loss, in nats per datum, that counts.
        max_grad_norm: Clip the norm of the gradient (per datum) to this.

    Raises:
        GraphflowsError: If a number is out of range, nothing ends the training, or an option has no effect.

    Example:
        >>> Schedule(num_steps=2000, patience=None)
        Schedule(num_epochs=None, num_steps=2000, patience=None)
    """

    num_epochs: int | None = None
    num_steps: int | None = field(default=None, kw_only=True)
    steps_per_epoch: int | None = field(default=None, kw_only=True)
    patience: int | None = field(default=10, kw_only=True)
    lr_factor: float = field(default=_DECAY["lr_factor"], kw_only=True)
    min_lr: float = field(default=_DECAY["min_lr"], kw_only=True)
    min_improvement: float = field(default=_DECAY["min_improvement"], kw_only=True)
    max_grad_norm: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, least in (("num_epochs", 0), ("num_steps", 0), ("steps_per_epoch", 1), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise GraphflowsError(f"Expected {name} >= {least}; got {value!r}.")
        if not (0 < self.lr_factor < 1 and self.min_lr >= 0 and self.min_improvement >= 0):
            raise GraphflowsError(
                "Expected lr_factor between 0 and 1 and min_lr and min_improvement not negative; got "
                f"{self.lr_factor}, {self.min_lr} and {self.min_improvement}."
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise GraphflowsError(f"Expected a positive max_grad_norm; got {self.max_grad_norm}.")
        if self.patience is None:
            idle = [name for name, value in _DECAY.items() if getattr(self, name) != value]
            if idle:
                raise GraphflowsError(
                    f"Expected patience for the rate to fall; with patience=None {', '.join(idle)} would have no "
                    "effect."
                )
            if self.num_epochs is None and self.num_steps is None:
                raise GraphflowsError(
                    "Expected num_epochs, num_steps or patience; nothing would end the training."
                )

    @classmethod
    def of(cls, schedule: "Schedule | int") -> "Schedule":
        """Return ``schedule``, or that of a number of epochs."""
        if isinstance(schedule, cls):
            return schedule
        if isinstance(schedule, int) and not isinstance(schedule, bool):
            return cls(schedule)
        raise GraphflowsError(f"Expected schedule to be a number of epochs or a Schedule; got {schedule!r}.")

    def __repr__(self) -> str:
        return _repr_of_changes(self, "num_epochs")


@dataclass(frozen=True)
class Progress:
    """What is reported while :func:`fit` trains.

    ``fit(..., progress=False)`` is short for ``Progress(bar=False)``.

    Args:
        bar: Whether to show a bar.
        on_epoch: Called with the :class:`History` after each epoch; training stops if it returns something true.
            Random numbers drawn there do not change the training.

    Raises:
        GraphflowsError: If ``on_epoch`` cannot be called.
    """

    bar: bool = field(default=True, kw_only=True)
    on_epoch: "Callable[[History], Any] | None" = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.on_epoch is not None and not callable(self.on_epoch):
            raise GraphflowsError(
                f"Expected on_epoch to be a function of the history; got {self.on_epoch!r}."
            )

    @classmethod
    def of(cls, progress: "Progress | bool") -> "Progress":
        """Return ``progress``, or one with or without a bar."""
        if isinstance(progress, cls):
            return progress
        if isinstance(progress, bool):
            return cls(bar=progress)
        raise GraphflowsError(
            f"Expected progress to be True, False or a Progress; got {progress!r}. A function to call after each epoch "
            "is Progress(on_epoch=function)."
        )


def _repr_of_changes(options: Any, *always: str) -> str:
    """Return the repr of a dataclass without what has its default."""
    fields = type(options).__dataclass_fields__
    shown = [
        f"{name}={getattr(options, name)!r}"
        for name, entry in fields.items()
        if name in always or getattr(options, name) != entry.default
    ]
    return f"{type(options).__name__}({', '.join(shown)})"


# --------------------------------------------------------------------------------------------------- the history
@dataclass(repr=False)
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

    def __repr__(self) -> str:
        """Return a line on the run; the lists are attributes."""
        if not self.loss:
            return f"History(no epoch completed; {self.stop_reason})"
        best = self.best_epoch or 0
        kind = "validation loss" if self.validation_loss else "loss"
        return (
            f"History({len(self)} epochs, {self.num_steps} steps, {self.seconds[-1]:.3g} s; {kind} "
            f"{self.monitored[0]:.4g} -> {self.monitored[-1]:.4g}, best {self.monitored[best]:.4g} in epoch {best}; "
            f"{self.stop_reason})"
        )


# ------------------------------------------------------------------------------------------------------- training
def fit(
    model: Program,
    guide: Program,
    data: Any = None,
    *,
    loss: Any = None,
    optimizer: Any = 1e-3,
    schedule: Schedule | int,
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
        loss: An ELBO object, an :class:`InferenceCompilation` object of this pair, or that class itself for one
            with its defaults; ``Trace_ELBO()`` by default.
        optimizer: A learning rate for Adam (in torch's fused form, where there is one), a function from a list of
            parameters to a torch optimiser
            (``torch.optim.AdamW``, ``functools.partial(torch.optim.Adam, lr=1e-2)``), a
            :class:`torch.optim.Optimizer`, or a :class:`pyro.optim.PyroOptim`, whose options per parameter
            are kept. One torch optimiser holds all parameters in every case.
        schedule: A number of epochs, or a :class:`Schedule`.
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
    data, schedule, progress = TrainingData.of(data), Schedule.of(schedule), Progress.of(progress)
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
        trainer = _Trainer(Objective(model, guide, loss), data, optimizer, schedule.max_grad_norm, seed)
        run = _Run(trainer, schedule, checkpoint, {**trainer.settings(), "seed": seed}, progress)
        run.resume()
        return run.train()


class _Plateau:
    """Multiply the learning rate by a factor when the loss has stopped falling; say when it is too small.

    Args:
        optimizer: The optimiser whose rates are set.
        schedule: When and by how much.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.reference = math.inf
        self.num_bad = 0

    @property
    def learning_rate(self) -> float:
        """The greatest rate of the optimiser's groups."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def update(self, loss: float) -> str | None:
        """Take note of an epoch's loss; return a reason to stop, if there is one."""
        schedule = self.schedule
        if loss < self.reference - schedule.min_improvement:
            self.reference, self.num_bad = loss, 0
        else:
            self.num_bad += 1
        if schedule.patience is None:
            return None
        if self.num_bad >= schedule.patience:
            self.num_bad = 0
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * schedule.lr_factor
        if self.learning_rate < schedule.min_lr * (1 - 1e-9):
            return f"the learning rate fell below {schedule.min_lr:g}"
        return None


class _Run:
    """The loop over epochs, with what it must remember."""

    def __init__(
        self,
        trainer: "_Trainer",
        schedule: Schedule,
        checkpoint: Checkpoint | None,
        settings: dict[str, Any],
        progress: Progress,
    ) -> None:
        self.trainer = trainer
        self.schedule = schedule
        self.plateau = _Plateau(trainer.optimizer, schedule)
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


class NotFiniteError(GraphflowsError):
    """A loss or gradient is not finite; the message says where it began."""


class _Trainer:
    """One gradient step, one validation, and the state they depend on.

    It refuses to step on a loss or a gradient that is not finite, and says which site is the first to blame. The first
    batch is run in evaluation mode, once without gradients and once with, and without moving the random generators:
    that creates lazy parameters, shows the sites and which parameters are in use.

    Args:
        objective: The loss with its model and guide.
        data: The data.
        optimizer: What :func:`make_optimizer` takes.
        max_grad_norm: Clip the gradient's norm to this.
        seed: The seed of the order of the data.

    Raises:
        GraphflowsError: If there is nothing to train.
        NotFiniteError: If the loss of the first batch is not finite.
    """

    def __init__(
        self,
        objective: Objective,
        data: TrainingData,
        optimizer: Any,
        max_grad_norm: float | None,
        seed: int | None,
    ) -> None:
        self.objective = objective
        self.data = data
        self.batches = data.batches(seed)
        self.held_out = data.held_out()
        self.max_grad_norm = max_grad_norm

        self.parameters = ParameterSet(model=objective.model, guide=objective.guide)
        batch = self.batches.first()
        watch = self._explore(batch)
        if not self.parameters.trainable:
            raise GraphflowsError(
                "Expected the model or the guide to have parameters; there is nothing to train."
            )
        if not objective.compiles and data.full_size is None and batch.size < (self.batches.num_data or 0):
            _warn_of_globals(watch, batch.size)
        self.optimizer = make_optimizer(optimizer, self.parameters)
        self._in_optimizer = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self._grows = not isinstance(optimizer, torch.optim.Optimizer)

    def step(self, batch: Batch) -> float:
        """Take a gradient step.

        Args:
            batch: The data.

        Returns:
            The loss before the step in nats per datum.

        Raises:
            NotFiniteError: If the loss or the gradient is not finite; no step is taken.
        """
        self.parameters.forget_gradients()
        state = random_state()
        size = self.data.full_size or batch.size
        try:
            with poutine.trace(param_only=True) as capture:
                loss = self.objective.add_gradients(
                    size, batch.args, self._kwargs(batch), self.parameters.parameters.values
                )
        except (ValueError, RuntimeError) as error:  # a distribution may refuse what is not finite
            guilty = self._first_not_finite(batch, state)
            if guilty is None:
                raise
            raise NotFiniteError(f"{guilty} is not finite") from error
        self._adopt(self.parameters.adopt(capture.trace))
        if not math.isfinite(loss):
            guilty = self._first_not_finite(batch, state)
            raise NotFiniteError(f"the loss is {loss}" + ("" if guilty is None else f"; first {guilty}"))
        gradients = {name: p.grad for name, p in self.parameters.parameters.items() if p.grad is not None}
        if gradients:
            norms = torch.stack(
                [torch.linalg.vector_norm(gradient).float() for gradient in gradients.values()]
            )
            norm = torch.linalg.vector_norm(norms).item()
            if not math.isfinite(norm):
                bad = sorted(name for name, value in gradients.items() if not value.isfinite().all())
                raise NotFiniteError(
                    f"the loss is finite, but not the gradient of {bad[:5]}"
                    if bad
                    else f"the loss is finite ({loss:.3g}), but the norm of the gradient is too large to compute"
                )
            if self.max_grad_norm is not None and norm > self.max_grad_norm:
                for gradient in gradients.values():
                    gradient *= self.max_grad_norm / norm
        self.optimizer.step()
        return loss

    def validate(self) -> float | None:
        """Return the validation loss in nats per datum, or ``None`` without validation data.

        Raises:
            NotFiniteError: If it is not finite.
        """
        if self.held_out is None:
            return None
        total, count = 0.0, 0
        with evaluation_mode(self.objective.model, self.objective.guide), seeded(_VALIDATION_SEED):
            for batch in self.held_out:
                loss = self._evaluate(batch, "in validation")
                total += loss / (self.data.full_size or batch.size) * batch.size
                count += batch.size
        return total / count

    # -------------------------------------------------------------------------------------------------- state
    def settings(self) -> dict[str, Any]:
        """Return what must be equal for one run to continue another."""
        return {
            "loss": type(self.objective.estimator).__name__,
            "optimizer": type(self.optimizer).__name__,
            "batch_size": self.batches.batch_size,
            "num_batches": len(self.batches),
            "num_data": self.batches.num_data,
            "validation": None if self.held_out is None else [len(self.held_out), self.held_out.num_data],
            "full_size": self.data.full_size,
            "max_grad_norm": self.max_grad_norm,
            "parameters": {name: list(p.shape) for name, p in self.parameters.parameters.items()},
        }

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {
            "parameters": self.parameters.state(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(),
            "order": self.batches.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.parameters.load(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load(state["order"])
        set_random_state(state["random"])

    # -------------------------------------------------------------------------------------------------- parts
    def _explore(self, batch: Batch) -> SiteWatch:
        """Run a batch once without gradients, for lazy parameters and sites, and once with, to see which are used."""
        state, kwargs = random_state(), self._kwargs(batch)
        with evaluation_mode(self.objective.model, self.objective.guide):
            with self.objective.watched(check=False) as watch, poutine.trace(param_only=True) as capture:
                self._evaluate(batch, "before the first step")
            self.parameters.refresh()
            self.parameters.forget_gradients(capture.trace)
            set_random_state(state)
            with poutine.trace(param_only=True) as capture:
                self.objective.add_gradients(1.0, batch.args, kwargs, dict)
        set_random_state(state)
        self.parameters.adopt(capture.trace)
        return watch

    def _evaluate(self, batch: Batch, when: str) -> float:
        """Return the loss of a batch without gradients; raise if it is not finite."""
        state = random_state()
        try:
            loss = self.objective.evaluate(batch.args, self._kwargs(batch))
        except (ValueError, RuntimeError) as error:  # a distribution may refuse what is not finite
            guilty = self._first_not_finite(batch, state)
            if guilty is None:
                raise
            raise NotFiniteError(f"{when}, {guilty} is not finite") from error
        if not math.isfinite(loss):
            guilty = self._first_not_finite(batch, state)
            raise NotFiniteError(
                f"{when}, the loss is {loss}" + ("" if guilty is None else f"; first {guilty}")
            )
        return loss

    def _kwargs(self, batch: Batch) -> dict[str, Any]:
        return {**(self.data.kwargs or {}), **batch.kwargs}

    def _adopt(self, names: list[str]) -> None:
        """Let parameters that first appeared in this step join the optimiser."""
        new = [self.parameters.parameters[name] for name in names]
        new = [p for p in new if p.requires_grad and id(p) not in self._in_optimizer]
        if new and self._grows:
            self.optimizer.add_param_group({"params": new})
            self._in_optimizer.update(map(id, new))

    def _first_not_finite(self, batch: Batch, state: dict[str, Any]) -> str | None:
        """Run the loss once more with the same random numbers; return the first site that is not finite."""
        now = random_state()
        set_random_state(state)
        try:
            guilty = self.objective.first_not_finite(batch.args, self._kwargs(batch))
        finally:
            set_random_state(now)
        given = (value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, torch.Tensor))
        bad = sum(int((~value.isfinite()).sum()) for value in given)
        if guilty and bad:
            guilty = f"{guilty.removesuffix(')')}; {bad} of the data)"
        return guilty


def make_optimizer(optimizer: Any, parameters: ParameterSet) -> torch.optim.Optimizer:
    """Return a torch optimiser over the trainable parameters.

    Args:
        optimizer: A rate for Adam, a torch optimiser (returned as it is), a
            :class:`pyro.optim.PyroOptim`, or a function from a list of parameters to a torch optimiser.
        parameters: The parameters.

    Returns:
        The optimiser.

    Raises:
        GraphflowsError: If it is none of these, or a PyroOptim that schedules or clips by itself.
    """
    trainable = parameters.trainable
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if isinstance(optimizer, int | float):
        return torch.optim.Adam(
            list(trainable.values()), lr=float(optimizer), fused=_can_fuse(trainable.values())
        )
    if isinstance(optimizer, PyroOptim):
        if isinstance(optimizer, PyroLRScheduler) or optimizer.pt_clip_args:
            raise GraphflowsError(
                "Expected a PyroOptim without schedule and without clip_args; fit schedules the rate itself "
                "(Schedule: patience, lr_factor) and clips all gradients together (max_grad_norm)."
            )
        options: Callable[..., Any] | dict[str, Any] = optimizer.pt_optim_args
        constructor: Any = optimizer.pt_optim_constructor
        if not callable(options):
            return constructor(list(trainable.values()), **options)
        groups = [{"params": [p], **options(parameters.store_name(name))} for name, p in trainable.items()]
        return constructor(groups)
    made = optimizer(list(trainable.values())) if callable(optimizer) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise GraphflowsError(
            "Expected optimizer to be a learning rate, a torch or Pyro optimiser, or a function from parameters to a "
            f"torch optimiser; got {optimizer!r}."
        )
    return made


def _can_fuse(parameters: Iterable[Tensor]) -> bool | None:
    """Return True where torch has Adam's step as one kernel, several times cheaper, for these parameters; else None."""
    devices = {"cuda", "cpu"} if torch.__version__ >= "2.4" else {"cuda"}
    return all(p.is_floating_point() and p.device.type in devices for p in parameters) or None


def _warn_of_globals(watch: SiteWatch, size: int) -> None:
    """Warn where a global latent site meets batches that stand for themselves only."""
    in_batch = any(
        observed and any(frame.size == size == (frame.full_size or size) for frame in frames)
        for observed, frames in watch.sites.values()
    )
    outside = sorted(name for name, (observed, frames) in watch.sites.items() if not observed and not frames)
    if in_batch and outside:
        warnings.warn(
            f"The latent sites {outside} are global, but the model sees each batch of {size} data as all there is: "
            "their prior is counted once per batch. Train on all data at once, or let the model's plate have the full "
            "size with the batch as its subsample and give TrainingData(..., full_size=...).",
            GraphflowsWarning,
            stacklevel=4,
        )
