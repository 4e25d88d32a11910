"""The compiler's plan: which sites are sampled together, in what order, and what each is conditioned on.

An inverse graph says which nodes a latent site looks at. The plan turns it into *blocks*: sites in the same
plates that one network serves, level by level. What a block's sites look at outside of it enters the block's
network as *context*: elementwise where the plates agree, broadcast from outer plates. What is in a plate that a
site is not in (the data of a group, for the group's own variable) comes in as a summary over the plate, or
cannot be an input; the site then has parameters for each element of its plates, beside the network of what it
can see. Blocks are made as large as the inverse allows, so that the number of network calls is the number of
levels and not the number of sites.

A plan is complete when it is made, and nothing changes it.

**How a parent reaches a site**: elementwise, looked up, pooled, one by one, as means, or by per-element parameters
(:func:`plan_inputs`). A parent of a site in the inverse may be in a plate that the site is not in. Data there
reach the site through a summary (``pool="deepset"``, :mod:`~pyro_graphflows.guides.conditionals.pooling`), or
not at all: then the site has parameters for each element of its own plates, which fit one data set and are not
amortised. *Latent* parents there (crossed plates: the effects of the columns, for those of a row) are always
inputs, since parameters cannot follow what is sampled: as a summary, or, beside per-element parameters, one by
one where they are few; where they are many and data look up one of them each, as means of those that the data of
an element look up. Data whose elements look up a group by an index (``theta[group]``) are pooled group by
group.

A network that is shared along a plate takes the elements of the plate to be exchangeable given what it sees.
Constants of the model that vary along the plate and are no arguments (known standard errors in a closure) break that,
and so do parameters of the model for each index, or a mask. Where they are is found by a probe
(:func:`~pyro_graphflows.inspect.non_exchangeable_plates`); which latent sites they concern is read off the graph
(:func:`sites_concerned`). Such a site has an affine map for each index beside the shared network. So has one that reads
covariates which are no arguments: the network sees their rows, but nothing that it could learn from few rows comes near
maps that are exact for linear-Gaussian models. These maps hold for the rows that set-up had; with others the network
stands alone. A site whose copies stay dependent across a plate
(:mod:`~pyro_graphflows.guides.conditionals.coupled`) looks at the other elements of the plate too.
"""

import hashlib
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.graphs.separation import violated_independencies
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.guides.call import PlateState

__all__ = [
    "MOST_FITTED",
    "MOST_INDICES",
    "BlockPlan",
    "Conditioning",
    "Coupling",
    "InputOptions",
    "InputPlan",
    "NonExchangeable",
    "Plan",
    "PriorPlan",
    "Summary",
    "SummedSite",
    "make_blocks",
    "mean_field_condition",
    "plan_inputs",
    "readers_of",
    "sites_concerned",
    "subsampled_message",
    "ways_in",
    "with_embeddings",
    "with_fitted_maps",
    "with_scores",
]

MOST_ONE_BY_ONE = (
    64  # latent numbers in other plates up to which they are inputs one by one beside per-element parameters
)
MOST_COVARIATES = 8  # of data, with which products have means
MOST_COUPLED_PAIRS = 500  # numbers up to which the dependence across a plate has a parameter for each pair
MOST_COUPLED_IN_GROUPS = (
    128  # the same where other plates are around, for each of whose elements there are so many
)
DEFAULT_RANK = 4
WIDE = "not read: many numbers that simulations leave as they are"
MOST_INDICES = 2000  # up to which there is a regression for each
MOST_FITTED = 200  # the same for elements whose data are those that a guide is fitted to


@dataclass(frozen=True)
class Summary:
    """Nodes that come in together over plates.

    Attributes:
        members: The nodes, in graph order.
        over: The plates.
        one_by_one: Whether every element is an input by itself; else they are pooled.
        index: The input that tells which element of the one member each element looks up, in plate ``inner``.
        inner: See ``index``.
        segments: Triples (inner, outer, index): pooling over the inner plate gives one summary for each element of the
            outer one, of those that look it up by the index. Of what is looked up itself (``index``) these are means,
            also of its products with further members, covariates of the inner plate.
        embedded: Whether this is an embedding of one node, over no plates.
    """

    members: tuple[str, ...]
    over: tuple[str, ...]
    one_by_one: bool = False
    index: str | None = None
    inner: str | None = None
    segments: tuple[tuple[str, str, str], ...] = ()
    embedded: bool = False

    def inside(self, plates: Collection[str]) -> frozenset[str]:
        """Return the plates around a node, with those whose elements are looked up from inside them."""
        found = frozenset(plates)
        for _ in self.segments:
            found |= {outer for inner, outer, _ in self.segments if inner in found}
        return found

    @property
    def name(self) -> str:
        """The name of the summary among the inputs of a block.

        Example:
            >>> Summary(("w", "y"), ("data",)).name
            'pooled(w, y; data)'
        """
        if self.index is not None:
            groups = "".join(f" by {index}" for _, _, index in self.segments)
            found = ", ".join([f"{self.members[0]}[{self.index}]", *self.members[1:]])
            return f"mean({found}; {self.inner}{groups})" if groups else found
        if self.embedded:
            return f"embedding({self.members[0]})"
        by = {inner: f" by {index}" for inner, _, index in self.segments}
        over = ", ".join(plate + by.get(plate, "") for plate in self.over)
        return f"{'all' if self.one_by_one else 'pooled'}({', '.join(self.members)}; {over})"


@dataclass(frozen=True)
class Coupling:
    """How the copies of a site are drawn jointly.

    Attributes:
        plates: The plates across which its copies are dependent.
        rank: The number of columns of the two low-rank parts; 0 for a parameter for each pair.
    """

    plates: tuple[str, ...]
    rank: int


@dataclass(frozen=True)
class NonExchangeable:
    """The latent sites that constants in a model concern.

    Attributes:
        own: For each such site, the plates around it for whose indices it needs something of its own.
        outside: For each such site that constants concern in plates it is not in, these plates.
        at_rows: For each site that needs it because of inputs alone that are the same in every call, as long as nobody
            changes them: these inputs.
    """

    own: dict[str, tuple[str, ...]] = field(default_factory=dict)
    outside: dict[str, tuple[str, ...]] = field(default_factory=dict)
    at_rows: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def with_known_rows(
        self,
        inverse: InverseGraph,
        by_rows: Mapping[str, tuple[str, ...]],
        inputs: Sequence[str],
        plates: Mapping[str, PlateState],
    ) -> "NonExchangeable":
        """Return the same with sites that only inputs with known rows concern.

        Args:
            inverse: The guide's factorisation.
            by_rows: What :func:`sites_concerned` takes, with the inputs counted as constants.
            inputs: The inputs from outside of the call, whose rows stay.
            plates: The plates at set-up.
        """
        own, at_rows = dict(self.own), {}
        for site, around in sites_concerned(inverse, by_rows).own.items():
            read = tuple(name for name in inputs if name in inverse.parents[site])
            along = {*around, *(plate for name in read for plate in inverse.graph.plates[name])}
            around = tuple(plate for plate in inverse.graph.plates[site] if plate in along)
            many = math.prod(plates[name].full_size for name in around) > MOST_INDICES
            if site not in own and read and not many and not any(plates[name].subsampled for name in around):
                own[site], at_rows[site] = around, read
        return replace(self, own=own, at_rows=at_rows)


def sites_concerned(
    inverse: InverseGraph, non_exchangeable: Mapping[str, tuple[str, ...]]
) -> NonExchangeable:
    """Return which latent sites must tell the indices of a plate apart.

    Args:
        inverse: The guide's factorisation.
        non_exchangeable: For sites of the model, latent or observed, the plates whose indices are not alike there.

    Example:
        >>> graph = ModelGraph(["mz", "zx"], observed=["x"], plates={"z": ["data"], "x": ["data"]})
        >>> inverse = InverseGraph(graph, {"m": ["x"], "z": ["m", "x"]})
        >>> sites_concerned(inverse, {"x": ("data",)})
        NonExchangeable(own={'z': ('data',)}, outside={'m': ('data',)}, at_rows={})
    """
    if not non_exchangeable:
        return NonExchangeable()
    graph = inverse.graph
    constants = {("constants", site): (site, plates) for site, plates in non_exchangeable.items()}
    extended = ModelGraph(
        [*graph.edges, *((constant, site) for constant, (site, _) in constants.items())],
        graph.observed,
        inputs=[*graph.inputs, *constants],
        marginalised=graph.marginalised,
        plates={**graph.plates, **{constant: plates for constant, (_, plates) in constants.items()}},
        nodes=graph.nodes,
    )
    blind = InverseGraph(
        extended, inverse.parents, sampling_order=inverse.sampling_order, coupled=inverse.coupled
    )
    own: dict[str, tuple[str, ...]] = {}
    outside: dict[str, tuple[str, ...]] = {}
    for violated in violated_independencies(blind):
        if violated.other in constants:
            site, plates = violated.node, constants[violated.other][1]
            around = graph.plates[site]
            mine = set(own.get(site, ())) | (set(plates) & set(around))
            if mine:
                own[site] = tuple(plate for plate in around if plate in mine)
            beyond = dict.fromkeys((*outside.get(site, ()), *(p for p in plates if p not in around)))
            if beyond:
                outside[site] = tuple(beyond)
    return NonExchangeable(own, outside)


def subsampled_message(plate: str, names: Sequence[str]) -> str:
    """Say why a subsampled plate is not pooled, and what to do."""
    return (
        f"Expected plate {plate!r} in full, since the guide pools {', '.join(names)} over it (pool='deepset'); it is "
        "subsampled. With a summary of the same batch that the likelihood is scaled up from, the objective is not a "
        "bound on the evidence. Use the full data in each call, or pool=None (per-element parameters for the "
        "outer sites, which a subsampled plate allows), or train with InferenceCompilation on whole data sets."
    )


@dataclass(frozen=True)
class InputOptions:
    """What a guide asks for.

    Attributes:
        deepset: Whether data are pooled.
        can_couple: The sizes of the sites whose copies can be drawn jointly.
        rank: The rank of these; None to choose.
        sizes: The sizes of the latent sites.
        lookups: For pairs (inner, outer) of plates, the index by which each element of the inner one looks up one of
            the outer; None if it is no argument.
        loops: The nodes inside subsampled plates that are Python loops.
    """

    deepset: bool = False
    can_couple: Mapping[str, int] = field(default_factory=dict)
    rank: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    lookups: Mapping[tuple[str, str], str | None] = field(default_factory=dict)
    loops: Collection[str] = ()


@dataclass(frozen=True)
class InputPlan:
    """The outcome of :func:`plan_inputs`.

    Attributes:
        summaries: For each site that has some, its summaries.
        per_element: The sites with parameters for each element of their plates.
        non_exchangeable: The sites with a map for each index of some plates, and these plates.
        at_rows: For those of them whose maps are made for the rows that some inputs have at set-up: these inputs.
        coupled: The sites whose copies are drawn jointly.
        remarks: Remarks on a site.
        missing: The dependences of the posterior that the guide will not have, each with what to do.
    """

    summaries: dict[str, tuple[Summary, ...]] = field(default_factory=dict)
    per_element: frozenset[str] = frozenset()
    non_exchangeable: dict[str, tuple[str, ...]] = field(default_factory=dict)
    at_rows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    coupled: dict[str, Coupling] = field(default_factory=dict)
    remarks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def plan_inputs(
    inverse: InverseGraph,
    plates: Mapping[str, PlateState],
    with_data: Collection[str],
    indices: Collection[str],
    options: InputOptions | None = None,
    constants: NonExchangeable | None = None,
) -> InputPlan:
    """Decide how what is in other plates comes in.

    Args:
        inverse: The guide's factorisation.
        plates: The plates at set-up.
        with_data: The nodes whose data can be network inputs.
        indices: The inputs of an integer type.
        options: What is asked for.
        constants: The sites that constants in the model concern.

    Raises:
        UnsupportedModelError: If data would be pooled over a subsampled plate.
    """
    options = options or InputOptions()
    planner = _Planner(inverse, plates, with_data, indices, options, constants or NonExchangeable())
    for site in inverse.sampling_order:
        planner.visit(site)
    remarks = {site: tuple(lines) for site, lines in planner.remarks.items() if lines}
    return InputPlan(
        planner.summaries,
        frozenset(planner.per_element),
        planner.constants.own,
        planner.constants.at_rows,
        planner.coupled,
        remarks,
        tuple(planner.missing),
    )


class _Planner:
    def __init__(
        self,
        inverse: InverseGraph,
        plates: Mapping[str, PlateState],
        with_data: Collection[str],
        indices: Collection[str],
        options: InputOptions,
        constants: NonExchangeable,
    ) -> None:
        self.inverse, self.plates, self.options, self.constants = inverse, plates, options, constants
        self.with_data, self.indices = with_data, indices
        self.around: Mapping[str, tuple[str, ...]] = inverse.graph.plates
        self.latent = set(inverse.graph.latent)
        self.summaries: dict[str, tuple[Summary, ...]] = {}
        self.per_element: set[str] = set()
        self.coupled: dict[str, Coupling] = {}
        self.remarks: dict[str, list[str]] = {site: [] for site in inverse.sampling_order}
        self.missing: list[str] = []

    def visit(self, site: str) -> None:
        """Decide for one site."""
        remarks = self.remarks[site]
        if site in self.constants.own:
            rows = ", ".join(self.constants.at_rows.get(site, ()))
            why = (
                f"for the rows of {rows} that set-up had, where that is better than one for all"
                if rows
                else "along which constants or parameters in the model vary (pass constants as arguments to share one)"
                ", or which data in no such plate tell apart"
            )
            remarks.append(f"a map of its own for each index of {', '.join(self.constants.own[site])}, {why}")
        coupling = self._coupled_plates(site)
        parents = self.inverse.parents[site]
        pooled = [parent for parent in parents if self.inverse.how[parent, site] == "pooled"]
        along = [parent for parent in parents if parent in pooled or set(self.around[parent]) & set(coupling)]
        amortise = self.options.deepset and self._can_pool(site, along)
        data = [parent for parent in along if parent in self.with_data]
        latents = self._latents(site, [parent for parent in along if parent in self.latent], coupling)
        if not amortise and len(data) + sum(parent in self.indices for parent in along):
            self.per_element.add(site)
        elif not amortise and any(parent in pooled and parent not in self.latent for parent in along):
            self.per_element.add(site)  # parents without data: a factor's term for each element
        found: list[Summary | None] = [s for p in latents if (s := self._look_up(site, p)) is not None]
        latents = [p for p in latents if self._look_up(site, p) is None]
        if amortise:
            found += [self._summary(site, part, data, latents, ()) for part in self._apart(pooled)]
            if coupling:
                found += [self._summary(site, part, data, latents, coupling) for part in self._apart(along)]
        elif site in self.per_element and self._count(site, latents, coupling) <= MOST_ONE_BY_ONE:
            found.append(self._summary(site, latents, [], latents, coupling, one_by_one=True))
        else:
            means = {p: each for p in latents if (each := self._means_of_looked_up(site, p))}
            latents = [p for p in latents if p not in means]
            unknown = [p for p in latents if site in self.per_element and self._is_hidden(site, p)]
            if unknown:
                self.remarks[site].append(
                    f"{', '.join(unknown)} come in as means of all: which of them the data of an element look up is "
                    "reported by no argument (pass the indices as arguments of an integer type)"
                )
            found += [mean for parts in means.values() for mean in parts]
            found.append(self._summary(site, latents, [], latents, coupling))
        summaries = tuple(dict.fromkeys(summary for summary in found if summary is not None))
        if summaries:
            self.summaries[site] = summaries
        if coupling:
            self._couple(site, coupling)

    def _coupled_plates(self, site: str) -> tuple[str, ...]:
        """Return the plates across which a site's copies will be drawn jointly."""
        coupled = self.inverse.coupled.get(site, ())
        if not coupled:
            return ()
        partial = [name for name in coupled if self.plates[name].subsampled]
        if partial:
            self._not_faithful(
                site,
                f"copies of {site} stay dependent across {', '.join(coupled)} in the posterior, and are independent "
                f"here ({partial[0]} is subsampled)",
                f"Set up and call the guide with all of plate {partial[0]!r}: the copies are then drawn jointly.",
            )
            return ()
        if site not in self.options.can_couple:
            self._not_faithful(
                site,
                f"copies of {site} stay dependent across {', '.join(coupled)} in the posterior, and are independent "
                "here (only normal factors of whole continuous sites are drawn jointly)",
                "Use the normal factor and resolution='site' for it if it is continuous, or let the model sum over "
                'its values (infer={"enumerate": "parallel"}) if it is discrete and Pyro can.',
            )
            return ()
        return tuple(name for name in self.around[site] if name in coupled)

    def _not_faithful(self, site: str, what: str, remedy: str) -> None:
        self.remarks[site].append(f"not faithful: {what}")
        self.missing.append(f"Not faithful: {what}. {remedy}")

    def _can_pool(self, site: str, along: Collection[str]) -> bool:
        if any(parent in self.options.loops for parent in along):
            self.remarks[site].append("not pooled: data are in a subsampled plate that is a Python loop")
            return False
        beyond = self.constants.outside.get(site, ())
        if beyond:
            self.remarks[site].append(
                f"not pooled: constants or parameters in the model vary along {', '.join(beyond)} (pass constants as "
                "arguments to pool them with the data)"
            )
        inner = dict.fromkeys(plate for parent in along for plate in self.around[parent])
        outer = {plate: [o for i, o in self.options.lookups if i == plate] for plate in inner}
        crossed = [plate for plate, others in outer.items() if len(others) > 1]
        unknown = [
            p for p, others in outer.items() if any(self.options.lookups[p, o] is None for o in others)
        ]
        known = {self.options.lookups[p, o] for p, others in outer.items() for o in others}
        strange = [parent for parent in along if parent in self.indices and parent not in known]
        if crossed:
            self.remarks[site].append(
                f"not pooled: elements of {', '.join(crossed)} look up others in several plates at once "
                f"({', '.join(outer[crossed[0]])})"
            )
        if unknown:
            self.remarks[site].append(
                f"not pooled: which element of {', '.join(outer[unknown[0]])} an element of {unknown[0]} looks up is "
                "reported by no argument (pass the index as an argument of an integer type)"
            )
        if strange:
            self.remarks[site].append(
                f"not pooled: {', '.join(strange)} would be an index, and what it looks up is not known (pass features "
                "of floating point)"
            )
        return not (beyond or crossed or unknown or strange)

    def _segments(self, site: str, over: Collection[str]) -> tuple[tuple[str, str, str], ...]:
        """Return where pooling over a plate gives a summary for each element of another."""
        targets = {*over, *self.around[site]}
        return tuple(
            (inner, outer, index)
            for (inner, outer), index in self.options.lookups.items()
            if inner in over and outer in targets and index is not None
        )

    def _latents(self, site: str, latents: list[str], coupling: Collection[str]) -> list[str]:
        """Return the latent parents that can be inputs: those whose plates are complete."""
        kept = []
        for parent in latents:
            if parent in self.options.loops:
                self._not_faithful(
                    site,
                    f"{parent} in a subsampled loop cannot be an input of {site}, which is outside of it",
                    f"Take an inverse that samples {site} first.",
                )
                continue
            partial = [name for name in self._over(site, [parent], coupling) if self.plates[name].subsampled]
            if not partial:
                kept.append(parent)
                continue
            self._not_faithful(
                site,
                f"{parent} in the subsampled plate {partial[0]} cannot be an input of {site}, which is outside of it",
                f"Set up and call the guide with all of plate {partial[0]!r}, or take an inverse that samples {site} "
                "first.",
            )
        return kept

    def _look_up(self, site: str, parent: str) -> Summary | None:
        """Return how a latent parent's element is looked up, if it is in one plate only and an index tells."""
        if len(self.around[parent]) != 1:
            return None
        (outer,) = self.around[parent]
        for inner in self.around[site]:
            index = self.options.lookups.get((inner, outer))
            if index is not None and outer not in self.around[site]:
                return Summary((parent,), (outer,), index=index, inner=inner)
        return None

    def _is_hidden(self, site: str, parent: str) -> bool:
        """Whether elements of one plate look up both a site and a parent in another plate, by what is no argument."""
        around = set(self.around[site]), set(self.around[parent])
        if around[0] & around[1]:
            return False
        indices = [
            {i: index for (i, o), index in self.options.lookups.items() if o in each} for each in around
        ]
        return any(None in (indices[0][i], indices[1][i]) for i in indices[0].keys() & indices[1].keys())

    def _means_of_looked_up(self, site: str, parent: str) -> list[Summary]:
        """Return how means of a parent in a crossed plate come in, one for each plate whose data look up both."""
        if len(self.around[parent]) != 1 or len(self.around[site]) != 1:
            return []
        (outer,), (own,) = self.around[parent], self.around[site]
        found = []
        for (inner, other), index in self.options.lookups.items():
            group = self.options.lookups.get((inner, own))
            if other != outer or outer == own or index is None or group is None:
                continue
            if not any(self.plates[name].subsampled for name in (inner, outer, own)):
                segments = ((inner, own, group),)
                members = (parent, *self._covariates(site, parent, inner))
                found.append(Summary(members, (outer,), index=index, inner=inner, segments=segments))
        return found

    def _covariates(self, site: str, parent: str, inner: str) -> list[str]:
        """Return the numbers of each element of a plate on which its data depend beside a site and a parent.

        An effect that is multiplied by one of them depends on means of products with it.
        """
        graph = self.inverse.graph
        met = [graph.parents(node) for node in graph.observed if self.around[node] == (inner,)]
        beside = dict.fromkeys(p for parents in met if {site, parent} <= set(parents) for p in parents)
        found = [
            name
            for name in beside
            if name in self.inverse.parents[site]
            and name in self.with_data
            and name not in self.indices
            and name not in graph.observed
            and self.around[name] == (inner,)
            and graph.event_sizes.get(name) == 1
        ]
        return found if len(found) <= MOST_COVARIATES else []

    def _over(self, site: str, members: Collection[str], coupling: Collection[str]) -> tuple[str, ...]:
        """Return the plates over which members are pooled, outer to inner as far as they are nested."""
        own = [name for name in self.around[site] if name not in coupling]
        return tuple(dict.fromkeys(n for member in members for n in self.around[member] if n not in own))

    def _over_groups(self, site: str, members: Collection[str], coupling: Collection[str]) -> tuple[str, ...]:
        """Return these plates with those that their elements look up: data in groups are pooled group by group."""
        over = list(self._over(site, members, coupling))
        own = [name for name in self.around[site] if name not in coupling]
        for inner in over:  # grows meanwhile: groups may look up others
            over += [
                outer
                for (one, outer), index in self.options.lookups.items()
                if one == inner and index is not None and outer not in own and outer not in over
            ]
        return tuple(over)

    def _apart(self, members: Sequence[str]) -> list[list[str]]:
        """Return members in groups that can be joined elementwise: no two plates of a group have one dimension."""
        groups: list[list[str]] = []
        for member in members:
            for group in groups:
                around = {name for other in (*group, member) for name in self.around[other]}
                if len({self.plates[name].dim for name in around}) == len(around):
                    group.append(member)
                    break
            else:
                groups.append([member])
        return groups

    def _summary(
        self,
        site: str,
        chosen: Collection[str],
        data: Collection[str],
        latents: Collection[str],
        coupling: Collection[str],
        one_by_one: bool = False,
    ) -> Summary | None:
        members = [p for p in self.inverse.parents[site] if p in chosen and (p in data or p in latents)]
        over = (
            self._over(site, members, coupling) if one_by_one else self._over_groups(site, members, coupling)
        )
        partial = [name for name in over if self.plates[name].subsampled]
        if partial:
            raise UnsupportedModelError(subsampled_message(partial[0], members))
        if not members:
            return None
        segments = () if one_by_one else self._segments(site, over)
        return Summary(tuple(members), over, one_by_one, segments=segments)

    def _count(self, site: str, latents: Collection[str], coupling: Collection[str]) -> int:
        """Return how many numbers latent parents have in other plates."""
        total = 0
        for parent in latents:
            number = self.options.sizes.get(parent, MOST_ONE_BY_ONE + 1)
            for name in self._over(site, [parent], coupling):
                number *= self.plates[name].size
            total += number
        return total

    def _couple(self, site: str, coupling: tuple[str, ...]) -> None:
        length = self.options.can_couple[site]
        for name in coupling:
            length *= self.plates[name].size
        rank = self.options.rank
        if rank is None:
            # the elements are always the same ones
            own = set(self.constants.own.get(site, ()))
            known = site in self.per_element or (
                set(coupling) <= own and set(coupling) == set(self.around[site])
            )
            in_groups = set(self.around[site]) - set(coupling)
            most = MOST_COUPLED_IN_GROUPS if in_groups else MOST_COUPLED_PAIRS
            rank = 0 if known and length <= most else DEFAULT_RANK
        self.coupled[site] = Coupling(coupling, rank)
        how = f"of rank {rank}" if rank else "with a parameter for each pair"
        self.remarks[site].append(
            f"copies are drawn jointly across {', '.join(coupling)}, where they stay dependent: a normal {how}"
        )


@dataclass(frozen=True)
class SummedSite:
    """A site with a factor for each element of a plate.

    Attributes:
        summary: The name of the summary of the plate, among the inputs of the site's block.
        responses: The members of the summary that depend on the site in the model.
        above: What else the site looks at: sites and inputs that come in elementwise.
        only_summed: Whether the site is fused with its prior for the sake of these factors alone.
    """

    summary: str
    responses: tuple[str, ...]
    above: tuple[str, ...]
    only_summed: bool = False


@dataclass(frozen=True)
class PriorPlan:
    """Which sites are fused, and the runs of the model that give their priors.

    Attributes:
        runs: For each depth the sites whose priors are known after its run; those of depth 0 have no latent parents.
        stages: For each depth the number of the level before which the run takes place.
        constant: The sites of depth 0 whose priors depend on nothing in a call, the model's parameters apart.
        ranks: For each latent site the numbers of batch and of event dimensions of its values.
        batches: Whether a run of the model takes values with further dimensions on the left.
        checked: Whether priors with a parameter out of its range are refused, or kept for others to see.
    """

    runs: tuple[tuple[str, ...], ...] = ((),)
    stages: tuple[int, ...] = (0,)
    constant: frozenset[str] = frozenset()
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    batches: bool = True
    checked: bool = True

    @cached_property
    def sites(self) -> frozenset[str]:
        """The fused sites."""
        return frozenset(site for run in self.runs for site in run)


@dataclass(frozen=True)
class Conditioning:
    """One node outside a block that the block's network sees, and how it comes in; or a summary of several.

    Attributes:
        name: The node, or the name of a summary.
        how: ``"same"``, ``"broadcast"`` or ``"pooled"``.
        summary: What a summary is made of.
        score_of: The site whose score this is.
    """

    name: str
    how: str
    summary: Summary | None = None
    score_of: str | None = None


@dataclass(frozen=True)
class BlockPlan:
    """Latent sites in the same plates that are sampled together, level by level.

    Attributes:
        plates: The plates around every site of the block, outer to inner.
        levels: The sites; those of one level depend on context and on earlier levels only.
        context: The nodes outside the block that its network reads, in graph order, and summaries.
        parents: For each site, the parents in the inverse that its network sees (context and sites of earlier
            levels); instead of pooled parents, their summary if there is one.
        per_element: The sites with parameters for each element of their plates, since some of their parents
            are in plates that they are not in.
        non_exchangeable: For sites that need an affine map for each index of some plates, these plates.
        at_rows: For those of them whose maps hold for the rows that some nodes had at set-up: these nodes.
        fitted: Those of them whose maps are for the data that the guide is fitted to, and are there only if it starts
            from draws for these.
        coupled: The sites whose copies are drawn jointly across plates.
        fused: The sites whose conditionals are their priors times a factor.
        summed: Those that may have one factor for each element of a plate instead.
        by_shape: Those that the start may leave without their prior, where they fit joint samples better.
        scales: The latent sites of the model that set the scale of others' priors.
    """

    plates: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]
    context: tuple[Conditioning, ...]
    parents: Mapping[str, tuple[str, ...]]
    per_element: tuple[str, ...] = ()
    non_exchangeable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    at_rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fitted: tuple[str, ...] = ()
    coupled: Mapping[str, Coupling] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    summed: Mapping[str, SummedSite] = field(default_factory=dict)
    by_shape: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()

    @property
    def only_summed(self) -> frozenset[str]:
        """The sites that are fused only if they have a factor for each element of a plate."""
        return frozenset(site for site, each in self.summed.items() if each.only_summed)

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The sites in sampling order."""
        return tuple(site for level in self.levels for site in level)


@dataclass(frozen=True)
class Plan:
    """What a guide does at each call, and why.

    Attributes:
        graph: The graph of the model's sites.
        inverse: The factorisation, over sites.
        inputs: How what is in other plates comes in.
        blocks: The blocks in sampling order.
        analytic_kl: For each site whether its KL term may be analytic.
        labels: What is said of a site beside its inputs.
        ways: For pairs (parent, site), how the parent comes in where that is not elementwise.
        changing: The sites whose support depends on other latent sites, and these.
        enumerated: The sites that the guide marks for enumeration.
        copies: The Delta sites of the model that the guide repeats.
        notes: Notes on the model as it was traced.
        hints: What else could be asked for.
        priors: Which sites are fused with their priors, and the runs of the model that give these.
        not_fused: Why sites that depend on others in the model are not fused.
        judged: The inverse whose faithfulness counts, where it is another than ``inverse``: of elements, or with plates
            nested by an index.
    """

    graph: ModelGraph
    inverse: InverseGraph
    inputs: InputPlan
    blocks: tuple[BlockPlan, ...]
    analytic_kl: Mapping[str, bool]
    labels: Mapping[str, str] = field(default_factory=dict)
    ways: Mapping[tuple[object, object], str] = field(default_factory=dict)
    changing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    enumerated: frozenset[str] = frozenset()
    copies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    judged: InverseGraph | None = None
    priors: PriorPlan = field(default_factory=PriorPlan)
    not_fused: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> bytes:
        """Return what tells plans apart whose networks read other things, or in another order."""
        read = [
            (b.plates, b.levels, [node.name for node in b.context], sorted(b.parents.items()), b.per_element)
            for b in self.blocks
        ]
        return hashlib.sha256(repr(read).encode()).digest()

    def missing_with(self, observed: Collection[str]) -> tuple[tuple[str, str], ...]:
        """Return the dependences that are missing where some latent sites are observed, beside those always missing.

        Sites with per-element parameters read no data, these sites' values neither: they fit them.

        Args:
            observed: Sites that are latent in the plan and have data in a call.

        Returns:
            Pairs (site, other site) of which the first should depend on the second.
        """
        inverse = self.judged or self.inverse
        rest = [site for site in inverse.sampling_order if site not in observed]
        then = InverseGraph(
            inverse.graph.with_observed(observed),
            {site: inverse.parents[site] for site in rest},
            sampling_order=rest,
            coupled={site: plates for site, plates in inverse.coupled.items() if site in rest},
        )
        always = {frozenset((each.node, each.other)) for each in violated_independencies(inverse)}
        found = {(each.node, each.other): None for each in violated_independencies(then)}
        return tuple(
            pair for pair in found if frozenset(pair) not in always and pair[0] not in self.inputs.per_element
        )

    def require_served(self, observed: Collection[str]) -> None:
        """Refuse a call in which some latent sites are observed if the guide is not faithful then.

        Args:
            observed: Sites that are latent in the plan and have data in a call.

        Raises:
            UnsupportedModelError: If a dependence is missing, beside those always missing.
        """
        missing = self.missing_with(observed)
        if missing:
            site, other = missing[0]
            raise UnsupportedModelError(
                f"Expected data for {site!r} too where there are some for {other!r}: {site!r} depends on it, and is "
                f"sampled before {other!r} without looking at it. Name the optional sites in another order "
                f"(optional={[other, site]}), or set up a guide of its own for such calls."
            )


def mean_field_condition(graph: ModelGraph, inverse: InverseGraph) -> dict[str, bool]:
    r"""Return for each latent site whether its KL term may be computed analytically.

    :class:`~pyro.infer.TraceMeanField_ELBO` replaces the term of a site ``z`` by the KL divergence between the
    guide's and the model's conditional at the sampled values of their parents. That is right if, and for generic
    parameters only if, no model parent of ``z`` descends from ``z`` in the guide.

    Args:
        graph: The model graph.
        inverse: The guide's factorisation.

    Returns:
        A dict from site to truth value.

    Example:
        >>> graph = ModelGraph([("a", "b"), ("b", "x")], observed=["x"])
        >>> mean_field_condition(graph, InverseGraph(graph, {"a": ["b"], "b": ["x"]}))
        {'a': True, 'b': False}
    """
    dag = inverse.to_networkx()
    marginalised = set(graph.marginalised)
    return {
        site: marginalised.isdisjoint(parents := graph.parents(site))
        and nx.descendants(dag, site).isdisjoint(parents)
        for site in graph.latent
    }


def make_blocks(
    inverse: InverseGraph, inputs: InputPlan, readable: Collection[str], kinds: Mapping[str, Hashable]
) -> tuple[BlockPlan, ...]:
    """Group the sites of an inverse into blocks.

    Args:
        inverse: The guide's factorisation.
        inputs: How what is in other plates comes in.
        readable: The nodes whose values can be network inputs; others are left out of the context.
        kinds: For each site its kind. Only sites of the same kind share a block.

    Returns:
        The blocks, made greedily in sampling order: a block takes in every site of its plates whose
        parents are in earlier blocks or in the block itself.
    """
    graph = inverse.graph
    latent = set(graph.latent)
    done: set[str] = set()
    blocks = []
    remaining = list(inverse.sampling_order)
    rank = {node: i for i, node in enumerate(graph.nodes)}
    while remaining:
        plates, first = graph.plates[remaining[0]], kinds[remaining[0]]
        depth: dict[str, int] = {}
        for site in remaining:  # parents come first in the sampling order
            latents = [parent for parent in inverse.parents[site] if parent in latent]
            alike = graph.plates[site] == plates and kinds[site] == first
            pooled = {member for summary in inputs.summaries.get(site, ()) for member in summary.members}
            if alike and pooled & latent <= done and all(p in done or p in depth for p in latents):
                depth[site] = 1 + max((depth[p] for p in latents if p in depth), default=-1)
        levels: list[list[str]] = [[] for _ in range(1 + max(depth.values()))]
        for site in remaining:
            if site in depth:
                levels[depth[site]].append(site)
        seen = {
            site: tuple(parent for parent in inverse.parents[site] if inverse.how[parent, site] != "pooled")
            for site in depth
        }
        context = {
            parent: inverse.how[parent, site]
            for site, parents in seen.items()
            for parent in parents
            if parent not in depth and (parent in latent or parent in readable)
        }
        summaries = {s.name: s for site in depth for s in inputs.summaries.get(site, ())}
        for site in depth:
            seen[site] += tuple(summary.name for summary in inputs.summaries.get(site, ()))
        blocks.append(
            BlockPlan(
                plates=plates,
                levels=tuple(map(tuple, levels)),
                context=(
                    *(Conditioning(name, context[name]) for name in sorted(context, key=rank.__getitem__)),
                    *(Conditioning(name, "pooled", summary) for name, summary in summaries.items()),
                ),
                parents=seen,
                per_element=tuple(site for site in depth if site in inputs.per_element),
                non_exchangeable={
                    site: inputs.non_exchangeable[site] for site in depth if site in inputs.non_exchangeable
                },
                at_rows={site: inputs.at_rows[site] for site in depth if site in inputs.at_rows},
                coupled={site: inputs.coupled[site] for site in depth if site in inputs.coupled},
            )
        )
        done |= set(depth)
        remaining = [site for site in remaining if site not in depth]
    return tuple(blocks)


def with_embeddings(blocks: Sequence[BlockPlan], embedded: Collection[str]) -> tuple[BlockPlan, ...]:
    """Return blocks whose sites read embeddings of some nodes in their place, where these come in elementwise.

    Args:
        blocks: The blocks.
        embedded: The nodes.
    """
    found = []
    for block in blocks:
        new = {
            node.name: Conditioning(name, "pooled", summary)
            for node in block.context
            if node.name in embedded
            for summary in [Summary((node.name,), (), embedded=True)]
            for name in [summary.name]
        }
        names = {name: node.name for name, node in new.items()}
        context = (
            *(node for node in block.context if node.name not in new),
            *new.values(),
        )
        parents = {
            site: tuple(names.get(name, name) for name in seen) for site, seen in block.parents.items()
        }
        found.append(replace(block, context=context, parents=parents))
    return tuple(found)


def with_scores(
    blocks: Sequence[BlockPlan], names: Mapping[str, str], left_out: Mapping[str, Collection[str]]
) -> tuple[BlockPlan, ...]:
    """Return blocks whose sites read scores too.

    Args:
        blocks: The blocks.
        names: For each site that reads one, the name of its score.
        left_out: The nodes that a site does not read any more.
    """
    found = []
    for block in blocks:
        mine = {site: names[site] for site in block.sites if site in names}
        scores = tuple(Conditioning(name, "same", score_of=site) for site, name in mine.items())
        parents = {
            site: tuple(name for name in seen if name not in left_out.get(site, ()))
            for site, seen in block.parents.items()
        }
        parents.update({site: (*parents[site], name) for site, name in mine.items()})
        read = {name for seen in parents.values() for name in seen}
        context = tuple(node for node in (*block.context, *scores) if node.name in read)
        found.append(replace(block, context=context, parents=parents))
    return tuple(found)


def with_fitted_maps(
    blocks: Sequence[BlockPlan],
    sites: Collection[str],
    data: Collection[str],
    plates: Mapping[str, PlateState],
) -> tuple[BlockPlan, ...]:
    """Return blocks in which sites that read the data of their own plates may have a map for each element.

    A network that effects share follows the data of all elements alike, and where they are few, or say little, it is
    nats off. A guide that fits one data set may do without: its maps hold for the rows of these data.

    Args:
        blocks: The blocks.
        sites: The sites whose families have such maps.
        data: The nodes that are data, and no indices.
        plates: The plates at set-up.
    """
    found = []
    for block in blocks:
        around = [plates[name] for name in block.plates]
        size = math.prod(plate.full_size for plate in around)
        plain = {node.name: node.how for node in block.context if node.summary is None and not node.score_of}
        other = {*block.per_element, *block.non_exchangeable, *block.coupled, *block.summed}
        rows = {}
        for site in block.sites if 1 < size <= MOST_FITTED and not any(p.subsampled for p in around) else ():
            read = tuple(name for name in block.parents[site] if name in data and name in plain)
            if site in sites and site not in other and any(plain[name] == "same" for name in read):
                rows[site] = read
        own = {**block.non_exchangeable, **dict.fromkeys(rows, block.plates)}
        at_rows = {**block.at_rows, **rows}
        found.append(replace(block, non_exchangeable=own, at_rows=at_rows, fitted=tuple(rows)))
    return tuple(found)


def readers_of(blocks: Sequence[BlockPlan], latent: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the observed nodes and inputs whose values latent sites read, and these sites.

    Args:
        blocks: The blocks of a plan.
        latent: The latent sites.
    """
    found: dict[str, list[str]] = {}
    for block in blocks:
        summaries = {node.name: node.summary for node in block.context if node.summary is not None}
        names = {node.name for node in block.context}
        for site in block.sites:
            for parent in block.parents[site]:
                summary = summaries.get(parent)
                if summary is not None:
                    indices = [index for _, _, index in summary.segments]
                    seen = [*summary.members, *indices, *([] if summary.index is None else [summary.index])]
                else:
                    seen = [parent] if parent in names else []
                for name in seen:
                    if name not in latent and site not in found.setdefault(name, []):
                        found[name].append(site)
    return {name: tuple(sites) for name, sites in found.items()}


def ways_in(
    inverse: InverseGraph, inputs: InputPlan, without_data: Collection[str], wide: Collection[str] = ()
) -> dict[tuple[object, object], str]:
    """Return for pairs (parent, site) how the parent comes in, where not as one node to another.

    Args:
        inverse: The guide's factorisation.
        inputs: How what is in other plates comes in.
        without_data: Observed nodes without values to read.
        wide: Inputs that are not read since they have many numbers, which stay the same in simulations.
    """
    ways: dict[tuple[object, object], str] = {}
    for site, found in inputs.summaries.items():
        for summary in found:
            how = "one by one" if summary.one_by_one else "pooled"
            ways.update({(m, site): how for m in summary.members if inverse.how[m, site] == "pooled"})
            if summary.index is not None:
                ways[summary.index, site] = "index"
            for inner, _, index in summary.segments:
                ways[index, site] = "index"
                inside = [m for m in summary.members if inner in inverse.graph.plates[m]]
                ways.update({(m, site): f"pooled by {index}" for m in inside})
    for site, parents in inverse.parents.items():
        ways.update({(parent, site): "no data to read" for parent in parents if parent in without_data})
        ways.update({(parent, site): WIDE for parent in parents if parent in wide})
        looked_up = [summary for summary in inputs.summaries.get(site, ()) if summary.index is not None]
        for summary in looked_up:
            by = ", ".join(str(each.index) for each in looked_up if each.members == summary.members)
            how = f"looked up by {by}"
            ways[summary.members[0], site] = f"means of those {how}" if summary.segments else how
    return ways
