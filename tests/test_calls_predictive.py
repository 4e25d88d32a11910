"""Predictions as in Pyro's tutorials: what a guide can be called with when the data to predict are not there.

Sites with per-element parameters read no data, so that new inputs are all that they need. Amortised sites read data:
without these the message says which, and both ways to predict.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Importance, Predictive
from pyro.infer.autoguide import AutoDelta, AutoGuideList

from pyro_graphflows import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides import Flow, auto_faithful_guide

FAMILIES = pytest.mark.parametrize("family", ["normal", Flow(units_per_variable=3, conditioner_units=3)])
X, Y = torch.linspace(-1, 1, 12).double(), torch.linspace(-1, 3, 12).double()
NEW = torch.linspace(0, 1, 5).double()


def line(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("d", len(x)):
        return pyro.sample("y", dist.Normal(a + b * x, 0.5), obs=y)


def local(x, y=None):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + x, 0.5), obs=y)


def groups(x, y=None):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3, dim=-2):
        t = pyro.sample("t", dist.Normal(m, 1.0))
        with pyro.plate("rows", x.shape[-1], dim=-1):
            pyro.sample("y", dist.Normal(t + x, 1.0), obs=y)


@FAMILIES
def test_globals_need_new_inputs_alone(family):
    guide = auto_faithful_guide(line, X, Y, family=family)
    drawn = Predictive(line, guide=guide, num_samples=50)(NEW)
    assert drawn["y"].shape == (50, 5)
    assert {name: value.shape for name, value in guide(NEW).items()} == {"a": (), "b": ()}
    given_all = guide.median(X, Y)
    for found in (guide.median(NEW), guide.median()):
        assert found == given_all  # no site reads data
    pyro.set_rng_seed(1)
    quantiles = guide.quantiles([0.1, 0.9])
    pyro.set_rng_seed(1)
    again = guide.quantiles([0.1, 0.9], X, Y)
    for name in "ab":
        assert quantiles[name].shape == (2,)
        torch.testing.assert_close(quantiles[name], again[name])


@pytest.mark.parametrize("num", [1, 5])
def test_a_conditioned_model_has_no_data_for_new_inputs(num):
    """The data that ``condition`` holds are those of set-up; globals need none of them."""
    guide = auto_faithful_guide(poutine.condition(line, data={"y": Y}), X)
    given_all = guide.median(X)
    assert guide.median(NEW[:num]) == given_all
    assert Predictive(line, guide=guide, num_samples=6)(NEW[:num])["y"].shape == (6, num)
    with pytest.raises(GraphflowsError, match=r"data of 'y' of shape \(12,\).*got \(12, 1\)"):
        auto_faithful_guide(poutine.condition(line, data={"y": Y[:, None]}), X)
    local_guide = auto_faithful_guide(poutine.condition(local, data={"y": Y}), X)
    with pytest.raises(GraphflowsError, match=r"Expected data of 'y' of shape"):
        local_guide(NEW)


def test_the_vectorised_prediction_is_the_same_kind():
    guide = auto_faithful_guide(line, X, Y)
    assert Predictive(line, guide=guide, num_samples=6, parallel=True)(NEW)["y"].shape == (6, 5)


def test_groups_are_remembered_without_arguments():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    guide = auto_faithful_guide(groups, x, y)
    assert guide.median()["t"].shape == (3, 1)
    assert guide.quantiles([0.5])["t"].shape == (1, 3, 1)
    assert Predictive(groups, guide=guide, num_samples=7)(torch.randn(3, 9))["y"].shape == (7, 3, 9)


def test_subsampled_groups_are_all_there_without_arguments():
    def model(x, y=None):
        with pyro.plate("groups", 6, subsample_size=2, dim=-2) as index:
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 4, dim=-1):
                pyro.sample("y", dist.Normal(t, 1.0), obs=None if y is None else y[index])

    x, y = torch.randn(6, 4), torch.randn(6, 4)
    guide = auto_faithful_guide(model, x, y)
    assert guide.median()["t"].shape == (6, 1)


def test_positive_supports_and_masks_are_remembered():
    def model(x, y=None):
        s = pyro.sample("s", dist.HalfNormal(2.0))
        with poutine.mask(mask=torch.tensor([True, False])), pyro.plate("two", 2):
            pyro.sample("u", dist.Uniform(1.0, 3.0))
        with pyro.plate("d", len(x)):
            pyro.sample("y", dist.Normal(x, s), obs=y)

    guide = auto_faithful_guide(model, X, Y)
    found = guide.median()
    assert found["s"] > 0
    assert ((found["u"] > 1) & (found["u"] < 3)).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda guide: Predictive(local, guide=guide, num_samples=3)(NEW),
        lambda guide: guide(NEW),
        lambda guide: guide.median(),
        lambda guide: guide.quantiles([0.5]),
    ],
    ids=["Predictive", "guide", "median", "quantiles"],
)
def test_sites_that_read_data_name_them_and_both_ways(call):
    guide = auto_faithful_guide(local, X, Y)
    with pytest.raises(UnsupportedModelError, match="'y'") as error:
        call(guide)
    message = str(error.value)
    assert "read by z" in message
    assert (
        "Predictive(guide, num_samples=S)(data), then Predictive(model, posterior_samples=posterior)"
        in message
    )
    assert "Predictive(model, guide=guide.given(y=y), num_samples=S)(inputs)" in message


def test_both_ways_work():
    guide = auto_faithful_guide(local, X, Y)
    posterior = Predictive(guide, num_samples=6)(X, Y)
    assert Predictive(local, posterior_samples=posterior)(X)["y"].shape == (6, 12)
    again = Predictive(local, guide=guide.given(y=Y), num_samples=400)(X)["y"]
    # replicates of z + x + noise given y; the regression start of 10,000 samples is the posterior but for .02
    expected, scale = X + (Y - X) * 0.8, (0.2 + 0.25) ** 0.5
    assert ((again.mean(0) - expected).abs() < 5 * scale / 400**0.5 + 0.05).all()


def test_a_missing_covariate_is_named():
    guide = auto_faithful_guide(local, X, Y)
    with pytest.raises(UnsupportedModelError, match=r"'x' \(read by z\)"):
        guide.given(y=Y)()


def test_mixed_reading():
    """A global with parameters of its own beside locals that read y: the message blames the locals alone."""

    def model(x, y=None):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("y", dist.Normal(z + x, 0.5), obs=y)

    guide = auto_faithful_guide(model, X, Y)
    with pytest.raises(UnsupportedModelError, match=r"'y' \(read by z\)"):
        guide(NEW)


def test_pooled_data_are_read():
    guide = auto_faithful_guide(line, X, Y, pool="deepset", num_start_samples=200)
    with pytest.raises(UnsupportedModelError, match=r"'y' \(read by"):
        Predictive(line, guide=guide, num_samples=3)(NEW)


def test_optional_arguments_that_the_model_cannot_do_without():
    def model(x=None, y=None):
        return line(x, y)

    guide = auto_faithful_guide(model, X, Y)
    assert guide.median() == guide.median(X, Y)


def test_errors_of_the_model_itself_are_its_own():
    guide = auto_faithful_guide(line, X, Y)
    with pytest.raises(TypeError):
        guide(3)


def test_importance():
    guide = auto_faithful_guide(local, X, Y)
    exact = dist.Normal(X, 1.25**0.5).log_prob(Y).sum()
    sampler = Importance(local, guide, num_samples=200).run(X, Y)
    weights = torch.stack(sampler.log_weights)
    error = weights.exp().std() / 200**0.5 / weights.exp().mean()
    assert abs(sampler.get_log_normalizer() - exact) < 5 * error + 1e-6


def test_parts_of_a_guide_list():
    guide = AutoGuideList(line)
    guide.append(auto_faithful_guide(poutine.block(line, expose=["a"])))
    guide.append(AutoDelta(poutine.block(line, expose=["b"])))
    guide(X, Y)
    assert Predictive(line, guide=guide, num_samples=4)(NEW)["y"].shape == (4, 5)
    assert set(guide.median()) == {"a", "b"}


def test_medians_have_all_elements_of_the_plates():
    """Also of sites that look at nothing, whose conditionals are one for all elements."""

    def model(x):
        pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2, dim=-2):
            pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), subsample_size=3, dim=-1) as ind:
                pyro.sample("b", dist.Normal(torch.zeros(4), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[ind])

    x = torch.zeros(5)
    guide = auto_faithful_guide(model, x, num_start_samples=100)
    for values in (guide.median(x), guide(x)):
        assert {name: tuple(value.shape) for name, value in values.items()} == {
            "g": (),
            "a": (2, 1),
            "b": (2, 3, 4),
        }
