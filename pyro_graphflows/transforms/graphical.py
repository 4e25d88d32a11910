r"""The network of :class:`GraphicalResidual`: residual blocks in which parents enter at their running values.

Block t maps :math:`y \mapsto y + g_t(y; x)`, where output v of :math:`g_t` depends on variable v, its parents and
its context columns, and the spectral norm of each masked weight is bounded, so that :math:`g_t` is a
contraction in y. The Jacobian is triangular in the order of the graph; the log-determinant comes from
one extra pass over the weights between units of the same owner (:mod:`pyro_graphflows.nn.residual`).

**An affine map behind the blocks.** Spectral norms bound the blocks, so that they cannot hold a regression. In guides
(:class:`AffineGraphicalNN`) what comes out of the blocks, u, therefore goes through an affine map along the same graph,

.. math:: z_v = b_v + \sum_{p \in Pa(v)} W_{vp}\, (x, z)_p + e^{\lambda_v(x, z_{Pa(v)})}\, u_v,

level by level. With blocks that start at zero output the whole is exactly linear-Gaussian. The map's Jacobian is
triangular in the order of the graph as that of the blocks is, so each variable keeps its own term.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.nn.activations import Activation
from pyro_graphflows.nn.residual import (
    ContextLayers,
    MaskedResidualNet,
    ResidualEvaluation,
    all_entries,
    go_through,
)
from pyro_graphflows.transforms.faithful import FaithfulEvaluation, FaithfulResidualNN
from pyro_graphflows.transforms.network import FlowNN, FlowPass
from pyro_graphflows.transforms.solver import Solver, implicit_triangular, solve_triangular
from pyro_graphflows.transforms.structure import FlowStructure

__all__ = ["AffineGraphicalEvaluation", "AffineGraphicalNN", "GraphicalEvaluation", "GraphicalResidualNN"]


class GraphicalResidualNN(FlowNN):
    """Residual blocks over a graph.

    Args:
        structure: Who depends on whom.
        num_blocks: The number of blocks.
        hidden_dims: The width of each hidden layer; by default one layer with ``units_per_variable`` for each
            variable. Too narrow raises, naming what would be lost.
        units_per_variable: The units of one hidden layer for one variable.
        closed_form: ``"density"`` or ``"sampling"``: the direction that needs no numerical inversion.
        activation: An activation with known slopes, or its name.
        lipschitz: c in (0, 1): the largest spectral norm of each masked weight.
        allow_short: Whether, in the closed form "sampling", fewer blocks than hops are allowed.
        engine: ``"auto"``, ``"dense"`` or ``"sparse"``; they give the same numbers.
        solver: How to invert numerically.

    Raises:
        GraphflowsError: If an argument is out of range, or information cannot reach every variable from all of its
            ancestors in so many blocks (closed form "sampling"; the message says how many are needed).
    """

    level_order: Tensor  # the variables, level by level
    level_place: Tensor  # the place of each variable there

    def __init__(
        self,
        structure: FlowStructure,
        *,
        num_blocks: int = 4,
        hidden_dims: Sequence[int] | None = None,
        units_per_variable: int = 8,
        closed_form: str = "density",
        activation: str | Activation = "lipmish",
        lipschitz: float = 0.97,
        allow_short: bool = False,
        engine: str = "auto",
        solver: Solver | None = None,
    ) -> None:
        super().__init__(structure)
        if closed_form not in ("density", "sampling"):
            raise GraphflowsError(f'Expected closed_form "density" or "sampling"; got {closed_form!r}.')
        if not 0 < lipschitz < 1:
            raise GraphflowsError(f"Expected 0 < lipschitz < 1; got {lipschitz}.")
        if num_blocks < 1:
            raise GraphflowsError(f"Expected num_blocks >= 1; got {num_blocks}.")
        if closed_form == "sampling" and not allow_short and num_blocks < structure.max_hops:
            raise GraphflowsError(
                f"Expected num_blocks >= {structure.max_hops}, the largest number of edges on a shortest path from "
                f"an ancestor to a variable; got {num_blocks}. With fewer, some variables cannot depend on all "
                f"their ancestors in the sampling direction. Use more blocks, FaithfulResidual, or allow_short=True."
            )
        self.closed_form = closed_form
        self.solver = solver or Solver()
        dim = structure.event_dim
        allowed = [
            {v, *own, *(dim + c for c in given)}
            for v, (own, given) in enumerate(zip(structure.parents, structure.context_parents, strict=True))
        ]
        self.blocks = nn.ModuleList(
            MaskedResidualNet(
                allowed,
                dim + structure.context_dim,
                hidden_dims=hidden_dims,
                units_per_set=units_per_variable,
                activation=activation,
                bound=lipschitz,
                engine=engine,
                names=[*structure.names, *structure.context_names],
            )
            for _ in range(num_blocks)
        )
        self.of_context = ContextLayers(self._nets())
        order = torch.tensor([v for level in self.levels for v in level])
        self.register_buffer("level_order", order, persistent=False)
        self.register_buffer("level_place", torch.argsort(order), persistent=False)

    @torch.no_grad()
    def zero_output_(self, variables: Sequence[int] | None = None) -> None:
        """Let the map of some variables, or of all, be the identity; their hidden units keep their weights."""
        chosen = torch.zeros(self.event_dim, dtype=torch.bool, device=self.loc.device)
        chosen[slice(None) if variables is None else list(variables)] = True
        for block in self._nets():
            block.zero_output_(chosen)

    def start(self, *context: Tensor) -> "GraphicalEvaluation":
        """Begin a pass through the levels; see :class:`GraphicalEvaluation`."""
        return GraphicalEvaluation(self, *context)

    def prepare(self, *context: Tensor) -> list[ResidualEvaluation]:
        """Mask and bound the weights of all blocks and take in the context, for one or more passes."""
        x = self.standard_context(*context)
        nets = self._nets()
        parts = zip(nets, all_entries(nets), self.of_context(x), strict=True)
        return [ResidualEvaluation(net, x, entries, added) for net, entries, added in parts]

    def sample(self, eps: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map noise to variables.

        Args:
            eps: Shape (\*batch, D).
            context: The context, in parts.

        Returns:
            z and the log of each dz/deps, both of shape (\*batch, D).
        """
        return self.sample_with(self.prepare(*context), eps)

    def sample_with(self, evaluations: Sequence[ResidualEvaluation], eps: Tensor) -> tuple[Tensor, Tensor]:
        """Do as :meth:`sample` with blocks that are ready."""
        self.check_event(eps)
        if self.closed_form == "sampling":
            y, log_diag = self._forth(eps, evaluations)
        else:
            y, log_slope = self._back(eps, evaluations)
            log_diag = -log_slope
        return y * self.scale + self.loc, log_diag + self.scale.log()

    def inverse_terms(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map variables to noise.

        Args:
            z: Shape (\*batch, D).
            context: The context, in parts.

        Returns:
            eps and the log of each dz/deps (as in :meth:`sample`), both of shape (\*batch, D).
        """
        return self.inverse_terms_with(self.prepare(*context), z)

    def inverse_terms_with(
        self, evaluations: Sequence[ResidualEvaluation], z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do as :meth:`inverse_terms` with blocks that are ready."""
        self.check_event(z)
        y = (z - self.loc) / self.scale
        if self.closed_form == "density":
            eps, log_slope = self._forth(y, evaluations)
            log_diag = -log_slope
        else:
            eps, log_diag = self._back(y, evaluations)
        return eps, log_diag + self.scale.log()

    def _forth(self, y: Tensor, evaluations: Sequence[ResidualEvaluation]) -> tuple[Tensor, Tensor]:
        """Go through the blocks; return the values and the sum of the log-diagonals."""
        batch = _joint_batch(y, evaluations)
        columns, total = go_through(evaluations, _to_columns(y, batch), batch)
        return _from_columns(columns, batch), _from_columns(total, batch)

    def _back(self, target: Tensor, evaluations: Sequence[ResidualEvaluation]) -> tuple[Tensor, Tensor]:
        """Go back through the blocks; return the values and the log-diagonals of the way forth."""
        batch = _joint_batch(target, evaluations)
        columns = _to_columns(target, batch)
        total: Tensor | None = None
        for block, evaluation in zip(self._nets()[::-1], evaluations[::-1], strict=True):
            columns, log_slope = self._invert_block(block, evaluation, columns, batch)
            total = log_slope if total is None else total + log_slope
        assert total is not None
        return _from_columns(columns, batch), _from_columns(total, batch)

    def _invert_block(
        self, block: MaskedResidualNet, evaluation: ResidualEvaluation, target: Tensor, batch: torch.Size
    ) -> tuple[Tensor, Tensor]:
        def function(y: Tensor, samples: Tensor | None) -> tuple[Tensor, Tensor]:
            change, diagonal = evaluation.columns(y, batch, samples)
            return change.add_(y), diagonal.add_(1)

        def slopes() -> tuple[Tensor, Tensor]:
            bound = block.diagonal_bound().clamp(max=block.lipschitz)
            return 1 - bound, 1 + bound

        with torch.no_grad():
            solution, diagonal = solve_triangular(
                function,
                target,
                self._levels(),
                slopes,
                solver=self.solver,
                what=f"GraphicalResidual (closed form {self.closed_form!r})",
            )
        if not torch.is_grad_enabled():
            return solution, diagonal.log()
        change, _ = evaluation.columns(solution, batch)
        pull = evaluation.pull(solution, batch)
        y = implicit_triangular(
            solution, solution + change - target, diagonal, lambda u: u + pull(u), len(self.levels) - 1
        )
        return y, torch.log1p(evaluation.columns(y, batch)[1])

    def _nets(self) -> list[MaskedResidualNet]:
        return [block for block in self.blocks if isinstance(block, MaskedResidualNet)]

    def _levels(self) -> list[Tensor]:
        ends = [0]
        for level in self.levels:
            ends.append(ends[-1] + len(level))
        return [self.level_order[start:stop] for start, stop in pairwise(ends)]


def _joint_batch(y: Tensor, evaluations: Sequence[ResidualEvaluation]) -> torch.Size:
    batch, context = y.shape[:-1], evaluations[0].batch_shape
    return torch.broadcast_shapes(batch, context) if context else batch


def _to_columns(y: Tensor, batch: torch.Size) -> Tensor:
    return y.expand(*batch, -1).reshape(batch.numel(), y.shape[-1]).T.contiguous()


def _from_columns(columns: Tensor, batch: torch.Size) -> Tensor:
    return columns.view(len(columns), *batch).movedim(0, -1)


@dataclass(frozen=True)
class _Ahead:
    """One pass with noise for all levels from ``first`` on."""

    key: tuple[torch.Size, bool]  # the batch shape, and whether with gradients
    first: int
    noise: Sequence[Tensor]
    z: Tensor
    log_diag: Tensor
    used: set[int] = field(default_factory=set)  # levels whose noise was handed out, by any fork

    def at(self, level: int) -> Tensor:
        return self.noise[level - self.first]


class GraphicalEvaluation(FlowPass):
    """A pass through the levels of a graphical flow; see :class:`~pyro_graphflows.transforms.network.FlowPass`.

    In this flow a variable depends on the noise of its ancestors and not on their values, so when values are replaced
    their noise is found by inverting the flow. Each step is a whole pass through the network, but with noise from
    :meth:`noise` one pass serves all levels for as long as values are accepted as they were drawn.

    Args:
        network: The network.
        context: The context, in parts.
    """

    _network: GraphicalResidualNN

    def __init__(self, network: GraphicalResidualNN, *context: Tensor) -> None:
        super().__init__(network)
        self._blocks = network.prepare(*context)
        self._eps: list[Tensor] = []
        self._values: list[Tensor] = []
        self._drawn: tuple[Tensor, Tensor] | None = None  # noise and values of the last step
        self._ahead: _Ahead | None = None

    @property
    def level(self) -> int:
        """The number of the level whose values are wanted next."""
        return len(self._values)

    def fork(self) -> "GraphicalEvaluation":
        """Return an evaluation at the same place that goes its own way from here."""
        other = copy.copy(self)
        other._eps, other._values = list(self._eps), list(self._values)
        return other

    def noise(self, shape: Sequence[int]) -> Tensor:
        r"""Draw standard normal noise for the next level, such that :meth:`step` need not pass through the network.

        Noise for all later levels is drawn with it, and what it is mapped to is kept. Each call draws other noise.

        Args:
            shape: The batch shape.

        Returns:
            Shape (\*shape, n), columns as in ``network.levels[level]``.
        """
        shape, network = torch.Size(shape), self._network
        ahead = self._ahead
        key = (shape, torch.is_grad_enabled())
        if ahead is None or ahead.key != key or self.level in ahead.used:
            later = sum(map(len, network.levels[self.level :]))
            drawn = torch.randn(*shape, later, dtype=network.loc.dtype, device=network.loc.device)
            noise = drawn.split([len(level) for level in network.levels[self.level :]], -1)
            full = self._joined([*self._eps, *noise], torch.zeros_like(network.loc))
            z, log_diag = network.sample_with(self._blocks, full)
            self._ahead = ahead = _Ahead(key, self.level, noise, z, log_diag)
        ahead.used.add(self.level)
        return ahead.at(self.level)

    def step(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Map the noise of the next level to values."""
        columns = list(self.check_level(eps))
        if self._ahead is not None and self._ahead.at(self.level) is eps:
            z, log_diag = self._ahead.z[..., columns], self._ahead.log_diag[..., columns]
        else:
            full = self._joined([*self._eps, eps], torch.zeros_like(self._network.loc))
            z, log_diag = (t[..., columns] for t in self._network.sample_with(self._blocks, full))
        self._drawn = (eps, z)
        return z, log_diag

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map given values of the next level to noise."""
        columns = list(self.check_level(z))
        full = self._joined([*self._values, z], self._network.loc)
        eps, log_diag = self._network.inverse_terms_with(self._blocks, full)
        return eps[..., columns], log_diag[..., columns]

    def accept(self, z: Tensor) -> None:
        """Hand in the values of the next level, and go on to the level after it."""
        self.check_level(z)
        if self._drawn is not None and self._drawn[1] is z:
            eps = self._drawn[0]
        else:
            eps = self.terms(z)[0]
        if self._ahead is not None and self._ahead.at(self.level) is not eps:
            self._ahead = None  # what was computed ahead rests on other values
        self._eps.append(eps)
        self._values.append(z)
        self._drawn = None

    def _joined(self, parts: list[Tensor], rest: Tensor) -> Tensor:
        """Put the levels known so far in their places; the others do not matter, since they come later."""
        network = self._network
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        known = sum(map(len, network.levels[: len(parts)]))
        later = rest[network.level_order[known:]]
        full = torch.cat([part.expand(*batch, -1) for part in (*parts, later)], -1)
        return full.index_select(-1, network.level_place)


class AffineGraphicalNN(nn.Module):
    """Residual blocks over a graph and an affine map along it.

    Args:
        structure: Who depends on whom.
        num_blocks: The number of residual blocks; by default 4, or as many as information needs to reach every variable
            from all its ancestors.
        conditional_scale: Whether parents act on the scales of the affine map.
        conditioner_units: The hidden units of a conditioner of the affine map
            (:class:`~pyro_graphflows.transforms.faithful.FaithfulResidualNN`); 0 for none.
        conditioner_layers: The number of its hidden layers.
        natural_units: See :class:`~pyro_graphflows.transforms.faithful.FaithfulResidualNN`.
        **options: Further arguments of :class:`GraphicalResidualNN`.

    Attributes:
        blocks: The residual flow.
        affine: The affine map: a :class:`~pyro_graphflows.transforms.faithful.FaithfulResidualNN` without
            hidden units.

    Raises:
        GraphflowsError: If an argument is out of range, or there are fewer blocks than hops.
    """

    def __init__(
        self,
        structure: FlowStructure,
        *,
        num_blocks: int | None = None,
        conditional_scale: bool = True,
        conditioner_units: int = 0,
        conditioner_layers: int = 1,
        natural_units: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_blocks is None:
            num_blocks = max(4, structure.max_hops)
        self.blocks = GraphicalResidualNN(structure, num_blocks=num_blocks, **options)
        self.affine = FaithfulResidualNN(
            structure,
            num_blocks=1,
            units_per_variable=0,
            closed_form="sampling",
            conditional_scale=conditional_scale,
            conditioner_units=conditioner_units,
            conditioner_layers=conditioner_layers,
            natural_units=natural_units,
        )

    @torch.no_grad()
    def init_linear_(
        self, weights: Tensor, shift: Tensor, scale: Tensor, *, variables: Sequence[int] | None = None
    ) -> None:
        """Make the flow linear-Gaussian; see :meth:`FaithfulResidualNN.init_linear_`.

        The residual blocks keep their hidden units but get zero output.

        Args:
            weights: Shape (D, C + D); columns are the context and then the variables.
            shift: Shape (D,).
            scale: Shape (D,), positive.
            variables: The variables to set; all by default.
        """
        self.affine.init_linear_(weights, shift, scale, variables=variables)
        self.blocks.zero_output_(variables)

    def start(self, *context: Tensor) -> "AffineGraphicalEvaluation":
        """Begin a pass through the levels.

        Args:
            context: The context, in parts.
        """
        return AffineGraphicalEvaluation(self.blocks.start(*context), self.affine.start(*context))


class AffineGraphicalEvaluation(FlowPass):
    """A pass through the levels of both; see :class:`~pyro_graphflows.transforms.network.FlowPass`.

    Args:
        blocks: The pass through the residual flow, noise to u.
        affine: The pass through the affine map, u to z.
    """

    def __init__(self, blocks: GraphicalEvaluation, affine: FaithfulEvaluation) -> None:
        super().__init__(affine._network)
        self._blocks = blocks
        self._affine = affine
        self._drawn: tuple[Tensor, Tensor] | None = None  # z and u of the last step

    @property
    def level(self) -> int:
        """The number of the level whose values are wanted next."""
        return self._affine.level

    def fork(self) -> "AffineGraphicalEvaluation":
        """Return an evaluation at the same place that goes its own way from here."""
        other = copy.copy(self)
        other._blocks, other._affine = self._blocks.fork(), self._affine.fork()
        return other

    def noise(self, shape: Sequence[int]) -> Tensor:
        r"""Draw the noise of the next level, (\*shape, n); see :meth:`GraphicalEvaluation.noise`."""
        return self._blocks.noise(shape)

    def step(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map the noise of the next level to values; return these and the log of each dz/deps, (\*batch, n)."""
        u, log_diag = self._blocks.step(eps)
        z, log_scale = self._affine.step(u)
        self._drawn = (z, u)
        return z, log_diag + log_scale

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map given values of the next level to noise; return it and the log of each dz/deps, (\*batch, n)."""
        u, log_scale = self._affine.terms(z)
        eps, log_diag = self._blocks.terms(u)
        return eps, log_diag + log_scale

    def accept(self, z: Tensor) -> None:
        """Hand in the values of the next level, and go on to the level after it."""
        drawn = self._drawn is not None and self._drawn[0] is z
        self._blocks.accept(self._drawn[1] if drawn and self._drawn else self._affine.terms(z)[0])
        self._affine.accept(z)
        self._drawn = None
