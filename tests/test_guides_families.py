"""Families are objects: their options, what they refuse, and what a family of a user's needs."""

import pickle
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from toy_family import Logistic, LogisticFamily

import pyro_graphflows
from pyro_graphflows import auto_faithful_guide, log_evidence
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides import AutoFaithfulGuide, Factor, Flow, Normal, NormalFactor, Spline
from pyro_graphflows.guides.compile import FAMILIES, make_family
from pyro_graphflows.testing import check_family


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def two_latents(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        u = pyro.sample("u", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(u, 1.0), obs=x)


def with_a_class(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        z = pyro.sample("z", dist.Normal(3.0 * k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class TwoNumbers(Factor):
    """Location and log-scale of each entry."""

    @property
    def num_outputs(self):
        return 2 * self.size

    def linear_start(self, weights, loc, scale_tril):
        rows = weights.new_zeros(self.num_outputs, weights.shape[-1])
        rows[: self.size] = weights
        return rows, torch.cat([loc, scale_tril.diagonal().log()])

    def numbers(self, outputs, shift, scale):
        a, b = outputs.split(self.size, -1)
        return shift + scale * a, scale * b.exp()


class Student(TwoNumbers):
    def distribution(self, outputs, shift, scale):
        return dist.StudentT(4.0, *self.numbers(outputs, shift, scale)).to_event(1)


class Skew(TwoNumbers):
    def distribution(self, outputs, shift, scale):
        loc, width = self.numbers(outputs, shift, scale)
        return dist.AsymmetricLaplace(loc, width, torch.tensor(5.0)).to_event(1)


class Mixture(TwoNumbers):
    def distribution(self, outputs, shift, scale):
        loc, width = self.numbers(outputs, shift, scale)
        parts = dist.Normal(loc.unsqueeze(-1) + torch.tensor([-1.0, 1.0]), width.unsqueeze(-1))
        shares = dist.Categorical(torch.ones(*loc.shape, 2))
        return dist.MixtureSameFamily(shares, parts).to_event(1)


class LaplaceFactor(TwoNumbers):
    def distribution(self, outputs, shift, scale):
        return dist.Laplace(*self.numbers(outputs, shift, scale)).to_event(1)


class NormalOfTheUser(TwoNumbers):
    def distribution(self, outputs, shift, scale):
        return dist.Normal(*self.numbers(outputs, shift, scale)).to_event(1)


class WithoutEvent(TwoNumbers):
    def distribution(self, outputs, shift, scale):
        return dist.Normal(*self.numbers(outputs, shift, scale))


# ---------------------------------------------------------------- the contract

CONTRACT = {
    "normal": (Normal(), True),
    "linear normal": (Normal(hidden_dims=[]), True),
    "deep normal": (Normal(hidden_dims=[24, 24], activation="tanh"), True),
    "student": (Normal(factor=Student), False),
    "spline": (Spline(), True),
    "logistic spline": (Spline(num_bins=3, base="logistic"), False),
    "student spline": (Spline(base="student", df=5.0), False),
    "flow": (Flow(num_blocks=2, units_per_variable=4), True),
    "affine flow": (Flow(units_per_variable=0, conditioner_units=0), True),
    "density flow": (Flow(closed_form="density", units_per_variable=4), True),
    "graphical": (Flow(form="graphical", units_per_variable=4), True),
    "toy": (LogisticFamily(), False),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_every_family_keeps_the_contract(name):
    family, gaussian = CONTRACT[name]
    check_family(family, gaussian=gaussian)


def test_the_contract_check_finds_what_is_wrong():
    class Deaf(LogisticFamily):
        def conditionals(self, spec):
            module = super().conditionals(spec)
            module.mask[-1] = 0.0  # c no longer follows a
            return module

    class Wide(LogisticFamily):
        def conditionals(self, spec):
            module = super().conditionals(spec)
            module.set_linear_ = lambda site, linear: False
            return module

    with pytest.raises(AssertionError, match="'c' to follow a value of its parent"):
        check_family(Deaf(), gaussian=False)
    with pytest.raises(AssertionError, match="'a' to become linear"):
        check_family(Wide(), gaussian=False)
    with pytest.raises(AssertionError, match="Expected the linear normal at 'a'"):
        check_family(LogisticFamily(), gaussian=True)


def test_a_family_of_a_user_serves_a_guide():
    x = torch.randn(6)
    guide = auto_faithful_guide(two_latents, x, family=LogisticFamily(), num_start_samples=2000)
    trace = poutine.trace(guide).get_trace(x)
    assert {type(trace.nodes[name]["fn"].base) for name in "zu"} == {Logistic}
    # u | x has variance 2 / 3, and the start is the regression
    loc, scale = trace.nodes["u"]["fn"].base.loc, trace.nodes["u"]["fn"].base.scale
    torch.testing.assert_close(loc.detach()[:, 0], 2 * x / 3, atol=0.1, rtol=0.0)
    assert scale.mean().item() == pytest.approx((2 / 3) ** 0.5 * 3**0.5 / torch.pi, rel=0.1)
    svi = SVI(
        two_latents,
        guide,
        pyro.optim.Adam({"lr": 1e-3}),
        Trace_ELBO(10, vectorize_particles=True, max_plate_nesting=1),
    )
    losses = [svi.step(x) for _ in range(20)]
    assert all(loss == loss for loss in losses)
    mixed = auto_faithful_guide(with_a_class, x, family=LogisticFamily(), num_start_samples=500)
    assert mixed(x)["k"].dtype == torch.long


# ---------------------------------------------------------------- a user's factor is emitted as it is


@pytest.mark.parametrize("factor", [Student, Skew, Mixture, LaplaceFactor, NormalOfTheUser])
def test_a_factor_of_a_user_has_the_density_of_the_user(factor):
    x = 50.0 + torch.randn(5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(50.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = auto_faithful_guide(model, x, family=factor)
    conditional = guide.blocks[0].begin(guide._read((x,), {}, None), {}).next()["z"]
    trace = poutine.trace(guide).get_trace(x)
    for value in (trace.nodes["z"]["value"], torch.linspace(48.0, 52.0, 5)):
        emitted = trace.nodes["z"]["fn"].log_prob(value)
        torch.testing.assert_close(emitted, conditional.log_prob(value.unsqueeze(-1)))
    assert "sampled KL" in guide.describe()
    evidence = dist.Normal(50.0, 2**0.5).log_prob(x).sum().item()
    log_weights = log_evidence(model, guide, x, num_particles=20_000)
    # the weights of a skewed factor are wide; those of the others are within a few hundredths of a nat
    assert log_weights.log_evidence.sum().item() == pytest.approx(
        evidence, abs=1.0 if factor is Skew else 0.2
    )


def test_a_factor_with_another_event_shape_is_refused_by_site_and_name():
    x = torch.randn(5)
    with pytest.raises(
        GraphflowsError, match=r"factor of 'z' whose distribution has event shape \(1,\).*to_event"
    ):
        auto_faithful_guide(local, x, family=WithoutEvent, init="random")(x)


# ---------------------------------------------------------------- options


def test_strings_abbreviate_the_defaults():
    assert make_family("normal") == Normal()
    assert make_family("flow") == Flow()
    assert make_family("spline") == Spline()
    assert set(FAMILIES) == {"auto", "normal", "spline", "flow"}
    assert make_family(Student) == Normal(factor=Student)
    assert make_family(Flow(num_blocks=2)).num_blocks == 2


def test_families_are_values():
    assert Normal(hidden_dims=[3, 4]) == Normal(hidden_dims=(3, 4))
    assert hash(Normal(hidden_dims=[3])) == hash(Normal(hidden_dims=[3]))
    assert Flow() != Flow(num_blocks=2)
    assert pickle.loads(pickle.dumps(Flow(num_blocks=2))) == Flow(num_blocks=2)
    assert repr(Normal(factor=Student)).endswith("factor=Student)")
    assert "num_blocks=5" in repr(Flow(num_blocks=5))
    with pytest.raises(AttributeError):
        Normal().skip = False


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Normal(hidden_dims=5), r"widths, \[5\]; got 5"),
        (lambda: Normal(hidden_dims=[0]), r"hidden_dims positive whole numbers; got \[0\]"),
        (lambda: Normal(units_per_set=0), "units_per_set >= 1; got 0"),
        (lambda: Normal(hidden_layers=0), "hidden_layers >= 1; got 0"),
        (lambda: Normal(activation="nonsense"), "Expected an activation among .*got 'nonsense'"),
        (lambda: Normal(factor=3), "factor= a subclass of Factor; got 3"),
        (lambda: Spline(num_bins=1), "num_bins >= 2; got 1"),
        (lambda: Spline(num_bins=1000), "num_bins from 2 to 500; got 1000"),
        (lambda: Spline(num_bins=2.5), r"num_bins a whole number; got 2\.5"),
        (lambda: Spline(num_bins="8"), "num_bins a whole number; got '8'"),
        (lambda: Spline(bound="wide"), "positive, finite bound; got 'wide'"),
        (lambda: Flow(fusion=True), r"fusion='auto' or False with Flow.*Spline\(fusion=True\)"),
        (lambda: Spline(bound=0.0), "positive, finite bound; got 0.0"),
        (lambda: Spline(base="cauchy"), "base among normal, student, logistic; got 'cauchy'"),
        (lambda: Spline(df=-1.0), "degrees of freedom; got -1.0"),
        (lambda: Flow(form="planar"), "form='faithful' or 'graphical'; got 'planar'"),
        (lambda: Flow(closed_form="both"), "closed_form 'sampling' or 'density'; got 'both'"),
        (lambda: Flow(num_blocks=0), "num_blocks >= 1; got 0"),
        (lambda: Flow(hidden_dims=[]), "hidden_dims with at least one width"),
        (lambda: Flow(lipschitz=1.0), "0 < lipschitz < 1; got 1.0"),
        (lambda: Flow(conditioner_units=-1), "conditioner_units >= 0"),
        (lambda: Flow(masked=Flow()), r"masked= a Normal\(...\)"),
        (
            lambda: make_family("gaussian"),
            "Expected family= 'auto', 'normal', 'spline', 'flow', a family object.*got 'gaussian'",
        ),
        (lambda: make_family(Flow), r"Did you mean Flow\(\)\?"),
    ],
)
def test_wrong_values_are_refused_where_they_are_written(make, match):
    with pytest.raises(GraphflowsError, match=match):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Normal(num_blocks=3),
        lambda: Flow(units_per_set=4),
        lambda: Flow(skip=False),
        lambda: auto_faithful_guide(local, family="flow", num_blocks=3),
        lambda: auto_faithful_guide(local, family="flow", factor=Student),
        lambda: auto_faithful_guide(local, hidden_dims=[8]),
        lambda: AutoFaithfulGuide(local, units_per_set=4),
    ],
)
def test_a_wrong_name_is_a_type_error(make):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        make()


def test_factors_name_what_there_is():
    x = torch.zeros(3)
    with pytest.raises(GraphflowsError, match="factors= of latent sites, z; got q"):
        auto_faithful_guide(local, x, factors={"q": NormalFactor})
    with pytest.raises(
        GraphflowsError, match=r"serves discrete sites, .* for 'k' \(2 classes\).*Continuous sites: z"
    ):
        auto_faithful_guide(with_a_class, x, factors={"k": Flow()})
    with pytest.raises(GraphflowsError, match="or family object}; got 'flow' for 'z'"):
        auto_faithful_guide(local, x, factors={"z": "flow"})


def test_single_sites_have_families_of_their_own():
    x = torch.randn(4)
    guide = auto_faithful_guide(
        two_latents, x, factors={"z": Flow(units_per_variable=4)}, num_start_samples=200
    )
    kinds = {site: type(guide.block_of(site).conditionals).__name__ for site in "zu"}
    assert kinds == {"z": "FlowConditionals", "u": "MaskedConditionals"}
    same = auto_faithful_guide(
        two_latents, x, factors={"z": Normal(), "u": LaplaceFactor}, num_start_samples=200
    )
    assert len(same.blocks) == 1  # an equal family shares the block


def test_networks_of_a_flow_guide_for_discrete_sites_have_widths():
    x = torch.randn(4)
    number = {}
    for units in (4, 64):
        family = Flow(masked=Normal(units_per_set=units))
        guide = auto_faithful_guide(with_a_class, x, family=family, num_start_samples=200)
        number[units] = sum(p.numel() for p in guide.block_of("k").conditionals.parameters())
    assert number[64] > 4 * number[4]


def test_there_is_one_guide_class():
    guide = AutoFaithfulGuide(local, family="flow").setup(torch.zeros(3))
    assert guide(torch.zeros(5))["z"].shape == (5,)
    assert type(auto_faithful_guide(local)) is AutoFaithfulGuide
    assert guide.family == Flow()
    assert not hasattr(pyro_graphflows, "AutoFaithfulNormal")


@pytest.mark.slow
def test_mypy_finds_a_wrong_option_in_a_script(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(
        "from pyro_graphflows import Flow, Normal, auto_faithful_guide\n"
        "def model() -> None: ...\n"
        "auto_faithful_guide(model, family=Flow(num_blocks=3))\n"
        "auto_faithful_guide(model, family=Normal(num_blocks=3))\n"
        "auto_faithful_guide(model, familly='flow')\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            "--ignore-missing-imports",
            str(script),
        ],
        capture_output=True,
        text=True,
    )
    wrong = [line for line in done.stdout.splitlines() if "error:" in line]
    assert [line.split(":")[1] for line in wrong] == ["4", "5"], done.stdout
