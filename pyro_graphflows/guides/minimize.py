"""Going downhill on a smooth function of some hundred numbers: Newton's method and L-BFGS, from poor first points.

Functions may be infinite or undefined far out; steps are shortened until the loss is finite and falls. A normal
goes downhill by the same derivatives, those of the mean over its draws.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pyro_graphflows.guides.sparse_hessians import Products, Sparsity

__all__ = [
    "LEAST_CURVATURE",
    "LEAST_PRECISION",
    "OUTSIDE",
    "Gradients",
    "Hessians",
    "Objective",
    "Products",
    "Rows",
    "alone",
    "first_normal",
    "fit_normal",
    "independent_losses",
    "lbfgs",
    "lbfgs_by",
    "loss_and_gradient",
    "newton",
    "products_at",
    "scaled_eigenvalues",
]

Objective = Callable[[Tensor], Tensor]  # from a vector to a number
Gradients = Callable[[Tensor], tuple[Tensor, Tensor]]  # to the number and its gradient
Evaluation = tuple[Tensor, Tensor, Tensor | None]  # value, gradient, Hessian if known
Rows = Callable[[Tensor], Tensor]  # from vectors in rows to numbers
# errors of a model where it is not defined
OUTSIDE = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]

MOST_EVALUATIONS = 300  # of L-BFGS, line searches not counted
MOST_STEPS = 60  # of Newton's method
MEMORY = 20
ENOUGH = 1e-6  # relative decrease in a step, below which a search ends
SHORTEST = 1e-8  # step of a line search
SUFFICIENT = 1e-4  # Armijo's constant
LEAST_CURVATURE = 1e-7  # relative to the greatest, after each coordinate is scaled by its own
LEAST_PRECISION = 0.25  # of numbers in units of their prior, whose own precision is one
DIFFERENCE = 1e-5  # of points, where products with Hessians cannot be computed or are not finite
# Central differences of gradients at many points: numbers up to which there are any, the processor time of products
# that is long, the distance of points in units of the widths that curvatures suggest, and the asymmetry that is right.
MOST_OF_DIFFERENCES, LONG, SHARE_OF_WIDTH, ASYMMETRY = 16, 0.05, 1e-4, 1e-4
RATES = (0.5,) * 5 + (0.3,) * 5 + (0.1,) * 10  # of a normal's steps: far at first, then means over many draws
NUM_PAIRS = 4  # of opposite draws, for each of them
MOST_CHANGE = 10.0  # of a precision in a step, in units of what it is


def loss_and_gradient(objective: Objective, point: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function's value and gradient; where it cannot be evaluated, infinity and zeros."""
    loss, gradient, _ = _with_graph(objective, point, graph=False)
    return loss.detach(), gradient.detach()


def _with_graph(objective: Objective, point: Tensor, *, graph: bool) -> tuple[Tensor, Tensor, Tensor]:
    point = point.detach().requires_grad_()
    nothing = point.new_full((), math.inf), torch.zeros_like(point), point
    try:
        with torch.enable_grad():
            loss = objective(point)
            (gradient,) = torch.autograd.grad(loss, point, create_graph=graph)
    except OUTSIDE:
        return nothing
    finite = bool(torch.isfinite(gradient).all()) and bool(torch.isfinite(loss))
    return (loss.detach(), gradient, point) if finite else nothing


def products_at(objective: Objective, point: Tensor) -> Products | None:
    """Return what multiplies a function's Hessian at a point by vectors in rows; None where it has no value there."""
    loss, gradient, point = _with_graph(objective, point, graph=True)
    if not bool(torch.isfinite(loss)):
        return None

    def product(vector: Tensor) -> Tensor:
        try:
            (found,) = torch.autograd.grad(gradient, point, vector, retain_graph=True)
        except (RuntimeError, NotImplementedError):  # of operations without second derivatives
            found = torch.full_like(vector, math.nan)
        if not bool(torch.isfinite(found).all()):  # as in `Hessians`
            moved = loss_and_gradient(objective, point.detach() + DIFFERENCE * vector)[1]
            found = (moved - gradient.detach()) / DIFFERENCE
        return found.detach()

    def products(vectors: Tensor) -> Tensor:
        return torch.stack([product(each.to(point)) for each in vectors]) if len(vectors) else vectors

    return products


def independent_losses(log_density: Rows, noise: Tensor) -> Rows:
    """Return a function from rows of means and log-scales, beside each other, to minus the ELBO of such normals.

    Constants are left out; the noise is the same for all.

    Args:
        log_density: From points in rows to log-densities.
        noise: Standard normal, ``(draws, numbers)``.
    """
    size = noise.shape[-1]

    def losses(rows: Tensor) -> Tensor:
        loc, log_scale = rows[:, None, :size], rows[:, None, size:]
        points = loc + log_scale.exp() * noise
        means = log_density(points.flatten(0, 1)).reshape(points.shape[:2]).mean(-1)
        return -means - log_scale.sum((-2, -1))

    return losses


def first_normal(losses: Rows, point: Tensor, log_widths: Tensor, shares: Sequence[float]) -> Tensor | None:
    """Return means and log-scales, beside each other, at the share of widths with the least loss; None if infinite.

    Args:
        losses: Of rows of means and log-scales.
        point: The means.
        log_widths: Logarithms of the widths.
        shares: The shares that are tried.
    """
    tried = [torch.cat([point, log_widths + math.log(share)]) for share in shares]
    values = [float(loss_and_gradient(alone(losses), both)[0]) for both in tried]
    return tried[values.index(min(values))] if math.isfinite(min(values)) else None


def alone(rows: Rows) -> Objective:
    """Return a function of one point that is known as one of many."""
    return lambda point: rows(point.unsqueeze(0))[0]


class Hessians:
    """Values, gradients and Hessians of one function, by what takes the least time.

    Products of the Hessian with vectors are exact, and :class:`Sparsity` learns how few there have to be. Where they
    take long, as those of thousands of small operations do, and the function is known at many points at once, central
    differences of its gradients are one evaluation without second derivatives. They are tried once products have been
    timed, and kept where they take less.

    Args:
        objective: The function.
        rows: The same from many points, in coordinates of about unit size; none if not given.
        sparsity: What is known of its Hessians.

    Attributes:
        has_products: Whether the operations allow products with many vectors, so far as is known.
    """

    def __init__(
        self, objective: Objective, rows: Rows | None = None, sparsity: Sparsity | None = None
    ) -> None:
        self.objective, self._rows = objective, rows
        self.has_products = True
        self._sparsity = sparsity or Sparsity()
        self._seconds: list[float] = []  # of products
        self._differs: bool | None = None  # whether differences take less; None before they are tried
        self._widths: Tensor | None = None

    def at(self, point: Tensor) -> Evaluation:
        """Return value, gradient and Hessian at a point.

        The Hessian is None where it is not finite; the value is infinite where the function cannot be evaluated.
        """
        long = len(self._seconds) > 1 and min(self._seconds) > LONG
        few = self._rows is not None and len(point) <= MOST_OF_DIFFERENCES
        if few and long and self._differs is not False:
            began = time.process_time()
            found = self._by_many_differences(point)
            if self._differs is None:
                self._differs = found is not None and time.process_time() - began < min(self._seconds)
            if found is not None:
                return found
        began = time.process_time()
        loss, gradient, point = _with_graph(self.objective, point, graph=True)
        if not bool(torch.isfinite(loss)):
            return loss, gradient.detach(), None
        hessian = _by_products(gradient, point, self._sparsity)
        self._seconds.append(time.process_time() - began)
        if hessian is None:
            self.has_products = False
        if hessian is None or not bool(torch.isfinite(hessian).all()):
            # second derivatives of some operations are undefined where first ones are known: `logaddexp(x, -inf)`
            hessian = _by_differences(self.objective, point.detach(), gradient.detach())
        return loss, gradient.detach(), self._seen(hessian)

    def cheaply_at(self, point: Tensor) -> Evaluation:
        """Return the same, but no Hessian where that takes longer than value and gradient."""
        return self.at(point) if self._differs else (*loss_and_gradient(self.objective, point), None)

    def _seen(self, hessian: Tensor) -> Tensor | None:
        """Return a Hessian as it is symmetric, and know its widths from now on; None where it is not finite."""
        if not bool(torch.isfinite(hessian).all()):
            return None
        self._widths = hessian.diagonal().abs().clamp(min=1.0).rsqrt()
        return (hessian + hessian.T) / 2

    def _by_many_differences(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return value, gradient and Hessian by differences; None where these are not right."""
        rows, widths, size = self._rows, self._widths, len(point)
        assert rows is not None
        if widths is None:
            return None
        offsets = (SHARE_OF_WIDTH * widths).diag()
        points = point.detach() + torch.cat([offsets, -offsets, torch.zeros_like(offsets[:1])])
        points.requires_grad_()
        try:
            with torch.enable_grad():
                losses = rows(points)
                (slopes,) = torch.autograd.grad(losses.sum(), points)
        except (RuntimeError, *OUTSIDE):  # of memory, say
            return None
        if not bool(torch.isfinite(losses).all()) or not bool(torch.isfinite(slopes).all()):
            return None
        hessian = (slopes[:size] - slopes[size:-1]) / (2 * SHARE_OF_WIDTH * widths.unsqueeze(-1))
        scaled = hessian * widths * widths.unsqueeze(-1)
        if float((scaled - scaled.T).abs().max()) > ASYMMETRY * float(scaled.abs().max()):
            return None
        found = self._seen(hessian)
        return None if found is None else (losses[-1].detach(), slopes[-1], found)


def _by_products(gradient: Tensor, point: Tensor, sparsity: Sparsity) -> Tensor | None:
    """Return the Hessian by products with many vectors at once; None where operations do not allow that."""

    def products(vectors: Tensor) -> Tensor:
        options = {"is_grads_batched": True, "retain_graph": True}
        (rows,) = torch.autograd.grad(gradient, point, vectors.to(point), **options)
        return rows.detach()

    try:
        return sparsity.hessian(products, len(point))
    except (RuntimeError, NotImplementedError):
        return None


def _by_differences(objective: Objective, point: Tensor, gradient: Tensor) -> Tensor:
    rows = []
    for i in range(len(point)):
        moved = point.clone()
        moved[i] += DIFFERENCE
        rows.append((loss_and_gradient(objective, moved)[1] - gradient) / DIFFERENCE)
    return torch.stack(rows)


def scaled_eigenvalues(hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales of the coordinates, and eigenvalues and eigenvectors of the Hessian in units of them."""
    curvature = hessian.diagonal().abs()
    width = curvature.clamp(min=max(1e-12 * float(curvature.max()), 1e-30)).rsqrt()
    values, vectors = torch.linalg.eigh(hessian * width * width.unsqueeze(-1))
    return width, values, vectors


def newton(hessians: Hessians, point: Tensor, steps: int = MOST_STEPS, seconds: float = math.inf) -> Tensor:
    """Go downhill by Newton's method, with absolute values of curvatures, so that saddles are left [2].

    Args:
        hessians: Of the function.
        point: Where to begin.
        steps: The most steps.
        seconds: Of processor time, after which no further step is begun.

    References:
        [2] Dauphin et al. (2014), Identifying and attacking the saddle point problem, NeurIPS.
    """
    hessian: Tensor | None = None
    began = time.process_time()
    for _ in range(steps):
        if time.process_time() - began > seconds:
            return point
        if hessian is None:
            loss, gradient, hessian = hessians.at(point)
        if hessian is None:
            return point
        width, values, vectors = scaled_eigenvalues(hessian)
        values = values.abs().clamp(min=LEAST_CURVATURE * float(values.abs().max()))
        step = -width * (vectors @ ((vectors.T @ (width * gradient)) / values))
        found = _line_search(hessians.cheaply_at, point, float(loss), gradient, step)
        if found is None:
            return point
        gained = float(loss) - float(found[1])
        point, loss, gradient, hessian = found
        if gained < ENOUGH * (1 + abs(float(loss))):
            return point
    return point


def lbfgs(objective: Objective, point: Tensor, seconds: float = math.inf) -> Tensor:
    """Go downhill by L-BFGS, as :func:`lbfgs_by`, on a function of which autograd gives the gradient."""
    return lbfgs_by(partial(loss_and_gradient, objective), point, seconds)


def lbfgs_by(
    gradients: Gradients, point: Tensor, seconds: float = math.inf, steps: int = MOST_EVALUATIONS
) -> Tensor:
    """Go downhill by L-BFGS [3]; steps are shortened until the loss falls, also from where it is infinite.

    Args:
        gradients: The function with its gradient, infinity and zeros where it cannot be evaluated.
        point: Where to begin.
        seconds: Of processor time, after which no further step is begun.
        steps: The most of them.

    References:
        [3] Liu and Nocedal (1989), On the limited memory BFGS method, Mathematical Programming 45.
    """

    def evaluate(point: Tensor) -> tuple[Tensor, Tensor, None]:
        return (*gradients(point), None)

    began = time.process_time()
    loss, gradient, _ = evaluate(point)
    pairs: list[tuple[Tensor, Tensor]] = []
    poor = 0
    for _ in range(steps):
        if time.process_time() - began > seconds:
            return point
        step = -_two_loops(gradient, pairs)
        if not pairs:
            step = step / max(1.0, float(step.norm()))
        found = _line_search(evaluate, point, float(loss), gradient, step)
        if found is None:
            if not pairs:
                return point
            pairs = []
            continue
        moved, new_loss, new_gradient, _ = found
        pair = moved - point, new_gradient - gradient
        if float(pair[0] @ pair[1]) > 1e-10 * float(pair[0].norm() * pair[1].norm()):
            pairs = [*pairs[-MEMORY + 1 :], pair]
        gained = float(loss) - float(new_loss)
        point, loss, gradient = moved, new_loss, new_gradient
        poor = poor + 1 if gained < ENOUGH * (1 + abs(float(loss))) else 0
        if poor == 3:
            return point
    return point


def _two_loops(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the inverse Hessian that steps and changes of the gradient suggest, times a gradient."""
    direction = gradient.clone()
    shares = []
    for step, change in reversed(pairs):
        share = (step @ direction) / (step @ change)
        direction = direction - share * change
        shares.append(share)
    if pairs:
        step, change = pairs[-1]
        direction = direction * (step @ change) / (change @ change)
    for (step, change), share in zip(pairs, reversed(shares), strict=True):
        direction = direction + (share - (change @ direction) / (step @ change)) * step
    return direction


def _line_search(
    evaluate: Callable[[Tensor], Evaluation], point: Tensor, loss: float, gradient: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Return a point along a step at which the loss is low enough, and what is known there; None if there is none."""
    slope = float(gradient @ step)
    if not slope < 0:
        return None
    length = 1.0
    while length > SHORTEST:
        moved = point + length * step
        new_loss, new_gradient, hessian = evaluate(moved)
        if float(new_loss) <= loss + SUFFICIENT * length * slope:
            return moved, new_loss, new_gradient, hessian
        length *= 0.5 if math.isfinite(float(new_loss)) else 0.1
    return None


def fit_normal(
    objective: Objective,
    loc: Tensor,
    factor: Tensor,
    generator: torch.Generator | None = None,
    seconds: float = math.inf,
    has_units: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Fit a normal to :math:`e^{-f}` by natural-gradient steps on its ELBO, with fresh draws in each.

    With the mean gradient g and the mean Hessian H of f over the normal's draws [4] these are, at a rate r, steps of
    :math:`-r \Sigma g` of the mean and of :math:`r (H - P) + r^2 (H - P) \Sigma (H - P) / 2` of the precision
    P, which keep it positive definite [5].

    Args:
        objective: The function f, from points in rows to numbers.
        loc: The mean at first.
        factor: A square root of the covariance at first.
        generator: Of the draws; torch's own by default.
        seconds: Of processor time, after which no further step is begun.
        has_units: Whether the coordinates are of about unit size.

    Returns:
        The mean and a square root of the covariance; those given where Hessians cannot be computed.

    References:
        [4] Opper and Archambeau (2009), The Variational Gaussian Approximation Revisited, Neural Computation 21.
        [5] Lin, Schmidt and Khan (2020), Handling the Positive-Definite Constraint in the Bayesian Learning Rule, ICML.
    """
    offsets = torch.zeros_like(factor[:1])

    def mean(centre: Tensor) -> Tensor:
        return objective(centre + offsets).mean()

    def means(centres: Tensor) -> Tensor:
        points = centres.unsqueeze(1) + offsets
        return objective(points.flatten(0, 1)).reshape(points.shape[:2]).mean(-1)

    hessians, began = Hessians(mean, means if has_units else None), time.process_time()
    for rate in RATES:
        if time.process_time() - began > seconds:
            break
        noise = torch.randn(NUM_PAIRS, len(loc), generator=generator).to(loc)
        offsets = torch.cat([noise, -noise]) @ factor.T
        _, gradient, hessian = hessians.at(loc)
        if not hessians.has_products:
            return loc, factor
        if hessian is None:
            factor = 0.5 * factor  # draws so far out that the function cannot be evaluated there
            continue
        white = factor.T @ hessian @ factor
        values, vectors = torch.linalg.eigh(white)
        change = values.clamp(-MOST_CHANGE, MOST_CHANGE) - 1.0
        step = factor.T @ gradient
        step = step / max(1.0, float(step.norm()) / len(loc) ** 0.5)
        loc = loc - rate * (factor @ step)
        change = (1.0 + rate * change + (rate * change).square() / 2).rsqrt()
        factor = factor @ (vectors * change @ vectors.T)  # the signs of eigenvectors are those of rounding
    return loc, factor
