"""What is reported of a training run, meanwhile and afterwards."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.gap import Gap

__all__ = ["History", "Progress"]


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
        simulated: The training on simulations of the model that came first, if there was one.
        gap: The estimated gap to the log-evidence at the end, where training was left to ``fit``.
        notes: What was left out, and why.
        kept: The epochs (from 0) whose steps led to the parameters that remain, where trials at other rates and cycles
            that made things worse were undone; ``None`` where every step counts.
        compilation: With ``fit(..., compile=...)``, what was compiled and how long that took, or why nothing was.
    """

    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_steps: int = 0
    best_epoch: int | None = None
    stop_reason: str | None = None
    simulated: "History | None" = None
    gap: Gap | None = None
    notes: list[str] = field(default_factory=list)
    kept: list[int] | None = None
    compilation: str | None = None

    @classmethod
    def of(cls, state: dict[str, Any]) -> "History":
        """Return the history whose fields, as a dictionary, these are."""
        earlier = state.get("simulated")
        return cls(**{**state, "simulated": None if earlier is None else cls.of(earlier)})

    def __len__(self) -> int:
        """Return the number of completed epochs."""
        return len(self.loss)

    @property
    def monitored(self) -> list[float]:
        """The losses that decide which epoch is best."""
        return self.validation_loss or self.loss

    def __repr__(self) -> str:
        """Return a line on the run, and what else there is to say; the lists are attributes."""
        lines = [self._line(), *(note for note in self.notes)]
        if self.simulated is not None:
            lines.append(f"before, on simulations of the model: {self.simulated._line()}")
        if self.gap is not None:
            lines.append(repr(self.gap))
        return "History(" + "\n        ".join(lines) + ")"

    def _line(self) -> str:
        if not self.loss:
            return f"no epoch completed; {self.stop_reason}"
        best = self.best_epoch or 0
        kind = "validation loss" if self.validation_loss else "loss"
        return (
            f"{len(self)} epochs, {self.num_steps} steps, {self.seconds[-1]:.3g} s; {kind} "
            f"{self.monitored[0]:.4g} -> {self.monitored[-1]:.4g}, best {self.monitored[best]:.4g} in epoch {best}; "
            f"{self.stop_reason}"
        )
