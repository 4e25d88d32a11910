"""Guides of models in which data look up their groups: crossed, nested and plain ones."""

import pyro.distributions as dist
import pytest
import torch
from lookup_models import DISTRICT, GROUP, crossed, districts, members, slopes, two_groups
from plated_guides import set_joint_
from pyro.infer import Trace_ELBO

from pyro_graphflows.guides import auto_faithful_guide


def test_intercepts_and_slopes():
    guide = auto_faithful_guide(slopes, GROUP, torch.randn(7), torch.randn(7), num_start_samples=500)
    assert not guide.inverse.coupled
    assert "not faithful" not in guide.describe()
    assert "mu (broadcast)" in guide.describe()


def test_two_groups_for_each_datum_are_coupled():
    guide = auto_faithful_guide(two_groups, GROUP, GROUP.flip(0), torch.randn(7), num_start_samples=500)
    assert guide.inverse.coupled == {"a": ("groups",)}


def test_groups_of_groups():
    args = GROUP, DISTRICT, torch.randn(7)
    guide = auto_faithful_guide(districts, *args, num_start_samples=500)
    assert not guide.inverse.coupled
    assert "d (looked up by district)" in guide.describe()


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_crossed_effects_by_index_are_exact(order):
    """Only those sampled first are dependent across their plate; with the exact posterior inside, the evidence."""
    i, j = torch.randint(0, 4, (15,)), torch.randint(0, 3, (15,))
    y = torch.randn(15)
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
