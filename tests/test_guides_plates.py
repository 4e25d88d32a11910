"""Plates: global, group and local latents with the exact posterior inside the guide give the exact evidence."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from plated_guides import add_rows_, hierarchical, set_hierarchical_, varying
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_graphflows.errors import GraphflowsWarning
from pyro_graphflows.guides import auto_faithful_guide

ORDERS = ["auto", "forward", "reverse", "min_fill"]


@pytest.mark.parametrize("order", ORDERS)
def test_global_and_local_latents_are_exact(order):
    x = torch.randn(5) + 1.0
    guide = auto_faithful_guide(hierarchical, x, inverse=order, init="random")
    assert guide.inverse.parents == {"mu": ("x",), "z": ("mu", "x")}
    evidence = set_hierarchical_(guide, x)
    for vectorize in (False, True):
        options = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 1}
        assert Trace_ELBO(**options).loss(hierarchical, guide, x) == pytest.approx(-evidence)
        with torch.no_grad():
            losses = torch.tensor(
                [TraceMeanField_ELBO(**options).loss(hierarchical, guide, x) for _ in range(60)]
            )
        error = float(losses.std()) / math.sqrt(60)
        assert float(losses.mean()) == pytest.approx(-evidence, abs=5 * error + 1e-8)
    # every particle has the same joint weight; a bound only where the particle's weights are joint
    assert RenyiELBO(alpha=0.0, num_particles=2).loss(hierarchical, guide, x) == pytest.approx(-evidence)


def test_effects_looked_up_by_an_index_are_exact():
    index, y = torch.tensor([0, 1, 1, 2, 2, 2, 0]), torch.randn(7)
    guide = auto_faithful_guide(varying, index, y, init="random")
    count = torch.bincount(index, minlength=3).double()
    total = torch.zeros(3).index_add(0, index, y)
    same = (index[:, None] == index[None]).double()
    covariance = torch.ones(7, 7) + same + torch.eye(7)
    evidence = dist.MultivariateNormal(torch.zeros(7), covariance).log_prob(y).item()
    variance = 1 / (1 + count)
    weight = count / (1 + count)  # of mu's likelihood through each group: mean_g ~ Normal(mu, 1 + 1 / n_g)
    precision = 1.0 + weight.sum()
    guide.set_linear_("mu", {}, float((weight * total / count).sum() / precision), float(precision**-0.5))
    # theta_g | mu, y ~ Normal(variance_g (mu + total_g), variance_g): the slope on mu differs between groups of
    # different size, which a shared linear network cannot have; so condition on mu and compare at that value
    mu = torch.tensor(0.3)
    guide.set_linear_("theta", {"mu": 0.0}, 0.0, 1.0)
    add_rows_(guide, "theta", variance * (mu + total), variance.sqrt())
    conditioned = poutine.condition(varying, {"mu": mu})
    held = poutine.condition(guide, {"mu": mu})
    model_and_guide = Trace_ELBO().loss(conditioned, poutine.block(held, hide=["mu"]), index, y)
    joint = dist.Normal(0.0, 1.0).log_prob(mu)
    given_mu = dist.MultivariateNormal(mu.expand(7), same + torch.eye(7)).log_prob(y)
    assert model_and_guide == pytest.approx(-(joint + given_mu).item())
    posterior = guide.log_prob({"mu": mu, "theta": torch.zeros(3)}, index, y) - guide.log_prob(
        {"mu": mu + 1, "theta": torch.zeros(3)}, index, y
    )
    centre = (weight * total / count).sum() / precision
    exact = dist.Normal(centre, precision**-0.5)
    torch.testing.assert_close(posterior, exact.log_prob(mu) - exact.log_prob(mu + 1))
    assert (joint + given_mu - exact.log_prob(mu)).item() == pytest.approx(evidence)
    assert "per-element parameters" in guide.describe()


def test_equal_groups_looked_up_by_an_index_give_the_evidence():
    index, y = torch.tensor([0, 1, 1, 2, 2, 0]), torch.randn(6)
    guide = auto_faithful_guide(varying, index, y, init="random")
    total = torch.zeros(3).index_add(0, index, y)
    same = (index[:, None] == index[None]).double()
    evidence = dist.MultivariateNormal(torch.zeros(6), torch.ones(6, 6) + same + torch.eye(6)).log_prob(y)
    # each group's mean is Normal(mu, 3/2): the precision of mu is 1 + 3 (2/3) = 3
    guide.set_linear_("mu", {}, float(total.sum() / 9), math.sqrt(1 / 3))
    guide.set_linear_("theta", {"mu": 1 / 3}, 0.0, math.sqrt(1 / 3))
    add_rows_(guide, "theta", total / 3)
    for vectorize in (False, True):
        options = {"num_particles": 2, "vectorize_particles": vectorize, "max_plate_nesting": 1}
        assert Trace_ELBO(**options).loss(varying, guide, index, y) == pytest.approx(-evidence.item())


def nested(x):
    """Groups and their members: x[member, group]."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("members", x.shape[-2], dim=-2):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("order", ["auto", "reverse"])
def test_nested_plates_are_exact(order):
    members, groups = 4, 3
    x = torch.randn(members, groups)
    guide = auto_faithful_guide(nested, x, inverse=order, init="random")
    block = 2.0 * torch.eye(members) + torch.ones(members, members)
    covariance = torch.block_diag(*[block] * groups) + 1.0
    flat = x.T.reshape(-1)
    evidence = dist.MultivariateNormal(torch.zeros(len(flat)), covariance).log_prob(flat).item()
    guide.set_linear_("z", {"theta": 0.5, "x": 0.5}, 0.0, math.sqrt(0.5))
    precision = 1.0 + members / 2.0
    guide.set_linear_("theta", {"mu": 1 / precision}, 0.0, precision**-0.5)
    add_rows_(guide, "theta", x.sum(0) / 2 / precision)
    spread = 1.0 + 2.0 / members
    total = 1.0 + groups / spread
    guide.set_linear_("mu", {}, float(x.mean(0).sum() / spread / total), total**-0.5)
    for vectorize in (False, True):
        options = {"num_particles": 2, "vectorize_particles": vectorize, "max_plate_nesting": 2}
        assert Trace_ELBO(**options).loss(nested, guide, x) == pytest.approx(-evidence)


def test_free_rows_of_a_subsampled_plate_are_those_of_its_indices():
    """Each group has its own row; a subsample reads the rows of its groups and scales as the model does."""
    x = torch.randn(4, 6)

    def model(x):
        with pyro.plate("groups", 6, subsample_size=2, dim=-1) as indices:
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("members", 4, dim=-2):
                pyro.sample("x", dist.Normal(theta, 1.0), obs=x[:, indices])

    guide = auto_faithful_guide(model, x, init="random")
    guide.set_linear_("theta", {}, 0.0, math.sqrt(0.2))
    add_rows_(guide, "theta", x.sum(0) / 5)
    covariance = torch.eye(4) + 1.0
    each = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x.T)
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(x)
        replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x)
        indices = trace.nodes["groups"]["value"]
        elbo = (replayed.log_prob_sum() - trace.log_prob_sum()).item()
        assert elbo == pytest.approx(each[indices].sum().item() * 3)


def test_plates_of_other_sizes_than_at_set_up():
    guide = auto_faithful_guide(nested, torch.randn(4, 3))
    with pytest.warns(GraphflowsWarning, match="which read no data"):
        assert guide(torch.randn(6, 3))["z"].shape == (6, 3)
    with pytest.warns(GraphflowsWarning, match="beyond those fitted, in plate 'groups'"):
        assert guide(torch.randn(4, 5))["z"].shape == (4, 5)


def eight_schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@pytest.mark.slow
def test_eight_schools_is_better_than_the_guides_of_pyro():
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    bounds = {}
    for name, make in {
        "faithful": lambda: auto_faithful_guide(eight_schools, sigma, y),
        "normal": lambda: AutoNormal(eight_schools),
        "multivariate": lambda: AutoMultivariateNormal(eight_schools),
    }.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = make()
        steps = 3000
        optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.03 ** (1 / steps)})
        loss = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(eight_schools, guide, optim, loss)
        for _ in range(steps):
            svi.step(sigma, y)
        many = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
        bounds[name] = -many.loss(eight_schools, guide, sigma, y)
    assert bounds["faithful"] > bounds["normal"] + 1.0
    assert bounds["faithful"] > bounds["multivariate"] + 0.5


def test_what_describe_says_of_parents():
    """How each comes in: elementwise, broadcast, one by one, pooled, by an index, or not at all."""

    def model(group, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(theta[..., group], 1.0))
            pyro.factor("tilt", -z.abs())
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    group = torch.tensor([0, 1, 2, 0])
    for pool, how, label in (
        (None, "not read", "per-element parameters"),
        ("deepset", "pooled by group", "amortised"),
    ):
        text = auto_faithful_guide(
            model, group, torch.randn(4), pool=pool, init="random", family="normal"
        ).describe()
        index = "not read" if pool is None else "index"
        assert f"mu | group ({index}), tilt (no data to read), y ({how})  [{label}, analytic KL]" in text
        assert "z | group (index), theta (looked up by group), tilt (no data to read), y  [amortised" in text
        assert ("sites with per-element parameters fit one data set" in text) == (pool is None)
        assert "Block 1 (plate groups, 1 level)" in text


def test_what_all_elements_share_moves_in_a_share_of_their_units():
    """A step of the network moves all three groups, and costs what a step of one of their own numbers does."""
    guide = auto_faithful_guide(varying, torch.tensor([0, 1, 1, 2]), torch.randn(4))
    network = guide.block_of("theta").conditionals
    own = network.table.unit[network._table_columns["theta"]]
    shared = network.network.units.unit[network.outputs["theta"]]
    torch.testing.assert_close(shared * math.sqrt(3), own)
