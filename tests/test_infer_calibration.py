import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain
from scipy.stats import chi2, chisquare
from torch import nn

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer.calibration import _ranks, sbc_ranks, sbc_uniformity


def normal(x=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(shift=0.0, scale=0.5**0.5):
    def guide(x=None, observations=None):
        pyro.sample("z", dist.Normal(observations["x"] / 2 + shift, scale))

    return guide


class TestRanks:
    def test_by_hand(self):
        draws = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
        assert _ranks(torch.tensor([2.5, 9.0]), draws).tolist() == [2, 3]
        ties = torch.stack([_ranks(torch.tensor([5.0]), draws[:, 1:]) for _ in range(400)])
        assert sorted(set(ties.flatten().tolist())) == [0, 1, 2, 3]
        assert abs(ties.double().mean().item() - 1.5) < 5 * (1.25 / 400) ** 0.5

    def test_exact_posterior_is_uniform(self):
        """Chains with covariates, in a plate: every element of every site; also over the bins, one by one."""
        chain = Chain(num_data=3)
        ranks = sbc_ranks(
            chain.model, chain.guide, c=chain.c, num_simulations=4000, num_draws=19, chunk_size=1500
        )
        assert {name: tuple(value.shape) for name, value in ranks.items()} == {"z": (4000, 3), "w": (4000, 3)}
        assert min(value.min().item() for value in ranks.values()) == 0
        assert max(value.max().item() for value in ranks.values()) == 19
        for value in ranks.values():
            assert sbc_uniformity(value, 19).min().item() > 1e-3 / 6

    @pytest.mark.parametrize(("shift", "scale"), [(0.15, 0.5**0.5), (0.0, 0.6), (0.0, 0.85)])
    def test_shifts_and_wrong_scales_are_seen(self, shift, scale):
        ranks = sbc_ranks(normal, guide_of(shift, scale), num_simulations=3000)["z"]
        assert ranks.shape == (3000,)
        assert sbc_uniformity(ranks, 99).item() < 1e-6
        centre = ranks.double().mean().item() - 49.5
        spread = ranks.double().std().item() / (100**2 / 12) ** 0.5
        if shift:
            assert centre < -3
        else:
            assert (spread > 1.05) == (scale < 0.7)
            assert (spread < 0.95) == (scale > 0.7)

    def test_discrete_and_vector_sites_and_plates_of_globals(self):
        def model(x=None):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("rows", 3, dim=-2):
                b = pyro.sample("b", dist.Bernoulli(0.3))
                with pyro.plate("columns", 4, dim=-1):
                    pyro.sample("x", dist.Normal(u[..., None, :].sum(-1) + 3 * b, 1.0), obs=x)

        def prior(x=None, observations=None):
            pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("rows", 3, dim=-2):
                pyro.sample("b", dist.Bernoulli(0.3))

        ranks = sbc_ranks(model, prior, num_simulations=2000, num_draws=9)
        assert {name: tuple(value.shape) for name, value in ranks.items()} == {
            "u": (2000, 2),
            "b": (2000, 3, 1),
        }
        # the prior is calibrated as well: ranks do not tell whether the data were used
        assert sbc_uniformity(ranks["u"], 9).min().item() > 1e-3
        assert sbc_uniformity(ranks["b"], 9).min().item() > 1e-3

    def test_evaluation_mode(self):
        class Guide(nn.Module):
            def forward(self, x=None, observations=None):
                assert not self.training
                guide_of()(observations=observations)

        guide = Guide()
        sbc_ranks(normal, guide, num_simulations=5)
        assert guide.training

    def test_draws_must_differ(self):
        def guide(x=None, observations=None):
            pyro.sample("z", dist.Delta(observations["x"] / 2))

        with pytest.raises(UnsupportedModelError, match="share one value"):
            sbc_ranks(normal, guide, num_simulations=5)

    @pytest.mark.parametrize("number", ["num_simulations", "num_draws", "chunk_size"])
    def test_numbers_must_be_positive(self, number):
        with pytest.raises(GraphflowsError, match="Expected positive num_simulations"):
            sbc_ranks(normal, guide_of(), **{number: 0})


class TestUniformity:
    def test_p_values_are_uniform_under_uniform_ranks(self):
        ranks = torch.randint(0, 100, (1000, 500))
        p = sbc_uniformity(ranks, 99)
        assert p.shape == (500,)
        assert abs(p.mean().item() - 0.5) < 5 * (1 / 12 / 500) ** 0.5

    def test_p_value_is_that_of_the_chi_square_distribution(self):
        """Counts 30, 10, 15, 45 where 25 each are expected: a statistic of 30 with 3 degrees of freedom."""
        ranks = torch.arange(4).repeat_interleave(torch.tensor([30, 10, 15, 45]))
        assert sbc_uniformity(ranks, 3, num_bins=4).item() == pytest.approx(chi2.sf(30.0, 3), rel=1e-12)

    def test_bins_of_unequal_width_are_allowed_for(self):
        """101 ranks in 7 bins: the expected counts are those of the bins, not a seventh each."""
        p = sbc_uniformity(torch.arange(101).repeat(50), 100, num_bins=7)
        assert p.shape == ()
        assert p.item() == pytest.approx(1.0)

    @pytest.mark.parametrize(
        ("simulations", "options"), [(9, {}), (100, {"num_bins": 1}), (100, {"num_bins": 12})]
    )
    def test_bins_must_make_sense(self, simulations, options):
        with pytest.raises(GraphflowsError, match=r"between 2 and num_draws \+ 1 = 11 bins"):
            sbc_uniformity(torch.zeros(simulations), 10, **options)


def test_p_values_against_scipy():
    ranks = torch.randint(0, 100, (400, 3))
    counts = torch.stack([torch.bincount(column // 5, minlength=20) for column in ranks.T], 1)
    expected = [chisquare(column.numpy()).pvalue for column in counts.T]
    assert sbc_uniformity(ranks, 99, num_bins=20).tolist() == pytest.approx(expected)
