"""The SIReN-VAE study in small: runs, resuming, rates, wrong structures, pages."""

import json
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
import torch

from pyro_graphflows import VAE, GraphflowsError, ModelGraph, SIReNVAE, load_network
from studies.results import Results
from studies.siren_vae import report, tables
from studies.siren_vae import run as siren_vae
from studies.siren_vae import training as runs
from studies.siren_vae.cells import Cells

ROOT = Path(__file__).parent.parent


def places(folder):
    """Return the flags of a study in a folder."""
    names = {"--results": "results.jsonl", "--out": "", "--work": "work"}
    return [part for flag, name in names.items() for part in (flag, str(folder / name))]


def arguments(folder, *flags):
    return siren_vae.parser().parse_args([*places(folder), *flags])


def call(module, *flags):
    command = [sys.executable, "-m", f"studies.siren_vae.{module}", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_command_line(tmp_path):
    flags = [
        "--network",
        "magic-niab",
        "--lr",
        "0.01",
        "--max-epochs",
        "2",
        "--num-particles",
        "3",
        *places(tmp_path),
    ]
    done = call("run", *flags)
    assert done.returncode == 0, done.stderr
    assert "magic-niab-faithful-2x: excess" in done.stdout
    path = tmp_path / "results.jsonl"
    ((name, result),) = Results(path).read().items()
    assert name == "magic-niab-faithful-2x-lr0.01-s0"
    assert result["epochs"] == 2
    assert result["num_train"] == 88
    assert result["test"]["true_nll"] == pytest.approx(load_network("magic-niab").entropy(), abs=0.3)
    done = call("report", *places(tmp_path)[:4])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "siren_vae.md").read_text().startswith("# SIReN-VAE on Bayesian networks")
    done = call("run", *flags, "--max-epochs", "3")
    assert done.returncode == 1
    assert f"{path}: {name} is the result of at most 2 epochs and 3 importance samples" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variant", "ind"], "there are --variant vae, --variant ind --flow graphical, "),
        (["--patience", "33"], r"Rates are tried with --patience 0 or 10 .* got 33\. Give --lr"),
        (["--network", "magic"], "one of ecoli70, arth150"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, flags, message):
    with pytest.raises((SystemExit, GraphflowsError), match=message):
        siren_vae.main(arguments(tmp_path, *flags, "--max-epochs", "1"))


def test_numbers_of_flags_are_positive(capsys):
    for flag in ("--seeds", "--train-multiple", "--max-epochs", "--num-particles", "--workers"):
        with pytest.raises(SystemExit):
            siren_vae.parser().parse_args([flag, "0"])
        assert f"{flag}: expected a positive number; got 0" in capsys.readouterr().err


def test_settings_are_chosen_once_and_runs_are_kept(tmp_path):
    torch.set_default_dtype(torch.float32)
    args = arguments(tmp_path, "--max-epochs", "3", "--num-particles", "4", "--study", "table")
    job = siren_vae.Job({"network": "magic-niab", "row": "vae", "multiple": 2}, 2, by_loss=True)
    siren_vae.do_job(job, args)
    before = args.results.read_bytes()
    by_setting = {
        (r["run"]["lr"], r["run"]["patience"]): r
        for r in Results(args.results).read().values()
        if r["run"]["seed"] == 0
    }
    assert set(by_setting) == set(runs.settings_of(2))
    best = runs.pick_setting({s: r["validation_nll"] for s, r in by_setting.items()})
    loss = runs.pick_setting({s: r["train_loss"] for s, r in by_setting.items()})
    assert {s for s, r in by_setting.items() if r["test"]} == {best, loss}
    assert [epoch for epoch, _ in by_setting[best]["validation_curve"]] == [1, 2]
    for state in args.work.iterdir():  # results are kept, states are not: nothing is trained anew
        state.unlink()
    siren_vae.do_job(job, args)
    assert args.results.read_bytes() == before
    results = Cells(args.results)
    found = results.cell("magic-niab", "vae", 2)
    assert (len(found), results.setting("magic-niab", "vae", 2)) == (2, best)
    page = report.render(args.results, tmp_path).read_text()
    assert f"{sum(r['test']['nll_100'] for r in found) / 2:.2f} ± " in page
    assert "| magic-niab | *true network* |" in page


def test_what_is_left_out_of_the_choice_is_shown(tmp_path):
    """A setting that is not among those to choose from is on the page, and says whether it would have been chosen."""
    results = Results(tmp_path / "results.jsonl")
    figures = (
        "excess",
        "nll",
        "re",
        "nll_100",
        "re_100",
        "excess_100",
        "true_nll",
        "entropy",
        "negative_elbo",
    )
    test = dict.fromkeys(figures, 1.0)
    about = {"epochs": 61, "train_loss": 1.0, "test": test, "validation_curve": [], "parameters": 7}
    for row, patience, nll in (("vae", 10, 30.0), ("vae", 0, 31.0), ("ind", 10, 90.0), ("ind", 0, 32.0)):
        run = {
            "network": "ecoli70",
            "row": row,
            "multiple": 2,
            "seed": 0,
            "lr": 0.1,
            "remedy": "",
            "perturbation": "",
        }
        results.append(
            f"{row}-{patience}", {"run": {**run, "patience": patience}, "validation_nll": nll, **about}
        )
    assert [row for _, row, _ in tables.left_out(Cells(results.path))] == ["vae", "ind"]
    page = report.render(results.path, tmp_path).read_text()
    assert "| ecoli70 | VAE | 0.1, 10 | 61 | 30.000 | 31.000 (0.1, 60) | 1.000 (1) |" in page
    assert "| ecoli70 | SIReN-VAE ind, GRF | 0.1, 10 | 61 | 90.000 | 32.000 (0.1, 60) |" in page
    assert "1 of these 2 trainings ended more than ten nats above the chosen setting" in page
    assert "would have chosen it for VAE on ecoli70." in page


def test_the_page_says_which_differences_are_within_their_errors(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    excess = {"true": (0.0, 1.0, 2.0), "ind": (0.1, 0.9, 2.1), "FC": (1.0, 2.2, 3.0)}
    excess |= {"faithful": (0.5, 0.4, 1.5), "vae": (9.0,)}
    for row, values in excess.items():
        for seed, value in enumerate(values):
            run = {"network": "magic-niab", "row": row, "multiple": 2, "seed": seed, "lr": 0.01, "remedy": ""}
            about = {"validation_nll": 1.0, "train_loss": 1.0, "test": {"excess": value}}
            results.append(f"{row}-{seed}", {"run": {**run, "patience": 0, "perturbation": ""}, **about})
    cells = Cells(results.path)
    # true - ind: -0.1, 0.1, -0.1, half a standard error; faithful - ind: 0.4, -0.5, -0.6, less than one;
    # true - FC: -1, -1.2, -1, far beyond; faithful - FC: -0.5, -1.8, -1.5, three.
    assert tables.small_differences(cells) == (
        "Differences of the true network that are within one standard error: magic-niab, GRF against ind; magic-niab, "
        "faithful flow against ind. Between one and two: none."
    )


def test_remedies_and_wrong_structures(tmp_path):
    torch.set_default_dtype(torch.float32)
    args = arguments(tmp_path, "--max-epochs", "2", "--num-particles", "4")
    results = Results(args.results)
    for remedy in runs.REMEDIES:
        if remedy != "average":  # has a number of epochs of its own
            run = runs.Run("magic-niab", "faithful", 2, 0, 1e-2, remedy=remedy)
            assert runs.train(run, results, args)["epochs"] == 2
    for how in ("reverse-50", "add-10"):
        run = runs.Run("ecoli70", "faithful", 2, 0, 1e-2, patience=10, perturbation=how)
        assert runs.test(run, results, args)["test"]["excess"] > 0
    page = report.render(args.results, tmp_path).read_text()
    assert "## Remedies against few data" in page
    robustness = (tmp_path / "siren_vae_robustness.md").read_text()
    assert "| reversed | – | – | – | " in robustness
    assert (tmp_path / "siren_vae" / "robustness.png").exists()


def test_testing_a_run_that_is_not_there_trains_it(tmp_path):
    torch.set_default_dtype(torch.float32)
    found = {}
    for epochs in (1, 40):
        args = arguments(tmp_path / str(epochs), "--max-epochs", str(epochs), "--num-particles", "10")
        result = runs.test(runs.Run("ecoli70", "vae", 2, 0, 1e-2), Results(args.results), args)
        found[epochs] = result["test"]["excess"]
    assert found[40] < found[1] - 0.5


def test_settings():
    assert runs.pick_setting({1e-1: 31.7, 1e-2: 31.86, 1e-3: None}) == 1e-1
    assert runs.pick_setting({1e-1: None}) is None
    assert {patience for _, patience in runs.settings_of(2)} == {0, 10}
    assert runs.settings_of(2, 10) == [(1e-2, 10), (1e-3, 10)]
    assert {rate for rate, _ in runs.settings_of(100)} == {1e-1, 1e-2, 1e-3}


def test_jobs_of_the_study():
    jobs = siren_vae.jobs_of("all")
    assert siren_vae.jobs_of("table") == jobs[: len(siren_vae.jobs_of("table"))]
    table = {tuple(job.cell.values()): job.seeds for job in siren_vae.jobs_of("table")}
    assert len(table) == 4 * 5 * 2
    assert {table[n, "faithful", 2] for n in siren_vae.NETWORKS} == {5}
    assert table["arth150", "faithful", 100] == 1
    wrong = [job for job in siren_vae.jobs_of("robustness") if "perturbation" in job.cell]
    assert len(wrong) == 2 * 3 * 3
    assert all(job.setting == runs.robustness_setting(job.cell["multiple"]) for job in wrong)
    for part in ("table", "robustness", "remedies", "blocks", "figure", "patience"):  # workers share no run
        asked = [(*job.cell.items(), job.setting, job.patience) for job in siren_vae.jobs_of(part)]
        assert len(asked) == len(set(asked))


def test_perturbed_graphs():
    graph = load_network("ecoli70").graph()
    edges = set(graph.edges)
    for percent, count in ((10, 7), (25, 18), (50, 35)):
        for seed in range(3):
            removed, added, reverse = (
                runs.perturbed(graph, how, percent, seed) for how in ("remove", "add", "reverse")
            )
            assert set(removed.edges) < edges
            assert len(removed.edges) == 70 - count
            assert set(added.edges) > edges
            assert len(added.edges) == 70 + count
            turned = {(b, a) for a, b in set(reverse.edges) - edges}
            assert len(turned) == count
            assert turned == edges - set(reverse.edges)
            for other in (removed, added, reverse):
                assert nx.is_directed_acyclic_graph(other.to_networkx())
                assert set(other.observed) == set(graph.observed)
                assert set(other.latent) == set(graph.latent)
    assert runs.perturbed(graph, "add", 10, 1).edges != runs.perturbed(graph, "add", 10, 2).edges
    assert runs.perturbed(graph, "add", 10, 1) == runs.perturbed(graph, "add", 10, 1)
    assert ModelGraph(graph.to_networkx(), graph.observed) == graph


@pytest.mark.parametrize("how", ["reverse-50", "add-50", "remove-50"])
def test_columns_of_data_are_those_of_the_nodes(tmp_path, how):
    """Reversed arcs change the order of the graph's observed nodes, and so that of the columns of data."""
    torch.set_default_dtype(torch.float32)
    args = arguments(tmp_path, "--max-epochs", "1")
    run = runs.Run("ecoli70", "faithful", 2, 0, 1e-2, perturbation=how)
    runs.train(run, Results(args.results), args)
    state = torch.load(args.work / f"{run.name}.pt", weights_only=True)
    network = load_network("ecoli70")
    graph = runs.make_model(run, network.graph()).graph
    assert (graph.observed != network.graph().observed) == how.startswith("reverse")
    x = runs.draw(network, 92, 0, 0)
    means = {node: float(x[:, i].mean()) for i, node in enumerate(network.observed)}
    torch.testing.assert_close(
        state["observation.loc"], torch.tensor([means[node] for node in graph.observed])
    )


def test_free_parameters():
    graph = ModelGraph([("a", "x"), ("b", "y")], ["x", "y"])
    x = torch.randn(20, 2)
    plain = VAE(graph, hidden_dim=3)
    assert runs.free_parameters(plain, x) == sum(p.numel() for p in plain.parameters())
    masked = SIReNVAE(graph, decoder_units=1)
    before = [p.clone() for p in masked.parameters()]
    # Each of two unconnected pairs has the parameters that a model of one pair has.
    one = SIReNVAE(ModelGraph([("a", "x")], ["x"]), decoder_units=1)
    assert runs.free_parameters(masked, x) == 2 * runs.free_parameters(one, x[:, :1])
    assert runs.free_parameters(masked, x) < sum(p.numel() for p in masked.parameters())
    assert all(p.equal(old) for p, old in zip(masked.parameters(), before, strict=True))


def test_mean_of_weights():
    layer = torch.nn.Linear(1, 1, bias=False)
    average = runs.Average(layer, 1)
    for epoch, value in enumerate([5.0, 1.0, 2.0, 6.0], start=1):
        layer.weight.data.fill_(value)
        average([0.0] * epoch)
    average.load()
    assert layer.weight.item() == pytest.approx(3.0)


def test_networks_of_a_folder(tmp_path):
    node = {"parents": [], "intercept": 1.0, "coefficients": [], "sd": 2.0}
    child = {"name": "x", "parents": ["z"], "intercept": 0.0, "coefficients": [3.0], "sd": 1.0}
    (tmp_path / "tiny.json").write_text(json.dumps({"nodes": [{"name": "z", **node}, child]}))
    network = runs.network_of("tiny", tmp_path)
    assert (network.observed, network.scales["z"]) == (("x",), 2.0)
