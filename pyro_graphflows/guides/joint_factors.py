r"""The start of sites that are drawn jointly beside their priors: a factor over all elements, from joint samples.

With the prior :math:`N(a, b^2)` of each of N elements, the factor is a joint normal of all,
:math:`N(m, d^2 (I + k\, 1 1^\top))` with :math:`m_n = W x_n + c`
(:mod:`~pyro_graphflows.guides.conditionals.coupled`). An orthonormal matrix Q whose first row is constant makes the
elements independent: of :math:`Q u` the first has the factor's variance :math:`d^2 (1 + N k)`, the others :math:`d^2`.
So W and c, which all share, are a weighted regression, and the two variances are found by a search in turn. Where the
priors are of one scale, as in linear-Gaussian models, all of that follows from second moments, once for all widths;
rows of other priors are put in groups of similar scales. The inputs that a factor needs are looked for first: summaries
have many features, and those that only fit noise are far off at other numbers of elements. In
balanced crossed designs with normal noise the start is exact but for the noise in samples, and stays so at other
numbers of elements: there d falls with the root of the number of data of an element, and k does not change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from pyro_graphflows.guides.conditionals.contract import Conditionals
from pyro_graphflows.guides.fewer_elements import fit_sizes
from pyro_graphflows.guides.fused_rows import LEAST_GAIN, RIDGES, WeightedRows, penalty_of, solved
from pyro_graphflows.guides.sites import SitePrior
from pyro_graphflows.regression import HELD_OUT, WINSOR, Regression, in_float64

__all__ = ["JointRows", "fit_jointly_"]

MOST_NUMBERS = 8_000_000  # of features of all elements, in the draws that are kept at once
NUM_SCALES = 16  # groups of rows, by the scales of their priors
MOST_INPUTS = 20  # of a factor that reads few
SAME = 1e-6  # logarithms of scales that differ by less
LEAST_DRAWS = 50
STEPS = 9  # widths tried
REACHES = (6.0, 1.5, 0.5, 0.15)  # of logarithms of widths, around that of the prior and then around the best
WIDEST = 1e3  # of the first of the rotated elements, in widths of the others, and the other way round
NOTHING = 10.0  # widths in those of the priors: wider factors say nothing


@dataclass(frozen=True)
class Sums:
    """Second moments of rows of which groups have a prior of one scale, and a factor of one width.

    Attributes:
        moments: Sums over the rows of each group of the products of all pairs of inputs, one, value and location of the
            prior, ``(groups, numbers, numbers)``.
        count: How many rows they stand for, ``(groups, 1)``.
        log_scale: The logarithm of the priors' scale, ``(groups, 1)``.
        of_mean: Which groups are of first elements, ``(groups, 1)``; the other elements have the other width.
    """

    moments: Tensor
    count: Tensor
    log_scale: Tensor
    of_mean: Tensor

    @classmethod
    def of(cls, rows: WeightedRows, of_mean: bool, weight: float) -> "Sums":
        """Return the moments of rows; where their priors differ in scale, those of alike ones have their mean scale.

        Args:
            rows: The rows.
            of_mean: Whether they are of first elements.
            weight: How many rows each stands for.
        """
        order = rows.log_scale.argsort()
        same = bool(rows.log_scale[order[-1]] - rows.log_scale[order[0]] < SAME)
        joint = torch.cat([rows.inputs, rows.value.unsqueeze(-1), rows.loc.unsqueeze(-1)], -1)
        groups = [order] if same else [each for each in order.tensor_split(NUM_SCALES) if len(each)]
        columns = [joint[each] for each in groups]
        scales = torch.stack([rows.log_scale[each].mean() for each in groups]).unsqueeze(-1)
        count = scales.new_tensor([[weight * len(each)] for each in groups])
        moments = weight * torch.stack([each.mT @ each for each in columns])
        return cls(moments, count, scales, torch.full_like(scales, of_mean, dtype=torch.bool))

    def __add__(self, other: "Sums") -> "Sums":
        """Return the moments of the rows of both."""
        return Sums(
            torch.cat([self.moments, other.moments]),
            torch.cat([self.count, other.count]),
            torch.cat([self.log_scale, other.log_scale]),
            torch.cat([self.of_mean, other.of_mean]),
        )

    def regress(self, pair: Tensor, ridge: float) -> Tensor:
        """Return slopes and intercept of a factor, given the logarithms of the widths of first and other elements."""
        return solved(*self._equations(pair, ridge))

    def fewest(self, pair: Tensor, test: "Sums") -> tuple[int, ...]:
        """Return the inputs that a factor needs, the intercept last: greedily, as many as held-out rows gain by.

        Args:
            pair: The logarithms of the widths.
            test: The held-out rows.
        """
        matrix, target, penalty = self._equations(pair, RIDGES[0])
        matrix = matrix + penalty.diag()
        scale = matrix.diagonal().clamp(min=1e-12)
        chosen = [len(target) - 1]
        path = []
        for _ in range(min(MOST_INPUTS, len(target) - 1) + 1):
            weights = torch.zeros_like(target)
            weights[chosen] = torch.linalg.solve(matrix[chosen][:, chosen], target[chosen])
            path.append((test.loss(pair, weights), tuple(chosen)))
            gain = (target - matrix @ weights).square() / scale
            gain[chosen] = -1.0
            chosen = [int(gain.argmax()), *chosen]
        number = float(test.count.sum())
        each = 0.5 * math.log(number) / number  # nats by which an input must do good (Schwarz)
        return min(path, key=lambda loss_of: loss_of[0] + each * len(loss_of[1]))[1]

    def at(self, inputs: Sequence[int]) -> "Sums":
        """Return the moments of some of the inputs."""
        kept = [*inputs, -2, -1]
        return replace(self, moments=self.moments[:, kept][:, :, kept])

    def _equations(self, pair: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return matrix and right side of the normal equations, and the ridge."""
        gain = torch.sigmoid(2.0 * (self.log_scale - self._widths(pair)))
        number = self.count.sum()
        inputs, value, loc = self.moments[:, :-2, :-2], self.moments[:, :-2, -2], self.moments[:, :-2, -1]
        target = (value - (1.0 - gain) * loc).sum(0) / number
        penalty = penalty_of(target, ridge, float((gain * self.count).sum() / number))
        return (gain.unsqueeze(-1) * inputs).sum(0) / number, target, penalty

    def loss(self, pair: Tensor, weights: Tensor) -> float:
        """Return the mean of -log q of the factor times the prior, but for a constant."""
        ratio = 2.0 * (self.log_scale - self._widths(pair))
        log_scale = self.log_scale - 0.5 * torch.nn.functional.softplus(ratio)
        gain = torch.sigmoid(ratio)
        one = torch.ones_like(gain)
        # off = value - (1 - gain) * loc - gain * inputs @ weights
        off = torch.cat([-gain * weights, one, gain - 1.0], -1).unsqueeze(-1)
        squares = (off.mT @ self.moments @ off).flatten(1)
        return float(
            (self.count * log_scale + 0.5 * squares * (-2.0 * log_scale).exp()).sum() / self.count.sum()
        )

    def loss_of_prior(self) -> float:
        """Return the same of the prior alone."""
        infinite = self.moments.new_full((2,), math.inf)
        return self.loss(infinite, self.moments.new_zeros(self.moments.shape[-1] - 2))

    def _widths(self, pair: Tensor) -> Tensor:
        return torch.where(self.of_mean, pair[0], pair[1])


@dataclass(frozen=True)
class JointRows:
    """Joint samples of a number in all elements of the plates across which it is drawn jointly.

    Attributes:
        inputs: The features of the site, ``(draws, N, num_inputs)``, in as many draws as memory allows.
        values: The site in the coordinate of its prior, standardised, ``(draws, N)``.
        prior: Location and scale of the priors, each ``(draws, N, 1)``.
        fewer: The features where summaries are of fewer elements; None if there are none.
        means: The first of the rotated elements, in all draws: what is common to all elements shows in these alone.
    """

    inputs: Tensor
    values: Tensor
    prior: SitePrior
    fewer: Tensor | None
    means: WeightedRows

    @classmethod
    def of(
        cls,
        parts: tuple[Tensor, Tensor, SitePrior, Tensor | None],
        dims: Sequence[int],
    ) -> "JointRows | None":
        """Return the rows; None where there are too few.

        Args:
            parts: The inputs, ``(draws, *batch, num_inputs)``, and the others in the same layout.
            dims: The dimensions of the plates, among those of tensors with features.
        """
        inputs, values, prior, fewer = parts
        columns = [inputs, values, prior.loc, prior.log_scale, *([] if fewer is None else [fewer])]
        shape = np.broadcast_shapes(*(column.shape[:-1] for column in columns))
        columns = [column.expand(*shape, column.shape[-1]) for column in columns]
        of_draw = sum(column[:1].numel() for column in columns)
        pieces: list[list[Tensor]] = []
        means: list[WeightedRows] = []
        for some in zip(*(column.split(max(MOST_NUMBERS // of_draw, 1)) for column in columns), strict=True):
            piece = _finite([_of_draws(column, dims) for column in some])
            if not pieces or sum(len(each[0]) for each in pieces) < LEAST_DRAWS:
                pieces.append(piece)
            means.append(_rotated(*piece[:4])[0])
        inputs, values, loc, log_scale, *rest = (torch.cat(each) for each in zip(*pieces, strict=True))
        if len(inputs) < LEAST_DRAWS or inputs.shape[1] < 2:
            return None
        joined = WeightedRows(
            *(torch.cat([getattr(each, field.name) for each in means]) for field in fields(WeightedRows))
        )
        return cls(inputs, values[..., 0], SitePrior(loc, log_scale), rest[0] if rest else None, joined)

    def fit(self) -> tuple[Regression, Tensor] | None:
        """Return what each element has, and the logarithms of the two widths; None if no factor does good."""
        others = self._others(self.inputs)
        number = self.values.shape[1] - 1
        draws_of_others = torch.arange(len(others.value), device=others.value.device) // number
        draws = torch.arange(len(self.means.value), device=others.value.device)
        weight = len(draws) / len(self.values)

        def sums(held_out: bool) -> Sums:
            first, rest = ((of % HELD_OUT == 0) == held_out for of in (draws, draws_of_others))
            return Sums.of(self.means.at(first), True, 1.0) + Sums.of(others.at(rest), False, weight)

        most, test = sums(False), sums(True)
        pair = _widths_of(most, others.log_scale.median().repeat(2))
        pair_of_few = pair
        # twice: with many inputs the widths come out too small, and with such widths more inputs seem to be needed
        for _ in range(2):
            inputs = most.fewest(pair_of_few, test)
            few = most.at(inputs), test.at(inputs)
            pair_of_few = _widths_of(few[0], pair_of_few)
        loss = few[1].loss(pair_of_few, few[0].regress(pair_of_few, RIDGES[0]))
        ridges = {ridge: test.loss(pair, most.regress(pair, ridge)) for ridge in RIDGES}
        best = min(ridges, key=lambda ridge: ridges[ridge])
        if not min(loss, ridges[best]) < test.loss_of_prior() - LEAST_GAIN:
            return None
        every = most + test
        if ridges[best] < loss - LEAST_GAIN:
            weights = every.regress(pair, best)
        else:
            pair = pair_of_few
            weights = pair.new_zeros(others.inputs.shape[-1])
            weights[list(inputs)] = every.at(inputs).regress(pair, RIDGES[0])
        pair = self._within_reach(pair)
        return Regression(weights[:-1].unsqueeze(0), weights[-1:], pair[1].exp().reshape(1, 1)), pair

    def _within_reach(self, pair: Tensor) -> Tensor:
        """Return widths close enough to each other, the narrower as it is: what says nothing may be of any width."""
        usual = 0.5 * (2.0 * self.prior.log_scale).exp().mean().log()
        pair = pair.clamp(max=float(usual) + math.log(NOTHING))
        return pair.clamp(max=float(pair.min()) + math.log(WIDEST))

    def share(self, widths: Tensor) -> float:
        """Return k from the logarithms of the two widths."""
        ratio = (2.0 * (widths[0] - widths[1])).exp()
        number = self.values.shape[1]
        return float((ratio - 1.0) / number if ratio > 1.0 else -(1.0 / ratio - 1.0) / number)

    def slopes(
        self, linear: Regression, columns: tuple[Sequence[int], Sequence[int]]
    ) -> tuple[Tensor, float] | None:
        """Return what features of sizes and of variances do to the logarithm of d, and what is added to it.

        Args:
            linear: What each element has.
            columns: Which inputs are features of sizes, and which of variances.
        """
        if self.fewer is None or not columns[0]:
            return None
        fewer = self.fewer.clamp(-WINSOR, WINSOR)
        rows = self._others(fewer)
        weights = torch.cat([linear.weights[0], linear.loc])
        means = fewer.mean(1, keepdim=True)
        of_draws = means.expand(-1, fewer.shape[1] - 1, -1).flatten(0, 1)
        prior = SitePrior(rows.loc.unsqueeze(-1), rows.log_scale.unsqueeze(-1))
        found = fit_sizes(
            (of_draws[:, list(columns[0])], of_draws[:, list(columns[1])]),
            rows.inputs @ weights,
            float(linear.scale_tril.log()),
            rows.value,
            prior,
        )
        return None if found is None else (found.log_scale, found.shift)

    def _others(self, inputs: Tensor) -> WeightedRows:
        """Return all but the first of the rotated elements."""
        return _rotated(inputs, self.values.unsqueeze(-1), self.prior.loc, self.prior.log_scale)[1]


def _widths_of(rows: Sums, pair: Tensor) -> Tensor:
    """Return the logarithms of the widths that fit best, by a search in turn from given ones."""
    for reach in REACHES:
        for which in (1, 0):
            tried = pair.repeat(STEPS, 1)
            tried[:, which] += torch.linspace(-reach, reach, STEPS).to(tried)
            losses = [rows.loss(each, rows.regress(each, RIDGES[0])) for each in tried]
            pair = tried[losses.index(min(losses))]
    return pair


def _of_draws(column: Tensor, dims: Sequence[int]) -> Tensor:
    """Return a column with the elements of the plates beside each other, all else being draws, ``(draws, N, size)``."""
    places = [i - 1 - len(dims) for i in range(len(dims))]
    moved = column.movedim(list(dims), places)
    return in_float64(moved.flatten(-1 - len(dims), -2).flatten(0, -3))


def _finite(columns: list[Tensor]) -> list[Tensor]:
    """Return the draws in which all numbers are finite, the features within bounds."""
    known = torch.stack([torch.isfinite(column).flatten(1).all(-1) for column in columns]).all(0)
    inputs, *others = (column[known] for column in columns)
    return [inputs.clamp(-WINSOR, WINSOR), *others]


def _rotated(
    inputs: Tensor, values: Tensor, loc: Tensor, log_scale: Tensor
) -> tuple[WeightedRows, WeightedRows]:
    """Return rows of the first of the rotated elements of each draw, and of the others."""
    number = inputs.shape[1]
    eye = torch.eye(number, dtype=inputs.dtype, device=inputs.device)
    eye[:, 0] = 1.0
    rotation = torch.linalg.qr(eye)[0].mT
    with_one = torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1)
    log_scale = log_scale.mean(1, keepdim=True).expand_as(values)

    def rows(by: Tensor) -> WeightedRows:
        turned = [by @ each for each in (with_one, values, loc)]
        flat = (each.flatten() for each in (*turned[1:], log_scale[:, : len(by)]))
        return WeightedRows(turned[0].flatten(0, 1), *flat)

    return rows(rotation[:1]), rows(rotation[1:])


def fit_jointly_(
    conditionals: Conditionals, site: str, rows: JointRows, columns: tuple[Sequence[int], Sequence[int]]
) -> float | None:
    """Start a site at a factor over all elements; return its number k, None where no factor was found.

    Args:
        conditionals: The conditionals.
        site: The site.
        rows: Its joint samples.
        columns: Which features of the context are functions of sizes, and which are logarithms of variances.
    """
    fitted = rows.fit()
    if fitted is None:
        return None
    fit, widths = fitted
    inputs = conditionals.inputs_of(site)
    sizes, variances = ([j for j in of if j in inputs] for of in columns)
    linear = conditionals.linear_of(site, fit)
    positions = [inputs.index(j) for j in sizes], [inputs.index(j) for j in variances]
    slopes = rows.slopes(fit, positions)
    if slopes is not None:
        log_scale = {parent: torch.zeros_like(matrix) for parent, matrix in linear.weights.items()}
        for j, slope in zip([*sizes, *variances], slopes[0], strict=True):
            for parent in log_scale:
                if j in conditionals.columns[parent]:
                    log_scale[parent][0, j - conditionals.columns[parent].start] += slope
        linear = replace(linear, log_scale=log_scale, scale_tril=linear.scale_tril * math.exp(slopes[1]))
    conditionals.set_fused_(site, linear)
    return rows.share(widths)
