r"""The network of :class:`FaithfulResidual`: one-dimensional flows that see their parents' final values.

Variable v has a monotone map :math:`F_v(\cdot\,; z_{Pa(v)}, x_{Pa(v)})`, a stack of one-dimensional residual blocks
whose coefficients depend on exactly its parents. In the closed form "density" it maps :math:`z_v` to the noise
:math:`\varepsilon_v`, for all variables in parallel; sampling then goes level by level, and inverts in one
dimension. In the closed form "sampling" it maps :math:`\varepsilon_v` to :math:`z_v`, level by level, and scoring
given values inverts in one dimension, for all variables in parallel. Either way

.. math:: q(z \mid x) = \prod_v q(z_v \mid z_{Pa(v)}, x_{Pa(v)}), \qquad
    \log q(z_v \mid \cdot) = \log \mathcal{N}(\varepsilon_v) - \log \frac{\partial z_v}{\partial \varepsilon_v}

for any number of blocks, and going through the levels costs one pass in all, since each level evaluates its own
slice of the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.nn.activations import Activation, make_activation
from pyro_graphflows.transforms.conditioner import Conditioner
from pyro_graphflows.transforms.edge_linear import EdgeLinear, Inputs, RowGroup, expand_batch, padded_count
from pyro_graphflows.transforms.faithful_evaluation import FaithfulEvaluation
from pyro_graphflows.transforms.flow_nn import FlowNN, moments, some_names
from pyro_graphflows.transforms.monotone import BlockWeights, MonotoneStack
from pyro_graphflows.transforms.regression import regress_on_parents, structure_mask
from pyro_graphflows.transforms.solver import Solver, implicit_step
from pyro_graphflows.transforms.structure import FlowStructure

__all__ = ["FaithfulResidualNN"]

# At most so many numbers are computed at a time, so that they stay near the processor; and if there are more than
# so many in all, pieces are computed again in the backward pass, so that memory stays bounded.
PIECE = 2**20
RECOMPUTE = 2**25
CHECKPOINT: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


@dataclass(frozen=True)
class Prepared:
    """A group of variables with its weights made ready for a pass."""

    group: RowGroup
    weight: Tensor
    bias: Tensor
    rows: BlockWeights

    def piece(self, part: slice) -> "Prepared":
        """Return some of the rows (sparse engine)."""
        if part.stop - part.start == self.group.size:
            return self
        return Prepared(self.group.piece(part), self.weight[part], self.bias[part], self.rows.piece(part))


class FaithfulResidualNN(FlowNN):
    """Monotone maps of all variables, with their parents, scales and standardisation.

    Args:
        structure: Who depends on whom.
        num_blocks: The number of residual blocks of each variable.
        hidden_dims: The width of each hidden layer over all variables; every variable gets an equal share. By
            default one layer with ``units_per_variable`` for each.
        units_per_variable: The units of one hidden layer of a block for one variable; 0 leaves affine maps alone.
        closed_form: ``"density"`` or ``"sampling"``: the direction that needs no numerical inversion.
        activation: An activation with known slopes, or its name.
        lipschitz: c in (0, 1); a residual map's slope stays above 1 − c.
        conditional_scale: Whether parents also act on the log-scale of each block, linearly and bounded.
        conditioner_units: The hidden units, for each distinct set of parents, of a network through which parents act
            nonlinearly on shifts, scales and hidden units (:mod:`~pyro_graphflows.transforms.conditioner`); 0 for none.
        conditioner_layers: The number of its hidden layers.
        engine: ``"auto"``, ``"dense"`` or ``"sparse"``; they give the same numbers.
        solver: How to invert numerically.

    Raises:
        GraphflowsError: If an argument is out of range, or ``hidden_dims`` leaves a variable without a unit.
    """

    _order: Tensor
    _place: Tensor

    def __init__(
        self,
        structure: FlowStructure,
        *,
        num_blocks: int = 4,
        hidden_dims: Sequence[int] | None = None,
        units_per_variable: int = 8,
        closed_form: str = "density",
        activation: str | nn.Module = "elu",
        lipschitz: float = 0.97,
        conditional_scale: bool = False,
        conditioner_units: int = 0,
        conditioner_layers: int = 1,
        engine: str = "auto",
        solver: Solver | None = None,
    ) -> None:
        super().__init__(structure)
        dim, num_context = structure.event_dim, structure.context_dim
        activation = make_activation(activation)
        if not isinstance(activation, Activation):
            raise GraphflowsError(
                f"Expected an activation with known slopes (a subclass of nn.activations.Activation); "
                f"got {type(activation).__name__}."
            )
        if closed_form not in ("density", "sampling"):
            raise GraphflowsError(f'Expected closed_form "density" or "sampling"; got {closed_form!r}.')
        if not 0 < lipschitz < 1:
            raise GraphflowsError(f"Expected 0 < lipschitz < 1; got {lipschitz}.")
        if num_blocks < 1 or min(units_per_variable, conditioner_units) < 0 or conditioner_layers < 1:
            raise GraphflowsError(
                "Expected num_blocks and conditioner_layers >= 1, units_per_variable and conditioner_units >= 0; got "
                f"{num_blocks}, {conditioner_layers}, {units_per_variable} and {conditioner_units}."
            )
        if hidden_dims is not None and (not hidden_dims or min(hidden_dims) < dim):
            lost = some_names(structure.names[min(hidden_dims, default=0) :])
            raise GraphflowsError(
                f"Expected hidden_dims of at least {dim}, one unit for each variable; got {list(hidden_dims)}. "
                f"Variables that would be left without: {lost}."
            )
        self.closed_form = closed_form
        self.solver = solver or Solver()
        self.levels = structure.levels
        order = _order(structure)
        place = sorted(range(dim), key=order.__getitem__)
        self.stack = MonotoneStack(
            dim,
            num_blocks,
            [units_per_variable] if hidden_dims is None else [width // dim for width in hidden_dims],
            activation,
            lipschitz,
            affine_first=closed_form == "density",
            conditional_scale=conditional_scale,
        )
        inputs = [
            [*structure.context_parents[v], *sorted(num_context + place[p] for p in structure.parents[v])]
            for v in order
        ]
        sizes, num_outputs = [len(level) for level in self.levels], num_blocks * self.stack.num_inputs
        self.edges = EdgeLinear(inputs, num_context, sizes, num_outputs, engine=engine)
        self.conditioner: Conditioner | None = None
        if conditioner_units:
            self.conditioner = Conditioner(
                inputs,
                num_context,
                sizes,
                num_outputs,
                units_per_set=conditioner_units,
                hidden_layers=conditioner_layers,
            )
        self._level_starts = [sum(map(len, self.levels[:i])) for i in range(len(self.levels) + 1)]
        self._columns: dict[Any, Any] = {}  # index tensors by level and device
        self._ordered = order == list(range(dim))
        self.register_buffer("_order", torch.tensor(order), persistent=False)  # inner number -> position
        self.register_buffer("_place", torch.tensor(place), persistent=False)  # position -> inner number
        self.reset_parameters()

    # Starting values

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random hidden units with small outputs; shifts and scales start near the identity."""
        counts = torch.tensor([len(self.edges.parents[v]) for v, _ in self.edges.edges], dtype=torch.long)
        width = counts.to(self.edges.weight).rsqrt().view(-1, 1, 1)
        for parameter, spread in ((self.edges.weight, width), (self.edges.bias, 1.0)):
            value = torch.randn_like(parameter)
            value = value.view(len(parameter), self.stack.num_blocks, self.stack.num_inputs)
            value[..., self.stack.hidden_units[0] :] *= 0.01
            parameter.copy_((value * spread).flatten(1))
        if self.conditioner is not None:
            self.conditioner.scale_output_(0.01)

    @torch.no_grad()
    def init_linear_(
        self, weights: Tensor, shift: Tensor, scale: Tensor, *, variables: Sequence[int] | None = None
    ) -> None:
        r"""Make the flow linear-Gaussian: :math:`z_v = \sum_j W_{vj} (x, z)_j + b_v + s_v \varepsilon_v`.

        Hidden units keep their weights but get zero output. Entries of ``weights`` off the structure are ignored.

        Args:
            weights: W, of shape (D, C + D); columns are the context and then the variables.
            shift: b, of shape (D,).
            scale: s, of shape (D,), positive.
            variables: The positions of the variables to set; the others are left as they are. All by default.

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
        # In standardised coordinates, inner order:
        loc = torch.cat([self.context_loc, self.loc]).double()
        unit = torch.cat([self.context_scale, self.scale]).double()
        own = self.scale.double()
        weights = weights.to(loc) * structure_mask(self.structure).to(loc.device)
        shift = ((shift.to(loc) + weights @ loc - self.loc) / own)[self._order]
        log_scale = (scale.to(loc) / own).log()[self._order]
        weights = weights * unit / own.unsqueeze(-1)
        inputs = torch.cat([torch.arange(num_context, device=self._order.device), num_context + self._order])
        weights = weights[self._order][:, inputs]

        stack, first = self.stack, self.stack.hidden_units[0]
        by_edge = self.edges.weight.view(len(self.edges.weight), stack.num_blocks, stack.num_inputs)
        by_variable = self.edges.bias.view(dim, stack.num_blocks, stack.num_inputs)
        chosen = range(dim) if variables is None else variables
        rows = self._place[list(chosen)]  # inner numbers
        by_variable[rows, :, first:] = 0.0
        stack.outer[:, rows] = 0.0
        stack.log_scale[:, rows] = 0.0
        if self.conditioner is not None:
            self.conditioner.scale_output_(0.0, rows.tolist())
        sign, block = (-1, 0) if self.closed_form == "density" else (1, stack.num_blocks - 1)
        wanted = set(rows.tolist())
        edges = [e for e, (child, _) in enumerate(self.edges.edges) if child in wanted]
        if edges:
            children, parents = (
                list(column) for column in zip(*(self.edges.edges[e] for e in edges), strict=True)
            )
            by_edge[edges, :, first:] = 0.0
            by_edge[edges, block, first] = sign * weights[children, parents].to(by_edge)
        by_variable[rows, block, first] = sign * shift[rows].to(by_variable)
        stack.log_scale[block, rows] = sign * log_scale[rows].to(stack.log_scale)

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

    # Evaluation

    def start(self, *context: Tensor) -> FaithfulEvaluation:
        """Begin a pass through the levels.

        Args:
            context: The context, in parts that are broadcast and concatenated along the last dimension.

        Returns:
            The evaluation; see :class:`FaithfulEvaluation`.
        """
        return FaithfulEvaluation(self, self.standard_context(*context))

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
        columns = [v for level in self.levels for v in level]
        z, log_diag = torch.cat(values, -1), torch.cat(terms, -1)
        if columns != list(range(self.event_dim)):
            back = torch.tensor(sorted(range(self.event_dim), key=columns.__getitem__), device=z.device)
            z, log_diag = z.index_select(-1, back), log_diag.index_select(-1, back)
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
        standard = (z - self.loc) / self.scale
        if not self._ordered:
            standard = standard.index_select(-1, self._order)
        known = expand_batch(standard.movedim(-1, 0), batch)
        groups, restore = self.edges.all_rows()
        inputs = Inputs(batch, None if x is None else x.movedim(-1, 0), known)
        supplied = None
        if self.conditioner is not None:
            given = None if inputs.context is None else expand_batch(inputs.context, batch)
            supplied = self.conditioner(given, known)
        results = self.run(self.prepare(groups), inputs, known, "density", supplied)
        back = restore if self._ordered else self._place if restore is None else restore[self._place]
        if back is not None:
            results = (results[0].index_select(0, back), results[1].index_select(0, back))
        eps, log_diag = (result.view(-1, *batch).movedim(0, -1) for result in results)
        return eps, log_diag + self.scale.log()

    def level_columns(self, level: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the positions of a level, and the indices that sort them to inner order and back (or None)."""
        key = (level, self._order.device)
        if key not in self._columns:
            inner = self._order[self._level_starts[level] : self._level_starts[level + 1]]
            positions, back = inner.sort()
            same = torch.equal(positions, inner)
            self._columns[key] = (positions, None if same else torch.argsort(back), None if same else back)
        return self._columns[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": {}}

    def prepare(self, groups: Sequence[RowGroup]) -> list[Prepared]:
        """Return the weights of each group as a pass uses them; once for each evaluation."""
        stacks = self.stack.weights().groups([group.rows for group in groups])
        edges = self.edges.prepare(groups)
        return [
            Prepared(group, weight, bias, rows)
            for group, (weight, bias), rows in zip(groups, edges, stacks, strict=True)
        ]

    def run(
        self,
        prepared: Sequence[Prepared],
        inputs: Inputs,
        values: Tensor,
        direction: str,
        supplied: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Apply the maps of some variables in either direction, piece by piece.

        Args:
            prepared: The weights of the variables.
            inputs: What they may depend on.
            values: What to map, of shape (n, N), in the order of the variables' inner numbers.
            direction: ``"density"`` (variables to noise) or ``"sampling"`` (noise to variables).
            supplied: What the conditioner says, of shape (n, K, N), in the same order; None without one.

        Returns:
            The result and the log of the derivative of variable by noise, both of shape (n, N), in the order of
            the groups.
        """
        per_row = self.edges.num_outputs * inputs.size
        recompute = torch.is_grad_enabled() and len(values) * per_row > RECOMPUTE
        first = prepared[0].group.rows
        first_row = first.start if isinstance(first, slice) else 0
        results = []
        jobs: list[tuple[Prepared, Inputs, Tensor, Tensor | None]]
        for part in prepared:
            own = part.group.take(values, first_row)
            told = None if supplied is None else part.group.take(supplied, first_row)
            count = -(-part.group.size * per_row // PIECE)
            if self.edges.engine == "sparse":
                count = min(count, part.group.size)
                ends = [part.group.size * i // count for i in range(count + 1)]
                jobs = [
                    (part.piece(slice(i, j)), inputs, own[i:j], None if told is None else told[i:j])
                    for i, j in pairwise(ends)
                ]
                dim = 0
            else:
                count = min(count, max(1, inputs.size // 32))
                jobs = [
                    (part, narrow, own[:, columns], None if told is None else told[..., columns])
                    for columns, narrow in inputs.pieces(count)
                ]
                dim = 1
            pieces = []
            for job in jobs:
                if recompute:
                    pieces.append(checkpoint(self._compute, *job, direction, **CHECKPOINT))
                else:
                    pieces.append(self._compute(*job, direction))
            outs, logs = zip(*pieces, strict=True)
            results.append((outs[0], logs[0]) if count == 1 else (torch.cat(outs, dim), torch.cat(logs, dim)))
        if len(results) == 1:
            return results[0]
        outs, logs = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(logs)

    def _compute(
        self, part: Prepared, inputs: Inputs, values: Tensor, given: Tensor | None, direction: str
    ) -> tuple[Tensor, Tensor]:
        supplied = self.edges(part.group, part.weight, part.bias, inputs)
        if given is not None:
            supplied = supplied + given
        if direction == self.closed_form:
            out, log_slope = self.stack(values, supplied, part.rows)
        else:
            what = f"FaithfulResidual (closed form {self.closed_form!r})"
            solution = self.stack.inverse(values, supplied, part.rows, solver=self.solver, what=what)
            # The gradient is the implicit one; the value is improved by a last Newton step on the whole stack.
            image, log_slope = self.stack(solution, supplied, part.rows)
            out = implicit_step(solution, image - values, log_slope.exp())
            if torch.is_grad_enabled():
                _, log_slope = self.stack(out, supplied, part.rows)
        return out, log_slope if self.closed_form == "sampling" else -log_slope


def _order(structure: FlowStructure) -> list[int]:
    """Return the positions by level, then by rounded number of parents, as EdgeLinear wants them."""
    count = [
        padded_count(len(own) + len(given))
        for own, given in zip(structure.parents, structure.context_parents, strict=True)
    ]
    return [v for level in structure.levels for v in sorted(level, key=lambda v: (count[v], v))]
