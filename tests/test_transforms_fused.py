"""The fused stack and its written-out gradient against the plain operations."""

import pytest
import torch

from pyro_graphflows.nn.activations import make_activation
from pyro_graphflows.transforms.monotone import BlockWeights, MonotoneStack


@pytest.mark.parametrize("activation", ["elu", "tanh", "lipmish"])
@pytest.mark.parametrize("affine_first", [False, True])
@pytest.mark.parametrize("conditional_scale", [False, True])
def test_values_and_first_and_second_derivatives(activation, affine_first, conditional_scale):
    stack = MonotoneStack(
        2,
        2,
        [2],
        make_activation(activation),
        0.9,
        affine_first=affine_first,
        conditional_scale=conditional_scale,
    )
    with torch.no_grad():
        stack.inner.copy_(stack.weights().inner)
        stack.log_scale.normal_(0, 0.3)

    def fused(y, inputs, inner, outer, log_scale):
        weights = BlockWeights(inner, outer, log_scale, log_scale, log_scale, ())
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


def test_groups_of_weights_are_their_rows():
    stack = MonotoneStack(
        5, 2, [3, 2], make_activation("elu"), 0.9, affine_first=True, conditional_scale=False
    )
    weights = stack.weights()
    for rows in ([slice(0, 2), slice(2, 5)], [torch.tensor([4, 0]), torch.tensor([1, 2, 3])]):
        for part, group in zip(rows, weights.groups(rows), strict=True):
            assert torch.equal(group.inner, weights.inner[:, part])
            assert torch.equal(group.hidden[0][1], weights.hidden[0][1][:, part])
    assert torch.equal(weights.piece(slice(1, 3)).slope_max, weights.slope_max[:, 1:3])
