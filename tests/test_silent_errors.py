"""Combinations of Pyro's guides and losses that give a wrong number without an error, and ours that do not.

In each test the first part shows the error where it is known to be (with the exact posterior inside the guide the right
answer is known), and the second part shows our guide, or our loss, with the right number. What only warns, warns here.
"""

import copy
import io
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian_guides import chain, conditional, four_cycle, set_exact_
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoStructured

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.graphs.structures import InverseGraph
from pyro_graphflows.guides import Normal, auto_faithful_guide, check_guide
from pyro_graphflows.infer import IWAE_ELBO, InferenceCompilation


def vectorized(loss, num_particles, nesting=1, **options):
    return loss(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=nesting, **options)


def mean_and_error(loss, *args, batches=10):
    values = torch.tensor([loss.loss(*args) for _ in range(batches)])
    return values.mean().item(), values.std().item() / math.sqrt(batches)


# ------------------------------------------------------------------------------------------------ analytic KL terms
def test_analytic_kl_against_the_guides_order():
    """The exact posterior, sampled against the model's order: the KL form of the ELBO is another number."""
    network = chain()
    x = torch.tensor(network.sample(3, 1)[:, [network.names.index("x")]])
    exact = -network.log_evidence(x.numpy()).sum()
    model = network.pyro_model()
    ours = set_exact_(auto_faithful_guide(model, x, inverse="forward", init="random"), network)
    assert [site for block in ours.plan.blocks for site in block.sites] == ["c", "b", "a"]

    def plain(x):
        """The same conditionals, each emitted as a normal distribution."""
        values = {"x": x[:, 0]}
        with pyro.plate("data", len(x)):
            for name in "cba":
                given = ours.inverse.parents[name]
                weights, intercept, scale = conditional(network, name, given)
                loc = intercept + sum(w * values[p] for w, p in zip(weights, given, strict=True))
                values[name] = pyro.sample(name, dist.Normal(loc, float(scale)))

    wrong, error = mean_and_error(vectorized(TraceMeanField_ELBO, 200), model, plain, x)
    assert abs(wrong - exact) > 20 * error
    assert Trace_ELBO().loss(model, plain, x) == pytest.approx(exact)
    right, error = mean_and_error(vectorized(TraceMeanField_ELBO, 200), model, ours, x)
    assert abs(right - exact) < 6 * error + 1e-9


def log_chain(x):
    """A chain whose logarithms are linear-Gaussian."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(a.log(), 1.0))
        pyro.sample("x", dist.Normal(b.log(), 1.0), obs=x)


def test_analytic_kl_between_equal_transforms():
    """Pushed-forward normals have a registered KL if the transforms are equal; the order matters there as well."""
    x = torch.randn(4)
    exact = -dist.Normal(0.0, math.sqrt(3.0)).log_prob(x).sum().item()

    def plain(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.LogNormal(2 / 3 * x, math.sqrt(2 / 3)))
            pyro.sample("a", dist.LogNormal(b.log() / 2, math.sqrt(0.5)))

    assert Trace_ELBO().loss(log_chain, plain, x) == pytest.approx(exact)
    wrong, error = mean_and_error(vectorized(TraceMeanField_ELBO, 200), log_chain, plain, x)
    assert abs(wrong - exact) > 20 * error
    ours = auto_faithful_guide(log_chain, x, inverse=["a", "b"], init="random")
    # its parents are values in the unconstrained space: logarithms here
    ours.set_linear_("b", {"x": 2 / 3}, 0.0, math.sqrt(2 / 3))
    ours.set_linear_("a", {"b": 0.5}, 0.0, math.sqrt(0.5))
    for _ in range(3):
        assert TraceMeanField_ELBO().loss(log_chain, ours, x) == pytest.approx(exact)


def positive(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


@pytest.mark.parametrize("make", [AutoNormal, AutoStructured])
def test_analytic_kl_of_deltas_loses_their_density(make):
    """Pyro's guides emit a Delta that carries the density; the KL of a Delta leaves it out."""
    x = torch.randn(6)
    exact = -dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum().item()
    theirs = pyros_exact_guide(make, x, positive)
    assert Trace_ELBO().loss(positive, theirs, x) == pytest.approx(exact)
    wrong, error = mean_and_error(TraceMeanField_ELBO(), positive, theirs, x, batches=100)
    assert abs(wrong - exact) > 4 * error
    ours = auto_faithful_guide(positive, x, init="random")
    ours.set_linear_("z", {"x": 0.5}, 0.0, math.sqrt(0.5))
    for _ in range(3):
        assert TraceMeanField_ELBO().loss(positive, ours, x) == pytest.approx(exact)


# ------------------------------------------------------------------------------------------------- sites and plates
def pair(x, size=None):
    with pyro.plate("data", size or len(x), subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def exact_guide(model, *args):
    guide = auto_faithful_guide(model, *args, init="random")
    guide.set_linear_("z", {"x": 0.5}, 0.0, math.sqrt(0.5))
    return guide


def pyros_exact_guide(make, x, model=pair):
    theirs = make(model)
    theirs(x)
    with torch.no_grad():
        if make is AutoDiagonalNormal:
            theirs.loc.copy_(x / 2)
            theirs.scale = torch.full((len(x),), math.sqrt(0.5))
        else:
            theirs.locs.z = x / 2
            theirs.scales.z = torch.full((len(x),), math.sqrt(0.5))
    return theirs


@pytest.mark.parametrize("make", [AutoDiagonalNormal, AutoStructured])
def test_auxiliary_sites_outside_the_plate(make):
    """RenyiELBO takes weights datum by datum; an auxiliary site for all data at once breaks them, far above log p."""
    x = torch.randn(6)
    exact = -dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum().item()
    theirs = pyros_exact_guide(make, x)
    assert Trace_ELBO().loss(pair, theirs, x) == pytest.approx(exact)
    assert vectorized(RenyiELBO, 3, alpha=0.0).loss(pair, theirs, x) < exact - 10  # a "bound" that much above
    ours = exact_guide(pair, x)
    assert vectorized(RenyiELBO, 3, alpha=0.0).loss(pair, ours, x) == pytest.approx(exact)


def test_scales_inside_the_logarithm():
    """RenyiELBO with a subsampled plate: more particles do not come to the evidence but go past it."""
    x = torch.randn(4)
    exact = -5 * dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum().item()

    def wide(x, size):
        with pyro.plate("data", size, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    many, _ = mean_and_error(vectorized(RenyiELBO, 200, alpha=0.0), pair, wide, x, 20)
    assert many < exact - 3
    ours = exact_guide(pair, x, 20)
    assert IWAE_ELBO(3).loss(pair, ours, x, 20) == pytest.approx(exact)
    assert IWAE_ELBO(200).loss(pair, wide, x, 20) > exact - 1.0
    assert not check_guide(pair, ours, RenyiELBO, x, 20).safe


def test_summaries_of_a_batch():
    """A guide of a global site that looks at the batch which the likelihood is scaled up from: above the evidence."""
    x = torch.randn(20)

    def model(x, size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def amortised(x, size=None):
        size = size or len(x)
        precision = 1.0 + size
        pyro.sample("mu", dist.Normal(size * x.mean() / precision, precision**-0.5))

    exact = -dist.MultivariateNormal(torch.zeros(20), 1.0 + torch.eye(20)).log_prob(x).item()
    assert Trace_ELBO().loss(model, amortised, x) == pytest.approx(exact)
    batches = torch.tensor([Trace_ELBO().loss(model, amortised, one, 20) for one in x.split(1)])
    assert batches.mean() < exact - 3.0  # without variance: each batch is fitted as if it were all data
    with pytest.raises(UnsupportedModelError, match="not a bound"):
        auto_faithful_guide(model, x[:1], 20, pool="deepset")
    ours = auto_faithful_guide(
        model, x[:1], 20, init="random"
    )  # per-element parameters, the same for all batches
    ours.set_linear_("mu", {}, x.sum().item() / 21, 21**-0.5)
    losses = torch.tensor(
        [[Trace_ELBO().loss(model, ours, one, 20) for one in x.split(1)] for _ in range(40)]
    )
    error = losses.mean(1).std().item() / math.sqrt(40)
    assert abs(losses.mean().item() - exact) < 5 * error


def test_masks_of_the_model():
    """AutoNormal does not repeat the model's mask: what is masked adds its entropy to the "bound"."""
    mask = torch.tensor([True, False, True, False, False, True])

    def masked(x):
        with poutine.mask(mask=mask):
            pair(x)

    x = torch.randn(6)
    exact = -dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)[mask].sum().item()
    theirs = pyros_exact_guide(AutoNormal, x)
    wrong, error = mean_and_error(Trace_ELBO(), masked, theirs, x, batches=40)
    assert wrong < exact - 1.0 - 5 * error
    assert "'z' have another mask" in str(check_guide(masked, theirs, Trace_ELBO, x))
    assert check_guide(pair, theirs, Trace_ELBO, x).safe
    ours = exact_guide(masked, x)
    assert check_guide(masked, ours, Trace_ELBO, x).safe
    for loss in (Trace_ELBO(), vectorized(RenyiELBO, 3, alpha=0.0)):
        assert loss.loss(masked, ours, x) == pytest.approx(exact)
    right, error = mean_and_error(vectorized(TraceMeanField_ELBO, 200), masked, ours, x)
    assert abs(right - exact) < 6 * error + 1e-9


def test_sizes_frozen_at_set_up():
    """AutoNormal keeps the first call's number of data; a batch of one is then broadcast to all."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(6)
    theirs = pyros_exact_guide(AutoNormal, x, model)
    one = x[:1] + 1
    exact = -dist.Normal(0.0, math.sqrt(2.0)).log_prob(one).sum().item()
    assert theirs(one)["z"].shape == (6,)
    assert abs(Trace_ELBO().loss(model, theirs, one) - exact) > 0.1
    ours = exact_guide(model, x)
    assert ours(one)["z"].shape == (1,)
    assert Trace_ELBO().loss(model, ours, one) == pytest.approx(exact)


def test_saving_a_guide_takes_its_model_away():
    x = torch.randn(6)
    theirs = pyros_exact_guide(AutoNormal, x)
    torch.save(theirs, io.BytesIO())
    assert theirs._model is None  # of the guide that is in use
    ours = exact_guide(pair, x)
    torch.save(ours, io.BytesIO())
    assert copy.deepcopy(ours).model is ours.model is pair


# -------------------------------------------------------------------------------------------------------- structure
def test_moral_edges_without_fill_in():
    """AutoStructured takes the moral edges in the model's order. A ring of latents needs one edge more."""
    network = four_cycle()
    model = network.pyro_model()
    x = torch.tensor(network.sample(4, 1)[:, [network.names.index(name) for name in network.observed]])
    theirs = AutoStructured(model, conditionals="normal", dependencies="linear")
    theirs(x)
    graph = network.graph()
    parents = {name: [*theirs.dependencies.get(name, {}), *graph.observed] for name in graph.latent}
    assert sum(len(p) for p in parents.values()) - 4 * len(graph.observed) == 4
    gap = network.factorization_gap(InverseGraph(graph, parents))
    assert gap > 0.02  # nats for each datum, at the best parameters
    ours = auto_faithful_guide(model, x, init="random")
    assert network.factorization_gap(ours.inverse) == pytest.approx(0.0, abs=1e-9)


def test_covariates_left_out():
    """q(z | y) without the covariate: 0.144 nats for each datum that no training recovers."""

    def model(w, y=None):
        with pyro.plate("data", len(w)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def loss(guide):
        # joint samples of w too: one datum, its covariate fresh in each sample
        w = torch.randn(40_000)
        return InferenceCompilation(model, guide, batch_size=1).loss(w) / len(w)

    w = torch.randn(20_000)
    # without the prior, which reads the covariate itself
    options = {"family": Normal(fusion=False), "num_start_samples": 40_000}
    blind = auto_faithful_guide(
        model, w, w, inverse=lambda graph: InverseGraph(graph, {"z": ["y"]}), **options
    )
    ours = auto_faithful_guide(model, w, w, **options)
    assert ours.inverse.parents == {"z": ("w", "y")}
    difference = loss(blind) - loss(ours)
    # Var(z | y) = 2 - 4/3 against Var(z | y, w) = 1/2: half the logarithm of their ratio
    assert difference == pytest.approx(0.5 * math.log(4 / 3), abs=0.02)


# -------------------------------------------------------------------------------------------------------- gradients
def structured(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def gradients(guide):
    return torch.cat([p.grad.flatten() for p in guide.parameters() if p.grad is not None])


def test_wake_sleep_detaches_too_late():
    """The gradient of log q at fixed values, by ReweightedWakeSleep and by hand, for the same draws."""
    x = torch.randn(3)
    guide = auto_faithful_guide(structured, x, family=Normal(hidden_dims=[]))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    loss = ReweightedWakeSleep(4, model_has_params=False, vectorize_particles=False, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    _, value = loss.loss_and_grads(structured, guide, x)
    found = gradients(guide)
    guide.zero_grad()
    pyro.set_rng_seed(1)
    log_w, log_q = [], []
    for _ in range(4):
        with torch.no_grad():
            drawn = poutine.trace(guide).get_trace(x)
            values = {name: drawn.nodes[name]["value"].detach() for name in "ab"}
            log_p = poutine.trace(poutine.condition(structured, values)).get_trace(x).log_prob_sum()
        log_q.append(guide.log_prob(values, x).sum())
        log_w.append(log_p - log_q[-1].detach())
    weights = torch.stack(log_w).softmax(0)
    by_hand = -(weights * torch.stack(log_q)).sum()
    assert by_hand.item() == pytest.approx(value)  # the same draws
    by_hand.backward()
    right = gradients(guide)
    assert (found - right).norm() > 0.1 * right.norm()
    assert not check_guide(structured, guide, loss, x).safe


SHARES = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.double)


def clusters(x):
    """A binary global, binary locals."""
    g = pyro.sample("g", dist.Bernoulli(0.4))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(SHARES[g.long(), 1]))
        pyro.sample("x", dist.Normal(2 * k + g, 1.0), obs=x)


def all_values(n):
    """Every assignment of g and of n locals."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n + 1)))


def exact_gradient(log_q, parameters, x):
    values = all_values(len(x))
    g, k = values[:, 0], values[:, 1:]
    log_p = dist.Bernoulli(0.4).log_prob(g)
    log_p = log_p + dist.Bernoulli(SHARES[g.long(), 1].unsqueeze(-1)).log_prob(k).sum(-1)
    log_p = log_p + dist.Normal(2 * k + g.unsqueeze(-1), 1.0).log_prob(x).sum(-1)
    logs = log_q(g, k)
    elbo = (logs.exp() * (log_p - logs)).sum()
    found = torch.autograd.grad(-elbo, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def sampled_gradient(loss, guide, parameters, x, batches=20):
    """Return the mean gradient of a loss of `clusters`, and its standard error."""
    found = []
    for _ in range(batches):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        loss.loss_and_grads(clusters, guide, x)
        found.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    found = torch.stack(found)
    return found.mean(0), found.std(0) / math.sqrt(batches)


def our_guide_of_clusters(x):
    """A guide away from the optimum, and its exact gradient."""
    guide = auto_faithful_guide(clusters, x, family=Normal(hidden_dims=[]))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    parameters = list(guide.parameters())

    def log_q(g, k):
        return guide.log_prob({"g": g.unsqueeze(-1), "k": k}, x)

    return guide, parameters, exact_gradient(log_q, parameters, x)


CLUSTERED = torch.tensor([-1.0, 0.5, 2.5], dtype=torch.double)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceGraph_ELBO])
def test_discrete_locals_before_globals(loss):
    """The influence of one local on the others through a later global is left out of the gradient."""
    x = CLUSTERED
    pyro.param("logits", torch.tensor([0.3, -0.4, 0.2]))
    pyro.param("slope", torch.tensor(4.0))
    logits, slope = (pyro.get_param_store()._params[name] for name in ("logits", "slope"))

    def locals_first(x):
        logits, slope = pyro.param("logits"), pyro.param("slope")
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(logits=logits))
        pyro.sample("g", dist.Bernoulli(logits=slope * (k.mean(-1, keepdim=True) - 0.5)))

    def log_q(g, k):
        own = dist.Bernoulli(logits=logits).log_prob(k).sum(-1)
        return own + dist.Bernoulli(logits=slope * (k.mean(-1) - 0.5)).log_prob(g)

    exact = exact_gradient(log_q, [logits, slope], x)
    found, error = sampled_gradient(vectorized(loss, 2000), locals_first, [logits, slope], x)
    assert ((found - exact).abs() > 10 * error)[:3].any()
    assert not check_guide(clusters, locals_first, loss, x).safe
    pyro.clear_param_store()

    guide, parameters, exact = our_guide_of_clusters(x)
    found, error = sampled_gradient(vectorized(loss, 2000), guide, parameters, x)
    # t with 19 degrees of freedom: beyond 7 once in 10^6 for one number
    assert ((found - exact).abs() < 7 * error + 1e-9).all()
    assert (found - exact).norm() < 0.2 * exact.norm()
    assert check_guide(clusters, guide, loss, x).safe


def test_losses_without_score_function_gradients():
    """RenyiELBO gives discrete sites a gradient of zero, without a word; TraceMeanField_ELBO refuses them."""
    x = CLUSTERED
    guide, parameters, exact = our_guide_of_clusters(x)
    assert exact.norm() > 0.1
    everything = vectorized(RenyiELBO, 100, alpha=0.0)
    found, _ = sampled_gradient(everything, guide, parameters, x, batches=2)
    assert (found == 0).all()
    with pytest.raises(NotImplementedError, match="fully reparameterized"):
        TraceMeanField_ELBO().loss_and_grads(clusters, guide, x)
    for loss in (RenyiELBO, TraceMeanField_ELBO):
        assert not check_guide(clusters, guide, loss, x).safe
    # summed over in the guide: exact, in one run
    guide = auto_faithful_guide(clusters, x, family=Normal(hidden_dims=[]), enumerate_sites=True)
    parameters = list(guide.parameters())
    exact = exact_gradient(lambda g, k: guide.log_prob({"g": g.unsqueeze(-1), "k": k}, x), parameters, x)
    found, _ = sampled_gradient(TraceEnum_ELBO(max_plate_nesting=1), guide, parameters, x, batches=2)
    torch.testing.assert_close(found, exact)
