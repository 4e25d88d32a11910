"""Discrete latents of groups whose elements the data look up, or of which the data read all: spikes and slabs."""

import itertools
import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO

from pyro_graphflows import UnsupportedModelError, auto_faithful_guide, check_guide
from pyro_graphflows.guides import discrete_mode
from pyro_graphflows.guides.discrete_mode import find_discrete_mode
from pyro_graphflows.inspect import trace_model
from pyro_graphflows.inspect.elements import nested_by_index

GROUP = torch.arange(12) % 3


def grouped(y, kind="binary"):
    with pyro.plate("groups", 3):
        if kind == "binary":
            on = pyro.sample("on", dist.Bernoulli(0.3))
        else:
            on = pyro.sample("on", dist.OneHotCategorical(torch.tensor([0.7, 0.3])))[..., 1]
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((on * effect)[..., GROUP], 0.5), obs=y)


def regression(x, y):
    with pyro.plate("inputs", x.shape[-1]):
        on = pyro.sample("on", dist.Bernoulli(0.3))
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * (on * effect).unsqueeze(-2)).sum(-1), 0.5), obs=y)


def log_evidence(y):
    """Of the model of groups: two hypotheses for each."""
    total = 0.0
    for i in range(3):
        own = y[i::3]
        off = dist.Normal(0.0, 0.5).log_prob(own).sum()
        on = dist.MultivariateNormal(torch.zeros(4), 1.0 + 0.25 * torch.eye(4)).log_prob(own)
        total += torch.logaddexp(off + math.log(0.7), on + math.log(0.3)).item()
    return total


@pytest.mark.parametrize("kind", ["binary", "one-hot"])
def test_data_that_look_up_discrete_latents_are_in_their_groups(kind):
    """Discrete values have no coordinate to be moved in; they take the next class."""
    y = 0.5 * torch.randn(12)
    nested = nested_by_index(grouped, (y, kind), traced=trace_model(grouped, (y, kind)))
    assert nested["data"]["groups"].equal(GROUP)
    guide = auto_faithful_guide(grouped, y, kind)
    assert not any(guide.plan.inverse.coupled.values())  # the order with discrete sites first knows of it too
    assert "stay dependent" not in guide.describe()
    svi = SVI(
        grouped, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(num_particles=5, vectorize_particles=True)
    )
    for _ in range(200):
        svi.step(y, kind)
    evidence = guide.posterior(y, kind, num_draws=5000, seed=0, progress=False).evidence
    assert evidence.log_evidence == pytest.approx(log_evidence(y), abs=0.2)


def test_spikes_and_slabs():
    x = torch.randn(20, 2)
    y = x[:, 0] + 0.5 * torch.randn(20)
    with pytest.warns(match="copies of on stay dependent across inputs"):
        guide = auto_faithful_guide(regression, x, y)
    assert math.isfinite(Trace_ELBO().loss(regression, guide, x, y))


def test_sites_are_not_enumerated_where_something_outside_of_their_plate_reads_them():
    """Pyro gives all elements the same value, and its sum is far from the bound."""
    y = 0.5 * torch.randn(12)
    with pytest.raises(UnsupportedModelError, match=r"the enumerated site 'on' .* groups; 'y' is not"):
        auto_faithful_guide(grouped, y, enumerate_sites=True)

    def guide(y):
        with pyro.plate("groups", 3):
            on = pyro.sample("on", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("effect", dist.Normal(on, 1.0))

    with pytest.warns(match="you need to use TraceEnum_ELBO"):
        right = Trace_ELBO(num_particles=500).loss(grouped, guide, y)
    wrong = TraceEnum_ELBO(num_particles=500, max_plate_nesting=1).loss(grouped, guide, y)
    assert wrong > 1.5 * right
    check = check_guide(grouped, guide, TraceEnum_ELBO(max_plate_nesting=1), y)
    assert "'on' is enumerated in plates that 'y' is not in" in str(check)

    def nested(y):
        with pyro.plate("groups", 3):
            on = pyro.sample("on", dist.Bernoulli(0.3))
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            with pyro.plate("repeats", 4):
                pyro.sample("y", dist.Normal(on * effect, 0.5), obs=y)

    rows = y.reshape(4, 3)
    safe = auto_faithful_guide(nested, rows, enumerate_sites=True)
    assert check_guide(nested, safe, TraceEnum_ELBO(max_plate_nesting=2), rows).safe


@pytest.mark.parametrize("enumerate_sites", [False, True])
def test_mixtures_with_effects_of_groups(enumerate_sites):
    """Sites of groups are sampled before discrete ones of their data, which look up their own."""

    def model(group, y):
        with pyro.plate("groups", 2):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(2.0 * kind + effect[..., group], 1.0), obs=y)

    group, y = torch.arange(8) % 2, 1.0 + torch.randn(8)
    grid = torch.linspace(-6.0, 6.0, 2001)
    exact = 0.0
    for i in range(2):
        each = [
            dist.Normal(grid[:, None] + shift, 1.0).log_prob(y[i::2]) - math.log(2) for shift in (0.0, 2.0)
        ]
        density = torch.logaddexp(*each).sum(1) + dist.Normal(0.0, 1.0).log_prob(grid)
        exact += (density.logsumexp(0) + math.log(grid[1] - grid[0])).item()
    guide = auto_faithful_guide(model, group, y, pool="deepset", enumerate_sites=enumerate_sites)
    assert "kind | group (index), effect (looked up by group), y" in guide.describe()
    loss = (
        TraceEnum_ELBO(num_particles=400, max_plate_nesting=1)
        if enumerate_sites
        else Trace_ELBO(num_particles=400)
    )
    assert loss.loss(model, guide, group, y) == pytest.approx(-exact, abs=0.3)
    evidence = guide.posterior(group, y, num_draws=3000, seed=0, progress=False).evidence
    assert evidence.log_evidence == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize("enumerate_sites", [False, True])
@pytest.mark.parametrize("in_plates", [True, False])
def test_discrete_latents_with_parameters_of_their_own_start_at_the_posterior(enumerate_sites, in_plates):
    """Two kinds of groups, with the means of each unknown; models that take a plate around them, and others."""
    kind = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    y = 3.0 * kind.unsqueeze(-1) - 1.0 + torch.randn(6, 10)

    def model(y):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        first = pyro.sample("first", dist.Normal(-1.0, 1.0))
        second = pyro.sample("second", dist.Normal(2.0, 1.0))
        with pyro.plate("groups", 6, dim=-2):
            on = pyro.sample("on", dist.Bernoulli(share))
            with pyro.plate("data", 10, dim=-1):
                loc = torch.where(on > 0, second, first)
                if not in_plates and loc.dim() > 3:
                    raise ValueError("no plate around this model")
                pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    guide = auto_faithful_guide(model, y, enumerate_sites=enumerate_sites)
    total = []
    for states in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6):
        number = states.sum()
        log_prior = torch.lgamma(number + 2) + torch.lgamma(8 - number) - math.lgamma(10) + math.log(6)
        design = torch.stack([1 - states, states], -1).repeat_interleave(10, 0)
        covariance = design @ design.mT + torch.eye(60)
        normal = dist.MultivariateNormal(design @ torch.tensor([-1.0, 2.0]), covariance)
        total.append(log_prior + normal.log_prob(y.flatten()))
    elbo = TraceEnum_ELBO(max_plate_nesting=2) if enumerate_sites else Trace_ELBO()
    losses = torch.tensor([elbo.loss(model, guide, y) for _ in range(100)])
    assert losses.mean() < -torch.stack(total).logsumexp(0) + 1.5


def test_no_start_near_the_posterior_where_sites_cannot_be_summed_over():
    x = torch.randn(12, discrete_mode.MOST_ELEMENTS + 1)
    with pytest.warns(match="copies of on stay dependent"):
        guide = auto_faithful_guide(regression, x, x[:, 0])
    assert "y depends on several elements of on" in guide.describe(verbose=True)


@pytest.mark.filterwarnings("ignore:Not faithful")
@pytest.mark.parametrize("in_plates", [True, False])
def test_coefficients_that_are_in_or_out_start_at_a_likely_configuration(in_plates):
    def model(x, y):
        with pyro.plate("inputs", 4):
            on = pyro.sample("on", dist.Bernoulli(0.3))
            weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        loc = (x * (on * weight)[..., None, :]).sum(-1) if in_plates else x @ (on * weight)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 0.5), obs=y)

    x = torch.randn(40, 4)
    y = x @ torch.tensor([1.5, 0.0, 0.0, -1.0]) + 0.5 * torch.randn(40)
    total = []
    for on in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4):
        normal = dist.MultivariateNormal(torch.zeros(40), 0.25 * torch.eye(40) + (x * on) @ x.T)
        total.append(dist.Bernoulli(0.3).log_prob(on).sum() + normal.log_prob(y))
    guide = auto_faithful_guide(model, x, y)
    losses = torch.tensor([Trace_ELBO().loss(model, guide, x, y) for _ in range(200)])
    exact = -torch.stack(total).logsumexp(0)
    assert losses.median() < exact + 1.0
    assert losses.mean() < exact + 30.0  # some draws have the wrong ones; without a search 230 nats


def test_configurations_are_drawn_by_their_weights_where_each_draw_takes_a_run():
    def model(x, y):
        with pyro.plate("inputs", 2):
            on = pyro.sample("on", dist.Bernoulli(0.5))
            weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        mean = pyro.sample("mean", dist.Normal(0.0 if float(weight[0].detach()) < 1e9 else 1.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ (on * weight) + mean, 0.3), obs=y)

    x = torch.randn(30, 2)
    data = x, x @ torch.tensor([1.0, 0.1]) + 0.3 * torch.randn(30)
    found = find_discrete_mode(model, data, {}, trace_model(model, data, {}, strict=False))
    drawn = found.draw(2000)["on"]
    assert 200 <= len(drawn) < 1000
    for values, weight in zip(found.values, found.log_weights.softmax(0), strict=True):
        share = (drawn == values["on"]).all(-1).double().mean()
        assert abs(share - weight) < 4 * (weight * (1 - weight) / len(drawn)).sqrt() + 2 / len(drawn)


def test_no_configuration_is_tried_after_some_time(monkeypatch):
    """Of many values the first ones alone could take it all."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("parts", 2):
            count = pyro.sample("count", dist.Binomial(50, torch.tensor(0.5)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean + count.sum(-1) / 10, 1.0), obs=y)

    monkeypatch.setattr(discrete_mode, "time", SimpleNamespace(process_time=itertools.count().__next__))
    data = (torch.tensor([6.0, 7.0]),)
    traced = trace_model(model, data, {}, strict=False)
    found = discrete_mode._Search(model, data, {}, traced, ("count",)).run()
    assert len(found.modes) == discrete_mode.SECONDS


@pytest.mark.filterwarnings("ignore:Not faithful")  # kinds stay dependent where their means are not known
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["categorical", "one-hot"])
def test_classes_that_data_look_up_start_at_the_posterior(known, kind):
    """The kinds of groups, whose means are known or not; one datum belongs to no group."""
    means, weights, group = (
        torch.tensor([-3.0, 0.0, 3.0]),
        torch.tensor([0.2, 0.5, 0.3]),
        torch.arange(20) % 4,
    )
    y = means[torch.tensor([0, 1, 2, 2])][group] + 0.7 * torch.randn(20)
    alone = torch.arange(20) == 7

    def model(y):
        mu = means
        if not known:
            with pyro.plate("kinds", 3):
                mu = pyro.sample("mu", dist.Normal(0.0, 4.0))
        with pyro.plate("groups", 4):
            if kind == "one-hot":
                k = pyro.sample("k", dist.OneHotCategorical(weights)).argmax(-1)
            else:
                k = pyro.sample("k", dist.Categorical(weights))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(torch.where(alone, 0.0, mu[k[group]]), 0.7), obs=y)

    rest = dist.Normal(0.0, 0.7).log_prob(y[alone]).sum()
    total = []
    for k in torch.cartesian_prod(*[torch.arange(3)] * 4):
        design = torch.eye(3)[k[group]][~alone]
        covariance = 0.49 * torch.eye(19) + (0.0 if known else 16.0) * design @ design.mT
        normal = dist.MultivariateNormal(design @ means if known else torch.zeros(19), covariance)
        total.append(weights[k].log().sum() + normal.log_prob(y[~alone]) + rest)
    exact = -torch.stack(total).logsumexp(0)
    guide = auto_faithful_guide(model, y)
    losses = torch.tensor([Trace_ELBO().loss(model, guide, y) for _ in range(100)])
    assert losses.mean() < exact + (0.1 if known else 2.0)


def drawn_discrete(model, y, number=300):
    """Return the place of the posterior, the model as traced and the means of draws of z."""
    traced = trace_model(model, (y,), strict=False)
    mode = find_discrete_mode(model, (y,), {}, traced)
    return mode, traced, mode.draw(number)["z"].mean(0)


def test_discrete_sites_of_rows_that_the_model_draws_are_those_of_the_rows_of_the_call(monkeypatch):
    sign = (torch.rand(40) < 0.5).double()

    def model(y):
        mean = pyro.sample("mean", dist.Normal(4.0, 1.0))
        with pyro.plate("rows", 40, subsample_size=10) as rows:
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(mean * (2 * z - 1), 0.5), obs=y[rows])

    mode, traced, found = drawn_discrete(model, 4.0 * (2 * sign - 1) + 0.1 * torch.randn(40))
    torch.testing.assert_close(found, sign[traced.trace.nodes["rows"]["value"]])

    def fails(*args, **kwargs):
        raise KeyError("_enumerate_dim")

    monkeypatch.setattr(discrete_mode, "infer_discrete", fails)
    with pytest.raises(UnsupportedModelError, match="cannot be drawn given the others: '_enumerate_dim'"):
        mode.draw(2)


def test_discrete_sites_of_models_that_add_up_all_elements_are_drawn_one_by_one():
    """Inside of a plate of draws the sum would be over these as well."""

    def model(y):
        with pyro.plate("rows", 3):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(x.sum() + 4.0 * z, 0.5), obs=y)

    found = drawn_discrete(model, torch.tensor([1.0, 5.0, 5.0]))[-1]
    assert (found - torch.tensor([0.0, 1.0, 1.0])).abs().max() < 0.05
