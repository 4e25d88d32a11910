"""What was found about a model, a guide and data, and what follows from it: two judgements, and what to do next.

The judgements are kept apart: whether the draws are those of the posterior is about the guide, whether the model could
have made the data is about the model. A guide may be exact for a model that is wrong.
"""

from dataclasses import dataclass

from torch import Tensor

from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.guides import AutoFaithfulGuide
from pyro_graphflows.infer import CalibrationReport, History, Posterior

__all__ = ["NEARLY_EVEN", "TRUSTED", "Findings", "judge_draws", "judge_model", "next_steps", "unlikely"]

TRUSTED = 0.7
FEW = 0.1  # a share of data for which chains are cheaper than more training
UNLIKELY = 1e-3  # a tail probability of data
NEARLY_EVEN = 0.9  # share of effective draws from which weights change nothing


@dataclass
class Findings:
    """What the sections of a report say, as far as it was found.

    Attributes:
        graph: The model's graph.
        guide: The guide.
        seconds: How long it was allowed to train.
        family: The family of its conditionals, in words.
        history: The training; ``None`` without.
        posterior: The draws.
        surprise: Tail probabilities of the data, or why there are none.
        calibration: On simulated data, or why there is none.
        extreme: Statistics of the data that predictions do not reach, in words.
    """

    graph: ModelGraph
    guide: AutoFaithfulGuide
    seconds: float = 0.0
    family: str = "auto"
    history: History | None = None
    posterior: Posterior | None = None
    surprise: Tensor | str | None = None
    calibration: CalibrationReport | str | None = None
    extreme: tuple[str, ...] = ()

    @property
    def drawn(self) -> Posterior:
        """The draws, which are there once they were made."""
        assert self.posterior is not None
        return self.posterior

    @property
    def doubtful(self) -> Tensor:
        """For each datum, or for all data together, whether its k-hat is above 0.7."""
        return ~(self.drawn.khat.flatten() <= TRUSTED)

    @property
    def calibrated(self) -> bool | None:
        """Whether nothing speaks against the guide on simulated data; ``None`` where that is not known."""
        if not isinstance(self.calibration, CalibrationReport):
            return None
        return self.calibration.summary().note.startswith("Nothing")


def unlikely(found: Findings) -> tuple[int, int]:
    """Return how many data are unlike what the model generates, and how many would be by chance at most, about.

    Both are 0 where that is not known.
    """
    if not isinstance(found.surprise, Tensor):
        return 0, 0
    tail = found.surprise.flatten()
    expected = UNLIKELY * len(tail)
    return int((tail < UNLIKELY).sum()), int(expected + 3 * expected**0.5)


def judge_draws(found: Findings) -> tuple[str, str]:
    """Return whether the draws are those of the posterior: ``"good"``, ``"care"`` or ``"bad"``, and a sentence."""
    bad, posterior = found.doubtful, found.drawn
    if found.history is None:
        return (
            "bad" if bool(bad.any()) else "care",
            "The guide is not trained: its draws are those of its start.",
        )
    if not bool(bad.any()):
        uneven = bool((posterior.ess < NEARLY_EVEN * posterior.num_draws).any())
        return "good", (
            "The draws are those of the posterior once they are weighted (no k-hat is above 0.7)."
            if uneven
            else "The draws are those of the posterior: their weights are nearly even."
        )
    if posterior.data_plate is None:
        return "bad", "The draws are not yet those of the posterior, and weights cannot repair them."
    count, total = int(bad.sum()), len(bad)
    if count <= FEW * total:
        return "care", (
            f"The draws are those of the posterior for {total - count} of {total} elements of "
            f"{posterior.data_plate!r} once they are weighted; for the other {count} weights cannot repair them."
        )
    return "bad", (
        f"For {count} of {total} elements of {posterior.data_plate!r} the draws are not yet those of the posterior, "
        "and weights cannot repair them."
    )


def judge_model(found: Findings) -> tuple[str, str]:
    """Return whether the model could have made the data: ``"good"`` or ``"bad"``, and a sentence."""
    count, chance = unlikely(found)
    said = []
    if count > chance:
        whole = found.drawn.data_plate is None
        said.append(
            "the data are unlike those that it generates"
            if whole
            else f"{count} data are unlike those that it generates"
        )
    if found.extreme:
        said.append(f"its predictions do not reach {_listed(found.extreme)}")
    if said:
        return "bad", f"The model does not fit the data: {' and '.join(said)}."
    return "good", "The model reproduces the data in what was looked at."


def next_steps(found: Findings) -> list[str]:
    """Return what to do next, the first thing first."""
    steps = []
    model_kind, _ = judge_model(found)
    if model_kind == "bad":
        steps.append("Change the model before trusting what it says of these data.")
    steps += [*_about_draws(found), *_about_other_data(found)]
    if model_kind == "good" and judge_draws(found)[0] == "good":
        steps.append("Compare with other models by posterior.loo() and compare().")
    return steps


def _about_draws(found: Findings) -> list[str]:
    if found.history is None:
        return ["Train the guide: --train 60."]
    posterior, kind = found.drawn, judge_draws(found)[0]
    if kind == "good":
        if bool((posterior.ess < NEARLY_EVEN * posterior.num_draws).any()):
            return ["Use posterior.reweighted(): weights make these draws those of the posterior."]
        return ["Use the draws as they are."]
    if kind == "care":
        return [
            "Use posterior.refined(): Markov chains for the data whose k-hat is above 0.7, the draws of the others are "
            "kept."
        ]
    steps = []
    if _was_cut_short(found.history):
        steps.append(
            f"Train longer than {found.seconds:g} s (--train): the loss was still falling when the time was up."
        )
    if found.family in ("auto", "normal"):
        steps.append("Try a richer family: --family spline.")
    chains = "correct the draws by Markov chains that start from them: posterior.refined()."
    return [*steps, f"Or {chains}" if steps else f"C{chains[1:]}"]


def _about_other_data(found: Findings) -> list[str]:
    if found.calibrated is None:
        if isinstance(found.calibration, str) and "parameters for these data" in found.calibration:
            return ["For other data, train the guide again, or set it up with pool='deepset'."]
        return []
    if found.calibrated:
        return ["For other data like those that the model simulates, use this guide without training."]
    assert isinstance(found.calibration, CalibrationReport)
    problem = found.calibration.summary().note.removeprefix("Not calibrated. ").rstrip(".")
    return [
        f"For other data than these, look at k-hat before you use the guide. On simulated data: {problem}. "
        "fit(model, guide, data, simulations=100_000) trains it on such data."
    ]


def _was_cut_short(history: History) -> bool:
    reason = history.stop_reason or ""
    return "seconds are over" in reason or "used up" in reason or "still falling" in reason


def _listed(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
