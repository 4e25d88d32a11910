from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs import library
from pyro_graphflows.plotting import (
    plot_joints,
    plot_learning_curves,
    plot_marginals,
)


def test_learning_curves(tmp_path):
    curve = np.concatenate([[1e6], np.linspace(3.0, 1.0, 19)])
    histories = {
        "mapping": {"loss": curve, "other": [0.0]},
        "object": SimpleNamespace(loss=list(curve)),
        "numbers": torch.tensor(curve),
    }
    ax = plot_learning_curves(histories, reference=0.9, path=tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()
    assert [line.get_label() for line in ax.lines] == [*histories, "exact"]
    for line in ax.lines[:3]:
        np.testing.assert_allclose(line.get_ydata(), curve)
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, 21))
    low, high = ax.get_ylim()
    assert low < 0.9
    assert 2.8 < high < 4.0  # the first step does not hide the others
    other = plot_learning_curves({"a": {"validation_loss": [1.0, np.nan, 2.0]}}, quantity="validation_loss")
    assert other.get_ylabel() == "validation_loss"
    assert plot_learning_curves({"a": [5.0]}, ax) is ax


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ({}, "at least one history"),
        ({"a": []}, "at least one value in the history of a"),
        ({"a": {"elbo": [1.0]}}, "'loss' in the history of a; it has elbo"),
    ],
)
def test_wrong_histories(histories, message):
    with pytest.raises(GraphflowsError, match=message):
        plot_learning_curves(histories)


def test_marginals_of_one_guide(tmp_path):
    net = library.binary_tree(3, seed=0)
    mean, covariance = net.posterior(net.sample(1, seed=0, names=net.observed))
    exact = {name: (mean[0, i], covariance[i, i] ** 0.5) for i, name in enumerate(net.latent)}
    draws = {name: exact[name][0] + exact[name][1] * torch.randn(500, 1) for name in net.latent}
    draws["x0"].requires_grad_()
    figure = plot_marginals(draws, exact, num_columns=2, path=tmp_path / "marginals.png")
    assert (tmp_path / "marginals.png").exists()
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == ["x0", "x1", "x2"]
    for ax, name in zip(shown, net.latent, strict=True):
        (line,) = ax.lines
        grid, density = line.get_data()
        assert grid[density.argmax()] == pytest.approx(exact[name][0], abs=0.05 * exact[name][1])
        assert trapezoid(density, grid) == pytest.approx(1.0, abs=5e-3)
    assert [text.get_text() for text in figure.legends[0].texts] == ["guide", "exact"]


def test_marginals_of_several_guides():
    samples = {"faithful": {"a": np.zeros(5), "b": np.arange(5)}, "mean field": {"b": np.arange(5)}}
    figure = plot_marginals(samples, names=["b", "a"])
    assert [ax.get_title() for ax in figure.axes] == ["b", "a"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["faithful", "mean field"]
    alone = plot_marginals({"a": [2.0]}).axes[0]
    assert sum(bar.get_height() * bar.get_width() for bar in alone.patches) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("samples", "names", "message"),
    [
        ({}, None, "got none of any"),
        ({"a": [1.0]}, ["a", "z"], "got none of z"),
        ({}, ["z"], "got none of z"),
        ({"a": []}, None, "finite samples of a, at least one"),
        ({"a": [1.0, np.nan]}, None, "finite samples of a, at least one"),
    ],
)
def test_missing_samples(samples, names, message):
    with pytest.raises(GraphflowsError, match=message):
        plot_marginals(samples, names=names)


def test_joints_show_the_strongest_pairs(tmp_path):
    covariance = np.array(
        [[1.0, 0.1, 0.9, 0.0], [0.1, 1.0, 0.2, 0.8], [0.9, 0.2, 1.0, 0.1], [0.0, 0.8, 0.1, 1.0]]
    )
    mean, names = np.arange(4.0), ["a", "b", "c", "d"]
    draws = np.random.default_rng(0).multivariate_normal(mean, covariance, size=500)
    samples = {"right": dict(zip(names, draws.T, strict=True)), "wrong": dict.fromkeys(names, draws[:, 0])}
    figure = plot_joints(samples, (names, mean, covariance), num_pairs=2, path=tmp_path / "joints.png")
    assert (tmp_path / "joints.png").exists()
    labels = [ax.get_ylabel().split("\n")[0] for ax in figure.axes if ax.get_ylabel()]
    assert labels == ["c against a", "d against b"]
    assert [ax.get_title() for ax in figure.axes[:2]] == ["right", "wrong"]
    ellipse = figure.axes[0].lines[1].get_xydata() - mean[[0, 2]]  # two standard deviations
    block = covariance[np.ix_([0, 2], [0, 2])]
    np.testing.assert_allclose(np.einsum("ni,ij,nj->n", ellipse, np.linalg.inv(block), ellipse), 4.0)
    with pytest.raises(GraphflowsError, match="got none of d"):
        plot_joints({"g": dict.fromkeys("abc", draws[:, 0])}, (names, mean, covariance))
    with pytest.raises(GraphflowsError, match="at least two sites"):
        plot_joints(samples, (["a"], mean[:1], covariance[:1, :1]))
