r"""All levels of a faithful flow in its sampling direction as one operation, with its gradient written out.

Going through the levels one small step after another costs more in overhead than in arithmetic: a network of a hundred
variables has some fifteen levels of four blocks each, and every block is a dozen operations on a few thousand numbers.
Here only what truly depends on the level before is done level by level, four operations in a block on the way
forth and one on the way back; slopes, log-derivatives and the gradients of all weights are computed for all levels at
once. With the notation of :mod:`pyro_graphflows.transforms.monotone` (affine map after the residual map) and the
gradients :math:`\bar y` of a block's output and :math:`\bar\ell` of its log-slope, the way back through a block is

.. math::
    \bar a_h = \bar y\, e^\lambda w_h \varphi'(a_h) + \frac{\bar\ell}{1 + \rho} w_h u_h \varphi''(a_h), \qquad
    \bar y \leftarrow \bar y\, e^\lambda (1 + \rho) + \sum_h u_h \frac{\bar\ell}{1 + \rho} w_h u_h \varphi''(a_h),

where all factors but :math:`\bar y` are known beforehand.

Rows of the matrices are ordered by level, block, variable and unit, so that every step works on contiguous memory. The
weights of the edges are written into one dense matrix, so this is for networks of up to some hundred variables.
First derivatives only.
"""

from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_graphflows.nn.operation import Operation
from pyro_graphflows.transforms.faithful import FaithfulResidualNN

__all__ = ["LevelSampler"]

MAX_ENTRIES = 2**25  # of the dense matrix of all weights


class LevelSampler:
    """Sample from a :class:`FaithfulResidualNN` with closed form "sampling", all levels in one operation.

    The numbers are those of ``network.sample``. Networks that it does not know (other closed form, more than one hidden
    layer, activations with parameters, conditional scales, natural units, very many variables, other units of variables
    as parents than as results) are left to that method.

    Args:
        network: The network. It stays registered where it is; this object holds index tensors only.

    Example:
        >>> from pyro_graphflows.transforms.structure import FlowStructure
        >>> network = FaithfulResidualNN(FlowStructure([(), (0,)]), closed_form="sampling")
        >>> z, log_diag = LevelSampler(network)(torch.randn(5, 2))
        >>> z.shape, log_diag.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(self, network: FaithfulResidualNN) -> None:
        stack = network.stack
        self.network = network
        size = network.edges.num_variables * network.edges.num_outputs
        self.applies = (
            network.closed_form == "sampling"
            and stack.is_one_operation
            and not stack.conditional_scale
            and network.edges.units is None
            and size * (network.context_dim + network.event_dim) <= MAX_ENTRIES
        )
        if self.applies:
            self._plan = _Plan(network)

    def __call__(self, eps: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map noise to variables.

        Args:
            eps: Shape (\*batch, D).
            context: The context, in parts; its batch shape broadcasts with that of ``eps``.

        Returns:
            z and the log of each dz/deps, both of shape (\*batch, D).
        """
        network = self.network
        if not self.applies or not self._has_one_standardisation():
            return network.sample(eps, *context)
        network.check_event(eps)
        plan = self._plan.to(eps.device)
        x = network.standard_context(*context)
        batch = torch.broadcast_shapes(eps.shape[:-1], () if x is None else x.shape[:-1])
        noise = eps.expand(*batch, -1).reshape(-1, network.event_dim).t()[plan.order]  # (D, N)
        # Context that is the same for all particles (a leading dimension) is multiplied once.
        given = noise.new_zeros(0, 1) if x is None else x.reshape(-1, network.context_dim).t()
        shared = x is None or x.shape[:-1] == batch[len(batch) - x.dim() + 1 :]
        if not shared and x is not None:
            given = x.expand(*batch, -1).reshape(-1, network.context_dim).t()
        weights = network.stack.weights()
        z, log_diag = _Levels.apply(
            plan,
            noise,
            given,
            network.edges.weight,
            network.edges.bias,
            weights.inner,
            weights.outer,
            weights.log_scale,
        )
        scale = network.scale
        z = z.index_select(0, plan.place).t().reshape(*batch, -1) * scale + network.loc
        return z, log_diag.index_select(0, plan.place).t().reshape(*batch, -1) + scale.log()

    def _has_one_standardisation(self) -> bool:
        network = self.network
        return torch.equal(network.loc, network.input_loc) and torch.equal(network.scale, network.input_scale)


class _Plan:
    """Where everything is: cells are (level, block, variable), rows are (cell, unit or shift)."""

    def __init__(self, network: FaithfulResidualNN) -> None:
        stack, edges = network.stack, network.edges
        dim, blocks, hidden = edges.num_variables, stack.num_blocks, stack.hidden_units[0]
        self.dim, self.blocks, self.hidden = dim, blocks, hidden
        self.num_context = edges.num_context
        self.activation = type(stack.activation)
        self.num_cells = dim * blocks
        self.starts: list[int] = []  # of the levels
        self.sizes = list(edges.level_sizes)
        self.cells_of_level = [size * blocks for size in edges.level_sizes]
        self.rows_of_level = [cells * (hidden + 1) for cells in self.cells_of_level]
        self.cells_of_step = [size for size in edges.level_sizes for _ in range(blocks)]
        cells: list[tuple[int, int]] = []  # (block, variable) of each cell
        start = 0
        for size in edges.level_sizes:
            self.starts.append(start)
            cells += [(t, v) for t in range(blocks) for v in range(start, start + size)]
            start += size
        number = {cell: i for i, cell in enumerate(cells)}
        device = edges.weight.device
        self.order, self.place = network._order, network._place
        self.block_major = torch.tensor([t * dim + v for t, v in cells], device=device)
        self.from_block_major = torch.argsort(self.block_major)
        self.variable_major = torch.tensor([v * blocks + t for t, v in cells], device=device)
        self.from_variable_major = torch.argsort(self.variable_major)
        self.variable = torch.tensor([v for _, v in cells], device=device)
        self.first_cells = torch.tensor([number[0, v] for v in range(dim)], device=device)
        # Entry (input p, cell c) of the matrix holds the weights of one edge in one block.
        positions = [p * self.num_cells + number[t, v] for v, p in edges.edges for t in range(blocks)]
        self.positions = torch.tensor(positions, dtype=torch.long, device=device)

    def to(self, device: torch.device) -> "_Plan":
        """Return the plan with its index tensors on a device."""
        if self.order.device != device:
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(device))
        return self


class _Levels(Operation):
    """All levels, from seven tensors (in inner order, with H hidden units, T blocks and E edges).

    They are the noise (D, N); the context (C, M), N a multiple of M; the weights (E, T (H + 1)) and biases
    (D, T (H + 1)) of the edges; u and w of the residual maps, both (T, D, H); and the log-scales (T, D).

    Inside, numbers are of shape (cells, H, N), and (cells, 1, N) where there is one for each cell.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        eps, context, weight, bias, inner, outer, log_scale = tensors
        cells, hidden, units = plan.num_cells, plan.hidden, plan.hidden + 1
        num_context, size = plan.num_context, eps.shape[1]
        matrix = weight.new_zeros((num_context + plan.dim) * cells, units)
        matrix = matrix.index_copy_(0, plan.positions, weight.reshape(-1, units)).view(-1, cells * units)
        rows = bias.view(-1, units).index_select(0, plan.variable_major).view(-1, 1)
        if num_context:
            rows = torch.addmm(rows, matrix[:num_context].t(), context)
        pre = rows if rows.shape[1] == size and num_context else rows.repeat(1, size // rows.shape[1])
        by_cell = pre.view(cells, units, size)  # first the share of bias and context
        u = inner.reshape(-1, hidden).index_select(0, plan.block_major).unsqueeze(-1)
        w = outer.reshape(-1, hidden).index_select(0, plan.block_major).unsqueeze(-1)
        scale = log_scale.reshape(-1, 1, 1).index_select(0, plan.block_major)
        factor = scale.exp()
        entering, leaving = eps.new_empty(2, cells, 1, size)  # the residual maps
        entering[:, 0].index_copy_(0, plan.first_cells, eps)
        z = torch.empty_like(eps)
        # All pieces are cut beforehand, and results written to where they are wanted: no step only moves numbers.
        starts = list(entering.split(plan.cells_of_step))
        ends: list[Tensor] = [*starts[1:], z]
        ends[plan.blocks - 1 :: plan.blocks] = z.unsqueeze(1).split(plan.sizes)
        pieces = (by_cell[:, :hidden], by_cell[:, hidden:], u, w.mT, factor, leaving)
        steps = zip(*(piece.split(plan.cells_of_step) for piece in pieces), starts, ends, strict=True)
        own, known = pre.split(plan.rows_of_level), matrix[num_context:].t().split(plan.rows_of_level)
        activation, images = plan.activation, []
        for level, start in enumerate(plan.starts):
            if start:
                own[level].addmm_(known[level][:, :start], z[:start])
            for a, shift, column_u, row_w, step_factor, left, before, after in islice(steps, plan.blocks):
                images.append(activation.terms(a.addcmul_(column_u, before), 0)[0])
                torch.baddbmm(before, row_w, images[-1], out=left)
                torch.addcmul(shift, left, step_factor, out=after)

        order = 2 if any(ctx.needs_input_grad) else 1
        terms = (
            activation.terms_of_value(torch.cat(images), order)
            if activation.value_tells
            else activation.terms(by_cell[:, :hidden], order)
        )
        rho = torch.bmm((w * u).mT, terms[1])
        log_slope = torch.log1p(rho).add_(scale).squeeze(1)
        total = log_slope.new_zeros(plan.dim, size).index_add_(0, plan.variable, log_slope)
        ctx.save_for_backward(context, matrix, u, w, factor, entering, leaving, z, rho, *terms)
        ctx.plan = plan
        ctx.shapes = weight.shape, bias.shape, inner.shape, log_scale.shape
        return z, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log: Tensor) -> tuple[Tensor | None, ...]:
        context, matrix, u, w, factor, entering, leaving, z, rho, value, slope, curve = ctx.saved_tensors
        plan: _Plan = ctx.plan
        weight_shape, bias_shape, inner_shape, scale_shape = ctx.shapes
        cells, hidden, units = plan.num_cells, plan.hidden, plan.hidden + 1
        num_context, size = plan.num_context, z.shape[1]
        grad_cell = grad_log.index_select(0, plan.variable).unsqueeze(1)  # of the log-slope of each cell
        steep = rho + 1
        grad_rho = grad_cell / steep
        steep.mul_(factor)
        bent = (curve * (w * u)).mul_(grad_rho)
        pulled = torch.bmm(u.mT, bent)
        through = slope * (w * factor)
        grad = grad_z.clone()
        grad_eps = torch.empty_like(z)
        grad_by_cell = z.new_empty(cells, units, size)
        grad_pre, grad_out = grad_by_cell[:, :hidden], grad_by_cell[:, hidden:]  # the shift is added last
        flat = grad_by_cell.view(cells * units, size)
        # From the last step to the first. The gradient of a block's output goes to the block before it, or, from the
        # first block of a level, to the noise.
        outs = grad_out.split(plan.cells_of_step)
        ends: list[Tensor] = [grad_eps, *outs[:-1]]
        ends[:: plan.blocks] = grad_eps.unsqueeze(1).split(plan.sizes)
        parts = (pulled.split(plan.cells_of_step), steep.split(plan.cells_of_step))
        steps = zip(*(reversed(part) for part in (*parts, outs, ends)), strict=True)
        of_level = [piece.split(plan.cells_of_level) for piece in (grad_pre, bent, grad_out, through)]
        own, known = flat.split(plan.rows_of_level), matrix[num_context:].split(plan.rows_of_level, 1)
        grads = grad.unsqueeze(1).split(plan.sizes)
        for level in range(len(plan.starts) - 1, -1, -1):
            outs[(level + 1) * plan.blocks - 1].copy_(grads[level])
            for step_pulled, step_steep, out, end in islice(steps, plan.blocks):
                torch.addcmul(step_pulled, out, step_steep, out=end)
            into, level_bent, level_out, level_through = (part[level] for part in of_level)
            torch.addcmul(level_bent, level_out, level_through, out=into)
            start = plan.starts[level]
            if start:
                grad[:start].addmm_(known[level][:start], own[level])

        grad_context = None
        grad_matrix = torch.empty_like(matrix)
        if num_context:
            from_context = flat.view(cells * units, -1, context.shape[1]).sum(1)
            torch.mm(context, from_context.t(), out=grad_matrix[:num_context])
            if ctx.needs_input_grad[2]:
                grad_context = matrix[:num_context] @ from_context
        torch.mm(z, flat.t(), out=grad_matrix[num_context:])
        grad_weight = grad_matrix.view(-1, units).index_select(0, plan.positions).view(weight_shape)
        grad_bias = flat.sum(1).view(-1, units).index_select(0, plan.from_variable_major).view(bias_shape)
        # Rows times transposed matrices: the other way around takes several times as long.
        by_rho = torch.bmm(grad_rho, slope.mT)
        grad_leaving = grad_out * factor
        grad_u = torch.baddbmm(w.mT * by_rho, entering, grad_pre.mT)
        grad_w = torch.baddbmm(u.mT * by_rho, grad_leaving, value.mT)
        grad_scale = grad_leaving.mul_(leaving).add_(grad_cell).sum((1, 2))
        back = plan.from_block_major
        return (
            None,
            grad_eps,
            grad_context,
            grad_weight,
            grad_bias,
            grad_u.squeeze(1).index_select(0, back).view(inner_shape),
            grad_w.squeeze(1).index_select(0, back).view(inner_shape),
            grad_scale.index_select(0, back).view(scale_shape),
        )
