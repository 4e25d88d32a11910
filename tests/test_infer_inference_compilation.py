import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain, LinearGuide
from pyro import poutine
from pyro.infer import CSIS
from pyro.nn import PyroModule, PyroParam

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.simulations import sample_joint


def normal(x=None, num_data=1):
    with pyro.plate("data", num_data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def conditional_entropy(variance):
    return 0.5 * math.log(2 * math.pi * math.e * variance)


def expected_loss(slope, shift, scale):
    """E_{p(z,x)}[-log N(z; slope x + shift, scale)] in the model `normal`, by hand."""
    error = (1 - slope) ** 2 + slope**2 + shift**2  # E (z - slope x - shift)^2 with x = z + noise
    return 0.5 * math.log(2 * math.pi) + math.log(scale) + error / 2 / scale**2


class TestLoss:
    def test_exact_posterior_gives_the_conditional_entropy(self):
        chain = Chain(num_data=3)
        compilation = InferenceCompilation(chain.model, chain.guide, batch_size=50_000)
        log_probs = compilation.log_probs(c=chain.c)
        assert log_probs.shape == (50_000,)
        # entropy of (w, z) given x and c, for each of the three data
        covariance = torch.tensor([[1.0, 0.8], [0.8, 0.64 + 0.49]])
        posterior = torch.linalg.inv(
            torch.linalg.inv(covariance) + torch.tensor([[0.0, 0.0], [0.0, 2.25 / 0.25]])
        )
        entropy = 3 * dist.MultivariateNormal(torch.zeros(2), posterior).entropy()
        standard_error = log_probs.std() / math.sqrt(50_000)
        assert abs(-log_probs.mean() - entropy) < 5 * standard_error

    def test_value_and_gradient_against_the_exact_ones(self):
        guide = LinearGuide()
        compilation = InferenceCompilation(normal, guide, batch_size=200_000)
        loss = compilation.differentiable_loss()
        loss.backward()
        parameters = torch.tensor([0.3, 0.1, -0.2], requires_grad=True)
        slope, shift, log_scale = parameters
        variance = torch.exp(2 * log_scale)
        error = (1 - slope) ** 2 + slope**2 + shift**2
        exact = 0.5 * math.log(2 * math.pi) + log_scale + error / 2 / variance
        exact.backward()
        assert exact.item() == pytest.approx(expected_loss(0.3, 0.1, math.exp(-0.2)))
        assert loss.item() == pytest.approx(exact.item(), abs=0.02)
        gradient = torch.stack([guide.slope.grad, guide.shift.grad, guide.log_scale.grad])
        assert torch.allclose(gradient, parameters.grad, atol=0.03)

    def test_loss_is_per_joint_sample(self):
        compilation = InferenceCompilation(normal, LinearGuide(), batch_size=4000)
        with torch.no_grad():
            one, ten = compilation.log_probs(num_data=1), compilation.log_probs(num_data=10)
        error = math.sqrt(one.var() * 100 / 4000 + ten.var() / 4000)
        assert abs(10 * one.mean() - ten.mean()) < 5 * error

    def test_vectorised_equals_one_by_one_and_csis(self):
        """The same joint samples scored in a plate, in a loop and by Pyro's CSIS."""
        guide = LinearGuide()
        joint = [sample_joint(normal, (), {"x": torch.zeros(2), "num_data": 2}) for _ in range(4)]
        csis = CSIS(normal, guide, None, training_batch_size=4)
        expected = -torch.stack(
            [
                csis._get_matched_trace(trace, num_data=2).log_prob_sum()  # sets is_observed on the trace
                for trace in joint
            ]
        )
        loop = InferenceCompilation(normal, guide, batch_size=4, vectorize=False)
        loop.loss(num_data=2)
        for trace in joint:
            trace.nodes["x"]["is_observed"] = False
        assert torch.allclose(-loop._score(tuple(joint), (), {"num_data": 2}), expected)

        stacked = poutine.trace(
            poutine.condition(
                pyro.plate("num_particles_vectorized", 4, dim=-2)(normal),
                {site: torch.stack([trace.nodes[site]["value"] for trace in joint]) for site in ("z", "x")},
            )
        ).get_trace(num_data=2)
        for site in ("z", "x"):
            stacked.nodes[site]["is_observed"] = False
        batch = InferenceCompilation(normal, guide, batch_size=4)
        batch.loss(num_data=2)
        assert torch.allclose(-batch._score((stacked,), (), {"num_data": 2}), expected)

    def test_validation_batch_is_kept(self):
        guide = LinearGuide()
        compilation = InferenceCompilation(normal, guide, batch_size=50)
        first = compilation.validation_loss()
        assert compilation.validation_loss() == first
        assert compilation.loss() != compilation.loss()
        compilation.set_validation_batch()
        assert compilation.validation_loss() != first

    def test_subsampled_plates_count_all_their_elements(self):
        def model(x=None):
            with pyro.plate("data", 12, subsample_size=3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x=None, observations=None):
            with pyro.plate("data", 12, subsample_size=3):
                pyro.sample("z", dist.Normal(observations["x"] / 2, 0.5**0.5))

        loss = InferenceCompilation(model, guide, batch_size=20_000).loss()
        assert loss == pytest.approx(12 * conditional_entropy(0.5), abs=0.2)


class TestSteps:
    def train(self, compilation, steps, **kwargs):
        return [compilation.step(**kwargs) for _ in range(steps)]

    def check(self, guide):
        assert guide.slope.item() == pytest.approx(0.5, abs=0.05)
        assert guide.shift.item() == pytest.approx(0.0, abs=0.05)
        assert guide.log_scale.exp().item() == pytest.approx(0.5**0.5, abs=0.05)

    def test_with_a_pyro_optimiser(self):
        guide = LinearGuide()
        compilation = InferenceCompilation(
            normal, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.97}), batch_size=1000
        )
        losses = self.train(compilation, 150)
        self.check(guide)
        assert losses[-1] == pytest.approx(conditional_entropy(0.5), abs=0.15)

    def test_with_a_torch_optimiser(self):
        guide = LinearGuide()
        optim = torch.optim.Adam(guide.parameters(), lr=0.03)
        self.train(InferenceCompilation(normal, guide, optim, batch_size=1000), 200)
        self.check(guide)

    @pytest.mark.parametrize("local", [False, True])
    def test_with_a_pyro_module(self, local):
        class Guide(PyroModule):
            def __init__(self):
                super().__init__()
                self.slope = torch.nn.Parameter(torch.tensor(0.0))
                self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

            def forward(self, observations=None):
                x = observations["x"]
                with pyro.plate("data", 1):
                    pyro.sample("z", dist.Normal(self.slope * x, self.scale))

        with pyro.settings.context(module_local_params=local):
            guide = Guide()
            compilation = InferenceCompilation(normal, guide, pyro.optim.Adam({"lr": 0.05}), batch_size=500)
            self.train_module(compilation)
            assert guide.slope.item() == pytest.approx(0.5, abs=0.1)
            assert guide.scale.item() == pytest.approx(0.5**0.5, abs=0.1)

    def train_module(self, compilation):
        compilation.guide = lambda num_data=1, observations=None, guide=compilation.guide: guide(observations)
        self.train(compilation, 100)

    def test_the_models_parameters_are_left_alone(self):
        def model(x=None):
            scale = pyro.param("scale", torch.tensor(1.0))
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x=None, observations=None):
            shift = pyro.param("shift", torch.tensor(0.3))
            pyro.sample("z", dist.Normal(observations["x"] / 2 + shift, 1.0))

        compilation = InferenceCompilation(model, guide, pyro.optim.Adam({"lr": 0.1}))
        self.train(compilation, 3)
        assert pyro.param("scale").item() == 1.0
        assert pyro.param("shift").item() != 0.3

    def test_discrete_latents(self):
        """p(b = 1 | x) of a mixture: the compiled logistic regression finds the exact coefficients."""

        def model(x=None):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * b, 1.0), obs=x)

        def guide(x=None, observations=None):
            weights = pyro.param("weights", torch.zeros(2))
            logits = weights[0] + weights[1] * observations["x"]
            pyro.sample("b", dist.Bernoulli(logits=logits))

        compilation = InferenceCompilation(
            model, guide, pyro.optim.ClippedAdam({"lr": 0.2, "lrd": 0.98}), batch_size=2000
        )
        self.train(compilation, 200)
        exact = torch.tensor([math.log(0.3 / 0.7) - 2, 2.0])
        assert torch.allclose(pyro.param("weights"), exact, atol=0.12)

    def test_a_step_needs_an_optimiser(self):
        with pytest.raises(GraphflowsError, match=r"InferenceCompilation\(\.\.\., optim=\.\.\.\)"):
            InferenceCompilation(normal, LinearGuide()).step()

    def test_batch_size_must_be_positive(self):
        with pytest.raises(GraphflowsError, match="positive batch_size; got 0"):
            InferenceCompilation(normal, LinearGuide(), batch_size=0)
