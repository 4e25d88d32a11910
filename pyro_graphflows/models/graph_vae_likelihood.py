"""The likelihoods of the Graph VAE: from a decoder's outputs to a distribution of the data, and which data it takes."""

from collections.abc import Callable
from typing import Literal

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError

__all__ = ["Likelihood", "check_likelihood", "check_values", "data_distribution", "outputs_per_element"]

#: A likelihood by name, or a function from the decoder's outputs to a distribution of the data.
Likelihood = Literal["bernoulli", "normal"] | Callable[[Tensor], TorchDistribution]


def check_likelihood(likelihood: Likelihood) -> None:
    """Refuse what is no likelihood.

    Args:
        likelihood: The likelihood.

    Raises:
        GraphflowsError: If it is neither a known name nor a function.
    """
    if not callable(likelihood) and likelihood not in ("bernoulli", "normal"):
        raise GraphflowsError(f"Expected likelihood 'bernoulli', 'normal' or a function; got {likelihood!r}.")


def outputs_per_element(likelihood: Likelihood) -> int:
    """Return how many outputs of the default decoder each element of a datum has."""
    return 2 if likelihood == "normal" else 1


def data_distribution(outputs: Tensor, likelihood: Likelihood, shape: torch.Size) -> TorchDistribution:
    """Return the distribution of the data given the decoder's outputs.

    Args:
        outputs: The outputs ``(*batch, number of outputs)``: logits for ``"bernoulli"``, means (before the sigmoid)
            followed by log-variances for ``"normal"``.
        likelihood: The likelihood.
        shape: The shape of one datum.

    Returns:
        A distribution with that event shape.

    Raises:
        GraphflowsError: If there are too many or too few outputs for a likelihood by name, or a function returns no
            distribution.
    """
    if callable(likelihood):
        law = likelihood(outputs)
        if not isinstance(law, dist.Distribution):
            raise GraphflowsError(
                f"Expected the likelihood to return a distribution of pyro.distributions; got a {type(law).__name__}."
            )
        return law
    number = outputs_per_element(likelihood) * shape.numel()
    if outputs.shape[-1] != number:
        raise GraphflowsError(
            f"Expected the decoder to return {number} numbers for each datum of shape {tuple(shape)} and "
            f"likelihood={likelihood!r}; got {outputs.shape[-1]}."
        )
    event_dim, full = len(shape), (*outputs.shape[:-1], *shape)
    if likelihood == "bernoulli":
        return dist.Bernoulli(logits=outputs.reshape(full)).to_event(event_dim)
    loc, log_var = outputs.chunk(2, -1)
    scale = (0.5 * log_var).exp()
    return dist.Normal(loc.sigmoid().reshape(full), scale.reshape(full)).to_event(event_dim)


def check_values(x: Tensor, likelihood: Likelihood) -> None:
    """Refuse data that a likelihood cannot have made.

    Args:
        x: The data.
        likelihood: The likelihood; a function takes all values.

    Raises:
        GraphflowsError: If there are values outside of {0, 1} for ``"bernoulli"``, or of [0, 1] for ``"normal"``.
    """
    if likelihood == "bernoulli" and not ((x == 0) | (x == 1)).all():
        raise GraphflowsError(
            "Expected data of zeros and ones for likelihood='bernoulli'; got other values, from "
            f"{x.min().item():g} to {x.max().item():g}. Binarise them (datasets.binarize), or use "
            "likelihood='normal'."
        )
    if likelihood == "normal" and not ((x >= 0) & (x <= 1)).all():
        raise GraphflowsError(
            "Expected data in [0, 1] for likelihood='normal', whose mean is a sigmoid; got values from "
            f"{x.min().item():g} to {x.max().item():g}. Scale them (datasets.dequantize), or give a likelihood "
            "of your own."
        )
