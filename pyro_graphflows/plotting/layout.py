"""Layered drawings of directed acyclic graphs: where to put the nodes, and how to lead long edges past them.

Nodes go on *levels*, parents above children. An edge over several levels gets a *waypoint* on each level in
between, so that it has room of its own. Then the order within each level is chosen to have few crossings, and
the horizontal positions so that edges run straight.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from pyro_graphflows.graphs.structures import Node, topological_order

__all__ = ["Layout", "layered_layout"]

Point = tuple[float, float]
SWEEPS = 24


@dataclass(frozen=True)
class Layout:
    """The positions of the nodes, and for each edge the waypoints between its ends, from parent to child.

    The unit of x is the width of a node with its margin; y is minus the level.
    """

    positions: Mapping[Node, Point]
    routes: Mapping[tuple[Node, Node], tuple[Point, ...]]


def layered_layout(graph: nx.DiGraph) -> Layout:
    """Lay out a directed acyclic graph in levels.

    A node is one level below its lowest parent; a node without parents one level above its highest child. The
    result is the same on each run: ties follow the order of the nodes in ``graph``.

    References:
        [1] Sugiyama, Tagawa and Toda (1981), Methods for Visual Understanding of Hierarchical System Structures,
        IEEE Transactions on Systems, Man, and Cybernetics 11: levels, waypoints, sweeps by barycentres. The
        horizontal positions here are least squares with a minimal separation, level by level.

    Args:
        graph: The graph.

    Returns:
        Positions of the nodes and routes of the edges.

    Raises:
        NotADAGError: If ``graph`` has a directed cycle. The message lists one.

    Example:
        >>> layout = layered_layout(nx.DiGraph([("a", "b"), ("b", "c"), ("a", "c")]))
        >>> [y for _, y in layout.positions.values()]
        [0.0, -1.0, -2.0]
        >>> {edge: len(route) for edge, route in layout.routes.items()}
        {('a', 'b'): 0, ('a', 'c'): 1, ('b', 'c'): 0}
    """
    level = _levels(graph)
    neighbours, chains = _with_waypoints(graph, level)
    rows: list[list[int]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    index = {node: i for i, node in enumerate(graph)}
    heights = [level[node] for node in graph]
    for chain in chains.values():
        heights.extend(heights[chain[0]] + k for k in range(1, len(chain) - 1))
    for point in _depth_first(neighbours, range(len(heights)), heights):
        rows[heights[point]].append(point)
    rows = _fewest_crossings(rows, neighbours, heights)
    x = _straighten(rows, neighbours, num_nodes=len(index))
    points: list[Point] = [(float(a), float(-b)) for a, b in zip(x, heights, strict=True)]
    return Layout(
        positions={node: points[i] for node, i in index.items()},
        routes={edge: tuple(points[i] for i in chain[1:-1]) for edge, chain in chains.items()},
    )


def _levels(graph: nx.DiGraph) -> dict[Node, int]:
    level: dict[Node, int] = {}
    for node in topological_order(graph):
        level[node] = 1 + max((level[parent] for parent in graph.predecessors(node)), default=-1)
    for node in graph:
        if not graph.in_degree(node) and graph.out_degree(node):
            level[node] = min(level[child] for child in graph.successors(node)) - 1
    return level


def _with_waypoints(
    graph: nx.DiGraph, level: Mapping[Node, int]
) -> tuple[list[tuple[list[int], list[int]]], dict[tuple[Node, Node], list[int]]]:
    """Return the neighbours (above, below) of each point, and each edge as a chain of points.

    Points are numbered: first the nodes, then the waypoints.
    """
    index = {node: i for i, node in enumerate(graph)}
    neighbours: list[tuple[list[int], list[int]]] = [([], []) for _ in graph]
    chains = {}
    for parent, child in graph.edges:
        chain = [index[parent]]
        for _ in range(level[child] - level[parent] - 1):
            chain.append(len(neighbours))
            neighbours.append(([], []))
        chain.append(index[child])
        for above, below in itertools.pairwise(chain):
            neighbours[above][1].append(below)
            neighbours[below][0].append(above)
        chains[parent, child] = chain
    return neighbours, chains


def _depth_first(
    neighbours: Sequence[tuple[list[int], list[int]]], points: Sequence[int], heights: Sequence[int]
) -> list[int]:
    """Return the points in depth-first order of the undirected graph: related points come close together."""
    seen: dict[int, None] = {}
    for start in sorted(points, key=lambda point: (heights[point], point)):
        stack = [start]
        while stack:
            point = stack.pop()
            if point not in seen:
                seen[point] = None
                stack.extend(reversed([*neighbours[point][1], *neighbours[point][0]]))
    return list(seen)


def _crossings(
    upper: Sequence[int], lower: Sequence[int], neighbours: Sequence[tuple[list[int], list[int]]]
) -> int:
    place = {point: i for i, point in enumerate(lower)}
    ends = [i for point in upper for i in sorted(place[below] for below in neighbours[point][1])]
    if len(ends) < 2:
        return 0
    array = np.array(ends)
    return int(sum((array[:i] > array[i]).sum() for i in range(1, len(array))))


def _fewest_crossings(
    rows: list[list[int]], neighbours: Sequence[tuple[list[int], list[int]]], heights: Sequence[int]
) -> list[list[int]]:
    """Sweep down and up, sorting each row by the mean place of its neighbours; keep the best order seen."""

    def total(rows: list[list[int]]) -> int:
        pairs = itertools.pairwise(rows)
        return sum(_crossings(upper, lower, neighbours) for upper, lower in pairs)

    best, fewest = [list(row) for row in rows], total(rows)
    for sweep in range(SWEEPS):
        side = sweep % 2  # 0: by the row above, going down; 1: by the row below, going up
        for row in rows[1:] if side == 0 else rows[-2::-1]:
            place = _relative_places(rows, heights[row[0]] + (1 if side else -1))
            own = {point: (i + 0.5) / len(row) for i, point in enumerate(row)}
            centre = {
                point: float(np.mean([place[other] for other in neighbours[point][side]]))
                if neighbours[point][side]
                else own[point]
                for point in row
            }
            row.sort(key=lambda point: (centre[point], own[point]))
        _swap_neighbours(rows, neighbours)
        crossings = total(rows)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _relative_places(rows: Sequence[Sequence[int]], level: int) -> dict[int, float]:
    return {point: (i + 0.5) / len(rows[level]) for i, point in enumerate(rows[level])}


def _swap_neighbours(rows: list[list[int]], neighbours: Sequence[tuple[list[int], list[int]]]) -> None:
    """Swap points next to each other wherever that removes crossings."""
    for level, row in enumerate(rows):
        place = {}
        for other in (level - 1, level + 1):
            if 0 <= other < len(rows):
                place.update({point: i for i, point in enumerate(rows[other])})
        changed = True
        while changed:
            changed = False
            for i in range(len(row) - 1):
                a, b = row[i], row[i + 1]
                gain = 0
                for side in (0, 1):
                    left = np.array([place[point] for point in neighbours[a][side]])
                    right = np.array([place[point] for point in neighbours[b][side]])
                    difference = left[:, None] - right
                    gain += int((difference > 0).sum() - (difference < 0).sum())
                if gain > 0:
                    row[i], row[i + 1] = b, a
                    changed = True


def _straighten(
    rows: Sequence[Sequence[int]], neighbours: Sequence[tuple[list[int], list[int]]], num_nodes: int
) -> np.ndarray:
    """Return horizontal positions near the mean of the neighbours', in the given order and separated."""
    x = np.zeros(len(neighbours))
    widths = np.where(np.arange(len(neighbours)) < num_nodes, 1.0, 0.4)
    for row in rows:
        places = np.cumsum(widths[row]) - widths[row] / 2
        x[row] = places - places.mean()
    for sweep in range(SWEEPS + 1):
        last = sweep == SWEEPS  # at last every node goes above its children
        for row in rows if sweep % 2 else rows[::-1]:
            wished = np.array([_wished(x, i, *neighbours[i], above=last and i < num_nodes) for i in row])
            offsets = np.concatenate([[0.0], np.cumsum((widths[row][1:] + widths[row][:-1]) / 2)])
            x[row] = _nondecreasing(wished - offsets) + offsets
    return x - x.min() if len(x) else x


def _wished(
    x: np.ndarray, point: int, parents: Sequence[int], children: Sequence[int], *, above: bool
) -> float:
    """Return the mean of the mean positions of parents and of children (of the latter alone if ``above``)."""
    sides = [children] if above else [parents, children]
    means = [x[side].mean() for side in sides if side]
    return float(np.mean(means)) if means else float(x[point])


def _nondecreasing(values: np.ndarray) -> np.ndarray:
    """Return the nearest nondecreasing sequence in least squares, by pooling adjacent violators."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] > mean:
            other, count = blocks.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        blocks.append((mean, size))
    return np.repeat([mean for mean, _ in blocks], [size for _, size in blocks])
