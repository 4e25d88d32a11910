"""The part of a plan that says which sites are fused with their priors, and which runs of the model give these."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["PriorPlan"]


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

    @property
    def sites(self) -> frozenset[str]:
        """The fused sites."""
        return frozenset(site for run in self.runs for site in run)
