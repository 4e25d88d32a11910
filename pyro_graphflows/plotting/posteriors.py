"""Posteriors in pictures: forests, pairs, k-hat, and predictions beside the data."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.plotting.figures import INK, new_axes, numbers_of

__all__ = ["plot_forest", "plot_intervals", "plot_khat", "plot_pairs", "plot_predictive"]

REFERENCE = "#d1570c"
MOST_ROWS, MOST_PAIRS, MOST_INTERVALS, MOST_PANELS = 60, 8, 80, 24


def plot_forest(
    draws: Mapping[str, Any],
    ax: Any = None,
    *,
    reference: Mapping[str, Any] | None = None,
    names: Iterable[str] | None = None,
) -> Any:
    """Draw median, 50% and 90% intervals of each number of a posterior, a row for each.

    Args:
        draws: By site draws along the first dimension, as ``posterior.draws``.
        ax: Matplotlib axes; a new figure by default.
        reference: Draws to compare with, as of a long Markov chain; drawn below in another colour.
        names: The sites to draw; all by default. At most 60 numbers are drawn.

    Returns:
        The axes.

    Raises:
        GraphflowsError: If a site is unknown, or draws are not finite.
    """
    columns = _columns(draws, names)
    others = {} if reference is None else _columns(reference, [n for n in names or draws if n in reference])
    labels = list(columns)[:MOST_ROWS]
    ax = ax if ax is not None else new_axes((5.2, 0.9 + 0.24 * len(labels)))
    apart = 0.16 if others else 0.0
    for row, label in enumerate(labels):
        _interval(ax, columns[label], -row + apart, "C0")
        if label in others:
            _interval(ax, others[label], -row - apart, REFERENCE)
    ax.set_yticks([-row for row in range(len(labels))], labels, fontsize=8)
    ax.set_ylim(-len(labels) + 0.4, 0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    if len(columns) > len(labels):
        ax.set_title(f"the first {len(labels)} of {len(columns)} numbers", fontsize=8, loc="left")
    if others:
        handles = [ax.plot([], [], color=colour, linewidth=2.5)[0] for colour in ("C0", REFERENCE)]
        ax.legend(handles, ["guide", "reference"], frameon=False, fontsize=8, loc="best")
    return ax


def _interval(ax: Any, values: np.ndarray, height: float, colour: str) -> None:
    low, left, middle, right, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
    ax.plot([low, high], [height, height], color=colour, linewidth=1.0, solid_capstyle="butt")
    ax.plot([left, right], [height, height], color=colour, linewidth=3.2, solid_capstyle="butt")
    ax.plot(
        [middle], [height], "o", color="white", markeredgecolor=colour, markersize=4.2, markeredgewidth=1.1
    )


def plot_intervals(
    draws: Mapping[str, Any], axes: Any = None, *, names: Iterable[str] | None = None, num_columns: int = 4
) -> Any:
    """Draw a panel for each site: medians, 50% and 90% intervals of its elements, in the order of their medians.

    For sites of many elements, where a forest with a row for each would be pages long.

    Args:
        draws: By site draws along the first dimension, as ``posterior.draws``.
        axes: An array of matplotlib axes, one for each site at least; a new figure by default.
        names: The sites to draw; all by default, of which the first 24.
        num_columns: The number of panels in a row of a new figure.

    Returns:
        The array of axes; those beyond the last site are not visible.

    Raises:
        GraphflowsError: If a site is unknown, draws are not finite, or there are too few axes.
    """
    chosen = list(draws if names is None else names)[:MOST_PANELS]
    unknown = [name for name in chosen if name not in draws]
    if unknown or not chosen:
        raise GraphflowsError(f"Expected sites among {sorted(draws)}; got {unknown or 'none'}.")
    if axes is None:
        from matplotlib.figure import Figure

        columns = min(num_columns, len(chosen))
        rows = -(-len(chosen) // columns)
        figure = Figure(figsize=(max(2.6, 2.1 * columns), 0.3 + 1.5 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    panels = np.asarray(axes, dtype=object).reshape(-1)
    if len(panels) < len(chosen):
        raise GraphflowsError(f"Expected {len(chosen)} axes or more, one for each site; got {len(panels)}.")
    for ax in panels[len(chosen) :]:
        ax.set_visible(False)
    for name, ax in zip(chosen, panels, strict=False):
        values = numbers_of(draws[name])
        values = values.reshape(len(values), -1)
        if not values.size or not np.isfinite(values).all():
            raise GraphflowsError(f"Expected finite draws of {name!r}; some are not, or there are none.")
        low, left, middle, right, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
        order = np.argsort(middle, kind="stable")
        places = np.arange(len(order))
        if len(order) <= MOST_INTERVALS:
            ax.vlines(places, low[order], high[order], color="C0", linewidth=1.0)
            ax.vlines(places, left[order], right[order], color="C0", linewidth=2.6)
            ax.plot(
                places,
                middle[order],
                "o",
                color="white",
                markeredgecolor="C0",
                markersize=3.2,
                markeredgewidth=0.9,
            )
            ax.set_xlim(-1, len(order))
        else:
            ax.fill_between(places, low[order], high[order], color="C0", alpha=0.25, linewidth=0)
            ax.fill_between(places, left[order], right[order], color="C0", alpha=0.45, linewidth=0)
            ax.plot(places, middle[order], color="C0", linewidth=1.0)
            ax.set_xlim(0, len(order) - 1)
        ax.set_xticks([])
        ax.set_title(f"{name} ({len(order)})" if len(order) > 1 else name, fontsize=8, loc="left")
        ax.tick_params(labelsize=7)
        ax.locator_params(axis="y", nbins=4)
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def plot_pairs(
    draws: Mapping[str, Any],
    axes: Any = None,
    *,
    reference: Mapping[str, Any] | None = None,
    names: Iterable[str] | None = None,
    num_shown: int = 1000,
) -> Any:
    """Draw each pair of numbers of a posterior as a cloud, and each number as a histogram on the diagonal.

    Args:
        draws: By site draws along the first dimension.
        axes: A square array of matplotlib axes; a new figure by default.
        reference: Draws to compare with, in another colour.
        names: The sites to draw, or single numbers as ``"theta[2]"``; all by default, of which the first eight numbers.
        num_shown: How many draws are shown in the clouds.

    Returns:
        The array of axes; those above the diagonal are not visible.

    Raises:
        GraphflowsError: If a name is unknown, or draws are not finite.
    """
    columns = _columns(draws, names)
    labels = list(columns)[:MOST_PAIRS]
    others = {} if reference is None else _columns(reference, None)
    if axes is None:
        from matplotlib.figure import Figure

        side = 1.0 + 1.45 * len(labels)
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots(len(labels), len(labels), squeeze=False)
    axes = np.asarray(axes, dtype=object)
    if axes.shape != (len(labels), len(labels)):
        raise GraphflowsError(f"Expected {len(labels)} × {len(labels)} axes; got the shape {axes.shape}.")
    ranges = {
        label: _range([columns[label], *([others[label]] if label in others else [])]) for label in labels
    }
    for row, below in enumerate(labels):
        for column, left in enumerate(labels):
            ax = axes[row, column]
            if column > row:
                ax.set_visible(False)
                continue
            groups = [(columns, "C0"), (others, REFERENCE)]
            for group, colour in groups:
                if below not in group or left not in group:
                    continue
                if row == column:
                    bins = np.linspace(*ranges[left], 31)
                    ax.hist(group[left], bins, density=True, histtype="step", color=colour, linewidth=1.1)
                else:
                    keep = np.linspace(0, len(group[left]) - 1, min(num_shown, len(group[left]))).astype(int)
                    ax.plot(
                        group[left][keep],
                        group[below][keep],
                        ".",
                        color=colour,
                        markersize=2,
                        alpha=0.35,
                        markeredgewidth=0,
                        rasterized=True,
                    )
            ax.set_xlim(*ranges[left])
            if row != column:
                ax.set_ylim(*ranges[below])
            else:
                ax.set_yticks([])
                ax.spines["left"].set_visible(False)
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=6)
            ax.locator_params(nbins=4)
            if row == len(labels) - 1:
                ax.set_xlabel(left, fontsize=8)
            else:
                ax.tick_params(labelbottom=False)
            if column == 0 and row:
                ax.set_ylabel(below, fontsize=8)
            elif column:
                ax.tick_params(labelleft=False)
    return axes


def plot_khat(khat: Any, ax: Any = None) -> Any:
    """Draw the Pareto k-hat of each datum's importance weights; above 0.7 the draws are not to be trusted.

    Args:
        khat: One number for each datum, or a single one.
        ax: Matplotlib axes; a new figure by default.

    Returns:
        The axes.
    """
    values = numbers_of(khat).reshape(-1)
    ax = ax if ax is not None else new_axes((5.2, 2.6))
    top = max(1.0, float(np.max(values[np.isfinite(values)], initial=0.0)) + 0.1)
    shown = np.where(np.isfinite(values), values, top)
    bad = shown > 0.7
    ax.axhline(0.7, color=REFERENCE, linewidth=1, linestyle="--")
    places = np.arange(len(shown))
    for chosen, colour in ((~bad, "C0"), (bad, REFERENCE)):
        ax.plot(
            places[chosen], shown[chosen], "o", color=colour, markersize=3.5, alpha=0.75, markeredgewidth=0
        )
    ax.set_ylim(min(-0.1, float(shown.min(initial=0)) - 0.05), top)
    ax.set_xlim(-0.5 - 0.01 * len(shown), len(shown) - 0.5 + 0.01 * len(shown))
    ax.set_ylabel("Pareto k-hat")
    if len(shown) == 1:
        ax.set_xticks([])
        ax.set_xlabel("all data together")
    else:
        ax.set_xlabel(f"datum ({int(bad.sum())} of {len(shown)} above 0.7)")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_predictive(observed: Any, predicted: Any, ax: Any = None, *, kind: str = "auto") -> Any:
    """Draw data beside what the model predicts for them at draws of the posterior.

    Args:
        observed: The data, of any shape.
        predicted: Draws of data of that shape, draws along the first dimension.
        ax: Matplotlib axes; a new figure by default.
        kind: ``"intervals"`` draws an interval for each datum, in the order of the data's values; ``"density"`` a
            histogram of all the data and one for each of some draws; ``"auto"`` intervals for up to 80 data.

    Returns:
        The axes.

    Raises:
        GraphflowsError: If the shapes do not fit or ``kind`` is unknown.
    """
    data, draws = numbers_of(observed), numbers_of(predicted)
    if draws.shape[1:] != data.shape:
        raise GraphflowsError(f"Expected predictions of shape (draws, {data.shape}); got {draws.shape}.")
    if kind not in ("auto", "intervals", "density"):
        raise GraphflowsError(f"Expected kind to be 'auto', 'intervals' or 'density'; got {kind!r}.")
    data, draws = data.reshape(-1), draws.reshape(len(draws), -1)
    known = np.isfinite(data)
    data, draws = data[known], draws[:, known]
    if kind == "auto":
        kind = "intervals" if len(data) <= MOST_INTERVALS else "density"
    ax = ax if ax is not None else new_axes((5.2, 2.9))
    if kind == "intervals":
        order = np.argsort(data, kind="stable")
        low, left, right, high = np.quantile(draws[:, order], (0.05, 0.25, 0.75, 0.95), axis=0)
        places = np.arange(len(data))
        ax.vlines(places, low, high, color="C0", linewidth=1.0, alpha=0.6, label="90% and 50% of predictions")
        ax.vlines(places, left, right, color="C0", linewidth=3.0, alpha=0.6)
        ax.plot(places, data[order], "o", color=INK, markersize=3.2, label="data")
        ax.set_xlabel("datum, by its value")
        ax.set_xticks([])
    else:
        ends = np.quantile(np.concatenate([data, draws[: min(50, len(draws))].reshape(-1)]), (0.002, 0.998))
        low, high = min(ends[0], data.min()), max(ends[1], data.max())
        whole = bool((data == data.round()).all() and high - low < 60)
        bins = np.arange(low - 0.5, high + 1.5) if whole else np.linspace(low, high, 41)
        shown = np.linspace(0, len(draws) - 1, min(50, len(draws))).astype(int)
        for number, one in enumerate(draws[shown]):
            label = "predictions" if number == 0 else None
            ax.hist(
                one, bins, density=True, histtype="step", color="C0", alpha=0.25, linewidth=0.8, label=label
            )
        ax.hist(data, bins, density=True, histtype="step", color=INK, linewidth=1.6, label="data")
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    ax.legend(
        frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.1
    )
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _columns(draws: Mapping[str, Any], names: Iterable[str] | None) -> dict[str, np.ndarray]:
    """Return each number of some sites by its label, ``name`` or ``name[i, j]``."""
    columns: dict[str, np.ndarray] = {}
    wanted = None if names is None else list(names)
    for site, values in draws.items():
        array = numbers_of(values)
        for index in np.ndindex(array.shape[1:]):
            label = f"{site}[{', '.join(map(str, index))}]" if index else site
            if wanted is None or site in wanted or label in wanted:
                columns[label] = array[(slice(None), *index)]
    missing = [name for name in wanted or () if name not in draws and name not in columns]
    if missing:
        raise GraphflowsError(
            f"Expected names among the sites {sorted(draws)} and their elements; got {missing}."
        )
    bad = [label for label, values in columns.items() if not len(values) or not np.isfinite(values).all()]
    if bad or not columns:
        raise GraphflowsError(
            f"Expected finite draws of at least one number; those of {bad or 'none'} are not."
        )
    return columns


def _range(groups: Iterable[np.ndarray]) -> tuple[float, float]:
    groups = list(groups)
    low = min(float(np.quantile(values, 0.002)) for values in groups)
    high = max(float(np.quantile(values, 0.998)) for values in groups)
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin
