import copy

import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.nn.activations import ELU, Activation, LipMish, LipSwish, ReLU, Tanh, make_activation

NAMES = ("elu", "lipmish", "lipswish", "relu", "tanh")


@pytest.mark.parametrize("name", NAMES)
def test_derivative_is_the_derivative(name):
    activation = make_activation(name)
    x = torch.cat([torch.linspace(-30, 30, 1001), torch.tensor([-1e4, -700.0, 1e-9, 700.0, 1e4])])
    x = x[x != 0].requires_grad_()
    value = activation(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(activation.derivative(x), slope, atol=1e-9, rtol=1e-9)
    both = activation.forward_and_derivative(x)
    torch.testing.assert_close(both[0], value)
    torch.testing.assert_close(both[1], slope, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_stay_in_their_range_and_nearly_fill_it(name, dtype):
    activation = make_activation(name).to(dtype)
    slope = activation.derivative(torch.linspace(-60, 60, 600_001, dtype=dtype))
    assert slope.isfinite().all()
    assert activation.slope_min <= slope.min() <= activation.slope_min + 1e-3
    assert activation.slope_max - 1e-3 <= slope.max() <= activation.slope_max
    assert activation.lipschitz <= 1


@pytest.mark.parametrize("beta", [-8.0, 0.5, 20.0])
def test_lipswish_range_does_not_depend_on_beta(beta):
    activation = LipSwish()
    with torch.no_grad():
        activation.raw_beta.fill_(beta)
    scale = 1 / torch.nn.functional.softplus(activation.raw_beta).item()
    slope = activation.derivative(torch.linspace(-60, 60, 600_001) * scale)
    assert activation.slope_min <= slope.min() <= activation.slope_min + 1e-3
    assert slope.max() <= activation.slope_max


def test_lipmish_needs_its_divisor():
    """1.088, the divisor in common use, gives a slope above one."""
    slope = LipMish().derivative(torch.linspace(0, 5, 100_001)).max()
    assert slope * 1.0885 / 1.088 > 1.0004
    assert slope <= 1


@pytest.mark.parametrize("cls", [ELU, LipMish, LipSwish, Tanh])
def test_derivative_is_differentiable(cls):
    activation = cls()
    x = torch.linspace(-3, 3, 20).requires_grad_()
    assert torch.autograd.gradcheck(activation.derivative, x)


def test_extreme_values_stay_finite():
    for name in NAMES:
        activation = make_activation(name)
        x = torch.tensor([-1e300, -1e5, 0.0, 1e5]).requires_grad_()
        value, slope = activation.forward_and_derivative(x)
        assert value.isfinite().all()
        assert slope.isfinite().all()
        gradient = torch.autograd.grad(value.sum(), x)[0]
        assert gradient.isfinite().all()


def test_make_activation():
    module = torch.nn.SiLU()
    assert make_activation(module) is module
    assert isinstance(make_activation("relu"), ReLU)
    assert isinstance(copy.deepcopy(make_activation("tanh")), Activation)
    with pytest.raises(GraphflowsError, match="among elu, lipmish, lipswish, relu, tanh"):
        make_activation("gelu")
    with pytest.raises(NotImplementedError):
        Activation().derivative(torch.zeros(1))
