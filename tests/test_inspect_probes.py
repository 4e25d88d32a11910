"""Each probe model is traced right, or refused with a message that names the site and the remedy."""

import pytest
from probes import PROBES

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect import get_argument, get_model_graph, same_tensor, trace_model

FOLLOWED = [probe for probe in PROBES.values() if probe.refused is None]
REFUSED = [probe for probe in PROBES.values() if probe.refused is not None]


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
