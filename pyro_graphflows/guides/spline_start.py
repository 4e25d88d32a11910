"""The shape of splines at the start: that of draws about their regression.

A regression gives a spline its location and its scale, and leaves the noise as it is. Draws near a posterior say more:
what is left over of them, in units of that scale, has a skewness and tails, which a spline of constant knots can have.
Location, scale and knots are those of the greatest likelihood; they are kept where other draws are likelier so.
"""

import torch
from torch import Tensor

from pyro_graphflows.distributions.spline import SplineDistribution
from pyro_graphflows.guides.conditionals.masked import MaskedConditionals
from pyro_graphflows.guides.conditionals.spline import SplineFactor
from pyro_graphflows.guides.minimize import lbfgs
from pyro_graphflows.regression import in_float64

__all__ = ["shape_spline_"]

MOST_ROWS = 4000  # by which a shape is found
LEAST_ROWS = 500
LEAST_GAIN = 2e-3  # nats by which other rows must be likelier
RIDGE = 1e-3  # times the squares of knots' parameters: where there are no rows, they stay
SAME = 1e-3  # relative difference of scales, below which they are one


@torch.no_grad()
def shape_spline_(
    conditionals: MaskedConditionals, site: str, conditional: SplineDistribution, values: Tensor
) -> bool:
    """Give the spline of a number the shape that rows have, if that is better; return whether it is.

    Args:
        conditionals: The conditionals.
        site: The site, of a single number.
        conditional: Its conditional at the parents' values in rows, ``(n,)``.
        values: Its values there in the conditional's coordinate, ``(n, 1)``.
    """
    factor = conditionals.factors[site]
    assert isinstance(factor, SplineFactor)
    residuals = in_float64((values - conditional.loc) / conditional.scale).squeeze(-1)
    residuals = residuals[residuals.isfinite()]
    if len(residuals) < LEAST_ROWS:
        return False
    step = -(-len(residuals) // (2 * MOST_ROWS))
    fitted, other = residuals[::step][::2], residuals[::step][1::2]
    scale = in_float64(conditional.scale)
    is_fused = conditionals.fuses(site)  # its location and scale are those of a product with the prior
    moves = torch.tensor([not is_fused and float(scale.std() / scale.mean()) < SAME, not is_fused])
    knots = in_float64(conditional.spline.parameters.reshape(-1, conditional.spline.parameters.shape[-1])[0])
    start = torch.cat([knots.new_zeros(2), knots])

    def log_likelihood(parameters: Tensor, rows: Tensor) -> Tensor:
        loc, log_scale = (parameters[:2] * moves).split(1)
        shape = SplineDistribution(
            loc, log_scale.exp(), parameters[2:].unsqueeze(0), bound=factor.bound, base=factor.base, df=df
        )
        return shape.log_prob(rows.unsqueeze(-1)).mean()

    def loss(parameters: Tensor) -> Tensor:
        return RIDGE * (parameters[2:] - knots).square().sum() - log_likelihood(parameters, fitted)

    df = factor.df if factor.base == "student" else None
    found = lbfgs(loss, start).detach()
    gain = float(log_likelihood(found, other) - log_likelihood(start, other))
    if not gain > LEAST_GAIN:
        return False
    unit = conditionals.output_units(site)[1]
    moved = found[:2] * moves
    moved[0] *= float(scale.mean()) / float(unit)
    conditionals.add_to_outputs_(site, torch.cat([moved, found[2:] - knots]))
    return True
