r"""Distributions over discrete values, for guides: over flat vectors, and in the form of a site.

:class:`DiscreteVector` is what a factor returns, a distribution over the flat vector of zeros and ones of
:class:`~pyro_graphflows.guides.encodings.DiscreteEncoding`. :class:`DiscreteDistribution` gives it the shape, the
type and the support of a site's values. Neither has reparametrised draws: gradients of ELBOs are of the
score-function kind, unless the site is enumerated.
"""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyro_graphflows.guides.encodings import DiscreteEncoding

__all__ = ["DiscreteDistribution", "DiscreteVector"]


class DiscreteVector(dist.TorchDistribution):
    r"""Binary or class variables, each with logits that are linear in the earlier ones.

    Variable ``i`` has the logits ``logits[i] + sum_j<i couplings[i, j] @ y[j]``, where ``y[j]`` is 0 or 1 for binary
    variables and a vector of indicators for classes. Values are the ``y`` beside each other.

    Shape:
        - ``logits``: ``(*batch, n, C)`` with ``C = 1`` for binary variables, otherwise the number of classes.
        - ``couplings``: ``(*batch, n (n - 1) / 2, C, C)``, pairs ``(i, j)`` in the order of
          :func:`torch.tril_indices`; None where ``n = 1``.
        - values: ``(*batch, n * C)``.

    Args:
        logits: The logits.
        couplings: How earlier variables act on later ones.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(self, logits: Tensor, couplings: Tensor | None = None) -> None:
        self.logits, self.couplings = logits, couplings
        n, self.num_classes = logits.shape[-2:]
        self.has_enumerate_support = n == 1
        super().__init__(logits.shape[:-2], torch.Size([n * self.num_classes]), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Zeros and ones."""
        return constraints.independent(constraints.boolean, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiscreteVector":
        """Return the same distribution at a larger batch shape."""
        batch = torch.Size(batch_shape)
        logits = self.logits.expand(batch + self.logits.shape[-2:])
        couplings = self.couplings
        return DiscreteVector(
            logits, None if couplings is None else couplings.expand(batch + couplings.shape[-3:])
        )

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw values of shape ``sample_shape + batch_shape + event_shape``."""
        with torch.no_grad():
            return self._choose(self._draw_one, torch.Size(sample_shape))

    @property
    def mode(self) -> Tensor:
        """Each variable at its most probable value given those chosen before it (for one variable: the mode)."""
        return self._choose(self._best_one, torch.Size())

    def _choose(self, choose: Any, sample_shape: torch.Size) -> Tensor:
        logits = self.logits.expand(sample_shape + self.logits.shape)
        chosen: list[Tensor] = []
        start = 0
        for i in range(logits.shape[-2]):
            own = logits[..., i, :]
            if i and self.couplings is not None:
                earlier = torch.stack(chosen, -2)  # (*batch, i, C)
                coupling = self.couplings[..., start : start + i, :, :]
                own = own + (coupling @ earlier.unsqueeze(-1)).squeeze(-1).sum(-2)
                start += i
            chosen.append(choose(own))
        return torch.cat(chosen, -1)

    def _draw_one(self, logits: Tensor) -> Tensor:
        if self.num_classes == 1:
            return torch.bernoulli(logits.sigmoid())
        index = torch.distributions.Categorical(logits=logits, validate_args=False).sample()
        return F.one_hot(index, self.num_classes).to(logits.dtype)

    def _best_one(self, logits: Tensor) -> Tensor:
        if self.num_classes == 1:
            return (logits > 0).to(logits.dtype)
        return F.one_hot(logits.argmax(-1), self.num_classes).to(logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the logarithm of the probability of values, in nats."""
        n, c = self.logits.shape[-2:]
        y = value.reshape(*value.shape[:-1], n, c).to(self.logits.dtype)
        logits = self.logits
        if self.couplings is not None:
            rows, columns = torch.tril_indices(n, n, -1, device=logits.device)
            effects = (self.couplings @ y[..., columns, :].unsqueeze(-1)).squeeze(-1)  # (*batch, pairs, C)
            of_pair = F.one_hot(rows, n).to(logits.dtype)  # (pairs, n)
            logits = logits + of_pair.T @ effects
        if c == 1:
            return (y * logits - F.softplus(logits)).sum((-2, -1))
        return (y * logits.log_softmax(-1)).sum((-2, -1))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all values of a single variable, of shape ``(number of values, *batch, C)``."""
        if not self.has_enumerate_support:
            raise NotImplementedError("only a single binary or class variable can be enumerated")
        logits = self.logits
        if self.num_classes == 1:
            values = logits.new_tensor([[0.0], [1.0]])
        else:
            values = torch.eye(self.num_classes, dtype=logits.dtype, device=logits.device)
        values = values.reshape(len(values), *(1,) * len(self.batch_shape), -1)
        return values.expand(-1, *self.batch_shape, -1) if expand else values


class DiscreteDistribution(dist.TorchDistribution):
    """A factor over flat vectors as a distribution over the values of a discrete site.

    Like :class:`~pyro_graphflows.guides.distributions.FactorDistribution`, of which it is the discrete counterpart.

    Args:
        base: The distribution over the flat vectors.
        encoding: How values and flat vectors belong together.
        support: The support of the site.
        dtype: The type of the flat vectors.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        base: dist.TorchDistribution,
        encoding: DiscreteEncoding,
        support: constraints.Constraint,
        dtype: torch.dtype,
    ) -> None:
        self.base, self.encoding = base, encoding
        self.has_enumerate_support = base.has_enumerate_support
        self._support, self._dtype = support, dtype
        super().__init__(base.batch_shape, encoding.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the site, over its event dimensions."""
        missing = len(self.event_shape) - self._support.event_dim
        return constraints.independent(self._support, missing) if missing > 0 else self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiscreteDistribution":
        """Return the same factor at a larger batch shape."""
        batch_shape = torch.Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        return DiscreteDistribution(self.base.expand(batch_shape), self.encoding, self._support, self._dtype)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw values of shape ``sample_shape + batch_shape + event_shape``."""
        with torch.no_grad():
            return self.encoding.decode(self.base.sample(sample_shape))

    def centre(self) -> Tensor:
        """Return the most probable value."""
        return self.encoding.decode(self.base.mode)

    def unconstrained(self, value: Tensor) -> Tensor:
        """Return the flat vector of a value, shape ``(*batch, n)``."""
        return self.encoding.encode(value, self._dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the logarithm of the probability of values, shape ``batch_shape``."""
        return self.base.log_prob(self.unconstrained(value))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all values of the site, of shape ``(number of values, *batch, *event)``."""
        return self.encoding.decode(self.base.enumerate_support(expand=expand))
