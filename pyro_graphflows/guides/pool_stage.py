"""One step of pooling: the average over one plate, or group by group, with moments and learned features."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_graphflows.guides.features import FeatureMap
from pyro_graphflows.nn.activations import make_activation

__all__ = ["DeepSet", "PoolStage", "Segments"]

MOST_CROSSED = 8  # entries of a tuple up to which all products are taken, and not only squares
VARIANCE_FLOOR = 1e-4  # in standardised units; a group of one element has variance zero


@dataclass(frozen=True)
class DeepSet:
    """The shape of the learned part of a pooled summary.

    Attributes:
        embedding_dim: The number of learned features that are averaged; 0 leaves moments and group size alone.
        hidden_dims: The widths of the hidden layers between a tuple and its learned features.
        activation: The activation function.
    """

    embedding_dim: int = 16
    hidden_dims: Sequence[int] = (32,)
    activation: str = "elu"


@dataclass(frozen=True)
class Segments:
    """Groups of the elements of a plate, by an index.

    Attributes:
        index: For each element of the plate the number of its group.
        dim: The dimension of the plate of the groups.
        size: The number of groups.
    """

    index: Tensor
    dim: int
    size: int

    def add(self, value: Tensor, dim: int, size: int) -> Tensor:
        """Sum over the elements of each group.

        Args:
            value: Shape ``(*batch, features)``.
            dim: The dimension of the plate of the elements, of the batch shape.
            size: The number of elements.

        Returns:
            The same with the groups in their own dimension, and size one in that of the elements if it is another.
        """
        depth = 1 - min(dim, self.dim)
        value = value.reshape((1,) * (depth - value.dim()) + value.shape)
        shape = list(value.shape)
        shape[dim - 1] = size
        value = value.expand(shape)
        shape[dim - 1] = self.size
        total = value.new_zeros(shape).index_add(dim - 1, self.index, value)
        return total if dim == self.dim else total.transpose(dim - 1, self.dim - 1)


class PoolStage(nn.Module):
    """Average over one plate.

    *Core* features get squares and products, *carried* ones are averaged as they are.
    """

    pairs: Tensor

    def __init__(self, core: int, carried: int, options: DeepSet) -> None:
        super().__init__()
        if core <= MOST_CROSSED:
            pairs = torch.triu_indices(core, core)
        else:
            pairs = torch.arange(core).expand(2, core).clone()
        self.register_buffer("pairs", pairs, persistent=False)
        self.embedding: nn.Module | None = None
        if options.embedding_dim:
            widths = [core + carried, *options.hidden_dims]
            layers: list[nn.Module] = []
            for before, after in itertools.pairwise(widths):
                layers += [nn.Linear(before, after), make_activation(options.activation)]
            self.embedding = nn.Sequential(*layers, nn.Linear(widths[-1], options.embedding_dim))
        self.core_size = core
        self.carried_size = pairs.shape[1] + core + carried + options.embedding_dim + 1
        # standardisation of what comes out, found at set-up
        self.core_map = FeatureMap(None, torch.zeros(0, self.core_size), standardize=False)
        self.carried_map = FeatureMap(None, torch.zeros(0, self.carried_size), standardize=False)

    def forward(
        self,
        core: Tensor,
        carried: Tensor,
        weight: Tensor | None,
        dim: int,
        size: int,
        segments: Segments | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the core and carried features of the groups, and which groups are not empty.

        Args:
            core: Shape ``(*batch, core)``.
            carried: Shape ``(*batch, carried)``.
            weight: One where an element is there, zero where not, shape ``(*batch, 1)``; None if all are.
            dim: The dimension of the plate, counted from the right without the feature dimension.
            size: The size of the plate.
            segments: The groups, if the elements are averaged group by group; all of them are one group otherwise.
        """
        square = core[..., self.pairs[0]] * core[..., self.pairs[1]]
        parts = [core, square, carried]
        if self.embedding is not None:
            parts.append(self.embedding(torch.cat([core, carried], -1)))
        each = torch.cat(parts, -1)
        if segments is not None or weight is not None:
            weight = each.new_ones(1) if weight is None else weight
            weight = weight.expand(torch.broadcast_shapes(weight.shape, (*each.shape[:-1], 1)))
        if weight is None:
            mean = each.mean(dim - 1, keepdim=True)
            number = each.new_full((1,) * mean.dim(), float(size))
            there = None
        else:
            total, number = (
                part.sum(dim - 1, keepdim=True) if segments is None else segments.add(part, dim, size)
                for part in (weight * each, weight)
            )
            mean = total / number.clamp(min=1.0)
            there = (number > 0).to(each.dtype)
        sizes = [self.core_size, square.shape[-1], mean.shape[-1] - self.core_size - square.shape[-1]]
        first, second, rest = mean.split(sizes, -1)
        own = second[..., self.pairs[0] == self.pairs[1]]
        log_variance = ((own - first.square()).clamp(min=0.0) + VARIANCE_FLOOR).log()
        log_number = number.clamp(min=0.5).log().expand(*mean.shape[:-1], 1)
        return first, torch.cat([second, log_variance, rest, log_number], -1), there

    def fit_(self, core: Tensor, carried: Tensor) -> None:
        """Find the standardisation of what comes out, from samples of it."""
        self.core_map = FeatureMap(None, core.reshape(-1, core.shape[-1]))
        self.carried_map = FeatureMap(None, carried.reshape(-1, carried.shape[-1]))
