from functools import partial
from itertools import product

import numpy as np
import pyro.poutine as poutine
import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs import library
from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork
from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.inspect import get_model_graph
from pyro_graphflows.models import textbook

# model and its graph, for models of data in one plate
PER_DATUM = {
    "arithmetic_circuit": (textbook.arithmetic_circuit_model, library.arithmetic_circuit()),
    "four_cycle": (textbook.four_cycle_model, library.four_cycle()),
    "hidden_markov_chain": (
        partial(textbook.hidden_markov_chain_model, length=4),
        library.hidden_markov_chain(4),
    ),
    "factorial_hidden_markov_chain": (
        partial(textbook.factorial_hidden_markov_chain_model, length=3, num_chains=3),
        library.factorial_hidden_markov_chain(3, 3),
    ),
    "burglar_alarm": (textbook.burglar_alarm_model, library.burglar_alarm()),
}
SIGMA, Y = (torch.tensor(textbook.EIGHT_SCHOOLS[name], dtype=torch.float64) for name in ("sigma", "y"))


def in_plate(graph, plate="data"):
    return ModelGraph(graph.to_networkx(), graph.observed, plates={node: [plate] for node in graph.nodes})


@pytest.mark.parametrize("name", PER_DATUM)
def test_graph_of_the_model(name):
    model, graph = PER_DATUM[name]
    x = torch.zeros(3, len(graph.observed))
    assert get_model_graph(model, (x,)) == in_plate(graph)


def test_graph_of_asia():
    """A deterministic site is transparent: its parents become those of its children."""
    dag = library.asia().to_networkx()
    dag.add_edges_from([(a, b) for a in ("tub", "lung") for b in ("xray", "dysp")])
    dag.remove_node("either")
    expected = in_plate(ModelGraph(dag, ["xray", "dysp"]))
    assert get_model_graph(textbook.asia_model, (torch.zeros(3, 2),)) == expected


@pytest.mark.parametrize(
    ("model", "arguments", "graph"),
    [
        (textbook.eight_schools_model, (SIGMA, Y), library.eight_schools()),
        (textbook.eight_schools_non_centred_model, (SIGMA, Y), library.eight_schools(centred=False)),
        (textbook.linear_regression_model, (torch.arange(4.0), torch.zeros(4)), library.linear_regression()),
    ],
)
def test_graph_with_an_input(model, arguments, graph):
    assert get_model_graph(model, arguments) == graph


@pytest.mark.parametrize("name", library.list_networks())
def test_graph_of_a_published_network(name):
    net = library.load_network(name)
    x = torch.tensor(net.sample(3, seed=0, names=net.observed))
    assert get_model_graph(net.pyro_model(), (x,)) == in_plate(net.graph())


@pytest.mark.parametrize("name", [*PER_DATUM, "asia"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_and_types(name, dtype):
    model = PER_DATUM[name][0] if name in PER_DATUM else textbook.asia_model
    trace = poutine.trace(model).get_trace(num_samples=6)
    sites = [site for site in trace.stochastic_nodes if site != "data"]
    assert all(trace.nodes[site]["value"].shape == (6,) for site in sites)
    observed = PER_DATUM[name][1].observed if name in PER_DATUM else ("xray", "dysp")
    x = torch.eye(2, len(observed), dtype=dtype)
    trace = poutine.trace(model).get_trace(x)
    assert {site for site in trace.observation_nodes if site != "either"} == set(observed)
    assert all(torch.equal(trace.nodes[site]["value"], x[:, i]) for i, site in enumerate(observed))
    trace.compute_log_prob()
    for site in (*trace.stochastic_nodes, *trace.observation_nodes):
        if site not in ("data", "either"):  # a deterministic site has the default type
            assert trace.nodes[site]["value"].dtype == dtype
            assert trace.nodes[site]["log_prob"].dtype == dtype
            assert trace.nodes[site]["log_prob"].shape == (2,)


def log_joint(model, x, latent):
    trace = poutine.trace(poutine.condition(model, latent)).get_trace(x)
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)


def posterior_by_enumeration(model, x, names):
    """Probability of each named site being 1, over all assignments of the binary sites."""
    values = torch.tensor(list(product([0.0, 1.0], repeat=len(names))))
    joint = log_joint(model, x.expand(len(values), -1), dict(zip(names, values.T, strict=True)))
    return dict(zip(names, (joint.softmax(0) @ values).tolist(), strict=True)), joint.logsumexp(
        0
    ).exp().item()


def test_burglar_alarm_by_enumeration():
    """The published answer: 0.284 for a burglary when both neighbours call."""
    posterior, _ = posterior_by_enumeration(
        textbook.burglar_alarm_model, torch.ones(1, 2), ["burglary", "earthquake", "alarm"]
    )
    assert posterior["burglary"] == pytest.approx(0.284, abs=5e-4)
    assert posterior["earthquake"] == pytest.approx(0.176, abs=5e-4)


def test_asia_by_enumeration():
    names = ["asia", "tub", "smoke", "lung", "bronc"]
    total = 0.0
    for data in product([0.0, 1.0], repeat=2):
        posterior, evidence = posterior_by_enumeration(textbook.asia_model, torch.tensor([data]), names)
        total += evidence
    assert total == pytest.approx(1.0, abs=1e-12)
    # By hand: P(xray) = .05 + .93 P(either), P(either) = 1 - (1 - .0104) (1 - .055) = .064828
    _, with_dysp = posterior_by_enumeration(textbook.asia_model, torch.tensor([[1.0, 1.0]]), names)
    _, without = posterior_by_enumeration(textbook.asia_model, torch.tensor([[1.0, 0.0]]), names)
    assert with_dysp + without == pytest.approx(0.05 + 0.93 * 0.064828, abs=1e-9)
    assert posterior["lung"] > 0.055  # both signs make cancer likelier than a priori


def linear(names, edges, scales, observed):
    parents = {name: [a for a, b, _ in edges if b == name] for name in names}
    coefficients = {name: [w for _, b, w in edges if b == name] for name in names}
    return LinearGaussianNetwork(parents, coefficients, {}, scales, observed=observed)


@pytest.mark.parametrize("name", ["four_cycle", "hidden_markov_chain"])
def test_linear_models_against_exact_networks(name):
    model, graph = PER_DATUM[name]
    weights = {edge: 0.9 if edge[1][0] == "z" else 1.0 for edge in graph.edges}
    scales = dict.fromkeys(graph.nodes, 1.0)
    if name == "four_cycle":
        scales |= dict.fromkeys(graph.observed, 0.5)
    else:
        scales |= dict.fromkeys(graph.latent[1:], (1 - 0.9**2) ** 0.5)
    net = linear(graph.nodes, [(*edge, w) for edge, w in weights.items()], scales, graph.observed)
    values = net.sample(5, seed=0)
    latent = {site: torch.tensor(values[:, net.names.index(site)]) for site in net.latent}
    x = torch.tensor(net.sample(5, seed=0, names=net.observed))
    expected = net.with_observed(net.names).log_evidence(values)
    np.testing.assert_allclose(log_joint(model, x, latent), expected)


def test_factorial_chain_is_stationary():
    trace = poutine.trace(textbook.factorial_hidden_markov_chain_model).get_trace(
        num_samples=40_000, length=4, num_chains=2
    )
    # Standard error of a variance of 1 is sqrt(2 / n): the bound is 5 of them.
    for site in ("z0_3", "z1_3"):
        assert abs(trace.nodes[site]["value"].var() - 1) < 5 * (2 / 40_000) ** 0.5


def test_parametrisations_of_the_eight_schools_agree():
    """The same effects have densities that differ by the Jacobian, tau per school."""
    mu, tau, eta = torch.tensor(3.0), torch.tensor(2.0), torch.linspace(-1, 1, 8)

    def total(model, **latent):
        conditioned = poutine.condition(model, latent)
        return poutine.trace(conditioned).get_trace(SIGMA, Y).log_prob_sum()

    centred = total(textbook.eight_schools_model, mu=mu, tau=tau, theta=mu + tau * eta)
    non_centred = total(textbook.eight_schools_non_centred_model, mu=mu, tau=tau, eta=eta)
    assert torch.allclose(centred + 8 * tau.log(), non_centred)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: textbook.arithmetic_circuit_model(torch.zeros(3)), r"shape \(n, 2\); got \(3,\)"),
        (lambda: textbook.four_cycle_model(torch.zeros(3, 2)), r"shape \(n, 4\); got \(3, 2\)"),
        (lambda: textbook.burglar_alarm_model(torch.zeros(3, 1)), r"shape \(n, 2\); got \(3, 1\)"),
        (lambda: textbook.asia_model(torch.zeros(3, 1)), r"shape \(n, 2\); got \(3, 1\)"),
        (lambda: textbook.hidden_markov_chain_model(), "data x or a length; got neither"),
        (lambda: textbook.factorial_hidden_markov_chain_model(), "data x or a length; got neither"),
        (lambda: textbook.hidden_markov_chain_model(torch.zeros(3, 2), length=4), r"\(n, 4\); got \(3, 2\)"),
        (lambda: textbook.factorial_hidden_markov_chain_model(torch.zeros(3, 2), length=4), r"\(n, 4\); got"),
    ],
)
def test_wrong_data(call, message):
    with pytest.raises(GraphflowsError, match=message):
        call()
