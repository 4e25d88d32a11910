r"""Sparse matrices whose entries are at fixed places: products, and their derivatives of every order.

With ``A`` the matrix and x of shape (inputs, n), features first, training needs three products: :math:`A x`;
:math:`A^\top g` for the gradient in x; and for the gradient in the values the entries :math:`(g x^\top)_{ij}` at the
places of the pattern alone. Each is the derivative of the others, so two autograd functions that call each other have
derivatives of every order.
"""

import math
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from pyro_graphflows.capture import CAPTURING
from pyro_graphflows.masks import SparseMask
from pyro_graphflows.nn.operation import Operation

__all__ = ["SparsePattern", "sparse_product", "sparse_sample"]

FEW = 32_768  # up to here gathering costs less than a call of torch's kernel
CHUNK = 65_536  # numbers gathered at a time where torch has no kernel, so that memory stays bounded


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
        self.shape, self.nnz = mask.shape, mask.nnz
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
        self._zeros: Tensor | None = None

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

    def zeros(self, like: Tensor) -> Tensor:
        """Return torch's sparse matrix of zeros at these places; it is kept, and not to be changed."""
        known = self._zeros
        if known is None or known.dtype != like.dtype or known.device != like.device:
            zeros = like.detach().new_zeros(self.nnz)
            self.__dict__["_zeros"] = known = _csr(self.starts, self.columns, zeros, self.shape)
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zeros": None}

    def to_dense(self, values: Tensor) -> Tensor:
        """Return the matrix with the entries given."""
        dense = values.new_zeros(self.shape)
        return dense.index_put((self.row, self.column), values)

    def extra_repr(self) -> str:
        """Describe the pattern in one line."""
        return f"shape={self.shape}, nnz={self.nnz}"


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
    shape = pattern.shape[::-1] if transposed else pattern.shape
    if not values.numel() or not x.numel():
        return x.new_zeros(shape[0], x.shape[1])
    if transposed:
        starts, columns = pattern.transposed_starts, pattern.transposed_columns
        values = values.index_select(0, pattern.transposition)
    else:
        starts, columns = pattern.starts, pattern.columns
    if x.is_cuda:
        return _csr(starts, columns, values, shape) @ x
    # Directly, since the checks of torch.nn.functional.embedding_bag cost more than a small product. 0: sums.
    return torch.embedding_bag(x.contiguous(), columns, starts, False, 0, False, values, True)[0]


def sparse_sample(left: Tensor, right: Tensor, pattern: SparsePattern) -> Tensor:
    """Return the entries of ``left @ right.T`` at the places of the pattern; no gradient."""
    if pattern.nnz * left.shape[1] <= FEW:
        return _row_products(left, right, pattern.row, pattern.column)
    # A captured program has no sparse matrices.
    if not CAPTURING.get() and (left.is_cuda or torch.backends.mkl.is_available()):
        zeros = pattern.zeros(left)
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
