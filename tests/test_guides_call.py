"""Reading a call: where values come from, when the model is run, plates, masks, scales and supports."""

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides.call import (
    CallReader,
    PlateState,
    chosen_indices,
    is_constant,
    plates_of,
    site_mask,
)
from pyro_graphflows.guides.sites import input_encodings
from pyro_graphflows.inspect import trace_model

N = dist.Normal


class Counted:
    """A model that counts its runs."""

    def __init__(self, model):
        self.model, self.runs = model, 0

    def __call__(self, *args, **kwargs):
        self.runs += 1
        return self.model(*args, **kwargs)


def reader_of(model, *args, keep_masks=False, **kwargs):
    traced = trace_model(model, args, kwargs)
    return CallReader(traced, input_encodings(model, args, kwargs, traced), keep_masks=keep_masks)


def regression(w, x):
    slope = pyro.sample("slope", N(0.0, 1.0))
    with pyro.plate("data", len(w)):
        z = pyro.sample("z", N(slope * w, 1.0))
        pyro.sample("x", N(z, 1.0), obs=x)


W, X = torch.arange(4.0, dtype=torch.float64), torch.linspace(-1, 1, 4, dtype=torch.float64)


# ---------------------------------------------------------------- values


def test_values_that_are_arguments():
    reader = reader_of(regression, W, X)
    w, x = torch.randn(4), torch.randn(4)
    call = reader.read(regression, (w, x), {})
    assert set(call.values) == {"w", "x"}
    assert torch.equal(call.values["w"], w)
    assert torch.equal(call.values["x"], x)
    named = reader.read(regression, (), {"x": x, "w": w})
    assert torch.equal(named.values["x"], x)
    assert torch.equal(named.values["w"], w)


def test_values_that_the_model_computes():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", N(0.0, 1.0))
            pyro.sample("x", N(z, 1.0), obs=y.log())

    reader, y = reader_of(model, X.exp()), torch.rand(4) + 1
    call = reader.read(model, (y,), {})
    torch.testing.assert_close(call.values["x"], y.log())


def test_observations_come_first():
    reader, x = reader_of(regression, W, X), torch.randn(4)
    for _ in range(2):  # read, and as known
        call = reader.read(regression, (W, X), {}, observations={"x": x})
        assert call.values["x"] is x
        assert torch.equal(call.values["w"], W)
    assert torch.equal(reader.read(regression, (W, X), {}).values["x"], X)
    without = reader.read(regression, (W, None), {}, observations={"x": x})
    assert without.values["x"] is x


def test_reading_leaves_no_trace():
    reader = reader_of(regression, W, X)
    before = torch.get_rng_state()
    with poutine.trace() as seen:
        call = reader.read(regression, (W, X), {})
    assert list(seen.trace.nodes) == []
    assert torch.equal(torch.get_rng_state(), before)
    assert len(pyro.get_param_store()) == 0
    w = W.clone().requires_grad_()
    assert reader.read(regression, (w, X), {}).values["w"].requires_grad  # an argument as it is
    with pytest.raises(dataclasses.FrozenInstanceError):
        call.values = {}


# ---------------------------------------------------------------- when the model is run


def test_calls_whose_arguments_say_all_need_one_run_for_each_shape():
    model = Counted(regression)
    reader = reader_of(model, W, X)
    model.runs = 0
    for _ in range(3):
        call = reader.read(model, (torch.randn(4), torch.randn(4)), {})
    assert model.runs == 1
    assert call.plates["data"].size == 4
    for size in (7, 7, 4):
        x = torch.randn(size)
        call = reader.read(model, (torch.zeros(size), x), {})
        assert torch.equal(call.values["x"], x)
        assert call.plates["data"].size == size
    assert model.runs == 2
    reader.read(model, (torch.zeros(4).float(), torch.zeros(4).float()), {})
    assert model.runs == 3  # another type is another kind of call


def test_numbers_and_texts_tell_calls_apart_and_objects_are_never_known():
    def scaled(x, scale=1.0, options=None):
        with pyro.plate("data", len(x)), poutine.scale(scale=1.0):
            z = pyro.sample("z", N(0.0, 1.0))
            pyro.sample("x", N(z, scale), obs=x)

    model = Counted(scaled)
    reader = reader_of(model, X)
    model.runs = 0
    for scale in (1.0, 2.0, 1.0, 2.0):
        reader.read(model, (X,), {"scale": scale})
    assert model.runs == 2
    for _ in range(2):
        reader.read(model, (X,), {"options": object()})
    assert model.runs == 4


@pytest.mark.parametrize("what", ["computed", "mask", "scale", "support", "indices"])
def test_what_arguments_do_not_say_takes_a_run_for_each_call(what):
    def bare(x):
        mask, scale = (x > 0) if what == "mask" else True, 2.0 if what == "scale" else 1.0
        indices = torch.tensor([2, 0]) if what == "indices" else None
        with (
            pyro.plate("data", 4, subsample=indices) as chosen,
            poutine.mask(mask=mask),
            poutine.scale(scale=scale),
        ):
            top = x[chosen].abs() + 1.0 if what == "support" else 1.0
            z = pyro.sample("z", dist.Uniform(0.0, top))
            pyro.sample("x", N(z, 1.0), obs=2.0 * x[chosen] if what == "computed" else x[chosen])

    model = Counted(bare)
    reader = reader_of(model, X)
    model.runs = 0
    for _ in range(2):
        before, x = model.runs, torch.randn(4)
        call = reader.read(model, (x,), {})
        assert model.runs > before
        if what == "computed":
            assert torch.equal(call.values["x"], 2 * x)
        elif what == "mask":
            assert torch.equal(call.masks["z"], x > 0)
        elif what == "scale":
            assert call.scales == {"z": 2.0}
        elif what == "support":
            assert torch.equal(call.supports["z"].upper_bound, x.abs() + 1)
        else:
            assert call.plates["data"].indices.tolist() == [2, 0]
            assert torch.equal(call.values["x"], x[[2, 0]])


# ---------------------------------------------------------------- plates, masks, scales, supports


def test_plates_of_a_call():
    def model(x):
        with pyro.plate("columns", x.shape[-1], dim=-1):
            a = pyro.sample("a", N(0.0, 1.0))
            with pyro.plate("rows", 6, subsample_size=2, dim=-2) as rows:
                z = pyro.sample("z", N(a, 1.0))
                pyro.sample("x", N(z, 1.0), obs=x[rows])

    x = torch.randn(6, 3)
    reader = reader_of(model, x)
    call = reader.read(model, (x,), {}, indices={"rows": torch.tensor([4, 1])})
    assert call.plates["columns"] == PlateState("columns", -1, 3, 3, None)
    rows = call.plates["rows"]
    assert (rows.dim, rows.size, rows.full_size, rows.subsampled) == (-2, 2, 6, True)
    assert rows.indices.tolist() == [4, 1]
    assert not call.plates["columns"].subsampled
    assert torch.equal(call.values["x"], x[[4, 1]])
    assert call.scales == {}  # that of a subsampled plate is the plate's own


def masked(x, mask):
    z = pyro.sample("z", N(0.0, 1.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", N(z, 1.0).mask(mask[0]))
        with poutine.mask(mask=mask):
            v = pyro.sample("v", N(u, 1.0).mask(~mask))
            pyro.sample("x", N(v, 1.0), obs=x)


def test_masks_of_latent_sites_and_of_observed_ones_where_they_are_wanted():
    mask = torch.tensor([True, True, False, True])
    call = reader_of(masked, X, mask).read(masked, (X, mask), {})
    assert set(call.masks) == {"u", "v"}
    assert torch.as_tensor(call.masks["u"]).all()
    assert not call.masks["v"].any()  # that of the handler and that of the distribution
    call = reader_of(masked, X, mask, keep_masks=True).read(masked, (X, mask), {})
    assert set(call.masks) == {"u", "v", "x"}
    assert torch.equal(call.masks["x"], mask)


def test_mask_in_force_at_a_site():
    mask = torch.tensor([True, False])
    fn = N(torch.zeros(2), 1.0)
    assert site_mask({"mask": None, "fn": fn}) is None
    assert site_mask({"mask": True, "fn": fn}) is None
    assert site_mask({"mask": mask, "fn": fn}) is mask
    assert site_mask({"mask": False, "fn": fn}) is False
    assert site_mask({"mask": None, "fn": fn.mask(True)}) is None
    assert site_mask({"mask": None, "fn": fn.mask(mask)}) is mask
    assert site_mask({"mask": torch.tensor([True, True]), "fn": fn.mask(mask)}).tolist() == [True, False]


def test_supports_and_scales_of_a_call():
    def model(x, top):
        with poutine.scale(scale=3.0):
            a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 8, subsample_size=4):
            z = pyro.sample("z", dist.Uniform(0.0, top))
            pyro.sample("x", N(a + z, 1.0), obs=x)

    reader = reader_of(model, X, 2.0)
    call = reader.read(model, (X, 5.0), {})
    assert call.scales == {"a": 3.0}
    assert call.supports["z"].upper_bound == 5.0
    assert is_constant(call.supports["a"])


def test_supports_given_other_latents_are_differentiable():
    def model(x):
        low = pyro.sample("low", N(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(low, low.exp() + 2.0))
        pyro.sample("x", N(z, 1.0), obs=x)

    x = torch.tensor(1.0)
    reader, low = reader_of(model, x), torch.tensor(0.5, requires_grad=True)
    supports = reader.supports_given(model, (x,), {}, {"low": low}, {})
    assert supports["z"].lower_bound.item() == 0.5
    (slope,) = torch.autograd.grad(supports["z"].upper_bound, low)
    assert slope.item() == pytest.approx(torch.tensor(0.5).exp().item())
    assert reader.read(model, (x,), {}).supports["z"].lower_bound.item() == 0.0  # at the feasible point


def test_every_support_has_a_feasible_point():
    """The model is run at a point of every support, drawn from no distribution."""

    def model(x):
        a = pyro.sample("a", dist.Beta(1.0, 1.0))
        b = pyro.sample("b", dist.Dirichlet(torch.ones(3)))
        c = pyro.sample("c", dist.LKJCholesky(2, 1.0))
        d = pyro.sample("d", dist.Categorical(torch.ones(3)))
        e = pyro.sample("e", dist.Uniform(-1.0, 3.0))
        total = a + b.sum() + c.sum() + d + e
        pyro.sample("x", dist.Gamma(a.log() - (1 - a).log() + total + 9.0, 1.0), obs=x)

    x = torch.tensor(1.0)
    before = torch.get_rng_state()
    reader = reader_of(model, x)
    torch.set_rng_state(before)
    assert set(reader.read(model, (x,), {}).supports) == set("abcde")
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- small tools


def test_indices_of_a_whole_plate_in_order_say_nothing():
    assert chosen_indices(None, 4) is None
    assert chosen_indices(torch.arange(4), 4) is None
    assert chosen_indices(range(4), 4) is None
    assert chosen_indices(torch.tensor([1, 0]), 2).tolist() == [1, 0]
    assert chosen_indices([0, 1], 4).tolist() == [0, 1]


def test_plates_of_a_trace():
    def model():
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 5, subsample=torch.tensor([3, 1])):
            pyro.sample("z", N(0.0, 1.0))
        for i in pyro.plate("loop", 2):
            pyro.sample(f"w{i}", N(0.0, 1.0))

    plates = plates_of(poutine.trace(model).get_trace())
    assert set(plates) == {"outer", "inner"}  # a loop is no dimension
    assert plates["outer"] == PlateState("outer", -2, 2, 2, None)
    assert plates["inner"].indices.tolist() == [3, 1]
    assert plates["inner"].full_size == 5


def test_supports_that_hold_tensors():
    assert is_constant(constraints.real)
    assert is_constant(constraints.interval(0.0, 2.0))
    assert is_constant(constraints.independent(constraints.interval(0.0, 2.0), 1))
    assert not is_constant(constraints.interval(0.0, torch.tensor(2.0)))
    assert not is_constant(constraints.independent(constraints.greater_than(torch.zeros(2)), 1))


# ---------------------------------------------------------------- what is refused


def other(w, x, more=False, fewer=False, known=False):
    if not fewer:
        pyro.sample("slope", N(0.0, 1.0), obs=torch.tensor(0.0) if known else None)
    if more:
        pyro.sample("more", N(0.0, 1.0))
    with pyro.plate("data", len(X)):
        z = pyro.sample("z", N(torch.zeros(4) if w is None else w, 1.0))
        pyro.sample("x", N(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((W, None), {}, "Expected data for the observed site 'x'"),
        ((None, X), {}, r"Expected data for the argument 'w' \(read by slope, z\)"),
        ((W, X), {"more": True}, "this call has more as well"),
        ((W, X), {"fewer": True}, "Expected the latent site 'slope'.*it is not in this call"),
        ((W, X), {"known": True}, "Expected no data for 'slope', a latent site"),
    ],
)
def test_calls_of_another_structure_are_refused_by_site(args, kwargs, message):
    reader = reader_of(other, W, X)
    with pytest.raises(UnsupportedModelError, match=message):
        reader.read(other, args, kwargs)
    assert torch.equal(reader.read(other, (W, X), {}).values["x"], X)  # and the next call is read


def test_observations_of_sites_that_there_are_not():
    reader = reader_of(other, W, X)
    with pytest.raises(GraphflowsError, match=r"Expected observations of x, .*; got y"):
        reader.read(other, (W, X), {}, observations={"y": X})
    assert reader.read(other, (W, X), {}, observations={"z": X, "x": W}).values["x"] is W


def test_a_reader_without_data_reads_the_same():
    reader = reader_of(regression, W, X)
    plain = reader.to_plain()
    assert plain["like"] == {"slope": torch.float64, "z": torch.float64}  # types, and no values
    again = CallReader.from_plain(plain, "cpu")
    one, two = (each.read(regression, (W + 1, X), {}) for each in (reader, again))
    assert one.plates == two.plates
    assert all(torch.equal(two.values[name], value) for name, value in one.values.items())
    with pytest.raises(
        UnsupportedModelError, match=r"'z' is a Normal in plate data; in this model it is .*no plate"
    ):
        CallReader.from_plain(plain, "cpu").read(without_plate, (W[0], X[0]), {})


def without_plate(w, x):
    slope = pyro.sample("slope", N(0.0, 1.0))
    z = pyro.sample("z", N(slope * w, 1.0))
    pyro.sample("x", N(z, 1.0), obs=x)
