"""Grey pictures as PNG files, with nothing but the standard library and torch."""

import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def png(picture: Tensor) -> bytes:
    """Return a PNG file of a matrix of grey values from 0 (black) to 1 (white)."""
    height, width = picture.shape
    pixels = (picture.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    rows = torch.cat(
        [torch.zeros(height, 1, dtype=torch.uint8), pixels], 1
    )  # each row begins with its filter, none
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.numpy().tobytes(), 9)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def grid(rows: Sequence[Tensor], scale: int = 2, gap: int = 2) -> Tensor:
    """Return images in rows with white lines between them, ink black.

    Args:
        rows: One tensor ``(number, height, width)`` for each row, all of one shape, 1 is ink.
        scale: How many pixels each side of a pixel becomes.
        gap: The width of the lines.
    """
    images = 1 - torch.stack([row.detach().cpu().float() for row in rows])  # (rows, columns, height, width)
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    images = torch.nn.functional.pad(images, (0, gap, 0, gap), value=1.0)
    return images.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
