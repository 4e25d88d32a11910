"""All levels at once give the numbers and gradients of the levels one by one."""

import pytest
import torch

from pyro_graphflows import faithful_inverse, load_network
from pyro_graphflows.transforms import FaithfulResidualNN, FlowStructure, flow_structure
from pyro_graphflows.transforms.level_sampler import LevelSampler

STRUCTURES = {
    "one": FlowStructure([()]),
    "chain": FlowStructure([(), (0,), (1,)]),
    "reversed chain": FlowStructure([(1,), (2,), ()]),
    "no edges": FlowStructure([(), ()], [(0,), ()], 1),
    "network": flow_structure(faithful_inverse(load_network("magic-niab").graph())),
    "stages": FlowStructure([(), (), (0,)], stages=((1,), (0,), (2,))),
}


def _network(structure, **options):
    network = FaithfulResidualNN(structure, closed_form="sampling", **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        network.standardize_(torch.randn(structure.event_dim), 0.5 + torch.rand(structure.event_dim))
    return network


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("batch", [(5,), (2, 5), ()])
@pytest.mark.parametrize("activation", ["elu", "tanh", "lipmish"])
def test_same_values_and_gradients(name, batch, activation):
    structure = STRUCTURES[name]
    network = _network(structure, num_blocks=3, units_per_variable=4, activation=activation)
    sampler = LevelSampler(network)
    assert sampler.applies
    eps = torch.randn(*batch, structure.event_dim, requires_grad=True)
    x = torch.randn(*batch[-1:], structure.context_dim, requires_grad=True)  # shared by a leading dimension
    context = (x,) if structure.context_dim else ()
    leaves = [eps, *context, *network.parameters()]
    weights = torch.randn(2, *batch, structure.event_dim)
    found = []
    for sample in (network.sample, sampler):
        z, log_diag = sample(eps, *context)
        gradients = torch.autograd.grad(
            (weights[0] * z + weights[1] * log_diag).sum(), leaves, allow_unused=True
        )
        gradients = [
            torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)
        ]
        found.append((z, log_diag, *gradients))
    for one_by_one, at_once in zip(*found, strict=True):
        torch.testing.assert_close(at_once, one_by_one, rtol=1e-9, atol=1e-9)


def test_context_of_a_larger_batch_than_the_noise():
    network = _network(FlowStructure([(), (0,)], [(0,), ()], 1))
    eps, x = torch.randn(4, 2), torch.randn(3, 4, 1)
    z, log_diag = LevelSampler(network)(eps, x)
    expected = network.sample(eps, x)
    torch.testing.assert_close(z, expected[0])
    torch.testing.assert_close(log_diag, expected[1])


def test_going_backward_twice():
    network = _network(STRUCTURES["chain"])
    eps = torch.randn(5, 3, requires_grad=True)
    total = sum(part.sum() for part in LevelSampler(network)(eps))
    first = torch.autograd.grad(total, eps, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, eps)[0])


@pytest.mark.parametrize(
    "options",
    [{"conditional_scale": True}, {"hidden_dims": [9, 9]}, {"activation": "lipswish"}],
    ids=["conditional scale", "two layers", "activation with a parameter"],
)
def test_other_networks_go_the_slow_way(options):
    network = _network(STRUCTURES["chain"], **options)
    sampler = LevelSampler(network)
    assert not sampler.applies
    eps = torch.randn(5, 3)
    assert torch.equal(sampler(eps)[0], network.sample(eps)[0])


def test_other_units_of_parents_are_left_to_the_levels():
    network = _network(STRUCTURES["chain"], num_blocks=2, units_per_variable=4)
    network.set_input_units_(network.loc - 1.0, 2.0 * network.scale)
    eps = torch.randn(5, 3)
    z, log_diag = network.sample(eps)
    for found, wanted in zip(LevelSampler(network)(eps), (z, log_diag), strict=True):
        torch.testing.assert_close(found, wanted)
    back, log_diag_of_z = network.inverse_terms(z)
    torch.testing.assert_close(back, eps)
    torch.testing.assert_close(log_diag_of_z, log_diag)
