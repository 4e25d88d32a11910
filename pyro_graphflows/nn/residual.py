r"""Networks for residual blocks whose Jacobian has a known diagonal.

A residual block adds g(z) to z. With label sets :math:`A(v) = \{v\} \cup \mathrm{Pa}(v)` the Jacobian of g is
triangular in the order of the graph, so the log-determinant of the block is the sum over v of
:math:`\log(1 + \partial g_v / \partial z_v)`: the diagonal is all that is needed. By the owner theorem
(:mod:`pyro_graphflows.masks`) every path from input v to output v runs through units owned by v. One forward-mode
pass with tangent 1 in every input, and with the weights between units of different owners left out, therefore
yields the whole diagonal, exactly, at any depth, for the price of one more pass.
"""

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import LabelledMasks, SparseMask, label_masks
from pyro_graphflows.nn.activations import Activation, make_activation
from pyro_graphflows.nn.linear import MaskedLinear
from pyro_graphflows.nn.lipschitz import SpectralBound
from pyro_graphflows.nn.sparse import SparsePattern

__all__ = ["MaskedResidualNet", "ResidualEvaluation"]


class MaskedResidualNet(nn.Module):
    r"""A network g of variables and context in which output v depends on exactly the inputs in ``allowed[v]``.

    The inputs are the D variables followed by the columns of the context; variable v is input v and output v.

    With ``bound``, the spectral norm of every masked weight stays at most ``bound``, as in [1], and so the
    Lipschitz constant of g in the variables stays at most :attr:`lipschitz`. The columns of the first layer
    that multiply the context are not bounded.

    References:
        [1] Mouton and Kroon (2022), Graphical Residual Flows, Eq. (6). They form the full Jacobian.

    Shape:
        - z: (\*, D), context: (\*, C), output and diagonal: (\*, D). Batch shapes broadcast.

    Args:
        allowed: For each variable v, the inputs that output v may see: indices below D are variables, the others
            are context columns. The variables must form a directed acyclic graph, apart from v itself.
        num_inputs: The number of variables and context columns.
        hidden_dims: The numbers of units of the hidden layers.
        units_per_set: The number of units for each distinct allowed set, when ``hidden_dims`` is not given.
        hidden_layers: The number of hidden layers, when ``hidden_dims`` is not given.
        activation: A name or an :class:`~pyro_graphflows.nn.activations.Activation`.
        bound: The largest spectral norm of each masked weight; None for no bound.
        engine: The engine of the layers; see :class:`MaskedLinear`.
        names: Names of the inputs, for messages.

    Attributes:
        layers: The layers, from the variables to the outputs.
        context_layer: The part of the first layer that multiplies the context, or None.

    Raises:
        GraphflowsError: If there is no hidden layer, the activation has no derivative, two variables depend on
            each other, or ``hidden_dims`` are too narrow.

    Example:
        >>> net = MaskedResidualNet([{0}, {0, 1}], 2, bound=0.9)
        >>> g, diagonal = net.forward_and_diag(torch.zeros(5, 2))
        >>> g.shape, diagonal.shape, bool((diagonal.abs() < 0.9).all())
        (torch.Size([5, 2]), torch.Size([5, 2]), True)
    """

    def __init__(
        self,
        allowed: Sequence[Collection[int]],
        num_inputs: int,
        *,
        hidden_dims: Sequence[int] | None = None,
        units_per_set: int = 4,
        hidden_layers: int = 1,
        activation: str | Activation = "lipswish",
        bound: float | None = None,
        engine: str = "auto",
        names: Sequence[object] | None = None,
    ) -> None:
        super().__init__()
        self.num_variables = len(allowed)
        self.context_dim = num_inputs - len(allowed)
        if self.context_dim < 0:
            raise GraphflowsError(
                f"Expected at least {len(allowed)} inputs, one a variable; got {num_inputs}."
            )
        masks = label_masks(
            allowed,
            num_inputs,
            hidden_layers=hidden_layers,
            units_per_set=units_per_set,
            hidden_dims=hidden_dims,
            input_names=names,
            output_names=names,
        )
        if not masks.labels:
            raise GraphflowsError("Expected at least one hidden layer; got none.")
        module = make_activation(activation)
        if not isinstance(module, Activation):
            raise GraphflowsError(
                f"Expected an Activation, whose derivative is known; got {type(module).__name__}."
            )
        self.activation = module
        self.allowed = masks.allowed
        first, context = _split_columns(masks.patterns[0], self.num_variables)
        layers = [MaskedLinear(mask, engine=engine) for mask in (first, *masks.patterns[1:])]
        self.layers = nn.ModuleList(layers)
        self.context_layer = MaskedLinear(context, bias=False, engine=engine) if self.context_dim else None
        self.bound = bound
        self.bounds = nn.ModuleList(
            [] if bound is None else [SpectralBound(layer, bound) for layer in layers]
        )
        self.tangents = _Tangents(masks, layers)

    @property
    def lipschitz(self) -> float | None:
        """A Lipschitz constant of g in the variables; None where there is no bound."""
        if self.bound is None:
            return None
        return self.bound ** len(self.layers) * self.activation.lipschitz ** (len(self.layers) - 1)

    def entries(self) -> list[Tensor]:
        """Return the weights of the layers, masked and bounded, in the layout of their engines."""
        if self.bound is None:
            return [layer.entries() for layer in self._masked_layers()]
        return [
            bound.entries(layer)
            for bound, layer in zip(self.bounds, self._masked_layers(), strict=True)
            if isinstance(bound, SpectralBound)
        ]

    def start(self, context: Tensor | None = None) -> "ResidualEvaluation":
        """Mask and bound the weights and take in the context once, for many evaluations at different z."""
        return ResidualEvaluation(self, context)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return g(z; context)."""
        return self.start(context)(z)

    def forward_and_diag(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Return g(z; context) and the diagonal of its Jacobian, :math:`\partial g_v / \partial z_v`."""
        return self.start(context).forward_and_diag(z)

    def diagonal_bound(self) -> Tensor:
        r"""Return for each variable a bound on :math:`|\partial g_v / \partial z_v|`, of shape (D,).

        It is :math:`|w_L| \cdots |w_1|` over the units that v owns, times the activations' slopes.
        """
        gains = [entries.abs() for entries in self.entries()]
        ones = [gains[0].new_ones(layer.out_features) for layer in self._masked_layers()[:-1]]
        gain = self.tangents(gains, ones)
        return gain * self.activation.lipschitz ** (len(self.layers) - 1)

    def zero_output_(self) -> None:
        """Set the last layer to zero, so that the block is the identity."""
        list(self._masked_layers())[-1].zero_()

    def _masked_layers(self) -> list[MaskedLinear]:
        return [layer for layer in self.layers if isinstance(layer, MaskedLinear)]


class ResidualEvaluation:
    """A :class:`MaskedResidualNet` with its weights made ready and its context taken in.

    Args:
        net: The network.
        context: The context, of shape (*batch, C).
    """

    def __init__(self, net: MaskedResidualNet, context: Tensor | None = None) -> None:
        got = 0 if context is None else context.shape[-1]
        if got != net.context_dim:
            raise GraphflowsError(f"Expected context.shape[-1] == {net.context_dim}; got {got}.")
        self._net = net
        self._layers = net._masked_layers()
        self._entries = net.entries()
        self._shift = None if net.context_layer is None else net.context_layer(context)

    def select(self, rows: Tensor) -> "ResidualEvaluation":
        """Return the evaluation for some of the context's rows (its first dimension), at no cost."""
        other = copy.copy(self)
        other._shift = None if self._shift is None else self._shift[rows]
        return other

    def _first(self, z: Tensor) -> Tensor:
        if z.shape[-1] != self._net.num_variables:
            raise GraphflowsError(f"Expected z.shape[-1] == {self._net.num_variables}; got {z.shape[-1]}.")
        first = self._layers[0]
        pre = first.multiply(self._entries[0], z, first.bias)
        return pre if self._shift is None else pre + self._shift

    def __call__(self, z: Tensor) -> Tensor:
        """Return g(z)."""
        pre = self._first(z)
        for layer, entries in zip(self._layers[1:], self._entries[1:], strict=True):
            pre = layer.multiply(entries, self._net.activation(pre), layer.bias)
        return pre

    def forward_and_diag(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return g(z) and the diagonal of its Jacobian."""
        pre = self._first(z)
        slopes = []
        for layer, entries in zip(self._layers[1:], self._entries[1:], strict=True):
            value, slope = self._net.activation.forward_and_derivative(pre)
            slopes.append(slope)
            pre = layer.multiply(entries, value, layer.bias)
        return pre, self._net.tangents(self._entries, slopes)


class _Tangents(nn.Module):
    """The forward-mode pass with tangent 1 in each variable, over the weights between units of one owner.

    Of each layer but the first the entries between units of the same owner are kept: by a second mask for the dense
    engine, by a second pattern for the sparse one. The first layer's weight from its owner to each unit does not
    depend on z, so it is multiplied into the second layer's weights, which are fewer than the batch's values.
    """

    places: Tensor

    def __init__(self, masks: LabelledMasks, layers: Sequence[MaskedLinear]) -> None:
        super().__init__()
        owners = [*masks.owners, torch.arange(len(masks.allowed))]
        # For each unit the place of the weight from its owner among the first layer's entries; any for no owner.
        first = layers[0].sparse_mask()
        owned = (owners[0][first.indices[0]] == first.indices[1]).nonzero()[:, 0]
        places = torch.zeros(first.shape[0], dtype=torch.long)
        places[first.indices[0][owned]] = (
            owned
            if layers[0].engine == "sparse"
            else first.indices[0][owned] * first.shape[1] + first.indices[1][owned]
        )
        self.patterns = nn.ModuleList()
        for i, layer in enumerate(layers[1:]):
            mask = layer.sparse_mask()
            row, column = mask.indices
            same = (owners[i + 1][row] == owners[i][column]) & (owners[i][column] >= 0)
            kept = SparseMask(mask.indices[:, same].contiguous(), mask.shape)
            if layer.engine == "sparse":
                self.register_buffer(f"kept_{i}", same.nonzero()[:, 0], persistent=False)
                self.patterns.append(SparsePattern(kept))
                places = places[kept.indices[1]] if i == 0 else places
            else:
                self.register_buffer(f"kept_{i}", kept.to_dense(), persistent=False)
                self.patterns.append(nn.Identity())
        self.register_buffer("places", places, persistent=False)

    def forward(self, entries: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
        """Return the diagonal, from the layers' weights and the slopes of the hidden units."""
        first: Tensor | None = entries[0].flatten().gather(0, self.places) if entries[0].numel() else None
        tangent = slopes[0]
        for i, (pattern, weight) in enumerate(zip(self.patterns, entries[1:], strict=True)):
            kept = getattr(self, f"kept_{i}")
            if isinstance(pattern, SparsePattern):
                values = weight.gather(0, kept)
                values = values * first if first is not None and i == 0 else values
                tangent = pattern.linear(values, tangent)
            else:
                matrix = weight * kept
                matrix = matrix * first if first is not None and i == 0 else matrix
                tangent = nn.functional.linear(tangent, matrix)
            if i + 1 < len(slopes):
                tangent = tangent * slopes[i + 1]
        return tangent


def _split_columns(mask: SparseMask, size: int) -> tuple[SparseMask, SparseMask]:
    rows, total = mask.shape
    left = mask.indices[1] < size
    right = mask.indices[:, ~left] - torch.tensor([[0], [size]])
    return (
        SparseMask(mask.indices[:, left].contiguous(), (rows, size)),
        SparseMask(right, (rows, total - size)),
    )
