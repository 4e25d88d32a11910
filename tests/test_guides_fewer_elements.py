"""Sizes of plates: what summaries know of them, and factors beside priors that follow them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_graphflows import auto_faithful_guide, get_model_graph
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.fewer_elements import fit_sizes, some_elements
from pyro_graphflows.guides.plan import Summary
from pyro_graphflows.guides.sites import SitePrior
from pyro_graphflows.inspect import sample_prior


def hierarchy(x):
    """Groups with unknown location, spread and noise; data (n, groups)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("data", x.shape[-2], dim=-2):
            pyro.sample("x", dist.Normal(theta, sigma), obs=x)


# ---------------------------------------------------------------- which elements count


def states(n, groups):
    return {
        "data": PlateState("data", -2, n, n, None),
        "groups": PlateState("groups", -1, groups, groups, None),
    }


def test_some_elements_count_in_each_draw_and_never_none():
    graph = get_model_graph(hierarchy, (torch.zeros(4, 6),))
    plates = states(4, 6)
    summary = Summary(("x",), ("data", "groups"))
    kept = some_elements(summary, graph, plates, 3000, torch.zeros(()))
    assert kept["data"].shape == (3000, 4, 1, 1)
    assert kept["groups"].shape == (3000, 6, 1)
    for each, size in ((kept["data"], 4), (kept["groups"], 6)):
        number = each.reshape(3000, -1).sum(-1)
        assert set(number.tolist()) == set(map(float, range(1, size + 1)))
        error = size / math.sqrt(12 * 3000)
        assert abs(float(number.mean()) - (size + 1) / 2) < 4 * error
    alone = some_elements(Summary(("x",), ("data",)), graph, plates, 3000, torch.zeros(()))
    assert set(alone) == {"data"}
    assert torch.equal(alone["data"], kept["data"])  # the same for all summaries of a plate


def test_elements_whose_total_is_seen_are_never_left_out():
    def totals(total, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("total", dist.Normal(z.sum(), 1.0), obs=total)

    graph = get_model_graph(totals, (torch.zeros(()), torch.zeros(5)))
    plates = {"data": PlateState("data", -1, 5, 5, None)}
    assert not some_elements(Summary(("x",), ("data",)), graph, plates, 10, torch.zeros(()))


# ---------------------------------------------------------------- what summaries know


def pool_of(guide, site):
    inputs = guide.block_of(site).inputs
    (pool,) = inputs.pools.values()
    return inputs, pool


def test_spreads_within_and_between_groups_of_any_size():
    """Sums of squares and degrees of freedom, by the textbook, of ragged groups as well."""
    guide = auto_faithful_guide(hierarchy, torch.zeros(4, 6), pool="deepset", num_start_samples=400)
    _, pool = pool_of(guide, "tau")
    x = torch.randn(5, 7)
    there = torch.rand(5, 7) < 0.6
    there[0] = True
    there[1:, 2] = False  # a group of one
    (stages,) = pool.branches
    features = pool.maps[0](x.unsqueeze(-1))
    members = {"x": features}, {"x": there.to(x).unsqueeze(-1)}
    plates = states(5, 7)
    (order,) = pool.orders
    inner = pool._elements_at(order, 1, members, None, {}, plates)
    below = pool._pooled(stages[0], inner, False)
    outer = pool._elements_at(order, 0, members, below, {}, plates)
    *_, (within, between) = stages[1](outer)
    groups = [features[there[:, j], j, 0] for j in range(7)]
    squares = sum(((g - g.mean()) ** 2).sum() for g in groups)
    freedom = sum(len(g) - 1 for g in groups)
    torch.testing.assert_close(within.reshape(-1), torch.stack([squares, torch.tensor(float(freedom))]))
    means = below.core.reshape(-1)
    torch.testing.assert_close(between.reshape(-1)[0], ((means - means.mean()) ** 2).sum())
    assert between.reshape(-1)[1] == 6


@torch.no_grad()
def test_variance_between_groups_has_the_noise_of_their_means_taken_off():
    """By an analysis of variance: twice as many data in each group leave the estimate as it is."""
    guide = auto_faithful_guide(hierarchy, torch.zeros(4, 6), pool="deepset", num_start_samples=400)
    _, pool = pool_of(guide, "tau")
    stage = pool.branches[0][1]
    found = []
    torch.manual_seed(1)
    effects = torch.randn(400)
    for n in (3, 30):
        x = 0.5 * effects + torch.randn(n, 400)
        members = pool._features({"x": x.unsqueeze(-1)}, {})
        (order,), (inner, _) = pool.orders, pool.branches[0]
        below = pool._pooled(inner, pool._elements_at(order, 1, members, None, {}, states(n, 400)), False)
        _, carried, _, _ = stage(pool._elements_at(order, 0, members, below, {}, states(n, 400)))
        anova = carried[..., -1 - stage._squares - 1].reshape(()).exp()
        means = below.core.reshape(-1)
        noise = (x - x.mean(0)).square().sum() / (400 * (n - 1)) / n * means.var() / x.mean(0).var()
        left = means.var() - noise
        torch.testing.assert_close(anova, left, rtol=0.02, atol=0.0)  # rounded off near nothing
        found.append(float(anova * x.mean(0).var() / means.var()))
    few = stage._log_beyond(torch.tensor([1e-4, 1e-4]).float(), torch.tensor([0.1, 1e3]).float())
    assert few.isfinite().all()  # groups alike by chance
    error = 0.25 * math.sqrt(2 / 400) + (1 / 3) * math.sqrt(2 / 400)
    assert found == pytest.approx([0.25, 0.25], abs=4 * error)


def test_where_no_variance_is_known_it_is_a_typical_one():
    guide = auto_faithful_guide(hierarchy, torch.zeros(4, 6), pool="deepset", num_start_samples=400)
    inputs, pool = pool_of(guide, "tau")
    values = {"x": torch.randn(1, 9, 1)}
    with torch.no_grad():
        features = inputs.features(pool(values, states(1, 9), {}))
    assert float(features.abs().max()) < 12.0  # in units of what joint samples do
    known = [i for i, each in enumerate(pool.of_sizes) if each]
    assert len(known) == 3  # numbers of groups and of their data, degrees of freedom inside


@pytest.mark.parametrize("pool", ["deepset", "attention"])
def test_features_of_sizes_are_trained(pool):
    guide = auto_faithful_guide(hierarchy, torch.zeros(4, 6), pool=pool, num_start_samples=400)
    for site in ("tau", "theta"):
        block = guide.block_of(site)
        sizes = list(block.inputs.of_sizes)
        assert sizes
        network = block.conditionals.network
        inputs = torch.randn(3, block.conditionals.num_inputs)
        found = []
        for moved in (inputs, inputs.clone().index_fill_(-1, torch.tensor(sizes), 5.0)):
            output = network(moved).reshape(-1)
            gradients = torch.autograd.grad(output.sum(), network.skip.weight)
            found.append(gradients[0])
        assert not torch.allclose(*found)


# ---------------------------------------------------------------- factors that follow sizes


def test_slopes_of_sizes_and_variances_are_found():
    torch.manual_seed(0)
    number = 4000
    sizes = torch.randint(1, 30, (number, 1)).double().log()
    sizes = torch.cat([sizes - math.log(29.0), torch.zeros(number, 1)], -1)  # the second does not vary
    variances = torch.randn(number, 1).double()
    prior = SitePrior(torch.zeros(number, 1).double(), torch.zeros(number, 1).double())
    value = torch.randn(number).double()
    width = -1.2 - 0.5 * sizes[:, 0] + 0.25 * variances[:, 0]
    loc = value + width.exp() * torch.randn(number)  # the datum, of noise that falls with size
    slopes = fit_sizes((sizes, variances), loc - 0.3 * sizes[:, 0], -1.0, value, prior)
    assert slopes.log_scale.tolist() == pytest.approx([-0.5, 0.0, 0.25], abs=0.06)
    assert slopes.loc.tolist() == pytest.approx([0.3, 0.0], abs=0.06)
    assert slopes.shift == pytest.approx(-0.2, abs=0.06)
    same = value + math.exp(-1.0) * torch.randn(number)
    assert fit_sizes((sizes, variances), same, -1.0, value, prior) is None


def divergence_of_scales(guide, x, draws=200):
    """KL of the two scales' conditionals from their posterior, by quadrature; mu and theta integrated out."""
    with pyro.plate("draws", draws, dim=-3), torch.no_grad():
        trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    tau, sigma = (trace.nodes[name]["value"].reshape(-1) for name in ("tau", "sigma"))
    log_q = sum(trace.nodes[name]["log_prob"].reshape(-1) for name in ("tau", "sigma"))

    n, groups = x.shape
    mean = x.mean(0)
    within, spread = (x - mean).square().sum(), (mean - mean.mean()).square().sum()

    def log_p(tau, sigma):
        variance = tau**2 + sigma**2 / n
        total = variance + 4.0 * groups
        means = (
            (groups - 1) * variance.log()
            + total.log()
            + spread / variance
            + groups * mean.mean() ** 2 / total
        )
        inside = 2 * groups * (n - 1) * sigma.log() + within / sigma**2
        priors = dist.HalfNormal(1.0).log_prob(tau) + dist.LogNormal(0.0, 0.5).log_prob(sigma)
        return priors - 0.5 * (means + inside)

    u = torch.linspace(-9.0, 2.0, 400).exp()
    centre = float(within / (groups * (n - 1))) ** 0.5
    v = centre * torch.linspace(-1.5, 1.5, 200).exp()
    cell = math.log(11.0 / 399) + math.log(3.0 / 199)
    evidence = (log_p(u[:, None], v) + u.log()[:, None] + v.log()).flatten().logsumexp(0) + cell
    return float((log_q - log_p(tau, sigma) + evidence).mean())


def test_scales_start_near_their_posterior_at_sizes_that_set_up_has_not_seen():
    guide = auto_faithful_guide(hierarchy, torch.zeros(6, 12), pool="deepset", num_start_samples=1500)
    found = {}
    torch.manual_seed(0)
    for shape in ((6, 12), (12, 24), (3, 6)):
        data = sample_prior(hierarchy, (torch.zeros(shape),), {}, num_samples=12)["x"]
        found[shape] = torch.tensor([divergence_of_scales(guide, x) for x in data])
    for each in found.values():
        assert float(each.mean()) > 0.0
        assert float(each.median()) < 1.5  # tens to hundreds of nats where sizes are not known
