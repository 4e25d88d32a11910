"""Training that is left to :func:`~pyro_graphflows.infer.fit`: on simulations, then on the data, until it is good.

Rates and lengths are those of :mod:`~pyro_graphflows.infer.cycles`; what a guide can learn from simulations is found
by :mod:`~pyro_graphflows.infer.simulated_start`. Training on simulations is undone if it made the loss on the data
worse. At the end the gap to the log-evidence is estimated.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from tqdm.auto import tqdm

from pyro_graphflows.errors import GraphflowsError, reason_of
from pyro_graphflows.infer.batches import TrainingData
from pyro_graphflows.infer.checkpoints import FIT_CHECKPOINT, Checkpoint, load_checkpoint, seeded
from pyro_graphflows.infer.compiled import Mode
from pyro_graphflows.infer.cycles import CycleOptions, Cycles, tell_apart
from pyro_graphflows.infer.epochs import Run
from pyro_graphflows.infer.gap import Gap, estimate_gap
from pyro_graphflows.infer.history import History, Progress
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.objectives import Objective
from pyro_graphflows.infer.particles import Program
from pyro_graphflows.infer.schedule import Schedule
from pyro_graphflows.infer.simulated_start import simulation_loss
from pyro_graphflows.infer.trainer import NotFiniteError, Trainer

__all__ = ["Automatic", "limits_of"]

RATE = 1e-2  # of Adam: the middle one of those that are tried
SHARE = 1 / 3  # of the limits, for simulations
LONGEST_ON_SIMULATIONS = 16
GAP_SEED = 20202
_DRAWS, _DRAWS_AT_THE_END = 200, 1000
_JUDGE_OF_SIMULATIONS = 10**6  # the first replicate
_LIMITS = ("num_epochs", "num_steps", "num_seconds", "max_grad_norm")


def limits_of(schedule: Schedule | int | None) -> Schedule:
    """Return the limits of training whose schedule is found by itself.

    Raises:
        GraphflowsError: If the schedule says more than limits.
    """
    limits = Schedule() if schedule is None else Schedule.of(schedule)
    allowed = Schedule(**{name: getattr(limits, name) for name in _LIMITS})
    if limits != allowed:
        raise GraphflowsError(
            f"Expected a schedule of {', '.join(_LIMITS)} with loss='auto', which chooses all else; got {limits!r}."
        )
    return limits


@dataclass
class Automatic:
    """One such training.

    Args:
        model: The model.
        guide: The guide.
        data: The data.
        limits: The greatest numbers of epochs, steps and seconds.
        optimizer: What :func:`~pyro_graphflows.infer.fit` takes; ``None`` for Adam at a rate that is found.
        seed: The seed of the order of the data.
        compile: Whether steps are computed by compiled code.
    """

    model: Program
    guide: Program
    data: TrainingData
    limits: Schedule
    optimizer: Any
    seed: int | None
    compile: Mode = False
    _no_gap: str | None = None
    _rate: float | None = None  # that served on the simulations

    def fit(
        self, loss: Any, checkpoint: Checkpoint | None, progress: Progress, *, on_simulations: bool
    ) -> History:
        """Train.

        Args:
            loss: The loss on the data, as :func:`~pyro_graphflows.infer.fit` takes it.
            checkpoint: Where the state is written.
            progress: What is reported.
            on_simulations: Whether to begin with simulations of the model.
        """
        trainer = self._trainer(loss, self.compile)
        self.data = trainer.data
        simulated, notes = None, []
        earlier = _past_simulations(checkpoint)
        if earlier is not None:
            simulated = earlier.simulated
        elif on_simulations and not trainer.objective.compiles:
            simulated, note = self._on_simulations(trainer, checkpoint, progress)
            notes = [] if note is None else [note]
            if simulated is not None and simulated.stop_reason in ("interrupted", "on_epoch asked to stop"):
                return History(stop_reason=simulated.stop_reason, simulated=simulated)
        if self.seed is not None:
            pyro.set_rng_seed(self.seed)
        limits = self.limits
        if simulated is not None and limits.num_seconds is not None:
            limits = replace(limits, num_seconds=max(1e-3, limits.num_seconds - simulated.seconds[-1]))
        if simulated is not None and limits.num_steps is not None:
            limits = replace(limits, num_steps=max(0, limits.num_steps - simulated.num_steps))
        wants_gap = not trainer.objective.compiles
        gap = self._gap(_DRAWS) if wants_gap else None
        joint = self.data.full_size is not None if gap is None else not gap.num_data
        size = (self.data.full_size or trainer.batches.first().size) if joint else 1
        pace = Cycles(
            trainer,
            self._options(CycleOptions()),
            limits,
            # of a model that is learned itself it says nothing: the evidence moves
            None if gap is None or trainer.learns_model else lambda: self._gap(_DRAWS),
            size,
        )
        run = Run(trainer, pace, limits, checkpoint, {"seed": self.seed, "stage": "data"}, progress)
        run.history.simulated, run.history.notes = simulated, notes
        if pace.reason is not None:
            run.history.stop_reason, run.finished = pace.reason, True
        if (
            simulated is None or earlier is not None
        ):  # otherwise the file, if there is one, is of the simulations
            run.resume()
        history = run.train()
        if wants_gap:
            history.gap = self._gap(_DRAWS_AT_THE_END)
            if history.gap is None:
                history.notes.append(f"no gap is estimated: {self._no_gap}")
        if progress.bar:
            tqdm.write("\n".join([*history.notes, repr(history.gap)]), file=sys.stderr)
        return history

    def _trainer(self, loss: Any, compile: Mode = False) -> Trainer:
        optimizer = RATE if self.optimizer is None else self.optimizer
        objective = Objective(self.model, self.guide, loss)
        return Trainer(objective, self.data, optimizer, self.limits.max_grad_norm, self.seed, compile)

    def _options(self, options: CycleOptions) -> CycleOptions:
        if self.optimizer is not None:
            return replace(options, rates=(1.0,))
        return options if self._rate is None else replace(options, rates=(self._rate,))

    def _on_simulations(
        self, trainer: Trainer, checkpoint: Checkpoint | None, progress: Progress
    ) -> tuple[History | None, str | None]:
        """Train on simulations; return what happened, and why not or why it was undone, if that is so."""
        if isinstance(self.optimizer, torch.optim.Optimizer):
            return None, "no training on simulations: the optimiser given is for the data"
        loss = simulation_loss(self.model, self.guide, trainer.batches.first(), dict(self.data.kwargs or {}))
        if not isinstance(loss, InferenceCompilation):
            return None, f"no training on simulations: {loss}"
        start = trainer.parameters.state()
        limits = self.limits
        if limits.num_seconds is not None:
            limits = replace(limits, num_seconds=SHARE * limits.num_seconds)
        if limits.num_steps is not None:
            limits = replace(limits, num_steps=int(SHARE * limits.num_steps))
        try:
            simulator = self._trainer(loss, self.compile)
            options = self._options(replace(CycleOptions(), longest=LONGEST_ON_SIMULATIONS))
            pace = Cycles(simulator, options, limits)
        except NotFiniteError as error:
            return None, f"no training on simulations: {reason_of(error)}"
        run = Run(simulator, pace, limits, checkpoint, {"seed": self.seed, "stage": "simulations"}, progress)
        run.resume()
        history = run.train()
        self._rate = pace.position.rate if self.optimizer is None and history.loss else None
        worse = bool(tell_apart(trainer, start, first=_JUDGE_OF_SIMULATIONS).mean() > 0)
        if worse:
            trainer.parameters.load(start)
            self._rate = None
            return history, "training on simulations did not lower the loss on the data, and was undone"
        return history, None

    def _gap(self, num_draws: int) -> Gap | None:
        with seeded(GAP_SEED):
            gap = estimate_gap(self.model, self.guide, self.data, num_draws)
        if isinstance(gap, Gap):
            return gap
        self._no_gap = reason_of(gap)
        return None


def _past_simulations(checkpoint: Checkpoint | None) -> History | None:
    """Return the history in a checkpoint that will be continued, if it is past the simulations."""
    if checkpoint is None or not checkpoint.resume or not Path(checkpoint.path).exists():
        return None
    state = load_checkpoint(checkpoint.path, *FIT_CHECKPOINT)
    return History.of(state["history"]) if state["settings"].get("stage") == "data" else None
