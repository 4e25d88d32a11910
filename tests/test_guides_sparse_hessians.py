"""Hessians by groups of their columns: the same as all columns, by fewer products."""

import pytest
import torch

from pyro_graphflows.guides.minimize import Hessians
from pyro_graphflows.guides.sparse_hessians import Sparsity

SIZE = 90


def hierarchy(x):
    """Two shared numbers, and effects of their own."""
    return (x[2:] * x[0].exp() - x[1]).square().sum() + x[2:].cosh().log().sum()


def two_way(x):
    """Ten items, answered by eighty persons."""
    return torch.nn.functional.softplus(x[:10, None] * x[10:]).sum() + x.square().sum()


def chain(x):
    return (x[1:] - x[:-1].sin()).square().sum()


def all_with_all(x):
    return (x.square().sum() + x.sum()).cosh().log() + x.exp().sum()


MOST_PRODUCTS = {hierarchy: 4, two_way: 14, chain: 6, all_with_all: SIZE}


class Counted(Sparsity):
    """Notes how many products were asked for."""

    def hessian(self, products, size):
        self.numbers = []

        def counted(vectors):
            self.numbers.append(len(vectors))
            return products(vectors)

        return super().hessian(counted, size)


@pytest.mark.parametrize("function", MOST_PRODUCTS)
def test_hessians_are_those_of_autograd(function):
    sparsity = Counted()
    for _ in range(3):
        x = torch.randn(SIZE)
        found = Hessians(function, sparsity=sparsity).at(x)[2]
        torch.testing.assert_close(
            found, torch.autograd.functional.hessian(function, x), rtol=1e-9, atol=1e-9
        )
    assert sum(sparsity.numbers) <= MOST_PRODUCTS[function]


def test_zeros_that_are_none_elsewhere_are_found_out():
    def function(x):
        return (x[1:] * x[:-1].relu()).sum() + x.exp().sum()

    sparsity = Counted()
    first, second = -torch.rand(SIZE), torch.randn(SIZE)
    for x in (first, second, second):
        found = Hessians(function, sparsity=sparsity).at(x)[2]
        torch.testing.assert_close(
            found, torch.autograd.functional.hessian(function, x), rtol=1e-9, atol=1e-9
        )
    assert len(sparsity.numbers) == 1
    assert sparsity.numbers[0] < 10
