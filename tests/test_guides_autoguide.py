"""What Pyro's own tests ask of every AutoGuide, asked of both families."""

import copy
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_families import everywhere
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList
from pyro.nn import PyroModule, PyroSample

from pyro_graphflows.guides import auto_faithful_guide


def shapes(x):
    """Sites of many shapes, in no plate, one plate and two."""
    scalar = pyro.sample("scalar", dist.LogNormal(0.0, 1.0))
    vector = pyro.sample("vector", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", x.shape[0], dim=-2):
        row = pyro.sample("row", dist.Normal(scalar, 1.0))
        with pyro.plate("columns", x.shape[1], dim=-1):
            cell = pyro.sample("cell", dist.Normal(row + vector.sum(-1)[..., None, None], 1.0))
            pyro.sample("x", dist.Normal(cell, 1.0), obs=x)


DATA = torch.randn(3, 4, dtype=torch.double)
SHAPES = {"scalar": (), "vector": (2,), "row": (3, 1), "cell": (3, 4)}


@pytest.fixture
def guide(options):
    return auto_faithful_guide(shapes, DATA, num_start_samples=100, **options)


@everywhere
def test_shapes_and_plates_are_those_of_the_model(guide):
    x = DATA
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
    x = DATA
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
    x = DATA
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
    x = DATA
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
    x = DATA
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


def one_normal(x, around):
    """Normal data of a normal mean for each, under some handler."""
    with around(), pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@everywhere
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
def test_scales_and_masks_of_the_model_are_repeated(options, loss):
    """With the exact posterior inside, what is scaled counts that often, and what is masked not at all."""
    x, there = torch.randn(4), torch.tensor([True, False, True, True])
    terms = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
    for around, exact in (
        (lambda: poutine.scale(scale=2.5), 2.5 * terms.sum()),
        (lambda: poutine.mask(mask=there), terms[there].sum()),
    ):
        guide = auto_faithful_guide(one_normal, x, around, init="random", **options)
        guide.set_linear_("z", {"x": 0.5}, 0.0, math.sqrt(0.5))
        found = torch.tensor([loss().loss(one_normal, guide, x, around) for _ in range(60)])
        error = found.std().item() / math.sqrt(60)  # zero, but for analytic KL terms
        assert found.mean().item() == pytest.approx(-exact.item(), abs=5 * error + 1e-9)


@everywhere
def test_factors_of_the_model_are_part_of_the_posterior(options):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("tilt", dist.Normal(z, 1.0).log_prob(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(4)
    guide = auto_faithful_guide(model, x, init="random", **options)
    assert guide.inverse.parents == {"z": ("tilt", "x")}
    guide.set_linear_("z", {"x": 1 / 3}, 0.5 / 3, math.sqrt(1 / 3))
    joint = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1.0)
    exact = joint.log_prob(torch.stack([torch.full((4,), 0.5), x], -1)).sum().item()
    assert Trace_ELBO().loss(model, guide, x) == pytest.approx(-exact)
    regression = auto_faithful_guide(model, x, **options)
    assert "no regression start" in regression.describe()


@everywhere
def test_a_model_that_enumerates_beside_the_guide(options):
    """A mixture: the model sums over its assignments, and the guide has the rest."""
    weights, centres = torch.tensor([0.3, 0.7]), torch.tensor([-2.0, 3.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("u", dist.Normal(centres[k], 1.0), obs=x[:, 0])
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 1])

    x = torch.randn(5, 2)
    guide = auto_faithful_guide(model, x, init="random", **options)
    assert guide.model_graph.marginalised == ("k",)
    assert guide.inverse.parents == {"z": ("x",)}
    guide.set_linear_("z", {"x": 0.5}, 0.0, math.sqrt(0.5))
    mixture = (weights.log() + dist.Normal(centres, 1.0).log_prob(x[:, :1])).logsumexp(-1)
    exact = (mixture + dist.Normal(0.0, math.sqrt(2.0)).log_prob(x[:, 1])).sum().item()
    for vectorize in (False, True):
        loss = TraceEnum_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1)
        assert loss.loss(model, guide, x) == pytest.approx(-exact)


def chain(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 0.5))
    c = pyro.sample("c", dist.Normal(b, 1.0))
    pyro.sample("x", dist.Normal(c, 0.7), obs=x)


def tree(x):
    root = pyro.sample("root", dist.Normal(0.0, 1.0))
    with pyro.plate("branches", 2, dim=-2):
        branch = pyro.sample("branch", dist.Normal(root, 0.5))
        with pyro.plate("leaves", x.shape[-1], dim=-1):
            leaf = pyro.sample("leaf", dist.Normal(branch, 0.8))
            pyro.sample("x", dist.Normal(leaf, 0.6), obs=x)


@everywhere
@pytest.mark.parametrize("model", [chain, tree])
def test_chains_and_trees_are_exact(options, model):
    """What Pyro asks of guides with dependent normals; here amortised, for any data, before the first step."""
    shape = () if model is chain else (2, 3)
    guide = auto_faithful_guide(
        model, torch.zeros(shape), pool="deepset", num_start_samples=20_000, **options
    )
    if model is chain:
        joint = dist.Normal(0.0, math.sqrt(1.0 + 0.25 + 1.0 + 0.49))
    else:
        same = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
        joint = dist.MultivariateNormal(torch.zeros(6), 1.0 + 0.25 * same + torch.eye(6))
    many = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=2)
    gaps = []
    for _ in range(10):
        x = joint.sample()
        gaps.append(many.loss(model, guide, x.reshape(shape)) + joint.log_prob(x).item())
    # the weights of a chain, about 7, cost 7 / 40,000 nats; summaries have many more
    assert sum(gaps) / len(gaps) < (0.02 if model is chain else 0.1)
