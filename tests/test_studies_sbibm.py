import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.infer import Simulations
from studies.results import Results
from studies.sbibm import rates, report, run, tasks
from studies.sbibm.c2st import c2st
from studies.sbibm.tasks import (
    Box,
    Crescent,
    GLMStatistics,
    Task,
    gaussian_linear,
    gaussian_mixture,
    slcp,
    slcp_distractors,
    two_moons,
)


class TestC2ST:
    def test_known_accuracies(self):
        """Of shifted normals the best classifier has accuracy Phi(d / 2); 4,000 draws judge."""
        torch.manual_seed(0)
        reference = torch.randn(2000, 2)
        same, other = torch.randn(2000, 2), torch.randn(2000, 2) + torch.tensor([1.5, 0.0])
        assert c2st(reference, same) == pytest.approx(0.5, abs=5 * 0.5 / 4000**0.5)
        best = 0.5 * (1 + math.erf(0.75 / 2**0.5))
        assert c2st(reference, other) == pytest.approx(best, abs=5 * 0.5 / 4000**0.5)

    def test_other_shapes_of_the_same_moments_are_seen(self):
        torch.manual_seed(1)
        normal, two = torch.randn(1500, 1), 2 * torch.bernoulli(torch.full((1500, 1), 0.5)) - 1
        assert c2st(normal, two + 0.1 * torch.randn(1500, 1)) > 0.8


class TestDistributions:
    def test_the_crescent_has_its_density(self):
        """On a grid the density sums to one and has the mean of the draws."""
        torch.manual_seed(0)
        axis = torch.linspace(-0.2, 0.5, 801)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
        density = Crescent(torch.zeros(2)).log_prob(grid).exp() * (axis[1] - axis[0]) ** 2
        draws = Crescent(torch.zeros(2)).sample((20_000,))
        assert density.sum() == pytest.approx(1.0, abs=2e-3)  # the edge at half a cell
        error = draws.std(0) / 20_000**0.5
        assert ((density @ grid - draws.mean(0)).abs() < 5 * error + 1e-4).all()

    def test_statistics_of_the_glm(self):
        """The density differs from that of any bits with these sums by a constant in the weights."""
        design, bits = torch.randn(30, 3), torch.bernoulli(torch.full((30,), 0.4))
        weights = torch.randn(5, 3)
        of_bits = dist.Bernoulli(logits=weights @ design.T).log_prob(bits).sum(-1)
        assert torch.allclose(GLMStatistics(weights, design).log_prob(bits @ design), of_bits)
        draws = GLMStatistics(torch.zeros(3), design).sample((4000,))
        assert torch.allclose(draws.mean(0), design.sum(0) / 2, atol=5 * 30**0.5 / 2 / 4000**0.5)


def columns(draws):
    return draws["theta"].reshape(len(draws["theta"]), -1)


def in_a_box(x):
    """Normal means under a uniform prior that cuts their posteriors at one side."""
    with pyro.plate("dimensions", 2):
        theta = pyro.sample("theta", Box(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, 0.3), obs=x)


@pytest.mark.parametrize("row", ["normal", "normal reweighted"])
def test_draws_outside_the_prior_are_dropped(tmp_path, monkeypatch, row):
    monkeypatch.setattr(run, "NUM_DRAWS", 200)
    monkeypatch.setattr(run, "POOL", 1600)
    task = Toy("box", in_a_box, columns, (2,), {})
    guide = auto_faithful_guide(task.model, task.observation(1), family=run.FAMILIES["normal"](task))
    guide.save(tmp_path / "guide")
    draws, figures = run.draw(task, row, run.load(task, tmp_path / "guide"), 1, 0)
    assert draws.shape == (200, 2)
    assert ((draws >= 0) & (draws <= 1)).all()
    assert 0.3 < figures["inside"] < 1
    monkeypatch.setattr(run, "OUTSIDE", 1)
    with pytest.raises(SystemExit, match="of 200 draws only"):
        run.draw(task, "normal", run.load(task, tmp_path / "guide"), 1, 0)


def test_draws_of_other_libraries_are_cut_by_the_prior(monkeypatch):
    monkeypatch.setattr(run, "NUM_DRAWS", 200)
    monkeypatch.setattr(run, "OUTSIDE", 4)

    class Estimator:
        def sample(self, shape, condition):
            assert condition.shape == (1, 2)
            return torch.rand(*shape, 1, 2) * torch.tensor([2.0, 1.0])

    task = Toy("box", in_a_box, columns, (2,), {})
    low, high = task.bounds()
    assert (low.tolist(), high.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    draws, figures = run.draw_npe(task, Estimator(), 1)
    assert draws.shape == (200, 2)
    assert draws.max() <= 1
    assert figures["inside"] == pytest.approx(0.5, abs=5 * 0.5 / 800**0.5)
    monkeypatch.setattr(run, "OUTSIDE", 1)  # more are drawn until there are enough
    assert run.draw_npe(task, Estimator(), 1)[0].shape == (200, 2)
    monkeypatch.setattr(run, "MOST_ROUNDS", 1)
    with pytest.raises(SystemExit, match="of 200 draws only"):
        run.draw_npe(task, Estimator(), 1)


def test_a_prior_without_bounds_has_none():
    low, high = Toy("normal", gaussian_linear, columns, (2,), {}).bounds()
    assert (low.tolist(), high.tolist()) == ([-math.inf] * 2, [math.inf] * 2)


def test_npe_is_left_out_where_it_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    results = Results(tmp_path / "results.jsonl")
    task = Toy("box", in_a_box, columns, (2,), {})
    run.run_npe(task, "npe", 100, 0, [1], results, tmp_path)
    assert "left out, sbi is not installed" in capsys.readouterr().out
    assert not results.path.exists()


class Toy(Task):
    """A task without files: normal means, whose posterior is known."""

    def observation(self, number):
        return torch.full((2,), 0.1 * number)

    def reference(self, number):
        torch.manual_seed(100 + number)
        return self.observation(number) / 2 + 0.05**0.5 * torch.randn(400, 2)


@pytest.mark.parametrize("model", [gaussian_linear, gaussian_mixture, two_moons])
def test_models_run(model):
    trace = pyro.poutine.trace(model).get_trace(torch.zeros(2))
    assert torch.isfinite(trace.log_prob_sum()) or model is two_moons


def test_slcp_has_five_parameters():
    trace = pyro.poutine.trace(slcp).get_trace(torch.zeros(4, 2))
    assert [name for name in trace.stochastic_nodes if name.startswith("theta")] == [
        f"theta_{i}" for i in range(5)
    ]


def test_covariances_of_slcp_have_a_root_in_single_precision_wherever_parameters_are():
    generator = torch.Generator().manual_seed(0)
    theta = 3 * (2 * torch.rand(5, 100, generator=generator, dtype=torch.float32) - 1)
    theta[4, :50] = 3.0  # a correlation of .995
    theta[2, ::10] = 1e-4
    found = []
    for k in range(100):
        one = {f"theta_{i}": theta[i, k] for i in range(5)}
        trace = pyro.poutine.trace(pyro.poutine.condition(slcp, data=one)).get_trace(torch.zeros(4, 2))
        found.append(trace.nodes["x"]["fn"].covariance_matrix[0])
    s0, s1, rho = theta[2].double().square(), theta[3].double().square(), theta[4].double().tanh()
    expected = torch.stack([s0**2 + 1e-6, rho * s0 * s1, rho * s0 * s1, s1**2 + 1e-6], -1).view(-1, 2, 2)
    torch.testing.assert_close(torch.stack(found).double(), expected, rtol=1e-4, atol=1e-9)


def test_distractors_stand_beside_the_points(tmp_path, monkeypatch):
    """The files of the package have them in one permuted row, and matrices with negative diagonals."""
    generator = torch.Generator().manual_seed(0)
    tril = 0.1 * torch.randn(3, 92, 92, generator=generator).tril(-1) + torch.diag((-1.0) ** torch.arange(92))
    loc, order = torch.zeros(3, 92), torch.randperm(100, generator=generator)
    each = dist.MultivariateStudentT(torch.full((3,), 2.0), loc, tril, validate_args=False)
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Independent(each, 0))
    folder = tmp_path / "tasks" / "slcp" / "files"
    folder.mkdir(parents=True)
    torch.save(mixture, folder / "gmm.torch")
    torch.save(order, folder / "permutation_idx.torch")
    monkeypatch.setattr(tasks, "_package", lambda: tmp_path)
    tasks._distractors.cache_clear()
    x = torch.randn(100, generator=generator)
    trace = pyro.poutine.trace(slcp_distractors).get_trace(x)
    assert torch.isfinite(trace.nodes["distractors"]["fn"].log_prob(trace.nodes["distractors"]["value"]))
    values = {name: trace.nodes[name]["value"].unsqueeze(0) for name in ("x", "distractors")}
    assert torch.equal(tasks.TASKS["slcp_distractors"].data(values)[0], x)
    options = tasks.TASKS["slcp_distractors"].guide_options
    guide = auto_faithful_guide(slcp_distractors, x, num_start_samples=100, **options)
    assert all("distractors" not in parents for parents in guide.inverse.parents.values())
    tasks._distractors.cache_clear()


def test_losses_by_rate(monkeypatch, capsys):
    """The posterior is known, and so is its entropy: the guide is linear-Gaussian and starts near it."""
    task = Toy("gaussian_linear", gaussian_linear, columns, (2,), {})
    monkeypatch.setitem(tasks.TASKS, "gaussian_linear", task)
    found = {rate: rates.losses(task, rate, 300, 0, "normal") for rate in (1e-3, 1e-2)}
    exact = math.log(2 * math.pi * math.e * 0.05)  # of two numbers with variance 0.05
    for each in found.values():
        assert each.shape == (rates.FRESH,)
        assert -4 * each.std() / rates.FRESH**0.5 < each.mean() - exact < 0.1
    cells = rates.line("gaussian_linear", 0, found)
    change = (found[1e-2] - found[1e-3]).mean().item()
    assert f"({change:+.3f} ± " in cells[3]
    flags = ["--tasks", "gaussian_linear", "--rates", "1e-3", "--seeds", "0", "--simulations", "300"]
    rates.main([*flags, "--family", "normal"])
    assert f"| gaussian_linear | 0 | {found[1e-3].mean():.3f} |" in capsys.readouterr().out


def test_a_row_from_training_to_page(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "NUM_DRAWS", 400)
    monkeypatch.setattr(run, "POOL", 2000)
    monkeypatch.setattr(run, "AUTO_SECONDS", 0.5)
    monkeypatch.setattr(
        run, "Simulations", lambda number, **options: Simulations(number, batch_size=options["batch_size"])
    )
    task = Toy("gaussian_linear", gaussian_linear, columns, (2,), {}, batch_size=100)
    results = Results(tmp_path / "results.jsonl")
    for number in (1, 2):
        for row in ("normal", "spline score reweighted", "auto")[: 3 if number == 1 else 1]:
            run.run(task, row, 200, 0, number, results, tmp_path)
    keys = list(results.read())
    assert len(keys) == 6  # two trainings, four tests
    again = results.path.read_bytes()
    run.run(task, "normal", 200, 0, 1, results, tmp_path)
    assert results.path.read_bytes() == again
    for row in ("spline score reweighted", "auto"):
        assert results.get(f"gaussian_linear/{row}/200/0/1")["c2st"] < 0.65
    report.draw(results.path, tmp_path)
    report.render(results.path, tmp_path)
    page = (tmp_path / "sbibm.md").read_text()
    assert "| `gaussian_linear` | 0." in page
    assert "(2)" in page


def test_means_of_seeds_are_of_all_observations(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for seed, value in ((0, 0.5), (1, 0.6), (2, 0.9)):
        for number in range(1, 11 if seed < 2 else 10):  # the last is not complete
            results.append(f"slcp/spline/1000/{seed}/{number}", {"c2st": value + 0.01 * (number % 2)})
    (row,) = report.by_seed(results.path)
    assert row == ["`slcp`", "spline", "1,000", "0.555 ± 0.050", "0.505, 0.605"]
    tests, _ = report.load(results.path, 0)
    assert report.cell(tests["slcp", "spline", 1000]).startswith("0.505 ± 0.002")
