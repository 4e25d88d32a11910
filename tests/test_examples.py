"""Every script in examples/ runs, is short and imports what is public; a script that is in no list fails the test."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_graphflows
from pyro_graphflows import datasets, infer, plotting

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PUBLIC = {module.__name__: module.__all__ for module in (pyro_graphflows, datasets, infer, plotting)}
# script -> flags that make it small (OUT is a folder), words of its output, pictures in OUT
SCRIPTS = {
    "quickstart.py": (
        "--network magic-niab --num-data 200 --num-test 50 --num-evidence 10 --epochs 1 --out OUT",
        ["faithful:", "KL trained"],
        {"inverse.png", "joints.png", "learning_curves.png", "marginals.png"},
    ),
    "binary_tree.py": (
        "--depth 3 --steps 5 --batch-size 20",
        ["stochastic      6", "auto      9", "full     15"],
        set(),
    ),
    "siren_vae.py": (
        "--network magic-niab --epochs 2 --num-test 20 --num-particles 5",
        ["magic-niab: ModelGraph(39 latent, 5 observed, 66 edges); 88 training", " VAE ", " SIReNVAE "],
        set(),
    ),
    "siren_vae_digits.py": (
        "--sizes 60 --epochs 2 --num-particles 2 --out OUT",
        ["ModelGraph(4 latent, 4 observed, 9 edges)"],
        {"moved.png"},
    ),
    "graph_vae.py": (
        "--epochs 1 --num-nodes 3 --node-dim 2 --num-particles 5 --pictures OUT",
        ["independent", "learned", "Learned edges: "],
        {"independent.png", "learned.png"},
    ),
    "gallery/semi_supervised_digits.py": (
        "--steps 3 --hidden-dim 8",
        ["50 labelled images", "with the others: ", "data where a call has some"],
        set(),
    ),
}
# run by a test of their own: test_examples_distributed.py
ELSEWHERE = {"distributed/ddp.py", "distributed/draws.py", "distributed/fabric.py"}


def call(name, *flags):
    """Run a script as a user does, with the package that is beside it."""
    command = [sys.executable, str(EXAMPLES / name), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_every_script_is_in_the_list():
    assert {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")} == {
        *SCRIPTS,
        *ELSEWHERE,
    }


@pytest.mark.parametrize("name", sorted({*SCRIPTS, *ELSEWHERE}))
def test_scripts_are_short_and_use_what_is_public(name):
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) <= 200
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
            assert not {"pyro_graphflows", "studies", "benchmarks"} & set(names)
        elif isinstance(node, ast.ImportFrom):
            top = node.module.split(".")[0]
            assert top not in ("studies", "benchmarks")
            if top == "pyro_graphflows":
                assert {alias.name for alias in node.names} <= set(PUBLIC[node.module]), node.module


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_script_runs(name, tmp_path):
    flags, words, pictures = SCRIPTS[name]
    done = call(name, *flags.replace("OUT", str(tmp_path)).split())
    assert done.returncode == 0, done.stderr
    for part in words:
        assert part in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == pictures


@pytest.mark.parametrize("sizes", [["10"], ["100", "2000"]])
def test_numbers_of_digits_there_are(tmp_path, sizes):
    done = call("siren_vae_digits.py", "--sizes", *sizes, "--out", str(tmp_path))
    assert done.returncode == 1
    assert "Expected sizes from 30, of which 20 are for validation, to 1297" in done.stderr
