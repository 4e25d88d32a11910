r"""Whether the elements of a vector are a chain given everything else: each depends on few neighbours in the row.

A graph of elements says which element reads which. It cannot tell a chain in other words from a dense vector: the steps
of a random walk are independent in the model, every datum depends on all before it, and yet their running sums are a
chain. What matters is which elements meet in a term of the joint log-density,

.. math:: \frac{\partial^2 \log p}{\partial u_i\, \partial u_j} \ne 0,

and that is a matrix that derivatives find by a few products: a matrix with 2 k + 1 diagonals by as many (Curtis, Powell
and Reid 1974), and one with random weights says whether there are more. It is looked at in several points, as any
structure that is seen in derivatives must be, and for the running sums if not for the vector itself.

Where the second derivatives are the same in all points, the posterior is normal, and they give it without error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_graphflows.inspect.elements import elementwise_jacobian
from pyro_graphflows.inspect.runs import support_of
from pyro_graphflows.inspect.trace import Rerun, RerunError, density, differentiable

__all__ = ["Chain", "NormalField", "find_chain"]

POINTS = 3
WIDEST = 4  # of the bands that are looked for
SAME = 1e-3  # relative to the largest derivative: float32


@dataclass(frozen=True)
class NormalField:
    r"""A log-density that is quadratic: :math:`-\tfrac12 u^\top \Lambda u + u^\top (B x + c)`.

    Attributes:
        precision: :math:`\Lambda`, ``(n, n)``, in float64.
        weights: B for each of the observed children, ``(n, size)``.
        offset: c, ``(n,)``.
    """

    precision: Tensor
    weights: Mapping[str, Tensor]
    offset: Tensor

    @property
    def moments(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The weights of the mean by child, its intercept, and the Cholesky factor of the covariance."""
        root = torch.linalg.cholesky(self.precision)
        covariance = torch.cholesky_inverse(root)
        slopes = {name: covariance @ matrix for name, matrix in self.weights.items()}
        return slopes, covariance @ self.offset, torch.linalg.cholesky((covariance + covariance.mT) / 2)


@dataclass(frozen=True)
class Chain:
    """How the elements of a vector meet each other and the sites that depend on them.

    Attributes:
        width: How far in the row elements are that meet.
        differences: Whether it is the running sums of the vector that are the chain.
        reads: For each child that depends on the vector, which of its elements (rows) meet which of the chain.
        field: The log-density, where it is quadratic; None where it is not. Data in plates that the vector is outside
            of are part of its offset.
        learned: Whether the model has parameters with which the log-density changes in training.
    """

    width: int
    differences: bool
    reads: Mapping[str, np.ndarray] = field(default_factory=dict)
    field: NormalField | None = None
    learned: bool = False


@dataclass(frozen=True)
class _Point:
    """The derivatives of the joint log-density at one point.

    Attributes:
        vector: The chain, or what is tried as one, ``(*batch, n)``; a leaf.
        gradient: The gradient by it.
        data: The observed children, leaves where gradients exist.
        nodes: The sites of the run.
    """

    vector: Tensor
    gradient: Tensor
    data: Mapping[str, Tensor]
    nodes: Any

    def back(self, weights: Tensor, by: Tensor | None = None) -> Tensor:
        """Return the derivatives of a weighted sum of the gradient, by the vector or by data."""
        by = self.vector if by is None else by
        if not self.gradient.requires_grad:
            return torch.zeros_like(by)
        (found,) = torch.autograd.grad(
            self.gradient, by, weights.expand_as(self.gradient), retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(by) if found is None else found

    def band(self, width: int) -> Tensor | None:
        """Return the second derivatives, ``(*batch, n, 2 width + 1)``; None if they are not all near the diagonal."""
        size = self.vector.shape[-1]
        index = torch.arange(size, device=self.vector.device)
        weights = 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(0)).to(self.vector)
        probe, explained = self.back(weights), torch.zeros_like(self.vector)
        period = 2 * width + 1
        found = self.vector.new_zeros(*self.vector.shape, period)
        for phase in range(period):
            row = index + (phase - index + width) % period - width  # the chosen one near each
            inside = (row >= 0) & (row < size)
            own = self.back((index % period == phase).to(self.vector)) * inside
            explained = explained + weights[row.clamp(0, size - 1)] * own
            found[..., index, row - index + width] = own
        tolerance = SAME * float(probe.abs().max()) + 1e-12
        close = bool(((explained - probe).abs() <= tolerance).all())
        return found.detach() if close and bool(torch.isfinite(probe).all()) else None


def find_chain(
    rerun: Rerun,
    name: str,
    to_vector: Callable[[Tensor], Tensor],
    to_value: Callable[[Tensor], Tensor],
) -> Chain | None:
    """Return how the elements of a vector site are a chain given all other sites; None if they are not.

    Args:
        rerun: The traced model.
        name: A latent site whose elements are constrained one by one.
        to_vector: From a value of the site to its unconstrained vector.
        to_value: Back.
    """
    for differences in (False, True):
        try:
            chain = _chain(rerun, name, (to_vector, to_value), differences)
        except RerunError:
            return None
        if chain is not None:
            return chain
    return None


def _chain(rerun: Rerun, name: str, maps: tuple[Callable, Callable], differences: bool) -> Chain | None:
    width: int | None = None
    reads: dict[str, np.ndarray] = {}
    fields: list[NormalField | None] = []
    for number in range(POINTS):
        point = _point(rerun, name, maps, differences, number)
        size = point.vector.shape[-1]
        widths = range(min(WIDEST, size - 1) + 1) if width is None else [width]
        band = None
        for width in widths:
            band = point.band(width)
            if band is not None:
                break
        if band is None or width is None:
            return None
        for child in _readable_children(rerun, name):
            seen = elementwise_jacobian(point.nodes[child], {name: point.vector}, rerun.sites)
            if name in seen:
                reads[child] = reads.get(child, False) | seen[name]
        fields.append(_field(point, band, width, reads))
    assert width is not None
    chain = Chain(width, differences, reads)
    first = fields[0]
    if first is None or not all(other is not None and _same(first, other) for other in fields[1:]):
        return chain
    return replace(chain, field=first, learned=_is_learned(rerun))


def _is_learned(rerun: Rerun) -> bool:
    """Return whether the log-density has derivatives by anything but the values of sites."""
    values = {name: rerun.values[name].detach() for name in rerun.sites if name in rerun.values}
    trace = rerun.at(values, gradients=True)
    return any(density(trace.nodes[site]).requires_grad for site in rerun.sites if site in trace.nodes)


def _readable_children(rerun: Rerun, name: str) -> list[str]:
    """Return the sites that depend on a vector and are in no plate that the vector is outside of."""
    graph = rerun.graph
    return [
        site
        for site in rerun.sites
        if name in graph.parents(site)
        and set(graph.plates[site]) <= set(graph.plates[name])
        and site in rerun.values
        and rerun.values[site].numel()
    ]


def _point(
    rerun: Rerun, name: str, maps: tuple[Callable, Callable], differences: bool, number: int
) -> _Point:
    """Return the derivatives at a draw of the latents, and after the first point of the data as well."""
    to_vector, to_value = maps
    graph = rerun.graph
    given = {site: value for site, value in rerun.values.items() if site in graph.observed}
    drawn = rerun.at(given, seed=number + 1)
    values = {
        site: drawn.nodes[site]["value"] for site in rerun.sites if site not in rerun.traced.without_data
    }
    data = {
        site: values[site].detach()
        for site in _readable_children(rerun, name)
        if site in graph.observed and differentiable(values[site])
    }
    generator = torch.Generator().manual_seed(number)
    for site, value in data.items():
        if number and _is_real(rerun.sites[site]):
            noise = torch.randn(value.shape, generator=generator).to(value)
            value = value + noise * (value.std() if value.numel() > 1 else 1.0)
        data[site] = value.clone().requires_grad_()
    vector = to_vector(values[name]).detach()
    vector = vector + 0.1 * torch.randn(vector.shape, generator=generator).to(vector)
    vector = (vector.cumsum(-1) if differences else vector).requires_grad_()
    with torch.enable_grad():
        flat = torch.diff(vector, prepend=torch.zeros_like(vector[..., :1])) if differences else vector
        trace = rerun.at({**values, **data, name: to_value(flat)}, gradients=True, seed=number + 1)
        total = sum(density(trace.nodes[site]).sum() for site in rerun.sites if site in trace.nodes)
        assert isinstance(total, Tensor)
        if not bool(torch.isfinite(total)):
            raise RerunError(f"The model has no finite log-density near a draw of {name}.")
        (gradient,) = torch.autograd.grad(total, vector, create_graph=True, allow_unused=True)
        gradient = torch.zeros_like(vector) if gradient is None else gradient
    return _Point(vector, gradient, data, trace.nodes)


def _is_real(site: Any) -> bool:
    support: Any = support_of(site["fn"])
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return bool(support is torch.distributions.constraints.real)


def _field(point: _Point, band: Tensor, width: int, reads: Mapping[str, np.ndarray]) -> NormalField | None:
    """Return the quadratic that has the derivatives of a point; None where rows of a plate differ, or it is none."""
    size = point.vector.shape[-1]
    rows = -band.double().reshape(-1, size, 2 * width + 1)
    if not _alike(rows):
        return None
    precision = rows.new_zeros(size, size)
    for offset in range(-width, width + 1):
        index = torch.arange(max(-offset, 0), size - max(offset, 0))
        precision[index, index + offset] = rows[0, index, offset + width]
    precision = (precision + precision.mT) / 2
    if torch.linalg.cholesky_ex(precision)[1]:
        return None
    vector, gradient = (part.detach().double().reshape(-1, size) for part in (point.vector, point.gradient))
    offset_ = gradient + vector @ precision
    weights = {}
    for child, values in point.data.items():
        if child not in reads:
            continue
        found = _mixed(point, values, reads[child])
        if found is None:
            return None
        weights[child] = found
        flat = values.detach().double().reshape(-1, found.shape[1])
        if flat.shape[0] not in (1, len(vector)):
            return None
        offset_ = offset_ - flat @ found.mT
    if set(weights) != set(reads) or not _alike(offset_, float(gradient.abs().max())):
        return None
    return NormalField(precision, weights, offset_.mean(0))


def _mixed(point: _Point, values: Tensor, pattern: np.ndarray) -> Tensor | None:
    """Return the derivatives of the gradient by data, ``(n, size)``; None where rows of a plate differ."""
    number, size = pattern.shape
    colours = _colours(pattern)
    if values.numel() % number:
        return None
    found = point.gradient.new_zeros(size, number, dtype=torch.float64)
    seen = torch.from_numpy(pattern).to(point.vector.device)
    for colour in range(int(colours.max()) + 1 if size else 0):
        chosen = torch.from_numpy(colours == colour).to(point.vector.device)
        own = point.back(chosen.to(point.vector), values).detach().double().reshape(-1, number)
        row, element = (seen & chosen).nonzero().unbind(1)  # one element for each row at most
        if not _alike(own[:, row]):
            return None
        found[element, row] = own[0, row]
    return found


def _colours(pattern: np.ndarray) -> np.ndarray:
    """Return numbers of the columns, different ones where two columns share a row."""
    colours = np.full(pattern.shape[1], -1)
    for column in range(pattern.shape[1]):
        near = pattern[pattern[:, column]].any(0)
        taken = set(colours[near].tolist())
        colours[column] = next(c for c in range(len(taken) + 1) if c not in taken)
    return colours


def _alike(rows: Tensor, scale: float = 0.0) -> bool:
    """Whether all rows are the same within rounding."""
    if not rows.numel():
        return True
    return bool(((rows - rows[:1]).abs() <= SAME * max(float(rows.abs().max()), scale)).all())


def _same(one: NormalField, other: NormalField) -> bool:
    pairs = [(one.precision, other.precision), (one.offset, other.offset)]
    pairs += [(one.weights[name], other.weights[name]) for name in one.weights]
    scale = max(float(other.offset.abs().max()), float(one.precision.abs().max()))
    return all(_alike(torch.stack(pair), scale) for pair in pairs)
