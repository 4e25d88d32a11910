"""One gradient step and one validation, and what is done when something is not finite."""

import math
import warnings
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.infer.batches import Batch, Batches, TrainingData
from pyro_graphflows.infer.checkpoints import random_state, seeded, set_random_state
from pyro_graphflows.infer.compiled import Compiler, Mode
from pyro_graphflows.infer.objectives import Objective, SiteWatch
from pyro_graphflows.infer.optimizers import make_optimizer
from pyro_graphflows.infer.parameters import ParameterSet
from pyro_graphflows.infer.particles import evaluation_mode

__all__ = ["NotFiniteError", "Trainer"]

_VALIDATION_SEED = 20201  # the same random numbers for every epoch


class NotFiniteError(GraphflowsError):
    """A loss or gradient is not finite; the message says where it began."""


class Trainer:
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
        compile: Whether gradients come from compiled code, or ``"auto"``.

    Attributes:
        learns_model: Whether parameters of the model are trained: then a guide that is the posterior is not the end.

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
        compile: Mode = False,
    ) -> None:
        self.objective = objective
        self.data = data
        self.seed = seed
        self.batches = data.batches(seed)
        self.held_out = data.held_out()
        self.max_grad_norm = max_grad_norm
        self._judged: list[Batch] | None = None
        self.learns_model = False

        self.parameters = ParameterSet(model=objective.model, guide=objective.guide)
        self.compiler = Compiler(objective, self.parameters, compile) if compile else None
        batch = self.batches.first()
        watch = self._explore(batch)
        if not self.parameters.trainable:
            raise GraphflowsError(
                "Expected the model or the guide to have parameters; there is nothing to train."
            )
        if not objective.compiles and hasattr(objective.guide, "fitting_to"):
            _require_same_latents(watch)
        if not objective.compiles and data.full_size is None and batch.size < (self.batches.num_data or 0):
            self._take_all_or_warn(_global_sites(watch, batch.size), batch.size)
        self.optimizer = make_optimizer(optimizer, self.parameters)
        self._in_optimizer = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self._grows = not isinstance(optimizer, torch.optim.Optimizer)

    def _take_all_or_warn(self, outside: list[str], size: int) -> None:
        """Do not divide the data where each batch would count the prior of global sites, unless it was asked for."""
        if not outside:
            return
        if self.data.divides_by_default:
            self.data = replace(self.data, batch_size=self.batches.num_data)
            self.batches, self.held_out = self.data.batches(self.seed), self.data.held_out()
            self._explore(self.batches.first())
        else:
            _warn_of_globals(outside, size)

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
                loss = self._add_gradients(size, batch)
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
            norms = torch._foreach_norm(
                list(gradients.values())
            )  # one call for all, which a loop takes longer than
            norm = torch.linalg.vector_norm(torch.stack([each.float() for each in norms])).item()
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
        self.settle()
        total, count = 0.0, 0
        with evaluation_mode(self.objective.model, self.objective.guide), seeded(_VALIDATION_SEED):
            for batch in self.held_out:
                loss = self._evaluate(batch, "in validation")
                total += loss / (self.data.full_size or batch.size) * batch.size
                count += batch.size
        return total / count

    def settle(self) -> None:
        """Let evaluations be compiled from here on that come often: until the next call they stay as they are."""
        if self.compiler is not None:
            self.compiler.settle()

    def replicates(self, num: int, *, first: int = 0) -> Tensor:
        """Return losses in nats per datum that differ between two states of the parameters by these alone.

        Each is of a batch, of the validation data where there are some, with random numbers of its own, the same in
        every call.

        Args:
            num: Their number.
            first: The number of those that are left out before.

        Raises:
            NotFiniteError: If one is not finite.
        """
        if self._judged is None:
            data, size = self.data.data, self.batches.batch_size
            if self.held_out is not None:
                self._judged = list(islice(self.held_out, num))
            elif self.batches.is_shuffled:
                self._judged = list(islice(Batches(data, size, shuffle=True, seed=_VALIDATION_SEED), num))
            else:
                self._judged = [self.batches.first()]
        losses = []
        with evaluation_mode(self.objective.model, self.objective.guide):
            for place in range(first, first + num):
                batch = self._judged[place % len(self._judged)]
                with seeded(_VALIDATION_SEED + place):
                    losses.append(
                        self._evaluate(batch, "between two cycles") / (self.data.full_size or batch.size)
                    )
        return torch.tensor(losses, dtype=torch.double)

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
            "calls": self.parameters.call_counts,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.parameters.load(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load(state["order"])
        self.parameters.call_counts = state.get("calls", {})  # older ones have none
        set_random_state(state["random"])

    # -------------------------------------------------------------------------------------------------- parts
    def _add_gradients(self, size: float, batch: Batch) -> float:
        """Set the gradients of a batch's loss divided by ``size``; return the loss divided by it."""
        if self.compiler is not None:
            return self.compiler.add_gradients(size, batch.args, self._kwargs(batch))
        values = self.parameters.parameters.values
        return self.objective.add_gradients(size, batch.args, self._kwargs(batch), values)

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
        self.learns_model = any(
            parameter.grad is not None
            and (name.startswith("model.") or self.parameters.store_name(name) in watch.parameters)
            for name, parameter in self.parameters.trainable.items()
        )
        return watch

    def _evaluate(self, batch: Batch, when: str) -> float:
        """Return the loss of a batch without gradients; raise if it is not finite."""
        state = random_state()
        try:
            source = self.objective if self.compiler is None else self.compiler
            loss = source.evaluate(batch.args, self._kwargs(batch))
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
            source = self.objective if self.compiler is None else self.compiler
            guilty = source.first_not_finite(batch.args, self._kwargs(batch))
        finally:
            set_random_state(now)
        given = (value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, torch.Tensor))
        bad = sum(int((~value.isfinite()).sum()) for value in given)
        if guilty and bad:
            guilty = f"{guilty.removesuffix(')')}; {bad} of the data)"
        return guilty


def _require_same_latents(watch: SiteWatch) -> None:
    """Refuse a model that has other latent sites than a guide that knows its own model's."""
    left_out, more = sorted(watch.latent - watch.sampled), sorted(watch.sampled - watch.names)
    said = [f"it does not sample {left_out}"] if left_out else []
    said += [f"it samples {more}, which the model lacks"] if more else []
    if said:
        raise UnsupportedModelError(
            f"Expected the guide to sample the latent sites of the model; {', and '.join(said)}. Give data of all "
            "sites that are observed, fit(model, guide, (x, y)) for a model(x, y), or set a guide up for this model."
        )


def _global_sites(watch: SiteWatch, size: int) -> list[str]:
    """Return the global latent sites of a model that takes a batch as all data there are."""
    in_batch = any(
        observed and any(frame.size == size == (frame.full_size or size) for frame in frames)
        for observed, frames in watch.sites.values()
    )
    outside = (name for name, (observed, frames) in watch.sites.items() if not observed and not frames)
    return sorted(outside) if in_batch else []


def _warn_of_globals(outside: list[str], size: int) -> None:
    """Warn where global latent sites meet batches that stand for themselves only."""
    warnings.warn(
        f"The latent sites {outside} are global, but the model sees each batch of {size} data as all there is: "
        "their prior is counted once per batch. Train on all data at once, or let the model's plate have the full "
        "size with the batch as its subsample and give TrainingData(..., full_size=...).",
        GraphflowsWarning,
        stacklevel=5,
    )
