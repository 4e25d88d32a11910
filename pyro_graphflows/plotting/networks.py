"""Model graphs and their inverses in levels, on one layout; an inverse as a matrix, where a drawing is too full."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph, Node
from pyro_graphflows.plotting.figures import INK, new_axes, saved
from pyro_graphflows.plotting.layout import Layout, layered_layout

__all__ = ["plot_adjacency", "plot_inverse", "plot_model_and_inverse", "plot_model_graph"]

FACE = {"latent": "white", "observed": "#c9d3de", "input": "#f3e3b5", "marginalised": "white"}
EDGE, ADDED = "#5b6875", "#d1570c"
FONT_SIZE, HEIGHT = 7.5, 19.0  # points
UNIT = (0.46, 0.8)  # inches for one unit of the layout: a node of one character, a level
MANY_EDGES = 60  # a drawing of more of them shows nothing but that there are many
PALE = 0.13  # the opacity of what is not highlighted


def plot_model_graph(graph: ModelGraph, ax: Any = None, *, layout: Layout | None = None) -> Any:
    """Draw a model graph in levels, parents above children.

    Args:
        graph: The graph. Where nodes live in different plates, a plate is a box around its nodes; its name is
            written beside each of them where a box would hold others, too.
        ax: Matplotlib axes; a new figure of fitting size, with a legend, by default.
        layout: Positions and routes; computed by default.

    Returns:
        The axes.
    """
    layout = layout or layered_layout(graph.to_networkx())
    own = ax is None
    ax = new_axes(_size(graph, layout)) if own else ax
    drawing = _Drawing(ax, layout, _draw_nodes(graph, layout, ax))
    for parent, child in graph.edges:
        _draw_edge(drawing, (parent, child), route=layout.routes.get((parent, child), ()))
    _finish(ax, layout, f"Model: {len(graph.edges)} edges")
    if own:
        _legend(ax.figure, graph)
    return ax


def plot_inverse(
    inverse: InverseGraph,
    ax: Any = None,
    *,
    layout: Layout | None = None,
    highlight: Node | Iterable[Node] | None = None,
) -> Any:
    """Draw an inverse on the layout of its model graph, so that the two can be compared.

    Edges that reverse or keep an edge of the model are grey and run as in the model; added edges, which join
    nodes that are not neighbours in the model, are coloured and bent.

    Args:
        inverse: The inverse.
        ax: Matplotlib axes; a new figure of fitting size, with a legend, by default.
        layout: Positions and routes; by default those of the model graph.
        highlight: Latent nodes; the edges into them stand out, and what has no part in these is pale.

    Returns:
        The axes.

    Raises:
        GraphflowsError: If a highlighted node is no latent one.
    """
    graph = inverse.graph
    chosen = _highlighted(inverse, highlight)
    shown = chosen | {parent for node in chosen for parent in inverse.parents[node]}
    layout = layout or layered_layout(graph.to_networkx())
    own = ax is None
    ax = new_axes(_size(graph, layout)) if own else ax
    shapes = _draw_nodes(graph, layout, ax, pale=set(graph.nodes) - shown if chosen else ())
    drawing = _Drawing(ax, layout, shapes)
    old, new = _edges_by_origin(inverse)
    low, high = _extent(layout)
    box = ax.get_position()
    unit = ax.figure.get_size_inches() * (box.width, box.height) / (high - low + 1.15)
    for parent, child in new:
        bulge = _bulge(layout, unit, parent, child)
        pale = bool(chosen) and child not in chosen
        _draw_edge(drawing, (parent, child), bulge=bulge, pale=pale)
    for parent, child in old:
        route = layout.routes.get((parent, child), layout.routes.get((child, parent), ())[::-1])
        pale = bool(chosen) and child not in chosen
        _draw_edge(drawing, (parent, child), route=route, pale=pale)
    counts = f"{inverse.num_edges} edges ({len(new)} added), {len(inverse.levels)} levels"
    looked = f"\nHighlighted: what {', '.join(map(str, sorted(chosen, key=str)))} looks at" if chosen else ""
    _finish(ax, layout, f"Inverse, {inverse.order}: {counts}{looked}")
    if own:
        _legend(ax.figure, graph, origins=True)
    return ax


def plot_adjacency(inverse: InverseGraph, ax: Any = None) -> Any:
    """Draw an inverse as a matrix: a row for each latent node, a column for each that it may look at.

    Rows, and the columns of latent nodes, are in the order of sampling, so that what is looked at is left of the
    diagonal; observed nodes and inputs follow. Edges that reverse or keep one of the model are grey, added ones
    coloured, as in :func:`plot_inverse`.

    Args:
        inverse: The inverse.
        ax: Matplotlib axes; a new figure of fitting size by default.

    Returns:
        The axes.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    graph = inverse.graph
    latents = [node for level in inverse.levels for node in level]
    others = sorted({p for above in inverse.parents.values() for p in above} - set(latents), key=str)
    columns = [*latents, *others]
    place = {node: i for i, node in enumerate(columns)}
    kinds = np.zeros((len(latents), len(columns)))
    for kind, edges in enumerate(_edges_by_origin(inverse), start=1):
        for parent, child in edges:
            kinds[place[child], place[parent]] = kind
    unit = 0.13
    ax = (
        new_axes((max(3.4, unit * len(columns) + 1.3), max(2.4, unit * len(latents) + 1.5)))
        if ax is None
        else ax
    )
    ax.imshow(kinds, cmap=ListedColormap(["white", EDGE, ADDED]), vmin=0, vmax=2, interpolation="none")
    ax.set_xticks(range(len(columns)), [str(node) for node in columns], rotation=90, fontsize=FONT_SIZE - 1.5)
    ax.set_yticks(range(len(latents)), [str(node) for node in latents], fontsize=FONT_SIZE - 1.5)
    ax.set_xticks(np.arange(len(columns)) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(latents)) - 0.5, minor=True)
    ax.grid(which="minor", color="#e6e9ed", linewidth=0.5)
    ax.tick_params(which="both", length=0)
    ax.axvline(len(latents) - 0.5, color=INK, linewidth=1)
    data = "data and inputs" if graph.inputs else "data"
    ax.set_xlabel(f"latent, in the order of sampling   |   {data}", fontsize=8)
    ax.set_ylabel("sampled given", fontsize=8)
    share = inverse.num_edges / max(1, _most_edges(len(latents), len(others)))
    ax.set_title(f"{inverse.num_edges} edges, {share:.0%} of what may be looked at", fontsize=9, color=INK)
    handles = [Patch(color=EDGE, label="reversed or kept"), Patch(color=ADDED, label="added")]
    ax.legend(
        handles=handles, frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=1
    )
    return ax


def _most_edges(num_latents: int, num_others: int) -> int:
    return num_latents * (num_latents - 1) // 2 + num_latents * num_others


def _highlighted(inverse: InverseGraph, highlight: Node | Iterable[Node] | None) -> set[Node]:
    """Return the highlighted nodes: one is given as itself, several as a list or a set of them."""
    if highlight is None:
        return set()
    several = isinstance(highlight, list | set | frozenset) or (
        isinstance(highlight, tuple) and highlight not in inverse.parents
    )
    chosen: set[Node] = set(highlight) if several else {highlight}
    unknown = sorted(map(str, chosen - set(inverse.parents)))
    if unknown:
        known = ", ".join(map(str, inverse.parents))
        raise GraphflowsError(f"Expected highlight= latent nodes ({known}); got {', '.join(unknown)}.")
    return chosen


def plot_model_and_inverse(
    graph: ModelGraph,
    inverse: InverseGraph,
    path: str | Path | None = None,
    *,
    highlight: Node | Iterable[Node] | None = None,
) -> Any:
    """Draw a model graph and its inverse side by side on one layout.

    An inverse of more than 60 edges is shown as a matrix as well, and its drawing highlights one node: the one that
    looks at most, unless others are given.

    Args:
        graph: The model graph.
        inverse: Its inverse.
        path: Where to save the figure; not saved by default.
        highlight: Latent nodes whose edges stand out in the inverse.

    Returns:
        The figure.

    Raises:
        GraphflowsError: If ``inverse`` is not an inverse of ``graph``, or a highlighted node is no latent one.
    """
    from matplotlib.figure import Figure

    if inverse.graph != graph:
        raise GraphflowsError(f"Expected an inverse of {graph!r}; got one of {inverse.graph!r}.")
    layout = layered_layout(graph.to_networkx())
    width, height = _size(graph, layout)
    if inverse.num_edges > MANY_EDGES:
        if highlight is None:
            highlight = [max(inverse.parents, key=lambda node: len(inverse.parents[node]))]
        figure = Figure(figsize=(width, 3 * height), layout="constrained")
        axes = figure.subplots(3, 1)
        plot_adjacency(inverse, axes[2])
    else:
        beside = width <= 1.3 * height + 4
        size = (2 * width, height) if beside else (width, 2 * height)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(*((1, 2) if beside else (2, 1)))
    plot_model_graph(graph, axes[0], layout=layout)
    plot_inverse(inverse, axes[1], layout=layout, highlight=highlight)
    _legend(figure, graph, origins=True)
    return saved(figure, path)


def _edges_by_origin(inverse: InverseGraph) -> tuple[list[tuple[Node, Node]], list[tuple[Node, Node]]]:
    """Return the edges of the inverse between neighbours in the model, and the others."""
    neighbours = {frozenset(edge) for edge in inverse.graph.edges}
    edges = [(parent, node) for node, above in inverse.parents.items() for parent in above]
    old = [edge for edge in edges if frozenset(edge) in neighbours]
    return old, [edge for edge in edges if frozenset(edge) not in neighbours]


def _extent(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower left and the upper right corner of all points."""
    routes = [point for route in layout.routes.values() for point in route]
    points = np.array([*layout.positions.values(), *routes] or [(0.0, 0.0)])
    return points.min(axis=0), points.max(axis=0)


def _width(node: Node) -> float:
    """Return the width of a node in points: a circle, or as wide as its name."""
    return max(HEIGHT, 0.62 * FONT_SIZE * len(str(node)) + 9)


def _size(graph: ModelGraph, layout: Layout) -> tuple[float, float]:
    """Return the size in inches of a figure in which the nodes do not overlap."""
    low, high = _extent(layout)
    width, height = high - low
    unit = max([UNIT[0], *((_width(node) + 5) / 72 for node in graph.nodes)])
    return max(3.8, (width + 1.2) * unit), max(2.2, (height + 1.1) * UNIT[1] + 0.6)


def _plate_boxes(graph: ModelGraph, layout: Layout) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the corners of a box for each plate whose box holds its own nodes and no others.

    None where all nodes are in the same plates: boxes around everything say nothing.
    """
    if len({graph.plates[node] for node in graph.nodes}) < 2:
        return {}
    boxes = {}
    for plate in sorted({plate for node in graph.nodes for plate in graph.plates[node]}):
        inside = {node for node in graph.nodes if plate in graph.plates[node]}
        points = np.array([layout.positions[node] for node in inside])
        low, high = points.min(axis=0), points.max(axis=0)
        rest = np.array([layout.positions[node] for node in graph.nodes if node not in inside]).reshape(-1, 2)
        reach = np.array([0.99, 0.4])  # within it the margins of the box would cut a node
        if not ((rest > low - reach) & (rest < high + reach)).all(axis=1).any():
            boxes[plate] = low, high
    return boxes


def _draw_boxes(graph: ModelGraph, layout: Layout, ax: Any) -> set[str]:
    """Draw plates as boxes with their names in a corner; return those that have one."""
    from matplotlib.patches import FancyBboxPatch

    boxes = _plate_boxes(graph, layout)
    for plate, (low, high) in boxes.items():
        depth = sum(set(graph.plates[node]) > {plate} for node in graph.nodes)
        margin = np.array([0.5, 0.29]) + 0.05 * min(depth, 4)
        corner, size = low - margin, high - low + 2 * margin
        box = FancyBboxPatch((corner[0], corner[1]), size[0], size[1])
        box.set_boxstyle("round", pad=0, rounding_size=0.12)
        box.set(facecolor="none", edgecolor=EDGE, linewidth=0.8, zorder=0)
        box.set_in_layout(False)
        box.set_clip_on(False)
        ax.add_artist(box)
        style = {"fontsize": FONT_SIZE - 1, "fontstyle": "italic", "color": EDGE, "zorder": 4}
        at = (corner[0] + size[0], corner[1])
        offset = {"xytext": (-3, 2), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        ax.annotate(plate, at, **offset, **style)
    return set(boxes)


def _draw_nodes(graph: ModelGraph, layout: Layout, ax: Any, pale: Collection[Node] = ()) -> dict[Node, Any]:
    """Draw shapes of a size in points, whatever the axes, and plates; return the shapes by node."""
    from matplotlib.patches import Ellipse, Rectangle
    from matplotlib.transforms import Affine2D, ScaledTranslation

    points = Affine2D().scale(1 / 72) + ax.figure.dpi_scale_trans
    boxed = _draw_boxes(graph, layout, ax)
    several = len({graph.plates[node] for node in graph.nodes}) > 1
    patches = {}
    for node in graph.nodes:
        (x, y), role, width = layout.positions[node], graph.role(node), _width(node)
        if role == "input":
            shape: Any = Rectangle((-width / 2, -HEIGHT / 2), width, HEIGHT)
        else:
            shape = Ellipse((0, 0), width, HEIGHT)
        shape.set(facecolor=FACE[role], edgecolor=INK, linewidth=0.9, zorder=3)
        shape.set_linestyle("--" if role == "marginalised" else "-")
        shape.set_transform(points + ScaledTranslation(x, y, ax.transData))
        ax.add_artist(shape)
        shape.set_alpha(0.35 if node in pale else None)
        style = {"fontsize": FONT_SIZE, "color": INK, "zorder": 4, "alpha": 0.35 if node in pale else 1.0}
        ax.text(x, y, str(node), ha="center", va="center_baseline", **style)
        unboxed = [plate for plate in graph.plates[node] if plate not in boxed]
        if several and unboxed:
            corner = {"xytext": (0.42 * width, -0.42 * HEIGHT), "textcoords": "offset points", "va": "top"}
            style |= {"fontsize": FONT_SIZE - 1.5, "fontstyle": "italic"}
            ax.annotate(", ".join(unboxed), (x, y), **corner, **style)
        patches[node] = shape
    return patches


@dataclass(frozen=True)
class _Drawing:
    """Nodes that are drawn: where, on what, and as which shapes."""

    ax: Any
    layout: Layout
    shapes: Mapping[Node, Any]


def _draw_edge(
    drawing: _Drawing,
    edge: tuple[Node, Node],
    *,
    route: Sequence[tuple[float, float]] = (),
    bulge: float | None = None,
    pale: bool = False,
) -> None:
    """Draw an edge along its route; added edges are coloured, and bent by their bulge."""
    ax, layout, (parent, child) = drawing.ax, drawing.layout, edge
    colour = EDGE if bulge is None else ADDED
    bulge = bulge or 0.0
    from matplotlib.patches import ConnectionStyle, FancyArrowPatch
    from matplotlib.path import Path as Curve

    class Through(ConnectionStyle.Arc3):
        """A smooth curve through the waypoints of an edge."""

        def connect(self, start: Any, end: Any) -> Any:
            knots = np.array([start, *ax.transData.transform(np.array(route)), end])
            slopes = np.gradient(knots, axis=0)
            points = [knots[0]]
            for i in range(len(knots) - 1):
                points += [knots[i] + slopes[i] / 3, knots[i + 1] - slopes[i + 1] / 3, knots[i + 1]]
            return Curve(points, [Curve.MOVETO] + [Curve.CURVE4] * (len(points) - 1))

    style = Through() if route else ConnectionStyle.Arc3(rad=bulge)
    arrow = FancyArrowPatch(
        layout.positions[parent],
        layout.positions[child],
        connectionstyle=style,
        patchA=drawing.shapes[parent],
        patchB=drawing.shapes[child],
        shrinkA=0,
        shrinkB=1,
        arrowstyle="-|>",
        mutation_scale=7,
        linewidth=0.7 if bulge else 0.9,
        color=colour,
        alpha=PALE if pale else 0.65 if bulge else 0.9,
        zorder=1 if bulge else 2,
        clip_on=False,
    )
    arrow.set_in_layout(False)
    ax.add_artist(arrow)


def _bulge(layout: Layout, unit: np.ndarray, parent: Node, child: Node) -> float:
    """Return the curvature of an added edge that keeps clear of the other nodes, and is small.

    ``unit`` is the size of one unit of the layout in inches.
    """
    start, end = (np.array(layout.positions[node]) * unit for node in (parent, child))
    others = np.array([xy for node, xy in layout.positions.items() if node not in (parent, child)])
    others = others.reshape(-1, 2) * unit
    (dx, dy), length = end - start, float(np.linalg.norm(end - start))
    t = np.linspace(0.1, 0.9, 17)[:, None]
    best, lowest = 0.0, np.inf
    for height in (0.1, -0.1, 0.25, -0.25, 0.45, -0.45, 0.7, -0.7):  # inches off the straight line
        middle = (start + end) / 2 + 2 * height / length * np.array([dy, -dx])
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
        clear = np.linalg.norm(curve - others[:, None], axis=-1).min(initial=np.inf)
        cost = abs(height) + 10 * max(0.0, 0.2 - clear)
        if cost < lowest:
            best, lowest = 2 * height / length, cost
    return best


def _finish(ax: Any, layout: Layout, title: str) -> None:
    low, high = _extent(layout)
    ax.set_title(title, fontsize=9, color=INK)
    ax.set_axis_off()
    ax.set_xlim(low[0] - 0.6, high[0] + 0.6)
    ax.set_ylim(low[1] - 0.4, high[1] + 0.7)  # added edges may rise above the top level


def _legend(figure: Any, graph: ModelGraph, *, origins: bool = False) -> None:
    """Add the meaning of shapes and colours below a figure."""
    from matplotlib.lines import Line2D

    shape: dict[str, Any] = {"linestyle": "none", "markersize": 8, "markeredgecolor": INK}
    handles = [
        Line2D(
            [], [], marker="s" if role == "input" else "o", markerfacecolor=FACE[role], label=role, **shape
        )
        for role in dict.fromkeys(graph.role(node) for node in graph.nodes)
    ]
    if origins:
        handles.append(Line2D([], [], color=EDGE, linewidth=1.2, label="reversed or kept"))
        handles.append(Line2D([], [], color=ADDED, linewidth=1.2, label="added"))
    fitting = max(1, int(figure.get_figwidth() / 1.15))
    style = {"frameon": False, "fontsize": 7.5, "ncols": min(len(handles), fitting)}
    figure.legend(handles=handles, loc="outside lower center", **style)
