r"""Networks for residual blocks whose Jacobian has a known diagonal.

A residual block adds g(z) to z. With label sets :math:`A(v) = \{v\} \cup \mathrm{Pa}(v)` the Jacobian of g is
triangular in the order of the graph, so the log-determinant of the block is the sum over v of
:math:`\log(1 + \partial g_v / \partial z_v)`: the diagonal is all that is needed. By the owner theorem
(:mod:`pyro_graphflows.masks`) every path from input v to output v runs through units owned by v. One forward-mode
pass with tangent 1 in every input, and with the weights between units of different owners left out, therefore
yields the whole diagonal, exactly, at any depth, for the price of one more pass.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import SparseMask, UnitsPerSet, label_masks
from pyro_graphflows.nn.activations import Activation, make_activation
from pyro_graphflows.nn.fused_residual import FusedResidual, OwnerPass, residual_chain
from pyro_graphflows.nn.lipschitz import SpectralBound, bounded_entries
from pyro_graphflows.nn.masked import FUSED_OVERHEAD, MaskedLinear, fastest_engine
from pyro_graphflows.nn.sparse import SparsePattern

__all__ = ["ContextLayers", "MaskedResidualNet", "ResidualEvaluation", "all_entries", "go_through"]


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
            UnitsPerSet(units_per_set, hidden_layers) if hidden_dims is None else hidden_dims,
            names=(names, names),
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
        layers = []
        for mask in (first, *masks.patterns[1:], context):
            chosen = fastest_engine(mask, overhead=FUSED_OVERHEAD) if engine == "auto" else engine
            layers.append(MaskedLinear(mask, bias=mask is not context, engine=chosen))
        of_context = layers.pop()
        self.layers = nn.ModuleList(layers)
        self.context_layer = of_context if self.context_dim else None
        self.bound = bound
        self.bounds = nn.ModuleList(
            [] if bound is None else [SpectralBound(layer, bound) for layer in layers]
        )
        self.operation = FusedResidual(layers, OwnerPass(masks, layers), type(module))

    @property
    def lipschitz(self) -> float | None:
        """A Lipschitz constant of g in the variables; None where there is no bound."""
        if self.bound is None:
            return None
        return self.bound ** len(self.layers) * self.activation.lipschitz ** (len(self.layers) - 1)

    def entries(self) -> list[Tensor]:
        """Return the weights of the layers, masked and bounded, in the layout of their engines."""
        return all_entries([self])[0]

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
        gains = self.operation.owner_pass.weights([entries.abs() for entries in self.entries()])
        ones = [gains[0].new_ones(layer.out_features, 1) for layer in self._masked_layers()[:-1]]
        gain = self.operation.owner_pass(gains, ones)[:, 0]
        return gain * self.activation.lipschitz ** (len(self.layers) - 1)

    def zero_output_(self, chosen: Tensor | None = None) -> None:
        """Set the last layer to zero, so that the block is the identity; or its rows where ``chosen`` is true."""
        last = list(self._masked_layers())[-1]
        if chosen is None:
            last.zero_()
            return
        with torch.no_grad():
            last.weight[chosen if last.engine == "dense" else chosen[last.pattern.row]] = 0.0
            if last.bias is not None:
                last.bias[chosen] = 0.0

    def _masked_layers(self) -> list[MaskedLinear]:
        return [layer for layer in self.layers if isinstance(layer, MaskedLinear)]


class ResidualEvaluation:
    """A :class:`MaskedResidualNet` with its weights made ready and its context taken in.

    Args:
        net: The network.
        context: The context, of shape (*batch, C).
        entries: The weights of the layers, if they are known; see :func:`all_entries`.
        added: What the context adds to the first layer, of shape (H, elements of the batch), if it is known; see
            :class:`ContextLayers`.
    """

    def __init__(
        self,
        net: MaskedResidualNet,
        context: Tensor | None = None,
        entries: Sequence[Tensor] | None = None,
        added: Tensor | None = None,
    ) -> None:
        got = 0 if context is None else context.shape[-1]
        if got != net.context_dim:
            raise GraphflowsError(f"Expected context.shape[-1] == {net.context_dim}; got {got}.")
        self._net = net
        self._layers = net._masked_layers()
        self._entries = net.entries() if entries is None else entries
        beta = net.activation.input_scale()
        self.batch_shape = torch.Size() if context is None else context.shape[:-1]
        if context is not None and added is None:
            assert net.context_layer is not None
            added = net.context_layer.matmul(net.context_layer.entries(), context_columns(context))
        self._shift = added
        self._own_columns = added if added is None or beta is None else added * beta
        self._columns: tuple[torch.Size, Tensor] | None = None  # the same for a larger batch
        self._weights: list[Tensor] = []
        for i, (layer, weight) in enumerate(zip(self._layers, self._entries, strict=True)):
            bias: Tensor | None = layer.bias
            assert bias is not None
            if beta is not None:  # an activation phi(beta x) / beta is phi between other weights
                weight = weight * beta if i == 0 else weight
                bias = bias * beta if i < len(self._layers) - 1 else bias
                weight = weight / beta if i == len(self._layers) - 1 else weight
            self._weights += [weight, bias]
        self._tangents: list[Tensor] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Return g(z)."""
        self._check(z.shape[-1])
        first = self._layers[0]
        pre = first.multiply(self._entries[0], z, first.bias)
        if self._shift is not None:
            pre = pre + self._shift.view(len(self._shift), *self.batch_shape).movedim(0, -1)
        for layer, entries in zip(self._layers[1:], self._entries[1:], strict=True):
            pre = layer.multiply(entries, self._net.activation(pre), layer.bias)
        return pre

    def forward_and_diag(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return g(z) and the diagonal of its Jacobian."""
        self._check(z.shape[-1])
        batch = torch.broadcast_shapes(z.shape[:-1], self.batch_shape)
        columns = z.expand(*batch, -1).reshape(batch.numel(), -1).T.contiguous()
        g, diagonal = self.columns(columns, batch)
        return g.T.reshape(*batch, -1), diagonal.T.reshape(*batch, -1)

    def columns(
        self, z: Tensor, batch: torch.Size | None = None, samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return g(z) and the diagonal of its Jacobian, features first.

        Args:
            z: Shape (D, N), or (D, n) for some of the samples.
            batch: The batch shape of N elements, to which that of the context broadcasts; (N,) by default.
            samples: The numbers of the n samples; None for all.

        Returns:
            Both of the shape of z.
        """
        self._check(z.shape[0])
        shift = self._shift_columns(z, batch)
        if shift is not None and samples is not None:
            shift = shift.index_select(1, samples)
        if torch.is_grad_enabled():
            return self._net.operation(z, shift, self._weights)
        g, diagonal, _ = self._net.operation.run(z, shift, self._weights, self._owned())
        return g, diagonal

    @torch.no_grad()
    def pull(self, z: Tensor, batch: torch.Size | None = None) -> Callable[[Tensor], Tensor]:
        r"""Return the map :math:`u \mapsto J^\top u` for the Jacobian of g at z, features first as :meth:`columns`."""
        operation = self._net.operation
        _, _, slopes = operation.run(z, self._shift_columns(z, batch), self._weights, self._owned())
        return lambda u: operation.pull(self._weights, slopes, u)

    def _owned(self) -> list[Tensor]:
        if self._tangents is None:
            self._tangents = [
                weight.detach() for weight in self._net.operation.owner_pass.weights(self._weights[::2])
            ]
        return self._tangents

    def _shift_columns(self, z: Tensor, batch: torch.Size | None) -> Tensor | None:
        """Return what the context adds where an activation has unit input scale, of shape (H, N)."""
        own = self._own_columns
        batch = torch.Size(z.shape[1:]) if batch is None else batch
        if own is None or batch.numel() == own.shape[1]:
            return own
        if self._columns is None or self._columns[0] != batch:
            with torch.enable_grad():  # the graph is needed if the first use is without gradients
                wide = own.view(len(own), *[1] * (len(batch) - len(self.batch_shape)), *self.batch_shape)
                self._columns = (batch, wide.expand(-1, *batch).reshape(len(own), -1))
        return self._columns[1]

    def _check(self, got: int) -> None:
        if got != self._net.num_variables:
            raise GraphflowsError(f"Expected z.shape[-1] == {self._net.num_variables}; got {got}.")


class ContextLayers(nn.Module):
    """What the context adds to the first layers of several networks with one mask, by one product.

    Args:
        nets: The networks; they are not registered as submodules.
    """

    def __init__(self, nets: Sequence[MaskedResidualNet]) -> None:
        super().__init__()
        layers = [net.context_layer for net in nets if net.context_layer is not None]
        self.__dict__["_layers"] = tuple(layers)
        self.number = len(nets)
        if not layers or layers[0].engine == "dense":
            return
        mask = layers[0].sparse_mask()
        rows = [mask.indices + torch.tensor([[i * mask.shape[0]], [0]]) for i in range(len(layers))]
        self.pattern = SparsePattern(
            SparseMask(torch.cat(rows, 1), (len(layers) * mask.shape[0], mask.shape[1]))
        )

    def forward(self, context: Tensor | None) -> list[Tensor | None]:
        """Return it for each network, of shape (H, elements of the batch); None without a context."""
        layers: tuple[MaskedLinear, ...] = self.__dict__["_layers"]
        if context is None:
            return [None] * self.number
        entries = torch.cat([layer.entries() for layer in layers])
        columns = context_columns(context)
        sparse = layers[0].engine == "sparse"
        added = self.pattern.matmul(entries, columns) if sparse else entries @ columns
        return list(added.split(layers[0].out_features))


def context_columns(context: Tensor) -> Tensor:
    """Return a context, of shape (*batch, C), with features first, (C, elements of the batch)."""
    return context.reshape(-1, context.shape[-1]).T.contiguous()


def all_entries(nets: Sequence[MaskedResidualNet]) -> list[list[Tensor]]:
    """Return :meth:`MaskedResidualNet.entries` of several networks, by one operation where they are bounded."""
    bounded = [net for net in nets if net.bound is not None]
    bounds = [bound for net in bounded for bound in net.bounds if isinstance(bound, SpectralBound)]
    layers = [layer for net in bounded for layer in net._masked_layers()]
    found = iter(bounded_entries(bounds, layers) if bounds else ())
    return [
        [layer.entries() if net.bound is None else next(found) for layer in net._masked_layers()]
        for net in nets
    ]


def go_through(
    evaluations: Sequence[ResidualEvaluation], z: Tensor, batch: torch.Size
) -> tuple[Tensor, Tensor]:
    r"""Apply :math:`z \mapsto z + g(z)` for each network in turn, features first.

    Args:
        evaluations: The networks, made ready.
        z: Shape (D, N).
        batch: The batch shape of N elements.

    Returns:
        The values and the sum of the logs of the diagonals of the Jacobians, both of shape (D, N).
    """
    if torch.is_grad_enabled():
        operations = [evaluation._net.operation for evaluation in evaluations]
        shifts = [evaluation._shift_columns(z, batch) for evaluation in evaluations]
        return residual_chain(operations, z, shifts, [evaluation._weights for evaluation in evaluations])
    total = torch.zeros_like(z)
    for evaluation in evaluations:
        g, diagonal = evaluation.columns(z, batch)
        z = g.add_(z)
        total.add_(diagonal.log1p_())
    return z, total


def _split_columns(mask: SparseMask, size: int) -> tuple[SparseMask, SparseMask]:
    rows, total = mask.shape
    left = mask.indices[1] < size
    right = mask.indices[:, ~left] - torch.tensor([[0], [size]])
    return (
        SparseMask(mask.indices[:, left].contiguous(), (rows, size)),
        SparseMask(right, (rows, total - size)),
    )
