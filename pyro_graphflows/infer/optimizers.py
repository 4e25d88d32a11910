"""Optimisers over all parameters of a model and a guide, however they are asked for."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.parameters import ParameterSet

__all__ = ["FallingAdam", "default_optimizer", "make_optimizer"]

LAST = 0.01  # of the rate, at the end


class FallingAdam(torch.optim.Adam):
    """Adam with a rate that stays for the first half of the steps and then falls exponentially to a hundredth.

    The rate at the start finds the region, the fall averages out the noise of single draws. Steps beyond the last one
    keep the last rate. The count of steps is part of the state.

    Args:
        params: The parameters.
        lr: The rate of the first half.
        num_steps: The number of steps.

    Raises:
        GraphflowsError: If the number of steps is not positive.

    Example:
        >>> optimizer = FallingAdam([torch.nn.Parameter(torch.zeros(2))], lr=0.1, num_steps=100)
        >>> optimizer.rate_at(0), optimizer.rate_at(50), round(optimizer.rate_at(75), 4), optimizer.rate_at(100)
        (0.1, 0.1, 0.01, 0.001)
    """

    def __init__(self, params: Any, lr: float = 0.01, *, num_steps: int) -> None:
        if num_steps < 1:
            raise GraphflowsError(f"Expected num_steps >= 1; got {num_steps}.")
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.update(first_rate=group["lr"], num_steps=num_steps, steps_done=0)

    def rate_at(self, step: int, group: int = 0) -> float:
        """Return the rate of a step, counted from zero."""
        options = self.param_groups[group]
        share = min(step / options["num_steps"], 1.0)
        rate: float = options["first_rate"] * LAST ** max(0.0, 2 * share - 1)
        return rate

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step at the rate of its number."""
        for number, group in enumerate(self.param_groups):
            group["lr"] = self.rate_at(group["steps_done"], number)
            group["steps_done"] += 1
        return super().step(closure)


def default_optimizer(num_steps: int, *, lr: float = 0.01) -> PyroOptim:
    """Return an optimiser for :class:`~pyro.infer.SVI` that needs no tuning with this package's guides.

    Their networks are trained in natural units (residual standard deviations, whitened inputs), so that one rate fits
    data in any units.

    Args:
        num_steps: How many steps will be taken.
        lr: The rate of the first half.

    Raises:
        GraphflowsError: If the number of steps or the rate is not positive.

    Example:
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> svi = SVI(lambda: None, lambda: None, default_optimizer(1000), Trace_ELBO())
    """
    if num_steps < 1 or not lr > 0:
        raise GraphflowsError(f"Expected num_steps >= 1 and lr > 0; got {num_steps} and {lr}.")
    return PyroOptim(FallingAdam, {"lr": lr, "num_steps": num_steps})


def make_optimizer(optimizer: Any, parameters: ParameterSet) -> torch.optim.Optimizer:
    """Return a torch optimiser over the trainable parameters.

    Args:
        optimizer: A rate for Adam, a torch optimiser (returned as it is), a
            :class:`pyro.optim.PyroOptim`, or a function from a list of parameters to a torch optimiser.
        parameters: The parameters.

    Returns:
        The optimiser.

    Raises:
        GraphflowsError: If it is none of these, a rate that is negative or not finite, or a PyroOptim that schedules or
            clips by itself.
    """
    trainable = parameters.trainable
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if isinstance(optimizer, int | float):
        if not 0.0 <= optimizer < math.inf:
            raise GraphflowsError(
                f"Expected a learning rate that is finite and not negative; got {optimizer}."
            )
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
    if getattr(optimizer, "__module__", "").startswith("pyro.optim"):
        raise GraphflowsError(
            f"Expected an optimiser of Pyro's with its options, pyro.optim.{getattr(optimizer, '__name__', 'Adam')}"
            '({"lr": 1e-3}); got one without.'
        )
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
