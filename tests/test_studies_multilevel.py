import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from studies.multilevel import answers, models, report, run
from studies.multilevel.peer import Peer
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


class ExactPeer(Peer):
    """The posterior itself, in the place of another library's estimator."""

    def __init__(self):
        pass

    def log_prob(self, x, values):
        of_mu, of_theta = models.exact_posterior(x)
        mu = values["mu"].reshape(-1)
        of_effects = of_theta(mu).log_prob(values["theta"].reshape(len(mu), -1))
        return of_mu.log_prob(mu) + of_effects.sum(-1)

    def draw_mu(self, x, number):
        return models.exact_posterior(x)[0].sample((number,))


def test_an_estimator_of_another_library_is_judged_alike():
    torch.manual_seed(0)
    value, rank = run.gap(ExactPeer(), torch.randn(3, 5))
    assert value == pytest.approx(0.0, abs=1e-9)
    assert 0.0 < rank < 1.0


def test_another_library_is_left_out_where_it_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "installed", lambda: False)
    path = tmp_path / "results.jsonl"
    flags = ["run", "--models", "two levels", "--rows", "bayesflow", "--results", str(path)]
    monkeypatch.setattr("sys.argv", flags)
    run.main()
    assert "left out, bayesflow is not installed" in capsys.readouterr().out
    assert not path.exists()


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


def test_the_reference_of_item_response_is_that_of_a_grid():
    """Two items and three persons: an integral over the spread, the difficulties and, for each, the abilities."""
    y = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    torch.manual_seed(0)
    found = answers.posterior(y)
    level = torch.linspace(-5.0, 5.0, 41).double()
    mass = torch.log_softmax(-0.5 * level.square(), 0)  # of a standard normal
    spread = torch.linspace(0.02, 7.0, 150).double()
    of_spread = torch.log_softmax(-0.5 * (spread / 1.5).square(), 0)
    difficulty = 1.5 * level
    logits = spread.reshape(-1, 1, 1) * level.reshape(1, -1, 1) - difficulty  # (spread, ability, difficulty)
    total = of_spread.reshape(-1, 1, 1) + mass.reshape(-1, 1) + mass
    for one, two in y.tolist():
        first, second = (torch.nn.functional.logsigmoid((2.0 * each - 1.0) * logits) for each in (one, two))
        both = mass.reshape(1, -1, 1, 1) + first.unsqueeze(-1) + second.unsqueeze(-2)
        total = total + both.logsumexp(1)
    exact = float(total.flatten().logsumexp(0))
    assert found.log_evidence == pytest.approx(exact, abs=5.0 * found.error + 2e-3)
    assert found.error < 0.02
    weights = (total - exact).exp()
    means = [float((weights.sum((1, 2)) * spread).sum())]
    means += [float((weights.sum(dim) * difficulty).sum()) for dim in ((0, 2), (0, 1))]
    errors = found.sd[[0, 4, 5]] / 8000**0.5
    assert torch.allclose(
        found.mean[[0, 4, 5]], torch.tensor(means).double(), atol=float(6.0 * errors.max()) + 5e-3
    )
    assert found.mean[2] > found.mean[1] > found.mean[3]  # abilities follow right answers


def test_nuts_and_a_guide_of_item_response_are_compared(monkeypatch):
    sizes = {"NUM_DATA_SETS": 1, "NUM_NUTS": 1, "NUTS_DRAWS": 10, "NUTS_WARM_UP": 5, "NUM_OF_MEANS": 20}
    for name, value in sizes.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(answers, "ROUNDS", (500,))
    reference = run.reference_of_answers()
    (drawn,) = run.held_out("item response", run.OF_MEANS)
    persons, items = drawn["y"].shape
    assert len(reference["mean"][0]) == 1 + persons + items
    assert run.nuts_of_answers(reference)["data_sets"] == 1

    def guide(y):
        """The means of the reference, always."""
        assert torch.equal(y, drawn["y"])
        spread, ability, difficulty = torch.tensor(reference["mean"][0]).split([1, persons, items])
        pyro.sample("spread", dist.Delta(spread.reshape(())))
        with pyro.plate("items", items, dim=-1):
            pyro.sample("difficulty", dist.Delta(difficulty))
        with pyro.plate("persons", persons, dim=-2):
            pyro.sample("ability", dist.Delta(ability.unsqueeze(-1)))

    assert run.errors_of_means(guide, reference) == pytest.approx((0.0, 0.0), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "row"), [("two levels", "flat"), ("random effects", "both"), ("item response", "back")]
)
def test_a_row_from_training_to_page(tmp_path, monkeypatch, name, row):
    monkeypatch.setattr(run, "NUM_DATA_SETS", 2)
    monkeypatch.setattr(run, "NUM_DRAWS", 20)
    monkeypatch.setattr(run, "NUM_OF_MEANS", 20)
    monkeypatch.setattr(answers, "ROUNDS", (200,))
    monkeypatch.setattr(run, "NUM_START_SAMPLES", dict.fromkeys(run.MODELS, 500))
    guide, figures = run.train(name, row, 0.3, 0)
    assert figures["steps"] > 0
    results = Results(tmp_path / "results.jsonl")
    reference = run.reference_in(results, False) if name == "item response" else None
    results.append(f"{name}/{row}/0.3/0", {**figures, **run.judge(name, guide, reference)})
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
