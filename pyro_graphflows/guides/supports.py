"""Latent sites whose support depends on other latent sites: which they are, and when they can be sampled."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.call import CallReader, is_constant
from pyro_graphflows.guides.site import LatentSite
from pyro_graphflows.inspect import TracedModel

__all__ = ["changing_supports", "require_known_supports"]


def changing_supports(
    reader: CallReader,
    traced: TracedModel,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    indices: Mapping[str, Tensor],
) -> dict[str, tuple[str, ...]]:
    """Return the latent sites whose support changes with the values of others, and these others.

    One run for each latent parent of such a site: the parent keeps its value at set-up, all else is at the feasible
    point, and the bounds are compared.
    """
    nodes: Any = traced.trace.nodes
    suspects = [name for name in traced.graph.latent if not is_constant(nodes[name]["fn"].support)]
    if not suspects:
        return {}
    still = reader.supports_given(model, args, kwargs, {}, indices)
    parents: dict[str, list[str]] = {name: [] for name in suspects}
    for other in traced.graph.latent:
        affected = [name for name in suspects if other in traced.graph.parents(name)]
        if affected:
            value = {other: nodes[other]["value"]}
            moved = reader.supports_given(model, args, kwargs, value, indices)
            for name in affected:
                if not _same_bounds(still[name], moved[name]):
                    parents[name].append(other)
    return {name: tuple(others) for name, others in parents.items() if others}


def require_known_supports(
    changing: Mapping[str, Sequence[str]],
    sampling_order: Sequence[str],
    order: Any,
    sites: Mapping[str, LatentSite],
) -> None:
    """Refuse plans that sample a site before its support is known, and classes that come and go.

    Args:
        changing: The outcome of :func:`changing_supports`.
        sampling_order: The sites as the plan samples them.
        order: The name of the inverse's order.
        sites: The latent sites.

    Raises:
        UnsupportedModelError: If there is such a site. The message names it.
    """
    for name, others in changing.items():
        encoding = sites[name].encoding
        if encoding is not None and encoding.kind == "classes":
            raise UnsupportedModelError(
                f"Expected discrete latent sites with the same values at every call; those of {name!r} depend on "
                f"{', '.join(others)}. Use a range that holds them all, with probability zero for some."
            )
    for name, others in changing.items():
        late = [other for other in others if sampling_order.index(other) > sampling_order.index(name)]
        if late:
            raise UnsupportedModelError(
                f"Expected {name!r} to be sampled after {', '.join(late)}, on which its support depends; the "
                f"inverse {order!r} samples it before. Use inverse='reverse', which follows the model's order."
            )


def _same_bounds(one: Any, other: Any) -> bool:
    mine, theirs = vars(one), vars(other)
    for key, value in mine.items():
        if isinstance(value, constraints.Constraint):
            if not _same_bounds(value, theirs[key]):
                return False
        elif torch.is_tensor(value) and not torch.equal(value, theirs[key]):
            return False
    return True
