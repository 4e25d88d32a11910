r"""Activations with known slopes.

A residual block :math:`z + g(z)` is invertible when every diagonal entry of the Jacobian of g is above −1,
and the bound on g needs the range of the activation's derivative. So each activation here knows it: for every
x and every value of its own parameters,

.. math:: \texttt{slope\_min} \le \varphi'(x) \le \texttt{slope\_max}, \qquad |\varphi'(x)| \le 1.

The constants are outer bounds, rounded away from zero in the fourth decimal. ``derivative`` is itself
differentiable, as log-determinants need.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError

__all__ = ["ELU", "Activation", "LipMish", "LipSwish", "ReLU", "Tanh", "make_activation"]


class Activation(nn.Module):
    """Base class: subclasses write ``forward``, ``derivative`` and set ``slope_min`` and ``slope_max``."""

    slope_min: ClassVar[float]
    slope_max: ClassVar[float]

    @property
    def lipschitz(self) -> float:
        """A Lipschitz constant."""
        return max(abs(self.slope_min), abs(self.slope_max))

    def derivative(self, x: Tensor) -> Tensor:
        """Return the derivative at each entry of ``x``."""
        raise NotImplementedError

    def forward_and_derivative(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the derivative, which may share work."""
        return self(x), self.derivative(x)


class ELU(Activation):
    """Exponential linear unit: x above zero, exp(x) − 1 below."""

    slope_min = 0.0
    slope_max = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to each entry."""
        return F.elu(x)

    def derivative(self, x: Tensor) -> Tensor:
        """Return exp(min(x, 0))."""
        return x.clamp(max=0).exp()


class ReLU(Activation):
    """The positive part. Its derivative at zero counts as zero."""

    slope_min = 0.0
    slope_max = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to each entry."""
        return F.relu(x)

    def derivative(self, x: Tensor) -> Tensor:
        """Return one above zero and zero elsewhere."""
        return (x > 0).to(x.dtype)


class Tanh(Activation):
    """Hyperbolic tangent."""

    slope_min = 0.0
    slope_max = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to each entry."""
        return torch.tanh(x)

    def derivative(self, x: Tensor) -> Tensor:
        """Return 1 − tanh(x)²."""
        return self.forward_and_derivative(x)[1]

    def forward_and_derivative(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tanh(x) and 1 − tanh(x)²."""
        value = torch.tanh(x)
        return value, 1 - value * value


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

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to each entry."""
        return x * torch.sigmoid(F.softplus(self.raw_beta) * x) / 1.1

    def derivative(self, x: Tensor) -> Tensor:
        """Return the derivative at each entry of ``x``."""
        return self.forward_and_derivative(x)[1]

    def forward_and_derivative(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the derivative, sharing the sigmoid."""
        scaled = F.softplus(self.raw_beta) * x
        gate = torch.sigmoid(scaled)
        return x * gate / 1.1, gate * (1 + scaled * torch.sigmoid(-scaled)) / 1.1


class LipMish(Activation):
    r"""Mish, :math:`x \tanh(\log(1 + e^x))`, divided by 1.0885.

    References:
        [1] Misra (2020), Mish: A Self Regularized Non-Monotonic Activation Function. The divisor 1.088 that
        is often used gives a slope of 1.0005.
    """

    slope_min = -0.1040
    slope_max = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to each entry."""
        return x * torch.tanh(F.softplus(x)) / 1.0885

    def derivative(self, x: Tensor) -> Tensor:
        """Return the derivative at each entry of ``x``."""
        return self.forward_and_derivative(x)[1]

    def forward_and_derivative(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the derivative, sharing the hyperbolic tangent."""
        gate = torch.tanh(F.softplus(x))
        return x * gate / 1.0885, (gate + x * (1 - gate * gate) * torch.sigmoid(x)) / 1.0885


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
