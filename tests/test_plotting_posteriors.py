import numpy as np
import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.coverage import coverage
from pyro_graphflows.plotting import (
    plot_contraction,
    plot_coverage,
    plot_forest,
    plot_intervals,
    plot_khat,
    plot_pairs,
    plot_predictive,
    plot_ranks,
)
from pyro_graphflows.plotting.figures import new_axes


@pytest.fixture
def draws():
    return {"mu": torch.randn(200), "theta": 3 + torch.randn(200, 4)}


def test_each_draws_on_the_axes_it_is_given(draws):
    ranks = torch.randint(0, 100, (300, 2))
    for plot in (
        lambda ax: plot_forest(draws, ax),
        lambda ax: plot_khat(torch.rand(10), ax),
        lambda ax: plot_predictive(torch.zeros(5), torch.randn(50, 5), ax),
        lambda ax: plot_ranks(ranks, 99, ax),
        lambda ax: plot_coverage(coverage(ranks, 99), ax),
        lambda ax: plot_contraction(torch.randn(20), torch.rand(20), ax),
    ):
        ax = new_axes((3, 2))
        assert plot(ax) is ax
        assert plot(None) is not ax


def test_a_forest_has_a_row_for_each_number(draws):
    ax = plot_forest(draws, reference={"mu": torch.randn(50)})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["mu", *(f"theta[{i}]" for i in range(4))]
    assert ax.get_legend() is not None
    assert len(plot_forest({"x": torch.randn(20, 100)}).get_yticklabels()) == 60
    median = [line for line in plot_forest({"x": torch.arange(101.0)}).lines if len(line.get_xdata()) == 1]
    assert median[0].get_xdata()[0] == 50


def test_intervals_have_a_panel_for_each_site(draws):
    shifted = draws["theta"] + torch.tensor([3.0, 1.0, 2.0, 0.0])
    axes = plot_intervals({**draws, "theta": shifted, "many": torch.randn(50, 300)}, num_columns=2)
    assert [ax.get_visible() for ax in axes.ravel()] == [True, True, True, False]
    assert [ax.get_title(loc="left") for ax in axes.ravel()[:3]] == ["mu", "theta (4)", "many (300)"]
    medians = axes[0, 1].lines[0].get_ydata()
    assert list(medians) == sorted(np.quantile(shifted.numpy(), 0.5, axis=0))
    with pytest.raises(GraphflowsError, match="2 axes or more"):
        plot_intervals(draws, axes[:1, :1])
    with pytest.raises(GraphflowsError, match=r"got \['nu'\]"):
        plot_intervals(draws, names=["nu"])
    with pytest.raises(GraphflowsError, match="finite draws of 'mu'"):
        plot_intervals({"mu": torch.full((3,), torch.nan)})


def test_pairs_are_a_triangle(draws):
    axes = plot_pairs(draws, names=["mu", "theta[2]"], reference=draws)
    assert axes.shape == (2, 2)
    assert [ax.get_visible() for ax in axes.ravel()] == [True, False, True, True]
    assert axes[1, 0].get_xlabel() == "mu"
    with pytest.raises(GraphflowsError, match="2 × 2 axes"):
        plot_pairs(draws, axes[:1], names=["mu", "theta[2]"])


def test_names_and_draws_are_checked(draws):
    with pytest.raises(GraphflowsError, match=r"got \['nu'\]"):
        plot_forest(draws, names=["nu"])
    with pytest.raises(GraphflowsError, match=r"\['x'\] are not"):
        plot_forest({"x": torch.full((5,), torch.nan)})


def test_khat_counts_those_above():
    assert plot_khat(torch.tensor([0.1, 0.8, torch.inf])).get_xlabel() == "datum (2 of 3 above 0.7)"
    assert plot_khat(torch.tensor(0.3)).get_xlabel() == "all data together"


def test_predictions_as_intervals_and_as_histograms():
    few = plot_predictive(torch.arange(10.0), torch.randn(100, 10))
    assert few.get_xlabel() == "datum, by its value"
    many = plot_predictive(torch.randn(500), torch.randn(60, 500))
    assert many.get_xlabel() == ""
    counts = plot_predictive(torch.ones(500), torch.ones(60, 500), kind="density")
    assert np.isfinite(counts.get_xlim()).all()
    with pytest.raises(GraphflowsError, match="'histogram'"):
        plot_predictive(torch.ones(3), torch.ones(5, 3), kind="histogram")
    with pytest.raises(GraphflowsError, match=r"shape \(draws, \(3,\)\)"):
        plot_predictive(torch.ones(3), torch.ones(5, 4))


def test_ranks_out_of_range_are_refused():
    with pytest.raises(GraphflowsError, match="from 0 to num_draws = 9"):
        plot_ranks(torch.tensor([10]), 9)
