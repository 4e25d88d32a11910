"""What every flow's network owes: a pass through its levels says what its two directions say."""

import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.transforms import (
    FaithfulResidualNN,
    FlowStructure,
    GraphicalResidualNN,
    GraphicalSplineNN,
)
from pyro_graphflows.transforms.graphical import AffineGraphicalNN
from pyro_graphflows.transforms.network import moments

# Positions deliberately not in topological order; two context columns.
STRUCTURE = FlowStructure(
    parents=((2,), (0, 2), (), (), (0, 1, 3)),
    context_parents=((0,), (), (0, 1), (), (1,)),
    context_dim=2,
    names=("a", "b", "c", "d", "e"),
)
NETWORKS = {
    "faithful density": lambda: FaithfulResidualNN(STRUCTURE),
    "faithful sampling": lambda: FaithfulResidualNN(STRUCTURE, closed_form="sampling", conditioner_units=3),
    "graphical density": lambda: GraphicalResidualNN(STRUCTURE),
    "graphical sampling": lambda: GraphicalResidualNN(STRUCTURE, closed_form="sampling"),
    "spline": lambda: GraphicalSplineNN(STRUCTURE),
}
everywhere = pytest.mark.parametrize("name", NETWORKS)
PASSES = {**NETWORKS, "affine graphical": lambda: AffineGraphicalNN(STRUCTURE, closed_form="sampling")}


def moved(make):
    """A network away from its start, in other units."""
    network = make()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "raw_beta" not in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    for part in (network.blocks, network.affine) if isinstance(network, AffineGraphicalNN) else (network,):
        part.standardize_(torch.randn(5), torch.rand(5) + 0.5, torch.randn(2), torch.rand(2) + 0.5)
    return network


@everywhere
def test_a_pass_says_what_both_directions_say(name):
    network = moved(NETWORKS[name])
    x, eps = torch.randn(7, 2), torch.randn(7, 5)
    z, log_diag = network.sample(eps, x)
    forth, back = network.start(x), network.start(x)
    for i, level in enumerate(network.levels):
        columns = list(level)
        assert forth.level == back.level == i
        values, terms = forth.step(eps[:, columns])
        torch.testing.assert_close(values, z[:, columns])
        torch.testing.assert_close(terms, log_diag[:, columns])
        forth.accept(values)
        noise, terms = back.terms(z[:, columns])
        torch.testing.assert_close(noise, eps[:, columns], atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(terms, log_diag[:, columns], atol=1e-7, rtol=1e-7)
        back.accept(z[:, columns])


@pytest.mark.parametrize("name", PASSES)
def test_noise_drawn_by_a_pass_forks_and_refusals(name):
    network = moved(PASSES[name])
    levels = STRUCTURE.levels
    evaluation = network.start(torch.randn(7, 2))
    for i, level in enumerate(levels):
        fork = evaluation.fork()
        noise = evaluation.noise((7,))
        assert noise.shape == (7, len(level))
        z, log_diag = evaluation.step(noise)
        assert z.shape == log_diag.shape == noise.shape
        evaluation.accept(z)
        assert (fork.level, evaluation.level) == (i, i + 1)
        again, _ = fork.terms(z)
        torch.testing.assert_close(again, noise, atol=1e-7, rtol=1e-7)
        with pytest.raises(GraphflowsError, match=rf"dimension of {len(level)} for level {i}"):
            fork.step(torch.zeros(7, 9))
    for call in (evaluation.step, evaluation.terms, evaluation.accept):
        with pytest.raises(GraphflowsError, match=f"at most {len(levels)} levels"):
            call(torch.zeros(7, 1))


@everywhere
def test_wrong_sizes_and_units_are_named(name):
    network = NETWORKS[name]()
    with pytest.raises(GraphflowsError, match=r"last dimension of 5 \(a, b, c, d, e\)"):
        network.sample(torch.zeros(4), torch.zeros(2))
    with pytest.raises(GraphflowsError, match=r"context.shape\[-1\] == 2"):
        network.inverse_terms(torch.zeros(5))
    with pytest.raises(GraphflowsError, match="scale is not so for b, e"):
        network.standardize_(torch.zeros(5), torch.tensor([1.0, 0.0, 1.0, 1.0, -1.0]))


def test_moments_of_a_constant_column():
    loc, scale = moments(torch.tensor([[1.0, 3.0], [1.0, 5.0]]))
    assert loc.tolist() == [1.0, 4.0]
    torch.testing.assert_close(scale, torch.tensor([1.0, 2.0**0.5]))
