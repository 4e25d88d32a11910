"""The loop over epochs: steps, validation, what is reported, checkpoints, and an orderly stop whatever happens."""

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.infer.averaging import RunningAverage
from pyro_graphflows.infer.batches import Batch
from pyro_graphflows.infer.checkpoints import (
    FIT_CHECKPOINT,
    Checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from pyro_graphflows.infer.history import History, Progress
from pyro_graphflows.infer.schedule import Pace, Schedule
from pyro_graphflows.infer.trainer import NotFiniteError, Trainer

__all__ = ["Run"]

logger = logging.getLogger(__name__)


class Run:
    """The loop over epochs, with what it must remember.

    Args:
        trainer: What takes steps.
        pace: What decides on rates, and when training ends.
        schedule: The greatest number of epochs, of steps and of seconds.
        checkpoint: Where the state is written.
        settings: What must be equal for one run to continue another, beside the settings of the trainer. ``stage`` is
            shown.
        progress: What is reported.
    """

    def __init__(
        self,
        trainer: Trainer,
        pace: Pace,
        schedule: Schedule,
        checkpoint: Checkpoint | None,
        settings: dict[str, Any],
        progress: Progress,
    ) -> None:
        self.trainer = trainer
        self.schedule = schedule
        self.pace = pace
        self.checkpoint = checkpoint
        self.progress = progress
        self.settings = {
            **trainer.settings(),
            **settings,
            "pace": type(pace).__name__,
            "steps_per_epoch": pace.steps_per_epoch,
            "averaged_epochs": schedule.averaged_epochs,
        }
        averages = schedule.averaged_epochs is not None
        self.average = RunningAverage(trainer.parameters) if averages else None
        self.history = History()
        self.start = trainer.parameters.state()
        self.best: dict[str, Tensor] | None = None
        self.finished = False  # no more epochs wanted, however many are allowed
        self.clock = 0.0

    # ------------------------------------------------------------------------------------------------- epochs
    def train(self) -> History:
        """Run the epochs that are left; always leave usable parameters."""
        history, parameters = self.history, self.trainer.parameters
        total, shown = self._steps_left(), self.progress.bar
        compiler = self.trainer.compiler
        try:
            with tqdm(
                total=total or None, disable=not shown or self.finished, unit="step", mininterval=0.5
            ) as bar:
                self.clock = time.perf_counter()
                while self._reason_of_end() is None and not self.finished:
                    if compiler is not None:
                        compiler.expect(self._steps_left() or math.inf, self._seconds_left())
                    try:
                        self._epoch(bar)
                    except NotFiniteError as error:
                        if not self.pace.recover():
                            raise
                        logger.info("Back to the best parameters, with a lower rate: %s.", error)
                    history.compilation = None if compiler is None else compiler.report
            if not self.finished:
                history.stop_reason = self._reason_of_end()
            if self.average is not None and self.average.number:
                self.average.leave()
            self._leave(self.best if history.validation_loss else None)
        except KeyboardInterrupt:
            history.stop_reason = "interrupted"
            self._leave(self.best)
        except NotFiniteError as error:
            history.stop_reason = f"not finite in epoch {len(history)}: {error}"
            self._leave(self.start if self.best is None else self.best)
            where = "the start" if self.best is None else f"epoch {history.best_epoch}"
            where = "the best cycle" if self.pace.judges else where
            warnings.warn(
                f"Training stopped: {error}. The parameters are those of {where}.",
                GraphflowsWarning,
                stacklevel=3,
            )
        history.compilation = None if compiler is None else compiler.report
        history.kept = self.pace.kept
        parameters.forget_gradients()
        logger.info("Training ended: %r", history)
        return history

    def _leave(self, parameters: dict[str, Tensor] | None) -> None:
        """Leave parameters, unless the pace decides which are to remain."""
        if self.pace.judges:
            self.pace.finish()
        elif parameters is not None:
            self.trainer.parameters.load(parameters)

    def _reason_of_end(self) -> str | None:
        schedule, history = self.schedule, self.history
        if schedule.num_epochs is not None and len(history) >= schedule.num_epochs:
            return f"all {schedule.num_epochs} epochs done"
        if schedule.num_steps is not None and history.num_steps >= schedule.num_steps:
            return f"all {schedule.num_steps} steps done"
        if (
            schedule.num_seconds is not None
            and history.seconds
            and history.seconds[-1] >= schedule.num_seconds
        ):
            return f"the {schedule.num_seconds:g} seconds are over"
        return None

    def _steps_left(self) -> int:
        """Return how many steps there are at most, as far as that is known; else 0."""
        per_pass = len(self.trainer.batches)
        left = math.inf
        if self.schedule.num_epochs is not None and per_pass:
            passes = max(1, -(-self.pace.steps_per_epoch // per_pass))
            left = max(0, self.schedule.num_epochs - len(self.history)) * passes * per_pass
        if self.schedule.num_steps is not None:
            left = min(left, max(0, self.schedule.num_steps - self.history.num_steps))
        return 0 if left == math.inf else int(left)

    def _seconds_left(self) -> float:
        """Return how many seconds there are at most, infinity where there is no limit."""
        limit, seconds = self.schedule.num_seconds, self.history.seconds
        return math.inf if limit is None else max(0.0, limit - (seconds[-1] if seconds else 0.0))

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches of an epoch: whole passes through the data, unless the number of steps ends."""
        count, limit, least = 0, self.schedule.num_steps, self.pace.steps_per_epoch
        while count < least:
            before = count
            for batch in self.trainer.batches:
                yield batch
                count += 1
                if limit is not None and self.history.num_steps + count >= limit:
                    return
                if self.pace.cuts_passes and count >= least:
                    return
            if count == before:
                raise GraphflowsError(
                    "Expected at least one batch of data in each pass; the iterable has none."
                )

    def _epoch(self, bar: Any) -> None:
        history, limit = self.history, self.schedule.num_epochs
        of = "" if limit is None else f"/{limit}"
        stage = "on simulations, " if self.settings.get("stage") == "simulations" else ""
        bar.set_description(f"{stage}epoch {len(history) + 1}{of}", refresh=False)
        rate = 0.0
        total, count, steps = 0.0, 0, 0
        for batch in self._batches():
            self.pace.before_step()
            rate = max(rate, self.pace.learning_rate)
            total += self.trainer.step(batch) * batch.size
            if self.average is not None:
                self.average.take(self._averaged_steps())
            count += batch.size
            steps += 1
            bar.update()
        loss = total / count
        with self._judged():
            validation_loss = self.trainer.validate()

        before = history.seconds[-1] if history.seconds else 0.0
        history.loss.append(loss)
        if validation_loss is not None:
            history.validation_loss.append(validation_loss)
        history.learning_rate.append(rate)
        now = time.perf_counter()
        history.seconds.append(before + now - self.clock)
        self.clock = now
        history.num_steps += steps
        monitored = loss if validation_loss is None else validation_loss
        logger.debug("Epoch %d: loss %.6g at rate %.1e, monitored %.6g.", len(history), loss, rate, monitored)
        if history.best_epoch is None or monitored < history.monitored[history.best_epoch]:
            history.best_epoch = len(history) - 1
            with self._judged():
                self.best = None if self.pace.judges else self.trainer.parameters.state()
        bar.set_postfix_str(
            f"loss {loss:.4g}"
            + (f", validation {validation_loss:.4g}" if validation_loss is not None else "")
            + f", rate {rate:.1e}",
            refresh=False,
        )
        reason = self.pace.after_epoch(monitored, history.seconds[-1])
        if self.progress.on_epoch is not None:
            state = random_state()  # what is computed there must not change the training
            with self._judged():
                if self.progress.on_epoch(history):
                    reason = reason or "on_epoch asked to stop"
            set_random_state(state)
        if reason is not None:
            history.stop_reason, self.finished = reason, True
        if self.checkpoint is not None:
            due = len(history) % self.checkpoint.every == 0
            if due or self.finished or self._reason_of_end() is not None:
                self._save(self.checkpoint)

    def _judged(self) -> AbstractContextManager[None]:
        """Let the parameters be those that are judged and kept: their averages, if there are some."""
        return nullcontext() if self.average is None else self.average.in_place()

    def _averaged_steps(self) -> float:
        """Return over how many steps parameters are averaged: the first epoch's length is not known before its end."""
        done = len(self.history)
        epochs = self.schedule.averaged_epochs or 0.0
        return epochs * self.history.num_steps / done if done else math.inf

    # -------------------------------------------------------------------------------------------- checkpoints
    def _save(self, checkpoint: Checkpoint) -> None:
        state = {
            "settings": self.settings,
            "trainer": self.trainer.state(),
            "pace": self.pace.state(),
            "best": self.best,
            "average": None if self.average is None else self.average.state(),
            "finished": self.finished,
            "history": asdict(self.history),
        }
        save_checkpoint(state, checkpoint.path)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one and that is wanted."""
        if self.checkpoint is None or not self.checkpoint.resume or not Path(self.checkpoint.path).exists():
            return
        state = load_checkpoint(self.checkpoint.path, *FIT_CHECKPOINT)
        differing = [key for key, value in self.settings.items() if state["settings"].get(key) != value]
        if differing:
            raise GraphflowsError(
                f"The checkpoint {str(self.checkpoint.path)!r} belongs to another run: {differing} differ. Give "
                "another file, or Checkpoint(path, resume=False) to start again and overwrite it."
            )
        self.trainer.load(state["trainer"])
        self.pace.load(state["pace"])
        self.best = state["best"]
        if self.average is not None:
            self.average.load(state["average"])
        self.finished = state["finished"]
        self.history = History.of(state["history"])
        logger.info("Continuing after epoch %d of %s.", len(self.history), self.checkpoint.path)
