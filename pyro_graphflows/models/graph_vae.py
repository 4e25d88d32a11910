r"""The Graph VAE: a variational autoencoder that learns how its latent variables depend on each other.

The class here has the choices and what one does with the model: its structure, samples, reconstructions, the evidence.
The mathematics is next to it: the two Pyro programs and the bound in ``graph_vae_programs.py``, gates, likelihoods,
networks and structures each in a module of their own.
"""

from collections.abc import Mapping, Sequence

import networkx as nx
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs import ModelGraph
from pyro_graphflows.infer.evidence import Evidence, log_evidence
from pyro_graphflows.infer.particles import evaluation_mode
from pyro_graphflows.models.graph_vae_arguments import check_options, require_sizes
from pyro_graphflows.models.graph_vae_gates import GATES, Gates
from pyro_graphflows.models.graph_vae_likelihood import Likelihood, check_likelihood, outputs_per_element
from pyro_graphflows.models.graph_vae_networks import (
    DECODER_DIMS,
    ENCODER_DIMS,
    BottomUp,
    TopDown,
    batch_statistics_anew,
    decoder_network,
    encoder_network,
    widened,
)
from pyro_graphflows.models.graph_vae_programs import Draw, GraphPrograms
from pyro_graphflows.models.graph_vae_structure import DATA, PLATE, nodes_and_parents, structure_graph

__all__ = ["GraphVAE"]


class GraphVAE(GraphPrograms):
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
            and a log-variance of its own for each element; or a function from the decoder's outputs
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
        require_sizes(
            input_shape=shape,
            num_nodes=1 if num_nodes is None else num_nodes,
            node_dim=node_dim,
            embedding_dim=embedding_dim,
            hidden_dim=1 if hidden_dim is None else hidden_dim,
            encoder_dims=encoder_dims,
            decoder_dims=decoder_dims,
        )
        check_options(edge_cost, decoder_input, encoder=encoder, decoder=decoder)
        check_likelihood(likelihood)
        self.input_shape = torch.Size(shape)
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
        num_outputs = num_inputs * outputs_per_element(likelihood)
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
        self.decoder = decoder or decoder_network(decoder_size, decoder_dims, num_outputs)
        self.gates = Gates(self._parents) if self.is_learned else None

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
        """Collect the batch statistics anew, with the hard gates that evaluation uses.

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
        with evaluation_mode(self), batch_statistics_anew(self):
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
        require_sizes(num_samples=num_samples)
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
        require_sizes(num_particles=num_particles, batch_size=batch_size)
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


def _given(values: Mapping[str, Tensor]) -> Draw:
    return lambda name, _: values[name]


def _sampled(_: str, law: TorchDistribution) -> Tensor:
    return law.sample()
