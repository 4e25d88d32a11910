import pyro
import pyro.distributions as dist
import pytest
import torch

from studies.multilevel import report, run
from studies.results import Results


def exact_guide(x):
    """The posterior itself, as a guide."""
    of_mu, of_theta = run.exact_posterior(x)
    mu = pyro.sample("mu", of_mu)
    with pyro.plate("groups", x.shape[-1], dim=-1):
        pyro.sample("theta", of_theta(mu.reshape(-1)) if mu.dim() == 0 else dist.Normal(*parts(x, mu)))


def parts(x, mu):
    _, of_theta = run.exact_posterior(x)
    conditional = of_theta(torch.zeros(()))
    n = x.shape[0]
    return conditional.loc + mu / (1.0 + n), conditional.scale


def test_the_exact_posterior_is_that_of_the_joint_normal():
    """By linear algebra on the joint covariance of (mu, theta, x)."""
    x = torch.randn(3, 4)
    n, groups = x.shape
    loading = torch.cat([torch.ones(groups, 1), torch.eye(groups)], 1)  # theta = mu + effect
    prior = torch.cat([torch.eye(groups + 1)[:1], loading])
    joint = prior @ prior.T  # of mu and theta
    rows = loading.repeat_interleave(n, 0)
    cross = prior @ rows.T
    data = rows @ rows.T + torch.eye(groups * n)
    mean = cross @ torch.linalg.solve(data, x.T.reshape(-1))
    covariance = joint - cross @ torch.linalg.solve(data, cross.T)
    of_mu, of_theta = run.exact_posterior(x)
    assert of_mu.mean.item() == pytest.approx(mean[0].item())
    assert of_mu.variance.item() == pytest.approx(covariance[0, 0].item())
    assert torch.allclose(of_theta(of_mu.mean).mean, mean[1:])


def test_the_gap_of_the_exact_posterior_is_zero():
    torch.manual_seed(0)

    class Guide:
        def __call__(self, x):
            exact_guide(x)
            return {"mu": run.exact_posterior(x)[0].sample((run.NUM_DRAWS,))}

    value, rank = run.gap(Guide(), torch.randn(3, 5))
    assert value == pytest.approx(0.0, abs=1e-9)
    assert 0.0 <= rank <= 1.0


def test_a_row_from_training_to_page(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "NUM_DATA_SETS", 2)
    guide, figures = run.train("attention", 0.5, 0)
    results = Results(tmp_path / "results.jsonl")
    results.append("attention/0.5/0", {**figures, **run.judge(guide)})
    report.render(results.path, tmp_path)
    assert "| `attention` | 0 |" in (tmp_path / "multilevel.md").read_text()
