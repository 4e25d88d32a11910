r"""Families of conditionals: each is an object with its own options.

    auto_faithful_guide(model, *args, family=Flow(num_blocks=5))

A string abbreviates the family with its defaults: ``"auto"`` is ``Auto()``, ``"normal"`` is ``Normal()``,
``"spline"`` is ``Spline()``, ``"flow"`` is ``Flow()``. A subclass of :class:`~pyro_graphflows.guides.Factor` is a
family too: ``Normal(factor=Mine)``. A further family is a frozen
dataclass that derives from :class:`Family`, and its conditionals a subclass of
:class:`~pyro_graphflows.guides.conditionals.contract.Conditionals`.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from pyro_graphflows.distributions.rational_spline import num_spline_parameters
from pyro_graphflows.distributions.spline import BASES
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.conditionals.contract import BlockSpec, Conditionals, Family, SiteRole
from pyro_graphflows.guides.conditionals.factors import Factor, NormalFactor
from pyro_graphflows.guides.conditionals.flow import FlowConditionals
from pyro_graphflows.guides.conditionals.masked import MaskedConditionals
from pyro_graphflows.guides.conditionals.spline import SplineFactor
from pyro_graphflows.guides.sites import LatentSite
from pyro_graphflows.nn.activations import make_activation
from pyro_graphflows.transforms.solver import Solver

__all__ = ["FAMILIES", "MOST_GLOBALS", "Auto", "Family", "Flow", "Normal", "Spline", "make_family"]


MOST_GLOBALS = 30  # scalar sites outside of plates that have splines; with more, models are networks of many

NETWORK_OPTIONS = ("hidden_dims", "units_per_set", "hidden_layers", "activation", "skip")


@dataclass(frozen=True)
class Normal(Family):
    r"""Normal conditionals whose parameters come from masked networks (MADE).

    In unconstrained space, ``q(z_v | parents) = Normal(loc_v(parents), scale_v(parents))``, with a full covariance
    within vector sites; values are pushed to the supports of the sites. Discrete sites have Bernoulli and categorical
    factors.

    References:
        [1] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.
        [2] Germain et al. (2015), MADE: Masked Autoencoder for Distribution Estimation.

    Args:
        hidden_dims: Widths of the hidden layers; None for ``units_per_set`` units for each distinct set of parents.
        units_per_set: See ``hidden_dims``; a quarter of them for each element of a long vector that is held by element
            (:mod:`~pyro_graphflows.guides.vectors`).
        hidden_layers: The number of hidden layers where ``hidden_dims`` is None.
        activation: ``"elu"``, ``"relu"``, ``"tanh"`` ...
        skip: Whether a linear map from the parents runs beside the hidden layers. The regression start needs it.
        factor: The factor class of the continuous sites, for other conditionals than normal ones.
        fusion: Whether a site's conditional is the model's own distribution of the site, given its parents in the
            model, times a normal factor (of a discrete site, its logits plus some), in a coordinate in which the prior
            is normal (:mod:`~pyro_graphflows.guides.fusion`). ``"auto"`` does so for each site where it can and has an
            effect; True for all, and refuses models in which some site cannot.

    Raises:
        GraphflowsError: If a width or a number is not positive, the activation is unknown, or ``factor`` is no
            subclass of :class:`~pyro_graphflows.guides.Factor`.

    Example:
        >>> Normal(hidden_dims=[32, 32])
        Normal(hidden_dims=(32, 32), units_per_set=16, hidden_layers=1, activation='elu', skip=True)
    """

    hidden_dims: Sequence[int] | None = None
    units_per_set: int = 16
    hidden_layers: int = 1
    activation: str = "elu"
    skip: bool = True
    factor: type[Factor] = field(default=NormalFactor, repr=False)
    fusion: bool | str = field(default="auto", repr=False)

    def __post_init__(self) -> None:
        _freeze_widths(self)
        _require_fusion(self)
        _require_positive(self, "units_per_set", "hidden_layers")
        make_activation(self.activation)
        if not (isinstance(self.factor, type) and issubclass(self.factor, Factor)):
            raise GraphflowsError(f"Expected factor= a subclass of Factor; got {self.factor!r}.")

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in NETWORK_OPTIONS}
        options = [f"{name}={value!r}" for name, value in shown.items()]
        if self.fusion != "auto":
            options.append(f"fusion={self.fusion!r}")
        if self.factor is not NormalFactor:
            options.append(f"factor={self.factor.__name__}")
        return f"Normal({', '.join(options)})"

    @property
    def can_regress(self) -> bool:
        """Whether there are linear maps to set."""
        return self.skip

    @property
    def can_split(self) -> bool:
        """Whether continuous sites are normal."""
        return self.factor is NormalFactor

    @property
    def can_couple(self) -> bool:
        """Whether continuous sites are normal."""
        return self.factor is NormalFactor

    @property
    def has_vectors(self) -> bool:
        """Whether continuous sites are normal."""
        return self.factor is NormalFactor

    def serving(self, role: SiteRole) -> Family:
        """Return this family; with a quarter of the hidden units where each of many elements has units of its own."""
        if role.long != "element" or self.hidden_dims is not None:
            return self
        return replace(self, units_per_set=-(-self.units_per_set // 4))

    def conditionals(self, spec: BlockSpec) -> Conditionals:
        """See :meth:`Family.conditionals`."""
        options: dict[str, Any] = {name: getattr(self, name) for name in NETWORK_OPTIONS}
        return MaskedConditionals(spec, self.factor.for_site, options)


@dataclass(frozen=True)
class Spline(Family):
    r"""Flexible conditionals in closed form: a monotone rational-quadratic spline of noise for each element.

    In unconstrained space, :math:`z_v = \text{loc}_v + \text{scale}_v\, \mathrm{RQS}_v(\varepsilon_v)`, with
    location, scale and knots from a masked network of the parents. Drawing and scoring any value need no iteration.
    Elements of a vector are autoregressive, linear in those before
    (:mod:`~pyro_graphflows.guides.conditionals.spline`). After the regression start the splines are the identity, so
    that every conditional is linear-Gaussian. The tails are those of the base. Discrete sites and those whose copies
    are drawn jointly have the factors that they have in :class:`Normal`.

    References:
        [1] Durkan et al. (2019), Neural Spline Flows.
        [2] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.

    Args:
        num_bins: The number of bins of each spline.
        bound: The noise is left alone outside of ``[-bound, bound]``.
        base: ``"normal"``, ``"student"`` or ``"logistic"``.
        df: The degrees of freedom of a base that is Student's t.
        hidden_dims: Widths of the hidden layers; None for ``units_per_set`` units for each distinct set of parents.
        units_per_set: See ``hidden_dims``.
        hidden_layers: The number of hidden layers where ``hidden_dims`` is None.
        activation: ``"elu"``, ``"relu"``, ``"tanh"`` ...
        skip: Whether a linear map from the parents runs beside the hidden layers. The regression start needs it.
        fusion: See :class:`Normal`. Location and scale of the spline are then those of the prior times a normal.

    Raises:
        GraphflowsError: If there are fewer than two bins, a number is not positive, or the base or the activation is
            unknown.

    Example:
        >>> Spline(num_bins=4).base
        'normal'
    """

    num_bins: int = 8
    bound: float = 4.0
    base: str = "normal"
    df: float = 7.0
    hidden_dims: Sequence[int] | None = None
    units_per_set: int = 16
    hidden_layers: int = 1
    activation: str = "elu"
    skip: bool = True
    fusion: bool | str = "auto"

    def __post_init__(self) -> None:
        _require_fusion(self)
        _require_positive(self, "num_bins")
        if self.num_bins < 2:
            raise GraphflowsError(f"Expected num_bins >= 2; got {self.num_bins}.")
        num_spline_parameters(self.num_bins)  # refuses more than there is room for
        if not isinstance(self.bound, int | float) or not 0 < self.bound < math.inf:
            raise GraphflowsError(f"Expected a positive, finite bound; got {self.bound!r}.")
        if self.base not in BASES:
            raise GraphflowsError(f"Expected a base among {', '.join(BASES)}; got {self.base!r}.")
        if not isinstance(self.df, int | float) or not 0 < self.df < math.inf:
            raise GraphflowsError(f"Expected positive, finite degrees of freedom; got {self.df!r}.")
        _freeze_widths(self)
        _require_positive(self, "units_per_set", "hidden_layers")
        make_activation(self.activation)

    @property
    def can_regress(self) -> bool:
        """Whether there are linear maps to set."""
        return self.skip

    @property
    def can_split(self) -> bool:
        """Elements of a vector are mixed by one matrix."""
        return False

    @property
    def has_vectors(self) -> bool:
        """Long vectors are normal."""
        return True

    def serving(self, role: SiteRole) -> Family:
        """Return this family, or normal conditionals with the same networks for long vectors."""
        if role.long is None:
            return self
        return Normal(**{name: getattr(self, name) for name in NETWORK_OPTIONS}).serving(role)

    def conditionals(self, spec: BlockSpec) -> Conditionals:
        """See :meth:`Family.conditionals`."""

        def make_factor(site: LatentSite) -> Factor:
            return SplineFactor(site.size, self.num_bins, self.bound, self.base, self.df)

        options: dict[str, Any] = {name: getattr(self, name) for name in NETWORK_OPTIONS}
        return MaskedConditionals(spec, make_factor, options)


@dataclass(frozen=True)
class Flow(Family):
    r"""Flexible conditionals: every element has a monotone flow that its parents steer.

    In unconstrained space, :math:`z_v = F_v(\varepsilon_v; z_{Pa(v)}, x_{Pa(v)})` with a stack of one-dimensional
    residual blocks :math:`F_v`, so that each site has exactly the density :math:`q(z_v \mid` parents
    :math:`)` whatever the number of blocks. With hidden units at zero output, as after the regression start, every
    conditional is linear-Gaussian. Sampling, and scoring what was just sampled, need no numerical inversion; scoring
    other values inverts one-dimensional functions (or the other way round with ``closed_form="density"``, for
    inference compilation).

    References:
        [1] Mouton and Kroon (2022), Graphical Residual Flows.
        [2] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.

    Args:
        form: ``"faithful"`` (:class:`~pyro_graphflows.FaithfulResidual`), or ``"graphical"`` for the flow of [1]
            (:class:`~pyro_graphflows.GraphicalResidual`, and an affine map along the graph for the regression
            start): its sites depend on all their ancestors, and independences are not enforced.
        num_blocks: The number of residual blocks of each element. By default 3; in a graphical flow 4, or as many
            as there are edges on the longest shortest path from an ancestor to a site, which is the least.
        units_per_variable: The hidden units of one block of one element.
        hidden_layers: The number of hidden layers of a block.
        hidden_dims: Widths of the hidden layers over all elements, instead of the two arguments before.
        closed_form: ``"sampling"`` or ``"density"``: the direction without numerical inversion.
        activation: An activation with known slopes, or its name; by default ``"elu"`` (graphical: ``"lipmish"``).
        lipschitz: c in (0, 1): a residual map's slope stays above 1 − c.
        conditional_scale: Whether parents act on the log-scale of each block directly.
        conditioner_units: The hidden units, for each distinct set of parents, of the masked network through which
            parents act nonlinearly on shifts, scales and hidden units; 0 leaves the linear maps alone. By default 32,
            and 0 in a graphical flow (where it acts on the affine map).
        conditioner_layers: The number of its hidden layers.
        solver: How to invert numerically (:class:`~pyro_graphflows.transforms.solver.Solver`).
        masked: The family of the sites that a flow cannot serve: discrete ones, those whose copies are drawn jointly
            across a plate (:mod:`~pyro_graphflows.guides.conditionals.coupled`), those with a factor class of the
            user's, long vectors (:mod:`~pyro_graphflows.guides.vectors`).
        fusion: ``"auto"``: the sites that ``masked`` serves are fused with their priors as it says; False: none is.
            Sites with flows are not: a flow times a prior has no density in closed form, which a :class:`Spline` has.

    Raises:
        GraphflowsError: If ``form``, ``closed_form`` or the activation is unknown, a number is out of range,
            ``masked`` is no :class:`Normal`, or ``fusion`` is True.

    Example:
        >>> Flow(num_blocks=5).num_blocks
        5
    """

    form: str = "faithful"
    num_blocks: int | None = None
    units_per_variable: int = 16
    hidden_layers: int = 1
    hidden_dims: Sequence[int] | None = None
    closed_form: str = "sampling"
    activation: str | nn.Module | None = None
    lipschitz: float = 0.97
    conditional_scale: bool = True
    conditioner_units: int | None = None
    conditioner_layers: int = 2
    solver: Solver | None = None
    masked: Normal = field(default_factory=Normal)
    fusion: bool | str = "auto"

    def __post_init__(self) -> None:
        _require_fusion(self)
        if self.fusion is True:
            raise GraphflowsError(
                "Expected fusion='auto' or False with Flow(...): a residual flow times a prior has no density in "
                "closed form. Use Spline(fusion=True), which is flexible too."
            )
        if self.form not in ("faithful", "graphical"):
            raise GraphflowsError(f"Expected form='faithful' or 'graphical'; got {self.form!r}.")
        if self.closed_form not in ("sampling", "density"):
            raise GraphflowsError(f"Expected closed_form 'sampling' or 'density'; got {self.closed_form!r}.")
        if self.num_blocks is not None:
            _require_positive(self, "num_blocks")
        _freeze_widths(self)
        if self.hidden_dims is not None and not self.hidden_dims:
            raise GraphflowsError("Expected hidden_dims with at least one width, or None; got none.")
        _require_positive(self, "hidden_layers", "conditioner_layers")
        if not 0 < self.lipschitz < 1:
            raise GraphflowsError(f"Expected 0 < lipschitz < 1; got {self.lipschitz}.")
        units = self.conditioner_units
        if self.units_per_variable < 0 or (units is not None and units < 0):
            raise GraphflowsError(
                f"Expected units_per_variable and conditioner_units >= 0; got {self.units_per_variable} and {units}."
            )
        if self.activation is not None:
            make_activation(self.activation)
        if not isinstance(self.masked, Normal):
            raise GraphflowsError(f"Expected masked= a Normal(...); got {self.masked!r}.")

    @property
    def can_fuse(self) -> bool:
        """Flows times priors have no density in closed form."""
        return False

    @property
    def can_couple(self) -> bool:
        """Whether the family of coupled sites can draw copies jointly."""
        return self.masked.can_couple

    @property
    def can_regress(self) -> bool:
        """Whether there are linear maps to set, in the masked networks as well."""
        return self.masked.can_regress

    @property
    def has_vectors(self) -> bool:
        """Whether the family of long vectors can serve them."""
        return self.masked.has_vectors

    def full_size(self, role: SiteRole, num_inputs: int) -> int:
        """See :meth:`Family.full_size`: each element has blocks of hidden units that see all earlier ones."""
        blocks = self.num_blocks or 3
        return blocks * 5 * super().full_size(role, num_inputs) if role.site.size > 1 else 0

    def serving(self, role: SiteRole) -> Family:
        """Return this family, or ``masked`` for sites that a flow cannot serve."""
        given = role.coupled or role.factor is not None or role.long is not None
        beyond = given or role.site.encoding is not None
        masked = self.masked if self.fusion else replace(self.masked, fusion=False)
        return masked.serving(role) if beyond else self

    def block_key(self, role: SiteRole) -> Hashable:
        """Return the site itself where its elements have maps, which read all parents before the first level."""
        return role.site.name if role.own_maps else None

    def conditionals(self, spec: BlockSpec) -> Conditionals:
        """See :meth:`Family.conditionals`."""
        graphical = self.form == "graphical"
        options: dict[str, Any] = {
            "num_blocks": self.num_blocks if graphical else self.num_blocks or 3,
            "closed_form": self.closed_form,
            "activation": self.activation or ("lipmish" if graphical else "elu"),
            "lipschitz": self.lipschitz,
            "conditional_scale": self.conditional_scale,
            "conditioner_units": self.conditioner_units,
            "conditioner_layers": self.conditioner_layers,
            "solver": self.solver,
        }
        if self.conditioner_units is None:
            options["conditioner_units"] = 0 if graphical else 32
        return FlowConditionals(
            spec,
            graphical=graphical,
            hidden_dims=self.hidden_dims,
            units_per_variable=self.units_per_variable,
            hidden_layers=self.hidden_layers,
            network_options=options,
        )


@dataclass(frozen=True)
class Auto(Family):
    """The default: splines where conditionals are seldom normal, normal conditionals elsewhere, fused with the priors.

    Of the continuous sites of one number, those have splines that are in no plate (in models with at most
    ``MOST_GLOBALS`` such sites), that set the scale of others, or whose prior is not normal in unconstrained space:
    bounded, or with heavier tails. ``describe()`` says which.

    Args:
        normal: The family of all other sites.
        spline: The family of these.

    Example:
        >>> Auto(spline=Spline(num_bins=16)).spline.num_bins
        16
    """

    normal: Normal = field(default_factory=Normal)
    spline: Spline = field(default_factory=Spline)

    def __post_init__(self) -> None:
        if not isinstance(self.normal, Normal) or not isinstance(self.spline, Spline):
            raise GraphflowsError(
                f"Expected normal= a Normal(...) and spline= a Spline(...); got {self.normal!r} and {self.spline!r}."
            )

    @property
    def tells_roles(self) -> bool:
        """Sites that set the scale of others have splines."""
        return True

    @property
    def fusion(self) -> bool | str:
        """Whether conditionals of the sites with normal ones are fused."""
        return self.normal.fusion

    @property
    def can_regress(self) -> bool:
        """Whether there are linear maps to set, in both families."""
        return self.normal.can_regress and self.spline.can_regress

    @property
    def can_split(self) -> bool:
        """Vector sites are normal."""
        return self.normal.can_split

    @property
    def can_couple(self) -> bool:
        """Sites that are drawn jointly are normal."""
        return self.normal.can_couple

    @property
    def has_vectors(self) -> bool:
        """Vector sites are normal."""
        return self.normal.has_vectors

    def full_size(self, role: SiteRole, num_inputs: int) -> int:
        """See :meth:`Family.full_size`."""
        return self.normal.full_size(role, num_inputs)

    def serving(self, role: SiteRole) -> Family:
        """Return the family that serves a site."""
        site = role.site
        other = role.coupled or role.factor is not None or site.encoding is not None or site.size != 1
        flexible = role.is_global or role.sets_scale or not role.normal_prior
        return self.spline if flexible and not other else self.normal.serving(role)

    def conditionals(self, spec: BlockSpec) -> Conditionals:
        """See :meth:`Family.conditionals`."""
        return self.normal.conditionals(spec)


FAMILIES: Mapping[str, type[Auto] | type[Normal] | type[Spline] | type[Flow]] = {
    "auto": Auto,
    "normal": Normal,
    "spline": Spline,
    "flow": Flow,
}


def make_family(family: str | Family | type[Factor]) -> Family:
    """Return the family that a user asked for.

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


def _freeze_widths(family: Any) -> None:
    """Make ``hidden_dims`` a tuple of positive numbers."""
    widths = family.hidden_dims
    if isinstance(widths, int):
        raise GraphflowsError(f"Expected hidden_dims a sequence of widths, [{widths}]; got {widths}.")
    if widths is not None:
        object.__setattr__(family, "hidden_dims", tuple(widths))
        if any(not isinstance(width, int) or width < 1 for width in family.hidden_dims):
            raise GraphflowsError(f"Expected hidden_dims positive whole numbers; got {list(widths)}.")


def _require_fusion(family: Any) -> None:
    if family.fusion not in (True, False, "auto"):
        raise GraphflowsError(f"Expected fusion='auto', True or False; got {family.fusion!r}.")


def _require_positive(family: Any, *names: str) -> None:
    for name in names:
        value = getattr(family, name)
        if not isinstance(value, int):
            raise GraphflowsError(f"Expected {name} a whole number; got {value!r}.")
        if value < 1:
            raise GraphflowsError(f"Expected {name} >= 1; got {value}.")
