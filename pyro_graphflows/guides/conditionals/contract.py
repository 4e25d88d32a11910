r"""What the conditionals of a block owe to the rest of a guide: the main loop, the starts, and saving.

A block of a guide holds latent sites in the same plates. Its *conditionals* are a module that gives each site a
distribution over its flat unconstrained vector, level by level, from features of the block's context and the values
of earlier levels. Callers use nothing beyond this page; a family is a maker of conditionals (:class:`Family`), and a
third family is one file with one subclass of each.

Units. Features of the context come standardised. A site has two standardisations of its flat vector ``u``: that of
what the network gives for it (``u = shift + scale * y``) and that of its value as an input of later sites. Densities
are of ``u``, in nats.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.conditionals.factors import Factor
from pyro_graphflows.guides.plan import BlockPlan
from pyro_graphflows.guides.sites import JointFactor, LatentSite, SitePrior
from pyro_graphflows.regression import Moments, Regression

__all__ = [
    "UNITS",
    "BlockSpec",
    "Conditionals",
    "ElementParents",
    "Family",
    "LinearConditional",
    "Pass",
    "SiteRole",
    "freeze_widths",
    "require_fusion",
    "require_positive",
]

UNITS = 17  # hidden units and the bias, to which outputs have weights beside those of the parents

ElementParents = Mapping[str, Sequence[Sequence[tuple[str, int]]]]


@dataclass(frozen=True)
class SiteRole:
    """What a family is asked about a site before blocks are made.

    Attributes:
        site: The site.
        coupled: Whether its copies are drawn jointly across a plate.
        own_maps: Whether elements of its plates have parameters or maps of their own.
        factor: The factor class that the user gave for it.
        long: How it is held if it is a vector too long for a full covariance, ``"element"`` or ``"rank"``
            (:mod:`~pyro_graphflows.guides.vectors`); None if it is not.
        is_global: Whether it is in no plate, in a model that has few such sites.
        sets_scale: Whether the scale of another latent site depends on it.
        normal_prior: Whether its prior is normal in unconstrained space.
        skewed_by_data: Whether a guide for one data set has few elements of it, with data that are not normal.
    """

    site: LatentSite
    coupled: bool = False
    own_maps: bool = False
    factor: type[Factor] | None = None
    long: str | None = None
    is_global: bool = False
    sets_scale: bool = False
    normal_prior: bool = True
    skewed_by_data: bool = False


@dataclass(frozen=True)
class BlockSpec:
    """What conditionals are made from.

    Attributes:
        block: The block of the plan.
        context_sizes: For each context node, the number of its features.
        sites: The sites of the block.
        plates: The plates of the block.
        element_parents: For sites whose elements are told apart, the parents of each element, as (node, index in the
            node), -1 for the whole node.
        factors: The factor classes that the user gave for single sites.
        ranks: For vectors too long for a full covariance that depends on its parents, the rank of the covariance beside
            its diagonal; the number of elements for one covariance in full.
        chains: For vectors whose precision is banded, how far neighbours are, and whether running sums are meant.
    """

    block: BlockPlan
    context_sizes: Mapping[str, int]
    sites: Mapping[str, LatentSite]
    plates: Sequence[PlateState] = ()
    element_parents: ElementParents = field(default_factory=dict)
    factors: Mapping[str, type[Factor]] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    chains: Mapping[str, tuple[int, bool]] = field(default_factory=dict)


class Family(ABC):
    """A kind of conditionals with its options. Subclasses are frozen dataclasses; equal families share blocks."""

    @abstractmethod
    def conditionals(self, spec: BlockSpec) -> "Conditionals":
        """Return new conditionals for a block, in float32 on the CPU, at a random start."""

    @abstractmethod
    def serving(self, role: SiteRole) -> "Family":
        """Return the family that serves a site: this one, or another where this one cannot."""

    def block_key(self, role: SiteRole) -> Hashable:
        """Return what the sites of one block have in common, beside plates and family."""
        return None

    @property
    def tells_roles(self) -> bool:
        """Whether :meth:`serving` asks which sites set the scale of others, which takes runs of the model."""
        return False

    @property
    def fusion(self) -> bool | str:
        """Whether conditionals are the model's own distributions of their sites times a factor, or ``"auto"``."""
        return False

    @property
    def can_fuse(self) -> bool:
        """Whether the sites that it serves itself can be fused with their priors."""
        return self.fusion is not False

    @property
    def can_regress(self) -> bool:
        """Whether its conditionals can become linear-Gaussian."""
        return True

    @property
    def can_split(self) -> bool:
        """Whether each element of a vector site can have parents of its own (``resolution="element"``)."""
        return True

    @property
    def has_vectors(self) -> bool:
        """Whether vectors too long for a full covariance (``SiteRole.long``) are served in another way."""
        return False

    def full_size(self, role: SiteRole, num_inputs: int) -> int:
        """Return about how many weights a vector's conditional takes if all its elements depend on each other.

        Args:
            role: The site.
            num_inputs: The number of its inputs.
        """
        n = role.site.size
        return (2 * n + n * (n - 1) // 2) * (num_inputs + UNITS)

    @property
    def can_couple(self) -> bool:
        """Whether continuous sites without a factor of the user's can be drawn jointly across a plate."""
        return True


def freeze_widths(family: Any) -> None:
    """Make ``hidden_dims`` a tuple of positive numbers."""
    widths = family.hidden_dims
    if isinstance(widths, int):
        raise GraphflowsError(f"Expected hidden_dims a sequence of widths, [{widths}]; got {widths}.")
    if widths is not None:
        object.__setattr__(family, "hidden_dims", tuple(widths))
        if any(not isinstance(width, int) or width < 1 for width in family.hidden_dims):
            raise GraphflowsError(f"Expected hidden_dims positive whole numbers; got {list(widths)}.")


def require_fusion(family: Any) -> None:
    """Refuse another ``fusion`` than "auto", True and False."""
    if family.fusion not in (True, False, "auto"):
        raise GraphflowsError(f"Expected fusion='auto', True or False; got {family.fusion!r}.")


def require_positive(family: Any, *names: str) -> None:
    """Refuse options that are no positive whole numbers."""
    for name in names:
        value = getattr(family, name)
        if not isinstance(value, int):
            raise GraphflowsError(f"Expected {name} a whole number; got {value!r}.")
        if value < 1:
            raise GraphflowsError(f"Expected {name} >= 1; got {value}.")


@dataclass(frozen=True)
class LinearConditional:
    r"""One site's conditional, ``y | inputs ~ Normal(loc + sum_p weights[p] @ inputs_p, scale_tril @ scale_tril.T)``.

    In standardised units of parents and site. With a leading dimension of elements everywhere, one for each element
    of the plates along which the site has maps of its own. Of a discrete site, these are logits, and there is no scale.

    Shape:
        - ``weights[p]``: ``(size, parent's features)``; parents that are missing have none.
        - ``loc``: ``(size,)``; ``scale_tril``: ``(size, size)``, lower triangular.
        - ``log_scale[p]``: ``(size, parent's features)``, by which the logarithms of scales follow a parent, in
          families whose outputs they are; nothing by default.

    Attributes:
        exact: Whether it is the conditional, whatever the data, and stays so. What is trained then moves it little.
    """

    weights: Mapping[str, Tensor]
    loc: Tensor
    scale_tril: Tensor
    log_scale: Mapping[str, Tensor] = field(default_factory=dict)
    exact: bool = False

    @property
    def by_element(self) -> bool:
        """Whether there is one for each element."""
        return self.loc.dim() > 1


class Pass(ABC):
    """One evaluation of a block's conditionals; alternates :meth:`next` and :meth:`accept`, level by level.

    Attributes:
        fixed: The conditionals of fused sites whose priors depend on parameters of the model, without gradients for
            these.
    """

    fixed: Mapping[str, dist.TorchDistribution] = MappingProxyType({})

    @abstractmethod
    def next(self, priors: Mapping[str, SitePrior] | None = None) -> dict[str, dist.TorchDistribution]:
        """Return the conditionals of the next level's sites.

        Args:
            priors: The model's own distributions of these sites at the sampled values of their parents, for families
                that use them (:meth:`Conditionals.fuses`).

        Returns:
            For each site a distribution with batch shape ``batch`` and event shape ``(size,)``: of the unconstrained
            vector, or where the site is fused in the coordinate of its prior.
        """

    @abstractmethod
    def accept(self, values: Mapping[str, Tensor]) -> None:
        """Take the flat vectors that the level's sites really have, ``(*batch, size)``: drawn or replaced."""

    def score(self, site: str, drawn_from: Any, flat: Tensor) -> Tensor | None:
        """Return numbers whose gradient is that of the log-density of flat vectors, held fixed, for parameters alone.

        Asked after the pass, and only where gradients of a bound are wanted. Families need not say.

        Args:
            site: The site.
            drawn_from: The distribution that the vectors were drawn from.
            flat: The vectors.

        Returns:
            The numbers, of the shape of the log-density; None where the family does not say.
        """
        return None

    def by_draws(self, site: str, drawn_from: Any, flat: Tensor) -> Tensor | None:
        """Return the log-density of flat vectors as a function of what was drawn, and not of parameters.

        Its gradient is that of the log-density less that of :meth:`score`. For captured programs: its operations are
        those of drawing once more, which are captured once, and it needs no gradients for parameters.

        Args:
            site: The site.
            drawn_from: The distribution that the vectors were drawn from.
            flat: The vectors.

        Returns:
            The log-density; None where the family does not say.
        """
        return None


class Conditionals(nn.Module, ABC):
    """The conditionals of the sites of one block.

    Args:
        spec: What they are made from.

    Attributes:
        block: The block of the plan.
        columns: Where each context node and each site is among context features and sites in sampling order.
        element_columns: For sites whose elements are told apart, the columns that each element may see.
        inner: For these sites, the positions of the earlier elements of the site that each element looks at.
    """

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.block = spec.block
        self.columns: dict[str, range] = {}
        total = 0
        sizes = [(node.name, spec.context_sizes[node.name]) for node in spec.block.context]
        for name, size in [*sizes, *((site, spec.sites[site].size) for site in spec.block.sites)]:
            self.columns[name] = range(total, total + size)
            total += size
        self.num_features = sum(size for _, size in sizes)
        self.num_columns = total
        self.element_columns: dict[str, list[list[int]]] = {}
        self.inner: dict[str, list[list[int]]] = {}
        for site in spec.block.sites:
            if site not in spec.element_parents:
                continue
            seen = set(self.inputs_of(site))
            chosen: list[list[int]] = []
            for parents in spec.element_parents[site]:
                found: set[int] = set()
                for name, index in parents:
                    entries = self.columns.get(name, range(0)) if name != site else range(0)
                    found.update(entries if index < 0 else entries[index : index + 1])
                chosen.append(sorted(found & seen))
            self.element_columns[site] = chosen
            self.inner[site] = [
                [j for name, j in parents if name == site] for parents in spec.element_parents[site]
            ]

    def inputs_of(self, site: str) -> list[int]:
        """Return the columns of a site's parents."""
        return [j for parent in self.block.parents[site] for j in self.columns.get(parent, ())]

    @abstractmethod
    def begin(self, context: Tensor, plates: Mapping[str, PlateState] | None = None) -> Pass:
        """Begin a pass.

        Args:
            context: The features of the context nodes, in the block's order, ``(*batch, num_features)``.
            plates: The plates of the call; without them per-element parameters and couplings are left out.
        """

    # ---------------------------------------------------------------- units and starts

    @abstractmethod
    def output_units(self, site: str) -> tuple[Tensor, Tensor]:
        """Return shift and scale of what the network gives for a site, ``(size,)`` each."""

    @abstractmethod
    def input_units(self, site: str) -> tuple[Tensor, Tensor]:
        """Return shift and scale of a site's values as inputs of later sites, ``(size,)`` each."""

    @abstractmethod
    def set_units_(
        self, site: str, outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Set the standardisations of a site; that of inputs is the same as that of outputs by default."""

    def fuses(self, site: str) -> bool:
        """Whether the conditional of a site is its prior times a factor; False for families without fusion."""
        return False

    def set_fusing_(self, site: str, fuse: bool) -> None:
        """Let a site that can be fused have its prior times a factor, or the factor alone."""

    def fused_units(self, site: str) -> tuple[Tensor, Tensor]:
        """Return shift and scale of the factor in the coordinate of the prior, ``(size,)`` each."""
        return self.output_units(site)

    def set_fused_units_(self, site: str, units: tuple[Tensor, Tensor]) -> None:
        """Set the standardisation of the factor in the coordinate of the prior."""

    def set_fused_(self, site: str, linear: LinearConditional) -> bool:
        """Make the factor beside the prior linear-Gaussian, in units of :meth:`fused_units`; the site is fused then.

        Returns:
            Whether the family can do that, as for :meth:`set_linear_`.
        """
        raise GraphflowsError(f"{type(self).__name__} cannot fuse {site!r} with its prior.")

    def sums(self, site: str) -> bool:
        """Whether a site is fused with factors of the elements of a plate, which its own outputs correct."""
        return False

    def set_summed_(self, site: str, width: Tensor | None) -> None:
        """Let a site have its prior times the factors of elements, as they are.

        Args:
            site: The site.
            width: How wide it is then, in standardised units, ``(1, 1)``; None for a factor of its own instead.
        """

    def whiten_(self, moments: Tensor) -> None:
        """Let trained weights act on inputs that are uncorrelated in joint samples; families need not.

        What the conditionals are after :meth:`set_linear_` does not depend on it, but what a step of training does to
        them (:mod:`~pyro_graphflows.nn.masked`).

        Args:
            moments: The second moments of context features and of the sites' vectors in units of inputs,
                ``(num_columns, num_columns)``.
        """

    @abstractmethod
    def set_linear_(self, site: str, linear: LinearConditional) -> bool:
        """Make one site's conditional linear-Gaussian, the closest member for families that are not Gaussian.

        Parameters for elements become zero, or, where ``linear`` has one conditional for each element, make these.

        Returns:
            Whether the family can do that (it always can without a dimension of elements).
        """

    def set_elements_(self, site: str, locs: Tensor, scale_tril: Tensor) -> bool:
        """Give each element of the plates a normal of its own that reads nothing, where it has parameters of its own.

        Args:
            site: The site.
            locs: In units of outputs, ``(*full plates, size)``.
            scale_tril: Of all elements, ``(size, size)``.

        Returns:
            Whether the family can do that.
        """
        return False

    def regress_(self, site: str, rows: Tensor, moments: Moments) -> None:
        """Make one site's conditional the regression on its parents.

        Args:
            site: The site.
            rows: Joint samples of context features and of the sites' vectors in units of outputs, ``(n, num_columns)``.
            moments: Their moments.
        """
        inputs, own = self.inputs_of(site), list(self.columns[site])
        if site in self.element_columns:
            fit = moments.regress_in_turn(inputs, own, self.element_columns[site], self.inner[site])
        else:
            fit = moments.regress(inputs, own, moments.ridge(inputs, own))
        self.set_linear_(site, self.linear_of(site, fit))

    def linear_of(self, site: str, fit: Regression) -> LinearConditional:
        """Return a regression on all inputs of a site (parents in units of outputs) as a conditional by parents."""
        parents = [parent for parent in self.block.parents[site] if parent in self.columns]
        sizes = [len(self.columns[parent]) for parent in parents]
        weights, loc = dict(zip(parents, fit.weights.split(sizes, -1), strict=True)), fit.loc
        for parent, matrix in weights.items():
            if parent in self.block.parents:  # a site of the block
                shift, scale = (part.to(matrix) for part in self.output_units(parent))
                input_shift, input_scale = (part.to(matrix) for part in self.input_units(parent))
                loc = loc + matrix @ ((input_shift - shift) / scale)
                weights[parent] = matrix * (input_scale / scale)
        return LinearConditional(weights, loc, fit.scale_tril)

    def serve_one_(self, one: bool, *, exact: bool = False) -> None:
        """Say before a start whether it is for one data set; families that train alike for many need not know.

        Args:
            one: Whether it is.
            exact: Whether linear conditionals are about exact, so that training is to move them little.
        """

    def narrow_elements_(self, factor: float, *, fitted: bool = True) -> None:
        """Multiply the scales of the sites with per-element parameters; nothing without such sites.

        Args:
            factor: The number.
            fitted: Whether factors beside priors were fitted; those of sites in no plate are made narrow if not.
        """
        if self.block.per_element:
            raise GraphflowsError(f"{type(self).__name__} has no per-element parameters.")

    def keep_rows_(self, plates: Mapping[str, PlateState], context: Tensor) -> None:
        """Note for which rows of covariates maps of elements are made (``BlockPlan.at_rows``).

        Families without maps need not.

        Args:
            plates: The plates at set-up.
            context: Features of the context, ``(*batch, num_features)``.
        """

    def leave_out_maps_(self, site: str) -> None:
        """Let the maps that elements have of their own for a site be zero, and stay so in training."""

    def start_couplings_(
        self,
        plates: Mapping[str, PlateState],
        context: Tensor | None = None,
        values: Mapping[str, Tensor] | None = None,
        shares: Mapping[str, float] = MappingProxyType({}),
        priors: Mapping[str, tuple[SitePrior, Tensor]] = MappingProxyType({}),
    ) -> None:
        """Start the dependence of sites that are drawn jointly: from joint samples, or near none.

        Args:
            plates: The plates at set-up.
            context: Features of the context in joint samples, ``(draws, *batch, num_features)``.
            values: Vectors of the sites in joint samples, ``(draws, *batch, size)``.
            shares: For fused sites how elements vary together: by how much of the same noise all have, beside a
                variance of one of their own; negative if against each other.
            priors: For fused sites the priors in joint samples, and the values in their coordinates.
        """
        if self.block.coupled:
            raise GraphflowsError(f"{type(self).__name__} cannot draw copies jointly.")

    def set_joint_factor_(self, site: str, plates: Mapping[str, PlateState], factor: JointFactor) -> None:
        """Let a fused site have a factor whose scale does not follow its parents.

        Args:
            site: The site, with parameters for each of its elements, or for each pair.
            plates: The plates at set-up.
            factor: The factor; its slopes are in standardised units of parents.
        """
        raise GraphflowsError(f"{type(self).__name__} has no factors of elements.")
