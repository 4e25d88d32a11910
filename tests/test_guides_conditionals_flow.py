"""The flow family: exact answers with linear flows inside, and one term per site whatever the weights."""

import copy
import dataclasses
import io
import itertools
import math

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian_guides import set_exact_
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.library import binary_tree
from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork
from pyro_graphflows.guides import Flow, Normal, auto_faithful_guide
from pyro_graphflows.infer import IWAE_ELBO, InferenceCompilation, log_evidence
from pyro_graphflows.models.textbook import arithmetic_circuit_model as arithmetic_circuit
from pyro_graphflows.transforms.graphical import GraphicalResidualNN

ELBOS = [Trace_ELBO, TraceMeanField_ELBO, RenyiELBO]


FLOWS = ["faithful", "graphical"]
forms = pytest.mark.parametrize("form", FLOWS)


def flow_guide(model, *args, **options):
    """Return a small flow guide; options of the family and of the guide together."""
    names = {each.name for each in dataclasses.fields(Flow)}
    family = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return auto_faithful_guide(
        model, *args, family=Flow(**{"units_per_variable": 4, "conditioner_units": 4, **family}), **rest
    )


def perturb_(guide, size=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return guide


def collider_chain():
    """Two causes of one effect, and a chain below; leaves observed."""
    return LinearGaussianNetwork(
        {"a": [], "b": [], "c": ["a", "b"], "x": ["c"], "y": ["b"]},
        {"a": [], "b": [], "c": [1.0, -0.6], "x": [0.7], "y": [1.5]},
        {"a": 0.0, "b": 2.0, "c": 0.1, "x": 1.0, "y": -1.0},
        {"a": 1.0, "b": 0.7, "c": 0.4, "x": 0.5, "y": 0.3},
    )


NETWORKS = {"collider": collider_chain, "tree": lambda: binary_tree(3, seed=1)}


def data_of(network, n, seed=3):
    return torch.tensor(network.sample(n, seed)[:, [network.names.index(o) for o in network.observed]])


@pytest.mark.parametrize("order", ["forward", "reverse", "auto", "full"])
@pytest.mark.parametrize("name", NETWORKS)
@forms
def test_exact_posterior_gives_exact_evidence(name, order, form):
    network = NETWORKS[name]()
    x = data_of(network, 6)
    exact = network.log_evidence(x.numpy()).sum()
    model = network.pyro_model()
    guide = set_exact_(flow_guide(model, x, inverse=order, init="random", form=form), network)
    assert not any(guide.plan.analytic_kl.values())  # so TraceMeanField_ELBO samples as well, without bias
    for vectorize in (False, True):
        for elbo in ELBOS:
            options = {"alpha": 0.0} if elbo is RenyiELBO else {}
            loss = elbo(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1, **options)
            assert loss.loss(model, guide, x) == pytest.approx(-exact, abs=1e-8)
    assert IWAE_ELBO(4).loss(model, guide, x) == pytest.approx(-exact, abs=1e-8)
    evidence = log_evidence(model, guide, x, num_particles=5)
    torch.testing.assert_close(evidence.log_evidence.sum(), torch.tensor(exact))


def mixed(w, y=None):
    """Scalars, vectors, supports, and a matrix."""
    with pyro.plate("data", len(w)):
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        v = pyro.sample("v", dist.MultivariateNormal(s.unsqueeze(-1) * torch.ones(3), torch.eye(3)))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        m = pyro.sample("m", dist.Normal(v.sum(-1)[..., None, None] * torch.ones(2, 2), 1.0).to_event(2))
        mean = w + (v * p).sum(-1) + m.sum((-1, -2))
        pyro.sample("y", dist.Normal(mean, s), obs=y)


@pytest.fixture
def data():
    return torch.randn(4), torch.randn(4)


@pytest.mark.parametrize("closed_form", ["sampling", "density"])
@pytest.mark.parametrize("inverse", ["auto", "reverse"])
@forms
def test_density_of_samples_is_the_density_of_given_values(data, closed_form, inverse, form):
    """What was computed while drawing agrees with what inversion says, whatever the weights, in value and gradient."""
    options = {
        "closed_form": closed_form,
        "inverse": inverse,
        "num_start_samples": 200,
        "form": form,
        "init": "regression",
    }
    guide = perturb_(flow_guide(mixed, *data, **options), 0.05)
    with pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(guide).get_trace(*data)
    trace.compute_log_prob()
    names = guide.model_graph.latent
    drawn = sum(trace.nodes[name]["log_prob"] for name in names)
    values = {name: trace.nodes[name]["value"].detach().clone() for name in names}
    given = guide.log_prob(values, *data)
    assert given.shape == (3, 4)
    torch.testing.assert_close(given, drawn, atol=1e-8, rtol=0)
    # site by site, and one value at a time
    for name in names:
        single = trace.nodes[name]["fn"].log_prob(values[name])
        torch.testing.assert_close(single, trace.nodes[name]["log_prob"], atol=1e-8, rtol=0)
    given.sum().backward()
    gradients = [p.grad for p in guide.parameters() if p.numel()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert all(float(g.abs().sum()) > 0 for g in gradients)


@forms
def test_terms_are_the_density_of_the_joint_map(data, form):
    """log q by brute force: the Jacobian of the map from all noise to all unconstrained values."""
    guide = perturb_(flow_guide(mixed, *data, init="regression", num_start_samples=200, form=form))
    network = guide.blocks[0].conditionals
    start = guide.blocks[0].inputs(guide._read(data, {}, None), {})[0]

    def sample(noise):
        evaluation = network.begin(start)
        values, terms = [], 0.0
        for level in network.block.levels:
            evaluation.next()
            here = evaluation._level
            eps = noise[network.parts[level[0]].start : network.parts[level[-1]].stop]
            pushed = here.push(eps)
            evaluation.accept({site: value for site, (value, _) in pushed.items()})
            values += [value for value, _ in pushed.values()]
            terms = terms + sum(term for _, term in pushed.values())
        return torch.cat(values), terms

    noise = torch.randn(1 + 3 + 2 + 4)
    jacobian = torch.autograd.functional.jacobian(lambda eps: sample(eps)[0], noise)
    expected = dist.Normal(0.0, 1.0).log_prob(noise).sum() - jacobian.slogdet().logabsdet
    torch.testing.assert_close(sample(noise)[1], expected)


@forms
def test_conditional_independence_is_exact(form):
    """After any change of the weights, a site's density moves with its parents' values (ancestors') and no others."""
    network = binary_tree(3, seed=2)
    x = data_of(network, 5)
    guide = perturb_(flow_guide(network.pyro_model(), x, init="random", form=form))
    values = {name: value.detach() for name, value in guide(x).items()}
    dag = guide.inverse.to_networkx()
    seen = {
        site: nx.ancestors(dag, site) if form == "graphical" else set(dag.predecessors(site))
        for site in values
    }

    def terms(values):
        trace = poutine.trace(poutine.condition(guide, values)).get_trace(x)
        return {name: trace.nodes[name]["fn"].log_prob(values[name]).detach() for name in values}

    before = terms(values)
    for moved in values:
        after = terms({**values, moved: values[moved] + 0.7})
        for site in values:
            same = torch.allclose(after[site], before[site], atol=1e-9)
            assert same == (moved != site and moved not in seen[site])


@forms
def test_particles_are_independent_draws(data, form):
    guide = flow_guide(mixed, *data, init="regression", num_start_samples=200, form=form)
    with pyro.plate("particles", 5, dim=-2):
        values = guide(*data)
    for value in values.values():
        assert value.shape[:2] == (5, 4)
        assert (value.std(0) > 0).all()
    other = guide(*data)
    assert not torch.equal(other["s"], guide(*data)["s"])


@forms
def test_each_draw_of_a_site_is_new(data, form):
    """Also where one pass through the network serves all levels."""
    guide = flow_guide(mixed, *data, init="regression", num_start_samples=200, form=form)
    trace = poutine.trace(guide).get_trace(*data)
    for name in guide.model_graph.latent:
        site = trace.nodes[name]
        first, second = site["fn"].rsample(), site["fn"].rsample()
        assert not torch.equal(first, second), name
        assert not torch.equal(first, site["value"])


@forms
def test_one_pass_serves_all_levels_while_values_are_kept(form, monkeypatch):
    network = binary_tree(3, seed=2)
    x = data_of(network, 5)
    guide = flow_guide(network.pyro_model(), x, init="random", form=form)
    passes = []
    sample = GraphicalResidualNN.sample_with
    monkeypatch.setattr(GraphicalResidualNN, "sample_with", lambda *args: passes.append(1) or sample(*args))
    guide(x)
    assert len(passes) == (form == "graphical")


@forms
def test_replaced_values_reach_later_sites(form):
    network = binary_tree(3, seed=2)
    x = data_of(network, 5)
    guide = perturb_(flow_guide(network.pyro_model(), x, init="random", form=form))
    first, *_ = guide.inverse.sampling_order
    fixed = {first: torch.full((5,), 0.3)}
    pyro.set_rng_seed(7)
    trace = poutine.trace(poutine.condition(guide, fixed)).get_trace(x)
    values = {name: trace.nodes[name]["value"] for name in guide.model_graph.latent}
    assert torch.equal(values[first], fixed[first])
    # the same noise and another value: every descendant moves
    pyro.set_rng_seed(7)
    moved = poutine.trace(poutine.condition(guide, {first: fixed[first] + 1})).get_trace(x)
    for name in nx.descendants(guide.inverse.to_networkx(), first):
        assert not torch.equal(moved.nodes[name]["value"], values[name])
    trace.compute_log_prob()
    total = sum(trace.nodes[name]["log_prob"] for name in values)
    torch.testing.assert_close(total, guide.log_prob(values, x), atol=1e-8, rtol=0)
    first_run = poutine.trace(guide).get_trace(x)
    replayed = poutine.trace(poutine.replay(guide, trace=first_run)).get_trace(x)
    assert all(replayed.nodes[name]["value"] is first_run.nodes[name]["value"] for name in values)
    torch.testing.assert_close(replayed.log_prob_sum(), first_run.log_prob_sum(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("init", ["regression", "random"])
@forms
def test_every_parameter_learns(data, elbo, init, form):
    guide = flow_guide(mixed, *data, init=init, num_start_samples=500, form=form)
    loss = elbo(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(mixed, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    before = {name: p.clone() for name, p in guide.named_parameters()}
    assert all(math.isfinite(svi.step(*data)) for _ in range(3))
    assert all(not torch.equal(before[name], p) for name, p in guide.named_parameters() if p.numel())


@forms
def test_gradients_of_the_elbo_are_those_of_the_joint_computation(form):
    """Same noise: the loss summed over sites has the gradient of the loss of the joint density, with inversion."""
    network = binary_tree(2, seed=2)
    x = data_of(network, 3)
    model = network.pyro_model()
    guide = perturb_(flow_guide(model, x, init="random", form=form), 0.1)
    found = []
    for joint in (False, True):
        guide.zero_grad()
        pyro.set_rng_seed(5)
        if joint:
            values = guide(x)
            log_p = poutine.trace(poutine.condition(model, values)).get_trace(x).log_prob_sum()
            loss = guide.log_prob({n: v.clone() for n, v in values.items()}, x).sum() - log_p
        else:
            loss = Trace_ELBO().differentiable_loss(model, guide, x)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in guide.parameters() if p.numel()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=1e-6)


@forms
def test_regression_start_is_right_before_the_first_step(form):
    network = collider_chain()
    x = data_of(network, 50)
    exact = network.log_evidence(x.numpy()).mean()
    model = network.pyro_model()
    guide = flow_guide(model, x, form=form)
    loss = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x)
    assert loss / 50 == pytest.approx(-exact, abs=0.02)


@forms
def test_vectors_in_linear_gaussian_models_start_right(form):
    matrix, mixing = torch.randn(3, 3), torch.randn(2, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(10 * torch.ones(3), scale_tril=0.1 * torch.eye(3)))
            y = pyro.sample("y", dist.Normal(z @ matrix, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(y @ mixing.T, 0.5).to_event(1), obs=x)

    x = 10 * torch.ones(3) @ matrix @ mixing.T + torch.randn(30, 2)
    guide = flow_guide(model, x, form=form)
    cov_y = 0.01 * matrix.T @ matrix + torch.eye(3)
    cov = mixing @ cov_y @ mixing.T + 0.25 * torch.eye(2)
    exact = dist.MultivariateNormal(10 * torch.ones(3) @ matrix @ mixing.T, cov).log_prob(x).sum()
    loss = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x)
    assert loss == pytest.approx(-float(exact), abs=30 * 0.02)


def test_elements_have_their_own_parents():
    """Two chains written with vectors: element resolution leaves out what crosses from one to the other."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            w = pyro.sample("w", dist.Normal(torch.stack([0.8 * z[..., 0], z[..., 1]], -1), 0.6).to_event(1))
            pyro.sample("x", dist.Normal(w, 0.5).to_event(1), obs=x)

    x = torch.randn(5, 2)
    guide = flow_guide(model, x, resolution="element")
    evidence = sum(
        dist.Normal(0.0, math.sqrt(b * b + 0.61)).log_prob(x[:, i]).sum() for i, b in enumerate((0.8, 1.0))
    )
    loss = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x)
    assert loss == pytest.approx(-float(evidence), abs=5 * 0.02)
    perturb_(guide)
    values = {name: value.detach() for name, value in guide(x).items()}

    def term(values):
        return guide.log_prob(values, x).detach()

    def moved(*places):
        shifted = {name: value.clone() for name, value in values.items()}
        for name, i in places:
            shifted[name][..., i] += 0.5
        return term(shifted)

    # chains are independent: what a move in one changes does not depend on a move in the other
    for first in ("z", "w"):
        for second in ("z", "w"):
            both = moved((first, 0), (second, 1)) - moved((second, 1))
            torch.testing.assert_close(both, moved((first, 0)) - term(values), atol=1e-8, rtol=0)


def schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("schools", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@forms
def test_per_element_parameters_of_hierarchical_models(form):
    """Exact start is impossible (globals see no data), so each element gets a shift and a scale; these train well."""
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    pyro.set_rng_seed(1)
    guide = flow_guide(schools, sigma, y, num_start_samples=1000, form=form)
    assert any("table" in name for name, _ in guide.named_parameters())
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(schools, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.98}), elbo)
    losses = [svi.step(sigma, y) for _ in range(80)]
    assert sum(losses[-20:]) / 20 < sum(losses[:10]) / 10 - 1
    values = guide(sigma, y)
    trace = poutine.trace(poutine.condition(guide, values)).get_trace(sigma, y)
    assert torch.isfinite(trace.log_prob_sum())


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_sites_with_per_element_parameters_start_narrow(family):
    """About a tenth as wide as the prior; what is set by hand is exact nevertheless."""
    sigma, y = torch.full((8,), 10.0), torch.zeros(8)
    guide = auto_faithful_guide(schools, sigma, y, family=family, init="regression", num_start_samples=4000)
    with pyro.plate("particles", 4000, dim=-2):
        mu = guide(sigma, y)["mu"].detach()
    assert 0.3 < float(mu.std()) < 1.0  # the prior has 5
    guide.set_linear_("tau", {}, 0.3, 0.2)
    guide.set_linear_("mu", {"tau": 0.0} if "tau" in guide.inverse.parents["mu"] else {}, 1.0, 2.0)
    latents = {"mu": torch.tensor(1.5), "tau": torch.tensor(1.2), "theta": torch.zeros(8)}
    trace = poutine.trace(poutine.condition(guide, latents)).get_trace(sigma, y)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["mu"]["log_prob"], dist.Normal(1.0, 2.0).log_prob(latents["mu"]))
    expected = dist.LogNormal(0.3, 0.2).log_prob(latents["tau"])
    torch.testing.assert_close(trace.nodes["tau"]["log_prob"], expected)


def test_inference_compilation_scores_in_one_go(data):
    """Joint samples of the model are scored by the guide, level by level; the loss falls."""
    network = binary_tree(2, seed=0)
    x = data_of(network, 10)
    model = network.pyro_model()
    for form, closed_form in itertools.product(FLOWS, ("sampling", "density")):
        pyro.clear_param_store()
        options = {"form": form, "closed_form": closed_form, "num_start_samples": 500}
        guide = flow_guide(model, x, init="random", **options)
        compilation = InferenceCompilation(model, guide, pyro.optim.ClippedAdam({"lr": 0.02}), batch_size=100)
        losses = [compilation.step() for _ in range(20)]
        assert sum(losses[-5:]) < sum(losses[:5])


@forms
def test_copies_and_files(data, form):
    guide = perturb_(flow_guide(mixed, *data, init="regression", num_start_samples=200, form=form), 0.05)
    values = {name: value.detach() for name, value in guide(*data).items()}
    expected = guide.log_prob(values, *data)
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False).bind(mixed)
    fresh = flow_guide(mixed, *data, init="random", standardize=False, form=form)
    fresh.load_state_dict(guide.state_dict())
    # features carry their kinds beside the buffers; they are all the identity here
    for other in (copy.deepcopy(guide), loaded, guide, fresh):
        torch.testing.assert_close(other.log_prob(values, *data), expected, atol=1e-7, rtol=0)
    copied = copy.deepcopy(guide)
    with torch.no_grad():
        next(iter(copied.parameters())).add_(1.0)
    torch.testing.assert_close(guide.log_prob(values, *data), expected, atol=1e-7, rtol=0)


def test_median_and_predictive(data):
    guide = flow_guide(mixed, *data, init="regression", num_start_samples=200)
    median = guide.median(*data)
    assert all(torch.equal(median[name], value) for name, value in guide.median(*data).items())
    draws = Predictive(mixed, guide=guide, num_samples=7)(*data)
    assert draws["m"].shape == (7, 4, 2, 2)


def test_float32(data):
    torch.set_default_dtype(torch.float32)
    data = [each.float() for each in data]
    guide = perturb_(flow_guide(mixed, *data, init="regression", num_start_samples=200), 0.05)
    values = guide(*data)
    assert all(value.dtype == torch.float32 for value in values.values())
    trace = poutine.trace(guide).get_trace(*data)
    trace.compute_log_prob()
    names = guide.model_graph.latent
    given = guide.log_prob({name: trace.nodes[name]["value"].clone() for name in names}, *data)
    torch.testing.assert_close(
        given, sum(trace.nodes[name]["log_prob"] for name in names), atol=1e-2, rtol=1e-3
    )


def test_flow_learns_what_normals_cannot():
    """A posterior with two modes (z only seen through its square): better by far than any normal."""

    def model(x=None):
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.square(), 0.3), obs=x)

    x = torch.full((1,), 1.0)
    losses = {}
    for family in (Normal(), Flow(closed_form="density", num_blocks=2)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        # so few steps tell the modes apart from two of five initial weights
        guide = auto_faithful_guide(model, x, family=family, num_start_samples=1000, setup_seed=1)
        optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.98})
        compilation = InferenceCompilation(model, guide, optim, batch_size=200)
        for _ in range(80):
            compilation.step()
        losses[type(family).__name__] = sum(compilation.loss() for _ in range(5)) / 5
    assert losses["Flow"] < losses["Normal"] - 0.3


def test_wrong_options_are_named(data):
    with pytest.raises(GraphflowsError, match="Expected form='faithful' or 'graphical'"):
        Flow(form="planar")
    network = collider_chain()
    model, x = network.pyro_model(), data_of(network, 3)
    with pytest.raises(GraphflowsError, match="Expected num_blocks >= 2, the largest number of edges"):
        flow_guide(model, x, form="graphical", num_blocks=1)
    with pytest.raises(GraphflowsError, match="Expected closed_form 'sampling' or 'density'"):
        Flow(closed_form="both")
    with pytest.raises(GraphflowsError, match="Expected family= 'auto', 'normal', 'spline', 'flow'"):
        auto_faithful_guide(mixed, family="gaussian")
    assert isinstance(flow_guide(mixed).family, Flow)


@pytest.mark.slow
def test_flow_beats_normals_on_the_arithmetic_circuit():
    """A non-linear model with Laplace priors, from the regression start, with the same number of steps."""

    def draw(n):
        nodes = poutine.trace(arithmetic_circuit).get_trace(None, n).nodes
        return torch.stack([nodes["x0"]["value"], nodes["x1"]["value"]], -1)

    test = draw(2000)
    losses = {}
    for family in ("normal", "flow"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = auto_faithful_guide(arithmetic_circuit, draw(100), family=family)
        optim = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.997})
        svi = SVI(arithmetic_circuit, guide, optim, Trace_ELBO())
        for _ in range(800):
            svi.step(draw(100))
        with torch.no_grad():
            losses[family] = sum(svi.evaluate_loss(test) for _ in range(10)) / 10 / len(test)
    assert losses["flow"] < losses["normal"] - 0.2
