r"""A graphical residual flow followed by an affine map along the same graph, for guides.

Noise goes through the residual blocks of a :class:`~pyro_graphflows.transforms.graphical_nn.GraphicalResidualNN`, and
what comes out, u, through

.. math:: z_v = b_v + \sum_{p \in Pa(v)} W_{vp}\, (x, z)_p + e^{\lambda_v(x, z_{Pa(v)})}\, u_v,

level by level. Spectral norms bound the blocks, so that they cannot hold a regression; the affine map can, and with
blocks that start at zero output it makes the whole exactly linear-Gaussian. Its Jacobian is triangular in the
order of the graph as that of the blocks is, so each variable keeps a term of its own.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_graphflows.transforms.faithful_evaluation import FaithfulEvaluation
from pyro_graphflows.transforms.faithful_nn import FaithfulResidualNN
from pyro_graphflows.transforms.graphical_nn import GraphicalEvaluation, GraphicalResidualNN
from pyro_graphflows.transforms.structure import FlowStructure

__all__ = ["AffineGraphicalEvaluation", "AffineGraphicalNN"]


class AffineGraphicalNN(nn.Module):
    """Residual blocks over a graph and an affine map along it.

    Args:
        structure: Who depends on whom.
        num_blocks: The number of residual blocks; by default 4, or as many as information needs to reach every variable
            from all its ancestors.
        conditional_scale: Whether parents act on the scales of the affine map.
        conditioner_units: The hidden units of a conditioner of the affine map
            (:class:`~pyro_graphflows.transforms.faithful_nn.FaithfulResidualNN`); 0 for none.
        conditioner_layers: The number of its hidden layers.
        **options: Further arguments of :class:`~pyro_graphflows.transforms.graphical_nn.GraphicalResidualNN`.

    Attributes:
        blocks: The residual flow.
        affine: The affine map: a :class:`~pyro_graphflows.transforms.faithful_nn.FaithfulResidualNN` without
            hidden units.

    Raises:
        GraphflowsError: If an argument is out of range, or there are fewer blocks than hops.
    """

    def __init__(
        self,
        structure: FlowStructure,
        *,
        num_blocks: int | None = None,
        conditional_scale: bool = True,
        conditioner_units: int = 0,
        conditioner_layers: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_blocks is None:
            num_blocks = max(4, structure.max_hops)
        self.blocks = GraphicalResidualNN(structure, num_blocks=num_blocks, **options)
        self.affine = FaithfulResidualNN(
            structure,
            num_blocks=1,
            units_per_variable=0,
            closed_form="sampling",
            conditional_scale=conditional_scale,
            conditioner_units=conditioner_units,
            conditioner_layers=conditioner_layers,
        )

    @torch.no_grad()
    def init_linear_(
        self, weights: Tensor, shift: Tensor, scale: Tensor, *, variables: Sequence[int] | None = None
    ) -> None:
        """Make the flow linear-Gaussian; see :meth:`FaithfulResidualNN.init_linear_`.

        The residual blocks keep their hidden units but get zero output.

        Args:
            weights: Shape (D, C + D); columns are the context and then the variables.
            shift: Shape (D,).
            scale: Shape (D,), positive.
            variables: The variables to set; all by default.
        """
        self.affine.init_linear_(weights, shift, scale, variables=variables)
        self.blocks.zero_output_(variables)

    def start(self, *context: Tensor) -> "AffineGraphicalEvaluation":
        """Begin a pass through the levels.

        Args:
            context: The context, in parts.
        """
        return AffineGraphicalEvaluation(self.blocks.start(*context), self.affine.start(*context))


class AffineGraphicalEvaluation:
    """A pass through the levels, with the methods of both evaluations that it joins.

    Args:
        blocks: The pass through the residual flow, noise to u.
        affine: The pass through the affine map, u to z.
    """

    def __init__(self, blocks: GraphicalEvaluation, affine: FaithfulEvaluation) -> None:
        self._blocks = blocks
        self._affine = affine
        self._drawn: tuple[Tensor, Tensor] | None = None  # z and u of the last step

    def fork(self) -> "AffineGraphicalEvaluation":
        """Return an evaluation at the same place that goes its own way from here."""
        other = copy.copy(self)
        other._blocks, other._affine = self._blocks.fork(), self._affine.fork()
        return other

    def noise(self, shape: Sequence[int]) -> Tensor:
        r"""Draw the noise of the next level, (\*shape, n); see :meth:`GraphicalEvaluation.noise`."""
        return self._blocks.noise(shape)

    def step(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map the noise of the next level to values; return these and the log of each dz/deps, (\*batch, n)."""
        u, log_diag = self._blocks.step(eps)
        z, log_scale = self._affine.step(u)
        self._drawn = (z, u)
        return z, log_diag + log_scale

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map given values of the next level to noise; return it and the log of each dz/deps, (\*batch, n)."""
        u, log_scale = self._affine.terms(z)
        eps, log_diag = self._blocks.terms(u)
        return eps, log_diag + log_scale

    def accept(self, z: Tensor) -> None:
        """Hand in the values of the next level, and go on to the level after it."""
        drawn = self._drawn is not None and self._drawn[0] is z
        self._blocks.accept(self._drawn[1] if drawn and self._drawn else self._affine.terms(z)[0])
        self._affine.accept(z)
        self._drawn = None
