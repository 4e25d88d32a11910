"""The guides that are compared: a line each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import autoguide
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to

from pyro_graphflows import Auto, Normal, Spline, auto_faithful_guide

Model = Callable[..., Any]


class ImproperStart(Messenger):
    """Give sites with an improper prior the value 0 in unconstrained space: Pyro's guides would draw from the prior."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["is_observed"] and isinstance(msg["fn"], dist.ImproperUniform):
            msg["value"] = transform_to(msg["fn"].support)(torch.zeros(msg["fn"].shape()))


# guides of Pyro, as they come
PYRO: dict[str, Callable[[Model], Any]] = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoStructured": autoguide.AutoStructured,
    "AutoGaussian": autoguide.AutoGaussian,
    "AutoIAFNormal": partial(autoguide.AutoIAFNormal, num_transforms=2),
}

# name -> options of auto_faithful_guide
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours normal": {"family": "normal"},
    "ours spline": {"family": "spline"},
    "ours unfused": {"family": Auto(normal=Normal(fusion=False), spline=Spline(fusion=False))},
}

METHODS: tuple[str, ...] = (*PYRO, *OURS)


def make_guide(method: str, model: Model, args: tuple[Any, ...]) -> Any:
    """Make a guide and run it once, so that all of its parameters are there."""
    if method in PYRO:
        guide = PYRO[method](ImproperStart()(model))
    else:
        guide = auto_faithful_guide(model, *args, **OURS[method])
    guide(*args)
    return guide


def parameters(guide: torch.nn.Module) -> list[Tensor]:
    """Return what is trained."""
    return [parameter for parameter in guide.parameters() if parameter.requires_grad]
