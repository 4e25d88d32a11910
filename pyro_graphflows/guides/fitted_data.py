"""The data that sites with per-element parameters are fitted to, and whether those of a call are others.

Such sites read no data in a call: their parameters fit one data set, that of set-up, or that of the latest training. A
call with other data has their draws of the old ones, without an error. So the guide compares, and warns.

Comparing costs little: a call with the very tensors that were fitted is known by their identity. Other tensors are
compared by their content; on an accelerator, where that makes the program wait, not in each call but in the first, the
second, the fourth and so on. Nodes in subsampled plates are never compared, as each batch is part of the same data.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import ref

from torch import Tensor

from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.guides.call import Call
from pyro_graphflows.guides.plan import Plan
from pyro_graphflows.inspect.arguments import argument_leaves, moved_arguments

__all__ = ["FittedData", "digest"]


def digest(value: Tensor) -> str:
    """Return a checksum of the numbers and the shape of a tensor, whatever its type and device.

    Example:
        >>> import torch
        >>> digest(torch.tensor([1, 2])) == digest(torch.tensor([1.0, 2.0]))
        True
    """
    plain = value.detach().cpu().double().contiguous()
    return hashlib.sha256(str(tuple(plain.shape)).encode() + plain.numpy().tobytes()).hexdigest()


class FittedData:
    """What a guide is fitted to: the arguments of a call, or checksums of its data.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        digests: For a guide that was loaded, the checksums of the nodes' values instead.
    """

    def __init__(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self.args, self.kwargs = args, dict(kwargs or {})
        self._digests = None if digests is None else dict(digests)
        self._values: dict[str, Tensor] | None = None
        self._alike: dict[Any, tuple[Any, int]] = {}
        self._comparisons = 0

    def note_arguments(self, model: Callable[..., Any]) -> None:
        """Note which tensors these are, and their state, as they may be written to later."""
        if self._digests is None:
            self._alike = _marked(argument_leaves(model, self.args, self.kwargs))

    def moved(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Move the data to another device, with the guide; their types stay.

        Args:
            convert: From a tensor to that on the other device.
        """
        self.args, self.kwargs = moved_arguments(self.args, self.kwargs, convert)
        self._values, self._alike = None, {}

    def is_known(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the tensors of a call are those that were fitted, or were found to hold the same."""
        leaves = argument_leaves(model, args, dict(kwargs))
        return leaves.keys() == self._alike.keys() and all(
            self._alike[path][0]() is leaf and self._alike[path][1] == _version(leaf)
            for path, leaf in leaves.items()
        )

    def values(self, read: Callable[..., Call], graph: ModelGraph) -> Mapping[str, Tensor | str]:
        """Return the values of the nodes with data, or their checksums, without those in subsampled plates.

        Args:
            read: A function that reads a call by its arguments.
            graph: The model graph.
        """
        if self._digests is not None:
            return self._digests
        if self._values is None:
            call = read(self.args, self.kwargs)
            self._values = {
                name: value for name, value in call.values.items() if not _is_part(name, call, graph)
            }
        return self._values

    def digests(self, read: Callable[..., Call], graph: ModelGraph) -> dict[str, str]:
        """Return checksums of the values; see :meth:`values`."""
        return {
            name: value if isinstance(value, str) else digest(value)
            for name, value in self.values(read, graph).items()
        }

    def sites_of_other_data(
        self, call: Call, plan: Plan, read: Callable[..., Call], sites: Iterable[str], *, always: bool = True
    ) -> tuple[str, ...]:
        """Return those of some sites that would read other data if they read any.

        A call without the data of one of a site's observed parents asks for its posterior given the data fitted: then
        the site is not among them.

        Args:
            call: The call.
            plan: The plan of the guide.
            read: A function that reads a call by its arguments.
            sites: Sites with per-element parameters.
            always: Whether to compare on accelerators in every call.
        """
        on_accelerator = any(value.device.type != "cpu" for value in call.values.values())
        self._comparisons += 1
        if on_accelerator and not always and self._comparisons & (self._comparisons - 1):
            return ()
        graph = plan.graph
        fitted = self.values(read, graph) if call.values else {}
        differs: dict[str, bool] = {}

        def other(name: str) -> bool:
            if name not in differs:
                differs[name] = _differ(fitted[name], call.values[name])
            return differs[name]

        found = []
        for site in sites:
            data = [n for n in _fitted_by(site, plan) if n in graph.observed or n in graph.inputs]
            given = [n for n in data if n in call.values and n in fitted and not _is_part(n, call, graph)]
            observed = [n for n in data if n in graph.observed]
            if all(n in call.values for n in observed) and any(other(n) for n in given):
                found.append(site)
        return tuple(found)

    def take_as_known(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Note that the tensors of a call hold the data that were fitted."""
        self._alike = _marked(argument_leaves(model, args, dict(kwargs)))

    def __deepcopy__(self, memo: dict[int, Any]) -> "FittedData":
        new = FittedData(
            self.args, self.kwargs, digests=self._digests
        )  # data are shared by copies of a guide
        new._values, new._alike = self._values, dict(self._alike)
        return new


def _fitted_by(site: str, plan: Plan) -> list[str]:
    """Return the parents of a site that its per-element parameters stand for; others are read."""
    coupled = plan.inputs.coupled[site].plates if site in plan.inputs.coupled else ()
    return [
        parent
        for parent in plan.inverse.parents[site]
        if plan.inverse.how[parent, site] == "pooled" or set(plan.graph.plates[parent]) & set(coupled)
    ]


def _marked(leaves: Mapping[Any, Tensor]) -> dict[Any, tuple[Any, int]]:
    return {path: (ref(leaf), _version(leaf)) for path, leaf in leaves.items()}


def _version(leaf: Tensor) -> int:
    """Return how often a tensor was written to; of tensors of inference mode this is not known."""
    return -1 if leaf.is_inference() else leaf._version


def _is_part(name: str, call: Call, graph: ModelGraph) -> bool:
    """Whether a node is in a plate of which a call has only part."""
    return any(call.plates[p].indices is not None for p in graph.plates.get(name, ()) if p in call.plates)


def _differ(fitted: Tensor | str, value: Tensor) -> bool:
    if isinstance(fitted, str):
        return digest(value) != fitted
    if fitted is value:
        return False
    if fitted.shape != value.shape:
        return True
    mine, theirs = fitted.detach().to(value.device), value.detach()
    if mine.is_meta:
        return False
    if mine.is_floating_point() and theirs.is_floating_point():  # one of two types may be rounded
        narrow = min(mine.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        mine, theirs = mine.to(narrow), theirs.to(narrow)
    same = (mine == theirs) | ((mine != mine) & (theirs != theirs))  # NaN where entries are missing
    return not bool(same.all())
