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

Of these only :math:`\bar y` goes from block to block, one step of :math:`\bar y (1 + \rho)` and a number known before.
Where numbers are few, all the rest is computed for all blocks at once, and what the activation gave is kept. Where they
are many, they would not stay near the processor: blocks go one by one, and only the values between them are kept, since
computing the others again costs less than to fetch them from memory. This is several times faster than a chain of small
operations where variables are few or levels many.
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

TOGETHER = (
    2**18
)  # up to so many numbers from the parents all blocks are computed at once, and their terms kept


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
        return (self.inner, self.outer, self.log_scale, *sum(self.hidden, ()))

    @staticmethod
    def _of(tensors: tuple[Tensor, ...]) -> "BlockWeights":
        inner, outer, log_scale, *rest = tensors
        return BlockWeights(inner, outer, log_scale, tuple(zip(rest[::2], rest[1::2], strict=True)))


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

    def slope_interval(self, weights: BlockWeights) -> tuple[Tensor, Tensor]:
        """Return bounds of the slope of each residual sum, both of shape (T, n)."""
        low_slope, high_slope = self.activation.slope_min, self.activation.slope_max
        if not weights.hidden:
            return _sum_interval(weights.inner * weights.outer, low_slope, high_slope)
        low, high = weights.inner, weights.inner
        for weight in [*(weight for weight, _ in weights.hidden), weights.outer.unsqueeze(-2)]:
            ends = torch.stack([low * low_slope, low * high_slope, high * low_slope, high * high_slope])
            low, high = ends.amin(0).unsqueeze(-1), ends.amax(0).unsqueeze(-1)
            up, down = weight.clamp(min=0), weight.clamp(max=0)
            low, high = (up @ low + down @ high).squeeze(-1), (up @ high + down @ low).squeeze(-1)
        return low.squeeze(-1), high.squeeze(-1)

    def weights(self) -> BlockWeights:
        """Return the weights with the bound applied; once for each evaluation."""
        if len(self.hidden_units) == 1:
            slopes = (self.activation.slope_min, self.activation.slope_max)
            inner, outer = _Bounded.apply(self.inner, self.outer, slopes, self.lipschitz, self.form.gain)
            return BlockWeights(inner, outer, self.log_scale, ())
        hidden = tuple(zip(self.hidden_weights, self.hidden_biases, strict=True))
        outer = self.outer if self.form.gain == 1.0 else self.outer * self.form.gain
        low, _ = self.slope_interval(BlockWeights(self.inner, outer, self.log_scale, hidden))
        bound = self.lipschitz / (-low).clamp(min=self.lipschitz)
        return BlockWeights(self.inner * bound.unsqueeze(-1), outer, self.log_scale, hidden)

    def slope_bounds(self, weights: BlockWeights) -> tuple[Tensor, Tensor]:
        """Return bounds of the slope of each residual map, 1 added, for weights with the bound applied: (T, n)."""
        low, high = self.slope_interval(weights)
        return (1 + low).clamp(min=1 - self.lipschitz), 1 + high

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
        weights = BlockWeights(inner, outer, log_scales, hidden)
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
        slopes = [bound.unsqueeze(-1).unbind() for bound in self.slope_bounds(weights)]
        for t in reversed(range(self.num_blocks)):
            start, shift, log_scale = blocks[t]
            if not self.form.affine_first:
                y = (y - shift) * (-log_scale).exp()
            y = self._inverse_residual(y, start, weights, t, (slopes[0][t], slopes[1][t]), solver, what)
            if self.form.affine_first:
                y = y * (-log_scale).exp() - shift
        return y

    def _inverse_residual(
        self,
        target: Tensor,
        start: Tensor,
        weights: BlockWeights,
        t: int,
        slopes: tuple[Tensor, Tensor],
        solver: Solver,
        what: str,
    ) -> Tensor:
        def function(y: Tensor) -> tuple[Tensor, Tensor]:
            residual, slope, _ = self._residual(y, start, weights, t)
            return y + residual, 1 + slope

        residual, slope, value = self._residual(target, start, weights, t)
        noise = torch.bmm(weights.outer[t].abs().unsqueeze(-2), value.abs()).squeeze(1)
        low, high = slopes
        # A first Newton step from the target, kept inside the bracket; a much better start than the target itself.
        initial = target - residual / (1 + slope).clamp(min=low, max=high)
        bounds = Bounds(low, high, noise)
        return solve_elementwise(function, target, bounds, initial=initial, solver=solver, what=what)


def _sum_interval(products: Tensor, low_slope: float, high_slope: float) -> tuple[Tensor, Tensor]:
    """Return the ends of sums over the last dimension of products with slopes in an interval."""
    down, up = products.clamp(max=0).sum(-1), products.clamp(min=0).sum(-1)
    return high_slope * down + low_slope * up, low_slope * down + high_slope * up


def _bound(
    inner: Tensor, outer: Tensor, slopes: tuple[float, float], lipschitz: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return s, the products of the weights, and minus the lower end of the slope of their sum for s = 1."""
    products = inner * outer
    fall = products.clamp(max=0).sum(-1, keepdim=True) * -slopes[1]
    if slopes[0]:
        fall = fall - products.clamp(min=0).sum(-1, keepdim=True) * slopes[0]
    return lipschitz / fall.clamp(min=lipschitz), products, fall


class _Bounded(Operation):
    """The weights u with the bound applied, and w multiplied by their gain; both of shape (T, D, H).

    Where minus the lower end, f, is larger than c, :math:`s = c / f` has the derivative :math:`-s^2 / c`.
    """

    @staticmethod
    def forward(ctx: Any, inner: Tensor, outer: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        slopes, lipschitz, gain = options
        outer = outer if gain == 1.0 else outer * gain
        scale, products, fall = _bound(inner, outer, slopes, lipschitz)
        ctx.save_for_backward(inner, outer, scale, products, fall)
        ctx.options = options
        return inner * scale, outer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inner, outer, scale, products, fall = ctx.saved_tensors
        slopes, lipschitz, gain = ctx.options
        grad_inner, grad_outer = grads
        if torch.is_grad_enabled():  # create_graph=True
            scale, products, fall = _bound(inner, outer, slopes, lipschitz)
        rate = (grad_inner * inner).sum(-1, keepdim=True) * (scale * scale / lipschitz) * (fall > lipschitz)
        by_product = torch.where(products < 0, rate * slopes[1], rate * slopes[0])
        grad_outer = torch.addcmul(grad_outer, by_product, inner)
        return (
            torch.addcmul(grad_inner * scale, by_product, outer),
            grad_outer if gain == 1.0 else grad_outer * gain,
            None,
            None,
            None,
        )


def _log_scales(parts: Tensor, own: Tensor, form: BlockForm) -> tuple[Tensor, Tensor | None]:
    """Return the log-scales of all blocks, (n, T, 1, N) or (n, T, 1, 1), and the tanh of their bounded part."""
    own = own.t()[..., None, None]
    if not form.conditional_scale:
        return own, None
    bounded = torch.tanh(parts[:, :, form.hidden_units[0] + 1 :] / form.scale_range)
    return own + form.scale_range * bounded, bounded


def _times(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices of shape (n, T, 1, k) and (n, T, k, l)."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def _plus_times(start: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Multiply such matrices, and add numbers of shape (n, T, 1, l)."""
    parts = (part.flatten(0, 1) for part in (start, left, right))
    return torch.baddbmm(*parts).unflatten(0, left.shape[:2])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Put numbers of each block, (n, k, N), beside each other: (n, T, k, N)."""
    return parts[0].unsqueeze(1) if len(parts) == 1 else torch.stack(list(parts), 1)


_Options = tuple[type[Activation], BlockForm, Callable[..., tuple[Tensor, Tensor]]]


class _Stack(Operation):
    """A stack with one hidden layer, whose activation has no parameters.

    The arguments are those of :meth:`MonotoneStack.forward`, and as options the class of the activation, the form of
    the blocks and the same map of the five tensors by differentiable operations, for second derivatives.

    Inside, numbers are of shape (n, T, H, N), and (n, T, 1, N) where there is one for each block.
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
        number, hidden = inner.shape[0], inner.shape[-1]
        parts = inputs.unflatten(1, (number, -1))
        scale, bounded = _log_scales(parts, log_scale, form)
        factor = scale.exp()
        starts, shifts = parts[:, :, :hidden].unbind(1), parts[:, :, hidden : hidden + 1].unbind(1)
        factors = factor.unbind(1)
        us, ws = inner.unsqueeze(-1).unbind(), outer.unsqueeze(-2).unbind()
        both = (inner * outer).transpose(0, 1).unsqueeze(-2)
        at_once = number if inputs.numel() <= TOGETHER else 1
        order = 2 if at_once == number and any(ctx.needs_input_grad) else 1
        entering, leaving, rhos = [], [], []  # the residual maps
        terms: tuple[Tensor, ...] = ()
        value = y.unsqueeze(1)
        for first in range(0, number, at_once):
            pres, images = [], []
            for t in range(first, first + at_once):
                if form.affine_first:
                    value = (value + shifts[t]).mul_(factors[t])
                entering.append(value)
                pres.append(torch.addcmul(starts[t], us[t], value))
                if at_once == 1:
                    terms = tuple(term.unsqueeze(1) for term in activation.terms(pres[0], order))
                    images = [terms[0].squeeze(1)]
                else:
                    images.append(activation.terms(pres[-1], 0)[0])
                value = torch.baddbmm(value, ws[t], images[-1])
                leaving.append(value)
                if not form.affine_first:
                    value = torch.addcmul(shifts[t], value, factors[t])
            if at_once > 1:
                by_value = activation.value_tells
                terms = (
                    activation.terms_of_value(torch.stack(images, 1), order)
                    if by_value
                    else activation.terms(torch.stack(pres, 1), order)
                )
            rhos.append(_times(both[:, first : first + at_once], terms[1]))
        rho = rhos[0] if len(rhos) == 1 else torch.cat(rhos, 1)
        total = torch.log1p(rho).add_(scale).sum(1)
        around = _joined(entering), _joined(leaving)
        kept = terms if order == 2 else ()
        ctx.save_for_backward(y, inputs, inner, outer, log_scale, factor, bounded, rho, *around, *kept)
        ctx.options = options
        return value.squeeze(1), total.squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        start, inputs, inner, outer, log_scale, factor, bounded, rho, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _stack_gradients(ctx, (start, inputs, inner, outer, log_scale), grads)
        activation, form, _ = ctx.options
        entering, leaving, *terms = kept
        number, hidden = inner.shape[0], inner.shape[-1]
        grad, grad_log = grads[0].unsqueeze(1), grads[1][:, None, None]
        row_u, row_w = (weight.transpose(0, 1).unsqueeze(-2) for weight in (inner, outer))
        u, w, both = row_u.mT, row_w.mT, (row_u * row_w).mT
        steep = rho + 1
        grad_rho = grad_log / steep
        gains = (steep * factor).unbind(1)
        grad_inputs = torch.empty_like(inputs)
        parts, grad_parts = (x.unflatten(1, (number, -1)) for x in (inputs, grad_inputs))
        at_once = number if terms else 1
        found = []  # for u, w and the log-scales, from the last
        for first in reversed(range(0, number, at_once)):
            of = slice(first, first + at_once)
            if not terms or at_once < number:
                pre = torch.addcmul(parts[:, of, :hidden], u[:, of], entering[:, of])
                terms = list(activation.terms(pre, 2))
            value, slope, curve = terms
            bent = (curve * both[:, of]).mul_(grad_rho[:, of])
            pulled = _times(row_u[:, of], bent)
            steps = (pulled * factor[:, of] if form.affine_first else pulled).unbind(1)
            outs = []
            for t in reversed(range(at_once)):
                outs.append(grad)
                grad = torch.addcmul(steps[t], grad, gains[first + t])
            out = _joined(outs[::-1])
            if form.affine_first:
                inside = torch.addcmul(pulled, out, steep[:, of])
                grad_shift, grad_scale = inside * factor[:, of], inside * entering[:, of]
            else:
                grad_shift, out = out, out * factor[:, of]
                grad_scale = out * leaving[:, of]
            grad_scale = grad_scale + grad_log
            grad_pre = bent.addcmul_(slope * w[:, of], out)
            by_rho = _times(grad_rho[:, of], slope.mT)
            grad_u = _plus_times(row_w[:, of] * by_rho, entering[:, of], grad_pre.mT)
            grad_w = _plus_times(row_u[:, of] * by_rho, out, value.mT)
            found.append((grad_u.squeeze(2), grad_w.squeeze(2), grad_scale.sum((2, 3))))
            grad_parts[:, of, :hidden] = grad_pre
            grad_parts[:, of, hidden : hidden + 1] = grad_shift
            if bounded is not None:
                grad_parts[:, of, hidden + 1 :] = grad_scale * (1 - bounded[:, of] * bounded[:, of])
        grads_of = [
            (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(0, 1)
            for parts in zip(*found[::-1], strict=True)
        ]
        return grad.squeeze(1), grad_inputs, *grads_of, None


def _stack_gradients(
    ctx: Any, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments, differentiable themselves."""
    needed = [tensor for tensor, needs in zip(tensors, ctx.needs_input_grad, strict=False) if needs]
    results = iter(
        torch.autograd.grad(ctx.options[2](*tensors), needed, grads, create_graph=True, allow_unused=True)
    )
    return (*(next(results) if needs else None for needs in ctx.needs_input_grad[:5]), None)
