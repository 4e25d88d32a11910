"""Maps of conditioning values to features: which kind for which support, units, and maps side by side."""

import math

import pytest
import torch
from torch.distributions import constraints

from pyro_graphflows.guides.features import FeatureMap, concatenate
from pyro_graphflows.regression import location_and_scale

# name: support, sample, kind, the map before shift and scale
NORMAL = 1 + 3 * torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
POSITIVE = NORMAL.exp()
UNIT = NORMAL.sigmoid()
COUNTS = POSITIVE.floor()
KINDS = {
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


@pytest.mark.parametrize("name", KINDS)
def test_kinds_and_units(name):
    """Features are the map of the kind, with mean zero and deviation one in the sample."""
    support, sample, kind, function = KINDS[name]
    features = FeatureMap(support, sample)
    assert kind_of(features) == kind
    raw = function(sample)
    torch.testing.assert_close(features(sample), (raw - raw.mean(0)) / raw.std(0), atol=1e-6, rtol=1e-6)
    new = sample[:7].reshape(7, 1, 2).expand(7, 3, 2)
    torch.testing.assert_close(features(new)[:, 2], features(sample[:7]))
    assert repr(features) == f"FeatureMap({kind})"


@pytest.mark.parametrize("name", KINDS)
def test_maps_keep_the_order_of_values_and_are_undone_by_their_inverse(name):
    support, sample, kind, _ = KINDS[name]
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
