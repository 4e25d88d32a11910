"""Which rows of its data a model takes: those of the indices of a subsampled plate.

``x[ind]``, ``x.index_select(0, ind)`` and ``pyro.subsample(x, event_dim=0)`` take the rows of a plate, whatever the
shape of ``x``. A run inside the tracer shows them (:class:`~pyro_graphflows.inspect.tracer.RowUse`): the index *is* the
plate's, so that nothing has to be guessed from sizes. Here the uses are put down to the tensors that were given to the
model, and applied to other tensors on later calls (:func:`rows_in_call`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect.arguments import (
    ArgumentPath,
    argument_leaves,
    argument_name,
    outside_tensors,
    with_tensors,
)
from pyro_graphflows.inspect.tracer import PlateWatch, Region, RowUse, TaintTracker, storage_of, watching

__all__ = [
    "Rows",
    "arranged",
    "require_rows_of_indices",
    "rows_of_run",
    "rows_taken",
    "take_rows",
    "watch_leaves",
]

Rows = Mapping[int, str]
"""For dimensions of a tensor, counted from the right, the plate whose rows are taken."""


def watch_leaves(
    tracker: TaintTracker, model: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[dict[ArgumentPath, torch.Tensor], dict[ArgumentPath, torch.Tensor]]:
    """Let a tracker watch the tensors that a model is given, and those that it uses without; return both."""
    leaves, outside = argument_leaves(model, args, kwargs), outside_tensors(model, args, kwargs)
    for leaf in leaves.values():
        tracker.watch_argument(leaf)
    for leaf in outside.values():
        tracker.watch_outside(leaf)
    return leaves, outside


def rows_taken(
    tracker: TaintTracker, leaves: Mapping[ArgumentPath, torch.Tensor]
) -> tuple[dict[ArgumentPath, dict[int, str]], dict[ArgumentPath, str]]:
    """Return for tensors of which dimensions the rows of which plates were taken in a run.

    Args:
        tracker: What watched the run.
        leaves: The tensors, by path.

    Returns:
        The first plate by path and dimension; and for tensors with rows of two plates along one dimension, why they
        cannot be inputs, in words.

    Raises:
        UnsupportedModelError: If it is ambiguous: rows of a tensor computed from one with several dimensions of that
            size. The message names the tensor.
    """
    found: dict[ArgumentPath, dict[int, str]] = {}
    clashes: dict[ArgumentPath, str] = {}
    for use in [*tracker.row_uses, *_read_one_by_one(tracker)]:
        for path, dim in _origins(tracker, leaves, use.tensor, use.dim, use.taint, use.plate):
            before = found.setdefault(path, {}).setdefault(dim, use.plate)
            if before != use.plate:
                clashes[path] = (
                    f"Expected rows of one plate along each dimension of {argument_name(path)!r}; the model takes "
                    f"those of {before!r} and of {use.plate!r} along dimension {dim}. Pass the tensor twice."
                )
    return found, clashes


def require_rows_of_indices(tracker: TaintTracker, outside: Mapping[ArgumentPath, torch.Tensor]) -> None:
    """Refuse tensors from outside of a call that ``pyro.subsample`` left in their own order beside permuted indices.

    Raises:
        UnsupportedModelError: If there is one. The message names it, and what to write.
    """
    for use in tracker.by_position:
        for path, _ in _origins(tracker, outside, use.tensor, use.dim, use.taint, use.plate):
            name = argument_name(path)
            raise UnsupportedModelError(
                f"Expected rows of {name!r} that belong to the indices of plate {use.plate!r}; these are all there "
                "are, in another order, for which pyro.subsample returns the tensor as it is. Set up with the "
                f"indices in order or with fewer, or index with those of the plate ({name}[indices])."
            )


def _read_one_by_one(tracker: TaintTracker) -> list[RowUse]:
    """Return the uses of tensors of which a loop read just the rows of a batch, in their order."""
    reads: dict[Any, tuple[torch.Tensor, int, list[int]]] = {}
    for tensor, dim, index in tracker.row_reads:
        if storage_of(tensor) is not None:
            reads.setdefault((Region.of(tensor), dim), (tensor, dim, []))[2].append(index)
    return [
        RowUse(tensor, dim, plate, tracker.of_tensor(tensor)[0])
        for tensor, dim, indices in reads.values()
        for plate, chosen in tracker.plates.items()
        if indices == chosen.tolist() and indices != list(range(tensor.shape[dim]))
    ]


def _origins(
    tracker: TaintTracker,
    leaves: Mapping[ArgumentPath, torch.Tensor],
    tensor: torch.Tensor,
    dim: int,
    taint: int,
    plate: str,
) -> list[tuple[ArgumentPath, int]]:
    """Return which dimensions of which leaves a dimension of a tensor comes from."""
    storage = storage_of(tensor)
    key = None if storage is None else storage._cdata
    here = [(path, leaf) for path, leaf in leaves.items() if _lies_in(leaf, key)]
    if here:
        region = Region.of(tensor)
        exact = [(path, leaf) for path, leaf in here if Region.of(leaf) == region]
        return [(path, _same_dim(tensor, dim, leaf)) for path, leaf in (exact or _around(tensor, here))]
    if key in tracker.row_results:
        result, use = tracker.row_results[key]
        at = _same_dim(tensor, dim, result)
        return _origins(tracker, leaves, use.tensor, at, use.taint, plate)
    found = []
    size = tensor.shape[dim]
    for path, leaf in leaves.items():
        sources = [source for source in tracker.sources(taint) if _is_of(source, leaf)]
        if not sources or size < 2:
            continue
        dims = [d for d in range(-leaf.dim(), 0) if leaf.shape[d] == size]
        if leaf.shape == tensor.shape:
            dims = [dim]
        if len(dims) > 1:
            raise UnsupportedModelError(
                f"Expected to know along which dimension of {argument_name(path)!r}, of shape {tuple(leaf.shape)}, the "
                f"model takes the rows of plate {plate!r}; it takes them from a tensor of shape "
                f"{tuple(tensor.shape)} that was computed from it. Index {argument_name(path)!r} itself, x[ind], and "
                "compute afterwards."
            )
        found += [(path, d) for d in dims]
    return found


def _lies_in(leaf: torch.Tensor, key: int | None) -> bool:
    storage = storage_of(leaf)
    return storage is not None and storage._cdata == key


def _is_of(source: Any, leaf: torch.Tensor) -> bool:
    if isinstance(source, Region):
        return _lies_in(leaf, source.storage)
    return source == ("argument", id(leaf))


def _around(
    tensor: torch.Tensor, candidates: list[tuple[ArgumentPath, torch.Tensor]]
) -> list[tuple[ArgumentPath, torch.Tensor]]:
    """Return the leaf with the least extent around the start of a view (leaves may overlap)."""
    start = int(tensor.storage_offset())
    around = [
        (path, leaf)
        for path, leaf in candidates
        if int(leaf.storage_offset()) <= start <= int(leaf.storage_offset()) + _extent(leaf)
    ]
    return sorted(around or candidates, key=lambda item: _extent(item[1]))[:1]


def _extent(tensor: torch.Tensor) -> int:
    return sum(stride * (size - 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _same_dim(view: torch.Tensor, dim: int, base: torch.Tensor) -> int:
    """Return the dimension of a tensor that a dimension of a view of it runs along."""
    size, stride = view.shape[dim], view.stride(dim)
    dims = range(-base.dim(), 0)
    by_stride = [d for d in dims if base.stride(d) == stride and base.shape[d] > 1]
    exact = [d for d in by_stride if base.shape[d] == size] or by_stride
    if len(exact) == 1:
        return exact[0]
    return dim if dim in dims else dims[0]


def rows_of_run(
    model: Callable, args: tuple, kwargs: dict[str, Any], handlers: tuple[Any, ...] = ()
) -> dict[ArgumentPath, dict[int, str]]:
    """Run a model, and return of which tensors it takes the rows of which plates.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        handlers: Handlers around the run, outermost first.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x, ind):
        ...     with pyro.plate("data", len(x), subsample=ind):
        ...         pyro.sample("z", dist.Normal(x[ind, 0], 1.0))
        >>> rows_of_run(model, (torch.zeros(5, 2), torch.tensor([3, 1])), {})
        {('x',): {-2: 'data'}}
    """
    args, kwargs = with_tensors(args, kwargs)
    tracker = TaintTracker()
    leaves, outside = watch_leaves(tracker, model, args, kwargs)
    with torch.no_grad(), pyro.poutine.block(), pyro.validation_enabled(False), PlateWatch(tracker):
        traced = model
        for handler in reversed(handlers):
            traced = handler(traced)
        with watching(tracker):
            traced(*args, **kwargs)
    return rows_taken(tracker, {**outside, **leaves})[0]


def take_rows(
    name: str, value: torch.Tensor, plates: Rows, taken: Rows, states: Mapping[str, Any]
) -> torch.Tensor:
    """Return the rows of an input that one call is about.

    Args:
        name: The name of the input.
        value: Its value, as the model got it.
        plates: For its dimensions, the plates along which it varies.
        taken: For its dimensions, the plates whose rows the model takes in this call.
        states: The plates of the call, with ``size``, ``full_size`` and ``indices`` (None for all in order).

    Raises:
        UnsupportedModelError: If it cannot be known which rows are meant. The message names the input.
    """
    strange = [f"{plate!r} along dimension {dim}" for dim, plate in taken.items() if plates.get(dim) != plate]
    partial = [p for p in taken.values() if p in states and states[p].indices is not None]
    if strange and partial:
        raise UnsupportedModelError(
            f"Expected {name!r} to be used as when the guide was set up; in this call the model takes the rows of "
            f"plate {', '.join(strange)} from it. Set up the guide with a call that takes rows: guide.setup(*args)."
        )
    for dim, plate in plates.items():
        state = states.get(plate)
        if state is None or -dim > value.dim():
            continue
        size = value.shape[dim]
        if taken.get(dim) == plate:
            if state.indices is not None:
                value = value.index_select(dim, state.indices.to(value.device))
            elif size != state.size:
                value = value.narrow(dim, 0, state.size)
        elif state.indices is not None and size not in (1, state.size):
            raise UnsupportedModelError(
                f"Expected {name!r} with {state.size} entries along dimension {dim}, those of plate {plate!r} in this "
                f"call, or rows of it that the model takes by the plate's indices, x[ind] or pyro.subsample(x, "
                f"event_dim=...); it has {size}, and the model was not seen to take any."
            )
    return value


def arranged(value: torch.Tensor, places: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Return a tensor with the dimensions of plates where the plates are, and all others right of them.

    Args:
        value: The tensor.
        places: Pairs: a dimension of the tensor and that of its plate, both counted from the right. Empty where they
            are in their places already.

    Example:
        >>> arranged(torch.zeros(3, 50), ((-1, -2),)).shape
        torch.Size([50, 1, 3])
    """
    if not places:
        return value
    order = sorted(places, key=lambda pair: pair[1])
    dims = [dim + value.dim() for dim, _ in order]
    rest = [d for d in range(value.dim()) if d not in dims]
    value = value.permute(*dims, *rest)
    batch = [1] * -order[0][1]
    for (_, plate_dim), size in zip(order, value.shape, strict=False):
        batch[plate_dim] = size
    return value.reshape(*batch, *value.shape[len(dims) :])
