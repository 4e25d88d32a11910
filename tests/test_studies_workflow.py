import subprocess
import sys

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from studies.psychometric import report
from studies.results import Results
from studies.workflow import run


def test_cross_validation_of_eight_schools():
    assert run.schools_loo().sum().item() == pytest.approx(-30.742, abs=2e-3)


def test_moments_of_eight_schools():
    """As by importance sampling from the posterior of all parameters given tau."""
    moments = run.schools_moments()
    tau = dist.HalfCauchy(5.0).sample((400_000,)).double()
    precision = (1 / (tau.square()[:, None] + run.ERRORS.square())).sum(-1) + 1 / 25
    centre = (run.EFFECTS / (tau.square()[:, None] + run.ERRORS.square())).sum(-1) / precision
    scale = (tau.square()[:, None] + run.ERRORS.square()).sqrt()
    log_weight = (
        dist.Normal(centre[:, None], scale).log_prob(run.EFFECTS).sum(-1)
        + dist.Normal(0.0, 5.0).log_prob(centre)
        - 0.5 * precision.log()
    )
    weight = torch.softmax(log_weight, 0)
    assert moments["tau"][0].item() == pytest.approx((weight * tau).sum().item(), abs=0.05)
    assert moments["mu"][0].item() == pytest.approx((weight * centre).sum().item(), abs=0.05)


def test_cross_validation_of_grouped_data():
    """The formula by the inverse covariance is that of leaving a datum out, at each pair of scales."""
    county, floor = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    y = torch.tensor([1.2, 1.5, 0.7, 1.1, 1.4])
    terms = run.radon_loo(county, floor, y, 3)
    keep = torch.arange(5) != 2

    def log_evidence(rows):
        total = []
        alpha, noise = torch.linspace(0.02, 0.8, 24), torch.linspace(0.62, 0.84, 20)
        for a in alpha:
            for s in noise:
                cov = (
                    100 * (1 + torch.outer(floor, floor))
                    + a**2 * (county[:, None] == county)
                    + s**2 * torch.eye(5)
                )
                normal = dist.MultivariateNormal(torch.zeros(int(rows.sum())), cov[rows][:, rows])
                prior = dist.HalfNormal(1.0).log_prob(a) + dist.HalfNormal(1.0).log_prob(s)
                total.append(normal.log_prob(y[rows]) + prior)
        return torch.logsumexp(torch.stack(total), 0)

    expected = log_evidence(torch.ones(5, dtype=torch.bool)) - log_evidence(keep)
    assert terms[2].item() == pytest.approx(expected.item(), abs=1e-6)


def test_errors_are_in_standard_deviations():
    moments = {"a": (torch.tensor(1.0), torch.tensor(2.0))}
    draws = {"a": torch.randn(400) * 2 + 1.5}
    error, rhat = run.worst(draws, moments, 4)
    assert error == pytest.approx(abs(draws["a"].mean() - 1).item() / 2)
    assert rhat < 1.1


class Line:
    """A coordinate that is its own value, of a normal target."""

    def __init__(self, *_) -> None:
        self.start = torch.zeros(8, 1, 1)

    def __call__(self, points):
        return 0.5 * points.square().sum(-1)

    def values(self, points):
        return {"a": points[..., 0, 0]}


@pytest.mark.parametrize(("most", "samples"), [(100, 0), (50_000, 250)], ids=["in warm-up", "never"])
def test_chains_are_broken_off_where_they_take_too_many_gradients(monkeypatch, most, samples):
    monkeypatch.setattr(run, "Target", Line)
    torch.manual_seed(0)
    moments = {"a": (torch.tensor(0.0), torch.tensor(1.0))}
    record = run.run(None, None, {}, moments, most)
    assert record["samples"] >= samples
    assert record["enough"] == (samples > 0)
    assert record["gradients"] > most if samples == 0 else record["gradients"] < most


@pytest.mark.slow
def test_radon_data_are_read_by_the_name_of_the_posterior(tmp_path, monkeypatch):
    """Three counties, in the form of the file: the figures are few, the path is that of the study."""
    monkeypatch.setattr(run, "STEPS", 2)
    monkeypatch.setattr(run, "NUM_REFINED", 100)
    monkeypatch.setattr(run, "NUM_WEIGHTED", 1000)
    (tmp_path / "posteriordb").mkdir()
    (tmp_path / "inference_gym").mkdir()
    generator = np.random.default_rng(0)
    arrays = {
        "data.county_idx": np.arange(9) % 3 + 1,
        "data.floor_measure": generator.integers(0, 2, 9),
        "data.log_radon": generator.normal(1.3, 0.8, 9),
        "data.J": np.array(3),
        "draws.mu_alpha": generator.normal(size=4),
    }
    name = "radon_mn-radon_variable_intercept_centered"
    np.savez(tmp_path / "posteriordb" / f"{name}.npz", meta=np.array('{"evidence": null}'), **arrays)
    for part in (run.part_radon, run.part_radon_refined):
        record = part(tmp_path)
        assert record["houses"] == 9
        assert record["elpd"] == pytest.approx(record["exact"], abs=2.0)


def test_the_page_of_what_was_run(tmp_path):
    results = Results(tmp_path / "workflow.jsonl")
    one = {"samples": 250, "gradients": 1000, "seconds": 1.0, "error": 0.01, "rhat": 1.001, "divergent": 0}
    one["enough"] = True
    record = {
        "khat": 1.2,
        "ess": 3.0,
        "guide_error": 0.9,
        "refined": one,
        "prior": {**one, "gradients": 4000},
    }
    results.append("schools", {**record, "ratio": 4.0, "ratio_with_training": 3.0})
    results.append("stream", {"peak_gib": 0.5, "seconds": 12.0, "draws": 1000})
    report.render(tmp_path / "none.jsonl", tmp_path / "workflow.jsonl", tmp_path)
    page = (tmp_path / "workflow.md").read_text()
    assert (
        "| eight schools | 1.20 | 0.90 | 0.010 / 1.001 / 1,000 | 0.010 / 1.001 / 4,000 | 4.0 | 3.0 |" in page
    )
    assert "| banana | not run |" in page
    assert report.reached({"samples": 0, "gradients": 1234}) == "still warming up after 1,234"
    assert "0.50 GiB" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_log_likelihoods_of_a_million_data_are_streamed():
    """A million data at a thousand draws: eight gigabytes of numbers, of which two at most are held at once."""
    code = "from studies.workflow.run import part_stream; print(part_stream()['peak_gib'])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    print("peak GiB", done.stdout)
    assert float(done.stdout) < 2
