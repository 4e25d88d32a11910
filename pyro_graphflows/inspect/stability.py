"""Whether a model is the same from run to run: its sites, its graph, and the rows of data that it takes.

A guide reads the data in a run of the model of its own. What the model draws outside of ``pyro.sample`` differs there
from what the likelihood sees: a mini-batch by ``torch.randperm`` pairs the latents with the rows of another batch, and
nothing shows it but the loss. Sites and edges that come and go would make the guide's structure a matter of luck.
Two runs with different random numbers are compared here.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample

from pyro_graphflows.inspect.arguments import argument_leaves, outside_tensors, with_tensors
from pyro_graphflows.inspect.randomness import kept_random_state, seed_random_state
from pyro_graphflows.inspect.trace import TracedModel, is_transparent, rows_of_plates, trace_once

__all__ = [
    "REMEDY_ROWS",
    "REMEDY_STRUCTURE",
    "changes",
    "changes_of_data",
    "changes_of_sites",
]

OTHER_SEED = 10_007
REMEDY_ROWS = (
    "Let a plate draw the rows, pyro.plate(name, size, subsample_size=...), so that guide and model have the same, or "
    "take them before the call and pass them as arguments"
)
REMEDY_STRUCTURE = "Sample all sites in every run, and choose between values with torch.where"


def changes(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], traced: TracedModel
) -> tuple[str, str] | None:
    """Run a model again with other random numbers; return what is not the same, and the remedy, in words.

    Subsampled plates have the rows that they had. The random state is as before.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with these arguments, with one node for each site.
    """
    with kept_random_state():
        seed_random_state(OTHER_SEED)
        again = trace_once(model, args, kwargs, strict=False, indices=rows_of_plates(traced.trace))
    different = changes_of_sites(traced.trace, again.trace) or _changes_of_graph(traced, again)
    if different:
        return different[0], REMEDY_STRUCTURE
    args, kwargs = with_tensors(args, kwargs)
    given = {**outside_tensors(model, args, kwargs), **argument_leaves(model, args, kwargs)}
    rows = changes_of_data(traced.trace, again.trace, given, traced.without_data)
    if rows:
        return f"the data of site {', '.join(map(repr, rows))} are other rows in every run", REMEDY_ROWS
    return None


def _changes_of_graph(one: TracedModel, other: TracedModel) -> list[str]:
    edges = sorted(map(str, _pairs(set(one.graph.edges) ^ set(other.graph.edges))))
    if edges:
        return [f"the dependence {edges[0]} is there in one run and not in another"]
    found_by_probes = set(one.places) - set(other.places)
    for node in one.graph.nodes:
        if node not in found_by_probes and one.graph.plates[node] != other.graph.plates.get(node):
            return [f"'{node}' is in other plates from run to run"]
    return []


def _pairs(edges: Iterable[tuple[Any, Any]]) -> list[str]:
    return [f"of '{child}' on '{parent}'" for parent, child in edges]


def changes_of_sites(one: Any, other: Any) -> list[str]:
    """Return in words which sites of two traces differ, in existence, role, plates or shape."""
    mine, theirs = _sites(one), _sites(other)
    for name in sorted(set(mine) ^ set(theirs)):
        return [f"site '{name}' is there in one run and not in another"]
    for name, site in mine.items():
        again = theirs[name]
        if site["is_observed"] != again["is_observed"]:
            return [f"site '{name}' is observed in one run and not in another"]
        if _shape(site) != _shape(again):
            return [f"site '{name}' has shape {_shape(site)} in one run and {_shape(again)} in another"]
    return []


def _shape(site: Any) -> tuple[int, ...]:
    return tuple(site["fn"].batch_shape + site["fn"].event_shape)


def _sites(trace: Any) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not is_transparent(site)
    }


def changes_of_data(
    one: Any, other: Any, given: Mapping[Any, torch.Tensor], computed: Iterable[str] = ()
) -> list[str]:
    """Return the observed sites whose values are other rows of the same data in two runs.

    Data with noise on top (dequantisation) are no such change.

    Args:
        one: A trace.
        other: A trace at the same arguments, with the same indices of plates.
        given: The tensors that the model uses.
        computed: Observed sites whose values are computed from latent sites.
    """
    mine, theirs = _sites(one), _sites(other)
    changed = []
    for name, site in mine.items():
        if not site["is_observed"] or name in computed or name not in theirs:
            continue
        first, second = site["value"], theirs[name]["value"]
        if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
            continue
        if first.shape == second.shape and torch.equal(torch.nan_to_num(first), torch.nan_to_num(second)):
            continue
        if any(_are_entries(first, leaf) and _are_entries(second, leaf) for leaf in given.values()):
            changed.append(name)
    return changed


def _are_entries(value: torch.Tensor, leaf: torch.Tensor) -> bool:
    if value.dtype != leaf.dtype or leaf.layout is not torch.strided:
        return False
    return bool(torch.isin(value, leaf.to(value.device)).all())
