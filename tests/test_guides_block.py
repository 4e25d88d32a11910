"""Blocks at work: features of a call, errors by node, linear conditionals in units of data, parameters in a store."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from lookup_models import crossed, members
from plated_guides import hierarchical
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.guides import DeepSet, auto_faithful_guide
from pyro_graphflows.guides.block import BlockInputs, GuideBlock
from pyro_graphflows.guides.call import Call, PlateState
from pyro_graphflows.guides.conditionals.pooling import AllElements, LookedUp, PoolMember
from pyro_graphflows.guides.sites import DiscreteEncoding, FeatureMap, InputEncodings

N = dist.Normal

# ---------------------------------------------------------------- features


def inputs_of(pools=None, **maps):
    dims = {"x": 0, "v": 1, "k": 0}
    fn = dist.Categorical(torch.ones(3))
    classes = {"k": DiscreteEncoding.of(fn, torch.long)}
    return BlockInputs(maps, pools or {}, InputEncodings(dims, classes))


def identity(size):
    return FeatureMap(None, torch.zeros(0, size))


def call_of(plates=(), **values):
    return Call(values, {plate.name: plate for plate in plates})


def test_features_are_standardised_values_side_by_side():
    sample = 5.0 + 2.0 * torch.randn(100, 1)
    positive = torch.randn(100, 2).exp()
    inputs = inputs_of(
        x=FeatureMap(None, sample), v=FeatureMap(constraints.positive, positive), z=identity(2)
    )
    assert inputs.names == ("x", "v", "z")
    assert inputs.sizes == {"x": 1, "v": 2, "z": 2}
    x, v, z = torch.randn(4), torch.rand(4, 2), torch.randn(4, 2)
    found = inputs(call_of(x=x, v=v), {"z": z})
    log = positive.log()
    expected = [(x[:, None] - sample.mean()) / sample.std(), (v.log() - log.mean(0)) / log.std(0), z]
    torch.testing.assert_close(found, torch.cat(expected, -1))


def test_sampled_values_come_before_data_and_classes_are_indicators():
    inputs = inputs_of(x=identity(1), k=identity(3))
    found = inputs(call_of(x=torch.zeros(2), k=torch.tensor([2, 0])), {"x": torch.ones(2, 1)})
    assert found.tolist() == [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]]


def test_outer_plates_broadcast_into_inner_ones():
    inputs = inputs_of(x=identity(1), z=identity(1))
    x, z = torch.randn(3, 4), torch.randn(3, 1, 1)
    found = inputs(call_of(x=x), {"z": z})
    assert found.shape == (3, 4, 2)
    assert torch.equal(found[1, 2], torch.stack([x[1, 2], z[1, 0, 0]]))


def test_summaries_are_features_too():
    groups, data = PlateState("groups", -1, 3, 3, None), PlateState("data", -1, 4, 4, None)
    theta = PoolMember("theta", 1, frozenset({"groups"}))
    looked_up = LookedUp(theta, identity(1), "g", "groups", "data")
    everything = AllElements([theta], [identity(1)], [groups])
    values = {"theta": torch.tensor([[1.0], [2.0], [3.0]])}
    call = call_of((groups, data), g=torch.tensor([2, 0, 0, 1]), x=torch.zeros(4))
    inputs = inputs_of({"theta[g]": looked_up}, **{"x": identity(1), "theta[g]": identity(1)})
    assert inputs(call, values).tolist() == [[0.0, 3.0], [0.0, 1.0], [0.0, 1.0], [0.0, 2.0]]
    assert inputs.pool("theta[g]") is looked_up
    assert inputs.pool("x") is None
    inputs = inputs_of({"all": everything}, all=identity(3))
    assert inputs(call, values).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    inputs = inputs_of(x=identity(1), v=identity(2), z=identity(1))
    holes = torch.zeros(4, 2)
    holes[2, 1] = bad
    with pytest.raises(
        GraphflowsError, match=r"finite values of the data the guide conditions on; v have NaN"
    ):
        inputs(call_of(x=torch.zeros(4), v=holes), {"z": torch.zeros(4, 1)})
    with pytest.raises(GraphflowsError, match=r"; x, v have NaN"):
        inputs(call_of(x=holes[:, 1], v=holes), {"z": torch.zeros(4, 1)})


def test_values_of_another_size_are_refused_with_all_sizes():
    inputs = inputs_of(x=identity(1), v=identity(2))
    with pytest.raises(GraphflowsError, match=r"Expected 3 conditioning features in all, .*; got x: 1, v: 5"):
        inputs(call_of(x=torch.zeros(4), v=torch.zeros(4, 5)), {})


def test_inputs_of_nothing():
    assert inputs_of()(call_of(), {}).shape == (0,)


def test_inputs_come_back_from_plain_data_and_a_state():
    made = inputs_of(
        x=FeatureMap(None, torch.randn(50, 1)), v=FeatureMap(constraints.positive, torch.rand(50, 2))
    )
    loaded = BlockInputs.from_plain(made.to_plain())
    loaded.load_state_dict(made.state_dict())
    call = call_of(x=torch.randn(4), v=torch.rand(4, 2))
    assert torch.equal(loaded(call, {}), made(call, {}))


# ---------------------------------------------------------------- linear conditionals in natural units


# what is tested is the conditional of another site than that with parameters for the data at set-up
other_data = pytest.mark.filterwarnings("ignore:The per-element parameters of")


def emitted(guide, site, args, values):
    """Return the log-density of a site's value, given those of all others, as the guide's trace has it."""
    trace = poutine.trace(poutine.condition(guide, values)).get_trace(*args)
    fn = trace.nodes[site]["fn"]
    return fn.log_prob(values[site])


def scaled(w, x):
    """Data far from zero and far from one, a covariate, a positive latent site and one for each datum."""
    size = pyro.sample("size", dist.LogNormal(3.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(40.0 + 7.0 * w, 20.0))
        u = pyro.sample("u", N(z, 3.0))
        pyro.sample("x", N(100.0 + u, size), obs=x)


W, X = torch.linspace(-3, 9, 5, dtype=torch.float64), torch.linspace(90, 240, 5, dtype=torch.float64)
FEW = {"num_start_samples": 200, "inverse": "reverse"}


@other_data
@pytest.mark.parametrize("family", ["normal", "spline", "flow"])
def test_elementwise_parents(family):
    """Weights are those of the values themselves: standardisations on the way, of all three kinds, are worked in."""
    guide = auto_faithful_guide(scaled, W, X, family=family, **FEW)
    parents = guide.inverse.parents["u"]
    assert set(parents) >= {"x", "z", "size"}
    weights = {"x": 0.25, "z": 0.7, "size": -2.0}
    guide.set_linear_("u", weights, -30.0, 1.7)
    values = {"size": torch.tensor(15.0), "z": 40 + 20 * torch.randn(5), "u": 40 + 20 * torch.randn(5)}
    x = X + 5 * torch.randn(5)
    mean = -30.0 + 0.25 * x + 0.7 * values["z"] - 2.0 * values["size"].log()  # the vector of a positive value
    found = emitted(guide, "u", (W, x), values)
    torch.testing.assert_close(found, N(mean, 1.7).log_prob(values["u"]), atol=1e-6, rtol=1e-6)
    guide.set_linear_("u", {}, 3.0, 9.0)
    found = emitted(guide, "u", (W, x), values)
    torch.testing.assert_close(found, N(3.0, 9.0).log_prob(values["u"]), atol=1e-6, rtol=1e-6)


def vectors(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", N(torch.tensor([10.0, -20.0]), 5.0).to_event(1))
        b = pyro.sample("b", N(a.sum(-1, keepdim=True).expand(*a.shape[:-1], 3), 7.0).to_event(1))
        pyro.sample("x", N(b[..., :2] + a, 3.0).to_event(1), obs=x)


def test_matrices_between_vectors():
    guide = auto_faithful_guide(vectors, torch.randn(4, 2) * 9 + 5, **FEW)
    assert set(guide.inverse.parents["b"]) == {"a", "x"}
    of_a, of_x, loc = torch.randn(3, 2), torch.randn(3, 2), torch.randn(3)
    tril = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-1.0, 0.3, 0.7]])
    guide.set_linear_("b", {"a": of_a, "x": of_x}, loc, tril)
    x, values = 9 * torch.randn(4, 2), {"a": 9 * torch.randn(4, 2), "b": torch.randn(4, 3)}
    exact = dist.MultivariateNormal(loc + values["a"] @ of_a.T + x @ of_x.T, scale_tril=tril)
    torch.testing.assert_close(emitted(guide, "b", (x,), values), exact.log_prob(values["b"]))


@pytest.mark.parametrize("pool", [DeepSet(embedding_dim=0), "deepset"])
def test_pooled_parents_count_by_their_mean(pool):
    guide = auto_faithful_guide(hierarchical, 30.0 + torch.randn(6), pool=pool, **FEW)
    assert guide.inverse.parents["mu"] == ("x",)
    guide.set_linear_("mu", {"x": 0.8}, -3.0, 0.5)
    for n in (6, 3, 11):  # the number of elements is a feature too, with weight zero
        x = 30 * torch.randn(n)
        values = {"mu": torch.tensor(1.3), "z": torch.randn(n)}
        expected = N(-3.0 + 0.8 * x.mean(), 0.5).log_prob(values["mu"])
        torch.testing.assert_close(emitted(guide, "mu", (x,), values), expected)


@other_data
def test_parents_that_are_looked_up():
    group = torch.tensor([0, 2, 1, 1])
    guide = auto_faithful_guide(members, group, torch.randn(4), **FEW)
    parents = guide.inverse.parents["z"]
    assert "theta" in parents
    guide.set_linear_("z", {"theta": 0.6, "x": 0.3}, 0.1, 0.4)
    for other in (group, torch.tensor([2, 2, 0, 1, 0])):
        x = torch.randn(len(other))
        values = {"theta": 4 * torch.randn(3), "z": torch.randn(len(other))}
        expected = N(0.1 + 0.6 * values["theta"][other] + 0.3 * x, 0.4).log_prob(values["z"])
        torch.testing.assert_close(emitted(guide, "z", (other, x), values), expected)


@other_data
def test_parents_that_come_in_one_by_one():
    """A weight for each element of the other plate, of which the site sees every one."""
    rows, columns = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    guide = auto_faithful_guide(crossed, rows, columns, torch.randn(6), num_start_samples=200)
    first, second = guide.inverse.sampling_order
    assert guide.plan.ways[first, second] == "one by one"
    sizes = {"a": 4, "b": 3}
    slopes = torch.randn(1, sizes[first])
    guide.set_linear_(second, {first: slopes}, 0.2, 0.9)
    values = {name: torch.randn(size) for name, size in sizes.items()}
    mean = 0.2 + slopes @ values[first]
    found = emitted(guide, second, (rows, columns, torch.randn(6)), values)
    torch.testing.assert_close(found, N(mean, 0.9).log_prob(values[second]))
    with pytest.raises(
        GraphflowsError, match=rf"weights of '{first}' for '{second}' of shape \(1, {sizes[first]}\)"
    ):
        guide.set_linear_(second, {first: torch.ones(1, 9)}, 0.0, 1.0)


def positive_data(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(0.0, 1.0))
        pyro.sample("x", dist.LogNormal(z, 1.0), obs=x)


def test_data_on_a_half_line_count_by_their_logarithm():
    """As latents do: by the vector on the real line."""
    guide = auto_faithful_guide(positive_data, torch.rand(5) + 1, num_start_samples=200)
    guide.set_linear_("z", {"x": 0.5}, 0.1, 0.7)
    x, values = torch.rand(4) * 9, {"z": torch.randn(4)}
    torch.testing.assert_close(
        emitted(guide, "z", (x,), values), N(0.1 + 0.5 * x.log(), 0.7).log_prob(values["z"])
    )


def counts(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(1.0, 1.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


def heavy(w, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(0.0, 1.0))
        pyro.sample("x", dist.StudentT(1.0, z, 1.0), obs=x)


@pytest.mark.parametrize(("model", "kind"), [(counts, "log1p"), (heavy, "asinh")])
def test_data_that_come_in_by_another_map_are_refused(model, kind):
    args = (torch.tensor([0.0, 3.0, 1.0]),) if model is counts else (torch.zeros(3), torch.randn(3))
    guide = auto_faithful_guide(model, *args, num_start_samples=5000)
    with pytest.raises(GraphflowsError, match=rf"'x' .* {kind} .*standardize=False"):
        guide.set_linear_("z", {"x": 0.5}, 0.0, 1.0)
    guide.set_linear_("z", {}, 0.3, 1.0)  # without a weight nothing is in the way
    plain = auto_faithful_guide(model, *args, standardize=False, init="random")
    plain.set_linear_("z", {"x": 0.5}, 0.1, 0.7)
    values = {"z": torch.randn(3)}
    torch.testing.assert_close(
        emitted(plain, "z", args, values), N(0.1 + 0.5 * args[-1], 0.7).log_prob(values["z"])
    )


def test_a_block_comes_back_from_plain_data_and_a_state():
    guide = auto_faithful_guide(hierarchical, torch.randn(6), pool="deepset", **FEW)
    for block in guide.blocks:
        loaded = GuideBlock.from_plain(block.to_plain())
        loaded.load_state_dict(block.state_dict())
        assert loaded.plan == block.plan
        assert loaded.dtype == block.dtype
        assert loaded.inputs.sizes == block.inputs.sizes


DATA = torch.randn(12, generator=torch.Generator().manual_seed(0))


def pair(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(0.0, 1.0))
        pyro.sample("x", N(z, 1.0), obs=x)


def triples(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(torch.zeros(3), 1.0).to_event(1))
        pyro.sample(
            "x", N(torch.stack([z[..., 0], z[..., 0] + z[..., 1], z[..., 2]], -1), 1.0).to_event(1), obs=x
        )


@pytest.mark.parametrize("when", ["before set-up", "after set-up", "after a call"])
def test_the_parameter_store_that_was_loaded(when, tmp_path):
    trained = auto_faithful_guide(pair, DATA, num_start_samples=100)
    svi = SVI(pair, trained, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(DATA)
    store = pyro.get_param_store()
    store.save(tmp_path / "store")
    expected = trained.median(DATA)["z"]
    pyro.clear_param_store()
    if when == "before set-up":
        store.load(tmp_path / "store")
    guide = auto_faithful_guide(pair, DATA, num_start_samples=100)
    if when == "after a call":
        SVI(pair, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(DATA)
    if when != "before set-up":
        store.load(tmp_path / "store")
    assert not torch.allclose(guide.median(DATA)["z"], expected)
    with pytest.warns(GraphflowsWarning, match="took the values that Pyro's parameter store had"):
        guide(DATA)
    torch.testing.assert_close(guide.median(DATA)["z"], expected)
    SVI(pair, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(DATA)  # without a second warning
    assert not torch.allclose(guide.median(DATA)["z"], expected)
    other = auto_faithful_guide(pair, DATA, num_start_samples=100)
    start = other.median(DATA)["z"]
    other(DATA)  # its names are those of the first, whose values are not for it
    assert torch.equal(other.median(DATA)["z"], start)


def test_a_parameter_store_of_other_shapes_is_refused(tmp_path):
    auto_faithful_guide(pair, DATA, num_start_samples=100)(DATA)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    guide = auto_faithful_guide(triples, DATA.reshape(4, 3), num_start_samples=100)
    with pytest.raises(GraphflowsError, match="Pyro's parameter store has some of shape"):
        guide(DATA.reshape(4, 3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))])
def test_a_copy_shows_its_own_parameters(copied):
    guide = auto_faithful_guide(pair, DATA, num_start_samples=100)
    guide(DATA)
    other = copied(guide).bind(pair)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    pyro.clear_param_store()
    other(DATA)
    shown = {id(value.unconstrained()) for value in pyro.get_param_store().values()}
    assert {id(parameter) for parameter in other.parameters()} == shown
