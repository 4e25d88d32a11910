"""From a model to a plan: a guide's options, and what it is set up from."""

import warnings
from collections.abc import Callable, Collection, Hashable
from typing import Any, TypeVar

import pyro
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.graphs.separation import violated_independencies
from pyro_graphflows.guides.call import CallReader, plates_of
from pyro_graphflows.guides.elements import ElementInverse, invert_elements
from pyro_graphflows.guides.exchange import Unlike, sites_concerned
from pyro_graphflows.guides.inverses import Inverse, invert_nested, resolve_inverse
from pyro_graphflows.guides.joint_samples import JointSamples
from pyro_graphflows.guides.ordering import (
    discrete_sites_first,
    order_for_discrete_sites,
    require_outer_sites_first,
    sites_to_enumerate,
)
from pyro_graphflows.guides.plan import Plan, make_plan
from pyro_graphflows.guides.pool_plan import PoolOptions, PoolPlan, plan_pools
from pyro_graphflows.guides.pooling import DeepSet
from pyro_graphflows.guides.site import conditioning_event_dims, latent_sites, observed_encodings
from pyro_graphflows.guides.smooth_order import is_worth_a_search, joint_rows, smooth_order
from pyro_graphflows.guides.supports import changing_supports, require_known_supports
from pyro_graphflows.inspect import TracedModel, non_exchangeable_plates, trace_model

__all__ = ["CompiledGuide", "Description"]

Guide = TypeVar("Guide", bound="CompiledGuide")


class Description(str):
    """Text that prints itself at the interactive prompt."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class CompiledGuide(AutoGuide):
    """What a guide is before it runs: its options, its plan, and the steps from a model to the plan.

    Subclasses say how a call runs (:class:`~pyro_graphflows.guides.running.RunningGuide`) and build the networks of a
    family (:meth:`_build`). The options are those of :class:`~pyro_graphflows.guides.AutoFaithfulGuide`.
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
        self._lookups: dict[tuple[str, str], str | None] = {}
        self._notes: tuple[str, ...] = ()
        self._emit: Callable[..., Tensor] = pyro.sample
        self.features: nn.ModuleList
        self.pools: nn.ModuleList  # for each block, its summaries by the position in its context
        self.networks: nn.ModuleList

    # ---------------------------------------------------------------- compilation

    def setup(self: Guide, *args: Any, **kwargs: Any) -> Guide:
        """Compile the guide with the arguments of a typical call, and create its parameters.

        Args:
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model.

        Returns:
            The guide itself.

        Raises:
            UnsupportedModelError: If the model's structure cannot be traced, or the guide cannot represent it.

        Warns:
            GraphflowsWarning: If latents stay dependent across a plate in the posterior and are independent in the
                guide. The message names them, and what to do.
        """
        with poutine.block():
            traced = trace_model(self.model, args, kwargs, strict=self._strict, resolution=self._resolution)
            if not traced.graph.latent:
                raise UnsupportedModelError(
                    "Expected a model with latent sites; all its sites are observed"
                    f"{' or enumerated by the model' if traced.graph.marginalised else ''}: a guide has no site."
                )
            self._elements: ElementInverse | None = None
            if self._resolution == "element":
                traced, self._elements = invert_elements(traced, lambda graph: self._resolve(graph, traced))
                inverse = self._elements.sites
            else:
                found = invert_nested(self.model, args, kwargs, traced, self._inverse_option)
                inverse, self._nested_inverse, self._lookups = found.inverse, found.nested, found.lookups
            self._sites = latent_sites(traced, self._custom_sites)
            rough = {name for name, site in self._sites.items() if site.encoding is not None}
            self._enumerated = sites_to_enumerate(self._enumerate_option, self._sites)
            if rough:
                free = self._inverse_option == "auto" and self._elements is None
                inverse = order_for_discrete_sites(inverse, rough, self._enumerated, free=free)
            self._plate_states = plates_of(traced.trace)
            self._event_dims = conditioning_event_dims(traced)
            self._reader = CallReader(self.model, traced)
            self._reader.look_for_missing(self.model, args, kwargs)
            self._reader.encodings = observed_encodings(traced)
            joint = JointSamples(
                self.model,
                args,
                kwargs,
                traced=traced,
                reader=self._reader,
                sites=self._sites,
                event_dims=self._event_dims,
            )
            if self._inverse_option == "auto" and self._elements is None and not rough and not self._lookups:
                inverse = self._smooth(inverse, joint)
            unlike = sites_concerned(inverse, self._uneven_plates(traced, args, kwargs))
            self._pool_plan = self._plan_pools(inverse, traced, unlike)
            plan = make_plan(inverse, self._block_kind, self._pool_plan)
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
                for parent in inverse.parents[name]:
                    if parent in traced.without_data:
                        plan.ways[parent, name] = "no data to read"
            self._check_plan(plan, traced)
            self._changing = self._changing_supports(plan, traced, args, kwargs)
            self._plan = plan
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
            self._build(plan, joint)
        if self._pool_plan.missing:
            warnings.warn("\n".join(self._pool_plan.missing), GraphflowsWarning, stacklevel=2)
        if self.master is not None:
            self.master()._check_prototype(prune_subsample_sites(self.prototype_trace))
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.setup(*args, **kwargs)

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

    def _resolve(self, graph: ModelGraph, traced: TracedModel) -> InverseGraph:
        """Return the inverse of a graph of sites that the user asked for, discrete sites first if it was ``auto``."""
        inverse = resolve_inverse(graph, self._inverse_option)
        if self._inverse_option != "auto":
            return inverse
        nodes: Any = traced.trace.nodes
        return discrete_sites_first(
            inverse, [name for name in graph.latent if nodes[name]["fn"].support.is_discrete]
        )

    def _smooth(self, inverse: InverseGraph, joint: JointSamples) -> InverseGraph:
        """Return an inverse as sparse whose conditionals are smoother, where samples of the model tell."""
        rows = joint_rows(joint, self._rows_to_start) if is_worth_a_search(inverse) else None
        return inverse if rows is None else smooth_order(inverse, rows)

    @property
    def _rows_to_start(self) -> int:
        """How many rows of joint samples the networks start with."""
        return 0

    def _changing_supports(
        self, plan: Plan, traced: TracedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, tuple[str, ...]]:
        indices = {
            name: plate.indices for name, plate in self._plate_states.items() if plate.indices is not None
        }
        changing = changing_supports(self._reader, traced, self.model, args, kwargs, indices)
        order = [site for block in plan.blocks for site in block.sites]
        require_known_supports(changing, order, plan.inverse.order, self._sites)
        return changing

    def _build(self, plan: Plan, joint: JointSamples) -> None:
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
            named = "; ".join(
                f"{statement.node} of {statement.other} given {', '.join(map(str, statement.given)) or 'nothing'}"
                for statement in list(missing)[:3]
            )
            notes.append(
                f"not faithful: the inverse asserts {len(missing)} independencies that the posterior does not have: "
                f"{named}{'; ...' if len(missing) > 3 else ''}. Use inverse='auto'."
            )
        if self._pool is None and self._pool_plan.free:
            notes.append(
                "sites with free parameters fit one data set and read none in a call; pool='deepset' amortises them, "
                "where plates are not subsampled and no constants of the model vary along them."
            )
        return Description(self.plan.describe(tuple(notes)))

    @property
    def model(self) -> Callable[..., Any]:
        """The model of the guide."""
        if self._model is None:
            raise GraphflowsError("Expected a guide with its model; a loaded guide needs guide.bind(model).")
        return self._model[0]
