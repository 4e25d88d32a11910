"""The density example: its exact numbers, every row on every problem, and (slow) the promised gap."""

import importlib.util
import json
import math
from pathlib import Path

import networkx as nx
import pytest
import torch

PATH = Path(__file__).parent.parent / "examples" / "density.py"
PROTEIN = Path(__file__).parent.parent.parent / "shared" / "data" / "tabular" / "protein_grf.npz"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("density_example", PATH)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(example, tmp_path, *argv):
    args = example.parse([*argv, "--out", str(tmp_path)])
    results = example.main(args)
    summary = json.loads((tmp_path / f"{args.problem}.json").read_text())
    assert [row["row"] for row in summary["rows"]] == [r.row for r in results]
    assert (tmp_path / f"{args.problem}.png").stat().st_size > 0
    return {r.row: r for r in results}


def test_the_entropy_of_the_circuit(example):
    """Two Laplace and six normal terms: 2 (1 + log 2) + 5 H(N(., .1)) + H(N(., 2)) = 1.080 nats."""
    exact = 2 * (1 + math.log(2)) + 3 * (1 + math.log(2 * math.pi)) + 5 * math.log(0.1) + math.log(2)
    assert abs(exact - 1.080) < 5e-4
    columns, log_density = example.circuit_samples(200_000, 0)
    assert abs(-log_density.mean().item() - exact) < 5 * log_density.std().item() / math.sqrt(200_000)
    assert set(columns) == {"z0", "z1", "z2", "z3", "z4", "z5", "x0", "x1"}


def test_the_linear_network_is_right_on_the_tree(example, tmp_path, capsys):
    """The gap of the linear fit is the cost of estimating its parameters: (30 + 31 + 31) / (2 n)."""
    rows = run(
        example,
        tmp_path,
        "--problem",
        "tree",
        "--rows",
        "linear",
        "--num-train",
        "4000",
        "--num-test",
        "2000",
    )
    assert 0 < rows["linear"].gap < 5 * 92 / (2 * 3600)
    assert "tree: test negative log-likelihood" in capsys.readouterr().out


def test_every_row_runs(example, tmp_path):
    pytest.importorskip("zuko")
    rows = run(
        example,
        tmp_path,
        *("--num-train", "400", "--num-test", "100", "--epochs", "1", "--rows", *example.ROWS),
    )
    assert list(rows) == list(example.ROWS)
    assert all(math.isfinite(row.test_nll) for row in rows.values())
    assert rows["linear"].epochs == 0


def test_a_budget_in_seconds(example, tmp_path):
    rows = run(
        example,
        tmp_path,
        *("--num-train", "400", "--num-test", "100", "--seconds", "0.5", "--rows", "faithful"),
    )
    assert rows["faithful"].epochs >= 1


def test_protein_data(example, tmp_path):
    with pytest.raises(SystemExit, match="--data"):
        run(example, tmp_path, "--problem", "protein", "--data", "nowhere.npz")
    if not PROTEIN.is_file():
        pytest.skip("needs the protein data")
    problem = example.protein(PROTEIN)
    assert problem.train.shape == (5002, 11)
    assert problem.test.shape == (2464, 11)
    assert nx.is_directed_acyclic_graph(problem.graph)
    assert problem.graph.number_of_edges() == 20
    assert abs(problem.train.std(0) - 1).max() < 1e-6
    rows = run(
        example,
        tmp_path,
        *("--problem", "protein", "--data", str(PROTEIN), "--epochs", "1", "--rows", "linear", "faithful"),
    )
    assert rows["faithful"].test_nll < rows["linear"].test_nll


def test_the_study_is_restartable_and_draws_its_page(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "STUDY", {"circuit": ("linear", "faithful"), "tree": ("linear",)})
    monkeypatch.syspath_prepend(str(PATH.parent))
    options = ("--study", "--seconds", "0.3", "--seeds", "2", "--num-train", "300", "--num-test", "100")
    args = example.parse([*options, "--out", str(tmp_path)])
    assert example.main(args) == []
    runs = sorted((tmp_path / "density").glob("*.json"))
    assert len(runs) == 6
    before = {path: path.stat().st_mtime_ns for path in runs}
    example.main(example.parse([*options, "--out", str(tmp_path)]))
    assert {path: path.stat().st_mtime_ns for path in runs} == before
    assert (tmp_path / "density" / "curves.png").stat().st_size > 0
    page = (tmp_path / "density.md").read_text()
    ones = [json.loads((tmp_path / "density" / f"circuit-faithful-s{i}.json").read_text()) for i in (0, 1)]
    mean, largest = sum(one["gap"] for one in ones) / 2, max(one["gap"] for one in ones)
    (line,) = (line for line in page.splitlines() if line.startswith("| faithful |"))
    assert f"| {mean:.3f} ± " in line
    assert f"| {largest:.3f} | 2 |" in line


@pytest.mark.slow
def test_the_circuit_is_learned_to_a_tenth_of_a_nat(example, tmp_path):
    rows = run(example, tmp_path, "--rows", "faithful")
    assert rows["faithful"].gap < 0.1
    assert torch.get_default_dtype() == torch.float32
