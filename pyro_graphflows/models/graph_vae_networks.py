r"""The networks of the Graph VAE: shared encoder, bottom-up and top-down predictions, decoder.

All are multilayer perceptrons over rows, shaped (rows, features). A *prediction* of a node is the pair of a mean and a
log-variance, given by two linear heads that are kept as one matrix. The bottom-up predictions of all nodes see the same
embedding of the data, so they are computed together: one wide first layer, and heads that are stacked along the nodes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "BottomUp",
    "TopDown",
    "decoder_network",
    "encoder_network",
    "fresh_batch_statistics",
    "fuse",
    "matching_width",
    "normal",
    "on_rows",
    "perceptron_size",
    "widened",
]

ENCODER_DIMS = (512, 512, 256)
DECODER_DIMS = (256, 512, 512)
MOST_LOG_VAR = 20.0  # standard deviations of nodes from 5e-5 to 2e4


def encoder_network(num_inputs: int, hidden_dims: Sequence[int], num_outputs: int) -> nn.Sequential:
    """Return a perceptron with batch norm and ELU after each hidden layer but the last, which has ELU only."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = num_inputs
    for i, dim in enumerate(hidden_dims):
        layers.append(nn.Linear(width, dim))
        if i < len(hidden_dims) - 1:
            layers.append(nn.BatchNorm1d(dim))
        layers.append(nn.ELU())
        width = dim
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))


def decoder_network(num_inputs: int, hidden_dims: Sequence[int], num_outputs: int) -> nn.Sequential:
    """Return a perceptron with batch norm and ELU after each hidden layer."""
    layers: list[nn.Module] = []
    width = num_inputs
    for dim in hidden_dims:
        layers += [nn.Linear(width, dim), nn.BatchNorm1d(dim), nn.ELU()]
        width = dim
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))


def perceptron_size(dims: Sequence[int], num_normalised: int) -> int:
    """Return the number of parameters of a perceptron whose first hidden layers have batch norm.

    Args:
        dims: Widths from the input to the output.
        num_normalised: The number of hidden layers with batch norm.
    """
    linear = sum((a + 1) * b for a, b in pairwise(dims))
    return linear + 2 * sum(dims[1 : 1 + num_normalised])


def matching_width(num_inputs: int, last_dim: int, num_outputs: int, size: int) -> int:
    """Return the width of the two wide layers of an encoder that brings it nearest to a number of parameters.

    Args:
        num_inputs: The size of a datum.
        last_dim: The width of the third hidden layer.
        num_outputs: The size of the embedding.
        size: The number of parameters wanted.
    """

    def excess(width: int) -> int:
        return perceptron_size([num_inputs, width, width, last_dim, num_outputs], 2) - size

    low, high = 1, 2
    while excess(high) < 0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return low if -excess(low) <= excess(high) else high


def widened(
    dims: Sequence[int],
    num_inputs: int,
    embedding_dim: int,
    num_nodes: int,
    node_dim: int,
    hidden_dim: int | None,
) -> tuple[int, ...]:
    """Return hidden widths of an encoder that make up for the top-down networks of a fully connected structure.

    Args:
        dims: Three hidden widths, of which the first two are replaced by one that is greater.
        num_inputs: The size of a datum.
        embedding_dim: The size of the embedding.
        num_nodes: The number of nodes.
        node_dim: The size of a node.
        hidden_dim: The width of the hidden layer of the top-down networks.
    """
    inner = [] if hidden_dim is None else [hidden_dim]
    top_down = sum(
        perceptron_size([k * node_dim, *inner, 2 * node_dim], len(inner)) for k in range(1, num_nodes)
    )
    size = perceptron_size([num_inputs, *dims, embedding_dim], 2) + 2 * top_down  # prior and posterior
    width = matching_width(num_inputs, dims[2], embedding_dim, size)
    return (width, width, dims[2])


class TopDown(nn.Module):
    """Predict a node from its parents: mean and log-variance.

    Args:
        num_inputs: The size of all parents together.
        node_dim: The size of the node.
        hidden_dim: The width of the hidden layer (with batch norm and ELU); ``None`` for linear maps.
    """

    def __init__(self, num_inputs: int, node_dim: int, hidden_dim: int | None) -> None:
        super().__init__()
        self.hidden = nn.Sequential()
        if hidden_dim is not None:
            self.hidden = nn.Sequential(
                nn.Linear(num_inputs, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ELU()
            )
            num_inputs = hidden_dim
        self.heads = nn.Linear(num_inputs, 2 * node_dim)

    def forward(self, parents: Tensor) -> Tensor:
        """Return mean and log-variance side by side, ``(rows, 2 * node_dim)``."""
        return self.heads(self.hidden(parents))


class BottomUp(nn.Module):
    """Predict every node from an embedding of the data; the nodes share nothing but that embedding.

    Args:
        embedding_dim: The size of the embedding.
        num_nodes: The number of nodes.
        node_dim: The size of a node.
        hidden_dim: The width of each node's hidden layer (with batch norm and ELU); ``None`` for linear maps.
    """

    def __init__(self, embedding_dim: int, num_nodes: int, node_dim: int, hidden_dim: int | None) -> None:
        super().__init__()
        self.num_nodes = num_nodes
        self.has_hidden = hidden_dim is not None
        self.hidden = nn.Sequential()
        width = embedding_dim
        if hidden_dim is not None:
            self.hidden = nn.Sequential(
                nn.Linear(embedding_dim, num_nodes * hidden_dim),
                nn.BatchNorm1d(num_nodes * hidden_dim),
                nn.ELU(),
            )
            width = hidden_dim
        bound = 1 / math.sqrt(width)  # as torch.nn.Linear starts
        self.weight = nn.Parameter(torch.empty(num_nodes, width, 2 * node_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_nodes, 1, 2 * node_dim).uniform_(-bound, bound))

    def forward(self, embedding: Tensor) -> Tensor:
        """Return mean and log-variance of each node, ``(num_nodes, rows, 2 * node_dim)``."""
        hidden = self.hidden(embedding)
        if self.has_hidden:
            stacked = hidden.reshape(len(hidden), self.num_nodes, -1).transpose(0, 1)  # (N, rows, hidden)
        else:
            stacked = hidden.expand(self.num_nodes, *hidden.shape)
        return torch.baddbmm(self.bias, stacked, self.weight)


def normal(loc: Tensor, log_var: Tensor) -> dist.Normal:
    """Return the normal distribution of a node.

    The log-variance is used up to ``MOST_LOG_VAR`` in size. The networks have no bounds, and far from the values they
    were trained on a scale would round to zero or infinity and the density be no number: a guide that puts one sample
    in a thousand there could not be trained.
    """
    return dist.Normal(loc, (0.5 * log_var.clamp(-MOST_LOG_VAR, MOST_LOG_VAR)).exp())


def fuse(loc1: Tensor, log_var1: Tensor, loc2: Tensor, log_var2: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance of two normal predictions weighted by their precisions.

    The weight of the first, :math:`s_2^2 / (s_1^2 + s_2^2)`, is a sigmoid of the difference of log-variances, and the
    fused variance is :math:`s_1^2` times it: nothing overflows.
    """
    difference = log_var2 - log_var1
    weight = difference.sigmoid()
    return loc2 + weight * (loc1 - loc2), log_var1 + nn.functional.logsigmoid(difference)


def on_rows(network: nn.Module, inputs: Tensor, event_dim: int = 1) -> Tensor:
    """Apply a network that takes ``(rows, *event)`` to inputs with any number of dimensions on the left.

    Args:
        network: The network.
        inputs: Its inputs ``(*batch, *event)``.
        event_dim: The number of dimensions of ``event``.

    Returns:
        Its outputs ``(*batch, *output)``.
    """
    batch = inputs.shape[: inputs.dim() - event_dim]
    outputs = network(inputs.reshape(-1, *inputs.shape[inputs.dim() - event_dim :]))
    return outputs.reshape(*batch, *outputs.shape[1:])


@contextmanager
def fresh_batch_statistics(module: nn.Module) -> Iterator[None]:
    """Replace the batch statistics of a module in evaluation mode by plain averages over the batches inside.

    Args:
        module: The module; only its batch norms are in training mode inside.
    """
    norms = [
        part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None
    ]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the plain average
    try:
        yield
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.train(training)
            norm.momentum = momentum
