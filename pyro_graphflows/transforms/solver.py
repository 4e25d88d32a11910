r"""Safe inversion of residual maps, with implicit gradients.

A residual map :math:`f(y) = y + g(y)` whose slopes lie in a known interval :math:`[m, M]`, :math:`m > 0`, has an
exact bracket for its inverse: with the residual :math:`r = f(y) - z` at any point y, the solution of
:math:`f(y^*) = z` lies between :math:`y - r/m` and :math:`y - r/M`. Newton's method on the diagonal converges
in a few steps from almost everywhere, and is tried first. It may overshoot where g bends; values that have not
converged after some steps go on inside their brackets, where a step that leaves the bracket, or is slow to
shrink it, is replaced by its midpoint. Bisection alone needs at most :math:`\log_2` (initial width / rounding)
steps, which is below 60 for slopes down to 0.001 and values up to :math:`10^4`. Fixed-point iteration (Banach)
needs 23,014 steps there for slopes in [.001, 1.999].

What one can ask for is a small *backward* error, :math:`|f(y) - z| / \max(1, |y|, |z|)`, of a few units of
rounding. The forward error is that times the condition number, which no algorithm in this precision avoids.

For maps of several variables with triangular Jacobian the bracket of a variable holds once its ancestors are solved.
:func:`solve_triangular` takes Newton steps for all variables together, which settle level after
level, and finishes the samples for which this is slow by solving level by level.

Gradients come from the implicit function theorem, so memory does not grow with the number of iterations:
:func:`implicit_step` for one-dimensional maps, :func:`implicit_triangular` for triangular ones. They are first
derivatives; differentiating twice raises.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_graphflows.errors import ConvergenceError, GraphflowsError, GraphflowsWarning
from pyro_graphflows.nn.operation import Operation

__all__ = [
    "Bounds",
    "Solver",
    "implicit_step",
    "implicit_triangular",
    "solve_elementwise",
    "solve_triangular",
]

ValueAndSlope = Callable[[Tensor], tuple[Tensor, Tensor]]

NEWTON_STEPS = 10  # plain ones, before there are brackets
SETTLING = 3  # of these, before steps are compared with rounding


@dataclass(frozen=True)
class Solver:
    """How to invert a residual map numerically.

    Args:
        tolerance: The backward error to reach, relative to max(1, abs(y), abs(z)); 4 units of rounding of the
            dtype by default. Rounding in the evaluation of the map itself is allowed for.
        max_iterations: The most iterations inside brackets for one variable, and the most plain ones.
        on_failure: ``"raise"`` or ``"warn"`` when values stay unconverged.

    Raises:
        GraphflowsError: If ``on_failure`` is another word, or a number is not positive.
    """

    tolerance: float | None = None
    max_iterations: int = 100
    on_failure: str = "raise"

    def __post_init__(self) -> None:
        if self.on_failure not in ("raise", "warn"):
            raise GraphflowsError(f'Expected on_failure "raise" or "warn"; got {self.on_failure!r}.')
        if self.max_iterations < 1 or (self.tolerance is not None and self.tolerance <= 0):
            raise GraphflowsError(
                f"Expected max_iterations >= 1 and tolerance > 0; got {self.max_iterations}, {self.tolerance}."
            )

    def resolve_tolerance(self, dtype: torch.dtype) -> float:
        """Return the tolerance for tensors of a dtype."""
        return 4 * torch.finfo(dtype).eps if self.tolerance is None else self.tolerance

    def fail(self, what: str, unconverged: int, total: int, worst: float) -> None:
        """Raise or warn about values that did not converge.

        Raises:
            ConvergenceError: If ``on_failure`` is "raise".
        """
        message = (
            f"Expected the inverse of {what} to converge; {unconverged} of {total} values did not (largest "
            f"backward error {worst:.1e}). Raise max_iterations ({self.max_iterations}) or tolerance of "
            f"the Solver, or lower the flow's lipschitz bound; values that are not finite cannot be inverted."
        )
        if self.on_failure == "raise":
            raise ConvergenceError(message)
        warnings.warn(message, GraphflowsWarning, stacklevel=3)


class Bounds(NamedTuple):
    """What is known of a map.

    Attributes:
        slope_min: A positive lower bound of its slopes, broadcastable with its values.
        slope_max: An upper bound of its slopes.
        noise: The size of the terms that are added up in an evaluation: rounding errors of these are allowed for.
    """

    slope_min: Tensor | float
    slope_max: Tensor | float
    noise: Tensor | float = 0.0


@torch.no_grad()
def solve_elementwise(
    function: ValueAndSlope,
    target: Tensor,
    bounds: Bounds,
    *,
    initial: Tensor | None = None,
    solver: Solver | None = None,
    what: str = "a one-dimensional residual map",
) -> Tensor:
    r"""Solve :math:`f_i(y_i) = z_i` for each entry, by Newton's method and, where that fails, inside an exact bracket.

    A few plain Newton steps come first, which cost half as much as bracketed ones and are nearly always
    enough. Each entry stops by itself: when its backward error is below the tolerance, or when its bracket or
    step is within rounding, so that no better floating-point number is known.

    Args:
        function: Maps y to the values :math:`f_i(y_i)` and the slopes :math:`f_i'(y_i)`.
        target: z.
        bounds: Bounds of the slopes.
        initial: Where to start; ``target`` by default.
        solver: Tolerance, iterations, what to do on failure.
        what: The name of the map in messages.

    Returns:
        y, without gradient.

    Raises:
        ConvergenceError: If a value did not converge (or a warning, as the solver says).

    Example:
        >>> import torch
        >>> z = torch.tensor([-3.0, 0.0, 10.0])
        >>> y = solve_elementwise(lambda y: (y + 0.9 * y.sin(), 1 + 0.9 * y.cos()), z, Bounds(0.1, 1.9))
        >>> bool(((y + 0.9 * y.sin() - z).abs() < 1e-4).all())
        True
    """
    solver = solver or Solver()
    accuracy = _Accuracy(target.abs().clamp_(min=1), bounds.noise, solver.resolve_tolerance(target.dtype))
    y = target if initial is None else initial
    y, going = _newton(function, target, y, accuracy, min(NEWTON_STEPS, solver.max_iterations))
    if going is None:
        return y
    y, failure = _bracketed(function, target, (y, going), bounds[:2], accuracy, solver.max_iterations)
    if failure is not None:
        solver.fail(what, *failure)
    return y


class _Accuracy(NamedTuple):
    """When a value is good enough: its backward error, relative to the sizes involved, is below the tolerance."""

    size: Tensor
    noise: Tensor | float
    tolerance: float

    def error(self, residual: Tensor, y: Tensor) -> Tensor:
        """Return the backward errors of values."""
        return residual.abs() / (torch.maximum(y.abs(), self.size) + self.noise)


def _newton(
    function: ValueAndSlope, target: Tensor, y: Tensor, accuracy: _Accuracy, steps: int
) -> tuple[Tensor, Tensor | None]:
    """Take plain Newton steps; return the values and which of them have not converged, None if all have."""
    rounding = torch.finfo(target.dtype).eps
    for step in range(steps):
        value, slope = function(y)
        residual = value - target
        going = ~(accuracy.error(residual, y) <= accuracy.tolerance)
        change = residual.div_(slope)
        if step >= SETTLING:  # steps that are lost in rounding: no better number is known
            going &= ~(change.abs() <= rounding * y.abs())
        count = int(going.sum())
        if not count:
            return y, None
        y = y - change if count == y.numel() else torch.where(going, y - change, y)
    return y, going


def _bracketed(
    function: ValueAndSlope,
    target: Tensor,
    values: tuple[Tensor, Tensor],
    slopes: tuple[Tensor | float, Tensor | float],
    accuracy: _Accuracy,
    max_iterations: int,
) -> tuple[Tensor, tuple[int, int, float] | None]:
    """Finish the values that are going on inside exact brackets; the others stay.

    Returns:
        The values; how many of how many have failed and their largest error, None if none has.
    """
    rounding = torch.finfo(target.dtype).eps
    (y, going), (slope_min, slope_max) = values, slopes
    noise = accuracy.noise
    done = ~going
    y = torch.where(done | y.isfinite(), y, target)
    low = torch.full_like(y, -torch.inf)
    high = torch.full_like(y, torch.inf)
    width_before = high
    for iteration in range(max_iterations):
        value, slope = function(y)
        residual = value - target
        done = done | (accuracy.error(residual, y) <= accuracy.tolerance)
        if bool(done.all()):
            return y, None
        far, near = residual / slope_min, residual / slope_max
        # Rounding in y, in the steps and in the map itself; the bracket must hold the solution nevertheless.
        slack = rounding * (4 * (y.abs() + far.abs()) + noise / slope_min)
        low = torch.maximum(low, y - torch.maximum(far, near) - slack)
        high = torch.minimum(high, y - torch.minimum(far, near) + slack)
        width = high - low
        step = y - residual / slope
        bisect = ~((step >= low) & (step <= high)) | (width > 0.5 * width_before)
        if iteration >= max_iterations // 4:
            bisect = torch.ones_like(bisect)  # from here on the bracket halves in every iteration
        step = torch.where(bisect, low + 0.5 * width, step)
        # No better number is known: the step is lost in rounding, or so is the bracket.
        settled = ((step - y).abs() <= rounding * y.abs()) | (width <= 8 * slack)
        y = torch.where(done, y, step)
        done = done | settled
        width_before = width
    value, _ = function(y)
    error = accuracy.error(value - target, y)
    failed = ~(done | (error <= accuracy.tolerance))
    if bool(failed.any()):
        return y, (int(failed.sum()), failed.numel(), float(error[failed].nan_to_num(torch.inf).max()))
    return y, None


class _Refuse(Operation):
    """The identity on a first derivative, which must not be differentiated again."""

    @staticmethod
    def forward(ctx: Any, derivative: Tensor, source: Tensor) -> Tensor:
        return derivative.view_as(derivative)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            "Expected first derivatives only through the inverse of a flow; got a request for second."
        )


def _first_order(derivative: Tensor, source: Tensor) -> Tensor:
    """Return a derivative such that differentiating it by what ``source`` depends on raises instead of giving zero."""
    if torch.is_grad_enabled():  # only with create_graph=True
        return _Refuse.apply(derivative.detach(), source)
    return derivative


class _ImplicitStep(Operation):
    """One Newton step whose gradient is that of the solution."""

    @staticmethod
    def forward(ctx: Any, solution: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope, residual)
        return solution - residual / slope

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        slope, residual = ctx.saved_tensors
        return None, _first_order(-grad / slope, residual), None


def implicit_step(solution: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
    r"""Return the solution of :math:`f(y) = z` with the gradient of the implicit function theorem.

    The value is that of one more Newton step, ``solution - residual / slope``. The gradient flows through
    ``residual`` alone: :math:`dy = -(\partial f\,d\theta - dz) / f'(y)`.

    Args:
        solution: The numerical solution, without gradient.
        residual: :math:`f(y) - z` at the solution held fixed, with the graph of everything f and z depend on.
        slope: :math:`f'(y)` at the solution.

    Returns:
        The solution. Second derivatives raise an error.
    """
    return _ImplicitStep.apply(solution, residual, slope.detach())


ValueAndDiagonal = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
Interval = tuple[Tensor | float, Tensor | float]


@torch.no_grad()
def solve_triangular(
    function: ValueAndDiagonal,
    target: Tensor,
    levels: Sequence[Tensor],
    slopes: Interval | Callable[[], Interval],
    *,
    solver: Solver | None = None,
    what: str = "a residual block",
) -> tuple[Tensor, Tensor]:
    r"""Solve :math:`f(y) = z` for each column, where the Jacobian of f is triangular in the order of ``levels``.

    Newton steps on the diagonal for all variables together settle the variables level after level; columns
    leave when they have converged. Columns that have not after a few steps more than there are levels are
    finished level by level with :func:`solve_elementwise`, where the brackets are exact. So the safeguard costs
    nothing where Newton's method converges by itself.

    Args:
        function: Maps y of shape (D, n), and the numbers (n,) of the samples it belongs to or None for all, to
            the values and the diagonal of the Jacobian, both of shape (D, n).
        target: z, of shape (D, N).
        levels: The positions of the variables of each level, in order: index tensors.
        slopes: A positive lower bound and an upper bound of the diagonal of the Jacobian, numbers or of
            shape (D,), or a function that returns them if they are needed.
        solver: Tolerance, iterations, what to do on failure.
        what: The name of the map in messages.

    Returns:
        y and the diagonal of the Jacobian at y, both of shape (D, N), without gradient.

    Raises:
        ConvergenceError: If a value did not converge (or a warning, as the solver says).
    """
    solver = solver or Solver()
    tolerance, rounding = solver.resolve_tolerance(target.dtype), torch.finfo(target.dtype).eps
    done: list[tuple[Tensor, Tensor, Tensor]] = []  # numbers, values and diagonals of samples
    columns: Tensor | None = None  # the numbers of those that are left, None for all
    y, rest = target, target
    size = target.abs().clamp_(min=1)
    error_before: Tensor | None = None
    limit = min(solver.max_iterations, 10 + 2 * len(levels))
    for iteration in range(limit + 1):
        value, diagonal = function(y, columns)
        residual = value - rest
        error = (residual.abs() / torch.maximum(y.abs(), size)).amax(0)
        going = ~(error <= tolerance)
        if error_before is not None:
            # Small and no longer halved by a Newton step: this is the rounding in the map itself.
            going &= ~((error <= 100 * rounding) & (error > 0.5 * error_before))
        count = int(going.sum())
        if not count and columns is None:
            return y, diagonal
        if 2 * count < len(going) or iteration == limit:
            numbers = torch.arange(len(going), device=y.device) if columns is None else columns
            left = (~going).nonzero()[:, 0]
            done.append((numbers[left], y.index_select(1, left), diagonal.index_select(1, left)))
            left = going.nonzero()[:, 0]
            columns, error = numbers[left], error[left]
            y, rest, size, residual, diagonal = (
                part.index_select(1, left) for part in (y, rest, size, residual, diagonal)
            )
            if not count or iteration == limit:
                break
        error_before = error
        following = y - residual.div_(diagonal)
        y = following if count == y.shape[1] else torch.where(going, following, y)
    if count and columns is not None:
        solve = partial(solve_elementwise, solver=solver, what=what)
        done.append((columns, *_solve_by_levels(function, rest, columns, levels, slopes, solve)))
    solution, diagonals = torch.empty_like(target), torch.empty_like(target)
    for numbers, values, diagonal in done:
        solution.index_copy_(1, numbers, values)
        diagonals.index_copy_(1, numbers, diagonal)
    return solution, diagonals


def _solve_by_levels(
    function: ValueAndDiagonal,
    target: Tensor,
    columns: Tensor,
    levels: Sequence[Tensor],
    slopes: Interval | Callable[[], Interval],
    solve: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """Solve one level after the other: the ancestors are solved, so that the brackets are exact."""
    y = target.clone()
    interval = slopes() if callable(slopes) else slopes
    low, high = (torch.as_tensor(end).to(y).expand(len(y)).unsqueeze(-1) for end in interval)
    for level in levels:

        def one_level(values: Tensor, level: Tensor = level) -> tuple[Tensor, Tensor]:
            y[level] = values
            value, diagonal = function(y, columns)
            return value[level], diagonal[level]

        y[level] = solve(one_level, target[level], Bounds(low[level], high[level]))
    return y, function(y, columns)[1]


class _ImplicitTriangular(Operation):
    """The identity on a solution, with the gradient of the implicit function theorem."""

    @staticmethod
    def forward(
        ctx: Any,
        solution: Tensor,
        residual: Tensor,
        diagonal: Tensor,
        pull: Callable[[Tensor], Tensor],
        depth: int,
    ) -> Tensor:
        ctx.save_for_backward(diagonal, residual)
        ctx.pull, ctx.depth = pull, depth
        return solution.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None]:
        diagonal, residual = ctx.saved_tensors
        with torch.no_grad():
            # J^T u = grad by the Neumann series in the strictly triangular part, which is nilpotent.
            u = grad / diagonal
            for _ in range(ctx.depth):
                left = grad - ctx.pull(u)
                if not bool(left.any()):
                    break
                u = u + left / diagonal
        return None, _first_order(-u, residual), None, None, None


def implicit_triangular(
    solution: Tensor, residual: Tensor, diagonal: Tensor, pull: Callable[[Tensor], Tensor], depth: int
) -> Tensor:
    r"""Return the solution of :math:`f(y) = z` with the gradient of the implicit function theorem.

    Args:
        solution: The numerical solution, without gradient.
        residual: :math:`f(y) - z` at the solution held fixed, with the graph of everything f and z depend on.
        diagonal: The diagonal of the Jacobian J of f at the solution.
        pull: Maps u to :math:`J^\top u`.
        depth: The number of edges of the longest path among the variables: after as many products the
            solution of the triangular system is exact.

    Returns:
        The solution. Second derivatives raise an error.
    """
    return _ImplicitTriangular.apply(solution, residual, diagonal.detach(), pull, depth)
