"""Module-level imports go one way; nothing in the package imports what is only for its users."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pyro_graphflows"
MODULES = sorted(PACKAGE.rglob("*.py"))

# layer -> the layers it may import from, at module level
ALLOWED = {
    "errors": set(),
    "graphs": {"errors"},
    "masks": {"graphs", "errors"},
    "nn": {"masks", "graphs", "errors"},
    "transforms": {"nn", "masks", "graphs", "errors"},
    "inspect": {"graphs", "errors"},
    "guides": {"inspect", "transforms", "nn", "masks", "graphs", "errors"},
    "infer": {"graphs", "errors"},  # it works with any Pyro guide
    "models": {"infer", "guides", "inspect", "transforms", "nn", "masks", "graphs", "errors"},
    "datasets": {"errors"},
    "plotting": {"graphs", "errors"},
    "testing": {"graphs", "errors"},
}
GRAPHS_MAY_USE = {"networkx", "numpy", "scipy", "pyro_graphflows"}


def _layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def _module_level_imports(tree: ast.Module):
    """Yield (names, line) of imports outside functions, `if TYPE_CHECKING` included."""
    stack = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield [alias.name for alias in node.names], node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield [node.module], node.lineno
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            stack.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    layer = _layer(path)
    if layer == "__init__":
        return
    assert layer in ALLOWED, f"{layer}: say in this table what it may import"
    for names, line in _module_level_imports(ast.parse(path.read_text())):
        for name in names:
            parts = name.split(".")
            if parts[0] != "pyro_graphflows":
                continue
            target = parts[1] if len(parts) > 1 else "__init__"
            assert target == layer or target in ALLOWED[layer], f"{path}:{line} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "graphs").rglob("*.py")), ids=lambda p: p.name)
def test_graphs_need_no_torch(path):
    import sys

    for names, line in _module_level_imports(ast.parse(path.read_text())):
        for name in names:
            root = name.split(".")[0]
            assert root in GRAPHS_MAY_USE or root in sys.stdlib_module_names, f"{path}:{line} imports {name}"


def test_heavy_modules_are_lazy():
    """None of these, which take up to seconds, is imported with the package."""
    import subprocess
    import sys

    heavy = ["pgmpy", "matplotlib", "scipy.stats", "pandas", "arviz_base"]
    code = f"import sys, pyro_graphflows; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
