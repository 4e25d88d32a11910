"""Autograd functions that tensors of other classes can go through.

Some classes of tensors mark what a number depends on: Pyro's provenance, by which ``TraceGraph_ELBO`` finds the terms
that a draw without reparametrisation moves. They intercept every operation of torch, but not a custom autograd
function: there gradients would be lost without an error, since the graph is recorded for the wrapper and not for what
it holds.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

__all__ = ["Operation", "is_traced"]

_PLAIN = (Tensor, nn.Parameter)


def is_traced() -> bool:
    """Whether torch traces the program, as for `JitTrace_ELBO`, which needs its own operations."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


class Operation(torch.autograd.Function):
    """An autograd function that is intercepted like torch's own operations."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Apply the function, by way of ``__torch_function__`` where the class of an argument defines it."""
        special = [arg for arg in args if isinstance(arg, Tensor) and type(arg) not in _PLAIN]
        if special:
            return handle_torch_function(cls.apply, special, *args)
        return super().apply(*args)
