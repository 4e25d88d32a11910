"""Discrete latent sites: exact tables under every estimator, shapes, starts, the guide's protocol."""

import copy
import io
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_guides import (
    CENTRES,
    WEIGHTS,
    assignments,
    exact_mixture_guide,
    mixture,
    mixture_evidence,
    set_tables_,
)
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.tracegraph_elbo import TrackNonReparam
from pyro.ops.provenance import get_provenance

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.structures import InverseGraph
from pyro_graphflows.guides import Factor, Normal, auto_faithful_guide
from pyro_graphflows.guides.conditionals.distributions import DiscreteVector
from pyro_graphflows.guides.discrete_mode import find_discrete_mode
from pyro_graphflows.infer import (
    IWAE_ELBO,
    InferenceCompilation,
    log_evidence,
    sbc_ranks,
    sbc_uniformity,
)
from pyro_graphflows.inspect import trace_model
from pyro_graphflows.models.textbook import burglar_alarm_model as burglar_alarm
from pyro_graphflows.regression import logistic_regression

TABLE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.double)


def network(n, x=None, y=None):
    """Binary a and b, class c given both, a one-hot d given c; x observes c and d, y observes a and b."""

    def rate(probs):
        return dist.Bernoulli(probs)

    with pyro.plate("data", n):
        a = pyro.sample("a", rate(0.3))
        b = pyro.sample("b", rate(0.6))
        c = pyro.sample(
            "c", dist.Categorical(TABLE[a.long()] * (1 - b.unsqueeze(-1)) + 0.1 + b.unsqueeze(-1) / 3)
        )
        d = pyro.sample("d", dist.OneHotCategorical(TABLE[(c > 0).long()]))
        pyro.sample("x", dist.Categorical(0.2 + d * (c + 1.0).unsqueeze(-1)), obs=x)
        pyro.sample("y", rate(0.1 + 0.3 * a + 0.5 * b * (1 - a)), obs=y)


def network_data():
    """All six data."""
    return torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0.0, 1.0] * 3)


def network_evidence(x, y):
    values, log_joint = assignments(network)
    result = []
    for xi, yi in zip(x, y, strict=True):
        here = (values["x"] == xi) & (values["y"] == yi)
        result.append(log_joint[here].logsumexp(0))
    return torch.stack(result)


ORDERS = ["forward", "reverse", "min_fill", "auto", "full"]


def particles(loss, vectorize=True, num_particles=3):
    return loss(num_particles=num_particles, vectorize_particles=vectorize, max_plate_nesting=1)


def elbos(vectorize):
    yield particles(Trace_ELBO, vectorize)
    yield particles(TraceGraph_ELBO, vectorize)
    yield RenyiELBO(0.0, num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)


@pytest.mark.parametrize("order", ORDERS)
def test_exact_tables_give_exact_evidence(order):
    """Zero variance: each single draw gives the evidence, under each estimator, vectorised or not."""
    x, y = network_data()
    guide = auto_faithful_guide(
        network, 6, x, y, inverse=order, init="random", family=Normal(units_per_set=120)
    )
    set_tables_(guide, network)
    exact = network_evidence(x, y).sum().item()
    for vectorize in (False, True):
        for loss in elbos(vectorize):
            assert loss.loss(network, guide, 6, x, y) == pytest.approx(-exact, abs=1e-6)
    assert IWAE_ELBO(3).loss(network, guide, 6, x, y) == pytest.approx(-exact, abs=1e-6)
    found = log_evidence(network, guide, 6, x, y, num_particles=4).log_evidence
    torch.testing.assert_close(found, network_evidence(x, y), atol=1e-6, rtol=0)
    # batches of other sizes
    assert Trace_ELBO().loss(network, guide, 2, x[:2], y[:2]) == pytest.approx(
        -network_evidence(x[:2], y[:2]).sum().item(), abs=1e-6
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sites", [True, ["c", "a"]])
def test_exact_tables_enumerated_in_the_guide(order, sites):
    x, y = network_data()
    if sites is not True and order in (
        "forward",
        "min_fill",
    ):  # c is a child of b in the model, and b is drawn given c
        with pytest.raises(UnsupportedModelError, match=r"samples some given the enumerated values .*c: .*b"):
            auto_faithful_guide(network, 6, x, y, inverse=order, enumerate_sites=sites)
        return
    guide = auto_faithful_guide(
        network,
        6,
        x,
        y,
        inverse=order,
        init="random",
        family=Normal(units_per_set=120),
        enumerate_sites=sites,
    )
    set_tables_(guide, network)
    exact = network_evidence(x, y).sum().item()
    for vectorize in (False, True):
        loss = particles(TraceEnum_ELBO, vectorize)
        assert loss.loss(network, guide, 6, x, y) == pytest.approx(-exact, abs=1e-6)


def test_subsampled_plates_scale_the_terms():
    x, y = network_data()

    def model(x, y):
        with pyro.plate("data", 60, subsample_size=len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * a), obs=y)

    guide = auto_faithful_guide(model, x, y, init="random")
    prior, rate = torch.tensor([0.7, 0.3]), torch.tensor([0.2, 0.8])
    joint = torch.stack([prior * (1 - rate), prior * rate])  # (y, a)
    log_odds = (joint[:, 1] / joint[:, 0]).log()
    guide.set_linear_("a", {"y": log_odds[1] - log_odds[0]}, log_odds[0])
    marked = auto_faithful_guide(model, x, y, init="random", enumerate_sites=True)
    marked.load_state_dict(guide.state_dict())
    for size in (6, 2):
        exact = joint.sum(-1)[y[:size].long()].log().sum().item() * 60 / size
        assert Trace_ELBO().loss(model, guide, x[:size], y[:size]) == pytest.approx(-exact)
        assert IWAE_ELBO(3).loss(model, guide, x[:size], y[:size]) == pytest.approx(-exact)
        assert TraceEnum_ELBO(max_plate_nesting=1).loss(model, marked, x[:size], y[:size]) == pytest.approx(
            -exact
        )


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_pyros_own_mark_for_enumeration(mode):
    """config_enumerate works on any guide; without a network for each site, the values of all sites meet."""
    x, y = network_data()
    guide = auto_faithful_guide(
        network, 6, x, y, inverse="reverse", init="random", family=Normal(units_per_set=120)
    )
    marked = config_enumerate(set_tables_(guide, network), mode)
    for vectorize in (False, True):
        loss = particles(TraceEnum_ELBO, vectorize, 2)
        assert loss.loss(network, marked, 6, x, y) == pytest.approx(
            -network_evidence(x, y).sum().item(), abs=1e-6
        )


@pytest.mark.parametrize("family", ["normal", "flow"])
@pytest.mark.parametrize("enumerate_sites", [False, True])
def test_mixed_models_with_the_exact_posterior(enumerate_sites, family):
    """k -> z -> x: the guide samples k first, and is exact; every draw gives the evidence."""
    x = torch.randn(5) * 2
    guide = exact_mixture_guide(x, enumerate_sites=enumerate_sites, family=family)
    assert guide.inverse.order == "discrete_first"
    exact = mixture_evidence(x)
    if enumerate_sites:
        for vectorize in (False, True):
            loss = particles(TraceEnum_ELBO, vectorize)
            assert loss.loss(mixture, guide, x) == pytest.approx(-exact.sum().item())
    else:
        for vectorize in (False, True):
            for loss in elbos(vectorize):
                assert loss.loss(mixture, guide, x) == pytest.approx(-exact.sum().item())
        assert IWAE_ELBO(4).loss(mixture, guide, x) == pytest.approx(-exact.sum().item())
    found = log_evidence(mixture, guide, x, num_particles=3).log_evidence
    torch.testing.assert_close(found, exact)


def test_log_prob_and_draws_are_the_posterior():
    x = torch.tensor([-1.0, 0.5, 2.0])
    guide = exact_mixture_guide(x)
    log_k = WEIGHTS.log() + dist.Normal(CENTRES, math.sqrt(1.25)).log_prob(x.unsqueeze(-1))
    posterior = dist.Categorical(logits=log_k)
    k, z = torch.arange(3).unsqueeze(-1), torch.randn(3, 3)
    normal = dist.Normal(0.2 * CENTRES[k] + 0.8 * x, math.sqrt(0.2))
    actual = guide.log_prob({"k": k.expand(3, 3), "z": z}, x)
    torch.testing.assert_close(actual, posterior.log_prob(k) + normal.log_prob(z))
    num = 20_000
    draws = Predictive(guide, num_samples=num, parallel=True)(x)
    assert draws["k"].shape == (num, 3)
    assert draws["k"].dtype == torch.long
    for value in range(3):
        share = (draws["k"] == value).double().mean(0)
        p = posterior.probs[:, value]
        assert ((share - p).abs() < 5 * (p * (1 - p) / num).sqrt()).all()
    mean = (posterior.probs * (0.2 * CENTRES + 0.8 * x.unsqueeze(-1))).sum(-1)
    assert ((draws["z"].mean(0) - mean).abs() < 5 * draws["z"].std(0) / math.sqrt(num)).all()


def test_median_is_the_mode_and_quantiles_are_values():
    x = torch.tensor([-1.0, 0.5, 2.0])
    guide = exact_mixture_guide(x)
    log_k = WEIGHTS.log() + dist.Normal(CENTRES, math.sqrt(1.25)).log_prob(x.unsqueeze(-1))
    centre = guide.median(x)
    assert torch.equal(centre["k"], log_k.argmax(-1))
    torch.testing.assert_close(centre["z"], 0.2 * CENTRES[centre["k"]] + 0.8 * x)
    cumulative = log_k.softmax(-1).cumsum(-1)
    levels = [0.2, 0.6, 0.95]
    assert (cumulative.unsqueeze(0) - torch.tensor(levels).reshape(3, 1, 1)).abs().min() > 0.02
    found = guide.quantiles(levels, x, num_draws=10_000)
    expected = (cumulative.unsqueeze(0) < torch.tensor(levels).reshape(3, 1, 1)).sum(-1)
    assert torch.equal(found["k"], expected)
    assert found["z"].shape == (3, 3)


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_the_start_is_the_posterior_where_log_odds_are_linear(family):
    """Logistic and least-squares regression on joint samples: right before the first step, up to sampling error."""
    x = torch.randn(200) * 2
    guide = auto_faithful_guide(mixture, x, family=family)
    exact = exact_mixture_guide(x)
    latents = exact(x)
    found = guide.log_prob(latents, x)
    expected = exact.log_prob(latents, x)
    # about 12 numbers fitted to 10,000 x 200 / 200 rows: a KL of 12 / 20,000; a spread of its square root
    assert (expected - found).mean().item() < 0.02
    text = str(guide.describe())
    assert "k | x  [amortised, sampled KL, 3 classes, score function]" in text
    if family == "flow":
        assert [type(b.conditionals).__name__ for b in guide.blocks] == [
            "MaskedConditionals",
            "FlowConditionals",
        ]


def test_calibration():
    """Ranks of the true values among draws are uniform for the exact posterior, and not for one that is too sure."""
    x = torch.zeros(4)
    guide = exact_mixture_guide(x)
    ranks = sbc_ranks(mixture, guide, x, num_simulations=1000, num_draws=9)
    assert min(sbc_uniformity(ranks[name], 9).min().item() for name in "kz") > 1e-4
    logits = 3 * (WEIGHTS.log() - CENTRES**2 / 2.5)
    guide.set_linear_("k", {"x": 3 * CENTRES.unsqueeze(-1) / 1.25}, logits)
    ranks = sbc_ranks(mixture, guide, x, num_simulations=1000, num_draws=9)
    assert sbc_uniformity(ranks["k"], 9).min().item() < 1e-3


def test_logistic_regression_finds_the_coefficients():
    n = 40_000
    x = torch.randn(n, 2) * torch.tensor([1.0, 30.0]) + 5.0
    slopes, intercept = torch.tensor([[1.5, -0.05]]), torch.tensor([0.3])
    y = torch.bernoulli((x @ slopes.T + intercept).sigmoid())
    found, offset = logistic_regression(x, y)
    # standard errors from the Fisher information at 10,000 rows
    p = (x[:10_000] @ slopes.T + intercept).sigmoid()
    design = torch.cat([x[:10_000], torch.ones(10_000, 1)], -1)
    error = torch.linalg.inv(design.T @ (p * (1 - p) * design)).diagonal().sqrt()
    assert ((found[0] - slopes[0]).abs() < 5 * error[:2]).all()
    assert (offset - intercept).abs() < 5 * error[2]
    # classes that can be told apart, classes that never occur, and no inputs: finite answers
    found, offset = logistic_regression(x, (x[:, :1] > 5.0).double())
    assert torch.isfinite(found).all()
    assert found[0, 0] > 5.0
    indicators = torch.eye(3)[torch.tensor([0, 1]).repeat(500)]
    found, offset = logistic_regression(torch.zeros(1000, 0), indicators)
    assert found.shape == (3, 0)
    torch.testing.assert_close(offset.softmax(-1), torch.tensor([500.5, 500.5, 0.5]) / 1001.5)
    found, offset = logistic_regression(torch.randn(1000, 1), indicators)
    assert 1e-5 < offset.softmax(-1)[2] < 2e-3


VECTORS = {
    "binary": (dist.Bernoulli(torch.tensor([0.2, 0.5, 0.9], dtype=torch.double)).to_event(1), (3,)),
    "classes": (dist.Categorical(TABLE).to_event(1), (2,)),
    "one_hot": (dist.OneHotCategorical(TABLE).to_event(1), (2, 3)),
    "range": (dist.Binomial(3, torch.tensor(0.4, dtype=torch.double)), ()),
}


@pytest.mark.parametrize("kind", sorted(VECTORS))
def test_values_in_every_form(kind):
    """Shape and type of values, probabilities that add up to one, frequencies as the probabilities say."""
    prior, event = VECTORS[kind]

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", prior.expand_by([len(x)]) if event else prior)
            effect = k.double().reshape(*k.shape[: k.dim() - len(event)], -1).cumsum(-1)[..., -1]
            pyro.sample("x", dist.Normal(effect, 1.0), obs=x)

    x = torch.randn(2)
    guide = auto_faithful_guide(model, x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    value = guide(x)["k"]
    assert value.shape == (2, *event)
    assert value.dtype == prior.sample().dtype
    num = 40_000
    with pyro.plate("draws", num, dim=-2):
        draws = guide(x)["k"]
    assert prior.support.check(draws).all()
    log_p = guide.log_prob({"k": draws}, x)
    assert log_p.shape == (num, 2)
    seen, index = draws[:, 0].reshape(num, -1).unique(dim=0, return_inverse=True)
    p = torch.zeros(len(seen)).scatter(0, index, log_p[:, 0].exp())
    share = index.bincount().double() / num
    assert ((share - p).abs() < 5 * (p * (1 - p) / num).sqrt() + 1e-12).all()
    assert 1 - 20 / num < p.sum().item() < 1 + 1e-9  # what was never drawn is rare
    for vectorize in (False, True):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), particles(TraceGraph_ELBO, vectorize))
        assert math.isfinite(svi.step(x))


def test_couplings_within_a_vector():
    """The regression start of a vector sees earlier elements: a chain of binary elements is exact."""

    def model(n):
        with pyro.plate("data", n):
            # q(b | a) has log-odds linear in a; as one site
            index = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.1, 0.1, 0.4])))
            bits = torch.stack([index // 2, index % 2], -1).double()
            pyro.sample("b", dist.Bernoulli(0.1 + 0.8 * bits).to_event(1))

    guide = auto_faithful_guide(model, 50, num_start_samples=20_000, inverse="full")
    with pyro.plate("draws", 2000, dim=-2):
        b = guide(50)["b"].reshape(-1, 2)
    share = b.prod(-1).mean().item()
    exact = 0.4 * 0.81 + 0.2 * 0.09 + 0.4 * 0.01
    independent = 0.25
    assert share == pytest.approx(exact, abs=0.02)
    assert abs(share - independent) > 0.05


def brute_force_elbo(guide, n, x, y):
    """The exact ELBO by summing over all assignments of the latents, differentiable in the guide."""
    supports = [torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), torch.arange(3), torch.eye(3)]
    indices = torch.tensor(list(itertools.product(*(range(len(s)) for s in supports))))
    values = {
        name: s[i].unsqueeze(1).expand(-1, n, *s.shape[1:])
        for name, s, i in zip("abcd", supports, indices.T, strict=True)
    }
    log_q = guide.log_prob(values, n, x, y)
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(network, values)).get_trace(n, x, y)
        trace.compute_log_prob()
        log_p = sum(trace.nodes[name]["log_prob"] for name in "abcdxy")
    return (log_q.exp() * (log_p - log_q)).sum()


@pytest.fixture
def rough_guide():
    """A guide away from the optimum, and its exact gradient."""
    x, y = torch.tensor([0]), torch.tensor([1.0])

    def make(**options):
        pyro.set_rng_seed(5)
        guide = auto_faithful_guide(network, 1, x, y, inverse="reverse", **options)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        return guide

    return make, (1, x, y)


def gradient(guide):
    parameters = list(guide.parameters())
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def test_guide_side_enumeration_has_the_exact_gradient(rough_guide):
    make, args = rough_guide
    guide = make(enumerate_sites=True)
    elbo = brute_force_elbo(guide, *args)
    (-elbo).backward()
    exact = gradient(guide)
    assert exact.norm() > 0.1
    guide.zero_grad()
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(network, guide, *args)
    assert loss == pytest.approx(-elbo.item())
    torch.testing.assert_close(gradient(guide), exact)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, IWAE_ELBO])
def test_score_function_gradients(rough_guide, loss):
    """Against the exact gradient of the brute-force sum, within its standard errors."""
    make, (n, x, y) = rough_guide
    guide = make(enumerate_sites=["b", "d"]) if loss is TraceEnum_ELBO else make()
    elbo = brute_force_elbo(guide, n, x, y)
    (-elbo).backward()
    exact = gradient(guide)
    copies, found = 2000, []
    for _ in range(10):
        guide.zero_grad()
        many = (copies, x.expand(copies), y.expand(copies))
        estimator = IWAE_ELBO(1) if loss is IWAE_ELBO else loss(max_plate_nesting=1)
        estimator.loss_and_grads(network, guide, *many)
        found.append(gradient(guide) / copies)
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(10)
    # t with 9 degrees of freedom: beyond 8 once in 40,000 for one number
    assert ((found.mean(0) - exact).abs() < 8 * error + 1e-9).all()
    assert (found.mean(0) - exact).norm() < 0.25 * exact.norm()


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_gradients_of_mixed_models(family):
    """A score-function part and a path: against the sum over k and a fine grid of z."""
    x = torch.tensor([0.7])
    copies = 4000

    def make(**options):
        guide = exact_mixture_guide(x, family=family, **options)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return guide

    guide = make()
    grid = torch.linspace(-12.0, 12.0, 12001)
    k, z = torch.arange(3).repeat_interleave(len(grid)), grid.repeat(3)
    log_q = guide.log_prob({"k": k, "z": z}, x.expand(len(k)))
    log_p = dist.Categorical(WEIGHTS).log_prob(k) + dist.Normal(CENTRES[k], 1.0).log_prob(z)
    log_p = log_p + dist.Normal(z, 0.5).log_prob(x)
    assert log_q.exp().sum().item() * 0.002 == pytest.approx(1.0, abs=1e-5)
    (-(log_q.exp() * (log_p - log_q)).sum() * 0.002).backward()
    exact = gradient(guide)
    for loss in (Trace_ELBO, TraceGraph_ELBO):
        found = []
        for _ in range(8):
            guide.zero_grad()
            loss(max_plate_nesting=1).loss_and_grads(mixture, guide, x.expand(copies))
            found.append(gradient(guide) / copies)
        found = torch.stack(found)
        if family == "normal":  # the density of a flow has kinks: the grid is right to half a per cent only
            # t with 7 degrees of freedom: beyond 10 once in 50,000 for one number
            assert ((found.mean(0) - exact).abs() < 10 * found.std(0) / math.sqrt(8) + 1e-9).all()
        assert (found.mean(0) - exact).norm() < 0.1 * exact.norm()


def test_wake_sleep_of_discrete_guides():
    """With no reparametrised values ReweightedWakeSleep is right: the gradient of log q at the draws, weighted."""
    x, y = network_data()
    guide = auto_faithful_guide(network, 6, x, y)
    loss = ReweightedWakeSleep(3, model_has_params=False, vectorize_particles=False, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    loss.loss_and_grads(network, guide, 6, x, y)
    found = gradient(guide)
    guide.zero_grad()
    pyro.set_rng_seed(1)
    log_w, log_q = [], []
    for _ in range(3):
        with torch.no_grad():
            values = guide(6, x, y)
            log_p = poutine.trace(poutine.condition(network, values)).get_trace(6, x, y).log_prob_sum()
        log_q.append(guide.log_prob(values, 6, x, y).sum())
        log_w.append(log_p - log_q[-1].detach())
    (-(torch.stack(log_w).softmax(0) * torch.stack(log_q)).sum()).backward()
    torch.testing.assert_close(found, gradient(guide))


def test_the_burglar_alarm():
    """P(burglary | both call) = 0.284, by summing over rare causes that no sample of the prior would show."""
    calls = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    guide = auto_faithful_guide(burglar_alarm, calls, enumerate_sites=True)
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.97})
    svi = SVI(burglar_alarm, guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
    for _ in range(150):
        loss = svi.step(calls)
    rates = torch.tensor([[0.001, 0.29], [0.94, 0.95]])
    prior = torch.tensor([0.999, 0.001]).unsqueeze(-1) * torch.tensor([0.998, 0.002])
    alarm = torch.stack([1 - rates, rates], -1)
    john = torch.tensor([[0.05, 0.9]]) * calls[:, :1] + torch.tensor([[0.95, 0.1]]) * (1 - calls[:, :1])
    mary = torch.tensor([[0.01, 0.7]]) * calls[:, 1:] + torch.tensor([[0.99, 0.3]]) * (1 - calls[:, 1:])
    joint = torch.einsum("be,bea,na->nbea", prior, alarm, john * mary)
    evidence = joint.sum((1, 2, 3))
    assert evidence.log().sum().item() == pytest.approx(-loss, abs=0.02)
    burglary = joint[:, 1].sum((1, 2)) / evidence
    assert burglary[0].item() == pytest.approx(0.284, abs=5e-4)
    total = torch.zeros(3)
    for earthquake, alarm_value in itertools.product((0.0, 1.0), repeat=2):
        values = {
            "burglary": torch.ones(3),
            "earthquake": torch.full((3,), earthquake),
            "alarm": torch.full((3,), alarm_value),
        }
        total += guide.log_prob(values, calls).exp().detach()
    assert total[0].item() == pytest.approx(0.284, abs=0.02)
    assert (total[1:] < 0.05).all()


def test_inference_compilation_approaches_the_tables():
    x, y = network_data()
    guide = auto_faithful_guide(network, 6, x, y, init="random")
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.97})
    compilation = InferenceCompilation(network, guide, optim, batch_size=200)

    def divergence():
        """The mean KL from the posterior, exactly."""
        values, log_joint = assignments(network)
        data = {name: values[name] for name in "xy"}
        log_q = guide.log_prob({name: values[name] for name in "abcd"}, len(log_joint), *data.values())
        evidence = network_evidence(*data.values())
        return (log_joint.exp() * (log_joint - evidence - log_q)).sum().item()

    with torch.no_grad():
        before = divergence()
        for _ in range(150):
            with torch.enable_grad():
                compilation.step(6, x, y)
        after = divergence()
    assert before > 0.5
    assert after < 0.02


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_globals_with_discrete_locals(family):
    """A discrete global, per-element parameters for it, discrete and continuous locals: exact by hand."""
    shares = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    centres = torch.tensor([-1.0, 1.5])

    def model(x):
        g = pyro.sample("g", dist.Bernoulli(0.4))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(shares[g.long()]))
            z = pyro.sample("z", dist.Normal(centres[k], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.randn(4)
    guide = auto_faithful_guide(model, x, init="random", family=family)
    assert guide.plan.blocks[0].per_element == ("g",)
    assert "g | x (not read)  [per-element parameters, sampled KL, binary, score function]" in str(
        guide.describe()
    )
    # (2, N, 2): log p(k, x_n | g)
    terms = shares.log().unsqueeze(1) + dist.Normal(centres, math.sqrt(1.25)).log_prob(x.unsqueeze(-1))
    of_g = torch.tensor([0.6, 0.4]).log() + terms.logsumexp(-1).sum(-1)
    exact = of_g.logsumexp(0).item()
    guide.set_linear_("g", {}, of_g[1] - of_g[0])
    slope = torch.stack([0 * shares[0], (shares[1] / shares[0]).log()])  # of g, towards each class
    guide.set_linear_(
        "k",
        {"x": centres.unsqueeze(-1) / 1.25, "g": slope[1].unsqueeze(-1)},
        shares[0].log() - centres**2 / 2.5,
    )
    guide.set_linear_("z", {"k": 0.2 * centres.unsqueeze(0), "x": 0.8}, 0.0, math.sqrt(0.2))
    for vectorize in (False, True):
        for loss in (particles(Trace_ELBO, vectorize), particles(TraceGraph_ELBO, vectorize)):
            assert loss.loss(model, guide, x) == pytest.approx(-exact)


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_pooled_data_and_discrete_sites(family):
    """An amortised discrete global: close to the posterior at the start, on data sets it has not seen."""
    shares = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7]])
    emission = 0.1 + torch.eye(3)

    def model(x, y):
        g = pyro.sample("g", dist.Bernoulli(0.4))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(shares[g.long()]))
            pyro.sample("y", dist.Categorical(emission[k]), obs=y)
            pyro.sample("x", dist.Normal(CENTRES[k], 1.0), obs=x)

    args = torch.randn(6), torch.randint(0, 3, (6,))
    guide = auto_faithful_guide(model, *args, pool="deepset", family=family, num_start_samples=4000)
    assert "g | y (pooled), x (pooled)  [amortised" in str(guide.describe())
    compilation = InferenceCompilation(model, guide, pyro.optim.Adam({"lr": 1e-3}), batch_size=1000)

    def divergence():
        """The mean KL from the posterior, in nats for each data set of six."""
        (joint,) = compilation.sample_joint(*args)
        x, y = joint.nodes["x"]["value"], joint.nodes["y"]["value"]
        of_k = dist.Categorical(emission).log_prob(y.unsqueeze(-1)) + dist.Normal(CENTRES, 1.0).log_prob(
            x.unsqueeze(-1)
        )
        of_g = (shares.log().reshape(2, 1, 1, 3) + of_k).logsumexp(-1).sum(-1)  # (2, samples)
        evidence = (of_g + torch.tensor([0.6, 0.4]).log().unsqueeze(-1)).logsumexp(0)
        joint.compute_log_prob()
        log_p = joint.nodes["g"]["log_prob"].squeeze(-1) - evidence
        log_p = log_p + sum(joint.nodes[name]["log_prob"].sum(-1) for name in "kxy")
        return (log_p - compilation._score((joint,), args, {})).mean().item()

    with torch.no_grad():
        start = divergence()
    assert -0.02 < start < 0.2
    for _ in range(20):
        compilation.step(*args)
    with torch.no_grad():
        assert divergence() < start + 0.1
    assert guide(args[0][:3], args[1][:3])["k"].shape == (3,)


def enumerated_globals(x):
    g = pyro.sample("g", dist.Bernoulli(0.4))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(TABLE[g.long()]))
        pyro.sample("x", dist.Normal(CENTRES[k], 1.0), obs=x)


def test_enumerated_globals_and_locals():
    x = torch.randn(4)
    guide = auto_faithful_guide(enumerated_globals, x, init="random", enumerate_sites=True)
    terms = TABLE.log().unsqueeze(1) + dist.Normal(CENTRES, 1.0).log_prob(x.unsqueeze(-1))
    of_g = torch.tensor([0.6, 0.4]).log() + terms.logsumexp(-1).sum(-1)
    guide.set_linear_("g", {}, of_g[1] - of_g[0])
    guide.set_linear_(
        "k",
        {"x": CENTRES.unsqueeze(-1), "g": (TABLE[1] / TABLE[0]).log().unsqueeze(-1)},
        TABLE[0].log() - CENTRES**2 / 2,
    )
    for vectorize in (False, True):
        loss = particles(TraceEnum_ELBO, vectorize)
        assert loss.loss(enumerated_globals, guide, x) == pytest.approx(-of_g.logsumexp(0).item())


OF_K = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], dtype=torch.double)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("enumerate_sites", [False, True])
def test_sites_that_the_model_enumerates_beside_those_of_the_guide(enumerate_sites, masked):
    """k -> z -> x as before, and k -> m -> u with m summed over by the model."""
    mask = torch.tensor([True, not masked, True, True])

    def model(x, u):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            m = pyro.sample("m", dist.Categorical(OF_K[k]), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(CENTRES[k], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            pyro.sample("u", dist.Normal(2.0 * m, 1.0), obs=u)

    x, u = 2 * torch.randn(4), torch.tensor([0.3, 0.3, 2.0, 2.0])
    guide = auto_faithful_guide(
        model,
        x,
        u,
        init="random",
        enumerate_sites=enumerate_sites,
        family=Normal(units_per_set=8),
        standardize=False,
    )
    assert guide.inverse.parents == {"k": ("x", "u"), "z": ("k", "x")}
    of_u = (OF_K.log() + dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(u[:, None, None])).logsumexp(-1)
    exact = (
        WEIGHTS.log() + dist.Normal(CENTRES, math.sqrt(1.25)).log_prob(x.unsqueeze(-1)) + of_u
    ).logsumexp(-1)
    # the logits of k: exact at the two values of u, linear in x
    slope = (of_u[2] - of_u[0]) / 1.7
    logits = WEIGHTS.log() - CENTRES**2 / 2.5 + of_u[0] - 0.3 * slope
    guide.set_linear_("k", {"x": CENTRES.unsqueeze(-1) / 1.25, "u": slope.unsqueeze(-1)}, logits)
    guide.set_linear_("z", {"k": 0.2 * CENTRES.unsqueeze(0), "x": 0.8}, 0.0, math.sqrt(0.2))
    for vectorize in (False, True):
        loss = particles(TraceEnum_ELBO, vectorize)
        assert loss.loss(model, guide, x, u) == pytest.approx(-exact[mask].sum().item())
        found = log_evidence(model, guide, x, u, num_particles=3, vectorize=vectorize).log_evidence
        torch.testing.assert_close(found, torch.where(mask, exact, 0.0))


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("family", ["normal", "flow"])
def test_influence_of_discrete_values_is_traced(family, engine, monkeypatch):
    """TraceGraph_ELBO finds the terms that a draw moves by marks on tensors: every path must hand them on."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Normal(CENTRES[k], 1.0))
            v = pyro.sample("v", dist.Normal(z.unsqueeze(-1) * torch.ones(2), 1.0).to_event(1))
            w = pyro.sample("w", dist.LogNormal(v[..., 0], 1.0))
            pyro.sample("x", dist.Normal(z + v.sum(-1) + w, 0.5), obs=x)

    monkeypatch.setattr("pyro_graphflows.nn.mlp.fastest_engine", lambda *_: engine)
    x = torch.randn(3)
    guide = auto_faithful_guide(model, x, family=family)
    assert guide.blocks[0].conditionals.network.skip.engine == engine
    with TrackNonReparam():
        drawn = poutine.trace(guide).get_trace(x)
        replayed = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x)
    for trace in (drawn, replayed):
        trace.compute_log_prob()
        for name in set("kzvwx") & set(trace.nodes):
            assert get_provenance(trace.nodes[name]["log_prob"]) == {"k"}
    # and let gradients pass: at the same draws, those of reparametrised sites are the same as without marks
    found = []
    for loss in (Trace_ELBO, TraceGraph_ELBO):
        guide.zero_grad()
        pyro.set_rng_seed(1)
        loss().loss_and_grads(model, guide, x)
        found.append([p.grad for p in guide.blocks[-1].conditionals.parameters()])
    if family == "flow":
        for plain, marked in zip(*found, strict=True):
            torch.testing.assert_close(plain, marked)
    assert [g is None for g in found[0]] == [g is None for g in found[1]]


def test_copies_and_files():
    x = torch.randn(4)
    guide = exact_mixture_guide(x)
    latents = guide(x)
    expected = guide.log_prob(latents, x)
    twin = copy.deepcopy(guide)
    torch.testing.assert_close(twin.log_prob(latents, x), expected)
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False).bind(mixture)
    torch.testing.assert_close(loaded.log_prob(latents, x), expected)
    torch.testing.assert_close(guide.log_prob(latents, x), expected)
    other = auto_faithful_guide(mixture, x, init="random")
    other.load_state_dict(guide.state_dict())
    torch.testing.assert_close(other.log_prob(latents, x), expected)
    fixed = guide.given(x=x + 1)
    assert torch.equal(fixed(x)["k"] * 0, latents["k"] * 0)
    small = guide.to(torch.float32)
    values = small(x.float())
    assert values["z"].dtype == torch.float32
    assert small.log_prob(values, x.float()).dtype == torch.float32


def test_handlers():
    x = torch.randn(4)
    guide = exact_mixture_guide(x)
    k = torch.tensor([0, 1, 2, 0])
    trace = poutine.trace(poutine.condition(guide, {"k": k})).get_trace(x)
    assert trace.nodes["k"]["value"] is k
    trace = poutine.trace(guide).get_trace(x)
    replayed = poutine.trace(poutine.replay(guide, trace)).get_trace(x)
    latents = {name: trace.nodes[name]["value"] for name in "kz"}
    assert all(torch.equal(replayed.nodes[name]["value"], value) for name, value in latents.items())
    torch.testing.assert_close(replayed.log_prob_sum(), guide.log_prob(latents, x).sum())

    mask = torch.tensor([True, False, True, True])

    def masked(x):
        with poutine.mask(mask=mask):
            mixture(x)

    exact = mixture_evidence(x)[mask].sum().item()
    other = exact_mixture_guide(x, masked)
    assert Trace_ELBO().loss(masked, other, x) == pytest.approx(-exact)


def test_missing_classes():
    """A partly observed categorical site: the guide sees indicators and what is missing, and draws the rest."""

    def model(y, mask):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Categorical(TABLE[k.long()]), obs=y, obs_mask=mask)

    y, mask = torch.tensor([0, 1, 2, 0]), torch.tensor([True, False, True, True])
    guide = auto_faithful_guide(model, y, mask)
    latents = guide(y, mask)
    other = torch.where(mask, y, 2)
    torch.testing.assert_close(guide.log_prob(latents, other, mask), guide.log_prob(latents, y, mask))
    exact = (torch.tensor([0.7, 0.3]) @ TABLE).log()[y][mask].sum().item()
    losses = torch.tensor(
        [particles(Trace_ELBO, num_particles=500).loss(model, guide, y, mask) for _ in range(8)]
    )
    assert losses.mean().item() == pytest.approx(-exact, abs=0.1)


def test_lists_of_guides_and_elements():
    x = torch.randn(5)
    guide = AutoGuideList(mixture)
    guide.append(auto_faithful_guide(poutine.block(mixture, hide=["z"])))
    guide.append(AutoNormal(poutine.block(mixture, expose=["z"])))
    svi = SVI(mixture, guide, pyro.optim.Adam({"lr": 1e-2}), TraceGraph_ELBO())
    assert math.isfinite(svi.step(x))
    assert math.isfinite(svi.step(x))

    def vectors(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            loc = torch.stack([CENTRES[k], torch.zeros(k.shape)], -1)
            v = pyro.sample("v", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(v, 1.0).to_event(1), obs=x)

    for family in ("normal", "flow"):
        guide = auto_faithful_guide(vectors, torch.randn(5, 2), resolution="element", family=family)
        assert guide.inverse.parents["v[0]"] == ("k", "x[0]")
        assert [site for block in guide.plan.blocks for site in block.sites] == ["k", "v"]


def test_observed_classes_are_indicators():
    """Their numbers are names: a guide that took them as distances could not start right."""
    table = torch.tensor([[0.4, 0.1, 0.5], [0.1, 0.8, 0.1]])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Categorical(table[k.long()]), obs=x)

    x = torch.tensor([0, 1, 2])
    guide = auto_faithful_guide(model, x, num_start_samples=50_000, family=Normal(hidden_dims=[]))
    exact = table[1] / table.sum(0)
    found = guide.log_prob({"k": torch.ones(3)}, x).exp()
    assert (found - exact).abs().max() < 0.03  # a standard error of about 0.008


class PoissonFactor(Factor):
    """A toy family for counts without a bound."""

    @property
    def num_outputs(self):
        return self.size

    def distribution(self, outputs, shift, scale):
        return dist.Poisson(outputs.exp()).to_event(1)

    def linear_start(self, weights, loc, scale_tril):
        return weights, loc

    def start_from_samples(self, inputs, values):
        return inputs.new_zeros(self.size, inputs.shape[-1]), values.mean(0).log()


def counts(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        n = pyro.sample("n", dist.Poisson(rate))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(n + k, 1.0), obs=x)


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_a_factor_of_the_users_own_for_one_site(family):
    x = torch.randn(6).abs() * 3
    guide = auto_faithful_guide(counts, x, family=family, factors={"n": PoissonFactor})
    values = guide(x)
    assert (values["n"] == values["n"].floor()).all()
    assert values["n"].dtype == torch.double
    trace = poutine.trace(poutine.condition(guide, values)).get_trace(x)
    fn = trace.nodes["n"]["fn"]
    torch.testing.assert_close(fn.log_prob(values["n"]), fn.base.log_prob(values["n"].unsqueeze(-1)))
    before = [p.clone() for p in guide.parameters()]
    svi = SVI(counts, guide, pyro.optim.Adam({"lr": 1e-3}), particles(TraceGraph_ELBO))
    assert math.isfinite(svi.step(x))
    assert any(not torch.equal(b, p) for b, p in zip(before, guide.parameters(), strict=True))
    assert math.isfinite(InferenceCompilation(counts, guide).loss(x))
    assert "n | " in str(guide.describe())
    assert "counts, score function" in str(guide.describe())


def test_what_is_refused():
    x = torch.randn(3)
    with pytest.raises(UnsupportedModelError, match=r"site 'n' is Poisson.*factors=\{'n': ...\}"):
        auto_faithful_guide(counts, x)
    with pytest.raises(UnsupportedModelError, match="'z' is no discrete latent site"):
        auto_faithful_guide(mixture, x, enumerate_sites=["z"])

    def vector(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.ones(2) / 2).to_event(1))
            pyro.sample("x", dist.Normal(k.sum(-1), 1.0), obs=x)

    with pytest.raises(UnsupportedModelError, match=r"'k' is 2 x binary\. Pyro enumerates no vectors"):
        auto_faithful_guide(vector, x, enumerate_sites=True)
    with pytest.raises(NotImplementedError, match="a single binary or class variable"):
        DiscreteVector(torch.zeros(2, 1)).enumerate_support()

    def number_of_classes(x, n=3):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(n)))
            pyro.sample("x", dist.Normal(1.0 * k, 1.0), obs=x)

    guide = auto_faithful_guide(number_of_classes, x)
    with pytest.raises(
        GraphflowsError, match="Expected the values of 'k' to be as when the guide was set up"
    ):
        guide(x, 4)


def test_an_inverse_with_locals_first_is_reordered_or_refused():
    x = torch.randn(3)

    def factorisation(parents):
        def make(graph):
            return InverseGraph(graph, parents, sampling_order=("k", "g"))

        return make

    guide = auto_faithful_guide(enumerated_globals, x, inverse=factorisation({"k": ["x"], "g": ["x"]}))
    assert [site for block in guide.plan.blocks for site in block.sites] == ["g", "k"]
    with pytest.raises(
        UnsupportedModelError, match="'g', in fewer plates, to be sampled before the discrete site 'k'"
    ):
        auto_faithful_guide(enumerated_globals, x, inverse=factorisation({"k": ["x"], "g": ["k"]}))


def test_without_plates_the_start_is_at_the_data_also_beside_discrete_sites():
    """A change of rates at an unknown time, with wide priors."""
    y = torch.tensor([4.0, 5.0, 4.0, 0.0, 6.0, 3.0, 1.0, 0.0, 1.0, 0.0])

    def model(y):
        early, late = (pyro.sample(name, dist.Gamma(0.1, 0.01)) for name in ("early", "late"))
        change = pyro.sample("change", dist.Categorical(torch.ones(9)))
        is_early = torch.arange(10) <= change.unsqueeze(-1)
        rates = torch.where(is_early, early.unsqueeze(-1), late.unsqueeze(-1))
        pyro.sample("y", dist.Poisson(rates).to_event(1), obs=y)

    def log_evidence(counts):
        total, number = counts.sum(), len(counts)
        scale = 0.1 * math.log(0.01) - math.lgamma(0.1) - (total + 0.1) * math.log(number + 0.01)
        return torch.lgamma(total + 0.1) + scale - torch.lgamma(counts + 1).sum()

    each = [log_evidence(y[:i]) + log_evidence(y[i:]) for i in range(1, 10)]
    exact = math.log(9) - torch.stack(each).logsumexp(0)
    guide = auto_faithful_guide(model, y)
    losses = torch.tensor([Trace_ELBO().loss(model, guide, y) for _ in range(100)])
    assert losses.mean() < exact + 1.0


KINDS = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.double)
SHARES = torch.tensor([0.2, 0.3, 0.5], dtype=torch.double)


def one_hot_mean():
    return pyro.sample("kind", dist.OneHotCategorical(SHARES)) @ KINDS


def class_mean():
    return KINDS[pyro.sample("kind", dist.Categorical(SHARES))]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("mean", [one_hot_mean, class_mean])
def test_a_global_class_of_all_data_starts_at_its_posterior(mean, shift):
    """The class is all there is to infer, or is beside a number; its values are few and are listed."""
    y = torch.randn(10)

    def model(y):
        moved = pyro.sample("moved", dist.Normal(0.0, 0.3)) if shift else torch.tensor(0.0)
        loc = mean() + moved
        with pyro.plate("data", 10):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    guide = auto_faithful_guide(model, y, num_start_samples=1000)
    covariance = torch.eye(10) + (0.09 if shift else 0.0)
    each = [dist.MultivariateNormal(kind.expand(10), covariance).log_prob(y) for kind in KINDS]
    exact = torch.logsumexp(SHARES.log() + torch.stack(each), 0).item()
    losses = torch.tensor([Trace_ELBO().loss(model, guide, y) for _ in range(20)])
    assert losses.mean().item() == pytest.approx(-exact, abs=0.05)


def test_values_of_discrete_sites_are_not_listed_where_that_takes_long(monkeypatch):
    number = 0

    def model(y):
        nonlocal number
        number += 1
        bits = [pyro.sample(f"bit_{i}", dist.OneHotCategorical(torch.ones(2)))[..., 0] for i in range(8)]
        pyro.sample("y", dist.Normal(sum(bits), 1.0), obs=y)

    args = (torch.tensor(3.0),)
    traced = trace_model(model, args, {}, strict=False)
    monkeypatch.setattr("pyro_graphflows.guides.discrete_mode.SECONDS", 0.0)
    number = 0
    with pytest.raises(UnsupportedModelError):
        find_discrete_mode(model, args, {}, traced)
    assert number < 20  # of 256
