"""Captured log-densities: the value, gradient and Hessian of the model, or the model itself."""

import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows.distributions.skewed_scores import ASKED_OFTEN, TABLE_REACH, LogGamma, unscore
from pyro_graphflows.guides import captured_density
from pyro_graphflows.guides import mode as mode_module
from pyro_graphflows.guides.captured_density import AFTER, recorded_gradients
from pyro_graphflows.guides.minimize import Hessians, loss_and_gradient
from pyro_graphflows.guides.mode import LogPosterior, find_mode
from pyro_graphflows.inspect import trace_model
from pyro_graphflows.recording import capture, record


def hierarchy(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def states(y):
    """A chain with states that are summed out."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    state = 0
    for t in range(len(y)):
        probs = torch.where(torch.as_tensor(state) == 0, p, 1 - p)
        state = pyro.sample(f"s_{t}", dist.Bernoulli(probs), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(loc * state, 1.0), obs=y[t])


def observed(mu, scale, y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def drawing(y):
    """Adds noise to its density in each run."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("noise", 1e-3 * torch.randn(()) * mu)
    observed(mu, 1.0, y)


RUNS = [0]


def changing(y):
    """Changes from run to run in Python."""
    RUNS[0] += 1
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("change", 1e-3 * RUNS[0] * mu)
    observed(mu, 1.0, y)


def choosing(y):
    """Reads a number out of a latent value."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 1.0 if bool((mu > -100.0).all()) else 2.0
    observed(mu, scale, y)


@pytest.fixture(autouse=True)
def however_long_the_program(monkeypatch):
    """Let programs be recorded after equally many evaluations."""
    monkeypatch.setattr(captured_density, "MOST_BEFORE", 0)


def posterior_of(model, *args):
    return LogPosterior(model, args, {}, trace_model(model, args, strict=False))


def evaluated_often(posterior, shape):
    """Return a function of a flat point, evaluated as often as it takes to capture it."""

    def loss(flat):
        values = posterior(flat.reshape(shape))
        return -(values * torch.arange(1.0, 1.0 + values.numel()).reshape(values.shape)).sum()

    for _ in range(AFTER + 1):
        loss_and_gradient(loss, torch.randn(shape).flatten())
    return loss


@pytest.mark.parametrize("num_points", [None, 4])
@pytest.mark.parametrize("model", [hierarchy, states])
def test_captured_values_gradients_and_hessians_are_those_of_the_model(model, num_points):
    args = (torch.rand(6) + 0.5, 3 * torch.randn(6)) if model is hierarchy else (torch.randn(3),)
    posterior, plain = posterior_of(model, *args), posterior_of(model, *args)
    plain.captured = plain._evaluate
    shape = (posterior.size,) if num_points is None else (num_points, posterior.size)
    evaluated_often(posterior, shape)
    assert posterior.captured.num_captured == 1
    loss = evaluated_often(posterior, shape)
    expected_loss = evaluated_often(plain, shape)
    for _ in range(3):
        point = torch.randn(shape).flatten()
        pairs = zip(loss_and_gradient(loss, point), loss_and_gradient(expected_loss, point), strict=True)
        for found, expected in (*pairs, (Hessians(loss).at(point)[2], Hessians(expected_loss).at(point)[2])):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert posterior.captured.num_captured == 1 + AFTER + 1 + 6


@pytest.mark.parametrize("model", [drawing, changing, choosing])
def test_other_models_are_run_at_each_evaluation(model):
    posterior = posterior_of(model, torch.randn(3))
    evaluated_often(posterior, (1,))
    before = posterior.captured.num_captured
    assert before <= (model is changing)
    evaluated_often(posterior, (1,))
    assert posterior.captured.num_captured - before <= 1
    kind = posterior.captured._kinds[torch.Size([1])]
    assert kind.function is None
    assert kind.is_settled


def test_second_derivatives_that_are_stopped_are_left_to_the_model():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("stopped", mu.detach().square() * mu)
        observed(mu, 1.0, y)

    y = torch.randn(3)
    posterior = posterior_of(model, y)
    loss = evaluated_often(posterior, (1,))
    assert posterior.captured.num_captured == 1
    torch.testing.assert_close(Hessians(loss).at(torch.randn(1))[2], torch.full((1, 1), 4.0))


def test_long_programs_are_recorded_later(monkeypatch):
    monkeypatch.setattr(captured_density, "MOST_BEFORE", 50)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for _ in range(200):
            mu = mu.sin() + mu
        observed(mu, 1.0, y)

    posterior = posterior_of(model, torch.randn(3))
    evaluated_often(posterior, (1,))
    assert posterior.captured.num_captured == 0
    evaluated_often(posterior, (1,))
    assert posterior.captured.num_captured == 2 * (AFTER + 1) - 50


def test_quantiles_of_priors_with_constants_are_looked_up():
    def of(kernel, u):
        return record(lambda u: [unscore(kernel, u)], [u]).num_operations

    u = torch.randn(5)
    constant = LogGamma(torch.tensor(2.25))
    for _ in range(ASKED_OFTEN):
        unscore(constant, u)
    assert of(constant, u) < 60
    assert of(LogGamma(torch.linspace(1.0, 2.0, 5)), u) > 200
    # in a call, numbers in the program are constants, and tensors from outside are not
    literal = capture(lambda u: [unscore(LogGamma(torch.tensor(2.25)), u)], [u], {})
    torch.testing.assert_close(literal.graph(u, *literal.constants)[0], unscore(constant, u))
    assert literal.num_operations < 80
    assert capture(lambda u: [unscore(constant, u)], [u], {}).num_operations > 200


def test_points_beyond_a_table_are_left_to_the_model():
    def model(y):
        a = pyro.sample("a", dist.Gamma(2.0, 2.0))
        observed(a, 1.0, y)

    y = torch.randn(3)
    posterior, plain = posterior_of(model, y), posterior_of(model, y)
    plain.captured = plain._evaluate
    loss, expected_loss = evaluated_often(posterior, (1,)), evaluated_often(plain, (1,))
    assert posterior.captured.num_captured == 1
    for place, captured in ((2.0, 1), (TABLE_REACH + 0.5, 0)):
        before, point = posterior.captured.num_captured, torch.tensor([place])
        found, expected = loss_and_gradient(loss, point), loss_and_gradient(expected_loss, point)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert posterior.captured.num_captured == before + captured


@pytest.fixture
def without_clock(monkeypatch):
    """Let no search depend on how fast the machine is."""
    monkeypatch.setattr(mode_module, "SECONDS_OF_RESTARTS", 0.0)
    monkeypatch.setattr(mode_module, "_seconds_of_gradient", lambda *_: 0.0)


@pytest.mark.usefixtures("without_clock")
def test_a_search_finds_the_same_with_and_without(monkeypatch):
    args = torch.rand(4) + 0.5, 3 * torch.randn(4)
    modes = []
    for after in (5, 10**9):
        monkeypatch.setattr(captured_density, "AFTER", after)
        pyro.set_rng_seed(0)
        modes.append(find_mode(hierarchy, args, {}, trace_model(hierarchy, args, strict=False)))
    assert modes[0].posterior.captured.num_captured > 20
    assert modes[1].posterior.captured.num_captured == 0
    torch.testing.assert_close(modes[0].point, modes[1].point, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(modes[0].factor, modes[1].factor, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("without_clock")
def test_nothing_is_held_after_the_search(monkeypatch):
    functions = []
    recorded = captured_density._recorded

    def noted(program, points):
        function = recorded(program, points)
        functions.append(weakref.ref(function))
        return function

    monkeypatch.setattr(captured_density, "_recorded", noted)
    args = torch.rand(4) + 0.5, 3 * torch.randn(4)
    mode = find_mode(hierarchy, args, {}, trace_model(hierarchy, args, strict=False))
    gc.collect()
    assert functions
    assert all(function() is None for function in functions)
    assert mode.posterior.captured.num_captured > 0


def test_gradients_are_recorded_at_once_and_exact_where_they_vanish_at_first():
    start, calls = torch.zeros(3), []

    def loss(point):
        calls.append(None)
        return (point - start).square().sum() + point[0] * point[
            1
        ].exp()  # it reads the point of recording itself

    gradients, evaluations = recorded_gradients(loss, start), len(calls)
    for _ in range(5):
        x = torch.randn(3)
        value, gradient = gradients(x)
        more = torch.stack([x[1].exp(), x[0] * x[1].exp(), torch.zeros(())])
        torch.testing.assert_close(value, x.square().sum() + x[0] * x[1].exp())
        torch.testing.assert_close(gradient, 2 * x + more)
    assert len(calls) == evaluations  # all of that as recorded


def test_gradients_of_what_cannot_be_recorded_are_those_of_the_program():
    def branches(point):
        return point.square().sum() if float(point[0]) > 0 else point.exp().sum()

    gradients = recorded_gradients(branches, torch.zeros(2))
    assert torch.equal(gradients(torch.ones(2))[1], 2 * torch.ones(2))
    assert torch.equal(gradients(-torch.ones(2))[1], torch.exp(-torch.ones(2)))


def test_recorded_gradients_are_zeros_where_the_function_is_undefined():
    value, gradient = recorded_gradients(lambda x: x.log().sum(), torch.ones(2))(torch.tensor([1.0, -1.0]))
    assert value == torch.inf
    assert not gradient.any()
