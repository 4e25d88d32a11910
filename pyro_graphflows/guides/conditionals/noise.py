r"""From base noise to values: what each conditional does to its noise, and by how much it stretches it.

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

from functools import singledispatch
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_graphflows.distributions.spline import SplineDistribution
from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.conditionals.coupled import CoupledNormal
from pyro_graphflows.guides.conditionals.distributions import (
    DrawnOrGiven,
    FactorDistribution,
    SampledNormal,
    ScalarNormal,
)
from pyro_graphflows.guides.conditionals.flow import FlowConditional
from pyro_graphflows.guides.conditionals.spline import SplineVector

__all__ = ["pull", "push"]

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
