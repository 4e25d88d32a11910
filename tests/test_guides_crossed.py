"""Guides for two crossed groupings with many levels each, whose data look up one effect of either."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from plated_gaussians import draw_and_evidence
from pyro.infer import SVI, Trace_ELBO

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides import auto_faithful_guide, load_guide, plan
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.conditionals.pooling import POOLS, LookedUp, MeansOfLookedUp, PoolMember
from pyro_graphflows.guides.sites import FeatureMap


def crossed(rows, columns, i, j, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", rows):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", columns):
        b = pyro.sample("b", dist.Normal(0.0, 0.7))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu + a[..., i] + b[..., j], 0.5), obs=y)


def problem(rows, columns, number):
    """A model, its arguments, and the evidence."""
    torch.manual_seed(0)
    model = functools.partial(crossed, rows, columns)
    indices = torch.randint(rows, (number,)), torch.randint(columns, (number,))
    y, evidence = draw_and_evidence(model, indices, (number,))
    return model, (*indices, y), evidence


def losses(model, guide, args, number=60):
    with torch.no_grad():
        return torch.tensor([Trace_ELBO().differentiable_loss(model, guide, *args) for _ in range(number)])


def assert_near(found, evidence, gap):
    assert found.mean() + evidence < gap + 3 * found.std() / len(found) ** 0.5


def test_effects_of_many_levels_start_at_their_posterior_and_stay_there(tmp_path):
    model, args, evidence = problem(75, 70, 400)
    pyro.set_rng_seed(0)
    guide = auto_faithful_guide(model, *args)
    assert "(means of those looked up by " in guide.describe()
    assert_near(losses(model, guide, args), evidence, 0.5)  # 0.25; pooled over all levels, a hundred nats
    guide.save(tmp_path / "guide.safetensors")
    again = load_guide(tmp_path / "guide.safetensors", model)
    found = []
    for one in (guide, again):
        pyro.set_rng_seed(1)
        found.append(losses(model, one, args, 1))
    torch.testing.assert_close(*found)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(20):
        svi.step(*args)
    assert_near(losses(model, guide, args), evidence, 0.6)


def test_data_in_two_plates_have_a_mean_each():
    """With the mean of those of one plate alone the start was 4.2 nats off."""

    def model(i, j, k, m, y, z):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", 75):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 70):
            b = pyro.sample("b", dist.Normal(0.0, 0.7))
        with pyro.plate("data", 200):
            pyro.sample("y", dist.Normal(mu + a[..., i] + b[..., j], 0.5), obs=y)
        with pyro.plate("others", 200):
            pyro.sample("y_others", dist.Normal(mu + a[..., k] - b[..., m], 0.5), obs=z)

    def of_all(i, j, k, m, yz):
        model(i, j, k, m, yz[:200], yz[200:])

    torch.manual_seed(0)
    indices = [torch.randint(levels, (200,)) for levels in (75, 70, 75, 70)]
    yz, evidence = draw_and_evidence(of_all, indices, (400,))
    args = (*indices, yz[:200], yz[200:])
    guide = auto_faithful_guide(model, *args)
    assert "b (means of those looked up by j, m)" in guide.describe()
    assert_near(losses(model, guide, args), evidence, 1.0)


def test_of_more_levels_than_pairs_have_parameters_each_starts_at_its_place(monkeypatch):
    monkeypatch.setattr(plan, "MOST_COUPLED_PAIRS", 10)
    model, args, evidence = problem(75, 70, 400)
    guide = auto_faithful_guide(model, *args)
    assert "a normal of rank 4" in guide.describe()
    assert_near(losses(model, guide, args), evidence, 2.0)  # a map for all levels is hundreds of nats off


def test_what_is_averaged_without_an_argument_that_tells_is_said():
    _, (i, j, y), _ = problem(75, 70, 400)

    def model(y):
        crossed(75, 70, i, j, y)

    guide = auto_faithful_guide(model, y)
    assert "come in as means of all: which of them the data of an element look up is reported by no" in (
        guide.describe()
    )


def slopes(rows, columns, i, j, x, y):
    with pyro.plate("rows", rows):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("columns", columns):
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 0.7).to_event(1))
    with pyro.plate("data", len(y)):
        of_x = a[..., i, 1] + b[..., j, 1]
        pyro.sample("y", dist.Normal(a[..., i, 0] + b[..., j, 0] + of_x * x, 0.5), obs=y)


def test_slopes_of_both_groupings_start_at_their_posterior():
    torch.manual_seed(0)
    model = functools.partial(slopes, 70, 35)
    covariates = torch.randint(70, (300,)), torch.randint(35, (300,)), torch.randn(300)
    y, evidence = draw_and_evidence(model, covariates, (300,))
    guide = auto_faithful_guide(model, *covariates, y)
    assert "(means of those looked up by " in guide.describe()
    assert_near(losses(model, guide, (*covariates, y)), evidence, 1.0)  # with means alone, tens of nats


# ---------------------------------------------------------------- the summary

PLATES = {
    "rows": PlateState("rows", -1, 3, 3, None),
    "columns": PlateState("columns", -1, 4, 4, None),
    "data": PlateState("data", -1, 5, 5, None),
}
ROWS, COLUMNS = torch.tensor([0, 2, 2, 0, 0]), torch.tensor([3, 1, 0, 3, 2])


def means(size=1, covariates=()):
    member = PoolMember("b", size, frozenset({"columns"}))
    looked_up = LookedUp(member, FeatureMap(None, torch.randn(50, size)), "j", "columns", "data")
    further = [PoolMember(name, 1, frozenset({"data"})) for name in covariates]
    maps = [FeatureMap(None, torch.randn(50, 1)) for _ in covariates]
    return MeansOfLookedUp(looked_up, "i", "rows", further, maps)


@pytest.mark.parametrize("lead", [(), (6,)])
def test_means_are_of_what_the_data_of_a_group_look_up(lead):
    pool, b = means(2), torch.randn(*lead, 4, 2)
    found = pool({"b": b, "i": ROWS, "j": COLUMNS}, PLATES, {})
    of_data = pool.each.maps[0](b)[..., COLUMNS, :]
    expected = [
        of_data[..., i == ROWS, :].mean(-2) if (i == ROWS).any() else torch.zeros(*lead, 2) for i in range(3)
    ]
    torch.testing.assert_close(found, torch.stack(expected, -2))
    again = POOLS["MeansOfLookedUp"].from_plain(pool.to_plain())
    again.load_state_dict(pool.state_dict())
    assert torch.equal(again({"b": b, "i": ROWS, "j": COLUMNS}, PLATES, {}), found)


def test_means_are_of_products_with_covariates_and_their_products_too():
    pool, b = means(2, ("u", "v")), torch.randn(6, 4, 2)
    values = {"b": b, "i": ROWS, "j": COLUMNS, "u": torch.randn(5, 1), "v": torch.randn(5, 1)}
    found = pool(values, PLATES, {})
    of_data = pool.each.maps[0](b)[..., COLUMNS, :]
    u, v = (pool.of_covariates[k](values[name]) for k, name in enumerate("uv"))
    products = torch.cat([of_data * factor for factor in (1.0, u, v, u * u, u * v, v * v)], -1)
    for i in (0, 2):
        torch.testing.assert_close(found[:, i], products[:, i == ROWS].mean(-2))
    assert found.shape == (6, 3, pool.num_features)
    again = POOLS["MeansOfLookedUp"].from_plain(pool.to_plain())
    again.load_state_dict(pool.state_dict())
    assert torch.equal(again(values, PLATES, {}), found)


def test_plates_of_other_dimensions_go_to_their_places():
    pool, b = means(), torch.randn(4, 1)
    apart = {
        **PLATES,
        "rows": PlateState("rows", -2, 3, 3, None),
        "columns": PlateState("columns", -3, 4, 4, None),
    }
    found = pool({"b": b.reshape(4, 1, 1, 1), "i": ROWS, "j": COLUMNS}, apart, {})
    torch.testing.assert_close(found.reshape(3, 1), pool({"b": b, "i": ROWS, "j": COLUMNS}, PLATES, {}))
    assert found.shape == (3, 1, 1)


def test_parts_of_plates_and_indices_of_another_length_are_refused():
    pool, values = means(), {"b": torch.randn(4, 1), "i": ROWS, "j": COLUMNS}
    for name in ("data", "rows"):
        part = {**PLATES, name: PlateState(name, -1, PLATES[name].size, 100, None)}
        with pytest.raises(GraphflowsError, match=f"Expected plate '{name}' in full"):
            pool(values, part, {})
    with pytest.raises(
        GraphflowsError, match="Expected 5 entries of i, one for each element of plate 'data'; got 4"
    ):
        pool({**values, "i": ROWS[:4]}, PLATES, {})
