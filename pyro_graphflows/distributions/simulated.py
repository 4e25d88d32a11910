r"""A distribution of which nothing is known but draws: the output of a simulator.

``pyro.sample("x", Simulated(simulator, theta, event_shape=(10,)), obs=x)`` observes what a function returns, a black
box, which may use NumPy, compiled code or another program. What it is computed from are the arguments after it: the
graph of the model is read from these. It has no density, so that losses and weights which need one refuse it, by name;
learning from simulations needs none (``fit(model, guide, x, simulations=n)``, and
:class:`~pyro_graphflows.infer.InferenceCompilation`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError

__all__ = ["Simulated"]


class Simulated(TorchDistribution):
    r"""What a function returns for random inputs; it can be drawn, and has no density.

    Args:
        function: From the inputs, as tensors, to a tensor or a NumPy array. It is called without gradients, and draws
            random numbers by itself: seed those that are not PyTorch's where runs shall be repeatable.
        *inputs: All random values that the function depends on.
        event_shape: The shape of one output.
        input_dims: How many of the rightmost dimensions of the inputs belong to one call: a number for all of them, or
            one for each. The others are a batch.
        vectorized: Whether the function takes a batch of inputs, dimensions on the left, and returns one output for
            each; if not, it is called once for each.
        support: Where outputs lie, of one element; anywhere on the real line by default.

    Raises:
        GraphflowsError: If ``input_dims`` does not fit the inputs; when drawn, if an output has another shape.

    Example:
        >>> import numpy as np
        >>> def simulator(theta):
        ...     return np.random.poisson(np.exp(theta.numpy()))
        >>> Simulated(simulator, torch.zeros(5, 2), event_shape=(2,), input_dims=1).sample().shape
        torch.Size([5, 2])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self,
        function: Callable[..., Any],
        *inputs: Tensor,
        event_shape: Sequence[int] = (),
        input_dims: int | Sequence[int] = 0,
        vectorized: bool = True,
        support: Any = constraints.real,
    ) -> None:
        self.function, self.vectorized = function, vectorized
        self.input_dims = (input_dims,) * len(inputs) if isinstance(input_dims, int) else tuple(input_dims)
        if len(self.input_dims) != len(inputs) or any(
            not 0 <= dims <= value.dim() for dims, value in zip(self.input_dims, inputs, strict=False)
        ):
            raise GraphflowsError(
                f"Expected input_dims for each input, at most as many as it has dimensions; got {self.input_dims} for "
                f"inputs of shapes {[tuple(value.shape) for value in inputs]}."
            )
        batches = [
            value.shape[: value.dim() - dims] for dims, value in zip(self.input_dims, inputs, strict=True)
        ]
        batch_shape = torch.broadcast_shapes(*batches) if batches else torch.Size()
        self.inputs = tuple(
            value.expand((*batch_shape, *value.shape[value.dim() - dims :]))
            for dims, value in zip(self.input_dims, inputs, strict=True)
        )
        self.of_element = support
        super().__init__(batch_shape, torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> Any:
        """Where outputs lie."""
        return constraints.independent(self.of_element, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Simulated":
        """See :meth:`torch.distributions.Distribution.expand`."""
        inputs = [
            value.expand((*batch_shape, *value.shape[value.dim() - dims :]))
            for dims, value in zip(self.input_dims, self.inputs, strict=True)
        ]
        new = Simulated(
            self.function,
            *inputs,
            event_shape=self.event_shape,
            input_dims=self.input_dims,
            vectorized=self.vectorized,
            support=self.of_element,
        )
        if not inputs:
            new._batch_shape = torch.Size(batch_shape)
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Run the simulator.

        Args:
            sample_shape: How many runs for each element of the batch.
        """
        if sample_shape:
            return self.expand((*sample_shape, *self.batch_shape)).sample()
        shape, own = self.batch_shape + self.event_shape, self.batch_shape.numel()
        if self.vectorized:
            return self._checked(self.function(*(value.detach() for value in self.inputs)), shape)
        rows = [
            value.detach().reshape(own, *value.shape[value.dim() - dims :])
            for dims, value in zip(self.input_dims, self.inputs, strict=True)
        ]
        found = [
            self._checked(self.function(*(value[each] for value in rows)), self.event_shape)
            for each in range(own)
        ]
        return torch.stack(found).reshape(shape) if found else torch.zeros(shape)

    def _checked(self, output: Any, shape: torch.Size) -> Tensor:
        """Return an output as a tensor, of the type of the inputs if it is of floating point; refuse another shape."""
        value = torch.from_numpy(np.asarray(output)) if not isinstance(output, Tensor) else output
        like = next((each for each in self.inputs if each.is_floating_point()), None)
        if value.is_floating_point():
            value = value.to(torch.get_default_dtype()) if like is None else value.to(like)
        if value.shape != shape:
            raise GraphflowsError(
                f"Expected outputs of the simulator {_name(self.function)} of shape {tuple(shape)}; got "
                f"{tuple(value.shape)}. Say event_shape= of one output, input_dims= of one call's inputs, and "
                "vectorized=False if it takes no batch."
            )
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Refuse: there is none.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            f"Expected a site with a density; the output of the simulator {_name(self.function)} has none, so that no "
            "ELBO, importance weight or score exists. Learn from simulations: fit(model, guide, ..., simulations=n), "
            "or loss=InferenceCompilation(model, guide)."
        )

    def stand_in(self) -> Tensor:
        """Return a number for each element of the batch that depends on all inputs, for those who ask what they are.

        It takes the place of the log-density where a model's structure is read, and nowhere else.
        """
        total = torch.zeros(self.batch_shape)
        for dims, value in zip(self.input_dims, self.inputs, strict=True):
            number = value if value.is_floating_point() else value.to(torch.get_default_dtype())
            whole = number.reshape(*self.batch_shape, math.prod(value.shape[value.dim() - dims :]))
            total = total + (whole * torch.linspace(1.0, 2.0, whole.shape[-1])).sum(-1)
        return total


def _name(function: Callable[..., Any]) -> str:
    return repr(getattr(function, "__name__", type(function).__name__))
