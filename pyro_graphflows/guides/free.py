"""Parameters for each element of a plate: free ones, where data cannot be network inputs, and maps of one's own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import PlateState

__all__ = ["FreeTable", "IndexMap"]


class FreeTable(nn.Module):
    """A row of parameters for each element of a stack of plates.

    The rows are added to the outputs of the block's network, so that a site's factor moves with the sampled sites
    above it, and differs between the elements of its plates by what their data say.

    Shape:
        - Output: ``(*batch, num_outputs)``, with the batch shape of the plates in the call.

    Args:
        plates: The plates; their full sizes must not change.
        num_outputs: The length of a row.
    """

    def __init__(self, plates: Sequence[PlateState], num_outputs: int) -> None:
        super().__init__()
        depth = max((-plate.dim for plate in plates), default=0)
        shape = [1] * depth
        for plate in plates:
            shape[depth + plate.dim] = plate.full_size
        self.sizes = {plate.name: plate.full_size for plate in plates}
        self.table = nn.Parameter(torch.zeros(*shape, num_outputs))

    def forward(self, plates: Mapping[str, PlateState]) -> Tensor:
        """Return the rows of a call's elements.

        Raises:
            GraphflowsError: If the full size of a plate is not that at set-up.
        """
        rows: Tensor = self.table
        for name, size in self.sizes.items():
            plate = plates[name]
            if plate.full_size != size:
                raise GraphflowsError(
                    f"Expected plate {name!r} to have {size} elements, each with its own parameters, as when the guide "
                    f"was set up; got {plate.full_size}. Set up a guide for the new data."
                )
            if plate.indices is not None:
                rows = rows.index_select(plate.dim - 1, plate.indices.to(rows.device))
        return rows


class IndexMap(nn.Module):
    """An affine map from a site's inputs to its factor's parameters for each element of plates, beside the network.

    A shared network cannot give the elements of a plate slopes of their own, as unlike groups need: a large group hears
    less of what is sampled above it than a small one. All maps are zero in the beginning.

    Shape:
        - Input: ``(*batch, num_inputs)``.
        - Output: ``(*batch, num_outputs)``.

    Args:
        plates: The plates; their full sizes must not change.
        num_inputs: The number of inputs.
        num_outputs: The number of outputs.
        offset: Whether the maps have an offset, or a slope alone.
    """

    def __init__(
        self, plates: Sequence[PlateState], num_inputs: int, num_outputs: int, *, offset: bool
    ) -> None:
        super().__init__()
        self.num_inputs, self.num_outputs, self.offset = num_inputs, num_outputs, offset
        self.rows = FreeTable(plates, num_outputs * (num_inputs + offset))

    def forward(self, plates: Mapping[str, PlateState], inputs: Tensor) -> Tensor:
        """Return the contribution to the outputs of a call's elements."""
        rows = self.rows(plates).unflatten(-1, (self.num_outputs, self.num_inputs + self.offset))
        outputs = (rows[..., : self.num_inputs] @ inputs.unsqueeze(-1)).squeeze(-1)
        return outputs + rows[..., -1] if self.offset else outputs

    @torch.no_grad()
    def set_(self, slopes: Tensor, offsets: Tensor | None = None) -> None:
        """Set the maps of all elements, ``(elements, num_outputs, num_inputs)`` and ``(elements, num_outputs)``."""
        parts = [slopes] if offsets is None else [slopes, offsets.unsqueeze(-1)]
        self.rows.table.copy_(torch.cat(parts, -1).reshape(self.rows.table.shape))
