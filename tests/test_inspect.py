"""The tracer: core constructs, side effects, leaks, arguments, and random models against their DAG."""

import copy
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer.inspect import get_model_relations
from pyro.nn import PyroModule
from torch import nn

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.inspect import get_argument, get_model_graph, same_tensor, sample_prior, trace_model


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


def test_unconditioned_sites_are_latent():
    assert get_model_graph(regression, (torch.ones(4),)).latent == ("a", "z", "x")


def test_index_inputs_are_told():
    def model(group, w):
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(theta[group] * w, 1.0), obs=torch.zeros(4))

    traced = trace_model(model, (torch.tensor([0, 1, 2, 2]), torch.ones(4)))
    assert traced.graph.inputs == ("group", "w")
    assert traced.index_inputs == {"group"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_models_give_their_dag(data):
    """Values reach the sites in many ways; deterministic and factor sites are mixed in."""
    size = data.draw(st.integers(2, 7))
    parents = [data.draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set() for i in range(size)]
    kinds = [data.draw(st.sampled_from(["latent", "observed", "delta", "factor"])) for _ in range(size)]
    ways = [data.draw(st.integers(0, len(WAYS) - 1)) for _ in range(size)]

    def model():
        values = []
        for i in range(size):
            inflow = [values[j] for j in sorted(parents[i]) if values[j] is not None]
            loc = WAYS[ways[i]](inflow) if inflow else torch.zeros(())
            value = None
            if kinds[i] == "delta":
                value = pyro.deterministic(f"s{i}", loc)
            elif kinds[i] == "factor":
                pyro.factor(f"s{i}", -(loc**2))
            else:
                obs = torch.tensor(0.3) if kinds[i] == "observed" else None
                value = pyro.sample(f"s{i}", dist.Normal(loc, 1.0), obs=obs)
            values.append(value)

    def sources(i):
        found = set()
        for j in parents[i]:
            if kinds[j] == "delta":
                found |= sources(j)
            elif kinds[j] != "factor":
                found.add(f"s{j}")
        return found

    graph = get_model_graph(model)
    expected = {f"s{i}": sources(i) for i in range(size) if kinds[i] != "delta"}
    assert {node: set(graph.parents(node)) for node in graph.nodes} == expected


def _by_buffer(values):
    buffer = torch.zeros(len(values))
    for i, value in enumerate(values):
        buffer[i] = value
    return buffer.sum()


def _by_accumulation(values):
    total = torch.zeros(())
    for value in values:
        total += value
    return total


def _by_out(values):
    result = torch.zeros(())
    torch.sum(torch.stack(values), 0, out=result)
    return result


WAYS = [
    lambda values: sum(values),
    lambda values: torch.stack(values).sum(),
    lambda values: torch.tensor(values).sum(),
    lambda values: torch.where(values[0] > 0, values[-1], sum(values)),
    lambda values: torch.vmap(lambda row: row * sum(values))(torch.ones(2)).sum(),
    lambda values: torch.func.grad(lambda t: (t**2 * sum(values)).sum())(torch.ones(())),
    lambda values: torch.cat([value.reshape(1) for value in values]).to_sparse().to_dense().sum(),
    _by_buffer,
    _by_accumulation,
    _by_out,
]


def test_long_chain():
    def model(x):
        z = torch.zeros(())
        for t in range(200):
            z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t])

    graph = get_model_graph(model, (torch.zeros(200),))
    expected = {(f"z{t}", f"x{t}") for t in range(200)} | {(f"z{t - 1}", f"z{t}") for t in range(1, 200)}
    assert set(graph.edges) == expected


def test_what_pyro_finds_and_we_do_not_is_only_shapes():
    """Pyro's provenance goes through zeros_like, which passes on a shape only."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros_like(a), 1.0), obs=torch.zeros(()))

    assert get_model_relations(model)["sample_sample"]["x"] == ["a"]
    assert get_model_graph(model).parents("x") == ()


# Side effects


def test_random_state_and_parameters_are_left_alone():
    def model():
        scale = pyro.param("scale", torch.ones(()))
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, scale)), 1.0))

    state = torch.get_rng_state()
    get_model_graph(model)
    assert torch.equal(state, torch.get_rng_state())
    assert list(pyro.get_param_store()) == ["scale"]
    assert pyro.param("scale").requires_grad


def test_running_statistics_are_restored():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            with pyro.plate("data", 5):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.norm(z), 1.0).to_event(1), obs=x)

    model = Model().double()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert get_model_graph(model, (torch.zeros(5, 2),)).edges == (("z", "x"),)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


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


def test_handlers_outside_see_nothing():
    with poutine.trace() as outside, poutine.mask(mask=torch.tensor(False)):
        traced = trace_model(regression, (torch.ones(4),), {"x": torch.zeros(4)})
    assert len(outside.trace.nodes) == 0
    assert dict(traced.not_generative) == {}


def test_validation_setting_is_restored():
    def model():
        raise RuntimeError("the model's own error")

    with pytest.raises(RuntimeError, match="the model's own error"):
        get_model_graph(model)
    with pytest.raises(ValueError, match="invalid values"):
        dist.Normal(0.0, torch.tensor(-1.0))


# Leaks


def leaking():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(float(z), 1.0), obs=torch.zeros(()))


def test_leak_names_site_line_and_remedy():
    with pytest.raises(UnsupportedModelError, match=r"float\(z\).*site 'z'.*whether 'x'.*leave out float"):
        get_model_graph(leaking)


def test_leak_falls_back_to_all_earlier_sites():
    traced = trace_model(leaking, strict=False)
    assert traced.graph.parents("x") == ("z", "y")
    assert traced.graph.parents("y") == ()
    (leak,) = traced.leaks
    assert (leak.sites, leak.operation, leak.affects) == (("z",), "float", ("x",))
    assert leak.filename == __file__
    assert "float(z)" in leak.code
    assert f"{leak.filename}:{leak.line}" in str(leak)


def test_leak_lists_a_few_of_many_sites():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in range(8):
            pyro.sample(f"x{i}", dist.Normal(z.item() + float(z), 1.0))

    with pytest.raises(UnsupportedModelError, match=r"'x4', \.\.\. after it.*more such places"):
        get_model_graph(model)


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


def test_unknown_resolution():
    with pytest.raises(GraphflowsError, match="resolution 'site' or 'element'; got 'pixel'"):
        get_model_graph(leaking, resolution="pixel")


# Arguments


def test_get_argument():
    x = torch.zeros(4)
    for args, kwargs in (((None, x), {}), ((None,), {"x": x})):
        assert get_argument(regression, ("x",), args, kwargs) is x
    assert get_argument(regression, ("x",), (None,), {}) is None
    assert get_argument(regression, ("x", 3, "y"), (None, [x]), {}) is None


def test_wrong_arguments_are_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"fit the model's signature.*missing a required argument: 'w'"
    ):
        get_model_graph(regression)


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


def test_arguments_that_overlap_in_memory_stay_apart():
    def model(w, v):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z * w, 1.0), obs=torch.zeros(()))
        pyro.sample("y", dist.Normal(z * v, 1.0), obs=torch.zeros(()))

    both = torch.ones(2)
    graph = get_model_graph(model, (both[0], both[1]))
    assert set(graph.edges) == {("z", "x"), ("w", "x"), ("z", "y"), ("v", "y")}


def test_overlapping_arguments_are_told_by_what_is_read():
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


def test_covariates_that_cannot_be_followed_are_noted():
    class Batch:
        def __init__(self):
            self.w = torch.ones(())

    def model(w, batch):
        pyro.sample("x", dist.Normal(torch.tensor(w).sum() + batch.w, 1.0), obs=torch.zeros(()))

    notes = trace_model(model, (np.ones(3), Batch())).notes
    assert "argument 'w' is a NumPy array, which is not followed" in notes[0]
    assert "argument 'batch' holds tensors inside a Batch" in notes[1]


def test_random_numbers_outside_of_sites_are_noted():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(nn.functional.dropout(z.expand(4)).sum(), 1.0), obs=torch.zeros(()))

    (note,) = trace_model(model).notes
    assert "draws random numbers outside of pyro.sample; they reach site 'x'" in note


def test_random_initial_values_of_parameters_are_no_noise():
    def model():
        loc = pyro.param("loc", lambda: torch.randn(()))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(()))

    assert trace_model(model).notes == ()


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
def test_layout_of_inputs(shape, plates, event_dim):
    def model(w):
        with pyro.plate("data", 4):
            loc = w.sum() * torch.ones(4)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(4))

    traced = trace_model(model, (torch.ones(shape),))
    assert traced.graph.plates["w"] == plates
    assert traced.event_dims["w"] == event_dim
    assert traced.graph.event_sizes["w"] == torch.Size(shape[len(shape) - event_dim :]).numel()


def test_layout_of_inputs_in_two_plates():
    def model(both, outer, inner):
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            pyro.sample("x", dist.Normal(both + outer + inner, 1.0), obs=torch.zeros(3, 4))

    traced = trace_model(model, (torch.ones(3, 4), torch.ones(3, 1), torch.ones(4)))
    plates = traced.graph.plates
    assert plates["both"] == ("rows", "columns")
    assert (plates["outer"], plates["inner"]) == (("rows",), ("columns",))
    assert set(traced.event_dims.values()) == {0}


def test_unmatched_layout_is_noted():
    def model(w):
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(w[0], 1.0), obs=torch.zeros(4))

    (note,) = trace_model(model, (torch.ones(2, 3, 4)[:, 0],)).notes or ("",)
    assert "input 'w' of shape (2, 4) is taken as one value for all of plate 'data'" in note


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
