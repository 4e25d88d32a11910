"""The log-likelihood of each observed value at draws of the latent sites."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.infer.enumeration import enumerated, summed_log_density
from pyro_graphflows.infer.model_runs import Fitted, chunk_size, chunks
from pyro_graphflows.infer.particles import PARTICLES, density_sites, inside, keep_dims, log_density

__all__ = ["log_likelihood_chunks", "only_inside", "summed_over_plates"]


def log_likelihood_chunks(
    fitted: Fitted, draws: Mapping[str, Tensor]
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Yield the log-likelihood of each observed value for some draws after the other.

    Args:
        fitted: The model with its data.
        draws: Values of its latent sites, draws along the first dimension.

    Yields:
        The draws, and by observed site a tensor (draws, *plates): events are summed over, masked elements are zero.

    Raises:
        UnsupportedModelError: If the model enumerates a site that concerns more than one element of the data, or has
            several observed sites that share enumerated ones.
    """
    first = fitted.runs().alone({name: value[0] for name, value in draws.items()}).trace
    observed = {
        name: tuple(site["fn"].batch_shape)
        for name, site in density_sites(first)
        if site["is_observed"] and not site_is_factor(site)
    }
    summed = fitted.summed_out
    if summed and len(observed) > 1:
        raise UnsupportedModelError(
            f"The sites {sorted(summed)} are summed out, over all observed sites at once; {sorted(observed)} have no "
            "likelihoods of their own. Let the guide sample these sites."
        )
    runs = fitted.runs(enumerated(fitted.model, fitted.nesting + fitted.vectorize) if summed else None)
    num = len(next(iter(draws.values())))
    if not fitted.vectorize:
        for place in range(num):
            trace = runs.alone({name: value[place] for name, value in draws.items()}).trace
            yield (
                slice(place, place + 1),
                {name: _pointwise(trace, name, fitted, summed)[None] for name in observed},
            )
        return
    for part in chunks(num, chunk_size(first)):
        size = part.stop - part.start
        trace = runs.batch({name: value[part] for name, value in draws.items()}, size).trace
        result = {}
        for name, shape in observed.items():
            value = _pointwise(trace, name, fitted, summed, draws=True)
            value = value.reshape(*[1] * (fitted.nesting + 1 - value.dim()), *value.shape)
            between = [1] * (fitted.nesting - len(shape))
            result[name] = value.expand(size, *between, *shape).reshape(size, *shape)
        yield part, result


def summed_over_plates(
    trace: poutine.Trace, plates: Mapping[str, int], *, particles: Sequence[tuple[str, int]], enumerates: bool
) -> Tensor:
    """Return the log-density of what is inside some plates, one for each of their elements.

    Args:
        trace: A run of a model.
        plates: The plates and their dimensions.
        particles: Further plates to keep, with their dimensions, before those.
        enumerates: Whether sites are enumerated, and summed out here.

    Returns:
        A tensor (*particles, *plates); a dimension that nothing varies along has size 1.
    """
    within = only_inside(trace, plates)
    kept = {**dict(particles), **plates}
    if enumerates:
        return summed_log_density(within, list(kept))
    dims = tuple(kept.values())
    terms = [keep_dims(log_density(site), dims, wide=True) for _, site in density_sites(within)]
    total = sum(terms, torch.zeros(()))
    return total if terms else total.reshape((1,) * len(dims))


def only_inside(trace: poutine.Trace, plates: Mapping[str, int]) -> poutine.Trace:
    """Return a trace with those sample sites only that are inside all of some plates."""
    within = trace.copy()
    for name, site in density_sites(trace):
        if not all(inside(site, plate) for plate in plates):
            within.remove_node(name)
    return within


def _pointwise(
    trace: poutine.Trace, name: str, fitted: Fitted, summed: list[str], *, draws: bool = False
) -> Tensor:
    site = trace.nodes[name]
    if not summed:
        return log_density(site)
    plates = {plate: dim for plate, dim, _ in fitted.sites[name].plates}
    outside = [other for other in summed if not _covers(fitted, other, plates)]
    if outside:
        raise UnsupportedModelError(
            f"The sites {sorted(outside)} are summed out and concern several elements of {name!r}, which then have no "
            "likelihoods of their own. Let the guide sample these sites."
        )
    # all that is inside, without the latent sites' own densities: p(y, c | draws) summed over c, prior of draws removed
    within = trace.copy()
    for other in fitted.latents:
        within.remove_node(other)
    particles = [(PARTICLES, -1 - fitted.nesting)] if draws else []
    dense = summed_over_plates(within, plates, particles=particles, enumerates=True)
    shape = [1] * (fitted.nesting + draws)
    for dim, size in zip([dim for _, dim in particles] + list(plates.values()), dense.shape, strict=True):
        shape[dim] = size
    return dense.reshape(shape)


def _covers(fitted: Fitted, name: str, plates: Mapping[str, int]) -> bool:
    own = {plate for plate, _, _ in fitted.sites[name].plates}
    return own >= set(plates)
