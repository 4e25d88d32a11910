"""One training step as a device runs it best: recorded once and replayed, compiled, or as it is written.

A small model is bound by launches, not by arithmetic. A CUDA graph records all kernels of a step and launches them at
once; compiled by inductor there are fewer of them. Whatever does not work on a machine is given up for the next plainer
way, and the reason is kept. What was recorded or compiled must give the losses that the step as written gives.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_graphflows import GraphflowsError

#: The ways, from the fastest to the plainest.
WAYS = ("compiled graph", "graph", "compiled", "eager")

Step = Callable[[], object]
LossFunction = Callable[..., Tensor]
#: From a function of losses to a step that uses it.
StepMaker = Callable[[LossFunction], Step]


@dataclass
class Captured:
    """A step, and how it came about."""

    run: Step
    way: str
    reasons: list[str] = field(default_factory=list)  # why not a faster way


def candidates(way: str, device: torch.device) -> tuple[str, ...]:
    """Return the ways to try in order.

    Args:
        way: One of ``WAYS``; ``"auto"`` for the fastest on a GPU, eager on a CPU.
        device: Where the step runs.

    Raises:
        GraphflowsError: If the way is unknown.
    """
    if way == "auto":
        return WAYS if device.type == "cuda" else ("eager",)
    if way not in WAYS:
        raise GraphflowsError(f"Expected a way to run a step among auto, {', '.join(WAYS)}; got {way!r}.")
    return WAYS[WAYS.index(way) :]


def as_graph(step: Step, device: torch.device) -> Step:
    """Record a step as a CUDA graph.

    Raises:
        GraphflowsError: If the device has no graphs.
    """
    if device.type != "cuda":
        raise GraphflowsError(f"Expected a CUDA device for a graph; got {device.type}.")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(
        stream
    ):  # libraries set themselves up, and compilers compile, before the recording
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def captured(
    make_step: StepMaker,
    losses: Callable[..., Tensor],
    way: str,
    device: torch.device,
    state: Mapping[str, Tensor],
    watched: Tensor,
    tolerance: float = 1e-3,
) -> Captured:
    """Return a step in the fastest way that works.

    Args:
        make_step: From a function of losses to a step.
        losses: The function of losses.
        way: As in :func:`candidates`.
        device: Where the step runs.
        state: All that a step changes; it is the same afterwards.
        watched: What is compared after two steps, one of the tensors of the state.
        tolerance: The largest relative difference from the step as written.

    Returns:
        The step, the way it runs, and why the faster ones do not.

    Raises:
        GraphflowsError: If the way is unknown.
    """
    ways = candidates(way, device)
    before = {key: value.detach().clone() for key, value in state.items()}

    @torch.no_grad()
    def restore() -> None:
        for key, value in before.items():
            state[key].copy_(value)

    def outcome(step: Step) -> Tensor:
        restore()
        for _ in range(2):
            step()
        result = watched.detach().clone()
        restore()
        return result

    plain = make_step(losses)
    expected, reasons = None, []
    for candidate in ways:
        if candidate == "eager":
            break
        try:
            step = make_step(torch.compile(losses) if "compiled" in candidate else losses)
            if "graph" in candidate:
                step = as_graph(step, device)
            result = outcome(step)
            expected = outcome(plain) if expected is None else expected
            if not torch.allclose(result, expected, rtol=tolerance, atol=0):
                raise GraphflowsError(
                    f"Expected the losses of the step as written, {expected.tolist()}; got {result.tolist()}."
                )
            return Captured(step, candidate, reasons)
        except Exception as error:  # whatever a compiler or a driver raises is a reason to go on without it
            lines = str(error).strip().splitlines() or [""]
            reasons.append(f"{candidate}: {type(error).__name__}: {lines[0]}")
            restore()
    return Captured(plain, "eager", reasons)
