"""What the Graph VAE refuses of the arguments that it is made and called with."""

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

from torch import nn

from pyro_graphflows.errors import GraphflowsError

__all__ = ["check_options", "require_sizes"]


def require_sizes(**sizes: int | Sequence[int]) -> None:
    """Refuse what is no positive whole number, or sequence of such.

    Raises:
        GraphflowsError: If there is such a size.
    """
    for name, given in sizes.items():
        for size in given if isinstance(given, Sequence) else (given,):
            if not isinstance(size, SupportsIndex) or operator.index(size) < 1:
                raise GraphflowsError(f"Expected positive whole numbers for sizes; got {name}={given!r}.")


def check_options(edge_cost: float, decoder_input: str, **modules: Any) -> None:
    """Refuse other options that are out of range or unknown, and networks without parameters.

    Args:
        edge_cost: What an open gate costs.
        decoder_input: What the decoder sees.
        modules: The user's networks; None where there is a default.

    Raises:
        GraphflowsError: If there is such an argument.
    """
    if edge_cost < 0:
        raise GraphflowsError(f"Expected edge_cost >= 0; got {edge_cost}.")
    for key, module in modules.items():
        if module is not None and not isinstance(module, nn.Module):
            raise GraphflowsError(
                f"Expected {key} to be a torch.nn.Module, whose parameters can be trained; got {module!r}."
            )
    if decoder_input not in ("all", "first"):
        raise GraphflowsError(f"Expected decoder_input 'all' or 'first'; got {decoder_input!r}.")
