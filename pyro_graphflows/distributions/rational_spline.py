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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.nn.operation import Operation, is_traced

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


class _Tables(NamedTuple):
    """What parameters say of the bins.

    Attributes:
        shares: Softmax of the logits of widths and heights, ``(*batch, 2, num_bins)``.
        lengths: Widths and heights, of the same shape.
        starts: The lower left corners of the bins, of the same shape.
        tanh: The bounded logarithms of slopes at inner knots, over their bound, ``(*batch, num_bins - 1)``.
        slopes: The slopes at all knots, ``(*batch, num_bins + 1)``.
    """

    shares: Tensor
    lengths: Tensor
    starts: Tensor
    tanh: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, parameters: Tensor, num_bins: int, bound: float) -> "_Tables":
        logits, slopes = parameters.split([2 * num_bins, num_bins - 1], -1)
        shares = torch.softmax(logits.unflatten(-1, (2, num_bins)), -1)
        lengths = _factor(num_bins, bound) * shares + 2.0 * bound * SMALLEST_BIN
        starts = pad(torch.cumsum(lengths[..., :-1], -1), (1, 0)) - bound
        tanh = torch.tanh(slopes / LOG_SLOPE_BOUND)
        return cls(shares, lengths, starts, tanh, pad(torch.exp(LOG_SLOPE_BOUND * tanh), (1, 1), value=1.0))

    def at(self, value: Tensor, side: int) -> "_Bin":
        """Return what belongs to the bin of each value.

        Args:
            value: Numbers that broadcast against the batch.
            side: 0 for arguments of the spline, 1 for its values.
        """
        index = (value.unsqueeze(-1) >= self.starts[..., side, 1:]).sum(-1, keepdim=True)
        shape = index.shape[:-1]
        ends = self.slopes[..., :-1].unsqueeze(-2), self.slopes[..., 1:].unsqueeze(-2)
        table = torch.cat([self.lengths, self.starts, *ends], -2).expand(*shape, -1, -1)
        picked = table.gather(-1, index.unsqueeze(-2).expand(*shape, 6, 1)).squeeze(-1)
        width, height, x, y, left, right = picked.unbind(-1)
        ratio = width / height
        left, right = left * ratio, right * ratio
        return _Bin(index, x, y, width, height, left, right)


def _factor(num_bins: int, bound: float) -> float:
    """Return how much of the interval a share is."""
    return 2.0 * bound * (1.0 - SMALLEST_BIN * num_bins)


class _Bin(NamedTuple):
    """The bins of values: their numbers, corner, width and height, and slopes at both ends over the mean one."""

    place: Tensor
    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    left: Tensor
    right: Tensor

    def terms(self, theta: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        """Return the logarithm of the slope at ``theta``, where ``other`` is ``1 - theta``, and what it is made of.

        These are ``theta + left * other``, numerator and denominator.
        """
        falling = torch.addcmul(theta, self.left, other)
        numerator = torch.addcmul(theta * torch.addcmul(other, self.right, theta), other, falling)
        denominator = 1.0 + (self.left + self.right - 2.0) * theta * other
        log_slope = (self.height / self.width * numerator / denominator.square()).log()
        return log_slope, falling, numerator, denominator


class _Placed(NamedTuple):
    """The spline at some numbers, and what its derivatives are made of."""

    y: Tensor
    log_slope: Tensor
    outside: Tensor
    tables: _Tables
    bin: _Bin
    theta: Tensor
    eta: Tensor
    numerator: Tensor
    denominator: Tensor

    def for_backward(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the derivatives of values and of logarithms of slopes are made of."""
        tables = self.tables.shares, self.tables.tanh, self.tables.slopes
        parts = self.theta, self.eta, self.numerator, self.denominator
        return parameters, x, self.outside, *tables, *self.bin, *parts

    def bend(self) -> Tensor:
        """Return the derivatives of the logarithms of the slopes."""
        bin_, other = self.bin, 1.0 - self.theta
        middle, sharpness = other - self.theta, bin_.left + bin_.right - 2.0
        rising = (middle + bin_.right * self.theta - bin_.left * other) / self.numerator
        bend = 2.0 * (rising - sharpness * middle / self.denominator) / bin_.width
        return torch.where(self.outside, 0.0, bend)


def _place(parameters: Tensor, x: Tensor, num_bins: int, bound: float) -> _Placed:
    """Return the spline at some numbers."""
    tables = _Tables.of(parameters, num_bins, bound)
    outside = x.abs() >= bound
    inner = torch.where(outside, 0.0, x)
    bin_ = tables.at(inner, 0)
    theta = ((inner - bin_.x) / bin_.width).clamp(0.0, 1.0)
    other = 1.0 - theta
    log_slope, falling, numerator, denominator = bin_.terms(theta, other)
    eta = theta * falling / denominator
    return _Placed(
        torch.where(outside, x, bin_.y + bin_.height * eta),
        torch.where(outside, 0.0, log_slope),
        *(outside, tables, bin_, theta, eta, numerator, denominator),
    )


def _summed_to(grad: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of what was broadcast."""
    return grad if grad.shape == like.shape else grad.sum_to_size(like.shape)


class _Spline(Operation):
    """Values and logarithms of slopes, as one node of the graph: written out, its derivative would be 150."""

    @staticmethod
    def forward(
        ctx: Any, parameters: Tensor, x: Tensor, num_bins: int, bound: float
    ) -> tuple[Tensor, Tensor]:
        ctx.options = num_bins, bound
        ctx.set_materialize_grads(False)
        at = _place(parameters, x, num_bins, bound)
        ctx.save_for_backward(*at.for_backward(parameters, x))
        return at.y, at.log_slope

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        parameters, x, outside, shares, tanh, slopes, *rest = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        num_bins, bound = ctx.options
        if torch.is_grad_enabled():  # create_graph=True
            again = _place(parameters, x, num_bins, bound)
            inputs = [each for each, need in zip((parameters, x), needed, strict=True) if need]
            pairs = zip((again.y, again.log_slope), grads, strict=True)
            outputs, given = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
            found = iter(torch.autograd.grad(outputs, inputs, given, create_graph=True))
            return *(next(found) if need else None for need in needed), None, None  # type: ignore[return-value]
        bin_, (theta, eta, numerator, denominator) = _Bin(*rest[:7]), rest[7:]
        straight, of_slope = torch.zeros_like(eta) if grads[0] is None else grads[0], grads[1]
        of_y = torch.where(outside, 0.0, straight)
        other, of_eta = 1.0 - theta, of_y * bin_.height
        share, pull = theta * other / denominator, of_eta * eta
        of_x = of_eta * numerator / denominator.square()
        if of_slope is not None:
            of_slope = torch.where(outside, 0.0, of_slope)
            middle, sharpness, steep = other - theta, bin_.left + bin_.right - 2.0, of_slope / numerator
            pull = torch.add(pull, of_slope, alpha=2.0)
            bend = torch.addcmul(torch.addcmul(middle, bin_.right, theta), bin_.left, other, value=-1.0)
            bent = torch.addcmul(steep * bend, sharpness * middle, of_slope / denominator, value=-1.0)
            of_x = torch.add(of_x, bent, alpha=2.0)
        of_x = of_x / bin_.width
        grad_parameters = None
        if needed[0]:
            of_left, of_right = share * (of_eta - pull), -share * pull
            if of_slope is not None:
                of_left = torch.addcmul(of_left, steep * other, other)
                of_right = torch.addcmul(of_right, steep * theta, theta)
            of_mean = torch.addcmul(of_left * bin_.left, of_right, bin_.right)  # of minus its logarithm
            of_mean = of_mean if of_slope is None else of_mean - of_slope
            of_width = torch.addcmul(of_mean / bin_.width, of_x, theta, value=-1.0)
            of_height = of_y * eta - of_mean / bin_.height
            bins = torch.arange(num_bins, device=x.device)
            here = bins == bin_.place
            lengths = torch.stack([of_width, of_height], -1).unsqueeze(-1) * here.unsqueeze(-2)
            corners = torch.stack([-of_x, of_y], -1).unsqueeze(-1) * (bins < bin_.place).unsqueeze(-2)
            of_shares = _summed_to(lengths + corners, shares) * _factor(num_bins, bound)
            of_logits = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            ratio = bin_.width / bin_.height
            of_slopes = (of_left * ratio).unsqueeze(-1) * here[..., 1:]
            of_slopes = of_slopes + (of_right * ratio).unsqueeze(-1) * here[..., :-1]
            of_slopes = _summed_to(of_slopes, tanh) * slopes[..., 1:-1] * (1.0 - tanh.square())
            grad_parameters = torch.cat([of_logits.flatten(-2), of_slopes], -1)
        grad_x = _summed_to(torch.where(outside, straight, of_x), x) if needed[1] else None
        return grad_parameters, grad_x, None, None


class _SplineWithBend(_Spline):
    """The same beside the derivatives of the logarithms of slopes, of which no gradients are known."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, parameters: Tensor, x: Tensor, num_bins: int, bound: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.options = num_bins, bound
        ctx.set_materialize_grads(False)
        at = _place(parameters, x, num_bins, bound)
        ctx.save_for_backward(*at.for_backward(parameters, x))
        bend = at.bend()
        ctx.mark_non_differentiable(bend)
        return at.y, at.log_slope, bend

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return _Spline.backward(ctx, *grads[:2])


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
        self.parameters = parameters

    @property
    def tables(self) -> _Tables:
        """What the parameters say of the bins."""
        return _Tables.of(self.parameters, self.num_bins, self.bound)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and the logarithms of the slopes there.

        Args:
            x: Numbers that broadcast against ``batch``.
        """
        follow = torch.is_grad_enabled() and (self.parameters.requires_grad or x.requires_grad)
        if follow and not is_traced():
            y, log_slope = _Spline.apply(self.parameters, x, self.num_bins, self.bound)
        else:
            y, log_slope = _place(self.parameters, x, self.num_bins, self.bound)[:2]
        return y, log_slope

    def with_bend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values and logarithms of slopes, with gradients for parameters, and the derivatives of the latter.

        Args:
            x: Numbers that broadcast against ``batch``, without gradients.
        """
        if is_traced():
            at = _place(self.parameters, x, self.num_bins, self.bound)
            return at.y, at.log_slope, at.bend().detach()
        y, log_slope, bend = _SplineWithBend.apply(self.parameters, x, self.num_bins, self.bound)
        return y, log_slope, bend

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the spline has the values ``y``, and the logarithms of its slopes there.

        Args:
            y: Numbers that broadcast against ``batch``.
        """
        outside = y.abs() >= self.bound
        inner = torch.where(outside, 0.0, y)
        bin_ = self.tables.at(inner, 1)
        eta = ((inner - bin_.y) / bin_.height).clamp(0.0, 1.0)
        from_left = bin_.left - (bin_.left + bin_.right - 2.0) * eta
        is_left = from_left >= 1.0
        b = torch.where(is_left, from_left, 2.0 - from_left)
        here = torch.where(is_left, eta, 1.0 - eta)
        discriminant = (b - 2.0).square() + 4.0 * (b - 1.0) * (1.0 - here)
        share = 2.0 * here / (b + discriminant.clamp(min=torch.finfo(y.dtype).tiny).sqrt())
        theta, other = torch.where(is_left, share, 1.0 - share), torch.where(is_left, 1.0 - share, share)
        log_slope = bin_.terms(theta, other)[0]
        return torch.where(outside, y, bin_.x + bin_.width * theta), torch.where(outside, 0.0, log_slope)
