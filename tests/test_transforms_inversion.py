"""Inversion as a property: every bound, any weights, graph, precision, batch shape and size of input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_graphflows.transforms import FaithfulResidualNN, FlowStructure, GraphicalResidualNN

FAMILIES = (FaithfulResidualNN, GraphicalResidualNN)


def random_dag(size, seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator).tolist()
    coin = torch.rand(size, size, generator=generator) < 0.35
    parents = [()] * size
    for i, v in enumerate(order):
        parents[v] = tuple(p for p in order[:i] if coin[v, p])
    return tuple(parents)


structures = st.one_of(
    st.just(FlowStructure(((),))),  # one node
    st.integers(2, 6).map(lambda n: FlowStructure(tuple(() for _ in range(n)))),  # no edges
    st.integers(2, 6).map(lambda n: FlowStructure(tuple(tuple(range(v)) for v in range(n)))),  # full
    st.integers(3, 9).map(lambda n: FlowStructure(((), *((v,) for v in range(n - 1))))),  # chain
    st.tuples(st.integers(2, 8), st.integers(0, 10**6)).map(lambda drawn: FlowStructure(random_dag(*drawn))),
)


@st.composite
def networks(draw, closed_form=None):
    """A flow of either family with cold, trained, random or adversarially contractive weights."""
    family = draw(st.sampled_from(FAMILIES))
    weights = draw(st.sampled_from(["cold", "trained", "random", "contractive"]))
    options = {
        "closed_form": closed_form or draw(st.sampled_from(["density", "sampling"])),
        "lipschitz": draw(st.sampled_from([0.9, 0.97, 0.99, 0.999])),
        "activation": "tanh"
        if weights == "contractive"
        else draw(st.sampled_from(["elu", "tanh", "lipmish"])),
        "engine": draw(st.sampled_from(["dense", "sparse"])),
        "num_blocks": draw(st.sampled_from([1, 4])),
        "units_per_variable": 4,
    }
    if family is GraphicalResidualNN:
        options["allow_short"] = True
    torch.manual_seed(draw(st.integers(0, 10**6)))
    network = family(draw(structures), **options)
    if weights == "trained":
        train(network)
    elif weights != "cold":
        with torch.no_grad():
            if family is FaithfulResidualNN:
                weaken(network) if weights == "contractive" else roughen(network)
            else:
                for block in network.blocks:
                    first, last = block.layers
                    if weights == "contractive":  # the last layer undoes the first, at the bound
                        mask = last.sparse_mask().indices
                        first.weight.mul_(20)
                        undo = -20 * first.masked_weight().T
                        last.weight.copy_(undo if last.engine == "dense" else undo[mask[0], mask[1]])
                    else:
                        first.weight.normal_().mul_(3)
                        last.weight.normal_().mul_(3)
    return network


def roughen(network):
    for parameter in network.parameters():
        parameter.normal_()
    network.stack.log_scale.zero_()


def weaken(network):
    """Slope 1 − c on an interval around zero in all blocks, 1 outside."""
    network.stack.inner.abs_().add_(0.1)
    network.stack.outer.abs_().mul_(-30)


def train(network):
    """A few large steps of maximum likelihood on bimodal data."""
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    z = torch.randn(30, network.event_dim)
    z = torch.where(z > 0, z + 2, z - 2)
    for _ in range(5):
        optimizer.zero_grad()
        eps, log_diag = network.inverse_terms(z)
        (0.5 * eps**2 + log_diag).sum(-1).mean().backward()
        optimizer.step()


def by_levels(network, solution, target):
    """The map of one variable given its parents' values: each level of a faithful flow on its own."""
    evaluation, image = network.start(), torch.empty_like(target)
    for level in network.levels:
        columns = list(level)
        image[..., columns] = evaluation.step(solution[..., columns])[0]
        evaluation.accept(target[..., columns])
    return image


@given(
    networks(),
    st.sampled_from([(), (3,), (2, 3)]),
    st.floats(-2, 4),
    st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]),
)
@settings(max_examples=120, deadline=None, derandomize=True)
@torch.no_grad()
def test_inversion_always_converges(network, batch, size, precision):
    """Never an error, and a backward error of rounding size: |f(y) - z| relative to max(1, |y|, |z|) of the datum.

    Parents of a faithful flow enter without a bound, so what rounding does to their contribution counts as size.
    """
    dtype, limit = precision
    network = network.to(dtype)
    target = (10.0**size * torch.randn(*batch, network.event_dim)).to(dtype)
    density = network.closed_form == "density"
    solution, _ = (network.sample if density else network.inverse_terms)(target)
    if density:
        image, _ = network.inverse_terms(solution)
    elif isinstance(network, FaithfulResidualNN):
        image = by_levels(network, solution, target)
    else:
        image, _ = network.sample(solution)
    assert solution.shape == target.shape
    scale = torch.maximum(solution.abs(), target.abs()).amax(-1, keepdim=True).clamp(min=1)
    if isinstance(network, FaithfulResidualNN):
        edges = network.edges.weight
        if edges.numel():
            known = solution if density else target
            scale = scale * (1 + edges.abs().amax() * known.abs().amax(-1, keepdim=True) / scale)
    assert ((image - target).abs() / scale).max() <= limit


def condition(jacobian):
    """How much a backward error can grow; not below one, so that one variable is not always well-conditioned."""
    values = torch.linalg.svdvals(jacobian)
    return values.max().clamp(min=1) / values.min()


@given(networks())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_forward_error_where_the_problem_is_well_conditioned(network):
    """Condition number max(1, |J|) |J^-1| below 100, |y| <= 10, float64: the solution is right to 1e-10."""
    solve, apply = network.sample, network.inverse_terms
    if network.closed_form == "sampling":
        solve, apply = apply, solve
    truth = 3 * torch.randn(12, network.event_dim)
    with torch.no_grad():
        error = (solve(apply(truth)[0])[0] - truth).abs().amax(-1)
    for i, point in enumerate(truth):
        jacobian = torch.autograd.functional.jacobian(lambda y: apply(y)[0], point)
        if condition(jacobian) < 100 and point.abs().max() <= 10:
            assert error[i] <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_most_fresh_flows_are_well_conditioned(family):
    """The property above is not empty: a fresh flow's Jacobian has a condition number far below 100."""
    torch.manual_seed(0)
    network = family(FlowStructure(((), (0,), (0, 1))), lipschitz=0.97)
    jacobian = torch.autograd.functional.jacobian(lambda y: network.inverse_terms(y)[0], torch.randn(3))
    assert condition(jacobian) < 100
