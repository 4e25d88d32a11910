"""A program of torch as one graph of tensor operations, written down while it runs once.

:func:`capture` is for training: the graph is a function of the tensors given, of the random numbers (*noise*,
:mod:`pyro_graphflows.capture`), and of whatever other tensors the program reads (constants, which are read again in
each call). :func:`record` is for a search over points for data that stay as they are: what follows from other tensors
alone is computed once, while the program runs, and numbers may be read out of it.

What cannot be written down is refused with the reason: numbers read out of tensors that change, on which Python code
could depend, shapes that depend on their values, and draws that are no function of uniform or normal noise. What is
written down is below autograd: of a program that goes backward, the operations of going forward and backward. No part
of PyTorch's compiler is needed, whose import takes seconds.
"""

import math
import operator
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_graphflows.capture import (
    Captured,
    Draws,
    Noise,
    NotCapturedError,
    Operations,
    keeping,
    known_answer,
    place_in_program,
    require_fixed_shape,
    uncovered,
)

__all__ = ["capture", "record"]

_COPY = torch.ops.aten.lift_fresh_copy.default
_TO_ARRAYS = Tensor.tolist, Tensor.numpy, Tensor.__array__


def capture(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], counts: Mapping[Noise, int]
) -> Captured:
    """Write a program down as tensor operations.

    Args:
        function: The program: of tensors, to a sequence of tensors. It may go backward on the way, and draws random
            numbers as it likes. Whatever else it reads is taken as it is: Python values are fixed from here on, other
            tensors are read again at each call.
        inputs: The tensors to run it with; the program may reach the same tensors by other ways.
        counts: How many random numbers of each kind it draws, as :class:`~pyro_graphflows.capture.Draws` has counted
            them.

    Returns:
        The captured program.

    Raises:
        NotCapturedError: If it cannot be written down.

    Example:
        >>> x = torch.zeros(3)
        >>> captured = capture(lambda x: [(x + torch.randn(3)).sum()], [x], {Noise("normal", x.dtype, x.device): 3})
        >>> (total,) = captured.graph(torch.ones(3), torch.ones(3))
        >>> total.item()
        6.0
    """
    noise = {kind: kind.draw([count]) for kind, count in counts.items()}
    recorder = _Recorder([*inputs, *noise.values()], are_fixed=False)
    try:
        with keeping(recorder.is_kept), uncovered(), recorder, _Arrays(recorder), _Numbers(), Draws(noise):
            results = list(function(*inputs))
    except NotCapturedError:
        raise
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError) as error:
        place = place_in_program(traceback.extract_tb(error.__traceback__))
        raise NotCapturedError(f"{type(error).__name__}: {error}{place}") from error
    return recorder.captured(results, counts)


def record(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Captured:
    """Write a program down where all but its inputs keep their values.

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
    recorder = _Recorder(inputs, are_fixed=True)
    with keeping(recorder.is_kept), uncovered(), recorder, _Arrays(recorder):
        results = function(*inputs)
    return recorder.captured(results, {})


class _Numbers(TorchFunctionMode):
    """Keep ``x.item()`` a tensor, as numbers that are only added up may be; no tensor counts as all zeros or ones."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.item:
            if sys._getframe(1).f_code.co_name in ("is_identically_zero", "is_identically_one"):
                return math.nan  # equal to none of them
            return args[0].detach().reshape(())
        return func(*args, **(kwargs or {}))


class _Arrays(TorchFunctionMode):
    """Refuse lists and arrays of tensors that change, which torch makes without an operation that could be seen.

    Args:
        recorder: What knows which tensors change.
    """

    def __init__(self, recorder: "_Recorder") -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _TO_ARRAYS:
            self.recorder.require_kept(args[0])
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Writes operations down while they run.

    Args:
        inputs: What changes from call to call.
        are_fixed: Whether all other tensors keep their values. If not, what they are is read again in each call, and
            what follows from them changes as well.
    """

    def __init__(self, inputs: Sequence[Tensor], *, are_fixed: bool) -> None:
        super().__init__()
        self.are_fixed = are_fixed
        self.graph = fx.Graph()
        self.nodes: Any = WeakTensorKeyDictionary()
        self.following: Any = WeakTensorKeyDictionary()  # tensors that change from call to call
        self.outside: Any = WeakTensorKeyDictionary()  # tensors that the program found
        self.written: set[int] = set()  # memory to which what changes was written
        self.constants: dict[fx.Node, Tensor] = {}
        self.last: fx.Node | None = None
        for i, tensor in enumerate(inputs):
            self.nodes[tensor] = self.last = _noted(self.graph.placeholder(f"input_{i}"), tensor)
            self.following[tensor] = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer PyTorch, which would import its compiler, only to disable it here."""
        return False

    def captured(self, results: Sequence[Tensor], counts: Mapping[Noise, int]) -> Captured:
        """Return what has been written down.

        Args:
            results: The results of the function.
            counts: How many random numbers are among the inputs.
        """
        self.graph.output(tuple(self._with_nodes(list(results))))
        self.graph.eliminate_dead_code()
        module = Operations(torch.nn.Module(), self.graph)
        num_operations = sum(node.op == "call_function" for node in self.graph.nodes)
        return Captured(module, dict(counts), tuple(self.constants.values()), num_operations)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            answer = known_answer()
            if answer is not None:
                return answer
        with self:  # an operation that is made of others, if it comes here whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotCapturedError(f"it draws random numbers, by {name}{place_in_program()}")
        given = list(_tensors((args, tuple(kwargs.values()))))
        if func is torch.ops.aten.lift_fresh.default and not self.are_fixed:
            return self._lifted(given[0])
        # Fresh tensors may be written to later on.
        is_fresh = not given or name.startswith("new_") or name.endswith("_like")
        if self.are_fixed and not is_fresh and not any(tensor in self.nodes for tensor in given):
            return func(*args, **kwargs)
        follows = any(self._follows(tensor) for tensor in given)
        if torch.Tag.data_dependent_output in func.tags:
            for tensor in given:
                self.require_kept(tensor)
            return func(*args, **kwargs)
        if follows and torch.Tag.dynamic_output_shape in func.tags:
            require_fixed_shape(func, args, self._follows)
        written = list(_tensors(_written(func, args)))
        if self.are_fixed and any(tensor not in self.nodes for tensor in written):
            raise NotCapturedError(f"{name} writes to a tensor from outside{place_in_program()}")
        if not self.are_fixed:  # a tensor from outside may have another value in the next call
            follows = follows or any(tensor not in self.nodes or tensor in self.outside for tensor in given)
        nodes = self._with_nodes(list(args)), {key: self._with_nodes(value) for key, value in kwargs.items()}
        out = func(*args, **kwargs)
        node = self.graph.call_function(func, tuple(nodes[0]), nodes[1])
        if follows:
            self.written |= {_memory_of(tensor) for tensor in written}
        self._note_results(node, out, follows=follows)
        return out

    def _lifted(self, literal: Tensor) -> Tensor:
        """Return a tensor that the program has made of numbers of Python; each call makes it anew."""
        if literal.numel() == 1:
            options: dict[str, Any] = {"dtype": literal.dtype, "device": literal.device}
            number = [list(literal.shape), literal.item()]
            node = self.graph.call_function(torch.ops.aten.full.default, tuple(number), options)
        else:
            node = self.graph.call_function(_COPY, (self._constant(literal),))
        out: Tensor = _COPY(literal)
        self._note_results(node, out, follows=False)
        return out

    def _constant(self, value: Tensor) -> fx.Node:
        """Return the argument for a tensor that is no result."""
        with self.graph.inserting_after(self.last):
            node = self.graph.placeholder(f"constant_{len(self.constants)}")
        self.nodes[value] = self.last = node
        self.constants[node] = value
        return _noted(node, value)

    def _note_results(self, node: fx.Node, out: Any, *, follows: bool) -> None:
        if torch.is_tensor(out):
            self.nodes[out] = _noted(node, out)
            if follows:
                self.following[out] = True
        elif isinstance(out, list | tuple):
            for i, part in enumerate(out):
                if torch.is_tensor(part):
                    self._note_results(
                        self.graph.call_function(operator.getitem, (node, i)), part, follows=follows
                    )

    def require_kept(self, tensor: Tensor) -> None:
        """Refuse to read numbers out of a tensor that changes.

        Raises:
            NotCapturedError: If it is one.
        """
        if self._follows(tensor):
            raise NotCapturedError(
                "a number is read out of a tensor that changes from call to call, and Python code may depend on "
                f"it{place_in_program()}"
            )

    def is_kept(self, tensor: Tensor) -> bool:
        """Whether a tensor has the same value in each call."""
        is_known = self.are_fixed or (tensor in self.nodes and tensor not in self.outside)
        return is_known and not self._follows(tensor)

    def _follows(self, tensor: Tensor) -> bool:
        return tensor in self.following or (tensor in self.nodes and _memory_of(tensor) in self.written)

    def _with_nodes(self, value: Any) -> Any:
        """Return an argument with nodes in the place of tensors."""
        if torch.is_tensor(value):
            node = self.nodes.get(value)
            if node is None:
                self.outside[value] = True
                node = self._constant(value)
            return node
        if isinstance(value, list | tuple):
            return type(value)(self._with_nodes(each) for each in value)
        return value


def _noted(node: fx.Node, value: Tensor) -> fx.Node:
    """Return a node with the layout of its value, and not the value; of sparse tensors nothing is noted."""
    if value.layout == torch.strided:
        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        node.meta |= {"val": like, "device": value.device}
    return node


def _memory_of(tensor: Tensor) -> int:
    """Return what is the same for tensors that share memory."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


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
