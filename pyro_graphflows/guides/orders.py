r"""Which inverse a guide follows: what the user asked for, and what suits discrete sites, elements and smoothness.

Every elimination order gives a faithful inverse, and often several have the fewest edges. Which one is chosen
depends on more.

**Outer sites before inner ones**, which gradients of the score-function kind need. Such a gradient of Pyro's ELBOs
weighs the score of each element of a plate with the terms of that element and those outside of the plate. If a
site outside were sampled later and looked at the elements, it would carry the influence of one element to the terms of
the others, which are left out: the gradient would be biased, without an error. Enumeration has the same need: an
enumerated value may not leave its plate.

**Discrete sites before continuous ones** in the same plates, which the families need. In ``k -> z -> x`` the
factorisation ``q(z | x) q(k | z)`` asks for a mixture at ``z``, and ``q(k | x) q(z | k, x)`` only
for what families can do (as conditional Gaussian networks eliminate continuous variables first [1]).

**Model parents before enumerated sites**, which Pyro needs: a site drawn once for each value of an enumerated one may
not be a parent of that one in the model.

**Smooth conditionals.** With :math:`z_3 = z_0 z_1` up to noise, :math:`z_1` given :math:`z_0, z_3` is normal about
:math:`z_3 / z_0`: tame where :math:`z_0` keeps away from zero, and a pole where it does not. Which it is, samples of
the model show. A joint density is the product of its conditionals whatever the order, so that the sum over the sites
of the entropies of their conditionals is the same for every order; with regressions in place of the true conditionals
it is larger, by what the regressions miss (the mean KL divergence from the posterior of the guide that they make).
Linear regressions miss the same in every order with the same cliques, so regressions on squares and products
are taken:

.. math:: \text{score} = \sum_v \operatorname{E}\bigl[-\log t_4\bigl(z_v - \hat z_v(z_{Pa(v)}, x_{Pa(v)})\bigr)\bigr]

on held-out samples, with Student's t of four degrees of freedom at its best scale, so that a few samples near a pole do
not decide. Starting from the sparsest inverse found, neighbours in the elimination order change places as long as that
lowers the score and adds no edge and no sampling level. Models whose own conditionals are linear are left alone.

**Sites after those that bound their supports.** With :math:`b \sim U(0, a)` a value of b is known to lie in its support
only after a. Where another order was found, the sites that it bounds are moved behind.

**Effects after their scales.** In hierarchies, where a site sets the scale of others, these are sampled after all of
their parents in the model unless that makes the inverse half as large again: then they can be fused with their priors.

**Small plates first.** Of crossed effects those in the smaller plate are sampled first, where no networks summarise
them: they need parameters for each pair.

**Elements.** A graph of elements says which entries of vector sites depend on which; its inverse is sparser than
that of the sites. A site is emitted as one value, so the elements of a site must be sampled one after the other,
with no element of another site between them. Hence the order of *sites* is found first, by inverting the graph that
the elements make of the sites, and the elements are then eliminated in that order.

References:
    [1] Lauritzen (1992), Propagation of probabilities, means and variances in mixed graphical association models,
    Journal of the American Statistical Association 87, Section 4 (strong elimination orders).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.inversion import (
    OrderSearch,
    faithful_inverse,
    fully_connected_inverse,
    mean_field_inverse,
    stochastic_inverse,
)
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.guides.call import input_rows, plates_of
from pyro_graphflows.guides.plan import BlockPlan
from pyro_graphflows.guides.samples import MOST_ROWS, ModelDraws, side_by_side
from pyro_graphflows.guides.sites import LatentSite
from pyro_graphflows.inspect import TracedModel, get_argument, nested_by_index, with_nested_plates
from pyro_graphflows.regression import HELD_OUT, Moments, in_float64, location_and_scale, white_residuals

__all__ = [
    "ElementInverse",
    "FoundInverse",
    "Inverse",
    "discrete_sites_first",
    "drawn_after_enumerated",
    "draws_more_effects_alone",
    "find_inverse",
    "joint_rows",
    "most_edges_of_hierarchy",
    "num_coupled_pairs",
    "optional_sites_first",
    "order_for_coupled_effects",
    "order_for_crossed_plates",
    "order_for_discrete_sites",
    "order_for_hierarchies",
    "order_for_supports",
    "outer_sites_first",
    "outside_of_loops",
    "require_enumerable_plates",
    "require_outer_sites_first",
    "resolve_inverse",
    "sites_to_enumerate",
    "smooth_order",
    "smoothest_inverse",
]

MOST_EDGES = 2.0  # times those of the sparsest inverse found, for discrete sites first
MOST_EDGES_OF_HIERARCHIES = 1.5  # the same, for effects after their scales

NUM_ROWS = 5000  # of joint samples that judge smoothness
FEWEST_ROWS = 500
MOST_SITES = 64
MOST_ELEMENTS = 64  # of one node that are looked at, evenly spaced
MOST_PRODUCTS = 12  # inputs up to which products of two are taken, and not squares alone
GAIN = 0.1  # nats; less cannot be told from noise in the samples
JUDGE_WINSOR = 6.0  # standard deviations: squares of columns are inputs here
MOST_SWEEPS = 10


# ---------------------------------------------------------------- what the user asked for


NAMED_INVERSES: dict[str, Callable[[ModelGraph], InverseGraph]] = {
    "stochastic": stochastic_inverse,
    "full": fully_connected_inverse,
    "mean_field": mean_field_inverse,
}

Inverse = str | OrderSearch | Sequence[str] | InverseGraph | Callable[[ModelGraph], InverseGraph]


def resolve_inverse(graph: ModelGraph, inverse: Inverse) -> InverseGraph:
    """Return the inverse that a user asked for.

    Args:
        graph: The model graph.
        inverse: The name of an elimination order of :func:`~pyro_graphflows.faithful_inverse`, a search for one
            (:class:`~pyro_graphflows.AutoOrder`), an elimination sequence, ``"stochastic"``, ``"full"``,
            ``"mean_field"``, an inverse, or a function that makes one.

    Raises:
        GraphflowsError: If the inverse is not of the model's latent nodes or is of another type.
    """
    if isinstance(inverse, str):
        return (
            NAMED_INVERSES[inverse](graph) if inverse in NAMED_INVERSES else faithful_inverse(graph, inverse)
        )
    if isinstance(inverse, OrderSearch):
        return faithful_inverse(graph, inverse)
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


@dataclass(frozen=True)
class ElementInverse:
    """The inverse of a graph of elements, and what it means for sites.

    Attributes:
        inverse: The inverse over elements.
        parents: For each split site, for each of its elements, the parents as (node, index in the node);
            earlier elements of the site itself among them. The index of nodes that are not split is -1.
    """

    inverse: InverseGraph
    parents: dict[str, tuple[tuple[tuple[str, int], ...], ...]]


@dataclass(frozen=True)
class FoundInverse:
    """An inverse over sites, and what it was found from.

    Attributes:
        traced: The traced model, with the graph of its sites.
        inverse: The inverse, in the model's plates.
        elements: The inverse of the elements, where these are told apart.
        nested: The inverse with the plates of the data inside those that they look up; None if nothing is looked up.
        lookups: For pairs (inner, outer) of plates, the argument that says which element is looked up; None if no
            argument does.
    """

    traced: TracedModel
    inverse: InverseGraph
    elements: ElementInverse | None = None
    nested: InverseGraph | None = None
    lookups: Mapping[tuple[str, str], str | None] = field(default_factory=dict)

    @property
    def judged(self) -> InverseGraph:
        """The inverse whose faithfulness counts."""
        if self.elements is not None:
            return self.elements.inverse
        return self.nested or self.inverse


def find_inverse(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    traced: TracedModel,
    option: Inverse,
    *,
    elements: bool,
) -> FoundInverse:
    """Invert a model's graph; plates whose elements look up those of others count as nested in these.

    Args:
        model: The model.
        args: The positional arguments of a call.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.
        option: See :func:`resolve_inverse`.
        elements: Whether the graph is one of elements.

    Raises:
        GraphflowsError: If the inverse of elements is not faithful: it has no elimination order.
    """
    if elements:
        return _invert_elements(traced, option)
    graph = with_loop_plates(traced.graph, traced.loops)
    several = len({plate for around in graph.plates.values() for plate in around}) > 1
    nested = nested_by_index(model, args, kwargs, traced=traced) if several else {}
    if not nested:
        return FoundInverse(traced, resolve_inverse(graph, option))
    inside = resolve_inverse(with_nested_plates(graph, nested), option)
    coupled = {  # across plates that a site is in by its index alone: across those with the index
        site: [p for p in graph.plates[site] if p in plates or not set(plates) <= set(graph.plates[site])]
        for site, plates in inside.coupled.items()
    }
    inverse = InverseGraph(
        graph,
        inside.parents,
        order=inside.order,
        sampling_order=inside.sampling_order,
        coupled=coupled,
    )
    return FoundInverse(
        traced, inverse, nested=inside, lookups=_index_arguments(model, args, kwargs, traced, nested)
    )


def _index_arguments(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    traced: TracedModel,
    nested: Mapping[str, Mapping[str, Tensor]],
) -> dict[tuple[str, str], str | None]:
    """Return for pairs (inner, outer) of plates the argument that says which element is looked up."""
    found: dict[tuple[str, str], str | None] = {}
    plates = plates_of(traced.trace)
    for inner, outers in nested.items():
        for outer, groups in outers.items():
            found[inner, outer] = None
            for name in sorted(traced.index_inputs):
                value = get_argument(model, traced.argument_paths[name], args, kwargs)
                value = input_rows(traced, name, value, plates).reshape(-1).cpu()
                if value.shape == groups.shape and bool(((value == groups) | (groups < 0)).all()):
                    found[inner, outer] = name
                    break
    return found


def outside_of_loops(inverse: InverseGraph, graph: ModelGraph) -> InverseGraph:
    """Return an inverse in the plates of the model, without those around the iterations of subsampled loops.

    How a parent enters is kept: what is in a loop is not there for sites outside of its iteration.

    Args:
        inverse: An inverse in the plates of :func:`with_loop_plates`.
        graph: The model graph.
    """
    coupled = {
        site: [p for p in plates if p in graph.plates[site]] for site, plates in inverse.coupled.items()
    }
    return inverse.replaced(graph=graph, coupled=coupled)


# ---------------------------------------------------------------- elements


def _graph_of_sites(graph: ModelGraph, elements: Mapping[str, tuple[str, int]]) -> ModelGraph:
    def site(node: str) -> str:
        return elements[node][0] if node in elements else node

    edges = {
        (site(parent), site(child)): None for parent, child in graph.edges if site(parent) != site(child)
    }
    sizes: dict[str, int] = {}
    plates = {}
    for node in graph.nodes:
        sizes[site(node)] = sizes.get(site(node), 0) + graph.event_sizes[node]
        plates[site(node)] = graph.plates[node]
    return ModelGraph(
        list(edges),
        [site(node) for node in graph.observed],
        inputs=[site(node) for node in graph.inputs],
        marginalised=[site(node) for node in graph.marginalised],
        event_sizes=sizes,
        plates=plates,
        nodes=list(plates),
    )


def _invert_elements(traced: TracedModel, option: Inverse) -> FoundInverse:
    elements = traced.elements
    graph = _graph_of_sites(traced.graph, elements)
    of_sites = resolve_inverse(graph, option)
    if option == "auto":
        nodes: Any = traced.trace.nodes
        discrete = [name for name in graph.latent if nodes[name]["fn"].support.is_discrete]
        of_sites = discrete_sites_first(of_sites, discrete)
    if of_sites.order in ("stochastic", "mean_field"):
        raise GraphflowsError(
            f"Expected an inverse that is an elimination order with resolution='element'; got {of_sites.order!r}."
        )
    members: dict[str, list[str]] = {}
    for node, (site, index) in elements.items():
        members.setdefault(site, []).insert(index, node)
    sampling = [node for site in of_sites.sampling_order for node in members.get(site, [site])]
    inverse = faithful_inverse(traced.graph, sampling[::-1])

    def place(node: str) -> tuple[str, int]:
        return elements[node] if node in elements and len(members[elements[node][0]]) > 1 else (node, -1)

    split: dict[str, tuple[tuple[tuple[str, int], ...], ...]] = {}
    collapsed = {}
    coupled = {}
    for site in graph.latent:
        nodes = members.get(site, [site])
        own = tuple(tuple(place(parent) for parent in inverse.parents[node]) for node in nodes)
        if len(nodes) > 1:
            split[site] = own
        collapsed[site] = {elements.get(p, (p, 0))[0] for node in nodes for p in inverse.parents[node]} - {
            site
        }
        coupled[site] = tuple(dict.fromkeys(p for node in nodes for p in inverse.coupled.get(node, ())))
    sites = InverseGraph(
        graph, collapsed, order=of_sites.order, sampling_order=of_sites.sampling_order, coupled=coupled
    )
    return FoundInverse(replace(traced, graph=graph), sites, ElementInverse(inverse, split))


# ---------------------------------------------------------------- discrete sites


def discrete_sites_first(inverse: InverseGraph, discrete: Collection[str]) -> InverseGraph:
    """Return a faithful inverse that samples discrete sites before the continuous ones in the same plates.

    Args:
        inverse: A faithful inverse, whose order is kept otherwise.
        discrete: The discrete latent sites.

    Returns:
        The new inverse, of order ``"discrete_first"``; the given one where it has the property already, or where the
        new one has more than twice its edges (long chains with a discrete and a continuous part).
    """
    graph = inverse.graph
    if set(graph.latent) <= set(discrete) or set(graph.latent).isdisjoint(discrete):
        return inverse
    given = inverse.sampling_order
    rank = {site: i for i, site in enumerate(given)}
    wanted = sorted(given, key=lambda site: (len(graph.plates[site]), site not in discrete, rank[site]))
    if wanted == list(given):
        return inverse
    found = faithful_inverse(graph, wanted[::-1])
    if found.num_edges > MOST_EDGES * inverse.num_edges:
        return inverse
    return found.replaced(order="discrete_first")


def outer_sites_first(inverse: InverseGraph) -> InverseGraph:
    """Return the same factorisation, sampled outer sites first as far as parents allow it.

    Args:
        inverse: The factorisation.

    Returns:
        An inverse in which each next site is the one in the fewest plates among those whose parents are sampled.
        Ties keep their order.
    """
    plates, rank = inverse.graph.plates, {site: i for i, site in enumerate(inverse.sampling_order)}
    order = nx.lexicographical_topological_sort(
        inverse.to_networkx().subgraph(rank), key=lambda site: (len(plates[site]), rank[site])
    )
    return inverse.replaced(sampling_order=order)


def drawn_after_enumerated(inverse: InverseGraph, enumerated: Collection[str]) -> dict[str, list[str]]:
    """Return the enumerated sites with model parents that the guide draws given their values, and these parents.

    Pyro's enumeration has no place for them: the parent's value would vary along the dimension of its child's values.

    Args:
        inverse: The guide's factorisation.
        enumerated: The sites that the guide enumerates.
    """
    dag = inverse.to_networkx()
    found = {}
    for site in sorted(enumerated):
        below = nx.descendants(dag, site) - set(enumerated)
        wrong = [parent for parent in inverse.graph.parents(site) if parent in below]
        if wrong:
            found[site] = wrong
    return found


def require_outer_sites_first(
    blocks: Sequence[BlockPlan], inverse: InverseGraph, rough: Collection[str]
) -> None:
    """Refuse plans that sample a site with score-function gradients before one in fewer plates.

    A site that depends on the earlier one in the model itself, without data below it, cannot come first, and does no
    harm: nothing else depends on it.

    Args:
        blocks: The blocks of the plan, in sampling order.
        inverse: The guide's factorisation.
        rough: The sites whose draws are not reparametrised.

    Raises:
        UnsupportedModelError: If there is one. The message names the sites.
    """
    graph = inverse.graph
    order = [site for block in blocks for site in block.sites]
    dag = graph.to_networkx()
    for i, site in enumerate(order):
        if site not in rough:
            continue
        below = nx.descendants(dag, site)
        late = [
            other
            for other in order[i + 1 :]
            if set(graph.plates[other]) < set(graph.plates[site]) and other not in below
        ]
        if late:
            raise UnsupportedModelError(
                f"Expected {', '.join(map(repr, late))}, in fewer plates, to be sampled before the discrete site "
                f"{site!r}; the inverse {inverse.order!r} samples it after. Score-function gradients would "
                "be biased without an error, and enumeration would fail. Use a faithful inverse (inverse='auto')."
            )


def sites_to_enumerate(option: bool | Collection[str], sites: Mapping[str, LatentSite]) -> frozenset[str]:
    """Return the sites that the guide is to enumerate.

    Args:
        option: Names, or True for all discrete sites.
        sites: The latent sites.

    Raises:
        UnsupportedModelError: If one of them cannot be enumerated.
    """
    if isinstance(option, bool):
        names = [name for name, site in sites.items() if site.encoding is not None] if option else []
    elif isinstance(option, str):
        raise GraphflowsError(
            f"Expected enumerate_sites to be True, False or a list of names; got {option!r}."
        )
    else:
        names = list(option)
    for name in names:
        encoding = sites[name].encoding if name in sites else None
        if encoding is None or encoding.kind == "counts" or encoding.num_elements != 1:
            raise UnsupportedModelError(
                f"Expected enumerate_sites to be latent sites with one binary or class variable; {name!r} is "
                f"{'no discrete latent site' if encoding is None else encoding}. Pyro enumerates no vectors: give "
                "each element a site of its own, or leave this site to score-function gradients."
            )
    return frozenset(names)


def require_enumerable_plates(enumerated: Collection[str], graph: ModelGraph) -> None:
    """Refuse to enumerate sites on which something outside of their plates depends.

    Pyro gives all elements of a plate the same one of the values, and sums for each element over what is inside of the
    plate. What is outside of it depends on the values of several elements, and the sum is wrong, without an error.

    Args:
        enumerated: The sites that the guide enumerates.
        graph: The model graph.

    Raises:
        UnsupportedModelError: If there is one. The message names both sites.
    """
    for site in sorted(enumerated):
        outside = graph.outside_of_plates(site)
        if outside:
            raise UnsupportedModelError(
                f"Expected all that depends on the enumerated site {site!r} to be in its plates, "
                f"{', '.join(graph.plates[site])}; "
                f"{', '.join(map(repr, outside))} {'is' if len(outside) == 1 else 'are'} not, and Pyro would sum over "
                f"values that all elements share. Leave {site!r} out of enumerate_sites, to score-function gradients."
            )


def order_for_discrete_sites(
    inverse: InverseGraph, discrete: Collection[str], enumerated: Collection[str], *, free: bool
) -> InverseGraph:
    """Return an inverse that suits discrete sites.

    Args:
        inverse: The inverse.
        discrete: The discrete latent sites.
        enumerated: Those that the guide enumerates.
        free: Whether another faithful inverse may be taken (the user left the choice).

    Raises:
        UnsupportedModelError: If enumerated sites come before model parents of theirs in each of them.
    """
    candidates = [discrete_sites_first(inverse, discrete), inverse] if free else [inverse]
    if free and enumerated:
        candidates.append(faithful_inverse(inverse.graph, "reverse"))
    candidates = [outer_sites_first(candidate) for candidate in candidates]
    conflicts = [drawn_after_enumerated(candidate, enumerated) for candidate in candidates]
    for candidate, conflict in zip(candidates, conflicts, strict=True):
        if not conflict:
            return candidate
    named = "; ".join(f"{site}: {', '.join(parents)}" for site, parents in conflicts[0].items())
    raise UnsupportedModelError(
        "Expected the model's parents of enumerated sites to be sampled before these, or enumerated as well; the "
        f"inverse {inverse.order!r} samples some given the enumerated values ({named}), which Pyro cannot do. Use "
        "inverse='reverse', which follows the model's order, or enumerate_sites=True."
    )


# ---------------------------------------------------------------- dependent supports


def order_for_supports(inverse: InverseGraph, changing: Mapping[str, Collection[str]]) -> list[str] | None:
    """Return an elimination order near that of an inverse in which each site follows those that bound its support.

    Args:
        inverse: The inverse.
        changing: For sites whose support depends on other latent sites, these.

    Returns:
        Sites to eliminate in turn; None if the inverse samples each site after those that bound it.

    Example:
        >>> from pyro_graphflows.graphs.structures import ModelGraph
        >>> graph = ModelGraph(["ab", "bx"], observed=["x"])
        >>> order_for_supports(faithful_inverse(graph, ["a", "b"]), {"b": ["a"]})
        ['b', 'a']
    """
    rank = {site: i for i, site in enumerate(inverse.sampling_order)}
    bounds = nx.DiGraph((other, site) for site, others in changing.items() for other in others)
    if all(rank[other] < rank[site] for other, site in bounds.edges):
        return None
    bounds.add_nodes_from(rank)
    sampling = list(nx.lexicographical_topological_sort(bounds, key=rank.__getitem__))
    return sampling[::-1]


# ---------------------------------------------------------------- hierarchies


def order_for_hierarchies(inverse: InverseGraph, scales: Mapping[str, Collection[str]]) -> list[str] | None:
    """Return an elimination order near that of an inverse in which sites follow those that set their scale.

    Only after all of its parents in the model can a site be fused with its prior, and the posterior of effects whose
    scale is unknown is far from normal, as that of a scale given the effects is. Given the scales, conjugate
    hierarchies are normal, their means too: scales are sampled first, then the others in their order. Outer sites come
    before inner ones, scales or not.

    Args:
        inverse: The inverse.
        scales: For sites that set the scale of others, these others.

    Returns:
        Sites to eliminate in turn; None if that is how the inverse samples them, or if a site has a parent in the model
        that must follow it, as one in an inner plate.

    Example:
        >>> from pyro_graphflows.graphs.structures import ModelGraph
        >>> graph = ModelGraph(["ab", "sb", "bx"], observed=["x"])
        >>> order_for_hierarchies(faithful_inverse(graph, ["s", "b", "a"]), {"s": ["b"]})
        ['b', 'a', 's']
    """
    graph, rank = inverse.graph, {site: i for i, site in enumerate(inverse.sampling_order)}
    effects = {effect for children in scales.values() for effect in children}
    after = nx.DiGraph((p, effect) for effect in effects for p in graph.parents(effect) if p in rank)
    after.add_nodes_from(rank)
    plates = {site: frozenset(graph.plates[site]) for site in rank}
    sampling = list(
        nx.lexicographical_topological_sort(
            after, key=lambda site: (len(plates[site]), site not in scales, rank[site])
        )
    )
    seen: set[frozenset[str]] = set()
    for site in sampling:
        if any(plates[site] < earlier for earlier in seen):
            return None
        seen.add(plates[site])
    return None if sampling == list(inverse.sampling_order) else sampling[::-1]


def order_for_crossed_plates(inverse: InverseGraph, sizes: Mapping[str, int]) -> list[str] | None:
    """Return an elimination order near that of an inverse in which sites in small plates are sampled first.

    Of the effects of rows and columns, those that are sampled first stay dependent across their plate, and have
    parameters for each pair; the others are independent given these, each with a slope on each of them.

    Args:
        inverse: The inverse.
        sizes: The sizes of the plates.

    Returns:
        Sites to eliminate in turn; None if nothing is dependent across a plate, if that is how the inverse samples
        them, or if a site is in several plates.

    Example:
        >>> from pyro_graphflows.graphs.structures import ModelGraph
        >>> plates = {"a": ["rows"], "b": ["columns"], "x": ["rows", "columns"]}
        >>> graph = ModelGraph(["ax", "bx"], observed=["x"], plates=plates)
        >>> order_for_crossed_plates(faithful_inverse(graph, ["b", "a"]), {"rows": 100, "columns": 20})
        ['a', 'b']
    """
    around, rank = inverse.graph.plates, {site: i for i, site in enumerate(inverse.sampling_order)}
    coupled = [site for site, plates in inverse.coupled.items() if plates]
    if not coupled or any(len(around[site]) > 1 for site in rank):
        return None

    def place(site: str) -> tuple[bool, int, int]:
        return bool(around[site]), math.prod(sizes[name] for name in around[site]), rank[site]

    order = sorted(rank, key=place)[::-1]
    return None if order == list(inverse.sampling_order)[::-1] else order


def num_coupled_pairs(inverse: InverseGraph, sizes: Mapping[str, int]) -> int:
    """Return how many pairs of copies stay dependent across plates.

    Args:
        inverse: The inverse.
        sizes: The sizes of the plates.
    """
    each = [math.prod(sizes[name] for name in plates) for plates in inverse.coupled.values() if plates]
    return sum(number * (number - 1) // 2 for number in each)


def order_for_coupled_effects(
    inverse: InverseGraph, scales: Mapping[str, Collection[str]]
) -> list[str] | None:
    """Return an elimination order in which effects of unknown scale follow those that they are crossed with.

    Of two crossed groupings, one has effects that are drawn jointly, and the other, given these, one by one: prior
    times factors of the elements, exact at every scale. So the first ones had better be those of known scale.

    Args:
        inverse: An inverse in which effects follow their scales.
        scales: For sites that set the scale of others, these others.

    Returns:
        Sites to eliminate in turn; None if no effect of unknown scale that is drawn jointly can be moved.

    Example:
        >>> from pyro_graphflows.graphs.structures import ModelGraph
        >>> plates = {"a": ["i"], "b": ["j"], "x": ["i", "j"]}
        >>> graph = ModelGraph(["sa", "ax", "bx"], observed=["x"], plates=plates)
        >>> order_for_coupled_effects(faithful_inverse(graph, ["b", "a", "s"]), {"s": ["a"]})
        ['a', 'b', 's']
    """
    graph, plates = inverse.graph, {site: set(own) for site, own in inverse.graph.plates.items()}
    effects = {effect for children in scales.values() for effect in children}
    sampling = list(inverse.sampling_order)
    for effect in [site for site in sampling if site in effects and site in inverse.coupled]:
        at = sampling.index(effect)
        crossed = [
            i
            for i, site in enumerate(sampling)
            if i > at and site not in effects and len(plates[site]) == len(plates[effect]) > 0
        ]
        behind = sampling[at + 1 : crossed[-1] + 1] if crossed else []
        if not any(plates[site] > plates[effect] or effect in graph.parents(site) for site in behind):
            sampling[at : at + len(behind) + 1] = [*behind, effect]
    return None if sampling == list(inverse.sampling_order) else sampling[::-1]


def draws_more_effects_alone(
    found: InverseGraph, other: InverseGraph, scales: Mapping[str, Collection[str]]
) -> bool:
    """Whether fewer effects of unknown scale are drawn jointly in an inverse than in another, at few more edges.

    Args:
        found: The inverse.
        other: The other.
        scales: For sites that set the scale of others, these others.
    """
    effects = {effect for children in scales.values() for effect in children}
    fewer = len(effects.intersection(found.coupled)) < len(effects.intersection(other.coupled))
    return fewer and found.num_edges <= MOST_EDGES_OF_HIERARCHIES * other.num_edges


def most_edges_of_hierarchy(inverse: InverseGraph, scales: Mapping[str, Collection[str]]) -> float:
    """Return how many edges an inverse may have that samples scales first in place of another.

    Args:
        inverse: The other.
        scales: For sites that set the scale of others, these others.
    """
    rank = {site: i for i, site in enumerate(inverse.sampling_order)}
    effects = {effect for children in scales.values() for effect in children}
    after = all(
        rank[parent] < rank[effect]
        for effect in effects
        for parent in inverse.graph.parents(effect)
        if parent in rank
    )
    return inverse.num_edges if after else MOST_EDGES_OF_HIERARCHIES * inverse.num_edges


# ---------------------------------------------------------------- sites that are observed in some calls


def optional_sites_first(
    graph: ModelGraph, option: str | OrderSearch, optional: Sequence[str], discrete: Collection[str]
) -> InverseGraph:
    """Return a faithful inverse that samples sites that may be observed before those that are then given them.

    The others are ordered as if these sites were always observed. Those outside of the plates of an optional site are
    sampled before it, as everywhere: outer sites come first.

    Args:
        graph: The model graph, in which these sites are latent.
        option: The order of the others.
        optional: The sites that may be observed, in the order in which they are sampled (outer ones first).
        discrete: The discrete latent sites.

    Example:
        >>> graph = ModelGraph(["yx", "zx"], observed=["x"])
        >>> optional_sites_first(graph, "auto", ["y"], []).parents
        mappingproxy({'y': ('x',), 'z': ('y', 'x')})
    """
    others = discrete_sites_first(resolve_inverse(graph.with_observed(optional), option), discrete)
    plates = {site: set(graph.plates[site]) for site in graph.latent}
    optional = sorted(optional, key=lambda site: len(plates[site]))
    outer = [
        site for site in others.sampling_order if not all(plates[name] <= plates[site] for name in optional)
    ]
    inner = [site for site in others.sampling_order if site not in outer]
    found = faithful_inverse(graph, [*outer, *optional, *inner][::-1])
    return found.replaced(order="optional_first")


# ---------------------------------------------------------------- smooth conditionals


def smoothest_inverse(inverse: InverseGraph, draws: ModelDraws, wanted: int) -> InverseGraph:
    """Return an inverse as sparse whose conditionals are smoother, where samples of the model show one.

    Args:
        inverse: A faithful inverse that is an elimination order.
        draws: The model and its draws.
        wanted: How many rows the guide's start will ask for.
    """
    rows = joint_rows(draws, wanted) if _is_worth_a_search(inverse) else None
    return inverse if rows is None else smooth_order(inverse, rows)


def _is_worth_a_search(inverse: InverseGraph) -> bool:
    """Whether there are several orders, and so few sites that the search ends soon."""
    return 1 < len(inverse.sampling_order) <= MOST_SITES


def smooth_order(inverse: InverseGraph, samples: Mapping[str, Tensor]) -> InverseGraph:
    """Return a faithful inverse with no more edges and levels, and smoother conditionals if samples show any.

    Args:
        inverse: A faithful inverse that is an elimination order.
        samples: Joint samples of all nodes with data and all latent sites (unconstrained), ``(n, size)`` each. Nodes
            that are missing are not taken as inputs.

    Returns:
        The new inverse, of order ``"smooth"``; the given one where nothing is gained.

    Example:
        >>> from pyro_graphflows.graphs.structures import ModelGraph
        >>> graph = ModelGraph(["ac", "bc", "cx"], observed=["x"])
        >>> a, b, noise = 5 + torch.randn(5000, 1), torch.randn(5000, 1), 0.1 * torch.randn(2, 5000, 1)
        >>> c = a * b + noise[0]
        >>> sample = {"a": a, "b": b, "c": c, "x": c + noise[1]}
        >>> dict(smooth_order(faithful_inverse(graph, ["a", "b", "c"]), sample).parents)
        {'a': ('c',), 'b': ('a', 'c'), 'c': ('x',)}
    """
    if not _is_worth_a_search(inverse):
        return inverse
    judge = _ConditionalScores(samples)
    if judge.num_rows < FEWEST_ROWS or judge.nonlinearity(inverse.graph) < GAIN:
        return inverse
    best, score = inverse, judge.score(inverse)
    for _ in range(MOST_SWEEPS):
        before = score
        for i in range(len(inverse.sampling_order) - 1):
            order = list(best.sampling_order[::-1])
            first, second = order[i : i + 2]
            if second not in best.parents[first]:
                continue  # changing places would change nothing
            order[i : i + 2] = second, first
            other = faithful_inverse(best.graph, order)
            if other.num_edges > best.num_edges or len(other.levels) > len(best.levels):
                continue
            found = judge.score(other)
            if found < score - GAIN:
                best, score = other, found
        if score == before:
            break
    if best is inverse:
        return inverse
    return best.replaced(order="smooth")


def joint_rows(joint: ModelDraws, wanted: int = 0) -> dict[str, Tensor] | None:
    """Return joint samples of latent sites and data in rows; None where rows do not show what depends on what.

    That is so where latent sites are in different plates, and where samples of the model are not what its density says.

    Args:
        joint: The model and its draws.
        wanted: How many rows the guide's start will ask for. If they are enough here they are drawn now, once for
            both; otherwise the random state is left as it is.
    """
    graph, sites = joint.traced.graph, joint.sites
    if not sites or len({graph.plates[site] for site in sites}) > 1:
        return None
    one = next(iter(sites))
    around = set(graph.plates[one])
    nodes: Any = joint.traced.trace.nodes
    copies = torch.Size(nodes[one]["fn"].batch_shape).numel()
    shared = wanted >= NUM_ROWS
    draws = max(2, -(-(min(wanted, MOST_ROWS) if shared else NUM_ROWS) // copies))
    try:
        with nullcontext() if shared else torch.random.fork_rng(devices=[]):
            samples = joint.draw(draws, keep=shared)
    except UnsupportedModelError:
        return None
    data = [name for name in joint.encodings.event_dims if set(graph.plates.get(name, ())) <= around]
    return {name: value[:NUM_ROWS] for name, value in side_by_side(samples, [*sites, *data]).items()}


class _ConditionalScores:
    """Scores of conditionals, each found once."""

    def __init__(self, samples: Mapping[str, Tensor]) -> None:
        finite = torch.stack([torch.isfinite(value).all(-1) for value in samples.values()]).all(0)
        self.num_rows = int(finite.sum())
        self.samples = {}
        for name, value in samples.items():
            wide = in_float64(value[finite][:, :: -(-value.shape[-1] // MOST_ELEMENTS)])
            shift, scale = location_and_scale(wide)
            self.samples[name] = ((wide - shift) / scale).clamp(-JUDGE_WINSOR, JUDGE_WINSOR)
        self.known: dict[tuple[str, tuple[str, ...], bool], float] = {}
        self._held_out = torch.arange(self.num_rows) % HELD_OUT == 0
        self._columns: dict[str, range] = {}
        for name, value in self.samples.items():
            first = next(reversed(self._columns.values())).stop if self._columns else 0
            self._columns[name] = range(first, first + value.shape[-1])
        self._rows = torch.cat(list(self.samples.values()), -1)

    @cached_property
    def _moments(self) -> Moments:
        """The sums that all linear regressions share."""
        return Moments(self._rows[~self._held_out])

    def nonlinearity(self, graph: ModelGraph) -> float:
        """Return by how much squares and products lower the score of the model's own conditionals."""
        total = 0.0
        for node in (*graph.latent, *graph.observed):
            parents = tuple(parent for parent in graph.parents(node) if parent in self.samples)
            if parents and node in self.samples:
                total += self._of(node, parents, True) - self._of(node, parents, False)
        return total

    def score(self, inverse: InverseGraph) -> float:
        """Return the sum over the sites of the mean negative log-densities of residuals."""
        return sum(self._of(site, tuple(parents), False) for site, parents in inverse.parents.items())

    def _of(self, site: str, parents: tuple[str, ...], linear: bool) -> float:
        key = site, parents, linear
        if key not in self.known:
            self.known[key] = self._regress(site, parents, linear)
        return self.known[key]

    def _regress(self, site: str, parents: tuple[str, ...], linear: bool) -> float:
        own = list(self._columns[site])
        inputs = [column for parent in parents if parent in self._columns for column in self._columns[parent]]
        if linear:
            root, white = self._moments.white_residuals(inputs, own, self._rows[self._held_out])
        else:
            products = _with_products(self._rows[:, inputs])
            root, white = white_residuals(products, self._rows[:, own], self._held_out)
        return float(root.diagonal().log().sum() + _log_scales(white).sum())


def _with_products(inputs: Tensor) -> Tensor:
    """Return inputs with their squares beside them, and with the products of any two where these are few."""
    if inputs.shape[-1] > MOST_PRODUCTS:
        return torch.cat([inputs, inputs.square()], -1)
    i, j = torch.triu_indices(inputs.shape[-1], inputs.shape[-1])
    return torch.cat([inputs, inputs[:, i] * inputs[:, j]], -1)


def _log_scales(rows: Tensor) -> Tensor:
    """Return for each row the least mean of -log t_4(r / s) + log s over scales s, less a constant.

    The mean falls up to its minimum and rises from there, so that a coarse grid shows where to look closer.
    """
    coarse = torch.linspace(-6.0, 1.0, 15).to(rows).unsqueeze(-1).expand(-1, len(rows))
    nearest = coarse.gather(0, _losses(rows, coarse).argmin(0, keepdim=True))
    return _losses(rows, nearest + torch.linspace(-0.5, 0.5, 21).to(rows).unsqueeze(-1)).amin(0)


def _losses(rows: Tensor, log_scales: Tensor) -> Tensor:
    ratio = rows / log_scales.exp().unsqueeze(-1)
    return log_scales + 2.5 * (ratio.square() / 4).log1p().mean(-1)


def with_loop_plates(graph: ModelGraph, loops: Mapping[str, tuple[tuple[str, int], ...]]) -> ModelGraph:
    """Return the graph with a plate around what is in each iteration of a subsampled loop.

    Like the elements of a subsampled plate, these are not there for sites outside.

    Args:
        graph: A model graph.
        loops: For nodes in such loops, names of plates and iterations, outer to inner.
    """
    if not loops:
        return graph
    plates = {
        node: (*(f"{name}@{position}" for name, position in loops.get(str(node), ())), *around)
        for node, around in graph.plates.items()
    }
    return graph.with_plates(plates)
