import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain, Hierarchy, normal_evidence, normal_model, normal_posterior
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule
from torch import nn

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer.evidence import evidence_from_log_weights, importance_log_weights, log_evidence


def too_narrow(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + 0.2, 0.6))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 7}, {"chunk_size": 1}, {"vectorize": False}])
def test_exact_posterior_gives_exact_evidence(options):
    """Every weight equals p(x): no error, no spread, all samples effective, whatever the chunks."""
    chain = Chain()
    evidence = log_evidence(chain.model, chain.guide, *chain.args, num_particles=30, **options)
    assert torch.allclose(evidence.log_evidence, chain.log_evidence(), atol=1e-10, rtol=0)
    assert evidence.standard_error.abs().max() < 1e-10
    assert torch.allclose(evidence.ess, torch.full((5,), 30.0))
    assert bool((evidence.khat == -math.inf).all())
    assert all(value.shape == (5,) for value in evidence)


def test_one_particle():
    chain = Chain()
    evidence = log_evidence(chain.model, chain.guide, *chain.args, num_particles=1)
    assert torch.allclose(evidence.log_evidence, chain.log_evidence())
    assert bool(evidence.standard_error.isnan().all())


def test_keyword_arguments_reach_both():
    chain = Chain()
    evidence = log_evidence(chain.model, chain.guide, x=chain.x, c=chain.c, num_particles=3)
    assert torch.allclose(evidence.log_evidence, chain.log_evidence())


def test_inexact_guide_is_right_within_its_standard_errors():
    """200 data with the same x: errors over standard errors must look standard normal, and each datum stands alone."""
    x = torch.full((200,), 0.7)
    evidence = log_evidence(normal_model, too_narrow, x, num_particles=1000)
    error = (evidence.log_evidence - normal_evidence(x)) / evidence.standard_error
    assert abs(error.mean().item()) < 0.45  # five standard errors, and the bias -se/2 of a logarithm
    assert 0.8 < error.std().item() < 1.3
    assert bool((evidence.ess > 100).all())
    assert bool((evidence.ess < 1000).all())


def test_data_do_not_share_weights():
    """The evidence of a datum does not depend on what is beside it."""
    x = torch.tensor([0.3, 30.0])
    weights = importance_log_weights(normal_model, too_narrow, x, num_particles=50)
    assert weights.shape == (50, 2)
    alone = log_evidence(normal_model, normal_posterior, x[:1], num_particles=2).log_evidence
    both = log_evidence(normal_model, normal_posterior, x, num_particles=2).log_evidence
    assert torch.allclose(alone[0], both[0])


def test_without_a_plate_the_result_is_a_number():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    x = torch.tensor([0.4, -2.0])
    evidence = log_evidence(model, guide, x, num_particles=6)
    assert all(value.shape == () for value in evidence)
    assert torch.allclose(evidence.log_evidence, normal_evidence(x).sum())


class TestGlobalLatents:
    def test_per_datum_weights_are_refused(self):
        hierarchy = Hierarchy()
        with pytest.raises(UnsupportedModelError, match=r"\['mu'\] are outside the data plate 'data'"):
            log_evidence(hierarchy.model, hierarchy.guide, hierarchy.x)

    def test_joint_weights_are_exact(self):
        hierarchy = Hierarchy()
        evidence = log_evidence(
            hierarchy.model, hierarchy.guide, hierarchy.x, data_plate=False, num_particles=4
        )
        assert torch.allclose(evidence.log_evidence, hierarchy.log_evidence())

    def test_conditioning_is_a_way_out(self):
        hierarchy = Hierarchy()
        mu = {"mu": torch.tensor(0.3)}

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((0.3 + 4 * x) / 5, 5**-0.5))

        model = poutine.block(poutine.condition(hierarchy.model, mu), hide=["mu"])
        evidence = log_evidence(model, guide, hierarchy.x, num_particles=3)
        assert torch.allclose(evidence.log_evidence, dist.Normal(0.3, 1.25**0.5).log_prob(hierarchy.x))

    def test_auxiliary_sites_are_global_too(self):
        x = torch.randn(3)
        guide = AutoDiagonalNormal(normal_model)
        guide(x)
        with pytest.raises(UnsupportedModelError, match="outside the data plate"):
            log_evidence(normal_model, guide, x)
        assert log_evidence(normal_model, guide, x, data_plate=False, num_particles=9).khat.shape == ()


class TestPlates:
    @staticmethod
    def nested(x, guide=False):
        """z_n; u_nm ~ N(z_n, 1), x_nm ~ N(u_nm, 1); x of shape (M, N), the data plate N outside at the right."""
        with pyro.plate("data", x.shape[1], dim=-1):
            precision = 1 + x.shape[0] / 2
            z = pyro.sample(
                "z",
                dist.Normal(x.sum(0, keepdim=True) / 2 / precision, precision**-0.5)
                if guide
                else dist.Normal(0.0, 1.0),
            )
            with pyro.plate("inner", x.shape[0], dim=-2):
                u = pyro.sample("u", dist.Normal((z + x) / 2, 0.5**0.5) if guide else dist.Normal(z, 1.0))
                if not guide:
                    pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    def test_inner_plates_are_summed(self):
        x = torch.randn(3, 4)
        covariance = torch.ones(3, 3) + 2 * torch.eye(3)
        expected = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x.T)
        for name in (None, "data"):
            evidence = log_evidence(
                self.nested, partial(self.nested, guide=True), x, data_plate=name, num_particles=5
            )
            assert torch.allclose(evidence.log_evidence, expected, atol=1e-10)
        with pytest.raises(UnsupportedModelError, match=r"\['z'\] are outside the data plate 'inner'"):
            log_evidence(self.nested, partial(self.nested, guide=True), x, data_plate="inner")

    def test_equal_plates_take_the_outer_one(self):
        def model(x, guide=False):
            with pyro.plate("rows", x.shape[0], dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
                z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5) if guide else dist.Normal(0.0, 1.0))
                if not guide:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = torch.randn(3, 4)
        guide = partial(model, guide=True)
        assert torch.allclose(log_evidence(model, guide, x).log_evidence, normal_evidence(x).sum(1))
        by_column = log_evidence(model, guide, x, data_plate="columns").log_evidence
        assert torch.allclose(by_column, normal_evidence(x).sum(0))

    def test_crossed_plates_need_a_name(self):
        def model(x):
            rows = pyro.plate("rows", x.shape[0], dim=-2)
            columns = pyro.plate("columns", x.shape[1], dim=-1)
            with rows:
                a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with columns:
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
            with rows, columns:
                pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

        guide = poutine.block(model, hide=["x"])
        with pytest.raises(GraphflowsError, match=r"\['columns', 'rows'\] all hold the observed sites"):
            log_evidence(model, guide, torch.randn(2, 3))
        with pytest.raises(
            GraphflowsError, match=r"among the vectorised plates \['columns', 'rows'\]; got 'row'"
        ):
            log_evidence(model, guide, torch.randn(2, 3), data_plate="row")
        assert log_evidence(model, guide, torch.randn(2, 3), data_plate=False).ess.shape == ()

    def test_observed_sites_in_different_plates_need_a_choice(self):
        def model(x, y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("first", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            with pyro.plate("second", len(y)):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

        def guide(x, y):
            precision = 1 + len(x) + len(y)
            pyro.sample("z", dist.Normal((x.sum() + y.sum()) / precision, precision**-0.5))

        x, y = torch.randn(2), torch.randn(3)
        with pytest.raises(GraphflowsError, match=r"No plate holds all observed sites \['x', 'y'\]"):
            log_evidence(model, guide, x, y)
        both = log_evidence(model, guide, x, y, data_plate=False, num_particles=3)
        exact = dist.MultivariateNormal(torch.zeros(5), torch.ones(5, 5) + torch.eye(5))
        assert torch.allclose(both.log_evidence, exact.log_prob(torch.cat([x, y])))

    def test_subsampled_plates_are_refused(self):
        def model(x, guide=False):
            with pyro.plate("data", 10, subsample_size=5):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                if not guide:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(UnsupportedModelError, match=r"'data' is subsampled \(5 of 10\)"):
            log_evidence(model, partial(model, guide=True), torch.randn(5))

    def test_scaled_sites_are_refused(self):
        model = poutine.scale(normal_model, 0.5)
        with pytest.raises(UnsupportedModelError, match=r"scaled by poutine\.scale"):
            log_evidence(model, normal_posterior, torch.randn(5))

    def test_masked_data_do_not_count(self):
        def model(x, mask, guide=False):
            with pyro.plate("data", len(x)), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5) if guide else dist.Normal(0.0, 1.0))
                if not guide:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x, mask = torch.randn(4), torch.tensor([True, False, True, True])
        evidence = log_evidence(model, partial(model, guide=True), x, mask)
        assert torch.allclose(evidence.log_evidence, normal_evidence(x) * mask)


def test_a_site_missing_in_the_guide_is_named():
    chain = Chain()

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedModelError, match=r"it does not sample \['w'\]"):
        log_evidence(chain.model, guide, *chain.args)


def test_particles_that_share_one_draw_are_refused():
    """A value drawn before pyro.sample has no particle dimension: one draw for all particles, silently."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.randn(len(x)), log_density=torch.zeros(len(x))))

    with pytest.raises(UnsupportedModelError, match="particles share one value"):
        log_evidence(normal_model, guide, torch.randn(3))


@pytest.mark.parametrize("number", [{"num_particles": 0}, {"chunk_size": 0}])
def test_numbers_must_be_positive(number):
    with pytest.raises(GraphflowsError, match="positive num_particles and chunk_size"):
        log_evidence(normal_model, normal_posterior, torch.zeros(2), **number)


class Dropping(PyroModule):
    """Model and guide as methods of a module that is in another state when it trains."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def model(self, x):
        normal_model(x)

    def guide(self, x):
        normal_posterior(self.frozen(self.dropout(x)))


@pytest.mark.parametrize("wrap", [lambda f: f, partial, lambda f: poutine.scale(f, 1.0)])
def test_evaluation_mode_meanwhile_and_restored(wrap):
    module, x = Dropping(), torch.randn(4)
    module.train()
    module.frozen.eval()
    evidence = log_evidence(wrap(module.model), wrap(module.guide), x, num_particles=3)
    assert torch.allclose(evidence.log_evidence, normal_evidence(x))  # no dropout
    assert module.training
    assert module.dropout.training
    assert not module.frozen.training


def test_modes_are_restored_after_an_error():
    module = Dropping()
    with pytest.raises(GraphflowsError, match="among the vectorised plates"):
        log_evidence(module.model, module.guide, torch.randn(4), data_plate="nothing")
    assert module.training


def test_no_gradients_are_recorded():
    scale = torch.tensor(1.0, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    evidence = log_evidence(model, normal_posterior, torch.randn(2), num_particles=20)
    assert not any(value.requires_grad for value in evidence)


@pytest.mark.parametrize("make", [AutoNormal, AutoNormalMessenger])
def test_pyros_guides(make):
    x = torch.randn(3)
    guide = make(normal_model)
    guide(x)
    evidence = log_evidence(normal_model, guide, x, num_particles=4000)
    # AutoNormal starts as N(0, 0.1): far too narrow, and k-hat says so
    assert evidence.log_evidence.shape == (3,)
    assert bool((evidence.khat > 0.7).all())


def test_discrete_latents_are_exact_with_the_exact_posterior():
    def model(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * b, 1.0), obs=x)

    def guide(x):
        one = 0.3 * dist.Normal(2.0, 1.0).log_prob(x).exp()
        zero = 0.7 * dist.Normal(0.0, 1.0).log_prob(x).exp()
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(one / (one + zero)))

    x = torch.randn(6)
    exact = torch.logaddexp(
        math.log(0.3) + dist.Normal(2.0, 1.0).log_prob(x), math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(x)
    )
    assert torch.allclose(log_evidence(model, guide, x, num_particles=8).log_evidence, exact)


def test_float32_stays_float32():
    x = torch.randn(3, dtype=torch.float32)
    torch.set_default_dtype(torch.float32)
    evidence = log_evidence(normal_model, normal_posterior, x, num_particles=8)
    assert evidence.log_evidence.dtype == torch.float32


def test_an_evidence_says_itself_in_a_line():
    evidence = evidence_from_log_weights(torch.randn(100, 3))
    assert repr(evidence).startswith(f"Evidence({evidence.log_evidence.sum():.6g} ± ")
    assert "nats for 3 data; ESS >= " in repr(evidence)
    assert "nats for all data together" in repr(evidence_from_log_weights(torch.randn(100)))


def test_a_model_that_mixes_particles_is_refused_before_it_takes_the_square_of_their_number():
    """Weights that meet locations along the dimension of the particles: refused after a few, and not after many."""
    sizes = []

    def model(x):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            components = dist.Normal(mu.unsqueeze(-2), 0.5)
            mixture = dist.MixtureSameFamily(dist.Categorical(w.unsqueeze(-2)), components)
            sizes.append(mixture.batch_shape.numel())
            pyro.sample("x", mixture, obs=x)

    def guide(x):
        pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(GraphflowsError):
        log_evidence(model, guide, torch.randn(4), num_particles=3000, data_plate=False)
    assert max(sizes) < 3000
