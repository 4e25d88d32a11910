"""Calls of a guide as one captured function: the same training, and never another answer."""

import copy
import functools
import logging
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList

from pyro_graphflows import Flow, GraphflowsError, auto_faithful_guide
from pyro_graphflows.guides import captured_call
from pyro_graphflows.guides.captured_call import CapturedDistribution
from pyro_graphflows.infer import CompiledELBO

SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0], dtype=torch.float64)
Y = torch.tensor([28.0, 8.0, -3.0, 7.0], dtype=torch.float64)
X = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def groups(sigma, y):
    """A hierarchy: globals of their own, and effects fused with their prior."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("groups", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def rows(x):
    """All sites in a plate of data."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(z.tanh(), 1.0))
        pyro.sample("x", dist.Normal(z + w, 0.5), obs=x)


def vectors(x):
    """A vector and a positive scale."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(b[..., :1] + b[..., 1:] * torch.arange(6.0), s.unsqueeze(-1)), obs=x)


CASES = {
    "groups": (groups, (SIGMA, Y)),
    "rows": (rows, (X,)),
    "vectors": (vectors, (X,)),
}


@functools.cache
def set_up(name, family):
    model, args = CASES[name]
    return auto_faithful_guide(model, *args, family=family, num_start_samples=500)


def guide_of(name, family="normal", after=2):
    guide = copy.deepcopy(set_up(name, family))
    guide.capture_after = after
    return guide


def trained(name, guide, loss=None, steps=9):
    """Return the losses of some steps of SVI; parameters change in place."""
    model, args = CASES[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01}), loss or Trace_ELBO())
    return [svi.step(*args) for _ in range(steps)]


def parameters(guide):
    return {name: value.detach().clone() for name, value in guide.named_parameters()}


@pytest.mark.parametrize(
    ("name", "family", "num_particles"),
    [("groups", "auto", 1), ("groups", "normal", 2), ("rows", "flow", 1), ("vectors", "spline", 1)],
)
def test_training_is_the_same_with_the_same_random_numbers(name, family, num_particles):
    guide = guide_of(name, family)
    other = programs_of(guide)
    loss = Trace_ELBO(num_particles=num_particles)
    losses = trained(name, guide, loss)
    state = torch.get_rng_state()
    expected = trained(name, other, loss)
    assert guide.capture_report.startswith("captured: ")
    assert other.capture_report == "not captured: no kind of call has come often enough"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))
    torch.testing.assert_close(parameters(guide), parameters(other))
    assert torch.equal(torch.get_rng_state(), state)


@functools.cache
def captured_groups():
    guide = guide_of("groups")
    trained("groups", guide)
    return guide


def ready():
    """Return a guide whose calls are captured, with its parameters; it must stay as it is."""
    guide = captured_groups()
    for kind in guide._captured_calls._kinds.values():
        kind.rebuilt = 0  # each test asks for distributions
    return guide


def trace_of(guide):
    """Return the trace that an ELBO gets of a guide."""
    pyro.set_rng_seed(2)
    loss = Trace_ELBO()
    loss.max_plate_nesting = 1
    return loss._get_trace(groups, guide, (SIGMA, Y), {})[1]


def programs_of(guide):
    """Return a guide with the same parameters that captures nothing."""
    other = copy.deepcopy(guide)
    other.capture_after = None
    return other


def test_distributions_answer_as_those_of_the_programs():
    trace, expected = trace_of(ready()), trace_of(programs_of(ready()))
    assert list(trace.nodes) == list(expected.nodes)
    for name in ("mu", "tau", "theta"):
        fn, true = trace.nodes[name]["fn"], expected.nodes[name]["fn"]
        value = trace.nodes[name]["value"]
        assert isinstance(fn, CapturedDistribution)
        assert not isinstance(true, CapturedDistribution)
        torch.testing.assert_close(value, expected.nodes[name]["value"])
        assert fn.shape() == true.shape()
        assert fn.support is not None
        for each in (value, value.detach() * 1.5 + 0.1, value.clone()):
            torch.testing.assert_close(fn.log_prob(each), true.log_prob(each))
            ours, theirs = fn.score_parts(each), true.score_parts(each)
            torch.testing.assert_close(ours.log_prob, theirs.log_prob)
        assert fn.expand(fn.batch_shape) is fn
        wide = fn.expand((3, *fn.batch_shape))
        assert wide.batch_shape == (3, *fn.batch_shape)
        torch.testing.assert_close(wide.log_prob(value.detach()), fn.log_prob(value).expand(wide.batch_shape))
        assert not torch.equal(fn.rsample(), value)
        assert fn.sample((2,)).shape == (2, *value.shape)
        assert type(fn.true()) is type(true)
    mean, true_mean = trace.nodes["mu"]["fn"].mean, expected.nodes["mu"]["fn"].mean
    torch.testing.assert_close(mean, true_mean)
    torch.testing.assert_close(
        torch.distributions.kl_divergence(trace.nodes["mu"]["fn"], dist.Normal(0.0, 1.0)),
        torch.distributions.kl_divergence(expected.nodes["mu"]["fn"], dist.Normal(0.0, 1.0)),
    )


@pytest.mark.parametrize("which", ["draw", "given"])
def test_gradients_of_log_densities(which):
    """Those of draws come from running the programs; those of other values from their distributions."""
    found = []
    for guide in (ready(), programs_of(ready())):
        trace = trace_of(guide)
        nodes = [trace.nodes[name] for name in ("mu", "tau", "theta")]
        values = [n["value"] if which == "draw" else n["value"].detach() * 1.1 for n in nodes]
        total = sum(n["fn"].log_prob(value).sum() for n, value in zip(nodes, values, strict=True))
        found.append(torch.autograd.grad(total, list(guide.parameters()), allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_a_distribution_of_an_earlier_call_refuses_what_it_does_not_know():
    trace = trace_of(ready())
    fn, value = trace.nodes["mu"]["fn"], trace.nodes["mu"]["value"]
    with torch.no_grad():
        next(ready().parameters()).add_(0.0)
    fn.log_prob(value)
    with pytest.raises(GraphflowsError, match="they have changed since"):
        fn.log_prob(value + 1.0)


def number_of_captured(guide):
    return sum(kind.captured for kind in guide._captured_calls._kinds.values())


def replayed(guide):
    return Trace_ELBO().loss(groups, poutine.replay(guide, trace_of(programs_of(guide))), SIGMA, Y)


@pytest.mark.parametrize(
    "ask",
    [
        replayed,
        lambda guide: guide(SIGMA, Y),
        lambda guide: poutine.trace(guide).get_trace(SIGMA, Y),
        lambda guide: Trace_ELBO().loss(groups, lambda *args: guide(*args), SIGMA, Y),
        lambda guide: TraceMeanField_ELBO().loss(groups, guide, SIGMA, Y),
        lambda guide: Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=1).loss(
            groups, guide, SIGMA, Y
        ),
        lambda guide: SVI(groups, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).evaluate_loss(SIGMA, Y),
        lambda guide: guide.log_prob(
            {"mu": torch.tensor(0.0), "tau": torch.tensor(1.0), "theta": Y}, SIGMA, Y
        ),
        lambda guide: guide.median(SIGMA, Y),
        lambda guide: Predictive(groups, guide=guide, num_samples=3)(SIGMA, Y),
        lambda guide: Trace_ELBO().loss(groups, guide.given(y=Y), SIGMA, Y),
        lambda guide: guide.posterior(SIGMA, Y, num_draws=3),
    ],
)
def test_other_calls_are_run_by_the_programs(ask):
    guide = ready()
    calls = [trace_of(guide), number_of_captured(guide)]
    assert isinstance(calls[0].nodes["mu"]["fn"], CapturedDistribution)
    ask(guide)
    assert number_of_captured(guide) == calls[1]


def test_renyi_bounds_are_served():
    guide = guide_of("rows")
    other = programs_of(guide)
    losses = [trained("rows", g, RenyiELBO(alpha=0.5, num_particles=2)) for g in (guide, other)]
    assert number_of_captured(guide) > 0
    torch.testing.assert_close(*map(torch.tensor, losses))
    torch.testing.assert_close(parameters(guide), parameters(other))


def test_a_handler_that_sets_a_value_is_followed(monkeypatch):
    """Handlers that could are not let in; if one got in, later sites would see its value."""
    guide = ready()
    tau = poutine.trace(lambda: pyro.sample("tau", dist.Delta(torch.tensor(0.01)))).get_trace()
    handlers = {*captured_call._HARMLESS, poutine.replay_messenger.ReplayMessenger}
    monkeypatch.setattr(captured_call, "_HARMLESS", handlers)
    before = number_of_captured(guide)
    nodes = trace_of(poutine.replay(guide, tau)).nodes
    assert number_of_captured(guide) == before + 1
    values = {name: nodes[name]["value"] for name in ("mu", "tau", "theta")}
    assert values["tau"] is tau.nodes["tau"]["value"]
    assert list(nodes) == list(trace_of(guide).nodes)
    expected = poutine.trace(poutine.condition(programs_of(guide), values)).get_trace(SIGMA, Y).nodes
    for name, value in values.items():
        torch.testing.assert_close(nodes[name]["fn"].log_prob(value), expected[name]["fn"].log_prob(value))


def test_data_that_are_not_finite_are_refused_as_by_the_programs():
    guide = ready()
    before = number_of_captured(guide)
    y = Y.clone()
    y[1] = torch.nan
    with pytest.raises(GraphflowsError, match="finite values of the data"):
        Trace_ELBO().differentiable_loss(groups, guide, SIGMA, y)
    assert number_of_captured(guide) == before + 1


def test_new_values_of_parameters_buffers_and_data_are_read():
    guide = guide_of("rows")
    trained("rows", guide)
    other = programs_of(guide)
    state = {name: v * 1.1 if v.is_floating_point() else v for name, v in guide.state_dict().items()}
    losses = []
    for each in (guide, other):
        pyro.set_rng_seed(3)
        losses.append([Trace_ELBO().differentiable_loss(rows, each, X + 3.0).item()])
        each.load_state_dict(state)
        losses[-1] += [Trace_ELBO().differentiable_loss(rows, each, X).item() for _ in range(4)]
    torch.testing.assert_close(*map(torch.tensor, losses))
    assert number_of_captured(guide) == 2


def test_frozen_parameters_stay():
    guide = guide_of("rows")
    trained("rows", guide)
    name, frozen = next(iter(guide.named_parameters()))
    frozen.requires_grad_(False)
    before = parameters(guide)
    trained("rows", guide)
    after = parameters(guide)
    assert torch.equal(before[name], after[name])
    assert any(not torch.equal(before[each], after[each]) for each in before)


def test_copies_pickles_and_moves_capture_anew():
    guide = guide_of("rows")
    trained("rows", guide)
    copies = copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)).bind(rows)
    for other in (*copies, guide.to(torch.float32)):
        assert other.capture_after == 2
        assert number_of_captured(other) == 0
    args = (X.float(),)
    for _ in range(3):
        Trace_ELBO().differentiable_loss(rows, guide, *args).backward()
    assert number_of_captured(guide) == 1


def test_python_values_that_change_are_found_out(caplog):
    scales = [1.0]

    def model(x):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(0.0, scales[0] * tau))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    guide = auto_faithful_guide(model, X, num_start_samples=500)
    guide.capture_after = 0
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    with caplog.at_level(logging.INFO, logger="pyro_graphflows.guides.captured_call"):
        for _ in range(3):
            svi.step(X)
        assert guide.capture_report.startswith("captured: ")
        scales[0] = 3.0
        svi.step(X)
    assert "in call 4" in guide.capture_report
    assert "not those of the programs" in caplog.text


def test_what_cannot_be_captured_is_run_by_the_programs():
    """The bound on the layers of a residual flow comes from an iteration that ends by values."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(5, 2)
    guide = auto_faithful_guide(model, x, family=Flow(form="graphical"), num_start_samples=500)
    guide.capture_after = 1
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.tensor(svi.step(x)).isfinite() for _ in range(4))
    assert guide.capture_report.startswith("not captured: a number is read out of a tensor")


def test_correlations_are_captured():
    """Their masks of the elements below the diagonal are the same in every call."""

    def model(x):
        corr = pyro.sample("corr", dist.LKJCholesky(2, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=corr), obs=x)

    x = torch.randn(5, 2)
    guide = auto_faithful_guide(model, x, family="normal", num_start_samples=500)
    guide.capture_after = 1
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.tensor(svi.step(x)).isfinite() for _ in range(4))
    assert guide.capture_report.startswith("captured")


def test_discrete_sites_are_not_captured():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    guide = auto_faithful_guide(model, X, num_start_samples=500)
    guide.capture_after = 1
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(4):
        svi.step(X)
    assert "no reparametrised draws" in guide.capture_report


def test_parameters_of_the_model_are_trained():
    """A guide that is fused with a prior reads the prior's parameters: its calls are not captured."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = auto_faithful_guide(model, X, family="auto", num_start_samples=500)
    results = []
    for after in (1, None):
        each = copy.deepcopy(guide)
        each.capture_after = after
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(model, each, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(8):
            svi.step(X)
        results.append(pyro.param("loc").detach().clone())
    torch.testing.assert_close(*results)


def test_subsampled_plates_lists_and_compiled_losses_have_the_programs():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    guide = auto_faithful_guide(model, X, num_start_samples=500)
    guide.capture_after = 1
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(4):
        svi.step(X)
    assert "do not say all" in guide.capture_report

    listed = AutoGuideList(groups)
    listed.append(guide_of("groups", after=0))
    trained("groups", listed, steps=3)
    assert number_of_captured(listed[0]) == 0

    guide = guide_of("groups", after=0)
    loss = CompiledELBO()
    trained("groups", guide, loss, steps=5)
    assert loss.report.startswith("compiled")
    assert number_of_captured(guide) <= 2  # before that


def test_few_kinds_are_kept():
    guide = guide_of("rows", after=1)
    for size in range(1, 40):
        x = torch.randn(size)
        for _ in range(2 if size < 7 else 1):
            Trace_ELBO().differentiable_loss(rows, guide, x)
    kinds = guide._captured_calls._kinds.values()
    assert sum(kind.function is not None for kind in kinds) == captured_call.MOST_CAPTURED
    assert len(kinds) <= captured_call.MOST_COUNTED
