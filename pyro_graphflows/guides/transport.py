r"""The map from base noise to latents: a guide as a change of variables.

A guide draws noise :math:`\varepsilon` of a fixed law, site by site, and maps it to values,
:math:`z = T(\varepsilon; x)`. In the coordinates :math:`\varepsilon` the posterior

.. math:: p(x, T(\varepsilon)) \, |\det \partial T / \partial \varepsilon|

is the nearer to that law the better the guide, so that Hamiltonian Monte Carlo has an easy target there
(:meth:`~pyro_graphflows.infer.Posterior.refined`).

References:
    [1] Hoffman, Sountsov, Dillon, Langmore, Tran and Vasudevan (2019), NeuTra-lizing bad geometry in Hamiltonian
    Monte Carlo using neural transport. There the guide is one flow over all latents.

From base noise to values: what each conditional does to its noise, and by how much it stretches it.

A reparametrised distribution is a map of noise, :math:`z = T(\varepsilon)`. :func:`push` applies the map and returns
the logarithm of :math:`|\det \partial T / \partial \varepsilon|`; :func:`pull` inverts it. The base is that of the
family: standard normal, or Student's t or logistic for splines with these. Its density is not needed: it follows from
:math:`\log q(z) + \log |\det \partial T / \partial \varepsilon|`.

Both are tables by the class of the distribution. A distribution of a user's factor takes part if it is one of those
below or has methods ``push(noise)`` and ``pull(value)`` of its own.

Shape:
    - noise: ``(*batch, n)`` with ``n`` the length of the flat unconstrained vector; numbers are vectors of one element.
    - logarithms of determinants: ``batch``.
"""

import math
from collections.abc import Callable, Mapping
from functools import singledispatch
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

from pyro_graphflows.distributions.spline import SplineDistribution
from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides.conditionals.coupled import CoupledNormal
from pyro_graphflows.guides.conditionals.distributions import (
    DrawnOrGiven,
    FactorDistribution,
    SampledNormal,
    ScalarNormal,
)
from pyro_graphflows.guides.conditionals.elements import WithNewElements
from pyro_graphflows.guides.conditionals.flow import FlowConditional
from pyro_graphflows.guides.conditionals.spline import SplineVector

__all__ = [
    "Transport",
    "Transported",
    "pull",
    "push",
]

Runner = Callable[[Callable[..., Tensor]], dict[str, Tensor]]

DRAWS = "_pyro_graphflows_draws"


class Transported(NamedTuple):
    """Where noise is mapped to.

    Attributes:
        values: The values by site.
        log_det: For each site the logarithm of the determinant of the map from its noise to its value, for each element
            of its plates. Where a mask leaves the site out, the log-density of the noise itself.
    """

    values: dict[str, Tensor]
    log_det: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The log-determinant of the whole map for each draw: the sum over sites and plates."""
        terms = [term.reshape(len(term), -1).sum(1) for term in self.log_det.values()]
        return sum(terms[1:], terms[0])


class Transport:
    """The map from base noise to latents for the data of one call; made by ``guide.transport(*args)``.

    Args:
        run: Runs the guide's call with another way to emit a site.
        depth: The number of dimensions that plates take.

    Attributes:
        shapes: For each site the shape of its noise: the batch shape in its plates, and the length of its flat vector.
        like: A value, of the type and on the device of all of them.

    Raises:
        UnsupportedModelError: If a site is discrete, its distribution is no map of noise that is known, or it has
            elements beyond those fitted, which follow the model.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_graphflows.guides import auto_faithful_guide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.zeros(3)
        >>> transport = auto_faithful_guide(model, x).transport(x)
        >>> transport.shapes["z"]
        (3, 1)
        >>> values, log_det = transport({"z": torch.randn(10, 3, 1)})
        >>> values["z"].shape, log_det["z"].shape
        (torch.Size([10, 3]), torch.Size([10, 3]))
        >>> transport.inverse(values)["z"].shape
        torch.Size([10, 3, 1])
    """

    def __init__(self, run: Runner, depth: int) -> None:
        self._run, self._depth = run, depth
        shapes: dict[str, tuple[int, ...]] = {}
        self._values: dict[str, tuple[int, ...]] = {}

        def look(name: str, fn: Any, **_: Any) -> Tensor:
            value: Tensor = fn.rsample() if fn.has_rsample else fn.sample()
            batch = np.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
            try:
                self._require_map(fn)
                noise = pull(fn, value)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"No map from noise to site {name!r}. {error}") from error
            shapes[name] = (*batch, noise.shape[-1])
            self._values[name] = (*batch, *fn.event_shape)
            return value.expand(self._values[name])

        with torch.no_grad(), poutine.block(), torch.random.fork_rng(devices=[]):
            values = run(look)
        self.like = next(iter(values.values()))
        self.shapes: Mapping[str, tuple[int, ...]] = MappingProxyType(shapes)

    @staticmethod
    def _require_map(fn: Any) -> None:
        while isinstance(fn, dist.MaskedDistribution):
            fn = fn.base_dist
        if isinstance(fn, WithNewElements):
            raise UnsupportedModelError(
                "Elements beyond those fitted follow the model's own conditional. Set up a guide for the new data."
            )
        if fn.support.is_discrete:
            raise UnsupportedModelError(
                "It is discrete. Mark it infer={'enumerate': 'parallel'} in the model, which is summed over then."
            )

    @property
    def size(self) -> int:
        """The length of the noise of one draw as one vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def __repr__(self) -> str:
        return f"Transport({', '.join(f'{name} {shape}' for name, shape in self.shapes.items())})"

    # ------------------------------------------------------------------------------------------------------ the map
    def __call__(self, noise: Mapping[str, Tensor] | Tensor) -> Transported:
        """Map noise to values, with gradients.

        Args:
            noise: By site, shape ``(draws, *shapes[site])``; or vectors ``(draws, size)``, sites beside each other.

        Returns:
            Values of shape ``(draws, *shape of the site)`` and log-determinants ``(draws, *batch of the site)``.

        Raises:
            GraphflowsError: If the shapes are others. The message names the site.
        """
        return self._mapped(noise)

    def unconstrained(self, noise: Mapping[str, Tensor] | Tensor) -> Transported:
        """Map noise to values on the real line, those that Pyro's bijection to the support of the site starts from.

        Args:
            noise: As for a call.

        Returns:
            These values, ``(draws, *unconstrained shape of the site)``, and log-determinants.
        """
        return self._mapped(noise, constrained=False)

    def _mapped(self, noise: Mapping[str, Tensor] | Tensor, *, constrained: bool = True) -> Transported:
        noise = self.unpack(noise) if isinstance(noise, Tensor) else noise
        num = self._require_shapes(noise, self.shapes)
        values: dict[str, Tensor] = {}
        log_dets: dict[str, Tensor] = {}

        def emit(name: str, fn: Any, **_: Any) -> Tensor:
            value, whole = _pushed(fn, self._in_batch(noise[name], 1))
            batch = self.shapes[name][:-1]
            kept, log_det = value, whole
            if not constrained:
                to_value = biject_to(fn.support)  # here, where its bounds have the dimensions of the value
                kept = to_value.inv(value)
                stretch = to_value.log_abs_det_jacobian(kept, value)
                log_det = log_det - stretch.reshape(*log_det.shape, -1).sum(-1)
            mask = fn._mask if isinstance(fn, dist.MaskedDistribution) else None
            if mask is not None:
                of_noise = fn.base_dist.log_prob(value) + whole
                log_det = torch.where(torch.as_tensor(mask, device=value.device), log_det, of_noise)
            log_dets[name] = log_det.expand(num, *self._between(len(batch)), *batch).reshape(num, *batch)
            shape = self._values[name] if constrained else kept.shape[kept.dim() - len(self._values[name]) :]
            values[name] = kept.reshape(num, *shape)
            return value

        self._emitted(num, emit)
        return Transported({name: values[name] for name in self.shapes}, log_dets)

    def inverse(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the noise that gives some values.

        Args:
            values: By site, shape ``(draws, *shape of the site)``.

        Raises:
            GraphflowsError: If the shapes are others. The message names the site.
        """
        num = self._require_shapes(values, self._values)
        found: dict[str, Tensor] = {}

        def emit(name: str, fn: Any, **_: Any) -> Tensor:
            event_dim = len(self._values[name]) - len(self.shapes[name]) + 1
            value = self._in_batch(values[name], event_dim)
            found[name] = pull(fn, value)
            return value

        self._emitted(num, emit)
        return {name: found[name].reshape(num, *shape) for name, shape in self.shapes.items()}

    def pack(self, noise: Mapping[str, Tensor]) -> Tensor:
        """Return the noise of all sites beside each other, ``(draws, size)``."""
        return torch.cat([noise[name].flatten(1) for name in self.shapes], 1)

    def unpack(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return vectors ``(draws, size)`` by site; the inverse of :meth:`pack`."""
        if vectors.dim() != 2 or vectors.shape[1] != self.size:
            raise GraphflowsError(
                f"Expected vectors of shape (draws, {self.size}); got {tuple(vectors.shape)}."
            )
        parts = vectors.split([math.prod(shape) for shape in self.shapes.values()], 1)
        return {
            name: part.reshape(-1, *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def _emitted(self, num: int, emit: Callable[..., Tensor]) -> dict[str, Tensor]:
        with poutine.block(), pyro.plate(DRAWS, num, dim=-1 - self._depth):
            return self._run(emit)

    def _between(self, batch_dim: int) -> list[int]:
        return [1] * (self._depth - batch_dim)

    def _in_batch(self, value: Tensor, event_dim: int) -> Tensor:
        between = self._between(value.dim() - 1 - event_dim)
        return value.reshape(len(value), *between, *value.shape[1:])

    def _require_shapes(self, given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> int:
        for name, shape in shapes.items():
            if name not in given or tuple(given[name].shape[1:]) != shape:
                got = tuple(given[name].shape) if name in given else "nothing"
                raise GraphflowsError(
                    f"Expected {name!r} of shape (draws, {', '.join(map(str, shape))}); got {got}."
                )
        return len(given[next(iter(shapes))])

    # ------------------------------------------------------------------------------------------------------- NeuTra
    def neutra(self) -> NeuTraReparam:
        """Return Pyro's :class:`~pyro.infer.reparam.neutra.NeuTraReparam` by this map.

        ``NUTS(transport.neutra().reparam(model))`` samples a model in the guide's base space, and ``transform_sample``
        takes such samples to values. Pyro's class is made for its own guides, one vector over all latents; this one
        follows the guide.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_graphflows.guides import auto_faithful_guide
            >>> def model(x):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", 3):
            ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
            >>> x = torch.tensor([0.5, 1.0, 1.5])
            >>> neutra = auto_faithful_guide(model, x).transport(x).neutra()
            >>> trace = poutine.trace(neutra.reparam(model)).get_trace(x)
            >>> trace.nodes["mu_shared_latent"]["value"].shape
            torch.Size([1])
        """
        return _NeuTra(_BaseSpace(self))


def _pushed(fn: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Map noise to values; noise so far out that its value is no number gets another value, and no density.

    A trajectory that leaves the posterior must not stop those beside it: later sites read finite values.
    """
    value, log_det = push(fn, noise)
    good = value.isfinite().flatten(value.dim() - fn.event_dim).all(-1) if fn.event_dim else value.isfinite()
    good = good & log_det.isfinite()
    if bool(good.all()):
        return value, log_det
    value, log_det = push(fn, torch.where(good.unsqueeze(-1), noise, torch.zeros_like(noise)))
    return value, torch.where(good, log_det, -torch.inf)


class _NeuTra(NeuTraReparam):
    """Pyro's reparametrisation by a transport."""

    def transform_sample(self, latent: Tensor) -> dict[str, Tensor]:
        """Return the values that some noise gives, ``(*batch, size)`` to ``(*batch, *shape of the site)``."""
        values, _ = self.guide.transport(latent.reshape(-1, latent.shape[-1]))
        return {name: value.reshape((*latent.shape[:-1], *value.shape[1:])) for name, value in values.items()}


class _BaseSpace(AutoContinuous):
    """What Pyro's reparametrisation asks of its guides, from a transport."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(_nothing)
        self.plates = {}
        self.transport = transport
        self.to_unconstrained = _ToUnconstrained(transport)
        like = transport.like
        self.base = dist.Normal(like.new_zeros(transport.size), 1.0).to_event(1)
        self.prototype_trace = poutine.Trace()
        for name in transport.shapes:
            self.prototype_trace.add_node(name, name=name, type="sample", fn=None, is_observed=False)

    def get_base_dist(self) -> Any:
        return self.base

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        return self.to_unconstrained

    def _unpack_latent(self, latent: Tensor, *args: Any, **kwargs: Any) -> Any:
        parts = latent.split([math.prod(shape) for shape in self.to_unconstrained.shapes.values()], -1)
        for (name, shape), part in zip(self.to_unconstrained.shapes.items(), parts, strict=True):
            yield {"name": name}, part.reshape((*latent.shape[:-1], *shape))


def _nothing() -> None:
    """A model without sites."""


class _ToUnconstrained(Transform):
    """From a vector of noise to the unconstrained values of Pyro's own bijections, beside each other.

    Args:
        transport: The map from noise to values.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, transport: Transport) -> None:
        super().__init__()
        self.transport = transport
        self.shapes: dict[str, torch.Size] = {}
        self._last: tuple[Tensor, Tensor] | None = None  # the noise mapped last and its log-determinant

    def _call(self, x: Tensor) -> Tensor:
        noise = x.reshape(-1, self.transport.size)
        mapped = self.transport.unconstrained(noise)
        self.shapes = {name: value.shape[1:] for name, value in mapped.values.items()}
        self._last = (x, mapped.total.reshape(x.shape[:-1]))
        flat = [value.reshape(len(noise), -1) for value in mapped.values.values()]
        return torch.cat(flat, 1).reshape((*x.shape[:-1], -1))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log-determinant; that of the noise mapped last is known."""
        if self._last is None or self._last[0] is not x:
            self._call(x)
        assert self._last is not None
        return self._last[1]


LOCATION_SCALE = (dist.Normal, dist.StudentT, dist.Laplace, dist.Cauchy, dist.Gumbel)


@singledispatch
def push(fn: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value that some noise gives, and the log-determinant of the map there.

    Args:
        fn: A distribution that a guide emits at a site, or a conditional over flat vectors.
        noise: The noise.

    Raises:
        UnsupportedModelError: If the distribution is no map of noise that is known.
    """
    if hasattr(fn, "push"):
        pushed: tuple[Tensor, Tensor] = fn.push(noise)
        return pushed
    raise _unknown(fn)


@singledispatch
def pull(fn: Any, value: Tensor) -> Tensor:
    """Return the noise that gives a value.

    Args:
        fn: A distribution that a guide emits at a site, or a conditional over flat vectors.
        value: The value.

    Raises:
        UnsupportedModelError: If the distribution is no map of noise that is known.
    """
    if hasattr(fn, "pull"):
        pulled: Tensor = fn.pull(value)
        return pulled
    raise _unknown(fn)


def _unknown(fn: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Expected a distribution that is a known map of noise; got {type(fn).__name__}. Give it methods push(noise), "
        "which returns values and log-determinants, and pull(value)."
    )


# ------------------------------------------------------------------------------------ distributions of torch and Pyro
def _push_location_scale(fn: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    noise = noise.squeeze(-1)
    value = fn.loc + fn.scale * noise
    return value, fn.scale.log().expand(value.shape)


def _pull_location_scale(fn: Any, value: Tensor) -> Tensor:
    noise: Tensor = (value - fn.loc) / fn.scale
    return noise.unsqueeze(-1)


for _kind in LOCATION_SCALE:
    push.register(_kind, _push_location_scale)
    pull.register(_kind, _pull_location_scale)


@push.register(dist.Independent)
def _(fn: dist.Independent, noise: Tensor) -> tuple[Tensor, Tensor]:
    value, log_det = push(fn.base_dist, noise.unsqueeze(-1))
    return value, log_det.sum(tuple(range(-fn.reinterpreted_batch_ndims, 0)))


@pull.register(dist.Independent)
def _(fn: dist.Independent, value: Tensor) -> Tensor:
    return pull(fn.base_dist, value).squeeze(-1)


@push.register(dist.MultivariateNormal)
def _(fn: dist.MultivariateNormal, noise: Tensor) -> tuple[Tensor, Tensor]:
    tril = fn._unbroadcasted_scale_tril
    value = fn.loc + (tril @ noise.unsqueeze(-1)).squeeze(-1)
    return value, tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(value.shape[:-1])


@pull.register(dist.MultivariateNormal)
def _(fn: dist.MultivariateNormal, value: Tensor) -> Tensor:
    return _solve(fn._unbroadcasted_scale_tril, value - fn.loc)


@push.register(dist.MaskedDistribution)
def _(fn: dist.MaskedDistribution, noise: Tensor) -> tuple[Tensor, Tensor]:
    return push(fn.base_dist, noise)


@pull.register(dist.MaskedDistribution)
def _(fn: dist.MaskedDistribution, value: Tensor) -> Tensor:
    return pull(fn.base_dist, value)


# -------------------------------------------------------------------------------------------------------- our own ones
@push.register(ScalarNormal)
def _(fn: ScalarNormal, noise: Tensor) -> tuple[Tensor, Tensor]:
    value, log_det = push(fn.normal, noise)
    return value.unsqueeze(-1), log_det


@pull.register(ScalarNormal)
def _(fn: ScalarNormal, value: Tensor) -> Tensor:
    return pull(fn.normal, value.squeeze(-1))


@push.register(SampledNormal)
def _(fn: SampledNormal, noise: Tensor) -> tuple[Tensor, Tensor]:
    return push(fn.normal, noise)


@pull.register(SampledNormal)
def _(fn: SampledNormal, value: Tensor) -> Tensor:
    return pull(fn.normal, value)


@push.register(DrawnOrGiven)
def _(fn: DrawnOrGiven, noise: Tensor) -> tuple[Tensor, Tensor]:
    return push(fn.live, noise)


@pull.register(DrawnOrGiven)
def _(fn: DrawnOrGiven, value: Tensor) -> Tensor:
    return pull(fn.live, value)


@push.register(FactorDistribution)
def _(fn: FactorDistribution, noise: Tensor) -> tuple[Tensor, Tensor]:
    flat, log_det = push(fn.base, noise)
    return fn.constrained(flat), log_det + fn.log_stretch(flat)


@pull.register(FactorDistribution)
def _(fn: FactorDistribution, value: Tensor) -> Tensor:
    return pull(fn.base, fn.unconstrained(value))


@push.register(SplineDistribution)
def _(fn: SplineDistribution, noise: Tensor) -> tuple[Tensor, Tensor]:
    splined, log_slope = fn.spline(noise)
    return fn.loc + fn.scale * splined, (fn.scale.log() + log_slope).sum(-1)


@pull.register(SplineDistribution)
def _(fn: SplineDistribution, value: Tensor) -> Tensor:
    return fn.to_noise(value)


@push.register(SplineVector)
def _(fn: SplineVector, noise: Tensor) -> tuple[Tensor, Tensor]:
    splined, log_det = push(fn.elements, noise)
    value = fn.loc + (fn.scale_tril @ splined.unsqueeze(-1)).squeeze(-1)
    return value, log_det + fn.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@pull.register(SplineVector)
def _(fn: SplineVector, value: Tensor) -> Tensor:
    return pull(fn.elements, _solve(fn.scale_tril, value - fn.loc))


@push.register(CoupledNormal)
def _(fn: CoupledNormal, noise: Tensor) -> tuple[Tensor, Tensor]:
    return fn.push(noise)


@pull.register(CoupledNormal)
def _(fn: CoupledNormal, value: Tensor) -> Tensor:
    return fn.pull(value)


@push.register(FlowConditional)
def _(fn: FlowConditional, noise: Tensor) -> tuple[Tensor, Tensor]:
    return fn.level.push_site(fn.site, noise)


@pull.register(FlowConditional)
def _(fn: FlowConditional, value: Tensor) -> Tensor:
    return fn.level.pull_site(fn.site, value)


def _solve(tril: Tensor, residual: Tensor) -> Tensor:
    tril = tril.expand(*residual.shape[:-1], -1, -1)
    return torch.linalg.solve_triangular(tril, residual.unsqueeze(-1), upper=False).squeeze(-1)
