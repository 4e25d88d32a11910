r"""Latents whose copies stay dependent across a plate: chain-rule terms on the site inside its plate.

Where something outside of a plate depends on all that is in it (an observed total, crossed effects), the copies
:math:`z_1, \dots, z_N` of a latent site are dependent in the posterior, whatever is known. Their conditional is then a
joint normal over the whole plate, sampled at once, and the site keeps its plate: element n has the term
:math:`\log q(z_n \mid z_{<n})`, so that the terms have the batch shape of the plate and sum to the joint density. That
needs the whole plate in each call (no subsampling) and reparametrised draws.

In standardised units, with :math:`m_n, D_n` a location and a scale (a lower triangular matrix for vectors) that the
network gives for each element, :math:`z = m + D\,T\,\varepsilon`, where T is lower triangular over all elements:

- *a parameter for each pair*: the entries of T below the diagonal are parameters. With a location and scale of its
  own for each element, any normal is possible; the size of the plate is fixed.
- *rank r*: T is the Cholesky factor of :math:`I - U (I + U^\top U)^{-1} U^\top + V V^\top`, where the network gives r
  columns of U and V for each element. U alone is a normal with precision :math:`I + U U^\top`, as r observed totals
  make it; V alone is what r common causes make. Amortised, for plates of any size.

Numbers can be fused with their priors :math:`N(a_n, b_n^2)`: all the above is then the factor, a normal over all
elements of location m and covariance :math:`D S D` with :math:`S = T T^\top`, and the conditional has the precision
:math:`B^{-1} (I + E S^{-1} E) B^{-1}` with :math:`E = D^{-1} B`. So effects are as narrow as their scale is small. In
balanced crossed designs with normal noise S does not depend on the numbers of elements, m is the mean of an element's
data and D falls with the root of their number.

Start. After the regression each element has a location; what is left over, the residual, has some variance :math:`v`
and, between any two elements, some covariance :math:`c`, both averaged over elements. A constant column of U (for
:math:`c < 0`) or of V (for :math:`c > 0`) makes just these: with :math:`d^2 = v - c` and :math:`k = |c| / d^2`,

.. math:: U_n = \sqrt{k / (1 - N k)}, \qquad V_n = \sqrt{k}.

That is exact for exchangeable elements, as with an observed total of a plate (:func:`exchangeable_start`). Of vectors
there is a column for each direction in which their pairs vary together, in units of what they do not share. Parameters
for each pair start from draws near the posterior of the data, where there are such (:func:`pairs_start`; beside priors
:func:`factor_pairs_start`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_graphflows.distributions.last_draw import LastDraw
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.conditionals.elements import ElementTable
from pyro_graphflows.guides.conditionals.factors import NormalFactor, positive_scale, unit_lower
from pyro_graphflows.guides.sites import SitePrior
from pyro_graphflows.regression import RIDGE, finite_rows, in_float64

__all__ = [
    "BesidePriors",
    "CoupledFactor",
    "CoupledNormal",
    "CouplingTerms",
    "FactorPairs",
    "exchangeable_start",
    "factor_pairs_start",
    "pairs_start",
]

HALF_LOG_TWO_PI = 0.9189385332046727
WAKE = 0.02  # columns of U and V start near, not at, zero, where they have no gradient
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of the identity in a matrix of correlations
LEAST_DRAWS = 20  # to find a joint factor from
MOST_AT_ONCE = 4_000_000  # numbers, of the groups that are fitted at once
MOST_TESTS = 200  # draws that judge joint factors
LEAST_PRECISION = 0.01  # of a joint factor, in that of the conditional
MOST_COUPLING = 0.99999  # of 1 / N: beyond it the covariance of exchangeable elements is singular


class CoupledNormal(dist.TorchDistribution):
    """A joint normal over the elements of plates, with one chain-rule term for each element.

    Shape:
        - values: ``batch_shape + (size,)``, the coupled plates among the batch dimensions.
        - log-density: ``batch_shape``: the term of each element given those before it.

    Args:
        loc: Locations, ``(*batch, size)``.
        scale_tril: The lower triangular scale of each element, ``(*batch, size, size)``.
        mixing: Lower triangular matrices over all elements (all dimensions of one element beside each other), ``(*rest,
            n * size, n * size)``, where ``rest`` is the batch shape without the coupled dimensions.
        dims: The coupled dimensions of the batch shape, negative, increasing.
        orders: For coupled dimensions whose elements are not in the order of ``mixing``, where it has each of them.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale_tril: Tensor,
        mixing: Tensor,
        dims: Sequence[int],
        orders: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        self.loc = loc
        self.scale_tril = scale_tril
        self.mixing = mixing
        self.dims = tuple(dims)
        self.orders = dict(orders)
        self._last = LastDraw()  # with its noise
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """All real vectors."""
        return constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CoupledNormal":
        """Return the same distribution at a larger batch shape; the coupled dimensions stay as they are."""
        batch_shape = torch.Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        size = self.event_shape[0]
        new = CoupledNormal(
            self.loc.expand(*batch_shape, size),
            self.scale_tril.expand(*batch_shape, size, size),
            self.mixing,
            self.dims,
            self.orders,
        )
        new._last = self._last
        return new

    def beside(self, prior: SitePrior) -> "CoupledNormal":
        """Return the normal proportional to a prior of each element, a number, times this one."""
        shape = torch.Size(np.broadcast_shapes(self.loc.shape, prior.loc.shape))
        loc, width = (self._gather(part.expand(shape)) for part in (self.loc, self.scale_tril[..., 0]))
        prior_loc, b = (self._gather(part.expand(shape)) for part in (prior.loc, prior.log_scale.exp()))
        white = torch.linalg.solve_triangular(self.mixing, (b / width).diag_embed(), upper=False)
        eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
        precision = white.mT @ white + eye
        # of its square roots the one that is upper triangular, whose inverse's transpose is a lower triangular T
        root = torch.linalg.cholesky(precision.flip(-1, -2)).flip(-1, -2)
        mixing = torch.linalg.solve_triangular(root, eye, upper=True).mT
        off = ((loc - prior_loc) / b).unsqueeze(-1)
        moved = mixing @ (mixing.mT @ (white.mT @ (white @ off)))
        scale_tril = self._scatter(b, shape).unsqueeze(-1)
        return CoupledNormal(
            self._scatter(prior_loc + b * moved.squeeze(-1), shape),
            scale_tril,
            mixing,
            self.dims,
            self.orders,
        )

    def _gather(self, value: Tensor) -> Tensor:
        """Bring the elements of the coupled plates beside each other, in order: ``(*rest, n * size)``."""
        for dim, order in self.orders.items():
            value = value.index_select(dim - 1, order.argsort())
        places = [dim - 1 for dim in self.dims]
        moved = value.movedim(places, [i - 1 - len(places) for i in range(len(places))])
        return moved.flatten(-1 - len(places))

    def _scatter(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """Undo :meth:`_gather`."""
        places = [dim - 1 for dim in self.dims]
        sizes = [shape[place] for place in places]
        parts = flat.unflatten(-1, (*sizes, self.event_shape[0]))
        value = parts.movedim([i - 1 - len(places) for i in range(len(places))], places)
        for dim, order in self.orders.items():
            value = value.index_select(dim - 1, order)
        return value

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + event_shape``."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        value = self._of_noise(noise)
        self._last.keep(value, noise)
        return value

    def _of_noise(self, noise: Tensor) -> Tensor:
        mixed = (self.mixing @ self._gather(noise).unsqueeze(-1)).squeeze(-1)
        scattered = self._scatter(mixed, noise.shape)
        if self.event_shape[0] == 1:
            return torch.addcmul(self.loc, self.scale_tril.squeeze(-1), scattered)
        return self.loc + (self.scale_tril @ scattered.unsqueeze(-1)).squeeze(-1)

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value of some noise, and the logarithm of what each element is stretched by."""
        value = self._of_noise(noise.expand(np.broadcast_shapes(noise.shape, self.loc.shape)))
        return value, self._log_stretch(value.shape)

    def pull(self, value: Tensor) -> Tensor:
        """Return the noise of a value."""
        residual = (value - self.loc).unsqueeze(-1)
        shape = residual.shape[:-1]
        tril = self.scale_tril.expand(*shape[:-1], -1, -1)
        flat = self._gather(torch.linalg.solve_triangular(tril, residual, upper=False).squeeze(-1))
        mixing = self.mixing.expand(*flat.shape[:-1], -1, -1)
        noise = torch.linalg.solve_triangular(mixing, flat.unsqueeze(-1), upper=False).squeeze(-1)
        return self._scatter(noise, shape)

    def in_groups(self, value: Tensor) -> Tensor:
        """Return numbers with those that are drawn jointly beside each other, in order, and the draws of a group.

        Args:
            value: Numbers in draws, ``(draws, *batch, size)``.

        Returns:
            Shape ``(groups, draws, n * size)``.
        """
        flat = self._gather(value)
        return flat.reshape(len(value), -1, flat.shape[-1]).movedim(1, 0)

    def flat_noise(self, value: Tensor) -> Tensor:
        """Return the noise of draws in groups, see :meth:`in_groups`."""
        return self.in_groups(self.pull(value))

    def _log_stretch(self, shape: torch.Size) -> Tensor:
        """Return the diagonal of the map, summed over each element: ``shape`` without its last dimension."""
        diagonal = self.mixing.diagonal(dim1=-2, dim2=-1).log()
        flat = self._gather(self.loc.expand(shape))
        mixed = self._scatter(diagonal.expand(flat.shape), shape)
        return (mixed + self.scale_tril.diagonal(dim1=-2, dim2=-1).log()).sum(-1)

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the term of each element given the elements before it, shape ``batch_shape``."""
        known = self._last.behind(value, (self.loc, self.scale_tril, self.mixing))
        noise = self.pull(value) if known is None else known[0]
        return (-0.5 * noise.square() - HALF_LOG_TWO_PI).sum(-1) - self._log_stretch(noise.shape)


class CoupledFactor(NormalFactor):
    """The factor of a site whose copies are drawn jointly: that of a normal, and the columns of U and V.

    Args:
        size: The length of the site's flat unconstrained vector.
        rank: The number of columns of U and of V; 0 if T has a parameter for each pair.
    """

    def __init__(self, size: int, rank: int) -> None:
        super().__init__(size)
        self.rank = rank

    @property
    def num_outputs(self) -> int:
        """The outputs of a normal, and ``2 * rank`` for each dimension."""
        return super().num_outputs + 2 * self.rank * self.size

    @property
    def can_fuse(self) -> bool:
        """See :attr:`Factor.can_fuse`."""
        return self.size == 1

    @property
    def num_inner(self) -> int:
        """The number of the outputs of a normal."""
        return super().num_outputs

    def distribution(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """Return the normal without the coupling."""
        return super().distribution(outputs[..., : self.num_inner], shift, scale)

    def fused(
        self, outputs: Tensor, shift: Tensor, scale: Tensor, prior: SitePrior
    ) -> dist.TorchDistribution:
        """See :meth:`Factor.fused`; without the coupling."""
        return super().fused(outputs[..., : self.num_inner], shift, scale, prior)

    def linear_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Factor.linear_start`; without coupling."""
        rows, biases = NormalFactor(self.size).linear_start(weights, loc, scale_tril)
        more = self.num_outputs - self.num_inner
        return torch.cat([rows, rows.new_zeros(more, rows.shape[-1])]), torch.cat(
            [biases, biases.new_zeros(more)]
        )

    def natural_units(self, scale_tril: Tensor) -> Tensor:
        """See :meth:`Factor.natural_units`; of the columns, ones."""
        units = NormalFactor(self.size).natural_units(scale_tril)
        return torch.cat([units, units.new_ones(self.num_outputs - self.num_inner)])


class CouplingTerms(nn.Module):
    """What turns a site's outputs into a joint normal over plates.

    Args:
        factor: The site's factor.
        coupled: The plates across which its copies are dependent.
        others: The other plates around it.
    """

    def __init__(
        self, factor: CoupledFactor, coupled: Sequence[PlateState], others: Sequence[PlateState]
    ) -> None:
        super().__init__()
        self.factor = factor
        self.names = tuple(plate.name for plate in sorted(coupled, key=lambda plate: plate.dim))
        self.sizes = {plate.name: plate.full_size for plate in coupled}
        self.table: ElementTable | None = None
        if factor.rank == 0:
            length = factor.size
            for plate in coupled:
                length *= plate.full_size
            self.length = length
            self.table = ElementTable(others, length * (length - 1) // 2)
            self.table.unit.fill_(length**-0.75)

    def distribution(
        self,
        outputs: Tensor,
        units: tuple[Tensor, Tensor],
        plates: Mapping[str, PlateState],
        prior: SitePrior | None = None,
    ) -> CoupledNormal:
        """Return the joint normal.

        Args:
            outputs: The outputs of the network, ``(*batch, num_outputs)``.
            units: Shift and scale of the standardisation.
            plates: The plates of the call.
            prior: The prior of each element, if the site is fused; units are those of its coordinate.

        Raises:
            GraphflowsError: If a coupled plate is subsampled in this call, or T has a parameter for each pair and
                its size has changed.
        """
        factor = self.factor
        coupled = [plates[name] for name in self.names]
        for plate in coupled:
            if plate.subsampled:
                raise GraphflowsError(
                    f"Expected plate {plate.name!r} in full: copies of a latent site stay dependent across it and are "
                    "drawn jointly; it is subsampled in this call. Set up the guide with a subsampled plate to have "
                    "independent copies, which is said by guide.describe()."
                )
            if self.table is not None and plate.size != self.sizes[plate.name]:
                raise GraphflowsError(
                    f"Expected plate {plate.name!r} to have {self.sizes[plate.name]} elements, as when the guide was "
                    f"set up: the dependence of its elements is given by parameters; got {plate.size}. Set up a guide "
                    "for the new data, or use pool='deepset'."
                )
            if plate.indices is not None and len(plate.indices.unique()) != plate.size:
                raise GraphflowsError(
                    f"Expected each element of plate {plate.name!r} once, as copies of a latent site are drawn jointly "
                    "across it; the indices of this call have some twice. Pass torch.randperm(size), or leave out "
                    "subsample=."
                )
        batch = [1] * max(outputs.dim() - 1, *(-plate.dim for plate in coupled))
        for plate in coupled:
            batch[plate.dim] = plate.size
        outputs = outputs.expand(*np.broadcast_shapes(outputs.shape[:-1], batch), outputs.shape[-1])
        n, (shift, scale) = factor.size, units
        loc = torch.addcmul(shift, scale, outputs[..., :n])
        diagonal = scale * positive_scale(outputs[..., n : 2 * n], shift, scale)
        scale_tril = diagonal.unsqueeze(-1)
        if n > 1:
            scale_tril = scale_tril * unit_lower(outputs[..., 2 * n : factor.num_inner], n)
        dims = tuple(plate.dim for plate in coupled)
        mixing = (
            self._table_mixing(plates, dims) if self.table is not None else self._ranked_mixing(outputs, dims)
        )
        orders = {}
        if self.table is not None:  # pairs are of elements, in whichever order a call has these
            orders = {p.dim: p.indices.to(loc.device) for p in coupled if p.indices is not None}
        joint = CoupledNormal(loc, scale_tril, mixing, dims, orders)
        return joint if prior is None else joint.beside(prior)

    def _table_mixing(self, plates: Mapping[str, PlateState], dims: tuple[int, ...]) -> Tensor:
        assert self.table is not None
        entries = self.table(plates)  # the coupled plates have size one, or are beyond the left end
        for dim in dims:  # left to right: what is taken out does not move those that follow
            if -dim < entries.dim():
                entries = entries.squeeze(dim - 1)
        return unit_lower(entries, self.length)

    def _ranked_mixing(self, outputs: Tensor, dims: tuple[int, ...]) -> Tensor:
        n, rank = self.factor.size, self.factor.rank
        both = outputs[..., self.factor.num_inner :].unflatten(-1, (n, 2 * rank))
        places = [dim - 2 for dim in dims]
        moved = both.movedim(places, [i - 2 - len(places) for i in range(len(places))])
        negative, positive = moved.flatten(-2 - len(places), -2).split(rank, -1)  # (*rest, N * n, rank)
        eye = torch.eye(rank, dtype=outputs.dtype, device=outputs.device)
        inner = torch.linalg.cholesky(eye + negative.mT @ negative)
        reduced = torch.linalg.solve_triangular(inner, negative.mT, upper=False)
        total = torch.eye(negative.shape[-2], dtype=outputs.dtype, device=outputs.device)
        return torch.linalg.cholesky(total - reduced.mT @ reduced + positive @ positive.mT)

    @property
    def number(self) -> int:
        """The number of elements at set-up."""
        return math.prod(self.sizes.values())

    @torch.no_grad()
    def set_mixing_(self, mixing: Tensor) -> None:
        """Set a T of parameters for each group, ``(groups, n, n)``: the elements of the other plates."""
        assert self.table is not None
        rows, columns = torch.tril_indices(self.length, self.length, -1, device=mixing.device)
        self.table.set_(slice(None), mixing[..., rows, columns].reshape(self.table.table.shape))

    def of_groups(self, each: Tensor, dims: Sequence[int], shape: torch.Size) -> Tensor:
        """Return numbers of groups in the layout of the plates.

        Args:
            each: Shape ``(groups, n, *rest)``.
            dims: The dimensions of the coupled plates.
            shape: The batch shape of all plates around.

        Returns:
            Shape ``(*shape, *rest)``.
        """
        coupled = [len(shape) + dim for dim in dims]
        order = [i for i in range(len(shape)) if i not in coupled] + coupled
        parts = each.reshape(*(shape[i] for i in order), *each.shape[2:])
        return parts.movedim(list(range(len(order))), order)


class ExchangeableStart(NamedTuple):
    """How residuals of elements vary together, whichever elements these are.

    Attributes:
        alone: The root of the covariance that a residual has, lower triangular, ``(size, size)``.
        inner: The root of what of it elements do not share.
        narrow: The columns of U in units of that, ``(size, size)``; those of most effect, of U or V, are first.
        wide: The columns of V.
    """

    alone: Tensor
    inner: Tensor
    narrow: Tensor
    wide: Tensor


def exchangeable_start(residual: Tensor, dims: Sequence[int]) -> ExchangeableStart:
    """Return the columns that make residuals vary together as samples do, and what they do to the scale.

    Args:
        residual: What values of a site are off their locations, ``(draws, *batch, size)``.
        dims: The dimensions of the coupled plates.
    """
    residual = in_float64(residual)
    number = torch.Size(residual.shape[dim] for dim in dims).numel()

    def moments(rows: Tensor) -> Tensor:
        flat = rows.flatten(0, -2)
        return flat.mT @ flat / len(flat)

    variance, total = moments(residual), moments(residual.sum(list(dims))) / number
    covariance = (total - variance) / max(number - 1, 1)
    least = 1e-8 * torch.eye(len(variance)).to(variance)
    alone, inner = (torch.linalg.cholesky(each + least) for each in (variance, variance - covariance))
    half = torch.linalg.solve_triangular(inner, covariance, upper=False)
    shares, directions = torch.linalg.eigh(torch.linalg.solve_triangular(inner, half.mT, upper=False))
    order = shares.abs().argsort(descending=True)
    shares, directions = shares[order], directions[:, order]
    negative = (-shares).clamp(0.0, MOST_COUPLING / number)
    narrow, wide = (negative / (1 - number * negative)).sqrt(), shares.clamp(min=0.0).sqrt()
    return ExchangeableStart(alone, inner, directions * narrow, directions * wide)


def pairs_start(residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return T, and how much narrower a number is given those before it than alone, as draws have them.

    The correlations of the draws are mixed with the identity, by the share that held-out draws like best.

    Args:
        residual: What numbers are off their locations, in units of their scales, ``(*groups, draws, n)``.

    Returns:
        For each group a unit lower triangular matrix, and the logarithms of the scales that go with it, in units of the
        given ones.
    """
    rows = in_float64(residual)
    spread = rows.square().mean(-2, keepdim=True).sqrt().clamp(min=1e-12)
    rows = rows / spread

    def correlations(some: Tensor, share: Tensor) -> Tensor:
        return _with_share(some.mT @ some / some.shape[-2], share.clamp(min=1e-6))

    def loss(share: Tensor) -> Tensor:
        root = torch.linalg.cholesky(correlations(rows[..., 1::2, :], share))
        white = torch.linalg.solve_triangular(root, rows[..., ::2, :].mT, upper=False)
        return root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * white.square().sum(-2).mean(-1)

    share = _best_share(loss, rows)
    root = torch.linalg.cholesky(correlations(rows, share))
    diagonal = root.diagonal(dim1=-2, dim2=-1)
    return root / diagonal.unsqueeze(-1), (spread.squeeze(-2) * diagonal).log()


def _best_share(loss: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Return the share of the identity that has the least loss in each group; one where there are few draws.

    Args:
        loss: The losses of the groups.
        rows: The draws, ``(*groups, draws, n)``.
    """
    shares = rows.new_tensor(SHARES)
    groups = rows.shape[:-2]
    if rows.shape[-2] < 4 * rows.shape[-1]:
        return rows.new_ones(*groups, 1, 1)
    losses = torch.stack([loss(share.expand(*groups, 1, 1)) for share in shares])
    return shares[losses.argmin(0)].reshape(*groups, 1, 1)


@dataclass(frozen=True)
class FactorPairs:
    """Joint factors of numbers beside priors, of one covariance, whose locations are linear in what is known.

    Attributes:
        root: The lower triangular root of the factor's covariance, ``(groups, numbers, numbers)``.
        shift: What is added to the locations that numbers have alone, ``(groups, numbers)``.
        slopes: The same for each input, ``(groups, numbers, inputs)``.
    """

    root: Tensor
    shift: Tensor
    slopes: Tensor


def factor_pairs_start(rows: "BesidePriors") -> FactorPairs | None:
    r"""Return the joint factor of numbers that, beside their priors, fits draws; None if these are too few.

    Beside the prior :math:`N(a, B^2)` of a draw a factor of precision Q and location :math:`m + W x + c` makes the
    conditional whose score is :math:`-B^{-2} (u - a) - Q (u - m - W x - c)`. The mean of the score is zero, and its
    mean products with u and x are minus the identity and zero, whatever the weights of draws, as long as they depend
    on what is known alone (Stein). With residuals :math:`r = u - m` and :math:`g = B^{-2} (u - a)`, both less their
    regressions :math:`\beta` and :math:`\gamma` on x, that is
    :math:`Q = (I - \mathrm{cov}(g, r)) \, \mathrm{cov}(r)^{-1}` and :math:`W = \beta + Q^{-1} \gamma`: what data say
    of a total makes numbers follow their priors less than those that vary alone would. Draws with narrow priors count
    less, since data say little there.

    Covariances of pairs are mixed with none, by the share that held-out draws like best.

    Args:
        rows: The draws.
    """
    if rows.values.shape[-2] < LEAST_DRAWS:
        return None
    number = rows.values.shape[-1]
    each = max(1, MOST_AT_ONCE // (number * max(MOST_TESTS * number, rows.values.shape[-2])))
    parts = [_factor_pairs(some) for some in rows.split(each)]
    root, shift, slopes = (torch.cat(part) for part in zip(*parts, strict=True))
    return FactorPairs(root, shift, slopes)


def _factor_pairs(rows: "BesidePriors") -> tuple[Tensor, Tensor, Tensor]:
    fitted, test = rows.at(slice(1, None, 2)), rows.at(slice(0, 2 * MOST_TESTS, 2))
    share = _best_share(lambda share: test.losses(_fit_pairs(fitted, share)), rows.values)
    found = _fit_pairs(rows, share)
    return torch.linalg.cholesky(found.covariance), found.shift, found.slopes


@dataclass(frozen=True)
class BesidePriors:
    """Draws of numbers beside their priors, in groups that are independent of each other.

    Attributes:
        values: The numbers, ``(groups, draws, numbers)``.
        locs: The locations of the factors that they have alone.
        prior_locs: The locations of the priors.
        widths: The widths of the priors.
        inputs: What the joint factor may follow beside, the same for all numbers, ``(groups, draws, inputs)``.
    """

    values: Tensor
    locs: Tensor
    prior_locs: Tensor
    widths: Tensor
    inputs: Tensor

    @classmethod
    def of(cls, factor: CoupledNormal, values: Tensor, prior: SitePrior, inputs: Tensor) -> "BesidePriors":
        """Return the draws with finite numbers.

        Args:
            factor: The factors of the numbers alone, in draws.
            values: The numbers in the coordinate of their priors, ``(draws, *batch, 1)``.
            prior: Their priors.
            inputs: What the joint factor may follow, ``(groups, draws, inputs)``.
        """
        value, loc, prior_loc, width = (
            in_float64(factor.in_groups(part.expand_as(values)))
            for part in (values, factor.loc, prior.loc, prior.log_scale.exp())
        )
        rows = cls(value, loc, prior_loc, width, in_float64(inputs))
        joint = torch.cat([value, loc, prior_loc, width, rows.inputs], -1)
        known = finite_rows(joint.movedim(0, 1).flatten(1)) & (width > 0.0).all(0).all(-1)
        return rows.at(known)

    def _each(self, part: Callable[[Tensor], Tensor]) -> "BesidePriors":
        return BesidePriors(
            part(self.values), part(self.locs), part(self.prior_locs), part(self.widths), part(self.inputs)
        )

    def at(self, chosen: Any) -> "BesidePriors":
        """Return some of the draws."""
        return self._each(lambda part: part[:, chosen])

    def split(self, size: int) -> list["BesidePriors"]:
        """Return groups, so many at a time."""
        return [
            self._each(lambda part, i=i: part[i : i + size])  # type: ignore[misc]
            for i in range(0, len(self.values), size)
        ]

    @property
    def pull(self) -> Tensor:
        """What the priors add to the score, with the other sign."""
        return (self.values - self.prior_locs) / self.widths.square()

    def losses(self, fit: "_FittedPairs") -> Tensor:
        """Return for each group the mean of -log q given a joint factor, up to a constant."""
        precision = torch.cholesky_inverse(torch.linalg.cholesky(fit.covariance))
        off = self.values - self.locs - fit.shift.unsqueeze(-2) - self.inputs @ fit.slopes.mT
        root = torch.linalg.cholesky(precision.unsqueeze(-3) + self.widths.pow(-2).diag_embed())
        score = (self.pull + off @ precision).unsqueeze(-1)
        white = torch.linalg.solve_triangular(root, score, upper=False).squeeze(-1)
        spread = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (0.5 * white.square().sum(-1) - spread).mean(-1)


class _FittedPairs(NamedTuple):
    covariance: Tensor
    shift: Tensor
    slopes: Tensor


def _fit_pairs(rows: BesidePriors, share: Tensor) -> _FittedPairs:
    """Return the joint factor by the identities of :func:`factor_pairs_start`."""
    residual, pull = rows.values - rows.locs, rows.pull
    spread = residual.var(-2, keepdim=True)
    weights = (rows.widths.square() / (rows.widths.square() + spread)).mean(-1, keepdim=True)
    weights = weights / weights.sum(-2, keepdim=True)

    def centred(part: Tensor) -> tuple[Tensor, Tensor]:
        mean = (weights * part).sum(-2, keepdim=True)
        return part - mean, mean.squeeze(-2)

    (r, r_mean), (g, g_mean), (x, x_mean) = map(centred, (residual, pull, rows.inputs))
    weighted = weights * x
    of_inputs = weighted.mT @ x + RIDGE * torch.eye(x.shape[-1]).to(x)
    beta, gamma = (torch.linalg.solve(of_inputs, weighted.mT @ part).mT for part in (r, g))
    r, g = r - x @ beta.mT, g - x @ gamma.mT
    covariance = _with_share((weights * r).mT @ r, share)
    root = torch.linalg.cholesky(covariance + 1e-12 * _diagonal(covariance))
    of_pull = _with_share((weights * g).mT @ r, share)
    inner = root.mT @ torch.linalg.solve_triangular(root, of_pull.mT, upper=False).mT
    # in the basis in which draws have the covariance one
    precisions, vectors = torch.linalg.eigh(torch.eye(root.shape[-1]).to(root) - 0.5 * (inner + inner.mT))
    back = root @ (vectors * precisions.clamp(min=LEAST_PRECISION).rsqrt().unsqueeze(-2))
    covariance = back @ back.mT
    slopes = beta + covariance @ gamma
    moved = (covariance @ g_mean.unsqueeze(-1) - slopes @ x_mean.unsqueeze(-1)).squeeze(-1)
    return _FittedPairs(covariance, r_mean + moved, slopes)


def _with_share(matrix: Tensor, share: Tensor) -> Tensor:
    """Return matrices whose entries off the diagonal are less, by a share."""
    return (1.0 - share) * matrix + share * _diagonal(matrix)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).diag_embed()
