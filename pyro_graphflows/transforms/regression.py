"""Least-squares regression of each variable of a flow on its parents."""

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.transforms.structure import FlowStructure

__all__ = ["regress_on_parents", "structure_mask"]


def structure_mask(structure: FlowStructure) -> Tensor:
    """Return the boolean matrix of direct dependencies, (D, C + D), columns context first.

    Example:
        >>> structure_mask(FlowStructure([(), (0,)], [(0,), ()], 1)).int().tolist()
        [[1, 0, 0], [0, 1, 0]]
    """
    mask = torch.zeros(structure.event_dim, structure.context_dim + structure.event_dim, dtype=torch.bool)
    for v, (own, given) in enumerate(zip(structure.parents, structure.context_parents, strict=True)):
        mask[v, [*given, *(structure.context_dim + p for p in own)]] = True
    return mask


def regress_on_parents(
    structure: FlowStructure, z: Tensor, context: Tensor | None = None, *, ridge: float = 1e-8
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the linear-Gaussian fit :math:`z_v = \sum_j W_{vj} (x, z)_j + b_v + s_v \varepsilon_v`.

    All regressions are solved from one sample covariance, in float64 and standardised coordinates.

    Args:
        structure: Who may depend on whom.
        z: Samples of the variables, of shape (n, D).
        context: Samples of the context, of shape (n, C).
        ridge: Added to the variances of the standardised inputs. Residual variances are at least this
            share of a variable's own.

    Returns:
        W of shape (D, C + D), b of shape (D,) and s of shape (D,), in float64.

    Raises:
        GraphflowsError: If there are fewer than two samples, or a value is not finite.
    """
    values = (z if context is None else torch.cat([context, z], -1)).double()
    num_context, dim = structure.context_dim, structure.event_dim
    if len(values) < 2 or values.shape[-1] != num_context + dim or not bool(values.isfinite().all()):
        raise GraphflowsError(
            f"Expected at least two samples of {dim} variables and {num_context} context columns, all finite; "
            f"got shape {tuple(values.shape)}."
        )
    loc, scale = values.mean(0), values.std(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    standard = (values - loc) / scale
    covariance = standard.t() @ standard / len(values)
    weights = covariance.new_zeros(dim, num_context + dim)
    variance = covariance.new_ones(dim)
    for v in range(dim):
        inputs = [*structure.context_parents[v], *(num_context + p for p in structure.parents[v])]
        gram, column = covariance[inputs][:, inputs], covariance[inputs, num_context + v]
        solution = torch.linalg.solve(gram + ridge * torch.eye(len(inputs)).to(gram), column)
        weights[v, inputs] = solution
        variance[v] = (
            covariance[num_context + v, num_context + v] - 2 * solution @ column + solution @ gram @ solution
        )
    weights = weights * scale[num_context:].unsqueeze(-1) / scale
    return (
        weights,
        loc[num_context:] - weights @ loc,
        variance.clamp(min=ridge).sqrt() * scale[num_context:],
    )
