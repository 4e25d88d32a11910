"""Training steps as compiled code: the loss of a model and a guide, captured once per shape of the data.

A step of training of a small model is Python, not arithmetic. :class:`CompiledLoss` runs the objective once under
:func:`~pyro_graphflows.recording.capture`, as one function of parameters, data and noise that returns the loss and all
gradients, and hands it to a compiler of torch. What cannot be captured is computed as without compilation, and
:attr:`CompiledLoss.report` has the reason. The mean loss and the gradients are the same, the random numbers are not.

*What is fixed.* Tensors are inputs: parameters, data, and others that the programs read. Python values are fixed when
the objective is captured: a model that changes them later (a weight of a divergence that rises with the steps, kept as
a Python number) would go on with the old ones. So the compiled function is compared with the programs themselves, at
the same noise, in calls 1, 2, 4, 8, ...: where they differ, it is given up, with the reason. Validation of
distributions' arguments is left out while compiled.
"""

import logging
import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_graphflows.capture import (
    Captured,
    Draws,
    Noise,
    NotCapturedError,
    is_compared,
    scripted,
    uncovered,
)
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.checkpoints import random_state, set_random_state
from pyro_graphflows.infer.objectives import Objective
from pyro_graphflows.infer.parameters import ParameterSet
from pyro_graphflows.infer.particles import Program
from pyro_graphflows.recording import capture

__all__ = ["CompiledLoss", "Compiler", "require_backend"]

logger = logging.getLogger(__name__)

Mode = bool | Literal["auto"]

SCRIPT = "torchscript"  # the captured operations one by one, by PyTorch's interpreter in the place of Python
BACKEND = "inductor"  # of compile=True
MOST_SHAPES = 4  # of data that are compiled; each takes tens of seconds
NUM_TIMED = 10  # steps without compilation, by which "auto" decides
LEAST_STEPS = 100  # that "auto" must expect: capturing takes as long as some 50
LEAST_EVALUATIONS = 100  # of a shape, before the loss alone is captured too


@dataclass(frozen=True)
class Cost:
    """Seconds that a backend is estimated to take, in ``"auto"``: a first part, and one for each operation.

    Attributes:
        building: To capture and compile.
        step: Of a step.
    """

    building: tuple[float, float]
    step: tuple[float, float]

    def total(self, num_operations: int, steps: float, *, is_built: bool) -> float:
        """Return the seconds of a number of steps, and of building what is not there yet."""
        first, each = self.step
        seconds = steps * (first + each * num_operations)
        return seconds if is_built else seconds + self.building[0] + self.building[1] * num_operations


# Measured on six models of 274 to 3,720 operations: .2 to 3.7 ms a step by TorchScript, .2 to 2.2 s of processor time
# to build; and on two of 428 and 2,387: 24 and 65 s, .18 and .89 ms by the other.
COSTS = {SCRIPT: Cost((0.05, 6e-4), (1e-4, 9e-7)), BACKEND: Cost((15.0, 0.02), (1e-4, 4e-7))}


class CompilationError(GraphflowsError):
    """A captured function could not be compiled, or does not compute what the programs do."""


@dataclass
class _Shape:
    """What is known of calls of one shape.

    Attributes:
        captured: The captured objective.
        function: The compiled one; None where calls run as they are.
        backend: What compiled it.
        used: Which parameters have a gradient.
        steps: How many steps there were.
        calls: How often the compiled function was called.
        seconds: The times of calls that ran as they are.
        is_settled: Whether nothing else is to be tried.
        is_wanted: Of evaluations, whether they are to be compiled.
    """

    captured: Captured | None = None
    function: Any = None
    backend: str | None = None
    used: list[bool] = field(default_factory=list)
    steps: int = 0
    calls: int = 0
    seconds: list[float] = field(default_factory=list)
    is_settled: bool = False
    is_wanted: bool = False

    @property
    def step(self) -> float:
        """The median time of a call that ran as it is."""
        return sorted(self.seconds)[len(self.seconds) // 2]

    @property
    def is_compared(self) -> bool:
        """Whether the last call is compared with the programs."""
        return is_compared(self.calls)


def require_backend(backend: str) -> None:
    """Refuse what no captured function can be run by.

    Raises:
        GraphflowsError: If that is so.
    """
    if backend != SCRIPT and backend not in torch._dynamo.list_backends(exclude_tags=()):
        known = ", ".join(torch._dynamo.list_backends())
        raise GraphflowsError(
            f"Expected a backend of torch.compile ({known}), or {SCRIPT!r}; got {backend!r}."
        )


class Compiler:
    """An objective whose gradients come from compiled code, where that is possible and wanted.

    Args:
        objective: The objective.
        parameters: Its parameters.
        mode: True to compile each shape when it is first seen; ``"auto"`` to compile where that is estimated to
            pay, and with what.
        backend: ``"torchscript"``, or a backend of :func:`torch.compile`; of no use with ``"auto"``.

    Attributes:
        report: What is compiled, what is not, and why.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: ParameterSet,
        mode: Mode = True,
        *,
        backend: str | None = None,
    ) -> None:
        backend = BACKEND if backend is None else backend
        require_backend(backend)
        self.objective, self.parameters = objective, parameters
        self.mode, self.backend = mode, backend
        self.report = "not compiled: no step was taken"
        self._steps_left, self._seconds_left = math.inf, math.inf
        self._shapes: dict[Hashable, _Shape] = {}
        self._evaluations: dict[Hashable, _Shape] = {}
        self._given_up: str | None = None
        self._last: tuple[Captured, tuple[Tensor, ...]] | None = None

    # ------------------------------------------------------------------------------------------------- a step
    def add_gradients(self, size: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Set the gradients of the loss divided by ``size``, which must be unset; return the loss divided by it.

        Args:
            size: What to divide by.
            args: Positional arguments of the model and the guide.
            kwargs: Their keyword arguments.
        """
        self._last = None
        if self._given_up is not None:
            return self._plainly(size, args, kwargs)
        data, key = _key(args, kwargs)
        trainable = list(self.parameters.trainable.values())
        if key is None:
            self._give_up("an argument is neither a tensor nor a plain value, which could change unseen")
            return self._plainly(size, args, kwargs)
        shape = self._shape_in(self._shapes, key, trainable)
        if not shape.is_settled and self._is_wanted(shape):
            self._compile(shape, size, (args, kwargs), data, trainable)
        if shape.function is None:
            begin = time.perf_counter()
            loss = self._plainly(size, args, kwargs)
            if len(shape.seconds) <= NUM_TIMED:
                shape.seconds.append(time.perf_counter() - begin)
            return loss
        return self._compiled(shape, size, (args, kwargs), data, trainable)

    def _shape_in(self, shapes: dict[Hashable, _Shape], key: Hashable, trainable: Sequence[Tensor]) -> _Shape:
        """Return what is known of calls that look like this one, with this one counted."""
        shape = shapes.setdefault((key, tuple(map(id, trainable)), self.parameters.modes), _Shape())
        shape.steps += 1
        return shape

    def expect(self, steps: float, seconds: float = math.inf) -> None:
        """Take note of how many steps and seconds are left at most, infinity where that is unknown."""
        self._steps_left, self._seconds_left = steps, seconds

    def settle(self) -> None:
        """Let evaluations of shapes that come often be compiled from here on.

        Between two calls those of a shape stay as they are, so that the same seeds give the same random numbers.
        """
        if any(shape.function is not None for shape in self._shapes.values()):
            often = [shape for shape in self._evaluations.values() if shape.steps >= LEAST_EVALUATIONS]
            for shape in often[:MOST_SHAPES]:
                shape.is_wanted = True

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Return the loss without gradients, by compiled code where :meth:`settle` has said so.

        Args:
            args: Positional arguments of the model and the guide.
            kwargs: Their keyword arguments.
        """
        self._last = None
        data, key = _key(args, kwargs)
        if self._given_up is not None or key is None:
            return self.objective.evaluate(args, kwargs)
        trainable = list(self.parameters.trainable.values())
        shape = self._shape_in(self._evaluations, key, trainable)
        if not shape.is_wanted:
            return self.objective.evaluate(args, kwargs)
        inputs = _inputs(trainable, data, 1.0)
        if not shape.is_settled:
            self._compile_evaluation(shape, (args, kwargs), inputs)
        captured = shape.captured
        if shape.function is None or captured is None:
            return self.objective.evaluate(args, kwargs)
        noise = captured.draw()
        shape.calls += 1
        with torch.no_grad():
            (loss,) = shape.function(*captured.arguments(inputs, noise))
        if shape.is_compared:
            random = random_state()
            with captured.at(noise) as draws:
                expected = self.objective.evaluate(args, kwargs)
            set_random_state(random)
            close = abs(expected - loss.item()) <= _rounding(loss) * (1 + abs(expected))
            if draws.counts != captured.noise or not (close or not math.isfinite(expected)):
                shape.function = None
                return self.objective.evaluate(args, kwargs)
        self._last = captured, noise
        value: float = loss.item()
        if not math.isfinite(value):
            with captured.at(noise):
                value = self.objective.evaluate(args, kwargs)
        return value

    def _compile_evaluation(
        self, shape: _Shape, arguments: tuple[tuple[Any, ...], dict[str, Any]], inputs: list[Tensor]
    ) -> None:
        """Compile the loss without gradients, if that is possible."""
        shape.is_settled = True
        run = _Program(self.objective, arguments, inputs[: len(self.parameters.trainable)], gradients=False)
        random = random_state()
        try:
            captured = capture(run, inputs, run.counts(inputs))
            shape.function = _built(captured, captured.arguments(inputs, captured.draw()), SCRIPT)
            shape.captured = captured
        except (NotCapturedError, CompilationError) as error:
            logger.info("The loss without gradients is not compiled: %s", error)
        finally:
            set_random_state(random)

    def first_not_finite(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Evaluate the loss of the last call once more, at its noise; describe the first site that is not finite."""
        if self._last is None:
            return self.objective.first_not_finite(args, kwargs)
        captured, noise = self._last
        with captured.at(noise):
            return self.objective.first_not_finite(args, kwargs)

    def _plainly(self, size: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        values = self.parameters.parameters.values
        return self.objective.add_gradients(size, args, kwargs, values)

    def _compiled(
        self,
        shape: _Shape,
        size: float,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        data: list[Tensor],
        trainable: list[Tensor],
    ) -> float:
        captured = shape.captured
        assert captured is not None
        noise = captured.draw()
        self._last = captured, noise
        inputs = _inputs(trainable, data, size)
        shape.calls += 1
        before = self.parameters.state() if shape.is_compared else {}
        with torch.no_grad():
            loss, *gradients = shape.function(*captured.arguments(inputs, noise))
        if shape.is_compared:
            why = self._difference(shape, arguments, inputs, noise, [loss, *gradients])
            if why is not None:
                self.parameters.load(before)
                self._shapes.clear()
                self._give_up(f"in step {shape.calls} of the compiled code {why}")
                return self._plainly(size, *arguments)
        if not bool(loss.isfinite()):  # some values are out of the reach of captured code alone
            run = _Program(self.objective, arguments, trainable)
            with captured.at(noise):
                again = run(*inputs)
            if run.used == shape.used:
                loss, *gradients = again
        for parameter, gradient in zip(_chosen(trainable, shape.used), gradients, strict=True):
            parameter.grad = gradient
        return loss.item()

    # ---------------------------------------------------------------------------------------------- compiling
    def _is_wanted(self, shape: _Shape) -> bool:
        """Whether to try to compile a shape now."""
        if (
            shape.captured is None
            and sum(s.captured is not None for s in self._shapes.values()) >= MOST_SHAPES
        ):
            shape.is_settled = True
            self._say(
                f"data of more than {MOST_SHAPES} shapes are computed without compilation: each shape is compiled "
                "by itself; batches of one size need one"
            )
            return False
        if self.mode is True:
            return True
        if len(shape.seconds) < NUM_TIMED:
            return False
        if shape.captured is not None:
            return self._cheapest(shape) != shape.backend
        left = self._steps_expected(shape)
        if left < LEAST_STEPS and self._is_known():
            shape.is_settled = True
            self._say(
                f"not compiled: the {left:.0f} steps that are left take about {left * shape.step:.2g} s"
            )
        return left >= LEAST_STEPS

    def _is_known(self) -> bool:
        """Whether it is known how much is left."""
        return math.isfinite(min(self._steps_left, self._seconds_left))

    def _steps_expected(self, shape: _Shape) -> float:
        """Return how many steps are expected: where nothing is known, as many again as there were."""
        if not self._is_known():
            return shape.steps
        return min(self._steps_left, self._seconds_left / shape.step)

    def _cheapest(self, shape: _Shape) -> str | None:
        """Return the backend that is estimated to be done first, None for none."""
        assert shape.captured is not None
        left, operations = self._steps_expected(shape), shape.captured.num_operations
        totals: dict[str | None, float] = {
            backend: cost.total(operations, left, is_built=backend == shape.backend)
            for backend, cost in COSTS.items()
        }
        if shape.function is None:
            totals[None] = left * shape.step
        return min(totals, key=totals.__getitem__)

    def _compile(
        self,
        shape: _Shape,
        size: float,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        data: list[Tensor],
        trainable: list[Tensor],
    ) -> None:
        inputs = _inputs(trainable, data, size)
        run = _Program(self.objective, arguments, trainable)
        before, random = self.parameters.state(), random_state()
        begin = time.perf_counter()
        try:
            if shape.captured is None:
                shape.captured = capture(run, inputs, run.counts(inputs))
                shape.used = run.used
            self._build(shape, inputs, begin)
        except (NotCapturedError, CompilationError) as error:
            self._give_up(str(error))
        finally:
            self.parameters.load(before)  # statistics of batches, which the runs above have moved
            set_random_state(random)

    def _build(self, shape: _Shape, inputs: Sequence[Tensor], begin: float) -> None:
        """Build the function of what was captured, by the backend that is wanted."""
        captured = shape.captured
        assert captured is not None
        backend = self.backend if self.mode is True else self._cheapest(shape)
        shape.is_settled = self.mode is True or backend != SCRIPT or self._is_known()
        if backend is None:
            left = self._steps_expected(shape)
            self._say(
                f"not compiled: {captured.num_operations} operations would not be done before the {left:.0f} steps "
                f"that are left, of {shape.step * 1e3:.3g} ms"
            )
            return
        failed = ""
        arguments = captured.arguments(inputs, captured.draw())
        try:
            shape.function, shape.backend = _built(captured, arguments, backend), backend
        except CompilationError as error:
            if self.mode is True or backend == SCRIPT:
                raise
            failed = f", since {error}"
            if shape.function is None:
                shape.function = _built(captured, arguments, SCRIPT)
            shape.backend = SCRIPT
        seconds = time.perf_counter() - begin
        self._say(
            f"compiled: {captured.num_operations} operations by {shape.backend} in {seconds:.1f} s{failed}"
        )

    def _difference(
        self,
        shape: _Shape,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        inputs: list[Tensor],
        noise: tuple[Tensor, ...],
        found: Sequence[Tensor],
    ) -> str | None:
        """Return how the programs differ from the compiled function at the same noise; None if they agree."""
        captured = shape.captured
        assert captured is not None
        trainable = inputs[: len(shape.used)]
        run = _Program(self.objective, arguments, trainable)
        watched = [*inputs, *captured.constants]
        versions = [tensor._version for tensor in watched]
        random = random_state()
        try:
            with uncovered(), captured.at(noise) as draws:
                expected = run(*inputs)
        except NotCapturedError as error:
            return str(error)
        finally:
            set_random_state(random)
        if [tensor._version for tensor in watched] != versions:
            return "the programs write to a tensor in place (statistics of batches, for example)"
        if draws.counts != captured.noise:
            return "the programs draw another number of random numbers than when they were captured"
        if run.used != shape.used:
            return "other parameters have a gradient than when the programs were captured"
        if not bool(expected[0].isfinite()):
            return None  # the caller sees a loss that is not finite
        rounding = _rounding(expected[0])
        distance = (expected[0] - found[0]).abs().item()
        if distance > rounding * (1 + expected[0].abs().item()):
            return f"the loss is {found[0].item():.6g}, and the programs give {expected[0].item():.6g}"
        norm = _norm(expected[1:])
        if _norm([a - b for a, b in zip(expected[1:], found[1:], strict=True)]) > 10 * rounding * (
            1e-6 + norm
        ):
            return "the gradients are not those of the programs"
        return None

    def _give_up(self, reason: str) -> None:
        reason = reason.split("\nTrace Shapes")[0]  # which Pyro adds to errors in a run
        self._given_up = reason
        self._say(f"not compiled: {reason}")

    def _say(self, report: str) -> None:
        self.report = report
        logger.log(logging.WARNING if self.mode is True and report[0] != "c" else logging.INFO, report)


class _Program:
    """The objective as a function from tensors to the loss and its gradients.

    Parameters and data are reached through the programs and their arguments, and count as inputs since they are the
    same tensors.

    Args:
        objective: The objective.
        arguments: Positional and keyword arguments of the model and the guide.
        trainable: The parameters.
        gradients: Whether there are gradients.

    Attributes:
        used: After a run, which parameters have a gradient.
    """

    def __init__(
        self,
        objective: Objective,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        trainable: Sequence[Tensor],
        *,
        gradients: bool = True,
    ) -> None:
        self.objective, self.arguments, self.trainable = objective, arguments, trainable
        self.gradients = gradients
        self.used: list[bool] = []

    def counts(self, inputs: Sequence[Tensor]) -> dict[Noise, int]:
        """Return how many random numbers a run takes."""
        with uncovered(), Draws() as draws:
            self(*inputs)
        return draws.counts

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Return the loss and, if wanted, the gradients of the parameters in use, both divided by the last input."""
        size = inputs[-1]
        args, kwargs = self.arguments
        with poutine.block(), pyro.validation_enabled(False), torch.enable_grad():
            if self.gradients:
                loss, gradients = self.objective.loss_and_gradients(args, kwargs, self.trainable)
            else:  # with a graph too, which some losses insist on; nothing of it is written down
                alone, gradients = self.objective.differentiable(args, kwargs), []
                if alone is None:
                    raise NotCapturedError("the loss does not come without its gradients")
                loss = alone.detach()
        self.used = [gradient is not None for gradient in gradients]
        if self.gradients and not any(self.used):
            raise NotCapturedError("no parameter has a gradient")
        size = size.to(loss)
        return [loss / size, *(gradient / size for gradient in gradients if gradient is not None)]


def _built(captured: Captured, arguments: Sequence[Tensor], backend: str) -> Any:
    """Return the compiled function.

    Raises:
        CompilationError: If the backend fails, with its reason.
    """
    plain = [argument.detach() for argument in arguments]
    with torch.no_grad():
        try:
            if backend == SCRIPT:
                function: Any = scripted(captured.graph, plain)
            else:
                function = torch._dynamo.lookup_backend(backend)(captured.graph, plain)
            function(*plain)
        except Exception as error:
            # A compiler may fail in ways of its own; none of them may end a training run.
            name = type(error).__name__
            lines = str(error).strip().splitlines()
            why = "no C++ compiler was found" if "CxxCompiler" in name + str(error) else f"{name}"
            raise CompilationError(
                f"{backend} could not compile it: {why}" + (f" ({lines[0]})" if lines else "")
            ) from error
    return function


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Hashable | None]:
    """Return the tensors among some arguments, and what else there is of them; None if that could change unseen."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if type(leaf) in (Tensor, torch.nn.Parameter)]
    parts: list[Hashable] = []
    for leaf in leaves:
        if type(leaf) in (Tensor, torch.nn.Parameter):
            parts.append((tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad))
        elif leaf is None or isinstance(leaf, bool | int | float | str | torch.Size | torch.dtype):
            parts.append((type(leaf), leaf))
        else:
            return tensors, None
    # Before PyTorch 2.6 the structure itself has no hash.
    return tensors, (repr(structure), *parts)


def _inputs(trainable: Sequence[Tensor], data: Sequence[Tensor], size: float) -> list[Tensor]:
    """Return the tensors that a captured objective is a function of."""
    return [*trainable, *data, torch.tensor(float(size), dtype=torch.get_default_dtype())]


def _rounding(loss: Tensor) -> float:
    """Return the relative difference that rounding may make."""
    return torch.finfo(loss.dtype).eps ** 0.4


def _chosen(values: Sequence[Tensor], used: Sequence[bool]) -> list[Tensor]:
    return [value for value, is_used in zip(values, used, strict=True) if is_used]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum(tensor.double().square().sum().item() for tensor in tensors))


class CompiledLoss:
    """The loss of a model and a guide, computed with its gradients by compiled code.

    The first call captures and compiles the objective; calls with data of another shape do so again. The default
    backend takes tens of seconds and needs a C++ compiler on a CPU; ``"torchscript"`` takes seconds and needs none, and
    its steps take two to three times as long.

    Args:
        model: A Pyro model.
        guide: A guide for it.
        loss: An ELBO object, or an :class:`InferenceCompilation` of this pair; ``Trace_ELBO()`` by default.
        backend: ``"torchscript"``, or a backend of :func:`torch.compile`; ``"inductor"`` by default.

    Raises:
        GraphflowsError: If the loss is none of these, or the backend is unknown.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(slope * x, 0.5**0.5))
        >>> x = 2**0.5 * torch.randn(500)
        >>> loss = CompiledLoss(model, guide, backend="eager")
        >>> optimizer = torch.optim.Adam(loss.parameters(x), lr=0.05)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     _ = loss.loss_and_grads(x)
        ...     optimizer.step()
        >>> abs(pyro.param("slope").item() - 0.5) < 0.1, loss.report.split(":")[0]
        (True, 'compiled')
    """

    def __init__(
        self, model: Program, guide: Program, loss: Any = None, *, backend: str | None = None
    ) -> None:
        self._objective = Objective(model, guide, loss)
        self._set = ParameterSet(model=model, guide=guide)
        self._compiler = Compiler(self._objective, self._set, backend=backend)
        self._is_explored = False

    @property
    def report(self) -> str:
        """What is compiled; else, why not."""
        return self._compiler.report

    def parameters(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the unconstrained parameters in use, for an optimiser of torch.

        Args:
            *args: Positional arguments of the model and the guide: the programs are run once with them.
            **kwargs: Their keyword arguments.
        """
        self._explore(args, kwargs)
        return list(self._set.trainable.values())

    def store_names(self) -> list[str]:
        """Return the names that Pyro's parameter store has for the parameters in use, as far as they are in it."""
        return list(self._set.in_store())

    def is_of(self, model: Program, guide: Program) -> bool:
        """Whether it is the loss of this model and this guide."""
        return self._objective.model is model and self._objective.guide is guide

    def is_in_store(self) -> bool:
        """Whether the parameters in use are those that Pyro's parameter store has by their names now."""
        kept = pyro.get_param_store()._params
        return all(kept.get(name) is parameter for name, parameter in self._set.in_store().items())

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss, and add its gradients to the parameters.

        Args:
            *args: Positional arguments of the model and the guide.
            **kwargs: Their keyword arguments.
        """
        self._explore(args, kwargs)
        before = [(parameter, parameter.grad) for parameter in self._set.trainable.values()]
        self._set.forget_gradients()
        loss = self._compiler.add_gradients(1.0, args, kwargs)
        for parameter, gradient in before:
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
        return loss

    def _explore(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_explored:
            return
        self._is_explored = True
        state = random_state()
        self._objective.evaluate(args, kwargs)
        self._set.refresh()
        with poutine.trace(param_only=True) as seen:
            self._objective.add_gradients(1.0, args, kwargs, dict)
        self._set.adopt(seen.trace)
        self._set.forget_gradients(seen.trace)
        set_random_state(state)
