"""Subsampled plates that are Python loops: ``for i in pyro.plate(name, size, subsample_size=...)``.

Each iteration has sites of its own, about another datum in each call. Locals read their datum; what is outside of the
loop reads none, as with any subsampled plate.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides import auto_faithful_guide, check_guide

FEW = {"init": "random", "num_start_samples": 500}
N = 6
X = torch.linspace(-2.0, 3.0, N).double()
Y = X + torch.tensor([0.3, -1.0, 0.5, 1.2, -0.4, 0.1]).double()


def coins(y, ind=None):
    """A global only, and sites named by the index of the datum, as in Pyro's tutorial on conditional independence."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    for i in pyro.plate("data", N, subsample=ind):
        pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=y[i])


def random_coins(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    for i in pyro.plate("data", N, subsample_size=2):
        pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=y[i])


def locals_and_global(x, y, ind=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    for k, i in enumerate(pyro.plate("data", N, subsample=ind)):
        z = pyro.sample(f"z_{k}", dist.Normal(mu, 1.0))
        pyro.sample(f"y_{k}", dist.Normal(z + x[i], 0.5), obs=y[i])


def bound(model, guide, *args, held=None):
    trace = poutine.trace(guide if held is None else poutine.replay(guide, trace=held)).get_trace(*args)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(*args)
    return (replayed.log_prob_sum() - trace.log_prob_sum()).item()


def held_global(guide, *args):
    trace, held = poutine.trace(guide).get_trace(*args), poutine.Trace()
    held.add_node("mu", **trace.nodes["mu"])
    return held


def test_a_global_of_a_loop_is_exact_in_the_mean_over_batches():
    batch = torch.tensor([4, 1])
    guide = auto_faithful_guide(coins, Y, batch, **FEW)
    assert "per-element parameters" in guide.describe()
    precision = 0.25 + N
    guide.set_linear_("mu", {}, float(Y.sum() / precision), precision**-0.5)
    held = held_global(guide, Y, batch)
    batches = [torch.tensor(each) for each in itertools.combinations(range(N), 2)]
    bounds = [bound(coins, guide, Y, each, held=held) for each in batches]
    exact = dist.MultivariateNormal(torch.zeros(N), 4.0 + torch.eye(N)).log_prob(Y).item()
    assert sum(bounds) / len(bounds) == pytest.approx(exact)


def test_random_loops_train_and_are_safe():
    guide = auto_faithful_guide(random_coins, Y, num_start_samples=500)
    svi = SVI(random_coins, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert all(math.isfinite(svi.step(Y)) for _ in range(5))
    assert check_guide(random_coins, guide, Trace_ELBO, Y).safe


@pytest.mark.parametrize("set_up", [torch.tensor([4, 1]), torch.tensor([0, 5])])
def test_locals_read_their_datum_and_covariate(set_up):
    guide = auto_faithful_guide(locals_and_global, X, Y, set_up, **FEW)
    assert guide.inverse.parents["z_0"] == ("x[data 0]", "mu", "y_0")
    assert not any(parent in guide.inverse.parents["z_0"] for parent in ("y_1", "x[data 1]"))
    precision = 0.25 + N / 1.25
    guide.set_linear_("mu", {}, float((Y - X).sum() / 1.25 / precision), precision**-0.5)
    for k in range(2):
        weights = {"mu": 0.2, f"x[data {k}]": -0.8, f"y_{k}": 0.8}
        guide.set_linear_(f"z_{k}", weights, 0.0, math.sqrt(0.2))
    held = held_global(guide, X, Y, set_up)
    mu = held.nodes["mu"]["value"]
    bounds = []
    for batch in itertools.combinations(range(N), 2):
        ind = torch.tensor(batch)
        with poutine.replay(trace=held):
            found = guide.median(X, Y, ind)
        for k, i in enumerate(batch):
            expected = 0.2 * found["mu"] + 0.8 * (Y[i] - X[i])
            assert found[f"z_{k}"].item() == pytest.approx(float(expected))
        bounds.append(bound(locals_and_global, guide, X, Y, ind, held=held))
    exact = dist.MultivariateNormal(torch.zeros(N), 4.0 + 1.25 * torch.eye(N)).log_prob(Y - X).item()
    assert sum(bounds) / len(bounds) == pytest.approx(exact)
    assert torch.is_tensor(mu)


def test_latents_named_by_the_index_of_the_datum_are_refused():
    def model(y):
        for i in pyro.plate("data", N, subsample_size=2):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])

    with pytest.raises(
        UnsupportedModelError, match=r"named by the index of the datum in the subsampled.*enum"
    ):
        auto_faithful_guide(model, Y, **FEW)


def test_loops_in_full_are_as_before():
    guide = auto_faithful_guide(locals_and_global, X, Y, **FEW)
    assert guide.inverse.parents["z_5"][-1] == "y_5"
    assert "not read" not in guide.describe()
    guide = auto_faithful_guide(coins, Y, **FEW)
    assert len(guide.inverse.parents["mu"]) == N
