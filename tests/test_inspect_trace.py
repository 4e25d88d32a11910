"""One run of a model: what it shows of each site, and what it leaves alone."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect import get_model_graph, sample_prior, trace_model


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
    assert dict(traced.event_dims) == {"w": 0}
    assert not traced.trace.nodes["x"]["value"].requires_grad


def test_traced_models_can_be_copied_and_pickled():
    traced = trace_model(regression, (torch.ones(4),), {"x": torch.zeros(4)})
    assert copy.deepcopy(traced).graph == traced.graph
    again = pickle.loads(pickle.dumps(traced))
    assert (again.graph, again.argument_paths) == (traced.graph, traced.argument_paths)


def test_index_inputs_are_reported():
    def model(group, w):
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(theta[group] * w, 1.0), obs=torch.zeros(4))

    traced = trace_model(model, (torch.tensor([0, 1, 2, 2]), torch.ones(4)))
    assert traced.graph.inputs == ("group", "w")
    assert traced.index_inputs == {"group"}


def test_arguments_of_a_module_inside_a_handler():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, w, x=None):
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.norm((z * w)[:, None])[:, 0], 1.0), obs=x)

    module = Model().double()
    model = poutine.scale(poutine.condition(module, data={}), scale=1.0)
    w, x = torch.ones(3), torch.zeros(3)
    for args, kwargs in (((w, x), {}), ((w,), {"x": x}), ((), {"w": w, "x": x})):
        traced = trace_model(model, args, kwargs)
        assert dict(traced.argument_paths) == {"w": ("w",), "x": ("x",)}
    sample_prior(model, (w, x), num_samples=3)
    assert module.norm.num_batches_tracked == 0


def test_site_without_density_is_refused():
    class Implicit(dist.TorchDistribution):
        arg_constraints: dict = {}  # noqa: RUF012

        def sample(self, shape=()):
            return torch.zeros(shape)

    def model():
        pyro.sample("z", Implicit())

    with pytest.raises(UnsupportedModelError, match="At site 'z', the log-density of Implicit cannot"):
        get_model_graph(model)


def test_site_that_is_no_tensor_is_refused():
    class Words(dist.TorchDistribution):
        arg_constraints: dict = {}  # noqa: RUF012

        def sample(self, shape=()):
            return "word"

        def log_prob(self, value):
            return torch.zeros(())

    with pytest.raises(UnsupportedModelError, match="At site 'z', expected a tensor; Words gave a str"):
        get_model_graph(lambda: pyro.sample("z", Words()))


def test_dimension_outside_plates_is_noted_without_strict():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    assert "to_event(1)" in trace_model(model, strict=False).notes[0]


def test_python_number_as_observation():
    def model():
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=0.5)

    assert get_model_graph(model).edges == (("z", "x"),)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_models_on_a_gpu():
    def model(w, x):
        a = pyro.sample("a", dist.Normal(torch.zeros((), device="cuda"), 1.0))
        buffer = torch.zeros(4, device="cuda")
        buffer[:2] = a
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(buffer * w, 1.0), obs=x)

    w = torch.ones(4, device="cuda")
    state = torch.cuda.get_rng_state()
    graph = get_model_graph(model, (w, 2 * w), validate=True)
    assert set(graph.edges) == {("a", "x"), ("w", "x")}
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert sample_prior(model, (w, 2 * w), num_samples=5)["x"].shape == (5, 4)
