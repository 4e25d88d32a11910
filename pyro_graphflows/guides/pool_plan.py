"""How what is in other plates reaches a site: summaries, free parameters, maps of its own, chain-rule terms.

A parent of a site in the inverse may be in a plate that the site is not in. Data there reach the site through a summary
(``pool="deepset"``, :mod:`~pyro_graphflows.guides.pooling`), or not at all: then the site has free parameters for each
element of its own plates, which fits one data set and is not amortised. *Latent* parents there (crossed plates: the
effects of the columns, for those of a row) are always inputs, since free parameters cannot follow what is sampled: as
a summary, or, beside free parameters, one by one where they are few. Data whose elements look up a group by an index
(``theta[group]``) are pooled group by group.

Where the elements of a plate are not alike (:mod:`~pyro_graphflows.guides.exchange`), a site in the plate has an affine
map of its own for each index beside the shared network. A site whose copies stay dependent across a plate
(:mod:`~pyro_graphflows.guides.coupled`) looks at the other elements of the plate too.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.exchange import Unlike
from pyro_graphflows.guides.pool_members import subsampled_message
from pyro_graphflows.guides.summaries import Chaining, Summary

__all__ = ["PoolOptions", "PoolPlan", "plan_pools"]

MOST_ONE_BY_ONE = (
    64  # latent numbers in other plates up to which they are inputs one by one beside free parameters
)
MOST_FREE_CHAIN = 128  # numbers up to which the dependence across a plate has a parameter for each pair
DEFAULT_RANK = 4


@dataclass(frozen=True)
class PoolOptions:
    """What a guide asks for.

    Attributes:
        deepset: Whether data are pooled.
        chained: The sizes of the sites that can have chain-rule terms.
        rank: The rank of these; None to choose.
        sizes: The sizes of the latent sites.
        lookups: For pairs (inner, outer) of plates, the index by which each element of the inner one looks up one of
            the outer; None if it is no argument.
    """

    deepset: bool = False
    chained: Mapping[str, int] = field(default_factory=dict)
    rank: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    lookups: Mapping[tuple[str, str], str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolPlan:
    """The outcome of :func:`plan_pools`.

    Attributes:
        summaries: For each site that has some, its summaries.
        free: The sites with free parameters for each element of their plates.
        unlike: The sites with a map of their own for each index of some plates, and these plates.
        chained: The sites with chain-rule terms.
        remarks: What is worth saying of a site.
        missing: The dependences of the posterior that the guide will not have, each with what to do.
    """

    summaries: dict[str, tuple[Summary, ...]] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    unlike: dict[str, tuple[str, ...]] = field(default_factory=dict)
    chained: dict[str, Chaining] = field(default_factory=dict)
    remarks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def plan_pools(
    inverse: InverseGraph,
    plates: Mapping[str, PlateState],
    with_data: Collection[str],
    indices: Collection[str],
    options: PoolOptions | None = None,
    unlike: Unlike | None = None,
) -> PoolPlan:
    """Decide how what is in other plates comes in.

    Args:
        inverse: The guide's factorisation.
        plates: The plates at set-up.
        with_data: The nodes whose data can be network inputs.
        indices: The inputs of an integer type.
        options: What is asked for.
        unlike: The sites that constants in the model concern.

    Raises:
        UnsupportedModelError: If data would be pooled over a subsampled plate.
    """
    options = options or PoolOptions()
    planner = _Planner(inverse, plates, with_data, indices, options, unlike or Unlike())
    for site in inverse.sampling_order:
        planner.visit(site)
    remarks = {site: tuple(lines) for site, lines in planner.remarks.items() if lines}
    return PoolPlan(
        planner.summaries,
        frozenset(planner.free),
        planner.unlike.own,
        planner.chained,
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
        options: PoolOptions,
        unlike: Unlike,
    ) -> None:
        self.inverse, self.plates, self.options, self.unlike = inverse, plates, options, unlike
        self.with_data, self.indices = with_data, indices
        self.around: Mapping[str, tuple[str, ...]] = inverse.graph.plates
        self.latent = set(inverse.graph.latent)
        self.summaries: dict[str, tuple[Summary, ...]] = {}
        self.free: set[str] = set()
        self.chained: dict[str, Chaining] = {}
        self.remarks: dict[str, list[str]] = {site: [] for site in inverse.sampling_order}
        self.missing: list[str] = []

    def visit(self, site: str) -> None:
        """Decide for one site."""
        remarks = self.remarks[site]
        if site in self.unlike.own:
            remarks.append(
                f"a map of its own for each index of {', '.join(self.unlike.own[site])}, along which constants or "
                "parameters in the model vary (pass constants as arguments to share one)"
            )
        chain = self._chained_plates(site)
        parents = self.inverse.parents[site]
        pooled = [parent for parent in parents if self.inverse.how[parent, site] == "pooled"]
        along = [parent for parent in parents if parent in pooled or set(self.around[parent]) & set(chain)]
        amortise = self.options.deepset and self._can_pool(site, along)
        data = [parent for parent in along if parent in self.with_data]
        latents = self._latents(site, [parent for parent in along if parent in self.latent], chain)
        if not amortise and len(data) + sum(parent in self.indices for parent in along):
            self.free.add(site)
        elif not amortise and any(parent in pooled and parent not in self.latent for parent in along):
            self.free.add(site)  # parents without data: a factor's term for each element
        found: list[Summary | None] = [s for p in latents if (s := self._look_up(site, p)) is not None]
        latents = [p for p in latents if self._look_up(site, p) is None]
        if amortise:
            found.append(self._summary(site, pooled, data, latents, ()))
            if chain:
                found.append(self._summary(site, along, data, latents, chain))
        elif site in self.free and self._count(site, latents, chain) <= MOST_ONE_BY_ONE:
            found.append(self._summary(site, latents, [], latents, chain, one_by_one=True))
        else:
            found.append(self._summary(site, latents, [], latents, chain))
        summaries = tuple(dict.fromkeys(summary for summary in found if summary is not None))
        if summaries:
            self.summaries[site] = summaries
        if chain:
            self._chain(site, chain, amortise)

    def _chained_plates(self, site: str) -> tuple[str, ...]:
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
        if site not in self.options.chained:
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
        beyond = self.unlike.outside.get(site, ())
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
                "told by no argument (pass the index as an argument of an integer type)"
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

    def _latents(self, site: str, latents: list[str], chain: Collection[str]) -> list[str]:
        """Return the latent parents that can be inputs: those whose plates are complete."""
        kept = []
        for parent in latents:
            partial = [name for name in self._over(site, [parent], chain) if self.plates[name].subsampled]
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

    def _over(self, site: str, members: Collection[str], chain: Collection[str]) -> tuple[str, ...]:
        """Return the plates over which members are pooled, outer to inner as far as they are nested."""
        own = [name for name in self.around[site] if name not in chain]
        return tuple(dict.fromkeys(n for member in members for n in self.around[member] if n not in own))

    def _over_groups(self, site: str, members: Collection[str], chain: Collection[str]) -> tuple[str, ...]:
        """Return these plates with those that their elements look up: data in groups are pooled group by group."""
        over = list(self._over(site, members, chain))
        own = [name for name in self.around[site] if name not in chain]
        for inner in over:  # grows meanwhile: groups may look up others
            over += [
                outer
                for (one, outer), index in self.options.lookups.items()
                if one == inner and index is not None and outer not in own and outer not in over
            ]
        return tuple(over)

    def _summary(
        self,
        site: str,
        chosen: Collection[str],
        data: Collection[str],
        latents: Collection[str],
        chain: Collection[str],
        one_by_one: bool = False,
    ) -> Summary | None:
        members = [p for p in self.inverse.parents[site] if p in chosen and (p in data or p in latents)]
        over = self._over(site, members, chain) if one_by_one else self._over_groups(site, members, chain)
        partial = [name for name in over if self.plates[name].subsampled]
        if partial:
            raise UnsupportedModelError(subsampled_message(partial[0], members))
        if not members:
            return None
        segments = () if one_by_one else self._segments(site, over)
        return Summary(tuple(members), over, one_by_one, segments=segments)

    def _count(self, site: str, latents: Collection[str], chain: Collection[str]) -> int:
        """Return how many numbers latent parents have in other plates."""
        total = 0
        for parent in latents:
            number = self.options.sizes.get(parent, MOST_ONE_BY_ONE + 1)
            for name in self._over(site, [parent], chain):
                number *= self.plates[name].size
            total += number
        return total

    def _chain(self, site: str, chain: tuple[str, ...], amortise: bool) -> None:
        length = self.options.chained[site]
        for name in chain:
            length *= self.plates[name].size
        rank = self.options.rank
        if rank is None:
            rank = 0 if site in self.free and length <= MOST_FREE_CHAIN else DEFAULT_RANK
        self.chained[site] = Chaining(chain, rank)
        how = f"of rank {rank}" if rank else "with a parameter for each pair"
        self.remarks[site].append(
            f"copies are drawn jointly across {', '.join(chain)}, where they stay dependent: a normal {how}"
        )
