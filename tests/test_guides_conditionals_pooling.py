"""Summaries of inner plates: the exact posterior for any data, masks, and what is refused."""

import copy
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.guides.conditionals.pooling import DeepSet, pooling_orders
from pyro_graphflows.infer import InferenceCompilation
from pyro_graphflows.inspect import sample_prior

FEW = {"init": "random", "num_start_samples": 500}


def hierarchical(x):
    """One global mean, one latent variable for each datum."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", x.shape[-1]):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def mean_model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", x.shape[-1]):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def log_evidence(x, between, within):
    n = len(x)
    covariance = between * torch.ones(n, n) + within * torch.eye(n)
    return dist.MultivariateNormal(torch.zeros(n), covariance).log_prob(x).item()


@pytest.mark.parametrize("order", ["auto", "forward", "reverse"])
def test_a_pooled_global_site_is_exact_for_any_data(order):
    """One set of weights is the posterior of every data set of a size: per-element parameters cannot do that."""
    n = 6
    guide = auto_faithful_guide(hierarchical, torch.randn(n), inverse=order, pool="deepset", **FEW)
    precision = 1 / 4.0 + n / 1.25
    guide.set_linear_("mu", {"x": n / 1.25 / precision}, 0.0, precision**-0.5)
    guide.set_linear_("z", {"mu": 0.2, "x": 0.8}, 0.0, math.sqrt(0.2))
    for _ in range(3):
        x = torch.randn(n) + 3 * torch.randn(())
        exact = log_evidence(x, 4.0, 1.25)
        for vectorize in (False, True):
            options = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 1}
            assert Trace_ELBO(**options).loss(hierarchical, guide, x) == pytest.approx(-exact)
        loss = RenyiELBO(alpha=0.0, num_particles=2).loss(hierarchical, guide, x)
        assert loss == pytest.approx(-exact)  # joint weights: particles one by one
    assert "mu | x (pooled)  [amortised" in guide.describe()


def nested(x):
    """Groups and their members: x[member, group]."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("members", x.shape[-2], dim=-2):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_nested_plates_are_pooled_from_the_inside_out(family):
    members, groups = 4, 3
    guide = auto_faithful_guide(nested, torch.randn(members, groups), family=family, pool="deepset", **FEW)
    precision = 1.0 + members
    spread = 1.0 + 1.0 / members
    total = 1.0 + groups / spread
    guide.set_linear_("theta", {"mu": 1 / precision, "x": members / precision}, 0.0, precision**-0.5)
    guide.set_linear_("mu", {"x": groups / spread / total}, 0.0, total**-0.5)
    block = torch.eye(members) + torch.ones(members, members)
    for _ in range(2):
        x = torch.randn(members, groups) + torch.randn(groups)
        covariance = torch.block_diag(*[block] * groups) + 1.0
        flat = x.T.reshape(-1)
        exact = dist.MultivariateNormal(torch.zeros(len(flat)), covariance).log_prob(flat).item()
        for vectorize in (False, True):
            options = {"num_particles": 2, "vectorize_particles": vectorize, "max_plate_nesting": 2}
            assert Trace_ELBO(**options).loss(nested, guide, x) == pytest.approx(-exact)


def test_any_number_of_groups_and_members():
    guide = auto_faithful_guide(nested, torch.randn(4, 3), pool="deepset", **FEW)
    for members, groups in [(1, 1), (6, 3), (2, 9)]:
        x = torch.randn(members, groups)
        values = guide(x)
        assert values["mu"].shape == ()
        assert values["theta"].shape == (groups,)
        with pyro.plate("particles", 5, dim=-3):
            values = guide(x)
        assert values["mu"].shape == (5, 1, 1)
        assert values["theta"].shape == (5, 1, groups)


def pool_parameters(guide):
    return [p for block in guide.blocks for p in block.inputs.pools.parameters()]


def summary(guide, site, *args):
    """Return the summary that a site's block sees in one call."""
    inputs = guide.block_of(site).inputs
    (pool,) = inputs.pools.values()
    call = guide._read(args, {}, None)
    values = {m.name: inputs.encodings.flat(m.name, call.values[m.name]) for m in pool.members}
    return pool(values, call.plates, call.masks)


def test_summaries_do_not_depend_on_the_order_of_elements():
    guide = auto_faithful_guide(nested, torch.randn(4, 3), pool="deepset", **FEW)
    x = torch.randn(5, 4)
    rows, columns = torch.randperm(5), torch.randperm(4)
    torch.testing.assert_close(summary(guide, "mu", x[rows][:, columns]), summary(guide, "mu", x))
    torch.testing.assert_close(
        summary(guide, "theta", x[rows][:, columns]), summary(guide, "theta", x)[columns]
    )
    moved = x.clone()
    moved[:, 0] = x[torch.arange(4, -1, -1), 1]  # between groups it does matter
    assert not torch.allclose(summary(guide, "mu", moved), summary(guide, "mu", x))


def masked(x, there):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("members", x.shape[-2], dim=-2), poutine.mask(mask=there):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def test_masked_elements_do_not_count():
    """Ragged groups: a mask gives what data without the masked elements give."""
    x = torch.randn(5, 3)
    guide = auto_faithful_guide(masked, x, torch.ones(5, 3, dtype=torch.bool), pool="deepset")
    there = torch.ones(5, 3, dtype=torch.bool)
    there[2:, 1] = False
    padded = torch.where(there, x, torch.tensor(float("nan")))
    one = summary(guide, "theta", padded, there)
    torch.testing.assert_close(one[0], summary(guide, "theta", x, torch.ones_like(there))[0])
    torch.testing.assert_close(one[1], summary(guide, "theta", x[:2], there[:2])[1])
    # an empty group counts as none
    there[:, 2] = False
    padded = torch.where(there, x, torch.tensor(float("nan")))
    torch.testing.assert_close(
        summary(guide, "mu", padded, there), summary(guide, "mu", padded[:, :2], there[:, :2])
    )
    loss = Trace_ELBO().loss(masked, guide, torch.where(there, x, torch.tensor(0.0)), there)
    assert math.isfinite(loss)


def test_partly_observed_elements_count_where_they_are_observed():
    def model(x, there):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=there)

    x = torch.randn(6)
    there = torch.tensor([True, False, True, True, False, True])
    guide = auto_faithful_guide(model, x, there, pool="deepset", **FEW)
    whole = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(summary(guide, "mu", x, there), summary(guide, "mu", x[there], whole))


def regression(w, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    with pyro.plate("data", y.shape[-1]):
        pyro.sample("y", dist.Normal(a + b * w, 0.5), obs=y)


def test_the_regression_start_finds_slopes_from_products():
    """The posterior mean of a slope is linear in the mean of w times y, not in the means of w and y."""
    n = 12
    w = torch.randn(n)
    design = torch.stack([torch.ones(n), w], -1)
    evidence = dist.MultivariateNormal(
        torch.zeros(n), design @ torch.tensor([[4.0, 0.0], [0.0, 1.0]]) @ design.T + 0.25 * torch.eye(n)
    )
    y = evidence.sample((40,))
    divergence = {}
    for name, options in {"products": {}, "none": {"init": "random"}}.items():
        guide = auto_faithful_guide(regression, w, y[0], pool="deepset", num_start_samples=2000, **options)
        loss = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
        gaps = [loss.loss(regression, guide, w, each) + evidence.log_prob(each).item() for each in y]
        divergence[name] = sum(gaps) / len(gaps)
    assert divergence["products"] < 0.1  # about 2 * 25 weights / (2 * 2000) nats
    assert divergence["none"] > 5.0


def scales(x):
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        with pyro.plate("members", x.shape[-2], dim=-2):
            pyro.sample("x", dist.Normal(theta, sigma), obs=x)


def test_the_regression_start_tells_the_spread_between_groups_from_that_within():
    x = torch.randn(6, 8)
    guide = auto_faithful_guide(scales, x, pool="deepset", num_start_samples=1500)
    samples = sample_prior(scales, (x,), num_samples=60)
    centres = [guide.median(each) for each in samples["x"]]
    for name, least in {"sigma": 0.95, "tau": 0.8}.items():
        truth = samples[name].reshape(-1).log()
        found = torch.stack([centre[name].log() for centre in centres]).reshape(-1)
        assert float(torch.corrcoef(torch.stack([truth, found]))[0, 1]) > least


def exact_mean(x):
    precision = 0.25 + len(x)
    return dist.Normal(x.sum() / precision, precision**-0.5)


def test_the_forward_loss_of_the_exact_posterior_is_its_entropy():
    n = 5
    guide = auto_faithful_guide(mean_model, torch.zeros(n), pool="deepset", **FEW)
    guide.set_linear_("mu", {"x": n / (n + 0.25)}, 0.0, (n + 0.25) ** -0.5)
    compilation = InferenceCompilation(mean_model, guide, batch_size=2000)
    with torch.no_grad():
        terms = -compilation.log_probs(torch.zeros(n))
    entropy = dist.Normal(0.0, (n + 0.25) ** -0.5).entropy().item()
    assert float(terms.mean()) == pytest.approx(entropy, abs=5 * float(terms.std()) / math.sqrt(2000))
    assert float(terms.std()) == pytest.approx(math.sqrt(0.5), rel=0.15)  # half a chi-square of one degree


@pytest.mark.slow
def test_inference_compilation_amortises_over_data_sets_of_any_size():
    summaries = {"family": "normal", "pool": DeepSet(4, (8,), sums=False), "num_start_samples": 2000}
    guide = auto_faithful_guide(mean_model, torch.randn(8), **summaries)
    sizes = (2, 8, 32)
    tests = {n: [torch.randn(n) + 2 * torch.randn(()) for _ in range(20)] for n in sizes}

    def divergences():
        found = {}
        for n in sizes:
            trace = [poutine.trace(guide).get_trace(x).nodes["mu"]["fn"] for x in tests[n]]
            exact = [exact_mean(x) for x in tests[n]]
            pairs = zip(exact, trace, strict=True)
            found[n] = float(sum(torch.distributions.kl_divergence(p, q) for p, q in pairs).detach()) / 20
        return found

    before = divergences()
    assert before[8] < 0.02  # where it was set up
    assert before[32] > 0.3  # the scale does not know of the size yet
    compilation = InferenceCompilation(mean_model, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.996}))
    for step in range(600):
        compilation.step(torch.zeros(sizes[step % 3]))
    after = divergences()
    assert max(after.values()) < 0.04


def test_gradients_reach_the_encoder_and_files_keep_it():
    x = torch.randn(4, 3)
    guide = auto_faithful_guide(nested, x, pool="deepset", **FEW)
    optimizer = torch.optim.Adam(guide.parameters(), 0.01)
    loss = Trace_ELBO()(nested, guide)(x)
    loss.backward()
    gradients = [p.grad for p in pool_parameters(guide)]
    assert gradients
    assert all(g is not None and bool((g != 0).any()) for g in gradients)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    other = auto_faithful_guide(nested, x, pool="deepset", **FEW)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for again in (other, copy.deepcopy(guide)):
        for name, value in guide.median(x).items():
            torch.testing.assert_close(again.median(x)[name], value)


def subsampled(x, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x), subsample_size=size) as indices:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[indices])


def test_two_pooled_guides_train_their_own_encoders():
    """Parameters are stored by name, and those of summaries have the same names in each guide."""
    x = torch.randn(6)
    guides = [auto_faithful_guide(mean_model, x, pool="deepset", **FEW) for _ in range(2)]
    trainers = [SVI(mean_model, g, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()) for g in guides]
    for i in (0, 1, 1, 0):
        before = [[p.detach().clone() for p in pool_parameters(guide)] for guide in guides]
        trainers[i].step(x)
        for j, guide in enumerate(guides):
            pairs = zip(before[j], pool_parameters(guide), strict=True)
            assert any(not torch.equal(old, new) for old, new in pairs) == (i == j)


def test_subsampled_plates_are_not_pooled():
    x = torch.randn(6)
    with pytest.raises(UnsupportedModelError, match=r"'data' in full.*not a bound.*pool=None"):
        auto_faithful_guide(subsampled, x, 2, pool="deepset")
    assert "per-element parameters" in auto_faithful_guide(subsampled, x, 2).describe()
    guide = auto_faithful_guide(subsampled, x, pool="deepset", **FEW)
    guide(x)
    with pytest.raises(GraphflowsError, match="'data' in full"):
        guide(x, 2)


def intercepts(index, y, num_groups=None, w=None, there=None):
    """Group means that data look up by an index; the number of groups may change."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", num_groups):
        theta = pyro.sample("theta", dist.Normal(mu, 0.7))
    with pyro.plate("data", len(y)), poutine.mask(mask=True if there is None else there):
        slope = 0.0 if w is None else 0.5 * w
        pyro.sample("y", dist.Normal(theta[..., index] + slope, 0.5), obs=y)


def log_evidence_of_intercepts(index, y):
    same = (index.unsqueeze(-1) == index).double()
    covariance = 1.0 + 0.49 * same + 0.25 * torch.eye(len(y))
    return dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y).item()


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_data_are_pooled_group_by_group(family):
    """Groups of one size in any order of the data: the exact posterior is linear in the means of the groups."""
    members, precision = 3, 1 / 0.49 + 3 / 0.25
    index = torch.arange(4).repeat(members)[torch.randperm(4 * members)]
    options = {"family": family, "pool": "deepset", **FEW}
    guide = auto_faithful_guide(intercepts, index, torch.randn(len(index)), 4, **options)
    assert "mu | index (index), y (pooled by index)  [amortised" in guide.describe()
    assert "theta | index (index), mu (broadcast), y (pooled by index)  [amortised" in guide.describe()
    guide.set_linear_("theta", {"mu": 1 / 0.49 / precision, "y": 12 / precision}, 0.0, precision**-0.5)
    variance = 0.49 + 0.25 / members
    for groups in (4, 6):  # the weight of the mean of all groups depends on their number
        total = 1 + groups / variance
        guide.set_linear_("mu", {"y": groups / variance / total}, 0.0, total**-0.5)
        for _ in range(2):
            index = torch.arange(groups).repeat(members)[torch.randperm(groups * members)]
            y = 2 * torch.randn(len(index))
            exact = log_evidence_of_intercepts(index, y)
            for vectorize in (False, True):
                loss = Trace_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1)
                assert loss.loss(intercepts, guide, index, y, groups) == pytest.approx(-exact)


def test_groups_have_the_summaries_of_their_own_data():
    """Each group's factor is that of a guide that sees the group's data alone; empty groups have their own."""
    index, groups = torch.tensor([0, 2, 2, 1, 0, 2, 1, 2]), 4  # none in the last
    y, w, there = torch.randn(8), torch.randn(8), torch.rand(8) > 0.3
    args = (index, y, groups, w, there)
    guide = auto_faithful_guide(intercepts, *args, pool="deepset", family="normal", **FEW)

    def loc(site, *args):
        pyro.set_rng_seed(0)
        trace = poutine.trace(poutine.condition(guide, {"mu": torch.zeros(())})).get_trace(*args)
        return trace.nodes[site]["fn"].mean.detach()

    order = torch.randperm(8)
    shuffled = (index[order], y[order], groups, w[order], there[order])
    for site in ("mu", "theta"):
        torch.testing.assert_close(loc(site, *shuffled), loc(site, *args))
    relabelled = (3 - index, y, groups, w, there)
    torch.testing.assert_close(loc("theta", *relabelled), loc("theta", *args).flip(0))
    torch.testing.assert_close(loc("mu", *relabelled), loc("mu", *args))
    moved = loc("theta", index, torch.where(index == 2, y + 1, y), groups, w, there)
    assert ((moved - loc("theta", *args)).abs() > 1e-6).tolist() == [False, False, True, False]
    hidden = torch.where(there, y, 100.0)
    torch.testing.assert_close(loc("theta", index, hidden, groups, w, there), loc("theta", *args))
    plain = auto_faithful_guide(intercepts, index, y, groups, pool="deepset", **FEW)
    plain(index, y, groups)  # from now on, calls of these shapes need no run of the model
    with pytest.raises(
        GraphflowsError, match=r"8 entries of index between 0 and 3.*belongs to; got 8 between 0 and 4"
    ):
        plain(2 * index, y, groups)


def test_groups_that_look_up_others_are_pooled_from_the_inside_out():
    def model(pupil, school, y):
        with pyro.plate("regions", 2):
            region = pyro.sample("region", dist.Normal(0.0, 1.0))
        with pyro.plate("schools", 4):
            level = pyro.sample("level", dist.Normal(region[..., school], 0.5))
        with pyro.plate("pupils", len(y)):
            pyro.sample("y", dist.Normal(level[..., pupil], 1.0), obs=y)

    pupil, school = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]), torch.tensor([0, 1, 1, 0])
    guide = auto_faithful_guide(model, pupil, school, torch.randn(8), pool="deepset", num_start_samples=2000)
    assert "per-element parameters" not in guide.describe()
    (summary,) = guide.plan.blocks[0].context[-1:]
    assert summary.summary.over == ("pupils", "schools")
    y = torch.zeros(8)
    low = guide.median(pupil, school, y)
    high = guide.median(pupil, school, torch.where((pupil == 0) | (pupil == 3), 2.0, 0.0))
    assert (high["region"] - low["region"])[0] > 0.5
    assert abs((high["region"] - low["region"])[1]) < 1e-6


def test_the_regression_start_of_group_effects():
    """Unequal groups, amortised: near the exact evidence before any step."""
    index = torch.tensor([0] * 2 + [1] * 4 + [2] * 3 + [3] * 5)
    guide = auto_faithful_guide(intercepts, index, torch.randn(14), 4, pool="deepset", num_start_samples=4000)
    gaps = []
    many = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    for _ in range(15):
        theta = torch.randn(()) + 0.7 * torch.randn(4)
        y = theta[index] + 0.5 * torch.randn(14)
        gaps.append(many.loss(intercepts, guide, index, y, 4) + log_evidence_of_intercepts(index, y))
    assert sum(gaps) / len(gaps) < 0.25  # found: 0.12, standard error 0.02


def test_what_cannot_be_pooled_by_an_index_is_said():
    def crossed(student, item, y):
        with pyro.plate("students", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 2):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[..., student] - b[..., item], 1.0), obs=y)

    student, item = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    guide = auto_faithful_guide(crossed, student, item, torch.randn(6), pool="deepset")
    assert "not pooled: elements of data look up others in several plates at once" in guide.describe()

    def computed(w, y):
        intercepts((w > 0).long(), y, 2)

    w = torch.tensor([-1.0, 1.0, 2.0, -0.5])
    guide = auto_faithful_guide(computed, w, torch.randn(4), pool="deepset")
    assert "is reported by no argument (pass the index as an argument of an integer type)" in guide.describe()
    assert "theta | " in guide.describe()
    assert "per-element parameters" in guide.describe()


def test_orders_of_pooling():
    nested_plates = [{"a"}, {"a", "b"}, {"a", "b", "c"}]
    assert pooling_orders(["c", "a", "b"], nested_plates) == (("a", "b", "c"),)
    crossed = [{"i", "j"}, {"i"}, {"j"}]
    assert set(pooling_orders(["i", "j"], crossed)) == {("i", "j"), ("j", "i")}
    assert pooling_orders(["i", "j"], [{"i", "j"}]) == (("i", "j"),)


def test_unknown_pools_are_refused():
    with pytest.raises(GraphflowsError, match="'attention', a DeepSet, an Attention or None; got 'mean'"):
        auto_faithful_guide(mean_model, pool="mean")


@pytest.mark.parametrize("pool", [None, "deepset"])
def test_covariates_that_joint_samples_do_not_vary_are_named(pool):
    """Data sets with others are extrapolation for what reads summaries; per-element parameters fit one data set."""

    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    guide = auto_faithful_guide(model, torch.randn(4), torch.randn(4), pool=pool, num_start_samples=200)
    said = "the start of slope, from joint samples, knows the covariates x of set-up alone"
    assert (said in guide.describe()) == (pool == "deepset")
