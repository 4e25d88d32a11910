"""The tensors that a model uses: where they are, how to find them on a later call, what they mean.

A *leaf* is a tensor reached from the arguments through tuples, lists, mappings, the fields of objects (dataclasses,
named tuples, objects like the data of PyTorch Geometric) and what functions among them hold (``functools.partial``,
closures, defaults, bound methods). Its *path* is the name of the parameter followed by the
keys, e.g. ``("batch", 0)``, named ``"batch[0]"``, or ``("batch", Attribute("w"))``, named ``"batch.w"``. Values given
by position and by keyword have the same path. NumPy arrays count as leaves where the model takes tensors in their
place (:func:`with_tensors`). What a model uses without being given it, in a closure, in a global variable, as a
field of itself or of a module, has a path too (:func:`outside_tensors`); it is a constant unless a plate's rows are
taken from it.
"""

import copy
import dataclasses
import difflib
import functools
import inspect
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect.tracer import Region, in_library, storage_of

__all__ = [
    "ArgumentPath",
    "Attribute",
    "LoopRow",
    "Outside",
    "argument_leaves",
    "argument_name",
    "code_of",
    "fields_of",
    "get_argument",
    "get_arguments",
    "held_by_function",
    "is_outside",
    "outside_tensors",
    "require_arguments",
    "require_rereadable",
    "same_tensor",
    "with_hints",
    "with_tensors",
]

P = ParamSpec("P")
R = TypeVar("R")

ArgumentPath = tuple[Hashable, ...]
"""Name of a parameter of the model (or an :class:`Outside`), then keys: into nested tuples, lists, mappings and
objects (:class:`Attribute`), and last, for an observed site that is a row or a column of a tensor, into the tensor
(``t`` or ``(..., j)``)."""

MOST_DEPTH = 20  # of fields within fields
MOST_ITEMS = 1000  # of a container outside of the arguments, a vocabulary may be one
MOST_OUTSIDE = 3  # of functions that call functions, where tensors outside of the arguments are looked for
# Values without fields of interest.
_WHOLE = (
    *(torch.Tensor, torch.nn.Module, torch.Generator, torch.dtype, torch.device),
    *(np.ndarray, np.generic, types.NoneType, types.ModuleType, Iterator),
    *(bool, int, float, complex, str, bytes, Set, range, slice),
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial),
)
_CALL = "__call__"
_OF_MODULES = frozenset(vars(torch.nn.Module()))
TABLES = ("pandas", "polars", "pyarrow", "xarray")


@dataclass(frozen=True)
class Attribute:
    """A key of a path: the field of an object."""

    name: str


@dataclass(frozen=True)
class Outside:
    """A key of a path: a variable that a function or a callable object uses without being given it."""

    name: str


@dataclass(frozen=True)
class LoopRow:
    """A key of a path: the row, or the column, that one iteration of a subsampled plate is about."""

    plate: str
    position: int
    column: bool = False

    def of(self, value: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return that row, given the indices of the plate."""
        return value[..., int(indices[self.position])] if self.column else value[int(indices[self.position])]


def signature_of(model: Callable) -> inspect.Signature:
    """Return the signature with which a model is called; that of ``forward`` for modules."""
    inner = inspect.unwrap(model)  # poutine.condition(module, ...) and the like
    called = inner.forward if isinstance(inner, torch.nn.Module) else model
    if not (inspect.isfunction(called) or inspect.ismethod(called)):
        return _signature(called)
    # methods are made anew at each look-up, functions stay: signatures are kept as long as these
    function = called.__func__ if inspect.ismethod(called) else called
    known = _KNOWN_SIGNATURES.setdefault(function, {})
    is_bound = function is not called
    if is_bound not in known:
        known[is_bound] = _signature(called)
    return known[is_bound]


_KNOWN_SIGNATURES: WeakKeyDictionary[Any, dict[bool, inspect.Signature]] = WeakKeyDictionary()


def _signature(called: Callable) -> inspect.Signature:
    try:
        return inspect.signature(called)
    except (TypeError, ValueError):
        return inspect.signature(lambda *args, **kwargs: None)


def _bind(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], *, defaults: bool = False
) -> dict[str, Any]:
    """Return the arguments by parameter name; keywords collected by ``**kwargs`` under their own names.

    With ``defaults``, the default values of arguments that are not given are there as well.
    """
    signature = signature_of(model)
    bound = signature.bind(*args, **kwargs)
    if defaults:
        bound.apply_defaults()
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
        arguments = _bind(model, args, kwargs or {}, defaults=True)
    except TypeError:
        return dict.fromkeys(paths)
    return {
        key: _follow(model if isinstance(path[0], Outside) else arguments, path)
        for key, path in paths.items()
    }


def raw_argument(model: Callable, path: ArgumentPath, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Find an argument as it was given: an array stays one."""
    return _followed(_bind(model, args, kwargs), path)


def _follow(value: Any, path: ArgumentPath) -> Any:
    value = _followed(value, path)
    if _is_numeric_array(value):
        return _array_as_tensor(value)
    is_sparse = isinstance(value, torch.Tensor) and value.layout is not torch.strided
    return value.to_dense() if is_sparse else value


def _followed(value: Any, path: ArgumentPath) -> Any:
    try:
        for key in path:
            if isinstance(key, Attribute):
                value = getattr(value, key.name)
            elif isinstance(key, Outside):
                value = _outside_of(value)[key.name]
            else:
                value = value[key]
    except (AttributeError, KeyError, IndexError, TypeError):
        return None
    return value


def _is_numeric_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"


def _array_as_tensor(array: np.ndarray) -> torch.Tensor:
    tensor = torch.as_tensor(array if array.flags.writeable else array.copy())
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def is_outside(path: ArgumentPath) -> bool:
    """Whether a path leads to what a model has from outside of its calls, and not to an argument or into one.

    Example:
        >>> is_outside((Outside("self"), Attribute("x"))), is_outside(("batch", 0)), is_outside(("net", Outside("x")))
        (True, False, False)
    """
    return isinstance(path[0], Outside)


def argument_name(path: ArgumentPath) -> str:
    """Write a path as the user would: ``("batch", 0, "y")`` is ``"batch[0]['y']"``.

    Example:
        >>> argument_name(("batch", 0, "y")), argument_name((Outside("self"), Attribute("x")))
        ("batch[0]['y']", 'self.x')
    """
    first, *rest = (key.name if isinstance(key, Outside) else key for key in path)
    written = str(first)
    for original, key in zip(path[1:], rest, strict=True):
        if isinstance(original, LoopRow):
            written += f"[{original.plate} {original.position}]"
        elif isinstance(original, Attribute | Outside):
            written += f".{original.name}"
        else:
            written += f"[{key!r}]"
    return written


def _is_list_of_numbers(value: Any) -> bool:
    """Whether a list holds numbers with fractions, as data of a column may."""
    return (
        isinstance(value, tuple | list)
        and len(value) > 1
        and not hasattr(value, "_fields")
        and all(isinstance(item, float | int) for item in value)
        and any(isinstance(item, float) for item in value)
    )


def _is_table(value: Any) -> bool:
    return type(value).__module__.split(".")[0] in TABLES


def fields_of(value: Any) -> list[tuple[Hashable, Any]] | None:
    """Return keys and values inside a container or an object; None for what is not followed."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(Attribute(name), getattr(value, name)) for name in value._fields]
    if isinstance(value, tuple | list | deque):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, _WHOLE) or _is_table(value):
        return None
    keys = getattr(value, "keys", None)
    if keys is not None and hasattr(type(value), "__getitem__"):  # like a mapping
        names = list(keys() if callable(keys) else keys)
        return [(name, value[name]) for name in names]
    if dataclasses.is_dataclass(value):
        return [
            (Attribute(f.name), getattr(value, f.name))
            for f in dataclasses.fields(value)
            if hasattr(value, f.name)
        ]
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    held.update(getattr(value, "__dict__", {}))
    return [(Attribute(name), item) for name, item in held.items()]


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def held_by_function(value: Any) -> list[tuple[Hashable, Any]] | None:
    """Return what a function of the user's among the arguments was made with; None for other values."""
    kinds = types.FunctionType, types.MethodType, functools.partial
    if not isinstance(value, kinds) or not _is_users(value):
        return None
    return [(Outside(name), item) for name, item in _outside_of(value, of_globals=False).items()]


def _walk(
    path: ArgumentPath,
    value: Any,
    inside: tuple[int, ...] = (),
    *,
    most: int | None = None,
    whole: Collection[int] = (),
    functions: bool = False,
) -> Iterator[tuple[ArgumentPath, Any]]:
    """Yield what is inside of a value, by path.

    Containers of more than ``most`` items, lists of numbers and what has an ``id`` among ``whole`` are left whole, and
    so are functions if these are not asked for.
    """
    large = most is not None and isinstance(value, tuple | list | Mapping) and len(value) > most
    is_whole = large or len(inside) > MOST_DEPTH or id(value) in inside or id(value) in whole
    fields = held_by_function(value) if functions and not is_whole else None
    if fields is not None:
        most = MOST_ITEMS
    elif not (is_whole or _is_list_of_numbers(value)):
        fields = fields_of(value)
    if fields is None:
        yield path, value
        return
    for key, item in fields:
        yield from _walk(
            (*path, key), item, (*inside, id(value)), most=most, whole=whole, functions=functions
        )


def replaced_arguments(
    args: tuple, kwargs: dict[str, Any], replaced: Mapping[int, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Return copies of arguments with other values in place of some, found by their ``id``.

    Containers, objects and functions that hold what is replaced are copied; tensors, arrays and modules never are.
    """
    return _replaced(args, replaced), _replaced(kwargs, replaced)


def _replaced(value: Any, replaced: Mapping[int, Any], inside: tuple[int, ...] = ()) -> Any:
    if id(value) in replaced:
        return replaced[id(value)]
    leaves = [leaf for _, leaf in _walk((), value, whole=replaced, functions=True)]
    if id(value) in inside or not any(id(leaf) in replaced for leaf in leaves):
        return value

    def other(item: Any) -> Any:
        return _replaced(item, replaced, (*inside, id(value)))

    if type(value) in (tuple, list):
        return type(value)(map(other, value))
    if type(value) is dict:
        return {key: other(item) for key, item in value.items()}
    if isinstance(value, functools.partial):
        return functools.partial(other(value.func), *map(other, value.args), **other(value.keywords))
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, other(value.__self__))
    if isinstance(value, types.FunctionType):
        return _function_with(value, other)
    # Objects copy themselves as they know how; what is in the memo counts as copied.
    return copy.deepcopy(value, {id(leaf): replaced.get(id(leaf), leaf) for leaf in leaves})


def _function_with(function: types.FunctionType, other: Callable[[Any], Any]) -> types.FunctionType:
    """Return a function that holds other values in its closure and as its defaults."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(types.CellType(other(cell.cell_contents)))
        except ValueError:  # not bound yet
            cells.append(cell)
    defaults, closure = other(function.__defaults__), tuple(cells) or None
    new = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
    new.__kwdefaults__ = other(function.__kwdefaults__)
    vars(new).update({key: item for key, item in vars(function).items() if key != "__wrapped__"})
    return new


def with_tensors(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return arguments with tensors in place of their NumPy arrays of numbers.

    Example:
        >>> with_tensors((np.ones(2), 3), {})
        ((tensor([1., 1.]...), 3), {})
    """
    arrays = {
        id(value): _array_as_tensor(value)
        for _, value in _walk((), (args, kwargs), functions=True)
        if _is_numeric_array(value)
    }
    return replaced_arguments(args, kwargs, arrays) if arrays else (args, kwargs)


# ---------------------------------------------------------------- what a model uses without being given it


def _outside_of(function: Any, *, of_globals: bool = True) -> dict[str, Any]:
    """Return the variables that a function or a callable object uses beside its arguments, by name."""
    inner = inspect.unwrap(function) if callable(function) else function
    found: dict[str, Any] = {}
    while isinstance(inner, functools.partial):
        found.update({f"argument {i}": item for i, item in enumerate(inner.args)})
        found.update(inner.keywords)
        inner = inner.func
    owner = getattr(inner, "__self__", None)
    if owner is None and not inspect.isroutine(inner) and not isinstance(inner, type):
        owner = inner
        inner = getattr(type(inner), "forward" if isinstance(inner, torch.nn.Module) else _CALL, None)
    if owner is not None and not isinstance(owner, types.ModuleType | type):
        found["self"] = owner
    inner = getattr(inner, "__func__", inner)
    code = getattr(inner, "__code__", None)
    if code is None:
        return found
    for name, cell in zip(code.co_freevars, inner.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not bound yet
            continue
    for name, value in _defaults_of(inner).items():
        found.setdefault(name, value)
    for name in _names_in(code) if of_globals else ():
        if name in inner.__globals__:
            found.setdefault(name, inner.__globals__[name])
    return found


def _defaults_of(function: Any) -> dict[str, Any]:
    """Return the default values of a function's parameters, by name."""
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    return {**dict(zip(names, defaults, strict=True)), **(function.__kwdefaults__ or {})}


def _names_in(code: types.CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names_in(constant)
    return names


def outside_tensors(
    model: Callable, args: tuple = (), kwargs: Mapping[str, Any] | None = None
) -> dict[ArgumentPath, torch.Tensor]:
    """List the tensors that a model uses without being given them, by path; parameters are left out.

    They are looked for in closures, default values, global variables, fields of the model itself, buffers and fields
    of modules, those among the arguments too, and in functions of the user's that the model calls.

    Args:
        model: The model.
        args: The positional arguments of a call.
        kwargs: Its keyword arguments.

    Example:
        >>> w = torch.ones(3)
        >>> def model(x, v=torch.ones(2)): return x * w
        >>> list(outside_tensors(model))
        [('v',), (Outside(name='w'),)]
    """
    found: dict[ArgumentPath, torch.Tensor] = {}
    seen: set[int] = set()

    def visit(path: ArgumentPath, value: Any, depth: int) -> None:
        for key, item in _walk(path, value, most=MOST_ITEMS):
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, torch.nn.Parameter):
                continue
            if isinstance(item, torch.Tensor):
                if item.dim() and item.numel():
                    found[key] = item
            elif isinstance(item, torch.nn.Module):
                for field, held in _held_by(item):
                    visit((*key, *field), held, depth)
            elif depth < MOST_OUTSIDE and _is_users(item):
                look(key, item, depth + 1)

    def look(path: ArgumentPath, function: Any, depth: int) -> None:
        parameters = {} if path else signature_of(model).parameters
        for name, value in _outside_of(function).items():
            if name in parameters and parameters[name].default is value:
                visit((name,), value, depth)  # where the argument is in calls that give it
            elif name == "self" and callable(value) and not isinstance(value, torch.nn.Module):
                for field, item in vars(value).items() if hasattr(value, "__dict__") else ():
                    visit((*path, Outside("self"), Attribute(field)), item, depth)
            else:
                visit((*path, Outside(name)), value, depth)

    look((), model, 0)
    for name, argument in _bind(model, args, kwargs or {}).items() if args or kwargs else ():
        for path, item in _walk((name,), argument, functions=True):
            if isinstance(item, torch.nn.Module):
                visit(path, item, MOST_OUTSIDE)
    return found


def _held_by(module: torch.nn.Module) -> list[tuple[tuple[Attribute, ...], Any]]:
    """Return the buffers of a module and of those inside, and what is in plain fields of them."""
    found: list[tuple[tuple[Attribute, ...], Any]] = [
        (tuple(map(Attribute, name.split("."))), buffer) for name, buffer in module.named_buffers()
    ]
    for name, inner in module.named_modules():
        path = tuple(map(Attribute, name.split("."))) if name else ()
        if in_library(
            os.path.abspath(getattr(sys.modules.get(type(inner).__module__), "__file__", None) or "")
        ):
            continue
        for field, value in vars(inner).items():
            if field not in _OF_MODULES and not field.startswith("_pyro"):
                found.append(((*path, Attribute(field)), value))
    return found


def _is_users(value: Any) -> bool:
    """Whether something is a function of the user's."""
    if isinstance(inspect.unwrap(value) if callable(value) else value, functools.partial):
        return True
    code = code_of(value)
    return code is not None and not in_library(os.path.abspath(code.co_filename))


def code_of(value: Any) -> types.CodeType | None:
    """Return the code of a function, a method or a partial function; None if it is none that Python ran."""
    inner = inspect.unwrap(value) if callable(value) else value
    while isinstance(inner, functools.partial):
        inner = inner.func
    code: types.CodeType | None = getattr(getattr(inner, "__func__", inner), "__code__", None)
    return code


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
    arguments = require_arguments(model, args, kwargs or {})
    leaves: dict[ArgumentPath, torch.Tensor] = {}
    seen = set()
    for name, argument in arguments.items():
        for path, value in _walk((name,), argument, functions=True):
            if (
                isinstance(value, torch.Tensor)
                and not isinstance(value, torch.nn.Parameter)
                and value.numel() > 0
                and id(value) not in seen
            ):
                seen.add(id(value))
                leaves[path] = value
    return leaves


def require_arguments(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], beside: str | None = None
) -> dict[str, Any]:
    """Return the arguments of a call by name; refuse those that do not fit the model.

    Args:
        model: The model, for its signature.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
        beside: What else the caller takes, to be said in the message.

    Raises:
        UnsupportedModelError: If the model cannot be called with these arguments.
    """
    try:
        return _bind(model, args, kwargs)
    except TypeError as error:
        more = "" if beside is None else f" Beside the model's arguments {beside}."
        raise UnsupportedModelError(
            f"Expected arguments that fit the model's signature {signature_of(model)}: {error}.{more}"
        ) from error


def with_hints(elsewhere: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Say more than Python does of keyword arguments that a function has not: what is like them, and what is meant.

    Args:
        elsewhere: Where else what is asked for may be set.

    Returns:
        A decorator; what it returns raises ``TypeError`` for keyword arguments that the function has not.

    Example:
        >>> @with_hints("Colours are of plots.")
        ... def draw(size=1): ...
        >>> draw(siz=2)
        Traceback (most recent call last):
        ...
        TypeError: draw() got an unexpected keyword argument 'siz'; did you mean 'size'? Colours are of plots.
    """

    def decorator(function: Callable[P, R]) -> Callable[P, R]:
        known = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in known:
                    near = difflib.get_close_matches(name, known, 1)
                    meant = f"; did you mean {near[0]!r}?" if near else "."
                    raise TypeError(
                        f"{function.__name__}() got an unexpected keyword argument {name!r}{meant} {elsewhere}"
                    )
            return function(*args, **kwargs)

        return call

    return decorator


def not_followed(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[ArgumentPath, str]:
    """List arguments that may hold covariates and cannot be followed: what they are, and what to write instead."""
    found: dict[ArgumentPath, str] = {}
    for name, argument in _bind(model, args, kwargs).items():
        for path, value in _walk((name,), argument, functions=True):
            written = argument_name(path)
            if isinstance(value, np.ndarray) and value.dtype.names:
                found[path] = (
                    f"argument '{written}' is a structured NumPy array, which is not followed; if it holds covariates, "
                    f"pass {{name: torch.tensor({written}[name]) for name in {written}.dtype.names}}"
                )
            elif isinstance(value, np.ndarray):
                found[path] = (
                    f"argument '{written}' is a NumPy array, which is not followed; pass torch.as_tensor({written}), "
                    "or use torch.as_tensor in the model, if it is a covariate"
                )
            elif _is_list_of_numbers(value):
                found[path] = (
                    f"argument '{written}' is a list of numbers, which is not followed; pass torch.tensor({written}) "
                    "if it is a covariate"
                )
            elif isinstance(value, Set) and any(isinstance(i, torch.Tensor | np.ndarray) for i in value):
                found[path] = (
                    f"argument '{written}' is a {type(value).__name__} of tensors, which has no order and is not "
                    "followed; pass a list or a dict of them"
                )
            elif _is_table(value):
                kind = f"{type(value).__module__.split('.')[0]}.{type(value).__name__}"
                column = f"torch.tensor({written}.to_numpy())"
                columns = f"{{name: torch.tensor({written}[name].to_numpy()) for name in {written}}}"
                found[path] = (
                    f"argument '{written}' is a {kind}, which is not followed; if it holds covariates, pass "
                    f"{columns if hasattr(value, 'columns') else column}"
                )
    return found


def require_rereadable(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse iterators among the arguments: a guide runs the model more than once, and they are then at their end.

    Raises:
        UnsupportedModelError: If there is one. The message names it.
    """
    for name, argument in _bind(model, args, kwargs).items():
        for path, value in _walk((name,), argument, functions=True):
            if isinstance(value, Iterator):
                written = argument_name(path)
                raise UnsupportedModelError(
                    f"Expected arguments that can be read more than once; argument '{written}' is an iterator "
                    f"({type(value).__name__}), which is at its end after one run of the model. Pass list({written})."
                )


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
