r"""How long vectors are held: what their conditionals depend on, element by element, and how many numbers that takes.

A normal with a full covariance over N elements takes N (N - 1) / 2 outputs of a network, with weights from every parent
to each. That is the right thing for short vectors. A vector whose conditional would take more than ``FULL`` weights is
*long*, and held by the first of these that is within the budget:

1. *by element*: where the elements fall into small groups that share nothing, as the graph of elements shows
   (:func:`~pyro_graphflows.inspect.elements.split_elements`), each has the parents that a faithful inverse of that
   graph gives it. As an example, ``z ~ N(0, I)`` and ``x ~ N(z, I)`` take a few weights for each element.
2. *chain*: where each element, or each running sum of elements, meets a few neighbours alone
   (:mod:`~pyro_graphflows.inspect.neighbours`), as in random walks and autoregressions: a banded precision, and for
   each element the data that it meets (:mod:`~pyro_graphflows.guides.conditionals.banded`).
3. *one covariance*, in full, whatever the parents are, on which the location alone depends: what a model that is linear
   and normal has; up to ``MOST_DENSE`` elements.
4. *low rank*: independent elements but for a few directions, wider or narrower
   (:mod:`~pyro_graphflows.guides.conditionals.low_rank`).

Which of them follows from the model and the call, not from samples.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import InverseGraph
from pyro_graphflows.guides.conditionals.contract import UNITS, SiteRole
from pyro_graphflows.guides.orders import FoundInverse
from pyro_graphflows.guides.sites import LatentSite
from pyro_graphflows.inspect.neighbours import Chain

__all__ = ["BUDGET", "RANK", "VectorOptions", "Vectors", "hold_vectors"]

FULL = 200_000  # weights up to which a covariance is full
BUDGET = 1_000_000  # weights of one site, unless the user says otherwise
RANK = 10
MOST_DENSE = (
    300  # elements up to which one covariance is held in full: a draw costs their square, a step their cube
)


@dataclass(frozen=True)
class VectorOptions:
    """What the user asked for.

    Attributes:
        resolution: ``"auto"``, ``"site"`` (never element by element) or ``"element"`` (all vectors, long or not).
        rank: The rank of the covariance of long vectors beside its diagonal; None to choose.
        budget: The most weights of one site; None to choose.
    """

    resolution: str = "auto"
    rank: int | None = None
    budget: int | None = None


@dataclass(frozen=True)
class Vectors:
    """How the long vectors of a model are held.

    Attributes:
        found: The inverse, with elements where vectors are held by element.
        ranks: For vectors of low rank, the rank; the number of elements for one covariance in full.
        chains: For vectors that are chains, how their elements meet.
        known: What derivatives say of chains, and of vectors that are held by element.
        labels: For each long vector what is said of it.
        long: How each long vector is held: ``"element"`` or ``"rank"``.
    """

    found: FoundInverse
    ranks: Mapping[str, int] = field(default_factory=dict)
    chains: Mapping[str, Chain] = field(default_factory=dict)
    known: Mapping[str, Chain] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    long: Mapping[str, str] = field(default_factory=dict)


def hold_vectors(
    found: FoundInverse,
    sites: Mapping[str, LatentSite],
    options: VectorOptions,
    full_size: Callable[[SiteRole, int], int],
    by_element: Callable[[Collection[str]], FoundInverse] | None,
    as_chains: Callable[[FoundInverse, Collection[str]], tuple[FoundInverse, Mapping[str, Chain]]],
    unread: Collection[str] = (),
) -> Vectors:
    """Decide how long vectors are held.

    Args:
        found: The inverse over sites.
        sites: The latent sites whose factors are the family's own.
        options: What the user asked for.
        full_size: From a site and the number of its inputs, the number of weights that its conditional would take.
        by_element: Returns the inverse in which some sites are told apart element by element; None where that is
            not possible.
        as_chains: Returns an inverse, the given one or another over sites, and those of some sites that are chains
            given what they look at in it.
        unread: The inputs that no site reads.

    Raises:
        GraphflowsError: If the budget is too small. The message says the least that works.
    """
    inputs = {name: _num_inputs(found.inverse, name, sites, unread) for name in sites}
    full = {name: full_size(SiteRole(site), inputs[name]) for name, site in sites.items()}
    most_full = options.budget or FULL
    long = {
        name: site
        for name, site in sites.items()
        if site.encoding is None and site.size > 1 and full[name] > most_full
    }
    if not long:
        return Vectors(found)
    labels: dict[str, str] = {}
    if by_element is not None and options.resolution == "auto":
        apart = _told_apart(by_element, long, options.budget or BUDGET)
        if apart is not None:
            found = apart
            parents = {} if found.elements is None else found.elements.parents
            labels = {
                name: f"{sites[name].size} elements, each with parents of its own"
                for name in parents
                if name in long
            }
    chains: Mapping[str, Chain] = {}
    known = dict(as_chains(found, labels)[1])
    needed: dict[str, int] = {}
    if not labels and options.resolution == "auto":
        found, chains = as_chains(found, long)
        inputs = {name: _num_inputs(found.inverse, name, sites, unread) for name in sites}
        needed = {
            name: _chain_weights(chain, long[name].size, found.inverse, sites, name)
            for name, chain in chains.items()
        }
        chains = {name: chain for name, chain in chains.items() if needed[name] <= (options.budget or BUDGET)}
        labels = {name: _said_of_chain(chain, long[name].size) for name, chain in chains.items()}
        known = dict(chains)
    ranks = {}
    for name, site in long.items():
        if name not in labels:
            ranks[name] = _rank(name, site.size, inputs[name], options, needed.get(name))
            what = f"covariance of rank {ranks[name]} beside its diagonal; a full one"
            if ranks[name] == site.size:
                what = "one full covariance, the same for all it looks at; one that depends on that"
            labels[name] = (
                f"{what} of {site.size} elements would take {_short(full[name])} weights, of at most "
                f"{_short(most_full)}"
            )
    return Vectors(
        *(found, ranks, chains, known, labels),
        long={name: "rank" if name in ranks else "element" for name in labels},
    )


def parents_in_chain(
    chain: Chain, size: int, inverse: InverseGraph, name: str
) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Return what each element of a chain looks at, as (node, index in the node), -1 for the whole node.

    Args:
        chain: The chain.
        size: Its length.
        inverse: The inverse over sites.
        name: The site.
    """
    parents = [str(parent) for parent in inverse.parents[name]]
    whole = tuple((parent, -1) for parent in parents if parent not in chain.reads)
    met: list[list[tuple[str, int]]] = [[] for _ in range(size)]
    for parent in parents:
        if parent in chain.reads:
            for row, element in zip(*chain.reads[parent].nonzero(), strict=True):
                met[element].append((parent, int(row)))
    return tuple((*whole, *own) for own in met)


def _chain_weights(
    chain: Chain, size: int, inverse: InverseGraph, sites: Mapping[str, LatentSite], name: str
) -> int:
    """Return the number of weights of a chain."""
    sizes = inverse.graph.event_sizes
    total = 0
    for own in parents_in_chain(chain, size, inverse, name):
        seen = sum(
            1 if index >= 0 else sites[parent].size if parent in sites else sizes[parent]
            for parent, index in own
            if inverse.how[parent, name] != "pooled"
        )
        total += (2 + chain.width) * (seen + UNITS)
    return total


def _said_of_chain(chain: Chain, size: int) -> str:
    what = "running sums of elements" if chain.differences else "elements"
    return (
        f"a chain of {size} {what}, each beside {chain.width} on either side, and beside the data that it meets"
        if chain.width
        else f"{size} {what}, each beside the data that it meets"
    )


def _told_apart(
    by_element: Callable[[Collection[str]], FoundInverse], long: Mapping[str, LatentSite], budget: int
) -> FoundInverse | None:
    """Return the inverse in which the long vectors that can be are told apart; None if none can."""
    names = set(long)
    while names:
        found = by_element(names)
        parents = {} if found.elements is None else found.elements.parents
        kept = {name for name in names if name in parents and _element_weights(name, parents[name]) <= budget}
        if kept == names:
            return found
        names = kept
    return None


def _element_weights(name: str, parents: tuple[tuple[tuple[str, int], ...], ...]) -> int:
    """Return the number of weights of a site whose elements have parents of their own."""
    total = 0
    for own in parents:
        inner = sum(parent == name for parent, _ in own)
        total += (2 + inner) * (len(own) - inner + UNITS)
    return total


def _rank(name: str, size: int, num_inputs: int, options: VectorOptions, of_chain: int | None) -> int:
    """Return the rank that the budget leaves, and refuse a budget that leaves none."""
    of_locations, of_each = size * (num_inputs + UNITS + 1), 2 * size
    least = of_locations + of_each * (options.rank or 1)
    if options.budget is not None and least > options.budget:
        how = f"with rank={options.rank or 1}"
        if of_chain is not None and of_chain < least:
            least, how = of_chain, "held as a chain or element by element"
        raise GraphflowsError(
            f"Expected a budget of at least {least} weights for site {name!r} of {size} elements, which looks at "
            f"{num_inputs} numbers, {how}; got budget={options.budget}."
        )
    if options.rank is not None:
        return min(options.rank, size)
    in_full = size * (size + 1) // 2 + of_locations
    if size <= MOST_DENSE and in_full <= (options.budget or BUDGET):
        return size
    left = (options.budget or max(BUDGET, least)) - of_locations
    return max(1, min(RANK, size // 4, left // of_each))


def _num_inputs(
    inverse: InverseGraph, name: str, sites: Mapping[str, LatentSite], unread: Collection[str]
) -> int:
    """Return how many numbers a site looks at, summaries of plates and what it does not read apart."""
    sizes = inverse.graph.event_sizes
    return sum(
        sites[str(parent)].size if str(parent) in sites else sizes[parent]
        for parent in inverse.parents[name]
        if inverse.how[parent, name] != "pooled" and parent not in unread
    )


def _short(number: int) -> str:
    """Return a number of weights in words."""
    return f"{number / 1e6:.2g} million" if number >= 1e6 else f"{number:,}"
