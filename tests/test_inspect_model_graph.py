"""Models are traced right, or refused with a message on the site and the remedy; probes show what the tracer misses."""

from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from probes import PROBES

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.inspect import (
    get_argument,
    get_model_graph,
    non_exchangeable_plates,
    same_tensor,
    trace_model,
)
from pyro_graphflows.inspect.trace import Rerun, RerunError, density


def regression(w, x=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z * w, 1.0), obs=x)


N = dist.Normal


FOLLOWED = [probe for probe in PROBES.values() if probe.refused is None]


REFUSED = [probe for probe in PROBES.values() if probe.refused is not None]


def test_unconditioned_sites_are_latent():
    assert get_model_graph(regression, (torch.ones(4),)).latent == ("a", "z", "x")


def test_long_chain():
    def model(x):
        z = torch.zeros(())
        for t in range(200):
            z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t])

    graph = get_model_graph(model, (torch.zeros(200),))
    expected = {(f"z{t}", f"x{t}") for t in range(200)} | {(f"z{t - 1}", f"z{t}") for t in range(1, 200)}
    assert set(graph.edges) == expected


def test_unknown_resolution():
    with pytest.raises(GraphflowsError, match="resolution 'site' or 'element'; got 'pixel'"):
        get_model_graph(regression, resolution="pixel")


def _parents(graph):
    return {node: set(graph.parents(node)) for node in graph.nodes}


@pytest.mark.parametrize("probe", FOLLOWED, ids=lambda probe: probe.name)
def test_graph_is_the_truth(probe):
    traced = trace_model(probe.model, probe.args, probe.kwargs)
    graph = traced.graph
    assert _parents(graph) == probe.parents
    assert set(graph.observed) == set(probe.observed)
    assert set(graph.inputs) == set(probe.inputs)
    assert set(graph.marginalised) == set(probe.marginalised)
    assert traced.without_data == set(probe.without_data)
    for name, plates in probe.plates.items():
        assert graph.plates[name] == plates
    for name, size in probe.sizes.items():
        assert graph.event_sizes[name] == size


@pytest.mark.parametrize("probe", REFUSED, ids=lambda probe: probe.name)
def test_what_cannot_be_followed_is_refused(probe):
    with pytest.raises(UnsupportedModelError, match=probe.refused):
        get_model_graph(probe.model, probe.args, probe.kwargs)
    found = _parents(get_model_graph(probe.model, probe.args, probe.kwargs, strict=False))
    assert all(found[node] >= parents for node, parents in probe.parents.items())


@pytest.mark.parametrize("probe", FOLLOWED, ids=lambda probe: probe.name)
def test_argument_paths_lead_to_the_values(probe):
    traced = trace_model(probe.model, probe.args, probe.kwargs)
    for name, path in traced.argument_paths.items():
        value = get_argument(probe.model, path, probe.args, probe.kwargs)
        assert value is not None
        if name in traced.graph.observed:
            assert same_tensor(value, traced.trace.nodes[name]["value"])


def test_there_are_enough_probes():
    assert len(PROBES) >= 60


# Elements


@pytest.mark.parametrize("probe", FOLLOWED, ids=lambda probe: probe.name)
def test_no_probe_depends_on_more_than_its_graph_says(probe):
    """Gradients and changed values are a second oracle, independent of the tracer."""
    graph = trace_model(probe.model, probe.args, probe.kwargs, validate=True).graph
    assert {node: set(graph.parents(node)) for node in graph.nodes} == probe.parents


@pytest.mark.parametrize("discrete", [False, True])
def test_values_that_pass_through_a_thread(discrete):
    """The interceptors belong to one thread."""

    def model():
        z = pyro.sample("z", dist.Poisson(5.0) if discrete else N(0.0, 1.0))
        with ThreadPoolExecutor(1) as pool:
            loc = pool.submit(lambda: torch.tensor(z.detach().numpy()) if discrete else z * 2.0).result()
        pyro.sample("x", N(loc, 1.0), obs=torch.zeros(()))

    assert trace_model(model).graph.parents("x") == ()
    traced = trace_model(model, validate=True)
    assert traced.graph.parents("x") == ("z",)
    assert "'x' depends on 'z', which the tracer did not see" in traced.notes[-1]


@pytest.mark.parametrize("operation", [lambda z: z.cumsum(-1), lambda z: z.flip(-1), lambda z: z - z.mean()])
def test_dependence_across_a_plate(operation):
    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", N(0.0, 1.0))
            pyro.sample("x", N(operation(z), 1.0), obs=torch.zeros(5))

    with pytest.raises(
        UnsupportedModelError, match=r"'x'.*plate 'data'.*other indices of 'z'.*\.to_event\(1\)"
    ):
        trace_model(model, validate=True)
    assert "other indices of 'z'" in trace_model(model, validate=True, strict=False).notes[0]


def test_dependence_across_a_plate_of_vectors():
    def model(own):
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            z = pyro.sample("z", N(torch.zeros(2), 1.0).to_event(1))
            loc = z if own else z.roll(1, -3)
            pyro.sample("x", N(loc, 1.0).to_event(1), obs=torch.zeros(3, 4, 2))

    with pytest.raises(UnsupportedModelError, match="plate 'rows' depends on other indices of 'z'"):
        trace_model(model, (False,), validate=True)
    assert trace_model(model, (True,), validate=True).notes == ()


def test_dependence_across_a_plate_of_discrete_sites():
    def model():
        with pyro.plate("data", 5):
            k = pyro.sample("k", dist.Categorical(torch.ones(20)))
            pyro.sample("x", N(k.flip(-1).double(), 1.0), obs=torch.zeros(5))

    with pytest.raises(UnsupportedModelError, match=r"'x'.*other indices of 'k'"):
        trace_model(model, validate=True)


def test_covariates_standardised_inside_the_model():
    def model(w, x):
        a = pyro.sample("a", N(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("x", N(a * (w - w.mean()), 1.0), obs=x)

    with pytest.raises(UnsupportedModelError, match=r"other indices of 'w'.*compute it outside of the model"):
        trace_model(model, (torch.arange(5.0), torch.zeros(5)), validate=True)


SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y, sigma=SIGMA):
    mu = pyro.sample("mu", N(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("J", 8):
        theta = pyro.sample("theta", N(mu, tau))
        pyro.sample("y", N(theta, sigma), obs=y)


def test_constants_that_vary_along_a_plate():
    """Eight schools with the known scales in a closure, and as an argument."""
    traced = trace_model(schools, (torch.zeros(8),), validate=True)
    assert dict(traced.non_exchangeable) == {"y": ("J",)}
    assert "at site 'y', the indices of plate 'J' are not alike" in traced.notes[0]
    assert non_exchangeable_plates(schools, (torch.arange(8.0), SIGMA)) == {}


def test_data_that_varies_is_no_constant():
    def model(x, y):
        z = pyro.sample("z", N(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", N(z * x[:, 0] + x[:, 1], 1.0), obs=y)

    assert non_exchangeable_plates(model, (torch.randn(4, 2), torch.randn(4))) == {}


def test_constants_of_a_subsampled_plate():
    constants = torch.arange(10.0) + 1.0

    def model(x):
        z = pyro.sample("z", N(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=4) as index:
            pyro.sample("x", N(z, constants[index]), obs=x[index])

    # rows of a batch are taken from them: they are data, and an input
    assert non_exchangeable_plates(model, (torch.zeros(10),)) == {}
    assert trace_model(model, (torch.zeros(10),)).graph.inputs == ("constants",)


def test_parameters_that_vary_along_a_plate():
    """They are equal in the beginning."""

    def model(shared):
        shift = pyro.param("shift", torch.zeros(() if shared else 4))
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", 4):
            pyro.sample("x", N(shift, scale), obs=torch.zeros(4))

    assert non_exchangeable_plates(model, (True,)) == {}
    pyro.clear_param_store()
    assert non_exchangeable_plates(model, (False,)) == {"x": ("data",)}
    assert torch.equal(pyro.param("shift"), torch.zeros(4))


def test_only_one_of_two_plates():
    constants = torch.tensor([[1.0], [2.0], [3.0]])

    def model():
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            pyro.sample("x", N(0.0, constants), obs=torch.zeros(3, 4))

    assert non_exchangeable_plates(model) == {"x": ("rows",)}


def test_noise_outside_of_sites_does_not_make_a_plate_uneven():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.nn.functional.dropout(z, 0.5), 1.0), obs=x)

    assert non_exchangeable_plates(model, (torch.zeros(10),)) == {}


def test_models_that_cannot_be_changed_are_noted():
    traced = trace_model(PROBES["flow_without_inverse"].model, validate=True)
    assert "not validated (follow gradients)" in traced.notes[0]


def test_many_sites_are_followed_by_gradients_only():
    def model():
        z = torch.zeros(())
        for t in range(201):
            z = pyro.sample(f"z{t}", N(z, 1.0))

    assert "not validated (change values): more than 200 sites" in trace_model(model, validate=True).notes


def test_reruns_say_what_went_wrong():
    def model():
        z = pyro.sample("z", N(0.0, 1.0))
        if z > 100:
            raise KeyError("too large")

    with pytest.raises(RerunError, match="cannot be evaluated at other values: 'too large'"):
        Rerun(model, (), {}, trace_model(model, strict=False)).at({"z": torch.tensor(101.0)})


def test_densities_say_what_went_wrong():
    model = PROBES["flow_without_inverse"].model
    trace = Rerun(model, (), {}, trace_model(model)).at({})
    site = {**trace.nodes["z"], "value": torch.zeros(2)}
    with pytest.raises(RerunError, match="expected to find key in intermediates cache"):
        density(site)
