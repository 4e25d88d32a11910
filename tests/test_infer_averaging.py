"""Running averages of parameters, by hand and through `fit`."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import LinearGuide
from torch import nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer import Checkpoint, Progress, Schedule, Simulations, fit
from pyro_graphflows.infer.averaging import RunningAverage
from pyro_graphflows.infer.parameters import ParameterSet


def normal():
    z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


def values(guide):
    return {name: p.detach().clone() for name, p in guide.named_parameters()}


class TestRunningAverage:
    def test_values_by_hand(self):
        """A mean until the window is full, and then exponential weights."""
        layer = nn.Linear(1, 1)
        average = RunningAverage(ParameterSet(guide=layer))
        expected = 0.0
        for step, value in enumerate((1.0, 4.0, -2.0, 8.0), 1):
            nn.init.constant_(layer.weight, value)
            average.take(window=2.0)
            expected += (value - expected) / min(step, 2)
        with average.in_place():
            assert layer.weight.item() == expected == pytest.approx(4.125)
        assert layer.weight.item() == 8.0
        average.leave()
        assert layer.weight.item() == expected

    def test_fixed_parameters_and_buffers_stay(self):
        layer = nn.BatchNorm1d(1)
        layer.weight.requires_grad_(False)
        average = RunningAverage(ParameterSet(guide=layer))
        average.take(5.0)
        nn.init.constant_(layer.bias, 2.0)
        nn.init.constant_(layer.weight, 3.0)
        nn.init.constant_(layer.running_mean, 4.0)
        average.take(5.0)
        average.leave()
        assert (layer.bias.item(), layer.weight.item(), layer.running_mean.item()) == (1.0, 3.0, 4.0)

    def test_values_come_back_after_an_error(self):
        layer = nn.Linear(1, 1)
        average = RunningAverage(ParameterSet(guide=layer))
        average.take(1.0)
        nn.init.constant_(layer.bias, 7.0)
        with pytest.raises(KeyError), average.in_place():
            raise KeyError
        assert layer.bias.item() == 7.0


def trained(schedule, path=None, on_epoch=None, held_out=0.25):
    pyro.clear_param_store()
    guide = LinearGuide()
    history = fit(
        *(normal, guide),
        simulations=Simulations(80, held_out=held_out, batch_size=20),
        optimizer=0.1,
        schedule=schedule,
        checkpoint=path,
        progress=Progress(bar=False, on_epoch=on_epoch),
    )
    return history, values(guide)


class TestFit:
    def test_averages_are_judged_and_kept(self):
        """The steps are those without averages; what is judged and remains is their average, here of all three."""
        steps = []

        class Recording(torch.optim.Adam):
            def step(self, closure=None):
                super().step(closure)
                steps.append([p.detach().clone() for p in self.param_groups[0]["params"]])

        guide = LinearGuide()
        seen = []

        def on_epoch(history):
            seen.append([p.detach().clone() for p in guide.parameters()])

        history = fit(
            *(normal, guide),
            simulations=Simulations(80, held_out=0.25, batch_size=20),
            optimizer=lambda params: Recording(params, lr=0.1),
            schedule=Schedule(1, patience=None, averaged_epochs=2.0),
            progress=Progress(bar=False, on_epoch=on_epoch),
        )
        assert len(steps) == 3
        means = [torch.stack(each).mean(0) for each in zip(*steps, strict=True)]
        for mean, parameter, shown in zip(means, guide.parameters(), seen[0], strict=True):
            torch.testing.assert_close(parameter.detach(), mean)
            torch.testing.assert_close(shown, mean)
        again, kept = trained(Schedule(1, patience=None))
        assert again.loss == history.loss
        assert again.validation_loss != history.validation_loss
        assert all(torch.equal(kept[name], last) for name, last in zip(kept, steps[-1], strict=True))

    def test_without_held_out_simulations_the_last_average_remains(self):
        data = [{"z": torch.randn(10, 1), "x": torch.randn(10, 1)} for _ in range(3)]
        guide, shown = LinearGuide(), []

        def on_epoch(history):
            shown.append(values(guide))

        schedule = Schedule(3, patience=None, averaged_epochs=1.0)
        fit(
            *(normal, guide),
            simulations=data,
            optimizer=0.1,
            schedule=schedule,
            progress=Progress(bar=False, on_epoch=on_epoch),
        )
        assert all(torch.equal(value, shown[-1][name]) for name, value in values(guide).items())

    def test_resumed_equals_uninterrupted(self, tmp_path):
        schedule = Schedule(6, patience=2, averaged_epochs=2.0)
        whole, state = trained(schedule, Checkpoint(tmp_path / "whole.pt"))
        trained(Schedule(3, patience=2, averaged_epochs=2.0), Checkpoint(tmp_path / "parts.pt"))
        resumed, other = trained(schedule, Checkpoint(tmp_path / "parts.pt"))
        assert whole.validation_loss == resumed.validation_loss
        assert all(torch.equal(value, other[name]) for name, value in state.items())
        with pytest.raises(GraphflowsError, match="averaged_epochs"):
            trained(Schedule(6, patience=2), Checkpoint(tmp_path / "parts.pt"))

    @pytest.mark.parametrize("number", [0.0, -1.0, float("inf"), float("nan")])
    def test_refused(self, number):
        with pytest.raises(GraphflowsError, match="averaged_epochs"):
            Schedule(3, averaged_epochs=number)

    def test_refused_where_training_is_left_to_itself(self):
        with pytest.raises(GraphflowsError, match="averaged_epochs"):
            fit(normal, LinearGuide(), schedule=Schedule(averaged_epochs=1.0), loss="auto", progress=False)
