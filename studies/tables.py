"""Tables of the studies' pages, in Markdown, and the text of a mean over seeds."""

from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["mean_sd", "table"]


def table(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def mean_sd(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean ± the standard deviation, which a single value does not have."""
    values = np.asarray(values, dtype=float)
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"
