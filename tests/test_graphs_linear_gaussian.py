import copy
import math
import pickle

import hypothesis.strategies as st
import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from hypothesis import given, settings
from scipy.stats import multivariate_normal

from pyro_graphflows.errors import GraphflowsError, NotADAGError
from pyro_graphflows.graphs.inversion import faithful_inverse
from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork, half_log_det, regress, triangle
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph


def chain(scale=1.0):
    return LinearGaussianNetwork(
        {"a": [], "b": ["a"], "c": ["a", "b"]},
        {"b": {"a": 2.0}, "c": [0.5, -1.0]},
        {"a": 1.0, "c": 3.0},
        {"a": scale, "b": 0.5, "c": 2.0},
    )


@st.composite
def networks(draw, max_nodes=7):
    size = draw(st.integers(1, max_nodes))
    edges = [(i, j) for j in range(size) for i in range(j) if draw(st.booleans())]
    observed = [i for i in range(size) if draw(st.booleans())]
    graph = ModelGraph([(str(i), str(j)) for i, j in edges], map(str, observed), nodes=map(str, range(size)))
    return LinearGaussianNetwork.random(graph, seed=draw(st.integers(0, 2**32 - 1)))


def block(matrix, rows, columns):
    return matrix[np.ix_(rows, columns)]


def textbook_conditional(net, names, given):
    """Coefficients, intercepts and covariance by the formula for normal vectors."""
    mean, covariance = net.mean_and_covariance()
    i, j = [net.names.index(n) for n in names], [net.names.index(n) for n in given]
    coefficients = np.linalg.solve(block(covariance, j, j), block(covariance, j, i)).T
    return (
        coefficients,
        mean[i] - coefficients @ mean[j],
        block(covariance, i, i) - coefficients @ block(covariance, j, i),
    )


# --- construction -------------------------------------------------------------


def test_order_roles_and_views():
    net = LinearGaussianNetwork(
        {"y": ["x"], "w": [], "x": ["w"]}, {"y": [1], "x": [1]}, {}, {"y": 1, "w": 1, "x": 1}
    )
    assert net.names == ("w", "x", "y")
    assert net.observed == ("y",)
    assert net.latent == ("w", "x")
    other = net.with_observed(["y", "w"])
    assert other.observed == ("w", "y")
    assert net.observed == ("y",)
    assert other.with_observed("leaves") == net != other
    assert net.graph() == ModelGraph([("w", "x"), ("x", "y")], ["y"])
    assert net.graph().nodes == net.names
    assert net.graph(["x"]).observed == ("x",)
    assert net.graph("leaves") == other.graph("leaves")
    with pytest.raises(TypeError):
        net.parents["w"] = ("x",)
    assert repr(net) == "LinearGaussianNetwork(2 latent, 1 observed, 2 edges)"


def test_equality_hash_and_copies():
    net = chain()
    for other in (chain(), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other == net
        assert hash(other) == hash(net)
    assert chain(2.0) != net
    assert net != "net"


def test_coefficients_by_name_or_in_order():
    by_name = LinearGaussianNetwork(
        {"a": [], "b": [], "c": ["b", "a"]}, {"c": {"a": 1, "b": 2}}, {}, {"a": 1, "b": 1, "c": 1}
    )
    in_order = LinearGaussianNetwork(
        {"a": [], "b": [], "c": ["b", "a"]}, {"c": [2, 1]}, {}, {"a": 1, "b": 1, "c": 1}
    )
    assert by_name == in_order
    assert by_name.coefficients["c"] == (2.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": ["z"]}, {"a": [1]}, {}, {"a": 1}), "parents of a; got unknown z"),
        (({"a": []}, {"z": []}, {}, {"a": 1}), "coefficients; got unknown z"),
        (({"a": []}, {}, {"z": 1}, {"a": 1}), "intercepts; got unknown z"),
        (({"a": []}, {}, {}, {"a": 1, "z": 1}), "scales; got unknown z"),
        (({"a": [], "b": []}, {}, {}, {}), "none for a, b"),
        (({"a": [], "b": ["a", "a"]}, {"b": [1, 1]}, {}, {"a": 1, "b": 1}), "each parent of b once"),
        (({"a": [], "b": ["a"]}, {}, {}, {"a": 1, "b": 1}), r"Expected 1 coefficients for b.*\(a\); got 0"),
        (({"a": [], "b": ["a"]}, {"b": {"b": 1}}, {}, {"a": 1, "b": 1}), r"of b for its parents \(a\)"),
        (({"a": []}, {}, {"a": math.nan}, {"a": 1}), "finite intercept for a"),
        (({"a": []}, {}, {}, {"a": math.inf}), "finite scale for a"),
        (({"a": [], "b": ["a"]}, {"b": [math.inf]}, {}, {"a": 1, "b": 1}), "finite coefficient for b"),
        (({"a": []}, {}, {}, {"a": 0.0}), "positive scale for a"),
    ],
)
def test_wrong_parameters(arguments, message):
    with pytest.raises(GraphflowsError, match=message):
        LinearGaussianNetwork(*arguments)


def test_cycle_and_wrong_observed():
    with pytest.raises(NotADAGError, match=r"a -> b -> a|b -> a -> b"):
        LinearGaussianNetwork({"a": ["b"], "b": ["a"]}, {"a": [1], "b": [1]}, {}, {"a": 1, "b": 1})
    for make in (chain().with_observed, chain().graph):
        with pytest.raises(GraphflowsError, match="observed; got unknown z"):
            make(["z"])
        with pytest.raises(GraphflowsError, match="\"leaves\" or a collection of names; got 'abc'"):
            make("abc")


# --- exact answers ------------------------------------------------------------


def test_moments_by_hand():
    mean, covariance = chain().mean_and_covariance()
    # b = 2 a + .5 e_b, c = 3 + .5 a - b + 2 e_c = 3 - 1.5 a - .5 e_b + 2 e_c
    np.testing.assert_allclose(mean, [1.0, 2.0, 1.5])
    np.testing.assert_allclose(covariance, [[1, 2, -1.5], [2, 4.25, -3.25], [-1.5, -3.25, 6.5]])


@given(networks())
@settings(max_examples=60, deadline=None)
def test_conditional_posterior_evidence_entropy(net):
    mean, covariance = net.mean_and_covariance()
    x = net.sample(5, seed=1, names=net.observed)
    coefficients, intercepts, remaining = textbook_conditional(net, net.latent, net.observed)
    location, posterior = net.posterior(x)
    assert location.shape == (5, len(net.latent))
    np.testing.assert_allclose(location, intercepts + x @ coefficients.T, atol=1e-9)
    np.testing.assert_allclose(posterior, remaining, atol=1e-9)
    for i, name in enumerate(net.latent):
        row, intercept, scale = net.conditional(name, net.observed)
        np.testing.assert_allclose(row, coefficients[i], atol=1e-9)
        np.testing.assert_allclose((intercept, scale**2), (intercepts[i], remaining[i, i]), atol=1e-9)
    assert net.log_evidence(x).shape == (5,)
    if net.observed:
        rows = [net.names.index(name) for name in net.observed]
        marginal = multivariate_normal(mean[rows], block(covariance, rows, rows))
        np.testing.assert_allclose(net.log_evidence(x), np.reshape(marginal.logpdf(x), 5), atol=1e-9)
        np.testing.assert_allclose(net.entropy(), marginal.entropy(), atol=1e-9)
    else:
        assert net.entropy() == 0.0
        assert not net.log_evidence(x).any()
    scales = np.array(list(net.scales.values()))
    np.testing.assert_allclose(
        net.entropy(net.names), np.log(scales).sum() + len(scales) * 1.4189385332046727
    )


def test_conditional_on_the_parents_is_the_definition():
    coefficients, intercept, scale = chain().conditional("c", ["a", "b"])
    np.testing.assert_allclose([*coefficients, intercept, scale], [0.5, -1.0, 3.0, 2.0])
    coefficients, intercept, scale = chain().conditional("c", [])
    assert coefficients.shape == (0,)
    np.testing.assert_allclose([intercept, scale**2], [1.5, 6.5])


@pytest.mark.parametrize("given", [["a", "c"], ["c"]])
def test_conditional_of_a_node_on_itself(given):
    with pytest.raises(GraphflowsError, match="other than c to condition it on; got itself"):
        chain().conditional("c", given)


def test_wrong_names_and_shapes():
    net = chain()
    with pytest.raises(GraphflowsError, match="got unknown z"):
        net.conditional("z", ["a"])
    with pytest.raises(GraphflowsError, match="got unknown z"):
        net.conditional("a", ["z"])
    with pytest.raises(GraphflowsError, match="each name once in the nodes that a is conditioned on; got b"):
        net.conditional("a", ["b", "b"])
    with pytest.raises(GraphflowsError, match="got unknown z"):
        net.entropy(["z"])
    with pytest.raises(GraphflowsError, match="each name once in the entropy; got b"):
        net.entropy(["b", "b"])
    with pytest.raises(GraphflowsError, match="got unknown z"):
        net.sample(3, 0, ["z"])
    for method in (net.posterior, net.log_evidence):
        with pytest.raises(GraphflowsError, match=r"shape \(n, 1\), one column for each of c; got \(3,\)"):
            method([1.0, 2.0, 3.0])


def test_samples_have_the_moments():
    net, n = chain(), 100_000
    samples = net.sample(n, seed=3)
    mean, covariance = net.mean_and_covariance()
    # Each bound is 5 standard errors: a failure means wrong moments, or one seed in a million.
    error = np.sqrt(np.diag(covariance) / n)
    assert (np.abs(samples.mean(0) - mean) < 5 * error).all()
    spread = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / n)
    assert (np.abs(np.cov(samples.T) - covariance) < 5 * spread).all()
    np.testing.assert_array_equal(samples, net.sample(n, seed=3))
    np.testing.assert_array_equal(samples[:, [2, 0]], net.sample(n, seed=3, names=["c", "a"]))
    assert not np.array_equal(net.sample(2), net.sample(2))


# --- the gap of a factorisation -----------------------------------------------


def gap_by_entropies(net, inverse):
    """The gap as a difference of expected log densities, from entropies of sets only."""
    known, total = list(inverse.graph.inputs) + list(inverse.graph.observed), 0.0
    for node in inverse.sampling_order:
        above = list(inverse.parents[node])
        total += net.entropy([*above, node]) - net.entropy(above)
        total -= net.entropy([*known, node]) - net.entropy(known)
        known.append(node)
    return total


@given(networks(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_gap_against_entropies(net, random):
    graph, parents, before = net.graph(), {}, list(net.observed)
    for node in random.sample(net.latent, len(net.latent)):
        parents[node] = [name for name in before if random.random() < 0.5]
        before.append(node)
    order = before[len(net.observed) :]
    inverse = InverseGraph(graph, parents, sampling_order=order)
    gap = net.factorization_gap(inverse)
    assert gap >= 0
    np.testing.assert_allclose(gap, gap_by_entropies(net, inverse), atol=1e-9)
    assert list(net.factorization_gap_terms(inverse)) == order
    parents = {node: [*net.observed, *order[:i]] for i, node in enumerate(order)}
    assert net.factorization_gap(InverseGraph(graph, parents)) < 1e-12


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_faithful_inverses_have_no_gap(data):
    """With inputs, marginalised and barren nodes, in every order."""
    size = data.draw(st.integers(1, 7))
    edges = [(i, j) for j in range(size) for i in range(j) if data.draw(st.booleans())]
    roots = {i for i in range(size) if not any(j == i for _, j in edges)}
    roles = {
        i: data.draw(st.sampled_from(["latent", "observed", "marginalised", *(["input"] * (i in roots))]))
        for i in range(size)
    }
    of = {role: [i for i in roles if roles[i] == role] for role in ("observed", "input", "marginalised")}
    graph = ModelGraph(
        edges,
        of["observed"],
        inputs=of["input"],
        marginalised=of["marginalised"],
        nodes=roles,
    )
    net = LinearGaussianNetwork.random(graph, seed=size)
    for order in ("forward", "reverse", "min_fill", "auto"):
        assert net.factorization_gap(faithful_inverse(graph, order)) < 1e-9


def test_gap_of_a_forgotten_covariate():
    """z ~ N(w, 1), y ~ N(z, 1), q(z | y) instead of q(z | y, w): 0.144 nats."""
    net = LinearGaussianNetwork(
        {"w": [], "z": ["w"], "y": ["z"]}, {"z": [1], "y": [1]}, {}, {"w": 1, "z": 1, "y": 1}
    )
    graph = ModelGraph([("w", "z"), ("z", "y")], observed=["y"], inputs=["w"])
    assert net.factorization_gap(InverseGraph(graph, {"z": ["w", "y"]})) == 0
    forgetful = net.factorization_gap(InverseGraph(graph, {"z": ["y"]}))
    # Var(z | y) = 2/3 and Var(z | w, y) = 1/2
    assert forgetful == pytest.approx(0.5 * math.log(4 / 3), abs=1e-12)


def test_gap_of_a_marginalised_node():
    """A node without a factor is integrated out: the copies it couples must see each other."""
    edges = [("m", "a"), ("m", "b"), ("a", "x"), ("b", "y")]
    graph = ModelGraph(edges, observed=["x", "y"], marginalised=["m"])
    net = LinearGaussianNetwork.random(graph, seed=2)
    assert net.factorization_gap(InverseGraph(graph, {"a": ["x", "b"], "b": ["x", "y"]})) < 1e-12
    assert net.factorization_gap(InverseGraph(graph, {"a": ["x"], "b": ["y"]})) > 1e-3


def test_gap_survives_bad_scales():
    """Units that differ by 10⁸ leave the gap of a complete inverse at zero and others unchanged."""
    units = dict(zip("abcd", [1e-4, 1e4, 1.0, 1e-3], strict=True))
    parents = {"a": [], "b": ["a"], "c": ["a", "b"], "d": ["b", "c"]}
    plain = {"b": [0.7], "c": [1.2, -0.4], "d": [0.9, 0.3]}
    ratios = {name: [units[name] / units[parent] for parent in parents[name]] for name in plain}
    scaled = {name: list(np.multiply(plain[name], ratios[name])) for name in plain}
    net = LinearGaussianNetwork(parents, plain, {}, dict.fromkeys("abcd", 1.0))
    bad = LinearGaussianNetwork(parents, scaled, {}, units)
    complete = InverseGraph(net.graph(), {"a": ["b", "c", "d"], "b": ["c", "d"], "c": ["d"]})
    sparse = InverseGraph(net.graph(), {"a": ["b"], "b": ["c"], "c": ["d"]})
    assert bad.factorization_gap(complete) < 1e-13
    assert bad.factorization_gap(sparse) == pytest.approx(net.factorization_gap(sparse), rel=1e-12)


def test_gap_of_unknown_nodes():
    inverse = InverseGraph(ModelGraph([("z", "c")], ["c"]), {"z": ["c"]})
    with pytest.raises(GraphflowsError, match="the inverse; got unknown z"):
        chain().factorization_gap(inverse)
    with pytest.raises(GraphflowsError, match="the inverse; got unknown z"):
        chain().factorization_gap_terms(inverse)


# --- random parameters --------------------------------------------------------


def test_random_network():
    graph = ModelGraph([("z", "x"), ("w", "x")], ["x"], inputs=["w"])
    net = LinearGaussianNetwork.random(graph, seed=0)
    assert net.observed == ("w", "x")
    assert net == LinearGaussianNetwork.random(graph, seed=0)
    assert net != LinearGaussianNetwork.random(graph, seed=1)
    assert all(0.5 <= abs(value) <= 1.5 for row in net.coefficients.values() for value in row)


# --- the Pyro model -----------------------------------------------------------


def test_pyro_model_log_joint():
    net = chain().with_observed(["c", "a"])
    model = net.pyro_model()
    values = net.sample(4, seed=0)
    x = torch.tensor(net.sample(4, seed=0, names=net.observed))
    latent = {"b": torch.tensor(values[:, 1])}
    trace = poutine.trace(poutine.condition(model, latent)).get_trace(x)
    assert [name for name in trace.nodes if name in net.names] == list(net.names)
    assert [name for name in net.names if trace.nodes[name]["is_observed"]] == ["a", "b", "c"]
    (frame,) = trace.nodes["b"]["cond_indep_stack"]
    assert (frame.name, frame.dim, frame.size) == ("data", -1, 4)
    trace.compute_log_prob()
    joint = sum(trace.nodes[name]["log_prob"] for name in net.names)
    np.testing.assert_allclose(joint, net.with_observed(net.names).log_evidence(values))


def test_pyro_model_samples():
    values = chain().pyro_model()(num_samples=7)
    assert {name: value.shape for name, value in values.items()} == dict.fromkeys("abc", (7,))
    assert chain().pyro_model()()["a"].shape == (1,)


def test_pyro_model_in_an_outer_plate():
    x = torch.zeros(3, 1)
    with pyro.plate("particles", 5, dim=-2):
        values = chain().pyro_model()(x)
    assert values["b"].shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pyro_model_follows_the_data(dtype):
    trace = poutine.trace(chain().pyro_model()).get_trace(torch.zeros(2, 1, dtype=dtype))
    for name in "abc":
        assert trace.nodes[name]["value"].dtype == dtype
        assert trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]).dtype == dtype


def test_pyro_model_takes_only_data_of_its_shape():
    with pytest.raises(GraphflowsError, match=r"shape \(n, 1\), one column for each of c; got \(3, 2\)"):
        chain().pyro_model()(torch.zeros(3, 2))


def test_pyro_model_copies_and_pickles():
    model = chain().pyro_model()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        pyro.set_rng_seed(1)
        expected = model(num_samples=3)
        pyro.set_rng_seed(1)
        assert torch.equal(other(num_samples=3)["c"], expected["c"])


def test_exact_posterior_as_guide_has_no_variance():
    """With the exact posterior as guide every particle's weight is p(x)."""
    net = chain()
    x = net.sample(6, seed=5, names=net.observed)
    mean, covariance = map(torch.tensor, net.posterior(x))

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(mean[:, 0], covariance[0, 0].sqrt()))
            slope = covariance[0, 1] / covariance[0, 0]
            left = covariance[1, 1] - slope * covariance[0, 1]
            pyro.sample("b", dist.Normal(mean[:, 1] + slope * (a - mean[:, 0]), left.sqrt()))

    data = torch.tensor(x)
    for _ in range(3):
        elbo = -pyro.infer.Trace_ELBO().loss(net.pyro_model(), guide, data)
        assert elbo == pytest.approx(net.log_evidence(x).sum(), abs=1e-10)


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_regression_and_determinant(num_targets, num_regressors, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_targets + num_regressors, 10)) * 10.0 ** rng.integers(-4, 4, (1, 1))
    targets, regressors = rows[:num_targets], rows[num_targets:]
    coefficients, residual = regress(targets, regressors)
    np.testing.assert_allclose(coefficients @ regressors + residual, targets, atol=1e-9 * abs(rows).max())
    np.testing.assert_allclose(residual @ regressors.T, 0, atol=1e-9 * np.square(rows).max())
    upper, lengths = triangle(targets)
    product = lengths[:, None] * (upper.T @ upper) * lengths
    np.testing.assert_allclose(product, targets @ targets.T, atol=1e-9 * np.square(rows).max())
    assert half_log_det(upper, lengths) == pytest.approx(
        0.5 * np.linalg.slogdet(targets @ targets.T)[1], abs=1e-8
    )
