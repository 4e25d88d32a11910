"""The log-density of a search, as a graph of tensor operations once it has been evaluated often.

A search for a mode evaluates a model's log-density and its gradient hundreds of times for the same data, and each time
is mostly Python. After some evaluations at points of one shape, :class:`CapturedDensity` records one together with its
gradient (:mod:`pyro_graphflows.recording`) and lets PyTorch's interpreter run that. Derivatives of gradients are those
of the recorded operations, by autograd.

What was recorded is compared with the program in calls 1, 2, 4, 8, ... of values and gradients, and of derivatives of
these. Where they differ, and where the program cannot be recorded, the program is run as before.

Where a search takes a hundred steps or so and no second derivatives, :func:`recorded_gradients` records at once.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_graphflows.capture import NotCapturedError, is_compared, scripted
from pyro_graphflows.captured_gradients import optimized_execution, simplified
from pyro_graphflows.guides.minimize import Gradients, Objective, loss_and_gradient
from pyro_graphflows.recording import record

__all__ = ["CapturedDensity", "recorded_gradients"]

logger = logging.getLogger(__name__)

# Evaluations with a gradient before one is recorded, which takes as long as some 30 where most of the time is Pyro's,
# and as 75 to 165 where there are thousands of operations.
AFTER, MOST_BEFORE = 30, 120
NODES_OF_EVALUATION = 3  # of the graph of values, for each evaluation to wait for
OF_HESSIAN = 3  # such evaluations that one with second derivatives counts as
MOST_ROUNDINGS = 100.0  # by which what was recorded may differ
MOVE = 0.1  # of numbers of unit size, to a point where gradients are compared: they may vanish where a search begins
Density = Callable[[Tensor], Tensor]


@dataclass
class _Kind:
    """What is known of points of one shape.

    Attributes:
        evaluations: For how many gradients the program has been evaluated, second derivatives being counted by
            what they cost.
        after: After how many the program is recorded; None before the first.
        function: From points to values and gradients; None for the program.
        is_settled: Whether there is no more to try.
        calls: How often the function has been called.
        derivatives: How often derivatives of its gradient were wanted.
    """

    evaluations: int = 0
    after: int | None = None
    function: Callable[..., tuple[Tensor, ...]] | None = None
    is_settled: bool = False
    calls: int = 0
    derivatives: int = 0


class CapturedDensity:
    """A log-density of points that is recorded where it is evaluated often.

    Args:
        program: From a point ``(numbers,)`` to a number, and from points ``(draws, numbers)`` to one for each, that
            depends on this point alone.

    Attributes:
        num_captured: How many evaluations ran as recorded operations.
    """

    def __init__(self, program: Density) -> None:
        self.program = program
        self.num_captured = 0
        self._kinds: dict[torch.Size, _Kind] = {}

    def __call__(self, points: Tensor) -> Tensor:
        """Return the log-density; it can be differentiated twice."""
        kind = self._kinds.setdefault(points.shape, _Kind())
        follow = points.requires_grad and torch.is_grad_enabled()
        if kind.function is None and (kind.is_settled or not follow):
            return self.program(points)
        if kind.function is None:
            if kind.after is None or kind.evaluations < kind.after:
                return _counted(kind, self.program(points))
            self._capture(kind, points.detach())
        found = self._run(kind, points.detach())
        if found is None:
            return self.program(points)
        if not follow:
            return found[0]
        values: Tensor = _Values.apply(self, kind, *found, points)
        return values

    def forget(self) -> None:
        """Let what was recorded go."""
        self._kinds.clear()

    def _capture(self, kind: _Kind, points: Tensor) -> None:
        """Record the program at points of a shape, if that is possible."""
        kind.is_settled = True
        try:
            kind.function = _recorded(self.program, points)
        except NotCapturedError as error:
            logger.debug("The log-density at points %s is not captured: %s", tuple(points.shape), error)

    def _run(self, kind: _Kind, points: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return values and gradients as recorded; None where the program has to be run."""
        if kind.function is None:
            return None
        try:
            with torch.no_grad(), optimized_execution(False):
                values, gradients = kind.function(points)
        except RuntimeError:  # an operation is not defined there: the program says so in its own way
            return None
        if bool(values.isnan().any()):  # undefined there, or beyond what the recorded operations reach
            return None
        kind.calls += 1
        if is_compared(kind.calls) and not self._agrees(kind, points, values, gradients):
            kind.function = None
            return None
        self.num_captured += 1
        return values, gradients

    def _agrees(self, kind: _Kind, points: Tensor, values: Tensor, gradients: Tensor) -> bool:
        point = points.clone().requires_grad_()
        with torch.enable_grad():
            expected = self.program(point)
            weights = _cosines(expected)
            (slope,) = torch.autograd.grad(expected, point, weights)
        if expected.shape != values.shape:
            return False
        return _is_close(values, expected.detach()) and _is_close(_spread(weights) * gradients, slope)

    def derivative(self, kind: _Kind, points: Tensor, gradients: Tensor) -> Tensor:
        """Return gradients that can be differentiated by the points.

        Args:
            kind: The kind of points.
            points: They, with their history.
            gradients: Their values.
        """
        kind.derivatives += 1
        if kind.function is not None:
            try:
                if not is_compared(kind.derivatives) or self._has_same_curvature(kind, points.detach()):
                    with torch.enable_grad(), optimized_execution(False):
                        return kind.function(points)[1]
            except RuntimeError as error:  # an operation without derivatives, say
                logger.debug("The gradient of the log-density cannot be differentiated: %s", error)
            kind.function = None
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.program(points).sum(), points, create_graph=True)
        return found

    def _has_same_curvature(self, kind: _Kind, points: Tensor) -> bool:
        assert kind.function is not None
        products = []
        with torch.enable_grad(), optimized_execution(False):
            for function in (kind.function, self._gradients):
                point = points.clone().requires_grad_()
                gradients = function(point)[1]
                (product,) = torch.autograd.grad(gradients, point, _cosines(gradients), allow_unused=True)
                products.append(torch.zeros_like(points) if product is None else product)
        return _is_close(*products)

    def _gradients(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the program's values and gradients."""
        values = self.program(points)
        return values, torch.autograd.grad(values.sum(), points, create_graph=True)[0]


class _Values(torch.autograd.Function):
    """The node of recorded values in the graph of autograd."""

    @staticmethod
    def forward(
        ctx: Any, density: CapturedDensity, kind: _Kind, values: Tensor, gradients: Tensor, points: Tensor
    ) -> Tensor:
        ctx.density, ctx.kind = density, kind
        ctx.save_for_backward(points, gradients)
        return values

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:
        points, gradients = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = ctx.density.derivative(ctx.kind, points, gradients)
        return None, None, None, None, _spread(given) * gradients


def recorded_gradients(objective: Objective, point: Tensor) -> Gradients:
    """Return a function with its gradient, by operations that are recorded now.

    Where the function cannot be recorded, or what was recorded gives something else, it is evaluated itself.

    Args:
        objective: The function, of numbers of about unit size; all else that it reads keeps its value.
        point: One at which it is defined.
    """
    itself = partial(loss_and_gradient, objective)
    try:
        function = _recorded(objective, point.clone())  # a copy, since the function may read the point itself
    except NotCapturedError as error:
        logger.debug("The gradient is not captured: %s", error)
        return itself

    def as_recorded(point: Tensor) -> tuple[Tensor, Tensor]:
        try:
            with torch.no_grad(), optimized_execution(False):
                loss, gradient = function(point.detach())
        except RuntimeError:  # an operation is not defined there: the function says so in its own way
            return itself(point)
        is_finite = bool(torch.isfinite(gradient).all()) and bool(torch.isfinite(loss))
        return (loss, gradient) if is_finite else itself(point)

    moved = point + MOVE * _cosines(point)
    pairs = zip(as_recorded(moved), itself(moved), strict=True)
    return as_recorded if all(_is_close(found, expected) for found, expected in pairs) else itself


def _recorded(program: Density, points: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function of points that gives their values and gradients.

    Raises:
        NotCapturedError: If the program is no graph of operations.
    """

    def both(points: Tensor) -> list[Tensor]:
        point = points.detach().requires_grad_()
        values = program(point)
        (gradients,) = torch.autograd.grad(values.sum(), point)
        return [values.detach(), gradients]

    try:
        with torch.enable_grad(), pyro.validation_enabled(False):
            captured = record(both, [points])
        constants = [tensor.detach() for tensor in captured.constants]
        with torch.no_grad():
            function = scripted(simplified(captured, [points]), [points, *constants])
    except NotCapturedError:
        raise
    except Exception as error:  # a compiler may fail in ways of its own: a search goes on without it
        raise NotCapturedError(f"{type(error).__name__}: {error}") from error
    return lambda points: function(points, *constants)


def _counted(kind: _Kind, values: Tensor) -> Tensor:
    """Return values of the program; their gradients will count."""

    def count(gradient: Tensor) -> None:
        kind.evaluations += OF_HESSIAN if torch.is_grad_enabled() else 1

    if values.requires_grad:
        values.register_hook(count)
        if kind.after is None:
            kind.after = max(AFTER, min(_num_nodes(values) // NODES_OF_EVALUATION, MOST_BEFORE))
    return values


def _num_nodes(values: Tensor) -> int:
    """Return the size of a graph of autograd."""
    seen, waiting = {values.grad_fn}, [values.grad_fn]
    while waiting:
        node = waiting.pop()
        further = {each for each, _ in node.next_functions if each is not None} - seen if node else set()
        seen |= further
        waiting += further
    return len(seen)


def _cosines(like: Tensor) -> Tensor:
    """Return weights that are all different."""
    return torch.arange(like.numel()).to(like).cos().reshape(like.shape)


def _spread(weights: Tensor) -> Tensor:
    """Return a weight for each point with a dimension for its numbers."""
    return weights.unsqueeze(-1)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by rounding, beside the largest of their elements; what is not finite is equal."""
    finite = expected.isfinite()
    if not bool((finite == found.isfinite()).all()):
        return False
    size = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    rounding = max(1e-7, MOST_ROUNDINGS * torch.finfo(expected.dtype).eps)
    return torch.allclose(found[finite], expected[finite], 0.0, rounding * (1e-3 + size))
