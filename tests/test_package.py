"""The package as a whole: a silent import, its version, its messages, its types."""

import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyro_graphflows
from pyro_graphflows import auto_faithful_guide, faithful_inverse, fit, load_network
from pyro_graphflows.graphs import AutoOrder

ROOT = Path(__file__).parent.parent
CALLS = Path(__file__).parent / "typed_calls.py"


def run(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False, cwd=ROOT
    )


def test_import_is_silent_with_warnings_as_errors():
    done = run("-W", "error", "-c", "import pyro_graphflows")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {pyro_graphflows.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest.split()[1] == pyro_graphflows.__version__


def test_long_work_is_logged_under_the_name_of_the_library(caplog):
    caplog.set_level(logging.DEBUG, "pyro_graphflows")
    network = load_network("magic-niab")
    faithful_inverse(network.graph(), AutoOrder(seconds=0.01))
    searched = [record for record in caplog.records if record.name.startswith("pyro_graphflows.graphs")]
    assert any("Searched for an order" in record.getMessage() for record in searched)

    model = typed_calls().model
    x, y = torch.randn(20), torch.randn(20)
    guide = auto_faithful_guide(model, x, y)
    history = fit(model, guide, (x, y), schedule=2, progress=False)
    messages = [record.getMessage() for record in caplog.records]
    assert any("Traced the model: 1 latent sites" in message for message in messages)
    assert f"Training ended: {history!r}" in messages
    assert sum(message.startswith("Epoch ") for message in messages) == 2
    assert all(record.levelno <= logging.INFO for record in caplog.records)


def typed_calls():
    return type(
        "Calls", (), {k: staticmethod(v) for k, v in runpy.run_path(str(CALLS)).items() if callable(v)}
    )


@pytest.mark.slow
def test_mypy_accepts_public_calls():
    pytest.importorskip("mypy")
    done = run("-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports", str(CALLS))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_public_calls_do_what_their_types_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a checkpoint and a picture are written
    calls = typed_calls()
    x, y = torch.randn(50), torch.randn(50)
    guide = calls.of_guides(x, y, tmp_path / "guide.safetensors")
    assert isinstance(guide, pyro_graphflows.AutoFaithfulGuide)
    assert isinstance(calls.of_inference(guide, x, y), pyro_graphflows.Posterior)
    assert calls.of_graphs() == pytest.approx(0.0, abs=1e-8)
    assert calls.of_flows().sample().shape == (8,)
