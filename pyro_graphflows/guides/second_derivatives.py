r"""Joint factors of sites beside their priors, from second derivatives of the log-density.

Given all other latents, effects b with priors :math:`N(a, D^2)` have the density of the prior times what data say.
Where data are normal about a linear predictor, that is a normal in b, and second derivatives at one point give it, with
a precision Q and a location m that do not depend on D. Draws near the posterior's mode hardly show it where the widths
of priors differ by orders of magnitude from draw to draw, as under a horseshoe. Elsewhere Q and m are those at the
likeliest b given all others [1], and their natural parameters are averaged over draws of these.

Of sites that the guide draws later, and which are not known then, normals are integrated out: what is left of the
precision is a Schur complement.

References:
    [1] Rue, Martino and Chopin (2009), Approximate Bayesian Inference for Latent Gaussian Models, JRSS B 71.
"""

import itertools
import time
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from pyro_graphflows.guides.minimize import Hessians, newton
from pyro_graphflows.guides.mode import LogPosterior, Mode, NormalPrior
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
def joint_factors(mode: Mode, later: Mapping[str, Collection[str]]) -> dict[str, JointFactor]:
    """Return the joint factors of sites, as far as second derivatives give them.

    Args:
        mode: The normal near the posterior.
        later: The sites, none with a latent child; for each, those that are drawn after it, likewise. Sites whose
            priors are not normal in numbers of their own have no factor.
    """
    posterior = mode.posterior
    coordinates = posterior.coordinates
    known = posterior.priors_at(mode.point, later)
    later = {
        name: sorted(names)
        for name, names in later.items()
        if name in known and all(each in coordinates for each in (name, *names))
    }
    if not later:
        return {}
    places = {name: torch.arange(each.part.start, each.part.stop) for name, each in coordinates.items()}
    chosen = torch.cat([places[name] for name in sorted({*later, *itertools.chain(*later.values())})])
    if len(chosen) > MOST_NUMBERS:
        return {}
    most = max(FEWEST_POINTS, min(MOST_POINTS, NUMBERS_OF_ALL // len(chosen)))
    noise = torch.randn(most, len(mode.point), generator=torch.Generator().manual_seed(0)).to(mode.point)
    found: dict[str, list[tuple[Tensor, Tensor, NormalPrior]]] = {name: [] for name in later}
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
        priors = posterior.priors_at(point, later)
        for name, names in later.items():
            rows = among[torch.cat([places[each] for each in (name, *names)])]
            normal = _normal_of_first(
                gradient[rows], hessian[rows.unsqueeze(-1), rows], len(places[name]), point[places[name]]
            )
            if normal is None or name not in priors:
                continue
            if coordinates[name].proper or torch.allclose(priors[name].value, point[places[name]]):
                found[name].append((*normal, priors[name]))
    if number < FEWEST_POINTS:
        return {}
    factors = {}
    for name, normals in found.items():
        factor = _mean_factor(normals, posterior, name) if 2 * len(normals) >= number else None
        if factor is not None:
            factors[name] = factor
    return factors


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


def _normal_of_first(
    gradient: Tensor, hessian: Tensor, size: int, at: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return precision and location of the first numbers, the others integrated out; None if that is no normal.

    Args:
        gradient: Of minus the log-density of all numbers.
        hessian: The same.
        size: How many are the first.
        at: The first numbers there.
    """
    root, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed):
        return None
    step = torch.cholesky_solve(gradient.unsqueeze(-1), root).squeeze(-1)[:size]
    if size == len(gradient):
        return hessian, at - step
    covariance = torch.cholesky_inverse(root)[:size, :size]
    return torch.linalg.inv(covariance), at - step


def _mean_factor(
    normals: Sequence[tuple[Tensor, Tensor, NormalPrior]], posterior: LogPosterior, name: str
) -> JointFactor | None:
    """Return the factor whose natural parameters are the mean of those at points; None where it is no normal.

    Args:
        normals: At each point precision and location of the site in the numbers of the density, and its prior.
        posterior: The density.
        name: The site.
    """
    coordinate = posterior.coordinates[name]
    precisions, naturals, widths, values = [], [], [], []
    for precision, loc, (value, prior_loc, scale) in normals:
        if coordinate.proper:
            precision, loc = precision / scale / scale.unsqueeze(-1), prior_loc + scale * loc
        naturals.append(precision @ loc - prior_loc / scale.square())
        precisions.append(precision - scale.pow(-2).diag_embed())
        widths.append(scale)
        values.append(value)
    of_prior = torch.stack(widths).median(0).values.pow(-2)
    precision, natural, value = (torch.stack(part).mean(0) for part in (precisions, naturals, values))
    if not all(bool(torch.isfinite(part).all()) for part in (precision, natural, of_prior)):
        return None
    # what data do not say is left to the prior, and numbers stay where they are
    unit = precision.diagonal().maximum(of_prior / WIDEST).sqrt()
    shares, vectors = torch.linalg.eigh((precision + precision.mT) / 2 / unit / unit.unsqueeze(-1))
    shares = shares.clamp(min=LEAST_SHARE)
    least = unit.unsqueeze(-1) * ((vectors * shares) @ vectors.mT) * unit
    covariance = (vectors / shares) @ vectors.mT / unit / unit.unsqueeze(-1)
    loc = covariance @ (natural + (least - precision) @ value)
    return JointFactor(loc, covariance, of_prior, coordinate.shape[: coordinate.batch_dims])
