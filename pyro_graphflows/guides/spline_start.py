"""The shape of splines at the start: that of draws about their regression.

A regression gives a spline its location and its scale, and leaves the noise as it is. Draws near a posterior say more:
what is left over of them, in units of that scale, has a skewness and tails, which a spline of constant knots can have.
Location, scale and knots are those of the greatest likelihood; they are kept where other draws are likelier so. Beyond
the draws nothing is known: there the spline goes on as their outermost quantiles do, for a few draws far out would
decide over means and variances of a scale. Where rows are normal about their regression, knots have nothing to do, and
a step of training moves them less.
"""

import torch
from torch import Tensor

from pyro_graphflows.distributions.rational_spline import RationalSpline
from pyro_graphflows.distributions.spline import SplineDistribution
from pyro_graphflows.guides.conditionals.masked import MaskedConditionals
from pyro_graphflows.guides.conditionals.spline import SplineFactor
from pyro_graphflows.guides.minimize import lbfgs
from pyro_graphflows.regression import in_float64

__all__ = ["shape_spline_"]

MOST_ROWS = 4000  # by which a shape is found
LEAST_ROWS = 1000
LEAST_GAIN = 2e-3  # nats by which other rows must be likelier
UNIT_OF_NORMAL = 0.1  # by which a step of training moves knots of what is normal
RIDGE = 1e-3  # times the squares of knots' parameters: where there are no rows, they stay
OUTER = (2.33, 3.09)  # noise, whose quantiles of rows are known; it is that of a percent and a thousandth
BEYOND = (3.5, 4.0, 4.5)  # noise to which they are continued
FARTHEST = 2.0  # in units of the scale: a spline of fixed ends may have to stretch its outermost bin to them
TAIL = 0.02  # nats for the square of a spline's distance from there, in units of the scale


@torch.no_grad()
def shape_spline_(
    conditionals: MaskedConditionals,
    site: str,
    conditional: SplineDistribution,
    values: Tensor,
    *,
    shape: bool,
    keep_normal: bool,
) -> None:
    """Give the spline of a number the shape that rows have, if that is better.

    Args:
        conditionals: The conditionals.
        site: The site, of a single number.
        conditional: Its conditional at the parents' values in rows, ``(n,)``, with a normal base.
        values: Its values there in the conditional's coordinate, ``(n, 1)``.
        shape: Whether splines get shapes.
        keep_normal: Whether training is to move knots less where rows are normal about their regression.
    """
    factor = conditionals.factors[site]
    assert isinstance(factor, SplineFactor)
    scale = in_float64(conditional.scale).expand(values.shape)
    unit = scale.log().mean().exp()  # a location moves by the same for all rows, whatever their scales
    residuals = (in_float64(values) - in_float64(conditional.loc)) / scale
    rows = torch.cat([residuals, unit / scale], -1)
    rows = rows[rows.isfinite().all(-1)]
    if len(rows) < LEAST_ROWS:
        return
    is_normal = not _nats_beyond_normal(rows[:, 0]) > LEAST_GAIN
    if is_normal and keep_normal:
        conditionals.limit_units_(site, factor.num_before_knots, UNIT_OF_NORMAL)
    if is_normal or not shape:
        return
    step = -(-len(rows) // (2 * MOST_ROWS))
    fitted, other = rows[::step][::2], rows[::step][1::2]
    moves = 0.0 if conditionals.fuses(site) else 1.0  # else location and scale are those of a product
    knots = in_float64(conditional.spline.parameters.reshape(-1, conditional.spline.parameters.shape[-1])[0])
    start = torch.cat([knots.new_zeros(2), knots])

    def log_likelihood(parameters: Tensor, rows: Tensor) -> Tensor:
        loc, log_scale = (moves * parameters[:2]).split(1)
        rest = rows[:, :1] - loc * rows[:, 1:]
        own = SplineDistribution(0.0 * loc, log_scale.exp(), parameters[2:].unsqueeze(0), bound=factor.bound)
        return own.log_prob(rest).mean()

    noise, image = _continued(fitted[:, 0])

    def off(parameters: Tensor) -> Tensor:
        loc, log_scale = moves * parameters[:2]
        return loc + log_scale.exp() * RationalSpline(parameters[2:], factor.bound)(noise)[0] - image

    def loss(parameters: Tensor) -> Tensor:
        ridge = RIDGE * (parameters[2:] - knots).square().sum()
        return ridge + TAIL * off(parameters).square().sum() - log_likelihood(parameters, fitted)

    found = lbfgs(loss, start).detach()
    gain = float(log_likelihood(found, other) - log_likelihood(start, other))
    if not (gain > LEAST_GAIN and float(off(found).abs().max()) < FARTHEST):
        return
    loc, log_scale = moves * found[:2]
    loc = loc * unit / in_float64(conditionals.output_units(site)[1]).squeeze()
    conditionals.add_to_outputs_(site, torch.cat([torch.stack([loc, log_scale]), found[2:] - knots]))


def _nats_beyond_normal(residuals: Tensor) -> float:
    """Return about what a density has over the normal of its mean and variance, by third and fourth moments."""
    z = (residuals - residuals.mean()) / residuals.std()
    skewness, excess = float((z**3).mean()), float((z**4).mean()) - 3.0
    return skewness**2 / 12 + excess**2 / 48


def _continued(residuals: Tensor) -> tuple[Tensor, Tensor]:
    """Return noise beyond what rows say, on both sides, and where it leads if the outermost quantiles go on."""
    near, far = OUTER
    shares = 0.5 * torch.erfc(residuals.new_tensor([near, far]) / 2**0.5)
    beyond = residuals.new_tensor(BEYOND)
    sides = []
    for sign in (-1.0, 1.0):
        inner, outer = (sign * residuals).quantile(1.0 - shares)
        sides.append(sign * (outer + (outer - inner) / (far - near) * (beyond - far)))
    return torch.cat([-beyond, beyond]), torch.cat(sides)
