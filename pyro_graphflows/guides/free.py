"""Free parameters for sites whose data cannot be network inputs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import PlateState

__all__ = ["FreeTable"]


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
