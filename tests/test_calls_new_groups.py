"""Calls with other groups, or with other data, than a guide with per-element parameters was fitted to."""

import copy
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO

from pyro_graphflows import TrainingData, auto_faithful_guide, fit, load_guide, log_evidence
from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.guides import Flow, Spline
from pyro_graphflows.guides.conditionals.elements import WithNewElements
from pyro_graphflows.guides.fitted_data import CallData, FittedData

N = dist.Normal
NEW = "Elements beyond those fitted"
OTHER = "which read no data, fit those of set-up"
GROUP = torch.arange(5).repeat(8)


def groups(group, num, y=None):
    mu = pyro.sample("mu", N(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", num):
        theta = pyro.sample("theta", N(mu, tau))
    with pyro.plate("data", len(group)):
        pyro.sample("y", N(theta[..., group], 1.0), obs=y)


@pytest.fixture
def y():
    return torch.randn(40) + torch.arange(5.0)[GROUP]


def conditioned(guide, values, *args):
    """Return the sites of a guide's trace with some latents at given values."""
    with poutine.block():
        return poutine.trace(poutine.condition(guide, data=values)).get_trace(*args).nodes


OUTER = {"mu": torch.tensor(3.0), "tau": torch.tensor(0.2)}

FAMILIES = {
    "normal": "normal",
    "spline": Spline(num_bins=3),
    "flow": Flow(units_per_variable=3, conditioner_units=3),
    "graphical": Flow(form="graphical", units_per_variable=3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_beyond_those_fitted_follow_the_model(family, y):
    guide = auto_faithful_guide(groups, GROUP, 5, y, num_start_samples=200, family=FAMILIES[family])
    fitted = conditioned(guide, OUTER, GROUP, 5, y)["theta"]["fn"]
    with pytest.warns(
        GraphflowsWarning, match=rf"{NEW}, in plate 'groups' \(5 .* now 7\): there theta follow"
    ):
        now = conditioned(guide, OUTER, GROUP, 7, y)["theta"]["fn"]
    values = torch.linspace(1.0, 4.0, 7)
    log_prob = now.log_prob(values)
    torch.testing.assert_close(log_prob[:5], fitted.log_prob(values[:5]))  # the five have what they had
    torch.testing.assert_close(
        log_prob[5:], N(3.0, 0.2).log_prob(values[5:])
    )  # the model, at these mu and tau
    draws = torch.stack(
        [conditioned(guide, OUTER, GROUP, 7, y)["theta"]["value"] for _ in range(400)]
    ).detach()
    # the bounds are six standard errors: once in a billion
    assert ((draws[:, 5:].mean(0) - 3.0).abs() < 6 * 0.2 / 20).all()
    assert ((draws[:, 5:].std(0) - 0.2).abs() < 6 * 0.2 / 28).all()
    guide(GROUP, 7, y)  # said once


def test_the_bound_is_right_with_new_groups(y):
    """A group without data adds nothing: the terms of the model and the guide cancel, draw by draw."""
    guide = auto_faithful_guide(groups, GROUP, 5, y, num_start_samples=200)
    with pytest.warns(GraphflowsWarning, match=NEW):
        guide(GROUP, 7, y)
    drawn = poutine.trace(guide).get_trace(GROUP, 7, y)
    five = {name: drawn.nodes[name]["value"] for name in ("mu", "tau")}
    five["theta"] = drawn.nodes["theta"]["value"][:5]
    loss = []
    for values, num in (({**five, "theta": drawn.nodes["theta"]["value"]}, 7), (five, 5)):
        theirs = poutine.trace(poutine.condition(groups, data=values)).get_trace(GROUP, num, y)
        loss.append(theirs.log_prob_sum() - guide.log_prob(values, GROUP, num, y))
    torch.testing.assert_close(loss[0], loss[1])
    grad = torch.autograd.grad(
        Trace_ELBO().differentiable_loss(groups, guide, GROUP, 7, y), guide.parameters()
    )
    assert all(bool(torch.isfinite(part).all()) for part in grad)


def test_prediction_for_unseen_groups(y):
    guide = auto_faithful_guide(groups, GROUP, 5, y, num_start_samples=200)
    with pytest.warns(GraphflowsWarning, match=NEW):
        draws = Predictive(guide, num_samples=300, parallel=True)(GROUP, 7, y)
    assert draws["theta"].shape == (300, 7)
    new = draws["theta"][:, 5:] - draws["mu"].reshape(-1, 1)  # depends on mu and tau of the same draw
    scaled = new / draws["tau"].reshape(-1, 1)
    assert abs(float(scaled.mean())) < 6 / math.sqrt(600)
    assert abs(float(scaled.std()) - 1) < 6 / math.sqrt(1200)
    centre = guide.median(GROUP, 7, y)
    torch.testing.assert_close(centre["theta"][5:], centre["mu"].expand(2))
    assert guide.quantiles([0.1, 0.9], GROUP, 7, y, num_draws=50)["theta"].shape == (2, 7)
    predicted = Predictive(groups, posterior_samples=draws, parallel=True)(torch.tensor([5, 6, 0]), 7)
    assert predicted["y"].shape == (300, 3)


def test_fewer_groups_take_theirs(y):
    guide = auto_faithful_guide(groups, GROUP, 5, y, num_start_samples=200)
    with torch.no_grad():
        guide.block_of("theta").conditionals.table.table.normal_()
    all_five = conditioned(guide, OUTER, GROUP, 5, y)["theta"]["fn"].log_prob(torch.zeros(5))
    few = GROUP[GROUP < 3]
    with pytest.warns(GraphflowsWarning, match=OTHER):
        three = conditioned(guide, OUTER, few, 3, y[GROUP < 3])["theta"]["fn"].log_prob(torch.zeros(3))
    torch.testing.assert_close(three, all_five[:3])


def named(group, num, names, y=None):
    """Some groups, by their indices."""
    mu = pyro.sample("mu", N(0.0, 1.0))
    with pyro.plate("groups", num, subsample=names):
        theta = pyro.sample("theta", N(mu, 1.0))
        with pyro.plate("data", y.shape[0], dim=-2):
            pyro.sample("y", N(theta, 1.0), obs=y)


def test_named_groups_take_theirs():
    y = torch.randn(8, 5)
    guide = auto_faithful_guide(named, None, 5, torch.arange(5), y, num_start_samples=200)
    with torch.no_grad():
        guide.block_of("theta").conditionals.table.table.normal_()
    outer = {"mu": torch.tensor(0.5)}
    all_five = conditioned(guide, outer, None, 5, torch.arange(5), y)["theta"]["fn"].log_prob(torch.zeros(5))
    chosen = torch.tensor([3, 1])
    some = conditioned(guide, outer, None, 5, chosen, y[:, chosen])["theta"]["fn"]
    torch.testing.assert_close(some.log_prob(torch.zeros(2)), all_five[chosen])
    chosen = torch.tensor([6, 1, 5])  # two of them new
    with pytest.warns(GraphflowsWarning, match=NEW):
        some = conditioned(guide, outer, None, 7, chosen, torch.randn(8, 3))["theta"]["fn"]
    expected = N(0.5, 1.0).log_prob(torch.zeros(3))
    expected[1] = all_five[1]
    torch.testing.assert_close(some.log_prob(torch.zeros(3)), expected)


def test_supports_vectors_and_classes_of_new_groups():
    def model(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("groups", x.shape[-1], dim=-1):
            p = pyro.sample("p", dist.Dirichlet(rate.unsqueeze(-1) * torch.ones(3)))
            k = pyro.sample("k", dist.Categorical(p))
            v = pyro.sample("v", N(torch.zeros(2), rate.unsqueeze(-1)).to_event(1))
            with pyro.plate("data", x.shape[-2], dim=-2):
                pyro.sample("x", N(v.sum(-1) + k, 1.0), obs=x)

    x = torch.randn(6, 4)
    more = torch.cat([x, torch.zeros(6, 2)], -1)
    guide = auto_faithful_guide(model, x, num_start_samples=200, inverse="reverse")
    with pytest.warns(GraphflowsWarning) as caught:
        values = guide(more)
    assert sum(NEW in str(each.message) for each in caught) >= 1
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "rate": (), "p": (6, 3), "k": (6,), "v": (6, 2),
    }  # fmt: skip
    torch.testing.assert_close(values["p"].sum(-1), torch.ones(6))
    assert math.isfinite(Trace_ELBO().loss(model, guide, more))
    log_prob = guide.log_prob({name: value.detach() for name, value in values.items()}, more)
    assert math.isfinite(log_prob.detach())
    assert guide.median(more)["k"].shape == (6,)


@pytest.mark.filterwarnings("ignore:.*which read no data")
def test_parts_of_the_model_that_are_sampled_later_are_refused():
    """Parameters of the network's own order: the model's conditional is not known where a parent comes later."""

    def model(x):
        with pyro.plate("groups", x.shape[-1], dim=-1):
            a = pyro.sample("a", N(0.0, 1.0))
            b = pyro.sample("b", N(a, 1.0))
            with pyro.plate("data", x.shape[-2], dim=-2):
                pyro.sample("x", N(b, 1.0), obs=x)

    x = torch.randn(6, 4)
    guide = auto_faithful_guide(model, x, inverse=["a", "b"], num_start_samples=200)
    assert guide.inverse.sampling_order == ("b", "a")
    message = r"no new elements of plate 'groups' \(4 .* now 6\): 'b' .* its parents 'a' .* inverse='reverse'"
    with pytest.raises(UnsupportedModelError, match=message):
        guide(torch.cat([x, x[:, :2]], -1))


def test_plates_whose_constants_vary_keep_their_size():
    scale = torch.tensor([0.5, 1.0, 2.0, 1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", N(0.0, 1.0))
            pyro.sample("x", N(z, scale[: len(x)] if len(x) < 5 else 1.0), obs=x)

    guide = auto_faithful_guide(model, torch.randn(4), num_start_samples=200)
    with pytest.raises(GraphflowsError, match="Expected plate 'data' to have 4 elements"):
        guide(torch.randn(6))


def test_a_distribution_of_two():
    new = torch.tensor([False, True, True])
    both = WithNewElements(N(torch.zeros(3), 1.0), dist.Cauchy(torch.tensor(2.0), 1.0), new)
    assert both.expand((4, 3)).batch_shape == (4, 3)
    assert both.rsample((5,)).shape == (5, 3)
    torch.testing.assert_close(both.centre(), torch.tensor([0.0, 2.0, 2.0]))
    expected = torch.cat([N(0.0, 1.0).log_prob(torch.ones(1)), dist.Cauchy(2.0, 1.0).log_prob(torch.ones(2))])
    torch.testing.assert_close(both.log_prob(torch.ones(3)), expected)
    rough = WithNewElements(N(torch.zeros(3), 1.0), dist.Exponential(1.0).mask(True), new)
    torch.testing.assert_close(rough.centre()[1:], torch.full((2,), math.log(2.0)))


# ---------------------------------------------------------------- other data


def told(guide, *args, **kwargs):
    """Return the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guide(*args, **kwargs)
    return [str(each.message) for each in caught]


def test_a_call_with_other_data_is_warned_of_once(y):
    guide = auto_faithful_guide(groups, GROUP, 5, y, num_start_samples=200)
    assert told(guide, GROUP, 5, y) == []
    assert told(guide, GROUP.clone(), 5, y=y.clone()) == []  # the same numbers
    (message,) = told(guide, GROUP, 5, y + 1)
    assert message.startswith("The per-element parameters of mu, tau, theta, which read no data")
    assert "pool='deepset'" in message
    assert told(guide, GROUP, 5, y + 2) == []
    assert guide.sites_of_other_data(GROUP, 5, y + 1) == ("mu", "tau", "theta")
    assert guide.sites_of_other_data(GROUP, 5, y) == ()
    assert guide.sites_of_other_data(GROUP, 5, observations={"y": y + 1}) == ("mu", "tau", "theta")
    assert told(copy.deepcopy(auto_faithful_guide(groups, GROUP, 5, y, num_start_samples=200)), GROUP, 5, -y)


def test_other_indices_and_other_sizes_are_other_data(y):
    for args in ((GROUP.flip(0), 5, y), (GROUP[:20], 5, y[:20])):
        guide = auto_faithful_guide(groups, GROUP, 5, y, num_start_samples=200)
        assert OTHER in told(guide, *args)[0]


def test_data_that_were_written_over_are_other_data(y):
    guide = auto_faithful_guide(groups, GROUP, 5, y.clone(), num_start_samples=200)
    mine = y.clone()
    assert told(guide, GROUP, 5, mine) == []
    mine += 1.0
    assert OTHER in told(guide, GROUP, 5, mine)[0]


def test_the_tensors_that_were_fitted_are_not_compared(y, monkeypatch):
    guide = auto_faithful_guide(groups, GROUP, 5, y, num_start_samples=200)
    compared = []
    original = FittedData.sites_of_other_data
    monkeypatch.setattr(
        FittedData,
        "sites_of_other_data",
        lambda *args, **kwargs: compared.append(1) or original(*args, **kwargs),
    )
    for _ in range(3):
        guide(GROUP, 5, y)
    assert compared == []
    same = y.clone()
    for _ in range(3):
        guide(GROUP, 5, same)
    assert compared == [1]


def test_on_an_accelerator_comparisons_become_rare(y, monkeypatch):
    """The meta device stands for one: what matters is that its tensors are elsewhere."""
    guide = auto_faithful_guide(groups, GROUP, 5, y, num_start_samples=200)
    fitted, compared = guide._fitted, []
    monkeypatch.setattr("pyro_graphflows.guides.fitted_data._differ", lambda *_: compared.append(1) and False)
    call = guide._reader.read(groups, (GROUP, 5, y), {})

    def elsewhere():
        leaves = {path: torch.empty_like(leaf, device="meta") for path, leaf in fitted.leaves.items()}
        return CallData(call, (tuple(leaves.values()), {}), leaves, {})

    for _ in range(100):
        fitted.sites_of_new_data(elsewhere(), guide.plan, guide._reader.paths, ["mu"])
    assert len(compared) == 2 * 7  # two tensors in the calls 1, 2, 4, ..., 64
    fitted.sites_of_other_data(elsewhere(), guide.plan, guide._reader.paths, ["mu"])
    assert len(compared) == 2 * 8
    # what is not compared is not known: other data of call 101 are found by call 128
    other = elsewhere()
    monkeypatch.setattr("pyro_graphflows.guides.fitted_data._differ", lambda *_: True)
    found = [fitted.sites_of_new_data(other, guide.plan, guide._reader.paths, ["mu"]) for _ in range(28)]
    assert found == [()] * 27 + [("mu",)]


def two_data_sets(x, w):
    a = pyro.sample("a", N(0.0, 1.0))
    b = pyro.sample("b", N(0.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("x", N(a, 1.0), obs=x)
        pyro.sample("w", N(b, 1.0), obs=w)


def test_data_of_which_was_warned_stay_other_data():
    x, w = torch.randn(5), torch.randn(5)
    guide = auto_faithful_guide(two_data_sets, x, w, num_start_samples=200)
    other = x + 1
    (message,) = told(guide, other, w)
    assert message.startswith("The per-element parameters of a, which")
    assert told(guide, other, w) == []
    assert guide.sites_of_other_data(other, w) == ("a",)
    (message,) = told(guide, other, w + 1)
    assert message.startswith("The per-element parameters of b, which")


def test_a_call_without_data_after_one_whose_tensors_are_gone():
    x, w = torch.randn(5), torch.randn(5)
    guide = auto_faithful_guide(two_data_sets, x, w, num_start_samples=200)
    assert told(guide, x.clone(), w.clone()) == []
    assert set(guide(None, None)) == {"a", "b"}


def test_data_that_are_computed_from_arguments_are_compared_by_these():
    def model(x):
        mu = pyro.sample("mu", N(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("log_x", N(mu, 1.0), obs=x.log())

    x = torch.rand(10)
    guide = auto_faithful_guide(model, x, num_start_samples=200)
    assert told(guide, x) == []
    assert told(guide, x.clone()) == []
    assert told(guide, 2 * x)


def test_prediction_without_data_is_not_warned_of(y):
    def regression(x, y=None):
        w = pyro.sample("w", N(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", N(w * x, 1.0), obs=y)

    x = torch.randn(40)
    guide = auto_faithful_guide(regression, x, y, num_start_samples=200)
    assert told(guide, x[:3]) == []
    assert guide.sites_of_other_data(x[:3]) == ()
    assert told(guide, x + 1, y)


def test_amortised_guides_and_batches_are_not_warned_of(y):
    guide = auto_faithful_guide(groups, GROUP, 5, y, pool="deepset", num_start_samples=200)
    assert told(guide, GROUP, 5, y + 1) == []
    assert guide.sites_of_other_data(GROUP, 5, y + 1) == ()

    def batches(x):
        mu = pyro.sample("mu", N(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=4) as index:
            z = pyro.sample("z", N(mu, 1.0))
            pyro.sample("x", N(z, 1.0), obs=x[index])

    x = torch.randn(40)
    guide = auto_faithful_guide(batches, x, num_start_samples=200)
    for _ in range(3):
        assert told(guide, x) == []


def test_fit_replaces_what_was_fitted(y):
    def shared(y):
        mu = pyro.sample("mu", N(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", N(mu, 1.0), obs=y)

    for data, new in ((y + 1, y + 1), ({"y": y + 1}, y + 1), (TrainingData(y + 1, kwargs={}), y + 1)):
        guide = auto_faithful_guide(shared, y, num_start_samples=200)
        with warnings.catch_warnings():
            warnings.simplefilter("error", GraphflowsWarning)
            fit(shared, guide, data, schedule=1, progress=False)
            guide(new.clone())
        assert OTHER in told(guide, y)[0]
    guide = auto_faithful_guide(shared, y, num_start_samples=200)
    fit(shared, guide, [(y + 1,)], schedule=1, progress=False)  # what all the data are is not known
    assert told(guide, y + 3) == []
    guide.remember_data(y)
    assert told(guide, y + 3)
    new = auto_faithful_guide(shared)
    fit(shared, new, y, schedule=1, progress=False)
    assert told(new, y.clone()) == []
    assert told(new, y + 1)


def test_training_by_hand_is_warned_of_once(y):
    guide = auto_faithful_guide(groups, GROUP, 5, torch.zeros(40), num_start_samples=200)
    svi = SVI(groups, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    with pytest.warns(GraphflowsWarning, match=r"Train with these data, set up a guide with them"):
        svi.step(GROUP, 5, y)
    svi.step(GROUP, 5, y)


def test_log_evidence_says_so(y):
    guide = auto_faithful_guide(groups, GROUP, 5, y, num_start_samples=200)
    options = {"num_particles": 50, "data_plate": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraphflowsWarning)
        log_evidence(groups, guide, GROUP, 5, y, **options)
    for _ in range(2):
        with pytest.warns(
            GraphflowsWarning, match=r"fitted to other data: the parameters of mu, tau, theta"
        ) as caught:
            log_evidence(groups, guide, GROUP, 5, y + 1, **options)
        assert len(caught) == 1


def test_a_loaded_guide_knows_what_it_was_fitted_to(tmp_path, y):
    guide = auto_faithful_guide(groups, GROUP, 5, y, num_start_samples=200)
    guide.save(tmp_path / "guide.safetensors")
    for _ in range(2):
        loaded = load_guide(tmp_path / "guide.safetensors", groups)
        assert told(loaded, GROUP, 5, y.clone()) == []
        assert OTHER in told(loaded, GROUP, 5, y + 1)[0]
        loaded.save(tmp_path / "guide.safetensors")
    guide._model = None
    assert pickle.loads(pickle.dumps(guide))._fitted is None
