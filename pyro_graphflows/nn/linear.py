"""A linear layer in which output i depends on input j only where ``mask[i, j]`` is true."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import SparseMask
from pyro_graphflows.nn.sparse import SparsePattern, sparse_product, sparse_sample

__all__ = ["MaskedLinear", "fastest_engine"]

# An entry of a sparse matrix costs as much as some entries of a dense one, and a sparse product has an overhead of so
# many dense entries (benchmarks/layers.py).
SPARSE_COST = 6
SPARSE_OVERHEAD = 16_000
FUSED_OVERHEAD = 3_000  # within one fused operation (benchmarks/flows.py)


def fastest_engine(mask: SparseMask, products: int = 1, overhead: int = SPARSE_OVERHEAD) -> str:
    """Return the engine that is likely to be faster.

    Args:
        mask: The mask of a layer.
        products: The number of pieces in which the layer is multiplied, as when it is evaluated level by level.
        overhead: The overhead of a sparse product, in dense entries.

    Returns:
        "dense" or "sparse".
    """
    cost = SPARSE_COST * mask.nnz + overhead * products
    return "sparse" if cost < mask.shape[0] * mask.shape[1] else "dense"


class MaskedLinear(nn.Module):
    r"""Apply :math:`y = (W \circ M) x + b`.

    An output without inputs is its bias. Weights start uniform in :math:`\pm 1/\sqrt{n}`, with n the number of
    inputs that the mask leaves to the output, and biases at zero.

    There are two engines with the same numbers. The *dense* one keeps a matrix of weights and multiplies it by
    the mask. The *sparse* one keeps the weights of the mask's true entries alone, as a vector in row order, and
    its time and memory grow with their number. A saved state fits both.

    Shape:
        - Input: (\*, in_features), output: (\*, out_features).

    Args:
        mask: A boolean matrix, or a :class:`~pyro_graphflows.masks.SparseMask`, of shape (outputs, inputs).
        bias: Whether there is a bias.
        engine: "dense", "sparse", or "auto", which takes the dense one for small or well-filled masks.

    Attributes:
        engine: The engine in use.
        weight: The weights: a matrix (outputs, inputs), or the vector of the entries.
        bias: The bias, or None.

    Raises:
        GraphflowsError: If the mask is not a boolean matrix or the engine is not known.

    Example:
        >>> layer = MaskedLinear(torch.tensor([[True, False], [True, True]]))
        >>> layer(torch.zeros(3, 2)).shape, layer.engine
        (torch.Size([3, 2]), 'dense')
    """

    mask: Tensor
    pattern: SparsePattern

    def __init__(self, mask: Tensor | SparseMask, bias: bool = True, engine: str = "auto") -> None:
        super().__init__()
        if isinstance(mask, Tensor):
            if mask.dtype != torch.bool or mask.dim() != 2:
                raise GraphflowsError(
                    "Expected a boolean matrix as mask; got shape "
                    f"{tuple(mask.shape)} and dtype {mask.dtype}."
                )
            mask = SparseMask.from_dense(mask)
        if engine not in ("auto", "dense", "sparse"):
            raise GraphflowsError(f'Expected engine "auto", "dense" or "sparse"; got {engine!r}.')
        self.out_features, self.in_features = mask.shape
        self.nnz = mask.nnz
        self.engine = engine = fastest_engine(mask) if engine == "auto" else engine
        if engine == "dense":
            self.register_buffer("mask", mask.to_dense(), persistent=False)
            self.weight = nn.Parameter(torch.empty(mask.shape))
        else:
            self.pattern = SparsePattern(mask)
            self.weight = nn.Parameter(torch.empty(mask.nnz))
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew and set the biases to zero."""
        with torch.no_grad():
            self.weight.uniform_(-1, 1)
            if self.engine == "dense":
                fan_in = self.mask.sum(-1, keepdim=True).clamp(min=1)
                self.weight.mul_(self.mask / fan_in.sqrt())
            else:
                fan_in = torch.bincount(self.pattern.row, minlength=self.out_features)
                self.weight.div_(fan_in[self.pattern.row].sqrt())
            if self.bias is not None:
                self.bias.zero_()

    def zero_(self) -> None:
        """Set weights and biases to zero."""
        with torch.no_grad():
            self.weight.zero_()
            if self.bias is not None:
                self.bias.zero_()

    def set_rows_(self, rows: slice, weights: Tensor | float, bias: Tensor | None = None) -> None:
        """Set the weights, and the biases if given, of some consecutive outputs.

        Args:
            rows: The outputs, as a slice with a start and a stop.
            weights: A matrix of shape (outputs, in_features), or one number for all; what is off the mask does not
                matter.
            bias: Their biases.
        """
        with torch.no_grad():
            if self.engine == "dense":
                self.weight[rows] = torch.as_tensor(weights).to(self.weight)
            else:
                ends = torch.tensor([rows.start, rows.stop], device=self.pattern.row.device)
                start, stop = torch.searchsorted(self.pattern.row, ends.to(self.pattern.row)).tolist()
                if isinstance(weights, Tensor):
                    places = self.pattern.row[start:stop] - rows.start, self.pattern.column[start:stop]
                    weights = weights.to(self.weight)[places]
                self.weight[start:stop] = weights
            if bias is not None:
                assert self.bias is not None
                self.bias[rows] = bias.to(self.bias)

    def sparse_mask(self) -> SparseMask:
        """Return the mask by its true entries."""
        if self.engine == "dense":
            return SparseMask.from_dense(self.mask)
        indices = torch.stack([self.pattern.row, self.pattern.column])
        return SparseMask(indices, (self.out_features, self.in_features))

    def entries(self) -> Tensor:
        """Return the weights in the engine's layout: a matrix that is zero off the mask, or the vector."""
        return self.weight * self.mask if self.engine == "dense" else self.weight

    def masked_weight(self) -> Tensor:
        """Return the matrix of weights, zero off the mask, whatever the engine."""
        return self.entries() if self.engine == "dense" else self.pattern.to_dense(self.weight)

    def multiply(self, entries: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply the last dimension of ``x`` by the matrix with other ``entries``, in the engine's layout."""
        if self.engine == "dense":
            return F.linear(x, entries, bias)
        return self.pattern.linear(entries, x, bias)

    def product(
        self, entries: Tensor, x: Tensor, bias: Tensor | None = None, *, transposed: bool = False
    ) -> Tensor:
        """Multiply ``x``, of shape (features, n), by the matrix or its transpose; without gradient."""
        if self.engine == "dense":
            matrix = entries.T if transposed else entries
            return matrix @ x if bias is None else torch.addmm(bias.unsqueeze(-1), matrix, x)
        out = sparse_product(entries, x, self.pattern, transposed)
        return out if bias is None else out.add_(bias.unsqueeze(-1))

    def sample(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the gradient of the entries, ``left @ right.T`` in the engine's layout, for features-first factors.

        A dense one is not masked.
        """
        return left @ right.T if self.engine == "dense" else sparse_sample(left, right, self.pattern)

    def places(self) -> Tensor:
        """Return for each true entry of the mask, in row order, its place among the flattened entries."""
        if self.engine == "sparse":
            return torch.arange(self.nnz, device=self.weight.device)
        row, column = self.sparse_mask().indices
        return row * self.in_features + column

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension of ``x``."""
        return self.multiply(self.entries(), x, self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take weights that were saved by the other engine too."""
        weight = state_dict.get(prefix + "weight")
        places = self.sparse_mask().indices
        if weight is not None and weight.dim() != self.weight.dim():
            rows, columns = places.to(weight.device)
            if self.engine == "sparse" and weight.shape == (self.out_features, self.in_features):
                state_dict[prefix + "weight"] = weight[rows, columns]
            elif self.engine == "dense" and weight.shape == (self.nnz,):
                dense = weight.new_zeros(self.out_features, self.in_features)
                dense[rows, columns] = weight
                state_dict[prefix + "weight"] = dense
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        density = self.nnz / max(1, self.out_features * self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, engine={self.engine}, density={density:.3g}"
        )
