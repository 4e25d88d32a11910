"""The tracer on the core constructs; tests/test_inspect_probes.py has the full set of probe models."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect import get_argument, get_model_graph, sample_prior, trace_model


def regression(w, x=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z * w, 1.0), obs=x)


def test_core_constructs():
    traced = trace_model(regression, (torch.ones(4),), {"x": torch.zeros(4)})
    graph = traced.graph
    assert set(graph.edges) == {("a", "z"), ("z", "x"), ("w", "x")}
    assert (graph.latent, graph.observed, graph.inputs) == (("a", "z"), ("x",), ("w",))
    assert dict(graph.plates) == {"w": ("data",), "a": (), "z": ("data",), "x": ("data",)}
    assert dict(traced.argument_paths) == {"w": ("w",), "x": ("x",)}
    assert traced.notes == ()
    assert traced.leaks == ()


def test_leak_names_site_line_and_remedy():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(float(z), 1.0), obs=torch.zeros(()))
        return y

    with pytest.raises(UnsupportedModelError, match=r"float\(z\).*site 'z'.*whether 'x'.*leave out float"):
        get_model_graph(model)
    assert get_model_graph(model, strict=False).parents("x") == ("z", "y")


def test_get_argument():
    x = torch.zeros(4)
    for args, kwargs in (((None, x), {}), ((None,), {"x": x})):
        assert get_argument(regression, ("x",), args, kwargs) is x
    assert get_argument(regression, ("x",), (None,), {}) is None


def test_prior_samples_follow_the_model():
    samples = sample_prior(regression, (torch.full((4,), 2.0),), {"x": torch.zeros(4)}, num_samples=4000)
    assert {name: tuple(value.shape) for name, value in samples.items()} == {
        "a": (4000,),
        "z": (4000, 4),
        "x": (4000, 4),
    }
    # Var(x) = 4 * (1 + 1) + 1 = 9; its estimate has standard error 9 * sqrt(2 / 4000) = 0.2.
    assert (samples["x"].var(0) - 9).abs().max() < 5 * 0.2


def test_rows_and_columns_of_an_argument_are_found():
    def model(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for j in range(2):
                pyro.sample(f"x{j}", dist.Normal(z, 1.0), obs=x[:, j])

    x = torch.randn(4, 2)
    paths = trace_model(model, (x,)).argument_paths
    assert torch.equal(get_argument(model, paths["x1"], (x,)), x[:, 1])
