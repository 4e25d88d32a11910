"""Plates of which a call has some rows: data and covariates are read row for row, however the model takes them.

The posterior of each datum is known, ``z | x, y ~ Normal(0.8 (y - x), 0.2)``, and given to the guide; what a call
returns is right only if the guide pairs the rows as the likelihood does.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides import Flow, auto_faithful_guide
from pyro_graphflows.guides.mode import LogPosterior
from pyro_graphflows.inspect import trace_model

FEW = {"init": "random", "num_start_samples": 500}
N = 12
X = 3 * torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.double)
Y = X + torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=torch.double)


def datum(x, y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z + x, 0.5), obs=y)


def given_indices(take):
    """The caller gives the indices; None for all."""

    def model(x, y, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(x if ind is None else take(x, rows), y[rows])

    return model


def by_subsample(x, ind):
    return pyro.subsample(x, event_dim=0)


TAKE = {
    "x[ind]": lambda x, ind: x[ind],
    "pyro.subsample": by_subsample,
    "index_select": lambda x, ind: x.index_select(0, ind),
    "torch.index_select": lambda x, ind: torch.index_select(x, 0, ind),
    "take_along_dim": lambda x, ind: torch.take_along_dim(x, ind, 0),
    "gather": lambda x, ind: x.gather(0, ind),
    "take": lambda x, ind: x.take(ind),
    "embedding": lambda x, ind: F.embedding(ind, x[:, None])[:, 0],
    "a list": lambda x, ind: x[ind.tolist()],
    "an array": lambda x, ind: x[ind.numpy()],
    "row by row": lambda x, ind: torch.stack([x[i] for i in ind]),
    "by numbers": lambda x, ind: torch.stack([x[i] for i in ind.tolist()]),
    "after a shift": lambda x, ind: ((x - 2.0) + 2.0)[ind],
    "standardised and back": lambda x, ind: (x - x.mean())[ind] + x.mean(),
    "then a shift": lambda x, ind: x[ind] - 2.0 + 2.0,
    "of a view": lambda x, ind: x[None].T[ind, 0],
    "by the last dimension": lambda x, ind: x.expand(3, N)[:, ind][0],
}
CALLS = {
    "all": None,
    "all, by indices": torch.arange(N),
    "permuted": torch.randperm(N, generator=torch.Generator().manual_seed(3)),
    "one": torch.tensor([3]),
    "some": torch.tensor([7, 0, 5]),
    "others": torch.tensor([9, 2, 11]),
    "more": torch.tensor([1, 2, 4, 6, 10]),
}


def seen(how, ind):
    """Return the covariates as the likelihood sees them: Pyro's subsample leaves full plates alone, permuted or not."""
    if ind is None or (how == "pyro.subsample" and len(ind) == N):
        return X
    return X[ind]


def exact_(guide, covariate="x"):
    return guide.set_linear_("z", {covariate: -0.8, "y": 0.8}, 0.0, math.sqrt(0.2))


def means(x=X, y=Y):
    return 0.8 * (y - x)


def evidence(x=X, y=Y):
    return dist.Normal(x, math.sqrt(1.25)).log_prob(y)


SET_UPS = [(how, set_up) for how in TAKE for set_up in ("all", "some")]
SET_UPS += [
    ("x[ind]", "one"),
    ("x[ind]", "permuted"),
    ("pyro.subsample", "one"),
    ("pyro.subsample", "permuted"),
]


@pytest.mark.parametrize(("how", "set_up"), SET_UPS)
def test_the_rows_are_those_of_the_likelihood(how, set_up):
    model = given_indices(TAKE[how])
    guide = auto_faithful_guide(model, X, Y, CALLS[set_up], **FEW)
    assert guide.inverse.parents["z"] == ("x", "y")
    exact_(guide)
    for ind in CALLS.values():
        chosen = torch.arange(N) if ind is None else ind
        x, y = seen(how, ind), Y[chosen]
        assert torch.allclose(guide.median(X, Y, ind)["z"], means(x, y))
        loss = Trace_ELBO().loss(model, guide, X, Y, ind)
        assert loss == pytest.approx(-float(evidence(x, y).sum()) * N / len(chosen))
        for _ in range(2):  # other data in the same kind of call
            assert torch.allclose(guide.median(X + 1, Y - 1, ind)["z"], means(x + 1, y - 1))


def test_indices_in_a_list():
    model = given_indices(TAKE["x[ind]"])
    guide = auto_faithful_guide(model, X, Y, [4, 1], **FEW)
    exact_(guide)
    for ind in ([0, 7, 3], [5]):
        assert torch.allclose(guide.median(X, Y, ind)["z"], means()[ind])


def test_two_plates_with_the_same_indices():
    """Which plate's they are is where they are used."""

    def model(x, w, y, ind):
        with pyro.plate("one", N, subsample=ind):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(a + x[ind], 0.5), obs=y[ind])
        with pyro.plate("two", N, subsample=ind):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("again", dist.Normal(b + w[ind], 0.5), obs=y[ind])

    w = torch.randn(N)
    guide = auto_faithful_guide(model, X, w, Y, CALLS["some"], **FEW)
    guide.set_linear_("a", {"x": -0.8, "y": 0.8}, 0.0, math.sqrt(0.2))
    guide.set_linear_("b", {"w": -0.8, "again": 0.8}, 0.0, math.sqrt(0.2))
    for ind in (CALLS["others"], CALLS["one"]):
        found = guide.median(X, w, Y, ind)
        assert torch.allclose(found["a"], means()[ind])
        assert torch.allclose(found["b"], means(w)[ind])


@pytest.mark.parametrize("how", ["x[ind]", "pyro.subsample"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_random_batches_and_vectorised_particles(how, vectorize):
    def model(x, y, size=None):
        with pyro.plate("data", len(x), subsample_size=size) as ind:
            datum(TAKE[how](x, ind), TAKE[how](y, ind))

    for example in ({}, {"size": 5}):
        guide = auto_faithful_guide(model, X, Y, example_kwargs=example, **FEW)
        exact_(guide)
        loss = Trace_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
        for size in (None, 5, 1, 12):
            trace = poutine.trace(guide).get_trace(X, Y, size=size)
            ind = trace.nodes["data"]["value"]
            replayed = poutine.trace(poutine.replay(model, trace)).get_trace(X, Y, size=size)
            found = (replayed.log_prob_sum() - trace.log_prob_sum()).item()
            assert found == pytest.approx(float(evidence()[ind].sum()) * N / len(ind))
            assert math.isfinite(loss.loss(model, guide, X, Y, size=size))


def test_the_start_is_near_exact_whichever_the_first_batch():
    def model(x, y, ind=None):
        with pyro.plate("data", N, subsample=ind):
            datum(x if ind is None else x[ind], y if ind is None else y[ind])

    for set_up in ("all", "some", "permuted"):
        guide = auto_faithful_guide(model, X, Y, CALLS[set_up])
        for ind in (None, CALLS["permuted"], CALLS["others"]):
            error = guide.median(X, Y, ind)["z"] - means()[torch.arange(N) if ind is None else ind]
            assert error.abs().max() < 0.1  # some .01: two weights from 10,000 samples


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_the_start_knows_all_rows_whatever_the_first_batch_shows(given, size):
    """One batch has fewer rows than covariates; the joint samples are of many batches."""
    weights = torch.tensor([0.5, -1.0, 2.0, 0.3]).double()

    def drawn(x, y, size=None):
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            datum((x[rows] * weights).sum(-1), y[rows])

    def chosen(x, y, ind=None):
        with pyro.plate("data", len(x), subsample=ind):
            datum((x[ind] * weights).sum(-1), y[ind])

    x = torch.randn(60, 4)
    y = x @ weights + torch.randn(60)
    rows = torch.arange(60)
    model, set_up, everything = (chosen, torch.arange(size), rows) if given else (drawn, size, None)
    guide = auto_faithful_guide(model, x, y, set_up)
    # five weights from 10,000 samples of 32 or 60 rows: errors of some .02
    assert (guide.median(x, y, everything)["z"] - means(x @ weights, y)).abs().max() < 0.15


def test_a_batch_that_the_caller_takes_stays_as_it_is():
    def model(x, y, ind, size):
        with pyro.plate("data", size, subsample=ind):
            datum(x, y)

    guide = auto_faithful_guide(model, X[:4], Y[:4], torch.arange(4), N, **FEW)
    exact_(guide)
    for ind in list(CALLS.values())[1:]:
        assert torch.allclose(guide.median(X[ind], Y[ind], ind, N)["z"], means()[ind])


def test_loops_over_batches_with_a_smaller_last_one_train():
    def model(x, y, ind):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample=ind) as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z + x[rows], 0.5), obs=y[rows])

    guide = auto_faithful_guide(model, X, Y, torch.arange(5), num_start_samples=500)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(3):
        for ind in torch.randperm(N).split(5):
            assert math.isfinite(svi.step(X, Y, ind))


# ------------------------------------------------------------------------------------------ from outside of the call
class Outside:
    """A model with its data as fields."""

    def __init__(self, x):
        self.x = x

    def __call__(self, y, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(self.x[rows], y[rows])


class Module(torch.nn.Module):
    def __init__(self, x):
        super().__init__()
        self.register_buffer("x", x)

    def forward(self, y, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(self.x[rows], y[rows])


def closure(x):
    def model(y, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(x[rows], y[rows])

    return model


def subsampled_closure(x):
    def model(y, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(pyro.subsample(x, event_dim=0), y[rows])

    return model


def closure_of_a_function(x):
    def features(rows):
        return x[rows]

    def model(y, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(features(rows), y[rows])

    return model


def closure_of_a_dict(x):
    data = {"x": x}

    def model(y, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(data["x"][rows], y[rows])

    return model


OUTSIDE = {
    "a field": (Outside, "self.x"),
    "a buffer": (Module, "self.x"),
    "a closure": (closure, "x"),
    "a closure, subsampled": (subsampled_closure, "x"),
    "a function's closure": (closure_of_a_function, "features.x"),
    "a dict in a closure": (closure_of_a_dict, "data['x']"),
}


@pytest.mark.parametrize("set_up", ["some", "all"])
@pytest.mark.parametrize("kind", OUTSIDE)
def test_covariates_from_outside_of_the_call(kind, set_up):
    make, name = OUTSIDE[kind]
    model = make(X)
    guide = auto_faithful_guide(model, Y, CALLS[set_up], **FEW)
    assert guide.inverse.parents["z"] == (name, "y")
    own = f"a map of its own for each index of data, for the rows of {name} that set-up had"
    assert (own in guide.describe()) == (set_up == "all")
    exact_(guide, name)
    for ind in CALLS.values():
        chosen = torch.arange(N) if ind is None else ind
        x, y = seen("pyro.subsample" if "subsampled" in kind else "x[ind]", ind), Y[chosen]
        assert torch.allclose(guide.median(Y, ind)["z"], means(x, y))
        loss = Trace_ELBO().loss(model, guide, Y, ind)
        assert loss == pytest.approx(-float(evidence(x, y).sum()) * N / len(chosen))


def test_rows_in_their_own_order_beside_permuted_indices_are_refused():
    """Pyro's subsample leaves a tensor as it is where a plate has all its indices."""
    message = r"rows of 'x' that belong to the indices of plate 'data'.*x\[indices\]"
    with pytest.raises(UnsupportedModelError, match=message):
        auto_faithful_guide(subsampled_closure(X), Y, CALLS["permuted"], **FEW)
    guide = auto_faithful_guide(closure(X), Y, CALLS["permuted"], **FEW)
    exact_(guide, "x")
    assert torch.allclose(guide.median(Y, CALLS["some"])["z"], means(X, Y)[CALLS["some"]])


@pytest.mark.parametrize("family", ["normal", Flow(closed_form="density", units_per_variable=2)])
def test_constants_that_are_used_as_they_are_have_maps_for_each_index(family):
    """One regression for all of them would be worse than none here."""

    def model(y, ind=None):
        with pyro.plate("data", N, subsample=ind):
            datum(X if ind is None else X[ind.numpy().tolist()], y)

    guide = auto_faithful_guide(model, Y, family=family)
    assert "a map of its own for each index of data" in guide.describe()
    for ind in (None, CALLS["some"], CALLS["permuted"]):
        chosen = torch.arange(N) if ind is None else ind
        error = guide.median(Y[chosen], ind)["z"] - means()[chosen]
        assert error.abs().max() < 0.2  # regressions of 1,000 samples each: some .03


def test_indices_that_come_in_order_first():
    """Nothing of the first call may be taken for granted in the second, of the same shapes."""

    def model(x, y, ind):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(x[rows], y)

    for first in (torch.arange(N), CALLS["permuted"]):
        guide = auto_faithful_guide(model, X, Y[first], first, **FEW)
        exact_(guide)
        for ind in (torch.arange(N), CALLS["permuted"]):
            for _ in range(2):
                assert torch.allclose(guide.median(X, Y[ind], ind)["z"], means()[ind])


def test_indices_that_are_computed_from_an_argument():
    def model(x, y, seen):
        with pyro.plate("data", N, subsample=seen.nonzero()[:, 0]) as rows:
            datum(x[rows], y[rows])

    guide = auto_faithful_guide(model, X, Y, torch.arange(N) % 2 == 0, **FEW)
    exact_(guide)
    for seen in (torch.arange(N) % 3 == 0, torch.ones(N, dtype=torch.bool)):
        assert torch.allclose(guide.median(X, Y, seen)["z"], means()[seen])


class Net(torch.nn.Module):
    """A module that a call is given, with data in a buffer or in a field."""

    def __init__(self, x, how):
        super().__init__()
        if how == "buffer":
            self.register_buffer("x", x)
        else:
            self.held = {"x": x}
        self.how = how

    def forward(self):
        return self.x if self.how == "buffer" else self.held["x"]


@pytest.mark.parametrize("how", ["buffer", "field"])
@pytest.mark.parametrize("indexed", [False, True])
def test_data_in_modules_among_the_arguments(how, indexed):
    def model(y, net, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(net()[rows] if indexed else net(), y[rows])

    guide = auto_faithful_guide(model, Y, Net(X, how), **FEW)
    name = "net.x" if how == "buffer" else "net.held['x']"
    assert guide.inverse.parents["z"] == (name, "y")
    exact_(guide, name)
    for net in (Net(X + 1, how), Net(X - 2, how)):
        assert torch.allclose(guide.median(Y, net)["z"], means(net(), Y))
        if indexed:
            ind = CALLS["some"]
            assert torch.allclose(guide.median(Y, net, ind)["z"], means(net()[ind], Y[ind]))


def test_default_values_of_arguments():
    def model(y, x=X, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(x[rows], y[rows])

    for args in ((Y,), (Y, X)):
        guide = auto_faithful_guide(model, *args, **FEW)
        exact_(guide)
        assert torch.allclose(guide.median(Y)["z"], means())
        assert torch.allclose(guide.median(Y, X + 1)["z"], means(X + 1, Y))


# --------------------------------------------------------------------------------------- matrices and several plates
def test_rows_of_matrices():
    weights = torch.tensor([0.5, -1.0, 2.0]).double()

    def model(x, y, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(x[rows] @ weights, y[rows])

    x = torch.randn(N, 3)
    for set_up in ("all", "some", "one", "permuted"):
        guide = auto_faithful_guide(model, x, Y, CALLS[set_up], **FEW)
        guide.set_linear_("z", {"x": -0.8 * weights, "y": 0.8}, 0.0, math.sqrt(0.2))
        for ind in CALLS.values():
            chosen = torch.arange(N) if ind is None else ind
            assert torch.allclose(guide.median(x, Y, ind)["z"], means(x @ weights)[chosen])


def test_square_matrices_and_batches_of_their_own_width():
    """The number of columns is the number of rows, or that of a batch."""
    for width in (N, 5, 3):
        weights = torch.randn(width)

        def model(x, y, ind=None, w=weights):
            with pyro.plate("data", N, subsample=ind) as rows:
                datum(x[rows] @ w, y[rows])

        x = torch.randn(N, width)
        for set_up in ("all", "some", "more"):
            guide = auto_faithful_guide(model, x, Y, CALLS[set_up], **FEW)
            guide.set_linear_("z", {"x": -0.8 * weights, "y": 0.8, "w": 0.0 * weights}
                              if "w" in guide.inverse.parents["z"] else {"x": -0.8 * weights, "y": 0.8},
                              0.0, math.sqrt(0.2))  # fmt: skip
            for ind in CALLS.values():
                chosen = torch.arange(N) if ind is None else ind
                assert torch.allclose(guide.median(x, Y, ind)["z"], means(x @ weights)[chosen])


def test_rows_along_another_dimension_than_the_first():
    weights = torch.tensor([0.5, -1.0]).double()

    def model(x, y, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(weights @ x[:, rows], y[rows])

    x = torch.randn(2, N)
    for set_up in ("all", "some"):
        guide = auto_faithful_guide(model, x, Y, CALLS[set_up], **FEW)
        guide.set_linear_("z", {"x": -0.8 * weights, "y": 0.8}, 0.0, math.sqrt(0.2))
        for ind in CALLS.values():
            chosen = torch.arange(N) if ind is None else ind
            assert torch.allclose(guide.median(x, Y, ind)["z"], means(weights @ x)[chosen])


def test_nested_plates_of_which_the_outer_one_is_subsampled():
    def model(x, y, ind=None):
        with pyro.plate("groups", 6, subsample=ind, dim=-2) as rows, pyro.plate("members", 3, dim=-1):
            datum(x[rows][:, None], y[rows])

    x, y = torch.randn(6), torch.randn(6, 3)
    for set_up in (None, torch.tensor([4, 1])):
        guide = auto_faithful_guide(model, x, y, set_up, **FEW)
        exact_(guide)
        for ind in (None, torch.tensor([5, 0]), torch.tensor([2]), torch.tensor([3, 5, 0, 1, 2, 4])):
            chosen = torch.arange(6) if ind is None else ind
            assert torch.allclose(guide.median(x, y, ind)["z"], means(x[:, None], y)[chosen])


@pytest.mark.parametrize("size", [4, 6])
def test_two_subsampled_plates(size):
    """Rows and columns of a matrix; with ``size`` 6 they are as many, and only the indices tell which is which."""

    def model(x, row, column, y, i=None, j=None):
        rows = pyro.plate("rows", 6, subsample=i, dim=-2)
        columns = pyro.plate("columns", size, subsample=j, dim=-1)
        with rows as a, columns as b:
            datum(x[a][:, b] + row[a][:, None] + column[b], y[a[:, None], b])

    x, row, column, y = torch.randn(6, size), torch.randn(6), torch.randn(size), torch.randn(6, size)
    exact = means(x + row[:, None] + column, y)
    batch = torch.tensor([5, 1, 2]), torch.tensor([3, 0, 1])
    guide = auto_faithful_guide(model, x, row, column, y, *batch, **FEW)
    weights = {"x": -0.8, "row": -0.8, "column": -0.8, "y": 0.8}
    guide.set_linear_("z", weights, 0.0, math.sqrt(0.2))
    others = torch.tensor([0, 4, 3]), torch.tensor([2, 1, 0])
    for i, j in (
        batch,
        others,
        (torch.tensor([2]), torch.tensor([0, 3])),
        (batch[0], torch.arange(size).flip(0)),
    ):
        z = guide.median(x, row, column, y, i, j)["z"]
        assert torch.allclose(z, exact[i][:, j])


def test_plates_that_the_user_creates():
    def model(x, y):
        with pyro.plate("data", N, subsample_size=5) as ind:
            datum(x[ind], y[ind])

    guide = auto_faithful_guide(
        model, X, Y, create_plates=lambda x, y: pyro.plate("data", N, subsample_size=5), **FEW
    )
    exact_(guide)
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(X, Y)
        replayed = poutine.trace(poutine.replay(model, trace)).get_trace(X, Y)
        found = (replayed.log_prob_sum() - trace.log_prob_sum()).item()
        assert found == pytest.approx(float(evidence()[trace.nodes["data"]["value"]].sum()) * N / 5)


def test_groups_looked_up_by_an_index_whose_rows_are_taken():
    group = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])

    def model(group, x, y, ind=None):
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample=ind) as rows:
            z = pyro.sample("z", dist.Normal(theta[..., group[rows]], 1.0))
            pyro.sample("y", dist.Normal(z + x[rows], 0.5), obs=y[rows])

    for set_up in ("all", "some"):
        guide = auto_faithful_guide(model, group, X, Y, CALLS[set_up], **FEW)
        look_up = next(name for name in guide.block_of("z").inputs.names if name.startswith("theta"))
        guide.set_linear_("z", {"x": -0.8, "y": 0.8, look_up: {"theta": 0.2}}, 0.0, math.sqrt(0.2))
        with torch.no_grad(), pyro.poutine.block():
            for ind in CALLS.values():
                chosen = torch.arange(N) if ind is None else ind
                found = guide.median(group, X, Y, ind)
                expected = means()[chosen] + 0.2 * found["theta"][group[chosen]]
                assert torch.allclose(found["z"], expected)


# ----------------------------------------------------------------------------------------------- the bound of a batch
def hierarchical(x, y, ind=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 6, subsample=ind) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z + x[rows], 0.5), obs=y[rows])


@pytest.mark.parametrize("set_up", [None, torch.tensor([4, 1])])
def test_the_mean_over_all_batches_is_the_bound_of_all_data(set_up):
    """Locals and a global, exact: the mean over batches is the evidence, whatever the global's value."""
    x, y = X[:6], Y[:6]
    guide = auto_faithful_guide(hierarchical, x, y, set_up, **FEW)
    precision = 0.25 + 6 / 1.25
    guide.set_linear_("mu", {}, float((y - x).sum() / 1.25 / precision), precision**-0.5)
    guide.set_linear_("z", {"mu": 0.2, "x": -0.8, "y": 0.8}, 0.0, math.sqrt(0.2))
    exact = dist.MultivariateNormal(torch.zeros(6), 4.0 + 1.25 * torch.eye(6)).log_prob(y - x).item()
    drawn, held = poutine.trace(guide).get_trace(x, y, torch.tensor([0, 1])), poutine.Trace()
    held.add_node("mu", **drawn.nodes["mu"])
    bounds = []
    for batch in itertools.combinations(range(6), 2):
        args = x, y, torch.tensor(batch)
        trace = poutine.trace(poutine.replay(guide, trace=held)).get_trace(*args)
        bounds.append(poutine.trace(poutine.replay(hierarchical, trace)).get_trace(*args).log_prob_sum())
        bounds[-1] = bounds[-1] - trace.log_prob_sum()
    assert torch.stack(bounds).mean().item() == pytest.approx(exact)


# -------------------------------------------------------------------------------------------- what cannot be known
def one_hot(x, ind):
    return F.one_hot(ind, N).to(x) @ x


def by_a_mask(x, ind):
    return x[torch.zeros(N, dtype=torch.bool).index_fill(0, ind, True)]


OTHER_ROWS = {
    "turned": lambda x, ind: x.flip(0)[ind],
    "delayed": lambda x, ind: x.roll(1)[ind],
    "of a computed index": lambda x, ind: x[(ind + 1) % N],
    "backwards": lambda x, ind: x[N - 1 - ind],
}


@pytest.mark.parametrize("set_up", ["all", "one", "some"])
@pytest.mark.parametrize("how", OTHER_ROWS)
def test_rows_that_are_not_the_elements_own_are_refused(how, set_up):
    """The guide would pair each datum with the covariate of another."""
    with pytest.raises(UnsupportedModelError, match="plate 'data' to depend on the row of its own of 'x'"):
        auto_faithful_guide(
            given_indices(OTHER_ROWS[how]), X, Y, torch.arange(N) if set_up == "all" else CALLS[set_up], **FEW
        )


@pytest.mark.parametrize("take", [one_hot, by_a_mask])
def test_rows_that_are_taken_unseen_are_refused(take):
    with pytest.raises(
        UnsupportedModelError, match=r"'x': in order, or taken by the plate's indices, x\[ind\]"
    ):
        auto_faithful_guide(given_indices(take), X, Y, CALLS["some"], **FEW)


def test_data_in_another_order_matter_only_to_sites_that_read_them():
    """Regression on the covariate of the day before: parameters for one data set fit it."""

    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("days", len(x)):
            pyro.sample("y", dist.Normal(slope * x.roll(1), 0.5), obs=y)

    assert set(auto_faithful_guide(model, X, Y, **FEW)(X, Y)) == {"slope"}
    with pytest.raises(
        UnsupportedModelError, match="Pass the tensor in the order in which the elements use it"
    ):
        auto_faithful_guide(model, X, Y, pool="deepset", **FEW)


def test_covariates_whose_mean_is_used_stay_whole():
    def model(x, y, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(x.mean(), y[rows])

    guide = auto_faithful_guide(model, X, Y, CALLS["some"], **FEW)
    assert guide.model_graph.plates["x"] == ()


@pytest.mark.parametrize("set_up", ["all", "some"])
def test_covariates_that_the_model_moves_to_the_plates_dimension(set_up):
    """The shape of the argument says nothing of the plate at dimension -2, nor of columns that are elements."""

    def model(x, w, y, ind=None):
        with pyro.plate("data", N, subsample=ind, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z + pyro.subsample(x[:, None], event_dim=0) + pyro.subsample(w.T[:, :1], event_dim=0)
            pyro.sample("y", dist.Normal(loc, 0.5), obs=pyro.subsample(y[:, None], event_dim=0))

    w = torch.randn(3, N)
    guide = auto_faithful_guide(model, X, w, Y, CALLS[set_up], **FEW)
    assert guide.inverse.parents["z"] == ("x", "w", "y")
    guide.set_linear_("z", {"x": -0.8, "w": [[-0.8, 0.0, 0.0]], "y": 0.8}, 0.0, math.sqrt(0.2))
    for ind in CALLS.values():
        if ind is None or len(ind) < N:
            rows = slice(None) if ind is None else ind
            expected = 0.8 * (Y - X - w[0])[rows, None]
            torch.testing.assert_close(guide.median(X, w, Y, ind)["z"], expected)


def test_covariates_of_groups_that_the_model_widens():
    """``u[:, None]`` for groups whose members are in a plate inside: the usual way to write it."""

    def model(u, v, y):
        with pyro.plate("groups", 4, dim=-2):
            theta = pyro.sample("theta", dist.Normal(u[:, None], 1.0))
            with pyro.plate("members", 3, dim=-1):
                pyro.sample("y", dist.Normal(theta + v, 1.0), obs=y)

    u, v, y = torch.randn(4), torch.randn(3), torch.randn(4, 3)
    guide = auto_faithful_guide(model, u, v, y, pool="deepset", num_start_samples=4000)
    for shift in (0.0, 2.0):
        exact = (u + shift) / 4 + (y - v).sum(-1) / 4
        # some 20 weights and 16,000 joint samples: a few hundredths
        assert (guide.median(u + shift, v, y)["theta"][:, 0] - exact).abs().max() < 0.2


def test_rows_of_a_tensor_computed_from_a_square_one_are_refused():
    def model(x, y, ind):
        with pyro.plate("data", N, subsample=ind):
            datum((x @ x.T).sum(0)[ind], y[ind])

    with pytest.raises(
        UnsupportedModelError, match=r"along which dimension of 'x'.*Index 'x' itself, x\[ind\]"
    ):
        auto_faithful_guide(model, torch.randn(N, N), Y, CALLS["some"])


def test_rows_of_two_plates_along_one_dimension_are_refused():
    def model(x, y):
        for name, ind in (("one", torch.tensor([0, 1])), ("two", torch.tensor([5, 6]))):
            with pyro.plate(name, N, subsample=ind):
                z = pyro.sample(f"z_{name}", dist.Normal(0.0, 1.0))
                pyro.sample(f"y_{name}", dist.Normal(z + x[ind], 0.5), obs=y[ind])

    with pytest.raises(
        UnsupportedModelError, match=r"those of 'one' and of 'two' along dimension -1\. Pass the"
    ):
        auto_faithful_guide(model, X, Y)


def test_full_data_of_which_no_rows_are_seen_to_be_taken_are_refused_in_the_call():
    def model(x, y, ind=None):
        with pyro.plate("data", N, subsample=ind) as rows:
            datum(x if ind is None else torch.tensor(x.detach().numpy()[rows.flip(0)]).flip(0), y[rows])

    guide = auto_faithful_guide(model, X, Y, **FEW)
    with pytest.raises(
        UnsupportedModelError, match=r"Expected 'x' with 3 entries along dimension -1.*x\[ind\]"
    ):
        guide(X, Y, CALLS["some"])


def test_copies_drawn_jointly_by_parameters_for_each_pair_in_another_order():
    """Pairs are of elements, wherever these are in a call: densities, locations and draws are those of the elements."""

    def model(y, ind=None):
        with pyro.plate("data", 3, subsample=ind) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("total", dist.Normal(z.sum(-1), 0.5), obs=y.sum())
        with pyro.plate("more", 3):
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])

    guide = auto_faithful_guide(model, Y[:3], coupled_rank=0, **FEW)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    order = torch.tensor([2, 0, 1])
    z = torch.randn(3)

    def terms(z, *args):
        trace = poutine.trace(poutine.condition(guide, data={"z": z})).get_trace(*args)
        trace.compute_log_prob()
        return trace.nodes["z"]["log_prob"]

    torch.testing.assert_close(terms(z[order], Y[:3], order), terms(z, Y[:3])[order])
    torch.testing.assert_close(guide.median(Y[:3], order)["z"], guide.median(Y[:3])["z"][order])
    with pyro.plate("draws", 40_000, dim=-2), torch.no_grad():
        here, there = (guide(Y[:3], *more)["z"] for more in ((), (order,)))
    wanted = torch.corrcoef(here.T)[order][:, order]
    assert (wanted - torch.eye(3)).abs().max() > 0.2  # there is something to be seen
    # Standard errors of two correlations of 40,000 draws: .007.
    assert (torch.corrcoef(there.T) - wanted).abs().max() < 0.03
    torch.testing.assert_close(there.std(0), here.std(0)[order], rtol=0.03, atol=0.0)
    with pytest.raises(GraphflowsError, match="each element of plate 'data' once"):
        guide(Y[:3], torch.tensor([2, 2, 1]))


def test_plates_that_are_indexed_are_said_of_the_trace():
    def model(x, y, ind):
        with pyro.plate("data", N, subsample=ind):
            datum(x[ind, 0], y[ind])

    traced = trace_model(model, (torch.zeros(N, 2), Y, CALLS["some"]))
    assert traced.taken == {"x": {-2: "data"}}
    assert traced.graph.plates["x"] == ("data",)
    assert traced.event_dims["x"] == 1
    assert "ind" not in traced.graph.inputs


@pytest.mark.parametrize("handler", ["replay", "condition"])
def test_rows_that_a_handler_replays_are_those_that_the_guide_reads(handler):
    """Otherwise latents of some rows would have their density given the data of others."""

    def model(x, y, rows=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=10, subsample=rows) as i:
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            pyro.sample("y", dist.Normal(slope * x[i] + z, 0.1), obs=y[i])

    x, y = torch.randn(40), 3 * torch.randn(40)
    guide = auto_faithful_guide(model, x, y)
    drawn = poutine.trace(guide).get_trace(x, y)
    values = {name: node["value"] for name, node in drawn.nodes.items() if node["type"] == "sample"}
    around = poutine.replay(guide, drawn) if handler == "replay" else poutine.condition(guide, values)
    again = poutine.trace(around).get_trace(x, y)
    torch.testing.assert_close(again.log_prob_sum(), drawn.log_prob_sum())
    rows = values.pop("data")
    given = poutine.trace(poutine.condition(guide, values)).get_trace(x, y, rows)
    torch.testing.assert_close(again.log_prob_sum(), given.log_prob_sum())


@pytest.mark.parametrize("set_up", ["all", "some"])
def test_plates_and_parameters_with_the_name_of_an_argument(set_up):
    """``pyro.plate("data", len(data))``: covariates and plate are two things, and so are a start and its parameter."""

    def model(data, y, scale, ind=None):
        scale = pyro.param("scale", scale)
        with pyro.plate("data", len(data), subsample=ind) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + data[rows], scale), obs=y[rows])

    scale = torch.tensor(0.5)
    guide = auto_faithful_guide(model, X, Y, scale, CALLS[set_up], **FEW)
    assert guide.inverse.parents["z"] == ("data_", "scale_", "y")
    exact_(guide, "data_")
    for ind in CALLS.values():
        chosen = torch.arange(N) if ind is None else ind
        loss = Trace_ELBO().loss(model, guide, X, Y, scale, ind)
        assert loss == pytest.approx(-float(evidence(X[chosen], Y[chosen]).sum()) * N / len(chosen))


def test_arguments_whose_names_are_those_of_sites_and_of_each_other():
    def model(x, x_, y):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("x", dist.Normal(z + x_, 0.5), obs=y)

    traced = trace_model(model, (X, 2 * X, Y))
    assert traced.graph.parents("z") == ("x_",)
    assert traced.graph.parents("x") == ("x__", "z")
    guide = auto_faithful_guide(model, X, 2 * X, Y, num_start_samples=2000)
    exact = dist.Normal(3 * X, math.sqrt(1.25)).log_prob(Y).sum().item()
    assert -Trace_ELBO(num_particles=20).loss(model, guide, X, 2 * X, Y) == pytest.approx(exact, abs=0.1)


def test_where_the_model_draws_rows_the_start_is_that_of_all_rows():
    """The mode for the rows of one call, each of which counts for ten, is far from that for all."""
    group, covariate = torch.randint(10, (200,)), torch.randn(200)
    effect = 0.5 + torch.randn(10)

    def model(group, covariate, y, size):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 10):
            level = pyro.sample("level", dist.Normal(mean, scale))
        with pyro.plate("rows", len(y), subsample_size=size) as rows:
            loc = level[group[rows]] + slope * covariate[rows]
            pyro.sample("y", dist.Normal(loc, 0.5), obs=y[rows])

    data = group, covariate, effect[group] + 0.7 * covariate + 0.5 * torch.randn(200)
    losses = []
    for size in (20, 200):
        guide = auto_faithful_guide(model, *data, size)
        losses.append(Trace_ELBO(num_particles=200).loss(model, guide, *data, 200))
    assert losses[0] < losses[1] + 1.0


def test_where_the_caller_takes_the_rows_there_are_no_others():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", 95, subsample_size=10):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = 3.0 + torch.randn(10)
    guide = auto_faithful_guide(model, y)
    precision = 1 / 25 + 95.0
    exact = torch.distributions.Normal(95 * y.mean() / precision, precision**-0.5)
    draws = torch.stack([guide(y)["mean"] for _ in range(400)]).detach()
    assert abs(draws.mean() - exact.mean) < 5 * exact.stddev / 20


@pytest.mark.parametrize("given", [True, False])
def test_a_single_row_that_the_caller_takes_is_not_all_rows(given):
    """One row fits a plate of any size; at the centre of the prior all rows are as likely."""
    y = (torch.rand(50) < 0.7).double()

    def model(y):
        logit = pyro.sample("logit", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", 50, subsample_size=1) as rows:
            pyro.sample("y", dist.Bernoulli(logits=logit), obs=y if given else y[rows])

    args = (y[:1] if given else y,)
    assert LogPosterior(model, args, {}, trace_model(model, args)).has_more_rows != given


@pytest.mark.parametrize("number", [50, 3000])
def test_rows_that_pyro_takes_from_data_in_full_are_all_rows(number):
    """Where a plate has all of its rows, Pyro takes data as they are."""
    y = torch.randn(number)

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", number, subsample_size=5):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=pyro.subsample(y, event_dim=0))

    assert LogPosterior(model, (y,), {}, trace_model(model, (y,))).has_more_rows


def test_mixtures_of_rows_that_the_model_draws_start_near_the_posterior_of_all():
    """The sum over classes ignores the scale of a plate; by all rows there is none."""
    y = torch.cat([torch.randn(60) - 2.0, torch.randn(40) + 3.0])

    def model(y, size):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("classes", 2):
            mean = pyro.sample("mean", dist.Normal(torch.tensor([-2.0, 2.0]), 2.0))
        with pyro.plate("rows", len(y), subsample_size=size) as rows:
            k = pyro.sample("k", dist.Bernoulli(share), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mean[k.long()], 1.0), obs=y[rows])

    loss = TraceEnum_ELBO(max_plate_nesting=1, num_particles=20)
    losses = []
    for size in (20, 100):
        guide = auto_faithful_guide(model, y, size)
        losses.append(loss.loss(model, guide, y, 100))
    assert "by more rows" in auto_faithful_guide(model, y, 20).describe(verbose=True)
    assert losses[0] < losses[1] + 1.0


@pytest.mark.parametrize("given", [False, True])
def test_priors_of_rows_are_those_of_the_rows_that_joint_samples_are_by(given):
    """Where a covariate is in the prior: ``z | x, y ~ N(.2 x + .8 y, .2)``, also for few of the rows at set-up."""
    x = 3 * torch.randn(60)
    y = x + torch.randn(60)

    def model(x, y, size=None, ind=None):
        with pyro.plate("data", 60, subsample_size=size, subsample=ind) as rows:
            z = pyro.sample("z", dist.Normal(x[rows], 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])

    rows = {"ind": torch.arange(6)} if given else {"size": 6}
    guide = auto_faithful_guide(model, x, y, example_kwargs=rows, num_start_samples=3000)
    median = guide.median(x, y)["z"]
    assert median.numpy() == pytest.approx((0.2 * x + 0.8 * y).numpy(), abs=0.05)
