r"""Among sparse faithful inverses, one whose conditionals are smooth.

Every elimination order is faithful, and often several have the fewest edges; but the conditionals that they ask for
are not equally easy. With :math:`z_3 = z_0 z_1` up to noise, :math:`z_1` given :math:`z_0, z_3` is normal about
:math:`z_3 / z_0`: tame where :math:`z_0` keeps away from zero, and a pole where it does not. Which it is, samples of
the model tell. A joint density is the product of its conditionals whatever the order, so that the sum over the sites
of the entropies of their conditionals is the same for every order; with regressions in place of the true conditionals
it is larger, by what the regressions miss (the mean KL divergence from the posterior of the guide that they make).
Linear regressions miss the same in every order with the same cliques, so regressions on squares and products
are taken:

.. math:: \text{score} = \sum_v \operatorname{E}\bigl[-\log t_4\bigl(z_v - \hat z_v(z_{Pa(v)}, x_{Pa(v)})\bigr)\bigr]

on held-out samples, with Student's t of four degrees of freedom at its best scale, so that a few samples near a pole do
not decide. Starting from the sparsest inverse found, neighbours in the elimination order change places as long as that
lowers the score and adds no edge and no sampling level. Models whose own conditionals are linear are left alone.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.inversion import faithful_inverse
from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.guides.features import location_and_scale
from pyro_graphflows.guides.joint_samples import MOST_ROWS, JointSamples, side_by_side

__all__ = ["is_worth_a_search", "joint_rows", "smooth_order"]

NUM_ROWS = 5000
FEWEST_ROWS = 500
MOST_SITES = 64
MOST_PRODUCTS = 12  # inputs up to which products of two are taken, and not squares alone
GAIN = 0.1  # nats; less is not told from noise in the samples
WINSOR = 6.0  # standard deviations
RIDGE = 1e-6  # relative to unit variances
HELD_OUT = 5  # one in this many samples judges the regressions
MOST_SWEEPS = 10


def is_worth_a_search(inverse: InverseGraph) -> bool:
    """Whether there are several orders, and so few sites that the search ends soon."""
    return 1 < len(inverse.sampling_order) <= MOST_SITES


def smooth_order(inverse: InverseGraph, samples: Mapping[str, Tensor]) -> InverseGraph:
    """Return a faithful inverse with no more edges and levels, and smoother conditionals if samples show any.

    Args:
        inverse: A faithful inverse that is an elimination order.
        samples: Joint samples of all nodes with data and all latent sites (unconstrained), ``(n, size)`` each. Nodes
            that are missing are not taken as inputs.

    Returns:
        The new inverse, of order ``"smooth"``; the given one where nothing is gained.

    Example:
        >>> from pyro_graphflows.graphs.model_graph import ModelGraph
        >>> graph = ModelGraph(["ac", "bc", "cx"], observed=["x"])
        >>> a, b, noise = 5 + torch.randn(5000, 1), torch.randn(5000, 1), 0.1 * torch.randn(2, 5000, 1)
        >>> c = a * b + noise[0]
        >>> sample = {"a": a, "b": b, "c": c, "x": c + noise[1]}
        >>> dict(smooth_order(faithful_inverse(graph, ["a", "b", "c"]), sample).parents)
        {'a': ('c',), 'b': ('a', 'c'), 'c': ('x',)}
    """
    if not is_worth_a_search(inverse):
        return inverse
    judge = _Judge(samples)
    if judge.num_rows < FEWEST_ROWS or judge.nonlinearity(inverse.graph) < GAIN:
        return inverse
    best, score = inverse, judge.score(inverse)
    for _ in range(MOST_SWEEPS):
        before = score
        for i in range(len(inverse.sampling_order) - 1):
            order = list(best.sampling_order[::-1])
            first, second = order[i : i + 2]
            if second not in best.parents[first]:
                continue  # changing places would change nothing
            order[i : i + 2] = second, first
            other = faithful_inverse(best.graph, order)
            if other.num_edges > best.num_edges or len(other.levels) > len(best.levels):
                continue
            found = judge.score(other)
            if found < score - GAIN:
                best, score = other, found
        if score == before:
            break
    if best is inverse:
        return inverse
    return InverseGraph(
        best.graph,
        best.parents,
        order="smooth",
        sampling_order=best.sampling_order,
        coupled=best.coupled,
        how=best.how,
    )


def joint_rows(joint: JointSamples, wanted: int = 0) -> dict[str, Tensor] | None:
    """Return joint samples of latent sites and data in rows; None where rows do not show what depends on what.

    That is so where latent sites are in different plates, and where samples of the model are not what its density says.

    Args:
        joint: The model's joint samples.
        wanted: How many rows the guide's start will ask for. If they are enough here they are drawn now, once for
            both; otherwise the random state is left as it is.
    """
    graph, sites = joint.traced.graph, joint.sites
    if not sites or len({graph.plates[site] for site in sites}) > 1:
        return None
    one = next(iter(sites))
    around = set(graph.plates[one])
    nodes: Any = joint.traced.trace.nodes
    copies = torch.Size(nodes[one]["fn"].batch_shape).numel()
    shared = wanted >= NUM_ROWS
    draws = max(2, -(-(min(wanted, MOST_ROWS) if shared else NUM_ROWS) // copies))
    try:
        with nullcontext() if shared else torch.random.fork_rng(devices=[]):
            samples = joint.draw(draws, keep=shared)
    except UnsupportedModelError:
        return None
    data = [name for name in joint.event_dims if set(graph.plates.get(name, ())) <= around]
    return {name: value[:NUM_ROWS] for name, value in side_by_side(samples, [*sites, *data]).items()}


class _Judge:
    """Scores of conditionals, each found once."""

    def __init__(self, samples: Mapping[str, Tensor]) -> None:
        finite = torch.stack([torch.isfinite(value).all(-1) for value in samples.values()]).all(0)
        self.num_rows = int(finite.sum())
        self.samples = {}
        for name, value in samples.items():
            shift, scale = location_and_scale(value[finite].double())
            self.samples[name] = ((value[finite] - shift) / scale).clamp(-WINSOR, WINSOR)
        self.known: dict[tuple[str, tuple[str, ...], bool], float] = {}

    def nonlinearity(self, graph: ModelGraph) -> float:
        """Return by how much squares and products lower the score of the model's own conditionals."""
        total = 0.0
        for node in (*graph.latent, *graph.observed):
            parents = tuple(parent for parent in graph.parents(node) if parent in self.samples)
            if parents and node in self.samples:
                total += self._of(node, parents, True) - self._of(node, parents, False)
        return total

    def score(self, inverse: InverseGraph) -> float:
        """Return the sum over the sites of the mean negative log-densities of residuals."""
        return sum(self._of(site, tuple(parents), False) for site, parents in inverse.parents.items())

    def _of(self, site: str, parents: tuple[str, ...], linear: bool) -> float:
        key = site, parents, linear
        if key not in self.known:
            self.known[key] = self._regress(site, parents, linear)
        return self.known[key]

    def _regress(self, site: str, parents: tuple[str, ...], linear: bool) -> float:
        own = self.samples[site]
        columns = [own.new_ones(len(own), 1)]
        columns += [self.samples[parent] for parent in parents if parent in self.samples]
        inputs = torch.cat(columns, -1)
        if not linear and inputs.shape[-1] <= MOST_PRODUCTS + 1:
            i, j = torch.triu_indices(inputs.shape[-1], inputs.shape[-1])
            inputs = inputs[:, i] * inputs[:, j]  # with the one: constant, inputs, squares, products
        elif not linear:
            inputs = torch.cat([inputs, inputs[:, 1:].square()], -1)
        judging = torch.arange(len(own)) % HELD_OUT == 0
        fitting = inputs[~judging]
        among = fitting.T @ fitting / len(fitting) + RIDGE * torch.eye(fitting.shape[-1]).to(fitting)
        weights = torch.linalg.solve(among, fitting.T @ own[~judging] / len(fitting))
        residual = own[judging] - inputs[judging] @ weights
        covariance = residual.T @ residual / len(residual) + RIDGE * torch.eye(own.shape[-1]).to(residual)
        root = torch.linalg.cholesky(covariance)
        white = torch.linalg.solve_triangular(root, residual.T, upper=False)
        return float(root.diagonal().log().sum() + _log_scales(white).sum())


def _log_scales(rows: Tensor) -> Tensor:
    """Return for each row the least mean of -log t_4(r / s) + log s over scales s, less a constant."""
    log_scales = torch.linspace(-6.0, 1.0, 141).to(rows).view(-1, 1, 1)
    ratio = rows / log_scales.exp()
    return (log_scales.squeeze(-1) + 2.5 * (ratio.square() / 4).log1p().mean(-1)).amin(0)
