"""Elements of latent sites in other plates as inputs: all of them one by one, or the one that an index tells."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.features import FeatureMap, concatenate
from pyro_graphflows.guides.pool_members import PoolMember, affine_part, without_leading_ones

__all__ = ["AllElements", "LookUp"]


class _SomeElements(nn.Module):
    """Elements of other plates as they are: nothing is fitted, and masks do not matter."""

    indices: tuple[str, ...] = ()

    def _run(self, values: Mapping[str, Tensor], plates: Mapping[str, PlateState]) -> Tensor:
        raise NotImplementedError("a way of taking elements must say which")

    def forward(
        self,
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState],
        masks: Mapping[str, Tensor | bool],
    ) -> Tensor:
        """Return the elements that are taken; see the class for what is refused."""
        return without_leading_ones(self._run(values, plates))

    @torch.no_grad()
    def of_samples(
        self, values: Mapping[str, Tensor], plates: Mapping[str, PlateState], *, fit: bool
    ) -> Tensor:
        """See :meth:`~pyro_graphflows.guides.pooling.DeepSetPool.of_samples`."""
        return self._run(values, plates)


class AllElements(_SomeElements):
    """All elements of latent sites in other plates, one by one: for plates that are small and keep their size.

    Args:
        members: The nodes.
        maps: For each of them, the map from values to standardised features.
        over: The plates whose elements become features.

    Shape:
        - values: for each member ``(*batch, size)``.
        - Output: ``(*batch, num_features)``, as for :class:`~pyro_graphflows.guides.pooling.DeepSetPool`.

    Raises:
        GraphflowsError: In a call, if a plate has another size than at set-up.
    """

    def __init__(
        self, members: Sequence[PoolMember], maps: Sequence[FeatureMap], over: Sequence[PlateState]
    ) -> None:
        super().__init__()
        self.members = tuple(members)
        self.maps = nn.ModuleList(maps)
        self.sizes = {plate.name: plate.size for plate in over}
        self.counts = []
        for member in members:
            self.counts.append(member.size)
            for plate in over:
                self.counts[-1] *= plate.size if plate.name in member.plates else 1
        self.num_features = sum(self.counts)

    def _run(self, values: Mapping[str, Tensor], plates: Mapping[str, PlateState]) -> Tensor:
        parts = []
        for member, feature_map in zip(self.members, self.maps, strict=True):
            part = feature_map(values[member.name])
            for name, size in self.sizes.items():
                plate = plates[name]
                if plate.subsampled or plate.size != size:
                    raise GraphflowsError(
                        f"Expected plate {name!r} to have {size} elements, all of them in the call, as when the guide "
                        f"was set up, since {member.name} enters other sites element by element; got {plate.size} of "
                        f"{plate.full_size}. Set up a guide for the new data, or use pool='deepset'."
                    )
                if name in member.plates:
                    part = _to_features(part, plate.dim - 1, size)
            parts.append(part)
        return concatenate(parts)

    def columns_of(self, name: str) -> tuple[list[int], Tensor, Tensor]:
        """Return the columns of a member's elements, and the shift and scale that turn them into values."""
        position = next(i for i, member in enumerate(self.members) if member.name == name)
        start, count = sum(self.counts[:position]), self.counts[position]
        feature_map = self.maps[position]
        assert isinstance(feature_map, FeatureMap)
        size = self.members[position].size
        shift, scale = affine_part(feature_map, range(size), name)
        return list(range(start, start + count)), shift.repeat(count // size), scale.repeat(count // size)


class LookUp(_SomeElements):
    """The element of a latent site in another plate that an index tells: ``theta[group]`` for each datum.

    Args:
        member: The node.
        feature_map: The map from its values to standardised features.
        index: The name of the index, an argument of an integer type.
        outer: The plate of the node.
        inner: The plate of the index.

    Shape:
        - values: of the node ``(*batch, size)``; of the index any shape with one entry for each element.
        - Output: ``(*batch, size)``, with the plate of the index in place of the other.

    Raises:
        GraphflowsError: In a call, if the outer plate is subsampled, or the index has another number of entries.
    """

    def __init__(
        self, member: PoolMember, feature_map: FeatureMap, index: str, outer: PlateState, inner: PlateState
    ) -> None:
        super().__init__()
        self.members = (member,)
        self.maps = nn.ModuleList([feature_map])
        self.index = index
        self.indices = (index,)
        self.outer, self.inner = outer.name, inner.name
        self.num_features = member.size

    def _run(self, values: Mapping[str, Tensor], plates: Mapping[str, PlateState]) -> Tensor:
        outer, inner = plates[self.outer], plates[self.inner]
        name = self.members[0].name
        if outer.subsampled:
            raise GraphflowsError(
                f"Expected plate {outer.name!r} in full, since its elements are looked up by {self.index}; it is "
                "subsampled in this call. Subsample the data only."
            )
        index = values[self.index].reshape(-1)
        if inner.indices is not None and len(index) != inner.size:
            index = index[inner.indices.to(index.device)]
        if len(index) != inner.size:
            raise GraphflowsError(
                f"Expected {inner.size} entries of {self.index}, one for each element of plate {inner.name!r}; got "
                f"{len(index)}."
            )
        feature_map = self.maps[0]
        part = feature_map(values[name])
        depth = 1 - min(outer.dim, inner.dim)
        part = part.reshape((1,) * (depth - part.dim()) + part.shape)
        part = part.index_select(outer.dim - 1, index.to(part.device))
        return part if outer.dim == inner.dim else part.transpose(outer.dim - 1, inner.dim - 1)

    def columns_of(self, name: str) -> tuple[list[int], Tensor, Tensor]:
        """Return the columns of the member, and the shift and scale that turn them into values."""
        feature_map = self.maps[0]
        assert isinstance(feature_map, FeatureMap)
        columns = list(range(self.num_features))
        return columns, *affine_part(feature_map, columns, name)


def _to_features(value: Tensor, at: int, size: int) -> Tensor:
    """Move a dimension to the left of the features and join the two; leave one of size one in its place."""
    value = value.reshape((1,) * (-at - value.dim()) + value.shape)
    shape = list(value.shape)
    shape[at] = size
    moved = value.expand(shape).movedim(at, -2).flatten(-2)
    return moved.unsqueeze(at)
