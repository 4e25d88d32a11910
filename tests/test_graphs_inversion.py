"""Faithful inversion without plates: exact small cases, published algorithm, published tables, errors."""

import json
import pickle
import subprocess
import sys
from itertools import combinations, permutations
from pathlib import Path

import networkx as nx
import pytest
from dseparation import Paths
from hypothesis import given
from strategies import examples, labelled_dags, model_graphs, plated_model_graphs, role_assignments

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.inversion import (
    faithful_inverse,
    fully_connected_inverse,
    mean_field_inverse,
    stochastic_inverse,
)
from pyro_graphflows.graphs.structures import ModelGraph

RULES = ("forward", "reverse", "min_fill", "min_fill_all")


def _graph(num_nodes, edges, roles):
    dag = nx.DiGraph()
    dag.add_nodes_from(range(num_nodes))
    dag.add_edges_from(edges)
    return ModelGraph(dag, roles["observed"], marginalised=roles.get("marginalised", ()))


def test_there_are_572_labelled_dags():
    assert [len(list(labelled_dags(n))) for n in (1, 2, 3, 4)] == [1, 3, 25, 543]


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4])
def test_every_small_dag_every_observed_set(num_nodes):
    for edges in labelled_dags(num_nodes):
        oracle = Paths(range(num_nodes), edges)
        for roles in role_assignments(num_nodes):
            graph = _graph(num_nodes, edges, roles)
            inverses = [faithful_inverse(graph, order) for order in RULES]
            for inverse in inverses:
                assert set(inverse.sampling_order) == set(roles["latent"])
                assert oracle.is_minimal_imap(inverse), (edges, roles, inverse.order)
            auto = faithful_inverse(graph)
            best = min((inverse.num_edges, len(inverse.levels)) for inverse in inverses)
            assert (auto.num_edges, len(auto.levels)) == best
            assert auto.order in RULES


@pytest.mark.parametrize("num_nodes", [1, 2, 3])
def test_every_small_dag_every_role_every_sequence(num_nodes):
    """Marginalised nodes and every explicit sequence, barren nodes anywhere in it."""
    for edges in labelled_dags(num_nodes):
        oracle = Paths(range(num_nodes), edges)
        for roles in role_assignments(num_nodes, ("latent", "observed", "marginalised")):
            graph = _graph(num_nodes, edges, roles)
            for order in (*RULES, *permutations(roles["latent"])):
                inverse = faithful_inverse(graph, order)
                assert oracle.is_minimal_imap(inverse), (edges, roles, order)
                if order not in RULES:
                    assert inverse.sampling_order == tuple(order[::-1])
                    assert inverse.order == "custom"


@pytest.mark.slow
def test_every_dag_on_four_nodes_every_role_every_sequence():
    for edges in labelled_dags(4):
        oracle = Paths(range(4), edges)
        for roles in role_assignments(4, ("latent", "observed", "marginalised")):
            graph = _graph(4, edges, roles)
            for order in (*RULES, *permutations(roles["latent"])):
                assert oracle.is_minimal_imap(faithful_inverse(graph, order)), (edges, roles, order)


@given(model_graphs(max_nodes=8))
@examples(200)
def test_random_dags_with_all_roles(graph):
    oracle = Paths(graph.nodes, graph.edges)
    for order in (*RULES, "auto", graph.latent, graph.latent[::-1]):
        inverse = faithful_inverse(graph, order)
        assert oracle.is_minimal_imap(inverse), order
        assert inverse == faithful_inverse(graph, order)
    assert_auto_is_best(graph)


def assert_auto_is_best(graph):
    """Also where a rule was abandoned: fewest edges, then levels, then the documented order of rules."""
    found = {
        rule: faithful_inverse(graph, rule) for rule in ("reverse", "min_fill", "min_fill_all", "forward")
    }
    best = min(found, key=lambda rule: (found[rule].num_edges, len(found[rule].levels)))
    assert faithful_inverse(graph) == found[best]


@given(plated_model_graphs(max_nodes=7))
@examples(100)
def test_auto_is_best_with_plates(graph):
    assert_auto_is_best(graph)


# --- The published algorithm


def naive(graph, rule):
    """Algorithm 1 as published, fill counted from scratch at every step."""
    moral = nx.Graph()
    moral.add_nodes_from(graph.nodes)
    for node in graph.nodes:
        moral.add_edges_from(combinations((*graph.parents(node), node), 2))
    known = {*graph.observed, *graph.inputs}

    def up(node):
        return {"forward": graph.parents, "reverse": graph.children}.get(rule, lambda _: ())(node)

    def fill(node):
        pairs = [(a, b) for a, b in combinations(moral[node], 2) if not moral.has_edge(a, b)]
        return sum(1 for a, b in pairs if rule != "min_fill" or not {a, b} <= known)

    unmarked, sequence, parents = list(graph.latent), [], {}
    while unmarked:
        frontier = [node for node in unmarked if not set(up(node)) & set(unmarked)]
        node = min(frontier, key=lambda v: (fill(v), graph.nodes.index(v)))
        parents[node] = set(moral[node])
        moral.add_edges_from(combinations(list(moral[node]), 2))
        moral.remove_node(node)
        unmarked.remove(node)
        sequence.append(node)
    return sequence, parents


def assert_as_published(graph):
    for rule in RULES:
        inverse = faithful_inverse(graph, rule)
        sequence, parents = naive(graph, rule)
        assert list(inverse.sampling_order) == sequence[::-1]
        assert {node: set(found) for node, found in inverse.parents.items()} == parents
        assert faithful_inverse(graph, sequence).parents == inverse.parents


@given(model_graphs(max_nodes=12, roles=("latent", "latent", "observed", "input")))
@examples(200)
def test_published_modes_without_barren_nodes(graph):
    dag = graph.to_networkx()
    known = {*graph.observed, *graph.inputs}
    barren = [node for node in graph.latent if not nx.descendants(dag, node) & known]
    assert_as_published(
        ModelGraph(
            dag,
            observed=[*graph.observed, *(v for v in barren if not dag.out_degree(v))],
            inputs=graph.inputs,
        )
    )


# --- Tables

STUDENT = ["DG", "IG", "IS", "GH", "GL", "SJ", "LJ", "JH"]


def tree_graph(depth):
    size = 2**depth - 1
    return ModelGraph([((i - 1) // 2, i) for i in range(1, size)], observed=range(2 ** (depth - 1) - 1, size))


ARITHMETIC = ["z0 z2", "z1 z2", "z0 z3", "z1 z3", "z3 z5", "z4 z5", "z3 x0", "z5 x1"]
NETWORKS = Path(__file__).parent.parent / "pyro_graphflows" / "graphs" / "data"


def network(name):
    data = json.loads((NETWORKS / f"{name}.json").read_text())
    edges = [(parent, node["name"]) for node in data["nodes"] for parent in node["parents"]]
    return ModelGraph(edges, observed=data["leaves"])


def test_extended_student_network():
    inverse = faithful_inverse(ModelGraph([tuple(edge) for edge in STUDENT], observed=["J", "H"]), "forward")
    expected = {"D": "IG", "I": "GS", "S": "GLJ", "G": "LJH", "L": "JH"}
    assert {node: set(parents) for node, parents in inverse.parents.items()} == {
        node: set(parents) for node, parents in expected.items()
    }
    assert inverse.sampling_order == ("L", "G", "S", "I", "D")


def test_small_tree_has_the_two_legitimate_answers():
    """a -> b, a -> c, b -> d, c -> e: either b or c goes after a in forward mode; a tie."""
    graph = ModelGraph(["ab", "ac", "bd", "ce"], observed=["d", "e"])
    parents = {node: set(found) for node, found in faithful_inverse(graph, "forward").parents.items()}
    answers = [
        {"a": {"b", "c"}, "b": {"c", "d"}, "c": {"d", "e"}},
        {"a": {"b", "c"}, "c": {"b", "e"}, "b": {"d", "e"}},
    ]
    assert parents in answers


# edges / levels; fewer edges and levels are welcome
TABLE = [
    (lambda: tree_graph(5), 345, {"forward": (135, 15), "reverse": (78, 4), "min_fill": (70, 5)}),
    (lambda: tree_graph(8), 24257, {"forward": (8255, 127), "reverse": (1022, 7), "min_fill": (952, 9)}),
    (
        lambda: ModelGraph([tuple(edge.split()) for edge in ARITHMETIC], observed=["x0", "x1"]),
        27,
        {"forward": (12, 5), "reverse": (16, 5), "min_fill": (11, 5)},
    ),
    (lambda: network("ecoli70"), 759, {"forward": (443, 21), "reverse": (254, 15), "min_fill": (188, 11)}),
    (lambda: network("arth150"), 3460, {"forward": (1529, 34), "reverse": (470, 20), "min_fill": (388, 15)}),
    (
        lambda: network("magic-irri"),
        2006,
        {"forward": (576, 33), "reverse": (808, 48), "min_fill": (439, 24)},
    ),
]
TABLE_IDS = ["tree5", "tree8", "arithmetic", "ecoli70", "arth150", "magic-irri"]


@pytest.mark.parametrize(("make", "full", "expected"), TABLE, ids=TABLE_IDS)
def test_edges_and_levels(make, full, expected):
    graph = make()
    assert fully_connected_inverse(graph).num_edges == full
    found = {}
    for rule, (edges, levels) in expected.items():
        inverse = faithful_inverse(graph, rule)
        found[rule] = inverse.num_edges, len(inverse.levels)
        assert inverse.num_edges <= 1.03 * edges
        assert len(inverse.levels) <= levels + 1
    auto = faithful_inverse(graph)
    assert (auto.num_edges, len(auto.levels)) <= min(found.values())
    again = faithful_inverse(graph, auto.order)
    assert again == auto


NO_BARREN = (0, 3, 5)  # the arithmetic circuit has a barren node


@pytest.mark.parametrize("make", [TABLE[i][0] for i in NO_BARREN], ids=[TABLE_IDS[i] for i in NO_BARREN])
def test_published_modes_on_the_networks(make):
    assert_as_published(make())


# --- Roles


def test_barren_collider_does_not_couple_its_parents():
    """The counterexample to minimality of the published algorithm: a -> c <- b with c barren."""
    graph = ModelGraph(["ac", "bc"], observed=["a"])
    for order in (*RULES, "auto", ["c", "b"]):
        inverse = faithful_inverse(graph, order)
        assert dict(inverse.parents) == {"b": (), "c": ("a", "b")}
    assert dict(faithful_inverse(graph, ["b", "c"]).parents) == {"b": ("a", "c"), "c": ("a",)}


def test_marginalised_nodes_leave_fill_and_barren_ones_vanish():
    graph = ModelGraph(["mx", "my", "zx", "wy", "zn", "wn"], observed=["x", "y"], marginalised=["m", "n"])
    inverse = faithful_inverse(graph, "min_fill")
    assert {k: set(v) for k, v in inverse.parents.items()} == {"z": set("wxy"), "w": set("xy")}
    assert "m" not in inverse.to_networkx()


def test_barren_latents_below_a_marginalised_node():
    graph = ModelGraph(["mx", "mb", "mc"], observed=["x"], marginalised=["m"])
    assert dict(faithful_inverse(graph).parents) == {"b": ("x",), "c": ("x", "b")}


def test_inputs_are_observed_roots():
    graph = ModelGraph(["wz", "zy"], observed=["y"], inputs=["w"])
    assert dict(faithful_inverse(graph).parents) == {"z": ("w", "y")}
    unused = ModelGraph(["zy", "wb", "zb"], observed=["y"], inputs=["w"])
    assert dict(faithful_inverse(unused).parents) == {"z": ("y",), "b": ("z", "w")}


def test_latents_of_a_frontier_look_through_marginalised_nodes():
    graph = ModelGraph(["am", "mb", "bx", "ax"], observed=["x"], marginalised=["m"])
    assert faithful_inverse(graph, "forward").sampling_order == ("b", "a")
    assert faithful_inverse(graph, "reverse").sampling_order == ("a", "b")


def test_nothing_latent_and_nothing_observed():
    assert dict(faithful_inverse(ModelGraph(["xy"], observed=["x", "y"])).parents) == {}
    assert dict(faithful_inverse(ModelGraph(["ab"], observed=[])).parents) == {"a": (), "b": ("a",)}


# --- Speed


def test_benchmark_runs():
    """The benchmark also compares edges with a naive Algorithm 1."""
    script = Path(__file__).parent.parent / "benchmarks" / "inversion.py"
    command = [sys.executable, str(script), "--what", "trees", "--depths", "3", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "growth of min_fill" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of peak memory differs")
@pytest.mark.parametrize("rule", ["reverse", "min_fill"])
def test_large_tree(rule):
    """16,383 nodes in 10 s and 2 GiB; peak memory is that of a process of its own."""
    code = f"""
import resource, time
from pyro_graphflows.graphs import ModelGraph, faithful_inverse
graph = ModelGraph([((i - 1) // 2, i) for i in range(1, 16383)], observed=range(8191, 16383))
start = time.process_time()
inverse = faithful_inverse(graph, {rule!r})
seconds = time.process_time() - start
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, inverse.num_edges)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, gibibytes, edges = map(float, done.stdout.split())
    assert seconds < 10
    assert gibibytes < 2
    assert edges <= 114686


# --- The other inverses


def test_stochastic_inverse_turns_arrows_round():
    tree = stochastic_inverse(tree_graph(3))
    assert dict(tree.parents) == {0: (1, 2), 1: (3, 4), 2: (5, 6)}
    assert tree.order == "stochastic"
    mid = ModelGraph(["xz", "zy", "am", "mz"], observed=["x", "y"], marginalised=["m"])
    assert {k: set(v) for k, v in stochastic_inverse(mid).parents.items()} == {"a": {"z"}, "z": {"x", "y"}}


def test_full_and_mean_field():
    graph = ModelGraph(["ab", "bx", "wx"], observed=["x"], inputs=["w"])
    full, mean_field = fully_connected_inverse(graph), mean_field_inverse(graph)
    assert {k: set(v) for k, v in full.parents.items()} == {"a": set("wx"), "b": set("awx")}
    assert {k: set(v) for k, v in mean_field.parents.items()} == {"a": set("wx"), "b": set("wx")}
    assert (full.order, mean_field.order) == ("full", "mean_field")


def test_parents_are_in_graph_order_and_pickles():
    inverse = faithful_inverse(network("ecoli70"))
    rank = {node: i for i, node in enumerate(inverse.graph.nodes)}
    assert all([rank[p] for p in ps] == sorted(rank[p] for p in ps) for ps in inverse.parents.values())
    assert pickle.loads(pickle.dumps(inverse)) == inverse


# --- Errors


@pytest.mark.parametrize(
    "function", [faithful_inverse, stochastic_inverse, fully_connected_inverse, mean_field_inverse]
)
def test_a_bare_digraph_is_refused(function):
    with pytest.raises(
        GraphflowsError, match=r"Expected a ModelGraph; got a DiGraph. Use ModelGraph\(graph, obs"
    ):
        function(nx.DiGraph(["ab"]))


def test_wrong_orders():
    graph = ModelGraph(["ax", "bx"], observed=["x"])
    with pytest.raises(GraphflowsError, match=r"'min_fill'.*got 'backward'"):
        faithful_inverse(graph, "backward")
    with pytest.raises(GraphflowsError, match="missing: b; not latent: x; more than once: a"):
        faithful_inverse(graph, ["a", "a", "x"])
    plated = ModelGraph(["gz", "zx"], observed=["x"], plates={"z": ["data"], "x": ["data"]})
    with pytest.raises(GraphflowsError, match=r"inner sites before outer ones; got z \(in data\) after g"):
        faithful_inverse(plated, ["g", "z"])
