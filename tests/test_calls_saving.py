"""A guide is saved, loaded and called: the same draws and densities, for new data, without data in the file."""

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from lookup_models import GROUP, crossed, members, slopes
from plated_guides import hierarchical
from pyro.infer import SVI, Predictive, Trace_ELBO
from toy_family import LogisticFamily

from pyro_graphflows import guides, load_guide
from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs import ModelGraph, faithful_inverse
from pyro_graphflows.guides import DeepSet, Factor, Flow, Normal, NormalFactor, Spline, auto_faithful_guide
from pyro_graphflows.guides.files import Reader, Writer
from pyro_graphflows.nn.activations import make_activation
from pyro_graphflows.tensor_files import read_tensors, write_tensors
from pyro_graphflows.transforms.solver import Solver

N = dist.Normal


def pair(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(0.0, 1.0))
        pyro.sample("x", N(z, 1.0), obs=x)


def supports(x):
    n = len(x)
    with pyro.plate("data", n, dim=-1):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        b = pyro.sample("b", dist.Beta(2.0, 2.0))
        c = pyro.sample("c", dist.Dirichlet(torch.ones(3)))
        d = pyro.sample("d", dist.Uniform(torch.tensor(-1.0), 2.0))
        e = pyro.sample("e", N(torch.zeros(2), 1.0).to_event(1))
        f = pyro.sample("f", dist.LKJCholesky(2, 1.0))
        pyro.sample("x", N(a + b + c[..., 0] + d + e.sum(-1) + f[..., 1, 0], 1.0), obs=x)


def nested(batch):
    """Data in a dictionary, in two plates, with a mask."""
    x, there = batch["x"], batch["there"]
    mu = pyro.sample("mu", N(0.0, 1.0))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        m = pyro.sample("m", N(mu, 1.0))
        with pyro.plate("inner", x.shape[-2], dim=-2), pyro.poutine.mask(mask=there):
            pyro.sample("x", N(m, 1.0), obs=x)


def mixture(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        z = pyro.sample("z", N(torch.tensor([-2.0, 0.0, 2.0])[k.long()], 1.0))
        b = pyro.sample("b", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        pyro.sample("x", N(z + b.sum(-1), 0.5), obs=x)


def classes(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", N(0.0, 1.0))
        pyro.sample("y", dist.Categorical(logits=torch.stack([z, -z, 0 * z], -1)), obs=y)


def missing(x, there):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(0.0, 1.0))
        pyro.sample("x", N(z, 1.0), obs=x, obs_mask=there)


def total(x, y):
    """Copies that stay dependent across their plate, since their sum is observed."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(0.0, 1.0))
        pyro.sample("x", N(z, 1.0), obs=x)
    pyro.sample("y", N(z.sum(-1), 0.1), obs=y)


def vectors(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(torch.zeros(3), 1.0).to_event(1))
        pyro.sample(
            "x", N(torch.stack([z[..., 0], z[..., 0] + z[..., 1], z[..., 2]], -1), 1.0).to_event(1), obs=x
        )


def bounds(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.LogNormal(0.0, 0.1))
        z = pyro.sample("z", dist.Uniform(torch.zeros(()), a))
        pyro.sample("x", N(z, 1.0), obs=x)


GROUPED = GROUP, torch.linspace(-1, 1, 7), torch.linspace(-2, 1, 7)
MORE = torch.cat([GROUP, GROUP]), torch.linspace(-2, 1, 14), torch.linspace(-1, 3, 14)
TABLE = {
    "x": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
    "there": torch.tensor([[True]] * 3 + [[False]]),
}
WIDE = {
    "x": torch.randn(2, 5, generator=torch.Generator().manual_seed(0)),
    "there": torch.ones(2, 5, dtype=torch.bool),
}
CROSS = (
    torch.tensor([0, 1, 2, 3, 0, 1]),
    torch.tensor([0, 0, 1, 1, 2, 2]),
    torch.randn(6, generator=torch.Generator().manual_seed(0)),
)
THERE = torch.tensor([True, True, False, True])
X = torch.randn(12, generator=torch.Generator().manual_seed(0))

# name: model, arguments at set-up, arguments of a later call, options
CASES = {
    "plate": (pair, (X,), (X[:5],), {}),
    "random start": (pair, (X,), (X[:5],), {"init": "random", "standardize": False}),
    "supports": (supports, (X,), (X[:5],), {}),
    "per-element": (hierarchical, (X,), (X + 1,), {}),
    "pooled": (hierarchical, (X,), (X[:5],), {"pool": DeepSet(embedding_dim=3, hidden_dims=[4])}),
    "nested, masked, pooled": (nested, (TABLE,), (WIDE,), {"pool": "deepset"}),
    "looked up": (slopes, GROUPED, MORE, {}),
    "pooled by index": (slopes, GROUPED, MORE, {"pool": "deepset"}),
    "members of groups": (members, (torch.tensor([0, 1, 2, 0]), X[:4]), (torch.tensor([2, 1, 2, 0, 1]), X[:5]), {}),
    "one by one": (crossed, CROSS, (*CROSS[:2], 1 - CROSS[2]), {}),
    "discrete": (mixture, (X,), (X[:5],), {}),
    "enumerated by the guide": (classes, (torch.tensor([0, 1, 2, 2]),), (torch.tensor([1, 1]),), {}),
    "partly observed": (missing, (X[:4], THERE), (X[:3], THERE[:3]), {}),
    "coupled": (total, (X[:4], X.sum()), (X[4:8], X.sum()), {}),
    "coupled of a rank": (total, (X[:4], X.sum()), (X[4:9], X.sum()), {"pool": "deepset", "coupled_rank": 2}),
    "elements": (vectors, (X.reshape(4, 3),), (X.reshape(4, 3)[:2],), {"resolution": "element"}),
    "changing bounds": (bounds, (X,), (X[:5],), {"inverse": "reverse"}),
}  # fmt: skip


def stir_(guide):
    """Move all parameters, so that nothing is as it was at the start."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def draws(guide, *args):
    """Return draws under a seed, and their log-density."""
    pyro.set_rng_seed(7)
    latents = {name: value.detach() for name, value in guide(*args).items()}
    return latents, guide.log_prob(latents, *args).detach()


def assert_same(one, other, *args):
    latents, log_prob = draws(one, *args)
    others, other_log_prob = draws(other, *args)
    assert list(latents) == list(others)
    for name, value in latents.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=0)
    torch.testing.assert_close(other_log_prob, log_prob, rtol=0, atol=0)


FAMILIES = {
    "normal": Normal(),
    "spline": Spline(num_bins=3),
    "flow": Flow(units_per_variable=3, conditioner_units=3),
    "graphical": Flow(form="graphical", units_per_variable=3),
}
IN_ALL_FAMILIES = ["plate", "supports", "per-element", "members of groups", "discrete", "coupled", "elements"]
PAIRS = [
    (case, family) for case in CASES for family in FAMILIES if family == "normal" or case in IN_ALL_FAMILIES
]


@pytest.mark.filterwarnings("ignore:.*which read no data")
@pytest.mark.parametrize(("case", "family"), PAIRS)
def test_a_loaded_guide_is_the_guide(case, family, tmp_path):
    model, args, later, more = CASES[case]
    if family == "spline" and case == "elements":
        pytest.skip("splines have no elements with parents of their own")
    guide = auto_faithful_guide(model, *args, num_start_samples=100, family=FAMILIES[family], **more)
    stir_(guide)
    guide.save(tmp_path / "guide.safetensors")
    before = torch.get_rng_state()
    loaded = load_guide(tmp_path / "guide.safetensors", model)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.describe() == guide.describe()
    assert loaded.plan == guide.plan
    assert loaded.family == guide.family
    assert_same(guide, loaded, *later)
    assert_same(guide, loaded, *args)
    for name, quantile in loaded.quantiles([0.5], *later, num_draws=3).items():
        assert quantile.shape[1:] == guide.median(*later)[name].shape


def test_options_and_objects_come_back(tmp_path):
    family = Flow(
        num_blocks=2, solver=Solver(tolerance=1e-6), masked=Normal(hidden_dims=[4], activation="tanh")
    )
    guide = auto_faithful_guide(mixture, X, family=family, num_start_samples=100, factors={"z": Normal()})
    guide.save(tmp_path / "a" / "new" / "folder.safetensors")
    loaded = load_guide(tmp_path / "a" / "new" / "folder.safetensors", mixture)
    assert loaded.family == family
    assert loaded._options.factors == {"z": Normal()}
    assert loaded.inverse == guide.inverse
    assert loaded.model_graph.nodes == guide.model_graph.nodes
    assert loaded.plan.inverse.graph is loaded.plan.graph  # written once
    assert_same(guide, loaded, X[:3])
    loaded.save(tmp_path / "again.safetensors")
    assert_same(guide, load_guide(tmp_path / "again.safetensors", mixture), X[:3])


def test_a_loaded_guide_is_trained_copied_and_predicts(tmp_path):
    guide = auto_faithful_guide(pair, X, num_start_samples=100)
    SVI(pair, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(X)
    guide.save(tmp_path / "guide.safetensors")
    loaded = load_guide(tmp_path / "guide.safetensors", pair)
    latents = {"z": torch.zeros(12)}
    before = loaded.log_prob(latents, X).detach()
    svi = SVI(pair, loaded, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(2):
        svi.step(X)
    assert not torch.allclose(loaded.log_prob(latents, X), before)
    torch.testing.assert_close(guide.log_prob(latents, X).detach(), before)
    torch.testing.assert_close(copy.deepcopy(loaded).log_prob(latents, X), loaded.log_prob(latents, X))
    assert Predictive(loaded, num_samples=4)(X[:2])["z"].shape == (4, 2)
    assert loaded.setup(X).plan == guide.plan


def test_single_precision_and_moved_guides(tmp_path):
    torch.set_default_dtype(torch.float32)
    x = torch.randn(6)
    guide = auto_faithful_guide(pair, x, num_start_samples=100)
    guide.save(tmp_path / "guide.safetensors")
    torch.set_default_dtype(torch.float64)
    loaded = load_guide(tmp_path / "guide.safetensors", pair, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert load_guide(tmp_path / "guide.safetensors", pair, device="meta").blocks[0].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_another_device(tmp_path):
    for one, other in (("cpu", "cuda"), ("cuda", "cpu")):
        guide = auto_faithful_guide(pair, X.to(one), num_start_samples=100)
        guide.save(tmp_path / "guide.safetensors")
        loaded = load_guide(tmp_path / "guide.safetensors", pair, device=other)
        x = X[:5]
        log_prob = loaded.log_prob({"z": x.to(other)}, x.to(other))
        torch.testing.assert_close(log_prob.to(one), guide.log_prob({"z": x.to(one)}, x.to(one)))


SERVER = """
import sys, torch, pyro, pyro.distributions as dist
from pyro_graphflows import load_guide
torch.set_default_dtype(torch.float64)
def pair(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
guide = load_guide(sys.argv[1], pair)
print(guide.median(torch.tensor([1.0, 2.0, 3.0]))["z"].tolist())
"""


def test_in_another_process(tmp_path):
    guide = auto_faithful_guide(pair, X, num_start_samples=100)
    guide.save(tmp_path / "guide.safetensors")
    command = [sys.executable, "-c", SERVER, str(tmp_path / "guide.safetensors")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "3"}
    )
    found = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(found, guide.median(torch.tensor([1.0, 2.0, 3.0]))["z"].detach())


# ---------------------------------------------------------------- classes of the user's


class Wide(NormalFactor):
    """A factor of the user's."""


@dataclass(frozen=True)
class Mine(LogisticFamily):
    """A family of the user's."""


@pytest.mark.parametrize("options", [{"family": Mine(width=0.5)}, {"factors": {"z": Wide}}, {"family": Wide}])
def test_classes_of_the_users_are_given_and_never_imported(options, tmp_path):
    guide = auto_faithful_guide(pair, X, num_start_samples=100, **options)
    path = tmp_path / "guide.safetensors"
    guide.save(path)
    assert_same(guide, load_guide(path, pair, classes=[Mine, Wide]), X[:5])
    name = "Mine" if "Mine" in repr(options) else "Wide"
    with pytest.raises(GraphflowsError, match=rf"the class test_calls_saving.{name}, .* classes=\[{name}\]"):
        load_guide(path, pair)


def test_what_is_no_plain_data_is_refused(tmp_path):
    guide = auto_faithful_guide(
        pair, X, num_start_samples=100, family=Flow(activation=make_activation("elu"))
    )
    with pytest.raises(GraphflowsError, match=r"options.family.activation is .*Give options as names"):
        guide.save(tmp_path / "guide.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(GraphflowsError, match="a guide that is set up"):
        auto_faithful_guide(pair).save(tmp_path / "guide.safetensors")


# ---------------------------------------------------------------- what is in a file, and what is refused


def plain_of(path):
    tensors, texts = read_tensors(path)
    return tensors, json.loads(texts["guide"])


@pytest.mark.filterwarnings("ignore:.*which read no data")
def test_there_are_no_data_in_a_file(tmp_path):
    guide = auto_faithful_guide(slopes, *GROUPED, num_start_samples=100)
    guide(*MORE)
    guide.save(tmp_path / "guide.safetensors")
    tensors, _ = plain_of(tmp_path / "guide.safetensors")
    assert set(tensors) == {f"state.{name}" for name in guide.state_dict()}


def test_a_file_of_another_model_is_refused(tmp_path):
    path = tmp_path / "guide.safetensors"
    auto_faithful_guide(pair, X, num_start_samples=100).save(path)

    def other_parameters(x, y):
        pair(x)

    def other_sites(x):
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", N(0.0, 1.0))
            pyro.sample("x", N(w, 1.0), obs=x)

    def other_sizes(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", N(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", N(z.sum(-1), 1.0), obs=x)

    def other_distributions(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", N(z, 1.0), obs=x)

    def other_plates(x):
        z = pyro.sample("z", N(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", N(z, 1.0), obs=x)

    def with_an_option(x, scale=1.0):
        pair(x)

    with pytest.raises(UnsupportedModelError, match=r"with the parameters \(x\); got one with \(x, y\)"):
        load_guide(path, other_parameters)
    for model, message in (
        (other_sites, "this call has w as well"),
        (other_sizes, r"'z' is a Normal in plate data; in this model it is a Normal of event shape \(2,\)"),
        (other_distributions, "'z' is a Normal in plate data; in this model it is a LogNormal"),
        (other_plates, "'z' is a Normal in plate data; in this model it is a Normal in no plate"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            load_guide(path, model)(X)
    assert load_guide(path, with_an_option)(X)["z"].shape == (12,)


def test_guides_of_every_support_are_copied_and_pickled():
    """Copies have supports of their own, which are no others for that."""

    def model(y):
        on = pyro.sample("on", dist.Bernoulli(0.3))
        kind = pyro.sample("kind", dist.OneHotCategorical(torch.ones(3)))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        rates = pyro.sample("rates", dist.Dirichlet(torch.ones(2)))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        mean = on + kind @ torch.arange(3.0) + share + rates[0]
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    guide = auto_faithful_guide(model, X, num_start_samples=100)
    seen = []
    for copied in (guide, copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        copied.bind(model)
        pyro.set_rng_seed(1)
        seen.append(copied(X))
    for other in seen[1:]:
        assert other.keys() == seen[0].keys()
        assert all(torch.equal(other[name], value) for name, value in seen[0].items())


def test_a_file_of_another_version_is_refused(tmp_path):
    path = tmp_path / "guide.safetensors"
    auto_faithful_guide(pair, X, num_start_samples=100).save(path)
    tensors, plain = plain_of(path)

    def rewritten(change, state=tensors):
        new = copy.deepcopy(plain)
        change(new)
        write_tensors(path, state, {"guide": json.dumps(new)})

    rewritten(lambda new: new.update(format=0))
    with pytest.raises(
        GraphflowsError, match=r"of format \d+, .* is of format 0. Load it with the version that wrote"
    ):
        load_guide(path, pair)
    rewritten(lambda new: new["objects"][0][1].update(unknown=3))
    with pytest.raises(GraphflowsError, match="as this version has them"):
        load_guide(path, pair)
    rewritten(lambda new: new["contents"]["map"].remove(["scores", None]))
    with pytest.raises(GraphflowsError, match="has none named 'scores'"):
        load_guide(path, pair)
    rewritten(lambda new: new["objects"][0].__setitem__(0, "os.system"))
    with pytest.raises(GraphflowsError, match="a file never imports anything"):
        load_guide(path, pair)
    rewritten(lambda new: None, {name: value for name, value in tensors.items() if "shift" not in name})
    with pytest.raises(GraphflowsError, match="of another version"):
        load_guide(path, pair)
    write_tensors(path, {"a": torch.ones(2)})
    with pytest.raises(GraphflowsError, match="it holds no guide"):
        load_guide(path, pair)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "guide.safetensors"
    auto_faithful_guide(pair, X, num_start_samples=100).save(path)
    content = path.read_bytes()
    for cut in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(GraphflowsError, match="It is damaged"):
            load_guide(path, pair)
    for at in range(8, len(content), len(content) // 50):  # a flipped bit, wherever it is
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(GraphflowsError):
            load_guide(path, pair)
    path.write_bytes(content + b"more")
    with pytest.raises(GraphflowsError, match="Expected a whole file of the safetensors format"):
        load_guide(path, pair)
    path.write_bytes(struct.pack("<Q", 2**62) + content[8:])
    with pytest.raises(GraphflowsError, match="It is damaged or another"):
        load_guide(path, pair)
    torch.save({"a": 1}, path)
    with pytest.raises(GraphflowsError, match="It is damaged or another"):
        load_guide(path, pair)
    with pytest.raises(GraphflowsError, match="a file that can be read"):
        load_guide(tmp_path / "nothing.safetensors", pair)


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "guide.safetensors"
    guide = auto_faithful_guide(pair, X, num_start_samples=100)
    guide.save(path)
    content = path.read_bytes()

    def full(*_):
        raise OSError("no space left on the device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        guide.save(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- plain data


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, 0.1, float("inf"), "text", (), (1, (2,)), [1, [2.0]], {"a": 1, ("b", 2): [None]}),
        *(frozenset({"a"}), torch.Size([2, 3]), slice(1, None), ..., torch.float32),
        ("batch", 0, "y", ..., 1),
        *(dist.constraints.positive, dist.constraints.simplex, dist.constraints.integer_interval(0, 3)),
    ],
    ids=repr,
)  # fmt: skip
def test_values_as_plain_data(value):
    writer = Writer()
    text = json.dumps(writer.write(value), allow_nan=False)
    found = Reader(writer.objects, writer.tensors, ()).read(json.loads(text))
    assert type(found) is type(value)
    assert found == value if isinstance(value, frozenset) else str(found) == str(value)


@pytest.mark.parametrize("edges", ["ax bx", "cx bc ab", "bx ax cb dx"])
def test_graphs_keep_their_order(edges):
    graph = ModelGraph(edges.split(), ["x"], plates={"x": ["data"]}, event_sizes={"x": 2})
    inverse = faithful_inverse(graph)
    writer = Writer()
    plain = writer.write({"inverse": inverse, "graph": graph})
    found = Reader(writer.objects, {}, ()).read(json.loads(json.dumps(plain)))
    assert found["inverse"] == inverse
    assert found["inverse"].graph is found["graph"]
    assert found["graph"].nodes == graph.nodes
    assert found["inverse"].levels == inverse.levels


def test_the_names_are_public():
    assert guides.load_guide is load_guide
    assert Factor is guides.Factor


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


def of_a_batch(batch, ind=None):
    """Covariates in an object, and rows of a plate taken from it."""
    with pyro.plate("data", len(batch.x), subsample=ind) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + batch.x[rows], 0.5), obs=batch.y[rows])


def of_a_loop(batch, ind):
    for k, i in enumerate(pyro.plate("data", len(batch.x), subsample=ind)):
        z = pyro.sample(f"z_{k}", dist.Normal(0.0, 1.0))
        pyro.sample(f"y_{k}", dist.Normal(z + batch.x[i], 0.5), obs=batch.y[i])


class WithData:
    def __init__(self, x):
        self.x = x

    def __call__(self, y, ind):
        with pyro.plate("data", len(self.x), subsample=ind) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + self.x[rows], 0.5), obs=y[rows])


@pytest.mark.parametrize("kind", ["object", "loop", "field of the model"])
def test_a_loaded_guide_finds_fields_and_rows(kind, tmp_path):
    x, y, ind = torch.randn(8), torch.randn(8), torch.tensor([5, 2])
    model = {"object": of_a_batch, "loop": of_a_loop, "field of the model": WithData(x)}[kind]
    data = y if kind == "field of the model" else Batch(x, y)
    guide = auto_faithful_guide(model, data, ind, num_start_samples=500)
    guide.save(tmp_path / "guide.safetensors")
    loaded = load_guide(tmp_path / "guide.safetensors", model)
    for rows in (ind, torch.tensor([0, 7])):
        expected, found = guide.median(data, rows), loaded.median(data, rows)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


# ---------------------------------------------------------------- states and Pyro's parameter store


def heavy(y):
    """The mean of data with heavy tails: with many joint samples they come in by another map than with few."""
    mu = pyro.sample("mu", N(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(3.0, mu, 1.0), obs=y)


def test_a_state_brings_the_kinds_of_features(tmp_path):
    """Which map suits a feature is chosen from samples: with others the same weights would be another guide."""
    few, many = (
        auto_faithful_guide(heavy, X, pool="deepset", num_start_samples=number) for number in (30, 10_000)
    )
    kinds = [[m.kinds for m in one.blocks[0].inputs.pool("pooled(y; data)").maps] for one in (few, many)]
    assert kinds[0] != kinds[1]
    before = few.log_prob({"mu": torch.tensor(0.3)}, X)
    few.load_state_dict(many.state_dict())
    assert_same(few, many, 3 * X)
    assert not torch.allclose(few.log_prob({"mu": torch.tensor(0.3)}, X), before)
    few.save(tmp_path / "guide.safetensors")
    assert_same(load_guide(tmp_path / "guide.safetensors", heavy), many, 3 * X)


def test_a_state_of_another_plan_is_refused():
    """Parameters of equal names and shapes, by which sites look at other things, would be misread in silence."""

    def total_of_two(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", N(0.0, 1.0))
            b = pyro.sample("b", N(0.0, 1.0))
            pyro.sample("x", N(a + b, 1.0), obs=x)

    one, other = (
        auto_faithful_guide(total_of_two, X, inverse=order, num_start_samples=100)
        for order in (["a", "b"], ["b", "a"])
    )
    shapes = [{name: value.shape for name, value in guide.state_dict().items()} for guide in (one, other)]
    assert shapes[0] == shapes[1]
    with pytest.raises(GraphflowsError, match="state of a guide of the same plan"):
        one.load_state_dict(other.state_dict())
    one.load_state_dict(copy.deepcopy(one.state_dict()))
