"""The fused operations against the plain ones: values, every gradient, second derivatives."""

import pytest
import torch

from pyro_graphflows.nn import fused_residual
from pyro_graphflows.nn.residual import MaskedResidualNet, ResidualEvaluation, all_entries, go_through
from tests.networks import randomise

ALLOWED = [{0, 5}, {0, 1}, {2, 5, 6}, {1, 2, 3}, {0, 4}]
CASES = [
    {"activation": "lipmish"},
    {"activation": "lipswish", "hidden_layers": 2, "engine": "sparse"},
    {"activation": "tanh", "hidden_layers": 3, "units_per_set": 2, "engine": "dense"},
    {"activation": "elu", "engine": "sparse"},
]


def make(options, blocks=2):
    nets = [randomise(MaskedResidualNet(ALLOWED, 7, bound=0.9, **options)) for _ in range(blocks)]
    for net in nets:
        net.entries()  # the bounds take in the weights
    return nets


def plainly(nets, z, context):
    """The same through the layers' own operations and autograd's Jacobian of each datum."""
    total = torch.zeros(z.shape)
    for net in nets:
        rows = []
        for point, own in zip(z, context, strict=True):
            rows.append(
                torch.autograd.functional.jacobian(
                    lambda p, net=net, own=own: p + net(p, own), point, create_graph=True
                ).diagonal()
            )
        total = total + torch.stack(rows).log()
        z = z + net(z, context)
    return z, total


@pytest.mark.parametrize("options", CASES, ids=lambda options: options["activation"])
def test_the_chain_equals_autograd_in_values_and_all_gradients(options):
    nets = make(options)
    parameters = [p for net in nets for p in net.parameters()]
    z, context = torch.randn(4, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    left, right = torch.randn(4, 5), torch.randn(4, 5)

    def chain(z, context):
        evaluations = [
            ResidualEvaluation(net, context, own) for net, own in zip(nets, all_entries(nets), strict=True)
        ]
        y, total = go_through(evaluations, z.T.contiguous(), z.shape[:-1])
        return y.T, total.T

    results = []
    for way in (chain, lambda z, context: plainly(nets, z, context)):
        y, total = way(z, context)
        gradients = torch.autograd.grad((y * left + total * right).sum(), [z, context, *parameters])
        results.append([y, total, *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        without = chain(z, context)
    for ours, expected in zip(without, results[0], strict=False):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", CASES[1:3], ids=lambda options: options["activation"])
def test_second_derivatives(options):
    nets = make(options)
    z, context = torch.randn(2, 5, requires_grad=True), torch.randn(2, 2, requires_grad=True)

    def chain(z, context):
        evaluations = [net.start(context) for net in nets]
        return go_through(evaluations, z.T.contiguous(), z.shape[:-1])

    assert torch.autograd.gradgradcheck(chain, (z, context))
    assert torch.autograd.gradgradcheck(lambda z, c: nets[0].forward_and_diag(z, c), (z, context))


def test_second_derivatives_of_bounded_weights():
    """A penalty on the gradient by the weights: differences along a direction."""
    net = make({"activation": "tanh", "engine": "dense"}, 1)[0]
    weight, direction = net.layers[0].weight, torch.randn_like(net.layers[0].weight) * net.layers[0].mask
    probe = torch.randn_like(weight)

    def first(create):
        loss = (net.entries()[0] * probe).sum().sin()
        return torch.autograd.grad(loss, weight, create_graph=create)[0]

    (second,) = torch.autograd.grad((first(True) * direction).sum(), weight)
    values = []
    for step in (1e-6, -1e-6):
        # The singular vectors are held fixed in second derivatives: do so here.
        with torch.no_grad():
            weight.add_(step * direction)
            group = net.bounds[0]._group
            flat = group.flat([layer.weight for layer in net.layers])
            _, short, long, _, basis = net.bounds[0]._known
            norm = short @ net.layers[0].entries().T @ long.mT
            net.bounds[0]._known = (float(group.sums(flat * group.probe)[0]), short, long, norm, basis)
        values.append(first(False))
        with torch.no_grad():
            weight.add_(-step * direction)
    numeric = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close((second * direction).sum(), (numeric * direction).sum(), rtol=1e-5, atol=1e-7)


def test_pieces_give_the_same(monkeypatch):
    nets = make({"activation": "lipmish", "engine": "sparse"})
    z, context = torch.randn(50, 5), torch.randn(50, 2)
    whole = [net.forward_and_diag(z, context) for net in nets]
    monkeypatch.setattr(fused_residual, "PIECE", 120)
    for net, expected in zip(nets, whole, strict=True):
        for a, b in zip(net.forward_and_diag(z, context), expected, strict=True):
            assert torch.equal(a, b)


def test_the_transposed_product():
    net = make({"activation": "lipswish", "hidden_layers": 2}, 1)[0]
    z, context, u = torch.randn(3, 5), torch.randn(3, 2), torch.randn(3, 5)
    pull = net.start(context).pull(z.T.contiguous())
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda p, i=i: net(p, context[i]), z[i])
        torch.testing.assert_close(pull(u.T.contiguous())[:, i], jacobian.T @ u[i])
