"""The flow family: one monotone residual flow per block gives every conditional."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.exchange import Unlike
from pyro_graphflows.guides.flow_block import FlowBlock, FlowOptions
from pyro_graphflows.guides.normal import AutoFaithfulNormal
from pyro_graphflows.guides.plan import Block, Plan
from pyro_graphflows.guides.pool_plan import PoolPlan
from pyro_graphflows.inspect import TracedModel

__all__ = ["AutoFaithfulFlow"]


class AutoFaithfulFlow(AutoFaithfulNormal):
    r"""A faithful guide with flexible conditionals: every element has a monotone flow that its parents steer.

    In unconstrained space, :math:`z_v = F_v(\varepsilon_v; z_{Pa(v)}, x_{Pa(v)})` with a stack of one-dimensional
    residual blocks :math:`F_v`, so that each site has exactly the density :math:`q(z_v \mid` parents
    :math:`)` whatever the number of blocks. With hidden units at zero output, as after the regression start, every
    conditional is linear-Gaussian. Sampling, and scoring what was just sampled, need no numerical inversion; scoring
    other values inverts one-dimensional functions (or the other way round with ``closed_form="density"``, for
    inference compilation). Discrete sites, those whose copies stay dependent across a plate
    (:mod:`~pyro_graphflows.guides.coupled`) and those named in ``factors=`` have masked networks as in
    :class:`AutoFaithfulNormal`.

    References:
        [1] Mouton and Kroon (2022), Graphical Residual Flows.
        [2] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.

    Args:
        model: The model.
        inverse: What the sites are conditioned on; see :func:`~pyro_graphflows.auto_faithful_guide`.
        flow: ``"faithful"`` (:class:`~pyro_graphflows.FaithfulResidual`), or ``"graphical"`` for the flow of [1]
            (:class:`~pyro_graphflows.GraphicalResidual`, and an affine map along the graph for the regression
            start): its sites depend on all their ancestors, and independences are not enforced.
        num_blocks: The number of residual blocks of each element. By default 3; in a graphical flow 4, or as many
            as there are edges on the longest shortest path from an ancestor to a site, which is the least.
        units_per_variable: The hidden units of one block of one element.
        hidden_layers: The number of hidden layers of a block.
        hidden_dims: Widths of the hidden layers over all elements, instead of the two arguments before.
        closed_form: ``"sampling"`` or ``"density"``: the direction without numerical inversion.
        activation: An activation with known slopes, or its name; by default ``"elu"`` (graphical: ``"lipmish"``).
        lipschitz: c in (0, 1): a residual map's slope stays above 1 − c.
        conditional_scale: Whether parents act on the log-scale of each block directly.
        conditioner_units: The hidden units, for each distinct set of parents, of the masked network through which
            parents act nonlinearly on shifts, scales and hidden units; 0 leaves the linear maps alone. By default 32,
            and 0 in a graphical flow (where it acts on the affine map).
        conditioner_layers: The number of its hidden layers.
        init: ``"regression"`` (see :mod:`~pyro_graphflows.guides.start`) or ``"random"``.
        standardize: Whether inputs and outputs are shifted and scaled by constants found at set-up.
        num_start_samples: The number of joint samples of the model that are drawn at set-up.
        solver: How to invert numerically (:class:`~pyro_graphflows.transforms.solver.Solver`).
        **options: See :class:`~pyro_graphflows.guides.base.AutoFaithfulGuide`.

    Raises:
        GraphflowsError: If ``flow`` or ``closed_form`` is unknown, or ``num_blocks`` is not positive.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z.exp(), 1.0), obs=x)
        >>> guide = AutoFaithfulFlow(model).setup(torch.zeros(10))
        >>> guide(torch.zeros(7))["z"].shape
        torch.Size([7])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        flow: str = "faithful",
        num_blocks: int | None = None,
        units_per_variable: int = 16,
        hidden_layers: int = 1,
        hidden_dims: Sequence[int] | None = None,
        closed_form: str = "sampling",
        activation: str | nn.Module | None = None,
        lipschitz: float = 0.97,
        conditional_scale: bool = True,
        conditioner_units: int | None = None,
        conditioner_layers: int = 2,
        init: str = "regression",
        standardize: bool = True,
        num_start_samples: int = 10_000,
        solver: Any = None,
        **options: Any,
    ) -> None:
        if flow not in ("faithful", "graphical"):
            raise GraphflowsError(f"Expected flow='faithful' or 'graphical'; got {flow!r}.")
        if closed_form not in ("sampling", "density"):
            raise GraphflowsError(f"Expected closed_form 'sampling' or 'density'; got {closed_form!r}.")
        if num_blocks is not None and num_blocks < 1:
            raise GraphflowsError(f"Expected num_blocks >= 1 or None; got {num_blocks}.")
        super().__init__(
            model, init=init, standardize=standardize, num_start_samples=num_start_samples, **options
        )
        graphical = flow == "graphical"
        if activation is None:
            activation = "lipmish" if graphical else "elu"
        if conditioner_units is None:
            conditioner_units = 0 if graphical else 32
        self._flow_options = FlowOptions(
            num_blocks,
            units_per_variable,
            hidden_layers,
            None if hidden_dims is None else tuple(hidden_dims),
            closed_form,
            {
                "activation": activation,
                "lipschitz": lipschitz,
                "conditional_scale": conditional_scale,
                "conditioner_units": conditioner_units,
                "conditioner_layers": conditioner_layers,
                "solver": solver,
            },
            graphical,
        )

    def _check_plan(self, plan: Plan, traced: TracedModel) -> None:
        super()._check_plan(plan, traced)
        plan.analytic_kl.update(dict.fromkeys(plan.analytic_kl, False))

    def _plan_pools(self, inverse: InverseGraph, traced: TracedModel, unlike: Unlike) -> PoolPlan:
        pooling = super()._plan_pools(inverse, traced, unlike)
        self._with_maps = frozenset(
            site for site in pooling.free | set(pooling.unlike) if inverse.graph.plates[site]
        )
        return pooling

    def _block_kind(self, site: str) -> Hashable:
        # A flow's inputs are known before its first level: maps of their own see all parents from another block.
        alone = site if site in self._with_maps else None
        return super()._block_kind(site), self._has_no_flow(site), alone

    def _has_no_flow(self, site: str) -> bool:
        """Whether a site has a masked network: it is discrete, drawn jointly, or the user gave a factor."""
        discrete = self._sites[site].encoding is not None
        return discrete or site in self._factors or site in self._pool_plan.chained

    def _make_network(
        self, block: Block, context_sizes: Mapping[str, int], plates: Sequence[PlateState]
    ) -> nn.Module:
        if self._has_no_flow(block.sites[0]):
            return super()._make_network(block, context_sizes, plates)
        sizes = {site: self._sites[site].size for site in block.sites}
        elements = self._elements.parents if self._elements else {}
        return FlowBlock(block, context_sizes, sizes, self._flow_options, plates, elements)
