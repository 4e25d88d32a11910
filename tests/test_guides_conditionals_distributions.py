"""What a guide emits at its sites: densities by change of variables, own draws, discrete vectors, and the choice."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import TransformedDistribution, biject_to, constraints

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.conditionals.distributions import (
    DiscreteDistribution,
    DiscreteVector,
    FactorDistribution,
    SampledNormal,
    ScalarNormal,
    site_distribution,
)
from pyro_graphflows.guides.sites import DiscreteEncoding, LatentSite

# name: support, event shape, shape before the bijection
SUPPORTS = {
    "real": (constraints.real, (), ()),
    "vector": (constraints.independent(constraints.real, 1), (3,), (3,)),
    "positive": (constraints.positive, (), ()),
    "matrix of positives": (constraints.independent(constraints.positive, 2), (2, 2), (2, 2)),
    "interval": (constraints.interval(-1.0, 3.0), (), ()),
    "simplex": (constraints.simplex, (4,), (3,)),
    "correlations": (constraints.corr_cholesky, (3, 3), (3,)),
}
BATCH = (2, 5)


def base_of(size, *batch):
    return dist.Normal(torch.randn(*batch, size), torch.rand(*batch, size) + 0.5).to_event(1)


def emitted(name, *batch):
    support, event_shape, shape = SUPPORTS[name]
    base = base_of(math.prod(shape), *batch)
    return FactorDistribution(base, biject_to(support), torch.Size(shape), torch.Size(event_shape), support)


@pytest.mark.parametrize("name", SUPPORTS)
def test_density_is_a_change_of_variables(name):
    """As torch's own transformed distribution, which is given the base in the shape of the site."""
    support, event_shape, shape = SUPPORTS[name]
    q = emitted(name, *BATCH)
    loc, scale = (part.reshape(*BATCH, *shape) for part in (q.base.mean, q.base.stddev))
    normal = dist.Normal(loc, scale).to_event(len(shape))
    expected = TransformedDistribution(normal, biject_to(support))
    value = expected.sample((7,))
    assert value.shape == (7, *BATCH, *event_shape)
    torch.testing.assert_close(q.log_prob(value), expected.log_prob(value))
    assert q.log_prob(value).shape == (7, *BATCH)
    assert q.batch_shape == BATCH
    assert q.event_shape == event_shape
    assert q.support.event_dim == len(event_shape)


@pytest.mark.parametrize("name", SUPPORTS)
def test_draws_are_in_the_support_and_their_vectors_are_kept(name):
    q = emitted(name, *BATCH)
    for draw in (q.rsample, q.sample):
        value = draw((4,))
        assert q.support.check(value).all()
        flat = q.unconstrained(value)
        assert q.unconstrained(value) is flat
        torch.testing.assert_close(q.unconstrained(value.clone()), flat, atol=1e-6, rtol=1e-6)
        assert flat.shape == (4, *BATCH, math.prod(SUPPORTS[name][2]))
    torch.testing.assert_close(q.log_prob(value), q.log_prob(value.clone()), atol=1e-6, rtol=1e-6)
    centre = q.centre()
    torch.testing.assert_close(q.unconstrained(centre), q.base.mean)
    torch.testing.assert_close(q.transform(q.base.mean.reshape(*BATCH, *SUPPORTS[name][2])), centre)


def test_a_draw_far_out_is_scored_from_its_vector():
    """The sigmoid of 50 is one; its density can be had from the vector alone."""
    base = dist.Normal(torch.tensor([50.0]), torch.tensor([0.1])).to_event(1)
    q = FactorDistribution(
        base, biject_to(constraints.unit_interval), torch.Size(), torch.Size(), constraints.unit_interval
    )
    value = q.rsample()
    assert value > 1 - 1e-12
    flat = q.unconstrained(value)
    ladj = -torch.nn.functional.softplus(flat) - torch.nn.functional.softplus(-flat)
    torch.testing.assert_close(
        q.log_prob(value), base.log_prob(flat) - ladj.squeeze(-1), atol=1e-5, rtol=1e-5
    )


def test_expanded_copies_share_the_draw():
    q = emitted("simplex", 5)
    assert q.expand((5,)) is q
    wide = q.expand((3, 5))
    value = wide.rsample()
    assert value.shape == (3, 5, 4)
    assert q.unconstrained(value) is wide.unconstrained(value)
    torch.testing.assert_close(wide.log_prob(value), q.log_prob(value.clone()))


def test_gradients_of_draws_and_at_fixed_values():
    """A reparametrised draw moves with the parameters; a plain one does not, and its score is that of any value."""
    loc = torch.zeros(3, requires_grad=True)

    def fresh():
        base = dist.Normal(loc, torch.ones(3)).to_event(1)
        return FactorDistribution(
            base, biject_to(constraints.simplex), torch.Size([3]), torch.Size([4]), constraints.simplex
        )

    q = fresh()
    value = q.sample()
    assert not value.requires_grad
    found, expected = (
        torch.autograd.grad(each, loc)[0] for each in (q.log_prob(value), fresh().log_prob(value.clone()))
    )
    torch.testing.assert_close(found, expected)
    assert (found != 0).all()
    (slope,) = torch.autograd.grad(q.log_prob(value.requires_grad_()), value)
    (expected,) = torch.autograd.grad(fresh().log_prob(1.0 * value), value)
    torch.testing.assert_close(slope, expected)
    torch.manual_seed(1)
    own = torch.autograd.grad(q.log_prob(q.rsample()), loc)[0]
    torch.manual_seed(1)
    copied = torch.autograd.grad(fresh().log_prob(1.0 * q.rsample()), loc)[0]
    torch.testing.assert_close(own, copied, atol=1e-6, rtol=1e-6)


def test_gradients_at_a_fixed_value_where_the_support_moves():
    """A uniform support up to a bound that is learned: a draw without gradients is scored as any value."""
    bound = torch.tensor(3.0, requires_grad=True)

    def fresh():
        support = constraints.interval(0.0, bound)
        base = dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)
        return FactorDistribution(base, biject_to(support), torch.Size(), torch.Size(), support)

    q = fresh()
    with torch.no_grad():
        value = q.rsample()
    (found,) = torch.autograd.grad(q.log_prob(value), bound)
    (expected,) = torch.autograd.grad(fresh().log_prob(value.clone()), bound)
    torch.testing.assert_close(found, expected)
    # by hand: u = logit(value / bound), with a standard normal density of u
    u = (value / (bound - value)).log()
    log_q = dist.Normal(0.0, 1.0).log_prob(u) - (value * (bound - value) / bound).log()
    torch.testing.assert_close(found, torch.autograd.grad(log_q, bound)[0])


# ---------------------------------------------------------------- normals over numbers


def test_normals_held_as_numbers():
    loc, scale = torch.randn(5), torch.rand(5) + 0.5
    normal = dist.Normal(loc, scale)
    vector, sampled = ScalarNormal(normal), SampledNormal(normal)
    u = torch.randn(3, 5)
    torch.testing.assert_close(vector.log_prob(u.unsqueeze(-1)), normal.log_prob(u))
    torch.testing.assert_close(sampled.log_prob(u), normal.log_prob(u))
    assert (vector.batch_shape, vector.event_shape) == ((5,), (1,))
    assert (sampled.batch_shape, sampled.event_shape) == ((5,), ())
    assert vector.rsample((2,)).shape == (2, 5, 1)
    assert sampled.rsample((2,)).shape == (2, 5)
    assert torch.equal(vector.mean, loc.unsqueeze(-1))
    assert torch.equal(sampled.mean, loc)
    assert vector.expand((4, 5)).rsample().shape == (4, 5, 1)
    assert sampled.expand((4, 5)).rsample().shape == (4, 5)
    assert vector.support.event_dim == 1
    for q in (vector, sampled):  # no formula: estimators must sample
        with pytest.raises(NotImplementedError):
            torch.distributions.kl_divergence(q, normal)


# ---------------------------------------------------------------- discrete vectors


def vector_of(n, c, *batch):
    pairs = n * (n - 1) // 2
    logits = 1.5 * torch.randn(*batch, n, c)
    return DiscreteVector(logits, torch.randn(*batch, pairs, c, c) if n > 1 else None)


def all_values(n, c):
    """Return all values of n variables, and the index of the class of each."""
    index = torch.tensor(list(itertools.product(range(max(c, 2)), repeat=n)))
    if c == 1:
        return index.double(), index
    return torch.nn.functional.one_hot(index, c).double().flatten(-2), index


@pytest.mark.parametrize(("n", "c"), [(1, 1), (3, 1), (1, 4), (3, 3)])
def test_probabilities_of_discrete_vectors(n, c):
    """By hand, one variable after the other; they add up to one over all values."""
    q = vector_of(n, c, 2)
    values, index = all_values(n, c)
    found = q.log_prob(values.unsqueeze(1))
    assert found.shape == (len(values), 2)
    torch.testing.assert_close(found.exp().sum(0), torch.ones(2))
    y = values.unflatten(-1, (n, c))
    pairs = {pair: k for k, pair in enumerate(zip(*torch.tril_indices(n, n, -1).tolist(), strict=True))}
    for batch in range(2):
        for row in range(len(values)):
            log_p = 0.0
            for i in range(n):
                logits = q.logits[batch, i].clone()
                for j in range(i):
                    logits += q.couplings[batch, pairs[i, j]] @ y[row, j]
                if c == 1:
                    log_p += torch.nn.functional.logsigmoid(logits if index[row, i] else -logits).item()
                else:
                    log_p += logits.log_softmax(-1)[index[row, i]].item()
            assert found[row, batch].item() == pytest.approx(log_p)


@pytest.mark.parametrize(("n", "c"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_draws_of_discrete_vectors_have_their_probabilities(n, c):
    """Shares within five standard errors, and five draws where hardly any are expected."""
    q, num = vector_of(n, c), 20_000
    draws = q.sample((num,))
    assert draws.shape == (num, n * c)
    values, _ = all_values(n, c)
    share = (draws.unsqueeze(1) == values).all(-1).double().mean(0)
    p = q.log_prob(values).exp()
    assert share.sum().item() == pytest.approx(1.0)
    assert ((share - p).abs() <= 5 * (p * (1 - p) / num).sqrt() + 5 / num).all()


@pytest.mark.parametrize(("n", "c"), [(1, 1), (1, 4), (3, 2)])
def test_mode_of_discrete_vectors(n, c):
    q = vector_of(n, c, 6)
    values, _ = all_values(n, c)
    mode = q.mode
    assert q.log_prob(mode).shape == (6,)
    if n == 1:
        best = q.log_prob(values.unsqueeze(1)).argmax(0)
        assert torch.equal(mode, values[best])
    else:  # greedy: the first variable alone
        first = torch.nn.functional.one_hot(q.logits[:, 0].argmax(-1), c).double()
        assert torch.equal(mode[:, :c], first)


def test_enumeration_and_expansion():
    binary, classes = vector_of(1, 1, 2), vector_of(1, 3, 2)
    assert binary.enumerate_support().tolist() == [[[0.0], [0.0]], [[1.0], [1.0]]]
    assert classes.enumerate_support(expand=False).shape == (3, 1, 3)
    assert classes.enumerate_support().shape == (3, 2, 3)
    torch.testing.assert_close(classes.log_prob(classes.enumerate_support()).exp().sum(0), torch.ones(2))
    several = vector_of(3, 2, 2)
    wide = several.expand((4, 2))
    assert wide.batch_shape == (4, 2)
    value = wide.sample()
    torch.testing.assert_close(wide.log_prob(value), several.log_prob(value))
    assert not several.has_enumerate_support
    assert not several.has_rsample


# ---------------------------------------------------------------- discrete sites


def discrete_site(fn):
    encoding = DiscreteEncoding.of(fn, fn.sample().dtype)
    return LatentSite("k", torch.Size(fn.event_shape), torch.Size([encoding.size]), fn.support, encoding)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Bernoulli(0.5),
        dist.Categorical(torch.ones(3)),
        dist.Binomial(2, 0.5),
        dist.OneHotCategorical(torch.ones(3)),
        dist.Categorical(torch.ones(2, 3)).to_event(1),
        dist.Bernoulli(torch.full((2, 2), 0.5)).to_event(2),
    ],
    ids=lambda fn: f"{type(fn).__name__}{tuple(fn.event_shape)}",
)
def test_values_of_discrete_sites(fn):
    """Probabilities are those of the vectors, whatever form the values have."""
    site = discrete_site(fn)
    encoding = site.encoding
    base = vector_of(encoding.num_elements, encoding.num_classes, 5)
    q, flat_of = site_distribution(site, base, fn.support, analytic_kl=True)
    assert isinstance(q, DiscreteDistribution)
    value = q.sample((7,))
    assert value.shape == (7, 5, *fn.event_shape)
    assert value.dtype == fn.sample().dtype
    assert q.support.check(value).all()
    torch.testing.assert_close(q.log_prob(value), base.log_prob(flat_of(value)))
    assert torch.equal(q.centre(), encoding.decode(base.mode))
    assert q.expand((5,)) is q
    assert q.expand((3, 5)).sample().shape == (3, 5, *fn.event_shape)
    if q.has_enumerate_support:
        everything = q.enumerate_support()
        torch.testing.assert_close(q.log_prob(everything).exp().sum(0), torch.ones(5))
        assert torch.equal(everything[:, 0], fn.enumerate_support())


def test_vectors_of_discrete_sites_have_the_type_that_is_asked_for():
    site = discrete_site(dist.Categorical(torch.ones(3)))
    base = vector_of(1, 3)
    _, flat_of = site_distribution(site, base, site.support, analytic_kl=False, dtype=torch.float32)
    assert flat_of(torch.tensor(1)).dtype == torch.float32


# ---------------------------------------------------------------- the choice


def site_of(name):
    support, event_shape, shape = SUPPORTS[name]
    return LatentSite(name, torch.Size(event_shape), torch.Size(shape), support)


def test_what_is_emitted_where_a_kl_may_be_analytic():
    number, vector = ScalarNormal(dist.Normal(torch.zeros(5), 1.0)), base_of(3, 5)
    real = site_of("real")
    q, flat_of = site_distribution(real, number, real.support, analytic_kl=True)
    assert q is number.normal
    assert flat_of(torch.zeros(5)).shape == (5, 1)
    q, flat_of = site_distribution(real, number, real.support, analytic_kl=False)
    assert isinstance(q, SampledNormal)
    assert flat_of(torch.zeros(5)).shape == (5, 1)
    three = site_of("vector")
    q, flat_of = site_distribution(three, vector, three.support, analytic_kl=True)
    assert q is vector
    value = torch.zeros(5, 3)
    assert flat_of(value) is value
    q, _ = site_distribution(three, vector, three.support, analytic_kl=False)
    assert isinstance(q, FactorDistribution)
    for name in ("positive", "interval"):  # a bijection: the formula would be that of other variables
        site = site_of(name)
        assert isinstance(
            site_distribution(site, number, site.support, analytic_kl=True)[0], FactorDistribution
        )


def test_the_support_is_that_of_the_call():
    site, base = site_of("interval"), base_of(1, 5)
    tops = torch.linspace(1.0, 9.0, 5)
    q, flat_of = site_distribution(site, base, constraints.interval(-1.0, tops), analytic_kl=False)
    value = q.rsample((100,))
    assert ((value > -1) & (value < tops)).all()
    assert (value[:, 4] > 3).any()  # beyond the bound at set-up
    torch.testing.assert_close(
        flat_of(value.clone())[..., 0], ((value + 1) / (tops - value)).log(), atol=1e-6, rtol=1e-6
    )
    q, _ = site_distribution(site, base, site.support, analytic_kl=False)
    assert q.transform is site.transform


def test_refusals_name_the_site():
    site = discrete_site(dist.Categorical(torch.ones(3)))
    with pytest.raises(GraphflowsError, match=r"the values of 'k' to be as .*\(3 classes\); this call has"):
        site_distribution(site, vector_of(1, 3), constraints.integer_interval(0, 3), analytic_kl=False)
    real = site_of("vector")
    with pytest.raises(
        GraphflowsError, match=r"a factor of 'vector' .* event shape \(3,\), .*; got \(\) \(Normal\)"
    ):
        site_distribution(real, dist.Normal(torch.zeros(5, 3), 1.0), real.support, analytic_kl=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prior", [dist.LogNormal(0.0, 1.0), dist.HalfNormal(torch.ones(2)).to_event(1)])
def test_positive_values_stay_positive_and_finite_however_far_out(prior, dtype):
    transform = torch.distributions.biject_to(prior.support)
    shape = prior.event_shape
    for loc in (-2e3, 2e3):
        base = dist.Normal(torch.full((max(shape.numel(), 1),), loc, dtype=dtype), 1.0).to_event(1)
        factor = FactorDistribution(base, transform, shape, shape, prior.support)
        value = factor.rsample()
        assert value.dtype == dtype
        assert bool(((value > 0) & torch.isfinite(value)).all())
        flat = factor.unconstrained(value)  # the vector drawn, in which the density is
        torch.testing.assert_close(factor.log_prob(value), base.log_prob(flat) - flat.sum())
