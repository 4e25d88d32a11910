"""One site's conditional made linear-Gaussian, in the units of the data and of unconstrained latents.

Networks see standardised features; what is asked for is in the units of the values. The shifts and scales on the way,
of data, of parents, of summaries of other plates and of the site itself, are worked into weights and location.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.features import FeatureMap

__all__ = ["make_linear_"]


@torch.no_grad()
def make_linear_(
    network: Any,
    feature: FeatureMap,
    pools: Any,
    context: Sequence[str],
    site: str,
    weights: Mapping[str, Any],
    intercept: Tensor | float,
    scale: Tensor | float,
) -> None:
    """Make one site's conditional linear-Gaussian.

    Args:
        network: The block of the site.
        feature: The map from the values of the block's context to features.
        pools: The summaries by their position in the context.
        context: The names of the context.
        site: The site.
        weights: See :meth:`~pyro_graphflows.guides.AutoFaithfulNormal.set_linear_`.
        intercept: The same.
        scale: The same.
    """
    shift, width = network.standardization(site)
    loc = torch.as_tensor(intercept, dtype=shift.dtype).expand(len(shift)) - shift
    standard: dict[str, Tensor] = {}
    pooled: set[str] = set()
    direct = set(network.block.parents[site])

    def matrix_of(value: Any, columns: int, parent: str) -> Tensor:
        matrix = torch.as_tensor(value, dtype=shift.dtype)
        if matrix.numel() != len(shift) * columns:
            raise GraphflowsError(
                f"Expected weights of {parent!r} for {site!r} of shape ({len(shift)}, {columns}); got "
                f"{tuple(matrix.shape)}."
            )
        return matrix.reshape(len(shift), columns)

    start = 0
    for position, name in enumerate(context):
        stop = start + len(network.columns[name])
        if str(position) in pools and name in network.block.parents[site]:
            pool = pools[str(position)]
            standard[name] = loc.new_zeros(len(shift), stop - start)
            mine = weights.get(name, weights)
            for member in pool.members:
                if member.name not in mine or (mine is weights and member.name in direct | pooled):
                    continue
                columns, centre, spread = pool.columns_of(member.name)
                at = [start + column for column in columns]
                matrix = matrix_of(mine[member.name], len(columns), member.name)
                loc = loc + matrix @ (centre + spread * feature.shift[at])
                standard[name][:, columns] = matrix * spread * feature.scale[at] / width.unsqueeze(-1)
                pooled.add(member.name)
            pooled.add(name)
        elif name in weights:
            matrix = matrix_of(weights[name], stop - start, name)
            loc = loc + matrix @ feature.shift[start:stop]
            standard[name] = matrix * feature.scale[start:stop] / width.unsqueeze(-1)
        start = stop
    for name in weights:
        if name not in standard and name not in pooled:
            parent_shift, parent_width = network.standardization(name)
            matrix = matrix_of(weights[name], len(parent_shift), name)
            loc = loc + matrix @ parent_shift
            standard[name] = matrix * parent_width / width.unsqueeze(-1)
    tril = torch.as_tensor(scale, dtype=shift.dtype)
    tril = tril if tril.dim() == 2 else tril.expand(len(shift)).diag_embed()
    if tril.shape != (len(shift), len(shift)) or not bool((tril.diagonal() > 0).all()):
        raise GraphflowsError(
            f"Expected a positive scale of {site!r}, or a lower triangular matrix ({len(shift)}, {len(shift)}) "
            f"with a positive diagonal; got {torch.as_tensor(scale).tolist()}."
        )
    network.set_linear_(site, standard, loc / width, tril / width.unsqueeze(-1))
