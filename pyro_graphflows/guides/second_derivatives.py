r"""Joint factors of sites beside their priors, from second derivatives of the log-density.

Given all other latents, effects b with priors :math:`N(a, D^2)` have the density of the prior times what data say.
Where data are normal about a linear predictor, that is a normal in b, and second derivatives at one point give it, with
a precision Q and a location m that do not depend on D. Draws near the posterior's mode hardly show it where the widths
of priors differ by orders of magnitude from draw to draw, as under a horseshoe. Elsewhere Q and m are those at the
likeliest b given all others [1], and their natural parameters are averaged over draws of these.

Of sites that the guide draws later, and which are not known then, normals are integrated out: what is left of the
precision is a Schur complement. Others that are known, as an intercept, m follows: :math:`Q m` changes with them by
minus the mixed second derivatives.

References:
    [1] Rue, Martino and Chopin (2009), Approximate Bayesian Inference for Latent Gaussian Models, JRSS B 71.
"""

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_graphflows.guides.minimize import Hessians, newton
from pyro_graphflows.guides.mode import Coordinate, LogPosterior, Mode, NormalPrior
from pyro_graphflows.guides.sites import JointFactor

__all__ = ["MOST_NUMBERS", "joint_factors"]

MOST_NUMBERS = 1000  # of the sites with Hessians
MOST_POINTS, FEWEST_POINTS = 16, 4
NUMBERS_OF_ALL = 3000  # in Hessians of all points
SECONDS = 4.0  # of processor time: with the points until then, if they are enough
FEW_STEPS = 8  # of Newton's method; where data are normal about a linear predictor one is enough
LEAST_SHARE = 1e-6  # of a direction's precision in that of its numbers
WIDEST = 1e10  # precisions of a prior, over the least that a factor has


@torch.no_grad()
def joint_factors(
    mode: Mode, later: Mapping[str, Collection[str]], followed: Mapping[str, Collection[str]]
) -> dict[str, JointFactor]:
    """Return the joint factors of sites, as far as second derivatives give them.

    Args:
        mode: The normal near the posterior.
        later: The sites, none with a latent child; for each, those that are drawn after it, likewise. Sites whose
            priors are not normal in numbers of their own have no factor.
        followed: For each the real sites that its location may follow, likewise.
    """
    posterior = mode.posterior
    coordinates = posterior.coordinates
    known = posterior.priors_at(mode.point, later)
    later = {
        name: sorted(names)
        for name, names in later.items()
        if name in known and all(each in coordinates for each in (name, *names, *followed.get(name, ())))
    }
    if not later:
        return {}
    followed = {name: sorted(followed.get(name, ())) for name in later}
    sites = sorted({*later, *itertools.chain(*later.values(), *followed.values())})
    places = {name: torch.arange(each.part.start, each.part.stop) for name, each in coordinates.items()}
    chosen = torch.cat([places[name] for name in sites])
    if len(chosen) > MOST_NUMBERS:
        return {}
    most = max(FEWEST_POINTS, min(MOST_POINTS, NUMBERS_OF_ALL // len(chosen)))
    noise = torch.randn(most, len(mode.point), generator=torch.Generator().manual_seed(0)).to(mode.point)
    found: dict[str, list[_Natural]] = {name: [] for name in later}
    among = torch.full((posterior.size,), -1)
    among[chosen] = torch.arange(len(chosen))
    evaluate = _Restricted(posterior, chosen)
    began, number = time.process_time(), 0
    for point in mode.at(noise):
        if time.process_time() - began > SECONDS:
            break
        number += 1
        evaluated = evaluate.above(point)
        if evaluated is None:
            continue
        point, gradient, hessian = evaluated
        priors = posterior.priors_at(point, sites)
        for name, names in later.items():
            units = [_unit(posterior, each, point, priors) for each in followed[name]]
            linear = [unit for unit in units if unit is not None]
            rows = among[torch.cat([places[each] for each in (name, *names)])]
            columns = among[torch.cat([rows[:0], *(places[each] for each in followed[name])])]
            own = gradient[rows], hessian[rows.unsqueeze(-1), rows], hessian[rows.unsqueeze(-1), columns]
            normal = _normal_of_first(*own, size=len(places[name]), at=point[places[name]])
            prior, proper = priors.get(name), coordinates[name].proper
            if normal is None or prior is None or len(linear) < len(units):
                continue
            if proper or torch.allclose(prior.value, point[places[name]]):
                found[name].append(_natural(normal, prior, proper, linear))
    if number < FEWEST_POINTS:
        return {}
    factors = {}
    for name, naturals in found.items():
        if 2 * len(naturals) < number:
            continue
        sizes = {each: len(places[each]) for each in followed[name]}
        factor = _mean_factor(naturals, sizes, coordinates[name])
        if factor is not None:
            factors[name] = factor
    return factors


class _Natural(NamedTuple):
    """What the density says of a site about one point, in the coordinate of its prior.

    Attributes:
        precision: Of the factor beside the prior, ``(numbers, numbers)``.
        natural: Precision times location, where all that is followed is zero, ``(numbers,)``.
        slopes: By how much that changes with what is followed, ``(numbers, followed)``.
        value: The numbers at the point.
        width: The widths of their prior.
    """

    precision: Tensor
    natural: Tensor
    slopes: Tensor
    value: Tensor
    width: Tensor


def _unit(
    posterior: LogPosterior, name: str, point: Tensor, priors: Mapping[str, NormalPrior]
) -> tuple[Tensor, Tensor] | None:
    """Return the unconstrained numbers of a site at a point, and units of the search in them; None if not linear."""
    coordinate = posterior.coordinates[name]
    if not coordinate.proper:
        value = point[coordinate.part]
        return value, torch.ones_like(value)
    prior = priors.get(name)
    return None if prior is None or not prior.unconstrained else (prior.value, prior.scale)


class _Restricted:
    """Minus a log-density as a function of some of its numbers.

    Args:
        posterior: The log-density.
        chosen: Which numbers.
    """

    def __init__(self, posterior: LogPosterior, chosen: Tensor) -> None:
        self.posterior, self.chosen = posterior, chosen
        self.point: Tensor = torch.zeros(posterior.size, dtype=torch.float64)
        self.hessians = Hessians(self._objective)

    def _objective(self, part: Tensor) -> Tensor:
        return -self.posterior(self.point.index_copy(0, self.chosen, part))

    def above(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the point with the likeliest such numbers, or nearly; gradient and Hessian; None if not finite."""
        self.point = point
        with torch.enable_grad():
            part = newton(self.hessians, point[self.chosen], FEW_STEPS, SECONDS)
            _, gradient, hessian = self.hessians.at(part)
        if hessian is None or not bool(torch.isfinite(gradient).all()):
            return None
        return point.index_copy(0, self.chosen, part.detach()), gradient, hessian


class _Normal(NamedTuple):
    precision: Tensor
    loc: Tensor
    cross: Tensor  # second derivatives with what is followed


def _normal_of_first(
    gradient: Tensor, hessian: Tensor, cross: Tensor, *, size: int, at: Tensor
) -> _Normal | None:
    """Return the normal of the first numbers, the others integrated out; None if it is none.

    Args:
        gradient: Of minus the log-density of all numbers.
        hessian: The same.
        cross: Second derivatives with what is followed.
        size: How many are the first.
        at: The first numbers there.
    """
    root, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed):
        return None
    step = torch.cholesky_solve(gradient.unsqueeze(-1), root).squeeze(-1)[:size]
    if size == len(gradient):
        return _Normal(hessian, at - step, cross)
    precision = torch.linalg.inv(torch.cholesky_inverse(root)[:size, :size])
    return _Normal(precision, at - step, precision @ torch.cholesky_solve(cross, root)[:size])


def _natural(
    normal: _Normal, prior: NormalPrior, proper: bool, followed: Sequence[tuple[Tensor, Tensor]]
) -> _Natural:
    """Return a normal less its prior.

    Args:
        normal: The normal, in the numbers of the search.
        prior: The prior.
        proper: Whether these are in units of the prior, and not its coordinate itself.
        followed: Values of what is followed, and units of the search in these.
    """
    unit = prior.scale if proper else torch.ones_like(prior.scale)
    loc = prior.loc + unit * normal.loc if proper else normal.loc
    precision = normal.precision / unit / unit.unsqueeze(-1)
    none = loc.new_zeros(0)
    values, units = (torch.cat(parts) for parts in zip((none, none), *followed, strict=True))
    cross = normal.cross / unit.unsqueeze(-1) / units
    natural = precision @ loc - prior.loc / prior.scale.square() + cross @ values
    return _Natural(precision - prior.scale.pow(-2).diag_embed(), natural, -cross, prior.value, prior.scale)


def _mean_factor(
    naturals: Sequence[_Natural], followed: Mapping[str, int], coordinate: Coordinate
) -> JointFactor | None:
    """Return the factor whose natural parameters are the mean of those at points; None where it is no normal.

    Args:
        naturals: What the density says about each point.
        followed: The sizes of the sites that are followed.
        coordinate: Where the numbers of the site are.
    """
    precision, natural, slopes, value = (
        torch.stack(parts).mean(0) for parts in list(zip(*naturals, strict=True))[:4]
    )
    of_prior = torch.stack([each.width for each in naturals]).median(0).values.pow(-2)
    if not all(bool(torch.isfinite(part).all()) for part in (precision, natural, slopes, of_prior)):
        return None
    # what data do not say is left to the prior, and numbers stay where they are
    unit = precision.diagonal().maximum(of_prior / WIDEST).sqrt()
    shares, vectors = torch.linalg.eigh((precision + precision.mT) / 2 / unit / unit.unsqueeze(-1))
    shares = shares.clamp(min=LEAST_SHARE)
    least = unit.unsqueeze(-1) * ((vectors * shares) @ vectors.mT) * unit
    covariance = (vectors / shares) @ vectors.mT / unit / unit.unsqueeze(-1)
    loc = covariance @ (natural + (least - precision) @ value)
    parts = (covariance @ slopes).split(list(followed.values()), -1)
    shape = coordinate.shape[: coordinate.batch_dims]
    return JointFactor(loc, covariance, of_prior, shape, dict(zip(followed, parts, strict=True)))
