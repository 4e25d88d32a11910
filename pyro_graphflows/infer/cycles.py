"""Rates and lengths of training that nobody has to choose.

Training goes in *cycles*, in each of which the learning rate falls from its greatest value to nearly zero along half a
cosine, so that every cycle ends with settled parameters. First there is a short cycle at each of three rates from the
same start; the best goes on with cycles that are twice as long each time. What is best is judged by the losses of the
same batches with the same random numbers, so that differences of a fraction of the noise of one loss can be seen, by
more of them where the difference is not clear, and by new ones each time: what was chosen for its luck with some random
numbers has none with others. A cycle that has not made things better is undone, and the rate falls. Training ends when
two cycles have brought next to nothing, when the estimated gap to the log-evidence is next to nothing, or with the
longest cycle.
"""

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.infer.gap import Gap
from pyro_graphflows.infer.schedule import Schedule
from pyro_graphflows.infer.trainer import NotFiniteError, Trainer

__all__ = ["CycleOptions", "Cycles", "tell_apart"]

STEPS = 50  # of an epoch
FLOOR = 0.01  # of the rate, at the end of a cycle
REPLICATES, MOST_REPLICATES = 64, 512
RECOVERIES = 5


@dataclass(frozen=True)
class CycleOptions:
    """How cycles are made.

    Args:
        rates: The rates that are tried, as multiples of those of the optimiser; with a single one there is no trial.
        trial: The length of a trial in epochs of 50 steps.
        first: The length of the first cycle after the trials.
        longest: The length of the longest cycle.
        tolerance: What is next to nothing, in nats of the posterior: of a datum where the posterior factorises over the
            data, of all together elsewhere.
    """

    rates: tuple[float, ...] = (0.2, 1.0, 4.0)
    trial: int = 2
    first: int = 4
    longest: int = 64
    tolerance: float = 0.005


@dataclass
class _Position:
    """Where training is: numbers alone."""

    rate: float
    length: int
    trials: list[float] = field(default_factory=list)
    place: int = 0  # epochs done in this cycle
    strikes: int = 0  # cycles in a row that brought next to nothing
    recoveries: int = 0
    seconds: float = 0.0
    judged: int = 0  # comparisons


def tell_apart(
    trainer: Trainer,
    others: dict[str, Tensor],
    *,
    first: int,
    most: int = MOST_REPLICATES,
    least: float = 0.0,
) -> Tensor:
    """Return losses of the parameters of now less those of others, as many as it takes to see which are lower.

    Args:
        trainer: The trainer, with the parameters of now.
        others: Other values of its parameters.
        first: The number of the first replicate.
        most: The greatest number of replicates.
        least: A difference that does not matter.

    Returns:
        Differences in nats per datum; all infinite if one of the losses is not finite.
    """
    change, now = torch.zeros(0), trainer.parameters.state()
    trainer.settle()
    try:
        while True:
            place = {"num": max(REPLICATES, len(change)), "first": first + len(change)}
            losses = trainer.replicates(**place)
            trainer.parameters.load(others)
            change = torch.cat([change, losses - trainer.replicates(**place)])
            trainer.parameters.load(now)
            error = change.std().item() / math.sqrt(len(change))
            clear = abs(change.mean().item()) > 2 * error or 2 * error <= least
            if clear or 2 * len(change) > most:
                return change
    except NotFiniteError:  # whoever is to blame, those of now are not better
        trainer.parameters.load(now)
        return torch.full((REPLICATES,), math.inf)


class Cycles:
    """Annealed cycles of growing length; see the module.

    Args:
        trainer: What takes steps.
        options: How cycles are made.
        limits: The greatest number of steps and of seconds; others of its fields are not looked at.
        gap: Estimates the gap to the log-evidence; ``None`` where that is not wanted or not possible.
        size: What ``options.tolerance`` is divided by: the number of data of a joint posterior.
    """

    judges = True

    def __init__(
        self,
        trainer: Trainer,
        options: CycleOptions,
        limits: Schedule,
        gap: Callable[[], Gap | None] | None = None,
        size: int = 1,
    ) -> None:
        self.trainer = trainer
        self.options = options
        self.limits = limits
        self.gap = gap
        self.least = options.tolerance / size
        self.cuts_passes = trainer.batches.is_shuffled
        per_pass = max(1, len(trainer.batches))
        self.steps_per_epoch = STEPS if self.cuts_passes else -(-STEPS // per_pass) * per_pass
        for group in self.optimizer.param_groups:
            group.setdefault("base_lr", float(group["lr"]))
        rates = options.rates
        single = len(rates) == 1
        self.position = _Position(
            rates[0], options.first if single else options.trial, [] if single else list(rates)
        )
        self.step = 0  # of the epoch
        self.steps_done = 0
        self.epochs = 0
        self.kept: list[int] = []
        trainer.replicates(REPLICATES)  # raises where they are not finite
        self.best = self._standing()
        self.begin = self.best  # where trials start
        self.found: dict[str, Any] | None = None  # the best trial so far
        self.reason = self._good_enough()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser whose rates are set."""
        return self.trainer.optimizer

    @property
    def learning_rate(self) -> float:
        """The greatest rate of the optimiser's groups."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def before_step(self) -> None:
        """Set the rate of a step, which falls along half a cosine."""
        within = min(1.0, self.step / self.steps_per_epoch)
        share = (self.position.place + within) / self.position.length
        factor = max(FLOOR, 0.5 * (1 + math.cos(math.pi * share)))
        for group in self.optimizer.param_groups:
            base = group.setdefault("base_lr", float(group["lr"]))
            group["lr"] = base * self.position.rate * factor
        self.step += 1

    def after_epoch(self, loss: float, seconds: float) -> str | None:
        """Take note of an epoch; judge the cycle where it ends, and begin the next."""
        now = self.position
        now.place += 1
        now.seconds = seconds
        self.kept.append(self.epochs)
        self.epochs += 1
        self.steps_done += self.step
        self.step = 0
        over = self._left() < 1
        if now.place < now.length and not over:
            return None
        reason = self._after_trial() if now.trials else self._after_cycle()
        now.place = 0
        if over:
            reason = reason or "the time or the number of steps is used up"
        if not now.trials:  # a cycle ends with settled parameters: it must fit into what is left
            now.length = max(1, min(now.length, self._left()))
        return reason

    def recover(self) -> bool:
        """Return to the best parameters, with a lower rate."""
        now = self.position
        now.recoveries += 1
        self.step = 0
        if now.recoveries > RECOVERIES:
            return False
        now.place = 0
        if now.trials:
            self._after_trial(failed=True)
        else:
            self._put(self.best, fresh=True)
            now.rate /= 5
        return True

    def finish(self) -> None:
        """Leave the best parameters, or those of now where they are better still."""
        if self.found is not None:
            self._put(self.found)
        elif self.position.place == 0:  # at the end of a cycle they are
            self._put(self.best)
            return
        if not self._change(self.position.length).mean().item() <= 0:
            self._put(self.best)

    # ------------------------------------------------------------------------------------------------- decisions
    def _after_trial(self, *, failed: bool = False) -> str | None:
        now, options = self.position, self.options
        loss = math.inf
        if not failed:
            with contextlib.suppress(NotFiniteError):
                loss = self.trainer.replicates(REPLICATES).mean().item()
        if loss < (math.inf if self.found is None else self.found["loss"]):
            self.found = self._standing(loss=loss, rate=now.trials[0])
        now.trials = now.trials[1:]
        if now.trials:
            now.rate = now.trials[0]
            self._put(self.begin, fresh=True)
            return None
        now.length = options.first
        found, self.found = self.found, None
        if found is not None:
            self._put(found)
        if found is None or self._change(len(options.rates) * options.trial).mean().item() > 0:
            now.rate = min(options.rates) / 5
            self._put(self.best, fresh=True)
        else:
            self.best = found
            now.rate = found["rate"]
        return self._good_enough()

    def _after_cycle(self) -> str | None:
        now, options = self.position, self.options
        change = self._change(now.length)
        mean, error = change.mean().item(), change.std().item() / math.sqrt(len(change))
        better = (
            mean <= 0 or mean + 2 * error < self.least
        )  # of equal ones the longer cycle is the better one
        if better:
            self.best = self._standing()
        else:
            self._put(self.best, fresh=True)
        if better and -mean >= max(self.least, 2 * error):
            now.strikes = 0
        else:
            now.strikes += 1
            now.rate /= 3
        if now.strikes >= 2:
            return "longer training no longer lowered the loss"
        if now.length >= options.longest:
            return f"the longest cycle done ({self.steps_per_epoch * now.length} steps); the loss was still falling"
        now.length = min(2 * now.length, options.longest)
        return self._good_enough()

    def _change(self, epochs: int) -> Tensor:
        """Compare the parameters of now with the best ones, in no more time than some epochs of training took."""
        most = min(MOST_REPLICATES, epochs * self.steps_per_epoch)
        self.position.judged += 1  # the first replicates are those of trials
        first = self.position.judged * MOST_REPLICATES
        return tell_apart(self.trainer, self.best["parameters"], first=first, most=most, least=self.least)

    def _good_enough(self) -> str | None:
        gap = None if self.gap is None else self.gap()
        if gap is not None and gap.value + gap.standard_error < self.options.tolerance:
            return "the estimated gap to the log-evidence is next to nothing"
        return None

    def _left(self) -> int:
        """Return how many epochs fit into what is left of the limits."""
        limits, left = self.limits, math.inf
        if limits.num_steps is not None:
            left = (limits.num_steps - self.steps_done) / self.steps_per_epoch
        if limits.num_seconds is not None and self.steps_done:
            each = self.position.seconds / self.steps_done * self.steps_per_epoch
            left = min(left, (limits.num_seconds - self.position.seconds) / each)
        return 10**9 if left == math.inf else max(0, int(left))

    # ----------------------------------------------------------------------------------------------------- states
    def _standing(self, **more: Any) -> dict[str, Any]:
        """Return parameters and optimiser as they are, with the epochs that led to them."""
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        return {
            "parameters": self.trainer.parameters.state(),
            "optimizer": optimizer,
            "epochs": list(self.kept),
            **more,
        }

    def _put(self, standing: dict[str, Any], *, fresh: bool = False) -> None:
        """Go back to parameters, and to the optimiser they came with, or a fresh one."""
        self.trainer.parameters.load(standing["parameters"])
        self.kept = list(standing["epochs"])
        groups = standing["optimizer"]["param_groups"]
        if fresh or [len(group["params"]) for group in groups] != [
            len(group["params"]) for group in self.optimizer.param_groups
        ]:
            self.optimizer.state.clear()
        else:
            self.optimizer.load_state_dict(copy.deepcopy(standing["optimizer"]))

    def state(self) -> dict[str, Any]:
        """Return everything that later decisions depend on."""
        return {
            "position": asdict(self.position),
            "steps_done": self.steps_done,
            "epochs": self.epochs,
            "kept": self.kept,
            "best": self.best,
            "begin": self.begin if self.position.trials else self.best,
            "found": self.found,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.position = _Position(**state["position"])
        self.steps_done = state["steps_done"]
        self.epochs, self.kept = state["epochs"], state["kept"]
        self.best, self.begin, self.found = state["best"], state["begin"], state["found"]
        self.reason = None
