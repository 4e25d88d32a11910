"""The exact bound and its exact gradient are known for two particles of one-dimensional latents: by quadrature."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain, Hierarchy, LinearGuide, normal_evidence, normal_model, normal_posterior
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from torch import nn

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer.iwae import IWAE_ELBO
from pyro_graphflows.infer.training import fit

GRADIENTS = ["plain", "dreg", "stl"]


def hermite(num):
    """Nodes and weights of an expectation over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    return torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())


class TestExactPosterior:
    """Every weight is p(x): the bound is log p(x) for each number of particles, and all gradients vanish."""

    @pytest.mark.parametrize("num_particles", [1, 2, 7])
    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_local_latents(self, num_particles, gradient):
        chain = Chain()
        loss = IWAE_ELBO(num_particles, gradient=gradient)
        exact = -chain.log_evidence().sum().item()
        assert loss.loss(chain.model, chain.guide, *chain.args) == pytest.approx(exact, abs=1e-9)
        assert loss.differentiable_loss(chain.model, chain.guide, *chain.args).item() == pytest.approx(
            exact, abs=1e-9
        )

    @pytest.mark.parametrize("outer", [1, 3])
    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_global_and_local_latents(self, outer, gradient):
        hierarchy = Hierarchy()
        loss = IWAE_ELBO(5, num_outer_particles=outer, gradient=gradient)
        value = loss.differentiable_loss(hierarchy.model, hierarchy.guide, hierarchy.x).item()
        assert value == pytest.approx(-hierarchy.log_evidence().item(), abs=1e-9)

    def test_the_whole_data_set_at_once(self):
        hierarchy = Hierarchy()
        loss = IWAE_ELBO(5, data_plate=False)
        value = loss.loss(hierarchy.model, hierarchy.guide, hierarchy.x)
        assert value == pytest.approx(-hierarchy.log_evidence().item(), abs=1e-9)

    @pytest.mark.parametrize("gradient", ["dreg", "stl"])
    def test_the_path_gradient_is_zero_without_variance(self, gradient):
        guide = LinearGuide(slope=0.5, shift=0.0, log_scale=-0.5 * math.log(2.0))
        IWAE_ELBO(4, gradient=gradient).loss_and_grads(normal_model, guide, torch.randn(50))
        gradients = [parameter.grad.item() for parameter in guide.parameters()]
        assert gradients == pytest.approx([0.0] * 3, abs=1e-9)

    def test_plain_gradient_is_zero_in_the_mean_only(self):
        guide = LinearGuide(slope=0.5, shift=0.0, log_scale=-0.5 * math.log(2.0))
        IWAE_ELBO(4).loss_and_grads(normal_model, guide, torch.zeros(10_000))
        per_datum = guide.shift.grad.item() / 10_000
        assert 0 < abs(per_datum) < 5 / math.sqrt(10_000)

    def test_inner_plates_and_nested_data(self):
        """A plate within a datum is part of its weight; the plates around the data plate hold data as well."""

        def model(x, guide=False):
            with pyro.plate("groups", 3, dim=-2):
                precision = 1 + x.shape[-1] / 2
                mean = x.sum(-1, keepdim=True) / 2 / precision
                g = pyro.sample("g", dist.Normal(mean, precision**-0.5) if guide else dist.Normal(0.0, 1.0))
                with pyro.plate("items", x.shape[-1], dim=-1):
                    z = pyro.sample("z", dist.Normal((x + g) / 2, 0.5**0.5) if guide else dist.Normal(g, 1.0))
                    if not guide:
                        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = torch.randn(3, 4)
        covariance = torch.ones(4, 4) + 2 * torch.eye(4)
        exact = -dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x).sum().item()
        for plate in (None, "groups", "items", False):
            loss = IWAE_ELBO(3, data_plate=plate)
            assert loss.loss(model, partial(model, guide=True), x) == pytest.approx(exact, abs=1e-9)
        # a guide that is the prior: weights per group are better than weights of the whole
        prior = poutine.block(model, hide=["x"])
        many = partial(IWAE_ELBO, 20, num_outer_particles=300)
        losses = {plate: many(data_plate=plate).loss(model, prior, x) for plate in ("groups", False)}
        assert exact < losses["groups"] < losses[False]


class TestBound:
    x = 0.7

    def exact_bound(self, parameters, x, num=40):
        """E log mean of two weights in `normal_model` under N(slope x + shift, exp(log_scale)), by quadrature."""
        slope, shift, log_scale = parameters
        nodes, weights = hermite(num)
        z = slope * x + shift + log_scale.exp() * nodes
        log_w = (
            dist.Normal(0.0, 1.0).log_prob(z)
            + dist.Normal(z, 1.0).log_prob(torch.as_tensor(x))
            - dist.Normal(slope * x + shift, log_scale.exp()).log_prob(z)
        )
        both = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
        return (weights[:, None] * weights * both).sum()

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_value_and_gradient_against_quadrature(self, gradient):
        num_data = 100_000
        guide = LinearGuide()
        loss = IWAE_ELBO(2, gradient=gradient).differentiable_loss(
            normal_model, guide, torch.full((num_data,), self.x)
        )
        loss.backward()
        parameters = torch.tensor([0.3, 0.1, -0.2], requires_grad=True)
        exact = self.exact_bound(parameters, self.x)
        exact.backward()
        assert -loss.item() / num_data == pytest.approx(exact.item(), abs=0.005)
        found = -torch.stack([guide.slope.grad, guide.shift.grad, guide.log_scale.grad]) / num_data
        if gradient == "stl":  # biased for two particles, as documented
            assert not torch.allclose(found, parameters.grad, atol=0.02)
        else:
            assert torch.allclose(found, parameters.grad, atol=0.006)

    def test_stl_is_unbiased_for_one_particle_and_equals_dreg(self):
        found = {}
        for gradient in GRADIENTS:
            pyro.set_rng_seed(0)
            guide = LinearGuide()
            IWAE_ELBO(1, gradient=gradient).loss_and_grads(
                normal_model, guide, torch.full((100_000,), self.x)
            )
            found[gradient] = torch.stack([parameter.grad for parameter in guide.parameters()]) / 100_000
        assert torch.allclose(found["stl"], found["dreg"])
        assert torch.allclose(found["stl"], found["plain"], atol=0.02)

    def test_one_particle_is_the_elbo_and_pyros_renyi_agrees_without_globals(self):
        x = torch.randn(20_000)
        guide = LinearGuide()
        elbo = Trace_ELBO().loss(normal_model, guide, x) / 20_000
        assert IWAE_ELBO(1).loss(normal_model, guide, x) / 20_000 == pytest.approx(elbo, abs=0.05)
        renyi = RenyiELBO(num_particles=5, vectorize_particles=True).loss(normal_model, guide, x) / 20_000
        assert IWAE_ELBO(5).loss(normal_model, guide, x) / 20_000 == pytest.approx(renyi, abs=0.03)

    def test_more_particles_are_better(self):
        x = torch.full((5000,), 2.0)
        guide = LinearGuide(slope=0.1)
        losses = [IWAE_ELBO(num).loss(normal_model, guide, x) / 5000 for num in (1, 3, 10, 100)]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] > -normal_evidence(x)[0].item() - 0.005
        assert losses[-1] == pytest.approx(-normal_evidence(x)[0].item(), abs=0.03)


class TestStructuredGuides:
    """z -> w in the guide: the second factor's location depends on the first one's value and on parameters."""

    class Guide(nn.Module):
        def __init__(self, chain):
            super().__init__()
            self.plate = chain.plate
            self.a = nn.Parameter(torch.tensor(0.5))
            self.b = nn.Parameter(torch.tensor(0.9))

        def forward(self, x, c, detach=False):
            pyro.module("guide", self)
            with pyro.plate(self.plate, len(x)):
                z = pyro.sample("z", dist.Normal(self.a * x, 0.4))
                pyro.sample("w", dist.Normal(self.b * z - 0.3, 0.8))

    def gradient(self, gradient, num_particles=3, num_data=60_000):
        pyro.set_rng_seed(1)
        pyro.clear_param_store()
        chain = Chain(num_data=num_data)
        chain.x, chain.c = torch.full((num_data,), 1.1), torch.full((num_data,), 0.2)
        guide = self.Guide(chain)
        IWAE_ELBO(num_particles, gradient=gradient).loss_and_grads(chain.model, guide, *chain.args)
        return torch.stack([guide.a.grad, guide.b.grad]) / num_data

    def test_dreg_is_unbiased(self):
        plain, dreg, stl = (self.gradient(gradient) for gradient in GRADIENTS)
        # the plain estimate has a standard deviation of about 3 per datum: 0.012 here
        assert torch.allclose(plain, dreg, atol=0.05)
        assert (stl - dreg).abs().max() > 0.2

    def test_dreg_has_less_variance_with_many_particles(self):
        spread = {}
        for gradient in ("plain", "dreg"):
            guide = LinearGuide(slope=0.45)
            loss = IWAE_ELBO(64, gradient=gradient)
            draws = []
            for _ in range(200):
                guide.zero_grad()
                loss.loss_and_grads(normal_model, guide, torch.ones(1))
                draws.append(guide.shift.grad.item())
            spread[gradient] = torch.tensor(draws).std()
        assert spread["dreg"] < 0.5 * spread["plain"]

    def test_parameters_shared_by_model_and_guide_have_both_roles(self):
        """w in the model's density, w^2 on the guide's paths, for one parameter in both locations."""

        def model(x):
            loc = pyro.param("loc", torch.tensor(0.4))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.4)) + 0.3 * x, 0.9))

        found = {}
        for gradient in ("plain", "dreg"):
            pyro.clear_param_store()
            IWAE_ELBO(2, gradient=gradient).loss_and_grads(model, guide, torch.full((100_000,), 0.7))
            found[gradient] = pyro.param("loc").grad.item() / 100_000
        nodes, weights = hermite(40)
        loc = torch.tensor(0.4, requires_grad=True)
        z = loc + 0.21 + 0.9 * nodes
        log_w = (
            dist.Normal(loc, 1.0).log_prob(z)
            + dist.Normal(z, 1.0).log_prob(torch.tensor(0.7))
            - dist.Normal(loc + 0.21, 0.9).log_prob(z)
        )
        (
            -(weights[:, None] * weights * (torch.logaddexp(log_w[:, None], log_w) - math.log(2))).sum()
        ).backward()
        assert found["plain"] == pytest.approx(loc.grad.item(), abs=0.01)
        assert found["dreg"] == pytest.approx(loc.grad.item(), abs=0.01)


class TestGlobalLatents:
    """u ~ N(0, 1); z_n ~ N(u, 1), x_n ~ N(z_n, 1): two data, two particles, the whole bound by quadrature."""

    x = torch.tensor([-2.0, 2.0])

    @staticmethod
    def model(x):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(u, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @staticmethod
    def guide(x):
        m, s, b, c = pyro.param("phi", torch.tensor([0.3, -0.4, 0.35, -0.1]))
        u = pyro.sample("u", dist.Normal(m, s.exp()))
        with pyro.plate("data", 2, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(b * u + 0.6 * x, c.exp()))

    def exact(self, phi, x):
        m, s, b, c = phi
        nodes, weights = hermite(30)
        u = m + s.exp() * nodes
        total = dist.Normal(0.0, 1.0).log_prob(u) - dist.Normal(m, s.exp()).log_prob(u)
        for value in x:
            loc = (b * u + 0.6 * value)[:, None]
            z = loc + c.exp() * nodes
            log_w = (
                dist.Normal(u[:, None], 1.0).log_prob(z)
                + dist.Normal(z, 1.0).log_prob(value)
                - dist.Normal(loc, c.exp()).log_prob(z)
            )
            pair = torch.logaddexp(log_w[:, :, None], log_w[:, None, :]) - math.log(2)
            total = total + (weights[:, None] * weights * pair).sum((1, 2))
        return (weights * total).sum()

    @pytest.mark.parametrize("gradient", ["plain", "dreg"])
    def test_nested_bound_and_gradient_against_quadrature(self, gradient):
        loss = IWAE_ELBO(2, num_outer_particles=200_000, gradient=gradient)
        value = loss.differentiable_loss(self.model, self.guide, self.x)
        value.backward()
        phi = torch.tensor([0.3, -0.4, 0.35, -0.1], requires_grad=True)
        exact = -self.exact(phi, self.x)
        exact.backward()
        assert value.item() == pytest.approx(exact.item(), abs=0.02)
        assert torch.allclose(pyro.param("phi").grad, phi.grad, atol=0.04)
        evidence = dist.MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + 2 * torch.eye(2)).log_prob(
            self.x
        )
        assert exact > -evidence

    def test_subsampling_is_unbiased(self):
        """The mean over both batches of one, scaled by two outside the logarithm, is the bound on both data."""
        loss = IWAE_ELBO(2, num_outer_particles=100_000)
        halves = [loss.loss(self.model, self.guide, self.x[index : index + 1]) for index in (0, 1)]
        exact = -self.exact(torch.tensor([0.3, -0.4, 0.35, -0.1]), self.x)
        assert sum(halves) / 2 == pytest.approx(exact.item(), abs=0.05)

    def test_what_is_no_bound(self):
        """q = prior, x = (-2, 2), data directly on u. Weights per datum with u of their own exceed log p(x)
        by 1.86 nats; the nested bound does not.
        """

        def model(x):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(u, 1.0), obs=x)

        def guide(x):
            pyro.sample("u", dist.Normal(0.0, 1.0))

        exact = dist.MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + torch.eye(2)).log_prob(self.x)
        u = torch.randn(200_000)
        per_datum = torch.logsumexp(dist.Normal(u[:, None], 1.0).log_prob(self.x), 0) - math.log(200_000)
        assert (per_datum.sum() - exact).item() == pytest.approx(1.86, abs=0.03)
        nested = -IWAE_ELBO(50, num_outer_particles=2000).loss(model, guide, self.x)
        assert nested < exact.item() - 0.3  # the ELBO in u: there is no local latent to average over
        joint = -IWAE_ELBO(20_000, data_plate=False).loss(model, guide, self.x)
        assert joint == pytest.approx(exact.item(), abs=0.1)

    def test_locals_before_globals_are_refused(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x / 2, 1.0))
            pyro.sample("u", dist.Normal(z.mean(-1, keepdim=True), 0.5))

        with pytest.raises(UnsupportedModelError, match="'u' is outside the data plate 'data' and depends"):
            IWAE_ELBO(3).loss(self.model, guide, self.x)


class TestSubsampling:
    def test_the_scale_stands_outside_the_logarithm(self):
        """Pyro's RenyiELBO puts it inside: biased. Ours is the mean over batches of the full bound, here exact."""
        x = torch.tensor([0.5, -1.0, 2.0, 0.1])

        def model(x, index):
            with pyro.plate("data", 4, subsample=index):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        def guide(x, index):
            with pyro.plate("data", 4, subsample=index):
                pyro.sample("z", dist.Normal(x[index] / 2, 0.5**0.5))

        losses = [IWAE_ELBO(6).loss(model, guide, x, torch.tensor([n])) for n in range(4)]
        assert losses == pytest.approx((-4 * normal_evidence(x)).tolist())

        def prior(x, index):
            with pyro.plate("data", 4, subsample=index):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        many = IWAE_ELBO(2, num_outer_particles=5000)  # without globals: independent repetitions
        ours = sum(many.loss(model, prior, x, torch.tensor([n])) for n in range(4)) / 4
        full = many.loss(model, prior, x, torch.arange(4))
        assert ours == pytest.approx(full, abs=0.15)
        renyi = RenyiELBO(num_particles=2, vectorize_particles=True)
        pyros = sum(renyi.loss(model, prior, x, torch.tensor([n % 4])) for n in range(1200)) / 1200
        assert pyros < full - 0.4  # "better" than the bound it claims to be

    def test_subsampling_within_a_datum_is_refused(self):
        def model(x, guide=False):
            with pyro.plate("data", x.shape[1], dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with pyro.plate("inner", 10, subsample_size=x.shape[0], dim=-2):
                    if not guide:
                        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(UnsupportedModelError, match="a plate subsampled within a datum"):
            IWAE_ELBO(3, data_plate="data").loss(model, partial(model, guide=True), torch.randn(2, 3))

    def test_a_scale_on_everything_scales_the_bound(self):
        x = torch.randn(5)
        scaled = partial(poutine.scale, scale=0.1)
        loss = IWAE_ELBO(3).loss(scaled(normal_model), scaled(normal_posterior), x)
        assert loss == pytest.approx(-0.1 * normal_evidence(x).sum().item())


class TestDiscreteLatents:
    """b ~ Bernoulli(0.3), z | b ~ N(2 b, 1), x ~ N(z, 1): a discrete site before a reparametrised one."""

    @staticmethod
    def model(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(2 * b, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @staticmethod
    def guide(x):
        logit, shift = pyro.param("phi", torch.tensor([-0.2, 0.1]))
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(logits=logit + 0.5 * x))
            pyro.sample("z", dist.Normal(x / 2 + b * shift + 0.2, 0.8))

    def exact(self, phi, x):
        """Enumerate both particles' b, integrate both particles' z."""
        nodes, weights = hermite(40)
        logit, shift = phi
        prior = dist.Bernoulli(0.3)
        q = dist.Bernoulli(logits=logit + 0.5 * x)
        log_w = []
        for b in (0.0, 1.0):
            value = torch.tensor(b)
            loc = x / 2 + b * shift + 0.2
            z = loc + 0.8 * nodes
            log_w.append(
                prior.log_prob(value)
                + dist.Normal(2 * b, 1.0).log_prob(z)
                + dist.Normal(z, 1.0).log_prob(x)
                - q.log_prob(value)
                - dist.Normal(loc, 0.8).log_prob(z)
            )
        total = 0.0
        for i in range(2):
            for j in range(2):
                pair = torch.logaddexp(log_w[i][:, None], log_w[j]) - math.log(2)
                probability = (q.log_prob(torch.tensor(float(i))) + q.log_prob(torch.tensor(float(j)))).exp()
                total = total + probability * (weights[:, None] * weights * pair).sum()
        return total

    def test_score_function_gradient_against_enumeration(self):
        x = torch.tensor(0.9)
        IWAE_ELBO(2).loss_and_grads(self.model, self.guide, x.expand(200_000))
        phi = torch.tensor([-0.2, 0.1], requires_grad=True)
        (-self.exact(phi, x)).backward()
        assert torch.allclose(pyro.param("phi").grad / 200_000, phi.grad, atol=0.01)

    def test_one_particle(self):
        """No baseline is left, but the gradient is still that of the ELBO."""
        IWAE_ELBO(1).loss_and_grads(self.model, self.guide, torch.full((200_000,), 0.9))
        ours = pyro.param("phi").grad / 200_000
        pyro.clear_param_store()
        Trace_ELBO().loss_and_grads(self.model, self.guide, torch.full((200_000,), 0.9))
        assert torch.allclose(ours, pyro.param("phi").grad / 200_000, atol=0.03)

    def test_impossible_particles_leave_the_gradient_finite(self):
        def model(x):
            with pyro.plate("data", len(x)):
                b = pyro.sample("b", dist.Bernoulli(0.5))
                pyro.factor("only ones", torch.where(b == 1, 0.0, -math.inf))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("b", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(2.5))))

        IWAE_ELBO(8).loss_and_grads(model, guide, torch.zeros(50))
        assert pyro.param("logit").grad.isfinite()

    @pytest.mark.parametrize("gradient", ["dreg", "stl"])
    def test_path_gradients_are_refused(self, gradient):
        with pytest.raises(UnsupportedModelError, match=r"sites \['b'\] are not reparametrised"):
            IWAE_ELBO(2, gradient=gradient).differentiable_loss(self.model, self.guide, torch.zeros(3))

    def test_discrete_globals_are_refused(self):
        def model(x, guide=False):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            with pyro.plate("data", len(x)):
                if not guide:
                    pyro.sample("x", dist.Normal(b, 1.0), obs=x)

        with pytest.raises(UnsupportedModelError, match="outside, use Trace_ELBO"):
            IWAE_ELBO(2).loss(model, partial(model, guide=True), torch.zeros(3))


class TestInterfaces:
    x = 2**0.5 * torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def check(self, guide):
        assert guide.slope.item() == pytest.approx(0.5, abs=0.08)
        assert guide.shift.item() == pytest.approx(0.0, abs=0.08)

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_svi(self, gradient):
        guide = LinearGuide()
        svi = SVI(normal_model, guide, pyro.optim.Adam({"lr": 0.03}), IWAE_ELBO(4, gradient=gradient))
        for _ in range(100):
            svi.step(self.x)
        self.check(guide)
        assert svi.evaluate_loss(self.x) / 300 == pytest.approx(
            -normal_evidence(self.x).mean().item(), abs=0.05
        )

    def test_torch_optimisers_and_fit(self):
        guide = LinearGuide()
        loss = IWAE_ELBO(4, gradient="dreg")(lambda_module(normal_model), guide)
        optim = torch.optim.Adam(loss.parameters(), lr=0.03)
        for _ in range(100):
            optim.zero_grad()
            loss(self.x).backward()
            optim.step()
        self.check(guide)
        pyro.clear_param_store()
        guide = LinearGuide()
        fit(
            normal_model,
            guide,
            self.x,
            loss=IWAE_ELBO(4, gradient="dreg"),
            optimizer=0.03,
            schedule=40,
            progress=False,
        )
        self.check(guide)

    def test_pyros_guides(self):
        x = self.x[:3]
        for make in (AutoNormal, AutoNormalMessenger):
            guide = make(normal_model)
            guide(x)
            assert math.isfinite(IWAE_ELBO(3).loss(normal_model, guide, x))
        with pytest.raises(UnsupportedModelError, match="which Pyro's effect-based guides cannot"):
            IWAE_ELBO(3, gradient="dreg").differentiable_loss(normal_model, guide, x)

    def test_the_random_generators_are_not_moved_by_the_first_look(self):
        x, loss = self.x[:4], IWAE_ELBO(2)
        pyro.set_rng_seed(3)
        first = loss.loss(normal_model, LinearGuide(), x)
        guide = LinearGuide()
        pyro.set_rng_seed(3)
        assert loss.loss(normal_model, guide, x) == first
        pyro.set_rng_seed(3)
        assert loss.loss(normal_model, guide, x) == first  # found before: not looked for again

    def test_batches_of_changing_size(self):
        loss = IWAE_ELBO(3)
        for size in (5, 2, 9):
            value = loss.loss(normal_model, normal_posterior, self.x[:size])
            assert value == pytest.approx(-normal_evidence(self.x[:size]).sum().item())

    def test_float32(self):
        torch.set_default_dtype(torch.float32)
        guide = LinearGuide()
        for gradient in GRADIENTS:
            loss = IWAE_ELBO(3, gradient=gradient).differentiable_loss(normal_model, guide, self.x.float())
            assert loss.dtype == torch.float32

    def test_vector_sites_and_masks(self):
        """Event dimensions in the leaves' weights, and masked data, which must not count."""

        class Guide(nn.Module):
            def __init__(self):
                super().__init__()
                self.shift = nn.Parameter(torch.tensor([0.2, -0.3]))

            def forward(self, x, mask):
                with pyro.plate("data", len(x)), poutine.mask(mask=mask):
                    pyro.sample("z", dist.Normal(x / 2 + self.shift, 0.9).to_event(1))

        def model(x, mask):
            with pyro.plate("data", len(x)), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        found = []
        mask = torch.arange(40_000) % 2 == 0
        for gradient in ("plain", "dreg"):
            guide = Guide()
            x = torch.full((40_000, 2), 0.4)
            x[~mask] = 1e4
            IWAE_ELBO(3, gradient=gradient).differentiable_loss(model, guide, x, mask).backward()
            found.append(guide.shift.grad / 20_000)
        assert torch.allclose(*found, atol=0.05)
        # the exact gradient of the ELBO would be 2 shift; that of the bound is smaller and has its sign
        assert bool((found[1].sign() == torch.tensor([1.0, -1.0])).all())


def lambda_module(function):
    class Module(nn.Module):
        def forward(self, *args):
            return function(*args)

    return Module()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "positive numbers of particles; got 0 and 1"),
        ({"num_outer_particles": 0}, "positive numbers of particles"),
        ({"gradient": "reinforce"}, "Expected gradient among"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(GraphflowsError, match=message):
        IWAE_ELBO(**options)


def test_missing_sites_and_shared_draws_are_refused():
    def nothing(x):
        pass

    def shared(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x, log_density=torch.zeros(len(x))))

    with pytest.raises(UnsupportedModelError, match=r"does not sample \['z'\]"):
        IWAE_ELBO(2).loss(normal_model, nothing, torch.zeros(2))
    with pytest.raises(UnsupportedModelError, match="all 2 particles share one value"):
        IWAE_ELBO(2).loss(normal_model, shared, torch.zeros(2))
    with pytest.raises(GraphflowsError, match="among the vectorised plates"):
        IWAE_ELBO(2, data_plate="rows").loss(normal_model, normal_posterior, torch.zeros(2))
