"""What Pyro's own tests ask of every AutoGuide, asked of both families."""

import copy
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuideList
from pyro.nn import PyroModule, PyroSample

from pyro_graphflows.guides import auto_faithful_guide

everywhere = pytest.mark.parametrize(
    "options",
    [
        {"family": "normal"},
        {"family": "flow", "units_per_variable": 3, "conditioner_units": 3},
        {"family": "flow", "flow": "graphical", "units_per_variable": 3},
    ],
    ids=["normal", "flow", "graphical"],
)


def shapes(x):
    """Sites of many shapes, in no plate, one plate and two."""
    scalar = pyro.sample("scalar", dist.LogNormal(0.0, 1.0))
    vector = pyro.sample("vector", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", x.shape[0], dim=-2):
        row = pyro.sample("row", dist.Normal(scalar, 1.0))
        with pyro.plate("columns", x.shape[1], dim=-1):
            cell = pyro.sample("cell", dist.Normal(row + vector.sum(-1)[..., None, None], 1.0))
            pyro.sample("x", dist.Normal(cell, 1.0), obs=x)


SHAPES = {"scalar": (), "vector": (2,), "row": (3, 1), "cell": (3, 4)}


@pytest.fixture
def guide(options):
    return auto_faithful_guide(shapes, torch.randn(3, 4), num_start_samples=100, **options)


@everywhere
def test_shapes_and_plates_are_those_of_the_model(guide):
    x = torch.randn(3, 4)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    model_trace = poutine.trace(poutine.replay(shapes, trace)).get_trace(x)
    model_trace.compute_log_prob()
    for name, shape in SHAPES.items():
        assert trace.nodes[name]["value"].shape == shape
        assert trace.nodes[name]["log_prob"].shape == model_trace.nodes[name]["log_prob"].shape
        frames = [f.name for f in trace.nodes[name]["cond_indep_stack"]]
        assert set(frames) == {f.name for f in model_trace.nodes[name]["cond_indep_stack"]}
    for name, shape in guide.median(x).items():
        assert shape.shape == SHAPES[name]


@everywhere
def test_no_score_terms_and_no_auxiliary_sites(guide):
    """Reparametrised throughout: the guide's log-density enters the loss once, and only at the model's sites."""
    x = torch.randn(3, 4)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_score_parts()
    names = [
        name for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    ]  # fmt: skip
    assert set(names) == set(SHAPES)
    for name in names:
        _, score, entropy = trace.nodes[name]["score_parts"]
        assert isinstance(score, int | float)
        assert score == 0
        torch.testing.assert_close(entropy, trace.nodes[name]["log_prob"])


@everywhere
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
def test_training_lowers_the_loss_and_a_copy_stays(guide, elbo):
    x = torch.randn(3, 4)
    svi = SVI(shapes, guide, pyro.optim.Adam({"lr": 0.01}), elbo())
    assert math.isfinite(svi.step(x))
    frozen = copy.deepcopy(guide)
    latents = {name: value.detach() for name, value in guide(x).items()}
    before = guide.log_prob(latents, x).detach()
    for _ in range(2):
        svi.step(x)
    assert not torch.allclose(guide.log_prob(latents, x), before)
    torch.testing.assert_close(frozen.log_prob(latents, x), before, atol=1e-7, rtol=0)


@everywhere
def test_a_trained_guide_can_be_saved_while_it_lives(guide):
    x = torch.randn(3, 4)
    SVI(shapes, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False).bind(shapes)
    for one in (guide, loaded):
        pyro.set_rng_seed(3)
        values = one(x)
        latents = {name: value.detach().clone() for name, value in values.items()}
        log_prob = one.log_prob(latents, x).detach()
        if one is guide:
            expected, expected_log_prob = latents, log_prob
    for name in SHAPES:
        torch.testing.assert_close(latents[name], expected[name])
    torch.testing.assert_close(log_prob, expected_log_prob, atol=1e-7, rtol=0)


@everywhere
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(options, parallel):
    def model(n, y=None):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(5)
    guide = auto_faithful_guide(model, 5, y, num_start_samples=100, **options)
    posterior = Predictive(guide, num_samples=6, parallel=parallel)(5, y)
    assert posterior["z"].shape == (6, 5)
    assert (posterior["z"].std(0) > 0).all()
    predicted = Predictive(model, posterior_samples=posterior, parallel=parallel)(5)
    assert predicted["y"].shape == (6, 5)


@everywhere
def test_dotted_names(options):
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

        def forward(self, w, y=None):
            mean = self.linear(w).squeeze(-1)
            with pyro.plate("data", len(w)):
                return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    model, w, y = Regression(), torch.randn(6, 2), torch.randn(6)
    guide = auto_faithful_guide(model, w, y, num_start_samples=100, **options)
    assert set(guide(w, y)) == {"linear.weight", "linear.bias"}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(w, y))
    assert guide.median(w, y)["linear.weight"].shape == (1, 2)


@everywhere
def test_module_local_params_with_a_torch_optimiser(options):
    x = torch.randn(3, 4)
    with pyro.settings.context(module_local_params=True):
        guide = auto_faithful_guide(shapes, x, num_start_samples=100, **options)
        elbo = Trace_ELBO()(shapes, guide)
        optim = torch.optim.Adam(elbo.parameters(), lr=0.01)
        before = [parameter.detach().clone() for parameter in guide.parameters()]
        for _ in range(2):
            optim.zero_grad()
            elbo(x).backward()
            optim.step()
        after = list(guide.parameters())
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True) if new.numel())
        assert not list(pyro.get_param_store())


@everywhere
def test_two_of_them_in_a_list(options):
    x, options = torch.randn(3, 4), {**options, "num_start_samples": 100}
    guide = AutoGuideList(shapes)
    guide.append(auto_faithful_guide(poutine.block(shapes, hide=["row", "cell"]), **options))
    guide.append(auto_faithful_guide(poutine.block(shapes, expose=["row", "cell", "x"]), **options))
    svi = SVI(shapes, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(x))
    assert set(guide(x)) == set(SHAPES)
