"""The default family: one that chooses among the others, site by site."""

from dataclasses import dataclass, field

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.conditionals.contract import BlockSpec, Conditionals, Family, SiteRole
from pyro_graphflows.guides.conditionals.masked import Normal
from pyro_graphflows.guides.conditionals.spline import Spline

__all__ = ["MOST_ELEMENTS", "MOST_GLOBALS", "Auto"]

MOST_GLOBALS = 30  # scalar sites outside of plates that have splines; with more, models are networks of many
# with splines because of their data: a step takes twice the time with 1,000, six times with 5,000
MOST_ELEMENTS = 500


@dataclass(frozen=True)
class Auto(Family):
    """The default: splines where conditionals are seldom normal, normal conditionals elsewhere, fused with the priors.

    Of the continuous sites of one number, those have splines that are in no plate (in models with at most
    ``MOST_GLOBALS`` such sites), that set the scale of others, or whose prior is not normal in unconstrained space:
    bounded, or with heavier tails; and in guides for one data set those in plates with data that are not normal, such
    as effects behind counts, if there are no more than ``MOST_ELEMENTS``. ``describe()`` says which.

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
        flexible = role.is_global or role.sets_scale or not role.normal_prior or role.skewed_by_data
        return self.spline if flexible and not other else self.normal.serving(role)

    def conditionals(self, spec: BlockSpec) -> Conditionals:
        """See :meth:`Family.conditionals`."""
        return self.normal.conditionals(spec)
