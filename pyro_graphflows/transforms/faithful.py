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

What the maps take from the parents (the pre-activations of hidden units, shifts and log-scales) is linear in them
(:mod:`~pyro_graphflows.transforms.edge_linear`), so that a location which is a nonlinear function of the parents can
only come out of the bounded residual maps. A *conditioner* adds an arbitrary function of the parents. Its hidden units
have label sets and no owner, and see final values alone, as those of a MADE network, so that variable v still depends
on exactly its parents and both directions of its map stay one-dimensional.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.nn.activations import Activation, make_activation
from pyro_graphflows.nn.masked import MaskedLinear
from pyro_graphflows.nn.mlp import LevelEvaluation, MaskedMLP
from pyro_graphflows.transforms.edge_linear import EdgeLinear, Inputs, RowGroup, expand_batch, padded_count
from pyro_graphflows.transforms.monotone import BlockForm, BlockWeights, MonotoneStack
from pyro_graphflows.transforms.network import FlowPass, LinearStartNN
from pyro_graphflows.transforms.solver import Solver, implicit_step
from pyro_graphflows.transforms.structure import FlowStructure, some_names

__all__ = ["Conditioner", "FaithfulEvaluation", "FaithfulResidualNN"]

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


class Conditioner(nn.Module):
    r"""Numbers for each variable as functions of its parents, evaluated at once or level by level.

    Args:
        parents: For each variable, the inputs it depends on; inputs are numbered with the context first and then the
            variables.
        num_context: The number of context columns, C.
        level_sizes: The number of variables of each level; variables are numbered by level.
        num_outputs: K.
        units_per_set: The hidden units of one layer for each distinct set of parents.
        hidden_layers: The number of hidden layers.
        natural_units: See :class:`~pyro_graphflows.nn.mlp.MaskedMLP`.

    Shape:
        - Values are features-first: context :math:`(C, *batch)`, variables :math:`(n, *batch)`; batch shapes broadcast.
        - Output: :math:`(n, K, *batch)`.
    """

    def __init__(
        self,
        parents: Sequence[Sequence[int]],
        num_context: int,
        level_sizes: Sequence[int],
        num_outputs: int,
        *,
        units_per_set: int,
        hidden_layers: int,
        natural_units: bool = False,
    ) -> None:
        super().__init__()
        levels = [level for level, size in enumerate(level_sizes) for _ in range(size)]
        self.num_levels = len(level_sizes)
        self.mlp = MaskedMLP(
            parents,
            num_context + len(parents),
            num_params=num_outputs,
            units_per_set=units_per_set,
            hidden_layers=hidden_layers,
            input_levels=[0] * num_context + [level + 1 for level in levels],
            output_levels=levels,
            skip=False,
            natural_units=natural_units,
        )
        # The linear map of the flow has a bias.
        self._last.bias = None

    @property
    def _last(self) -> MaskedLinear:
        last = self.mlp.layers[-1]
        assert isinstance(last, MaskedLinear)
        return last

    @torch.no_grad()
    def scale_output_(self, factor: float, variables: Sequence[int] | None = None) -> None:
        """Multiply the last layer's weights of some variables, or of all, by a number."""
        last, count = self._last, self.mlp.num_params
        chosen = torch.ones(last.out_features, dtype=torch.bool, device=last.weight.device)
        if variables is not None:
            chosen.fill_(False)
            chosen.view(-1, count)[list(variables)] = True
        rows = chosen if last.engine == "dense" else chosen[last.pattern.row]
        last.weight[rows] *= factor

    def forward(self, context: Tensor | None, values: Tensor) -> Tensor:
        """Return the numbers of all variables, (D, K, N), for context and values of equal batch size N."""
        inputs = values if context is None else torch.cat([context, values])
        return self.mlp(inputs.t()).permute(1, 2, 0)

    def start(self, context: Tensor | None) -> "Supply":
        """Begin an evaluation level by level."""
        return Supply(self.mlp.start(), context)


class Supply:
    """The numbers of one level, and the way to those of the next; never changed once made.

    Args:
        evaluation: The network's evaluation at this level.
        new: The values that became known, features-first; None if there are none.
    """

    def __init__(self, evaluation: LevelEvaluation, new: Tensor | None) -> None:
        self._evaluation = evaluation.fork()
        out = self._evaluation.step(None if new is None else new.movedim(0, -1))
        self.values = out.movedim((-2, -1), (0, 1))  # (n, K, *batch)

    def accept(self, values: Tensor) -> "Supply":
        """Return the numbers of the next level, given this level's values, features-first."""
        return Supply(self._evaluation, values)


class FaithfulResidualNN(LinearStartNN):
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
        conditioner_units: The hidden units, for each distinct set of parents, of a :class:`Conditioner` through which
            parents act nonlinearly on shifts, scales and hidden units; 0 for none.
        conditioner_layers: The number of its hidden layers.
        natural_units: Whether what parents supply is trained in whitened values of theirs, and shifts in units of what
            is left over (:mod:`~pyro_graphflows.nn.masked`).
        engine: ``"auto"``, ``"dense"`` or ``"sparse"``; they give the same numbers.
        solver: How to invert numerically.

    Attributes:
        loc: The shifts of what the maps give, (D,); see :meth:`standardize_`.
        scale: Their scales, (D,).
        input_loc: The shifts of values as parents of others, (D,), which are those of ``loc`` unless
            :meth:`set_input_units_` says otherwise.
        input_scale: Their scales, (D,).

    Raises:
        GraphflowsError: If an argument is out of range, or ``hidden_dims`` leaves a variable without a unit.
    """

    input_loc: Tensor
    input_scale: Tensor
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
        natural_units: bool = False,
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
        order = _order(structure)
        place = sorted(range(dim), key=order.__getitem__)
        widths = [units_per_variable * dim] if hidden_dims is None else hidden_dims
        form = BlockForm(
            num_blocks,
            tuple(width // dim for width in widths),
            affine_first=closed_form == "density",
            conditional_scale=conditional_scale,
            # the units of a variable move its value together
            gain=(num_blocks * max(widths[-1] // dim, 1)) ** -0.5 if natural_units else 1.0,
        )
        self.stack = MonotoneStack(dim, form, activation, lipschitz)
        inputs = [
            [*structure.context_parents[v], *sorted(num_context + place[p] for p in structure.parents[v])]
            for v in order
        ]
        sizes, num_outputs = [len(level) for level in self.levels], num_blocks * self.stack.num_inputs
        self.edges = EdgeLinear(
            inputs, num_context, sizes, num_outputs, engine=engine, natural_units=natural_units
        )
        self.conditioner: Conditioner | None = None
        if conditioner_units:
            self.conditioner = Conditioner(
                inputs,
                num_context,
                sizes,
                num_outputs,
                units_per_set=conditioner_units,
                hidden_layers=conditioner_layers,
                natural_units=natural_units,
            )
        self._reset_units_()
        self._level_starts = [sum(map(len, self.levels[:i])) for i in range(len(self.levels) + 1)]
        self._columns: dict[Any, Any] = {}  # index tensors by level and device
        self._ordered = order == list(range(dim))
        self.register_buffer("input_loc", torch.zeros(dim))
        self.register_buffer("input_scale", torch.ones(dim))
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
        if self.edges.units is not None and len(self.edges.weight):
            self.edges.weight.mul_(self.edges.units.root_of_rank().unsqueeze(-1))
        if self.conditioner is not None:
            self.conditioner.scale_output_(0.01)

    @torch.no_grad()
    def standardize_(
        self,
        loc: Tensor,
        scale: Tensor,
        context_loc: Tensor | None = None,
        context_scale: Tensor | None = None,
    ) -> None:
        """See :meth:`FlowNN.standardize_`; variables enter others in the same coordinates."""
        super().standardize_(loc, scale, context_loc, context_scale)
        self.set_input_units_(self.loc, self.scale)

    @torch.no_grad()
    def set_input_units_(self, loc: Tensor, scale: Tensor) -> None:
        """Let the values of variables enter others as (z − loc) / scale, whatever their own coordinates are.

        Args:
            loc: Shape (D,).
            scale: Shape (D,), positive.
        """
        self.input_loc.copy_(loc)
        self.input_scale.copy_(scale)

    @property
    def units_of_parents(self) -> tuple[Tensor, Tensor]:
        """See :meth:`LinearStartNN.units_of_parents`."""
        return self.input_loc, self.input_scale

    @torch.no_grad()
    def init_linear_(
        self, weights: Tensor, shift: Tensor, scale: Tensor, *, variables: Sequence[int] | None = None
    ) -> None:
        """Make the flow linear-Gaussian; see :meth:`LinearStartNN.init_linear_`.

        Hidden units keep their weights but get zero output.
        """
        dim, num_context = self.event_dim, self.context_dim
        weights, shift, log_scale = self.in_standard_units(weights, shift, scale)
        inputs = torch.cat([torch.arange(num_context, device=self._order.device), num_context + self._order])
        weights, shift, log_scale = (
            weights[self._order][:, inputs],
            shift[self._order],
            log_scale[self._order],
        )

        stack, first = self.stack, self.stack.hidden_units[0]
        units = self.edges.units
        sizes = stack.num_blocks, stack.num_inputs
        by_edge = self.edges.weight.view(len(self.edges.weight), *sizes)
        by_variable = self.edges.bias.view(dim, *sizes)
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
            if units is not None:
                by_edge = units.offset.view_as(by_edge)
                by_edge[edges, :, first:] = 0.0
            by_edge[edges, block, first] = sign * weights[children, parents].to(by_edge)
        if units is not None:
            by_variable = units.bias.view_as(by_variable)
            by_variable[rows, :, first:] = 0.0
            of_shift = units.unit.view_as(by_variable)[..., first]
            of_shift[rows] = 1 / stack.num_blocks
            of_shift[rows, block] *= log_scale[rows].exp().to(of_shift)
            self._share_units_()
        by_variable[rows, block, first] = sign * shift[rows].to(by_variable)
        stack.log_scale[block, rows] = sign * log_scale[rows].to(stack.log_scale)

    @torch.no_grad()
    def _reset_units_(self) -> None:
        """Let shifts and scales of blocks, which add up, be trained in smaller units the more blocks there are."""
        if self.edges.units is not None:
            unit = self.edges.units.unit.view(-1, self.stack.num_blocks, self.stack.num_inputs)
            unit[..., self.stack.hidden_units[0] :] = 1 / self.stack.num_blocks
            self._share_units_()

    @torch.no_grad()
    def _share_units_(self) -> None:
        """Let the conditioner have the units of the linear maps."""
        if self.edges.units is not None and self.conditioner is not None:
            of_conditioner = self.conditioner.mlp.units
            assert of_conditioner is not None
            of_conditioner.unit.copy_(self.edges.units.unit.flatten())

    @torch.no_grad()
    def whiten_(self, moments: Tensor) -> None:
        """Let what parents supply be trained in whitened values, where there are natural units.

        Args:
            moments: The second moments of the context columns and then the variables as parents, all standardised,
                ``(C + D, C + D)``.
        """
        if self.edges.units is None:
            return
        first = torch.arange(self.context_dim, device=self._order.device)
        inputs = torch.cat([first, self.context_dim + self._order])
        moments = moments[inputs][:, inputs]
        self.edges.units.whiteners.fit_(moments)
        if self.conditioner is not None:
            self.conditioner.mlp.whiten_(moments)

    # Evaluation

    def start(self, *context: Tensor) -> "FaithfulEvaluation":
        """Begin a pass through the levels; see :class:`FaithfulEvaluation`."""
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
        own = self._inner((z - self.loc) / self.scale, batch)
        known = self._inner((z - self.input_loc) / self.input_scale, batch)
        groups, restore = self.edges.all_rows()
        inputs = Inputs(batch, None if x is None else x.movedim(-1, 0), known)
        supplied = None
        if self.conditioner is not None:
            given = None if inputs.context is None else expand_batch(inputs.context, batch)
            supplied = self.conditioner(given, known)
        results = self.run(self.prepare(groups), inputs, own, "density", supplied)
        back = restore if self._ordered else self._place if restore is None else restore[self._place]
        if back is not None:
            results = (results[0].index_select(0, back), results[1].index_select(0, back))
        eps, log_diag = (result.view(len(result), *batch).movedim(0, -1) for result in results)
        return eps, log_diag + self.scale.log()

    def _inner(self, values: Tensor, batch: tuple[int, ...]) -> Tensor:
        """Bring values of all variables to inner order, features-first: (D, N)."""
        values = values if self._ordered else values.index_select(-1, self._order)
        return expand_batch(values.movedim(-1, 0), batch)

    def level_columns(self, level: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the positions of a level, and the indices that sort them to inner order and back (or None)."""
        key = (level, self._order.device)
        if key not in self._columns:
            inner = self._order[self._level_starts[level] : self._level_starts[level + 1]]
            positions, back = inner.sort()
            same = not inner.is_meta and torch.equal(positions, inner)
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
            supplied: The conditioner's numbers, of shape (n, K, N), in the same order; None without one.

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
            extra = None if supplied is None else part.group.take(supplied, first_row)
            count = max(1, -(-part.group.size * per_row // PIECE))
            if self.edges.engine == "sparse":
                count = min(count, part.group.size)
                ends = [part.group.size * i // count for i in range(count + 1)]
                jobs = [
                    (part.piece(slice(i, j)), inputs, own[i:j], None if extra is None else extra[i:j])
                    for i, j in pairwise(ends)
                ]
                dim = 0
            else:
                count = min(count, max(1, inputs.size // 32))
                jobs = [
                    (part, narrow, own[:, columns], None if extra is None else extra[..., columns])
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


class FaithfulEvaluation(FlowPass):
    r"""A pass through the levels of a faithful flow; see :class:`~pyro_graphflows.transforms.network.FlowPass`.

    The weights are prepared once, when the pass starts.

    Args:
        network: The network of the flow.
        context: The joined and standardised context, of shape (\*batch, C), or None.

    Example:
        >>> network = FaithfulResidualNN(FlowStructure([(), (0,)]), closed_form="sampling")
        >>> evaluation = network.start()
        >>> for level in network.levels:
        ...     z, log_diag = evaluation.step(torch.randn(5, len(level)))
        ...     evaluation.accept(z)
        >>> z.shape
        torch.Size([5, 1])
    """

    _network: FaithfulResidualNN

    def __init__(self, network: FaithfulResidualNN, context: Tensor | None) -> None:
        super().__init__(network)
        self._batch: tuple[int, ...] = () if context is None else context.shape[:-1]
        self._context = None if context is None else context.movedim(-1, 0)
        groups = [network.edges.level_rows(level) for level in range(len(network.levels))]
        prepared = iter(network.prepare([group for level in groups for group in level]))
        self._prepared = [[next(prepared) for _ in level] for level in groups]
        self._accepted: list[Tensor] = []  # standardised, (n, *batch) in inner order
        self._known: tuple[tuple[int, ...], Tensor] | None = None
        conditioner = network.conditioner
        self._supply = None if conditioner is None else conditioner.start(self._context)

    @property
    def level(self) -> int:
        """The number of the level whose values are wanted next."""
        return len(self._accepted)

    def fork(self) -> "FaithfulEvaluation":
        """Return an evaluation at the same place that goes its own way from here."""
        other = copy.copy(self)
        other._accepted = list(self._accepted)
        return other

    def step(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Map the noise of the next level to values."""
        return self._map(eps, "sampling")

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map given values of the next level to noise."""
        return self._map(z, "density")

    def accept(self, z: Tensor) -> None:
        """Hand in the values of the next level, and go on to the level after it."""
        self.check_level(z)
        positions, inner, _ = self._network.level_columns(self.level)
        standard = (z - self._network.input_loc[positions]) / self._network.input_scale[positions]
        if inner is not None:
            standard = standard.index_select(-1, inner)
        self._accepted.append(standard.movedim(-1, 0))
        if self._supply is not None and self.level < len(self._network.levels):
            self._supply = self._supply.accept(self._accepted[-1])

    def _map(self, values: Tensor, direction: str) -> tuple[Tensor, Tensor]:
        network = self._network
        self.check_level(values)
        positions, order, back = network.level_columns(self.level)
        loc, scale = network.loc[positions], network.scale[positions]
        shapes = [self._batch, values.shape[:-1], *(z.shape[1:] for z in self._accepted)]
        batch = torch.broadcast_shapes(*shapes)
        if direction == "density":
            values = (values - loc) / scale
        if order is not None:
            values = values.index_select(-1, order)
        own = expand_batch(values.movedim(-1, 0), batch)
        inputs = Inputs(batch, self._context, self._values(batch, own))
        supplied = None
        if self._supply is not None:
            given = self._supply.values
            supplied = expand_batch(given.flatten(0, 1), batch).view(*given.shape[:2], -1)
        results = network.run(self._prepared[self.level], inputs, own, direction, supplied)
        out, log_diag = (result.view(len(result), *batch).movedim(0, -1) for result in results)
        if back is not None:
            out, log_diag = out.index_select(-1, back), log_diag.index_select(-1, back)
        return out * scale + loc if direction == "sampling" else out, log_diag + scale.log()

    def _values(self, batch: tuple[int, ...], like: Tensor) -> Tensor:
        """Return all accepted values, of shape (number known, N); kept while the batch shape stays the same."""
        parts = self._accepted
        known = like.new_zeros(0, like.shape[-1])
        if self._known is not None and self._known[0] == batch:
            known = self._known[1]
            done = len(known)
            while done:
                done -= len(parts[0])
                parts = parts[1:]
        if parts:
            known = torch.cat([known, *(expand_batch(part, batch) for part in parts)])
        self._known = (batch, known)
        return known


def _order(structure: FlowStructure) -> list[int]:
    """Return the positions by level, then by rounded number of parents, as EdgeLinear wants them."""
    count = [
        padded_count(len(own) + len(given))
        for own, given in zip(structure.parents, structure.context_parents, strict=True)
    ]
    return [v for level in structure.levels for v in sorted(level, key=lambda v: (count[v], v))]
