"""Every script in examples/ runs; a script that is in no list fails the test."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "quickstart.py": [
        *("--network", "magic-niab", "--num-data", "200", "--num-test", "50"),
        *("--num-evidence", "10", "--epochs", "1"),
    ],
}
TESTED_ELSEWHERE = {
    *("binary_tree.py", "binary_tree_measures.py", "binary_tree_report.py"),
    *("density.py", "density_report.py"),
    *("siren_vae.py", "siren_vae_digits.py", "siren_vae_report.py", "siren_vae_runs.py"),
    *("siren_vae_results.py", "siren_vae_tables.py", "siren_vae_figures.py"),
    *("graph_vae.py", "graph_vae_faithful.py", "graph_vae_plots.py", "graph_vae_report.py"),
    *(
        "graph_vae_report_faithful.py",
        "graph_vae_report_images.py",
        "graph_vae_runs.py",
        "graph_vae_synthetic.py",
    ),
    "graph_vae_tables.py",
    *("flags.py", "whole_files.py"),
}

# short scripts to copy, and what each prints
GALLERY = {
    "semi_supervised_digits.py": (["--steps", "3", "--hidden-dim", "8"], "data where a call has some"),
}


def test_every_script_is_tested():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert {path.name for path in (EXAMPLES / "gallery").glob("*.py")} == set(GALLERY)
    assert set(SMALL) <= scripts
    assert scripts - set(SMALL) <= TESTED_ELSEWHERE


@pytest.mark.parametrize("name", sorted(GALLERY))
def test_script_of_the_gallery_runs(name):
    flags, printed = GALLERY[name]
    command = [sys.executable, "-W", "error", str(EXAMPLES / "gallery" / name), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


@pytest.mark.parametrize("name", sorted(SMALL))
def test_script_runs(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *SMALL[name], "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "faithful" in done.stdout
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "inverse.png",
        "learning_curves.png",
        "marginals.png",
    }
