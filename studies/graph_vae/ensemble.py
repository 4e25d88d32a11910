r"""Several Graph VAEs of one structure as one computation: every layer written once, for all members.

The members share nothing. Each has its own parameters, gates and batch statistics; they only go through the device
together, as the first dimension of every tensor, because one small model leaves a device idle most of the time. The
class :class:`~pyro_graphflows.GraphVAE` stays the reference: members are made from its objects and turned back into
them, and bound and gradients are those of its programs under :class:`~pyro.infer.TraceMeanField_ELBO`.

What is computed otherwise than in the class, with the same result:

- All priors are one network. Once the nodes have their values no prior waits for another, so their first layers are one
  matrix with a block for each child and parent; gates, and blocks that are no edge, multiply that matrix.
- The bias of a layer that batch norm follows has no effect, and its gradient is zero. It is left out: it stays at its
  start, and running means are kept without it.
- Weights are kept transposed, so that their gradients come in the order they are stored in.
- In evaluation batch norm is an affine map, and is put into the layer before it.

Shapes: E members, B rows, N nodes of d dimensions, the last R of them without parents, C = N - R with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_graphflows import GraphflowsError, GraphVAE

ESTIMATORS = ("relaxed", "straight-through")
MOST_LOG_VAR = 20.0  # as in the class: standard deviations of nodes from 5e-5 to 2e4


@dataclass(frozen=True)
class Layer:
    """A linear layer of a perceptron, by the paths of its parts in the state of a model."""

    linear: str
    norm: str | None  # batch norm after it
    has_elu: bool


def layers_of(network: nn.Sequential, path: str) -> list[Layer]:
    """Return the layers of a perceptron of linear maps, batch norms and ELUs."""
    layers: list[Layer] = []
    for name, part in network.named_children():
        here = f"{path}.{name}"
        before = layers[-1] if layers else None
        if isinstance(part, nn.Linear):
            layers.append(Layer(here, None, False))
        elif isinstance(part, nn.BatchNorm1d) and before and before.norm is None and not before.has_elu:
            layers[-1] = Layer(before.linear, here, False)
        elif isinstance(part, nn.ELU) and before and not before.has_elu:
            layers[-1] = Layer(before.linear, before.norm, True)
        elif not (isinstance(part, nn.Flatten) and not layers):
            raise GraphflowsError(
                f"Expected networks of linear maps, batch norm and ELU, as GraphVAE makes them; {here} is a "
                f"{type(part).__name__}. Train such a model with pyro_graphflows.fit."
            )
    return layers


def require_same_kind(members: Sequence[GraphVAE]) -> None:
    """Refuse models that cannot be trained side by side.

    Raises:
        GraphflowsError: If there are none, they differ in structure or sizes, or they are not made of what an ensemble
            knows.
    """
    if not members:
        raise GraphflowsError("Expected at least one model for an ensemble; got none.")
    first = members[0]
    if first.likelihood != "bernoulli":
        raise GraphflowsError(f"Expected likelihood='bernoulli' for an ensemble; got {first.likelihood!r}.")
    if not first.bottom_up.has_hidden:
        raise GraphflowsError(
            "Expected nodes' networks with a hidden layer for an ensemble; got hidden_dim=None."
        )
    shapes = [{key: value.shape for key, value in vae.state_dict().items()} for vae in members]
    for number, vae in enumerate(members[1:], start=1):
        same = shapes[number] == shapes[0] and vae.decoder_input == first.decoder_input
        if not same or vae.edge_cost != first.edge_cost:
            raise GraphflowsError(
                f"Expected members of one structure, size and edge cost; number {number} differs from number 0."
            )


class Ensemble:
    """Graph VAEs of one structure side by side.

    Args:
        members: The models; their parameters are copied.
        estimator: ``"relaxed"``, the class's own gates in training, or ``"straight-through"``: gates rounded on
            the way forward, with the gradient of the relaxed ones.
        multiply_in: The type that matrix products are done in, as ``torch.bfloat16``; everything else, the loss above
            all, keeps the type of the parameters. ``None`` for that type.

    Attributes:
        parameters: What is trained, each ``(E, ...)``.
        statistics: Running means (without the layer's bias) and variances of the batch norms.
        gates_open: Hard gates of frozen members ``(E, G)``.
        is_frozen: Whether a member's gates are hard in training ``(E, 1)``.
        temperature: The temperature of relaxed gates ``()``.

    Raises:
        GraphflowsError: If the models are no ensemble.
    """

    def __init__(
        self, members: Sequence[GraphVAE], multiply_in: torch.dtype | None = None, estimator: str = "relaxed"
    ) -> None:
        if estimator not in ESTIMATORS:
            raise GraphflowsError(f"Expected estimator among {', '.join(ESTIMATORS)}; got {estimator!r}.")
        require_same_kind(members)
        vae = members[0]
        self.size, self.num_nodes, self.node_dim = len(members), len(vae.names), vae.node_dim
        self.input_size = vae.input_shape.numel()
        self.sees_all = vae.decoder_input == "all"
        self.edge_cost = vae.edge_cost
        self.multiply_in, self.estimator = multiply_in, estimator
        self.template = vae
        possible = vae.gate_probabilities > 0
        self.parents = [[j for j in range(self.num_nodes) if possible[i, j]] for i in range(self.num_nodes)]
        self.num_children = sum(bool(parents) for parents in self.parents)
        if any(not parents for parents in self.parents[: self.num_children]):
            raise GraphflowsError(
                f"Expected nodes without parents to be the last ones; the parents of each are {self.parents}."
            )
        self.encoder = layers_of(vae.encoder, "encoder")
        self.bottom_hidden = layers_of(vae.bottom_up.hidden, "bottom_up.hidden")[0]
        self.posterior = [
            layers_of(vae.posterior[str(i)].hidden, f"posterior.{i}.hidden")[0]
            for i in range(self.num_children)
        ]
        self.decoder = layers_of(vae.decoder, "decoder")
        self.prior = Layer("prior.hidden", "prior.norm", True)
        norms = [part for part in vae.modules() if isinstance(part, nn.BatchNorm1d)]
        self.eps, self.momentum = norms[0].eps, norms[0].momentum

        packed = [self._pack(member.state_dict()) for member in members]
        self.parameters: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}
        self.left_out: dict[str, Tensor] = {}  # biases before batch norms
        for key in packed[0]:
            stacked = torch.stack([one[key] for one in packed])
            if key.endswith(("running_mean", "running_var")):
                self.statistics[key] = stacked
            elif key in self._biases_left_out():
                self.left_out[key] = stacked
            else:
                self.parameters[key] = stacked.requires_grad_()
        like = self.parameters["bottom_up.bias"]
        self.num_gates = sum(map(len, self.parents)) if vae.gates is not None else 0
        self.temperature = vae.temperature.detach().clone()
        self.is_frozen = torch.zeros(self.size, 1, dtype=torch.bool, device=like.device)
        self.gates_open = like.new_zeros(self.size, self.num_gates)
        for number, member in enumerate(members):
            if member.gates is not None:
                self.is_frozen[number] = member.gates.is_frozen
                self.gates_open[number] = member.gates.is_open.to(like.dtype)
        places = like.new_zeros(sum(map(len, self.parents)), self.num_nodes, self.num_children)
        edges = [(i, j) for i in range(self.num_children) for j in self.parents[i]]
        for k, (i, j) in enumerate(edges):
            places[k, j, i] = 1.0
        self._places = places.flatten(1)  # from gates to a matrix of parent and child
        if vae.gates is not None and list(vae.gates.index) != edges:
            raise GraphflowsError("Expected gates in the order of children and their parents.")

    # ------------------------------------------------------------------------------------- to and from the class
    def _normed(self) -> list[Layer]:
        own = [*self.encoder, self.bottom_hidden, *self.posterior, *self.decoder]
        return [layer for layer in own if layer.norm is not None]

    def _biases_left_out(self) -> set[str]:
        inner = [self.prior] if self.num_children else []
        return {f"{layer.linear}.bias" for layer in [*self._normed(), *inner]}

    def _pack(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of a model with all priors as one network, running means without biases."""
        state = {key: value.detach().clone() for key, value in state.items()}
        packed = {
            key: value
            for key, value in state.items()
            if not key.startswith("prior.")
            and not key.endswith("num_batches_tracked")
            and (not key.startswith("gates.") or key == "gates.logits")
        }
        children, d = range(self.num_children), self.node_dim
        if children:
            parts = [{key: state[f"prior.{i}.{key}"] for key in PRIOR_STATE} for i in children]
            hidden = parts[0]["hidden.0.weight"].shape[0]
            weight = parts[0]["hidden.0.weight"].new_zeros(len(parts), hidden, self.num_nodes, d)
            for i, part in enumerate(parts):
                weight[i][:, self.parents[i]] = part["hidden.0.weight"].reshape(hidden, -1, d)
            packed["prior.hidden.weight"] = weight.reshape(len(parts) * hidden, self.num_nodes * d)
            packed["prior.hidden.bias"] = torch.cat([part["hidden.0.bias"] for part in parts])
            for key in ("weight", "bias", "running_mean", "running_var"):
                packed[f"prior.norm.{key}"] = torch.cat([part[f"hidden.1.{key}"] for part in parts])
            packed["prior.heads.weight"] = torch.stack([part["heads.weight"].T for part in parts])
            packed["prior.heads.bias"] = torch.stack([part["heads.bias"][None] for part in parts])
        for layer in [*self._normed(), *([self.prior] if children else [])]:
            packed[f"{layer.norm}.running_mean"] -= packed[f"{layer.linear}.bias"]
        return {key: _turned(key, value) for key, value in packed.items()}

    def _unpack(self, packed: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put what :meth:`_pack` returned into the state of a model."""
        packed = {key: _turned(key, value) for key, value in packed.items()}
        for layer in [*self._normed(), *([self.prior] if self.num_children else [])]:
            key = f"{layer.norm}.running_mean"
            packed[key] = packed[key] + packed[f"{layer.linear}.bias"]
        if self.num_children:
            C, d = self.num_children, self.node_dim
            weight = packed.pop("prior.hidden.weight").reshape(C, -1, self.num_nodes, d)
            pieces = {"hidden.0.bias": packed.pop("prior.hidden.bias").chunk(C)}
            for key in ("weight", "bias", "running_mean", "running_var"):
                pieces[f"hidden.1.{key}"] = packed.pop(f"prior.norm.{key}").chunk(C)
            pieces["heads.weight"] = [part.T for part in packed.pop("prior.heads.weight")]
            pieces["heads.bias"] = [part[0] for part in packed.pop("prior.heads.bias")]
            for i in range(C):
                packed[f"prior.{i}.hidden.0.weight"] = weight[i][:, self.parents[i]].flatten(1)
                packed |= {f"prior.{i}.{key}": values[i] for key, values in pieces.items()}
        for key, value in packed.items():
            state[key].copy_(value)
        return state

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that training changes, by name."""
        gates = {"gates_open": self.gates_open, "is_frozen": self.is_frozen, "temperature": self.temperature}
        return {**self.parameters, **self.statistics, **gates}

    @torch.no_grad()
    def state_of(self, number: int, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the state of a member, as one of :class:`~pyro_graphflows.GraphVAE`.

        Args:
            number: Which member.
            tensors: Values of :meth:`tensors` of some other time.
        """
        tensors = tensors or self.tensors()
        names = [*self.parameters, *self.statistics]
        packed = {key: tensors[key][number] for key in names}
        packed |= {key: value[number] for key, value in self.left_out.items()}
        if self.num_gates:
            packed |= {
                "gates.temperature": tensors["temperature"],
                "gates.is_frozen": tensors["is_frozen"][number, 0],
                "gates.is_open": tensors["gates_open"][number],
            }
        state = self.template.state_dict()
        metadata = state._metadata
        state = type(state)((key, value.detach().clone()) for key, value in state.items())
        state._metadata = metadata
        return self._unpack(packed, state)

    # ------------------------------------------------------------------------------------------------------ gates
    def relaxed_gates(self, noise: Tensor | None) -> Tensor | None:
        """Return gates for training: a sample of the relaxed ones, until they are frozen.

        Args:
            noise: Standard logistic noise ``(E, G)``, or ``(E, B, G)`` for gates of each datum.

        Returns:
            Gates of the shape of the noise.
        """
        if not self.num_gates:
            return None
        logits, is_frozen, is_open = self.parameters["gates.logits"], self.is_frozen, self.gates_open
        if noise.dim() == 3:
            logits, is_frozen, is_open = logits[:, None], is_frozen[:, None], is_open[:, None]
        relaxed = ((noise + logits) / self.temperature).sigmoid()
        if self.estimator == "straight-through":
            relaxed = (relaxed > 0.5).to(relaxed) + (relaxed - relaxed.detach())
        return torch.where(is_frozen, is_open, relaxed)

    def hard_gates(self) -> Tensor | None:
        """Return gates for evaluation ``(E, G)``: open where their probability is above one half."""
        if not self.num_gates:
            return None
        logits = self.parameters["gates.logits"].detach()
        return torch.where(self.is_frozen, self.gates_open, (logits > 0).to(logits))

    def gate_probabilities(self) -> Tensor:
        """Return the probability of each gate ``(E, G)``; 0 or 1 once frozen."""
        if not self.num_gates:
            return self.gates_open
        return torch.where(
            self.is_frozen, self.gates_open, self.parameters["gates.logits"].detach().sigmoid()
        )

    def freeze(self) -> None:
        """Make the gates hard for good: those whose probability is above one half stay open."""
        if self.num_gates:
            self.gates_open.copy_(self.hard_gates())
            self.is_frozen.fill_(True)

    # --------------------------------------------------------------------------------------------------- networks
    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return ``x`` (E, B, in) times weights (E, in, out)."""
        if self.multiply_in is None:
            return torch.bmm(x, weight)
        return torch.bmm(x.to(self.multiply_in), weight.to(self.multiply_in)).to(x.dtype)

    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the product plus a bias (E, 1, out)."""
        if self.multiply_in is None:
            return torch.baddbmm(bias, x, weight)
        return self._product(x, weight) + bias

    def _layer(self, x: Tensor, layer: Layer, training: bool, weight: Tensor | None = None) -> Tensor:
        """Apply a layer to ``x`` (E, B, in)."""
        weight = self.parameters[f"{layer.linear}.weight"] if weight is None else weight
        if layer.norm is None:
            x = self._affine(x, weight, self.parameters[f"{layer.linear}.bias"][:, None])
        else:
            scale, shift = (self.parameters[f"{layer.norm}.{key}"] for key in ("weight", "bias"))
            mean, variance = (self.statistics[f"{layer.norm}.running_{key}"] for key in ("mean", "var"))
            if training:
                x = self._batch_norm(self._product(x, weight), layer)
            else:
                factor = scale * (variance + self.eps).rsqrt()
                x = self._affine(x, weight * factor[:, None], (shift - mean * factor)[:, None])
        return functional.elu(x) if layer.has_elu else x

    def _batch_norm(self, x: Tensor, layer: Layer) -> Tensor:
        """Apply the batch norm of a layer to ``x`` (E, B, width) by the statistics of the batch, and keep these."""
        size, rows, width = x.shape
        parts = [self.statistics[f"{layer.norm}.running_{key}"] for key in ("mean", "var")]
        parts += [self.parameters[f"{layer.norm}.{key}"] for key in ("weight", "bias")]
        x = functional.batch_norm(
            x.transpose(0, 1).reshape(rows, size * width),
            *(part.view(-1) for part in parts),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        return x.view(rows, size, width).transpose(0, 1)

    def bottom_up(self, x: Tensor, training: bool) -> Tensor:
        """Return the predictions of all nodes from the data alone.

        Args:
            x: Data ``(E, B, size of a datum)``.
            training: Whether batch norms use the statistics of the batch, and learn from them.

        Returns:
            Means and log-variances side by side ``(E, N, B, 2 d)``.
        """
        for layer in self.encoder:
            x = self._layer(x, layer, training)
        x = self._layer(x, self.bottom_hidden, training)
        size, rows, _ = x.shape
        x = x.reshape(size, rows, self.num_nodes, -1).transpose(1, 2).flatten(0, 1)  # (E N, B, hidden)
        weight, bias = (self.parameters[f"bottom_up.{key}"].flatten(0, 1) for key in ("weight", "bias"))
        return self._affine(x, weight, bias).unflatten(0, (size, self.num_nodes))

    def terms(
        self, bottom_up: Tensor, noise: Tensor, gates: Tensor | None, training: bool, sampled: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the nodes from the guide and compare guide and prior.

        Args:
            bottom_up: What :meth:`bottom_up` returned ``(E, N, B, 2 d)``.
            noise: Standard normal noise ``(N, E, B, d)``.
            gates: Gates ``(E, G)``, in training also ``(E, B, G)``; ``None`` where there are none.
            training: As in :meth:`bottom_up`.
            sampled: Whether to return differences of log-densities at the sampled values instead of divergences.

        Returns:
            Logits of the data ``(E, B, size of a datum)``, divergences ``(E, N, B)`` of the guide from the prior for
            each node, and the nodes ``(E, B, N d)``.
        """
        C, d = self.num_children, self.node_dim
        clamp = MOST_LOG_VAR
        loc, log_var = bottom_up[:, C:].chunk(2, -1)  # (E, R, B, d): nodes without parents
        log_var = log_var.clamp(-clamp, clamp)
        root_noise = noise[C:].transpose(0, 1)
        roots = loc + (0.5 * log_var).exp() * root_noise
        if sampled:
            root_terms = 0.5 * (roots.square() - root_noise.square() - log_var)
        else:
            root_terms = 0.5 * (log_var.exp() + loc.square() - 1 - log_var)
        values = [None] * C + list(roots.unbind(1))  # each (E, B, d)
        if not C:
            nodes = torch.cat(values, -1)
            return self._decode(nodes, training), root_terms.sum(-1), nodes
        between = None if gates is None else gates.split([len(parents) for parents in self.parents[:C]], -1)
        predictions = bottom_up[:, :C].unbind(1)
        locs, log_vars = [None] * C, [None] * C
        for i in reversed(range(C)):
            parents = torch.cat([values[j] for j in self.parents[i]], -1)
            if between is not None:
                gate = between[i][..., None] if between[i].dim() == 3 else between[i][:, None, :, None]
                parents = (parents.unflatten(-1, (-1, d)) * gate).flatten(-2)
            hidden = self._layer(parents, self.posterior[i], training)
            heads = f"posterior.{i}.heads"
            top_down = self._affine(
                hidden, self.parameters[f"{heads}.weight"], self.parameters[f"{heads}.bias"][:, None]
            )
            (loc1, log_var1), (loc2, log_var2) = predictions[i].chunk(2, -1), top_down.chunk(2, -1)
            difference = log_var2 - log_var1
            locs[i] = loc2 + difference.sigmoid() * (loc1 - loc2)
            log_vars[i] = (log_var1 + functional.logsigmoid(difference)).clamp(-clamp, clamp)
            values[i] = locs[i] + (0.5 * log_vars[i]).exp() * noise[i]
        nodes = torch.cat(values, -1)
        loc, log_var = torch.stack(locs, 1), torch.stack(log_vars, 1)  # (E, C, B, d)
        prior_loc, prior_log_var = self._priors(nodes, gates, training).chunk(2, -1)
        prior_log_var = prior_log_var.clamp(-clamp, clamp)
        difference = log_var - prior_log_var
        if sampled:
            inner = torch.stack(values[:C], 1)
            distance = (inner - prior_loc).square() * (-prior_log_var).exp()
            terms = 0.5 * (distance - noise[:C].transpose(0, 1).square() - difference)
        else:
            distance = (loc - prior_loc).square() * (-prior_log_var).exp()
            terms = 0.5 * (difference.exp() + distance - 1 - difference)
        return self._decode(nodes, training), torch.cat([terms, root_terms], 1).sum(-1), nodes

    def _priors(self, nodes: Tensor, gates: Tensor | None, training: bool) -> Tensor:
        """Return the priors' means and log-variances of all nodes with parents ``(E, C, B, 2 d)``."""
        C, N = self.num_children, self.num_nodes
        weight = self.parameters["prior.hidden.weight"]
        if gates is not None and gates.dim() == 3:  # gates of each datum multiply the parents
            size, rows, _ = nodes.shape
            between = (gates @ self._places).view(size, rows, N, C).permute(0, 3, 1, 2)[..., None]
            parents = (nodes.view(size, 1, rows, N, -1) * between).reshape(size * C, rows, -1)
            blocks = (
                weight.view(size, weight.shape[1], C, -1).transpose(1, 2).flatten(0, 1)
            )  # (E C, N d, hidden)
            hidden = self._product(parents, blocks).view(size, C, rows, -1).transpose(1, 2).flatten(2)
            hidden = functional.elu(self._batch_norm(hidden, self.prior))
            return self._prior_heads(hidden)
        if gates is None:
            matrix = self._places.sum(0).view(1, N, 1, C, 1)
        else:
            matrix = (gates @ self._places).view(-1, N, 1, C, 1)
        gated = (weight.view(self.size, N, self.node_dim, C, -1) * matrix).view_as(weight)
        return self._prior_heads(self._layer(nodes, self.prior, training, gated))

    def _prior_heads(self, hidden: Tensor) -> Tensor:
        C = self.num_children
        hidden = hidden.reshape(*hidden.shape[:2], C, -1).transpose(1, 2).flatten(0, 1)  # (E C, B, hidden)
        weight, bias = (self.parameters[f"prior.heads.{key}"].flatten(0, 1) for key in ("weight", "bias"))
        return self._affine(hidden, weight, bias).unflatten(0, (self.size, C))

    def _decode(self, nodes: Tensor, training: bool) -> Tensor:
        x = nodes if self.sees_all else nodes[..., : self.node_dim]
        for layer in self.decoder:
            x = self._layer(x, layer, training)
        return x

    # --------------------------------------------------------------------------------------------------- objective
    def losses(self, x: Tensor, noise: Tensor, gate_noise: Tensor | None) -> Tensor:
        """Return each member's training loss ``(E,)`` in nats per datum: minus the bound, plus the cost of edges.

        Args:
            x: Data of zeros and ones ``(E, B, size of a datum)``.
            noise: Standard normal noise ``(N, E, B, d)``.
            gate_noise: Standard logistic noise ``(E, G)``, or ``(E, B, G)`` for gates of each datum; ``None`` where
                there are no gates.
        """
        gates = self.relaxed_gates(gate_noise)
        logits, divergences, _ = self.terms(self.bottom_up(x, True), noise, gates, True)
        loss = divergences.sum(1).mean(1) - log_likelihood(logits, x).mean(1)
        if self.edge_cost and self.num_gates:
            cost = self.edge_cost * self.parameters["gates.logits"].sigmoid().sum(1)
            loss = loss + torch.where(self.is_frozen[:, 0], torch.zeros_like(cost), cost)
        return loss


def _turned(key: str, value: Tensor) -> Tensor:
    """Return the weights of a linear layer, (out, in) in a state, as (in, out), or back; all else as it is."""
    return value.T.contiguous() if key.endswith("weight") and value.dim() == 2 else value


#: The parts of a node's prior in the state of a model.
PRIOR_STATE = (
    *("hidden.0.weight", "hidden.0.bias", "hidden.1.weight", "hidden.1.bias"),
    *("hidden.1.running_mean", "hidden.1.running_var", "heads.weight", "heads.bias"),
)


def log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """Return the log-probability ``(...)`` of data of zeros and ones by their logits ``(..., size of a datum)``."""
    return (logits * x - functional.softplus(logits)).sum(-1)
