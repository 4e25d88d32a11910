"""Run a model again at given values of its sites, with gradients, to see what its log-densities depend on."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import biject_to
from torch.utils._pytree import tree_map

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect.record import is_transparent, quiet_run, run_model, undressed

__all__ = ["GivenValues", "RerunError", "density", "differentiable", "rerun", "with_leaves"]


class RerunError(UnsupportedModelError):
    """A model cannot be evaluated at other values than those it drew."""


class GivenValues(Messenger):
    """Gives sites their values, whether the model samples or observes them, and subsamples their indices.

    Args:
        values: Values by site name; other sites are as in the model.
        stir: Whether to add noise to parameters, which are often equal in the beginning.
    """

    def __init__(self, values: Mapping[str, torch.Tensor], *, stir: bool = False) -> None:
        super().__init__()
        self.values, self.stir = values, stir

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and (site_is_subsample(msg) or not is_transparent(msg)):
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_param(self, msg: Any) -> None:
        if (
            not self.stir
            or not isinstance(msg["value"], torch.Tensor)
            or not msg["value"].is_floating_point()
        ):
            return
        transform = biject_to(msg["kwargs"].get("constraint", dist.constraints.real))
        free = transform.inv(msg["value"].detach())
        msg["value"] = transform(free + 0.1 * torch.randn_like(free))


def density(site: Mapping[str, Any], *, elementwise: bool = False) -> torch.Tensor:
    """Return the log-density at a site of a trace, masked and scaled as in the model.

    Args:
        site: A node of a trace.
        elementwise: Whether to leave independent elements of an event apart.

    Returns:
        A tensor of the site's batch shape, or of batch shape and independent event shape.

    Raises:
        RerunError: If the log-density cannot be evaluated at this value.
    """
    fn, value = site["fn"], site["value"]
    base = undressed(fn) if elementwise else fn
    try:
        log_density = base.log_prob(value)
    except Exception as error:  # a flow may know its inverse only for values that it drew
        raise _failure(error) from error
    if not elementwise:
        return scale_and_mask(log_density, site["scale"], site["mask"])
    apart = len(fn.event_shape) - len(base.event_shape)
    log_density = log_density.expand(fn.batch_shape + fn.event_shape[:apart])
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask
            log_density = log_density * (_widened(mask, apart) if isinstance(mask, torch.Tensor) else mask)
        fn = fn.base_dist
    mask, scale = site["mask"], site["scale"]
    scale = _widened(scale, apart) if isinstance(scale, torch.Tensor) else scale
    return scale_and_mask(
        log_density, scale, _widened(mask, apart) if isinstance(mask, torch.Tensor) else mask
    )


def _failure(error: Exception) -> RerunError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RerunError(f"The model cannot be evaluated at other values: {reason.rstrip('.')}.")


def _widened(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    return tensor.reshape(tensor.shape + (1,) * dims)


def differentiable(value: torch.Tensor) -> bool:
    """Whether gradients exist with respect to values of this type."""
    return value.is_floating_point() or value.is_complex()


def with_leaves(
    args: tuple, kwargs: dict[str, Any], replaced: Mapping[int, torch.Tensor]
) -> tuple[tuple, dict[str, Any]]:
    """Return arguments in which some tensors, given by ``id``, are replaced."""
    return tree_map(lambda leaf: replaced.get(id(leaf), leaf), (args, kwargs))


def rerun(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    values: Mapping[str, torch.Tensor],
    *,
    stir: bool = False,
    gradients: bool = False,
    seed: int = 0,
) -> Any:
    """Trace a model at given values.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values by site.
        stir: Whether to add noise to parameters.
        gradients: Whether to keep the autograd graph.
        seed: The random state: two runs differ by what was changed only.

    Returns:
        The trace.

    Raises:
        RerunError: If the model does not run at these values. The message has the model's own.
    """
    try:
        with quiet_run(model), torch.set_grad_enabled(gradients):
            torch.manual_seed(seed)
            return run_model(model, args, kwargs, GivenValues(values, stir=stir))
    except Exception as error:  # anything may go wrong in a user's model
        raise _failure(error) from error
