"""Vectors too long for a full covariance: element by element, or of low rank."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.optim import Adam

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides import auto_faithful_guide, load_guide
from pyro_graphflows.guides.conditionals.factors import SharedCovarianceFactor
from pyro_graphflows.guides.conditionals.low_rank import LowRankNormalFactor
from pyro_graphflows.inspect.elements import _banded_jacobian

SIZE, ROWS = 40, 30
BUDGET = 6000  # a full covariance of 40 elements that look at 40 numbers takes 49,020


def elementwise(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
        pyro.sample("x", dist.Normal(0.5 * z, 0.7).to_event(1), obs=x)


def in_pairs(x):
    """Two elements each are joined by what is observed of them."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(2 * SIZE)).to_event(1))
        both = z[..., ::2] + 2 * z[..., 1::2]
        pyro.sample("x", dist.Normal(both, 0.7).to_event(1), obs=x)


MIXING = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0)) / SIZE**0.5


def mixed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
        pyro.sample("x", dist.Normal(z @ MIXING.to(z).mT, 0.3).to_event(1), obs=x)


def posterior(x, matrix, noise):
    """The exact posterior of standard normal latents given ``matrix @ z`` plus noise."""
    matrix = matrix.double()
    size = matrix.shape[1]
    covariance = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + matrix.mT @ matrix / noise**2)
    loc = x.double() @ matrix / noise**2 @ covariance
    return dist.MultivariateNormal(loc, (covariance + covariance.mT) / 2)


def num_parameters(guide):
    return sum(parameter.numel() for parameter in guide.parameters())


def gap(guide, exact, x, site="z"):
    """KL(guide | posterior) for each datum, in nats."""
    total = 0.0
    for _ in range(20):
        with torch.no_grad():
            node = poutine.trace(guide).get_trace(x).nodes[site]
        total += float((node["fn"].log_prob(node["value"]) - exact.log_prob(node["value"].double())).mean())
    return total / 20


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(ROWS, SIZE)


def test_elements_that_share_nothing_are_told_apart(x):
    guide = auto_faithful_guide(elementwise, x, budget=BUDGET)
    assert f"{SIZE} elements, each with parents of its own" in guide.describe()
    full = auto_faithful_guide(elementwise, x)
    assert "elements, each with" not in full.describe()
    assert 2 * num_parameters(guide) < num_parameters(full)
    exact = posterior(x, 0.5 * torch.eye(SIZE), 0.7)
    assert gap(guide, exact, x) < gap(full, exact, x) / 3


def test_small_groups_are_joined_without_a_matrix(x):
    guide = auto_faithful_guide(in_pairs, x, budget=20_000)
    assert f"{2 * SIZE} elements, each with parents of its own" in guide.describe()
    site = poutine.trace(guide).get_trace(x).nodes["z"]
    assert type(site["fn"]).__name__ == "AutoregressiveNormal"
    matrix = torch.zeros(SIZE, 2 * SIZE)
    matrix[range(SIZE), range(0, 2 * SIZE, 2)] = 1.0
    matrix[range(SIZE), range(1, 2 * SIZE, 2)] = 2.0
    assert gap(guide, posterior(x, matrix, 0.7), x) < 3 * 8 * SIZE / 2 / 10_000


def test_elements_that_share_something_have_a_low_rank(x):
    guide = auto_faithful_guide(mixed, x[:, :3], budget=BUDGET, rank=3)
    assert "covariance of rank 3 beside its diagonal" in guide.describe()
    assert isinstance(guide.blocks[0].conditionals.factors["z"], LowRankNormalFactor)
    exact = posterior(x[:, :3], MIXING, 0.3)
    start = gap(guide, exact, x[:, :3])
    elbo = SVI(mixed, guide, Adam({"lr": 0.01}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    for _ in range(200):
        elbo.step(x[:, :3])
    trained = gap(guide, exact, x[:, :3])
    assert trained < start + 0.1
    assert (
        trained < 1.0
    )  # a diagonal alone is 1.9 off at best: log det of the posterior's correlations, halved


def test_one_covariance_serves_all_rows_of_a_linear_model(x):
    """Exact up to the error of the samples: half a nat for 10,000 weights and as many samples."""
    guide = auto_faithful_guide(mixed, x[:, :3], budget=BUDGET)
    assert "one full covariance, the same for all it looks at" in guide.describe()
    exact = posterior(x[:, :3], MIXING, 0.3)
    weights = SIZE * (SIZE + 1) / 2 + 4 * SIZE
    assert gap(guide, exact, x[:, :3]) < 2 * weights / 20_000
    fn = poutine.trace(guide).get_trace(x[:, :3]).nodes["z"]["fn"]
    assert fn.batch_shape == (ROWS,)
    svi = SVI(mixed, guide, Adam({"lr": 0.01}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    for _ in range(50):
        svi.step(x[:, :3])
    assert gap(guide, exact, x[:, :3]) < 0.3
    assert guide(x[:7, :3])["z"].shape == (7, SIZE)


def test_one_covariance_of_groups_with_locations_of_their_own():
    """Groups of data of unequal numbers: locations differ from group to group, and the covariance does not."""
    groups = torch.arange(5).repeat(6)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 6, generator=generator)

    def model(y):
        with pyro.plate("groups", 5):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(6)).to_event(1))
        with pyro.plate("data", 30):
            mean = (z[..., groups, :] * rows.to(z)).sum(-1)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = torch.randn(30, generator=generator)
    guide = auto_faithful_guide(model, y, budget=250, resolution="site")
    conditionals = guide.blocks[0].conditionals
    assert isinstance(conditionals.factors["z"], SharedCovarianceFactor)
    assert conditionals.table.table.shape == (5, 6)
    own = rows.double().reshape(6, 5, 6).transpose(0, 1)
    precision = torch.eye(6, dtype=torch.float64) + own.mT @ own
    pull = own.mT @ y.double().reshape(6, 5).mT.unsqueeze(-1)
    mean = torch.linalg.solve(precision, pull).squeeze(-1)
    exact = dist.MultivariateNormal(mean, precision_matrix=precision)
    start = gap(guide, exact, y)
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(200):
        svi.step(y)
    assert gap(guide, exact, y) < start - 0.3  # their covariances differ


def walk(x):
    """A random walk as a normal with a matrix."""
    root = 0.3 * torch.ones(SIZE, SIZE).tril()
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(SIZE), scale_tril=root))
    pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def steps(x):
    """The same walk as steps that are added up, for each of several series."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
        pyro.sample("x", dist.Normal(0.3 * z.cumsum(-1), 0.5).to_event(1), obs=x)


def steps_in_a_plate_of_times(x):
    z = pyro.sample("z", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
    with pyro.plate("times", SIZE):
        pyro.sample("x", dist.Normal(0.3 * z.cumsum(-1), 0.5), obs=x)


SUMS = 0.3 * torch.ones(SIZE, SIZE).tril()


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (walk, "a chain of 40 elements"),
        (steps, "a chain of 40 running sums of elements"),
        (steps_in_a_plate_of_times, "a chain of 40 running sums of elements"),
    ],
)
def test_walks_are_chains_and_start_at_their_exact_posterior(x, model, what):
    data = x if model is steps else x[0]
    guide = auto_faithful_guide(model, data, budget=BUDGET, num_start_samples=500)
    assert what in guide.describe()
    exact = posterior(data, SUMS, 0.5)
    if model is walk:  # of z = SUMS @ steps
        of_steps = exact
        exact = dist.MultivariateNormal(
            of_steps.loc @ SUMS.double().mT, scale_tril=SUMS.double() @ of_steps.scale_tril
        )
    assert abs(gap(guide, exact, data)) < 1e-3
    other = 2 * data + 1
    if model is not steps_in_a_plate_of_times:  # whose parameters are of these data
        exact = posterior(other, SUMS, 0.5)
        if model is walk:
            exact = dist.MultivariateNormal(
                exact.loc @ SUMS.double().mT, scale_tril=SUMS.double() @ exact.scale_tril
            )
        assert abs(gap(guide, exact, other)) < 1e-3


# ---------------------------------------------------------------- training of chains


STEPS = (0, 1, 10, 50, 200)


def linear_walk(order=1, step=0.1, seen=range(SIZE), noise=0.5, in_plate=False, sums=False):
    """A model of a walk of which some elements are seen, its data, and the exact posterior."""
    eye = torch.eye(SIZE, dtype=torch.float64)
    steps_back = torch.linalg.matrix_power(eye - torch.diag(torch.ones(SIZE - 1).double(), -1), order)
    root = (step * torch.linalg.inv(steps_back)).tril()
    matrix = (root if sums else eye)[list(seen)]
    tril = root.to(torch.get_default_dtype())
    prior = eye if sums else torch.linalg.inv(root @ root.mT)

    def model(x):
        if sums:
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
            at = step * z.cumsum(-1)[..., list(seen)]
        else:
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(SIZE), scale_tril=tril))
            at = z[..., list(seen)]
        if in_plate:
            with pyro.plate("times", len(seen)):
                pyro.sample("x", dist.Normal(at, noise), obs=x)
        else:
            pyro.sample("x", dist.Normal(at, noise).to_event(1), obs=x)

    generator = torch.Generator().manual_seed(0)
    drawn = root @ torch.randn(SIZE, generator=generator).double()
    x = drawn[list(seen)] + noise * torch.randn(len(seen), generator=generator)
    precision = prior + matrix.mT @ matrix / noise**2
    mean = torch.linalg.solve(precision, matrix.mT @ x.double() / noise**2)
    return model, x.to(torch.get_default_dtype()), (mean, precision)


def divergence(guide, x, exact):
    """KL(chain | posterior), in nats, without sampling."""
    with torch.no_grad():
        chain = poutine.trace(guide).get_trace(x).nodes["z"]["fn"].base
    mean, precision = exact
    loc, noise = chain.mean.double(), torch.eye(SIZE)
    root = (chain.push(noise)[0] - chain.mean).double().mT
    off = ((loc - mean) @ precision * (loc - mean)).sum()
    log_det = torch.linalg.slogdet(precision)[1] + 2 * torch.linalg.slogdet(root)[1]
    return float(0.5 * (off + (root * (precision @ root)).sum() - SIZE - log_det))


def check_survival(model, x, exact, lr, free):
    """Train by one draw a step; what noise alone keeps a guide above its optimum is known."""
    guide = auto_faithful_guide(model, x, budget=BUDGET, num_start_samples=500)
    assert "a chain of 40" in guide.describe()
    optim = torch.optim.Adam(guide.parameters(), lr=lr)
    path = {}
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            path[step] = divergence(guide, x, exact)
        optim.zero_grad()
        Trace_ELBO().differentiable_loss(model, guide, x).backward()
        optim.step()
    floor = lr / 4 * free**0.5
    assert abs(path[0]) < 0.01, path
    assert max(path.values()) < min(3.0, 2 * floor), path
    assert path[200] < max(0.1, 2 * floor), path


WALKS = {
    "seen everywhere": {},
    "seen twice": {"seen": (10, 30), "noise": 0.1},
    "smooth": {"step": 0.01},
    "of second order": {"step": 0.01, "order": 2},
    "sums": {"sums": True},
    "sums seen twice": {"sums": True, "seen": (10, 30), "noise": 0.1},
}
FULLY_FREE = 100 * 3 * SIZE  # numbers move by sqrt(100 / their number): the floor is r / 4 sqrt(100 number)


@pytest.mark.parametrize(("name", "in_plate"), [("seen twice", True), ("sums", False)])
def test_training_keeps_the_start_of_a_chain(name, in_plate):
    torch.set_default_dtype(torch.float32)
    model, x, exact = linear_walk(**WALKS[name], in_plate=in_plate)
    check_survival(model, x, exact, 1e-2, FULLY_FREE if in_plate else FULLY_FREE / 4)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("in_plate", [False, True])
@pytest.mark.parametrize("name", WALKS)
def test_training_keeps_the_starts_of_all_chains(name, in_plate, lr):
    torch.set_default_dtype(torch.float32)
    model, x, exact = linear_walk(**WALKS[name], in_plate=in_plate)
    check_survival(model, x, exact, lr, FULLY_FREE * (4 / 3 if WALKS[name].get("order") == 2 else 1))


def test_a_chain_of_data_in_a_plate_has_three_numbers_an_element():
    model, x, _ = linear_walk(in_plate=True)
    assert num_parameters(auto_faithful_guide(model, x, budget=BUDGET, num_start_samples=200)) == 3 * SIZE


def test_a_chain_whose_model_is_learned_moves_in_larger_steps():
    fixed, x, _ = linear_walk(in_plate=False)

    def learned(x):
        noise = pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
        z = pyro.sample(
            "z", dist.MultivariateNormal(torch.zeros(SIZE), scale_tril=0.1 * torch.ones(SIZE, SIZE).tril())
        )
        pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    units = [
        auto_faithful_guide(model, x, budget=BUDGET, num_start_samples=200)
        .blocks[0]
        .conditionals.network.units.unit
        for model in (fixed, learned)
    ]
    assert (units[1] > 2 * units[0]).all()


def counts(x):
    root = 0.2 * torch.ones(len(x), len(x)).tril()
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=root))
    with pyro.plate("times", len(x)):
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


def volatility(x):
    root = 0.3 * torch.ones(len(x), len(x)).tril()
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=root))
    with pyro.plate("times", len(x)):
        pyro.sample("x", dist.Normal(0.0, (z / 2).exp()), obs=x)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("model", [counts, volatility])
def test_training_keeps_the_starts_of_chains_that_are_not_normal(model, lr):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    walk_ = (0.2 * torch.randn(100)).cumsum(-1)
    x = torch.poisson(walk_.exp()) if model is counts else torch.randn(100) * walk_.exp()

    def bound(guide):
        with torch.no_grad():
            losses = torch.tensor([Trace_ELBO().loss(model, guide, x) for _ in range(400)])
        return float(losses.mean()), float(losses.std() / 20)

    guide = auto_faithful_guide(model, x, budget=15_000)
    assert "a chain of 100" in guide.describe()
    start, error = bound(guide)
    optim = torch.optim.Adam(guide.parameters(), lr=lr)
    for step in range(1, STEPS[-1] + 1):
        optim.zero_grad()
        Trace_ELBO().differentiable_loss(model, guide, x).backward()
        optim.step()
        if step in STEPS:
            loss, other = bound(guide)
            floor = lr / 4 * (100 * 300) ** 0.5
            assert loss < start + 2 * floor + 4 * (error**2 + other**2) ** 0.5
    full = AutoMultivariateNormal(model, init_scale=0.1)
    svi = SVI(model, full, Adam({"lr": lr}), Trace_ELBO())
    for _ in range(STEPS[-1]):
        svi.step(x)
    assert loss < bound(full)[0] - 10


def scaled(x):
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
    z = pyro.sample("z", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(-0.7, 0.2))
    pyro.sample("x", dist.Normal(scale * z.cumsum(-1), noise).to_event(1), obs=x)


def walk_with_latent_scales():
    torch.manual_seed(0)
    return 0.3 * torch.randn(SIZE).cumsum(-1) + 0.5 * torch.randn(SIZE)


def test_a_walk_whose_scale_is_latent_comes_after_it():
    data = walk_with_latent_scales()
    guide = auto_faithful_guide(scaled, data, budget=12_000, num_start_samples=500)
    assert "a chain of 40 running sums of elements" in guide.describe()
    assert guide.plan.inverse.sampling_order[-1] == "z"
    assert {"scale", "noise", "x"} <= set(guide.plan.inverse.parents["z"])
    trace = poutine.trace(guide).get_trace(data)
    drawn = {name: trace.nodes[name]["value"] for name in ("scale", "noise", "z")}
    torch.testing.assert_close(guide.log_prob(drawn, data), trace.log_prob_sum())


def test_a_long_walk_takes_few_numbers():
    torch.manual_seed(0)
    data = torch.randn(300).cumsum(-1)

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, torch.ones(300)).to_event(1))
        pyro.sample("x", dist.Normal(w.cumsum(-1), 1.0).to_event(1), obs=x)

    guide = auto_faithful_guide(model, data, num_start_samples=200)
    assert num_parameters(guide) <= 28 * 300
    w = poutine.trace(guide).get_trace(data).nodes["w"]
    assert w["fn"].log_prob(w["value"]).isfinite()
    low = auto_faithful_guide(model, data, num_start_samples=200, resolution="site", rank=4)
    assert "covariance of rank 4" in low.describe()


def test_elements_start_at_their_exact_posterior(x):
    guide = auto_faithful_guide(elementwise, x, budget=BUDGET, num_start_samples=500)
    assert abs(gap(guide, posterior(x, 0.5 * torch.eye(SIZE), 0.7), x)) < 1e-4


@pytest.mark.parametrize("family", ["normal", "spline", "flow"])
def test_every_family_serves_long_vectors(x, family):
    guide = auto_faithful_guide(elementwise, x, budget=BUDGET, family=family, num_start_samples=500)
    assert f"{SIZE} elements, each with parents of its own" in guide.describe()
    assert num_parameters(guide) < 40_000
    assert guide(x)["z"].shape == (ROWS, SIZE)


def test_elements_are_not_told_apart_where_that_is_not_wanted(x):
    together = auto_faithful_guide(elementwise, x, resolution="site", budget=BUDGET, num_start_samples=500)
    assert "one full covariance" in together.describe()


def test_saved_and_loaded(x, tmp_path):
    for model, data in ((elementwise, x), (mixed, x[:, :3]), (steps, x), (walk, x[0])):
        guide = auto_faithful_guide(model, data, budget=BUDGET, num_start_samples=500)
        guide.save(tmp_path / "guide")
        loaded = load_guide(tmp_path / "guide", model)
        values = guide(data)
        torch.testing.assert_close(loaded.log_prob(values, data), guide.log_prob(values, data))


def test_bad_options(x):
    for wrong in (0, -1, 1.5, "many", True):
        with pytest.raises(GraphflowsError, match=rf"rank >= 1, a whole number, .*got {wrong!r}"):
            auto_faithful_guide(elementwise, x, rank=wrong)
        with pytest.raises(GraphflowsError, match=rf"budget >= 1 weights, a whole number, .*got {wrong!r}"):
            auto_faithful_guide(elementwise, x, budget=wrong)
    with pytest.raises(GraphflowsError, match=r"at least 920 weights for site 'z'.*got budget=500"):
        auto_faithful_guide(mixed, x[:, :3], budget=500)
    assert auto_faithful_guide(mixed, x[:, :3], budget=920, num_start_samples=200).setup
    for model, data, least in ((walk, x[0], 2160), (elementwise, x, 1440)):
        with pytest.raises(
            GraphflowsError, match=rf"at least {least} weights.*chain or element by element; got"
        ):
            auto_faithful_guide(model, data, budget=least - 1)
        assert auto_faithful_guide(model, data, budget=least, num_start_samples=200).setup


@pytest.mark.parametrize("width", [0, 1, 2])
def test_jacobians_with_few_diagonals_are_found_and_others_are_not(width):
    size = 40
    index = torch.arange(size)
    dense = torch.randn(size, size, generator=torch.Generator().manual_seed(width))
    band = dense * ((index - index.unsqueeze(-1)).abs() <= width)
    like = torch.zeros(size)

    def found(matrix):
        return _banded_jacobian(size, like, lambda weights: {"z": (weights @ matrix).unsqueeze(0)})

    assert torch.equal(torch.from_numpy(found(band)["z"]), band != 0)
    assert found(dense) is None
    band[0, -1] = 0.01
    assert found(band) is None


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("resolution", ["site", "element"])
@pytest.mark.parametrize("where", ["vector", "plate"])
def test_training_moves_strongly_correlated_vectors_little(where, resolution):
    """Eight coefficients, all but the same regressors, informative data: 10,000 between the widths of the posterior."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(30, 1, generator=generator)
    design = common + 0.03 * torch.randn(30, 8, generator=generator)

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, torch.ones(8)).to_event(1))
        mean = (design.to(w) @ w.unsqueeze(-1)).squeeze(-1)
        if where == "plate":
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mean, 0.1), obs=x)
        else:
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(1), obs=x)

    pyro.set_rng_seed(0)
    x = design @ torch.randn(8, generator=generator) + 0.1 * torch.randn(30, generator=generator)
    guide = auto_faithful_guide(model, x, resolution=resolution)
    exact = posterior(x, design, 0.1)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    for steps in (1, 9, 40):
        for _ in range(steps):
            svi.step(x)
        assert gap(guide, exact, x, site="w") < 1.0


def test_a_vector_outside_of_plates_has_each_number_once():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, torch.ones(4)).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w.sum(-1), 1.0), obs=x)

    guide = auto_faithful_guide(model, torch.zeros(3), num_start_samples=200)
    conditionals = guide.blocks[0].conditionals
    assert conditionals.table is None
    assert conditionals.network.skip.bias.shape == (4 + 4 + 6,)
