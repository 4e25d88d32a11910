import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain, Hierarchy, LinearGuide, normal_evidence, normal_model, normal_posterior
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.infer.batches import TrainingData
from pyro_graphflows.infer.checkpoints import Checkpoint
from pyro_graphflows.infer.gap import estimate_gap, gap_of_log_weights
from pyro_graphflows.infer.history import Progress
from pyro_graphflows.infer.parameters import ParameterSet
from pyro_graphflows.infer.schedule import Schedule
from pyro_graphflows.infer.simulated_start import simulation_loss
from pyro_graphflows.infer.training import fit


def quiet_fit(*args, **kwargs):
    return fit(*args, progress=False, **kwargs)


class TestGap:
    def test_of_a_normal_in_closed_form(self):
        """q = N(x / 2, s) for p = N(x / 2, 1 / 2): KL(q || p) = s^2 - (1 + log(2 s^2)) / 2 for each datum."""
        x, scale = torch.randn(20), 0.6

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, scale))

        gap = estimate_gap(normal_model, guide, TrainingData(x), 4000)
        exact = scale**2 - 0.5 * (1 + math.log(2 * scale**2))
        assert gap.num_data == 20
        assert abs(gap.value - exact) < 5 * gap.standard_error
        assert 0 < gap.standard_error < 0.01

    def test_of_the_posterior_is_zero(self):
        x = torch.randn(5)
        gap = estimate_gap(normal_model, normal_posterior, TrainingData(x), 50)
        assert gap.value == pytest.approx(0, abs=1e-12)
        assert gap.num_doubtful == 0
        hierarchy = Hierarchy(num_data=4)
        joint = estimate_gap(hierarchy.model, hierarchy.guide, TrainingData(hierarchy.x), 50)
        assert (joint.num_data, abs(joint.value) < 1e-12) == (0, True)
        assert "for all data together" in repr(joint)

    def test_doubtful_weights_are_counted(self):
        heavy = torch.distributions.StudentT(1.0).sample((500, 2)).abs() * 3
        assert gap_of_log_weights(heavy).num_doubtful == 2
        assert "k-hat above 0.7 for 2 of 2 data" in repr(gap_of_log_weights(heavy))

    def test_there_is_none_for_subsampled_plates(self):
        hierarchy = Hierarchy(num_data=10)

        def model(x):
            hierarchy.model(x, full_size=10)

        def guide(x):
            hierarchy.guide(x, full_size=10)

        data = TrainingData(hierarchy.x[:5], full_size=10)
        assert isinstance(estimate_gap(model, guide, data), GraphflowsError)


class TestWithoutChoices:
    def test_a_guide_that_reads_data_learns_from_simulations(self):
        """The rate and the length are found, and the exact posterior reached, from a start that is far off."""
        x, guide = 2**0.5 * torch.randn(230), LinearGuide(slope=-1.0, shift=3.0, log_scale=1.0)
        history = quiet_fit(normal_model, guide, x)
        assert history.simulated is not None
        assert history.notes == []
        for each in (history.simulated, history):  # of the trials, two epochs each, one remains at most
            assert len({epoch // 2 for epoch in each.kept if epoch < 6}) <= 1
            assert set(each.kept) <= set(range(len(each)))
        exact = -normal_evidence(x).mean().item()
        elbo = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
        assert elbo.loss(normal_model, guide, x) / 230 == pytest.approx(exact, abs=0.01)
        assert history.gap.value < 0.01
        assert "gap" in repr(history)
        assert "on simulations of the model" in repr(history)

    def test_an_exact_start_is_left_as_it_is(self):
        """No step may be taken that can only harm."""
        guide = LinearGuide(slope=0.5, shift=0.0, log_scale=math.log(0.5) / 2)
        history = quiet_fit(normal_model, guide, torch.randn(50), loss=Trace_ELBO())
        assert history.num_steps == 0
        assert "next to nothing" in history.stop_reason
        assert guide.slope.item() == 0.5
        assert history.simulated is None

    @pytest.mark.parametrize("as_module", [False, True])
    def test_a_model_with_parameters_is_learned_beside_its_exact_posterior(self, as_module):
        """The gap is nothing from the start and stays so, while the evidence is far from its maximum."""
        x, layer = 2 * torch.randn(8) + 3, nn.Linear(1, 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)

        def mean():
            if as_module:
                return pyro.module("layer", layer).bias
            return pyro.param("mean", torch.tensor(0.0))

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(mean(), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x + mean()) / 2, 0.5**0.5))

        history = quiet_fit(model, guide, x, optimizer=0.2, schedule=Schedule(num_steps=100), loss="auto")
        assert history.num_steps > 0
        assert mean().item() == pytest.approx(x.mean().item(), abs=0.1)
        assert history.gap.value < 0.01

    def test_a_guide_of_another_kind(self):
        """AutoNormal reads no data: there is nothing to learn from simulations, and that is said."""
        hierarchy = Hierarchy(num_data=4)
        guide = AutoNormal(hierarchy.model)
        limits = Schedule(num_steps=1000)
        history = quiet_fit(hierarchy.model, guide, hierarchy.x, loss="auto", schedule=limits)
        assert history.notes[0].startswith("no training on simulations: ")
        assert history.gap.num_data == 0
        assert history.gap.value < 0.5  # a mean field has .29 at best: the precisions of mu and z are coupled
        assert len(set(history.learning_rate)) > 3

    def test_improper_priors_are_named_and_the_step_left_out(self):
        def model(x):
            mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

        class Guide(nn.Module):
            def __init__(self):
                super().__init__()
                self.loc = nn.Parameter(torch.tensor(2.0))
                self.log_scale = nn.Parameter(torch.tensor(0.0))

            def forward(self, x, observations=None):
                pyro.sample("mu", dist.Normal(self.loc, self.log_scale.exp()))

        x, guide = torch.randn(25) + 3, Guide()
        history = quiet_fit(model, guide, x)
        assert history.simulated is None
        assert "site 'mu' is improper" in history.notes[0]
        assert "Trace Shapes" not in history.notes[0]  # Pyro's list of all sites, which it adds to errors
        assert guide.loc.item() == pytest.approx(x.mean().item(), abs=0.05)
        assert guide.log_scale.exp().item() == pytest.approx(0.2, abs=0.03)

    @pytest.mark.parametrize("whole", [True, False])
    def test_joint_samples_are_fewer_where_each_has_many_data(self, whole):
        """However the data are given: as rows, or as arguments of which nobody has said that they are rows."""
        x = torch.zeros(100)
        data = TrainingData(kwargs={"x": x}, full_size=100) if whole else TrainingData(x)
        batch = data.batches(0).first()
        loss = simulation_loss(normal_model, LinearGuide(), batch, dict(data.kwargs or {}))
        assert loss.batch_size == 20

    def test_sites_that_read_no_data_are_left_alone_on_simulations(self):
        """The global has parameters of its own: on simulations it would learn its prior, N(0, 1)."""
        hierarchy = Hierarchy(num_data=6)

        class Guide(nn.Module):
            def __init__(self):
                super().__init__()
                self.loc = nn.Parameter(torch.tensor(1.0))
                self.weights = nn.Parameter(torch.tensor([0.0, 0.0]))

            def forward(self, x, observations=None):
                x = x if observations is None else observations["x"]
                mu = pyro.sample("mu", dist.Normal(self.loc, 0.4))
                with pyro.plate("data", x.shape[-1]):
                    mean = self.weights[0] * mu + self.weights[1] * x
                    pyro.sample("z", dist.Normal(mean, 5**-0.5))

        guide, kept = Guide(), []

        def remember(history):
            if not kept:  # the end of an epoch on simulations, at the first rate of all
                kept.append(guide.loc.item())

        history = fit(hierarchy.model, guide, hierarchy.x, progress=Progress(bar=False, on_epoch=remember))
        assert kept == [1.0]
        assert history.simulated.num_steps > 0
        assert guide.weights.tolist() == pytest.approx([0.2, 0.8], abs=0.03)

    def test_harm_is_undone(self):
        """Data unlike the simulations: a guide of one number can fit these or those, not both."""
        x = torch.full((50,), 30.0)

        class Guide(nn.Module):
            def __init__(self):
                super().__init__()
                self.shift = nn.Parameter(torch.tensor(15.0))

            def forward(self, x, observations=None):
                x = x if observations is None else observations["x"]
                with pyro.plate("data", x.shape[-1]):
                    pyro.sample("z", dist.Normal(self.shift + 0.01 * x.tanh(), 0.5**0.5))

        guide = Guide()
        history = quiet_fit(normal_model, guide, x, schedule=Schedule(num_steps=900), loss="auto")
        assert "did not lower the loss" in history.notes[0]
        assert guide.shift.item() == pytest.approx(15.0, abs=0.1)


class TestLimits:
    def test_steps_and_seconds(self):
        x = torch.randn(50)
        history = quiet_fit(normal_model, LinearGuide(3.0), x, loss="auto", schedule=Schedule(num_steps=600))
        assert history.num_steps + history.simulated.num_steps <= 600
        clock = Schedule(num_seconds=1.5)
        short = quiet_fit(normal_model, LinearGuide(3.0), x, loss="auto", schedule=clock)
        assert short.seconds[-1] < 6 if short.seconds else short.simulated is not None

    def test_other_options_of_a_schedule_are_refused(self):
        with pytest.raises(GraphflowsError, match="chooses all else"):
            quiet_fit(
                normal_model, LinearGuide(), torch.randn(5), loss="auto", schedule=Schedule(3, patience=2)
            )

    def test_other_words_are_refused(self):
        with pytest.raises(GraphflowsError, match="'automatic'"):
            quiet_fit(normal_model, LinearGuide(), torch.randn(5), loss="automatic", schedule=3)


class TestFailures:
    def test_a_rate_that_is_too_great_is_given_up(self):
        """Outside of |slope| < 1 the log-density is nan: the greatest rate runs into it, and training goes on."""

        class Fragile(LinearGuide):
            def forward(self, x=None, num_data=None, observations=None):
                x = x if observations is None else observations["x"]
                poison = torch.where(self.slope.abs() < 0.55, 0.0, math.nan)
                with pyro.plate("data", x.shape[-1]):
                    loc = self.slope * x + self.shift
                    pyro.sample("z", dist.Normal(loc, self.log_scale.exp() + poison, validate_args=False))

        guide = Fragile(slope=0.0)
        with pyro.validation_enabled(False):
            history = quiet_fit(normal_model, guide, 2**0.5 * torch.randn(100))
        assert abs(guide.slope.item() - 0.5) < 0.05
        assert history.gap.value < 0.02


class Killed(Exception):
    pass


class TestCheckpoints:
    def test_resumed_equals_uninterrupted(self, tmp_path):
        """Killed on simulations, in the trials and afterwards: bit for bit the same parameters."""

        def train(name, kill=None):
            pyro.clear_param_store()
            calls = []

            def on_epoch(history):
                calls.append(1)
                if len(calls) == kill:
                    raise Killed

            chain, guide = Chain(num_data=12), Tilted()
            history = fit(
                chain.model,
                guide,
                {"x": torch.ones(12), "c": torch.arange(12.0) / 6 - 1},
                checkpoint=Checkpoint(tmp_path / name),
                progress=Progress(bar=False, on_epoch=on_epoch),
                loss="auto",
                schedule=Schedule(num_steps=450),
            )
            return history, ParameterSet(guide=guide).state()

        whole, state = train("whole.pt")
        assert (len(whole.simulated), len(whole)) == (3, 6)
        for kill in (2, 7):
            name = f"parts{kill}.pt"
            with pytest.raises(Killed):
                train(name, kill)
            again, other = train(name)
            assert again.loss == whole.loss
            assert again.kept == whole.kept
            assert again.simulated.loss == whole.simulated.loss
            assert all(torch.equal(state[name], other[name]) for name in state)


class Tilted(nn.Module):
    """A linear guide for `Chain`, whose best is near the posterior."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.1, 0.1, 0.0]))
        self.log_scale = nn.Parameter(torch.zeros(2))

    def forward(self, x=None, c=None, observations=None):
        x = x if observations is None else observations["x"]
        with pyro.plate("data", c.shape[-1]):
            z = pyro.sample("z", dist.Normal(self.a[0] * x + self.a[2], self.log_scale[0].exp()))
            pyro.sample("w", dist.Normal(self.a[1] * z, self.log_scale[1].exp()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_readme_example_ends_near_exact(seed):
    """A slope and an offset for each datum, data that the model would hardly make: .02 nats of the exact evidence."""

    def model(w, y=None):
        with pyro.plate("data", len(w)):
            slope = pyro.sample("slope", dist.Normal(1.0, 0.5))
            offset = pyro.sample("offset", dist.Normal(0.0, 2.0))
            pyro.sample("y", dist.Normal(slope * w + offset, 0.3), obs=y)

    pyro.set_rng_seed(seed)
    w, y = torch.randn(200), torch.randn(200)
    exact = dist.Normal(w, ((0.5 * w) ** 2 + 4.09).sqrt()).log_prob(y).mean().item()
    guide = auto_faithful_guide(model, w, y)
    history = quiet_fit(model, guide, (w, y), seed=seed)
    elbo = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    gap = exact + elbo.loss(model, guide, w, y) / 200
    print(f"seed {seed}: {gap:.4f} nats, {history!r}")
    assert gap < 0.02
    assert history.gap.value == pytest.approx(gap, abs=0.005)
