"""Mixtures and hidden Markov models: enumerated by the model or by the guide, drawn, compiled; against exact sums."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_guides import set_tables_
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from training_paths import check_losses, training

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides import Normal, auto_faithful_guide, check_guide
from pyro_graphflows.guides.mode import find_mode
from pyro_graphflows.infer import IWAE_ELBO, InferenceCompilation, log_evidence
from pyro_graphflows.inspect import trace_model

SCALE = 0.7


def mixture(x, enumerate_model):
    """Two normal components with unknown centres; assignments summed over by the model, or left to the guide."""
    first = pyro.sample("first", dist.Normal(-1.0, 1.0))
    second = pyro.sample("second", dist.Normal(1.0, 1.0))
    with pyro.plate("data", len(x)):
        infer = {"enumerate": "parallel"} if enumerate_model else {}
        k = pyro.sample("k", dist.Bernoulli(0.6), infer=infer)
        pyro.sample("x", dist.Normal(torch.where(k > 0, second, first), SCALE), obs=x)


def mixture_data():
    return torch.where(torch.rand(30) < 0.6, 1.3, -0.8) + SCALE * torch.randn(30)


def mixture_evidence(x):
    """On a grid of the two centres."""
    grid = torch.linspace(-4, 4, 401)
    first, second = torch.meshgrid(grid, grid, indexing="ij")
    log_p = dist.Normal(-1.0, 1.0).log_prob(first) + dist.Normal(1.0, 1.0).log_prob(second)
    for datum in x:
        log_p = log_p + torch.logaddexp(
            math.log(0.4) + dist.Normal(first, SCALE).log_prob(datum),
            math.log(0.6) + dist.Normal(second, SCALE).log_prob(datum),
        )
    return log_p.flatten().logsumexp(0).item() + 2 * math.log(8 / 400)


def trained_elbo(x, enumerate_model, num_steps, **options):
    guide = auto_faithful_guide(mixture, x, enumerate_model, **options)
    loss = TraceEnum_ELBO if enumerate_model or options.get("enumerate_sites") else TraceGraph_ELBO

    def elbo(num_particles):
        return loss(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)

    assert check_guide(mixture, guide, loss, x, enumerate_model).safe
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / num_steps)})
    svi = SVI(mixture, guide, optim, elbo(4))
    for _ in range(num_steps):
        svi.step(x, enumerate_model)
    with torch.no_grad():
        return -elbo(4000).loss(mixture, guide, x, enumerate_model)


def test_a_mixture_with_enumerated_assignments_is_trained():
    """The posterior of the centres is nearly normal: the ELBO comes to within a few hundredths of the evidence."""
    x = mixture_data()
    found, exact = trained_elbo(x, True, 120), mixture_evidence(x)
    assert exact - 0.1 < found < exact + 0.02  # a standard error of less than 0.005


@pytest.mark.slow
@pytest.mark.parametrize("family", ["normal", "flow"])
@pytest.mark.parametrize("how", ["model", "guide", "drawn"])
def test_a_mixture_trained_in_every_way(how, family):
    x = mixture_data()
    options = {"enumerate_sites": ["k"]} if how == "guide" else {}
    found = trained_elbo(x, how == "model", 1000 if how == "drawn" else 500, family=family, **options)
    exact = mixture_evidence(x)
    # with the assignments in the guide, their factor's network has to be learned as well
    assert exact - {"model": 0.1, "guide": 0.25, "drawn": 0.4}[how] < found < exact + 0.03


TRANSITIONS = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]], dtype=torch.double)
LEVELS = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.double)
SEEN = torch.tensor([0.1, 0.5, 0.8], dtype=torch.double)


def steps(length, markov):
    return pyro.markov(range(length)) if markov else range(length)


def binary_chain(length, markov):
    """A hidden Markov model with binary observations, as a function of the number of sequences and the data."""

    def model(n, *xs):
        with pyro.plate("sequences", n):
            z = torch.tensor(0)
            for t in steps(length, markov):
                z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITIONS[z]))
                pyro.sample(f"x_{t}", dist.Bernoulli(SEEN[z]), obs=xs[t] if xs else None)

    return model


def forward_algorithm(log_seen, transitions=TRANSITIONS):
    """Return the log-evidence of sequences from the log-densities of their elements, ``(T, *batch, states)``."""
    alpha = transitions[0].log() + log_seen[0]
    for element in log_seen[1:]:
        alpha = (alpha.unsqueeze(-1) + transitions.log()).logsumexp(-2) + element
    return alpha.logsumexp(-1)


@pytest.mark.parametrize("markov", [False, True])
@pytest.mark.parametrize("enumerate_sites", [False, True])
def test_exact_tables_of_a_hidden_markov_model(markov, enumerate_sites):
    length, model = 3, binary_chain(3, markov)
    xs = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])  # by time, then sequence
    guide = auto_faithful_guide(
        model, 3, *xs, init="random", family=Normal(units_per_set=60), enumerate_sites=enumerate_sites
    )
    latents = {f"z_{t}" for t in range(length)}
    assert set(guide.plan.graph.latent) == latents
    assert all(len(latents.intersection(parents)) <= 1 for parents in guide.inverse.parents.values())
    set_tables_(guide, model)
    seen = torch.stack([dist.Bernoulli(SEEN).log_prob(x.unsqueeze(-1)) for x in xs])
    exact = forward_algorithm(seen)
    for vectorize in (False, True):
        sizes = {"num_particles": 2, "vectorize_particles": vectorize, "max_plate_nesting": 1}
        if enumerate_sites:
            losses = [TraceEnum_ELBO(**sizes)]
        else:
            losses = [Trace_ELBO(**sizes), TraceGraph_ELBO(**sizes), RenyiELBO(0.0, **sizes), IWAE_ELBO(3)]
        for loss in losses:
            assert loss.loss(model, guide, 3, *xs) == pytest.approx(-exact.sum().item(), abs=1e-6)
    found = log_evidence(model, guide, 3, *xs, num_particles=2).log_evidence
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)


def normal_chain(x, markov=False):
    n, length = x.shape
    with pyro.plate("sequences", n):
        z = torch.tensor(0)
        for t in steps(length, markov):
            z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITIONS[z]))
            pyro.sample(f"x_{t}", dist.Normal(LEVELS[z], 1.0), obs=x[:, t])


def normal_evidence(x):
    return forward_algorithm(dist.Normal(LEVELS, 1.0).log_prob(x.T.unsqueeze(-1)))


def test_long_chains_are_enumerated_in_the_guide():
    """Each factor has the dimensions of its own parents' values only: 20 sites of 3 values, not 3 ** 20."""
    x = 2 * torch.randn(4, 20)
    guide = auto_faithful_guide(normal_chain, x, enumerate_sites=True, num_start_samples=2000)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    found = loss.loss_and_grads(normal_chain, guide, x)
    assert loss.loss(normal_chain, guide, x) == pytest.approx(found)  # no draws, no variance
    assert all(torch.isfinite(p.grad).all() for p in guide.parameters())
    exact = -normal_evidence(x).sum().item()
    assert exact < found < exact + 4 * 2.0  # the start, before any step
    with pyro.validation_enabled(False):  # which would warn that these losses enumerate nothing
        drawn = torch.tensor(
            [Trace_ELBO(300, 1, vectorize_particles=True).loss(normal_chain, guide, x) for _ in range(10)]
        )
    assert abs(drawn.mean().item() - found) < 6 * drawn.std().item() / math.sqrt(10)


def divergence(guide, num):
    """The mean KL from the posterior, in nats for each sequence, and its standard error, on draws of the joint."""
    length = sum(name.startswith("z_") for name in guide.plan.graph.latent)
    joint = poutine.trace(poutine.uncondition(normal_chain)).get_trace(torch.zeros(num, length))
    z = {f"z_{t}": joint.nodes[f"z_{t}"]["value"] for t in range(length)}
    x = torch.stack([joint.nodes[f"x_{t}"]["value"] for t in range(length)], -1)
    joint.compute_log_prob()
    names = [name for name in joint.nodes if name[:2] in ("z_", "x_")]
    log_p = sum(joint.nodes[name]["log_prob"] for name in names) - normal_evidence(x)
    ratio = log_p - guide.log_prob(z, x)
    return ratio.mean().item(), ratio.std().item() / math.sqrt(num)


def test_compiled_inference_of_a_hidden_markov_model():
    """Logistic regression on all that is seen is close at once; from random weights training gets there as well."""
    x = torch.zeros(100, 5)
    with torch.no_grad():
        start, error = divergence(auto_faithful_guide(normal_chain, x, num_start_samples=4000), 4000)
    assert -3 * error < start < 0.06
    guide = auto_faithful_guide(normal_chain, x, init="random", num_start_samples=1000)
    with torch.no_grad():
        before, _ = divergence(guide, 4000)
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.96})
    compilation = InferenceCompilation(normal_chain, guide, optim, batch_size=5)
    for _ in range(100):
        compilation.step(x)
    with torch.no_grad():
        after, error = divergence(guide, 4000)
    assert before > 0.5
    assert -3 * error < after < 0.1


def test_chains_that_the_model_enumerates():
    """pyro.markov and TraceEnum_ELBO sum over the states; the guide has the global choice of transitions, exactly."""
    length = 20
    choices = torch.stack([TRANSITIONS, 0.5 * TRANSITIONS.flip(-1) + 0.5 / 3])

    def model(x):
        which = pyro.sample("which", dist.Bernoulli(0.3))
        table = choices[which.long()]
        with pyro.plate("sequences", len(x)):
            z = torch.tensor(0)
            for t in pyro.markov(range(length)):
                row = (table * torch.nn.functional.one_hot(z, 3).unsqueeze(-1)).sum(-2)
                z = pyro.sample(f"z_{t}", dist.Categorical(row), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(LEVELS[z], 1.0), obs=x[:, t])

    x = 2 * torch.randn(3, length)
    guide = auto_faithful_guide(model, x, init="random")
    assert len(guide.model_graph.marginalised) == length
    assert guide.plan.blocks[0].per_element == ("which",)
    seen = dist.Normal(LEVELS, 1.0).log_prob(x.T.unsqueeze(-1))
    each = torch.stack([forward_algorithm(seen, table).sum() for table in choices])
    joint = torch.tensor([0.7, 0.3]).log() + each
    guide.set_linear_("which", {}, joint[1] - joint[0])
    for _ in range(3):
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
        assert loss == pytest.approx(-joint.logsumexp(0).item())


# ---------------------------------------------------------------- starts where the model sums over sites


@config_enumerate
def two_components(y):
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(locs[z], 1.0), obs=y)


def two_components_data():
    y = torch.cat([-3.0 + torch.randn(9), 2.0 + torch.randn(21)])
    one, other = (
        torch.linspace(-6.0, 5.0, 221).double().view(-1, 1, 1),
        torch.linspace(-6.0, 5.0, 221).double(),
    )
    wide = y.double()
    each = torch.logaddexp(
        math.log(0.3) + dist.Normal(one, 1.0).log_prob(wide),
        math.log(0.7) + dist.Normal(other.unsqueeze(-1), 1.0).log_prob(wide),
    )
    prior = dist.Normal(0.0, 5.0)
    joint = each.sum(-1) + prior.log_prob(one[..., 0]) + prior.log_prob(other)
    return (y,), torch.logsumexp(joint.flatten(), 0).item() + 2 * math.log(11.0 / 220)


@config_enumerate
def zero_inflated(size, y):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 2.0))
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(share))
        pyro.sample("y", dist.Poisson(size * rate * z + 1e-6), obs=y)


def zero_inflated_data():
    size = 1.0 + 4.0 * torch.rand(30)
    y = torch.where(torch.rand(30) < 0.6, torch.poisson(3.0 * size), torch.zeros(30))
    log_rate, share = (
        torch.linspace(0.3, 2.0, 201).double().view(-1, 1, 1),
        ((torch.arange(200) + 0.5) / 200).double(),
    )
    means = size.double() * log_rate.exp() + 1e-6, torch.full((30,), 1e-6).double()
    seen, not_seen = (dist.Poisson(mean).log_prob(y.double()) for mean in means)
    each = torch.logaddexp(
        share.log().unsqueeze(-1) + seen,
        (1 - share).log().unsqueeze(-1) + not_seen,
    )
    joint = each.sum(-1) + dist.Normal(0.0, 2.0).log_prob(log_rate[..., 0])
    return (size, y), torch.logsumexp(joint.flatten(), 0).item() + math.log(1.7 / 200 / 200)


@config_enumerate
def switching(y):
    low, high = pyro.sample("low", dist.Normal(0.0, 5.0)), pyro.sample("high", dist.Normal(0.0, 5.0))
    z = torch.zeros(())
    for t in pyro.markov(range(len(y))):
        stay = torch.tensor([0.2, 0.9])[z.long()] if t else torch.tensor(0.5)
        z = pyro.sample(f"z_{t}", dist.Bernoulli(stay))
        pyro.sample(f"y_{t}", dist.Normal(torch.where(z == 1, high, low), 1.0), obs=y[t])


def switching_data():
    y = torch.cat([-3.0 + torch.randn(5), 2.5 + torch.randn(6)])
    low, high = torch.linspace(-7.0, 7.0, 281).double().view(-1, 1), torch.linspace(-7.0, 7.0, 281).double()
    prior = dist.Normal(0.0, 5.0)
    forward = [torch.tensor(0.5).double().log().expand(281, 281)] * 2
    moves = torch.tensor([[0.8, 0.2], [0.1, 0.9]]).double().log()
    for t, value in enumerate(y.double()):
        if t:
            forward = [torch.logaddexp(forward[0] + moves[0, k], forward[1] + moves[1, k]) for k in (0, 1)]
        forward = [
            own + dist.Normal(loc, 1.0).log_prob(value) for own, loc in zip(forward, (low, high), strict=True)
        ]
    joint = torch.logaddexp(*forward) + prior.log_prob(low) + prior.log_prob(high)
    return (y,), torch.logsumexp(joint.flatten(), 0).item() + 2 * math.log(14.0 / 280)


SUMMED = {
    "mixture": (two_components, two_components_data),
    "zero-inflated": (zero_inflated, zero_inflated_data),
    "chain": (switching, switching_data),
}


def summed_loss(model, guide, args, number=60):
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    with torch.no_grad():
        return sum(elbo.loss(model, guide, *args) for _ in range(number)) / number


@pytest.mark.parametrize(
    "name", ["mixture", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero-inflated", "chain"))]
)
def test_where_the_model_sums_over_sites_the_start_is_at_the_posterior(name, dtype):
    model, make = SUMMED[name]
    args, evidence = make()
    guide = auto_faithful_guide(model, *args)
    assert "the start is 'mode'" in guide.describe(verbose=True)
    assert -0.1 < summed_loss(model, guide, args) + evidence < 0.5


def shares(x, rows):
    """A plate of which a call has part: its effects count more than once, assignments are summed over."""
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(x), subsample=rows):
        k = pyro.sample("k", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(4 * k + effect, 1.0), obs=x[rows])


def test_no_start_is_chosen_by_a_sum_that_ignores_scales():
    """Effects counted ten times beside data counted once made the worse start look the better one."""
    x = torch.randn(200) + 4 * (torch.rand(200) > 0.5)
    notes = auto_faithful_guide(shares, x, torch.arange(20)).describe(verbose=True)
    assert "nats for the data of set-up" not in notes
    whole = auto_faithful_guide(shares, x[:20], torch.arange(20)).describe(verbose=True)
    assert "nats for the data of set-up" in whole  # without a scale there is a choice


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-3, 1e-2])
@pytest.mark.parametrize("name", SUMMED)
def test_training_keeps_starts_where_the_model_sums_over_sites(name, rate, dtype):
    model, make = SUMMED[name]
    args, evidence = make()
    guide = auto_faithful_guide(model, *args)
    steps = training(model, guide, args, rate, TraceEnum_ELBO(max_plate_nesting=1))
    check_losses(steps, lambda: summed_loss(model, guide, args, number=300) + evidence, 0.9)


def test_latents_below_summed_sites_say_why_there_is_no_mode():
    @config_enumerate
    def model(y):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        x = pyro.sample("x", dist.Normal(3.0 * z, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    with pytest.raises(UnsupportedModelError, match="x depends on a site that the model sums over"):
        find_mode(model, (torch.zeros(3),), {}, trace_model(model, (torch.zeros(3),)))
