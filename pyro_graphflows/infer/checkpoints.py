"""When checkpoints are written, files that are whole or absent, and random states that can be put back.

A checkpoint is a dictionary of tensors, numbers, strings and containers of them, so that it is read with
``torch.load(weights_only=True)``: loading one runs no code.
"""

import os
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.whole_files import write_whole

__all__ = [
    "FIT_CHECKPOINT",
    "Checkpoint",
    "load_checkpoint",
    "random_state",
    "save_checkpoint",
    "seeded",
    "set_random_state",
]

FIT_CHECKPOINT = ("fit(checkpoint=)", "settings", "trainer", "pace", "history")


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often :func:`~pyro_graphflows.infer.fit` writes the state of a training run.

    ``fit(..., checkpoint=path)`` is short for ``Checkpoint(path)``.

    Args:
        path: The file; its folder is made if need be.
        every: Write it after this many epochs, and at the end.
        resume: Whether to continue from the file if it exists; else it is overwritten.

    Raises:
        GraphflowsError: If ``path`` is no path or is a folder, or ``every`` is not positive.

    Example:
        >>> Checkpoint("run.pt", every=10).every
        10
    """

    path: str | os.PathLike[str]
    every: int = field(default=1, kw_only=True)
    resume: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike) or not str(self.path) or Path(self.path).is_dir():
            raise GraphflowsError(f"Expected the path of a checkpoint file; got {self.path!r}.")
        if not isinstance(self.every, int) or self.every < 1:
            raise GraphflowsError(f"Expected a checkpoint every 1 or more epochs; got every={self.every!r}.")


def save_checkpoint(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint so that ``path`` holds either the old one or the new one, never half of one.

    Args:
        state: What to store.
        path: The file; its folder is made if need be.
    """
    write_whole(path, lambda file: torch.save(state, file))


def load_checkpoint(
    path: str | os.PathLike[str], kind: str = "save_checkpoint", *keys: str
) -> dict[str, Any]:
    """Read a checkpoint; tensors come back on the devices they were on. No code is run in doing so.

    Args:
        path: The file.
        kind: What it is a file of, for the error.
        *keys: What must be in it.

    Raises:
        GraphflowsError: If the file is damaged or another.
        FileNotFoundError: If it is not there.
    """
    try:
        with open(path, "rb") as file:  # of a path, PyTorch takes the name for what is in the file
            state = torch.load(file, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise GraphflowsError(
            f"Expected a file of {kind} at {str(path)!r}; it is damaged or another and cannot be read "
            f"({type(error).__name__}). Give another path; it is left as it is."
        ) from error
    if not isinstance(state, dict) or any(key not in state for key in keys):
        raise GraphflowsError(
            f"Expected a file of {kind} at {str(path)!r}; it is another. Give another path."
        )
    return state


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global random generators."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the state Pyro seeds
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.as_tensor(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the global random generators into a state of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed the global random generators meanwhile and put them back afterwards; do nothing for ``None``."""
    if seed is None:
        yield
        return
    if not isinstance(seed, Integral):
        raise GraphflowsError(f"Expected seed to be an integer or None; got {seed!r}.")
    before = random_state()
    try:
        pyro.set_rng_seed(seed)
        yield
    finally:
        set_random_state(before)
