import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_models import Chain, Hierarchy, LinearGuide, normal_evidence, normal_model, normal_posterior
from pyro import poutine
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.infer.batches import TrainingData
from pyro_graphflows.infer.checkpoints import (
    Checkpoint,
    load_checkpoint,
)
from pyro_graphflows.infer.history import History, Progress
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.parameters import ParameterSet
from pyro_graphflows.infer.schedule import Schedule
from pyro_graphflows.infer.training import fit

Adam = partial(torch.optim.Adam, lr=0.05)
quiet_fit = partial(fit, progress=False)


@pytest.fixture
def x():
    return 2**0.5 * torch.randn(230)


def check_linear(guide, tolerance=0.07):
    assert guide.slope.item() == pytest.approx(0.5, abs=tolerance)
    assert guide.shift.item() == pytest.approx(0.0, abs=tolerance)
    assert guide.log_scale.exp().item() == pytest.approx(0.5**0.5, abs=tolerance)


# ------------------------------------------------------------------------------------------------- losses and guides
@pytest.mark.parametrize(
    "loss",
    [
        None,
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        RenyiELBO(),
    ],
    ids=["none", "particles", "mean field", "graph", "renyi"],
)
def test_elbos(x, loss):
    guide = LinearGuide()
    history = quiet_fit(
        normal_model, guide, TrainingData(x, batch_size=50), loss=loss, optimizer=Adam, schedule=40
    )
    check_linear(guide, 0.12)
    assert len(history) == 40
    assert history.num_steps == 200
    if not isinstance(loss, TraceMeanField_ELBO):
        assert history.loss[-1] == pytest.approx(-normal_evidence(x).mean().item(), abs=0.1)


def test_losses_in_parts(x):
    guide = LinearGuide()
    loss = ReweightedWakeSleep(num_particles=5, vectorize_particles=True)
    history = quiet_fit(
        normal_model, guide, TrainingData(x, batch_size=50), loss=loss, optimizer=Adam, schedule=30
    )
    assert guide.slope.item() == pytest.approx(0.5, abs=0.12)
    assert all(map(math.isfinite, history.loss))


class Everything(PyroModule):
    """Parameters in all the ways there are; none may be forgotten."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(1, 1)
        self.weight = nn.Parameter(torch.tensor(0.1))
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)
        self.register_buffer("calls", torch.zeros(()))

    def guide(self, x):
        if self.training:
            self.calls += 1
        extra = pyro.param("extra", torch.tensor(0.2))
        mean = self.plain(x[:, None]).squeeze(-1) + self.weight * x + extra
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, self.scale))


@pytest.mark.parametrize("local", [False, True])
def test_every_kind_of_parameter_is_trained(x, local):
    with pyro.settings.context(module_local_params=local):
        module = Everything()
        before = {name: value.clone() for name, value in ParameterSet(guide=module.guide).parameters.items()}
        quiet_fit(normal_model, module.guide, x, optimizer=Adam, schedule=30)
        after = ParameterSet(guide=module.guide).parameters
        assert sorted(after) == [
            "guide.plain.bias",
            "guide.plain.weight",
            "guide.scale_unconstrained",
            "guide.weight",
        ]
        assert all(not torch.equal(before[name], after[name]) for name in after)
        assert pyro.param("extra").item() != 0.2
        slope = module.plain.weight.item() + module.weight.item()
        assert slope == pytest.approx(0.5, abs=0.1)
        assert module.scale.item() == pytest.approx(0.5**0.5, abs=0.1)
        assert module.calls.item() == 90  # the run that looks for parameters is not a training run


def test_plain_modules_that_pyro_does_not_know(x):
    """SVI would train nothing here: no param statement is ever made."""

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.slope * x, 0.5**0.5))

    guide = Guide()
    quiet_fit(normal_model, guide, x, optimizer=Adam, schedule=20)
    assert guide.slope.item() == pytest.approx(0.5, abs=0.05)


def test_functions_with_param_statements_and_a_stale_store(x):
    """A parameter of this name, left in the store by an earlier model, is what Pyro uses: so it is trained."""
    pyro.param("slope", torch.tensor(0.9))

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.5**0.5))

    quiet_fit(normal_model, guide, x, optimizer=Adam, schedule=30)
    assert pyro.param("slope").item() == pytest.approx(
        0.5, abs=0.1
    )  # Adam's last steps are noise of its rate


def test_a_fresh_module_beside_a_stale_store(x):
    """pyro.module announces the parameters of an earlier module of the same name: they are not those in use."""
    quiet_fit(normal_model, LinearGuide(), x, optimizer=Adam, schedule=1)
    guide = LinearGuide()
    quiet_fit(normal_model, guide, x, optimizer=Adam, schedule=40)
    check_linear(guide, 0.12)


def test_the_models_parameters_are_trained_too():
    data = torch.randn(400) * 2 + 3

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 3**0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((3 * pyro.param("loc", torch.tensor(0.0)) + x) / 4, 0.75**0.5))

    quiet_fit(model, guide, data, optimizer=Adam, schedule=60)
    assert pyro.param("loc").item() == pytest.approx(data.mean().item(), abs=0.05)


def test_parameters_that_appear_in_mid_training(x):
    calls = []

    def guide(x):
        calls.append(1)
        slope = pyro.param("slope", torch.tensor(0.5))
        shift = pyro.param("shift", torch.tensor(0.5)) if len(calls) > 10 else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x + shift, 0.5**0.5))

    quiet_fit(normal_model, guide, x, optimizer=Adam, schedule=40)
    assert pyro.param("shift").item() == pytest.approx(0.0, abs=0.1)


class TestInferenceCompilation:
    @staticmethod
    def model(x=None, num_data=1):
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @pytest.mark.parametrize("kind", ["class", "object"])
    def test_without_data(self, kind):
        guide = LinearGuide()
        loss = (
            InferenceCompilation
            if kind == "class"
            else InferenceCompilation(self.model, guide, batch_size=200)
        )
        history = quiet_fit(
            self.model,
            guide,
            TrainingData(validation=3),
            loss=loss,
            optimizer=Adam,
            schedule=Schedule(5, steps_per_epoch=40),
        )
        check_linear(guide, 0.07 if kind == "object" else 0.12)
        assert history.num_steps == 200
        # conditional entropy of z given x, in nats per joint sample
        assert history.validation_loss[-1] == pytest.approx(0.5 * math.log(2 * math.pi * math.e / 2), abs=0.1)

    def test_with_covariates_as_data(self):
        """Data are the model's arguments; the loss is per datum, not per batch."""

        def model(c, x=None):
            with pyro.plate("data", len(c)):
                z = pyro.sample("z", dist.Normal(c, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(c, x=None, observations=None):
            weight = pyro.param("weight", torch.tensor(0.2))
            with pyro.plate("data", len(c)):
                pyro.sample("z", dist.Normal((1 - weight) * c + weight * observations["x"], 0.5**0.5))

        history = quiet_fit(
            model,
            guide,
            TrainingData(torch.randn(120), batch_size=40),
            loss=InferenceCompilation(model, guide, batch_size=40),
            optimizer=Adam,
            schedule=Schedule(25, steps_per_epoch=3),
        )
        assert pyro.param("weight").item() == pytest.approx(0.5, abs=0.03)
        assert history.loss[-1] == pytest.approx(0.5 * math.log(2 * math.pi * math.e / 2), abs=0.05)

    def test_an_epoch_has_many_steps_however_few_the_data_are(self):
        """With epochs of one step their noise ran the patience out: the rate fell, and training ended, at once."""
        guide = LinearGuide()
        clock = Schedule(num_seconds=0.5)
        history = quiet_fit(self.model, guide, torch.randn(20), loss=InferenceCompilation, schedule=clock)
        assert history.num_steps == 100 * len(history)
        assert history.stop_reason == "the 0.5 seconds are over"


# --------------------------------------------------------------------------------------------------------- per datum
def test_loss_is_per_datum_with_a_smaller_last_batch():
    """With the exact posterior every batch's ELBO is its log evidence: the epoch's loss is the mean over all data."""
    chain = Chain(num_data=23)
    parameter = nn.Parameter(torch.tensor(0.0))

    def model(x, c):
        chain.model(x, c + 0 * pyro.param("nothing", parameter))

    for batch_size in (5, 10, 23, 100):
        history = quiet_fit(model, chain.guide, TrainingData(chain.args, batch_size=batch_size), schedule=2)
        exact = -chain.log_evidence().mean().item()
        assert history.loss == pytest.approx([exact] * 2, abs=1e-10)
        assert history.num_steps == 2 * math.ceil(23 / batch_size)


def test_the_gradient_is_per_datum(x):
    """A step of plain gradient descent on all data moves by the rate times the mean gradient."""
    guide = LinearGuide(slope=0.5, shift=0.3, log_scale=0.0)
    shift = guide.shift.item()
    # ELBO per datum: d/dshift = -2 shift (prior and likelihood) for any noise, in the mean over the draws
    quiet_fit(
        normal_model,
        guide,
        TrainingData(torch.zeros(20_000), batch_size=20_000),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        schedule=1,
    )
    assert guide.shift.item() == pytest.approx(shift - 0.1 * 2 * shift, abs=5 * 0.1 * 2 / math.sqrt(20_000))


def test_models_that_scale_a_subsampled_plate_give_data_size():
    hierarchy = Hierarchy(num_data=40)
    history = {}
    for batch_size in (40, 10):
        parameter = nn.Parameter(torch.tensor(0.0))

        def guide(x, parameter=parameter):
            shift = pyro.param("shift", parameter)
            mu = pyro.sample("mu", dist.Normal(1.0 + 0 * shift, 0.1))
            with pyro.plate("data", 40, subsample_size=len(x)):
                pyro.sample("z", dist.Normal((mu + 4 * x) / 5, 5**-0.5))

        history[batch_size] = quiet_fit(
            partial(hierarchy.model, full_size=40),
            guide,
            TrainingData(hierarchy.x, batch_size=batch_size, full_size=40),
            optimizer=0.0,
            schedule=Schedule(60, patience=None),
        )
    means = [torch.tensor(h.loss).mean().item() for h in history.values()]
    assert means[0] == pytest.approx(means[1], abs=0.05)


def test_global_latents_in_self_sufficient_batches_warn():
    hierarchy = Hierarchy(num_data=40)
    parameter = nn.Parameter(torch.tensor(0.0))

    def guide(x):
        hierarchy.guide(x + 0 * pyro.param("nothing", parameter))

    with pytest.warns(GraphflowsWarning, match=r"\['mu'\] are global"):
        quiet_fit(hierarchy.model, guide, TrainingData(hierarchy.x, batch_size=10), schedule=1)
    quiet_fit(hierarchy.model, guide, hierarchy.x, schedule=1)  # all data at once: no warning
    loader = DataLoader(TensorDataset(hierarchy.x), batch_size=10)
    with pytest.warns(GraphflowsWarning, match=r"\['mu'\] are global"):
        quiet_fit(hierarchy.model, guide, loader, schedule=1)


@pytest.mark.parametrize("loss", [None, "auto"], ids=["elbo", "auto"])
def test_data_are_not_divided_by_default_where_latents_are_global(loss):
    """Batches would count the prior of mu once each."""
    hierarchy, sizes = Hierarchy(num_data=230), []

    def guide(x):
        sizes.append(len(x))
        hierarchy.guide(x + pyro.param("shift", torch.tensor(0.5)))

    history = quiet_fit(hierarchy.model, guide, hierarchy.x, schedule=Schedule(num_steps=2), loss=loss)
    assert history.num_steps == 2
    assert set(sizes[-2:]) == {230}
    if loss is None:  # in nats per datum
        pyro.get_param_store()["shift"] = torch.tensor(0.5)
        expected = Trace_ELBO(num_particles=500).loss(hierarchy.model, guide, hierarchy.x) / 230
        assert history.loss[0] == pytest.approx(expected, abs=0.5)


# -------------------------------------------------------------------------------------------------------------- data
def test_mappings_reach_the_model_by_keyword(x):
    guide = LinearGuide()
    quiet_fit(normal_model, guide, {"x": x}, optimizer=Adam, schedule=2)
    loader = DataLoader(TensorDataset(x), batch_size=50, shuffle=True)
    history = quiet_fit(normal_model, guide, TrainingData(loader, validation=x), optimizer=Adam, schedule=40)
    check_linear(guide, 0.12)
    assert history.num_steps == 40 * 5


def test_fixed_keyword_arguments():
    seen = []

    def model(x, factor=1):
        seen.append(factor)
        normal_model(x)

    linear = LinearGuide()

    def guide(x, factor=1):
        linear(x)

    quiet_fit(model, guide, TrainingData(torch.zeros(3), kwargs={"factor": 7}), schedule=1)
    assert set(seen) == {7}


# -------------------------------------------------------------------------------------------- schedule and optimisers
def test_the_rate_falls_and_training_stops():
    """Exact posterior, nothing to learn: every epoch is without improvement."""
    chain = Chain(num_data=4)
    parameter = nn.Parameter(torch.tensor(0.0))

    def model(x, c):
        chain.model(x, c + 0 * pyro.param("nothing", parameter))

    history = quiet_fit(
        model,
        chain.guide,
        chain.args,
        optimizer=1e-3,
        schedule=Schedule(1000, patience=3, lr_factor=0.1, min_lr=1e-5, steps_per_epoch=1),
    )
    assert history.stop_reason == "the learning rate fell below 1e-05"
    # the first epoch improves on infinity; then 3 at each of 1e-3, 1e-4, 1e-5
    assert history.learning_rate == pytest.approx([1e-3] * 4 + [1e-4] * 3 + [1e-5] * 3)
    forever = quiet_fit(model, chain.guide, chain.args, schedule=Schedule(30, patience=None))
    assert forever.learning_rate == [1e-3] * 30


@pytest.mark.parametrize(
    "optimizer",
    [
        0.05,
        torch.optim.RMSprop,
        lambda params: torch.optim.Adam(params, lr=0.05),
        pyro.optim.Adam({"lr": 0.05}),
        pyro.optim.ClippedAdam({"lr": 0.05, "clip_norm": 5.0}),
        pyro.optim.Adam(lambda name: {"lr": 0.0 if name.endswith("slope") else 0.05}),
    ],
    ids=["rate", "class", "function", "pyro", "clipped", "per parameter"],
)
def test_optimisers(x, optimizer):
    guide = LinearGuide()
    quiet_fit(normal_model, guide, x, optimizer=optimizer, schedule=5)
    assert guide.shift.item() != 0.1
    per_parameter = isinstance(optimizer, pyro.optim.PyroOptim) and callable(optimizer.pt_optim_args)
    assert (guide.slope.item() == 0.3) == per_parameter


def test_a_torch_optimiser_trains_what_it_holds(x):
    guide = LinearGuide()
    quiet_fit(normal_model, guide, x, optimizer=torch.optim.Adam([guide.shift], lr=0.05), schedule=5)
    assert guide.shift.item() != 0.1
    assert guide.slope.item() == 0.3


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}), "without schedule and without clip_args"),
        (
            pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {}, "gamma": 0.9}),
            "without schedule",
        ),
        ("adam", "a learning rate, a torch or Pyro optimiser"),
        (lambda params: None, "a function from parameters to a torch"),
    ],
)
def test_other_optimisers_are_refused(x, optimizer, message):
    with pytest.raises(GraphflowsError, match=message):
        quiet_fit(normal_model, LinearGuide(), x, optimizer=optimizer, schedule=1)


def test_clipping(x):
    guide = LinearGuide(shift=5.0)
    before = ParameterSet(guide=guide).state()
    quiet_fit(
        normal_model,
        guide,
        TrainingData(x, batch_size=230),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        schedule=Schedule(1, max_grad_norm=0.01),
    )
    moved = [value - before[name] for name, value in ParameterSet(guide=guide).state().items()]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01)


def test_nothing_to_train(x):
    with pytest.raises(GraphflowsError, match="nothing to train"):
        quiet_fit(normal_model, normal_posterior, x, schedule=1)


def test_disabled_gradients_are_refused(x):
    with torch.no_grad(), pytest.raises(GraphflowsError, match="Expected gradients to be enabled"):
        quiet_fit(normal_model, LinearGuide(), x, schedule=1)


class TestOptions:
    def test_they_are_checked_when_made(self):
        for option, message in [
            ({"num_epochs": -1}, "Expected num_epochs >= 0"),
            ({"num_steps": 1.5}, "Expected num_steps >= 0"),
            ({"num_epochs": 1, "patience": 0}, "Expected patience >= 1"),
            ({"steps_per_epoch": 0}, "Expected steps_per_epoch >= 1"),
            ({"lr_factor": 1.0}, "Expected lr_factor between 0 and 1"),
            ({"min_lr": -1.0}, "Expected lr_factor between 0 and 1"),
            ({"max_grad_norm": 0.0}, "Expected a positive max_grad_norm"),
            ({"patience": None}, "nothing would end the training"),
            (
                {"num_epochs": 1, "patience": None, "min_lr": 1e-3},
                "patience=None min_lr would have no effect",
            ),
        ]:
            with pytest.raises(GraphflowsError, match=message):
                Schedule(**option)
        with pytest.raises(GraphflowsError, match="Expected on_epoch to be a function"):
            Progress(on_epoch=3)

    def test_abbreviations(self, x):
        for schedule in ("20", 2.0, True):
            with pytest.raises(GraphflowsError, match="a number of epochs or a Schedule"):
                quiet_fit(normal_model, LinearGuide(), x, schedule=schedule)
        with pytest.raises(GraphflowsError, match=r"Progress\(on_epoch=function\)"):
            fit(normal_model, LinearGuide(), x, schedule=1, progress=lambda history: None)
        with pytest.raises(GraphflowsError, match="Expected the path of a checkpoint"):
            quiet_fit(normal_model, LinearGuide(), x, schedule=1, checkpoint=3)
        with pytest.raises(TypeError, match="num_epochs"):
            fit(normal_model, LinearGuide(), x, num_epochs=1)

    def test_what_they_say(self):
        assert repr(Schedule(20)) == "Schedule(num_epochs=20)"
        assert (
            repr(Schedule(num_steps=5, min_lr=1e-4))
            == "Schedule(num_epochs=None, num_steps=5, min_lr=0.0001)"
        )
        assert repr(Progress(bar=False)) == "Progress(bar=False, on_epoch=None)"


def test_a_number_of_steps(x):
    """7 steps of 3 batches an epoch: two epochs and a third of the next."""
    data = TrainingData(x, batch_size=100)
    history = quiet_fit(normal_model, LinearGuide(), data, schedule=Schedule(num_steps=7))
    assert (len(history), history.num_steps, history.stop_reason) == (3, 7, "all 7 steps done")
    earlier = quiet_fit(normal_model, LinearGuide(), data, schedule=Schedule(2, num_steps=7))
    assert (len(earlier), earlier.stop_reason) == (2, "all 2 epochs done")
    assert history.loss[:2] == earlier.loss


def test_short_epochs_are_judged_together():
    """All data are one step, whose loss is noise to who watches it: 500 epochs still end near the optimum."""
    x = 3.0 + torch.randn(50)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    history = quiet_fit(model, pyro.infer.autoguide.AutoNormal(model), x, optimizer=2e-2, schedule=500)
    assert history.num_steps == 500
    deviation = (50 + 1e-2) ** -0.5
    found = pyro.param("AutoNormal.locs.mean").item()
    assert abs(found - 50 * x.mean().item() * deviation**2) < deviation


def test_epochs_of_several_passes(x):
    """A step of all data alone is too short an epoch to judge by: several passes make one."""
    one = quiet_fit(normal_model, LinearGuide(), x, schedule=Schedule(6))
    history = quiet_fit(normal_model, LinearGuide(), x, schedule=Schedule(2, steps_per_epoch=9))
    assert history.num_steps == 2 * 9  # 3 batches of 100, 100 and 30 make three whole passes
    assert history.loss == pytest.approx([sum(one.loss[:3]) / 3, sum(one.loss[3:]) / 3])
    whole = quiet_fit(normal_model, LinearGuide(), x, schedule=Schedule(1, steps_per_epoch=4))
    assert whole.num_steps == 6


def test_without_a_number_the_rate_ends_it(x):
    history = quiet_fit(
        normal_model, LinearGuide(), x, schedule=Schedule(patience=1, min_lr=1e-3, lr_factor=0.1)
    )
    assert history.stop_reason == "the learning rate fell below 0.001"


def test_arrays_datasets_and_tensors_train_the_same(x):
    def train(data):
        guide = LinearGuide()
        return quiet_fit(normal_model, guide, data, schedule=3).loss

    expected = train(x)
    assert train(x.numpy()) == expected
    assert train({"x": x.numpy()}) == expected
    assert train(TensorDataset(x)) == expected
    assert train(Subset(TensorDataset(x), range(len(x)))) == expected


def test_a_model_that_holds_its_data(x):
    guide = LinearGuide()
    data = TrainingData(kwargs={"x": x}, full_size=len(x))
    history = quiet_fit(normal_model, guide, data, optimizer=Adam, schedule=Schedule(3, patience=None))
    assert history.num_steps == 300
    check_linear(guide, 0.12)
    assert history.loss[-1] == pytest.approx(-normal_evidence(x).mean().item(), abs=0.1)


# ------------------------------------------------------------------------------------------- which parameters remain
def test_validation_keeps_the_best_epoch(x):
    guide, states = LinearGuide(), []

    def remember(history):
        states.append(ParameterSet(guide=guide).state())

    history = quiet_fit(
        normal_model,
        guide,
        TrainingData(x[:30], validation=x[30:]),
        optimizer=0.5,
        schedule=Schedule(12, patience=None),
        progress=Progress(bar=False, on_epoch=remember),
    )
    best = min(range(12), key=lambda epoch: history.validation_loss[epoch])
    assert history.best_epoch == best
    assert all(
        torch.equal(value, states[best][name]) for name, value in ParameterSet(guide=guide).state().items()
    )
    assert len(history.validation_loss) == len(history.seconds) == 12
    assert history.seconds == sorted(history.seconds)


def test_without_validation_the_last_epoch_remains(x):
    guide, states = LinearGuide(), []
    quiet_fit(
        normal_model,
        guide,
        x,
        schedule=3,
        progress=Progress(bar=False, on_epoch=lambda _: states.append(guide.slope.item()) or False),
    )
    assert guide.slope.item() == states[-1]


def test_validation_uses_the_same_random_numbers_and_evaluation_mode(x):
    guide = LinearGuide()
    history = quiet_fit(
        normal_model, guide, TrainingData(x, validation=x), optimizer=0.0, schedule=Schedule(3, patience=None)
    )
    assert len(set(history.validation_loss)) == 1
    assert len(set(history.loss)) == 3

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(0.0))
            self.dropout = nn.Dropout(0.9)
            self.modes = []

        def forward(self, x):
            self.modes.append(self.training)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.dropout(x) / 2 + self.shift, 0.5**0.5))

    noisy = Noisy()
    history = quiet_fit(normal_model, noisy, TrainingData(x, validation=x), optimizer=0.0, schedule=1)
    assert history.validation_loss[0] == pytest.approx(-normal_evidence(x).mean().item())
    assert history.loss[0] > history.validation_loss[0] + 0.1
    assert noisy.modes == [False] * 2 + [True] * 3 + [False] * 3
    assert noisy.training


def test_on_epoch_stops_and_does_not_disturb(x):
    def train(on_epoch):
        guide = LinearGuide()
        history = quiet_fit(
            normal_model, guide, x, schedule=4, progress=Progress(bar=False, on_epoch=on_epoch)
        )
        return history, guide.slope.item()

    plain, slope = train(None)
    drawn, same = train(lambda history: torch.randn(3).sum() > math.inf)
    assert slope == same
    assert plain.loss == drawn.loss
    stopped, _ = train(lambda history: len(history) == 2)
    assert stopped.stop_reason == "on_epoch asked to stop"
    assert len(stopped) == 2


def test_the_seed_decides_and_the_global_generator_is_left_alone(x):
    def train(seed):
        guide = LinearGuide()
        quiet_fit(normal_model, guide, x, seed=seed, schedule=2)
        return guide.slope.item()

    before = torch.get_rng_state()
    first = train(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert train(1) == first
    assert train(2) != first
    unseeded = train(None)
    assert not torch.equal(torch.get_rng_state(), before)
    assert train(None) != unseeded


def test_interruption_keeps_the_best_state(x):
    guide, states = LinearGuide(), []

    def interrupt(history):
        states.append(ParameterSet(guide=guide).state())
        if len(history) == 5:
            raise KeyboardInterrupt

    history = quiet_fit(
        normal_model, guide, x, optimizer=0.3, schedule=12, progress=Progress(bar=False, on_epoch=interrupt)
    )
    assert history.stop_reason == "interrupted"
    best = min(range(5), key=lambda epoch: history.loss[epoch])
    assert all(
        torch.equal(value, states[best][name]) for name, value in ParameterSet(guide=guide).state().items()
    )


def test_interruption_in_the_first_epoch_keeps_what_there_is(x):
    guide, calls = LinearGuide(), []

    def model(x):
        calls.append(1)
        if len(calls) == 4:  # the run that looks for parameters, two steps, and then
            raise KeyboardInterrupt
        normal_model(x)

    history = quiet_fit(model, guide, TrainingData(x, batch_size=50), schedule=3)
    assert history.stop_reason == "interrupted"
    assert len(history) == 0
    assert guide.slope.item() != 0.3


# -------------------------------------------------------------------------------------------------------- not finite
def lenient_model(x):
    """The normal model, without Pyro's check of observed values."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)


class TestNotFinite:
    def run(self, model, guide, x, match, *, on_epoch=None, validation=None):
        before = ParameterSet(model=model, guide=guide).state()
        with pytest.warns(GraphflowsWarning, match="Training stopped"):
            history = fit(
                model,
                guide,
                TrainingData(x, batch_size=50, validation=validation),
                schedule=6,
                progress=Progress(bar=False, on_epoch=on_epoch),
            )
        assert history.stop_reason.startswith("not finite in epoch")
        assert match in history.stop_reason
        after = ParameterSet(model=model, guide=guide).state()
        assert all(bool(value.isfinite().all()) for value in after.values())
        return history, before, after

    def test_a_nan_in_the_data_names_the_observed_site(self, x):
        order = torch.randperm(
            230, generator=torch.Generator().manual_seed(0)
        )  # the order of the first epoch
        x[order[60]] = math.nan  # in the second batch
        guide = LinearGuide()

        def blind(x=None):
            guide(torch.nan_to_num(x))

        expected = "first the value of site 'x' in the model (1 of 50 elements; 1 of the data)"
        history, _, _ = self.run(lenient_model, blind, x, expected)
        assert len(history) == 0

    def test_before_the_first_step_it_is_an_error(self, x):
        x[:] = math.nan
        with pytest.raises(
            GraphflowsError,
            match=r"before the first step, .* 'z' in the guide .*; 100 of the data\) is not finite",
        ):
            quiet_fit(normal_model, LinearGuide(), x, schedule=1)
        guide = LinearGuide()
        with pytest.raises(
            GraphflowsError, match="before the first step, the loss is nan; first the value of site 'x'"
        ):
            quiet_fit(lenient_model, lambda x: guide(torch.nan_to_num(x)), x, schedule=1)

    def test_the_guide_is_named_first(self, x):
        """log_scale becomes huge at the third epoch: the guide's own site is the first that is not finite."""
        guide, states = LinearGuide(), []

        def explode(history):
            states.append(ParameterSet(guide=guide).state())
            if len(history) == 3:
                with torch.no_grad():
                    guide.log_scale.fill_(1000.0)

        history, _, after = self.run(normal_model, guide, x, "site 'z' in the guide", on_epoch=explode)
        assert len(history) == 3
        best = states[history.best_epoch]
        assert all(torch.equal(after[name], best[name]) for name in best)

    def test_the_models_log_density_is_named(self, x):
        """An observation without density: log p = -inf at a site whose value is finite."""
        order = torch.randperm(230, generator=torch.Generator().manual_seed(0))
        x = x.abs() + 0.1
        x[order[60]] = -1.0

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Exponential(z.exp(), validate_args=False).mask(x > 0), obs=x)
                pyro.factor("positive", torch.where(x > 0, 0.0, -math.inf))

        self.run(
            model,
            LinearGuide(),
            x,
            "first the log-density of site 'positive' in the model (1 of 50 elements)",
        )

    def test_gradients_alone(self, x):
        """sqrt at zero has a finite value and an infinite slope."""

        class Guide(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.tensor(0.0))

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(x / 2 + self.weight.abs().sqrt(), 1.0))

        _, before, after = self.run(normal_model, Guide(), x, "gradient of ['guide.weight']")
        assert torch.equal(before["guide.weight"], after["guide.weight"])

    def test_under_inference_compilation(self):
        guide = LinearGuide()

        def explode(history):
            with torch.no_grad():
                guide.log_scale.fill_(-1000.0)

        with pytest.warns(GraphflowsWarning, match="site 'z' in the guide"):
            quiet_fit(
                TestInferenceCompilation.model,
                guide,
                loss=InferenceCompilation,
                schedule=Schedule(3, steps_per_epoch=2),
                progress=Progress(bar=False, on_epoch=explode),
            )
        assert guide.log_scale.item() > -10

    def test_in_validation(self, x):
        bad = x[:20].clone()
        bad[3] = math.inf
        guide = LinearGuide()
        expected = "in validation, the loss is nan; first the value of site 'x'"
        self.run(lenient_model, lambda x: guide(torch.nan_to_num(x, posinf=0.0)), x, expected, validation=bad)

    def test_other_errors_are_raised(self, x):
        calls = []

        def model(x):
            calls.append(1)
            if len(calls) > 3:
                raise ValueError("something else")
            normal_model(x)

        with pytest.raises(ValueError, match="something else"):
            quiet_fit(model, LinearGuide(), x, schedule=3)


# ------------------------------------------------------------------------------------------------------- checkpoints
class Killed(Exception):
    pass


def noisy_run(path, num_epochs=8, kill=None, every=1):
    """A run with everything that must be restored: order, noise, dropout, running statistics, schedule, best state."""
    pyro.clear_param_store()
    torch.manual_seed(5)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.BatchNorm1d(1), nn.Linear(1, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 2)
            )

        def forward(self, x):
            loc, log_scale = self.net(x[:, None]).unbind(-1)
            extra = pyro.param("extra", torch.tensor(1.0), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, extra * log_scale.exp()))

    def on_epoch(history):
        if kill is not None and len(history) == kill:
            raise Killed

    guide = Guide()
    data = torch.randn(57)
    history = quiet_fit(
        normal_model,
        guide,
        TrainingData(data[:40], batch_size=16, validation=data[40:]),
        optimizer=0.02,
        schedule=Schedule(num_epochs, patience=2),
        checkpoint=Checkpoint(path, every=every),
        progress=Progress(bar=False, on_epoch=on_epoch),
    )
    return history, ParameterSet(guide=guide).state() | {"extra": pyro.param("extra").detach().clone()}


def assert_same(first, second):
    (history, state), (other_history, other_state) = first, second
    assert history.loss == other_history.loss
    assert history.validation_loss == other_history.validation_loss
    assert history.learning_rate == other_history.learning_rate
    assert (history.best_epoch, history.num_steps) == (other_history.best_epoch, other_history.num_steps)
    assert all(torch.equal(state[name], other_state[name]) for name in state)


class TestCheckpoints:
    @pytest.mark.parametrize("kill", [1, 4, 7])
    def test_interrupted_and_resumed_equals_uninterrupted(self, tmp_path, kill):
        """Bit for bit: losses, rates, parameters, running statistics."""
        whole = noisy_run(tmp_path / "whole.pt")
        with pytest.raises(Killed):
            noisy_run(tmp_path / "parts.pt", kill=kill + 1)  # dies in epoch kill + 1, before its checkpoint
        assert len(load_checkpoint(tmp_path / "parts.pt")["history"]["loss"]) == kill
        assert_same(whole, noisy_run(tmp_path / "parts.pt"))

    def test_more_epochs_later(self, tmp_path):
        whole = noisy_run(tmp_path / "whole.pt")
        noisy_run(tmp_path / "parts.pt", num_epochs=3)
        resumed = noisy_run(tmp_path / "parts.pt")
        assert_same(whole, resumed)
        again = noisy_run(tmp_path / "parts.pt")  # nothing left to do
        assert_same(whole, again)
        assert again[0].stop_reason == "all 8 epochs done"

    def test_checkpoint_every_few_epochs(self, tmp_path):
        whole = noisy_run(tmp_path / "whole.pt", every=3)
        with pytest.raises(Killed):
            noisy_run(tmp_path / "parts.pt", kill=6, every=3)
        assert len(load_checkpoint(tmp_path / "parts.pt")["history"]["loss"]) == 3
        assert_same(whole, noisy_run(tmp_path / "parts.pt", every=3))

    def test_files_that_are_no_checkpoints_are_refused_and_left_alone(self, tmp_path, x):
        path = tmp_path / "run.pt"
        for kind, content in (("damaged", b"PK\x03\x04 half of"), ("another", b"no checkpoint")):
            path.write_bytes(content)
            with pytest.raises(GraphflowsError, match=rf"fit\(checkpoint=\) at .* {kind}"):
                quiet_fit(normal_model, LinearGuide(), x, optimizer=1e-2, checkpoint=path)
            assert path.read_bytes() == content
        torch.save(LinearGuide().state_dict(), path)
        with pytest.raises(GraphflowsError, match="it is another"):
            quiet_fit(normal_model, LinearGuide(), x, optimizer=1e-2, checkpoint=path)

    def test_a_finished_run_stays_finished(self, tmp_path, x):
        guide = LinearGuide()
        options = {
            "optimizer": 1e-5,
            "schedule": Schedule(100, patience=1, min_lr=1e-6),
            "checkpoint": tmp_path / "run.pt",
        }
        data = TrainingData(x, validation=x)
        first = quiet_fit(normal_model, guide, data, **options)
        assert first.stop_reason == "the learning rate fell below 1e-06"
        state = ParameterSet(guide=guide).state()
        guide = LinearGuide()
        second = quiet_fit(normal_model, guide, data, **options)
        assert second == first
        assert all(
            torch.equal(value, state[name]) for name, value in ParameterSet(guide=guide).state().items()
        )

    def test_loaders_with_a_global_and_with_their_own_generator(self, tmp_path, x):
        for own in (False, True):

            def train(name, num_epochs, own=own):
                guide = LinearGuide()
                generator = torch.Generator().manual_seed(1) if own else None
                loader = DataLoader(TensorDataset(x), batch_size=60, shuffle=True, generator=generator)
                history = quiet_fit(
                    normal_model, guide, loader, schedule=num_epochs, checkpoint=tmp_path / f"{name}{own}.pt"
                )
                return history, ParameterSet(guide=guide).state()

            whole = train("whole", 4)
            train("parts", 2)
            assert_same(whole, train("parts", 4))

    def test_inference_compilation_resumes_too(self, tmp_path):
        def train(name, num_epochs):
            guide = LinearGuide()
            history = quiet_fit(
                TestInferenceCompilation.model,
                guide,
                TrainingData(validation=2),
                loss=InferenceCompilation(TestInferenceCompilation.model, guide, batch_size=20),
                schedule=Schedule(num_epochs, steps_per_epoch=5),
                checkpoint=tmp_path / name,
            )
            return history, ParameterSet(guide=guide).state()

        whole = train("whole.pt", 4)
        train("parts.pt", 2)
        assert_same(whole, train("parts.pt", 4))

    def test_vectorised_particles_resume_too(self, tmp_path, x):
        """Pyro's losses find the plate nesting in a run of their own, which must not move the generator."""

        def train(name, num_epochs):
            guide = LinearGuide()
            history = quiet_fit(
                normal_model,
                guide,
                x,
                loss=Trace_ELBO(num_particles=2, vectorize_particles=True),
                schedule=num_epochs,
                checkpoint=tmp_path / name,
            )
            return history, ParameterSet(guide=guide).state()

        whole = train("whole.pt", 4)
        train("parts.pt", 2)
        assert_same(whole, train("parts.pt", 4))

    def test_of_another_run(self, tmp_path, x):
        options = {"schedule": 1, "checkpoint": tmp_path / "run.pt"}
        quiet_fit(normal_model, LinearGuide(), x, **options)
        with pytest.raises(
            GraphflowsError, match=r"belongs to another run: \['batch_size', 'num_batches'\] differ"
        ):
            quiet_fit(normal_model, LinearGuide(), TrainingData(x, batch_size=7), **options)
        with pytest.raises(GraphflowsError, match=r"\['parameters'\] differ"):
            quiet_fit(normal_model, Everything().guide, x, **options)
        options["checkpoint"] = Checkpoint(tmp_path / "run.pt", resume=False)
        fresh = quiet_fit(normal_model, LinearGuide(), TrainingData(x, batch_size=7), **options)
        assert len(fresh) == 1
        assert load_checkpoint(tmp_path / "run.pt")["settings"]["batch_size"] == 7


def test_effect_handlers_around_the_programs(x):
    guide = LinearGuide()
    model = poutine.scale(poutine.mask(normal_model, mask=True), scale=1.0)
    quiet_fit(model, poutine.scale(guide, scale=1.0), x, optimizer=Adam, schedule=30)
    check_linear(guide, 0.12)


def test_progress_bar(x, capsys):
    fit(normal_model, LinearGuide(), TrainingData(x, validation=x), schedule=2)
    shown = capsys.readouterr().err
    assert "epoch 2/2" in shown
    assert "6/6" in shown
    assert "validation" in shown
    quiet_fit(normal_model, LinearGuide(), x, schedule=2)
    assert capsys.readouterr().err == ""


def test_histories():
    history = History(loss=[1.0, 2.0], validation_loss=[3.0, 4.0])
    assert len(history) == 2
    assert history.monitored == [3.0, 4.0]
    assert History(loss=[1.0]).monitored == [1.0]
    assert repr(History(stop_reason="interrupted")) == "History(no epoch completed; interrupted)"
    done = History([1.0, 2.0], [], [0.1, 0.1], [1.0, 2.5], 20, 0, "all 2 epochs done")
    assert repr(done) == (
        "History(2 epochs, 20 steps, 2.5 s; loss 1 -> 2, best 1 in epoch 0; all 2 epochs done)"
    )
