"""Permutation-invariant summaries of what is inside plates, for sites outside of them.

The data of a group cannot be inputs of the group's own variable one by one: there may be any number of them, in any
order. They are *pooled*: joint tuples of all that is known of one element, ``(x_n, w_n)``, become features, which are
averaged over the plate (Zaheer et al. 2017). The features are

- the standardised entries of the tuple, their squares and products (means of products carry slopes, means of squares
  carry scales, so that a linear regression on the summary can start both), and the logarithm of each entry's variance;
- a small learned network of the tuple, and another that keeps its random weights: a regression start may rest on what
  does not change in training alone;
- the logarithm of the number of elements, as the precision of a posterior grows with it.

Nested plates are pooled from the inside out, so that the spread between groups and that within them are told apart:
of all groups inside, squares off the means of groups are added up, and so are their degrees of freedom. The logarithm
of their ratio is an estimate of a scale that has the same meaning for groups of any size, that of the latter says how
good it is. From the variance between the means of groups what the spread inside of them explains is taken off, as in
an analysis of variance (Searle et al. 1992). Logarithms of variances have squares as well, for scales are not linear in
them in every coordinate.
With ``pool="attention"`` the learned features are weighed by a learned query instead of averaged (:class:`Attention`).

Crossed plates have no inner one; they are pooled in one order for each of them. Data that look up a group by an index
(``theta[group]``) count as nested in the groups: they are pooled group by group.

A summary of a *subsampled* plate is not allowed: with the likelihood scaled by ``N / B`` and a guide that has seen
the same ``B`` elements, the objective is no bound on the evidence (a guide that fits each batch overstates it).

Latent sites in other plates can come in one by one where they are few (:class:`AllElements`), or looked up by an index
(:class:`LookedUp`); where they are many, the data of a group say of which the mean comes in
(:class:`MeansOfLookedUp`). All are summaries for a block's inputs, with the same three methods.

References:
    [1] Zaheer et al. (2017), Deep Sets, Theorem 2.
    [2] Searle, Casella and McCulloch (1992), Variance Components, Chapter 3.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.plan import subsampled_message
from pyro_graphflows.guides.sites import FeatureMap, concatenate
from pyro_graphflows.nn.activations import make_activation

__all__ = [
    "POOLS",
    "AllElements",
    "Attention",
    "DeepSet",
    "DeepSetPool",
    "Elements",
    "LookedUp",
    "MeansOfLookedUp",
    "Pool",
    "PoolMember",
    "pooling_orders",
]

MOST_WITH_PAIRS = 2  # covariates up to which means are of products with their products as well
MOST_CROSSED = 8  # entries of a tuple up to which all products are taken, and not only squares
VARIANCE_FLOOR = 1e-4  # in standardised units
LEAST_SPREAD = 0.1  # of learned features: means of many elements vary less, until their networks are trained
SHARE = 0.05  # of the variance between groups and of noise, near which the difference is rounded off
CHUNK_ROWS = 100_000  # of joint samples at set-up


@dataclass(frozen=True)
class PoolMember:
    """One node that is pooled.

    Attributes:
        name: The node.
        size: The number of its features.
        plates: The plates around it.
        partly: Whether its last column says what is there (a site with ``obs_mask=``) and is no feature.
        weighs: Whether an element counts only where this node is not masked (data and latent sites, not inputs).
    """

    name: str
    size: int
    plates: frozenset[str]
    partly: bool = False
    weighs: bool = True


def without_leading_ones(value: Tensor) -> Tensor:
    """Drop leading dimensions of size one."""
    first = next((i for i, size in enumerate(value.shape[:-1]) if size != 1), value.dim() - 1)
    return value.reshape(value.shape[first:])


def affine_part(feature_map: FeatureMap, columns: Sequence[int] | range, name: str) -> tuple[Tensor, Tensor]:
    """Return the shift and scale of some columns of a feature map.

    Raises:
        GraphflowsError: If the map is not affine there.
    """
    for kind, part in feature_map.kinds:
        if kind != "identity" and any(part.start <= column < part.stop for column in columns):
            raise GraphflowsError(f"Expected an affine map of {name} to its pooled mean; got a {kind} map.")
    chosen = list(columns)
    return feature_map.shift[chosen], feature_map.scale[chosen]


@dataclass(frozen=True)
class DeepSet:
    """The shape of the learned part of a pooled summary.

    Attributes:
        embedding_dim: The number of learned features that are averaged, and of random ones that are not learned; 0
            leaves moments and group size alone.
        hidden_dims: The widths of the hidden layers between a tuple and these features.
        activation: The activation function.
        sums: Whether a site given which the elements of a plate are independent has its prior times one factor for
            each element, where that fits joint samples as well as a factor that reads the summary
            (:mod:`~pyro_graphflows.guides.conditionals.summed`).
    """

    embedding_dim: int = 16
    hidden_dims: Sequence[int] = (32,)
    activation: str = "elu"
    sums: bool = True

    def network(self, num_inputs: int) -> nn.Sequential:
        """Return a new network from a tuple to features."""
        widths = [num_inputs, *self.hidden_dims]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), make_activation(self.activation)]
        return nn.Sequential(*layers, nn.Linear(widths[-1], self.embedding_dim))


@dataclass(frozen=True)
class Attention(DeepSet):
    """Learned features that are pooled by attention instead of averaged: elements are weighed by what they are.

    A learned query looks at the learned features of all elements (PyTorch's multi-head attention); moments, random
    features and the number of elements are those of a deep set.

    Attributes:
        num_heads: The number of heads, which divides ``embedding_dim``.

    References:
        [1] Lee et al. (2019), Set Transformer, Section 3.2 (pooling by attention, with one seed).

    Raises:
        GraphflowsError: If there are no learned features, or the heads do not divide them.
    """

    num_heads: int = 4

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.embedding_dim < 1 or self.embedding_dim % self.num_heads:
            raise GraphflowsError(
                "Expected a positive embedding_dim that num_heads divides; got "
                f"{self.embedding_dim} and {self.num_heads}."
            )

    def attention(self) -> "QueryAttention":
        """Return new attention over learned features."""
        return QueryAttention(self.embedding_dim, self.num_heads)


class QueryAttention(nn.Module):
    """Pools the elements of a plate by one learned query.

    Args:
        size: The number of features.
        num_heads: The number of heads.
    """

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, size) / size**0.5)
        self.attention = nn.MultiheadAttention(size, num_heads, batch_first=True)

    def forward(self, each: Tensor, weight: Tensor | None, dim: int) -> Tensor:
        """Return the pooled features; zeros where no element is there.

        Args:
            each: Features of the elements, ``(*batch, size)``.
            weight: One where an element is there, zero where not, ``(*batch, 1)``; None if all are.
            dim: The dimension of the elements, of the batch shape.
        """
        moved = each.movedim(dim - 1, -2)  # (*rest, elements, size)
        rows = moved.reshape(-1, *moved.shape[-2:])
        missing, there = None, None
        if weight is not None:
            seen = (weight.expand(*each.shape[:-1], 1) > 0).movedim(dim - 1, -2)
            missing = ~seen.reshape(-1, seen.shape[-2])
            there = ~missing.all(-1)
            missing = missing & there.unsqueeze(
                -1
            )  # a softmax over nothing is NaN: empty ones are zeroed below
        query = self.query.expand(len(rows), 1, -1)
        pooled, _ = self.attention(query, rows, rows, key_padding_mask=missing, need_weights=False)
        if there is not None:
            pooled = torch.where(there[:, None, None], pooled, torch.zeros_like(pooled))
        return pooled.reshape(*moved.shape[:-2], 1, moved.shape[-1]).movedim(-2, dim - 1)


class RandomFeatures(nn.Module):
    """A network whose weights are buffers, and so are never trained."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for module in network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach().clone())
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = self.network(x)
        return features


@dataclass(frozen=True)
class Segments:
    """Groups of the elements of a plate, by an index.

    Attributes:
        index: For each element of the plate the number of its group.
        dim: The dimension of the plate of the groups.
        size: The number of groups.
    """

    index: Tensor
    dim: int
    size: int

    def add(self, value: Tensor, dim: int, size: int) -> Tensor:
        """Sum over the elements of each group.

        Args:
            value: Shape ``(*batch, features)``.
            dim: The dimension of the plate of the elements, of the batch shape.
            size: The number of elements.

        Returns:
            The same with the groups in their own dimension, and size one in that of the elements if it is another.
        """
        depth = 1 - min(dim, self.dim)
        value = value.reshape((1,) * (depth - value.dim()) + value.shape)
        shape = list(value.shape)
        shape[dim - 1] = size
        value = value.expand(shape)
        shape[dim - 1] = self.size
        total = value.new_zeros(shape).index_add(dim - 1, self.index, value)
        return total if dim == self.dim else total.transpose(dim - 1, self.dim - 1)


@dataclass(frozen=True)
class Elements:
    """The elements of a plate, before they are pooled.

    Attributes:
        core: Features that get squares and products: of nodes in the plate, means of groups inside of it.
        carried: Other features of groups inside of it, and where members are there if there are several.
        weight: One where an element is there, zero where not, ``(*batch, 1)``; None if all are.
        dim: The dimension of the plate, counted from the right without the feature dimension.
        size: The size of the plate.
        segments: The groups of the elements, if they belong to several.
        judged: Whether anything that says which elements count has been met.
        inside: What the elements are made of, where they are groups themselves.
    """

    core: Tensor
    carried: Tensor
    weight: Tensor | None
    dim: int
    size: int
    segments: Segments | None
    judged: bool
    inside: "PooledGroups | None" = None

    def only(self, kept: Tensor) -> "Elements":
        """Return the same where some elements count alone.

        Args:
            kept: One for these, zero for others, ``(*batch, 1)``.
        """
        return replace(self, weight=kept if self.weight is None else kept * self.weight)

    @property
    def joint(self) -> Tensor:
        """All features, ``(*batch, num_features)``."""
        return torch.cat([self.core, self.carried], -1) if self.carried.shape[-1] else self.core

    def of_groups(self, value: Tensor) -> Tensor:
        """Return what belongs to the site outside, for each element: of its own group if there are several.

        Args:
            value: Shape ``(*batch, n)``, with the groups in their dimension.
        """
        if self.segments is None:
            return value
        groups, depth = self.segments, 1 - min(self.dim, self.segments.dim)
        value = value.reshape((1,) * (depth - value.dim()) + value.shape)
        if value.shape[groups.dim - 1] == 1 != groups.size:
            return value  # the same for all groups
        chosen = value.index_select(groups.dim - 1, groups.index)
        return chosen if groups.dim == self.dim else chosen.transpose(groups.dim - 1, self.dim - 1)

    def total(self, value: Tensor) -> Tensor:
        """Sum numbers of the elements over the plate, or over the groups of elements; zero over nothing.

        Args:
            value: Shape ``(*batch, n)``.

        Returns:
            The same with size one in the place of the plate, leading dimensions of size one dropped.
        """
        if self.weight is not None:
            # what is not there may be anything
            value = torch.where(
                self.weight > 0, value, torch.zeros((), dtype=value.dtype, device=value.device)
            )
        if self.segments is not None:
            return without_leading_ones(self.segments.add(value, self.dim, self.size))
        if value.dim() < 1 - self.dim or value.shape[self.dim - 1] == 1 != self.size:
            total = value * float(self.size)  # all elements are alike
        else:
            total = value.sum(self.dim - 1, keepdim=True)
        return without_leading_ones(total)


@dataclass(frozen=True)
class PooledGroups:
    """Groups of elements after pooling, as members of what is around them.

    Attributes:
        core: See :class:`Elements`.
        carried: See :class:`Elements`.
        there: Which groups are not empty; None if all.
        judged: See :class:`Elements`.
        log_number: The logarithm of the numbers of their elements, ``(*batch, 1)``.
        log_variance: Logarithms of the variances of core features inside of groups, with a floor.
        unit: The units in which ``core`` counts these features.
        spreads: For each plate pooled so far, from the inside out, sums of squares of core features off their means,
            and at last their degrees of freedom, ``(*batch, features + 1)``.
    """

    core: Tensor
    carried: Tensor
    there: Tensor | None
    judged: bool
    log_number: Tensor
    log_variance: Tensor
    unit: Tensor
    spreads: tuple[Tensor, ...] = ()

    def variances_of_means(self) -> Tensor:
        """Return the variances of means by the spread inside of groups, in units of ``core``; NaN for one element."""
        number = self.log_number.exp()
        variance = (self.log_variance.exp() - VARIANCE_FLOOR) / self.unit.square()
        return torch.where(number > 1.5, variance / number, torch.full_like(variance, torch.nan))


class PoolStage(nn.Module):
    """Average over one plate.

    *Core* features get squares and products, *carried* ones are averaged as they are.

    Args:
        core: The number of core features.
        carried: What each carried feature is.
        inside: The numbers of core features of the plates pooled before, from the inside out.
        options: The shape of the learned part.

    Attributes:
        carries: What each carried feature is that comes out.
        typical: Logarithms of variances, of core features and of those inside, where there are no degrees of freedom.
    """

    pairs: Tensor
    typical: Tensor

    def __init__(
        self, core: int, carried: Sequence["Carried"], inside: Sequence[int], options: DeepSet
    ) -> None:
        super().__init__()
        if core <= MOST_CROSSED:
            pairs = torch.triu_indices(core, core)
        else:
            pairs = torch.arange(core).expand(2, core).clone()
        self.register_buffer("pairs", pairs, persistent=False)
        self.embedding: nn.Module | None = None
        self.attention: QueryAttention | None = None
        self.random: RandomFeatures | None = None
        self._fixed = [i for i, each in enumerate(carried) if not each.learned]
        if options.embedding_dim:
            self.embedding = options.network(core + len(carried))
            self.attention = options.attention() if isinstance(options, Attention) else None
            self.random = RandomFeatures(options.network(core + len(self._fixed)))
        plain, size, learned = Carried(), Carried(of_sizes=True), Carried(learned=True)
        variance = Carried(of_variances=True)
        self.carries = [*[plain] * pairs.shape[1], *[variance] * core, *carried]
        self.carries += [*[plain] * options.embedding_dim, *[learned] * options.embedding_dim]
        for number in inside:
            self.carries += [*[variance] * number, size]
        self._between = inside[-1] if inside else 0
        self._squares = core + sum(inside) + self._between if core <= MOST_CROSSED else 0
        self.carries += [*[variance] * self._between, *[plain] * self._squares, size]
        self.core_size = core
        self.num_carried = len(carried)
        self.inside = tuple(inside)
        self.register_buffer("typical", torch.full((core + sum(inside),), math.log(VARIANCE_FLOOR)))
        # standardisation of what comes out, found at set-up
        self.core_map = FeatureMap(None, torch.zeros(0, self.core_size), standardize=False)
        self.carried_map = FeatureMap(None, torch.zeros(0, len(self.carries)), standardize=False)

    def forward(self, elements: Elements) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Return the core and carried features of the groups, which groups are not empty, and spreads.

        Args:
            elements: The elements; averaged group by group if they belong to several, else all of them are one group.
        """
        core, carried, weight, dim = elements.core, elements.carried, elements.weight, elements.dim
        segments, size = elements.segments, elements.size
        square = core[..., self.pairs[0]] * core[..., self.pairs[1]]
        below: tuple[Tensor, ...] = ()
        if elements.inside is not None:
            below = (*elements.inside.spreads, torch.exp(-elements.inside.log_number))
        parts = [core, square, *below, carried]
        if self.embedding is not None and self.random is not None:
            joint = torch.cat([core, carried], -1)
            fixed = joint
            if len(self._fixed) < self.num_carried:
                fixed = torch.cat([core, carried[..., self._fixed]], -1)
            learned: Tensor = self.embedding(joint)
            parts += [self.random(fixed), learned]
        each = concatenate(parts)
        if segments is not None or weight is not None:
            weight = each.new_ones(1) if weight is None else weight
            weight = weight.expand(np.broadcast_shapes(weight.shape, (*each.shape[:-1], 1)))
        if weight is None:
            mean = each.mean(dim - 1, keepdim=True)
            number = each.new_full((1,) * mean.dim(), float(size))
            there = None
        else:
            total, number = (
                part.sum(dim - 1, keepdim=True) if segments is None else segments.add(part, dim, size)
                for part in (weight * each, weight)
            )
            mean = total / number.clamp(min=1.0)
            there = (number > 0).to(each.dtype)
        if self.attention is not None:
            attended = self.attention(learned, weight, dim)
            mean = torch.cat([mean[..., : -attended.shape[-1]], attended], -1)
        sizes = [self.core_size, square.shape[-1], *(part.shape[-1] for part in below)]
        first, second, *of_below, rest = mean.split([*sizes, mean.shape[-1] - sum(sizes)], -1)
        number = number.expand(*mean.shape[:-1], 1)
        squares = number * (second[..., self.pairs[0] == self.pairs[1]] - first.square()).clamp(min=0.0)
        own = torch.cat([squares, (number - 1.0).clamp(min=0.0)], -1)
        spreads = (*(number * part for part in of_below[:-1]), own)
        typical = self.typical.split([*self.inside, self.core_size])
        logarithms = [self._log_variances(*pair) for pair in zip(spreads, typical, strict=True)]
        log_number = number.clamp(min=0.5).log()
        inside = [part for pair in logarithms[:-1] for part in pair]
        known = [variance - usual for (variance, _), usual in zip(logarithms, typical, strict=True)]
        if elements.inside is not None:
            unit = elements.inside.unit.square()
            noise = (logarithms[-2][0].exp() / unit).nan_to_num(0.0) * of_below[-1]
            inside.append(self._log_beyond(logarithms[-1][0][..., : self._between].exp(), noise))
            known.append(inside[-1] - typical[-1][: self._between])
        if self._squares:
            inside += [each.square() for each in known]
        carried = torch.cat([second, logarithms[-1][0], rest, *inside, log_number], -1)
        return first, carried, there, spreads

    @staticmethod
    def _log_beyond(between: Tensor, noise: Tensor) -> Tensor:
        """Return the logarithm of what noise does not explain of variances, smooth where that is nothing."""
        left = between - noise
        return (0.5 * (left + (left.square() + (SHARE * (between + noise)).square()).sqrt())).log()

    @staticmethod
    def _log_variances(spread: Tensor, typical: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of variances and of their degrees of freedom."""
        squares, freedom = spread[..., :-1], spread[..., -1:]
        variance = squares / freedom.clamp(min=1.0) + VARIANCE_FLOOR
        return torch.where(freedom > 0, variance.log(), typical), freedom.clamp(min=0.5).log()

    def fit_(self, elements: Elements) -> None:
        """Find the standardisation of what comes out, and variances where there are none, from samples.

        Args:
            elements: See :meth:`forward`.
        """
        *_, spreads = self(elements)
        start = 0
        for spread in spreads:
            unknown = torch.full_like(self.typical[start : start + spread.shape[-1] - 1], torch.nan)
            found, _ = self._log_variances(spread, unknown)
            mean = found.reshape(-1, found.shape[-1]).nanmean(0)
            old = self.typical[start : start + len(mean)]
            self.typical[start : start + len(mean)] = torch.where(mean.isfinite(), mean, old)
            start += len(mean)
        core, carried, *_ = self(elements)
        self.core_map = FeatureMap(None, core.reshape(-1, core.shape[-1]))
        self.carried_map = FeatureMap(None, carried.reshape(-1, carried.shape[-1]))
        learned = [i for i, each in enumerate(self.carries) if each.learned]
        self.carried_map.scale[learned] = self.carried_map.scale[learned].clamp(min=LEAST_SPREAD)


@dataclass(frozen=True)
class Carried:
    """What a feature of a summary is.

    Attributes:
        learned: Whether it depends on parameters.
        of_sizes: Whether it is a function of the numbers of elements alone.
        of_variances: Whether it is the logarithm of a variance, or a mean of these.
    """

    learned: bool = False
    of_sizes: bool = False
    of_variances: bool = False


def pooling_orders(plates: Sequence[str], around: Sequence[AbstractSet[str]]) -> tuple[tuple[str, ...], ...]:
    """Return the orders, outer to inner, in which plates are pooled, one for each innermost plate.

    A plate is inside another if all that is in the first is in the second too; of two plates with the same nodes, the
    later one.

    Args:
        plates: The plates to pool over.
        around: For each node of the model, the plates around it.

    Example:
        >>> pooling_orders(["pupils", "schools"], [{"pupils", "schools"}, {"schools"}])
        (('schools', 'pupils'),)
        >>> pooling_orders(["rows", "columns"], [{"rows", "columns"}, {"rows"}, {"columns"}])
        (('columns', 'rows'), ('rows', 'columns'))
    """
    inside = {
        (one, other): all(other in each for each in around if one in each)
        and (any(other in each and one not in each for each in around) or i > j)
        for i, one in enumerate(plates)
        for j, other in enumerate(plates)
        if i != j
    }
    depth = {one: sum(inside[one, other] for other in plates if other != one) for one in plates}
    innermost = [one for one in plates if not any(inside[other, one] for other in plates if other != one)]
    orders = []
    for last in innermost:
        rest = [plate for plate in plates if plate != last]
        orders.append((*sorted(rest, key=lambda plate: (depth[plate], plates.index(plate))), last))
    return tuple(orders)


class DeepSetPool(nn.Module):
    """A summary of what is inside plates.

    Args:
        members: The nodes that are pooled, jointly.
        maps: For each of them, the map from values to standardised features.
        orders: The orders in which the plates are pooled, each outer to inner (:func:`pooling_orders`).
        options: The shape of the learned part.
        segments: Triples (inner, outer, index) of plates whose elements are pooled group by group, by an index.
        linear: Affine maps of members with others, for elements by themselves (:meth:`elements`).

    Shape:
        - values: for each member ``(*batch, size)``, the plates at their own dimensions of the batch shape; of an index
          any shape with one entry for each element.
        - Output: ``(*batch, num_features)`` without the pooled plates; leading dimensions of size one are dropped.
    """

    def __init__(
        self,
        members: Sequence[PoolMember],
        maps: Sequence[FeatureMap],
        orders: Sequence[Sequence[str]],
        options: DeepSet,
        segments: Sequence[tuple[str, str, str]] = (),
        linear: Mapping[str, FeatureMap] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.members = tuple(members)
        self.linear = nn.ModuleDict({str(self.names().index(name)): each for name, each in linear.items()})
        self.options = options
        self.segments = tuple(segments)
        if self.segments and isinstance(options, Attention):
            raise UnsupportedModelError(
                f"Expected pool='deepset' where elements are pooled group by group, by {segments[0][2]}; got "
                "pool='attention', which pools whole plates."
            )
        self.indices = tuple(dict.fromkeys(index for _, _, index in segments))
        self.maps = nn.ModuleList(maps)
        self.orders = tuple(map(tuple, orders))
        self._masked = (
            sum(member.weighs for member in members) > 1
        )  # then masks may differ: they are features
        self.branches = nn.ModuleList()
        of_features: list[Carried] = []
        for order in self.orders:
            stages: list[PoolStage] = []
            core = 0
            carried: list[Carried] = []
            for position in reversed(range(len(order))):
                joining = self._joining(order, position)
                core += sum(member.size for member in joining)
                carried += [Carried()] * sum(self._masked and member.weighs for member in joining)
                stages.append(PoolStage(core, carried, [each.core_size for each in stages], options))
                carried = list(stages[-1].carries)
            self.branches.append(nn.ModuleList(stages))
            of_features += [*[Carried()] * core, *carried]
        self.num_features = len(of_features)
        self.learned = [each.learned for each in of_features]  # whether a feature depends on parameters
        self.of_sizes = [each.of_sizes for each in of_features]  # or on numbers of elements alone
        self.of_variances = [each.of_variances for each in of_features]

    def to_plain(self) -> dict[str, Any]:
        """Return what the summary is made from, and the kinds of its maps."""
        stages = [stage for branch in self.branches for stage in _stages(branch)]
        return {
            "members": self.members,
            "orders": self.orders,
            "options": self.options,
            "segments": self.segments,
            "maps": _kinds(self.maps),
            "linear": _kinds(nn.ModuleList(self.linear.values())),
            "stages": tuple((tuple(s.core_map.kinds), tuple(s.carried_map.kinds)) for s in stages),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "DeepSetPool":
        """Return a summary of the same form, for a state that is loaded."""
        pool = cls(
            *(plain["members"], _maps(plain["maps"]), plain["orders"], plain["options"], plain["segments"]),
            {
                member.name: each
                for member, each in zip(plain["members"], _maps(plain["linear"]), strict=False)
            },
        )
        stages = [stage for branch in pool.branches for stage in _stages(branch)]
        for stage, (core, carried) in zip(stages, plain["stages"], strict=True):
            stage.core_map, stage.carried_map = FeatureMap.of_kinds(core), FeatureMap.of_kinds(carried)
        return pool

    def _joining(self, order: Sequence[str], position: int) -> list[PoolMember]:
        """Return the members whose innermost plate in an order is at a position."""
        return [
            member
            for member in self.members
            if max((i for i, plate in enumerate(order) if plate in member.plates), default=-1) == position
        ]

    def forward(
        self,
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState],
        masks: Mapping[str, Tensor | bool],
    ) -> Tensor:
        """Return the summary.

        Args:
            values: For each member its flat values; the indices as they are.
            plates: The plates of the call.
            masks: Masks by member, of batch shape; those without one are complete.

        Raises:
            GraphflowsError: If a plate is subsampled in this call, or an index is not one of its groups.
        """
        return without_leading_ones(self._run(values, plates, masks, fit=False))

    @torch.no_grad()
    def of_samples(
        self,
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState],
        *,
        fit: bool,
        kept: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """Return the summaries of joint samples.

        Args:
            values: For each member ``(draws, *batch, size)``, all of the same number of dimensions.
            plates: The plates.
            fit: Whether to set the standardisation of all stages, from a first part of the draws.
            kept: For some plates which elements count in each draw, ``(draws, *batch, 1)``; all of the others.

        Returns:
            Shape ``(draws, *batch, num_features)``.
        """
        of_members = [values[member.name] for member in self.members]
        draws = max(len(value) for value in of_members)
        elements = max(value[0, ..., 0].numel() for value in of_members)
        chunk = max(2, CHUNK_ROWS // elements)
        found = []
        for start in range(0, draws, chunk):
            part = {m.name: values[m.name][start : start + chunk] for m in self.members}
            indices = {name: values[name] for name in self.indices}
            some = {name: each[start : start + chunk] for name, each in kept.items()}
            summary = self._run({**part, **indices}, plates, {}, fit=fit and start == 0, kept=some)
            found.append(summary.expand(len(next(iter(part.values()))), *summary.shape[1:]))
        return torch.cat(found)

    def _run(
        self,
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState],
        masks: Mapping[str, Tensor | bool],
        fit: bool,
        kept: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        features, weights = self._features(values, masks)
        parts = []
        for order, stages in zip(self.orders, self.branches, strict=True):
            below: PooledGroups | None = None
            for position, stage in zip(reversed(range(len(order))), stages.children(), strict=True):
                assert isinstance(stage, PoolStage)
                elements = self._elements_at(order, position, (features, weights), below, values, plates)
                if order[position] in kept:
                    elements = elements.only(kept[order[position]])
                below = self._pooled(stage, elements, fit)
            assert below is not None
            parts += [below.core, below.carried]
        return concatenate(parts)

    @staticmethod
    def _pooled(stage: PoolStage, elements: "Elements", fit: bool) -> "PooledGroups":
        if fit:
            stage.fit_(elements)
        one, other, there, spreads = stage(elements)
        first = stage.pairs.shape[1]
        unit = stage.core_map.scale
        if any(kind != "identity" for kind, _ in stage.core_map.kinds):
            unit = torch.full_like(unit, torch.nan)  # features that are not linear in means
        raw = other[..., -1:], other[..., first : first + stage.core_size], unit
        return PooledGroups(
            stage.core_map(one), stage.carried_map(other), there, elements.judged, *raw, spreads
        )

    def _elements_at(
        self,
        order: Sequence[str],
        position: int,
        members: tuple[Mapping[str, Tensor], Mapping[str, Tensor | None]],
        below: "PooledGroups | None",
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState],
    ) -> "Elements":
        """Return what is pooled over a plate: the members that are in no inner plate, and groups pooled before."""
        features, weights = members
        plate = plates[order[position]]
        if plate.subsampled:
            raise GraphflowsError(subsampled_message(plate.name, [m.name for m in self.members]))
        joining = self._joining(order, position)
        weighing = [weights[member.name] for member in joining if member.weighs]
        masked = list(weighing)
        judged = (
            below is not None and below.judged
        )  # whether anything that says which elements count has been met
        if below is not None and judged:
            weighing.append(below.there)
        core = [] if below is None else [below.core]
        core += [features[member.name] for member in joining]
        carried = [] if below is None else [below.carried]
        if self._masked:
            like = core[0]
            carried += [like.new_ones(1) if mask is None else mask for mask in masked]
        joint = concatenate(core)
        return Elements(
            joint,
            concatenate(carried, like=joint),
            _any(weighing),
            plate.dim,
            plate.size,
            self._segments_of(plate, values, plates),
            judged or bool(weighing),
            below,
        )

    def names(self) -> list[str]:
        """Return the names of the members."""
        return [member.name for member in self.members]

    def in_core_order(self) -> list[PoolMember]:
        """Return the members in the order of the core features of :meth:`elements`, for summaries in one order."""
        (order,) = self.orders
        return [m for position in reversed(range(len(order))) for m in self._joining(order, position)]

    def learned_of_elements(self) -> list[bool]:
        """Return for each feature of :meth:`elements` whether it depends on parameters."""
        (order,), (branch,) = self.orders, self.branches
        stages = _stages(branch)
        inside = [each.learned for each in stages[-2].carries] if len(stages) > 1 else []
        masks = sum(member.weighs for member in self._joining(order, 0)) if self._masked else 0
        return [*[False] * sum(member.size for member in self.members), *inside, *[False] * masks]

    def elements(
        self,
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState],
        masks: Mapping[str, Tensor | bool] = MappingProxyType({}),
    ) -> "Elements":
        """Return what is pooled over the outermost plate, element by element, for summaries in one order.

        Args:
            values: See :meth:`forward`.
            plates: The plates of the call.
            masks: Masks by member.
        """
        (order,), (stages,) = self.orders, self.branches
        members = self._features(values, masks, linear=len(order) == 1)
        below: PooledGroups | None = None
        for position, stage in zip(reversed(range(1, len(order))), stages.children(), strict=False):
            assert isinstance(stage, PoolStage)
            below = self._pooled(
                stage, self._elements_at(order, position, members, below, values, plates), False
            )
        return self._elements_at(order, 0, members, below, values, plates)

    def _segments_of(
        self, plate: PlateState, values: Mapping[str, Tensor], plates: Mapping[str, PlateState]
    ) -> Segments | None:
        """Return the groups of a plate's elements, if there are groups."""
        for inner, outer, name in self.segments:
            if inner != plate.name:
                continue
            groups, index = plates[outer], values[name].reshape(-1)
            if groups.subsampled:
                raise GraphflowsError(
                    f"Expected plate {outer!r} in full, since elements of {inner!r} are pooled by {name}, which "
                    "tells their element there; it is subsampled in this call. Use the full data."
                )
            if len(index) != plate.size or bool(((index < 0) | (index >= groups.size)).any()):
                raise GraphflowsError(
                    f"Expected {plate.size} entries of {name} between 0 and {groups.size - 1}, one for each element of "
                    f"plate {inner!r}, which say which element of {outer!r} it belongs to; got {len(index)} between "
                    f"{index.min()} and {index.max()}."
                )
            return Segments(index.to(values[self.members[0].name].device).long(), groups.dim, groups.size)
        return None

    def _features(
        self, values: Mapping[str, Tensor], masks: Mapping[str, Tensor | bool], *, linear: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Return the standardised features of each member, and where it is there (None: everywhere)."""
        features: dict[str, Tensor] = {}
        weights: dict[str, Tensor | None] = {}
        for i, member in enumerate(self.members):
            feature_map: nn.Module = self.maps[i]
            if linear and str(i) in self.linear:
                feature_map = self.linear[str(i)]
            value = values[member.name]
            mask: Tensor | None = None
            if member.partly:
                value, mask = value[..., :-1], value[..., -1:] > 0
            elif member.name in masks and masks[member.name] is not True:
                mask = torch.as_tensor(masks[member.name], device=value.device).unsqueeze(-1)
            if mask is None:
                features[member.name], weights[member.name] = feature_map(value), None
                continue
            zero = torch.zeros((), dtype=value.dtype, device=value.device)
            features[member.name] = torch.where(mask, feature_map(torch.where(mask, value, zero)), zero)
            weights[member.name] = mask.to(value.dtype)
        return features, weights

    def columns_of(self, name: str, *, of_elements: bool = False) -> tuple[list[int], Tensor, Tensor]:
        """Return the columns of a member's mean, and the shift and scale that turn them into that mean.

        The mean is that over the plates from the inside out: of group means where groups differ in size.

        Args:
            name: The member.
            of_elements: Whether its columns among those of :meth:`elements` are meant.

        Raises:
            GraphflowsError: If a map on the way is not affine.
        """
        order, stages = self.orders[0], self.branches[0]
        assert isinstance(stages, nn.ModuleList)
        columns: list[int] = []
        shift, scale = torch.zeros(0), torch.ones(0)
        for position, stage in zip(reversed(range(len(order))), stages, strict=True):
            assert isinstance(stage, PoolStage)
            joining = self._joining(order, position)
            start = 0 if position == len(order) - 1 else self._core_size_before(order, position)
            for member in joining:
                if member.name == name:
                    columns = list(range(start, start + member.size))
                    feature_map = self.maps[self.members.index(member)]
                    own = str(self.members.index(member))
                    if of_elements and len(order) == 1 and own in self.linear:
                        feature_map = self.linear[own]
                    assert isinstance(feature_map, FeatureMap)
                    shift, scale = affine_part(feature_map, range(member.size), name)
                start += member.size
            if columns and not (of_elements and position == 0):
                more_shift, more_scale = affine_part(stage.core_map, columns, name)
                shift, scale = shift + scale * more_shift, scale * more_scale
        return columns, shift, scale

    def _core_size_before(self, order: Sequence[str], position: int) -> int:
        return sum(m.size for p in range(position + 1, len(order)) for m in self._joining(order, p))


def _stages(branch: nn.Module) -> list[PoolStage]:
    return [stage for stage in branch.children() if isinstance(stage, PoolStage)]


def _kinds(maps: nn.ModuleList) -> tuple[tuple[tuple[str, slice], ...], ...]:
    return tuple(tuple(each.kinds) for each in maps if isinstance(each, FeatureMap))


def _maps(kinds: Sequence[Sequence[tuple[str, slice]]]) -> list[FeatureMap]:
    return [FeatureMap.of_kinds(each) for each in kinds]


def _any(weights: Sequence[Tensor | None]) -> Tensor | None:
    """Return where anything is there; None if something is there everywhere."""
    if not weights or any(weight is None for weight in weights):
        return None
    total = weights[0]
    for weight in weights[1:]:
        assert total is not None
        assert weight is not None
        total = torch.maximum(total, weight)
    return total


class _SomeElements(nn.Module):
    """Elements of other plates as they are: nothing is fitted, and masks do not matter."""

    indices: tuple[str, ...] = ()

    def _run(self, values: Mapping[str, Tensor], plates: Mapping[str, PlateState]) -> Tensor:
        raise NotImplementedError("a subclass must say which elements")

    def forward(
        self,
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState],
        masks: Mapping[str, Tensor | bool],
    ) -> Tensor:
        """Return the elements; see the class for what is refused."""
        return without_leading_ones(self._run(values, plates))

    @torch.no_grad()
    def of_samples(
        self, values: Mapping[str, Tensor], plates: Mapping[str, PlateState], *, fit: bool
    ) -> Tensor:
        """See :meth:`DeepSetPool.of_samples`."""
        return self._run(values, plates)


class AllElements(_SomeElements):
    """All elements of latent sites in other plates, one by one: for plates that are small and keep their size.

    Args:
        members: The nodes.
        maps: For each of them, the map from values to standardised features.
        over: The plates whose elements become features.

    Shape:
        - values: for each member ``(*batch, size)``.
        - Output: ``(*batch, num_features)``, as for :class:`DeepSetPool`.

    Raises:
        GraphflowsError: In a call, if a plate has another size than at set-up.
    """

    def __init__(
        self, members: Sequence[PoolMember], maps: Sequence[FeatureMap], over: Sequence[PlateState]
    ) -> None:
        super().__init__()
        self.members = tuple(members)
        self.maps = nn.ModuleList(maps)
        self.over = tuple(replace(plate, indices=None) for plate in over)
        self.sizes = {plate.name: plate.size for plate in over}
        self.counts = []
        for member in members:
            self.counts.append(member.size)
            for plate in over:
                self.counts[-1] *= plate.size if plate.name in member.plates else 1
        self.num_features = sum(self.counts)

    def to_plain(self) -> dict[str, Any]:
        """See :meth:`DeepSetPool.to_plain`."""
        return {"members": self.members, "maps": _kinds(self.maps), "over": self.over}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "AllElements":
        """See :meth:`DeepSetPool.from_plain`."""
        return cls(plain["members"], _maps(plain["maps"]), plain["over"])

    def _run(self, values: Mapping[str, Tensor], plates: Mapping[str, PlateState]) -> Tensor:
        parts = []
        for member, feature_map in zip(self.members, self.maps, strict=True):
            part = feature_map(values[member.name])
            for name, size in self.sizes.items():
                plate = plates[name]
                if plate.subsampled or plate.size != size:
                    raise GraphflowsError(
                        f"Expected plate {name!r} to have {size} elements, all of them in the call, as when the guide "
                        f"was set up, since {member.name} enters other sites element by element; got {plate.size} of "
                        f"{plate.full_size}. Set up a guide for the new data, or use pool='deepset'."
                    )
                if name in member.plates:
                    if (
                        plate.indices is not None
                    ):  # features are of elements, in whichever order a call has these
                        part = part.index_select(plate.dim - 1, plate.indices.to(part.device).argsort())
                    part = _to_features(part, plate.dim - 1, size)
            parts.append(part)
        return concatenate(parts)

    def columns_of(self, name: str) -> tuple[list[int], Tensor, Tensor]:
        """Return the columns of a member's elements, and the shift and scale that turn them into values."""
        position = next(i for i, member in enumerate(self.members) if member.name == name)
        start, count = sum(self.counts[:position]), self.counts[position]
        feature_map = self.maps[position]
        assert isinstance(feature_map, FeatureMap)
        size = self.members[position].size
        shift, scale = affine_part(feature_map, range(size), name)
        return list(range(start, start + count)), shift.repeat(count // size), scale.repeat(count // size)


class LookedUp(_SomeElements):
    """The element of a latent site in another plate that an index names: ``theta[group]`` for each datum.

    Args:
        member: The node.
        feature_map: The map from its values to standardised features.
        index: The name of the index, an argument of an integer type.
        outer: The name of the plate of the node.
        inner: The name of the plate of the index.

    Shape:
        - values: of the node ``(*batch, size)``; of the index any shape with one entry for each element.
        - Output: ``(*batch, size)``, with the plate of the index in place of the other.

    Raises:
        GraphflowsError: In a call, if the outer plate is subsampled, or the index has another number of entries.
    """

    def __init__(
        self, member: PoolMember, feature_map: FeatureMap, index: str, outer: str, inner: str
    ) -> None:
        super().__init__()
        self.members = (member,)
        self.maps = nn.ModuleList([feature_map])
        self.index = index
        self.indices = (index,)
        self.outer, self.inner = outer, inner
        self.num_features = member.size

    def to_plain(self) -> dict[str, Any]:
        """See :meth:`DeepSetPool.to_plain`."""
        return {
            "members": self.members,
            "maps": _kinds(self.maps),
            "index": self.index,
            "plates": (self.outer, self.inner),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "LookedUp":
        """See :meth:`DeepSetPool.from_plain`."""
        return cls(plain["members"][0], _maps(plain["maps"])[0], plain["index"], *plain["plates"])

    def _run(self, values: Mapping[str, Tensor], plates: Mapping[str, PlateState]) -> Tensor:
        outer, inner = plates[self.outer], plates[self.inner]
        name = self.members[0].name
        if outer.subsampled:
            raise GraphflowsError(
                f"Expected plate {outer.name!r} in full, since its elements are looked up by {self.index}; it is "
                "subsampled in this call. Subsample the data only."
            )
        index = _entries(values[self.index], self.index, inner)
        feature_map = self.maps[0]
        part = feature_map(values[name])
        depth = 1 - min(outer.dim, inner.dim)
        part = part.reshape((1,) * (depth - part.dim()) + part.shape)
        part = part.index_select(outer.dim - 1, index.to(part.device))
        return part if outer.dim == inner.dim else part.transpose(outer.dim - 1, inner.dim - 1)

    def columns_of(self, name: str) -> tuple[list[int], Tensor, Tensor]:
        """Return the columns of the member, and the shift and scale that turn them into values."""
        feature_map = self.maps[0]
        assert isinstance(feature_map, FeatureMap)
        columns = list(range(self.num_features))
        return columns, *affine_part(feature_map, columns, name)


class MeansOfLookedUp(_SomeElements):
    """For each group of data the mean of what these look up in another plate: ``b[item]`` for those of each person.

    Of two crossed groupings with normal data of one scale, that is all that an effect depends on given those of the
    other grouping; one that is multiplied by a covariate depends on the mean of products with that, and with its square
    where those of the other grouping are multiplied by it too.

    Args:
        each: What the data look up.
        group: The name of the index by which data look up their group, an argument of an integer type.
        around: The name of the plate of the groups.
        covariates: Numbers of each datum, with which products have means too.
        maps: For each of them, the map from values to standardised features.

    Shape:
        - values: of the nodes ``(*batch, size)``; of each index any shape with one entry for each datum.
        - Output: ``(*batch, num_features)``, with the plate of the groups in place of the other; zero of groups without
          data.

    Raises:
        GraphflowsError: In a call, if one of the plates is subsampled, or an index has another number of entries.
    """

    def __init__(
        self,
        each: LookedUp,
        group: str,
        around: str,
        covariates: Sequence[PoolMember] = (),
        maps: Sequence[FeatureMap] = (),
    ) -> None:
        super().__init__()
        self.each = each
        self.covariates = tuple(covariates)
        self.members = (*each.members, *covariates)
        self.of_covariates = nn.ModuleList(maps)
        self.group, self.around = group, around
        self.indices = (each.index, group)
        number = len(self.covariates)
        self._pairs: list[tuple[int, int]] = []
        if number <= MOST_WITH_PAIRS:
            self._pairs = list(itertools.combinations_with_replacement(range(number), 2))
        self.num_features = each.num_features * (1 + number + len(self._pairs))

    def to_plain(self) -> dict[str, Any]:
        """See :meth:`DeepSetPool.to_plain`."""
        return {
            "each": self.each.to_plain(),
            "plates": (self.group, self.around),
            "covariates": self.covariates,
            "maps": _kinds(self.of_covariates),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "MeansOfLookedUp":
        """See :meth:`DeepSetPool.from_plain`."""
        (group, around), covariates = plain["plates"], plain["covariates"]
        return cls(LookedUp.from_plain(plain["each"]), group, around, covariates, _maps(plain["maps"]))

    def _run(self, values: Mapping[str, Tensor], plates: Mapping[str, PlateState]) -> Tensor:
        inner, around = plates[self.each.inner], plates[self.around]
        for plate in (inner, around):
            if plate.subsampled:
                raise GraphflowsError(
                    f"Expected plate {plate.name!r} in full, since what {inner.name!r} looks up is averaged for each "
                    f"element of {around.name!r}; it is subsampled in this call. Set up the guide with a subsampled "
                    "plate to do without."
                )
        found = self.each._run(values, plates)
        index = _entries(values[self.group], self.group, inner).to(found.device).long()
        groups = Segments(index, around.dim, around.size)
        number = groups.add(found.new_ones(1), inner.dim, inner.size).clamp(min=1.0)
        maps = zip(self.covariates, self.of_covariates, strict=True)
        covariates = [feature_map(values[member.name]) for member, feature_map in maps]
        factors = [*covariates, *(covariates[i] * covariates[k] for i, k in self._pairs)]
        products = concatenate([found, *(found * factor for factor in factors)])
        return groups.add(products, inner.dim, inner.size) / number

    def columns_of(self, name: str) -> tuple[list[int], Tensor, Tensor]:
        """See :meth:`LookedUp.columns_of`; of means."""
        return self.each.columns_of(name)


def _entries(index: Tensor, name: str, plate: PlateState) -> Tensor:
    """Return the entries of an index for the elements of a plate in a call."""
    index = index.reshape(-1)
    if plate.indices is not None and len(index) != plate.size:
        index = index[plate.indices.to(index.device)]
    if len(index) != plate.size:
        raise GraphflowsError(
            f"Expected {plate.size} entries of {name}, one for each element of plate {plate.name!r}; got {len(index)}."
        )
    return index


def _to_features(value: Tensor, at: int, size: int) -> Tensor:
    """Move a dimension to the left of the features and join the two; leave one of size one in its place."""
    value = value.reshape((1,) * (-at - value.dim()) + value.shape)
    shape = list(value.shape)
    shape[at] = size
    moved = value.expand(shape).movedim(at, -2).flatten(-2)
    return moved.unsqueeze(at)


Pool = DeepSetPool | AllElements | LookedUp | MeansOfLookedUp
POOLS: Mapping[str, type[Pool]] = {
    kind.__name__: kind for kind in (DeepSetPool, AllElements, LookedUp, MeansOfLookedUp)
}
