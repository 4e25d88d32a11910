"""Small tables that print themselves."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyro_graphflows.errors import GraphflowsError

__all__ = ["Table"]

_SHOWN = 40


class Table(Sequence[Mapping[str, Any]]):
    """Rows of named columns.

    Args:
        name: What the rows are, the heading of their names.
        rows: The rows by name; all have the same columns.
        note: A line below.

    Example:
        >>> Table("site", {"mu": {"mean": 1.25, "ess": 900.0}, "tau": {"mean": 0.001, "ess": 10.0}})
        site    mean  ess
        mu      1.25  900
        tau    0.001   10
    """

    def __init__(self, name: str, rows: Mapping[str, Mapping[str, Any]], note: str = "") -> None:
        self.name = name
        self.rows = {row: dict(columns) for row, columns in rows.items()}
        self.note = note

    def __getitem__(self, row: Any) -> Any:
        """Return a row by its name or its place."""
        return self.rows[row] if isinstance(row, str) else list(self.rows.values())[row]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows.values())

    def __repr__(self) -> str:
        if not self.rows:
            return f"{self.name}: no rows"
        columns = list(next(iter(self.rows.values())))
        lines = [[self.name, *columns]]
        for row in list(self.rows)[:_SHOWN]:
            lines.append([row, *(_text(self.rows[row][column]) for column in columns)])
        widths = [max(len(line[place]) for line in lines) for place in range(len(columns) + 1)]
        text = [
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            )
            for line in lines
        ]
        if len(self.rows) > _SHOWN:
            text.append(f"... and {len(self.rows) - _SHOWN} more")
        return "\n".join([*text, *([self.note] if self.note else [])])

    def to_pandas(self) -> Any:
        """Return a pandas data frame with the names of the rows as its index.

        Raises:
            GraphflowsError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise GraphflowsError("Expected pandas to be installed: pip install pandas.") from error
        frame = pandas.DataFrame.from_dict(self.rows, orient="index")
        frame.index.name = self.name
        return frame


def _text(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
