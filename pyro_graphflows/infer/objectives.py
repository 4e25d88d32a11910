"""One face for everything that `fit` can minimise: Pyro's ELBOs, ours, and inference compilation.

An :class:`Objective` holds the loss with its model and guide. It adds gradients, evaluates without them, and
can be run once more under watch to find the first site whose value or log-density is not finite.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger, unwrap
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.particles import Program, is_enumerated
from pyro_graphflows.inspect import is_transparent

__all__ = ["Objective", "SiteWatch"]


class SiteWatch(Messenger):
    """Look at each sample statement as it runs: which is the first that is not finite, and where sites are.

    Args:
        check: Whether to look for what is not finite, which needs each site's log-density.

    Attributes:
        guilty: A description of the first site with a value or log-density that is not finite, or ``None``.
        sites: For each site of the model: whether it is observed, and the plates around it.
        latent: The sites of the model that a guide samples: neither observed, nor summed over, nor constant.
        names: All sample statements of the model.
        sampled: The guide's sites, without those marked ``infer={"is_auxiliary": True}``.
        parameters: The names of what the model announces by ``param`` statements, those of modules with dots.
    """

    def __init__(self, *, check: bool) -> None:
        super().__init__()
        self.check = check
        self.guilty: str | None = None
        self.sites: dict[str, tuple[bool, list[Any]]] = {}
        self.latent: set[str] = set()
        self.names: set[str] = set()
        self.sampled: set[str] = set()
        self.parameters: set[str] = set()
        self._program = "model"

    def watched(self, program: Program, name: str) -> Program:
        """Return a program that says it is the one running."""
        if isinstance(unwrap(program), Messenger):  # Pyro's effect-based guides must be seen as such
            return program

        def run(*args: Any, **kwargs: Any) -> Any:
            before, self._program = self._program, name
            try:
                return program(*args, **kwargs)
            finally:
                self._program = before

        return run

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        if self._program == "model" and msg["mask"] is not False:
            frames = [frame for frame in msg["cond_indep_stack"] if frame.vectorized]
            self.sites[msg["name"]] = (msg["is_observed"], frames)
            if not (msg["is_observed"] or is_enumerated(msg) or is_transparent(msg)):
                self.latent.add(msg["name"])
        if self._program == "model":
            self.names.add(msg["name"])
        elif not msg["infer"].get("is_auxiliary"):
            self.sampled.add(msg["name"])
        if self.check and self.guilty is None:
            self.guilty = self._describe(msg)

    def _pyro_post_param(self, msg: Any) -> None:
        if self._program == "model":
            self.parameters.add(msg["name"].replace("$$$", "."))

    def _describe(self, msg: Any) -> str | None:
        where = f"of site {msg['name']!r} in the {self._program}"
        value = torch.as_tensor(msg["value"])
        if not value.isfinite().all():
            return f"the value {where} ({int((~value.isfinite()).sum())} of {value.numel()} elements)"
        try:
            log_prob = msg["fn"].log_prob(value, *msg["args"], **msg["kwargs"])
        except (ValueError, RuntimeError):
            return f"the log-density {where} (it cannot be computed)"
        log_prob = scale_and_mask(log_prob, mask=msg["mask"])
        if not log_prob.isfinite().all():
            return f"the log-density {where} ({int((~log_prob.isfinite()).sum())} of {log_prob.numel()} elements)"
        return None


class Objective:
    """A loss with its model and guide.

    Args:
        model: A Pyro model.
        guide: A guide for it.
        loss: An ELBO of Pyro or of this package (an object with ``loss_and_grads(model, guide, *args)``; its
            ``differentiable_loss`` is preferred where there is one), an :class:`InferenceCompilation` of this
            model and guide, or that class itself; ``None`` for ``Trace_ELBO()``.

    Raises:
        GraphflowsError: If ``loss`` is none of these, or compiles another pair.
    """

    def __init__(self, model: Program, guide: Program, loss: Any) -> None:
        if loss is None:
            loss = Trace_ELBO()
        elif loss is InferenceCompilation:
            loss = InferenceCompilation(model, guide)
        self.compiles = isinstance(loss, InferenceCompilation)
        if self.compiles and (loss.model != model or loss.guide != guide):
            raise GraphflowsError(
                "Expected an InferenceCompilation of the given model and guide; got one of another pair."
            )
        if not callable(getattr(loss, "loss_and_grads", None)) or isinstance(loss, type):
            raise GraphflowsError(
                f"Expected loss to be 'auto', an ELBO object or an InferenceCompilation; got {loss!r}. Classes must be "
                "called."
            )
        self.model = model
        self.guide = guide
        self.estimator = loss

    def differentiable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the loss as a tensor to go backward from; None of losses that only do so by themselves.

        Args:
            args: Positional arguments of the model and the guide.
            kwargs: Their keyword arguments.
        """
        if not callable(getattr(self.estimator, "differentiable_loss", None)):
            return None
        programs = () if self.compiles else (self.model, self.guide)
        return torch.as_tensor(self.estimator.differentiable_loss(*programs, *args, **kwargs))

    def add_gradients(
        self, size: float, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Callable[[], Any]
    ) -> float:
        """Add the gradients of the loss divided by ``size`` to the parameters; return the loss divided by it.

        Args:
            size: What to divide by.
            args: Positional arguments of the model and the guide.
            kwargs: Their keyword arguments.
            parameters: A function that returns the parameters, for losses that only know how to go backward
                by themselves.
        """
        found = self.differentiable(args, kwargs)
        if found is not None:
            loss = found / size
            if loss.requires_grad:
                loss.backward()
            return float(loss.detach())
        programs = () if self.compiles else (self.model, self.guide)
        value = _total(self.estimator.loss_and_grads(*programs, *args, **kwargs))
        for parameter in parameters():
            if parameter.grad is not None:
                parameter.grad /= size
        return value / size

    def loss_and_gradients(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss as a tensor and its gradients, which are not added to the parameters.

        Args:
            args: Positional arguments of the model and the guide.
            kwargs: Their keyword arguments.
            parameters: The parameters; those that are not in use have no gradient.
        """
        loss = self.differentiable(args, kwargs)
        if loss is not None:
            if not loss.requires_grad:
                return loss, [None for _ in parameters]
            gradients: Any = torch.autograd.grad(loss, parameters, allow_unused=True)
            return loss.detach(), list(gradients)
        programs = () if self.compiles else (self.model, self.guide)
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            loss = self.estimator.loss_and_grads(*programs, *args, **kwargs)
            return torch.as_tensor(sum(loss) if isinstance(loss, tuple) else loss), [
                parameter.grad for parameter in parameters
            ]
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Return the loss without gradients."""
        programs = () if self.compiles else (self.model, self.guide)
        with torch.no_grad():
            return _total(self.estimator.loss(*programs, *args, **kwargs))

    @contextmanager
    def watched(self, *, check: bool) -> Iterator[SiteWatch]:
        """Look at each site of the runs made meanwhile."""
        watch = SiteWatch(check=check)
        holder = self.estimator if self.compiles else self
        model, guide = holder.model, holder.guide
        holder.model, holder.guide = watch.watched(model, "model"), watch.watched(guide, "guide")
        try:
            with watch:
                yield watch
        finally:
            holder.model, holder.guide = model, guide

    def first_not_finite(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Evaluate the loss with validation off; describe the first site that is not finite, if there is one."""
        with pyro.validation_enabled(False), self.watched(check=True) as watch:
            try:
                self.evaluate(args, kwargs)
            except (ValueError, RuntimeError):
                return watch.guilty  # None for an error of another kind, which the caller has already
        return watch.guilty


def _total(loss: Any) -> float:
    """Return a loss as a number; losses in parts (ReweightedWakeSleep) are added up."""
    parts = loss if isinstance(loss, tuple) else (loss,)
    return (
        math.fsum(float(part) for part in parts) if all(map(math.isfinite, map(float, parts))) else math.nan
    )
