r"""What the variational autoencoders of this package share.

A VAE is a prior :math:`p(z)`, a decoder :math:`p(x|z)` and an encoder :math:`q(z|x)` trained together by the evidence
lower bound. :class:`LatentModel` has everything that does not depend on how these three are made: Pyro's model and
guide, samples and reconstructions, the bound, the evidence and the training. Subclasses write the three in terms of the
data's features. Training uses the bound directly (:class:`VAEObjective`), which computes what ``Trace_ELBO`` with
``model`` and ``guide`` would, without a trace.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, SupportsIndex

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.structures import ModelGraph, Node, listed
from pyro_graphflows.infer.batches import TrainingData
from pyro_graphflows.infer.evidence import Evidence, evidence_from_log_weights
from pyro_graphflows.infer.history import History
from pyro_graphflows.infer.particles import evaluation_mode
from pyro_graphflows.infer.training import fit
from pyro_graphflows.models.likelihood import Likelihood, Observation
from pyro_graphflows.models.parameter_names import WithLayout, free_name

__all__ = ["LatentModel", "VAEObjective"]

#: The name of the plate of the data.
PLATE = "data"
PARTICLES_TIMES_DATA = 2**13  # so many at a time in the evidence, by default
_NUMBER = itertools.count()


class LatentModel(WithLayout, PyroModule):
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

    def __init__(
        self,
        graph: ModelGraph,
        *,
        likelihood: Likelihood | Mapping[Node, Likelihood] = "normal",
        latent_name: str = "z",
    ) -> None:
        super().__init__()
        if not isinstance(graph, ModelGraph):
            raise GraphflowsError(f"Expected a ModelGraph; got {type(graph).__name__}.")
        if not graph.latent or not graph.observed:
            raise GraphflowsError(f"Expected latent and observed nodes; got {graph}.")
        if graph.marginalised:
            raise UnsupportedModelError(
                f"Expected no marginalised nodes; got {listed(graph.marginalised)}. Make them latent."
            )
        if len(set(graph.plates.values())) > 1:
            raise UnsupportedModelError(
                "Expected all nodes in the same plates; a VAE has one latent vector for each datum."
            )
        if latent_name in map(str, graph.observed):
            raise GraphflowsError(
                f"Expected no observed node with the name of the latent site, {latent_name!r}. "
                "Give another latent_name."
            )
        if PLATE in (latent_name, *map(str, graph.observed)):
            raise GraphflowsError(
                f"Expected no site with the name of the plate of the data, {PLATE!r}. Give another name."
            )
        given = likelihood if isinstance(likelihood, Mapping) else dict.fromkeys(graph.observed, likelihood)
        if set(given) != set(graph.observed):
            wrong = set(given) ^ set(graph.observed)
            raise GraphflowsError(
                f"Expected a likelihood for each observed node; missing or unknown: {listed(wrong)}."
            )
        sizes = {node: graph.event_sizes[node] for node in (*graph.observed, *graph.inputs)}
        self.graph = graph
        self.latent_name = latent_name
        self.observation = Observation(sizes, {node: given[node] for node in graph.observed})
        self.num_observed = sum(graph.event_sizes[node] for node in graph.observed)
        self.latents: dict[Node, slice] = {}
        start = 0
        for node in graph.latent:
            self.latents[node] = slice(start, start + graph.event_sizes[node])
            start += graph.event_sizes[node]
        self.latent_dim = start
        self._store_name = f"{type(self).__name__.lower()}_{next(_NUMBER)}"

    # ------------------------------------------------------------------------------------ what subclasses write

    def encode(self, features: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map noise to latent values given features of known nodes.

        Args:
            features: Shape (\*batch, features).
            eps: Standard normal noise of shape (\*batch, latent size).

        Returns:
            z, of the shape of the noise, and its log-density :math:`\log q(z|x)`, of shape (\*batch).
        """
        raise NotImplementedError

    def log_prior(self, z: Tensor, features: Tensor) -> Tensor:
        r"""Return :math:`\log p(z)` (given observed parents and inputs), of shape (\*batch)."""
        raise NotImplementedError

    def decode(self, z: Tensor, features: Tensor) -> Tensor:
        r"""Return the parameters of all observed nodes, of shape (\*batch, number of parameters)."""
        raise NotImplementedError

    def draw_prior(self, eps: Tensor, features: Tensor) -> Tensor:
        r"""Map standard normal noise of shape (\*batch, latent size) to values of the prior."""
        raise NotImplementedError

    def prior(self, features: Tensor) -> dist.TorchDistribution:
        """Return the distribution of the latent vector given features, of which only those of its parents count."""
        raise NotImplementedError

    def posterior(self, features: Tensor) -> dist.TorchDistribution:
        """Return the encoder's distribution of the latent vector given features."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ data

    def known(self, x: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return all known columns: the data, and the inputs behind them.

        Args:
            x: Data (n, columns).
            inputs: The inputs (n, columns).

        Raises:
            GraphflowsError: If these are not the shapes, dtypes or values that the nodes have.
        """
        if self.graph.inputs:
            if inputs is None:
                raise GraphflowsError(
                    f"Expected inputs, the columns of {listed(self.graph.inputs)}; got none."
                )
            num_inputs = self.observation.num_columns - self.num_observed
            columns = [part.shape[1:] if isinstance(part, Tensor) else None for part in (x, inputs)]
            if columns != [(self.num_observed,), (num_inputs,)] or len(x) != len(inputs):
                got = [
                    tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                    for part in (x, inputs)
                ]
                raise GraphflowsError(
                    f"Expected tensors x and inputs of shapes (n, {self.num_observed}) and (n, {num_inputs}), with the "
                    f"same n, the columns of {listed(self.graph.observed)} and of {listed(self.graph.inputs)}; got "
                    f"{got[0]} and {got[1]}."
                )
            x = torch.cat([x, inputs], -1)
        elif inputs is not None:
            raise GraphflowsError("Expected no inputs: the graph has none.")
        x = self.observation.check(x)
        if x.dim() != 2 or not len(x):
            raise GraphflowsError(f"Expected x of shape (n, columns), n >= 1; got shape {tuple(x.shape)}.")
        return x

    # ------------------------------------------------------------------------------------------- samples and Pyro

    @torch.no_grad()
    def reconstruct(self, x: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return the decoder's mean for one draw of z from the encoder, in the units of the data: (n, columns)."""
        data = self.known(x, inputs)
        features = self.observation.to_features(data)
        eps = torch.randn(*data.shape[:-1], self.latent_dim, dtype=data.dtype, device=data.device)
        with evaluation_mode(self):
            z, _ = self.encode(features, eps)
            return self.observation.mean(self.decode(z, features))[..., : self.num_observed]

    @torch.no_grad()
    def sample(self, num_samples: int, inputs: Tensor | None = None) -> Tensor:
        """Draw data from the model.

        Nodes are drawn parents first, so that the latent nodes may depend on observed ones and these on each other.

        Args:
            num_samples: The number of samples n.
            inputs: The inputs, (n, columns).

        Returns:
            Shape (n, columns).

        Raises:
            GraphflowsError: If ``num_samples`` is not positive.
        """
        if not isinstance(num_samples, SupportsIndex) or num_samples < 1:
            raise GraphflowsError(f"Expected a whole number num_samples >= 1; got {num_samples!r}.")
        with evaluation_mode(self):
            return self._draw(num_samples, inputs)[0]

    def _draw(self, num_samples: int, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw data and latent vectors; what depends on data drawn later is drawn again from the same noise."""
        graph, observation = self.graph, self.observation
        data = self.known(observation.loc.new_zeros(num_samples, self.num_observed), inputs)
        eps = torch.randn(num_samples, self.latent_dim, dtype=data.dtype, device=data.device)
        observed = set(graph.observed)
        latent_below = any(observed & set(graph.parents(node)) for node in graph.latent)
        features = observation.to_features(data)
        z = self.draw_prior(eps, features)
        parameters = self.decode(z, features)
        for node in graph.observed:
            if latent_below or observed & set(graph.parents(node)):
                features = observation.to_features(data)
                z = self.draw_prior(eps, features) if latent_below else z
                parameters = self.decode(z, features)
            value = observation.distribution(parameters, node).sample()
            data[:, observation.columns[node]] = value.reshape(num_samples, -1).to(data.dtype)
        if latent_below:
            z = self.draw_prior(eps, observation.to_features(data))
        return data[:, : self.num_observed], z

    def model(
        self, x: Tensor | None = None, inputs: Tensor | None = None, *, num_samples: int | None = None
    ) -> Tensor:
        """The model as a Pyro program: a plate ``"data"``, the latent vector, and a site for each observed node.

        Args:
            x: Data (n, columns); None to draw them.
            inputs: The inputs.
            num_samples: The size of the plate without data; by default the number of inputs, or 1.

        Returns:
            The latent vectors.

        Raises:
            UnsupportedModelError: Without data, if latent nodes depend on observed ones: use :meth:`sample`.
        """
        self._announce()
        observed = set(self.graph.observed)
        if x is None:
            below = [node for node in self.graph.latent if observed & set(self.graph.parents(node))]
            if below:
                raise UnsupportedModelError(
                    f"Expected data: the latent nodes {listed(below)} depend on observed ones. Use sample(num_samples)."
                )
            size = num_samples if num_samples is not None else 1 if inputs is None else len(inputs)
            data = self.known(self.observation.loc.new_zeros(size, self.num_observed), inputs)
        else:
            data = self.known(x, inputs)
        with pyro.plate(PLATE, len(data), dim=-1):
            features = self.observation.to_features(data)
            z = pyro.sample(self.latent_name, self.prior(features))
            parameters = self.decode(z, features)
            for node in self.graph.observed:
                if x is None and observed & set(self.graph.parents(node)):
                    parameters = self.decode(z, self.observation.to_features(data))
                part = self.observation.columns[node]
                column: slice | int = part if part.stop - part.start > 1 else part.start
                found = self.observation.distribution(parameters, node)
                value = pyro.sample(str(node), found, obs=None if x is None else data[..., column])
                if x is None:
                    data = data.expand(*z.shape[:-1], -1).clone()
                    data[..., column] = value.to(data.dtype)
        return z

    def guide(self, x: Tensor | None = None, inputs: Tensor | None = None, **_: Any) -> Tensor:
        """The encoder as a Pyro guide.

        Args:
            x: Data (n, columns).
            inputs: The inputs.

        Returns:
            The latent vectors.

        Raises:
            GraphflowsError: Without data.
        """
        self._announce()
        if x is None:
            raise GraphflowsError(
                "Expected data x: the guide is the posterior given data. Use model() or sample(n)."
            )
        data = self.known(x, inputs)
        with pyro.plate(PLATE, len(data), dim=-1):
            return pyro.sample(self.latent_name, self.posterior(self.observation.to_features(data)))

    def _announce(self) -> None:
        """Make the parameters known to Pyro; a copy of a module takes another name there, or the first were trained."""
        pyro.module(free_name(self._store_name, *next(self.named_parameters())), self)

    # ------------------------------------------------------------------------------------------- bound and training

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
        step = chunk_size or max(1, PARTICLES_TIMES_DATA // max(1, len(x)))
        sizes = [min(step, num_particles - start) for start in range(0, num_particles, step)]
        with evaluation_mode(self):
            log_weights = torch.cat([self.log_weights(x, inputs, num_particles=size) for size in sizes])
        return evidence_from_log_weights(log_weights)

    def objective(self, **options: Any) -> "VAEObjective":
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
        if not isinstance(x, TrainingData):
            self.known(x, inputs)  # all rows, before any is trained on
            x, inputs = TrainingData(x if inputs is None else (x, inputs)), None
        given = x.data if isinstance(x.data, tuple) else (x.data,)
        if len(given) > 2 or not all(isinstance(part, Tensor) for part in given) or inputs is not None:
            raise GraphflowsError(
                f"Expected a tensor x, or TrainingData of x or (x, inputs) and nothing else; got {x}."
            )
        rows, covariates = given if len(given) == 2 else (given[0], None)
        self.known(rows, covariates)
        if not self.observation.has_units if standardize is None else standardize:
            self.standardize_(rows, covariates)
        return fit(self.model, self.guide, x, loss=loss or self.objective(), **options)

    # ------------------------------------------------------------------------------------------- states and columns

    def _layout(self) -> dict[str, list[str]]:
        """Return what the rows and columns of parameters belong to, in words."""
        return {
            "nodes": [str(node) for node in (*self.graph.observed, *self.graph.inputs, *self.graph.latent)]
        }

    def join(self, values: Mapping[Node, Tensor]) -> Tensor:
        """Return values of the observed nodes side by side, in the order of the columns of ``x``.

        Args:
            values: One tensor for each observed node, of shape (n,) or (n, event size).

        Returns:
            Shape (n, columns), in the dtype of the model.

        Raises:
            GraphflowsError: If a node is missing or unknown, or a shape is another.

        Example:
            >>> from pyro_graphflows import VAE
            >>> vae = VAE(ModelGraph([("a", "y"), ("a", "x")], observed=["x", "y"]))
            >>> vae.graph.observed, vae.join({"x": torch.zeros(3), "y": torch.ones(3)})[0].tolist()
            (('y', 'x'), [1.0, 0.0])
        """
        wrong = set(values) ^ set(self.graph.observed)
        if wrong:
            raise GraphflowsError(
                f"Expected values of each observed node; missing or unknown: {listed(wrong)}."
            )
        parts = {n: torch.as_tensor(v, device=self.observation.loc.device) for n, v in values.items()}
        parts = {n: v.unsqueeze(-1) if v.dim() == 1 else v for n, v in parts.items()}
        number = max(len(v) if v.dim() else 0 for v in parts.values())
        other = [
            f"{n}: {tuple(values[n].shape)}"
            for n, v in parts.items()
            if v.shape != (number, self.graph.event_sizes[n])
        ]
        if other:
            raise GraphflowsError(
                f"Expected values of shape (n, event size), or (n,), with the same n; got {', '.join(sorted(other))}."
            )
        return torch.cat([parts[n].to(self.observation.loc.dtype) for n in self.graph.observed], -1)

    def split(self, z: Tensor) -> dict[Node, Tensor]:
        r"""Return the part of each latent node of a latent vector, each of shape (\*batch, event size)."""
        return {node: z[..., part] for node, part in self.latents.items()}


class VAEObjective:
    r"""Minus a lower bound of the evidence, summed over the data.

    With ``bound="elbo"`` and ``kl_weight=1`` this is the loss of ``Trace_ELBO`` with the model and the guide, up to the
    random numbers. ``bound="iwae"`` is the tighter bound of K importance-weighted particles.

    *Warm-up.* A training can end where latent nodes far from the data carry nothing: at its start they cost divergence
    before they are of use. With a weight of the divergence that rises from near zero to one, in a call of ``fit`` of
    its own with a constant rate, they are in use before they cost; see the example. It costs fit on few data where
    nodes are in use without it (both measured in ``studies/siren_vae/run.py --study remedies``).

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
        self, vae: LatentModel, *, num_particles: int = 1, bound: str = "elbo", kl_weight: float = 1.0
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
