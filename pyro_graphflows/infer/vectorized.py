"""Whether a model means the same in a batch of particles as it does alone.

Vectorised particles add dimensions on the left of every plate. A model that sums over all dimensions, counts from the
left or multiplies by matrices of fixed shape either fails there or, worse, mixes the particles: its densities are
then those of another model, without an error. One particle of a batch is therefore run again alone, with the same
values, and the log-densities are compared site by site.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger, unwrap
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer.particles import (
    Program,
    Site,
    density_sites,
    log_density,
)

__all__ = ["difference_to_alone", "errors_of_batches"]

REMEDY = (
    "Write it for values with more dimensions on the left (sum over named dimensions, index from the right: "
    "x[..., i]), or run the particles one by one (log_evidence: vectorize=False; Pyro's losses: "
    "vectorize_particles=False)."
)


@contextmanager
def errors_of_batches(size: int) -> Iterator[None]:
    """Say of an error in a batch of particles that the model ran alone.

    Raises:
        UnsupportedModelError: If tensors do not fit together inside.
    """
    try:
        yield
    except GraphflowsError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModelError(
            f"Model and guide ran alone, and failed with {size} particles in one batch ({reason}). {REMEDY}"
        ) from error


def difference_to_alone(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    batch: tuple[poutine.Trace, poutine.Trace],
    alone: tuple[poutine.Trace, poutine.Trace],
    dims: Sequence[int],
) -> str | None:
    """Say at which sites the log-density in a batch of particles is not that of the particle alone, if at any.

    The last particle is taken. Sites of subsampled plates cannot be compared: nothing is said of such models, nor of
    guides that are effect handlers and cannot run with given values.

    Args:
        model: The model.
        guide: The guide.
        args: Their positional arguments.
        kwargs: Their keyword arguments.
        batch: The traces of both with a plate of particles.
        alone: The traces of a run without, which tell the shapes.
        dims: The dimensions of the particles, negative.

    Returns:
        The sites with both numbers and what to do, or None.
    """
    if any(_is_subsampled(site) for trace in alone for _, site in density_sites(trace)):
        return None
    values = poutine.Trace()
    for together, single in zip(reversed(batch), reversed(alone), strict=True):
        for name, site in density_sites(together):
            if not site["is_observed"] and name not in values and name in single:
                chosen = _last(site["value"], [dim - site["fn"].event_dim for dim in dims])
                one: Any = single.nodes[name]
                shape = one["value"].shape
                if chosen.numel() != shape.numel():
                    return (
                        f"Expected site {name!r} to have the shape {tuple(shape)} in each particle, which it has "
                        f"alone; got {tuple(chosen.shape)}. {REMEDY}"
                    )
                values.add_node(name, **{**one, "value": chosen.reshape(shape)})
    programs = [model] if isinstance(unwrap(guide), Messenger) else [model, guide]
    different: dict[str, tuple[float, float]] = {}
    for program, together in zip(programs, batch, strict=False):
        again = poutine.trace(poutine.replay(program, trace=values)).get_trace(*args, **kwargs)
        for name, site in density_sites(again):
            if name not in together or name in different:
                continue
            own = log_density(site)
            among = _last(log_density(together.nodes[name]), dims)
            if not _same(among, own):
                different[name] = (float(among.sum()), float(own.sum()))
    return _message(different) if different else None


def _message(different: dict[str, tuple[float, float]]) -> str:
    listed = "; ".join(
        f"{name!r} ({together:.6g} among the particles, {own:.6g} alone)"
        for name, (together, own) in different.items()
    )
    return (
        "Expected one particle of a batch to have the log-densities that it has alone; with the same values they "
        f"differ at {listed}. Model or guide mix the particles, or hold a module in training mode (batch norm, "
        f"dropout). {REMEDY}"
    )


def _last(value: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in sorted(axes):  # the leftmost first: the others keep their negative numbers
        if value.dim() >= -axis:
            value = value.select(axis, value.shape[axis] - 1)
    return value


def _same(first: Tensor, second: Tensor) -> bool:
    """Compare sums, by the size of their terms: sums of the same numbers in another order."""
    tolerance = 10 * torch.finfo(second.dtype).eps ** 0.5 * (1.0 + float(second.abs().sum()))
    a, b = float(first.sum()), float(second.sum())
    return a == b or abs(a - b) <= tolerance or (a != a and b != b)


def _is_subsampled(site: Site) -> bool:
    return any(
        frame.full_size is not None and frame.full_size != frame.size for frame in site["cond_indep_stack"]
    )
