r"""Splines over a graph: a monotone curve for each variable, in closed form in both directions.

Variable v is :math:`z_v = m_v + s_v\, S_v(\varepsilon_v)`, where :math:`S_v` is a monotone rational-quadratic spline
[1, 2] between :math:`-B` and :math:`B` and the identity outside. The location :math:`m_v`, the scale :math:`s_v` and
the knots of :math:`S_v` are the outputs of one masked network that see exactly the final values of v's parents, so that

.. math:: q(z \mid x) = \prod_v q(z_v \mid z_{Pa(v)}, x_{Pa(v)}).

The density is one pass for all variables in parallel, and sampling goes level by level; neither inverts numerically. A
linear map beside the network's hidden units holds a regression, and with them at zero the flow is exactly
linear-Gaussian.

References:
    [1] Durkan, Bekasov, Murray and Papamakarios (2019), Neural Spline Flows.
    [2] Gregory and Delbourgo (1982), Piecewise Rational Quadratic Interpolation to Monotonic Data.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.distributions.transforms.spline import ConditionedSpline
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import Node
from pyro_graphflows.nn.masked import MaskedLinear
from pyro_graphflows.nn.mlp import LevelEvaluation, MaskedMLP
from pyro_graphflows.transforms.network import (
    ConditionalGraphTransform,
    FlowPass,
    GraphTransform,
    LinearStart,
    LinearStartNN,
)
from pyro_graphflows.transforms.structure import FlowStructure, GraphLike, flow_structure, without_context

__all__ = [
    "ConditionalGraphicalSpline",
    "GraphicalSpline",
    "GraphicalSplineNN",
    "SplineEvaluation",
    "conditional_graphical_spline",
    "graphical_spline",
]

LOG_SCALE_BOUND = 7.0  # in standardised coordinates
LEAST_SLOPE = 1e-3  # of a spline at its knots; Pyro's bins have at least this share of the interval too
MOST_SLOPE = 1e3  # so that its square is far from overflow, however far out the parents are
START = 0.1  # what random weights behind the hidden units are multiplied by, and those of knots and scales everywhere


class GraphicalSplineNN(LinearStartNN):
    """Location, scale and knots of each variable as functions of its parents.

    Args:
        structure: Who depends on whom.
        num_bins: The number of pieces of each spline.
        bound: B: the spline acts on noise from −B to B.
        hidden_dims: The width of each hidden layer; by default one layer with ``units_per_set`` for each distinct set
            of parents. Too narrow raises, naming what would be lost.
        units_per_set: The hidden units for each distinct set of parents, without ``hidden_dims``.
        activation: An activation or its name.

    Raises:
        GraphflowsError: If an argument is out of range.
    """

    closed_form = "density"  # and "sampling": neither direction is solved for
    _order: Tensor
    _place: Tensor

    def __init__(
        self,
        structure: FlowStructure,
        *,
        num_bins: int = 8,
        bound: float = 4.0,
        hidden_dims: Sequence[int] | None = None,
        units_per_set: int = 8,
        activation: str | nn.Module = "elu",
    ) -> None:
        super().__init__(structure)
        if not 2 <= num_bins <= 1 / LEAST_SLOPE:
            raise GraphflowsError(f"Expected 2 <= num_bins <= {1 / LEAST_SLOPE:.0f}; got {num_bins}.")
        if not 0 < bound < math.inf:
            raise GraphflowsError(f"Expected a positive, finite bound; got {bound}.")
        self.num_bins, self.bound = num_bins, float(bound)
        num_context = structure.context_dim
        order = [v for level in structure.levels for v in level]  # inner number -> position
        place = sorted(range(len(order)), key=order.__getitem__)
        levels = [i for i, level in enumerate(structure.levels) for _ in level]
        names = [*structure.context_names, *(structure.names[v] for v in order)]
        allowed = [
            [*structure.context_parents[v], *(num_context + place[p] for p in structure.parents[v])]
            for v in order
        ]
        self.mlp = MaskedMLP(
            allowed,
            num_context + len(order),
            num_params=3 * num_bins + 1,  # location, log-scale, widths, heights, slopes at the inner knots
            hidden_dims=hidden_dims if any(allowed) else [],
            units_per_set=units_per_set,
            activation=activation,
            input_levels=[0] * num_context + [level + 1 for level in levels],
            output_levels=levels,
            input_names=names,
            output_names=names[num_context:],
            engine="auto" if any(allowed) else "sparse",  # without entries there is nothing to train
        )
        self.register_buffer("_order", torch.tensor(order), persistent=False)
        self.register_buffer("_place", torch.tensor(place), persistent=False)
        self._start_small()

    @property
    def _skip(self) -> MaskedLinear:
        skip = self.mlp.skip
        assert skip is not None
        return skip

    @torch.no_grad()
    def _start_small(self) -> None:
        """Let all but the linear map to the locations start with small weights."""
        if len(self.mlp.layers):
            last = self.mlp.layers[-1]
            assert isinstance(last, MaskedLinear)
            last.weight.mul_(START)
        skip = self._skip
        is_loc = torch.arange(skip.out_features) % self.mlp.num_params == 0
        factor = torch.where(is_loc, 1.0, START).to(skip.weight)
        if skip.engine == "dense":
            skip.weight.mul_(factor.unsqueeze(-1))
        else:
            skip.weight.mul_(factor[skip.pattern.row])

    @torch.no_grad()
    def init_linear_(
        self, weights: Tensor, shift: Tensor, scale: Tensor, *, variables: Sequence[int] | None = None
    ) -> None:
        """Make the flow linear-Gaussian; see :meth:`LinearStartNN.init_linear_`.

        Hidden units keep their weights but get zero output. Scales beyond ``exp(±7)`` in standardised coordinates are
        cut there.
        """
        num_context, count = self.context_dim, self.mlp.num_params
        weights, shift, log_scale = self.in_standard_units(weights, shift, scale)
        columns = torch.cat([torch.arange(num_context).to(self._order), num_context + self._order])
        weights, shift, log_scale = weights[:, columns], shift, log_scale / LOG_SCALE_BOUND
        raw_scale = LOG_SCALE_BOUND * log_scale.clamp(-1 + 1e-9, 1 - 1e-9).atanh()
        skip, last = self._skip, self.mlp.layers[-1] if len(self.mlp.layers) else None
        for v in range(self.event_dim) if variables is None else variables:
            start = int(self._place[v]) * count
            rows = slice(start, start + count)
            matrix, bias = weights.new_zeros(count, weights.shape[1]), shift.new_zeros(count)
            matrix[0], bias[0], bias[1] = weights[v], shift[v], raw_scale[v]
            skip.set_rows_(rows, matrix, bias)
            if isinstance(last, MaskedLinear):
                last.set_rows_(rows, 0.0)

    # Evaluation

    def start(self, *context: Tensor) -> "SplineEvaluation":
        """Begin a pass through the levels; see :class:`SplineEvaluation`."""
        return SplineEvaluation(self, self.standard_context(*context))

    def sample(self, eps: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map noise to variables, level by level.

        Args:
            eps: Shape (\*batch, D).
            context: The context, in parts.

        Returns:
            z and the log of each dz/deps, both of shape (\*batch, D).
        """
        self.check_event(eps)
        evaluation = self.start(*context)
        values, terms = [], []
        for level in self.levels:
            z, log_diag = evaluation.step(eps[..., list(level)])
            evaluation.accept(z)
            values.append(z)
            terms.append(log_diag)
        batch = values[-1].shape[:-1]
        full = (torch.cat([part.expand(*batch, -1) for part in parts], -1) for parts in (values, terms))
        z, log_diag = (part.index_select(-1, self._place) for part in full)
        return z, log_diag

    def inverse_terms(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map variables to noise, all in parallel.

        Args:
            z: Shape (\*batch, D).
            context: The context, in parts.

        Returns:
            eps and the log of each dz/deps (as in :meth:`sample`), both of shape (\*batch, D).
        """
        self.check_event(z)
        x = self.standard_context(*context)
        batch = torch.broadcast_shapes(z.shape[:-1], () if x is None else x.shape[:-1])
        y = ((z - self.loc) / self.scale).index_select(-1, self._order).expand(*batch, -1)
        raw = self.mlp(y if x is None else torch.cat([x.expand(*batch, -1), y], -1))
        eps, log_diag = (part.index_select(-1, self._place) for part in self.to_noise(y, raw))
        return eps, log_diag + self.scale.log()

    def to_noise(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map standardised values of some variables to noise.

        Args:
            y: Shape (\*batch, n).
            raw: The outputs of the network for them, of shape (\*batch, n, 3 · num_bins + 1).

        Returns:
            eps and the log of each dy/deps, both of shape (\*batch, n).
        """
        log_scale = self._log_scale(raw)
        eps, log_slope = self._spline((y - raw[..., 0]) * (-log_scale).exp(), raw, inverse=True)
        return eps, log_scale - log_slope

    def from_noise(self, eps: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Map noise to standardised values; the shapes are those of :meth:`to_noise`."""
        log_scale = self._log_scale(raw)
        u, log_slope = self._spline(eps, raw, inverse=False)
        return raw[..., 0] + log_scale.exp() * u, log_scale + log_slope

    def _log_scale(self, raw: Tensor) -> Tensor:
        return LOG_SCALE_BOUND * torch.tanh(raw[..., 1] / LOG_SCALE_BOUND)

    def _spline(self, u: Tensor, raw: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """Apply the spline or its inverse; return the values and the log-slopes of what was applied."""
        widths, heights, slopes = raw[..., 2:].split([self.num_bins, self.num_bins, self.num_bins - 1], -1)
        # Zeros are the identity: equal bins, and slopes of one as at both ends and outside.
        one = math.log(math.expm1(1 - LEAST_SLOPE))
        slopes = LEAST_SLOPE + F.softplus(slopes.clamp(max=MOST_SLOPE) + one)
        knots = (widths.softmax(-1), heights.softmax(-1), slopes, None)
        spline = ConditionedSpline(knots, bound=self.bound, order="quadratic")
        # What is outside takes no part: its square could overflow, and zero times infinity spoil the gradients.
        inside = u.clamp(-self.bound, self.bound)
        value, log_slope = spline.spline_op(inside, inverse=inverse, min_derivative=0.0, eps=0.0)
        is_inside = inside == u
        return torch.where(is_inside, value, u), torch.where(
            is_inside, log_slope, torch.zeros_like(log_slope)
        )


class SplineEvaluation(FlowPass):
    r"""A pass through the levels of a spline flow; see :class:`~pyro_graphflows.transforms.network.FlowPass`.

    Args:
        network: The network of the flow.
        context: The joined and standardised context, of shape (\*batch, C), or None.

    Example:
        >>> network = GraphicalSplineNN(FlowStructure([(), (0,)]))
        >>> evaluation = network.start()
        >>> for level in network.levels:
        ...     z, log_diag = evaluation.step(evaluation.noise((5,)))
        ...     evaluation.accept(z)
        >>> z.shape, log_diag.shape
        (torch.Size([5, 1]), torch.Size([5, 1]))
    """

    _network: GraphicalSplineNN

    def __init__(self, network: GraphicalSplineNN, context: Tensor | None) -> None:
        super().__init__(network)
        self._evaluation: LevelEvaluation = network.mlp.start()
        self._level = 0
        self._raw = self._evaluation.step(context)  # (*batch, n, parameters) of the next level

    @property
    def level(self) -> int:
        """The number of the level whose values are wanted next."""
        return self._level

    def fork(self) -> "SplineEvaluation":
        """Return an evaluation at the same place that goes its own way from here."""
        other = copy.copy(self)
        other._evaluation = self._evaluation.fork()
        return other

    def step(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Map the noise of the next level to values."""
        columns = list(self.check_level(eps))
        loc, scale = self._network.loc[columns], self._network.scale[columns]
        y, log_diag = self._network.from_noise(*self._joint(eps))
        return y * scale + loc, log_diag + scale.log()

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map given values of the next level to noise."""
        columns = list(self.check_level(z))
        loc, scale = self._network.loc[columns], self._network.scale[columns]
        eps, log_diag = self._network.to_noise(*self._joint((z - loc) / scale))
        return eps, log_diag + scale.log()

    def accept(self, z: Tensor) -> None:
        """Hand in the values of the next level, and go on to the level after it."""
        columns = list(self.check_level(z))
        self._level += 1
        if self._level < len(self._network.levels):
            standard = (z - self._network.loc[columns]) / self._network.scale[columns]
            self._raw = self._evaluation.step(standard)

    def _joint(self, values: Tensor) -> tuple[Tensor, Tensor]:
        batch = torch.broadcast_shapes(values.shape[:-1], self._raw.shape[:-2])
        return values.expand(*batch, -1), self._raw.expand(*batch, -1, -1)


class GraphicalSpline(LinearStart, GraphTransform):
    r"""A flow with exactly the density :math:`\prod_v q(z_v \mid z_{Pa(v)}, x_{Pa(v)})`, a spline for each variable.

    Calling the transform maps noise to variables, level by level; the density is one pass. Both are in closed form.
    Outside of ±B standard deviations of the noise a variable is normal given its parents.

    References:
        [1] Durkan, Bekasov, Murray and Papamakarios (2019), Neural Spline Flows. There autoregressive over all
        variables before; here over the parents in a graph, with a location and a scale.

    Shape:
        - Input and output: :math:`(*batch, D)`.

    Args:
        network: The network.
        context: The context, of shape (\*batch, C), for the conditional form.
        cache_size: 0 or 1.

    Example:
        >>> import networkx as nx, pyro.distributions as dist
        >>> flow = graphical_spline(nx.DiGraph([("a", "b"), ("b", "c")]))
        >>> q = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1).to_event(1), [flow])
        >>> q.log_prob(q.rsample((5,))).shape
        torch.Size([5])
    """

    network: GraphicalSplineNN


class ConditionalGraphicalSpline(LinearStart, ConditionalGraphTransform):
    r"""A :class:`GraphicalSpline` with context: ``.condition(context)`` is the transform.

    Args:
        network: The network.

    Example:
        >>> import networkx as nx
        >>> graph = nx.DiGraph([("x", "a"), ("a", "b")])
        >>> flow = conditional_graphical_spline(graph, ["x"])
        >>> flow.condition(torch.randn(7, 1))(torch.randn(7, 2)).shape
        torch.Size([7, 2])
    """

    network: GraphicalSplineNN
    transform_type = GraphicalSpline


def graphical_spline(
    graph: GraphLike | FlowStructure,
    hidden_dims: Sequence[int] | None = None,
    num_bins: int = 8,
    bound: float = 4.0,
    **options: Any,
) -> GraphicalSpline:
    """Return a :class:`GraphicalSpline` over the nodes of a graph.

    Args:
        graph: A digraph, ModelGraph, InverseGraph or FlowStructure without context; the event dimension is in its
            node order (see :func:`flow_structure`).
        hidden_dims: The width of each hidden layer; one layer with 8 units for each set of parents by default.
        num_bins: The number of pieces of each spline.
        bound: The spline acts on noise from −bound to bound.
        options: Further arguments of :class:`GraphicalSplineNN`.

    Returns:
        The transform.

    Raises:
        GraphflowsError: If the graph has context nodes, or an argument is out of range.
    """
    structure = without_context(graph, "conditional_graphical_spline")
    network = GraphicalSplineNN(structure, hidden_dims=hidden_dims, num_bins=num_bins, bound=bound, **options)
    return GraphicalSpline(network)


def conditional_graphical_spline(
    graph: GraphLike | FlowStructure,
    context: int | Iterable[Node] | None = None,
    hidden_dims: Sequence[int] | None = None,
    num_bins: int = 8,
    bound: float = 4.0,
    **options: Any,
) -> ConditionalGraphicalSpline:
    """Return a :class:`ConditionalGraphicalSpline` over the nodes of a graph.

    Args:
        graph: A digraph, ModelGraph, InverseGraph or FlowStructure; in an InverseGraph the latent nodes are the
            variables, and the observed nodes and inputs among their parents the context, in graph order.
        context: The nodes that are context, or the number of context columns that every variable depends on.
        hidden_dims: The width of each hidden layer; one layer with 8 units for each set of parents by default.
        num_bins: The number of pieces of each spline.
        bound: The spline acts on noise from −bound to bound.
        options: Further arguments of :class:`GraphicalSplineNN`.

    Returns:
        The conditional transform.

    Raises:
        GraphflowsError: If an argument is out of range.
    """
    structure = flow_structure(graph, context)
    network = GraphicalSplineNN(structure, hidden_dims=hidden_dims, num_bins=num_bins, bound=bound, **options)
    return ConditionalGraphicalSpline(network)
