r"""An embedding of wide data: a network from a site's values to a few features that the guide reads in their place.

The features are of two kinds. *Linear estimates* of the latent sites that read the data, by ridge regression on the
model's joint samples, are constants: the regression start rests on them, and loses nothing in linear-Gaussian models,
where they are sufficient. *Learned* features come from a network, of the user's or a default one. A network of the
user's sees the standardised columns in their order; the default one sees them whitened (principal components in units
of their spread), so that what varies little counts as much as what varies a lot.

The data stay the only input: whoever reads an embedding read all of the site before.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.conditionals.pooling import PoolMember, without_leading_ones
from pyro_graphflows.guides.sites import FeatureMap
from pyro_graphflows.regression import in_float64, location_and_scale

__all__ = ["Embedding", "default_network"]

WIDTH, LAYERS, FEATURES = 128, 2, 32  # of the default network
LEAST_SPREAD = 1e-3  # of a principal component, in units of the mean variance: below it counts as so much
RIDGES = (1e-4, 1e-2, 1.0)  # times the number of rows
HELD_OUT = 5  # one in so many rows chooses among them


def default_network(size: int) -> nn.Sequential:
    """Return a new network from whitened columns to features.

    Args:
        size: The number of columns.
    """
    layers: list[nn.Module] = []
    widths = [size, *[WIDTH] * LAYERS]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, FEATURES))


class Embedding(nn.Module):
    """Linear estimates and learned features of one node.

    Args:
        member: The node.
        feature_map: The map from its values to standardised columns.
        network: A network from the columns, ``(*batch, size)``, to features, ``(*batch, any number)``; ``"auto"`` for
            the default one.
        num_estimates: The number of linear estimates.

    Raises:
        GraphflowsError: If the network does not take such columns, or returns another shape.
    """

    whitener: Tensor
    estimates: Tensor
    indices: tuple[str, ...] = ()

    def __init__(
        self, member: PoolMember, feature_map: FeatureMap, network: nn.Module | str, num_estimates: int
    ) -> None:
        super().__init__()
        self.members = (member,)
        self.maps = nn.ModuleList([feature_map])
        self.is_default = isinstance(network, str)
        self.network = network if isinstance(network, nn.Module) else default_network(member.size)
        self.register_buffer("whitener", torch.eye(member.size) if self.is_default else torch.zeros(0, 0))
        self.register_buffer("estimates", torch.zeros(member.size, num_estimates))
        like = next((p for p in self.network.parameters()), self.estimates)
        with torch.no_grad():
            found = self._learned(torch.zeros(2, member.size).to(like))
        self.num_features = num_estimates + found.shape[-1]
        self.learned = [*[False] * num_estimates, *[True] * found.shape[-1]]

    def to_plain(self) -> dict[str, Any]:
        """Return what the embedding is made from.

        Raises:
            GraphflowsError: If the network is one of the user's.
        """
        if not self.is_default:
            raise GraphflowsError(
                f"Expected embedding='auto' in a guide that is saved to a file; that of {self.members[0].name!r} is a "
                f"{type(self.network).__name__}, whose code a file cannot hold. Keep guide.state_dict(), or pickle it."
            )
        kinds = tuple(self.maps[0].kinds)  # type: ignore[arg-type]
        return {"member": self.members[0], "map": kinds, "num_estimates": self.estimates.shape[-1]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Embedding":
        """Return an embedding of the same form, for a state that is loaded."""
        return cls(plain["member"], FeatureMap.of_kinds(plain["map"]), "auto", plain["num_estimates"])

    @torch.no_grad()
    def fit_(self, values: Tensor, targets: Tensor) -> None:
        """Find the whitener and the linear estimates from joint samples.

        Args:
            values: Values of the node in rows, ``(n, size)``.
            targets: The latents to estimate, ``(n, num_estimates)``.
        """
        finite = torch.isfinite(values).all(-1) & torch.isfinite(targets).all(-1)
        x, y = in_float64(self.maps[0](values[finite])), in_float64(targets[finite])
        if len(x) < HELD_OUT:
            return
        if self.is_default:
            spread, axes = torch.linalg.eigh(x.mT @ x / len(x))
            least = LEAST_SPREAD * float(spread.mean()) + 1e-12
            self.whitener.copy_(axes / spread.clamp(min=least).sqrt())
        shift, scale = location_and_scale(y)
        y = (y - shift) / scale
        test = torch.arange(len(x)) % HELD_OUT == 0
        eye = torch.eye(x.shape[-1], dtype=x.dtype)

        def solved(rows: Tensor, ridge: float) -> Tensor:
            here = x[rows]
            return torch.linalg.solve(here.mT @ here + ridge * len(here) * eye, here.mT @ y[rows])

        losses = [float((y[test] - x[test] @ solved(~test, ridge)).square().mean()) for ridge in RIDGES]
        best = RIDGES[losses.index(min(losses))]
        self.estimates.copy_(solved(torch.ones_like(test), best))

    def forward(
        self,
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState],
        masks: Mapping[str, Tensor | bool],
    ) -> Tensor:
        """Return the features, ``(*batch, num_features)``."""
        return without_leading_ones(self._run(values[self.members[0].name]))

    @torch.no_grad()
    def of_samples(
        self, values: Mapping[str, Tensor], plates: Mapping[str, PlateState], *, fit: bool
    ) -> Tensor:
        """Return the features of joint samples."""
        return self._run(values[self.members[0].name])

    def columns_of(self, name: str) -> tuple[list[int], Tensor, Tensor]:
        """Refuse: no columns are the values.

        Raises:
            GraphflowsError: Always.
        """
        raise GraphflowsError(f"Expected a parent that comes in linearly; {name!r} comes in by an embedding.")

    def _run(self, value: Tensor) -> Tensor:
        columns = self.maps[0](value)
        return torch.cat([columns @ self.estimates, self._learned(columns)], -1)

    def _learned(self, columns: Tensor) -> Tensor:
        name, size = self.members[0].name, columns.shape[-1]
        try:
            found = self.network(columns @ self.whitener if self.is_default else columns)
        except RuntimeError as error:
            raise GraphflowsError(
                f"Expected an embedding of {name!r} that takes its {size} columns, (*batch, {size}); it failed: "
                f"{str(error).splitlines()[0]}."
            ) from error
        if (
            not isinstance(found, Tensor)
            or found.dim() != columns.dim()
            or found.shape[:-1] != columns.shape[:-1]
        ):
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise GraphflowsError(
                f"Expected an embedding of {name!r} that maps {tuple(columns.shape)} to "
                f"{(*columns.shape[:-1], 'features')}; got {came}."
            )
        return found
