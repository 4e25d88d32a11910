r"""Log-densities of a run with particles, sorted into what belongs to one datum and what belongs to all.

The bookkeeping of :class:`~pyro_graphflows.infer.iwae.IWAE_ELBO`: draws of the globals take the leftmost dimension,
local particles the next one, and every tensor keeps all dimensions in their places, so that sums broadcast.
"""

import math
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.plate_messenger import PlateMessenger
from torch import Tensor

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.infer.particles import PARTICLES, Site, density_sites, inside, keep_dims, log_density

__all__ = ["LocalPlate", "ParticleTerms", "PlateLayout", "collect_terms", "is_reparametrised"]


class PlateLayout(NamedTuple):
    """Which dimensions mean what.

    Attributes:
        plate: The data plate; ``None`` where the whole data set has one weight.
        dims: The dimensions of the data: of the data plate and of plates around it at all its sites.
        inner: The dimension of local particles.
        outer: The dimension of draws of the globals.
    """

    plate: str | None
    dims: tuple[int, ...]
    inner: int
    outer: int

    @property
    def local_dims(self) -> tuple[int, ...]:
        """The dimensions that local terms keep."""
        return (self.outer, self.inner, *self.dims)

    def is_local(self, site: Site) -> bool:
        """Return whether a site belongs to single data."""
        return self.plate is None or inside(site, self.plate)


class LocalPlate(PlateMessenger):
    """A plate of particles that only holds what is inside the data plate.

    Args:
        data_plate: The name of the data plate; ``None`` to hold everything.
        size: The number of particles.
        dim: Their dimension.
    """

    def __init__(self, data_plate: str | None, size: int, dim: int) -> None:
        super().__init__(PARTICLES, size, dim=dim)
        self._data_plate = data_plate

    def _process_message(self, msg: Any) -> None:
        # messages reach the outermost plate last: the data plate has put its mark on them by then
        if self._data_plate is None or inside(msg, self._data_plate):
            super()._process_message(msg)


class ParticleTerms(NamedTuple):
    """Log-densities summed per particle and datum, all dimensions in their places.

    Attributes:
        local_p: Of the model, inside the data plate, ``(S, K, *data)``.
        local_q: Of the guide, inside the data plate.
        global_p: Of the model, outside, ``(S, 1, ..., 1)``, scaled.
        global_q: Of the guide, outside, scaled.
        score: Of those local sites of the guide that are not reparametrised.
        scale: The scale of the local sites.
        inner: The dimension of local particles.
        num_outer: The number of draws of the globals.
    """

    local_p: Tensor
    local_q: Tensor
    global_p: Tensor
    global_q: Tensor
    score: Tensor
    scale: float | Tensor
    inner: int
    num_outer: int

    @property
    def log_weights(self) -> Tensor:
        """Logarithms of the importance weights of local particles."""
        return self.local_p - self.local_q

    def normalised_weights(self) -> Tensor:
        """Return weights that add up to 1 over the particles, held fixed."""
        log_weights = self.log_weights.detach()
        return torch.softmax(log_weights, self.inner) if log_weights.dim() else torch.ones(())

    def bound(self) -> Tensor:
        """Return the bound, averaged over draws of the globals."""
        local = torch.zeros(())
        if self.log_weights.dim():
            mean = torch.logsumexp(self.log_weights, self.inner) - math.log(
                self.log_weights.shape[self.inner]
            )
            local = mean.sum() * self.scale
        return (local + (self.global_p - self.global_q).sum()) / self.num_outer

    def weighted(self, local: Tensor, over_all: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of local terms and the sum of global ones, averaged over draws of the globals."""
        return ((weights * local).sum() * self.scale + over_all.sum()) / self.num_outer

    def score_surrogate(self) -> Tensor:
        """Return a term whose gradient is the score-function part, that of sites without reparametrisation.

        A particle's gain is the bound minus the bound with its weight replaced by the geometric mean of the others.
        """
        if not self.score.dim():
            return torch.zeros(())
        log_weights = self.log_weights.detach().movedim(self.inner, 0)  # (K, ...)
        num = log_weights.shape[0]
        total = torch.logsumexp(log_weights, 0, keepdim=True)
        gain = total
        if num > 1:
            own = torch.eye(num, dtype=torch.bool, device=total.device)
            own = own.reshape(num, num, *[1] * (log_weights.dim() - 1))  # row k: all weights, the k-th marked
            others = torch.where(own, 0.0, log_weights).sum(1, keepdim=True) / (num - 1)
            baseline = torch.logsumexp(torch.where(own, others, log_weights), 1)
            gain = total - baseline.nan_to_num(neginf=0.0)  # any function of the others will do
        return (gain.movedim(0, self.inner) * self.score).sum() * self.scale / self.num_outer


def collect_terms(
    layout: PlateLayout, num_outer: int, model_trace: poutine.Trace, guide_trace: poutine.Trace
) -> ParticleTerms:
    """Sum the log-densities of the model and the guide, local ones per particle and datum.

    Args:
        layout: Which dimensions mean what.
        num_outer: The number of draws of the globals.
        model_trace: A run of the model in the plates of particles.
        guide_trace: A run of the guide in them.

    Returns:
        The sums.

    Raises:
        UnsupportedModelError: If local sites are scaled differently, or a site outside the data plate depends on
            local ones.
    """
    local = {"p": torch.zeros(()), "q": torch.zeros(())}
    over_all = {"p": torch.zeros(()), "q": torch.zeros(())}
    score = torch.zeros(())
    scale: float | Tensor | None = None
    for kind, trace in (("p", model_trace), ("q", guide_trace)):
        for name, site in density_sites(trace):
            log_prob = log_density(site)
            if layout.is_local(site):
                if scale is not None and not _same(scale, site["scale"]):
                    raise UnsupportedModelError(
                        f"Site {name!r} is scaled by {site['scale']}, others in the data plate by {scale}: a plate "
                        "subsampled within a datum, or poutine.scale, would put the scale inside the logarithm, where "
                        "it is no bound. Subsample the data plate only."
                    )
                scale = site["scale"]
                term = keep_dims(log_prob, layout.local_dims, keepdim=True)
                local[kind] = local[kind] + term
                if kind == "q" and not is_reparametrised(site):
                    score = score + term
            else:
                if log_prob.dim() >= -layout.inner and log_prob.shape[layout.inner] != 1:
                    raise UnsupportedModelError(
                        f"Site {name!r} is outside the data plate {layout.plate!r} and depends on sites inside it. "
                        "Sample global sites first, or give data_plate=False."
                    )
                term = keep_dims(log_prob * site["scale"], (layout.outer,), keepdim=True)
                over_all[kind] = over_all[kind] + term
    return ParticleTerms(
        local["p"],
        local["q"],
        over_all["p"],
        over_all["q"],
        score,
        1.0 if scale is None else scale,
        layout.inner,
        num_outer,
    )


def is_reparametrised(site: Site) -> bool:
    """Return whether gradients pass through the draws of a site."""
    return bool(getattr(site["fn"], "has_rsample", False))


def _same(first: float | Tensor, second: float | Tensor) -> bool:
    return bool((torch.as_tensor(first) == torch.as_tensor(second)).all())
