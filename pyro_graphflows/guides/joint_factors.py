r"""The start of sites that are drawn jointly beside their priors: a factor over all elements, from joint samples.

With the prior :math:`N(a, b^2)` of each of N elements, the factor is a joint normal of all,
:math:`N(m, d^2 (I + k\, 1 1^\top))` with :math:`m_n = W x_n + c`
(:mod:`~pyro_graphflows.guides.conditionals.coupled`). An orthonormal matrix Q whose first row is constant makes the
elements independent: of :math:`Q u` the first has the factor's variance :math:`d^2 (1 + N k)`, the others :math:`d^2`.
So W and c, which all share, are a weighted regression, and the two variances are found by a search in turn. In
balanced crossed designs with normal noise the start is exact but for the noise in samples, and stays so at other
numbers of elements: there d falls with the root of the number of data of an element, and k does not change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pyro_graphflows.guides.conditionals.contract import Conditionals
from pyro_graphflows.guides.fewer_elements import fit_sizes
from pyro_graphflows.guides.fused_rows import LEAST_GAIN, RIDGES, WeightedRows
from pyro_graphflows.guides.sites import SitePrior
from pyro_graphflows.regression import WINSOR, Regression, in_float64

__all__ = ["JointRows", "fit_jointly_"]

MOST_NUMBERS = 400_000  # of features of all elements, in all draws
LEAST_DRAWS = 50
HELD_OUT = 5
STEPS = 9  # widths tried
REACHES = (6.0, 1.5, 0.5, 0.15)  # of logarithms of widths, around that of the prior and then around the best
WIDEST = 1e3  # of the first of the rotated elements, in widths of the others


@dataclass(frozen=True)
class JointRows:
    """Joint samples of a number in all elements of the plates across which it is drawn jointly.

    Attributes:
        inputs: The features of the site, ``(draws, N, num_inputs)``.
        values: The site in the coordinate of its prior, standardised, ``(draws, N)``.
        prior: Location and scale of the priors, each ``(draws, N, 1)``.
        fewer: The features where summaries are of fewer elements; None if there are none.
    """

    inputs: Tensor
    values: Tensor
    prior: SitePrior
    fewer: Tensor | None

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
        sizes = [column.shape[-1] for column in columns]
        joint = torch.cat([in_float64(column).expand(*shape, column.shape[-1]) for column in columns], -1)
        places = [i - 1 - len(dims) for i in range(len(dims))]
        joint = joint.movedim(list(dims), places).flatten(-1 - len(dims), -2).flatten(0, -3)
        joint = joint[torch.isfinite(joint).all(-1).all(-1)]
        joint = joint[: max(MOST_NUMBERS // joint[:1].numel(), 1)] if len(joint) else joint
        if len(joint) < LEAST_DRAWS or joint.shape[1] < 2:
            return None
        inputs, values, loc, log_scale, *rest = joint.split(sizes, -1)
        inputs = inputs.clamp(-WINSOR, WINSOR)
        return cls(inputs, values[..., 0], SitePrior(loc, log_scale), rest[0] if rest else None)

    def fit(self) -> tuple[Regression, Tensor] | None:
        """Return what each element has, and the logarithms of the two widths; None if no factor does good."""
        rows, of_mean = self._rotated(self.inputs)
        test = torch.arange(len(of_mean), device=of_mean.device) // self.values.shape[1] % HELD_OUT == 0
        most, mean_of_most = rows.at(~test), of_mean[~test]

        def widths_of(which: Tensor, pair: Tensor) -> Tensor:
            return torch.where(which, pair[0], pair[1])

        pair = rows.log_scale.median().repeat(2)
        for reach in REACHES:
            for which in (1, 0):
                tried = pair.repeat(STEPS, 1)
                tried[:, which] += torch.linspace(-reach, reach, STEPS).to(tried)
                losses = []
                for each in tried:
                    own = widths_of(mean_of_most, each)
                    losses.append(most.loss(own, most.regress(own, RIDGES[0])))
                pair = tried[losses.index(min(losses))]
        held_out = [
            rows.at(test).loss(
                widths_of(of_mean[test], pair), most.regress(widths_of(mean_of_most, pair), ridge)
            )
            for ridge in RIDGES
        ]
        least = min(held_out)
        if not least < rows.at(test).loss(0.0, None) - LEAST_GAIN:
            return None
        weights = rows.regress(widths_of(of_mean, pair), RIDGES[held_out.index(least)])
        return Regression(weights[:-1].unsqueeze(0), weights[-1:], pair[1].exp().reshape(1, 1)), pair

    def share(self, widths: Tensor) -> float:
        """Return k from the logarithms of the two widths."""
        ratio = (2.0 * (widths[0] - widths[1])).exp().clamp(WIDEST**-2, WIDEST**2)
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
        rows, of_mean = self._rotated(self.fewer.clamp(-WINSOR, WINSOR))
        weights = torch.cat([linear.weights[0], linear.loc])
        means = self.fewer.clamp(-WINSOR, WINSOR).mean(1, keepdim=True).expand_as(self.fewer)
        others = ~of_mean
        of_draws = means.flatten(0, 1)[others]
        prior = SitePrior(rows.loc[others].unsqueeze(-1), rows.log_scale[others].unsqueeze(-1))
        found = fit_sizes(
            (of_draws[:, list(columns[0])], of_draws[:, list(columns[1])]),
            (rows.inputs @ weights)[others],
            float(linear.scale_tril.log()),
            rows.value[others],
            prior,
        )
        return None if found is None else (found.log_scale, found.shift)

    def _rotated(self, inputs: Tensor) -> tuple[WeightedRows, Tensor]:
        """Return rows of the rotated elements, and which of them are the first of their draw."""
        number = self.values.shape[1]
        eye = torch.eye(number, dtype=inputs.dtype, device=inputs.device)
        eye[:, 0] = 1.0
        rotation = torch.linalg.qr(eye)[0].mT
        one = inputs.new_ones(*inputs.shape[:-1], 1)
        rotated = rotation @ torch.cat([inputs, one], -1)
        value, loc = (rotation @ each.unsqueeze(-1) for each in (self.values, self.prior.loc[..., 0]))
        log_scale = self.prior.log_scale.mean(1, keepdim=True).expand_as(value)
        of_mean = (torch.arange(number, device=inputs.device) == 0).expand(len(inputs), -1).flatten()
        parts = (each.flatten() for each in (value, loc, log_scale))
        return WeightedRows(rotated.flatten(0, 1), *parts), of_mean


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
