r"""Linear layers with a mask, and the coordinates in which the weights of networks of them are trained.

Output i depends on input j only where ``mask[i, j]`` is true. There are two engines with the same numbers. The *dense*
one multiplies a matrix of weights by the mask. The *sparse* one keeps the weights of the mask's true entries alone, as
a vector, in time and memory that grow with their number (:mod:`~pyro_graphflows.nn.sparse`).

**Natural units** are coordinates in which one step of an optimiser is small: whitened inputs, and outputs in units of
their own. An optimiser such as Adam changes every weight by about its rate, whatever the weight is for. Of a linear
map of many features, large and collinear, it moves the output by the rate times the sum of the features; where the
output's unit is the spread of a prior and the map was a regression with a small residual, one step costs millions of
nats. So the weights that are trained are not those of the map. For the rows of a masked matrix that look at the inputs
in S,

.. math:: W_v = W^0_v + \frac{u_v}{\sqrt{r_S}}\, V_v\, T_S^\top,

where the *offset* :math:`W^0` is what the map started from, and no parameter; V is trained, and zero after such a
start; :math:`T_S` is a truncated whitener, such that :math:`t = T_S^\top x_S` has second moments one or zero, r of them
one; and u is the *unit* of the output, the standard deviation of what the regression left over. Then a step at rate
:math:`\eta` moves output v by about :math:`\eta \sqrt{r}\, u_v` at most. Nothing else changes: the mask, since row v of
:math:`V T_S^\top` has the entries of S alone; levels; and what the network can represent, but for the directions of
S in which the samples did not vary, which keep their offset.

The whitener multiplies the weights, once for each evaluation, and not the inputs: a row costs :math:`|S|^2` numbers,
whatever the batch, and inputs without the dimensions of particles stay without. Whiteners are kept in groups of sets of
similar size, in one padded tensor each, of about :math:`\sum_S |S|^2` numbers in all. Above :data:`MOST_NUMBERS` there
are none, and inputs are trained as they come, at rates divided by :math:`\sqrt{|S|}`.

Where all rows look at the same :data:`WIDE` inputs or more, as at the pixels of an image, a full whitener would cost
more than the network, and it would make as much of the last bit of noise as of what is seen. There T has low rank
beside a multiple of the identity (:class:`LowRankWhitener`), and multiplies the inputs if these are data and fewer than
the rows.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import SparseMask
from pyro_graphflows.nn.sparse import SparsePattern, sparse_product, sparse_sample

__all__ = [
    "FUSED_OVERHEAD",
    "MOST_NUMBERS",
    "Constants",
    "LowRankWhitener",
    "MaskedLinear",
    "NaturalUnits",
    "WhitenedRows",
    "Whiteners",
    "fastest_engine",
    "padded_size",
    "whitener",
]

# An entry of a sparse matrix costs as much as some entries of a dense one, and a sparse product has an overhead of so
# many dense entries (benchmarks/layers.py).
SPARSE_COST = 6
SPARSE_OVERHEAD = 16_000
FUSED_OVERHEAD = 3_000  # within one fused operation (benchmarks/flows.py)

MOST_NUMBERS = 4_000_000  # of all whiteners of a network
MOST_SIZE = 1500  # of one set; finding its whitener takes a cubic number of steps
SMALL = 20_000  # numbers up to which padding all sets to one size is cheaper than several products
CUT = 1e-3  # directions whose spread is a smaller share of the widest one's are left out
WIDE = 128  # inputs from which on a whitener may have low rank
SHARE_WIDEST = 4  # one in so many directions is the most that have a scale of their own there
ALIKE = 4.0  # the others are alike if the widest one's second moment is so many times their mean
LEAST_OTHERS = 1e-2  # the least second moment that they are scaled by, in units of the mean of all directions
LEAST_MOMENT = 1e-12  # of inputs that vary
MOST_BY_ROW = 60_000  # numbers of a layer up to which each row has a whitener of its own


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
    zero_or_one: Tensor  # the mask as numbers: products with booleans take several times as long
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
            self.register_buffer("zero_or_one", self.mask.to(self.weight.dtype), persistent=False)
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
        return self.weight * self.zero_or_one if self.engine == "dense" else self.weight

    def masked_weight(self) -> Tensor:
        """Return the matrix of weights, zero off the mask, whatever the engine."""
        return self.entries() if self.engine == "dense" else self.pattern.to_dense(self.weight)

    def multiply(self, entries: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply the last dimension of ``x`` by the matrix with other ``entries``, in the engine's layout."""
        if self.engine == "dense":
            return F.linear(x, entries, bias)
        return self.pattern.linear(entries, x, bias)

    def matmul(self, entries: Tensor, x: Tensor) -> Tensor:
        """Multiply ``x``, of shape (features, n), by the matrix, with derivatives of every order."""
        return entries @ x if self.engine == "dense" else self.pattern.matmul(entries, x)

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


class Constants(nn.Module):
    """A module that keeps constants which follow from buffers, until these change."""

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self._kept: tuple[Any, tuple[Tensor, ...]] = (None, ())

    def kept(
        self, find: Callable[[], tuple[Tensor, ...]], *sources: Tensor, number: int = 0
    ) -> tuple[Tensor, ...]:
        """Return what ``find`` returned last; ask it again if a source has changed in place since, or the number."""
        key = (number, *(source._version for source in sources))
        if self._kept[0] != key:
            with torch.no_grad():
                self._kept = (key, find())
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": (None, ())}

    def _apply(self, *args: Any, **kwargs: Any) -> "Constants":
        self._forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)


def whitener(moments: Tensor, cut: float = CUT) -> tuple[Tensor, int]:
    r"""Return the matrix that makes second moments one, in the directions that vary, and how many these are.

    Args:
        moments: The second moments of the inputs, :math:`E[x x^\top]`, ``(d, d)``.
        cut: Directions whose spread is a smaller share of the widest one's are left out.

    Returns:
        :math:`T^\top`, of shape ``(d, d)``, with the widest directions first and zero rows for those left out, and the
        number of those kept.

    Example:
        >>> matrix, rank = whitener(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
        >>> matrix.abs().tolist(), rank
        ([[0.5, 0.0], [0.0, 0.0]], 1)
    """
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(moments))
    kept = values > max(float(values[0]) * cut**2, 1e-12)
    matrix = torch.where(kept, vectors * values.clamp(min=1e-12).rsqrt(), 0.0).mT
    return matrix, int(kept.sum())


def padded_size(size: int) -> int:
    """Return the size that a set's is rounded up to: a power of two, or three quarters of one."""
    power = 1 << max(size - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


class LowRankWhitener(Constants):
    r"""A symmetric whitener of many inputs: a few directions by their own scales, all others by one.

    It is :math:`T = c\,(I + A^\top \mathrm{diag}(s)\, A)` with orthonormal rows of A, the widest directions of the
    inputs: as many as it takes until the others are alike, at most one in :data:`SHARE_WIDEST`. These get second
    moments one, the widest of the others too, and the rest less. A product with T costs two with A, and has an inverse:
    no direction is left out.

    Args:
        members: The inputs, among those that :meth:`forward` is given; the identity on them until :meth:`fit_`.
    """

    axes: Tensor
    stretch: Tensor
    scale: Tensor

    def __init__(self, members: Sequence[int]) -> None:
        super().__init__()
        self.members = tuple(members)
        most = len(members) // SHARE_WIDEST
        self.register_buffer("axes", torch.zeros(most, len(members)))
        self.register_buffer("stretch", torch.zeros(most))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit_(self, moments: Tensor) -> float:
        """Set the whitener; return the sum of the second moments of whitened inputs, at most their number.

        Where no input varies, as with the only data set, none counts, as in other whiteners.

        Args:
            moments: The second moments of the inputs, ``(members, members)``.
        """
        if float(moments.diagonal().mean()) <= LEAST_MOMENT:
            self.axes.zero_()
            self.stretch.zero_()
            self.scale.zero_()
            return 0.0
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(moments))
        values = values.clamp(min=0.0)
        most, size = self.axes.shape
        means = values.flip(0).cumsum(0).flip(0) / torch.arange(size, 0, -1).to(values)  # from each one on
        alike = (values <= ALIKE * means)[:most].nonzero()
        number = int(alike[0]) if len(alike) else most
        square = values[number].clamp(min=max(LEAST_OTHERS * float(means[0]), LEAST_MOMENT))
        self.axes.zero_()
        self.axes[:number] = vectors[:, :number].mT.to(self.axes)
        self.stretch.zero_()
        self.stretch[:number] = ((square / values[:number]).sqrt() - 1.0).to(self.stretch)
        self.scale.copy_(square.rsqrt())
        return number + float(values[number:].sum() / square)

    def forward(self, x: Tensor) -> Tensor:
        """Return rows times T, zero where the members have no place, ``(*batch, inputs)``."""
        scale, axes, stretched, _ = self._constants(x.shape[-1])
        return x * scale + (x @ axes.mT) @ stretched

    def undo(self, x: Tensor) -> Tensor:
        """Return rows times the inverse of T, zero where the members have no place, ``(*batch, inputs)``."""
        scale, axes, _, shrunk = self._constants(x.shape[-1])
        inverse = torch.where(scale > 0.0, 1.0 / scale, 0.0)
        return x * inverse + (x @ axes.mT) @ shrunk

    def _constants(self, num_inputs: int) -> tuple[Tensor, ...]:
        """Return c at the members, A, c diag(s) A, and what the inverse has in its place."""

        def find() -> tuple[Tensor, ...]:
            columns = torch.tensor(self.members, device=self.axes.device)
            number = int((self.stretch != 0.0).sum())
            axes = self.axes.new_zeros(number, num_inputs)
            axes[:, columns] = self.axes[:number]
            scale = self.axes.new_zeros(num_inputs)
            scale[columns] = self.scale
            stretch = self.stretch[:number].unsqueeze(-1)
            inverse = torch.where(self.scale > 0.0, 1.0 / self.scale, 0.0)
            return scale, axes, self.scale * stretch * axes, (1.0 / (1.0 + stretch) - 1.0) * inverse * axes

        return self.kept(find, self.axes, self.stretch, self.scale, number=num_inputs)


class Whiteners(nn.Module):
    """The whiteners of several sets of inputs; the identity until :meth:`fit_`.

    Args:
        sets: The sets, not empty, each without repetitions; the order of the members is that of the matrices.
        low_rank: Whether the whitener of one set alone, if it is wide, may have low rank.

    Attributes:
        rank: For each set the sum of the second moments of its whitened inputs: the number of directions that are
            trained, ``(number of sets,)``.
        groups: The numbers of the sets that are kept together; none if there would be too many numbers.
        low_rank: The whitener of low rank of all inputs, or None.
    """

    rank: Tensor

    def __init__(self, sets: Sequence[Sequence[int]], *, low_rank: bool = False) -> None:
        super().__init__()
        self.sets = tuple(tuple(members) for members in sets)
        sizes = [len(members) for members in self.sets]
        self.register_buffer("rank", torch.tensor(sizes, dtype=torch.get_default_dtype()))
        self.groups: list[list[int]] = []
        self.widths: list[int] = []
        self._names: list[str] = []
        numbers = sum(size**2 for size in sizes)
        is_wide = low_rank and len(sizes) == 1 and WIDE <= sizes[0] <= MOST_SIZE
        self.low_rank = LowRankWhitener(self.sets[0]) if is_wide else None
        if is_wide:
            return
        if max(sizes, default=0) > 1 and numbers <= MOST_NUMBERS and max(sizes) <= MOST_SIZE:
            at_once = len(sizes) * max(sizes) ** 2 <= max(SMALL, 2 * numbers)
            by_width: dict[int, list[int]] = {}
            for i, size in enumerate(sizes):
                by_width.setdefault(max(sizes) if at_once else padded_size(size), []).append(i)
            for width, members in sorted(by_width.items()):
                self.groups.append(members)
                self.widths.append(max(sizes[i] for i in members))
                matrices = torch.zeros(len(members), self.widths[-1], self.widths[-1])
                for matrix, i in zip(matrices, members, strict=True):
                    matrix[range(sizes[i]), range(sizes[i])] = 1.0
                self.register_buffer(f"matrices_{width}", matrices)
            self._names = [f"matrices_{width}" for width in sorted(by_width)]

    def all_matrices(self) -> list[Tensor]:
        """Return the transposed whiteners of each group, padded with zeros, ``(sets, width, width)``."""
        return [getattr(self, name) for name in self._names]

    def embedded(self, number: int, num_inputs: int) -> Tensor:
        """Return the transposed whitener of a set among all inputs, zero elsewhere; zero for -1."""
        if self.low_rank is not None and number >= 0:
            return self.low_rank(torch.eye(num_inputs).to(self.rank))
        embedded = self.rank.new_zeros(num_inputs, num_inputs)
        for members, matrices in zip(self.groups, self.all_matrices(), strict=True):
            if number in members:
                columns = torch.tensor(self.sets[number], device=embedded.device)
                size = len(columns)
                own = matrices[members.index(number), :size, :size].to(embedded)
                embedded[columns.unsqueeze(-1), columns] = own
        return embedded

    @torch.no_grad()
    def fit_(self, moments: Tensor) -> None:
        """Set the whiteners by the second moments of all inputs; without whiteners nothing changes.

        Args:
            moments: Shape ``(inputs, inputs)``, of inputs of about unit scale.
        """
        if self.low_rank is not None:
            inputs = list(self.sets[0])
            self.rank[0] = max(self.low_rank.fit_(moments[inputs][:, inputs]), 1.0)
        for members, matrices in zip(self.groups, self.all_matrices(), strict=True):
            matrices.zero_()
            for place, i in enumerate(members):
                inputs = list(self.sets[i])
                found, rank = whitener(moments[inputs][:, inputs])
                matrices[place, : len(inputs), : len(inputs)] = found.to(matrices)
                self.rank[i] = max(rank, 1)


class WhitenedRows(Constants):
    """The rows of one masked matrix in the coordinates of their whiteners: each row times its whitener and a number.

    Rows that all look at the same inputs share a whitener; otherwise rows of a small matrix have a padded one each, and
    those of others are gathered by the size of what they look at, and brought back.

    Args:
        layer: The layer; what a row looks at must be one of the sets, or nothing.
        set_of_row: For each row the number of its set, -1 for none.
        whiteners: The whiteners.
        divide: Whether rows are divided by the root of their whitener's rank.
    """

    index: Tensor
    gather: Tensor
    back: Tensor

    def __init__(
        self, layer: MaskedLinear, set_of_row: Sequence[int], whiteners: Whiteners, *, divide: bool
    ) -> None:
        super().__init__()
        self.shape = tuple(layer.weight.shape)
        self.set_of_row = tuple(set_of_row)
        self.divide = divide
        self.register_buffer("index", torch.tensor(set_of_row, dtype=torch.long), persistent=False)
        used = {i for i in set_of_row if i >= 0}
        dense = layer.engine == "dense"
        if whiteners.low_rank is not None:
            self.way = "low rank"
        elif not whiteners.groups:
            self.way = "plain"
        elif dense and len(used) == 1:
            self.way = "shared"
        elif dense and layer.out_features * layer.in_features**2 <= MOST_BY_ROW:
            self.way = "by row"
        else:
            self.way = "gathered"
            self._plan(layer, whiteners)

    def _plan(self, layer: MaskedLinear, whiteners: Whiteners) -> None:
        """Find where the entries of rows are, and where they go."""
        dense = layer.engine == "dense"
        rows_of: dict[int, list[int]] = {}
        for row, i in enumerate(self.set_of_row):
            if i >= 0:
                rows_of.setdefault(i, []).append(row)
        sizes = [0 if i < 0 else len(whiteners.sets[i]) for i in self.set_of_row]
        starts = [0, *accumulate(sizes)]  # of the rows, in the sparse layout

        def place(row: int, position: int, column: int) -> int:
            return row * layer.in_features + column if dense else starts[row] + position

        self._shapes: list[tuple[int, int, int]] = []
        gather: list[int] = []
        back = [-1] * (layer.in_features * layer.out_features if dense else starts[-1])
        for members, width in zip(whiteners.groups, whiteners.widths, strict=True):
            most = max((len(rows_of.get(i, ())) for i in members), default=0)
            self._shapes.append((len(members), most, width))
            for i in members:
                columns, rows = whiteners.sets[i], rows_of.get(i, [])
                for row in rows:
                    own = [place(row, position, column) for position, column in enumerate(columns)]
                    for position, entry in enumerate(own):
                        back[entry] = len(gather) + position
                    gather += own + [own[0]] * (width - len(columns))  # padding meets zeros
                gather += [0] * (width * (most - len(rows)))
        back = [len(gather) if b < 0 else b for b in back]
        self.register_buffer("gather", torch.tensor(gather, dtype=torch.long), persistent=False)
        self.register_buffer("back", torch.tensor(back, dtype=torch.long), persistent=False)

    def gain(self, whiteners: Whiteners, unit: Tensor | None) -> Tensor:
        """Return what a row is multiplied by; zero for rows that look at nothing."""
        rank = torch.cat([whiteners.rank, whiteners.rank.new_ones(1)])[self.index]
        gain = rank.rsqrt() if self.divide else torch.ones_like(rank)
        gain = torch.where(self.index < 0, torch.zeros_like(gain), gain)
        return gain if unit is None else gain * unit

    def forward(
        self,
        layer: MaskedLinear,
        whiteners: Whiteners,
        unit: Tensor | None = None,
        offset: Tensor | None = None,
        *,
        of_whitened: bool = False,
    ) -> Tensor:
        """Return the entries of the layer in its layout: offset + unit * weight * whitener.

        Args:
            layer: The layer.
            whiteners: The whiteners.
            unit: A number for each row; ones by default.
            offset: What is added, in the layout of the layer; nothing by default.
            of_whitened: Whether to return the entries by which inputs times the whitener of low rank are multiplied.
        """
        constants = self._constants(layer, whiteners, unit, offset)
        if self.way == "by row":
            rows = layer.weight.unsqueeze(1)
            if offset is None:
                return torch.bmm(rows, constants[0]).squeeze(1)
            return torch.baddbmm(offset.unsqueeze(1), rows, constants[0]).squeeze(1)
        if self.way == "gathered":
            product = self._gathered(layer, whiteners)
        elif self.way == "shared":
            product = layer.weight @ constants[1]
        elif whiteners.low_rank is None or of_whitened:
            product = layer.weight
        else:
            product = whiteners.low_rank(layer.weight)
        if of_whitened and offset is not None:
            offset = constants[1]
        return product * constants[0] if offset is None else torch.addcmul(offset, product, constants[0])

    def _gathered(self, layer: MaskedLinear, whiteners: Whiteners) -> Tensor:
        parts = layer.weight.reshape(-1)[self.gather].split([n * m * w for n, m, w in self._shapes])
        products = [
            torch.bmm(part.view(shape), matrices).view(-1)
            for part, shape, matrices in zip(parts, self._shapes, whiteners.all_matrices(), strict=True)
        ]
        return torch.cat([*products, products[0].new_zeros(1)])[self.back].view(self.shape)

    def _constants(
        self, layer: MaskedLinear, whiteners: Whiteners, unit: Tensor | None, offset: Tensor | None
    ) -> tuple[Tensor, ...]:
        rank = whiteners.rank  # it is set whenever the whiteners are
        sources = [rank, *(each for each in (unit, offset) if each is not None)]
        return self.kept(lambda: self._find(layer, whiteners, unit, offset), *sources)

    def _find(
        self, layer: MaskedLinear, whiteners: Whiteners, unit: Tensor | None, offset: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return a matrix for each row; or what entries are multiplied by, and what all rows share.

        That is the whitener; where it has low rank, the offset by which whitened inputs are multiplied.
        """
        gain = self.gain(whiteners, unit).to(layer.weight)
        if self.way == "by row":
            known = {i: whiteners.embedded(i, layer.in_features) for i in set(self.set_of_row)}
            rows = [known[i].to(gain) * g for i, g in zip(self.set_of_row, gain, strict=True)]
            return (torch.stack(rows),)
        by_entry = _by_entry(layer, gain)
        if whiteners.low_rank is not None:
            return by_entry, by_entry if offset is None else whiteners.low_rank.undo(offset)
        if self.way == "shared":
            return by_entry, whiteners.embedded(max(self.set_of_row), layer.in_features).to(gain)
        return (layer.mask * by_entry if self.way == "plain" and layer.engine == "dense" else by_entry,)


class NaturalUnits(Constants):
    r"""The coordinates of a network with a linear map beside hidden layers; see the module's essay.

    The linear map is :math:`W^0 + \mathrm{diag}(u / \sqrt{r})\, V T^\top` with the bias :math:`b^0 + u\, b`; the first
    hidden layer sees :math:`T^\top x`; the last layer's rows are multiplied by u, and divided by the root of the number
    of units that they see.

    Args:
        linear: The linear map V from the inputs to the outputs; None if there are hidden layers alone.
        set_of_output: For each of its rows the number of its set of inputs, -1 for none.
        layers: The hidden layers and the last one; there may be none.
        set_of_unit: For each unit of the first hidden layer the number of its set of inputs.
        sets: The sets of inputs.

    Attributes:
        offset: :math:`W^0`, in the layout of the linear map's engine.
        bias: :math:`b^0`.
        unit: u.
    """

    offset: Tensor
    bias: Tensor
    unit: Tensor
    set_of_output: Tensor
    fan_in: Tensor

    def __init__(
        self,
        linear: MaskedLinear | None,
        set_of_output: Sequence[int],
        layers: Sequence[MaskedLinear],
        set_of_unit: Sequence[int],
        sets: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        first = [*([] if linear is None else [linear]), *layers[:1]]
        dense = all(each.engine == "dense" for each in first)
        self.whiteners = Whiteners(sets, low_rank=dense)
        self.of_linear = None
        if linear is not None:
            self.of_linear = WhitenedRows(linear, set_of_output, self.whiteners, divide=True)
        self.of_hidden = None
        if len(layers) > 1:
            self.of_hidden = WhitenedRows(layers[0], set_of_unit, self.whiteners, divide=False)
        self.set_of_unit = tuple(set_of_unit)
        number = len(set_of_output)
        self.register_buffer("offset", torch.zeros(0) if linear is None else torch.zeros_like(linear.weight))
        self.register_buffer("bias", torch.zeros(0 if linear is None else number))
        self.register_buffer("unit", torch.ones(number))
        self.register_buffer("set_of_output", torch.tensor(set_of_output, dtype=torch.long), persistent=False)
        seen = torch.ones(number)
        if layers:
            rows = layers[-1].sparse_mask().indices[0]
            seen = torch.bincount(rows, minlength=number).clamp(min=1).float()
        self.register_buffer("fan_in", seen, persistent=False)
        with torch.no_grad():  # so that random weights are as large as those of a plain network
            ranks = torch.cat([self.whiteners.rank, torch.ones(1)])[self.set_of_output]
            if linear is not None:
                linear.weight.mul_(_by_entry(linear, ranks.sqrt()))
            if layers:
                layers[-1].weight.mul_(_by_entry(layers[-1], self.fan_in.sqrt()))

    @torch.no_grad()
    def whiten_(self, moments: Tensor, hidden: MaskedLinear | None) -> None:
        """Set the whiteners; a random first hidden layer keeps the spread of what it gives.

        Args:
            moments: The second moments of all inputs, ``(inputs, inputs)``.
            hidden: The first hidden layer.
        """
        before = self.whiteners.rank.clone()
        self.whiteners.fit_(moments)
        if hidden is not None and self.of_hidden is not None:
            widened = (before / self.whiteners.rank).sqrt()
            hidden.weight.mul_(_by_entry(hidden, widened[list(self.set_of_unit)].to(hidden.weight)))

    @torch.no_grad()
    def set_rows_(self, linear: MaskedLinear, rows: slice, weights: Tensor, bias: Tensor) -> None:
        """Let some rows be a linear map, by their offsets; the trained part becomes zero.

        Args:
            linear: The linear map.
            rows: The rows, as a slice with a start and a stop.
            weights: Shape ``(rows, inputs)``; what is off the mask does not matter.
            bias: Shape ``(rows,)``.
        """
        linear.set_rows_(rows, weights)
        if linear.engine == "dense":
            self.offset[rows] = linear.entries()[rows]
        else:
            chosen = (linear.pattern.row >= rows.start) & (linear.pattern.row < rows.stop)
            self.offset[chosen] = linear.weight[chosen]
        linear.set_rows_(rows, 0.0, torch.zeros_like(bias))
        self.bias[rows] = bias.to(self.bias)

    @torch.no_grad()
    def change_(self, linear: MaskedLinear | None, last: MaskedLinear | None, unit: Tensor) -> None:
        """Let outputs be trained in other units; the network is the same function.

        Args:
            linear: The linear map.
            last: The last layer, if there are hidden ones.
            unit: The units.
        """
        if linear is not None:
            entries, bias = self.linear(linear)
            self.offset.copy_(entries)
            self.bias.copy_(bias)
            linear.set_rows_(slice(0, len(unit)), 0.0, torch.zeros_like(bias))
        if last is not None:
            ratio = self.unit / unit
            last.weight.mul_(_by_entry(last, ratio))
            if last.bias is not None:
                last.bias.mul_(ratio)
        self.unit.copy_(unit)

    def linear(self, layer: MaskedLinear) -> tuple[Tensor, Tensor]:
        """Return the entries and the bias of the linear map."""
        assert layer.bias is not None
        assert self.of_linear is not None
        entries = self.of_linear(layer, self.whiteners, self.unit, self.offset)
        return entries, torch.addcmul(self.bias, self.unit, layer.bias)

    def hidden(self, layer: MaskedLinear) -> Tensor:
        """Return the entries of the first hidden layer."""
        assert self.of_hidden is not None
        entries: Tensor = self.of_hidden(layer, self.whiteners)
        return entries

    def prefers_whitened(self, x: Tensor) -> bool:
        """Whether whitening the inputs is cheaper than whitening weights, forwards and backwards.

        Args:
            x: The inputs, ``(*batch, inputs)``.
        """
        if self.whiteners.low_rank is None or x.requires_grad:
            return False
        parts = [part for part in (self.of_linear, self.of_hidden) if part is not None]
        rows = sum(part.shape[0] for part in parts) * (2 if torch.is_grad_enabled() else 1)
        return x.numel() <= rows * x.shape[-1]

    def of_whitened(
        self, x: Tensor, linear: MaskedLinear | None, hidden: MaskedLinear | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the linear map of inputs, and what the first hidden layer sees of them before its activation.

        The same as with :meth:`linear` and :meth:`hidden`, by way of whitened inputs, which all rows share.

        Args:
            x: The inputs, or the first ones, if no row looks at others.
            linear: The linear map, if there is one.
            hidden: The first hidden layer, if there is one.
        """
        assert self.whiteners.low_rank is not None
        known = x.shape[-1]
        white = self.whiteners.low_rank(x)
        mapped = seen = None
        if linear is not None and self.of_linear is not None and linear.bias is not None:
            entries = self.of_linear(linear, self.whiteners, self.unit, self.offset, of_whitened=True)
            bias = torch.addcmul(self.bias, self.unit, linear.bias)
            mapped = F.linear(white, entries[:, :known], bias)
        if hidden is not None and self.of_hidden is not None:
            entries = self.of_hidden(hidden, self.whiteners, of_whitened=True)
            seen = F.linear(white, entries[:, :known], hidden.bias)
        return mapped, seen

    def last(self, layer: MaskedLinear) -> Tensor:
        """Return the entries of the last layer."""
        return layer.weight * self.kept(lambda: self._find_gain(layer), self.unit)[0]

    def _find_gain(self, layer: MaskedLinear) -> tuple[Tensor]:
        gain = _by_entry(layer, self.unit / self.fan_in.sqrt())
        return (gain * layer.mask if layer.engine == "dense" else gain,)


def _by_entry(layer: MaskedLinear, by_row: Tensor) -> Tensor:
    """Return numbers of the rows in a shape that multiplies the entries."""
    return by_row.unsqueeze(-1) if layer.engine == "dense" else by_row[layer.pattern.row]
