import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_graphflows.distributions import Simulated
from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.infer import InferenceCompilation, Simulations, fit, sample_posterior
from pyro_graphflows.inspect import get_model_graph

MIX = np.array([[1.0, 0.5], [-0.3, 1.0], [0.2, 0.4]])


def black_box(theta):
    """A linear simulator with noise, in NumPy; it takes one pair."""
    assert theta.shape == (2,)
    return MIX @ theta.numpy() + 0.5 * np.random.default_rng(int(1e6 * torch.rand(()))).normal(size=3)


def model(x=None):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    simulated = Simulated(black_box, theta, event_shape=(3,), input_dims=1, vectorized=False)
    pyro.sample("x", simulated, obs=x)


class TestDistribution:
    @pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
    def test_shapes(self, batch):
        one = Simulated(black_box, torch.zeros(*batch, 2), event_shape=(3,), input_dims=1, vectorized=False)
        assert one.shape() == (*batch, 3)
        assert one.sample().shape == (*batch, 3)
        assert one.sample((5,)).shape == (5, *batch, 3)
        assert one.expand((6, *batch)).sample().shape == (6, *batch, 3)
        assert one.stand_in().shape == batch
        assert one.sample().dtype == torch.get_default_dtype()

    def test_inputs_of_several_shapes_broadcast(self):
        def product(a, b):
            assert a.shape == (4, 3)
            assert b.shape == (4, 3, 2)
            return a * b.sum(-1)

        a, b = torch.randn(4, 1), torch.randn(3, 2)
        assert torch.equal(Simulated(product, a, b, input_dims=(0, 1)).sample(), a * b.sum(-1))

    def test_whole_numbers_stay_so(self):
        counts = Simulated(lambda rate: np.random.default_rng(0).poisson(rate.numpy()), torch.ones(7))
        assert counts.sample().dtype == torch.int64

    def test_the_stand_in_depends_on_every_input(self):
        a, b = torch.randn(4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
        Simulated(None, a, b, input_dims=(0, 1)).stand_in().sum().backward()
        assert (a.grad != 0).all()
        assert (b.grad != 0).all()

    def test_bad_input(self):
        with pytest.raises(GraphflowsError, match=r"shape \(4,\); got \(3,\)"):
            Simulated(lambda z: torch.zeros(3), torch.zeros(4)).sample()
        with pytest.raises(GraphflowsError, match="at most as many as it has dimensions"):
            Simulated(black_box, torch.zeros(2), input_dims=2)
        with pytest.raises(GraphflowsError, match="input_dims for each input"):
            Simulated(black_box, torch.zeros(2), input_dims=(1, 1))


class TestGuides:
    def test_the_graph_is_read_from_the_inputs(self):
        def chain(x=None, y=None):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Normal(a, 1.0))
            pyro.sample("x", Simulated(lambda a: a.numpy(), a), obs=x)
            pyro.sample("y", Simulated(lambda b, c: (b + c).numpy(), b, c), obs=y)

        graph = get_model_graph(chain, (torch.zeros(()), torch.zeros(())))
        assert set(graph.edges) == {("a", "c"), ("a", "x"), ("b", "y"), ("c", "y")}
        assert graph.observed == ("x", "y")

    def test_a_plate_of_simulators(self):
        def each(x):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Gamma(2.0, rate))
                pyro.sample(
                    "x", Simulated(lambda z: np.random.default_rng(0).poisson(z.numpy()) * 1.0, z), obs=x
                )

        guide = auto_faithful_guide(each, torch.ones(6), pool="deepset")
        assert guide.inverse.parents["z"] == ("rate", "x")
        history = fit(each, guide, torch.ones(6), simulations=200, schedule=2, progress=False)
        assert all(map(math.isfinite, history.validation_loss))

    def test_learning_needs_no_density(self):
        """A linear simulator: the guide starts at its regression on simulations, near the exact posterior."""
        guide = auto_faithful_guide(model, torch.zeros(3), num_start_samples=1000)
        simulations = Simulations(500, vectorize=False)
        fit(model, guide, torch.zeros(3), simulations=simulations, schedule=2, progress=False)
        mix = torch.tensor(MIX)
        covariance = torch.linalg.inv(torch.eye(2) + mix.T @ mix / 0.25)
        entropy = dist.MultivariateNormal(torch.zeros(2), covariance).entropy().item()
        with torch.no_grad():
            log_q = InferenceCompilation(model, guide, batch_size=1000).log_probs(torch.zeros(3))
        error = log_q.std().item() / 1000**0.5
        assert -log_q.mean().item() == pytest.approx(entropy, abs=4 * error + 0.05)

    def test_what_needs_a_density_says_so(self):
        guide = auto_faithful_guide(model, torch.zeros(3), num_start_samples=100)
        message = "simulator 'black_box' has none.*Learn from simulations"
        with pytest.raises(ValueError, match=message):  # Pyro adds the name of the site
            Trace_ELBO().loss(model, guide, torch.zeros(3))
        with pytest.raises(ValueError, match=message):
            sample_posterior(model, guide, torch.zeros(3), num_draws=10, progress=False)

    def test_numpy_outside_of_it_is_named(self):
        def outside(x=None):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.as_tensor(np.exp(theta.numpy())), 1.0), obs=x)

        with pytest.raises(UnsupportedModelError, match=r"pyro.sample\(name, Simulated"):
            auto_faithful_guide(outside, torch.zeros(()))


def test_deterministic_sites_are_observed_where_named():
    """A guide of the user's, and a simulated value that is pyro.deterministic: no density anywhere."""

    def simulator(x=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("x", z + torch.randn(z.shape))

    def guide(x=None, observations=None):
        slope = pyro.param("slope", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(slope * observations["x"], 0.5**0.5))

    with pytest.raises(GraphflowsError, match=r"among \['x', 'z'\]; got \['y'\]"):
        fit(simulator, guide, simulations=Simulations(100, observed=["y"]), progress=False)
    fit(simulator, guide, simulations=Simulations(3000, observed=["x"]), optimizer=0.05, progress=False)
    # least squares on 2,700 pairs has a standard error of sqrt(.5 / 2 / 2700) = .01
    assert abs(pyro.param("slope").item() - 0.5) < 0.05
