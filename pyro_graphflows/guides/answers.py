"""What users ask of a guide, from its draws and its densities."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["expanded_in_plates", "quantiles_of", "sum_of_terms"]


def sum_of_terms(terms: Sequence[Tensor], depth: int) -> Tensor:
    """Return the sum of the log-densities of some sites.

    Args:
        terms: The log-densities, in the plates of their sites.
        depth: The number of dimensions, on the right, that are plates of some sites and not of others: each term is
            summed over these.

    Example:
        >>> sum_of_terms([torch.ones(10, 1), torch.ones(10, 3)], 1).tolist() == [4.0] * 10
        True
    """
    total = _summed(terms[0], depth)
    for term in terms[1:]:
        total = total + _summed(term, depth)
    return total


def _summed(term: Tensor, depth: int) -> Tensor:
    depth = min(depth, term.dim())
    return term.flatten(term.dim() - depth).sum(-1) if depth else term


def expanded_in_plates(value: Tensor, event_shape: Sequence[int], plates: Sequence[Any]) -> Tensor:
    """Return a value with all elements of the plates around its site.

    Args:
        value: The value, perhaps of one element for all.
        event_shape: The shape of an element.
        plates: The plates of Pyro.

    Example:
        >>> import pyro
        >>> expanded_in_plates(torch.zeros(2), (2,), [pyro.plate("data", 5, dim=-1)]).shape
        torch.Size([5, 2])
    """
    inner = len(event_shape)
    batch = [1] * max([value.dim() - inner, *(-plate.dim for plate in plates)])
    for plate in plates:
        batch[plate.dim] = plate.subsample_size
    for dim in range(-1, inner - value.dim() - 1, -1):
        batch[dim] = max(batch[dim], value.shape[dim - inner])
    return value.expand((*batch, *event_shape))


def quantiles_of(draws: Tensor, probabilities: Tensor, *, discrete: bool) -> Tensor:
    """Return quantiles of draws, ``(number of probabilities, *shape of a draw)``.

    Args:
        draws: The draws, along the first dimension.
        probabilities: The probabilities.
        discrete: Whether quantiles are values that were drawn: the least with that share of the draws up to it.

    Example:
        >>> quantiles_of(torch.arange(4.0), torch.tensor([0.5]), discrete=False).tolist()
        [1.5]
        >>> quantiles_of(torch.arange(4), torch.tensor([0.5]), discrete=True).tolist()
        [1]
    """
    if not discrete:
        return torch.quantile(draws, probabilities.to(draws), dim=0)
    place = (probabilities * len(draws)).ceil().long() - 1
    return draws.sort(0).values[place.clamp(0, len(draws) - 1).to(draws.device)]
