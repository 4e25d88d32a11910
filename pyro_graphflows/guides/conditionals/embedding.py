r"""An embedding of wide data: a network from a site's values to a few features that the guide reads in their place.

The features are of two kinds. *Linear estimates* of the latent sites that read the data, found from the model's joint
samples, are constants: the regression start rests on them, and loses nothing in linear-Gaussian models, where they are
sufficient. *Learned* features come from a network, of the user's or a default one, or there are none (``"linear"``). A
network of the user's sees the standardised columns in their order; the default one sees them whitened (principal
components in units of their spread), so that what varies little counts as much as what varies a lot.

There are two ways to linear estimates. A regression of the latents on all columns at once is best whatever the columns'
dependence is, but has as many coefficients for a latent as there are columns. The other way takes the columns as
independent given the latents and regresses each one on them: the coefficients are as few as the latents, so that a
thousand samples find them for any number of columns, and each column counts by the noise about its own mean, as in the
score of a generalised linear model, whatever the dependence that a curved mean brings. It is taken unless the other
predicts held-out latents clearly better.

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
from pyro_graphflows.regression import HELD_OUT, in_float64, location_and_scale, ridge_slopes

__all__ = ["Embedding", "default_network"]

WIDTH, LAYERS, FEATURES = 128, 2, 32  # of the default network
LEAST_SPREAD = 1e-3  # of a principal component, in units of the mean variance: below it counts as so much
RIDGES = (1e-4, 1e-2, 1.0)  # times the number of rows
LEAST_VARIANCE = 1e-6  # of a column given the latents, in units of its own
TIE = 1.1  # of mean squares: up to it the estimates column by column are taken


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


class _Nothing(nn.Module):
    """The network of no features."""

    def forward(self, columns: Tensor) -> Tensor:
        return columns[..., :0]


def _best_ridge(inputs: Tensor, targets: Tensor, test: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the ridge with which rows of a test are best predicted from the others.

    Beside it are the slopes, and the mean squares of what they leave of each target.
    """
    found = []
    slopes = ridge_slopes(inputs[~test], targets[~test], *RIDGES)
    for ridge, each in zip(RIDGES, slopes, strict=True):
        misfit = targets[test] - inputs[test] @ each
        found.append((ridge, each, misfit.square().mean(0)))
    return min(found, key=lambda one: float(one[2].mean()))


def _by_column(slopes: Tensor, variances: Tensor, covariance: Tensor) -> Tensor:
    r"""Return posterior means as if columns were normal, linear in the latents and independent given them.

    With slopes :math:`A`, variances :math:`R` of the columns given the latents and the covariance :math:`C` of these,
    they are :math:`(C^{-1} + A R^{-1} A^T)^{-1} A R^{-1} x`.

    Args:
        slopes: ``(latents, columns)``.
        variances: ``(columns,)``.
        covariance: ``(latents, latents)``.

    Shape:
        - Output: ``(columns, latents)``.
    """
    weights = slopes / variances.clamp(min=LEAST_VARIANCE)
    eye = torch.eye(len(covariance), dtype=slopes.dtype, device=slopes.device)
    return torch.linalg.solve(
        eye + covariance @ weights @ slopes.mT, covariance @ weights
    ).mT  # C may be singular


def linear_estimates(columns: Tensor, latents: Tensor) -> Tensor:
    """Return linear estimates of latents, ``(columns, latents)``; which of the two is said above.

    Args:
        columns: Standardised columns in rows, ``(n, columns)``.
        latents: Standardised latents in rows, ``(n, latents)``.
    """
    test = torch.arange(len(columns), device=columns.device) % HELD_OUT == 0
    ridge, _, misfits = _best_ridge(columns, latents, test)
    other, slopes, variances = _best_ridge(latents, columns, test)
    covariance = latents.mT @ latents / len(latents)
    tried = _by_column(slopes, variances, covariance)
    of_tried = (latents[test] - columns[test] @ tried).square().mean()
    if bool(of_tried <= TIE * misfits.mean()):
        return _by_column(next(ridge_slopes(latents, columns, other)), variances, covariance)
    return next(ridge_slopes(columns, latents, ridge))


class Embedding(nn.Module):
    """Linear estimates and learned features of one node.

    Args:
        member: The node.
        feature_map: The map from its values to standardised columns.
        network: A network from the columns, ``(*batch, size)``, to features, ``(*batch, any number)``; ``"auto"`` for
            the default one, ``"linear"`` for none.
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
        self.named = network if isinstance(network, str) else None
        self.is_default = network == "auto"
        if isinstance(network, str):
            network = default_network(member.size) if self.is_default else _Nothing()
        self.network = network
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
        if self.named is None:
            raise GraphflowsError(
                "Expected embedding='auto' or 'linear' in a guide that is saved to a file; that of "
                f"{self.members[0].name!r} is a {type(self.network).__name__}, whose code a file cannot hold. Keep "
                "guide.state_dict(), or pickle it."
            )
        kinds = tuple(self.maps[0].kinds)  # type: ignore[arg-type]
        return {
            "member": self.members[0],
            "map": kinds,
            "network": self.named,
            "num_estimates": self.estimates.shape[-1],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Embedding":
        """Return an embedding of the same form, for a state that is loaded."""
        return cls(
            plain["member"], FeatureMap.of_kinds(plain["map"]), plain["network"], plain["num_estimates"]
        )

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
        self.estimates.copy_(linear_estimates(x, (y - shift) / scale))

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
