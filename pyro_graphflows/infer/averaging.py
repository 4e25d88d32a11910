r"""Running averages of the parameters, which are better than any of the values that they average.

Steps at a rate that learns fast leave the parameters at a distance from the minimum that noise holds them at. Their
average over the last steps has less of that noise, as if the rate had fallen, while training goes on at the rate that
it has. Where data are few it overfits less as well: the average lies in the middle of a wide minimum.

References:
    [1] Polyak and Juditsky (1992), Acceleration of stochastic approximation by averaging.
    [2] Izmailov et al. (2018), Averaging weights leads to wider optima and better generalization, UAI. The averages
        here are exponentially weighted, and there is no second rate.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.infer.parameters import ParameterSet

__all__ = ["RunningAverage"]


class RunningAverage:
    r"""The average of trainable parameters over the last steps, exponentially weighted.

    The n-th value that is taken has the weight :math:`1 / \min(n, w)`: a plain mean until the window :math:`w` is full.
    Parameters are averaged as they are trained, unconstrained; buffers are not, and a parameter that appears later
    starts from its first value.

    Args:
        parameters: The parameters.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> average = RunningAverage(ParameterSet(guide=layer))
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = torch.nn.init.constant_(layer.bias, value)
        ...     average.take(window=10.0)
        >>> with average.in_place():
        ...     layer.bias.item()
        3.0
        >>> layer.bias.item()
        6.0
    """

    def __init__(self, parameters: ParameterSet) -> None:
        self.parameters = parameters
        self.number = 0
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, window: float) -> None:
        """Take the values of now into the average.

        Args:
            window: The number of steps over which the average goes, at least 1.
        """
        self.number += 1
        live = self.parameters.trainable
        for name, tensor in live.items():
            if name not in self.values:
                self.values[name] = tensor.detach().clone()
        weight = 1.0 / max(1.0, min(self.number, window))
        torch._foreach_lerp_([self.values[name] for name in live], list(live.values()), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters be the averages, and afterwards what they were."""
        live = self.parameters.trainable
        before = {name: tensor.detach().clone() for name, tensor in live.items()}
        self.leave()
        try:
            yield
        finally:
            _write(before, live)

    def leave(self) -> None:
        """Let the parameters be the averages from here on."""
        _write(self.values, self.parameters.trainable)

    def state(self) -> dict[str, Any]:
        """Return everything that later averages depend on."""
        return {
            "number": self.number,
            "values": {name: value.clone() for name, value in self.values.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.number, self.values = state["number"], state["values"]


@torch.no_grad()
def _write(values: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        live[name].copy_(value)
