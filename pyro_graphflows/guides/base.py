"""The base of the faithful guides: an AutoGuide whose factors follow an inverse of the model's graph."""

import copy
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.inversion import (
    faithful_inverse,
    fully_connected_inverse,
    mean_field_inverse,
    stochastic_inverse,
)
from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.graphs.separation import violated_independencies
from pyro_graphflows.guides.call import Call, CallReader, changing_supports, plates_of
from pyro_graphflows.guides.discrete import DiscreteDistribution
from pyro_graphflows.guides.distributions import FactorDistribution, SampledNormal, ScalarNormal
from pyro_graphflows.guides.elements import ElementInverse, invert_elements
from pyro_graphflows.guides.exchange import Unlike, sites_concerned
from pyro_graphflows.guides.features import FeatureMap
from pyro_graphflows.guides.ordering import (
    discrete_sites_first,
    drawn_after_enumerated,
    outer_sites_first,
    require_outer_sites_first,
)
from pyro_graphflows.guides.plan import Plan, make_plan
from pyro_graphflows.guides.pool_plan import PoolOptions, PoolPlan, plan_pools
from pyro_graphflows.guides.pooling import DeepSet, LookUp
from pyro_graphflows.guides.site import (
    LatentSite,
    conditioning_event_dims,
    is_identity,
    latent_sites,
    observed_encodings,
)
from pyro_graphflows.inspect import (
    TracedModel,
    get_argument,
    nested_by_index,
    non_exchangeable_plates,
    trace_model,
    with_nested_plates,
)

__all__ = ["AutoFaithfulGuide", "Description", "resolve_inverse"]

NAMED_INVERSES: dict[str, Callable[[ModelGraph], InverseGraph]] = {
    "stochastic": stochastic_inverse,
    "full": fully_connected_inverse,
    "mean_field": mean_field_inverse,
}

Inverse = str | Sequence[str] | InverseGraph | Callable[[ModelGraph], InverseGraph]


class Description(str):
    """Text that prints itself at the interactive prompt."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def resolve_inverse(graph: ModelGraph, inverse: Inverse) -> InverseGraph:
    """Return the inverse that a user asked for.

    Args:
        graph: The model graph.
        inverse: The name of an elimination order of :func:`~pyro_graphflows.faithful_inverse`, an elimination
            sequence, ``"stochastic"``, ``"full"``, ``"mean_field"``, an inverse, or a function that makes one.

    Raises:
        GraphflowsError: If the inverse is not of the model's latent nodes or is of another type.
    """
    if isinstance(inverse, str):
        return (
            NAMED_INVERSES[inverse](graph) if inverse in NAMED_INVERSES else faithful_inverse(graph, inverse)
        )
    if callable(inverse):
        inverse = inverse(graph)
    if isinstance(inverse, InverseGraph):
        if set(inverse.parents) != set(graph.latent):
            raise GraphflowsError(
                f"Expected an inverse of the model's latent sites {', '.join(map(str, graph.latent))}; "
                f"got one of {', '.join(map(str, inverse.parents))}."
            )
        if inverse.graph == graph:
            return inverse
        return InverseGraph(
            graph,
            inverse.parents,
            order=inverse.order,
            sampling_order=inverse.sampling_order,
            coupled=inverse.coupled,
        )
    if isinstance(inverse, Sequence):
        return faithful_inverse(graph, inverse)
    raise GraphflowsError(
        "Expected inverse= the name of an order, a sequence of latent sites, an InverseGraph or a function from "
        f"ModelGraph to InverseGraph; got {type(inverse).__name__}."
    )


class AutoFaithfulGuide(AutoGuide):
    """A guide whose factors follow an inverse of the model's Bayesian network; subclasses choose the family.

    The guide is compiled on its first call or by :meth:`setup`: the model's trace becomes a graph, the graph is
    inverted, and the inverse becomes blocks of sites with a network each
    (:mod:`~pyro_graphflows.guides.plan`). Called with the model's arguments, it reads the observed values and
    samples every latent site on its own name, in the model's plates, level by level.

    Args:
        model: The model.
        inverse: See :func:`resolve_inverse`.
        strict: Whether to refuse models whose dependencies cannot be traced in full
            (:func:`~pyro_graphflows.get_model_graph`).
        resolution: ``"site"``, or ``"element"`` to tell the elements of vector sites apart
            (:func:`~pyro_graphflows.get_model_graph`).
        pool: How data in inner plates reach the sites outside of them: ``"deepset"`` (or a
            :class:`~pyro_graphflows.guides.pooling.DeepSet` that sets its sizes) summarises them, so that these
            sites are amortised too, over data sets of any size; None gives these sites free parameters, which
            fit one data set.
        chain_rank: Of latents that stay dependent across a plate (:mod:`~pyro_graphflows.guides.coupled`): the rank of
            the dependence, 0 for a parameter for each pair of elements; None to choose by the size of the plate.
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`: a function of the model's arguments
            that returns plates that exist already, for subsampling.
        enumerate_sites: Discrete sites that the guide marks ``infer={"enumerate": "parallel"}``, so that
            ``TraceEnum_ELBO`` sums over their values instead of drawing them: their names, or True for all. Every
            latent site then has a network of its own, so that each only meets the values of its own parents.

    Raises:
        GraphflowsError: If ``pool`` or ``chain_rank`` is something else.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        inverse: Inverse = "auto",
        strict: bool = True,
        resolution: str = "site",
        pool: str | DeepSet | None = None,
        chain_rank: int | None = None,
        create_plates: Callable[..., Any] | None = None,
        enumerate_sites: bool | Collection[str] = False,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        self._enumerate_option = enumerate_sites
        self._enumerated: frozenset[str] = frozenset()
        if pool not in (None, "deepset") and not isinstance(pool, DeepSet):
            raise GraphflowsError(f"Expected pool='deepset', a DeepSet or None; got {pool!r}.")
        if chain_rank is not None and chain_rank < 0:
            raise GraphflowsError(f"Expected chain_rank >= 0 or None; got {chain_rank}.")
        self._pool = DeepSet() if isinstance(pool, str) else pool
        self._chain_rank = chain_rank
        self._inverse_option = inverse
        self._strict = strict
        self._resolution = resolution
        self._plan: Plan | None = None
        self._nested_inverse: InverseGraph | None = None
        self._lookups: dict[tuple[str, str], str] = {}
        self._notes: tuple[str, ...] = ()
        self._emit: Callable[..., Tensor] = pyro.sample
        self.features: nn.ModuleList
        self.pools: nn.ModuleList  # for each block, its summaries by the position in its context
        self.networks: nn.ModuleList

    # ---------------------------------------------------------------- compilation

    def setup(self, *args: Any, **kwargs: Any) -> "AutoFaithfulGuide":
        """Compile the guide with the arguments of a typical call, and create its parameters.

        Args:
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model.

        Returns:
            The guide itself.

        Raises:
            UnsupportedModelError: If the model's structure cannot be traced, or the guide cannot represent it.
        """
        with poutine.block():
            traced = trace_model(self.model, args, kwargs, strict=self._strict, resolution=self._resolution)
            self._elements: ElementInverse | None = None
            if self._resolution == "element":
                traced, self._elements = invert_elements(traced, lambda graph: self._resolve(graph, traced))
                inverse = self._elements.sites
            else:
                inverse = self._invert(traced, args, kwargs)
            self._sites = latent_sites(traced, self._custom_sites)
            rough = {name for name, site in self._sites.items() if site.encoding is not None}
            self._enumerated = self._sites_to_enumerate()
            if rough:
                inverse = self._order_for_discrete_sites(inverse, rough)
            self._plate_states = plates_of(traced.trace)
            self._event_dims = conditioning_event_dims(traced)
            unlike = sites_concerned(inverse, self._uneven_plates(traced, args, kwargs))
            plan = make_plan(inverse, self._block_kind, self._plan_pools(inverse, traced, unlike))
            require_outer_sites_first(plan, rough)
            self.prototype_trace = traced.trace
            self._prototype_frames = {
                frame.name: frame
                for name in traced.graph.latent
                for frame in traced.trace.nodes[name]["cond_indep_stack"]
                if frame.vectorized
            }
            # A KL is registered for normal factors, before any bijection.
            for name, site in self._sites.items():
                plan.analytic_kl[name] &= site.is_real and len(site.event_shape) < 2
                if site.encoding is not None:
                    how = "enumerated" if name in self._enumerated else "score function"
                    plan.labels[name] = f"{site.encoding}, {how}"
            self._check_plan(plan, traced)
            self._reader = CallReader(self.model, traced)
            self._reader.look_for_missing(self.model, args, kwargs)
            self._changing = self._changing_supports(plan, traced, args, kwargs)
            self._plan = plan
            self._reader.encodings = observed_encodings(traced)
            self._notes = tuple(traced.notes)
            self._context = [
                tuple(
                    node.name
                    for node in block.context
                    if not node.observed or node.summary or node.name in self._event_dims
                )
                for block in plan.blocks
            ]
            self._reader.keep_masks = any(node.summary for block in plan.blocks for node in block.context)
            self._build(plan, traced, args, kwargs)
        if self.master is not None:
            self.master()._check_prototype(prune_subsample_sites(self.prototype_trace))
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.setup(*args, **kwargs)

    def _invert(self, traced: TracedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InverseGraph:
        """Invert the model's graph; plates whose elements look up those of others count as nested in these."""
        nested = nested_by_index(self.model, args, kwargs, traced=traced)
        self._lookups = self._indices_of(nested, traced, args, kwargs)
        if not nested:
            return resolve_inverse(traced.graph, self._inverse_option)
        inverse = resolve_inverse(with_nested_plates(traced.graph, nested), self._inverse_option)
        self._nested_inverse = inverse
        around = traced.graph.plates
        coupled = {  # across plates that a site is in by its index alone: across those with the index
            site: [p for p in around[site] if p in plates or not set(plates) <= set(around[site])]
            for site, plates in inverse.coupled.items()
        }
        return InverseGraph(
            traced.graph,
            inverse.parents,
            order=inverse.order,
            sampling_order=inverse.sampling_order,
            coupled=coupled,
        )

    def _indices_of(
        self,
        nested: Mapping[str, Mapping[str, Tensor]],
        traced: TracedModel,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[tuple[str, str], str]:
        """Return for pairs (inner, outer) of plates the argument that says which element is looked up."""
        found = {}
        plates = plates_of(traced.trace)
        for inner, outers in nested.items():
            for outer, groups in outers.items():
                for name in sorted(traced.index_inputs):
                    value = (
                        get_argument(self.model, traced.argument_paths[name], args, kwargs).reshape(-1).cpu()
                    )
                    indices = plates[inner].indices
                    if indices is not None and len(value) == plates[inner].full_size:
                        value = value[indices.cpu()]
                    if value.shape == groups.shape and bool(((value == groups) | (groups < 0)).all()):
                        found[inner, outer] = name
                        break
        return found

    def _uneven_plates(
        self, traced: TracedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, tuple[str, ...]]:
        """Return the plates with unlike elements by site, from one run for each plate."""
        return non_exchangeable_plates(self.model, args, kwargs, traced=traced) if self._plate_states else {}

    def _plan_pools(self, inverse: InverseGraph, traced: TracedModel, unlike: Unlike) -> PoolPlan:
        return plan_pools(
            inverse,
            self._plate_states,
            self._event_dims,
            traced.index_inputs,
            PoolOptions(
                deepset=self._pool is not None,
                chained=self._chainable_sites(),
                rank=self._chain_rank,
                sizes={name: site.size for name, site in self._sites.items()},
                lookups=self._lookups,
            ),
            unlike,
        )

    def _chainable_sites(self) -> dict[str, int]:
        """Return the sizes of the sites that can have chain-rule terms across a plate."""
        return {}

    def _check_plan(self, plan: Plan, traced: TracedModel) -> None:
        indices: dict[str, list[str]] = {}
        for block in plan.blocks:
            for site in block.sites:
                used = {plan.looked_up.get((parent, site)) for parent in plan.inverse.parents[site]}
                for name in block.parents[site]:
                    # Sites with parameters for each element need no index beside what it looks up.
                    if name in traced.index_inputs and name not in used and site not in block.free:
                        indices.setdefault(name, []).append(site)
        if indices:
            named = "; ".join(f"{name} for {', '.join(sites)}" for name, sites in indices.items())
            raise UnsupportedModelError(
                f"Expected covariates of floating point; integers are taken as indices, and here the guide would "
                f"have to condition on some: {named}. Pass features of floating point (one-hot, an embedding)."
            )

    @property
    def _custom_sites(self) -> Collection[str]:
        """The sites with a factor of the user's own."""
        return ()

    def _block_kind(self, site: str) -> Hashable:
        """Return what the sites of one block must have in common, beside their plates."""
        return site if self._enumerate_option else None

    def _sites_to_enumerate(self) -> frozenset[str]:
        option = self._enumerate_option
        if isinstance(option, bool):
            names = (
                [name for name, site in self._sites.items() if site.encoding is not None] if option else []
            )
        else:
            names = list(option)
        for name in names:
            encoding = self._sites[name].encoding if name in self._sites else None
            if encoding is None or encoding.kind == "counts" or encoding.num_elements != 1:
                raise UnsupportedModelError(
                    f"Expected enumerate_sites to be latent sites with one binary or class variable; {name!r} is "
                    f"{'no discrete latent site' if encoding is None else encoding}. Pyro enumerates no vectors: give "
                    "each element a site of its own, or leave this site to score-function gradients."
                )
        return frozenset(names)

    def _resolve(self, graph: ModelGraph, traced: TracedModel) -> InverseGraph:
        """Return the inverse of a graph of sites that the user asked for, discrete sites first if it was ``auto``."""
        inverse = resolve_inverse(graph, self._inverse_option)
        if self._inverse_option != "auto":
            return inverse
        nodes: Any = traced.trace.nodes
        return discrete_sites_first(
            inverse, [name for name in graph.latent if nodes[name]["fn"].support.is_discrete]
        )

    def _order_for_discrete_sites(self, inverse: InverseGraph, discrete: Collection[str]) -> InverseGraph:
        """Return an inverse that suits discrete sites: another faithful one only if the user left the choice."""
        free = self._inverse_option == "auto" and self._elements is None
        candidates = [discrete_sites_first(inverse, discrete), inverse] if free else [inverse]
        if free and self._enumerated:
            candidates.append(faithful_inverse(inverse.graph, "reverse"))
        candidates = [outer_sites_first(candidate) for candidate in candidates]
        conflicts = [drawn_after_enumerated(candidate, self._enumerated) for candidate in candidates]
        for candidate, conflict in zip(candidates, conflicts, strict=True):
            if not conflict:
                return candidate
        named = "; ".join(f"{site}: {', '.join(parents)}" for site, parents in conflicts[0].items())
        raise UnsupportedModelError(
            "Expected the model's parents of enumerated sites to be sampled before these, or enumerated as well; the "
            f"inverse {inverse.order!r} samples some given the enumerated values ({named}), which Pyro cannot do. Use "
            "inverse='reverse', which follows the model's order, or enumerate_sites=True."
        )

    def _changing_supports(
        self, plan: Plan, traced: TracedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, tuple[str, ...]]:
        indices = {
            name: plate.indices for name, plate in self._plate_states.items() if plate.indices is not None
        }
        changing = changing_supports(self._reader, traced, self.model, args, kwargs, indices)
        for name, others in changing.items():
            encoding = self._sites[name].encoding
            if encoding is not None and encoding.kind == "classes":
                raise UnsupportedModelError(
                    f"Expected discrete latent sites with the same values at every call; those of {name!r} depend on "
                    f"{', '.join(others)}. Use a range that holds them all, with probability zero for some."
                )
        order = [site for block in plan.blocks for site in block.sites]
        for name, others in changing.items():
            late = [other for other in others if order.index(other) > order.index(name)]
            if late:
                raise UnsupportedModelError(
                    f"Expected {name!r} to be sampled after {', '.join(late)}, on which its support depends; the "
                    f"inverse {plan.inverse.order!r} samples it before. Use inverse='reverse', which follows the "
                    "model's order."
                )
        return changing

    def _build(self, plan: Plan, traced: TracedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Create ``self.features``, ``self.pools`` and ``self.networks``, one module a block each."""
        raise NotImplementedError("a family of guides must build its networks")

    @property
    def plan(self) -> Plan:
        """The compiled plan."""
        if self._plan is None:
            raise GraphflowsError(
                "Expected a guide that is set up; call guide.setup(*args) with the model's arguments."
            )
        return self._plan

    @property
    def model_graph(self) -> ModelGraph:
        """The graph that was read from the model: of sites, or of elements with ``resolution="element"``."""
        plan = self.plan
        return self._elements.inverse.graph if self._elements else plan.graph

    @property
    def inverse(self) -> InverseGraph:
        """The factorisation of the guide: over sites, or over elements with ``resolution="element"``."""
        plan = self.plan
        return self._elements.inverse if self._elements else plan.inverse

    def describe(self) -> Description:
        """Return the plan in words: what each latent site is conditioned on, and what is not faithful."""
        notes = list(self._notes)
        nested = self._nested_inverse
        missing = violated_independencies(
            *((self.inverse, self.model_graph) if nested is None else (nested,))
        )
        if missing:
            named = "; ".join(str(statement) for statement in list(missing)[:5])
            notes.append(
                f"not faithful: the inverse asserts {len(missing)} independencies that the posterior does not have, "
                f"among them {named}."
            )
        return Description(self.plan.describe(tuple(notes)))

    # ---------------------------------------------------------------- running

    def _read(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], observations: Mapping[str, Tensor] | None
    ) -> Call:
        """Read the call, and create its plates."""
        if self.master is not None:
            existing = self.master().plates
        elif self.create_plates is not None:
            plates = self.create_plates(*args, **kwargs)
            plates = [plates] if isinstance(plates, pyro.plate) else plates
            existing = {plate.name: plate for plate in plates}
        else:
            existing = {}
        indices = {
            name: plate._indices for name, plate in existing.items() if plate.subsample_size < plate.size
        }
        call = self._reader.read(self.model, args, kwargs, observations, indices)
        self.plates = dict(existing)
        for name, state in sorted(call.plates.items()):
            if name not in self.plates:
                if state.indices is None:
                    self.plates[name] = pyro.plate(name, state.full_size, dim=state.dim)
                else:
                    self.plates[name] = pyro.plate(
                        name, state.full_size, subsample=state.indices, dim=state.dim
                    )
        return call

    def forward(
        self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Sample every latent site given the observed values of this call.

        Args:
            *args: Positional arguments of the model.
            observations: Values of observed sites that replace those of the model (the convention of
                :class:`~pyro.infer.CSIS`).
            **kwargs: Keyword arguments of the model.

        Returns:
            A dict from site to sampled value.

        Raises:
            UnsupportedModelError: If an observed site has no value in this call.
            GraphflowsError: If an observed value is not finite. The message names the site.
        """
        if self._plan is None:
            self.setup(*args, **kwargs)
        self._claim_parameter_names()
        call = self._read(args, kwargs, observations)
        networks: Any = self.networks
        features: Any = self.features
        result: dict[str, Tensor] = {}
        unconstrained: dict[str, Tensor] = {}
        for index, block in enumerate(self.plan.blocks):
            context = self._features_of(index, features[index], call, unconstrained)
            evaluation = networks[index].start(context, call.plates)
            for level in block.levels:
                if any(name in self._changing for name in level):
                    call = self._with_supports(call, args, kwargs, result, level)
                with ExitStack() as stack:
                    for name in block.plates:
                        stack.enter_context(self.plates[name])
                    for name, factor in evaluation.factors().items():
                        result[name], unconstrained[name] = self._sample_site(name, factor, call)
                    evaluation.accept({name: unconstrained[name] for name in level})
        return {name: result[name] for name in self.plan.graph.latent}

    def _claim_parameter_names(self) -> None:
        """Take entries of other guides out of the parameter store where their names are those of this one.

        The store would hand the optimiser of this call the parameters of the guide that came first, and none of this
        guide's would ever be trained. Names are those of classes, so two guides in one program suffice.
        """
        store = pyro.get_param_store()
        if not len(store):
            return
        fullname = self._pyro_get_fullname("networks")
        networks: Any = self._modules["networks"]
        for name, parameter in networks.named_parameters():
            stored = store._params.get(f"{fullname}$$${name}")
            if stored is not None and stored is not parameter:
                del store[f"{fullname}$$${name}"]

    def _with_supports(
        self,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        latents: Mapping[str, Tensor],
        level: Sequence[str],
    ) -> Call:
        """Return the call with the supports of a level's sites as they are given the values sampled so far."""
        indices = {name: plate.indices for name, plate in call.plates.items() if plate.indices is not None}
        supports = self._reader.supports_given(self.model, args, kwargs, latents, indices)
        changed = {name: supports[name] for name in level if name in self._changing}
        return replace(call, supports={**call.supports, **changed})

    def _features_of(
        self, index: int, features: FeatureMap, call: Call, unconstrained: Mapping[str, Tensor]
    ) -> Tensor:
        parts = []
        pools: Any = self.pools[index]
        dtype = features.shift.dtype
        for position, name in enumerate(self._context[index]):
            if str(position) in pools:
                pool = pools[str(position)]
                values = {m.name: self._flat_value(m.name, call, unconstrained, dtype) for m in pool.members}
                if isinstance(pool, LookUp):
                    values[pool.index] = call.values[pool.index]
                parts.append(pool(values, call.plates, call.masks))
            else:
                parts.append(self._flat_value(name, call, unconstrained, dtype))
        flat = concatenate(parts)
        if not bool(torch.isfinite(flat).all()):
            guilty = [
                n for n, p in zip(self._context[index], parts, strict=True) if not torch.isfinite(p).all()
            ]
            raise GraphflowsError(
                f"Expected finite values of the data the guide conditions on; {', '.join(guilty)} have NaN or "
                "infinite entries. Remove them, or model them as missing with pyro.sample(..., obs_mask=...)."
            )
        expected = features.shift.shape[0]
        if flat.shape[-1] != expected:
            sizes = ", ".join(f"{n}: {p.shape[-1]}" for n, p in zip(self._context[index], parts, strict=True))
            raise GraphflowsError(
                f"Expected {expected} conditioning features in all, as when the guide was set up; got {sizes}."
            )
        return features(flat)

    def _flat_value(
        self, name: str, call: Call, unconstrained: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        if name in unconstrained:
            return unconstrained[name]
        return self._reader.flat(name, call.values[name], self._event_dims[name], dtype)

    def _sample_site(self, name: str, factor: dist.TorchDistribution, call: Call) -> tuple[Tensor, Tensor]:
        site = self._sites[name]
        fn, read_back = self._site_distribution(site, factor, call)
        masked = fn
        if name in call.masks:
            masked = fn.mask(call.masks[name])
        with ExitStack() as stack:
            if name in call.scales:
                stack.enter_context(poutine.scale(scale=call.scales[name]))
            infer = {"infer": {"enumerate": "parallel"}} if name in self._enumerated else {}
            value = self._emit(name, masked, **infer)
        return value, read_back(value)

    def _site_distribution(
        self, site: LatentSite, factor: dist.TorchDistribution, call: Call
    ) -> tuple[dist.TorchDistribution, Callable[[Tensor], Tensor]]:
        """Return the distribution to emit at a site and the map from its value to the unconstrained vector."""
        support = call.supports[site.name]
        if site.encoding is not None:
            if not site.encoding.fits(support):
                raise GraphflowsError(
                    f"Expected the values of {site.name!r} to be as when the guide was set up ({site.encoding}); this "
                    f"call has {support}. Set up a guide for the new values."
                )
            features: Any = self.features
            discrete = DiscreteDistribution(factor, site.encoding, support, features[0].shift.dtype)
            return discrete, discrete.unconstrained
        transform = site.transform if support is site.support else biject_to(support)
        if isinstance(factor, ScalarNormal) and not site.event_shape and is_identity(transform):
            analytic = self.plan.analytic_kl[site.name]
            return factor.normal if analytic else SampledNormal(factor.normal), _add_event_dim
        if self.plan.analytic_kl[site.name] and is_identity(transform):
            if site.event_shape == factor.event_shape:
                return factor, _itself
            if not site.event_shape and isinstance(factor, dist.Independent):
                normal = factor.base_dist
                scalar = type(normal)(normal.loc.squeeze(-1), normal.scale.squeeze(-1), validate_args=False)
                return scalar, _add_event_dim
        emitted = FactorDistribution(factor, transform, site.unconstrained_shape, site.event_shape, support)
        return emitted, emitted.unconstrained

    def _trace_given(
        self, latents: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> poutine.Trace:
        missing = [name for name in self.plan.graph.latent if name not in latents]
        if missing:
            raise GraphflowsError(f"Expected a value for every latent site; missing: {', '.join(missing)}.")
        given = {name: latents[name] for name in self.plan.graph.latent}
        with poutine.block():
            return poutine.trace(poutine.condition(self, data=given)).get_trace(*args, **kwargs)

    def log_prob(self, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the log-density of latent values given the data of a call, in nats.

        Args:
            latents: A value for every latent site. Extra batch dimensions on the left are kept.
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model, and ``observations``.

        Returns:
            ``log q(latents | data)``: summed over the sites, per element of the plates where all sites are in the same
            plates (a vector over the data for the common single data plate), and summed over plates otherwise.
        """
        if self._plan is None:
            self.setup(*args, **{key: value for key, value in kwargs.items() if key != "observations"})
        nodes: Any = self._trace_given(latents, args, kwargs).nodes
        terms = [nodes[name]["fn"].log_prob(nodes[name]["value"]) for name in self.plan.graph.latent]
        plates = [self.plan.graph.plates[name] for name in self.plan.graph.latent]
        if any(each != plates[0] for each in plates):
            depth = max(len(each) for each in plates)
            dims = {frame.dim for frame in self._prototype_frames.values()}
            depth = max((-dim for dim in dims), default=depth)
            terms = [_sum_rightmost(term, depth) for term in terms]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the latents at base noise zero: each site at its factor's centre given the centres before it.

        The centre of a discrete site's factor is its mode.
        """
        self._emit = _centre
        try:
            with torch.no_grad(), poutine.block():
                return self(*args, **kwargs)
        finally:
            self._emit = pyro.sample

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, num_draws: int = 1000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return quantiles of each latent element, estimated from draws of the guide (1,000 unless told).

        Args:
            quantiles: Probabilities.
            *args: Positional arguments of the model.
            num_draws: The number of draws. The error of a quantile falls with its square root.
            **kwargs: Keyword arguments of the model.

        Returns:
            A dict from site to tensor of shape ``(len(quantiles), *shape of the site's value)``.
        """
        if self._plan is None:
            self.setup(*args, **{key: value for key, value in kwargs.items() if key != "observations"})
        depth = max((-state.dim for state in self._plate_states.values()), default=0)
        with torch.no_grad(), poutine.block():
            shapes = {name: value.shape for name, value in self(*args, **kwargs).items()}
            with pyro.plate("_pyro_graphflows_draws", num_draws, dim=-1 - depth):
                draws = self(*args, **kwargs)
        result = {}
        for name, value in draws.items():
            value = value.reshape(num_draws, *shapes[name])
            if (
                self._sites[name].encoding is not None
            ):  # the least value with that share of the draws up to it
                place = (torch.as_tensor(quantiles, dtype=torch.double) * num_draws).ceil().long() - 1
                result[name] = value.sort(0).values[place.clamp(0, num_draws - 1).to(value.device)]
                continue
            levels = torch.as_tensor(quantiles, dtype=value.dtype, device=value.device)
            result[name] = torch.quantile(value, levels, dim=0)
        return result

    def given(self, **observations: Tensor) -> Callable[..., dict[str, Tensor]]:
        """Return a callable guide with some observed values fixed.

        Args:
            **observations: Values by observed site; they replace those of each later call. Dots in names: pass a
                dict with ``**``.

        Returns:
            A function of the model's arguments that runs this guide.

        Raises:
            GraphflowsError: If a name is not an observed site.

        Example:
            >>> import pyro, torch, pyro.distributions as dist
            >>> from pyro_graphflows.guides import auto_faithful_guide
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> posterior = auto_faithful_guide(model, torch.zeros(3)).given(x=torch.ones(3))
            >>> posterior(torch.zeros(3))["z"].shape
            torch.Size([3])
        """
        unknown = [name for name in observations if name not in self.plan.graph.observed]
        if unknown:
            raise GraphflowsError(
                f"Expected observed sites ({', '.join(map(str, self.plan.graph.observed))}); "
                f"got {', '.join(unknown)}."
            )
        fixed = dict(observations)

        def guide(
            *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any
        ) -> dict[str, Tensor]:
            return self(*args, observations={**(observations or {}), **fixed}, **kwargs)

        return guide

    # ---------------------------------------------------------------- copies and files

    def bind(self, model: Callable[..., Any]) -> "AutoFaithfulGuide":
        """Give a loaded guide its model back (models are not saved with guides)."""
        self._model = (model,)
        return self

    @property
    def model(self) -> Callable[..., Any]:
        """The model of the guide."""
        if self._model is None:
            raise GraphflowsError("Expected a guide with its model; a loaded guide needs guide.bind(model).")
        return self._model[0]

    def __getstate__(self) -> dict[str, Any]:
        # Unlike Pyro's own guides, leave the live object as it is. The parameter store hangs a weak reference on
        # each parameter that it has seen, which cannot be pickled; it is set anew on the next use.
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        state = self.__dict__.copy()
        state["_model"] = None
        state["master"] = None
        state["plates"] = {}
        state["create_plates"] = None
        state["_emit"] = pyro.sample
        state["_inverse_option"] = None if self._plan is None else self._plan.inverse
        state["prototype_trace"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AutoFaithfulGuide":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for part in (self._model, self.create_plates, self.master):
            memo[id(part)] = part
        state = self.__dict__.copy()
        shared = {
            key: state.pop(key) for key in ("_model", "create_plates", "master", "_emit", "prototype_trace")
        }
        state["plates"] = {}
        new.__dict__.update(shared)
        new.__dict__.update(copy.deepcopy(state, memo))
        return new


def _itself(value: Tensor) -> Tensor:
    return value


def _add_event_dim(value: Tensor) -> Tensor:
    return value.unsqueeze(-1)


def _centre(name: str, fn: Any, **_: Any) -> Tensor:
    while hasattr(fn, "base_dist") and not hasattr(fn, "centre"):
        if isinstance(fn, dist.Independent):
            break
        fn = fn.base_dist
    return fn.centre() if hasattr(fn, "centre") else fn.mean


def _sum_rightmost(term: Tensor, depth: int) -> Tensor:
    depth = min(depth, term.dim())
    return term.flatten(term.dim() - depth).sum(-1) if depth else term


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the last dimension; batch shapes broadcast."""
    if not parts:
        return torch.zeros(0)
    if len(parts) == 1:
        return parts[0]
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)
