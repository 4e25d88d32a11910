"""From a model to a plan: trace, inverse, ways in, blocks, in named steps; what cannot be compiled is refused here.

Each step takes values and returns new ones; none edits an earlier step's result.
"""

import math
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import networkx as nx
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_graphflows.distributions.coordinates import gaussian_coordinate
from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.graphs.inversion import OrderSearch
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.guides.call import (
    CallReader,
    PlateState,
    blame_missing_entries,
    plates_of,
    refuse_empty_plates,
    require_shape,
    require_tensor,
    site_mask,
)
from pyro_graphflows.guides.conditionals.auto import MOST_ELEMENTS, MOST_GLOBALS, Auto
from pyro_graphflows.guides.conditionals.contract import ElementParents, Family, SiteRole
from pyro_graphflows.guides.conditionals.factors import ElementNormalFactor, Factor, NormalFactor
from pyro_graphflows.guides.conditionals.flow import Flow
from pyro_graphflows.guides.conditionals.masked import Normal
from pyro_graphflows.guides.conditionals.pooling import Attention, DeepSet
from pyro_graphflows.guides.conditionals.spline import Spline
from pyro_graphflows.guides.fusion import Fusion, FusionQuestion, plan_fusion, sites_of_scales
from pyro_graphflows.guides.orders import (
    MOST_EDGES_OF_HIERARCHIES,
    NAMED_INVERSES,
    FoundInverse,
    Inverse,
    draws_more_effects_alone,
    find_inverse,
    most_edges_of_hierarchy,
    num_coupled_pairs,
    optional_sites_first,
    order_for_coupled_effects,
    order_for_crossed_plates,
    order_for_discrete_sites,
    order_for_hierarchies,
    order_for_supports,
    outer_sites_first,
    outside_of_loops,
    require_enumerable_plates,
    require_outer_sites_first,
    sites_to_enumerate,
    smoothest_inverse,
)
from pyro_graphflows.guides.plan import (
    BlockPlan,
    InputOptions,
    InputPlan,
    Plan,
    SummedSite,
    make_blocks,
    mean_field_condition,
    plan_inputs,
    readers_of,
    sites_concerned,
    ways_in,
    with_embeddings,
    with_fitted_maps,
    with_scores,
)
from pyro_graphflows.guides.samples import ModelDraws
from pyro_graphflows.guides.scores import ScoreReader, judge_scores, score_name, sites_with_scores
from pyro_graphflows.guides.sites import (
    REMEDIES_OF_NAN,
    InputEncodings,
    LatentSite,
    at_an_end,
    flatten_event,
    input_encodings,
    is_constant,
    is_normal_unconstrained,
    latent_sites,
    outside_of_support,
)
from pyro_graphflows.guides.summed_sites import sites_to_sum
from pyro_graphflows.guides.vectors import VectorOptions, Vectors, hold_vectors, parents_in_chain
from pyro_graphflows.inspect import TracedModel, non_exchangeable_plates, seed_random_state, trace_model
from pyro_graphflows.inspect.arguments import argument_leaves, is_outside, require_rereadable
from pyro_graphflows.inspect.elements import split_elements
from pyro_graphflows.inspect.model_graph import OTHER_SEED, changes
from pyro_graphflows.inspect.neighbours import Chain, find_chain
from pyro_graphflows.inspect.runs import (
    handled,
    is_masked_out,
    log_density_at,
    quiet_run,
    rows_of_plates,
    run_model,
    support_of,
    undressed,
    with_flat_priors,
)
from pyro_graphflows.inspect.trace import Rerun, trace_once

__all__ = ["FAMILIES", "Compiled", "GuideOptions", "compile_guide", "make_family"]

FAMILIES: Mapping[str, type[Auto] | type[Normal] | type[Spline] | type[Flow]] = {
    "auto": Auto,
    "normal": Normal,
    "spline": Spline,
    "flow": Flow,
}

POOLINGS: Mapping[str, type[DeepSet]] = {"deepset": DeepSet, "attention": Attention}
EXACT_KL = (NormalFactor, ElementNormalFactor)  # factors for which a KL is registered, before any bijection
BY_SITE = {
    "factors": "Factor or family",
    "init_values": "value",
    "embedding": "nn.Module, 'auto' or 'linear'",
}
INITS = ("auto", "regression", "mode", "prior", "random")
SCORE_DRAWS = 1000  # joint samples whose means are the reference values of scores
MOST_CONSTANTS = 256  # numbers of an argument in no plate up to which it is read
MOST_VALUES_TRIED = 32  # of a discrete site, to see whether supports of others change with it


def make_family(family: str | Family | type[Factor]) -> Family:
    """Return the family that a user asked for: an object, the name of one with its defaults, or that of a factor class.

    Args:
        family: A family, the name of one, or a subclass of :class:`~pyro_graphflows.guides.Factor`.

    Raises:
        GraphflowsError: If it is none of these. The message names those that there are.
    """
    if isinstance(family, Family):
        return family
    if isinstance(family, str) and family in FAMILIES:
        return FAMILIES[family]()
    if isinstance(family, type) and issubclass(family, Factor):
        return Normal(factor=family)
    names = ", ".join(repr(name) for name in FAMILIES)
    hint = (
        f" Did you mean {family.__name__}()?"
        if isinstance(family, type) and issubclass(family, Family)
        else ""
    )
    raise GraphflowsError(
        f"Expected family= {names}, a family object ({', '.join(kind.__name__ for kind in FAMILIES.values())}) or a "
        f"subclass of Factor; got {family!r}.{hint}"
    )


@dataclass(frozen=True)
class GuideOptions:
    """The options of a guide; see :func:`~pyro_graphflows.guides.auto_faithful_guide`."""

    family: Family
    inverse: Inverse = "auto"
    pool: str | DeepSet | None = None
    init: str = "auto"
    factors: Mapping[str, type[Factor] | Family] = field(default_factory=dict)
    standardize: bool = True
    num_start_samples: int = 10_000
    strict: bool = True
    resolution: str = "auto"
    rank: int | None = None
    budget: int | None = None
    coupled_rank: int | None = None
    enumerate_sites: bool | Collection[str] = False
    init_values: Mapping[str, Tensor] = field(default_factory=dict)
    setup_seed: int = 0
    optional: Sequence[str] = ()
    features: str = "raw"
    embedding: Mapping[str, nn.Module | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.optional, str) or not all(isinstance(name, str) for name in self.optional):
            raise GraphflowsError(f"Expected optional=[names of sites]; got {self.optional!r}.")
        object.__setattr__(self, "optional", tuple(dict.fromkeys(self.optional)))
        for option, of_site in BY_SITE.items():
            given = getattr(self, option)
            if not isinstance(given, Mapping):
                raise GraphflowsError(f"Expected {option}={{site: {of_site}}}; got {given!r}.")
            object.__setattr__(self, option, dict(given))
        if self.resolution not in ("auto", "site", "element"):
            raise GraphflowsError(
                f"Expected resolution='auto', 'site' or 'element'; got {self.resolution!r}."
            )
        for what, number in (("rank >= 1", self.rank), ("budget >= 1 weights", self.budget)):
            whole = isinstance(number, int) and not isinstance(number, bool)
            if number is not None and not (whole and number >= 1):
                raise GraphflowsError(f"Expected {what}, a whole number, or None to choose; got {number!r}.")
        if self.optional and self.resolution == "element":
            raise GraphflowsError("Expected resolution='auto' or 'site' with optional= sites.")
        if self.init not in INITS:
            names = ", ".join(map(repr, INITS))
            raise GraphflowsError(f"Expected init= one of {names}; got {self.init!r}.")
        if not isinstance(self.num_start_samples, int) or self.num_start_samples < 1:
            raise GraphflowsError(
                f"Expected num_start_samples >= 1, a whole number; got {self.num_start_samples!r}."
            )
        for name, network in self.embedding.items():
            if not isinstance(network, nn.Module) and network not in ("auto", "linear"):
                raise GraphflowsError(
                    f"Expected embedding={{site: nn.Module, 'auto' or 'linear'}}; got {network!r} for {name!r}."
                )
        if self.features not in ("raw", "score", "auto"):
            raise GraphflowsError(f"Expected features='raw', 'score' or 'auto'; got {self.features!r}.")
        if self.features != "raw" and (self.resolution == "element" or self.optional):
            raise GraphflowsError(
                f"Expected features='raw' with resolution='element' or optional= sites; got {self.features!r}."
            )
        if self.pool not in (None, *POOLINGS) and not isinstance(self.pool, DeepSet):
            raise GraphflowsError(
                f"Expected pool='deepset', 'attention', a DeepSet, an Attention or None; got {self.pool!r}."
            )
        if self.coupled_rank is not None and self.coupled_rank < 0:
            raise GraphflowsError(f"Expected coupled_rank >= 0 or None; got {self.coupled_rank}.")
        if self.init in ("regression", "mode", "prior") and not self.family.can_regress:
            raise GraphflowsError(
                f"Expected skip=True with init={self.init!r}, which sets the linear maps; got {self.family!r}."
            )
        if self.init_values and not self.family.can_regress:
            raise GraphflowsError(
                f"Expected skip=True with init_values, which set the linear maps; got {self.family!r}."
            )
        for name, value in self.init_values.items():
            if not torch.is_tensor(value):
                raise GraphflowsError(
                    f"Expected init_values={{site: tensor}}; got {type(value).__name__} for {name!r}."
                )
        if not isinstance(self.setup_seed, int) or self.setup_seed < 0:
            raise GraphflowsError(f"Expected setup_seed >= 0, a whole number; got {self.setup_seed!r}.")
        for name, kind in self.factors.items():
            if not (isinstance(kind, Family) or (isinstance(kind, type) and issubclass(kind, Factor))):
                raise GraphflowsError(
                    f"Expected factors={{site: subclass of Factor, or family object}}; got {kind!r} for {name!r}."
                )
        if self.resolution == "element" and not self.family.can_split:
            raise GraphflowsError(
                "Expected a family that can give each element parents of its own, 'normal' or 'flow', with "
                f"resolution='element'; got {self.family!r}."
            )

    @property
    def deepset(self) -> DeepSet | None:
        """The shape of pooled summaries; None where nothing is pooled."""
        return POOLINGS[self.pool]() if isinstance(self.pool, str) else self.pool

    @property
    def num_rows(self) -> int:
        """How many rows of joint samples the blocks start with."""
        return self.num_start_samples if self.standardize or self.init != "random" else 0

    def factor_classes(self) -> dict[str, type[Factor]]:
        """Return the factor classes that the user gave for single sites."""
        return {name: kind for name, kind in self.factors.items() if not isinstance(kind, Family)}

    def family_of(self, role: SiteRole) -> Family:
        """Return the family that serves a site."""
        own = self.factors.get(role.site.name)
        return (own if isinstance(own, Family) else self.family).serving(role)


@dataclass(frozen=True)
class Compiled:
    """What a guide is made from.

    Attributes:
        plan: What the guide does at each call.
        traced: The traced model, with the graph of its sites.
        sites: The latent sites.
        reader: The reader of its calls.
        plates: The plates of the call at set-up.
        families: For each site the family that serves it.
        element_parents: For sites whose elements are told apart, the parents of each element.
        vectors: How vectors too long for a full covariance are held.
        draws: The model's draws.
        scores: The score features that sites read; None without.
    """

    plan: Plan
    traced: TracedModel
    sites: dict[str, LatentSite]
    reader: CallReader
    plates: dict[str, PlateState]
    families: dict[str, Family]
    element_parents: ElementParents
    vectors: Vectors
    draws: ModelDraws
    scores: ScoreReader | None = None


def compile_guide(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: GuideOptions
) -> Compiled:
    """Compile a model for the arguments of a typical call.

    The random state is the caller's in a first run, in which the model may create its parameters. From then on it
    follows from ``setup_seed``, also after the return; be inside of :func:`~pyro_graphflows.inspect.kept_random_state`.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        options: The options of the guide.

    Raises:
        UnsupportedModelError: If the model's structure cannot be traced, or a guide cannot represent it.
        GraphflowsError: If an option names a site that the model has not, or one that it does not fit.
    """
    argument_leaves(model, args, kwargs)  # refuses arguments that do not fit
    require_rereadable(model, args, kwargs)
    try:
        with quiet_run(model):
            first = run_model(model, args, kwargs)
    except ZeroDivisionError as error:
        refuse_empty_plates(error)
        raise
    for name, site in first.nodes.items():
        if site["type"] == "sample" and site["is_observed"]:
            require_tensor(name, site["value"])
    seed_random_state(options.setup_seed)
    model = with_latent(model, options.optional)
    trace = _trace(model, args, kwargs, options)
    flat = _masked_priors(trace)
    if flat:
        model = with_flat_priors(model, flat)
        trace = _trace(model, args, kwargs, options)
    _check_optional(options, trace)
    elements = options.resolution == "element"
    found = find_inverse(model, args, kwargs, trace, _order(options, trace), elements=elements)
    traced = found.traced
    sites = latent_sites(traced, options.factor_classes())
    _check_factors(options, sites)
    _check_init_values(options, sites)
    enumerated = sites_to_enumerate(options.enumerate_sites, sites)
    require_enumerable_plates(enumerated, traced.graph)
    encodings = input_encodings(model, args, kwargs, traced)
    _require_possible_data(traced, encodings, (model, args, kwargs))
    _require_data_of_flat_priors(traced)
    draws = ModelDraws(model, args, kwargs, traced, sites, encodings)
    changing = _changing_supports(traced, model, args, kwargs)
    wide = _wide_constants(options, traced.graph)
    vectors = _hold_vectors(
        *(found, options, sites, changing, wide),
        lambda names: _by_element(model, args, kwargs, trace, options, names),
        lambda found, names: _as_chains(found, (model, args, kwargs), options, sites, names),
    )
    found, elements = vectors.found, vectors.found.elements is not None
    is_free = options.inverse == "auto" and not elements and not options.optional and not vectors.chains
    search = _OrderSearch(
        lambda one: find_inverse(model, args, kwargs, trace, one, elements=elements),
        *(options, sites, draws, changing, enumerated, is_free),
    )
    found, inverse, scales = search.run(found)
    traced = found.traced
    judged = found.judged if traced.loops else None
    if traced.loops:
        inverse = outside_of_loops(inverse, traced.graph)
    plates = plates_of(traced.trace)
    uneven = non_exchangeable_plates(model, args, kwargs, traced=traced) if plates else {}
    outside = [name for name in traced.graph.inputs if is_outside(traced.argument_paths[name])]
    by_rows: Mapping[str, tuple[str, ...]] = {}
    if any(traced.graph.plates[name] for name in outside) and options.pool is None:
        by_rows = non_exchangeable_plates(model, args, kwargs, traced=traced, known_rows=True)
    wide = frozenset() if elements else wide
    readable = {name: dim for name, dim in encodings.event_dims.items() if name not in wide}
    inputs = plan_inputs(
        inverse,
        plates,
        readable,
        traced.index_inputs,
        _input_options(options, found, sites),
        sites_concerned(inverse, uneven).with_known_rows(inverse, by_rows, outside, plates),
    )
    role_facts = _roles(options, sites, inputs, inverse.graph, traced, scales)
    families, keys = _families(options, sites, inputs, inverse.graph.plates, vectors.long, role_facts)
    blocks = make_blocks(inverse, inputs, readable, keys)
    require_outer_sites_first(blocks, inverse, search.discrete)
    _require_known_indices(blocks, inputs, traced)
    split = {} if found.elements is None else found.elements.parents
    excluded = _not_fused(options, sites, inputs, split, changing)
    for name, rank in vectors.ranks.items():
        one = rank == sites[name].size
        excluded[name] = f"its covariance is {'the same for all data' if one else 'of low rank'}"
    excluded.update(dict.fromkeys(vectors.chains, "its precision is banded"))
    indices = {name: plate.indices for name, plate in plates.items() if plate.indices is not None}
    summed = _summed(options, inverse, inputs, sites, families, readable)
    fusion = plan_fusion(
        FusionQuestion(
            *(model, (args, kwargs), traced, sites, families, inverse, blocks, enumerated, excluded, indices),
            summed=summed,
            of_any_size=[name for name, own in inputs.coupled.items() if own.rank > 0],
        )
    )
    fused = fusion.priors.sites
    blocks = _with_fusion(blocks, fusion, summed, tuple(scales))
    if inputs.per_element and options.pool is None and not traced.loops:
        data = set(encodings.event_dims) - set(traced.index_inputs) - set(encodings.partly) - set(sites)
        whole = (
            _with_plain_factors(options, sites, families)
            - set(vectors.ranks)
            - set(vectors.chains)
            - set(split)
        )
        blocks = with_fitted_maps(blocks, whole, data, plates)
    readers = readers_of(blocks, inverse.graph.latent)
    other_rows = _read_other_rows(readers, traced, strict=options.strict)
    keep_masks = any(node.summary for block in blocks for node in block.context)
    read = {node.name for block in blocks for node in block.context}
    unread = [name for name in traced.graph.observed if name in traced.loops and name not in read]
    reader = CallReader(
        *(traced, encodings),
        keep_masks=keep_masks,
        readers=readers,
        unread=unread,
        optional=options.optional,
        flat=flat,
    )
    reader.given = frozenset(argument_leaves(model, args, kwargs))
    scores, left_out, said = _scores(options, draws, inverse, plates, bool(changing) or elements)
    if scores is not None:
        blocks = with_scores(blocks, {site: score_name(site) for site in scores.observed_children}, left_out)
    blocks = _embedded(options, blocks, traced, encodings, elements)
    inputs = replace(
        inputs,
        remarks={**inputs.remarks, **{s: (*inputs.remarks.get(s, ()), line) for s, line in said.items()}},
    )
    order = [site for block in blocks for site in block.sites]
    _require_known_supports(changing, order, inverse.order, sites)
    hints: tuple[str, ...] = ()
    if options.pool is None and inputs.per_element:
        hints = (
            "sites with per-element parameters fit one data set and read none in a call; pool='deepset' amortises "
            "them, where plates are not subsampled and no constants of the model vary along them.",
        )
    hints += _known_covariates_alone(inputs, draws)
    plan = Plan(
        graph=inverse.graph,
        inverse=inverse,
        inputs=inputs,
        blocks=blocks,
        analytic_kl=_analytic_kl(
            options,
            inputs,
            families,
            sites,
            mean_field_condition(inverse.graph, inverse),
            {*vectors.ranks, *vectors.chains, *flat, *(fused - fusion.only_summed - fusion.by_shape)},
        ),
        priors=fusion.priors,
        labels=_labels(options, sites, enumerated, vectors, families),
        not_fused=fusion.reasons,
        ways=ways_in(inverse, inputs, traced.without_data, wide),
        changing=changing,
        enumerated=enumerated,
        copies=() if enumerated or traced.graph.marginalised else traced.copies,
        notes=(*traced.notes, *other_rows),
        hints=hints,
        judged=judged or (None if found.judged is found.inverse else found.judged),
    )
    _require_served(plan, options.optional)
    element_parents = {
        name: parents for name, parents in split.items() if name not in options.factor_classes()
    }
    for name, chain in vectors.chains.items():
        element_parents[name] = parents_in_chain(chain, sites[name].size, inverse, name)
    return Compiled(
        *(plan, traced, sites, reader, plates, families, element_parents, vectors, draws),
        scores=scores,
    )


# ---------------------------------------------------------------- steps


class _Way(NamedTuple):
    """An inverse on the way to the one that is taken, which has other orders beside what was found with it."""

    found: FoundInverse
    inverse: InverseGraph


@dataclass(frozen=True)
class _OrderSearch:
    """The choice of an order: rules that each may take another one than what was found so far.

    Attributes:
        find: Inverts the model's graph with an order.
        options: The options of the guide.
        sites: The latent sites.
        draws: The model's draws.
        changing: The sites whose supports depend on other sites.
        enumerated: The sites that are enumerated.
        is_free: Whether the order is the library's choice, and rules about continuous sites apply.
    """

    find: Callable[[Inverse], FoundInverse]
    options: GuideOptions
    sites: Mapping[str, LatentSite]
    draws: ModelDraws
    changing: Mapping[str, tuple[str, ...]]
    enumerated: Collection[str]
    is_free: bool

    @property
    def discrete(self) -> list[str]:
        """The discrete sites."""
        return [name for name, site in self.sites.items() if site.encoding is not None]

    def run(self, found: FoundInverse) -> tuple[FoundInverse, InverseGraph, Mapping[str, Sequence[str]]]:
        """Return what is taken: what was found with it, the inverse, and the sites that set scales of others."""
        way = self._with_supports(self._with_discrete_sites_or_smooth(found))
        scales = self._scales(way)
        loops = way.found.traced.loops
        if self.is_free and not self.discrete and not loops and not self.changing:
            if scales:
                way = self._with_effects_alone(self._with_hierarchies(way, scales), scales)
            way = self._with_crossed_plates(way)
        return way.found, way.inverse, scales

    def _with_discrete_sites_or_smooth(self, found: FoundInverse) -> _Way:
        inverse = found.inverse
        if self.discrete:
            return self._with_discrete_sites(found)
        if self.is_free and not found.lookups and not found.traced.loops and not self.changing:
            inverse = smoothest_inverse(inverse, self.draws, self.options.num_rows)
        return _Way(found, inverse)

    def _with_discrete_sites(self, found: FoundInverse) -> _Way:
        # Where data look up groups, their plate is inside of that of the groups.
        seen = found.nested or found.inverse
        inverse = order_for_discrete_sites(seen, self.discrete, self.enumerated, free=self.is_free)
        if found.nested is None:
            return _Way(found, inverse)
        if inverse.parents != seen.parents:
            found = self.find(list(inverse.sampling_order[::-1]))
        order = outer_sites_first(found.nested or found.inverse).sampling_order
        return _Way(found, found.inverse.replaced(sampling_order=order, order=inverse.order))

    def _with_supports(self, way: _Way) -> _Way:
        bounds = order_for_supports(way.inverse, self.changing) if self.options.inverse == "auto" else None
        if bounds is None:
            return way
        orders: list[Inverse] = [bounds, "reverse"]
        found = min((self.find(one) for one in orders), key=lambda found: found.inverse.num_edges)
        return _Way(found, outer_sites_first(found.inverse) if self.discrete else found.inverse)

    def _scales(self, way: _Way) -> Mapping[str, Sequence[str]]:
        family, draws = self.options.family, self.draws
        if family.fusion is False and not family.tells_roles:
            return {}
        call, graph = (draws.args, draws.kwargs), way.inverse.graph
        scalars = _scalars(self.sites)
        return sites_of_scales(draws.model, call, way.found.traced, self.sites, graph, scalars)

    def _with_hierarchies(self, way: _Way, scales: Mapping[str, Sequence[str]]) -> _Way:
        order = order_for_hierarchies(way.inverse, scales)
        if order is None:
            return way
        found = self.find(order)
        is_sparse = found.inverse.num_edges <= most_edges_of_hierarchy(way.inverse, scales)
        return _Way(found, found.inverse) if is_sparse else way

    def _with_effects_alone(self, way: _Way, scales: Mapping[str, Sequence[str]]) -> _Way:
        order = None if self.options.pool is None else order_for_coupled_effects(way.inverse, scales)
        if order is None:
            return way
        found = self.find(order)
        more = draws_more_effects_alone(found.inverse, way.inverse, scales)
        return _Way(found, found.inverse) if more else way

    def _with_crossed_plates(self, way: _Way) -> _Way:
        if self.options.pool is not None or not any(way.inverse.coupled.values()):
            return way
        sizes = {name: plate.full_size for name, plate in plates_of(way.found.traced.trace).items()}
        order = order_for_crossed_plates(way.inverse, sizes)
        if order is None:
            return way
        found = self.find(order)
        fewer = num_coupled_pairs(found.inverse, sizes) < num_coupled_pairs(way.inverse, sizes)
        is_sparse = found.inverse.num_edges <= MOST_EDGES_OF_HIERARCHIES * way.inverse.num_edges
        return _Way(found, found.inverse) if fewer and is_sparse else way


def _summed(
    options: GuideOptions,
    inverse: InverseGraph,
    inputs: InputPlan,
    sites: Mapping[str, LatentSite],
    families: Mapping[str, Family],
    readable: Collection[str],
) -> dict[str, SummedSite]:
    """Return the sites that may have one factor for each element of a plate."""
    deepset = options.deepset
    if deepset is None or not deepset.sums or options.features != "raw" or options.embedding:
        return {}
    scalars = [name for name in _scalars(sites) if families[name].can_fuse and name not in options.optional]
    return sites_to_sum(inverse, inputs, scalars, readable)


def _with_fusion(
    blocks: Sequence[BlockPlan], fusion: Fusion, summed: Mapping[str, SummedSite], scales: tuple[str, ...]
) -> tuple[BlockPlan, ...]:
    """Return the blocks with the sites that are fused, those that may have factors of elements, and scales."""
    found = []
    for block in blocks:
        fused = tuple(site for site in block.sites if site in fusion.priors.sites)
        own = {
            site: replace(summed[site], only_summed=site in fusion.only_summed)
            for site in fused
            if site in summed
        }
        by_shape = tuple(site for site in fused if site in fusion.by_shape and site not in own)
        found.append(replace(block, fused=fused, summed=own, by_shape=by_shape, scales=scales))
    return tuple(found)


def _embedded(
    options: GuideOptions,
    blocks: tuple[BlockPlan, ...],
    traced: TracedModel,
    encodings: InputEncodings,
    elements: bool,
) -> tuple[BlockPlan, ...]:
    """Return the blocks with embeddings in the place of the data that the user wants embedded."""
    for name in options.embedding:
        if name not in encodings.event_dims:
            raise GraphflowsError(
                f"Expected embedding= of data that the guide reads, {', '.join(encodings.event_dims) or 'none'}; got "
                f"{name}."
            )
        elementwise = any(node.name == name and node.summary is None for b in blocks for node in b.context)
        if name in encodings.partly or elements or not elementwise:
            reason = (
                "it is partly observed"
                if name in encodings.partly
                else "elements of vectors have parents of their own (resolution='site')"
                if elements
                else "no site reads it in its own plates: pool= has networks for data inside plates"
            )
            raise GraphflowsError(f"Expected no embedding of {name!r}: {reason}.")
    return with_embeddings(blocks, options.embedding) if options.embedding else blocks


def _scores(
    options: GuideOptions,
    draws: ModelDraws,
    inverse: InverseGraph,
    plates: Mapping[str, PlateState],
    varying: bool,
) -> tuple[ScoreReader | None, dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the scores that sites read, the data that some leave out for them, and remarks on sites with data."""
    if options.features == "raw":
        return None, {}, {}
    traced, sites, readable = draws.traced, draws.sites, draws.encodings.event_dims
    found = sites_with_scores(traced, inverse, sites, plates, readable)
    said = {site: f"no score feature: {reason}" for site, reason in found.reasons.items()}
    children = dict(found.children)
    if varying or draws.encodings.partly:
        reason = "data or supports come and go, or elements of vectors have parents of their own"
        said.update(dict.fromkeys(children, f"no score feature: {reason}"))
        children = {}
    if not children:
        return None, {}, said
    nodes: Any = traced.trace.nodes
    event_dims = {name: len(nodes[name]["fn"].event_shape) for each in children.values() for name in each}
    around = {name: tuple(inverse.graph.plates[name]) for name in sites}
    reader = ScoreReader(children, sites, around, event_dims)
    try:
        reader.set_references_(draws, SCORE_DRAWS)
        verdicts = judge_scores(reader, draws, inverse, plates, readable)
    except UnsupportedModelError as error:
        said.update(dict.fromkeys(children, f"no score feature: {error}"))
        return None, {}, said
    except Exception as error:  # of the model, which may assert shapes as well
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        said.update(dict.fromkeys(children, f"no score feature: the model does not take batches ({reason})"))
        return None, {}, said
    kept = [site for site in children if options.features == "score" or verdicts[site].helps]
    left_out = {site: children[site] for site in kept if verdicts[site].suffices}
    for site in children:
        what = "no score feature" if site not in kept else "reads its score"
        instead = f" in place of {', '.join(left_out[site])}" if site in left_out else ""
        said[site] = f"{what}{instead} ({verdicts[site]})"
    if not kept:
        return None, {}, said
    chosen = ScoreReader({site: children[site] for site in kept}, sites, around, event_dims)
    chosen.load_state_dict(reader.state_dict())
    return chosen.to(draws.like.device, draws.like.dtype), left_out, said


def _trace(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: GuideOptions
) -> TracedModel:
    traced = trace_model(model, args, kwargs, strict=options.strict)
    _require_the_same_in_every_run(traced, model, args, kwargs, strict=options.strict)
    _require_sites_by_position(traced, model, args, kwargs)
    if options.resolution == "element":
        traced = split_elements(Rerun(model, args, kwargs, traced))
    if not traced.graph.latent:
        raise UnsupportedModelError(
            "Expected a model with latent sites; all its sites are observed"
            f"{' or enumerated by the model' if traced.graph.marginalised else ''}: a guide has no site."
        )
    return traced


def _hold_vectors(
    found: FoundInverse,
    options: GuideOptions,
    sites: Mapping[str, LatentSite],
    changing: Collection[str],
    unread: Collection[str],
    by_element: Callable[[Collection[str]], FoundInverse],
    as_chains: Callable[[FoundInverse, Collection[str]], tuple[FoundInverse, Mapping[str, Chain]]],
) -> Vectors:
    """Decide how long vectors are held; element by element only where one elimination order serves all sites."""
    free = [name for name in sites if name not in options.factors]
    own = {name: sites[name] for name in free if options.family.has_vectors}
    has_vectors = any(site.encoding is None and site.size > 1 for site in own.values())
    if options.resolution == "element" or not has_vectors:
        return Vectors(found)
    apart = not (
        changing
        or options.optional
        or found.lookups
        or found.traced.loops
        or found.inverse.order in ("stochastic", "mean_field", "custom")
        or any(site.encoding is not None for site in sites.values())
    )
    asked = VectorOptions(options.resolution, options.rank, options.budget)
    full_size = options.family.full_size
    return hold_vectors(found, own, asked, full_size, by_element if apart else None, as_chains, unread)


def _wide_constants(options: GuideOptions, graph: ModelGraph) -> frozenset[str]:
    """Return the inputs in no plate that no site reads: many numbers, the same in all that the model simulates.

    Networks would learn nothing of them from simulations, and a design matrix of a thousand rows is thousands of
    columns of each regression.
    """
    return frozenset(
        name
        for name in graph.inputs
        if not graph.plates[name]
        and graph.event_sizes[name] > MOST_CONSTANTS
        and name not in options.embedding
    )


def _as_chains(
    found: FoundInverse,
    program: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
    options: GuideOptions,
    sites: Mapping[str, LatentSite],
    names: Collection[str],
) -> tuple[FoundInverse, dict[str, Chain]]:
    """Return an inverse, and those of some vectors that are chains given what is sampled before them in it.

    All latents that a chain meets must come before it: summed over, they would join its elements.
    """
    traced = found.traced
    graph = traced.graph
    chains: dict[str, Chain] = {}
    if (
        found.lookups
        or traced.loops
        or options.optional
        or found.inverse.order in ("stochastic", "mean_field")
    ):
        return found, chains
    rerun = Rerun(*program, traced)
    for name in names:
        site: Any = traced.trace.nodes[name]
        support = support_of(site["fn"])
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        if support.event_dim:  # simplices, matrices
            continue
        children = [child for child in graph.nodes if name in graph.parents(child)]
        met = {p for node in (name, *children) for p in (*graph.parents(node), node)}
        latent = {str(p) for p in met if p in graph.latent and p != name}
        if any(p in graph.marginalised for p in met) or chains.keys() & latent:
            continue
        form = sites[name]

        def to_vector(value: Tensor, form: LatentSite = form) -> Tensor:
            raw: Tensor = form.transform.inv(value)
            return flatten_event(raw, len(form.unconstrained_shape))

        def to_value(vector: Tensor, form: LatentSite = form) -> Tensor:
            value: Tensor = form.transform(vector.reshape(vector.shape[:-1] + form.unconstrained_shape))
            return value

        chain = find_chain(rerun, name, to_vector, to_value)
        if chain is None:
            continue
        order = list(found.inverse.sampling_order)
        if latent & set(order[order.index(name) :]):
            if options.inverse != "auto":
                continue
            last = [name, *(other for other in reversed(order) if other != name)]
            found = find_inverse(*program, traced, last, elements=False)
        chains[name] = chain
    return found, chains


def _by_element(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    traced: TracedModel,
    options: GuideOptions,
    names: Collection[str],
) -> FoundInverse:
    """Return the inverse in which some vectors are told apart element by element, those that can be."""
    split = split_elements(Rerun(model, args, kwargs, traced), only=names)
    return find_inverse(model, args, kwargs, split, _order(options, traced), elements=True)


class _Latent(Messenger):
    """Draws some sites as if they had no data."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and msg["is_observed"]:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def with_latent(model: Callable[..., Any], names: Collection[str]) -> Callable[..., Any]:
    """Return the model without the data of some sites; the model itself for none."""
    return handled(model, partial(_Latent, names)) if names else model


def _check_optional(options: GuideOptions, traced: TracedModel) -> None:
    graph = traced.graph
    wrong = [name for name in options.optional if name not in graph or graph.role(name) != "latent"]
    if not wrong:
        return
    name = wrong[0]
    summed = name in graph and graph.role(name) == "marginalised"
    why = (
        f"{name!r} is summed over by the model. Leave that to the guide: enumerate_sites=[{name!r}], without "
        "infer={'enumerate': 'parallel'} in the model"
        if summed
        else f"the model has no such site as {name!r} in this call, whose sites are "
        f"{', '.join(map(str, (*graph.latent, *graph.observed)))}. Sample it in every call, "
        f"pyro.sample({name!r}, ..., obs=value or None); entries that are missing within a site need obs_mask= alone"
    )
    raise GraphflowsError(f"Expected optional= sites that are sampled where they have no data; {why}.")


def _order(options: GuideOptions, traced: TracedModel) -> Inverse:
    """Return which inverse to look for: optional sites first, unless the user says in what order all are sampled."""
    option = options.inverse
    if not options.optional or not isinstance(option, str | OrderSearch) or option in NAMED_INVERSES:
        return option
    nodes: Any = traced.trace.nodes
    discrete = [name for name in traced.graph.latent if nodes[name]["fn"].support.is_discrete]

    def make(graph: ModelGraph) -> InverseGraph:
        return optional_sites_first(graph, option, options.optional, discrete)

    return make


def _labels(
    options: GuideOptions,
    sites: Mapping[str, LatentSite],
    enumerated: Collection[str],
    vectors: Vectors,
    families: Mapping[str, Family],
) -> dict[str, str]:
    """Return what is said of a site beside its inputs."""
    labels = {}
    for name, site in sites.items():
        said = [] if site.encoding is None else [str(site.encoding)]
        own = isinstance(options.family, Auto) and not isinstance(options.factors.get(name), Family)
        said += ["spline"] if own and isinstance(families[name], Spline) else []
        said += [] if site.encoding is None else ["enumerated" if name in enumerated else "score function"]
        said += ["data where a call has some"] if name in options.optional else []
        said += [vectors.labels[name]] if name in vectors.labels else []
        if said:
            labels[name] = ", ".join(said)
    return labels


def _require_served(plan: Plan, optional: Sequence[str]) -> None:
    """Refuse a plan that is not faithful where all optional sites are observed."""
    missing = plan.missing_with(optional) if optional else ()
    if missing:
        named = "; ".join(f"{site} of {other}" for site, other in missing)
        raise UnsupportedModelError(
            f"Expected optional sites that are sampled before all that depends on them; with data for "
            f"{', '.join(optional)} the posterior has dependences that the guide, of order {plan.inverse.order!r}, "
            f"would not have: {named}. Use inverse='auto'; of sites outside of the plates of optional ones, which are "
            "sampled before these, pool=None, whose per-element parameters fit whatever is observed."
        )


def _check_factors(options: GuideOptions, sites: Mapping[str, LatentSite]) -> None:
    strange = [name for name in options.factors if name not in sites]
    if strange:
        raise GraphflowsError(
            f"Expected factors= of latent sites, {', '.join(sites)}; got {', '.join(strange)}."
        )
    for name, kind in options.factors.items():
        encoding = sites[name].encoding
        if (
            isinstance(kind, Family)
            and encoding is not None
            and kind.serving(SiteRole(sites[name])) is not kind
        ):
            raise GraphflowsError(
                f"Expected a family in factors= that serves discrete sites, as Normal() does, for {name!r} "
                f"({encoding}); got {type(kind).__name__}. Continuous sites: {', '.join(_continuous(sites)) or 'none'}."
            )


def _check_init_values(options: GuideOptions, sites: Mapping[str, LatentSite]) -> None:
    wrong = [name for name in options.init_values if name not in _continuous(sites)]
    if wrong:
        raise GraphflowsError(
            f"Expected init_values of continuous latent sites, {', '.join(_continuous(sites)) or 'none'}; got "
            f"{', '.join(wrong)}."
        )


def _continuous(sites: Mapping[str, LatentSite]) -> list[str]:
    return [name for name, site in sites.items() if site.encoding is None]


def _input_options(
    options: GuideOptions, found: FoundInverse, sites: Mapping[str, LatentSite]
) -> InputOptions:
    split = {} if found.elements is None else found.elements.parents
    classes = options.factor_classes()
    can_couple = {
        name: site.size
        for name, site in sites.items()
        if options.family_of(SiteRole(site, coupled=True)).can_couple
        and site.encoding is None
        and name not in classes
        and name not in split
    }
    return InputOptions(
        deepset=options.pool is not None,
        can_couple=can_couple,
        rank=options.coupled_rank,
        sizes={name: site.size for name, site in sites.items()},
        lookups=found.lookups,
        loops=frozenset(found.traced.loops),
    )


def _families(
    options: GuideOptions,
    sites: Mapping[str, LatentSite],
    inputs: InputPlan,
    plates: Mapping[str, tuple[str, ...]],
    long: Mapping[str, str],
    facts: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Family], dict[str, Hashable]]:
    """Return for each site the family that serves it, and what the sites of one block have in common."""
    families: dict[str, Family] = {}
    keys: dict[str, Hashable] = {}
    classes = options.factor_classes()
    for name, site in sites.items():
        has_maps = name in inputs.per_element or name in inputs.non_exchangeable
        own_maps = has_maps and bool(plates[name])
        role = SiteRole(
            *(site, name in inputs.coupled, own_maps, classes.get(name), long.get(name)),
            **facts.get(name, {}),
        )
        families[name] = options.family_of(role)
        alone = (
            name if options.enumerate_sites else None
        )  # only then it meets the values of its parents alone
        keys[name] = families[name], families[name].block_key(role), alone
    return families, keys


def _scalars(sites: Mapping[str, LatentSite]) -> list[str]:
    return [name for name, site in sites.items() if site.size == 1 and site.encoding is None]


def _with_plain_factors(
    options: GuideOptions, sites: Mapping[str, LatentSite], families: Mapping[str, Family]
) -> set[str]:
    """Return the continuous sites whose factors are the package's, and no flows."""
    classes = options.factor_classes()
    return {
        name
        for name, site in sites.items()
        if site.encoding is None and name not in classes and isinstance(families[name], Normal | Spline)
    }


def _roles(
    options: GuideOptions,
    sites: Mapping[str, LatentSite],
    inputs: InputPlan,
    graph: ModelGraph,
    traced: TracedModel,
    scales: Collection[str],
) -> dict[str, dict[str, bool]]:
    """Return what a family that tells roles asks of each site beside its inputs; nothing for other families."""
    if not options.family.tells_roles:
        return {}
    nodes: Any = traced.trace.nodes
    outside = [name for name in _scalars(sites) if not graph.plates[name] and name not in traced.loops]

    def is_normal(data: str) -> bool:
        coordinate = gaussian_coordinate(nodes[data]["fn"])
        return coordinate is not None and not coordinate.standard

    fits_one = bool(inputs.per_element) and options.pool is None

    def is_skewed(name: str) -> bool:
        data = [child for child in graph.children(name) if child in graph.observed]
        few = math.prod(nodes[name]["fn"].batch_shape) <= MOST_ELEMENTS
        return fits_one and few and bool(graph.plates[name]) and not all(map(is_normal, data))

    return {
        name: {
            "is_global": len(outside) <= MOST_GLOBALS and name in outside,
            "sets_scale": name in scales,
            "normal_prior": is_normal_unconstrained(site, nodes[name]["fn"]),
            "skewed_by_data": is_skewed(name),
        }
        for name, site in sites.items()
    }


def _analytic_kl(
    options: GuideOptions,
    inputs: InputPlan,
    families: Mapping[str, Family],
    sites: Mapping[str, LatentSite],
    condition: Mapping[str, bool],
    sampled: Collection[str],
) -> dict[str, bool]:
    """Return for each site whether its KL term may be analytic: the condition holds, and its factor has one."""
    classes = options.factor_classes()
    found = {}
    for name, site in sites.items():
        family = families[name]
        factor = classes.get(name, family.factor if isinstance(family, Normal) else None)
        normal = site.is_real and len(site.event_shape) < 2 and factor in EXACT_KL
        found[name] = condition[name] and normal and name not in inputs.coupled and name not in sampled
    return found


def _not_fused(
    options: GuideOptions,
    sites: Mapping[str, LatentSite],
    inputs: InputPlan,
    split: Collection[str],
    changing: Collection[str],
) -> dict[str, str]:
    """Return the sites whose factor cannot be multiplied by a prior, with the reasons."""
    reasons = dict.fromkeys(changing, "its support depends on other latent sites")
    jointly = [name for name in inputs.coupled if sites[name].size > 1]
    reasons.update(dict.fromkeys(jointly, "its copies are vectors that are drawn jointly"))
    reasons.update(dict.fromkeys(split, "its elements have parents of their own"))
    reasons.update(dict.fromkeys(options.factor_classes(), "it has a factor of the user's"))
    family = options.family
    if isinstance(family, Normal) and family.factor is not NormalFactor:
        own = [name for name in sites if sites[name].encoding is None and name not in options.factors]
        reasons.update(dict.fromkeys(own, "it has a factor of the user's"))
    return {name: reason for name, reason in reasons.items() if name in sites}


# ---------------------------------------------------------------- refusals


def _another_run(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the sites of a run with other random numbers."""
    with quiet_run(model):
        seed_random_state(OTHER_SEED)
        return run_model(model, args, kwargs).nodes


def _require_possible_data(
    traced: TracedModel,
    encodings: InputEncodings,
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
) -> None:
    """Refuse data that no training could use: missing, of another shape, outside of a support or at its ends."""
    nodes: Any = traced.trace.nodes
    others: Any = None
    for name in traced.graph.observed:
        site = nodes.get(name)
        if site is None or name in traced.without_data or name in encodings.partly:
            continue
        require_shape(name, site)
        value = torch.as_tensor(site["value"])
        if value.is_meta:
            continue
        missing = int((~torch.isfinite(value)).sum()) if value.is_floating_point() else 0
        if missing:
            raise GraphflowsError(
                f"Expected finite data of {name!r}; {missing} of {value.numel()} entries are NaN or infinite. "
                f"{REMEDIES_OF_NAN}"
            )
        support = support_of(site["fn"])
        if not is_constant(support):  # with numbers, perhaps of latent sites
            others = _another_run(*call) if others is None else others
            if name not in others or not _same_bounds(support, support_of(others[name]["fn"])):
                continue
        mask = site_mask(site)
        seen = torch.as_tensor(True if mask is None else mask, device=value.device)
        log_density = log_density_at(site["fn"], value)
        if bool((log_density.isnan() & seen).any()):
            blame_missing_entries(*call, f"the density of {name!r} is no number.")
        wrong = outside_of_support(support, value, log_density) & seen
        if bool(wrong.any()):
            raise GraphflowsError(
                f"Expected data of {name!r} in the support of its distribution, {support}; {int(wrong.sum())} of "
                f"{wrong.numel()} values are outside of it."
            )
        at_end = at_an_end(support, value, log_density) & seen
        if bool(at_end.any()):
            others = _another_run(*call) if others is None else others
            if name in others:
                at_end &= torch.isinf(log_density_at(others[name]["fn"], value))
            if bool(at_end.any()):
                raise GraphflowsError(
                    f"Expected data of {name!r} with a finite density; {int(at_end.sum())} of {at_end.numel()} values "
                    f"are at an end of the support, {support}, where the density is zero or infinite. Move them "
                    "inside, as (y * (n - 1) + 0.5) / n does between 0 and 1, or give them a part of the model of "
                    "their own."
                )


def _masked_priors(traced: TracedModel) -> tuple[str, ...]:
    """Return the latent sites of which the prior is masked, but not what is computed from them.

    Their prior is flat, and what a guide says of them counts. Where what is computed from them is masked as well, as
    for padding, they count nowhere.
    """
    nodes: Any = traced.trace.nodes
    graph = traced.graph
    out = {name for name, node in nodes.items() if node["type"] == "sample" and is_masked_out(node)}
    found = []
    for node in graph.latent:
        name, children = _site_of(node, traced), [_site_of(child, traced) for child in graph.children(node)]
        half = name.endswith("_unobserved") and name.removesuffix("_unobserved") + "_observed" in nodes
        if name not in out or half or nodes[name]["fn"].support.is_discrete:
            continue
        if any(child in nodes and child not in out for child in children):
            found.append(name)
    return tuple(dict.fromkeys(found))


def _site_of(node: Any, traced: TracedModel) -> str:
    """Return the site that a node of a graph is, or is an element of."""
    return traced.elements[node][0] if node in traced.elements else node


def _require_data_of_flat_priors(traced: TracedModel) -> None:
    """Refuse improper priors on which no data depend: the posterior is improper too."""
    nodes: Any = traced.trace.nodes
    dag = traced.graph.to_networkx()
    for name in traced.graph.latent:
        improper = name in nodes and isinstance(undressed(nodes[name]["fn"]), dist.ImproperUniform)
        if improper and nx.descendants(dag, name).isdisjoint(traced.graph.observed):
            raise GraphflowsError(
                f"Expected data that depend on {name!r}, whose prior is improper; there are none in this call, so that "
                "its posterior is improper too. Set the guide up with data, guide.setup(*args), or give the site a "
                "proper prior."
            )


def _require_the_same_in_every_run(
    traced: TracedModel,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    strict: bool,
) -> None:
    """Refuse models whose sites, dependences or rows of data change with random numbers that are no site's."""
    found = changes(model, args, kwargs, traced)
    if found is None:
        return
    message = (
        f"Expected a model that is the same in every run with the same arguments; {found[0]}. {found[1]}."
    )
    if strict:
        raise UnsupportedModelError(
            f"{message} With strict=False a guide is made all the same; check_guide says that it is not safe."
        )
    warnings.warn(message, GraphflowsWarning, stacklevel=5)


def _known_covariates_alone(inputs: InputPlan, draws: ModelDraws) -> tuple[str, ...]:
    """Say which sites read covariates in summaries: joint samples all have the same, and no start knows others."""
    sites, covariates = set(), set()
    for site, summaries in inputs.summaries.items():
        pooled = {name for each in summaries if each.over and not each.one_by_one for name in each.members}
        found = {n for n in pooled & set(draws.traced.graph.inputs) if draws.argument(n).is_floating_point()}
        if found:
            sites.add(site)
            covariates |= found
    if not sites:
        return ()
    who, what = ", ".join(sorted(sites)), ", ".join(sorted(covariates))
    return (
        f"the start of {who}, from joint samples, knows the covariates {what} of set-up alone: data with others want "
        "training with such data, and k-hat tells where it is missing.",
    )


def _require_sites_by_position(
    traced: TracedModel, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse latent sites of a subsampled loop that are named by the index of the datum: they come and go."""
    plates = {name for loops in traced.loops.values() for name, _ in loops}
    if not plates.intersection(
        name for site in traced.graph.latent for name, _ in traced.loops.get(site, ())
    ):
        return
    nodes: Any = traced.trace.nodes
    rows = rows_of_plates(traced.trace)
    moved = {name: (rows[name] + 1) % nodes[name]["fn"].size for name in plates if name in rows}
    again = trace_once(model, args, kwargs, strict=False, indices=moved)
    lost = [name for name in traced.graph.latent if name not in again.graph.latent]
    if lost:
        raise UnsupportedModelError(
            f"Expected the same latent sites for every batch; {', '.join(map(repr, lost[:3]))} are named by the index "
            f"of the datum in the subsampled plate {', '.join(sorted(plates))}. Name them by position, for k, i in "
            'enumerate(pyro.plate(...)): pyro.sample(f"z_{k}", ...), or vectorise: with pyro.plate(...) as ind.'
        )


def _read_other_rows(
    readers: Mapping[str, Sequence[str]], traced: TracedModel, *, strict: bool
) -> tuple[str, ...]:
    """Refuse inputs of whose rows the guide would read others than the model does; if not strict, note it."""
    wrong = [name for name in traced.other_rows if name in readers]
    if not wrong:
        return ()
    message = (
        f"each element of plate {traced.other_rows[wrong[0]]!r} to depend on the row of its own of "
        f"{', '.join(map(repr, wrong))}: in order, or taken by the plate's indices, x[ind], "
        "x.index_select(0, ind) or pyro.subsample(x, event_dim=...); in the model it depends on another row "
        "(turned, sorted or delayed ones), or on one taken in a way that cannot be followed. Pass the tensor in "
        "the order in which the elements use it, and take rows by x[ind]."
    )
    if strict:
        raise UnsupportedModelError(f"Expected {message}")
    return (f"not faithful: expected {message}",)


def _require_known_indices(blocks: Collection[BlockPlan], inputs: InputPlan, traced: TracedModel) -> None:
    indices: dict[str, list[str]] = {}
    for block in blocks:
        for site in block.sites:
            used = {summary.index for summary in inputs.summaries.get(site, ())}
            for name in block.parents[site]:
                # Sites with parameters for each element need no index beside what it looks up.
                if name in traced.index_inputs and name not in used and site not in block.per_element:
                    indices.setdefault(name, []).append(site)
    if indices:
        named = "; ".join(f"{name} for {', '.join(sites)}" for name, sites in indices.items())
        raise UnsupportedModelError(
            f"Expected covariates of floating point; integers are taken as indices, and here the guide would "
            f"have to condition on some: {named}. Pass features of floating point (numbers, as those of trials, by "
            ".float(); classes as one-hot or an embedding)."
        )


def _changing_supports(
    traced: TracedModel, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, tuple[str, ...]]:
    """Return the latent sites whose support changes with the values of others, and these others.

    One run for each latent parent of such a site: the parent keeps its value at set-up, all else is at the feasible
    point, and the bounds are compared. Of a discrete parent other values are tried too, as that at set-up may be that
    of the feasible point.
    """
    nodes: Any = traced.trace.nodes
    suspects = [name for name in traced.graph.latent if not is_constant(support_of(nodes[name]["fn"]))]
    if not suspects:
        return {}
    reader = CallReader(traced, InputEncodings({}), readers={})
    plates = plates_of(traced.trace)
    indices = {name: plate.indices for name, plate in plates.items() if plate.indices is not None}
    still = reader.supports_given(model, args, kwargs, {}, indices)
    parents: dict[str, list[str]] = {name: [] for name in suspects}
    for other in traced.graph.latent:
        affected = [name for name in suspects if other in traced.graph.parents(name)]
        if affected:
            for value in _values_to_try(nodes[other]):
                moved = reader.supports_given(model, args, kwargs, {other: value}, indices)
                changed = [name for name in affected if not _same_bounds(still[name], moved[name])]
                for name in changed:
                    parents[name].append(other)
                    affected.remove(name)
    return {name: tuple(others) for name, others in parents.items() if others}


def _values_to_try(site: Mapping[str, Any]) -> list[Tensor]:
    value, fn = site["value"], undressed(site["fn"])
    if not fn.support.is_discrete:
        return [value]
    if not fn.has_enumerate_support:
        return [value, value + 1]
    found = fn.enumerate_support(expand=False)
    step = -(-len(found) // MOST_VALUES_TRIED)
    return [value, *(each.expand(value.shape) for each in (*found[::step], found[-1]))]


def _require_known_supports(
    changing: Mapping[str, tuple[str, ...]],
    sampling_order: list[str],
    order: object,
    sites: Mapping[str, LatentSite],
) -> None:
    """Refuse plans that sample a site before its support is known, and classes that come and go."""
    for name, others in changing.items():
        encoding = sites[name].encoding
        if encoding is not None and encoding.kind == "classes":
            raise UnsupportedModelError(
                f"Expected discrete latent sites with the same values at every call; those of {name!r} depend on "
                f"{', '.join(others)}. Use a range that holds them all, with probability zero for some."
            )
    for name, others in changing.items():
        late = [other for other in others if sampling_order.index(other) > sampling_order.index(name)]
        if late:
            raise UnsupportedModelError(
                f"Expected {name!r} to be sampled after {', '.join(late)}, on which its support depends; the "
                f"inverse {order!r} samples it before. Use inverse='reverse', which follows the model's order."
            )


def _same_bounds(one: Any, other: Any) -> bool:
    mine, theirs = vars(one), vars(other)
    for key, value in mine.items():
        if isinstance(value, constraints.Constraint):
            if not _same_bounds(value, theirs[key]):
                return False
        elif torch.is_tensor(value) and not torch.equal(value, theirs[key]):
            return False
    return True
