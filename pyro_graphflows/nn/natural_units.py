r"""Coordinates in which one step of an optimiser is small: whitened inputs, and outputs in units of their own.

An optimiser such as Adam changes every weight by about its rate, whatever the weight is for. Of a linear map of many
features, large and collinear, it moves the output by the rate times the sum of the features; where the output's unit is
the spread of a prior and the map was a regression with a small residual, one step costs millions of nats. So the
weights that are trained are not those of the map. For the rows of a masked matrix that look at the inputs in S,

.. math:: W_v = W^0_v + \frac{u_v}{\sqrt{r_S}}\, V_v\, T_S^\top,

where the *offset* :math:`W^0` is what the map started from, and no parameter; V is trained, and zero after such a
start; :math:`T_S` is a truncated whitener, such that :math:`t = T_S^\top x_S` has second moments one or zero, r of them
one; and u is the *unit* of the output, the standard deviation of what the regression left over. Then a step at rate
:math:`\eta` moves output v by about :math:`\eta \sqrt{r}\, u_v` at most. Nothing else changes: the mask, since row v of
:math:`V T_S^\top` has the entries of S alone; levels; and what the network can represent, but for the directions of
S in which the samples did not vary, which keep their offset.

The whitener multiplies the weights, once for each evaluation, and not the inputs: a row costs :math:`|S|^2` numbers,
whatever the batch, and inputs without the dimensions of particles stay without.

Whiteners are kept in groups of sets of similar size, in one padded tensor each, of about :math:`\sum_S |S|^2` numbers
in all. Above :data:`MOST_NUMBERS` there are none, and inputs are trained as they come, at rates divided by
:math:`\sqrt{|S|}`.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from pyro_graphflows.nn.masked import MaskedLinear

__all__ = ["MOST_NUMBERS", "NaturalUnits", "WhitenedRows", "Whiteners", "padded_size", "whitener"]

MOST_NUMBERS = 4_000_000  # of all whiteners of a network
MOST_SIZE = 1500  # of one set; finding its whitener takes a cubic number of steps
SMALL = 20_000  # numbers up to which padding all sets to one size is cheaper than several products
CUT = 1e-3  # directions whose spread is a smaller share of the widest one's are left out


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


class Whiteners(nn.Module):
    """The whiteners of several sets of inputs; the identity until :meth:`fit_`.

    Args:
        sets: The sets, not empty, each without repetitions; the order of the members is that of the matrices.

    Attributes:
        rank: For each set the number of directions that are trained, ``(number of sets,)``.
        groups: The numbers of the sets that are kept together; none if there would be too many numbers.
    """

    rank: Tensor

    def __init__(self, sets: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.sets = tuple(tuple(members) for members in sets)
        sizes = [len(members) for members in self.sets]
        self.register_buffer("rank", torch.tensor(sizes, dtype=torch.float))
        self.groups: list[list[int]] = []
        self.widths: list[int] = []
        numbers = sum(size**2 for size in sizes)
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

    def matrices(self, group: int) -> Tensor:
        """Return the transposed whiteners of a group, padded with zeros, ``(sets, width, width)``."""
        return getattr(self, self._names[group])

    @torch.no_grad()
    def fit_(self, moments: Tensor) -> None:
        """Set the whiteners by the second moments of all inputs; without whiteners nothing changes.

        Args:
            moments: Shape ``(inputs, inputs)``, of inputs of about unit scale.
        """
        for group, members in enumerate(self.groups):
            matrices = self.matrices(group)
            matrices.zero_()
            for place, i in enumerate(members):
                inputs = list(self.sets[i])
                found, rank = whitener(moments[inputs][:, inputs])
                matrices[place, : len(inputs), : len(inputs)] = found.to(matrices)
                self.rank[i] = max(rank, 1)


class WhitenedRows(nn.Module):
    """The rows of one masked matrix in the coordinates of their whiteners.

    Args:
        layer: The layer; what a row looks at must be one of the sets, or nothing.
        set_of_row: For each row the number of its set, -1 for none.
        whiteners: The whiteners.
    """

    gather: Tensor
    back: Tensor

    def __init__(self, layer: MaskedLinear, set_of_row: Sequence[int], whiteners: Whiteners) -> None:
        super().__init__()
        self.shape = tuple(layer.weight.shape)
        dense = layer.engine == "dense"
        whole = whiteners.sets == (tuple(range(layer.in_features)),)
        self.is_one_product = dense and whole and all(i == 0 for i in set_of_row)
        if not whiteners.groups or self.is_one_product:
            return
        rows_of: dict[int, list[int]] = {}
        for row, i in enumerate(set_of_row):
            if i >= 0:
                rows_of.setdefault(i, []).append(row)
        sizes = [0 if i < 0 else len(whiteners.sets[i]) for i in set_of_row]
        starts = [0, *accumulate(sizes)]  # of the rows, in the sparse layout

        def place(row: int, position: int, column: int) -> int:
            return row * layer.in_features + column if dense else starts[row] + position

        self._shapes: list[tuple[int, int, int]] = []
        gather: list[int] = []
        entries = layer.in_features * layer.out_features if dense else starts[-1]
        back = [-1] * entries
        for members, width in zip(whiteners.groups, whiteners.widths, strict=True):
            most = max((len(rows_of.get(i, ())) for i in members), default=0)
            self._shapes.append((len(members), most, width))
            for i in members:
                columns, rows = whiteners.sets[i], rows_of.get(i, [])
                for row in rows:
                    for position, column in enumerate(columns):
                        back[place(row, position, column)] = len(gather) + position
                    own = [place(row, p, column) for p, column in enumerate(columns)]
                    gather += own + [own[0]] * (width - len(columns))  # padding meets zeros
                gather += [0] * (width * (most - len(rows)))
        back = [len(gather) if b < 0 else b for b in back]
        self.register_buffer("gather", torch.tensor(gather, dtype=torch.long), persistent=False)
        self.register_buffer("back", torch.tensor(back, dtype=torch.long), persistent=False)

    def forward(self, layer: MaskedLinear, whiteners: Whiteners) -> Tensor:
        """Return the entries of the layer, in its layout: its weights, each row times its whitener."""
        if not whiteners.groups:
            return layer.entries()
        if self.is_one_product:
            return layer.weight @ whiteners.matrices(0)[0]
        parts = layer.weight.reshape(-1)[self.gather].split([n * m * w for n, m, w in self._shapes])
        products = [
            torch.bmm(part.view(shape), whiteners.matrices(group)).view(-1)
            for group, (part, shape) in enumerate(zip(parts, self._shapes, strict=True))
        ]
        return torch.cat([*products, products[0].new_zeros(1)])[self.back].view(self.shape)


class NaturalUnits(nn.Module):
    r"""The coordinates of a network with a linear map beside hidden layers; see the module's essay.

    The linear map is :math:`W^0 + \mathrm{diag}(u / \sqrt{r})\, V T^\top` with the bias :math:`b^0 + u\, b`; the first
    hidden layer sees :math:`T^\top x`; the last layer's rows are multiplied by u, and divided by the root of the number
    of units that they see.

    Args:
        linear: The linear map V from the inputs to the outputs.
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
        linear: MaskedLinear,
        set_of_output: Sequence[int],
        layers: Sequence[MaskedLinear],
        set_of_unit: Sequence[int],
        sets: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.whiteners = Whiteners(sets)
        self.of_linear = WhitenedRows(linear, set_of_output, self.whiteners)
        self.of_hidden = WhitenedRows(layers[0], set_of_unit, self.whiteners) if len(layers) > 1 else None
        self.set_of_unit = tuple(set_of_unit)
        self.register_buffer("offset", torch.zeros_like(linear.weight))
        self.register_buffer("bias", torch.zeros(linear.out_features))
        self.register_buffer("unit", torch.ones(linear.out_features))
        self.register_buffer("set_of_output", torch.tensor(set_of_output), persistent=False)
        seen = torch.ones(linear.out_features)
        if layers:
            rows = layers[-1].sparse_mask().indices[0]
            seen = torch.bincount(rows, minlength=linear.out_features).clamp(min=1).float()
        self.register_buffer("fan_in", seen, persistent=False)
        with torch.no_grad():  # so that random weights are as large as those of a plain network
            linear.weight.mul_(_by_entry(linear, self._root_of_rank()))
            if layers:
                layers[-1].weight.mul_(_by_entry(layers[-1], self.fan_in.sqrt()))

    def _root_of_rank(self) -> Tensor:
        rank = torch.cat([self.whiteners.rank, self.whiteners.rank.new_ones(1)])
        return rank[self.set_of_output].sqrt()

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

    def linear(self, layer: MaskedLinear) -> tuple[Tensor, Tensor]:
        """Return the entries and the bias of the linear map."""
        assert layer.bias is not None
        gain = _by_entry(layer, self.unit / self._root_of_rank())
        entries = torch.addcmul(self.offset, gain, self.of_linear(layer, self.whiteners))
        return entries, torch.addcmul(self.bias, self.unit, layer.bias)

    def hidden(self, layer: MaskedLinear) -> Tensor:
        """Return the entries of the first hidden layer."""
        assert self.of_hidden is not None
        return self.of_hidden(layer, self.whiteners)

    def last(self, layer: MaskedLinear) -> Tensor:
        """Return the entries of the last layer."""
        return layer.entries() * _by_entry(layer, self.unit / self.fan_in.sqrt())


def _by_entry(layer: MaskedLinear, by_row: Tensor) -> Tensor:
    """Return numbers of the rows in a shape that multiplies the entries."""
    return by_row.unsqueeze(-1) if layer.engine == "dense" else by_row[layer.pattern.row]
