r"""Stacks of one-dimensional residual blocks, one stack for each variable.

For a variable with value y and the numbers that its parents supply, a block is an affine map and a
residual map

.. math:: y \mapsto y + \sum_h w_h\, \varphi(s\, u_h y + a_h), \qquad y \mapsto e^{\lambda} (y + b)

where :math:`a_h` and :math:`b` depend on the parents, without any bound, and :math:`s` is the number in (0, 1] that
keeps the slope above :math:`1 - c`. With the derivative of :math:`\varphi` in [m, M] the slope of the sum lies in

.. math:: \Bigl[\sum_h \min(m\, u_h w_h, M\, u_h w_h),\ \sum_h \max(m\, u_h w_h, M\, u_h w_h)\Bigr],

attained in the limit, so :math:`s = \min(1, c / (-\text{lower end}))` is the exact bound. For tanh and ELU (m = 0)
positive products :math:`u_h w_h` are free: a block may stretch by any factor, and shrink by up to :math:`1 - c`. More
hidden layers propagate the interval layer by layer, which bounds the slope but is not attained. The interval
scales with u, so one rescaling is enough, and no power iteration is needed.

**One operation.** With one hidden layer the stack is one autograd operation, with its gradient written out. A block
computes :math:`a_h = s_h + u_h y` (s from the parents), the residual :math:`r = \sum_h w_h \varphi(a_h)`, its slope
:math:`\rho = \sum_h w_h u_h \varphi'(a_h)`, and the affine map :math:`e^\lambda (y + b)` before or
:math:`e^\lambda y + b` after it. For gradients :math:`\bar y, \bar\ell` of the new value and of the log-slope
:math:`\lambda + \log(1 + \rho)`, and :math:`\bar\rho = \bar\ell / (1 + \rho)`,

.. math::
    \bar a_h &= \bar y\, w_h \varphi'(a_h) + \bar\rho\, w_h u_h \varphi''(a_h), \qquad
    \bar y \leftarrow \bar y + \sum_h u_h \bar a_h, \\
    \bar w_h &= \bar y\, \varphi(a_h) + \bar\rho\, u_h \varphi'(a_h), \qquad
    \bar u_h = y\, \bar a_h + \bar\rho\, w_h \varphi'(a_h).

Only the value between blocks is kept; everything else is computed again, which costs less than to fetch it from
memory. This is several times faster than a chain of small operations where variables are few or levels many.
Second derivatives are taken through the plain operations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_graphflows.nn.activations import Activation
from pyro_graphflows.nn.operation import Operation
from pyro_graphflows.transforms.solver import Bounds, Solver, solve_elementwise

__all__ = ["BlockForm", "BlockWeights", "MonotoneStack"]


@dataclass(frozen=True)
class BlockForm:
    """How the blocks of a stack are made.

    Args:
        num_blocks: The number of blocks, T.
        hidden_units: The units of each hidden layer of a block, for one variable.
        affine_first: Whether the affine map comes before the residual map in a block.
        conditional_scale: Whether the parents also change the scale, by at most a factor of exp(±scale_range)
            in each block.
        scale_range: The bound on the conditional log-scale.
        gain: What the trained weights of the residual sums are multiplied by.
    """

    num_blocks: int
    hidden_units: tuple[int, ...]
    affine_first: bool
    conditional_scale: bool = False
    scale_range: float = 4.0
    gain: float = 1.0


@dataclass(frozen=True)
class BlockWeights:
    """The weights of some variables, with the bound applied. The first two dimensions are (blocks, variables)."""

    inner: Tensor  # (T, n, H_1): s u
    outer: Tensor  # (T, n, H_L)
    log_scale: Tensor  # (T, n)
    slope_min: Tensor  # (T, n)
    slope_max: Tensor  # (T, n)
    hidden: tuple[tuple[Tensor, Tensor], ...]  # (T, n, H_l, H_{l-1}), (T, n, H_l)

    def groups(self, rows: Sequence[Tensor | slice]) -> list["BlockWeights"]:
        """Return the weights of some of the variables, for each group of them."""
        tensors = self._tensors()
        if all(isinstance(part, slice) for part in rows):
            # One split, so that the backward pass is one concatenation.
            sizes = [part.stop - part.start for part in rows if isinstance(part, slice)]
            columns = [tensor.split(sizes, 1) for tensor in tensors]
        else:
            index = [torch.arange(self.inner.shape[1], device=self.inner.device)[part] for part in rows]
            columns = [tuple(tensor.index_select(1, part) for part in index) for tensor in tensors]
        return [BlockWeights._of(parts) for parts in zip(*columns, strict=True)]

    def piece(self, part: slice) -> "BlockWeights":
        """Return the weights of some of the variables."""
        return BlockWeights._of(tuple(tensor[:, part] for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        parts = (self.inner, self.outer, self.log_scale, self.slope_min, self.slope_max)
        return (*parts, *sum(self.hidden, ()))

    @staticmethod
    def _of(tensors: tuple[Tensor, ...]) -> "BlockWeights":
        inner, outer, log_scale, slope_min, slope_max, *rest = tensors
        hidden = tuple(zip(rest[::2], rest[1::2], strict=True))
        return BlockWeights(inner, outer, log_scale, slope_min, slope_max, hidden)


class MonotoneStack(nn.Module):
    """A stack of one-dimensional residual blocks for each of D variables.

    Each block takes ``num_inputs`` numbers per variable from its parents: the pre-activations of the first hidden
    layer, the shift, and the conditional log-scale if there is one.

    Args:
        num_variables: D.
        form: How the blocks are made.
        activation: An activation with known slopes.
        lipschitz: c in (0, 1): a residual map's slope is at least 1 − c.
    """

    def __init__(self, num_variables: int, form: BlockForm, activation: Activation, lipschitz: float) -> None:
        super().__init__()
        self.form = form
        self.activation = activation
        self.lipschitz = lipschitz
        first, last = form.hidden_units[0], form.hidden_units[-1]
        shape = (form.num_blocks, num_variables)
        self.inner = nn.Parameter(torch.randn(*shape, first))
        self.outer = nn.Parameter(torch.randn(*shape, last) * (0.1 / max(last, 1) ** 0.5 / form.gain))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.hidden_weights = nn.ParameterList(
            nn.Parameter(torch.randn(*shape, above, below) / below**0.5)
            for below, above in zip(form.hidden_units, form.hidden_units[1:], strict=False)
        )
        self.hidden_biases = nn.ParameterList(
            nn.Parameter(torch.randn(*shape, above)) for above in form.hidden_units[1:]
        )

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return self.form.num_blocks

    @property
    def hidden_units(self) -> tuple[int, ...]:
        """The units of each hidden layer of a block, for one variable."""
        return self.form.hidden_units

    @property
    def num_inputs(self) -> int:
        """How many numbers the parents supply for each block of a variable."""
        return self.form.hidden_units[0] + 1 + int(self.form.conditional_scale)

    @property
    def conditional_scale(self) -> bool:
        """Whether the parents also change the scales."""
        return self.form.conditional_scale

    @property
    def scale_range(self) -> float:
        """The bound on the conditional log-scale of a block."""
        return self.form.scale_range

    @property
    def is_one_operation(self) -> bool:
        """Whether blocks have one hidden layer, and an activation without parameters and with known curvature."""
        return (
            len(self.form.hidden_units) == 1
            and type(self.activation).forward_and_derivative is Activation.forward_and_derivative
            and self.activation.input_scale() is None
        )

    def slope_interval(self) -> tuple[Tensor, Tensor]:
        """Return bounds of the slope of each residual sum for s = 1, both of shape (T, D)."""
        low_slope, high_slope = self.activation.slope_min, self.activation.slope_max
        low: Tensor = self.inner
        high: Tensor = self.inner
        for weight in [*self.hidden_weights, self._scaled_outer().unsqueeze(-2)]:
            ends = torch.stack([low * low_slope, low * high_slope, high * low_slope, high * high_slope])
            low, high = ends.amin(0).unsqueeze(-1), ends.amax(0).unsqueeze(-1)
            up, down = weight.clamp(min=0), weight.clamp(max=0)
            low, high = (up @ low + down @ high).squeeze(-1), (up @ high + down @ low).squeeze(-1)
        return low.squeeze(-1), high.squeeze(-1)

    def _scaled_outer(self) -> Tensor:
        return self.outer if self.form.gain == 1.0 else self.outer * self.form.gain

    def weights(self) -> BlockWeights:
        """Return the weights with the bound applied; once for each evaluation."""
        low, high = self.slope_interval()
        bound = self.lipschitz / (-low).clamp(min=self.lipschitz)
        hidden = tuple(zip(self.hidden_weights, self.hidden_biases, strict=True))
        return BlockWeights(
            self.inner * bound.unsqueeze(-1),
            self._scaled_outer(),
            self.log_scale,
            (1 + bound * low).detach().clamp(min=1 - self.lipschitz),
            (1 + bound * high).detach(),
            hidden,
        )

    def _residual(
        self, y: Tensor, start: Tensor, weights: BlockWeights, t: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual sum, its slope, and the size of its terms, for y (n, N) and start (n, H_1, N)."""
        inner, outer = weights.inner[t], weights.outer[t].unsqueeze(-2)
        before = torch.addcmul(start, inner.unsqueeze(-1), y.unsqueeze(1))
        value, slope = self.activation.forward_and_derivative(before)
        if not weights.hidden:
            slope_out = torch.bmm(outer * inner.unsqueeze(-2), slope)
        else:
            tangent = slope * inner.unsqueeze(-1)
            for weight, bias in weights.hidden:
                before = torch.baddbmm(bias[t].unsqueeze(-1), weight[t], value)
                value, slope = self.activation.forward_and_derivative(before)
                tangent = slope * torch.bmm(weight[t], tangent)
            slope_out = torch.bmm(outer, tangent)
        return torch.bmm(outer, value).squeeze(1), slope_out.squeeze(1), value

    def _split(self, inputs: Tensor, weights: BlockWeights) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return start (n, H_1, N), shift (n, N) and log-scale (n, N) or (n, 1) of each block."""
        sizes = [self.hidden_units[0], self.num_inputs - self.hidden_units[0]] * self.num_blocks
        parts = inputs.split(sizes, 1)  # one split, whose backward pass is one concatenation
        blocks = []
        for t in range(self.num_blocks):
            start, rest = parts[2 * t], parts[2 * t + 1]
            log_scale = weights.log_scale[t].unsqueeze(-1)
            if self.conditional_scale:
                log_scale = log_scale + self.scale_range * torch.tanh(rest[:, 1] / self.scale_range)
            blocks.append((start, rest[:, 0], log_scale))
        return blocks

    def forward(self, y: Tensor, inputs: Tensor, weights: BlockWeights) -> tuple[Tensor, Tensor]:
        """Apply the stack.

        Args:
            y: The values, of shape (n, N).
            inputs: What the parents supply, of shape (n, T · num_inputs, N).
            weights: The weights of the n variables.

        Returns:
            The new values and the log of the slope of the whole stack, both of shape (n, N).
        """
        if self.is_one_operation:
            options = (type(self.activation), self.form, partial(self._plain, hidden=()))
            return _Stack.apply(y, inputs, weights.inner, weights.outer, weights.log_scale, options)
        return self._plain(y, inputs, weights.inner, weights.outer, weights.log_scale, hidden=weights.hidden)

    def _plain(
        self,
        y: Tensor,
        inputs: Tensor,
        inner: Tensor,
        outer: Tensor,
        log_scales: Tensor,
        *,
        hidden: tuple[tuple[Tensor, Tensor], ...],
    ) -> tuple[Tensor, Tensor]:
        """Apply the stack by differentiable operations."""
        weights = BlockWeights(inner, outer, log_scales, log_scales, log_scales, hidden)
        log_slope = torch.zeros_like(y)
        for t, (start, shift, log_scale) in enumerate(self._split(inputs, weights)):
            if self.form.affine_first:
                y = (y + shift) * log_scale.exp()
            residual, slope, _ = self._residual(y, start, weights, t)
            y = y + residual
            if not self.form.affine_first:
                y = y * log_scale.exp() + shift
            log_slope = log_slope + torch.log1p(slope) + log_scale
        return y, log_slope

    @torch.no_grad()
    def inverse(
        self, target: Tensor, inputs: Tensor, weights: BlockWeights, *, solver: Solver, what: str
    ) -> Tensor:
        """Return the values that the stack maps to ``target``, block by block, without gradient.

        Raises:
            ConvergenceError: If a value did not converge (or a warning, as the solver says).
        """
        y = target
        blocks = self._split(inputs, weights)
        for t in reversed(range(self.num_blocks)):
            start, shift, log_scale = blocks[t]
            if not self.form.affine_first:
                y = (y - shift) * (-log_scale).exp()
            y = self._inverse_residual(y, start, weights, t, solver, what)
            if self.form.affine_first:
                y = y * (-log_scale).exp() - shift
        return y

    def _inverse_residual(
        self, target: Tensor, start: Tensor, weights: BlockWeights, t: int, solver: Solver, what: str
    ) -> Tensor:
        def function(y: Tensor) -> tuple[Tensor, Tensor]:
            residual, slope, _ = self._residual(y, start, weights, t)
            return y + residual, 1 + slope

        residual, slope, value = self._residual(target, start, weights, t)
        noise = torch.bmm(weights.outer[t].abs().unsqueeze(-2), value.abs()).squeeze(1)
        low, high = weights.slope_min[t].unsqueeze(-1), weights.slope_max[t].unsqueeze(-1)
        # A first Newton step from the target, kept inside the bracket; a much better start than the target itself.
        initial = target - residual / (1 + slope).clamp(min=low, max=high)
        bounds = Bounds(low, high, noise)
        return solve_elementwise(function, target, bounds, initial=initial, solver=solver, what=what)


def _log_scale(block: Tensor, own: Tensor, form: BlockForm) -> tuple[Tensor, Tensor | None]:
    """Return the log-scale of a block, (n, 1) or (n, N), and the slope of its bounded part."""
    if not form.conditional_scale:
        return own.unsqueeze(-1), None
    bounded = torch.tanh(block[:, form.hidden_units[0] + 1] / form.scale_range)
    return own.unsqueeze(-1) + form.scale_range * bounded, 1 - bounded * bounded


_Options = tuple[type[Activation], BlockForm, Callable[..., tuple[Tensor, Tensor]]]


class _Stack(Operation):
    """A stack with one hidden layer, whose activation has no parameters.

    The arguments are those of :meth:`MonotoneStack.forward`, and as options the class of the activation, the form of
    the blocks and the same map of the five tensors by differentiable operations, for second derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # (n, N)
        inputs: Tensor,  # (n, T K, N)
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        inner, outer, log_scale, options = rest  # (T, n, H), (T, n, H), (T, n)
        activation, form, _ = options
        hidden = inner.shape[-1]
        both = outer * inner
        start = y
        total: Tensor | None = None
        kept = []  # the value that enters each residual map
        for t, block in enumerate(inputs.chunk(len(inner), 1)):
            scale, _ = _log_scale(block, log_scale[t], form)
            shift = block[:, hidden]
            if form.affine_first:
                y = (y + shift).mul_(scale.exp())
            kept.append(y)
            value, slope = activation.terms(
                torch.addcmul(block[:, :hidden], inner[t].unsqueeze(-1), y.unsqueeze(1)), 1
            )
            y = y + torch.bmm(outer[t].unsqueeze(1), value).squeeze(1)
            if not form.affine_first:
                y.mul_(scale.exp()).add_(shift)
            log_slope = torch.bmm(both[t].unsqueeze(1), slope).squeeze(1).log1p_().add_(scale)
            total = log_slope if total is None else total.add_(log_slope)
        ctx.save_for_backward(start, inputs, inner, outer, log_scale, *kept)
        ctx.options = options
        assert total is not None
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        start, inputs, inner, outer, log_scale, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _stack_gradients(ctx, (start, inputs, inner, outer, log_scale), grads)
        activation, form, _ = ctx.options
        grad, grad_log = grads
        hidden = inner.shape[-1]
        both = outer * inner
        grad_inputs = torch.empty_like(inputs)
        grad_inner, grad_outer = torch.empty_like(inner), torch.empty_like(outer)
        grad_log_scale = torch.empty_like(log_scale)
        blocks, grad_blocks = inputs.chunk(len(inner), 1), grad_inputs.chunk(len(inner), 1)
        for t in reversed(range(len(inner))):
            block, grad_block, y = blocks[t], grad_blocks[t], kept[t]
            scale, bounded_slope = _log_scale(block, log_scale[t], form)
            factor = scale.exp()
            u, w, uw = inner[t].unsqueeze(-1), outer[t].unsqueeze(-1), both[t].unsqueeze(-1)  # (n, H, 1)
            value, slope, curve = activation.terms(torch.addcmul(block[:, :hidden], u, y.unsqueeze(1)), 2)
            if not form.affine_first:
                grad_block[:, hidden] = grad
                after = y + torch.bmm(w.transpose(1, 2), value).squeeze(1)
                grad = grad * factor
                grad_scale = grad * after
            rho = torch.bmm(uw.transpose(1, 2), slope).squeeze(1)
            grad_rho = grad_log / rho.add_(1)
            column, column_rho = grad.unsqueeze(-1), grad_rho.unsqueeze(-1)  # (n, N, 1)
            by_slope = torch.bmm(slope, column_rho)
            grad_outer[t] = torch.baddbmm(u * by_slope, value, column).squeeze(-1)
            grad_a = slope.mul_(grad.unsqueeze(1)).mul_(w)
            grad_a.add_(curve.mul_(grad_rho.unsqueeze(1)).mul_(uw))
            grad_inner[t] = torch.baddbmm(w * by_slope, grad_a, y.unsqueeze(-1)).squeeze(-1)
            grad_block[:, :hidden] = grad_a
            grad = grad + torch.bmm(u.transpose(1, 2), grad_a).squeeze(1)
            if form.affine_first:
                grad_scale = grad * y
                grad = grad * factor
                grad_block[:, hidden] = grad
            grad_scale = grad_scale + grad_log
            grad_log_scale[t] = grad_scale.sum(-1)
            if bounded_slope is not None:
                grad_block[:, hidden + 1] = grad_scale * bounded_slope
        return grad, grad_inputs, grad_inner, grad_outer, grad_log_scale, None


def _stack_gradients(
    ctx: Any, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments, differentiable themselves."""
    needed = [tensor for tensor, needs in zip(tensors, ctx.needs_input_grad, strict=False) if needs]
    results = iter(
        torch.autograd.grad(ctx.options[2](*tensors), needed, grads, create_graph=True, allow_unused=True)
    )
    return (*(next(results) if needs else None for needs in ctx.needs_input_grad[:5]), None)
