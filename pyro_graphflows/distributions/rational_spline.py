r"""A monotone rational-quadratic spline that is the identity outside of an interval, in closed form both ways.

Between neighbouring knots the map is the rational-quadratic function with given values and slopes at both [1, 2]. With
:math:`\theta, \eta \in [0, 1]` the positions in a bin of width ``w`` and height ``h``, and the slopes at its ends as
multiples :math:`r_0, r_1` of ``h / w``,

.. math::
    \eta = \frac{\theta^2 + r_0 \theta (1 - \theta)}{1 + (r_0 + r_1 - 2) \theta (1 - \theta)}.

The inverse is a root of a quadratic. Seen from the left end its linear coefficient is
:math:`b_0 = r_0 - (r_0 + r_1 - 2) \eta`, from the right end :math:`b_1 = 2 - b_0`; from the end with the larger one no
difference of nearly equal numbers is formed, and the discriminant is a sum of terms that are not negative:

.. math:: \theta = \frac{2 \eta}{b_0 + \sqrt{(b_0 - 2)^2 + 4 (b_0 - 1)(1 - \eta)}} \quad (b_0 \ge 1).

Pyro's functions (:mod:`pyro.distributions.transforms.spline`) compute the same map. They are not used here since their
inverse stops at an assertion, or is wrong in its first digit, in single precision where slopes differ much; their slope
at the two ends is 0.999, and gradients far outside are NaN.

References:
    [1] Gregory and Delbourgo (1982), Piecewise rational quadratic interpolation to monotonic data, IMA Journal of
    Numerical Analysis 2, Eq. 2.1 to 2.5.
    [2] Durkan, Bekasov, Murray and Papamakarios (2019), Neural spline flows, Section 3.1. Slopes here are exponentials,
    so that zeros are the identity.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_graphflows.errors import GraphflowsError

__all__ = ["RationalSpline", "num_spline_parameters"]

SMALLEST_BIN = 1e-3  # of the interval
LOG_SLOPE_BOUND = math.log(1e3)


def num_spline_parameters(num_bins: int) -> int:
    """Return the number of parameters of one spline: widths, heights, and the slopes at inner knots.

    Args:
        num_bins: The number of bins.

    Raises:
        GraphflowsError: If there are fewer than two bins, or so many that a bin has no room.
    """
    if not 2 <= num_bins <= 0.5 / SMALLEST_BIN:
        raise GraphflowsError(f"Expected num_bins from 2 to {int(0.5 / SMALLEST_BIN)}; got {num_bins}.")
    return 3 * num_bins - 1


class RationalSpline:
    """The spline that parameters describe. Zeros are the identity.

    Args:
        parameters: Unbounded numbers, shape ``(*batch, 3 * num_bins - 1)``: logits of the widths, logits of the
            heights, logarithms of the slopes at inner knots.
        bound: The spline is the identity outside of ``[-bound, bound]``.

    Raises:
        GraphflowsError: If the last dimension is no multiple of three less one, or the bound is not positive.

    Example:
        >>> spline = RationalSpline(torch.zeros(2, 11), bound=3.0)
        >>> y, log_slope = spline(torch.tensor([0.5, 7.0]))
        >>> bool(torch.allclose(y, torch.tensor([0.5, 7.0]))), bool(log_slope.abs().max() < 1e-6)
        (True, True)
    """

    def __init__(self, parameters: Tensor, bound: float) -> None:
        size = parameters.shape[-1]
        if size < 5 or (size + 1) % 3:
            raise GraphflowsError(
                f"Expected parameters whose last dimension is 3 * num_bins - 1, with num_bins from 2 on; got {size}."
            )
        if not (bound > 0 and math.isfinite(bound)):
            raise GraphflowsError(f"Expected a positive, finite bound; got {bound}.")
        self.num_bins, self.bound = (size + 1) // 3, float(bound)
        widths, heights, slopes = parameters.split([self.num_bins, self.num_bins, self.num_bins - 1], -1)
        slopes = torch.exp(LOG_SLOPE_BOUND * torch.tanh(slopes / LOG_SLOPE_BOUND))
        self.slopes = pad(slopes, (1, 1), value=1.0)
        self.widths, self.x = self._bins(widths)
        self.heights, self.y = self._bins(heights)

    def _bins(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return lengths, and the knots without the last."""
        shares = SMALLEST_BIN + (1.0 - SMALLEST_BIN * self.num_bins) * torch.softmax(logits, -1)
        lengths = 2.0 * self.bound * shares
        return lengths, pad(torch.cumsum(lengths[..., :-1], -1), (1, 0)) - self.bound

    def _at(self, value: Tensor, knots: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Return what belongs to the bin of each value: its index, corner, width, height and ratios of slopes."""
        index = (value.unsqueeze(-1) >= knots[..., 1:]).sum(-1, keepdim=True)
        shape = (*index.shape[:-1], self.num_bins)

        def pick(table: Tensor) -> Tensor:
            return table.expand(shape).gather(-1, index).squeeze(-1)

        width, height = pick(self.widths), pick(self.heights)
        mean_slope = height / width
        left, right = pick(self.slopes[..., :-1]) / mean_slope, pick(self.slopes[..., 1:]) / mean_slope
        return pick(self.x), pick(self.y), width, height, left, right

    @staticmethod
    def _log_slope(
        theta: Tensor, other: Tensor, width: Tensor, height: Tensor, left: Tensor, right: Tensor
    ) -> Tensor:
        """Return the logarithm of the slope at ``theta``, where ``other`` is ``1 - theta``."""
        product = theta * other
        numerator = right * theta.square() + 2.0 * product + left * other.square()
        denominator = 1.0 + (left + right - 2.0) * product
        return (height / width).log() + numerator.log() - 2.0 * denominator.log()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and the logarithms of the slopes there.

        Args:
            x: Numbers that broadcast against ``batch``.
        """
        outside = x.abs() >= self.bound
        inner = torch.where(outside, torch.zeros_like(x), x)
        at_x, at_y, width, height, left, right = self._at(inner, self.x, self.widths)
        theta = ((inner - at_x) / width).clamp(0.0, 1.0)
        other = 1.0 - theta
        product = theta * other
        eta = (theta.square() + left * product) / (1.0 + (left + right - 2.0) * product)
        log_slope = self._log_slope(theta, other, width, height, left, right)
        return torch.where(outside, x, at_y + height * eta), torch.where(outside, 0.0, log_slope)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the spline has the values ``y``, and the logarithms of its slopes there.

        Args:
            y: Numbers that broadcast against ``batch``.
        """
        outside = y.abs() >= self.bound
        inner = torch.where(outside, torch.zeros_like(y), y)
        at_x, at_y, width, height, left, right = self._at(inner, self.y, self.heights)
        eta = ((inner - at_y) / height).clamp(0.0, 1.0)
        from_left = left - (left + right - 2.0) * eta
        is_left = from_left >= 1.0
        b = torch.where(is_left, from_left, 2.0 - from_left)
        here = torch.where(is_left, eta, 1.0 - eta)
        discriminant = (b - 2.0).square() + 4.0 * (b - 1.0) * (1.0 - here)
        share = 2.0 * here / (b + discriminant.clamp(min=torch.finfo(y.dtype).tiny).sqrt())
        theta, other = torch.where(is_left, share, 1.0 - share), torch.where(is_left, 1.0 - share, share)
        log_slope = self._log_slope(theta, other, width, height, left, right)
        return torch.where(outside, y, at_x + width * theta), torch.where(outside, 0.0, log_slope)
