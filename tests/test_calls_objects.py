"""Data wherever users keep them: what a guide can be called with, and what is refused with a line to write.

The posterior of z given w and y is given to the guide; with new data of another size it is right only if the fields of
the object of *this* call are read.
"""

import dataclasses
import functools
import math
import types
import warnings
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Mapping
from typing import NamedTuple

import attr
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_graphflows.errors import GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.inspect import get_model_graph, trace_model
from pyro_graphflows.inspect.arguments import argument_leaves

FEW = {"init": "random", "num_start_samples": 500}


def datum(w, y):
    with pyro.plate("data", len(w)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + w, 0.5), obs=y)


@dataclasses.dataclass
class Dataclass:
    w: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    w: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    w: torch.Tensor
    y: torch.Tensor


@attr.s(auto_attribs=True, slots=True)
class Attrs:
    w: torch.Tensor
    y: torch.Tensor


@attr.s(auto_attribs=True, frozen=True)
class FrozenAttrs:
    w: torch.Tensor
    y: torch.Tensor


class Plain:
    name = "a batch"

    def __init__(self, w, y):
        self.w, self.y, self.itself = w, y, self


class Slots:
    __slots__ = ("w", "y")

    def __init__(self, w, y):
        self.w, self.y = w, y


class Child(Plain):
    def __init__(self, w, y):
        super().__init__(w, y)
        self.more = None


class Typed(NamedTuple):
    w: torch.Tensor
    y: torch.Tensor


class Encoding(UserDict):
    """Items are fields too."""

    def __init__(self, w, y):
        super().__init__({"w": w, "y": y})

    def __getattr__(self, name):
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class ReadOnly(Mapping):
    def __init__(self, w, y):
        self._items = {"w": w, "y": y}

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Graph:
    """Stores its tensors as the data objects of graph libraries do: in an inner mapping, shown as fields and items."""

    def __init__(self, w, y):
        self.__dict__["_store"] = {"w": w, "y": y}

    def __getattr__(self, name):
        store = self.__dict__.get("_store", {})
        if name not in store:
            raise AttributeError(name)
        return store[name]

    def __setattr__(self, name, value):
        self._store[name] = value

    def keys(self):
        return list(self._store)

    def __getitem__(self, key):
        return self._store[key]

    def __setitem__(self, key, value):
        self._store[key] = value


class Callable(Plain):
    def __call__(self):
        return self.w, self.y


def deeply(w, y):
    inner = [w, y]
    for _ in range(8):
        inner = types.SimpleNamespace(inner=inner)
    return inner


def at_the_bottom(batch):
    while hasattr(batch, "inner"):
        batch = batch.inner
    return batch


def by_fields(batch):
    datum(batch.w, batch.y)


def by_items(batch):
    datum(batch["w"], batch["y"])


def first_and_second(batch):
    datum(batch[0], batch[1])


def namespace(w, y):
    return types.SimpleNamespace(w=w, y=y)


OBJECTS = {
    "dataclass": (Dataclass, by_fields, "batch.w"),
    "frozen dataclass": (Frozen, by_fields, "batch.w"),
    "frozen dataclass with slots": (FrozenSlots, by_fields, "batch.w"),
    "attrs": (Attrs, by_fields, "batch.w"),
    "frozen attrs": (FrozenAttrs, by_fields, "batch.w"),
    "object": (Plain, by_fields, "batch.w"),
    "object with slots": (Slots, by_fields, "batch.w"),
    "object of a derived class": (Child, by_fields, "batch.w"),
    "namespace": (namespace, by_fields, "batch.w"),
    "named tuple": (namedtuple("Batch", "w y"), by_fields, "batch.w"),
    "typed named tuple": (Typed, by_fields, "batch.w"),
    "named tuple by position": (Typed, first_and_second, "batch.w"),
    "dict": (lambda w, y: {"w": w, "y": y}, by_items, "batch['w']"),
    "ordered dict": (lambda w, y: OrderedDict(w=w, y=y), by_items, "batch['w']"),
    "UserDict": (lambda w, y: UserDict(w=w, y=y), by_items, "batch['w']"),
    "encoding by items": (Encoding, by_items, "batch['w']"),
    "encoding by fields": (Encoding, by_fields, "batch['w']"),
    "mapping": (ReadOnly, by_items, "batch['w']"),
    "graph by fields": (Graph, by_fields, "batch['w']"),
    "graph by items": (Graph, by_items, "batch['w']"),
    "list": (lambda w, y: [w, y], first_and_second, "batch[0]"),
    "tuple": (lambda w, y: (w, y), first_and_second, "batch[0]"),
    "deque": (lambda w, y: deque([w, y]), first_and_second, "batch[0]"),
    "callable object": (Callable, lambda batch: datum(*batch()), "batch.w"),
    "sparse": (
        lambda w, y: (w.to_sparse(), y),
        lambda batch: datum(batch[0].to_dense(), batch[1]),
        "batch[0]",
    ),
    "deeply nested": (deeply, lambda batch: datum(*at_the_bottom(batch)), "batch" + ".inner" * 8 + "[0]"),
    "nested": (
        lambda w, y: {"in": [Dataclass(w, None), {"out": Typed(None, y)}]},
        lambda batch: datum(batch["in"][0].w, batch["in"][1]["out"].y),
        "batch['in'][0].w",
    ),
}


def exact_(guide, name):
    guide.set_linear_("z", {name: -0.8, "y": 0.8}, 0.0, math.sqrt(0.2))


def assert_right(model, guide, make):
    for size in (10, 7, 1, 10):
        w, y = torch.randn(size), torch.randn(size)
        assert torch.allclose(guide.median(make(w, y))["z"], 0.8 * (y - w))
        exact = -float(dist.Normal(w, math.sqrt(1.25)).log_prob(y).sum())
        assert Trace_ELBO().loss(model, guide, make(w, y)) == pytest.approx(exact)


@pytest.mark.parametrize("kind", OBJECTS)
def test_tensors_in_objects_are_followed(kind):
    make, model, name = OBJECTS[kind]
    guide = auto_faithful_guide(model, make(torch.randn(10), torch.randn(10)), **FEW)
    assert guide.inverse.parents["z"] == (name, "y")
    assert "a map of its own" not in guide.describe()
    assert "not followed" not in guide.describe()
    exact_(guide, name)
    assert_right(model, guide, make)


@pytest.mark.parametrize("kind", ["dataclass", "mapping", "graph by fields", "object", "nested"])
def test_the_start_is_near_exact(kind):
    make, model, _ = OBJECTS[kind]
    guide = auto_faithful_guide(model, make(torch.randn(10), torch.randn(10)))
    w, y = torch.randn(6) + 3, torch.randn(6) + 3
    assert (
        guide.median(make(w, y))["z"] - 0.8 * (y - w)
    ).abs().max() < 0.1  # some .01: two weights, 10,000 samples


# --------------------------------------------------------------------------------------------------------- functions
def same(w):
    return w


def a_closure(w):
    def give():
        return w

    return give


def a_default(w):
    def give(w=w):
        return w

    return give


def a_closure_of_a_closure(w):
    inner = a_closure(w)

    def give():
        return inner()

    return give


class Source:
    def __init__(self, w):
        self.w = w

    def give(self):
        return self.w


FUNCTIONS = {
    "partial": (lambda w: functools.partial(same, w), "give.argument 0"),
    "partial by keyword": (lambda w: functools.partial(same, w=w), "give.w"),
    "partial of an array": (lambda w: functools.partial(torch.as_tensor, w.numpy()), "give.argument 0"),
    "closure": (a_closure, "give.w"),
    "lambda": (lambda w: lambda: w, "give.w"),
    "default": (a_default, "give.w"),
    "closure of a closure": (a_closure_of_a_closure, "give.inner.w"),
    "bound method": (lambda w: Source(w).give, "give.self.w"),
    "in a dict": (lambda w: {"give": a_closure(w)}, "give['give'].w"),
}


def by_a_function(give, y):
    datum((give["give"] if isinstance(give, dict) else give)(), y)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_data_that_functions_among_the_arguments_hold_are_followed(kind):
    make, name = FUNCTIONS[kind]
    guide = auto_faithful_guide(by_a_function, make(torch.randn(10)), torch.randn(10), **FEW)
    assert guide.inverse.parents["z"] == (name, "y")
    exact_(guide, name)
    for size in (10, 7):
        w, y = torch.randn(size), torch.randn(size)
        assert torch.allclose(guide.median(make(w), y)["z"], 0.8 * (y - w))


def test_rows_that_functions_take():
    def model(rows_of, y, ind=None):
        with pyro.plate("data", len(y), subsample=ind) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + rows_of(rows), 0.5), obs=y[rows])

    w, y = torch.randn(9), torch.randn(9)
    guide = auto_faithful_guide(model, lambda rows: w[rows], y, torch.tensor([3, 1]), **FEW)
    exact_(guide, "rows_of.w")
    for ind in (None, torch.tensor([8, 0, 4]), torch.tensor([2])):
        chosen = torch.arange(9) if ind is None else ind
        assert torch.allclose(guide.median(lambda rows: w[rows], y, ind)["z"], 0.8 * (y - w)[chosen])


def test_functions_that_hold_arrays_the_model_computes_with_are_refused():
    def of_an_array(w):
        return lambda: torch.from_numpy(np.exp(w))

    w = np.random.default_rng(0).normal(size=10)
    with pytest.raises(UnsupportedModelError, match=r"'give\.w' is a NumPy array.*torch\.as_tensor"):
        auto_faithful_guide(by_a_function, of_an_array(w), torch.zeros(10), **FEW)


# ------------------------------------------------------------------------------------------------- sets and iterators
@pytest.mark.parametrize("kind", [set, frozenset])
def test_sets_of_covariates_are_refused(kind):
    with pytest.raises(UnsupportedModelError, match=rf"'w' is a {kind.__name__} of tensors.*pass a list"):
        auto_faithful_guide(lambda w, y: datum(next(iter(w)), y), kind([torch.randn(5)]), torch.zeros(5))
    guide = auto_faithful_guide(lambda names, y: datum(torch.zeros(5), y), kind(["a"]), torch.zeros(5), **FEW)
    assert guide.inverse.parents["z"] == ("y",)


def test_iterators_are_refused():
    """The model is run more than once: a second run would have no data."""

    def model(batches):
        for w, y in batches:
            datum(w, y)

    batches = [(torch.randn(5), torch.randn(5))]
    for iterator in (
        iter(batches),
        (batch for batch in batches),
        zip(*zip(*batches, strict=True), strict=True),
    ):
        with pytest.raises(UnsupportedModelError, match=r"'batches' is an iterator .*Pass list\(batches\)"):
            auto_faithful_guide(model, iterator, **FEW)
    auto_faithful_guide(model, batches, **FEW)


# ------------------------------------------------------------------------------------------------------ rows, and more
def test_covariates_that_set_up_had_not_are_warned_of_once():
    def model(y, x=None):
        datum(torch.zeros(len(y)) if x is None else x, y)

    guide = auto_faithful_guide(model, torch.randn(5), **FEW)
    with pytest.warns(
        GraphflowsWarning, match=r"This call has x, on which y depend .*guide\.setup\(\*args\)"
    ):
        guide(torch.randn(5), torch.randn(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide(torch.randn(5), torch.randn(5))
        guide(torch.randn(4))
    guide.setup(torch.randn(5), torch.randn(5))
    assert guide.inverse.parents["z"] == ("x", "y")


def test_objects_with_rows_of_a_subsampled_plate():
    def model(batch, ind=None):
        with pyro.plate("data", len(batch.w), subsample=ind) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + batch.w[rows], 0.5), obs=batch.y[rows])

    w, y = torch.randn(9), torch.randn(9)
    for set_up in (None, torch.tensor([3, 1])):
        guide = auto_faithful_guide(model, Plain(w, y), set_up, **FEW)
        exact_(guide, "batch.w")
        for ind in (None, torch.tensor([8, 0, 4]), torch.randperm(9)):
            chosen = torch.arange(9) if ind is None else ind
            assert torch.allclose(guide.median(Plain(w, y), ind)["z"], 0.8 * (y - w)[chosen])


def test_validation_reaches_into_objects():
    """Constants are found by replacing all that is given: fields of objects, frozen or not, are given."""
    w, y = torch.randn(4), torch.randn(4)
    for kind in (
        "dataclass",
        "frozen dataclass with slots",
        "mapping",
        "graph by fields",
        "object",
        "nested",
    ):
        make, model, _ = OBJECTS[kind]
        batch = make(w.clone(), y.clone())
        assert trace_model(model, (batch,), validate=True).non_exchangeable == {}
        leaves = argument_leaves(model, (batch,)).values()
        assert all(
            torch.equal(leaf, given) for leaf, given in zip(leaves, (w, y), strict=True)
        )  # as they were


# ------------------------------------------------------------------------------------------------------------ arrays
def tensors_made_by(make):
    return lambda w, y=None: datum(make(w), None if y is None else make(y))


ARRAYS = {
    "as_tensor": tensors_made_by(torch.as_tensor),
    "asarray": tensors_made_by(torch.asarray),
    "tensor": tensors_made_by(torch.tensor),
    "tensor with a type": tensors_made_by(lambda w: torch.tensor(w, dtype=torch.double)),
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("how", ARRAYS)
def test_arrays_that_the_model_makes_tensors_of_are_followed(how):
    model = ARRAYS[how]
    guide = auto_faithful_guide(model, np.random.default_rng(0).normal(size=10), np.zeros(10), **FEW)
    assert guide.inverse.parents["z"] == ("w", "y")
    assert "not followed" not in guide.describe()
    exact_(guide, "w")
    for size in (10, 7):
        w, y = torch.randn(size), torch.randn(size)
        assert torch.allclose(guide.median(w.numpy(), y.numpy())["z"], 0.8 * (y - w))


def test_arrays_in_objects_are_followed():
    def model(batch):
        datum(torch.as_tensor(batch.w), torch.as_tensor(batch.y))

    guide = auto_faithful_guide(model, Dataclass(np.zeros(5), np.ones(5)), **FEW)
    exact_(guide, "batch.w")
    assert_right(model, guide, lambda w, y: Dataclass(w.numpy(), y.numpy()))


REFUSED = {
    "torch.from_numpy": lambda w, y: datum(torch.from_numpy(w), torch.from_numpy(y)),
    "NumPy functions": lambda w, y: datum(torch.from_numpy(np.log1p(np.abs(w))), torch.from_numpy(y)),
}


@pytest.mark.parametrize("how", REFUSED)
def test_arrays_that_cannot_be_followed_are_refused_with_a_line_to_write(how):
    w, y = np.random.default_rng(0).normal(size=(2, 10))
    line = r"site 'y' depends on .* argument 'w' is a NumPy array.*torch\.as_tensor\(w\)"
    with pytest.raises(UnsupportedModelError, match=line):
        auto_faithful_guide(REFUSED[how], w, y, **FEW)
    assert "not followed" in auto_faithful_guide(REFUSED[how], w, y, strict=False, **FEW).describe()


OTHERS = {
    "a list of numbers": (lambda w: w.tolist(), torch.tensor, r"torch\.tensor\(batch\['w'\]\)"),
    "a structured NumPy array": (
        lambda w: w.astype([("a", float)]),
        lambda w: torch.tensor(w["a"].copy()),
        r"for name in batch\['w'\]\.dtype\.names",
    ),
    "a pandas.Series": (
        pd.Series,
        lambda w: torch.tensor(w.to_numpy()),
        r"pass torch\.tensor\(batch\['w'\]\.to_numpy",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_columns_of_other_kinds_are_refused_with_a_line_to_write(kind):
    """What was there at set-up must not be a constant for ever."""
    make, tensor_of, line = OTHERS[kind]
    w, y = np.random.default_rng(0).normal(size=10), torch.zeros(10)
    with pytest.raises(
        UnsupportedModelError, match=f"'batch\\['w'\\]' is {kind}, which is not followed.*{line}"
    ):
        auto_faithful_guide(
            lambda batch: datum(tensor_of(batch["w"]), batch["y"]), {"w": make(w), "y": y}, **FEW
        )


def test_lists_of_numbers_that_are_options_are_left_alone():
    def model(options, y):
        scales = options["scales"]
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, scales[0]))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = auto_faithful_guide(model, {"scales": [0.5, 2.0]}, torch.zeros(4), **FEW)
    assert "not followed" not in guide.describe()


def test_arrays_of_observed_values_need_not_be_followed():
    """They are read in every call."""

    def model(y):
        datum(torch.zeros(len(y)), torch.from_numpy(y))

    guide = auto_faithful_guide(model, np.zeros(10), **FEW)
    guide.set_linear_("z", {"y": 0.8}, 0.0, math.sqrt(0.2))
    y = torch.randn(10)
    assert torch.allclose(guide.median(y.numpy())["z"], 0.8 * y)
    assert "not followed" not in guide.describe()


# ------------------------------------------------------------------------------------------------------------ tables
def of_a_table(table):
    datum(torch.tensor(table["w"].to_numpy()), torch.tensor(table["y"].to_numpy()))


def test_tables_with_covariates_are_refused_with_a_line_to_write():
    table = pd.DataFrame({"w": np.linspace(0, 1, 6), "y": np.linspace(1, 0, 6), "label": list("abcdef")})
    line = r"'table' is a pandas.DataFrame.*pass \{name: torch.tensor\(table\[name\].to_numpy\(\)\) for name in table"
    with pytest.raises(UnsupportedModelError, match=line):
        auto_faithful_guide(of_a_table, table[["w", "y"]], **FEW)
    with pytest.raises(UnsupportedModelError, match=r"is a pandas\.Series"):
        auto_faithful_guide(lambda w: datum(torch.tensor(w.to_numpy()), torch.zeros(6)), table["w"], **FEW)


def test_the_line_to_write_works():
    table = pd.DataFrame({"w": np.linspace(0, 1, 6), "y": np.linspace(1, 0, 6)})
    columns = {name: torch.tensor(table[name].to_numpy()) for name in table}
    guide = auto_faithful_guide(by_items, columns, **FEW)
    assert guide.inverse.parents["z"] == ("batch['w']", "y")


def test_tables_of_observed_values_need_not_be_followed():
    def model(table):
        datum(torch.zeros(len(table)), torch.tensor(table["y"].to_numpy()))

    table = pd.DataFrame({"y": np.linspace(1, 0, 6)})
    guide = auto_faithful_guide(model, table, **FEW)
    guide.set_linear_("z", {"y": 0.8}, 0.0, math.sqrt(0.2))
    assert torch.allclose(guide.median(table + 1)["z"], 0.8 * (torch.tensor(table["y"].to_numpy()) + 1))


def test_what_holds_no_data_is_left_alone():
    class Config:
        def __init__(self):
            self.scale, self.network, self.itself = 0.5, torch.nn.Linear(2, 2), self

    def model(config, network, function, y):
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), config.scale), obs=y)

    graph = get_model_graph(model, (Config(), torch.nn.Linear(2, 2), len, torch.zeros(())))
    assert graph.inputs == ()
