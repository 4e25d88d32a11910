"""Random states: kept as they were, or seeded for a while; those of PyTorch, NumPy and Python alike."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["kept_random_state", "seed_random_state"]

# Seeds that users choose are small: with this added, a run of ours repeats none of theirs.
_FAR = 1_594_323_007


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave the caller's random states as they were, whatever is drawn inside.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with kept_random_state():
        ...     inside = torch.rand(1), random.random(), np.random.rand()
        >>> bool(torch.rand(1) == inside[0])
        True
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - models draw from the global one
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def seed_random_state(seed: int) -> None:
    """Seed all random states, far from the seeds that users choose; inside of :func:`kept_random_state` only.

    Args:
        seed: The seed, 0 or more.
    """
    torch.manual_seed(_FAR + seed)
    random.seed(_FAR + seed)
    np.random.seed((_FAR + seed) % 2**32)  # noqa: NPY002
