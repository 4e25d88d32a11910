"""How long to train, and when the learning rate falls: a schedule that is given, and the pace it sets."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pyro_graphflows.errors import GraphflowsError

__all__ = ["Pace", "Plateau", "Schedule"]

_DECAY = {"lr_factor": 0.1, "min_lr": 1e-6, "min_improvement": 1e-4}


@dataclass(frozen=True)
class Schedule:
    """How long to train, when the learning rate falls, and how large a step may be.

    After ``patience`` epochs in which the monitored loss has not fallen by ``min_improvement`` the learning rate is
    multiplied by ``lr_factor``. Training ends when the rate falls below ``min_lr``, after ``num_epochs``,
    ``num_steps`` or ``num_seconds``, whichever comes first. ``fit(..., schedule=20)`` is short for ``Schedule(20)``.

    Args:
        num_epochs: The greatest number of epochs, those of resumed runs included.
        num_steps: The greatest number of gradient steps, those of resumed runs included; the last epoch may be cut
            short by it.
        num_seconds: The time after which no further epoch begins, that of resumed runs included.
        steps_per_epoch: The least number of steps in an epoch, which then walks through the data more than once if
            need be. By default once; 100 steps without data and under inference compilation.
        patience: The number of epochs without improvement before the rate falls; ``None`` keeps the rate. The loss of
            a few steps is noise to whatever watches it: of shorter epochs, so many count as one that they have 100
            steps together, unless ``steps_per_epoch`` says otherwise or validation data are monitored.
        lr_factor: What the learning rate is multiplied by.
        min_lr: Stop when the learning rate falls below this.
        min_improvement: The least decrease of the monitored loss, in nats per datum, that counts.
        max_grad_norm: Clip the norm of the gradient (per datum) to this.
        averaged_epochs: Judge and keep running averages of the parameters over the steps of about so many epochs
            (:mod:`~pyro_graphflows.infer.averaging`); ``None`` for the parameters themselves.

    Raises:
        GraphflowsError: If a number is out of range, nothing ends the training, or an option has no effect.

    Example:
        >>> Schedule(num_steps=2000, patience=None)
        Schedule(num_epochs=None, num_steps=2000, patience=None)
    """

    num_epochs: int | None = None
    num_steps: int | None = field(default=None, kw_only=True)
    num_seconds: float | None = field(default=None, kw_only=True)
    steps_per_epoch: int | None = field(default=None, kw_only=True)
    patience: int | None = field(default=10, kw_only=True)
    lr_factor: float = field(default=_DECAY["lr_factor"], kw_only=True)
    min_lr: float = field(default=_DECAY["min_lr"], kw_only=True)
    min_improvement: float = field(default=_DECAY["min_improvement"], kw_only=True)
    max_grad_norm: float | None = field(default=None, kw_only=True)
    averaged_epochs: float | None = field(default=None, kw_only=True)

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
        if self.num_seconds is not None and not self.num_seconds > 0:
            raise GraphflowsError(f"Expected a positive num_seconds; got {self.num_seconds!r}.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise GraphflowsError(f"Expected a positive max_grad_norm; got {self.max_grad_norm}.")
        if self.averaged_epochs is not None and not 0 < self.averaged_epochs < math.inf:
            raise GraphflowsError(
                f"Expected a positive, finite averaged_epochs; got {self.averaged_epochs!r}."
            )
        if self.patience is None:
            idle = [name for name, value in _DECAY.items() if getattr(self, name) != value]
            if idle:
                raise GraphflowsError(
                    f"Expected patience for the rate to fall; with patience=None {', '.join(idle)} would have no "
                    "effect."
                )
            if self.num_epochs is None and self.num_steps is None and self.num_seconds is None:
                raise GraphflowsError(
                    "Expected num_epochs, num_steps, num_seconds or patience; nothing would end the training."
                )

    @classmethod
    def of(cls, schedule: "Schedule | int | None") -> "Schedule":
        """Return ``schedule``, or that of a number of epochs."""
        if isinstance(schedule, cls):
            return schedule
        if isinstance(schedule, int) and not isinstance(schedule, bool):
            return cls(schedule)
        raise GraphflowsError(f"Expected schedule to be a number of epochs or a Schedule; got {schedule!r}.")

    def __repr__(self) -> str:
        fields = type(self).__dataclass_fields__
        shown = [
            f"{name}={getattr(self, name)!r}"
            for name, entry in fields.items()
            if name == "num_epochs" or getattr(self, name) != entry.default
        ]
        return f"Schedule({', '.join(shown)})"


class Pace(Protocol):
    """What decides on rates, and when training ends; :func:`~pyro_graphflows.infer.fit` asks it as it goes."""

    @property
    def judges(self) -> bool:
        """Whether it decides which parameters remain."""

    @property
    def learning_rate(self) -> float:
        """The rate of now."""

    @property
    def steps_per_epoch(self) -> int:
        """The least number of steps in an epoch."""

    @property
    def cuts_passes(self) -> bool:
        """Whether an epoch ends after that number of steps, in the middle of the data."""

    @property
    def kept(self) -> list[int] | None:
        """The epochs (from 0) that led to the parameters of now; ``None`` where all did."""

    def before_step(self) -> None:
        """Set the rate of a step."""

    def after_epoch(self, loss: float, seconds: float) -> str | None:
        """Take note of an epoch's loss and of the time so far; return a reason to stop, if there is one."""

    def recover(self) -> bool:
        """Return to usable parameters after something was not finite; return whether to go on."""

    def finish(self) -> None:
        """Leave the parameters that are to remain."""

    def state(self) -> dict[str, Any]:
        """Return everything that later decisions depend on."""

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""


class Plateau:
    """Multiply the learning rate by a factor when the loss has stopped falling; say when it is too small.

    Args:
        optimizer: The optimiser whose rates are set.
        schedule: When and by how much.
        steps_per_epoch: The least number of steps in an epoch, where the schedule does not say.
        steps_judged: The least number of steps whose mean loss is looked at, where the schedule does not say: shorter
            epochs are looked at together.
    """

    judges = False
    cuts_passes = False
    kept = None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        steps_per_epoch: int = 1,
        steps_judged: int = 1,
    ) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.steps_per_epoch = schedule.steps_per_epoch or steps_per_epoch
        self.steps_judged = 1 if schedule.steps_per_epoch else steps_judged
        self.reference = math.inf
        self.num_bad = 0
        self.steps = 0  # of this epoch
        self.seen, self.total = 0, 0.0  # steps that are not looked at yet, and the sum of their losses

    @property
    def learning_rate(self) -> float:
        """The greatest rate of the optimiser's groups."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def before_step(self) -> None:
        """Leave the rate as it is, and count the step."""
        self.steps += 1

    def after_epoch(self, loss: float, seconds: float) -> str | None:
        """Take note of an epoch's loss; return a reason to stop, if there is one."""
        schedule = self.schedule
        self.seen, self.total, self.steps = self.seen + self.steps, self.total + self.steps * loss, 0
        if self.seen < self.steps_judged:
            return None
        if self.seen:
            loss = self.total / self.seen
        self.seen, self.total = 0, 0.0
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

    def recover(self) -> bool:
        """End the training."""
        return False

    def finish(self) -> None:
        """Leave the parameters as they are."""

    def state(self) -> dict[str, Any]:
        """Return the best loss so far, the epochs without improvement, and what is not looked at yet."""
        return {"reference": self.reference, "num_bad": self.num_bad, "seen": self.seen, "total": self.total}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.reference, self.num_bad = state["reference"], state["num_bad"]
        self.seen, self.total = state.get("seen", 0), state.get("total", 0.0)  # older ones have none
