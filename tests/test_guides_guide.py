"""The guide as its users meet it: set-up, calls, files, refusals."""

import copy
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform

from pyro_graphflows import AutoOrder
from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.inversion import faithful_inverse
from pyro_graphflows.graphs.library import binary_tree, load_network
from pyro_graphflows.graphs.structures import InverseGraph
from pyro_graphflows.guides import AutoFaithfulGuide, Factor, Normal, NormalFactor, auto_faithful_guide


def regression(w, y=None):
    with pyro.plate("data", len(w)):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        offset = pyro.sample("offset.of.it", dist.Normal(slope, 2.0))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
        pyro.sample("y", dist.Normal(slope * w + offset, noise), obs=y)


@pytest.fixture
def data():
    return torch.randn(12), torch.randn(12)


def many_supports(w, y=None):
    with pyro.plate("data", len(w)):
        s = pyro.sample("s", dist.HalfCauchy(1.0))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        v = pyro.sample("v", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        m = pyro.sample("m", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
        b = pyro.sample("b", dist.Beta(2.0, 3.0))
        mean = w + v.sum(-1) + (m.sum(-1) * p[..., :2]).sum(-1) + b
        pyro.sample("y", dist.Normal(mean, s), obs=y)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, RenyiELBO])
def test_any_support_and_shape_trains(data, elbo):
    guide = auto_faithful_guide(many_supports, *data)
    values = guide(*data)
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "s": (12,),
        "p": (12, 3),
        "v": (12, 2),
        "m": (12, 2, 2),
        "b": (12,),
    }
    assert constraints.simplex.check(values["p"]).all()
    svi = SVI(
        many_supports,
        guide,
        pyro.optim.Adam({"lr": 1e-3}),
        elbo(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    )
    before = {name: p.clone() for name, p in guide.named_parameters()}
    assert all(math.isfinite(svi.step(*data)) for _ in range(2))
    assert all(not torch.equal(before[name], p) for name, p in guide.named_parameters())


def test_densities_of_pushed_forward_values(data):
    """log q of a value in any support: by hand from the unconstrained normal and the bijection."""
    guide = auto_faithful_guide(many_supports, *data, family=Normal(hidden_dims=[], fusion=False))
    values = guide(*data)
    trace = poutine.trace(poutine.condition(guide, values)).get_trace(*data)
    for name in ("s", "b", "p"):
        fn = trace.nodes[name]["fn"]
        transform = torch.distributions.biject_to(fn.support)
        raw = transform.inv(values[name])
        ladj = transform.log_abs_det_jacobian(raw, values[name])
        flat = raw.reshape(12, -1)
        torch.testing.assert_close(fn.log_prob(values[name]), fn.base.log_prob(flat) - ladj)
    total = sum(trace.nodes[name]["fn"].log_prob(value) for name, value in values.items())
    torch.testing.assert_close(guide.log_prob(values, *data), total)


def test_particles_are_independent_draws(data):
    guide = auto_faithful_guide(regression, *data)
    with pyro.plate("particles", 5, dim=-2):
        values = guide(*data)
    for value in values.values():
        assert value.shape == (5, 12)
        assert (value.std(0) > 0).all()


def test_every_call_reads_its_own_data_and_size(data):
    guide = auto_faithful_guide(regression, *data, init="regression", family=Normal(fusion=False))
    for n in (12, 5, 1, 30, 12):
        w, y = torch.randn(n), torch.randn(n)
        values = guide(w, y)
        assert values["slope"].shape == (n,)
        fresh = poutine.trace(guide).get_trace(w, y)
        other = poutine.trace(guide).get_trace(w, y + 1.0)
        last = guide.inverse.sampling_order[0]
        assert (
            fresh.nodes[last]["fn"].log_prob(values[last]) != other.nodes[last]["fn"].log_prob(values[last])
        ).all()
        assert guide(w=w, y=y)["slope"].shape == (n,)


def test_a_plate_that_becomes_subsampled_keeps_its_scale():
    """The plate's size at set-up must not be frozen: the guide's terms are scaled as the model's."""
    total = [10]

    def model(x):
        with pyro.plate("data", total[0], subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = auto_faithful_guide(model, torch.randn(10))
    guide.set_linear_("z", {"x": 0.5}, 0.0, math.sqrt(0.5))
    for n in (10, 4, 10, 3):
        x = torch.randn(n)
        exact = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum()) * 10 / n
        for _ in range(2):
            assert Trace_ELBO().loss(model, guide, x) == pytest.approx(-exact, rel=1e-9)


def test_random_subsamples_agree_between_guide_and_model():
    x = torch.randn(20)

    def model(x):
        with pyro.plate("data", 20, subsample_size=6) as indices:
            batch = x[indices]
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    guide = auto_faithful_guide(model, x)
    guide.set_linear_("z", {"x": 0.5}, 0.0, math.sqrt(0.5))
    seen = set()
    for _ in range(5):
        trace = poutine.trace(guide).get_trace(x)
        indices = trace.nodes["data"]["value"]
        seen.add(tuple(indices.tolist()))
        replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x)
        assert torch.equal(replayed.nodes["x"]["value"], x[indices])
        loss = (trace.log_prob_sum() - replayed.log_prob_sum()).item()
        exact = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(x[indices]).sum()) * 20 / 6
        assert loss == pytest.approx(-exact, rel=1e-9)
    assert len(seen) > 1


def test_model_masks_are_repeated():
    mask = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", 3), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(3)
    guide = auto_faithful_guide(model, x, init="random")
    guide.set_linear_("z", {"x": 0.5}, 0.0, math.sqrt(0.5))
    exact = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)[mask].sum())
    assert Trace_ELBO().loss(model, guide, x) == pytest.approx(-exact)


def test_observations_keyword_overrides(data):
    guide = auto_faithful_guide(regression, *data)
    latents = guide(*data)
    other = torch.randn(12)
    torch.testing.assert_close(
        guide.log_prob(latents, data[0], other), guide.log_prob(latents, *data, observations={"y": other})
    )


def test_predictive_and_what_to_do_without_data(data):
    guide = auto_faithful_guide(regression, *data)
    posterior = Predictive(guide, num_samples=4)(*data)
    assert posterior["noise"].shape == (4, 12)
    assert Predictive(regression, posterior_samples=posterior)(data[0])["y"].shape == (4, 12)
    with pytest.raises(UnsupportedModelError, match=r"site 'y'.*posterior = Predictive\(guide"):
        guide(data[0])


def test_data_for_a_site_that_was_latent_at_setup(data):
    guide = auto_faithful_guide(regression, data[0])
    assert guide(data[0])["y"].shape == (12,)
    with pytest.raises(UnsupportedModelError, match="'y', a latent site when the guide was set up"):
        guide(*data)
    guide.setup(*data)
    assert "y" not in guide(*data)


def test_nan_is_refused_with_its_site(data):
    guide = auto_faithful_guide(regression, *data)
    y = data[1].clone()
    y[3] = math.nan
    with pytest.raises(GraphflowsError, match="the data the guide conditions on; y have NaN"):
        guide(data[0], y)


def test_copies_and_files(data):
    guide = auto_faithful_guide(regression, *data)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(*data)
    latents = guide(*data)
    expected = guide.log_prob(latents, *data)

    twin = copy.deepcopy(guide)
    torch.testing.assert_close(twin.log_prob(latents, *data), expected)
    assert twin.model is guide.model
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    torch.testing.assert_close(guide.log_prob(latents, *data), expected)

    file = io.BytesIO()
    torch.save(guide, file)
    torch.testing.assert_close(guide.log_prob(latents, *data), expected)  # the live guide is as it was
    svi.step(*data)
    pyro.clear_param_store()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(GraphflowsError, match=r"guide.bind\(model\)"):
        loaded(*data)
    torch.testing.assert_close(loaded.bind(regression).log_prob(latents, *data), expected)

    other = auto_faithful_guide(regression, *data, init="random")
    other.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(other.log_prob(latents, *data), expected)


def test_median_is_the_centre(data):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    guide = auto_faithful_guide(model, data[0], init="random")
    guide.set_linear_("z", {"x": 0.5}, 0.0, math.sqrt(0.5))
    torch.testing.assert_close(guide.median(data[0])["z"], (0.5 * data[0]).exp())


def test_lazy_setup_and_torch_optim(data):
    guide = auto_faithful_guide(regression)
    with pytest.raises(GraphflowsError, match=r"guide.setup"):
        guide.model_graph  # noqa: B018
    guide.setup(*data)
    optimizer = torch.optim.Adam(guide.parameters(), lr=1e-3)
    loss = Trace_ELBO().differentiable_loss(regression, guide, *data)
    loss.backward()
    optimizer.step()
    assert guide.model_graph.inputs == ("w",)


def test_describe_says_what_is_not_faithful(data):
    text = auto_faithful_guide(regression, *data).describe()
    assert "offset.of.it" in text
    assert "not faithful" not in text
    assert repr(text) == str(text)
    assert "not faithful" in auto_faithful_guide(regression, *data, inverse="mean_field").describe()


def test_inverse_in_every_form(data):
    elimination = ["noise", "slope", "offset.of.it"]
    for inverse in (
        "reverse",
        elimination,
        lambda graph: faithful_inverse(graph, "forward"),
        auto_faithful_guide(regression, *data).inverse,
    ):
        guide = auto_faithful_guide(regression, *data, inverse=inverse)
        assert isinstance(guide.inverse, InverseGraph)
        assert isinstance(guide, AutoFaithfulGuide)
    assert auto_faithful_guide(regression, *data, inverse=elimination).inverse.sampling_order == tuple(
        elimination[::-1]
    )
    with pytest.raises(GraphflowsError, match="Expected inverse= the name of an order"):
        auto_faithful_guide(regression, *data, inverse=3)
    with pytest.raises(GraphflowsError, match=r"inverse of the model's latent sites"):
        auto_faithful_guide(regression, *data, inverse=faithful_inverse(binary_tree(2, seed=0).graph()))


def test_wrong_options_are_named(data):
    with pytest.raises(
        GraphflowsError, match="Expected family= 'auto', 'normal', 'spline', 'flow', a family object"
    ):
        auto_faithful_guide(regression, *data, family="gaussian")
    with pytest.raises(
        GraphflowsError, match="Expected init= one of 'auto', 'regression', 'mode', 'prior', 'random'"
    ):
        auto_faithful_guide(regression, *data, init="zero")
    with pytest.raises(GraphflowsError, match="skip=True"):
        auto_faithful_guide(regression, *data, family=Normal(skip=False), init="regression")
    guide = auto_faithful_guide(regression, *data)
    with pytest.raises(GraphflowsError, match="missing: noise"):
        guide.log_prob({"slope": torch.zeros(12), "offset.of.it": torch.zeros(12)}, *data)
    with pytest.raises(GraphflowsError, match=r"Expected a latent site, one of .*; got 'y'"):
        guide.set_linear_("y", {}, 0.0, 1.0)


def test_what_a_user_may_get_wrong_is_named(data):
    def wrong(match, **options):
        with pytest.raises(GraphflowsError, match=match):
            auto_faithful_guide(regression, *data, **options)

    with pytest.raises(TypeError, match="hidden_layer"):
        auto_faithful_guide(regression, *data, hidden_layer=2)
    wrong("num_start_samples >= 1, a whole number; got 0", num_start_samples=0)
    wrong("subclass of Factor, or family object}; got 3 for 'slope'", factors={"slope": 3})
    wrong("factors= of latent sites, slope, .*; got q", factors={"q": NormalFactor})
    guide = auto_faithful_guide(regression, *data, num_start_samples=100)
    with pytest.raises(GraphflowsError, match=r"Expected observations of y.*; got q"):
        guide(*data, observations={"q": data[0]})
    for levels, draws in (([1.5], 10), ([0.5], 0)):
        with pytest.raises(GraphflowsError, match=r"probabilities in \[0, 1\] and num_draws >= 1"):
            guide.quantiles(levels, *data, num_draws=draws)
    with pytest.raises(GraphflowsError, match=r"weights of 'y' for 'slope' of shape \(1, 1\); got \(3,\)"):
        guide.set_linear_("slope", {"y": torch.ones(3)}, 0.0)
    with pytest.raises(GraphflowsError, match="positive scale of 'slope'"):
        guide.set_linear_("slope", {}, 0.0, -1.0)


def test_models_without_latent_sites_or_with_others_in_a_later_call_are_refused():
    def sites(number, x):
        for i in range(number):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.tensor(1.0)
    with pytest.raises(UnsupportedModelError, match="Expected a model with latent sites"):
        auto_faithful_guide(sites, 0, x)
    guide = auto_faithful_guide(sites, 2, x, num_start_samples=100)
    with pytest.raises(UnsupportedModelError, match="this call has z2 as well"):
        guide(3, x)
    with pytest.raises(UnsupportedModelError, match="Expected the latent site 'z1'"):
        guide(1, x)


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_improper_priors(family):
    """They cannot be drawn, and guides do not need that."""

    def model(x):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        scale = pyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, scale), obs=x)

    x = torch.randn(6)
    guide = auto_faithful_guide(model, x, family=family)
    assert "site 'mu': its prior is improper" in guide.describe()
    for loss in (Trace_ELBO, TraceMeanField_ELBO):
        assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss()).step(x))
    assert guide(x)["scale"] > 0


@pytest.mark.parametrize("family", ["auto", Normal(fusion=False), "flow"])
def test_draws_are_where_transforms_of_the_prior_lead(family):
    """A prior that is moved by a constant has no draws below it, whatever torch says of its support."""

    def model(y):
        with pyro.plate("data", len(y)):
            moved = dist.TransformedDistribution(dist.Exponential(1.0), [AffineTransform(2.0, 1.0)])
            z = pyro.sample("z", moved)
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    y = torch.tensor([2.3, 4.1, 2.0])
    guide = auto_faithful_guide(model, y, family=family)
    with pyro.plate("draws", 500, dim=-2):
        assert guide(y)["z"].min() > 2
    # N(y - 2; z, s^2) e^-z over positive z
    offset, variance = y - 2.0, 0.25
    tail = torch.special.log_ndtr((offset - variance) / 0.5)
    evidence = (-offset + variance / 2 + tail).sum()
    bound = -Trace_ELBO(num_particles=500, vectorize_particles=True).loss(model, guide, y)
    assert -100.0 < bound < evidence + 0.1


def test_too_few_finite_samples_of_the_model_are_said():
    """Most draws of this prior overflow: no regression, instead of one that never ends."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1e4))
            pyro.sample("x", dist.Normal(z.exp(), 1.0), obs=x)

    guide = auto_faithful_guide(model, torch.randn(3), num_start_samples=20, init="regression")
    assert "a regression needs 20" in guide.describe(verbose=True)
    assert torch.isfinite(guide(torch.randn(3))["z"]).all()


def test_integer_covariates_are_refused():
    def model(group, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(group * 1.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(UnsupportedModelError, match=r"integers are taken as indices.*group for z"):
        auto_faithful_guide(model, torch.arange(3), torch.randn(3))


def test_regression_start_is_right_before_the_first_step():
    """Expected KL of a linear-Gaussian model: number of weights / (2 samples)."""
    network = load_network("ecoli70")
    x = torch.tensor(network.sample(500, 1)[:, [network.names.index(n) for n in network.observed]])
    guide = auto_faithful_guide(network.pyro_model(), x[:100])
    mean, covariance = map(torch.tensor, network.posterior(x.numpy()))
    posterior = torch.distributions.MultivariateNormal(mean, covariance)
    z = posterior.sample((20,))
    log_q = guide.log_prob({name: z[..., i] for i, name in enumerate(network.latent)}, x)
    assert (posterior.log_prob(z) - log_q).mean().item() < 0.02


def test_regression_start_falls_back_with_a_note():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("tilt", -z.abs())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(6)
    guide = auto_faithful_guide(model, x)
    assert "no regression start" in guide.describe()
    assert "tilt" in guide.describe()
    assert guide.inverse.parents["z"] == ("tilt", "x") or set(guide.inverse.parents["z"]) == {"tilt", "x"}
    assert math.isfinite(Trace_ELBO().loss(model, guide, x))


class LaplaceFactor(Factor):
    """A toy third family: independent Laplace elements."""

    @property
    def num_outputs(self):
        return 2 * self.size

    def distribution(self, outputs, shift, scale):
        loc, log_scale = outputs.chunk(2, -1)
        return dist.Laplace(shift + scale * loc, scale * log_scale.exp()).to_event(1)

    def linear_start(self, weights, loc, scale_tril):
        spread = scale_tril.square().sum(-1).sqrt() / math.sqrt(2.0)  # the Laplace scale of that variance
        return torch.cat([weights, torch.zeros_like(weights)]), torch.cat([loc, spread.log()])


def test_a_third_family_plugs_in(data):
    guide = auto_faithful_guide(many_supports, *data, family=LaplaceFactor)
    svi = SVI(many_supports, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert math.isfinite(svi.step(*data))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(1.0, 2.0))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)

    guide = auto_faithful_guide(model, data[0], family=LaplaceFactor, num_start_samples=100_000)
    exact = dist.Laplace(1.0, 2.0)
    z = exact.sample((12,))
    assert (guide.log_prob({"z": z}, data[0]) - exact.log_prob(z)).abs().max() < 0.1


def test_normal_factor_is_its_covariance():
    factor = NormalFactor(3)
    tril = torch.tensor([[0.5, 0.0, 0.0], [0.2, 1.5, 0.0], [-1.0, 0.3, 0.7]])
    weights, biases = factor.linear_start(torch.zeros(3, 0), torch.tensor([1.0, 2.0, 3.0]), tril)
    assert weights.shape == (factor.num_outputs, 0)
    shift, scale = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([2.0, 0.1, 1.0])
    fn = factor.distribution(biases.expand(4, -1), shift, scale)
    root = scale.unsqueeze(-1) * tril
    torch.testing.assert_close(fn.covariance_matrix[2], root @ root.T)
    torch.testing.assert_close(fn.mean[1], shift + scale * torch.tensor([1.0, 2.0, 3.0]))


def test_vectors_in_linear_gaussian_models_start_right():
    """Vector sites: the covariance within a site is part of the start."""
    mixing = torch.tensor([[1.0, 0.3], [-0.5, 0.8], [0.2, 0.2]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z @ mixing.T, 0.5).to_event(1), obs=x)

    x = torch.randn(7, 3)
    guide = auto_faithful_guide(model, x, num_start_samples=40_000)
    precision = torch.eye(2) + mixing.T @ mixing / 0.25
    posterior = dist.MultivariateNormal(
        x @ mixing @ torch.linalg.inv(precision) / 0.25, precision_matrix=precision
    )
    z = posterior.sample((2000,))
    assert (posterior.log_prob(z) - guide.log_prob({"z": z}, x)).mean().abs().item() < 0.01


@pytest.mark.parametrize(
    ("default", "dtype"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
@pytest.mark.parametrize("init", ["regression", "random"])
def test_data_of_another_precision_than_the_default(default, dtype, init):
    torch.set_default_dtype(default)
    network = binary_tree(3, seed=0)
    x = torch.zeros(5, 4, dtype=dtype)
    guide = auto_faithful_guide(network.pyro_model(), x, init=init, num_start_samples=500)
    assert {parameter.dtype for parameter in guide.parameters()} == {dtype}
    assert {value.dtype for value in guide(x).values()} == {dtype}


def test_a_search_for_an_order_is_an_inverse(data):
    guide = auto_faithful_guide(regression, *data, inverse=AutoOrder(seconds=0.1), num_start_samples=100)
    assert guide.inverse.num_edges <= faithful_inverse(guide.model_graph).num_edges
    assert copy.deepcopy(guide).inverse == guide.inverse
