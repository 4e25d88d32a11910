r"""What the variational autoencoders of this package share.

A VAE is a prior :math:`p(z)`, a decoder :math:`p(x|z)` and an encoder :math:`q(z|x)` trained together by the evidence
lower bound. :class:`LatentModel` has everything that does not depend on how these three are made: the bound, the
evidence and the training here, Pyro's model and guide, reconstructions and samples in ``latent_programs.py``.
Subclasses write the three in terms of the data's features. Training uses the bound directly,
:meth:`LatentModel.objective`, which computes what ``Trace_ELBO`` with ``model`` and ``guide`` would, without a trace.
"""

from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.batches import TrainingData
from pyro_graphflows.infer.evidence import Evidence, evidence_from_log_weights
from pyro_graphflows.infer.particles import evaluation_mode
from pyro_graphflows.infer.training import History, fit
from pyro_graphflows.models.latent_programs import LatentPrograms
from pyro_graphflows.models.vae_objective import VAEObjective

__all__ = ["LatentModel"]

_PARTICLES_TIMES_DATA = 2**13


class LatentModel(LatentPrograms):
    r"""A model of data with latent variables, beside an amortised posterior. Base class.

    ``x`` always holds the columns of all observed nodes in graph order (``graph.observed``, which need not be the order
    in which they were given; :meth:`join` puts values by name in place), ``inputs`` those of all inputs (covariates),
    if there are any.

    Args:
        graph: The model graph. Its plates, if any, must be the same for all nodes.
        likelihood: The likelihood of all observed nodes, or of each.
        latent_name: The name of the one latent site of ``model`` and ``guide``, a vector with all latent nodes.

    Raises:
        GraphflowsError: If there is nothing latent or nothing observed, or a likelihood is not known.
        UnsupportedModelError: If nodes are marginalised or in different plates.
    """

    def log_weights(
        self, x: Tensor, inputs: Tensor | None = None, *, num_particles: int = 1, kl_weight: float = 1.0
    ) -> Tensor:
        r"""Return :math:`\log p(x_n, z_{kn}) - \log q(z_{kn} | x_n)` for draws from the encoder, differentiable.

        Args:
            x: Data (n, columns).
            inputs: The inputs.
            num_particles: The number of draws K for each datum.
            kl_weight: What the terms of the latent vector, log p(z) − log q(z | x), are multiplied by.

        Returns:
            Shape (K, n).
        """
        if num_particles < 1:
            raise GraphflowsError(f"Expected num_particles >= 1; got {num_particles}.")
        data = self.known(x, inputs)
        features = self.observation.to_features(data)
        eps = torch.randn(num_particles, len(data), self.latent_dim, dtype=data.dtype, device=data.device)
        z, log_q = self.encode(features, eps)
        latent = self.log_prior(z, features) - log_q
        if kl_weight != 1.0:
            latent = kl_weight * latent
        return self.observation.log_prob(self.decode(z, features), data) + latent

    def elbo(self, x: Tensor, inputs: Tensor | None = None, *, num_particles: int = 1) -> Tensor:
        """Return an unbiased estimate of the evidence lower bound of each datum, of shape (n,), differentiable."""
        return self.log_weights(x, inputs, num_particles=num_particles).mean(0)

    @torch.no_grad()
    def log_evidence(
        self,
        x: Tensor,
        inputs: Tensor | None = None,
        *,
        num_particles: int = 500,
        chunk_size: int | None = None,
    ) -> Evidence:
        """Estimate the log-evidence of each datum by importance sampling from the encoder.

        Args:
            x: Data (n, columns).
            inputs: The inputs.
            num_particles: The number of importance samples of each datum.
            chunk_size: How many particles to draw at a time, which bounds the memory.

        Returns:
            The estimates with effective sample sizes, Pareto shapes and standard errors.

        Raises:
            GraphflowsError: If a number is not positive.
        """
        if num_particles < 1 or (chunk_size is not None and chunk_size < 1):
            raise GraphflowsError(
                f"Expected positive num_particles and chunk_size; got {num_particles} and {chunk_size}."
            )
        step = chunk_size or max(1, _PARTICLES_TIMES_DATA // max(1, len(x)))
        sizes = [min(step, num_particles - start) for start in range(0, num_particles, step)]
        with evaluation_mode(self):
            log_weights = torch.cat([self.log_weights(x, inputs, num_particles=size) for size in sizes])
        return evidence_from_log_weights(log_weights)

    def objective(self, **options: Any) -> VAEObjective:
        """Return the loss for :func:`pyro_graphflows.fit`; see :class:`VAEObjective`."""
        return VAEObjective(self, **options)

    def standardize_(self, x: Tensor, inputs: Tensor | None = None) -> None:
        """Work in standard units of the data's normal columns; to be called before training.

        Args:
            x: Data (n, columns).
            inputs: The inputs.
        """
        self.observation.standardize_(self.known(x, inputs))

    def fit(
        self,
        x: Tensor | TrainingData,
        inputs: Tensor | None = None,
        *,
        standardize: bool | None = None,
        loss: Any = None,
        **options: Any,
    ) -> History:
        """Standardise and train by the evidence lower bound.

        Args:
            x: Data (n, columns), or a :class:`~pyro_graphflows.infer.TrainingData` of them (and the inputs).
            inputs: The inputs.
            standardize: Whether to call :meth:`standardize_` first; by default where the model has no units yet. In
                other units parameters that were trained, or set to a known network, mean something else.
            loss: Another loss than ``self.objective()``.
            options: Further arguments of :func:`pyro_graphflows.fit`, as ``schedule`` or ``optimizer``.

        Returns:
            The history.

        Raises:
            GraphflowsError: If the data are not those of the model, as :meth:`known` says, or of :func:`fit`.
        """
        rows: Any = x
        covariates = inputs
        if isinstance(x, TrainingData):
            given = x.data if isinstance(x.data, tuple) else (x.data,)
            if inputs is not None or len(given) > 2 or not all(isinstance(part, Tensor) for part in given):
                raise GraphflowsError(
                    f"Expected TrainingData of x or of (x, inputs) and nothing else; got {x}."
                )
            rows, covariates = given if len(given) == 2 else (given[0], None)
        self.known(rows, covariates)  # all rows, before any is trained on
        if not self.observation.has_units if standardize is None else standardize:
            self.standardize_(rows, covariates)
        data = x if isinstance(x, TrainingData) or inputs is None else (x, inputs)
        return fit(self.model, self.guide, data, loss=loss or self.objective(), **options)
