"""Plates whose elements are not alike: constants in the model, and unlike groups."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from plated_guides import varying
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_graphflows import load_guide
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.inversion import faithful_inverse, mean_field_inverse
from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.guides.conditionals.contract import LinearConditional
from pyro_graphflows.guides.plan import sites_concerned
from pyro_graphflows.inspect import non_exchangeable_plates

SIGMA = torch.linspace(0.3, 5.0, 8)


def schools(y, size=None):
    """Standard errors are known, and no argument."""
    with pyro.plate("schools", 8, subsample_size=size) as indices:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, SIGMA.double()[indices]), obs=y[..., indices])


def divergence(guide):
    """Return E_y KL(posterior || guide) of one school, in nats: exact but for the average over y."""
    sigma = SIGMA.double()
    y = dist.Normal(0.0, (1 + sigma.square()).sqrt()).sample((1000,))
    posterior = dist.Normal(y / (1 + sigma.square()), (sigma.square() / (1 + sigma.square())).sqrt())
    with torch.no_grad(), pyro.plate("draws", 1000, dim=-2):
        fn = poutine.trace(guide).get_trace(y).nodes["theta"]["fn"]
    return float(torch.distributions.kl_divergence(posterior, fn).mean())


def test_constants_that_vary_along_a_plate_cost_nothing():
    guide = auto_faithful_guide(schools, torch.zeros(8))
    assert divergence(guide) < 0.005  # 3 weights, 1,250 samples for each index
    assert "a map of its own for each index of schools" in guide.describe()
    with torch.no_grad():
        for network in (block.conditionals for block in guide.blocks):
            for element_map in network.maps.values():
                element_map.rows.set_(slice(None), 0.0)
    assert divergence(guide) > 0.1  # what one network for all schools leaves


def exact_map_(guide):
    """Give each school its posterior for every y."""
    sigma = SIGMA.double()
    slope, scale = 1 / (1 + sigma.square()), (sigma.square() / (1 + sigma.square())).sqrt()
    network = guide.blocks[0].conditionals
    shift, width = network.output_units("theta")
    inputs = guide.blocks[0].inputs
    at = inputs.names.index("y")
    weights = slope * inputs.features.scale[at] / width
    locs = (slope * inputs.features.shift[at] - shift) / width
    assert network.set_linear_(
        "theta",
        LinearConditional({"y": weights[:, None, None]}, locs[:, None], (scale / width)[:, None, None]),
    )


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_maps_of_their_own_are_exact_for_any_data_and_any_subsample(family):
    guide = auto_faithful_guide(schools, torch.zeros(8), family=family, init="random", num_start_samples=500)
    exact_map_(guide)
    for _ in range(2):
        y = 2 * torch.randn(8)
        terms = dist.Normal(0.0, (1 + SIGMA.double().square()).sqrt()).log_prob(y)
        for vectorize in (False, True):
            options = {"num_particles": 2, "vectorize_particles": vectorize, "max_plate_nesting": 1}
            assert Trace_ELBO(**options).loss(schools, guide, y) == pytest.approx(-float(terms.sum()))
        trace = poutine.trace(guide).get_trace(y, 3)
        replayed = poutine.trace(poutine.replay(schools, trace)).get_trace(y, 3)
        indices = trace.nodes["schools"]["value"]
        elbo = replayed.log_prob_sum() - trace.log_prob_sum()
        assert elbo.item() == pytest.approx(terms[indices].sum().item() * 8 / 3)


class Measured:
    """Standard errors are known as a field, which may change."""

    def __init__(self, sigma):
        self.sigma = sigma

    def __call__(self, y, rows=None):
        with pyro.plate("schools", len(self.sigma), subsample=rows) as rows:
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, self.sigma[rows]), obs=y[..., rows])


def off(guide, y, sigma, rows=None):
    """Return how far the medians are from those of the posterior, in its standard deviations."""
    rows = torch.arange(len(sigma)) if rows is None else rows
    variance = sigma.square() / (1 + sigma.square())
    return ((guide.median(y, rows)["theta"] - (1 - variance[rows]) * y[rows]) / variance[rows].sqrt()).abs()


@pytest.mark.parametrize("family", ["auto", "flow"])
@pytest.mark.parametrize("order", [None, torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])])
def test_maps_belong_to_the_rows_that_set_up_had(family, order):
    model, y = Measured(SIGMA), 1.5 * torch.randn(8)
    guide = auto_faithful_guide(model, y, order, family=family)
    for rows in (None, torch.tensor([6, 1]), torch.randperm(8)):
        assert off(guide, y, SIGMA, rows).max() < 0.2  # regressions of 1,000 samples for each: some .03
    model.sigma = SIGMA.flip(0)  # each has the standard error of another school: only what they share is left
    before = [guide.median(y, rows)["theta"] for rows in (None, torch.tensor([6, 1]))]
    tables = [own.rows.table for block in guide.blocks for own in block.conditionals.maps.values()]
    for table in tables:
        table += 1.0
    assert all(map(torch.equal, before, [guide.median(y, r)["theta"] for r in (None, torch.tensor([6, 1]))]))
    for table in tables:
        table -= 1.0
    model.sigma = torch.where(torch.arange(8) == 2, 9.0, SIGMA)
    same = torch.arange(8) != 2
    assert off(guide, y, model.sigma)[same].max() < 0.2
    for sigma in (SIGMA[:5], torch.cat([SIGMA, torch.tensor([1.0, 2.0])])):  # fewer schools, and more
        model.sigma, more = sigma, torch.randn(len(sigma))
        assert off(guide, more, sigma)[:8].max() < 0.2
        assert math.isfinite(Trace_ELBO().loss(model, guide, more))


@pytest.mark.parametrize("family", ["auto", "flow"])
def test_one_map_that_reads_covariates_is_kept_where_it_is_as_good(family):
    """A network of few numbers is trained faster than a map for each index."""

    class Shifted(Measured):
        def __call__(self, y, rows=None):
            with pyro.plate("schools", 8, subsample=rows) as rows:
                theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(theta + self.sigma[rows], 0.5), obs=y[rows])

    model, y = Shifted(SIGMA), SIGMA + torch.randn(8)
    guide = auto_faithful_guide(model, y, family=family)
    assert "one that reads self.sigma is as good" in guide.describe(verbose=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(y)
    for block in guide.blocks:
        for own in block.conditionals.maps.values():
            assert not torch.addcmul(own.rows.table, own.rows.unit, own.rows.trained).any()


@pytest.mark.parametrize("rows", [torch.tensor([3, 0, 7, 1, 6, 2, 5, 4]), torch.tensor([3, 0, 7])])
def test_constants_beside_indices_of_the_callers(rows):
    """Indices are no data that could be made equal; of those that a batch leaves out nothing is known at set-up."""

    def model(y, rows=None, size=None):
        with pyro.plate("schools", 8, subsample=rows, subsample_size=size) as indices:
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            sigma = torch.nn.functional.one_hot(indices, 8).float() @ SIGMA
            pyro.sample("y", dist.Normal(theta, sigma), obs=y[indices])

    y = 1.5 * torch.randn(8)
    for call in ({"rows": rows}, {"size": len(rows)}):
        guide = auto_faithful_guide(model, y, example_kwargs=call)
        assert "a map of its own for each index of schools, along which constants" in guide.describe()
        if len(rows) == 8:
            assert off(guide, y, SIGMA).max() < 0.2
        assert math.isfinite(Trace_ELBO().loss(model, guide, y, torch.tensor([4, 2])))


@pytest.mark.parametrize("rows", [None, torch.tensor([4, 1, 3])])
def test_covariates_along_two_plates_have_maps_where_both_are_there_in_full(rows):
    w = torch.arange(20.0).reshape(4, 5) / 5
    y = w + torch.randn(4, 5)

    def model(y, rows=None):
        with pyro.plate("a", 4, dim=-2) as i, pyro.plate("b", 5, subsample=rows, dim=-1) as j:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5 + w[i][:, j]), obs=y[:, j])

    guide = auto_faithful_guide(model, y, rows, num_start_samples=2000)
    assert ("a map of its own for each index of a, b" in guide.describe()) == (rows is None)
    for chosen in (None, rows, torch.tensor([2])):
        part = slice(None) if chosen is None else chosen
        sigma = 0.5 + w[:, part]
        found = guide.median(y, chosen)["z"]
        assert found.shape == sigma.shape
        if rows is None:  # 200 samples for each
            assert ((found - y[:, part] / (1 + sigma.square())) / sigma).abs().max() < 0.5


def test_numbers_of_trials_that_are_no_argument():
    """No network reads integers; taken by a plate's indices, they are constants as any other."""
    trials = torch.tensor([10, 20, 5, 40, 100, 3, 8, 60])

    def model(y, size=None):
        with pyro.plate("data", 8, subsample_size=size) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Binomial(trials[rows], logits=z), obs=y[rows])

    guide = auto_faithful_guide(model, torch.tensor([2.0, 3, 1, 10, 20, 1, 4, 5]), num_start_samples=2000)
    assert "a map of its own for each index of data, along which constants" in guide.describe()
    assert math.isfinite(Trace_ELBO().loss(model, guide, torch.ones(8), 3))


def two_effects(y):
    """The second effect of a school hears of the first as much as the school's standard error leaves open."""
    with pyro.plate("schools", 8):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a + b, SIGMA.double()), obs=y)


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_slopes_of_their_own_on_parents_in_the_same_plates(family):
    guide = auto_faithful_guide(two_effects, torch.zeros(8), family=family)
    many = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    marginal = dist.Normal(0.0, (2 + SIGMA.double().square()).sqrt())
    gaps = []
    for _ in range(20):
        y = marginal.sample()
        gaps.append(many.loss(two_effects, guide, y) + marginal.log_prob(y).sum().item())
    # 8 schools with 7 weights each, 1,250 samples for each: 0.02; one slope for all schools leaves much more
    assert sum(gaps) / len(gaps) < 0.06


def test_who_is_concerned():
    graph = ModelGraph(["mz", "zx", "zp", "mq"], observed=["x"], plates={name: ["data"] for name in "zxp"})
    observation = sites_concerned(faithful_inverse(graph), {"x": ("data",)})
    assert observation.own == {"z": ("data",)}  # not p, which sees z and nothing else
    assert observation.outside == {"m": ("data",)}
    assert sites_concerned(mean_field_inverse(graph), {"x": ("data",)}).own.keys() == {"z", "p"}
    assert sites_concerned(faithful_inverse(graph), {"p": ("data",)}).own == {"p": ("data",)}
    assert sites_concerned(faithful_inverse(graph), {"z": ("data",)}).own == {"z": ("data",)}
    nested = ModelGraph(["gz", "zx"], observed=["x"], plates={"g": ["a"], "z": ["a", "b"], "x": ["a", "b"]})
    found = sites_concerned(faithful_inverse(nested), {"x": ("a",)})
    assert found.own == {"g": ("a",), "z": ("a",)}
    assert not found.outside
    found = sites_concerned(faithful_inverse(nested), {"x": ("b",)})
    assert found.own == {"z": ("b",)}
    assert found.outside == {"g": ("b",)}


def hierarchical_schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, SIGMA.double()), obs=y)


def test_unlike_elements_are_not_pooled():
    guide = auto_faithful_guide(hierarchical_schools, torch.zeros(8), pool="deepset", num_start_samples=500)
    assert "mu | y (not read)  [per-element parameters" in guide.describe()
    assert "not pooled: constants or parameters in the model vary along schools" in guide.describe()
    assert guide.plan.blocks[1].non_exchangeable == {"theta": ("schools",)}
    with pytest.raises(GraphflowsError, match="'schools' to have 8 elements"):
        auto_faithful_guide(model_of_any_size, torch.zeros(8))(torch.zeros(5))


def model_of_any_size(y):
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, SIGMA.double()[: len(y)]), obs=y)


def test_groups_of_different_size_have_slopes_of_their_own():
    """theta_g | mu, y hears less of mu the more data there are: no shared slope is right."""
    index, y = torch.tensor([0, 1, 1, 2, 2, 2, 2, 0, 2]), torch.randn(9) + 1.0
    guide = auto_faithful_guide(varying, index, y, init="random")
    count = torch.bincount(index, minlength=3).double()
    total = torch.zeros(3).index_add(0, index, y)
    same = (index[:, None] == index[None]).double()
    evidence = dist.MultivariateNormal(torch.zeros(9), 1.0 + same + torch.eye(9)).log_prob(y).item()
    weight = count / (1 + count)
    precision = 1.0 + weight.sum()
    guide.set_linear_("mu", {}, float((weight * total / count).sum() / precision), float(precision**-0.5))
    guide.set_linear_("theta", {}, 0.0, 1.0)
    network = guide.blocks[1].conditionals
    width = network.output_units("theta")[1]
    feature = guide.blocks[1].inputs.features  # of mu
    variance = 1 / (1 + count)
    with torch.no_grad():
        network.table.table[..., 0] = variance * (total + feature.shift) / width
        network.table.table[..., 1] = variance.sqrt().log()
        key, _ = network._map_of["theta"]
        network.maps[key].set_(
            torch.stack([variance * feature.scale / width, torch.zeros(3)], -1).unsqueeze(-1)
        )
    for vectorize in (False, True):
        options = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 1}
        assert Trace_ELBO(**options).loss(varying, guide, index, y) == pytest.approx(-evidence)


def test_parameters_of_the_model_for_each_index_count_as_constants():
    def model(x):
        bias = pyro.param("bias", lambda: torch.zeros(5))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + bias, 1.0), obs=x)

    guide = auto_faithful_guide(model, torch.randn(5), num_start_samples=2000)
    assert guide.plan.blocks[0].non_exchangeable == {"z": ("data",)}
    assert "no regression of each was possible" not in guide.describe(verbose=True)
    assert math.isfinite(Trace_ELBO().loss(model, guide, torch.randn(5)))


FEATURES = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double()


def regression(y):
    """Coefficients in a plate, and data that are one vector in none."""
    with pyro.plate("features", 5):
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(slope @ FEATURES.mT, 0.1).to_event(1), obs=y)


def one_by_one(y):
    """Each element of a plate has a site of data that is in none."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("groups", 4):
        effect = pyro.sample("effect", dist.Normal(mean, 2.0))
    for i in range(4):
        pyro.sample(f"y{i}", dist.Normal(effect[..., i], 1.0), obs=y[i])


def parts_and_total(total, parts):
    with pyro.plate("parts_", 4):
        part = pyro.sample("part", dist.Gamma(2.0, 0.01))
    pyro.sample("total", dist.Normal(part.sum(-1), 5.0), obs=total)
    pyro.sample("parts", dist.Normal(part[..., :2], 20.0).to_event(1), obs=parts)


def mean_loss(model, guide, *args):
    pyro.set_rng_seed(1)
    with torch.no_grad():
        return sum(Trace_ELBO().loss(model, guide, *args) for _ in range(10)) / 10


@pytest.mark.parametrize("name", ["regression", "one_by_one"])
def test_elements_that_data_outside_of_their_plate_tell_apart_start_exact(name):
    """One map for all elements was 5,552 and 35 nats off, and training could not mend it."""
    torch.manual_seed(0)
    if name == "regression":
        model, covariance = regression, 9.0 * FEATURES @ FEATURES.mT + 0.01 * torch.eye(12).double()
    else:
        model, covariance = one_by_one, 25.0 + 5.0 * torch.eye(4).double()
    marginal = dist.MultivariateNormal(torch.zeros(len(covariance)).double(), covariance)
    y = marginal.sample()
    guide = auto_faithful_guide(model, y)
    assert "or which data in no such plate tell apart" in guide.describe()
    assert abs(mean_loss(model, guide, y) + float(marginal.log_prob(y))) < 0.1
    other = marginal.sample()  # amortised
    assert abs(mean_loss(model, guide, other) + float(marginal.log_prob(other))) < 0.1


def test_elements_that_data_outside_of_their_plate_tell_apart_start_near_the_mode(tmp_path):
    """Plates of latents alone do not keep all data from being one datum (440 nats; the evidence is 19.9)."""
    data = torch.tensor(900.0), torch.tensor([100.0, 300.0])
    guide = auto_faithful_guide(parts_and_total, *data)
    assert mean_loss(parts_and_total, guide, *data) < 23.0
    guide.save(tmp_path / "guide.safetensors")
    loaded = load_guide(tmp_path / "guide.safetensors", parts_and_total)
    assert mean_loss(parts_and_total, loaded, *data) == mean_loss(parts_and_total, guide, *data)


def test_which_elements_are_told_apart():
    """A total takes all alike; elements of which some are seen, or weighed by constants, are not."""
    data = torch.tensor(900.0), torch.tensor([100.0, 300.0])
    assert non_exchangeable_plates(parts_and_total, data) == {"parts": ("parts_",)}
    assert non_exchangeable_plates(regression, (torch.zeros(12),)) == {"y": ("features",)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elements_are_not_told_apart_by_the_rounding_of_a_total(dtype):
    """In single precision half of all seeds had a map for each of 300, and refused another number of them."""

    def model(total, number):
        with pyro.plate("parts_", number):
            part = pyro.sample("part", dist.Normal(total.new_tensor(3.0), 1.0))
        pyro.sample("total", dist.Normal(part.sum(-1), 0.1), obs=total)
        pyro.sample("first", dist.Normal(part[..., 0], 100.0), obs=total)

    for seed in range(10):
        pyro.set_rng_seed(seed)
        found = non_exchangeable_plates(model, (torch.tensor(900.0, dtype=dtype), 300))
        assert found == {"first": ("parts_",)}


def test_elements_are_not_told_apart_where_maps_of_all_data_would_be_large():
    """Maps for each of 20 coefficients of 2,000 data would take gigabytes at set-up."""

    def model(x, y):
        with pyro.plate("features", x.shape[-1]):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope @ x.mT, 0.1).to_event(1), obs=y)

    assert non_exchangeable_plates(model, (torch.randn(12, 5), torch.zeros(12))) == {"y": ("features",)}
    assert non_exchangeable_plates(model, (torch.randn(2000, 20), torch.zeros(2000))) == {}
