r"""Likelihoods: from outputs of a decoder to log-densities, and which data they take.

**Of the nodes of a network** (:class:`Observation`). Data are one row of numbers, the columns of each observed node
after those of the node before. Columns of normal nodes are standardised inside, with the log-density corrected for it,
so that scales that differ by 10⁴ do not matter. The parameters of a node are, for each of its scalars, location and
log-scale (normal), a logit (Bernoulli), or logits of all classes (categorical, whose column holds the number of the
class). Log-scales are bounded smoothly: :math:`\log \sigma = B \tanh(r / B)` in standard units, so that no rate of
learning makes a density overflow. *Features* are what networks see of known nodes: standardised numbers, zeros and
ones, one column per class.

**Of a whole datum** (:class:`DatumLikelihood`), as an image. A normal one is for data in [0, 1]: its mean is a sigmoid,
and each element has a log-variance.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex, TypeAlias

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import Node
from pyro_graphflows.transforms.network import moments
from pyro_graphflows.transforms.structure import slices_of

__all__ = ["HALF_LOG_TWO_PI", "DatumLikelihood", "Likelihood", "Observation"]

#: A likelihood: "normal", "bernoulli", ("categorical", number of classes), or a function from a decoder's outputs to a
#: distribution of the data. Nodes of a network take the first three; a Graph VAE takes the first two and functions.
Likelihood: TypeAlias = str | tuple[str, int] | Callable[[Tensor], dist.TorchDistribution]

HALF_LOG_TWO_PI = 0.9189385332046727


class Observation(nn.Module):
    """The likelihoods of some nodes, and the standardisation of their data.

    Args:
        sizes: The number of columns of each node, in order.
        likelihoods: The likelihood of each node that has one; nodes without are inputs, whose columns are numbers.

    Attributes:
        columns: Where each node's columns are in the data.
        features: Where each node's columns are among the features.
        parameter_nodes: The node that each parameter belongs to.
        loc: The location of each column, zero where it is not a normal number.
        scale: The scale of each column.
        units_are_kept: Whether the parameters were set for the present units.

    Raises:
        GraphflowsError: If a likelihood is not known.

    Example:
        >>> observation = Observation({"a": 1, "b": 2}, {"a": "normal", "b": "bernoulli"})
        >>> observation.parameter_nodes, observation.columns["b"]
        (('a', 'a', 'b', 'b'), slice(1, 3, None))
    """

    log_scale_bound = 7.0  # B, in nats
    loc: Tensor
    scale: Tensor
    _normal: Tensor
    _bernoulli: Tensor

    def __init__(self, sizes: Mapping[Node, int], likelihoods: Mapping[Node, Likelihood]) -> None:
        super().__init__()
        kinds = {node: _parse(node, given) for node, given in likelihoods.items()}
        self.sizes = dict(sizes)
        self.kinds = kinds
        self.columns = dict(slices_of(sizes))
        self.features = dict(
            slices_of({n: size * max(1, kinds.get(n, ("", 0))[1]) for n, size in sizes.items()})
        )
        self.num_columns = sum(sizes.values())
        self.num_features = max((part.stop for part in self.features.values()), default=0)
        normal = [node for node in kinds if kinds[node][0] == "normal"]
        bernoulli = [node for node in kinds if kinds[node][0] == "bernoulli"]
        self._categorical = [node for node in kinds if kinds[node][0] == "categorical"]
        self.num_normal = sum(sizes[node] for node in normal)
        self.num_bernoulli = sum(sizes[node] for node in bernoulli)
        # Parameters: all locations, all log-scales, all logits, then the classes of each categorical column.
        owners: list[Node] = [
            *_repeated(normal, sizes),
            *_repeated(normal, sizes),
            *_repeated(bernoulli, sizes),
        ]
        for node in self._categorical:
            owners += [node] * (sizes[node] * kinds[node][1])
        self.parameter_nodes = tuple(owners)
        self._own: dict[Node, list[int]] = {node: [] for node in kinds}
        for i, node in enumerate(owners):
            self._own[node].append(i)
        self._is_number = [
            node not in kinds or kinds[node][0] == "normal" for node in _repeated(list(sizes), sizes)
        ]
        self._all_normal = len(normal) == len(sizes)
        self.register_buffer("_normal", torch.tensor(self._of(normal), dtype=torch.long), persistent=False)
        self.register_buffer(
            "_bernoulli", torch.tensor(self._of(bernoulli), dtype=torch.long), persistent=False
        )
        self.units_are_kept = False
        self.register_buffer("loc", torch.zeros(self.num_columns))
        self.register_buffer("scale", torch.ones(self.num_columns))

    def _of(self, nodes: Sequence[Node]) -> list[int]:
        return [i for node in nodes for i in range(self.columns[node].start, self.columns[node].stop)]

    @property
    def num_parameters(self) -> int:
        """The number of parameters of all nodes."""
        return len(self.parameter_nodes)

    def own(self, node: Node) -> list[int]:
        """Return the numbers of a node's parameters: all locations and then all log-scales, or all logits."""
        return self._own[node]

    def log_scales(self, node: Node) -> list[int]:
        """Return the numbers of the parameters that are log-scales of a node; none if it is not normal."""
        return self._own[node][self.sizes[node] :] if self.kinds[node][0] == "normal" else []

    @property
    def has_units(self) -> bool:
        """Whether data were standardised by moments, here or in a loaded state, or the units they have are to stay."""
        return self.units_are_kept or bool(self.loc.any()) or bool((self.scale != 1).any())

    @torch.no_grad()
    def standardize_(self, x: Tensor) -> None:
        """Standardise by the moments of data: columns of normal nodes and inputs.

        Args:
            x: Shape (n, columns), at least two rows.

        Raises:
            GraphflowsError: If there are fewer than two rows or a value is not finite.
        """
        rows = self.check(x).reshape(-1, self.num_columns)
        if len(rows) < 2:
            raise GraphflowsError(f"Expected at least two rows of data; got {len(rows)}.")
        loc, scale = moments(rows)
        number = torch.tensor(self._is_number, device=rows.device)
        self.loc.copy_(torch.where(number, loc, torch.zeros_like(loc)))
        self.scale.copy_(torch.where(number, scale, torch.ones_like(scale)))

    def check(self, x: Tensor) -> Tensor:
        """Return the data.

        Raises:
            GraphflowsError: If the number of columns or the type of the numbers is wrong, or a value is not finite or
                none of its likelihood's.
        """
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.num_columns,):
            names = ", ".join(
                f"{n} ({size})" if size > 1 else str(n) for n, size in list(self.sizes.items())[:20]
            )
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise GraphflowsError(
                f"Expected a tensor with x.shape[-1] == {self.num_columns}, the columns of {names}; got {got}."
            )
        if x.dtype != self.loc.dtype:
            raise GraphflowsError(
                f"Expected data of the model's dtype {self.loc.dtype}; got {x.dtype}. Convert the one or the other: "
                "x.to(dtype) or model.to(dtype)."
            )
        if not bool(x.isfinite().all()):
            bad = [str(n) for n, part in self.columns.items() if not bool(x[..., part].isfinite().all())]
            raise GraphflowsError(
                f"Expected finite data; the columns of {', '.join(bad)} are not. Missing values are not handled: leave "
                "such rows out, or fill them in."
            )
        if not self._all_normal:
            self._check_values(x.detach())
        return x

    def _check_values(self, x: Tensor) -> None:
        """Check the columns of Bernoulli and categorical nodes."""
        for node, (kind, classes) in self.kinds.items():
            if kind == "normal":
                continue
            part = self.columns[node]
            values = x[..., part]
            if kind == "bernoulli":
                good, wanted = (values == 0) | (values == 1), "zeros and ones"
            else:
                good = (values >= 0) & (values < classes) & (values == values.floor())
                wanted = f"class numbers 0 to {classes - 1}"
            if not bool(good.all()):
                raise GraphflowsError(
                    f"Expected {wanted} in the columns of {node} ({part.start} to {part.stop - 1}), whose likelihood "
                    f"is {kind}; got {values[~good][0]:g}."
                )

    def to_features(self, x: Tensor) -> Tensor:
        """Return what networks see of data, (*batch, features) of (*batch, columns)."""
        standard = (x - self.loc) / self.scale
        if not self._categorical:
            return standard
        parts = []
        for node, part in self.columns.items():
            kind, classes = self.kinds.get(node, ("", 0))
            if kind == "categorical":
                parts.append(F.one_hot(x[..., part].long(), classes).flatten(-2).to(x.dtype))
            else:
                parts.append(standard[..., part])
        return torch.cat(parts, -1)

    def log_scale(self, raw: Tensor) -> Tensor:
        """Return bounded log-scales in standard units."""
        return self.log_scale_bound * torch.tanh(raw / self.log_scale_bound)

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        r"""Return the log-density of data, summed over all nodes with a likelihood.

        Args:
            parameters: Shape (\*batch, number of parameters).
            x: Shape (\*batch, columns); batch shapes broadcast.

        Returns:
            Shape (\*batch).
        """
        n, b = self.num_normal, self.num_bernoulli
        total = parameters.new_zeros(())
        if n:
            loc, scale = self.loc, self.scale
            if not self._all_normal:
                x_normal, loc, scale = x[..., self._normal], loc[self._normal], scale[self._normal]
            else:
                x_normal = x
            log_scale = self.log_scale(parameters[..., n : 2 * n])
            deviation = ((x_normal - loc) / scale - parameters[..., :n]) * torch.exp(-log_scale)
            terms = torch.addcmul(log_scale, deviation, deviation, value=0.5).sum(-1)
            total = total - terms - (scale.log().sum() + n * HALF_LOG_TWO_PI)
        if b:
            logits = parameters[..., 2 * n : 2 * n + b]
            total = total + (x[..., self._bernoulli] * logits - F.softplus(logits)).sum(-1)
        for node in self._categorical:
            log_probs = self._classes(parameters, node).log_softmax(-1)
            index = x[..., self.columns[node]].long().unsqueeze(-1)
            index = index.expand(*log_probs.shape[:-1], 1)
            total = total + log_probs.gather(-1, index).squeeze(-1).sum(-1)
        return total

    def _classes(self, parameters: Tensor, node: Node) -> Tensor:
        return parameters[..., self._own[node]].unflatten(-1, (self.sizes[node], self.kinds[node][1]))

    def distribution(self, parameters: Tensor, node: Node) -> dist.TorchDistribution:
        r"""Return the distribution of one node, with event shape (size,), or () for a node of one column."""
        own, size, kind = parameters[..., self._own[node]], self.sizes[node], self.kinds[node][0]
        part = self.columns[node]
        if kind == "normal":
            loc = own[..., :size] * self.scale[part] + self.loc[part]
            scale = self.log_scale(own[..., size:]).exp() * self.scale[part]
            found = dist.Normal(*((loc, scale) if size > 1 else (loc.squeeze(-1), scale.squeeze(-1))))
        elif kind == "bernoulli":
            found = dist.Bernoulli(logits=own if size > 1 else own.squeeze(-1))
        else:
            logits = self._classes(parameters, node)
            found = dist.Categorical(logits=logits if size > 1 else logits.squeeze(-2))
        return found.to_event(1) if size > 1 else found

    def mean(self, parameters: Tensor) -> Tensor:
        r"""Return the mean of each column (the most probable class of a categorical one), (\*batch, columns)."""
        x = self.loc.expand(*parameters.shape[:-1], -1).clone()
        for node, (kind, _) in self.kinds.items():
            own, part, size = parameters[..., self._own[node]], self.columns[node], self.sizes[node]
            if kind == "normal":
                x[..., part] = own[..., :size] * self.scale[part] + self.loc[part]
            elif kind == "bernoulli":
                x[..., part] = torch.sigmoid(own)
            else:
                x[..., part] = self._classes(parameters, node).argmax(-1).to(x.dtype)
        return x


@dataclass(frozen=True)
class DatumLikelihood:
    """The likelihood of a whole datum of some shape.

    Args:
        likelihood: ``"bernoulli"``, ``"normal"`` or a function from a decoder's outputs ``(*batch, number of outputs)``
            to a distribution whose event shape is ``shape``.
        shape: The shape of one datum.

    Raises:
        GraphflowsError: If the likelihood is neither a known name nor a function.
    """

    likelihood: Likelihood
    shape: torch.Size

    def __post_init__(self) -> None:
        if not callable(self.likelihood) and self.likelihood not in ("bernoulli", "normal"):
            raise GraphflowsError(
                f"Expected likelihood 'bernoulli', 'normal' or a function; got {self.likelihood!r}."
            )

    @property
    def num_outputs(self) -> int:
        """How many outputs the default decoder has."""
        return self.shape.numel() * (2 if self.likelihood == "normal" else 1)

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Return the distribution of the data given the decoder's outputs.

        Args:
            outputs: The outputs ``(*batch, number of outputs)``: logits for ``"bernoulli"``, means (before the sigmoid)
                followed by log-variances for ``"normal"``.

        Returns:
            A distribution with that event shape.

        Raises:
            GraphflowsError: If there are too many or too few outputs for a likelihood by name, or a function returns no
                distribution.
        """
        if callable(self.likelihood):
            found = self.likelihood(outputs)
            if not isinstance(found, dist.Distribution):
                raise GraphflowsError(
                    "Expected the likelihood to return a distribution of pyro.distributions; got a "
                    f"{type(found).__name__}."
                )
            return found
        if outputs.shape[-1] != self.num_outputs:
            raise GraphflowsError(
                f"Expected the decoder to return {self.num_outputs} numbers for each datum of shape "
                f"{tuple(self.shape)} and likelihood={self.likelihood!r}; got {outputs.shape[-1]}."
            )
        event_dim, full = len(self.shape), (*outputs.shape[:-1], *self.shape)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=outputs.reshape(full)).to_event(event_dim)
        loc, log_var = outputs.chunk(2, -1)
        scale = (0.5 * log_var).exp()
        return dist.Normal(loc.sigmoid().reshape(full), scale.reshape(full)).to_event(event_dim)

    def check(self, x: Tensor) -> None:
        """Refuse data that the likelihood cannot have made; a function takes all values.

        Raises:
            GraphflowsError: If there are values outside of {0, 1} for ``"bernoulli"``, or of [0, 1] for ``"normal"``.
        """
        if self.likelihood == "bernoulli" and not ((x == 0) | (x == 1)).all():
            raise GraphflowsError(
                "Expected data of zeros and ones for likelihood='bernoulli'; got other values, from "
                f"{x.min().item():g} to {x.max().item():g}. Binarise them (datasets.binarize), or use "
                "likelihood='normal'."
            )
        if self.likelihood == "normal" and not ((x >= 0) & (x <= 1)).all():
            raise GraphflowsError(
                "Expected data in [0, 1] for likelihood='normal', whose mean is a sigmoid; got values from "
                f"{x.min().item():g} to {x.max().item():g}. Scale them (datasets.dequantize), or give a likelihood "
                "of your own."
            )


def _repeated(nodes: Sequence[Node], sizes: Mapping[Node, int]) -> list[Node]:
    return [node for node in nodes for _ in range(sizes[node])]


def _parse(node: Node, given: Likelihood) -> tuple[str, int]:
    if given in ("normal", "bernoulli"):
        return str(given), 0
    if isinstance(given, tuple) and len(given) == 2 and given[0] == "categorical":
        classes = operator.index(given[1]) if isinstance(given[1], SupportsIndex) else 0
        if classes >= 2:
            return "categorical", classes
    raise GraphflowsError(
        f"Expected the likelihood of {node} to be 'normal', 'bernoulli' or ('categorical', number of classes); "
        f"got {given!r}."
    )
