"""Masked layers: the mask holds, and both engines give the same numbers."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import SparseMask
from pyro_graphflows.nn.masked import MaskedLinear, fastest_engine


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


def engines(mask, dtype=torch.float64):
    dense, sparse = (MaskedLinear(mask, engine=engine).to(dtype) for engine in ("dense", "sparse"))
    torch.nn.init.normal_(dense.weight)
    torch.nn.init.normal_(dense.bias)
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from([(), (3,), (2, 3), (0,)]),
    st.sampled_from([(torch.float32, 1e-5), (torch.float64, 1e-12)]),
)
def test_engines_give_the_same_numbers(rows, columns, density, batch, precision):
    dtype, tolerance = precision
    dense, sparse = engines(torch.rand(rows, columns) < density, dtype)
    x = torch.randn(*batch, columns, dtype=dtype).requires_grad_()
    out = dense(x)
    weight = torch.randn_like(out)
    results = []
    for layer in (dense, sparse):
        value = layer(x)
        grads = torch.autograd.grad((value * weight).sum(), [x, layer.weight, layer.bias])
        results.append([value, *grads])
    results[0][2] = results[0][2][tuple(sparse.sparse_mask().indices)]
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        assert torch.allclose(a, b, rtol=0, atol=tolerance * scale)


def test_engines_agree_on_a_large_layer():
    mask = torch.rand(2000, 600) < 0.01
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        dense, sparse = engines(mask, dtype)
        x = torch.randn(64, 600, dtype=dtype, requires_grad=True)
        weight = torch.randn(64, 2000, dtype=dtype)
        a, b = dense(x), sparse(x)
        assert relative_error(b, a) < tolerance
        grad_a = torch.autograd.grad((a * weight).sum(), [x, dense.weight])
        grad_b = torch.autograd.grad((b * weight).sum(), [x, sparse.weight])
        assert relative_error(grad_b[0], grad_a[0]) < tolerance
        assert relative_error(grad_b[1], grad_a[1][mask]) < tolerance


def test_automatic_choice():
    assert MaskedLinear(torch.rand(100, 100) < 0.05).engine == "dense"
    assert MaskedLinear(torch.rand(400, 100) < 0.5).engine == "dense"
    assert MaskedLinear(torch.rand(2000, 1000) < 0.005).engine == "sparse"
    assert MaskedLinear(torch.rand(2000, 100) < 0.5).engine == "dense"
    # Level by level, a layer is multiplied in pieces, and dense pays for longer.
    mask = SparseMask.from_dense(torch.rand(400, 400) < 0.01)
    assert [fastest_engine(mask, products) for products in (1, 20)] == ["sparse", "dense"]
    with pytest.raises(GraphflowsError, match='engine "auto", "dense" or "sparse"; got \'csr\''):
        MaskedLinear(torch.ones(2, 2, dtype=torch.bool), engine="csr")


def test_start_is_the_same_for_both_engines():
    mask = torch.zeros(2, 10_000, dtype=torch.bool)
    mask[0, :4] = True
    mask[1] = True
    layer = MaskedLinear(mask, engine="sparse")
    assert layer.weight[:4].abs().max() <= 0.5
    assert 0.0099 < layer.weight[4:].abs().max() <= 0.01


def test_state_fits_both_engines_and_no_other_shape():
    mask = torch.rand(5, 4) < 0.5
    dense, sparse = engines(mask)
    again = MaskedLinear(mask, engine="dense")
    again.load_state_dict(sparse.state_dict())
    assert torch.equal(again.masked_weight(), dense.masked_weight())
    assert torch.equal(sparse.masked_weight(), dense.masked_weight())
    assert torch.equal(sparse.sparse_mask().to_dense(), mask)
    assert copy.deepcopy(sparse)(torch.ones(4)).shape == (5,)
    state = sparse.state_dict()
    state["weight"] = torch.zeros(1, 1, 1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        sparse.load_state_dict(state)


def test_memory_grows_with_the_edges():
    size = 10_000
    rows = torch.arange(4 * size).repeat_interleave(4)
    columns = torch.stack([(torch.arange(4 * size) * k + k) % size for k in (1, 3, 7, 9)], 1)
    mask = SparseMask(torch.stack([rows, columns.sort(1).values.flatten()]), (4 * size, size))
    layer = MaskedLinear(mask)
    assert layer.engine == "sparse"
    assert sum(tensor.numel() for tensor in [*layer.parameters(), *layer.buffers()]) < 10 * mask.nnz
    layer(torch.randn(8, size)).sum().backward()
    assert layer.weight.grad.shape == (mask.nnz,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_engines_agree_on_cuda():
    dense, sparse = (layer.cuda() for layer in engines(torch.rand(200, 100) < 0.1))
    x = torch.randn(8, 100, device="cuda", requires_grad=True)
    assert relative_error(sparse(x), dense(x)) < 1e-12
    sparse(x).pow(2).sum().backward()
    assert relative_error(sparse.weight.grad, _dense_grad(dense, x)) < 1e-12


def _dense_grad(layer, x):
    layer(x).pow(2).sum().backward()
    return layer.weight.grad[layer.mask]
