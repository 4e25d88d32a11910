"""Sites with one factor for each element of a plate: conjugate models, groups of any size, empty ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from training_paths import check_path, train

from pyro_graphflows import GraphflowsError, UnsupportedModelError, auto_faithful_guide
from pyro_graphflows.guides import DeepSet, Normal, load_guide
from pyro_graphflows.infer import InferenceCompilation


def summed(guide):
    """The sites with factors of elements."""
    return {site for block in guide.blocks for site in block.site_elements()}


def hierarchy(x):
    """Groups with unknown location, spread and noise; data (n, groups)."""
    mu = pyro.sample("mu", dist.Normal(1.0, 3.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.7))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("data", x.shape[-2], dim=-2):
            pyro.sample("x", dist.Normal(theta, sigma), obs=x)


def two_levels(x, tau=1.0, sigma=1.0):
    """Groups with known spread and noise."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("data", x.shape[-2], dim=-2):
            pyro.sample("x", dist.Normal(theta, sigma), obs=x)


def looked_up(y, group, num_groups):
    """Data that look up their group by an index."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", num_groups):
        theta = pyro.sample("theta", dist.Normal(mu, 1.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta[group], 0.5), obs=y)


def slopes(t, y):
    """A slope and an intercept for each group, of which the slope is sampled last."""
    with pyro.plate("groups", y.shape[-1], dim=-1):
        b = pyro.sample("b", dist.Normal(0.5, 1.0))
        with pyro.plate("data", y.shape[-2], dim=-2):
            pyro.sample("y", dist.Normal(b * t, 0.7), obs=y)


def intercepts(t, y):
    """Intercepts beside a common slope, which is sampled before them."""
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", y.shape[-1], dim=-1):
        a = pyro.sample("a", dist.Normal(0.5, 1.0))
        with pyro.plate("data", y.shape[-2], dim=-2):
            pyro.sample("y", dist.Normal(a + beta * t, 0.7), obs=y)


def conditional(guide, args, given, site):
    """The guide's normal conditional of a site, given values of the sites before it."""
    values = {name: torch.as_tensor(value) for name, value in given.items()}
    with torch.no_grad():
        nodes = poutine.trace(poutine.condition(guide, values)).get_trace(*args).nodes
    fn = nodes[site]["fn"]
    while not isinstance(fn, dist.Normal):
        fn = getattr(fn, "base_dist", None) or fn.normal
    return fn.loc, fn.scale


def divergence(exact, guide):
    """KL(exact || guide) of normals, in nats, elementwise."""
    (a, s), (b, t) = exact, guide
    return (t / s).log() + (s**2 + (a - b) ** 2) / (2 * t**2) - 0.5


def normal_posterior(loc, scale, precision, weighted):
    total = scale**-2 + precision
    return (loc * scale**-2 + weighted) / total, total**-0.5


# ---------------------------------------------------------------- exact answers


def test_effects_are_exact_at_every_value_of_the_hyperparameters_and_for_every_size():
    guide = auto_faithful_guide(hierarchy, torch.zeros(4, 10), pool="deepset", num_start_samples=2000)
    assert summed(guide) >= {"theta"}
    assert "one factor for each element" in guide.describe()
    for n, groups in ((1, 3), (4, 10), (60, 2)):
        for mu, tau, sigma in ((0.0, 1.0, 1.0), (-5.0, 0.02, 0.3), (8.0, 20.0, 4.0), (1.0, 3.0, 0.25)):
            theta = mu + tau * torch.randn(groups)
            x = theta + sigma * torch.randn(n, groups)
            got = conditional(guide, (x,), {"mu": mu, "tau": tau, "sigma": sigma}, "theta")
            exact = normal_posterior(mu, tau, n / sigma**2, x.sum(0) / sigma**2)
            # an intercept is a regression's: its error counts beside the narrowest posterior, 0.03
            assert float(divergence(exact, got).max()) < 1.5e-2, (n, mu, tau, sigma)


def test_a_location_is_exact_for_any_number_of_groups_and_of_data():
    guide = auto_faithful_guide(two_levels, torch.zeros(4, 6), pool="deepset", num_start_samples=2000)
    assert summed(guide) == {"mu", "theta"}
    for n, groups in ((1, 2), (4, 6), (9, 50)):
        theta = 1.5 + torch.randn(groups)
        x = theta + torch.randn(n, groups)
        variance = 1.0 + 1.0 / n
        exact = normal_posterior(0.0, 2.0, torch.tensor(groups / variance), x.mean(0).sum() / variance)
        draws = exact[0] + exact[1] * torch.randn(500)
        with torch.no_grad():
            given = {"mu": draws.reshape(-1, 1, 1)}
            nodes = poutine.trace(poutine.condition(guide, given)).get_trace(x).nodes
            log_q = nodes["mu"]["fn"].log_prob(given["mu"]).reshape(-1)
        off = dist.Normal(*exact).log_prob(draws) - log_q
        assert float(off.mean()) < 3e-3 + 4 * float(off.std()) / math.sqrt(len(off))


@pytest.mark.parametrize("model", [slopes, intercepts])
def test_covariates_of_the_elements(model):
    t = torch.randn(6, 5)
    guide = auto_faithful_guide(model, t, torch.zeros(6, 5), pool="deepset", num_start_samples=2000)
    site = "b" if model is slopes else "a"
    assert site in summed(guide)
    t = torch.randn(11, 3)
    if model is slopes:
        given, y = {}, torch.randn(3) * t + 0.7 * torch.randn(11, 3)
        exact = normal_posterior(0.5, 1.0, (t**2).sum(0) / 0.49, (t * y).sum(0) / 0.49)
    else:
        given, y = {"beta": -1.3}, torch.randn(3) - 1.3 * t + 0.7 * torch.randn(11, 3)
        exact = normal_posterior(0.5, 1.0, torch.tensor(11 / 0.49), (y + 1.3 * t).sum(0) / 0.49)
    assert float(divergence(exact, conditional(guide, (t, y), given, site)).max()) < 4e-3


def test_groups_by_an_index_of_any_number_some_without_data():
    group = torch.arange(40) % 5
    guide = auto_faithful_guide(looked_up, torch.zeros(40), group, 5, pool="deepset", num_start_samples=2000)
    assert "theta" in summed(guide)
    group = torch.tensor([0, 0, 2, 5, 5, 5])
    y = torch.randn(6)
    got = conditional(guide, (y, group, 7), {"mu": 0.4}, "theta")
    count = torch.bincount(group, minlength=7).double()
    total = torch.zeros(7).index_add(0, group, y)
    exact = normal_posterior(0.4, 1.5, count / 0.25, total / 0.25)
    assert float(divergence(exact, got).max()) < 4e-3
    empty = count == 0
    assert torch.equal(got[0][empty], torch.full_like(got[0][empty], 0.4))
    torch.testing.assert_close(got[1][empty], torch.full_like(got[1][empty], 1.5), rtol=1e-14, atol=0.0)


def disturb_(guide, width=0.3):
    """Move all parameters by random numbers."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(width * torch.randn_like(parameter))


@pytest.mark.parametrize("family", ["normal", "spline"])
def test_an_empty_group_has_its_prior_whatever_was_learned(family):
    group = torch.arange(40) % 5
    args = torch.randn(40), group, 5
    guide = auto_faithful_guide(looked_up, *args, pool="deepset", family=family, num_start_samples=1000)
    disturb_(guide)
    values = {"mu": torch.tensor(0.4), "theta": torch.randn(6)}
    args = torch.randn(4), torch.tensor([0, 0, 3, 3]), 6
    nodes = poutine.trace(poutine.condition(guide, values)).get_trace(*args).nodes
    log_q = nodes["theta"]["fn"].log_prob(values["theta"])
    prior = dist.Normal(0.4, 1.5).log_prob(values["theta"])
    there = torch.tensor([0, 3])
    torch.testing.assert_close(log_q[[1, 2, 4, 5]], prior[[1, 2, 4, 5]], rtol=1e-12, atol=1e-12)
    assert not torch.isclose(log_q[there], prior[there]).any()


def masked(x, mask):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("data", x.shape[-2], dim=-2), poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(theta, 0.8), obs=x)


def test_elements_that_are_masked_do_not_count():
    full = torch.ones(5, 8, dtype=torch.bool)
    guide = auto_faithful_guide(masked, torch.zeros(5, 8), full, pool="deepset", num_start_samples=2000)
    if "theta" not in summed(guide):  # joint samples are not what a mask says: no start, and no sums
        assert "regression start" in guide.describe()
    mask = torch.rand(5, 8) < 0.5
    mask[:, 0] = False
    x = torch.where(mask, torch.randn(5, 8), torch.tensor(1e6))
    got = conditional(guide, (x, mask), {"mu": 0.3}, "theta")
    if "theta" in summed(guide):
        exact = normal_posterior(0.3, 1.0, mask.sum(0) / 0.64, torch.where(mask, x, 0.0).sum(0) / 0.64)
        assert float(divergence(exact, got).max()) < 4e-3
        assert got[0][0] == pytest.approx(0.3, abs=1e-12)


# ---------------------------------------------------------------- masks, shapes, calls


def test_a_factor_reads_its_own_elements_and_what_is_above():
    x = torch.randn(4, 6, requires_grad=True)
    guide = auto_faithful_guide(hierarchy, x.detach(), pool="deepset", num_start_samples=1000)
    disturb_(guide, 0.1)
    given = {"mu": torch.tensor(0.5), "tau": torch.tensor(1.2), "sigma": torch.tensor(0.8)}
    nodes = poutine.trace(poutine.condition(guide, given)).get_trace(x).nodes
    terms = nodes["theta"]["fn"].log_prob(torch.linspace(-1.0, 1.0, 6))
    for j in range(6):
        (gradient,) = torch.autograd.grad(terms[j], x, retain_graph=True)
        others = torch.arange(6) != j
        assert (gradient[:, others] == 0).all()
        assert (gradient[:, j] != 0).all()


def test_what_is_sampled_later_is_not_read():
    x = torch.randn(4, 6)
    guide = auto_faithful_guide(hierarchy, x, pool="deepset", num_start_samples=1000)
    disturb_(guide, 0.1)
    given = {"mu": torch.tensor(0.5), "tau": torch.tensor(1.2), "sigma": torch.tensor(0.8)}
    order = [site for block in guide.plan.blocks for site in block.sites]
    for position, site in enumerate(order[:-1]):
        for later in order[position + 1 : -1]:
            moved = {**given, later: given[later] * 1.7}
            one, other = (
                poutine.trace(poutine.condition(guide, values)).get_trace(x).nodes[site]["fn"]
                for values in (given, moved)
            )
            torch.testing.assert_close(one.log_prob(given[site]), other.log_prob(given[site]), rtol=0, atol=0)


def test_many_particles_at_once_are_as_many_calls():
    x = torch.randn(4, 6)
    guide = auto_faithful_guide(hierarchy, x, pool="deepset", num_start_samples=1000)
    disturb_(guide, 0.1)
    with pyro.plate("particles", 3, dim=-3):
        trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    names = ("mu", "tau", "sigma", "theta")
    for i in range(3):
        own = {name: trace.nodes[name]["value"][i].reshape(-1) for name in names}
        own = {name: value if name == "theta" else value.reshape(()) for name, value in own.items()}
        log_q = guide.log_prob(own, x)
        together = sum(trace.nodes[name]["log_prob"][i].sum() for name in names)
        torch.testing.assert_close(together, log_q)


def test_batches_of_groups_are_read_in_full_and_batches_of_their_data_refused():
    x = torch.randn(5, 30) + torch.randn(30)

    def batches(x, size=6):
        with pyro.plate("groups", x.shape[-1], subsample_size=size, dim=-1) as rows:
            theta = pyro.sample("theta", dist.Normal(0.5, 1.0))
            with pyro.plate("data", x.shape[-2], dim=-2):
                pyro.sample("x", dist.Normal(theta, 0.5), obs=x[:, rows])

    guide = auto_faithful_guide(batches, x, pool="deepset", num_start_samples=2000)
    assert summed(guide) == {"theta"}
    with torch.no_grad():
        nodes = poutine.trace(guide).get_trace(x).nodes
    rows = nodes["groups"]["value"]
    exact = normal_posterior(0.5, 1.0, torch.tensor(5 / 0.25), x[:, rows].sum(0) / 0.25)
    fn = nodes["theta"]["fn"]
    while not hasattr(fn, "loc"):
        fn = getattr(fn, "base_dist", None) or fn.normal
    assert float(divergence(exact, (fn.loc, fn.scale)).max()) < 4e-3

    def batches_of_data(x):
        with pyro.plate("groups", x.shape[-1], dim=-1):
            theta = pyro.sample("theta", dist.Normal(0.5, 1.0))
            with pyro.plate("data", x.shape[-2], subsample_size=2, dim=-2) as rows:
                pyro.sample("x", dist.Normal(theta, 0.5), obs=x[rows])

    with pytest.raises(UnsupportedModelError, match="not a bound on the evidence"):
        auto_faithful_guide(batches_of_data, x, pool="deepset", num_start_samples=100)


def test_set_by_hand_it_is_the_exact_posterior():
    x = torch.randn(4, 6) + torch.randn(6)
    guide = auto_faithful_guide(two_levels, x, pool="deepset", family="normal", num_start_samples=500)
    disturb_(guide)
    guide.set_fused_("theta", {"x": 1.0}, 0.0, 1.0)
    n = 9
    x = torch.randn(n, 3)
    got = conditional(guide, (x,), {"mu": 0.7}, "theta")
    exact = normal_posterior(0.7, 1.0, torch.tensor(float(n)), x.sum(0))
    assert float(divergence(exact, got).max()) < 1e-10
    with pytest.raises(
        GraphflowsError, match="Expected weights of what the factors of elements of 'theta' read"
    ):
        guide.block_of("theta").set_linear_("theta", {"nu": 1.0}, 0.0, 1.0, fused=True)
    with pytest.raises(GraphflowsError, match="positive scale"):
        guide.set_fused_("theta", {"x": 1.0}, 0.0, -1.0)
    guide.set_linear_("theta", {"mu": 0.2}, 0.0, 0.4)
    loc, scale = conditional(guide, (x,), {"mu": 0.7}, "theta")
    torch.testing.assert_close(loc, torch.full_like(loc, 0.14))
    torch.testing.assert_close(scale, torch.full_like(scale, 0.4))


def test_they_are_saved_and_loaded(tmp_path):
    x = torch.randn(4, 6)
    guide = auto_faithful_guide(hierarchy, x, pool="deepset", num_start_samples=500)
    disturb_(guide, 0.1)
    guide.save(tmp_path / "guide.safetensors")
    loaded = load_guide(tmp_path / "guide.safetensors", hierarchy)
    latents = {"mu": 0.5, "tau": 1.2, "sigma": 0.8, "theta": torch.randn(6)}
    latents = {name: torch.as_tensor(value) for name, value in latents.items()}
    torch.testing.assert_close(loaded.log_prob(latents, x), guide.log_prob(latents, x))
    assert summed(loaded) == summed(guide)
    other = auto_faithful_guide(hierarchy, x, pool="deepset", init="random", num_start_samples=500)
    assert not summed(other)
    other.load_state_dict(guide.state_dict())
    torch.testing.assert_close(other.log_prob(latents, x), guide.log_prob(latents, x))


# ---------------------------------------------------------------- which sites


def test_scales_before_their_location_are_read_from_the_summary():
    guide = auto_faithful_guide(hierarchy, torch.zeros(4, 10), pool="deepset", num_start_samples=1000)
    allowed = {site for block in guide.plan.blocks for site in block.summed}
    order = [site for block in guide.plan.blocks for site in block.sites]
    assert allowed == set(order[2:])  # two of the three tie the groups together while they are not known
    assert "theta" in allowed


def test_the_summary_alone_if_it_is_asked_for():
    guide = auto_faithful_guide(
        two_levels, torch.zeros(4, 6), pool=DeepSet(sums=False), num_start_samples=500
    )
    assert not summed(guide)
    assert not guide.plan.priors.sites
    off = auto_faithful_guide(
        two_levels, torch.zeros(4, 6), pool="deepset", family=Normal(fusion=False), num_start_samples=500
    )
    assert not summed(off)


def counts(x):
    mu = pyro.sample("mu", dist.Normal(0.5, 0.5))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("data", x.shape[-2], dim=-2):
            pyro.sample("x", dist.Poisson(theta.exp()), obs=x)


def held_out(model, guide, args, names, number=50):
    """The mean of -log q over joint samples, with its standard error."""
    losses = []
    for _ in range(number):
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*args)
        values = {name: trace.nodes[name]["value"] for name in names}
        losses.append(-guide.log_prob(values, trace.nodes["x"]["value"]))
    found = torch.stack(losses).detach()
    return float(found.mean()), float(found.std()) / math.sqrt(number)


def test_the_start_of_other_models_is_no_worse_than_that_from_the_summary():
    x = torch.ones(3, 5)
    losses = {}
    for sums in (True, False):
        guide = auto_faithful_guide(counts, x, pool=DeepSet(sums=sums), num_start_samples=1000)
        torch.manual_seed(3)
        losses[sums] = held_out(counts, guide, (x,), ("mu", "theta"))
    (mine, error), (other, other_error) = losses[True], losses[False]
    assert mine <= other + 0.01 * 6 + 4 * math.hypot(error, other_error)


# ---------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-2, 1e-3])
def test_training_keeps_the_start(lr):
    torch.set_default_dtype(torch.float32)
    x = 30.0 * torch.randn(12) + 10.0 * torch.randn(5, 12)

    def model(x):
        return two_levels(x / 10.0, tau=3.0)

    guide = auto_faithful_guide(model, x, pool="deepset", num_start_samples=3000)
    assert summed(guide) == {"mu", "theta"}
    between = torch.block_diag(*[torch.full((5, 5), 9.0)] * 12) + 4.0 + torch.eye(60)
    y = (x / 10.0).T.reshape(-1)
    evidence = dist.MultivariateNormal(torch.zeros(60).double(), between.double()).log_prob(y.double())
    path = train(model, guide, (x,), lr)
    assert path[0][0] + float(evidence) < 0.1
    check_path(path, -float(evidence))


def test_simulations_of_varying_sizes_keep_the_start():
    torch.set_default_dtype(torch.float32)
    guide = auto_faithful_guide(two_levels, torch.zeros(4, 8), pool="deepset", num_start_samples=2000)

    def worst():
        found = []
        for n, groups in ((2, 4), (9, 12)):
            theta = torch.randn(groups) + 1.0
            x = theta + torch.randn(n, groups)
            exact = normal_posterior(0.3, 1.0, torch.tensor(float(n)), x.sum(0))
            found.append(divergence(exact, conditional(guide, (x,), {"mu": 0.3}, "theta")).mean())
        return float(torch.stack(found).max())

    assert worst() < 4e-3
    compilation = InferenceCompilation(
        two_levels, guide, torch.optim.Adam(guide.parameters(), lr=1e-2), batch_size=32
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        n, groups = (int(torch.randint(2, 12, (), generator=generator)) for _ in range(2))
        compilation.step(torch.zeros(n, groups))
    assert worst() < 0.05
