"""Products with a sparse matrix equal dense ones, with derivatives of every order."""

import warnings

import pytest
import torch

from pyro_graphflows.masks import SparseMask
from pyro_graphflows.nn import sparse
from pyro_graphflows.nn.sparse import SparsePattern
from pyro_graphflows.recording import capture

SHAPES = [(6, 4), (1, 1), (5, 0), (0, 5), (3, 9)]


def random_pattern(shape, density=0.5):
    return SparsePattern(SparseMask.from_dense(torch.rand(shape) < density))


@pytest.fixture(params=[True, False], ids=["kernels", "no kernels"])
def _kernels(request, monkeypatch):
    """Torch without MKL has no sparse products on CPU; ours work there too."""
    if not request.param:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("width", [0, 1, 3])
def test_products_equal_dense_ones(shape, density, width):
    pattern = random_pattern(shape, density)
    values = torch.randn(pattern.nnz)
    dense = pattern.to_dense(values)
    x, y = torch.randn(shape[1], width), torch.randn(shape[0], width)
    torch.testing.assert_close(pattern.matmul(values, x), dense @ x)
    torch.testing.assert_close(pattern.rmatmul(values, y), dense.T @ y)


@pytest.mark.usefixtures("_kernels")
def test_derivatives_of_every_order():
    pattern = random_pattern((6, 4))
    values = torch.randn(pattern.nnz, requires_grad=True)
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.randn(6, 3, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    rows = torch.randn(2, 3, 4, requires_grad=True)
    for function, arguments in (
        (pattern.matmul, (values, x)),
        (pattern.rmatmul, (values, y)),
        (pattern.linear, (values, rows, bias)),
    ):
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


def test_torch_filters_are_left_alone():
    before = list(warnings.filters)
    pattern = random_pattern((3, 3))
    pattern.matmul(torch.randn(pattern.nnz), torch.zeros(3, 1))
    assert warnings.filters == before


def test_gradients_can_be_captured(monkeypatch):
    """Sparse matrices cannot; products of rows, a few at a time, can."""
    monkeypatch.setattr(sparse, "CHUNK", 10)
    pattern = random_pattern((6, 4))
    values, x = torch.randn(pattern.nnz, requires_grad=True), torch.randn(3, 4, requires_grad=True)

    def gradients(values, x):
        return torch.autograd.grad(pattern.linear(values, x, None).sin().sum(), [values, x])

    captured = capture(gradients, [values, x], {})
    found = captured.graph(*captured.arguments([values.detach(), x.detach()], ()))
    torch.testing.assert_close(found, gradients(values, x))
