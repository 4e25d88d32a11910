"""From a model to a plan: options as values, plans that are complete and the same each time, refusals by site."""

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_guides import mixture
from lookup_models import DISTRICT, GROUP, crossed, districts, slopes
from plated_guides import hierarchical
from toy_family import LogisticFamily

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides import DeepSet, Factor, Flow, Normal, NormalFactor, Spline, auto_faithful_guide
from pyro_graphflows.guides.compile import GuideOptions, compile_guide
from pyro_graphflows.guides.conditionals.contract import SiteRole
from pyro_graphflows.guides.description import describe
from pyro_graphflows.guides.sites import LatentSite
from pyro_graphflows.inspect import trace_model

N = dist.Normal
X = torch.linspace(-1, 1, 5, dtype=torch.float64)


class Wide(NormalFactor):
    """A factor of the user's."""


# ---------------------------------------------------------------- options


def test_defaults():
    options = GuideOptions(Normal())
    assert options.inverse == "auto"
    assert options.deepset is None
    assert options.num_rows == 10_000
    assert options.factor_classes() == {}
    assert options == GuideOptions(Normal())
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.init = "random"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"init": "zero"},
            "Expected init= one of 'auto', 'regression', 'mode', 'prior', 'random'; got 'zero'",
        ),
        ({"num_start_samples": 0}, "Expected num_start_samples >= 1, a whole number; got 0"),
        ({"num_start_samples": 2.5}, "Expected num_start_samples >= 1, a whole number; got 2.5"),
        ({"setup_seed": "a"}, "Expected setup_seed >= 0, a whole number; got 'a'"),
        ({"resolution": "pixel"}, "Expected resolution='auto', 'site' or 'element'; got 'pixel'"),
        (
            {"pool": "mean"},
            "Expected pool='deepset', 'attention', a DeepSet, an Attention or None; got 'mean'",
        ),
        ({"coupled_rank": -1}, "Expected coupled_rank >= 0 or None; got -1"),
        (
            {"family": Normal(skip=False), "init": "regression"},
            r"Expected skip=True with init='regression'.*; got Normal\(.*skip=False",
        ),
        ({"factors": {"z": "normal"}}, "Expected factors=.*; got 'normal' for 'z'"),
        ({"factors": {"z": int}}, "Expected factors=.*; got <class 'int'> for 'z'"),
        ({"factors": {"z": NormalFactor(1)}}, "Expected factors=.* for 'z'"),
        (
            {"family": Spline(), "resolution": "element"},
            "Expected a family that can give each element parents",
        ),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(GraphflowsError, match=message):
        GuideOptions(**{"family": Normal(), **values})


def test_what_options_say():
    mine = DeepSet(embedding_dim=3)
    assert GuideOptions(Normal(), pool="deepset").deepset == DeepSet()
    assert GuideOptions(Normal(), pool=mine).deepset is mine
    assert GuideOptions(Normal(), num_start_samples=7).num_rows == 7
    assert GuideOptions(Normal(), init="random").num_rows == 10_000  # for the standardisation
    assert GuideOptions(Normal(), init="random", standardize=False).num_rows == 0
    assert GuideOptions(Normal(skip=False), init="random").family == Normal(skip=False)
    own = GuideOptions(Normal(), factors={"z": Wide, "u": Flow()})
    assert own.factor_classes() == {"z": Wide}


def test_families_of_sites():
    site = LatentSite("z", torch.Size(), torch.Size(), dist.constraints.real)
    other = dataclasses.replace(site, name="u")
    flow = Flow(masked=Normal(hidden_dims=[3]))
    options = GuideOptions(flow, factors={"u": Spline(), "z": Wide})
    assert options.family_of(SiteRole(other)) == Spline()
    assert options.family_of(SiteRole(dataclasses.replace(site, name="w"))) == flow
    assert options.family_of(SiteRole(site, factor=Wide)) == flow.masked  # a flow has no factors
    assert options.family_of(SiteRole(dataclasses.replace(site, name="w"), coupled=True)) == flow.masked


# ---------------------------------------------------------------- plans


def chain(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", N(0.0, 1.0))
        b = pyro.sample("b", N(a, 1.0))
        c = pyro.sample("c", dist.LogNormal(b, 1.0))
        pyro.sample("x", N(c, 1.0), obs=x)


def moving(x):
    low = pyro.sample("low", N(0.0, 1.0))
    z = pyro.sample("z", dist.Uniform(low, low + 2.0))
    pyro.sample("x", N(z, 1.0), obs=x)


def total(x):
    with pyro.plate("data", 3):
        z = pyro.sample("z", N(0.0, 1.0))
    pyro.sample("x", N(z.sum(-1), 0.1), obs=x)


def wide(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", N(z[..., 0], 1.0), obs=x)


SLOPES = GROUP, torch.linspace(-1, 1, 7), torch.linspace(-2, 1, 7)
PUPILS = GROUP, DISTRICT, torch.linspace(-2, 1, 7)
CROSS = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0, 0, 1, 1, 2, 2]), torch.linspace(-1, 1, 6)

# name: model, arguments, options
CASES = {
    "chain": (chain, (X,), {}),
    "chain, reverse": (chain, (X,), {"inverse": "reverse"}),
    "per-element": (hierarchical, (X,), {}),
    "pooled": (hierarchical, (X,), {"pool": "deepset"}),
    "looked up": (slopes, SLOPES, {}),
    "pooled by index": (slopes, SLOPES, {"pool": DeepSet(embedding_dim=2)}),
    "groups of groups": (districts, PUPILS, {"pool": "deepset"}),
    "crossed": (crossed, CROSS, {}),
    "moving support": (moving, (X[0],), {"inverse": "reverse"}),
    "coupled": (total, (X[0],), {}),
    "elements": (wide, (X,), {"resolution": "element"}),
    "flow": (chain, (X,), {"family": Flow(), "factors": {"a": Normal()}}),
}


def compiled_of(model, args, options):
    return compile_guide(
        model, args, {}, GuideOptions(**{"family": Normal(), "num_start_samples": 500, **options})
    )


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_complete_and_the_same_each_time(case):
    compiled = compiled_of(*CASES[case])
    plan, latent = compiled.plan, compiled.traced.graph.latent
    with pyro.poutine.seed(rng_seed=5):
        again = compiled_of(*CASES[case])
    assert again.plan == plan
    assert describe(again.plan) == describe(plan)
    assert again.families == compiled.families
    assert again.element_parents == compiled.element_parents
    sampled = [site for block in plan.blocks for site in block.sites]
    assert sorted(sampled) == sorted(latent) == sorted(compiled.sites) == sorted(compiled.families)
    assert set(plan.analytic_kl) == set(latent)
    assert set(compiled.plates) >= {name for block in plan.blocks for name in block.plates}
    for block in plan.blocks:  # every parent is sampled before, or is data, or a summary
        before = set(sampled[: sampled.index(block.sites[0])])
        for depth, level in enumerate(block.levels):
            earlier = {site for each in block.levels[:depth] for site in each}
            for site in level:
                for parent in block.parents[site]:
                    assert parent not in latent or parent in before | earlier
        assert {node.name for node in block.context if node.summary is None} <= before | set(
            compiled.reader.observed + compiled.reader.inputs
        )
    words = describe(plan)
    assert all(f": {site} | " in words for site in latent)


def test_a_plan_stays_while_its_guide_is_called_and_trained():
    guide = auto_faithful_guide(hierarchical, X, pool="deepset", num_start_samples=100)
    plan, words = dataclasses.replace(guide.plan), guide.describe()
    svi = pyro.infer.SVI(hierarchical, guide, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
    svi.step(X)
    guide(X + 1)
    assert guide.plan == plan
    assert guide.describe() == words
    assert guide.plan.blocks == plan.blocks


def test_what_the_plan_of_a_case_says():
    looked_up = compiled_of(*CASES["pooled by index"]).plan
    assert any(way == "pooled by group" for way in looked_up.ways.values())
    assert compiled_of(*CASES["moving support"]).plan.changing == {"z": ("low",)}
    assert set(compiled_of(*CASES["coupled"]).plan.inputs.coupled) == {"z"}
    per_element = compiled_of(*CASES["per-element"]).plan
    assert per_element.inputs.per_element == {"mu"}
    assert "pool='deepset' amortises them" in describe(per_element)
    assert compiled_of(*CASES["pooled"]).plan.hints == ()


def test_where_a_kl_is_analytic():
    """Real sites with a normal factor whose model parents the guide does not sample below them."""
    reverse = compiled_of(chain, (X,), {"inverse": "reverse"}).plan.analytic_kl
    assert reverse == {"a": True, "b": True, "c": False}  # a log-normal has a bijection
    forward = compiled_of(chain, (X,), {"inverse": "forward"}).plan.analytic_kl
    assert forward == {"a": True, "b": False, "c": False}  # a is sampled after b
    for options in (
        {"family": Flow()},
        {"family": Normal(factor=Wide)},
        {"factors": {"a": Wide, "b": Spline()}},
    ):
        found = compiled_of(chain, (X,), {"inverse": "reverse", **options}).plan.analytic_kl
        assert not any(found.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("parent", "bound"),
    [
        (dist.Bernoulli(0.5), lambda k: 1.0 + k),
        (dist.Categorical(torch.tensor([0.9, 0.05, 0.05])), lambda k: 1.0 + (k == 2)),
        (dist.OneHotCategorical(torch.tensor([0.9, 0.1])), lambda k: 1.0 + k[..., 1]),
        (dist.Bernoulli(torch.full((2,), 0.1)).to_event(1), lambda k: 1.0 + k.sum(-1)),
        (dist.Binomial(100, 0.01), lambda k: 1.0 + (k == 100)),
    ],
)  # fmt: skip
def test_supports_that_change_with_discrete_sites_are_found_at_any_seed(parent, bound, seed):
    """The value at set-up may be the one with which all else is compared: then another must show it."""

    def model(x):
        k = pyro.sample("k", parent)
        z = pyro.sample("z", dist.Uniform(0.0, bound(k)))
        pyro.sample("x", N(z, 1.0), obs=x)

    plan = compiled_of(model, (X[0],), {"setup_seed": seed}).plan
    assert plan.changing == {"z": ("k",)}


# ---------------------------------------------------------------- refusals


def nothing_latent(x):
    pyro.sample("x", N(0.0, 1.0), obs=x)


def only_marginalised(x):
    k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    pyro.sample("x", N(k, 1.0), obs=x)


def counts(x):
    n = pyro.sample("n", dist.Poisson(3.0))
    pyro.sample("x", N(n, 1.0), obs=x)


def with_an_index(index, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", N(0.0, 1.0))
        pyro.sample("x", N(z * index, 1.0), obs=x)


def classes_that_come_and_go(x):
    b = pyro.sample("b", dist.Bernoulli(0.5))
    n = pyro.sample("n", dist.Binomial(2 + b, 0.5))
    pyro.sample("x", N(n, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "args", "options", "error", "message"),
    [
        (nothing_latent, (X[0],), {}, UnsupportedModelError, "a model with latent sites; all its sites are observed:"),
        (only_marginalised, (X[0],), {}, UnsupportedModelError, "latent sites.* or enumerated by the model: a guide"),
        (counts, (X[0],), {}, UnsupportedModelError, "site 'n' is Poisson"),
        (chain, (X,), {"factors": {"q": Wide}}, GraphflowsError, "factors= of latent sites, a, b, c; got q"),
        (
            mixture, (X,), {"factors": {"k": Flow()}}, GraphflowsError,
            r"serves discrete sites, as Normal\(\) does, for 'k' \(.*\); got Flow. Continuous sites: z",
        ),
        (
            mixture, (X,), {"factors": {"k": LogisticFamily()}}, GraphflowsError,
            r"for 'k' \(.*\); got LogisticFamily",
        ),
        (
            with_an_index, (torch.arange(5), X), {}, UnsupportedModelError,
            "covariates of floating point; .* condition on some: index for z",
        ),
        (
            classes_that_come_and_go, (X[0],), {}, UnsupportedModelError,
            "the same values at every call; those of 'n' depend on b",
        ),
        (
            moving, (X[0],), {"inverse": ["low", "z"]}, UnsupportedModelError,
            r"'z' to be sampled after low, .*; the inverse .* samples it before. Use inverse='reverse'",
        ),
        (mixture, (X,), {"enumerate_sites": ["z"]}, UnsupportedModelError, "'z' is no discrete latent site"),
        (chain, (X,), {"inverse": "fastest"}, GraphflowsError, "fastest"),
        (chain, (X,), {"inverse": ["a", "b"]}, GraphflowsError, "c"),
    ],
)  # fmt: skip
def test_refusals_name_the_site(model, args, options, error, message):
    with pytest.raises(error, match=message):
        compiled_of(model, args, options)


def test_a_factor_of_the_users_admits_counts():
    class Counts(Factor):
        num_outputs = 1

        def distribution(self, outputs, shift, scale):
            return dist.Poisson(outputs.exp()).to_event(1)

        def linear_start(self, weights, loc, scale_tril):
            return weights, loc

    compiled = compiled_of(counts, (X[0],), {"factors": {"n": Counts}})
    assert compiled.plan.labels == {"n": "counts, score function"}
    assert compiled.plan.analytic_kl == {"n": False}


def test_the_trace_is_that_of_the_call():
    compiled = compiled_of(chain, (X,), {})
    assert compiled.traced.graph == trace_model(chain, (X,), {}).graph
    assert compiled.plates["data"].size == 5
    assert compiled.reader.read(chain, (X,), {}).plates == compiled.plates


@pytest.mark.parametrize("options", [{"factors": "normal"}, {"init_values": 0.5}, {"factors": [Normal()]}])
def test_options_by_site_without_sites_are_refused(options):
    def model(x):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    (name,) = options
    with pytest.raises(GraphflowsError, match=rf"Expected {name}=\{{site: .*\}}; got"):
        auto_faithful_guide(model, torch.tensor(0.0), **options)
