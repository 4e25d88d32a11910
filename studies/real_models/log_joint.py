"""The log density of a Pyro model over all its latents at once, in unconstrained space."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from studies.real_models.posterior import Values


class LogJoint:
    """The log joint density of a model's latents and data, of many points at once.

    Points are rows of a matrix whose columns are the unconstrained coordinates of the sites, one after the other; the
    density is with respect to them (the Jacobians are in it).

    Args:
        model: A Pyro model whose latents are continuous, with supports that do not depend on other latents.
        args: Its arguments.
        plates: How many dimensions its plates take.
        values: A value of each latent site; any shape with the right number of entries.
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], plates: int, values: Values):
        self.model, self.args, self.plates = model, args, plates
        trace = poutine.trace(poutine.condition(model, data=self._shaped(values))).get_trace(*args)
        self.sites: dict[str, tuple[Any, torch.Size, torch.Size]] = {}  # transform, batch and event shape
        self.columns: dict[str, slice] = {}
        start = 0
        for name in values:
            site = trace.nodes[name]
            fn, value = site["fn"], site["value"]
            transform = biject_to(fn.support)
            free = transform.inv(value)
            event = free.shape[len(fn.batch_shape) :]
            self.sites[name] = (transform, fn.batch_shape, event)
            self.columns[name] = slice(start, start + free.numel())
            start += free.numel()
        self.size = start

    def _shaped(self, values: Values) -> Values:
        """Give each value the shape that its site has."""
        shapes: dict[str, torch.Size] = {}

        class Shapes(poutine.messenger.Messenger):
            def _pyro_sample(self, msg: Any) -> None:
                if msg["name"] in values:
                    shapes[msg["name"]] = msg["fn"].batch_shape + msg["fn"].event_shape
                    msg["value"] = values[msg["name"]].reshape(shapes[msg["name"]])
                    msg["done"] = True

        with poutine.block(), Shapes():
            self.model(*self.args)
        missing = sorted(set(values) - set(shapes))
        if missing:
            raise ValueError(f"Expected a latent site for each of {missing}; the model has none.")
        return {name: value.reshape(shapes[name]) for name, value in values.items()}

    def unconstrain(self, values: Values) -> Tensor:
        """Return the coordinates of site values that have the draws along the first dimension, (draws, size)."""
        parts = []
        for name, (transform, batch, _) in self.sites.items():
            value = values[name]
            event = value.shape[value.dim() - transform.codomain.event_dim :]
            parts.append(transform.inv(value.reshape(len(value), *batch, *event)).reshape(len(value), -1))
        return torch.cat(parts, -1)

    def constrain(self, u: Tensor) -> tuple[Values, Tensor]:
        """Return the site values of coordinates, ready for the model in a plate of particles, and the log Jacobian."""
        values, ladj = {}, torch.zeros(len(u), dtype=u.dtype)
        for name, (transform, batch, event) in self.sites.items():
            padding = (1,) * (self.plates - len(batch))
            free = u[:, self.columns[name]].reshape(len(u), *padding, *batch, *event)
            value = transform(free)
            ladj = ladj + transform.log_abs_det_jacobian(free, value).reshape(len(u), -1).sum(-1)
            values[name] = value
        return values, ladj

    def __call__(self, u: Tensor) -> Tensor:
        """Return the log density of each row."""
        values, ladj = self.constrain(u)
        with pyro.plate("_points", len(u), dim=-1 - self.plates):
            trace = poutine.trace(poutine.condition(self.model, data=values)).get_trace(*self.args)
        trace.compute_log_prob()
        total = ladj
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and site["is_observed"] and type(site["fn"]).__name__ != "_Subsample":
                log_prob = site["log_prob"]
                if log_prob.dim() <= self.plates or len(log_prob) != len(u):
                    raise ValueError(f"Expected a log density for each of {len(u)} points at site {name}.")
                total = total + log_prob.reshape(len(u), -1).sum(-1)
        return total

    def score(self, u: Tensor, size: int = 100) -> Tensor:
        """Return the gradient of the log density at each row."""
        parts = []
        for part in u.split(size):
            part = part.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self(part).sum(), part)
            parts.append(gradient)
        return torch.cat(parts)

    def values_at(self, u: Tensor, size: int = 100) -> Tensor:
        """Return the log density of each row without gradients, some rows at a time."""
        with torch.no_grad():
            return torch.cat([self(part) for part in u.split(size)])
