"""The normal family: a masked network per block gives location and scale of every conditional."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides.base import AutoFaithfulGuide
from pyro_graphflows.guides.block_start import start_block_
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.coupled import CoupledFactor
from pyro_graphflows.guides.discrete_factors import DiscreteFactor
from pyro_graphflows.guides.factors import ElementNormalFactor, Factor, NormalFactor
from pyro_graphflows.guides.features import FeatureMap
from pyro_graphflows.guides.joint_samples import JointSamples
from pyro_graphflows.guides.linear import make_linear_
from pyro_graphflows.guides.made import MADEBlock, NetworkOptions
from pyro_graphflows.guides.plan import Block, Plan
from pyro_graphflows.guides.pooling import DeepSet
from pyro_graphflows.guides.set_up import SetUp, number_of_draws

__all__ = ["AutoFaithfulNormal"]


class AutoFaithfulNormal(AutoFaithfulGuide):
    r"""A faithful guide with normal conditionals whose parameters come from masked networks (MADE).

    In unconstrained space, ``q(z_v | parents) = Normal(loc_v(parents), scale_v(parents))``, with a full covariance
    within vector sites; values are pushed to the supports of the sites.

    References:
        [1] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.
        [2] Germain et al. (2015), MADE: Masked Autoencoder for Distribution Estimation.

    Args:
        model: The model.
        inverse: What the sites are conditioned on; see :func:`~pyro_graphflows.auto_faithful_guide`.
        hidden_dims: Widths of the hidden layers; None for ``units_per_set`` units for each distinct set of parents.
        units_per_set: See ``hidden_dims``.
        hidden_layers: The number of hidden layers where ``hidden_dims`` is None.
        activation: ``"elu"``, ``"relu"``, ``"tanh"`` ...
        skip: Whether a linear map from the parents runs beside the hidden layers.
        init: ``"regression"`` (see :mod:`~pyro_graphflows.guides.start`) or ``"random"``.
        standardize: Whether inputs and outputs are shifted and scaled by constants found at set-up.
        num_start_samples: The number of joint samples of the model that are drawn at set-up.
        factor: The factor family of the continuous sites. Discrete ones have Bernoulli and categorical factors.
        factors: Factor classes of single sites, by name.
        **options: See :class:`~pyro_graphflows.guides.base.AutoFaithfulGuide`.

    Raises:
        GraphflowsError: If ``init`` is unknown, the regression start has no linear maps to set (``skip=False``), or
            ``factors`` has something else than subclasses of :class:`~pyro_graphflows.guides.factors.Factor`.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = AutoFaithfulNormal(model, hidden_dims=[]).setup(torch.zeros(10))
        >>> guide.median(torch.zeros(7))["z"].shape
        torch.Size([7])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        hidden_dims: Any = None,
        units_per_set: int = 16,
        hidden_layers: int = 1,
        activation: str = "elu",
        skip: bool = True,
        init: str = "regression",
        standardize: bool = True,
        num_start_samples: int = 10_000,
        factor: type[Factor] = NormalFactor,
        factors: Mapping[str, type[Factor]] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        if init not in ("regression", "random"):
            raise GraphflowsError(f"Expected init='regression' or 'random'; got {init!r}.")
        if num_start_samples < 1:
            raise GraphflowsError(f"Expected num_start_samples >= 1; got {num_start_samples}.")
        if isinstance(hidden_dims, int):
            raise GraphflowsError(
                f"Expected hidden_dims a sequence of widths, [{hidden_dims}]; got {hidden_dims}."
            )
        if init == "regression" and not skip:
            raise GraphflowsError(
                "Expected skip=True with init='regression', which sets the linear maps; got False."
            )
        for name, kind in factors.items():
            if not (isinstance(kind, type) and issubclass(kind, Factor)):
                raise GraphflowsError(
                    f"Expected factors={{site: subclass of Factor}}; got {kind!r} for {name!r}."
                )
        super().__init__(model, **options)
        self._network_options = NetworkOptions(hidden_dims, units_per_set, hidden_layers, activation, skip)
        self._init = init
        self._standardize = standardize
        self._num_start_samples = num_start_samples
        self._factor = factor
        self._factors = dict(factors)

    @property
    def _custom_sites(self) -> Collection[str]:
        return self._factors

    def _build(self, plan: Plan, joint: JointSamples) -> None:
        strange = [name for name in self._factors if name not in self._sites]
        if strange:
            raise GraphflowsError(
                f"Expected factors= of latent sites, {', '.join(self._sites)}; got {', '.join(strange)}."
            )
        set_up = SetUp(joint, self._plate_states, standardize=self._standardize)
        self._draw_joint_samples(set_up)
        features, pools, networks = [], [], []
        for index, block in enumerate(plan.blocks):
            context = self._context[index]
            summaries = {
                str(context.index(node.name)): set_up.make_pool(node.summary, self._pool or DeepSet())
                for node in block.context
                if node.summary
            }
            rows = set_up.rows([*block.sites, *context], self._num_start_samples)
            maps = [
                set_up.summary_map(summaries[str(i)], name, rows)
                if str(i) in summaries
                else set_up.feature_map(name, rows)
                for i, name in enumerate(context)
            ]
            sizes = {name: len(m.shift) for name, m in zip(context, maps, strict=True)}
            known = replace(block, context=tuple(node for node in block.context if node.name in sizes))
            plates = [self._plate_states[name] for name in block.plates]
            like = set_up.like
            network: Any = self._make_network(known, sizes, plates).to(like.device, like.dtype)
            feature = FeatureMap.join(maps).to(like.device, like.dtype)
            notes = start_block_(
                network, feature, context, rows, set_up, regression=self._init == "regression"
            )
            self._notes += tuple(notes)
            features.append(feature)
            pools.append(nn.ModuleDict(summaries))
            networks.append(network)
        self.features = nn.ModuleList(features)
        self.pools = nn.ModuleList(pools)
        self.networks = nn.ModuleList(networks)

    @property
    def _rows_to_start(self) -> int:
        return self._num_start_samples if self._standardize or self._init != "random" else 0

    def _draw_joint_samples(self, set_up: SetUp) -> None:
        """Draw joint samples of the model, or say why there are none."""
        if not self._rows_to_start:
            return
        if self._changing:
            named = ", ".join(self._changing)
            self._notes += (f"no regression start: the supports of {named} depend on other latent sites.",)
            return
        try:
            set_up.draw(number_of_draws(self.plan.blocks, self._plate_states, self._num_start_samples))
        except UnsupportedModelError as error:
            self._notes += (f"no regression start and no standardisation of latents: {error}",)

    def _chainable_sites(self) -> dict[str, int]:
        split = {} if self._elements is None else self._elements.parents
        return {
            name: site.size
            for name, site in self._sites.items()
            if self._factor is NormalFactor
            and site.encoding is None
            and name not in self._factors
            and name not in split
        }

    def _factor_of(self, site: str) -> Factor:
        for block in self.plan.blocks:
            if site in block.chained:
                return CoupledFactor(self._sites[site].size, block.chained[site].rank)
        if site in self._factors:
            return self._factors[site].for_site(self._sites[site])
        if self._sites[site].encoding is not None:
            return DiscreteFactor.for_site(self._sites[site])
        if self._elements is None or site not in self._elements.parents:
            return self._factor.for_site(self._sites[site])
        if self._factor is not NormalFactor:
            raise GraphflowsError("Expected the normal factor with resolution='element'; got another family.")
        parents = self._elements.parents[site]
        return ElementNormalFactor([[j for name, j in element if name == site] for element in parents])

    def _make_network(
        self, block: Block, context_sizes: Mapping[str, int], plates: Sequence[PlateState]
    ) -> nn.Module:
        """Return the network of a block."""
        factors = {site: self._factor_of(site) for site in block.sites}
        elements = self._elements.parents if self._elements else {}
        return MADEBlock(block, context_sizes, factors, self._network_options, plates, elements)

    def set_linear_(
        self,
        site: str,
        weights: Mapping[str, Any],
        intercept: Tensor | float,
        scale: Tensor | float = 1.0,
    ) -> None:
        r"""Make one site's conditional linear-Gaussian, in the units of the data and of unconstrained latents.

        ``u_site | parents ~ Normal(intercept + sum_p weights[p] @ u_p, scale)``; the hidden layers' outputs for the
        site are set to zero. With the exact posterior conditionals the guide is the exact posterior. Of a discrete
        site these are the logits, without a scale. The vector of a binary value is the value itself, that of one among
        ``K`` classes its ``K`` indicators, as a site and as a parent.

        Args:
            site: A latent site.
            weights: For each parent a matrix of shape ``(site's size, parent's size)`` (a number for scalars);
                parents that are missing get zero. A pooled parent counts by its mean over the plates; one whose
                elements come in one by one has a column for each. Of a parent that comes in both by itself and in a
                summary, the second is set by the name of the summary and a dict
                (``{"x": 0.8, "pooled(x; data)": {"x": 0.1}}``).
            intercept: The location where all parents are zero, shape ``(size,)``.
            scale: The scale, or a lower triangular square root of the covariance, shape ``(size, size)``.

        Raises:
            GraphflowsError: If the site or a parent is unknown, weights have another shape or the scale is not
                positive.
        """
        index = next((i for i, block in enumerate(self.plan.blocks) if site in block.parents), None)
        if index is None:
            raise GraphflowsError(
                f"Expected a latent site, one of {', '.join(map(str, self.plan.graph.latent))}; got {site!r}."
            )
        context = self._context[index]
        known = {*self.plan.inverse.parents[site], *context}
        unknown = [parent for parent in weights if parent not in known]
        if unknown:
            raise GraphflowsError(
                f"Expected weights of the parents of {site!r} in the inverse "
                f"({', '.join(map(str, self.plan.inverse.parents[site])) or 'there are none'}); got "
                f"{', '.join(unknown)}."
            )
        feature: Any = self.features[index]
        make_linear_(
            self.networks[index], feature, self.pools[index], context, site, weights, intercept, scale
        )
