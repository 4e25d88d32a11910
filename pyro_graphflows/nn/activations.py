r"""Activations with known slopes.

A residual block :math:`z + g(z)` is invertible when every diagonal entry of the Jacobian of g is above −1, and
the bound on g needs the range of the activation's derivative. So each activation here knows it: for every x
and every value of its parameters,

.. math:: \texttt{slope\_min} \le \varphi'(x) \le \texttt{slope\_max}, \qquad |\varphi'(x)| \le 1.

The constants are outer bounds, rounded away from zero in the fourth decimal.

Value, slope and curvature are computed together, with one exponential. The gradient of the value is the slope, and
that of the slope, which log-determinants need, is the curvature; with these at hand a backward pass is
two products. Derivatives of every order exist.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.nn.operation import Operation

__all__ = ["ELU", "Activation", "LipMish", "LipSwish", "ReLU", "Tanh", "make_activation"]


class Activation(nn.Module):
    """Base class: a function of each entry that knows its derivative and the derivative's range.

    Subclasses set ``slope_min`` and ``slope_max`` and write :meth:`terms` and :meth:`curvature`. Where the derivatives
    are functions of the value that cost less, they set ``value_tells`` and write :meth:`terms_of_value`.
    """

    slope_min: ClassVar[float]
    slope_max: ClassVar[float]
    value_tells: ClassVar[bool] = False

    @property
    def lipschitz(self) -> float:
        """A Lipschitz constant."""
        return max(abs(self.slope_min), abs(self.slope_max))

    @staticmethod
    def terms(x: Tensor, order: int) -> tuple[Tensor, ...]:
        """Return the value and the derivatives up to ``order`` (0, 1 or 2); need not be differentiable."""
        raise NotImplementedError

    @staticmethod
    def terms_of_value(value: Tensor, order: int) -> tuple[Tensor, ...]:
        """Return what :meth:`terms` does, ``order`` 1 or 2, from the value alone; where ``value_tells``."""
        raise NotImplementedError

    @staticmethod
    def curvature(x: Tensor) -> Tensor:
        """Return the second derivative, by differentiable operations."""
        raise NotImplementedError

    def input_scale(self) -> Tensor | None:
        r"""Return the number :math:`\beta` of an activation :math:`\varphi(\beta x) / \beta`, where there is one.

        :meth:`terms` and :meth:`curvature` are those of :math:`\varphi`.
        """
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to each entry."""
        beta = self.input_scale()
        return _Value.apply(x, type(self)) if beta is None else _Value.apply(beta * x, type(self)) / beta

    def forward_and_derivative(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the derivative at each entry of ``x``."""
        beta = self.input_scale()
        x = x if beta is None else beta * x
        value, slope = value_and_slope(x, type(self))
        return (value if beta is None else value / beta), slope

    def derivative(self, x: Tensor) -> Tensor:
        """Return the derivative at each entry of ``x``."""
        return self.forward_and_derivative(x)[1]


class ELU(Activation):
    """Exponential linear unit: x above zero, exp(x) − 1 below."""

    slope_min = 0.0
    slope_max = 1.0
    value_tells = True

    @staticmethod
    def terms(x: Tensor, order: int) -> tuple[Tensor, ...]:
        """Return the value and the derivatives up to ``order``."""
        value = F.elu(x)
        return ELU.terms_of_value(value, order) if order else (value,)

    @staticmethod
    def terms_of_value(value: Tensor, order: int) -> tuple[Tensor, ...]:
        """Return the value and the derivatives up to ``order``, from the value."""
        slope = value.clamp(max=0).add_(1)
        if order == 1:
            return value, slope
        # the slope where x and so the value is <= 0, else 0: a fifth of the time that masked_fill takes on CPU
        return value, slope, slope - torch.ops.aten.threshold_backward(slope, value, 0)

    @staticmethod
    def curvature(x: Tensor) -> Tensor:
        """Return the second derivative."""
        return x.clamp(max=0).exp() * (x <= 0)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to each entry."""
        return F.elu(x)


class ReLU(Activation):
    """The positive part. Its derivative at zero counts as zero."""

    slope_min = 0.0
    slope_max = 1.0

    @staticmethod
    def terms(x: Tensor, order: int) -> tuple[Tensor, ...]:
        """Return the value and the derivatives up to ``order``."""
        return (F.relu(x), (x > 0).to(x.dtype), torch.zeros_like(x))[: order + 1]

    @staticmethod
    def curvature(x: Tensor) -> Tensor:
        """Return the second derivative."""
        return 0 * x

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to each entry."""
        return F.relu(x)


class Tanh(Activation):
    """Hyperbolic tangent."""

    slope_min = 0.0
    slope_max = 1.0
    value_tells = True

    @staticmethod
    def terms(x: Tensor, order: int) -> tuple[Tensor, ...]:
        """Return the value and the derivatives up to ``order``."""
        value = torch.tanh(x)
        return Tanh.terms_of_value(value, order) if order else (value,)

    @staticmethod
    def terms_of_value(value: Tensor, order: int) -> tuple[Tensor, ...]:
        """Return the value and the derivatives up to ``order``, from the value."""
        slope = 1 - value * value
        return (value, slope, value * slope * -2)[: order + 1]

    @staticmethod
    def curvature(x: Tensor) -> Tensor:
        """Return the second derivative."""
        value = torch.tanh(x)
        return -2 * value * (1 - value * value)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to each entry."""
        return torch.tanh(x)


class LipSwish(Activation):
    r"""Swish, divided by 1.1: :math:`x\,\sigma(\beta x) / 1.1` with a learnable :math:`\beta > 0`.

    The slope depends on :math:`\beta x` alone, so its range is the same for each :math:`\beta`.

    References:
        [1] Chen et al. (2019), Residual Flows for Invertible Generative Modeling, Section 3.3.
    """

    slope_min = -0.0909
    slope_max = 0.9999

    def __init__(self) -> None:
        super().__init__()
        self.raw_beta = nn.Parameter(torch.tensor(0.5))  # beta = softplus(raw_beta)

    @staticmethod
    def terms(x: Tensor, order: int) -> tuple[Tensor, ...]:
        """Return the value and the derivatives up to ``order``, for beta = 1."""
        if order == 0:
            return (F.silu(x).div_(1.1),)
        gate = torch.sigmoid(x)
        value = x * gate
        rest = torch.sub(x, value).add_(1)
        slope = gate * rest
        if order == 1:
            return value.div_(1.1), slope.div_(1.1)
        # The curvature is gate (1 - gate) (1 + rest - value).
        curve = rest.sub_(value).add_(1).mul_(gate)
        curve.addcmul_(curve, gate, value=-1)
        return value.div_(1.1), slope.div_(1.1), curve.div_(1.1)

    @staticmethod
    def curvature(x: Tensor) -> Tensor:
        """Return the second derivative, for beta = 1."""
        gate = torch.sigmoid(x)
        return gate * (1 - gate) * (2 + x - 2 * x * gate) / 1.1

    def input_scale(self) -> Tensor:
        """Return beta."""
        return F.softplus(self.raw_beta)


class LipMish(Activation):
    r"""Mish, :math:`x \tanh(\log(1 + e^x))`, divided by 1.0885.

    With :math:`e = e^x` and :math:`n = e (e + 2)` the hyperbolic tangent is :math:`t = n / (n + 2)`, with
    :math:`t' = 4 e (1 + e) / (n + 2)^2` and
    :math:`t'' = 4 e (1 + 2 e) / (n + 2)^2 - 4 t' e (1 + e) / (n + 2)`.

    References:
        [1] Misra (2020), Mish: A Self Regularized Non-Monotonic Activation Function. The divisor 1.088
        that is often used gives a slope of 1.0005.
    """

    slope_min = -0.1040
    slope_max = 1.0

    @staticmethod
    def terms(x: Tensor, order: int) -> tuple[Tensor, ...]:
        """Return the value and the derivatives up to ``order``."""
        bounded = x.clamp(max=20)  # beyond, t is one in double precision too, and t' is zero
        e = bounded.exp()
        t = (e + 2).mul_(e)
        inverse = (t + 2).reciprocal_()
        if order == 0:
            return (t.mul_(inverse.mul_(1 / 1.0885)).mul_(x),)
        # With k = e (1 + e) / (n + 2) and p = k / (n + 2): t' = 4 p, t'' = 4 (2 p - e / (n + 2)^2 - 4 p k). Every
        # factor is below one, or it is multiplied by the inverse first: nothing overflows.
        share = e * inverse
        k = torch.addcmul(share, share, e)
        inverse.mul_(1 / 1.0885)
        t.mul_(inverse)
        p = k * inverse
        slope = torch.addcmul(t, bounded, p, value=4)
        value = t.mul_(x)
        if order == 1:
            return value, slope
        rest = share.mul_(inverse).addcmul_(p, k, value=4).sub_(p, alpha=2)
        return value, slope, p.mul_(8).addcmul_(bounded, rest, value=-4)

    @staticmethod
    def curvature(x: Tensor) -> Tensor:
        """Return the second derivative."""
        x = x.clamp(max=20)
        e = x.exp()
        inverse = 1 / (e * (e + 2) + 2)
        share = e * inverse
        first = 4 * share * ((1 + e) * inverse)
        second = 4 * share * ((1 + 2 * e) * inverse) - 4 * first * (share * (1 + e))
        return (2 * first + x * second) / 1.0885


def value_and_slope(x: Tensor, activation: type[Activation]) -> tuple[Tensor, Tensor]:
    """Return value and slope of an activation without input scale, with derivatives of every order."""
    if not torch.is_grad_enabled():
        # Iterative solvers call this often: spare them the function's overhead.
        value, slope = activation.terms(x, 1)
    else:
        value, slope = _ValueAndSlope.apply(x, activation, x.requires_grad)[:2]
    return value, slope


class _Value(Operation):
    """The value; its gradient is the slope."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, activation: type[Activation]) -> Tensor:
        return activation.terms(x, 0)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.activation = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * _ValueAndSlope.apply(x, ctx.activation, False)[1], None


class _ValueAndSlope(Operation):
    """Value and slope; their gradients are slope and curvature, which is computed on the way if wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, activation: type[Activation], save: bool) -> tuple[Tensor, ...]:
        return activation.terms(x, 2 if save else 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.activation = inputs[1]
        ctx.save_for_backward(inputs[0], *output[1:])
        if len(output) == 3:
            ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        x, *known = ctx.saved_tensors
        grad_value, grad_slope = grads[:2]
        if len(known) == 2 and not torch.is_grad_enabled():
            slope, curvature = known
        else:
            # The derivative will itself be differentiated.
            slope = _ValueAndSlope.apply(x, ctx.activation, True)[1]
            curvature = ctx.activation.curvature(x)
        if grad_slope is None:
            return None if grad_value is None else grad_value * slope, None, None
        if grad_value is None:
            return grad_slope * curvature, None, None
        return torch.addcmul(grad_value * slope, grad_slope, curvature), None, None


_ACTIVATIONS: dict[str, type[Activation]] = {
    "elu": ELU,
    "lipmish": LipMish,
    "lipswish": LipSwish,
    "relu": ReLU,
    "tanh": Tanh,
}


def make_activation(activation: str | nn.Module) -> nn.Module:
    """Return the activation of a name; a module is returned as it is.

    Args:
        activation: One of "elu", "lipmish", "lipswish", "relu", "tanh", or a module.

    Returns:
        A module.

    Raises:
        GraphflowsError: If the name is not known.

    Example:
        >>> make_activation("elu").slope_max
        1.0
    """
    if isinstance(activation, nn.Module):
        return activation
    if activation not in _ACTIVATIONS:
        raise GraphflowsError(
            f"Expected an activation among {', '.join(sorted(_ACTIVATIONS))}, or a module; "
            f"got {activation!r}."
        )
    return _ACTIVATIONS[activation]()
