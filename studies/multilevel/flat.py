"""A flat network for the two-level normal: it reads all data side by side, with zeros where there are none."""

import pyro
import pyro.distributions as dist
from torch import Tensor, nn


class FlatGuide(nn.Module):
    """Normal conditionals of mu and of each effect given mu, from one network of padded data.

    Args:
        data: The most data of a group.
        groups: The most groups.
        weights: About how many weights the network has.
    """

    def __init__(self, data: int, groups: int, weights: int) -> None:
        super().__init__()
        self.data, self.groups = data, groups
        inputs, outputs = 2 * data * groups, 2 + 3 * groups
        width = max(4, round(weights / (inputs + outputs)))
        self.network = nn.Sequential(
            nn.Linear(inputs, width), nn.ELU(), nn.Linear(width, width), nn.ELU(), nn.Linear(width, outputs)
        )

    def _outputs(self, x: Tensor) -> Tensor:
        n, groups = x.shape[-2:]
        padded = x.new_zeros(*x.shape[:-2], 2, self.data, self.groups)
        padded[..., 0, :n, :groups] = x
        padded[..., 1, :n, :groups] = 1.0
        outputs: Tensor = self.network(padded.flatten(-3))
        return outputs

    def parts(self, x: Tensor) -> tuple[dist.Normal, Tensor]:
        """Return the conditional of mu, and slope, intercept and log-scale of each effect, ``(3, *batch, groups)``."""
        outputs = self._outputs(x)
        of_effects = outputs[..., 2:].unflatten(-1, (3, self.groups))[..., : x.shape[-1]]
        return dist.Normal(outputs[..., 0], outputs[..., 1].exp()), of_effects.movedim(-2, 0)

    def log_prob(self, x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
        """Return the log-density of mu ``(*batch,)`` and the effects ``(*batch, groups)``."""
        of_mu, (slope, intercept, log_scale) = self.parts(x)
        of_theta = dist.Normal(intercept + slope * mu.unsqueeze(-1), log_scale.exp())
        return of_mu.log_prob(mu) + of_theta.log_prob(theta).sum(-1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Run the guide in Pyro, for one data set."""
        of_mu, (slope, intercept, log_scale) = self.parts(x)
        mu = pyro.sample("mu", of_mu)
        with pyro.plate("groups", x.shape[-1], dim=-1):
            theta = pyro.sample("theta", dist.Normal(intercept + slope * mu, log_scale.exp()))
        return {"mu": mu, "theta": theta}
