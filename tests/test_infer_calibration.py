import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain
from scipy.stats import chi2, chisquare
from torch import nn

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer import calibration
from pyro_graphflows.infer.calibration import (
    _ranks,
    calibration_report,
    sbc_ranks,
    sbc_uniformity,
    tarp_ranks,
)


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


class TestJointRanks:
    @staticmethod
    def draws(correlation):
        """Posteriors of a pair whose truths have correlation .9, and draws with the given one; marginals are right."""
        shift = torch.randn(1500, 2)

        def pair(*shape, rho):
            one, two = torch.randn(*shape), torch.randn(*shape)
            return torch.stack([one, rho * one + (1 - rho**2) ** 0.5 * two], -1)

        return shift + pair(1500, rho=0.9), shift + pair(99, 1500, rho=correlation)

    def test_dependence_is_seen_where_single_ranks_see_none(self):
        truth, draws = self.draws(-0.9)
        ranks = tarp_ranks(truth, draws)
        assert ranks.shape == (1500,)
        assert sbc_uniformity(ranks, 99).item() < 1e-6
        assert sbc_uniformity(_ranks(truth, draws), 99).min().item() > 1e-4

    def test_the_posterior_is_uniform(self):
        assert sbc_uniformity(tarp_ranks(*self.draws(0.9)), 99).item() > 1e-4

    def test_few_simulations_at_a_time(self):
        """Units in which a truth itself takes part would put all of its numbers at one distance."""
        truth, draws = torch.randn(600, 100), torch.randn(99, 600, 100)
        threes = [tarp_ranks(*each) for each in zip(truth.split(3), draws.split(3, 1), strict=True)]
        twos = [
            tarp_ranks(*each, torch.randn(50, 100))
            for each in zip(truth.split(2), draws.split(2, 1), strict=True)
        ]
        for ranks in (threes, twos):
            assert sbc_uniformity(torch.cat(ranks), 99).item() > 1e-4

    def test_shapes_are_checked(self):
        with pytest.raises(GraphflowsError, match=r"got the shapes \(3, 2\) and \(9, 4, 2\)"):
            tarp_ranks(torch.zeros(3, 2), torch.zeros(9, 4, 2))


class TestReport:
    def test_many_numbers_are_calibrated_together(self, monkeypatch):
        """So many numbers that two simulations fit into one run."""
        monkeypatch.setattr(calibration, "_NUMBERS_AT_ONCE", 1)

        def model(x):
            with pyro.plate("data", 50):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x, observations=None):
            with pyro.plate("data", 50):
                pyro.sample("z", dist.Normal(observations["x"] / 2, 0.5**0.5))

        report = calibration_report(model, guide, torch.zeros(50), num_simulations=101)
        assert len(report.joint_ranks) == 101
        assert report.joint_p_value > 1e-4

    def test_of_the_posterior(self):
        """Contraction is one minus the posterior's over the prior's variance: 1/2. z-scores are standard normal."""
        report = calibration_report(normal, guide_of(), num_simulations=3000, num_draws=199)
        assert report.num_simulations == 3000
        assert report.contraction["z"].mean().item() == pytest.approx(0.5, abs=0.02)
        assert abs(report.z_scores["z"].mean().item()) < 5 / 3000**0.5
        assert report.z_scores["z"].std().item() == pytest.approx(1.0, abs=0.07)
        assert report.joint_p_value > 1e-4
        assert report.coverage("z").num_simulations == 3000
        row = report.summary()["z"]
        assert row["90%"] == pytest.approx(0.9, abs=5 * (0.09 / 3000) ** 0.5)
        assert report.summary().note.startswith("Nothing against the guide in 3000 simulations")
        assert repr(report).startswith("CalibrationReport(3000 simulations, 199 draws for each)")

    @pytest.mark.parametrize(
        ("shift", "scale", "words"),
        [
            (0.3, 0.5**0.5, "z: the guide's draws are too high"),
            (-0.3, 0.5**0.5, "z: the guide's draws are too low"),
            (0.0, 0.5, "z: the guide is too narrow"),
            (0.0, 1.0, "z: the guide is too wide"),
        ],
    )
    def test_what_is_wrong_is_said(self, shift, scale, words):
        report = calibration_report(normal, guide_of(shift, scale), num_simulations=2000)
        assert words in report.summary().note

    def test_wrong_dependence_alone(self):
        def model(x=None):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.1), obs=x)

        def marginals(x=None, observations=None):  # z given x: each N(x / 2.01, 1 - 1 / 2.01)
            mean = (observations["x"] / 2.01)[..., None].expand(*observations["x"].shape, 2)
            pyro.sample("z", dist.Normal(mean, (1 - 1 / 2.01) ** 0.5).to_event(1))

        report = calibration_report(model, marginals, num_simulations=1500)
        assert "have their dependence wrong" in report.summary().note.replace("has", "have")
        assert report.ranks["z"].shape == (1500, 2)

    def test_discrete_sites_have_no_distances(self):
        def model(x=None):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(3 * b, 1.0), obs=x)

        def prior(x=None, observations=None):
            pyro.sample("b", dist.Bernoulli(0.3))

        report = calibration_report(model, prior, num_simulations=500)
        assert report.joint_ranks is None
        assert report.joint_p_value is None
        assert report.contraction["b"].mean().item() == pytest.approx(0.0, abs=0.05)

    def test_chunks_join(self, monkeypatch):
        monkeypatch.setattr("pyro_graphflows.infer.calibration._NUMBERS_AT_ONCE", 4000)
        report = calibration_report(normal, guide_of(), num_simulations=105, num_draws=19)
        assert report.ranks["z"].shape == report.z_scores["z"].shape == (105,)

    def test_unknown_sites_and_numbers(self):
        report = calibration_report(normal, guide_of(), num_simulations=50)
        with pytest.raises(GraphflowsError, match="Expected a site among"):
            report.coverage("y")
        with pytest.raises(GraphflowsError, match="Expected positive num_simulations"):
            calibration_report(normal, guide_of(), num_simulations=0)

    def test_improper_priors_are_named(self):
        def model(x=None):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(UnsupportedModelError, match="site 'z' is improper"):
            calibration_report(model, guide_of())

    def test_plot(self, tmp_path):
        report = calibration_report(normal, guide_of(), num_simulations=200)
        figure = report.plot(tmp_path / "report.png")
        assert len(figure.axes) == 4
        assert (tmp_path / "report.png").stat().st_size > 10_000
