r"""Draws near the posterior's mode for the data of one call, from which a guide for these data can start.

Joint samples of the model say nothing of where the posterior is when priors are wide, and there are none when a prior
is improper. Then the mode, and the curvature of the log-density there, give location and units.

The search is over all latent sites at once, proper ones in the coordinate in which their prior is standard normal
given the values of their parents (:mod:`~pyro_graphflows.distributions.coordinates`), others in unconstrained space.
In these coordinates hierarchies have modes: in centred ones the density of effects and their scale grows without
bound as the scale goes to zero. Where there are few numbers Newton's method is used, since raw units differ by many
orders of magnitude, otherwise L-BFGS. The draws are those of the normal with the mode and the curvature [1], mapped to
the sites' values, so that effects keep the dependence on their scale which the prior gives them.

The mode of many effects and their scale together is far from where the posterior is. If the ELBO of the normal shows
that, independent normals are fitted by their ELBO, over fixed draws of noise and hence by the same methods [2], and get
the covariances of linear response [3]. Where effects have much data of their own, the posterior is normal in
unconstrained space; normals are fitted there as well. What has the best ELBO goes on to the best normal of any
covariance, by natural gradients (:func:`~pyro_graphflows.guides.minimize.fit_normal`).

The model is run in double precision wherever it takes its arguments in that. In single precision the sum over many data
is rounded by more than a step may gain, and squares overflow at points that a search must be able to leave.

Discrete sites that the model enumerates are summed out at each point, and those of a plate that data look up
(:mod:`~pyro_graphflows.guides.class_sums`).

References:
    [1] Tierney and Kadane (1986), Accurate Approximations for Posterior Moments and Marginal Densities, JASA 81.
    [2] Giordano, Ingram and Broderick (2024), Black Box Variational Inference with a Deterministic Objective, JMLR 25.
    [3] Giordano, Broderick and Jordan (2018), Covariances, Robustness, and Variational Bayes, JMLR 19.
"""

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from tqdm import tqdm

from pyro_graphflows.distributions.coordinates import gaussian_coordinate
from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.captured_density import CapturedDensity
from pyro_graphflows.guides.class_sums import ClassSums
from pyro_graphflows.guides.many_numbers import ArrowRoot, arrow_normals
from pyro_graphflows.guides.minimize import (
    LEAST_CURVATURE,
    LEAST_PRECISION,
    Hessians,
    Rows,
    alone,
    first_normal,
    fit_normal,
    independent_losses,
    lbfgs,
    loss_and_gradient,
    newton,
    scaled_eigenvalues,
)
from pyro_graphflows.guides.short_chains import Coordinates, OtherCoordinates, run_short_chains
from pyro_graphflows.guides.sites import is_constant, is_moderate
from pyro_graphflows.infer.enumeration import enumerated, require_no_scales, sum_of_the_rest
from pyro_graphflows.infer.particles import FEW, FEW_ENOUGH
from pyro_graphflows.inspect import TracedModel, common_scale, seed_random_state, undressed
from pyro_graphflows.inspect.arguments import argument_leaves, replaced_arguments
from pyro_graphflows.inspect.prior import SECONDS_WITHOUT_A_BAR, UNCONSTRAINED, unconstrained_of
from pyro_graphflows.inspect.runs import drawn_rows, handled, kept_buffers, support_of
from pyro_graphflows.regression import in_float64

__all__ = [
    "MOST_NUMBERS",
    "LogPosterior",
    "Mode",
    "NormalPrior",
    "find_mode",
    "in_plate_of_draws",
    "nesting_of",
    "newton_mode",
    "with_rows",
]

SPREAD = (
    1e-3  # of the first point about the centres of the priors: at an exact symmetry gradients cannot choose
)
MOST_NEWTON = 300  # numbers up to which each step has a Hessian
MOST_NEWTON_OF_NORMALS = 60  # the same where each point stands for many draws
MOST_BATCHES = 16  # of rows that a model draws, in one evaluation
LEAST_ROWS = 1000  # in one evaluation, if there are so many
MOST_RESTARTED = 20  # numbers up to which the search begins at several points
MOST_RESTARTS = 8
SECONDS_OF_RESTARTS = 3.0  # of processor time
TIE = 0.1  # nats of a mode's mass that are no reason to take another
NEAR = 5.0  # nats by which, of many numbers, a normal may be worse than another from which better ones are sought
SECONDS = 5.0  # of processor time for a mode: where it is not found by then, other searches are more use
FEW_STEPS = 8  # of Newton's method, from a point near the mode if there is one
MOST_NUMBERS = 1000  # beyond which Hessians are arrows
MOST_OF_ALL = 20_000  # beyond which nothing is tried
MOST_JUDGED = 2_000_000  # numbers of all draws that compare normals
NUM_JUDGING = 400  # draws that compare normals
PREFERENCE = 1.0  # nats by which independent ones must be better
NUM_DRAWS = 16  # pairs of opposite ones, for the ELBO
SEARCHES = 3  # of L-BFGS, each from where the last one ended
SHARES_OF_WIDTH = (
    1.0,
    0.3,
    0.1,
    0.03,
)  # tried at first: widths at a point may reach where the density is absurd
FEW_NUMBERS = 64  # up to which natural gradients begin at several normals
MOST_ROUNDS = 3  # of natural gradients, as long as they gain
FEW_SECONDS = 0.02  # of processor time for a gradient at all of them: hundreds are to come
MOST_SECONDS = 0.08
SECONDS_WHERE_BAD = (
    7.0  # of processor time for each search of a slow model whose normal at the mode is far off
)
FAR = 10.0  # nats by which a normal at a mode may be off where time is short
EXACT = 0.02  # nats: where a normal seems as close to the posterior, draws of it are not moved
NEARLY = 0.1  # nats: where a normal seems as close, training is to leave what is linear nearly as it is
CLOSE = 0.5  # nats: where a posterior is that normal about its mode, nothing else is tried
LOG_2PI = math.log(2 * math.pi)
ROWS_PER_NUMBER = 4  # of noise, from which on it is made white

PLATE = "_pyro_graphflows_draws_near_mode"
_Call = tuple[tuple[Any, ...], dict[str, Any]]
MOST_APART, ENOUGH_APART = 16, 2  # points at which densities of many at once are compared with those of each
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


class NormalPrior(NamedTuple):
    """The prior of a site's numbers at one point, in the coordinate in which it is normal.

    Attributes:
        value: The numbers there, ``(numbers,)``.
        loc: The locations of the prior.
        scale: Its scales.
        unconstrained: Whether the coordinate is that of unconstrained space.
    """

    value: Tensor
    loc: Tensor
    scale: Tensor
    unconstrained: bool


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
        centred: Sites that are in unconstrained space whatever their prior is.
        dtype: The type of values; None for that of the parameters of each distribution.
    """

    def __init__(
        self,
        names: Sequence[str],
        coordinates: dict[str, Coordinate],
        point: Tensor | None,
        *,
        stop: bool,
        centred: Collection[str] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.centred = centred
        self.names, self.coordinates, self.point, self.stop = frozenset(names), coordinates, point, stop
        self.values: dict[str, Tensor] = {}
        self.log_densities: dict[str, Tensor] = {}
        self.terms: list[Tensor] = []

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self.names or msg["is_observed"]:
            return
        known = self.coordinates.get(name)
        wanted = is_moderate(fn) and name not in self.centred if known is None else known.proper
        coordinate = gaussian_coordinate(fn) if wanted else None
        if coordinate is not None:
            coordinate = coordinate.expand(fn.batch_shape)
            shape = coordinate.loc.shape
        else:
            transform = biject_to(support_of(fn))
            shape = torch.Size(transform.inverse_shape(fn.shape()))
        if self.point is None:
            start = sum(each.shape.numel() for each in self.coordinates.values())
            part = slice(start, start + shape.numel())
            self.coordinates[name] = Coordinate(part, shape, len(fn.batch_shape), coordinate is not None)
            w = torch.zeros(shape, dtype=self.dtype or _float_type(fn))
        else:
            w = self._numbers(name, fn)
        if coordinate is not None:
            tril = coordinate.scale_tril
            spread = coordinate.scale * w if tril is None else (tril @ w.unsqueeze(-1)).squeeze(-1)
            value = coordinate.transform(coordinate.loc + spread)
        else:
            value = transform(w)
        self.values[name] = value
        if not is_constant(support := support_of(fn)):  # it may differ from point to point
            self.values[unconstrained_of(name)] = biject_to(support).inv(value)
        msg["value"], msg["done"] = value, True
        if self.stop:  # densities are not asked for; of a model that mixes draws they would be for each pair
            return
        if coordinate is not None:
            log_density = -0.5 * w.square()
        else:
            log_density = transform.log_abs_det_jacobian(w, value)
            if _has_density(fn):
                log_density = _summed(log_density, fn) + fn.log_prob(value)
        self.log_densities[name] = _summed(log_density, fn)

    def _numbers(self, name: str, fn: Any) -> Tensor:
        assert self.point is not None
        own = self.coordinates[name]
        flat = self.point[..., own.part].to(self.dtype or _float_type(fn))
        event = own.shape[own.batch_dims :]
        draws = flat.shape[:-1]
        batch = own.shape[: own.batch_dims]
        if draws:  # many draws are along the outermost plate
            depth = len(fn.batch_shape) - len(draws)
            batch = torch.Size((1,) * (depth - len(batch))) + batch
        return flat.reshape((*draws, *batch, *event))

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.stop and self.names <= self.values.keys():
            raise _AllGiven
        if msg["name"] not in self.log_densities:
            return
        # What is masked counts neither in the model nor in the guide, but normals would spread in it without a bound:
        # it keeps its prior.
        own = self.log_densities.pop(msg["name"])
        self.terms.append(scale_and_mask(own, msg["scale"]))


class _AtValues(_AtPoint):
    """Gives latent sites some values, and finds the numbers that belong to them; ends the run after these sites.

    Args:
        posterior: The density whose numbers they are.
        given: The values, of shapes that fit the model.
    """

    def __init__(self, posterior: "LogPosterior", given: Mapping[str, Tensor]) -> None:
        super().__init__(posterior.names, posterior.coordinates, None, stop=True, centred=posterior.centred)
        self.given = given
        self.numbers: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self.names or msg["is_observed"]:
            return
        value = self.given[name]
        coordinate = gaussian_coordinate(fn) if self.coordinates[name].proper else None
        if coordinate is None:
            numbers = biject_to(support_of(fn)).inv(value)
        else:
            coordinate = coordinate.expand(fn.batch_shape)
            offset, tril = coordinate.transform.inv(value) - coordinate.loc, coordinate.scale_tril
            if tril is None:
                numbers = offset / coordinate.scale
            else:
                tril = tril.expand(*offset.shape, -1)
                numbers = torch.linalg.solve_triangular(tril, offset.unsqueeze(-1), upper=False).squeeze(-1)
        self.numbers[name] = numbers
        self.values[name] = msg["value"] = value
        msg["done"] = True


class _PriorsAtPoint(_AtPoint):
    """Finds the priors of some sites at a point, in the coordinates in which they are normal; ends the run after these.

    Args:
        posterior: The density whose numbers they are.
        point: The point.
        wanted: The sites.
    """

    def __init__(self, posterior: "LogPosterior", point: Tensor, wanted: Collection[str]) -> None:
        super().__init__(posterior.names, posterior.coordinates, point, stop=True, centred=posterior.centred)
        self.wanted = wanted
        self.priors: dict[str, NormalPrior] = {}

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        name, fn = msg["name"], msg["fn"]
        coordinate = gaussian_coordinate(fn) if name in self.wanted else None
        if coordinate is not None and coordinate.scale_tril is None:
            coordinate = coordinate.expand(fn.batch_shape)
            value = coordinate.transform.inv(self.values[name])
            raw = biject_to(support_of(fn)).inv(self.values[name])
            is_raw = raw.shape == value.shape and torch.allclose(raw, value)
            value, loc, scale = (
                in_float64(part).flatten() for part in (value, coordinate.loc, coordinate.scale)
            )
            self.priors[name] = NormalPrior(value, loc, scale, is_raw)


def nesting_of(traced: TracedModel) -> int:
    """Return how many dimensions a model uses on the left of its events.

    Args:
        traced: The model as traced.
    """
    nodes: Any = traced.trace.nodes
    sites = [node for node in nodes.values() if node["type"] == "sample" and not site_is_subsample(node)]
    dims = [len(node["fn"].batch_shape) for node in sites]
    dims += [-frame.dim for node in sites for frame in node["cond_indep_stack"] if frame.vectorized]
    return max(dims, default=0)


def with_rows(
    model: Callable[..., Any], traced: TracedModel, more: Mapping[str, Tensor]
) -> Callable[..., Any]:
    """Return a model whose plates have the rows of the call, or others in their place.

    Args:
        model: The model.
        traced: The model as traced in the call.
        more: Other rows, by the name of the plate; any number of them.
    """
    rows = Trace()
    nodes: Any = traced.trace.nodes
    for name, node in nodes.items():
        if node["type"] == "sample" and site_is_subsample(node) and name not in more:
            rows.add_node(name, **node)
    replayed: Callable[..., Any] = poutine.replay(model, trace=rows)
    if not more:
        return replayed

    def inside(*args: Any, **kwargs: Any) -> Any:
        with drawn_rows(more):
            return replayed(*args, **kwargs)

    return inside


def _more_rows(traced: TracedModel) -> dict[str, Tensor]:
    """Return more rows of the plates of which the model draws some; none where latent sites belong to them."""
    nodes: Any = traced.trace.nodes
    drawn: dict[str, Any] = {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample"
        and site_is_subsample(node)
        and (node["fn"].subsample_size or math.inf) < node["fn"].size
    }
    local = {frame.name for name in traced.graph.latent for frame in nodes[name]["cond_indep_stack"]}
    if local.intersection(drawn):
        return {}
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, node in drawn.items():
        most = max(MOST_BATCHES * node["fn"].subsample_size, LEAST_ROWS)
        found[name] = torch.randperm(node["fn"].size, generator=generator)[:most].to(node["value"])
    return found


def _summed(log_density: Tensor, fn: Any) -> Tensor:
    batch_dims = len(fn.batch_shape)
    return log_density.flatten(batch_dims).sum(-1) if log_density.dim() > batch_dims else log_density


def _has_density(fn: Any) -> bool:
    return not isinstance(undressed(fn), pyro.distributions.ImproperUniform)


def _float_type(fn: Any) -> torch.dtype:
    """Return the type of a distribution's parameters."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    found = [getattr(fn, name, None) for name in getattr(fn, "arg_constraints", {}) if name in vars(fn)]
    types = [each.dtype for each in found if torch.is_tensor(each) and each.is_floating_point()]
    return types[0] if types else torch.get_default_dtype()


@contextmanager
def _default_type(dtype: torch.dtype | None) -> Iterator[None]:
    """Let new tensors be of a type; None for that which they are of."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Mode:
    """A normal approximation of the posterior, in the coordinates of the search.

    Attributes:
        posterior: The log-density of all latent sites of one call.
        point: Its mean.
        factor: A square root of its covariance.
        visited: What short chains from the normal have visited, in units of its covariance; None if there were none.
        is_near: Whether its own draws have shown it to be about the posterior.
    """

    posterior: "LogPosterior"
    point: Tensor
    factor: Tensor
    visited: Tensor | None = None
    is_near: bool = False
    _judged: list[Any] = field(
        default_factory=list, init=False, repr=False, compare=False
    )  # noise, and the log-weights by it

    @property
    def independent(self) -> bool:
        """Whether the numbers are independent."""
        return not bool(torch.triu(self.factor, 1).any() or torch.tril(self.factor, -1).any())

    @property
    def log_volume(self) -> float:
        """Half the logarithm of the covariance's determinant."""
        return float(torch.linalg.slogdet(self.factor)[1])

    @property
    def log_evidence(self) -> float:
        """The log-evidence, if the posterior is the normal that its mode and the curvature there make it [1]."""
        with torch.no_grad():
            height = float(self.posterior(self.point))
        return height + self.posterior.missing + len(self.point) / 2 * LOG_2PI + self.log_volume

    def at(self, noise: Tensor) -> Tensor:
        """Return the points that are standard normal noise away, ``(draws, numbers)``, from the mean."""
        return self.point + noise @ self.factor.T

    @torch.no_grad()
    def _log_weights(self, noise: Tensor) -> Tensor:
        """Return the log-weights of draws, up to a constant; by the same noise they are computed once."""
        if not (self._judged and self._judged[0] is noise):
            log_density = self.posterior(self.at(noise))
            self._judged[:] = noise, log_density + 0.5 * noise.square().sum(-1)
        found: Tensor = self._judged[1]
        return found

    def elbo(self, noise: Tensor) -> float:
        """Return the ELBO by normal noise ``(draws, numbers)``: exact, whatever the noise, if the posterior is normal.

        The mean square of the noise, in the place of its expectation, takes away what it shares with the density.
        """
        constant = self.posterior.missing + len(self.point) / 2 * LOG_2PI + self.log_volume
        found = float(self._log_weights(noise).mean()) + constant
        return found if math.isfinite(found) else -math.inf

    def gap(self, noise: Tensor) -> float:
        """Return half the variance of the log-weights of draws: about the divergence from the posterior, if small.

        The mean of few skewed log-weights may by chance be that of a posterior that is this normal; their variance
        would not be small then.
        """
        return float(self._log_weights(noise).var()) / 2

    def draw(self, number: int, by_chains: bool = False) -> dict[str, Tensor]:
        """Return draws of all sites, along the first dimension; the random state is used and advanced.

        Where they are many, their mean and covariance are those of the normal: what is linear in a normal posterior is
        then found from them without an error.

        Args:
            number: How many; fewer are drawn where the model takes a run for each.
            by_chains: Whether to return what chains have visited, which must be known, and no more than that.
        """
        if by_chains and self.visited is not None:
            noise = self.visited[torch.randperm(len(self.visited))[:number]]
        else:
            noise = _white(torch.randn(number, len(self.point)).to(self.point))
        points = self.at(noise)
        found = self.posterior.values(points)
        if self.posterior.class_sums is None:
            return found
        classes = self.posterior.draw_classes(points)
        fewest = min(map(len, (*found.values(), *classes.values())))
        return {name: value[:fewest] for name, value in (found | classes).items()}

    def with_chains(self, other: "LogPosterior") -> "Mode":
        """Return the same with what short chains visit, where the normal is neither close nor far and there is time.

        The random state is used and advanced.

        Args:
            other: The same density in coordinates in which chains move as well, if they differ.
        """
        start, judging = (
            torch.randn(n, len(self.point)).to(self.point) for n in (2 * NUM_DRAWS, NUM_JUDGING)
        )
        try:
            if not self.posterior.takes_many(start):
                return self
            gap = self.gap(judging)
            visited = self._visited(start, other) if EXACT < gap < FAR else None
            return replace(self, visited=visited, is_near=gap < NEARLY)
        except (RuntimeError, ValueError, ArithmeticError):  # of the model, at values far out
            return self

    def _visited(self, start: Tensor, other: "LogPosterior") -> Tensor | None:
        posterior, both = self.posterior, None
        if other is not posterior and posterior.takes_plate and other.takes_many(start) and other.takes_plate:
            both = OtherCoordinates(
                other,
                lambda points: other.points_of(posterior.values(points)),
                lambda points: posterior.points_of(other.values(points)),
            )
        return run_short_chains(Coordinates(posterior, self.point, self.factor), start, both)


@dataclass(frozen=True)
class ArrowMode(Mode):
    """A normal approximation of thousands of numbers; its factor is that of the numbers that all elements share.

    Attributes:
        root: A square root of the covariance of all.
    """

    root: ArrowRoot = field(kw_only=True)

    @property
    def independent(self) -> bool:
        """Elements follow the shared numbers."""
        return False

    @property
    def log_volume(self) -> float:
        """See :class:`Mode`."""
        return self.root.log_volume

    def at(self, noise: Tensor) -> Tensor:
        """See :class:`Mode`."""
        return self.point + self.root.spread(noise)

    def with_chains(self, other: "LogPosterior") -> "Mode":
        """Return itself: for so many numbers chains would visit too few points."""
        return self


class LogPosterior:
    """The log-density of all latent sites given the data of one call, in coordinates that suit a search.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.
        centred: Sites that are in unconstrained space whatever their prior is.
        sums: How to sum over discrete sites; they are then not among the latent ones.

    Raises:
        UnsupportedModelError: If a latent site is discrete, or depends on one that the model sums over.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        traced: TracedModel,
        centred: Collection[str] = (),
        sums: ClassSums | None = None,
    ) -> None:
        graph = traced.graph
        nodes: Any = traced.trace.nodes
        self.class_sums = sums
        classes: Collection[str] = () if sums is None else sums.classes
        names = [name for name in nodes if name in set(graph.latent).difference(classes)]
        discrete = [name for name in names if nodes[name]["fn"].support.is_discrete]
        if discrete:
            raise UnsupportedModelError(
                f"there is no mode in continuous space: {', '.join(discrete)} is discrete."
            )
        summed = set(graph.marginalised)
        between = [name for name in names if summed.intersection(graph.parents(name))]
        if between:
            raise UnsupportedModelError(f"{between[0]} depends on a site that the model sums over.")
        self.sums = bool(summed)
        # Where latent sites are all scaled, priors and guide alike, the best guide is the prior times the likelihood to
        # the inverse power.
        self.scale = common_scale(nodes[name] for name in names) or 1.0
        if traced.loops:
            raise UnsupportedModelError("plates are loops over a part of their elements.")
        self.model = with_rows(model, traced, {})
        self.args, self.kwargs, self.names = args, kwargs, names
        self.original = model
        self.centred = centred
        self.count: Callable[[], object] = _nothing  # called with each evaluation
        self.captured = CapturedDensity(self._evaluate)
        self._maps = False  # whether many points are one run that torch.func.vmap maps over them
        self.takes_plate = False  # whether they are known to be one run in a plate
        self.nesting = nesting_of(traced)
        self._supports = {name: support_of(nodes[name]["fn"]) for name in names}
        self.coordinates: dict[str, Coordinate] = {}
        self._in_doubles: _Call | None = None
        with torch.no_grad():
            self._run(None)
        if set(self.coordinates) != set(names):
            raise UnsupportedModelError("sites differ from run to run.")
        self.has_more_rows = self._take_more_rows(traced)
        if summed and not self.has_more_rows:
            require_no_scales(traced.trace)
        if any(nodes[name]["value"].dtype != torch.float64 for name in names):
            self._take_doubles()

    def _take_more_rows(self, traced: TracedModel) -> bool:
        """Evaluate densities by more rows than those of the call, if the model takes them from data in full.

        The rows of one call say nothing of the others, and what they say counts for these.

        Returns:
            Whether there are more.
        """
        rows = _more_rows(traced)
        if not rows:
            return False
        few = self.model
        nodes: Any = traced.trace.nodes
        # Not the centre of the priors, where all classes of a logistic regression are as likely.
        point = 0.1 * torch.arange(1, self.size + 1, dtype=torch.float64).cos()

        def density(rows: Mapping[str, Tensor]) -> float:
            self.model = with_rows(self.original, traced, rows)
            with torch.no_grad():
                return float(self._evaluate(point))

        try:
            # A single row in the data of the call fits any number of rows, and is the same whichever they are.
            single = [name for name in rows if nodes[name]["fn"].subsample_size == 1]
            same = [density({**rows, name: rows[name][:1].repeat(len(rows[name]))}) for name in single]
            found = density(rows)
        except Exception:  # of the model: its data are those of the call
            same, found = [], math.nan
        if not math.isfinite(found) or found in same:
            self.model = few
            return False
        return True

    def _take_doubles(self) -> None:
        """Evaluate densities in double precision from now on, if the model can and says the same."""
        centre = torch.zeros(self.size, dtype=torch.float64)
        with torch.no_grad():
            single = float(self(centre))
        try:
            leaves = argument_leaves(self.original, self.args, self.kwargs).values()
            wide = {id(leaf): leaf.double() for leaf in leaves if leaf.is_floating_point()}
            self._in_doubles = replaced_arguments(self.args, self.kwargs, wide)
            double = float(loss_and_gradient(self, centre)[0])
        except Exception:
            # parameters in single precision, a model that checks types, a device that has no other
            self._in_doubles = None
            return
        if math.isfinite(single) and not math.isclose(single, double, rel_tol=0.01, abs_tol=1.0):
            self._in_doubles = None

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return max(each.part.stop for each in self.coordinates.values())

    @property
    def proper(self) -> bool:
        """Whether all sites are in coordinates in which their prior is standard normal."""
        return all(each.proper for each in self.coordinates.values())

    @property
    def least_curvatures(self) -> Tensor:
        """The least curvature of each number that may be believed: of proper ones that of their prior."""
        found = torch.full((self.size,), 1e-12, dtype=torch.float64)
        for each in self.coordinates.values():
            if each.proper:
                found[each.part] = 1.0
        return found

    @property
    def missing(self) -> float:
        """What the log-density lacks: constants of the priors in coordinates of their own."""
        proper = [each.part.stop - each.part.start for each in self.coordinates.values() if each.proper]
        return -sum(proper) / 2 * LOG_2PI

    def centre(self, traced: TracedModel) -> "LogPosterior | None":
        """Return the same with sites that have latent parents in unconstrained space; None if that is the same.

        Args:
            traced: The model as traced.
        """
        graph, latent = traced.graph, set(self.names)
        sites = [
            n for n in self.names if self.coordinates[n].proper and latent.intersection(graph.parents(n))
        ]
        if not sites:
            return None
        return LogPosterior(self.original, self.args, self.kwargs, traced, frozenset(sites), self.class_sums)

    @torch.no_grad()
    def point_from(self, other: "LogPosterior", point: Tensor) -> Tensor:
        """Return the point that has the values of a point of coordinates in which fewer sites are unconstrained."""
        values = other._run(point, stop=True)[0].values
        found = point.clone()
        for name in self.centred:
            raw = biject_to(self._supports[name]).inv(values[name])
            found[self.coordinates[name].part] = in_float64(raw).flatten()
        return found

    def _run(
        self, point: Tensor | None, *, model: Callable[..., Any] | None = None, stop: bool = False
    ) -> tuple[_AtPoint, Any]:
        doubles = None if stop else self._in_doubles  # values are those that the model has
        dtype = None if doubles is None else torch.float64
        options: Any = {"stop": stop, "centred": self.centred, "dtype": dtype}
        messenger = _AtPoint(self.names, self.coordinates, point, **options)
        return messenger, self._run_under(messenger, model or self.model, doubles)

    def _run_under(self, messenger: _AtPoint, model: Callable[..., Any], doubles: _Call | None) -> Any:
        """Run the model; return its trace."""
        args, kwargs = (self.args, self.kwargs) if doubles is None else doubles
        dtype = messenger.dtype
        handler = poutine.trace()
        quiet = kept_buffers(self.original), poutine.block(), pyro.validation_enabled(False)
        with _default_type(dtype), quiet[0], quiet[1], quiet[2], messenger:
            try:
                with handler:
                    model(*args, **kwargs)
            except _AllGiven:
                pass
        return handler.trace

    def __call__(self, point: Tensor) -> Tensor:
        """Return the log-density at a point, ``(numbers,)``, or at many, ``(draws, numbers)``.

        Raises:
            UnsupportedModelError: If the model does not take many draws at once.
        """
        self.count()
        return self.captured(point)

    def _evaluate(self, point: Tensor) -> Tensor:
        many = point.dim() > 1
        if many and self._maps:
            found: Tensor = _mapped(self._evaluate, point)
            return found
        if self.class_sums is not None:
            terms, rest = self._terms_of_classes(point)
            return (rest + terms.logsumexp(-2).sum(-1)) / self.scale
        model = in_plate_of_draws(self.model, len(point), self.nesting) if many else self.model
        if self.sums:
            model = enumerated(model, self.nesting + many)
        messenger, trace = self._run(point, model=model)
        rest = torch.zeros((), dtype=torch.float64)
        if self.sums:
            rest = sum_of_the_rest(trace, self.names, [PLATE] if many else [])
            trace = Trace()
        return (self._sum(point, messenger, trace) + rest) / self.scale

    def _sum(self, point: Tensor, messenger: _AtPoint, trace: Trace, without: Collection[str] = ()) -> Tensor:
        """Return the sum of the terms of a run at a point, or of those of each of many, without those of some sites."""
        terms, nodes = messenger.terms, dict[str, Any](trace.nodes)
        for name, node in nodes.items():
            known = name in self.coordinates or name in without
            if node["type"] == "sample" and not known and not site_is_subsample(node):
                own = node["fn"].log_prob(node["value"])
                terms.append(scale_and_mask(own, node["scale"], node["mask"]))
        none = torch.zeros((), dtype=torch.float64)
        if point.dim() == 1:
            return sum((in_float64(term.sum()).cpu() for term in terms), none)
        if any(term.dim() != 1 + self.nesting or len(term) != len(point) for term in terms):
            raise UnsupportedModelError("the model does not take many draws at once.")
        flat = [in_float64(term.reshape(len(point), -1).sum(-1)).cpu() for term in terms]
        return sum(flat, none.expand(len(point)))

    def _terms_of_classes(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms of elements in each class, ``(*draws, classes, elements)``, and the sum of all others."""
        sums, many = self.class_sums, point.dim() > 1
        assert sums is not None
        found, rest = [], torch.zeros((), dtype=torch.float64)
        for i in range(sums.number):
            model = sums.at(self.model, i)
            model = in_plate_of_draws(model, len(point), self.nesting) if many else model
            messenger, trace = self._run(point, model=model)
            terms, more = sums.terms(trace, draws=many)
            found.append(terms)
            if i == 0:
                rest = more + self._sum(point, messenger, trace, sums.looked_up)
        return torch.stack(found, -2), rest

    @torch.no_grad()
    def draw_classes(self, points: Tensor) -> dict[str, Tensor]:
        """Return draws of the discrete sites that are summed over, given all others at many points."""
        assert self.class_sums is not None
        if self.takes_plate:
            terms = self._terms_of_classes(points)[0]
        elif self._maps:
            terms = _mapped(lambda point: self._terms_of_classes(point)[0], points)
        else:
            terms = torch.stack([self._terms_of_classes(point)[0] for point in points[:SINGLE_RUNS]])
        return self.class_sums.draw(terms)

    def takes_many(self, points: Tensor) -> bool:
        """Whether the log-densities at many points at once are those at each.

        A model that does not take a plate around it, as one with ``x @ weights``, is mapped over the points.
        """
        with torch.no_grad():
            for self._maps in (False, True):
                try:
                    together = self(points)
                    apart = self._some_apart(points)
                except Exception:  # of the model, or of a mapped operation
                    continue
                known = together[: len(apart)]
                if bool(apart.isfinite().any()) and torch.allclose(known, apart, 1e-4, 1e-4, equal_nan=True):
                    self.takes_plate = not self._maps
                    return True
        self._maps = self.takes_plate = False
        return False

    def _some_apart(self, points: Tensor) -> Tensor:
        """Return log-densities at the first points, one by one, until some are finite: they may not be far out."""
        found: list[Tensor] = []
        for point in points[:MOST_APART]:
            found.append(self(point))
            if sum(bool(each.isfinite()) for each in found) == ENOUGH_APART:
                break
        return torch.stack(found)

    def hessians(self) -> Hessians:
        """Return what finds Hessians of minus the density, by many points at once where those are known to be right."""

        def negative(points: Tensor) -> Tensor:
            return -self(points)

        takes_many = self.takes_plate or self._maps
        return Hessians(negative, negative if takes_many and self.proper else None)

    # ---------------------------------------------------------------- values at many points

    @torch.no_grad()
    def values(self, points: Tensor) -> dict[str, Tensor]:
        """Return the values of the sites at many points, ``(draws, *batch shape, *event shape)`` each.

        Beside them are the unconstrained values of sites whose support may differ from point to point.
        """
        checked = [self._run(point, stop=True)[0].values for point in points[:2]]

        def is_right(found: Mapping[str, Tensor] | None) -> bool:
            return found is not None and all(
                torch.allclose(found[name][i], each[name], 1e-3, 1e-6, equal_nan=True)
                for i, each in enumerate(checked)
                for name in self.names
            )

        mixes = len(points) > FEW_ENOUGH and not is_right(self._in_a_plate(points[:FEW]))
        ways = () if mixes else (self._in_a_plate,)
        for way in (*ways, self._as_map, self._one_by_one):
            found = way(points)
            if found is not None and is_right(found):
                return found
        raise UnsupportedModelError("values of sites differ from run to run.")

    @torch.no_grad()
    def points_of(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the points, ``(draws, numbers)``, at which sites have some values.

        Args:
            values: As :meth:`values` returns them, of a model that takes a plate of draws.
        """
        number = len(next(iter(values.values())))
        given = {}
        for name in self.names:
            missing = (1,) * (self.nesting - self.coordinates[name].batch_dims)
            given[name] = values[name].reshape(number, *missing, *values[name].shape[1:])
        messenger = _AtValues(self, given)
        self._run_under(messenger, in_plate_of_draws(self.model, number, self.nesting), None)
        found = torch.empty(number, self.size, dtype=torch.float64)
        for name, numbers in messenger.numbers.items():
            found[:, self.coordinates[name].part] = in_float64(numbers).reshape(number, -1)
        return found

    @torch.no_grad()
    def priors_at(self, point: Tensor, names: Collection[str]) -> dict[str, NormalPrior]:
        """Return the priors of sites at a point, of those whose numbers are normal and independent in them.

        Args:
            point: The point, ``(numbers,)``.
            names: The sites.
        """
        messenger = _PriorsAtPoint(self, point, names)
        self._run_under(messenger, self.model, None)
        return messenger.priors

    def _in_a_plate(self, points: Tensor) -> dict[str, Tensor] | None:
        try:
            model = in_plate_of_draws(self.model, len(points), self.nesting)
            values = self._run(points, model=model, stop=True)[0].values
        except Exception:  # of the model: it does not take batches
            return None
        found = {}
        for name, value in values.items():
            own = self.coordinates[name.removesuffix(UNCONSTRAINED)]
            event = value.shape[1 + self.nesting :]
            shape = torch.Size((len(points), *own.shape[: own.batch_dims], *event))
            if value.dim() <= self.nesting or value.shape[0] != len(points) or value.numel() != shape.numel():
                return None
            found[name] = value.reshape(shape)
        return found

    def _as_map(self, points: Tensor) -> dict[str, Tensor] | None:
        try:
            return dict(_mapped(lambda point: self._run(point, stop=True)[0].values, points))
        except Exception:  # of the model, or of a mapped operation
            return None

    def _one_by_one(self, points: Tensor) -> dict[str, Tensor]:
        runs = [self._run(point, stop=True)[0].values for point in points[:SINGLE_RUNS]]
        return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def in_plate_of_draws(model: Callable[..., Any], number: int, nesting: int) -> Callable[..., Any]:
    """Return a model inside a plate of draws.

    Args:
        model: The model.
        number: How many draws there are.
        nesting: How many dimensions the model uses on the left of its events.
    """
    return handled(model, partial(pyro.plate, PLATE, number, dim=-1 - nesting))


def _mapped(function: Callable[[Tensor], Any], points: Tensor) -> Any:
    """Return what a function of one point gives for each of many, by one run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # of operations that are not mapped
        return torch.func.vmap(function)(points)


# ---------------------------------------------------------------- the search


def find_mode(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    traced: TracedModel,
    sums: ClassSums | None = None,
) -> Mode:
    """Search for a normal approximation of all latent sites given the data of a call.

    The random state is used and advanced, by as much whatever the search takes.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.
        sums: How to sum over discrete sites, which are then drawn given all others.

    Raises:
        UnsupportedModelError: If there is none that can be found: discrete sites, too many numbers, or no point near
            the centres of the priors at which the density is finite.
    """
    posterior = LogPosterior(model, args, kwargs, traced, sums=sums)
    if posterior.size > MOST_OF_ALL:
        raise UnsupportedModelError(
            f"the search for a mode has {posterior.size} numbers; {MOST_OF_ALL} are the most."
        )
    with tqdm(
        desc="place of the posterior", unit=" evaluations", leave=False, delay=SECONDS_WITHOUT_A_BAR
    ) as bar:
        posterior.count = bar.update
        seed = int(torch.randint(2**31, ()))
        is_long = posterior.size > MOST_NUMBERS
        found = _search_of_many(posterior, traced) if is_long else _search(posterior, traced)
        seed_random_state(seed)
        found = found.with_chains(posterior)
        seed_random_state(seed)
    for each in (posterior, found.posterior):
        each.count = _nothing
        each.captured.forget()
    return found


def _nothing() -> None:
    """Count no evaluations."""


def _search(posterior: LogPosterior, traced: TracedModel) -> Mode:
    size, generator = posterior.size, _own_generator()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start = _first_point(posterior, generator)
    noise = normal(NUM_DRAWS, size)
    noise = torch.cat([noise, -noise])
    takes_many = posterior.takes_many(noise)
    laplace = _laplace(posterior, start)
    if laplace is None:
        raise UnsupportedModelError("the curvature at the mode is not finite.")
    if not takes_many:
        return laplace
    seconds = _seconds_of_gradient(posterior, noise)
    if seconds > MOST_SECONDS:
        return _wherever_it_is_bad(laplace, noise, start, generator)
    is_slow = seconds > FEW_SECONDS
    if abs(laplace.elbo(noise) - laplace.log_evidence) < CLOSE and laplace.gap(noise) < CLOSE:
        return laplace
    starts = (start,) if is_slow else (laplace.point, start)
    found = [laplace, *_variational(posterior, starts, generator)]
    noise = normal(NUM_JUDGING, size)
    best = _best(found, noise)
    if is_slow:
        return _best([best, _fitted(best, noise, 1, generator)], noise)
    centred = _centred(posterior, best.point, traced, generator)
    firsts = [best, *([_best(centred, noise)] if centred else [])]
    if size > FEW_NUMBERS:  # each fit takes long
        most = max(each.elbo(noise) for each in firsts)
        firsts = [_fitted(each, noise, 1, generator) for each in firsts if each.elbo(noise) > most - NEAR]
        firsts = [_best(firsts, noise)]
    elif posterior.proper:  # a poor normal may lead to the better one
        firsts.append(Mode(posterior, start, torch.eye(size, dtype=torch.float64)))
    fitted = [_fitted(each, noise, MOST_ROUNDS, generator) for each in firsts]
    return _best([each for pair in zip(firsts, fitted, strict=True) for each in pair], noise)


def _own_generator() -> torch.Generator:
    """Return a generator that follows from the random state: how often a model draws at a run may depend on time."""
    return torch.Generator().manual_seed(int(torch.randint(2**31, ())))


def _first_point(posterior: LogPosterior, generator: torch.Generator) -> Tensor:
    """Return a point at which the density is finite, near the centres of the priors if there is one."""
    spread = SPREAD
    for _ in range(11):
        point = spread * torch.randn(posterior.size, generator=generator, dtype=torch.float64)
        if bool(torch.isfinite(loss_and_gradient(lambda point: -posterior(point), point)[0])):
            return point
        spread = 1.0
    raise UnsupportedModelError("the model's density is not finite at any point that was tried.")


def _search_of_many(posterior: LogPosterior, traced: TracedModel) -> Mode:
    """Return the best normal of those that an arrow describes, in the coordinates of the priors or unconstrained."""
    generator = _own_generator()
    start = _first_point(posterior, generator)

    def normals(posterior: LogPosterior, start: Tensor, has_mode: bool) -> list[Mode]:
        parts = [each.part for each in posterior.coordinates.values()]
        sites = [range(part.start, part.stop) for part in parts]
        rest = (sites, posterior.least_curvatures, generator)
        found = arrow_normals(posterior, start, *rest, has_mode=has_mode)
        return [ArrowMode(posterior, loc, root.root, root=root) for loc, root in found]

    if not posterior.takes_many(torch.stack([start, start])):
        raise UnsupportedModelError(
            f"the model does not take many points at once, of {posterior.size} numbers."
        )
    if _seconds_of_gradient(posterior, torch.stack([start, start])) > MOST_SECONDS:
        raise UnsupportedModelError(f"a search among {posterior.size} numbers would take long.")
    found = normals(posterior, start, True)
    if not found:
        raise UnsupportedModelError("the curvature at the mode is not finite.")
    number = max(2 * NUM_DRAWS, min(NUM_JUDGING, MOST_JUDGED // posterior.size))
    noise = torch.randn(number, posterior.size, generator=generator, dtype=torch.float64)
    best = _best(found, noise)
    centred = posterior.centre(traced) if best.gap(noise) > CLOSE else None
    if centred is None or centred.size != posterior.size:
        return best
    centred.count = posterior.count
    point = centred.point_from(posterior, best.point)
    if not centred.takes_many(torch.stack([point, point])):
        return best
    return _best([best, *normals(centred, point, False)], noise)


def _wherever_it_is_bad(laplace: Mode, noise: Tensor, start: Tensor, generator: torch.Generator) -> Mode:
    """Return the normal at the mode, or a better one where that is far from the posterior as its own draws show.

    Args:
        laplace: The normal at the mode, of a density that takes long.
        noise: Draws to judge it by.
        start: Where the search for the mode began.
        generator: Of noise.
    """
    if laplace.elbo(noise) > laplace.log_evidence - FAR and laplace.gap(noise) < FAR:
        return laplace
    found = [replace(laplace, factor=share * laplace.factor) for share in SHARES_OF_WIDTH]
    found += _variational(laplace.posterior, (laplace.point, start), generator, SECONDS_WHERE_BAD)
    # by more draws: of few, none may be where the density is absurd
    noise = torch.randn(NUM_JUDGING, len(start), generator=generator).to(noise)
    best = _best(found, noise)
    return _best([best, _fitted(best, noise, 1, generator, SECONDS_WHERE_BAD)], noise)


def _seconds_of_gradient(posterior: LogPosterior, points: Tensor) -> float:
    """Return the processor time that a gradient at many points takes, at best."""
    seconds = []
    for _ in range(2):  # the first may be slow for other reasons
        began = time.process_time()
        loss_and_gradient(lambda flat: -posterior(flat.reshape(points.shape)).mean(), points.flatten())
        seconds.append(time.process_time() - began)
    return min(seconds)


def _fitted(
    mode: Mode,
    noise: Tensor,
    most_rounds: int,
    generator: torch.Generator,
    seconds: float = math.inf,
) -> Mode:
    """Return the normal of any covariance to which natural gradients lead from another one; of many numbers itself."""
    if len(mode.point) > MOST_NEWTON:
        return mode
    posterior, elbo = mode.posterior, mode.elbo(noise)
    for _ in range(most_rounds):
        loc, factor = fit_normal(
            lambda points: -posterior(points), mode.point, mode.factor, generator, seconds, posterior.proper
        )
        moved = Mode(posterior, loc, factor)
        before, elbo = elbo, moved.elbo(noise)
        if not elbo > before:
            break
        mode = moved
        if elbo < before + CLOSE:
            break
    return mode


def _laplace(posterior: LogPosterior, start: Tensor) -> Mode | None:
    """Return the mode and the curvature there; of few numbers, of several modes the one with the most mass.

    Mixtures and what is like them have modes in which a component is not used. Further searches begin at random points,
    which are the same in each set-up, as many as there is time for.
    """
    hessians = posterior.hessians()

    def search(first: Tensor) -> Mode | None:
        return newton_mode(posterior, first, hessians)

    began = time.process_time()
    best = search(start)
    if len(start) > MOST_RESTARTED:
        return best
    generator = torch.Generator().manual_seed(0)
    number = int(SECONDS_OF_RESTARTS / max(time.process_time() - began, 1e-3))
    for _ in range(min(number, MOST_RESTARTS)):
        found = search(torch.randn(len(start), generator=generator, dtype=torch.float64))
        if found is not None and (best is None or found.log_evidence > best.log_evidence + TIE):
            best = found
    return best


def newton_mode(posterior: LogPosterior, first: Tensor, hessians: Hessians | None = None) -> Mode | None:
    """Return the mode to which a search from a point leads, and the curvature there; None where that is not finite.

    Args:
        posterior: The density.
        first: The point.
        hessians: What finds its Hessians.
    """
    hessians = hessians or posterior.hessians()
    is_small = len(first) <= MOST_NEWTON
    point = newton(hessians, first, seconds=SECONDS) if is_small else lbfgs(hessians.objective, first)
    hessian = hessians.at(point)[2]
    if hessian is None:
        return None
    least = LEAST_PRECISION if posterior.proper else None
    return Mode(posterior, point, _square_root_of_inverse(hessian, least))


def _best(found: Sequence[Mode], noise: Tensor) -> Mode:
    # independent normals are too narrow beyond what their ELBO says: a guide will follow the dependences
    elbos = [each.elbo(noise) - (PREFERENCE if each.independent else 0.0) for each in found]
    return found[elbos.index(max(elbos))]


def _centred(
    posterior: LogPosterior, near: Tensor, traced: TracedModel, generator: torch.Generator
) -> list[Mode]:
    """Return the mode, and the curvature there, where sites with latent parents are in unconstrained space.

    Of effects about which their data say more than their prior does, the posterior is nearly normal there, and in
    units of their prior it is not. Where the density has no mode, as the effects' scale runs away to zero, few steps
    of Newton's method end anywhere, and the ELBO says so.

    Args:
        posterior: The density in the coordinates of the priors.
        near: A point in these, from which the search begins.
        traced: The model as traced.
        generator: Of noise.
    """
    centred = posterior.centre(traced)
    if centred is None or centred.size != posterior.size or centred.size > MOST_NEWTON:
        return []
    centred.count = posterior.count
    hessians = centred.hessians()
    point = centred.point_from(posterior, near)
    if not bool(torch.isfinite(loss_and_gradient(hessians.objective, point)[0])):
        return []
    if not centred.takes_many(point + torch.zeros(2, len(point)).to(point)):
        return []
    mode = newton(hessians, point, FEW_STEPS)
    hessian = hessians.at(mode)[2]
    found = [] if hessian is None else [Mode(centred, mode, _square_root_of_inverse(hessian, None))]
    return [*found, *_variational(centred, (mode, point), generator)]


def _variational(
    posterior: LogPosterior,
    points: Sequence[Tensor],
    generator: torch.Generator,
    seconds: float = math.inf,
) -> list[Mode]:
    """Return normal approximations at the optimum of the ELBO of independent normals, by fixed draws of noise [2].

    Their covariances are those of independent normals, of the curvature at their mean, and of linear response [3].

    Args:
        posterior: The density.
        points: Where searches begin.
        generator: Of noise.
        seconds: Of processor time for each search.
    """
    size = posterior.size
    noise = torch.randn(NUM_DRAWS, size, generator=generator, dtype=torch.float64)
    noise = torch.cat([noise, -noise])
    losses = independent_losses(posterior, noise)
    found = []
    for point in points:
        hessian = posterior.hessians().at(point)[2]
        if hessian is not None:
            widths = -hessian.diagonal().abs().maximum(posterior.least_curvatures).log() / 2
            both = first_normal(losses, point, widths, SHARES_OF_WIDTH)
            if both is not None:
                found += _independent(posterior, losses, both, seconds)
    return found


def _independent(posterior: LogPosterior, losses: Rows, both: Tensor, seconds: float) -> list[Mode]:
    """Return the independent normals to which a search for the least loss leads, and others with their mean.

    Args:
        posterior: The density.
        losses: Minus the ELBO for each of many rows of means and log-scales beside each other.
        both: Means and log-scales at first.
        seconds: Of processor time for the search.
    """
    size = posterior.size
    has_time = math.isinf(seconds)
    is_small = 2 * size <= MOST_NEWTON_OF_NORMALS and has_time
    hessians = Hessians(alone(losses), losses if posterior.proper else None)
    if is_small:
        both = newton(hessians, both)
    else:
        for _ in range(SEARCHES if has_time else 1):
            both = lbfgs(hessians.objective, both, seconds)
    loc, scale = both[:size].detach(), both[size:].detach().exp()
    found = [Mode(posterior, loc, scale.diag())]
    own_hessian = posterior.hessians().at(loc)[2]
    if own_hessian is not None:
        least = LEAST_PRECISION if posterior.proper else None
        found.append(Mode(posterior, loc, _square_root_of_inverse(own_hessian, least)))
    hessian = hessians.at(both)[2] if is_small else None
    if hessian is not None:
        width, values, vectors = scaled_eigenvalues(hessian)
        if float(values.min()) > LEAST_CURVATURE * float(values.max()):
            root = (width.unsqueeze(-1) * vectors * values.rsqrt())[:size]
            factor, failed = torch.linalg.cholesky_ex(root @ root.T)
            if not failed:
                found.append(Mode(posterior, loc, factor))
    return found


def _white(noise: Tensor) -> Tensor:
    """Return noise moved to the mean zero and the covariance one, if it has enough rows for that to be a small move."""
    number, size = noise.shape
    if number < ROWS_PER_NUMBER * size:
        return noise
    off = noise - noise.mean(0)
    root = torch.linalg.cholesky(off.mT @ off / number)
    return torch.linalg.solve_triangular(root.mT, off, upper=True, left=False)


def _square_root_of_inverse(hessian: Tensor, least: float | None) -> Tensor:
    """Return a square root of the inverse of a Hessian; directions of no or negative curvature count as flat ones.

    It is symmetric in units of the coordinates: draws by it do not depend on the signs of eigenvectors.
    """
    if least is not None:
        values, vectors = torch.linalg.eigh(hessian)
        return vectors * values.clamp(min=least).rsqrt() @ vectors.T
    width, values, vectors = scaled_eigenvalues(hessian)
    values = values.abs().clamp(min=LEAST_CURVATURE * float(values.abs().max()))
    return width.unsqueeze(-1) * (vectors * values.rsqrt() @ vectors.T)
