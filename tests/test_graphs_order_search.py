"""The search for elimination orders: rotations against elimination, the best order of small graphs, plates."""

import random
from itertools import permutations
from pathlib import Path

import pgmpy.utils
import pytest
from dseparation import Paths
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, model_graphs, plated_model_graphs

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs import order_search
from pyro_graphflows.graphs.convert import from_bif
from pyro_graphflows.graphs.inversion import SiteElimination, faithful_inverse
from pyro_graphflows.graphs.library import factor_analysis, load_network
from pyro_graphflows.graphs.order_search import AutoOrder, EliminationTree
from pyro_graphflows.graphs.separation import is_imap, is_minimal_imap
from pyro_graphflows.graphs.structures import ModelGraph

BIF = Path(pgmpy.utils.__file__).parent / "example_models"
FEW = 0.02  # nominal seconds


def grid(height, width):
    """A grid of latent nodes, each neighbouring pair with an observed effect; its moral graph has large cliques."""
    edges, observed = [], []
    for i in range(height):
        for j in range(width):
            for other in ((i + 1, j), (i, j + 1)):
                if other[0] < height and other[1] < width:
                    observed.append(f"x{len(observed)}")
                    edges += [(f"z{i},{j}", observed[-1]), (f"z{other[0]},{other[1]}", observed[-1])]
    return ModelGraph(edges, observed)


@examples(60)
@given(model_graphs(max_nodes=9), st.integers(0, 1000))
def test_rotations_keep_the_tree_of_an_elimination(graph, seed):
    """After many rotations the tree is that of an elimination from scratch in its own order."""
    elimination = SiteElimination(graph)
    sites = list(elimination.fruitful)
    if not sites:
        return
    tree = EliminationTree(elimination.site_graph(), sites, {})
    draw = random.Random(seed)
    for _ in range(5):
        best, _ = tree.anneal(draw, 20, 50.0)
        for parents in (best, tree.parent):
            sequence = order_search._sequence(parents, {})
            again = EliminationTree(elimination.site_graph(), sequence, {})
            assert again.parent == parents
            barren_edges = elimination.eliminate([]).num_edges
            assert elimination.eliminate(sequence).num_edges == again.num_edges + barren_edges
        assert tree.num_edges == again.num_edges  # of tree.parent, the last one
        assert tree._around == again._around
        assert tree._children == again._children


@examples(25)
@given(model_graphs(max_nodes=7))
def test_small_graphs_get_the_fewest_edges_there_are(graph):
    inverse = faithful_inverse(graph, AutoOrder(seconds=FEW))
    assert inverse.num_edges == min(
        faithful_inverse(graph, order).num_edges for order in permutations(graph.latent)
    )
    edges = [(a, b) for b in graph.nodes for a in graph.parents(b)]
    assert Paths(graph.nodes, edges).is_minimal_imap(inverse)


@examples(40)
@given(plated_model_graphs())
def test_plates(graph):
    """Inner sites are eliminated first, and the graph over sites says what the expanded one does."""
    inverse = faithful_inverse(graph, AutoOrder(seconds=FEW))
    assert is_imap(inverse)
    assert is_minimal_imap(inverse)
    assert inverse.num_edges <= faithful_inverse(graph).num_edges
    elimination = SiteElimination(graph)
    start = elimination.run("min_fill")
    sequence = [site for site in start.sequence if site not in elimination.barren]
    tree = EliminationTree(elimination.site_graph(), sequence, {})
    assert tree.num_edges == elimination.eliminate(sequence).num_edges - elimination.eliminate([]).num_edges


def test_the_order_in_plates_and_in_the_tree_may_contradict():
    parents = {0: 1, 1: -1}
    assert order_search._sequence(parents, {0: 0b10, 1: 0}) == [0, 1]
    assert order_search._sequence(parents, {0: 0, 1: 0b01}) is None


def test_forbidden_rotations_are_not_made():
    adjacent = {0: 0b10, 1: 0b01}
    tree = EliminationTree(adjacent, [0, 1], {0: 0b10})
    tree.anneal(random.Random(0), 100, 10.0)
    assert tree.parent == {0: 1, 1: -1}
    tree = EliminationTree(adjacent, [0, 1], {})
    found = {tuple(tree.anneal(random.Random(seed), 100, 10.0)[0].values()) for seed in range(10)}
    assert found == {(1, -1), (-1, 0)}


@pytest.mark.parametrize(
    ("name", "seconds", "greedy", "most"), [("ecoli70", 0.2, 182, 179), ("arth150", 0.3, 385, 382)]
)
def test_published_networks(name, seconds, greedy, most):
    graph = load_network(name).graph()
    inverse = faithful_inverse(graph, AutoOrder(seconds=seconds))
    assert faithful_inverse(graph).num_edges == greedy
    assert inverse.num_edges <= most
    assert inverse.order == "search"
    assert is_imap(inverse)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "greedy", "most"), [("munin1", 861, 839), ("pigs", 2737, 2692)])
def test_large_networks(name, greedy, most):
    """The bounds are the best of four other heuristics and annealing."""
    graph = from_bif(BIF / f"{name}.bif.gz")
    assert faithful_inverse(graph).num_edges == greedy
    assert faithful_inverse(graph, AutoOrder(seconds=5)).num_edges <= most


def test_seeds_decide_and_nothing_else():
    graph = grid(4, 5)
    state = random.getstate()
    first, again = (faithful_inverse(graph, AutoOrder(seconds=0.1, seed=3)) for _ in range(2))
    assert first.parents == again.parents
    assert first.sampling_order == again.sampling_order
    assert random.getstate() == state
    others = {faithful_inverse(graph, AutoOrder(0.01, seed)).sampling_order for seed in range(5)}
    assert len(others) > 1


def test_the_search_ends_when_it_finds_no_more(monkeypatch):
    rounds = []
    anneal = EliminationTree.anneal
    monkeypatch.setattr(EliminationTree, "anneal", lambda *args: rounds.append(1) or anneal(*args))
    faithful_inverse(factor_analysis(4, 2), AutoOrder(seconds=1000))
    assert len(rounds) == order_search.REPEATS


@pytest.mark.parametrize(
    "graph", [ModelGraph([], ["x"], nodes=["x"]), ModelGraph([("z", "x")], ["x"]), ModelGraph(["ab"], [])]
)
def test_nothing_to_search(graph):
    inverse = faithful_inverse(graph, AutoOrder())
    assert inverse.parents == faithful_inverse(graph).parents
    assert inverse.order == faithful_inverse(graph).order


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), "5", True])
def test_wrong_seconds(seconds):
    with pytest.raises(GraphflowsError, match=r"Expected a search of more than 0 seconds.*order='auto'"):
        AutoOrder(seconds=seconds)


def test_wrong_seed():
    with pytest.raises(
        GraphflowsError, match=r"Expected an integer as the seed of the search; got seed=0\.5"
    ):
        AutoOrder(seed=0.5)
