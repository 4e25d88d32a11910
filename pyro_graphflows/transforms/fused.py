r"""The stack of one-dimensional residual blocks as one operation, with its gradient written out.

With one hidden layer a block computes :math:`a_h = s_h + u_h y` (s from the parents), the residual
:math:`r = \sum_h w_h \varphi(a_h)`, its slope :math:`\rho = \sum_h w_h u_h \varphi'(a_h)`, and the affine map
:math:`e^\lambda (y + b)` before or :math:`e^\lambda y + b` after it. For gradients :math:`\bar y, \bar\ell` of the
new value and of the log-slope :math:`\lambda + \log(1 + \rho)`, and :math:`\bar\rho = \bar\ell / (1 + \rho)`,

.. math::
    \bar a_h &= \bar y\, w_h \varphi'(a_h) + \bar\rho\, w_h u_h \varphi''(a_h), \qquad
    \bar y \leftarrow \bar y + \sum_h u_h \bar a_h, \\
    \bar w_h &= \bar y\, \varphi(a_h) + \bar\rho\, u_h \varphi'(a_h), \qquad
    \bar u_h = y\, \bar a_h + \bar\rho\, w_h \varphi'(a_h).

Only the value between blocks is kept; everything else is computed again, which costs less than to fetch it from
memory. This is several times faster than a chain of small operations where variables are few or levels many.
Second derivatives are taken through the plain operations.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.nn.activations import Activation
from pyro_graphflows.nn.operation import Operation

__all__ = ["fused_stack"]


def fused_stack(
    y: Tensor,
    inputs: Tensor,
    inner: Tensor,
    outer: Tensor,
    log_scale: Tensor,
    activation: type[Activation],
    affine_first: bool,
    scale_range: float | None,
    plain: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Apply a stack of residual blocks with one hidden layer.

    Args:
        y: The values, of shape (n, N).
        inputs: What the parents supply, of shape (n, T · K, N): in each block the H pre-activations, the shift, and
            the conditional log-scale if there is one.
        inner: u, of shape (T, n, H).
        outer: w, of shape (T, n, H).
        log_scale: The log-scales, of shape (T, n).
        activation: The class of the activation, which has no parameters.
        affine_first: Whether the affine map comes before the residual map in a block.
        scale_range: The bound on the conditional log-scale; None if there is none.
        plain: The same map of the five tensors by differentiable operations, for second derivatives.

    Returns:
        The new values and the log of the slope of the whole stack, both of shape (n, N).
    """
    options = (activation, affine_first, scale_range, plain)
    return _Stack.apply(y, inputs, inner, outer, log_scale, options)


def _log_scale(
    block: Tensor, own: Tensor, hidden: int, scale_range: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return the log-scale of a block, (n, 1) or (n, N), and the slope of its bounded part."""
    if scale_range is None:
        return own.unsqueeze(-1), None
    bounded = torch.tanh(block[:, hidden + 1] / scale_range)
    return own.unsqueeze(-1) + scale_range * bounded, 1 - bounded * bounded


class _Stack(Operation):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        inputs: Tensor,
        inner: Tensor,
        outer: Tensor,
        log_scale: Tensor,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        activation, affine_first, scale_range, _ = options
        hidden = inner.shape[-1]
        both = outer * inner
        start = y
        total: Tensor | None = None
        kept = []  # the value that enters each residual map
        for t, block in enumerate(inputs.chunk(len(inner), 1)):
            scale, _ = _log_scale(block, log_scale[t], hidden, scale_range)
            shift = block[:, hidden]
            if affine_first:
                y = (y + shift).mul_(scale.exp())
            kept.append(y)
            value, slope = activation.terms(
                torch.addcmul(block[:, :hidden], inner[t].unsqueeze(-1), y.unsqueeze(1)), 1
            )
            y = y + torch.bmm(outer[t].unsqueeze(1), value).squeeze(1)
            if not affine_first:
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
            return _differentiable(ctx, (start, inputs, inner, outer, log_scale), grads)
        activation, affine_first, scale_range, _ = ctx.options
        grad, grad_log = grads
        hidden = inner.shape[-1]
        both = outer * inner
        grad_inputs = torch.empty_like(inputs)
        grad_inner, grad_outer = torch.empty_like(inner), torch.empty_like(outer)
        grad_log_scale = torch.empty_like(log_scale)
        blocks, grad_blocks = inputs.chunk(len(inner), 1), grad_inputs.chunk(len(inner), 1)
        for t in reversed(range(len(inner))):
            block, grad_block, y = blocks[t], grad_blocks[t], kept[t]
            scale, bounded_slope = _log_scale(block, log_scale[t], hidden, scale_range)
            factor = scale.exp()
            u, w, uw = inner[t].unsqueeze(-1), outer[t].unsqueeze(-1), both[t].unsqueeze(-1)  # (n, H, 1)
            value, slope, curve = activation.terms(torch.addcmul(block[:, :hidden], u, y.unsqueeze(1)), 2)
            if not affine_first:
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
            if affine_first:
                grad_scale = grad * y
                grad = grad * factor
                grad_block[:, hidden] = grad
            grad_scale = grad_scale + grad_log
            grad_log_scale[t] = grad_scale.sum(-1)
            if bounded_slope is not None:
                grad_block[:, hidden + 1] = grad_scale * bounded_slope
        return grad, grad_inputs, grad_inner, grad_outer, grad_log_scale, None


def _differentiable(
    ctx: Any, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    needed = [tensor for tensor, needs in zip(tensors, ctx.needs_input_grad, strict=False) if needs]
    results = iter(
        torch.autograd.grad(ctx.options[-1](*tensors), needed, grads, create_graph=True, allow_unused=True)
    )
    return (*(next(results) if needs else None for needs in ctx.needs_input_grad[:5]), None)
