"""Training by two processes is training by one; a lost worker does no harm; draws of several workers join."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "distributed"
SIZES = ["--steps", "12", "--batch-size", "60", "--every", "4"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]


def run(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def reports(folder, *ranks):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in ranks]


@pytest.mark.parametrize("loss", ["elbo", "iwae"])
def test_two_processes_are_one_process_with_two_shards(tmp_path, loss):
    script = str(FOLDER / "ddp.py")
    run(script, *SIZES, "--loss", loss, "--shards", "2", "--out", str(tmp_path / "one"))
    run(*TWO, script, *SIZES, "--loss", loss, "--out", str(tmp_path / "two"))
    (one,) = reports(tmp_path / "one", 0)
    first, second = reports(tmp_path / "two", 0, 1)
    assert first["parameters"] == second["parameters"]
    np.testing.assert_allclose(first["losses"], one["losses"], rtol=0, atol=1e-6 * abs(one["losses"][0]))
    np.testing.assert_allclose(second["losses"], first["losses"], rtol=0, atol=0)
    np.testing.assert_allclose(first["parameters"], one["parameters"], rtol=0, atol=1e-6)
    assert len(set(one["losses"])) == 12  # it did move


def test_a_lost_worker_does_no_harm(tmp_path):
    script = str(FOLDER / "ddp.py")
    run(script, *SIZES, "--shards", "2", "--out", str(tmp_path / "one"))
    run(*TWO, "--max-restarts", "3", script, *SIZES, "--kill", "1", "6", "--out", str(tmp_path / "two"))
    (one,) = reports(tmp_path / "one", 0)
    first, second = reports(tmp_path / "two", 0, 1)
    assert first["started_at"] == second["started_at"] == 4  # the last checkpoint before the loss
    assert first["parameters"] == second["parameters"]
    np.testing.assert_allclose(first["losses"], one["losses"], rtol=0, atol=1e-6 * abs(one["losses"][0]))
    np.testing.assert_allclose(first["parameters"], one["parameters"], rtol=0, atol=1e-6)


def test_draws_of_several_workers_join():
    words = ["--steps", "50", "--num-draws", "400", "--num-simulations", "5", "--workers", "2"]
    printed = run(str(FOLDER / "draws.py"), *words)
    assert "400 draws by 2 workers" in printed
    assert "10 simulated data sets of 50 rows" in printed


def test_fabric(tmp_path):
    pytest.importorskip("lightning_fabric")
    words = [
        "--epochs",
        "1",
        "--num-data",
        "200",
        "--batch-size",
        "100",
        "--checkpoint",
        str(tmp_path / "f.ckpt"),
    ]
    assert "1 processes, 1 epochs" in run(str(FOLDER / "fabric.py"), *words)
