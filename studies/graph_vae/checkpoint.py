"""Checkpoints that are there whole or not at all, and say when they are damaged."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyro_graphflows import GraphflowsError
from pyro_graphflows.whole_files import write_whole

HEADER = b"graph_vae checkpoint 1\n"


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint with its checksum."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    write_whole(path, lambda file: file.write(HEADER + hashlib.sha256(content).digest() + content))


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        GraphflowsError: If it is damaged, or no checkpoint.
    """
    content = path.read_bytes()
    head = len(HEADER) + hashlib.sha256().digest_size
    if (
        not content.startswith(HEADER)
        or hashlib.sha256(content[head:]).digest() != content[len(HEADER) : head]
    ):
        raise GraphflowsError(
            f"Expected a whole checkpoint in {path}; it is damaged, or another kind of file ({len(content):,} bytes). "
            "Move it away to train from the start."
        )
    return torch.load(io.BytesIO(content[head:]), map_location=device, weights_only=True)


def require_same(path: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a checkpoint of something else.

    Raises:
        GraphflowsError: If a value differs.
    """
    other = [
        f"{key} {before.get(key)}, not {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if other:
        raise GraphflowsError(
            f"Expected a checkpoint of the same {what} in {path}; it has {'; '.join(other)}. Move it away to train "
            "from the start, or name another folder with --out."
        )
