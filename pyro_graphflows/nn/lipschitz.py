r"""Bounds on the spectral norm of masked weights.

A layer's weights W are replaced by :math:`W \min(1, c / \|W\|_2)`, so the layer's Lipschitz constant is at most c.
The norm must not be taken too small, or the bound is broken. With the power method started cold it is, by up to
a quarter. Tracking a few vectors while the weights change is not enough either: training under the bound
makes the largest singular values nearly equal, with vectors in different parts of the graph, and a
part that overtakes may be orthogonal to all that is tracked. Here the norm is found:

- Exactly, from the eigenvalues of the smaller Gram matrix G, if that has at most 48 rows and nothing is known yet.
- Else as a Ritz value, the largest one on the span of a few vectors: the best known and as many fresh random ones,
  all of them amplified by a Chebyshev polynomial of G that damps what lies below the estimate. This is a
  lower bound that converges much faster than the power method, whatever the gaps between the singular values.
- With at most 512 rows it is then certified: :math:`s^2 I - G` has a Cholesky factor if and only if s is above the
  norm. While training, one step of the known vectors is mostly enough for the certificate, and is tried first. If
  it fails after some attempts (with at most 48 rows, after the first), the norm is found exactly.

The estimate is raised by two ten-thousandths, more than its usual error. Its gradient is that of
:math:`u^\top W v` with the singular vectors u and v held fixed, which is exact. Small layers of one size, as the
blocks of a flow have them, are scaled together; their matrices lie on their sides where they are higher than wide.

References:
    [1] Gouk et al. (2021), Regularisation of Neural Networks by Enforcing Lipschitz Continuity.
    [2] Behrmann et al. (2019), Invertible Residual Networks. They use a fixed number of power iterations.
    [3] Zhou and Saad (2007), A Chebyshev-Davidson Algorithm for Large Symmetric Eigenproblems: the filter.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.nn.masked import MaskedLinear
from pyro_graphflows.nn.operation import Operation

__all__ = ["SpectralBound", "bounded_entries"]

EXACT_SIZE = 48  # up to here an eigendecomposition costs no more than attempts that fail
TINY_SIZE = 12  # and up to here no more than one step and its certificate
CERTIFIED_SIZE = 512  # up to here the Gram matrix is formed and the estimate certified
MARGIN = 2e-4
KEPT, FRESH = 4, 4  # vectors that are kept between updates, and fresh ones
DEGREE = 24  # of the filter
CUT = 0.95  # the filter damps what lies below this share of the estimate
SETTLED = 2e-4  # relative change of the squared norm in one pass, below which it counts as converged
ATTEMPTS = 3  # passes without a certificate before the exact way is taken
MAX_PASSES = 50


class SpectralBound(nn.Module):
    r"""Keeps the spectral norm of one masked layer at most ``bound``.

    The layer's own weights are not changed: :meth:`entries` returns the scaled ones. What is known of the singular
    vectors is part of the state, so training resumes with the same numbers.

    Args:
        layer: The layer. It is not registered as a submodule, so pass the same one to :meth:`entries`.
        bound: The largest spectral norm allowed.

    Raises:
        GraphflowsError: If the bound is not positive.

    Example:
        >>> layer = MaskedLinear(torch.ones(2, 2, dtype=torch.bool))
        >>> _ = torch.nn.init.constant_(layer.weight, 5.0)
        >>> weight = SpectralBound(layer, 0.9).entries(layer)
        >>> bool(torch.linalg.matrix_norm(weight, 2) <= 0.9)
        True
    """

    left: Tensor
    right: Tensor
    basis: Tensor
    norm: Tensor
    probe: Tensor
    direction: Tensor
    fingerprint: Tensor
    updates: Tensor

    def __init__(self, layer: MaskedLinear, bound: float) -> None:
        super().__init__()
        if not bound > 0:
            raise GraphflowsError(f"Expected a positive bound on the spectral norm; got {bound}.")
        self.bound = float(bound)
        rows, columns = layer.out_features, layer.in_features
        self.size = min(rows, columns)
        self.exact = self.size <= EXACT_SIZE
        weight = layer.weight
        saved = self.size > TINY_SIZE
        self.register_buffer("left", weight.new_zeros(rows).detach(), persistent=saved)
        self.register_buffer("right", weight.new_zeros(columns).detach(), persistent=saved)
        self.register_buffer(
            "basis", weight.new_zeros(self.size, KEPT if saved else 0).detach(), persistent=saved
        )
        # The product of the weights with fixed random numbers tells whether they have changed.
        probe = torch.randn(weight.shape, generator=_generator(0)).to(weight.dtype)
        self.register_buffer("probe", probe, persistent=False)
        self.register_buffer("direction", torch.zeros_like(probe), persistent=False)
        self.register_buffer("norm", weight.new_zeros(1).detach(), persistent=saved and self.exact)
        self.register_buffer("fingerprint", weight.new_full((), torch.nan), persistent=saved)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long), persistent=saved)
        self._loaded = False
        # For layers that are scaled together: fingerprint of the weights, singular vectors (as rows, the short one
        # first), value, and the vectors that are kept. The buffers hold them in what is saved.
        self.wide = columns > rows
        self._known = self._nothing_known()
        self._group: _Group | None = None  # of the layers of which this is the first
        self.together = self.exact and weight.numel() > 0
        self.alike = (self.bound, layer.engine, self.size, max(rows, columns))
        if not self.together:
            self._refresh(layer)

    def _nothing_known(self) -> tuple[float, Tensor, Tensor, Tensor, Tensor]:
        short, long = (torch.zeros_like(part)[None] for part in self._short_first())
        return (
            math.nan,
            short,
            long,
            torch.zeros(1, 1),
            torch.zeros_like(self.basis),
        )

    def _short_first(self) -> tuple[Tensor, Tensor]:
        return (self.left, self.right) if self.wide else (self.right, self.left)

    def entries(self, layer: MaskedLinear) -> Tensor:
        """Return the weights of the layer in its engine's layout, scaled so that the bound holds."""
        return bounded_entries([self], [layer])[0]

    @torch.no_grad()
    def _refresh(self, layer: MaskedLinear) -> None:
        """Bring the singular vectors up to date, if the weights have changed."""
        weight = layer.weight.detach()
        fingerprint = torch.dot(weight.flatten(), self.probe.flatten())
        if bool(fingerprint == self.fingerprint):
            if self._loaded:
                self._set_direction(layer)
                self._loaded = False
            return
        if not weight.numel() or not bool(fingerprint.isfinite()):
            return
        small, basis = self._track(layer)
        wide = layer.in_features > layer.out_features
        large = layer.product(layer.entries(), small[:, None], transposed=wide)[:, 0]
        large = large / _norms(large)
        left, right = (small, large) if wide else (large, small)
        self.left.copy_(left)
        self.right.copy_(right)
        self.basis.copy_(basis)
        self._set_direction(layer)
        self.fingerprint.copy_(fingerprint)
        self.updates.add_(1)

    def _set_direction(self, layer: MaskedLinear) -> None:
        if layer.engine == "sparse":
            pattern = layer.pattern
            direction = self.left[pattern.row] * self.right[pattern.column]
        else:
            direction = torch.outer(self.left, self.right) * layer.zero_or_one
        self.direction = direction  # a new tensor: backward passes still need the last one

    def _track(self, layer: MaskedLinear) -> tuple[Tensor, Tensor]:
        """Return the top eigenvector of the smaller Gram matrix and the vectors to keep."""
        count = int(self.updates)
        multiply = _gram_product(layer)
        gram = _gram_matrix(layer) if self.size <= CERTIFIED_SIZE else None
        if gram is not None:
            multiply = gram.__matmul__
            if count:  # weights that have changed little need one step of the kept vectors
                values, basis = _ritz(multiply, multiply(self.basis))
                if _is_above(gram, values[-1]):
                    return basis[:, -1], basis
        fresh = torch.randn(self.size, FRESH, generator=_generator(count)).to(self.basis)
        values, basis = _ritz(multiply, fresh if count == 0 else torch.cat([self.basis, fresh], 1))
        degrees = [2, 4, 8] if count == 0 else []  # the first estimates are poor, and damp too little
        for attempt in range(MAX_PASSES):
            degree = degrees[attempt] if attempt < len(degrees) else DEGREE
            previous = values[-1]
            values, basis = _ritz(multiply, torch.cat([basis, _filter(multiply, basis, previous, degree)], 1))
            basis = basis[:, -KEPT - FRESH :]
            if attempt >= len(degrees) and bool(values[-1] - previous <= SETTLED * values[-1]):
                if gram is None or _is_above(gram, values[-1]):
                    break
                if attempt >= len(degrees) + ATTEMPTS:
                    return _largest(gram), basis[:, -KEPT:]
        return basis[:, -1], basis[:, -KEPT:]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._loaded = True
        if prefix + "updates" not in state_dict:
            # Weights of unknown origin: start cold.
            self.updates.zero_()
            self.fingerprint.fill_(torch.nan)
            self._known = self._nothing_known()
        elif self.together:
            short, long, norm = (part[None].clone() for part in (*self._short_first(), self.norm))
            self._known = (float(self.fingerprint), short, long, norm, self.basis.clone())

    def _save_to_state_dict(self, *args: Any) -> None:
        if self.together and self.size > TINY_SIZE:
            fingerprint, *vectors = self._known
            self.fingerprint.fill_(fingerprint)
            for buffer, part in zip((*self._short_first(), self.norm, self.basis), vectors, strict=True):
                buffer.copy_(part.view_as(buffer))
        super()._save_to_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}

    def extra_repr(self) -> str:
        """Describe the bound in one line."""
        return f"bound={self.bound}, exact={self.exact}"


def bounded_entries(bounds: Sequence["SpectralBound"], layers: Sequence[MaskedLinear]) -> list[Tensor]:
    """Return :meth:`SpectralBound.entries` of several layers, by few operations."""
    found: dict[int, Tensor] = {}
    alike: dict[Any, list[int]] = {}
    for i, (bound, layer) in enumerate(zip(bounds, layers, strict=True)):
        key = (bound.alike, layer.weight.dtype, layer.weight.device) if bound.together else None
        alike.setdefault(key, []).append(i)
    for key, places in alike.items():
        own, of = [bounds[i] for i in places], [layers[i] for i in places]
        weights = [layer.weight for layer in of]
        if key is not None:
            found.update(zip(places, _Together.apply(own, _Group.of(own, of), *weights), strict=True))
            continue
        for bound, layer in zip(own, of, strict=True):
            bound._refresh(layer)
        masks = [layer.zero_or_one if layer.engine == "dense" else None for layer in of]
        fixed = [(bound.bound, mask, bound.direction) for bound, mask in zip(own, masks, strict=True)]
        found.update(zip(places, _Scaled.apply(fixed, *weights), strict=True))
    return [found[i] for i in range(len(bounds))]


@dataclass
class _Group:
    """Layers of one engine that are scaled together, in the order of their weights, whose entries are one vector.

    Attributes:
        members: Their bounds; one of these keeps the group, which would else keep itself in memory.
        bound: The largest spectral norm of each.
        layer_of: The number of the layer of each entry of sparse layers.
        starts: Where the entries of each layer begin, and where the last ones end.
        places: Where each entry of sparse layers is in the matrices, flattened.
        mask: Ones and zeros for each entry of dense layers, else None.
        probe: The fixed random numbers by which changes of the weights are seen.
        sizes: How many entries each layer has.
        shape: Of the matrices, ``(layers, short, long)``.
        are_wide: Which dense layers are wider than high, else None. Their entries are whole matrices, and no places are
            looked up: with hundreds of thousands of entries that takes longer than all else.
    """

    members: Sequence["weakref.ref[SpectralBound]"]
    bound: float
    layer_of: Tensor
    starts: Tensor
    places: Tensor
    mask: Tensor | None
    probe: Tensor
    sizes: list[int]
    shape: torch.Size
    are_wide: list[bool] | None

    @classmethod
    @torch.inference_mode(False)  # what is kept is for training as well
    def of(cls, bounds: Sequence["SpectralBound"], layers: Sequence[MaskedLinear]) -> "_Group":
        """Return the group of some layers; it is kept for the next call."""
        first, weight = bounds[0], layers[0].weight
        known = first._group
        if known is not None and known.fits(bounds, weight):
            return known
        shape = torch.Size((len(bounds), first.size, max(layers[0].in_features, layers[0].out_features)))
        is_dense = layers[0].engine == "dense"
        sizes = [layer.weight.numel() for layer in layers]
        layer_of = places = torch.empty(0, dtype=torch.long, device=weight.device)
        if not is_dense:
            layer_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(weight.device)
            pairs = zip(bounds, layers, strict=True)
            places = torch.cat(
                [_places(*pair, shape) + i * shape[1:].numel() for i, pair in enumerate(pairs)]
            )
        group = cls(
            [weakref.ref(bound) for bound in bounds],
            first.bound,
            layer_of,
            torch.tensor([0, *sizes]).cumsum(0).to(weight.device),
            places,
            torch.cat([layer.zero_or_one.flatten() for layer in layers]).to(weight) if is_dense else None,
            torch.cat([bound.probe.flatten() for bound in bounds]).to(weight),
            sizes,
            shape,
            [bound.wide for bound in bounds] if is_dense else None,
        )
        first.__dict__["_group"] = group
        return group

    def fits(self, bounds: Sequence["SpectralBound"], weight: Tensor) -> bool:
        """Whether this is the group of some bounds, for weights like one."""
        same = len(self.members) == len(bounds) and all(
            member() is bound for member, bound in zip(self.members, bounds, strict=True)
        )
        return same and self.probe.dtype == weight.dtype and self.probe.device == weight.device

    def flat(self, weights: Sequence[Tensor]) -> Tensor:
        """Return all entries, zero off the masks; differentiable."""
        flat = torch.cat([weight.reshape(-1) for weight in weights])
        return flat if self.mask is None else flat * self.mask

    def matrices(self, flat: Tensor) -> Tensor:
        """Return the masked weights as matrices; differentiable."""
        if self.are_wide is not None:
            _, short, long = self.shape
            parts = zip(flat.split(self.sizes), self.are_wide, strict=True)
            return torch.stack([x.view(short, long) if wide else x.view(long, short).mT for x, wide in parts])
        return flat.new_zeros(self.shape.numel()).index_copy(0, self.places, flat).view(self.shape)

    def sums(self, flat: Tensor) -> Tensor:
        """Return the sum of numbers for the entries of each layer, the same in each call, also on a GPU."""
        if self.are_wide is not None:
            return flat.view(len(self.sizes), -1).sum(1)
        return torch.segment_reduce(flat, "sum", offsets=self.starts, unsafe=True)

    def times(self, flat: Tensor, factors: Tensor) -> Tensor:
        """Multiply numbers for all entries by one for each layer; differentiable."""
        if self.are_wide is not None:
            return (flat.view(len(factors), -1) * factors.unsqueeze(-1)).view(-1)
        return flat * factors.index_select(0, self.layer_of)

    def entries_of(self, matrices: Tensor) -> Tensor:
        """Return the numbers at the places of all entries; without gradient."""
        if self.are_wide is not None:
            parts = zip(matrices, self.are_wide, strict=True)
            return torch.cat([(x if wide else x.mT).reshape(-1) for x, wide in parts])
        return matrices.view(-1).index_select(0, self.places)

    def split(self, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Return numbers for all entries in the shapes of the layers' weights."""
        return [part.view_as(each) for part, each in zip(flat.split(self.sizes), like, strict=True)]


def _places(bound: "SpectralBound", layer: MaskedLinear, shape: torch.Size) -> Tensor:
    """Return where the entries of a sparse layer are in its matrix, ``shape[1:]``, flattened."""
    row, column = layer.pattern.row, layer.pattern.column
    return row * shape[2] + column if bound.wide else column * shape[2] + row


def _singular_vectors(
    bounds: Sequence["SpectralBound"], group: _Group, flat: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first singular vectors and values of layers of one size.

    Args:
        bounds: The bounds of the k layers. What they know is brought up to date.
        group: The layers.
        flat: Their entries.

    Returns:
        Shapes ``(k, 1, short)``, ``(k, 1, long)`` and ``(k, 1, 1)``.
    """
    # One by one: what captures a program sees that a number is read out of a tensor, but not by tolist().
    prints = [float(each) for each in group.sums(flat * group.probe)]
    changed = []
    for i, (bound, own) in enumerate(zip(bounds, prints, strict=True)):
        known, short, *_ = bound._known
        same = known == own and short.dtype == flat.dtype and short.device == flat.device
        if not same and math.isfinite(own):
            changed.append(i)
    if changed:
        matrices = group.matrices(flat)
        if len(changed) < len(bounds):
            matrices = matrices[changed]
        gram = torch.bmm(matrices, matrices.mT)
        bases = _next_bases([bounds[i] for i in changed], gram)
        small = bases[..., -1].unsqueeze(1)
        large = torch.bmm(small, matrices)
        norm = torch.linalg.vector_norm(large, dim=2, keepdim=True)
        large = large / norm.clamp(min=_tiny(large))
        vectors: tuple[Tensor, ...] = (small, large, norm)
        for i, *found in zip(changed, *(part.unbind() for part in (*vectors, bases)), strict=True):
            # Directly: a module searches each value that is set for parameters.
            bounds[i].__dict__["_known"] = (prints[i], *found)
    if len(changed) < len(bounds):
        known_parts = [[part.to(flat) for part in bound._known[1:4]] for bound in bounds]
        vectors = tuple(torch.stack(parts) for parts in zip(*known_parts, strict=True))
    small, large, norm = vectors
    return small, large, norm


def _next_bases(bounds: Sequence["SpectralBound"], gram: Tensor) -> Tensor:
    """Return the first eigenvectors of Gram matrices, ``(k, size, kept)``, the largest last.

    They are those of one step from the vectors that are kept, where these are certified, and else exact.
    """
    size = gram.shape[-1]
    bases = [bound._known[4] for bound in bounds]
    if size <= TINY_SIZE or not all(math.isfinite(bound._known[0]) for bound in bounds):
        return torch.linalg.eigh(gram).eigenvectors[..., -KEPT:]
    values, found = _ritz(gram.__matmul__, gram @ torch.stack(bases).to(gram))
    failed = torch.linalg.cholesky_ex(_shifted(gram, values[:, -1])).info.nonzero().flatten()
    if len(failed):
        found[failed] = torch.linalg.eigh(gram[failed]).eigenvectors[..., -KEPT:]
    return found


class _Together(Operation):
    """The scaled entries of layers of one size and bound whose Gram matrices are small."""

    @staticmethod
    def forward(
        ctx: Any, bounds: Sequence["SpectralBound"], group: _Group, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group = group
        flat = group.flat(weights)
        short, long, norm = _singular_vectors(bounds, group, flat)
        factor = _factor(norm, group).view(-1)
        ctx.save_for_backward(flat, short, long, factor, *weights)
        return tuple(group.split(group.times(flat, factor), weights))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group: _Group = ctx.group
        flat, short, long, factor, *weights = ctx.saved_tensors
        grad = torch.cat([each.reshape(-1) for each in grads])
        if torch.is_grad_enabled():  # create_graph=True
            flat = group.flat(weights)
            norm = torch.bmm(torch.bmm(short, group.matrices(flat)), long.mT)
            scaled = group.times(flat, _factor(norm, group).view(-1))
            return (None, None, *torch.autograd.grad(scaled, weights, grad, create_graph=True))
        along = group.sums(grad * flat) * (factor * (-(1 + MARGIN) / group.bound)) * (factor < 1)
        directions = (short.mT * along.view(-1, 1, 1)) * long
        grad = group.times(grad + group.entries_of(directions), factor)
        return (None, None, *group.split(grad if group.mask is None else grad.mul_(group.mask), weights))


def _factor(norm: Tensor, group: _Group) -> Tensor:
    """Return by what layers of some norms are multiplied."""
    return group.bound / (norm * (1 + MARGIN)).clamp(min=group.bound)


class _Scaled(Operation):
    """The scaled entries of some layers as one node of the graph.

    The norm u^T W v is the product of the weights with u v^T on the mask.
    """

    @staticmethod
    def forward(
        ctx: Any, fixed: Sequence[tuple[float, Tensor | None, Tensor]], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.fixed, ctx.factors, results = fixed, [], []
        for weight, (bound, mask, direction) in zip(weights, fixed, strict=True):
            norm = float(torch.dot(weight.view(-1), direction.view(-1)))
            ctx.factors.append(bound / max(norm * (1 + MARGIN), bound))
            entries = weight if mask is None else weight * mask
            results.append(entries * ctx.factors[-1] if mask is None else entries.mul_(ctx.factors[-1]))
        ctx.save_for_backward(*weights)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        results: list[Tensor | None] = [None]
        differentiable = torch.is_grad_enabled()  # create_graph=True
        for weight, factor, (bound, mask, direction), grad in zip(
            ctx.saved_tensors, ctx.factors, ctx.fixed, grads, strict=True
        ):
            if differentiable:
                norm = torch.dot(weight.flatten(), direction.flatten())
                entries = (weight if mask is None else weight * mask) * (
                    bound / (norm * (1 + MARGIN)).clamp(min=bound)
                )
                results.append(torch.autograd.grad(entries, weight, grad, create_graph=True)[0])
                continue
            grad = grad if mask is None else grad * mask
            if factor < 1:
                along = float(torch.dot(grad.flatten(), weight.flatten())) * factor * (1 + MARGIN) / bound
                grad = torch.sub(grad, direction, alpha=along).mul_(factor)
            results.append(grad)
        return tuple(results)


def _gram_product(layer: MaskedLinear) -> Callable[[Tensor], Tensor]:
    """Multiplication by the smaller Gram matrix, without forming it."""
    entries = layer.entries()
    wide = layer.in_features > layer.out_features
    return lambda x: layer.product(entries, layer.product(entries, x, transposed=wide), transposed=not wide)


def _gram_matrix(layer: MaskedLinear) -> Tensor:
    weight = layer.masked_weight()
    wide = layer.in_features > layer.out_features
    if layer.engine == "dense":
        return weight @ weight.T if wide else weight.T @ weight
    return layer.product(layer.entries(), weight.T if wide else weight, transposed=not wide)


def _largest(gram: Tensor) -> Tensor:
    """The eigenvector of the largest eigenvalue, of a matrix or of each of several."""
    return torch.linalg.eigh(gram).eigenvectors[..., -1]


def _is_above(gram: Tensor, value: Tensor) -> bool:
    """Whether the largest eigenvalue is below ``value``, raised by the margin."""
    return bool(torch.linalg.cholesky_ex(_shifted(gram, value)).info == 0)


def _shifted(gram: Tensor, value: Tensor) -> Tensor:
    """The matrix, or each of several, that is positive definite if the largest eigenvalue is below ``value``."""
    raised = (value * (1 + MARGIN) ** 2).unsqueeze(-1).expand(gram.shape[:-1])
    return torch.diag_embed(raised) - gram


def _ritz(multiply: Callable[[Tensor], Tensor], basis: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values and vectors on the span of the basis, or of each of several, ascending."""
    space = torch.linalg.qr(basis).Q
    values, vectors = torch.linalg.eigh(space.mT @ multiply(space))
    return values, space @ vectors


def _filter(multiply: Callable[[Tensor], Tensor], x: Tensor, top: Tensor, degree: int) -> Tensor:
    """Apply the Chebyshev polynomial that stays within one on the eigenvalues from 0 to the cut."""
    half = (CUT * top / 2).clamp(min=_tiny(x))
    before, now = x, multiply(x) / half - x
    for _ in range(degree - 1):
        before, now = now, 2 * (multiply(now) / half - now) - before
    return now / _norms(now)


def _norms(x: Tensor) -> Tensor:
    """The norms of the columns, or of a vector, never zero."""
    return torch.linalg.vector_norm(x, dim=0).clamp(min=_tiny(x))


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
