"""Elimination on a moral graph against networkx, with fill counts worked out afresh at each step."""

from itertools import product

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import dag_edges, examples, model_graphs, plated_model_graphs

from pyro_graphflows.graphs.elimination import (
    Eliminator,
    SiteElimination,
    ancestors,
    bit_set,
    expand,
    indices,
    moral_graph,
    reachable,
)
from pyro_graphflows.graphs.inversion import faithful_inverse, fully_connected_inverse, mean_field_inverse
from pyro_graphflows.graphs.separation import is_imap, is_minimal_imap, violated_independencies
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph


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
    for rule in ("forward", "reverse", "min_fill", "min_fill_all"):
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


RULES = ("forward", "reverse", "min_fill", "min_fill_all", "auto")


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
    for order in RULES:
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
    for order in RULES:
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
    for order in RULES:
        place = {site: i for i, site in enumerate(faithful_inverse(graph, order).sampling_order)}
        for outer, inner in product(graph.latent, repeat=2):
            if plates[outer] < plates[inner] and not {outer, inner} & exempt:
                assert place[outer] < place[inner]


def test_expansion():
    graph = ModelGraph(["gz", "wz", "zx"], observed=["x"], plates={"z": ["a", "b"], "w": ["a"], "x": ["b"]})
    expansion = expand(graph)
    site = {name: graph.nodes.index(name) for name in graph.nodes}
    assert [len(expansion.copies[site[name]]) for name in "gwzx"] == [1, 2, 4, 2]
    (g,) = expansion.copies[site["g"]]
    w, x = expansion.copies[site["w"]], expansion.copies[site["x"]]
    z = {expansion.index[node]: node for node in expansion.copies[site["z"]]}
    assert set(expansion.parents[z[0, 1]]) == {g, w[0]}
    assert set(expansion.parents[x[1]]) == {z[0, 1], z[1, 1]}
    assert set(expansion.children[g]) == set(z.values())
    assert len(expand(graph, copies=3)) == 1 + 3 + 9 + 3
    assert expansion.differing_plates(z[0, 0], [z[0, 1]]) == ("b",)


# --- Textbook cases


def test_global_and_local():
    graph = ModelGraph(["mz", "zx"], observed=["x"], plates={"z": ["data"], "x": ["data"]})
    for order in RULES:
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
    for order in RULES:
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
    for order in (*RULES, ["a", "b"]):
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


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_graph_without_plates_is_its_own_expansion(copies):
    graph = ModelGraph(["ab", "bx", "ax"], observed=["x"])
    assert len(expand(graph, copies)) == 3
    assert expand(graph, copies).parents == ((), (0,), (0, 1))
