"""The tensors among a model's arguments: found, told apart, and matched with plates."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect import get_argument, get_model_graph, same_tensor, trace_model


def regression(w, x=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z * w, 1.0), obs=x)


def test_get_argument():
    x = torch.zeros(4)
    for args, kwargs in (((None, x), {}), ((None,), {"x": x})):
        assert get_argument(regression, ("x",), args, kwargs) is x
    assert get_argument(regression, ("x",), (None,), {}) is None
    assert get_argument(regression, ("x", 3, "y"), (None, [x]), {}) is None


def test_rows_and_columns_of_an_argument_are_found():
    def model(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for j in range(2):
                pyro.sample(f"x{j}", dist.Normal(z, 1.0), obs=x[:, j])
        for i in range(4):
            pyro.sample(f"y{i}", dist.Normal(z[i], 1.0).expand([2]).to_event(1), obs=x[i])
        pyro.sample("part", dist.Normal(z.sum(), 1.0).expand([2, 2]).to_event(2), obs=x[:2])

    x = torch.randn(4, 2)
    paths = trace_model(model, (x,)).argument_paths
    assert torch.equal(get_argument(model, paths["x1"], (x,)), x[:, 1])
    assert torch.equal(get_argument(model, paths["y3"], (x,)), x[3])
    assert "part" not in paths


def test_same_tensor():
    x = torch.zeros(4, 2)
    assert same_tensor(x, x)
    assert same_tensor(x[:, 1], x[..., 1])
    assert not same_tensor(x[:, 1], x[:, 0])
    assert not same_tensor(x, x.clone())
    assert not same_tensor(x, None)
    assert not same_tensor(x, x.to_sparse())


def test_wrong_arguments_are_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"fit the model's signature.*missing a required argument: 'w'"
    ):
        get_model_graph(regression)


def test_arguments_that_overlap_in_memory_stay_apart():
    def model(w, v):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z * w, 1.0), obs=torch.zeros(()))
        pyro.sample("y", dist.Normal(z * v, 1.0), obs=torch.zeros(()))

    both = torch.ones(2)
    graph = get_model_graph(model, (both[0], both[1]))
    assert set(graph.edges) == {("z", "x"), ("w", "x"), ("z", "y"), ("v", "y")}


def test_overlapping_arguments_are_distinguished_by_what_is_read():
    def model(whole, part):
        pyro.sample("x", dist.Normal(part.sum(), 1.0), obs=torch.zeros(()))
        pyro.sample("y", dist.Normal(whole.sum(), 1.0), obs=torch.zeros(()))

    whole = torch.ones(4)
    assert set(get_model_graph(model, (whole, whole[1:3])).edges) == {("part", "x"), ("whole", "y")}


def test_parameters_and_empty_tensors_are_no_inputs():
    def model(weight, nothing):
        pyro.sample("x", dist.Normal(weight + nothing.sum(), 1.0), obs=torch.zeros(()))

    assert get_model_graph(model, (nn.Parameter(torch.ones(())), torch.zeros(0))).inputs == ()


def test_sparse_argument():
    def model(design):
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 3):
            loc = torch.sparse.mm(design, b[:, None])[:, 0]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(3))

    design = torch.eye(3).to_sparse()
    assert set(get_model_graph(model, (design,)).edges) == {("design", "x"), ("b", "x")}


@pytest.mark.parametrize(
    ("shape", "plates", "event_dim"),
    [
        ((4,), ("data",), 0),
        ((4, 3), ("data",), 1),
        ((4, 4), ("data",), 1),
        ((3,), (), 1),
        ((1,), (), 1),
        ((), (), 0),
        ((4, 3, 2), ("data",), 2),
        ((1, 4, 3), ("data",), 1),
        ((5, 3), (), 2),
    ],
)
def test_alignment_of_inputs(shape, plates, event_dim):
    def model(w):
        with pyro.plate("data", 4):
            loc = w.sum() * torch.ones(4)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(4))

    traced = trace_model(model, (torch.ones(shape),))
    assert traced.graph.plates["w"] == plates
    assert traced.event_dims["w"] == event_dim
    assert traced.graph.event_sizes["w"] == torch.Size(shape[len(shape) - event_dim :]).numel()


def test_alignment_of_inputs_in_two_plates():
    def model(both, outer, inner):
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            pyro.sample("x", dist.Normal(both + outer + inner, 1.0), obs=torch.zeros(3, 4))

    traced = trace_model(model, (torch.ones(3, 4), torch.ones(3, 1), torch.ones(4)))
    plates = traced.graph.plates
    assert plates["both"] == ("rows", "columns")
    assert (plates["outer"], plates["inner"]) == (("rows",), ("columns",))
    assert set(traced.event_dims.values()) == {0}


def test_inputs_that_align_with_no_plate_are_noted():
    def model(w):
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=torch.zeros(4))

    (note,) = trace_model(model, (torch.ones(2, 3, 4)[:, 0],)).notes or ("",)
    assert "input 'w' of shape (2, 4) is taken as one value for all of plate 'data'" in note


def test_rows_are_found_where_the_shape_does_not_show_them():
    """By changing some rows, and seeing which elements change."""

    def model(w, u, v):
        with pyro.plate("outer", 3, dim=-2), pyro.plate("data", 4):
            pyro.sample(
                "x", dist.Normal(w[0] + u[:, None] + (v @ torch.ones(2))[:, None], 1.0), obs=torch.zeros(3, 4)
            )

    traced = trace_model(model, (torch.ones(2, 3, 4)[:, 0], torch.ones(3), torch.eye(3)[:, :2]))
    assert traced.notes == ()
    assert {name: traced.graph.plates[name] for name in "wuv"} == {
        "w": ("data",),
        "u": ("outer",),
        "v": ("outer",),
    }
    assert traced.event_dims == {"w": 1, "u": 0, "v": 1}
    assert dict(traced.places) == {"w": ((-1, -1),), "u": ((-1, -2),), "v": ((-2, -2),)}
    assert traced.other_rows == {}
