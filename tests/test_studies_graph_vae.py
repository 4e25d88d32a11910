"""The Graph VAE study at tiny size: a run that is interrupted is the same run; pages from what is there."""

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pyro_graphflows import GraphVAE, ModelGraph, is_imap
from studies.graph_vae import faithful, report, synthetic
from studies.graph_vae import run as graph_vae
from studies.graph_vae import training as runs
from studies.results import Results


@pytest.fixture(autouse=True)
def _as_a_script(_clean_slate):
    """Scripts run in single precision and set global switches; put them back."""
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    pyro.enable_validation(True)


def places(folder):
    """Return the flags of a study in a folder."""
    names = {"--results": "results.jsonl", "--out": "", "--work": "work"}
    return [part for flag, name in names.items() for part in (flag, str(folder / name))]


def arguments(folder, *flags):
    tiny = "--limit 60 --ll-images 5 --ll-particles 5 --ll-every 2 --final-images 6 --final-particles 7 --no-progress"
    tiny += " --no-verbose --batch-size 32"
    return graph_vae.parser().parse_args([*tiny.split(), *places(folder), *flags])


def record_of(folder, name):
    return Results(folder / "results.jsonl").get(name)


def test_interrupted_run_is_the_same_run(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    graph_vae.main(arguments(whole, "--structures", "learned", "--epochs", "4", "--decay-every", "2"))
    for epochs in ("2", "4"):
        graph_vae.main(arguments(parts, "--structures", "learned", "--epochs", epochs, "--decay-every", "2"))
    expected, got = (record_of(folder, "digits-learned-s0") for folder in (whole, parts))
    assert [row["epoch"] for row in got["curve"]] == [1, 2, 3, 4]
    assert set(got["finals"]) == {"2", "4"}
    for a, b in zip(expected["curve"], got["curve"], strict=True):
        for key in ("train_loss", "validation_loss", "gates"):
            assert a[key] == b[key], (a["epoch"], key)
    assert expected["finals"]["4"]["elbo"] == got["finals"]["4"]["elbo"]
    weights = [torch.load(f / "work" / "digits-learned-s0-4.pt", weights_only=True) for f in (whole, parts)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_fast_gates_are_frozen_and_found_again(tmp_path):
    flags = ["--structures", "learned", "--gate-rate", "20", "--freeze-after", "2"]
    for epochs in ("1", "4"):  # interrupted before the freezing
        graph_vae.main(arguments(tmp_path, *flags, "--epochs", epochs))
    record = record_of(tmp_path, "digits-learned-gates20-frozen2-s0")
    gates = [row["gates"] for row in record["curve"]]
    moved = max(abs(p - 0.5) for line in gates[0] for p in line if p)
    assert (
        0.005 < moved < 2 * 20e-3
    )  # two steps of 20 times 1e-3 in the logit, a quarter of that in the probability
    assert {p for line in gates[2] for p in line} <= {0.0, 1.0}
    final = record["finals"]["4"]["gates"]
    assert final in gates[record["finals"]["4"]["best_epoch"] - 1 :][:1] or final == gates[3]
    plain = arguments(tmp_path, "--structures", "learned", "--epochs", "1")
    graph_vae.main(plain)
    slow = record_of(tmp_path, "digits-learned-s0")["curve"][0]["gates"]
    assert 0 < max(abs(p - 0.5) for line in slow for p in line if p) < moved / 5


def test_a_run_that_is_killed_goes_on_after_its_last_epoch(tmp_path, monkeypatch):
    flags = ["--structures", "learned", "--epochs", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    graph_vae.main(arguments(whole, *flags))
    bound, calls = runs.bound, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return bound(*args)

    monkeypatch.setattr(runs, "bound", killed)
    with pytest.raises(RuntimeError, match="killed"):
        graph_vae.main(arguments(parts, *flags))
    assert not (parts / "results.jsonl").exists()
    assert (parts / "work" / "digits-learned-s0.progress.json").exists()
    monkeypatch.setattr(runs, "bound", bound)
    with pytest.raises(SystemExit, match=r"is of a run with lr=0\.001, not 0\.01"):
        graph_vae.main(arguments(parts, *flags, "--lr", "0.01"))
    graph_vae.main(arguments(parts, *flags))
    assert not (parts / "work" / "digits-learned-s0.progress.json").exists()
    one, other = (record_of(folder, "digits-learned-s0") for folder in (whole, parts))
    assert [row["epoch"] for row in other["curve"]] == [1, 2, 3]
    assert [row["train_loss"] for row in one["curve"]] == [row["train_loss"] for row in other["curve"]]
    assert one["finals"]["3"]["elbo"] == other["finals"]["3"]["elbo"]


def test_what_is_there_is_not_done_again(tmp_path, capsys):
    flags = ["--structures", "full", "--epochs", "1"]
    graph_vae.main(arguments(tmp_path, *flags))
    path = tmp_path / "results.jsonl"
    first, record = path.read_text(), record_of(tmp_path, "digits-full-s0")
    graph_vae.main(arguments(tmp_path, *flags))
    assert path.read_text() == first
    graph_vae.main(arguments(tmp_path, *flags, "--final-bound-samples", "3"))
    assert path.read_text().startswith(first)
    final, before = record_of(tmp_path, "digits-full-s0")["finals"]["1"], record["finals"]["1"]
    assert final["bound_samples"] == 3
    assert final["elbo"] != before["elbo"]
    assert final["likelihood"] == before["likelihood"]
    (tmp_path / "work" / "digits-full-s0-1.pt").unlink()
    graph_vae.main(arguments(tmp_path, *flags, "--pictures"))
    assert "the weights are not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--limit", "50"],
            r"results\.jsonl: digits-full-s0 is of a run with limit=60, not 50\. Remove its line",
        ),
        (["--lr", "0.01", "--decay-every", "7"], "lr=0.001, not 0.01; decay_every=200, not 7"),
        (["--epochs", "1"], "is of 2 epochs, more than the 1 asked for"),
    ],
)
def test_figures_of_other_settings_are_not_taken(tmp_path, flags, message):
    common = ["--structures", "full", "--epochs", "2"]
    graph_vae.main(arguments(tmp_path, *common))
    first = (tmp_path / "results.jsonl").read_text()
    with pytest.raises(SystemExit, match=message):
        graph_vae.main(arguments(tmp_path, *common, *flags))
    assert (tmp_path / "results.jsonl").read_text() == first


def test_numbers_of_flags_are_positive(capsys):
    for flag in ("--epochs", "--num-nodes", "--limit", "--batch-size", "--threads"):
        with pytest.raises(SystemExit):
            graph_vae.parser().parse_args([flag, "0"])
        assert f"{flag}: expected a positive number; got 0" in capsys.readouterr().err


def test_weights_of_another_architecture(tmp_path):
    flags = ["--structures", "full", "--epochs", "1"]
    graph_vae.main(arguments(tmp_path, *flags))
    weights = tmp_path / "work" / "digits-full-s0-1.pt"
    torch.save(GraphVAE((8, 8), 5, 4, "full", hidden_dim=8).state_dict(), weights)
    with pytest.raises(SystemExit, match=r"weights of this architecture in .*digits-full-s0-1\.pt"):
        graph_vae.main(arguments(tmp_path, *flags))


@pytest.mark.slow
def test_the_whole_study_at_small_size(tmp_path, capsys, monkeypatch):
    """From nothing, with a folder that lacks the image files; a second call goes on where the first was stopped."""
    monkeypatch.delenv("PYRO_GRAPHFLOWS_DATA", raising=False)
    monkeypatch.setattr(
        faithful, "exact_gaps", lambda graph, num_draws=20, whole=faithful.exact_gaps: whole(graph, 1)
    )
    flags = ["--study", "--epochs", "1", "--limit", "40", "--final-particles", "10", "--no-verbose"]
    flags += [*places(tmp_path), "--data", str(tmp_path)]
    args = graph_vae.parser().parse_args(flags)
    train, done = runs.train, []

    def train_and_stop(run, args, data):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run.name)
        return train(run, args, data)

    monkeypatch.setattr(graph_vae, "train", train_and_stop)
    with pytest.raises(KeyboardInterrupt):
        graph_vae.main(args)
    stopped = (tmp_path / "results.jsonl").read_bytes()
    assert set(done) < set(Results(tmp_path / "results.jsonl").read())
    monkeypatch.setattr(graph_vae, "train", train)
    graph_vae.main(args)
    output = capsys.readouterr().out
    assert "Left out: binarized_mnist, learned. Expected fixed binarised MNIST in" in output
    assert (tmp_path / "results.jsonl").read_bytes().startswith(stopped)
    keys = [line.split(b'"')[3] for line in (tmp_path / "results.jsonl").read_bytes().splitlines()]
    assert len(keys) == len(set(keys))  # nothing was done twice
    page = (tmp_path / "graph_vae.md").read_text()
    for heading in ("## Digits", "## A known latent graph", "## Number of nodes"):
        assert heading in page
    assert page.count("| 5 |") >= 4  # five seeds of each structure


def test_bound_and_likelihood_are_those_of_the_library(tmp_path):
    pyro.set_rng_seed(0)
    vae = GraphVAE((8, 8), 3, 2, **runs.SMALL_NETWORKS)
    data = runs.Data("digits", None, torch.device("cpu"), 40)
    vae.guide(data.test)  # running statistics
    vae.model(data.test)
    elbo, kl = runs.bound(vae, data.test, 200)
    assert vae.training
    vae.eval()
    losses = torch.tensor([TraceMeanField_ELBO().loss(vae.model, vae.guide, data.test) for _ in range(100)])
    spread = losses.std() / len(data.test)
    assert abs(elbo + losses.mean() / len(data.test)) < 4.5 * spread * (1 / 100 + 1 / 200) ** 0.5
    assert set(kl) == {"z1", "z2", "z3"}
    assert all(value > 0 for value in kl.values())
    found = runs.likelihood(vae, data.test, 500)
    assert found["ll"] > elbo
    assert (found["images"], found["particles"]) == (40, 500)


def test_pages_and_pictures(tmp_path):
    flags = ["--epochs", "2", "--structures", "learned", "full", "chain", "independent", "--seeds", "0", "1"]
    graph_vae.main(arguments(tmp_path, *flags))
    graph_vae.main(arguments(tmp_path, "--epochs", "2", "--structures", "learned", "--pictures"))
    small = ["--epochs", "2", "--num-data", "200", "--num-test", "50", "--particles", "10", *places(tmp_path)]
    synthetic.main(synthetic.parser().parse_args(small))
    small = ["--epochs", "1", "--guide-epochs", "1", "--limit", "60", "--particles", "10"]
    small += [
        "--bound-samples",
        "2",
        "--seeds",
        "0",
        "--hidden-dims",
        "32",
        "--flow-seeds",
        "--sample-epochs",
        "1",
    ]
    small += ["--sample-steps", "2", "--model-samples", "20", *places(tmp_path)]
    faithful.main(faithful.parser().parse_args(small))
    before = (tmp_path / "results.jsonl").read_bytes()
    faithful.main(faithful.parser().parse_args(small))
    assert (tmp_path / "results.jsonl").read_bytes() == before  # the exact part neither
    with pytest.raises(
        SystemExit, match=r"faithful-s0 is of a run with --sample-steps 2, not 3\. Remove its line"
    ):
        faithful.main(faithful.parser().parse_args([*small, "--sample-steps", "3"]))
    page = report.render(tmp_path / "results.jsonl", tmp_path).read_text()
    for text in (
        "## Digits",
        "learned (Graph VAE)",
        "## A known latent graph",
        "learned, edge cost",
        "page of its own",
    ):
        assert text in page
    assert "Fixed binarised MNIST" not in page  # nothing was run
    rows = [line for line in page.splitlines() if line.startswith("| independent (VAE)")]
    assert len(rows) == 1
    elbos = [record_of(tmp_path, f"digits-independent-s{seed}")["finals"]["2"]["elbo"] for seed in (0, 1)]
    assert f"{np.mean(elbos):.3f} ± {np.std(elbos, ddof=1):.3f}" in rows[0]
    others = [record_of(tmp_path, f"digits-full-s{seed}")["finals"]["2"]["elbo"] for seed in (0, 1)]
    difference = np.subtract(others, elbos)
    row = next(line for line in page.splitlines() if line.startswith("| full (FC-VAE)"))
    assert f"{difference.mean():+.3f} ± {difference.std(ddof=1) / 2**0.5:.3f}" in row
    assert "| faithful, fewest edges | 1 |" in (tmp_path / "graph_vae_faithful.md").read_text()
    pictures = {path.name for path in (tmp_path / "graph_vae").glob("*.png")}
    assert pictures >= {"digits-gates.png", "digits-learned-s0-images.png", "digits-learned-s0-embedding.png"}
    named = {
        part.split(")")[0].removeprefix("graph_vae/") for part in page.split("](")[1:] if ".png" in part[:60]
    }
    assert named <= pictures


def test_faithful_inverses_of_random_structures():
    rng = np.random.default_rng(1)
    for _ in range(30):
        graph = faithful.observed_graph(
            faithful.random_edges(rng, 5, 0.5), [f"z{i}" for i in range(5, 0, -1)]
        )
        inverses = faithful.inverses(graph)
        assert is_imap(inverses["faithful, fewest edges"])
        assert inverses["shared gates"].sampling_order == graph.latent
        assert is_imap(inverses["faithful, model's order"])
        edges = [
            {(a, b) for b, above in inverses[name].parents.items() for a in above}
            for name in ("shared gates", "faithful, model's order", "full")
        ]
        assert edges[0] <= edges[1] <= edges[2]  # what is said of them
    collider = ModelGraph([("z3", "z1"), ("z2", "z1"), ("z1", "x")], ["x"])
    assert not is_imap(faithful.shared_inverse(collider))
    gaps = faithful.exact_gaps(collider, 3)
    assert gaps["shared gates"]["gap"] > 0.001
    assert gaps["faithful, fewest edges"]["gap"] < 1e-9


def test_synthetic_data_have_the_graph_they_claim():
    """Partial correlations of the latent values follow the edges: the noise of x is small beside them."""
    x = synthetic.sample(200_000, 0).double().numpy()
    z1, z2, z3, z4, z5 = x.T

    def r(a, b):
        return np.corrcoef(a, b)[0, 1]

    assert abs(r(z4, z5)) < 0.01
    assert abs(r(z2, z5)) < 0.01
    assert min(r(z3, z4), r(z3, z5), r(z2, z4), r(z1, z3)) > 0.4


def test_columns_belong_to_nodes():
    for row in synthetic.ROWS:
        vae = synthetic.make_vae(row, 0.03)
        columns = synthetic.decoder_columns(vae)
        assert sorted(columns) == [0, 1, 2, 3, 4]
        assert [f"z{c + 1}" for c in columns] == list(vae.names)
