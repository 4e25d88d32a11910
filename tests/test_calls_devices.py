"""Devices and types: a guide that was set up goes to another device or type with all that it remembers.

``meta`` stands for another device: shapes, devices and types are checked, and no values. A device without float64 (MPS)
is stood for by tensors that refuse ``double()``. The tests with the marker ``gpu`` do the same where there is one.
"""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch.distributions import constraints

from pyro_graphflows import GraphflowsError
from pyro_graphflows.guides import DeepSet, Flow, Normal, auto_faithful_guide

FAMILIES = {
    "normal": "normal",
    "flow": Flow(units_per_variable=3, conditioner_units=3),
    "density": Flow(closed_form="density", units_per_variable=3, conditioner_units=3),
    "graphical": Flow(form="graphical", units_per_variable=3),
}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
SPLINES = {"spline": "spline", "auto": "auto", "fused": Normal(fusion="auto")}


def chain(w, y=None):
    one = torch.ones((), device=w.device, dtype=w.dtype)
    with pyro.plate("data", len(w)):
        a = pyro.sample("a", dist.Normal(0 * one, one))
        b = pyro.sample("b", dist.LogNormal(a, one))
        pyro.sample("y", dist.Normal(a + b * w, 0.5 * one), obs=y)


def bounded(w, y=None):
    one = torch.ones((), device=w.device, dtype=w.dtype)
    with pyro.plate("data", len(w)):
        a = pyro.sample("a", dist.Uniform(-one, 2 * one))
        b = pyro.sample("b", dist.Dirichlet(torch.ones(3).to(one)))
        pyro.sample("y", dist.Normal(a + b[..., 0] * w, 0.5 * one), obs=y)


def changing(w, y=None):
    one = torch.ones((), device=w.device, dtype=w.dtype)
    with pyro.plate("data", len(w)):
        a = pyro.sample("a", dist.Gamma(one, one))
        b = pyro.sample("b", dist.Uniform(0 * one, a + 1))
        pyro.sample("y", dist.Normal(b * w, 0.5 * one), obs=y)


def discrete(w, y=None):
    one = torch.ones((), device=w.device, dtype=w.dtype)
    with pyro.plate("data", len(w)):
        k = pyro.sample("k", dist.Bernoulli(0.4 * one))
        c = pyro.sample("c", dist.Categorical(torch.ones(3).to(one)))
        pyro.sample("y", dist.Normal(k + c * w, 0.5 * one), obs=y)


def masked(w, y=None):
    one = torch.ones((), device=w.device, dtype=w.dtype)
    with pyro.plate("data", len(w)), poutine.mask(mask=w > 0):
        a = pyro.sample("a", dist.Normal(0 * one, one))
        pyro.sample("y", dist.Normal(a, one), obs=y)


def delta(w, y=None):
    one = torch.ones((), device=w.device, dtype=w.dtype)
    with pyro.plate("data", len(w)):
        a = pyro.sample("a", dist.Normal(0 * one, one))
        d = pyro.sample("d", dist.Delta(2 * a))
        pyro.sample("y", dist.Normal(d, one), obs=y)


def grouped(w, y=None):
    one = torch.ones((), device=w.device, dtype=w.dtype)
    s = pyro.sample("s", dist.HalfNormal(one))
    with pyro.plate("groups", 4, dim=-2):
        t = pyro.sample("t", dist.Normal(0 * one, s))
        with pyro.plate("rows", 5, dim=-1):
            pyro.sample(
                "y", dist.Normal(t + w.reshape(4, 5), one), obs=None if y is None else y.reshape(4, 5)
            )


def crossed(w, y=None):
    one = torch.ones((), device=w.device, dtype=w.dtype)
    rows, columns = pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 5, dim=-1)
    with rows:
        r = pyro.sample("r", dist.Normal(0 * one, one))
    with columns:
        c = pyro.sample("c", dist.Normal(0 * one, one))
    with rows, columns:
        pyro.sample("y", dist.Normal(r + c, one), obs=None if y is None else y.reshape(4, 5))


def subsampled(w, y=None):
    one = torch.ones((), device=w.device, dtype=w.dtype)
    m = pyro.sample("m", dist.Normal(0 * one, one))
    with pyro.plate("data", len(w), subsample=torch.arange(4, device=w.device)) as index:
        a = pyro.sample("a", dist.Normal(m, one))
        pyro.sample("y", dist.Normal(a, one), obs=None if y is None else y.index_select(0, index))


MODELS = [chain, bounded, changing, discrete, masked, delta, grouped, crossed, subsampled]
models = pytest.mark.parametrize("model", MODELS, ids=[model.__name__ for model in MODELS])


def data(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    w, y = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    return w.to(device, dtype), y.to(device, dtype)


def made(model, family="normal", *, init="regression", **options):
    torch.set_default_dtype(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not faithful is said elsewhere
        return auto_faithful_guide(model, *data(), family=family, init=init, num_start_samples=500, **options)


def parts(guide):
    """Return every tensor that a guide holds, parameters and what it remembers."""
    seen, found = set(), []

    def walk(value):
        if id(value) in seen or isinstance(value, type):
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple | set | frozenset):
            for item in value:
                walk(item)
        elif isinstance(value, constraints.Constraint) or type(value).__module__.startswith(
            "pyro_graphflows"
        ):
            walk(getattr(value, "__dict__", {}))

    walk({name: value for name, value in vars(guide).items() if name not in ("_model", "prototype_trace")})
    found += [*guide.parameters(), *guide.buffers()]
    return found


@models
@families
def test_moved_to_another_device(model, family):
    pyro.enable_validation(False)
    guide = made(model, family)
    for _ in range(2):  # at the second call of a kind, what was remembered of the first
        guide(*data())
    guide.to("meta")
    # Inversions and spectral norms iterate until values say that they are done, and draws of classes look at them.
    without_values = isinstance(family, Flow) and (
        family.form == "graphical" or family.closed_form == "density"
    )
    for _ in range(0 if model is discrete or without_values else 2):
        drawn = guide(*data(device="meta"))
        assert {value.device.type for value in drawn.values()} == {"meta"}
    for part in parts(guide):
        assert part.device.type == "meta" or part.dim() == 0 or not part.is_floating_point(), part.shape


@models
@families
def test_in_double(model, family):
    guide = made(model, family).double()
    w, y = data(torch.float64)
    for _ in range(2):
        drawn = guide(w, y)
        for name, value in drawn.items():
            assert value.dtype == torch.float64 or not value.is_floating_point(), name
    assert all(part.dtype == torch.float64 for part in guide.parameters())
    loss = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(w, y)
    assert loss == loss


@families
def test_the_same_in_double(family):
    """The same guide: densities agree to the precision of the smaller type."""
    guide = made(chain, family)
    latents = {name: value.detach() for name, value in guide(*data()).items()}
    before = guide.log_prob(latents, *data()).detach()
    wide = {name: value.double() for name, value in latents.items()}
    after = guide.double().log_prob(wide, *data(torch.float64)).detach()
    torch.testing.assert_close(after.float(), before, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("pool", ["deepset", DeepSet(embedding_dim=2)])
def test_pooled_summaries_move(pool):
    pyro.enable_validation(False)
    guide = made(grouped, pool=pool)
    drawn = guide.to("meta")(*data(device="meta"))
    assert {value.device.type for value in drawn.values()} == {"meta"}
    guide = made(grouped, pool=pool).double()
    assert guide(*data(torch.float64))["t"].dtype == torch.float64


def test_without_arguments_after_the_move():
    guide = made(crossed).double()
    assert guide.median()["r"].dtype == torch.float64
    assert {value.device.type for value in made(crossed).to("meta").median().values()} == {"meta"}


def test_classes_and_enumeration_in_double():
    def model(w, y=None):
        one = torch.ones((), dtype=w.dtype)
        with pyro.plate("data", len(w)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3).to(one)))
            pyro.sample("y", dist.Normal(k * w, one), obs=y)

    guide = made(model, enumerate_sites=True).double()
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, *data(torch.float64))
    assert loss == loss


# ---------------------------------------------------------------- data of another type, or elsewhere


def test_data_of_a_wider_type_name_both():
    guide = made(chain)
    with pytest.raises(
        GraphflowsError, match=r"'w'.*torch\.float32; got torch\.float64.*guide\.to\(torch\.float64\)"
    ):
        guide(*data(torch.float64))


LINEAR = torch.nn.Linear(2, 3).float()


def single(x, y):
    """Latents and a network in single precision, and labels that may be in double, as NumPy has them."""
    decoder = pyro.module("decoder", LINEAR)
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float32), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).float(), scale.unsqueeze(-1)).to_event(1))
        assert z.dtype == torch.float32
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=y)


@families
def test_values_have_the_type_of_the_model_whatever_that_of_the_data(family):
    """The parameters of the guide are in double, its values in single, and all say the same."""
    x, y = torch.randn(5, 3).float(), torch.randn(5).double()
    torch.set_default_dtype(torch.float32)
    guide = auto_faithful_guide(single, x, y, family=family, init="prior", num_start_samples=200)
    torch.set_default_dtype(torch.float64)
    assert {part.dtype for part in guide.parameters()} == {torch.float64}
    trace = poutine.trace(guide).get_trace(x, y)
    for name in ("z", "scale"):
        assert trace.nodes[name]["value"].dtype == torch.float32, name
        assert guide.median(x, y)[name].dtype == torch.float32, name
    given = {name: trace.nodes[name]["value"].detach().clone() for name in ("z", "scale")}
    log_prob = guide.log_prob(given, x, y).sum().item()
    assert trace.log_prob_sum().item() == pytest.approx(log_prob, abs=1e-3)
    loss = SVI(single, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x, y)
    assert loss == loss


def test_a_model_that_checks_types_is_searched_in_its_own():
    def model(y):
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        if a.dtype != torch.float32:
            raise KeyError("single precision only")
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(a.exp()), obs=y)

    torch.set_default_dtype(torch.float32)
    guide = auto_faithful_guide(model, torch.tensor([1.0, 3.0]), num_start_samples=200)
    assert guide.median(torch.tensor([1.0, 3.0]))["a"].item() == pytest.approx(0.5, abs=0.3)


def test_data_elsewhere_name_both():
    pyro.enable_validation(False)
    guide = made(chain)
    with pytest.raises(
        GraphflowsError, match=r"'w' on the device of the guide, cpu; got meta.*guide\.to\('meta'\)"
    ):
        guide(*data(device="meta"))


# ---------------------------------------------------------------- devices without float64


def _no_double(self):
    raise TypeError(
        "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
    )


@pytest.mark.parametrize("init", ["regression", "random"])
@models
@families
def test_set_up_where_there_is_no_double(model, family, init, monkeypatch):
    pyro.set_rng_seed(1)
    expected = made(model, family, init=init)
    pyro.set_rng_seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "double", _no_double)
        guide = made(model, family, init=init)
    for (name, one), other in zip(guide.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert all(part.dtype == torch.float32 for part in guide.parameters())


@pytest.mark.parametrize("family", SPLINES.values(), ids=SPLINES)
def test_splines_and_fused_conditionals_elsewhere_and_without_double(family, monkeypatch):
    """The same for the families whose priors come from the model."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "double", _no_double)
        guide = made(chain, family)
    assert all(part.dtype == torch.float32 for part in guide.parameters())
    pyro.enable_validation(False)
    moved = made(chain, family).to("meta")
    assert {value.device.type for value in moved(*data(device="meta")).values()} == {"meta"}
    w, y = data(dtype=torch.double)
    assert {value.dtype for value in made(chain, family).double()(w, y).values()} == {torch.double}


# ---------------------------------------------------------------- a real one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@models
@pytest.mark.parametrize("family", [*FAMILIES.values(), *SPLINES.values()], ids=[*FAMILIES, *SPLINES])
def test_on_a_gpu(model, family):
    """Set up on the GPU, and set up on the CPU and moved, trained for a step, and back."""
    w, y = data(device="cuda")
    there = auto_faithful_guide(model, w, y, family=family, num_start_samples=500)
    moved = made(model, family).to("cuda")
    for guide in (there, moved):
        pyro.clear_param_store()
        loss = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(w, y)
        assert loss == loss
        assert {value.device.type for value in guide.median(w, y).values()} == {"cuda"}
        assert {value.device.type for value in guide.to("cpu")(*data()).values()} == {"cpu"}
