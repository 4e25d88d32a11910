r"""How far a guide is from the posterior: the gap between the log-evidence and the ELBO.

With importance weights :math:`w_k = p(x, z_k) / q(z_k \mid x)` the ELBO is the mean of :math:`\log w_k` and the IWAE
bound the logarithm of the mean of :math:`w_k`. Their difference estimates
:math:`\mathrm{KL}(q \,\|\, p(\cdot \mid x))`, from below in expectation: exactly, the more draws there are, and too low
where the guide misses what the posterior has (Pareto k-hat above 0.7).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer.batches import Batches, TrainingData
from pyro_graphflows.infer.evidence import importance_log_weights
from pyro_graphflows.infer.particles import Program
from pyro_graphflows.infer.psis import psis_khat

__all__ = ["Gap", "estimate_gap", "gap_of_log_weights"]

TRUSTED = 0.7
MOST_DATA = 500


class Gap(NamedTuple):
    """The estimated divergence of a guide from the posterior.

    Attributes:
        value: Log-evidence minus ELBO in nats: the mean over the data, or that of all data together.
        standard_error: Its standard error.
        num_data: How many data have weights of their own; 0 where they are weighed together.
        num_doubtful: How many of these (or 1, for all together) have weights with a Pareto k-hat above 0.7: there the
            gap is greater than is seen.
        num_draws: The number of draws of the guide.
    """

    value: float
    standard_error: float
    num_data: int
    num_doubtful: int
    num_draws: int

    def __repr__(self) -> str:
        unit = "nats per datum" if self.num_data else "nats for all data together"
        text = f"gap {self.value:.3f} ± {self.standard_error:.3f} {unit} (IWAE with {self.num_draws} draws"
        if self.num_doubtful:
            whose = f" for {self.num_doubtful} of {self.num_data} data" if self.num_data else ""
            text += f"; k-hat above {TRUSTED}{whose}"
        return text + ")"


def gap_of_log_weights(log_weights: Tensor) -> Gap:
    """Return the gap from the logarithms of importance weights.

    Args:
        log_weights: Draws along the first dimension, then perhaps data.
    """
    num = len(log_weights)
    log_weights = log_weights.double()
    centred = log_weights - log_weights.mean(0)
    log_mean = torch.logsumexp(centred, 0) - math.log(num)
    influence = (
        (centred - log_mean).exp() - 1 - centred
    )  # of each draw on the difference, by the delta method
    errors = influence.std(0) / math.sqrt(num) if num > 1 else torch.full_like(log_mean, math.nan)
    num_data = log_weights.shape[1] if log_weights.dim() > 1 else 0
    doubtful = int((psis_khat(log_weights) > TRUSTED).sum())
    error = errors.square().sum().sqrt() / max(1, num_data)
    return Gap(log_mean.mean().item(), error.item(), num_data, doubtful, num)


def estimate_gap(
    model: Program, guide: Program, data: TrainingData, num_draws: int = 1000
) -> Gap | GraphflowsError:
    """Estimate the gap of a guide for some data, of at most 500 where each has weights of its own.

    Args:
        model: A Pyro model.
        guide: A guide for it.
        data: The data of training.
        num_draws: The number of draws of the guide.

    Returns:
        The gap, or the reason why there is none: a plate is subsampled, say.
    """
    args, kwargs = data.arguments()
    if data.data is not None and data.full_size is None:  # each batch stands for itself
        batch = Batches(data.data, MOST_DATA, shuffle=False).first()
        args, kwargs = batch.args, {**batch.kwargs, **(data.kwargs or {})}
    attempts: list[dict[str, Any]] = [{}, {"data_plate": False}]
    attempts += [{**attempt, "vectorize": False} for attempt in attempts]
    reason: GraphflowsError | None = None
    for attempt in attempts:
        draws = num_draws if attempt.get("vectorize", True) else min(num_draws, 200)
        try:
            weights = importance_log_weights(model, guide, *args, num_particles=draws, **attempt, **kwargs)
        except (GraphflowsError, UnsupportedModelError) as error:
            reason = reason or error
            continue
        if not bool(weights.isfinite().all()):
            return GraphflowsError("Expected finite importance weights; some draws have none.")
        return gap_of_log_weights(weights)
    assert reason is not None
    return reason
