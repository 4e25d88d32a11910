"""Files of named tensors and texts, read without running code: the safetensors format, with a checksum.

A file is eight bytes with the length of a header, the header in JSON, and the numbers of all tensors, little end first.
The header says for each tensor its type, its shape, and where its numbers begin and end; texts stand under
``"__metadata__"``. That is all of the format [1], so that it is written here in full: the files can be read by
the safetensors packages of several languages, and this package needs none of them. No pickle is read, as
``torch.load`` does even with ``weights_only=True``. A checksum of names, types, shapes, texts and numbers is among the
texts, so that a damaged file is found.

References:
    [1] The safetensors format, https://huggingface.co/docs/safetensors.
"""

import hashlib
import json
import math
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.whole_files import write_whole

__all__ = ["read_tensors", "write_tensors"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA, CHECKSUM = "__metadata__", "sha256"
ALIGNMENT = 8


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
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise GraphflowsError(
                f"Expected tensors of the types {', '.join(map(str, NAMES))}; {name!r} is of {tensor.dtype}."
            )
        part = _bytes_of(tensor)
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + len(part)],
        }
        parts.append(part)
        start += len(part)
    header[METADATA] = dict(texts or {})
    header[METADATA][CHECKSUM] = _checksum(header, parts)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)

    def write(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            file.write(part)

    write_whole(path, write)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of :func:`write_tensors`, or any in the format; return its tensors, on the CPU, and its texts.

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
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise GraphflowsError(
            f"Expected a file that can be read at {path}; got: {error.strerror}."
        ) from error
    header, start = _header(content, path)
    metadata = header.pop(METADATA, {})
    abouts = sorted(
        (_about(name, about, path) for name, about in header.items()), key=lambda each: each.begin
    )
    tensors: dict[str, Tensor] = {}
    parts = []
    end = 0
    for each in abouts:
        if each.begin != end:
            raise _damaged(path, f"{each.name!r} is not where it should be")
        end = each.end
        part = content[start + each.begin : start + end]
        if len(part) < end - each.begin:
            raise _damaged(
                path, f"it has {len(content) - start} bytes of numbers, and its header tells of more"
            )
        parts.append(part)
        buffer = torch.frombuffer(bytearray(part), dtype=torch.uint8) if part else torch.zeros(0).byte()
        tensors[each.name] = buffer.view(each.dtype).reshape(each.shape)
    if len(content) != start + end:
        raise _damaged(path, f"{len(content) - start - end} bytes follow the last tensor")
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum({**header, METADATA: metadata}, parts):
        raise _damaged(path, "its checksum does not fit its content")
    return tensors, metadata


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return b""
    if sys.byteorder != "little":
        raise GraphflowsError("Expected a machine that stores numbers with the little end first.")
    return flat.view(torch.uint8).numpy().tobytes()


def _checksum(header: Mapping[str, Any], parts: list[bytes]) -> str:
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _header(content: bytes, path: object) -> tuple[dict[str, Any], int]:
    """Return the header of a file, and where the numbers start."""
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else -1
    if not 2 <= length <= len(content) - 8:
        raise _damaged(path, f"it has {len(content)} bytes and no header of the format")
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError as error:
        raise _damaged(path, f"its header is no JSON ({error})") from error
    if not isinstance(header, dict) or not isinstance(header.get(METADATA, {}), dict):
        raise _damaged(path, "its header is no table")
    return header, 8 + length


@dataclass(frozen=True)
class _About:
    """What a header says of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _about(name: str, about: Any, path: object) -> _About:
    try:
        shape = tuple(int(size) for size in about["shape"])
        begin, end = (int(offset) for offset in about["data_offsets"])
        found = _About(name, DTYPES[about["dtype"]], shape, begin, end)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header of {name!r} cannot be read") from error
    if min(shape, default=0) < 0 or end - begin != math.prod(shape) * found.dtype.itemsize:
        raise _damaged(path, f"{name!r} is not as long as its shape says")
    return found


def _damaged(path: object, why: str) -> GraphflowsError:
    return GraphflowsError(
        f"Expected a whole file of the safetensors format at {path}; {why}. It is damaged or another."
    )
