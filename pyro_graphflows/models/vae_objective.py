"""The evidence lower bound of a VAE as a loss for :func:`pyro_graphflows.fit`."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError

if TYPE_CHECKING:
    from pyro_graphflows.models.latent_model import LatentModel

__all__ = ["VAEObjective"]


class VAEObjective:
    r"""Minus a lower bound of the evidence, summed over the data.

    With ``bound="elbo"`` and ``kl_weight=1`` this is the loss of ``Trace_ELBO`` with the model and the guide, up to the
    random numbers. ``bound="iwae"`` is the tighter bound of K importance-weighted particles.

    *Warm-up.* A training can end where latent nodes far from the data carry nothing: at its start they cost divergence
    before they are of use. With a weight of the divergence that rises from near zero to one, in a call of ``fit`` of
    its own with a constant rate, they are in use before they cost; see the example. It costs fit on few data where
    nodes are in use without it (both measured in ``examples/siren_vae.py --study remedies``).

    References:
        [1] Kingma and Welling (2014), Auto-Encoding Variational Bayes.
        [2] Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders.
        [3] Sønderby et al. (2016), Ladder Variational Autoencoders: warm-up of the KL term.

    Args:
        vae: The model.
        num_particles: The number of draws for each datum.
        bound: ``"elbo"`` or ``"iwae"``.
        kl_weight: What :math:`\log p(z) - \log q(z|x)` is multiplied by; may be set between epochs.

    Raises:
        GraphflowsError: If an argument is out of range.

    Example:
        >>> from pyro_graphflows import SIReNVAE, load_network
        >>> from pyro_graphflows.infer import Progress, Schedule
        >>> network = load_network("magic-niab")
        >>> vae = SIReNVAE(network.graph(), num_blocks=1)
        >>> x = torch.tensor(network.sample(50, 0, network.observed), dtype=torch.get_default_dtype())
        >>> objective = vae.objective(kl_weight=0.1)
        >>> def raise_weight(history):
        ...     objective.kl_weight = min(1.0, 0.1 * (len(history) + 1))
        >>> constant = Schedule(10, patience=None)
        >>> progress = Progress(bar=False, on_epoch=raise_weight)
        >>> history = vae.fit(x, loss=objective, schedule=constant, progress=progress)
        >>> history = vae.fit(x, loss=objective, schedule=20, progress=False)
    """

    def __init__(
        self, vae: "LatentModel", *, num_particles: int = 1, bound: str = "elbo", kl_weight: float = 1.0
    ) -> None:
        if bound not in ("elbo", "iwae"):
            raise GraphflowsError(f'Expected bound "elbo" or "iwae"; got {bound!r}.')
        if num_particles < 1 or kl_weight < 0:
            raise GraphflowsError(
                f"Expected num_particles >= 1 and kl_weight >= 0; got {num_particles} and {kl_weight}."
            )
        self.vae = vae
        self.num_particles = num_particles
        self.bound = bound
        self.kl_weight = kl_weight

    def differentiable_loss(self, model: Any, guide: Any, *args: Tensor, **kwargs: Any) -> Tensor:
        """Return the loss, summed over the data, with its graph. The programs are those of the VAE itself.

        Raises:
            GraphflowsError: If they are those of another module.
        """
        other = getattr(model, "__self__", self.vae)  # what watches a program hides the module
        if other is not self.vae:
            raise GraphflowsError(
                "Expected the model and guide of the VAE that this objective was made for; got those of another one, "
                "which would not be trained."
            )
        log_weights = self.vae.log_weights(
            *args, num_particles=self.num_particles, kl_weight=self.kl_weight, **kwargs
        )
        if self.bound == "iwae":
            return -(torch.logsumexp(log_weights, 0) - math.log(self.num_particles)).sum()
        return -log_weights.mean(0).sum()

    def loss(self, model: Any, guide: Any, *args: Tensor, **kwargs: Any) -> float:
        """Return the loss as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Tensor, **kwargs: Any) -> float:
        """Return the loss as a number, and add its gradient to the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(loss.detach())
