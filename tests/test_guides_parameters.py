"""The parameters of guides in the store of Pyro."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.guides import auto_faithful_guide

N = dist.Normal
X = torch.randn(12)


def pair(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(0.0, 1.0))
        pyro.sample("x", N(z, 1.0), obs=x)


def vectors(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(torch.zeros(3), 1.0).to_event(1))
        pyro.sample(
            "x", N(torch.stack([z[..., 0], z[..., 0] + z[..., 1], z[..., 2]], -1), 1.0).to_event(1), obs=x
        )


@pytest.mark.parametrize("when", ["before set-up", "after set-up", "after a call"])
def test_the_parameter_store_that_was_loaded(when, tmp_path):
    trained = auto_faithful_guide(pair, X, num_start_samples=100)
    svi = SVI(pair, trained, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(X)
    store = pyro.get_param_store()
    store.save(tmp_path / "store")
    expected = trained.median(X)["z"]
    pyro.clear_param_store()
    if when == "before set-up":
        store.load(tmp_path / "store")
    guide = auto_faithful_guide(pair, X, num_start_samples=100)
    if when == "after a call":
        SVI(pair, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(X)
    if when != "before set-up":
        store.load(tmp_path / "store")
    assert not torch.allclose(guide.median(X)["z"], expected)
    with pytest.warns(GraphflowsWarning, match="took the values that Pyro's parameter store had"):
        guide(X)
    torch.testing.assert_close(guide.median(X)["z"], expected)
    SVI(pair, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(X)  # without a second warning
    assert not torch.allclose(guide.median(X)["z"], expected)
    other = auto_faithful_guide(pair, X, num_start_samples=100)
    start = other.median(X)["z"]
    other(X)  # its names are those of the first, whose values are not for it
    assert torch.equal(other.median(X)["z"], start)


def test_a_parameter_store_of_other_shapes_is_refused(tmp_path):
    auto_faithful_guide(pair, X, num_start_samples=100)(X)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    guide = auto_faithful_guide(vectors, X.reshape(4, 3), num_start_samples=100)
    with pytest.raises(GraphflowsError, match="Pyro's parameter store has some of shape"):
        guide(X.reshape(4, 3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))])
def test_a_copy_shows_its_own_parameters(copied):
    guide = auto_faithful_guide(pair, X, num_start_samples=100)
    guide(X)
    other = copied(guide).bind(pair)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    pyro.clear_param_store()
    other(X)
    shown = {id(value.unconstrained()) for value in pyro.get_param_store().values()}
    assert {id(parameter) for parameter in other.parameters()} == shown
