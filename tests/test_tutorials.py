"""Tutorials run from beginning to end, in their short form, and are stored with the outputs of a full run."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))


def test_there_are_tutorials():
    assert TUTORIALS


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[] if p.stem.startswith(("01", "02")) else pytest.mark.slow) for p in TUTORIALS],
    ids=lambda path: path.stem,
)
def test_tutorial_runs(path):
    environment = {**os.environ, "CI": "true", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # A pytest of its own: this one's settings (doctests, warnings as errors) are for modules.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbmake",
        "--nbmake-timeout=240",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-o", "addopts=", "-o", "filterwarnings=", "--rootdir", str(ROOT), str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_is_stored_with_outputs_and_has_a_short_form(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [
        output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert sum('SMOKE = "CI" in os.environ' in cell.source for cell in code) == 1
    assert notebook.cells[0].source.startswith("# ")
