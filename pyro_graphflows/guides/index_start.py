"""The regression start of sites whose elements have maps of their own: one regression for each index of a plate."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.made import MADEBlock
from pyro_graphflows.guides.start import WINSOR, fit_normal

__all__ = ["regress_indices_"]

ROWS_PER_WEIGHT = (
    20  # fewer joint samples of an index than this for each weight leave its map at the shared one
)
MOST_INDICES = 2000


@torch.no_grad()
def regress_indices_(
    block: MADEBlock,
    site: str,
    plates: Mapping[str, PlateState],
    context: Tensor,
    values: Mapping[str, Tensor],
) -> bool:
    """Set the maps of one site to what the regressions within the indices add to the shared one.

    Args:
        block: The block, with the shared regression in place.
        site: A site with maps of its own.
        plates: The plates at set-up.
        context: Features of the context nodes, ``(draws, *batch, columns)``.
        values: Unconstrained vectors of the block's sites, ``(draws, *batch, size)``.

    Returns:
        Whether that was possible.
    """
    own = list(block.columns[site])
    inputs = [j for parent in block.block.parents[site] for j in block.columns.get(parent, ())]
    joint = _by_index(block, [plates[name] for name in block.block.unlike[site]], context, values)
    if site in block.element_columns or len(joint) > MOST_INDICES:
        return False
    each = [rows[torch.isfinite(rows).all(-1)] for rows in joint]
    if min(map(len, each)) < ROWS_PER_WEIGHT * (len(inputs) + 1):
        return False
    fitted = [fit_normal(rows.clamp(-WINSOR, WINSOR), inputs, own) for rows in each]
    weights, locs, trils = zip(*fitted, strict=True)
    return block.set_index_linear_(site, torch.stack(weights), torch.stack(locs), torch.stack(trils))


def _by_index(
    block: MADEBlock, own: Sequence[PlateState], context: Tensor, values: Mapping[str, Tensor]
) -> Tensor:
    """Return the joint samples as ``(indices, rows, columns)``, in standardised units."""
    parts = [context]
    for site in block.block.sites:
        shift, scale = block.standardization(site)
        parts.append((values[site] - shift) / scale)
    depth = max(part.dim() for part in parts)
    parts = [
        p.reshape(p.shape[:1] + (1,) * (depth - p.dim()) + p.shape[1:]) if p.shape[-1] else p for p in parts
    ]
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts if part.shape[-1]))
    joint = torch.cat([p.expand(*shape, p.shape[-1]) for p in parts if p.shape[-1]], -1).double()
    # the table of an index map is laid out by dimension, left to right
    dims = sorted(plate.dim - 1 for plate in own)
    joint = joint.movedim(dims, list(range(len(dims))))
    indices = joint.shape[: len(dims)].numel()
    return joint.reshape(indices, -1, joint.shape[-1])
