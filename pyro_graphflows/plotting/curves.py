"""Learning curves; posterior marginals and joint distributions beside exact ones."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.plotting.figures import INK, new_axes, saved

__all__ = ["plot_joints", "plot_learning_curves", "plot_marginals"]


def plot_learning_curves(
    histories: Mapping[str, Any],
    ax: Any = None,
    *,
    quantity: str = "loss",
    reference: float | None = None,
    xlabel: str = "epoch",
    path: str | Path | None = None,
) -> Any:
    """Draw one learning curve for each history.

    The vertical range starts where the curves have passed the first tenth of their length, since the first
    steps would hide all others.

    Args:
        histories: For each label a sequence of numbers, or a mapping or an object (as ``fit`` returns it) that
            has one under the name ``quantity``.
        ax: Matplotlib axes; a new figure by default.
        quantity: The key to draw, also the label of the vertical axis.
        reference: The best value there is, drawn as a dashed line.
        xlabel: The label of the horizontal axis.
        path: Where to save the figure; not saved by default.

    Returns:
        The axes.

    Raises:
        GraphflowsError: If there are no histories, one is empty, or one lacks the quantity.
    """
    if not histories:
        raise GraphflowsError("Expected at least one history; got none.")
    ax = ax if ax is not None else new_axes((6.4, 4.0))
    shown = [] if reference is None else [reference]
    for label, history in histories.items():
        if isinstance(history, Mapping):
            if quantity not in history:
                known = ", ".join(map(str, history)) or "nothing"
                raise GraphflowsError(f"Expected {quantity!r} in the history of {label}; it has {known}.")
            history = history[quantity]
        else:
            history = getattr(history, quantity, history)
        curve = np.asarray([float(value) for value in history])
        if not len(curve):
            raise GraphflowsError(f"Expected at least one value in the history of {label}; got none.")
        ax.plot(np.arange(1, len(curve) + 1), curve, label=label, linewidth=1.5)
        settled = curve[len(curve) // 10 :]
        shown.extend(settled[np.isfinite(settled)])
    if reference is not None:
        ax.axhline(reference, color=INK, linestyle="--", linewidth=1, label="exact")
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    ax.set_ylim(low - margin, high + margin)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(quantity)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    saved(ax.figure, path)
    return ax


def plot_marginals(
    samples: Mapping[str, Any],
    exact: Mapping[str, tuple[float, float]] | None = None,
    *,
    names: Iterable[str] | None = None,
    num_columns: int = 6,
    path: str | Path | None = None,
) -> Any:
    """Draw marginal histograms of posterior samples for one datum, beside exact normal ones.

    Args:
        samples: For each site its samples (one dimension); or, to compare guides, such a mapping for each label.
        exact: For each site the exact posterior mean and standard deviation.
        names: The sites to draw, in this order; by default all that have samples.
        num_columns: The number of panels in a row.
        path: Where to save the figure; not saved by default.

    Returns:
        The figure.

    Raises:
        GraphflowsError: If there are no samples, a site in ``names`` has none, or some are not finite.
    """
    from matplotlib.figure import Figure

    nested = bool(samples) and all(isinstance(value, Mapping) for value in samples.values())
    groups: Mapping[str, Mapping[str, Any]] = samples if nested else {"guide": samples}
    drawn = dict.fromkeys(site for group in groups.values() for site in group)
    sites = list(drawn if names is None else names)
    missing = [site for site in sites if site not in drawn]
    if missing or not sites:
        wanted = ", ".join(map(str, missing)) or "any"
        raise GraphflowsError(f"Expected samples of every site to draw; got none of {wanted}.")
    exact = exact or {}
    num_columns = min(num_columns, len(sites))
    num_rows = -(-len(sites) // num_columns)
    figure = Figure(figsize=(1.75 * num_columns, 1.45 * num_rows + 0.4), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for ax in panels[len(sites) :]:
        ax.set_visible(False)
    handles: dict[str, Any] = {}
    for ax, site in zip(panels, sites, strict=False):
        draws = {label: _numbers(group[site], site) for label, group in groups.items() if site in group}
        low, high = _range(draws.values(), exact.get(site))
        for i, label in enumerate(groups):
            if label in draws:
                style: dict[str, Any] = {"alpha": 0.45} if len(groups) == 1 else {"histtype": "step"}
                bins = np.linspace(low, high, 41)
                weights = np.full(len(draws[label]), 40 / (len(draws[label]) * (high - low)))
                *_, bars = ax.hist(draws[label], bins, weights=weights, color=f"C{i}", **style)
                handles.setdefault(label, bars[0])
        if site in exact:
            handles.setdefault("exact", _normal_curve(ax, low, high, *exact[site]))
        ax.set_title(site, fontsize=8, pad=3)
        ax.set_yticks([])
        ax.tick_params(labelsize=6)
        ax.spines[["top", "right", "left"]].set_visible(False)
    key: dict[str, Any] = {
        "loc": "outside upper center",
        "ncols": len(handles),
        "frameon": False,
        "fontsize": 8,
    }
    figure.legend(list(handles.values()), list(handles), **key)
    return saved(figure, path)


def plot_joints(
    samples: Mapping[str, Mapping[str, Any]],
    exact: tuple[Iterable[str], Any, Any],
    *,
    num_pairs: int = 4,
    path: str | Path | None = None,
) -> Any:
    """Draw posterior samples of the most strongly dependent pairs of sites, beside the exact normal posterior.

    Marginals can all be right where the joint distribution is far off: a guide without dependence between latents
    shows round clouds here, and the exact ellipses are narrow. A row for each pair, a column for each guide.

    Args:
        samples: For each label and site its samples for one datum (one dimension).
        exact: The names of the sites, and the exact posterior's mean ``(D,)`` and covariance ``(D, D)``.
        num_pairs: The number of pairs, those with the largest exact correlations; no site is in two of them.
        path: Where to save the figure; not saved by default.

    Returns:
        The figure.

    Raises:
        GraphflowsError: If there are fewer than two sites, or a site of a pair has no samples.
    """
    from matplotlib.figure import Figure

    names = list(exact[0])
    mean, covariance = (np.asarray(value, dtype=float) for value in exact[1:])
    pairs = _strongest_pairs(covariance, num_pairs)
    if not pairs or not samples:
        raise GraphflowsError(f"Expected at least two sites and one guide; got {names} and {list(samples)}.")
    missing = sorted(
        {names[i] for pair in pairs for i in pair if any(names[i] not in g for g in samples.values())}
    )
    if missing:
        raise GraphflowsError(f"Expected samples of every site to draw; got none of {', '.join(missing)}.")
    figure = Figure(figsize=(1.9 * len(samples) + 0.5, 1.75 * len(pairs) + 0.4), layout="constrained")
    panels = figure.subplots(len(pairs), len(samples), squeeze=False)
    for place, (row, (i, j)) in enumerate(zip(panels, pairs, strict=True)):
        centre, block = mean[[i, j]], covariance[np.ix_([i, j], [i, j])]
        reach = 4.2 * np.sqrt(np.diag(block))
        correlation = block[0, 1] / np.sqrt(block[0, 0] * block[1, 1])
        for ax, (label, group) in zip(row, samples.items(), strict=True):
            x, y = _numbers(group[names[i]], names[i]), _numbers(group[names[j]], names[j])
            ax.scatter(
                x, y, s=2, alpha=0.15, linewidths=0, color=f"C{list(samples).index(label)}", rasterized=True
            )
            for radius in (1.0, 2.0, 3.0):
                ax.plot(*_ellipse(centre, block, radius), color=INK, linewidth=0.8)
            ax.set_xlim(centre[0] - reach[0], centre[0] + reach[0])
            ax.set_ylim(centre[1] - reach[1], centre[1] + reach[1])
            found = float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() and y.std() else float("nan")
            ax.text(0.04, 0.96, f"{found:.2f}", transform=ax.transAxes, fontsize=7, va="top", color=INK)
            ax.set_xticks([])
            ax.set_yticks([])
            if place == 0:
                ax.set_title(label, fontsize=8)
        row[0].set_ylabel(f"{names[j]} against {names[i]}\nexact correlation {correlation:.2f}", fontsize=7)
    return saved(figure, path)


def _strongest_pairs(covariance: np.ndarray, num: int) -> list[tuple[int, int]]:
    """Return disjoint pairs of positions, most strongly correlated first."""
    sd = np.sqrt(np.diag(covariance))
    strength = np.triu(np.abs(covariance / np.outer(sd, sd)), 1)
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    for place in np.argsort(-strength, axis=None, kind="stable"):
        i, j = map(int, np.unravel_index(place, strength.shape))
        if len(pairs) == num or strength[i, j] == 0:
            break
        if not {i, j} & used:
            pairs.append((i, j))
            used |= {i, j}
    return pairs


def _ellipse(centre: np.ndarray, covariance: np.ndarray, radius: float) -> np.ndarray:
    """Return points of the contour at so many standard deviations, (2, N)."""
    angle = np.linspace(0.0, 2 * np.pi, 121)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    points: np.ndarray = centre[:, None] + radius * np.linalg.cholesky(covariance) @ circle
    return points


def _range(draws: Iterable[np.ndarray], exact: tuple[float, float] | None) -> tuple[float, float]:
    """Return a range that holds nearly all samples and the exact distribution."""
    low = min(float(np.quantile(values, 0.002)) for values in draws)
    high = max(float(np.quantile(values, 0.998)) for values in draws)
    if exact is not None:
        mean, deviation = map(float, exact)
        low, high = min(low, mean - 3.2 * deviation), max(high, mean + 3.2 * deviation)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _normal_curve(ax: Any, low: float, high: float, mean: float, deviation: float) -> Any:
    grid = np.linspace(low, high, 200)
    scaled = (grid - float(mean)) / float(deviation)
    density = np.exp(-0.5 * scaled**2) / (float(deviation) * np.sqrt(2 * np.pi))
    (line,) = ax.plot(grid, density, color=INK, linewidth=1.1)
    return line


def _numbers(values: Any, site: str) -> np.ndarray:
    """Return samples, a tensor perhaps, as a flat array."""
    detach = getattr(values, "detach", None)
    array = np.asarray(detach().cpu() if detach else values, dtype=float).reshape(-1)
    if not len(array) or not np.isfinite(array).all():
        raise GraphflowsError(f"Expected finite samples of {site}, at least one; got {array}.")
    return array
