r"""Masks: the only place where edges of a graph become entries of a matrix.

There is one orientation: ``mask[i, j]`` is true when output i may depend on input j, the layout of
:attr:`torch.nn.Linear.weight`. An edge of a graph points from parent to child, so the edge :math:`j \to i` is
the entry ``mask[i, j]``.

A masked network is described by *label sets*. Output k may see the inputs in ``allowed[k]``; each hidden unit
carries one of these sets, and a unit connects upward if and only if its set is contained in the set of the
unit above. So whatever a unit with set S computes depends on the inputs in S alone, at any depth, and equal
sets are merged: outputs share units where the structure allows it. As an example, the chain
:math:`z_1 \to z_2 \to z_3` with parents as inputs has the sets {}, {0}, {1}; the complete graph has {}, {0},
{0, 1}, where a unit with set {0} also feeds the third output.

The *owner* of a label set S is the variable v with :math:`v \in S \subseteq A(v)`, where ``A(v) =
allowed[v]`` holds v itself and its parents. If the parents form a directed acyclic graph there is at most
one. Every path from input v to output v runs only through units owned by v, for S lies between {v} and A(v)
all along it; so the diagonal of the Jacobian needs one pass with the weights between units of the same owner.

Everything is computed with sets and index lists, never with a dense matrix, until one is asked for.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError

__all__ = ["LabelledMasks", "SparseMask", "UnitsPerSet", "allowed_mask", "label_masks"]


@dataclass(frozen=True, eq=False)
class SparseMask:
    """A boolean matrix, given by the places of its true entries.

    Args:
        indices: The rows and columns of the true entries, sorted by row, then column; shape (2, nnz).
        shape: The numbers of rows (outputs) and columns (inputs).

    Example:
        >>> SparseMask.from_dense(torch.eye(2, dtype=torch.bool)).indices.tolist()
        [[0, 1], [0, 1]]
    """

    indices: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_pairs(cls, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> "SparseMask":
        """Sort the places given (no place twice) into a mask."""
        order = np.lexsort((columns, rows))
        indices = np.stack([rows[order], columns[order]]).astype(np.int64)
        return cls(torch.from_numpy(indices), shape)

    @classmethod
    def from_dense(cls, mask: Tensor) -> "SparseMask":
        """List the true entries of a boolean matrix."""
        return cls(mask.nonzero().T.contiguous(), (mask.shape[0], mask.shape[1]))

    @property
    def nnz(self) -> int:
        """The number of true entries."""
        return self.indices.shape[1]

    def to_dense(self) -> Tensor:
        """Return the boolean matrix."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.indices.device)
        mask[self.indices[0], self.indices[1]] = True
        return mask

    def repeat_rows(self, times: int) -> "SparseMask":
        """Replace each row by ``times`` equal rows beside each other."""
        if times == 1:
            return self
        rows, columns = self.indices.numpy()
        rows = (rows[:, None] * times + np.arange(times)).ravel()
        return self.from_pairs(rows, np.repeat(columns, times), (self.shape[0] * times, self.shape[1]))


@dataclass(frozen=True, eq=False)
class LabelledMasks:
    """The masks of a feed-forward network, with the label set of every hidden unit.

    Args:
        patterns: One mask a layer, from the inputs to the outputs.
        labels: For each hidden layer, the label set of each unit.
        allowed: For each output, the inputs that it may see.
    """

    patterns: tuple[SparseMask, ...]
    labels: tuple[tuple[frozenset[int], ...], ...]
    allowed: tuple[frozenset[int], ...]

    @cached_property
    def masks(self) -> tuple[Tensor, ...]:
        """The masks as boolean matrices (output, input)."""
        return tuple(pattern.to_dense() for pattern in self.patterns)

    @property
    def hidden_dims(self) -> tuple[int, ...]:
        """The number of units of each hidden layer."""
        return tuple(len(labels) for labels in self.labels)

    @cached_property
    def owners(self) -> tuple[Tensor, ...]:
        r"""For each hidden layer, the owner of each unit: a variable, or −1 where there is none.

        Output v is taken to be variable v, the one at input v. The owner of a set S is the v with
        :math:`v \in S \subseteq` ``allowed[v]``.

        Raises:
            GraphflowsError: If a set has two owners, since then ``allowed`` is not acyclic.
        """
        bits = [_bits(members) for members in self.allowed]
        known: dict[frozenset[int], int] = {}
        for label in {label for labels in self.labels for label in labels}:
            own = _bits(label)
            found = [v for v in sorted(label) if v < len(bits) and own & bits[v] == own]
            if len(found) > 1:
                raise GraphflowsError(
                    f"Expected allowed sets of the form {{v}} and parents of v in a directed acyclic graph; "
                    f"outputs {', '.join(map(str, found))} depend on each other."
                )
            known[label] = found[0] if found else -1
        return tuple(
            torch.tensor([known[label] for label in labels], dtype=torch.long) for labels in self.labels
        )


def allowed_mask(allowed: Sequence[Collection[int]], num_inputs: int) -> SparseMask:
    """Return the mask of the direct dependencies: entry (k, j) is true when j is in ``allowed[k]``.

    Args:
        allowed: For each output, the inputs that it may see.
        num_inputs: The number of inputs.

    Returns:
        The mask of shape (``len(allowed)``, ``num_inputs``).

    Raises:
        GraphflowsError: If an index is not in ``range(num_inputs)``.

    Example:
        >>> allowed_mask([[], [0], [0, 1]], 2).to_dense().int().tolist()
        [[0, 0], [1, 0], [1, 1]]
    """
    sets = _as_sets(allowed, num_inputs)
    return SparseMask.from_pairs(*_memberships(sets), (len(sets), num_inputs))


@dataclass(frozen=True)
class UnitsPerSet:
    """Hidden layers that have the same number of units for each distinct set of inputs.

    Attributes:
        number: The number of units.
        layers: The number of hidden layers.

    Raises:
        GraphflowsError: If there is no unit, or the number of layers is negative.
    """

    number: int = 8
    layers: int = 1

    def __post_init__(self) -> None:
        if self.number < 1 or self.layers < 0:
            raise GraphflowsError(
                f"Expected units_per_set >= 1 and hidden_layers >= 0; got {self.number} and {self.layers}."
            )


def label_masks(
    allowed: Sequence[Collection[int]],
    num_inputs: int,
    hidden: UnitsPerSet | Sequence[int] | None = None,
    *,
    input_levels: Sequence[int] | None = None,
    names: tuple[Sequence[object] | None, Sequence[object] | None] = (None, None),
) -> LabelledMasks:
    r"""Return the masks of a network whose output k depends on exactly the inputs in ``allowed[k]``.

    The distinct non-empty sets get units in every hidden layer; a unit connects upward if and only if its set
    is contained in the upper set. Sets are in order of first appearance, or by level where levels are given,
    and the units of a set are beside each other.

    With explicit numbers the units are spread over the sets as evenly as possible. A layer with fewer
    units than sets first serves the sets that are not the union of smaller ones; if some dependency is lost
    even so, which the Boolean product of the masks tells, this raises. An output without units for its own
    set is a sum of functions of the smaller sets that are left.

    References:
        [1] Germain et al. (2015), MADE: Masked Autoencoder for Distribution Estimation. There units are
        labelled by a number, which fits complete graphs; here by a set of inputs.

    Args:
        allowed: For each output, the indices of the inputs that it may see.
        num_inputs: The number of inputs.
        hidden: The hidden layers: :class:`UnitsPerSet` (its defaults for None), or the number of units of each.
        input_levels: A level for each input. The level of a set is the largest of its members', and sets are
            then sorted by level.
        names: Names of the inputs and of the outputs, for messages.

    Returns:
        The masks, one more than there are hidden layers, and the label sets of the units.

    Raises:
        GraphflowsError: If an index is out of range, a number of units is not positive, or explicit layers
            are too narrow. The message lists the dependencies that would be lost.

    Example:
        >>> made = label_masks([[], [0], [0, 1]], 2, UnitsPerSet(1))
        >>> [sorted(label) for label in made.labels[0]]
        [[0], [0, 1]]
        >>> made.masks[1].int().tolist()
        [[0, 0], [1, 0], [1, 1]]
    """
    sets = _as_sets(allowed, num_inputs)
    distinct = [members for members in dict.fromkeys(sets) if members]
    if input_levels is not None:
        levels = list(input_levels)
        distinct.sort(key=lambda members: max(levels[j] for j in members))
    upper, lower = _subset_pairs(distinct)

    hidden = UnitsPerSet() if hidden is None else hidden
    if isinstance(hidden, UnitsPerSet):
        counts = [np.full(len(distinct), hidden.number) for _ in range(hidden.layers)]
    else:
        if any(width < 1 for width in hidden):
            raise GraphflowsError(f"Expected positive hidden_dims; got {list(hidden)}.")
        priority = _by_need(distinct, upper, lower)
        counts = [_spread(width, priority) for width in hidden]
        if any((count == 0).any() for count in counts):
            _check_nothing_lost(distinct, (upper, lower), counts, sets, num_inputs, names)

    patterns = []
    below = np.ones(num_inputs, dtype=np.int64)
    rows, columns = _memberships(distinct)
    for count in counts:
        patterns.append(_expand(rows, columns, count, below))
        rows, columns, below = upper, lower, count
    # The output layer: output k takes the row of its own set.
    index = {members: i for i, members in enumerate(distinct)}
    if counts:
        starts = np.searchsorted(upper, np.arange(len(distinct) + 1))
        pieces = [
            np.arange(*starts[index[s] : index[s] + 2]) if s else np.arange(0, dtype=np.int64) for s in sets
        ]
        chosen = np.concatenate(pieces) if pieces else np.arange(0)
        rows = np.repeat(np.arange(len(sets)), [len(piece) for piece in pieces])
        patterns.append(_expand(rows, lower[chosen], np.ones(len(sets), dtype=np.int64), below))
    else:
        patterns.append(allowed_mask(sets, num_inputs))
    labels = tuple(
        tuple(members for members, n in zip(distinct, count, strict=True) for _ in range(n))
        for count in counts
    )
    return LabelledMasks(tuple(patterns), labels, sets)


def _as_sets(allowed: Sequence[Collection[int]], num_inputs: int) -> tuple[frozenset[int], ...]:
    sets = tuple(frozenset(int(j) for j in members) for members in allowed)
    wrong = sorted({j for members in sets for j in members if not 0 <= j < num_inputs})
    if wrong:
        raise GraphflowsError(f"Expected indices of inputs below {num_inputs}; got {wrong}.")
    return sets


def _bits(members: Collection[int]) -> int:
    return sum(1 << j for j in members)


def _subset_pairs(sets: Sequence[frozenset[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All (t, s) with ``sets[s] <= sets[t]``, sorted. Candidates t are those with the rarest member of s."""
    holders: dict[int, list[int]] = {}
    for t, members in enumerate(sets):
        for j in members:
            holders.setdefault(j, []).append(t)
    bits = [_bits(members) for members in sets]
    pairs: list[tuple[int, int]] = []
    for s, members in enumerate(sets):
        own = bits[s]
        rarest = min((holders[j] for j in members), key=len)
        pairs.extend((t, s) for t in rarest if own & bits[t] == own)
    table = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _by_need(sets: Sequence[frozenset[int]], upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Indices of the sets, those that are not the union of smaller ones first."""
    union: list[set[int]] = [set() for _ in sets]
    for t, s in zip(upper, lower, strict=True):
        if s != t:
            union[t] |= sets[s]
    return np.array(
        sorted(range(len(sets)), key=lambda i: (union[i] == sets[i], i)),
        dtype=np.int64,
    )


def _spread(width: int, priority: np.ndarray) -> np.ndarray:
    count = np.zeros(len(priority), dtype=np.int64)
    if len(priority):
        count += width // len(priority)
        if width < len(priority):
            count[priority[:width]] = 1
        else:
            count[: width % len(priority)] += 1
    return count


def _check_nothing_lost(
    distinct: Sequence[frozenset[int]],
    pairs: tuple[np.ndarray, np.ndarray],
    counts: Sequence[np.ndarray],
    sets: Sequence[frozenset[int]],
    num_inputs: int,
    names: tuple[Sequence[object] | None, Sequence[object] | None],
) -> None:
    """Compare the Boolean product of the layer masks, at the level of sets, with what is promised."""
    members_of = _memberships(distinct)
    contained = sparse.csr_array((np.ones_like(pairs[0]), pairs), shape=(len(distinct), len(distinct)))
    promised = sparse.csr_array((np.ones_like(members_of[0]), members_of), shape=(len(distinct), num_inputs))
    reached = promised
    for count in counts:
        present = sparse.dia_array(((count > 0).astype(np.int64)[None], [0]), shape=contained.shape)
        reached = contained @ (present @ reached)
        reached.data[:] = 1
    missing = sparse.coo_array(promised - reached)
    lost: dict[frozenset[int], list[int]] = {}
    for t, j, value in zip(*missing.coords, missing.data, strict=True):
        if value:
            lost.setdefault(distinct[t], []).append(int(j))
    if not lost:
        return
    inputs = list(range(num_inputs)) if names[0] is None else list(names[0])
    outputs = list(range(len(sets))) if names[1] is None else list(names[1])
    lines = [
        f"{outputs[k]} on {', '.join(str(inputs[j]) for j in sorted(lost[members]))}"
        for k, members in enumerate(sets)
        if members in lost
    ]
    shown = "; ".join(lines[:10]) + ("; ..." if len(lines) > 10 else "")
    raise GraphflowsError(
        f"Expected hidden_dims wide enough for {len(distinct)} distinct label sets; got "
        f"{[int(count.sum()) for count in counts]}. Dependencies that would be lost: {shown}. "
        f"{len(distinct)} units in every hidden layer are always enough."
    )


def _memberships(sets: Sequence[frozenset[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All (s, j) with ``j in sets[s]``, sorted."""
    rows = np.repeat(np.arange(len(sets)), [len(members) for members in sets])
    return rows, np.array([j for members in sets for j in sorted(members)], dtype=np.int64)


def _expand(rows: np.ndarray, columns: np.ndarray, above: np.ndarray, below: np.ndarray) -> SparseMask:
    """Replace each entry (t, s) by the block of ``above[t]`` x ``below[s]`` units."""
    first_row = np.cumsum(above) - above
    first_column = np.cumsum(below) - below
    width = below[columns]
    size = above[rows] * width
    place = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    width = np.repeat(width, size)
    return SparseMask.from_pairs(
        np.repeat(first_row[rows], size) + place // width,
        np.repeat(first_column[columns], size) + place % width,
        (int(above.sum()), int(below.sum())),
    )
