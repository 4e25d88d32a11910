r"""What the flows of this package share: the glue between their networks and Pyro's transforms.

A network maps noise to variables and back, and returns with the values the log-derivative of each variable by its own
noise. The transform adds Pyro's protocol. Two differences from other transforms of Pyro, both for safety:

- The cache holds a pair of values together with its log-determinant, and forgets both when a parameter has changed,
  when the pair was made without gradients and gradients are wanted now, in copies and in pickles. A
  value is only looked up to invert what was just computed, not to repeat it, so a loop that
  calls ``log_prob(data)`` on the same tensor never meets a graph that has been freed.
- ``with_cache(0)`` gives a transform with the same parameters and without a cache.
"""

import copy
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.transforms.flow_nn import FlowNN, some_names
from pyro_graphflows.transforms.structure import FlowStructure

__all__ = ["ConditionalGraphTransform", "GraphTransform"]


class _OfNetwork:
    """What transforms with and without a context hand on to their network."""

    network: FlowNN

    @property
    def structure(self) -> FlowStructure:
        """Who depends on whom."""
        return self.network.structure

    def standardize_(
        self,
        loc: Tensor,
        scale: Tensor,
        context_loc: Tensor | None = None,
        context_scale: Tensor | None = None,
    ) -> None:
        """Work in standardised coordinates; see :meth:`FlowNN.standardize_`."""
        self.network.standardize_(loc, scale, context_loc, context_scale)


class GraphTransform(_OfNetwork, TransformModule):
    r"""A bijection of :math:`\mathbb{R}^D` from noise to variables whose Jacobian follows a graph.

    Calling it samples; its inverse is the density direction. Subclasses only add names and documentation.

    Args:
        network: The network.
        context: The context that was conditioned on, of shape (\*batch, C).
        cache_size: 0 or 1.

    Raises:
        GraphflowsError: If the network needs a context and there is none, or the context has the wrong size.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    autoregressive = True
    network: FlowNN
    _context: Tensor | None
    _entry: tuple[Any, ...] | None
    _holders: tuple[nn.Module, ...] | None

    def __init__(self, network: FlowNN, context: Tensor | None = None, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        structure = network.structure
        if context is None and structure.context_dim:
            raise GraphflowsError(
                f"Expected a context with {structure.context_dim} columns "
                f"({some_names(structure.context_names)}); got none. Use the Conditional form and .condition(context)."
            )
        if context is not None:
            network.join_context(context)  # checks the size
        self.network = network
        self.__dict__["_context"] = context  # not registered, even if it is a parameter
        self.__dict__["_entry"] = None
        self.__dict__["_holders"] = None  # the modules of the network, listed when first needed

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_entry"] = state["_holders"] = None
        state.pop("_cached_x_y", None)
        return state

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return () if self._context is None else (self._context,)

    # Values

    def inverse_terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the noise and the log of each dz/deps, both of shape (\*batch, D)."""
        return self.network.inverse_terms(z, *self._parts)

    def _call(self, x: Tensor) -> Tensor:
        return self._sample(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._score(y)[0]

    def _sample(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_diag = self.network.sample(x, *self._parts)
        self._remember(x, y, log_diag, "sample")
        return y, log_diag

    def _score(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, log_diag = self.network.inverse_terms(y, *self._parts)
        self._remember(x, y, log_diag, "score")
        return x, log_diag

    def __call__(self, x: Tensor) -> Tensor:
        """Map noise to variables."""
        entry = self._lookup()
        if entry is not None and entry[0] is x and entry[3] == "score":
            return entry[1]
        return self._call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        entry = self._lookup()
        if entry is not None and entry[1] is y and entry[3] == "sample":
            return entry[0]
        return self._inverse(y)

    def log_diagonal(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return the log-derivative of each variable by its own noise, of shape (\*batch, D).

        They add up to ``log_abs_det_jacobian``. The density of variable v given those before it in the graph is
        ``Normal(0, 1).log_prob(x)[..., v] - log_diagonal(x, y)[..., v]``.
        """
        entry = self._lookup()
        if entry is not None and entry[0] is x and entry[1] is y:
            return entry[2]
        if self.network.closed_form == "density":
            return self._score(y)[1]
        return self._sample(x)[1]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log of the absolute determinant of the Jacobian, of the batch shape."""
        return self.log_diagonal(x, y).sum(-1)

    # Shapes

    def forward_shape(self, shape: Any) -> torch.Size:
        """Return the shape of the result for an input of some shape."""
        if self._context is None:
            return torch.Size(shape)
        return torch.broadcast_shapes(shape[:-1], self._context.shape[:-1]) + torch.Size(shape[-1:])

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Return the shape of the inverse's result."""
        return self.forward_shape(shape)

    # Cache

    def with_cache(self, cache_size: int = 1) -> "GraphTransform":
        """Return a transform with the same parameters and another cache size."""
        if cache_size == self._cache_size:
            return self
        if cache_size not in (0, 1):
            raise GraphflowsError(f"Expected cache_size 0 or 1; got {cache_size}.")
        other = copy.copy(self)
        other._cache_size = cache_size
        return other

    def _stamp(self) -> tuple[Any, ...]:
        """Return what a cached pair depends on: gradient mode, and the versions of parameters, buffers and context."""
        holders = self._holders or tuple(self.network.modules())
        self.__dict__["_holders"] = holders
        stamp: list[Any] = [torch.is_grad_enabled()]
        for module in holders:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    stamp.append((tensor._version, tensor.data_ptr()))
        stamp += [(part._version, part.data_ptr()) for part in self._parts]
        return tuple(stamp)

    def _remember(self, x: Tensor, y: Tensor, log_diag: Tensor, how: str) -> None:
        if self._cache_size:
            self.__dict__["_entry"] = (x, y, log_diag, how, self._stamp())

    def _lookup(self) -> tuple[Any, ...] | None:
        entry = self._entry
        return entry if entry is not None and entry[4] == self._stamp() else None

    def clear_cache(self) -> None:
        """Forget the last pair of values."""
        self.__dict__["_entry"] = None


class ConditionalGraphTransform(_OfNetwork, ConditionalTransformModule):
    r"""A :class:`GraphTransform` whose network takes a context.

    Args:
        network: The network.
    """

    network: FlowNN
    transform_type: type[GraphTransform] = GraphTransform

    def __init__(self, network: FlowNN) -> None:
        super().__init__()
        self.network = network

    def inverse_terms(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the noise and the log of each dz/deps, both of shape (\*batch, D)."""
        return self.network.inverse_terms(z, *context)

    def condition(self, context: Tensor) -> GraphTransform:
        r"""Return the transform for a context of shape (\*batch, C)."""
        return self.transform_type(self.network, context)
