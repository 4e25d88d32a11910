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
from torch.utils.data import DataLoader, TensorDataset

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.infer.batches import Batches
from pyro_graphflows.infer.checkpoints import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    seeded,
    set_random_state,
)
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.parameters import ParameterSet
from pyro_graphflows.infer.training import History, fit

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
    history = quiet_fit(normal_model, guide, x, loss=loss, optimizer=Adam, num_epochs=40, batch_size=50)
    check_linear(guide, 0.12)
    assert len(history) == 40
    assert history.num_steps == 200
    if not isinstance(loss, TraceMeanField_ELBO):
        assert history.loss[-1] == pytest.approx(-normal_evidence(x).mean().item(), abs=0.1)


def test_losses_in_parts(x):
    guide = LinearGuide()
    loss = ReweightedWakeSleep(num_particles=5, vectorize_particles=True)
    history = quiet_fit(normal_model, guide, x, loss=loss, optimizer=Adam, num_epochs=30, batch_size=50)
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
        quiet_fit(normal_model, module.guide, x, optimizer=Adam, num_epochs=30)
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
    quiet_fit(normal_model, guide, x, optimizer=Adam, num_epochs=20)
    assert guide.slope.item() == pytest.approx(0.5, abs=0.05)


def test_functions_with_param_statements_and_a_stale_store(x):
    """A parameter of this name, left in the store by an earlier model, is what Pyro uses: so it is trained."""
    pyro.param("slope", torch.tensor(0.9))

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.5**0.5))

    quiet_fit(normal_model, guide, x, optimizer=Adam, num_epochs=30)
    assert pyro.param("slope").item() == pytest.approx(0.5, abs=0.05)


def test_a_fresh_module_beside_a_stale_store(x):
    """pyro.module announces the parameters of an earlier module of the same name: they are not those in use."""
    quiet_fit(normal_model, LinearGuide(), x, optimizer=Adam, num_epochs=1)
    guide = LinearGuide()
    quiet_fit(normal_model, guide, x, optimizer=Adam, num_epochs=40)
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

    quiet_fit(model, guide, data, optimizer=Adam, num_epochs=60)
    assert pyro.param("loc").item() == pytest.approx(data.mean().item(), abs=0.05)


def test_parameters_that_appear_in_mid_training(x):
    calls = []

    def guide(x):
        calls.append(1)
        slope = pyro.param("slope", torch.tensor(0.5))
        shift = pyro.param("shift", torch.tensor(0.5)) if len(calls) > 10 else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x + shift, 0.5**0.5))

    quiet_fit(normal_model, guide, x, optimizer=Adam, num_epochs=40)
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
            loss=loss,
            batch_size=200,
            optimizer=Adam,
            num_epochs=5,
            steps_per_epoch=40,
            validation=3,
        )
        check_linear(guide)
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
            torch.randn(120),
            loss=InferenceCompilation,
            batch_size=40,
            optimizer=Adam,
            num_epochs=25,
        )
        assert pyro.param("weight").item() == pytest.approx(0.5, abs=0.03)
        assert history.loss[-1] == pytest.approx(0.5 * math.log(2 * math.pi * math.e / 2), abs=0.05)

    def test_of_another_pair(self):
        compilation = InferenceCompilation(self.model, LinearGuide())
        with pytest.raises(GraphflowsError, match="got one of another pair"):
            quiet_fit(self.model, LinearGuide(), loss=compilation, num_epochs=1)


# --------------------------------------------------------------------------------------------------------- per datum
def test_loss_is_per_datum_with_a_smaller_last_batch():
    """With the exact posterior every batch's ELBO is its log evidence: the epoch's loss is the mean over all data."""
    chain = Chain(num_data=23)
    parameter = nn.Parameter(torch.tensor(0.0))

    def model(x, c):
        chain.model(x, c + 0 * pyro.param("nothing", parameter))

    for batch_size in (5, 10, 23, 100):
        history = quiet_fit(model, chain.guide, chain.args, batch_size=batch_size, num_epochs=2)
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
        torch.zeros(20_000),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        num_epochs=1,
        batch_size=20_000,
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
            hierarchy.x,
            batch_size=batch_size,
            num_epochs=60,
            data_size=40,
            patience=None,
            optimizer=0.0,
        )
    means = [torch.tensor(h.loss).mean().item() for h in history.values()]
    assert means[0] == pytest.approx(means[1], abs=0.05)


def test_global_latents_in_self_sufficient_batches_warn():
    hierarchy = Hierarchy(num_data=40)
    parameter = nn.Parameter(torch.tensor(0.0))

    def guide(x):
        hierarchy.guide(x + 0 * pyro.param("nothing", parameter))

    with pytest.warns(GraphflowsWarning, match=r"\['mu'\] are global"):
        quiet_fit(hierarchy.model, guide, hierarchy.x, batch_size=10, num_epochs=1)
    quiet_fit(hierarchy.model, guide, hierarchy.x, num_epochs=1)  # all data at once: no warning


# -------------------------------------------------------------------------------------------------------------- data
class TestBatches:
    def test_each_datum_once_per_epoch_in_a_new_order(self):
        batches = Batches(torch.arange(10), 4, shuffle=True)
        first, second = ([batch.args[0] for batch in batches] for _ in range(2))
        assert [len(batch) for batch in first] == [4, 4, 2]
        assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == list(range(10))
        assert torch.cat(first).tolist() != torch.cat(second).tolist()
        assert len(batches) == 3

    def test_the_order_can_be_continued(self):
        batches = Batches(torch.arange(10), 4, shuffle=True)
        list(batches)
        state = batches.state()
        expected = [batch.args[0] for batch in batches]
        batches.load(state)
        assert all(torch.equal(a, b.args[0]) for a, b in zip(expected, batches, strict=True))
        batches.load(state)
        batches.first()
        assert torch.equal(next(iter(batches)).args[0], expected[0])

    def test_tensors_mappings_and_loaders_agree(self):
        x, y = torch.arange(6.0), torch.arange(12.0).reshape(6, 2)
        for data in ([x, y], (x, y), {"x": x, "y": y}, DataLoader(TensorDataset(x, y), batch_size=4)):
            batches = list(Batches(data, 4))
            values = [[*batch.args, *batch.kwargs.values()] for batch in batches]
            assert [batch.size for batch in batches] == [4, 2]
            assert torch.equal(torch.cat([value[0] for value in values]), x)
            assert torch.equal(torch.cat([value[1] for value in values]), y)
        assert list(batches[0].kwargs) == []
        assert list(next(iter(Batches({"x": x, "y": y}))).kwargs) == ["x", "y"]
        loader = [{"x": x[:4]}, {"x": x[4:]}]
        assert [list(batch.kwargs) for batch in Batches(loader)] == [["x"], ["x"]]

    def test_a_loader_with_its_own_generator_is_not_moved(self):
        loader = DataLoader(
            torch.arange(8), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3)
        )
        batches = Batches(loader)
        state = batches.state()
        batches.first()
        expected = [batch.args[0] for batch in batches]
        batches.load(state)
        assert all(torch.equal(a, b.args[0]) for a, b in zip(expected, batches, strict=True))

    def test_no_data(self):
        assert [batch.size for batch in Batches(None, steps=3)] == [1, 1, 1]
        assert len(Batches(2)) == len(list(Batches(2))) == 2

    def test_unequal_lengths(self):
        with pytest.raises(GraphflowsError, match=r"same positive number of data .* \[\(3,\), \(4,\)\]"):
            Batches([torch.zeros(3), torch.zeros(4)])
        with pytest.raises(GraphflowsError, match="same positive number of data"):
            Batches(torch.zeros(0))

    def test_other_kinds(self):
        with pytest.raises(GraphflowsError, match="An iterator runs dry"):
            Batches(iter([torch.zeros(3)]))
        with pytest.raises(GraphflowsError, match="Expected data to be tensors"):
            Batches(3.0)
        with pytest.raises(GraphflowsError, match="hold a tensor whose first dimension counts"):
            list(Batches([["a"], ["b"]]))


def test_mappings_reach_the_model_by_keyword(x):
    guide = LinearGuide()
    quiet_fit(normal_model, guide, {"x": x}, optimizer=Adam, num_epochs=2)
    loader = DataLoader(TensorDataset(x), batch_size=50, shuffle=True)
    history = quiet_fit(normal_model, guide, loader, optimizer=Adam, num_epochs=40, validation=x)
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

    quiet_fit(model, guide, torch.zeros(3), num_epochs=1, model_kwargs={"factor": 7})
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
        num_epochs=1000,
        patience=3,
        optimizer=1e-3,
        min_lr=1e-5,
        lr_factor=0.1,
    )
    assert history.stop_reason == "the learning rate fell below 1e-05"
    # the first epoch improves on infinity; then 3 at each of 1e-3, 1e-4, 1e-5
    assert history.learning_rate == pytest.approx([1e-3] * 4 + [1e-4] * 3 + [1e-5] * 3)
    forever = quiet_fit(model, chain.guide, chain.args, num_epochs=30, patience=None)
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
    quiet_fit(normal_model, guide, x, optimizer=optimizer, num_epochs=5)
    assert guide.shift.item() != 0.1
    per_parameter = isinstance(optimizer, pyro.optim.PyroOptim) and callable(optimizer.pt_optim_args)
    assert (guide.slope.item() == 0.3) == per_parameter


def test_a_torch_optimiser_trains_what_it_holds(x):
    guide = LinearGuide()
    quiet_fit(normal_model, guide, x, optimizer=torch.optim.Adam([guide.shift], lr=0.05), num_epochs=5)
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
        quiet_fit(normal_model, LinearGuide(), x, optimizer=optimizer, num_epochs=1)


def test_clipping(x):
    guide = LinearGuide(shift=5.0)
    before = ParameterSet(guide=guide).state()
    quiet_fit(
        normal_model,
        guide,
        x,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        max_grad_norm=0.01,
        num_epochs=1,
        batch_size=230,
    )
    moved = [value - before[name] for name, value in ParameterSet(guide=guide).state().items()]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01)


@pytest.mark.parametrize("loss", [Trace_ELBO, 3, lambda: 1.0])
def test_other_losses_are_refused(x, loss):
    with pytest.raises(GraphflowsError, match="Expected loss to be an ELBO object"):
        quiet_fit(normal_model, LinearGuide(), x, loss=loss, num_epochs=1)


def test_nothing_to_train(x):
    with pytest.raises(GraphflowsError, match="nothing to train"):
        quiet_fit(normal_model, normal_posterior, x, num_epochs=1)


def test_disabled_gradients_are_refused(x):
    with torch.no_grad(), pytest.raises(GraphflowsError, match="Expected gradients to be enabled"):
        quiet_fit(normal_model, LinearGuide(), x, num_epochs=1)


def test_numbers_must_make_sense(x):
    with pytest.raises(GraphflowsError, match="Expected num_epochs >= 0"):
        quiet_fit(normal_model, LinearGuide(), x, num_epochs=-1)


# ------------------------------------------------------------------------------------------- which parameters remain
def test_validation_keeps_the_best_epoch(x):
    guide, states = LinearGuide(), []

    def remember(history):
        states.append(ParameterSet(guide=guide).state())

    history = quiet_fit(
        normal_model,
        guide,
        x[:30],
        validation=x[30:],
        optimizer=0.5,
        num_epochs=12,
        on_epoch=remember,
        patience=None,
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
        normal_model, guide, x, num_epochs=3, on_epoch=lambda _: states.append(guide.slope.item()) or False
    )
    assert guide.slope.item() == states[-1]


def test_validation_uses_the_same_random_numbers_and_evaluation_mode(x):
    guide = LinearGuide()
    history = quiet_fit(normal_model, guide, x, validation=x, optimizer=0.0, num_epochs=3, patience=None)
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
    history = quiet_fit(normal_model, noisy, x, validation=x, optimizer=0.0, num_epochs=1)
    assert history.validation_loss[0] == pytest.approx(-normal_evidence(x).mean().item())
    assert history.loss[0] > history.validation_loss[0] + 0.1
    assert noisy.modes == [False] * 2 + [True] * 3 + [False] * 3
    assert noisy.training


def test_on_epoch_stops_and_does_not_disturb(x):
    def train(on_epoch):
        guide = LinearGuide()
        history = quiet_fit(normal_model, guide, x, num_epochs=4, on_epoch=on_epoch)
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
        quiet_fit(normal_model, guide, x, num_epochs=2, seed=seed)
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

    history = quiet_fit(normal_model, guide, x, optimizer=0.3, num_epochs=12, on_epoch=interrupt)
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

    history = quiet_fit(model, guide, x, num_epochs=3, batch_size=50)
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
    def run(self, model, guide, x, match, **options):
        before = ParameterSet(model=model, guide=guide).state()
        with pytest.warns(GraphflowsWarning, match="Training stopped"):
            history = quiet_fit(model, guide, x, num_epochs=6, batch_size=50, **options)
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
            quiet_fit(normal_model, LinearGuide(), x, num_epochs=1)
        guide = LinearGuide()
        with pytest.raises(
            GraphflowsError, match="before the first step, the loss is nan; first the value of site 'x'"
        ):
            quiet_fit(lenient_model, lambda x: guide(torch.nan_to_num(x)), x, num_epochs=1)

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
                num_epochs=3,
                steps_per_epoch=2,
                on_epoch=explode,
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
            quiet_fit(model, LinearGuide(), x, num_epochs=3)


# ------------------------------------------------------------------------------------------------------- checkpoints
class Killed(Exception):
    pass


def noisy_run(path, num_epochs=8, kill=None, **options):
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
        data[:40],
        validation=data[40:],
        optimizer=0.02,
        batch_size=16,
        num_epochs=num_epochs,
        patience=2,
        checkpoint=path,
        on_epoch=on_epoch,
        **options,
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
        whole = noisy_run(tmp_path / "whole.pt", checkpoint_every=3)
        with pytest.raises(Killed):
            noisy_run(tmp_path / "parts.pt", kill=6, checkpoint_every=3)
        assert len(load_checkpoint(tmp_path / "parts.pt")["history"]["loss"]) == 3
        assert_same(whole, noisy_run(tmp_path / "parts.pt", checkpoint_every=3))

    def test_a_finished_run_stays_finished(self, tmp_path, x):
        guide = LinearGuide()
        options = {"checkpoint": tmp_path / "run.pt", "validation": x, "num_epochs": 100, "patience": 1}
        first = quiet_fit(normal_model, guide, x, optimizer=1e-5, min_lr=1e-6, **options)
        assert first.stop_reason == "the learning rate fell below 1e-06"
        state = ParameterSet(guide=guide).state()
        guide = LinearGuide()
        second = quiet_fit(normal_model, guide, x, optimizer=1e-5, min_lr=1e-6, **options)
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
                    normal_model,
                    guide,
                    loader,
                    num_epochs=num_epochs,
                    checkpoint=tmp_path / f"{name}{own}.pt",
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
                loss=InferenceCompilation,
                num_epochs=num_epochs,
                batch_size=20,
                steps_per_epoch=5,
                validation=2,
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
                num_epochs=num_epochs,
                checkpoint=tmp_path / name,
            )
            return history, ParameterSet(guide=guide).state()

        whole = train("whole.pt", 4)
        train("parts.pt", 2)
        assert_same(whole, train("parts.pt", 4))

    def test_of_another_run(self, tmp_path, x):
        options = {"num_epochs": 1, "checkpoint": tmp_path / "run.pt"}
        quiet_fit(normal_model, LinearGuide(), x, **options)
        with pytest.raises(
            GraphflowsError, match=r"belongs to another run: \['batch_size', 'num_batches'\] differ"
        ):
            quiet_fit(normal_model, LinearGuide(), x, batch_size=7, **options)
        with pytest.raises(GraphflowsError, match=r"\['parameters'\] differ"):
            quiet_fit(normal_model, Everything().guide, x, **options)
        fresh = quiet_fit(normal_model, LinearGuide(), x, batch_size=7, resume=False, **options)
        assert len(fresh) == 1
        assert load_checkpoint(tmp_path / "run.pt")["settings"]["batch_size"] == 7

    def test_writing_is_atomic(self, tmp_path, monkeypatch):
        path = tmp_path / "folder" / "run.pt"
        save_checkpoint({"a": torch.ones(2)}, path)

        def fail(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr("pyro_graphflows.infer.checkpoints.os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint({"a": torch.zeros(2)}, path)
        assert load_checkpoint(path)["a"].tolist() == [1.0, 1.0]
        assert [file.name for file in path.parent.iterdir()] == ["run.pt"]


def test_random_states_round_trip(tmp_path):
    import random

    import numpy as np

    def draw():
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002 - the global generator

    save_checkpoint(random_state(), tmp_path / "state.pt")
    expected = draw()
    with seeded(3):
        inside = draw()
    draw()
    with seeded(3):
        assert draw() == inside
    set_random_state(load_checkpoint(tmp_path / "state.pt"))
    assert draw() == expected


def test_parameter_states_must_fit():
    parameters = ParameterSet(guide=nn.Linear(2, 1))
    with pytest.raises(GraphflowsError, match=r"\['guide.weight'\] differ in name or shape"):
        parameters.load({"guide.weight": torch.zeros(1, 3), "guide.bias": torch.zeros(1)})
    with pytest.raises(GraphflowsError, match=r"\['guide.bias'\] differ"):
        parameters.load({"guide.weight": torch.zeros(1, 2)})


def test_effect_handlers_around_the_programs(x):
    guide = LinearGuide()
    model = poutine.scale(poutine.mask(normal_model, mask=True), scale=1.0)
    quiet_fit(model, poutine.scale(guide, scale=1.0), x, optimizer=Adam, num_epochs=30)
    check_linear(guide, 0.12)


def test_progress_bar(x, capsys):
    fit(normal_model, LinearGuide(), x, num_epochs=2, validation=x)
    shown = capsys.readouterr().err
    assert "epoch 2/2" in shown
    assert "6/6" in shown
    assert "validation" in shown
    quiet_fit(normal_model, LinearGuide(), x, num_epochs=2)
    assert capsys.readouterr().err == ""


def test_history_counts_epochs():
    history = History(loss=[1.0, 2.0], validation_loss=[3.0, 4.0])
    assert len(history) == 2
    assert history.monitored == [3.0, 4.0]
    assert History(loss=[1.0]).monitored == [1.0]
