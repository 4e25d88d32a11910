"""resolution="element": factors whose elements have parents of their own."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.separation import is_imap
from pyro_graphflows.guides import ElementNormalFactor, auto_faithful_guide
from pyro_graphflows.guides.conditionals.factors import NormalFactor

DEPTH = 4


def chains(x=None, num=1):
    """Four independent chains z[i] -> w[i] -> x[i], written with vectors; w is stacked from its elements."""
    with pyro.plate("data", num if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([DEPTH]).to_event(1))
        loc = torch.stack([0.8 * z[..., i] for i in range(DEPTH)], -1)
        w = pyro.sample("w", dist.Normal(loc, 0.6).to_event(1))
        pyro.sample("x", dist.Normal(w, 0.5).to_event(1), obs=x)


def test_elements_have_their_own_parents():
    x = torch.randn(9, DEPTH)
    guide = auto_faithful_guide(chains, x, resolution="element")
    inverse = guide.inverse
    assert is_imap(inverse, guide.model_graph)
    for i in range(DEPTH):
        assert set(inverse.parents[f"w[{i}]"]) <= {f"x[{i}]", f"z[{i}]"}
        assert set(inverse.parents[f"z[{i}]"]) <= {f"x[{i}]", f"w[{i}]"}
    whole = auto_faithful_guide(chains, x)

    def slopes(guide):
        return sum(int(b.count_nonzero()) for n, b in guide.named_buffers() if n.endswith("units.offset"))

    assert slopes(guide) < slopes(whole)
    assert "not faithful" not in guide.describe()


def test_the_start_is_the_exact_posterior():
    """Linear-Gaussian chains: with few weights, few samples are enough."""
    x = torch.randn(9, DEPTH)
    guide = auto_faithful_guide(chains, x, resolution="element", num_start_samples=20_000)
    covariance = torch.tensor([[1.0, 0.8, 0.8], [0.8, 1.0, 1.0], [0.8, 1.0, 1.25]])  # of z[i], w[i], x[i]
    gain = covariance[:2, 2] / covariance[2, 2]
    posterior = covariance[:2, :2] - gain.unsqueeze(-1) * covariance[2, :2]
    exact = dist.MultivariateNormal(x.unsqueeze(-1) * gain, posterior)
    draws = exact.sample((3000,))  # (3000, 9, DEPTH, 2)
    log_q = guide.log_prob({"z": draws[..., 0], "w": draws[..., 1]}, x)
    assert (exact.log_prob(draws).sum(-1) - log_q).mean().item() < 0.01
    loss = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    evidence = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x).sum()
    assert abs(loss.loss(chains, guide, x) + evidence.item()) < 0.3


def test_elements_of_one_site_that_depend_on_each_other():
    """One observed sum joins the elements of a site; they become an autoregressive block."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)

    x = torch.randn(5)
    guide = auto_faithful_guide(model, x, resolution="element", num_start_samples=40_000)
    assert guide.inverse.num_edges == 3 + 3  # each sees x, and the elements before it
    precision = torch.eye(3) + 4.0
    exact = dist.MultivariateNormal(
        4.0 * x.unsqueeze(-1) * torch.linalg.inv(precision).sum(-1), precision_matrix=precision
    )
    z = exact.sample((3000,))
    assert (exact.log_prob(z) - guide.log_prob({"z": z}, x)).mean().item() < 0.01
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert math.isfinite(svi.step(x))


def test_elements_of_which_some_do_not_see_what_their_site_sees():
    """w[0] hangs on z, w[1] on its datum alone: both are sampled after z, and the start is the exact posterior."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(torch.stack([z, 0 * z], -1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    x = torch.randn(5, 2)
    guide = auto_faithful_guide(model, x, resolution="element", inverse="reverse", num_start_samples=40_000)
    assert guide.inverse.parents["w[0]"] == ("z", "x[0]")
    assert guide.inverse.parents["w[1]"] == ("x[1]",)
    assert guide.plan.blocks[0].levels == (("z",), ("w",))
    z = dist.Normal(x[:, 0] / 3, math.sqrt(2 / 3)).sample((3000,))
    mean = torch.stack([(z + x[:, 0]) / 2, (x[:, 1] / 2).expand_as(z)], -1)
    w = dist.Normal(mean, math.sqrt(1 / 2)).sample()
    exact = dist.Normal(x[:, 0] / 3, math.sqrt(2 / 3)).log_prob(z)
    exact = exact + dist.Normal(mean, math.sqrt(1 / 2)).log_prob(w).sum(-1)
    assert (exact - guide.log_prob({"z": z, "w": w}, x)).mean().item() < 0.01


def test_element_factor_is_its_autoregression():
    factor = ElementNormalFactor([[], [0], [0, 1]])
    full = NormalFactor(3)
    tril = torch.tensor([[0.5, 0.0, 0.0], [0.2, 1.5, 0.0], [-1.0, 0.3, 0.7]])
    loc = torch.tensor([1.0, 2.0, 3.0])
    one = factor.linear_start(torch.zeros(3, 0), loc, tril)[1]
    other = full.linear_start(torch.zeros(3, 0), loc, tril)[1]
    shift, scale = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([2.0, 0.1, 1.0])
    a, b = factor.distribution(one, shift, scale), full.distribution(other, shift, scale)
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.covariance_matrix, b.covariance_matrix)
    independent = ElementNormalFactor([[], []]).distribution(torch.zeros(4, 4), shift[:2], scale[:2])
    assert independent.event_shape == (2,)
    torch.testing.assert_close(independent.stddev[0], scale[:2])


def test_what_elements_cannot_do_is_refused():
    class Own(NormalFactor):
        """A factor of a user."""

    x = torch.randn(3, DEPTH)
    with pytest.raises(
        GraphflowsError, match="an elimination order with resolution='element'; got 'mean_field'"
    ):
        auto_faithful_guide(chains, x, resolution="element", inverse="mean_field")
    with pytest.raises(GraphflowsError, match=r"give each element parents .* with resolution='element'"):
        auto_faithful_guide(chains, x, resolution="element", family=Own)
    with pytest.raises(GraphflowsError, match="Expected resolution"):
        auto_faithful_guide(chains, x, resolution="pixel")
