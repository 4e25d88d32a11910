"""A captured program that can be differentiated: a forward and a backward function of tensors, run by TorchScript.

A program that is followed by autograd is a few hundred calls of Python and as many nodes of a graph, even where its
arithmetic takes microseconds. :func:`capture_with_gradients` captures it once together with its gradients, as one
function of parameters, data, noise and *cotangents* (the gradients of a loss by its results). What depends on no
cotangent is the forward function, whose intermediate values are kept for the other, the backward function. For autograd
the whole program is a single node.

Gradients by intermediate results are lost: a result counts as a function of the parameters alone, even where the
program computes it from an earlier one.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pyro_graphflows.capture import Captured, Noise, NotCapturedError, Operations, scripted
from pyro_graphflows.recording import capture

__all__ = ["CapturedGradients", "Result", "capture_with_gradients", "simplified"]

Again = Callable[[], Sequence[Tensor]]

optimized_execution: Any = torch.jit.optimized_execution  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Result:
    """A result of a program.

    Attributes:
        tensor: The result, with its gradients.
        equal: Another tensor of the same value, whose gradients may be others; it may cost less. None for itself.
        followed: Whether gradients come by it as a rule; if not, they come by running the program again.
    """

    tensor: Tensor
    equal: Tensor | None = None
    followed: bool = True

    @property
    def is_learned(self) -> bool:
        """Whether its gradients are captured."""
        return self.followed and self.tensor.requires_grad


Program = Callable[[], Sequence[Result]]


class CapturedGradients:
    """A captured program as a function that autograd knows; made by :func:`capture_with_gradients`.

    Args:
        forward: From parameters, data, noise and constants to the results and to what is kept.
        backward: From what is kept and the cotangents to the gradients.
        constants: The constants.
        zeros: For each result a cotangent of zeros; None where its gradients are not captured.
        used: Which parameters have a gradient.
        fixed: The positions of results without gradients.
        again: The positions of results that are the same tensor as an earlier one.
        num_operations: The number of operations of both.
    """

    def __init__(
        self,
        forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., tuple[Tensor, ...]],
        constants: Sequence[Tensor],
        zeros: Sequence[Tensor | None],
        used: Sequence[bool],
        fixed: Sequence[int],
        again: Sequence[int],
        num_operations: int,
    ) -> None:
        self.forward, self.backward = forward, backward
        self.constants, self.zeros, self.used = tuple(constants), tuple(zeros), tuple(used)
        self.fixed, self.again = tuple(fixed), tuple(again)
        self.num_operations = num_operations

    def __call__(
        self, parameters: Sequence[Tensor], others: Sequence[Tensor], again: Again
    ) -> tuple[Tensor, ...]:
        """Return the results.

        Args:
            parameters: The parameters.
            others: Data, then noise.
            again: Run the program itself at the same noise, for gradients that are not captured: those by other
                results, and those of gradients.
        """
        results: tuple[Tensor, ...] = _Node.apply(self, others, again, *parameters)
        return results


class _Node(torch.autograd.Function):
    """The node of a captured program in the graph of autograd."""

    @staticmethod
    def forward(
        ctx: Any, captured: CapturedGradients, others: Sequence[Tensor], again: Again, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        with optimized_execution(False):  # no runs that only collect statistics
            found = captured.forward(*parameters, *others, *captured.constants)
        zeros = captured.zeros
        ctx.captured, ctx.again, ctx.parameters = captured, again, parameters
        ctx.save_for_backward(*found[len(zeros) :])
        ctx.set_materialize_grads(False)
        results = list(found[: len(zeros)])
        for position in captured.again:
            results[position] = results[position].detach()
        ctx.mark_non_differentiable(*(results[position] for position in captured.fixed))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        captured, kept = ctx.captured, ctx.saved_tensors
        unusual = any(
            one is not None and zero is None for one, zero in zip(given, captured.zeros, strict=True)
        )
        if unusual or torch.is_grad_enabled():
            return (None, None, None, *_gradients(ctx.again(), ctx.parameters, given))
        cotangents = [
            zero if one is None else one.contiguous()
            for one, zero in zip(given, captured.zeros, strict=True)
            if zero is not None
        ]
        with optimized_execution(False):
            found = iter(captured.backward(*kept, *cotangents))
        return (None, None, None, *(next(found) if used else None for used in captured.used))


def _gradients(
    results: Sequence[Tensor], parameters: Sequence[Tensor], given: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of results of a program; they have gradients themselves if these are followed."""
    pairs = [(r, g) for r, g in zip(results, given, strict=True) if g is not None and r.requires_grad]
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    if not pairs:
        return tuple(None for _ in parameters)
    follow = torch.is_grad_enabled()
    with torch.enable_grad():
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs], learned, [g for _, g in pairs], create_graph=follow, allow_unused=True
            )
        )
    return tuple(next(found) if parameter.requires_grad else None for parameter in parameters)


def capture_with_gradients(
    program: Program,
    parameters: Sequence[Tensor],
    data: Sequence[Tensor],
    counts: Mapping[Noise, int],
    fixed: Sequence[Tensor] = (),
) -> CapturedGradients:
    """Capture a program together with its gradients.

    Args:
        program: The program. It reaches parameters and data by itself.
        parameters: All leaves that gradients are wanted of, and others.
        data: Other tensors that change from call to call.
        counts: How many random numbers of each kind it draws.
        fixed: Tensors that keep their values from here on: what follows from them alone is computed once.

    Raises:
        NotCapturedError: If it cannot be captured, or has gradients by other tensors than the parameters.

    Example:
        >>> weight, x = torch.ones(2, requires_grad=True), torch.tensor([1.0, 2.0])
        >>> captured = capture_with_gradients(lambda: [Result((weight * x).sin().sum())], [weight], [x], {})
        >>> (total,) = captured([weight], [torch.zeros(2)], list)
        >>> total.backward()
        >>> weight.grad.tolist()
        [0.0, 0.0]
    """
    first = program()
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    _require_leaves(first, learned)
    like = [torch.ones_like(r.tensor) if r.is_learned else None for r in first]
    cotangents = [one for one in like if one is not None]
    if not cotangents:
        raise NotCapturedError("no result has a gradient")
    inputs = [*parameters, *data, *cotangents]
    used: list[bool] = []

    def joint(*flat: Tensor) -> list[Tensor]:
        results = program()
        followed = [r.tensor for r in results if r.is_learned]
        given = flat[len(parameters) + len(data) :]
        gradients = torch.autograd.grad(followed, learned, given, allow_unused=True)
        of_learned = iter(gradients)
        used[:] = [p.requires_grad and next(of_learned) is not None for p in parameters]
        values = [r.tensor if r.equal is None else r.equal for r in results]
        return [*(value.detach() for value in values), *(g for g in gradients if g is not None)]

    captured = capture(joint, inputs, counts)
    if any(constant.requires_grad for constant in captured.constants):
        raise NotCapturedError("it reads parameters that are not its own")
    first_cotangent = len(parameters) + len(data)
    halves = _Halves(captured, range(first_cotangent, len(inputs)), len(first))
    noise = captured.draw()
    plain = [t.detach() for t in (*parameters, *data, *noise, *captured.constants)]
    known = {id(tensor) for tensor in fixed}
    are_fixed = [
        bool(known & {id(each), id(each._base)}) for each in captured.constants
    ]  # views of them, too
    halves.simplify([*plain[:first_cotangent], *cotangents, *plain[first_cotangent:]], are_fixed)
    forward_graph, backward_graph = halves.split()
    parts = [node for half in (forward_graph, backward_graph) for node in half.graph.nodes]
    num_operations = sum(node.op == "call_function" for node in parts)
    forward, found = _scripted(forward_graph, plain)
    owned = {t.untyped_storage().data_ptr() for t in plain}
    if any(value.untyped_storage().data_ptr() in owned for value in found[: len(first)] if value.numel()):
        raise NotCapturedError("a result is part of a tensor that is given")
    backward, _ = _scripted(backward_graph, [*found[len(first) :], *cotangents])
    zeros = [None if one is None else torch.zeros_like(one) for one in like]
    without = [i for i, r in enumerate(first) if not r.tensor.requires_grad]
    places = [id(value) for value in found[: len(first)]]
    repeated = [i for i, place in enumerate(places) if place in places[:i]]
    return CapturedGradients(
        forward, backward, captured.constants, zeros, used, without, repeated, num_operations
    )


def simplified(captured: Captured, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Return a captured program with all but its inputs fixed, as a function of the same arguments.

    Operations without effect, repeated ones, and those on constants are left out; so is what stops gradients.

    Args:
        captured: The program, without noise.
        inputs: Its inputs.
    """
    halves = _Halves(captured, range(0), 0)
    halves.simplify([*inputs, *(t.detach() for t in captured.constants)], [True] * len(captured.constants))
    (output,) = (node for node in halves.graph.nodes if node.op == "output")
    return halves.function(halves.arguments, list(halves.graph.nodes), output.args[0])


def _require_leaves(results: Sequence[Result], learned: Sequence[Tensor]) -> None:
    """Refuse results with gradients by other leaves than those that are known."""
    known = {id(parameter) for parameter in learned}
    waiting: list[Any] = [r.tensor.grad_fn for r in results if r.tensor.grad_fn is not None]
    if any(r.tensor.is_leaf and r.tensor.requires_grad for r in results):
        raise NotCapturedError("a result is a parameter")
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise NotCapturedError("it has gradients by tensors that are no parameters of its own")
        further = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= further
        waiting += further


def _scripted(
    graph: fx.GraphModule, arguments: Sequence[Tensor]
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return a function of TorchScript, and what it gives."""
    with torch.no_grad(), optimized_execution(False):
        try:
            function = scripted(graph, arguments)
            found = function(*arguments)
        except Exception as error:
            # A compiler may fail in ways of its own; none of them may end a training run.
            raise NotCapturedError(f"TorchScript could not run it ({type(error).__name__})") from error
    return function, found


# ---------------------------------------------------------------------------------------------- graphs of operations
_SAME = ("detach", "alias", "lift_fresh", "lift_fresh_copy")
_OWN_INVERSE = ("neg", "t")
_WITHOUT_EFFECT = {("mul", 1), ("div", 1), ("pow", 1), ("add", 0), ("sub", 0)}
_IN_ORDER = ("view", "squeeze", "unsqueeze")  # shapes change, the order of elements does not
_LARGEST_CONSTANT = 100_000  # elements
_RESHAPING = ("expand", "_unsafe_view", "slice", "permute", "clone", "_to_copy")


class _Halves:
    """The graph of a captured program and its gradients, made smaller, and cut in two.

    Args:
        captured: The program.
        cotangents: The positions of the cotangents among its arguments.
        num_results: How many of its outputs are results; the others are gradients.
    """

    def __init__(self, captured: Captured, cotangents: range, num_results: int) -> None:
        self.graph = captured.graph.graph
        self.arguments = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.cotangents = [self.arguments[i] for i in cotangents]
        self.num_results = num_results
        self.constants: dict[fx.Node, Tensor] = {}
        self._writes = self._find_writes()

    def _find_writes(self) -> list[tuple[fx.Node, set[fx.Node]]]:
        """Return the operations that write in place, each with all tensors that share memory with what is written."""
        return [(node, _sharing(_written_by(node))) for node in self.graph.nodes if _written_by(node)]

    def simplify(self, values: Sequence[Tensor], are_fixed: Sequence[bool]) -> None:
        """Leave out operations without effect, all but the first of several equal ones, and those on constants.

        Args:
            values: Values of the arguments.
            are_fixed: For each of the last arguments, whether its value stays as it is.
        """
        for node, value in zip(self.arguments, values, strict=True):
            node.meta |= {"val": value, "device": value.device}
        first = len(values) - len(are_fixed)
        pairs = zip(self.arguments[first:], are_fixed, strict=True)
        self.constants = {node: node.meta["val"] for node, is_fixed in pairs if is_fixed}
        for node in list(self.graph.nodes):
            source = _filled_from(node)
            if source is None:
                continue
            others = {each for write, sharing in self._writes if write is not node for each in sharing}
            if others.isdisjoint((node, source)):
                node.replace_all_uses_with(source)
                self.graph.erase_node(node)
                self._writes = [pair for pair in self._writes if pair[0] is not node]
        written = {node for _, sharing in self._writes for node in sharing}
        for node in self.graph.nodes:
            if _name(node) == "stack" and written.isdisjoint((node, *node.all_input_nodes)):
                _unstack(node)
        changed = True
        while changed:
            changed = False
            seen: dict[str, fx.Node] = {}
            for node in list(self.graph.nodes):
                if node.op != "call_function" or node in self.constants:
                    continue
                if written & {node, *node.all_input_nodes}:
                    continue
                other = _same_as(node)
                if other is None:
                    other = seen.setdefault(repr((node.target, node.args, sorted(node.kwargs.items()))), node)
                if other is not node:
                    node.replace_all_uses_with(other)
                    self.graph.erase_node(node)
                    changed = True
                elif all(each in self.constants for each in node.all_input_nodes):
                    value = _evaluated(node, self.constants)
                    if not torch.is_tensor(value) or value.numel() <= _LARGEST_CONSTANT:
                        self.constants[node] = value
            self.graph.eliminate_dead_code()

    def _late(self) -> set[fx.Node]:
        """Return what depends on cotangents: by its arguments, or since it is written to later on."""
        late, size = set(self.cotangents), 0
        while len(late) > size:
            size = len(late)
            for node in self.graph.nodes:
                if node.op == "call_function" and late.intersection(node.all_input_nodes):
                    late.add(node)
            for write, sharing in self._writes:
                if write in late and sharing.isdisjoint(self.arguments):
                    late |= sharing
        return late

    def _require_order_of_writes(self, late: set[fx.Node]) -> None:
        """Refuse writes that would come at another time, as seen by others, where the backward function runs last.

        Args:
            late: The nodes of the backward function.
        """
        places = {node: place for place, node in enumerate(self.graph.nodes)}
        for write, sharing in self._writes:
            readers = {user for node in sharing for user in node.users if user in late}
            if write in late:
                fine = sharing <= late
            else:
                fine = all(places[reader] > places[write] for reader in readers)
            if not fine:
                raise NotCapturedError("gradients need a tensor that is written to in place later")

    def split(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Return the forward function, whose outputs are the results and what is kept, and the backward function.

        Raises:
            NotCapturedError: If a tensor is written to in place by one of them while the other needs it.
        """
        late = self._late()
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        results, gradients = output.args[0][: self.num_results], output.args[0][self.num_results :]
        needed = [n for node in self.graph.nodes if node in late for n in node.all_input_nodes]
        early = [node for node in (*needed, *gradients) if node not in late]
        kept = list(dict.fromkeys(node for node in early if not self._is_constant(node)))
        if late.intersection(results):
            raise NotCapturedError("a result depends on the gradients")
        if not all(torch.is_tensor(node.meta.get("val")) for node in kept):
            raise NotCapturedError("gradients need what is no tensor")
        self._require_order_of_writes(late)
        given = [node for node in self.arguments if node not in late]
        forward = self.function(given, [n for n in self.graph.nodes if n not in late], [*results, *kept])
        return forward, self.function([*kept, *self.cotangents], list(self.graph.nodes), gradients)

    def _is_constant(self, node: fx.Node) -> bool:
        return torch.is_tensor(self.constants.get(node)) and node.op == "call_function"

    def function(
        self, arguments: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
    ) -> fx.GraphModule:
        """Return a function of some nodes of the graph, all between them and the outputs being among ``nodes``."""
        graph, own, root = fx.Graph(), {}, torch.nn.Module()
        for i, node in enumerate(arguments):
            own[node] = graph.placeholder(f"argument_{i}")
        needed, waiting = set(outputs), list(outputs)
        while waiting:
            node = waiting.pop()
            if node in own or self._is_constant(node):
                continue
            writes = [write for write, sharing in self._writes if node in sharing]
            further = {*node.all_input_nodes, *writes} - needed
            needed |= further
            waiting += further
        for node in nodes:
            if node in needed and node not in own and node.op == "call_function":
                if self._is_constant(node):
                    root.register_buffer(name := f"constant_{len(own)}", self.constants[node])
                    own[node] = graph.get_attr(name)
                else:
                    own[node] = graph.node_copy(node, own.__getitem__)
        graph.output(tuple(own[node] for node in outputs))
        return Operations(root, graph)


def _written_by(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that an operation writes to in place."""
    return _arguments_where(node, lambda alias: alias is not None and alias.is_write)


def _shared_by(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that a result may share memory with."""
    if node.op == "call_function" and not hasattr(node.target, "_schema"):  # getitem
        return list(node.all_input_nodes)
    return _arguments_where(node, lambda alias: alias is not None)


def _arguments_where(node: fx.Node, is_wanted: Callable[[Any], bool]) -> list[fx.Node]:
    """Return the arguments of an operation whose entry in its schema on shared memory is wanted."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    given = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    given.update(node.kwargs)
    found: list[fx.Node] = []
    for argument in schema.arguments:
        if argument.name in given and is_wanted(argument.alias_info):
            fx.map_arg(given[argument.name], found.append)
    return found


def _sharing(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the tensors that may share memory with some, and these."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [user for user in node.users if node in _shared_by(user)]
            waiting += _shared_by(node)
    return found


def _same_as(node: fx.Node) -> fx.Node | None:
    """Return the node that has the same value as this one, which is left out then."""
    first = node.args[0] if node.args else None
    if _name(node) == "cat" and isinstance(first, list | tuple) and len(first) == 1:
        first = first[0]
        return first if isinstance(first, fx.Node) else None
    if _name(node) in _IN_ORDER:
        return _before_reshaping(node)
    if not isinstance(first, fx.Node) or node.target is operator.getitem:
        return None
    name = _name(node)
    if name in _SAME:
        return first
    if name in _OWN_INVERSE and first.target is node.target:
        inner = first.args[0]
        return inner if isinstance(inner, fx.Node) else None
    by_number = len(node.args) == 2 and isinstance(node.args[1], int | float)
    may_be_same = name in _RESHAPING or (by_number and (name, node.args[1]) in _WITHOUT_EFFECT)
    return first if may_be_same and _has_layout_of(first, node) else None


def _before_reshaping(node: fx.Node) -> fx.Node | None:
    """Return a tensor of the same elements in the same layout from which one was made by changes of shape alone."""
    source: Any = node
    while _name(source) in _IN_ORDER and isinstance(source.args[0], fx.Node):
        source = source.args[0]
        if _has_layout_of(source, node):
            found: fx.Node = source
            return found
    return None


def _has_layout_of(node: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes are tensors of the same shape, type and layout on the same device."""
    one, two = node.meta.get("val"), other.meta.get("val")
    if not (torch.is_tensor(one) and torch.is_tensor(two)) or node.meta["device"] != other.meta["device"]:
        return False
    if one.layout != torch.strided or two.layout != torch.strided:
        return False
    return (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)


def _filled_from(node: fx.Node) -> fx.Node | None:
    """Return the values with which a fresh tensor is filled by this operation, if that is all that happens to it."""
    if _name(node) != "copy_" or len(node.args) != 2:
        return None
    target, source = node.args
    if not isinstance(target, fx.Node) or not isinstance(source, fx.Node) or _name(target) != "empty":
        return None
    return source if _has_layout_of(source, node) and list(target.users) == [node] else None


def _unstack(node: fx.Node) -> None:
    """Let a stack of a single tensor be this tensor with one more dimension."""
    parts, *dim = node.args
    if isinstance(parts, list | tuple) and len(parts) == 1:
        node.args = (parts[0], *(dim or (0,)))
        node.target = torch.ops.aten.unsqueeze.default


def _name(node: fx.Node) -> str:
    """Return the name of an operation, without that of its overload."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def _evaluated(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return the value of an operation."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
