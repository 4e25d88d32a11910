import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs import library
from pyro_graphflows.graphs.inversion import faithful_inverse, stochastic_inverse
from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gbn"

# nodes, arcs and parameters as published by the bnlearn repository; leaves; entropy of the leaves in nats
PUBLISHED = {
    "ecoli70": (46, 70, 162, 24, 31.199),
    "arth150": (107, 150, 364, 67, 37.023),
    "magic-irri": (64, 102, 230, 5, 9.863),
    "magic-niab": (44, 66, 154, 5, 4.453),
}

# every textbook graph: number of nodes, edges, observed and inputs
TEXTBOOK = {
    "arithmetic_circuit": (library.arithmetic_circuit, 8, 8, 2, 0),
    "asia": (library.asia, 8, 8, 2, 0),
    "burglar_alarm": (library.burglar_alarm, 5, 4, 2, 0),
    "eight_schools": (library.eight_schools, 5, 4, 1, 1),
    "eight_schools_non_centred": (lambda: library.eight_schools(centred=False), 5, 4, 1, 1),
    "factor_analysis": (lambda: library.factor_analysis(3, 4), 7, 12, 4, 0),
    "factorial_hidden_markov_chain": (lambda: library.factorial_hidden_markov_chain(4, 3), 16, 21, 4, 0),
    "four_cycle": (library.four_cycle, 8, 8, 4, 0),
    "hidden_markov_chain": (lambda: library.hidden_markov_chain(5), 10, 9, 5, 0),
    "linear_regression": (library.linear_regression, 5, 4, 1, 1),
    "protein_network": (library.protein_network, 11, 20, 11, 0),
    "student_network": (library.student_network, 7, 8, 2, 0),
}


@pytest.mark.parametrize("name", library.list_networks())
def test_published_networks(name):
    nodes, arcs, parameters, leaves, entropy = PUBLISHED[name]
    net = library.load_network(name)
    assert (len(net.names), sum(map(len, net.parents.values()))) == (nodes, arcs)
    assert 2 * nodes + arcs == parameters
    assert len(net.observed) == leaves
    assert net.entropy() == pytest.approx(entropy, abs=1e-3)
    assert not list(nx.isolates(net.graph().to_networkx()))
    assert library.load_network(name) is net


@pytest.mark.parametrize("name", library.list_networks())
def test_networks_against_the_reference(name):
    """Entropies computed elsewhere, from the covariance, and from 200,000 samples."""
    if not SHARED.exists():
        pytest.skip("the reference values are not here")
    reference = json.loads((SHARED / "entropies.json").read_text())[name]
    net = library.load_network(name)
    assert net.observed == tuple(reference["observed"])
    assert net.entropy() == pytest.approx(reference["entropy_raw"], abs=1e-3)
    _, covariance = net.mean_and_covariance()
    rows = [net.names.index(leaf) for leaf in net.observed]
    scales = np.log(np.diag(covariance)[rows]).sum() / 2
    assert net.entropy() - scales == pytest.approx(reference["entropy_standardised"], abs=1e-3)
    # 200,000 samples: the bound is 5 standard errors.
    error = reference["simulated_nll_std_of_one_sample"] / 200_000**0.5
    assert abs(net.entropy() - reference["simulated_nll_mean"]) < 5 * error


@pytest.mark.parametrize("name", library.list_networks())
def test_log_evidence_averages_to_minus_the_entropy(name):
    net, n = library.load_network(name), 20_000
    values = net.log_evidence(net.sample(n, seed=0, names=net.observed))
    # The bound is 5 standard errors: a failure means that sampler and density disagree.
    assert abs(values.mean() + net.entropy()) < 5 * values.std() / n**0.5


@pytest.mark.parametrize("name", library.list_networks())
def test_complete_inverse_has_no_gap(name):
    net = library.load_network(name)
    order = net.latent[::-1]
    complete = InverseGraph(net.graph(), {node: [*net.observed, *order[:i]] for i, node in enumerate(order)})
    assert net.factorization_gap(complete) < 1e-9
    mean_field = InverseGraph(net.graph(), dict.fromkeys(net.latent, net.observed))
    assert net.factorization_gap(mean_field) > 0.5


def test_unknown_network():
    with pytest.raises(GraphflowsError, match="one of ecoli70, arth150, magic-irri, magic-niab; got 'alarm'"):
        library.load_network("alarm")


def test_data_files_name_their_source():
    from importlib.resources import files

    folder = files("pyro_graphflows.graphs") / "data"
    assert {f"{name}.json" for name in library.list_networks()} | {"README.md"} == {
        path.name for path in folder.iterdir()
    }
    assert "bnlearn" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("intercepts", [False, True])
def test_binary_tree(depth, intercepts):
    tree = library.binary_tree(depth, seed=3, intercepts=intercepts)
    assert len(tree.names) == 2**depth - 1
    assert len(tree.observed) == 2 ** (depth - 1)
    assert all(tree.parents[f"x{i}"] == (f"x{(i - 1) // 2}",) for i in range(1, 2**depth - 1))
    assert set(tree.scales.values()) == {1.0}
    assert tree.intercepts["x0"] == 0.0
    weights = [value for row in tree.coefficients.values() for value in row]
    assert all(0.5 <= weight <= 2 for weight in weights)
    shifts = [tree.intercepts[name] for name in tree.names[1:]]
    assert all(0.5 <= shift <= 2 for shift in shifts) if intercepts else not any(shifts)
    plain = library.binary_tree(depth, seed=3)
    assert tree.coefficients == plain.coefficients
    assert (tree == plain) == (not intercepts or depth == 1)
    assert tree == library.binary_tree(depth, seed=3, intercepts=intercepts)
    assert depth == 1 or tree != library.binary_tree(depth, seed=4, intercepts=intercepts)


def test_large_tree_needs_no_large_matrix():
    tree = library.binary_tree(14, seed=0)
    assert len(tree.graph()) == 2**14 - 1
    assert tree.sample(2, seed=0).shape == (2, 2**14 - 1)


@pytest.mark.parametrize("order", ["forward", "reverse", "min_fill", "auto"])
@pytest.mark.parametrize("name", library.list_networks())
def test_faithful_inverses_of_published_networks_have_no_gap(name, order):
    """Also where scales differ by 10⁴, as in magic-irri."""
    net = library.load_network(name)
    assert net.factorization_gap(faithful_inverse(net.graph(), order)) < 1e-12


@pytest.mark.parametrize("depth", [3, 5, 7])
def test_heuristic_inverse_of_a_tree_has_a_gap(depth):
    """Reversed edges alone leave out what siblings tell about each other through their parent."""
    tree = library.binary_tree(depth, seed=0)
    assert tree.factorization_gap(faithful_inverse(tree.graph())) < 1e-12
    terms = tree.factorization_gap_terms(stochastic_inverse(tree.graph()))
    assert terms["x0"] < 1e-12  # the root is separated from the leaves by its children
    assert sum(terms.values()) > 1e-2


@pytest.mark.parametrize("name", TEXTBOOK)
def test_textbook_graphs(name):
    make, nodes, edges, observed, inputs = TEXTBOOK[name]
    graph = make()
    assert isinstance(graph, ModelGraph)
    assert (len(graph), len(graph.edges)) == (nodes, edges)
    assert (len(graph.observed), len(graph.inputs)) == (observed, inputs)
    assert nx.is_weakly_connected(graph.to_networkx())
    assert graph == make()
    # Parameters that fit: exact answers exist for each of them.
    assert np.isfinite(LinearGaussianNetwork.random(graph, seed=0).entropy())


def test_structures():
    cycle = library.four_cycle()
    pairs = [cycle.parents(x) for x in ("x12", "x23", "x34", "x41")]
    assert pairs == [("z1", "z2"), ("z2", "z3"), ("z3", "z4"), ("z1", "z4")]
    chain = library.hidden_markov_chain(3)
    assert chain.nodes == ("z0", "x0", "z1", "x1", "z2", "x2")
    assert library.hidden_markov_chain(1).edges == (("z0", "x0"),)
    factorial = library.factorial_hidden_markov_chain(2, 2)
    assert factorial.parents("z1_1") == ("z1_0",)
    assert library.arithmetic_circuit().nodes == ("z0", "z1", "z2", "z3", "z4", "z5", "x0", "x1")
    assert set(library.student_network().parents("J")) == {"S", "L"}
    assert library.eight_schools().plates["theta"] == ("schools",)
    assert library.eight_schools(centred=False).parents("eta") == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: library.binary_tree(0, 0), "depth >= 1; got 0"),
        (lambda: library.hidden_markov_chain(0), "length >= 1; got 0"),
        (lambda: library.factorial_hidden_markov_chain(0), "length >= 1; got 0"),
        (lambda: library.factorial_hidden_markov_chain(2, 0), "num_chains >= 1; got 0"),
        (lambda: library.factor_analysis(0, 1), "num_latent >= 1; got 0"),
        (lambda: library.factor_analysis(1, 0), "num_observed >= 1; got 0"),
    ],
)
def test_wrong_sizes(call, message):
    with pytest.raises(GraphflowsError, match=message):
        call()
