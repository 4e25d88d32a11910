import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_graphflows.distributions import Simulated
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides import auto_faithful_guide, load_guide
from pyro_graphflows.infer import InferenceCompilation, Simulations, fit

DESIGN = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64).unsqueeze(-1) ** torch.arange(3)


def logistic(x):
    """Forty bits, of which three sums are sufficient."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    pyro.sample("x", dist.Bernoulli(logits=theta @ DESIGN.T).to_event(1), obs=x)


def groups(x):
    """A global location and a positive scale; effects of groups; data in groups."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("data", x.shape[-2], dim=-2):
            pyro.sample("x", dist.Normal(mu + effect, tau), obs=x)


def two_data(x, y):
    """v and w meet in x, and w is also seen in y."""
    v = pyro.sample("v", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(v * w, 0.5), obs=x)
    pyro.sample("y", dist.Normal(w, 0.5), obs=y)


def references(guide):
    return {name: getattr(guide.scores, f"reference_{i}") for i, name in enumerate(guide.scores.names)}


class TestValues:
    def test_by_hand_in_nested_plates(self):
        x = torch.randn(5, 4)
        guide = auto_faithful_guide(groups, x, features="score", pool="deepset", num_start_samples=300)
        ref = references(guide)
        call = guide._read_with_scores((x,), {}, None)
        tau = ref["tau"].exp()
        residual = x - ref["mu"] - ref["effect"]
        assert set(call.scores) == {"score(mu)", "score(tau)", "score(effect)"}
        assert torch.allclose(call.scores["score(mu)"], residual.sum() / tau**2)
        assert call.scores["score(effect)"].shape == (4, 1)
        assert torch.allclose(call.scores["score(effect)"][:, 0], residual.sum(0) / tau**2)
        # with respect to log tau
        assert torch.allclose(call.scores["score(tau)"], (residual.square() / tau**2 - 1).sum())
        # other numbers of data and groups
        assert guide(torch.randn(7, 2))["effect"].shape == (2,)

    def test_of_joint_samples_and_of_a_batch_of_observations(self):
        """What the blocks are made from, and what inference compilation reads, is what single calls read."""
        x = torch.randn(5, 4)
        guide = auto_faithful_guide(groups, x, features="score", pool="deepset", num_start_samples=300)
        batch = torch.randn(6, 5, 4)
        together = guide._read_with_scores((x,), {}, {"x": batch}).scores
        for i in range(6):
            alone = guide._read_with_scores((batch[i],), {}, None).scores
            for name, value in alone.items():
                assert torch.allclose(together[name][i].reshape(value.shape), value)

    def test_sites_without_data_have_none(self):
        def chain(x):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

        guide = auto_faithful_guide(chain, torch.zeros(()), features="score", num_start_samples=300)
        assert set(guide.scores.observed_children) == {"b"}


class TestFaithful:
    @pytest.mark.parametrize("order", [["v", "w"], ["w", "v"]])
    def test_nothing_new_is_read(self, order):
        """With w sampled first, v reads w and x only: the data y of w alone must not reach it by the score."""
        guide = auto_faithful_guide(
            *(two_data, torch.zeros(()), torch.zeros(())),
            features="score",
            inverse=order,
            init="random",
            num_start_samples=300,
        )
        pyro.clear_param_store()
        for parameter in guide.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.3)
        data = {"x": torch.tensor(0.7, requires_grad=True), "y": torch.tensor(-0.4, requires_grad=True)}
        # scores are held fixed in gradients: finite differences see what is read
        values = {"v": torch.tensor(0.3), "w": torch.tensor(-1.1)}

        def densities(x, y):
            trace = pyro.poutine.trace(pyro.poutine.condition(guide, values)).get_trace(x, y)
            trace.compute_log_prob()
            return {name: trace.nodes[name]["log_prob"].detach() for name in values}

        with torch.no_grad():
            before = densities(data["x"], data["y"])
            for name in data:
                moved = densities(*(value + 0.5 * (other == name) for other, value in data.items()))
                for site in values:
                    reads = name in guide.inverse.parents[site]
                    assert (moved[site] != before[site]).item() == reads, (site, name)

    def test_data_of_others_are_left_out_of_the_plan(self):
        guide = auto_faithful_guide(
            *(two_data, torch.zeros(()), torch.zeros(())), features="score", num_start_samples=300
        )
        for block in guide.plan.blocks:
            for site, seen in block.parents.items():
                assert [name for name in seen if name.startswith("score")] == [f"score({site})"]


class TestChoice:
    def test_wide_data_are_replaced_where_the_score_suffices(self):
        guide = auto_faithful_guide(logistic, torch.zeros(40), features="auto", num_start_samples=500)
        assert "reads its score in place of x" in guide.describe()
        (block,) = guide.plan.blocks
        assert block.parents == {"theta": ("score(theta)",)}

    def test_linear_models_gain_nothing(self):
        def linear(x):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)

        guide = auto_faithful_guide(linear, torch.zeros(2), features="auto", num_start_samples=500)
        assert guide.scores is None
        assert "no score feature (regressions on held-out" in guide.describe()

    def test_they_help_where_data_are_wide(self):
        """The same training on the same simulations, by log-densities of the same fresh ones: beyond chance."""
        log_q = {}
        for features in ("raw", "score"):
            pyro.clear_param_store()
            guide = auto_faithful_guide(logistic, torch.zeros(40), features=features, num_start_samples=500)
            fit(
                *(logistic, guide, torch.zeros(40)),
                simulations=Simulations(1500, batch_size=300),
                optimizer=1e-2,
                schedule=25,
                progress=False,
            )
            torch.manual_seed(7)
            with torch.no_grad():
                log_q[features] = InferenceCompilation(logistic, guide, batch_size=3000).log_probs(
                    torch.zeros(40)
                )
        difference = log_q["score"] - log_q["raw"]
        assert difference.mean() > 4 * difference.std() / 3000**0.5


class TestUse:
    def test_losses_saving_and_copies(self, tmp_path):
        x = torch.bernoulli(torch.full((40,), 0.4))
        guide = auto_faithful_guide(logistic, x, features="score", num_start_samples=300)
        assert torch.isfinite(
            torch.as_tensor(Trace_ELBO(10, vectorize_particles=True).loss(logistic, guide, x))
        )
        assert InferenceCompilation(logistic, guide, batch_size=20).log_probs(x).shape == (20,)
        guide.save(tmp_path / "guide.safetensors")
        for other in (load_guide(tmp_path / "guide.safetensors", logistic), copy.deepcopy(guide)):
            assert torch.equal(other.median(x)["theta"], guide.median(x)["theta"])

    def test_gradients_do_not_pass_through_a_score(self):
        x = torch.full((5, 4), 0.3, requires_grad=True)
        guide = auto_faithful_guide(
            groups, x.detach(), features="score", pool="deepset", num_start_samples=300
        )
        call = guide._read_with_scores((x,), {}, None)
        assert not any(score.requires_grad for score in call.scores.values())


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"features": "scores"}, "'raw', 'score' or 'auto'; got 'scores'"),
            ({"features": "score", "resolution": "element"}, "features='raw' with resolution='element'"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(GraphflowsError, match=message):
            auto_faithful_guide(logistic, torch.zeros(40), **options)

    def test_black_boxes_have_none(self):
        def model(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Simulated(lambda z: z.numpy(), z), obs=x)

        guide = auto_faithful_guide(model, torch.zeros(()), features="score", num_start_samples=50)
        assert guide.scores is None
        assert "no score feature: x has no density" in guide.describe()

    def test_subsampled_plates_have_none(self):
        def model(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), subsample_size=3) as ind:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[ind])

        guide = auto_faithful_guide(model, torch.zeros(10), features="score", num_start_samples=50)
        assert guide.scores is None
        assert "no score feature: plate data is subsampled" in guide.describe()
