"""Recorded functions: the same values as the functions, with all but their arguments fixed."""

import pytest
import torch

from pyro_graphflows.capture import NotCapturedError
from pyro_graphflows.captured_gradients import simplified
from pyro_graphflows.recording import record


def value_and_gradient(function):
    def both(x):
        point = x.detach().requires_grad_()
        value = function(point)
        return [value.detach(), *torch.autograd.grad(value.sum(), point)]

    return both


DATA = torch.randn(5)


def branching(x):
    """Python code may depend on data."""
    return sum(x.square().sum() if y.item() > 0 else x.sin().sum() for y in DATA)


def in_place(x):
    out = torch.zeros(4)
    out[0] = x.sum()
    out[1:] += x[:3].exp()
    return out.sum() * DATA[DATA > 0].sum()


def of_lists(x):
    parts = torch.stack([x, x.exp()]).split(1)
    return torch.cat(parts, 1)[:, [0, 2]].logsumexp(-1)


SPARSE = torch.eye(5, dtype=torch.float64).to_sparse()


def of_sparse_data(x):
    return torch.sparse.mm(SPARSE, x.exp().unsqueeze(-1)).sum()


FUNCTIONS = (branching, in_place, of_lists, of_sparse_data)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_recorded_values_and_gradients_are_those_of_the_function(function):
    both = value_and_gradient(function)
    x = torch.randn(5)
    captured = record(both, [x])
    small = simplified(captured, [x])
    for point in (x, torch.randn(5), torch.randn(5)):
        for graph in (captured.graph, small):
            for found, expected in zip(graph(point, *captured.constants), both(point), strict=True):
                torch.testing.assert_close(found, expected)


def test_what_follows_from_data_alone_is_computed_once():
    captured = record(lambda x: [x * (DATA.exp().sum() + torch.lgamma(DATA.abs())).sum()], [torch.ones(())])
    assert captured.num_operations == 1


REFUSED = {
    "it draws random numbers": lambda x: x + torch.randn(5),
    "a number is read": lambda x: x if x.sum() > 0 else -x,
    "a number is read out": lambda x: x * max(x.tolist()),
    "a number is read out of a tensor": lambda x: x * x.numpy().max(),
    "the shape of nonzero": lambda x: x.nonzero(),
    "the shape of index": lambda x: x[x > 0],
    "from outside": lambda x: DATA.clone().copy_(x),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_graph_is_refused(reason):
    with pytest.raises(NotCapturedError, match=reason):
        record(lambda x: [REFUSED[reason](x)], [torch.randn(5)])
