"""Sites that have data in some calls and none in others: one guide, the same networks (Kingma et al. 2014)."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_guides import assignments, set_tables_
from guide_families import everywhere
from hypothesis import given
from linear_gaussian_guides import chain, collider, four_cycle, set_exact_
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from strategies import examples, model_graphs

from pyro_graphflows import (
    InferenceCompilation,
    ModelGraph,
    auto_faithful_guide,
    check_guide,
    is_imap,
    load_guide,
    log_evidence,
)
from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs import InverseGraph, faithful_inverse
from pyro_graphflows.guides.orders import optional_sites_first

N = dist.Normal
X = torch.randn(20, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def labels(x, y=None):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", N(0.0, 1.0))
        y = pyro.sample("y", dist.Bernoulli(0.5), obs=y)
        pyro.sample("x", N(z + 2 * y, 0.5), obs=x)


Y = (X > 1).double()


@everywhere
@pytest.mark.parametrize("first", [(X,), (X, Y)], ids=["set up without labels", "set up with labels"])
def test_labelled_and_unlabelled_calls(first, options):
    guide = auto_faithful_guide(labels, *first, optional=["y"], num_start_samples=200, **options)
    assert guide.inverse.parents == {"y": ("x",), "z": ("y", "x")}
    assert "data where a call has some" in guide.describe()
    for _ in range(2):  # the second time the call is known
        assert list(guide(X)) == ["z", "y"]
        assert list(guide(X, Y)) == ["z"]
        assert list(guide(X[:3], y=Y[:3])) == ["z"]
        assert guide(X[:3])["y"].shape == (3,)
    far = guide.median(X, 1 - Y)["z"] - guide.median(X, Y)["z"]
    assert ((far * (2 * Y - 1)) > 0).all()  # z makes up for the label


def test_the_plan_does_not_depend_on_the_call_at_set_up():
    plans = [
        auto_faithful_guide(labels, *args, optional=["y"], num_start_samples=200).plan
        for args in ((X,), (X, Y))
    ]
    assert plans[0] == plans[1]


def test_known_calls_do_not_run_the_model():
    runs = []

    def counted(x, y=None):
        runs.append(1)
        labels(x, y)

    guide = auto_faithful_guide(counted, X, optional=["y"], num_start_samples=200)
    for args in ((X,), (X, Y)):
        guide(*args)
        runs.clear()
        flipped = [1 - value for value in args]
        guide(*flipped)
        assert not runs
    torch.testing.assert_close(guide._reader.read(counted, (X, 1 - Y), {}).given["y"], 1 - Y)


# ---------------------------------------------------------------- exact: linear-Gaussian networks


def gaussian_model(network):
    """A network as a model in a plate: the call says which nodes have data."""

    def model(num, **data):
        values = {}
        with pyro.plate("data", num):
            for name in network.names:
                loc = network.intercepts[name] + sum(
                    weight * values[parent]
                    for parent, weight in zip(network.parents[name], network.coefficients[name], strict=True)
                )
                values[name] = pyro.sample(name, N(loc, network.scales[name]), obs=data.get(name))

    return model


def log_marginal(network, values):
    """Return the log-density of the values of some nodes."""
    mean, covariance = network.mean_and_covariance()
    index = [list(network.names).index(name) for name in values]
    joint = dist.MultivariateNormal(
        torch.as_tensor(mean[index]), torch.as_tensor(covariance[np.ix_(index, index)])
    )
    return joint.log_prob(torch.stack(list(values.values()), -1))


def log_weights(model, guide, *args, **kwargs):
    """Return log p - log q of one draw for each datum."""
    drawn = poutine.trace(guide).get_trace(*args, **kwargs)
    trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    for each in (trace, drawn):
        each.compute_log_prob()

    def total(one):
        return sum(site["log_prob"] for site in one.nodes.values() if site["type"] == "sample")

    return total(trace) - total(drawn)


@pytest.mark.parametrize(
    ("make", "optional"),
    [
        (chain, ["b"]),
        (chain, ["c", "a"]),
        (chain, ["a", "b", "c"]),
        (collider, ["b"]),
        (four_cycle, ["a", "c"]),
    ],
)
def test_exact_for_every_pattern_of_a_linear_gaussian_network(make, optional):
    network = make()
    model = gaussian_model(network)
    latent = [name for name in network.names if name in "abcd"]
    data = {name: torch.randn(5) for name in network.names}
    always = {name: value for name, value in data.items() if name not in latent}
    guide = auto_faithful_guide(model, 5, example_kwargs=always, optional=optional, num_start_samples=100)
    assert guide.inverse.sampling_order[: len(optional)] == tuple(optional)
    set_exact_(guide, network)
    served = 0
    for number in range(len(optional) + 1):
        for given_sites in itertools.combinations(optional, number):
            call = {**always, **{name: data[name] for name in given_sites}}
            if guide.plan.missing_with(given_sites):
                with pytest.raises(UnsupportedModelError, match="Expected data for"):
                    guide(5, **call)
                continue
            served += 1
            weights = log_weights(model, guide, 5, **call)  # each is the evidence
            torch.testing.assert_close(weights, log_marginal(network, call), rtol=1e-6, atol=1e-6)
            assert set(guide(5, **call)) == set(latent) - set(given_sites)
    assert served >= len(optional) + 1  # none, the first, the first two ...


def test_starts_near_the_exact_posterior_in_both_patterns():
    """The regression start misses by (number of weights) / (2 number of samples) nats on average."""
    network = chain()
    model = gaussian_model(network)
    data = {name: torch.randn(200) for name in "bx"}
    guide = auto_faithful_guide(
        model, 200, example_kwargs=data, optional=["b"], num_start_samples=20_000, standardize=True
    )
    for call in ({"x": data["x"]}, data):
        # the data are other than those of the model: errors of the weights count for more
        with torch.no_grad():
            gap = (log_marginal(network, call) - log_weights(model, guide, 200, **call)).mean()
        assert abs(float(gap)) < 0.05


# ---------------------------------------------------------------- exact: discrete

TABLE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.double)


def discrete(num, x=None, y=None):
    with pyro.plate("data", num):
        a = pyro.sample("a", dist.Bernoulli(0.4))
        y = pyro.sample("y", dist.Categorical(TABLE[a.long()]), obs=y)
        b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.1, 0.5, 0.8])[y.long()]))
        pyro.sample("x", dist.Bernoulli(0.2 + 0.3 * a + 0.4 * b), obs=x)


@pytest.mark.parametrize("enumerate_sites", [False, True])
def test_exact_for_a_discrete_model(enumerate_sites):
    x, y = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 1, 2, 2, 0])
    guide = auto_faithful_guide(
        discrete, 5, x, optional=["y"], num_start_samples=100, enumerate_sites=enumerate_sites
    )
    set_tables_(guide, discrete)
    values, log_joint = assignments(discrete)
    for args in ((5, x), (5, x, y)):
        same = values["x"] == x.unsqueeze(-1)
        if len(args) == 3:
            same = same & (values["y"] == y.unsqueeze(-1))
        exact = torch.where(same, log_joint, -math.inf).logsumexp(-1)
        if enumerate_sites:
            loss = TraceEnum_ELBO(max_plate_nesting=1).loss(discrete, guide, *args)
            assert loss == pytest.approx(-float(exact.sum()), abs=1e-6)
        else:
            torch.testing.assert_close(log_weights(discrete, guide, *args), exact, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- several sites


def two(x, y1=None, y2=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(0.0, 1.0))
        y1 = pyro.sample("y1", dist.Bernoulli(logits=z), obs=y1)
        y2 = pyro.sample("y2", N(y1 + z, 1.0), obs=y2)
        pyro.sample("x", N(z + y1 - y2, 0.5), obs=x)


def test_a_pattern_that_is_not_served_is_refused_by_name():
    one = torch.ones(20)
    guide = auto_faithful_guide(two, X, optional=["y2", "y1"], num_start_samples=100)
    assert guide.inverse.sampling_order == ("y2", "y1", "z")
    assert set(guide(X)) == {"y1", "y2", "z"}
    assert set(guide(X, y2=one)) == {"y1", "z"}
    assert set(guide(X, one, one)) == {"z"}
    message = r"data for 'y2' too where there are some for 'y1'.*optional=\['y1', 'y2'\]"
    with pytest.raises(UnsupportedModelError, match=message):
        guide(X, one)
    other = auto_faithful_guide(two, X, optional=["y1", "y2"], num_start_samples=100)
    assert set(other(X, one)) == {"y2", "z"}


def test_independent_sites_are_served_in_every_pattern():
    def model(x, v, y1=None, y2=None):
        with pyro.plate("data", len(x)):
            y1 = pyro.sample("y1", N(0.0, 1.0), obs=y1)
            y2 = pyro.sample("y2", N(0.0, 1.0), obs=y2)
            pyro.sample("x", N(y1, 1.0), obs=x)
            pyro.sample("v", N(y2, 1.0), obs=v)

    guide = auto_faithful_guide(model, X, X, optional=["y1", "y2"], num_start_samples=100)
    assert set(guide(X, X, X)) == {"y2"}
    assert set(guide(X, X, None, X)) == {"y1"}
    assert guide(X, X, X, X) == {}


@examples(60)
@given(model_graphs(max_nodes=6))
def test_the_order_is_faithful_with_and_without_data(graph):
    optional = graph.latent[::2]
    inverse = optional_sites_first(graph, "auto", optional, [])
    assert is_imap(inverse)
    assert inverse.sampling_order[: len(optional)] == tuple(optional)
    observed = graph.with_observed(optional)
    rest = [site for site in inverse.sampling_order if site not in optional]
    then = InverseGraph(observed, {site: inverse.parents[site] for site in rest}, sampling_order=rest)
    assert is_imap(then)
    assert then.parents == faithful_inverse(observed, rest[::-1]).parents


def test_with_observed_wants_latent_nodes():
    graph = ModelGraph(["yx", "zx"], ["x"])
    assert graph.with_observed(["y"]).observed == ("y", "x")
    with pytest.raises(GraphflowsError, match="Expected latent nodes, among y, z; got x"):
        graph.with_observed(["x"])


# ---------------------------------------------------------------- plates


def centres(x, y=None, scale=1.0):
    """Global centres, and a class for each datum."""
    with pyro.plate("classes", 2, dim=-1):
        mu = pyro.sample("mu", N(0.0, 3.0))
    with pyro.plate("data", len(x), dim=-1):
        y = pyro.sample("y", dist.Categorical(torch.ones(2)), obs=y)
        z = pyro.sample("z", N(mu[..., y.long()], scale))
        pyro.sample("x", N(z, 0.5), obs=x)


def test_sites_with_per_element_parameters_fit_whatever_is_observed():
    guide = auto_faithful_guide(centres, X, optional=["y"], num_start_samples=100)
    assert guide.inverse.sampling_order[0] == "mu"
    assert guide(X)["y"].shape == (20,)
    assert set(guide(X, Y.long())) == {"mu", "z"}


def continuous(x, y=None):
    mu = pyro.sample("mu", N(0.0, 1.0))
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", N(mu, 1.0), obs=y)
        pyro.sample("x", N(y, 1.0), obs=x)


@pytest.mark.parametrize("model", [centres, continuous])
def test_a_global_site_that_would_have_to_read_the_labels_is_refused(model):
    with pytest.raises(
        UnsupportedModelError, match=r"with data for y .* would not have: mu of y.* pool=None"
    ):
        auto_faithful_guide(model, X, optional=["y"], pool="deepset", num_start_samples=100)
    guide = auto_faithful_guide(model, X, optional=["y"], num_start_samples=100)
    assert "mu" in guide(X, Y.long() if model is centres else Y)


def test_an_inverse_that_samples_optional_sites_late_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"of order 'custom', would not have: z of y"):
        auto_faithful_guide(labels, X, optional=["y"], inverse=["y", "z"], num_start_samples=100)
    guide = auto_faithful_guide(labels, X, optional=["y"], inverse=["z", "y"], num_start_samples=100)
    assert list(guide(X, Y)) == ["z"]
    for inverse in ("reverse", "mean_field"):  # what the second never has is not asked for
        guide = auto_faithful_guide(labels, X, optional=["y"], inverse=inverse, num_start_samples=100)
        assert list(guide(X, Y)) == ["z"]


def test_batches_of_a_subsampled_plate():
    """Labels and data of the same rows: z is where data and label put it, exactly."""

    def model(x, y=None):
        with pyro.plate("d", len(x), subsample_size=6) as rows:
            z = pyro.sample("z", N(0.0, 1.0))
            label = pyro.sample("y", dist.Bernoulli(0.5), obs=None if y is None else y[rows])
            pyro.sample("x", N(z + 2 * label, 0.5), obs=x[rows])

    guide = auto_faithful_guide(model, X, optional=["y"], num_start_samples=200)
    guide.set_linear_("z", {"x": 0.8, "y": -1.6}, 0.0, math.sqrt(0.2))
    for args in ((X,), (X, Y)):
        trace = poutine.trace(guide).get_trace(*args)
        rows = trace.nodes["d"]["value"]
        label = Y[rows] if len(args) == 2 else trace.nodes["y"]["value"]
        torch.testing.assert_close(trace.nodes["z"]["fn"].mean, 0.8 * (X[rows] - 2 * label))
        assert ("y" in trace) == (len(args) == 1)
    theirs = poutine.trace(poutine.replay(model, trace=trace)).get_trace(X, Y)
    exact = N(2 * Y, math.sqrt(1.25)).log_prob(X) + math.log(0.5)
    expected = 20 / 6 * exact[rows].sum()
    torch.testing.assert_close(theirs.log_prob_sum() - trace.log_prob_sum(), expected)
    assert math.isfinite(Trace_ELBO().loss(model, guide, X))


def test_vectorised_particles_and_predictions():
    guide = auto_faithful_guide(labels, X, optional=["y"], num_start_samples=200)
    for args in ((X,), (X, Y)):
        loss = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1)
        assert math.isfinite(loss.loss(labels, guide, *args))
        assert check_guide(labels, guide, Trace_ELBO(), *args).safe
        evidence = log_evidence(labels, guide, *args, num_particles=2000)
        centres = 2 * torch.tensor([[0.0], [1.0]])
        of_label = N(centres, math.sqrt(1.25)).log_prob(X) + math.log(0.5)
        exact = of_label.logsumexp(0) if len(args) == 1 else torch.where(Y == 1, of_label[1], of_label[0])
        errors = (evidence.log_evidence - exact) / evidence.standard_error.clamp(min=1e-3)
        assert errors.abs().max() < 5
        draws = Predictive(guide, num_samples=5)(*args)
        assert draws["z"].shape == (5, 20)
        assert ("y" in draws) == (len(args) == 1)


# ---------------------------------------------------------------- training


def test_one_guide_is_trained_on_batches_of_both_kinds():
    guide = auto_faithful_guide(labels, X, optional=["y"], num_start_samples=200, init="random")
    svi = SVI(labels, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    before = [svi.evaluate_loss(X), svi.evaluate_loss(X, Y)]
    for _ in range(100):
        svi.step(X)
        svi.step(X, Y)
    assert svi.evaluate_loss(X) < before[0]
    assert svi.evaluate_loss(X, Y) < before[1]


def test_inference_compilation_trains_both_patterns():
    guide = auto_faithful_guide(labels, X, optional=["y"], num_start_samples=200, init="random")
    for args in ((X,), (X, Y)):
        compilation = InferenceCompilation(labels, guide, pyro.optim.Adam({"lr": 1e-2}))
        losses = [compilation.step(*args) for _ in range(60)]
        assert sum(losses[-10:]) < sum(losses[:10])


def test_observations_and_log_prob():
    guide = auto_faithful_guide(labels, X, optional=["y"], num_start_samples=200)
    assert list(guide(X, observations={"y": Y})) == ["z"]
    assert list(guide.given(y=Y)(X)) == ["z"]
    latents = {"z": torch.zeros(20)}
    expected = guide.log_prob(latents, X, Y)
    torch.testing.assert_close(guide.log_prob(latents, X, observations={"y": Y}), expected)
    joint = guide.log_prob({**latents, "y": Y}, X)
    torch.testing.assert_close(guide.log_prob({**latents, "y": Y}, X, Y), expected)
    assert (joint < expected).all()  # less the log-probability of the label
    with pytest.raises(GraphflowsError, match="missing: y"):
        guide.log_prob(latents, X)
    assert set(guide.quantiles([0.5], X, Y)) == {"z"}


def test_a_loaded_guide_serves_both(tmp_path):
    guide = auto_faithful_guide(labels, X, optional=["y"], num_start_samples=200)
    guide.save(tmp_path / "guide.safetensors")
    loaded = load_guide(tmp_path / "guide.safetensors", labels)
    torch.testing.assert_close(loaded.median(X, Y), guide.median(X, Y))
    assert list(loaded(X)) == ["z", "y"]


def test_missing_entries_within_an_optional_site():
    """obs_mask says which entries are missing; optional says in which calls there are none."""

    def model(x, there, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", N(0.0, 1.0))
            y = pyro.sample("y", N(z, 1.0), obs=y)
            pyro.sample("x", N(z + y, 0.5), obs=x, obs_mask=there)

    guide = auto_faithful_guide(model, X, X > 0, optional=["y"], num_start_samples=200)
    assert set(guide(X, X > 0)) == {"z", "y", "x_unobserved"}
    assert set(guide(X, X > 0, X)) == {"z", "x_unobserved"}


# ---------------------------------------------------------------- refusals


def test_what_is_refused():
    with pytest.raises(GraphflowsError, match=r"optional=\[names of sites\]; got 'y'"):
        auto_faithful_guide(labels, X, optional="y")
    with pytest.raises(GraphflowsError, match="no such site as 'w' in this call, whose sites are z, y, x"):
        auto_faithful_guide(labels, X, optional=["w"])
    with pytest.raises(GraphflowsError, match="or 'site' with optional="):
        auto_faithful_guide(labels, X, optional=["y"], resolution="element")

    def summed(x, y=None):
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", N(0.0, 1.0))
            y = pyro.sample("y", dist.Bernoulli(0.5), obs=y, infer={"enumerate": "parallel"})
            pyro.sample("x", N(z + 2 * y, 0.5), obs=x)

    with pytest.raises(GraphflowsError, match=r"'y' is summed over by the model. .* enumerate_sites=\['y'\]"):
        auto_faithful_guide(summed, X, optional=["y"])
    guide = auto_faithful_guide(labels, X, optional=["y"], num_start_samples=200)
    for wrong in (Y + 0.5, 2 * Y):
        with pytest.raises(GraphflowsError, match="Expected data of 'y' in its support"):
            guide(X, wrong)
    plain = auto_faithful_guide(labels, X, num_start_samples=200)
    with pytest.raises(UnsupportedModelError, match=r"calls with and without them, optional=\['y'\]"):
        plain(X, Y)
