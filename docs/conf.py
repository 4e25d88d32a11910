"""The site: `make docs`. Nothing is fetched when a page is read; MathJax is copied from npm by the Makefile."""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

from api_pages import write_api_pages  # noqa: E402

import pyro_graphflows  # noqa: E402

project = "pyro_graphflows"
author = "The pyro_graphflows developers"
copyright = "The pyro_graphflows developers, Apache-2.0"
version = release = pyro_graphflows.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "README.md"]
nb_execution_mode = "off"  # tutorials are stored with the outputs of a full run
nb_merge_streams = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

templates_path = ["_templates"]
autosummary_generate = True
autosummary_generate_overwrite = True
autosummary_ignore_module_all = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "__init__, training"}
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

mathjax_path = "mathjax.js"

html_theme = "furo"
html_title = f"pyro_graphflows {version}"
html_static_path = ["_static", "_build/mathjax.js"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

write_api_pages(Path(__file__).parent / "api")
for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):  # Sphinx reads nothing outside of docs/
    copied = Path(__file__).parent / "tutorials" / notebook.name
    text = notebook.read_text().replace("](../docs/", "](../")
    if not copied.exists() or copied.read_text() != text:
        copied.write_text(text)


def escape_shapes(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep the star of a shape, (draws, *plates), from starting an emphasis."""
    lines[:] = [re.sub(r"(?<=[(, ])\*(?=[a-z_]+( of [a-z ]+)?[,)])", r"\*", line) for line in lines]


def setup(app: Any) -> None:
    """Connect what Sphinx calls."""
    app.connect("autodoc-process-docstring", escape_shapes)
