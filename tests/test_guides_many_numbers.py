"""Normal approximations of posteriors of thousands of numbers, and starts from them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.guides.fused_rows import fit_factor
from pyro_graphflows.guides.many_factors import fit_factors
from pyro_graphflows.guides.many_numbers import arrow_normals
from pyro_graphflows.guides.sites import SitePrior


def arrow_precision(shared, elements, sites):
    """A precision matrix in which elements are independent given the shared numbers, and the sites' places."""
    size = shared + elements * sites
    precision = torch.zeros(size, size)
    root = torch.randn(shared, shared)
    precision[:shared, :shared] = root @ root.T + elements * torch.eye(shared)
    places = [range(shared)] + [
        range(shared + k * elements, shared + (k + 1) * elements) for k in range(sites)
    ]
    for i in range(elements):
        own = torch.tensor([each[i] for each in places[1:]])
        block = torch.randn(sites, sites)
        precision[own.unsqueeze(-1), own] = block @ block.T + 3 * torch.eye(sites)
        precision[own, :shared] = torch.randn(sites, shared)
        precision[:shared, own] = precision[own, :shared].T
    return precision, places


@pytest.mark.parametrize("sites", [1, 2])
def test_a_normal_in_the_shape_of_an_arrow_is_found(sites):
    torch.manual_seed(0)
    precision, places = arrow_precision(3, 120, sites)
    mean = torch.randn(len(precision))

    def log_density(point):
        off = point - mean
        return -0.5 * ((off @ precision) * off).sum(-1)

    generator = torch.Generator().manual_seed(0)
    least = torch.full((len(mean),), 1e-12)
    normals = arrow_normals(log_density, torch.zeros(len(mean)), places, least, generator)
    assert len(normals) == 2
    eye = torch.eye(len(mean))
    for loc, root in normals:
        spread = root.spread(eye)  # rows are the root's columns
        torch.testing.assert_close(spread.T @ spread, precision.inverse(), rtol=0, atol=1e-8)
        assert root.log_volume == pytest.approx(-torch.logdet(precision).item() / 2)
        off = loc - mean
        assert (off @ precision @ off).item() < 1e-3


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("groups", y.shape[-1]):
        z = pyro.sample("z", dist.Normal(mu, 2.0))
        pyro.sample("y", dist.Normal(z, 0.1), obs=y)


def test_a_guide_for_many_groups_starts_near_their_posterior():
    torch.manual_seed(1)
    y = 30.0 + 2.0 * torch.randn(1200)
    covariance = 100.0 + torch.diag(torch.full((1200,), 4.01))
    evidence = dist.MultivariateNormal(torch.zeros(1200), covariance).log_prob(y)
    guide = auto_faithful_guide(hierarchy, y)
    with torch.no_grad():
        losses = torch.tensor([Trace_ELBO().differentiable_loss(hierarchy, guide, y) for _ in range(20)])
    # a start at the prior is some hundred thousand nats off
    assert losses.mean() + evidence < 2.0 + 3 * losses.std() / 20**0.5


def counts(n, y, group):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", n):
        rate = pyro.sample("rate", dist.Normal(mu, scale))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate[..., group].exp()), obs=y)


@pytest.mark.slow
def test_effects_of_unknown_scale_behind_counts_start_near_where_training_ends():
    torch.manual_seed(0)
    group = torch.arange(1500).repeat_interleave(4)
    y = torch.poisson((0.3 + 0.8 * torch.randn(1500))[group].exp())
    guide = auto_faithful_guide(counts, 1500, y, group)
    loss_of = Trace_ELBO().differentiable_loss

    def loss():
        with torch.no_grad():
            return torch.tensor([loss_of(counts, guide, 1500, y, group) for _ in range(50)]).mean().item()

    start = loss()
    optimizer = torch.optim.Adam(guide.parameters(), lr=1e-2)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.01 ** max(0.0, step / 300 - 1)
        optimizer.zero_grad()
        loss_of(counts, guide, 1500, y, group).backward()
        optimizer.step()
    assert loss() - 1.0 < start < loss() + 8.0


def test_factors_of_many_indices_are_those_of_each():
    torch.manual_seed(0)
    number, indices = 1000, 6
    log_scale = 0.5 * torch.randn(number)
    loc = torch.randn(number)
    inputs = torch.stack([loc, torch.randn(number), torch.full((number,), 2.0)], -1)
    values, widths = [], [0.1, 0.3, 1.0, 3.0, 0.2, None]
    for k, width in enumerate(widths):
        if width is None:  # the data say nothing
            values.append(loc + log_scale.exp() * torch.randn(number))
            continue
        gain = torch.sigmoid(2 * (log_scale - torch.tensor(width).log()))
        middle = (1 - gain) * loc + gain * (0.4 * k + 0.2 * inputs[:, 1])
        values.append(
            middle
            + (log_scale - 0.5 * torch.log1p((log_scale.exp() / width) ** 2)).exp() * torch.randn(number)
        )
    values = torch.stack(values)
    values[0, :5] = torch.nan  # such rows do not count
    every = [each.expand(indices, *each.shape) for each in (inputs, loc, log_scale)]
    found = fit_factors(every[0], values, every[1], every[2])

    def loss(factor, k):
        width = factor.scale_tril.item()
        gain = torch.sigmoid(2 * (log_scale - torch.tensor(width).log()))
        middle = (1 - gain) * loc + gain * (inputs @ factor.weights[0] + factor.loc)
        scale = (log_scale - 0.5 * torch.log1p((log_scale.exp() / width) ** 2)).exp()
        known = values[k].isfinite()
        return -dist.Normal(middle, scale).log_prob(values[k].nan_to_num())[known].mean().item()

    for k, factor in enumerate(found):
        alone = fit_factor(
            inputs, values[k].unsqueeze(-1), SitePrior(loc.unsqueeze(-1), log_scale.unsqueeze(-1))
        )
        assert alone.says_something == (widths[k] is not None)
        assert loss(factor, k) == pytest.approx(loss(alone.linear, k), abs=5e-3)
        assert factor.weights[0, 2] == 0.0


def growth(n, y, x, group):
    start = pyro.sample("start", dist.ImproperUniform(constraints.real, (), ()))
    rate = pyro.sample("rate", dist.ImproperUniform(constraints.real, (), ()))
    spreads = [pyro.sample(name, dist.HalfCauchy(2.0)) for name in ("spread", "spread_of_rates")]
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("groups", n):
        a = pyro.sample("a", dist.Normal(start, spreads[0]))
        b = pyro.sample("b", dist.Normal(rate, spreads[1]))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[..., group] + b[..., group] * x, noise), obs=y)


def test_two_effects_of_each_group_with_flat_priors_above_start_near_the_posterior():
    torch.manual_seed(0)
    number = 550
    group = torch.arange(number).repeat_interleave(6)
    x = torch.randn(len(group))
    truth = 1.0 + 2.0 * torch.randn(number), -1.0 + 0.5 * torch.randn(number)
    y = truth[0][group] + truth[1][group] * x + 0.4 * torch.randn(len(group))
    guide = auto_faithful_guide(growth, number, y, x, group)
    with torch.no_grad():
        losses = [Trace_ELBO().differentiable_loss(growth, guide, number, y, x, group) for _ in range(50)]
    losses = torch.stack(losses)
    # the evidence given the true spreads and rates is above that of any; the five numbers' own widths cost some nats
    columns = torch.stack([torch.ones_like(x), x], -1).reshape(number, 6, 2)
    prior = torch.diag(torch.tensor([2.0, 0.5]) ** 2)
    covariance = columns @ prior @ columns.mT + 0.16 * torch.eye(6)
    mean = columns @ torch.tensor([1.0, -1.0])
    given = dist.MultivariateNormal(mean, covariance).log_prob(y.reshape(number, 6)).sum()
    assert losses.mean() + given < 40.0  # from the prior: some forty thousand


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if torch.is_tensor(found):
            self.size = max(self.size, found.numel())
        return found


def test_nothing_is_as_large_as_the_square_of_the_number_of_numbers():
    sites = [range(2), range(2, 5000)]

    def log_density(point):
        return -0.5 * (point.square() + 0.01 * point * point[..., :1]).sum(-1)

    with Largest() as seen:
        normals = arrow_normals(log_density, torch.zeros(5000), sites, torch.ones(5000), torch.Generator())
    assert len(normals) == 2
    assert seen.size < 5000 * 50


def test_factors_without_inputs_have_intercepts():
    torch.manual_seed(0)
    log_scale, loc = 0.5 * torch.randn(2000), torch.randn(2000)
    gain = torch.sigmoid(2 * (log_scale - torch.tensor(0.3).log()))
    values = (1 - gain) * loc + gain * 0.7 + gain.sqrt() * 0.3 * torch.randn(2, 2000)
    none = torch.zeros(2, 2000, 0)
    for factor in fit_factors(none, values, loc.expand(2, -1), log_scale.expand(2, -1)):
        assert factor.weights.shape == (1, 0)
        assert factor.loc.item() == pytest.approx(0.7, abs=0.05)
        assert factor.scale_tril.item() == pytest.approx(0.3, abs=0.04)


def test_arrows_are_known_where_second_derivatives_are_not_finite():
    """As of zero inflation by hand: the logarithm of what adds nothing."""
    torch.manual_seed(0)
    precision, places = arrow_precision(3, 60, 2)

    def log_density(point):
        nothing = torch.where(point > math.inf, point, -math.inf)
        return torch.logaddexp(point, nothing).sum(-1) - 0.5 * ((point @ precision) * point).sum(-1)

    least = torch.full((len(precision),), 1e-12)
    normals = arrow_normals(log_density, torch.zeros(len(precision)), places, least, torch.Generator())
    assert len(normals) == 2
    eye = torch.eye(len(precision))
    for loc, root in normals:
        spread = root.spread(eye)
        torch.testing.assert_close(spread.T @ spread, precision.inverse(), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            loc, torch.linalg.solve(precision, torch.ones(len(loc))), rtol=0, atol=1e-3
        )


def test_factors_of_exact_data_are_as_narrow_as_these():
    torch.manual_seed(0)
    log_scale, loc = 0.5 * torch.randn(1000), torch.randn(1000)
    inputs, width = torch.randn(1000, 1), 3e-4
    values = 0.5 * inputs[:, 0] + 0.7 + width * torch.randn(1000)
    prior = SitePrior(loc.unsqueeze(-1), log_scale.unsqueeze(-1))
    alone = fit_factor(inputs, values.unsqueeze(-1), prior).linear
    (of_many,) = fit_factors(inputs[None], values[None], loc[None], log_scale[None])
    for factor in (alone, of_many):
        assert factor.scale_tril.item() == pytest.approx(width, rel=0.15)


def test_crossed_effects_are_an_arrow_too():
    """The grouping with fewer levels is shared, and so the covariance of all is exact."""
    torch.manual_seed(0)
    rows, columns = 150, 120
    i, j = torch.randint(rows, (600,)), torch.randint(columns, (600,))
    eye = torch.eye(rows + columns)
    design = eye[i] + eye[rows + j]
    precision = eye + design.T @ design / 0.25
    mean = torch.randn(rows + columns)

    def log_density(point):
        off = point - mean
        return -0.5 * ((off @ precision) * off).sum(-1)

    places = [range(rows), range(rows, rows + columns)]
    least, generator = torch.full((len(mean),), 1e-12), torch.Generator().manual_seed(0)
    for loc, root in arrow_normals(log_density, torch.zeros(len(mean)), places, least, generator):
        spread = root.spread(eye)
        torch.testing.assert_close(spread.T @ spread, precision.inverse(), rtol=0, atol=1e-8)
        assert (loc - mean).abs().max() < 1e-3
