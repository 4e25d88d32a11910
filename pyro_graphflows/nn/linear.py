"""A linear layer in which output i depends on input j only where ``mask[i, j]`` is true."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import SparseMask

__all__ = ["MaskedLinear"]


class MaskedLinear(nn.Module):
    r"""Apply :math:`y = (W \circ M) x + b`.

    An output without inputs is its bias. Weights start uniform in :math:`\pm 1/\sqrt{n}`, with n the number
    of inputs that the mask leaves to the output, and biases at zero.

    Shape:
        - Input: (\*, in_features), output: (\*, out_features).

    Args:
        mask: A boolean matrix, or a :class:`~pyro_graphflows.masks.SparseMask`, of shape (outputs, inputs).
        bias: Whether there is a bias.

    Raises:
        GraphflowsError: If the mask is not a boolean matrix.

    Example:
        >>> layer = MaskedLinear(torch.tensor([[True, False], [True, True]]))
        >>> layer(torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    mask: Tensor

    def __init__(self, mask: Tensor | SparseMask, bias: bool = True) -> None:
        super().__init__()
        if isinstance(mask, Tensor):
            if mask.dtype != torch.bool or mask.dim() != 2:
                raise GraphflowsError(
                    "Expected a boolean matrix as mask; got shape "
                    f"{tuple(mask.shape)} and dtype {mask.dtype}."
                )
            mask = SparseMask.from_dense(mask)
        self.out_features, self.in_features = mask.shape
        self.register_buffer("mask", mask.to_dense(), persistent=False)
        self.weight = nn.Parameter(torch.empty(mask.shape))
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew and set the biases to zero."""
        fan_in = self.mask.sum(-1, keepdim=True).clamp(min=1)
        with torch.no_grad():
            self.weight.uniform_(-1, 1).mul_(self.mask / fan_in.sqrt())
            if self.bias is not None:
                self.bias.zero_()

    def zero_(self) -> None:
        """Set weights and biases to zero."""
        with torch.no_grad():
            self.weight.zero_()
            if self.bias is not None:
                self.bias.zero_()

    def masked_weight(self) -> Tensor:
        """Return the weights, zero off the mask."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension of ``x``."""
        return F.linear(x, self.masked_weight(), self.bias)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        density = int(self.mask.sum()) / max(1, math.prod(self.mask.shape))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, density={density:.3g}"
        )
