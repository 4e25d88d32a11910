"""An ELBO for Pyro's SVI with captured steps: the same training as with the ELBO itself."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyro_graphflows import GraphflowsError, auto_faithful_guide
from pyro_graphflows.infer import CompiledELBO


def model(x):
    scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def guide(x):
    mean = pyro.param("mean", torch.tensor(0.5))
    width = pyro.param("width", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("loc", dist.Normal(mean + 0.1 * x.mean(), width))


def taken(loss, steps=6):
    """Return the parameters after some steps of SVI."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss)
    x = torch.tensor([1.0, 2.0, 4.0])
    for _ in range(steps):
        svi.step(x)
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def test_each_parameter_is_trained():
    before = taken(CompiledELBO(), steps=0)
    loss = CompiledELBO()
    after = taken(loss, steps=1)
    assert not before
    assert loss.report.startswith("compiled")
    assert "by torchscript in" in loss.report
    assert after["scale"] != 2.0
    assert after["mean"] != 0.5
    assert after["width"] != 0.5


def test_where_nothing_is_random_it_is_the_same_training():
    """Without data the mean-field loss is a divergence in closed form."""

    def prior(x):
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    def run(loss):
        pyro.clear_param_store()
        svi = SVI(prior, guide, pyro.optim.Adam({"lr": 0.1}), loss)
        x = torch.ones(3)
        for _ in range(50):
            svi.step(x)
        return pyro.param("width").item()

    expected, found = run(TraceMeanField_ELBO()), run(CompiledELBO(TraceMeanField_ELBO()))
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_optimum_is_found_with_a_faithful_guide():
    def network(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    own = auto_faithful_guide(network, x, init="random")
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()
    loss = CompiledELBO()
    svi = SVI(network, own, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.99}), loss)

    def gap():
        return sum(svi.evaluate_loss(x) for _ in range(200)) / 200 + exact

    first = gap()
    for _ in range(400):
        svi.step(x)
    assert loss.report.startswith("compiled")
    assert first > 1.0
    assert gap() < 0.03 * first


def test_a_store_that_is_cleared_begins_anew():
    loss = CompiledELBO()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss)
    x = torch.ones(3)
    for _ in range(3):
        svi.step(x)
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss)
    svi.step(x)
    moved = pyro.param("mean").item()
    assert moved == pytest.approx(0.5, abs=0.11)
    assert moved != 0.5


def test_another_pair_is_captured_by_itself():
    loss, x = CompiledELBO(), torch.ones(3)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss).step(x)

    def other(x):
        pyro.sample("loc", dist.Normal(pyro.param("other", torch.tensor(0.0)), 1.0))

    SVI(model, other, pyro.optim.Adam({"lr": 0.1}), loss).step(x)
    assert pyro.param("other").item() != 0.0


def test_losses_without_gradients_are_those_of_the_elbo():
    x = torch.ones(3)
    pyro.set_rng_seed(1)
    expected = Trace_ELBO().loss(model, guide, x)
    pyro.set_rng_seed(1)
    assert CompiledELBO().loss(model, guide, x) == expected
    pyro.set_rng_seed(1)
    assert CompiledELBO().differentiable_loss(model, guide, x).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [3, Trace_ELBO, lambda *args: 0.0])
def test_other_losses_are_refused(loss):
    with pytest.raises(GraphflowsError, match="Expected an ELBO object to compile"):
        CompiledELBO(loss)


def test_unknown_backends_are_refused():
    with pytest.raises(GraphflowsError, match="got 'inducer'"):
        CompiledELBO(backend="inducer")
