"""The start of fused sites: their priors at joint samples of the model, and their factors fitted beside these.

The priors are kept as columns with the samples, under names of their own, so that whatever is done to rows of samples
is done to them too.

**The factor.** It is the one that, times the prior, fits joint samples. With the prior :math:`N(a_i, b_i^2)` of row i
and a factor :math:`N(W x_i + c, s^2)` the conditional has the location :math:`a_i + K_i (W x_i + c - a_i)` and the
variance :math:`K_i s^2`, where :math:`K_i = b_i^2 / (b_i^2 + s^2)`. Given s, the best W and c are a least-squares
regression with weights :math:`K_i`; s is found by a search. Where the prior's scale is the same in all rows, as in
linear-Gaussian models, s follows from the residual variance, and the start is exact. Vectors have the precision that
the regression has beyond the prior's, on average over rows; where the directions in which the prior is narrow differ
from row to row, the factor that makes the rows likeliest is searched for.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.distributions.fusion import fuse
from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.conditionals.contract import Conditionals, LinearConditional
from pyro_graphflows.guides.conditionals.factors import fused_elements
from pyro_graphflows.guides.conditionals.model_conditionals import ModelConditionals
from pyro_graphflows.guides.fewer_elements import fit_sizes
from pyro_graphflows.guides.plan import BlockPlan, PriorPlan
from pyro_graphflows.guides.priors import read_priors
from pyro_graphflows.guides.samples import Samples, columns_of, evidence_of
from pyro_graphflows.guides.sites import Evidence, SitePrior
from pyro_graphflows.regression import (
    HELD_OUT,
    RIDGE,
    WINSOR,
    Moments,
    Regression,
    in_float64,
    location_and_scale,
    logistic_regression,
    square_root,
    varies,
)

__all__ = [
    "FactorFit",
    "FusedRows",
    "ProductsByScale",
    "WeightedRows",
    "fit_factor",
    "fit_logits",
    "penalty_of",
    "prior_of_rows",
    "solved",
    "standardised",
    "with_priors",
]

FLAT = 2.5  # logarithm of the scale of a factor that says nothing, in units of the prior's spread
WIDEST = 12.0  # the most of it
NARROWEST = 12.0  # in logarithms, below the scale of the prior or of the values: those of exact data
LEAST_GAIN = 2e-3  # nats by which a factor must improve on the prior
MOST_ROWS = 4000  # by which a scale is found
MOST_AT_ONCE = 2_000_000  # numbers, over the scales that are tried at once
COARSE, FINE = 21, 7  # numbers of scales tried, at first and between neighbours of the best
STEPS = 2  # from these neighbours to closer ones
KNOT_STEP = 0.25  # of the log-scale of priors, between which gains are interpolated in the search for a scale
MOST_KNOTS = 33
LEAST_PRECISION = 1e-7  # of what a factor adds to the prior's
MOST_CUBES = 40_000_000  # rows times the cubes of their sizes, by which a factor of vectors is searched for
ROWS_OF_VECTORS = 10  # numbers in rows for each weight of it
MOST_SEARCH_STEPS = 60
RIDGES = (RIDGE, 1e-3, 1e-1)
ROWS_PER_WEIGHT = 200  # with as many, nothing is gained by a choice of ridges


@dataclass(frozen=True)
class FactorFit:
    """A factor, in standardised units of the coordinate.

    Attributes:
        linear: The factor ``N(loc + weights @ inputs, scale_tril @ scale_tril.T)``.
        says_something: Whether samples say more of the site than its prior does.
    """

    linear: Regression
    says_something: bool


def fit_factor(inputs: Tensor, values: Tensor, prior: SitePrior) -> FactorFit:
    """Fit a factor to joint samples.

    Args:
        inputs: What the factor may look at, in rows, ``(n, num_inputs)``.
        values: The site in the coordinate of the prior, standardised, ``(n, size)``.
        prior: The prior in the same units, of each row.
    """
    inputs, values = in_float64(inputs), in_float64(values)
    prior = prior.map(in_float64)
    # Rows are chosen by their priors alone: without those of large values the prior would not be that of the others.
    # Near a posterior, whose spread is the unit, all priors may be wide, or far off; only the others' matter.
    known = prior.loc.isfinite() & prior.log_scale.isfinite()
    middle, width = (_medians(part, known) for part in (prior.loc, prior.log_scale))
    width = width.clamp(min=0.0)
    near = known & ((prior.loc - middle).abs() * torch.exp(-width) < WINSOR)
    near &= prior.log_scale - width < math.log(WINSOR)
    near &= values.isfinite()
    near = near.all(-1) & inputs.isfinite().all(-1)
    flat = FactorFit(_flat(inputs, prior), False)
    inputs, values, prior = inputs[near], values[near], prior.map(lambda each: each[near])
    varying = varies(inputs)  # near a posterior the data do not
    if len(values) < HELD_OUT * (int(varying.sum()) + 2):
        return flat
    fit = (_fit_number if values.shape[-1] == 1 else _fit_vector)(inputs[:, varying], values, prior)
    if fit is None:
        return flat
    weights = flat.linear.weights.clone()
    weights[:, varying] = fit.linear.weights
    return replace(fit, linear=replace(fit.linear, weights=weights))


def _medians(part: Tensor, known: Tensor) -> Tensor:
    """Return the median of each column over the rows that are known; zero where none is."""
    found = torch.where(known, part, torch.full_like(part, math.nan)).nanmedian(0).values
    return found.nan_to_num(0.0)


def _flat(inputs: Tensor, prior: SitePrior) -> Regression:
    """Return a factor that is wide beside all priors, with a margin for those wider than seen."""
    scales = prior.log_scale[:MOST_ROWS]
    if len(scales):
        middle, most = (torch.quantile(scales, at, dim=0) for at in (0.5, 0.975))
        wide = most + (most - middle)
    else:
        wide = scales.sum(0)
    size = prior.loc.shape[-1]
    width = (wide + FLAT).clamp(FLAT, WIDEST).exp().diag_embed()
    return Regression(width.new_zeros(size, inputs.shape[-1]), width.new_zeros(size), width)


# ---------------------------------------------------------------- numbers


def fit_logits(inputs: Tensor, values: Tensor, prior: SitePrior, num_classes: int) -> FactorFit:
    """Fit what is added to a prior's logits.

    Args:
        inputs: What it may look at, in rows, ``(n, num_inputs)``.
        values: The flat vectors of the site, ``(n, size)``.
        prior: The prior of each row.
        num_classes: The number of classes of each variable; 1 for binary ones.
    """
    slopes, intercepts = zip(
        *(
            logistic_regression(inputs, own, offset=logits)
            for own, logits in zip(
                values.split(num_classes, -1), prior.loc.to(inputs).split(num_classes, -1), strict=True
            )
        ),
        strict=True,
    )
    eye = torch.eye(values.shape[-1], dtype=inputs.dtype, device=inputs.device)
    return FactorFit(Regression(torch.cat(slopes), torch.cat(intercepts), eye), True)


def penalty_of(target: Tensor, ridge: float, gain: float) -> Tensor:
    """Return the ridge of slopes and intercept, in units of the mean gain; the intercept, the last, has hardly any."""
    penalty = torch.full_like(target, ridge * max(gain, 1e-12))
    penalty[-1] *= 1e-3
    return penalty


def solved(matrix: Tensor, target: Tensor, penalty: Tensor) -> Tensor:
    """Return the solutions of normal equations with a ridge, a larger one where any of them are singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix + penalty.diag_embed())
    if bool(failed.any()):
        penalty = penalty + 1e-6 * matrix.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        factor = torch.linalg.cholesky(matrix + penalty.diag_embed())
    return torch.cholesky_solve(target.unsqueeze(-1), factor).squeeze(-1)


@dataclass(frozen=True)
class WeightedRows:
    """Rows of a scalar site: inputs with a column of ones, values, and location and log-scale of their priors."""

    inputs: Tensor
    value: Tensor
    loc: Tensor
    log_scale: Tensor

    def at(self, chosen: Tensor) -> "WeightedRows":
        """Return some of the rows."""
        return WeightedRows(self.inputs[chosen], self.value[chosen], self.loc[chosen], self.log_scale[chosen])

    def regress(self, log_width: float, ridge: float) -> Tensor:
        """Return slopes and intercept of a factor of a given scale."""
        gain = torch.sigmoid(2.0 * (self.log_scale - log_width))
        weighted = gain.unsqueeze(-1) * self.inputs
        matrix = weighted.T @ self.inputs / len(self.value)
        target = self.inputs.T @ (self.value - (1.0 - gain) * self.loc) / len(self.value)
        return solved(matrix, target, penalty_of(target, ridge, float(gain.mean())))

    def loss(self, log_width: float, weights: Tensor | None) -> float:
        """Return the mean of -log q; of the prior without weights."""
        if weights is None:
            log_scale, off = self.log_scale, self.value - self.loc
        else:
            ratio = 2.0 * (self.log_scale - log_width)
            log_scale = self.log_scale - 0.5 * torch.nn.functional.softplus(ratio)
            off = self.value - self.loc - torch.sigmoid(ratio) * (self.inputs @ weights - self.loc)
        return float((log_scale + 0.5 * (off * torch.exp(-log_scale)).square()).mean())


class ProductsByScale:
    """Products of rows, summed by the log-scales of their priors: from these follow regressions at many scales.

    A regression weighs each row by its gain, a function of the log-scale of its prior. Here the gain is interpolated
    between knots, and so each row counts at its two neighbours. The loss of what is found differs by the square of
    what that misses.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: WeightedRows) -> None:
        self.rows = rows
        width = rows.inputs.shape[-1]
        low, high = rows.log_scale.min(), rows.log_scale.max()
        most = max(2, min(MOST_KNOTS, MOST_AT_ONCE // width**2))
        number = max(2, min(most, 1 + math.ceil(float(high - low) / KNOT_STEP)))
        self.knots = torch.linspace(float(low), float(high), number).to(rows.inputs)
        place = (rows.log_scale - low) / (self.knots[1] - self.knots[0]).clamp(min=1e-12)
        cell = place.long().clamp(0, number - 2)
        order = cell.argsort()
        sizes = cell.bincount(minlength=number - 1).tolist()
        joint = torch.cat([rows.inputs, rows.loc.unsqueeze(-1)], -1)[order]
        above = (place - cell)[order].unsqueeze(-1)
        self.sums = joint.new_zeros(
            number, width, width + 1
        )  # beside the products of inputs those with locations
        for k, (part, share) in enumerate(zip(joint.split(sizes), above.split(sizes), strict=True)):
            if len(part):
                own = part[:, :width]
                upper = (share * own).T @ part
                self.sums[k] += own.T @ part - upper
                self.sums[k + 1] += upper
        self.sums /= len(rows.value)
        self.offset = rows.inputs.T @ (rows.value - rows.loc) / len(rows.value)

    def regress(self, log_widths: Tensor, ridge: float) -> Tensor:
        """Return slopes and intercept of the factors of some scales, ``(scales, inputs)``."""
        gain = torch.sigmoid(2.0 * (self.knots - log_widths.unsqueeze(-1)))
        sums = (gain @ self.sums.flatten(1)).unflatten(-1, self.sums.shape[1:])
        matrix, target = sums[..., :-1], self.offset + sums[..., -1]
        penalty = (ridge * matrix[:, -1:, -1].clamp(min=1e-12)).repeat(1, target.shape[-1])
        penalty[:, -1] *= 1e-3
        return solved(matrix, target, penalty)

    def losses(self, log_widths: Tensor, ridges: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return for each ridge the losses of the factors of some scales, and slopes and intercepts."""
        rows = self.rows
        ratio = 2.0 * (rows.log_scale - log_widths.unsqueeze(-1))
        gain = torch.sigmoid(ratio)
        log_scale = rows.log_scale - 0.5 * torch.nn.functional.softplus(ratio)
        precision = torch.exp(-2.0 * log_scale)
        weights = torch.stack([self.regress(log_widths, ridge) for ridge in ridges])
        off = rows.value - rows.loc - gain * (weights @ rows.inputs.T - rows.loc)
        return log_scale.mean(-1) + 0.5 * (off.square() * precision).mean(-1), weights

    def search(self, ridges: Sequence[float]) -> list[tuple[float, Tensor]]:
        """Return for each ridge the scale that fits best, with slopes and intercept there.

        Scales are tried coarsely first, then between the neighbours of the best.
        """
        middle = float(self.rows.log_scale.median())
        low, high = min(middle, 0.0) - NARROWEST, max(middle, 0.0) + FLAT
        grid = torch.linspace(low, high, COARSE).to(self.knots)
        best, step = self._best(grid, ridges), float(grid[1] - grid[0])
        for _ in range(STEPS):
            known = best.copy()
            for centre in {at for at, _ in known}:
                members = [i for i, (at, _) in enumerate(known) if at == centre]
                fine = torch.linspace(centre - step, centre + step, FINE).to(self.knots)
                for i, each in zip(members, self._best(fine, [ridges[i] for i in members]), strict=True):
                    best[i] = each
            step = 2 * step / (FINE - 1)
        return best

    def _best(self, log_widths: Tensor, ridges: Sequence[float]) -> list[tuple[float, Tensor]]:
        """Return for each ridge the best of some scales, with slopes and intercept."""
        each = max(1, MOST_AT_ONCE // (len(self.rows.value) * len(ridges)))
        parts = [self.losses(some, ridges) for some in log_widths.split(each)]
        losses = torch.cat([losses for losses, _ in parts], -1).nan_to_num(math.inf)
        weights = torch.cat([weights for _, weights in parts], 1)
        chosen = losses.argmin(-1).tolist()
        return [(float(log_widths[k]), weights[i, k]) for i, k in enumerate(chosen)]


def _fit_number(inputs: Tensor, values: Tensor, prior: SitePrior) -> FactorFit | None:
    one = inputs.new_ones(len(inputs), 1)
    rows = WeightedRows(torch.cat([inputs, one], -1), values[:, 0], prior.loc[:, 0], prior.log_scale[:, 0])
    held_out = torch.arange(len(inputs), device=inputs.device) % HELD_OUT == 0
    some = torch.arange(len(inputs), device=inputs.device) < MOST_ROWS
    most, test = rows.at(~held_out & some), rows.at(held_out)
    constant = bool(rows.log_scale.max() - rows.log_scale.min() < 1e-6)
    few = len(most.value) < ROWS_PER_WEIGHT * most.inputs.shape[-1]
    ridges = RIDGES if few else RIDGES[:1]
    tried: list[tuple[float, float, float]] = []  # loss, ridge and scale
    if constant:
        for ridge in ridges:
            log_width = _of_constant_scale(most, ridge)
            if log_width is not None:
                tried.append((test.loss(log_width, most.regress(log_width, ridge)), ridge, log_width))
    else:
        for ridge, (log_width, weights) in zip(ridges, ProductsByScale(most).search(ridges), strict=True):
            tried.append((test.loss(log_width, weights), ridge, log_width))
    chosen: tuple[float, float, float] | None = None
    for each in tried:
        if chosen is None or each[0] < chosen[0] - 1e-4:
            chosen = each
    if chosen is None or not chosen[0] < test.loss(0.0, None) - LEAST_GAIN:
        return None
    _, ridge, log_width = chosen
    if constant:
        log_width = _of_constant_scale(rows, ridge) or log_width
    weights = rows.regress(log_width, ridge)
    tril = values.new_full((1, 1), math.exp(log_width))
    return FactorFit(Regression(weights[:-1].unsqueeze(0), weights[-1:], tril), True)


def _of_constant_scale(rows: WeightedRows, ridge: float) -> float | None:
    """Return the scale that leaves the residual variance, of priors of one scale; None if a factor adds nothing."""
    log_scale = float(rows.log_scale[0])
    weights = rows.regress(log_scale - 20.0, ridge)  # the factor alone: least squares
    off = rows.value - rows.inputs @ weights
    freedom = max(len(off) - rows.inputs.shape[-1], 1)
    variance = float(off.square().sum()) / freedom
    precision = 1.0 / max(variance, 1e-12) - math.exp(-2.0 * log_scale)
    if precision * math.exp(2.0 * log_scale) < LEAST_PRECISION:
        return None
    return -0.5 * math.log(precision)


# ---------------------------------------------------------------- vectors


def _fit_vector(inputs: Tensor, values: Tensor, prior: SitePrior) -> FactorFit | None:
    size = values.shape[-1]
    slopes, shift, covariance = _least_squares(inputs, values)
    of_prior, prior_shift, _ = _least_squares(inputs, prior.loc)
    tril = prior.tril()
    eye = torch.eye(size, dtype=values.dtype, device=values.device)
    same = bool((tril - tril[0]).abs().max() < 1e-9)
    if not same and prior.scale_tril is not None:
        likeliest = _likeliest_vector(inputs, values, prior.loc, tril, covariance)
        if likeliest is not None:
            return likeliest
    root = tril[0] if same else torch.linalg.cholesky((tril @ tril.mT).mean(0) + 1e-12 * eye)
    precision = torch.cholesky_inverse(root)
    posterior = torch.linalg.inv(covariance)
    extra = posterior - precision
    values_, vectors = torch.linalg.eigh(_whitened(extra, precision))
    if not bool((values_ > 10.0 * LEAST_GAIN).any()):
        return None
    root = torch.linalg.cholesky(precision + 1e-12 * eye)
    kept = values_.clamp(min=1e-8)
    extra = root @ (vectors * kept) @ vectors.T @ root.T
    back = torch.linalg.inv(extra)
    weights = back @ (posterior @ slopes - precision @ of_prior)
    loc = back @ (posterior @ shift - precision @ prior_shift)
    shown = (values_ > 10.0 * LEAST_GAIN).to(values.dtype)  # elsewhere the location has no say
    keep = torch.linalg.solve(root.T, (vectors * shown) @ vectors.T @ root.T)
    return FactorFit(Regression(keep @ weights, keep @ loc, square_root(back)), True)


def _likeliest_vector(
    inputs: Tensor, values: Tensor, loc: Tensor, tril: Tensor, covariance: Tensor
) -> FactorFit | None:
    """Return the factor under which rows are likeliest where the directions of their priors differ from row to row.

    A prior that is narrow in other directions in each row, as that of a Gaussian process of another length scale is,
    has no precision that could stand for all. The loss is convex in the factor's precision and in the product of that
    with its location.

    Args:
        inputs: The inputs of the factor.
        values: The values.
        loc: The locations of their priors.
        tril: The Cholesky factors of these.
        covariance: That of the values beside the inputs: in its units the precision of the posterior is about one.
    """
    size, width = values.shape[-1], inputs.shape[-1]
    number = min(len(values), MOST_ROWS, MOST_CUBES // size**3)
    num_weights = size * (size + 1) / 2 + size * (1 + width)
    if number * size < ROWS_OF_VECTORS * num_weights:
        return None
    unit, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        return None
    ahead, held_out = slice(0, number * 3 // 4), slice(number * 3 // 4, number)
    among = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], -1)[:number]
    white = torch.linalg.solve_triangular(unit, values[:number].T, upper=False).T
    inner = torch.linalg.solve_triangular(tril[:number], unit.expand(number, size, size), upper=False)
    precision = inner.mT @ inner
    above = torch.linalg.solve_triangular(unit, loc[:number].T, upper=False).T
    offset = (precision @ above.unsqueeze(-1)).squeeze(-1)
    eye = torch.eye(size, dtype=values.dtype, device=values.device)

    def loss(root: Tensor, natural: Tensor, rows: slice) -> Tensor:
        factor = torch.linalg.cholesky(precision[rows] + _squared(root))
        target = (offset[rows] + among[rows] @ natural.T).unsqueeze(-1)
        off = (factor.mT @ white[rows].unsqueeze(-1)) - torch.linalg.solve_triangular(
            factor, target, upper=False
        )
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (0.5 * off.squeeze(-1).square().sum(-1) - log_det).mean()

    typical = precision[precision.diagonal(dim1=-2, dim2=-1).sum(-1).argsort()[number // 2]]
    shares, vectors = torch.linalg.eigh(eye - typical)
    first = (vectors * shares.clamp(1e-2, 1.0)) @ vectors.T
    centre = white[ahead].mean(0)
    root = torch.linalg.cholesky(first).clone(memory_format=torch.contiguous_format).requires_grad_()
    natural = torch.cat([white.new_zeros(size, width), (first @ centre).unsqueeze(-1)], -1).requires_grad_()
    search = torch.optim.LBFGS([root, natural], max_iter=MOST_SEARCH_STEPS, line_search_fn="strong_wolfe")

    def closure() -> float:
        search.zero_grad()
        value = loss(root, natural, ahead)
        value.backward()
        return value.item()

    try:
        with torch.enable_grad():
            search.step(closure)
        with torch.no_grad():
            gain = loss(torch.zeros_like(root), torch.zeros_like(natural), held_out) - loss(
                root, natural, held_out
            )
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    if not float(gain) > LEAST_GAIN:
        return None
    root, natural = root.detach(), natural.detach()
    shares, vectors = torch.linalg.eigh(_squared(root))
    back = unit @ (vectors / shares.clamp(min=1e-8)) @ vectors.T
    # where the factor says nothing its location has no say
    shown = (vectors * (shares > 10.0 * LEAST_GAIN) / shares.clamp(min=1e-8)) @ vectors.T
    linear = unit @ shown @ natural
    return FactorFit(Regression(linear[:, :-1], linear[:, -1], square_root(back @ unit.T)), True)


def _squared(root: Tensor) -> Tensor:
    """Return the positive matrix of a lower triangular square root, of which what is above the diagonal has no say."""
    lower = root.tril()
    return lower @ lower.mT


def _whitened(matrix: Tensor, precision: Tensor) -> Tensor:
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    root = torch.linalg.cholesky(precision + 1e-12 * eye)
    inner = torch.linalg.solve_triangular(root, matrix, upper=False)
    inner = torch.linalg.solve_triangular(root, inner.T, upper=False)
    return 0.5 * (inner + inner.T)


def _least_squares(inputs: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return slopes, intercepts and the residual covariance."""
    number, width = inputs.shape
    mean, centre = inputs.mean(0), values.mean(0)
    centred, off = inputs - mean, values - centre
    among = centred.T @ centred / number + RIDGE * torch.eye(width, dtype=inputs.dtype, device=inputs.device)
    slopes = (
        torch.linalg.solve(among, centred.T @ off / number).T if width else values.new_zeros(len(centre), 0)
    )
    residual = off - centred @ slopes.T
    covariance = residual.T @ residual / max(number - width - 1, 1)
    eye = torch.eye(len(centre), dtype=values.dtype, device=values.device)
    return slopes, centre - slopes @ mean, covariance + 1e-12 * eye


TIE = 0.01  # nats by which factors of elements may seem worse than one that reads their summary
GAIN = 0.05  # nats by which a site must be likelier without a prior to be left without it
NUM_KNOTS = 201  # at which the slope of a prior's coordinate is taken
MOST_RUNS = 300  # of the model, where each joint sample takes one


def with_priors(samples: Samples, plan: PriorPlan) -> Samples:
    """Return joint samples with the priors of fused sites at them.

    Args:
        samples: The samples.
        plan: Which sites are fused.
    """
    if samples.values is None or not plan.sites:
        return samples
    draws, sites = samples.draws, sorted(plan.sites)
    number = len(next(iter(samples.values.values())))
    if not plan.batches:
        number = min(number, MOST_RUNS)
        samples = replace(samples, values={name: value[:number] for name, value in samples.values.items()})
    drawn = draws.observed_values(
        number, [name for site in sites for name in draws.traced.graph.parents(site)]
    )
    nodes: Any = draws.traced.trace.nodes
    ranks = {name: (len(nodes[name]["fn"].batch_shape), len(nodes[name]["fn"].event_shape)) for name in drawn}
    plan = replace(plan, ranks={**plan.ranks, **ranks}, checked=False)  # rows with such priors are left out
    depth = max(batch for batch, _ in plan.ranks.values())

    def beside_plates(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = {name: (1,) * (depth - plan.ranks[name][0]) for name in values}
        return {name: v.reshape(number, *missing[name], *v.shape[1:]) for name, v in values.items()}

    latents, observed = beside_plates(draws.latent_values(number)), beside_plates(drawn)
    indices = {name: plate.indices for name, plate in samples.plates.items() if plate.indices is not None}
    conditionals, parts, order = ModelConditionals(draws.model), [], []
    try:
        with torch.no_grad():
            for chosen, arguments, rows in draws.by_rows(number):
                given = {
                    "latents": {name: value[chosen] for name, value in latents.items()},
                    "observed": {name: value[chosen] for name, value in observed.items()},
                    "indices": {**indices, **rows},
                }
                priors = read_priors(conditionals, sites, arguments, draws.sites, plan, given)
                parts.append(_columns(priors, given["latents"], plan))
                order.append(torch.arange(number)[chosen])
    except UnsupportedModelError:
        return samples
    if len(parts) == 1:
        return samples.with_values(parts[0])
    places = torch.cat(order).argsort()
    return samples.with_values(
        {name: torch.cat([part[name] for part in parts])[places.to(draws.like.device)] for name in parts[0]}
    )


def _columns(
    priors: Mapping[str, SitePrior], values: Mapping[str, Tensor], plan: PriorPlan
) -> dict[str, Tensor]:
    """Return priors of sites at samples, and the values there in their coordinates, as columns beside the samples."""
    columns: dict[str, Tensor] = {}
    for name, prior in priors.items():
        value = values[name]
        of_prior, of_value = columns_of(name)
        shape = (len(value), *value.shape[1 : value.dim() - plan.ranks[name][1]])
        parts = [prior.loc, prior.log_scale]
        if prior.scale_tril is not None:
            parts.append(prior.scale_tril.flatten(-2))
        columns[of_prior] = torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)
        if prior.transform is not None:
            raw = prior.transform.inv(value)
            columns[of_value] = raw.reshape(*shape, -1)
    return columns


def prior_of_rows(site: str, size: int, rows: Mapping[str, Tensor]) -> SitePrior | None:
    """Return the prior of a site at rows of joint samples; None where it is not known.

    Args:
        site: The site.
        size: The length of its flat vector.
        rows: The rows, by name.
    """
    column, of_value = columns_of(site)
    if column not in rows:
        return None
    evidence = None
    if evidence_of(site) in rows:
        of_elements = rows[evidence_of(site)]
        evidence = Evidence(of_elements[:, :2], of_elements[0, 2:3], of_elements[0, 3:4])
    loc, log_scale, tril = rows[column].split([size, size, rows[column].shape[-1] - 2 * size], -1)
    root = tril.unflatten(-1, (size, size)) if tril.shape[-1] else None
    return SitePrior(loc, log_scale, root, standard=of_value in rows, evidence=evidence)


WIDTH = 1.0  # of the factors that sites with per-element parameters start with, in units of the prior
ROOT_WIDTH = (
    0.1  # the same of sites in no plate: at the width of their prior the first losses are of wild guesses
)


@dataclass(frozen=True)
class FusedRows:
    """What rows of joint samples say of the fused sites of a block.

    Attributes:
        priors: The priors in the rows.
        values: The values of sites whose coordinate is not their unconstrained vector.
        flat: The unconstrained vectors.
        classes: For discrete sites the number of classes of each variable.
        fewer: Features of the context where summaries are of fewer elements, if they were made.
        sizes: Which of them are functions of numbers of elements alone.
        variances: Which of them are logarithms of variances.
    """

    priors: Mapping[str, SitePrior]
    values: Mapping[str, Tensor]
    flat: Mapping[str, Tensor]
    classes: Mapping[str, int]
    fewer: Tensor | None = None
    sizes: tuple[int, ...] = ()
    variances: tuple[int, ...] = ()

    @classmethod
    def of_block(cls, plan: BlockPlan, samples: Samples) -> "FusedRows":
        """Return the rows of a block.

        Args:
            plan: The block.
            samples: Its samples.
        """
        encodings = {site: samples.draws.sites[site].encoding for site in plan.fused}
        classes = {site: each.num_classes for site, each in encodings.items() if each is not None}
        return cls.of_sites(plan.fused, samples.rows or {}, classes)

    @classmethod
    def of_sites(
        cls,
        sites: Sequence[str],
        rows: Mapping[str, Tensor],
        classes: Mapping[str, int] = MappingProxyType({}),
    ) -> "FusedRows":
        """Return the rows of some sites.

        Args:
            sites: The sites.
            rows: Unconstrained vectors, and the columns of priors where they are known.
            classes: For discrete sites the number of classes of each variable.
        """
        found = {site: prior_of_rows(site, rows[site].shape[-1], rows) for site in sites if site in rows}
        priors = {site: prior for site, prior in found.items() if prior is not None}
        values = {site: rows[columns_of(site)[1]] for site in priors if columns_of(site)[1] in rows}
        return cls(priors, values, {site: rows[site] for site in priors}, classes)

    def at(self, chosen: Any) -> "FusedRows":
        """Return some of the rows."""
        return FusedRows(
            {site: prior.map(lambda each: each[chosen]) for site, prior in self.priors.items()},
            {site: value[chosen] for site, value in self.values.items()},
            {site: value[chosen] for site, value in self.flat.items()},
            self.classes,
            None if self.fewer is None else self.fewer[chosen],
            self.sizes,
            self.variances,
        )

    def without(self, sites: Collection[str]) -> "FusedRows":
        """Return the same without some of the sites."""
        if not sites:
            return self
        return replace(
            self,
            priors={site: each for site, each in self.priors.items() if site not in sites},
            values={site: each for site, each in self.values.items() if site not in sites},
            flat={site: each for site, each in self.flat.items() if site not in sites},
        )

    def set_units_(self, conditionals: Conditionals) -> None:
        """Standardise the coordinates of the sites: as the unconstrained vector, or by the values in the coordinate."""
        for site in self.priors.keys() - self.classes.keys():
            own = self.values.get(site)
            units = conditionals.output_units(site) if own is None else location_and_scale(own)
            conditionals.set_fused_units_(site, units)

    def fit(self, conditionals: Conditionals, site: str, inputs: Tensor) -> FactorFit:
        """Return the factor of a site that fits the rows best.

        Args:
            conditionals: The conditionals; their units are used.
            site: The site.
            inputs: The site's inputs in the rows.
        """
        if site in self.classes:
            values = self.in_coordinate(site).to(inputs)
            return fit_logits(inputs, values, self.priors[site], self.classes[site])
        return fit_factor(inputs, *self.in_units(conditionals, site, inputs))

    def in_units(self, conditionals: Conditionals, site: str, like: Tensor) -> tuple[Tensor, SitePrior]:
        """Return the values of a site and its priors in standardised units of its coordinate.

        Args:
            conditionals: The conditionals, whose units these are.
            site: The site.
            like: A tensor of the type that is wanted.
        """
        shift, scale = (part.to(like) for part in conditionals.fused_units(site))
        values = (self.in_coordinate(site).to(like) - shift) / scale
        return values, standardised(self.priors[site], shift, scale)

    def narrow_(self, conditionals: Conditionals, sites: Collection[str]) -> None:
        """Let sites with per-element parameters of which samples say nothing start narrow.

        Args:
            conditionals: The conditionals.
            sites: The sites of which samples say nothing, which are wide beside their priors, as samples of these are.
        """
        width = WIDTH if conditionals.block.plates else ROOT_WIDTH
        for site in conditionals.block.per_element:
            if site in sites:
                size = len(conditionals.columns[site])
                eye = torch.eye(size, dtype=torch.float64)
                none = eye.new_zeros(size, len(conditionals.inputs_of(site)))
                linear = Regression(none, none.sum(-1), width * eye)
                conditionals.set_fused_(site, conditionals.linear_of(site, linear))

    def fit_(self, conditionals: Conditionals, site: str, rows: Tensor, moments: Moments) -> bool:
        """Start a site at the factor that fits the rows best: its own, or those of the elements of a plate.

        Returns whether the rows say something of it beyond its prior.

        Args:
            conditionals: The conditionals.
            site: The site.
            rows: Features of the context and the sites' vectors in units of outputs.
            moments: Their moments.
        """
        summed = conditionals.block.summed.get(site)
        if summed is None:
            fit = self._fit_own_(conditionals, site, rows)
            if self._is_likelier_alone(conditionals, site, rows, moments, fit.linear):
                conditionals.regress_(site, rows, moments)
            return fit.says_something
        conditionals.set_summed_(site, None)
        if summed.only_summed:
            own = self._regress_(conditionals, site, rows, moments)
        else:
            fit = self._fit_own_(conditionals, site, rows)
            own = self._loss_of_factor(conditionals, site, rows, fit.linear)
        prior = self.priors[site]
        if prior.evidence is None:
            return True
        # Judged by the rows that they were fitted to, many slopes seem better than they are.
        own += len(conditionals.inputs_of(site)) / len(rows)
        scale = conditionals.fused_units(site)[1].to(prior.loc)
        none = prior.loc.new_zeros(1)
        loc, log_scale = fused_elements(none, none, (none, scale), [prior])
        if _loss(self.in_coordinate(site), loc, log_scale) <= own + TIE:
            conditionals.set_summed_(site, (log_scale - scale.log()).mean(0).exp().diag_embed())
        return True

    def log_slope(self, site: str) -> float:
        """Return the mean logarithm of how fast the unconstrained number of a site moves with its coordinate.

        By that much a log-density in the coordinate is larger than in the unconstrained number.

        Args:
            site: A site of one number in a coordinate that is the same in all rows.
        """
        return _mean_log_slope(self.values[site].flatten(), self.flat[site].flatten())

    def in_coordinate(self, site: str) -> Tensor:
        """Return the values of a site in the coordinate of its prior."""
        return self.values.get(site, self.flat[site])

    def _is_likelier_alone(
        self, conditionals: Conditionals, site: str, rows: Tensor, moments: Moments, linear: Regression
    ) -> bool:
        """Whether the rows are likelier under a regression of a number than under its prior times a factor.

        With a prior that is the same in all rows, either is any location and width, in another shape: a likelihood that
        is normal in the number itself is not in the prior's coordinate.
        """
        block = conditionals.block
        may = site in self.values and site in block.by_shape
        if not may or not block.plates or site in block.per_element:
            return False
        beside = self._loss_of_factor(conditionals, site, rows, linear) + self.log_slope(site)
        return _loss(self.flat[site], *_regression(conditionals, site, rows, moments)) < beside - GAIN

    def _regress_(self, conditionals: Conditionals, site: str, rows: Tensor, moments: Moments) -> float:
        """Start a site at a regression without its prior; return its loss."""
        conditionals.regress_(site, rows, moments)
        return _loss(self.in_coordinate(site), *_regression(conditionals, site, rows, moments))

    def _loss_of_factor(
        self, conditionals: Conditionals, site: str, rows: Tensor, linear: Regression
    ) -> float:
        shift, scale = (part.to(rows) for part in conditionals.fused_units(site))
        prior = self.priors[site].map(in_float64)
        loc = shift + scale * (linear.loc + rows[:, conditionals.inputs_of(site)] @ linear.weights.T)
        width = (scale * linear.scale_tril.diagonal()).log()
        return _loss(self.in_coordinate(site), *fuse(prior.loc, prior.log_scale, loc, width))

    def _fit_own_(self, conditionals: Conditionals, site: str, rows: Tensor) -> FactorFit:
        """Start a site at the factor of its own that fits best, and return it."""
        fit = self.fit(conditionals, site, rows[:, conditionals.inputs_of(site)])
        start = conditionals.linear_of(site, fit.linear)
        if fit.says_something and len(fit.linear.loc) == 1 and site not in self.classes:
            start = self._following_sizes(conditionals, site, start, rows)
        conditionals.set_fused_(site, start)
        return fit

    def _following_sizes(
        self, conditionals: Conditionals, site: str, linear: LinearConditional, rows: Tensor
    ) -> LinearConditional:
        """Return a factor that follows the numbers of elements of summaries."""
        parents = [parent for parent in conditionals.block.parents[site] if parent in linear.weights]
        inputs = {j: parent for parent in parents for j in conditionals.columns[parent]}
        sizes, variances = ([j for j in of if j in inputs] for of in (self.sizes, self.variances))
        if self.fewer is None or not sizes:
            return linear
        fewer = torch.cat([self.fewer.to(rows), rows[:, self.fewer.shape[-1] :]], -1).clamp(-WINSOR, WINSOR)
        shift, scale = (part.to(rows) for part in conditionals.fused_units(site))
        locs = linear.loc[0] + sum(
            (fewer[:, list(conditionals.columns[parent])] @ linear.weights[parent][0] for parent in parents),
            rows.new_zeros(len(rows)),
        )
        values = (self.in_coordinate(site).to(rows) - shift) / scale
        prior = standardised(self.priors[site], shift, scale)
        log_width = float(linear.scale_tril.log())
        features = fewer[:, sizes], fewer[:, variances]
        slopes = fit_sizes(features, locs, log_width, values[:, 0], prior)
        if slopes is None:
            return linear
        weights = {parent: matrix.clone() for parent, matrix in linear.weights.items()}
        log_scale = {parent: torch.zeros_like(matrix) for parent, matrix in weights.items()}
        for found, into, slope in (
            (sizes, weights, slopes.loc),
            ([*sizes, *variances], log_scale, slopes.log_scale),
        ):
            for j, each in zip(found, slope, strict=True):
                into[inputs[j]][0, j - conditionals.columns[inputs[j]].start] += each
        tril = linear.scale_tril * math.exp(slopes.shift)
        return replace(linear, weights=weights, log_scale=log_scale, scale_tril=tril)


def _loss(values: Tensor, loc: Tensor, log_scale: Tensor) -> float:
    """Return the mean of -log q of numbers that have normal conditionals, up to a constant."""
    off = (values.to(loc) - loc) * torch.exp(-log_scale)
    return float((log_scale + 0.5 * off.square()).mean())


def _regression(
    conditionals: Conditionals, site: str, rows: Tensor, moments: Moments
) -> tuple[Tensor, Tensor]:
    """Return locations and the log-scale of the regression of a site on what it reads, in its own units."""
    inputs, own = conditionals.inputs_of(site), list(conditionals.columns[site])
    fit = moments.regress(inputs, own, moments.ridge(inputs, own))
    shift, scale = (part.to(rows) for part in conditionals.output_units(site))
    loc = shift + scale * (fit.loc + rows[:, inputs] @ fit.weights.T)
    return loc, (scale * fit.scale_tril.diagonal()).log()


def _mean_log_slope(inputs: Tensor, images: Tensor) -> float:
    """Return the mean of log T'(x) over numbers x with images T(x) under an increasing map, from these alone."""
    inputs, images = in_float64(inputs).sort().values, in_float64(images).sort().values
    knots = torch.linspace(0, len(inputs) - 1, min(len(inputs), NUM_KNOTS)).round().long()
    slopes = images[knots].diff() / inputs[knots].diff()
    return float(slopes[(slopes > 0) & torch.isfinite(slopes)].log().mean())


def standardised(prior: SitePrior, shift: Tensor, scale: Tensor) -> SitePrior:
    """Return a prior in standardised units, without what elements say."""
    tril = prior.scale_tril
    return SitePrior(
        (prior.loc.to(shift) - shift) / scale,
        prior.log_scale.to(shift) - scale.log(),
        None if tril is None else tril.to(shift) / scale.unsqueeze(-1),
    )
