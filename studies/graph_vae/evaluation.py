"""What is measured of a trained ensemble, for all members at once: batch statistics, bound, log-likelihood.

Gates are hard, and batch statistics the stored ones. Images are bytes of zeros and ones on the device.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_graphflows.infer import effective_sample_size, psis_khat
from studies.graph_vae.ensemble import Ensemble, log_likelihood


def fixed_source(device: torch.device, seed: int = 0) -> torch.Generator:
    """Return a random source for measurements, which leaves those of the training alone."""
    return torch.Generator(device).manual_seed(3_000_017 + seed)


def _noise(ensemble: Ensemble, rows: int, generator: torch.Generator) -> Tensor:
    like = ensemble.parameters["bottom_up.bias"]
    shape = (ensemble.num_nodes, ensemble.size, rows, ensemble.node_dim)
    return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


def _for_all(ensemble: Ensemble, images: Tensor) -> Tensor:
    """Return images ``(rows, size)`` as numbers, the same ones for each member ``(E, rows, size)``."""
    return images.to(ensemble.parameters["bottom_up.bias"].dtype).expand(ensemble.size, -1, -1)


@torch.no_grad()
def recalibrate(ensemble: Ensemble, images: Tensor, batch_size: int = 500) -> None:
    """Collect the batch statistics anew with hard gates, as plain averages over batches."""
    generator, momentum = fixed_source(images.device), ensemble.momentum
    gates = ensemble.hard_gates()
    parts = [part for part in images.split(batch_size) if len(part) > 1]
    for number, part in enumerate(parts, start=1):
        ensemble.momentum = 1 / number
        bottom_up = ensemble.bottom_up(_for_all(ensemble, part), True)
        ensemble.terms(bottom_up, _noise(ensemble, len(part), generator), gates, True)
    ensemble.momentum = momentum


@torch.no_grad()
def bound(ensemble: Ensemble, images: Tensor, num_samples: int = 1, rows: int = 500) -> tuple[Tensor, Tensor]:
    """Return each member's mean bound ``(E,)`` and mean divergence of each node ``(E, N)``, in nats, on the device.

    The noise is the same in each call.
    """
    generator = fixed_source(images.device)
    gates = ensemble.hard_gates()
    total = torch.zeros(ensemble.size, dtype=torch.float64, device=images.device)
    divergence = torch.zeros(ensemble.size, ensemble.num_nodes, dtype=torch.float64, device=images.device)
    for part in images.split(rows):
        x = _for_all(ensemble, part)
        bottom_up = ensemble.bottom_up(x, False)
        for _ in range(num_samples):
            noise = _noise(ensemble, len(part), generator)
            logits, terms, _ = ensemble.terms(bottom_up, noise, gates, False)
            total += log_likelihood(logits, x).sum(1)
            divergence += terms.sum(2)
    number = len(images) * num_samples
    return (total - divergence.sum(1)) / number, divergence / number


@torch.no_grad()
def log_weights(
    ensemble: Ensemble, images: Tensor, num_particles: int, rows: int, generator: torch.Generator
) -> Tensor:
    """Return logarithms of importance weights ``(num_particles, E, number of images)``.

    Args:
        ensemble: The models.
        images: Images ``(number of images, size)``.
        num_particles: The number of samples for each image.
        rows: About how many samples to treat at once.
        generator: The source of noise.
    """
    x, gates = _for_all(ensemble, images), ensemble.hard_gates()
    bottom_up = ensemble.bottom_up(x, False)
    parts, left = [], num_particles
    while left:
        number = min(left, max(1, rows // len(images)))
        left -= number
        noise = _noise(ensemble, number * len(images), generator)
        logits, differences, _ = ensemble.terms(
            bottom_up.repeat(1, 1, number, 1), noise, gates, False, sampled=True
        )
        likelihood = log_likelihood(logits.unflatten(1, (number, -1)), x[:, None])
        parts.append((likelihood - differences.sum(1).unflatten(1, (number, -1))).transpose(0, 1))
    return torch.cat(parts)


def spread(images: Tensor) -> Tensor:
    """Return images in a fixed random order: any first part stands for all of them."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2019))
    return images[order.to(images.device)]


def log_evidence(
    ensemble: Ensemble,
    images: Tensor,
    num_particles: int,
    rows: int,
    images_at_once: int,
    deadline: float = float("inf"),
    on_part: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Estimate the log-evidence of each image by importance samples, as far as the time goes.

    Args:
        ensemble: The models.
        images: Images ``(n, size)``.
        num_particles: The number of samples for each image.
        rows: About how many samples to treat at once.
        images_at_once: How many images to treat at once.
        deadline: When to have finished, by :func:`time.monotonic`. No part is begun that would, taking as long as the
            longest before, end later.
        on_part: What to call after each part with the number of images done.

    Returns:
        For each image done, by member ``(E, number of images)``: ``log_evidence``, ``ess``, ``khat``.
    """
    generator = fixed_source(images.device, 1)
    found: dict[str, list[Tensor]] = {"log_evidence": [], "ess": [], "khat": []}
    longest, done = 0.0, 0
    for part in images.split(images_at_once):
        begin = time.monotonic()
        if done and begin + longest > deadline:
            break
        weights = log_weights(ensemble, part, num_particles, rows, generator)
        estimates = {
            "log_evidence": weights.logsumexp(0) - math.log(num_particles),
            "ess": effective_sample_size(weights),
            "khat": psis_khat(weights),
        }
        for key, values in found.items():
            values.append(estimates[key].cpu())  # waits for the device
        done += len(part)
        longest = max(longest, time.monotonic() - begin)
        if on_part is not None:
            on_part(done)
    return {key: torch.cat(values, -1) for key, values in found.items()}
