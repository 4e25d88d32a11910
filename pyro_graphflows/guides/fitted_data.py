"""The data that sites with per-element parameters are fitted to, and whether those of a call are others.

Such sites read no data in a call: their parameters fit one data set, that of set-up, or that of the latest training. A
call with other data has their draws of the old ones, without an error. So the guide compares, and warns.

What is compared are the tensors among the arguments. That costs little: the very tensors that were fitted are known by
their identity. Others are compared by their content; on an accelerator, where that makes the program wait, not in each
call but in the first, the second, the fourth and so on. Nodes in subsampled plates are never compared, as each batch is
part of the same data.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor

from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.guides.call import Call
from pyro_graphflows.guides.plan import Plan
from pyro_graphflows.inspect.arguments import ArgumentPath

__all__ = ["CallData", "FittedData", "digest"]

Leaves = Mapping[ArgumentPath, Tensor]
_Key = TypeVar("_Key")
_Mark = tuple[Any, int]  # a weak reference to a tensor, and how often it had been written to


def digest(value: Tensor) -> str:
    """Return a checksum of the shape and the numbers of a tensor, these in single precision, whatever its device.

    Example:
        >>> import torch
        >>> digest(torch.tensor([0.1, 2.0])) == digest(torch.tensor([0.1, 2.0]).double())
        True
    """
    plain = value.detach().cpu().to(torch.float32 if value.is_floating_point() else torch.int64).contiguous()
    return hashlib.sha256(str(tuple(plain.shape)).encode() + plain.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class CallData:
    """The data of a call.

    Attributes:
        call: The call.
        arguments: Its positional arguments, and its keyword arguments.
        leaves: The tensors among them.
        observations: Values that replace those of observed sites.
    """

    call: Call
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]]
    leaves: Leaves
    observations: Mapping[str, Tensor]


class FittedData:
    """What a guide is fitted to.

    Args:
        leaves: The tensors among the arguments, or for a guide that was loaded their checksums.
        partial: The plates of which only part was there.
    """

    def __init__(self, leaves: Mapping[ArgumentPath, Tensor | str], partial: Collection[str] = ()) -> None:
        self.leaves, self.partial = dict(leaves), frozenset(partial)
        self._alike = _marked({path: leaf for path, leaf in leaves.items() if isinstance(leaf, Tensor)})
        self._comparisons = 0
        self._known_call: dict[int | str, _Mark] = {}  # of the arguments, by position and by name

    def is_known(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: Leaves | None = None
    ) -> bool:
        """Whether the tensors of a call are those that were fitted, or were found to hold the same.

        Args:
            args: Positional arguments of the call.
            kwargs: Its keyword arguments.
            leaves: The tensors among them, which take time to find. Without them only those of the call that was last
                found to be known are.
        """
        call = _by_place(args, kwargs)
        if self._known_call and _are(self._known_call, call):
            return True
        if leaves is None or not _are(self._alike, leaves):
            return False
        if all(type(value) is Tensor for value in call.values()):  # others may hold tensors
            self._known_call = _marked(call)
        return True

    def digests(self) -> dict[ArgumentPath, str]:
        """Return the checksums of the tensors."""
        return {path: leaf if isinstance(leaf, str) else digest(leaf) for path, leaf in self.leaves.items()}

    def moved(self, convert: Callable[[Tensor], Tensor]) -> "FittedData":
        """Return the same data on another device; in their own type, which says how exact they are."""
        return FittedData(
            {
                path: leaf if isinstance(leaf, str) else leaf.to(convert(leaf).device)
                for path, leaf in self.leaves.items()
            },
            self.partial,
        )

    def sites_of_new_data(
        self, now: CallData, plan: Plan, paths: Mapping[str, ArgumentPath], sites: Iterable[str]
    ) -> tuple[str, ...]:
        """Return those of some sites that would read other data in a call, compared no more often than need be.

        Data that were found to be the same are not compared again, and those on accelerators rarely; see
        :meth:`sites_of_other_data`.
        """
        if not now.observations and self.is_known(*now.arguments, now.leaves):
            return ()
        self._comparisons += 1
        waits = any(leaf.device.type != "cpu" for leaf in now.leaves.values())
        if waits and self._comparisons & (self._comparisons - 1):
            return ()
        found = self.sites_of_other_data(now, plan, paths, sites)
        if not found and not now.observations:
            self._alike = _marked(now.leaves)
            self.is_known(*now.arguments, now.leaves)
        return found

    def sites_of_other_data(
        self,
        now: CallData,
        plan: Plan,
        paths: Mapping[str, ArgumentPath],
        sites: Iterable[str],
    ) -> tuple[str, ...]:
        """Return those of some sites that would read other data if they read any.

        A call without the data of one of a site's observed parents asks for its posterior given the data fitted: then
        the site is not among them.

        Args:
            now: The data of the call.
            plan: The plan of the guide.
            paths: Where the values of nodes are among the arguments.
            sites: Sites with per-element parameters.
        """
        graph, call = plan.graph, now.call
        where = {name: self._leaf_of(path) for name, path in paths.items()}
        others = [path for path in self.leaves if path not in where.values()]
        differs: dict[Any, bool] = {}

        def other(name: str) -> bool:
            """Whether the data of a node are others, or what they may have been computed from."""
            leaf = where.get(name)
            if name in now.observations:
                is_whole = leaf is not None and paths[name] == leaf
                return is_whole and _differ(self.leaves[paths[name]], now.observations[name])
            found = False
            for path in others if leaf is None else [leaf]:
                if path not in differs:
                    differs[path] = path in now.leaves and _differ(self.leaves[path], now.leaves[path])
                found = found or differs[path]
            return found

        result = []
        for site in sites:
            data = [n for n in _fitted_by(site, plan) if n in graph.observed or n in graph.inputs]
            if not all(n in call.values for n in data if n in graph.observed):
                continue
            whole = [n for n in data if n in call.values and not self._is_part(n, call, graph)]
            if any(map(other, whole)):
                result.append(site)
        return tuple(result)

    def _leaf_of(self, path: ArgumentPath) -> ArgumentPath | None:
        """Return the path of the tensor that a path leads to or into."""
        return next((leaf for leaf in self.leaves if path[: len(leaf)] == leaf), None)

    def _is_part(self, name: str, call: Call, graph: ModelGraph) -> bool:
        """Whether a node is in a plate of which a call has only part, or of which only part was fitted."""
        plates = [plate for plate in graph.plates.get(name, ()) if plate in call.plates]
        some = any(call.plates[plate].indices is not None for plate in plates)
        return some or call.in_part or not self.partial.isdisjoint(plates)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FittedData":
        new = FittedData(self.leaves, self.partial)  # data are shared by copies of a guide
        new._alike = dict(self._alike)
        return new


def _fitted_by(site: str, plan: Plan) -> list[str]:
    """Return the parents of a site that its per-element parameters stand for; others are read."""
    coupled = plan.inputs.coupled[site].plates if site in plan.inputs.coupled else ()
    return [
        parent
        for parent in plan.inverse.parents[site]
        if plan.inverse.how[parent, site] == "pooled" or _shares(plan.graph.plates[parent], coupled)
    ]


def _shares(plates: Collection[str], others: Collection[str]) -> bool:
    return not set(plates).isdisjoint(others)


def _by_place(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    found: dict[int | str, Any] = dict(enumerate(args))
    found.update(kwargs.items())
    return found


def _marked(tensors: Mapping[_Key, Tensor]) -> dict[_Key, _Mark]:
    return {key: (ref(tensor), _version(tensor)) for key, tensor in tensors.items()}


def _are(marks: Mapping[_Key, _Mark], values: Mapping[_Key, Any]) -> bool:
    """Return whether some values are the very tensors that were marked, and were not written to since."""

    def is_same(mark: _Mark, value: Any) -> bool:
        return value is not None and mark[0]() is value and mark[1] == _version(value)

    return marks.keys() == values.keys() and all(is_same(mark, values[key]) for key, mark in marks.items())


def _version(leaf: Tensor) -> int:
    """Return how often a tensor was written to; of tensors of inference mode this is not known."""
    return -1 if leaf.is_inference() else leaf._version


def _differ(fitted: Tensor | str, value: Tensor) -> bool:
    if value.is_meta or (isinstance(fitted, Tensor) and fitted.is_meta):
        return False  # without content
    if isinstance(fitted, str):
        return digest(value) != fitted
    if fitted is value:
        return False
    if fitted.shape != value.shape:
        return True
    mine, theirs = fitted.detach().to(value.device), value.detach()
    if mine.is_floating_point() and theirs.is_floating_point() and mine.dtype != theirs.dtype:
        narrow = min((mine.dtype, theirs.dtype), key=lambda dtype: dtype.itemsize)
        mine, theirs = mine.to(narrow), theirs.to(narrow)
    same = (mine == theirs) | ((mine != mine) & (theirs != theirs))  # NaN where entries are missing
    return not bool(same.all())
