"""Group effects on one data set: per-element parameters, maps, and starts that heavy tails do not spoil."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.conditionals.elements import ElementMap
from pyro_graphflows.models.textbook import EIGHT_SCHOOLS
from pyro_graphflows.models.textbook import eight_schools_model as eight_schools
from pyro_graphflows.regression import location_and_scale

FAMILIES = ["normal", "flow"]


def test_the_scale_of_a_heavy_tail_is_that_of_its_middle():
    """Half the range between the 15.87 % and the 84.13 % quantile: tan(0.3413 pi) for a Cauchy, 1 for a normal."""
    normal = torch.randn(20_000)
    cauchy = 3.0 + dist.Cauchy(0.0, 1.0).sample((20_000,))
    shift, scale = location_and_scale(torch.stack([normal, cauchy], -1))
    assert shift[0] == normal.mean()
    assert scale[0] == pytest.approx(normal.std().item())
    # the standard error of a quantile at p is sqrt(p (1 - p) / n) / density: 0.035 here, 0.011 at the median
    assert scale[1] == pytest.approx(math.tan(0.3413 * math.pi), abs=0.12)
    assert shift[1] == pytest.approx(3.0, abs=0.05)
    rare = torch.zeros(20_000, 1).index_fill(0, torch.arange(20), 1.0)  # no range in the middle
    assert location_and_scale(rare)[1] == pytest.approx(rare.std().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_schools_start_near_the_data(family):
    """The half-Cauchy scale draws effects of many thousands, a hundred times what the data are like."""
    args = torch.tensor(EIGHT_SCHOOLS["sigma"]), torch.tensor(EIGHT_SCHOOLS["y"])
    guide = auto_faithful_guide(eight_schools, *args, family=family)
    scale = guide.blocks[1].conditionals.output_units("theta")[1].item()
    assert 3 < scale < 30
    elbo = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        assert elbo.loss(eight_schools, guide, *args) < 200  # 80,000 with the standard deviation as scale


def two_effects(index, w, y):
    """An intercept and a slope for each group, looked up by an index."""
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[..., index] + b[..., index] * w, 1.0), obs=y)


@pytest.mark.parametrize("family", FAMILIES)
def test_dependence_of_effects_within_a_group_has_slopes_of_its_own(family):
    """The slope of one effect on the other is set by the covariates of the group: no shared one is right."""
    index = torch.tensor([0, 1, 1, 2, 2, 2, 2, 0, 2])
    w, y = torch.randn(9), torch.randn(9)
    guide = auto_faithful_guide(two_effects, index, w, y, family=family, init="random")
    second = "a" if "b" in guide.inverse.parents["a"] else "b"
    first = "b" if second == "a" else "a"
    design = {"a": torch.ones(9), "b": w}

    def total(value):
        return torch.zeros(3).index_add(0, index, value)

    # precision (1 + p, c; c, 1 + q) of (first, second), and the linear terms
    p, q = 1 + total(design[first] ** 2), 1 + total(design[second] ** 2)
    c, h, k = total(w), total(design[first] * y), total(design[second] * y)
    determinant = p * q - c**2
    found = {
        first: ((h * q - k * c) / determinant, (q / determinant).sqrt(), torch.zeros(3)),
        second: (k / q, q.rsqrt(), -c / q),
    }
    for site, (loc, scale, slope) in found.items():
        i = next(i for i, block in enumerate(guide.plan.blocks) if site in block.sites)
        guide.set_linear_(site, {}, 0.0, 1.0)
        network = guide.blocks[i].conditionals
        width = network.output_units(site)[1]
        unit = {"shift": 0.0, "scale": 1.0}
        if site == second:
            inside = first in guide.plan.blocks[i].sites
            feature = guide.blocks[i].inputs.features
            moments = network.output_units(first) if inside else (feature.shift, feature.scale)
            unit = {"shift": moments[0], "scale": moments[1]}
        column = 2 * [s for s in guide.plan.blocks[i].sites if s in guide.plan.blocks[i].per_element].index(
            site
        )
        with torch.no_grad():
            # the location where the standardised parent is zero; set_linear_ has put it at zero and the scale at one
            network.table.table[..., column] = (loc + slope * unit["shift"]) / width
            log_scale = scale.log()
            if family == "flow":  # which bounds it
                log_scale = 4 * (log_scale / 4).atanh()
            network.table.table[..., column + 1] = log_scale
        if site == second:
            key, _ = network._map_of[site]
            slopes = torch.stack([slope * unit["scale"] / width, torch.zeros(3)], -1)
            network.maps[key].set_(slopes.unsqueeze(-1))
    same = (index[:, None] == index[None]).double()
    covariance = same * (1 + w[:, None] * w) + torch.eye(9)
    evidence = dist.MultivariateNormal(torch.zeros(9), covariance).log_prob(y).item()
    for _ in range(3):
        assert Trace_ELBO().loss(two_effects, guide, index, w, y) == pytest.approx(-evidence)


def test_maps_of_their_own_are_nonlinear_with_few_numbers_for_each_element():
    """What a group of n data hears of the mean above it, n / (n + exp(s)), for groups of different size."""
    count = torch.tensor([0.2, 1.0, 5.0, 25.0])
    x = torch.linspace(-2, 2, 101).unsqueeze(-1).unsqueeze(-1)  # (101, 1, 1)
    wanted = count / (count + (2 * x[..., 0]).exp())  # (101, 4)
    plate = PlateState("groups", -1, 4, 4, None)
    errors = {}
    for features in (0, 16):
        torch.manual_seed(0)
        index_map = ElementMap([plate], 1, 1, offset=True, features=features)
        assert index_map({"groups": plate}, x).eq(0).all()
        optim = torch.optim.Adam(index_map.parameters(), lr=0.02)
        for _ in range(500):
            optim.zero_grad()
            error = (index_map({"groups": plate}, x).squeeze(-1) - wanted).square().mean()
            error.backward()
            optim.step()
        errors[features] = error.item() ** 0.5
    assert errors[16] < errors[0] / 4  # an affine map leaves 0.095
    index_map.set_(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1), torch.zeros(4, 1))
    assert torch.allclose(index_map({"groups": plate}, x).squeeze(-1), x[..., 0] * torch.arange(1.0, 5.0))
