import copy
import pickle

import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import SparseMask
from pyro_graphflows.nn.linear import MaskedLinear


@pytest.fixture
def mask():
    return torch.rand(7, 5) < 0.5


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_equals_the_masked_product(mask, batch):
    mask[2] = False
    layer = MaskedLinear(mask)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(*batch, 5)
    expected = x @ torch.where(mask, layer.weight, 0).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x)[..., 2], layer.bias[2].expand(batch))


def test_jacobian_is_exactly_zero_off_the_mask(mask):
    layer = MaskedLinear(mask)
    torch.nn.init.normal_(layer.weight)
    jacobian = torch.autograd.functional.jacobian(layer, torch.randn(5))
    assert torch.equal(jacobian != 0, mask)


def test_weights_off_the_mask_have_no_gradient(mask):
    layer = MaskedLinear(mask)
    layer(torch.randn(4, 5)).pow(2).sum().backward()
    assert torch.equal(layer.weight.grad != 0, mask)
    assert torch.equal(layer.weight != 0, mask)


def test_start_depends_on_the_inputs_that_the_mask_leaves():
    mask = torch.zeros(2, 10_000, dtype=torch.bool)
    mask[0, :4] = True
    mask[1] = True
    layer = MaskedLinear(mask)
    assert layer.weight[0, :4].abs().max() <= 0.5
    # Uniform on ±1/100 with 10,000 draws: the largest is below .0099 with probability .99^10000 < 1e-43.
    assert 0.0099 < layer.weight[1].abs().max() <= 0.01
    assert (layer.bias == 0).all()


def test_dense_and_sparse_masks_are_the_same(mask):
    a, b = MaskedLinear(mask), MaskedLinear(SparseMask.from_dense(mask))
    b.load_state_dict(a.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(a(x), b(x))


def test_copies_state_and_dtype(mask):
    layer = MaskedLinear(mask)
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = torch.randn(3, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert layer.to(torch.float32)(x.float()).dtype == torch.float32
    assert MaskedLinear(mask, bias=False).bias is None
    assert "density" in repr(layer)


def test_wrong_mask():
    with pytest.raises(GraphflowsError, match="boolean matrix"):
        MaskedLinear(torch.ones(2, 2))
    with pytest.raises(GraphflowsError, match="boolean matrix"):
        MaskedLinear(torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_setting_rows(mask, engine):
    layer = MaskedLinear(mask, engine=engine)
    before = layer.masked_weight().detach().clone()
    weights, bias = torch.randn(2, mask.shape[1]), torch.randn(2)
    layer.set_rows_(slice(1, 3), weights, bias)
    expected = before.clone()
    expected[1:3] = weights * mask[1:3]
    assert torch.equal(layer.masked_weight(), expected)
    assert torch.equal(layer.bias[1:3], bias)
    layer.set_rows_(slice(0, 2), 0.0)
    expected[:2] = 0.0
    assert torch.equal(layer.masked_weight(), expected)
    assert torch.equal(layer.bias[1:3], bias)
