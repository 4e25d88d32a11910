import gzip
from itertools import combinations

import networkx as nx
import numpy as np
import pytest

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs import library
from pyro_graphflows.graphs.convert import from_bif, from_pgmpy, to_pgmpy
from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork
from pyro_graphflows.graphs.structures import ModelGraph

BIF = """network sprinkler { }
variable rain { type discrete [ 2 ] { yes, no }; }
variable sprinkler { type discrete [ 2 ] { on, off }; }
variable grass { type discrete [ 3 ] { wet, damp, dry }; }
probability ( rain ) { table 0.2, 0.8; }
probability ( sprinkler | rain ) { (yes) 0.01, 0.99; (no) 0.4, 0.6; }
probability ( grass | rain, sprinkler ) {
  (yes, on) 0.9, 0.1, 0.0;
  (yes, off) 0.7, 0.2, 0.1;
  (no, on) 0.6, 0.3, 0.1;
  (no, off) 0.0, 0.1, 0.9;
}
"""


@pytest.mark.parametrize(
    "graph",
    [
        library.student_network(),
        library.four_cycle(),
        library.protein_network(),
        ModelGraph([("w", "y"), ("m", "y"), ("z", "m")], ["y"], inputs=["w"], marginalised=["m"]),
        ModelGraph([], [], nodes=["lonely"]),
        ModelGraph([("a", "b")], []),
    ],
)
def test_graph_round_trip(graph):
    dag = to_pgmpy(graph)
    assert set(dag.latents) == {*graph.latent, *graph.marginalised}
    assert from_pgmpy(dag) == graph


@pytest.mark.parametrize("name", ["ecoli70", "magic-irri"])
def test_network_round_trip_and_moments(name):
    net = library.load_network(name)
    model = to_pgmpy(net)
    assert model.check_model()
    back = from_pgmpy(model)
    assert isinstance(back, LinearGaussianNetwork)
    assert back == net
    mean, covariance = model.to_joint_gaussian()
    # pgmpy orders by its own topological sort and rounds to 8 decimals.
    rows = [net.names.index(node) for node in nx.topological_sort(model)]
    ours, ours_covariance = net.mean_and_covariance()
    np.testing.assert_allclose(mean, ours[rows], atol=1e-7)
    np.testing.assert_allclose(covariance, ours_covariance[np.ix_(rows, rows)], atol=1e-7)


def test_posterior_against_pgmpy():
    """An independent implementation gives the same conditional mean and covariance."""
    net = library.binary_tree(3, seed=1, intercepts=True)
    x = net.sample(1, seed=0, names=net.observed)
    names, mean, covariance = to_pgmpy(net).predict_probability(_frame(net, x))
    order = [names.index(name) for name in net.latent]
    ours, ours_covariance = net.posterior(x)
    np.testing.assert_allclose(np.asarray(mean)[:, order], ours, atol=1e-6)
    np.testing.assert_allclose(np.asarray(covariance)[np.ix_(order, order)], ours_covariance, atol=1e-6)


def _frame(net, x):
    import pandas as pd

    return pd.DataFrame(x, columns=list(net.observed))


def test_observed_by_default():
    from pgmpy.base import DAG

    edges = [("a", "b"), ("b", "c"), ("b", "d")]
    assert from_pgmpy(DAG(edges)).observed == ("c", "d")
    assert from_pgmpy(DAG(edges, latents={"b"})).observed == ("a", "c", "d")
    assert from_pgmpy(DAG(edges, latents={"b"}), observed="leaves").observed == ("c", "d")
    assert from_pgmpy(DAG(edges), observed=["a"]).observed == ("a",)
    with pytest.raises(GraphflowsError, match="unknown z"):
        from_pgmpy(DAG(edges), observed=["z"])
    with pytest.raises(GraphflowsError, match="\"leaves\" or a collection of names; got 'a'"):
        from_pgmpy(DAG(edges), observed="a")


def test_separation_is_pgmpys():
    """d-separation in the converted graph is that of pgmpy's own algorithm."""
    graph = library.asia()
    dag, ours = to_pgmpy(graph), graph.to_networkx()
    for a, b in combinations(graph.nodes, 2):
        rest = [node for node in graph.nodes if node not in (a, b)]
        for given in [[], *[[node] for node in rest], list(graph.observed)]:
            if a in given or b in given:
                continue
            connected = dag.is_dconnected(a, b, observed=given, include_latents=True)
            assert connected != nx.is_d_separator(ours, {a}, {b}, set(given)), (a, b, given)


def test_discrete_network_as_structure():
    from pgmpy.readwrite import BIFReader

    model = BIFReader(string=BIF).get_model()
    graph = from_pgmpy(model)
    assert graph == ModelGraph([("rain", "sprinkler"), ("rain", "grass"), ("sprinkler", "grass")], ["grass"])


def test_linear_gaussian_structure_without_distributions():
    from pgmpy.factors.continuous import LinearGaussianCPD
    from pgmpy.models import LinearGaussianBayesianNetwork

    model = LinearGaussianBayesianNetwork([("a", "b")])
    assert from_pgmpy(model) == ModelGraph([("a", "b")], ["b"])
    model.add_cpds(LinearGaussianCPD("a", [0.0], 1.0))
    with pytest.raises(GraphflowsError, match="every node; got none for b"):
        from_pgmpy(model)


def test_not_a_pgmpy_model():
    with pytest.raises(GraphflowsError, match="Expected a pgmpy DAG or Bayesian network; got a DiGraph"):
        from_pgmpy(nx.DiGraph())


def test_bif(tmp_path):
    expected = ModelGraph([("rain", "sprinkler"), ("rain", "grass"), ("sprinkler", "grass")], ["grass"])
    (tmp_path / "net.bif").write_text(BIF)
    (tmp_path / "net.bif.gz").write_bytes(gzip.compress(BIF.encode()))
    for path in (tmp_path / "net.bif", str(tmp_path / "net.bif.gz")):
        graph = from_bif(path)
        assert graph == expected
        assert graph.nodes == ("rain", "sprinkler", "grass")
    assert from_bif(path, observed=["rain"]).observed == ("rain",)


@pytest.mark.parametrize(
    "form",
    [str.rstrip, lambda text: text.replace("}\n", "} // seen\n"), lambda text: text.replace("}\n", "}  \n"),
     lambda text: "/* a\ncomment */\n" + text.replace("\n", "\r\n")],
    ids=["no last line break", "comments", "spaces", "other line breaks"],
)  # fmt: skip
def test_every_block_of_a_bif_is_read(tmp_path, form):
    """pgmpy's reader passes over a block whose brace is not the last character of a line."""
    (tmp_path / "net.bif").write_bytes(form(BIF).encode())
    expected = ModelGraph([("rain", "sprinkler"), ("rain", "grass"), ("sprinkler", "grass")], ["grass"])
    assert from_bif(tmp_path / "net.bif") == expected


def test_variables_without_probabilities(tmp_path):
    (tmp_path / "net.bif").write_text(BIF[: BIF.index("probability ( grass")])
    with pytest.raises(GraphflowsError, match=r"none that can be read for \['grass'\]"):
        from_bif(tmp_path / "net.bif")


@pytest.mark.parametrize("text", ["", "not a network\n"])
def test_wrong_bif(tmp_path, text):
    (tmp_path / "net.bif").write_text(text)
    with pytest.raises(GraphflowsError, match=r"net.bif declares no variables"):
        from_bif(tmp_path / "net.bif")
    (tmp_path / "net.bif").write_text(BIF)
    with pytest.raises(GraphflowsError, match="unknown z"):
        from_bif(tmp_path / "net.bif", observed=["z"])
