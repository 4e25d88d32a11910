import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import LinearGuide
from torch.utils.data import DataLoader

from pyro_graphflows.distributions import Simulated
from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.infer import InferenceCompilation, Schedule, Simulations, fit
from pyro_graphflows.infer.fixed_simulations import SimulationLoss


def normal(x=None, num_data=1):
    with pyro.plate("data", num_data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def regression(x=None):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mix = torch.tensor([[1.0, 0.5], [-0.3, 1.0], [0.2, 0.4]])
    pyro.sample("x", dist.Normal(z @ mix.T, 0.5).to_event(1), obs=x)


class TestLoss:
    def test_value_by_hand(self):
        """A batch of two simulations of a data set of three: the sum of the normal log-densities."""
        guide = LinearGuide()
        loss = SimulationLoss(normal, guide, (), {"x": torch.zeros(3), "num_data": 3})
        z, x = torch.randn(2, 3), torch.randn(2, 3)
        with torch.no_grad():
            expected = dist.Normal(guide.slope * x + guide.shift, guide.log_scale.exp()).log_prob(z)
            assert torch.allclose(loss.log_probs(z=z, x=x), expected.sum(-1))
            assert loss.differentiable_loss(z=z, x=x).item() == pytest.approx(-expected.sum().item())

    @pytest.mark.parametrize("vectorize", [True, False])
    def test_drawn_simulations_have_the_law_of_the_model(self, vectorize):
        loss = SimulationLoss(normal, LinearGuide(), (), {"x": torch.zeros(2), "num_data": 2})
        values = loss.draw(1500, vectorize)
        assert {name: tuple(value.shape) for name, value in values.items()} == {
            "z": (1500, 2),
            "x": (1500, 2),
        }
        joint = torch.cat([values["z"], values["x"]], -1)
        block = torch.eye(2)
        expected = torch.cat([torch.cat([block, block], 1), torch.cat([block, 2 * block], 1)])
        # entries of a covariance have standard errors of at most 2 sqrt(2 / n)
        assert torch.allclose(torch.cov(joint.T), expected, atol=5 * 2 * math.sqrt(2 / 1500))

    def test_it_is_inference_compilation_at_these_values(self):
        guide = LinearGuide()
        fresh = InferenceCompilation(normal, guide, batch_size=40)
        joint = fresh.sample_joint(num_data=2)
        expected = fresh._score(joint, (), {"num_data": 2})
        fixed = SimulationLoss(normal, guide, (), {"num_data": 2})
        values = {name: joint[0].nodes[name]["value"].reshape(40, 2) for name in ("z", "x")}
        assert torch.allclose(fixed.log_probs(**values), expected)

    def test_subsampled_plates_are_refused(self):
        def model(x=None):
            with pyro.plate("data", 12, subsample_size=3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x=None, observations=None):
            with pyro.plate("data", 12, subsample_size=3):
                pyro.sample("z", dist.Normal(observations["x"] / 2, pyro.param("s", torch.ones(()))))

        with pytest.raises(UnsupportedModelError, match="'data' around 'z' has 3 of 12 elements"):
            fit(model, guide, simulations=100, progress=False)


class TestFit:
    def test_it_finds_the_regression_on_these_simulations(self):
        """With a linear guide the optimum is least squares on what is trained on, which no other data have."""
        z = torch.randn(300, 1)
        x = z + torch.randn(300, 1)
        guide = LinearGuide()
        held_out = {"z": torch.zeros(5, 1), "x": torch.zeros(5, 1)}
        data = {"z": z, "x": x}
        loader, long = [data], Schedule(400, patience=None)
        fit(normal, guide, simulations=loader, optimizer=0.05, schedule=long, progress=False)
        design = torch.cat([x, torch.ones(300, 1)], 1)
        slope, shift = torch.linalg.lstsq(design, z).solution[:, 0]
        residual = z - slope * x - shift
        assert guide.slope.item() == pytest.approx(slope.item(), abs=1e-4)
        assert guide.shift.item() == pytest.approx(shift.item(), abs=1e-4)
        assert guide.log_scale.exp().item() == pytest.approx(residual.square().mean().sqrt().item(), abs=1e-4)
        # held out simulations of another law: the best state is that which suits them
        pyro.clear_param_store()
        other = LinearGuide()
        history = fit(
            *(normal, other),
            simulations=Simulations(data, held_out=held_out),
            optimizer=0.05,
            schedule=Schedule(30, patience=None),
            progress=False,
        )
        best = history.validation_loss[history.best_epoch]
        density = dist.Normal(other.shift, other.log_scale.exp()).log_prob(torch.zeros(()))
        assert best == min(history.validation_loss)
        assert best == pytest.approx(-density.item())

    def test_compiled_guide_reaches_the_posterior(self):
        guide = auto_faithful_guide(regression, torch.zeros(3), init="random")
        simulations = Simulations(2000, batch_size=300)
        history = fit(
            *(regression, guide, torch.zeros(3)), simulations=simulations, optimizer=1e-2, progress=False
        )
        assert "learning rate fell" in history.stop_reason
        assert len(history.validation_loss) == len(history)
        mix = torch.tensor([[1.0, 0.5], [-0.3, 1.0], [0.2, 0.4]])
        covariance = torch.linalg.inv(torch.eye(2) + mix.T @ mix / 0.25)
        entropy = dist.MultivariateNormal(torch.zeros(2), covariance).entropy().item()
        with torch.no_grad():
            log_q = InferenceCompilation(regression, guide, batch_size=4000).log_probs(torch.zeros(3))
        # about a dozen weights fitted to 1,800 simulations cost 12 / 3,600 nats, trained ones a little more
        assert -log_q.mean().item() == pytest.approx(entropy, abs=0.03 + 4 * log_q.std().item() / 4000**0.5)

    @pytest.mark.parametrize(
        ("simulations", "size"),
        [(2000, 100), (1000, 56), (200, 20), (12, 11), (Simulations(1000, batch_size=300), 300)],
    )
    def test_epochs_of_few_simulations_have_many_steps(self, simulations, size):
        _, data = Simulations.of(simulations).prepare(normal, LinearGuide(), (), {})
        assert data.batch_size == size

    def test_runs_are_repeatable(self):
        losses = []
        for _ in range(2):
            pyro.clear_param_store()
            history = fit(normal, LinearGuide(), simulations=200, schedule=3, progress=False)
            losses.append(history.loss + history.validation_loss)
        assert losses[0] == losses[1]

    def test_arrays_and_loaders(self):
        z = np.random.default_rng(0).normal(size=(120, 1))
        data = {"z": z, "x": z + 1.0}
        history = fit(normal, LinearGuide(), simulations=data, schedule=2, progress=False)
        assert history.num_steps == 12  # 108 in batches of twenty
        rows = [{name: torch.tensor(value[i]) for name, value in data.items()} for i in range(120)]
        loader = DataLoader(rows, batch_size=40)
        simulations = Simulations(loader, held_out=loader)
        history = fit(normal, LinearGuide(), simulations=simulations, schedule=2, progress=False)
        assert history.num_steps == 6
        assert len(history.validation_loss) == 2


class TestBadInput:
    def values(self):
        z = torch.randn(50, 1)
        return {"z": z, "x": z + torch.randn(50, 1)}

    def fit(self, simulations, **options):
        return fit(normal, LinearGuide(), simulations=simulations, schedule=1, progress=False, **options)

    def test_not_finite_ones_are_counted_and_refused(self):
        values = self.values()
        values["x"][3], values["x"][7], values["z"][7] = math.nan, math.inf, math.nan
        with pytest.raises(
            GraphflowsError, match=r"2 of 50 have NaN or infinite values, at z \(1\), x \(2\)"
        ):
            self.fit(values)

    def test_not_finite_ones_are_dropped_where_asked(self):
        values = self.values()
        values["x"][3] = math.nan
        with pytest.warns(GraphflowsWarning, match="1 of 50 simulations have NaN"):
            history = self.fit(Simulations(values, not_finite="drop", batch_size=10))
        assert history.num_steps == 5  # 49 less 5 that are held out
        assert math.isfinite(history.loss[0])
        with pytest.warns(GraphflowsWarning, match="1 of 50 simulations have NaN"):
            self.fit(Simulations([values], not_finite="drop"))

    def test_simulators_that_fail(self):
        def model(x=None):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = torch.where(z > 1.0, torch.nan, z)
            pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False), obs=x)

        def guide(observations=None):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

        with pytest.raises(
            GraphflowsError, match=r"simulations; \d+ of 100 have NaN or infinite values, at x"
        ):
            fit(model, guide, simulations=100, schedule=1, progress=False)

    @pytest.mark.parametrize(
        ("simulations", "message"),
        [
            (5, "at least 10 simulations"),
            (torch.zeros(20), "Name the sites"),
            ("many", "a number of simulations"),
            (True, "a number of simulations"),
            ({"z": torch.zeros(20, 1)}, "x missing, none too many"),
            (
                {"z": torch.zeros(20, 1), "x": torch.zeros(20, 1), "y": torch.zeros(20)},
                "none missing, y too many",
            ),
            (
                {"z": torch.zeros(20), "x": torch.zeros(20, 1)},
                r"'z' to be a tensor of shape \(number of simulations",
            ),
            ({"z": torch.zeros(20, 1), "x": torch.zeros(21, 1)}, "the same positive number of rows"),
            ({"z": torch.zeros(4, 1), "x": torch.zeros(4, 1)}, "at least 10 simulations that are finite"),
            ([torch.zeros(20)], "dicts from site to tensor"),
        ],
    )
    def test_refused(self, simulations, message):
        with pytest.raises(GraphflowsError, match=message):
            self.fit(simulations)

    def test_fewer_simulations_than_a_batch(self):
        with pytest.raises(GraphflowsError, match="as a batch has, 64; got 45"):
            self.fit(Simulations(self.values(), batch_size=64))
        few = {name: value[:12] for name, value in self.values().items()}
        assert self.fit(few).num_steps == 1  # the default is no more than there are

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"held_out": 1.5}, "share between 0 and 1"),
            ({"not_finite": "ignore"}, "'raise' or 'drop'"),
            ({"batch_size": 0}, "positive batch_size"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(GraphflowsError, match=message):
            Simulations(100, **options)

    def test_options_without_effect(self):
        with pytest.raises(GraphflowsError, match="whose batches are its own"):
            Simulations([], batch_size=10)
        with pytest.raises(GraphflowsError, match="Expected no loss with simulations"):
            self.fit(100, loss=InferenceCompilation)


def failing(share):
    """A simulator that fails where its parameter is large."""

    def model(x=None):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

        def simulator(z):
            noise = torch.randn(*z.shape[:-1], 3)
            return torch.where(z[..., :1] > share, torch.nan, z.sum(-1, keepdim=True) + noise)

        pyro.sample("x", Simulated(simulator, z, event_shape=(3,), input_dims=1), obs=x)

    return model


class TestSimulatorsThatFail:
    @pytest.mark.parametrize("seed", range(4))
    def test_failures_are_counted_and_dropped_wherever_they_are(self, seed):
        model, x = failing(0.0), torch.zeros(3)
        guide = auto_faithful_guide(model, x, num_start_samples=200)
        schedule = Schedule(num_steps=3)
        simulations = Simulations(100, not_finite="drop")
        with pytest.warns(GraphflowsWarning, match="of 100 simulations have NaN or infinite values, at x"):
            fit(model, guide, x, simulations=simulations, schedule=schedule, progress=False, seed=seed)
        with pytest.raises(GraphflowsError, match=r"Expected finite simulations; .* of 100 have NaN"):
            fit(model, guide, x, simulations=100, schedule=schedule, progress=False, seed=seed)

    def test_one_that_always_fails_is_refused(self):
        model, x = failing(-math.inf), torch.zeros(3)
        guide = auto_faithful_guide(model, x, num_start_samples=200, init="random", standardize=False)
        with pytest.raises(
            GraphflowsError, match=r"Expected a model that simulates finite values; x had NaN"
        ):
            fit(model, guide, x, simulations=100, progress=False)


@pytest.mark.parametrize("how", [{"simulations": 50}, {"loss": InferenceCompilation}])
def test_sites_that_read_no_data_are_said_to_learn_from_simulations_what_these_data_do_not_say(how):
    """Per-element parameters start at the posterior of the data, and simulations would teach them the prior."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    x = torch.randn(3)
    guide = auto_faithful_guide(model, x, family="normal", num_start_samples=200)
    with pytest.warns(GraphflowsWarning, match="per-element parameters of mean"):
        fit(model, guide, (x,), schedule=Schedule(num_steps=1), progress=False, **how)
