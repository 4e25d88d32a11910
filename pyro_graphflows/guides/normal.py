"""The normal family: a masked network per block gives location and scale of every conditional."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides.base import AutoFaithfulGuide, concatenate
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.coupled import CoupledFactor
from pyro_graphflows.guides.coupled_start import start_chains_
from pyro_graphflows.guides.discrete_factors import DiscreteFactor
from pyro_graphflows.guides.factors import ElementNormalFactor, Factor, NormalFactor
from pyro_graphflows.guides.features import FeatureMap, flatten_event
from pyro_graphflows.guides.index_start import regress_indices_
from pyro_graphflows.guides.made import MADEBlock, NetworkOptions
from pyro_graphflows.guides.plan import Block, Plan
from pyro_graphflows.guides.pool_plan import Summary
from pyro_graphflows.guides.pooling import (
    AllElements,
    DeepSet,
    DeepSetPool,
    LookUp,
    PoolMember,
    pooling_orders,
)
from pyro_graphflows.guides.start import block_loss, regress_, standardize_
from pyro_graphflows.inspect import TracedModel, get_argument, sample_prior

__all__ = ["AutoFaithfulNormal"]

MOST_ROWS = 200_000  # in the block with the most elements, for a joint sample
MOST_POOLED_ROWS = 500_000  # the same where plates are pooled: a whole data set is one sample
TIE = 0.01  # nats by which the regression start may seem worse; without parents both starts are alike
FREE_SCALE = 0.1  # sites with free parameters start at their prior, this much narrower
HELD_OUT = 5  # one in this many samples judges the regression start


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
        if init == "regression" and not skip:
            raise GraphflowsError(
                "Expected skip=True with init='regression', which sets the linear maps; got False."
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

    def _build(self, plan: Plan, traced: TracedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {
            name: self._reader.input_value(
                name, get_argument(self.model, traced.argument_paths[name], args, kwargs)
            )
            for name in traced.event_dims
        }
        samples = self._joint_samples(traced, inputs, args, kwargs)
        found: list[Any] = [site.get("value") for site in traced.trace.nodes.values()]
        floats = [value for value in found if _is_float(value)]
        like = max(
            floats, key=lambda value: value.dtype.itemsize, default=torch.zeros(())
        )  # the first of the widest
        features, pools, networks = [], [], []
        for index, block in enumerate(plan.blocks):
            summaries = {
                str(self._context[index].index(node.name)): self._make_pool(
                    node.summary, traced, inputs, samples, like, args, kwargs
                )
                for node in block.context
                if node.summary
            }
            pools.append(nn.ModuleDict(summaries))
            rows = self._rows(index, block, samples)
            maps = [
                self._summary_map(summaries[str(i)], name, traced, rows)
                if str(i) in summaries
                else self._feature_map(name, traced, inputs, rows)
                for i, name in enumerate(self._context[index])
            ]
            sizes = {n: len(m.shift) for n, m in zip(self._context[index], maps, strict=True)}
            known = replace(block, context=tuple(node for node in block.context if node.name in sizes))
            plates = [self._plate_states[name] for name in block.plates]
            network: Any = self._make_network(known, sizes, plates).to(like.device, like.dtype)
            feature = FeatureMap.join(maps).to(like.device, like.dtype)
            kept = False
            if rows is not None:
                latents = {site: rows[site] for site in block.sites}
                if self._standardize:
                    standardize_(
                        network, latents, [s for s in latents if self._sites[s].encoding is not None]
                    )
                if self._init == "regression":
                    context = feature(concatenate([rows[name] for name in self._context[index]]))
                    kept = self._start_by_regression(network, context, latents)
                    if kept and block.unlike and samples is not None:
                        self._start_indices(index, network, feature, samples)
                    if kept and block.chained and samples is not None:
                        start_chains_(
                            network, self._plate_states, *self._aligned(index, network, feature, samples)
                        )
            if block.chained and not kept:
                start_chains_(network, self._plate_states)
            if self._init == "regression":
                network.narrow_free_(FREE_SCALE)
            features.append(feature)
            networks.append(network)
        self.features = nn.ModuleList(features)
        self.pools = nn.ModuleList(pools)
        self.networks = nn.ModuleList(networks)

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

    @torch.no_grad()
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
            GraphflowsError: If the site or a parent is unknown.
        """
        index = next((i for i, block in enumerate(self.plan.blocks) if site in block.parents), None)
        if index is None:
            raise GraphflowsError(f"Expected a latent site; got {site!r}.")
        known = {*self.plan.inverse.parents[site], *self._context[index]}
        unknown = [parent for parent in weights if parent not in known]
        if unknown:
            raise GraphflowsError(f"Expected parents of {site} in the inverse; got {', '.join(unknown)}.")
        network: Any = self.networks[index]
        feature: Any = self.features[index]
        shift, width = network.standardization(site)
        loc = torch.as_tensor(intercept, dtype=shift.dtype).expand(len(shift)) - shift
        standard: dict[str, Tensor] = {}
        pooled: set[str] = set()
        direct = set(network.block.parents[site])
        start = 0
        pools: Any = self.pools[index]
        for position, name in enumerate(self._context[index]):
            stop = start + len(network.columns[name])
            if str(position) in pools and name in network.block.parents[site]:
                pool = pools[str(position)]
                standard[name] = loc.new_zeros(len(shift), stop - start)
                mine = weights.get(name, weights)
                for member in pool.members:
                    if member.name not in mine or (mine is weights and member.name in direct | pooled):
                        continue
                    columns, centre, spread = pool.columns_of(member.name)
                    at = [start + column for column in columns]
                    matrix = torch.as_tensor(mine[member.name], dtype=shift.dtype)
                    matrix = matrix.reshape(len(shift), len(columns))
                    loc = loc + matrix @ (centre + spread * feature.shift[at])
                    standard[name][:, columns] = matrix * spread * feature.scale[at] / width.unsqueeze(-1)
                    pooled.add(member.name)
                pooled.add(name)
            elif name in weights:
                matrix = torch.as_tensor(weights[name], dtype=shift.dtype).reshape(len(shift), stop - start)
                loc = loc + matrix @ feature.shift[start:stop]
                standard[name] = matrix * feature.scale[start:stop] / width.unsqueeze(-1)
            start = stop
        for name in weights:
            if name not in standard and name not in pooled:
                parent_shift, parent_width = network.standardization(name)
                matrix = torch.as_tensor(weights[name], dtype=shift.dtype).reshape(
                    len(shift), len(parent_shift)
                )
                loc = loc + matrix @ parent_shift
                standard[name] = matrix * parent_width / width.unsqueeze(-1)
        tril = torch.as_tensor(scale, dtype=shift.dtype)
        tril = tril if tril.dim() == 2 else tril.expand(len(shift)).diag_embed()
        network.set_linear_(site, standard, loc / width, tril / width.unsqueeze(-1))

    # ---------------------------------------------------------------- joint samples at set-up

    def _joint_samples(
        self, traced: TracedModel, inputs: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor] | None:
        """Draw the model's joint samples, flat and unconstrained where latent; None where there are none."""
        if not self._standardize and self._init == "random":
            return None
        if self._changing:
            named = ", ".join(self._changing)
            self._notes += (f"no regression start: the supports of {named} depend on other latent sites.",)
            return None
        draws = self._number_of_draws()
        try:
            samples = sample_prior(self.model, args, kwargs, num_samples=draws, traced=traced)
        except UnsupportedModelError as error:
            self._notes += (f"no regression start and no standardisation of latents: {error}",)
            return None
        flat = {}
        for name, site in self._sites.items():
            if site.encoding is not None:
                flat[name] = site.encoding.encode(samples[name], torch.get_default_dtype())
                continue
            raw = biject_to(site.support).inv(samples[name])
            flat[name] = flatten_event(raw, len(site.unconstrained_shape))
        for name, event_dim in self._event_dims.items():
            if name in samples:
                value = self._conditioning(name, samples[name], traced)
                flat[name] = self._reader.flat(name, value, event_dim)
            else:
                value = inputs[name]
                flat[name] = flatten_event(value, event_dim).expand(
                    draws, *value.shape[: value.dim() - event_dim], -1
                )
        return flat

    def _conditioning(self, name: str, value: Tensor, traced: TracedModel) -> Tensor:
        if name not in self._reader.partly:
            return value
        nodes: Any = traced.trace.nodes
        return self._reader.masked_value(name, value, nodes[name]["mask"])

    # ---------------------------------------------------------------- summaries of inner plates

    def _make_pool(
        self,
        summary: Summary,
        traced: TracedModel,
        inputs: Mapping[str, Tensor],
        samples: dict[str, Tensor] | None,
        like: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> DeepSetPool | AllElements | LookUp:
        """Return the summary of some nodes, standardised; add its values to the joint samples."""
        plates = {name: frozenset(around) for name, around in traced.graph.plates.items()}
        maps = [self._member_map(name, traced, inputs, samples) for name in summary.members]
        members = [
            PoolMember(name, len(m.shift), plates[name], name in self._reader.partly, name not in inputs)
            for name, m in zip(summary.members, maps, strict=True)
        ]
        pool: DeepSetPool | AllElements | LookUp
        if summary.index is not None and summary.inner is not None:
            outer, inner = self._plate_states[summary.over[0]], self._plate_states[summary.inner]
            pool = LookUp(members[0], maps[0], summary.index, outer, inner)
        elif summary.one_by_one:
            pool = AllElements(members, maps, [self._plate_states[name] for name in summary.over])
        else:
            orders = pooling_orders(summary.over, list(plates.values()))
            pool = DeepSetPool(members, maps, orders, self._pool or DeepSet())
        pool = pool.to(like.device, like.dtype)
        if samples is not None:
            depth = max(-self._plate_states[plate].dim for plate in summary.over)
            depth = max(depth, *(samples[name].dim() - 2 for name in summary.members))
            if summary.inner is not None:
                depth = max(depth, -self._plate_states[summary.inner].dim)
            values = {name: _with_depth(samples[name], depth) for name in summary.members}
            if summary.index is not None:
                path = traced.argument_paths[summary.index]
                values[summary.index] = get_argument(self.model, path, args, kwargs)
            samples[summary.name] = pool.of_samples(values, self._plate_states, fit=self._standardize)
        return pool

    def _member_map(
        self,
        name: str,
        traced: TracedModel,
        inputs: Mapping[str, Tensor],
        samples: Mapping[str, Tensor] | None,
    ) -> FeatureMap:
        """Return the map of a node that is pooled; of a partly observed one, without the column of the mask."""
        if name not in self._reader.partly:
            rows = None if samples is None else {name: samples[name].flatten(0, -2)}
            return self._feature_map(name, traced, inputs, rows)
        nodes: Any = traced.trace.nodes
        value = self._conditioning(name, nodes[name]["value"], traced) if samples is None else samples[name]
        flat = value.flatten(0, -2)
        return FeatureMap(None, flat[flat[:, -1] > 0, :-1], self._standardize)

    def _number_of_draws(self) -> int:
        """Enough joint samples that each block has its rows, and not so many that the largest block fills memory."""
        copies = []
        for block in self.plan.blocks:
            copies.append(1)
            for name in block.plates:
                copies[-1] *= self._plate_states[name].size
        wanted = -(-self._num_start_samples // min(copies))
        if any(block.unlike for block in self.plan.blocks):  # a regression for each index
            wanted = max(wanted, self._num_start_samples // 10)
        if any(node.summary for block in self.plan.blocks for node in block.context):
            elements = 1
            for plate in self._plate_states.values():
                elements *= plate.size
            return max(2, min(wanted, -(-MOST_POOLED_ROWS // elements)))
        affordable = -(-MOST_ROWS // max(copies))
        return max(2, min(wanted, affordable))

    def _rows(self, index: int, block: Block, samples: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Return one row for each draw and each element of the block's plates, for all its sites and context."""
        if samples is None:
            return None
        names = [*block.sites, *self._context[index]]
        depth = max(samples[name].dim() for name in names)
        aligned = {}
        for name in names:
            value = samples[name]
            missing = depth - value.dim()
            aligned[name] = value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])
        shape = torch.broadcast_shapes(*(value.shape[:-1] for value in aligned.values()))
        rows = {
            name: value.expand(*shape, value.shape[-1]).reshape(-1, value.shape[-1])
            for name, value in aligned.items()
        }
        if shape.numel() <= 2 * self._num_start_samples:
            return rows
        chosen = torch.randperm(shape.numel())[: self._num_start_samples]
        return {name: value[chosen] for name, value in rows.items()}

    def _feature_map(
        self,
        name: str,
        traced: TracedModel,
        inputs: Mapping[str, Tensor],
        rows: Mapping[str, Tensor] | None,
    ) -> FeatureMap:
        nodes: Any = traced.trace.nodes
        support = None
        if name in self._sites:
            discrete = self._sites[name].encoding is not None
            if rows is None or discrete:
                standardize = self._standardize and not discrete
                return FeatureMap(None, torch.zeros(0, self._sites[name].size), standardize)
        elif name not in inputs and name not in self._reader.partly:
            support = nodes[name]["fn"].support
        if rows is None:  # the data of this call are all that is known
            value = inputs[name] if name in inputs else nodes[name]["value"]
            value = self._conditioning(name, value, traced)
            flat = self._reader.flat(name, value, self._event_dims[name])
            return FeatureMap(support, flat.reshape(-1, flat.shape[-1]), self._standardize)
        return FeatureMap(support, rows[name], self._standardize)

    def _summary_map(
        self,
        pool: DeepSetPool | AllElements | LookUp,
        name: str,
        traced: TracedModel,
        rows: Mapping[str, Tensor] | None,
    ) -> FeatureMap:
        if rows is not None:
            return FeatureMap(None, rows[name], self._standardize)
        return FeatureMap(None, torch.zeros(0, pool.num_features), self._standardize)

    def _start_by_regression(self, network: MADEBlock, context: Tensor, values: dict[str, Tensor]) -> bool:
        """Set the factors by regression, and go back if held-out samples like the random start better."""
        held_out = slice(0, None, HELD_OUT)
        test = {site: value[held_out] for site, value in values.items()}
        rest = torch.arange(len(next(iter(values.values())))) % HELD_OUT != 0
        fitted = {site: value[rest] for site, value in values.items()}
        random_state = {key: value.clone() for key, value in network.state_dict().items()}
        random_loss = block_loss(network, context[held_out], test)
        regress_(network, context[rest] if context.shape[-1] else context, fitted)
        loss = block_loss(network, context[held_out], test)
        if not (loss <= random_loss + TIE or (random_loss != random_loss and loss == loss)):
            network.load_state_dict(random_state)
            self._notes += (
                f"the random start was kept for {', '.join(network.block.sites)}: its loss on prior samples is "
                f"{random_loss:.3g} nats, that of the regression start {loss:.3g}.",
            )
            return False
        regress_(network, context, values)
        return True

    def _start_indices(
        self, index: int, network: Any, feature: FeatureMap, samples: Mapping[str, Tensor]
    ) -> None:
        """Start the maps that elements of a plate have of their own."""
        block = network.block
        context, aligned = self._aligned(index, network, feature, samples)
        for site in block.unlike:
            if site in block.free:
                continue
            if not regress_indices_(network, site, self._plate_states, context, aligned):
                self._notes += (
                    f"the maps of the indices of {', '.join(block.unlike[site])} for {site} start at one that is "
                    "shared: no regression of each was possible.",
                )

    def _aligned(
        self, index: int, network: Any, feature: FeatureMap, samples: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the features of a block's context and its sites' values in joint samples, plates apart."""
        names = [*self._context[index], *network.block.sites]
        depth = max(samples[name].dim() for name in names) - 2
        aligned = {name: _with_depth(samples[name], depth) for name in names}
        context = feature(concatenate([aligned[name] for name in self._context[index]]))
        return context, {site: aligned[site] for site in network.block.sites}


def _with_depth(value: Tensor, depth: int) -> Tensor:
    """Put dimensions of size one behind the first, of the draws, so that all values have ``depth`` others."""
    missing = depth + 2 - value.dim()
    return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point() and value.numel() > 0
