"""Permutation-invariant summaries of what is inside plates, for sites outside of them.

The data of a group cannot be inputs of the group's own variable one by one: there may be any number of them, in any
order. They are *pooled*: joint tuples of all that is known of one element, ``(x_n, w_n)``, become features, which are
averaged over the plate (Zaheer et al. 2017). The features are

- the standardised entries of the tuple, their squares and products (means of products carry slopes, means of squares
  carry scales, so that a linear regression on the summary can start both), and the logarithm of each entry's variance;
- a small learned network of the tuple;
- the logarithm of the number of elements, as the precision of a posterior grows with it.

Nested plates are pooled from the inside out, so that the spread between groups and that within them are told apart.
Crossed plates have no inner one; they are pooled in one order for each of them. Data that look up a group by an index
(``theta[group]``) count as nested in the groups: they are pooled group by group.

A summary of a *subsampled* plate is not allowed: with the likelihood scaled by ``N / B`` and a guide that has seen
the same ``B`` elements, the objective is no bound on the evidence (a guide that fits each batch overstates it).

References:
    [1] Zaheer et al. (2017), Deep Sets, Theorem 2.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.features import FeatureMap, concatenate
from pyro_graphflows.guides.pool_members import (
    PoolMember,
    affine_part,
    subsampled_message,
    without_leading_ones,
)
from pyro_graphflows.guides.pool_stage import DeepSet, PoolStage, Segments

__all__ = ["DeepSet", "DeepSetPool", "pooling_orders"]

CHUNK_ROWS = 100_000  # of joint samples at set-up


def pooling_orders(plates: Sequence[str], around: Sequence[AbstractSet[str]]) -> tuple[tuple[str, ...], ...]:
    """Return the orders, outer to inner, in which plates are pooled, one for each innermost plate.

    A plate is inside another if all that is in the first is in the second too; of two plates with the same nodes, the
    later one.

    Args:
        plates: The plates to pool over.
        around: For each node of the model, the plates around it.

    Example:
        >>> pooling_orders(["pupils", "schools"], [{"pupils", "schools"}, {"schools"}])
        (('schools', 'pupils'),)
        >>> pooling_orders(["rows", "columns"], [{"rows", "columns"}, {"rows"}, {"columns"}])
        (('columns', 'rows'), ('rows', 'columns'))
    """
    inside = {
        (one, other): all(other in each for each in around if one in each)
        and (any(other in each and one not in each for each in around) or i > j)
        for i, one in enumerate(plates)
        for j, other in enumerate(plates)
        if i != j
    }
    depth = {one: sum(inside[one, other] for other in plates if other != one) for one in plates}
    innermost = [one for one in plates if not any(inside[other, one] for other in plates if other != one)]
    orders = []
    for last in innermost:
        rest = [plate for plate in plates if plate != last]
        orders.append((*sorted(rest, key=lambda plate: (depth[plate], plates.index(plate))), last))
    return tuple(orders)


class DeepSetPool(nn.Module):
    """A summary of what is inside plates.

    Args:
        members: The nodes that are pooled, jointly.
        maps: For each of them, the map from values to standardised features.
        orders: The orders in which the plates are pooled, each outer to inner (:func:`pooling_orders`).
        options: The shape of the learned part.
        segments: Triples (inner, outer, index) of plates whose elements are pooled group by group, by an index.

    Shape:
        - values: for each member ``(*batch, size)``, the plates at their own dimensions of the batch shape; of an index
          any shape with one entry for each element.
        - Output: ``(*batch, num_features)`` without the pooled plates; leading dimensions of size one are dropped.
    """

    def __init__(
        self,
        members: Sequence[PoolMember],
        maps: Sequence[FeatureMap],
        orders: Sequence[Sequence[str]],
        options: DeepSet,
        segments: Sequence[tuple[str, str, str]] = (),
    ) -> None:
        super().__init__()
        self.members = tuple(members)
        self.segments = tuple(segments)
        self.indices = tuple(dict.fromkeys(index for _, _, index in segments))
        self.maps = nn.ModuleList(maps)
        self.orders = tuple(map(tuple, orders))
        self._masked = (
            sum(member.weighs for member in members) > 1
        )  # then masks may differ: they are features
        self.branches = nn.ModuleList()
        self.num_features = 0
        for order in self.orders:
            stages = []
            core = carried = 0
            for position in reversed(range(len(order))):
                joining = self._joining(order, position)
                core += sum(member.size for member in joining)
                carried += sum(self._masked and member.weighs for member in joining)
                stages.append(PoolStage(core, carried, options))
                core, carried = stages[-1].core_size, stages[-1].carried_size
            self.branches.append(nn.ModuleList(stages))
            self.num_features += core + carried

    def _joining(self, order: Sequence[str], position: int) -> list[PoolMember]:
        """Return the members whose innermost plate in an order is at a position."""
        return [
            member
            for member in self.members
            if max((i for i, plate in enumerate(order) if plate in member.plates), default=-1) == position
        ]

    def forward(
        self,
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState],
        masks: Mapping[str, Tensor | bool],
    ) -> Tensor:
        """Return the summary.

        Args:
            values: For each member its flat values; the indices as they are.
            plates: The plates of the call.
            masks: Masks by member, of batch shape; those without one are complete.

        Raises:
            GraphflowsError: If a plate is subsampled in this call, or an index is not one of its groups.
        """
        return without_leading_ones(self._run(values, plates, masks, fit=False))

    @torch.no_grad()
    def of_samples(
        self, values: Mapping[str, Tensor], plates: Mapping[str, PlateState], *, fit: bool
    ) -> Tensor:
        """Return the summaries of joint samples.

        Args:
            values: For each member ``(draws, *batch, size)``, all of the same number of dimensions.
            plates: The plates.
            fit: Whether to set the standardisation of all stages, from a first part of the draws.

        Returns:
            Shape ``(draws, *batch, num_features)``.
        """
        of_members = [values[member.name] for member in self.members]
        draws = max(len(value) for value in of_members)
        elements = max(value[0, ..., 0].numel() for value in of_members)
        chunk = max(2, CHUNK_ROWS // elements)
        found = []
        for start in range(0, draws, chunk):
            part = {m.name: values[m.name][start : start + chunk] for m in self.members}
            indices = {name: values[name] for name in self.indices}
            summary = self._run({**part, **indices}, plates, {}, fit=fit and start == 0)
            found.append(summary.expand(len(next(iter(part.values()))), *summary.shape[1:]))
        return torch.cat(found)

    def _run(
        self,
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState],
        masks: Mapping[str, Tensor | bool],
        fit: bool,
    ) -> Tensor:
        features, weights = self._features(values, masks)
        parts = []
        for order, stages in zip(self.orders, self.branches, strict=True):
            assert isinstance(stages, nn.ModuleList)
            core: list[Tensor] = []
            carried: list[Tensor] = []
            there: Tensor | None = None
            judged = False  # whether anything that says which elements count has been met
            for position, stage in zip(reversed(range(len(order))), stages, strict=True):
                assert isinstance(stage, PoolStage)
                plate = plates[order[position]]
                if plate.subsampled:
                    raise GraphflowsError(subsampled_message(plate.name, [m.name for m in self.members]))
                joining = self._joining(order, position)
                weighing = [weights[member.name] for member in joining if member.weighs]
                masked = list(weighing)
                if judged:
                    weighing.append(there)
                judged = judged or bool(weighing)
                core += [features[member.name] for member in joining]
                if self._masked:
                    like = core[0]
                    carried += [like.new_ones(1) if mask is None else mask for mask in masked]
                joint = concatenate(core)
                one, other, there = stage(
                    joint,
                    concatenate(carried, like=joint),
                    _any(weighing),
                    plate.dim,
                    plate.size,
                    self._segments_of(plate, values, plates),
                )
                if fit:
                    stage.fit_(one, other)
                core, carried = [stage.core_map(one)], [stage.carried_map(other)]
            parts += [*core, *carried]
        return concatenate(parts)

    def _segments_of(
        self, plate: PlateState, values: Mapping[str, Tensor], plates: Mapping[str, PlateState]
    ) -> Segments | None:
        """Return the groups of a plate's elements, if there are groups."""
        for inner, outer, name in self.segments:
            if inner != plate.name:
                continue
            groups, index = plates[outer], values[name].reshape(-1)
            if groups.subsampled:
                raise GraphflowsError(
                    f"Expected plate {outer!r} in full, since elements of {inner!r} are pooled by {name}, which "
                    "tells their element there; it is subsampled in this call. Use the full data."
                )
            if len(index) != plate.size or bool(((index < 0) | (index >= groups.size)).any()):
                raise GraphflowsError(
                    f"Expected {plate.size} entries of {name} between 0 and {groups.size - 1}, one for each element of "
                    f"plate {inner!r}, which say which element of {outer!r} it belongs to; got {len(index)} between "
                    f"{index.min()} and {index.max()}."
                )
            return Segments(index.to(values[self.members[0].name].device).long(), groups.dim, groups.size)
        return None

    def _features(
        self, values: Mapping[str, Tensor], masks: Mapping[str, Tensor | bool]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Return the standardised features of each member, and where it is there (None: everywhere)."""
        features: dict[str, Tensor] = {}
        weights: dict[str, Tensor | None] = {}
        for member, feature_map in zip(self.members, self.maps, strict=True):
            value = values[member.name]
            mask: Tensor | None = None
            if member.partly:
                value, mask = value[..., :-1], value[..., -1:] > 0
            elif member.name in masks and masks[member.name] is not True:
                mask = torch.as_tensor(masks[member.name], device=value.device).unsqueeze(-1)
            if mask is None:
                features[member.name], weights[member.name] = feature_map(value), None
                continue
            zero = torch.zeros((), dtype=value.dtype, device=value.device)
            features[member.name] = torch.where(mask, feature_map(torch.where(mask, value, zero)), zero)
            weights[member.name] = mask.to(value.dtype)
        return features, weights

    def columns_of(self, name: str) -> tuple[list[int], Tensor, Tensor]:
        """Return the columns of a member's mean, and the shift and scale that turn them into that mean.

        The mean is that over the plates from the inside out: of group means where groups differ in size.

        Raises:
            GraphflowsError: If a map on the way is not affine.
        """
        order, stages = self.orders[0], self.branches[0]
        assert isinstance(stages, nn.ModuleList)
        columns: list[int] = []
        shift, scale = torch.zeros(0), torch.ones(0)
        for position, stage in zip(reversed(range(len(order))), stages, strict=True):
            assert isinstance(stage, PoolStage)
            joining = self._joining(order, position)
            start = 0 if position == len(order) - 1 else self._core_size_before(order, position)
            for member in joining:
                if member.name == name:
                    columns = list(range(start, start + member.size))
                    feature_map = self.maps[self.members.index(member)]
                    assert isinstance(feature_map, FeatureMap)
                    shift, scale = affine_part(feature_map, range(member.size), name)
                start += member.size
            if columns:
                more_shift, more_scale = affine_part(stage.core_map, columns, name)
                shift, scale = shift + scale * more_shift, scale * more_scale
        return columns, shift, scale

    def _core_size_before(self, order: Sequence[str], position: int) -> int:
        return sum(m.size for p in range(position + 1, len(order)) for m in self._joining(order, p))


def _any(weights: Sequence[Tensor | None]) -> Tensor | None:
    """Return where anything is there; None if something is there everywhere."""
    if not weights or any(weight is None for weight in weights):
        return None
    total = weights[0]
    for weight in weights[1:]:
        assert total is not None
        assert weight is not None
        total = torch.maximum(total, weight)
    return total
