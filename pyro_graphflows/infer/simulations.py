"""Joint samples of a model, and a guide run on them.

The conventions are those of :class:`pyro.infer.CSIS`: the model runs with its observed sites unconditioned,
and the guide is called with the same arguments and ``observations={site: value}``. Which sites count as
observed is settled once:

1. those named by the caller, ``pyro.deterministic`` ones among them, else
2. those that are observed in the call (``obs=`` with a value, which only tells its shape), else
3. those that ``guide.model_graph`` has as observed, if the guide has one, else
4. those sites of the model that the guide does not sample.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import ImproperUniform
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import prune_subsample_sites, site_is_factor

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.infer.particles import (
    Program,
    Site,
    all_sites,
    count_plate_dims,
    density_sites,
    is_enumerated,
    plates_of,
)
from pyro_graphflows.inspect import is_transparent, require_pair, undressed

__all__ = ["JointLayout", "joint_layout", "run_guide", "sample_joint"]

MOST_TRIES = 100  # of a simulation, until its values are finite


@dataclass(frozen=True)
class JointLayout:
    """What is the same in each joint sample of a model.

    Attributes:
        observed: The sites whose values the guide is given.
        max_plate_nesting: The number of dimensions that the plates of the model and the guide take.
        shapes: The shape of each site of the model in one sample.
        event_dims: How many of its rightmost dimensions are those of one event.
        sampled: The latent sites that the guide samples.
    """

    observed: tuple[str, ...]
    max_plate_nesting: int
    shapes: dict[str, tuple[int, ...]]
    event_dims: dict[str, int]
    sampled: tuple[str, ...]


def joint_layout(
    model: Program,
    guide: Program,
    args: Iterable[Any],
    kwargs: dict[str, Any],
    observed: Iterable[str] | None = None,
    max_plate_nesting: int | None = None,
) -> JointLayout:
    """Run a model unconditioned and the guide on the result; refuse what would be silently wrong.

    Args:
        model: A Pyro model.
        guide: A guide that takes ``observations=``.
        args: Their positional arguments.
        kwargs: Their keyword arguments.
        observed: The observed sites, if the caller names them.
        max_plate_nesting: The number of dimensions of plates, if the caller knows it.

    Returns:
        What later runs need to know.

    Raises:
        GraphflowsError: If ``observed`` names a site that the model lacks, or no simulation is finite.
        UnsupportedModelError: If samples of the unconditioned model are not samples of its joint density
            (``pyro.factor``, ``poutine.scale``), or if the guide has a site that is not a latent site of the
            model.
    """
    require_pair(model, guide)
    args = tuple(args)
    with torch.no_grad(), poutine.block():
        model_trace = _finite_joint(model, args, kwargs)
        _require_prior_is_model(model_trace)
        names = [name for name, _ in density_sites(model_trace)]
        given = _observed_sites(model_trace, guide, observed)
        guide_trace = run_guide(guide, model_trace, given or names, args, kwargs)
    sampled = [name for name, site in density_sites(guide_trace) if not site["is_observed"]]
    observed = given or [name for name in names if name not in sampled]
    latents = [name for name in names if name not in observed]
    extra = sorted(set(sampled) - set(latents))
    if extra:
        raise UnsupportedModelError(
            f"Expected each site of the guide to be a latent site of the model; got {extra}. With auxiliary sites the "
            "guide has no density q(z | x) at given values."
        )
    left_out = sorted(
        name
        for name in latents
        if name not in sampled
        and not (is_enumerated(model_trace.nodes[name]) or is_transparent(model_trace.nodes[name]))
    )
    if left_out:
        warnings.warn(
            f"The guide does not sample the latent sites {left_out}: it is fitted to, or judged by, the marginal "
            "posterior of the others. Mark them infer={'enumerate': 'parallel'} if that is meant.",
            GraphflowsWarning,
            stacklevel=3,
        )
    if max_plate_nesting is None:
        max_plate_nesting = count_plate_dims(model_trace, guide_trace)
    known = {name: site for name, site in all_sites(model_trace) if name in names or name in observed}
    shapes = {name: tuple(site["value"].shape) for name, site in known.items()}
    event_dims = {name: int(site["fn"].event_dim) for name, site in known.items()}
    return JointLayout(tuple(observed), max_plate_nesting, shapes, event_dims, tuple(sampled))


def sample_joint(model: Program, args: Iterable[Any], kwargs: dict[str, Any]) -> poutine.Trace:
    """Return a trace of the model that ignores every observation; sites of subsampling are kept.

    Raises:
        UnsupportedModelError: If a prior is improper.
    """
    with _RefuseImproper():
        return poutine.trace(_Unconditioned()(model)).get_trace(*args, **kwargs)


def _finite_joint(model: Program, args: Iterable[Any], kwargs: dict[str, Any]) -> poutine.Trace:
    """Return a joint sample whose values are finite: a simulator may fail now and then.

    Raises:
        GraphflowsError: If none of many is.
    """
    for _ in range(MOST_TRIES):
        trace = sample_joint(model, args, kwargs)
        values = {name: site["value"] for name, site in density_sites(trace)}
        guilty = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
        if not guilty:
            return trace
    raise GraphflowsError(
        f"Expected a model that simulates finite values; {', '.join(guilty)} had NaN or infinite ones in each of "
        f"{MOST_TRIES} simulations. Mend the simulator or the priors."
    )


class _RefuseImproper(Messenger):
    """Say which prior it is that cannot be drawn from."""

    def _pyro_sample(self, msg: Any) -> None:
        drawn = msg["value"] is None or "was_observed" in msg["infer"]
        if drawn and isinstance(undressed(msg["fn"]), ImproperUniform):
            raise UnsupportedModelError(
                f"Expected proper priors, to simulate data from the model; that of site {msg['name']!r} is improper, "
                "and nothing can be drawn from it. Give it a proper prior, or use what needs the data alone: an ELBO, "
                "importance weights, prediction."
            )


class _Unconditioned(UnconditionMessenger):
    """Draws observed sites, and leaves those of pyro.deterministic, which are what they are."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


def run_guide(
    guide: Callable[..., Any],
    joint: poutine.Trace,
    observed: Iterable[str],
    args: Iterable[Any],
    kwargs: dict[str, Any],
    *,
    replay: bool = True,
) -> poutine.Trace:
    """Run a guide on the observed values of a joint sample.

    Args:
        guide: A guide that takes ``observations=``.
        joint: A trace of :func:`sample_joint`.
        observed: The names of the observed sites.
        args: Positional arguments of the guide.
        kwargs: Keyword arguments of the guide.
        replay: Whether the guide's sites get the sampled latent values; else the guide draws its own.

    Returns:
        The trace of the guide, without sites of subsampling (whose indices are always those of ``joint``).
    """
    observations = {name: joint.nodes[name]["value"] for name in observed}
    source = joint
    if not replay:
        source = joint.copy()
        for name, _ in all_sites(joint):
            source.remove_node(name)
    call = {**kwargs, "observations": observations}
    trace = poutine.trace(poutine.replay(guide, trace=source)).get_trace(*args, **call)
    return prune_subsample_sites(trace)


def _observed_sites(trace: poutine.Trace, guide: Program, observed: Iterable[str] | None) -> list[str]:
    names = [name for name, _ in density_sites(trace)]
    if observed is not None:
        observed = list(observed)
        known = sorted(name for name, _ in all_sites(trace))
        unknown = sorted(set(observed) - set(known))
        if unknown:
            raise GraphflowsError(f"Expected observed sites among {known}; got {unknown}.")
        return observed
    given = [name for name, site in density_sites(trace) if "was_observed" in site["infer"]]
    if not given:
        graph = getattr(guide, "model_graph", None)
        if isinstance(graph, ModelGraph):
            given = [name for name in graph.observed if name in names]
    return given


def _require_prior_is_model(trace: poutine.Trace) -> None:
    for name, site in all_sites(trace):
        if site_is_factor(site):
            raise UnsupportedModelError(
                f"Site {name!r} is a pyro.factor: samples of the model without it are not samples of its "
                "joint density. Train with an ELBO instead."
            )
        if not _is_plate_scale(site):
            raise UnsupportedModelError(
                f"Site {name!r} is scaled by poutine.scale: samples of the model are not samples of the "
                "scaled density. Remove the scale, or train with an ELBO."
            )


def _is_plate_scale(site: Site) -> bool:
    """Return whether a site's scale is that of the subsampled plates around it."""
    expected = 1.0
    for frame in plates_of(site):
        if frame.full_size is not None:
            expected *= frame.full_size / frame.size
    return bool(torch.isclose(torch.as_tensor(site["scale"] / expected), torch.tensor(1.0)).all())
