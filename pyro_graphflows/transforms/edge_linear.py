r"""Linear layers whose parameters live on the edges of a graph.

Each variable v of a flow needs K numbers (pre-activations and shifts of all its blocks) that depend linearly on its
parents. There is one row of K weights for each edge p → v and nothing else, so the structure cannot be violated
and the number of parameters grows with the edges. Two engines compute the same numbers:

- *dense*: the rows are written into a zero matrix of shape (inputs, variables · K), for one matrix product. Best up
  to a few hundred variables. Context is multiplied at its own batch shape, once for all particles.
- *sparse*: variables are put into groups of equal (rounded up) numbers of parents; the parents of a group
  are gathered, and one batched matrix product for each group does the rest. Cost grows with the edges.

Everything is in features-first layout, (features, N), so that a slice of variables is one piece of memory. Variables
are numbered by level and within a level by (rounded) number of parents, so that a level, and a group within it, is
a slice.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.nn.masked import Constants, Whiteners

__all__ = ["EdgeLinear", "EdgeUnits", "Inputs", "RowGroup", "padded_count"]

DENSE_PAIRS = 60_000  # up to so many (input, variable) pairs "auto" takes the dense engine ...
DENSE_SHARE = 0.2  # ... and if at least this share of the pairs are edges


def padded_count(count: int) -> int:
    """Return the number of parents that ``count`` is rounded up to in the sparse engine: 0-4, 6, 8, 12, 16 ...

    Example:
        >>> [padded_count(n) for n in (0, 3, 5, 7, 9, 13)]
        [0, 3, 6, 8, 12, 16]
    """
    if count <= 4:
        return count
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


@dataclass(frozen=True)
class RowGroup:
    """Variables that are computed together: their numbers, and for the sparse engine where their parents are.

    Args:
        rows: The numbers of the variables, as a slice where they are contiguous.
        size: How many they are, n.
        num_known: The number of variables that the rows may depend on.
        columns: The inputs that each row depends on, of shape (n, P); padded with any.
        edges: The numbers of the edges, of shape (n, P), padded with one past the last; counted from
            ``edge_range`` if there is one. None if that range simply is all of them.
        edge_range: The first edge and one past the last, if the rows are contiguous.
    """

    rows: Tensor | slice
    size: int
    num_known: int
    columns: Tensor | None = None
    edges: Tensor | None = None
    edge_range: tuple[int, int] | None = None

    def take(self, values: Tensor, first: int = 0) -> Tensor:
        """Return the rows of this group from ``values``, which begin with row ``first``."""
        if isinstance(self.rows, slice):
            return values[self.rows.start - first : self.rows.stop - first]
        return values.index_select(0, self.rows)

    def piece(self, part: slice) -> "RowGroup":
        """Return some of the rows, as far as evaluating them goes."""
        columns = None if self.columns is None else self.columns[part]
        return RowGroup(self.rows, part.stop - part.start, self.num_known, columns)


@dataclass(frozen=True)
class Inputs:
    r"""Context and variables known so far, with the common batch shape.

    Args:
        batch: The common batch shape, of N elements.
        context: Shape (C, \*context batch), where the context batch broadcasts to ``batch``; None without context.
        known: Shape (number of known variables, N).
    """

    batch: tuple[int, ...]
    context: Tensor | None
    known: Tensor

    @property
    def size(self) -> int:
        """The number of batch elements, N."""
        return math.prod(self.batch)

    def pieces(self, count: int) -> Iterator[tuple[slice, "Inputs"]]:
        """Split the batch into ``count`` pieces of nearly equal size."""
        size = self.size
        context = None if self.context is None else expand_batch(self.context, self.batch)
        for i in range(count):
            part = slice(size * i // count, size * (i + 1) // count)
            narrow = None if context is None else context[:, part]
            yield part, Inputs((part.stop - part.start,), narrow, self.known[:, part])


def expand_batch(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    r"""Broadcast (F, \*smaller batch) to (F, N), with batch dimensions aligned from the right."""
    if x.shape[1:] != batch:
        x = x.reshape(x.shape[0], *(1,) * (len(batch) + 1 - x.dim()), *x.shape[1:]).expand(-1, *batch)
    return x.reshape(x.shape[0], math.prod(batch))


class EdgeUnits(Constants):
    r"""The coordinates of linear maps on the edges of a graph: K numbers for each variable, linear in its parents.

    Args:
        parents: For each variable the inputs it depends on. Edges are numbered variable by variable.
        num_outputs: K.

    Attributes:
        offset: :math:`W^0`, ``(edges, K)``.
        bias: :math:`b^0`, ``(variables, K)``.
        unit: u, ``(variables, K)``.
    """

    offset: Tensor
    bias: Tensor
    unit: Tensor
    owner: Tensor
    set_of_variable: Tensor
    gather: Tensor
    back: Tensor

    def __init__(self, parents: Sequence[Sequence[int]], num_outputs: int) -> None:
        super().__init__()
        sets = [s for s in dict.fromkeys(map(tuple, parents)) if s]
        number = {s: i for i, s in enumerate(sets)}
        self.whiteners = Whiteners(sets)
        of_variable = [number.get(tuple(own), -1) for own in parents]
        owner = [v for v, own in enumerate(parents) for _ in own]
        self.register_buffer("offset", torch.zeros(len(owner), num_outputs))
        self.register_buffer("bias", torch.zeros(len(parents), num_outputs))
        self.register_buffer("unit", torch.ones(len(parents), num_outputs))
        self.register_buffer("owner", torch.tensor(owner, dtype=torch.long), persistent=False)
        self.register_buffer("set_of_variable", torch.tensor(of_variable), persistent=False)
        starts = [0, *accumulate(map(len, parents))]
        gather: list[int] = []
        back = [0] * len(owner)
        self._shapes: list[tuple[int, int]] = []
        self._places: list[list[int]] = []  # for each group, that of the whitener of each variable
        for members, width in zip(self.whiteners.groups, self.whiteners.widths, strict=True):
            variables = [v for v, i in enumerate(of_variable) if i in set(members)]
            self._shapes.append((len(variables), width))
            self._places.append([members.index(of_variable[v]) for v in variables])
            for v in variables:
                own = list(range(starts[v], starts[v + 1]))
                for position, edge in enumerate(own):
                    back[edge] = len(gather) + position
                gather += own + [own[0]] * (width - len(own))  # padding meets zeros
        self.register_buffer("gather", torch.tensor(gather, dtype=torch.long), persistent=False)
        self.register_buffer("back", torch.tensor(back, dtype=torch.long), persistent=False)

    def root_of_rank(self) -> Tensor:
        """Return for each edge the root of the rank of the whitener of its variable."""
        return self.whiteners.rank[self.set_of_variable[self.owner]].sqrt().to(self.offset)

    def forward(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights ``(edges, K)`` and biases ``(variables, K)`` of the maps."""
        biases = torch.addcmul(self.bias, self.unit, bias)
        if not len(weight):
            return weight, biases
        matrices = self.whiteners.all_matrices()
        (gain,) = self.kept(self._find_gain, self.unit, self.whiteners.rank)
        if matrices:
            parts = weight[self.gather].split([n * width for n, width in self._shapes])
            products = [
                torch.bmm(own[places].mT, part.view(n, width, -1)).view(n * width, -1)
                for own, places, part, (n, width) in zip(
                    matrices, self._places, parts, self._shapes, strict=True
                )
            ]
            weight = (torch.cat(products) if len(products) > 1 else products[0])[self.back]
        return torch.addcmul(self.offset, gain, weight), biases

    def _find_gain(self) -> tuple[Tensor]:
        return (self.unit[self.owner] / self.root_of_rank().unsqueeze(-1),)


class EdgeLinear(nn.Module):
    """K numbers for each variable, linear in its parents.

    Args:
        parents: For each variable, numbered as the module's essay says, the inputs it depends on. Inputs
            are numbered with the context first and then the variables.
        num_context: The number of context columns.
        level_sizes: The number of variables of each level.
        num_outputs: K.
        engine: ``"auto"``, ``"dense"`` or ``"sparse"``.
        natural_units: Whether weights are trained in whitened inputs and units of the outputs
            (:mod:`~pyro_graphflows.nn.masked`).

    Shape:
        - Output of a group of n variables: :math:`(n, K, N)`.

    Raises:
        GraphflowsError: If ``engine`` is another word.
    """

    def __init__(
        self,
        parents: Sequence[Sequence[int]],
        num_context: int,
        level_sizes: Sequence[int],
        num_outputs: int,
        *,
        engine: str = "auto",
        natural_units: bool = False,
    ) -> None:
        super().__init__()
        if engine not in ("auto", "dense", "sparse"):
            raise GraphflowsError(f'Expected engine "auto", "dense" or "sparse"; got {engine!r}.')
        self.num_context = num_context
        self.num_variables = len(parents)
        self.num_outputs = num_outputs
        self.level_sizes = tuple(level_sizes)
        self.parents = tuple(map(tuple, parents))
        self.edges = tuple((v, p) for v, own in enumerate(self.parents) for p in own)
        pairs = (num_context + len(parents)) * len(parents)
        if engine == "auto":
            dense = pairs <= DENSE_PAIRS or len(self.edges) >= DENSE_SHARE * pairs
            engine = "dense" if dense else "sparse"
        self.engine = engine
        self.weight = nn.Parameter(torch.zeros(len(self.edges), num_outputs))
        self.bias = nn.Parameter(torch.zeros(len(parents), num_outputs))
        self.units = EdgeUnits(self.parents, num_outputs) if natural_units else None
        self._plans: dict[Any, Any] = {}  # index tensors by device

    def entries(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the edges and the biases of the variables, as a pass uses them."""
        if self.units is None:
            return self.weight, self.bias
        found: tuple[Tensor, Tensor] = self.units(self.weight, self.bias)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    def prepare(self, groups: Sequence[RowGroup]) -> list[tuple[Tensor, Tensor]]:
        """Return for each group its weights, as the engine uses them, and its biases; once for each evaluation.

        Weights are (C + D, n · K) in the dense engine and (n, P, K) in the sparse one, biases (n, K).
        """
        contiguous = all(isinstance(group.rows, slice) for group in groups)
        weight, bias = self.entries()
        if contiguous:
            # One split, so that the backward pass is one concatenation.
            biases = list(bias.split([group.size for group in groups]))
        else:
            biases = [group.take(bias) for group in groups]
        if self.engine == "dense":
            inputs = self.num_context + self.num_variables
            flat = weight.new_zeros(inputs * self.num_variables, self.num_outputs)
            matrix = flat.index_copy_(0, self._dense_index(), weight).view(inputs, -1)  # no second copy
            weights: Sequence[Tensor] = (matrix,)
            if len(groups) > 1 or groups[0].size < self.num_variables:
                weights = matrix.split([group.size * self.num_outputs for group in groups], 1)
        elif contiguous:
            ranges = [group.edge_range or (0, 0) for group in groups]
            pieces = weight.split([stop - start for start, stop in ranges])
            weights = tuple(self._padded(piece, group) for piece, group in zip(pieces, groups, strict=True))
        else:
            weights = tuple(self._padded(weight, group) for group in groups)
        return list(zip(weights, biases, strict=True))

    def _padded(self, weight: Tensor, group: RowGroup) -> Tensor:
        if group.edges is None:
            return weight.view(group.size, -1, self.num_outputs) if len(weight) else weight.unsqueeze(0)
        return F.embedding(group.edges, F.pad(weight, (0, 0, 0, 1)))

    def forward(self, group: RowGroup, weight: Tensor, bias: Tensor, inputs: Inputs) -> Tensor:
        """Return the K numbers of each variable of a group."""
        if self.engine == "sparse":
            return self._sparse(group, weight, inputs, bias)
        context = inputs.context
        known = inputs.known[: group.num_known]
        start = bias.reshape(-1, 1)
        if context is not None and self.num_context:
            start = torch.addmm(start, weight[: self.num_context].t(), context.reshape(len(context), -1))
            if context.shape[1:] != inputs.batch:
                start = expand_batch(start.view(-1, *context.shape[1:]), inputs.batch)
        if len(known):
            if len(known) < len(weight):  # a slice costs a matrix of zeros in the backward pass
                weight = weight[self.num_context : self.num_context + len(known)]
            start = torch.addmm(start, weight.t(), known)
        return start.expand(-1, inputs.size).reshape(group.size, self.num_outputs, inputs.size)

    def _sparse(self, group: RowGroup, weight: Tensor, inputs: Inputs, bias: Tensor) -> Tensor:
        assert group.columns is not None
        if group.columns.shape[1] == 0:
            return bias.unsqueeze(-1).expand(-1, -1, inputs.size)
        values = inputs.known
        if inputs.context is not None and self.num_context:
            values = torch.cat([expand_batch(inputs.context, inputs.batch), values])
        gathered = F.embedding(group.columns, values)  # (n, P, N)
        return torch.baddbmm(bias.unsqueeze(-1), weight.transpose(1, 2), gathered)

    def all_rows(self) -> tuple[list[RowGroup], Tensor | None]:
        """Return groups that hold all variables, and the indices that bring their results into order (or None)."""
        return self._plan()[0]

    def level_rows(self, level: int) -> list[RowGroup]:
        """Return the groups of one level, in order."""
        return self._plan()[1][level]

    def _dense_index(self) -> Tensor:
        device = self.weight.device
        key = (device, "index")
        if key not in self._plans:
            positions = [p * self.num_variables + v for v, p in self.edges]
            self._plans[key] = torch.tensor(positions, dtype=torch.long, device=device)
        return self._plans[key]

    def _plan(self) -> tuple[tuple[list[RowGroup], Tensor | None], list[list[RowGroup]]]:
        device = self.weight.device
        if device not in self._plans:
            total = self.num_variables
            starts = [sum(self.level_sizes[:i]) for i in range(len(self.level_sizes))]
            restore = None
            if self.engine == "dense":
                whole = [RowGroup(slice(0, total), total, total)]
                levels = [
                    [RowGroup(slice(start, start + size), size, start)]
                    for start, size in zip(starts, self.level_sizes, strict=True)
                ]
            else:
                whole = self._grouped(range(total), total, device, False)
                rows = [torch.arange(total, device=device)[group.rows] for group in whole]
                restore = torch.argsort(torch.cat(rows))
                levels = [
                    self._grouped(range(start, start + size), start, device, True)
                    for start, size in zip(starts, self.level_sizes, strict=True)
                ]
            self._plans[device] = ((whole, restore), levels)
        return self._plans[device]

    def _grouped(self, rows: range, known: int, device: torch.device, level: bool) -> list[RowGroup]:
        first_edge = [0]
        for own in self.parents:
            first_edge.append(first_edge[-1] + len(own))
        by_count: dict[int, list[int]] = {}
        for v in rows:
            by_count.setdefault(padded_count(len(self.parents[v])), []).append(v)
        groups = []
        for count, members in sorted(by_count.items()):
            columns = [[*self.parents[v], *[0] * (count - len(self.parents[v]))] for v in members]
            edges = [
                [
                    *range(first_edge[v], first_edge[v + 1]),
                    *[len(self.edges)] * (count - len(self.parents[v])),
                ]
                for v in members
            ]
            contiguous = level  # within a level, variables are numbered by this count
            table = torch.tensor(edges, dtype=torch.long, device=device).view(len(members), count)
            edge_range = None
            padded = any(len(self.parents[v]) < count for v in members)
            if contiguous:
                edge_range = (first_edge[members[0]], first_edge[members[-1] + 1])
                table = (table - edge_range[0]).clamp(max=edge_range[1] - edge_range[0])
            groups.append(
                RowGroup(
                    slice(members[0], members[-1] + 1)
                    if contiguous
                    else torch.tensor(members, device=device),
                    len(members),
                    known,
                    torch.tensor(columns, dtype=torch.long, device=device).view(len(members), count),
                    None if contiguous and not padded else table,
                    edge_range,
                )
            )
        return groups
