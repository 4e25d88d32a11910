"""The flows that benchmarks/flows.py compares: ours and others, each by the log-density of a batch.

Every one has ``inverse_terms(y)``, which returns the noise, and minus the log-determinant (a number for each
variable or one for each datum).
"""

import networkx as nx
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pyro_graphflows import faithful_residual, graphical_residual, load_network

BLOCKS = 4


def few_parents(dim, most=4):
    """A random DAG in which every variable has at most 4 parents among the 100 before it."""
    rng = np.random.default_rng(0)
    dag = nx.DiGraph()
    dag.add_nodes_from(range(dim))
    for v in range(1, dim):
        dag.add_edges_from((int(p), v) for p in set(rng.integers(max(0, v - 100), v, most)))
    return dag


def whole_network(name):
    """A published Gaussian network with all of its nodes."""
    return nx.DiGraph(load_network(name).graph().to_networkx())


class FullJacobian(nn.Module):
    """The blocks of one of our (dense) networks, with log-determinants from the Jacobian of each datum."""

    def __init__(self, network, batched):
        super().__init__()
        self.network, self.batched = network, batched

    def inverse_terms(self, y):
        """Return the noise and minus the log-determinants."""
        total = 0
        for block in self.network.blocks:
            first, second = block.entries()
            pre = F.linear(y, first, block.layers[0].bias)
            value, slope = block.activation.forward_and_derivative(pre)
            y = y + F.linear(value, second, block.layers[1].bias)
            eye = torch.eye(y.shape[-1], dtype=y.dtype)
            if self.batched:
                total = total + torch.linalg.slogdet(eye + (second * slope[:, None, :]) @ first)[1]
            else:
                total = total + torch.stack(
                    [torch.linalg.slogdet(eye + (second * row) @ first)[1] for row in slope]
                )
        return y, -total


class DenseResidual(nn.Module):
    """Residual blocks with full weights: spectral norms by power iteration, log-determinants by a power series."""

    def __init__(self, dim, terms=8):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.terms = terms
        self.blocks = nn.ModuleList(
            nn.ModuleList([norm(nn.Linear(dim, 4 * dim)), norm(nn.Linear(4 * dim, dim))])
            for _ in range(BLOCKS)
        )

    def inverse_terms(self, y):
        """Return the noise and minus the log-determinants."""
        total = 0
        for first, second in self.blocks:
            weight, bias = first.weight, first.bias  # each access of the weight is a power iteration
            last, last_bias = second.weight, second.bias
            pre = F.linear(y, weight, bias)
            value = F.elu(0.9 * pre)
            slope = 0.9 * pre.clamp(max=0).exp()
            v = w = torch.randn_like(y)
            for k in range(1, self.terms + 1):
                w = F.linear(F.linear(w, 0.9 * weight) * slope, last)
                total = total + (-1) ** (k + 1) / k * (w * v).sum(-1)
            y = y + 0.9 * F.linear(value, last, last_bias)
        return y, -total


class Zuko(nn.Module):
    """The masked autoregressive flow of zuko with the same adjacency."""

    def __init__(self, dim, graph):
        super().__init__()
        import zuko

        adjacency = torch.eye(dim, dtype=torch.bool)
        for parent, child in graph.edges:
            adjacency[child, parent] = True
        self.flow = zuko.flows.MAF(dim, transforms=BLOCKS, adjacency=adjacency, hidden_features=[4 * dim])

    def inverse_terms(self, y):
        """Return the noise and minus the log-determinants."""
        eps, ladj = self.flow().transform.call_and_ladj(y)
        return eps, -ladj

    def sample(self, eps):
        """Return values and minus the log-determinant of the way back."""
        transform = self.flow().transform
        y, ladj = transform.inv.call_and_ladj(eps)
        return y, ladj


class OfPyro(nn.Module):
    """Pyro's inverse autoregressive flow, or its block autoregressive flow."""

    def __init__(self, dim, kind):
        super().__init__()
        from pyro.distributions.transforms import affine_autoregressive, block_autoregressive

        if kind == "iaf":
            parts = [affine_autoregressive(dim, [4 * dim]) for _ in range(BLOCKS)]
        else:
            parts = [block_autoregressive(dim, hidden_factors=[4], residual="gated") for _ in range(BLOCKS)]
        self.parts = nn.ModuleList(parts)

    def inverse_terms(self, y):
        """Return the noise and minus the log-determinants."""
        total = 0
        for part in self.parts:
            part.clear_cache()  # or the graph of the last call is found there
            x, y = y, part(y)
            total = total + part.log_abs_det_jacobian(x, y)
        return y, -total


METHODS = {
    "FaithfulResidual": lambda dim: faithful_residual(few_parents(dim), [4 * dim], BLOCKS).network,
    "GraphicalResidual": lambda dim: graphical_residual(few_parents(dim), [4 * dim], BLOCKS).network,
    "zuko MAF": lambda dim: Zuko(dim, few_parents(dim)),
    "Pyro IAF": lambda dim: OfPyro(dim, "iaf"),
    "Pyro BNAF": lambda dim: OfPyro(dim, "bnaf"),
    "dense residual": DenseResidual,
}
OURS = ("FaithfulResidual", "GraphicalResidual")


# Inversion: the same residual blocks by other ways, and weights that make it hard


def banach(evaluation, z, most=100_000):
    """Invert by fixed-point iteration, features first; return the values and the number of steps."""
    y, steps = z, 0
    for _ in range(most):
        steps += 1
        following = z - evaluation.columns(y)[0]
        if torch.equal(following, y) or (following - y).abs().max() <= 1e-14 * (1 + y.abs().max()):
            break
        y = following
    return y, steps


def plain_newton(evaluation, z, most=100):
    """Invert by Newton's method on the diagonal, without safeguard."""
    y, steps = z, 0
    for _ in range(most):
        steps += 1
        change, diagonal = evaluation.columns(y)
        step = (y + change - z) / (1 + diagonal)
        y = y - step
        if step.abs().max() <= 1e-14 * (1 + y.abs().max()):
            break
    return y, steps


def invert(network, z, method):
    """Sample from a density-direction flow by ``method``; return values, minus log-diagonals, and steps."""
    y, total, steps = z.T.contiguous(), 0, 0
    for evaluation in reversed(network.prepare()):
        y, count = method(evaluation, y)
        total = total - evaluation.columns(y)[1].log1p()
        steps += count
    return y.T, total.T, steps


def slow_flow(graph, c):
    """One block that contracts every variable at the bound: f(y) = (1 - c²) y above zero, where Banach is slowest."""
    network = graphical_residual(
        graph, num_blocks=1, lipschitz=c, activation="elu", engine="dense"
    ).network.double()
    (block,) = network.blocks
    first, second = block.layers
    units = first.out_features // len(graph)
    for layer in (first, second):
        layer.weight.zero_()
    for v in range(len(graph)):
        first.weight[v * units, v] = 10.0
        second.weight[v, v * units] = -10.0
    return network


def random_flow(graph, c):
    """Random weights that all contract, at their bound."""
    network = graphical_residual(graph, num_blocks=BLOCKS, lipschitz=c, activation="tanh").network.double()
    for block in network.blocks:
        first, second = block.layers
        first.weight.abs_().mul_(10)
        second.weight.abs_().mul_(-10)
    return network
