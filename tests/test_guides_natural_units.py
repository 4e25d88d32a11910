"""Starts that training cannot make worse: on random models with an exact answer, and on models that once were lost."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from plated_gaussians import random_model
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from training_paths import check_path, expected_loss, train

from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.guides.conditionals.pooling import DeepSet, DeepSetPool
from pyro_graphflows.infer import importance_log_weights


@pytest.fixture(autouse=True)
def _single_precision(_clean_slate):
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------- random models


def check_random_model(seed, family, lr):
    _, model, args, options, evidence = random_model(seed)
    pyro.set_rng_seed(0)
    guide = auto_faithful_guide(model, *args, family=family, **options)
    check_path(train(model, guide, args, lr, num_particles=20), -evidence)


@pytest.mark.parametrize(
    ("seed", "family"),
    [
        (0, "normal"),
        (1, "flow"),
        (3, "flow"),
        (4, "normal"),
        (5, "flow"),
    ],
)
def test_training_keeps_the_starts_of_random_models(seed, family):
    check_random_model(seed, family, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("family", ["normal", "flow"])
@pytest.mark.parametrize("seed", range(40))
def test_training_keeps_the_starts_of_many_random_models(seed, family, lr):
    check_random_model(seed, family, lr)


# ---------------------------------------------------------------- models whose starts were lost


def groups(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("g", y.shape[0], dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("d", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def crossed(y):
    rows, columns = pyro.plate("a", y.shape[0], dim=-2), pyro.plate("b", y.shape[1], dim=-1)
    with rows:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with columns:
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
    with rows, columns:
        pyro.sample("y", dist.Normal(u + v, 0.5), obs=y)


def log_evidence(model, y):
    i, j = y.shape
    rows, columns = torch.eye(i).repeat_interleave(j, 0), torch.eye(j).repeat(i, 1)
    covariance = rows @ rows.T
    if model is groups:
        covariance = covariance + 4.0 + torch.eye(i * j)
    else:
        covariance = covariance + columns @ columns.T + 0.25 * torch.eye(i * j)
    return float(
        dist.MultivariateNormal(torch.zeros(i * j).double(), covariance.double()).log_prob(y.flatten())
    )


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("family", ["normal", "flow"])
@pytest.mark.parametrize("model", [groups, crossed])
def test_an_exact_start_from_pooled_summaries_survives(model, family, lr):
    y = torch.randn((8, 5) if model is groups else (4, 5))
    y = y + torch.randn(len(y), 1)
    guide = auto_faithful_guide(model, y, pool="deepset", family=family)
    path = train(model, guide, (y,), lr, num_particles=20)
    exact = -log_evidence(model, y)
    assert path[0][0] - exact < 0.1
    check_path(path, exact)


def test_crossed_effects_start_at_the_posterior_of_data_of_any_size():
    def gap(guide, shape):
        rows, columns = shape
        y = torch.randn(rows, 1) + torch.randn(1, columns) + 0.5 * torch.randn(shape)
        return expected_loss(crossed, guide, (y,), repeats=2)[0] + log_evidence(crossed, y)

    guide = auto_faithful_guide(crossed, torch.zeros(20, 30), pool="deepset", family="normal")
    for shape in (
        (20, 30),
        (10, 4),
        (3, 7),
        (2, 2),
    ):  # sizes but the first are learned from a part of each draw
        assert sum(gap(guide, shape) for _ in range(5)) / 5 < 0.1


REGRESSIONS = {
    "rates": (2.5, lambda: dist.HalfNormal(1.0), False),
    "heavy tail": (2.5, lambda: dist.HalfCauchy(2.5), False),
    "raw units": (100.0, lambda: dist.HalfNormal(20.0), True),
    "raw units, heavy tail": (100.0, lambda: dist.HalfCauchy(2.5), True),
}


def regression(name, n=434):
    width, scale, raw = REGRESSIONS[name]
    x = 100 + 15 * torch.randn(n) if raw else torch.randn(n)
    y = 26 + 0.56 * x + 18 * torch.randn(n) if raw else 0.5 * x + torch.randn(n)

    def model(x, y):
        a = pyro.sample("a", dist.Normal(0.0, width))
        b = pyro.sample("b", dist.Normal(0.0, width))
        sigma = pyro.sample("sigma", scale())
        with pyro.plate("N", len(y)):
            pyro.sample("y", dist.Normal(a + b * x, sigma), obs=y)

    return model, (x, y)


def exact_regression_loss(name, x, y):
    """Minus the log evidence: both weights in closed form, the scale by the trapezium rule."""
    width, scale, _ = REGRESSIONS[name]
    x, y = x.double(), y.double()
    design = torch.stack([torch.ones_like(x), x], -1)
    fit = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    log_sigma = (y - design @ fit).std().log() + torch.linspace(-8.0, 8.0, 2001).double() / len(y) ** 0.5
    sigma = log_sigma.exp()[:, None]
    zero, factor = torch.zeros(len(y)).double(), (width * design).expand(len(sigma), *design.shape)
    data = dist.LowRankMultivariateNormal(zero, factor, sigma.square().expand(-1, len(y))).log_prob(y)
    log_density = data + scale().log_prob(log_sigma.exp()) + log_sigma
    peak = log_density.max()
    return -float(peak + torch.trapezoid((log_density - peak).exp(), log_sigma).log())


def check_ends_below_its_start(model, args, lr, exact=None, **options):
    guide = auto_faithful_guide(model, *args, **options)
    path = train(model, guide, args, lr)
    check_path(path, exact)
    return guide, path


def test_a_regression_in_raw_units_trains():
    model, args = regression("raw units", n=60)
    exact = exact_regression_loss("raw units", *args)
    check_ends_below_its_start(model, args, 1e-2, exact, pool="deepset", num_start_samples=3000)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("family", ["normal", "flow"])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_regressions_train(name, family, lr):
    """The starts are within 0.02 nats of the posterior, and Adam at 1e-2 moves a flow to 0.07 nats off."""
    model, args = regression(name)
    exact = exact_regression_loss(name, *args)
    _, path = check_ends_below_its_start(model, args, lr, exact, pool="deepset", family=family)
    assert path[0][0] - exact < 0.03 + 4 * path[0][1]


def item_response(scale, items=20, persons=100):
    def model(y):
        spread = pyro.sample("s_theta", scale())
        spread_a, spread_b = pyro.sample("s_a", scale()), pyro.sample("s_b", scale())
        mean_b = pyro.sample("mu_b", dist.Normal(0.0, 5.0))
        plates = pyro.plate("items", y.shape[0], dim=-2), pyro.plate("persons", y.shape[1], dim=-1)
        with plates[1]:
            theta = pyro.sample("theta", dist.Normal(0.0, spread))
        with plates[0]:
            a = pyro.sample("a", dist.LogNormal(0.0, spread_a))
            b = pyro.sample("b", dist.Normal(mean_b, spread_b))
        with plates[0], plates[1]:
            pyro.sample("y", dist.Bernoulli(logits=a * (theta - b)), obs=y)

    return model, (torch.bernoulli(torch.sigmoid(torch.randn(persons) - torch.randn(items, 1))),)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("scale", [dist.HalfCauchy, dist.HalfNormal])
def test_item_response_trains(scale, lr):
    model, args = item_response(lambda: scale(2.0))
    check_ends_below_its_start(model, args, lr)


def topics(docs):
    with pyro.plate("topics", 2):
        beta = pyro.sample("beta", dist.Dirichlet(torch.ones(6)))
    with pyro.plate("docs", docs.shape[1]):
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", docs.shape[0]):
            z = pyro.sample("z", dist.Categorical(theta), infer={"enumerate": "parallel"})
            pyro.sample("w", dist.Categorical(beta[z]), obs=docs)


def test_members_of_a_summary_whose_plates_have_one_dimension_are_pooled_apart():
    docs = torch.randint(0, 6, (5, 4))
    guide = auto_faithful_guide(topics, docs, pool="deepset", num_start_samples=300)
    assert "theta | beta (pooled), w (pooled)" in guide.describe()
    assert [node.name for node in guide.plan.blocks[1].context] == [
        "pooled(beta; topics)",
        "pooled(w; words)",
    ]
    assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=2).loss(topics, guide, docs))


# ---------------------------------------------------------------- what a start rests on


def test_a_regression_start_rests_on_what_is_not_trained():
    y = torch.randn(6, 4)
    guide = auto_faithful_guide(groups, y, pool=DeepSet(sums=False), num_start_samples=500)
    for block in guide.blocks:
        learned = block.inputs.learned
        assert learned.sum() >= 16
        offset = block.conditionals.network.units.offset
        assert offset[:, : len(learned)][:, learned].abs().max() == 0
        assert offset[:, : len(learned)][:, ~learned].abs().max() > 0
    before = expected_loss(groups, guide, (y,), num_particles=20)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if ".pools." in name:
                parameter.normal_()
    after = expected_loss(groups, guide, (y,), num_particles=20)
    assert abs(after[0] - before[0]) < 5 * math.hypot(after[1], before[1])


def test_random_features_are_no_parameters():
    guide = auto_faithful_guide(groups, torch.randn(6, 4), pool="deepset", num_start_samples=200)
    pools = [module for module in guide.modules() if isinstance(module, DeepSetPool)]
    assert pools
    for pool in pools:
        names = [name for name, _ in pool.named_parameters()]
        assert names
        assert not any("random" in name for name in names)
        assert any("random" in name for name in pool.state_dict())


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_a_state_with_its_units_loads(family):
    y = torch.randn(5, 3)
    guide, other = (
        auto_faithful_guide(groups, y, pool="deepset", family=family, num_start_samples=500) for _ in range(2)
    )
    for value in other.state_dict().values():
        if value.is_floating_point():
            value.mul_(2.0)
    optim = torch.optim.Adam(guide.parameters(), lr=1e-2)
    Trace_ELBO(max_plate_nesting=2).differentiable_loss(groups, guide, y).backward()
    optim.step()
    other.load_state_dict(guide.state_dict())
    latents = guide(y)
    assert guide.log_prob(latents, y).tolist() == pytest.approx(other.log_prob(latents, y).tolist(), rel=1e-4)


@pytest.mark.slow
def test_item_response_ends_above_mean_field():
    model, args = item_response(lambda: dist.HalfNormal(2.0))
    losses = {}
    for name, make in {"ours": auto_faithful_guide, "mean field": None}.items():
        pyro.set_rng_seed(0)
        guide = AutoNormal(model) if make is None else make(model, *args)
        guide(*args)
        elbo = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=2)
        optim = torch.optim.Adam(guide.parameters(), lr=1e-2)
        for _ in range(600):
            optim.zero_grad()
            elbo.differentiable_loss(model, guide, *args).backward()
            optim.step()
        losses[name] = expected_loss(model, guide, args)
    assert losses["ours"][0] < losses["mean field"][0] + 4 * math.hypot(
        losses["ours"][1], losses["mean field"][1]
    )


def test_training_moves_crossed_effects_little():
    """A hundred persons and twenty items: what all elements share moves them at once, and learned features drift."""

    def model(person, item, y):
        mean = pyro.sample("mean", dist.Normal(0.75, 1.0))
        with pyro.plate("items", 20):
            difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        with pyro.plate("persons", 100):
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("answers", len(y)):
            logits = mean + ability[..., person] - difficulty[..., item]
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    generator = torch.Generator().manual_seed(0)
    person, item = torch.arange(100).repeat_interleave(20), torch.arange(20).repeat(100)
    logits = 0.7 + torch.randn(100, generator=generator)[person] - torch.randn(20, generator=generator)[item]
    y = torch.bernoulli(torch.sigmoid(logits), generator=generator)
    pyro.set_rng_seed(0)
    guide = auto_faithful_guide(model, person, item, y)

    def loss():
        return -float(
            importance_log_weights(model, guide, person, item, y, num_particles=200, data_plate=False).mean()
        )

    start = loss()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for steps in (10, 40):
        for _ in range(steps):
            svi.step(person, item, y)
        assert loss() < start + 2.0


def test_training_moves_vectors_in_a_plate_little():
    """Twenty walks of twelve steps: what mixes the numbers of a vector has most of the weights, and adds most noise."""
    walk = 0.3 * torch.ones(12, 12).tril()

    def model(y):
        with pyro.plate("walks", 20):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(12), scale_tril=walk))
            pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    generator = torch.Generator().manual_seed(0)
    y = torch.randn(20, 12, generator=generator) @ walk.T + 0.5 * torch.randn(20, 12, generator=generator)
    evidence = (
        dist.MultivariateNormal(torch.zeros(12), walk @ walk.T + 0.25 * torch.eye(12)).log_prob(y).sum()
    )
    pyro.set_rng_seed(0)
    guide = auto_faithful_guide(model, y)
    loss, error = expected_loss(model, guide, (y,), 500)
    assert loss + evidence < 0.4 + 4 * error
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for steps in (10, 10, 30):
        for _ in range(steps):
            svi.step(y)
        later, error = expected_loss(model, guide, (y,), 500)
        assert later < loss + 2.5 + 4 * error  # 3.6 in units as of other numbers
