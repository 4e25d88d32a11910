"""The model's own distributions of latent sites, given values of other sites.

A conditional that is fused with the prior needs the prior's parameters where the sites above it have their sampled
values. They come from a run of the model in which sites with known values keep these, and which ends as soon as the
last wanted distribution is known: no likelihood, decoder or differential equation after it is computed. The run is
hidden from Pyro's handlers, keeps running statistics of networks as they are, draws no random numbers of its own, and
is differentiable with respect to the given values and to the model's parameters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect.runs import support_of

__all__ = ["ModelConditionals", "kept_running_statistics", "same_distribution"]


class _Enough(BaseException):
    """Ends a run of a model; not an Exception, so that no model catches it."""


class _Given(Messenger):
    """Gives sites their values, notes wanted distributions, and ends the run after the last of them."""

    def __init__(
        self,
        wanted: frozenset[str],
        latents: Mapping[str, Tensor],
        observed: Mapping[str, Tensor],
        indices: Mapping[str, Tensor],
        widths: Mapping[str, Sequence[int]],
    ) -> None:
        super().__init__()
        self.wanted, self.latents, self.observed, self.indices = wanted, latents, observed, indices
        self.widths = widths
        self.found: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            self._give_indices(msg)
            return
        msg["infer"] = {}  # marks for enumeration are for the model's own run
        if name in self.wanted:
            if msg["is_observed"] and name not in self.latents:
                raise UnsupportedModelError(
                    f"Expected no data for {name!r}, a latent site whose prior is wanted; this call has some. Set the "
                    "guide up with arguments like those of later calls: guide.setup(*args)."
                )
            self.found[name] = msg["fn"]
            if len(self.found) == len(self.wanted):
                raise _Enough
        if name in self.latents:
            msg["value"], msg["done"], msg["is_observed"] = self.latents[name], True, False
        elif name in self.observed:
            msg["value"], msg["done"], msg["is_observed"] = self.observed[name], True, True
        elif not msg["is_observed"] and not msg["done"]:
            value = _placeholder(msg["fn"])
            if name in self.widths:
                value = value.expand(np.broadcast_shapes(value.shape, self.widths[name]))
            msg["value"], msg["done"] = value, True

    def _give_indices(self, msg: Any) -> None:
        fn, name = msg["fn"], msg["name"]
        if name in self.indices:
            msg["value"], msg["done"] = self.indices[name], True
        elif fn.subsample_size is not None and fn.subsample_size < fn.size and msg["value"] is None:
            raise UnsupportedModelError(
                f"Expected the indices of the subsampled plate {name!r}; got none, and other rows than those of this "
                "call would be taken. Give indices={...}; a guide: call it with the model's arguments."
            )


def _placeholder(fn: Any) -> Tensor:
    """Return a value in the support, without random numbers, of a site on which nothing wanted depends."""
    shape, like = fn.shape(), _some_tensor(fn)
    options: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
    if fn.support.is_discrete:
        if fn.has_enumerate_support:
            return fn.enumerate_support(expand=False)[0].expand(shape)
        return torch.zeros(shape, **options)
    transform = biject_to(support_of(fn))
    return transform(torch.zeros(transform.inverse_shape(shape), **options))


def _some_tensor(fn: Any) -> Tensor | None:
    """Return a parameter of a distribution, which has its type and device; None if there is none."""
    for name in fn.arg_constraints:
        value = vars(fn).get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    inner = vars(fn).get("base_dist")
    return None if inner is None else _some_tensor(inner)


@contextmanager
def kept_running_statistics() -> Iterator[None]:
    """Let networks in training mode update copies of their buffers, and put the originals back afterwards.

    The buffers themselves are not written to, so that what autograd has saved of them stays valid.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with kept_running_statistics():
        ...     _ = norm(torch.randn(5, 2))
        >>> norm.running_mean.tolist(), norm.num_batches_tracked.item()
        ([0.0, 0.0], 0)
    """
    originals: dict[nn.Module, dict[str, Tensor | None]] = {}

    def before(module: nn.Module, inputs: Any) -> None:
        if module.training and module._buffers and module not in originals:
            originals[module] = dict(module._buffers)
            for name, buffer in originals[module].items():
                if buffer is not None:
                    module._buffers[name] = buffer.detach().clone()

    hook = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
        for module, buffers in originals.items():
            module._buffers.update(buffers)


class ModelConditionals:
    """Runs a model for the distributions of its latent sites.

    Not to be called inside plates of the model's: a plate cannot be entered twice.

    Args:
        model: The model.

    Attributes:
        runs: How often the model was run.

    Example:
        >>> import pyro
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> priors = ModelConditionals(model)
        >>> found = priors(["z"], (torch.zeros(3),), {}, latents={"mu": torch.tensor(2.0)})
        >>> found["z"].loc.tolist(), priors.runs
        ([2.0, 2.0, 2.0], 1)
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.runs = 0

    def __call__(
        self,
        wanted: Iterable[str],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        latents: Mapping[str, Tensor],
        observed: Mapping[str, Tensor] | None = None,
        indices: Mapping[str, Tensor] | None = None,
        widths: Mapping[str, Sequence[int]] | None = None,
    ) -> dict[str, dist.TorchDistribution]:
        """Return the model's distributions of some latent sites at given values of other sites.

        Args:
            wanted: The latent sites. Their latent parents in the model must be in ``latents``; see
                :func:`~pyro_graphflows.guides.fusion.fusible_sites`.
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            latents: Values of latent sites; further dimensions on the left (particles) are for the model to broadcast.
            observed: Values of observed sites that replace those of the model.
            indices: The indices of subsampled plates.
            widths: For latent sites a shape that theirs is broadcast with where they have no value. With the
                dimensions that given values have on the left, models can join these sites to the given ones.

        Returns:
            The distributions as they are at the sites: expanded by plates, with masks and event dimensions.

        Raises:
            UnsupportedModelError: If the model does not come to a wanted site, observes it, or subsamples a plate whose
                indices are not given, or if this is called inside of one of the model's plates. The message names it.
        """
        names = frozenset(wanted)
        if not names:
            return {}
        given = _Given(names, latents, observed or {}, indices or {}, widths or {})
        self.runs += 1
        # Parameters out of their range are for whoever reads the distributions, who knows the site and the remedy.
        with kept_running_statistics(), poutine.block(), pyro.validation_enabled(False):
            try:
                with given:
                    self.model(*args, **(kwargs or {}))
            except _Enough:
                pass
            except ValueError as error:
                if "duplicate plate" in str(error) or "collide at dim" in str(error):
                    reason = str(error).splitlines()[0]
                    raise UnsupportedModelError(
                        f"Expected no plate of the model's around a run of the model; got: {reason}. "
                        "Ask for the priors before the guide enters its plates."
                    ) from error
                raise
        missing = sorted(names - set(given.found))
        if missing:
            raise UnsupportedModelError(
                f"Expected the latent sites {', '.join(missing)} that the model had when the guide was set up; they "
                "are not in this call. Models whose sites come and go need one guide for each set of sites."
            )
        return given.found

    def is_repeatable(
        self,
        wanted: Iterable[str],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> dict[str, bool]:
        """Return whether two runs at the same values give the same distributions: not so with random networks.

        Args:
            wanted: The latent sites.
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            given: Further arguments of a call of this object.
        """
        names = list(wanted)
        with torch.no_grad():
            one, other = (self(names, args, kwargs, **given) for _ in range(2))
        return {name: same_distribution(one[name], other[name]) for name in names}


def same_distribution(one: Any, other: Any) -> bool:
    """Whether two distributions have the same type, shapes and parameters.

    Args:
        one: A distribution.
        other: Another one.

    Example:
        >>> same_distribution(dist.Normal(0.0, 1.0).to_event(0), dist.Normal(0.0, 1.0))
        True
        >>> same_distribution(dist.Normal(0.0, torch.ones(2)), dist.Normal(0.0, 2 * torch.ones(2)))
        False
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_distribution, one, other))
    if isinstance(one, torch.distributions.Distribution | torch.distributions.Transform):
        mine, theirs = _own_parts(one), _own_parts(other)
        return mine.keys() == theirs.keys() and all(same_distribution(mine[key], theirs[key]) for key in mine)
    if isinstance(one, int | float | bool | str | torch.Size) or one is None:
        return bool(one == other)
    return True  # constraints and the like hold no parameters of their own


def _own_parts(one: Any) -> dict[str, Any]:
    """Return the parts of a distribution or a transform, without what is kept of calls and inverses."""
    return {key: value for key, value in vars(one).items() if not key.startswith("_cached") and key != "_inv"}
