"""A page of HTML that needs nothing beside itself: pictures are inside, there are no scripts and no fonts to load."""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyro_graphflows.whole_files import write_whole

__all__ = ["Page", "Section"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #d9dee4; padding-bottom: .2rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
pre { background: #f4f6f8; padding: .8rem; overflow-x: auto; white-space: pre-wrap;
      font-size: .84rem; line-height: 1.4; border-radius: 4px; }
table { border-collapse: collapse; font-size: .9rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #e8ebef; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
.subtitle, .note { color: #5b6875; }
.good, .care, .bad { padding: .6rem .9rem; border-left: 5px solid; border-radius: 3px; margin: 1rem 0; }
.good { border-color: #2e8b57; background: #eef7f1; }
.care { border-color: #d9a300; background: #fdf8e7; }
.bad { border-color: #c0392b; background: #fbeeec; }
nav a { margin-right: 1rem; }
"""


@dataclass
class Section:
    """A part of a page.

    Args:
        title: Its heading.
        parts: Its contents as HTML, in order; the methods add to them.
    """

    title: str
    parts: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """The name by which it is linked."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())

    def text(self, text: str, kind: str = "") -> "Section":
        """Add a paragraph; ``kind`` is ``"good"``, ``"care"``, ``"bad"`` or ``"note"``."""
        self.parts.append(
            f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"
        )
        return self

    def items(self, items: Sequence[str]) -> "Section":
        """Add a list."""
        self.parts.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>")
        return self

    def verbatim(self, text: str) -> "Section":
        """Add text as it is."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")
        return self

    def table(self, columns: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> "Section":
        """Add a table; the first column has the names of the rows."""
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_shown(value))}</td>" for value in (name, *row)) + "</tr>"
            for name, row in rows.items()
        )
        self.parts.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
        return self

    def picture(self, drawn: Any, description: str) -> "Section":
        """Add a picture: a matplotlib figure, or axes."""
        figure = getattr(drawn, "figure", drawn)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130)
        data = base64.b64encode(file.getvalue()).decode("ascii")
        width = round(96 * figure.get_figwidth())
        self.parts.append(
            f'<img width="{width}" alt="{html.escape(description)}" src="data:image/png;base64,{data}">'
        )
        return self


@dataclass
class Page:
    """A page of sections.

    Args:
        title: Its title.
        subtitle: A line below.
        sections: Its sections in order.
    """

    title: str
    subtitle: str
    sections: list[Section] = field(default_factory=list)

    def to_html(self) -> str:
        """Return the page as one string."""
        links = "".join(f'<a href="#{each.anchor}">{html.escape(each.title)}</a>' for each in self.sections)
        body = "".join(
            f'<section id="{each.anchor}"><h2>{html.escape(each.title)}</h2>{"".join(each.parts)}</section>'
            for each in self.sections
        )
        title = html.escape(self.title)
        return (
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
            f'<body><h1>{title}</h1><p class="subtitle">{html.escape(self.subtitle)}</p><nav>{links}</nav>{body}'
            "</body></html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, whole or not at all; return its path."""
        text = self.to_html()
        write_whole(path, lambda file: file.write(text.encode("utf-8")))
        return Path(path)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)
