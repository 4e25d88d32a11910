"""Discrete sites that the model enumerates and the guide leaves out, summed out exactly.

A site of the model marked ``infer={"enumerate": "parallel"}`` takes all its values at once, along a dimension of its
own to the left of all plates. The joint density of the other sites is then a sum over these dimensions of a product
over sites, in which each plate multiplies: a job for Pyro's plated tensor contraction, asked here for one result per
element of some plates.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any, cast

from pyro import poutine
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.infer.particles import Program, density_sites, is_one

__all__ = ["enumerated", "require_no_scales", "sum_of_the_rest", "summed_log_density"]


def enumerated(model: Program, num_dims: int) -> Program:
    """Return a model whose marked sites take all their values, to the left of ``num_dims`` dimensions of plates."""
    return poutine.enum(model, first_available_dim=-1 - num_dims)


def summed_log_density(trace: poutine.Trace, plates: Sequence[str]) -> Tensor:
    """Return the log-density of a model's trace with enumerated sites summed out.

    Args:
        trace: A trace of :func:`enumerated`; scales are ignored, masks are not.
        plates: The vectorised plates to keep; all other ones are multiplied over.

    Returns:
        A tensor with one dimension for each of ``plates``, in their order.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = trace.plate_to_symbol
    factors: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
    sum_dims: set[str] = set()
    for _, site in density_sites(trace):
        ordinal = frozenset(symbols[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized)
        factor = site["packed"]["unscaled_log_prob"]
        # Enumerated here, not drawn by a guide that marks it too. Masked or not, its probabilities add up to one.
        if site["infer"].get("_enumerate_dim") is not None:
            sum_dims.update(factor._pyro_dims)
        else:
            factor = packed.scale_and_mask(factor, mask=site["packed"]["mask"])
        factors.setdefault(ordinal, []).append(factor)
    sum_dims -= set(symbols.values())
    # packed tensors have no dimensions of size 1
    sized = set().union(*(factor._pyro_dims for terms in factors.values() for factor in terms))
    kept = [symbols[name] for name in plates]
    target = frozenset(symbol for symbol in kept if symbol in sized)
    contracted = cast(Any, contract_to_tensor(factors, sum_dims, target_ordinal=target))
    dims = contracted._pyro_dims
    result: Tensor = contracted.permute([dims.index(symbol) for symbol in kept if symbol in target])
    return result[tuple(slice(None) if symbol in target else None for symbol in kept)]


def require_no_scales(trace: poutine.Trace) -> None:
    """Raise where a site has a scale, of a subsampled plate or by ``poutine.scale``: a sum over sites ignores it.

    Args:
        trace: A trace of the model.

    Raises:
        UnsupportedModelError: If that is so.
    """
    for name, site in density_sites(trace):
        if not is_one(site["scale"]):
            raise UnsupportedModelError(f"{name} has a scale beside a site that the model sums over.")


def sum_of_the_rest(trace: poutine.Trace, without: Collection[str], plates: Sequence[str] = ()) -> Tensor:
    """Return :func:`summed_log_density` of all sites but some, which are taken out, in float64 on the CPU.

    Args:
        trace: A trace of :func:`enumerated`.
        without: The sites to leave out.
        plates: The vectorised plates to keep.

    Raises:
        UnsupportedModelError: If a site that is left has a scale.
    """
    for name in without:
        trace.remove_node(name)
    require_no_scales(trace)
    return summed_log_density(trace, plates).cpu().double()
