from itertools import combinations, pairwise

import hypothesis.strategies as st
import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings

from pyro_graphflows.errors import NotADAGError
from pyro_graphflows.graphs.library import binary_tree, list_networks, load_network
from pyro_graphflows.plotting.layout import layered_layout


@st.composite
def dags(draw, max_nodes=9):
    size = draw(st.integers(0, max_nodes))
    dag = nx.DiGraph()
    dag.add_nodes_from(draw(st.permutations(range(size))))
    dag.add_edges_from((i, j) for j in range(size) for i in range(j) if draw(st.booleans()))
    return dag


def segments(layout, edge):
    points = [layout.positions[edge[0]], *layout.routes[edge], layout.positions[edge[1]]]
    return list(pairwise(points))


def crossings(layout):
    """Count crossing pairs of segments between the same two levels, ends in common aside."""
    lines = [line for edge in layout.routes for line in segments(layout, edge)]
    count = 0
    for (a, b), (c, d) in combinations(lines, 2):
        if a[1] == c[1]:
            count += (a[0] - c[0]) * (b[0] - d[0]) < 0
    return count


@given(dags())
@settings(max_examples=40, deadline=None)
def test_layout_is_layered_and_separated(dag):
    layout = layered_layout(dag)
    assert set(layout.positions) == set(dag)
    assert set(layout.routes) == set(dag.edges)
    for edge in dag.edges:
        levels = [-start[1] for start, _ in segments(layout, edge)]
        assert levels == list(np.arange(levels[0], levels[0] + len(levels)))
        assert -layout.positions[edge[1]][1] == levels[-1] + 1
    points = list(layout.positions.items())
    for (_, (x, y)), (_, (u, v)) in combinations(points, 2):
        assert y != v or abs(x - u) >= 1 - 1e-9
    waypoints = [point for route in layout.routes.values() for point in route]
    for x, y in waypoints:
        assert all(y != v or abs(x - u) >= 0.7 - 1e-9 for u, v in layout.positions.values())
    assert layered_layout(dag) == layout


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_trees_are_drawn_without_crossings(depth):
    graph = binary_tree(depth, seed=0).graph()
    layout = layered_layout(graph.to_networkx())
    assert crossings(layout) == 0
    # A node stands above the middle of its children.
    for node in graph.latent:
        middle = np.mean([layout.positions[child][0] for child in graph.children(node)])
        assert layout.positions[node][0] == pytest.approx(middle, abs=0.05)


def test_crossings_that_can_be_avoided_are():
    dag = nx.DiGraph([("a", "y"), ("b", "x"), ("c", "z"), ("a", "z"), ("b", "y")])
    assert crossings(layered_layout(dag)) == 0


@pytest.mark.parametrize("name", list_networks())
def test_published_networks_have_few_crossings(name):
    """Far fewer than the same levels in the order of the file."""
    dag = load_network(name).graph().to_networkx()
    layout = layered_layout(dag)
    assert crossings(layout) <= 3.5 * dag.number_of_edges()
    width, height = np.ptp(list(layout.positions.values()), axis=0)
    assert width <= len(dag)
    assert height < 20


def test_roots_are_near_their_children():
    layout = layered_layout(nx.DiGraph([("a", "b"), ("b", "c"), ("d", "c")]))
    assert layout.positions["d"][1] == -1.0
    assert layout.routes["d", "c"] == ()


def test_cycle():
    with pytest.raises(NotADAGError, match=r"1 -> 2 -> 1|2 -> 1 -> 2"):
        layered_layout(nx.DiGraph([(1, 2), (2, 1)]))
