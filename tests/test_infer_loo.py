import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain
from infer_posteriors import Groups, Regression
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer import sample_posterior


@pytest.fixture
def groups():
    return Groups()


class TestShared:
    """Regression: all latents are shared."""

    def test_exact_up_to_monte_carlo(self):
        regression = Regression()
        posterior = sample_posterior(
            regression.model, regression.guide, regression.x, regression.y, num_draws=4000
        )
        loo = posterior.loo(seed=1)
        exact = regression.loo()
        assert loo.plates == ("data",)
        assert loo.khat.shape == loo.pointwise.shape == (20,)
        assert loo.khat.max() < 0.5
        assert (loo.pointwise - exact).abs().max() < 0.02
        assert loo.elpd == pytest.approx(exact.sum().item(), abs=0.05)
        assert loo.se == pytest.approx(math.sqrt(20) * exact.std().item(), rel=0.05)
        assert "20 elements of data; all k-hat <= 0.7" in repr(loo)

    def test_the_ratios_carry_the_weight_of_a_wrong_guide(self):
        """Without it the answer would be that of the guide, off by more than the tolerance."""
        regression = Regression()
        posterior = sample_posterior(
            regression.model, regression.wide_guide, regression.x, regression.y, num_draws=20_000
        )
        exact = regression.loo()
        loo = posterior.loo(seed=1)
        assert (loo.pointwise - exact).abs().max() < 0.03
        inner = posterior.log_likelihood()["y"]
        unweighted = math.log(len(inner)) - torch.logsumexp(-inner, 0)
        assert (unweighted - exact).abs().max() > 0.05
        fixed = posterior.reweighted(4000, seed=2).loo(seed=3)
        assert fixed.elpd == pytest.approx(exact.sum().item(), abs=0.1)

    def test_several_observed_sites_of_a_datum_go_together(self):
        regression = Regression()

        def model(x, y):
            a = pyro.sample("a", dist.Normal(0.0, 2.0))
            b = pyro.sample("b", dist.Normal(0.0, 2.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(a + b * x, regression.noise), obs=y)
                pyro.sample("w", dist.Normal(0.0, 1.0), obs=y)

        posterior = sample_posterior(model, regression.guide, regression.x, regression.y, num_draws=2000)
        exact = regression.loo() + dist.Normal(0.0, 1.0).log_prob(regression.y)
        assert (posterior.loo(seed=1).pointwise - exact).abs().max() < 0.03

    def test_masked_elements_are_no_data(self):
        regression = Regression()
        mask = torch.arange(20) % 4 != 0

        def model(x, y):
            a = pyro.sample("a", dist.Normal(0.0, 2.0))
            b = pyro.sample("b", dist.Normal(0.0, 2.0))
            with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(a + b * x, regression.noise), obs=y)

        kept = Regression()
        kept.x, kept.y = regression.x[mask], regression.y[mask]
        loo = sample_posterior(model, kept.guide, regression.x, regression.y, num_draws=4000).loo(seed=1)
        assert loo.num_data == 15
        assert loo.pointwise.isnan().tolist() == (~mask).tolist()
        assert (loo.pointwise[mask] - kept.loo()).abs().max() < 0.03


class TestIntegrated:
    """Groups with a datum each: theta belongs to a single datum."""

    def test_exact_by_inner_draws_of_the_guide(self, groups):
        posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=2000)
        loo = posterior.loo(seed=1)
        assert loo.method == "theta integrated by 100 inner draws of the guide"
        assert (loo.pointwise - groups.loo()).abs().max() < 0.02
        assert loo.khat.max() < 0.5

    def test_one_inner_draw_of_an_exact_conditional_is_enough(self, groups):
        posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=2000)
        assert (posterior.loo(num_inner=1, seed=1).pointwise - groups.loo()).abs().max() < 0.02

    def test_a_wrong_guide(self, groups):
        posterior = sample_posterior(groups.model, groups.guide(1.3, shift=0.1), *groups.args, num_draws=4000)
        loo = posterior.loo(seed=1)
        assert loo.khat.max() < 0.7
        assert (loo.pointwise - groups.loo()).abs().max() < 0.04

    def test_by_inner_draws_of_the_model(self, groups):
        """A guide that draws theta first; and resampled draws, whose guide is not theirs."""
        local_first = sample_posterior(groups.model, groups.local_first, *groups.args, num_draws=10_000)
        resampled = sample_posterior(
            groups.model, groups.guide(1.1), *groups.args, num_draws=2000
        ).reweighted(seed=1)
        for posterior in (local_first, resampled):
            loo = posterior.loo(num_inner=300, seed=1)
            assert loo.method == "theta integrated by 300 inner draws of the model"
            assert (loo.pointwise - groups.loo()).abs().max() < 0.06

    def test_a_guide_with_one_joint_draw(self, groups):
        """AutoMultivariateNormal draws everything at once: inner draws come from the model."""
        guide = AutoMultivariateNormal(groups.model)
        posterior = sample_posterior(groups.model, guide, *groups.args, num_draws=200)
        assert posterior.loo(seed=1).method == "theta integrated by 100 inner draws of the model"

    def test_one_by_one(self, groups):
        """A model that cannot run in batches: given all latents, and that is said."""

        def refusing(y, s):
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
            if mu.dim():
                raise RuntimeError("not written for batches")
            with pyro.plate("groups", len(s)):
                theta = pyro.sample("theta", dist.Normal(mu, 1.5))
                pyro.sample("y", dist.Normal(theta, s), obs=y)

        posterior = sample_posterior(refusing, groups.guide(), *groups.args, num_draws=300)
        loo = posterior.loo(seed=1)
        assert loo.method.startswith("given all latents")
        inner = posterior.log_likelihood()["y"]
        assert torch.allclose(inner, dist.Normal(posterior.draws["theta"], groups.s).log_prob(groups.y))
        assert (loo.pointwise - groups.loo()).abs().max() < 0.5

    def test_no_shared_latent_gives_the_evidence(self):
        chain = Chain(num_data=5)
        posterior = sample_posterior(chain.model, chain.guide, *chain.args, num_draws=100)
        loo = posterior.loo()
        assert loo.method == "no latent is shared: the evidence of each datum"
        assert torch.allclose(loo.pointwise, chain.log_evidence())

        def wide(x, c):
            with pyro.plate("data", len(c)):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
                pyro.sample("z", dist.Normal(0.8 * w + c, 0.7))

        found = sample_posterior(chain.model, wide, *chain.args, num_draws=20_000)
        error = found.evidence.standard_error
        assert ((found.loo().pointwise - chain.log_evidence()).abs() < 6 * error + 0.02).all()

    def test_sites_that_the_model_sums_out(self):
        """A mixture with a shared mean: the assignment of a datum is summed, its mean is shared."""
        y = torch.tensor([-1.0, 0.5, 2.5, 3.0])

        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                pyro.sample("y", dist.Normal(mu + 2 * c, 1.0), obs=y)

        def guide(y):
            pyro.sample("mu", dist.Normal(0.3, 0.7))

        grid = torch.linspace(-6, 6, 4001)
        terms = torch.logaddexp(
            math.log(0.3) + dist.Normal(grid + 2, 1.0).log_prob(y[:, None]),
            math.log(0.7) + dist.Normal(grid, 1.0).log_prob(y[:, None]),
        )
        prior = dist.Normal(0.0, 1.0).log_prob(grid)
        whole = torch.logsumexp(prior + terms.sum(0), 0)
        exact = torch.stack([whole - torch.logsumexp(prior + terms.sum(0) - term, 0) for term in terms])
        posterior = sample_posterior(model, guide, y, num_draws=10_000)
        loo = posterior.loo(seed=1)
        assert (loo.pointwise - exact).abs().max() < 0.03
        likelihood = posterior.log_likelihood()["y"]
        mu = posterior.draws["mu"][:5, None]
        expected = torch.logaddexp(
            math.log(0.3) + dist.Normal(mu + 2, 1.0).log_prob(y),
            math.log(0.7) + dist.Normal(mu, 1.0).log_prob(y),
        )
        assert torch.allclose(likelihood[:5], expected)


class TestEightSchools:
    """mu ~ N(0, 5), tau ~ HalfCauchy(5): the standard problem, exact by quadrature over mu and tau."""

    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(self, y, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def guide(self, y, sigma):
        """Globals that are only roughly right, and the exact conditional of theta: the weights must do the rest."""
        mu = pyro.sample("mu", dist.Normal(4.4, 4.5))
        tau = pyro.sample("tau", dist.LogNormal(0.8, 1.4))
        with pyro.plate("schools", len(sigma)):
            precision = 1 / tau**2 + 1 / sigma**2
            mean = (mu / tau**2 + y / sigma**2) / precision
            pyro.sample("theta", dist.Normal(mean, precision**-0.5))

    def exact(self):
        log_tau, mu = torch.linspace(-12, 6, 1801), torch.linspace(-25, 35, 601)
        tau = log_tau.exp()
        prior = dist.Normal(0.0, 5.0).log_prob(mu)[:, None] + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
        terms = torch.stack(
            [
                dist.Normal(mu[:, None], (tau**2 + s**2).sqrt()).log_prob(v)
                for v, s in zip(self.y, self.sigma, strict=True)
            ]
        )
        whole = prior + terms.sum(0)
        return torch.stack([whole.logsumexp((0, 1)) - (whole - term).logsumexp((0, 1)) for term in terms])

    def test_within_the_tolerance_of_the_exact_answer(self):
        exact = self.exact()
        assert exact.sum().item() == pytest.approx(-30.742, abs=0.001)
        posterior = sample_posterior(self.model, self.guide, self.y, self.sigma, num_draws=4000, seed=0)
        loo = posterior.loo(seed=1)
        assert loo.elpd == pytest.approx(exact.sum().item(), abs=0.1)
        assert (loo.pointwise - exact).abs().max() < 0.02
        assert loo.khat.max() < 0.5
        # given all latents the same draws are worse: theta has been pulled to its own datum
        likelihood = posterior.log_likelihood()["y"]
        weights = posterior.log_weights[:, None]
        conditional = torch.logsumexp(weights, 0) - torch.logsumexp(weights - likelihood, 0)
        assert (conditional - exact).abs().max() > (loo.pointwise - exact).abs().max()


class TestWhatADatumIs:
    @staticmethod
    def nested(y):
        """y[i, j] in groups j of a plate of rows i; z belongs to a group."""
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", y.shape[-1], dim=-1):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            with pyro.plate("rows", len(y), dim=-2):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    @staticmethod
    def prior(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", y.shape[-1], dim=-1):
            rows = len(y)
            precision = 1 + rows
            pyro.sample("z", dist.Normal((mu + y.sum(0)) / precision, precision**-0.5))

    @staticmethod
    def log_evidence(y, rows=None):
        """Return log p of the flattened y, or of some of its elements."""
        num_rows, num = y.shape
        same = torch.eye(num).repeat(num_rows, num_rows)
        cov = torch.eye(num_rows * num) + same + 1.0
        keep = torch.arange(num_rows * num) if rows is None else rows
        zero = torch.zeros(len(keep))
        return dist.MultivariateNormal(zero, cov[keep][:, keep]).log_prob(y.flatten()[keep])

    def test_single_elements_and_groups(self):
        y = torch.randn(3, 2)
        posterior = sample_posterior(self.nested, self.prior, y, num_draws=20_000)
        places = torch.arange(6)
        whole = self.log_evidence(y)
        single = torch.stack([whole - self.log_evidence(y, places[places != n]) for n in range(6)]).reshape(
            3, 2
        )
        loo = posterior.loo(seed=1)
        assert loo.plates == ("rows", "groups")
        assert loo.method == "all sampled latents are shared"
        assert (loo.pointwise - single).abs().max() < 0.05
        group = torch.stack([whole - self.log_evidence(y, places[places % 2 != j]) for j in range(2)])
        by_group = posterior.loo(by="groups", seed=1)
        assert by_group.plates == ("groups",)
        assert by_group.method.startswith("z integrated by 100 inner draws of the guide")
        assert (by_group.pointwise - group).abs().max() < 0.05

    def test_a_posterior_that_factorises_over_the_outer_plate(self):
        """z[j] for the y[:, j]: single elements are left out of a group whose weights are its own."""

        def model(y):
            with pyro.plate("groups", y.shape[-1], dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with pyro.plate("rows", len(y), dim=-2):
                    pyro.sample("y", dist.Normal(z, 1.0), obs=y)

        def guide(y):
            with pyro.plate("groups", y.shape[-1], dim=-1):
                pyro.sample("z", dist.Normal(y.sum(0) / (1 + len(y)) + 0.1, 1.2 * (1 + len(y)) ** -0.5))

        y = torch.randn(3, 4)
        posterior = sample_posterior(model, guide, y, num_draws=20_000, seed=0)
        assert posterior.data_plate == "groups"
        cov = torch.eye(3) + 1.0
        exact = torch.empty(3, 4)
        for j in range(4):
            whole = dist.MultivariateNormal(torch.zeros(3), cov).log_prob(y[:, j])
            for i in range(3):
                keep = [k for k in range(3) if k != i]
                rest = dist.MultivariateNormal(torch.zeros(2), cov[keep][:, keep]).log_prob(y[keep, j])
                exact[i, j] = whole - rest
        loo = posterior.loo(seed=1)
        assert loo.plates == ("rows", "groups")
        assert (loo.pointwise - exact).abs().max() < 0.05
        resampled = posterior.reweighted(4000, seed=2).loo(seed=3)
        assert (resampled.pointwise - exact).abs().max() < 0.1

    def test_it_must_be_said_where_it_is_not_clear(self, groups):
        def model(y, s):
            groups.model(y, s)
            pyro.sample("total", dist.Normal(0.0, 1.0), obs=y.sum())

        posterior = sample_posterior(model, groups.guide(), *groups.args, num_draws=2000)
        with pytest.raises(GraphflowsError, match=r"different plates \({'total': \[\], 'y': \['groups'\]}\)"):
            posterior.loo()
        loo = posterior.loo(by="groups", seed=1)
        assert (loo.pointwise - groups.loo()).abs().max() < 0.02

    def test_no_plate_and_unknown_plates(self, groups):
        def model(y, s):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu, s).to_event(1), obs=y)

        def guide(y, s):
            pyro.sample("mu", dist.Normal(0.0, 1.0))

        posterior = sample_posterior(model, guide, *groups.args, num_draws=10)
        with pytest.raises(GraphflowsError, match=r"observed sites inside a plate.*\['y'\] are in none"):
            posterior.loo()
        posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=10)
        with pytest.raises(GraphflowsError, match=r"one of \['groups'\]; got 'group'"):
            posterior.loo(by="group")
        with pytest.raises(GraphflowsError, match="Expected a positive num_inner"):
            posterior.loo(num_inner=0)

    def test_shared_sites_that_are_summed_out(self):
        def model(y):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z + c, 1.0), obs=y)

        def guide(y):
            with pyro.plate("data", len(y)):
                pyro.sample("z", dist.Normal(y / 2, 1.0))

        posterior = sample_posterior(model, guide, torch.randn(3), num_draws=10)
        with pytest.raises(UnsupportedModelError, match=r"\['c'\] are summed out and concern several data"):
            posterior.loo()
        with pytest.raises(UnsupportedModelError, match="Let the guide sample these sites"):
            posterior.log_likelihood()


def test_likelihoods_of_zero(groups):
    """Uniform noise: draws for which a datum is impossible are allowed when that datum is left out."""
    y = torch.tensor([0.1, 0.3, 0.9])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Uniform(mu - 1, mu + 1, validate_args=False), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(0.5, 0.7))

    grid = torch.linspace(-4, 4, 8001)
    terms = torch.stack([dist.Uniform(grid - 1, grid + 1, validate_args=False).log_prob(v) for v in y])
    prior = dist.Normal(0.0, 1.0).log_prob(grid)
    others = torch.stack([terms[[k for k in range(3) if k != n]].sum(0) for n in range(3)])
    exact = torch.logsumexp(prior + terms.sum(0), 0) - torch.logsumexp(prior + others, 1)
    posterior = sample_posterior(model, guide, y, num_draws=40_000)
    assert (posterior.log_weights == -math.inf).any()
    assert (posterior.loo(seed=1).pointwise - exact).abs().max() < 0.05


def test_weights_of_zero_are_refused(groups):
    def guide(y, s):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(s)):
            pyro.sample("theta", dist.Normal(1e200, 1.0))

    posterior = sample_posterior(groups.model, guide, *groups.args, num_draws=50)
    with pytest.raises(GraphflowsError, match="all weights are zero"):
        posterior.loo(seed=1)


def test_blocks_of_data_give_the_same(groups, monkeypatch):
    posterior = sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=500)
    whole = posterior.loo(seed=1)
    monkeypatch.setattr("pyro_graphflows.infer.loo._NUMBERS_KEPT", 1000)  # two of six data at a time
    blocks = posterior.loo(seed=1)
    assert torch.equal(blocks.pointwise[:2], whole.pointwise[:2])
    assert (blocks.pointwise - groups.loo()).abs().max() < 0.05
