import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.coverage import coverage


@pytest.mark.parametrize("num_draws", [99, 100, 1, 7])
def test_uniform_ranks_have_the_nominal_shares(num_draws):
    """Each rank once: the interval of k ranks holds exactly k of them."""
    result = coverage(torch.arange(num_draws + 1), num_draws)
    assert torch.equal(result.nominal, result.observed)
    assert result.nominal.tolist() == sorted(set(result.nominal.tolist()))


def test_bands_hold_95_in_100():
    """Of calibrated guides: 400 sites of 200 simulations each, levels by themselves."""
    ranks = torch.randint(0, 100, (200, 400))
    result = coverage(ranks, 99)
    assert result.observed.shape == (len(result.nominal), 400)
    inside = (result.observed >= result.lower[:, None]) & (result.observed <= result.upper[:, None])
    share = inside.double().mean(1)
    assert bool((share > 0.95 - 5 * (0.95 * 0.05 / 400) ** 0.5).all())
    assert bool((share < 0.99).any())  # and the bands are not wider than they need be


def test_narrow_and_wide_guides():
    ends, middle = torch.tensor([0, 99] * 100), torch.full((200,), 50)
    assert bool((coverage(ends, 99).observed < coverage(ends, 99).lower)[1:].all())
    assert bool((coverage(middle, 99).observed == 1).all())
    assert "+0." in repr(coverage(middle, 99))
    assert "-0." in repr(coverage(ends, 99))


@pytest.mark.parametrize(
    ("ranks", "num_draws", "levels", "message"),
    [
        (torch.tensor([5]), 4, 20, "from 0 to num_draws = 4"),
        (torch.tensor([-1]), 4, 20, "from 0 to num_draws = 4"),
        (torch.zeros(0), 4, 20, "at least one simulation"),
        (torch.tensor(3), 4, 20, "at least one simulation"),
        (torch.tensor([1]), 4, 0, "positive num_levels"),
    ],
)
def test_bad_numbers_are_refused(ranks, num_draws, levels, message):
    with pytest.raises(GraphflowsError, match=message):
        coverage(ranks, num_draws, num_levels=levels)
