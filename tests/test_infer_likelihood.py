import pyro
import pyro.distributions as dist
import pytest
import torch
from infer_posteriors import Groups

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.infer import sample_posterior


@pytest.fixture
def posterior():
    groups = Groups()
    return sample_posterior(groups.model, groups.guide(), *groups.args, num_draws=40)


def test_by_the_definition(posterior):
    y, s = posterior.fitted.args
    expected = dist.Normal(posterior.draws["theta"], s).log_prob(y)
    found = posterior.log_likelihood()
    assert list(found) == ["y"]
    assert torch.allclose(found["y"], expected)


def test_in_chunks(posterior, monkeypatch):
    whole = posterior.log_likelihood()["y"]
    monkeypatch.setattr("pyro_graphflows.infer.model_runs.NUMBERS_AT_ONCE", 100)
    parts = [part["y"] for part in posterior.log_likelihood_chunks()]
    assert len(parts) > 3
    assert torch.allclose(torch.cat(parts), whole)


def test_several_sites_events_and_masks():
    """An event counts as one value; what is masked is zero; a likelihood that no latent enters is the same for all."""
    mask = torch.tensor([True, False, True])
    y, w = torch.randn(3, 2), torch.randn(4)

    def model(y, w):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3), pyro.poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1), obs=y)
        with pyro.plate("others", 4):
            pyro.sample("w", dist.Normal(0.0, 1.0), obs=w)
        pyro.factor("penalty", z)

    def guide(y, w):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    posterior = sample_posterior(model, guide, y, w, num_draws=10)
    found = posterior.log_likelihood()
    assert set(found) == {"y", "w"}
    z = posterior.draws["z"][:, None, None]
    assert torch.allclose(found["y"], dist.Normal(z, 1.0).log_prob(y).sum(-1) * mask)
    assert torch.allclose(found["w"], dist.Normal(0.0, 1.0).log_prob(w).expand(10, 4))


def test_several_sites_that_share_what_is_summed_out():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z + c, 1.0), obs=y)
            pyro.sample("w", dist.Normal(z - c, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    posterior = sample_posterior(model, guide, torch.randn(3), num_draws=10)
    with pytest.raises(
        UnsupportedModelError, match=r"\['c'\] are summed out, over all observed sites at once"
    ):
        posterior.log_likelihood()
