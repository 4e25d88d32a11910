r"""The Graph VAE: a variational autoencoder that learns how its latent variables depend on each other.

The latent vector is cut into :math:`N` *nodes* :math:`z_N, \dots, z_1`, sampled in this order. The possible parents of
node :math:`i` are all nodes before it, each behind a *gate* :math:`c_{ij} \in \{0, 1\}` that multiplies the parent's
value:

.. math:: p(x, z \mid c) = p(x \mid z) \prod_i \mathcal N\bigl(z_i \mid \mu_i, \sigma_i^2\bigr), \qquad
          (\mu_i, \log\sigma_i^2) = f_i\bigl(c_{ij} z_j : j > i\bigr), \qquad c_{ij} \sim \text{Bernoulli}(m_{ij}).

The guide has the same graph and the same gates. It fuses two predictions of each node by their precisions, one from
the data (bottom up, :math:`\mu_1, s_1`) and one from the sampled parents (top down, :math:`\mu_2, s_2`):

.. math:: \sigma^2 = \frac{s_1^2 s_2^2}{s_1^2 + s_2^2}, \qquad \mu = \frac{\mu_1 s_2^2 + \mu_2 s_1^2}{s_1^2 + s_2^2}.

The objective is :math:`E_c\,\text{ELBO}(c)`, a bound because it is an average of bounds, with

.. math:: \text{ELBO}(c) = E_q \log p(x \mid z) - \sum_i E_q\,
          \text{KL}\bigl(q(z_i \mid z_{>i}, x) \,\|\, p(z_i \mid z_{>i})\bigr) :

each term is a divergence from the *learned* conditional prior, not from a standard normal.

**Gates are one global site**, ``gates``, drawn once for each call of the guide, with the same relaxed Bernoulli law in
the model and the guide and ``mask(False)`` on both sides: it carries a gradient to the gate probabilities and adds
nothing to the bound. The gradient is unbiased for the *relaxed* objective at the present temperature. In evaluation
mode (``module.eval()``; :func:`~pyro_graphflows.log_evidence` and the validation of :func:`~pyro_graphflows.fit`
switch to it) there is no such site: gates are hard, open where their probability is above one half.

**Which loss.** :class:`~pyro.infer.TraceMeanField_ELBO` is right here, and better than
:class:`~pyro.infer.Trace_ELBO`: guide and model sample the nodes in the same order with the same parents, so no model
parent of a node descends from it in the guide, which is what its analytic divergences need; they have less noise than
sampled log-ratios.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import networkx as nx
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs import ModelGraph
from pyro_graphflows.infer.evidence import Evidence, log_evidence
from pyro_graphflows.infer.particles import evaluation_mode
from pyro_graphflows.models.graph_vae_networks import (
    DECODER_DIMS,
    ENCODER_DIMS,
    BottomUp,
    TopDown,
    decoder_network,
    encoder_network,
    fresh_batch_statistics,
    fuse,
    normal,
    on_rows,
    widened,
)
from pyro_graphflows.models.graph_vae_structure import (
    DATA,
    GATES,
    PLATE,
    Gates,
    GateValues,
    behind_gates,
    nodes_and_parents,
    structure_graph,
)
from pyro_graphflows.models.likelihood import DatumLikelihood, Likelihood
from pyro_graphflows.models.parameter_names import WithLayout, announce, free_name

__all__ = ["GraphVAE"]

#: What is done with the distribution of a site of some name: sampled, observed, replaced by its mean.
Draw = Callable[[str, TorchDistribution], Tensor]


class GraphVAE(WithLayout, PyroModule):
    r"""A variational autoencoder over a graph of latent nodes that is learned, or given.

    ``vae.model`` and ``vae.guide`` take data ``(num_data, *input_shape)`` and train with Pyro's ``SVI`` or with
    :func:`~pyro_graphflows.fit`, best by :class:`~pyro.infer.TraceMeanField_ELBO`. Call :meth:`anneal` after each
    epoch while the structure is learned.

    *Node names* are ``z1`` to ``zN`` (those of the graph, where one is given), sampled from the last to the first.
    ``z1`` is next to the data. Matrices of gates have the child as row and the parent as column.

    References:
        [1] He, Gong, Marino, Mori and Lehrmann (2019), Variational Autoencoders with Jointly Optimized Latent
        Dependency Structure, ICLR; the networks are those of appendix B.
        [2] Sønderby, Raiko, Maaløe, Sønderby and Winther (2016), Ladder Variational Autoencoders, NIPS (the fusion of
        two predictions).

    Args:
        input_shape: The shape of one datum; a number for vectors.
        num_nodes: The number of nodes :math:`N`; 5, or as many as a given graph has.
        node_dim: The number of dimensions of a node.
        structure: ``"learned"`` (gates); ``"full"``, all possible edges (FC-VAE); ``"chain"``, each node given the
            one before (Ladder VAE); ``"independent"``, no edges (VAE); or a DAG over the nodes (of a
            :class:`~pyro_graphflows.ModelGraph` its latent nodes).
        likelihood: ``"bernoulli"`` for data of zeros and ones; ``"normal"`` for data in [0, 1], with a sigmoid mean
            and one log-variance for each element; or a function from the decoder's outputs
            ``(..., num_outputs)`` to a distribution with event shape ``input_shape``.
        encoder: A module from ``(rows, *input_shape)`` to ``(rows, embedding_dim)``.
        decoder: A module from ``(rows, size of its nodes)`` to what the likelihood takes: logits for ``"bernoulli"``,
            means (before the sigmoid) followed by log-variances for ``"normal"``. Named likelihoods take outputs of
            any shape, as ``(rows, 1, height, width)``, whose elements in each row are these in order.
        decoder_input: What the decoder sees: ``"all"`` nodes, or the ``"first"``, ``z1``.
        embedding_dim: The size of the encoder's output.
        hidden_dim: The width of the hidden layer of the nodes' networks; ``None`` for linear maps.
        encoder_dims: Hidden widths of the default encoder.
        decoder_dims: Hidden widths of the default decoder.
        match_parameters: Whether the first two hidden layers of the default encoder of ``"independent"`` are made so
            wide that it has as many parameters as ``"full"``.
        edge_cost: What an open gate costs in the training objective, in nats per datum. The bound alone has nothing
            against an edge that does no good, once the networks have learned to ignore it: its gate stays anywhere
            between 0 and 1. A small cost closes it. The cost is not part of the bound; in evaluation mode it is not
            there.
        name: The prefix of the parameters in Pyro's parameter store; a number is added for a second module of that
            name.

    Attributes:
        names: The nodes, ``names[0]`` next to the data.
        temperature: The temperature of the relaxed gates.

    Raises:
        GraphflowsError: If an option is unknown, a size is not positive, or a graph does not fit.
        NotADAGError: If a given graph has a directed cycle.

    Example:
        >>> import pyro
        >>> vae = GraphVAE((8, 8), num_nodes=3, node_dim=2)
        >>> x = torch.randint(2, (20, 8, 8)).float()
        >>> svi = pyro.infer.SVI(
        ...     vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.TraceMeanField_ELBO()
        ... )
        >>> losses = [svi.step(x) for _ in range(3)]
        >>> vae.gate_probabilities.shape, vae.log_evidence(x, num_particles=10).log_evidence.shape
        (torch.Size([3, 3]), torch.Size([20]))
    """

    def __init__(
        self,
        input_shape: int | Sequence[int],
        num_nodes: int | None = None,
        node_dim: int = 16,
        structure: str | nx.DiGraph | ModelGraph = "learned",
        *,
        likelihood: Likelihood = "bernoulli",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        decoder_input: str = "all",
        embedding_dim: int = 128,
        hidden_dim: int | None = 128,
        encoder_dims: Sequence[int] = ENCODER_DIMS,
        decoder_dims: Sequence[int] = DECODER_DIMS,
        match_parameters: bool = True,
        edge_cost: float = 0.0,
        name: str = "graph_vae",
    ) -> None:
        super().__init__()
        shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
        _require_sizes(
            input_shape=shape,
            num_nodes=1 if num_nodes is None else num_nodes,
            node_dim=node_dim,
            embedding_dim=embedding_dim,
            hidden_dim=1 if hidden_dim is None else hidden_dim,
            encoder_dims=encoder_dims,
            decoder_dims=decoder_dims,
        )
        _check_options(edge_cost, decoder_input, encoder=encoder, decoder=decoder)
        self.input_shape = torch.Size(shape)
        self._datum = DatumLikelihood(likelihood, self.input_shape)
        self.names, self._parents = nodes_and_parents(structure, num_nodes, (GATES, DATA, PLATE))
        self.is_learned = isinstance(structure, str) and structure == "learned" and len(self.names) > 1
        self.likelihood = likelihood
        self.decoder_input = decoder_input
        self._sees_all = decoder_input == "all"
        self.node_dim = node_dim
        self.embedding_dim = embedding_dim
        self.edge_cost = edge_cost
        self.name = name

        num_inputs = self.input_shape.numel()
        decoder_size = node_dim * (len(self.names) if decoder_input == "all" else 1)
        dims = tuple(encoder_dims)
        if structure == "independent" and match_parameters and encoder is None and len(dims) == 3:
            dims = widened(dims, num_inputs, embedding_dim, len(self.names), node_dim, hidden_dim)
        self.encoder = encoder or encoder_network(num_inputs, dims, embedding_dim)
        self.bottom_up = BottomUp(embedding_dim, len(self.names), node_dim, hidden_dim)
        inner = {child: len(parents) for child, parents in self._parents.items() if parents}
        self.prior, self.posterior = (
            nn.ModuleDict(
                {
                    str(child): TopDown(number * node_dim, node_dim, hidden_dim)
                    for child, number in inner.items()
                }
            )
            for _ in range(2)
        )
        self.decoder = decoder or decoder_network(decoder_size, decoder_dims, self._datum.num_outputs)
        self.gates = Gates(self._parents) if self.is_learned else None

    # -------------------------------------------------------------------------------------------------- programs
    def model(self, x: Tensor | None = None, num_samples: int | None = None) -> Tensor:
        """The generative model: nodes from the last to the first, then the data.

        Args:
            x: Data ``(num_data, *input_shape)``; without data ``x`` is sampled.
            num_samples: The size of the data plate without data.

        Returns:
            The value of the site ``x``.

        Raises:
            GraphflowsError: If ``x`` is empty or has another shape, a decoder of the user's returns too many or too few
                numbers, or (with Pyro's validation on) values outside of {0, 1} for
                ``"bernoulli"`` or of [0, 1] for ``"normal"``.
        """
        self._announce(self.prior, "prior")
        self._announce(self.decoder, "decoder")
        if isinstance(self.likelihood, nn.Module):
            self._announce(self.likelihood, "likelihood")
        data, num_data = (None, num_samples or 1) if x is None else (self._data(x), len(x))
        gates = self._gate_values()
        with pyro.plate(PLATE, num_data, dim=-1):
            if self.edge_cost and self.gates is not None and self.gates.is_relaxed:  # in training
                cost = self.edge_cost * self.gates.logits.sigmoid().sum()
                pyro.factor("edge_cost", -cost.expand(num_data))
            values = self._generate(num_data, gates, pyro.sample)
            return pyro.sample(DATA, self._decode(values), obs=data)

    def guide(self, x: Tensor | None = None, num_samples: int | None = None) -> dict[str, Tensor]:
        """The amortised posterior, with the graph and the gates of the model.

        Args:
            x: Data ``(num_data, *input_shape)``.
            num_samples: Not used; the model has it.

        Returns:
            The sampled value of each node by its name.

        Raises:
            GraphflowsError: If there are no data or they have another shape, there is a single datum in training mode
                (batch norm needs two), or an encoder of the user's has another output size than ``embedding_dim``.
        """
        for part, prefix in (
            (self.encoder, "encoder"),
            (self.bottom_up, "bottom_up"),
            (self.posterior, "posterior"),
        ):
            self._announce(part, prefix)
        if x is None:
            raise GraphflowsError("Expected data x for the guide; got None.")
        data = self._data(x)
        gates = self._gate_values()
        with pyro.plate(PLATE, len(data), dim=-1):
            values = self._infer(data, gates, pyro.sample)
        return {self.names[i]: value for i, value in values.items()}

    # ------------------------------------------------------------------------------------------------- structure
    @property
    def gate_probabilities(self) -> Tensor:
        """Probability of each edge ``(num_nodes, num_nodes)``, child as row; 0 or 1 where the structure is fixed."""
        number = len(self.names)
        matrix = self.bottom_up.bias.new_zeros(number, number)
        for i, parents in self._parents.items():
            for j in parents:
                matrix[i, j] = 1.0
        if self.gates is not None:
            rows, columns = torch.tensor(list(self.gates.index)).T
            matrix[rows, columns] = self.gates.probabilities()
        return matrix

    @property
    def temperature(self) -> Tensor:
        """The temperature of the relaxed gates; 1 where there are none."""
        return self.bottom_up.bias.new_ones(()) if self.gates is None else self.gates.temperature

    def learned_graph(self, threshold: float = 0.5) -> ModelGraph:
        """Return the structure as a model graph: edges between nodes, and from the decoder's nodes to ``x``.

        Args:
            threshold: Edges whose gate has a greater probability than this are in the graph.

        Returns:
            A graph for :func:`~pyro_graphflows.faithful_inverse`. That of a decoder that sees all nodes connects them
            all in the posterior, whatever was learned.
        """
        present = (self.gate_probabilities > threshold).tolist()
        seen = self.names if self._sees_all else self.names[:1]
        return structure_graph(self.names, present, seen, self.node_dim, self.input_shape.numel())

    def freeze_structure(self, threshold: float = 0.5) -> "GraphVAE":
        """Make the gates hard for good, in training mode too: there is no site ``gates`` any more.

        Args:
            threshold: Gates whose probability is greater stay open.

        Returns:
            This object.

        Raises:
            GraphflowsError: If the structure is not a learned one.
        """
        if self.gates is None:
            raise GraphflowsError("Expected structure='learned'; a given structure is frozen already.")
        self.gates.freeze(threshold)
        return self

    def anneal(self, epoch: int, *, rate: float = 0.99, floor: float = 0.1) -> float:
        """Set the temperature of the relaxed gates for an epoch; nothing happens without gates.

        Args:
            epoch: The number of epochs done.
            rate: The temperature is ``rate ** epoch``.
            floor: The lowest temperature.

        Returns:
            The temperature.
        """
        temperature = max(floor, rate**epoch)
        if self.gates is not None:
            self.gates.temperature.fill_(temperature)
        return temperature

    @torch.no_grad()
    def recalibrate(self, x: Tensor, *, batch_size: int = 500) -> "GraphVAE":
        """Collect the batch statistics again, with the hard gates that evaluation uses.

        In training they are collected with relaxed gates; while gates are uncertain these are not the statistics of the
        hard-gated model, and its bound suffers. Parameters do not change.

        Args:
            x: Training data ``(num_data, *input_shape)``.
            batch_size: How many data to treat at once; statistics are averages over these batches.

        Returns:
            This object.

        Raises:
            GraphflowsError: If there are fewer than two data.
        """
        if len(x) < 2:
            raise GraphflowsError(f"Expected at least two data; got {len(x)}.")
        with evaluation_mode(self), fresh_batch_statistics(self):
            for part in x.split(batch_size):
                if len(part) > 1:
                    gates = self._gate_values()
                    values = self._infer(self._data(part), gates, _sampled)
                    self._generate(len(part), gates, _given({self.names[i]: z for i, z in values.items()}))
                    self._decode(values)
        return self

    # ------------------------------------------------------------------------------------------------------- use
    @torch.no_grad()
    def sample(self, num_samples: int = 1, *, mean: bool = False) -> Tensor:
        """Draw data from the model, with hard gates.

        Args:
            num_samples: How many.
            mean: Whether to return the mean of ``x`` given the sampled nodes instead of a sample of it.

        Returns:
            A tensor ``(num_samples, *input_shape)``.

        Raises:
            GraphflowsError: If ``num_samples`` is no positive number.
        """
        _require_sizes(num_samples=num_samples)
        with evaluation_mode(self):
            values = self._generate(num_samples, self._gate_values(), _sampled)
            law = self._decode(values)
        return law.mean if mean else law.sample()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the mean of ``x`` given nodes sampled from the guide, with hard gates.

        Args:
            x: Data ``(num_data, *input_shape)``.
        """
        with evaluation_mode(self):
            return self._decode(self._infer(self._data(x), self._gate_values(), _sampled)).mean

    @torch.no_grad()
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Return the mean of each node by name, given the data and the means of its parents, with hard gates.

        Args:
            x: Data ``(num_data, *input_shape)``.
        """
        with evaluation_mode(self):
            values = self._infer(self._data(x), self._gate_values(), lambda _, law: law.mean)
        return {self.names[i]: value for i, value in values.items()}

    def log_evidence(
        self, x: Tensor, num_particles: int = 5000, *, batch_size: int = 100, chunk_size: int | None = None
    ) -> Evidence:
        """Estimate the log-evidence of each datum by importance samples, with hard gates and stored batch statistics.

        Args:
            x: Data ``(num_data, *input_shape)``.
            num_particles: The number of importance samples per datum.
            batch_size: How many data to treat at once; only this many times ``num_particles`` weights are kept.
            chunk_size: How many particles to run at once.

        Returns:
            The estimates with effective sample sizes, Pareto shapes and standard errors.

        Raises:
            GraphflowsError: If a number is not positive, or ``x`` has no data or another shape.
        """
        _require_sizes(num_particles=num_particles, batch_size=batch_size)
        with evaluation_mode(self):
            data = self._data(x)
        parts = [
            log_evidence(
                self.model,
                self.guide,
                part,
                num_particles=num_particles,
                chunk_size=chunk_size,
                max_plate_nesting=1,
            )
            for part in data.split(batch_size)
        ]
        return Evidence(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    def bits_per_dimension(self, log_density: Tensor, num_levels: int = 256) -> Tensor:
        r"""Convert a log-density of data scaled to [0, 1] to bits per dimension of their ``num_levels`` integers.

        Uniform noise must have been added to the integers, :math:`x = (k + u) / L`.

        Args:
            log_density: Log-density in nats, for example the log-evidence.
            num_levels: The number of levels.
        """
        size, levels = self.input_shape.numel(), torch.tensor(float(num_levels))
        return -log_density / (size * torch.tensor(2.0).log()) + levels.log2()

    # ---------------------------------------------------------------------------------------------------- inside
    def _layout(self) -> dict[str, list[str]]:
        arcs = [
            f"{self.names[j]} -> {self.names[i]}" for i, parents in self._parents.items() for j in parents
        ]
        return {"nodes": list(self.names), "possible arcs": arcs}

    def _generate(self, num_data: int, gates: GateValues, draw: Draw) -> dict[int, Tensor]:
        values: dict[int, Tensor] = {}
        zeros = self.bottom_up.bias.new_zeros(num_data, self.node_dim)
        for i in reversed(range(len(self.names))):
            if self._parents[i]:
                loc, log_var = on_rows(self.prior[str(i)], self._gated_parents(i, values, gates)).chunk(2, -1)
                law = normal(loc, log_var)
            else:
                law = dist.Normal(zeros, torch.ones_like(zeros))
            values[i] = draw(self.names[i], law.to_event(1))
        return values

    def _infer(self, x: Tensor, gates: GateValues, draw: Draw) -> dict[int, Tensor]:
        embedding = self.encoder(x)
        if embedding.shape != (len(x), self.embedding_dim):
            raise GraphflowsError(
                f"Expected the encoder to return the shape {(len(x), self.embedding_dim)}; got "
                f"{tuple(embedding.shape)}. Give its output size as embedding_dim."
            )
        bottom_up = self.bottom_up(embedding)
        values: dict[int, Tensor] = {}
        for i in reversed(range(len(self.names))):
            loc, log_var = bottom_up[i].chunk(2, -1)
            if self._parents[i]:
                top_down = on_rows(self.posterior[str(i)], self._gated_parents(i, values, gates))
                loc, log_var = fuse(loc, log_var, *top_down.chunk(2, -1))
            values[i] = draw(self.names[i], normal(loc, log_var).to_event(1))
        return values

    def _gated_parents(self, child: int, values: dict[int, Tensor], gates: GateValues) -> Tensor:
        """Return the values of the possible parents side by side, each behind its gate."""
        parents = self._parents[child]
        between = None if gates is None or self.gates is None else self.gates.of(child, parents, gates)
        return behind_gates([values[j] for j in parents], between)

    def _gate_values(self) -> GateValues:
        """Return relaxed gates as a sample, hard ones as truth values, or ``None`` where there are none."""
        if self.gates is None:
            return None
        if not self.gates.is_relaxed:
            return self.gates.hard()
        self._announce(self.gates, "gates")
        return self.gates.draw()

    def _decode(self, values: dict[int, Tensor]) -> TorchDistribution:
        """Return the distribution of the data given the nodes."""
        inputs = torch.cat([values[i] for i in sorted(values)], -1) if self._sees_all else values[0]
        outputs = on_rows(self.decoder, inputs)
        if not callable(self.likelihood):
            outputs = outputs.flatten(inputs.dim() - 1)
        return self._datum.distribution(outputs)

    def _data(self, x: Tensor) -> Tensor:
        """Return the data in the type of the parameters."""
        if (
            not isinstance(x, Tensor)
            or x.dim() != 1 + len(self.input_shape)
            or x.shape[1:] != self.input_shape
        ):
            got = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise GraphflowsError(
                f"Expected x, a tensor of shape (num_data, {', '.join(map(str, self.input_shape))}); got {got}."
            )
        if not len(x):
            raise GraphflowsError(f"Expected at least one datum; got the shape {tuple(x.shape)}.")
        if self.training and len(x) == 1 and any(isinstance(m, nn.BatchNorm1d) for m in self.modules()):
            raise GraphflowsError(
                "Expected at least two data in training mode, since batch norm needs them; got one. Use another batch "
                "size, drop the last batch, or call eval()."
            )
        if is_validation_enabled():
            self._datum.check(x)
        return x.to(self.bottom_up.bias.dtype)

    def _announce(self, module: nn.Module, prefix: str) -> None:
        """Make parameters known to Pyro; without gradients nothing is trained."""
        if torch.is_grad_enabled():
            announce(module, prefix, free_name(self.name, "bottom_up.bias", self.bottom_up.bias))


def _given(values: Mapping[str, Tensor]) -> Draw:
    return lambda name, _: values[name]


def _sampled(_: str, law: TorchDistribution) -> Tensor:
    return law.sample()


def _require_sizes(**sizes: int | Sequence[int]) -> None:
    """Refuse what is no positive whole number, or sequence of such.

    Raises:
        GraphflowsError: If there is such a size.
    """
    for name, given in sizes.items():
        for size in given if isinstance(given, Sequence) else (given,):
            if not isinstance(size, SupportsIndex) or operator.index(size) < 1:
                raise GraphflowsError(f"Expected positive whole numbers for sizes; got {name}={given!r}.")


def _check_options(edge_cost: float, decoder_input: str, **modules: Any) -> None:
    """Refuse other options that are out of range or unknown, and networks without parameters.

    Args:
        edge_cost: What an open gate costs.
        decoder_input: What the decoder sees.
        modules: The user's networks; None where there is a default.

    Raises:
        GraphflowsError: If there is such an argument.
    """
    if edge_cost < 0:
        raise GraphflowsError(f"Expected edge_cost >= 0; got {edge_cost}.")
    for key, module in modules.items():
        if module is not None and not isinstance(module, nn.Module):
            raise GraphflowsError(
                f"Expected {key} to be a torch.nn.Module, whose parameters can be trained; got {module!r}."
            )
    if decoder_input not in ("all", "first"):
        raise GraphflowsError(f"Expected decoder_input 'all' or 'first'; got {decoder_input!r}.")
