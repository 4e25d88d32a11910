r"""What numbers of elements do to summaries and to factors beside priors, from joint samples with fewer elements.

Joint samples at set-up have plates of one size, so that features of sizes do not vary: no regression finds what they
do, and directions that do not vary are not trained (:mod:`~pyro_graphflows.nn.masked`). But elements of a plate
that leave nothing outside of it are left out of a joint sample as one likes: what is left is a joint sample of the
model with a smaller plate. So summaries are made once more, of some elements of each draw, from one to all of them.

By these, inputs are whitened. And factors :math:`N(W x + c, s^2)` beside priors, fitted at the size of set-up, follow
sizes:

.. math:: \log s = \log s_0 + \beta^\top z + \beta'^\top v, \qquad \text{location} = W x + c + \gamma^\top z

with z the logarithms of numbers of elements and of degrees of freedom, zero at the size of set-up, and v logarithms of
variances: how well data tell a scale depends on whether it is large beside another. Beside the prior, a
factor says what the data alone say, so that W and c have the same meaning at all sizes, and the precision is about
proportional to degrees of freedom, also beyond those of set-up.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_graphflows.distributions.fusion import fuse
from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.plan import Summary
from pyro_graphflows.guides.sites import SitePrior
from pyro_graphflows.regression import HELD_OUT, WINSOR, in_float64

__all__ = ["SizeSlopes", "fewer_of", "fit_sizes", "some_elements"]

MOST_ROWS = 4000  # by which slopes are found
LEAST_GAIN = 2e-3  # nats
LARGEST = 20.0  # logarithm of a scale, in standardised units
RIDGE = 1e-4
STEPS = 100
NUM_OWN = 4  # columns beside the features: location, value, location and log-scale of the prior


def fewer_of(name: str) -> str:
    """Return the name of the column of a summary of fewer elements, beside samples."""
    return f"{name}: fewer"


def some_elements(
    summary: Summary, graph: ModelGraph, plates: Mapping[str, PlateState], draws: int, like: Tensor
) -> dict[str, Tensor]:
    """Return which elements of the plates of a summary count in each draw, the same for all summaries of a plate.

    Args:
        summary: The summary.
        graph: The model.
        plates: The plates of the call.
        draws: The number of draws.
        like: A tensor of the type and on the device of the result.

    Returns:
        For each plate from which elements can be left out, ones and zeros of shape ``(draws, *batch, 1)``.
    """
    around = {name: summary.inside(own) for name, own in graph.plates.items()}
    found = {}
    for name in summary.over:
        plate = plates[name]
        inside = {node for node, own in around.items() if name in own}
        leaves = any(inside.intersection(graph.parents(node)) for node in around if node not in inside)
        if plate.subsampled or plate.size < 2 or leaves:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        at_random = torch.rand(draws, plate.size, generator=generator)
        number = torch.randint(1, plate.size + 1, (draws, 1), generator=generator)
        kept = at_random.argsort(-1).argsort(-1) < number
        found[name] = kept.to(like).reshape(draws, plate.size, *(1,) * -plate.dim)
    return found


@dataclass(frozen=True)
class SizeSlopes:
    """What features of sizes and of variances do to a factor of one number, in standardised units.

    Attributes:
        loc: Slopes of its location on features of sizes, ``(sizes,)``.
        log_scale: Slopes of the logarithm of its scale on both, ``(sizes + variances,)``.
        shift: What is added to that logarithm.
    """

    loc: Tensor
    log_scale: Tensor
    shift: float


def fit_sizes(
    features: tuple[Tensor, Tensor], locs: Tensor, log_width: float, values: Tensor, prior: SitePrior
) -> SizeSlopes | None:
    """Fit what sizes and variances do to a factor, everything else as it is; None if that does no good.

    Args:
        features: Features of sizes in rows, ``(n, sizes)``, zero at the size of set-up; and logarithms of variances,
            ``(n, variances)``.
        locs: Locations of the factor as it is, ``(n,)``.
        log_width: The logarithm of its scale.
        values: The site in the coordinate of its prior, ``(n,)``.
        prior: The prior of each row.
    """
    joint = torch.cat(features, -1)
    own = torch.stack([locs, values, prior.loc[..., 0], prior.log_scale[..., 0]], -1)
    rows = in_float64(torch.cat([joint, own.to(joint)], -1))
    near = torch.isfinite(rows).all(-1) & (rows.abs() < WINSOR).all(-1)
    rows = rows[near][:MOST_ROWS]
    number, of_sizes = joint.shape[-1], features[0].shape[-1]
    varying = rows[:, :number].std(0) > 1e-6 if len(rows) > 1 else torch.zeros(number, dtype=torch.bool)
    every = varying.nonzero()[:, 0]
    test = torch.arange(len(rows), device=rows.device) % HELD_OUT == 0
    slopes = rows.new_zeros(2, number + 1)
    least = float(_loss(rows[test], slopes, log_width, of_sizes)) if len(rows) else math.inf
    found = None
    # first without variances: where they only fit noise they are far off at other sizes
    for at in (every[every < of_sizes], every):
        if not len(at) or len(rows) < HELD_OUT * (2 * len(at) + 2):
            continue
        slopes = _fitted(rows[~test], at, log_width, of_sizes)
        loss = float(_loss(rows[test], slopes, log_width, of_sizes))
        if loss < least - LEAST_GAIN:
            least, found = loss, slopes
    if found is None:
        return None
    return SizeSlopes(found[0, :of_sizes], found[1, :-1], float(found[1, -1]))


def _fitted(rows: Tensor, at: Tensor, log_width: float, of_sizes: int) -> Tensor:
    """Return slopes of the location and of the logarithm of the scale, by some features; the last entry is constant."""
    zero = rows.new_zeros(2, rows.shape[-1] - NUM_OWN + 1)
    places = torch.cat([at, at.new_tensor([zero.shape[-1] - 1])])
    slopes = rows.new_zeros(2, len(places)).requires_grad_()
    moves = torch.stack([places < of_sizes, places >= 0]).to(rows)  # locations follow variances already
    with torch.enable_grad():
        optimizer = torch.optim.LBFGS([slopes], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            placed = zero.index_add(1, places, moves * slopes)
            value = _loss(rows, placed, log_width, of_sizes) + RIDGE * slopes.square().sum()
            value.backward()
            return value

        optimizer.step(closure)
    return zero.index_add(1, places, moves * slopes.detach())


def _loss(rows: Tensor, slopes: Tensor, log_width: float, of_sizes: int) -> Tensor:
    """Return the mean of -log q of the factor beside the prior, but for a constant; beyond 5 scales Huber's loss."""
    z, (loc, value, prior_loc, prior_log_scale) = rows[:, :-NUM_OWN], rows[:, -NUM_OWN:].unbind(-1)
    width = (log_width + slopes[1, -1] + z @ slopes[1, :-1]).clamp(-LARGEST, LARGEST)
    mean, log_scale = fuse(prior_loc, prior_log_scale, loc + z @ slopes[0, :-1], width)
    off = ((value - mean) * torch.exp(-log_scale)).square()
    robust = torch.where(off > 25.0, 10.0 * off.clamp(min=1.0).sqrt() - 25.0, off)
    return (log_scale + 0.5 * robust).mean()
