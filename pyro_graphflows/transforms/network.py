r"""What all flows share: the contract of their networks, and the glue between a network and Pyro's transforms.

A network (:class:`FlowNN`) maps noise to variables (:meth:`FlowNN.sample`) and back (:meth:`FlowNN.inverse_terms`), and
both return with the values the log-derivative of each variable by its own noise, so that

.. math:: \log q(z_v \mid \text{earlier } z, x) = \log \mathcal{N}(\varepsilon_v)
    - \log \frac{\partial z_v}{\partial \varepsilon_v}.

It can also be gone through level by level (:class:`FlowPass`). The transform (:class:`GraphTransform`) adds
Pyro's protocol. Two differences from other transforms of Pyro, both for safety:

- The cache holds a pair of values together with its log-determinant, and forgets both when a parameter has changed,
  when the pair was made without gradients and gradients are wanted now, in copies and in pickles. A
  value is only looked up to invert what was just computed, not to repeat it, so a loop that
  calls ``log_prob(data)`` on the same tensor never meets a graph that has been freed.
- ``with_cache(0)`` gives a transform with the same parameters and without a cache.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.regression import Moments, in_float64
from pyro_graphflows.transforms.structure import FlowStructure, some_names

__all__ = [
    "ConditionalGraphTransform",
    "FlowNN",
    "FlowPass",
    "GraphTransform",
    "LinearStart",
    "LinearStartNN",
    "moments",
    "regress_on_parents",
    "structure_mask",
]


# Added to the variances of standardised inputs in regressions; residual variances are at least this share of a
# variable's variance.


class FlowPass:
    r"""A pass through the levels of a flow, in which the caller may replace values: what every flow's pass owes.

    Level after level: :meth:`step` maps the level's noise to values, or :meth:`terms` maps given values to noise; then
    :meth:`accept` hands in the values that are used, on which the later levels depend. Each level may have a
    larger batch shape than those before it, and shapes are broadcast from the right. Columns are always those of
    ``network.levels[level]``.

    Args:
        network: The network of the flow.
    """

    def __init__(self, network: "FlowNN") -> None:
        self._network = network

    @property
    def level(self) -> int:
        """The number of the level whose values are wanted next."""
        raise NotImplementedError

    def fork(self) -> "FlowPass":
        """Return an evaluation at the same place that goes its own way from here."""
        raise NotImplementedError

    def noise(self, shape: Sequence[int]) -> Tensor:
        r"""Draw standard normal noise for the next level, of shape (\*shape, n)."""
        loc, width = self._network.loc, len(self._network.levels[self.level])
        return torch.randn(*shape, width, dtype=loc.dtype, device=loc.device)

    def step(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map the noise of the next level to values.

        Args:
            eps: Shape (\*batch, n).

        Returns:
            z and the log of each dz/deps, both of shape (\*batch, n).

        Raises:
            GraphflowsError: If the number of columns is wrong or all levels are done.
        """
        raise NotImplementedError

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map given values of the next level to noise.

        Args:
            z: Shape (\*batch, n).

        Returns:
            eps and the log of each dz/deps, both of shape (\*batch, n).

        Raises:
            GraphflowsError: If the number of columns is wrong or all levels are done.
        """
        raise NotImplementedError

    def accept(self, z: Tensor) -> None:
        r"""Hand in the values of the next level, and go on to the level after it.

        Args:
            z: Shape (\*batch, n).

        Raises:
            GraphflowsError: If the number of columns is wrong or all levels are done.
        """
        raise NotImplementedError

    def check_level(self, values: Tensor) -> tuple[int, ...]:
        """Return the positions of the next level's variables, whose values or noise are given.

        Raises:
            GraphflowsError: If the number of columns is wrong or all levels are done.
        """
        levels, level = self._network.levels, self.level
        if level >= len(levels):
            raise GraphflowsError(f"Expected at most {len(levels)} levels; all have been accepted.")
        if values.shape[-1:] != (len(levels[level]),):
            names = ", ".join(self._network.structure.names[v] for v in levels[level])
            raise GraphflowsError(
                f"Expected a last dimension of {len(levels[level])} for level {level} ({names}); "
                f"got shape {tuple(values.shape)}."
            )
        return levels[level]


class FlowNN(nn.Module):
    """Base class: subclasses set ``closed_form`` and write :meth:`sample`, :meth:`inverse_terms` and :meth:`start`.

    Args:
        structure: Who depends on whom.
    """

    closed_form: str
    loc: Tensor
    scale: Tensor
    context_loc: Tensor
    context_scale: Tensor

    def __init__(self, structure: FlowStructure) -> None:
        super().__init__()
        self.structure = structure
        self.register_buffer("loc", torch.zeros(structure.event_dim))
        self.register_buffer("scale", torch.ones(structure.event_dim))
        self.register_buffer("context_loc", torch.zeros(structure.context_dim))
        self.register_buffer("context_scale", torch.ones(structure.context_dim))

    def sample(self, eps: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map noise to variables; return them and the log of each dz/deps, both of shape (\*batch, D)."""
        raise NotImplementedError

    def inverse_terms(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map variables to noise; return it and the log of each dz/deps, both of shape (\*batch, D)."""
        raise NotImplementedError

    def start(self, *context: Tensor) -> FlowPass:
        """Begin a pass through the levels.

        Args:
            context: The context, in parts that are broadcast and concatenated along the last dimension.
        """
        raise NotImplementedError

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The positions of the variables by level, in the order of sampling."""
        return self.structure.levels

    @property
    def event_dim(self) -> int:
        """The number of variables, D."""
        return self.structure.event_dim

    @property
    def context_dim(self) -> int:
        """The number of context columns, C."""
        return self.structure.context_dim

    @torch.no_grad()
    def standardize_(
        self,
        loc: Tensor,
        scale: Tensor,
        context_loc: Tensor | None = None,
        context_scale: Tensor | None = None,
    ) -> None:
        """Let the flow work in standardised coordinates (z − loc) / scale and (x − context_loc) / context_scale.

        Args:
            loc: Shape (D,).
            scale: Shape (D,), positive.
            context_loc: Shape (C,); unchanged by default.
            context_scale: Shape (C,), positive; unchanged by default.

        Raises:
            GraphflowsError: If a value is not finite or a scale not positive.
        """
        given = {"loc": loc, "scale": scale, "context_loc": context_loc, "context_scale": context_scale}
        for name, value in given.items():
            if value is None:
                continue
            good = value.isfinite() & ((value > 0) if name.endswith("scale") else value.isfinite())
            if not bool(good.all()):
                names = self.structure.context_names if "context" in name else self.structure.names
                bad = ", ".join(names[i] for i in (~good).nonzero().flatten().tolist())
                raise GraphflowsError(
                    f"Expected finite locations and positive, finite scales; {name} is not so for {bad}."
                )
            getattr(self, name).copy_(value)

    def join_context(self, *context: Tensor) -> Tensor | None:
        """Broadcast and concatenate the parts of a context.

        Raises:
            GraphflowsError: If the number of columns is wrong.
        """
        got = sum(part.shape[-1] for part in context)
        if got != self.context_dim:
            raise GraphflowsError(
                f"Expected context.shape[-1] == {self.context_dim} "
                f"({some_names(self.structure.context_names) or 'no context'}); got {got}."
            )
        if len(context) <= 1:
            return context[0] if got else None
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in context))
        return torch.cat([part.expand(*batch, -1) for part in context], -1)

    def standard_context(self, *context: Tensor) -> Tensor | None:
        """Join the parts of a context and standardise it."""
        x = self.join_context(*context)
        return None if x is None else (x - self.context_loc) / self.context_scale

    def check_event(self, values: Tensor) -> None:
        """Check the last dimension of variables or noise.

        Raises:
            GraphflowsError: If it is not the number of variables.
        """
        if values.shape[-1:] != (self.event_dim,):
            raise GraphflowsError(
                f"Expected a last dimension of {self.event_dim} ({some_names(self.structure.names)}); "
                f"got shape {tuple(values.shape)}."
            )


class LinearStartNN(FlowNN):
    """Base class of networks that can be exactly linear-Gaussian; subclasses write :meth:`init_linear_`."""

    def init_linear_(
        self, weights: Tensor, shift: Tensor, scale: Tensor, *, variables: Sequence[int] | None = None
    ) -> None:
        r"""Make the flow linear-Gaussian: :math:`z_v = \sum_j W_{vj} (x, z)_j + b_v + s_v \varepsilon_v`.

        Entries of ``weights`` off the structure are ignored.

        Args:
            weights: W, of shape (D, C + D); columns are the context and then the variables.
            shift: b, of shape (D,).
            scale: s, of shape (D,), positive.
            variables: The positions of the variables to set; the others are left as they are. All by default.

        Raises:
            GraphflowsError: If a shape is wrong or a scale is not positive.
        """
        raise NotImplementedError

    @torch.no_grad()
    def initialize_(self, z: Tensor, context: Tensor | None = None) -> None:
        """Standardise by samples, and start from the least-squares regression of each variable on its parents.

        Args:
            z: Samples of the variables, of shape (n, D).
            context: Samples of the context, of shape (n, C).

        Raises:
            GraphflowsError: If there are fewer than two samples or a value is not finite.
        """
        fit = regress_on_parents(self.structure, z, context)
        self.standardize_(*moments(z), *(() if context is None else moments(context)))
        self.init_linear_(*fit)

    @property
    def units_of_parents(self) -> tuple[Tensor, Tensor]:
        """The shifts and scales of the variables' values as parents of others."""
        return self.loc, self.scale

    def in_standard_units(
        self, weights: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights on the structure, shifts and log-scales of :meth:`init_linear_` in standardised coordinates.

        Raises:
            GraphflowsError: If a shape is wrong or a scale is not positive.
        """
        dim, num_context = self.event_dim, self.context_dim
        if weights.shape != (dim, num_context + dim) or shift.shape != (dim,) or scale.shape != (dim,):
            raise GraphflowsError(
                f"Expected weights of shape ({dim}, {num_context + dim}), shift and scale of shape ({dim},); "
                f"got {tuple(weights.shape)}, {tuple(shift.shape)} and {tuple(scale.shape)}."
            )
        if not bool((scale > 0).all()):
            raise GraphflowsError(
                "Expected positive scales; got some that are zero, negative or not a number."
            )
        parent_loc, parent_scale = self.units_of_parents
        loc = in_float64(torch.cat([self.context_loc, parent_loc]))
        unit = in_float64(torch.cat([self.context_scale, parent_scale]))
        own = in_float64(self.scale)
        weights = weights.to(loc) * structure_mask(self.structure).to(loc.device)
        shift = (shift.to(loc) + weights @ loc - self.loc.to(loc)) / own
        return weights * unit / own.unsqueeze(-1), shift, (scale.to(loc) / own).log()


class _OfNetwork:
    """What transforms with and without a context hand on to their network."""

    network: FlowNN

    @property
    def structure(self) -> FlowStructure:
        """Who depends on whom."""
        return self.network.structure

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The variables by level, in the order of sampling."""
        return self.network.levels

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

    def start(self) -> FlowPass:
        """Begin a pass through the levels; see :class:`FlowPass`."""
        return self.network.start(*self._parts)

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

    def start(self, *context: Tensor) -> FlowPass:
        """Begin a pass through the levels with a context in parts; see :class:`FlowPass`."""
        return self.network.start(*context)

    def inverse_terms(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the noise and the log of each dz/deps, both of shape (\*batch, D)."""
        return self.network.inverse_terms(z, *context)

    def condition(self, context: Tensor) -> GraphTransform:
        r"""Return the transform for a context of shape (\*batch, C)."""
        return self.transform_type(self.network, context)


class LinearStart:
    """What transforms with and without a context hand on to a network that can be linear-Gaussian. A mixin."""

    network: LinearStartNN

    def init_linear_(self, weights: Tensor, shift: Tensor, scale: Tensor) -> None:
        """Make the flow linear-Gaussian; see :meth:`LinearStartNN.init_linear_`."""
        self.network.init_linear_(weights, shift, scale)

    def initialize_(self, z: Tensor, context: Tensor | None = None) -> None:
        """Standardise and regress on samples; see :meth:`LinearStartNN.initialize_`."""
        self.network.initialize_(z, context)


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means and standard deviations of the columns of samples; a constant column gets 1."""
    wide = in_float64(values.detach())
    scale = wide.std(0)
    return wide.mean(0).to(values), torch.where(scale > 0, scale, torch.ones_like(scale)).to(values)


def structure_mask(structure: FlowStructure) -> Tensor:
    """Return the boolean matrix of direct dependencies, (D, C + D), columns context first.

    Example:
        >>> structure_mask(FlowStructure([(), (0,)], [(0,), ()], 1)).int().tolist()
        [[1, 0, 0], [0, 1, 0]]
    """
    mask = torch.zeros(structure.event_dim, structure.context_dim + structure.event_dim, dtype=torch.bool)
    for v, (own, given) in enumerate(zip(structure.parents, structure.context_parents, strict=True)):
        mask[v, [*given, *(structure.context_dim + p for p in own)]] = True
    return mask


def regress_on_parents(
    structure: FlowStructure, z: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the linear-Gaussian fit :math:`z_v = \sum_j W_{vj} (x, z)_j + b_v + s_v \varepsilon_v`.

    All regressions are solved from one sample covariance, in float64 and standardised coordinates.

    Args:
        structure: Who may depend on whom.
        z: Samples of the variables, of shape (n, D).
        context: Samples of the context, of shape (n, C).

    Returns:
        W of shape (D, C + D), b of shape (D,) and s of shape (D,), in float64.

    Raises:
        GraphflowsError: If there are fewer than two samples, or a value is not finite.
    """
    values = in_float64(z if context is None else torch.cat([context, z], -1))
    num_context, dim = structure.context_dim, structure.event_dim
    if len(values) < 2 or values.shape[-1] != num_context + dim or not bool(values.isfinite().all()):
        raise GraphflowsError(
            f"Expected at least two samples of {dim} variables and {num_context} context columns, all finite; "
            f"got shape {tuple(values.shape)}."
        )
    loc, scale = values.mean(0), values.std(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    standard = (values - loc) / scale
    of_values = Moments(standard)
    weights = standard.new_zeros(dim, num_context + dim)
    spread = standard.new_ones(dim)
    for v in range(dim):
        inputs = [*structure.context_parents[v], *(num_context + p for p in structure.parents[v])]
        fit = of_values.regress(inputs, [num_context + v])
        weights[v, inputs], spread[v] = fit.weights[0], fit.scale_tril[0, 0]
    weights = weights * scale[num_context:].unsqueeze(-1) / scale
    return (
        weights,
        loc[num_context:] - weights @ loc,
        spread * scale[num_context:],
    )
