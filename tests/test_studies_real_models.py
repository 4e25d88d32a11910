"""The models of the study on real data against reference draws and evidences, and its runner.

The files of the posteriors are not part of the project: tests that need them skip without. Their folder is named by
REAL_MODELS_DATA.
"""

import math
import os
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the studies are no part of the package

from studies.real_models import check as checks  # noqa: E402
from studies.real_models import ends, methods, starts, survival  # noqa: E402
from studies.real_models.log_joint import LogJoint  # noqa: E402
from studies.real_models.models import POSTERIORS, find  # noqa: E402
from studies.real_models.ordered import PositiveOrderedNormal  # noqa: E402
from studies.real_models.posterior import DATA_VARIABLE, Reference, data_folder, read_reference  # noqa: E402
from studies.real_models.run import best_rate  # noqa: E402
from studies.results import Results  # noqa: E402

DATA = Path(os.environ.get(DATA_VARIABLE, ROOT.parent / "shared" / "data" / "posteriors"))
QUICK = {
    "eight_schools-eight_schools_noncentered",
    "gp_pois_regr-gp_regr",
    "garch-garch11",
    "earnings-earn_height",
    "mesquite-logmesquite",
    "arK-arK",
    "sblri-blr",
}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the posteriors' files are not here")


@needs_data
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in POSTERIORS]
)
def test_the_model_is_the_posterior_of_its_reference(name):
    """A failure means that the Pyro model has another density than the one the draws and the evidence are of."""
    folder = data_folder(DATA)
    num = 4_000 if name in QUICK else 20_000
    outcome = checks.check(POSTERIORS[name], read_reference(folder, name), folder, num=num)
    assert outcome.passed, outcome


@needs_data
@pytest.mark.parametrize("name", ["eight_schools-eight_schools_noncentered", "mesquite-logmesquite"])
def test_a_wrong_model_is_noticed(name):
    """The negative control: the data moved by half their spread."""
    folder = data_folder(DATA)
    reference = read_reference(folder, name)
    field = {"eight": "y", "mesqu": "weight"}[name[:5]]
    reference.data[field] = reference.data[field] + reference.data[field].std() / 2
    assert not checks.check(POSTERIORS[name], reference, folder, num=4_000).passed


@needs_data
def test_many_points_at_once_have_the_densities_they_have_alone():
    folder = data_folder(DATA)
    for name, posterior in POSTERIORS.items():
        reference = read_reference(folder, name)
        points = reference.draws or {
            k: torch.stack([v, 0.99 * v, 0.98 * v]) for k, v in reference.mean.items()
        }
        sites = posterior.sites(points)
        args = posterior.arguments(reference.data)
        log_joint = LogJoint(posterior.model, args, posterior.plates, {k: v[0] for k, v in sites.items()})
        u = log_joint.unconstrain(sites)[:3]
        alone = torch.cat([log_joint.values_at(row.unsqueeze(0)) for row in u])
        torch.testing.assert_close(log_joint.values_at(u), alone, rtol=1e-10, atol=1e-8)
        back = posterior.parameters({k: v[:3] for k, v in sites.items()})
        for key, value in points.items():
            torch.testing.assert_close(back[key], value[:3])


@needs_data
def test_the_solver_of_the_compartment_model_is_fine_enough():
    reference = read_reference(data_folder(DATA), "one_comp_mm_elim_abs-one_comp_mm_elim_abs")
    assert checks.step_error(reference, 0.1) < 2e-3  # beside a noise of about 6 % in each measurement


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(SystemExit, match="give --data or set REAL_MODELS_DATA"):
        data_folder(None)
    with pytest.raises(SystemExit, match="a folder posteriordb"):
        data_folder(tmp_path / "nothing")


def test_posteriors_are_found_by_name_and_kind():
    assert [p.name for p in find(["radon_mn"])] == ["radon_mn-radon_variable_intercept_centered"]
    assert len(find([])) == len(POSTERIORS) == 39
    assert {p.kind for p in find(["time series"])} == {"time series"}
    with pytest.raises(SystemExit, match="nothing matches 'nowhere'"):
        find(["nowhere"])


def test_the_log_joint_of_a_normal_is_its_density():
    """exp(u) is log-normal: the density of u is normal, the Jacobian included."""

    def model():
        x = pyro.sample("x", dist.LogNormal(1.0, 2.0))
        with pyro.plate("n", 2):
            pyro.sample("y", dist.Normal(x.log(), 1.0), obs=torch.tensor([0.0, 3.0]))

    log_joint = LogJoint(model, (), 1, {"x": torch.tensor(1.0)})
    u = torch.linspace(-2, 3, 5).unsqueeze(-1)
    normal = torch.distributions.Normal
    expected = normal(1.0, 2.0).log_prob(u[:, 0]) + normal(u, 1.0).log_prob(torch.tensor([0.0, 3.0])).sum(-1)
    torch.testing.assert_close(log_joint(u), expected)


@pytest.mark.parametrize("loc", [[0.0, 3.0], [3.0, 10.0], [-1.0, -2.0]])
def test_the_ordered_normal_is_normalised_and_drawn_right(loc):
    """The normalising constant is the probability of the restriction; means of draws by their standard errors."""
    normal = PositiveOrderedNormal(torch.tensor(loc), torch.tensor([1.0, 2.0]))
    free = torch.distributions.Normal(torch.tensor(loc), torch.tensor([1.0, 2.0]))
    x = free.sample((400_000,))
    inside = (x[:, 0] > 0) & (x[:, 1] > x[:, 0])
    rate = inside.double().mean().item()
    error = math.sqrt(rate * (1 - rate) / len(x))
    point = torch.tensor([0.5, 1.5])
    constant = (free.log_prob(point).sum() - normal.log_prob(point)).exp().item()
    assert abs(constant - rate) < 5 * error
    draws = normal.expand([3]).sample((20_000,))
    assert draws.shape == (20_000, 3, 2)
    assert bool((draws[..., 0] > 0).all())
    assert bool((draws[..., 1] > draws[..., 0]).all())
    draws, kept = draws.reshape(-1, 2), x[inside]
    error = (draws.var(0) / len(draws) + kept.var(0) / len(kept)).sqrt()
    assert bool(((draws.mean(0) - kept.mean(0)).abs() < 5 * error).all())


def conjugate(y):
    """Two means with known posteriors: for each of them Normal(sum(y) / (n + 1), (n + 1)^(-1/2))."""
    with pyro.plate("means", 2, dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", y.shape[-1], dim=-1):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def conjugate_evidence(y):
    n = y.shape[-1]
    covariance = torch.eye(n) + torch.ones(n, n)
    normal = torch.distributions.MultivariateNormal(torch.zeros(n), covariance)
    return normal.log_prob(y).sum().item()


@pytest.fixture
def conjugate_posterior(tmp_path, monkeypatch):
    """A posterior with an exact reference, in a folder as the study reads it."""
    import json

    import numpy as np

    y = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.0, 0.3]])
    mean, sd = y.sum(-1) / 4, torch.full((2,), 0.5)
    meta = {"evidence": {"log_evidence": conjugate_evidence(y), "std_error": 0.0}}
    draws = mean + sd * torch.randn(1000, 2)
    (tmp_path / "posteriordb").mkdir()
    np.savez(
        tmp_path / "posteriordb" / "conjugate.npz",
        **{"meta": json.dumps(meta), "data.y": y, "draws.z": draws, "mean.z": mean, "sd.z": sd},
    )
    from studies.real_models.posterior import Posterior

    posterior = Posterior("conjugate", "hierarchical", conjugate, lambda data: (data["y"],), 2, True)
    monkeypatch.setitem(POSTERIORS, "conjugate", posterior)
    return posterior


def exact_guide(y):
    with pyro.plate("means", 2, dim=-2):
        pyro.sample("z", dist.Normal(y.sum(-1, keepdim=True) / 4, 0.5))


def test_standard_deviations_that_are_not_known_are_listed():
    torch.manual_seed(0)
    heavy = torch.distributions.Pareto(torch.tensor(1.0), torch.tensor(1.5)).sample((1000,))
    reference = Reference(
        {}, {"light": torch.randn(1000), "heavy": torch.stack([heavy, heavy.log()], 1)}, {}, {}, None, None
    )
    rows = checks.spreads({"model": reference}).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["heavy[0]"]
    assert 1.0 < checks.tail_index(heavy) < 2.2  # 1.5, by twenty draws


def test_the_exact_posterior_has_no_gap_and_no_errors(conjugate_posterior, tmp_path):
    """Every weight is the evidence; means and standard deviations differ by sampling alone (10,000 draws)."""
    from studies.real_models import measure

    reference = read_reference(tmp_path, "conjugate")
    args = conjugate_posterior.arguments(reference.data)
    result = measure.measure(conjugate_posterior, reference, exact_guide, args, chunk=1000)
    assert result["at_once"]
    assert abs(result["gap"]) < 1e-10
    assert abs(result["iwae"] - reference.log_evidence) < 1e-10
    assert result["k_hat"] == -math.inf
    for part in ("errors", "errors_weighted"):
        assert result[part]["mean_max"] < 5 / math.sqrt(measure.DRAWS)
        assert abs(result[part]["sd_min"] - 1) < 5 / math.sqrt(2 * measure.DRAWS)
        assert (
            result[part]["share_max"] < 5 * 0.5 * (1 / measure.DRAWS + 1 / len(reference.draws["z"])) ** 0.5
        )


def test_a_guide_that_cannot_run_many_draws_at_once_is_measured_one_by_one(conjugate_posterior, tmp_path):
    from studies.real_models import measure

    def alone(y):
        with pyro.plate("means", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(y.sum(-1, keepdim=True) / 4, 0.5))
        assert z.dim() == 2, "alone only"

    reference = read_reference(tmp_path, "conjugate")
    args = conjugate_posterior.arguments(reference.data)
    result = measure.measure(conjugate_posterior, reference, alone, args, chunk=1000)
    assert not result["at_once"]
    assert result["draws"] == measure.ALONE
    assert abs(result["gap"]) < 1e-10


@pytest.mark.parametrize("method", [*methods.PYRO, *methods.OURS])
def test_draws_at_once_have_the_elbo_of_draws_alone(conjugate_posterior, tmp_path, method):
    """Five standard errors; a failure means that one of the two ways is wrong for this guide."""
    from studies.real_models.measure import weigh

    reference = read_reference(tmp_path, "conjugate")
    args = conjugate_posterior.arguments(reference.data)
    guide = methods.make_guide(method, conjugate, args)
    many, values = weigh(conjugate, guide, args, 2, 2000)
    alone = torch.cat([weigh(conjugate, guide, args, 2, None)[0] for _ in range(100)])
    error = (many.var() / len(many) + alone.var() / len(alone)).sqrt()
    assert abs(many.mean() - alone.mean()) < 5 * error + 1e-9
    assert values["z"].reshape(2000, -1).shape == (2000, 2)


def test_the_runner_chooses_a_rate_goes_on_and_reports(conjugate_posterior, tmp_path, monkeypatch):
    """A run is made once; a damaged last line costs only itself; the page has the figures and says what is missing."""
    from studies.real_models import report, run
    from studies.results import DamagedLineWarning, Results

    monkeypatch.setattr(run, "CHOICE_SECONDS", 0.2)
    results = tmp_path / "results.jsonl"
    argv = [
        "--data",
        str(tmp_path),
        "--models",
        "conjugate",
        "--methods",
        "AutoNormal",
        "--seconds",
        "0.2",
        "0.4",
    ]
    argv += ["--out", str(results)]
    run.main([*argv, "--seeds", "0"])
    records = list(Results(results).read().values())
    assert len(records) == 4  # three rates; the chosen one again, for longer
    assert len({record["rate"] for record in records}) == 3
    short = [record for record in records if record["seconds"] == 0.2]
    (long,) = (record for record in records if record["seconds"] == 0.4)
    assert long["rate"] == max(short, key=lambda record: record["elbo"] - 2 * record["elbo_error"])["rate"]
    assert all(record["gap"] > -5 * record["elbo_error"] for record in records)
    assert all(record["steps"] > 0 and record["train_seconds"] >= record["seconds"] for record in records)

    whole = results.read_text()
    run.main([*argv, "--seeds", "0"])
    assert results.read_text() == whole
    results.write_text(whole + '{"key": "conju')  # cut off while writing
    with pytest.warns(DamagedLineWarning, match="line 5"):
        run.main([*argv, "--seeds", "0", "1"])
    more = [(r["seconds"], r["seed"]) for r in Results(results).read().values() if r["seed"] == 1]
    assert sorted(more) == [(0.2, 1), (0.4, 1)]

    monkeypatch.setattr(report, "CHOICE_SECONDS", 0.2)
    report.main(["--results", str(results), "--out", str(tmp_path)])
    page = (tmp_path / "real_models.md").read_text()
    assert "on 1 of 40 models with 1 of" in page
    assert "Not run: methods AutoMultivariateNormal" in page
    assert "| 1 (seed 1) | 1 (seed 0, 1) |" in page  # not the run that chose the rate
    assert (tmp_path / "real_models.png").stat().st_size > 0


def test_an_elbo_that_is_a_rounding_error_chooses_no_rate():
    """As of a guide whose draws are 1e50: the difference of two densities of 1e100."""
    common = {"model": "model", "method": "ours", "seconds": 5.0, "seed": 0}
    figures = [(1e-3, -36.0, 0.1), (1e-2, -34.0, 0.1), (1e-1, 1.27e98, 1.27e98)]
    records = [common | {"rate": r, "elbo": elbo, "elbo_error": error} for r, elbo, error in figures]
    assert best_rate(records, "model", "ours") == 1e-2


def test_failures_are_results(conjugate_posterior, tmp_path, monkeypatch):
    """An error of set-up ends the pair, one of training only its run; both are on the page with their message."""
    from studies.real_models import report, run
    from studies.results import Results

    def broken(model):
        raise RuntimeError("no such guide | here")

    def diverging(model):
        guide = pyro.infer.autoguide.AutoNormal(model)
        inner = guide.forward
        count = [0]

        def forward(*args, **kwargs):
            count[0] += 1
            if count[0] > 3:
                raise FloatingPointError("gone")
            return inner(*args, **kwargs)

        guide.forward = forward
        return guide

    monkeypatch.setattr(run, "CHOICE_SECONDS", 0.1)
    monkeypatch.setitem(methods.PYRO, "AutoNormal", broken)
    monkeypatch.setitem(methods.PYRO, "AutoStructured", diverging)
    results = tmp_path / "results.jsonl"
    argv = ["--data", str(tmp_path), "--models", "conjugate", "--seconds", "0.1", "--out", str(results)]
    run.main([*argv, "--methods", "AutoNormal", "AutoStructured"])
    records = list(Results(results).read().values())
    assert [(r["stage"], r["method"]) for r in records] == [
        ("set-up", "AutoNormal"),
        *[("training", "AutoStructured")] * 3,
    ]
    assert records[0]["failure"] == "RuntimeError: no such guide | here"
    assert records[1]["steps"] == 2  # the first call was set-up's
    report.main(["--results", str(results), "--out", str(tmp_path)])
    page = (tmp_path / "real_models.md").read_text()
    assert "no such guide \\| here" in page
    assert "training, 2 steps | FloatingPointError: gone" in page
    assert "*failed* | *failed*" in page


def test_models_and_methods_that_do_not_exist_are_named():
    from studies.real_models import run

    assert run.methods_of(["ours", "pyro"]) == ["ours", *methods.PYRO]
    with pytest.raises(SystemExit, match="got 'AutoNothing'"):
        run.methods_of(["AutoNothing"])


def test_chains_reach_a_normal():
    """Means and variances of 200 independent chains in two correlated dimensions, within five standard errors."""

    def model():
        x = pyro.sample("x", dist.Normal(1.0, 2.0))
        pyro.sample("y", dist.Normal(3 * x, 0.1))

    from studies.real_models.hmc import chains

    log_joint = LogJoint(model, (), 0, {"x": torch.tensor(0.0), "y": torch.tensor(0.0)})
    draws = chains(log_joint, torch.zeros(2), num_chains=200, iterations=20, warm_up=40)
    assert draws.shape == (20, 200, 2)
    mean, variance = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 36.01])
    for x, expected in ((draws, mean), ((draws - mean) ** 2, variance)):
        by_chain = x.mean(0)
        assert bool(((by_chain.mean(0) - expected).abs() < 5 * by_chain.std(0) / 200**0.5).all())


@needs_data
def test_what_training_does_to_a_start_is_written_once(tmp_path, capsys):
    """A run is a line; what is there is not run again; the page has a row for each."""
    out = tmp_path / "survival.jsonl"
    flags = ["--data", str(DATA), "--models", "logmesquite_logvolume", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survival, "MARKS", (0, 1))
        patch.setattr(survival, "DRAWS", 20)
        survival.main(flags)
        assert capsys.readouterr().out.count("\n") == 2
        survival.main(flags)
        assert capsys.readouterr().out == ""
        records = list(Results(out).read().values())
        assert [record["rate"] for record in records] == [0.001, 0.01]
        assert all(abs(record["losses"][0] - 30.0) < 3.0 for record in records)
        page = survival.page(records)
    assert page.count("mesquite-logmesquite_logvolume | 0.0") == 2


@needs_data
def test_where_training_ends_is_written_once(tmp_path, capsys):
    """A run is a line; what is there is not run again; the unit is as it was; the page has a row for each unit."""
    out, unit = tmp_path / "ends.jsonl", ends.spline.KNOT_UNIT
    flags = ["--data", str(DATA), "--models", "Mt_data", "--seeds", "1", "2", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STEPS": 4, "EVERY": 2, "FEW": 100, "MANY": 200, "AT_ONCE": 100}.items():
            patch.setattr(ends, name, value)
        ends.main(flags)
        assert capsys.readouterr().out.count("\n") == 4
        ends.main(flags)
        assert capsys.readouterr().out == ""
    assert unit == ends.spline.KNOT_UNIT
    records = list(Results(out).read().values())
    assert all(len(record["path"]) == 2 and abs(record["end"]) < 1.0 for record in records)
    assert ends.section(records).count("Mt_data-Mt_model |") == 2


@needs_data
def test_what_a_start_is_worth_is_written_once(tmp_path, capsys):
    """A run is a line; what is there is not run again; the page has a row for each."""
    out = tmp_path / "starts.jsonl"
    flags = ["--data", str(DATA), "--models", "logmesquite_logvolume", "--out", str(out)]
    starts.main(flags)
    assert "mesquite-logmesquite_logvolume | ours | " in capsys.readouterr().out
    starts.main(flags)
    assert capsys.readouterr().out == ""
    records = list(Results(out).read().values())
    assert len(records) == 1
    assert records[0]["steps"] == 0
    assert abs(records[0]["elbo"] + 29.75) < 0.3
    assert records[0]["errors"]["mean_max"] < 0.2
    page = starts.page([*records, {"model": "dogs-dogs", "method": "ours", "failure": "ValueError: no"}])
    assert page.index("| mesquite-logmesquite_logvolume | ours |") < page.index(
        "| dogs-dogs | ours | ValueError: no |"
    )
