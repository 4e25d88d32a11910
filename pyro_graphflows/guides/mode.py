r"""Draws near the posterior's mode for the data of one call, from which a guide for these data can start.

Joint samples of the model say nothing of where the posterior is when priors are wide, and there are none when a prior
is improper. Then the mode, and the curvature of the log-density there, give location and units.

The search is over all latent sites at once, proper ones in the coordinate in which their prior is standard normal
given the values of their parents (:mod:`~pyro_graphflows.distributions.coordinates`), others in unconstrained space.
In these coordinates hierarchies have modes: in centred ones the density of effects and their scale grows without
bound as the scale goes to zero. Where there are few numbers Newton's method is used, since raw units differ by many
orders of magnitude, otherwise L-BFGS. The draws are those of the normal with the mode and the curvature [1, Eq. 4],
mapped to the sites' values, so that effects keep the dependence on their scale which the prior gives them.

References:
    [1] Tierney and Kadane (1986), Accurate Approximations for Posterior Moments and Marginal Densities, JASA 81.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_graphflows.distributions.coordinates import gaussian_coordinate
from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect import TracedModel, undressed
from pyro_graphflows.inspect.trace import kept_buffers

__all__ = ["Mode", "find_mode"]

SPREAD = 0.1  # of the first point about the centres of the priors: at an exact symmetry gradients cannot choose
MOST_NEWTON = 300  # numbers up to which each step has a Hessian
MOST_NUMBERS = 1000  # beyond which there is no Hessian at all
MOST_EVALUATIONS = 200
MOST_STEPS = 60  # of Newton's method
MEMORY = 20
ENOUGH = 1e-6  # relative decrease of the objective in a step, below which a search ends
SHORTEST = 1e-8  # step of a line search
SUFFICIENT = 1e-4  # Armijo's constant
LEAST_CURVATURE = 1e-7  # relative to the greatest, after each coordinate is scaled by its own
LEAST_PRECISION = 0.25  # where all priors are proper: in their coordinates a prior's own precision is one
WIDEST = 60.0  # units of logarithms between scores of -2 and 2
PLATE = "_pyro_graphflows_draws_near_mode"
SINGLE_RUNS = 200  # where the model cannot map many draws at once


@dataclass(frozen=True)
class Coordinate:
    """Where the numbers of a site are in the vector of the search.

    Attributes:
        part: The numbers.
        shape: Their shape at the site.
        batch_dims: How many of its dimensions are the site's batch.
        proper: Whether the prior is standard normal in this coordinate.
    """

    part: slice
    shape: torch.Size
    batch_dims: int
    proper: bool


class _AllGiven(Exception):
    """All latent sites have their values: what follows is not needed."""


class _AtPoint(Messenger):
    """Gives latent sites the values that belong to a point, and adds up their log-densities there.

    It must be outside of the model's own plates, so that it sees distributions in their full batch shape.

    Args:
        coordinates: Of the sites; filled in a first run, in which all sites are drawn at the centres of their priors.
        names: The latent sites.
        point: Shape ``(*draws, numbers)``; None in the first run.
        stop: Whether to end the run once all sites have their values.
    """

    def __init__(
        self, names: Sequence[str], coordinates: dict[str, Coordinate], point: Tensor | None, *, stop: bool
    ) -> None:
        super().__init__()
        self.names, self.coordinates, self.point, self.stop = frozenset(names), coordinates, point, stop
        self.values: dict[str, Tensor] = {}
        self.log_densities: dict[str, Tensor] = {}
        self.log_density: Tensor | float = 0.0

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self.names or msg["is_observed"]:
            return
        known = self.coordinates.get(name)
        wanted = _is_moderate(fn) if known is None else known.proper
        coordinate = gaussian_coordinate(fn) if wanted else None
        if coordinate is not None:
            coordinate = coordinate.expand(fn.batch_shape)
            shape = coordinate.loc.shape
        else:
            transform = biject_to(fn.support)
            shape = torch.Size(transform.inverse_shape(fn.shape()))
        if self.point is None:
            start = sum(each.shape.numel() for each in self.coordinates.values())
            part = slice(start, start + shape.numel())
            self.coordinates[name] = Coordinate(part, shape, len(fn.batch_shape), coordinate is not None)
            w = torch.zeros(shape, dtype=_float_type(fn))
        else:
            w = self._numbers(name, fn)
        if coordinate is not None:
            tril = coordinate.scale_tril
            spread = coordinate.scale * w if tril is None else (tril @ w.unsqueeze(-1)).squeeze(-1)
            value = coordinate.transform(coordinate.loc + spread)
            log_density = -0.5 * w.square()
        else:
            value = transform(w)
            log_density = transform.log_abs_det_jacobian(w, value)
            if _has_density(fn):
                log_density = _summed(log_density, fn) + fn.log_prob(value)
        self.values[name] = value
        self.log_densities[name] = _summed(log_density, fn)
        msg["value"], msg["done"] = value, True

    def _numbers(self, name: str, fn: Any) -> Tensor:
        assert self.point is not None
        own = self.coordinates[name]
        flat = self.point[..., own.part].to(_float_type(fn))
        event = own.shape[own.batch_dims :]
        draws = flat.shape[:-1]
        batch = own.shape[: own.batch_dims]
        if draws:  # many draws are along the outermost plate
            depth = len(fn.batch_shape) - len(draws)
            batch = torch.Size((1,) * (depth - len(batch))) + batch
        return flat.reshape((*draws, *batch, *event))

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] not in self.log_densities:
            return
        own = self.log_densities.pop(msg["name"])
        self.log_density = self.log_density + scale_and_mask(own, msg["scale"], msg["mask"]).sum()
        if self.stop and len(self.values) == len(self.names):
            raise _AllGiven


def _summed(log_density: Tensor, fn: Any) -> Tensor:
    batch_dims = len(fn.batch_shape)
    return log_density.flatten(batch_dims).sum(-1) if log_density.dim() > batch_dims else log_density


def _has_density(fn: Any) -> bool:
    return not isinstance(undressed(fn), pyro.distributions.ImproperUniform)


def _is_moderate(fn: Any) -> bool:
    """Whether the prior's own coordinate is fit for a search.

    That of a gamma prior with the shape 0.001 is not: its median is 1e-300.
    """
    coordinate = gaussian_coordinate(fn) if _has_density(fn) else None
    if coordinate is None or not coordinate.standard:
        return coordinate is not None
    try:
        ends = [biject_to(fn.support).inv(coordinate.transform(w + coordinate.loc)) for w in (-2.0, 2.0)]
    except ValueError:  # scores so far out that they cannot be inverted
        return False
    width = (ends[1] - ends[0]).abs()
    unbounded = biject_to(fn.support).domain is fn.support
    return bool(torch.isfinite(width).all()) and (unbounded or bool((width < WIDEST).all()))


def _float_type(fn: Any) -> torch.dtype:
    """Return the type of a distribution's parameters."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    found = [getattr(fn, name, None) for name in getattr(fn, "arg_constraints", {}) if name in vars(fn)]
    types = [each.dtype for each in found if torch.is_tensor(each) and each.is_floating_point()]
    return types[0] if types else torch.get_default_dtype()


@dataclass(frozen=True)
class Mode:
    """A normal approximation of the posterior about its mode.

    Attributes:
        posterior: The log-density of all latent sites of one call.
        point: The mode, in the coordinates of the search.
        factor: A square root of the covariance there.
        converged: Whether the search ended at a stationary point.
    """

    posterior: "LogPosterior"
    point: Tensor
    factor: Tensor
    converged: bool

    def draw(self, number: int) -> dict[str, Tensor]:
        """Return draws of all sites, along the first dimension; the random state is used and advanced.

        Args:
            number: How many; fewer are drawn where the model takes a run for each.
        """
        noise = torch.randn(number, len(self.point)).to(self.point)
        return self.posterior.values(self.point + noise @ self.factor.T)


class LogPosterior:
    """The log-density of all latent sites given the data of one call, in coordinates that suit a search.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.

    Raises:
        UnsupportedModelError: If a latent site is discrete, or the model marginalises sites.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], traced: TracedModel
    ) -> None:
        graph, nodes = traced.graph, traced.trace.nodes
        names = [name for name in nodes if name in set(graph.latent)]
        discrete = [name for name in names if nodes[name]["fn"].support.is_discrete]
        if discrete or graph.marginalised:
            raise UnsupportedModelError(
                f"there is no mode in continuous space: {', '.join(discrete or graph.marginalised)} is discrete."
            )
        if traced.loops:
            raise UnsupportedModelError("plates are loops over a part of their elements.")
        rows = Trace()
        for name, node in nodes.items():
            if node["type"] == "sample" and site_is_subsample(node):
                rows.add_node(name, **node)
        self.model = poutine.replay(model, trace=rows)
        self.args, self.kwargs, self.names = args, kwargs, names
        self.original = model
        self.nesting = max(
            [len(nodes[name]["fn"].batch_shape) for name in names]
            + [-frame.dim for name in names for frame in nodes[name]["cond_indep_stack"] if frame.vectorized],
            default=0,
        )
        self.coordinates: dict[str, Coordinate] = {}
        with torch.no_grad():
            self._run(None)
        if set(self.coordinates) != set(names):
            raise UnsupportedModelError("sites differ from run to run.")

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return max(each.part.stop for each in self.coordinates.values())

    @property
    def proper(self) -> bool:
        """Whether all sites are in coordinates in which their prior is standard normal."""
        return all(each.proper for each in self.coordinates.values())

    def _run(
        self, point: Tensor | None, *, model: Callable[..., Any] | None = None, stop: bool = False
    ) -> tuple[_AtPoint, Any]:
        messenger = _AtPoint(self.names, self.coordinates, point, stop=stop)
        handler = poutine.trace()
        with kept_buffers(self.original), poutine.block(), pyro.validation_enabled(False), messenger:
            try:
                with handler:
                    (model or self.model)(*self.args, **self.kwargs)
            except _AllGiven:
                pass
        return messenger, handler.trace

    def __call__(self, point: Tensor) -> Tensor:
        """Return the log-density at a point, ``(numbers,)``."""
        messenger, trace = self._run(point)
        total = torch.as_tensor(messenger.log_density).double()
        for name, node in trace.nodes.items():
            if node["type"] == "sample" and name not in self.coordinates and not site_is_subsample(node):
                own = node["fn"].log_prob(node["value"])
                total = total + scale_and_mask(own, node["scale"], node["mask"]).sum().double()
        return total

    def loss_and_gradient(self, point: Tensor, *, graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return the negative log-density, its gradient, and the point at which both were computed.

        Where the model cannot be evaluated, the loss is infinite.
        """
        point = point.detach().requires_grad_()
        try:
            with torch.enable_grad():
                loss = -self(point)
                (gradient,) = torch.autograd.grad(loss, point, create_graph=graph)
        except (ValueError, ArithmeticError, torch.linalg.LinAlgError):  # outside of where the model is defined
            return point.new_full((), math.inf), torch.zeros_like(point), point
        if not bool(torch.isfinite(gradient).all()) or not bool(torch.isfinite(loss)):
            return point.new_full((), math.inf), torch.zeros_like(point), point
        return loss, gradient, point

    def hessian(self, point: Tensor) -> Tensor | None:
        """Return the Hessian of the negative log-density; None where it is not finite."""
        loss, gradient, point = self.loss_and_gradient(point, graph=True)
        if not bool(torch.isfinite(loss)):
            return None
        hessian = _by_products(gradient, point)
        if hessian is None:
            hessian = self._by_differences(point.detach(), gradient.detach())
        return (hessian + hessian.T) / 2 if bool(torch.isfinite(hessian).all()) else None

    def _by_differences(self, point: Tensor, gradient: Tensor) -> Tensor:
        step = 1e-5 if point.dtype == torch.float64 else 1e-3
        rows = []
        for i in range(len(point)):
            moved = point.clone()
            moved[i] += step
            rows.append((self.loss_and_gradient(moved)[1] - gradient) / step)
        return torch.stack(rows).detach()

    # ---------------------------------------------------------------- values at many points

    @torch.no_grad()
    def values(self, points: Tensor) -> dict[str, Tensor]:
        """Return the values of the sites at many points, ``(draws, *batch shape, *event shape)`` each."""
        checked = [self._run(point, stop=True)[0].values for point in points[:2]]
        for way in (self._in_a_plate, self._one_by_one):
            found = way(points)
            if found is not None and all(
                torch.allclose(found[name][i], each[name], 1e-3, 1e-6, equal_nan=True)
                for i, each in enumerate(checked)
                for name in self.names
            ):
                return found
        raise UnsupportedModelError("values of sites differ from run to run.")

    def _in_a_plate(self, points: Tensor) -> dict[str, Tensor] | None:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate(PLATE, len(points), dim=-1 - self.nesting):
                return self.model(*args, **kwargs)

        try:
            values = self._run(points, model=inside, stop=True)[0].values
        except (ValueError, RuntimeError, IndexError):  # the model does not take batches
            return None
        found = {}
        for name, value in values.items():
            own = self.coordinates[name]
            event = value.shape[value.dim() - self._event_dims(name, value, len(points)) :]
            if value.shape[0] != len(points):
                return None
            found[name] = value.reshape((len(points), *own.shape[: own.batch_dims], *event))
        return found

    def _event_dims(self, name: str, value: Tensor, draws: int) -> int:
        return value.dim() - 1 - self.nesting if value.dim() > self.nesting else 0

    def _one_by_one(self, points: Tensor) -> dict[str, Tensor]:
        runs = [self._run(point, stop=True)[0].values for point in points[:SINGLE_RUNS]]
        return {name: torch.stack([run[name] for run in runs]) for name in self.names}


def _by_products(gradient: Tensor, point: Tensor) -> Tensor | None:
    """Return the Hessian by the products with all unit vectors at once; None where operations do not allow that."""
    eye = torch.eye(len(point)).to(point)
    try:
        (rows,) = torch.autograd.grad(gradient, point, eye, is_grads_batched=True)
    except (RuntimeError, NotImplementedError):
        return None
    return rows.detach()


# ---------------------------------------------------------------- the search


def find_mode(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], traced: TracedModel
) -> Mode:
    """Search for the mode of all latent sites given the data of a call; the random state is used and advanced.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.

    Raises:
        UnsupportedModelError: If there is none that can be found: discrete sites, too many numbers, or no point near
            the centres of the priors at which the density is finite.
    """
    posterior = LogPosterior(model, args, kwargs, traced)
    size = posterior.size
    if size > MOST_NUMBERS:
        raise UnsupportedModelError(f"the search for a mode has {size} numbers; {MOST_NUMBERS} are the most.")
    start = SPREAD * torch.randn(size, dtype=torch.float64)
    loss = posterior.loss_and_gradient(start)[0]
    for _ in range(10):
        if bool(torch.isfinite(loss)):
            break
        start = torch.randn(size, dtype=torch.float64)
        loss = posterior.loss_and_gradient(start)[0]
    if not bool(torch.isfinite(loss)):
        raise UnsupportedModelError("the model's density is not finite at any point that was tried.")
    point, converged = _newton(posterior, start) if size <= MOST_NEWTON else _lbfgs(posterior, start)
    hessian = posterior.hessian(point)
    if hessian is None:
        raise UnsupportedModelError("the curvature at the mode is not finite.")
    factor = _square_root_of_inverse(hessian, LEAST_PRECISION if posterior.proper else None)
    return Mode(posterior, point, factor, converged)


def _scaled_eigenvalues(hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales of the coordinates, and eigenvalues and eigenvectors of the Hessian in units of them."""
    curvature = hessian.diagonal().abs()
    width = curvature.clamp(min=max(1e-12 * float(curvature.max()), 1e-30)).rsqrt()
    values, vectors = torch.linalg.eigh(hessian * width * width.unsqueeze(-1))
    return width, values, vectors


def _square_root_of_inverse(hessian: Tensor, least: float | None) -> Tensor:
    """Return a square root of the inverse of a Hessian; directions of no or negative curvature count as flat ones."""
    if least is not None:
        values, vectors = torch.linalg.eigh(hessian)
        return vectors * values.clamp(min=least).rsqrt()
    width, values, vectors = _scaled_eigenvalues(hessian)
    values = values.abs().clamp(min=LEAST_CURVATURE * float(values.abs().max()))
    return width.unsqueeze(-1) * vectors * values.rsqrt()


def _newton(posterior: LogPosterior, point: Tensor) -> tuple[Tensor, bool]:
    """Go downhill by Newton's method, with absolute values of curvatures, so that saddles are left [2].

    References:
        [2] Dauphin et al. (2014), Identifying and attacking the saddle point problem, NeurIPS.
    """
    loss, gradient, _ = posterior.loss_and_gradient(point)
    for _ in range(MOST_STEPS):
        hessian = posterior.hessian(point)
        if hessian is None:
            return point, False
        width, values, vectors = _scaled_eigenvalues(hessian)
        values = values.abs().clamp(min=LEAST_CURVATURE * float(values.abs().max()))
        step = -width * (vectors @ ((vectors.T @ (width * gradient)) / values))
        found = _line_search(posterior, point, float(loss), gradient, step)
        if found is None:
            return point, bool(step.abs().max() < 1e-3)
        moved, new_loss, gradient = found
        gained = float(loss) - float(new_loss)
        point, loss = moved, new_loss
        if gained < ENOUGH * (1 + abs(float(loss))):
            return point, True
    return point, False


def _lbfgs(posterior: LogPosterior, point: Tensor) -> tuple[Tensor, bool]:
    """Go downhill by L-BFGS [3]; steps are shortened until the loss falls, also from where it is infinite.

    References:
        [3] Liu and Nocedal (1989), On the limited memory BFGS method, Mathematical Programming 45.
    """
    loss, gradient, _ = posterior.loss_and_gradient(point)
    pairs: list[tuple[Tensor, Tensor]] = []
    poor = 0
    for _ in range(MOST_EVALUATIONS):
        step = -_two_loops(gradient, pairs)
        if not pairs:
            step = step / max(1.0, float(step.norm()))
        found = _line_search(posterior, point, float(loss), gradient, step)
        if found is None:
            if not pairs:
                return point, False
            pairs = []
            continue
        moved, new_loss, new_gradient = found
        pair = moved - point, new_gradient - gradient
        if float(pair[0] @ pair[1]) > 1e-10 * float(pair[0].norm() * pair[1].norm()):
            pairs = [*pairs[-MEMORY + 1 :], pair]
        gained = float(loss) - float(new_loss)
        point, loss, gradient = moved, new_loss, new_gradient
        poor = poor + 1 if gained < ENOUGH * (1 + abs(float(loss))) else 0
        if poor == 3:
            return point, True
    return point, False


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
    posterior: LogPosterior, point: Tensor, loss: float, gradient: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return a point along a step at which the loss is low enough, its loss and its gradient; None if there is none."""
    slope = float(gradient @ step)
    if not slope < 0:
        return None
    length = 1.0
    while length > SHORTEST:
        moved = point + length * step
        new_loss, new_gradient, _ = posterior.loss_and_gradient(moved)
        if float(new_loss) <= loss + SUFFICIENT * length * slope:
            return moved, new_loss.detach(), new_gradient.detach()
        length *= 0.5 if math.isfinite(float(new_loss)) else 0.1
    return None

