import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch, Rectangle

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs import library
from pyro_graphflows.graphs.inversion import faithful_inverse
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.plotting import (
    plot_adjacency,
    plot_inverse,
    plot_learning_curves,
    plot_marginals,
    plot_model_and_inverse,
    plot_model_graph,
)
from pyro_graphflows.plotting.networks import ADDED

GRAPHS = {
    "student": library.student_network(),
    "eight_schools": library.eight_schools(),
    "marginalised": ModelGraph([("m", "x"), ("z", "m"), ("z", "x")], ["x"], marginalised=["m"]),
    "one node": ModelGraph([], [], nodes=["z"]),
    "empty": ModelGraph([], []),
}


def arrows(ax):
    return [artist for artist in ax.get_children() if isinstance(artist, FancyArrowPatch)]


def shapes(ax):
    return [artist for artist in ax.get_children() if isinstance(artist, Ellipse | Rectangle)][:-1]


def boxes(ax):
    return [artist for artist in ax.get_children() if isinstance(artist, FancyBboxPatch)]


def names(ax):
    return {text.get_text() for text in ax.texts}


@pytest.mark.parametrize("name", GRAPHS)
def test_model_and_inverse(name, tmp_path):
    graph = GRAPHS[name]
    inverse = faithful_inverse(graph)
    figure = plot_model_and_inverse(graph, inverse, tmp_path / "graph.png")
    assert (tmp_path / "graph.png").stat().st_size > 0
    left, right = figure.axes
    for ax in (left, right):
        assert len(shapes(ax)) == len(graph)
        assert set(map(str, graph.nodes)) <= names(ax)
    assert len(arrows(left)) == len(graph.edges)
    assert len(arrows(right)) == inverse.num_edges
    neighbours = {frozenset(edge) for edge in graph.edges}
    added = [
        (parent, node)
        for node, above in inverse.parents.items()
        for parent in above
        if frozenset((parent, node)) not in neighbours
    ]
    coloured = [arrow for arrow in arrows(right) if to_hex(arrow.get_edgecolor()) == ADDED]
    assert len(coloured) == len(added)
    assert f"({len(added)} added)" in right.get_title()


def test_edges_start_and_end_at_the_border_of_their_nodes():
    ax = plot_model_graph(ModelGraph([("parent", "child")], ["child"]))
    ax.figure.canvas.draw()
    (arrow,) = arrows(ax)
    parent, child = (np.array(ax.transData.transform(xy)) for xy in arrow._posA_posB)
    path = arrow.get_transform().transform_path(arrow.get_path()).vertices
    reach = np.linalg.norm(parent - child)
    for centre in (parent, child):
        nearest = np.linalg.norm(path - centre, axis=1).min()
        assert 0.03 * reach < nearest < 0.5 * reach


def test_roles_and_plates():
    ax = plot_model_graph(library.eight_schools())
    kinds = [type(shape) for shape in shapes(ax)]
    assert (kinds.count(Rectangle), kinds.count(Ellipse)) == (1, 4)
    assert "schools" in names(ax)
    (box,) = boxes(ax)
    inside = [
        ax.texts[i].get_position() for i in range(len(ax.texts)) if ax.texts[i].get_text() in "theta y sigma"
    ]
    outside = [text.get_position() for text in ax.texts if text.get_text() in ("mu", "tau")]
    (left, low), (right, high) = box.get_bbox().min, box.get_bbox().max
    assert len(inside) == 3
    assert all(left < x < right and low < y < high for x, y in inside)
    assert len(outside) == 2
    assert not any(left < x < right and low < y < high for x, y in outside)
    # One plate around everything says nothing.
    graph = library.four_cycle()
    everywhere = ModelGraph(graph.to_networkx(), graph.observed, plates={n: ["data"] for n in graph.nodes})
    assert "data" not in names(plot_model_graph(everywhere))
    styles = {shape.get_linestyle() for shape in shapes(plot_model_graph(GRAPHS["marginalised"]))}
    assert styles == {"-", "--"}


def test_given_axes_are_used():
    figure = Figure()
    axes = figure.subplots(1, 2)
    graph = library.student_network()
    assert plot_model_graph(graph, axes[0]) is axes[0]
    assert plot_inverse(faithful_inverse(graph), axes[1]) is axes[1]
    assert not figure.legends
    assert plot_inverse(faithful_inverse(graph)).figure.legends


def test_ecoli70_is_drawn_legibly():
    """No two labels overlap, at the size that is saved."""
    ax = plot_model_graph(library.load_network("ecoli70").graph())
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 46
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert box.width < shapes(ax)[i].get_window_extent().width


def test_a_plate_whose_box_would_hold_other_nodes_is_written_beside_its_nodes():
    graph = ModelGraph([("a", "m"), ("m", "b"), ("b", "x")], ["x"], plates={"a": ["p"], "b": ["p"]})
    ax = plot_model_graph(graph)
    assert not boxes(ax)
    assert [text.get_text() for text in ax.texts].count("p") == 2


def test_highlighted_nodes_stand_out():
    inverse = faithful_inverse(library.student_network())
    node = max(inverse.parents, key=lambda n: len(inverse.parents[n]))
    for chosen in (node, [node]):
        ax = plot_inverse(inverse, highlight=chosen)
        strong = [arrow for arrow in arrows(ax) if arrow.get_alpha() > 0.5]
        assert len(strong) == len(inverse.parents[node]) < inverse.num_edges
        assert f"what {node} looks at" in ax.get_title()
    with pytest.raises(GraphflowsError, match=r"Expected highlight= latent nodes .* got nobody"):
        plot_inverse(inverse, highlight="nobody")


def test_adjacency_has_a_cell_for_each_edge_and_none_on_or_above_the_diagonal():
    graph = library.load_network("ecoli70").graph()
    inverse = faithful_inverse(graph)
    figure = plot_model_and_inverse(graph, inverse)
    ax = figure.axes[2]
    (image,) = ax.images
    cells = np.asarray(image.get_array())
    assert (cells > 0).sum() == inverse.num_edges == 182
    assert (cells == 2).sum() == 112  # as the title of the drawing says
    assert "112 added" in figure.axes[1].get_title()
    square = cells[:, : len(cells)]
    assert not np.triu(square).any()
    rows = [label.get_text() for label in ax.get_yticklabels()]
    columns = [label.get_text() for label in ax.get_xticklabels()]
    for row, node in enumerate(rows):
        assert {columns[j] for j in np.flatnonzero(cells[row])} == set(inverse.parents[node])
    assert plot_adjacency(faithful_inverse(library.student_network())).figure is not None


def test_inverse_of_another_graph():
    other = InverseGraph(ModelGraph([("z", "x")], ["x"]), {"z": ["x"]})
    with pytest.raises(GraphflowsError, match="Expected an inverse of"):
        plot_model_and_inverse(library.student_network(), other)


def test_no_global_state():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plot_model_graph(library.student_network())
    plot_learning_curves({"a": [1.0]})
    plot_marginals({"a": [1.0, 2.0]})
    assert plt.get_fignums() == before
