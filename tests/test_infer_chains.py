import pytest
import torch

from pyro_graphflows.infer.chains import bulk_ess, split_rhat


@pytest.fixture
def chains():
    """Autocorrelated, drifting, and with one chain apart; the last is rounded, with ties."""
    draws = torch.randn(4, 500, 4)
    for time in range(1, 500):
        draws[:, time, 0] += 0.7 * draws[:, time - 1, 0]
    draws[..., 1] = draws[..., 1].cumsum(1)
    draws[0, :, 2] += 0.3
    draws[..., 3] = draws[..., 3].round()
    return draws


def test_against_arviz(chains):
    stats = pytest.importorskip("arviz_stats.base").array_stats
    for column in range(4):
        one = chains[..., column].numpy()
        assert split_rhat(chains)[column].item() == pytest.approx(stats.rhat(one), rel=1e-9)
        assert bulk_ess(chains)[column].item() == pytest.approx(stats.ess(one, method="bulk"), rel=0.03)


def test_independent_and_autoregressive_chains():
    """An autoregression with coefficient r is worth (1 - r) / (1 + r) of its draws."""
    draws = torch.randn(20, 2000, 2)
    for time in range(1, 2000):
        draws[:, time, 1] = 0.5 * draws[:, time - 1, 1] + 0.75**0.5 * draws[:, time, 1]
    ess = bulk_ess(draws) / 40_000
    assert ess[0].item() == pytest.approx(1.0, abs=0.1)
    assert ess[1].item() == pytest.approx(1 / 3, abs=0.05)
    assert (split_rhat(draws) < 1.01).all()


def test_values_that_are_all_the_same_have_none():
    draws = torch.zeros(2, 10, 3)
    assert bulk_ess(draws).isnan().all()
    assert split_rhat(draws).isnan().all()
