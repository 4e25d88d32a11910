r"""All levels of a faithful flow in its sampling direction as one operation, with its gradient written out.

Going through the levels one small step after another costs more in overhead than in arithmetic: a network of a hundred
variables has some fifteen levels of four blocks each, and every block is a dozen operations on a few thousand numbers.
Here only what truly depends on the level before is done level by level, about six operations in a block on the way
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
        self.levels: list[tuple[int, int]] = []
        cells: list[tuple[int, int]] = []  # (block, variable) of each cell
        start = 0
        for size in edges.level_sizes:
            self.levels.append((start, start + size))
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
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        eps, context, weight, bias, inner, outer, log_scale = tensors
        cells, hidden, units = plan.num_cells, plan.hidden, plan.hidden + 1
        num_context, blocks = plan.num_context, plan.blocks
        size = eps.shape[1]
        matrix = weight.new_zeros((num_context + plan.dim) * cells, units)
        matrix = matrix.index_copy_(0, plan.positions, weight.reshape(-1, units)).view(-1, cells * units)
        rows = bias.view(-1, units).index_select(0, plan.variable_major).view(-1, 1)
        if num_context:
            rows = torch.addmm(rows, matrix[:num_context].t(), context)
        pre = rows.repeat(1, size // rows.shape[1])  # (rows, N); first the share of bias and context
        by_cell = pre.view(cells, units, size)
        u = inner.reshape(-1, hidden).index_select(0, plan.block_major)
        w = outer.reshape(-1, hidden).index_select(0, plan.block_major)
        scale = log_scale.reshape(-1, 1).index_select(0, plan.block_major)
        factor = scale.exp()
        column_u, row_w = u.unsqueeze(-1), w.unsqueeze(1)
        entering, middle = torch.empty_like(eps).new_empty(2, cells, size)
        z = torch.empty_like(eps)
        value_of = plan.activation.terms
        for start, stop in plan.levels:
            first, last, n = start * blocks, stop * blocks, stop - start
            if start:
                level_rows = slice(first * units, last * units)
                known = matrix[num_context : num_context + start, level_rows]
                pre[level_rows].addmm_(known.t(), z[:start])
            y = eps[start:stop]
            for c in range(first, last, n):
                part = slice(c, c + n)
                entering[part] = y
                a = by_cell[part, :hidden].addcmul_(column_u[part], y.unsqueeze(1))
                mid = torch.baddbmm(y.unsqueeze(1), row_w[part], value_of(a, 0)[0]).squeeze(1)
                middle[part] = mid
                y = torch.addcmul(by_cell[part, hidden], mid, factor[part])
            z[start:stop] = y

        grads = any(ctx.needs_input_grad)
        terms = plan.activation.terms(by_cell, 2 if grads else 1)
        # A zero for the shift's row: it takes no part in the slope.
        w, u = (torch.nn.functional.pad(part, (0, 1)) for part in (w, u))
        rho = torch.bmm((w * u).unsqueeze(1), terms[1]).squeeze(1)
        log_slope = torch.log1p(rho).add_(scale)
        total = log_slope.new_zeros(plan.dim, size).index_add_(0, plan.variable, log_slope)
        if grads:
            ctx.save_for_backward(context, matrix, u, w, factor, entering, middle, z, rho, *terms)
            ctx.plan = plan
            ctx.shapes = weight.shape, bias.shape, inner.shape, log_scale.shape
        return z, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log: Tensor) -> tuple[Tensor | None, ...]:
        context, matrix, u, w, factor, entering, middle, z, rho, value, slope, curve = ctx.saved_tensors
        plan: _Plan = ctx.plan
        weight_shape, bias_shape, inner_shape, scale_shape = ctx.shapes
        cells, hidden, units = plan.num_cells, plan.hidden, plan.hidden + 1
        num_context, blocks, size = plan.num_context, plan.blocks, z.shape[1]
        column_w = w.unsqueeze(-1)
        grad_cell = grad_log.index_select(0, plan.variable)  # of the log-slope of each cell
        steep = rho + 1
        grad_rho = grad_cell / steep
        bent = (curve * (w * u).unsqueeze(-1)).mul_(grad_rho.unsqueeze(1))
        pulled = torch.bmm(u.unsqueeze(1), bent).squeeze(1)
        through = slope * (column_w * factor.unsqueeze(-1))
        through[:, hidden] = 1  # the shift
        steep.mul_(factor)
        grad = grad_z.clone()
        grad_out = torch.empty_like(rho)  # of each block's output
        grad_pre = torch.empty_like(bent)
        grad_eps = torch.empty_like(z)
        flat = grad_pre.view(cells * units, size)
        for start, stop in reversed(plan.levels):
            first, last, n = start * blocks, stop * blocks, stop - start
            g = grad[start:stop]
            for c in range(last - n, first - 1, -n):
                part = slice(c, c + n)
                grad_out[part] = g
                g = torch.addcmul(pulled[part], g, steep[part])
            grad_eps[start:stop] = g
            level = slice(first, last)
            torch.addcmul(bent[level], grad_out[level].unsqueeze(1), through[level], out=grad_pre[level])
            if start:
                level_rows = slice(first * units, last * units)
                known = matrix[num_context : num_context + start, level_rows]
                grad[:start].addmm_(known, flat[level_rows])

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
        by_rho = torch.bmm(slope, grad_rho.unsqueeze(-1)).squeeze(-1)  # (cells, H + 1)
        grad_u = torch.baddbmm((w * by_rho).unsqueeze(-1), grad_pre, entering.unsqueeze(-1)).squeeze(-1)
        grad_mid = grad_out.mul_(factor)
        grad_w = torch.baddbmm((u * by_rho).unsqueeze(-1), value, grad_mid.unsqueeze(-1)).squeeze(-1)
        grad_scale = grad_mid.mul_(middle).add_(grad_cell).sum(1)
        back = plan.from_block_major
        return (
            None,
            grad_eps,
            grad_context,
            grad_weight,
            grad_bias,
            grad_u[:, :hidden].index_select(0, back).view(inner_shape),
            grad_w[:, :hidden].index_select(0, back).view(inner_shape),
            grad_scale.index_select(0, back).view(scale_shape),
        )
