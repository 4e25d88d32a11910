"""Which losses are safe with which guides, and what is said of those that are not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.guides.checks import check_guide
from pyro_graphflows.infer import IWAE_ELBO


def local(x, size=None):
    with pyro.plate("data", size or len(x), subsample_size=len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def hierarchical(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.fixture
def x():
    return torch.randn(4)


@pytest.mark.parametrize(
    "loss", [Trace_ELBO(), TraceMeanField_ELBO, RenyiELBO(num_particles=2), TraceEnum_ELBO]
)
def test_local_latents_are_safe_with_each_elbo(x, loss):
    check = check_guide(local, auto_faithful_guide(local, x), loss, x)
    assert check.safe, str(check)
    assert check.reasons == ()
    assert str(check).startswith("Safe.")


def test_renyi_needs_full_data(x):
    assert check_guide(hierarchical, auto_faithful_guide(hierarchical, x), RenyiELBO, x).safe
    check = check_guide(local, auto_faithful_guide(local, x, 10), RenyiELBO, x, 10)
    assert "subsampled plate 'data' inside the log-mean" in str(check)
    assert check_guide(local, auto_faithful_guide(local, x, 10), Trace_ELBO, x, 10).safe


def test_wake_sleep_is_refused_for_structured_guides(x):
    check = check_guide(local, auto_faithful_guide(local, x), ReweightedWakeSleep, x)
    assert not check.safe
    assert "gradients still flow" in check.reasons[0]


def discrete(x):
    g = pyro.sample("g", dist.Bernoulli(0.5))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
        z = pyro.sample("z", dist.Normal(g + k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_discrete_sites(x):
    guide = auto_faithful_guide(discrete, x)
    assert check_guide(discrete, guide, Trace_ELBO, x).safe
    assert check_guide(discrete, guide, TraceGraph_ELBO(), x).safe
    check = check_guide(discrete, guide, TraceEnum_ELBO, x)
    assert check.safe
    assert "No site is marked for enumeration" in check.notes[0]
    text = str(check_guide(discrete, guide, TraceMeanField_ELBO, x))
    assert "no score-function gradient for 'g', 'k': it raises an error" in text
    text = str(check_guide(discrete, guide, RenyiELBO, x))
    assert "RenyiELBO has no score-function gradient for 'g', 'k'" in text
    # wake-sleep is right if nothing depends on reparametrised values
    assert [site for block in guide.plan.blocks for site in block.sites][-1] == "z"
    assert check_guide(discrete, guide, ReweightedWakeSleep, x).safe
    other = auto_faithful_guide(discrete, x, inverse=["k", "z", "g"])
    assert "here on 'z'" in str(check_guide(discrete, other, ReweightedWakeSleep, x))
    text = str(check_guide(discrete, guide, IWAE_ELBO(2), x))
    assert "'g' is outside the data plate and has no path gradient" in text
    assert "'k'" not in text
    assert "'k' has no path gradient" in str(check_guide(discrete, guide, IWAE_ELBO(2, gradient="dreg"), x))
    assert check_guide(local, auto_faithful_guide(local, x), IWAE_ELBO(2, gradient="dreg"), x).safe


def test_values_that_the_model_excludes(x):
    """A chain that never goes back: no finite logit excludes a value, so the ELBO is minus infinity sooner or later."""
    moves = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])

    def model(x, moves=moves):
        with pyro.plate("data", len(x)):
            z = torch.tensor(0)
            for t in range(2):
                z = pyro.sample(f"z{t}", dist.Categorical(logits=moves[z].log()))
            v = pyro.sample("v", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z + v.sum(-1), 1.0), obs=x)

    guide = auto_faithful_guide(model, x)
    for loss in (Trace_ELBO, TraceEnum_ELBO):
        check = check_guide(model, guide, loss, x)
        assert not check.safe
        assert "some values of 'z0', 'z1' have probability zero" in str(check)
    assert "'v'" not in str(check)
    assert check_guide(model, guide, ReweightedWakeSleep, x).safe

    def possible(x):
        model(x, 0.9 * moves + 0.1 / 3)

    assert check_guide(possible, auto_faithful_guide(possible, x), Trace_ELBO, x).safe


def test_enumerated_sites_of_the_guide(x):
    guide = auto_faithful_guide(discrete, x, enumerate_sites=True)
    check = check_guide(discrete, guide, TraceEnum_ELBO, x)
    assert check.safe
    assert check.notes == ()
    check = check_guide(discrete, guide, Trace_ELBO, x)
    assert check.safe
    assert "'g', 'k' are marked for enumeration, which Trace_ELBO does not do" in check.notes[0]


def test_mean_field_warning_is_explained(x):
    guide = auto_faithful_guide(local, x, inverse="forward")
    check = check_guide(local, guide, TraceMeanField_ELBO, x)
    assert check.safe
    assert "Failed to verify mean field restriction" in check.notes[0]
    other = pyro.infer.autoguide.AutoNormal(local)
    assert "not known of this guide" in str(check_guide(local, other, TraceMeanField_ELBO, x))


def test_enumerated_sites_need_trace_enum(x):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    guide = auto_faithful_guide(model, x)
    assert check_guide(model, guide, TraceEnum_ELBO, x).safe
    assert "does not sample 'k'" in str(check_guide(model, guide, Trace_ELBO, x))


def test_discrete_locals_before_globals(x):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(mu * k, 1.0), obs=x)

    def guide(x, first):
        def sample_global():
            return pyro.sample("mu", dist.Normal(0.0, 1.0))

        if first:
            sample_global()
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(0.5))
        if not first:
            sample_global()

    assert check_guide(model, lambda x: guide(x, True), Trace_ELBO, x).safe
    check = check_guide(model, lambda x: guide(x, False), Trace_ELBO, x)
    assert "'k' has a score-function gradient and is sampled before 'mu'" in str(check)

    enumerated = pyro.infer.config_enumerate(lambda x: guide(x, False), "parallel")
    text = str(check_guide(model, enumerated, TraceEnum_ELBO, x))
    assert "'k' is enumerated and comes before 'mu'" in text


def test_sites_and_plates_must_be_the_model_s(x):
    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    text = str(check_guide(hierarchical, guide, Trace_ELBO, x))
    assert "samples 'other'" in text
    assert "does not sample 'mu'" in text
    assert "'z' are in other plates" in text


def test_unknown_losses_are_named(x):
    with pytest.raises(GraphflowsError, match=r"Expected a loss among Trace_ELBO.*got int"):
        check_guide(local, auto_faithful_guide(local, x), 3, x)


def test_a_loss_with_options_is_asked_as_an_object(x):
    with pytest.raises(GraphflowsError, match=r"an object of the loss, IWAE_ELBO\(\.\.\.\)"):
        check_guide(local, auto_faithful_guide(local, x), IWAE_ELBO, x)
