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
def test_gradients_of_both(cls):
    activation = cls()
    x = torch.linspace(-3, 3, 20).requires_grad_()  # without 0, where the ELU has a kink
    for function in (activation, activation.derivative, activation.forward_and_derivative):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_gradient_of_beta():
    activation = LipSwish()
    x = torch.linspace(-3, 3, 20)

    def both(raw_beta):
        return torch.func.functional_call(activation, {"raw_beta": raw_beta}, (x,))

    assert torch.autograd.gradcheck(both, activation.raw_beta.detach().clone().requires_grad_())
    beta = torch.nn.functional.softplus(activation.raw_beta)
    torch.testing.assert_close(activation(x), x * torch.sigmoid(beta * x) / 1.1)


@pytest.mark.parametrize("name", NAMES)
def test_function_transforms(name):
    activation = make_activation(name)
    x = torch.linspace(-3, 3, 20)
    slopes = torch.func.vmap(torch.func.grad(activation))(x)
    torch.testing.assert_close(slopes, activation.derivative(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_values_stay_finite(dtype):
    for name in NAMES:
        activation = make_activation(name).to(dtype)
        x = torch.tensor([-1e30, -1e5, -90.0, 0.0, 21.0, 90.0, 1e5], dtype=dtype).requires_grad_()
        value, slope = activation.forward_and_derivative(x)
        assert value.isfinite().all()
        assert slope.isfinite().all()
        gradient = torch.autograd.grad((value + slope).sum(), x, create_graph=True)[0]
        assert gradient.isfinite().all()
        assert activation.curvature(x).isfinite().all()


def test_make_activation():
    module = torch.nn.SiLU()
    assert make_activation(module) is module
    assert isinstance(make_activation("relu"), ReLU)
    assert isinstance(copy.deepcopy(make_activation("tanh")), Activation)
    with pytest.raises(GraphflowsError, match="among elu, lipmish, lipswish, relu, tanh"):
        make_activation("gelu")
    with pytest.raises(NotImplementedError):
        Activation.terms(torch.zeros(1), 0)
    with pytest.raises(NotImplementedError):
        Activation.curvature(torch.zeros(1))
