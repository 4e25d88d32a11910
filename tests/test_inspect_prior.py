"""Joint prior samples: right moments, right shapes, by one run or many; refused where they are not the model."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.inspect import Batching, sample_prior, trace_model
from pyro_graphflows.inspect import prior as prior_module
from pyro_graphflows.inspect.prior import unconstrained_of

N = dist.Normal


def regression(w, x=None):
    a = pyro.sample("a", N(0.0, 1.0))
    with pyro.plate("data", 4):
        z = pyro.sample("z", N(a, 1.0))
        pyro.sample("x", N(z * w, 1.0), obs=x)


def mixing(x=None):
    """A sum over everything would mix the samples of one run."""
    with pyro.plate("data", 3):
        z = pyro.sample("z", N(0.0, 1.0))
    pyro.sample("x", N(z.sum(), 1.0), obs=x)


def nested(x=None):
    m = pyro.sample("m", N(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("outer", 3, dim=-2):
        a = pyro.sample("a", N(m[..., 0], 1.0))
        with pyro.plate("inner", 4, dim=-1):
            pyro.sample("x", N(a[..., None], torch.ones(5)).to_event(1), obs=x)


def _runs(monkeypatch):
    """Count the runs of the model."""
    count = [0]
    run = prior_module._run

    def counted(*args):
        count[0] += 1
        return run(*args)

    monkeypatch.setattr(prior_module, "_run", counted)
    return count


def test_samples_follow_the_model():
    samples = sample_prior(regression, (torch.full((4,), 2.0),), {"x": torch.zeros(4)}, num_samples=4000)
    assert {name: tuple(value.shape) for name, value in samples.items()} == {
        "a": (4000,),
        "z": (4000, 4),
        "x": (4000, 4),
    }
    # Var(x) = 4 * (1 + 1) + 1 = 9; its estimate has standard error 9 * sqrt(2 / 4000) = 0.2.
    assert (samples["x"].var(0) - 9).abs().max() < 5 * 0.2
    # Cov(z_0, z_1) = Var(a) = 1, with standard error sqrt((2 * 2 + 1) / 4000) = 0.035.
    assert abs(torch.cov(samples["z"].T)[0, 1] - 1) < 5 * 0.035


def test_one_run_gives_all_samples(monkeypatch):
    count = _runs(monkeypatch)
    sample_prior(regression, (torch.ones(4),), num_samples=50)
    assert count[0] == 4  # two for the check, one of both side by side, one for the samples


@pytest.mark.parametrize("vectorize", [True, False])
def test_shapes(vectorize):
    samples = sample_prior(nested, (torch.zeros(3, 4, 5),), num_samples=6, vectorize=vectorize)
    assert samples["m"].shape == (6, 2)
    assert samples["a"].shape == (6, 3, 1)
    assert samples["x"].shape == (6, 3, 4, 5)


def test_models_that_mix_samples_are_run_by_vmap(monkeypatch):
    count = _runs(monkeypatch)
    samples = sample_prior(mixing, num_samples=300)
    assert count[0] < 10
    residual = samples["x"] - samples["z"].sum(-1)
    # Var = 1 with standard error sqrt(2 / 300) = 0.08; mixing all samples would give about 900.
    assert abs(residual.var() - 1) < 5 * 0.08


def test_samples_of_both_ways_agree():
    """The same model, by one run and by many: means of x given z within five standard errors."""
    for vectorize in (True, False):
        samples = sample_prior(regression, (torch.ones(4),), num_samples=400, vectorize=vectorize)
        slope = (samples["x"] * samples["z"]).mean() / (samples["z"] ** 2).mean()
        assert abs(slope - 1) < 5 / (1600 * 2) ** 0.5


@pytest.mark.parametrize("way", ["plate", "vmap", "single"])
def test_unconstrained_values_are_by_the_support_of_each_sample(way):
    def model(x=None):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Uniform(-a, 1.0 + a))
            pyro.sample("x", N(b, 1.0), obs=x)

    args = (torch.zeros(3),)
    batching = Batching(trace_model(model, args), way, unconstrained=["b"])
    samples = sample_prior(model, args, num_samples=20, batching=batching)
    a, b = samples["a"].unsqueeze(-1), samples["b"]
    share = (b + a) / (1 + 2 * a)
    torch.testing.assert_close(samples[unconstrained_of("b")].sigmoid(), share, atol=1e-5, rtol=1e-4)


def test_the_random_state_is_the_callers():
    pyro.set_rng_seed(1)
    first = sample_prior(regression, (torch.ones(4),), num_samples=3)
    second = sample_prior(regression, (torch.ones(4),), num_samples=3)
    pyro.set_rng_seed(1)
    again = sample_prior(regression, (torch.ones(4),), num_samples=3)
    assert torch.equal(first["x"], again["x"])
    assert not torch.equal(first["x"], second["x"])


def test_subsampled_plates():
    def model(x):
        m = pyro.sample("m", N(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=4) as index:
            pyro.sample("x", N(m, 1.0), obs=x[index])

    samples = sample_prior(model, (torch.zeros(10),), num_samples=5)
    assert samples["x"].shape == (5, 4)


def test_reparametrised_and_deterministic_sites():
    def model(x=None):
        m = pyro.sample("m", N(0.0, 1.0))
        z = pyro.sample("z", N(m, 1.0))
        pyro.sample("x", N(pyro.deterministic("twice", 2 * z), 1.0), obs=x)

    wrapped = poutine.reparam(model, config={"z": LocScaleReparam(0.5)})
    samples = sample_prior(wrapped, num_samples=2000)
    assert set(samples) == {"m", "z_decentered", "x"}
    assert abs(samples["x"].var() - 9) < 5 * 9 * (2 / 2000) ** 0.5


def test_discrete_sites():
    def model(x=None):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.25, 0.75])), infer={"enumerate": "parallel"})
        pyro.sample("x", N(torch.tensor([-1.0, 1.0])[k], 0.1), obs=x)

    samples = sample_prior(model, num_samples=400)
    assert torch.equal(samples["k"] == 1, samples["x"] > 0)


def test_partly_observed_sites():
    def model(x, mask):
        z = pyro.sample("z", N(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", N(z, 1.0), obs=x, obs_mask=mask)

    samples = sample_prior(model, (torch.zeros(3), torch.tensor([True, False, True])), num_samples=5)
    assert set(samples) == {"z", "x_observed", "x_unobserved"}


def _factor(x):
    pyro.factor("f", -(pyro.sample("z", N(0.0, 1.0)) ** 2))


def _masked(x):
    with poutine.mask(mask=torch.tensor(False)):
        pyro.sample("z", N(0.0, 1.0))


def _masked_distribution(x):
    pyro.sample("z", N(0.0, 1.0).mask(torch.tensor(False)))


def _scaled(x):
    with poutine.scale(scale=2.0):
        z = pyro.sample("z", N(0.0, 1.0))
    pyro.sample("w", N(z, 1.0))


def _improper(x):
    with poutine.condition(data={"z": torch.zeros(())}):
        pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))


def _latent_observation(x):
    pyro.sample("x", N(0.0, 1.0), obs=pyro.sample("z", N(0.0, 1.0)) * 2)


def _autoregressive(x):
    pyro.sample("x0", N(0.0, 1.0), obs=x[0])
    pyro.sample("x1", N(x[0], 1.0), obs=x[1])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_factor, "site 'f': it is a factor"),
        (_masked, r"site 'z': it is under poutine\.mask"),
        (_masked_distribution, "site 'z': its distribution is masked"),
        (_scaled, r"site 'z': it is under poutine\.scale"),
        (_improper, "site 'z': its prior is improper"),
        (_latent_observation, "site 'x': it is a factor"),
        (_autoregressive, r"site 'x1': .*use the value that pyro\.sample returns"),
    ],
)
def test_refused_where_samples_are_not_the_model(model, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        sample_prior(model, (torch.zeros(2),), num_samples=2)
    assert trace_model(model, (torch.zeros(2),)).not_generative


def test_one_scale_of_all_sites_leaves_samples_those_of_the_model():
    def model(x):
        with poutine.scale(scale=2.0):
            z = pyro.sample("z", N(0.0, 1.0))
            pyro.sample("w", N(z, 1.0))

    assert not trace_model(model, (torch.zeros(2),)).not_generative
    assert sample_prior(model, (torch.zeros(2),), num_samples=2)


def test_sites_that_come_and_go_are_refused():
    def model():
        z = pyro.sample("z", N(0.0, 1.0))
        if z > 0:
            pyro.sample("sometimes", N(0.0, 1.0))
        else:
            pyro.sample("otherwise", N(0.0, 1.0))

    with pytest.raises(UnsupportedModelError, match=r"the same sites in every run; '.*' is missing"):
        sample_prior(model, num_samples=50)


def test_sizes_that_vary_are_refused():
    def model():
        n = int(pyro.sample("n", dist.Poisson(5.0)))
        pyro.sample("z", N(torch.zeros(n + 1), 1.0).to_event(1))

    with pytest.raises(UnsupportedModelError, match="At site 'z', expected the same shape in every run"):
        sample_prior(model, num_samples=20)


def test_number_of_samples_is_checked():
    with pytest.raises(GraphflowsError, match="positive number of samples; got 0"):
        sample_prior(regression, (torch.ones(4),), num_samples=0)


def markov_chain(length):
    """A chain whose transitions and observations are random, as each sample has its own."""
    first = pyro.sample("first", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    steps = pyro.sample("steps", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([0.0, 100.0, 200.0]), 1.0).to_event(1))
    seen = dist.Normal(loc.unsqueeze(-2).unsqueeze(-1), torch.ones(2)).to_event(1)
    chain = dist.DiscreteHMM(first.log(), steps.unsqueeze(-3).log(), seen, duration=length)
    pyro.sample("y", chain)


def test_samples_of_a_hidden_markov_model_follow_its_transitions():
    length, number = 4, 20_000
    samples = sample_prior(markov_chain, (length,), num_samples=number)
    assert samples["y"].shape == (number, length, 2)
    off = samples["y"].unsqueeze(-2) - samples["loc"].reshape(number, 1, 3, 1)  # (number, length, state, 2)
    state = off.abs().sum(-1).argmin(-1)
    noise = off.gather(-2, state.reshape(number, length, 1, 1).expand(-1, -1, 1, 2))
    assert abs(float(noise.mean())) < 5 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 5 * (2 / noise.numel()) ** 0.5
    steps = samples["steps"]
    weights = torch.tensor([1.0, -2.0, 4.0])  # of states
    marginal = samples["first"]
    for t in range(length):
        marginal = (marginal.unsqueeze(-1) * steps).sum(-2)
        error = weights[state[:, t]] - marginal @ weights
        assert abs(float(error.mean())) < 5 * float(error.std()) / number**0.5
        if t > 0:  # given the state before, the next one is of its row
            row = steps[torch.arange(number), state[:, t - 1]]
            error = weights[state[:, t]] - row @ weights
            products = torch.stack([error, error * weights[state[:, t - 1]]])
            assert bool((products.mean(-1).abs() < 5 * products.std(-1) / number**0.5).all())


def test_algebra_that_fails_at_draws_of_a_prior_is_no_crash():
    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        covariance = torch.ones(3, 3) + (scale - 0.1) * torch.eye(
            3
        )  # of no normal where the scale is below 0.1
        root = torch.linalg.cholesky(covariance)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=root), obs=y)

    y = torch.randn(3)
    with pytest.raises(UnsupportedModelError, match="can be run at draws of its prior"):
        sample_prior(model, (y,), num_samples=100)
    assert bool(auto_faithful_guide(model, y)(y)["scale"] > 0.0)  # it starts without joint samples
