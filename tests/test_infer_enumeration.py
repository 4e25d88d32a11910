import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import normal_evidence, normal_posterior
from pyro import poutine

from pyro_graphflows.infer.evidence import log_evidence


class TestEnumeration:
    """Discrete sites that the model enumerates: z ~ N(0, 1), x ~ N(z, 1); k ~ Categorical, y ~ N(mu_k, 1)."""

    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)

    def model(self, x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            k = pyro.sample("k", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(self.means[k], 1.0), obs=y)

    def exact(self, x, y):
        mixture = torch.logsumexp(self.weights.log() + dist.Normal(self.means, 1.0).log_prob(y[:, None]), -1)
        return normal_evidence(x) + mixture

    @pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"vectorize": False}])
    def test_summed_out_exactly(self, options):
        x, y = torch.randn(4), torch.randn(4)
        evidence = log_evidence(
            self.model, lambda x, y: normal_posterior(x), x, y, num_particles=5, **options
        )
        assert torch.allclose(evidence.log_evidence, self.exact(x, y), atol=1e-10)
        assert evidence.standard_error.abs().max() < 1e-10
        one = log_evidence(
            self.model, lambda x, y: normal_posterior(x), x[:1], y[:1], num_particles=5, **options
        )
        assert torch.allclose(one.log_evidence, self.exact(x, y)[:1], atol=1e-10)

    def test_the_whole_data_set(self):
        x, y = torch.randn(4), torch.randn(4)
        evidence = log_evidence(
            self.model, lambda x, y: normal_posterior(x), x, y, num_particles=5, data_plate=False
        )
        assert torch.allclose(evidence.log_evidence, self.exact(x, y).sum(), atol=1e-10)

    def test_latents_that_depend_on_enumerated_ones(self):
        """z ~ N(mu_k, 1): the guide proposes z without k; the weights are those of the mixture prior."""

        def model(x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
                z = pyro.sample("z", dist.Normal(self.means[k], 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x + 0.5) / 2, 1.2))

        x = torch.randn(50)
        exact = torch.logsumexp(self.weights.log() + dist.Normal(self.means, 2**0.5).log_prob(x[:, None]), -1)
        evidence = log_evidence(model, guide, x, num_particles=4000)
        assert ((evidence.log_evidence - exact) / evidence.standard_error).abs().max() < 5

    def test_inner_plates_and_masks(self):
        """A mixture in an inner plate is summed out element by element, then multiplied over the plate."""

        def model(x, mask):
            with pyro.plate("data", x.shape[1], dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("first", dist.Normal(z, 1.0), obs=x[0])
                with pyro.plate("inner", len(x), dim=-2), poutine.mask(mask=mask):
                    k = pyro.sample("k", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
                    pyro.sample("x", dist.Normal(self.means[k], 1.0), obs=x)

        x = torch.randn(3, 4)
        mask = torch.tensor([[True], [False], [True]])
        mixture = torch.logsumexp(
            self.weights.log() + dist.Normal(self.means, 1.0).log_prob(x[..., None]), -1
        )
        exact = normal_evidence(x[0]) + mixture[0] + mixture[2]
        evidence = log_evidence(model, lambda x, mask: normal_posterior(x[0]), x, mask, num_particles=3)
        assert torch.allclose(evidence.log_evidence, exact, atol=1e-10)

    def test_a_marked_site_in_the_guide_is_sampled(self):
        def model(x):
            with pyro.plate("data", len(x)):
                b = pyro.sample("b", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(2 * b, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("b", dist.Bernoulli(0.5))

        x = torch.randn(3)
        exact = torch.logaddexp(
            math.log(0.3) + dist.Normal(2.0, 1.0).log_prob(x),
            math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(x),
        )
        evidence = log_evidence(model, guide, x, num_particles=20_000)
        assert ((evidence.log_evidence - exact) / evidence.standard_error).abs().max() < 4

        def nothing(x):
            pass

        alone = log_evidence(model, nothing, x, num_particles=3)
        assert torch.allclose(alone.log_evidence, exact)
