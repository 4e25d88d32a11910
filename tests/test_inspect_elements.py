"""Elements of sites, told apart by gradients; plates whose elements look up those of others."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from lookup_models import DISTRICT, GROUP, crossed, districts, latent_groups, slopes, two_groups
from probes import PROBES

from pyro_graphflows.inspect import get_model_graph, nested_by_index, trace_model

N = dist.Normal


def found(model, *args):
    nested = nested_by_index(model, args, traced=trace_model(model, args))
    return {inner: tuple(outers) for inner, outers in nested.items()}


def test_an_index_nests_data_in_groups():
    assert found(slopes, GROUP, torch.randn(7), torch.randn(7)) == {"data": ("groups",)}


def test_two_groups_for_each_datum_are_no_nesting():
    assert found(two_groups, GROUP, GROUP.flip(0), torch.randn(7)) == {}
    assert found(two_groups, GROUP, GROUP, torch.randn(7)) == {"data": ("groups",)}


def test_a_latent_index_is_no_nesting():
    assert found(latent_groups, torch.randn(12)) == {}


def test_groups_of_groups():
    args = GROUP, DISTRICT, torch.randn(7)
    assert found(districts, *args) == {"schools": ("districts",), "pupils": ("schools",)}


def test_crossed_effects_look_up_one_element_of_each():
    i, j = torch.randint(0, 4, (15,)), torch.randint(0, 3, (15,))
    nested = nested_by_index(
        crossed, (i, j, torch.randn(15)), traced=trace_model(crossed, (i, j, torch.randn(15)))
    )
    assert list(nested) == ["data"]
    assert torch.equal(nested["data"]["rows"], i)
    assert torch.equal(nested["data"]["columns"], j)


def _edges(model, *args):
    return set(get_model_graph(model, args, resolution="element").edges)


def test_stacked_then_indexed():
    """Sites are coarse here: x depends on all of v."""

    def model():
        v = pyro.sample("v", N(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", N(torch.stack([v[0], v[2]])[1], 1.0), obs=torch.zeros(()))

    traced = trace_model(model, resolution="element")
    assert traced.graph.nodes == ("v[0]", "v[1]", "v[2]", "x")
    assert traced.graph.edges == (("v[2]", "x"),)
    assert dict(traced.elements) == {"v[0]": ("v", 0), "v[1]": ("v", 1), "v[2]": ("v", 2), "x": ("x", 0)}
    assert set(traced.graph.event_sizes.values()) == {1}


def test_banded_matrix_against_its_pattern():
    torch.manual_seed(0)
    weights = torch.randn(5, 4) * (torch.rand(5, 4) < 0.4)

    def model(x):
        with pyro.plate("data", 6):
            z = pyro.sample("z", N(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", N(torch.tanh(z @ weights.T), 1.0).to_event(1), obs=x)

    traced = trace_model(model, (torch.randn(6, 5),), resolution="element")
    expected = {(f"z[{j}]", f"x[{i}]") for i, j in weights.nonzero().tolist()}
    assert set(traced.graph.edges) == expected
    assert traced.graph.plates["z[0]"] == ("data",)


def test_chain_inside_vectors():
    """A vector per time step; elements evolve on their own."""

    def model():
        z = torch.zeros(2)
        for t in range(3):
            z = pyro.sample(f"z{t}", N(z * torch.tensor([0.5, 0.9]), 1.0).to_event(1))

    assert _edges(model) == {(f"z{t}[{i}]", f"z{t + 1}[{i}]") for t in range(2) for i in range(2)}


def test_multivariate_normal_is_a_chain():
    def model():
        m = pyro.sample("m", N(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("z", dist.MultivariateNormal(m, torch.eye(3) + 0.5))

    chain = {("z[0]", "z[1]"), ("z[0]", "z[2]"), ("z[1]", "z[2]")}
    assert _edges(model) == chain | {(f"m[{i}]", f"z[{j}]") for i in range(3) for j in range(3)}


def test_blocks_of_multivariate_normals():
    def model():
        m = pyro.sample("m", N(torch.zeros(2, 1), 1.0).to_event(2))
        loc = m * torch.ones(2, 2)
        pyro.sample("z", dist.MultivariateNormal(loc, torch.eye(2) + 0.5).to_event(1))

    assert _edges(model) == {
        ("z[0,0]", "z[0,1]"),
        ("z[1,0]", "z[1,1]"),
        ("m[0,0]", "z[0,0]"),
        ("m[0,0]", "z[0,1]"),
        ("m[1,0]", "z[1,0]"),
        ("m[1,0]", "z[1,1]"),
    }


def test_constrained_together_stays_whole():
    def model():
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        s = pyro.sample("s", dist.HalfNormal(torch.ones(2)).to_event(1))
        pyro.sample("x", N(p[0] * s[0], 1.0), obs=torch.zeros(()))

    traced = trace_model(model, resolution="element")
    assert traced.graph.nodes == ("p", "s[0]", "s[1]", "x")
    assert traced.graph.event_sizes["p"] == 3
    assert set(traced.graph.edges) == {("p", "x"), ("s[0]", "x")}


def test_discrete_parents_keep_every_edge():
    def model():
        k = pyro.sample("k", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        pyro.sample("x", N(k, 1.0).to_event(1), obs=torch.zeros(2))

    traced = trace_model(model, resolution="element")
    assert set(traced.graph.edges) == {("k", "x[0]"), ("k", "x[1]")}
    assert traced.graph.event_sizes["k"] == 2


def test_inputs_stay_whole():
    def model(w):
        z = pyro.sample("z", N(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 4):
            pyro.sample("x", N(w * z, 1.0).to_event(1), obs=torch.zeros(4, 2))

    edges = _edges(model, torch.ones(4, 2))
    assert edges == {("w", "x[0]"), ("w", "x[1]"), ("z[0]", "x[0]"), ("z[1]", "x[1]")}


def test_masks_scales_and_factors():
    def model():
        z = pyro.sample("z", N(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3), pyro.poutine.mask(mask=torch.tensor([True, True, False])):
            fn = N(z[1] * torch.ones(3, 2), 1.0).to_event(1).mask(torch.tensor([True, False, True]))
            with pyro.poutine.scale(scale=2.0):
                pyro.sample("x", fn, obs=torch.zeros(3, 2))
        pyro.factor("f", -(z[0] ** 2))

    assert _edges(model) == {("z[1]", "x[0]"), ("z[1]", "x[1]"), ("z[0]", "f")}


def test_names_that_are_taken():
    def model():
        pyro.sample("z[0]", N(0.0, 1.0))
        pyro.sample("z", N(torch.zeros(2), 1.0).to_event(1))

    assert get_model_graph(model, resolution="element").nodes == ("z[0]", "z_[0]", "z_[1]")


def test_models_without_gradients_keep_every_edge():
    traced = trace_model(PROBES["flow_without_inverse"].model, resolution="element")
    assert "elements were not told apart" in traced.notes[0]
    assert traced.graph.parents("x") == ("z[0]", "z[1]")


@pytest.mark.parametrize("name", ["triangle", "nested_plates", "factor", "latent_observation", "enumerated"])
def test_scalar_models_are_unchanged(name):
    probe = PROBES[name]
    graph = get_model_graph(probe.model, probe.args, probe.kwargs)
    assert get_model_graph(probe.model, probe.args, probe.kwargs, resolution="element") == graph
