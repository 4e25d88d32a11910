"""Optimisers over all parameters of a model and a guide, however they are asked for."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.parameters import ParameterSet

__all__ = ["make_optimizer"]


def make_optimizer(optimizer: Any, parameters: ParameterSet) -> torch.optim.Optimizer:
    """Return a torch optimiser over the trainable parameters.

    Args:
        optimizer: A rate for Adam, a torch optimiser (returned as it is), a
            :class:`pyro.optim.PyroOptim`, or a function from a list of parameters to a torch optimiser.
        parameters: The parameters.

    Returns:
        The optimiser.

    Raises:
        GraphflowsError: If it is none of these, or a PyroOptim that schedules or clips by itself.
    """
    trainable = parameters.trainable
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if isinstance(optimizer, int | float):
        return torch.optim.Adam(
            list(trainable.values()), lr=float(optimizer), fused=_can_fuse(trainable.values())
        )
    if isinstance(optimizer, PyroOptim):
        if isinstance(optimizer, PyroLRScheduler) or optimizer.pt_clip_args:
            raise GraphflowsError(
                "Expected a PyroOptim without schedule and without clip_args; fit schedules the rate itself "
                "(Schedule: patience, lr_factor) and clips all gradients together (max_grad_norm)."
            )
        options: Callable[..., Any] | dict[str, Any] = optimizer.pt_optim_args
        constructor: Any = optimizer.pt_optim_constructor
        if not callable(options):
            return constructor(list(trainable.values()), **options)
        groups = [{"params": [p], **options(parameters.store_name(name))} for name, p in trainable.items()]
        return constructor(groups)
    made = optimizer(list(trainable.values())) if callable(optimizer) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise GraphflowsError(
            "Expected optimizer to be a learning rate, a torch or Pyro optimiser, or a function from parameters to a "
            f"torch optimiser; got {optimizer!r}."
        )
    return made


def _can_fuse(parameters: Iterable[Tensor]) -> bool | None:
    """Return True where torch has Adam's step as one kernel, several times cheaper, for these parameters; else None."""
    devices = {"cuda", "cpu"} if torch.__version__ >= "2.4" else {"cuda"}
    return all(p.is_floating_point() and p.device.type in devices for p in parameters) or None
