import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides import auto_faithful_guide, load_guide
from pyro_graphflows.guides.conditionals.embedding import linear_estimates
from pyro_graphflows.infer import InferenceCompilation, Simulations, fit

MIX = torch.linspace(-1.0, 1.0, 60, dtype=torch.float64).reshape(30, 2)


def wide(x):
    """Thirty columns, linear in two latents."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z @ MIX.T, 1.0).to_event(1), obs=x)


def product(x):
    """What counts is the product of two of twenty columns' means: no linear estimate sees it."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    sign = pyro.sample("sign", dist.Normal(0.0, 1.0))
    loc = torch.stack([z * sign, sign], -1).repeat_interleave(10, -1)
    pyro.sample("x", dist.Normal(loc, 0.3).to_event(1), obs=x)


def in_plate(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * MIX[:, 0], 1.0).to_event(1), obs=x)


def entropy():
    covariance = torch.linalg.inv(torch.eye(2) + MIX.T @ MIX)
    return dist.MultivariateNormal(torch.zeros(2), covariance).entropy().item()


class TestStart:
    @pytest.mark.parametrize("embedding", ["auto", nn.Linear(30, 4)])
    def test_linear_models_start_at_the_posterior(self, embedding):
        guide = auto_faithful_guide(wide, torch.zeros(30), embedding={"x": copy.deepcopy(embedding)})
        with torch.no_grad():
            log_q = InferenceCompilation(wide, guide, batch_size=4000).log_probs(torch.zeros(30))
        # 64 weights fitted to 10,000 joint samples cost 64 / 20,000 nats
        assert -log_q.mean().item() == pytest.approx(entropy(), abs=0.02 + 4 * log_q.std().item() / 4000**0.5)

    def test_only_the_embedding_is_read(self):
        guide = auto_faithful_guide(wide, torch.zeros(30), embedding={"x": "auto"}, num_start_samples=500)
        (block,) = guide.plan.blocks
        assert block.parents == {"z": ("embedding(x)",)}
        assert guide.inverse.parents["z"] == ("x",)

    def test_the_start_survives_training(self):
        guide = auto_faithful_guide(wide, torch.zeros(30), embedding={"x": "auto"}, num_start_samples=3000)
        compilation = InferenceCompilation(
            wide, guide, torch.optim.Adam(guide.parameters(), lr=1e-2), batch_size=500
        )
        losses = [compilation.step(torch.zeros(30)) for _ in range(40)]
        assert max(losses) < entropy() + 0.5


class TestEstimates:
    """Linear estimates, beside posteriors that are known."""

    def test_columns_may_be_nearly_as_many_as_samples(self):
        """The slopes of each column are found as well as if it were alone."""

        def model(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ slopes.T, 5.0).to_event(1), obs=x)

        slopes = torch.randn(200, 2)
        guide = auto_faithful_guide(
            *(model, torch.zeros(200)),
            embedding={"x": "linear"},
            family="normal",
            num_start_samples=400,
        )
        with torch.no_grad():
            log_q = InferenceCompilation(model, guide, batch_size=4000).log_probs(torch.zeros(200))
        precision = torch.eye(2) + slopes.T @ slopes / 25
        exact = dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision).entropy()
        error = 4 * log_q.std().item() / 4000**0.5
        # 400 slopes found from 400 samples cost .11 nats here, and the regression on all columns .25 to .32
        assert -log_q.mean().item() == pytest.approx(exact.item(), abs=0.15 + error)

    def test_noise_that_columns_share_is_seen(self):
        """All columns but one have the same noise, which only their differences tell from the latent."""
        slopes = torch.linspace(0.5, 1.5, 20)
        x, z = torch.randn(3000, 20), torch.randn(3000, 1)
        shared = 3 * torch.randn(3000, 1)
        columns = slopes * z + shared + 0.1 * x
        columns = (columns - columns.mean(0)) / columns.std(0)
        found = columns @ linear_estimates(columns, z)
        noise = 0.01 * torch.eye(20) + 9.0
        precision = 1 + slopes @ torch.linalg.solve(noise, slopes)
        assert (found - z).square().mean() < 1.2 / precision

    def test_bits_of_a_logistic_regression_give_the_sufficient_statistics(self):
        design = torch.randn(100, 5)
        z = torch.randn(1000, 5)
        bits = torch.bernoulli((z @ design.T).sigmoid())
        columns = (bits - bits.mean(0)) / bits.std(0)
        found = columns @ linear_estimates(columns, z)
        sums = bits @ design
        sums = sums - sums.mean(0)
        left = sums - found @ torch.linalg.lstsq(found, sums).solution
        whole = columns @ torch.linalg.lstsq(columns, z).solution
        of_whole = sums - whole @ torch.linalg.lstsq(whole, sums).solution
        noise = (bits - (z @ design.T).sigmoid()) @ design  # what the bits leave open
        assert left.square().mean() < 0.1 * noise.square().mean()
        assert left.square().mean() < 0.5 * of_whole.square().mean()

    def test_constant_and_repeated_columns_and_latents(self):
        z = torch.randn(200, 1)
        columns = torch.cat([z, z, torch.zeros(200, 1), torch.randn(200, 1)], -1)
        latents = torch.cat([z, z], -1)
        found = columns @ linear_estimates(columns, latents)
        assert torch.allclose(found, latents, atol=0.05)

    def test_alone_they_are_all_that_is_read(self, tmp_path):
        guide = auto_faithful_guide(wide, torch.zeros(30), embedding={"x": "linear"}, num_start_samples=500)
        (block,) = guide.blocks
        assert block.inputs.learned.tolist() == [False, False]
        guide.save(tmp_path / "guide.safetensors")
        loaded = load_guide(tmp_path / "guide.safetensors", wide)
        x = torch.randn(30)
        assert torch.equal(loaded.median(x)["z"], guide.median(x)["z"])


class TestTraining:
    def test_a_network_learns_what_no_linear_estimate_sees(self):
        pyro.set_rng_seed(0)
        guide = auto_faithful_guide(product, torch.zeros(20), embedding={"x": "auto"}, num_start_samples=1000)
        x = torch.zeros(20)
        with torch.no_grad():
            before = InferenceCompilation(product, guide, batch_size=2000).loss(x)
        fit(
            *(product, guide, x),
            simulations=Simulations(3000, batch_size=300),
            optimizer=3e-3,
            schedule=25,
            progress=False,
        )
        with torch.no_grad():
            after = InferenceCompilation(product, guide, batch_size=2000).loss(x)
        assert after < before - 0.3

    def test_in_plates_by_elbo_and_from_a_file(self, tmp_path):
        x = torch.randn(5, 30)
        guide = auto_faithful_guide(in_plate, x, embedding={"x": "auto"}, num_start_samples=500)
        assert torch.isfinite(
            torch.as_tensor(Trace_ELBO(5, vectorize_particles=True).loss(in_plate, guide, x))
        )
        assert guide(torch.randn(8, 30))["z"].shape == (8,)
        guide.save(tmp_path / "guide.safetensors")
        loaded = load_guide(tmp_path / "guide.safetensors", in_plate)
        assert torch.equal(loaded.median(x)["z"], guide.median(x)["z"])


class TestBadInput:
    @pytest.mark.parametrize(
        ("embedding", "message"),
        [
            ({"x": nn.Linear(29, 4)}, "that takes its 30 columns"),
            (
                {"x": nn.Sequential(nn.Linear(30, 4), nn.Flatten(0))},
                r"maps \(2, 30\) to \(2, 'features'\); got \(8,\)",
            ),
            ({"y": "auto"}, "of data that the guide reads, x; got y"),
            ({"x": "mlp"}, "nn.Module, 'auto' or 'linear'"),
            ("auto", r"embedding=\{site: nn.Module, 'auto' or 'linear'\}; got 'auto'"),
        ],
    )
    def test_refused(self, embedding, message):
        with pytest.raises(GraphflowsError, match=message):
            auto_faithful_guide(wide, torch.zeros(30), embedding=embedding, num_start_samples=100)

    def test_pooled_data_have_networks_already(self):
        def model(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(GraphflowsError, match="no site reads it in its own plates"):
            auto_faithful_guide(
                model, torch.zeros(4), pool="deepset", embedding={"x": "auto"}, num_start_samples=100
            )

    def test_a_network_of_the_user_is_no_plain_data(self, tmp_path):
        guide = auto_faithful_guide(
            wide, torch.zeros(30), embedding={"x": nn.Linear(30, 4)}, num_start_samples=100
        )
        with pytest.raises(GraphflowsError):
            guide.save(tmp_path / "guide.safetensors")

    def test_data_that_are_not_finite_are_named(self):
        guide = auto_faithful_guide(wide, torch.zeros(30), embedding={"x": "auto"}, num_start_samples=100)
        with pytest.raises(GraphflowsError, match="x have NaN"):
            guide(torch.full((30,), torch.nan))
