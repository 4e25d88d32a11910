r"""Factors of discrete sites: logits from the network, one set for each variable of the site.

A site with a single binary or class variable can represent any table of probabilities that its network can; in a site
with several, the logits of each are linear in the earlier ones, with coefficients that depend on the parents.
Continuous outputs have coordinates with a shift and a scale; these have none.
"""

from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_graphflows.guides.discrete import DiscreteVector
from pyro_graphflows.guides.factors import Factor
from pyro_graphflows.guides.logistic import logistic_regression

if TYPE_CHECKING:
    from pyro_graphflows.guides.site import LatentSite

__all__ = ["DiscreteFactor"]


class DiscreteFactor(Factor):
    """Bernoulli and categorical conditionals, of one variable or of several in a row.

    Args:
        num_variables: The number of binary or class variables of the site.
        num_classes: The number of classes of each; 1 for binary variables.
    """

    def __init__(self, num_variables: int, num_classes: int) -> None:
        super().__init__(num_variables * num_classes)
        self.num_variables, self.num_classes = num_variables, num_classes

    @classmethod
    def for_site(cls, site: "LatentSite") -> "DiscreteFactor":
        """See :meth:`Factor.for_site`."""
        assert site.encoding is not None
        return cls(site.encoding.num_elements, site.encoding.num_classes)

    @property
    def _num_pairs(self) -> int:
        return self.num_variables * (self.num_variables - 1) // 2

    @property
    def num_outputs(self) -> int:
        """Logits, and for each pair of variables a matrix by which the earlier one moves the later one's."""
        return self.size + self._num_pairs * self.num_classes**2

    def distribution(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """See :meth:`Factor.distribution`; shift and scale are not used."""
        n, c = self.num_variables, self.num_classes
        logits = outputs[..., : self.size].unflatten(-1, (n, c))
        if n == 1:
            return DiscreteVector(logits)
        return DiscreteVector(logits, outputs[..., self.size :].unflatten(-1, (self._num_pairs, c, c)))

    def linear_start(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and biases for which the logits are ``loc + weights @ inputs``, without couplings."""
        extra = self.num_outputs - self.size
        return (
            torch.cat([weights, weights.new_zeros(extra, weights.shape[-1])]),
            torch.cat([loc, loc.new_zeros(extra)]),
        )

    def start_from_samples(self, inputs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logistic regression of each variable on the inputs and the earlier variables."""
        n, c = self.num_variables, self.num_classes
        y = values.unflatten(-1, (n, c))
        num_inputs = inputs.shape[-1]
        weights = inputs.new_zeros(self.num_outputs, num_inputs)
        biases = inputs.new_zeros(self.num_outputs)
        start = self.size
        for i in range(n):
            slopes, intercepts = logistic_regression(torch.cat([inputs, y[:, :i].flatten(-2)], -1), y[:, i])
            weights[i * c : (i + 1) * c] = slopes[:, :num_inputs]
            biases[i * c : (i + 1) * c] = intercepts
            couplings = slopes[:, num_inputs:].unflatten(-1, (i, c)).movedim(1, 0)  # (i, C, C)
            biases[start : start + couplings.numel()] = couplings.reshape(-1)
            start += couplings.numel()
        return weights, biases
