"""One pass of a faithful flow through its levels, with values handed in from outside."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.transforms.edge_linear import Inputs, expand_batch

if TYPE_CHECKING:
    from pyro_graphflows.transforms.faithful_nn import FaithfulResidualNN

__all__ = ["FaithfulEvaluation"]


class FaithfulEvaluation:
    r"""A pass through the levels of a flow, in which the caller may replace values.

    Level after level: :meth:`step` maps the level's noise to values, or :meth:`terms` maps given values to noise; then
    :meth:`accept` hands in the values that were really taken, on which the later levels depend. Each
    level may have a larger batch shape than those before it, and shapes are broadcast from the right.

    The weights are prepared once, when the pass starts.

    Args:
        network: The network of the flow.
        context: The joined and standardised context, of shape (\*batch, C), or None.

    Example:
        >>> import torch
        >>> from pyro_graphflows.transforms.faithful_nn import FaithfulResidualNN
        >>> from pyro_graphflows.transforms.structure import FlowStructure
        >>> network = FaithfulResidualNN(FlowStructure([(), (0,)]), closed_form="sampling")
        >>> evaluation = network.start()
        >>> for level in network.levels:
        ...     z, log_diag = evaluation.step(torch.randn(5, len(level)))
        ...     evaluation.accept(z)
        >>> z.shape
        torch.Size([5, 1])
    """

    def __init__(self, network: FaithfulResidualNN, context: Tensor | None) -> None:
        self._network = network
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

    def fork(self) -> FaithfulEvaluation:
        """Return an evaluation at the same place that goes its own way from here."""
        other = copy.copy(self)
        other._accepted = list(self._accepted)
        return other

    def noise(self, shape: Sequence[int]) -> Tensor:
        r"""Draw standard normal noise for the next level, of shape (\*shape, n)."""
        loc, width = self._network.loc, len(self._network.levels[self.level])
        return torch.randn(*shape, width, dtype=loc.dtype, device=loc.device)

    def step(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map the noise of the next level to values.

        Args:
            eps: Shape (\*batch, n), columns as in ``network.levels[level]``.

        Returns:
            z and the log of each dz/deps, both of shape (\*batch, n).

        Raises:
            GraphflowsError: If the number of columns is wrong or all levels are done.
        """
        return self._map(eps, "sampling")

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map given values of the next level to noise.

        Args:
            z: Shape (\*batch, n), columns as in ``network.levels[level]``.

        Returns:
            eps and the log of each dz/deps, both of shape (\*batch, n).

        Raises:
            GraphflowsError: If the number of columns is wrong or all levels are done.
        """
        return self._map(z, "density")

    def accept(self, z: Tensor) -> None:
        r"""Hand in the values of the next level, and go on to the level after it.

        Args:
            z: Shape (\*batch, n), columns as in ``network.levels[level]``.

        Raises:
            GraphflowsError: If the number of columns is wrong or all levels are done.
        """
        positions, inner = self._columns(z)
        standard = (z - self._network.loc[positions]) / self._network.scale[positions]
        if inner is not None:
            standard = standard.index_select(-1, inner)
        self._accepted.append(standard.movedim(-1, 0))
        if self._supply is not None and self.level < len(self._network.levels):
            self._supply = self._supply.accept(self._accepted[-1])

    def _columns(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the positions of the next level, and their inner order (None where it is the same)."""
        network = self._network
        if self.level >= len(network.levels):
            raise GraphflowsError(f"Expected at most {len(network.levels)} levels; all have been accepted.")
        positions, order, _ = network.level_columns(self.level)
        if values.shape[-1:] != (len(positions),):
            names = ", ".join(network.structure.names[v] for v in network.levels[self.level])
            raise GraphflowsError(
                f"Expected a last dimension of {len(positions)} for level {self.level} ({names}); "
                f"got shape {tuple(values.shape)}."
            )
        return positions, order

    def _map(self, values: Tensor, direction: str) -> tuple[Tensor, Tensor]:
        network = self._network
        positions, order = self._columns(values)
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
        out, log_diag = (result.view(-1, *batch).movedim(0, -1) for result in results)
        back = network.level_columns(self.level)[2]
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
