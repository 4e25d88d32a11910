"""Values are followed however they flow; what escapes is reported with its place."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro.infer.inspect import get_model_relations
from torch import nn

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect import get_model_graph, trace_model


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


def test_what_pyro_finds_and_we_do_not_is_only_shapes():
    """Pyro's provenance goes through zeros_like, which passes on a shape only."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros_like(a), 1.0), obs=torch.zeros(()))

    assert get_model_relations(model)["sample_sample"]["x"] == ["a"]
    assert get_model_graph(model).parents("x") == ()


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
