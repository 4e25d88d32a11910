"""The tensors among a model's arguments: where they are, how to find them on a later call, what they mean.

A *leaf* is a tensor reached from the arguments through tuples, lists and dictionaries. Its *path* is the name
of the parameter followed by the keys, e.g. ``("batch", 0)``; it is named ``"batch[0]"``. Values given by
position and by keyword have the same path.
"""

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect.tracer import Region, storage_of

__all__ = ["ArgumentPath", "argument_leaves", "argument_name", "get_argument", "get_arguments", "same_tensor"]

ArgumentPath = tuple[Hashable, ...]
"""Name of a parameter of the model, then keys: into nested tuples, lists and dictionaries, and last, for an
observed site that is a row or a column of a tensor, into the tensor (``t`` or ``(..., j)``)."""


def signature_of(model: Callable) -> inspect.Signature:
    """Return the signature with which a model is called; that of ``forward`` for modules."""
    inner = inspect.unwrap(model)  # poutine.condition(module, ...) and the like
    try:
        return inspect.signature(inner.forward if isinstance(inner, torch.nn.Module) else model)
    except (TypeError, ValueError):
        return inspect.signature(lambda *args, **kwargs: None)


def _bind(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by parameter name; keywords collected by ``**kwargs`` under their own names."""
    signature = signature_of(model)
    bound = signature.bind(*args, **kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    return arguments


def get_argument(
    model: Callable, path: ArgumentPath, args: tuple = (), kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Find an argument of a call to a model.

    Args:
        model: The model, for its signature.
        path: Name of a parameter, then keys into nested containers.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.

    Returns:
        The value, or None where the call has none there.

    Example:
        >>> def model(x, batch=None): ...
        >>> get_argument(model, ("batch", "y", 1), (3,), {"batch": {"y": [4, 5]}})
        5
    """
    return get_arguments(model, {None: path}, args, kwargs)[None]


def get_arguments(
    model: Callable,
    paths: Mapping[Any, ArgumentPath],
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
) -> dict[Any, Any]:
    """Find several arguments of a call to a model: :func:`get_argument` for each path, by the same keys.

    Example:
        >>> def model(x, y): ...
        >>> get_arguments(model, {"a": ("x",), "b": ("y", 0)}, (3, [4]))
        {'a': 3, 'b': 4}
    """
    try:
        arguments = _bind(model, args, kwargs or {})
    except TypeError:
        return dict.fromkeys(paths)
    return {key: _follow(arguments, path) for key, path in paths.items()}


def _follow(value: Any, path: ArgumentPath) -> Any:
    try:
        for key in path:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        return None
    return value


def argument_name(path: ArgumentPath) -> str:
    """Write a path as the user would: ``("batch", 0, "y")`` is ``"batch[0]['y']"``."""
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])


def _walk(path: ArgumentPath, value: Any) -> Iterator[tuple[ArgumentPath, Any]]:
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _walk((*path, i), item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk((*path, key), item)
    else:
        yield path, value


def argument_leaves(
    model: Callable, args: tuple = (), kwargs: Mapping[str, Any] | None = None
) -> dict[ArgumentPath, torch.Tensor]:
    """List the tensors among the arguments of a call, by path.

    Parameters (:class:`torch.nn.Parameter`) belong to the model, not to the data, and are left out; so are
    tensors without elements.

    Args:
        model: The model, for its signature.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.

    Returns:
        The tensors by path. One tensor given twice is listed once.

    Raises:
        UnsupportedModelError: If the model cannot be called with these arguments.

    Example:
        >>> def model(x, w=None): ...
        >>> list(argument_leaves(model, ([torch.zeros(2), 3.0],), {"w": torch.ones(1)}))
        [('x', 0), ('w',)]
    """
    try:
        arguments = _bind(model, args, kwargs or {})
    except TypeError as error:
        raise UnsupportedModelError(
            f"Expected arguments that fit the model's signature {signature_of(model)}; got {error}."
        ) from error
    leaves: dict[ArgumentPath, torch.Tensor] = {}
    seen = set()
    for name, argument in arguments.items():
        for path, value in _walk((name,), argument):
            if (
                isinstance(value, torch.Tensor)
                and not isinstance(value, torch.nn.Parameter)
                and value.numel() > 0
                and id(value) not in seen
            ):
                seen.add(id(value))
                leaves[path] = value
    return leaves


def not_followed(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> list[str]:
    """List arguments that may hold covariates and cannot be followed, each with a remedy."""
    notes = []
    for name, argument in _bind(model, args, kwargs).items():
        for path, value in _walk((name,), argument):
            if isinstance(value, np.ndarray):
                what = "is a NumPy array"
            elif not isinstance(value, torch.nn.Module | torch.Tensor) and any(
                isinstance(held, torch.Tensor) for held in getattr(value, "__dict__", {}).values()
            ):
                what = f"holds tensors inside a {type(value).__name__}"
            else:
                continue
            notes.append(
                f"argument '{argument_name(path)}' {what}, which is not followed; pass tensors (or tuples, lists "
                "and dictionaries of them) if they are covariates"
            )
    return notes


@lru_cache(maxsize=4096)
def _offsets(region: Region) -> np.ndarray:
    """Return the offsets of the elements of a region within its storage, sorted."""
    positions = np.array([region.offset])
    for size, stride in zip(region.size, region.stride, strict=True):
        if stride:
            positions = (positions[:, None] + stride * np.arange(size)).reshape(-1)
    return np.unique(positions)


def part_of(leaf: torch.Tensor, region: Region) -> Hashable | None:
    """Return the key that takes a region out of a tensor: a row ``t``, or a column ``(..., j)``.

    Args:
        leaf: A tensor.
        region: A region of its storage.

    Returns:
        ``key`` such that ``leaf[key]`` is the region; None if it is no row or column.

    Example:
        >>> x = torch.zeros(5, 3)
        >>> part_of(x, Region.of(x[:, 2])), part_of(x, Region.of(x[4])), part_of(x, Region.of(x[:, :2]))
        ((Ellipsis, 2), 4, None)
    """
    whole = Region.of(leaf)
    if whole.storage != region.storage or not whole.size:
        return None
    for dim, rest in ((0, slice(1, None)), (-1, slice(None, -1))):
        if (whole.size[rest], whole.stride[rest]) != (region.size, region.stride) or not whole.stride[dim]:
            continue
        index, remainder = divmod(region.offset - whole.offset, whole.stride[dim])
        if remainder == 0 and 0 <= index < whole.size[dim]:
            return index if dim == 0 else (Ellipsis, index)
    return None


def same_tensor(one: Any, other: Any) -> bool:
    """Whether two tensors are one object, or views of the same memory with the same geometry.

    Example:
        >>> x = torch.zeros(5, 3)
        >>> same_tensor(x[:, 2], x[..., 2]), same_tensor(x[:, 2], x[:, 1]), same_tensor(None, x)
        (True, False, False)
    """
    if one is other:
        return True
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    if storage_of(one) is None or storage_of(other) is None or one.dtype != other.dtype:
        return False
    return Region.of(one) == Region.of(other)


def covering(region: Region, candidates: Iterable[tuple[Hashable, Region]]) -> list[Any]:
    """Find which named regions hold the elements of a region.

    Args:
        region: The region in question.
        candidates: Named regions.

    Returns:
        The names of equal regions if there are any; else of all that overlap, if together they cover the
        region; else nothing.

    Example:
        >>> row = Region(7, 0, (2,), (1,))
        >>> covering(row, [("x[0]", Region(7, 0, (1,), (1,))), ("x[1]", Region(7, 1, (1,), (1,)))])
        ['x[0]', 'x[1]']
    """
    candidates = [(name, other) for name, other in candidates if other.storage == region.storage]
    equal = [name for name, other in candidates if other == region]
    if equal or not candidates:
        return equal
    wanted = _offsets(region)
    missing = np.ones(len(wanted), dtype=bool)
    found = []
    for name, other in candidates:
        inside = np.isin(wanted, _offsets(other), assume_unique=True)
        if inside.any():
            found.append(name)
            missing &= ~inside
    return [] if missing.any() else found


@dataclass(frozen=True)
class Alignment:
    """How the dimensions of an argument relate to plates: ``plates`` outer to inner, then ``event_dim``."""

    plates: tuple[str, ...]
    event_dim: int
    event_size: int


def alignment_of(shape: torch.Size, plates: Mapping[int, tuple[str, set[int]]]) -> Alignment:
    """Match the shape of an argument against the plates of a site that uses it.

    The rightmost ``event_dim`` dimensions belong to one datum; those left of them are matched, from the
    right, with the plates' dimensions -1, -2, ... A dimension matches if it has the plate's size (or
    subsample size), and is broadcast if it has size one. Among the event dims for which everything matches,
    the one with most plates is chosen, then the smallest. Where nothing matches, the whole tensor is one event
    shared by the plates.

    Args:
        shape: The shape of the argument.
        plates: For each plate's dimension (negative), its name and the sizes that it may have.

    Returns:
        The alignment.

    Example:
        >>> alignment_of(torch.Size([10, 3]), {-1: ("data", {10})})
        Alignment(plates=('data',), event_dim=1, event_size=3)
    """
    best = Alignment((), len(shape), shape.numel())
    for event_dim in range(len(shape), -1, -1):
        batch = shape[: len(shape) - event_dim]
        matched = []
        for dim in range(-len(batch), 0):
            if batch[dim] == 1 and not (dim in plates and 1 in plates[dim][1]):
                continue
            if dim not in plates or batch[dim] not in plates[dim][1]:
                break
            matched.append(plates[dim][0])
        else:
            size = shape[len(shape) - event_dim :].numel()
            if len(matched) > len(best.plates) or (matched and len(matched) == len(best.plates)):
                best = Alignment(tuple(matched), event_dim, size)
    return best
