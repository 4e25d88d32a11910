r"""Runs of a guide and a model with the importance weight of each.

The evidence, posteriors and their repair all weigh draws of a guide by :math:`p(x, z) / q(z \mid x)`. An
:class:`ImportanceSampler` makes these runs, many at once inside a plate of particles, or one by one for models that
are not written for batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.infer.enumeration import enumerated, summed_log_density
from pyro_graphflows.infer.particles import (
    PARTICLES,
    Program,
    Prototype,
    density_sites,
    difference_of,
    difference_to_alone,
    errors_of_batches,
    is_enumerated,
    keep_dims,
    last_particle,
    log_density,
    particle_plate,
    require_full_plates,
    require_independent_particles,
    run_pair,
)

__all__ = ["ImportanceSampler"]

Traces = tuple[poutine.Trace, poutine.Trace]


@dataclass(frozen=True, eq=False)
class ImportanceSampler:
    """A model and a guide with their arguments, and how their runs are weighed.

    Discrete sites that the model enumerates in parallel and the guide leaves out are summed out of the weights.

    Args:
        model: A Pyro model.
        guide: A guide for it.
        args: Their positional arguments.
        kwargs: Their keyword arguments.
        first: A run of both without particles.
        plate: The plate whose elements have a weight each; ``None`` to weigh all data together.
        vectorize: Whether to run many particles at once.

    Raises:
        UnsupportedModelError: If a plate is subsampled or a site is scaled.
    """

    model: Program
    guide: Program
    args: Sequence[Any]
    kwargs: dict[str, Any]
    first: Prototype
    plate: CondIndepStackFrame | None
    vectorize: bool

    def __post_init__(self) -> None:
        require_full_plates((self.first.model_trace, self.first.guide_trace))

    @property
    def dim(self) -> int:
        """The dimension of the particles."""
        return -1 - self.first.max_plate_nesting

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the log-densities."""
        return next(log_density(site).dtype for _, site in density_sites(self.first.model_trace))

    @property
    def enumerates(self) -> bool:
        """Whether the model has sites to sum out."""
        return any(
            is_enumerated(site) and name not in self.first.guide_trace
            for name, site in density_sites(self.first.model_trace)
        )

    def run(self, size: int) -> Traces:
        """Return the traces of the model and the guide for some particles; one without a batch if not vectorised.

        Raises:
            UnsupportedModelError: If the batch fails, or all its particles share one draw.
        """
        model, guide, nesting = self.model, self.guide, self.first.max_plate_nesting
        if self.vectorize:
            model, guide = (particle_plate(program, size, self.dim) for program in (model, guide))
            nesting += 1
        if self.enumerates:
            model = enumerated(model, nesting)
        if not self.vectorize:
            return run_pair(model, guide, self.args, self.kwargs)
        with errors_of_batches(size):
            pair = run_pair(model, guide, self.args, self.kwargs)
        require_independent_particles(pair[1], self.dim, size)
        return pair

    def require_same_alone(self, batch: Traces) -> None:
        """Raise where a particle of a batch has another density than alone.

        Raises:
            UnsupportedModelError: If that is so.
        """
        alone = (self.first.model_trace, self.first.guide_trace)
        if self.enumerates:
            difference = self._difference_of_sums(batch, alone)
        else:
            difference = difference_to_alone(
                (self.model, self.guide), (self.args, self.kwargs), batch, alone, [self.dim]
            )
        if difference:
            raise UnsupportedModelError(difference)

    def _difference_of_sums(self, batch: Traces, alone: Traces) -> str | None:
        """Say if the density of the last particle of a batch, with sites summed out, is not what it is alone."""
        values = last_particle(batch[1:], alone[1:], [self.dim])
        with errors_of_batches():
            together = summed_log_density(batch[0], [PARTICLES])[-1]
        model = enumerated(self.model, self.first.max_plate_nesting)
        trace = poutine.trace(poutine.replay(model, trace=values)).get_trace(*self.args, **self.kwargs)
        return difference_of("the sum over the model's sites", together, summed_log_density(trace, []))

    def log_weights(self, traces: Traces) -> Tensor:
        """Return the logarithms of the weights of a run, in float64: (size,), or (size, data) with a plate."""
        plates = {PARTICLES: self.dim} if self.vectorize else {}
        if self.plate is not None:
            assert self.plate.dim is not None
            plates[self.plate.name] = self.plate.dim
        model_trace, guide_trace = traces
        dims = tuple(plates.values())
        if self.enumerates:
            plus = summed_log_density(model_trace, list(plates))
        else:
            plus = _total(model_trace, dims)
        weights = plus - _total(guide_trace, dims)
        return weights if self.vectorize else weights[None]


def _total(trace: poutine.Trace, dims: tuple[int, ...]) -> Tensor:
    terms = [keep_dims(log_density(site), dims, wide=True) for _, site in density_sites(trace)]
    return sum(terms, torch.zeros(()))
