"""From whole numbers of grey levels to what models take: zeros and ones, or values in [0, 1]."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["BinarizedBatches", "binarize", "dequantize"]


def binarize(images: Tensor, num_levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw each pixel as a Bernoulli variable whose probability is its grey value; binary images stay as they are.

    Args:
        images: Whole numbers from 0 to ``num_levels - 1``.
        num_levels: The number of levels.
        generator: A source of random numbers; by default the global one.
    """
    if num_levels == 2:
        return images.to(torch.get_default_dtype())
    gray = images.to(torch.get_default_dtype()) / (num_levels - 1)
    return torch.bernoulli(gray, generator=generator)


def dequantize(images: Tensor, num_levels: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Add uniform noise to whole numbers and scale them to [0, 1]: :math:`(k + u) / L`.

    A density of the result, in bits per dimension plus :math:`\log_2 L`, bounds that of the whole numbers.

    Args:
        images: Whole numbers from 0 to ``num_levels - 1``.
        num_levels: The number of levels :math:`L`.
        generator: A source of random numbers; by default the global one.
    """
    values = images.to(torch.get_default_dtype())
    noise = torch.rand(values.shape, generator=generator, device=values.device, dtype=values.dtype)
    return (values + noise) / num_levels


class BinarizedBatches:
    """Batches of images for :func:`~pyro_graphflows.fit`, binarised or dequantised afresh each time (global generator).

    Args:
        images: Whole numbers ``(n, *shape)``.
        num_levels: The number of levels.
        batch_size: The size of a batch; the last one of an epoch is what is left.
        draw: :func:`binarize` or :func:`dequantize`.
    """

    def __init__(
        self,
        images: Tensor,
        num_levels: int,
        batch_size: int,
        draw: Callable[[Tensor, int], Tensor] = binarize,
    ) -> None:
        self.dataset: Sequence[Tensor] | Tensor = images
        self.images = images
        self.num_levels = num_levels
        self.batch_size = batch_size
        self.draw = draw

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(len(self.images)).to(self.images.device)
        for index in order.split(self.batch_size):
            yield [self.draw(self.images[index], self.num_levels)]
