"""Custom autograd functions and tensors that carry marks."""

import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance

from pyro_graphflows.nn import MaskedLinear
from pyro_graphflows.nn.operation import Operation


class Double(Operation):
    @staticmethod
    def forward(ctx, x, factor):
        out = torch.empty_like(x)
        out[:] = factor * x  # written in place: no mark would survive
        return out

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad, None


def test_marks_and_gradients_pass():
    x = torch.randn(3, requires_grad=True)
    out = Double.apply(track_provenance(x, frozenset({"k"})), 2.0)
    assert get_provenance(out) == {"k"}
    detach_provenance((out * 1.0).sum()).backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert type(Double.apply(x, 2.0)) is torch.Tensor


def test_sparse_layers():
    layer = MaskedLinear(torch.rand(5, 4) < 0.5, engine="sparse")
    x = torch.randn(2, 3, 4)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    out = layer(track_provenance(x, frozenset({"k", "l"})))
    assert get_provenance(out) == {"k", "l"}
    detach_provenance(out.square().sum()).backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
