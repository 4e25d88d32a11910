import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from studies.multilevel import models, report, run
from studies.results import Results


def exact_guide(x):
    """The posterior itself, as a guide."""
    of_mu, of_theta = models.exact_posterior(x)
    mu = pyro.sample("mu", of_mu)
    with pyro.plate("groups", x.shape[-1], dim=-1):
        pyro.sample("theta", of_theta(mu.reshape(-1)) if mu.dim() == 0 else dist.Normal(*parts(x, mu)))


def parts(x, mu):
    _, of_theta = models.exact_posterior(x)
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
    of_mu, of_theta = models.exact_posterior(x)
    assert of_mu.mean.item() == pytest.approx(mean[0].item())
    assert of_mu.variance.item() == pytest.approx(covariance[0, 0].item())
    assert torch.allclose(of_theta(of_mu.mean).mean, mean[1:])


def test_the_gap_of_the_exact_posterior_is_zero():
    torch.manual_seed(0)

    class Guide:
        def __call__(self, x):
            exact_guide(x)
            return {"mu": models.exact_posterior(x)[0].sample((run.NUM_DRAWS,))}

    value, rank = run.gap(Guide(), torch.randn(3, 5))
    assert value == pytest.approx(0.0, abs=1e-9)
    assert 0.0 <= rank <= 1.0


def test_the_posterior_of_three_levels_is_that_of_the_joint_normal():
    """Log-densities of draws, by linear algebra on the joint covariance of (mu, delta, theta, x)."""
    torch.manual_seed(3)
    pupils, schools, districts = 2, 3, 2
    x = torch.randn(pupils, schools, districts).double()
    number = schools * districts
    effects = torch.eye(districts).double()
    of_delta = torch.cat([torch.ones(districts, 1), effects], 1)  # of mu, effects of districts and of schools
    of_delta = torch.cat([of_delta, torch.zeros(districts, number)], 1)
    of_theta = of_delta.repeat(schools, 1)  # schools in rows, districts in columns, flattened
    of_theta[:, 1 + districts :] = models.SCHOOLS * torch.eye(number).double()
    of_mu = torch.zeros(1, 1 + districts + number).double()
    of_mu[0, 0] = 1.0
    prior = torch.cat([of_mu, of_delta, of_theta])
    rows = of_theta.repeat(pupils, 1)
    data = rows @ rows.T + torch.eye(pupils * number).double()
    cross = prior @ rows.T
    mean = cross @ torch.linalg.solve(data, x.reshape(-1))
    covariance = prior @ prior.T - cross @ torch.linalg.solve(data, cross.T)
    exact = dist.MultivariateNormal(mean, covariance)
    values, log_p = models.draws_of_three_levels(x, 5)
    joint = torch.cat([values[name].reshape(5, -1) for name in ("mu", "delta", "theta")], -1)
    assert torch.allclose(exact.log_prob(joint), log_p, atol=1e-8)


def test_three_levels_start_at_their_posterior_whatever_the_sizes():
    guide, _ = run.train("three levels", "start", 0.0, 0)
    torch.manual_seed(2)
    for shape in ((8, 3, 30), (1, 5, 6)):
        gaps = []
        for _ in range(10):
            with torch.no_grad():
                gaps.append(run.gap(guide, run.simulate(models.three_levels, shape)["x"], "three levels")[0])
        values = torch.tensor(gaps)
        assert float(values.mean()) < 0.02 + 4 * float(values.std()) / math.sqrt(10)


def test_nuts_and_a_guide_of_item_response_are_compared(monkeypatch):
    for name, value in (("NUM_DATA_SETS", 1), ("NUM_NUTS", 1), ("NUTS_DRAWS", 10), ("NUTS_WARM_UP", 5)):
        monkeypatch.setattr(run, name, value)
    reference = run.nuts_of_answers()
    (drawn,) = run.held_out("item response", run.NUTS_RANGE)
    persons, items = drawn["y"].shape
    assert len(reference[0]["mean"]) == 1 + persons + items

    class Guide:
        """The reference itself."""

        def __call__(self, y):
            assert torch.equal(y, drawn["y"])
            mean = torch.tensor(reference[0]["mean"])
            each = mean.expand(run.NUM_WEIGHTED, -1).split([1, persons, items], -1)
            return dict(zip(run.NUTS_SITES, each, strict=True))

    assert run.distance_from_nuts(Guide(), reference) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "row"), [("two levels", "flat"), ("random effects", "both"), ("item response", "elbo")]
)
def test_a_row_from_training_to_page(tmp_path, monkeypatch, name, row):
    monkeypatch.setattr(run, "NUM_DATA_SETS", 2)
    monkeypatch.setattr(run, "NUM_DRAWS", 20)
    monkeypatch.setattr(run, "NUM_WEIGHTED", 20)
    monkeypatch.setattr(run, "NUM_START_SAMPLES", {})
    guide, figures = run.train(name, row, 0.3, 0)
    assert figures["steps"] > 0
    results = Results(tmp_path / "results.jsonl")
    results.append(f"{name}/{row}/0.3/0", {**figures, **run.judge(name, guide)})
    report.render(results.path, tmp_path)
    assert f"| `{row}` | 0 |" in (tmp_path / "multilevel.md").read_text()
    assert (tmp_path / "multilevel" / "gaps.png").exists()


def test_the_evidence_of_random_effects_is_that_of_a_joint_normal_on_a_grid():
    torch.manual_seed(1)
    x = torch.randn(3, 4).double() + torch.randn(4).double()
    groups = torch.eye(4).double().repeat_interleave(3, 0)
    tau, sigma = (torch.linspace(low, high, 60).double().exp() for low, high in ((-7.0, 2.0), (-2.5, 2.5)))
    total = []
    for t in tau:
        covariance = 4.0 + t**2 * groups @ groups.T + sigma[:, None, None] ** 2 * torch.eye(12).double()
        joint = dist.MultivariateNormal(torch.zeros(12).double(), covariance)
        priors = dist.HalfNormal(1.0).log_prob(t) + dist.LogNormal(0.0, 0.5).log_prob(sigma)
        total.append(joint.log_prob(x.T.reshape(-1)) + priors + t.log() + sigma.log())
    cell = math.log(9.0 / 59) + math.log(5.0 / 59)
    expected = float(torch.stack(total).flatten().logsumexp(0)) + cell
    assert models.log_evidence(x) == pytest.approx(expected, abs=2e-3)


def test_the_start_is_the_posterior_at_sizes_it_has_not_seen():
    guide, _ = run.train("two levels", "start", 0.0, 0)
    torch.manual_seed(2)
    for shape in ((2, 40), (15, 6)):
        gaps = []
        for _ in range(20):
            theta = torch.randn(()) + torch.randn(shape[1])
            with torch.no_grad():
                gaps.append(run.gap(guide, theta + torch.randn(shape))[0])
        values = torch.tensor(gaps)
        assert float(values.mean()) < 0.02 + 4 * float(values.std()) / math.sqrt(20)
