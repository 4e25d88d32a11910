"""The density study: its exact numbers, every row on every problem, what is skipped, and (slow) the promised gap."""

import builtins
import math
from pathlib import Path

import networkx as nx
import pytest
import torch

from studies.density import causal
from studies.density import run as study
from studies.density.report import render
from studies.results import Results

PROTEIN = Path(__file__).parent.parent.parent / "shared" / "data" / "tabular" / "protein_grf.npz"


def parse(tmp_path, *argv):
    return study.parse([*argv, "--results", str(tmp_path / "results.jsonl"), "--out", str(tmp_path)])


def run(tmp_path, *argv):
    args = parse(tmp_path, *argv)
    results = study.main(args)
    records = Results(args.results).read()
    assert {record["row"] for record in records.values()} == {r.row for r in results}
    assert all(key.startswith(f"comparison-{args.problem}-") for key in records)
    assert (tmp_path / "density" / f"comparison-{args.problem}.png").stat().st_size > 0
    return {r.row: r for r in results}


@pytest.fixture
def no_zuko(monkeypatch):
    """Importing zuko fails as where it is not installed."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "zuko":
            raise ModuleNotFoundError("No module named 'zuko'", name="zuko")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


def test_the_entropy_of_the_circuit():
    """Two Laplace and six normal terms: 2 (1 + log 2) + 5 H(N(., .1)) + H(N(., 2)) = 1.080 nats."""
    exact = 2 * (1 + math.log(2)) + 3 * (1 + math.log(2 * math.pi)) + 5 * math.log(0.1) + math.log(2)
    assert abs(exact - 1.080) < 5e-4
    columns, log_density = study.circuit_samples(200_000, 0)
    assert abs(-log_density.mean().item() - exact) < 5 * log_density.std().item() / math.sqrt(200_000)
    assert set(columns) == {"z0", "z1", "z2", "z3", "z4", "z5", "x0", "x1"}


def test_the_linear_network_is_right_on_the_tree(tmp_path, capsys):
    """The gap of the linear fit is the cost of estimating its parameters: (30 + 31 + 31) / (2 n)."""
    rows = run(
        tmp_path, *("--problem", "tree", "--rows", "linear", "--num-train", "4000", "--num-test", "2000")
    )
    assert 0 < rows["linear"].gap < 5 * 92 / (2 * 3600)
    assert "tree: test negative log-likelihood" in capsys.readouterr().out


def test_every_row_runs(tmp_path):
    pytest.importorskip("zuko")
    rows = run(
        tmp_path,
        *("--num-train", "400", "--num-test", "100", "--epochs", "1", "--rows", *study.ROWS),
    )
    assert list(rows) == list(study.ROWS)
    assert all(math.isfinite(row.test_nll) for row in rows.values())
    assert rows["linear"].epochs == 0


def test_a_budget_in_seconds(tmp_path):
    rows = run(
        tmp_path,
        *("--num-train", "400", "--num-test", "100", "--seconds", "0.5", "--rows", "faithful"),
    )
    assert rows["faithful"].epochs >= 1


def test_protein_data(tmp_path):
    with pytest.raises(SystemExit, match="--data"):
        run(tmp_path, "--problem", "protein", "--data", "nowhere.npz")
    if not PROTEIN.is_file():
        pytest.skip("needs the protein data")
    problem = study.protein(PROTEIN)
    assert problem.train.shape == (5002, 11)
    assert problem.test.shape == (2464, 11)
    assert nx.is_directed_acyclic_graph(problem.graph)
    assert problem.graph.number_of_edges() == 20
    assert abs(problem.train.std(0) - 1).max() < 1e-6
    rows = run(
        tmp_path,
        *("--problem", "protein", "--data", str(PROTEIN), "--epochs", "1", "--rows", "linear", "faithful"),
    )
    assert rows["faithful"].test_nll < rows["linear"].test_nll


def test_the_study_is_restartable_and_draws_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "STUDY", {"circuit": ("linear", "faithful"), "tree": ("linear",)})
    options = ("--study", "--seconds", "0.3", "--seeds", "2", "--num-train", "300", "--num-test", "100")
    args = parse(tmp_path, *options)
    assert study.main(args) == []
    before = args.results.read_bytes()
    runs = Results(args.results).read()
    assert set(runs) == {
        f"{name}-s{seed}" for seed in (0, 1) for name in ("circuit-linear", "circuit-faithful", "tree-linear")
    }
    study.main(parse(tmp_path, *options))
    assert args.results.read_bytes() == before
    assert (tmp_path / "density" / "curves.png").stat().st_size > 0
    page = (tmp_path / "density.md").read_text()
    ones = [runs[f"circuit-faithful-s{i}"] for i in (0, 1)]
    mean, largest = sum(one["gap"] for one in ones) / 2, max(one["gap"] for one in ones)
    (line,) = (line for line in page.splitlines() if line.startswith("| faithful |"))
    assert f"| {mean:.3f} ± " in line
    assert f"| {largest:.3f} | 2 |" in line


def test_a_comparison_of_skipped_rows_writes_nothing(tmp_path, capsys, no_zuko):
    """What is there of an earlier call stays, be it of rows that are skipped now."""
    small = ("--num-train", "200", "--num-test", "50", "--rows")
    run(tmp_path, *small, "linear")
    results, key = Results(tmp_path / "results.jsonl"), "comparison-circuit-zuko-graph-s0"
    earlier = {**results.get("comparison-circuit-linear-s0"), "row": "zuko graph"}
    results.append(key, earlier)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=r"Every row was skipped: .* nothing was written"):
        study.main(parse(tmp_path, *small, "zuko graph", "zuko maf"))
    assert "circuit, zuko maf: skipped, zuko is not installed" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    study.main(parse(tmp_path, *small, "linear", "zuko graph"))
    assert results.get(key) == earlier


def test_a_study_of_skipped_rows_keeps_its_results_and_its_page(tmp_path, capsys, monkeypatch, no_zuko):
    monkeypatch.setattr(study, "STUDY", {"circuit": ("zuko graph",), "protein": ("linear",)})
    options = ("--study", "--seeds", "1", "--num-train", "200", "--num-test", "50", "--data", "nowhere.npz")
    args = parse(tmp_path, *options)
    with pytest.raises(SystemExit, match=r"found none\. No page was written"):
        study.main(args)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(study.STUDY, "circuit", ("linear", "zuko graph"))
    study.main(args)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".jsonl", ".md")}
    assert len(files) == 2
    capsys.readouterr()
    study.main(args)
    output = capsys.readouterr().out
    assert "circuit, zuko graph: skipped, zuko is not installed" in output
    assert "protein, seed 0: skipped, there are no data at nowhere.npz (--data)" in output
    assert {path: path.read_bytes() for path in files} == files


def test_a_comparison_is_no_run_of_the_study(tmp_path):
    run(tmp_path, "--num-train", "200", "--num-test", "50", "--rows", "linear")
    with pytest.raises(SystemExit, match="Expected runs of the study"):
        render(tmp_path / "results.jsonl", tmp_path)


@pytest.mark.slow
def test_the_circuit_is_learned_to_a_tenth_of_a_nat(tmp_path):
    rows = run(tmp_path, "--rows", "faithful")
    assert rows["faithful"].gap < 0.1
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", causal.names())
def test_structural_models_have_the_density_that_they_say(name):
    """By the change of variables from values to noise; and means by many samples."""
    graph, x, log_density = causal.simulate(name, 2000, 3)
    assert x.shape == (2000, len(graph))
    # each noise, from the equations written once more
    which, form = name.split(", ")
    edges = causal.GRAPHS[which]
    total = torch.zeros(2000)
    inner = 0
    for node in nx.topological_sort(graph):
        loc, scale = torch.zeros(2000), 1.0
        for i, (parent, child) in enumerate(edges):
            if child == node:
                value = x[:, list(graph).index(parent)]
                value = value if form == "linear" else causal.FUNCTIONS[i % 4](value)
                loc = loc + causal.WEIGHTS[i % 4] * value
        if any(child == node for _, child in edges):
            scale, inner = causal.SCALES[inner % 3], inner + 1
        noise = (x[:, list(graph).index(node)] - loc) / scale
        laplace = form == "non-linear" and not any(child == node for _, child in edges)
        law = torch.distributions.Laplace(0.0, 1.0) if laplace else torch.distributions.Normal(0.0, 1.0)
        assert abs(float(noise.mean())) < 5 * float(noise.std()) / math.sqrt(2000)
        total += law.log_prob(noise) - math.log(scale)
    assert torch.allclose(total, log_density, atol=1e-4)


@pytest.mark.slow
def test_a_structural_model_from_training_to_page(tmp_path):
    args = parse(tmp_path, "--study", "--causal", "--only", "collider, non-linear", "--seeds", "1")
    args.seconds, args.num_test = 0.3, 300
    study.main(args)
    page = (tmp_path / "density.md").read_text()
    assert "| collider, non-linear | 1 |" in page
    (row,) = [run for run in Results(args.results).read().values() if run["row"] == "spline"]
    assert math.isfinite(row["gap"])
