"""Which random variables a tensor depends on: the book-keeping, what lets taints flow, and what notes them at sites.

A *taint* is a set of sources (sample sites, and regions of the tensors given as arguments), kept as the bits
of a Python integer. Most taints belong to a storage, so that they are seen through every view of it; some
belong to one tensor object (``table[k]`` is a view of ``table``, but only this view depends on ``k``).

A tainted tensor that turns into something else than a tensor (``float(z)``, ``if z > 0``, ``z.numpy()``)
cannot be followed: that is an *escape*, and it is recorded with its place in the user's code.

Two interceptors watch the operations; each sees what the other misses.

- The function mode sees each call of the Python interface. Results are tainted by all arguments, per tensor
  object: this follows values through calls that copy behind the dispatcher (``torch.tensor(z)``), through
  indices (``table[k]``), sparse tensors and the wrappers of ``torch.func``.
- The dispatch mode, below it, sees each operator. It taints storages, so that a write in place is seen
  through every view, however it came about (``out=``, scripted functions, ``vmap``, custom autograd).

Compiled functions (``torch.compile``) run uncompiled while a dispatch mode is on. Neither mode sees
operations in other threads, nor code that gets at memory without asking the tensor
(``torch.utils.dlpack.to_dlpack``); comparing with the model's behaviour (``validate=True``) finds what passes
there.

A recorder, a messenger of Pyro, starts the taint of each sample site, and notes what reaches its distribution.
"""

import linecache
import os
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect.runs import (
    is_outside,
    is_transparent,
    stand_in,
    subsampled_loops,
    support_of,
    undressed,
    vectorized_plates,
)

__all__ = [
    "Escape",
    "Known",
    "Noise",
    "PlateRows",
    "PlateWatch",
    "Recorder",
    "Region",
    "RowUse",
    "SiteRecord",
    "TaintTracker",
    "in_library",
    "storage_of",
    "watched",
    "watching",
]

_HERE, _TORCH, _PYRO = (
    os.path.dirname(os.path.abspath(str(path))) + os.sep for path in (__file__, torch.__file__, pyro.__file__)
)
_LIBRARIES = (_HERE, _TORCH, _PYRO)
_STANDARD = os.path.dirname(os.path.abspath(str(linecache.__file__))) + os.sep
_DISTRIBUTIONS = (_TORCH + "distributions" + os.sep, _PYRO + "distributions" + os.sep)


class Region(NamedTuple):
    """A view of a tensor given as an argument: the storage's address and the view's geometry."""

    storage: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> "Region":
        """Describe a strided tensor."""
        return Region(
            tensor.untyped_storage()._cdata,
            int(tensor.storage_offset()),
            tuple(tensor.size()),
            tuple(tensor.stride()),
        )


class PlateRows(NamedTuple):
    """The indices of a plate, as a source: which rows of the data are in it."""

    plate: str


class RowUse(NamedTuple):
    """Entries of a tensor taken along a dimension (counted from the right) by the indices of a plate."""

    tensor: torch.Tensor
    dim: int
    plate: str
    taint: int


class Noise(NamedTuple):
    """A place in the user's code that draws random numbers outside of ``pyro.sample``."""

    filename: str
    line: int
    code: str


Known = tuple[int, int, int | None]


class Escape(NamedTuple):
    """A tainted tensor that became something else than a tensor.

    ``taint`` holds the sources, ``moment`` says how many sites had been sampled by then.
    """

    taint: int
    operation: str
    moment: int
    filename: str
    line: int
    code: str


def _place() -> tuple[str, int, str]:
    """Return file, line and source text of the innermost frame outside the libraries and this package."""
    frame = sys._getframe(2)
    while frame.f_back is not None and in_library(os.path.abspath(frame.f_code.co_filename)):
        frame = frame.f_back
    filename, line = frame.f_code.co_filename, frame.f_lineno
    return filename, line, linecache.getline(filename, line).strip()


def in_library(path: str) -> bool:
    """Whether a file belongs to this package, PyTorch, Pyro or the standard library."""
    return path.startswith(_LIBRARIES) or (path.startswith(_STANDARD) and "site-packages" not in path)


def _is_validation() -> bool:
    """Whether a distribution checks its parameters: they stay tensors, and reach the log-density as such."""
    frame = sys._getframe(2)
    while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(
        (_HERE, _TORCH + "_", _TORCH + "overrides")
    ):
        frame = frame.f_back
    return frame.f_code.co_name == "__init__" and os.path.abspath(frame.f_code.co_filename).startswith(
        _DISTRIBUTIONS
    )


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Return the storage of a tensor, or None where it has none (sparse tensors, wrappers of torch.func)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


class TaintTracker:
    """Knows the taints of tensors, and what escaped.

    Example:
        >>> tracker = TaintTracker()
        >>> z = torch.zeros(3)
        >>> tracker.set(z, tracker.bit("z"))
        >>> tracker.sources(tracker.of([torch.ones(1), z[1:]]))
        ['z']
    """

    def __init__(self) -> None:
        self._bits: dict[Hashable, int] = {}
        self._sources: list[Hashable] = []
        self._by_storage: dict[int, tuple[StorageWeakRef, int]] = {}
        # Taints that concern one tensor object but not its whole storage; the tensor is kept alive with its
        # id.
        self._by_object: dict[int, tuple[torch.Tensor, int]] = {}
        self._arguments: dict[int, torch.UntypedStorage] = {}
        self._absorbing: list[int] = []
        self.escapes: list[Escape] = []
        self.moment = 0
        self.paused = False
        self.sized: dict[int, tuple[torch.Tensor, int]] = {}  # tensors whose size depends on values
        self.size_inside = 0  # taints of sizes made inside the present call
        self.depth = 0  # of calls that the function mode has under way
        self.hidden = 0  # taints of scalars read inside the present call
        self.plates: dict[str, torch.Tensor] = {}  # the indices of plates
        self.row_uses: list[RowUse] = []
        self.by_position: list[RowUse] = []  # all rows in their own order, beside indices in another
        self.row_reads: list[
            tuple[torch.Tensor, int, int]
        ] = []  # single entries read: tensor, dimension, index
        self.row_results: dict[int, tuple[torch.Tensor, RowUse]] = {}  # by storage: what such a use gave
        self.selections: dict[tuple[int, int], None] = {}  # taints of values, and of what chose among them
        self._outside: set[int] = set()

    def bit(self, source: Hashable) -> int:
        """Return the taint that consists of one source."""
        bit = self._bits.get(source)
        if bit is None:
            bit = self._bits[source] = 1 << len(self._sources)
            self._sources.append(source)
        return bit

    def sources(self, taint: int) -> list[Any]:
        """List the sources in a taint, in the order in which they appeared."""
        found = []
        while taint:
            lowest = taint & -taint
            found.append(self._sources[lowest.bit_length() - 1])
            taint ^= lowest
        return found

    def set(self, tensor: torch.Tensor, taint: int) -> None:
        """Give the storage of a tensor this taint and no other."""
        self._by_object.pop(id(tensor), None)
        storage = storage_of(tensor)
        if storage is None:
            self._by_object[id(tensor)] = (tensor, taint)
        elif taint:
            self._by_storage[storage._cdata] = (StorageWeakRef(storage), taint)
        else:
            self._by_storage.pop(storage._cdata, None)

    def watch_argument(self, leaf: torch.Tensor) -> None:
        """Taint a tensor by the region of itself that is read: views of it stay apart."""
        storage = storage_of(leaf)
        if storage is None:
            self.set(leaf, self.bit(("argument", id(leaf))))
        else:
            self._arguments[storage._cdata] = storage

    def watch_outside(self, leaf: torch.Tensor) -> None:
        """Do the same for a tensor that the model uses without being given it: a constant, as long as nothing else."""
        storage = storage_of(leaf)
        if storage is not None and storage._cdata not in self._arguments:
            self._arguments[storage._cdata] = storage
            self._outside.add(storage._cdata)

    def is_outside(self, source: Any) -> bool:
        """Whether a source is a region of such a tensor."""
        return isinstance(source, Region) and source.storage in self._outside

    def watch_plate(self, name: str, indices: Any) -> None:
        """From here on, see which tensors are indexed by the indices of a plate."""
        with self.pause():
            indices = torch.as_tensor(indices)
            if indices.dim() == 1:
                self.plates[name] = indices
                self.add(indices, self.bit(PlateRows(name)))

    def is_argument(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of an argument."""
        storage = storage_of(tensor)
        key = None if storage is None else storage._cdata
        return key in self._arguments and key not in self._outside

    def plate_of(self, index: torch.Tensor) -> str | None:
        """Return the plate whose indices an index tensor holds; None if there is none, or there are two."""
        if not _is_index(index):
            return None
        flat, sources = index.reshape(-1), self.sources(self.of_tensor(index)[0])
        found = []
        for name, indices in self.plates.items():
            storage = storage_of(indices)
            own = None if storage is None else storage._cdata
            # an index without sources was made outside of the tensors, from a list or an array
            # and one in the memory of the plate's is these, whatever they were computed from
            of_index = storage_of(index)
            known = (own is not None and of_index is not None and of_index._cdata == own) or all(
                _same_indices(self.plates[source.plate], indices)
                if isinstance(source, PlateRows)
                else getattr(source, "storage", -1) == own
                for source in sources
            )
            if known and _same_indices(flat, indices):
                found.append(name)
        if len(found) > 1:  # the plate that the model is in
            active = {getattr(messenger, "name", None) for messenger in pyro.poutine.runtime._PYRO_STACK}
            found = [name for name in found if name in active]
        return found[0] if len(found) == 1 else None

    def take_rows(self, tensor: torch.Tensor, dim: int, index: torch.Tensor, result: Any) -> None:
        """Note that a tensor was indexed, if by the indices of a plate."""
        plate = self.plate_of(index)
        if plate is None:
            return
        use = RowUse(tensor, dim if dim < 0 else dim - tensor.dim(), plate, self.of_tensor(tensor)[0])
        self.row_uses.append(use)
        storage = storage_of(result) if isinstance(result, torch.Tensor) else None
        if storage is not None and result.dim() == tensor.dim():
            self.row_results[storage._cdata] = (result, use)

    def subsample(self, plate: str, tensor: torch.Tensor, dim: int) -> None:
        """Note that ``pyro.subsample`` took the rows of a plate; of one in full it takes all, in their own order."""
        with self.pause():
            indices = self.plates.get(plate)
            if indices is None:
                return
            use = RowUse(tensor, dim, plate, self.of_tensor(tensor)[0])
            if _same_indices(indices, torch.arange(tensor.shape[dim])):
                self.row_uses.append(use)
            elif len(indices) == tensor.shape[dim]:  # of fewer it takes the rows by their indices
                self.by_position.append(use)

    def of(self, value: Any) -> int:
        """Return the taint of a tensor, or the union over a nested container of tensors."""
        if isinstance(value, torch.Tensor):
            return self.of_tensor(value)[0]
        taint = 0
        if isinstance(value, (tuple, list, set, frozenset)):
            for item in value:
                taint |= self.of(item)
        elif isinstance(value, dict):
            for item in value.values():
                taint |= self.of(item)
        elif isinstance(value, slice):
            taint = self.of(value.start) | self.of(value.stop) | self.of(value.step)
        return taint

    def quietly_of(self, value: Any) -> int:
        """Like :meth:`of`, while the tracker is active."""
        with self.pause():
            return self.of(value)

    def of_tensor(self, tensor: torch.Tensor) -> Known:
        """Return the whole taint, the part that concerns the object alone, and the storage's address."""
        entry = self._by_object.get(id(tensor))
        own = entry[1] if entry is not None else 0
        storage = storage_of(tensor)
        if storage is None:
            return own, own, None
        key = storage._cdata
        found = self._by_storage.get(key)
        taint = own | found[1] if found is not None else own
        if key in self._arguments:
            taint |= self.bit(Region.of(tensor))
        return taint, own, key

    def add(self, tensor: torch.Tensor, taint: int) -> None:
        """Add to the taint of a storage, so that every view of it has it."""
        storage = storage_of(tensor)
        if storage is None:
            self._add_to_object(tensor, taint)
            return
        key = storage._cdata
        found = self._by_storage.get(key)
        if found is None:
            self._by_storage[key] = (StorageWeakRef(storage), taint)
        elif taint & ~found[1]:
            self._by_storage[key] = (found[0], found[1] | taint)

    def _add_to_object(self, tensor: torch.Tensor, taint: int) -> None:
        entry = self._by_object.get(id(tensor))
        self._by_object[id(tensor)] = (tensor, taint if entry is None else entry[1] | taint)

    def give_own(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Pass on what concerns one tensor object alone, to an object that now has its storage."""
        entry = self._by_object.get(id(source))
        if entry is not None:
            self._add_to_object(target, entry[1])

    def flow(self, known: list[Known], union: int, results: list[torch.Tensor]) -> None:
        """Let taints flow from the arguments of a call into its results.

        A result in fresh memory gets the union. A result that is a view of an argument shares that argument's
        storage, hence its taint, already; what it gets from the *other* arguments (an index, say) is its own.

        Args:
            known: What :meth:`of_tensor` says of the arguments.
            union: The union of their taints, and of scalars read inside the call.
            results: Tensors.
        """
        for result in results:
            taint, _, key = self.of_tensor(result)
            if not union & ~taint:
                continue
            if key is None:
                self._add_to_object(result, union)
            elif all(key != other for _, _, other in known):
                self.add(result, union)
            else:
                rest = self.hidden
                for whole, own, other in known:
                    rest |= own if other == key else whole
                if rest & ~taint:
                    self._add_to_object(result, rest)

    def escape(self, taint: int, operation: str) -> None:
        """Record that a tainted value left the tensors; inside a site's own code it concerns only that."""
        if self._absorbing:
            self._absorbing[-1] |= taint
        elif not (operation == "bool" and _is_validation()):
            self.escapes.append(Escape(taint, operation, self.moment, *_place()))

    def noise(self) -> int:
        """Return the taint of random numbers drawn here; none while a site draws its value."""
        return 0 if self._absorbing else self.bit(Noise(*_place()))

    def absorb(self) -> None:
        """From here to :meth:`absorbed`, values that escape concern one site only."""
        self._absorbing.append(0)

    def absorbed(self) -> int:
        """Return the taint of what escaped since :meth:`absorb`."""
        return self._absorbing.pop()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let operations pass unseen."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Results that carry shapes, never values.
_SHAPE_ONLY = _names(
    """zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros new_ones new_empty
    new_empty_strided empty_permuted"""
)
# Calls that read values from their first argument only, or from all but the first.
_FIRST_ONLY = _names("expand_as view_as reshape_as type_as sum_to_size")
_NOT_FIRST = _names("full_like new_full new_tensor")
# Calls with one result for each argument: the dispatch mode keeps these apart, a union would not.
_SIDE_BY_SIDE = _names("broadcast_tensors meshgrid atleast_1d atleast_2d atleast_3d align_tensors")
# Calls whose result is no tensor and says nothing about values (attributes appear under their own names).
COMPILER = "torch._dynamo"
_METADATA = _names(
    """dim ndim ndimension numel nelement size shape stride storage_offset element_size itemsize nbytes dtype
    device layout requires_grad is_leaf grad_fn names has_names output_nr _version __len__ __hash__ __repr__
    __str__ __format__ get_device register_hook retains_grad result_type can_cast promote_types dense_dim
    sparse_dim __dlpack_device__ is_same_size is_cuda is_sparse is_sparse_csr is_quantized is_meta is_mps
    is_cpu is_xpu is_mkldnn is_nested is_contiguous is_floating_point is_complex is_inference is_conj is_neg
    is_pinned is_shared is_set_to is_distributed is_signed is_coalesced is_tensor is_storage _is_view
    _backward_hooks _cdata _has_symbolic_sizes_strides dim_order _has_compatible_shallow_copy_type"""
)
# Operators whose result's size depends on values, and the ways to read a size.
_SIZE_FROM_VALUES = _names(
    "nonzero masked_select _unique2 unique_dim unique_consecutive unique_dim_consecutive bincount repeat_interleave"
)
_SIZES = _names("shape size numel nelement __len__ nbytes")
# Operators that choose among the entries of a tensor, with the positions of tensor and index.
_CHOOSES = {"index": (0, 1), "index_select": (0, 2), "gather": (0, 2), "embedding": (0, 1), "take": (0, 1)}
# Operators that forget what their first argument held.
_OVERWRITES = _names("copy_ fill_ zero_")
_NO_VALUE = (
    type(None),
    type(NotImplemented),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.Size,
    torch.Generator,
)


@contextmanager
def watching(tracker: TaintTracker) -> Iterator[None]:
    """Let taints flow through every operation inside the context.

    Args:
        tracker: Where the taints are kept.

    Example:
        >>> tracker = TaintTracker()
        >>> z, buffer = torch.zeros(()), torch.zeros(3)
        >>> tracker.set(z, tracker.bit("z"))
        >>> with watching(tracker):
        ...     buffer[1] = z.exp()
        >>> tracker.sources(tracker.of(buffer))
        ['z']
    """
    # Operators with branches run PyTorch's compiler, which must not look into the handler once it is there.
    handler = _HiddenDispatchMode if COMPILER in sys.modules else _DispatchMode
    with _FunctionMode(tracker), handler(tracker):
        yield


def _tensors(values: Any, found: list[torch.Tensor]) -> list[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list, set, frozenset)):
            _tensors(value, found)
        elif isinstance(value, dict):
            _tensors(value.values(), found)
        elif isinstance(value, slice):
            _tensors((value.start, value.stop, value.step), found)
    return found


def _tells_value(result: Any) -> bool:
    """Whether something that is no tensor, or a container, may carry values."""
    if isinstance(result, (tuple, list)) and not isinstance(result, torch.Size):
        return any(_tells_value(item) for item in result)
    return not isinstance(result, (torch.Tensor, *_NO_VALUE)) and not callable(result)


class _FunctionMode(TorchFunctionMode):
    def __init__(self, tracker: TaintTracker) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tracker = self.tracker
        if tracker.paused or isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        tracker.depth += 1
        before = tracker.hidden, tracker.size_inside
        tracker.hidden = tracker.size_inside = 0
        try:
            result = func(*args, **kwargs)
            if result is not None:
                self._watch(func, args, kwargs, result)
            elif getattr(func, "__name__", "") == "__set__" and isinstance(args[1], torch.Tensor):
                tracker.give_own(args[1], args[0])  # z.data = table[k]
        finally:
            tracker.depth -= 1
            tracker.hidden, tracker.size_inside = before
        return result

    def _watch(self, func: Callable, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        tracker, name = self.tracker, getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if tracker.sized or tracker.size_inside:
            self._watch_sizes(name, args, result)
        if name in _METADATA or name in _SHAPE_ONLY:
            return
        values = args if not kwargs else (*args, *kwargs.values())
        if name in _FIRST_ONLY:
            values = args[:1]
        elif name in _NOT_FIRST:
            values = (*args[1:], *kwargs.values())
        known = [tracker.of_tensor(argument) for argument in _tensors(values, [])]
        union = tracker.hidden
        for whole, _, _ in known:
            union |= whole
        if not union:
            return
        if isinstance(result, torch.Tensor):
            tracker.flow(known, union, [result])
        elif isinstance(result, (tuple, list, dict)) and name not in _SIDE_BY_SIDE:
            tracker.flow(known, union, _tensors((result,), []))
        if _tells_value(result):
            tracker.escape(union, name.strip("_") if name.startswith("__") else name)

    def _watch_sizes(self, name: str, args: tuple, result: Any) -> None:
        """Follow tensors whose size depends on values (``z[z > 0]``), until the size is read."""
        tracker = self.tracker
        taint = tracker.size_inside
        for argument in _tensors(args, []):
            entry = tracker.sized.get(id(argument))
            taint |= 0 if entry is None else entry[1]
        if not taint:
            return
        if name in _SIZES:
            tracker.escape(taint, name.strip("_") if name.startswith("__") else name)
        for tensor in _tensors((result,), []):
            if tensor.dim() > 0:
                tracker.sized[id(tensor)] = (tensor, taint)


class _Schema(NamedTuple):
    positions: tuple[int, ...]
    names: tuple[str, ...]
    random: bool


def _schema(func: Any) -> _Schema:
    """Return which arguments of an operator are written to, and whether it draws random numbers."""
    positions, names = [], []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            names.append(argument.name)
            if not argument.kwarg_only:
                positions.append(i)
    return _Schema(tuple(positions), tuple(names), torch.Tag.nondeterministic_seeded in func.tags)


class _DispatchMode(TorchDispatchMode):
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave the handler undecorated: PyTorch's decorator imports its compiler, which takes a second or two."""
        return False

    _schemas: dict[Any, _Schema] = {}  # noqa: RUF012 - one cache for all instances

    def __init__(self, tracker: TaintTracker) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tracker = self.tracker
        if tracker.paused:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            return self._higher_order(func, args, kwargs)
        # Outside of a call of the Python interface (in a scripted function) the function mode is on.
        tracker.paused = True
        try:
            result = func(*args, **kwargs)
            self._watch(func, args, kwargs, result)
        finally:
            tracker.paused = False
        return result

    def _higher_order(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operator that calls functions (``torch.cond``): all that they do reaches the result."""
        tracker = self.tracker
        inside = tracker.hidden

        def watched(function: Any) -> Any:
            if isinstance(function, torch.Tensor) or not callable(function):
                return function

            def call(*operands: Any) -> Any:
                nonlocal inside
                before = tracker.paused, tracker.depth
                tracker.paused, tracker.depth = False, 0
                try:
                    with watching(tracker):
                        result = function(*operands)
                finally:
                    tracker.paused, tracker.depth = before
                inside |= tracker.of(result)
                return result

            return call

        functions_watched = tree_map(watched, (args, kwargs))
        tracker.paused = True
        try:
            result = func(*functions_watched[0], **functions_watched[1])
            if func.__name__ == "cond":  # only one branch was run
                _, one, other, operands = functions_watched[0]
                one(*operands)
                other(*operands)
            arguments = _tensors((*args, *kwargs.values()), [])
            known = [tracker.of_tensor(argument) for argument in arguments]
            tracker.flow(known, inside | tracker.of(arguments), _tensors((result,), []))
        finally:
            tracker.paused = False
        return result

    def _watch(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        tracker = self.tracker
        arguments = _tensors(args if not kwargs else (*args, *kwargs.values()), [])
        name = func.overloadpacket.__name__
        schema = self._schemas.get(func)
        if schema is None:
            schema = self._schemas[func] = _schema(func)
        if schema.random:
            noise = tracker.noise()
            if noise:
                for tensor in _tensors((result,), []):
                    tracker.add(tensor, noise)
        if name in _SHAPE_ONLY:
            return
        if name in _CHOOSES and len(args) > max(_CHOOSES[name]):
            self._watch_choice(name, args, result)
        elif name == "where" and len(args) == 3:
            self._select(tracker.of(args[1:]), tracker.of(args[0]))
        elif tracker.hidden and name in ("select", "slice"):
            self._select(tracker.of(args[0]), tracker.hidden)
        if name == "select" and tracker.plates:
            at = args[1] if args[1] < 0 else args[1] - args[0].dim()
            tracker.row_reads.append((args[0], at, int(args[2]) % max(1, args[0].shape[args[1]])))
        known = [tracker.of_tensor(argument) for argument in arguments]
        taint = tracker.hidden
        for whole, _, _ in known:
            taint |= whole
        if not taint:
            return
        if schema.names:
            if name in _OVERWRITES and _covers_its_storage(args[0]):
                tracker.set(args[0], tracker.hidden | tracker.of(args[1:]))
                return
            written = [args[i] for i in schema.positions if i < len(args)]
            written += [kwargs[keyword] for keyword in schema.names if keyword in kwargs]
            for tensor in _tensors(written, []):
                tracker.add(tensor, taint)
        if isinstance(result, torch.Tensor):
            tracker.flow(known, taint, [result])
        elif isinstance(result, (tuple, list)):
            tracker.flow(known, taint, _tensors(result, []))
        elif name == "_local_scalar_dense":
            if tracker.depth:
                tracker.hidden |= taint
            else:
                tracker.escape(taint, "item")
        if name in _SIZE_FROM_VALUES or (name == "index" and any(map(_is_mask, args[1]))):
            tracker.size_inside |= taint

    def _watch_choice(self, name: str, args: tuple, result: Any) -> None:
        tracker, (at, by) = self.tracker, _CHOOSES[name]
        tensor, index = args[at], args[by]
        self._select(tracker.of(tensor), tracker.of(index))
        if not tracker.plates:
            return
        if name == "index":
            given = [(dim, each) for dim, each in enumerate(index) if each is not None]
            alone = len(given) == 1 and given[0][1].dim() == 1
            for dim, each in given:
                if each.dtype not in (torch.bool, torch.uint8):
                    tracker.take_rows(tensor, dim, each, result if alone else None)
        elif name == "gather":
            along = index.movedim(args[1], 0).reshape(index.shape[args[1]], -1) if index.dim() else index
            if along.dim() == 2 and along.shape[1] and bool((along == along[:, :1]).all()):
                tracker.take_rows(tensor, args[1], along[:, 0].contiguous(), result)
        elif name != "take" or tensor.dim() == 1:
            tracker.take_rows(tensor, args[1] if name == "index_select" else 0, index, result)

    def _select(self, values: int, chosen_by: int) -> None:
        if values and chosen_by:
            self.tracker.selections[values, chosen_by] = None


class _HiddenDispatchMode(_DispatchMode):
    __torch_dispatch__ = torch._disable_dynamo(_DispatchMode.__torch_dispatch__, recursive=True)  # type: ignore[attr-defined]


def watched(tracker: TaintTracker, model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model that lets taints flow through all that it does (:func:`watching`)."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with watching(tracker):
            return model(*args, **kwargs)

    return run


def _broadcast(one: torch.Size, other: torch.Size) -> bool:
    return all(a == b or 1 in (a, b) for a, b in zip(reversed(one), reversed(other), strict=False))


class PlateWatch(Messenger):
    """Tells a tracker of the indices of plates."""

    def __init__(self, tracker: TaintTracker) -> None:
        super().__init__()
        self.tracker = tracker

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.tracker.watch_plate(msg["name"], msg["value"])

    def _pyro_subsample(self, msg: Any) -> None:
        """Note which rows ``pyro.subsample`` takes, also of plates in full, where it returns the tensor itself."""
        data = msg["args"][0] if msg["args"] else msg["kwargs"].get("data")
        event_dim = msg["kwargs"].get("event_dim")
        if not isinstance(data, torch.Tensor) or event_dim is None:
            return  # Pyro leaves the tensor as it is then
        for frame in msg["cond_indep_stack"]:
            dim = None if frame.dim is None else frame.dim - event_dim
            if dim is not None and data.dim() >= -dim and data.shape[dim] == frame.full_size > 1:
                self.tracker.subsample(frame.name, data, dim)


@dataclass(frozen=True)
class SiteRecord:
    """What one run shows about a sample site.

    ``reaches_distribution`` and ``reaches_value`` are taints; ``region`` is the piece of an argument that an
    observed value is, ``holds_data`` says whether an observed value is data rather than computed from latent
    variables (or absent, as at a factor).
    """

    name: str
    observed: bool
    enumerated: bool
    holds_data: bool
    reaches_distribution: int
    reaches_value: int
    region: Region | None
    value_id: int
    plates: tuple[Any, ...]
    loops: tuple[tuple[str, int], ...]
    event_size: int
    event_shape: torch.Size
    batch_shape: torch.Size


def _parameters(fn: Any) -> list[torch.Tensor]:
    found = []
    while fn is not None:
        found += [value for value in vars(fn).values() if isinstance(value, torch.Tensor)]
        fn = vars(fn).get("base_dist")
    return found


class Recorder(PlateWatch):
    """Notes the taints at each sample site and starts the site's own taint; and the rows of plates.

    It must be outside all other handlers: then it sees each site as the model leaves it, and nothing else
    happens between its two methods but the drawing of a value.
    """

    def __init__(self, tracker: TaintTracker) -> None:
        super().__init__(tracker)
        self.records: list[SiteRecord] = []
        self.deltas: dict[
            str, tuple[int, tuple[Any, ...]]
        ] = {}  # taint and plates of sites that pass values on
        self.data: dict[str, torch.Tensor] = {}  # observed values that lie in the memory of arguments

    def _pyro_sample(self, msg: Any) -> None:
        self.tracker.absorb()

    def _pyro_post_sample(self, msg: Any) -> None:
        drawing = self.tracker.absorbed()
        if site_is_subsample(msg):
            super()._pyro_post_sample(msg)
            return
        fn, value = msg["fn"], msg["value"]
        with self.tracker.pause():
            transparent = is_transparent(msg)
        factor = isinstance(fn, dist.Unit)
        if transparent:
            if not msg["is_observed"]:
                self.deltas[msg["name"]] = self.tracker.quietly_of(_parameters(fn)), vectorized_plates(msg)
            log_density = self._log_density(fn)
            if log_density is None:
                return
            factor, density = True, self.tracker.quietly_of(log_density)
        elif isinstance(value, torch.Tensor):
            density = self._density_taint(msg["name"], fn, value, msg["is_observed"])
        elif msg["is_observed"]:  # a Python number
            density = self._density_taint(msg["name"], fn, torch.as_tensor(value), False)
        else:
            raise UnsupportedModelError(
                f"At site '{msg['name']}', expected a tensor; {type(fn).__name__} gave a {type(value).__name__}. "
                "Sample tensors only."
            )
        with self.tracker.pause():
            self._note(msg, density | drawing, transparent, factor)

    def _note(self, msg: Any, reaches: int, transparent: bool, factor: bool) -> None:
        tracker, fn, value, name = self.tracker, msg["fn"], msg["value"], msg["name"]
        is_data = msg["is_observed"] and isinstance(value, torch.Tensor)
        region = Region.of(value) if is_data and tracker.is_argument(value) else None
        from_value = 0 if transparent else tracker.of(value)
        # A log-density may leave out a parameter at some values (missing data); the distribution holds it.
        reaches |= tracker.of((msg["mask"], msg["scale"], _parameters(fn)))
        self.records.append(
            SiteRecord(
                name=name,
                observed=msg["is_observed"] or factor,
                enumerated=msg["infer"].get("enumerate") == "parallel" and not msg["is_observed"],
                holds_data=msg["is_observed"] and not factor,
                reaches_distribution=reaches if msg["is_observed"] else reaches | from_value,
                reaches_value=from_value if msg["is_observed"] else 0,
                region=region,
                value_id=id(value),
                plates=vectorized_plates(msg),
                loops=subsampled_loops(msg),
                event_size=1 if factor else max(1, torch.Size(fn.event_shape).numel()),
                event_shape=fn.event_shape,
                batch_shape=fn.batch_shape,
            )
        )
        tracker.moment += 1
        if not transparent and isinstance(value, torch.Tensor):
            if region is not None:  # what pyro.sample returns can then be told from the data themselves
                self.data[name] = value
            msg["value"] = value.detach().clone()
            tracker.set(msg["value"], tracker.bit(name))

    def _log_density(self, fn: Any) -> torch.Tensor | None:
        """Return the log-density that a Delta carries: a factor of the model; None if there is none."""
        if not isinstance(undressed(fn), dist.Delta) or getattr(fn, "_mask", None) is False:
            return None
        log_density = undressed(fn).log_density
        with self.tracker.pause():
            used = isinstance(log_density, torch.Tensor) and bool((log_density != 0).any())
        return log_density if used else None

    def _density_taint(self, name: str, fn: Any, value: torch.Tensor, clean: bool) -> int:
        """Return what reaches the log-density of a site; with ``clean``, other than through its value."""
        tracker = self.tracker
        if clean:
            with tracker.pause():
                value = value.detach().clone()
        tracker.absorb()
        try:
            instead = stand_in(fn)
            log_prob = fn.log_prob(value) if instead is None else instead
        except Exception as error:
            if is_outside(fn, value):
                raise UnsupportedModelError(
                    f"Expected data of '{name}' in the support of its distribution, {support_of(fn)}; got others."
                ) from error
            if not _broadcast(value.shape, fn.shape()):
                raise UnsupportedModelError(
                    f"Expected data of '{name}' of shape {tuple(fn.shape())}, that of its distribution; got "
                    f"{tuple(value.shape)}."
                ) from error
            raise UnsupportedModelError(
                f"At site '{name}', the log-density of {type(fn).__name__} cannot be evaluated "
                f"({type(error).__name__}: {error}). Give the distribution a log_prob() for such values."
            ) from error
        finally:
            absorbed = tracker.absorbed()
        return tracker.quietly_of(log_prob) | absorbed

    def _pyro_post_param(self, msg: Any) -> None:
        # A parameter may be initialised from data, or from samples; from then on it is on its own.
        if isinstance(msg["value"], torch.Tensor):
            with self.tracker.pause():
                self.tracker.set(msg["value"], 0)


def _is_index(index: torch.Tensor) -> bool:
    return index.dtype in (torch.int64, torch.int32)


def _same_indices(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one))


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _covers_its_storage(tensor: torch.Tensor) -> bool:
    storage = storage_of(tensor)
    return (
        storage is not None
        and tensor.is_contiguous()
        and tensor.numel() * tensor.element_size() == storage.nbytes()
    )
