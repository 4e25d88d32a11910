r"""Model and guide of the Graph VAE: nodes one after the other, each given its gated parents.

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

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.models.graph_vae_gates import Gates, GateValues, side_by_side
from pyro_graphflows.models.graph_vae_likelihood import Likelihood, check_values, data_distribution
from pyro_graphflows.models.graph_vae_networks import BottomUp, fuse, normal, on_rows
from pyro_graphflows.models.graph_vae_structure import DATA, PLATE
from pyro_graphflows.models.parameter_store import announce, free_name
from pyro_graphflows.models.state_layout import WithLayout

__all__ = ["Draw", "GraphPrograms"]

#: What is done with the distribution of a site of some name: sampled, observed, replaced by its mean.
Draw = Callable[[str, TorchDistribution], Tensor]


class GraphPrograms(WithLayout, PyroModule):
    """The two Pyro programs over a graph of latent nodes. Base class; a subclass sets the attributes.

    Attributes:
        input_shape: The shape of one datum.
        names: The nodes, ``names[0]`` next to the data.
        node_dim: The number of dimensions of a node.
        embedding_dim: The size of the encoder's output.
        likelihood: The likelihood.
        edge_cost: What an open gate costs in the training objective, in nats per datum.
        name: The name wanted in Pyro's parameter store.
        encoder: From the data to their embedding.
        bottom_up: From the embedding to predictions of all nodes.
        prior: From gated parents to a node's prior, by the number of the node.
        posterior: From gated parents to the guide's second prediction of a node, likewise.
        decoder: From the nodes it sees to what the likelihood takes.
        gates: The gates, or None.
    """

    input_shape: torch.Size
    names: tuple[str, ...]
    node_dim: int
    embedding_dim: int
    likelihood: Likelihood
    edge_cost: float
    name: str
    encoder: nn.Module
    bottom_up: BottomUp
    prior: nn.ModuleDict
    posterior: nn.ModuleDict
    decoder: nn.Module
    gates: Gates | None
    _parents: dict[int, tuple[int, ...]]
    _sees_all: bool

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
        return side_by_side([values[j] for j in parents], between)

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
        return data_distribution(outputs, self.likelihood, self.input_shape)

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
            check_values(x, self.likelihood)
        return x.to(self.bottom_up.bias.dtype)

    def _announce(self, module: nn.Module, prefix: str) -> None:
        """Make parameters known to Pyro; without gradients nothing is trained."""
        if torch.is_grad_enabled():
            announce(module, prefix, free_name(self.name, "bottom_up.bias", self.bottom_up.bias))
