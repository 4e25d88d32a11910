r"""Linear layers with a mask: output i depends on input j only where ``mask[i, j]`` is true.

There are two engines with the same numbers. The *dense* one multiplies a matrix of weights by the mask. The *sparse*
one keeps the weights of the mask's true entries alone, as a vector, in time and memory that grow with their number.
With ``A`` the matrix and x of shape (inputs, n), features first, it needs three products: :math:`A x`; :math:`A^\top
g` for the gradient in x; and for the gradient in the values the entries :math:`(g x^\top)_{ij}` at the places of the
pattern alone. Each is the derivative of the others, so two autograd functions that call each other have derivatives of
every order.
"""

import math
import warnings
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import SparseMask
from pyro_graphflows.nn.operation import Operation

__all__ = [
    "FUSED_OVERHEAD",
    "MaskedLinear",
    "SparsePattern",
    "fastest_engine",
    "sparse_product",
    "sparse_sample",
]

# An entry of a sparse matrix costs as much as some entries of a dense one, and a sparse product has an overhead of so
# many dense entries (benchmarks/layers.py).
SPARSE_COST = 6
SPARSE_OVERHEAD = 16_000
FUSED_OVERHEAD = 3_000  # within one fused operation (benchmarks/flows.py)

CHUNK = 65_536  # numbers gathered at a time where torch has no kernel, so that memory stays bounded


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


class SparsePattern(nn.Module):
    """The places of the entries of a sparse matrix, in row order; its buffers follow the module's device.

    Args:
        mask: The places.

    Example:
        >>> pattern = SparsePattern(SparseMask.from_dense(torch.tensor([[True, False], [True, True]])))
        >>> values = torch.tensor([1.0, 2.0, 3.0])
        >>> pattern.linear(values, torch.tensor([[1.0, 10.0]])).tolist()
        [[1.0, 32.0]]
    """

    row: Tensor
    column: Tensor
    starts: Tensor
    columns: Tensor
    transposed_starts: Tensor
    transposed_columns: Tensor
    transposition: Tensor

    def __init__(self, mask: SparseMask) -> None:
        super().__init__()
        self.shape = mask.shape
        rows, columns = mask.indices
        transposition = torch.argsort(columns, stable=True)
        buffers = {
            "row": rows.contiguous(),
            "column": columns.contiguous(),
            "starts": _starts(rows, mask.shape[0]),
            "columns": columns.to(torch.int32),
            "transposed_starts": _starts(columns[transposition], mask.shape[1]),
            "transposed_columns": rows[transposition].to(torch.int32),
            "transposition": transposition,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    @property
    def nnz(self) -> int:
        """The number of entries."""
        return self.row.shape[0]

    def matmul(self, values: Tensor, x: Tensor) -> Tensor:
        """Return :math:`A x` for x of shape (inputs, n)."""
        return _Product.apply(values, x, self, False)

    def rmatmul(self, values: Tensor, x: Tensor) -> Tensor:
        r"""Return :math:`A^\top x` for x of shape (outputs, n)."""
        return _Product.apply(values, x, self, True)

    def linear(self, values: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the matrix to the last dimension of ``x``, as :func:`torch.nn.functional.linear` does.

        The result has its features first in memory, and so enters the next such product without a copy.
        """
        return _Linear.apply(values, x, bias, self)

    def to_dense(self, values: Tensor) -> Tensor:
        """Return the matrix with the entries given."""
        dense = values.new_zeros(self.shape)
        return dense.index_put((self.row, self.column), values)

    def extra_repr(self) -> str:
        """Describe the pattern in one line."""
        return f"shape={self.shape}, nnz={self.nnz}"


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
        """Draw new weights and set the biases to zero."""
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


class _Product(Operation):
    """``A x``, or the product with the transpose."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, pattern: SparsePattern, transposed: bool) -> Tensor:
        ctx.save_for_backward(values, x)
        ctx.pattern, ctx.transposed = pattern, transposed
        return sparse_product(values, x, pattern, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values, x = ctx.saved_tensors
        grad = grads[0]
        grad_values = grad_x = None
        if ctx.needs_input_grad[0]:
            left, right = (x, grad) if ctx.transposed else (grad, x)
            grad_values = _Sampled.apply(left, right, ctx.pattern)
        if ctx.needs_input_grad[1]:
            grad_x = _Product.apply(values, grad, ctx.pattern, not ctx.transposed)
        return grad_values, grad_x, None, None


class _Sampled(Operation):
    """The entries of ``left @ right.T`` at the places of the pattern."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, pattern: SparsePattern) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.pattern = pattern
        return sparse_sample(left, right, pattern)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        left, right = ctx.saved_tensors
        grad_left = grad_right = None
        if ctx.needs_input_grad[0]:
            grad_left = _Product.apply(grads[0], right, ctx.pattern, False)
        if ctx.needs_input_grad[1]:
            grad_right = _Product.apply(grads[0], left, ctx.pattern, True)
        return grad_left, grad_right, None


class _Linear(Operation):
    """``x A^T + bias`` for x with features last; one node of the graph where its parts would be many."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, bias: Tensor | None, pattern: SparsePattern) -> Tensor:
        ctx.save_for_backward(values, x)
        ctx.pattern = pattern
        out = sparse_product(values, _features_first(x), pattern, False)
        if bias is not None:
            out.add_(bias[:, None])
        return _features_last(out, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        values, x = ctx.saved_tensors
        # The gradient is to be differentiated itself only if gradients are enabled here.
        product = _Product.apply if torch.is_grad_enabled() else sparse_product
        sample = _Sampled.apply if torch.is_grad_enabled() else sparse_sample
        grad = _features_first(grads[0])
        grad_values = grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_values = sample(grad, _features_first(x), ctx.pattern)
        if ctx.needs_input_grad[1]:
            grad_x = _features_last(product(values, grad, ctx.pattern, True), x)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(1)
        return grad_values, grad_x, grad_bias, None


def _features_first(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).T.contiguous()


def _features_last(out: Tensor, like: Tensor) -> Tensor:
    return out.T.reshape(*like.shape[:-1], out.shape[0])


def sparse_product(values: Tensor, x: Tensor, pattern: SparsePattern, transposed: bool) -> Tensor:
    """Multiply x, of shape (features, n), by the matrix or its transpose, in CSR form; no gradient.

    On CPU, torch's bags of embeddings (sums of weighted rows) are several times as fast as its sparse matrices, and
    need no MKL.
    """
    starts, columns, shape = pattern.starts, pattern.columns, pattern.shape
    if transposed:
        starts, columns, shape = pattern.transposed_starts, pattern.transposed_columns, (shape[1], shape[0])
    if not values.numel() or not x.numel():
        return x.new_zeros(shape[0], x.shape[1])
    if transposed:
        values = values.index_select(0, pattern.transposition)
    if x.is_cuda:
        return _csr(starts, columns, values, shape) @ x
    # Directly, since the checks of torch.nn.functional.embedding_bag cost more than a small product. 0: sums.
    return torch.embedding_bag(x.contiguous(), columns, starts, False, 0, False, values, True)[0]


def sparse_sample(left: Tensor, right: Tensor, pattern: SparsePattern) -> Tensor:
    """Return the entries of ``left @ right.T`` at the places of the pattern; no gradient."""
    if pattern.nnz * left.shape[1] <= CHUNK:
        # Gathering costs less than a call of the kernel.
        return _row_products(left, right, pattern.row, pattern.column)
    if left.is_cuda or torch.backends.mkl.is_available():
        zeros = _csr(pattern.starts, pattern.columns, left.new_zeros(pattern.nnz), pattern.shape)
        return torch.sparse.sampled_addmm(zeros, left.contiguous(), right.contiguous().T, beta=0.0).values()
    size = max(1, CHUNK // left.shape[1])
    pieces = zip(pattern.row.split(size), pattern.column.split(size), strict=True)
    return torch.cat([_row_products(left, right, row, column) for row, column in pieces])


def _row_products(left: Tensor, right: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return torch.linalg.vecdot(left.index_select(0, row), right.index_select(0, column))


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Build the torch matrix; the only place that does."""
    _take_the_beta_warning()
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


@lru_cache(maxsize=1)
def _take_the_beta_warning() -> None:
    """Torch says once in each process that its CSR tensors are in beta; hear it here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        index = torch.zeros(1, dtype=torch.int64)
        torch.sparse_csr_tensor(index, index[:0], torch.zeros(0), (0, 0), check_invariants=False)


def _starts(sorted_rows: Tensor, num_rows: int) -> Tensor:
    counts = torch.bincount(sorted_rows, minlength=num_rows)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
