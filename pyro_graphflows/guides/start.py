r"""The regression start: a guide that is right for linear-Gaussian models before the first step.

Joint samples of the model are turned into one covariance matrix per block; each site's factor is set to the
least-squares regression of its unconstrained vector on its parents in the inverse, with the residual covariance
as scale. For a linear-Gaussian model with a faithful inverse the expected KL divergence from the posterior is
then about (number of weights) / (2 number of samples) nats, so that a sparse inverse also needs fewer samples.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from pyro_graphflows.guides.factors import ElementNormalFactor, Factor
from pyro_graphflows.guides.features import location_and_scale
from pyro_graphflows.guides.made import MADEBlock

__all__ = ["block_loss", "fit_normal", "regress_", "standardize_"]

RIDGE = 1e-10  # relative to unit variances; makes rank-deficient sets of parents solvable
RESIDUAL_FLOOR = 1e-4  # in standardised units; deterministic relations have residual zero
WINSOR = 10.0  # standard deviations; keeps one draw of a heavy tail from deciding


def standardize_(block: MADEBlock, values: Mapping[str, Tensor], discrete: Collection[str] = ()) -> None:
    """Set the shift and scale of each site from samples of its unconstrained vector, shape ``(n, size)``.

    Discrete sites keep shift 0 and scale 1: their vectors are zeros and ones.
    """
    for site in block.block.sites:
        if site not in discrete:
            block.set_standardization_(site, *location_and_scale(values[site]))


def regress_(block: MADEBlock, context: Tensor, values: Mapping[str, Tensor]) -> None:
    """Set each factor of a block to the linear regression on its parents.

    Factors that fit themselves to samples (:meth:`~pyro_graphflows.guides.factors.Factor.start_from_samples`) do so.

    Args:
        block: The block; its standardisation is used and not changed.
        context: Features of the context nodes in rows, shape ``(n, columns)``.
        values: Unconstrained vectors of the sites in rows, each of shape ``(n, size)``.
    """
    columns = [context.double()]
    for site in block.block.sites:
        shift, scale = block.standardization(site)
        columns.append(((values[site] - shift) / scale).double())
    joint = torch.cat(columns, -1)
    joint = joint[torch.isfinite(joint).all(-1)].clamp(-WINSOR, WINSOR)
    mean, covariance = joint.mean(0), torch.atleast_2d(torch.cov(joint.T))
    for site in block.block.sites:
        parents = [parent for parent in block.block.parents[site] if parent in block.columns]
        inputs = [j for parent in parents for j in block.columns[parent]]
        own = list(block.columns[site])
        factor: Factor | None = getattr(block, "factors", {}).get(site)  # flows have none
        fitted = None if factor is None else factor.start_from_samples(joint[:, inputs], joint[:, own])
        if factor is not None and fitted is not None:
            rows = joint.new_zeros(factor.num_outputs, block.network.input_dim)
            rows[:, inputs] = fitted[0]
            block.set_rows_(site, rows, fitted[1])
            continue
        if site in block.element_columns:
            weights, residual = _solve_elements(block, site, covariance, inputs, len(joint))
        else:
            weights = _solve(covariance, inputs, own)
            residual = covariance[own][:, own] - weights @ covariance[inputs][:, own]
            residual = residual * (len(joint) - 1) / max(len(joint) - 1 - len(inputs), 1)
        loc = mean[own] - weights @ mean[inputs]
        parts = dict(zip(parents, weights.split([len(block.columns[p]) for p in parents], -1), strict=True))
        block.set_linear_(site, parts, loc, _square_root(residual))


def fit_normal(rows: Tensor, inputs: Sequence[int], own: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, location and scale of the regression of some columns of a sample on others."""
    own = list(own)
    mean, covariance = rows.mean(0), torch.atleast_2d(torch.cov(rows.T))
    weights = _solve(covariance, inputs, own)
    residual = covariance[own][:, own] - weights @ covariance[list(inputs)][:, own]
    residual = residual * (len(rows) - 1) / max(len(rows) - 1 - len(inputs), 1)
    return weights, mean[own] - weights @ mean[list(inputs)], _square_root(residual)


def _solve(covariance: Tensor, inputs: Sequence[int], own: Sequence[int]) -> Tensor:
    _require_finite(covariance)
    if not inputs:
        return covariance.new_zeros(len(own), 0)
    among = covariance[inputs][:, inputs]
    ridge = RIDGE * torch.eye(len(inputs), dtype=among.dtype, device=among.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(among + ridge)
        if not failed:
            return torch.cholesky_solve(covariance[inputs][:, own], factor).T
        ridge = ridge * 100


def _solve_elements(
    block: MADEBlock, site: str, covariance: Tensor, inputs: Sequence[int], num_rows: int
) -> tuple[Tensor, Tensor]:
    """Regress each element on its own parents; return the weights on the inputs and the residual covariance."""
    own = list(block.columns[site])
    factor = block.factors[site]
    assert isinstance(factor, ElementNormalFactor)
    direct = covariance.new_zeros(len(own), len(inputs))
    unit = torch.eye(len(own), dtype=covariance.dtype, device=covariance.device)  # I - A
    variances = covariance.new_zeros(len(own))
    place = {column: k for k, column in enumerate(inputs)}
    for i, column in enumerate(own):
        outer = block.element_columns[site][i]
        inner = [j for row, j in zip(factor.rows, factor.columns, strict=True) if row == i]
        given = [*outer, *(own[j] for j in inner)]
        weights = _solve(covariance, given, [column])[0]
        residual = covariance[column, column] - weights @ covariance[given, column]
        variances[i] = residual * (num_rows - 1) / max(num_rows - 1 - len(given), 1)
        direct[i, [place[c] for c in outer]] = weights[: len(outer)]
        unit[i, inner] = -weights[len(outer) :]
    mixing = torch.linalg.inv(unit)
    return mixing @ direct, mixing @ variances.clamp(min=RESIDUAL_FLOOR**2).diag_embed() @ mixing.T


def _square_root(residual: Tensor) -> Tensor:
    """Return a lower triangular square root whose diagonal is at least the floor."""
    _require_finite(residual)
    eye = torch.eye(len(residual), dtype=residual.dtype, device=residual.device)
    jitter = 0.0
    while True:
        factor, failed = torch.linalg.cholesky_ex(residual + jitter * eye)
        if not failed and bool(torch.isfinite(factor).all()):
            break
        jitter = max(10 * jitter, RESIDUAL_FLOOR**2)
    diagonal = factor.diagonal()
    return factor * (diagonal.clamp(min=RESIDUAL_FLOOR) / diagonal).unsqueeze(-1)


def _require_finite(covariance: Tensor) -> None:
    if not bool(torch.isfinite(covariance).all()):  # no ridge would help
        raise RuntimeError("Expected finite covariances; there are too few finite joint samples.")


@torch.no_grad()
def block_loss(block: MADEBlock, context: Tensor, values: Mapping[str, Tensor]) -> float:
    """Return the mean of ``-log q`` of the sites' unconstrained vectors given context, in nats."""
    evaluation = block.start(context)
    total = 0.0
    for level in block.block.levels:
        factors = evaluation.factors()
        evaluation.accept({site: values[site] for site in level})
        for site, factor in factors.items():
            total -= float(factor.log_prob(values[site]).mean())
    return total
