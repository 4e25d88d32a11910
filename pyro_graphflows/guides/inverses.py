"""From what a user asked for to an inverse, and plates that an index nests in others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.inversion import (
    faithful_inverse,
    fully_connected_inverse,
    mean_field_inverse,
    stochastic_inverse,
)
from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.guides.call import plates_of
from pyro_graphflows.inspect import TracedModel, get_argument, nested_by_index, with_nested_plates

__all__ = ["Inverse", "NestedInverse", "invert_nested", "resolve_inverse"]

NAMED_INVERSES: dict[str, Callable[[ModelGraph], InverseGraph]] = {
    "stochastic": stochastic_inverse,
    "full": fully_connected_inverse,
    "mean_field": mean_field_inverse,
}

Inverse = str | Sequence[str] | InverseGraph | Callable[[ModelGraph], InverseGraph]


def resolve_inverse(graph: ModelGraph, inverse: Inverse) -> InverseGraph:
    """Return the inverse that a user asked for.

    Args:
        graph: The model graph.
        inverse: The name of an elimination order of :func:`~pyro_graphflows.faithful_inverse`, an elimination
            sequence, ``"stochastic"``, ``"full"``, ``"mean_field"``, an inverse, or a function that makes one.

    Raises:
        GraphflowsError: If the inverse is not of the model's latent nodes or is of another type.
    """
    if isinstance(inverse, str):
        return (
            NAMED_INVERSES[inverse](graph) if inverse in NAMED_INVERSES else faithful_inverse(graph, inverse)
        )
    if callable(inverse):
        inverse = inverse(graph)
    if isinstance(inverse, InverseGraph):
        if set(inverse.parents) != set(graph.latent):
            raise GraphflowsError(
                f"Expected an inverse of the model's latent sites {', '.join(map(str, graph.latent))}; "
                f"got one of {', '.join(map(str, inverse.parents))}."
            )
        if inverse.graph == graph:
            return inverse
        return InverseGraph(
            graph,
            inverse.parents,
            order=inverse.order,
            sampling_order=inverse.sampling_order,
            coupled=inverse.coupled,
        )
    if isinstance(inverse, Sequence):
        return faithful_inverse(graph, inverse)
    raise GraphflowsError(
        "Expected inverse= the name of an order, a sequence of latent sites, an InverseGraph or a function from "
        f"ModelGraph to InverseGraph; got {type(inverse).__name__}."
    )


@dataclass(frozen=True)
class NestedInverse:
    """An inverse of a model with effects that are looked up by an index.

    Attributes:
        inverse: The inverse, in the model's plates.
        nested: The same with the plates of the data inside those that they look up; None if nothing is looked up.
        lookups: For pairs (inner, outer) of plates, the argument that says which element is looked up; None if no
            argument does.
    """

    inverse: InverseGraph
    nested: InverseGraph | None
    lookups: dict[tuple[str, str], str | None]


def invert_nested(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    traced: TracedModel,
    option: Inverse,
) -> NestedInverse:
    """Invert a model's graph; plates whose elements look up those of others count as nested in these.

    Args:
        model: The model.
        args: The positional arguments of a call.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.
        option: See :func:`resolve_inverse`.
    """
    graph = traced.graph
    nested = nested_by_index(model, args, kwargs, traced=traced)
    if not nested:
        return NestedInverse(resolve_inverse(graph, option), None, {})
    inside = resolve_inverse(with_nested_plates(graph, nested), option)
    coupled = {  # across plates that a site is in by its index alone: across those with the index
        site: [p for p in graph.plates[site] if p in plates or not set(plates) <= set(graph.plates[site])]
        for site, plates in inside.coupled.items()
    }
    inverse = InverseGraph(
        graph,
        inside.parents,
        order=inside.order,
        sampling_order=inside.sampling_order,
        coupled=coupled,
    )
    return NestedInverse(inverse, inside, _index_arguments(model, args, kwargs, traced, nested))


def _index_arguments(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    traced: TracedModel,
    nested: Mapping[str, Mapping[str, Tensor]],
) -> dict[tuple[str, str], str | None]:
    """Return for pairs (inner, outer) of plates the argument that says which element is looked up."""
    found: dict[tuple[str, str], str | None] = {}
    plates = plates_of(traced.trace)
    for inner, outers in nested.items():
        for outer, groups in outers.items():
            found[inner, outer] = None
            for name in sorted(traced.index_inputs):
                value = get_argument(model, traced.argument_paths[name], args, kwargs).reshape(-1).cpu()
                indices = plates[inner].indices
                if indices is not None and len(value) == plates[inner].full_size:
                    value = value[indices.cpu()]
                if value.shape == groups.shape and bool(((value == groups) | (groups < 0)).all()):
                    found[inner, outer] = name
                    break
    return found
