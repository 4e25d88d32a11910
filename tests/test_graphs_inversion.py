"""Faithful inversion: exact small cases, published algorithm and tables, errors; elimination, also in plates."""

import json
import pickle
import subprocess
import sys
from itertools import combinations, permutations, product
from pathlib import Path

import networkx as nx
import pytest
from dseparation import Paths
from hypothesis import given
from hypothesis import strategies as st
from strategies import dag_edges, examples, labelled_dags, model_graphs, plated_model_graphs, role_assignments

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.inversion import (
    Eliminator,
    OrderSearch,
    SiteElimination,
    bit_set,
    faithful_inverse,
    fully_connected_inverse,
    indices,
    mean_field_inverse,
    moral_graph,
    reachable,
    stochastic_inverse,
)
from pyro_graphflows.graphs.separation import is_imap, is_minimal_imap, violated_independencies
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph, ancestors, expand

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


class Model(OrderSearch):
    """The order of the model, whatever it costs."""

    def improve(self, elimination, start):
        return elimination.eliminate(elimination.fruitful)


def test_a_search_of_the_users():
    graph = ModelGraph(["ab", "bx", "ax"], observed=["x"])
    inverse = faithful_inverse(graph, Model())
    assert (inverse.order, inverse.sampling_order) == ("search", ("b", "a"))


# ---------------------------------------------------------------- elimination, against networkx


def expansion(num_nodes, edges):
    dag = nx.DiGraph()
    dag.add_nodes_from(range(num_nodes))
    dag.add_edges_from(edges)
    return expand(ModelGraph(dag, observed=[]))


def as_digraph(expanded):
    dag = nx.DiGraph()
    dag.add_nodes_from(range(len(expanded)))
    dag.add_edges_from((parent, node) for node in dag for parent in expanded.parents[node])
    return dag


def fill(graph, node):
    around = list(graph[node])
    return [(a, b) for i, a in enumerate(around) for b in around[i + 1 :] if not graph.has_edge(a, b)]


@given(st.sets(st.integers(0, 300)))
def test_bit_sets(members):
    assert indices(bit_set(members)) == sorted(members)


@examples(60)
@given(dag_edges(max_nodes=8))
def test_moral_graph_and_ancestors(graph):
    expanded = expansion(*graph)
    dag = as_digraph(expanded)
    moral = nx.moral_graph(dag)
    assert [set(indices(mask)) for mask in moral_graph(expanded, set(dag), set())] == [
        set(moral[v]) for v in dag
    ]
    for node in dag:
        assert ancestors(expanded, [node]) == nx.ancestors(dag, node) | {node}


@examples(60)
@given(dag_edges(max_nodes=8), st.data())
def test_hidden_nodes_are_eliminated_from_the_moral_graph(graph, data):
    expanded = expansion(*graph)
    dag = as_digraph(expanded)
    hidden = data.draw(st.sets(st.sampled_from(sorted(dag))))
    moral = nx.moral_graph(dag)
    for node in hidden:
        moral.add_edges_from(fill(moral, node))
        moral.remove_node(node)
    found = moral_graph(expanded, set(dag), hidden)
    assert [set(indices(mask)) for mask in found] == [set(moral[v]) if v in moral else set() for v in dag]


@pytest.mark.parametrize("count_observed", [True, False])
@examples(60)
@given(dag_edges(max_nodes=9), st.data())
def test_fill_counts_are_kept_up_to_date(count_observed, graph, data):
    expanded = expansion(*graph)
    dag = as_digraph(expanded)
    observed = data.draw(st.sets(st.sampled_from(sorted(dag))))
    moral = nx.moral_graph(dag)
    eliminator = Eliminator(
        moral_graph(expanded, set(dag), set()), bit_set(observed), count_observed=count_observed
    )
    waiting = set(dag) - observed
    for node in sorted(waiting):
        eliminator.track(node)

    def count(node):
        pairs = fill(moral, node)
        return len(pairs if count_observed else [pair for pair in pairs if not observed.issuperset(pair)])

    while waiting:
        counts = {node: count(node) for node in waiting}
        assert {node: eliminator.fill(node) for node in waiting} == counts
        node = eliminator.best()
        assert node == min(waiting, key=lambda other: (counts[other], other))
        assert set(indices(eliminator.neighbours(node))) == set(moral[node])
        moral.add_edges_from(fill(moral, node))
        moral.remove_node(node)
        eliminator.remove(node)
        waiting.remove(node)


@examples(60)
@given(dag_edges(max_nodes=7), st.data())
def test_markov_boundary_separates_and_is_the_smallest(graph, data):
    expanded = expansion(*graph)
    dag = as_digraph(expanded)
    start = data.draw(st.sampled_from(sorted(dag)))
    known = data.draw(st.sets(st.sampled_from(sorted(dag)))) - {start}
    boundary = reachable(expanded, [start], known)
    assert boundary <= known
    rest = known - boundary
    assert not rest or nx.is_d_separator(dag, {start}, rest, boundary)
    for node in boundary:
        assert not nx.is_d_separator(dag, {start}, {node} | rest, boundary - {node})


@examples(60)
@given(model_graphs())
def test_every_rule_finds_what_its_own_sequence_gives(graph):
    """A greedy run and the same sequence followed by hand are one elimination."""
    elimination = SiteElimination(graph)
    for rule in RULES:
        draft = elimination.run(rule)
        again = elimination.follow(draft.sequence)
        assert again.parents == draft.parents
        assert again.num_edges == draft.num_edges
        assert elimination.run(rule, limit=draft.num_edges).parents == draft.parents
        if elimination.fruitful and draft.num_edges:
            assert elimination.run(rule, limit=draft.num_edges - 1) is None


def test_inner_plates_come_first():
    graph = ModelGraph([("mu", "z"), ("z", "x")], observed=["x"], plates={"z": ["data"], "x": ["data"]})
    for rule in ("forward", "min_fill"):
        draft = SiteElimination(graph).run(rule)
        assert [graph.nodes[site] for site in draft.sequence] == ["z", "mu"]


ORDERS = ("forward", "reverse", "min_fill", "min_fill_all", "auto")


def unroll(graph, copies):
    """Write every copy out as a node (site, {plate: index}) of a model graph without plates."""
    nodes = [
        (site, tuple(zip(graph.plates[site], index, strict=True)))
        for site in graph.nodes
        for index in product(range(copies), repeat=len(graph.plates[site]))
    ]
    by_site = {site: [node for node in nodes if node[0] == site] for site in graph.nodes}
    dag = nx.DiGraph()
    dag.add_nodes_from(nodes)
    for parent, child in graph.edges:
        dag.add_edges_from(
            (one, other)
            for one, other in product(by_site[parent], by_site[child])
            if all(dict(one[1]).get(plate, index) == index for plate, index in other[1])
        )

    def copies_of(sites):
        return [node for site in sites for node in by_site[site]]

    flat = ModelGraph(
        dag,
        observed=copies_of(graph.observed),
        inputs=copies_of(graph.inputs),
        marginalised=copies_of(graph.marginalised),
    )
    return flat, by_site


def differing(one, other):
    """The plates that two copies share and in which they differ."""
    return {plate for plate, index in one[1] if dict(other[1]).get(plate, index) != index}


ROLES = ("latent", "latent", "observed", "marginalised", "input")


@given(plated_model_graphs(max_nodes=5, roles=ROLES))
@examples(200)
def test_two_copies_say_what_three_say(graph):
    flat, by_site = unroll(graph, 3)
    for order in ORDERS:
        inverse = faithful_inverse(graph, order)
        sequence = [copy for site in reversed(inverse.sampling_order) for copy in by_site[site]]
        unrolled = faithful_inverse(flat, sequence)
        for site in graph.latent:
            parents, coupled = set(), set()
            for copy in by_site[site]:
                for parent in unrolled.parents[copy]:
                    if parent[0] == site:
                        coupled |= differing(copy, parent)
                    else:
                        parents.add(parent[0])
            assert parents == set(inverse.parents[site])
            assert coupled == set(inverse.coupled.get(site, ()))
            # An uncoupled site needs its own copies of its parents only.
            for copy in by_site[site]:
                for parent in unrolled.parents[copy]:
                    assert differing(copy, parent) <= coupled


def lifted_statements(inverse, by_site):
    """Yield (block, given, rest) of the copies of each latent site, from the definition."""
    graph = inverse.graph
    earlier = {copy for site in (*graph.observed, *graph.inputs) for copy in by_site[site]}
    for site in inverse.sampling_order:
        coupled = set(inverse.coupled.get(site, ()))
        for copy in by_site[site]:
            block = {other for other in by_site[site] if differing(copy, other) <= coupled}
            given = {
                other
                for parent in inverse.parents[site]
                for other in by_site[parent]
                if differing(copy, other) <= coupled
            }
            yield block, given, (earlier | set(by_site[site])) - block - given
        earlier |= set(by_site[site])


@given(plated_model_graphs(max_nodes=5, roles=ROLES))
@examples(200)
def test_folded_inverses_are_faithful_and_minimal(graph):
    for order in ORDERS:
        inverse = faithful_inverse(graph, order)
        assert is_minimal_imap(inverse)
        assert violated_independencies(inverse) == ()
    assert is_imap(fully_connected_inverse(graph))


@given(plated_model_graphs(max_nodes=4, roles=ROLES))
@examples(150)
def test_faithfulness_of_plated_inverses_is_that_of_three_copies(graph):
    flat, by_site = unroll(graph, 3)
    dag = flat.to_networkx()
    for inverse in (faithful_inverse(graph), mean_field_inverse(graph)):
        holds = all(
            not rest or nx.is_d_separator(dag, block, rest, given)
            for block, given, rest in lifted_statements(inverse, by_site)
        )
        assert is_imap(inverse) == holds


@given(plated_model_graphs(max_nodes=6))
@examples(200)
def test_outer_sites_are_sampled_before_inner_ones(graph):
    dag = graph.to_networkx()
    barren = {site for site in graph.latent if not nx.descendants(dag, site) & set(graph.observed)}
    plates = {site: set(graph.plates[site]) for site in graph.nodes}
    # Only a barren site that depends on the sites of an inner plate may come after them.
    exempt = barren if any(not plates[a] <= plates[b] for a, b in graph.edges) else set()
    for order in ORDERS:
        place = {site: i for i, site in enumerate(faithful_inverse(graph, order).sampling_order)}
        for outer, inner in product(graph.latent, repeat=2):
            if plates[outer] < plates[inner] and not {outer, inner} & exempt:
                assert place[outer] < place[inner]


# --- Textbook cases


def test_global_and_local():
    graph = ModelGraph(["mz", "zx"], observed=["x"], plates={"z": ["data"], "x": ["data"]})
    for order in ORDERS:
        inverse = faithful_inverse(graph, order)
        assert dict(inverse.parents) == {"m": ("x",), "z": ("m", "x")}
        assert inverse.sampling_order == ("m", "z")
        assert dict(inverse.how) == {("x", "m"): "pooled", ("m", "z"): "broadcast", ("x", "z"): "same"}
        assert not inverse.coupled


def test_regression_with_covariates():
    graph = ModelGraph(["by", "wy"], observed=["y"], inputs=["w"], plates={"y": ["data"], "w": ["data"]})
    inverse = faithful_inverse(graph)
    assert set(inverse.parents["b"]) == {"y", "w"}
    assert set(inverse.how.values()) == {"pooled"}


def test_nested_plates():
    """m -> c[school] -> z[school, pupil] -> x[school, pupil]."""
    plates = {"c": ["school"], "z": ["school", "pupil"], "x": ["school", "pupil"]}
    graph = ModelGraph(["mc", "cz", "zx"], observed=["x"], plates=plates)
    inverse = faithful_inverse(graph)
    assert {site: set(found) for site, found in inverse.parents.items()} == {
        "m": {"x"},
        "c": {"m", "x"},
        "z": {"c", "x"},
    }
    assert inverse.sampling_order == ("m", "c", "z")
    assert inverse.how["x", "c"] == inverse.how["x", "m"] == "pooled"
    assert not inverse.coupled


def test_a_collider_outside_the_plate_couples_its_copies():
    graph = ModelGraph(
        ["wz", "zx", "zy"], observed=["w", "x", "y"], plates={name: ["data"] for name in "wzx"}
    )
    for order in ORDERS:
        inverse = faithful_inverse(graph, order)
        assert set(inverse.parents["z"]) == {"w", "x", "y"}
        assert dict(inverse.coupled) == {"z": ("data",)}
        assert inverse.how["y", "z"] == "broadcast"
    free = InverseGraph(graph, inverse.parents)
    violated = {(node, other) for node, other, _ in violated_independencies(free)}
    assert violated == {("z", "z"), ("z", "w"), ("z", "x")}
    assert is_minimal_imap(inverse)
    without_collider = ModelGraph(
        ["wz", "zx"], observed=["w", "x"], plates={name: ["data"] for name in "wzx"}
    )
    superfluous = InverseGraph(without_collider, {"z": ["w", "x"]}, coupled={"z": ["data"]})
    assert is_imap(superfluous)
    assert not is_minimal_imap(superfluous)


def test_a_collider_in_the_outer_of_two_plates():
    plates = {"z": ["outer", "inner"], "y": ["outer"], "x": ["outer", "inner"]}
    graph = ModelGraph(["zx", "zy"], observed=["x", "y"], plates=plates)
    assert dict(faithful_inverse(graph).coupled) == {"z": ("inner",)}


def test_crossed_plates():
    """Item response: a[i] and b[j] are the causes of x[i, j]."""
    graph = ModelGraph(["ax", "bx"], observed=["x"], plates={"a": ["i"], "b": ["j"], "x": ["i", "j"]})
    for order in (*ORDERS, ["a", "b"]):
        inverse = faithful_inverse(graph, order)
        assert dict(inverse.parents) == {"a": ("b", "x"), "b": ("x",)}
        assert inverse.how["b", "a"] == inverse.how["x", "a"] == inverse.how["x", "b"] == "pooled"
        assert dict(inverse.coupled) == {"b": ("j",)}
    assert dict(faithful_inverse(graph, ["b", "a"]).coupled) == {"a": ("i",)}


def test_overlapping_plates():
    """u[a, b] and v[b, c] share the plate b only."""
    plates = {"u": ["a", "b"], "v": ["b", "c"], "x": ["a", "b"], "y": ["b", "c"]}
    graph = ModelGraph(["uv", "ux", "vy"], observed=["x", "y"], plates=plates)
    inverse = faithful_inverse(graph, ["u", "v"])
    assert set(inverse.parents["u"]) == {"v", "x"}
    assert inverse.how["v", "u"] == "pooled"
    assert inverse.coupled["u"] == ("a",)
    assert inverse.coupled["v"] == ("c",)


def test_effects_indexed_across_plates_are_flagged_as_coupled():
    """theta[group[n]]: at the level of sites every observation depends on every theta."""
    graph = ModelGraph(
        [("theta", "x"), ("group", "x")],
        observed=["x"],
        inputs=["group"],
        plates={"theta": ["groups"], "x": ["data"], "group": ["data"]},
    )
    inverse = faithful_inverse(graph)
    assert inverse.coupled["theta"] == ("groups",)
    assert inverse.how["x", "theta"] == inverse.how["group", "theta"] == "pooled"


def test_marginalised_site_in_a_plate():
    """A mixture: w -> k[n] -> x[n] <- theta, with the assignments k summed out."""
    graph = ModelGraph(
        ["wk", "kx", "tx"], observed=["x"], marginalised=["k"], plates={"k": ["data"], "x": ["data"]}
    )
    inverse = faithful_inverse(graph)
    assert {site: set(found) for site, found in inverse.parents.items()} in (
        {"w": {"x", "t"}, "t": {"x"}},
        {"t": {"x", "w"}, "w": {"x"}},
    )
    outside = ModelGraph(
        ["kz", "zx"], observed=["x"], marginalised=["k"], plates={"z": ["data"], "x": ["data"]}
    )
    assert dict(faithful_inverse(outside).coupled) == {"z": ("data",)}


def test_barren_sites_in_plates():
    """A prediction inside the plate is sampled last; a global one before the local sites, though barren."""
    graph = ModelGraph(["mz", "zx", "zp", "mq"], observed=["x"], plates={name: ["data"] for name in "zxp"})
    inverse = faithful_inverse(graph)
    assert inverse.parents["p"] == ("z",)
    assert inverse.parents["q"] == ("m",)
    assert inverse.sampling_order == ("m", "q", "z", "p")
