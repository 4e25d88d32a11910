r"""The start of chain-rule terms from joint samples: how the residuals of the elements of a plate vary together.

After the regression each element has a location; what is left over, the residual, has some variance :math:`v` and,
between any two elements, some covariance :math:`c`, both averaged over elements. A constant column of U (for
:math:`c < 0`) or of V (for :math:`c > 0`) makes just these: with :math:`d^2 = v - c` and :math:`k = |c| / d^2`,

.. math:: U_n = \sqrt{k / (1 - N k)}, \qquad V_n = \sqrt{k}.

That is exact for exchangeable elements, as with an observed total of a plate.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.coupled import WAKE, Chain, CoupledFactor
from pyro_graphflows.guides.made import MADEBlock

__all__ = ["start_chains_"]

MOST_COUPLING = 0.99  # of 1 / N: beyond it the covariance of exchangeable elements is singular


@torch.no_grad()
def start_chains_(
    block: MADEBlock,
    plates: Mapping[str, PlateState],
    context: Tensor | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Set the low-rank part of the sites that are drawn jointly: from joint samples, or to small random columns.

    Args:
        block: The block, with the regression in place.
        plates: The plates at set-up.
        context: Features of the context nodes, ``(draws, *batch, columns)``.
        values: Unconstrained vectors of the block's sites, ``(draws, *batch, size)``.
    """
    if block.network.skip is None:
        return
    residuals = {} if context is None or values is None else _residuals(block, context, values)
    for site, key in block._chain_of.items():
        chain, factor = block.chains[key], block.factors[site]
        assert isinstance(chain, Chain)
        assert isinstance(factor, CoupledFactor)
        if factor.rank == 0:
            continue
        bias = block.network.skip.bias
        assert bias is not None
        rows = block.outputs[site]
        columns = bias[rows.start + factor.num_inner : rows.stop].view(factor.size, 2 * factor.rank)
        columns.copy_(WAKE * torch.randn_like(columns))
        if site in residuals and factor.size == 1:
            dims = [plates[name].dim - 1 for name in chain.names]
            number = torch.Size(residuals[site].shape[dim] for dim in dims).numel()
            variance = residuals[site].square().mean()
            total = residuals[site].sum(dims).square().mean() / number
            covariance = (total - variance) / max(number - 1, 1)
            inner = (variance - covariance).clamp(min=1e-8)
            share = covariance.abs() / inner
            if covariance < 0:
                share = share.clamp(max=MOST_COUPLING / number)
                columns[0, 0] = (share / (1 - number * share)).sqrt()
            else:
                columns[0, factor.rank] = share.sqrt()
            bias[rows.start + factor.size] += 0.5 * (inner / variance).log()


def _residuals(block: MADEBlock, context: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what each site's value is off its location, in standardised units."""
    evaluation = block.start(context)
    found = {}
    for level in block.block.levels:
        factors = evaluation.factors()
        evaluation.accept({site: values[site] for site in level})
        for site in level:
            if site in block._chain_of:
                found[site] = (values[site] - factors[site].mean) / block.standardization(site)[1]
    return found
