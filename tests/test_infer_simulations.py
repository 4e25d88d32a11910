import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import LinearGuide
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.simulations import joint_layout, run_guide, sample_joint


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


class TestJointSamples:
    def test_observed_in_the_call(self):
        """Values of observed sites are ignored but say which sites are observed (the CSIS convention)."""
        layout = joint_layout(normal, LinearGuide(), (), {"x": torch.zeros(3), "num_data": 3})
        assert layout.observed == ("x",)
        assert layout.max_plate_nesting == 1

    def test_observed_by_what_the_guide_does_not_sample(self):
        assert joint_layout(normal, LinearGuide(), (), {}).observed == ("x",)

    def test_observed_by_the_guides_graph(self):
        def model(x=None, y=None):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("nuisance", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        class Guide:
            model_graph = ModelGraph([("z", "x"), ("z", "nuisance")], ["x"])

            def __call__(self, observations=None):
                assert list(observations) == ["x"]
                pyro.sample("z", dist.Normal(observations["x"] / 2, 0.5**0.5))

        with pytest.warns(GraphflowsWarning, match=r"does not sample the latent sites \['nuisance'\]"):
            assert joint_layout(model, Guide(), (), {}).observed == ("x",)
        # the guide leaves out a latent site: it is fitted to the marginal posterior of the others
        with pytest.warns(GraphflowsWarning, match="marginal posterior of the others"):
            loss = InferenceCompilation(model, Guide(), batch_size=50_000).loss()
        assert loss == pytest.approx(conditional_entropy(0.5), abs=0.02)

    def test_observed_as_the_caller_says(self):
        assert joint_layout(normal, LinearGuide(), (), {}, observed=["x"]).observed == ("x",)
        with pytest.raises(GraphflowsError, match=r"observed sites among \['x', 'z'\]; got \['y'\]"):
            joint_layout(normal, LinearGuide(), (), {}, observed=["y"])

    def test_partially_observed_sites(self):
        """obs_mask makes x_observed (given) and x_unobserved (a latent); the deterministic x is not passed."""

        def model(x=None, mask=None):
            with pyro.plate("data", 2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=mask)

        seen = []

        def guide(x=None, mask=None, observations=None):
            seen.append(sorted(observations))
            value = torch.where(mask, observations["x_observed"], 0.0)
            with pyro.plate("data", 2):
                z = pyro.sample(
                    "z", dist.Normal(torch.where(mask, value / 2, 0.0), torch.where(mask, 0.5**0.5, 1.0))
                )
                with poutine.mask(mask=~mask):
                    pyro.sample("x_unobserved", dist.Normal(z, 1.0))

        mask = torch.tensor([True, False])
        loss = InferenceCompilation(model, guide, batch_size=50_000).loss(torch.zeros(2), mask)
        exact = conditional_entropy(0.5) + 2 * conditional_entropy(1.0)
        assert loss == pytest.approx(exact, abs=0.04)
        assert set(map(tuple, seen)) == {("x_observed",)}

    def test_nested_plates_and_vector_sites(self):
        shapes = {}

        def model(x=None):
            with pyro.plate("groups", 2, dim=-2):
                g = pyro.sample("g", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                with pyro.plate("items", 4, dim=-1):
                    pyro.sample("x", dist.Normal(g, 1.0).to_event(1), obs=x)

        def guide(x=None, observations=None):
            x = observations["x"]
            shapes["x"] = tuple(x.shape)
            with pyro.plate("groups", 2, dim=-2):
                mean = x.sum(-2, keepdim=True) / 5
                shapes["g"] = tuple(pyro.sample("g", dist.Normal(mean, 0.2**0.5).to_event(1)).shape)

        loss = InferenceCompilation(model, guide, batch_size=5000).loss()
        assert shapes == {"x": (5000, 2, 4, 3), "g": (5000, 2, 1, 3)}
        assert loss == pytest.approx(6 * conditional_entropy(0.2), abs=0.15)

    def test_factors_are_refused(self):
        def model(x=None):
            normal(x)
            pyro.factor("extra", torch.tensor(1.0))

        with pytest.raises(UnsupportedModelError, match=r"'extra' is a pyro\.factor"):
            InferenceCompilation(model, LinearGuide()).loss()

    def test_scaled_models_are_refused(self):
        with pytest.raises(UnsupportedModelError, match=r"scaled by poutine\.scale"):
            InferenceCompilation(poutine.scale(normal, 0.5), LinearGuide()).loss()

    def test_auxiliary_guide_sites_are_refused(self):
        x = torch.zeros(1)
        guide = AutoDiagonalNormal(normal)
        guide(x)

        def compiled(x=None, observations=None):
            guide(x)

        with pytest.raises(UnsupportedModelError, match="auxiliary"):
            InferenceCompilation(normal, compiled).loss(x)

    def test_guide_may_draw_its_own_latents(self):
        """replay=False keeps the observations and the subsampled indices of the joint sample, and draws the rest."""

        def model(x=None, observations=None):
            with pyro.plate("data", 50, subsample_size=2) as index:
                z = pyro.sample("z", dist.Normal(index.double(), 1e-3))
                if observations is None:
                    pyro.sample("x", dist.Normal(z, 1e-3), obs=x)

        joint = sample_joint(model, (), {})
        own = run_guide(model, joint, ["x"], (), {}, replay=False)
        replayed = run_guide(model, joint, ["x"], (), {})
        assert torch.equal(replayed.nodes["z"]["value"], joint.nodes["z"]["value"])
        assert not torch.equal(own.nodes["z"]["value"], joint.nodes["z"]["value"])
        assert torch.allclose(own.nodes["z"]["value"], joint.nodes["z"]["value"], atol=0.05)
