r"""A masked residual network and the diagonal of its Jacobian as one operation, with the gradient written out.

Everything is in features-first layout, (features, N). With pre-activations
:math:`a_0 = W_0 z + b_0 + s` (s from the context) and :math:`a_i = W_i \varphi(a_{i-1}) + b_i`, the network is
:math:`g = a_L`. The tangents of the owner pass (:mod:`pyro_graphflows.nn.residual`) are
:math:`\tau_0 = \varphi'(a_0)`, :math:`\tau_i = \varphi'(a_i) \circ u_i` with :math:`u_i = T_i \tau_{i-1}`, and the
diagonal is :math:`d = u_L`; T holds the weights between units of one owner, and :math:`T_1` also the weights of
:math:`W_0` from the owners. For gradients :math:`\bar g, \bar d`, from above with :math:`\bar a_L = \bar g` and
:math:`\bar u_L = \bar d`,

.. math::
    \bar \tau_{i-1} &= T_i^\top \bar u_i, \qquad \bar u_{i-1} = \varphi'(a_{i-1}) \circ \bar \tau_{i-1}, \\
    \bar a_{i-1} &= \varphi'(a_{i-1}) \circ W_i^\top \bar a_i
        + \varphi''(a_{i-1}) \circ \bar \tau_{i-1} \circ u_{i-1} \qquad (u_0 = 1).

A chain of small operations costs several times as much, since each has an overhead and passes all its numbers
through memory; for the same reason one operation goes through several blocks after each other. Second derivatives
are taken through the plain operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_graphflows.masks import LabelledMasks, SparseMask
from pyro_graphflows.nn.activations import Activation, value_and_slope
from pyro_graphflows.nn.masked import MaskedLinear
from pyro_graphflows.nn.operation import Operation
from pyro_graphflows.nn.sparse import SparsePattern, sparse_product, sparse_sample

__all__ = ["FusedResidual", "OwnerPass", "residual_chain"]

PIECE = 2**16  # so many numbers are activated at a time, so that they stay near the processor


class OwnerPass(nn.Module):
    """The weights between units of one owner, of each layer but the first.

    The first layer's weight from its owner to each unit does not depend on z, so it is multiplied into the second
    layer's weights, which are fewer than the batch's values.

    Args:
        masks: The masks, whose outputs are the variables.
        layers: The layers.
    """

    places: Tensor

    def __init__(self, masks: LabelledMasks, layers: Sequence[MaskedLinear]) -> None:
        super().__init__()
        owners = [*masks.owners, torch.arange(len(masks.allowed))]
        # For each unit the place of the weight from its owner among the first layer's entries; any for no owner.
        first = layers[0].sparse_mask()
        owned = (owners[0][first.indices[0]] == first.indices[1]).nonzero()[:, 0]
        places = torch.zeros(first.shape[0], dtype=torch.long)
        places[first.indices[0][owned]] = layers[0].places()[owned]
        self.patterns = nn.ModuleList()
        for i, layer in enumerate(layers[1:]):
            mask = layer.sparse_mask()
            row, column = mask.indices
            same = (owners[i + 1][row] == owners[i][column]) & (owners[i][column] >= 0)
            kept = SparseMask(mask.indices[:, same].contiguous(), mask.shape)
            self.register_buffer(f"kept_{i}", layer.places()[same], persistent=False)
            self.patterns.append(SparsePattern(kept))
            places = places[kept.indices[1]] if i == 0 else places
        self.register_buffer("places", places, persistent=False)
        self.group = self._group_size()

    def _group_size(self) -> int:
        """Return how many units each owner has, where these are beside each other in one hidden layer; else 0."""
        if len(self.patterns) != 1:
            return 0
        pattern = self.pattern(0)
        outputs, units = pattern.shape
        size = units // max(outputs, 1)
        owners = torch.arange(outputs).repeat_interleave(size)
        regular = torch.equal(pattern.row, owners) and torch.equal(pattern.column, torch.arange(units))
        return size if regular else 0

    def product(self, i: int, weight: Tensor, x: Tensor) -> Tensor:
        """Multiply x, of shape (features, N), by the weights that are kept of layer i + 1; without gradient."""
        if not self.group:
            return sparse_product(weight, x, self.pattern(i), False)
        rows = weight.view(-1, 1, self.group)
        return torch.bmm(rows, x.view(len(rows), self.group, x.shape[1])).squeeze(1)

    def pulled(self, i: int, weight: Tensor, u: Tensor) -> Tensor:
        """Multiply by the transposed matrix; without gradient."""
        if not self.group:
            return sparse_product(weight, u, self.pattern(i), True)
        return (weight.view(-1, self.group, 1) * u.unsqueeze(1)).flatten(0, 1)

    def sample(self, i: int, left: Tensor, right: Tensor) -> Tensor:
        """Return the entries of ``left @ right.T`` where weights are kept; without gradient."""
        if not self.group:
            return sparse_sample(left, right, self.pattern(i))
        right = right.view(len(left), self.group, right.shape[1])
        return torch.bmm(left.unsqueeze(1), right.mT).view(-1)

    def kept(self, i: int) -> Tensor:
        """Return the places of the weights that are kept among the entries of layer i + 1."""
        places: Tensor = getattr(self, f"kept_{i}")
        return places

    def pattern(self, i: int) -> SparsePattern:
        """Return where they are in the matrix."""
        pattern = self.patterns[i]
        assert isinstance(pattern, SparsePattern)
        return pattern

    def weights(self, entries: Sequence[Tensor]) -> list[Tensor]:
        """Return the weights, from the layers' entries."""
        weights = [entry.flatten().gather(0, self.kept(i)) for i, entry in enumerate(entries[1:])]
        weights[0] = weights[0] * entries[0].flatten().gather(0, self.places)
        return weights

    def forward(self, weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
        """Return the diagonal, from the weights and the slopes of the hidden units; differentiable."""
        tangent = slopes[0]
        for i, weight in enumerate(weights):
            tangent = self.pattern(i).matmul(weight, tangent)
            if i + 1 < len(slopes):
                tangent = tangent * slopes[i + 1]
        return tangent


class FusedResidual(nn.Module):
    """The operation for one network.

    Args:
        layers: The layers; they are not registered as submodules, so pass their weights at each call.
        owner_pass: Their owner pass.
        activation: The class of the activation. One with an input scale must be given scaled weights.
    """

    def __init__(
        self, layers: Sequence[MaskedLinear], owner_pass: OwnerPass, activation: type[Activation]
    ) -> None:
        super().__init__()
        self.owner_pass, self.activation = owner_pass, activation
        self.__dict__["_layers"] = tuple(layers)

    @property
    def layers(self) -> tuple[MaskedLinear, ...]:
        """The layers."""
        layers: tuple[MaskedLinear, ...] = self.__dict__["_layers"]
        return layers

    def forward(self, z: Tensor, shift: Tensor | None, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return g and the diagonal of its Jacobian, both of shape (D, N), with gradients.

        Args:
            z: Shape (D, N).
            shift: What the context adds to the first layer, of shape (H, N), or None.
            weights: Entries and bias of each layer, in turn.
        """
        return _Residual.apply(self, z, shift, *weights)

    @torch.no_grad()
    def run(
        self, z: Tensor, shift: Tensor | None, weights: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return g, the diagonal and the slopes of the hidden layers, without gradients.

        Args:
            z: Shape (D, N).
            shift: Shape (H, N), or None.
            weights: Entries and bias of each layer, in turn.
            tangents: The weights of the owner pass.
        """
        g, diagonal, terms, _ = self._terms(z, shift, weights, tangents, 1)
        return g, diagonal, [slope for _, slope in terms]

    @torch.no_grad()
    def pull(self, weights: Sequence[Tensor], slopes: Sequence[Tensor], u: Tensor) -> Tensor:
        """Return the product of the transposed Jacobian of g with u, of shape (D, N), from the slopes."""
        entries = weights[::2]
        for i in range(len(slopes), 0, -1):
            u = self.layers[i].product(entries[i], u, transposed=True).mul_(slopes[i - 1])
        return self.layers[0].product(entries[0], u, transposed=True)

    def plain(self, z: Tensor, shift: Tensor | None, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the same as :meth:`forward` by operations with derivatives of every order."""
        entries, biases = weights[::2], weights[1::2]
        pre, slopes = z, []
        for i, layer in enumerate(self.layers):
            if i:
                pre, slope = value_and_slope(pre, self.activation)
                slopes.append(slope)
            pre = layer.matmul(entries[i], pre) + biases[i].unsqueeze(-1)
            if i == 0 and shift is not None:
                pre = pre + shift
        return pre, self.owner_pass(self.owner_pass.weights(entries), slopes)

    def _terms(
        self,
        z: Tensor,
        shift: Tensor | None,
        weights: Sequence[Tensor],
        tangents: Sequence[Tensor],
        order: int,
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]], list[Tensor]]:
        """Return g, d, and for each hidden layer the terms of the activation and (but for the first) u."""
        terms: list[tuple[Tensor, ...]] = []
        partial: list[Tensor] = []
        value = tangent = z
        for i, layer in enumerate(self.layers):
            pre = layer.product(weights[2 * i], value, weights[2 * i + 1])
            if i == 0 and shift is not None:
                pre.add_(shift)
            if i:
                tangent = self.owner_pass.product(i - 1, tangents[i - 1], tangent)
            if i == len(self.layers) - 1:
                break
            terms.append(_activate(self.activation, pre, order))
            value, slope = terms[-1][:2]
            if i:
                partial.append(tangent)
                tangent = slope * tangent
            else:
                tangent = slope
        return pre, tangent, terms, partial


def _activate(activation: type[Activation], x: Tensor, order: int) -> tuple[Tensor, ...]:
    if x.numel() <= PIECE or x.is_cuda:
        return activation.terms(x, order)
    results = tuple(torch.empty_like(x) for _ in range(order + 1))
    size = -(-PIECE // x.shape[1])
    for pieces in zip(x.split(size), *(result.split(size) for result in results), strict=True):
        for result, term in zip(pieces[1:], activation.terms(pieces[0], order), strict=True):
            result.copy_(term)
    return results


def residual_chain(
    operations: Sequence[FusedResidual],
    z: Tensor,
    shifts: Sequence[Tensor | None],
    weights: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, Tensor]:
    r"""Go through residual maps :math:`z \mapsto z + g_t(z)`, as one operation with gradients.

    Args:
        operations: The networks g.
        z: Shape (D, N).
        shifts: What the context adds to the first layer of each, of shape (H, N), or None.
        weights: Entries and bias of each layer of each network, in turn.

    Returns:
        The values and the sum of the logs of 1 + d over the maps, with d the diagonals, both of shape (D, N).
    """
    flat = [part for shift, own in zip(shifts, weights, strict=True) for part in (shift, *own)]
    return _Chain.apply(tuple(operations), z, *flat)


def _keep(
    operation: FusedResidual, z: Tensor, shift: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return g, the diagonal, and what the backward pass needs beside the arguments."""
    owner_pass = operation.owner_pass
    kept = [entries.view(-1).gather(0, owner_pass.kept(i)) for i, entries in enumerate(weights[2::2])]
    first = weights[0].view(-1).gather(0, owner_pass.places)
    tangents = [kept[0] * first, *kept[1:]]
    g, diagonal, terms, partial = operation._terms(z, shift, weights, tangents, 2)
    return g, diagonal, [first, kept[0], *tangents, *partial, *sum(terms, ())]


def _num_kept(operation: FusedResidual) -> int:
    return 5 * (len(operation.layers) - 1) + 1


def _pull(
    operation: FusedResidual,
    z: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    grads: tuple[Tensor, Tensor],
    need_z: bool,
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Return the gradients of z (None if not needed), of the shift, and of the weights, from those of g and d."""
    layers, owner_pass, entries = operation.layers, operation.owner_pass, weights[::2]
    depth = len(layers) - 1
    first, second, *kept = kept
    tangents, partial, terms = kept[:depth], kept[depth : 2 * depth - 1], kept[2 * depth - 1 :]
    results: list[Tensor] = []  # for the weights, from the last
    grad_a, grad_u = grads
    for i in range(depth, 0, -1):
        value, slope, curve = terms[3 * i - 3 : 3 * i]
        by_tangent = owner_pass.sample(i - 1, grad_u, slope if i == 1 else slope * partial[i - 2])
        if i == 1:  # its weights are products with the first layer's
            by_owner = second * by_tangent
            by_tangent.mul_(first)
        by_entries = layers[i].sample(grad_a, value)
        by_entries.view(-1).scatter_add_(0, owner_pass.kept(i - 1), by_tangent)
        results += [grad_a.sum(1), by_entries]
        grad_slope = owner_pass.pulled(i - 1, tangents[i - 1], grad_u)
        if i > 1:
            grad_u = grad_slope * slope
            grad_slope.mul_(partial[i - 2])
        grad_a = layers[i].product(entries[i], grad_a, transposed=True)
        grad_a.mul_(slope).addcmul_(grad_slope, curve)
    by_entries = layers[0].sample(grad_a, z)
    by_entries.view(-1).scatter_add_(0, owner_pass.places, by_owner)
    results += [grad_a.sum(1), by_entries]
    grad_z = layers[0].product(entries[0], grad_a, transposed=True) if need_z else None
    return grad_z, grad_a, results[::-1]


class _Residual(Operation):
    @staticmethod
    def forward(
        ctx: Any, operation: FusedResidual, z: Tensor, shift: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        g, diagonal, kept = _keep(operation, z, shift, weights)
        ctx.operation = operation
        ctx.save_for_backward(z, shift, *weights, *kept)
        return g, diagonal

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operation: FusedResidual = ctx.operation
        z, shift, *saved = ctx.saved_tensors
        count = 2 * len(operation.layers)
        weights, kept = saved[:count], saved[count:]
        if torch.is_grad_enabled():  # create_graph=True
            outputs = operation.plain(z, shift, weights)
            return (None, *_differentiable(ctx, outputs, (z, shift, *weights), grads))
        by_output = (grads[0], grads[1])
        grad_z, grad_shift, by_weights = _pull(
            operation, z, weights, kept, by_output, ctx.needs_input_grad[1]
        )
        return (None, grad_z, None if shift is None else grad_shift, *by_weights)


class _Chain(Operation):
    @staticmethod
    def forward(
        ctx: Any, operations: Sequence[FusedResidual], z: Tensor, *parts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.operations = operations
        saved: list[Tensor] = []
        y, total = z, torch.zeros_like(z)
        for operation, (shift, *weights) in zip(operations, _split(operations, parts), strict=True):
            g, diagonal, kept = _keep(operation, y, shift, weights)
            total.add_(diagonal.log1p())
            saved += [y, diagonal.add_(1), *kept]
            y = g.add_(y)
        ctx.save_for_backward(*parts, *saved)
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operations: Sequence[FusedResidual] = ctx.operations
        saved = ctx.saved_tensors
        num_parts = sum(1 + 2 * len(operation.layers) for operation in operations)
        parts, saved = saved[:num_parts], saved[num_parts:]
        if torch.is_grad_enabled():  # create_graph=True
            z = y = saved[0]
            total = torch.zeros_like(z)
            for operation, (shift, *weights) in zip(operations, _split(operations, parts), strict=True):
                g, diagonal = operation.plain(y, shift, weights)
                y, total = y + g, total + diagonal.log1p()
            return (None, *_differentiable(ctx, (y, total), (z, *parts), grads))
        # Results come back with features last, and products of strided matrices go one by one.
        grad_y, grad_total = (grad.contiguous() for grad in grads)
        results: list[list[Tensor | None]] = []
        for i, (operation, own) in reversed(
            list(enumerate(zip(operations, _split(operations, parts), strict=True)))
        ):
            (y, slope, *kept), saved = saved[-_num_kept(operation) - 2 :], saved[: -_num_kept(operation) - 2]
            need = i > 0 or ctx.needs_input_grad[1]
            grad_z, grad_shift, by_weights = _pull(
                operation, y, own[1:], kept, (grad_y, grad_total / slope), need
            )
            results.append([None if own[0] is None else grad_shift, *by_weights])
            grad_y = grad_y if grad_z is None else grad_z.add_(grad_y)
        grad_z = grad_y if ctx.needs_input_grad[1] else None
        return (None, grad_z, *(grad for own in reversed(results) for grad in own))


def _split(operations: Sequence[FusedResidual], parts: Sequence[Any]) -> list[Sequence[Any]]:
    """Cut the shift and weights of all networks into those of each."""
    pieces, start = [], 0
    for operation in operations:
        stop = start + 1 + 2 * len(operation.layers)
        pieces.append(parts[start:stop])
        start = stop
    return pieces


def _differentiable(
    ctx: Any, outputs: tuple[Tensor, Tensor], arguments: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of the arguments, differentiable themselves."""
    needs = ctx.needs_input_grad[1:]
    needed = [x for x, need in zip(arguments, needs, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(outputs, needed, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
