"""From a Pyro model to a model graph: run it once, watch where its random values go.

The graph has one node for each sample site and for each tensor argument that reaches a site's distribution.
``z -> x`` is an edge if the value of ``z`` enters the density of ``x``: through its parameters, through a
mask or a scale in force at ``x``, or because the observed value of ``x`` is computed from ``z``. As an
example::

    def model(w, x=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(a * w, 1.0), obs=x)

has the edges ``a -> x`` and ``w -> x``: ``w`` is an input. That ``x`` is also an argument is data, not an
edge.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.inspect.assembly import trace_once
from pyro_graphflows.inspect.elements import split_elements
from pyro_graphflows.inspect.traced import TracedModel
from pyro_graphflows.inspect.validation import Validation

__all__ = ["get_model_graph", "trace_model"]


def get_model_graph(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    *,
    strict: bool = True,
    resolution: str = "site",
    validate: bool = False,
) -> ModelGraph:
    """Find the Bayesian network that a Pyro model defines.

    The model runs once, without gradients and without touching the random state. Parameters that it creates
    stay.

    Args:
        model: A Pyro model.
        model_args: Its positional arguments: example data.
        model_kwargs: Its keyword arguments.
        strict: What to do where a random value turns into a Python value, so that it cannot be followed:
            raise (True), or make all earlier sites parents of the sites after it (False).
        resolution: ``"site"``, or ``"element"`` to split vector sites into their elements.
        validate: Whether to compare with gradients, and with the log-densities at other values, which takes
            about two more runs for each site and plate.

    Returns:
        Sites as latent, observed or marginalised nodes (those enumerated in parallel), and tensor arguments
        that reach a distribution as inputs; event sizes and plates.

    Raises:
        UnsupportedModelError: If a random value turns into a Python value (with ``strict``), a site has
            dimensions outside of plates, or a log-density cannot be evaluated. The message names the site,
            and what to do.
        GraphflowsError: If ``resolution`` is unknown.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(w, x=None):
        ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("x", dist.Normal(a * w, 1.0), obs=x)
        >>> graph = get_model_graph(model, (torch.ones(3),), {"x": torch.zeros(3)})
        >>> graph.edges, graph.inputs, graph.plates["w"]
        ((('w', 'x'), ('a', 'x')), ('w',), ('data',))
    """
    return trace_model(
        model, model_args, model_kwargs, strict=strict, resolution=resolution, validate=validate
    ).graph


def trace_model(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    *,
    strict: bool = True,
    resolution: str = "site",
    validate: bool = False,
) -> TracedModel:
    """Like :func:`get_model_graph`, with everything else that the run shows.

    Args:
        model: A Pyro model.
        model_args: Its positional arguments: example data.
        model_kwargs: Its keyword arguments.
        strict: Whether to raise where a random value cannot be followed.
        resolution: ``"site"`` or ``"element"``.
        validate: Whether to compare with the model's behaviour.

    Returns:
        The graph, the trace, paths of arguments, leaks and notes.

    Raises:
        UnsupportedModelError: As :func:`get_model_graph`.
        GraphflowsError: If ``resolution`` is unknown.
    """
    if resolution not in ("site", "element"):
        raise GraphflowsError(f"Expected resolution 'site' or 'element'; got {resolution!r}.")
    args, kwargs = tuple(model_args), dict(model_kwargs or {})
    traced = trace_once(model, args, kwargs, strict=strict)
    if validate:
        traced = _validated(traced, Validation(model, args, kwargs, traced, strict).run())
    if resolution == "element":
        traced = split_elements(model, args, kwargs, traced)
    return traced


def _validated(traced: TracedModel, validation: Validation) -> TracedModel:
    graph = traced.graph
    if validation.missed:
        graph = graph.with_edges([*graph.edges, *validation.missed])
    return replace(
        traced,
        graph=graph,
        notes=tuple(dict.fromkeys((*traced.notes, *validation.notes))),
        non_exchangeable=validation.non_exchangeable,
    )
