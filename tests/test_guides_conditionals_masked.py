"""Conditionals by one masked network: who depends on whom, levels, units, and the members that are known exactly."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides import Normal, Spline
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.conditionals.contract import BlockSpec, LinearConditional
from pyro_graphflows.guides.conditionals.distributions import ScalarNormal
from pyro_graphflows.guides.plan import BlockPlan, Conditioning
from pyro_graphflows.guides.sites import DiscreteEncoding, LatentSite, SitePrior
from pyro_graphflows.regression import Moments

CONTEXT = {"x": 2, "y": 1}
SIZES = {"a": 1, "b": 1, "c": 3, "k": 3, "d": 2}
LEVELS = (("a", "b"), ("c", "k"), ("d",))
PARENTS = {"a": ("x",), "b": ("y",), "c": ("a",), "k": ("x", "b"), "d": ("y", "a", "k")}

FAMILIES = {
    "normal": Normal(),
    "wide": Normal(hidden_dims=[7, 5]),
    "linear": Normal(hidden_dims=[]),
    "without skip": Normal(skip=False),
    "spline": Spline(num_bins=2),
}


def site_of(name, size):
    if name == "k":
        fn = dist.Categorical(torch.ones(size))
        encoding = DiscreteEncoding.of(fn, torch.long)
        return LatentSite(name, torch.Size(), torch.Size([size]), fn.support, encoding)
    return LatentSite(name, torch.Size([size]), torch.Size([size]), constraints.real_vector)


def spec_of(levels=LEVELS, parents=PARENTS, sizes=SIZES, context=CONTEXT, plates=(), more=None, **options):
    block = BlockPlan(
        tuple(plate.name for plate in plates),
        levels,
        tuple(Conditioning(name, "same") for name in context),
        parents,
        **(more or {}),
    )
    sites = {name: site_of(name, size) for name, size in sizes.items()}
    return BlockSpec(block, context, sites, plates, **options)


def stirred(conditionals):
    with torch.no_grad():
        for parameter in conditionals.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return conditionals


def values_of(*batch, sizes=SIZES):
    values = {name: torch.randn(*batch, size) for name, size in sizes.items()}
    if "k" in sizes:
        values["k"] = torch.eye(3)[torch.randint(3, batch)]
    return values


def run(conditionals, context, values, plates=None):
    """Return the distribution of each site, where the sites above it have given values."""
    found, evaluation = {}, conditionals.begin(context, plates)
    for level in conditionals.block.levels:
        distributions = evaluation.next()
        assert tuple(distributions) == level
        found.update(distributions)
        evaluation.accept({site: values[site] for site in level})
    return found


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("family", FAMILIES)
def test_densities_depend_on_parents_and_on_nothing_else(family):
    """The Jacobian of each site's density at fixed values: exactly zero off its parents, not zero on them."""
    conditionals = stirred(FAMILIES[family].conditionals(spec_of()))
    points, names = values_of(6), [*CONTEXT, *SIZES]
    widths = {**CONTEXT, **SIZES}

    def densities(*inputs):
        given = dict(zip(names, inputs, strict=True))
        context = torch.cat([given[name] for name in CONTEXT], -1)
        above = {name: given[name].expand(6, -1) for name in SIZES}
        found = run(conditionals, context.expand(6, -1), above)
        return torch.stack([found[site].log_prob(points[site]) for site in SIZES])

    given = {name: torch.randn(width) for name, width in widths.items()}
    jacobian = torch.autograd.functional.jacobian(densities, tuple(given.values()))
    for name, slopes in zip(names, jacobian, strict=True):  # (sites, points, width)
        for site, slope in zip(SIZES, slopes, strict=True):
            if name in PARENTS[site]:
                assert (slope.abs().sum(0) > 0).all(), (name, site)
            else:
                assert not slope.any(), (name, site)


def test_elements_with_parents_of_their_own():
    """The location of each element sees the entries that it may see; an index of -1 is the whole node."""
    looks = [[("x", 0)], [("x", 1), ("a", -1)], [("y", 0), ("x", 0)]]
    spec = spec_of(
        (("a",), ("c",)),
        {"a": ("y",), "c": ("x", "y", "a")},
        {"a": 2, "c": 3},
        element_parents={"c": looks},
    )
    conditionals = stirred(Normal().conditionals(spec))

    def locations(context, a):
        return run(conditionals, context, {"a": a, "c": torch.zeros(3)})["c"].mean

    of_context, of_a = torch.autograd.functional.jacobian(locations, (torch.randn(3), torch.randn(2)))
    assert (of_context != 0).tolist() == [[True, False, False], [False, True, False], [True, False, True]]
    assert (of_a != 0).tolist() == [[False, False], [True, True], [False, False]]


def test_elements_that_look_at_earlier_ones():
    """With elements in a chain, the last location depends on all parents of the chain, the first on its own alone."""
    looks = [[("x", 0)], [("c", 0), ("x", 1)], [("c", 1), ("y", 0)]]
    spec = spec_of((("c",),), {"c": ("x", "y")}, {"c": 3}, element_parents={"c": looks})
    conditionals = stirred(Normal().conditionals(spec))
    (found,) = torch.autograd.functional.jacobian(
        lambda context: run(conditionals, context, {"c": torch.zeros(3)})["c"].mean, (torch.randn(3),)
    )
    assert (found != 0).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    q = run(conditionals, torch.randn(3), {"c": torch.zeros(3)})["c"]
    assert q.precision_matrix[0, 2].abs() < 1e-10


# ---------------------------------------------------------------- levels


def test_columns_and_what_is_where():
    conditionals = Normal().conditionals(spec_of())
    assert list(conditionals.columns) == ["x", "y", "a", "b", "c", "k", "d"]
    assert conditionals.columns["c"] == range(5, 8)
    assert (conditionals.num_features, conditionals.num_columns) == (3, 13)
    assert conditionals.inputs_of("d") == [2, 3, 8, 9, 10]


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_each_level(family):
    conditionals = FAMILIES[family].conditionals(spec_of())
    values = values_of(4, 5)
    found = run(conditionals, torch.randn(4, 5, 3), values)
    for site, size in SIZES.items():
        assert (found[site].batch_shape, found[site].event_shape) == ((4, 5), (size,))
        assert found[site].log_prob(values[site]).shape == (4, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_each_of_its_rows(family):
    conditionals = stirred(FAMILIES[family].conditionals(spec_of()))
    context, values = torch.randn(4, 3), values_of(4)
    together = run(conditionals, context, values)
    for row in range(4):
        alone = run(conditionals, context[row], {name: value[row] for name, value in values.items()})
        for site in SIZES:
            torch.testing.assert_close(
                alone[site].log_prob(values[site][row]), together[site].log_prob(values[site])[row]
            )


def test_values_of_a_level_may_have_more_draws_than_the_context():
    conditionals = stirred(Normal().conditionals(spec_of()))
    context, values = torch.randn(3), values_of(7)
    values["b"] = values["b"][0]  # beside seven values of a
    found = run(conditionals, context, values)
    assert found["a"].batch_shape == ()
    assert found["c"].batch_shape == (7,)
    every = run(conditionals, context.expand(7, -1), {**values, "b": values["b"].expand(7, -1)})
    torch.testing.assert_close(found["d"].log_prob(values["d"]), every["d"].log_prob(values["d"]))


def test_a_block_without_context():
    spec = spec_of((("a",), ("b",)), {"a": (), "b": ("a",)}, {"a": 1, "b": 1}, context={})
    conditionals = stirred(Normal().conditionals(spec))
    values = values_of(5, sizes={"a": 1, "b": 1})
    found = run(conditionals, torch.zeros(5, 0), values)
    assert found["b"].log_prob(values["b"]).shape == (5,)
    assert (found["a"].mean == found["a"].mean.flatten()[0]).all()
    assert found["b"].mean.unique().numel() == 5


# ---------------------------------------------------------------- units


@pytest.mark.parametrize("family", ["normal", "spline"])
@pytest.mark.parametrize("site", ["a", "c"])
def test_units_of_outputs_move_a_site_and_nothing_else(family, site):
    conditionals = stirred(FAMILIES[family].conditionals(spec_of()))
    context, values = torch.randn(4, 3), values_of(4)
    before = {name: q.log_prob(values[name]) for name, q in run(conditionals, context, values).items()}
    size = SIZES[site]
    shift, scale = torch.randn(size), torch.rand(size) + 0.5
    units = conditionals.input_units(site)
    conditionals.set_units_(site, (shift, scale), tuple(part.clone() for part in units))
    torch.testing.assert_close(conditionals.output_units(site), (shift, scale))
    after = run(conditionals, context, values)
    for name in SIZES:
        if name == site:  # u = shift + scale * y
            found = after[site].log_prob(shift + scale * values[site]) + scale.log().sum()
        else:
            found = after[name].log_prob(values[name])
        torch.testing.assert_close(found, before[name])


def test_units_of_inputs_move_the_children_alone():
    conditionals = stirred(Normal().conditionals(spec_of()))
    context, values = torch.randn(4, 3), values_of(4)
    before = {name: q.log_prob(values[name]) for name, q in run(conditionals, context, values).items()}
    shift, scale = torch.tensor([2.0]), torch.tensor([3.0])
    outputs = tuple(part.clone() for part in conditionals.output_units("a"))
    conditionals.set_units_("a", outputs, (shift, scale))
    torch.testing.assert_close(conditionals.input_units("a"), (shift, scale))
    moved = run(conditionals, context, {**values, "a": shift + scale * values["a"]})
    for name in SIZES:  # c and d have a for a parent
        torch.testing.assert_close(moved[name].log_prob(values[name]), before[name])
    still = run(conditionals, context, values)
    changed = {n for n in SIZES if not torch.equal(still[n].log_prob(values[n]), before[n])}
    assert changed == {"c", "d"}
    conditionals.set_units_("a", (shift, scale))  # both
    assert torch.equal(conditionals.input_units("a")[0], shift)


# ---------------------------------------------------------------- exact members

REAL = {"a": 1, "b": 2, "d": 2}
REAL_LEVELS = (("a",), ("b",), ("d",))
REAL_PARENTS = {"a": ("x",), "b": ("x", "a"), "d": ("y", "b")}


def real_spec(**options):
    return spec_of(REAL_LEVELS, REAL_PARENTS, REAL, **options)


def random_linear(site):
    size = REAL[site]
    widths = {**CONTEXT, **REAL}
    weights = {parent: torch.randn(size, widths[parent]) for parent in REAL_PARENTS[site]}
    tril = torch.randn(size, size).tril(-1) + torch.linspace(0.5, 1.5, size).diag()
    return LinearConditional(weights, torch.randn(size), tril)


@pytest.mark.parametrize("family", ["normal", "wide", "linear", "spline"])
def test_linear_conditionals_in_their_units(family):
    """Whatever the hidden layers are, each site is the given normal, of standardised parents and in its own units."""
    conditionals = stirred(FAMILIES[family].conditionals(real_spec()))
    linear = {}
    for site, size in REAL.items():
        units = [(torch.randn(size), torch.rand(size) + 0.5) for _ in range(2)]
        conditionals.set_units_(site, *units)
        linear[site] = random_linear(site)
        assert conditionals.set_linear_(site, linear[site])
    context, values = torch.randn(6, 3), values_of(6, sizes=REAL)
    given = {"x": context[:, :2], "y": context[:, 2:]}
    for site in REAL:
        shift, scale = conditionals.input_units(site)
        given[site] = (values[site] - shift) / scale
    for site, q in run(conditionals, context, values).items():
        shift, scale = conditionals.output_units(site)
        loc = linear[site].loc + sum(given[p] @ w.T for p, w in linear[site].weights.items())
        root = scale.unsqueeze(-1) * linear[site].scale_tril
        exact = dist.MultivariateNormal(shift + scale * loc, scale_tril=root)
        torch.testing.assert_close(q.log_prob(values[site]), exact.log_prob(values[site]))


def test_a_linear_conditional_without_a_parent_leaves_it_out():
    conditionals = stirred(Normal().conditionals(real_spec()))
    conditionals.set_linear_("b", LinearConditional({}, torch.tensor([1.0, 2.0]), torch.eye(2)))
    values = values_of(6, sizes=REAL)
    q = run(conditionals, torch.randn(6, 3), values)["b"]
    torch.testing.assert_close(q.mean, torch.tensor([1.0, 2.0]).expand(6, 2))


def test_what_training_acts_on_does_not_move_a_start():
    conditionals = stirred(Normal().conditionals(real_spec()))
    for site in REAL:
        conditionals.set_linear_(site, random_linear(site))
    context, values = torch.randn(6, 3), values_of(6, sizes=REAL)
    before = {site: q.log_prob(values[site]) for site, q in run(conditionals, context, values).items()}
    root = torch.randn(conditionals.num_columns, conditionals.num_columns)
    conditionals.whiten_(root @ root.T)
    for site, q in run(conditionals, context, values).items():
        torch.testing.assert_close(q.log_prob(values[site]), before[site])


def test_a_network_without_linear_maps_cannot_become_linear():
    conditionals = Normal(skip=False).conditionals(real_spec())
    with pytest.raises(GraphflowsError, match="a linear map beside its hidden layers"):
        conditionals.set_linear_("a", random_linear("a"))


def test_regressions_are_those_of_the_samples():
    """In units of outputs for all sites, with other units of inputs: the slopes are turned into these."""
    conditionals = stirred(Normal().conditionals(real_spec()))
    units = {}
    for site, size in REAL.items():
        units[site] = torch.randn(size), torch.rand(size) + 0.5
        conditionals.set_units_(site, units[site], (torch.randn(size), torch.rand(size) + 0.5))
    columns = conditionals.num_columns
    rows = torch.randn(500, columns) @ torch.randn(columns, columns) / 2
    moments = Moments(rows)
    for site in REAL:
        conditionals.regress_(site, rows, moments)
    new = torch.randn(6, columns)
    values = {
        site: units[site][0] + units[site][1] * new[:, list(conditionals.columns[site])] for site in REAL
    }
    for site, q in run(conditionals, new[:, :3], values).items():
        inputs, own = conditionals.inputs_of(site), list(conditionals.columns[site])
        fit = moments.regress(inputs, own, moments.ridge(inputs, own))
        shift, scale = units[site]
        mean = shift + scale * (fit.loc + new[:, inputs] @ fit.weights.T)
        exact = dist.MultivariateNormal(mean, scale_tril=scale.unsqueeze(-1) * fit.scale_tril)
        torch.testing.assert_close(q.log_prob(values[site]), exact.log_prob(values[site]))


def test_discrete_sites_regress_by_their_factor():
    """Log-odds that are linear in the parents: the fit has the shares of the samples, given each value of a."""
    spec = spec_of((("a",), ("k",)), {"a": (), "k": ("a",)}, {"a": 1, "k": 3}, context={})
    conditionals = stirred(Normal().conditionals(spec))
    counts = torch.tensor([[500, 300, 200], [100, 300, 600]])
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(3)).repeat_interleave(counts.flatten(), 0)
    rows = torch.cat([pairs[:, :1].double(), torch.eye(3)[pairs[:, 1]]], -1)
    conditionals.regress_("k", rows, Moments(rows))
    a = torch.tensor([[0.0], [1.0]])
    q = run(conditionals, torch.zeros(2, 0), {"a": a, "k": torch.zeros(2, 3)})["k"]
    # the prior on slopes moves log-odds by less than 1 / (2,000 * 0.2)
    torch.testing.assert_close(q.logits.softmax(-1)[:, 0], counts / 1000, atol=3e-3, rtol=0)


# ---------------------------------------------------------------- elements of plates

FULL = PlateState("data", -1, 4, 4, None)
PART = PlateState("data", -1, 2, 4, torch.tensor([3, 1]))


def test_sites_with_parameters_for_each_element():
    spec = spec_of(
        (("a",), ("b",)), {"a": (), "b": ("a",)}, {"a": 1, "b": 1}, context={}, plates=(FULL,),
        more={"per_element": ("a",)},
    )  # fmt: skip
    conditionals = Normal().conditionals(spec)
    values = values_of(4, sizes={"a": 1, "b": 1})
    shared = run(conditionals, torch.zeros(4, 0), values)
    full = run(conditionals, torch.zeros(4, 0), values, {"data": FULL})
    torch.testing.assert_close(full["a"].mean, shared["a"].mean.expand(4, 1))  # zero at the start
    stirred(conditionals)
    full = run(conditionals, torch.zeros(4, 0), values, {"data": FULL})
    assert full["a"].mean.unique().numel() == 4
    half = {name: value[[3, 1]] for name, value in values.items()}
    part = run(conditionals, torch.zeros(2, 0), half, {"data": PART})
    for site in ("a", "b"):
        torch.testing.assert_close(part[site].mean, full[site].mean[[3, 1]])
    without = run(conditionals, torch.zeros(4, 0), values)
    assert without["a"].mean.unique().numel() == 1
    for site in ("a", "b"):  # a start is the same for all elements, and whole
        conditionals.set_linear_(site, LinearConditional({}, torch.tensor([1.5]), torch.tensor([[0.8]])))
    conditionals.narrow_elements_(0.25)
    narrow = run(conditionals, torch.zeros(4, 0), values, {"data": FULL})
    for site, scale in (("a", 0.2), ("b", 0.8)):
        torch.testing.assert_close(narrow[site].mean, torch.full((4, 1), 1.5))
        torch.testing.assert_close(narrow[site].normal.scale.expand(4), torch.full((4,), scale))


def test_a_linear_conditional_for_each_element():
    spec = spec_of(
        (("a",),), {"a": ("x",)}, {"a": 2}, plates=(FULL,), more={"non_exchangeable": {"a": ("data",)}}
    )
    conditionals = Normal().conditionals(spec)
    trils = torch.stack([torch.tensor([[0.5 + i, 0.0], [0.3 * i, 1.0]]) for i in range(4)])
    linear = LinearConditional({"x": torch.randn(4, 2, 2)}, torch.randn(4, 2), trils)
    assert linear.by_element
    assert conditionals.set_linear_("a", linear)
    context, value = torch.randn(4, 3), torch.randn(4, 2)
    mean = linear.loc + (linear.weights["x"] @ context[:, :2].unsqueeze(-1)).squeeze(-1)
    exact = dist.MultivariateNormal(mean, scale_tril=trils)
    q = run(conditionals, context, {"a": value}, {"data": FULL})["a"]
    torch.testing.assert_close(q.log_prob(value), exact.log_prob(value))
    part = run(conditionals, context[[3, 1]], {"a": value[[3, 1]]}, {"data": PART})["a"]
    torch.testing.assert_close(part.log_prob(value[[3, 1]]), exact.log_prob(value)[[3, 1]])
    alike = Normal().conditionals(spec_of((("a",),), {"a": ("x",)}, {"a": 2}, plates=(FULL,)))
    assert not alike.set_linear_("a", linear)  # no maps for elements


def test_starting_scale_of_a_new_network_is_of_order_one():
    """A random start is near the standard normal in standardised units: no scale is off by more than some e-folds."""
    conditionals = Normal().conditionals(spec_of())
    found = run(conditionals, torch.randn(200, 3), values_of(200))
    for site in ("a", "b"):
        assert found[site].normal.scale.log().abs().max() < 3
        assert found[site].mean.abs().max() < 3 * math.sqrt(200)


@pytest.mark.parametrize("family", ["normal", "spline"])
@pytest.mark.parametrize("fused", [False, True])
def test_moves_of_a_correlated_vector_cost_what_they_cost_in_an_independent_one(family, fused):
    """KL of two normals: half the squares of locations moved in the basis, at most that beside a prior."""
    size = 5
    sizes, parents = {"c": size}, {"c": ("x",)}
    spec = spec_of((("c",),), parents, sizes, {"x": 2}, more={"fused": {"c"}} if fused else None)
    family = Normal(fusion=fused) if family == "normal" else Spline(num_bins=2, fusion=fused)
    conditionals = family.conditionals(spec)
    root = torch.linalg.cholesky(0.999 * torch.ones(size, size) + 0.001 * torch.eye(size))
    linear = LinearConditional({"x": torch.randn(size, 2)}, torch.randn(size), 0.3 * root)
    prior = SitePrior(torch.zeros(size), torch.zeros(size))
    context = torch.randn(1, 2)

    @torch.no_grad()
    def normal():
        if fused:
            q = conditionals.begin(context).next({"c": prior})["c"]
        else:
            q = conditionals.begin(context).next()["c"]
        return dist.MultivariateNormal(q.loc[0], scale_tril=q.scale_tril.reshape(size, size))

    assert (conditionals.set_fused_ if fused else conditionals.set_linear_)("c", linear)
    start = normal()
    moves = torch.randn(size)
    with torch.no_grad():
        conditionals.network.skip.bias[:size] += moves
    unit = conditionals.network.units.unit[:size]
    divergence = float(torch.distributions.kl_divergence(normal(), start))
    expected = 0.5 * float((unit * moves).square().sum())
    assert float(unit.min()) > 0.5
    assert divergence <= expected * (1 + 1e-6)
    if fused:  # the share of the precision that is the factor's is about .9 in the widest direction
        assert divergence >= 0.5 * expected
    else:
        assert divergence == pytest.approx(expected)


def test_what_is_kept_of_units_follows_them():
    """Units changed in place, loaded into copies, or of another type are those of the next call."""
    conditionals = stirred(Normal().conditionals(spec_of()))
    context, values = torch.randn(4, 3), values_of(4)
    before = [run(conditionals, context, values) for _ in range(2)]
    torch.testing.assert_close(before[0]["c"].covariance_matrix, before[1]["c"].covariance_matrix)
    conditionals.set_units_("c", (torch.ones(3), torch.full((3,), 2.0)))
    bases = [name for name, buffer in conditionals.named_buffers() if buffer.dim() == 2 and "basis" in name]
    moved = run(conditionals, context, values)["c"]
    torch.testing.assert_close(moved.mean - 1.0, 2.0 * before[0]["c"].mean)
    torch.testing.assert_close(moved.covariance_matrix, 4.0 * before[0]["c"].covariance_matrix)
    other = Normal().conditionals(spec_of())
    run(other, context, values)
    other.load_state_dict(conditionals.state_dict())
    again = run(other.float(), context.float(), {name: value.float() for name, value in values.items()})["c"]
    assert again.mean.dtype == torch.float32
    torch.testing.assert_close(again.mean.double(), moved.mean, atol=1e-5, rtol=1e-4)
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, -0.5, 2.0]])
    (basis,) = (name for name in bases if conditionals.get_buffer(name).shape == (3, 3))
    with torch.no_grad():
        conditionals.get_buffer(basis).copy_(root)
    turned = run(conditionals, context, values)["c"]
    torch.testing.assert_close(turned.mean - 1.0, (moved.mean - 1.0) @ root.mT)


@pytest.mark.parametrize("prior", [(0.0, 1.0), (1.5, 0.4), (-3.0, 20.0)], ids=["reference", "narrow", "wide"])
@pytest.mark.parametrize("family", ["normal", "spline"])
@pytest.mark.parametrize("width", [0.5, 3.0])
def test_factors_beside_any_prior_are_what_was_set(family, width, prior):
    """Precisions are added, whether the output is the location of the factor or of its product with a prior."""
    conditionals, context, linear = scalar_beside_a_prior(family, width)
    loc, scale = prior
    got = conditionals.begin(context).next({"c": SitePrior(torch.tensor([loc]), torch.tensor([scale]).log())})
    factor = context @ linear.weights["x"].mT + linear.loc
    precision = scale**-2 + width**-2
    mean = (loc * scale**-2 + factor * width**-2) / precision
    torch.testing.assert_close(got["c"].mean, mean)
    torch.testing.assert_close(scale_of(got["c"]), torch.full_like(mean, precision**-0.5))


@pytest.mark.parametrize("family", ["normal", "spline"])
def test_the_width_of_a_wide_factor_moves_its_conditional_nowhere(family):
    """A wide factor that becomes narrow would take the conditional to its own location, ten times as far."""
    conditionals, context, _ = scalar_beside_a_prior(family, 3.0)
    prior = {"c": SitePrior(torch.zeros(1), torch.zeros(1))}
    before = conditionals.begin(context).next(prior)["c"]
    units = conditionals.network.units.unit
    assert units[0] == pytest.approx(0.9**0.5)  # the scale of the conditional
    assert 5.0 < units[1] <= 8.0  # of the logarithm of a width with a tenth of the precision
    with torch.no_grad():
        conditionals.network.skip.bias[1] -= 2.0 / units[1]
    after = conditionals.begin(context).next(prior)["c"]
    torch.testing.assert_close(after.mean, before.mean)
    torch.testing.assert_close(scale_of(after), torch.full_like(after.mean, (1 + math.exp(4) / 9) ** -0.5))
    other, _, _ = scalar_beside_a_prior(family, 0.5)
    other.load_state_dict(conditionals.state_dict())
    torch.testing.assert_close(other.begin(context).next(prior)["c"].mean, before.mean)


def scale_of(q):
    return q.normal.scale.unsqueeze(-1) if isinstance(q, ScalarNormal) else q.scale


def scalar_beside_a_prior(family, width):
    """Return conditionals of one fused number that are linear, a context for them and what was set."""
    torch.manual_seed(0)
    spec = spec_of((("c",),), {"c": ("x",)}, {"c": 1}, {"x": 2}, more={"fused": {"c"}})
    options = Normal(fusion=True) if family == "normal" else Spline(num_bins=2, fusion=True)
    conditionals = options.conditionals(spec)
    linear = LinearConditional({"x": torch.randn(1, 2)}, torch.tensor([2.0]), torch.tensor([[width]]))
    assert conditionals.set_fused_("c", linear)
    return conditionals, torch.randn(4, 2), linear
