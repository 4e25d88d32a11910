"""Compiled losses: the same as the programs' at the same noise, and given up with the reason where they are not."""

import logging
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyro_graphflows import GraphflowsError, auto_faithful_guide
from pyro_graphflows.capture import Captured, Draws
from pyro_graphflows.distributions import skewed_scores
from pyro_graphflows.guides import Flow
from pyro_graphflows.guides.conditionals.factors import unit_lower
from pyro_graphflows.infer import IWAE_ELBO, InferenceCompilation, Schedule, fit
from pyro_graphflows.infer import compiled as compiled_module
from pyro_graphflows.infer.checkpoints import seeded
from pyro_graphflows.infer.compiled import CompiledLoss, Compiler, Cost
from pyro_graphflows.recording import capture

SHORT = Schedule(num_steps=6, steps_per_epoch=3, patience=None)


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiled_module, "BACKEND", "eager")


def model(x, y=None):
    noise = pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(slope * x, 1.0))
        pyro.sample("y", dist.Normal(z, noise), obs=y)


def guide(x, y=None):
    loc = pyro.param("loc", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.4), constraint=dist.constraints.positive)
    weight = pyro.param("weight", torch.tensor(0.7))
    slope = pyro.sample("slope", dist.Normal(loc, scale))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * y + slope * x, 0.5))


def mixture(x, y=None):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 1.0])[k], 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def mixture_guide(x, y=None):
    weight = pyro.param("weight", torch.tensor(0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * y, 0.5))


def data(n=7):
    return torch.randn(n), torch.randn(n)


LOSSES = {
    "one particle": (model, guide, Trace_ELBO()),
    "two particles": (model, guide, Trace_ELBO(num_particles=2)),
    "three at a time": (model, guide, Trace_ELBO(num_particles=3, vectorize_particles=True)),
    "mean field": (model, guide, TraceMeanField_ELBO()),
    "Renyi": (model, guide, RenyiELBO(alpha=0.5, num_particles=2)),
    "enumerated": (mixture, mixture_guide, TraceEnum_ELBO()),
    "importance weighted": (model, guide, IWAE_ELBO(num_particles=3)),
}


@pytest.mark.parametrize("backend", ["eager", "torchscript"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_the_programs_at_the_same_noise(name, backend, monkeypatch):
    programs = LOSSES[name]
    loss = CompiledLoss(*programs, backend=backend)
    parameters = loss.parameters(*data())
    loss.loss_and_grads(*data())  # compiled here, with other data and parameters than below
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn_like(parameter))
            parameter.grad = None
    drawn = []
    draw = Captured.draw
    monkeypatch.setattr(Captured, "draw", lambda self: drawn.append((self.noise, draw(self))) or drawn[-1][1])
    args = data()
    found = loss.loss_and_grads(*args)
    gradients = [parameter.grad for parameter in parameters]
    assert loss.report.startswith("compiled"), loss.report
    for parameter in parameters:
        parameter.grad = None
    ((kinds, noise),) = drawn
    with Draws(dict(zip(kinds, noise, strict=True))):
        expected = programs[2].loss_and_grads(*programs[:2], *args)
    assert found == pytest.approx(expected, rel=1e-9)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-10)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients)


def test_the_mean_of_the_loss_is_that_without_compilation():
    args = data()
    compiled, plain = CompiledLoss(model, guide), Trace_ELBO()
    a = torch.tensor([compiled.loss_and_grads(*args) for _ in range(300)])
    b = torch.tensor([plain.loss(model, guide, *args) for _ in range(300)])
    assert compiled.report.startswith("compiled")
    error = (a.var() / len(a) + b.var() / len(b)).sqrt()
    assert (a.mean() - b.mean()).abs() < 4 * error


def test_gradients_are_added_to_those_that_are_there():
    args = data()
    loss = CompiledLoss(model, guide)
    parameters = loss.parameters(*args)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e6)
    loss.loss_and_grads(*args)
    assert all(0 < (parameter.grad - 1e6).abs() < 1e4 for parameter in parameters)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("normal", "eager"),
        ("normal", "torchscript"),
        ("spline", "torchscript"),
        pytest.param("spline", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_faithful_guides_are_compiled(family, backend):
    def network(x=None, n=5):
        with pyro.plate("data", n if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(z.tanh(), 0.5))
            pyro.sample("x", dist.Normal(w + z, 0.3), obs=x)

    loss = CompiledLoss(network, auto_faithful_guide(network, torch.randn(9), family=family), backend=backend)
    for _ in range(3):  # compared with the programs in the first two
        loss.loss_and_grads(torch.randn(9))
    assert loss.report.startswith("compiled"), loss.report


def _network(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.3), obs=x)


def test_skewed_priors_are_compiled():
    """Scores of gammas are found by iteration: by steps of a fixed number while a call is captured."""

    def rates(x):
        shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(shape, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    x = torch.tensor([0.0, 3.0, 1.0, 2.0])
    loss = CompiledLoss(rates, auto_faithful_guide(rates, x), backend="torchscript")
    for _ in range(4):  # compared with the programs in calls 1, 2 and 4
        assert math.isfinite(loss.loss_and_grads(x))
    assert loss.report.startswith("compiled"), loss.report


def test_where_captured_code_has_no_number_the_programs_are_asked(monkeypatch):
    monkeypatch.setattr(skewed_scores, "CAPTURED_STEPS", 1)  # too few

    def rates(x):
        rate = pyro.sample("rate", dist.Gamma(pyro.param("shape", torch.tensor(3.0)), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)

    def own(x):
        score = pyro.sample(
            "score", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0), infer={"is_auxiliary": True}
        )
        value = skewed_scores.unscore(
            skewed_scores.LogGamma(torch.tensor([3.0]).double()), score.double().reshape(1)
        )
        pyro.sample("rate", dist.Delta(value.exp().reshape(()).to(score), log_density=torch.zeros(())))

    x = torch.tensor(4.0)
    loss = CompiledLoss(rates, own, backend="torchscript")
    values = [loss.loss_and_grads(x) for _ in range(6)]
    assert loss.report.startswith("compiled"), loss.report
    assert all(map(math.isfinite, values))
    assert torch.isfinite(pyro.get_param_store()._params["loc"].grad)


def test_what_cannot_be_captured_is_found_inside_of_errors_of_pyro():
    """Pyro puts what a density raises into an error of its own."""

    class WithoutNegatives(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) - value[value > 0.0].sum()

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", WithoutNegatives(z, 1.0).mask(True), obs=x + 0.0 * z)

    x = torch.randn(10)
    loss = CompiledLoss(model, auto_faithful_guide(model, x), backend="torchscript")
    assert math.isfinite(loss.loss_and_grads(x))
    assert loss.report.startswith("not compiled: the shape of index depends on values")


def test_indices_that_are_made_of_no_data_are_captured():
    """A mask of the elements below the diagonal has the same number of them in every call."""

    def correlations(x):
        factor = pyro.sample("factor", dist.LKJCholesky(3, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=factor), obs=x)

    x = torch.randn(10, 3)
    loss = CompiledLoss(correlations, auto_faithful_guide(correlations, x), backend="torchscript")
    for _ in range(3):  # compared with the programs
        assert math.isfinite(loss.loss_and_grads(x))
    assert loss.report.startswith("compiled")


def test_faithful_flows_are_compiled():
    x = torch.randn(9)
    loss = CompiledLoss(_network, auto_faithful_guide(_network, x, family="flow"))
    optimizer = torch.optim.Adam(loss.parameters(x), lr=1e-2)
    for _ in range(4):  # compared with the programs in calls 1, 2 and 4, at other parameters each
        optimizer.zero_grad()
        loss.loss_and_grads(x)
        optimizer.step()
    assert loss.report.startswith("compiled"), loss.report


def test_networks_below_a_bound_are_computed_as_they_are_and_the_report_says_where():
    x = torch.randn(9)
    guide_of_bounds = auto_faithful_guide(_network, x, family=Flow(form="graphical"))
    loss = CompiledLoss(_network, guide_of_bounds)
    parameters = loss.parameters(x)
    assert isinstance(loss.loss_and_grads(x), float)
    assert loss.report.startswith("not compiled: a number is read out of a tensor"), loss.report
    assert "lipschitz.py" in loss.report
    assert any(parameter.grad is not None for parameter in parameters)


def test_inference_compilation_is_compiled():
    def network(x=None, n=5):
        with pyro.plate("data", n if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    net = auto_faithful_guide(network, torch.randn(9))
    loss = CompiledLoss(network, net, InferenceCompilation(network, net))
    losses = torch.tensor([loss.loss_and_grads() for _ in range(4)])
    assert loss.report.startswith("compiled"), loss.report
    assert losses.unique().numel() == 4  # data are drawn in each call


# ------------------------------------------------------------------------------------------------- given up
def test_a_python_value_that_changes_is_noticed_and_nothing_is_lost():
    weight = [1.0]

    def annealed(x, y=None):
        with pyro.poutine.scale(scale=weight[0]):
            model(x, y)

    loss = CompiledLoss(annealed, guide)
    args = data()
    parameters = loss.parameters(*args)
    loss.loss_and_grads(*args)
    assert loss.report.startswith("compiled")
    weight[0] = 3.0
    before = [parameter.grad.clone() for parameter in parameters]
    loss.loss_and_grads(*args)  # the second call is compared
    assert loss.report.startswith("not compiled: in step 2 of the compiled code the loss is"), loss.report
    assert any((p.grad - g).abs() > 1e-6 for p, g in zip(parameters, before, strict=True))


def test_statistics_of_batches_are_not_compiled_and_are_left_as_they_are():
    class Encoder(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)

        def forward(self, x, y=None):
            loc = self.norm(y[:, None])[:, 0]
            slope = pyro.sample("slope", dist.Normal(loc.mean(), 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc + slope * x, 0.5))

    encoder = Encoder()
    loss = CompiledLoss(model, encoder)
    loss.parameters(*data())
    before = encoder.norm.num_batches_tracked.item()
    loss.loss_and_grads(*data())
    assert "write to a tensor in place" in loss.report, loss.report
    assert encoder.norm.num_batches_tracked.item() == before + 1


def test_a_branch_on_the_data_is_not_compiled_and_the_report_says_where():
    def branching(x, y=None):
        model(x if x.sum() > 0 else -x, y)

    loss = CompiledLoss(branching, guide)
    assert isinstance(loss.loss_and_grads(*data()), float)
    assert "test_infer_compiled.py" in loss.report
    assert "x.sum() > 0" in loss.report


@pytest.mark.parametrize(
    "read",
    [lambda y: y.tolist(), lambda y: y.numpy(), lambda y: np.asarray(y)],
    ids=["list", "numpy", "asarray"],
)
def test_data_in_lists_and_arrays_are_those_of_each_call(read):
    def listing(x, y=None):
        model(x, torch.as_tensor(read(y)))

    x, y = data()
    loss = CompiledLoss(listing, guide, backend="torchscript")
    for _ in range(2):  # compared calls
        loss.loss_and_grads(x, y)
    assert "test_infer_compiled.py" in loss.report, loss.report
    far = sum(loss.loss_and_grads(x, y + 1e3) for _ in range(5)) / 5
    expected = sum(Trace_ELBO().loss(model, guide, x, y + 1e3) for _ in range(5)) / 5
    assert abs(far - expected) < 0.1 * expected


def test_every_shape_is_compiled_up_to_a_number(monkeypatch):
    monkeypatch.setattr(compiled_module, "MOST_SHAPES", 2)
    loss = CompiledLoss(model, guide)
    for n in (1, 2):
        loss.loss_and_grads(*data(n))
        assert loss.report.startswith("compiled")
    loss.loss_and_grads(*data(50))
    assert "more than 2 shapes" in loss.report
    assert isinstance(loss.loss_and_grads(*data(1)), float)


def test_arguments_that_could_change_unseen_are_not_compiled():
    class Data:
        def __init__(self):
            self.x, self.y = data()

    loss = CompiledLoss(lambda d: model(d.x, d.y), lambda d: guide(d.x, d.y))
    assert isinstance(loss.loss_and_grads(Data()), float)
    assert "an argument is neither a tensor nor a plain value" in loss.report


def test_unknown_backends_are_refused():
    with pytest.raises(
        GraphflowsError, match=r"Expected a backend of torch\.compile .*inductor.*got 'inducer'"
    ):
        CompiledLoss(model, guide, backend="inducer")


# --------------------------------------------------------------------------------------------------- in fit
def test_fit_trains_with_compiled_steps_and_says_so():
    args = data(40)
    history = fit(
        model, guide, args, schedule=Schedule(num_steps=300, steps_per_epoch=50, patience=None),
        optimizer=0.03, progress=False, compile=True,
    )  # fmt: skip
    assert history.compilation.startswith("compiled")
    pyro.clear_param_store()
    plain = fit(
        model, guide, args, schedule=Schedule(num_steps=300, steps_per_epoch=50, patience=None),
        optimizer=0.03, progress=False,
    )  # fmt: skip
    assert plain.compilation is None
    assert history.loss[-1] == pytest.approx(plain.loss[-1], abs=0.1)
    assert history.loss[-1] < plain.loss[0]


def test_without_a_compiler_training_goes_on_and_says_why(monkeypatch, caplog):
    class InvalidCxxCompiler(RuntimeError):
        pass

    def fails(name):
        def compile_graph(graph, inputs):
            raise InvalidCxxCompiler("No working C++ compiler found")

        return compile_graph

    monkeypatch.setattr(torch._dynamo, "lookup_backend", fails)
    with caplog.at_level(logging.WARNING):
        history = fit(model, guide, data(), schedule=SHORT, progress=False, compile=True)
    assert "no C++ compiler was found" in history.compilation
    assert history.num_steps == 6
    assert "no C++ compiler was found" in caplog.text


@pytest.mark.parametrize("kind", ["latents", "rows"])
def test_a_model_whose_shapes_change_from_call_to_call_is_given_up_with_the_reason(kind):
    """What a counter in the model changes is found by comparison."""
    calls = []

    def changing(x):
        calls.append(0)
        number = 3 + (len(calls) // 8) % 2
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        if kind == "latents":
            with pyro.plate("noise", number):
                pyro.sample("more", dist.Normal(loc, 1.0), obs=torch.randn(number))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[: len(x)] * (1 if kind == "latents" else number))

    def own(x):
        pyro.sample("loc", dist.Normal(pyro.param("loc_q", torch.tensor(0.0)), 0.1))

    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    history = fit(
        changing,
        own,
        x,
        schedule=Schedule(num_steps=40, steps_per_epoch=20, patience=None),
        progress=False,
        compile=True,
    )
    assert history.num_steps == 40
    assert history.compilation.startswith("not compiled: in step")
    assert ("random numbers" if kind == "latents" else "the programs give") in history.compilation
    assert "Trace Shapes" not in history.compilation
    assert all(math.isfinite(value) for value in history.loss)


def test_auto_compiles_where_the_steps_that_are_left_pay(monkeypatch):
    def run(steps):
        schedule = Schedule(num_steps=steps, patience=None)
        return fit(model, guide, data(), schedule=schedule, progress=False, compile="auto")

    assert run(20).compilation.startswith("not compiled: the 10 steps that are left")
    monkeypatch.setattr(compiled_module, "LEAST_STEPS", 5)
    assert "operations would not be done before the 10 steps that are left" in run(20).compilation
    free = Cost((0.0, 0.0), (0.0, 0.0))
    monkeypatch.setitem(compiled_module.COSTS, "torchscript", free)
    assert run(20).compilation.startswith("compiled")
    assert "by torchscript in" in run(20).compilation
    dear = Cost((1.0, 0.0), (0.0, 0.0))
    monkeypatch.setattr(compiled_module, "COSTS", {"torchscript": dear, "eager": free})
    assert "by eager in" in run(20).compilation


def test_auto_counts_seconds_too(monkeypatch):
    schedule = Schedule(num_seconds=1.5, steps_per_epoch=20, patience=None)
    monkeypatch.setattr(compiled_module, "LEAST_STEPS", 5)
    free = {"torchscript": Cost((0.0, 0.0), (0.0, 0.0))}
    monkeypatch.setattr(compiled_module, "COSTS", free)
    history = fit(model, guide, data(), schedule=schedule, progress=False, compile="auto")
    assert "by torchscript in" in history.compilation


def test_auto_waits_where_nothing_is_known_and_compiles_better_later(monkeypatch):
    """As many steps are expected as there were: first the interpreter pays, then the compiler."""
    monkeypatch.setattr(compiled_module, "LEAST_STEPS", 20)
    costs = {"torchscript": Cost((0.0, 0.0), (1e-6, 0.0)), "eager": Cost((4e-5, 0.0), (0.0, 0.0))}
    monkeypatch.setattr(compiled_module, "COSTS", costs)
    loss = CompiledLoss(model, guide)
    loss._compiler = Compiler(loss._objective, loss._set, "auto")
    said = []
    for _ in range(60):
        loss.loss_and_grads(*data())
        said.append(loss.report)
    assert said[18] == "not compiled: no step was taken"
    assert "by torchscript in" in said[19]
    assert "by torchscript in" in said[38]
    assert "by eager in" in said[-1]


@pytest.mark.parametrize("name", LOSSES)
def test_evaluations_that_come_often_are_compiled_and_have_the_same_mean(name, monkeypatch):
    monkeypatch.setattr(compiled_module, "LEAST_EVALUATIONS", 2)
    args, built = data(), []
    monkeypatch.setattr(
        compiled_module, "_built", lambda *a, own=compiled_module._built: built.append(a) or own(*a)
    )
    loss = CompiledLoss(*LOSSES[name])
    loss.loss_and_grads(*args)
    plain = torch.tensor([loss._objective.evaluate(args, {}) for _ in range(300)])
    with seeded(1):
        first = [loss._compiler.evaluate(args, {}) for _ in range(3)]
    with seeded(1):
        assert [loss._compiler.evaluate(args, {}) for _ in range(3)] == first
    assert len(built) == 1  # until the next call nothing changes
    loss._compiler.settle()
    found = torch.tensor([loss._compiler.evaluate(args, {}) for _ in range(300)])
    alone = callable(getattr(LOSSES[name][2], "differentiable_loss", None))  # or only with gradients
    assert [backend for *_, backend in built] == ["eager", *(["torchscript"] if alone else [])]
    error = (plain.var() / 300 + found.var() / 300).sqrt()
    assert (plain.mean() - found.mean()).abs() <= 4 * error + 1e-6
    assert (plain.std() == 0) == (found.std() == 0)


def test_evaluations_that_differ_from_the_programs_are_given_up(monkeypatch):
    monkeypatch.setattr(compiled_module, "LEAST_EVALUATIONS", 1)
    factor = [1.0]

    def scaled(x, y=None):
        with pyro.poutine.scale(scale=factor[0]):
            model(x, y)

    args = data()
    loss = CompiledLoss(scaled, guide)
    loss.loss_and_grads(*args)
    loss._compiler.evaluate(args, {})
    loss._compiler.settle()
    assert math.isfinite(loss._compiler.evaluate(args, {}))
    factor[0] = 100.0
    loss._compiler.evaluate(args, {})  # the second is compared
    with seeded(1):
        found = loss._compiler.evaluate(args, {})
    with seeded(1):
        assert found == loss._objective.evaluate(args, {})


def test_auto_goes_on_with_the_interpreter_where_the_compiler_fails(monkeypatch):
    def fails(name):
        raise RuntimeError("no way")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", fails)
    monkeypatch.setattr(compiled_module, "LEAST_STEPS", 5)
    costs = {"torchscript": Cost((1.0, 0.0), (0.0, 0.0)), "eager": Cost((0.0, 0.0), (0.0, 0.0))}
    monkeypatch.setattr(compiled_module, "COSTS", costs)
    schedule = Schedule(num_steps=30, patience=None)
    history = fit(model, guide, data(), schedule=schedule, progress=False, compile="auto")
    assert history.num_steps == 30
    assert "by torchscript in" in history.compilation
    assert "since eager could not compile it: RuntimeError (no way)" in history.compilation


def test_a_loss_that_is_not_finite_is_blamed_on_its_site_in_compiled_steps():
    def exploding(x, y=None):
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.sample("slope", dist.Normal(loc, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    with pytest.warns(UserWarning, match="the loss is -?(inf|nan); first the log-density of site 'slope'"):
        history = fit(model, exploding, data(), schedule=SHORT, optimizer=1e200, progress=False, compile=True)
    assert "not finite" in history.stop_reason
    assert history.compilation.startswith("compiled")


def test_other_values_of_compile_are_refused():
    with pytest.raises(GraphflowsError, match="Expected compile to be True, False or 'auto'; got 'inductor'"):
        fit(model, guide, data(), schedule=SHORT, progress=False, compile="inductor")


@pytest.mark.slow
def test_inductor_computes_the_same():
    loss = CompiledLoss(model, guide, backend="inductor")
    for _ in range(5):
        loss.loss_and_grads(*data())
    assert loss.report.startswith(
        ("compiled", "not compiled: inductor could not compile it: no C++ compiler")
    )


@pytest.mark.slow
def test_inductor_computes_the_covariances_of_rows_that_differ():
    """It would write to the one matrix that an expanded tensor has for all rows."""
    captured = capture(lambda entries: [unit_lower(entries, 3)], [torch.zeros(4, 3)], {})
    try:
        function = compiled_module._built(captured, captured.arguments([torch.zeros(4, 3)], []), "inductor")
    except compiled_module.CompilationError:
        pytest.skip("no C++ compiler")
    entries = torch.randn(4, 3)
    (found,) = function(*captured.arguments([entries], []))
    expected = torch.eye(3).repeat(4, 1, 1)
    expected[:, [1, 2, 2], [0, 0, 1]] = entries
    assert torch.equal(found, expected)
