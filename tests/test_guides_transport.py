import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS

from pyro_graphflows import Flow, Normal, Spline, auto_faithful_guide
from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.guides import Factor
from pyro_graphflows.guides.transport import pull, push

FAMILIES = {
    "normal": "normal",
    "spline": "spline",
    "student": Spline(base="student"),
    "flow": Flow(units_per_variable=3, conditioner_units=3),
    "graphical": Flow(form="graphical", units_per_variable=3),
    "density": Flow(closed_form="density", units_per_variable=3, conditioner_units=3),
    "fused": Normal(fusion="auto"),
    "fused student": Spline(base="student", fusion="auto"),
}


def hierarchical(sigma, y):
    """A positive site, a simplex, a vector, a bound that is another latent, and a plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    top = pyro.sample("top", dist.Uniform(0.0, tau))
    mixed = (w * v).sum(-1) + top
    with pyro.plate("groups", y.shape[-1]):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta + mixed, sigma), obs=y)


def made(data, family="auto"):
    """Return a guide whose start, of no matter here, takes no search for a mode."""
    return auto_faithful_guide(hierarchical, *data, family=family, init="regression")


def moved(guide):
    """Give a guide weights of no particular kind."""
    generator = torch.Generator().manual_seed(1)
    for parameter in guide.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return guide


@pytest.fixture
def data():
    return torch.rand(4) + 0.5, torch.randn(4)


def flat(values):
    """Return values without the last number of the simplex, which the others say."""
    free = {name: value[..., :-1] if name == "w" else value for name, value in values.items()}
    return torch.cat([value.reshape(len(value), -1) for value in free.values()], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_its_inverse_and_its_determinant(family, data):
    guide = moved(made(data, FAMILIES[family]))
    transport = guide.transport(*data)
    noise = torch.randn(3, transport.size)
    mapped = transport(noise)
    assert {name: value.shape[1:] for name, value in mapped.values.items()} == {
        name: value.shape for name, value in guide(*data).items()
    }
    back = transport.pack(transport.inverse(mapped.values))
    assert torch.allclose(back, noise, atol=1e-8)
    jacobian = torch.autograd.functional.jacobian(
        lambda one: flat(transport(one[None]).values).squeeze(0), noise[0]
    )
    assert mapped.total[0].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-8)


@pytest.mark.parametrize("family", ["normal", "spline", "flow", "graphical", "fused"])
def test_the_guides_density_is_that_of_the_noise_over_the_determinant(family, data):
    guide = moved(made(data, FAMILIES[family]))
    transport = guide.transport(*data)
    noise = torch.randn(1, transport.size)
    mapped = transport(noise)
    values = {name: value[0] for name, value in mapped.values.items()}
    expected = dist.Normal(0.0, 1.0).log_prob(noise).sum() - mapped.total[0]
    assert guide.log_prob(values, *data).sum().item() == pytest.approx(expected.item(), abs=1e-7)


def test_draws_of_the_guide_are_the_images_of_standard_noise(data):
    guide = moved(made(data, "spline"))
    draws = guide.posterior(*data, num_draws=2000, seed=0).draws
    transport = guide.transport(*data)
    noise = transport.pack(transport.inverse({name: draws[name] for name in transport.shapes}))
    bound = 6 / math.sqrt(2000)
    assert (noise.mean(0).abs() < bound).all()
    assert ((noise.square().mean(0) - 1).abs() < bound * math.sqrt(2)).all()
    off = noise.T @ noise / 2000 - torch.eye(transport.size)
    assert (off.fill_diagonal_(0).abs() < bound).all()


def test_gradients_pass_through(data):
    transport = moved(made(data, "flow")).transport(*data)
    noise = torch.randn(2, transport.size, requires_grad=True)

    def total(noise):
        mapped = transport(noise)
        return flat(mapped.values).sum() + mapped.total.sum()

    assert torch.autograd.gradcheck(total, (noise,), eps=1e-5, atol=1e-4, rtol=1e-4)


def test_noise_far_out_has_no_density_and_leaves_other_draws_alone(data):
    transport = made(data).transport(*data)
    noise = torch.randn(3, transport.size)
    expected = transport(noise)
    noise[1] = 1e300
    with pyro.validation_enabled(False):
        mapped = transport(noise)
    assert mapped.total[1] == -math.inf
    assert torch.equal(mapped.total[[0, 2]], expected.total[[0, 2]])
    assert all(value.isfinite().all() for value in mapped.values.values())
    assert all(torch.equal(value[2], expected.values[name][2]) for name, value in mapped.values.items())


def coupled(n, total):
    with pyro.plate("parts", n):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("total", dist.Normal(z.sum(-1), 0.1), obs=total)


@pytest.mark.parametrize("rank", [0, 2])
def test_copies_that_are_drawn_jointly(rank):
    guide = auto_faithful_guide(coupled, 4, torch.tensor(3.0), coupled_rank=rank)
    transport = moved(guide).transport(4, torch.tensor(3.0))
    noise = torch.randn(2, 4)
    mapped = transport(noise)
    jacobian = torch.autograd.functional.jacobian(lambda one: transport(one[None]).values["z"][0], noise[0])
    assert mapped.total[0].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item())
    assert torch.allclose(transport.inverse(mapped.values)["z"].squeeze(-1), noise)


def test_elements_that_a_mask_leaves_out_keep_the_law_of_their_noise():
    mask = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", 3), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(3)
    guide = moved(auto_faithful_guide(model, x))
    noise = torch.randn(5, 3, 1)
    _, log_det = guide.transport(x)({"z": noise})
    of_noise = dist.Normal(0.0, 1.0).log_prob(noise[..., 1, 0])
    assert torch.allclose(log_det["z"][:, 1], of_noise)
    scales = torch.autograd.functional.jacobian(
        lambda one: guide.transport(x)({"z": one}).values["z"], noise[:1]
    ).flatten()
    assert torch.allclose(log_det["z"][0, 0], scales.reshape(3, 3)[0, 0].log())


def test_it_serves_neutra(data):
    """The density of the reparametrised model is that of the model in the coordinates of the noise."""
    guide = moved(made(data, "spline"))
    transport = guide.transport(*data)
    neutra = transport.neutra()
    model = neutra.reparam(hierarchical)
    trace = poutine.trace(model).get_trace(*data)
    (shared,) = [name for name in trace.stochastic_nodes if name.endswith("_shared_latent")]
    noise = trace.nodes[shared]["value"]
    mapped = transport(noise[None])
    values = {name: value[0] for name, value in mapped.values.items()}
    held = poutine.trace(poutine.condition(hierarchical, data=values)).get_trace(*data)
    expected = held.log_prob_sum() + mapped.total[0]
    assert trace.log_prob_sum().item() == pytest.approx(expected.item())
    taken = neutra.transform_sample(noise)
    assert all(torch.allclose(taken[name], value) for name, value in values.items())
    several = neutra.transform_sample(torch.randn(7, transport.size))
    assert several["w"].shape == (7, 3)


def test_nuts_by_neutra_finds_a_conjugate_posterior():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = 3.0 + torch.randn(9)
    neutra = auto_faithful_guide(model, x).transport(x).neutra()
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(neutra.reparam(model)), num_samples=150, warmup_steps=50, disable_progbar=True)
    mcmc.run(x)
    (noise,) = mcmc.get_samples().values()
    mu = neutra.transform_sample(noise)["mu"]
    precision = 9 + 0.01
    assert abs(mu.mean() - x.sum() / precision) < 6 * precision**-0.5 / math.sqrt(50)


def test_discrete_sites_are_refused_by_name(data):
    def model(sigma, y):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, sigma), obs=y)

    with pytest.raises(UnsupportedModelError, match=r"site 'z'.*discrete"):
        auto_faithful_guide(model, *data).transport(*data)


def test_distributions_that_are_no_known_map_are_refused_by_name(data):
    class Mixture(Factor):
        num_outputs = 1

        def distribution(self, outputs, shift, scale):
            both = dist.Normal(torch.stack([outputs, -outputs], -1), 1.0)
            return dist.MixtureSameFamily(dist.Categorical(torch.ones(*both.batch_shape)), both).to_event(1)

        def linear_start(self, weights, loc, scale_tril):
            return weights, loc

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(UnsupportedModelError, match=r"site 'z'.*MixtureSameFamily.*push"):
        auto_faithful_guide(model, data[1], family=Normal(factor=Mixture)).transport(data[1])


def test_a_users_distribution_with_a_map_of_its_own():
    class Own:
        def push(self, noise):
            return 2 * noise, torch.full(noise.shape[:-1], math.log(2.0))

        def pull(self, value):
            return value / 2

    value, log_det = push(Own(), torch.ones(3, 1))
    assert torch.equal(value, torch.full((3, 1), 2.0))
    assert torch.equal(pull(Own(), value), torch.ones(3, 1))
    assert log_det.shape == (3,)


def test_elements_beyond_those_fitted_are_refused():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", y.shape[-2], dim=-2):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            with pyro.plate("data", y.shape[-1], dim=-1):
                pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    y = torch.randn(3, 2)
    guide = auto_faithful_guide(model, y, inverse="reverse")
    assert set(guide.transport(y).shapes) == {"mu", "theta"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphflowsWarning)  # of new groups, and of other data
        with pytest.raises(UnsupportedModelError, match=r"site 'theta'.*beyond those fitted"):
            guide.transport(torch.randn(5, 2))


def test_wrong_shapes_are_named(data):
    transport = made(data).transport(*data)
    with pytest.raises(GraphflowsError, match=rf"\(draws, {transport.size}\)"):
        transport(torch.zeros(2, 3))
    noise = transport.unpack(torch.zeros(2, transport.size))
    noise["theta"] = noise["theta"][:, :2]
    with pytest.raises(GraphflowsError, match=r"'theta' of shape \(draws, 4, 1\)"):
        transport(noise)
