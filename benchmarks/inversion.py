"""Time faithful inversion: all networks of a folder by "auto", and binary trees of growing depth.

    python -m benchmarks.inversion --data FOLDER

``FOLDER/dags/dags.json`` holds networks as ``{name: {"nodes": [...], "parents": [[index, ...], ...]}}``; without it
only the packaged networks are timed. Beside each time stands that of a naive Algorithm 1 (Webb et al. 2018, the
same rule with every fill count from scratch), given up after ``--patience`` seconds. For the trees the growth
is the slope of log time in log edges of the inverse.
"""

import argparse
import json
import os
import resource
import sys
import time
from itertools import combinations
from pathlib import Path

import networkx as nx
import numpy as np

from pyro_graphflows.graphs import ModelGraph, faithful_inverse, list_networks, load_network


def naive_inverse(graph, rule, patience):
    """Run Algorithm 1 with fill counts from scratch; return the number of edges, or None when out of patience."""
    stop = time.perf_counter() + patience
    moral = nx.Graph()
    moral.add_nodes_from(graph.nodes)
    for node in graph.nodes:
        moral.add_edges_from(combinations((*graph.parents(node), node), 2))
    known = {*graph.observed, *graph.inputs}
    rank = {node: i for i, node in enumerate(graph.nodes)}
    up = {"forward": graph.parents, "reverse": graph.children}.get(rule, lambda node: ())
    unmarked, edges = set(graph.latent), 0

    def fill(node):
        pairs = combinations(moral[node], 2)
        if rule == "min_fill":
            return sum(not (a in known and b in known) and b not in moral[a] for a, b in pairs)
        return sum(b not in moral[a] for a, b in pairs)

    while unmarked:
        frontier = [node for node in unmarked if unmarked.isdisjoint(up(node))]
        best = None
        for node in frontier:
            if time.perf_counter() > stop:
                return None
            best = min(best or (np.inf, 0), (fill(node), rank[node]))
        node = graph.nodes[best[1]]
        around = list(moral[node])
        edges += len(around)
        moral.add_edges_from(combinations(around, 2))
        moral.remove_node(node)
        unmarked.remove(node)
    return edges


def timed(function, *args, repeats=1):
    """Return the result and the shortest time of some calls."""
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*args)
        best = min(best, time.perf_counter() - start)
    return result, best


def tree_graph(depth):
    """Return the binary tree with ``2 ** depth - 1`` nodes, leaves observed."""
    size = 2**depth - 1
    return ModelGraph([((i - 1) // 2, i) for i in range(1, size)], observed=range(2 ** (depth - 1) - 1, size))


def networks(folder):
    """Yield (name, graph with leaves observed)."""
    path = Path(folder) / "dags" / "dags.json" if folder else None
    if path is None or not path.exists():
        for name in list_networks():
            yield name, load_network(name).graph("leaves")
        return
    for name, data in json.loads(path.read_text()).items():
        dag = nx.DiGraph()
        dag.add_nodes_from(data["nodes"])
        for child, parents in zip(data["nodes"], data["parents"], strict=True):
            dag.add_edges_from((data["nodes"][parent], child) for parent in parents)
        yield name, ModelGraph(dag, observed=[node for node in dag if not dag.out_degree(node)])


def shown(seconds, patience):
    """Write a time, or that patience ran out."""
    return f"> {patience:g}" if seconds is None else f"{seconds:.3f}"


def time_networks(folder, patience):
    """Print one line for each network; return the longest time of "auto"."""
    print(
        "network           nodes latent   edges levels winner        auto [s]  naive min_fill [s]  its edges"
    )
    slowest = 0.0
    for name, graph in networks(folder):
        inverse, seconds = timed(faithful_inverse, graph, repeats=3)
        slowest = max(slowest, seconds)
        edges, naive = timed(naive_inverse, graph, "min_fill", patience)
        print(
            f"{name:17s} {len(graph):5d} {len(graph.latent):6d} {inverse.num_edges:7d} {len(inverse.levels):6d} "
            f"{inverse.order:12s} {seconds:9.3f} {shown(naive if edges else None, patience):>19s} "
            f"{edges or '':>10}",
            flush=True,
        )
    print(f"slowest: {slowest:.3f} s")
    return slowest


def time_trees(depths, patience):
    """Print one line for each depth and rule, and the growth."""
    print("\ndepth  nodes rule          edges levels  time [s]  naive [s]  peak memory [MiB]")
    points = {}
    worn_out = set()
    for depth in depths:
        graph = tree_graph(depth)
        for rule in ("reverse", "min_fill"):
            inverse, seconds = timed(faithful_inverse, graph, rule, repeats=3)
            edges, naive = (None, None) if rule in worn_out else timed(naive_inverse, graph, rule, patience)
            if edges is None:
                worn_out.add(rule)
            else:
                assert edges == inverse.num_edges
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
                2**20 if sys.platform == "darwin" else 2**10
            )
            points.setdefault(rule, []).append((inverse.num_edges, seconds))
            if edges is not None:
                points.setdefault(f"naive {rule}", []).append((edges, naive))
            print(
                f"{depth:5d} {len(graph):6d} {rule:9s} {inverse.num_edges:9d} {len(inverse.levels):6d} "
                f"{seconds:9.3f} {shown(naive if edges else None, patience):>10s} {peak:18.0f}",
                flush=True,
            )
    for rule, found in points.items():
        if len(found) > 1:
            edges, seconds = np.log(np.array(found).T)
            print(f"growth of {rule:14s}: time ~ edges ** {np.polyfit(edges, seconds, 1)[0]:.2f}")


def main(args):
    if args.what in ("networks", "all"):
        time_networks(args.data, args.patience)
    if args.what in ("trees", "all"):
        time_trees(range(args.depths[0], args.depths[1] + 1), args.patience)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default=os.environ.get("PYRO_GRAPHFLOWS_DATA"), help="folder with dags/dags.json"
    )
    parser.add_argument("--what", choices=["networks", "trees", "all"], default="all")
    parser.add_argument(
        "--depths", type=int, nargs=2, default=(6, 14), help="first and last depth of the trees"
    )
    parser.add_argument("--patience", type=float, default=10.0, help="seconds before a naive run is given up")
    main(parser.parse_args())
