"""Is a guide calibrated: ranks and coverage with the bands of chance, z-scores against contraction."""

from pathlib import Path
from typing import Any

import numpy as np

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.plotting.figures import INK, new_axes, numbers_of, saved

__all__ = ["plot_calibration", "plot_contraction", "plot_coverage", "plot_ranks"]

BAND = "#d9dee4"
MOST_LINES = 40
MOST_SITES = 8


def plot_ranks(ranks: Any, num_draws: int, ax: Any = None, *, num_bins: int | None = None) -> Any:
    """Draw a histogram of ranks from simulation-based calibration for each element of a site.

    Bars of a calibrated guide are in the grey band 95 times in 100, each by itself.

    Args:
        ranks: Ranks from 0 to ``num_draws``, simulations along the first dimension.
        num_draws: The number of draws each was ranked among.
        ax: Matplotlib axes; a new figure by default.
        num_bins: The number of bins; by default at most 20, with at least 10 expected ranks in each.

    Returns:
        The axes.

    Raises:
        GraphflowsError: If there are no ranks, or some are out of range.
    """
    from scipy.stats import binom

    values = numbers_of(ranks)
    if not values.size or values.min() < 0 or values.max() > num_draws:
        raise GraphflowsError(
            f"Expected ranks from 0 to num_draws = {num_draws}; got the shape {values.shape}."
        )
    values = values.reshape(len(values), -1)
    num = len(values)
    if num_bins is None:
        num_bins = max(2, min(20, num_draws + 1, num // 10))
    bins = np.arange(num_draws + 1) * num_bins // (num_draws + 1)
    share = np.bincount(bins, minlength=num_bins) / (num_draws + 1)
    lower, upper = (binom.ppf(level, num, share) / (num * share) for level in (0.025, 0.975))
    ax = ax if ax is not None else new_axes((4.2, 2.8))
    edges = np.arange(num_bins + 1) / num_bins
    ax.fill_between(edges, _stepped(lower), _stepped(upper), step="post", color=BAND, linewidth=0)
    ax.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
    columns = values.T[:MOST_LINES].astype(int)
    for column in columns:
        counts = np.bincount(bins[column], minlength=num_bins) / (num * share)
        if len(columns) == 1:
            ax.bar(
                edges[:-1],
                counts,
                width=1 / num_bins,
                align="edge",
                color="C0",
                alpha=0.45,
                edgecolor="white",
            )
        else:
            ax.step(edges, _stepped(counts), where="post", color="C0", linewidth=0.9, alpha=0.7)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, None)
    ax.set_xlabel("rank of the truth among the draws")
    ax.set_ylabel("share / expected")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _stepped(values: np.ndarray) -> np.ndarray:
    return np.append(values, values[-1])


def plot_coverage(coverage: Any, ax: Any = None) -> Any:
    """Draw how often intervals held the truth against their probability; on the diagonal if calibrated.

    Args:
        coverage: What :func:`~pyro_graphflows.infer.coverage` returns.
        ax: Matplotlib axes; a new figure by default.

    Returns:
        The axes.
    """
    nominal, observed, lower, upper = (
        numbers_of(values) for values in (coverage.nominal, coverage.observed, coverage.lower, coverage.upper)
    )
    ax = ax if ax is not None else new_axes((3.2, 3.2))
    ends = lambda values: np.concatenate([[0.0], values, [1.0]])  # noqa: E731
    ax.fill_between(ends(nominal), ends(lower), ends(upper), color=BAND, linewidth=0)
    ax.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    for column in observed.reshape(len(nominal), -1).T[:MOST_LINES]:
        ax.plot(ends(nominal), ends(column), color="C0", linewidth=1.2, alpha=0.8)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_aspect("equal")
    ax.set_xlabel("probability of the interval")
    ax.set_ylabel("share that holds the truth")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_contraction(z_scores: Any, contraction: Any, ax: Any = None, *, label: str | None = None) -> Any:
    """Draw how far posterior means are off, in posterior standard deviations, against how much the data said.

    Points to the right are of numbers that the data decide; points beyond 3 and -3 are off by more than they should.

    Args:
        z_scores: (Posterior mean - truth) / posterior standard deviation.
        contraction: One minus posterior over prior variance; of the same shape.
        ax: Matplotlib axes; a new figure by default.
        label: The label of these points.

    Returns:
        The axes.
    """
    z, shrunk = numbers_of(z_scores).reshape(-1), numbers_of(contraction).reshape(-1)
    if z.shape != shrunk.shape:
        raise GraphflowsError(f"Expected as many z-scores as contractions; got {len(z)} and {len(shrunk)}.")
    ax = ax if ax is not None else new_axes((4.2, 2.8))
    keep = np.linspace(0, len(z) - 1, min(len(z), 2000)).astype(int)
    ax.axhspan(-2, 2, color=BAND, linewidth=0)
    ax.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    ax.plot(
        np.clip(shrunk[keep], -0.25, 1), z[keep], ".", markersize=3, alpha=0.4, label=label, rasterized=True
    )
    most = max(3.5, float(np.abs(z[np.isfinite(z)]).max(initial=0)))
    ax.set_ylim(-1.05 * min(most, 8), 1.05 * min(most, 8))
    ax.set_xlim(-0.27, 1.03)
    ax.set_xlabel("contraction (0: data say nothing, 1: all)")
    ax.set_ylabel("(mean − truth) / sd")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_calibration(report: Any, path: str | Path | None = None) -> Any:
    """Draw all of a calibration report: a row for each site, then all numbers together.

    Args:
        report: What :func:`~pyro_graphflows.infer.calibration_report` returns. Of more than eight sites those with the
            smallest p-values are drawn.
        path: Where to save the figure; not saved by default.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    worst = {name: float(numbers_of(value).min()) for name, value in report.p_values.items()}
    sites = sorted(worst, key=lambda name: worst[name])[:MOST_SITES]
    sites = [name for name in report.ranks if name in sites]
    figure = Figure(figsize=(8.0, 2.5 * (len(sites) + 1)), layout="constrained")
    panels = figure.subplots(len(sites) + 1, 2, squeeze=False, width_ratios=(1.6, 1.0))
    for (left, right), name in zip(panels, sites, strict=False):
        plot_ranks(report.ranks[name], report.num_draws, left)
        plot_coverage(report.coverage(name), right)
        left.set_title(name, loc="left", fontsize=10)
    left, right = panels[-1]
    for name in sites:
        plot_contraction(report.z_scores[name], report.contraction[name], left, label=name)
    left.legend(frameon=False, fontsize=7, markerscale=3, ncols=2)
    if report.joint_ranks is None:
        right.set_visible(False)
    else:
        plot_ranks(report.joint_ranks, report.num_draws, right)
        right.set_title("all together", loc="left", fontsize=10)
        right.set_xlabel("rank by distance to a random point")
    return saved(figure, path)
