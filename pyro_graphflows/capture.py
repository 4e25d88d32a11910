"""What captured programs need: their noise, what they may ask tensors, and how they are run.

A Pyro program spends most of a step of training in Python. Written down as a graph of tensor operations
(:mod:`pyro_graphflows.recording`) it is one function of tensors and of the random numbers (*noise*) that it draws.
Noise makes a run repeatable: :class:`Draws` gives a program the random numbers it is handed, so the captured function
and the program itself can be compared at the same noise. :func:`scripted` lets PyTorch's interpreter run the graph.
"""

import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_graphflows.errors import GraphflowsError

__all__ = [
    "CAPTURING",
    "Captured",
    "Draws",
    "Noise",
    "NotCapturedError",
    "Operations",
    "is_compared",
    "is_kept",
    "keeping",
    "known_answer",
    "left_unchecked",
    "place_in_program",
    "require_fixed_shape",
    "scripted",
    "unchecked",
    "uncovered",
]

CAPTURING: ContextVar[bool] = ContextVar("capturing", default=False)
"""Whether a program is being captured: checks that read numbers out of tensors have to be left out."""

_KEPT: ContextVar[Callable[[Tensor], bool] | None] = ContextVar("kept", default=None)

_UNCHECKED: ContextVar[list[Tensor] | None] = ContextVar("unchecked", default=None)

_TORCH, _PACKAGE = str(Path(torch.__file__).parent), str(Path(__file__).parent)
_SITES = str(Path(torch.__file__).parent.parent)
_RECORDING = str(Path(__file__).parent / "recording.py")  # which runs programs,
_BEGINNINGS = ("capture", "record")  # in these functions
_HIDDEN = (__file__, _RECORDING, "<string>")


class NotCapturedError(GraphflowsError):
    """A program is no graph of tensor operations; the message says why."""


def is_kept(value: Tensor) -> bool:
    """Whether a tensor has the same value in each call of what is being captured: its numbers may be read.

    Args:
        value: A tensor.
    """
    answer = _KEPT.get()
    return answer is not None and answer(value)


@contextmanager
def keeping(answer: Callable[[Tensor], bool]) -> Iterator[None]:
    """Say which tensors keep their values (:func:`is_kept`), and that a program is being captured.

    Args:
        answer: Whether a tensor does.
    """
    tokens = CAPTURING.set(True), _KEPT.set(answer)
    try:
        yield
    finally:
        CAPTURING.reset(tokens[0])
        _KEPT.reset(tokens[1])


def left_unchecked(values: Tensor) -> bool:
    """Whether a check that values are finite is left out, as a program is being captured.

    Args:
        values: The values. Who captures may ask for them (:func:`unchecked`).
    """
    noted = _UNCHECKED.get()
    if CAPTURING.get() and noted is not None:
        noted.append(values)
    return CAPTURING.get()


@contextmanager
def unchecked() -> Iterator[list[Tensor]]:
    """Give the values of which a captured program does not check that they are finite."""
    noted: list[Tensor] = []
    token = _UNCHECKED.set(noted)
    try:
        yield noted
    finally:
        _UNCHECKED.reset(token)


@contextmanager
def uncovered() -> Iterator[None]:
    """Raise a :class:`NotCapturedError` as it was, where a program has put it into an error of its own."""
    try:
        yield
    except NotCapturedError:
        raise
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None:
            if isinstance(inner, NotCapturedError):
                raise inner from error
            inner = inner.__cause__ or inner.__context__
        raise


# --------------------------------------------------------------------------------------------------------- noise
class Noise(NamedTuple):
    """A kind of random numbers.

    Attributes:
        kind: ``"normal"``, or ``"uniform"`` in [0, 1).
        dtype: Their type.
        device: Where they are.
    """

    kind: str
    dtype: torch.dtype
    device: torch.device

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Return fresh numbers."""
        make = torch.randn if self.kind == "normal" else torch.rand
        return make(list(shape), dtype=self.dtype, device=self.device)


class Draws(TorchDispatchMode):
    """Give a program its random numbers, or count them.

    Every random operation of torch that is a function of normal or uniform numbers takes them from here, in the order
    in which the program asks. The distributions are the same; the numbers are not those that the generator gives
    without this mode.

    Args:
        given: One flat tensor for each kind of noise; None for fresh numbers.

    Attributes:
        counts: How many numbers of each kind have been taken.
        taken: What was taken, in order: with the generator in the same state, fresh numbers of these kinds and shapes
            are those that the program draws without this mode (normal and uniform ones).

    Raises:
        NotCapturedError: If the program draws in another way, or more numbers than are given.

    Example:
        >>> with Draws() as draws:
        ...     _ = torch.randn(3), torch.rand(2), torch.bernoulli(torch.ones(4))
        >>> [(noise.kind, count) for noise, count in draws.counts.items()]
        [('normal', 3), ('uniform', 6)]
    """

    def __init__(self, given: Mapping[Noise, Tensor] | None = None) -> None:
        super().__init__()
        self.given = given
        self.counts: dict[Noise, int] = {}
        self.taken: list[tuple[Noise, torch.Size]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer PyTorch, which would import its compiler, only to disable it here."""
        return False

    def fresh(self) -> dict[Noise, Tensor]:
        """Return as many fresh numbers as have been taken."""
        return {noise: noise.draw([count]) for noise, count in self.counts.items()}

    def _take(self, kind: str, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        shape = like.shape if shape is None else torch.Size(shape)
        dtype = like.dtype if like.dtype.is_floating_point else torch.get_default_dtype()
        noise = Noise(kind, dtype, like.device)
        start, count = self.counts.get(noise, 0), math.prod(shape)
        self.counts[noise] = start + count
        self.taken.append((noise, torch.Size(shape)))
        if self.given is None:
            return noise.draw(shape)
        flat = self.given.get(noise)
        if flat is None or start + count > flat.numel():
            raise NotCapturedError("it draws more random numbers than in the call that was captured")
        return flat[start : start + count].reshape(shape)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and CAPTURING.get():
            answer = known_answer()
            if answer is not None:
                return answer
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        draw = _DRAWS.get(name)
        if draw is None or kwargs.get("generator") is not None:
            raise NotCapturedError(
                f"it draws by torch's {name}, which is no function of uniform or normal numbers"
                if draw is None
                else f"it draws by {name} with a generator of its own"
            )
        return draw(self._take, func, args, kwargs)


Take = Callable[..., Tensor]


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operation by name, with defaults."""
    named = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            named[argument.name] = args[i]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named


def _empty(named: dict[str, Any], shape: Any = None) -> Tensor:
    """Return an empty tensor of the type and device that an operation is asked for."""
    like = named.get("self")
    options = {key: named[key] for key in ("dtype", "device") if named.get(key) is not None}
    if torch.is_tensor(like):
        return torch.empty(like.shape, **{"dtype": like.dtype, "device": like.device, **options})
    return torch.empty(named["size"] if shape is None else shape, **options)


def _fresh(kind: str) -> Callable[..., Tensor]:
    def draw(take: Take, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return take(kind, _empty(_bound(func, args, kwargs)))

    return draw


def _in_place(formula: Callable[..., Tensor], kind: str) -> Callable[..., Tensor]:
    """Return how an operation on a tensor draws: ``formula`` of noise and of the named arguments."""

    def draw(take: Take, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        named = _bound(func, args, kwargs)
        out: Tensor = named["self"]
        value = formula(take(kind, out), named)
        if func._schema.name.endswith("_"):
            return out.copy_(value)
        return value.to(out.dtype)

    return draw


def _normal(take: Take, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    named = _bound(func, args, kwargs)
    mean, std = named["mean"], named["std"]
    if "size" in named:  # numbers for all
        return take("normal", _empty(named)) * std + mean
    first = mean if torch.is_tensor(mean) else std
    shape = torch.broadcast_shapes(*(part.shape for part in (mean, std) if torch.is_tensor(part)))
    return take("normal", first, shape) * std + mean


def _bernoulli(noise: Tensor, named: dict[str, Any]) -> Tensor:
    p = named.get("p")
    return (noise < (named["self"] if p is None else p)).to(named["self"].dtype)


def _multinomial(take: Take, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Draw classes by the largest of log-probabilities with Gumbel noise."""
    named = _bound(func, args, kwargs)
    p, count, replacement = named["self"], named["num_samples"], named["replacement"]
    if count == 1 or replacement:
        u = take("uniform", p, (*p.shape[:-1], count, p.shape[-1]))
        return (p.log()[..., None, :] - (-u.log()).log()).argmax(-1)
    return (p.log() - (-take("uniform", p).log()).log()).topk(count, -1).indices


def _randperm(take: Take, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    named = _bound(func, args, kwargs)
    like = torch.empty(0, device=named.get("device"))
    return take("uniform", like, (named["n"],)).argsort()


def _affine(noise: Tensor, named: dict[str, Any]) -> Tensor:
    return noise * named["std"] + named["mean"]


def _between(noise: Tensor, named: dict[str, Any]) -> Tensor:
    low, high = named["from"], named["to"]
    return noise * (high - low) + low


_DRAWS: dict[str, Callable[..., Tensor]] = {
    "randn": _fresh("normal"),
    "randn_like": _fresh("normal"),
    "rand": _fresh("uniform"),
    "rand_like": _fresh("uniform"),
    "normal_": _in_place(_affine, "normal"),
    "normal_functional": _in_place(_affine, "normal"),
    "normal": _normal,
    "uniform_": _in_place(_between, "uniform"),
    "uniform": _in_place(_between, "uniform"),
    "exponential_": _in_place(lambda noise, named: -torch.log1p(-noise) / named["lambd"], "uniform"),
    "cauchy_": _in_place(
        lambda noise, named: torch.tan(math.pi * (noise - 0.5)) * named["sigma"] + named["median"], "uniform"
    ),
    "bernoulli": _in_place(_bernoulli, "uniform"),
    "bernoulli_": _in_place(_bernoulli, "uniform"),
    "multinomial": _multinomial,
    "randperm": _randperm,
}


# ------------------------------------------------------------------------------------------------------- questions
# Questions to tensors that have an answer good for all values: no warning of NaN, which the caller watches for; no
# values left out of a sum, which are zeros; a branch for tails, chosen element by element.
_ANSWERS = {
    ("pyro.util", "warn_if_nan"): False,
    ("pyro.util", "warn_if_inf"): False,
    ("pyro.infer.util", "compute_expectation"): True,
    ("pyro_graphflows.distributions.normal_tails", "forward"): True,
}


def known_answer() -> bool | None:
    """Return the answer to the question that is being asked, if it is one of those above."""
    frame = sys._getframe(2)
    for _ in range(12):
        answer = _ANSWERS.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        if answer is not None or frame.f_back is None:
            return answer
        frame = frame.f_back
    return None


def require_fixed_shape(func: Any, args: tuple[Any, ...], changes: Callable[[Tensor], bool]) -> None:
    """Refuse an operation whose shape depends on the values of tensors that change from call to call.

    Args:
        func: The operation, one whose shape depends on values.
        args: Its arguments.
        changes: Whether a tensor is one of these.

    Raises:
        NotCapturedError: If it is so.
    """
    by_index = func._schema.name == "aten::index"
    parts = [part for part in (args[1] if by_index else args) if torch.is_tensor(part)]
    if by_index:
        parts = [part for part in parts if part.dtype in (torch.bool, torch.uint8)]
    if any(changes(part) for part in parts):
        raise NotCapturedError(
            f"the shape of {func._schema.name.removeprefix('aten::')} depends on values{place_in_program()}; "
            "torch.where and masks keep shapes"
        )


def place_in_program(stack: Sequence[traceback.FrameSummary] | None = None) -> str:
    """Return where a program is: in the user's code, else in this package or Pyro, else in torch."""
    stack = traceback.extract_stack() if stack is None else stack
    starts = [
        i for i, entry in enumerate(stack) if entry.filename == _RECORDING and entry.name in _BEGINNINGS
    ]
    entries = [e for e in reversed(stack[max(starts, default=-1) + 1 :]) if e.filename not in _HIDDEN]
    for hidden in ((_SITES, _PACKAGE), (_TORCH,), ()):
        for entry in entries:
            if not entry.filename.startswith(hidden):
                return f" ({entry.filename}:{entry.lineno}: `{(entry.line or '').strip()}`)"
    return ""


class Operations(torch.fx.GraphModule):
    """A graph of operations as a module whose Python code is made when it is first run: most are only read."""

    def recompile(self) -> Any:
        """Leave the code for later."""

    def forward(self, *args: Tensor) -> Any:
        """Make the code, and run it from here on."""
        super().recompile()
        return self(*args)


@dataclass(frozen=True)
class Captured:
    """A program as a function of tensors.

    Attributes:
        graph: The operations: a module of ``(*inputs, *noise, *constants)`` that returns a tuple of tensors.
        noise: How many random numbers of each kind it takes, in the order of its arguments.
        constants: The other tensors that it reads, as they are at each call.
        num_operations: The number of operations, by which the time of compiling goes.
    """

    graph: torch.fx.GraphModule
    noise: dict[Noise, int]
    constants: tuple[Tensor, ...]
    num_operations: int

    def draw(self) -> tuple[Tensor, ...]:
        """Return fresh noise."""
        return tuple(noise.draw([count]) for noise, count in self.noise.items())

    def arguments(self, inputs: Sequence[Tensor], noise: Sequence[Tensor]) -> list[Tensor]:
        """Return all arguments of :attr:`graph`."""
        return [*inputs, *noise, *self.constants]

    def at(self, noise: Sequence[Tensor]) -> Draws:
        """Return what gives the program itself some noise of :meth:`draw`."""
        return Draws(dict(zip(self.noise, noise, strict=True)))


# ------------------------------------------------------------------------------------------------------- running
def is_compared(calls: int) -> bool:
    """Whether captured code is compared with the program in this call: 1, 2, 4, 8, ..."""
    return calls & (calls - 1) == 0


def scripted(graph: torch.fx.GraphModule, arguments: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Return a graph of operations as a function that PyTorch's interpreter (TorchScript) runs.

    What :func:`torch.jit.trace` returns stays in memory for the life of the process, megabytes of it for a thousand
    operations; this function goes with its last reference.

    Args:
        graph: The graph: of tensors, to a tuple of tensors.
        arguments: Arguments of the shapes and types to come.
    """
    typed = _with_typed_numbers(graph, arguments)  # the interpreter has one zero, whatever its sign
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constants in the graph, which are meant
        traced, _ = torch._C._create_graph_by_tracing(
            lambda *inputs: tuple(typed(*inputs)), list(arguments), lambda _: "", True, False
        )
    function: Callable[..., tuple[Tensor, ...]] = torch._C._create_function_from_graph("captured", traced)
    return function


_EXACT = torch.float32, torch.float64  # those of half precision combine with a number in single precision
_BY_NUMBER = ("mul", "div", "add", "sub", "lt", "le", "gt", "ge", "eq", "ne")


def _with_typed_numbers(graph: torch.fx.GraphModule, arguments: Sequence[Tensor]) -> torch.fx.GraphModule:
    """Return a graph in which numbers that a tensor is combined with are tensors of its type.

    A number of Python is one of double precision, which an operation on a tensor of single precision converts at each
    call; that takes as long as the operation on a few elements.
    """
    own = torch.fx.Graph()
    own.output(own.graph_copy(graph.graph, {}))
    found = {
        str(node.target): getattr(graph, str(node.target)) for node in own.nodes if node.op == "get_attr"
    }
    names: dict[tuple[torch.dtype, str], str] = {}
    given = [node for node in own.nodes if node.op == "placeholder"]
    for node, argument in zip(given, arguments, strict=True):
        node.meta |= {"val": argument, "device": argument.device}

    def typed(node: torch.fx.Node, number: float, dtype: torch.dtype) -> torch.fx.Node:
        name = names.setdefault((dtype, repr(number)), f"number_{len(names)}")
        found.setdefault(name, torch.tensor(number, dtype=dtype))
        with own.inserting_before(node):
            return own.create_node("get_attr", name)

    for node in own.nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("aten::")
        first: Any = node.args[0] if node.args else None
        value = first.meta.get("val") if isinstance(first, torch.fx.Node) else None
        if not isinstance(value, Tensor) or value.dtype not in _EXACT or first.meta["device"].type != "cpu":
            continue  # other devices take a number with the call
        by_number = len(node.args) == 2 and isinstance(node.args[1], int | float)
        if name in _BY_NUMBER and by_number:
            node.args = first, typed(node, float(node.args[1]), value.dtype)
            node.target = getattr(torch.ops.aten, name).Tensor
        elif name == "rsub" and by_number:
            node.args = typed(node, float(node.args[1]), value.dtype), first
            node.target = torch.ops.aten.sub.Tensor
        elif name == "clamp" and not any(isinstance(bound, torch.fx.Node) for bound in node.args[1:]):
            bounds = [None if b is None else typed(node, float(b), value.dtype) for b in node.args[1:]]
            node.args = first, *bounds
            node.target = torch.ops.aten.clamp.Tensor
    return torch.fx.GraphModule(found, own)
