r"""Running a model and a guide for many particles at once, and reading the runs datum by datum.

Every estimator of this subpackage draws :math:`K` particles by one call of the guide and one of the model
inside a :class:`pyro.plate` to the left of all plates of the model (dimension ``-1 - max_plate_nesting``).
What is common to them lives here: one *prototype* run that finds the plates, the *data plate* (the plate
whose elements are the data, one importance weight each), and the sums that reduce a site's log-density to
that plate.

A datum's weight :math:`p(x_n, z_n) / q(z_n \mid x_n)` only exists when every site of the model and the guide
is inside the data plate: a site outside it belongs to all data at once. :func:`require_inside` says so,
naming the site and the ways out.

Vectorised particles add dimensions on the left of every plate. A model that sums over all dimensions, counts from the
left or multiplies by matrices of fixed shape either fails there or, worse, mixes the particles: its densities are
then those of another model, without an error. :func:`difference_to_alone` therefore runs one particle of a batch
again alone, with the same values, and compares the log-densities site by site.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger, unwrap
from pyro.poutine.plate_messenger import PlateMessenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.inspect import is_transparent, require_pair

__all__ = [
    "FEW",
    "FEW_ENOUGH",
    "OUTER_PARTICLES",
    "PARTICLES",
    "LocalPlate",
    "Prototype",
    "density_sites",
    "difference_of",
    "difference_to_alone",
    "errors_of_batches",
    "evaluation_mode",
    "find_data_plate",
    "inside",
    "is_enumerated",
    "is_one",
    "keep_dims",
    "last_particle",
    "log_density",
    "modules_of",
    "particle_plate",
    "prototype",
    "require_full_plates",
    "require_independent_particles",
    "require_inside",
    "run_pair",
]

Site = Any  # a site of a trace: Pyro's message, whose entries are typed too loosely to be of help
Program = Callable[..., Any]

PARTICLES = "num_particles_vectorized"  # Pyro's own name for the plate of particles
OUTER_PARTICLES = "num_outer_particles"  # draws of global latents, each with particles of its own

# So many are tried before more than FEW_ENOUGH are run: what mixes particles may take the memory of their square.
FEW, FEW_ENOUGH = 7, 100

_REMEDY = (
    "Write it for values with more dimensions on the left (sum over named dimensions, index from the right: "
    "x[..., i]), or run the particles one by one (log_evidence: vectorize=False; Pyro's losses: "
    "vectorize_particles=False)."
)


@dataclass(frozen=True)
class Prototype:
    """What one run without particles tells about a pair of model and guide.

    Attributes:
        model_trace: The trace of the model against the guide's values, without subsampling sites.
        guide_trace: The trace of the guide, without subsampling sites.
        max_plate_nesting: The number of dimensions that the plates of both take, counted from the right.
    """

    model_trace: poutine.Trace
    guide_trace: poutine.Trace
    max_plate_nesting: int


# ------------------------------------------------------------------------------------------- modes of modules
def modules_of(*programs: object) -> list[torch.nn.Module]:
    """Return the modules behind some callables: modules themselves, and those whose bound methods they are.

    Pyro's effect handlers and :func:`functools.partial` are looked through. A module that a plain function
    only mentions in its body cannot be found.
    """
    found: list[torch.nn.Module] = []
    for program in programs:
        inner: Any = program
        while True:
            unwrapped = unwrap(inner)
            if isinstance(unwrapped, partial):
                unwrapped = unwrapped.func
            if unwrapped is inner:
                break
            inner = unwrapped
        if not isinstance(inner, torch.nn.Module):
            inner = getattr(inner, "__self__", None)
        if isinstance(inner, torch.nn.Module) and all(inner is not module for module in found):
            found.append(inner)
    return found


@contextmanager
def evaluation_mode(*programs: object) -> Iterator[None]:
    """Put the modules behind some callables into evaluation mode, and each submodule back afterwards."""
    before = [(module, module.training) for root in modules_of(*programs) for module in root.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


# ---------------------------------------------------------------------------------------------------- running
def run_pair(
    model: Program, guide: Program, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[poutine.Trace, poutine.Trace]:
    """Run the guide, then the model against its values; return both traces without subsampling sites."""
    messenger = unwrap(guide)
    if isinstance(messenger, Messenger):  # Pyro's effect-based guides make both traces themselves
        guide(*args, **kwargs)
        model_trace, guide_trace = messenger.get_traces()  # type: ignore[attr-defined]
    else:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


class LocalPlate(PlateMessenger):
    """A plate of particles that only holds what is inside some plates.

    Args:
        plates: The names of these plates; none to hold everything.
        size: The number of particles.
        dim: Their dimension.
    """

    def __init__(self, plates: Sequence[str], size: int, dim: int) -> None:
        super().__init__(PARTICLES, size, dim=dim)
        self._plates = tuple(plates)

    def _process_message(self, msg: Any) -> None:
        # messages reach the outermost plate last: the others have put their mark on them by then
        if all(inside(msg, plate) for plate in self._plates):
            super()._process_message(msg)


def particle_plate(program: Program, size: int, dim: int, name: str = PARTICLES) -> Program:
    """Return ``program`` inside a plate of ``size`` particles at dimension ``dim``."""
    return pyro.plate(name, size, dim=dim)(program)


def prototype(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    max_plate_nesting: int | None = None,
    *,
    allow_enumeration: bool = False,
) -> Prototype:
    """Run the pair once, check that their sites agree, and count the dimensions of their plates.

    Args:
        model: A Pyro model.
        guide: A guide for it.
        args: Their positional arguments.
        kwargs: Their keyword arguments.
        max_plate_nesting: The number of dimensions, where it is known; else it is counted.
        allow_enumeration: Whether the guide may lack sites that the model enumerates in parallel.

    Returns:
        The traces and the number of dimensions.

    Raises:
        GraphflowsError: If they are no model and guide, or in the other order.
        UnsupportedModelError: If a latent site of the model is missing in the guide, or the guide has a site that the
            model lacks and that is not marked ``infer={"is_auxiliary": True}``.
    """
    require_pair(model, guide)
    with poutine.block(), torch.no_grad():
        model_trace, guide_trace = run_pair(model, guide, args, kwargs)
    missing = [
        name
        for name, site in density_sites(model_trace)
        if not site["is_observed"]
        and name not in guide_trace
        and not is_transparent(site)
        and not (allow_enumeration and is_enumerated(site))
    ]
    if missing:
        raise UnsupportedModelError(
            "Expected the guide to sample every latent site of the model; it does not sample "
            f"{sorted(missing)}. Give the guide these sites, or sum them out of the model (log_evidence does so for "
            "sites marked infer={'enumerate': 'parallel'})."
        )
    extra = sorted(
        name
        for name, site in density_sites(guide_trace)
        if name not in model_trace and not (site["is_observed"] or site["infer"].get("is_auxiliary"))
    )
    if extra:
        raise UnsupportedModelError(
            f"Expected each site of the guide to be a latent site of the model; got {extra}. The density of more than "
            "the model's latents is no proposal for these. Draw noise of the guide outside of pyro.sample."
        )
    if is_validation_enabled():
        for trace in (model_trace, guide_trace):
            trace.compute_log_prob()
            for _, site in density_sites(trace):
                check_site_shape(site, max_plate_nesting=sys.maxsize)
    if max_plate_nesting is None:
        max_plate_nesting = count_plate_dims(model_trace, guide_trace)
    return Prototype(model_trace, guide_trace, max_plate_nesting)


def count_plate_dims(*traces: poutine.Trace) -> int:
    """Return how many dimensions, from the right, the vectorised plates of some traces take."""
    dims = [frame.dim or 0 for trace in traces for _, site in all_sites(trace) for frame in plates_of(site)]
    return -min(dims, default=0)


# ------------------------------------------------------------------------------------------------------ sites
def all_sites(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    """Yield the sample statements of a trace, those of subsampling left out."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def density_sites(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    """Yield the sites of a trace that have a density: sample statements, ``pyro.deterministic`` left out."""
    for name, site in all_sites(trace):
        if not site["infer"].get("_deterministic"):
            yield name, site


def plates_of(site: Site) -> list[CondIndepStackFrame]:
    """Return the vectorised plates around a site, outer to inner, those of particles left out."""
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized and not _is_particles(frame)]


def is_enumerated(site: Site) -> bool:
    """Return whether a site is marked for parallel enumeration."""
    return site["infer"].get("enumerate") == "parallel"


def log_density(site: Site) -> Tensor:
    """Return the log-density of each batch element of a site, masked, without the scale of subsampling."""
    if "unscaled_log_prob" not in site:
        site["unscaled_log_prob"] = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])


def keep_dims(log_prob: Tensor, dims: Sequence[int], *, keepdim: bool = False, wide: bool = False) -> Tensor:
    """Sum a batch of log-densities over all dimensions but some.

    Args:
        log_prob: Log-densities of one site.
        dims: The negative dimensions to keep, from left to right. One that the tensor lacks comes back with size 1.
        keepdim: Whether the others stay, with size 1, so that ``dims`` keep their places.
        wide: Whether to add up in float64, where the device has it: a sum over a million data in float32 is off by a
            tenth of a nat.

    Returns:
        A tensor with one dimension for each of ``dims``, in this order; or with all dimensions up to the leftmost.
    """
    rank = max(log_prob.dim(), -min(dims, default=0))
    log_prob = log_prob.reshape((1,) * (rank - log_prob.dim()) + tuple(log_prob.shape))
    dropped = [dim for dim in range(-rank, 0) if dim not in dims]
    dtype = torch.float64 if wide and log_prob.device.type != "mps" else log_prob.dtype
    return log_prob.sum(dropped, keepdim=keepdim, dtype=dtype) if dropped else log_prob.to(dtype)


# ------------------------------------------------------------------------------------------------- data plate
def find_data_plate(
    trace: poutine.Trace, data_plate: str | Literal[False] | None
) -> CondIndepStackFrame | None:
    """Return the plate whose elements are the data.

    Args:
        trace: The prototype trace of the model.
        data_plate: Its name; ``None`` for the outermost vectorised plate that holds every observed site;
            ``False`` to weigh the data set as a whole.

    Returns:
        The plate, or ``None`` where there is none or ``data_plate`` is false.

    Raises:
        GraphflowsError: If no plate has that name, or if several could be meant. The message names them.
    """
    if data_plate is False:
        return None
    sites_in: dict[str, set[str]] = {}
    frames: dict[str, CondIndepStackFrame] = {}
    for name, site in all_sites(trace):
        for frame in plates_of(site):
            sites_in.setdefault(frame.name, set()).add(name)
            frames.setdefault(frame.name, frame)
    if data_plate is not None:
        if data_plate not in frames:
            raise GraphflowsError(
                f"Expected data_plate among the vectorised plates {sorted(frames)}; got {data_plate!r}."
            )
        return frames[data_plate]

    observed = [name for name, site in density_sites(trace) if site["is_observed"]] or [
        name for name, _ in density_sites(trace)
    ]
    common = [name for name in frames if sites_in[name].issuperset(observed)]
    if not common and frames and any(sites_in[name].intersection(observed) for name in frames):
        raise GraphflowsError(
            f"No plate holds all observed sites {sorted(observed)}; candidates are {sorted(frames)}. "
            "Name one as data_plate, or give data_plate=False to weigh the data set as a whole."
        )
    if not common:
        return None
    # the outermost holds whatever another one holds; of equal ones, the one that was entered first
    outermost = max(common, key=lambda name: len(sites_in[name]))
    if any(not sites_in[name] <= sites_in[outermost] for name in common):
        raise GraphflowsError(
            f"The plates {sorted(common)} all hold the observed sites and none is outside the others. "
            "Name one as data_plate, or give data_plate=False to weigh the data set as a whole."
        )
    return frames[outermost]


def require_inside(plate: str, traces: Iterable[poutine.Trace]) -> None:
    """Raise unless every site with a density is inside the data plate.

    Raises:
        UnsupportedModelError: If one is outside; the message names the sites and the alternatives.
    """
    outside = sorted(
        {name for trace in traces for name, site in density_sites(trace) if not inside(site, plate)}
    )
    if outside:
        raise UnsupportedModelError(
            f"The sites {outside} are outside the data plate {plate!r}, so no datum has an importance weight of "
            "its own: averaging over particles with different global values, datum by datum, can exceed "
            "log p(x). Use data_plate=False (weigh the data set as a whole), IWAE_ELBO (a nested bound with "
            "shared global draws), or poutine.condition on values of these sites."
        )


def require_full_plates(traces: Iterable[poutine.Trace]) -> None:
    """Raise unless the densities are those of the model itself: no subsampling, no ``poutine.scale``.

    Raises:
        UnsupportedModelError: If a plate is subsampled or a site is scaled.
    """
    for trace in traces:
        for name, site in density_sites(trace):
            for frame in plates_of(site):
                if frame.full_size is not None and frame.size != frame.full_size:
                    raise UnsupportedModelError(
                        f"The plate {frame.name!r} is subsampled ({frame.size} of {frame.full_size}): "
                        "importance weights need every element. Run the model on the data of interest, with "
                        "a plate of just these."
                    )
            if not is_one(site["scale"]):
                raise UnsupportedModelError(
                    f"Site {name!r} is scaled by poutine.scale; a scaled density has no evidence. Remove the "
                    "scale."
                )


def require_independent_particles(guide_trace: poutine.Trace, dim: int, size: int) -> None:
    """Raise where all particles share one draw: averages over particles would be wrong, silently.

    Raises:
        UnsupportedModelError: If the guide's value at some site is one draw broadcast over the particles.
    """
    if size == 1:
        return
    for name, site in density_sites(guide_trace):
        value, axis = site["value"], dim - site["fn"].event_dim
        if site["is_observed"] or value.numel() == 0:
            continue
        if value.dim() < -axis or value.shape[axis] != size or value.stride(axis) == 0:
            raise UnsupportedModelError(
                f"Expected the guide to draw site {name!r} once per particle; all {size} particles share one "
                "value. Draw it inside pyro.sample, at the batch shape of all enclosing plates."
            )


def inside(site: Site, plate: str) -> bool:
    """Return whether a site is inside a plate."""
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def _is_particles(frame: CondIndepStackFrame) -> bool:
    return frame.name in (PARTICLES, OUTER_PARTICLES)


def is_one(scale: float | Tensor) -> bool:
    """Return whether the scale of a site leaves its density as it is."""
    return bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1


# ------------------------------------------------------------------------------------- a batch and its particles alone
@contextmanager
def errors_of_batches(size: int | None = None) -> Iterator[None]:
    """Say of an error in a batch of particles that the model ran alone.

    Raises:
        UnsupportedModelError: If tensors do not fit together inside.
    """
    try:
        yield
    except GraphflowsError:
        raise
    except Exception as error:  # of the model, which may assert shapes as well
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        number = "several" if size is None else size
        raise UnsupportedModelError(
            f"Model and guide ran alone, and failed with {number} particles in one batch ({reason}). {_REMEDY}"
        ) from error


def difference_to_alone(
    pair: tuple[Program, Program],
    arguments: tuple[Sequence[Any], dict[str, Any]],
    batch: tuple[poutine.Trace, poutine.Trace],
    alone: tuple[poutine.Trace, poutine.Trace],
    dims: Sequence[int],
) -> str | None:
    """Say at which sites the log-density in a batch of particles is not that of the particle alone, if at any.

    The last particle is taken. Sites of subsampled plates cannot be compared: nothing is said of such models, nor of
    guides that are effect handlers and cannot run with given values.

    Args:
        pair: The model and the guide.
        arguments: Their positional and their keyword arguments.
        batch: The traces of both with a plate of particles.
        alone: The traces of a run without, which tell the shapes.
        dims: The dimensions of the particles, negative.

    Returns:
        The sites with both numbers and what to do, or None.
    """
    if any(_is_subsampled(site) for trace in alone for _, site in density_sites(trace)):
        return None
    (model, guide), (args, kwargs) = pair, arguments
    try:
        values = last_particle(batch[::-1], alone[::-1], dims)
    except UnsupportedModelError as error:
        return str(error)
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
    return _differences(different) if different else None


def last_particle(
    batch: Sequence[poutine.Trace], alone: Sequence[poutine.Trace], dims: Sequence[int]
) -> poutine.Trace:
    """Return the values that the last particle of a batch has at latent sites, in the shapes that they have alone.

    Args:
        batch: Traces with a plate of particles; the first that has a site counts.
        alone: Traces of the same programs without.
        dims: The dimensions of the particles, negative.

    Raises:
        UnsupportedModelError: If a site has more numbers in a particle than alone.
    """
    values = poutine.Trace()
    for together, single in zip(batch, alone, strict=True):
        for name, site in density_sites(together):
            if not site["is_observed"] and name not in values and name in single:
                chosen = _last(site["value"], [dim - site["fn"].event_dim for dim in dims])
                one: Any = single.nodes[name]
                shape = one["value"].shape
                if chosen.numel() != shape.numel():
                    raise UnsupportedModelError(
                        f"Expected site {name!r} to have the shape {tuple(shape)} in each particle, which it has "
                        f"alone; got {tuple(chosen.shape)}. {_REMEDY}"
                    )
                values.add_node(name, **{**one, "value": chosen.reshape(shape)})
    return values


def difference_of(what: str, among: Tensor, own: Tensor) -> str | None:
    """Say if the log-density of something is another one among particles than alone.

    Args:
        what: What it is of.
        among: The log-density of a particle of a batch.
        own: That of the same particle alone.
    """
    return None if _same(among, own) else _differences({what: (float(among.sum()), float(own.sum()))})


def _differences(different: dict[str, tuple[float, float]]) -> str:
    listed = "; ".join(
        f"{name!r} ({together:.6g} among the particles, {own:.6g} alone)"
        for name, (together, own) in different.items()
    )
    return (
        "Expected one particle of a batch to have the log-densities that it has alone; with the same values they "
        f"differ at {listed}. Model or guide mix the particles, or hold a module in training mode (batch norm, "
        f"dropout). {_REMEDY}"
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
