"""What Pyro does with guides: lists of guides, handlers, partial observations, files, modules."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_families import everywhere
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.reparam import LocScaleReparam

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.infer import InferenceCompilation


def pair(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def half_observed(y, mask):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=mask)


@everywhere
def test_partially_observed_sites(options):
    """What is under the mask must not matter, and the guide must know what is missing."""
    y, mask = torch.randn(6), torch.tensor([True, False, True, True, False, True])
    guide = auto_faithful_guide(half_observed, y, mask, num_start_samples=1000, **options)
    latents = guide(y, mask)
    expected = guide.log_prob(latents, y, mask)
    other = torch.where(mask, y, 5.0)
    torch.testing.assert_close(guide.log_prob(latents, other, mask), expected)
    torch.testing.assert_close(guide.log_prob(latents, torch.where(mask, y, math.nan), mask), expected)
    assert not torch.allclose(guide.log_prob(latents, y, ~mask), expected)
    assert math.isfinite(Trace_ELBO().loss(half_observed, guide, y, mask))
    twice = auto_faithful_guide(half_observed, y, mask, init="random", num_start_samples=100, **options)
    assert math.isfinite(Trace_ELBO().loss(half_observed, twice, y, mask))


@everywhere
def test_missing_entries_found_by_the_model(options):
    def model(y):
        seen = ~torch.isnan(y)
        half_observed(torch.where(seen, y, 0.0), seen)

    y = torch.tensor([0.3, math.nan, 1.0, -1.0])
    guide = auto_faithful_guide(model, y, num_start_samples=100, **options)
    assert math.isfinite(Trace_ELBO().loss(model, guide, y))


def dependent(x):
    with pyro.plate("data", len(x)):
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(low, low + 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@everywhere
@pytest.mark.parametrize("vectorize", [False, True])
def test_supports_that_depend_on_other_latents(vectorize, options):
    """The support in force is the one given the values sampled; gradients flow through it."""
    x = torch.randn(5)
    order = ["z", "low"]  # eliminated in this order: sampled low first
    guide = auto_faithful_guide(dependent, x, inverse=order, **options)
    assert guide.inverse.sampling_order == ("low", "z")
    values = guide(x)
    assert ((values["z"] > values["low"]) & (values["z"] < values["low"] + 2)).all()
    particles = {"num_particles": 4, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    assert math.isfinite(Trace_ELBO(**particles).loss(dependent, guide, x))
    # q(z | low) is uniform where the unconstrained factor is: by change of variables
    unit = (values["z"] - values["low"]) / 2
    trace = poutine.trace(poutine.condition(guide, values)).get_trace(x)
    fn = trace.nodes["z"]["fn"]
    by_hand = fn.base.log_prob(unit.logit().unsqueeze(-1)) - math.log(2) - (unit * (1 - unit)).log()
    torch.testing.assert_close(fn.log_prob(values["z"]), by_hand)


@everywhere
def test_a_support_that_is_not_known_yet_is_refused(options):
    with pytest.raises(UnsupportedModelError, match="'z' to be sampled after low"):
        auto_faithful_guide(dependent, torch.randn(5), inverse=["low", "z"], **options)


def test_quantiles_are_those_of_the_draws():
    x = torch.randn(3)
    guide = auto_faithful_guide(pair, x, init="random")
    guide.set_linear_("b", {"x": 2 / 3}, 0.0, math.sqrt(2 / 3))
    levels = [0.1, 0.5, 0.9]
    found = guide.quantiles(levels, x, num_draws=20_000)["b"]
    assert found.shape == (3, 3)
    if guide.inverse.parents["b"] == ("x",):
        exact = dist.Normal(2 / 3 * x, math.sqrt(2 / 3)).icdf(torch.tensor(levels).unsqueeze(-1))
        assert (found - exact).abs().max() < 0.05
    assert guide.quantiles([0.5], x)["a"].shape == (1, 3)


@everywhere
def test_given_fixes_observations(options):
    x, other = torch.randn(3), torch.randn(3)
    guide = auto_faithful_guide(pair, x, num_start_samples=100, **options)
    pyro.set_rng_seed(1)
    expected = guide(other)
    pyro.set_rng_seed(1)
    actual = guide.given(x=other)(x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    with pytest.raises(GraphflowsError, match="Expected observed sites"):
        guide.given(y=x)


@everywhere
def test_guide_list(options):
    x = torch.randn(5)
    guide = AutoGuideList(pair)
    guide.append(auto_faithful_guide(poutine.block(pair, hide=["b"]), num_start_samples=100, **options))
    guide.append(AutoNormal(poutine.block(pair, expose=["b"])))
    svi = SVI(pair, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert math.isfinite(svi.step(x))
    assert math.isfinite(svi.step(x))


@pytest.mark.parametrize("how", ["svi", "compilation", "copy"])
def test_two_guides_in_one_program(how):
    """Parameters are stored by name, and guides of one class have the same names: each must train its own."""
    x = torch.randn(5)
    first = auto_faithful_guide(pair, x, init="random")
    second = copy.deepcopy(first) if how == "copy" else auto_faithful_guide(pair, x, init="random")

    def trainer(guide):
        optim = pyro.optim.Adam({"lr": 1e-2})
        if how == "compilation":
            return InferenceCompilation(pair, guide, optim)
        return SVI(pair, guide, optim, Trace_ELBO())

    trainers = [trainer(first), trainer(second)]
    for i in (0, 1, 0, 1, 1):
        before = [[p.detach().clone() for p in guide.parameters()] for guide in (first, second)]
        trainers[i].step(x)
        after = [list(guide.parameters()) for guide in (first, second)]
        moved = [
            any(not torch.equal(b, a) for b, a in zip(*pair, strict=True))
            for pair in zip(before, after, strict=True)
        ]
        assert moved == [i == 0, i == 1]


@everywhere
def test_no_observations(options):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.LogNormal(a, 1.0))

    guide = auto_faithful_guide(model, num_start_samples=100, **options)
    guide.setup()
    values = guide()
    assert set(values) == {"a", "b"}
    assert math.isfinite(Trace_ELBO().loss(model, guide))


@everywhere
def test_handlers(options):
    x = torch.randn(5)
    guide = auto_faithful_guide(pair, x, num_start_samples=100, **options)
    a = torch.randn(5)
    trace = poutine.trace(poutine.condition(guide, {"a": a})).get_trace(x)
    assert trace.nodes["a"]["value"] is a
    other = poutine.trace(guide).get_trace(x)
    replayed = poutine.trace(poutine.replay(guide, other)).get_trace(x)
    for name in ("a", "b"):
        assert torch.equal(replayed.nodes[name]["value"], other.nodes[name]["value"])
    whole = poutine.trace(guide).get_trace(x)
    torch.testing.assert_close(
        whole.log_prob_sum(), guide.log_prob({n: whole.nodes[n]["value"] for n in ("a", "b")}, x).sum()
    )
    scaled = poutine.trace(poutine.scale(poutine.replay(guide, whole), 3.0)).get_trace(x)
    torch.testing.assert_close(scaled.log_prob_sum(), 3 * whole.log_prob_sum())
    mask = x > 0
    masked = poutine.trace(poutine.mask(poutine.replay(guide, whole), mask)).get_trace(x)
    torch.testing.assert_close(
        masked.log_prob_sum(), guide.log_prob({n: whole.nodes[n]["value"] for n in ("a", "b")}, x)[mask].sum()
    )
    model = poutine.reparam(pair, {"b": LocScaleReparam(0.0)})
    guide = auto_faithful_guide(model, x, num_start_samples=100, **options)
    assert set(guide(x)) == {"a", "b_decentered"}
    assert math.isfinite(Trace_ELBO().loss(model, guide, x))
    model = poutine.condition(pair, {"a": a})
    guide = auto_faithful_guide(model, x, num_start_samples=100, **options)
    assert set(guide(x)) == {"b"}
    assert math.isfinite(Trace_ELBO().loss(model, guide, x))


def test_module_local_params():
    x = torch.randn(5)
    with pyro.settings.context(module_local_params=True):
        guide = auto_faithful_guide(pair, x)
        elbo = Trace_ELBO()(pair, guide)
        optim = torch.optim.Adam(elbo.parameters(), lr=1e-2)
        before = [p.clone() for p in guide.parameters()]
        elbo(x).backward()
        optim.step()
        assert any(not torch.equal(b, p) for b, p in zip(before, guide.parameters(), strict=True))


@everywhere
def test_dtype(options):
    x = torch.randn(5)
    guide = auto_faithful_guide(pair, x, num_start_samples=100, **options).to(torch.float32)
    assert guide(x.float())["a"].dtype == torch.float32
    assert guide.to("cpu", torch.float64)(x)["a"].dtype == torch.float64


@everywhere
def test_replay_plates_and_subsample(options):
    x = torch.randn(20)

    def model(x):
        with pyro.plate("data", len(x), subsample_size=4) as idx:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[idx])

    def create_plates(x):
        return pyro.plate("data", len(x), subsample_size=4)

    guide = auto_faithful_guide(model, x, create_plates=create_plates, num_start_samples=100, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert math.isfinite(svi.step(x))
    assert guide(x)["z"].shape == (4,)
    with guide.plates["data"]:
        pass
