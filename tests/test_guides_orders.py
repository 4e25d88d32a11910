"""Among equally sparse inverses, the one whose conditionals are smooth."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_graphflows.graphs import faithful_inverse, is_imap
from pyro_graphflows.graphs.library import binary_tree
from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.guides.orders import joint_rows, order_for_hierarchies, smooth_order
from pyro_graphflows.guides.samples import ModelDraws
from pyro_graphflows.guides.sites import input_encodings, latent_sites
from pyro_graphflows.inspect import sample_prior, trace_model
from pyro_graphflows.models.textbook import arithmetic_circuit_model as arithmetic_circuit


def product(x, loc=(5.0, 0.0), size=()):
    """The product of two factors, seen through noise: dividing by the one away from zero is smooth."""
    zero = torch.zeros(size)
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(zero + loc[0], 1.0).to_event(len(size)))
        b = pyro.sample("b", dist.Normal(zero + loc[1], 1.0).to_event(len(size)))
        c = pyro.sample("c", dist.Normal(a * b, 0.1).to_event(len(size)))
        pyro.sample("x", dist.Normal(c, 0.1).to_event(len(size)), obs=x)


@pytest.mark.parametrize("loc", [(5.0, 0.0), (0.0, 5.0)])
@pytest.mark.parametrize("size", [(), (2,)])
def test_the_factor_near_zero_is_sampled_last(loc, size):
    def model(x):
        product(x, loc, size)

    guide = auto_faithful_guide(model, torch.zeros(20, *size), num_start_samples=100)
    near, far = ("b", "a") if loc[1] == 0 else ("a", "b")
    assert set(guide.inverse.parents[near]) == {far, "c"}
    assert guide.inverse.parents[far] == ("c",)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_the_arithmetic_circuit_divides_by_what_keeps_away_from_zero(seed):
    pyro.set_rng_seed(seed)
    guide = auto_faithful_guide(arithmetic_circuit, torch.randn(50, 2), num_start_samples=100)
    sparsest = faithful_inverse(guide.model_graph)
    assert guide.inverse.order == "smooth"
    assert set(guide.inverse.parents["z1"]) == {"z0", "z3"}
    assert guide.inverse.num_edges <= sparsest.num_edges
    assert len(guide.inverse.levels) <= len(sparsest.levels)
    assert is_imap(guide.inverse, guide.model_graph)


def test_linear_models_and_chosen_inverses_are_left_alone():
    network = binary_tree(3, seed=0)
    model = network.pyro_model()
    x = torch.zeros(20, len(network.observed))
    guide = auto_faithful_guide(model, x, num_start_samples=100)
    assert dict(guide.inverse.parents) == dict(faithful_inverse(guide.model_graph).parents)
    for order in ("min_fill", ["z2", "z0", "z1", "z4", "z3", "z5"]):
        guide = auto_faithful_guide(
            arithmetic_circuit, torch.randn(50, 2), inverse=order, init="prior", num_start_samples=100
        )
        assert set(guide.inverse.parents["z0"]) == {"z1", "z3"}


def model_draws(model, *args):
    traced = trace_model(model, args, {})
    return ModelDraws(model, args, {}, traced, latent_sites(traced), input_encodings(model, args, {}, traced))


def rows_of(model, *args):
    return joint_rows(model_draws(model, *args))


def test_rows_are_joint_samples_and_leave_the_random_state_alone():
    def model(w, x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.LogNormal(w, 0.1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    w = torch.arange(4.0)
    before = torch.get_rng_state()
    rows = rows_of(model, w, torch.zeros(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: value.shape for name, value in rows.items()} == dict.fromkeys("zxw", (5000, 1))
    # log z - w is normal with deviation 0.1, whose estimate has a standard error of 0.001
    assert (rows["z"] - rows["w"]).std().item() == pytest.approx(0.1, abs=0.005)
    assert (rows["x"] - rows["z"].exp()).std().item() == pytest.approx(1.0, abs=0.05)


def test_no_rows_where_latents_are_in_different_plates_or_samples_are_not_the_model():
    def hierarchical(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(m, 1.0)), 1.0), obs=x)

    def weighed(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("weight", -z.square())
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert rows_of(hierarchical, torch.zeros(4)) is None
    assert rows_of(weighed, torch.tensor(0.0)) is None


def test_rows_of_a_partly_observed_site_are_its_elements_with_the_mask():
    def model(x, seen):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    seen = torch.tensor([True, False, True, True])
    rows = rows_of(model, torch.ones(4), seen)
    assert rows["x_observed"].shape == (5000, 2)  # draw by draw, in each the four elements
    value, mask = rows["x_observed"].reshape(-1, 4, 2).unbind(-1)
    assert torch.equal(mask, seen.to(mask).expand(1250, 4))
    assert torch.equal(value[:, 1], torch.zeros(1250))


def test_fewer_draws_are_the_first_of_those_kept():
    joint = model_draws(product, torch.zeros(3))
    joint.draw(20, keep=False)
    many = joint.draw(10)
    state = torch.get_rng_state()
    few = joint.draw(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(few[name], value[:4]) for name, value in many.items())
    assert joint.draw(11)["a"].shape == (11, 3, 1)


@pytest.fixture
def numbers(monkeypatch):
    """How many joint samples are drawn, each time that some are."""
    found = []

    def counting(*args, num_samples, **kwargs):
        found.append(num_samples)
        return sample_prior(*args, num_samples=num_samples, **kwargs)

    monkeypatch.setattr("pyro_graphflows.guides.samples.sample_prior", counting)
    return found


@pytest.mark.parametrize(("wanted", "drawn"), [(10_000, [500]), (5000, [250]), (1000, [250, 50])])
@pytest.mark.parametrize("make", [lambda: binary_tree(3, seed=0).pyro_model(), lambda: arithmetic_circuit])
def test_the_order_and_the_start_share_one_draw(make, wanted, drawn, numbers):
    """So that a guide starts as it would if its inverse had been given."""
    model = make()
    x = torch.randn(20, 2 if model is arithmetic_circuit else 4)
    pyro.set_rng_seed(0)
    guide = auto_faithful_guide(model, x, num_start_samples=wanted)
    assert numbers == drawn
    pyro.set_rng_seed(0)
    other = auto_faithful_guide(model, x, inverse=guide.inverse, num_start_samples=wanted)
    assert numbers == drawn + drawn[-1:]
    for mine, theirs in zip(guide.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_nothing_is_drawn_where_there_is_one_order(numbers):
    def model(x):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    auto_faithful_guide(model, torch.tensor(0.0), init="random", standardize=False)
    assert numbers == []


def test_rows_that_are_not_finite_do_not_count():
    graph = trace_model(arithmetic_circuit, (torch.zeros(5, 2),), {}).graph
    inverse = faithful_inverse(graph)
    samples = {name: torch.randn(600, 1) for name in graph.nodes}
    samples["z3"] = samples["z0"] * samples["z1"]
    samples["z3"][:200] = float("nan")
    assert smooth_order(inverse, samples) is inverse  # 400 rows are too few


def crossed(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    rows, columns = pyro.plate("rows", x.shape[-2], dim=-2), pyro.plate("columns", x.shape[-1], dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, scale))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with rows, columns:
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_of_crossed_effects_those_in_the_smaller_plate_are_sampled_first(shape):
    guide = auto_faithful_guide(crossed, torch.randn(shape), num_start_samples=100)
    smaller, larger = ("a", "b") if shape[0] < shape[1] else ("b", "a")
    plates = {"a": ("rows",), "b": ("columns",)}
    assert dict(guide.inverse.coupled) == {smaller: plates[smaller]}
    assert smaller in guide.inverse.parents[larger]
    assert is_imap(guide.inverse)
    asked = auto_faithful_guide(crossed, torch.randn(shape), inverse=[smaller, larger, "scale"])
    assert larger in asked.inverse.coupled  # an order that is asked for is kept


def test_outer_sites_precede_scales_in_plates():
    """A horseshoe, whose scales are in the plate of the weights, beside an intercept that sets no scale."""

    def model(x, y):
        spread = pyro.sample("spread", dist.HalfCauchy(1.0))
        intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
        with pyro.plate("columns", x.shape[-1]):
            width = pyro.sample("width", dist.HalfCauchy(1.0))
            weight = pyro.sample("weight", dist.Normal(0.0, width * spread))
        with pyro.plate("rows", len(y)):
            loc = intercept + (x @ weight.unsqueeze(-1)).squeeze(-1)
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    guide = auto_faithful_guide(model, torch.randn(10, 3), torch.randn(10), num_start_samples=100)
    order = list(guide.inverse.sampling_order)
    assert set(order[:2]) == {"spread", "intercept"}
    assert order[2:] == ["width", "weight"]


def test_no_order_is_found_for_effects_that_sum_a_plate():
    plates = {"s": ["rows"], "x": ["rows"]}
    graph = ModelGraph(["sb", "sx", "bx"], observed=["x"], plates=plates)
    assert order_for_hierarchies(faithful_inverse(graph, ["s", "b"]), {"s": ["b"]}) is None


@pytest.mark.parametrize("unit", [1.0, 1e-6])
def test_length_scales_of_gaussian_processes_are_sampled_before_them(unit):
    """The diagonal of the covariance says nothing of the length scale, which sets the directions that are narrow."""
    x = torch.linspace(0.0, 1.0, 8)
    y = unit * torch.sin(6 * x)

    def covariance(length):
        return unit**2 * ((-0.5 * ((x[:, None] - x) / length) ** 2).exp() + 1e-6 * torch.eye(8))

    def model(y):
        length = pyro.sample("length", dist.LogNormal(-1.0, 0.5))
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(8), covariance(length)))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(f, 0.3 * unit), obs=y)

    guide = auto_faithful_guide(model, y)
    assert guide.inverse.sampling_order == ("length", "f")
    if unit < 1.0:  # else the same in other units
        return
    grid = torch.linspace(-4.0, 2.0, 601)  # of log(length)
    each = [
        dist.MultivariateNormal(torch.zeros(8), covariance(t.exp()) + (0.3 * unit) ** 2 * torch.eye(8))
        for t in grid
    ]
    density = dist.Normal(-1.0, 0.5).log_prob(grid) + torch.stack([one.log_prob(y) for one in each])
    exact = torch.logsumexp(density, 0) + torch.log(grid[1] - grid[0])
    loss = Trace_ELBO(num_particles=100).loss(model, guide, y)
    assert loss + exact.item() < 2.0  # twenty where the process is sampled first
