"""Stacks of one-dimensional blocks: the exact bound, and one operation with its gradient against plain ones."""

import pytest
import torch

from pyro_graphflows.nn.activations import make_activation
from pyro_graphflows.transforms import monotone
from pyro_graphflows.transforms.monotone import BlockForm, BlockWeights, MonotoneStack


@pytest.mark.parametrize("activation", ["elu", "tanh", "lipmish"])
@pytest.mark.parametrize("affine_first", [False, True])
@pytest.mark.parametrize("conditional_scale", [False, True])
@pytest.mark.parametrize("together", [True, False])
def test_values_and_first_and_second_derivatives(
    activation, affine_first, conditional_scale, together, monkeypatch
):
    if not together:
        monkeypatch.setattr(monotone, "TOGETHER", 0)
    form = BlockForm(2, (2,), affine_first=affine_first, conditional_scale=conditional_scale)
    stack = MonotoneStack(2, form, make_activation(activation), 0.9)
    assert stack.is_one_operation
    with torch.no_grad():
        stack.inner.copy_(stack.weights().inner)
        stack.log_scale.normal_(0, 0.3)

    def fused(y, inputs, inner, outer, log_scale):
        weights = BlockWeights(inner, outer, log_scale, ())
        return stack(y, inputs, weights)

    arguments = (
        torch.randn(2, 2, requires_grad=True),
        torch.randn(2, 2 * stack.num_inputs, 2, requires_grad=True),
        stack.inner,
        stack.outer,
        stack.log_scale,
    )
    for first, second in zip(fused(*arguments), stack._plain(*arguments, hidden=()), strict=True):
        torch.testing.assert_close(first, second, atol=1e-14, rtol=1e-14)
    assert torch.autograd.gradcheck(fused, arguments)
    assert torch.autograd.gradgradcheck(fused, arguments)


@pytest.mark.parametrize("activation", ["elu", "lipmish"])
@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_the_bound_and_its_derivatives(activation, gain):
    """Against the definition, written down with differentiable operations."""
    activation, c = make_activation(activation), 0.9
    stack = MonotoneStack(3, BlockForm(2, (4,), affine_first=True, gain=gain), activation, c)

    def fused(inner, outer):
        stack.inner, stack.outer = inner, outer
        weights = stack.weights()
        return weights.inner, weights.outer

    def plain(inner, outer):
        products = inner * outer * gain
        ends = torch.stack([products * activation.slope_min, products * activation.slope_max])
        fall = -ends.amin(0).sum(-1, keepdim=True)
        return inner * (c / fall.clamp(min=c)), outer * gain

    for parameter in ("inner", "outer"):
        delattr(stack, parameter)
    arguments = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    ratio = (fused(*arguments)[0] / arguments[0])[..., 0]
    assert (ratio == 1).any()
    assert (ratio < 0.99).any()
    probes = torch.randn(2, 2, 3, 4)
    found = []
    for function in (fused, plain):
        outputs = function(*arguments)
        total = sum((probe * output).sum() for probe, output in zip(probes, outputs, strict=True))
        found.append((*outputs, *torch.autograd.grad(total, arguments)))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-14, rtol=1e-12)
    assert torch.autograd.gradcheck(fused, arguments)
    assert torch.autograd.gradgradcheck(fused, arguments)


def test_groups_of_weights_are_their_rows():
    stack = MonotoneStack(5, BlockForm(2, (3, 2), affine_first=True), make_activation("elu"), 0.9)
    assert not stack.is_one_operation
    weights = stack.weights()
    for rows in ([slice(0, 2), slice(2, 5)], [torch.tensor([4, 0]), torch.tensor([1, 2, 3])]):
        for part, group in zip(rows, weights.groups(rows), strict=True):
            assert torch.equal(group.inner, weights.inner[:, part])
            assert torch.equal(group.hidden[0][1], weights.hidden[0][1][:, part])
    assert torch.equal(weights.piece(slice(1, 3)).log_scale, weights.log_scale[:, 1:3])


@pytest.mark.parametrize("activation", ["elu", "tanh", "lipswish", "lipmish"])
@pytest.mark.parametrize("hidden_dims", [None, [3, 3], [2, 3, 2]])
@pytest.mark.parametrize("c", [0.9, 0.999])
def test_slopes_stay_in_the_interval(activation, hidden_dims, c):
    """The promised interval holds every slope of every block, for weights of any size."""
    torch.manual_seed(1)
    dims = hidden_dims or [8]
    for size in (0.3, 3.0, 30.0):
        form = BlockForm(3, tuple(dims), affine_first=True)
        stack = MonotoneStack(1, form, make_activation(activation), c)
        with torch.no_grad():
            for parameter in stack.parameters():
                parameter.copy_(size * torch.randn_like(parameter))
        weights = stack.weights()
        low, high = stack.slope_bounds(weights)
        assert (low >= 1 - c).all()
        y = torch.linspace(-50, 50, 20001).unsqueeze(0)
        for t in range(3):
            start = torch.randn(1, dims[0], 1).expand(-1, -1, y.shape[-1])
            _, slope, _ = stack._residual(y, start, weights, t)
            assert (1 + slope).min() >= low[t] - 1e-12
            assert (1 + slope).max() <= high[t] + 1e-12


@pytest.mark.parametrize("activation", ["elu", "tanh"])
def test_the_bound_is_attained_and_positive_products_are_free(activation):
    """One hidden layer: the least slope 1 − c is reached, and a block may stretch by 100."""
    stack = MonotoneStack(1, BlockForm(1, (4,), affine_first=True), make_activation(activation), 0.97)
    with torch.no_grad():
        stack.inner.copy_(torch.tensor([20.0, 30.0, 1.0, 2.0]))
        stack.outer.copy_(torch.tensor([-10.0, -5.0, 0.0, 0.0]))
    y, start = torch.linspace(0.0, 1.0, 1001).unsqueeze(0), torch.zeros(1, 4, 1).expand(-1, -1, 1001)
    _, slope, _ = stack._residual(y, start, stack.weights(), 0)
    assert abs(slope.min().item() + 0.97) < 1e-9
    with torch.no_grad():
        stack.outer.copy_(torch.tensor([0.0, 0.0, 60.0, 20.0]))
    _, slope, _ = stack._residual(y, start, stack.weights(), 0)
    assert slope.max() > 99.0
