"""Plates that an index nests in others are found; crossed ones, and indices that are latent, are told apart."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from test_guides_coupled import set_joint_

from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.inspect import nested_by_index, trace_model

N = dist.Normal
GROUP = torch.tensor([0, 4, 1, 2, 2, 3, 0])


def found(model, *args):
    nested = nested_by_index(model, args, traced=trace_model(model, args))
    return {inner: tuple(outers) for inner, outers in nested.items()}


def slopes(group, w, y):
    mu = pyro.sample("mu", N(0.0, 1.0))
    with pyro.plate("groups", 5):
        a = pyro.sample("a", N(mu, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", N(a[..., group] + b[..., group] * w, 1.0), obs=y)


def test_intercepts_and_slopes():
    assert found(slopes, GROUP, torch.randn(7), torch.randn(7)) == {"data": ("groups",)}
    guide = auto_faithful_guide(slopes, GROUP, torch.randn(7), torch.randn(7), num_start_samples=500)
    assert not guide.inverse.coupled
    assert "not faithful" not in guide.describe()
    assert "mu (broadcast)" in guide.describe()


def test_two_groups_for_each_datum_are_no_nesting():
    def model(one, two, y):
        with pyro.plate("groups", 5):
            a = pyro.sample("a", N(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", N(a[one] + a[two], 1.0), obs=y)

    assert found(model, GROUP, GROUP.flip(0), torch.randn(7)) == {}
    assert found(model, GROUP, GROUP, torch.randn(7)) == {"data": ("groups",)}
    guide = auto_faithful_guide(model, GROUP, GROUP.flip(0), torch.randn(7), num_start_samples=500)
    assert guide.inverse.coupled == {"a": ("groups",)}


def test_a_latent_index_is_no_nesting():
    def model(y):
        with pyro.plate("components", 4):
            a = pyro.sample("a", N(0.0, 1.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4), infer={"enumerate": "parallel"})
            pyro.sample("y", N(a[k], 1.0), obs=y)

    assert found(model, torch.randn(12)) == {}


def test_groups_of_groups():
    def model(school, district, y):
        with pyro.plate("districts", 2):
            d = pyro.sample("d", N(0.0, 1.0))
        with pyro.plate("schools", 5):
            s = pyro.sample("s", N(d[district], 1.0))
        with pyro.plate("pupils", len(y)):
            pyro.sample("y", N(s[school], 1.0), obs=y)

    args = GROUP, torch.tensor([0, 1, 1, 0, 0]), torch.randn(7)
    assert found(model, *args) == {"schools": ("districts",), "pupils": ("schools",)}
    guide = auto_faithful_guide(model, *args, num_start_samples=500)
    assert not guide.inverse.coupled
    assert "d (looked up by district)" in guide.describe()


def crossed(i, j, y):
    with pyro.plate("rows", 4):
        a = pyro.sample("a", N(0.0, 1.0))
    with pyro.plate("columns", 3):
        b = pyro.sample("b", N(0.0, 0.7))
    with pyro.plate("data", len(y)):
        pyro.sample("y", N(a[..., i] + b[..., j], 0.6), obs=y)


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_crossed_effects_by_index_are_exact(order):
    """Only those sampled first are dependent across their plate; with the exact posterior inside, the evidence."""
    i, j = torch.randint(0, 4, (15,)), torch.randint(0, 3, (15,))
    y = torch.randn(15)
    assert found(crossed, i, j, y) == {"data": ("rows", "columns")}
    guide = auto_faithful_guide(crossed, i, j, y, inverse=order, init="random", num_start_samples=500)
    second, first = order
    assert guide.inverse.coupled == {first: ("rows",) if first == "a" else ("columns",)}
    eye = torch.eye(7)
    design = eye[i] + eye[4 + j]
    prior = torch.diag(torch.cat([torch.ones(4), torch.full((3,), 0.49)]))
    evidence = dist.MultivariateNormal(torch.zeros(15), design @ prior @ design.T + 0.36 * torch.eye(15))
    precision = torch.linalg.inv(prior) + design.T @ design / 0.36
    covariance = torch.linalg.inv(precision)
    mean = covariance @ design.T @ y / 0.36
    parts = {"a": slice(0, 4), "b": slice(4, 7)}
    joint, given = parts[first], parts[second]
    set_joint_(guide, first, mean[joint], covariance[joint, joint])
    slope = torch.linalg.solve(covariance[joint, joint], covariance[joint, given]).T
    guide.set_linear_(second, {}, 0.0, 1.0)
    network, feature = guide.blocks[1].conditionals, guide.blocks[1].inputs.features
    width = network.output_units(second)[1]
    feature_map = guide.blocks[1].inputs.pools["0"].maps[0]
    shift = feature_map.shift + feature_map.scale * feature.shift
    scale = feature_map.scale * feature.scale
    with torch.no_grad():
        table = network.table.table
        table[..., 0] = (mean[given] - slope @ mean[joint] + slope @ shift) / width
        table[..., 1] = -0.5 * precision[given, given].diagonal().log()
        key, _ = network._map_of[second]
        network.maps[key].set_(torch.stack([slope * scale / width, torch.zeros_like(slope)], 1))
    for vectorize in (False, True):
        options = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 1}
        loss = Trace_ELBO(**options).loss(crossed, guide, i, j, y)
        assert loss == pytest.approx(-evidence.log_prob(y).item())


def members(group, x):
    """A latent variable for each datum below the effect of its group."""
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", N(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(theta[..., group], 0.5))
        pyro.sample("x", N(z, 0.6), obs=x)


def test_local_latents_look_up_their_group():
    group = torch.tensor([0, 1, 1, 2, 2, 2, 0])
    x = torch.randn(7)
    guide = auto_faithful_guide(members, group, x, init="random", num_start_samples=500)
    assert "theta (looked up by group), x  [amortised" in guide.describe()
    gain = 0.25 / 0.61
    guide.set_linear_("z", {"theta": 1 - gain, "x": gain}, 0.0, (0.36 * gain) ** 0.5)
    count = torch.bincount(group, minlength=3).double()
    total = torch.zeros(3).index_add(0, group, x)
    precision = 1 + count / 0.61
    guide.set_linear_("theta", {}, 0.0, 1.0)
    network = guide.blocks[0].conditionals
    width = network.output_units("theta")[1]
    with torch.no_grad():
        network.table.table[..., 0] = total / 0.61 / precision / width
        network.table.table[..., 1] = -0.5 * precision.log()
    same = (group[:, None] == group[None]).double()
    evidence = dist.MultivariateNormal(torch.zeros(7), same + 0.61 * torch.eye(7)).log_prob(x).item()
    for vectorize in (False, True):
        options = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 1}
        assert Trace_ELBO(**options).loss(members, guide, group, x) == pytest.approx(-evidence)
