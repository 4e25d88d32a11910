r"""Leave-one-out cross-validation from draws of the posterior of all data.

The quantity is :math:`\sum_n \log p(y_n \mid y_{-n})`. With draws :math:`u_s` of what the data share, weighted by
:math:`w_s` towards the posterior of all data,

.. math:: p(y_n \mid y_{-n}) \approx \frac{\sum_s w_s}{\sum_s r_{sn}}, \qquad r_{sn} = \frac{w_s}{p(y_n \mid u_s)},

and the ratios :math:`r_{sn}` are smoothed by a Pareto law (PSIS). They carry the weight of the guide, so that a guide
which is not quite the posterior does not bias the result.

*Latents whose only datum is left out are integrated.* A school's own effect, given all data, has been pulled to its
datum; with :math:`u` holding it, :math:`p(y_n \mid u)` is far too good and the ratios have heavy tails. So :math:`u` is
only what several data share, and :math:`p(y_n \mid u)` an average over inner draws :math:`z_{nk}` of the latents inside
the plates of the datum,

.. math:: p(y_n \mid u) \approx \frac1K \sum_k \frac{p(y_n, z_{nk} \mid u)}{q(z_{nk} \mid u)} .

Where the guide draws the shared latents first, the inner draws are the guide's, and
:math:`w_s = p(u_s) / q(u_s) \prod_n p(y_n \mid u_s)` has them as well: an unbiased estimate of the weight, which makes
both sums unbiased for every :math:`K`. Where it does not (it draws all latents jointly, or the local ones first), inner
draws come from the model's own conditional. Where no latent is shared, :math:`p(y_n \mid y_{-n})` is the evidence of
the datum.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger, unwrap
from pyro.poutine.util import site_is_factor
from torch import Tensor
from tqdm.auto import tqdm

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer.enumeration import enumerated
from pyro_graphflows.infer.likelihood import summed_over_plates
from pyro_graphflows.infer.model_runs import Fitted, Hold, SiteShape, chunk_size, chunks
from pyro_graphflows.infer.particles import (
    OUTER_PARTICLES,
    PARTICLES,
    LocalPlate,
    density_sites,
    errors_of_batches,
    inside,
    keep_dims,
    log_density,
    particle_plate,
    run_pair,
)
from pyro_graphflows.infer.psis import smoothed_log_weights

__all__ = ["LOO", "leave_one_out"]

_NUMBERS_KEPT = 2**25  # log-likelihoods of all draws that are held at once


@dataclass(frozen=True, eq=False, repr=False)
class LOO:
    r"""Leave-one-out cross-validation.

    Attributes:
        elpd: :math:`\sum_n \log p(y_n \mid y_{-n})` in nats: how well each datum is predicted from the others.
        se: Its standard error, that of a sum over other data of the same kind.
        khat: The Pareto shape of the ratios of each datum: distrust a datum's value above 0.7.
        pointwise: The terms of the sum, of the shape of the plates left out; ``nan`` where everything is masked.
        plates: The plates whose elements are left out, one at a time.
        method: How the latents of a single datum are treated, in words.
    """

    elpd: float
    se: float
    khat: Tensor
    pointwise: Tensor
    plates: tuple[str, ...]
    method: str

    @property
    def num_data(self) -> int:
        """The number of data left out, one at a time."""
        return int((~self.pointwise.isnan()).sum())

    def __repr__(self) -> str:
        bad = int((self.khat > 0.7).sum())
        trust = "all k-hat <= 0.7" if not bad else f"k-hat > 0.7 for {bad}, whose values are not dependable"
        return (
            f"LOO(elpd {self.elpd:.2f} ± {self.se:.2f} nats, {self.num_data} elements of {' x '.join(self.plates)}; "
            f"{trust}; {self.method})"
        )


class _Datum(NamedTuple):
    """What one datum is: the plates with their dimensions and sizes, and the latents that only it concerns."""

    plates: dict[str, int]
    sizes: tuple[int, ...]
    local: tuple[str, ...]


class _NotNestedError(Exception):
    """The guide or the model has something shared that depends on what belongs to one datum."""


@dataclass(frozen=True)
class WeightedDraws:
    """Draws of the latent sites with their weights.

    Attributes:
        draws: The draws by site.
        log_weights: The logarithms of their weights towards the posterior, (draws,) or (draws, elements of
            ``data_plate``); ``None`` where they have been resampled and all weigh the same.
        data_plate: A plate over which the posterior factorises.
    """

    draws: Mapping[str, Tensor]
    log_weights: Tensor | None
    data_plate: str | None


def leave_one_out(
    fitted: Fitted, weighted: WeightedDraws, *, by: str | None, num_inner: int, progress: bool
) -> LOO:
    """Estimate how well each datum is predicted from the others.

    Args:
        fitted: The model and the guide with their data.
        weighted: Draws of the latent sites with their weights.
        by: The plate whose elements are left out; by default all plates around the observed sites.
        num_inner: The number of inner draws.
        progress: Whether to show a bar when it takes long.

    Returns:
        The estimates.

    Raises:
        GraphflowsError: If ``by`` is no plate with observed sites, or needed to say what a datum is; or if all weights
            are zero, or a datum has no likelihood at all inner draws.
        UnsupportedModelError: If the model enumerates sites that several data share.
    """
    if num_inner < 1:
        raise GraphflowsError(f"Expected a positive num_inner; got {num_inner}.")
    draws = weighted.draws
    first = fitted.runs().alone({name: value[0] for name, value in draws.items()}).trace
    datum = _find_datum(fitted, first, by)
    num = len(next(iter(draws.values())))
    source = _Source(fitted, datum, weighted, num_inner, first)
    total = math.prod(datum.sizes)
    counted = _counted(first, datum)
    blocks = list(chunks(total, max(1, _NUMBERS_KEPT // num)))
    pointwise, khat = (torch.full((total,), math.nan, dtype=torch.float64) for _ in range(2))
    with tqdm(
        total=num * len(blocks), disable=not progress, delay=2.0, unit="draw", desc="leaving out"
    ) as bar:
        for block in blocks:
            ratios, terms = [], []
            for log_ratio, log_p in source.chunks(num):
                ratios.append(log_ratio.flatten(1)[:, block])
                terms.append(log_p.flatten(1)[:, block])
                bar.update(len(log_p))
            value, shape = _combined(torch.cat(ratios), torch.cat(terms), source.all_local)
            pointwise[block], khat[block] = value, shape
    if not counted.any():
        raise GraphflowsError("Expected observed values that are not masked; there are none.")
    pointwise[~counted], khat[~counted] = math.nan, math.nan
    valid = pointwise[counted]
    if valid.isnan().any() or (valid == math.inf).any():
        raise GraphflowsError(
            f"{int((~valid.isfinite()).sum())} data have no likelihood at some draws, so that leaving them out cannot "
            "be told from these. Give more inner draws (num_inner), or a guide whose draws the data allow."
        )
    se = math.sqrt(len(valid)) * valid.std().item() if len(valid) > 1 else math.nan
    return LOO(
        valid.sum().item(),
        se,
        khat.reshape(datum.sizes),
        pointwise.reshape(datum.sizes),
        tuple(datum.plates),
        source.method,
    )


def _combined(log_ratio: Tensor, log_p: Tensor, all_local: bool) -> tuple[Tensor, Tensor]:
    """Return log p(y_n | y_-n) and the Pareto shapes from (draws, data)."""
    smoothed, khat = smoothed_log_weights(log_ratio)
    if all_local:  # the ratios are the weights themselves, whose mean is the evidence of the datum
        return torch.logsumexp(smoothed, 0) - math.log(len(smoothed)), khat
    if bool((torch.logsumexp(smoothed, 0) == -math.inf).any()):
        raise GraphflowsError(
            "Expected draws with a positive density under the model; all weights are zero. Train the guide, or give it "
            "the support of the model's latent sites."
        )
    return torch.logsumexp(smoothed + log_p, 0) - torch.logsumexp(smoothed, 0), khat


# ------------------------------------------------------------------------------------------------- what a datum is
def _find_datum(fitted: Fitted, trace: poutine.Trace, by: str | None) -> _Datum:
    observed: dict[str, SiteShape] = {
        name: fitted.sites[name]
        for name, site in density_sites(trace)
        if site["is_observed"] and not site_is_factor(site)
    }
    around = {name: {plate for plate, _, _ in site.plates} for name, site in observed.items()}
    known = {plate: (dim, size) for site in observed.values() for plate, dim, size in site.plates}
    if not known:
        raise GraphflowsError(
            f"Expected observed sites inside a plate, whose elements can be left out; {sorted(observed)} are in none."
        )
    if by is not None:
        if by not in known:
            raise GraphflowsError(
                f"Expected by to be a plate around an observed site, one of {sorted(known)}; got {by!r}."
            )
        plates = {by}
    else:
        plates = set(next(iter(around.values())))
        if any(other != plates for other in around.values()):
            listed = {name: sorted(other) for name, other in sorted(around.items())}
            raise GraphflowsError(
                f"The observed sites are in different plates ({listed}), so what one datum is must be said: give "
                "by=plate."
            )
    ordered = sorted(plates, key=lambda plate: known[plate][0])  # from left to right
    local = tuple(
        name
        for name in (*fitted.latents, *fitted.summed_out)
        if plates <= {plate for plate, _, _ in fitted.sites[name].plates}
    )
    shared = [name for name in fitted.summed_out if name not in local]
    if shared:
        raise UnsupportedModelError(
            f"The sites {sorted(shared)} are summed out and concern several data, which then have no likelihoods of "
            "their own. Let the guide sample these sites."
        )
    return _Datum(
        {plate: known[plate][0] for plate in ordered}, tuple(known[plate][1] for plate in ordered), local
    )


def _counted(trace: poutine.Trace, datum: _Datum) -> Tensor:
    """Return which elements have an observed value that is not masked."""
    counted = torch.zeros(datum.sizes, dtype=torch.bool)
    dims = tuple(datum.plates.values())
    for _, site in density_sites(trace):
        if site["is_observed"] and all(inside(site, plate) for plate in datum.plates):
            mask = site["mask"]
            present = (
                torch.ones(()) if mask is None else torch.as_tensor(mask, dtype=torch.get_default_dtype())
            )
            present = present.broadcast_to(torch.broadcast_shapes(present.shape, site["fn"].batch_shape))
            counted |= keep_dims(present, dims).cpu() > 0
    return counted.flatten()


# ------------------------------------------------------------------------------------------------- ratios of weights
class _Source:
    """Log-ratios and log-likelihoods of all data, for some draws after the other.

    Attributes:
        all_local: Whether no latent is shared; the ratios are then the weights of each datum.
        method: How it is done, in words.
    """

    def __init__(
        self,
        fitted: Fitted,
        datum: _Datum,
        weighted: WeightedDraws,
        num_inner: int,
        first: poutine.Trace,
    ) -> None:
        self.fitted, self.datum, self.draws = fitted, datum, weighted.draws
        log_weights = weighted.log_weights
        # the plate of a datum over whose elements the posterior factorises, so that they have weights of their own
        self.apart = {plate: dim for plate, dim in datum.plates.items() if plate == weighted.data_plate}
        self.log_weights = log_weights
        if log_weights is not None:
            if log_weights.dim() == 2 and not self.apart:
                log_weights = log_weights.sum(1)
            self.log_weights = self._by_plate(log_weights)
        self.first = first
        self.inner, self.outer = -1 - fitted.nesting, -2 - fitted.nesting
        self.num_inner = num_inner if datum.local else 1
        sampled_local = [name for name in datum.local if name in fitted.latents]
        latent = [name for name, site in fitted.sites.items() if site.kind == "latent"]
        self.all_local = set(latent) <= set(datum.local) and self._nests(everything=True)
        self.nested = not self.all_local and log_weights is not None and self._nests()
        integrated = f"{', '.join(sorted(sampled_local))} integrated"
        if self.all_local:
            self.method = "no latent is shared: the evidence of each datum"
        elif not sampled_local:
            self.method = "all sampled latents are shared"
            self.num_inner = 1
        elif self.nested:
            self.method = f"{integrated} by {num_inner} inner draws of the guide"
        elif fitted.vectorize and self._integrates():
            self.method = f"{integrated} by {num_inner} inner draws of the model"
        else:
            self.method = "given all latents, also those of the datum left out, which inflates k-hat"
            self.num_inner = 1
            self.datum = datum._replace(
                local=tuple(name for name in datum.local if name not in sampled_local)
            )

    def chunks(self, num: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield log-ratios and log-likelihoods, (draws, *plates) each."""
        sizes = self.datum.sizes
        if not self.fitted.vectorize:
            for place in range(num):
                log_p = self._alone(place)
                yield self._ratio(slice(place, place + 1), log_p[None]), log_p[None]
            return
        size = chunk_size(self.first, factor=1 if self.all_local else self.num_inner)
        for part in chunks(num, size):
            count = part.stop - part.start
            if self.all_local:
                _, log_p = self._guide_run(1, count)
                value = log_p[0].expand(count, *sizes)
                yield value, value
            elif self.nested:
                base, log_p = self._guide_run(count, self.num_inner)
                log_p = self._mean(log_p, count)
                yield self._without_each(base, log_p), log_p
            else:
                log_p = self._mean(self._model_run(part), count)
                yield self._ratio(part, log_p), log_p

    def _mean(self, terms: Tensor, count: int) -> Tensor:
        """Average (S, K, *plates) over the inner draws."""
        mean = torch.logsumexp(terms, 1) - math.log(terms.shape[1])
        return mean.expand(count, *self.datum.sizes)

    def _without_each(self, base: Tensor, log_p: Tensor) -> Tensor:
        """Return the sums over all data but one, each in turn; one datum may have no likelihood.

        Args:
            base: What is not of single data, (S, *1 or the size of the plate over which the posterior factorises).
            log_p: The log-likelihoods (S, *plates).
        """
        none = log_p == -math.inf
        finite = torch.where(none, 0.0, log_p)
        dims = [axis + 1 for axis, plate in enumerate(self.datum.plates) if plate not in self.apart]
        if not dims:
            return base.expand(log_p.shape)
        others = none.sum(dims, keepdim=True) - none.long()
        value = base + finite.sum(dims, keepdim=True) - finite
        return torch.where(others > 0, -math.inf, value)

    def _ratio(self, part: slice, log_p: Tensor) -> Tensor:
        """Return the weights of stored draws divided by the likelihood of each datum."""
        if self.log_weights is None:
            return -log_p
        weights = self.log_weights[part].expand(log_p.shape)
        return torch.where(weights == -math.inf, -math.inf, weights - log_p)

    # ------------------------------------------------------------------------------------------------ the runs
    def _nests(self, *, everything: bool = False) -> bool:
        """Return whether the guide can draw what is shared first and then several inner draws for each datum."""
        if not self.fitted.vectorize or isinstance(unwrap(self.fitted.guide), Messenger):
            return False
        try:
            self._guide_run(1 if everything else 2, 2 if self.datum.local else 1)
        except (_NotNestedError, UnsupportedModelError):
            return False
        return True

    def _integrates(self) -> bool:
        """Return whether the model's own conditional of the local latents can be drawn from in a batch."""
        try:
            self._model_run(slice(0, min(2, len(next(iter(self.draws.values()))))), num_inner=2)
        except (_NotNestedError, UnsupportedModelError):
            return False
        return True

    def _guide_run(self, size: int, num_inner: int) -> tuple[Tensor, Tensor]:
        """Run the guide afresh; return what is shared (S, *1) and what is of each datum (S, K, *plates), logarithms."""
        fitted = self.fitted
        model = enumerated(fitted.model, fitted.nesting + 2) if fitted.summed_out else fitted.model
        with errors_of_batches(size * num_inner):
            model_trace, guide_trace = run_pair(
                self._in_plates(model, size, num_inner),
                self._in_plates(fitted.guide, size, num_inner),
                fitted.args,
                fitted.kwargs,
            )
        for name, site in density_sites(guide_trace):
            if not site["is_observed"]:
                self._require_own_draws(name, site, size, num_inner)
        log_p = self._per_datum(model_trace, size, enumerates=bool(fitted.summed_out))
        log_q = self._per_datum(guide_trace, size)
        shared = self._shared(model_trace) - self._shared(guide_trace)
        return self._by_plate(shared), log_p - log_q

    def _model_run(self, part: slice, num_inner: int | None = None) -> Tensor:
        """Run the model at stored draws, local latents drawn afresh; return (S, K, *plates), logarithms."""
        fitted, count = self.fitted, part.stop - part.start
        num_inner = num_inner or self.num_inner
        held = {
            name: value[part].reshape(
                count, *[1] * (fitted.nesting + 1 - fitted.sites[name].num_batch), *fitted.sites[name].shape
            )
            for name, value in self.draws.items()
            if name not in self.datum.local
        }
        summed = bool(fitted.summed_out)
        model = enumerated(fitted.model, fitted.nesting + 2) if summed else fitted.model
        with Hold(held), errors_of_batches(count * num_inner):
            trace = poutine.trace(self._in_plates(model, count, num_inner)).get_trace(
                *fitted.args, **fitted.kwargs
            )
        self._shared(trace)  # nothing shared may depend on what is local
        for name in fitted.latents:
            trace.remove_node(name)
        return self._per_datum(trace, count, enumerates=summed)

    def _alone(self, place: int) -> Tensor:
        """Return the log-likelihoods at one stored draw, run without a batch."""
        fitted = self.fitted
        summed = bool(fitted.summed_out)
        model = enumerated(fitted.model, fitted.nesting) if summed else None
        trace = fitted.runs(model).alone({name: value[place] for name, value in self.draws.items()}).trace
        for name in fitted.latents:
            trace.remove_node(name)
        value = summed_over_plates(trace, self.datum.plates, particles=(), enumerates=summed)
        return value.expand(self.datum.sizes)

    def _in_plates(self, program: Any, size: int, num_inner: int) -> Any:
        program = LocalPlate(list(self.datum.plates), num_inner, self.inner)(program)
        return particle_plate(program, size, self.outer, OUTER_PARTICLES)

    def _per_datum(self, trace: poutine.Trace, size: int, *, enumerates: bool = False) -> Tensor:
        particles = [(OUTER_PARTICLES, self.outer), (PARTICLES, self.inner)]
        return summed_over_plates(trace, self.datum.plates, particles=particles, enumerates=enumerates)

    def _shared(self, trace: poutine.Trace) -> Tensor:
        """Return the log-density of what is outside the plates of a datum, for each outer draw."""
        total = torch.zeros(())
        for name, site in density_sites(trace):
            if all(inside(site, plate) for plate in self.datum.plates):
                continue
            log_prob = log_density(site)
            if log_prob.dim() >= -self.inner and log_prob.shape[self.inner] != 1:
                raise _NotNestedError(name)
            if log_prob.dim() > -self.outer:
                raise UnsupportedModelError(
                    f"Site {name!r} is shared by several data and depends on sites that are summed out for each of "
                    "them. Let the guide sample these sites."
                )
            total = total + keep_dims(log_prob, (self.outer, *self.apart.values()), wide=True)
        return total if total.dim() else total.reshape((1,) * (1 + len(self.apart)))

    def _by_plate(self, value: Tensor) -> Tensor:
        """Return (S,) or (S, elements of the plate that is apart) with a dimension for each plate of a datum."""
        sizes = [value.shape[1] if plate in self.apart else 1 for plate in self.datum.plates]
        return value.reshape(-1, *sizes)

    def _require_own_draws(self, name: str, site: Any, size: int, num_inner: int) -> None:
        """Raise unless the guide draws a site once for each outer draw, and a local one for each inner draw."""
        local = all(inside(site, plate) for plate in self.datum.plates)
        for dim, number in ((self.outer, size), (self.inner, num_inner if local else 1)):
            value, axis = site["value"], dim - site["fn"].event_dim
            if number > 1 and (value.dim() < -axis or value.shape[axis] != number or value.stride(axis) == 0):
                raise _NotNestedError(name)
