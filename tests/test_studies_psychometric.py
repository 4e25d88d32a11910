import sys

import numpy as np
import pytest
import torch

from studies.psychometric import report, run
from studies.psychometric.curves import FILE, STIMULI, curve, data_folder, model, read
from studies.results import Results


@pytest.fixture
def folder(tmp_path):
    """A few data sets in the form of the file."""
    generator = np.random.default_rng(0)
    trials = generator.integers(2, 40, (12, 9)).astype(np.int16)
    np.savez(
        tmp_path / FILE,
        stimulus=STIMULI.numpy(),
        n_trials=trials,
        n_right=generator.binomial(trials, np.linspace(0.1, 0.9, 9)).astype(np.int16),
        ref_index=np.array([1, 7], dtype=np.int32),
        ref_mean=np.full((2, 4), 0.1),
        ref_sd=np.full((2, 4), 0.1),
    )
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(run, "BATCH", 8)
    monkeypatch.setattr(run, "NUM_DRAWS", 60)
    monkeypatch.setattr(run, "CHAINS", 2)
    monkeypatch.setattr(run, "SAMPLES", 8)
    monkeypatch.setattr(run, "KERNEL", run.HMC(warmup=4))
    monkeypatch.setattr(run, "TRUSTED", -10.0)
    monkeypatch.setattr(run, "NUTS_SAMPLE", 1)
    monkeypatch.setattr(run, "NUTS_WARMUP", 2)
    monkeypatch.setattr(run, "NUTS_DRAWS", 6)


def test_the_curve():
    zero = torch.zeros(1)
    p = curve(zero + 0.1, zero + 0.2, zero, zero + 0.1)[0]
    assert p[0].item() == pytest.approx(0.1, abs=1e-5)
    assert p[-1].item() == pytest.approx(0.8, abs=1e-5)
    assert p[4].item() == pytest.approx(0.1 + 0.7 * 0.5, abs=1e-5)
    assert (p.diff() >= 0).all()


def test_without_the_data_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PSYCHOMETRIC_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["run", "--data", str(tmp_path), "--results", str(tmp_path / "r.jsonl")])
    run.main()
    assert "is not there: give its folder by --data" in capsys.readouterr().out
    assert not (tmp_path / "r.jsonl").exists()
    assert data_folder(None) is None


def test_all_steps_and_going_on(folder, small, tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    argv = [
        "run",
        "--data",
        str(folder),
        "--results",
        str(results),
        "--work",
        str(tmp_path / "work"),
        "--train",
        "0.2",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(
        "pyro_graphflows.infer.surprise.NUM_DRAWS", 200
    )  # enough for the words, not for the figures
    run.main()
    records = Results(results).read()
    assert set(records) == {"train", "draws 0", "refine 0", "surprise", "nuts 1"}
    assert len(records["draws 0"]["khat"]) == 12
    assert set(records["draws 0"]["errors"]) == {"1", "7"}
    assert len(records["refine 0"]["rhat"]) == 12
    assert len(records["surprise"]["tail"]) == 12
    before = results.read_text()
    run.main()  # nothing is left to do
    assert results.read_text() == before
    report.render(results, tmp_path / "none.jsonl", tmp_path)
    page = (tmp_path / "workflow.md").read_text()
    assert "12 data sets" in page
    assert "make psychometric" in page


def test_the_model_is_that_of_the_reference():
    """The mean of the posterior of one data set on a coarse grid of the model's own densities is in the support."""
    import pyro

    trials = torch.full((1, 9), 10.0)
    trace = pyro.poutine.trace(model).get_trace(trials, trials)
    assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == {
        "data",
        "gamma",
        "lambd",
        "m",
        "sigma",
        "n_right",
    }
    assert trace.nodes["n_right"]["fn"].event_shape == (9,)


def test_reading(folder):
    curves = read(folder)
    assert len(curves) == 12
    assert curves.reference.tolist() == [1, 7]
