"""The pages of the API reference: one a package, with a table of its public names and a page for each.

The text of a page is in ``PACKAGES``; the names are those of ``__all__``. A name that a package takes from another one
has its page where it comes from. ``tests/test_docs.py`` checks that every public name has exactly one page.
"""

import importlib
import inspect
from pathlib import Path

# package: what it is for, and the names that are not listed (used by other packages, not by users)
PACKAGES = {
    "pyro_graphflows.guides": "Guides compiled from a model, their families, and checks of them.",
    "pyro_graphflows.infer": "Training, evaluation and posteriors; works with any Pyro guide.",
    "pyro_graphflows.graphs": "Bayesian networks, their inverses, separation, exact linear-Gaussian answers.",
    "pyro_graphflows.inspect": "From a Pyro model to its Bayesian network.",
    "pyro_graphflows.models": "Variational autoencoders with structured latents, and textbook models.",
    "pyro_graphflows.models.textbook": "Small models with known graphs.",
    "pyro_graphflows.transforms": "Flows whose Jacobians follow a graph.",
    "pyro_graphflows.distributions": "Coordinates of priors, and splines of noise.",
    "pyro_graphflows.nn": "Networks whose outputs depend on promised inputs only.",
    "pyro_graphflows.masks": "Edges as matrix entries.",
    "pyro_graphflows.plotting": "Pictures of graphs, training and posteriors.",
    "pyro_graphflows.datasets": "Image data from files that you give.",
    "pyro_graphflows.capture": "What captured programs need: their noise, and how they are run.",
    "pyro_graphflows.captured_gradients": "A captured program that autograd knows.",
    "pyro_graphflows.recording": "A torch program as one graph of operations, with its noise among the inputs.",
    "pyro_graphflows.errors": "What is raised and warned of.",
    "pyro_graphflows.testing": "The contract of a family, for those who extend.",
}


def public_names(package: str) -> list[str]:
    """Return the names of ``__all__`` that are no modules, sorted without regard to case."""
    module = importlib.import_module(package)
    names = [name for name in module.__all__ if not name.startswith("__")]
    return sorted((name for name in names if not inspect.ismodule(getattr(module, name))), key=str.lower)


def pages() -> dict[str, str]:
    """Return the text of each page by the name of its package."""
    result = {}
    for package, text in PACKAGES.items():
        groups: dict[str, list[str]] = {"Classes": [], "Functions": [], "Constants": []}
        module = importlib.import_module(package)
        for name in public_names(package):
            value = getattr(module, name)
            kind = "Classes" if inspect.isclass(value) else "Functions" if callable(value) else "Constants"
            groups[kind].append(name)
        lines = [f"# `{package.removeprefix('pyro_graphflows.')}`", "", text, ""]
        for kind, names in groups.items():
            if names and kind == "Constants":
                lines += ["## Constants", "", f"```{{eval-rst}}\n.. currentmodule:: {package}\n"]
                lines += [f".. py:data:: {name}\n" for name in names] + ["```", ""]
            elif names:
                lines += [f"## {kind}", "", "```{eval-rst}", f".. currentmodule:: {package}", ""]
                lines += [".. autosummary::", "   :toctree: generated", "   :nosignatures:", ""]
                lines += [f"   {name}" for name in names] + ["```", ""]
        result[package] = "\n".join(lines)
    return result


def write_api_pages(folder: Path) -> None:
    """Write the pages and their index; files that are the same already are left alone, and stale ones removed."""
    folder.mkdir(exist_ok=True)
    public = {f"{package}.{name}" for package in PACKAGES for name in public_names(package)}
    for page in (folder / "generated").glob("*.rst"):
        if page.stem not in public:
            page.unlink()
    texts = {f"{package.split('.', 1)[1]}.md": text for package, text in pages().items()}
    index = [
        "# API reference",
        "",
        "Everything here is public: its names and meaning change only as",
        "[CONTRIBUTING](../contributing.md) says. What users need most can be imported from `pyro_graphflows` itself.",
        "",
        "```{toctree}",
        ":maxdepth: 1",
        "",
        *(name.removesuffix(".md") for name in texts),
        "```",
        "",
    ]
    texts["index.md"] = "\n".join(index)
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
