"""What all pictures share: figures without pyplot, saving, the colour of ink."""

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["INK", "new_axes", "numbers_of", "saved"]

INK = "#1d2733"


def new_axes(size: tuple[float, float]) -> Any:
    """Return the axes of a new figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def saved(figure: Any, path: str | Path | None) -> Any:
    """Return the figure, after saving it where a path is given."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def numbers_of(values: Any) -> np.ndarray:
    """Return a tensor, an array or a number as an array of floating numbers."""
    detach = getattr(values, "detach", None)
    return np.asarray(detach().cpu() if detach else values, dtype=float)
