"""Joint samples at set-up: what is kept, how many there are, and what stands in a row."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from lookup_models import slopes
from plated_guides import hierarchical

from pyro_graphflows.guides import Normal, auto_faithful_guide, samples
from pyro_graphflows.guides.compile import GuideOptions, compile_guide
from pyro_graphflows.guides.samples import MOST_ROWS, ModelDraws, Samples, side_by_side, with_depth
from pyro_graphflows.guides.sites import input_encodings, latent_sites
from pyro_graphflows.inspect import trace_model


def draws_of(model, *args):
    traced = trace_model(model, args, {})
    return ModelDraws(model, args, {}, traced, latent_sites(traced), input_encodings(model, args, {}, traced))


def regression(w, x):
    slope = pyro.sample("slope", dist.LogNormal(0.5, 0.3))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("x", dist.Normal(slope * w + k, 0.1), obs=x)


W = torch.arange(4.0, dtype=torch.float64)
ARGS = W, torch.zeros(4, dtype=torch.float64)


def test_draws_are_flat_vectors_on_the_real_line():
    flat = draws_of(regression, *ARGS).draw(6000)
    shapes = {name: tuple(value.shape) for name, value in flat.items()}
    assert shapes == {"slope": (6000, 1), "k": (6000, 4, 3), "x": (6000, 4, 1), "w": (6000, 4, 1)}
    assert torch.equal(flat["w"][17, :, 0], W)
    assert (flat["k"].sum(-1) == 1).all()
    # a log-normal is normal before its bijection; standard errors are 0.3 / sqrt(6000), and less for the deviation
    assert flat["slope"].mean().item() == pytest.approx(0.5, abs=5 * 0.0039)
    assert flat["slope"].std().item() == pytest.approx(0.3, abs=5 * 0.0028)
    # the rows belong together: the noise is 0.1 once slope, class and covariate are taken off
    noise = flat["x"][..., 0] - flat["slope"].exp() * W - flat["k"] @ torch.arange(3.0)
    assert noise.std().item() == pytest.approx(0.1, abs=5 * 0.1 / (2 * 24_000) ** 0.5)


def test_draws_are_kept_and_drawn_again_only_where_more_are_wanted():
    draws = draws_of(regression, *ARGS)
    first = draws.draw(50)
    before = torch.get_rng_state()
    again, fewer = draws.draw(50), draws.draw(20)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.items():
        assert torch.equal(again[name], value)
        assert torch.equal(fewer[name], value[:20])
    more = draws.draw(60)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(more["x"][:50], first["x"])
    assert torch.equal(draws.draw(50)["x"], more["x"][:50])


def test_draws_that_are_not_kept():
    draws = draws_of(regression, *ARGS)
    first = draws.draw(50, keep=False)
    assert not torch.equal(draws.draw(50)["x"], first["x"])
    kept = draws.draw(50)
    assert torch.equal(draws.draw(50, keep=False)["x"], kept["x"])


def test_a_model_with_many_numbers_is_drawn_less_often(monkeypatch):
    monkeypatch.setattr(samples, "MOST_NUMBERS", 2500)
    monkeypatch.setattr(samples, "FEWEST_DRAWS", 30)
    numbers = 4 + 4 + 1 + 4  # x, k, slope, and the indices of the plate
    assert len(draws_of(regression, *ARGS).draw(1000)["x"]) == 2500 // numbers
    monkeypatch.setattr(samples, "MOST_NUMBERS", 10)
    assert len(draws_of(regression, *ARGS).draw(1000)["x"]) == 30


@pytest.mark.parametrize("kind", ["categorical", "mixture"])
def test_classes_count_with_all_that_a_draw_takes(kind, monkeypatch):
    """500 values of 300 classes each take 150,000 numbers, not 500."""

    def model(y):
        logits = pyro.sample("logits", dist.Normal(torch.zeros(300), 1.0).to_event(1))
        choice = dist.Categorical(logits=logits)
        with pyro.plate("data", 500):
            if kind == "categorical":
                pyro.sample("y", choice, obs=y)
            else:
                pyro.sample("y", dist.MixtureSameFamily(choice, dist.Normal(logits, 1.0)), obs=y.double())

    monkeypatch.setattr(samples, "MOST_PROBABILITIES", 40 * 500 * 300)
    monkeypatch.setattr(samples, "FEWEST_DRAWS", 30)
    flat = draws_of(model, torch.arange(500) % 300).draw(1000)
    assert {len(value) for value in flat.values()} == {40}


def test_the_data_of_the_call():
    x = torch.randn(4)
    draws = draws_of(regression, W, x)
    assert torch.equal(draws.argument("w"), W)
    assert torch.equal(draws.data("w"), W)
    assert torch.equal(draws.data("x"), x)
    assert draws.like.dtype == torch.float64
    assert draws.note is None


def test_data_of_which_some_are_missing_have_their_mask():
    def model(y, there):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=there)

    y, there = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])
    draws = draws_of(model, y, there)
    assert draws.data("y_observed").tolist() == [[1.0, 1.0], [0.0, 0.0], [3.0, 1.0]]
    flat = draws.draw(10)["y_observed"]
    assert flat.shape == (10, 3, 2)
    assert flat[..., 1].unique(dim=0).tolist() == [[1.0, 0.0, 1.0]]
    assert (flat[:, 1] == 0).all()


def test_the_widest_type_decides():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
            pyro.sample("x", dist.Normal(z.to(x.dtype), 1.0), obs=x)

    assert draws_of(model, torch.randn(3, dtype=torch.float64)).like.dtype == torch.float64
    assert draws_of(model, torch.randn(3, dtype=torch.float32)).like.dtype == torch.float32

    def discrete():
        pyro.sample("k", dist.Categorical(torch.ones(2)))

    torch.set_default_dtype(torch.float32)
    assert draws_of(discrete).like.dtype == torch.float32


# ---------------------------------------------------------------- in numbers that suit a plan


def samples_of(model, *args, num_rows=600, pool=None, **options):
    compiled = compile_guide(model, args, {}, GuideOptions(Normal(), pool=pool))
    return Samples.for_plan(
        compiled.draws, compiled.plan, compiled.plates, standardize=True, num_rows=num_rows, **options
    )


def test_every_block_has_its_rows():
    """The block of the global site has one row for each draw, that of the local one six: the first one decides."""
    joint = samples_of(hierarchical, torch.randn(6))
    assert joint.values["mu"].shape == (600, 1)
    assert joint.values["z"].shape == (600, 6, 1)
    alone = samples_of(regression_of_locals, torch.randn(6))
    assert alone.values["z"].shape == (100, 6, 1)
    assert samples_of(regression_of_locals, torch.randn(7)).values["z"].shape == (86, 7, 1)  # rounded up


def regression_of_locals(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_the_largest_block_does_not_fill_the_memory():
    n = MOST_ROWS // 10
    joint = samples_of(hierarchical, torch.randn(n), num_rows=5000)
    assert len(joint.values["mu"]) == 10
    assert len(samples_of(regression_of_locals, torch.randn(5000)).values["z"]) == 2  # a deviation needs two


def test_none_are_drawn_where_none_are_wanted_or_possible():
    x = torch.randn(4)
    joint = samples_of(regression_of_locals, x, num_rows=0)
    assert joint.values is None
    assert joint.note is None
    assert joint.for_block(["z"]) is joint
    assert joint.with_values({"s": x}) is joint

    def with_a_factor(x):
        regression_of_locals(x)
        pyro.factor("f", x.sum())

    at_prior = samples_of(with_a_factor, x)  # the latents' prior is known, and nothing about data
    assert abs(at_prior.values["z"].mean()) < 5 / at_prior.values["z"].numel() ** 0.5
    assert at_prior.note.startswith("no regression start: the latents start at their prior. ")

    def improper(x):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)

    refused = samples_of(improper, x)
    assert refused.values is None
    assert refused.note.startswith("no regression start and no standardisation of latents: ")


def test_values_are_unconstrained_by_the_support_of_their_own_sample():
    def moving(x):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Uniform(-a, torch.ones(())))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    compiled = compile_guide(moving, (torch.zeros(3),), {}, GuideOptions(Normal(), inverse="reverse"))
    joint = Samples.for_plan(compiled.draws, compiled.plan, compiled.plates, standardize=True, num_rows=900)
    assert joint.note is None
    for found in (joint, joint.at_prior(compiled.plan), joint.at_mode(compiled.plan)):
        low, value = -found.drawn["a"].unsqueeze(-1), found.drawn["b"]
        share = ((value - low) / (1 - low)).double()
        torch.testing.assert_close(
            found.values["b"].squeeze(-1).double().sigmoid(), share, atol=1e-4, rtol=1e-4
        )
    b = joint.values["b"].squeeze(-1)  # standard logistic, whatever a is
    assert abs(b.mean()) < 5 * 3.29**0.5 / b.numel() ** 0.5
    assert abs((b * joint.drawn["a"].log().unsqueeze(-1)).mean()) < 5 * (3.29 / b.numel()) ** 0.5


def test_rows_of_a_block_keep_together_what_belongs_together():
    joint = samples_of(hierarchical, torch.randn(6), num_rows=600)
    rows = joint.for_block(["z", "mu"]).rows
    assert {name: value.shape for name, value in rows.items()} == dict.fromkeys(["z", "mu"], (600, 1))
    values = joint.values
    pairs = torch.stack([values["z"][..., 0], values["mu"].expand(600, 6)], -1).reshape(-1, 2)
    known = {tuple(pair) for pair in pairs.tolist()}
    found = torch.cat([rows["z"], rows["mu"]], -1).tolist()
    assert {tuple(pair) for pair in found} <= known
    assert len({tuple(pair) for pair in found}) == 600  # each at most once
    few = samples_of(hierarchical, torch.randn(2), num_rows=600).for_block(["z", "mu"]).rows
    assert few["z"].shape == (1200, 1)  # twice as many as wanted are all taken


def test_aligned_samples_broadcast():
    joint = samples_of(slopes, torch.tensor([0, 4, 1]), torch.randn(3), torch.randn(3), num_rows=40)
    aligned = joint.aligned(["mu", "a", "y"])
    depths = {value.dim() for value in aligned.values()}
    assert depths == {3}
    assert aligned["mu"].shape == (len(aligned["y"]), 1, 1)
    assert torch.equal(aligned["mu"][:, 0], joint.values["mu"])
    more = joint.with_values({"summary": torch.ones(40, 2)})
    assert more.aligned(["summary"])["summary"].shape == (40, 2)
    assert "summary" not in joint.values


def test_side_by_side_and_depth():
    values = {"a": torch.arange(2.0).reshape(2, 1), "z": torch.arange(12.0).reshape(2, 3, 2)}
    rows = side_by_side(values, ["a", "z"])
    assert rows["a"][:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(rows["z"], values["z"].reshape(6, 2))
    crossed = side_by_side(
        {"r": torch.arange(4.0).reshape(2, 2, 1, 1), "c": torch.arange(6.0).reshape(2, 3, 1)}, "rc"
    )
    assert crossed["r"].flatten().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert crossed["c"].flatten().tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert with_depth(torch.zeros(5, 3, 2), 1).shape == (5, 3, 2)
    assert with_depth(torch.zeros(5, 3, 2), 3).shape == (5, 1, 1, 3, 2)


@pytest.mark.filterwarnings("ignore:no gradient passes")
def test_a_slow_model_that_takes_a_run_for_each_sample_has_fewer(monkeypatch):
    runs = []

    def model(y=None):
        runs.append(1)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(float(z), 1.0))  # no batch of runs
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    options = {"strict": False, "inverse": "reverse", "init": "regression"}
    monkeypatch.setattr(samples, "SINGLE_RUNS", (60, 30, 10))
    monkeypatch.setattr(samples, "SECONDS_OF_RUNS", 1e6)
    fast = auto_faithful_guide(model, torch.tensor(0.5), **options)
    assert "no more than 60 joint samples" in str(fast.describe())
    before = len(runs)
    monkeypatch.setattr(samples, "SECONDS_OF_RUNS", 0.0)  # as if runs were slow
    slow = auto_faithful_guide(model, torch.tensor(0.5), **options)
    assert "no more than 10 joint samples" in str(slow.describe())
    assert (before - 60) == (len(runs) - before - 10)  # all else takes as many runs
    few = auto_faithful_guide(model, torch.tensor(0.5), num_start_samples=8, **options)
    assert few.median(torch.tensor(0.5))["x"].isfinite()


def test_no_names_have_no_rows():
    """As of factors that are drawn jointly and read nothing: 160 by 160 crossed effects without a site above."""
    assert samples_of(hierarchical, torch.randn(6)).aligned(()) == {}
