"""Values of sites as flat vectors and back: every kind of discrete value, every support, masks and classes."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides.sites import (
    DiscreteEncoding,
    FeatureMap,
    InputEncodings,
    LatentSite,
    concatenate,
    flatten_event,
    input_encodings,
    is_identity,
    is_moderate,
    latent_sites,
    partly_observed,
    site_prior,
)
from pyro_graphflows.inspect import trace_model
from pyro_graphflows.regression import location_and_scale

# ---------------------------------------------------------------- discrete values

HALF = torch.tensor(0.5)
THIRDS = torch.full((3,), 1 / 3)

# name: distribution, kind, classes, lowest, length of the flat vector, words
KINDS = {
    "bernoulli": (dist.Bernoulli(HALF), "binary", 1, 0, 1, "binary"),
    "bernoullis": (dist.Bernoulli(torch.full((2, 2), 0.5)).to_event(2), "binary", 1, 0, 4, "4 x binary"),
    "categorical": (dist.Categorical(THIRDS), "classes", 3, 0, 3, "3 classes"),
    "categoricals": (dist.Categorical(THIRDS.expand(2, 3)).to_event(1), "classes", 3, 0, 6, "2 x 3 classes"),
    "binomial": (dist.Binomial(4, HALF), "classes", 5, 0, 5, "5 classes"),
    "one-hot": (dist.OneHotCategorical(THIRDS), "one_hot", 3, 0, 3, "3 classes"),
    "one-hots": (dist.OneHotCategorical(THIRDS.expand(2, 3)).to_event(1), "one_hot", 3, 0, 6, "2 x 3 classes"),
    "poisson": (dist.Poisson(HALF), "counts", 1, 0, 1, "counts"),
}  # fmt: skip


def encoding_of(fn):
    return DiscreteEncoding.of(fn, fn.sample().dtype)


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_discrete_values(name):
    fn, kind, classes, lowest, size, words = KINDS[name]
    encoding = encoding_of(fn)
    assert (encoding.kind, encoding.num_classes, encoding.lowest) == (kind, classes, lowest)
    assert encoding.event_shape == fn.event_shape
    assert encoding.size == size
    assert encoding.num_elements == size // classes
    assert str(encoding) == words


@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
@pytest.mark.parametrize("name", KINDS)
def test_values_come_back_from_their_vectors(name, batch):
    fn = KINDS[name][0]
    encoding = encoding_of(fn)
    values = fn.sample(batch)
    flat = encoding.encode(values, torch.float64)
    assert flat.shape == (*batch, encoding.size)
    assert flat.dtype == torch.float64
    if encoding.kind != "counts":
        assert ((flat == 0) | (flat == 1)).all()
    back = encoding.decode(flat)
    assert back.dtype == values.dtype
    assert torch.equal(back, values)


def test_all_values_of_two_variables_have_vectors_of_their_own():
    encoding = encoding_of(KINDS["categoricals"][0])
    values = torch.tensor(list(itertools.product(range(3), repeat=2)))
    flat = encoding.encode(values, torch.float64)
    assert torch.equal(flat.unflatten(-1, (2, 3)).argmax(-1), values)
    assert len(flat.unique(dim=0)) == 9
    assert encoding.encode(torch.tensor([3, -1]), torch.float64).tolist() == [0.0] * 6  # no class at all


class Dice(dist.TorchDistribution):
    """A range that does not begin with zero; ``sides`` may differ from element to element."""

    arg_constraints = {}  # noqa: RUF012
    has_enumerate_support = True

    def __init__(self, sides):
        self.sides = sides
        super().__init__(torch.Size(), torch.as_tensor(sides).shape, validate_args=False)

    @constraints.dependent_property(is_discrete=True)
    def support(self):
        base = constraints.integer_interval(1, self.sides)
        return constraints.independent(base, len(self.event_shape)) if self.event_shape else base

    def sample(self, sample_shape=()):
        return torch.randint(1, 4, (*sample_shape, *self.event_shape))


def test_a_range_that_does_not_begin_with_zero():
    encoding = DiscreteEncoding.of(Dice(6), torch.int64)
    assert (encoding.kind, encoding.num_classes, encoding.lowest, encoding.size) == ("classes", 6, 1, 6)
    values = torch.arange(1, 7)
    assert torch.equal(encoding.encode(values, torch.float64), torch.eye(6))
    assert torch.equal(encoding.decode(torch.eye(6)), values)


def test_elements_with_ranges_of_their_own_are_counts():
    assert DiscreteEncoding.of(Dice(torch.tensor([6, 6])), torch.int64).kind == "classes"
    assert DiscreteEncoding.of(Dice(torch.tensor([4, 6])), torch.int64).kind == "counts"


def test_supports_that_fit():
    supports = {name: fn.support for name, (fn, *_) in KINDS.items()}
    alike = [
        {"bernoulli", "bernoullis"},
        {"categorical", "categoricals"},
        {"binomial"},
        {"one-hot", "one-hots"},
    ]
    for group in alike:
        for name in group:
            encoding = encoding_of(KINDS[name][0])
            assert {other for other, support in supports.items() if encoding.fits(support)} == group
    counts = encoding_of(KINDS["poisson"][0])
    assert all(counts.fits(support) for support in supports.values())
    dice = DiscreteEncoding.of(Dice(6), torch.int64)
    assert dice.fits(Dice(torch.tensor([6, 6])).support)
    assert not dice.fits(Dice(5).support)
    assert not dice.fits(constraints.integer_interval(0, 6))


# ---------------------------------------------------------------- latent sites

# name: distribution, shape before the bijection, whether it is real as it is
CONTINUOUS = {
    "normal": (dist.Normal(0.0, 1.0), (), True),
    "vector": (dist.Normal(torch.zeros(3), 1.0).to_event(1), (3,), True),
    "matrix": (dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), (2, 3), True),
    "multivariate": (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), (2,), True),
    "log-normal": (dist.LogNormal(0.0, 1.0), (), False),
    "gammas": (dist.Gamma(torch.ones(2), 1.0).to_event(1), (2,), False),
    "uniform": (dist.Uniform(-1.0, 3.0), (), False),
    "dirichlet": (dist.Dirichlet(torch.ones(4)), (3,), False),
    "correlations": (dist.LKJCholesky(3, 1.0), (3,), False),
}


def model_of(**distributions):
    def model():
        with pyro.plate("data", 5):
            for name, fn in distributions.items():
                pyro.sample(name, fn)

    return model


def traced_of(model, *args, **kwargs):
    return trace_model(model, args, kwargs)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_sizes_of_continuous_sites(name):
    fn, shape, real = CONTINUOUS[name]
    site = latent_sites(traced_of(model_of(z=fn)))["z"]
    assert site.name == "z"
    assert site.event_shape == fn.event_shape
    assert site.unconstrained_shape == shape
    assert site.size == math.prod(shape)
    assert site.is_real is real
    assert site.encoding is None
    values = fn.sample((5,))
    raw = site.transform.inv(values)
    assert raw.shape == (5, *shape)
    torch.testing.assert_close(site.transform(raw), values)
    assert flatten_event(raw, len(shape)).shape == (5, site.size)


def test_discrete_sites_have_an_encoding_and_nothing_to_unfold():
    sites = latent_sites(traced_of(model_of(k=KINDS["categorical"][0], b=KINDS["bernoullis"][0])))
    assert list(sites) == ["k", "b"]
    assert (sites["k"].size, sites["b"].size) == (3, 4)
    assert sites["b"].unconstrained_shape == (4,)
    assert not sites["k"].is_real
    assert is_identity(sites["k"].transform)
    assert str(sites["b"].encoding) == "4 x binary"


def test_counts_want_a_factor_of_the_users():
    traced = traced_of(model_of(n=dist.Poisson(3.0), z=dist.Normal(0.0, 1.0)))
    with pytest.raises(UnsupportedModelError, match=r"site 'n' is Poisson .*factors=\{'n': \.\.\.\}"):
        latent_sites(traced)
    assert latent_sites(traced, custom=["n"])["n"].encoding.kind == "counts"


def test_a_site_is_a_value():
    one, other = (LatentSite("z", torch.Size(), torch.Size(), constraints.real) for _ in range(2))
    assert one == other
    with pytest.raises(AttributeError):
        one.size = 3


def test_flat_events():
    value = torch.arange(12).reshape(2, 3, 2)
    assert flatten_event(value, 0).shape == (2, 3, 2, 1)
    assert flatten_event(value, 2).tolist() == [list(map(float, range(6))), list(map(float, range(6, 12)))]
    assert flatten_event(value.float(), 1).dtype == torch.float32
    assert flatten_event(value, 3).shape == (12,)


# ---------------------------------------------------------------- conditioning values


def several(w, index, x, k, y, there):
    """A covariate, an index, a number, a class, and data of which some are missing."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w.sum(-1), 1.0))
        pyro.sample(
            "x", dist.Normal(z[..., None] + index[:, None], 1.0).expand([len(x), 2]).to_event(1), obs=x
        )
        pyro.sample("k", dist.Categorical(logits=torch.stack([z, -z, 0 * z], -1)), obs=k)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=there)


W, INDEX, X = torch.randn(4, 2), torch.tensor([0, 1, 1, 0]), torch.randn(4, 2)
K, Y, THERE = torch.tensor([0, 2, 1, 0]), torch.randn(4), torch.tensor([True, False, True, True])


@pytest.fixture
def encodings():
    args = W, INDEX, X, K, Y, THERE
    traced = trace_model(several, args, {})
    assert partly_observed(traced) == ("y_observed",)
    return input_encodings(several, args, {}, traced)


def test_what_a_guide_can_read(encodings):
    assert encodings.event_dims["x"] == 1
    assert encodings.event_dims["k"] == 0
    assert encodings.event_dims["y_observed"] == 1  # the value and what is there
    assert encodings.event_dims["w"] == 1
    assert "index" not in encodings.event_dims
    assert set(encodings.classes) == {"k"}
    assert encodings.partly == {"y_observed": 0}


def test_numbers_and_classes_as_vectors(encodings):
    assert torch.equal(encodings.flat("x", X), X)
    assert torch.equal(encodings.flat("k", K), torch.eye(3)[K])
    assert encodings.flat("k", K, torch.float32).dtype == torch.float32
    assert torch.equal(encodings.flat("w", W), W)
    plain = InputEncodings({"n": 0})
    assert plain.flat("n", torch.tensor([3, 4])).tolist() == [[3.0], [4.0]]
    assert plain.flat("n", torch.tensor([3.0, 4.0]).float()).dtype == torch.float32


def test_missing_elements_are_zero_and_marked(encodings):
    value = encodings.masked_value("y_observed", torch.where(THERE, Y, math.nan), THERE)
    assert torch.equal(value, torch.stack([torch.where(THERE, Y, 0.0), THERE.double()], -1))
    assert torch.equal(encodings.flat("y_observed", value), value)
    for mask in (None, True):
        assert torch.equal(encodings.masked_value("y_observed", Y, mask), torch.stack([Y, torch.ones(4)], -1))


def test_classes_of_which_some_are_missing():
    encoding = encoding_of(KINDS["categorical"][0])
    encodings = InputEncodings({"k": 1}, {"k": encoding}, {"k": 0})
    value = encodings.masked_value("k", K, THERE)
    assert torch.equal(value[:, 3], THERE.double())
    assert torch.equal(value[:, :3], torch.eye(3)[K] * THERE[:, None])
    assert torch.equal(encodings.flat("k", value), value)


def test_of_data_with_holes_beside_a_mask_only_the_pattern_counts():
    def model(y):
        seen = ~torch.isnan(y)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.where(seen, y, 0.0), obs_mask=seen)

    y = torch.tensor([0.3, math.nan, 1.0])
    traced = trace_model(model, (y,), {})
    encodings = input_encodings(model, (y,), {}, traced)
    assert encodings.patterns == {"y"}
    assert encodings.input_value("y", y).tolist() == [1.0, 0.0, 1.0]
    assert InputEncodings({"w": 0}).input_value("w", y) is y
    whole = InputEncodings({"w": 0}, patterns=frozenset("w"))
    assert whole.input_value("w", y).tolist() == [1.0, 0.0, 1.0]


def test_values_that_are_computed_from_latents_are_no_data():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -z.square())
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor(1.0)
    traced = trace_model(model, (x,), {})
    assert set(input_encodings(model, (x,), {}, traced).event_dims) == {"x"}


# name: support, sample, kind, the map before shift and scale
NORMAL = 1 + 3 * torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
POSITIVE = NORMAL.exp()
UNIT = NORMAL.sigmoid()
COUNTS = POSITIVE.floor()
FEATURE_KINDS = {
    "real": (constraints.real, NORMAL, "identity", lambda x: x),
    "real vector": (constraints.real_vector, NORMAL, "identity", lambda x: x),
    "input": (None, NORMAL, "identity", lambda x: x),
    "positive": (constraints.positive, POSITIVE, "log", torch.log),
    "nonnegative": (constraints.nonnegative, POSITIVE, "log", torch.log),
    "positive vector": (constraints.independent(constraints.positive, 1), POSITIVE, "log", torch.log),
    "above one": (constraints.greater_than(1.0), NORMAL.abs() + 1, "identity", lambda x: x),
    "unit interval": (constraints.unit_interval, UNIT, "logit", torch.logit),
    "counts": (constraints.nonnegative_integer, COUNTS, "log1p", torch.log1p),
    "positive counts": (constraints.positive_integer, COUNTS + 1, "log1p", torch.log1p),
    "binary": (constraints.boolean, (NORMAL > 5.0).double(), "identity", lambda x: x),
    "interval": (constraints.interval(-1.0, 2.0), UNIT * 3 - 1, "identity", lambda x: x),
}


def kind_of(feature_map):
    ((kind, _),) = feature_map.kinds
    return kind


@pytest.mark.parametrize("name", FEATURE_KINDS)
def test_kinds_and_units(name):
    """Features are the map of the kind, with mean zero and deviation one in the sample."""
    support, sample, kind, function = FEATURE_KINDS[name]
    features = FeatureMap(support, sample)
    assert kind_of(features) == kind
    raw = function(sample)
    torch.testing.assert_close(features(sample), (raw - raw.mean(0)) / raw.std(0), atol=1e-6, rtol=1e-6)
    new = sample[:7].reshape(7, 1, 2).expand(7, 3, 2)
    torch.testing.assert_close(features(new)[:, 2], features(sample[:7]))
    assert repr(features) == f"FeatureMap({kind})"


@pytest.mark.parametrize("name", FEATURE_KINDS)
def test_maps_keep_the_order_of_values_and_are_undone_by_their_inverse(name):
    support, sample, kind, _ = FEATURE_KINDS[name]
    features = FeatureMap(support, sample)
    inverse = {"identity": lambda y: y, "log": torch.exp, "logit": torch.sigmoid, "log1p": torch.expm1}[kind]
    torch.testing.assert_close(inverse(features.shift + features.scale * features(sample)), sample)
    rising = sample[:, :1].sort(0).values.expand(-1, 2)
    assert (features(rising).diff(dim=0) >= 0).all()


def test_heavy_tails_become_features_of_order_one():
    cauchy = torch.distributions.Cauchy(5.0, 2.0).sample((20_000, 2))
    features = FeatureMap(None, cauchy)
    assert kind_of(features) == "asinh"
    found = features(cauchy)
    assert found.abs().max() < 12
    shift, scale = location_and_scale(found)
    torch.testing.assert_close(shift, torch.zeros(2), atol=1e-9, rtol=0)
    torch.testing.assert_close(scale, torch.ones(2), atol=1e-9, rtol=0)
    # the quartiles of the sample are the units of the map
    lower, centre, upper = torch.quantile(cauchy, torch.tensor([0.25, 0.5, 0.75]), dim=0)
    torch.testing.assert_close(
        found, (((cauchy - centre) / (upper - lower)).asinh() - features.shift) / features.scale
    )
    back = centre + (upper - lower) * (features.shift + features.scale * found).sinh()
    torch.testing.assert_close(back, cauchy)


def test_a_heavy_column_that_hardly_varies_has_a_width():
    """More than half of the values are alike: the quartiles coincide, and nothing is divided by zero."""
    sample = torch.zeros(1000, 1)
    sample[::100] = torch.linspace(-1e6, 1e7, 10).unsqueeze(-1)
    features = FeatureMap(None, sample)
    assert kind_of(features) == "asinh"
    assert torch.isfinite(features(sample)).all()
    assert features(sample).abs().max() < 20


def test_values_at_the_edge_of_a_support_have_finite_features():
    log = FeatureMap(constraints.nonnegative, POSITIVE)
    logit = FeatureMap(constraints.unit_interval, UNIT)
    counts = FeatureMap(constraints.nonnegative_integer, COUNTS)
    edges = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for features in (log, logit, counts):
        assert torch.isfinite(features(edges)).all()
    x = torch.zeros(1, 2, requires_grad=True)
    log(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_without_standardisation_and_without_samples_values_stay():
    for features in (
        FeatureMap(constraints.positive, POSITIVE, standardize=False),
        FeatureMap(None, torch.zeros(0, 2)),
        FeatureMap(None, torch.ones(1, 2)),
    ):
        assert torch.equal(features(POSITIVE), POSITIVE)
    one = FeatureMap(constraints.positive, POSITIVE[:1])
    torch.testing.assert_close(one(POSITIVE), POSITIVE.log())  # a kind needs no sample, units do


def test_rows_that_are_not_finite_do_not_count():
    holes = torch.cat([NORMAL, torch.tensor([[math.nan, 0.0], [math.inf, 1e9]])])
    assert torch.equal(FeatureMap(None, holes).shift, FeatureMap(None, NORMAL).shift)


def test_maps_side_by_side():
    maps = [
        FeatureMap(constraints.positive, POSITIVE),
        FeatureMap(None, NORMAL[:, :1]),
        FeatureMap(None, torch.distributions.Cauchy(0.0, 1.0).sample((5000, 2))),
        FeatureMap(None, torch.zeros(3, 0)),
        FeatureMap(constraints.unit_interval, UNIT),
    ]
    joined = FeatureMap.join(maps)
    parts = [POSITIVE[:9], NORMAL[:9, :1], torch.randn(9, 2), torch.zeros(9, 0), UNIT[:9]]
    expected = torch.cat([one(part) for one, part in zip(maps, parts, strict=True)], -1)
    torch.testing.assert_close(joined(torch.cat(parts, -1)), expected)
    assert joined.shift.shape == (7,)
    again = FeatureMap.join([joined, maps[0]])
    assert [kind for kind, _ in again.kinds] == ["log", "identity", "asinh", "identity", "logit", "log"]
    nothing = FeatureMap.join([])
    assert nothing(torch.zeros(4, 0)).shape == (4, 0)


def test_a_map_of_given_kinds_takes_the_state_of_another():
    made = FeatureMap.join(
        [
            FeatureMap(constraints.positive, POSITIVE),
            FeatureMap(None, NORMAL),
            FeatureMap(None, torch.zeros(0, 1)),
        ]
    )
    loaded = FeatureMap.of_kinds(made.kinds)
    loaded.load_state_dict(made.state_dict())
    values = torch.cat([POSITIVE, NORMAL, NORMAL[:, :1]], -1)
    assert torch.equal(loaded(values), made(values))
    assert FeatureMap.of_kinds([])(torch.zeros(2, 0)).shape == (2, 0)


# ---------------------------------------------------------------- concatenation


def test_batch_shapes_broadcast():
    one, other = torch.randn(3, 1, 2), torch.randn(4, 1)
    joint = concatenate([one, other])
    assert joint.shape == (3, 4, 3)
    assert torch.equal(joint[2, 1], torch.cat([one[2, 0], other[1]]))
    assert concatenate([one]) is one
    assert concatenate([other], like=torch.zeros(5, 4, 9)).shape == (5, 4, 1)


def test_no_parts():
    assert concatenate([]).shape == (0,)
    like = torch.zeros(2, 3, 4, dtype=torch.float32)
    assert concatenate([], like=like).shape == (2, 3, 0)
    assert concatenate([], like=like).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whether_a_prior_is_moderate_does_not_depend_on_its_type(dtype):
    small, one = torch.tensor(1e-3, dtype=dtype), torch.ones((), dtype=dtype)
    assert not is_moderate(dist.InverseGamma(small, small))
    assert not is_moderate(dist.Gamma(small, small))
    assert is_moderate(dist.Gamma(one, one))
    assert is_moderate(dist.HalfCauchy(one))


@pytest.mark.parametrize("rate", [torch.ones(()), torch.ones(2), torch.ones(5, 1), torch.ones(5, 2)])
def test_a_vector_with_a_parameter_out_of_range_is_refused_and_others_are_not(rate):
    site = latent_sites(traced_of(model_of(z=dist.Gamma(torch.ones(5, 2), 1.0).to_event(1))))["z"]
    assert site_prior(site, dist.Gamma(torch.ones(5, 2), rate).to_event(1)).standard
    bad = dist.Gamma(torch.ones(5, 2), 0.0 * rate, validate_args=False)
    with pytest.raises(GraphflowsError, match="of 10 elements"):
        site_prior(site, bad.to_event(1))
