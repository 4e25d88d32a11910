"""Joint samples of the model when a guide is set up, drawn once whoever asks, and put side by side.

They are flat vectors, unconstrained where a site is latent, classes as indicators, ``(draws, *batch, size)``, as the
guide's networks see them. The search for a smooth order (:mod:`~pyro_graphflows.guides.smooth_order`) and the start of
the networks (:mod:`~pyro_graphflows.guides.set_up`) use the same ones.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_graphflows.guides.call import CallReader
from pyro_graphflows.guides.features import flatten_event
from pyro_graphflows.guides.site import LatentSite
from pyro_graphflows.inspect import TracedModel, get_argument, sample_prior

__all__ = ["MOST_ROWS", "JointSamples", "at_one_depth", "side_by_side", "with_depth"]

MOST_ROWS = 200_000  # in the block with the most elements, for a joint sample
MOST_NUMBERS = 20_000_000  # in all joint samples together, as the data of one can be many
FEWEST_DRAWS = 200  # even so


class JointSamples:
    """The data of one call, and joint samples of the model of that call.

    Args:
        model: The model.
        args: The positional arguments of the call.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.
        reader: The reader of the guide's calls.
        sites: The latent sites.
        event_dims: The nodes that can be network inputs, with their numbers of event dimensions.

    Attributes:
        inputs: What the guide conditions on of each input.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        traced: TracedModel,
        reader: CallReader,
        sites: Mapping[str, LatentSite],
        event_dims: Mapping[str, int],
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.traced, self.reader, self.sites, self.event_dims = traced, reader, sites, event_dims
        self.inputs = {name: reader.input_value(name, self.argument(name)) for name in traced.event_dims}
        self._kept: dict[str, Tensor] = {}
        self._num_kept = 0
        nodes: Any = traced.trace.nodes
        size = sum(site["value"].numel() for site in nodes.values() if torch.is_tensor(site.get("value")))
        self._most_draws = max(FEWEST_DRAWS, MOST_NUMBERS // max(1, size))

    def argument(self, name: str) -> Tensor:
        """Return the value of an input as the model got it."""
        return get_argument(self.model, self.traced.argument_paths[name], self.args, self.kwargs)

    def conditioning(self, name: str, value: Tensor) -> Tensor:
        """Return a value of a node as the guide conditions on it: of partly observed sites with the mask."""
        if name not in self.reader.partly:
            return value
        nodes: Any = self.traced.trace.nodes
        return self.reader.masked_value(name, value, nodes[name]["mask"])

    def draw(self, num_samples: int, *, keep: bool = True) -> dict[str, Tensor]:
        """Return joint samples of all latent sites and of the nodes that can be network inputs.

        They are drawn if fewer are kept from before; the random state is then used and advanced.

        Args:
            num_samples: How many; fewer are drawn where so many would fill the memory, as data are drawn with them.
            keep: Whether they are kept for whoever asks next.

        Raises:
            UnsupportedModelError: If samples of the model would not be what the model's density says.
        """
        samples = self._kept
        num_samples = min(num_samples, self._most_draws)
        if num_samples > self._num_kept:
            samples = sample_prior(
                self.model, self.args, self.kwargs, num_samples=num_samples, traced=self.traced
            )
            if keep:
                self._kept, self._num_kept = samples, num_samples
        samples = {name: value[:num_samples] for name, value in samples.items()}
        flat = {}
        for name, site in self.sites.items():
            if site.encoding is not None:
                flat[name] = site.encoding.encode(samples[name], torch.get_default_dtype())
                continue
            raw = biject_to(site.support).inv(samples[name])
            flat[name] = flatten_event(raw, len(site.unconstrained_shape))
        for name, event_dim in self.event_dims.items():
            if name in samples:
                flat[name] = self.reader.flat(name, self.conditioning(name, samples[name]), event_dim)
            else:
                value = self.inputs[name]
                flat[name] = flatten_event(value, event_dim).expand(
                    num_samples, *value.shape[: value.dim() - event_dim], -1
                )
        return flat


def side_by_side(samples: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return one row for each draw and each element of the plates of some nodes, ``(rows, size)`` each."""
    aligned = at_one_depth(samples, names)
    shape = torch.broadcast_shapes(*(value.shape[:-1] for value in aligned.values()))
    return {
        name: value.expand(*shape, value.shape[-1]).reshape(-1, value.shape[-1])
        for name, value in aligned.items()
    }


def at_one_depth(samples: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return samples of some nodes with as many batch dimensions each, so that they broadcast."""
    chosen = {name: samples[name] for name in names}
    depth = max(value.dim() for value in chosen.values()) - 2
    return {name: with_depth(value, depth) for name, value in chosen.items()}


def with_depth(value: Tensor, depth: int) -> Tensor:
    """Put dimensions of size one behind the first, of the draws, so that there are ``depth`` others before the last."""
    missing = depth + 2 - value.dim()
    return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])
