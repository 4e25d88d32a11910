"""Count the files that a piece of work passes through, and how often it crosses from one to another.

A Python call whose caller and callee are in different files of the package makes two crossings, there and back; calls
through other libraries count as coming from the file that is left last. Printed for setting up and calling the guide
of the README's example (normal and flow), for its evidence, and for the faithful inverse of ecoli70, with counts of
the house: files, lines, import circles.

    python -m benchmarks.rooms
    python -m benchmarks.rooms --pairs      # the busiest pairs of files and of functions, and who is counted, as well
"""

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import networkx as nx
import pyro
import pyro.distributions as dist
import torch

import pyro_graphflows
from pyro_graphflows import auto_faithful_guide, faithful_inverse, load_network, log_evidence

PACKAGE = Path(pyro_graphflows.__file__).parent
MANY_PARAMETERS = 7


def readme_model(w, y=None):
    with pyro.plate("data", len(w)):
        slope = pyro.sample("slope", dist.Normal(1.0, 0.5))
        offset = pyro.sample("offset", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(slope * w + offset, 0.3), obs=y)


def walk(work: Callable[[], Any]) -> tuple[Counter, Counter, Counter]:
    """Run some work; return the calls in each file of the package, and crossings by pair of files and of functions."""
    prefix = str(PACKAGE) + "/"
    files: Counter = Counter()
    pairs: Counter = Counter()
    functions: Counter = Counter()

    def profile(frame: Any, event: str, _: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(prefix):
            return
        callee = frame.f_code.co_filename
        files[callee[len(prefix) :]] += 1
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(prefix):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != callee:
            pairs[caller.f_code.co_filename[len(prefix) :], callee[len(prefix) :]] += 2
            functions[_place(caller.f_code, prefix), _place(frame.f_code, prefix)] += 2

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return files, pairs, functions


def _place(code: CodeType, prefix: str) -> str:
    name = getattr(code, "co_qualname", code.co_name)  # qualified since Python 3.11
    return f"{code.co_filename[len(prefix) :]}:{name}"


def modules() -> dict[str, ast.Module]:
    """Return the modules of the package by their dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(trees: dict[str, ast.Module]) -> nx.DiGraph:
    """Return which module imports which, also behind ``TYPE_CHECKING``; packages' own files are left out."""
    graph = nx.DiGraph()
    packages = {name.rpartition(".")[0] for name in trees}
    for name, tree in trees.items():
        graph.add_node(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [target if target in trees else str(node.module) for target in targets]
                graph.add_edges_from((name, target) for target in targets if target not in packages)
    return graph


def house(names: bool) -> None:
    """Print counts of files, lines, circles, single importers and long signatures; with names, which these are."""
    trees = modules()
    graph = imports(trees)
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    circles = [part for part in nx.strongly_connected_components(graph) if len(part) > 1]
    plain = [name for name in graph if name not in {other.rpartition(".")[0] for other in trees}]
    single = [name for name in plain if graph.in_degree(name) == 1]
    long = [
        f"{name}.{node.name}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and _num_parameters(node) >= MANY_PARAMETERS
    ]
    exported = sum(
        len(ast.literal_eval(node.value))
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    print(f"files {len(lines)}, lines {sum(lines.values())}, names in __all__ {exported}")
    for package in sorted({path.parent for path in lines}):
        inside = [count for path, count in lines.items() if path.parent == package]
        print(f"  {package.relative_to(PACKAGE.parent)}: {len(inside)} files, {sum(inside)} lines")
    print(f"import circles {len(circles)}, modules with one importer {len(single)}")
    for name in single if names else ():
        print(f"    {name}  <-  {next(iter(graph.predecessors(name)))}")
    print(f"functions with {MANY_PARAMETERS} parameters or more {len(long)}")
    for name in long if names else ():
        print(f"    {name}")


def _num_parameters(node: ast.FunctionDef) -> int:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    every += [part for part in (node.args.vararg, node.args.kwarg) if part is not None]
    return sum(argument.arg not in ("self", "cls") for argument in every)


def report(name: str, work: Callable[[], Any], pairs: bool) -> None:
    files, crossings, functions = walk(work)
    print(f"{name}: {len(files)} files, {sum(crossings.values())} crossings")
    if not pairs:
        return
    print(f"    calls: {', '.join(f'{file} {count}' for file, count in files.most_common())}")
    for found in (crossings, functions):
        for (caller, callee), count in found.most_common(40):
            print(f"    {count:5d}  {caller} -> {callee}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", action="store_true", help="print the busiest pairs, and names")
    args = parser.parse_args(argv)
    house(args.pairs)
    pyro.set_rng_seed(0)
    w, y = torch.randn(200), torch.randn(200)
    guides = {}
    for family in ("normal", "flow"):

        def set_up(family: str = family) -> None:
            guides[family] = auto_faithful_guide(readme_model, w, y, family=family)

        report(f"set-up, {family}", set_up, args.pairs)
        guides[family](w, y)
        report(f"call, {family}", lambda family=family: guides[family](w, y), args.pairs)
    report(
        "log_evidence, normal",
        lambda: log_evidence(readme_model, guides["normal"], w, y, num_particles=10),
        args.pairs,
    )
    graph = load_network("ecoli70").graph()
    report("faithful_inverse(ecoli70)", lambda: faithful_inverse(graph), args.pairs)


if __name__ == "__main__":
    main()
