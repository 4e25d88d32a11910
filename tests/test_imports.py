"""Who may import whom, and which modules load only when they are used.

A layer is a line of ``MAY_IMPORT``: a package or a module directly in ``pyro_graphflows``, and the layers that it may
import from. Imports inside functions count too: a circle is a circle wherever it is written.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
from versions import TORCH

PACKAGE = Path(__file__).parent.parent / "pyro_graphflows"
MODULES = sorted(PACKAGE.rglob("*.py"))


def _layer(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


# layer: the layers that it may import from
MAY_IMPORT = {
    "capture": "errors",
    "recording": "capture",
    "captured_gradients": "capture recording",
    "errors": "",
    "graphs": "errors",
    "masks": "errors graphs",
    "regression": "errors",
    "whole_files": "",
    "tensor_files": "errors whole_files",
    "distributions": "capture errors nn regression",
    "nn": "capture errors graphs masks",
    "transforms": "errors graphs masks nn regression",
    "inspect": "errors graphs",
    # guide.posterior() and what comes of it is of infer, which knows no guide
    "guides": "capture captured_gradients distributions errors graphs infer inspect masks nn recording regression "
    "tensor_files transforms",
    # Any Pyro guide will do: nothing of our own guides.
    "infer": "capture errors graphs inspect masks nn plotting recording transforms whole_files",
    "models": "errors graphs guides infer inspect masks nn transforms",
    "plotting": "errors graphs",
    "datasets": "errors",
    "report": "errors graphs guides infer plotting whole_files",
    "__main__": "report",
    "testing": "errors graphs guides",
}
# Layers whose modules still import each other in circles, hidden under TYPE_CHECKING: none is to be added.
WITH_CIRCLES = ""
OTHERS = [path for path in MODULES if _layer(path) not in WITH_CIRCLES.split()]
# What the mathematics may use at module level beside the standard library.
WITHOUT_TORCH = {"graphs": "networkx numpy scipy pyro_graphflows"}
# Modules that take long to import, and are needed by few: `import pyro_graphflows` must load none of them.
LAZY = (
    "IPython arviz_base arviz_stats matplotlib pandas pgmpy scipy.io scipy.optimize scipy.stats sklearn statsmodels"
    " torchvision"
)


def _module(path):
    parts = ["pyro_graphflows", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree, *, inside_functions):
    """Yield (module, line) of what is imported."""
    stack = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            if node.module == "pyro_graphflows":
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def _parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("layer", sorted({_layer(path) for path in MODULES} - {"__init__"}))
def test_every_layer_is_in_the_table(layer):
    assert layer in MAY_IMPORT, f"{layer}: add a line that says what it may import"


def test_layers_have_an_order():
    table = nx.DiGraph([(layer, other) for layer, others in MAY_IMPORT.items() for other in others.split()])
    assert set(table) <= set(MAY_IMPORT)
    assert nx.is_directed_acyclic_graph(table)


@pytest.mark.parametrize("path", MODULES, ids=_module)
def test_imports_go_one_way(path):
    layer = _layer(path)
    if layer == "__init__":
        return
    for name, line in _imports(_parse(path), inside_functions=True):
        package, *parts = name.split(".")
        if package == "pyro_graphflows":
            assert parts, f"{path}:{line}: import from a module, not from the whole package"
            assert parts[0] in {layer, *MAY_IMPORT[layer].split()}, f"{path}:{line}: {layer} imports {name}"


def test_modules_import_each_other_in_no_circle():
    known = {_module(path) for path in MODULES}
    graph = nx.DiGraph()
    for path in OTHERS:
        for name, _ in _imports(_parse(path), inside_functions=True):
            if name in known and name != _module(path):
                graph.add_edge(_module(path), name)
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


@pytest.mark.parametrize("path", OTHERS, ids=_module)
def test_nothing_is_imported_for_annotations_only(path):
    """An import that only a type checker sees hides a circle."""
    names = {node.id for node in ast.walk(_parse(path)) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(_parse(path)) if isinstance(node, ast.Attribute)}
    assert "TYPE_CHECKING" not in names | attributes


@pytest.mark.parametrize("layer", WITHOUT_TORCH)
def test_mathematics_need_no_torch(layer):
    for path in (path for path in MODULES if _layer(path) == layer):
        for name, line in _imports(_parse(path), inside_functions=False):
            root = name.split(".")[0]
            allowed = root in WITHOUT_TORCH[layer].split() or root in sys.stdlib_module_names
            assert allowed, f"{path}:{line} imports {name}"


def _loaded(statement, *options):
    """Return the modules that a fresh Python has loaded after a statement that prints nothing."""
    code = f"{statement}\nimport json, sys\njson.dump(sorted(sys.modules), sys.stdout)"
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stderr == ""
    return set(json.loads(done.stdout))


def test_heavy_modules_load_when_they_are_used():
    """``import pyro_graphflows`` loads none of them, nor does anything else in the package when it is imported."""
    everything = "\n".join(f"import {_module(path)}" for path in MODULES)
    assert _loaded(everything).isdisjoint(LAZY.split())


A_GUIDE = """
import torch, pyro, pyro.distributions as dist
from pyro_graphflows.guides import auto_faithful_guide
def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
auto_faithful_guide(model, torch.zeros(5))(torch.zeros(5))
"""


@pytest.mark.skipif(TORCH < (2, 6), reason="PyTorch 2.5 imports its compiler by itself")
def test_a_guide_is_made_without_the_compiler_of_pytorch():
    """Its import takes longer than all of set-up."""
    assert _loaded(A_GUIDE).isdisjoint({"torch._dynamo", "sympy"})


def test_the_package_imports_without_a_warning():
    assert "pyro_graphflows.guides" in _loaded("import pyro_graphflows", "-W", "error")
