"""Which random variables a tensor depends on: the book-keeping.

A *taint* is a set of sources (sample sites, and regions of the tensors given as arguments), kept as the bits
of a Python integer. Most taints belong to a storage, so that they are seen through every view of it; some
belong to one tensor object (``table[k]`` is a view of ``table``, but only this view depends on ``k``). The
modes in :mod:`pyro_graphflows.inspect.modes` watch the operations and let the taints flow.

A tainted tensor that turns into something else than a tensor (``float(z)``, ``if z > 0``, ``z.numpy()``)
cannot be followed: that is an *escape*, and it is recorded with its place in the user's code.
"""

import linecache
import os
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Escape", "Known", "Noise", "Region", "TaintTracker", "storage_of"]

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


class Noise(NamedTuple):
    """A place in the user's code that draws random numbers outside of ``pyro.sample``."""

    filename: str
    line: int
    code: str


Known = tuple[int, int, int | None]


class Escape(NamedTuple):
    """A tainted tensor that became something else than a tensor.

    ``taint`` tells the sources, ``moment`` how many sites had been sampled by then.
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
    while frame.f_back is not None and _in_library(os.path.abspath(frame.f_code.co_filename)):
        frame = frame.f_back
    filename, line = frame.f_code.co_filename, frame.f_lineno
    return filename, line, linecache.getline(filename, line).strip()


def _in_library(path: str) -> bool:
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
        self.sized: dict[int, tuple[torch.Tensor, int]] = {}  # tensors whose size tells values
        self.size_inside = 0  # taints of sizes made inside the present call
        self.depth = 0  # of calls that the function mode has under way
        self.hidden = 0  # taints of scalars read inside the present call

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

    def is_argument(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of an argument."""
        storage = storage_of(tensor)
        return storage is not None and storage._cdata in self._arguments

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
