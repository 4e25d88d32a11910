"""A function of tensors as a graph of its operations, where all other tensors keep their values.

:func:`~pyro_graphflows.capture.capture` is for training: whatever a program reads may change from step to step. In a
search over points for data that stay as they are, only the points change. :func:`record` computes what follows from
other tensors alone once, while the function runs; numbers may be read out of it, and Python code may depend on them.
It needs no part of PyTorch's compiler, whose import takes seconds, and a fraction of the time of ``capture``.

What is recorded is below autograd: of a function that goes backward, the operations of going forward and backward.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_graphflows.capture import (
    CAPTURING,
    Captured,
    NotCapturedError,
    known_answer,
    place_in_program,
    require_fixed_shape,
    uncovered,
)

__all__ = ["record"]


def record(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Captured:
    """Run a function once and write its tensor operations down.

    Args:
        function: The function. It may go backward on the way. All that it reads beside its arguments is fixed.
        inputs: What to run it with.

    Raises:
        NotCapturedError: If it draws random numbers, reads numbers out of what follows from its arguments, has shapes
            that depend on values of these, or writes such values to a tensor from outside.

    Example:
        >>> scale = torch.tensor(2.0)
        >>> captured = record(lambda x: [x.sin() * scale.exp()], [torch.zeros(3)])
        >>> captured.num_operations
        2
        >>> captured.graph(torch.zeros(3), *captured.constants)[0].tolist()
        [0.0, 0.0, 0.0]
    """
    recorder = _Recorder(inputs)
    token = CAPTURING.set(True)
    try:
        with uncovered(), recorder:
            results = function(*inputs)
    finally:
        CAPTURING.reset(token)
    return recorder.captured(results)


class _Recorder(TorchDispatchMode):
    """Writes operations down while they run."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.nodes: Any = WeakTensorKeyDictionary()
        self.following: Any = WeakTensorKeyDictionary()  # tensors that follow from inputs
        self.written: set[int] = set()  # memory to which what follows from inputs was written
        self.constants: dict[fx.Node, Tensor] = {}
        self.count = 0
        for i, tensor in enumerate(inputs):
            self.nodes[tensor] = self.last = self._noted(self.graph.placeholder(f"input_{i}"), tensor)
            self.following[tensor] = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer PyTorch, which would import its compiler, only to disable it here."""
        return False

    def captured(self, results: Sequence[Tensor]) -> Captured:
        """Return what has been written down.

        Args:
            results: The results of the function.
        """
        self.graph.output(tuple(self._with_nodes(list(results))))
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        return Captured(module, {}, tuple(self.constants.values()), self.count)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            answer = known_answer()
            if answer is not None:
                return answer
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotCapturedError(f"it draws random numbers, by {name}{place_in_program()}")
        given = list(_tensors((args, tuple(kwargs.values()))))
        # Fresh tensors may be written to later on.
        is_fresh = not given or name.startswith("new_") or name.endswith("_like")
        if not is_fresh and not any(tensor in self.nodes for tensor in given):
            return func(*args, **kwargs)
        follows = any(self._follows(tensor) for tensor in given)
        if follows:
            if torch.Tag.data_dependent_output in func.tags:
                raise NotCapturedError(
                    f"a number is read out of a tensor that follows from inputs{place_in_program()}"
                )
            require_fixed_shape(func, args, self._follows)
        elif torch.Tag.data_dependent_output in func.tags:
            return func(*args, **kwargs)
        written = list(_tensors(_written(func, args)))
        if any(tensor not in self.nodes for tensor in written):
            raise NotCapturedError(f"{name} writes to a tensor from outside{place_in_program()}")
        nodes = self._with_nodes(list(args)), {key: self._with_nodes(value) for key, value in kwargs.items()}
        out = func(*args, **kwargs)
        node = self.graph.call_function(func, tuple(nodes[0]), nodes[1])
        self.count += 1
        if follows:
            self.written |= {tensor.untyped_storage()._cdata for tensor in written}
        self._note_results(node, out, follows=follows)
        return out

    def _note_results(self, node: fx.Node, out: Any, *, follows: bool) -> None:
        if torch.is_tensor(out):
            self.nodes[out] = self._noted(node, out)
            if follows:
                self.following[out] = True
        elif isinstance(out, list | tuple):
            for i, part in enumerate(out):
                if torch.is_tensor(part):
                    self._note_results(
                        self.graph.call_function(operator.getitem, (node, i)), part, follows=follows
                    )

    @staticmethod
    def _noted(node: fx.Node, value: Tensor) -> fx.Node:
        """Return a node with the layout of its value, and not the value."""
        node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return node

    def _follows(self, tensor: Tensor) -> bool:
        return tensor in self.following or (
            tensor in self.nodes and tensor.untyped_storage()._cdata in self.written
        )

    def _with_nodes(self, value: Any) -> Any:
        """Return an argument with nodes in the place of tensors."""
        if torch.is_tensor(value):
            node = self.nodes.get(value)
            if node is None:
                with self.graph.inserting_after(self.last):
                    node = self.graph.placeholder(f"constant_{len(self.constants)}")
                self.nodes[value] = self.last = node
                self.constants[node] = value
            return node
        if isinstance(value, list | tuple):
            return type(value)(self._with_nodes(each) for each in value)
        return value


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, and in lists among them."""
    for argument in arguments:
        if torch.is_tensor(argument):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


def _written(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """Return the arguments to which an operation writes."""
    pairs = zip(func._schema.arguments, args, strict=False)
    return [
        value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write
    ]
