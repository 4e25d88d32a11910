"""Files of named tensors and texts, read without running code: the safetensors format, with a checksum.

No pickle is read, as ``torch.load`` does even with ``weights_only=True``. A checksum of names, types, shapes, texts
and numbers is among the texts, so that a damaged file is found.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.whole_files import write_whole

__all__ = ["read_tensors", "write_tensors"]

CHECKSUM = "sha256"


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None
) -> None:
    """Write tensors and texts to a file, which is whole or as it was before.

    Args:
        path: The file; its folder is made if need be.
        tensors: The tensors, of any device.
        texts: Texts by name.

    Raises:
        GraphflowsError: If a tensor is of a type that the format does not have.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    texts = dict(texts or {})
    try:
        content = save(plain, {**texts, CHECKSUM: _checksum(plain, texts)})
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        types = sorted({str(tensor.dtype) for tensor in plain.values()})
        raise GraphflowsError(
            f"Expected tensors of types that safetensors has; got {', '.join(types)} ({error})."
        ) from error
    write_whole(path, lambda file: file.write(content))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of :func:`write_tensors`; return its tensors, on the CPU, and its texts.

    Args:
        path: The file.

    Raises:
        GraphflowsError: If the file is not there, not of the format, or damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/two.safetensors"
        ...     write_tensors(path, {"a": torch.ones(2), "b": torch.tensor(3)}, {"about": "two tensors"})
        ...     tensors, texts = read_tensors(path)
        >>> tensors["a"].tolist(), tensors["b"].item(), texts["about"]
        ([1.0, 1.0], 3, 'two tensors')
    """
    if not Path(path).is_file():
        raise GraphflowsError(f"Expected a file that can be read at {path}; there is none.")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            texts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, UnicodeError, safetensors.SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    expected = texts.pop(CHECKSUM, None)
    if expected != _checksum(tensors, texts):
        raise _damaged(path, "its checksum does not fit its content")
    return tensors, texts


def _checksum(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    about = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    found = hashlib.sha256(json.dumps([about, dict(texts)], sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        flat = tensor.reshape(-1).clone(
            memory_format=torch.contiguous_format
        )  # a single entry may have any stride
        found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return found.hexdigest()


def _damaged(path: object, why: str) -> GraphflowsError:
    return GraphflowsError(
        f"Expected a whole file of the safetensors format at {path}; {why}. It is damaged or another."
    )
