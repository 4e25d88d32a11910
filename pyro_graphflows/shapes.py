"""Shapes of tensors, without PyTorch's symbolic shapes, whose import takes a second."""

from collections.abc import Sequence

import torch

__all__ = ["broadcast_shapes"]


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """Return the shape to which tensors of some shapes broadcast, as :func:`torch.broadcast_shapes` does.

    The first call of PyTorch's own function in a process imports its reference implementations and SymPy.

    Args:
        *shapes: The shapes.

    Raises:
        RuntimeError: If they do not broadcast.

    Example:
        >>> broadcast_shapes((3, 1), (4,), ())
        torch.Size([3, 4])
    """
    sizes = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for dim in range(-1, -len(shape) - 1, -1):
            size = shape[dim]
            if size != 1 and sizes[dim] not in (1, size):
                raise RuntimeError(
                    f"Shapes do not broadcast: {', '.join(str(tuple(each)) for each in shapes)}."
                )
            sizes[dim] = size if size != 1 else sizes[dim]
    return torch.Size(sizes)
