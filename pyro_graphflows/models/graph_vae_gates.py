r"""The gates of the Graph VAE: which possible parents a node sees, as something that gradients can move.

A gate :math:`c_{ij} \in \{0, 1\}` multiplies the value of the possible parent :math:`j` on its way to node :math:`i`.
In training it is *relaxed*: a sample of a relaxed Bernoulli (Gumbel-softmax) variable in (0, 1), whose temperature
falls from 1 to a floor, so that the logits have gradients through the sample. In evaluation mode, and for good once it
is frozen, it is *hard*: open where its probability is above one half; a closed one leaves no trace of its parent.

Nodes are numbered from the data upwards: 0 is ``z1``, and the possible parents of a node have greater numbers.

References:
    [1] Maddison, Mnih and Teh (2017), The Concrete Distribution, ICLR; Jang, Gu and Poole (2017), Categorical
    Reparameterization with Gumbel-Softmax, ICLR.
"""

from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

__all__ = ["GATES", "GateValues", "Gates", "side_by_side"]

#: The name of the site of relaxed gates.
GATES = "gates"

#: Relaxed gates ``(number of gates,)`` or ``(*particles, 1, number of gates)``, hard ones as truth values, or none.
GateValues = Tensor | list[bool] | None


class Gates(nn.Module):
    """One gate for each possible edge, open with probability one half at the start.

    Args:
        parents: The possible parents of each node by number.

    Attributes:
        index: The place of the gate of each ``(child, parent)``.
        logits: Log-odds of being open.
        temperature: The temperature of the relaxed gates.
        is_frozen: Whether gates are hard in training mode too.
        is_open: The hard gates, once frozen.
    """

    temperature: Tensor
    is_frozen: Tensor
    is_open: Tensor

    def __init__(self, parents: Mapping[int, Sequence[int]]) -> None:
        super().__init__()
        self.index = {edge: k for k, edge in enumerate((i, j) for i in parents for j in parents[i])}
        self.logits = nn.Parameter(torch.zeros(len(self.index)))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("is_frozen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("is_open", torch.zeros(len(self.index), dtype=torch.bool))

    @property
    def is_relaxed(self) -> bool:
        """Whether the gates are sampled: in training mode, until they are frozen."""
        return self.training and not self.is_frozen

    def draw(self) -> Tensor:
        """Sample relaxed gates at the site ``gates``: one global site that adds nothing to any bound."""
        with poutine.mask(mask=False):
            law = dist.RelaxedBernoulli(self.temperature, logits=self.logits)
            return pyro.sample(GATES, law.to_event(1))  # (number of gates,)

    def hard(self) -> list[bool]:
        """Return for each gate whether it is open."""
        return (self.is_open if self.is_frozen else self.logits.detach() > 0).tolist()

    def probabilities(self) -> Tensor:
        """Return for each gate the probability of being open; 0 or 1 once frozen."""
        logits = self.logits.detach()
        return self.is_open.to(logits) if self.is_frozen else logits.sigmoid()

    def freeze(self, threshold: float) -> None:
        """Make the gates hard for good: those whose probability is above a threshold stay open."""
        if not self.is_frozen:
            self.is_open.copy_(self.probabilities() > threshold)
            self.is_frozen.fill_(True)

    def of(self, child: int, parents: Sequence[int], gates: Tensor | list[bool]) -> list[Tensor] | list[bool]:
        """Return the gates between a node and its possible parents, relaxed ones as ``(..., 1)``."""
        places = [self.index[child, j] for j in parents]
        if isinstance(gates, list):
            return [gates[k] for k in places]
        return [gates[..., k : k + 1] for k in places]


def side_by_side(values: Sequence[Tensor], gates: Sequence[Tensor] | Sequence[bool] | None) -> Tensor:
    """Return the values of possible parents in one tensor, each behind its gate.

    Args:
        values: One tensor ``(*batch, node_dim)`` for each parent.
        gates: One gate for each; a hard one that is closed gives zeros. ``None`` where all are parents for good.

    Returns:
        A tensor ``(*batch, number of parents * node_dim)``.
    """
    if gates is None:
        return torch.cat(list(values), -1)
    parts = [
        gate * value if isinstance(gate, Tensor) else value if gate else torch.zeros_like(value)
        for gate, value in zip(gates, values, strict=True)
    ]
    return torch.cat(parts, -1)
