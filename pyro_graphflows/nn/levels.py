"""The rows of a masked layer cut into levels, and values that become known level by level."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_graphflows.masks import SparseMask
from pyro_graphflows.nn.linear import MaskedLinear
from pyro_graphflows.nn.sparse import SparsePattern

__all__ = ["Block", "LevelBlocks", "Runs"]


class Runs:
    """Values known so far, features last, in runs of equal batch shape.

    Batch shapes broadcast: what was observed may lack the particle dimensions of what was drawn. Each run is
    multiplied by its own columns, so that nothing is expanded before it must be.
    """

    def __init__(self) -> None:
        self._runs: list[Tensor] = []

    def copy(self) -> "Runs":
        """Return runs that go their own way from here."""
        other = Runs()
        other._runs = list(self._runs)
        return other

    def append(self, x: Tensor) -> None:
        """Add the values of one more level."""
        if x.shape[-1] == 0:
            return
        if self._runs and self._runs[-1].shape[:-1] == x.shape[:-1]:
            self._runs[-1] = torch.cat([self._runs[-1], x], -1)
        else:
            self._runs.append(x)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the weight to the concatenation of all runs."""
        if len(self._runs) == 1:
            return F.linear(self._runs[0], weight, bias)
        total = weight.new_zeros(weight.shape[0]) if bias is None else bias
        start = 0
        for run in self._runs:
            stop = start + run.shape[-1]
            total = F.linear(run, weight[:, start:stop]) + total
            start = stop
        return total

    def sparse_linear(self, pattern: SparsePattern, values: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the sparse matrix to the concatenation of all runs, expanded."""
        if len(self._runs) > 1:
            shape = torch.broadcast_shapes(*(run.shape[:-1] for run in self._runs))
            self._runs = [torch.cat([run.expand(*shape, -1) for run in self._runs], -1)]
        known = self._runs[0] if self._runs else values.new_zeros(0)
        return pattern.linear(values, known, bias)


class Block:
    """The rows of one level, with the weights of one evaluation."""

    def __init__(self, weight: Tensor, bias: Tensor | None, pattern: SparsePattern | None = None) -> None:
        self._weight = weight
        self._bias = bias
        self._pattern = pattern
        self.num_rows = weight.shape[0] if pattern is None else pattern.shape[0]

    def __call__(self, runs: Runs) -> Tensor:
        """Apply the rows to all that is known."""
        if self._pattern is None:
            return runs.linear(self._weight, self._bias)
        return runs.sparse_linear(self._pattern, self._weight, self._bias)


class LevelBlocks(nn.Module):
    """How one layer is cut into levels.

    Args:
        layer: The layer.
        input_order: The layer's columns in order of levels; None if they are. Columns may be left out.
        output_order: The layer's rows in order of levels; None if they are.
        rows: The number of rows of each level.
        columns: The number of columns of all levels up to each.
    """

    input_order: Tensor | None
    output_order: Tensor | None
    value_order: Tensor

    def __init__(
        self,
        layer: MaskedLinear,
        input_order: Sequence[int] | None,
        output_order: Sequence[int] | None,
        rows: Sequence[int],
        columns: Sequence[int],
    ) -> None:
        super().__init__()
        self.rows, self.columns = list(rows), list(columns)
        self.register_buffer("input_order", _index(input_order), persistent=False)
        self.register_buffer("output_order", _index(output_order), persistent=False)
        if layer.engine == "sparse":
            mask = layer.sparse_mask()
            row, column = mask.indices.numpy()
            row = _places(output_order, mask.shape[0])[row]
            column = _places(input_order, mask.shape[1])[column]
            kept = np.flatnonzero(column >= 0)
            order = kept[np.lexsort((column[kept], row[kept]))]
            self.register_buffer("value_order", torch.from_numpy(order), persistent=False)
            stops = np.searchsorted(row[order], np.cumsum(self.rows))
            self.patterns = nn.ModuleList()
            starts = [0, *stops[:-1]]
            firsts = np.cumsum(self.rows) - self.rows
            for first, start, stop, size, width in zip(
                firsts, starts, stops, self.rows, self.columns, strict=True
            ):
                inside = order[start:stop]
                part = SparseMask.from_pairs(row[inside] - first, column[inside], (size, width))
                self.patterns.append(SparsePattern(part))

    def cut(self, layer: MaskedLinear) -> list[Block]:
        """Mask the layer's weights and cut them into blocks."""
        bias: Tensor | None = layer.bias
        if bias is not None and self.output_order is not None:
            bias = bias[self.output_order]
        biases = [None] * len(self.rows) if bias is None else bias.split(self.rows)
        weights = layer.entries()
        if layer.engine == "sparse":
            patterns = [pattern for pattern in self.patterns if isinstance(pattern, SparsePattern)]
            values = weights[self.value_order].split([pattern.nnz for pattern in patterns])
            return [Block(v, b, pattern) for v, b, pattern in zip(values, biases, patterns, strict=True)]
        if self.input_order is not None:
            weights = weights[:, self.input_order]
        if self.output_order is not None:
            weights = weights[self.output_order]
        blocks = weights.split(self.rows) if len(self.rows) > 1 else [weights]
        return [
            Block(block[:, :width], b) for block, width, b in zip(blocks, self.columns, biases, strict=True)
        ]


def _index(order: Sequence[int] | None) -> Tensor | None:
    return None if order is None else torch.tensor(order, dtype=torch.long)


def _places(order: Sequence[int] | None, size: int) -> np.ndarray:
    """The new place of each index; −1 where it is left out."""
    if order is None:
        return np.arange(size)
    places = np.full(size, -1)
    places[list(order)] = np.arange(len(order))
    return places
