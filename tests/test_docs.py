"""The site: every public name has a page, every page is in a table of contents, and the code of the pages runs."""

import doctest
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pyro
import pytest
import torch

import pyro_graphflows

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("how_to/*.md"), *DOCS.glob("tutorials/*.md")])
WITH_CODE = [page for page in PAGES if ">>>" in page.read_text()]
INTERNAL = {
    "regression",
    "report",
    "tensor_files",
    "whole_files",
}  # used by other modules, or as a command


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api_pages = load("api_pages")


def test_every_package_has_a_page():
    package = Path(pyro_graphflows.__file__).parent
    parts = {
        path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    documented = {name.split(".")[1] for name in api_pages.PACKAGES}
    assert parts - {"__init__", "__main__", "__pycache__"} - INTERNAL == documented


def test_every_public_name_has_a_page():
    listed = {}
    for package in api_pages.PACKAGES:
        module = importlib.import_module(package)
        for name in api_pages.public_names(package):
            listed.setdefault(name, []).append(getattr(module, name))
    for name in pyro_graphflows.__all__:
        value = getattr(pyro_graphflows, name)
        if name.startswith("__"):
            continue
        if inspect.ismodule(value):
            assert value.__name__ in api_pages.PACKAGES
        else:
            assert any(value is found for found in listed.get(name, [])), name
    text = "\n".join(api_pages.pages().values())
    for name in listed:
        assert re.search(rf"^ +{name}$|^.. py:data:: {name}$", text, re.MULTILINE), name


def test_public_names_have_docstrings():
    for package in api_pages.PACKAGES:
        module = importlib.import_module(package)
        for name in api_pages.public_names(package):
            value = getattr(module, name)
            if callable(value):
                assert (inspect.getdoc(value) or "").strip(), f"{package}.{name}"


def leads_somewhere(reference):
    """Whether a dotted name is a module of the package, or something in one."""
    names = reference.split(".")
    value = pyro_graphflows
    for place, name in enumerate(names[1:], 2):
        if not hasattr(value, name) and not inspect.ismodule(value):
            return False
        try:
            value = getattr(value, name, None) or importlib.import_module(".".join(names[:place]))
        except ModuleNotFoundError:
            return False
    return True


def test_references_between_docstrings_lead_somewhere():
    assert not leads_somewhere("pyro_graphflows.guides.nowhere")
    assert not leads_somewhere("pyro_graphflows.guides.AutoFaithfulGuide.nothing")
    package = Path(pyro_graphflows.__file__).parent
    found = {
        reference
        for path in package.rglob("*.py")
        for reference in re.findall(r":\w+:`~?(pyro_graphflows[\w.]*)`", path.read_text())
    }
    assert len(found) > 100
    assert sorted(reference for reference in found if not leads_somewhere(reference)) == []


def entries(page):
    """Return the pages that the tables of contents of a page name."""
    found = set()
    for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines():
            line = line.strip()
            if line and not line.startswith(":"):
                found |= {path.resolve() for path in page.parent.glob(line + ".md")}
    return found


def test_every_page_is_in_a_table_of_contents():
    reachable, waiting = {DOCS / "index.md"}, [DOCS / "index.md"]
    while waiting:
        for page in entries(waiting.pop()) - reachable:
            reachable.add(page)
            waiting.append(page)
    orphans = {page for page in DOCS.glob("**/*.md") if "orphan: true" in page.read_text()[:40]}
    generated = {*DOCS.glob("api/**/*.md")}
    assert {*PAGES, *DOCS.glob("results/*.md")} - orphans - generated == reachable - generated


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        if page.name == "contributing.md":
            continue
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target and not target.startswith("../contributing"):
                assert (page.parent / target).exists() or "/api/" in target or target.startswith("api/"), (
                    page,
                    target,
                )


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some pages save files
    torch.set_default_dtype(torch.float32)
    pyro.set_rng_seed(0)
    results = doctest.testfile(
        str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert results.attempted > 2
    assert results.failed == 0
