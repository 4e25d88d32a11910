"""Which start a guide keeps: the one with the least loss for the data of set-up, by draws that no start has seen.

Candidates with ``init="auto"``, in this order:

- *regression* on joint samples of the model, or, where these are not what the model's density says (factors, masks),
  on draws of the latents from their prior;
- *mode*: regression on draws near the posterior's mode for the data of set-up (:mod:`~pyro_graphflows.guides.mode`);
- *prior*: the latents' prior, whatever the data;
- *random*: random weights, if nothing else has a finite loss.

A guide that is amortised must not take the data of set-up, which may be a mere example, for all that it will see. The
other candidates are tried there only if the regression does much worse for these data than draws of the prior would.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import nn

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.compile import Compiled
from pyro_graphflows.guides.samples import Samples

__all__ = ["Candidate", "Judge", "choose_start"]

NUM_DRAWS = 20
MARGIN = 20.0  # nats by which the prior must be better than an amortised guide's start
Program = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """A guide's blocks at a start.

    Attributes:
        name: ``"regression"``, ``"mode"``, ``"prior"`` or ``"random"``.
        blocks: The blocks.
        notes: Notes for the user.
        note: Why there are no joint samples, or few; None otherwise.
    """

    name: str
    blocks: nn.ModuleList
    notes: tuple[str, ...]
    note: str | None = None


class Judge:
    """The losses of starts for the data of one call: the mean of ``log q - log p`` over draws of the guide.

    Args:
        model: The model.
        call: Its arguments.
        seed: The seed of the draws, the same for all starts.
        dim: The dimension of a plate in which the model gives many draws at once; None if it cannot.
    """

    def __init__(self, model: Program, call: Arguments, seed: int, dim: int | None) -> None:
        self.model, self.call, self.seed, self.dim = model, call, seed, dim

    @torch.no_grad()
    def loss(self, guide: Program) -> float | None:
        """Return the loss of a guide, infinite where it cannot be computed; None if there are no data."""
        args, kwargs = self.call

        def one() -> float:
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = poutine.trace(poutine.replay(self.model, trace=drawn)).get_trace(*args, **kwargs)
            return float(drawn.log_prob_sum() - replayed.log_prob_sum())

        return self._mean(one)

    @torch.no_grad()
    def loss_of_prior(self) -> float:
        """Return the loss of draws from the prior; infinite where there is none."""
        args, kwargs = self.call

        def one() -> float:
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
            trace.compute_log_prob()
            observed = [trace.nodes[name]["log_prob_sum"] for name in trace.observation_nodes]
            return -float(sum(observed))

        found = self._mean(one)
        return math.inf if found is None else found

    def _mean(self, one: Callable[[], float]) -> float | None:
        losses = []
        with warnings.catch_warnings(), pyro.validation_enabled(False):
            warnings.simplefilter("ignore")  # of losses that are not finite
            pyro.set_rng_seed(self.seed)
            try:
                if self.dim is not None:
                    with pyro.plate("_pyro_graphflows_draws", NUM_DRAWS, dim=self.dim):
                        losses.append(one() / NUM_DRAWS)
                else:
                    losses = [one() for _ in range(NUM_DRAWS)]
            except UnsupportedModelError:
                return None
            except (ValueError, ArithmeticError, RuntimeError, NotImplementedError):
                return math.inf  # draws so far out that the model cannot be evaluated there
        mean = sum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf


def choose_start(
    compiled: Compiled,
    samples: Samples,
    build: Callable[[Samples, str], Candidate],
    loss_of: Callable[[Candidate], float | None],
    judge: Judge,
) -> tuple[Candidate, str | None]:
    """Return the best start, and a sentence on the choice; None where there was none to make.

    Args:
        compiled: What the guide is made from.
        samples: Joint samples, or what there is instead.
        build: Makes the guide's blocks start from samples; the second argument is the name of the start.
        loss_of: Returns the loss of a start.
        judge: The judge of losses.
    """
    plan = compiled.plan
    first = build(
        samples, {"joint": "regression"}.get(samples.source, samples.source).replace("none", "random")
    )
    continuous = all(site.encoding is None for site in compiled.sites.values())
    if not continuous or plan.graph.marginalised or plan.changing or samples.num_rows == 0:
        return first, None
    loss = loss_of(first)
    if loss is None:
        return first, None
    losses = {first.name: loss}
    is_for_these_data = bool(plan.inputs.per_element) or samples.source == "none"
    if not is_for_these_data and loss <= judge.loss_of_prior() + MARGIN:
        return first, _sentence(first, losses)
    best, least = first, loss
    reasons = []
    for name in ("mode", "prior", "random"):
        if name in losses or (name == "random" and least < math.inf):
            continue
        if name == "prior" and samples.draws.one_by_one and least < math.inf:
            continue  # it would take as many runs of the model again
        try:
            there = {"mode": samples.at_mode, "prior": samples.at_prior}.get(name, lambda _: samples)(plan)
            other = build(there, name)
        except (UnsupportedModelError, RuntimeError) as error:  # of algebra on draws that suit no regression
            reasons.append(f"no start at the {name}: {error}")
            continue
        found = loss_of(other)
        losses[name] = math.inf if found is None else found
        if losses[name] < least:
            best, least = other, losses[name]
    return best, " ".join([_sentence(best, losses), *reasons])


def _sentence(chosen: Candidate, losses: dict[str, float]) -> str:
    others = ", ".join(f"{name} {loss:.5g}" for name, loss in losses.items() if name != chosen.name)
    than = f" ({others})" if others else ""
    return f"the start is {chosen.name!r}, with a loss of {losses[chosen.name]:.5g} nats for the data of set-up{than}."
